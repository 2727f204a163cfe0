//! A running program with its three pipes, each served by a thread, so that no call waits longer than it may.

use std::io::{BufRead as _, BufReader, Read, Write as _};
use std::process::{Child, ChildStdin, ExitStatus};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, SyncSender, TryRecvError, channel, sync_channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, WaitId, WaitIdOptions, waitid};
use serde::de::DeserializeOwned;

use crate::program::child::{signal, unwatch, watch};

/// How often a waiting call looks at the interrupt.
const ASK: Duration = Duration::from_millis(50);
/// How long a program may take to end once its input has ended.
const GRACE: Duration = Duration::from_secs(1);
/// Bytes of standard error that are kept.
const SAID: usize = 1 << 12;
/// Lines of standard error that an error shows.
const SAID_LINES: usize = 15;
/// Characters of an answer that an error shows.
const SHOWN: usize = 120;

/// What went wrong in a call.
pub(super) enum Trouble {
    /// Standard output ended; so many bytes of an unfinished line were there.
    Ended { pending: usize },
    /// No line in time; so many bytes of one were there.
    Timeout { pending: usize },
    /// The protocol was broken; the words follow the program's name.
    Answer(String),
    /// The interrupt was set.
    Interrupted,
}

/// What the thread of standard output tells.
enum Output {
    Line(Vec<u8>),
    TooLong,
    Ended,
}

/// A program that has started and has not been ended.
pub(super) struct Running {
    child: Child,
    group: Pid,
    ended: bool,
    requests: Option<Sender<Vec<u8>>>,
    answers: Receiver<Output>,
    /// Bytes of the line that is being read.
    pending: Arc<AtomicUsize>,
    said: Arc<Said>,
}

/// The last bytes of standard error.
#[derive(Default)]
struct Said {
    bytes: Mutex<Vec<u8>>,
    ended: AtomicBool,
}

impl Running {
    /// Takes charge of a child whose three streams are pipes.
    pub(super) fn new(mut child: Child, longest: usize) -> std::io::Result<Self> {
        let group = Pid::from_child(&child);
        if let Err(error) = watch(group) {
            signal(group, Signal::KILL);
            child.wait()?;
            return Err(error);
        }
        let missing = || std::io::Error::other("a pipe is missing");
        let stdin = child.stdin.take().ok_or_else(missing)?;
        let stdout = child.stdout.take().ok_or_else(missing)?;
        let stderr = child.stderr.take().ok_or_else(missing)?;
        let (requests, to_write) = channel();
        // An answer is taken as it comes; one more may wait, and a program that goes on writing has to wait itself.
        let (to_read, answers) = sync_channel(1);
        let (pending, said) = (Arc::<AtomicUsize>::default(), Arc::<Said>::default());
        let (counted, kept) = (Arc::clone(&pending), Arc::clone(&said));
        std::thread::spawn(move || write(stdin, &to_write));
        std::thread::spawn(move || read(stdout, longest, &counted, &to_read));
        std::thread::spawn(move || listen(stderr, &kept));
        Ok(Self { child, group, ended: false, requests: Some(requests), answers, pending, said })
    }

    /// Sends a request line and waits for the answer line.
    pub(super) fn ask(
        &mut self,
        line: Vec<u8>,
        timeout: Duration,
        interrupt: Option<&AtomicBool>,
    ) -> Result<Vec<u8>, Trouble> {
        match self.answers.try_recv() {
            Err(TryRecvError::Empty) => {}
            Err(TryRecvError::Disconnected) | Ok(Output::Ended) => return Err(self.ended()),
            Ok(Output::Line(line)) => {
                return Err(Trouble::Answer(format!("wrote a line that nobody asked for: `{}`", shown(&line))));
            }
            Ok(Output::TooLong) => return Err(too_long()),
        }
        if let Some(requests) = &self.requests {
            // Without its thread the program has closed its input; what it does next says why.
            let _ = requests.send(line);
        }
        let began = Instant::now();
        loop {
            if interrupt.is_some_and(|interrupt| interrupt.load(Ordering::Relaxed)) {
                return Err(Trouble::Interrupted);
            }
            let left = timeout.saturating_sub(began.elapsed());
            if left.is_zero() {
                return Err(Trouble::Timeout { pending: self.pending.load(Ordering::Relaxed) });
            }
            let wait = if interrupt.is_some() { left.min(ASK) } else { left };
            match self.answers.recv_timeout(wait) {
                Ok(Output::Line(line)) => return Ok(line),
                Ok(Output::TooLong) => return Err(too_long()),
                Ok(Output::Ended) | Err(RecvTimeoutError::Disconnected) => return Err(self.ended()),
                Err(RecvTimeoutError::Timeout) => {}
            }
        }
    }

    fn ended(&self) -> Trouble {
        Trouble::Ended { pending: self.pending.load(Ordering::Relaxed) }
    }

    /// Ends the program; gives its status, where it ended by itself, and what it said. With `patient` it may first do so.
    pub(super) fn end(mut self, patient: bool) -> (Option<ExitStatus>, String) {
        let status = self.finish(if patient { GRACE } else { Duration::ZERO });
        // A grandchild that left the group may hold the pipe, so that the end of the stream never comes.
        let began = Instant::now();
        while !self.said.ended.load(Ordering::Acquire) && began.elapsed() < GRACE / 4 {
            std::thread::sleep(Duration::from_millis(2));
        }
        let bytes = self.said.bytes.lock().unwrap_or_else(PoisonError::into_inner);
        let text = String::from_utf8_lossy(&bytes);
        let lines: Vec<&str> = text.trim_end().lines().collect();
        let lines = lines[lines.len().saturating_sub(SAID_LINES)..].join("\n");
        (status, if lines.is_empty() { String::new() } else { format!("; it said:\n{lines}") })
    }

    fn finish(&mut self, grace: Duration) -> Option<ExitStatus> {
        if self.ended {
            return None;
        }
        self.ended = true;
        self.requests = None;
        let began = Instant::now();
        // The program is left unreaped here, so that its group's number cannot be another's when it is killed.
        let options = WaitIdOptions::EXITED | WaitIdOptions::NOWAIT | WaitIdOptions::NOHANG;
        let by_itself = loop {
            if matches!(waitid(WaitId::Pid(self.group), options), Ok(Some(_))) {
                break true;
            }
            if began.elapsed() >= grace {
                break false;
            }
            std::thread::sleep(Duration::from_millis(2));
        };
        signal(self.group, Signal::KILL);
        let status = self.child.wait().ok();
        unwatch(self.group);
        // A kill of ours says nothing of the program.
        status.filter(|_| by_itself)
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        self.finish(GRACE);
    }
}

fn too_long() -> Trouble {
    Trouble::Answer("wrote an answer line that is longer than 64 MiB".to_owned())
}

/// Reads an answer; the words of the error follow the program's name.
pub(super) fn parse<A: DeserializeOwned>(line: &[u8]) -> Result<A, Trouble> {
    serde_json::from_slice(line).map_err(|error| {
        let kind = match error.classify() {
            serde_json::error::Category::Data => "answered JSON of another form than was asked for",
            _ => "answered a line that is no JSON (standard output is for answers alone)",
        };
        // Python's `json.dumps` writes these names unless it is told not to.
        if error.is_syntax() && ["NaN", "Infinity"].iter().any(|name| contains(line, name.as_bytes())) {
            return Trouble::Answer(format!("answered `NaN` or `Infinity`, which is no number: `{}`", shown(line)));
        }
        // The place in a line of its own says nothing.
        let error = error.to_string();
        let error = error.split(" at line ").next().unwrap_or_default();
        Trouble::Answer(format!("{kind}: {error}: `{}`", shown(line)))
    })
}

fn contains(line: &[u8], word: &[u8]) -> bool {
    line.windows(word.len()).any(|window| window == word)
}

/// The beginning of a line for an error.
fn shown(line: &[u8]) -> String {
    let text = String::from_utf8_lossy(&line[..line.len().min(4 * SHOWN)]);
    let text = text.trim_end();
    if text.chars().count() <= SHOWN { text.to_owned() } else { text.chars().take(SHOWN).collect::<String>() + "..." }
}

fn write(mut stdin: ChildStdin, requests: &Receiver<Vec<u8>>) {
    while let Ok(line) = requests.recv() {
        if stdin.write_all(&line).and_then(|()| stdin.flush()).is_err() {
            return;
        }
    }
}

fn read(stdout: impl Read, longest: usize, pending: &AtomicUsize, answers: &SyncSender<Output>) {
    let mut stdout = BufReader::with_capacity(1 << 16, stdout);
    let mut line = Vec::new();
    loop {
        let (taken, whole) = match stdout.fill_buf() {
            Ok([]) => break,
            Ok(bytes) => {
                let end = bytes.iter().position(|byte| *byte == b'\n');
                line.extend_from_slice(&bytes[..end.unwrap_or(bytes.len())]);
                (end.map_or(bytes.len(), |end| end + 1), end.is_some())
            }
            Err(error) if error.kind() == std::io::ErrorKind::Interrupted => continue,
            Err(_) => break,
        };
        stdout.consume(taken);
        if line.len() > longest {
            let _ = answers.send(Output::TooLong);
            return;
        }
        if whole {
            pending.store(0, Ordering::Relaxed);
            if answers.send(Output::Line(std::mem::take(&mut line))).is_err() {
                return;
            }
        } else {
            pending.store(line.len(), Ordering::Relaxed);
        }
    }
    let _ = answers.send(Output::Ended);
}

fn listen(mut stderr: impl Read, said: &Said) {
    let mut buffer = [0; 4096];
    while let Ok(count @ 1..) = stderr.read(&mut buffer) {
        let mut bytes = said.bytes.lock().unwrap_or_else(PoisonError::into_inner);
        bytes.extend_from_slice(&buffer[..count]);
        let surplus = bytes.len().saturating_sub(SAID);
        bytes.drain(..surplus);
    }
    said.ended.store(true, Ordering::Release);
}
