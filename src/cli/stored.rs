//! Stored completions as commands look at them: what was said turn by turn, what it earned, what was learnt from it.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::path::Path;

use serde::Deserialize;

use crate::cli::failure::Failure;
use crate::cli::rescore::stored;
use crate::cli::show::StageObjects;
use crate::pipeline::stage::ArtifactType;
use crate::stages::samples::{Sample, Samples};
use crate::stages::table::{Column, column_names, read};
use crate::tasks::Finish;

/// The measurement that says whether an instance is solved.
pub(super) const SOLVED: &str = "solved";

/// One exchange of an episode.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize, serde::Serialize)]
pub(super) struct Exchange {
    /// What the model read since its last reply; empty in the first.
    pub(super) observation: String,
    /// What it said.
    pub(super) text: String,
}

/// The completions of a stage.
#[derive(Debug, Default)]
pub(super) struct Completions {
    /// As rewards take them.
    pub(super) samples: Samples,
    /// The names of the rewards, in the order of [`Sample::rewards`].
    pub(super) rewards: Vec<String>,
    /// A list a row; one exchange where the episode had one turn.
    pub(super) exchanges: Vec<Vec<Exchange>>,
    /// A list a row, an advantage a turn; empty in an evaluation.
    pub(super) advantages: Vec<Vec<f64>>,
    /// A flag a row: whether its group was learnt from; all of them in an evaluation.
    pub(super) kept: Vec<bool>,
    /// Whether they were sampled to train on.
    pub(super) is_training: bool,
}

impl Completions {
    /// The completions of a result.
    pub(super) fn of(found: &StageObjects<'_>) -> Result<Self, Failure> {
        let samples = stored(found)?;
        let kinds = [ArtifactType::Rollouts, ArtifactType::Evaluation];
        let output = found.manifest.outputs.iter().find(|output| kinds.contains(&output.artifact));
        let folder = output.map(|output| found.store.object(&output.digest)).unwrap_or_default();
        Self::with(samples, &folder).map_err(|error| Failure::stage(error.as_ref()))
    }

    /// The completions in a folder; the instances are known where they are stored beside them.
    pub(super) fn open(folder: &Path) -> Result<Self, Failure> {
        let samples = Samples::open(folder, &BTreeMap::new());
        samples.and_then(|samples| Self::with(samples, folder)).map_err(|error| Failure::stage(error.as_ref()))
    }

    fn with(samples: Samples, folder: &Path) -> anyhow::Result<Self> {
        let (rollouts, examples) = (folder.join("rollouts.parquet"), folder.join("examples.parquet"));
        let path = if rollouts.exists() { rollouts } else { examples };
        let columns = column_names(&path)?;
        let has = |name: &str| columns.iter().any(|column| column == name);
        let is_training = has("advantages");
        let total = columns.iter().position(|column| column == "total").unwrap_or(0);
        let rewards = columns[..total].iter().filter_map(|name| name.strip_prefix("reward_")).map(str::to_owned);
        let mut exchanges: Vec<Vec<Exchange>> = Vec::with_capacity(samples.rows.len());
        let turns = match read(&path, &["turns"])?.remove(0) {
            Column::Text(turns) => turns,
            _ => Vec::new(),
        };
        for (row, sample) in samples.rows.iter().enumerate() {
            exchanges.push(match turns.get(row).and_then(Option::as_deref) {
                Some(turns) => serde_json::from_str(turns)?,
                None => vec![Exchange { observation: String::new(), text: sample.completion.clone() }],
            });
        }
        let advantages =
            match is_training.then(|| read(&path, &["advantages"])).transpose()?.map(|mut one| one.remove(0)) {
                Some(Column::Numbers(lists)) => lists,
                _ => vec![Vec::new(); samples.rows.len()],
            };
        let kept = match has("kept").then(|| read(&path, &["kept"])).transpose()?.map(|mut one| one.remove(0)) {
            Some(Column::Flag(flags)) => flags,
            _ => vec![true; samples.rows.len()],
        };
        Ok(Self { rewards: rewards.collect(), exchanges, advantages, kept, is_training, samples })
    }

    /// The rows.
    pub(super) fn rows(&self) -> &[Sample] {
        &self.samples.rows
    }

    /// The last step of a training; 0 in an evaluation.
    pub(super) fn last_step(&self) -> i64 {
        self.rows().iter().map(|row| row.step).max().unwrap_or(0)
    }

    /// Whether a row is solved; `None` where the task does not say.
    pub(super) fn is_solved(&self, row: usize) -> Option<bool> {
        self.rows()[row].measurements.get(SOLVED).map(|solved| *solved > 0.5)
    }
}

/// The measurements of a task that says by itself how a completion went wrong begin so.
pub(super) const ERROR: &str = "error_";

/// How a completion ended. Where the task measures `error_*`, these are the ways; else it is told in words that hold for any
/// task: the first thing that went wrong with it.
pub(super) fn outcome(sample: &Sample) -> Cow<'static, str> {
    let is =
        |name: &str, wanted: &dyn Fn(f64) -> bool| sample.measurements.get(name).is_some_and(|value| wanted(*value));
    if is(SOLVED, &|solved| solved > 0.5) {
        return "solved".into();
    }
    let own = sample.measurements.iter().filter_map(|(name, value)| Some((name.strip_prefix(ERROR)?, *value)));
    if let Some((name, _)) = own.clone().find(|(_, value)| *value > 0.0) {
        return name.replace('_', " ").into();
    }
    if own.count() > 0 {
        return "other".into();
    }
    let words = match () {
        () if sample.finish == Finish::Length => "cut off",
        () if is("format", &|format| format < 0.5) => "malformed",
        () if is("wall_hits", &|hits| hits > 0.0) => "runs into a wall",
        () if is("progress", &|progress| progress >= 1.0) => "goes past the target",
        () if is("wall_hits", &|_| true) => "ends elsewhere",
        () if is(SOLVED, &|_| true) => "not solved",
        () => "ended",
    };
    words.into()
}

#[cfg(test)]
pub(super) mod tests {
    //! Folders of completions as stages leave them.

    use serde_json::json;

    use super::*;
    use crate::stages::table::{ColumnType, TableWriter};

    /// Two groups of two completions each in step 1, one of them in step 2, over the maze of two rows and three columns.
    pub(in crate::cli) fn rollouts(folder: &Path) -> Completions {
        use ColumnType::{Flag, Integer, Number, Numbers, Text};
        let columns = [
            ("step", Integer),
            ("row", Integer),
            ("instance", Text),
            ("sample", Integer),
            ("prompt", Text),
            ("completion", Text),
            ("turns", Text),
            ("finish", Text),
            ("truncated", Flag),
            ("reward_correct", Number),
            ("reward_progress", Number),
            ("total", Number),
            ("advantages", Numbers),
            ("solved", Number),
            ("steps", Number),
            ("kept", Flag),
        ];
        let mut table = TableWriter::create(&folder.join("rollouts.parquet"), &columns).unwrap();
        let texts = |values: [&str; 6]| Column::text(values.map(str::to_owned));
        let good = "<think><|0-0|><|down|><|1-0|></think><|down|><|right|><|right|><|up|>";
        let bad = "<think></think><|right|><|down|>";
        let numbers = |values: [f64; 6]| Column::Number(values.map(Some).into());
        table
            .write(vec![
                Column::integer([1, 1, 1, 1, 2, 2]),
                Column::integer([0, 0, 1, 1, 0, 0]),
                texts(["rl-0", "rl-0", "rl-1", "rl-1", "rl-0", "rl-0"]),
                Column::integer([0, 1, 0, 1, 0, 1]),
                texts(["maze"; 6]),
                texts([good, bad, bad, bad, good, bad]),
                Column::Text(vec![None; 6]),
                texts(["stop"; 6]),
                Column::Flag(vec![false; 6]),
                numbers([1.0, 0.0, 0.0, 0.0, 1.0, 0.0]),
                numbers([1.0, 0.25, 0.25, 0.25, 1.0, 0.75]),
                numbers([2.0, 0.25, 0.25, 0.25, 2.0, 0.75]),
                Column::Numbers(vec![vec![1.0], vec![-1.0], vec![0.0], vec![0.0], vec![1.0], vec![-1.0]]),
                numbers([1.0, 0.0, 0.0, 0.0, 1.0, 0.0]),
                numbers([4.0, 2.0, 2.0, 2.0, 4.0, 2.0]),
                Column::Flag(vec![true, true, false, false, true, true]),
            ])
            .unwrap();
        table.finish().unwrap();
        let maze =
            json!({"rows": 2, "columns": 3, "walls": [13, 13, 13, 6, 2, 10], "origin": 0, "target": 2, "length": 4});
        let instances = BTreeMap::from([("rl-0".to_owned(), maze.clone()), ("rl-1".to_owned(), maze)]);
        Completions::with(Samples::open(folder, &instances).unwrap(), folder).unwrap()
    }

    #[test]
    fn a_completion_ended_as_its_task_says_or_in_words_for_any_task() {
        let folder = tempfile::tempdir().unwrap();
        let mut sample = rollouts(folder.path()).rows()[1].clone();
        assert_eq!(outcome(&sample), "not solved");
        sample.measurements.insert("wall_hits".to_owned(), 1.0);
        assert_eq!(outcome(&sample), "runs into a wall");
        sample.measurements.extend([("error_wall".to_owned(), 0.0), ("error_no_answer".to_owned(), 1.0)]);
        assert_eq!(outcome(&sample), "no answer");
        sample.measurements.insert(SOLVED.to_owned(), 1.0);
        assert_eq!(outcome(&sample), "solved");
    }

    #[test]
    fn what_was_said_earned_and_learnt_comes_row_by_row() {
        let folder = tempfile::tempdir().unwrap();
        let completions = rollouts(folder.path());
        assert_eq!(completions.rewards, ["correct", "progress"]);
        assert_eq!(completions.advantages[1], [-1.0]);
        assert_eq!(completions.kept, [true, true, false, false, true, true]);
        assert_eq!(
            (completions.last_step(), completions.is_solved(0), completions.is_solved(1)),
            (2, Some(true), Some(false))
        );
        assert!(completions.is_training && completions.exchanges[1][0].text.ends_with("<|right|><|down|>"));
    }
}
