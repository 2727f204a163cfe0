//! `pipe fmt`: TOML files laid out as everyone's are.

use std::io::Read as _;
use std::path::{Path, PathBuf};

use crate::cli::failure::Failure;
use crate::cli::{Session, render};
use crate::pipeline::spec;

/// Lay out TOML files: spaces, blank lines and comments in line; no value, key, comment or order changes
#[derive(Debug, clap::Args)]
pub struct Args {
    /// TOML files; `-` reads stdin and writes stdout [default: those in `experiments` and `pipelines`]
    #[arg(value_name = "FILES")]
    files: Vec<PathBuf>,
    /// Write nothing, and end with 1 where a file is laid out otherwise
    #[arg(long)]
    check: bool,
}

/// With `--json`, the array of the files that were, or would be, written anew.
pub fn run(args: &Args, session: &Session) -> Result<(), Failure> {
    let files = if args.files.is_empty() { shipped()? } else { args.files.clone() };
    let mut mistakes = Vec::new();
    let mut changed = Vec::new();
    for file in &files {
        let is_stdin = file.as_os_str() == "-";
        let shown = if is_stdin { Path::new("stdin") } else { file.as_path() };
        let text = if is_stdin {
            let mut text = String::new();
            std::io::stdin().read_to_string(&mut text).map(|_| text)
        } else {
            std::fs::read_to_string(file)
        };
        let text = text.map_err(|error| Failure::wrong(format!("cannot read `{}`: {error}", shown.display())))?;
        match spec::format(shown, &text) {
            Err(found) => mistakes.push(found.render(session.ui.error_color())),
            Ok(laid_out) if is_stdin && !args.check => session.ui.data(&laid_out)?,
            Ok(laid_out) if laid_out == text => {}
            Ok(laid_out) => {
                if !args.check {
                    replace(file, &laid_out)
                        .map_err(|error| Failure::failed(format!("cannot write `{}`: {error}", file.display())))?;
                }
                changed.push(shown.to_string_lossy().into_owned());
            }
        }
    }
    if session.ui.is_json() {
        session.ui.json_pretty(&changed)?;
    } else {
        let what = if args.check { "is laid out otherwise" } else { "laid out" };
        for file in &changed {
            session.ui.note(&format!("{file}: {what}"));
        }
    }
    if !mistakes.is_empty() {
        return Err(Failure::diagnostics(mistakes.join("\n")));
    }
    if args.check && !changed.is_empty() {
        let others = render::plural(changed.len(), "file");
        return Err(Failure::failed(format!("{others} would be written anew")).hint("`pipe fmt` writes them"));
    }
    Ok(())
}

/// The TOML files in the folders where experiments and pipelines lie.
fn shipped() -> Result<Vec<PathBuf>, Failure> {
    let folders = ["experiments", "pipelines"].map(std::fs::read_dir);
    let mut files: Vec<PathBuf> = folders.into_iter().flatten().flatten().flatten().map(|entry| entry.path()).collect();
    files.retain(|file| file.extension().is_some_and(|extension| extension == "toml"));
    files.sort();
    if files.is_empty() {
        return Err(Failure::wrong("there is no TOML file in `experiments` or `pipelines`").hint("name the files"));
    }
    Ok(files)
}

/// Writes a file whole or not at all, with the permissions that it has.
fn replace(file: &Path, text: &str) -> std::io::Result<()> {
    let file = std::fs::canonicalize(file)?;
    let folder = file.parent().unwrap_or(Path::new("."));
    let written = tempfile::NamedTempFile::new_in(folder)?;
    std::fs::write(written.path(), text)?;
    std::fs::set_permissions(written.path(), std::fs::metadata(&file)?.permissions())?;
    written.persist(&file)?;
    Ok(())
}
