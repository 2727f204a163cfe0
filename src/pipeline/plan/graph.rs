//! The stages of one trial as a graph: which stage each reference means, and an order with producers first.
//!
//! Nothing here recurses, because a chain may be 100,000 stages long. It must never know keys or the store.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::sync::Arc;

use petgraph::algo::toposort;
use petgraph::graph::{DiGraph, NodeIndex};
use rayon::iter::{IntoParallelRefIterator as _, ParallelIterator as _};

use crate::pipeline::plan::PlanError;
use crate::pipeline::plan::key::Outline;
use crate::pipeline::spec::{Experiment, StageSpec, Trial};
use crate::pipeline::stage::{ArtifactType, meant};

/// From this many stages on, more than one thread is worth waking.
const MANY: usize = 256;

/// The outline of every stage, by the stage's address: trials that share a stage share its outline.
pub(super) struct Outlines(HashMap<Address, Arc<Outline>>);

/// What tells stages apart that are not the same value.
type Address = (usize, &'static str, u32);

fn address(spec: &StageSpec) -> Address {
    (Arc::as_ptr(&spec.stage).cast::<()>() as usize, spec.kind.name, spec.kind.version)
}

impl Outlines {
    /// The outlines of every stage of `experiments`, which must outlive them.
    pub(super) fn of(experiments: &[Experiment]) -> Result<Self, PlanError> {
        let mut distinct: HashMap<Address, &StageSpec> = HashMap::new();
        let trials = experiments.iter().flat_map(|experiment| &experiment.trials);
        for spec in trials.flat_map(|trial| trial.stages.values()) {
            distinct.entry(address(spec)).or_insert(spec);
        }
        let outline = |(address, spec): (&Address, &&StageSpec)| {
            let outline = Outline::of(spec).map_err(|error| PlanError::stage(spec, error))?;
            Ok((*address, Arc::new(outline)))
        };
        let outlines: Result<_, PlanError> = if distinct.len() < MANY {
            distinct.iter().map(outline).collect()
        } else {
            distinct.par_iter().map(outline).collect()
        };
        outlines.map(Self)
    }

    fn get(&self, spec: &StageSpec) -> &Arc<Outline> {
        &self.0[&address(spec)]
    }
}

/// A stage with its place in the trial's graph.
pub(super) struct Placed<'a> {
    /// The stage.
    pub(super) spec: &'a StageSpec,
    /// Its name in the trial.
    pub(super) name: &'a str,
    /// Its number among the trial's stages in the order of their names.
    pub(super) number: usize,
    /// What it is made of.
    pub(super) outline: &'a Arc<Outline>,
    /// Its inputs, one a distinct reference, in the outline's order.
    pub(super) edges: Vec<NumberedEdge>,
}

/// An edge by the producer's number in the trial.
pub(super) struct NumberedEdge {
    /// As the stage names it.
    pub(super) reference: String,
    /// The number of the producing stage.
    pub(super) from: usize,
    /// Its output.
    pub(super) output: String,
    /// What it carries.
    pub(super) artifact: ArtifactType,
}

/// The stages of a trial, producers before consumers.
pub(super) fn order<'a>(trial: &'a Trial, outlines: &'a Outlines) -> Result<Vec<Placed<'a>>, PlanError> {
    let stages: Vec<(&StageSpec, &Arc<Outline>)> =
        trial.stages.values().map(|spec| (spec, outlines.get(spec))).collect();
    let numbers: HashMap<&str, usize> =
        trial.stages.keys().enumerate().map(|(number, name)| (name.as_str(), number)).collect();
    let mut graph = DiGraph::<&str, ()>::with_capacity(stages.len(), stages.len());
    // The sort puts what it meets last first, so nodes are added from the end: unrelated stages keep their order.
    let last = stages.len().wrapping_sub(1);
    for name in trial.stages.keys().rev() {
        graph.add_node(name);
    }
    let mut placed = Vec::with_capacity(stages.len());
    for (number, (name, &(spec, outline))) in trial.stages.keys().zip(&stages).enumerate() {
        let mut edges: Vec<NumberedEdge> = Vec::new();
        for (reference, wants) in &outline.references {
            let (stage, output) = match reference.split_once('.') {
                Some((stage, output)) => (stage, Some(output)),
                None => (reference.as_str(), None),
            };
            let found = numbers.get(stage).and_then(|&from| {
                // A type that does not fit was refused when the file was read.
                let output = meant(&stages[from].1.outputs, output, *wants).or_else(|first| first.ok_or(())).ok()?;
                Some((from, output))
            });
            let Some((from, output)) = found else {
                let problem = format!("`{reference}` names no output of a stage");
                return Err(PlanError::stage(spec, problem));
            };
            let known = edges.last().filter(|edge| edge.reference == *reference);
            if known.is_some_and(|edge| edge.output != output.name) {
                let problem = format!("`{reference}` means two outputs here; write `{reference}.{}`", output.name);
                return Err(PlanError::stage(spec, problem));
            }
            if known.is_some() {
                continue;
            }
            graph.add_edge(NodeIndex::new(last - from), NodeIndex::new(last - number), ());
            let (reference, output, artifact) = (reference.clone(), output.name.clone(), output.artifact);
            edges.push(NumberedEdge { reference, from, output, artifact });
        }
        placed.push(Some(Placed { spec, name, number, outline, edges }));
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
