//! Running one program: its own process group, its words into a log, an end that is noticed at once, and no life after
//! the driver's.
//!
//! The group of every running program is announced to a watchdog, a small shell that reads from a pipe. When the driver dies,
//! however that happens, the kernel closes the pipe, and the watchdog kills the groups that are left. A signal upon the
//! parent's death would reach the program alone, and not what it has started.

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io::{ErrorKind, Read as _, Seek as _, SeekFrom, Write as _};
use std::os::unix::process::{CommandExt as _, ExitStatusExt as _};
use std::path::Path;
use std::process::{Child, ChildStdin, Command, ExitStatus, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use anyhow::Context as _;
use rustix::process::{Pid, Signal, WaitId, WaitIdOptions, kill_process_group, waitid};

/// How often a running program's driver asks whether it should stop.
const ASK: Duration = Duration::from_millis(50);

/// How long a program may take to end after it was asked to.
const GRACE: Duration = Duration::from_secs(5);

/// How often a start is tried while the program's file is still open for writing.
const BUSY_TRIES: u32 = 100;

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
    /// The file that takes what it says; emptied before.
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
        let opened = File::options().create(true).write(true).truncate(true).open(self.log);
        let log = opened.with_context(|| format!("cannot write the log `{}`", self.log.display()))?;
        drop(log);
        let mut child = self.start()?;
        let group = Pid::from_child(&child);
        if let Err(error) = watch(group) {
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
        let mut tries = 0;
        loop {
            let log = || File::options().append(true).open(self.log);
            let log = log().and_then(|out| Ok((out, log()?)));
            let (out, err) = log.with_context(|| format!("cannot write the log `{}`", self.log.display()))?;
            let mut command = Command::new(self.name);
            command.args(self.arguments).current_dir(self.folder).env_clear().envs(&self.environment);
            command.stdin(Stdio::null()).stdout(out).stderr(err).process_group(0);
            match command.spawn() {
                // A copied program counts as open for writing as long as a child that another thread is starting holds a copy of
                // the descriptor through which it was written.
                Err(error) if error.kind() == ErrorKind::ExecutableFileBusy && tries < BUSY_TRIES => {
                    tries += 1;
                    std::thread::sleep(Duration::from_millis(2));
                }
                Err(error) if error.kind() == ErrorKind::NotFound => {
                    let name = self.name.display();
                    let why = if self.name.as_encoded_bytes().contains(&b'/') {
                        "there is no such file in the stage's folder, or its interpreter is missing; name it in `files`"
                    } else {
                        "no such program is found in `PATH`"
                    };
                    anyhow::bail!("cannot start `{name}`: {why}");
                }
                Err(error) if error.kind() == ErrorKind::PermissionDenied => {
                    let name = self.name.display();
                    let why = if self.name.as_encoded_bytes().contains(&b'/') {
                        "it is not executable; make it so with `chmod +x`"
                    } else {
                        "no such program that may be executed is found in `PATH`"
                    };
                    anyhow::bail!("cannot start `{name}`: {why}");
                }
                other => return other.with_context(|| format!("cannot start `{}`", self.name.display())),
            }
        }
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

/// A group that has no process left is no error.
fn signal(group: Pid, signal: Signal) {
    if let Err(error) = kill_process_group(group, signal)
        && error != rustix::io::Errno::SRCH
    {
        tracing::warn!(group = group.as_raw_nonzero(), %error, "cannot signal a program");
    }
}

/// How a program ended badly.
fn how(status: ExitStatus) -> Option<String> {
    if status.success() {
        return None;
    }
    Some(match (status.code(), status.signal()) {
        (Some(code), _) => format!("ended with exit status {code}"),
        (None, Some(number)) => match signal_hook::low_level::signal_name(number) {
            Some("SIGKILL") => "was ended by SIGKILL, as the system does when memory is short".to_owned(),
            Some(name) => format!("was ended by {name}"),
            None => format!("was ended by signal {number}"),
        },
        (None, None) => format!("ended with {status}"),
    })
}

/// The last `lines` of a log, of at most 16 KiB.
pub(super) fn tail(log: &Path, lines: usize) -> std::io::Result<String> {
    const MOST: u64 = 1 << 14;
    let mut file = File::open(log)?;
    let size = file.metadata()?.len();
    file.seek(SeekFrom::Start(size.saturating_sub(MOST)))?;
    let mut bytes = Vec::new();
    file.read_to_end(&mut bytes)?;
    let text = String::from_utf8_lossy(&bytes);
    let all: Vec<&str> = text.trim_end().lines().collect();
    Ok(all[all.len().saturating_sub(lines)..].join("\n"))
}

/// The shell that outlives the driver for a moment. It is in a group of its own, so that a terminal's Ctrl-C does not reach it.
struct Watchdog {
    orders: ChildStdin,
    _process: Child,
}

/// The watchdog, once there is one, and the groups it should know.
struct Watched {
    watchdog: Option<Watchdog>,
    groups: BTreeSet<i32>,
}

static WATCHED: Mutex<Watched> = Mutex::new(Watched { watchdog: None, groups: BTreeSet::new() });

const WATCHDOG: &str = r#"
trap '' HUP INT TERM
live=' '
while read -r sign group; do
    case $sign in
    +) live="$live$group " ;;
    -) live=${live%%" $group "*}" "${live#*" $group "} ;;
    esac
done
for group in $live; do kill -s KILL -- "-$group"; done
"#;

impl Watchdog {
    fn start(groups: &BTreeSet<i32>) -> std::io::Result<Self> {
        let mut command = Command::new("/bin/sh");
        command.args(["-c", WATCHDOG]).current_dir("/").process_group(0);
        let mut process = command.stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::null()).spawn()?;
        let orders = process.stdin.take().ok_or(ErrorKind::BrokenPipe)?;
        let mut watchdog = Self { orders, _process: process };
        for group in groups {
            watchdog.order('+', *group)?;
        }
        Ok(watchdog)
    }

    fn order(&mut self, sign: char, group: i32) -> std::io::Result<()> {
        // One write of one short line, so that a kill in between leaves no half of it.
        self.orders.write_all(format!("{sign} {group}\n").as_bytes())
    }
}

/// Has a group killed if this process dies.
fn watch(group: Pid) -> anyhow::Result<()> {
    let group = group.as_raw_nonzero().get();
    let mut watched = WATCHED.lock().unwrap_or_else(PoisonError::into_inner);
    watched.groups.insert(group);
    if watched.watchdog.as_mut().is_some_and(|watchdog| watchdog.order('+', group).is_ok()) {
        return Ok(());
    }
    let watchdog = Watchdog::start(&watched.groups).context("cannot start `/bin/sh` to watch over programs")?;
    watched.watchdog = Some(watchdog);
    Ok(())
}

/// Forgets a group that has ended.
fn unwatch(group: Pid) {
    let group = group.as_raw_nonzero().get();
    let mut watched = WATCHED.lock().unwrap_or_else(PoisonError::into_inner);
    watched.groups.remove(&group);
    // A watchdog that is gone is started anew for the next program.
    if watched.watchdog.as_mut().is_some_and(|watchdog| watchdog.order('-', group).is_err()) {
        watched.watchdog = None;
    }
}
