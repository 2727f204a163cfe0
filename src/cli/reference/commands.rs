//! The commands of the command line, as the parser of the arguments knows them.

use std::fmt::Write as _;

use clap::{Arg, Command};

use crate::cli::arguments;
use crate::cli::reference::fields::cell;

/// Every command with its arguments, and the options that all have.
pub(super) fn commands() -> String {
    let mut program = arguments();
    program.build();
    let mut text = String::from("Every command takes:\n\n");
    text.push_str(&table(program.get_arguments().filter(|argument| argument.is_global_set())));
    let commands = program.get_subcommands().filter(|command| command.get_name() != "help" && !command.is_hide_set());
    for command in commands {
        let _ = write!(text, "\n### `pipe {}`\n\n{}\n", command.get_name(), about(command));
        let own: Vec<&Command> = command.get_subcommands().filter(|inner| inner.get_name() != "help").collect();
        let usage = |command: &Command| {
            let usage = command.clone().render_usage().to_string();
            usage.trim_start_matches("Usage:").trim().to_owned()
        };
        let _ = write!(text, "\n```text\n{}\n```\n", usage(command));
        let arguments = table(command.get_arguments().filter(|argument| !argument.is_global_set()));
        if !arguments.is_empty() {
            let _ = write!(text, "\n{arguments}");
        }
        for inner in own {
            let _ = write!(text, "\n`pipe {} {}`: {}\n", command.get_name(), inner.get_name(), about(inner));
            let arguments = table(inner.get_arguments().filter(|argument| !argument.is_global_set()));
            let _ = write!(text, "\n{arguments}");
        }
    }
    text
}

fn about(command: &Command) -> String {
    let about = command.get_long_about().or(command.get_about()).map(ToString::to_string).unwrap_or_default();
    let paragraphs = about.split("\n\n").map(|paragraph| ended(&cell(paragraph)));
    paragraphs.collect::<Vec<_>>().join("\n\n")
}

/// A sentence with its full stop, which the help of a terminal goes without.
fn ended(text: &str) -> String {
    if text.is_empty() || text.ends_with(['.', '`', ':']) { text.to_owned() } else { format!("{text}.") }
}

fn table<'a>(arguments: impl Iterator<Item = &'a Arg>) -> String {
    let shown = arguments
        .filter(|argument| !argument.is_hide_set() && !["help", "version"].contains(&argument.get_id().as_str()));
    let rows: Vec<String> = shown.map(row).collect();
    if rows.is_empty() { String::new() } else { format!("| argument | what |\n|---|---|\n{}\n", rows.join("\n")) }
}

fn row(argument: &Arg) -> String {
    let values: Vec<&str> = argument.get_value_names().into_iter().flatten().map(clap::builder::Str::as_str).collect();
    let takes = argument.get_action().takes_values();
    let name = match (argument.get_short(), argument.get_long()) {
        (Some(short), Some(long)) => format!("-{short}, --{long}"),
        (None, Some(long)) => format!("--{long}"),
        (Some(short), None) => format!("-{short}"),
        (None, None) => String::new(),
    };
    let name = match (name.is_empty(), takes) {
        (true, _) => values.join(" "),
        (false, true) => format!("{name} {}", values.join(" ")),
        (false, false) => name,
    };
    let help = argument.get_help().or(argument.get_long_help()).map(ToString::to_string).unwrap_or_default();
    let mut what = cell(&help);
    let possible: Vec<String> = argument
        .get_possible_values()
        .iter()
        .filter(|value| takes && !value.is_hide_set())
        .map(|value| match value.get_help() {
            Some(help) => format!("`{}` ({})", value.get_name(), cell(&help.to_string())),
            None => format!("`{}`", value.get_name()),
        })
        .collect();
    if !possible.is_empty() {
        what = format!("{what}: {}", possible.join(", "));
    }
    let defaults: Vec<String> =
        argument.get_default_values().iter().map(|value| value.to_string_lossy().into_owned()).collect();
    if takes && !defaults.is_empty() && !argument.is_hide_default_value_set() {
        what = format!("{what} [default: `{}`]", defaults.join(", "));
    }
    format!("| `{}` | {what} |", name.trim().replace('|', "\\|"))
}
