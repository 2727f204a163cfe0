//! `pipe man`: manual pages, made of the same words as `--help`.

use std::path::PathBuf;

use clap_mangen::Man;

use crate::cli::failure::Failure;
use crate::cli::{Session, arguments, render};

/// Print the manual page, or write the pages of all commands
#[derive(Debug, clap::Args)]
pub struct Args {
    /// The command whose page to print [default: the program's own]
    #[arg(value_name = "COMMAND", conflicts_with = "write")]
    command: Option<String>,
    /// Write every page into DIR, as `pipe.1` and `pipe-run.1`; a folder `man1` that `MANPATH` leads to serves `man`
    #[arg(long, value_name = "DIR")]
    write: Option<PathBuf>,
}

/// A page goes to stdout as roff: `pipe man run | man -l -`.
pub fn run(args: &Args, session: &Session) -> Result<(), Failure> {
    let pages = pages();
    let Some(folder) = &args.write else {
        let wanted = args.command.as_ref().map_or_else(|| "pipe".to_owned(), |command| format!("pipe-{command}"));
        let Some((_, page)) = pages.iter().find(|(name, _)| *name == wanted) else {
            let command = args.command.as_deref().unwrap_or_default();
            let failure = Failure::wrong(format!("there is no command `{command}`"));
            let near = render::near(command, pages.iter().filter_map(|(name, _)| name.strip_prefix("pipe-")));
            return Err(match near.first() {
                Some(near) => failure.hint(format!("did you mean `{near}`?")),
                None => failure.hint("`pipe --help` lists the commands"),
            });
        };
        return session.ui.data(&String::from_utf8_lossy(page));
    };
    let failed = |doing: &str, path: &std::path::Path, error: std::io::Error| {
        Failure::wrong(format!("cannot {doing} `{}`: {error}", path.display()))
    };
    std::fs::create_dir_all(folder).map_err(|error| failed("create the folder", folder, error))?;
    for (name, page) in &pages {
        let path = folder.join(format!("{name}.1"));
        std::fs::write(&path, page).map_err(|error| failed("write", &path, error))?;
    }
    session.ui.note(&format!("wrote {} to {}", render::plural(pages.len(), "page"), folder.display()));
    Ok(())
}

/// Every page by its name, the program's own first.
fn pages() -> Vec<(String, Vec<u8>)> {
    let mut program = arguments().disable_help_subcommand(true);
    program.build();
    let commands = program.get_subcommands().filter(|command| !command.is_hide_set()).cloned();
    let all = std::iter::once(program.clone()).chain(commands);
    all.map(|command| {
        let name = command.get_display_name().unwrap_or(command.get_name()).to_owned();
        let mut page = Vec::new();
        Man::new(command).render(&mut page).expect("a page is written to memory");
        (name, page)
    })
    .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_command_has_a_page() {
        let pages = pages();
        let names: Vec<&str> = pages.iter().map(|(name, _)| name.as_str()).collect();
        assert_eq!(names[0], "pipe");
        assert!(names.contains(&"pipe-run") && names.contains(&"pipe-init"), "{names:?}");
        assert_eq!(pages.len(), 1 + arguments().get_subcommands().count());
        let run = pages.iter().find(|(name, _)| name == "pipe-run").unwrap();
        assert!(String::from_utf8_lossy(&run.1).contains("\\-\\-until"));
    }
}
