//! Running one program: its own process group, its words into a log, an end that is noticed at once, and no life after
//! the driver's.

use std::collections::BTreeMap;
use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io::{Read as _, Seek as _, SeekFrom};
use std::path::Path;
use std::process::{Child, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::time::Duration;

use anyhow::Context as _;
use rustix::process::{Pid, Signal, WaitId, WaitIdOptions, waitid};

use crate::program::child::{command, how, signal, spawn, unwatch, watch};

/// How often a running program's driver asks whether it should stop.
const ASK: Duration = Duration::from_millis(50);

/// How long a program may take to end after it was asked to.
const GRACE: Duration = Duration::from_secs(5);

/// A program to run.
pub(super) struct Program<'a> {
    /// Its name, or the path of its file relative to `folder`.
    pub(super) name: &'a OsStr,
    /// Its arguments.
    pub(super) arguments: &'a [OsString],
    /// Where it runs.
    pub(super) folder: &'a Path,
    /// Its whole environment.
    pub(super) environment: BTreeMap<OsString, OsString>,
    /// The file to whose end what it says is written.
    pub(super) log: &'a Path,
}

/// How a program ended.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Ended {
    /// With status 0.
    Well,
    /// Otherwise; the words follow its name in a sentence.
    Badly(String),
    /// Because it was asked to.
    Interrupted,
}

impl Program<'_> {
    /// Runs it to its end. What it has started in its group ends with it.
    pub(super) fn run(self, interrupt: &AtomicBool) -> anyhow::Result<Ended> {
        let mut child = self.start()?;
        let group = Pid::from_child(&child);
        if let Err(error) = watch(group).context("cannot start `/bin/sh` to watch over programs") {
            signal(group, Signal::KILL);
            child.wait().context("cannot wait for the program")?;
            return Err(error);
        }
        let asked = std::thread::scope(|scope| {
            let (ended, end) = channel::<()>();
            let asking = scope.spawn(move || stop_when_asked(group, interrupt, &end));
            // The program is left unreaped here, so that its group's number cannot be another's when it is killed.
            while let Err(rustix::io::Errno::INTR) =
                waitid(WaitId::Pid(group), WaitIdOptions::EXITED | WaitIdOptions::NOWAIT)
            {}
            drop(ended);
            asking.join().unwrap_or(false)
        });
        signal(group, Signal::KILL);
        let status = child.wait().context("cannot wait for the program")?;
        unwatch(group);
        Ok(match how(status) {
            // A program that saves what it has and ends well when it is asked to stop has not finished its work.
            _ if asked => Ended::Interrupted,
            None => Ended::Well,
            Some(how) => Ended::Badly(how),
        })
    }

    fn start(&self) -> anyhow::Result<Child> {
        let log = || File::options().append(true).create(true).open(self.log);
        let log = log().and_then(|out| Ok((out, log()?)));
        let (out, err) = log.with_context(|| format!("cannot write the log `{}`", self.log.display()))?;
        let path = self.environment.get(OsStr::new("PATH"));
        let mut command = command(self.name, path.map(OsString::as_os_str));
        command.args(self.arguments).current_dir(self.folder).env_clear().envs(&self.environment);
        command.stdin(Stdio::null()).stdout(out).stderr(err);
        spawn(&mut command).map_err(anyhow::Error::msg)
    }
}

/// Asks the group to end when the interrupt is set, and ends it after a while; gives whether it asked.
fn stop_when_asked(group: Pid, interrupt: &AtomicBool, end: &Receiver<()>) -> bool {
    loop {
        if let Err(RecvTimeoutError::Disconnected) = end.recv_timeout(ASK) {
            return false;
        }
        if interrupt.load(Ordering::Relaxed) {
            signal(group, Signal::TERM);
            if let Err(RecvTimeoutError::Timeout) = end.recv_timeout(GRACE) {
                signal(group, Signal::KILL);
            }
            return true;
        }
    }
}

/// The last `lines` of a log from the byte `start` on, of at most 16 KiB.
pub(super) fn tail(log: &Path, start: u64, lines: usize) -> std::io::Result<String> {
    const MOST: u64 = 1 << 14;
    let mut file = File::open(log)?;
    let size = file.metadata()?.len();
    file.seek(SeekFrom::Start(size.saturating_sub(MOST).max(start)))?;
    let mut bytes = Vec::new();
    file.read_to_end(&mut bytes)?;
    let text = String::from_utf8_lossy(&bytes);
    let all: Vec<&str> = text.trim_end().lines().collect();
    Ok(all[all.len().saturating_sub(lines)..].join("\n"))
}
