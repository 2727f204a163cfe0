//! What a run would do with each node, and why: keys as far as they can be known, and a look at the store for each.
//!
//! It must never change the store, and looks no key up twice.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::sync::Arc;

use serde_json::Value;

use crate::pipeline::plan::reason::{InputNow, Now, Reason};
use crate::pipeline::plan::{Edge, Node, NodeName, PlanError, State};
use crate::pipeline::stage::Continues;
use crate::pipeline::store::{Digest, Found, Manifest, Store, StoreError, TrialRecords};

/// Earlier results of a stage that are looked at for one that it may come back to, at most.
const LOOKED_BACK: usize = 16;

/// Gives every node its key, state and reasons.
pub(super) fn assess(nodes: &mut [Node], store: Option<&Store>) -> Result<(), PlanError> {
    let mut known: HashMap<Digest, Found> = HashMap::new();
    let mut last = LastRuns::new(store);
    for at in 0..nodes.len() {
        let (before, rest) = nodes.split_at_mut(at);
        let node = &mut rest[0];
        let digest = |edge: &Edge| {
            let outputs = &before[edge.from].result.as_ref()?.outputs;
            outputs.iter().find(|output| output.name == edge.output).map(|output| &output.digest)
        };
        let key = node.key_of(&digest);
        let lookup = match (&key, store) {
            (Some(key), Some(store)) => {
                if !known.contains_key(key) {
                    known.insert(key.clone(), store.find(key)?);
                }
                known[key].clone()
            }
            _ => Found::Miss,
        };
        let (state, reasons) = if let Found::Hit(stored) = lookup {
            let accepted = stored.accepted.as_ref().map(|one| Reason::Accepted { reason: one.reason.clone() });
            node.result = Some(stored);
            (State::Cached, accepted.into_iter().collect())
        } else {
            let begun = match (&key, store) {
                (Some(key), Some(store)) => Begun::of(store, key)?,
                _ => Begun::default(),
            };
            let made = last.of(&node.names, &node.recipe, key.as_ref())?;
            let input = |edge: &Edge| input_now(before, edge);
            match lookup {
                Found::Damaged { what } => {
                    (if begun.saved { State::Resume } else { State::Run }, vec![Reason::Damaged { what }])
                }
                _ => match judge(node, &input, begun, key.is_some(), &made) {
                    (State::Run, reasons) if key.is_none() => {
                        let is_it = |manifest: &Manifest| {
                            differences(node, &input, manifest).iter().all(Reason::rests_on_a_run)
                        };
                        let may_return = last.any_earlier(&made, is_it)? || last.any_of(node, is_it)?;
                        (if may_return { State::Maybe } else { State::Run }, reasons)
                    }
                    judged => judged,
                },
            }
        };
        node.hint = node.spec.kind.continues.and_then(|continues| continuing(continues, &node.spec.name, &reasons));
        (node.key, node.state, node.reasons) = (key, state, reasons);
    }
    Ok(())
}

/// What is known of what an edge carries.
pub(super) fn input_now(nodes: &[Node], edge: &Edge) -> InputNow {
    let from = &nodes[edge.from];
    match (&from.result, from.state) {
        (Some(manifest), _) => match manifest.outputs.iter().find(|output| output.name == edge.output) {
            Some(output) => InputNow::Is { digest: output.digest.clone(), output: output.name.clone() },
            None => InputNow::Runs,
        },
        (None, State::Maybe) => InputNow::MayRun,
        (None, _) => InputNow::Runs,
    }
}

/// What differs between a node as it is planned and a result.
pub(super) fn differences(node: &Node, input: &dyn Fn(&Edge) -> InputNow, from: &Manifest) -> Vec<Reason> {
    let params = node.spec.stage.params();
    let parts = node.parts(&params, &|edge| match input(edge) {
        InputNow::Is { digest, .. } => Value::String(digest.0),
        InputNow::Runs | InputNow::MayRun => Value::Null,
    });
    let by_reference = |reference: &str| node.edge(reference).map_or(InputNow::Runs, input);
    let file = |path: &str| node.files.get(path).cloned();
    Now { parts: &parts, params: &params, input: &by_reference, file: &file }.differences(from)
}

/// Reasons that lie in inputs which are not there yet.
fn pending_inputs(node: &Node, input: &dyn Fn(&Edge) -> InputNow) -> Vec<Reason> {
    let reason = |edge: &Edge| match input(edge) {
        InputNow::Is { .. } => None,
        InputNow::Runs => Some(Reason::InputRuns { reference: edge.reference.clone() }),
        InputNow::MayRun => Some(Reason::InputMayRun { reference: edge.reference.clone() }),
    };
    let mut found: Vec<Reason> = node.edges.iter().filter_map(reason).collect();
    found.sort_by_key(|reason| matches!(reason, Reason::InputMayRun { .. }));
    found
}

/// What earlier attempts at a key have left.
#[derive(Default)]
struct Begun {
    /// Whether a run would go on from saved work.
    saved: bool,
    /// What became of the last attempt.
    reason: Option<Reason>,
}

impl Begun {
    fn of(store: &Store, key: &Digest) -> Result<Self, StoreError> {
        // Work of which nothing is known is not gone on from.
        let Some(attempts) = store.attempts(key)? else { return Ok(Self::default()) };
        let saved = store.has_saved_work(key) || store.has_prepared(key);
        let reason = match attempts.error {
            Some(error) => Some(Reason::Failed { error }),
            None => saved.then_some(Reason::Interrupted { reached: attempts.reached }),
        };
        Ok(Self { saved, reason })
    }
}

/// What a run would do with a node that has no result, and why.
fn judge(
    node: &Node,
    input: &dyn Fn(&Edge) -> InputNow,
    begun: Begun,
    has_key: bool,
    last: &LastRun,
) -> (State, Vec<Reason>) {
    let Begun { saved, reason } = begun;
    let mut reasons: Vec<Reason> = reason.into_iter().collect();
    let differences = match last {
        LastRun::Never | LastRun::NeverThisTrial => Vec::new(),
        LastRun::Removed => std::iter::once(Reason::Removed).chain(pending_inputs(node, input)).collect(),
        LastRun::ChangedSinceRemoved => {
            std::iter::once(Reason::ChangedSinceRemoved).chain(pending_inputs(node, input)).collect()
        }
        LastRun::Made(manifest, _) => differences(node, input, manifest),
    };
    // Only one who has run before can be spared by an input that comes out as it was.
    let may_be_spared = matches!(last, LastRun::Made(..)) && differences.iter().all(Reason::rests_on_a_run);
    reasons.extend(differences);
    if reasons.is_empty() {
        reasons.push(if matches!(last, LastRun::NeverThisTrial) { Reason::NewTrial } else { Reason::NeverRun });
    }
    let state = match (has_key, saved) {
        (true, true) => State::Resume,
        (false, _) if may_be_spared => State::Maybe,
        _ => State::Run,
    };
    (state, reasons)
}

/// How a stage of a kind that can go on would save what was done before, where nothing but the number of steps grew.
fn continuing(continues: Continues, stage: &str, reasons: &[Reason]) -> Option<String> {
    let Continues { field, grows } = continues;
    let [Reason::Parameter { path, old: Some(old), new: Some(new) }] = reasons else { return None };
    let (done, wanted) = (old.as_u64()?, new.as_u64()?);
    (path == grows && done < wanted).then(|| {
        format!(
            "`{stage}` has done {done} of these {wanted} {grows} before; leave `{grows} = {done}` there and add a stage with \
             `{field} = \"{stage}\"` and `{grows} = {wanted}` to go on from them"
        )
    })
}

/// What is left of the last recorded run of a name.
#[derive(Clone)]
enum LastRun {
    /// There was none.
    Never,
    /// There was none, but there were runs of other trials of the experiment.
    NeverThisTrial,
    /// It was what would run now, and its result is not there.
    Removed,
    /// It was another, of which nothing is left.
    ChangedSinceRemoved,
    /// What it made, and the keys that the stage had before.
    Made(Arc<Manifest>, Vec<Digest>),
}

/// The last recorded runs by name.
struct LastRuns<'a> {
    store: Option<&'a Store>,
    /// By experiment and trial.
    records: HashMap<(String, String), Arc<TrialRecords>>,
    manifests: HashMap<Digest, Option<Arc<Manifest>>>,
    /// Whether anything of an experiment is recorded.
    recorded: HashMap<String, bool>,
}

impl<'a> LastRuns<'a> {
    fn new(store: Option<&'a Store>) -> Self {
        Self { store, records: HashMap::new(), manifests: HashMap::new(), recorded: HashMap::new() }
    }

    /// The last run of the first name that has one; `recipe` and `key` say what would run now.
    fn of(&mut self, names: &[NodeName], recipe: &Digest, key: Option<&Digest>) -> Result<LastRun, StoreError> {
        let Some(store) = self.store else { return Ok(LastRun::Never) };
        for name in names {
            let Some(record) = self.trial(store, name)?.get(&name.stage).cloned() else { continue };
            let known = match self.manifests.entry(record.key.clone()) {
                Entry::Occupied(known) => known.into_mut(),
                Entry::Vacant(unknown) => unknown.insert(store.manifest_of(&record.key)?),
            };
            let same = record.recipe == *recipe || Some(&record.key) == key;
            return Ok(match known {
                // A result that is not there would be taken if it were.
                Some(manifest) if Some(&record.key) != key => LastRun::Made(Arc::clone(manifest), record.earlier),
                _ if same => LastRun::Removed,
                _ => LastRun::ChangedSinceRemoved,
            });
        }
        for name in names {
            if self.trial(store, name)?.is_empty() && self.is_recorded(store, &name.experiment)? {
                return Ok(LastRun::NeverThisTrial);
            }
        }
        Ok(LastRun::Never)
    }

    /// Whether anything that the stage was before its last run has what is asked for: who goes back to it may be spared.
    fn any_earlier(&mut self, last: &LastRun, has: impl Fn(&Manifest) -> bool) -> Result<bool, StoreError> {
        let (Some(store), LastRun::Made(_, earlier)) = (self.store, last) else { return Ok(false) };
        for key in earlier.iter().take(LOOKED_BACK) {
            let known = match self.manifests.entry(key.clone()) {
                Entry::Occupied(known) => known.into_mut(),
                Entry::Vacant(unknown) => unknown.insert(store.manifest_of(key)?),
            };
            if known.as_ref().is_some_and(|manifest| has(manifest)) {
                return Ok(true);
            }
        }
        Ok(false)
    }

    /// Whether the last run of any of its names has what is asked for: a node that stands in several experiments may become
    /// what it was in another.
    fn any_of(&mut self, node: &Node, has: impl Fn(&Manifest) -> bool) -> Result<bool, StoreError> {
        for name in node.names.iter().take(LOOKED_BACK) {
            if let LastRun::Made(manifest, _) = self.of(std::slice::from_ref(name), &node.recipe, None)?
                && has(&manifest)
            {
                return Ok(true);
            }
        }
        Ok(false)
    }

    /// What is recorded of the trial of a name.
    fn trial(&mut self, store: &Store, name: &NodeName) -> Result<&Arc<TrialRecords>, StoreError> {
        Ok(match self.records.entry((name.experiment.clone(), name.trial.clone())) {
            Entry::Occupied(known) => known.into_mut(),
            Entry::Vacant(unknown) => unknown.insert(store.recorded_trial(&name.experiment, &name.trial)?),
        })
    }

    fn is_recorded(&mut self, store: &Store, experiment: &str) -> Result<bool, StoreError> {
        if let Some(known) = self.recorded.get(experiment) {
            return Ok(*known);
        }
        let is_recorded = store.is_recorded(experiment)?;
        self.recorded.insert(experiment.to_owned(), is_recorded);
        Ok(is_recorded)
    }
}
