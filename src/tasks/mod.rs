//! Tasks are environments: an instance from a counter, an observation as text, steps with the model's text, a verdict.
//!
//! A task knows no pipeline and no tensor. What a model reads and writes is text; the tokenizer made from
//! [`Task::vocabulary`] turns it into ids without loss. The split of an instance is a range of the hash of its canonical
//! form, so two splits never share a layout whatever their seeds.

pub mod maze;
mod spec;

use std::collections::BTreeMap;

use serde_json::Value;

pub use spec::{Algorithm, FormatSpec, SearchOrder, SearchTrace, TaskSpec, Trace, open, parts};

/// Named numbers that a task measures in an episode; rewards, metrics and expressions read them.
pub type Measurements = BTreeMap<String, f64>;

/// A measurement that a task promises, for `expression` rewards to be checked against while planning.
#[derive(Clone, Copy, Debug)]
pub struct Measure {
    /// Its name in expressions and metrics.
    pub name: &'static str,
    /// What it counts and in which unit.
    pub meaning: &'static str,
}

/// Why a completion ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Finish {
    /// The model wrote its end-of-sequence token.
    Stop,
    /// The token limit was reached first.
    Length,
}

/// What came of one step of an episode.
#[derive(Clone, Debug)]
pub struct Turn {
    /// This turn's measurements.
    pub measurements: Measurements,
    /// The episode reached an end of its own.
    pub terminated: bool,
    /// The episode was cut off (turn or token limit) before its end.
    pub truncated: bool,
    /// What the model reads next; empty after the last turn.
    pub observation: String,
}

/// One episode under way.
pub trait Episode: Send {
    /// The text that the model reads now.
    fn observe(&self) -> String;
    /// Takes the model's text of this turn and why it ended.
    fn step(&mut self, reply: &str, finish: Finish) -> Turn;
    /// Sums the episode up; has every name of [`Task::measures`].
    fn verdict(&self) -> Measurements;
}

/// A task together with the format in which it is written for a model.
pub trait Task: Send + Sync {
    /// The instance number `index` of the stream `seed`: structured data, stored as it is.
    fn generate(&self, seed: u64, index: u64) -> Value;
    /// The bytes whose hash decides the split: equal for instances that must not be split apart.
    fn canonical(&self, instance: &Value) -> anyhow::Result<Vec<u8>>;
    /// Begins an episode on an instance; an error when the value is no instance of this task.
    fn reset(&self, instance: &Value) -> anyhow::Result<Box<dyn Episode>>;
    /// A completion that solves the instance in the format's trace; `seed` decides what the format draws at random.
    fn demonstrate(&self, instance: &Value, seed: u64) -> anyhow::Result<String>;
    /// Every token that observations and completions are made of, in the order of their ids.
    fn vocabulary(&self) -> Vec<String>;
    /// What verdicts measure.
    fn measures(&self) -> &'static [Measure];
    /// The class by which results are broken down (`short`, `medium`, `long`), where the task has one.
    fn stratum(&self, instance: &Value) -> Option<&'static str>;
}
