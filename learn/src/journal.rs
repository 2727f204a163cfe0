//! An append-only file of JSON lines in the work folder: a finished chunk of work is a line, and a line is a commit.
//!
//! A kill at any instant leaves whole lines and perhaps a torn one, which is cut off on the next opening. What a line
//! says must be a pure function of the stage's key and of the state that it was computed from; then reading it back and
//! computing it again are the same, and which of the two happens changes no result.

use std::fs::File;
use std::io::{BufRead as _, BufReader, Read as _, Seek as _, SeekFrom, Write as _};
use std::path::{Path, PathBuf};

use anyhow::{Context as _, ensure};
use serde::Serialize;
use serde::de::DeserializeOwned;

/// A journal under way.
#[derive(Debug)]
pub struct Journal {
    file: File,
    path: PathBuf,
    length: u64,
}

impl Journal {
    /// Opens the journal at `path` and gives the lines after the first `committed` bytes, up to the first that is torn
    /// or that `keep` refuses; from there on the file is cut off.
    pub fn open<T: DeserializeOwned>(
        path: &Path,
        committed: u64,
        keep: impl Fn(&T) -> bool,
    ) -> anyhow::Result<(Self, Vec<T>)> {
        let reading = || format!("reading the journal `{}`", path.display());
        let file = File::options().read(true).write(true).create(true).truncate(false).open(path);
        let mut file = file.with_context(reading)?;
        let whole = file.metadata().with_context(reading)?.len();
        ensure!(
            whole >= committed,
            "the journal `{}` has {whole} bytes, the training state counts {committed}; remove the folder to begin anew",
            path.display()
        );
        file.seek(SeekFrom::Start(committed)).with_context(reading)?;
        let mut rest = Vec::new();
        file.read_to_end(&mut rest).with_context(reading)?;
        let (mut length, mut lines) = (committed, Vec::new());
        for line in rest.split_inclusive(|byte| *byte == b'\n').filter(|line| line.ends_with(b"\n")) {
            match serde_json::from_slice::<T>(line) {
                Ok(value) if keep(&value) => lines.push(value),
                _ => break,
            }
            length += line.len() as u64;
        }
        file.set_len(length).with_context(reading)?;
        file.seek(SeekFrom::Start(length)).with_context(reading)?;
        Ok((Self { file, path: path.to_owned(), length }, lines))
    }

    /// Appends one line and hands it to the system.
    pub fn append(&mut self, line: &impl Serialize) -> anyhow::Result<()> {
        let writing = || format!("writing to the journal `{}`", self.path.display());
        let mut bytes = serde_json::to_vec(line).with_context(writing)?;
        bytes.push(b'\n');
        self.file.write_all(&bytes).with_context(writing)?;
        self.length += bytes.len() as u64;
        Ok(())
    }

    /// Waits until every line is on the disk: before a state is saved that counts on them.
    pub fn sync(&self) -> anyhow::Result<()> {
        self.file.sync_data().with_context(|| format!("writing to the journal `{}`", self.path.display()))
    }

    /// Bytes so far.
    pub fn length(&self) -> u64 {
        self.length
    }

    /// Calls `each` with every line from the beginning, one at a time.
    pub fn each<T: DeserializeOwned>(&self, mut each: impl FnMut(T) -> anyhow::Result<()>) -> anyhow::Result<()> {
        let reading = || format!("reading the journal `{}`", self.path.display());
        let file = File::open(&self.path).with_context(reading)?;
        for line in BufReader::new(file).lines() {
            each(serde_json::from_str(&line.with_context(reading)?).with_context(reading)?)?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_follows_the_committed_bytes_is_kept_up_to_the_first_torn_or_foreign_line() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("journal.jsonl");
        let (mut journal, lines) = Journal::open::<u64>(&path, 0, |_| true).unwrap();
        assert!(lines.is_empty());
        for line in 10..14u64 {
            journal.append(&line).unwrap();
        }
        assert_eq!(journal.length(), 12);
        drop(journal);
        let mut torn = std::fs::read(&path).unwrap();
        torn.extend(b"14");
        std::fs::write(&path, torn).unwrap();
        let (_, lines) = Journal::open::<u64>(&path, 3, |line| *line != 13).unwrap();
        assert_eq!(lines, [11, 12]);
        let (journal, lines) = Journal::open::<u64>(&path, 0, |_| true).unwrap();
        assert_eq!(lines, [10, 11, 12]);
        let mut all = Vec::new();
        journal
            .each(|line: u64| {
                all.push(line);
                Ok(())
            })
            .unwrap();
        assert_eq!(all, [10, 11, 12]);
        assert!(Journal::open::<u64>(&path, 100, |_| true).is_err());
    }
}
