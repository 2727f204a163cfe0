//! Stored completions read back: `rollouts.parquet` of a training, `examples.parquet` of an evaluation.

use std::collections::BTreeMap;
use std::ops::Range;
use std::path::Path;

use anyhow::{Context as _, bail, ensure};
use serde::Deserialize;
use serde_json::Value;

use crate::rewards::{COMPLETION_LENGTH, ScoreInput};
use crate::stages::table::{Column, column_names, read};
use crate::tasks::{Finish, Measurements};

/// The completions that a stage has stored.
#[derive(Debug, Default)]
pub struct Samples {
    /// In the order of the file.
    pub rows: Vec<Sample>,
    /// The names of the measurements.
    pub measures: Vec<String>,
    /// The rows of each prompt that was drawn, in order.
    pub groups: Vec<Vec<usize>>,
}

/// One stored completion.
#[derive(Clone, Debug)]
pub struct Sample {
    /// The step of the training; 0 in an evaluation.
    pub step: i64,
    /// Its number among the completions of its prompt.
    pub sample: i64,
    /// The instance's id.
    pub instance: String,
    /// The structured instance; null where it is not known.
    pub data: Value,
    /// What the model read first.
    pub prompt: String,
    /// What was said behind it.
    pub completion: String,
    /// Why the last reply ended.
    pub finish: Finish,
    /// Whether the episode was cut off.
    pub truncated: bool,
    /// The verdict; of an evaluation also what the task diagnoses beside it.
    pub measurements: Measurements,
    /// Each turn's measurements; the verdict's where the episode had one turn.
    pub turns: Vec<Measurements>,
    /// The tokens of each reply, its end included; empty where they are not known.
    pub lengths: Vec<u64>,
    /// Everything behind the first prompt as token ids; empty where none are stored.
    pub ids: Vec<i32>,
    /// Where in `ids` the replies stand, their ends included.
    pub replies: Vec<Range<usize>>,
    /// Whether the training learnt from its group; true in an evaluation.
    pub kept: bool,
    /// The rewards that were stored, in the order of their columns.
    pub rewards: Vec<Option<f64>>,
    /// The total that was stored.
    pub total: Option<f64>,
}

impl Sample {
    /// The sample as rewards take it.
    pub fn input(&self) -> ScoreInput<'_> {
        ScoreInput {
            instance: &self.data,
            prompt: &self.prompt,
            completion: &self.completion,
            finish: self.finish,
            measurements: &self.measurements,
            turns: &self.turns,
            lengths: &self.lengths,
        }
    }
}

#[derive(Deserialize)]
struct StoredTurn {
    begin: usize,
    end: usize,
    measurements: Measurements,
}

impl Samples {
    /// Reads the completions in the folder of an output; `instances` are structured instances by id.
    pub fn open(folder: &Path, instances: &BTreeMap<String, Value>) -> anyhow::Result<Self> {
        let (rollouts, examples) = (folder.join("rollouts.parquet"), folder.join("examples.parquet"));
        let path = if rollouts.exists() { rollouts } else { examples };
        Self::read(&path, instances).with_context(|| format!("reading the completions in `{}`", folder.display()))
    }

    fn read(path: &Path, instances: &BTreeMap<String, Value>) -> anyhow::Result<Self> {
        let columns = column_names(path)?;
        let place = |name: &str| columns.iter().position(|column| column == name);
        let is_training = place("advantages").is_some();
        // Measurements stand behind everything else, but for the flag `kept`.
        let last = place("advantages").or(place("truncated")).context("there are no measurements")?;
        let measures: Vec<String> = columns[last + 1..].iter().filter(|name| *name != "kept").cloned().collect();
        let total = place("total").unwrap_or(0);
        let rewards: Vec<&str> =
            columns[..total].iter().map(String::as_str).filter(|name| name.starts_with("reward_")).collect();
        let mut text = Text::read(path, &["instance", "prompt", "completion", "turns", "finish"])?;
        let mut data = if place("data").is_some() { Text::read(path, &["data"])? } else { Text::default() };
        let integers = |name: &str| match read(path, &[name])?.remove(0) {
            Column::Integer(values) => Ok(values.into_iter().map(Option::unwrap_or_default).collect::<Vec<i64>>()),
            _ => bail!("the column `{name}` holds no integers"),
        };
        let count = text.0[0].len();
        let step = if is_training { integers("step")? } else { vec![0; count] };
        let sample = if place("sample").is_some() { integers("sample")? } else { vec![0; count] };
        let mut ids = if place("ids").is_some() { lists(path, "ids")? } else { vec![Vec::new(); count] };
        let truncated = flags(path, "truncated")?;
        let kept = if is_training { flags(path, "kept")? } else { vec![true; count] };
        let measured = numbers(path, &measures.iter().map(String::as_str).collect::<Vec<_>>())?;
        let rewarded = numbers(path, &rewards)?;
        // An evaluation tells the length of a reply without its ids; a task's own measurement of the name stands behind `last`.
        let lengths =
            place(COMPLETION_LENGTH).filter(|place| *place < last).map(|_| numbers(path, &[COMPLETION_LENGTH]));
        let lengths = lengths.transpose()?.map_or_else(|| vec![None; count], |mut columns| columns.remove(0));
        let totals = if is_training { numbers(path, &["total"])?.remove(0) } else { vec![None; count] };
        let mut samples = Self { measures, ..Self::default() };
        for row in 0..count {
            let mut measurements = Measurements::new();
            for (name, values) in samples.measures.iter().zip(&measured) {
                measurements.insert(name.clone(), values[row].with_context(|| format!("row {row} has no `{name}`"))?);
            }
            let ids = std::mem::take(&mut ids[row]);
            let (replies, turns): (Vec<Range<usize>>, Vec<Measurements>) = match text.0[3][row].take() {
                Some(turns) => serde_json::from_str::<Vec<StoredTurn>>(&turns)
                    .with_context(|| format!("the turns of row {row}"))?
                    .into_iter()
                    .map(|turn| (turn.begin..turn.end, turn.measurements))
                    .unzip(),
                None if ids.is_empty() => (Vec::new(), vec![measurements.clone()]),
                None => (vec![Range { start: 0, end: ids.len() }], vec![measurements.clone()]),
            };
            let instance = text.0[0][row].take().with_context(|| format!("row {row} has no instance"))?;
            let stored = data.0.first_mut().and_then(|data| data[row].take());
            let stored = stored.map(|stored| serde_json::from_str(&stored)).transpose()?;
            let finish = match text.0[4][row].as_deref() {
                Some("stop") => Finish::Stop,
                Some("length") => Finish::Length,
                other => bail!("row {row} finished by {other:?}"),
            };
            if row == 0 || sample[row] == 0 || sample[row] <= sample[row - 1] {
                samples.groups.push(Vec::new());
            }
            if let Some(group) = samples.groups.last_mut() {
                group.push(row);
            }
            samples.rows.push(Sample {
                step: step[row],
                sample: sample[row],
                data: stored.or_else(|| instances.get(&instance).cloned()).unwrap_or(Value::Null),
                instance,
                prompt: text.0[1][row].take().unwrap_or_default(),
                completion: text.0[2][row].take().unwrap_or_default(),
                finish,
                truncated: truncated[row],
                measurements,
                turns,
                lengths: match lengths[row] {
                    Some(length) if replies.is_empty() => vec![length as u64],
                    _ => replies.iter().map(|reply| reply.len() as u64).collect(),
                },
                ids,
                replies,
                kept: kept[row],
                rewards: rewarded.iter().map(|values| values[row]).collect(),
                total: totals[row],
            });
        }
        ensure!(!samples.rows.is_empty(), "there are no completions");
        Ok(samples)
    }
}

/// Columns of text.
#[derive(Default)]
struct Text(Vec<Vec<Option<String>>>);

impl Text {
    fn read(path: &Path, names: &[&str]) -> anyhow::Result<Self> {
        let columns = read(path, names)?.into_iter().zip(names).map(|(column, name)| match column {
            Column::Text(values) => Ok(values),
            _ => bail!("the column `{name}` holds no text"),
        });
        Ok(Self(columns.collect::<anyhow::Result<_>>()?))
    }
}

fn lists(path: &Path, name: &str) -> anyhow::Result<Vec<Vec<i32>>> {
    let Column::Integers(lists) = read(path, &[name])?.remove(0) else {
        bail!("the column `{name}` holds no lists of integers")
    };
    Ok(lists)
}

fn flags(path: &Path, name: &str) -> anyhow::Result<Vec<bool>> {
    let Column::Flag(flags) = read(path, &[name])?.remove(0) else { bail!("the column `{name}` holds no flags") };
    Ok(flags)
}

fn numbers(path: &Path, names: &[&str]) -> anyhow::Result<Vec<Vec<Option<f64>>>> {
    if names.is_empty() {
        return Ok(Vec::new());
    }
    let columns = read(path, names)?.into_iter().zip(names).map(|(column, name)| match column {
        Column::Number(values) => Ok(values),
        _ => bail!("the column `{name}` holds no numbers"),
    });
    columns.collect()
}
