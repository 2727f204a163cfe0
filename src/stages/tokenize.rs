//! `tokenize`: rows of token ids with loss masks, from a data set and a tokenizer.
//!
//! A row is `bos prompt completion eos`. Where the data set comes from a task, the task writes prompt and demonstration
//! in the stage's format; a user's own rows are taken as they are. Nothing is cut: a row over `max_length` is an error
//! or, on request, dropped and counted. `tokens.rs` says what the folder holds.

use std::collections::{BTreeMap, HashMap};
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, bail, ensure};
use rand::Rng as _;
use rayon::prelude::*;
use safetensors::Dtype;
use safetensors::tensor::TensorView;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::pipeline::stage::{
    ArtifactType, Dataset, Input, Output, Part, Problem, Stage, StageContext, Tokenizer, Upstream,
};
use crate::random;
use crate::stages::synthesize::pool;
use crate::stages::table::{self, Column, ColumnType, TableWriter};
use crate::stages::tokenizer::Encoder;
use crate::stages::tokens::{ROWS_FILE, TASK_FILE, TENSORS_FILE, TOKENIZER_FOLDER, TaskFile};
use crate::tasks::{FormatSpec, Start, Task, TaskSpec, open, parts};

/// Rows tokenized at a time.
const CHUNK: usize = 8_192;

const COLUMNS: &[(&str, ColumnType)] = &[
    ("row", ColumnType::Integer),
    ("instance", ColumnType::Text),
    ("split", ColumnType::Text),
    ("stratum", ColumnType::Text),
    ("prompt", ColumnType::Text),
    ("data", ColumnType::Text),
];

/// Which tokens of a row are targets of the loss.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Mask {
    /// The completion and the end of the row.
    #[default]
    Completion,
    /// The prompt, too.
    All,
}

/// What becomes of rows that are longer than `max_length`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Overlong {
    /// The stage fails and says how many they are.
    #[default]
    Error,
    /// They are left out and counted.
    Drop,
}

/// Turn a data set into token ids with loss masks.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Tokenize {
    /// The rows.
    pub dataset: Input<Dataset>,
    /// The tokenizer.
    pub tokenizer: Input<Tokenizer>,
    /// How a task's instances are written; without effect on a data set of your own.
    #[serde(default)]
    pub format: FormatSpec,
    /// Tokens in a row, at most; 0 is no limit.
    #[serde(default)]
    pub max_length: u64,
    /// What becomes of rows that are longer than `max_length`.
    #[serde(default)]
    pub overlong: Overlong,
    /// Which tokens are targets of the loss.
    #[serde(default)]
    pub mask: Mask,
    /// Decides what demonstrations draw at random.
    #[serde(default)]
    pub seed: u64,
}

impl Stage for Tokenize {
    const KIND: &'static str = "tokenize";
    const VERSION: u32 = 1;

    fn outputs(&self) -> Vec<Output> {
        vec![Output::new("tokens", ArtifactType::Tokens)]
    }

    fn parts(&self) -> Vec<Part> {
        // The task is named by the data set alone, so every task counts.
        let tasks = parts().into_iter().filter(|(name, _)| name.starts_with("task."));
        [self.format.part()].into_iter().chain(tasks).map(|(name, version)| Part::new(name, version)).collect()
    }

    fn check(&self, upstream: &Upstream<'_>) -> Vec<Problem> {
        let read = |reference: &str, field: &str| upstream.nearest(reference, field).cloned();
        let task = |reference: &str| serde_json::from_value::<TaskSpec>(read(reference, "task")?).ok();
        let (Some(data), Some(words)) = (task(&self.dataset.reference), task(&self.tokenizer.reference)) else {
            return Vec::new();
        };
        let format = read(&self.tokenizer.reference, "format").and_then(|value| serde_json::from_value(value).ok());
        let vocabulary = |task: &TaskSpec, format: &FormatSpec| Some(open(task, format).ok()?.vocabulary());
        if vocabulary(&data, &self.format) == vocabulary(&words, &format.unwrap_or_default()) {
            return Vec::new();
        }
        let message = format!("the tokenizer `{}` is made for another task or format", self.tokenizer.reference);
        vec![Problem::new("tokenizer", message).hint("give both the same `task` and the same kind of `format`")]
    }

    fn run(&self, context: &mut StageContext) -> anyhow::Result<()> {
        let dataset = context.input(&self.dataset)?.to_owned();
        let tokenizer_folder = context.input(&self.tokenizer)?.to_owned();
        let folder = context.output("tokens");
        let encoder = Encoder::open(&tokenizer_folder)?;
        let task = read_task(&dataset)?;
        let opened = task.as_ref().map(|task| open(task, &self.format)).transpose()?;
        let pool = pool(context)?;
        let splits = read_splits(&dataset, opened.is_some())?;
        let total = splits.iter().map(|split| split.instances.len()).sum::<usize>() as u64;
        let mut rows = Rows::default();
        let mut writer = TableWriter::create(&folder.join(ROWS_FILE), COLUMNS)?;
        let mut done = 0;
        for split in &splits {
            for first in (0..split.instances.len()).step_by(CHUNK) {
                context.stop_if_interrupted()?;
                let range = first..(first + CHUNK).min(split.instances.len());
                let encode = |row| {
                    let encoded = self.encode(&encoder, opened.as_deref(), split, row);
                    encoded.with_context(|| format!("row `{}` of the data set", split.instances[row]))
                };
                let encoded: Vec<Encoded> =
                    pool.install(|| range.clone().into_par_iter().map(encode).collect::<anyhow::Result<_>>())?;
                done += range.len() as u64;
                let kept = encoded.into_iter().filter(|row| rows.keep(row, self.max_length, &split.name)).collect();
                rows.write(kept, split, &mut writer)?;
                context.progress(done, total, "rows");
            }
        }
        writer.finish()?;
        self.report(&rows, context)?;
        rows.save(&folder)?;
        let format = task.is_some().then(|| self.format.clone());
        write_json(&folder.join(TASK_FILE), &TaskFile { task, format, tokenizer: encoder.digest.clone() })?;
        write_json(&folder.join("metrics.json"), &rows.metrics(&splits))?;
        copy_files(&tokenizer_folder, &folder.join(TOKENIZER_FOLDER))
    }
}

/// A split of the data set, as columns of equal length.
struct Split {
    name: String,
    instances: Vec<String>,
    contents: Contents,
}

enum Contents {
    /// Task instances as JSON.
    Task(Vec<String>),
    /// Prompts and completions.
    Texts(Vec<String>, Vec<String>),
}

struct Encoded {
    row: usize,
    ids: Vec<i32>,
    mask: Vec<u8>,
    prompt_length: i32,
    prompt: String,
    stratum: Option<String>,
}

impl Tokenize {
    fn encode(&self, encoder: &Encoder, task: Option<&dyn Task>, split: &Split, row: usize) -> anyhow::Result<Encoded> {
        let (prompt, completion, stratum) = match (&split.contents, task) {
            (Contents::Task(data), Some(task)) => {
                let instance: Value = serde_json::from_str(&data[row]).context("reading the instance")?;
                let prompt = task.begin(&[Start { instance: &instance, seed: 0 }])?.observe()?.remove(0);
                // Keyed by the instance's id, so that an instance that stands twice may be shown in two ways.
                let id = blake3::hash(split.instances[row].as_bytes());
                let id = u64::from_le_bytes(*id.as_bytes().first_chunk().expect("a digest has 32 bytes"));
                let seed = random::rng("tokenize.trace", &[self.seed, id]).next_u64();
                (prompt, task.demonstrate(&instance, seed)?.concat(), task.stratum(&instance))
            }
            (Contents::Texts(prompts, completions), _) => (prompts[row].clone(), completions[row].clone(), None),
            (Contents::Task(_), None) => bail!("the data set has instances and names no task"),
        };
        let mut ids: Vec<i32> = encoder.begin.into_iter().collect();
        encoder.encode(&prompt, &mut ids)?;
        let prompt_length = ids.len();
        encoder.encode(&completion, &mut ids)?;
        let bare = ids.len();
        ids.push(encoder.end);
        let targets = match self.mask {
            Mask::Completion => prompt_length,
            Mask::All => 1,
        };
        ensure!(
            bare > targets,
            "there is nothing to learn: the {} is empty",
            match self.mask {
                Mask::Completion => "completion",
                Mask::All => "text",
            }
        );
        let mask = (0..ids.len()).map(|at| u8::from(at >= targets)).collect();
        Ok(Encoded { row, ids, mask, prompt_length: prompt_length as i32, prompt, stratum })
    }

    fn report(&self, rows: &Rows, context: &mut StageContext) -> anyhow::Result<()> {
        let overlong: u64 = rows.dropped.values().sum();
        if overlong > 0 {
            let seen = rows.prompt_lengths.len() as u64 + overlong;
            let text = format!(
                "{overlong} of {seen} rows have more than {} tokens; the longest has {}",
                self.max_length, rows.longest_seen
            );
            match self.overlong {
                Overlong::Error => bail!("{text}; raise `max_length` or set `overlong = \"drop\"`"),
                Overlong::Drop => context.note(format!("{text}; they are left out")),
            }
        }
        ensure!(!rows.prompt_lengths.is_empty(), "no row is left");
        Ok(())
    }
}

/// The rows so far: tensors to be, and what is counted.
#[derive(Default)]
struct Rows {
    ids: Vec<i32>,
    ends: Vec<i64>,
    mask: Vec<u8>,
    prompt_lengths: Vec<i32>,
    kept: HashMap<String, u64>,
    dropped: HashMap<String, u64>,
    longest: usize,
    longest_seen: usize,
}

impl Rows {
    /// Whether a row is short enough; counts it either way.
    fn keep(&mut self, row: &Encoded, max_length: u64, split: &str) -> bool {
        let length = row.ids.len();
        self.longest_seen = self.longest_seen.max(length);
        let keep = max_length == 0 || length as u64 <= max_length;
        *(if keep { &mut self.kept } else { &mut self.dropped }).entry(split.to_owned()).or_default() += 1;
        if keep {
            self.longest = self.longest.max(length);
        }
        keep
    }

    fn write(&mut self, rows: Vec<Encoded>, split: &Split, writer: &mut TableWriter) -> anyhow::Result<()> {
        let first = self.ends.len() as i64;
        let data = |row: &Encoded| match &split.contents {
            Contents::Task(data) => Some(data[row.row].clone()),
            Contents::Texts(..) => None,
        };
        let mut columns = vec![
            Column::integer(first..first + rows.len() as i64),
            Column::text(rows.iter().map(|row| split.instances[row.row].clone())),
            Column::text(rows.iter().map(|_| split.name.clone())),
            Column::Text(rows.iter().map(|row| row.stratum.clone()).collect()),
        ];
        let data = Column::Text(rows.iter().map(data).collect());
        let mut prompts = Vec::with_capacity(rows.len());
        for row in rows {
            self.ids.extend(&row.ids);
            self.mask.extend(&row.mask);
            self.ends.push(self.ids.len() as i64);
            self.prompt_lengths.push(row.prompt_length);
            prompts.push(row.prompt);
        }
        columns.extend([Column::text(prompts), data]);
        writer.write(columns)
    }

    fn save(&self, folder: &Path) -> anyhow::Result<()> {
        let path = folder.join(TENSORS_FILE);
        let ids: Vec<u8> = self.ids.iter().flat_map(|id| id.to_le_bytes()).collect();
        let offsets: Vec<u8> = std::iter::once(&0).chain(&self.ends).flat_map(|end| end.to_le_bytes()).collect();
        let lengths: Vec<u8> = self.prompt_lengths.iter().flat_map(|length| length.to_le_bytes()).collect();
        let (tokens, rows) = (self.ids.len(), self.ends.len());
        let save = || {
            let tensors = [
                ("ids", TensorView::new(Dtype::I32, vec![tokens], &ids)?),
                ("mask", TensorView::new(Dtype::U8, vec![tokens], &self.mask)?),
                ("offsets", TensorView::new(Dtype::I64, vec![rows + 1], &offsets)?),
                ("prompt_lengths", TensorView::new(Dtype::I32, vec![rows], &lengths)?),
            ];
            anyhow::Ok(fs::write(&path, safetensors::serialize(tensors, None)?)?)
        };
        save().with_context(|| format!("writing `{}`", path.display()))
    }

    fn metrics(&self, splits: &[Split]) -> BTreeMap<String, u64> {
        let mut metrics = BTreeMap::from([
            ("rows".to_owned(), self.ends.len() as u64),
            ("tokens".to_owned(), self.ids.len() as u64),
            ("target_tokens".to_owned(), self.mask.iter().map(|&target| u64::from(target)).sum()),
            ("longest_row".to_owned(), self.longest as u64),
        ]);
        for split in splits {
            let count = |counts: &HashMap<String, u64>| counts.get(&split.name).copied().unwrap_or(0);
            metrics.insert(format!("rows.{}", split.name), count(&self.kept));
            metrics.insert(format!("dropped.{}", split.name), count(&self.dropped));
        }
        metrics
    }
}

/// The task of a data set, where it comes from one.
fn read_task(dataset: &Path) -> anyhow::Result<Option<TaskSpec>> {
    #[derive(Deserialize)]
    struct File {
        task: TaskSpec,
    }
    let path = dataset.join("task.json");
    if !path.exists() {
        return Ok(None);
    }
    let reading = || format!("reading `{}`", path.display());
    let bytes = fs::read(&path).with_context(reading)?;
    let file: File = serde_json::from_slice(&bytes).with_context(reading)?;
    Ok(Some(file.task))
}

/// Every `<split>.parquet` of a data set, in the order of names.
fn read_splits(dataset: &Path, has_task: bool) -> anyhow::Result<Vec<Split>> {
    let mut splits = Vec::new();
    for path in files(dataset)? {
        if path.extension().is_none_or(|extension| extension != "parquet") {
            continue;
        }
        let name = path.file_stem().and_then(|stem| stem.to_str());
        let name = name.with_context(|| format!("`{}` has no readable name", path.display()))?.to_owned();
        let names: &[&str] = if has_task { &["instance", "data"] } else { &["instance", "prompt", "completion"] };
        let mut columns = Vec::new();
        for (column, name) in table::read(&path, names)?.into_iter().zip(names) {
            let place = || format!("column `{name}` of `{}` has a value that is no text", path.display());
            let Column::Text(values) = column else { bail!(place()) };
            columns.push(values.into_iter().collect::<Option<Vec<String>>>().with_context(place)?);
        }
        let mut columns = columns.into_iter();
        let mut next = || columns.next().expect("as many columns are read as are named");
        let instances = next();
        let contents = if has_task { Contents::Task(next()) } else { Contents::Texts(next(), next()) };
        splits.push(Split { name, instances, contents });
    }
    ensure!(!splits.is_empty(), "`{}` has no Parquet file", dataset.display());
    Ok(splits)
}

/// The files of a folder, sorted.
fn files(folder: &Path) -> anyhow::Result<Vec<PathBuf>> {
    let listing = || {
        let mut files = Vec::new();
        for entry in fs::read_dir(folder)? {
            let path = entry?.path();
            if path.is_file() {
                files.push(path);
            }
        }
        files.sort();
        Ok::<_, std::io::Error>(files)
    };
    listing().with_context(|| format!("listing `{}`", folder.display()))
}

/// Copies the files of a folder into a new one. Contents only: what the store keeps is read-only.
fn copy_files(from: &Path, to: &Path) -> anyhow::Result<()> {
    fs::create_dir(to).with_context(|| format!("creating `{}`", to.display()))?;
    for file in files(from)? {
        let Some(name) = file.file_name() else { continue };
        let target = to.join(name);
        let bytes = fs::read(&file).with_context(|| format!("reading `{}`", file.display()))?;
        fs::write(&target, bytes).with_context(|| format!("writing `{}`", target.display()))?;
    }
    Ok(())
}

fn write_json<T: Serialize>(path: &Path, value: &T) -> anyhow::Result<()> {
    let text = serde_json::to_string(value).expect("plain data");
    fs::write(path, text + "\n").with_context(|| format!("writing `{}`", path.display()))
}

#[cfg(test)]
mod tests;
