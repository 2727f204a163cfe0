//! `pipe completions`: what a shell needs to complete commands and options.

use clap_complete::Shell;

use crate::cli::failure::Failure;
use crate::cli::{Session, arguments};

/// Print the completions of a shell
///
/// For bash: `pipe completions bash > ~/.local/share/bash-completion/completions/pipe`; for zsh, a file `_pipe` in a folder
/// of `$fpath`; for fish: `pipe completions fish > ~/.config/fish/completions/pipe.fish`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// The shell
    #[arg(value_enum)]
    shell: Shell,
}

/// The script goes to stdout.
pub fn run(args: &Args, session: &Session) -> Result<(), Failure> {
    let mut script = Vec::new();
    clap_complete::generate(args.shell, &mut arguments(), "pipe", &mut script);
    session.ui.data(&String::from_utf8_lossy(&script))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_shell_learns_every_command() {
        for shell in [Shell::Bash, Shell::Zsh, Shell::Fish, Shell::PowerShell, Shell::Elvish] {
            let mut script = Vec::new();
            clap_complete::generate(shell, &mut arguments(), "pipe", &mut script);
            let script = String::from_utf8(script).unwrap();
            for command in arguments().get_subcommands() {
                assert!(script.contains(command.get_name()), "{shell}: {}", command.get_name());
            }
        }
    }
}
