//! The plan: every node of every trial, merged by recipe, and what a run would do with it. Planning changes nothing.

use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

use crate::pipeline::spec::StageSpec;
use crate::pipeline::stage::ArtifactType;
use crate::pipeline::store::Digest;

/// What a run would do with a node.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum State {
    /// Its result is in the store.
    Cached,
    /// It would run from the beginning.
    Run,
    /// It would go on from saved work.
    Resume,
    /// An ancestor runs; if that comes out as before, this one is cached.
    Maybe,
    /// An input failed.
    Blocked,
}

/// The experiment, trial and stage by which people know a node. `trial` is empty where nothing is swept.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct NodeName {
    /// The experiment's name.
    pub experiment: String,
    /// The trial's name.
    pub trial: String,
    /// The stage's name.
    pub stage: String,
}

/// An edge into a node.
#[derive(Clone, Debug)]
pub struct Edge {
    /// As the stage names it.
    pub reference: String,
    /// The index of the producing node.
    pub from: usize,
    /// The output of the producer.
    pub output: String,
    /// What it carries.
    pub artifact: ArtifactType,
}

/// One recipe: a stage that some trials share.
#[derive(Clone)]
pub struct Node {
    /// Known when planning; names the node.
    pub recipe: Digest,
    /// Known when the inputs are.
    pub key: Option<Digest>,
    /// The stage (of the first trial that has it).
    pub spec: StageSpec,
    /// Where it stands in experiments.
    pub names: Vec<NodeName>,
    /// Its inputs.
    pub edges: Vec<Edge>,
    /// Digests of the user's files it declares, by absolute path.
    pub files: BTreeMap<String, Digest>,
    /// What a run would do.
    pub state: State,
    /// Why, shortest first; for people.
    pub reasons: Vec<String>,
}

/// A trial as node indices.
#[derive(Clone, Debug)]
pub struct PlannedTrial {
    /// The experiment's name.
    pub experiment: String,
    /// The trial's name.
    pub trial: String,
    /// Stage name to index in [`Plan::nodes`].
    pub stages: BTreeMap<String, usize>,
}

/// Every node of the experiments given, each recipe once, producers before consumers.
#[derive(Clone)]
pub struct Plan {
    /// In topological order.
    pub nodes: Vec<Node>,
    /// In the order of the files.
    pub trials: Vec<PlannedTrial>,
}
