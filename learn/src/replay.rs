//! Stored rollouts read back, so that a training half can run again without sampling: other rewards, other losses, the
//! same completions.
//!
//! Completions are taken as they were sampled, ids and log-probabilities to the last bit; rewards and advantages are
//! computed anew. It knows the columns of `rollouts.parquet` and nothing of losses.

use std::path::Path;

use anyhow::{Context as _, bail, ensure};
use pipe::stages::table::{self, Column};
use pipe::tasks::Finish;

use crate::prompts::Prompts;
use crate::trajectory::{Trajectory, TurnRecord};

/// The stored completions of one prompt.
#[derive(Clone, Debug, PartialEq)]
pub struct StoredGroup {
    /// The row of the prompt among the tokens.
    pub row: usize,
    /// The round in which it was generated.
    pub round: u64,
    /// The episodes, in the order of their samples.
    pub trajectories: Vec<Trajectory>,
}

/// Stored rollouts by step.
#[derive(Debug)]
pub struct StoredRollouts {
    steps: Vec<Vec<StoredGroup>>,
}

impl StoredRollouts {
    /// Reads the file at `path` of rollouts on `prompts`; an error where it is of other tokens.
    pub fn open(path: &Path, prompts: &Prompts) -> anyhow::Result<Self> {
        let reading = || format!("replaying `{}`", path.display());
        let columns =
            ["step", "round", "row", "instance", "sample", "completion", "turns", "ids", "logprobs", "finish"];
        let mut columns = table::read(path, &columns)?.into_iter();
        let mut next = || columns.next().context("a column is missing");
        let (step, round, row) = (integers(next()?)?, integers(next()?)?, integers(next()?)?);
        let (instance, sample, completion) = (texts(next()?)?, integers(next()?)?, texts(next()?)?);
        let (Column::Text(turns), Column::Integers(ids)) = (next()?, next()?) else { bail!(reading()) };
        let (Column::Numbers(logprobs), finish) = (next()?, texts(next()?)?) else { bail!(reading()) };
        let Column::Flag(truncated) = table::read(path, &["truncated"])?.remove(0) else { bail!(reading()) };
        let names: Vec<&str> = prompts.measures().iter().map(String::as_str).collect();
        let measurements: Vec<Vec<f64>> =
            table::read(path, &names)?.into_iter().map(numbers).collect::<anyhow::Result<_>>().with_context(reading)?;
        let mut steps: Vec<Vec<StoredGroup>> = Vec::new();
        for at in 0..step.len() {
            let row = row[at] as usize;
            let there = prompts.tokens.rows.get(row).map(|row| &*row.instance);
            ensure!(
                there == Some(instance[at].as_str()),
                "the rollouts `{}` are of other prompts: their row {row} is `{}`, that of the tokens is `{}`",
                path.display(),
                instance[at],
                there.unwrap_or("beyond the last")
            );
            let trajectory = Trajectory {
                ids: ids[at].iter().map(|id| i64::from(*id)).collect(),
                logprobs: logprobs[at].iter().map(|value| *value as f32).collect(),
                kept: None,
                turns: Vec::new(),
                truncated: truncated[at],
                measurements: measurements.iter().map(|values| values[at]).collect(),
            };
            let turns = match &turns[at] {
                Some(turns) => serde_json::from_str(turns).with_context(reading)?,
                None => vec![TurnRecord {
                    observation: String::new(),
                    begin: 0,
                    end: trajectory.ids.len(),
                    text: completion[at].clone(),
                    finish: if finish[at] == "stop" { Finish::Stop } else { Finish::Length },
                    measurements: prompts.named(&trajectory.measurements),
                }],
            };
            let trajectory = Trajectory { turns, ..trajectory };
            while steps.len() <= step[at] as usize {
                steps.push(Vec::new());
            }
            let groups = &mut steps[step[at] as usize];
            if sample[at] == 0 {
                groups.push(StoredGroup { row, round: round[at] as u64, trajectories: Vec::new() });
            }
            let group = groups.last_mut().filter(|group| group.row == row).with_context(reading)?;
            group.trajectories.push(trajectory);
        }
        Ok(Self { steps })
    }

    /// Steps that are stored.
    pub fn steps(&self) -> u64 {
        self.steps.len() as u64
    }

    /// The first step that is stored; a stage that goes on from another's end stores its own alone.
    pub fn first(&self) -> u64 {
        self.steps.iter().position(|groups| !groups.is_empty()).unwrap_or(0) as u64
    }

    /// The groups of a step, in the order in which they were drawn.
    pub fn groups(&self, step: u64) -> &[StoredGroup] {
        self.steps.get(step as usize).map_or(&[], Vec::as_slice)
    }
}

fn integers(column: Column) -> anyhow::Result<Vec<i64>> {
    let Column::Integer(values) = column else { bail!("a column of integers holds something else") };
    values.into_iter().collect::<Option<_>>().context("a column of integers has nulls")
}

fn texts(column: Column) -> anyhow::Result<Vec<String>> {
    let Column::Text(values) = column else { bail!("a column of text holds something else") };
    values.into_iter().collect::<Option<_>>().context("a column of text has nulls")
}

fn numbers(column: Column) -> anyhow::Result<Vec<f64>> {
    let Column::Number(values) = column else { bail!("a column of numbers holds something else") };
    values.into_iter().collect::<Option<_>>().context("a column of numbers has nulls")
}
