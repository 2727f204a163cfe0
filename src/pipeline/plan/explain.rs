//! Why a node runs, followed upstream: from what a plan says of each node to the causes behind it.
//!
//! It never changes what a plan says. What is read from the store here is read for one explanation, within a limit.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use crate::pipeline::plan::assess::{differences, input_now};
use crate::pipeline::plan::reason::Reason;
use crate::pipeline::plan::{NodeName, Plan, State};
use crate::pipeline::store::{Digest, Manifest, Store, StoreError};

/// Results that are compared with a stage which never ran, at most.
const COMPARED: usize = 64;

/// Recorded experiments besides the stage's own in which results to compare with are looked for, at most.
const OTHER_EXPERIMENTS: usize = 16;

/// The nearest result of another trial or experiment, and what differs from it.
#[derive(Clone, Debug)]
pub struct Compared {
    /// Where that result was made.
    pub with: NodeName,
    /// What differs; never empty.
    pub differences: Vec<Reason>,
}

impl Plan {
    /// How many inputs upstream the nearest cause lies that is a node's own: 0 for a node that runs for a reason of its own,
    /// nothing for one that does not run.
    pub fn distances(&self) -> Vec<Option<usize>> {
        let mut distances: Vec<Option<usize>> = Vec::with_capacity(self.nodes.len());
        for node in &self.nodes {
            let nearest = node.reasons.iter().map(|reason| {
                if !reason.rests_on_a_run() {
                    return Some(0);
                }
                let from = reason.input().and_then(|input| node.producer(input))?;
                distances[from].map(|distance| distance + 1)
            });
            let distance = nearest.flatten().min();
            distances.push(if node.state == State::Cached { None } else { distance });
        }
        distances
    }

    /// The nodes from `node` upstream to the nearest cause, `node` first.
    pub fn way_to_cause(&self, node: usize, distances: &[Option<usize>]) -> Vec<usize> {
        let mut way = vec![node];
        let mut at = node;
        while let Some(distance) = distances[at].filter(|distance| *distance > 0) {
            let inputs = self.nodes[at].reasons.iter().filter_map(Reason::input);
            let mut producers = inputs.filter_map(|input| self.nodes[at].producer(input));
            let Some(next) = producers.find(|from| distances[*from] == Some(distance - 1)) else { break };
            way.push(next);
            at = next;
        }
        way
    }

    /// What differs between a node that has no run of its own and the result that is most like it: of the same kind and
    /// stage name in another trial, or else in another experiment.
    pub fn compared(&self, node: usize, store: &Store) -> Result<Option<Compared>, StoreError> {
        let planned = &self.nodes[node];
        let (name, kind) = (planned.name(), planned.spec.kind.name);
        let mut seen: BTreeSet<Digest> = BTreeSet::new();
        let mut candidates: Vec<(NodeName, Arc<Manifest>)> = Vec::new();
        for other in self.nodes.iter().filter(|other| other.spec.kind.name == kind) {
            let with = other.names.iter().find(|with| with.stage == name.stage);
            let Some((with, result)) = with.filter(|_| seen.len() < COMPARED).zip(other.result.as_ref()) else {
                continue;
            };
            seen.insert(result.key.clone());
            candidates.extend(store.manifest_of(&result.key)?.map(|manifest| (with.clone(), manifest)));
        }
        let others = store.recorded_experiments()?.into_iter().filter(|other| *other != name.experiment);
        for experiment in std::iter::once(name.experiment.clone()).chain(others.take(OTHER_EXPERIMENTS)) {
            for (trial, stages) in store.recorded_trials(&experiment)? {
                let record = stages.get(&name.stage).filter(|record| record.kind == kind && seen.len() < COMPARED);
                let Some(record) = record.filter(|record| seen.insert(record.key.clone())) else { continue };
                if let Some(manifest) = store.manifest_of(&record.key)? {
                    let with = NodeName { experiment: experiment.clone(), trial, stage: name.stage.clone() };
                    candidates.push((with, manifest));
                }
            }
            // Another trial of the same experiment says more than another experiment.
            if let Some(nearest) = self.nearest(node, std::mem::take(&mut candidates)) {
                return Ok(Some(nearest));
            }
        }
        Ok(None)
    }

    /// The candidate with the fewest differences, the first of those.
    fn nearest(&self, node: usize, candidates: Vec<(NodeName, Arc<Manifest>)>) -> Option<Compared> {
        let compared = candidates
            .into_iter()
            .map(|(with, manifest)| Compared { with, differences: self.differences(node, &manifest) });
        compared.filter(|compared| !compared.differences.is_empty()).min_by_key(|compared| compared.differences.len())
    }

    fn differences(&self, node: usize, from: &Manifest) -> Vec<Reason> {
        differences(&self.nodes[node], &|edge| input_now(&self.nodes, edge), from)
    }

    /// Nodes that share what is said of them (state, reasons and the producers those lie in), in the order of `nodes`.
    pub fn alike(&self, nodes: impl IntoIterator<Item = usize>) -> Vec<Vec<usize>> {
        let mut groups: Vec<Vec<usize>> = Vec::new();
        let mut known: BTreeMap<String, usize> = BTreeMap::new();
        for index in nodes {
            let node = &self.nodes[index];
            let producers: Vec<Option<usize>> =
                node.reasons.iter().filter_map(Reason::input).map(|input| node.producer(input)).collect();
            let reasons: Vec<String> = node.reasons.iter().map(ToString::to_string).collect();
            let said = match node.state {
                State::Cached => format!("{index}"),
                state => format!("{state:?} {} {reasons:?} {producers:?}", node.name().stage),
            };
            let group = *known.entry(said).or_insert(groups.len());
            groups.resize_with(groups.len().max(group + 1), Vec::new);
            groups[group].push(index);
        }
        groups
    }
}
