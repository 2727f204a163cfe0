//! Programs of the user's that answer questions: one request line of JSON, one answer line of JSON, over pipes.
//!
//! # The protocol
//!
//! A program is started once and answers many times. It reads a line from its standard input, which is one JSON object, and
//! writes one line to its standard output, which is one JSON value; then it waits for the next line. It ends when its input
//! ends. Standard output belongs to the answers; what it writes to standard error is kept for error messages. What the
//! objects say is the affair of who asks: `rewards` and `tasks` document theirs.
//!
//! It runs in a folder of its own that holds exactly the files which its parameters place there, with `PATH`, `HOME` and
//! `LANG` as its whole environment, in a process group of its own: a Ctrl-C reaches this process, and not the program. It
//! inherits no descriptor but its three pipes.
//!
//! # What can go wrong
//!
//! Every mistake of a program is a [`ProgramError`] that names the program: it cannot be started, it crashes (the exit
//! status and the last lines of its standard error are shown), it answers too late, too much, no JSON, or more often than
//! it was asked. After an error the program is ended, with all that it started in its group, and answers no more.

pub(crate) mod child;
mod running;

use std::ffi::OsString;
use std::path::Path;
use std::process::Stdio;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::Duration;

use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::file::{PlacedFile, lay_out};
use running::Running;

/// What of this process's environment a program sees.
const INHERITED: [&str; 3] = ["PATH", "HOME", "LANG"];

/// Bytes of an answer, at most.
const LONGEST_ANSWER: usize = 64 << 20;

/// The variables that every program of the user's is given.
pub fn inherited() -> impl Iterator<Item = (OsString, OsString)> {
    INHERITED.iter().filter_map(|name| std::env::var_os(name).map(|value| ((*name).into(), value)))
}

/// Why a program gave no answer. Every message names the program.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum ProgramError {
    /// It could not be started.
    #[error("{0}")]
    Start(String),
    /// It ended instead of answering.
    #[error("the program `{program}` {how}{said}")]
    Ended {
        /// Its name.
        program: String,
        /// How, as `ended with exit status 3`.
        how: String,
        /// The last lines of its standard error, with what leads to them.
        said: String,
    },
    /// It did not answer in time.
    #[error("the program `{program}` gave no answer within {seconds} s{so_far}{said}")]
    Timeout {
        /// Its name.
        program: String,
        /// The limit in seconds.
        seconds: f64,
        /// What it had written of its answer.
        so_far: String,
        /// The last lines of its standard error, with what leads to them.
        said: String,
    },
    /// It broke the protocol: no JSON, an answer of another form, two answers.
    #[error("the program `{program}` {what}{said}")]
    Answer {
        /// Its name.
        program: String,
        /// What it did.
        what: String,
        /// The last lines of its standard error, with what leads to them.
        said: String,
    },
    /// The interrupt was set while it was asked.
    #[error("interrupted")]
    Interrupted,
}

/// How a program is started.
#[derive(Clone, Debug)]
pub struct Launch<'a> {
    /// The program and its arguments.
    pub command: &'a [String],
    /// The files in its working folder.
    pub files: &'a [PlacedFile],
    /// How long it may take for an answer; its start counts for the first.
    pub timeout: Duration,
    /// Ends a call early when it is set.
    pub interrupt: Option<Arc<AtomicBool>>,
}

/// A running program of the user's. Dropped, it is ended.
pub struct Program {
    name: String,
    timeout: Duration,
    interrupt: Option<Arc<AtomicBool>>,
    running: Option<Running>,
    /// Where it runs; removed after its end.
    folder: tempfile::TempDir,
}

impl Program {
    /// Starts a program in a fresh folder.
    pub fn start(launch: &Launch<'_>) -> Result<Self, ProgramError> {
        let start = |message: String| ProgramError::Start(message);
        let Some((name, arguments)) = launch.command.split_first() else {
            return Err(start("no program is named".to_owned()));
        };
        let folder = tempfile::Builder::new().prefix("pipe-program-").tempdir();
        let folder = folder.map_err(|error| start(format!("cannot make a folder for `{name}`: {error}")))?;
        let laid_out = lay_out(launch.files, folder.path());
        laid_out.map_err(|error| start(format!("cannot start `{name}`: {error:#}")))?;
        let path = std::env::var_os("PATH");
        let mut command = child::command(name.as_ref(), path.as_deref());
        command.args(arguments).current_dir(folder.path()).env_clear().envs(inherited());
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let child = child::spawn(&mut command).map_err(start)?;
        let running =
            Running::new(child, LONGEST_ANSWER).map_err(|error| start(format!("cannot start `{name}`: {error}")))?;
        Ok(Self {
            name: name.clone(),
            timeout: launch.timeout,
            interrupt: launch.interrupt.clone(),
            running: Some(running),
            folder,
        })
    }

    /// Asks once. After an error the program has ended.
    pub fn call<A: DeserializeOwned>(&mut self, request: &impl Serialize) -> Result<A, ProgramError> {
        let Some(running) = &mut self.running else {
            return Err(self.answer_error("has ended after an earlier error"));
        };
        let mut line = serde_json::to_vec(request)
            .map_err(|error| ProgramError::Start(format!("the request cannot be written as JSON: {error}")))?;
        line.push(b'\n');
        let asked = running.ask(line, self.timeout, self.interrupt.as_deref());
        match asked.and_then(|answer| running::parse(&answer)) {
            Ok(answer) => Ok(answer),
            Err(trouble) => Err(self.end(trouble)),
        }
    }

    /// Ends the program because of what it answered, as a wrong count; gives the error to return.
    pub fn refuse(&mut self, what: impl Into<String>) -> ProgramError {
        self.end(running::Trouble::Answer(what.into()))
    }

    fn end(&mut self, trouble: running::Trouble) -> ProgramError {
        use running::Trouble;
        let program = self.name.clone();
        let Some(running) = self.running.take() else { return self.answer_error("has ended after an earlier error") };
        let (status, said) = running.end(matches!(trouble, Trouble::Ended { .. }));
        match trouble {
            Trouble::Interrupted => ProgramError::Interrupted,
            Trouble::Answer(what) => ProgramError::Answer { program, what, said },
            Trouble::Timeout { pending } => {
                let so_far = if pending == 0 {
                    "; it must write one line for every line that it reads, and flush it".to_owned()
                } else {
                    format!("; it has written {pending} bytes without a line end")
                };
                ProgramError::Timeout { program, seconds: self.timeout.as_secs_f64(), so_far, said }
            }
            Trouble::Ended { pending } => {
                let mut how = match status {
                    Some(status) => child::how(status).unwrap_or_else(|| "ended without an answer".to_owned()),
                    None => "closed its standard output without ending".to_owned(),
                };
                if pending > 0 {
                    how = format!("{how} in the middle of an answer line");
                }
                ProgramError::Ended { program, how, said }
            }
        }
    }

    /// The folder in which it runs.
    pub fn folder(&self) -> &Path {
        self.folder.path()
    }

    fn answer_error(&self, what: &str) -> ProgramError {
        ProgramError::Answer { program: self.name.clone(), what: what.to_owned(), said: String::new() }
    }
}

#[cfg(test)]
mod tests;
