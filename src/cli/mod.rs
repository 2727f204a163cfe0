//! The command line: parse, call the library, print. The only place that prints.
//!
//! One file a command, each with its `Args` (whose doc comments are the help) and its `run`; every command is a prefix of
//! read, plan, execute and a printer. [`ui`] is the one way to the terminal, [`failure`] the one way to an exit code.
//! Nothing here computes a result.

pub mod accept;
pub mod arms;
pub mod audit;
pub mod bundle;
pub mod check;
pub mod comparison;
pub mod completions;
pub mod config;
pub mod costs;
pub mod curves;
pub mod diff;
pub mod export;
pub mod failure;
pub mod fmt;
pub mod gc;
pub mod graph;
pub mod import;
pub mod init;
pub mod inspect;
pub mod logs;
pub mod man;
pub mod pace;
pub mod plan;
pub mod progress;
pub mod reference;
pub mod render;
pub mod report;
pub mod rescore;
pub mod results;
pub mod rollouts;
pub mod run;
pub mod sample;
pub mod schema;
pub mod score;
pub mod sessions;
pub mod show;
pub mod status;
pub mod stored;
pub mod table;
pub mod tuning;
pub mod ui;
pub mod verify;
pub mod why;

use std::mem::ManuallyDrop;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::{CommandFactory as _, Parser};

use crate::cli::failure::Failure;
use crate::cli::ui::{Color, Ui};
use crate::pipeline::plan::{Plan, PlanError, SameArms};
use crate::pipeline::spec::{self, Experiment};
use crate::pipeline::store::Store;
use crate::stages::KINDS;

/// Declarative, cached experiments that teach language models to act.
///
/// TOML files describe a graph of stages; `pipe run` runs what is missing and keeps every result under its content.
#[derive(Debug, Parser)]
#[command(name = "pipe", version, max_term_width = 100, arg_required_else_help = true)]
struct Cli {
    #[command(flatten)]
    global: Global,
    #[command(subcommand)]
    command: Command,
}

/// What every command takes.
#[derive(Clone, Debug, clap::Args)]
#[command(next_display_order = 100)]
pub struct Global {
    /// The folder of results [default: `PIPE_STORE`, or else `artifacts`]
    #[arg(long, global = true, value_name = "DIR", help_heading = "Everywhere")]
    store: Option<PathBuf>,
    /// Print JSON to stdout
    #[arg(long, global = true, help_heading = "Everywhere")]
    json: bool,
    /// When to use colour [default: auto, which honours `NO_COLOR`]
    #[arg(
        long,
        global = true,
        value_enum,
        default_value_t,
        value_name = "auto|always|never",
        hide_possible_values = true,
        hide_default_value = true,
        help_heading = "Everywhere"
    )]
    color: Color,
    /// Say nothing but errors and what was asked for
    #[arg(short, long, global = true, help_heading = "Everywhere")]
    quiet: bool,
}

#[derive(Debug, clap::Subcommand)]
enum Command {
    Accept(accept::Args),
    Audit(audit::Args),
    Bundle(bundle::Args),
    Check(check::Args),
    Completions(completions::Args),
    Config(config::Args),
    Diff(diff::Args),
    Export(export::Args),
    Fmt(fmt::Args),
    Gc(gc::Args),
    Graph(graph::Args),
    Import(import::Args),
    Init(init::Args),
    Inspect(inspect::Args),
    Logs(logs::Args),
    Man(man::Args),
    Plan(plan::Args),
    Reference(reference::Args),
    Report(report::Args),
    Rescore(rescore::Args),
    Run(run::Args),
    Sample(sample::Args),
    Schema(schema::Args),
    Score(score::Args),
    Show(show::Args),
    Status(status::Args),
    Table(table::Args),
    Verify(verify::Args),
    Why(why::Args),
}

/// Every command with its options, as the arguments are read.
pub fn arguments() -> clap::Command {
    Cli::command()
}

/// What a command is given besides its arguments.
pub struct Session {
    /// The way to the terminal.
    pub ui: Ui,
    /// The folder of results.
    pub store: PathBuf,
    /// Whether the user has named it.
    pub store_is_named: bool,
}

/// The whole program: the exit code is 0 done, 1 a stage failed, 2 the user's input is wrong, 70 a bug, 130 interrupted.
pub fn main() -> ExitCode {
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(answer) => {
            // A closed pipe behind `pipe --help | head` is nobody's mistake.
            let _ = answer.print();
            return ExitCode::from(if answer.use_stderr() { 2 } else { 0 });
        }
    };
    std::panic::set_hook(Box::new(failure::report_panic));
    let outcome = std::panic::catch_unwind(move || {
        let Global { store, json, color, quiet } = cli.global;
        let store = store.or_else(|| std::env::var_os("PIPE_STORE").filter(|dir| !dir.is_empty()).map(PathBuf::from));
        let store_is_named = store.is_some();
        let store = store.unwrap_or_else(|| "artifacts".into());
        let session = Session { ui: Ui::new(json, quiet, color), store, store_is_named };
        let logs = crate::telemetry::logging::to_terminal(session.ui.log_writer());
        match logs.map_err(|error| Failure::wrong(format!("{error:#}"))).and_then(|()| dispatch(&cli.command, &session))
        {
            Ok(()) => 0,
            Err(failure) => {
                session.ui.failure(&failure);
                failure.code()
            }
        }
    });
    ExitCode::from(outcome.unwrap_or(failure::BUG))
}

fn dispatch(command: &Command, session: &Session) -> Result<(), Failure> {
    match command {
        Command::Accept(args) => accept::run(args, session),
        Command::Audit(args) => audit::run(args, session),
        Command::Bundle(args) => bundle::run(args, session),
        Command::Check(args) => check::run(args, session),
        Command::Completions(args) => completions::run(args, session),
        Command::Config(args) => config::run(args, session),
        Command::Diff(args) => diff::run(args, session),
        Command::Export(args) => export::run(args, session),
        Command::Fmt(args) => fmt::run(args, session),
        Command::Gc(args) => gc::run(args, session),
        Command::Graph(args) => graph::run(args, session),
        Command::Import(args) => import::run(args, session),
        Command::Init(args) => init::run(args, session),
        Command::Inspect(args) => inspect::run(args, session),
        Command::Logs(args) => logs::run(args, session),
        Command::Man(args) => man::run(args, session),
        Command::Plan(args) => plan::run(args, session),
        Command::Reference(args) => reference::run(args, session),
        Command::Report(args) => report::run(args, session),
        Command::Rescore(args) => rescore::run(args, session),
        Command::Run(args) => run::run(args, session),
        Command::Sample(args) => sample::run(args, session),
        Command::Schema(args) => schema::run(args, session),
        Command::Score(args) => score::run(args, session),
        Command::Show(args) => show::run(args, session),
        Command::Status(args) => status::run(args, session),
        Command::Table(args) => table::run(args, session),
        Command::Verify(args) => verify::run(args, session),
        Command::Why(args) => why::run(args, session),
    }
}

/// The files of a command that reads experiments.
#[derive(Clone, Debug, clap::Args)]
pub struct Files {
    /// Experiment or pipeline files
    #[arg(required = true, value_name = "FILES")]
    pub files: Vec<PathBuf>,
    /// Lay a value over every file, as `--set stages.sft.steps=10`
    #[arg(long = "set", value_name = "PATH=VALUE")]
    pub sets: Vec<String>,
}

/// The files of a command that may name a stage behind them.
#[derive(Clone, Debug, clap::Args)]
pub struct FilesAndStage {
    /// Experiment or pipeline files, then the stage: `STAGE`, `TRIAL/STAGE`, `EXPERIMENT/STAGE` or `EXPERIMENT/TRIAL/STAGE`
    #[arg(required = true, num_args = 1.., value_names = ["FILES", "STAGE"])]
    arguments: Vec<String>,
    /// Lay a value over every file, as `--set stages.sft.steps=10`
    #[arg(long = "set", value_name = "PATH=VALUE")]
    pub sets: Vec<String>,
}

impl FilesAndStage {
    /// The files, and the stage where one is named: the last argument, unless it is called as a TOML file is.
    pub fn split(&self) -> (Vec<PathBuf>, Option<&str>) {
        let is_file = |argument: &str| Path::new(argument).extension().is_some_and(|extension| extension == "toml");
        let (files, stage) = match self.arguments.split_last() {
            Some((stage, files)) if !files.is_empty() && !is_file(stage) => (files, Some(stage.as_str())),
            _ => (&self.arguments[..], None),
        };
        (files.iter().map(PathBuf::from).collect(), stage)
    }
}

impl Session {
    /// Reads experiments, with what their tuning trials have chosen so far; every mistake of every file is in the failure.
    /// They are never taken apart: the process ends soon, and what it holds ends with it at once.
    pub fn read(&self, files: &[PathBuf], sets: &[String]) -> Result<ManuallyDrop<Vec<Experiment>>, Failure> {
        let mut experiments = spec::read(files, sets, KINDS)
            .map(ManuallyDrop::new)
            .map_err(|mistakes| Failure::diagnostics(mistakes.render(self.ui.error_color())))?;
        if experiments.iter().any(|experiment| experiment.tuning.is_some()) {
            tuning::choose(self, &mut experiments, self.existing_store()?.as_ref())?;
        }
        Ok(experiments)
    }

    /// The store as it is; `None` where there is none yet. Changes nothing.
    pub fn existing_store(&self) -> Result<Option<Store>, Failure> {
        Store::open_existing(&self.store).map_err(|error| Failure::input(&error).hint(store_hint(&self.store)))
    }

    /// The plan of `experiments` over the store as it is. Changes nothing. It is never taken apart, as what was read is not.
    pub fn plan(&self, experiments: &[Experiment], store: Option<&Store>) -> Result<ManuallyDrop<Plan>, Failure> {
        Plan::new(experiments, store).map(ManuallyDrop::new).map_err(|error| match error {
            PlanError::Store(error) => Failure::input(&error).hint(store_hint(&self.store)),
            other => Failure::input(&other),
        })
    }
}

/// What people should know of arms that differ in nothing that matters.
pub fn same_arms(session: &Session, plan: &Plan, experiments: &[Experiment]) -> Result<(), Failure> {
    let same = plan.same_arms(experiments).map_err(|error| Failure::input(&error))?;
    for SameArms { experiment, arms } in same {
        let names = arms.iter().map(|arm| format!("`{arm}`")).collect::<Vec<_>>();
        let (last, others) = names.split_last().map_or(("", &[][..]), |(last, others)| (last.as_str(), others));
        session.ui.note(&format!(
            "arms {} and {last} of `{experiment}` are the same arm: what they differ in has no effect on any result \
             beyond rounding",
            others.join(", ")
        ));
    }
    Ok(())
}

/// What a user may do about a store that cannot be opened.
fn store_hint(store: &Path) -> String {
    format!("the store is `{}`; name another with `--store DIR` or PIPE_STORE", store.display())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_arguments_are_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn global_options_stand_anywhere() {
        let cli = Cli::try_parse_from(["pipe", "--json", "plan", "a.toml", "--store", "x", "--set", "a=1"]).unwrap();
        assert!(cli.global.json);
        assert_eq!(cli.global.store, Some(PathBuf::from("x")));
        assert!(Cli::try_parse_from(["pipe", "plan"]).is_err(), "files are required");
    }
}
