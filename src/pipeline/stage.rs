//! The contract between the pipeline and a stage: what a kind is, what a stage says of itself, what it is given to run.
//!
//! A stage *is* its parameters: one struct is one TOML table, one schema entry, one key. Its inputs are fields of type
//! [`Input`], its files fields of type [`SourceFile`] or [`PlacedFile`]; nothing else declares a dependency. The pipeline
//! sees kinds as plain values ([`Kind`]) that it is handed as a slice; it names none of them.

mod edge;
mod erased;

pub use edge::{
    Any, Artifact, ArtifactType, Checkpoint, Dataset, Evaluation, Input, Rollouts, Tokenizer, Tokens, TrainingState,
};
pub use erased::AnyStage;

pub use crate::file::{PlacedFile, SourceFile};

use std::collections::BTreeMap;
use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use anyhow::Context as _;
use schemars::{JsonSchema, Schema, SchemaGenerator};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use serde_json::Value;

/// A named output of a stage.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Output {
    /// Its name: `stage.NAME` in an input; the first output may go without, and so may the only one of a type.
    pub name: String,
    /// What it carries.
    #[serde(rename = "type")]
    pub artifact: ArtifactType,
}

impl Output {
    /// An output `name` that carries `artifact`.
    pub fn new(name: impl Into<String>, artifact: ArtifactType) -> Self {
        Self { name: name.into(), artifact }
    }
}

/// A piece of code that a stage's result rests on, with its version: a task, a format, a reward, a shared module.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Part {
    /// What it is, as `task.maze` or `reward.correct`.
    pub name: String,
    /// Raised when the piece would give another result.
    pub version: u32,
}

impl Part {
    /// The part `name` at `version`.
    pub fn new(name: impl Into<String>, version: u32) -> Self {
        Self { name: name.into(), version }
    }
}

/// Something wrong in a stage's parameters that its schema cannot say.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Problem {
    /// The dotted path below the stage's table: `rewards.progress.expression`.
    pub path: String,
    /// What is wrong: lower case, literals in backticks, no full stop.
    pub message: String,
    /// What the user may do.
    pub hint: Option<String>,
}

impl Problem {
    /// A problem at `path` without a hint.
    pub fn new(path: impl Into<String>, message: impl Into<String>) -> Self {
        Self { path: path.into(), message: message.into(), hint: None }
    }

    /// The same with a hint.
    #[must_use]
    pub fn hint(mut self, hint: impl Into<String>) -> Self {
        self.hint = Some(hint.into());
        self
    }
}

/// The other stages of a trial by name, for checks that need to know what an input was made from.
#[derive(Clone, Copy, Debug)]
pub struct Upstream<'a> {
    /// Every stage that could be parsed.
    pub stages: &'a dyn Stages,
}

/// The parameters of stages by name.
pub trait Stages: fmt::Debug + Sync {
    /// [`AnyStage::params`] of the stage `name`.
    fn get(&self, name: &str) -> Option<&Value>;
}

impl Stages for BTreeMap<String, Value> {
    fn get(&self, name: &str) -> Option<&Value> {
        self.get(name)
    }
}

impl<'a> Upstream<'a> {
    /// The parameter `field` of the stage behind `reference`, or else of the nearest stage upstream that has it.
    pub fn nearest(&self, reference: &str, field: &str) -> Option<&'a Value> {
        let mut seen = std::collections::BTreeSet::new();
        let mut layer = vec![reference.to_owned()];
        while !layer.is_empty() {
            let mut next = Vec::new();
            for reference in layer {
                let name = reference.split('.').next().unwrap_or_default().to_owned();
                let Some(params) = self.stages.get(&name) else { continue };
                if !seen.insert(name) {
                    continue;
                }
                if let Some(value) = params.get(field).filter(|value| !value.is_null()) {
                    return Some(value);
                }
                next.extend(references(params).into_iter().map(|(reference, _)| reference));
            }
            layer = next;
        }
        None
    }
}

/// Every edge in serialised parameters: the reference and what it wants (`None` for any).
pub fn references(params: &Value) -> Vec<(String, Option<ArtifactType>)> {
    let mut found = Vec::new();
    let mut stack = vec![params];
    while let Some(value) = stack.pop() {
        match value {
            Value::Object(fields) => {
                if let Some(Value::String(reference)) = fields.get("$input") {
                    let wants = fields.get("wants").and_then(|wants| ArtifactType::named(wants.as_str()?));
                    found.push((reference.clone(), wants));
                } else {
                    stack.extend(fields.values());
                }
            }
            Value::Array(items) => stack.extend(items),
            _ => {}
        }
    }
    found.sort();
    found.dedup();
    found
}

/// The output of a stage that a reference means: the one named, else the first if it is of the type wanted (`None` is
/// any), else the only one of that type. An error gives the first, if any.
pub fn meant<'a>(
    outputs: &'a [Output],
    named: Option<&str>,
    wants: Option<ArtifactType>,
) -> Result<&'a Output, Option<&'a Output>> {
    if let Some(name) = named {
        return outputs.iter().find(|output| output.name == name).ok_or(None);
    }
    let fits = |output: &&Output| wants.is_none_or(|wants| output.artifact == wants);
    let first = outputs.first().ok_or(None)?;
    let mut fitting = outputs.iter().filter(fits);
    match (fitting.next(), fitting.next()) {
        (Some(only), None) => Ok(only),
        _ if fits(&first) => Ok(first),
        _ => Err(Some(first)),
    }
}

/// How stages of a kind go on from where another of the kind ended, for hints.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Continues {
    /// The parameter that names the other stage.
    pub field: &'static str,
    /// The number that may have grown since: what is done of it need not be done again.
    pub grows: &'static str,
}

/// Where stages of a kind run.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Place {
    /// In the driver's own process, on one of its threads.
    InProcess,
    /// In a `pipe-worker` child process, the only program that links libtorch.
    Worker,
}

/// A stage: its parameters, and what the pipeline must know of them.
pub trait Stage: Serialize + DeserializeOwned + JsonSchema + Send + Sync + 'static {
    /// The name by which TOML files call the kind.
    const KIND: &'static str;
    /// Raised when the same parameters and inputs would give another result.
    const VERSION: u32;
    /// Where it runs.
    const PLACE: Place = Place::InProcess;
    /// How a stage goes on from another's end, where it can.
    const CONTINUES: Option<Continues> = None;

    /// The named outputs, the default one first; never empty.
    fn outputs(&self) -> Vec<Output>;

    /// The versions of the pieces that the result rests on besides the kind itself.
    fn parts(&self) -> Vec<Part> {
        Vec::new()
    }

    /// What is wrong with the parameters beyond their schema; `upstream` shows the stages that this one rests on.
    fn check(&self, _upstream: &Upstream<'_>) -> Vec<Problem> {
        Vec::new()
    }

    /// The names of the numbers that tables may show of its result; a name that ends in `.*` stands for every name that
    /// begins so. `None` where that cannot be told before it has run.
    fn metrics(&self, _upstream: &Upstream<'_>) -> Option<Vec<String>> {
        None
    }

    /// The names of the curves that it logs step by step, which tables may read at a point; a name that ends in `*` stands for
    /// every name that begins so.
    fn curves(&self) -> &'static [&'static str] {
        &[]
    }

    /// The split of the data that its metrics are measured on, where they are of one.
    fn split(&self) -> Option<&str> {
        None
    }

    /// The parameters with all that provably changes nothing set to one value: two stages of one normal form and the same
    /// inputs compute the same but for rounding. `None` where every parameter counts. Arms that differ in such parameters
    /// alone are told to be the same arm; keys are made of the parameters as they are.
    fn normal_form(&self) -> Option<Value> {
        None
    }

    /// Runs the stage in process; kinds placed in the worker are run there and never here.
    fn run(&self, _context: &mut StageContext) -> anyhow::Result<()> {
        anyhow::bail!("a `{}` stage runs in `pipe-worker`", Self::KIND)
    }
}

/// What the pipeline knows of a kind: a plain value of names and function pointers.
#[derive(Clone, Copy)]
pub struct Kind {
    /// The name by which TOML files call it.
    pub name: &'static str,
    /// See [`Stage::VERSION`].
    pub version: u32,
    /// See [`Stage::PLACE`].
    pub place: Place,
    /// See [`Stage::CONTINUES`].
    pub continues: Option<Continues>,
    /// Makes a stage from its parameters (without `kind` and `run`); an error names the field by its path.
    pub parse: fn(Value) -> Result<Arc<dyn AnyStage>, Problem>,
    /// The JSON Schema of the parameters, without `kind` and `run`.
    pub schema: fn(&mut SchemaGenerator) -> Schema,
}

impl Kind {
    /// The kind of the stages `S`.
    pub const fn of<S: Stage>() -> Self {
        Self {
            name: S::KIND,
            version: S::VERSION,
            place: S::PLACE,
            continues: S::CONTINUES,
            parse: |params| {
                serde_path_to_error::deserialize::<_, S>(params)
                    .map(|stage| Arc::new(stage) as Arc<dyn AnyStage>)
                    .map_err(|error| Problem::new(error.path().to_string(), error.inner().to_string()))
            },
            schema: |generator| S::json_schema(generator),
        }
    }
}

impl fmt::Debug for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Kind({} v{})", self.name, self.version)
    }
}

/// The options of a stage's `run` table: how it runs, never what it computes. They enter no key.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct RunOptions {
    /// Cores that the stage takes; 0 (the default) is one for light kinds and every core for libtorch kinds. A program of a
    /// `command` stage finds the number in `OMP_NUM_THREADS` and its like. More than there are means all of them.
    pub cpus: usize,
    /// The device of libtorch kinds: `auto` (CUDA where there is one), `cpu`, `cuda` (whichever GPU is free) or `cuda:N`. A
    /// `command` stage with `cuda` or `cuda:N` holds that GPU alone and its program sees no other; with `cpu` it sees none; with
    /// `auto` it holds none and sees those that `pipe` does.
    pub device: String,
    /// Memory that the stage may come to need, as `512MiB`, `4GiB` or `2GB`: stages run side by side only where their sum is
    /// within what the machine has in all. Nothing keeps the stage from taking more. None by default.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub memory: Option<String>,
    /// Shares of named things of which there are few, as `{ licence = 1 }`: of each there is 1, or as many as `--slot NAME=N`
    /// says.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub slots: BTreeMap<String, usize>,
    /// How often the stage is tried again in one run after an attempt that failed or timed out. What an attempt has saved, the
    /// next goes on from. A file of the user's that changed is no reason to try again.
    pub retries: u32,
    /// The pause before the second attempt, as `500ms`, `10s` or `5m`; it doubles after each failure, up to ten minutes.
    pub backoff: String,
    /// How long an attempt may take, as `30m` or `2h`: then it is asked to save and end, killed where it does not within half
    /// a minute, and has failed. Light kinds that are no programs are only asked. No limit by default.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub timeout: Option<String>,
    /// How often a training stage saves its state, as `30s`, `5m` or `1h`.
    pub save_every: String,
}

impl Default for RunOptions {
    fn default() -> Self {
        Self {
            cpus: 0,
            device: "auto".to_owned(),
            memory: None,
            slots: BTreeMap::new(),
            retries: 0,
            backoff: "1s".to_owned(),
            timeout: None,
            save_every: "60s".to_owned(),
        }
    }
}

/// An input as a running stage finds it.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct InputArtifact {
    /// The folder, read-only.
    pub path: PathBuf,
    /// The digest of its content.
    pub digest: String,
    /// What it carries.
    #[serde(rename = "type")]
    pub artifact: ArtifactType,
}

/// The machine's share of a running stage. Nothing of it may change a result except as DESIGN allows (threads, device).
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Resources {
    /// `cpu` or `cuda:0` (the scheduler maps the physical device).
    pub device: String,
    /// Threads for computation, fixed at the first attempt of a key.
    pub threads: usize,
    /// What `CUDA_VISIBLE_DEVICES` must be for programs that the stage starts; `None` leaves them what they find.
    #[serde(default)]
    pub visible_devices: Option<String>,
    /// How often to save a training state.
    pub save_every: Duration,
}

/// What a stage tells while it runs.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "event", rename_all = "snake_case")]
pub enum StageEvent {
    /// It is `done` of `total` units (`rows`, `steps`, ...) along.
    Progress {
        /// Units done, of this attempt and those before it.
        done: u64,
        /// Units in all.
        total: u64,
        /// What is counted.
        unit: String,
    },
    /// It goes on from saved work instead of beginning.
    Resumed {
        /// Units done before.
        done: u64,
    },
    /// The newest values of some metrics, for people who watch.
    Metrics {
        /// Name to value.
        values: BTreeMap<String, f64>,
    },
    /// Something a person should know.
    Note {
        /// One sentence without a full stop.
        text: String,
    },
}

/// The error with which a stage ends after it was asked to stop and has saved its work.
#[derive(Clone, Copy, Debug, thiserror::Error)]
#[error("interrupted")]
pub struct Interrupted;

/// Everything that a running stage is given.
pub struct StageContext {
    /// Inputs by reference, as the stage's [`Input`] fields name them.
    pub inputs: BTreeMap<String, InputArtifact>,
    /// The folder that holds one empty folder per output. Only what lies here is kept as the result.
    pub out: PathBuf,
    /// A folder that survives a kill and belongs to this key alone: training states lie here. Whoever writes there first
    /// makes it.
    pub work: PathBuf,
    /// Logs of this key: metrics, event files, text; never part of the result.
    pub logs: PathBuf,
    /// Device, threads and the like.
    pub resources: Resources,
    /// Set when the stage should save and stop.
    pub interrupt: Arc<AtomicBool>,
    /// Where events go.
    pub events: Box<dyn FnMut(StageEvent) + Send>,
}

impl StageContext {
    /// The folder of an input.
    pub fn input<A: Artifact>(&self, input: &Input<A>) -> anyhow::Result<&Path> {
        self.inputs
            .get(&input.reference)
            .map(|artifact| artifact.path.as_path())
            .with_context(|| format!("the input `{}` was not handed to the stage", input.reference))
    }

    /// The folder of the output `name`.
    pub fn output(&self, name: &str) -> PathBuf {
        self.out.join(name)
    }

    /// Tells an event.
    pub fn tell(&mut self, event: StageEvent) {
        (self.events)(event);
    }

    /// Tells how far the stage is.
    pub fn progress(&mut self, done: u64, total: u64, unit: &str) {
        self.tell(StageEvent::Progress { done, total, unit: unit.to_owned() });
    }

    /// Tells a note.
    pub fn note(&mut self, text: impl Into<String>) {
        self.tell(StageEvent::Note { text: text.into() });
    }

    /// Whether the stage was asked to save and stop.
    pub fn interrupted(&self) -> bool {
        self.interrupt.load(Ordering::Relaxed)
    }

    /// Ends a stage that has nothing to save when it was asked to stop.
    pub fn stop_if_interrupted(&self) -> Result<(), Interrupted> {
        if self.interrupted() { Err(Interrupted) } else { Ok(()) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stage_alone_means_its_first_output_or_the_only_one_of_the_type() {
        use ArtifactType::{Checkpoint, Files, TrainingState};
        let outputs = [("last", Checkpoint), ("best", Checkpoint), ("state", TrainingState)];
        let outputs = outputs.map(|(name, artifact)| Output::new(name, artifact));
        let found = |named, wants| meant(&outputs, named, wants).map(|output| output.name.as_str());
        assert_eq!(found(None, None), Ok("last"));
        assert_eq!(found(None, Some(Checkpoint)), Ok("last"));
        assert_eq!(found(None, Some(TrainingState)), Ok("state"));
        assert_eq!(found(Some("best"), Some(TrainingState)), Ok("best"), "what is named is meant");
        assert_eq!(found(Some("none"), None), Err(None));
        assert_eq!(found(None, Some(Files)), Err(Some(&outputs[0])));
        let two = [Output::new("a", Files), Output::new("b", Checkpoint), Output::new("c", Checkpoint)];
        assert_eq!(meant(&two, None, Some(Checkpoint)), Err(Some(&two[0])), "one of two is no guess to make");
    }
}
