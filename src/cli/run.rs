//! `pipe run`: reads, plans, executes, and tells what happens while it does.

use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::mem::ManuallyDrop;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use serde::Serialize;
use signal_hook::consts::{SIGINT, SIGTERM};
use signal_hook::iterator::Signals;

use crate::cli::failure::Failure;
use crate::cli::progress::publish::Publisher;
use crate::cli::progress::{Asked, Progress};
use crate::cli::tuning::{self, Tuned};
use crate::cli::ui::{last_words, take_back_echo};
use crate::cli::{Files, Session, render, same_arms, sessions, store_hint, table};
use crate::pipeline::exec::event::{Event, Outcome};
use crate::pipeline::exec::{self, ExecError, Options, select};
use crate::pipeline::plan::{Node, Plan, State};
use crate::pipeline::spec::{Experiment, Trial};
use crate::pipeline::store::{Digest, Store, StoreError};

/// Run what is missing of the experiments in FILES
///
/// A stage that fails is told at once, what rests on it is blocked, and everything else runs on. Stages that fail say why again
/// at the end; the same command tries them once more. The first Ctrl-C lets stages save and stop, the second kills them; the
/// next run goes on from there. Several runs at once share the work: each stage runs in one of them.
///
/// Exit status: 0 done, 1 a stage failed, 2 the input is wrong, 130 interrupted.
#[derive(Debug, clap::Args)]
pub struct Args {
    #[command(flatten)]
    files: Files,
    /// Stages at once, at most [default: as many as cores allow]
    #[arg(long, short, value_name = "N", default_value_t = 0, hide_default_value = true)]
    jobs: usize,
    /// Begin nothing new after the first failure; what runs goes on to its end
    #[arg(long, conflicts_with = "keep_going")]
    fail_fast: bool,
    /// Begin nothing new after N failures [default: `max_failures` of the experiments, or no limit]
    #[arg(long, value_name = "N", conflicts_with = "fail_fast", value_parser = clap::value_parser!(u64).range(1..))]
    max_failures: Option<u64>,
    /// What is done anyway: after a failure, go on with what does not rest on it
    #[arg(long, short, hide = true)]
    keep_going: bool,
    /// There are N of the slot NAME that stages ask for in `run.slots` [default: 1, or as `PIPE_SLOTS=NAME=N,NAME=N` says]
    #[arg(long = "slot", value_name = "NAME=N", value_delimiter = ',', value_parser = slot)]
    slots: Vec<(String, usize)>,
    /// Run only this stage and what it needs; may be given several times
    #[arg(long, value_name = "STAGE")]
    until: Vec<String>,
    /// Run this stage even where its result is cached; may be given several times
    #[arg(long, value_name = "STAGE")]
    again: Vec<String>,
}

/// With `--json`, every event on a line of stdout; the last is the outcome.
///
/// Where arms are tuned, the trials that tune run first, and those that report follow from what they choose: each of these
/// phases begins with `started` and numbers its nodes anew, and every event in it says its `phase`, counted from 1.
pub fn run(args: &Args, session: &Session) -> Result<(), Failure> {
    let ui = &session.ui;
    let mut experiments = session.read(&args.files.files, &args.files.sets)?;
    let wrong = |error: StoreError| Failure::input(&error).hint(store_hint(&session.store));
    let store = Store::open(&session.store).map_err(wrong)?;
    let (interrupt, kill) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicBool::new(false)));
    let options = Options {
        jobs: args.jobs,
        most_failures: most_failures(args, &experiments),
        slots: slots(args)?,
        until: args.until.clone(),
        again: args.again.clone(),
        interrupt,
        kill,
    };
    check_names(args, &experiments, session)?;
    watch_signals(session, &options.interrupt, &options.kill)?;
    let mut whole = Outcome::default();
    let mut publisher = Publisher::default();
    let ended = in_parts(session, &store, &options, &mut experiments, &mut whole, &mut publisher);
    publisher.end(whole);
    drop(publisher);
    // Whoever reads the events learns what was done, also where the run as a whole failed.
    let told = if ui.is_json() { ui.json_line(&Event::Finished(whole)) } else { Ok(()) };
    let (plan, is_old) = ended?;
    told?;
    ui.note(&summary(&whole));
    // Planned anew where something ran: only now are its keys known.
    let is_stale = whole.run > 0 || is_old;
    let plan = if is_stale { session.plan(&experiments, Some(&store))? } else { plan };
    sessions::show(session, &experiments, &plan, &store, whole.run == 0);
    if whole.failed > 0 {
        return Err(Failure::silent(1));
    }
    if whole.interrupted > 0 {
        ui.hint("run the same command to go on");
        return Err(Failure::silent(130));
    }
    if !ui.is_json() {
        table::print_after_run(session, &experiments, &plan, &store)?;
    }
    let curves = session.store.join("tensorboard");
    let has_curves = std::fs::read_dir(&curves).is_ok_and(|mut entries| entries.next().is_some());
    if whole.run > 0 && has_curves {
        ui.note(&format!("curves: tensorboard --logdir {}", curves.display()));
    }
    Ok(())
}

/// Runs what was read, the trials that tune before those that they choose, and adds up in `whole` what came of it.
/// Gives the last plan, and whether others were carried out before it.
fn in_parts(
    session: &Session,
    store: &Store,
    options: &Options,
    experiments: &mut [Experiment],
    whole: &mut Outcome,
    publisher: &mut Publisher,
) -> Result<(ManuallyDrop<Plan>, bool), Failure> {
    let wrong = |error: StoreError| Failure::input(&error).hint(store_hint(&session.store));
    let most_failures = options.most_failures;
    let mut ran = BTreeSet::new();
    let mut known = HashSet::new();
    // What has run again need not do so for the trials that follow.
    let mut anew: HashSet<Digest> = HashSet::new();
    let is_tuned = experiments.iter().any(|one| one.tuning.is_some());
    let mut number = 0;
    // Where nothing is tuned, one pass takes all that was read.
    let mut next: Option<Vec<Experiment>> = None;
    loop {
        let these = next.as_deref().unwrap_or(experiments);
        let plan = leased(session, these, store)?;
        same_arms(session, &plan, these)?;
        let again = |node: &&Node| node.state == State::Cached && known.contains(&node.recipe);
        let shared = plan.nodes.iter().filter(again).count();
        let Some(mut options) = phase(options, &plan, these, &mut anew) else { break Ok((plan, !ran.is_empty())) };
        number += 1;
        let phase = is_tuned.then(|| Phase { number, tunes: these.iter().any(|one| one.waiting().next().is_some()) });
        options.most_failures = options.most_failures.map(|most| most - whole.failed);
        let outcome = execute(&plan, store, &options, phase, session, publisher)?;
        known.extend(plan.nodes.iter().map(|node| node.recipe.clone()));
        add(whole, &outcome, shared);
        let is_over = outcome.skipped > 0
            || outcome.interrupted > 0
            || most_failures.is_some_and(|most| whole.failed >= most)
            || !is_tuned;
        if is_over {
            break Ok((plan, !ran.is_empty()));
        }
        ran.extend(these.iter().flat_map(tuning::identities));
        tuning::choose(session, experiments, Some(store))?;
        for experiment in experiments.iter() {
            if let Some(tuning) = &experiment.tuning {
                store.record_tuning(&experiment.name, &Tuned::of(tuning)).map_err(wrong)?;
            }
        }
        let left = tuning::not_yet_run(experiments, &ran);
        if left.is_empty() {
            break Ok((plan, !ran.is_empty()));
        }
        for note in left.iter().flat_map(tuning::chosen) {
            session.ui.note(&note);
        }
        next = Some(left);
    }
}

/// A part of a run that has several.
#[derive(Clone, Copy)]
struct Phase {
    /// From 1.
    number: usize,
    /// Whether trials wait for what it finds.
    tunes: bool,
}

/// An event of a phase: nodes are numbered anew in each.
#[derive(Serialize)]
struct InPhase<'a> {
    #[serde(flatten)]
    event: &'a Event,
    #[serde(skip_serializing_if = "Option::is_none")]
    phase: Option<usize>,
}

/// A plan of which every result that it found stays until this process ends.
///
/// Planning may hash files for minutes, in which a collection goes on. What it has taken meanwhile is planned again, and what
/// was leased before stays, so this ends.
fn leased(session: &Session, experiments: &[Experiment], store: &Store) -> Result<ManuallyDrop<Plan>, Failure> {
    loop {
        let plan = session.plan(experiments, Some(store))?;
        let keys: Vec<&Digest> = plan.nodes.iter().filter_map(|node| node.key.as_ref()).collect();
        let found: Vec<&Digest> =
            plan.nodes.iter().filter_map(|node| node.result.as_ref()).map(|result| &result.key).collect();
        let stays = store.lease_found(&keys, &found);
        if stays.map_err(|error| Failure::input(&error).hint(store_hint(&session.store)))? {
            return Ok(plan);
        }
    }
}

/// Runs one plan and tells what happens.
fn execute(
    plan: &Plan,
    store: &Store,
    options: &Options,
    phase: Option<Phase>,
    session: &Session,
    publisher: &mut Publisher,
) -> Result<Outcome, Failure> {
    let ui = &session.ui;
    let again = select::nodes(plan, &options.again, "--again").map_err(failure)?;
    let wanted = if options.until.is_empty() {
        vec![true; plan.nodes.len()]
    } else {
        select::with_ancestors(plan, select::nodes(plan, &options.until, "--until").map_err(failure)?)
    };
    let tunes = phase.is_some_and(|phase| phase.tunes);
    let mut progress = Progress::new(ui, plan, store, publisher, Asked { wanted, again, jobs: options.jobs, tunes });
    let mut unwritten = None;
    let outcome = exec::execute(plan, store, options, &mut |event: &Event| {
        progress.on(event);
        // The outcome is told once, of all that ran.
        if ui.is_json() && unwritten.is_none() && !matches!(event, Event::Finished(_)) {
            unwritten = ui.json_line(&InPhase { event, phase: phase.map(|phase| phase.number) }).err();
        }
    });
    progress.clear();
    let outcome = outcome.map_err(failure)?;
    if let Some(failure) = unwritten {
        return Err(failure);
    }
    progress.sum_up();
    progress.recall_failures();
    Ok(outcome)
}

fn failure(error: ExecError) -> Failure {
    match error {
        ExecError::UnknownStage { option, name, hint } => {
            Failure::wrong(format!("no stage is called `{name}`, as `{option}` asks")).hint(hint)
        }
        ref error @ ExecError::TooFewSlots { ref slot, asked, .. } => {
            Failure::input(error).hint(format!("where there are more, say so: `--slot {slot}={asked}`"))
        }
        other @ ExecError::NoWorker { .. } => Failure::stage(&other),
    }
}

/// Where trials wait for a choice, names on the command line may mean stages that only they have.
fn check_names(args: &Args, experiments: &[Experiment], session: &Session) -> Result<(), Failure> {
    if experiments.iter().all(|experiment| experiment.waiting().next().is_none()) {
        return Ok(());
    }
    let mut all = experiments.to_vec();
    for experiment in &mut all {
        let waiting: Vec<Trial> = experiment.waiting().cloned().collect();
        experiment.trials.extend(waiting);
    }
    let plan = session.plan(&all, None)?;
    for (option, names) in [("--until", &args.until), ("--again", &args.again)] {
        select::nodes(&plan, names, option).map_err(failure)?;
    }
    Ok(())
}

/// The options for a part of a run; none where nothing of it was asked for. Names that only later trials have say nothing
/// of this part, and what they rest on is chosen by all of it. What runs again is added to `anew`, and does so once.
fn phase(options: &Options, plan: &Plan, experiments: &[Experiment], anew: &mut HashSet<Digest>) -> Option<Options> {
    if experiments.iter().all(|experiment| experiment.tuning.is_none()) {
        return Some(options.clone());
    }
    let has = |name: &String| select::nodes(plan, std::slice::from_ref(name), "").is_ok();
    let here = |names: &[String]| -> Vec<String> { names.iter().filter(|name| has(name)).cloned().collect() };
    let until = here(&options.until);
    let again = select::nodes(plan, &here(&options.again), "--again").unwrap_or_default();
    let again = again.into_iter().map(|node| &plan.nodes[node]).filter(|node| anew.insert(node.recipe.clone()));
    let again: Vec<String> = again.map(|node| node.name().to_string()).collect();
    let is_waiting = experiments.iter().any(|experiment| experiment.waiting().next().is_some());
    match (until.len() == options.until.len(), is_waiting) {
        (true, _) => Some(Options { until, again, ..options.clone() }),
        (false, true) => Some(Options { until: Vec::new(), again, ..options.clone() }),
        (false, false) => (!until.is_empty()).then(|| Options { until, again, ..options.clone() }),
    }
}

/// Adds what came of a part of a run; `shared` of its cached stages were counted before.
fn add(whole: &mut Outcome, part: &Outcome, shared: usize) {
    whole.run += part.run;
    whole.cached += part.cached.saturating_sub(shared);
    whole.failed += part.failed;
    whole.blocked += part.blocked;
    whole.interrupted += part.interrupted;
    whole.skipped += part.skipped;
    whole.seconds += part.seconds;
}

/// The failures after which nothing new begins: what the command line says, or else the least that an experiment says.
fn most_failures(args: &Args, experiments: &[Experiment]) -> Option<usize> {
    let asked = args.max_failures.map(|most| usize::try_from(most).unwrap_or(usize::MAX));
    match asked.or(args.fail_fast.then_some(1)) {
        None if args.keep_going => None,
        None => experiments.iter().filter_map(|experiment| experiment.max_failures).min(),
        said => said,
    }
}

/// The named slots that the environment declares, and over them those of the command line.
fn slots(args: &Args) -> Result<BTreeMap<String, usize>, Failure> {
    let declared = std::env::var("PIPE_SLOTS").unwrap_or_default();
    let declared = declared.split(',').filter(|text| !text.trim().is_empty()).map(slot);
    let declared = declared
        .collect::<Result<Vec<_>, _>>()
        .map_err(|wrong| Failure::wrong(format!("{wrong}, in the environment variable `PIPE_SLOTS`")))?;
    Ok(declared.into_iter().chain(args.slots.iter().cloned()).collect())
}

/// `licence=2`: how much there is of a named slot.
fn slot(text: &str) -> Result<(String, usize), String> {
    let wrong = || format!("`{text}` is not a slot and how much there is of it, such as `licence=2`");
    let (name, count) = text.split_once('=').ok_or_else(wrong)?;
    let count = count.trim().parse().map_err(|_| wrong())?;
    if name.trim().is_empty() { Err(wrong()) } else { Ok((name.trim().to_owned(), count)) }
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
        for signal in signals.forever() {
            if signal == SIGINT && !bars.is_hidden() {
                take_back_echo();
            }
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
    fn slots_are_read() {
        assert_eq!(slot("licence=2"), Ok(("licence".to_owned(), 2)));
        for wrong in ["licence", "=2", "licence=", "licence=-1", "licence=two"] {
            assert!(slot(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn the_summary_says_what_happened() {
        let outcome = Outcome { run: 9, cached: 3, failed: 0, seconds: 250.0, ..Outcome::default() };
        assert_eq!(summary(&outcome), "9 run, 3 cached, 0 failed in 4m 10s");
        assert_eq!(summary(&Outcome { run: 0, cached: 10, ..outcome }), "nothing to run: 10 stages cached");
        let failed = Outcome { failed: 1, blocked: 2, seconds: 1.0, ..outcome };
        assert_eq!(summary(&failed), "9 run, 3 cached, 1 failed, 2 blocked in 1.0s");
    }
}
