//! What a row says, as text: a prompt and the turns that answer it; and where it stands in a data set.
//!
//! A task's instance becomes the prompt, the demonstration's replies and what the environment says between them. With a
//! chat template, what the environment says is a user's message. It knows no token ids.

use std::ops::Range;
use std::path::Path;

use anyhow::{Context as _, bail, ensure};
use rand::Rng as _;
use serde_json::Value;

use super::files;
use crate::random;
use crate::stages::chat::{ChatTemplate, Conversation, Message, Turn};
use crate::stages::dataset::MESSAGES_COLUMN;
use crate::stages::table::{self, Column};
use crate::tasks::{Finish, Reply, Start, Task};

/// A split of the data set, as columns of equal length.
pub(super) struct Split {
    pub(super) name: String,
    pub(super) instances: Vec<String>,
    pub(super) contents: Contents,
}

pub(super) enum Contents {
    /// Task instances as JSON.
    Task(Vec<String>),
    /// Prompts and completions.
    Texts(Vec<String>, Vec<String>),
    /// Conversations as JSON.
    Messages(Vec<String>),
}

/// What a row says.
pub(super) struct Script {
    /// The text that the model reads first, and its turns.
    pub(super) conversation: Conversation,
    /// The class by which results are broken down, where the task has one.
    pub(super) stratum: Option<String>,
    /// Written by a chat template, which frames its text itself.
    pub(super) chat: bool,
    /// The bytes of each reply that are mistakes; none of a user's own texts.
    pub(super) mistakes: Vec<Vec<Range<usize>>>,
}

/// What the text of a row is made with.
pub(super) struct Writer<'a> {
    pub(super) task: Option<&'a dyn Task>,
    pub(super) template: Option<&'a ChatTemplate>,
    pub(super) seed: u64,
}

impl Writer<'_> {
    /// What the row `row` of `split` says.
    pub(super) fn write(&self, split: &Split, row: usize) -> anyhow::Result<Script> {
        match (&split.contents, self.task) {
            (Contents::Task(data), Some(task)) => self.demonstration(task, &data[row], &split.instances[row]),
            (Contents::Task(_), None) => bail!("the data set has instances and names no task"),
            (Contents::Texts(prompts, completions), _) => {
                let turns = vec![Turn { reply: completions[row].clone(), observation: String::new() }];
                let conversation = Conversation { prompt: prompts[row].clone(), turns };
                Ok(Script { conversation, stratum: None, chat: false, mistakes: Vec::new() })
            }
            (Contents::Messages(rows), _) => {
                let messages: Vec<Message> = serde_json::from_str(&rows[row]).context("reading the messages")?;
                let template = self.template.context(
                    "messages need a chat template, and the tokenizer has none; add a `chat_template.jinja` to it or \
                     give the data set prompts and completions",
                )?;
                let conversation = template.conversation(&messages)?;
                Ok(Script { conversation, stratum: None, chat: true, mistakes: Vec::new() })
            }
        }
    }

    /// A task's demonstration on the instance `data` with the id `instance`.
    fn demonstration(&self, task: &dyn Task, data: &str, instance: &str) -> anyhow::Result<Script> {
        let value: Value = serde_json::from_str(data).context("reading the instance")?;
        // Keyed by the instance's id, so that an instance that stands twice may be shown in two ways.
        let id = blake3::hash(instance.as_bytes());
        let id = u64::from_le_bytes(*id.as_bytes().first_chunk().expect("a digest has 32 bytes"));
        let seed = random::rng("tokenize.trace", &[self.seed, id]).next_u64();
        let start = Start { instance: &value, seed };
        let mut episode = task.begin(&[start])?;
        let shown = episode.observe()?.remove(0);
        let demonstrated = task.demonstration(&value, seed)?.into_iter();
        let (replies, mistakes): (Vec<String>, Vec<_>) = demonstrated.map(|reply| (reply.text, reply.mistakes)).unzip();
        let mut observations = vec![String::new(); replies.len()];
        if replies.len() > 1 {
            let (mut played, mut ended) = (0, false);
            for (text, observation) in replies.iter().zip(&mut observations) {
                let turn = episode.step(&[Reply { episode: 0, text, finish: Finish::Stop }])?.remove(0);
                played += 1;
                ended = turn.terminated || turn.truncated;
                if ended {
                    break;
                }
                *observation = turn.observation;
            }
            ensure!(
                played == replies.len() && ended,
                "the demonstration has {} replies, but the episode {} after {played} turns",
                replies.len(),
                if ended { "ends" } else { "goes on" },
            );
        }
        // The verdict is what tells a program of the user's that it may forget the episode.
        episode.verdicts()?;
        let last = replies.len().saturating_sub(1);
        let mut prompt = shown;
        if let Some(template) = self.template {
            prompt = template.first(&prompt)?;
            for observation in &mut observations[..last] {
                *observation = template.next(observation)?;
            }
        }
        let turns = replies.into_iter().zip(observations).map(|(reply, observation)| Turn { reply, observation });
        let conversation = Conversation { prompt, turns: turns.collect() };
        Ok(Script { conversation, stratum: task.stratum(&value), chat: self.template.is_some(), mistakes })
    }
}

/// Every `<split>.parquet` of a data set, in the order of names.
pub(super) fn read_splits(dataset: &Path, has_task: bool) -> anyhow::Result<Vec<Split>> {
    let mut splits = Vec::new();
    for path in files(dataset)? {
        if path.extension().is_none_or(|extension| extension != "parquet") {
            continue;
        }
        let name = path.file_stem().and_then(|stem| stem.to_str());
        let name = name.with_context(|| format!("`{}` has no readable name", path.display()))?.to_owned();
        let has_messages = !has_task && table::column_names(&path)?.iter().any(|name| name == MESSAGES_COLUMN);
        let names: &[&str] = match (has_task, has_messages) {
            (true, _) => &["instance", "data"],
            (false, true) => &["instance", MESSAGES_COLUMN],
            (false, false) => &["instance", "prompt", "completion"],
        };
        let mut columns = Vec::new();
        for (column, name) in table::read(&path, names)?.into_iter().zip(names) {
            let place = || format!("column `{name}` of `{}` has a value that is no text", path.display());
            let Column::Text(values) = column else { bail!(place()) };
            columns.push(values.into_iter().collect::<Option<Vec<String>>>().with_context(place)?);
        }
        let mut columns = columns.into_iter();
        let mut next = || columns.next().expect("as many columns are read as are named");
        let instances = next();
        let contents = match (has_task, has_messages) {
            (true, _) => Contents::Task(next()),
            (false, true) => Contents::Messages(next()),
            (false, false) => Contents::Texts(next(), next()),
        };
        splits.push(Split { name, instances, contents });
    }
    ensure!(!splits.is_empty(), "`{}` has no Parquet file", dataset.display());
    Ok(splits)
}
