//! Reading a `Tokens` artifact: ids, row offsets and loss masks in memory, and the rows they came from, whose texts stay in
//! the file until they are asked for.
//!
//! The layout of the folder: `tokens.safetensors` (`ids` i32 `[tokens]`, `offsets` i64 `[rows + 1]`, `mask` u8 `[tokens]`,
//! `prompt_lengths` i32 `[rows]`), `rows.parquet` (a row each, in the same order), `task.json`, `tokenizer/`,
//! `metrics.json`. A row is `bos prompt reply eos`, with `observation reply eos` after it for every further turn; its tokens
//! are `ids[offsets[row]..offsets[row + 1]]`, of which the first `prompt_lengths[row]` are `bos` and the prompt. Where a chat
//! template wrote the row, its own marks stand for `bos` and `eos`. This module knows the files and no tensor library.

mod row;
mod selection;

pub use row::Row;
pub use selection::Selection;

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{Read as _, Seek as _, SeekFrom};
use std::ops::Range;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, bail, ensure};
use safetensors::Dtype;
use safetensors::tensor::{Metadata, TensorView};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::stages::table::ColumnType;
use crate::tasks::{FormatSpec, TaskSpec};

/// The tensors' file.
pub const TENSORS_FILE: &str = "tokens.safetensors";
/// The rows' file.
pub const ROWS_FILE: &str = "rows.parquet";
/// The file that names the task, the format and the tokenizer.
pub const TASK_FILE: &str = "task.json";
/// The folder with a copy of the tokenizer's files.
pub const TOKENIZER_FOLDER: &str = "tokenizer";

/// Bytes of a tensor read at a time, a multiple of every number's width.
const PIECE: usize = 1 << 20;

/// The columns of [`ROWS_FILE`].
pub(crate) const COLUMNS: &[(&str, ColumnType)] = &[
    ("row", ColumnType::Integer),
    ("instance", ColumnType::Text),
    ("split", ColumnType::Text),
    ("stratum", ColumnType::Text),
    ("prompt", ColumnType::Text),
    ("data", ColumnType::Text),
];

/// A `Tokens` artifact in memory, but for the texts of its rows.
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
    /// What the rows were made from; [`TokensFolder::prompt`] and [`TokensFolder::data`] give their texts.
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
        let tensors = path.join(TENSORS_FILE);
        let read = || {
            let mut tensors = Tensors::open(&tensors)?;
            anyhow::Ok(Self {
                ids: tensors.read("ids", Dtype::I32, i32::from_le_bytes)?,
                offsets: tensors.read("offsets", Dtype::I64, i64::from_le_bytes)?,
                mask: tensors.read("mask", Dtype::U8, u8::from_le_bytes)?,
                prompt_lengths: tensors.read("prompt_lengths", Dtype::I32, i32::from_le_bytes)?,
                rows: row::read(&path.join(ROWS_FILE))?,
                task: task.task.map(|task| task.stored_in(path)).zip(task.format),
                chat: task.chat,
                tokenizer_digest: task.tokenizer,
                path: path.to_owned(),
            })
        };
        let folder = read().with_context(|| format!("reading `{}`", path.display()))?;
        folder.check().with_context(|| format!("`{}` is damaged", path.display()))?;
        Ok(folder)
    }

    /// The indices of the rows of the split `name`, in order; an error lists the splits there are.
    pub fn split(&self, name: &str) -> anyhow::Result<Vec<usize>> {
        let rows: Vec<usize> = (0..self.rows.len()).filter(|&row| *self.rows[row].split == *name).collect();
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

    /// The text that the model reads first in a row, without `bos`.
    ///
    /// The texts of a split are read from the file when the first of them is asked for; what a stage never asks for takes no
    /// memory. An error says what is wrong with the file.
    pub fn prompt(&self, row: usize) -> anyhow::Result<&str> {
        Ok(self.texts(row)?.prompt())
    }

    /// The task instance of a row, parsed once; `None` in a user's own data set.
    pub fn data(&self, row: usize) -> anyhow::Result<Option<&Value>> {
        let place = || format!("row {row} of `{}`", self.path.join(ROWS_FILE).display());
        self.texts(row)?.data().with_context(place)
    }

    /// The task instance of a row as JSON text, as it is stored.
    pub fn data_text(&self, row: usize) -> anyhow::Result<Option<&str>> {
        Ok(self.texts(row)?.data_text())
    }

    /// Reads the texts of all rows, in one go.
    pub fn read_texts(&self) -> anyhow::Result<()> {
        row::read_texts(&self.path.join(ROWS_FILE), &self.rows, None)
    }

    fn texts(&self, row: usize) -> anyhow::Result<&row::Texts> {
        let about = &self.rows[row];
        if about.texts().is_none() {
            row::read_texts(&self.path.join(ROWS_FILE), &self.rows, Some(&about.split))?;
        }
        about.texts().with_context(|| format!("the row `{}` is not in `{ROWS_FILE}`", about.instance))
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

/// The file of tensors, of which one is read at a time: there is never a second copy of more than a piece of one.
struct Tensors {
    file: File,
    metadata: Metadata,
    /// Where the data begin, in bytes from the beginning of the file.
    begin: u64,
}

impl Tensors {
    fn open(path: &Path) -> anyhow::Result<Self> {
        let open = || {
            let mut file = File::open(path)?;
            let mut length = [0; 8];
            file.read_exact(&mut length).context("there is no header")?;
            let (header, size) = (u64::from_le_bytes(length), file.metadata()?.len());
            ensure!(header <= size.saturating_sub(8), "the header is cut off");
            let mut bytes = Vec::new();
            (&file).take(header).read_to_end(&mut bytes)?;
            let metadata: Metadata = serde_json::from_slice(&bytes).context("the header is no header")?;
            let begin = 8 + header;
            let end = begin + metadata.data_len() as u64;
            ensure!(end == size, "there are {size} bytes where {end} should be");
            anyhow::Ok(Self { file, metadata, begin })
        };
        open().with_context(|| format!("reading `{}`", path.display()))
    }

    fn read<const WIDTH: usize, T>(
        &mut self,
        name: &str,
        dtype: Dtype,
        number: fn([u8; WIDTH]) -> T,
    ) -> anyhow::Result<Vec<T>> {
        let info = self.metadata.info(name).with_context(|| format!("`{TENSORS_FILE}` has no tensor `{name}`"))?;
        ensure!(info.dtype == dtype, "tensor `{name}` is {:?}, not {dtype:?}", info.dtype);
        ensure!(info.shape.len() == 1, "tensor `{name}` has the shape {:?}", info.shape);
        let (begin, end) = info.data_offsets;
        let is_whole = begin <= end && end <= self.metadata.data_len() && end - begin == info.shape[0] * WIDTH;
        ensure!(is_whole, "tensor `{name}` has {} numbers in the bytes {begin} to {end}", info.shape[0]);
        self.file.seek(SeekFrom::Start(self.begin + begin as u64))?;
        let mut left = end - begin;
        let mut numbers = Vec::with_capacity(left / WIDTH);
        let mut piece = vec![0; PIECE.min(left)];
        while left > 0 {
            let piece = &mut piece[..PIECE.min(left)];
            self.file.read_exact(piece).with_context(|| format!("tensor `{name}`"))?;
            numbers.extend(piece.as_chunks::<WIDTH>().0.iter().map(|bytes| number(*bytes)));
            left -= piece.len();
        }
        Ok(numbers)
    }
}
