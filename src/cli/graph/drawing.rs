//! What is to be seen of a plan: a vertex for every stage, with the trials of a sweep on top of each other.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use serde::Serialize;

use crate::cli::plan::state_name;
use crate::cli::render;
use crate::pipeline::plan::{Plan, State};

/// States from the one that asks for most to the one that asks for least.
pub(super) const STATES: [State; 5] = [State::Blocked, State::Run, State::Resume, State::Maybe, State::Cached];

/// A graph to draw. Edges may form a circle where trials have edges in opposite directions.
#[derive(Debug, Default, Serialize)]
pub(super) struct Drawing {
    /// Stages.
    #[serde(rename = "stages")]
    pub(super) vertices: Vec<Vertex>,
    /// What rests on what, without doubles.
    pub(super) edges: Vec<Arrow>,
}

/// A stage.
#[derive(Debug, Serialize)]
pub(super) struct Vertex {
    /// The experiment, where several are drawn.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) experiment: Option<String>,
    /// Its name.
    pub(super) stage: String,
    /// Its kind; several where trials differ in it.
    pub(super) kind: String,
    /// How many different results it stands for.
    pub(super) count: usize,
    /// In how many trials it is.
    pub(super) trials: usize,
    /// How many of its results are in which state, in the order of [`STATES`].
    pub(super) states: BTreeMap<&'static str, usize>,
    /// What its results took in all, where that is to be shown instead of their states.
    #[serde(skip)]
    pub(super) took: Option<String>,
}

/// An edge between vertices.
#[derive(Debug, Serialize)]
pub(super) struct Arrow {
    /// The producer.
    pub(super) from: usize,
    /// The consumer.
    pub(super) to: usize,
    /// The outputs that it carries, the default one left out.
    pub(super) outputs: BTreeSet<String>,
}

impl Drawing {
    /// The drawing of every trial, or of those that are called `only`; `timed` shows what results took.
    pub(super) fn of(plan: &Plan, only: Option<&str>, timed: bool) -> Self {
        let trials = || plan.trials.iter().filter(|trial| only.is_none_or(|only| trial.trial == only));
        let experiments: BTreeSet<&str> = trials().map(|trial| trial.experiment.as_str()).collect();
        let several = experiments.len() > 1;
        let mut known: HashMap<(&str, &str), usize> = HashMap::new();
        let mut nodes: Vec<BTreeSet<usize>> = Vec::new();
        let mut vertices: Vec<Vertex> = Vec::new();
        let mut edges: BTreeMap<(usize, usize), BTreeSet<String>> = BTreeMap::new();
        for trial in trials() {
            let mut stages: Vec<(&str, usize)> =
                trial.stages.iter().map(|(name, node)| (name.as_str(), *node)).collect();
            stages.sort_by_key(|(_, node)| *node);
            let mut names: HashMap<usize, &str> = HashMap::new();
            for (stage, node) in stages {
                names.entry(node).or_insert(stage);
                // Stages that all experiments share by their recipe are drawn once.
                let owner = plan.nodes[node].name();
                let experiment = if several { owner.experiment.as_str() } else { "" };
                let name = if several { owner.stage.as_str() } else { stage };
                let vertex = *known.entry((experiment, name)).or_insert_with(|| {
                    vertices.push(Vertex {
                        experiment: several.then(|| experiment.to_owned()),
                        stage: name.to_owned(),
                        kind: String::new(),
                        count: 0,
                        trials: 0,
                        states: BTreeMap::new(),
                        took: None,
                    });
                    nodes.push(BTreeSet::new());
                    vertices.len() - 1
                });
                vertices[vertex].trials += 1;
                nodes[vertex].insert(node);
                for edge in &plan.nodes[node].edges {
                    let from = if several {
                        let owner = plan.nodes[edge.from].name();
                        known.get(&(owner.experiment.as_str(), owner.stage.as_str()))
                    } else {
                        names.get(&edge.from).and_then(|name| known.get(&("", *name)))
                    };
                    let Some(&from) = from.filter(|from| **from != vertex) else { continue };
                    let outputs = edges.entry((from, vertex)).or_default();
                    let default = plan.nodes[edge.from].spec.stage.outputs();
                    if default.first().is_some_and(|output| output.name != edge.output) {
                        outputs.insert(edge.output.clone());
                    }
                }
            }
        }
        for (vertex, nodes) in vertices.iter_mut().zip(&nodes) {
            let seconds =
                nodes.iter().filter_map(|node| plan.nodes[*node].result.as_ref()).map(|result| result.seconds);
            vertex.took = timed
                .then(|| render::duration(seconds.sum()))
                .filter(|_| nodes.iter().any(|node| plan.nodes[*node].result.is_some()));
            let kinds: BTreeSet<&str> = nodes.iter().map(|node| plan.nodes[*node].spec.kind.name).collect();
            vertex.kind = kinds.into_iter().collect::<Vec<_>>().join(", ");
            vertex.count = nodes.len();
            for node in nodes {
                *vertex.states.entry(state_name(plan.nodes[*node].state)).or_default() += 1;
            }
        }
        let edges = edges.into_iter().map(|((from, to), outputs)| Arrow { from, to, outputs });
        Self { vertices, edges: edges.collect() }
    }
}

impl Vertex {
    /// Its name, with that of its experiment where several are drawn.
    pub(super) fn title(&self) -> String {
        match &self.experiment {
            Some(experiment) => format!("{experiment}/{}", self.stage),
            None => self.stage.clone(),
        }
    }

    /// `x64`, where it stands for several results.
    pub(super) fn times(&self) -> Option<String> {
        (self.count > 1).then(|| format!("x{}", self.count))
    }

    /// The state that asks for most.
    pub(super) fn state(&self) -> State {
        STATES.into_iter().find(|state| self.states.contains_key(state_name(*state))).unwrap_or(State::Cached)
    }

    /// `run`, or `61 run, 3 cached` where its results differ.
    pub(super) fn state_text(&self) -> String {
        if let Some(took) = &self.took {
            return took.clone();
        }
        if self.states.len() == 1 {
            return state_name(self.state()).to_owned();
        }
        let counts = STATES.into_iter().filter_map(|state| {
            let name = state_name(state);
            self.states.get(name).map(|count| format!("{count} {name}"))
        });
        counts.collect::<Vec<_>>().join(", ")
    }
}

impl Arrow {
    /// The outputs that are named.
    pub(super) fn label(&self) -> String {
        self.outputs.iter().map(String::as_str).collect::<Vec<_>>().join(", ")
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    /// A drawing of `names` with edges by their numbers; a label stands behind `:`.
    pub(in crate::cli::graph) fn drawing(names: &[&str], edges: &[(usize, usize, &str)]) -> Drawing {
        let vertex = |name: &&str| Vertex {
            experiment: None,
            stage: (*name).to_owned(),
            kind: "toy".to_owned(),
            count: 1,
            trials: 1,
            states: BTreeMap::from([("run", 1)]),
            took: None,
        };
        let arrow = |(from, to, label): &(usize, usize, &str)| Arrow {
            from: *from,
            to: *to,
            outputs: label.split(',').filter(|name| !name.is_empty()).map(str::to_owned).collect(),
        };
        Drawing { vertices: names.iter().map(vertex).collect(), edges: edges.iter().map(arrow).collect() }
    }

    #[test]
    fn states_are_told_from_the_one_that_asks_for_most() {
        let mut vertex = drawing(&["a"], &[]).vertices.remove(0);
        assert_eq!((vertex.state(), vertex.state_text(), vertex.times()), (State::Run, "run".to_owned(), None));
        vertex.states = BTreeMap::from([("cached", 3), ("run", 61)]);
        vertex.count = 64;
        assert_eq!((vertex.state_text(), vertex.times()), ("61 run, 3 cached".to_owned(), Some("x64".to_owned())));
    }
}
