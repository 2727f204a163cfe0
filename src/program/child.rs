//! Child processes that are programs of the user's: how they start, how they end, and that none outlives this process.
//!
//! The group of every running program is announced to a watchdog, a small shell that reads from a pipe. When this process
//! dies, however that happens, the kernel closes the pipe, and the watchdog kills the groups that are left. A signal upon
//! the parent's death would reach the program alone, and not what it has started.

use std::collections::BTreeSet;
use std::ffi::OsStr;
use std::io::{ErrorKind, Read as _, Write as _};
use std::os::unix::process::{CommandExt as _, ExitStatusExt as _};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, ExitStatus, Stdio};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use rustix::process::{Pid, Signal, kill_process_group};

/// How often a start is tried while the program's file is still open for writing.
const BUSY_TRIES: u32 = 100;

/// The command of a program whose environment has this `PATH`.
///
/// A bare name is looked for here where that surely finds what the system would find: only a program that is named by its path
/// is started without copying the page tables of this process, which takes longer than all else that a short program does.
pub(crate) fn command(name: &OsStr, path: Option<&OsStr>) -> Command {
    let Some(file) = path.and_then(|path| found(name, path)) else { return Command::new(name) };
    let mut command = Command::new(file);
    command.arg0(name);
    command
}

/// The first file of `path` that may be executed, if the kernel can execute it and nothing leaves a doubt.
fn found(name: &OsStr, path: &OsStr) -> Option<PathBuf> {
    if name.is_empty() || name.as_encoded_bytes().contains(&b'/') {
        return None;
    }
    for folder in std::env::split_paths(path) {
        // A relative folder is one of the program's own working folder.
        if !folder.is_absolute() {
            return None;
        }
        let file = folder.join(name);
        match rustix::fs::access(&file, rustix::fs::Access::EXEC_OK) {
            Err(rustix::io::Errno::NOENT | rustix::io::Errno::NOTDIR) => {}
            Err(_) => return None,
            Ok(()) => {
                let mut start = [0; 4];
                std::fs::File::open(&file).ok()?.read_exact(&mut start).ok()?;
                // What is neither is a script without its first line, which the system hands to a shell.
                return (start.starts_with(b"#!") || start == *b"\x7fELF").then_some(file);
            }
        }
    }
    None
}

/// Starts a program in a process group of its own; the error says why it cannot be started.
pub(crate) fn spawn(command: &mut Command) -> Result<Child, String> {
    command.process_group(0);
    let mut tries = 0;
    loop {
        let error = match command.spawn() {
            Ok(child) => return Ok(child),
            // A copied program counts as open for writing as long as a child that another thread is starting holds a copy of
            // the descriptor through which it was written.
            Err(error) if error.kind() == ErrorKind::ExecutableFileBusy && tries < BUSY_TRIES => {
                tries += 1;
                std::thread::sleep(Duration::from_millis(2));
                continue;
            }
            Err(error) => error,
        };
        let name = Path::new(command.get_program()).display();
        let is_path = command.get_program().as_encoded_bytes().contains(&b'/');
        let why = match (error.kind(), is_path) {
            (ErrorKind::NotFound, true) => {
                "there is no such file in its working folder, or its interpreter is missing; name it in `files`"
                    .to_owned()
            }
            (ErrorKind::NotFound, false) => "no such program is found in `PATH`".to_owned(),
            (ErrorKind::PermissionDenied, true) => "it is not executable; make it so with `chmod +x`".to_owned(),
            (ErrorKind::PermissionDenied, false) => {
                "no such program that may be executed is found in `PATH`".to_owned()
            }
            _ => error.to_string(),
        };
        return Err(format!("cannot start `{name}`: {why}"));
    }
}

/// A group that has no process left is no error.
pub(crate) fn signal(group: Pid, signal: Signal) {
    if let Err(error) = kill_process_group(group, signal)
        && error != rustix::io::Errno::SRCH
    {
        tracing::warn!(group = group.as_raw_nonzero(), %error, "cannot signal a program");
    }
}

/// How a program ended badly; the words follow its name in a sentence.
pub(crate) fn how(status: ExitStatus) -> Option<String> {
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
pub(crate) fn watch(group: Pid) -> std::io::Result<()> {
    let group = group.as_raw_nonzero().get();
    let mut watched = WATCHED.lock().unwrap_or_else(PoisonError::into_inner);
    watched.groups.insert(group);
    if watched.watchdog.as_mut().is_some_and(|watchdog| watchdog.order('+', group).is_ok()) {
        return Ok(());
    }
    let watchdog = Watchdog::start(&watched.groups)?;
    watched.watchdog = Some(watchdog);
    Ok(())
}

/// Forgets a group that has ended.
pub(crate) fn unwatch(group: Pid) {
    let group = group.as_raw_nonzero().get();
    let mut watched = WATCHED.lock().unwrap_or_else(PoisonError::into_inner);
    watched.groups.remove(&group);
    // A watchdog that is gone is started anew for the next program.
    if watched.watchdog.as_mut().is_some_and(|watchdog| watchdog.order('-', group).is_err()) {
        watched.watchdog = None;
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use super::*;

    fn path(folders: &[&Path]) -> std::ffi::OsString {
        std::env::join_paths(folders).unwrap()
    }

    fn says(name: &str, path: &OsStr, arguments: &[&str]) -> String {
        let mut command = command(name.as_ref(), Some(path));
        command.args(arguments).env_clear().env("PATH", path).stdout(Stdio::piped());
        let output = spawn(&mut command).unwrap().wait_with_output().unwrap();
        String::from_utf8(output.stdout).unwrap()
    }

    #[test]
    fn a_bare_name_is_found_where_the_system_finds_it_and_keeps_its_name() {
        let place = tempfile::tempdir().unwrap();
        let [empty, own] = ["empty", "own"].map(|name| place.path().join(name));
        let write = |folder: &Path, name: &str, text: &str, mode: u32| {
            std::fs::create_dir_all(folder).unwrap();
            std::fs::write(folder.join(name), text).unwrap();
            std::fs::set_permissions(folder.join(name), std::fs::Permissions::from_mode(mode)).unwrap();
        };
        write(&empty, "script", "#!/bin/sh\necho wrong\n", 0o644);
        write(&own, "script", "#!/bin/sh\necho \"$1 of ${0##*/}\"\n", 0o755);
        write(&own, "lines", "echo \"$1\"\n", 0o755);
        let system = [Path::new("/usr/bin"), Path::new("/bin")];
        let folders = path(&[&place.path().join("none"), &own, system[0], system[1]]);
        assert!(found("sh".as_ref(), &folders).is_some_and(|file| file.ends_with("sh") && file.is_absolute()));
        assert_eq!(says("sh", &folders, &["-c", "echo $0"]), "sh\n", "it is called as the user calls it");
        assert_eq!(found("script".as_ref(), &folders), Some(own.join("script")));
        assert_eq!(says("script", &folders, &["x"]), "x of script\n");
        // What leaves a doubt is the system's to find.
        assert_eq!(found("lines".as_ref(), &folders), None, "no first line that names its interpreter");
        assert_eq!(says("lines", &folders, &["x"]), "x\n");
        assert_eq!(found("script".as_ref(), &path(&[Path::new("own"), &own])), None, "a relative folder");
        assert_eq!(found("./script".as_ref(), &folders), None);
        assert_eq!(found("absent".as_ref(), &folders), None);
        if !rustix::process::geteuid().is_root() {
            assert_eq!(found("script".as_ref(), &path(&[&empty, &own])), None, "one that may not be executed");
        }
        assert_eq!(says("script", &path(&[&empty, &own, system[0], system[1]]), &["x"]), "x of script\n");
    }
}
