//! `synthesize`: a data set drawn from a task, its splits apart by the hash of every instance's canonical form.
//!
//! One stream of candidates (the task's instances 0, 1, 2, ... under the stage's seed) fills all splits: the hash of a
//! candidate's canonical form says which split it belongs to, whatever that split still needs. So no layout stands in
//! two splits, and the result does not depend on threads. Each split owns a share of the hash space proportional to the
//! root of the rows asked for: small splits still see many layouts, large ones need not wait. The shares follow from
//! `splits` alone, so two data sets keep their splits apart from each other only when their `splits` are equal.

use std::collections::{BTreeMap, HashSet};
use std::fs;
use std::ops::Range;
use std::path::Path;

use anyhow::{Context as _, bail};
use rayon::prelude::*;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use crate::pipeline::stage::{ArtifactType, Output, Part, Problem, Stage, StageContext, Upstream};
use crate::random;
use crate::stages::interrupted;
use crate::stages::table::{Column, ColumnType, TableWriter};
use crate::tasks::{Task, TaskSpec, open, open_with};

/// The columns of a data set that comes from a task.
const COLUMNS: &[(&str, ColumnType)] = &[
    ("instance", ColumnType::Text),
    ("split", ColumnType::Text),
    ("layout", ColumnType::Text),
    ("stratum", ColumnType::Text),
    ("length", ColumnType::Integer),
    ("data", ColumnType::Text),
];
/// Candidates drawn at a time.
const CHUNK: u64 = 1 << 14;
/// Candidates that a thread draws at a time.
const BLOCK: u64 = 1 << 8;
/// Candidates between two looks at whether the request can be met: as many for every row that is asked for, ...
const WINDOW_PER_ROW: u64 = 64;
/// ... but no more than this.
const LARGEST_WINDOW: u64 = 1 << 20;
/// A window must bring a row, and one of so many rows that are still missing.
const LEAST_SHARE: u64 = 256;

/// How path lengths are spread.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Lengths {
    /// As the task draws them.
    #[default]
    Natural,
    /// Every length from `min_length` to `max_length` equally often in every split.
    Balanced,
}

/// Draw a data set of task instances, with splits that share no layout.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Synthesize {
    /// What the instances are of.
    pub task: TaskSpec,
    /// Rows by split, such as `{ train = 50_000, rl = 10_000, validation = 1_000, test = 2_000 }`.
    pub splits: BTreeMap<String, u64>,
    /// Decides every instance.
    #[serde(default)]
    pub seed: u64,
    /// How path lengths are spread.
    #[serde(default)]
    pub lengths: Lengths,
    /// Moves of the shortest path, at least.
    #[serde(default)]
    #[schemars(range(min = 1))]
    pub min_length: Option<u64>,
    /// Moves of the shortest path, at most.
    #[serde(default)]
    #[schemars(range(min = 1))]
    pub max_length: Option<u64>,
    /// Whether no instance (layout and endpoints) stands in the data set twice.
    #[serde(default = "Synthesize::default_unique")]
    pub unique: bool,
}

impl Synthesize {
    fn default_unique() -> bool {
        true
    }

    /// The longest that the `length` of an instance can be.
    fn longest(&self) -> u64 {
        self.task.longest().unwrap_or(u64::MAX)
    }
}

impl Stage for Synthesize {
    const KIND: &'static str = "synthesize";
    const VERSION: u32 = 1;

    fn outputs(&self) -> Vec<Output> {
        vec![Output::new("dataset", ArtifactType::Dataset)]
    }

    fn parts(&self) -> Vec<Part> {
        let (name, version) = self.task.part();
        vec![Part::new(name, version)]
    }

    fn check(&self, _: &Upstream<'_>) -> Vec<Problem> {
        if let Err(error) = open(&self.task, &self.task.any_format()) {
            return vec![Problem::new("task", error.to_string())];
        }
        let mut problems = Vec::new();
        if self.splits.is_empty() {
            let problem = Problem::new("splits", "no split is asked for");
            problems.push(problem.hint("write `splits = { train = 1_000, test = 100 }`"));
        }
        for (name, rows) in &self.splits {
            if !is_plain_name(name) {
                let message = format!("the split name `{name}` has other characters than letters, digits, `_` and `-`");
                problems.push(Problem::new(format!("splits.{name}"), message));
            }
            if *rows == 0 {
                let problem = Problem::new(format!("splits.{name}"), format!("the split `{name}` has no rows"));
                problems.push(problem.hint("leave the split out"));
            }
        }
        let (least, most) = (self.min_length.unwrap_or(1), self.max_length.unwrap_or(self.longest()));
        if least > most {
            let message = format!("no path has at least {least} and at most {most} moves");
            problems.push(Problem::new(if self.min_length.is_some() { "min_length" } else { "max_length" }, message));
        }
        if most > self.longest() {
            let message = format!("`max_length` {most} is more than the {} moves a path can have", self.longest());
            problems.push(Problem::new("max_length", message));
        }
        if self.lengths == Lengths::Balanced && self.max_length.is_none() {
            let problem = Problem::new("lengths", "balanced lengths need `max_length`");
            problems.push(problem.hint("the longest paths are too rare to have a share; 13 suits a maze of 5 x 5"));
        }
        problems
    }

    fn metrics(&self, _upstream: &Upstream<'_>) -> Option<Vec<String>> {
        Some(Vec::new())
    }

    fn run(&self, context: &mut StageContext) -> anyhow::Result<()> {
        let task = open_with(&self.task, &self.task.any_format(), &context.interrupt)?;
        let pool = pool(context)?;
        let mut drawing = Drawing::new(self);
        pool.install(|| drawing.draw(task.as_ref(), context)).map_err(interrupted)?;
        let folder = context.output("dataset");
        for split in &mut drawing.splits {
            if self.lengths == Lengths::Balanced {
                // Rare lengths are found last; without this the beginning of a split would lack them.
                random::shuffle(&mut random::rng("synthesize.order", &[self.seed]), &mut split.rows);
            }
            write_split(&folder, split, task.as_ref())?;
        }
        let task_path = folder.join("task.json");
        let text = serde_json::to_string(&json!({"task": self.task.store(&folder)?})).expect("a task is plain data");
        fs::write(&task_path, text + "\n").with_context(|| format!("writing `{}`", task_path.display()))
    }
}

/// A pool of the threads that the stage was given.
pub(crate) fn pool(context: &StageContext) -> anyhow::Result<rayon::ThreadPool> {
    let threads = context.resources.threads.max(1);
    rayon::ThreadPoolBuilder::new().num_threads(threads).build().context("starting threads")
}

/// Whether a split's name can be a file's name everywhere.
pub(crate) fn is_plain_name(name: &str) -> bool {
    !name.is_empty() && name.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'_' || byte == b'-')
}

/// A candidate as the parallel part leaves it.
struct Candidate {
    hash: [u8; 16],
    length: Option<u64>,
    data: String,
}

/// A split being filled.
struct Split {
    name: String,
    /// The first hash beyond the split's range.
    end: u128,
    /// Rows still wanted by path length; one entry under 0 where lengths are natural.
    wanted: BTreeMap<u64, u64>,
    rows: Vec<Candidate>,
}

struct Drawing<'a> {
    stage: &'a Synthesize,
    splits: Vec<Split>,
    seen: HashSet<[u8; 16]>,
    missing: u64,
}

impl<'a> Drawing<'a> {
    fn new(stage: &'a Synthesize) -> Self {
        let lengths = match stage.lengths {
            Lengths::Natural => 0..=0,
            Lengths::Balanced => stage.min_length.unwrap_or(1)..=stage.max_length.unwrap_or(stage.longest()),
        };
        let count = lengths.clone().count() as u64;
        let ends = hash_ranges(&stage.splits);
        let splits = stage.splits.iter().zip(ends).map(|((name, &rows), end)| {
            // What does not divide evenly goes to the shortest lengths, which are never scarce.
            let wanted = lengths.clone().enumerate();
            let wanted = wanted.map(|(at, length)| (length, rows / count + u64::from((at as u64) < rows % count)));
            Split { name: name.clone(), end, wanted: wanted.collect(), rows: Vec::new() }
        });
        Self { stage, splits: splits.collect(), seen: HashSet::new(), missing: stage.splits.values().sum() }
    }

    fn draw(&mut self, task: &dyn Task, context: &mut StageContext) -> anyhow::Result<()> {
        let asked = self.missing;
        let window = (asked * WINDOW_PER_ROW).min(LARGEST_WINDOW).next_multiple_of(CHUNK);
        let mut missing_before = self.missing;
        for chunk in 0.. {
            context.stop_if_interrupted()?;
            let first = chunk * CHUNK;
            let blocks = (0..CHUNK / BLOCK).into_par_iter().map(|block| first + block * BLOCK);
            let candidates = blocks.map(|index| self.candidates(task, index..index + BLOCK));
            let candidates: Vec<Vec<Candidate>> = candidates.collect::<anyhow::Result<_>>()?;
            for candidate in candidates.into_iter().flatten() {
                self.take(candidate);
            }
            context.progress(asked - self.missing, asked, "rows");
            if self.missing == 0 {
                return Ok(());
            }
            if (first + CHUNK).is_multiple_of(window) {
                if missing_before - self.missing < 1.max(self.missing / LEAST_SHARE) {
                    bail!(self.complaint(first + CHUNK));
                }
                missing_before = self.missing;
            }
        }
        unreachable!("the stream of candidates does not end")
    }

    /// The candidates among the instances `indices`.
    fn candidates(&self, task: &dyn Task, indices: Range<u64>) -> anyhow::Result<Vec<Candidate>> {
        let instances = task.generate(self.stage.seed, indices)?;
        instances.iter().filter_map(|instance| self.candidate(task, instance).transpose()).collect()
    }

    fn candidate(&self, task: &dyn Task, instance: &Value) -> anyhow::Result<Option<Candidate>> {
        let length = instance.get("length").and_then(Value::as_u64);
        let (least, most) = (self.stage.min_length.unwrap_or(0), self.stage.max_length.unwrap_or(u64::MAX));
        if length.is_some_and(|length| !(least..=most).contains(&length)) {
            return Ok(None);
        }
        let digest = blake3::hash(&task.canonical(instance)?);
        let hash = *digest.as_bytes().first_chunk().expect("a digest has 32 bytes");
        Ok(Some(Candidate { hash, length, data: instance.to_string() }))
    }

    fn take(&mut self, candidate: Candidate) {
        let hash = u128::from_be_bytes(candidate.hash);
        let split = self.splits.iter_mut().find(|split| hash < split.end);
        let split = split.expect("the ranges cover the hash space");
        let class = if self.stage.lengths == Lengths::Balanced { candidate.length.unwrap_or(0) } else { 0 };
        let Some(wanted) = split.wanted.get_mut(&class).filter(|wanted| **wanted > 0) else { return };
        if self.stage.unique {
            let digest = blake3::hash(candidate.data.as_bytes());
            if !self.seen.insert(*digest.as_bytes().first_chunk().expect("a digest has 32 bytes")) {
                return;
            }
        }
        *wanted -= 1;
        self.missing -= 1;
        split.rows.push(candidate);
    }

    fn complaint(&self, drawn: u64) -> String {
        let lacking = self.splits.iter().filter_map(|split| {
            let lacking: Vec<String> = split
                .wanted
                .iter()
                .filter(|(_, wanted)| **wanted > 0)
                .map(|(length, wanted)| match self.stage.lengths {
                    Lengths::Natural => format!("{wanted} rows"),
                    Lengths::Balanced => format!("{wanted} of length {length}"),
                })
                .collect();
            let found = split.rows.len();
            (!lacking.is_empty()).then(|| format!("`{}` has {found} and lacks {}", split.name, lacking.join(", ")))
        });
        let lacking: Vec<String> = lacking.collect();
        let kind = if self.stage.unique { "different instances" } else { "instances" };
        format!(
            "the task does not have the {kind} that are asked for: after {drawn} draws {}; ask for fewer rows{}{}",
            lacking.join("; "),
            if self.stage.unique { ", allow repetitions with `unique = false`" } else { "" },
            if self.stage.lengths == Lengths::Balanced { ", lower `max_length`" } else { " or for a larger task" },
        )
    }
}

/// Where each split's range of 128-bit hashes ends; the last one covers the highest hash.
fn hash_ranges(splits: &BTreeMap<String, u64>) -> Vec<u128> {
    let total: f64 = splits.values().map(|&rows| (rows as f64).sqrt()).sum();
    let mut sum = 0.0;
    let mut ends: Vec<u128> = splits
        .values()
        .map(|&rows| {
            sum += (rows as f64).sqrt();
            // 2^53 steps are enough, and exact on every machine.
            let step = (sum / total * (1u64 << 53) as f64) as u128;
            step << 75
        })
        .collect();
    if let Some(last) = ends.last_mut() {
        *last = u128::MAX;
    }
    ends
}

fn write_split(folder: &Path, split: &Split, task: &dyn Task) -> anyhow::Result<()> {
    let mut writer = TableWriter::create(&folder.join(format!("{}.parquet", split.name)), COLUMNS)?;
    for (chunk, rows) in split.rows.chunks(CHUNK as usize).enumerate() {
        let first = chunk * CHUNK as usize;
        let stratum = |row: &Candidate| {
            let instance: Value = serde_json::from_str(&row.data).expect("the instance was written by this stage");
            task.stratum(&instance)
        };
        writer.write(vec![
            Column::text((first..first + rows.len()).map(|row| instance_id(&split.name, row))),
            Column::text(rows.iter().map(|_| split.name.clone())),
            Column::text(rows.iter().map(|row| format!("{:032x}", u128::from_be_bytes(row.hash)))),
            Column::Text(rows.iter().map(stratum).collect()),
            Column::Integer(rows.iter().map(|row| row.length.map(|length| length as i64)).collect()),
            Column::text(rows.iter().map(|row| row.data.clone())),
        ])?;
    }
    writer.finish()
}

/// The id of a row of a split.
pub(crate) fn instance_id(split: &str, row: usize) -> String {
    format!("{split}-{row:06}")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::stages::table;
    use crate::stages::testing::{context, digest, strings};

    fn stage(value: &Value) -> Synthesize {
        serde_json::from_value(value.clone()).unwrap()
    }

    fn small() -> Value {
        json!({"task": {"kind": "maze", "rows": 4, "columns": 4}, "splits": {"train": 300, "rl": 100, "test": 50}})
    }

    fn run(value: &Value, threads: usize) -> anyhow::Result<tempfile::TempDir> {
        let folder = tempfile::tempdir().unwrap();
        let mut context = context(folder.path(), &["dataset"]);
        context.resources.threads = threads;
        stage(value).run(&mut context)?;
        Ok(folder)
    }

    #[test]
    fn twice_and_on_other_threads_gives_the_same_bytes() {
        let digests = [1, 1, 3].map(|threads| digest(&run(&small(), threads).unwrap().path().join("out/dataset")));
        assert!(digests.iter().all(|digest| *digest == digests[0]));
        insta::assert_snapshot!(digests[0]);
    }

    #[test]
    fn splits_have_their_rows_share_no_layout_and_hold_true_instances() {
        let folder = run(&small(), 2).unwrap();
        let task = open(&stage(&small()).task, &crate::tasks::FormatSpec::default()).unwrap();
        let mut owner = BTreeMap::new();
        let mut seen = HashSet::new();
        for (split, rows) in [("train", 300), ("rl", 100), ("test", 50)] {
            let path = folder.path().join(format!("out/dataset/{split}.parquet"));
            let names = ["instance", "split", "layout", "stratum", "data"];
            let columns: Vec<Vec<String>> = table::read(&path, &names).unwrap().into_iter().map(strings).collect();
            assert_eq!(columns[0].len(), rows);
            assert_eq!(columns[0][17], format!("{split}-000017"));
            assert!(columns[1].iter().all(|name| name == split));
            for ((layout, stratum), data) in columns[2].iter().zip(&columns[3]).zip(&columns[4]) {
                assert_eq!(*owner.entry(layout.clone()).or_insert(split), split, "a layout in two splits");
                let instance: Value = serde_json::from_str(data).unwrap();
                let canonical = task.canonical(&instance).unwrap();
                assert_eq!(blake3::hash(&canonical).to_hex()[..32], *layout);
                assert_eq!(task.stratum(&instance).as_ref(), Some(stratum));
                assert!(seen.insert(data.clone()), "an instance stands twice");
            }
        }
    }

    #[test]
    fn balanced_lengths_are_equally_often_and_mixed() {
        let mut value = small();
        value["lengths"] = "balanced".into();
        value["min_length"] = 2.into();
        value["max_length"] = 9.into();
        value["splits"] = json!({"a": 80, "b": 43});
        let folder = run(&value, 2).unwrap();
        for (split, counts) in [("a", [10; 8]), ("b", [6, 6, 6, 5, 5, 5, 5, 5])] {
            let path = folder.path().join(format!("out/dataset/{split}.parquet"));
            let Column::Integer(lengths) = table::read(&path, &["length"]).unwrap().remove(0) else { panic!() };
            let found: [usize; 8] =
                std::array::from_fn(|at| lengths.iter().filter(|length| **length == Some(at as i64 + 2)).count());
            assert_eq!(found, counts);
            assert!(!lengths.is_sorted());
        }
    }

    #[test]
    fn length_limits_hold_in_natural_data_too() {
        let mut value = small();
        value["min_length"] = 3.into();
        value["max_length"] = 5.into();
        let folder = run(&value, 1).unwrap();
        let path = folder.path().join("out/dataset/train.parquet");
        let Column::Integer(lengths) = table::read(&path, &["length"]).unwrap().remove(0) else { panic!() };
        assert!(lengths.iter().all(|length| (3..=5).contains(&length.unwrap())));
    }

    #[test]
    fn a_space_that_is_too_small_ends_in_an_error_that_counts() {
        let value = json!({"task": {"kind": "maze", "rows": 2, "columns": 2}, "splits": {"train": 500}});
        let error = run(&value, 2).unwrap_err().to_string();
        // 4 layouts of 2 x 2 cells with 12 pairs of endpoints.
        assert!(error.contains("`train` has 48 and lacks 452 rows") && error.contains("unique = false"), "{error}");
        let mut repeated = value;
        repeated["unique"] = false.into();
        run(&repeated, 2).unwrap();
    }

    #[test]
    fn an_interrupt_stops_the_stage() {
        let folder = tempfile::tempdir().unwrap();
        let mut context = context(folder.path(), &["dataset"]);
        context.interrupt.store(true, std::sync::atomic::Ordering::Relaxed);
        let error = stage(&small()).run(&mut context).unwrap_err();
        assert!(error.is::<crate::pipeline::stage::Interrupted>());
    }

    #[test]
    fn shares_of_the_hash_space_follow_the_root_of_the_rows() {
        let ends = hash_ranges(&[("a".to_owned(), 100), ("b".to_owned(), 900)].into());
        assert_eq!(ends, [1u128 << 126, u128::MAX]);
    }

    #[test]
    fn parameters_that_cannot_be_are_problems() {
        let paths = |change: &dyn Fn(&mut Value)| {
            let mut value = small();
            change(&mut value);
            let stages = BTreeMap::new();
            let problems = Stage::check(&stage(&value), &Upstream { stages: &stages });
            problems.into_iter().map(|problem| problem.path).collect::<Vec<_>>()
        };
        assert!(paths(&|_| {}).is_empty());
        assert_eq!(paths(&|value| value["splits"] = json!({})), ["splits"]);
        assert_eq!(paths(&|value| value["splits"] = json!({"a/b": 0})), ["splits.a/b", "splits.a/b"]);
        assert_eq!(paths(&|value| value["lengths"] = "balanced".into()), ["lengths"]);
        assert_eq!(paths(&|value| value["max_length"] = 16.into()), ["max_length"]);
        assert_eq!(paths(&|value| value["min_length"] = 16.into()), ["min_length"]);
        assert_eq!(paths(&|value| value["task"]["rows"] = 33.into()), ["task"]);
    }
}
