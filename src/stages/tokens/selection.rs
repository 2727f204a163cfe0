//! Rows of a `Tokens` artifact on their way into another one: as they are, or with another completion behind their prompt.
//!
//! Task, tokenizer and what a row was made from go along; nothing is tokenized again.

use std::collections::BTreeMap;
use std::ops::Range;
use std::path::Path;

use super::{COLUMNS, ROWS_FILE, TASK_FILE, TOKENIZER_FOLDER, TaskFile, TokensFolder, save_tensors};
use crate::stages::table::{Column, TableWriter};
use crate::stages::tokenize::{copy_files, write_json};

/// Rows written to a table at a time.
const CHUNK: usize = 8_192;

/// The rows taken so far.
pub struct Selection<'a> {
    from: &'a TokensFolder,
    ids: Vec<i32>,
    offsets: Vec<i64>,
    mask: Vec<u8>,
    prompt_lengths: Vec<i32>,
    /// The rows of `from`.
    rows: Vec<usize>,
    longest: usize,
}

impl<'a> Selection<'a> {
    /// No rows yet, of those of `from`.
    pub fn new(from: &'a TokensFolder) -> Self {
        let offsets = vec![0];
        Self { from, ids: vec![], offsets, mask: vec![], prompt_lengths: vec![], rows: vec![], longest: 0 }
    }

    /// Takes the row `row` as it is.
    pub fn take(&mut self, row: usize) {
        self.ids.extend(self.from.row_ids(row));
        self.mask.extend(self.from.row_mask(row));
        self.end_row(row);
    }

    /// Takes the prompt of the row `row` with the completion `ids`, whose targets are the places `replies` in it.
    pub fn take_completed(&mut self, row: usize, ids: &[i32], replies: &[Range<usize>]) {
        self.ids.extend(self.from.prompt_ids(row));
        self.mask.resize(self.ids.len(), 0);
        let begin = self.ids.len();
        self.ids.extend(ids);
        self.mask.resize(self.ids.len(), 0);
        for reply in replies {
            self.mask[begin + reply.start..begin + reply.end].fill(1);
        }
        self.end_row(row);
    }

    fn end_row(&mut self, row: usize) {
        let begin = self.offsets.last().map_or(0, |begin| *begin as usize);
        self.longest = self.longest.max(self.ids.len() - begin);
        self.offsets.push(self.ids.len() as i64);
        self.prompt_lengths.push(self.from.prompt_lengths[row]);
        self.rows.push(row);
    }

    /// Writes the artifact into the empty folder `folder`; gives the counts of its `metrics.json`, which the caller writes.
    pub fn save(self, folder: &Path) -> anyhow::Result<BTreeMap<String, u64>> {
        self.from.read_texts()?;
        let mut table = TableWriter::create(&folder.join(ROWS_FILE), COLUMNS)?;
        for (chunk, rows) in self.rows.chunks(CHUNK).enumerate() {
            let first = (chunk * CHUNK) as i64;
            let about = || rows.iter().map(|row| &self.from.rows[*row]);
            let prompts = rows.iter().map(|row| Ok(Some(self.from.prompt(*row)?.to_owned())));
            let data = rows.iter().map(|row| Ok(self.from.data_text(*row)?.map(str::to_owned)));
            table.write(vec![
                Column::integer(first..first + rows.len() as i64),
                Column::text(about().map(|row| row.instance.to_string())),
                Column::text(about().map(|row| row.split.to_string())),
                Column::Text(about().map(|row| row.stratum.as_deref().map(str::to_owned)).collect()),
                Column::Text(prompts.collect::<anyhow::Result<_>>()?),
                Column::Text(data.collect::<anyhow::Result<_>>()?),
            ])?;
        }
        table.finish()?;
        save_tensors(folder, &self.ids, &self.offsets, &self.mask, &self.prompt_lengths)?;
        let (task, format) = self.from.task.clone().unzip();
        let task = task.map(|task| task.store(folder)).transpose()?;
        let file = TaskFile { task, format, tokenizer: self.from.tokenizer_digest.clone(), chat: self.from.chat };
        write_json(&folder.join(TASK_FILE), &file)?;
        copy_files(&self.from.path.join(TOKENIZER_FOLDER), &folder.join(TOKENIZER_FOLDER))?;
        let mut counts = BTreeMap::from([
            ("rows".to_owned(), self.rows.len() as u64),
            ("tokens".to_owned(), self.ids.len() as u64),
            ("target_tokens".to_owned(), self.mask.iter().map(|&target| u64::from(target)).sum()),
            ("longest_row".to_owned(), self.longest as u64),
        ]);
        for row in &self.rows {
            *counts.entry(format!("rows.{}", self.from.rows[*row].split)).or_default() += 1;
        }
        Ok(counts)
    }
}
