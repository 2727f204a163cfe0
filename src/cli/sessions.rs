//! TensorBoard's HParams page: a session a finished trial, with what was swept and what its evaluations found.
//!
//! Sessions are views that can be made again from plans and manifests: what cannot be written is worth a warning.

use std::collections::BTreeMap;

use crate::cli::Session as Terminal;
use crate::cli::comparison::{parameters, split};
use crate::pipeline::plan::{Plan, PlannedTrial, State};
use crate::pipeline::spec::{Experiment, Trial};
use crate::pipeline::stage::ArtifactType;
use crate::pipeline::store::{Manifest, Store};
use crate::telemetry::hparams::{SESSION_RUN, Session};

/// Writes the sessions of every trial whose evaluations are all there. `only_new` leaves an experiment alone whose first trial
/// has one: nothing has run, and the others have theirs too.
pub fn show(terminal: &Terminal, experiments: &[Experiment], plan: &Plan, store: &Store, only_new: bool) {
    for experiment in experiments {
        let planned = plan.trials.iter().filter(|trial| trial.experiment == experiment.name);
        for planned in planned {
            let folder = store.tensorboard_session(&experiment.name, &planned.trial);
            if only_new && folder.is_dir() {
                break;
            }
            let Some(trial) = experiment.trials.iter().find(|trial| trial.name == planned.trial) else { continue };
            if trial.assignment.is_empty() || planned.stages.contains_key(SESSION_RUN) {
                continue;
            }
            let Some(session) = session(experiment, trial, planned, plan, store) else { continue };
            if let Err(error) = session.write(&folder) {
                terminal
                    .ui
                    .warn(&format!("the session of `{}` is not shown in TensorBoard: {error}", folder.display()));
                return;
            }
        }
    }
}

/// The session of a trial; `None` while an evaluation is missing, or where there is none.
fn session(
    experiment: &Experiment,
    trial: &Trial,
    planned: &PlannedTrial,
    plan: &Plan,
    store: &Store,
) -> Option<Session> {
    let mut session = Session::default();
    for (stage, place) in &planned.stages {
        let node = &plan.nodes[*place];
        if !node.spec.stage.outputs().iter().any(|output| output.artifact == ArtifactType::Evaluation) {
            session.seconds += node.result.as_ref().map_or(0.0, |result| result.seconds);
            continue;
        }
        let key = node.key.as_ref().filter(|_| node.state == State::Cached)?;
        let manifest = store.manifest_of(key).ok()??;
        session.seconds += manifest.seconds;
        session.finished = session.finished.max(finished(&manifest));
        let named = |metric: &str| {
            let metrics = &experiment.table.metrics;
            metrics.is_empty() || metrics.iter().any(|name| split(name) == (stage, metric))
        };
        let metrics = manifest.metrics.iter().filter(|(name, _)| named(name));
        session.metrics.extend(metrics.map(|(name, value)| (format!("{stage}/{name}"), *value)));
    }
    (session.parameters, session.group) = labels(experiment, trial);
    (!session.metrics.is_empty()).then_some(session)
}

/// What a trial is called by: its arm's parameters, and the group that its seeds share. Where nothing but seeds is swept, these
/// are the parameters.
fn labels(experiment: &Experiment, trial: &Trial) -> (BTreeMap<String, serde_json::Value>, String) {
    let swept = parameters(trial);
    if swept.is_empty() {
        let seeds = trial.assignment.iter();
        let last = |path: &String| path.rsplit('.').next().unwrap_or_default().to_owned();
        return (seeds.map(|(path, value)| (last(path), value.clone())).collect(), String::new());
    }
    let purpose = format!("{:?}", trial.purpose).to_lowercase();
    let purpose = if experiment.tuning.is_some() { format!("/{purpose}") } else { String::new() };
    (swept, format!("{}/{}{purpose}", experiment.name, trial.arm))
}

/// Seconds since 1970 at which a result was published; 0 where that cannot be read.
fn finished(manifest: &Manifest) -> f64 {
    manifest.finished.parse::<jiff::Timestamp>().map_or(0.0, |time| time.as_millisecond() as f64 / 1000.0)
}
