//! `pipe init`: a new experiment, commented, that runs as it is.

use std::io::Write as _;
use std::path::{Component, Path, PathBuf};

use crate::cli::Session;
use crate::cli::failure::Failure;
use crate::pipeline::spec::{self, SchemaKind};
use crate::stages::KINDS;

/// Write a new experiment from a template
///
/// The file is commented and runs as it is: `pipe plan` and `pipe run` take it at once. Nothing is ever overwritten.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// How the experiment is called, or the file to write; a bare name goes to the folder `experiments` where there is one
    #[arg(value_name = "NAME")]
    name: Option<PathBuf>,
    /// What it begins with
    #[arg(long, short, value_enum, default_value_t)]
    template: Template,
}

/// What an experiment begins with.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
enum Template {
    /// A small model learns to solve mazes: supervised, then GRPO
    #[default]
    Maze,
    /// Episodes of several turns: a model brings a number to a target
    #[value(name = "number_line")]
    NumberLine,
    /// Your own prompts and answers as JSONL, and a model of your own
    OwnData,
    /// A task and a reward of your own, as Python programs
    OwnTask,
}

impl Template {
    /// How it is called, which is also the name of an experiment that is given none.
    fn name(self) -> &'static str {
        match self {
            Self::Maze => "maze",
            Self::NumberLine => "number_line",
            Self::OwnData => "own_data",
            Self::OwnTask => "own_task",
        }
    }

    /// The experiment. `NAME` stands for its name, and `SCHEMA` for where the schema is.
    fn text(self) -> &'static str {
        match self {
            Self::Maze => include_str!("init/maze.toml"),
            Self::NumberLine => include_str!("init/number_line.toml"),
            Self::OwnData => include_str!("init/own_data.toml"),
            Self::OwnTask => include_str!("init/own_task.toml"),
        }
    }

    /// What lies beside it: the end of the file's name behind the experiment's, and its text.
    fn files(self) -> &'static [(&'static str, &'static str)] {
        match self {
            Self::Maze | Self::NumberLine => &[],
            Self::OwnData => {
                &[(".train.jsonl", include_str!("init/train.jsonl")), (".test.jsonl", include_str!("init/test.jsonl"))]
            }
            Self::OwnTask => {
                &[("_task.py", include_str!("init/task.py")), ("_reward.py", include_str!("init/reward.py"))]
            }
        }
    }
}

/// With `--json`, the array of the files that were written.
pub fn run(args: &Args, session: &Session) -> Result<(), Failure> {
    let path = place(args.name.as_deref().unwrap_or(Path::new(args.template.name())))?;
    let name = path.file_stem().unwrap_or_default().to_string_lossy().into_owned();
    let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let mut files: Vec<(PathBuf, String)> = Vec::new();
    let schema = if let Some(schema) = nearest_schema(folder) {
        schema
    } else {
        let text = serde_json::to_string_pretty(&spec::schema(KINDS, SchemaKind::Experiment));
        let text = text.expect("a schema is plain data") + "\n";
        files.push((folder.join("schemas").join(SCHEMA), text));
        Path::new("schemas").join(SCHEMA)
    };
    let filled = |text: &str| text.replace("SCHEMA", &schema.to_string_lossy()).replace("NAME", &name);
    files.extend(args.template.files().iter().map(|(end, text)| (folder.join(format!("{name}{end}")), filled(text))));
    // Last, so that what it names is there.
    files.push((path.clone(), filled(args.template.text())));
    if let Some((taken, _)) = files.iter().find(|(path, _)| path.symlink_metadata().is_ok()) {
        return Err(Failure::wrong(format!("`{}` is there already", taken.display()))
            .hint("nothing is overwritten: give another name, as `pipe init NAME`"));
    }
    for (path, text) in &files {
        write(path, text).map_err(|error| Failure::wrong(format!("cannot write `{}`: {error}", path.display())))?;
    }
    if session.ui.is_json() {
        let written: Vec<String> = files.iter().map(|(path, _)| path.to_string_lossy().into_owned()).collect();
        return session.ui.json_pretty(&written);
    }
    for (written, _) in &files {
        session.ui.note(&format!("wrote {}", written.display()));
    }
    if session.ui.is_quiet() {
        return Ok(());
    }
    session.ui.hint(&format!("`pipe plan {0}` shows what would run, `pipe run {0}` runs it", path.display()));
    Ok(())
}

/// The schema's file.
const SCHEMA: &str = "experiment.json";

/// The file that a name means.
fn place(name: &Path) -> Result<PathBuf, Failure> {
    let path = if name.extension().is_some_and(|extension| extension == "toml") {
        name.to_owned()
    } else {
        let mut file = name.as_os_str().to_owned();
        file.push(".toml");
        PathBuf::from(file)
    };
    let stem = path.file_stem().unwrap_or_default().to_string_lossy();
    // It becomes a part of names such as `NAME/STAGE`, and of file names.
    if stem.is_empty() || !stem.chars().all(|c| c.is_alphanumeric() || "_-".contains(c)) {
        return Err(Failure::wrong(format!("`{stem}` is no name for an experiment"))
            .hint("letters, digits, `_` and `-` make one, as in `my_maze`"));
    }
    let experiments = Path::new("experiments");
    let is_bare = path.components().count() == 1 && matches!(path.components().next(), Some(Component::Normal(_)));
    Ok(if is_bare && experiments.is_dir() { experiments.join(path) } else { path })
}

/// The path from `folder` to the schema in it or the nearest folder above that has one.
fn nearest_schema(folder: &Path) -> Option<PathBuf> {
    let absolute = std::path::absolute(folder).ok()?;
    let mut up = PathBuf::new();
    for above in absolute.ancestors() {
        let schema = Path::new("schemas").join(SCHEMA);
        if above.join(&schema).is_file() {
            return Some(up.join(schema));
        }
        up.push("..");
    }
    None
}

/// Writes a new file; one that is there is an error.
fn write(path: &Path, text: &str) -> std::io::Result<()> {
    if let Some(folder) = path.parent() {
        std::fs::create_dir_all(folder)?;
    }
    std::fs::File::create_new(path)?.write_all(text.as_bytes())
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::ValueEnum as _;

    #[test]
    fn names_become_files() {
        assert_eq!(place(Path::new("a/my-maze")).unwrap(), Path::new("a/my-maze.toml"));
        assert_eq!(place(Path::new("./x.toml")).unwrap(), Path::new("./x.toml"));
        for wrong in ["", "a b", "a.b", "x/.toml", "..", "é/*"] {
            assert!(place(Path::new(wrong)).is_err(), "{wrong}");
        }
    }

    #[test]
    fn the_schema_is_named_from_where_the_file_is() {
        let folder = tempfile::tempdir().unwrap();
        let deep = folder.path().join("a/b");
        std::fs::create_dir_all(&deep).unwrap();
        std::fs::create_dir_all(folder.path().join("schemas")).unwrap();
        std::fs::write(folder.path().join("schemas").join(SCHEMA), "{}").unwrap();
        assert_eq!(nearest_schema(&deep), Some("../../schemas/experiment.json".into()));
        assert_eq!(nearest_schema(folder.path()), Some("schemas/experiment.json".into()));
    }

    #[test]
    fn templates_are_laid_out_and_have_their_names() {
        for template in Template::value_variants() {
            let text = template.text();
            assert!(text.starts_with("#:schema SCHEMA\n"), "{template:?}");
            assert_eq!(spec::format(Path::new("template.toml"), text).unwrap(), text, "{template:?}");
            for (end, _) in template.files() {
                assert!(text.contains(&format!("NAME{end}")), "{template:?} does not name its {end}");
            }
        }
    }
}
