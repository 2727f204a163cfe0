//! `pipe run`: reads, plans, executes, and tells what happens while it does.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use signal_hook::consts::{SIGINT, SIGTERM};
use signal_hook::iterator::Signals;

use crate::cli::failure::Failure;
use crate::cli::progress::Progress;
use crate::cli::ui::last_words;
use crate::cli::{Files, Session, render, same_arms, store_hint, table};
use crate::pipeline::exec::event::{Event, Outcome};
use crate::pipeline::exec::{self, ExecError, Options};
use crate::pipeline::store::{Store, StoreError};

/// Run what is missing of the experiments in FILES
#[derive(Debug, clap::Args)]
pub struct Args {
    #[command(flatten)]
    files: Files,
    /// Stages at once, at most [default: as many as cores allow]
    #[arg(long, short, value_name = "N", default_value_t = 0, hide_default_value = true)]
    jobs: usize,
    /// After a failure, go on with what does not rest on it
    #[arg(long, short)]
    keep_going: bool,
    /// Run only this stage and what it needs; may be given several times
    #[arg(long, value_name = "STAGE")]
    until: Vec<String>,
    /// Run this stage even where its result is cached; may be given several times
    #[arg(long, value_name = "STAGE")]
    again: Vec<String>,
}

/// With `--json`, every event on a line of stdout; the last is the outcome.
pub fn run(args: &Args, session: &Session) -> Result<(), Failure> {
    let ui = &session.ui;
    let experiments = session.read(&args.files.files, &args.files.sets)?;
    let wrong = |error: StoreError| Failure::input(&error).hint(store_hint(&session.store));
    let store = Store::open(&session.store).map_err(wrong)?;
    // What the plan finds must stay until the run ends, so nothing may be collected before it is leased.
    let hold = store.hold().map_err(wrong)?;
    let plan = session.plan(&experiments, Some(&store))?;
    hold.lease(plan.nodes.iter().filter_map(|node| node.key.as_ref())).map_err(wrong)?;
    drop(hold);
    same_arms(session, &plan, &experiments)?;

    let (interrupt, kill) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicBool::new(false)));
    watch_signals(session, &interrupt, &kill)?;
    let options = Options {
        jobs: args.jobs,
        keep_going: args.keep_going,
        until: args.until.clone(),
        again: args.again.clone(),
        interrupt,
        kill,
    };
    let mut progress = Progress::new(ui, &plan);
    let mut unwritten = None;
    let outcome = exec::execute(&plan, &store, &options, &mut |event: &Event| {
        progress.on(event);
        if ui.is_json() && unwritten.is_none() {
            unwritten = ui.json_line(event).err();
        }
    });
    progress.clear();
    let outcome = outcome.map_err(|error| match error {
        ExecError::UnknownStage { option, name, hint } => {
            Failure::wrong(format!("no stage is called `{name}`, as `{option}` asks")).hint(hint)
        }
        other @ ExecError::NoWorker { .. } => Failure::stage(&other),
    })?;
    if let Some(failure) = unwritten {
        return Err(failure);
    }

    ui.note(&summary(&outcome));
    if outcome.failed > 0 {
        if !args.keep_going && outcome.skipped > 0 {
            ui.hint("`--keep-going` goes on with what does not rest on a failed stage");
        }
        return Err(Failure::silent(1));
    }
    if outcome.interrupted > 0 {
        ui.hint("run the same command to go on");
        return Err(Failure::silent(130));
    }
    if !ui.is_json() {
        // Planned anew where something ran: only now are its keys known.
        let plan = if outcome.run > 0 { session.plan(&experiments, Some(&store))? } else { plan };
        table::print_after_run(session, &experiments, &plan, &store)?;
    }
    let curves = session.store.join("tensorboard");
    let has_curves = std::fs::read_dir(&curves).is_ok_and(|mut entries| entries.next().is_some());
    if outcome.run > 0 && has_curves {
        ui.note(&format!("curves: tensorboard --logdir {}", curves.display()));
    }
    Ok(())
}

/// `9 run, 3 cached, 0 failed in 4m 10s`, or that there was nothing to do.
fn summary(outcome: &Outcome) -> String {
    let Outcome { run, cached, failed, blocked, interrupted, skipped, seconds } = *outcome;
    if run + failed + blocked + interrupted + skipped == 0 {
        return format!("nothing to run: {} cached", render::plural(cached, "stage"));
    }
    let counts = [
        (run, "run"),
        (cached, "cached"),
        (failed, "failed"),
        (blocked, "blocked"),
        (interrupted, "interrupted"),
        (skipped, "not begun"),
    ];
    let shown = counts.into_iter().enumerate().filter(|(place, (count, _))| *place < 3 || *count > 0);
    let shown: Vec<String> =
        shown.map(|(_, (count, word))| format!("{} {word}", render::count(count as u64))).collect();
    format!("{} in {}", shown.join(", "), render::duration(seconds))
}

/// The first SIGINT or SIGTERM asks stages to save and stop, the second kills them, the third ends the process at once.
fn watch_signals(session: &Session, interrupt: &Arc<AtomicBool>, kill: &Arc<AtomicBool>) -> Result<(), Failure> {
    let deaf = |error: std::io::Error| Failure::failed(format!("cannot listen for signals: {error}"));
    let mut signals = Signals::new([SIGINT, SIGTERM]).map_err(deaf)?;
    let (interrupt, kill) = (Arc::clone(interrupt), Arc::clone(kill));
    let (bars, quiet) = (session.ui.bars().clone(), session.ui.is_quiet());
    #[expect(clippy::disallowed_methods, reason = "the third signal is from someone who wants no more waiting")]
    let watch = move || {
        for _ in signals.forever() {
            let said = if !interrupt.swap(true, Ordering::Relaxed) {
                "saving and stopping; a second interrupt stops at once"
            } else if !kill.swap(true, Ordering::Relaxed) {
                "stopping at once; the next run goes on from what was saved last"
            } else {
                std::process::exit(130);
            };
            if !quiet {
                bars.suspend(|| last_words(said));
            }
        }
    };
    std::thread::Builder::new().name("signals".to_owned()).spawn(watch).map(drop).map_err(deaf)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_summary_says_what_happened() {
        let outcome = Outcome { run: 9, cached: 3, failed: 0, seconds: 250.0, ..Outcome::default() };
        assert_eq!(summary(&outcome), "9 run, 3 cached, 0 failed in 4m 10s");
        assert_eq!(summary(&Outcome { run: 0, cached: 10, ..outcome }), "nothing to run: 10 stages cached");
        let failed = Outcome { failed: 1, blocked: 2, seconds: 1.0, ..outcome };
        assert_eq!(summary(&failed), "9 run, 3 cached, 1 failed, 2 blocked in 1.0s");
    }
}
