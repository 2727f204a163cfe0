//! `tokenize`: rows of token ids with loss masks, from a data set and a tokenizer.
//!
//! A row is `bos prompt reply eos`, with `observation reply eos` after it for every further turn. Where the data set comes
//! from a task, the task writes prompt and demonstration in the stage's format; a user's own texts are taken as they are.
//! Conversations, and tasks whose tokenizer has a chat template, are written by the template: it frames a row itself, and
//! its end of turn takes the place of `eos`. Every piece is encoded by itself, because generation reads and writes them so.
//! Nothing is cut: a row over `max_length` is an error or, on request, dropped and counted. `script.rs` makes the text,
//! `tokens.rs` says what the folder holds.

mod script;

use std::collections::{BTreeMap, HashMap};
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, bail, ensure};
use rayon::prelude::*;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::pipeline::stage::{
    ArtifactType, Dataset, Input, Output, Part, Problem, Stage, StageContext, Tokenizer, Upstream,
};
use crate::stages::chat::ChatTemplate;
use crate::stages::interrupted;
use crate::stages::synthesize::pool;
use crate::stages::table::{Column, TableWriter};
use crate::stages::tokenizer::Encoder;
use crate::stages::tokens::{COLUMNS, ROWS_FILE, TASK_FILE, TOKENIZER_FOLDER, TaskFile, save_tensors};
use crate::tasks::{FormatSpec, TaskSpec, open, open_with, parts};
use script::{Contents, Script, Split, Writer, read_splits};

/// Rows tokenized at a time.
const CHUNK: usize = 8_192;

/// Which tokens of a row are targets of the loss.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Mask {
    /// The completion and its end; of several turns, every reply and its end.
    #[default]
    Completion,
    /// Everything but the first token.
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

/// Whether the tokenizer's chat template writes a task's episodes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Template {
    /// Where the tokenizer has one: what the environment says is a user's message, a reply the assistant's.
    #[default]
    Auto,
    /// No: texts follow each other as they are.
    None,
}

impl Template {
    #[expect(clippy::trivially_copy_pass_by_ref, reason = "serde gives a reference")]
    fn is_default(&self) -> bool {
        *self == Self::default()
    }
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
    /// Whether the mistakes of demonstrations are no targets: wrong attempts are read, and giving them up is learnt.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    #[schemars(extend("default" = false))]
    pub mask_mistakes: bool,
    /// Whether the tokenizer's chat template writes a task's episodes. Messages always need one; prompts and completions
    /// of your own never use it.
    #[serde(default, skip_serializing_if = "Template::is_default")]
    #[schemars(extend("default" = "auto"))]
    pub template: Template,
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

    fn metrics(&self, _upstream: &Upstream<'_>) -> Option<Vec<String>> {
        let names = [
            "rows",
            "tokens",
            "target_tokens",
            "masked_tokens",
            "longest_row",
            "rows_without_demonstration",
            "rows.*",
            "dropped.*",
        ];
        Some(names.map(str::to_owned).to_vec())
    }

    fn run(&self, context: &mut StageContext) -> anyhow::Result<()> {
        let dataset = context.input(&self.dataset)?.to_owned();
        let tokenizer_folder = context.input(&self.tokenizer)?.to_owned();
        let folder = context.output("tokens");
        let encoder = Encoder::open(&tokenizer_folder)?;
        let task = read_task(&dataset)?;
        let opened = task.as_ref().map(|task| open_with(task, &self.format, &context.interrupt)).transpose()?;
        let pool = pool(context)?;
        let splits = read_splits(&dataset, opened.is_some())?;
        let needed = splits.iter().any(|split| matches!(split.contents, Contents::Messages(_)));
        let wanted = needed || (opened.is_some() && self.template == Template::Auto);
        let template = if wanted { ChatTemplate::open(&tokenizer_folder)? } else { None };
        let writer = Writer { task: opened.as_deref(), template: template.as_ref(), seed: self.seed };
        let encode = |split: &Split, row: usize| {
            let script = writer.write(split, row)?;
            self.encode(&encoder, template.as_ref(), row, script)
        };
        let total = splits.iter().map(|split| split.instances.len()).sum::<usize>() as u64;
        let mut rows = Rows::default();
        let mut table = TableWriter::create(&folder.join(ROWS_FILE), COLUMNS)?;
        let mut done = 0;
        for split in &splits {
            for first in (0..split.instances.len()).step_by(CHUNK) {
                context.stop_if_interrupted()?;
                let range = first..(first + CHUNK).min(split.instances.len());
                let encode =
                    |row| encode(split, row).with_context(|| format!("row `{}` of the data set", split.instances[row]));
                // Of several rows that fail the first is told, not the quickest.
                let encoded: Vec<_> = pool.install(|| range.clone().into_par_iter().map(encode).collect());
                let encoded: anyhow::Result<Vec<Encoded>> = encoded.into_iter().collect();
                let encoded = encoded.map_err(interrupted)?;
                done += range.len() as u64;
                let kept = encoded.into_iter().filter(|row| rows.keep(row, self.max_length, &split.name)).collect();
                rows.write(kept, split, &mut table)?;
                context.progress(done, total, "rows");
            }
        }
        table.finish()?;
        self.report(&rows, context)?;
        rows.save(&folder)?;
        let format = task.is_some().then(|| self.format.clone());
        let task = task.map(|task| task.store(&folder)).transpose()?;
        let file = TaskFile { task, format, tokenizer: encoder.digest.clone(), chat: template.is_some() };
        write_json(&folder.join(TASK_FILE), &file)?;
        write_json(&folder.join("metrics.json"), &rows.metrics(&splits))?;
        copy_files(&tokenizer_folder, &folder.join(TOKENIZER_FOLDER))
    }
}

struct Encoded {
    row: usize,
    ids: Vec<i32>,
    mask: Vec<u8>,
    /// Tokens of mistakes, which are no targets.
    masked: usize,
    prompt_length: i32,
    prompt: String,
    stratum: Option<String>,
    /// The task has no demonstration: the row is its prompt alone, and nothing is learnt from it.
    undemonstrated: bool,
    /// The row's text in one piece has other ids than its pieces have.
    retokenized: bool,
}

/// The id of a chat template's end of turn.
fn end_of_turn(encoder: &Encoder, template: &ChatTemplate) -> anyhow::Result<i32> {
    let mut ids = Vec::new();
    encoder.encode(template.end_of_turn(), &mut ids)?;
    ensure!(ids.len() == 1, "the end of turn `{}` is not one token: its ids are {ids:?}", template.end_of_turn());
    Ok(ids[0])
}

impl Tokenize {
    /// The ids and the mask of a row.
    fn encode(
        &self,
        encoder: &Encoder,
        template: Option<&ChatTemplate>,
        row: usize,
        script: Script,
    ) -> anyhow::Result<Encoded> {
        let Script { conversation, stratum, chat, mistakes } = script;
        let template = template.filter(|_| chat);
        let end = template.map_or(Ok(encoder.end), |template| end_of_turn(encoder, template))?;
        let mut ids = if template.is_some() { Vec::new() } else { encoder.begin.into_iter().collect() };
        encoder.encode(&conversation.prompt, &mut ids)?;
        ensure!(!ids.is_empty() || !conversation.turns.is_empty(), "there is neither a prompt nor a completion");
        let mut mask = vec![0; ids.len()];
        // Nothing precedes the first token: without `bos` and prompt it stands for the prompt.
        let prompt_length = ids.len().max(1);
        let mut learnt = if self.mask == Mask::All { prompt_length - 1 } else { 0 };
        let mut masked = Vec::new();
        for (turn, said) in conversation.turns.iter().enumerate() {
            let begin = ids.len();
            encoder.encode(&said.reply, &mut ids)?;
            if let Some(spans) = mistakes.get(turn).filter(|_| self.mask_mistakes) {
                masked.extend(encoder.within(&said.reply, spans)?.into_iter().map(|place| begin + place));
            }
            learnt += ids.len() - begin;
            ensure!(
                learnt > 0,
                "there is nothing to learn: the {} is empty",
                if self.mask == Mask::All { "text" } else { "completion" }
            );
            ensure!(
                turn == 0 || ids.len() > begin || self.mask == Mask::All,
                "there is nothing to learn in turn {}: its reply is empty",
                turn + 1
            );
            ids.push(end);
            mask.resize(ids.len(), 1);
            encoder.encode(&said.observation, &mut ids)?;
            let last = turn + 1 == conversation.turns.len();
            ensure!(last || ids.len() > mask.len(), "nothing is read between the turns {} and {}", turn + 1, turn + 2);
            mask.resize(ids.len(), 0);
        }
        let undemonstrated = conversation.turns.is_empty();
        if self.mask == Mask::All && !undemonstrated {
            mask.fill(1);
        }
        mask[0] = 0;
        for &place in &masked {
            mask[place] = 0;
        }
        let masked = masked.len();
        let retokenized = match template {
            Some(template) => {
                let mut whole = Vec::with_capacity(ids.len());
                encoder.encode(&conversation.text(template.end_of_turn()), &mut whole)?;
                whole != ids
            }
            None => false,
        };
        let prompt = conversation.prompt;
        let prompt_length = prompt_length as i32;
        Ok(Encoded { row, ids, mask, masked, prompt_length, prompt, stratum, undemonstrated, retokenized })
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
        if rows.undemonstrated > 0 {
            context.note(format!(
                "{} rows without a demonstration are prompts alone: they have no target, and only a stage that generates \
                 can use them",
                rows.undemonstrated
            ));
        }
        if self.mask_mistakes && rows.masked == 0 {
            context.note(
                "`mask_mistakes` masks nothing: no demonstration has a mistake; `retry_share` makes some".to_owned(),
            );
        }
        if rows.retokenized > 0 {
            context.note(format!(
                "the text of {} rows in one piece has other ids than its turns have; the turns' own are kept, because \
                 generation reads and writes them so",
                rows.retokenized
            ));
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
    undemonstrated: u64,
    retokenized: u64,
    masked: u64,
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

    fn write(&mut self, rows: Vec<Encoded>, split: &Split, table: &mut TableWriter) -> anyhow::Result<()> {
        let first = self.ends.len() as i64;
        let data = |row: &Encoded| match &split.contents {
            Contents::Task(data) => Some(data[row.row].clone()),
            Contents::Texts(..) | Contents::Messages(_) => None,
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
            self.undemonstrated += u64::from(row.undemonstrated);
            self.retokenized += u64::from(row.retokenized);
            self.masked += row.masked as u64;
            self.ids.extend(&row.ids);
            self.mask.extend(&row.mask);
            self.ends.push(self.ids.len() as i64);
            self.prompt_lengths.push(row.prompt_length);
            prompts.push(row.prompt);
        }
        columns.extend([Column::text(prompts), data]);
        table.write(columns)
    }

    fn save(&self, folder: &Path) -> anyhow::Result<()> {
        let offsets: Vec<i64> = std::iter::once(&0).chain(&self.ends).copied().collect();
        save_tensors(folder, &self.ids, &offsets, &self.mask, &self.prompt_lengths)
    }

    fn metrics(&self, splits: &[Split]) -> BTreeMap<String, u64> {
        let mut metrics = BTreeMap::from([
            ("rows".to_owned(), self.ends.len() as u64),
            ("tokens".to_owned(), self.ids.len() as u64),
            ("target_tokens".to_owned(), self.mask.iter().map(|&target| u64::from(target)).sum()),
            ("longest_row".to_owned(), self.longest as u64),
        ]);
        if self.undemonstrated > 0 {
            metrics.insert("rows_without_demonstration".to_owned(), self.undemonstrated);
        }
        if self.masked > 0 {
            metrics.insert("masked_tokens".to_owned(), self.masked);
        }
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
    Ok(Some(file.task.stored_in(dataset)))
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
pub(crate) fn copy_files(from: &Path, to: &Path) -> anyhow::Result<()> {
    fs::create_dir(to).with_context(|| format!("creating `{}`", to.display()))?;
    for file in files(from)? {
        let Some(name) = file.file_name() else { continue };
        let target = to.join(name);
        let bytes = fs::read(&file).with_context(|| format!("reading `{}`", file.display()))?;
        fs::write(&target, bytes).with_context(|| format!("writing `{}`", target.display()))?;
    }
    Ok(())
}

/// Writes plain data as one line of JSON.
pub(crate) fn write_json<T: Serialize>(path: &Path, value: &T) -> anyhow::Result<()> {
    let text = serde_json::to_string(value).expect("plain data");
    fs::write(path, text + "\n").with_context(|| format!("writing `{}`", path.display()))
}

#[cfg(test)]
mod tests;
