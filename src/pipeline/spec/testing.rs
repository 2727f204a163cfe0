//! Small kinds and a folder of files, for the tests of reading.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::pipeline::spec::{Experiment, read};
use crate::pipeline::stage::{
    Any, ArtifactType, Checkpoint, Dataset, Input, Kind, Output, PlacedFile, Problem, SourceFile, Stage, Upstream,
};

pub(super) static KINDS: &[Kind] = &[Kind::of::<Draw>(), Kind::of::<Train>(), Kind::of::<Score>()];

/// What is drawn.
#[derive(Serialize, Deserialize, JsonSchema)]
#[serde(tag = "kind", rename_all = "snake_case", deny_unknown_fields)]
enum Task {
    /// A maze.
    Maze {
        /// Rows.
        #[schemars(range(min = 2, max = 100))]
        rows: u64,
    },
    /// A list.
    List(List),
}

/// A list.
#[derive(Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
struct List {
    /// Items.
    items: Vec<String>,
}

/// Draws data.
#[derive(Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
struct Draw {
    task: Task,
    #[serde(default)]
    splits: BTreeMap<String, u64>,
    #[serde(default)]
    source: Option<SourceFile>,
    #[serde(default)]
    placed: Vec<PlacedFile>,
    #[serde(default)]
    seed: u64,
}

impl Stage for Draw {
    const KIND: &'static str = "draw";
    const VERSION: u32 = 1;
    fn outputs(&self) -> Vec<Output> {
        vec![Output::new("rows", ArtifactType::Dataset), Output::new("extra", ArtifactType::Files)]
    }
    fn metrics(&self, _: &Upstream<'_>) -> Option<Vec<String>> {
        Some(Vec::new())
    }
}

#[derive(Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
enum Decay {
    /// Cosine.
    Cosine,
    /// None.
    Constant,
}

#[derive(Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
struct Optimizer {
    #[schemars(range(min = 0.0, max = 1.0))]
    beta: f64,
    decay: Decay,
    nesterov: bool,
}

impl Default for Optimizer {
    fn default() -> Self {
        Self { beta: 0.9, decay: Decay::Cosine, nesterov: false }
    }
}

#[derive(Serialize, Deserialize, JsonSchema)]
#[serde(tag = "kind", rename_all = "snake_case", deny_unknown_fields)]
enum Reward {
    Correct {
        #[serde(default)]
        weight: f64,
    },
    Expression {
        expression: String,
    },
}

#[derive(Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
struct Validate {
    #[schemars(range(min = 1))]
    every: u64,
    samples: u64,
}

/// Trains.
#[derive(Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
struct Train {
    data: Input<Dataset>,
    #[serde(default)]
    start: Option<Input<Checkpoint>>,
    /// Steps.
    #[schemars(range(min = 1))]
    steps: u64,
    #[serde(default)]
    #[schemars(extend("exclusiveMinimum" = 0.0))]
    learning_rate: Option<f64>,
    #[serde(default)]
    optimizer: Optimizer,
    #[serde(default)]
    validate: Option<Validate>,
    #[serde(default)]
    rewards: BTreeMap<String, Reward>,
    #[serde(default)]
    note: String,
    #[serde(default)]
    seed: u64,
}

impl Stage for Train {
    const KIND: &'static str = "train";
    const VERSION: u32 = 1;
    fn outputs(&self) -> Vec<Output> {
        vec![Output::new("last", ArtifactType::Checkpoint), Output::new("log", ArtifactType::Files)]
    }
    fn check(&self, upstream: &Upstream<'_>) -> Vec<Problem> {
        let mut problems = Vec::new();
        if upstream.nearest(&self.data.reference, "task").is_none() {
            problems.push(Problem::new("data", "the data has no task"));
        }
        for (name, reward) in &self.rewards {
            if matches!(reward, Reward::Expression { expression } if expression.contains("??")) {
                let problem = Problem::new(format!("rewards.{name}.expression"), "`??` is no operator");
                problems.push(problem.hint("write arithmetic"));
            }
        }
        if self.note == "absent" {
            problems.push(Problem::new("validate.every", "nothing is validated"));
        }
        problems
    }
}

/// Scores.
#[derive(Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
struct Score {
    model: Input<Checkpoint>,
    #[serde(default)]
    others: Vec<Input<Any>>,
    #[serde(default)]
    split: String,
    #[serde(default)]
    seed: u64,
}

impl Stage for Score {
    const KIND: &'static str = "score";
    const VERSION: u32 = 1;
    fn outputs(&self) -> Vec<Output> {
        vec![Output::new("evaluation", ArtifactType::Evaluation)]
    }
    fn metrics(&self, _: &Upstream<'_>) -> Option<Vec<String>> {
        Some(["solved", "solved.*", "steps"].map(str::to_owned).to_vec())
    }
    fn split(&self) -> Option<&str> {
        Some(&self.split)
    }
}

/// A folder of files.
pub(super) struct Files {
    folder: tempfile::TempDir,
}

impl Files {
    /// The files `(path, text)`.
    pub(super) fn new(files: &[(&str, &str)]) -> Self {
        let folder = tempfile::tempdir().unwrap();
        for (path, text) in files {
            let path = folder.path().join(path);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, text).unwrap();
        }
        Self { folder }
    }

    pub(super) fn path(&self, path: &str) -> PathBuf {
        self.folder.path().join(path)
    }

    /// What reading gives: experiments, or the messages with the folder's own path left out.
    pub(super) fn read(&self, paths: &[&str], sets: &[&str]) -> Result<Vec<Experiment>, String> {
        let paths: Vec<PathBuf> = paths.iter().map(|path| self.path(path)).collect();
        let sets: Vec<String> = sets.iter().map(|set| (*set).to_owned()).collect();
        read(&paths, &sets, KINDS).map_err(|diagnostics| without(&diagnostics.render(false), self.folder.path()))
    }

    /// The one experiment in `path`.
    pub(super) fn good(&self, path: &str, sets: &[&str]) -> Experiment {
        match self.read(&[path], sets) {
            Ok(mut experiments) => experiments.remove(0),
            Err(messages) => panic!("{messages}"),
        }
    }

    /// The messages about `path`.
    pub(super) fn bad(&self, path: &str, sets: &[&str]) -> String {
        self.read(&[path], sets).err().expect("the files are wrong")
    }
}

/// The messages about a file that is all there is.
pub(super) fn mistakes(text: &str) -> String {
    Files::new(&[("a.toml", text)]).bad("a.toml", &[])
}

/// [`PIPELINE`] with this laid over it as `a.toml`.
pub(super) fn swept(sweep: &str) -> Files {
    Files::new(&[("p.toml", PIPELINE), ("a.toml", &format!("pipeline = \"p.toml\"\n{sweep}"))])
}

/// A pipeline of three stages that is right.
pub(super) const PIPELINE: &str = r#"[params]
seed = 1
rate = 1e-3

[stages.data]
kind = "draw"
task = { kind = "maze", rows = 5 }
splits = { train = 100, test = 10 }

[stages.train]
kind = "train"
data = "data"
steps = 10
learning_rate = "${params.rate}"
seed = "${params.seed}"
rewards.correct = { kind = "correct", weight = 1.0 }
rewards.other = { kind = "expression", expression = "a + b" }
run = { cpus = 2, save_every = "30s" }

[stages.score]
kind = "score"
model = "train"
others = ["data.extra", "train"]
"#;

fn without(text: &str, folder: &Path) -> String {
    let canonical = folder.canonicalize().unwrap();
    let text = text.replace(&format!("{}/", folder.display()), "");
    text.replace(&format!("{}/", canonical.display()), "")
}
