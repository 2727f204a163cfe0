//! Rollouts as a table: a row each completion, with everything that was measured, earned and learnt of it.
//!
//! Equal rollouts give equal bytes, and a reader gets completions back to the last bit of a log-probability.

use std::collections::BTreeMap;
use std::path::Path;

use pipe::rewards::Outcome;
use pipe::stages::table::{Column, ColumnType, TableWriter};
use pipe::tasks::Finish;

use super::{Chunk, Rollouts, Sample, ScoredGroup, set_advantages};
use crate::prompts::Prompts;
use crate::trajectory::Trajectory;

/// The file of the output `rollouts`.
pub const ROLLOUTS_FILE: &str = "rollouts.parquet";

impl Rollouts<'_> {
    /// Writes every completion of the run to `path`; equal rollouts give equal bytes.
    pub fn publish(&self, path: &Path) -> anyhow::Result<()> {
        use ColumnType::{Flag, Integer, Integers, Number, Numbers, Text};
        let rewards: Vec<String> = self.params.rewards.keys().map(|name| format!("reward_{name}")).collect();
        let mut columns = vec![("step", Integer), ("round", Integer), ("row", Integer), ("instance", Text)];
        columns.extend([("sample", Integer), ("prompt", Text), ("completion", Text), ("turns", Text)]);
        columns.extend([("ids", Integers), ("logprobs", Numbers), ("finish", Text), ("truncated", Flag)]);
        columns.extend(rewards.iter().map(|name| (name.as_str(), Number)));
        columns.extend([("total", Number), ("reward_errors", Text), ("penalties", Numbers), ("advantages", Numbers)]);
        columns.extend(self.prompts.measures().iter().map(|name| (name.as_str(), Number)));
        columns.push(("kept", Flag));
        distinct(&columns)?;
        let mut table = TableWriter::create(path, &columns)?;
        let (mut step, mut groups) = (0, Vec::new());
        self.journal.each(|chunk: Chunk| {
            if chunk.at.step != step {
                self.write(&mut table, step, &mut groups)?;
                step = chunk.at.step;
            }
            groups.extend(chunk.groups);
            Ok(())
        })?;
        self.write(&mut table, step, &mut groups)?;
        table.finish()
    }

    /// Writes the groups of a whole step, and empties the list.
    fn write(&self, table: &mut TableWriter, step: u64, groups: &mut Vec<ScoredGroup>) -> anyhow::Result<()> {
        set_advantages(&self.params.axes.advantage, self.rewards.weights(), groups)?;
        let rows: Vec<(&ScoredGroup, usize, &Sample)> = groups
            .iter()
            .flat_map(|group| group.samples.iter().enumerate().map(move |(index, sample)| (group, index, sample)))
            .collect();
        if rows.is_empty() {
            return Ok(());
        }
        let number = |value: &dyn Fn(&Sample) -> Option<f64>| {
            Column::Number(rows.iter().map(|(_, _, sample)| value(sample)).collect())
        };
        let about = |group: &ScoredGroup| &self.prompts.tokens.rows[group.row];
        let prompts = rows.iter().map(|(group, _, _)| Ok(Some(self.prompts.tokens.prompt(group.row)?.to_owned())));
        let prompts = prompts.collect::<anyhow::Result<_>>()?;
        let played = || rows.iter().map(|(_, _, sample)| &sample.trajectory);
        let mut columns = vec![
            Column::integer(rows.iter().map(|_| step as i64)),
            Column::integer(rows.iter().map(|(group, _, _)| group.round as i64)),
            Column::integer(rows.iter().map(|(group, _, _)| group.row as i64)),
            Column::text(rows.iter().map(|(group, _, _)| about(group).instance.to_string())),
            Column::integer(rows.iter().map(|(_, index, _)| *index as i64)),
            Column::Text(prompts),
            Column::text(played().map(Trajectory::text)),
            turns_column(self.prompts, played()),
            Column::Integers(played().map(|one| one.ids.iter().map(|id| *id as i32).collect()).collect()),
            Column::Numbers(played().map(|one| one.logprobs.iter().map(|value| f64::from(*value)).collect()).collect()),
            Column::text(played().map(|one| finish_name(one.finish()).to_owned())),
            Column::Flag(played().map(|one| one.truncated).collect()),
        ];
        let names = self.rewards.names();
        columns.extend((0..names.len()).map(|reward| number(&|sample| sample.rewards[reward].value())));
        columns.push(number(&|sample| sample.total));
        columns.push(Column::Text(rows.iter().map(|(_, _, sample)| errors(names, &sample.rewards)).collect()));
        columns.push(Column::Numbers(rows.iter().map(|(_, _, sample)| sample.penalties.clone()).collect()));
        columns.push(Column::Numbers(rows.iter().map(|(_, _, sample)| sample.advantages.clone()).collect()));
        columns.extend(
            (0..self.prompts.measures().len()).map(|at| number(&|sample| Some(sample.trajectory.measurements[at]))),
        );
        columns.push(Column::Flag(rows.iter().map(|(group, _, _)| group.kept).collect()));
        table.write(columns)?;
        groups.clear();
        Ok(())
    }
}

/// The errors of a sample's rewards as `NAME: why`; null where there is none.
fn errors(names: &[String], outcomes: &[Outcome]) -> Option<String> {
    let named = names.iter().zip(outcomes);
    let errors: Vec<String> =
        named.filter_map(|(name, outcome)| Some(format!("{name}: {}", outcome.error()?))).collect();
    (!errors.is_empty()).then(|| errors.join("; "))
}

/// The turns of trajectories as JSON; null where an episode has one turn, of which the other columns say all.
pub fn turns_column<'a>(prompts: &Prompts, played: impl Iterator<Item = &'a Trajectory>) -> Column {
    let turns = |one: &Trajectory| {
        let alone = one.turns.len() == 1 && one.turns[0].measurements == prompts.named(&one.measurements);
        (!alone).then(|| serde_json::to_string(&one.turns).expect("turns are plain data"))
    };
    Column::Text(played.map(turns).collect())
}

/// The word for a finish reason in tables.
pub fn finish_name(finish: Finish) -> &'static str {
    match finish {
        Finish::Stop => "stop",
        Finish::Length => "length",
    }
}

/// Refuses a table with two columns of one name, as a measurement called `prompt` would make.
pub fn distinct(columns: &[(&str, ColumnType)]) -> anyhow::Result<()> {
    let mut counts: BTreeMap<&str, usize> = BTreeMap::new();
    for (name, _) in columns {
        *counts.entry(name).or_default() += 1;
    }
    let twice = counts.iter().find(|(_, count)| **count > 1);
    anyhow::ensure!(
        twice.is_none(),
        "two columns are called `{}`: rename the measurement",
        twice.map_or("", |(name, _)| name)
    );
    Ok(())
}
