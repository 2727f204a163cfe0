//! `pipe inspect`: what an artifact holds, by its type.

mod checkpoint;
mod completions;
mod dataset;
mod tokens;

use std::fmt::Write as _;
use std::path::{Path, PathBuf};

use serde_json::{Value, json};

use crate::cli::failure::Failure;
use crate::cli::show::find;
use crate::cli::{Session, render};
use crate::pipeline::stage::ArtifactType;

/// Columns where there is no terminal.
const COLUMNS: u16 = 100;

/// Show what an artifact holds
///
/// Of a dataset its files, columns and a row; of tokens a row token by token, with the targets of the loss; of a checkpoint its
/// configuration, parameters and tensors; of rollouts the groups of a step with rewards and advantages, and where reward and
/// solved are furthest apart; of an evaluation its metrics and the types of its errors.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// `EXPERIMENT[/TRIAL]/STAGE[.OUTPUT]`, `FILE.toml[/TRIAL]/STAGE[.OUTPUT]`, or a folder
    #[arg(value_name = "ARTIFACT")]
    target: String,
    /// The row of a dataset or of tokens, from 0
    #[arg(long, value_name = "N")]
    row: Option<usize>,
    /// Count the rows of this split alone
    #[arg(long, value_name = "NAME")]
    split: Option<String>,
    /// The step of rollouts [default: the last]
    #[arg(long, value_name = "N")]
    step: Option<i64>,
    /// Groups, tensors, tokens or files to show, at most
    #[arg(long, value_name = "N", default_value_t = 8)]
    count: usize,
    /// Lay a value over the file, as for `pipe run`
    #[arg(long = "set", value_name = "PATH=VALUE")]
    sets: Vec<String>,
}

/// How something is looked at.
struct Look<'a> {
    args: &'a Args,
    width: usize,
    color: bool,
}

/// What was seen: for programs, and for people.
struct Seen {
    value: Value,
    text: String,
}

/// An artifact: where it lies, what it is, and of whose result it is.
struct Artifact {
    folder: PathBuf,
    kind: ArtifactType,
}

/// With `--json`, an object by the artifact's type, with its `type` and `path`.
pub fn run(args: &Args, session: &Session) -> Result<(), Failure> {
    let width = usize::from(session.ui.output_width().unwrap_or(COLUMNS));
    let look = Look { args, width, color: session.ui.output_color() };
    let artifact = artifact(args, session)?;
    check(args, artifact.kind)?;
    let seen = match artifact.kind {
        ArtifactType::Evaluation | ArtifactType::Rollouts => {
            completions::inspect(&artifact.folder, &completions_of(args, session, &artifact)?, &look)
        }
        ArtifactType::Tokens => tokens::inspect(&artifact.folder, &look),
        ArtifactType::Tokenizer => tokens::vocabulary(&artifact.folder, &look),
        ArtifactType::Dataset => dataset::inspect(&artifact.folder, &look),
        ArtifactType::Checkpoint => checkpoint::inspect(&artifact.folder, &look),
        ArtifactType::TrainingState | ArtifactType::Files => files(&artifact.folder, &look),
    };
    let mut seen = seen.map_err(|error| Failure::stage(error.as_ref()))?;
    if session.ui.is_json() {
        seen.value["type"] = json!(artifact.kind);
        seen.value["path"] = json!(artifact.folder);
        return session.ui.json_pretty(&seen.value);
    }
    session.ui.data(&format!("{} in {}\n\n{}", artifact.kind, artifact.folder.display(), seen.text.trim_end()))
}

/// Refuses options that say nothing about such an artifact.
fn check(args: &Args, kind: ArtifactType) -> Result<(), Failure> {
    use ArtifactType::{Dataset, Rollouts, Tokens};
    let asked: [(&str, bool, &[ArtifactType]); 3] = [
        ("--row", args.row.is_some(), &[Dataset, Tokens]),
        ("--split", args.split.is_some(), &[Dataset, Tokens]),
        ("--step", args.step.is_some(), &[Rollouts]),
    ];
    let Some((option, _, fits)) = asked.iter().find(|(_, is_asked, fits)| *is_asked && !fits.contains(&kind)) else {
        return Ok(());
    };
    let of: Vec<String> = fits.iter().map(|kind| format!("`{kind}`")).collect();
    Err(Failure::wrong(format!("`{option}` asks nothing of a `{kind}`"))
        .hint(format!("it is for {}", of.join(" and "))))
}

/// The folder that is there, or the output of a result.
fn artifact(args: &Args, session: &Session) -> Result<Artifact, Failure> {
    let folder = Path::new(&args.target);
    if folder.is_dir() {
        return Ok(Artifact { folder: folder.to_owned(), kind: kind_of(folder) });
    }
    let found = find(&args.target, &args.sets, session)?;
    let mut output = found.output()?;
    // Where no output is named, that of a training's first is a checkpoint, but what people ask rows and steps of is another.
    if !found.names_output() && (args.step.is_some() || args.row.is_some()) {
        let wanted = if args.step.is_some() { ArtifactType::Rollouts } else { output.artifact };
        output = found.manifest().outputs.iter().find(|output| output.artifact == wanted).unwrap_or(output);
    }
    Ok(Artifact { folder: found.result().store.object(&output.digest), kind: output.artifact })
}

/// The completions of a result, or of a folder alone.
fn completions_of(
    args: &Args,
    session: &Session,
    artifact: &Artifact,
) -> Result<crate::cli::stored::Completions, Failure> {
    if Path::new(&args.target).is_dir() {
        return crate::cli::stored::Completions::open(&artifact.folder);
    }
    crate::cli::stored::Completions::of(&find(&args.target, &args.sets, session)?.result())
}

/// What a folder holds, by its files.
fn kind_of(folder: &Path) -> ArtifactType {
    let has = |name: &str| folder.join(name).exists();
    let is_parquet = |entry: std::io::Result<std::fs::DirEntry>| {
        entry.is_ok_and(|entry| entry.path().extension().is_some_and(|extension| extension == "parquet"))
    };
    match () {
        () if has("rollouts.parquet") => ArtifactType::Rollouts,
        () if has("examples.parquet") => ArtifactType::Evaluation,
        () if has("tokens.safetensors") => ArtifactType::Tokens,
        () if has("config.json") && (has("model.safetensors") || has("model.safetensors.index.json")) => {
            ArtifactType::Checkpoint
        }
        () if has("tokenizer.json") => ArtifactType::Tokenizer,
        () if std::fs::read_dir(folder).is_ok_and(|mut entries| entries.any(is_parquet)) => ArtifactType::Dataset,
        () => ArtifactType::Files,
    }
}

/// Every file with its size.
fn files(folder: &Path, look: &Look<'_>) -> anyhow::Result<Seen> {
    let mut found: Vec<(String, u64)> = Vec::new();
    let mut folders = vec![folder.to_owned()];
    while let Some(next) = folders.pop() {
        for entry in std::fs::read_dir(&next)? {
            let path = entry?.path();
            if path.is_dir() {
                folders.push(path);
            } else {
                let name = path.strip_prefix(folder).unwrap_or(&path).display().to_string();
                found.push((name, std::fs::metadata(&path)?.len()));
            }
        }
    }
    found.sort();
    let all: u64 = found.iter().map(|(_, size)| size).sum();
    let rows = found.iter().take(look.args.count.max(1));
    let rows = rows.map(|(name, size)| vec![name.clone(), render::bytes(*size as f64)]).collect();
    let mut text = render::columns(&["file", "size"], &[1], rows, None);
    text += &more(found.len(), look.args.count.max(1));
    let _ = writeln!(text, "{} in {}", render::bytes(all as f64), render::plural(found.len(), "file"));
    let value =
        json!({ "files": found.iter().map(|(name, size)| json!({"name": name, "size": size})).collect::<Vec<_>>() });
    Ok(Seen { value, text })
}

/// `and 12 more; --count shows them`, where there are more than are shown.
fn more(all: usize, shown: usize) -> String {
    match all.saturating_sub(shown) {
        0 => String::new(),
        more => format!("and {} more; `--count` shows them\n", render::count(more as u64)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser;

    #[derive(Parser)]
    struct Line {
        #[command(flatten)]
        args: Args,
    }

    /// Looks at something with these options.
    pub(super) fn look_at<T>(options: &[&str], see: impl FnOnce(&Look<'_>) -> T) -> T {
        let line = Line::parse_from(["inspect", "x"].iter().chain(options));
        see(&Look { args: &line.args, width: 80, color: false })
    }

    #[test]
    fn options_that_an_artifact_has_no_use_for_are_refused() {
        let asked = |options: &[&str], kind| look_at(options, |look| check(look.args, kind));
        assert!(asked(&["--row", "3"], ArtifactType::Tokens).is_ok() && asked(&[], ArtifactType::Checkpoint).is_ok());
        let failure = asked(&["--step", "3"], ArtifactType::Dataset).unwrap_err();
        assert_eq!(failure.parts().0, "`--step` asks nothing of a `dataset`");
        assert_eq!(failure.parts().2, ["it is for `rollouts`"]);
        assert!(asked(&["--row", "1"], ArtifactType::Checkpoint).is_err());
        assert!(asked(&["--split", "test"], ArtifactType::Rollouts).is_err());
    }

    #[test]
    fn a_folder_tells_what_it_is_by_its_files() {
        let folder = tempfile::tempdir().unwrap();
        let mut seen = vec![kind_of(folder.path())];
        for name in [
            "train.parquet",
            "tokenizer.json",
            "config.json",
            "model.safetensors",
            "tokens.safetensors",
            "examples.parquet",
            "rollouts.parquet",
        ] {
            std::fs::write(folder.path().join(name), "").unwrap();
            seen.push(kind_of(folder.path()));
        }
        let names: Vec<&str> = seen.into_iter().map(ArtifactType::name).collect();
        assert_eq!(
            names,
            ["files", "dataset", "tokenizer", "tokenizer", "checkpoint", "tokens", "evaluation", "rollouts"]
        );
    }
}
