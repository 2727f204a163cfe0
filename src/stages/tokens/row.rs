//! What a row of tokens was made from: who it is, and its texts, which are read when they are asked for.
//!
//! The prompts of mazes take more memory than everything else of their rows, and a training looks at none but those that it
//! validates on.

use std::collections::HashSet;
use std::path::Path;
use std::sync::{Arc, OnceLock};

use anyhow::{Context as _, bail, ensure};
use serde_json::Value;

use crate::stages::table::{self, Column};

/// What a row of tokens was made from, but for its texts: [`TokensFolder`](super::TokensFolder) gives those.
#[derive(Clone, Debug)]
pub struct Row {
    /// The instance's id, such as `test-000017`.
    pub instance: Box<str>,
    /// The split it belongs to.
    pub split: Arc<str>,
    /// The class by which results are broken down, where the task has one.
    pub stratum: Option<Arc<str>>,
    texts: OnceLock<Texts>,
}

/// The texts of a row.
#[derive(Clone, Debug)]
pub(super) struct Texts {
    prompt: Box<str>,
    data: Option<Box<str>>,
    parsed: OnceLock<Box<Value>>,
}

impl Texts {
    fn new(prompt: String, data: Option<String>) -> Self {
        Self { prompt: prompt.into(), data: data.map(Into::into), parsed: OnceLock::new() }
    }

    pub(super) fn prompt(&self) -> &str {
        &self.prompt
    }

    pub(super) fn data_text(&self) -> Option<&str> {
        self.data.as_deref()
    }

    pub(super) fn data(&self) -> anyhow::Result<Option<&Value>> {
        let Some(text) = &self.data else { return Ok(None) };
        if let Some(value) = self.parsed.get() {
            return Ok(Some(value));
        }
        let value = Box::new(serde_json::from_str(text)?);
        Ok(Some(self.parsed.get_or_init(|| value)))
    }
}

impl Row {
    /// A row that is in no file: the id of its instance, its split, its class, the text that the model reads first, and the
    /// task instance.
    pub fn new(instance: &str, split: &str, stratum: Option<String>, prompt: String, data: Option<&Value>) -> Self {
        let stratum = stratum.map(Into::into);
        let texts = OnceLock::from(Texts::new(prompt, data.map(ToString::to_string)));
        Self { instance: instance.into(), split: split.into(), stratum, texts }
    }

    pub(super) fn texts(&self) -> Option<&Texts> {
        self.texts.get()
    }
}

/// Names of which there are few, each in memory once.
#[derive(Default)]
struct Names(HashSet<Arc<str>>);

impl Names {
    fn one(&mut self, name: &str) -> Arc<str> {
        if let Some(name) = self.0.get(name) {
            return Arc::clone(name);
        }
        let name: Arc<str> = name.into();
        self.0.insert(Arc::clone(&name));
        name
    }
}

/// The rows of the file at `path`, without their texts.
pub(super) fn read(path: &Path) -> anyhow::Result<Vec<Row>> {
    let (mut rows, mut names) = (Vec::new(), Names::default());
    table::scan(path, &["instance", "split", "stratum"], |columns| {
        let [instance, split, stratum] = texts_of(columns)?;
        for ((instance, split), stratum) in instance.into_iter().zip(split).zip(stratum) {
            let place = || format!("row {} of `{}`", rows.len(), path.display());
            rows.push(Row {
                instance: instance.with_context(|| format!("{} has no `instance`", place()))?.into(),
                split: names.one(&split.with_context(|| format!("{} has no `split`", place()))?),
                stratum: stratum.map(|stratum| names.one(&stratum)),
                texts: OnceLock::new(),
            });
        }
        Ok(())
    })?;
    Ok(rows)
}

/// Gives the rows of `split`, or all where it is `None`, their texts from the file at `path`, in which they stand in the
/// same order.
pub(super) fn read_texts(path: &Path, rows: &[Row], split: Option<&str>) -> anyhow::Result<()> {
    let mut row = 0;
    table::scan(path, &["instance", "prompt", "data"], |columns| {
        let [instance, prompt, data] = texts_of(columns)?;
        for ((instance, prompt), data) in instance.into_iter().zip(prompt).zip(data) {
            let place = || format!("row {row} of `{}`", path.display());
            let about = rows.get(row).filter(|about| Some(&*about.instance) == instance.as_deref());
            let about = about.with_context(|| format!("{} is another than it was", place()))?;
            if split.is_none_or(|split| *about.split == *split) && about.texts.get().is_none() {
                let prompt = prompt.with_context(|| format!("{} has no `prompt`", place()))?;
                about.texts.get_or_init(|| Texts::new(prompt, data));
            }
            row += 1;
        }
        Ok(())
    })
}

fn texts_of<const COUNT: usize>(columns: Vec<Column>) -> anyhow::Result<[Vec<Option<String>>; COUNT]> {
    let texts = columns.into_iter().map(|column| match column {
        Column::Text(values) => Ok(values),
        _ => bail!("a column of `{}` does not hold text", super::ROWS_FILE),
    });
    let texts: Vec<_> = texts.collect::<anyhow::Result<_>>()?;
    let count = texts.len();
    let texts = texts.try_into().ok();
    ensure!(texts.is_some(), "{count} columns were read where {COUNT} are");
    texts.context("no columns")
}

#[cfg(test)]
mod tests {
    use std::fs;

    use crate::stages::table::{Column, TableWriter, read};
    use crate::stages::testing::{maze_tokens, strings};
    use crate::stages::tokens::{COLUMNS, ROWS_FILE, TENSORS_FILE, TokensFolder};

    fn with_texts(tokens: &TokensFolder) -> usize {
        tokens.rows.iter().filter(|row| row.texts().is_some()).count()
    }

    #[test]
    fn texts_are_read_a_split_at_a_time_and_only_when_they_are_asked_for() {
        let folder = tempfile::tempdir().unwrap();
        let path = maze_tokens(folder.path());
        let mut columns = read(&path.join(ROWS_FILE), &["prompt", "data"]).unwrap();
        let data = strings(columns.pop().unwrap());
        let prompts = strings(columns.pop().unwrap());
        let tokens = TokensFolder::open(&path).unwrap();
        assert_eq!(with_texts(&tokens), 0);
        for (split, read) in [("validation", 10), ("rl", 40), ("rl", 40), ("train", 60)] {
            for row in tokens.split(split).unwrap() {
                assert_eq!(tokens.prompt(row).unwrap(), prompts[row]);
                assert_eq!(tokens.data_text(row).unwrap(), Some(data[row].as_str()));
                assert_eq!(tokens.data(row).unwrap().unwrap().to_string(), data[row]);
            }
            assert_eq!(with_texts(&tokens), read);
        }
        let tokens = TokensFolder::open(&path).unwrap();
        tokens.read_texts().unwrap();
        assert_eq!(with_texts(&tokens), 60);
    }

    #[test]
    fn a_file_that_is_another_than_it_was_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let path = maze_tokens(folder.path());
        let tokens = TokensFolder::open(&path).unwrap();
        let rows = path.join(ROWS_FILE);
        let names: Vec<&str> = COLUMNS.iter().map(|(name, _)| *name).collect();
        let mut columns = read(&rows, &names).unwrap();
        let mut write = |column: usize, text: &str| {
            let Column::Text(values) = &mut columns[column] else { panic!("no text") };
            values[3] = Some(text.to_owned());
            fs::remove_file(&rows).unwrap();
            let mut table = TableWriter::create(&rows, COLUMNS).unwrap();
            table.write(columns.clone()).unwrap();
            table.finish().unwrap();
        };
        write(5, "{");
        assert!(tokens.prompt(3).is_ok());
        let error = format!("{:#}", tokens.data(3).unwrap_err());
        assert!(error.starts_with("row 3 of `") && error.contains("EOF"), "{error}");
        write(1, "rl-999999");
        let error = format!("{:#}", TokensFolder { rows: tokens.rows.clone(), ..tokens }.read_texts().unwrap_err());
        assert!(error.contains("row 3 of `") && error.contains("is another than it was"), "{error}");
    }

    #[test]
    fn tensors_that_are_cut_off_or_too_long_are_refused() {
        let folder = tempfile::tempdir().unwrap();
        let path = maze_tokens(folder.path());
        let file = path.join(TENSORS_FILE);
        let whole = fs::read(&file).unwrap();
        for bytes in [whole[..whole.len() - 1].to_vec(), [&whole[..], b"x"].concat(), whole[..20].to_vec(), vec![1; 4]]
        {
            fs::write(&file, &bytes).unwrap();
            let error = format!("{:#}", TokensFolder::open(&path).unwrap_err());
            assert!(error.contains(TENSORS_FILE), "{error}");
        }
        fs::write(&file, &whole).unwrap();
        assert_eq!(TokensFolder::open(&path).unwrap().rows.len(), 60);
    }
}
