//! Reading a `Tokens` artifact: ids, row offsets, loss masks and the rows they came from, all in memory.
//!
//! The layout of the folder: `tokens.safetensors` (`ids` i32 `[tokens]`, `offsets` i64 `[rows + 1]`, `mask` u8 `[tokens]`,
//! `prompt_lengths` i32 `[rows]`), `rows.parquet` (a row each, in the same order), `task.json`, `tokenizer/`,
//! `metrics.json`. A row is `bos prompt reply eos`, with `observation reply eos` after it for every further turn; its tokens
//! are `ids[offsets[row]..offsets[row + 1]]`, of which the first `prompt_lengths[row]` are `bos` and the prompt. Where a chat
//! template wrote the row, its own marks stand for `bos` and `eos`. This module knows the files and no tensor library.

mod selection;

pub use selection::Selection;

use std::collections::BTreeMap;
use std::ops::Range;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, bail, ensure};
use safetensors::tensor::TensorView;
use safetensors::{Dtype, SafeTensors};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::stages::table::{self, Column, ColumnType};
use crate::tasks::{FormatSpec, TaskSpec};

/// The tensors' file.
pub const TENSORS_FILE: &str = "tokens.safetensors";
/// The rows' file.
pub const ROWS_FILE: &str = "rows.parquet";
/// The file that names the task, the format and the tokenizer.
pub const TASK_FILE: &str = "task.json";
/// The folder with a copy of the tokenizer's files.
pub const TOKENIZER_FOLDER: &str = "tokenizer";

/// The columns of [`ROWS_FILE`].
pub(crate) const COLUMNS: &[(&str, ColumnType)] = &[
    ("row", ColumnType::Integer),
    ("instance", ColumnType::Text),
    ("split", ColumnType::Text),
    ("stratum", ColumnType::Text),
    ("prompt", ColumnType::Text),
    ("data", ColumnType::Text),
];

/// What a row of tokens was made from.
#[derive(Clone, Debug, PartialEq)]
pub struct Row {
    /// The instance's id, such as `test-000017`.
    pub instance: String,
    /// The split it belongs to.
    pub split: String,
    /// The class by which results are broken down, where the task has one.
    pub stratum: Option<String>,
    /// The text that the model reads first, without `bos`.
    pub prompt: String,
    /// The task instance; `None` in a user's own data set.
    pub data: Option<Value>,
}

/// A `Tokens` artifact in memory.
#[derive(Clone, Debug)]
pub struct TokensFolder {
    /// Token ids of all rows, one after the other.
    pub ids: Vec<i32>,
    /// Where each row begins in `ids`, and where the last one ends: rows + 1 numbers.
    pub offsets: Vec<i64>,
    /// 1 where the token is a target of the loss; as long as `ids`.
    pub mask: Vec<u8>,
    /// Tokens of `bos` and the first prompt, a row each.
    pub prompt_lengths: Vec<i32>,
    /// What the rows were made from.
    pub rows: Vec<Row>,
    /// The task and the format in which it is written; `None` in a user's own data set.
    pub task: Option<(TaskSpec, FormatSpec)>,
    /// The tokenizer's chat template wrote the rows and has to write what a model reads in further turns.
    pub chat: bool,
    /// BLAKE3 of the bytes of `tokenizer.json`, in hexadecimal digits.
    pub tokenizer_digest: String,
    /// The folder it was read from; the tokenizer's files lie in its [`TOKENIZER_FOLDER`].
    pub path: PathBuf,
}

/// The content of `task.json`.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct TaskFile {
    pub(crate) task: Option<TaskSpec>,
    pub(crate) format: Option<FormatSpec>,
    pub(crate) tokenizer: String,
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub(crate) chat: bool,
}

impl TokensFolder {
    /// Reads the artifact at `path`; an error names the file and what is wrong with it.
    pub fn open(path: &Path) -> anyhow::Result<Self> {
        let task_path = path.join(TASK_FILE);
        let text = std::fs::read(&task_path).with_context(|| format!("reading `{}`", task_path.display()))?;
        let task: TaskFile =
            serde_json::from_slice(&text).with_context(|| format!("reading `{}`", task_path.display()))?;
        let tensors_path = path.join(TENSORS_FILE);
        let bytes = std::fs::read(&tensors_path).with_context(|| format!("reading `{}`", tensors_path.display()))?;
        let folder = (|| {
            let tensors = SafeTensors::deserialize(&bytes)?;
            anyhow::Ok(Self {
                ids: tensor(&tensors, "ids", Dtype::I32, i32::from_le_bytes)?,
                offsets: tensor(&tensors, "offsets", Dtype::I64, i64::from_le_bytes)?,
                mask: tensor(&tensors, "mask", Dtype::U8, u8::from_le_bytes)?,
                prompt_lengths: tensor(&tensors, "prompt_lengths", Dtype::I32, i32::from_le_bytes)?,
                rows: Vec::new(),
                task: task.task.map(|task| task.stored_in(path)).zip(task.format),
                chat: task.chat,
                tokenizer_digest: task.tokenizer,
                path: path.to_owned(),
            })
        })();
        drop(bytes);
        let mut folder = folder.with_context(|| format!("reading `{}`", tensors_path.display()))?;
        let rows_path = path.join(ROWS_FILE);
        folder.rows = read_rows(&rows_path)?;
        folder.check().with_context(|| format!("`{}` is damaged", path.display()))?;
        Ok(folder)
    }

    /// The indices of the rows of the split `name`, in order; an error lists the splits there are.
    pub fn split(&self, name: &str) -> anyhow::Result<Vec<usize>> {
        let rows: Vec<usize> = (0..self.rows.len()).filter(|&row| self.rows[row].split == name).collect();
        if rows.is_empty() {
            let mut splits: BTreeMap<&str, usize> = BTreeMap::new();
            for row in &self.rows {
                *splits.entry(&row.split).or_default() += 1;
            }
            let there: Vec<String> = splits.iter().map(|(name, rows)| format!("`{name}` ({rows} rows)")).collect();
            bail!("the tokens have no split `{name}`; there are {}", there.join(", "));
        }
        Ok(rows)
    }

    /// The place of a row's tokens in `ids` and `mask`.
    pub fn range(&self, row: usize) -> Range<usize> {
        self.offsets[row] as usize..self.offsets[row + 1] as usize
    }

    /// The ids of a row: `bos prompt reply eos`, then further turns.
    pub fn row_ids(&self, row: usize) -> &[i32] {
        &self.ids[self.range(row)]
    }

    /// The loss mask of a row, 1 where the token is a target.
    pub fn row_mask(&self, row: usize) -> &[u8] {
        &self.mask[self.range(row)]
    }

    /// The ids of a row's `bos` and prompt: what generation starts from.
    pub fn prompt_ids(&self, row: usize) -> &[i32] {
        &self.row_ids(row)[..self.prompt_lengths[row] as usize]
    }

    fn check(&self) -> anyhow::Result<()> {
        let rows = self.rows.len();
        ensure!(self.mask.len() == self.ids.len(), "{} masks for {} tokens", self.mask.len(), self.ids.len());
        ensure!(self.offsets.len() == rows + 1, "{} offsets for {rows} rows", self.offsets.len());
        ensure!(self.prompt_lengths.len() == rows, "{} prompt lengths for {rows} rows", self.prompt_lengths.len());
        ensure!(self.offsets[0] == 0 && self.offsets[rows] == self.ids.len() as i64, "offsets do not span the tokens");
        for (row, (bounds, &prompt)) in self.offsets.windows(2).zip(&self.prompt_lengths).enumerate() {
            let length = bounds[1] - bounds[0];
            ensure!(
                prompt >= 1 && i64::from(prompt) <= length,
                "row {row} has a prompt of {prompt} in {length} tokens"
            );
        }
        Ok(())
    }
}

/// Writes [`TENSORS_FILE`] into `folder`: what [`TokensFolder`] has under the same names.
pub(crate) fn save_tensors(
    folder: &Path,
    ids: &[i32],
    offsets: &[i64],
    mask: &[u8],
    prompt_lengths: &[i32],
) -> anyhow::Result<()> {
    let path = folder.join(TENSORS_FILE);
    let (tokens, rows) = (ids.len(), prompt_lengths.len());
    let ids: Vec<u8> = ids.iter().flat_map(|id| id.to_le_bytes()).collect();
    let offsets: Vec<u8> = offsets.iter().flat_map(|offset| offset.to_le_bytes()).collect();
    let lengths: Vec<u8> = prompt_lengths.iter().flat_map(|length| length.to_le_bytes()).collect();
    let save = || {
        let tensors = [
            ("ids", TensorView::new(Dtype::I32, vec![tokens], &ids)?),
            ("mask", TensorView::new(Dtype::U8, vec![tokens], mask)?),
            ("offsets", TensorView::new(Dtype::I64, vec![rows + 1], &offsets)?),
            ("prompt_lengths", TensorView::new(Dtype::I32, vec![rows], &lengths)?),
        ];
        anyhow::Ok(std::fs::write(&path, safetensors::serialize(tensors, None)?)?)
    };
    save().with_context(|| format!("writing `{}`", path.display()))
}

fn tensor<const WIDTH: usize, T>(
    tensors: &SafeTensors<'_>,
    name: &str,
    dtype: Dtype,
    read: fn([u8; WIDTH]) -> T,
) -> anyhow::Result<Vec<T>> {
    let view = tensors.tensor(name).with_context(|| format!("tensor `{name}`"))?;
    ensure!(view.dtype() == dtype, "tensor `{name}` is {:?}, not {dtype:?}", view.dtype());
    ensure!(view.shape().len() == 1, "tensor `{name}` has the shape {:?}", view.shape());
    Ok(view.data().as_chunks::<WIDTH>().0.iter().map(|bytes| read(*bytes)).collect())
}

fn read_rows(path: &Path) -> anyhow::Result<Vec<Row>> {
    let mut columns = table::read(path, &["instance", "split", "stratum", "prompt", "data"])?.into_iter();
    let mut next = |name: &str| match columns.next() {
        Some(Column::Text(values)) => Ok(values),
        _ => bail!("column `{name}` of `{}` does not hold text", path.display()),
    };
    let (instance, split, stratum) = (next("instance")?, next("split")?, next("stratum")?);
    let (prompt, data) = (next("prompt")?, next("data")?);
    let mut rows = Vec::with_capacity(instance.len());
    for ((((instance, split), stratum), prompt), data) in
        instance.into_iter().zip(split).zip(stratum).zip(prompt).zip(data)
    {
        let place = || format!("row {} of `{}`", rows.len(), path.display());
        let data = data.map(|text| serde_json::from_str(&text)).transpose().with_context(place)?;
        let instance = instance.with_context(|| format!("{} has no `instance`", place()))?;
        let split = split.with_context(|| format!("{} has no `split`", place()))?;
        let prompt = prompt.with_context(|| format!("{} has no `prompt`", place()))?;
        rows.push(Row { instance, split, stratum, prompt, data });
    }
    Ok(rows)
}
