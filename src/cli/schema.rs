//! `pipe schema`: the JSON Schemas that editors check files with.

use std::path::PathBuf;

use crate::cli::Session;
use crate::cli::failure::Failure;
use crate::pipeline::spec::{self, SchemaKind};
use crate::stages::KINDS;

/// Print the JSON Schema of pipeline or experiment files, for editors
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Which schema; both with `--write`
    #[arg(value_enum)]
    which: Option<Which>,
    /// Write `pipeline.json` and `experiment.json` into DIR instead of printing
    #[arg(long, value_name = "DIR")]
    write: Option<PathBuf>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
enum Which {
    /// Of files with stages
    Pipeline,
    /// Of files that use a pipeline and say what varies
    Experiment,
}

/// Without a folder to write to, one schema goes to stdout: the pipeline's unless another is named.
pub fn run(args: &Args, session: &Session) -> Result<(), Failure> {
    let all = [(Which::Pipeline, SchemaKind::Pipeline), (Which::Experiment, SchemaKind::Experiment)];
    let chosen = all.into_iter().filter(|(which, _)| args.which.is_none_or(|wanted| wanted == *which));
    let Some(folder) = &args.write else {
        let (_, kind) = chosen.into_iter().next().expect("every choice is in the list");
        return session.ui.json_pretty(&spec::schema(KINDS, kind));
    };
    let failed = |doing: &str, path: &std::path::Path, error: std::io::Error| {
        Failure::wrong(format!("cannot {doing} `{}`: {error}", path.display()))
    };
    std::fs::create_dir_all(folder).map_err(|error| failed("create the folder", folder, error))?;
    for (which, kind) in chosen {
        let path = folder.join(match which {
            Which::Pipeline => "pipeline.json",
            Which::Experiment => "experiment.json",
        });
        let mut text = serde_json::to_string_pretty(&spec::schema(KINDS, kind)).expect("a schema is plain data");
        text.push('\n');
        // An unchanged schema is left alone, so that build tools see no change.
        if std::fs::read_to_string(&path).is_ok_and(|old| old == text) {
            continue;
        }
        std::fs::write(&path, text).map_err(|error| failed("write", &path, error))?;
        session.ui.note(&format!("wrote {}", path.display()));
    }
    Ok(())
}
