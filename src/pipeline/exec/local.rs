//! The two ways in which a stage runs on this machine: on a thread of the driver, or as a `pipe-worker` child process.
//!
//! Both tell the driver the same few things over one channel. It must never decide what runs.

use std::ffi::OsString;
use std::fs::File;
use std::io::{BufRead as _, BufReader, Read as _, Seek as _, SeekFrom, Write as _};
use std::os::fd::{AsRawFd as _, OwnedFd};
use std::os::unix::net::UnixStream;
use std::os::unix::process::{CommandExt as _, ExitStatusExt as _};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Output, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::Sender;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::Scope;
use std::time::Instant;

use rustix::process::{Pid, Signal, WaitId, WaitIdOptions, kill_process, kill_process_group, waitid};

use crate::pipeline::exec::ExecError;
use crate::pipeline::exec::attempt::{AttemptError, Attempted, Request, attempt};
use crate::pipeline::exec::committer::{Finished, ToCommitter};
use crate::pipeline::exec::failure::panic_text;
use crate::pipeline::exec::throttle::Throttle;
use crate::pipeline::exec::worker::Message;
use crate::pipeline::stage::{AnyStage, StageEvent};
use crate::pipeline::store::{Manifest, Store, StoredResult};

/// The lines of a dead worker's log that are shown.
const LOG_LINES: usize = 12;
/// The bytes of its log in which they are looked for.
const LOG_BYTES: u64 = 4096;

/// What a running stage tells the driver.
pub(super) enum News {
    /// It says something.
    Event(StageEvent),
    /// Its outputs can be used. It ends when they are durable.
    Prepared(Box<StoredResult>),
    /// It ended.
    Ended(Ending),
}

/// How a stage ended.
pub(super) enum Ending {
    /// The result is there.
    Done {
        /// The manifest, where it is at hand.
        manifest: Option<Box<Manifest>>,
        /// Whether the stage ran, or found what another process had made meanwhile.
        ran: bool,
    },
    /// It ran, and what it made was lost before it was durable.
    Lost {
        /// What is wrong.
        what: String,
    },
    /// Its work is saved.
    Interrupted,
    /// Another process works on its key.
    Elsewhere,
    /// It failed.
    Failed {
        /// Why, with the chain of causes.
        problem: String,
        /// Whether another attempt in this run would be in vain.
        lasting: bool,
    },
    /// An input is damaged and was put aside.
    Damaged {
        /// The input.
        reference: String,
        /// What is wrong.
        what: String,
    },
}

impl Ending {
    /// A failure that another attempt may not repeat.
    pub(super) fn failed(problem: String) -> Self {
        Self::Failed { problem, lasting: false }
    }
}

/// The channel to the driver, each message with its node.
pub(super) type ToDriver = Sender<(usize, News)>;

/// A way to stop a running stage.
pub(super) enum Running {
    /// A thread watches this.
    Thread(Arc<AtomicBool>),
    /// A process hears signals.
    Worker(Arc<WorkerProcess>),
}

impl Running {
    /// Asks the stage to save and stop.
    pub(super) fn stop(&self) {
        match self {
            Self::Thread(interrupt) => interrupt.store(true, Ordering::Relaxed),
            Self::Worker(worker) => worker.signal(Signal::TERM),
        }
    }

    /// Ends a worker at once. A thread can only be asked.
    pub(super) fn kill(&self) {
        match self {
            Self::Thread(interrupt) => interrupt.store(true, Ordering::Relaxed),
            Self::Worker(worker) => worker.signal(Signal::KILL),
        }
    }
}

/// Sends news to the driver. It listens until every stage has ended, so nobody is there to miss what cannot be sent.
pub(super) fn tell(driver: &ToDriver, node: usize, news: News) {
    if driver.send((node, news)).is_err() {
        tracing::debug!(node, "the driver does not listen any more");
    }
}

/// Runs a stage on a thread.
pub(super) fn start_thread<'scope>(
    scope: &'scope Scope<'scope, '_>,
    store: &'scope Store,
    node: usize,
    request: Request,
    stage: Arc<dyn AnyStage>,
    driver: &ToDriver,
    committer: &ToCommitter,
) -> std::io::Result<Running> {
    let interrupt = Arc::new(AtomicBool::new(false));
    let (driver, committer, asked) = (driver.clone(), committer.clone(), Arc::clone(&interrupt));
    std::thread::Builder::new().name(request.kind.clone()).spawn_scoped(scope, move || {
        let (mut throttle, teller) = (Throttle::default(), driver.clone());
        let events = Box::new(move |event: StageEvent| {
            if throttle.lets_through(&event, Instant::now()) {
                tell(&teller, node, News::Event(event));
            }
        });
        // The driver waits for an ending, whatever happens here.
        let attempted = AssertUnwindSafe(|| attempt(store, &request, &|context| stage.run(context), asked, events));
        let ended = catch_unwind(attempted).unwrap_or_else(|panic| {
            Err(AttemptError::Lasting(anyhow::anyhow!("the engine panicked: {}", panic_text(panic.as_ref()))))
        });
        let ending = match ended {
            Ok(Attempted::Prepared(lock, prepared)) => {
                tell(&driver, node, News::Prepared(Box::new(StoredResult::of(prepared.manifest()))));
                return committer.hand_over(Finished { node, lock, prepared });
            }
            Ok(Attempted::Found(manifest)) => Ending::Done { manifest: Some(manifest), ran: false },
            Err(AttemptError::Interrupted) => Ending::Interrupted,
            Err(AttemptError::Elsewhere) => Ending::Elsewhere,
            Err(AttemptError::DamagedInput { reference, what, .. }) => Ending::Damaged { reference, what },
            Err(AttemptError::Lost(what)) => Ending::Lost { what },
            Err(error @ AttemptError::Lasting(_)) => Ending::Failed { problem: error.to_string(), lasting: true },
            Err(error @ (AttemptError::Failed(_) | AttemptError::Store(_))) => Ending::failed(error.to_string()),
        };
        tell(&driver, node, News::Ended(ending));
    })?;
    Ok(Running::Thread(interrupt))
}

/// What makes products of matrices on a GPU the same at every run: cuBLAS reads it when it is first used. Other values do so,
/// too, with other bits.
const PRODUCTS: (&str, &str) = ("CUBLAS_WORKSPACE_CONFIG", ":4096:8");

/// The worker program, opened once: a rebuild in the middle of a sweep cannot change what the rest of it runs.
#[derive(Debug)]
pub(super) struct WorkerProgram {
    file: File,
    path: PathBuf,
    arguments: Vec<String>,
}

impl WorkerProgram {
    /// The program that `PIPE_WORKER` names, or the `pipe-worker` beside this program.
    pub(super) fn open() -> Result<Self, ExecError> {
        let path = if let Some(path) = std::env::var_os("PIPE_WORKER") {
            PathBuf::from(path)
        } else {
            let own = std::env::current_exe();
            own.map_err(|cause| ExecError::NoWorker { path: "pipe-worker".into(), cause })?
                .with_file_name("pipe-worker")
        };
        Self::at(path, Vec::new())
    }

    /// The program at `path`, to be started with `arguments`.
    pub(super) fn at(path: PathBuf, arguments: Vec<String>) -> Result<Self, ExecError> {
        match File::open(&path) {
            Ok(file) => Ok(Self { file, path, arguments }),
            Err(cause) => Err(ExecError::NoWorker { path, cause }),
        }
    }

    fn command(&self) -> Command {
        // The descriptor is closed in the child, but the name leads through this process, which has it open.
        let opened = PathBuf::from(format!("/proc/{}/fd/{}", std::process::id(), self.file.as_raw_fd()));
        let mut command = Command::new(if opened.exists() { &opened } else { &self.path });
        command.arg0(&self.path).args(&self.arguments).env(PRODUCTS.0, PRODUCTS.1);
        command
    }
}

/// Runs the worker program with `arguments` on this process's standard streams, and gives how it ended.
pub fn run_worker(arguments: &[OsString]) -> Result<ExitStatus, ExecError> {
    let program = WorkerProgram::open()?;
    program
        .command()
        .args(arguments)
        .status()
        .map_err(|cause| ExecError::NoWorker { path: program.path.clone(), cause })
}

/// [`run_worker`] with its standard output as what it gives.
pub fn worker_output(arguments: &[OsString]) -> Result<Output, ExecError> {
    let program = WorkerProgram::open()?;
    let mut command = program.command();
    command.args(arguments).stderr(Stdio::inherit());
    command.output().map_err(|cause| ExecError::NoWorker { path: program.path.clone(), cause })
}

/// A running worker.
pub(super) struct WorkerProcess {
    child: Mutex<Child>,
    /// Whether it was told to stop, and whether it was ended.
    stopped: AtomicBool,
    killed: AtomicBool,
}

impl WorkerProcess {
    fn signal(&self, signal: Signal) {
        let mut child = self.child.lock().unwrap_or_else(PoisonError::into_inner);
        // Until it is waited for, which takes the same lock, the number cannot be another process's.
        if !matches!(child.try_wait(), Ok(None)) {
            return;
        }
        let pid = Pid::from_child(&child);
        let sent = if signal == Signal::KILL {
            self.killed.store(true, Ordering::Relaxed);
            kill_process_group(pid, signal)
        } else {
            self.stopped.store(true, Ordering::Relaxed);
            kill_process(pid, signal)
        };
        if let Err(error) = sent {
            tracing::warn!(%error, ?pid, ?signal, "cannot signal the worker");
        }
    }

    /// Whether an end without a word is what it was asked for: one that is told to stop while it still loads cannot say so.
    fn was_asked_to_end(&self, status: ExitStatus) -> bool {
        let stopped = self.stopped.load(Ordering::Relaxed) && status.signal() == Some(Signal::TERM.as_raw());
        stopped || self.killed.load(Ordering::Relaxed)
    }

    /// Waits for the end without holding the lock, then collects it.
    fn wait(&self) -> std::io::Result<ExitStatus> {
        let pid = Pid::from_child(&self.child.lock().unwrap_or_else(PoisonError::into_inner));
        loop {
            match waitid(WaitId::Pid(pid), WaitIdOptions::EXITED | WaitIdOptions::NOWAIT) {
                Err(rustix::io::Errno::INTR) => {}
                _ => return self.child.lock().unwrap_or_else(PoisonError::into_inner).wait(),
            }
        }
    }
}

/// Runs a stage in a worker that sees no GPUs but those of the request.
pub(super) fn start_worker<'scope>(
    scope: &'scope Scope<'scope, '_>,
    program: &WorkerProgram,
    node: usize,
    request: &Request,
    log: PathBuf,
    driver: &ToDriver,
) -> anyhow::Result<Running> {
    use anyhow::Context as _;
    let folder = log.parent().context("a log lies in a folder")?;
    std::fs::create_dir_all(folder).with_context(|| format!("cannot create the folder `{}`", folder.display()))?;
    let opened = File::options().append(true).create(true).open(&log);
    let file = opened.with_context(|| format!("cannot write `{}`", log.display()))?;
    let start = file.metadata().map_or(0, |metadata| metadata.len());
    let copy = file.try_clone().with_context(|| format!("cannot write `{}`", log.display()))?;
    let (ours, theirs) = UnixStream::pair().context("cannot make a socket")?;
    let line = serde_json::to_string(request).context("cannot write the request")? + "\n";
    let child = program
        .command()
        .stdin(OwnedFd::from(theirs))
        .stdout(copy)
        .stderr(file)
        .process_group(0)
        .env("CUDA_VISIBLE_DEVICES", request.visible_devices.as_deref().unwrap_or_default())
        .spawn()
        .with_context(|| format!("cannot start `{}`", program.path.display()))?;
    let (stopped, killed) = (AtomicBool::new(false), AtomicBool::new(false));
    let worker = Arc::new(WorkerProcess { child: Mutex::new(child), stopped, killed });
    let (watched, driver) = (Arc::clone(&worker), driver.clone());
    let watch = move || {
        let ending = listen(ours, &line, node, &driver);
        let status = watched.wait();
        let ending = match (ending, status) {
            (Some(ending), _) => ending,
            (None, Ok(status)) if watched.was_asked_to_end(status) => Ending::Interrupted,
            (None, Ok(status)) => Ending::failed(obituary(status, &log, start)),
            (None, Err(error)) => Ending::failed(format!("cannot wait for the worker: {error}")),
        };
        tell(&driver, node, News::Ended(ending));
    };
    if let Err(error) = std::thread::Builder::new().name("worker".to_owned()).spawn_scoped(scope, watch) {
        worker.signal(Signal::KILL);
        worker.wait().context("cannot wait for the worker")?;
        return Err(error).context("cannot start a thread");
    }
    Ok(Running::Worker(worker))
}

/// Hands the request over and passes on what the worker says, until it closes its side.
fn listen(mut socket: UnixStream, request: &str, node: usize, driver: &ToDriver) -> Option<Ending> {
    // A worker that dies before it has read the request says so by its exit.
    if let Err(error) = socket.write_all(request.as_bytes()) {
        tracing::debug!(%error, node, "the worker does not read its request");
    }
    let mut ending = None;
    for line in BufReader::new(socket).split(b'\n').map_while(Result::ok) {
        match serde_json::from_slice(&line) {
            Ok(Message::Event { event }) => tell(driver, node, News::Event(event)),
            Ok(Message::Done { ran }) => ending = Some(Ending::Done { manifest: None, ran }),
            Ok(Message::Interrupted) => ending = Some(Ending::Interrupted),
            Ok(Message::Elsewhere) => ending = Some(Ending::Elsewhere),
            Ok(Message::Failed { causes, lasting }) => {
                ending = Some(Ending::Failed { problem: causes.join(": "), lasting });
            }
            Ok(Message::DamagedInput { reference, what }) => ending = Some(Ending::Damaged { reference, what }),
            Ok(Message::Lost { what }) => ending = Some(Ending::Lost { what }),
            Err(error) => {
                let line = String::from_utf8_lossy(&line).into_owned();
                let text = format!("the worker said something that cannot be understood: {error}: {line}");
                tell(driver, node, News::Event(StageEvent::Note { text }));
            }
        }
    }
    ending
}

/// How a worker died that could not say it itself.
fn obituary(status: ExitStatus, log: &Path, start: u64) -> String {
    let how = match (status.signal(), status.code()) {
        (Some(9), _) => "was killed by signal 9 (out of memory?)".to_owned(),
        (Some(signal), _) => {
            let name = signal_hook::low_level::signal_name(signal).unwrap_or("unknown");
            format!("was killed by signal {signal} ({name})")
        }
        (None, Some(code)) => format!("ended with exit status {code} and without a word"),
        (None, None) => "ended without a word".to_owned(),
    };
    match last_lines(log, start) {
        Ok(lines) if lines.is_empty() => format!("the worker {how}; its log is empty"),
        Ok(lines) => format!("the worker {how}; the end of its log:\n{lines}"),
        Err(error) => format!("the worker {how}; cannot read `{}`: {error}", log.display()),
    }
}

/// The last lines of a log from `start` on.
fn last_lines(log: &Path, start: u64) -> std::io::Result<String> {
    let mut file = File::open(log)?;
    let length = file.metadata()?.len();
    file.seek(SeekFrom::Start(start.max(length.saturating_sub(LOG_BYTES)).min(length)))?;
    let mut bytes = Vec::new();
    file.take(LOG_BYTES).read_to_end(&mut bytes)?;
    let text = String::from_utf8_lossy(&bytes);
    let lines: Vec<&str> = text.trim_end().lines().collect();
    Ok(lines[lines.len().saturating_sub(LOG_LINES)..].join("\n"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_worker_that_cannot_speak_is_spoken_for() {
        let folder = tempfile::tempdir().unwrap();
        let log = folder.path().join("log.txt");
        std::fs::write(&log, "old attempt\nthe last words\n").unwrap();
        let killed = obituary(ExitStatus::from_raw(9), &log, 12);
        assert_eq!(killed, "the worker was killed by signal 9 (out of memory?); the end of its log:\nthe last words");
        let aborted = obituary(ExitStatus::from_raw(6), &log, 27);
        assert_eq!(aborted, "the worker was killed by signal 6 (SIGABRT); its log is empty");
        let exited = obituary(ExitStatus::from_raw(3 << 8), &log, 27);
        assert_eq!(exited, "the worker ended with exit status 3 and without a word; its log is empty");
    }

    #[test]
    fn a_worker_that_is_stopped_before_it_listens_has_not_failed() {
        let ends = |signal: &dyn Fn(&WorkerProcess)| {
            let child = Mutex::new(Command::new("sleep").arg("600").process_group(0).spawn().unwrap());
            let worker = WorkerProcess { child, stopped: AtomicBool::new(false), killed: AtomicBool::new(false) };
            signal(&worker);
            let status = worker.wait().unwrap();
            (status.signal(), worker.was_asked_to_end(status))
        };
        assert_eq!(ends(&|worker| worker.signal(Signal::TERM)), (Some(15), true));
        assert_eq!(ends(&|worker| worker.signal(Signal::KILL)), (Some(9), true));
        let by_another = |signal| {
            ends(&|worker: &WorkerProcess| {
                kill_process(Pid::from_child(&worker.child.lock().unwrap()), signal).unwrap();
            })
        };
        assert_eq!(by_another(Signal::TERM), (Some(15), false));
        let after_a_stop = ends(&|worker| {
            worker.stopped.store(true, Ordering::Relaxed);
            kill_process(Pid::from_child(&worker.child.lock().unwrap()), Signal::ABORT).unwrap();
        });
        assert_eq!(after_a_stop, (Some(6), false), "it died of something else");
    }

    #[test]
    fn every_worker_multiplies_alike_whatever_the_environment_says() {
        let program = WorkerProgram::at("/proc/self/exe".into(), Vec::new()).unwrap();
        let command = program.command();
        let set = command.get_envs().find(|(name, _)| *name == "CUBLAS_WORKSPACE_CONFIG");
        assert_eq!(set.and_then(|(_, value)| value), Some(std::ffi::OsStr::new(":4096:8")));
    }

    #[test]
    fn a_missing_worker_says_how_to_build_it() {
        let error = WorkerProgram::at("/nowhere/pipe-worker".into(), Vec::new()).unwrap_err().to_string();
        assert!(error.contains("/nowhere/pipe-worker") && error.contains("cargo build --workspace"), "{error}");
    }
}
