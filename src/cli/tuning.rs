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
use crate::pipeline::spec::Experiment;
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
        let choices = tuning.choose(&|trial| runs.get(trial).cloned());
        experiment.choose(choices);
    }
    Ok(())
}

/// What the tuning trials of an experiment have measured so far, by trial.
fn measured<'a>(
    experiment: &str,
    tuning: &Tuning,
    plan: &'a Plan,
    store: &Store,
) -> Result<BTreeMap<&'a str, TuningRun>, Failure> {
    let (stage, metric) = tuning.metric.split_once('.').unwrap_or((&tuning.metric, ""));
    let mut runs = BTreeMap::new();
    for trial in plan.trials.iter().filter(|trial| trial.experiment == experiment) {
        let Some(node) = trial.stages.get(stage).map(|node| &plan.nodes[*node]) else { continue };
        let (State::Cached, Some(key)) = (node.state, &node.key) else { continue };
        // A result that is damaged is made again, and the arm waits for it.
        let Lookup::Hit(manifest) = store.lookup(key).map_err(|error| Failure::stage(&error))? else { continue };
        let trial = trial.trial.as_str();
        let result = StageResult::read(&manifest, store)
            .map_err(|error| Failure::failed(format!("stage `{stage}` of `{trial}`: {error:#}")))?;
        let Some(values) = result.values(metric) else {
            let message =
                format!("`{experiment}` is tuned by `{metric}`, which `{stage}` of `{trial}` did not measure");
            let known = result.known();
            let known = if known.is_empty() { "nothing".to_owned() } else { known.join(", ") };
            return Err(Failure::wrong(message).hint(format!("it measured {known}")));
        };
        runs.insert(trial, TuningRun { trial: trial.to_owned(), value: mean(&values), key: key.0.clone() });
    }
    Ok(runs)
}

/// The trials of `experiments` that are not among `ran`, those of experiments without any left out.
pub fn not_yet_run(experiments: &[Experiment], ran: &BTreeSet<(String, String)>) -> Vec<Experiment> {
    let mut left = experiments.to_vec();
    for Experiment { name, trials, .. } in &mut left {
        trials.retain(|trial| !ran.contains(&(name.clone(), trial.name.clone())));
    }
    left.retain(|experiment| !experiment.trials.is_empty());
    left
}

/// What was chosen, a sentence an arm.
pub fn chosen(experiment: &Experiment) -> Vec<String> {
    let Some(tuning) = &experiment.tuning else { return Vec::new() };
    let sentence = |choice: &Choice| {
        let (best, runs) = match choice.candidates.iter().find(|tried| tried.candidate == choice.chosen) {
            Some(tried) => (render::number(tried.mean), tried.runs.len()),
            None => (String::new(), 0),
        };
        let arm = if choice.arm.is_empty() { String::new() } else { format!("{}: ", choice.arm) };
        format!(
            "{arm}tuned to {} (mean {} {best} over {}, the best of {})",
            choice.chosen,
            tuning.metric,
            render::plural(runs, "seed"),
            render::plural(choice.candidates.len(), "candidate")
        )
    };
    tuning.choices.iter().map(sentence).collect()
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
