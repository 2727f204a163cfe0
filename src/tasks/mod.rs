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
mod words;

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::ops::{Range, RangeInclusive};

use serde_json::Value;

pub use spec::{
    FormatSpec, MazePrompt, Retry, SearchOrder, SearchTrace, Signs, TaskSpec, Trace, open, open_with, parts,
};

/// The version of what diagnoses tell; it enters the keys of evaluations alone.
pub const DIAGNOSES_VERSION: u32 = 1;

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

/// An instance as a data set keeps it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Drawn {
    /// The instance as JSON.
    pub data: String,
    /// See [`Task::canonical`].
    pub canonical: Vec<u8>,
    /// How long it is, where instances have a length.
    pub length: Option<u64>,
    /// See [`Task::stratum`].
    pub stratum: Option<String>,
}

impl Drawn {
    /// An instance of a task.
    pub fn new(task: &dyn Task, instance: &Value) -> anyhow::Result<Self> {
        let (canonical, stratum) = (task.canonical(instance)?, task.stratum(instance));
        let length = instance.get("length").and_then(Value::as_u64);
        Ok(Self { data: instance.to_string(), canonical, length, stratum })
    }
}

/// A reply of a demonstration.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Demonstrated {
    /// What is said.
    pub text: String,
    /// The bytes of `text` that are mistakes, in order.
    pub mistakes: Vec<Range<usize>>,
}

/// A task together with the format in which it is written for a model.
pub trait Task: Send + Sync {
    /// The instances number `indices` of the stream `seed`: structured data, stored as they are.
    fn generate(&self, seed: u64, indices: Range<u64>) -> anyhow::Result<Vec<Value>>;
    /// The same as a data set keeps them, without those whose length lies outside of `lengths`; an instance without a length
    /// stays.
    fn draw(&self, seed: u64, indices: Range<u64>, lengths: RangeInclusive<u64>) -> anyhow::Result<Vec<Drawn>> {
        let mut drawn = Vec::new();
        for instance in self.generate(seed, indices)? {
            let length = instance.get("length").and_then(Value::as_u64);
            if length.is_none_or(|length| lengths.contains(&length)) {
                let (canonical, stratum) = (self.canonical(&instance)?, self.stratum(&instance));
                drawn.push(Drawn { data: instance.to_string(), canonical, length, stratum });
            }
        }
        Ok(drawn)
    }
    /// The bytes whose hash decides the split: equal for instances that must not be split apart.
    fn canonical(&self, instance: &Value) -> anyhow::Result<Vec<u8>>;
    /// Begins an episode on each instance; an error when a value is no instance of this task.
    fn begin(&self, starts: &[Start<'_>]) -> anyhow::Result<Box<dyn Episodes>>;
    /// Replies, one a turn, that solve the instance in the format's way; `seed` decides what they draw at random. None at
    /// all where a task has no demonstration of the instance.
    ///
    /// Where the environment draws at random, it does so as in an episode that begins with the same seed.
    fn demonstrate(&self, instance: &Value, seed: u64) -> anyhow::Result<Vec<String>>;
    /// The same with the places at which they err: the spans of bytes of each reply that a learner may read and need not
    /// imitate.
    fn demonstration(&self, instance: &Value, seed: u64) -> anyhow::Result<Vec<Demonstrated>> {
        let replies = self.demonstrate(instance, seed)?;
        Ok(replies.into_iter().map(|text| Demonstrated { text, mistakes: Vec::new() }).collect())
    }
    /// The instance that a prompt of someone else's shows; an error where the task cannot tell.
    fn parse(&self, prompt: &str) -> anyhow::Result<Value> {
        let _ = prompt;
        anyhow::bail!("the task does not read instances from prompts")
    }
    /// Every token that observations and replies are made of, in the order of their ids.
    fn vocabulary(&self) -> Vec<String>;
    /// The tokens of the vocabulary that a tokenizer which reads plain text lacks.
    fn added_tokens(&self) -> Vec<String> {
        self.vocabulary()
    }
    /// The regular expression by which text falls into the tokens of the vocabulary.
    fn pieces(&self) -> String;
    /// What verdicts measure.
    fn measures(&self) -> &[Measure];
    /// What [`Task::diagnose`] tells.
    fn diagnoses(&self) -> &[Measure] {
        &[]
    }
    /// What is further to be said of an episode on the instance with these replies, the last of which ended as `finish`
    /// says: for those who read results. No training depends on it, so it may grow without any being done anew.
    fn diagnose(&self, instance: &Value, replies: &[&str], finish: Finish) -> anyhow::Result<Measurements> {
        let _ = (instance, replies, finish);
        Ok(Measurements::new())
    }
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
