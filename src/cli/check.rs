//! `pipe check`: every mistake of every file, and nothing else.

use crate::cli::failure::Failure;
use crate::cli::{Files, Session, render};
use crate::pipeline::spec;
use crate::stages::KINDS;

/// Read files and report every mistake in them; nothing is planned or run
#[derive(Debug, clap::Args)]
pub struct Args {
    #[command(flatten)]
    files: Files,
}

/// With `--json`, the array of mistakes, empty where there is none.
pub fn run(args: &Args, session: &Session) -> Result<(), Failure> {
    let ui = &session.ui;
    match spec::read(&args.files.files, &args.files.sets, KINDS) {
        Ok(experiments) => {
            if ui.is_json() {
                return ui.data("[]");
            }
            let trials =
                || experiments.iter().flat_map(|experiment| experiment.trials.iter().chain(experiment.waiting()));
            let stages: usize = trials().map(|trial| trial.stages.len()).sum();
            ui.data(&format!(
                "ok: {}, {}, {}",
                render::plural(experiments.len(), "experiment"),
                render::plural(trials().count(), "trial"),
                render::plural(stages, "stage")
            ))
        }
        Err(mistakes) if ui.is_json() => {
            ui.json_pretty(&mistakes)?;
            Err(Failure::silent(2))
        }
        Err(mistakes) => Err(Failure::diagnostics(mistakes.render(ui.error_color()))),
    }
}
