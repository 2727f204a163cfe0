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
use crate::pipeline::store::{Digest, Found, KeyParts, Lookup, Store, StoreError, TrialRecords};

/// Gives every node its key, state and reasons.
pub(super) fn assess(nodes: &mut [Node], store: Option<&Store>) -> Result<(), PlanError> {
    let mut known: HashMap<Digest, Found> = HashMap::new();
    let mut last = LastRuns { store, records: HashMap::new(), manifests: HashMap::new() };
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
            let saved = match (&key, store) {
                (Some(key), Some(store)) => store.has_saved_work(key),
                _ => false,
            };
            let damage = if let Found::Damaged { what } = lookup { Some(what) } else { None };
            let input = |edge: &Edge| match (digest(edge), before[edge.from].state) {
                (Some(digest), _) => InputNow::Is(digest.clone()),
                (None, State::Maybe) => InputNow::MayRun,
                (None, _) => InputNow::Runs,
            };
            match (damage, last.of(&node.names)?) {
                (Some(what), _) => (if saved { State::Resume } else { State::Run }, vec![Reason::Damaged { what }]),
                (None, None) => judge(saved, key.is_some(), None),
                (None, Some(last)) => {
                    let params = node.spec.stage.params();
                    let parts = node.parts(&params, &|edge| match digest(edge) {
                        Some(digest) => Value::String(digest.0.clone()),
                        None => Value::Null,
                    });
                    let by_reference = |reference: &str| node.edge(reference).map_or(InputNow::Runs, input);
                    let file = |path: &str| node.files.get(path).cloned();
                    let now = Now { parts: &parts, params: &params, input: &by_reference, file: &file };
                    judge(saved, key.is_some(), Some((&now, &last)))
                }
            }
        };
        node.hint = node.spec.kind.continues.and_then(|continues| continuing(continues, &node.spec.name, &reasons));
        node.reasons = reasons.iter().map(ToString::to_string).collect();
        (node.key, node.state) = (key, state);
    }
    Ok(())
}

/// What a run would do with a node that has no result, and why; `last` is what its last recorded run was, if there is one.
fn judge(saved: bool, has_key: bool, last: Option<(&Now<'_>, &LastRun)>) -> (State, Vec<Reason>) {
    let mut reasons = if saved { vec![Reason::Interrupted] } else { Vec::new() };
    let differences = match last {
        None => Vec::new(),
        Some((now, LastRun::Gone)) => std::iter::once(Reason::Gone).chain(now.pending_inputs()).collect(),
        Some((now, LastRun::Parts(parts))) => now.differences(parts),
    };
    // Only one who has run before can be spared by an input that comes out as it was.
    let may_be_spared = matches!(last, Some((_, LastRun::Parts(_)))) && differences.iter().all(Reason::rests_on_a_run);
    reasons.extend(differences);
    if reasons.is_empty() {
        reasons.push(if last.is_none() { Reason::NeverRun } else { Reason::Gone });
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
enum LastRun {
    /// The record stands and its result does not.
    Gone,
    /// What its key was made of.
    Parts(KeyParts),
}

/// The last recorded runs by name.
struct LastRuns<'a> {
    store: Option<&'a Store>,
    /// By experiment and trial.
    records: HashMap<(String, String), Arc<TrialRecords>>,
    manifests: HashMap<Digest, Option<KeyParts>>,
}

impl LastRuns<'_> {
    /// The last run of the first name that has one.
    fn of(&mut self, names: &[NodeName]) -> Result<Option<LastRun>, StoreError> {
        let Some(store) = self.store else { return Ok(None) };
        for name in names {
            let trial = (name.experiment.clone(), name.trial.clone());
            let records = match self.records.entry(trial) {
                Entry::Occupied(known) => known.into_mut(),
                Entry::Vacant(unknown) => unknown.insert(store.recorded_trial(&name.experiment, &name.trial)?),
            };
            let Some(record) = records.get(&name.stage) else { continue };
            if !self.manifests.contains_key(&record.key) {
                let parts = match store.lookup(&record.key)? {
                    Lookup::Hit(manifest) => Some(manifest.parts.clone()),
                    Lookup::Miss | Lookup::Damaged { .. } => None,
                };
                self.manifests.insert(record.key.clone(), parts);
            }
            return Ok(Some(self.manifests[&record.key].clone().map_or(LastRun::Gone, LastRun::Parts)));
        }
        Ok(None)
    }
}
