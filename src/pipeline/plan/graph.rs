//! The stages of one trial as a graph: which stage each reference means, and an order with producers first.
//!
//! Nothing here recurses, because a chain may be 100,000 stages long. It must never know keys or the store.

use std::collections::HashMap;
use std::collections::hash_map::Entry;

use petgraph::algo::toposort;
use petgraph::graph::{DiGraph, NodeIndex};
use serde_json::Value;

use crate::pipeline::plan::PlanError;
use crate::pipeline::spec::{StageSpec, Trial};
use crate::pipeline::stage::{ArtifactType, Output, meant, references};

/// A stage with its place in the trial's graph.
pub(super) struct Placed<'a> {
    /// The stage.
    pub(super) spec: &'a StageSpec,
    /// Its name in the trial.
    pub(super) name: &'a str,
    /// Its serialised parameters.
    pub(super) params: Value,
    /// Its inputs.
    pub(super) edges: Vec<NamedEdge<'a>>,
}

/// An edge by the producer's name.
pub(super) struct NamedEdge<'a> {
    /// As the stage names it.
    pub(super) reference: String,
    /// The producing stage.
    pub(super) from: &'a str,
    /// Its output.
    pub(super) output: String,
    /// What it carries.
    pub(super) artifact: ArtifactType,
}

/// The stages of a trial, producers before consumers.
pub(super) fn order(trial: &Trial) -> Result<Vec<Placed<'_>>, PlanError> {
    let index: HashMap<&str, (usize, Vec<Output>)> =
        trial.stages.iter().enumerate().map(|(at, (name, spec))| (name.as_str(), (at, spec.stage.outputs()))).collect();
    let mut graph = DiGraph::<&str, ()>::with_capacity(trial.stages.len(), trial.stages.len());
    // The sort puts what it meets last first, so nodes are added from the end: unrelated stages keep their order.
    let last = trial.stages.len().wrapping_sub(1);
    for name in trial.stages.keys().rev() {
        graph.add_node(name);
    }
    let mut placed = Vec::with_capacity(trial.stages.len());
    for (at, (name, spec)) in trial.stages.iter().enumerate() {
        let params = spec.stage.params();
        let mut edges = Vec::new();
        for (reference, wants) in references(&params) {
            let (stage, output) = match reference.split_once('.') {
                Some((stage, output)) => (stage, Some(output)),
                None => (reference.as_str(), None),
            };
            let found = trial.stages.get_key_value(stage).and_then(|(from, _)| {
                let (from_at, outputs) = &index[from.as_str()];
                // A type that does not fit was refused when the file was read.
                let output = meant(outputs, output, wants).or_else(|first| first.ok_or(())).ok()?;
                Some((from.as_str(), *from_at, output.clone()))
            });
            let Some((from, from_at, output)) = found else {
                let problem = format!("`{reference}` names no output of a stage");
                return Err(PlanError::stage(spec, problem));
            };
            let known = edges.iter().find(|edge: &&NamedEdge<'_>| edge.reference == reference);
            if known.is_some_and(|edge| edge.output != output.name) {
                let problem = format!("`{reference}` means two outputs here; write `{reference}.{}`", output.name);
                return Err(PlanError::stage(spec, problem));
            }
            if known.is_some() {
                continue;
            }
            graph.add_edge(NodeIndex::new(last - from_at), NodeIndex::new(last - at), ());
            edges.push(NamedEdge { reference, from, output: output.name, artifact: output.artifact });
        }
        placed.push(Some(Placed { spec, name, params, edges }));
    }
    let sorted = toposort(&graph, None).map_err(|cycle| {
        let names = cycle_from(&graph, cycle.node_id());
        let spec = &trial.stages[names[0]];
        PlanError::stage(spec, format!("stages need each other in a circle: `{}`", names.join("` -> `")))
    })?;
    Ok(sorted.into_iter().filter_map(|node| placed[last - node.index()].take()).collect())
}

/// The stages of a circle through `start`, the first one again at the end: a breadth-first walk back to itself.
fn cycle_from<'a>(graph: &DiGraph<&'a str, ()>, start: NodeIndex) -> Vec<&'a str> {
    let mut parent: HashMap<NodeIndex, NodeIndex> = HashMap::new();
    let mut queue = std::collections::VecDeque::from([start]);
    while let Some(node) = queue.pop_front() {
        for next in graph.neighbors(node) {
            if let Entry::Vacant(unseen) = parent.entry(next) {
                unseen.insert(node);
                queue.push_back(next);
            }
        }
    }
    let mut names = vec![graph[start]];
    let mut node = start;
    while let Some(&above) = parent.get(&node) {
        names.push(graph[above]);
        node = above;
        if node == start {
            break;
        }
    }
    names.reverse();
    names
}
