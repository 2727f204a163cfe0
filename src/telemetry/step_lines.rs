//! A JSONL log with one object a line and a `step` in each, that stays one continuous log over kills and resumes.

use std::fs::File;
use std::io::{self, Write as _};
use std::path::{Path, PathBuf};

use serde_json::Value;

/// A log under way. A line is written whole and handed to the system at once.
#[derive(Debug)]
pub struct StepLines {
    file: File,
    /// The length of the whole lines; a line that a full disk cut off is taken back to here.
    length: u64,
}

impl StepLines {
    /// Opens the log at `path`, keeping the lines of steps up to `resumed_step` (none when the run begins anew).
    ///
    /// What an earlier attempt wrote after the state that is resumed from would stand twice; it is cut off by an atomic
    /// rewrite, and so is a line that a kill left unfinished.
    pub fn open(path: &Path, resumed_step: Option<u64>) -> io::Result<Self> {
        if let Some(folder) = path.parent() {
            std::fs::create_dir_all(folder)?;
        }
        let old = match std::fs::read(path) {
            Ok(old) => old,
            Err(error) if error.kind() == io::ErrorKind::NotFound => Vec::new(),
            Err(error) => return Err(error),
        };
        let keep = |line: &&[u8]| {
            let step = serde_json::from_slice::<Value>(line).ok().and_then(|line| line.get("step")?.as_u64());
            line.ends_with(b"\n") && step.is_some_and(|step| resumed_step.is_some_and(|last| step <= last))
        };
        let kept = old.split_inclusive(|byte| *byte == b'\n').filter(keep).collect::<Vec<_>>().concat();
        if kept != old {
            let mut beside = path.as_os_str().to_owned();
            beside.push(".new");
            let beside = PathBuf::from(beside);
            std::fs::write(&beside, &kept)?;
            std::fs::rename(&beside, path)?;
        }
        let file = File::options().append(true).create(true).open(path)?;
        Ok(Self { file, length: kept.len() as u64 })
    }

    /// Writes one line; `line` has a field `step`.
    pub fn append(&mut self, line: &Value) -> io::Result<()> {
        let mut text = line.to_string();
        text.push('\n');
        if let Err(error) = self.file.write_all(text.as_bytes()) {
            self.file.set_len(self.length)?;
            return Err(error);
        }
        self.length += text.len() as u64;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn a_resumed_log_is_the_log_of_an_uninterrupted_run() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("metrics.jsonl");
        let line = |step: u64| json!({"step": step, "loss": 1.0 / (step as f64 + 1.0)});
        let whole: Vec<String> = (1..=6).map(|step| line(step).to_string()).collect();
        let mut lines = StepLines::open(&path, None).unwrap();
        for step in 1..=5 {
            lines.append(&line(step)).unwrap();
        }
        drop(lines);
        let mut torn = std::fs::read(&path).unwrap();
        torn.extend(b"{\"step\":3,\"lo");
        std::fs::write(&path, torn).unwrap();
        let mut lines = StepLines::open(&path, Some(3)).unwrap();
        for step in 4..=6 {
            lines.append(&line(step)).unwrap();
        }
        assert_eq!(std::fs::read_to_string(&path).unwrap().lines().collect::<Vec<_>>(), whole);
        StepLines::open(&path, None).unwrap();
        assert_eq!(std::fs::read(&path).unwrap(), b"");
    }
}
