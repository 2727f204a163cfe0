//! Tasks are environments: an instance from a counter, an observation as text, steps with the model's text, a verdict.
//!
//! A task knows no pipeline and no tensor. What a model reads and writes is text; the tokenizer made from
//! [`Task::vocabulary`] turns it into ids without loss. The split of an instance is a range of the hash of its canonical
//! form, so two splits never share a layout whatever their seeds.

pub mod maze;
pub mod number_line;
pub mod probes;
pub mod program;
mod spec;

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::ops::Range;

use serde_json::Value;

pub use spec::{Algorithm, FormatSpec, SearchOrder, SearchTrace, TaskSpec, Trace, open, open_with, parts};

/// Named numbers that a task measures in an episode; rewards, metrics and expressions read them.
pub type Measurements = BTreeMap<String, f64>;

/// A measurement that a task promises, for `expression` rewards to be checked against while planning.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Measure {
    /// Its name in expressions and metrics.
    pub name: Cow<'static, str>,
    /// What it counts and in which unit.
    pub meaning: Cow<'static, str>,
}

impl Measure {
    /// A measurement of a task that is built in.
    pub const fn new(name: &'static str, meaning: &'static str) -> Self {
        Self { name: Cow::Borrowed(name), meaning: Cow::Borrowed(meaning) }
    }
}

/// The stratum of an instance of this `length`: the last of `strata`, each with its least length, that begins at or below it.
fn stratum<'a>(strata: &[(u64, &'a str)], length: u64) -> Option<&'a str> {
    strata.iter().rev().find(|(least, _)| *least <= length).map(|(_, name)| *name)
}

/// Why a reply of the model ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Finish {
    /// The model wrote its end-of-sequence token.
    Stop,
    /// The token limit was reached first.
    Length,
}

/// What came of one step of an episode.
#[derive(Clone, Debug, PartialEq)]
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

/// Where an episode begins.
#[derive(Clone, Copy, Debug)]
pub struct Start<'a> {
    /// The instance, as [`Task::generate`] made it.
    pub instance: &'a Value,
    /// Decides what the environment draws at random in this episode.
    pub seed: u64,
}

/// What the model says in one turn of an episode.
#[derive(Clone, Copy, Debug)]
pub struct Reply<'a> {
    /// The place of the episode among those that were begun together.
    pub episode: usize,
    /// The model's text, without the end of the sequence.
    pub text: &'a str,
    /// Why it ended.
    pub finish: Finish,
}

/// Episodes played side by side: a task that is a program of the user's answers for many at a time.
pub trait Episodes: Send {
    /// The first text that the model reads in each episode.
    fn observe(&mut self) -> anyhow::Result<Vec<String>>;
    /// Takes the replies of some episodes, each under way, and gives what comes of them, in the same order.
    fn step(&mut self, replies: &[Reply<'_>]) -> anyhow::Result<Vec<Turn>>;
    /// Sums every episode up; each verdict has every name of [`Task::measures`].
    fn verdicts(&mut self) -> anyhow::Result<Vec<Measurements>>;
}

/// One episode of a task that is built in.
pub trait Episode: Send {
    /// The first text that the model reads.
    fn observe(&self) -> String;
    /// Takes the model's text of this turn and why it ended.
    fn step(&mut self, reply: &str, finish: Finish) -> Turn;
    /// Sums the episode up; has every name of [`Task::measures`].
    fn verdict(&self) -> Measurements;
}

impl<E: Episode> Episodes for Vec<E> {
    fn observe(&mut self) -> anyhow::Result<Vec<String>> {
        Ok(self.iter().map(Episode::observe).collect())
    }

    fn step(&mut self, replies: &[Reply<'_>]) -> anyhow::Result<Vec<Turn>> {
        Ok(replies.iter().map(|reply| self[reply.episode].step(reply.text, reply.finish)).collect())
    }

    fn verdicts(&mut self) -> anyhow::Result<Vec<Measurements>> {
        Ok(self.iter().map(Episode::verdict).collect())
    }
}

/// A task together with the format in which it is written for a model.
pub trait Task: Send + Sync {
    /// The instances number `indices` of the stream `seed`: structured data, stored as they are.
    fn generate(&self, seed: u64, indices: Range<u64>) -> anyhow::Result<Vec<Value>>;
    /// The bytes whose hash decides the split: equal for instances that must not be split apart.
    fn canonical(&self, instance: &Value) -> anyhow::Result<Vec<u8>>;
    /// Begins an episode on each instance; an error when a value is no instance of this task.
    fn begin(&self, starts: &[Start<'_>]) -> anyhow::Result<Box<dyn Episodes>>;
    /// Replies, one a turn, that solve the instance in the format's way; `seed` decides what they draw at random. None at
    /// all where a task has no demonstration of the instance.
    ///
    /// Where the environment draws at random, it does so as in an episode that begins with the same seed.
    fn demonstrate(&self, instance: &Value, seed: u64) -> anyhow::Result<Vec<String>>;
    /// Every token that observations and replies are made of, in the order of their ids.
    fn vocabulary(&self) -> Vec<String>;
    /// The regular expression by which text falls into the tokens of the vocabulary.
    fn pieces(&self) -> String;
    /// What verdicts measure.
    fn measures(&self) -> &[Measure];
    /// Turns that an episode may have.
    fn max_turns(&self) -> usize;
    /// The class by which results are broken down (`short`, `medium`, `long`), where the task has one.
    fn stratum(&self, instance: &Value) -> Option<String>;
}

/// Plays one episode with given replies, the last of which ended as `finish` says; gives every turn and the verdict.
///
/// Replies behind the end of the episode are left out.
pub fn replay(
    task: &dyn Task,
    start: Start<'_>,
    replies: &[String],
    finish: Finish,
) -> anyhow::Result<(Vec<Turn>, Measurements)> {
    let mut episodes = task.begin(&[start])?;
    let mut turns: Vec<Turn> = Vec::new();
    for (place, text) in replies.iter().enumerate() {
        let finish = if place + 1 == replies.len() { finish } else { Finish::Stop };
        turns.extend(episodes.step(&[Reply { episode: 0, text, finish }])?);
        if turns.last().is_some_and(|turn| turn.terminated || turn.truncated) {
            break;
        }
    }
    Ok((turns, episodes.verdicts()?.remove(0)))
}
