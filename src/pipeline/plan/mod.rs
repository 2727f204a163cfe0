//! The plan: every node of every trial, merged by recipe, and what a run would do with it. Planning changes nothing.

mod assess;
pub mod explain;
pub mod forecast;
mod graph;
pub mod key;
pub mod reason;
mod same;

pub use same::SameArms;

use std::collections::{BTreeMap, HashMap};
use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::pipeline::plan::key::Outline;
use crate::pipeline::plan::reason::Reason;
use crate::pipeline::spec::{Experiment, StageSpec};
use crate::pipeline::stage::ArtifactType;
use crate::pipeline::store::{Digest, KeyParts, Store, StoreError, StoredResult, source_digest};

/// What a run would do with a node.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum State {
    /// Its result is in the store.
    Cached,
    /// It would run from the beginning. While an ancestor has to run first its key is not known, and it may turn out to be
    /// what a stage of another name has made; that is told only when it is there.
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

impl fmt::Display for NodeName {
    /// `EXPERIMENT[/TRIAL]/STAGE`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { experiment, trial, stage } = self;
        if trial.is_empty() { write!(f, "{experiment}/{stage}") } else { write!(f, "{experiment}/{trial}/{stage}") }
    }
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
    /// Its inputs, sorted by reference.
    pub edges: Vec<Edge>,
    /// Digests of the user's files it declares, by absolute path.
    pub files: BTreeMap<String, Digest>,
    /// What a run would do.
    pub state: State,
    /// Why, the nearest first.
    pub reasons: Vec<Reason>,
    /// What would save the user a part of the run.
    pub hint: Option<String>,
    /// The result, where it is cached.
    pub result: Option<Arc<StoredResult>>,
    outline: Arc<Outline>,
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
    /// The file of each experiment, absolute.
    pub experiments: BTreeMap<String, PathBuf>,
}

/// Why no plan can be made.
#[derive(Debug, thiserror::Error)]
pub enum PlanError {
    /// Two experiments would take each other's place in the store.
    #[error("two experiments are named `{name}`: `{}` and `{}`; the name is the stem of the file", first.display(), second.display())]
    SameName {
        /// The name.
        name: String,
        /// One file.
        first: PathBuf,
        /// The other.
        second: PathBuf,
    },
    /// A stage cannot be planned.
    #[error("{place}: stage `{stage}`: {problem}")]
    Stage {
        /// `file:line:column`.
        place: String,
        /// The stage.
        stage: String,
        /// What is wrong with it.
        problem: String,
    },
    /// The store refused.
    #[error(transparent)]
    Store(#[from] StoreError),
}

impl PlanError {
    fn stage(spec: &StageSpec, problem: impl fmt::Display) -> Self {
        let origin = &spec.origin;
        Self::Stage {
            place: format!("{}:{}:{}", origin.file.display(), origin.line, origin.column),
            stage: spec.name.clone(),
            problem: problem.to_string(),
        }
    }
}

impl Node {
    /// The name by which it is shown.
    pub fn name(&self) -> &NodeName {
        &self.names[0]
    }

    /// The node that makes the input which the stage names so.
    pub fn producer(&self, reference: &str) -> Option<usize> {
        self.edge(reference).map(|edge| edge.from)
    }

    /// The edge that a reference of its stage is.
    pub fn edge(&self, reference: &str) -> Option<&Edge> {
        let found = self.edges.binary_search_by(|edge| edge.reference.as_str().cmp(reference));
        found.ok().map(|index| &self.edges[index])
    }

    /// The parts of its key, with `digest` giving the content digest of each edge's output.
    pub fn parts(&self, params: &Value, digest: &dyn Fn(&Edge) -> Value) -> KeyParts {
        let input = |reference: &str| self.edge(reference).map_or(Value::Null, digest);
        let file = |path: &str| self.files.get(path).map_or(Value::Null, |digest| Value::String(digest.0.clone()));
        key::parts(&self.spec, params, &input, &file)
    }

    /// Its key, with `digest` giving the content digest of each edge's output; `None` as soon as one has none.
    pub fn key_of<'a>(&'a self, digest: &dyn Fn(&Edge) -> Option<&'a Digest>) -> Option<Digest> {
        let inputs = self.edges.iter().map(digest).collect::<Option<Vec<&Digest>>>()?;
        let files: Vec<&Digest> = self.files.values().collect();
        Some(self.outline.key(|number| inputs[number], |number| files.get(number).copied()))
    }
}

impl Plan {
    /// Merges the stages of all experiments, and looks up what the store has. Without a store everything would run.
    pub fn new(experiments: &[Experiment], store: Option<&Store>) -> Result<Self, PlanError> {
        let mut files: BTreeMap<String, PathBuf> = BTreeMap::new();
        let outlines = graph::Outlines::of(experiments)?;
        let mut merge = Merge { store, nodes: Vec::new(), known: HashMap::new(), files: HashMap::new() };
        let mut trials = Vec::new();
        for experiment in experiments {
            let path = std::path::absolute(&experiment.path).unwrap_or_else(|_| experiment.path.clone());
            if let Some(first) = files.insert(experiment.name.clone(), path.clone()) {
                return Err(PlanError::SameName { name: experiment.name.clone(), first, second: path });
            }
            for trial in &experiment.trials {
                // Which node each stage is, by the stage's number.
                let mut at = vec![usize::MAX; trial.stages.len()];
                for placed in graph::order(trial, &outlines)? {
                    let name = NodeName {
                        experiment: experiment.name.clone(),
                        trial: trial.name.clone(),
                        stage: placed.name.to_owned(),
                    };
                    let number = placed.number;
                    at[number] = merge.add(placed, &at, name)?;
                }
                let stages = trial.stages.keys().cloned().zip(at).collect();
                trials.push(PlannedTrial { experiment: experiment.name.clone(), trial: trial.name.clone(), stages });
            }
        }
        let mut nodes = merge.nodes;
        assess::assess(&mut nodes, store)?;
        Ok(Self { nodes, trials, experiments: files })
    }
}

/// The nodes so far.
struct Merge<'a> {
    store: Option<&'a Store>,
    nodes: Vec<Node>,
    /// Recipe to node.
    known: HashMap<Digest, usize>,
    /// Digests of the user's files by path, each hashed once.
    files: HashMap<String, Digest>,
}

impl Merge<'_> {
    /// Adds a stage whose producers are the nodes `at` their numbers, or finds the node that has its recipe.
    fn add(&mut self, placed: graph::Placed<'_>, at: &[usize], name: NodeName) -> Result<usize, PlanError> {
        let graph::Placed { spec, outline, edges, .. } = placed;
        let mut files = BTreeMap::new();
        for path in &outline.files {
            files.insert(path.clone(), self.file_digest(spec, path)?);
        }
        let digests: Vec<&Digest> = files.values().collect();
        let recipe = outline.recipe(
            |number| (&self.nodes[at[edges[number].from]].recipe, &edges[number].output),
            |number| digests.get(number).copied(),
        );
        if let Some(&node) = self.known.get(&recipe) {
            self.nodes[node].names.push(name);
            return Ok(node);
        }
        let node = self.nodes.len();
        self.known.insert(recipe.clone(), node);
        let edge = |edge: graph::NumberedEdge| Edge {
            reference: edge.reference,
            from: at[edge.from],
            output: edge.output,
            artifact: edge.artifact,
        };
        self.nodes.push(Node {
            recipe,
            key: None,
            spec: spec.clone(),
            names: vec![name],
            edges: edges.into_iter().map(edge).collect(),
            files,
            state: State::Run,
            reasons: Vec::new(),
            hint: None,
            result: None,
            outline: Arc::clone(outline),
        });
        Ok(node)
    }

    fn file_digest(&mut self, spec: &StageSpec, path: &str) -> Result<Digest, PlanError> {
        if let Some(digest) = self.files.get(path) {
            return Ok(digest.clone());
        }
        let digest = match self.store {
            Some(store) => store.file_digest(Path::new(path)),
            None => source_digest(Path::new(path)),
        };
        let digest = digest.map_err(|error| PlanError::stage(spec, error))?;
        self.files.insert(path.to_owned(), digest.clone());
        Ok(digest)
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::pipeline::fixture::{Act, Toy, echo, experiment, stage, toy, toys, trial, with_file};
    use crate::pipeline::spec::Trial;

    fn names(plan: &Plan) -> Vec<&str> {
        plan.nodes.iter().map(|node| node.name().stage.as_str()).collect()
    }

    #[test]
    fn equal_stages_of_all_trials_and_experiments_are_one_node() {
        let one = |seed: &str| trial(seed, vec![echo("data", "d", &[]), echo("train", seed, &["data"])]);
        let plan =
            Plan::new(&[experiment("a", vec![one("1"), one("2")]), experiment("b", vec![one("2")])], None).unwrap();
        assert_eq!(names(&plan), ["data", "train", "train"]);
        assert_eq!(plan.nodes[0].names.len(), 3);
        assert_eq!(plan.nodes[2].names.iter().map(|name| name.experiment.as_str()).collect::<Vec<_>>(), ["a", "b"]);
        assert_eq!(plan.trials[2].stages, BTreeMap::from([("data".into(), 0), ("train".into(), 2)]));
        assert!(plan.nodes.iter().all(|node| node.state == State::Run && node.reasons == [Reason::NeverRun]));
        assert!(plan.nodes[0].key.is_some() && plan.nodes[1].key.is_none());
    }

    #[test]
    fn names_places_and_order_do_not_enter_and_everything_else_does() {
        let recipe = |stages: Vec<StageSpec>| {
            let plan = Plan::new(&toys(stages), None).unwrap();
            plan.nodes.last().unwrap().recipe.clone()
        };
        let folder = tempfile::tempdir().unwrap();
        let file = |name: &str, text: &str| {
            std::fs::write(folder.path().join(name), text).unwrap();
            with_file("x", &folder.path().join(name))
        };
        let base = recipe(vec![echo("a", "a", &[]), echo("b", "b", &["a"])]);
        assert_eq!(base, recipe(vec![echo("z", "a", &[]), echo("b2", "b", &["z.out"])]));
        let mut elsewhere = stage::<Toy>("b", json!({"inputs": ["a"], "text": "b"}));
        elsewhere.origin.line = 99;
        elsewhere.run.cpus = 7;
        assert_eq!(base, recipe(vec![echo("a", "a", &[]), elsewhere]));
        assert_ne!(base, recipe(vec![echo("a", "A", &[]), echo("b", "b", &["a"])]));
        assert_ne!(base, recipe(vec![echo("a", "a", &[]), echo("b", "b", &["a.second"])]));
        assert_ne!(base, recipe(vec![echo("a", "a", &[]), toy("b", "b", Act::Constant, &["a"])]));
        let mut newer = echo("b", "b", &["a"]);
        newer.kind.version = 2;
        assert_ne!(base, recipe(vec![echo("a", "a", &[]), newer]));
        assert_eq!(recipe(vec![file("one", "text")]), recipe(vec![file("two", "text")]));
        assert_ne!(recipe(vec![file("one", "text")]), recipe(vec![file("one", "other")]));
    }

    #[test]
    fn mistakes_name_their_stage_and_place() {
        let error = |trial: Trial| match Plan::new(&[experiment("a", vec![trial])], None) {
            Ok(_) => panic!("it was planned"),
            Err(error) => error.to_string(),
        };
        let circle = vec![echo("a", "", &["c"]), echo("b", "", &["a"]), echo("c", "", &["b"]), echo("d", "", &["c"])];
        let circle = error(trial("", circle));
        assert!(circle.starts_with("toy.toml:3:1: stage `"), "{circle}");
        assert!(
            ["a` -> `b` -> `c` -> `a", "b` -> `c` -> `a` -> `b", "c` -> `a` -> `b` -> `c"]
                .iter()
                .any(|names| circle.contains(names)),
            "{circle}"
        );
        assert!(error(trial("", vec![echo("a", "", &["b"])])).contains("`b` names no output"));
        assert!(error(trial("", vec![echo("b", "", &[]), echo("a", "", &["b.third"])])).contains("`b.third`"));
        assert!(error(trial("", vec![with_file("a", Path::new("/nowhere/x"))])).contains("/nowhere/x"));
        let twice = Plan::new(&[experiment("a", vec![]), experiment("a", vec![])], None);
        assert!(twice.is_err_and(|error| error.to_string().contains("two experiments are named `a`")));
    }

    #[test]
    fn a_long_chain_is_planned() {
        // Far beyond what a recursion would survive on a test's stack.
        let count = 30_000;
        let name = |index: usize| format!("s{index:06}");
        let mut stages = vec![echo(&name(0), "", &[])];
        stages.extend((1..count).map(|index| echo(&name(index), "", &[&name(index - 1)])));
        let plan = Plan::new(&toys(stages), None).unwrap();
        assert_eq!(plan.nodes.len(), count);
        assert!(plan.nodes.iter().enumerate().all(|(index, node)| node.edges.iter().all(|edge| edge.from < index)));
    }
}
