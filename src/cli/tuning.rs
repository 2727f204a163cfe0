//! Choosing for experiments whose arms are tuned: what their tuning trials measured, and the trials that follow from it.
//!
//! A choice is made anew from results whenever files are read, so there is no state that could be out of date.

use std::collections::{BTreeMap, BTreeSet};

use serde::Serialize;

use crate::cli::arms::mean;
use crate::cli::failure::Failure;
use crate::cli::results::StageResult;
use crate::cli::{Session, render};
use crate::pipeline::plan::{Plan, State};
use crate::pipeline::spec::{Experiment, Trial};
use crate::pipeline::spec::tune::{Choice, Goal, Purpose, Tuning, TuningRun};
use crate::pipeline::store::{Lookup, Store};

/// What was tuned and how, as tables show it and stores keep it.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Tuned {
    /// `stage.metric`.
    pub metric: String,
    /// Which is better.
    pub goal: Goal,
    /// Trials that wait for a choice.
    pub awaiting: usize,
    /// By arm, with every candidate.
    pub arms: Vec<Choice>,
}

impl Tuned {
    /// Of an experiment whose arms are tuned.
    pub fn of(tuning: &Tuning) -> Self {
        let Tuning { metric, goal, choices, .. } = tuning;
        Self { metric: metric.clone(), goal: *goal, awaiting: tuning.awaiting(), arms: choices.clone() }
    }
}

/// By trial, what it measured of the metric, and the names of all that it measured.
type Runs<'a> = BTreeMap<&'a str, (TuningRun, Vec<String>)>;

/// Makes the choices that the store's results allow; changes nothing in the store.
pub fn choose(session: &Session, experiments: &mut [Experiment], store: Option<&Store>) -> Result<(), Failure> {
    let only_tuning = |experiment: &Experiment| {
        let mut experiment = experiment.clone();
        experiment.trials.retain(|trial| trial.purpose == Purpose::Tune);
        experiment
    };
    let tuning: Vec<Experiment> =
        experiments.iter().filter(|experiment| experiment.tuning.is_some()).map(only_tuning).collect();
    let (Some(store), false) = (store, tuning.is_empty()) else { return Ok(()) };
    let plan = session.plan(&tuning, Some(store))?;
    for experiment in experiments {
        let Some(tuning) = &experiment.tuning else { continue };
        let runs = measured(&experiment.name, tuning, &plan, store)?;
        let choices = tuning.choose(&|trial| runs.get(trial).map(|(run, _)| run.clone()));
        for choice in &choices {
            check(&experiment.name, tuning, choice, &runs)?;
        }
        experiment.choose(choices);
    }
    Ok(())
}

/// Where no candidate measured anything there is nothing to choose by.
fn check(experiment: &str, tuning: &Tuning, choice: &Choice, runs: &Runs) -> Result<(), Failure> {
    let (stage, metric) = split(tuning);
    let mut silent = choice.candidates.iter().flat_map(|tried| &tried.runs).filter(|run| run.value.is_nan());
    let Some(run) = silent.next().filter(|_| choice.candidates.iter().all(|tried| tried.mean.is_nan())) else {
        return Ok(());
    };
    let trial = &run.trial;
    let message = format!("`{experiment}` is tuned by `{metric}`, which `{stage}` of `{trial}` did not measure");
    let known = runs.get(trial.as_str()).map(|(_, known)| known.join(", ")).filter(|known| !known.is_empty());
    Err(Failure::wrong(message).hint(format!("it measured {}", known.as_deref().unwrap_or("nothing"))))
}

/// The stage and the metric by which candidates are told apart.
fn split(tuning: &Tuning) -> (&str, &str) {
    tuning.metric.split_once('.').unwrap_or((&tuning.metric, ""))
}

/// What the tuning trials of an experiment have measured so far, by trial.
fn measured<'a>(
    experiment: &str,
    tuning: &Tuning,
    plan: &'a Plan,
    store: &Store,
) -> Result<Runs<'a>, Failure> {
    let (stage, metric) = split(tuning);
    let mut runs = BTreeMap::new();
    for trial in plan.trials.iter().filter(|trial| trial.experiment == experiment) {
        let Some(node) = trial.stages.get(stage).map(|node| &plan.nodes[*node]) else { continue };
        let (State::Cached, Some(key)) = (node.state, &node.key) else { continue };
        // A result that is damaged is made again, and the arm waits for it.
        let Lookup::Hit(manifest) = store.lookup(key).map_err(|error| Failure::stage(&error))? else { continue };
        let trial = trial.trial.as_str();
        let result = StageResult::read(&manifest, store)
            .map_err(|error| Failure::failed(format!("stage `{stage}` of `{trial}`: {error:#}")))?;
        // A run that diverged has no number, and that is what it says of its candidate.
        let value = result.values(metric).map(|values| mean(&values)).filter(|value| value.is_finite());
        let known = result.known().into_iter().map(str::to_owned).collect();
        let run = TuningRun { trial: trial.to_owned(), value: value.unwrap_or(f64::NAN), key: key.0.clone() };
        runs.insert(trial, (run, known));
    }
    Ok(runs)
}

/// A trial: its experiment, its name, and the candidate that it reports, which may become another.
pub type Identity = (String, String, String);

fn identity(experiment: &str, tuning: Option<&Tuning>, trial: &Trial) -> Identity {
    let tuning = tuning.filter(|_| trial.purpose == Purpose::Report);
    let mut choices = tuning.iter().flat_map(|tuning| &tuning.choices);
    let chosen = choices.find(|choice| choice.arm == trial.arm).map(|choice| choice.chosen.clone());
    (experiment.to_owned(), trial.name.clone(), chosen.unwrap_or_default())
}

/// The trials of an experiment as they are now.
pub fn identities(experiment: &Experiment) -> impl Iterator<Item = Identity> {
    experiment.trials.iter().map(|trial| identity(&experiment.name, experiment.tuning.as_ref(), trial))
}

/// The trials of `experiments` that are not among `ran`, those of experiments without any left out.
pub fn not_yet_run(experiments: &[Experiment], ran: &BTreeSet<Identity>) -> Vec<Experiment> {
    let mut left = experiments.to_vec();
    for Experiment { name, trials, tuning, .. } in &mut left {
        trials.retain(|trial| !ran.contains(&identity(name, tuning.as_ref(), trial)));
    }
    left.retain(|experiment| !experiment.trials.is_empty());
    left
}

/// What was chosen, a sentence an arm, and one for each candidate that could not be.
pub fn chosen(experiment: &Experiment) -> Vec<String> {
    let Some(tuning) = &experiment.tuning else { return Vec::new() };
    let sentences = |choice: &Choice| -> Vec<String> {
        let (best, runs) = match choice.candidates.iter().find(|tried| tried.candidate == choice.chosen) {
            Some(tried) => (render::number(tried.mean), tried.runs.len()),
            None => (String::new(), 0),
        };
        let arm = if choice.arm.is_empty() { String::new() } else { format!("{}: ", choice.arm) };
        let sentence = format!(
            "{arm}tuned to {} (mean {} {best} over {}, the best of {})",
            choice.chosen,
            tuning.metric,
            render::plural(runs, "seed"),
            render::plural(choice.candidates.len(), "candidate")
        );
        let silent = choice.candidates.iter().filter(|tried| tried.mean.is_nan()).map(|tried| {
            let without = tried.runs.iter().filter(|run| run.value.is_nan()).count();
            format!(
                "{arm}{} was not chosen from: {} without a number for {}",
                tried.candidate,
                render::plural(without, "seed"),
                tuning.metric
            )
        });
        std::iter::once(sentence).chain(silent).collect()
    };
    tuning.choices.iter().flat_map(sentences).collect()
}

/// That trials wait for a choice, where some do.
pub fn waiting(experiment: &Experiment) -> Option<String> {
    let tuning = experiment.tuning.as_ref()?;
    let awaiting = tuning.awaiting();
    let tried: usize = tuning.arms.iter().flat_map(|arm| &arm.candidates).map(|one| one.tuning.len()).sum();
    (awaiting > 0).then(|| {
        format!(
            "{} of `{}` wait for the choice by `{}` among {}",
            render::plural(awaiting, "trial"),
            experiment.name,
            tuning.metric,
            render::plural(tried, "tuning trial")
        )
    })
}
