//! `synthesize`: a data set drawn from a task, its splits apart by the hash of every instance's canonical form.
//!
//! One stream of candidates (the task's instances 0, 1, 2, ... under the stage's seed) fills all splits: the hash of a
//! candidate's canonical form says which split it belongs to, whatever that split still needs. So no layout stands in
//! two splits, and the result does not depend on threads. Each split owns a share of the hash space proportional to the
//! root of the rows asked for: small splits still see many layouts, large ones need not wait. These shares follow from
//! `splits` alone, so two data sets keep their splits apart from each other only when their `splits` are equal, or when
//! both say the same `shares`: then no layout of the test split of one stands in the training split of another.

mod law;

use std::collections::{BTreeMap, HashSet};
use std::fs;
use std::ops::Range;
use std::path::Path;

use anyhow::{Context as _, bail};
use rayon::prelude::*;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::json;

use crate::pipeline::stage::{ArtifactType, Output, Part, Problem, Stage, StageContext, Upstream};
use crate::random;
use crate::stages::interrupted;
use crate::stages::table::{Column, ColumnType, TableWriter};
use crate::tasks::{Drawn, Task, TaskSpec, open, open_with};
pub use law::{Band, Lengths};
use law::{Class, hash_ranges};

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
/// Pieces of so many rows whose columns are made side by side.
const PARTS: usize = 8;
/// Candidates that a thread draws at a time.
const BLOCK: u64 = 1 << 8;
/// Candidates between two looks at whether the request can be met: as many for every row that is asked for, ...
const WINDOW_PER_ROW: u64 = 64;
/// ... but no more than this.
const LARGEST_WINDOW: u64 = 1 << 20;
/// A window must bring a row, and one of so many rows that are still missing.
const LEAST_SHARE: u64 = 256;

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
    /// The share of the rows in which every length is equally often, where `lengths` is `mixed`.
    #[serde(default = "Synthesize::default_balanced_share", skip_serializing_if = "Synthesize::is_half")]
    #[schemars(range(min = 0.0, max = 1.0), extend("default" = 0.5))]
    pub balanced_share: f64,
    /// What every split is made of, such as `[{ min = 1, max = 4, share = 0.5 }, { min = 5, max = 8, share = 0.5 }]`; the
    /// shares sum to 1.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(extend("default" = []))]
    pub composition: Vec<Band>,
    /// The share of all layouts that each split may draw from, in place of one that follows from its rows. They sum to 1 and
    /// may name splits that are not drawn here. Data sets with the same `shares` keep their splits apart from each other.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    #[schemars(extend("default" = json!({})))]
    pub shares: BTreeMap<String, f64>,
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

    fn default_balanced_share() -> f64 {
        0.5
    }

    #[expect(clippy::trivially_copy_pass_by_ref, clippy::float_cmp, reason = "serde gives a reference; 0.5 is exact")]
    fn is_half(share: &f64) -> bool {
        *share == Self::default_balanced_share()
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
        if self.lengths != Lengths::Natural && self.max_length.is_none() {
            let problem = Problem::new("lengths", "balanced lengths need `max_length`");
            problems.push(problem.hint("the longest paths are too rare to have a share; 13 suits a maze of 5 x 5"));
        }
        if self.lengths != Lengths::Mixed && !Self::is_half(&self.balanced_share) {
            let problem = Problem::new("balanced_share", "only `lengths = \"mixed\"` has a balanced share");
            problems.push(problem);
        }
        problems.extend(self.check_composition());
        problems.extend(self.check_shares());
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
            if self.lengths != Lengths::Natural || !self.composition.is_empty() {
                // Rare lengths are found last; without this the beginning of a split would lack them.
                random::shuffle(&mut random::rng("synthesize.order", &[self.seed]), &mut split.rows);
            }
            pool.install(|| write_split(&folder, &split.name, &split.rows))?;
            split.rows = Vec::new();
        }
        write_task(&folder, &self.task)
    }
}

/// Writes which task the rows of a data set are of.
pub(crate) fn write_task(folder: &Path, task: &TaskSpec) -> anyhow::Result<()> {
    let path = folder.join("task.json");
    let text = serde_json::to_string(&json!({"task": task.store(folder)?})).expect("a task is plain data");
    fs::write(&path, text + "\n").with_context(|| format!("writing `{}`", path.display()))
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

/// A row as it is kept.
pub(crate) struct Row {
    /// Of the canonical form.
    hash: [u8; 16],
    length: Option<u64>,
    stratum: Option<Box<str>>,
    data: String,
}

/// A candidate as the parallel part leaves it.
struct Candidate {
    row: Row,
    /// Of the instance.
    digest: [u8; 16],
    /// Random bits of the instance's own.
    coin: u64,
}

impl From<Drawn> for Row {
    fn from(drawn: Drawn) -> Self {
        let hash = blake3::hash(&drawn.canonical);
        let hash = *hash.as_bytes().first_chunk().expect("a digest has 32 bytes");
        let stratum = drawn.stratum.map(String::into_boxed_str);
        Self { hash, length: drawn.length, stratum, data: drawn.data }
    }
}

impl Candidate {
    fn new(drawn: Drawn) -> Self {
        let digest = blake3::hash(drawn.data.as_bytes());
        let (digest, rest) = digest.as_bytes().split_first_chunk().expect("a digest has 32 bytes");
        let coin = u64::from_le_bytes(*rest.first_chunk().expect("16 bytes are left"));
        Self { digest: *digest, coin, row: drawn.into() }
    }
}

/// A split being filled.
struct Split {
    name: String,
    /// The hashes of its layouts: the first, and the first beyond them.
    range: (u128, u128),
    /// Rows still wanted by class.
    wanted: BTreeMap<Class, u64>,
    rows: Vec<Row>,
}

struct Drawing<'a> {
    stage: &'a Synthesize,
    splits: Vec<Split>,
    seen: HashSet<[u8; 16]>,
    missing: u64,
}

impl<'a> Drawing<'a> {
    fn new(stage: &'a Synthesize) -> Self {
        let ranges = hash_ranges(stage);
        let splits = stage.splits.iter().map(|(name, &rows)| Split {
            name: name.clone(),
            range: ranges[name.as_str()],
            wanted: stage.wanted(rows),
            rows: Vec::new(),
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
        let lengths = self.stage.min_length.unwrap_or(0)..=self.stage.max_length.unwrap_or(u64::MAX);
        Ok(task.draw(self.stage.seed, indices, lengths)?.into_iter().map(Candidate::new).collect())
    }

    fn take(&mut self, candidate: Candidate) {
        let hash = u128::from_be_bytes(candidate.row.hash);
        let is_owner = |split: &&mut Split| (split.range.0..split.range.1).contains(&hash);
        // With fixed shares a layout may belong to a split that is not drawn here.
        let Some(split) = self.splits.iter_mut().find(is_owner) else { return };
        let Some(class) = self.stage.class(&candidate) else { return };
        let Some(wanted) = split.wanted.get_mut(&class).filter(|wanted| **wanted > 0) else { return };
        if self.stage.unique && !self.seen.insert(candidate.digest) {
            return;
        }
        *wanted -= 1;
        self.missing -= 1;
        split.rows.push(candidate.row);
    }

    fn complaint(&self, drawn: u64) -> String {
        let lacking = self.splits.iter().filter_map(|split| {
            let wanted = split.wanted.iter().filter(|(_, rows)| **rows > 0);
            let lacking: Vec<String> = wanted.map(|(class, rows)| self.stage.name(*class, *rows)).collect();
            let found = split.rows.len();
            (!lacking.is_empty()).then(|| format!("`{}` has {found} and lacks {}", split.name, lacking.join(", ")))
        });
        let lacking: Vec<String> = lacking.collect();
        let kind = if self.stage.unique { "different instances" } else { "instances" };
        format!(
            "the task does not have the {kind} that are asked for: after {drawn} draws {}; ask for fewer rows{}{}",
            lacking.join("; "),
            if self.stage.unique { ", allow repetitions with `unique = false`" } else { "" },
            if self.stage.lengths == Lengths::Natural { " or for a larger task" } else { ", lower `max_length`" },
        )
    }
}

/// Writes the file of a split.
pub(crate) fn write_split(folder: &Path, name: &str, rows: &[Row]) -> anyhow::Result<()> {
    let mut writer = TableWriter::create(&folder.join(format!("{name}.parquet")), COLUMNS)?;
    // Columns are made side by side and written one after the other.
    for (part, rows) in rows.chunks(CHUNK as usize * PARTS).enumerate() {
        let chunks = rows.par_chunks(CHUNK as usize).enumerate().map(|(chunk, rows)| {
            let first = (part * PARTS + chunk) * CHUNK as usize;
            vec![
                Column::text((first..first + rows.len()).map(|row| instance_id(name, row))),
                Column::text(rows.iter().map(|_| name.to_owned())),
                Column::text(rows.iter().map(|row| format!("{:032x}", u128::from_be_bytes(row.hash)))),
                Column::Text(rows.iter().map(|row| row.stratum.as_deref().map(str::to_owned)).collect()),
                Column::Integer(rows.iter().map(|row| row.length.map(|length| length as i64)).collect()),
                Column::text(rows.iter().map(|row| row.data.clone())),
            ]
        });
        for columns in chunks.collect::<Vec<_>>() {
            writer.write(columns)?;
        }
    }
    writer.finish()
}

/// The id of a row of a split.
pub(crate) fn instance_id(split: &str, row: usize) -> String {
    format!("{split}-{row:06}")
}

#[cfg(test)]
mod tests {
    use serde_json::Value;

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
        let mut value = small();
        value["splits"] = json!({"a": 100, "b": 900});
        let stage = stage(&value);
        let ranges = hash_ranges(&stage);
        assert_eq!(ranges, [("a", (0, 1u128 << 126)), ("b", (1u128 << 126, u128::MAX))].into());
    }

    /// The lengths and the layouts of a split.
    fn drawn(folder: &tempfile::TempDir, split: &str) -> (Vec<u64>, Vec<String>) {
        let path = folder.path().join(format!("out/dataset/{split}.parquet"));
        let mut columns = table::read(&path, &["length", "layout"]).unwrap();
        let layouts = strings(columns.pop().unwrap());
        let Column::Integer(lengths) = columns.pop().unwrap() else { panic!() };
        (lengths.into_iter().map(|length| length.unwrap() as u64).collect(), layouts)
    }

    #[test]
    fn fixed_shares_keep_the_splits_of_different_data_sets_apart() {
        let shares = json!({"train": 0.5, "rl": 0.25, "validation": 0.0625, "test": 0.1875});
        let of = |splits: Value, change: Value| {
            let mut value = small();
            value["shares"] = shares.clone();
            value["splits"] = splits;
            value.as_object_mut().unwrap().extend(change.as_object().unwrap().clone());
            run(&value, 2).unwrap()
        };
        let trained = of(json!({"train": 2_000, "rl": 500}), json!({}));
        let tested = of(json!({"test": 100}), json!({"min_length": 10, "seed": 1}));
        let other = of(json!({"test": 500, "validation": 100}), json!({"lengths": "balanced", "max_length": 8}));
        let layouts = |folder, split| drawn(folder, split).1.into_iter().collect::<HashSet<String>>();
        let seen = &layouts(&trained, "train") | &layouts(&trained, "rl");
        for (folder, split) in [(&tested, "test"), (&other, "test"), (&other, "validation")] {
            let found = layouts(folder, split);
            assert!(found.len() > 30 && found.is_disjoint(&seen), "{split}");
        }
        assert!(!layouts(&tested, "test").is_disjoint(&layouts(&other, "test")), "4x4 has few layouts");
        assert!(layouts(&other, "test").is_disjoint(&layouts(&other, "validation")));
        // Without them the splits of different data sets mix.
        let mut value = small();
        value["splits"] = json!({"test": 500});
        assert!(!layouts(&run(&value, 2).unwrap(), "test").is_disjoint(&seen));
    }

    #[test]
    fn a_mixture_is_natural_and_balanced_by_halves() {
        let mut value = small();
        value["splits"] = json!({"train": 3_000});
        value["max_length"] = 9.into();
        let natural = drawn(&run(&value, 2).unwrap(), "train").0;
        value["lengths"] = "mixed".into();
        value["balanced_share"] = 0.6.into();
        let mixed = run(&value, 2).unwrap();
        assert_eq!(digest(&mixed.path().join("out")), digest(&run(&value, 3).unwrap().path().join("out")));
        let mixed = drawn(&mixed, "train").0;
        assert!(mixed.len() == 3_000 && !mixed.is_sorted());
        let count = |lengths: &[u64], length: u64| lengths.iter().filter(|&&found| found == length).count() as f64;
        for length in 1..=9 {
            let wanted = 200.0 + 0.4 * count(&natural, length);
            assert!((count(&mixed, length) - wanted).abs() < 60.0, "{length}: {} and {wanted}", count(&mixed, length));
        }
    }

    #[test]
    fn a_composition_has_its_shares_to_the_row() {
        let mut value = small();
        value["task"]["rows"] = 5.into();
        value["task"]["columns"] = 5.into();
        value["splits"] = json!({"test": 1_000, "small": 7});
        let bands = [(1, 4, 0.5), (5, 8, 0.4), (9, 13, 0.1)];
        let band = |(min, max, share)| json!({"min": min, "max": max, "share": share});
        value["composition"] = bands.map(band).to_vec().into();
        let folder = run(&value, 2).unwrap();
        for (split, wanted) in [("test", [500, 400, 100]), ("small", [3, 3, 1])] {
            let lengths = drawn(&folder, split).0;
            let counts =
                bands.map(|(min, max, _)| lengths.iter().filter(|length| (min..=max).contains(*length)).count());
            assert_eq!(counts, wanted);
            assert!(!lengths.is_sorted());
        }
        // Within a part lengths are as the task draws them: 9 moves are more often than 13.
        let lengths = drawn(&folder, "test").0;
        let count = |wanted: u64| lengths.iter().filter(|&&length| length == wanted).count();
        assert!(count(9) > count(13), "{} and {}", count(9), count(13));
    }

    #[test]
    fn several_sizes_stand_in_one_data_set() {
        let mut value = small();
        value["task"]["sizes"] = json!([[3, 4], [4, 4], [4, 3]]);
        let folder = run(&value, 2).unwrap();
        let path = folder.path().join("out/dataset/train.parquet");
        let strata: HashSet<String> =
            strings(table::read(&path, &["stratum"]).unwrap().remove(0)).into_iter().collect();
        assert!(strata.contains("3x4.short") && strata.contains("4x3.medium") && strata.contains("4x4.long"));
        let (train, test) = (drawn(&folder, "train").1, drawn(&folder, "test").1);
        assert!(test.iter().all(|layout| !train.contains(layout)));
    }

    #[test]
    fn parameters_that_are_left_out_are_not_written() {
        let fields = serde_json::to_value(stage(&small())).unwrap();
        let names: Vec<&String> = fields.as_object().unwrap().keys().collect();
        assert_eq!(names, ["lengths", "max_length", "min_length", "seed", "splits", "task", "unique"], "old keys stay");
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
        assert_eq!(paths(&|value| value["lengths"] = "mixed".into()), ["lengths"]);
        assert_eq!(paths(&|value| value["balanced_share"] = 0.1.into()), ["balanced_share"]);
        assert_eq!(paths(&|value| value["shares"] = json!({"train": 0.5, "rl": 0.4})), ["shares", "shares"]);
        assert_eq!(paths(&|value| value["shares"] = json!({"train": 0.5, "rl": 0.5, "test": 0.0})), ["shares.test"]);
        let bands = |bands: &[(u64, u64, f64)]| {
            let band = |(min, max, share): &(u64, u64, f64)| json!({"min": min, "max": max, "share": share});
            Value::Array(bands.iter().map(band).collect())
        };
        for (wrong, says) in [
            (vec![(1, 4, 0.5), (5, 8, 0.4)], "sum to 0.9"),
            (vec![(1, 4, 0.5), (4, 8, 0.5)], "overlap"),
            (vec![(5, 4, 1.0)], "no path has 5 to 4 moves"),
            (vec![(5, 16, 1.0)], "never above 15"),
        ] {
            let mut value = small();
            value["composition"] = bands(&wrong);
            let stages = BTreeMap::new();
            let problems = Stage::check(&stage(&value), &Upstream { stages: &stages });
            assert!(problems.len() == 1 && problems[0].message.contains(says), "{problems:?}");
        }
        let both = |value: &mut Value| {
            value["composition"] = bands(&[(1, 4, 1.0)]);
            value["lengths"] = "balanced".into();
            value["max_length"] = 4.into();
        };
        assert_eq!(paths(&both), ["composition"]);
    }
}
