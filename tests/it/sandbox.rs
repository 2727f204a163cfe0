//! A folder of its own for each test, the `pipe` binary run in it, and what came back.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use serde_json::Value;

/// A temporary folder with a store in it, in which `pipe` runs.
pub(crate) struct Sandbox {
    folder: tempfile::TempDir,
}

/// What a finished `pipe` left: its exit code and both streams.
pub(crate) struct Ended {
    pub(crate) code: Option<i32>,
    pub(crate) stdout: String,
    pub(crate) stderr: String,
}

impl Sandbox {
    pub(crate) fn new() -> Self {
        Self { folder: tempfile::tempdir().unwrap() }
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    pub(crate) fn write(&self, name: &str, text: &str) -> &Self {
        let path = self.path(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, text).unwrap();
        self
    }

    pub(crate) fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_pipe"));
        command.args(arguments).current_dir(self.folder.path()).stdin(Stdio::null());
        command.env_remove("PIPE_STORE").env_remove("PIPE_LOG").env_remove("PIPE_WORKER");
        command
    }

    pub(crate) fn pipe(&self, arguments: &[&str]) -> Ended {
        Ended::of(&self.command(arguments).output().unwrap())
    }

    /// Runs `pipe` and insists that it ends with 0.
    pub(crate) fn ok(&self, arguments: &[&str]) -> Ended {
        let ended = self.pipe(arguments);
        assert_eq!(ended.code, Some(0), "pipe {arguments:?}\n{}\n{}", ended.stdout, ended.stderr);
        ended
    }

    pub(crate) fn start(&self, arguments: &[&str]) -> Child {
        self.command(arguments).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap()
    }

    /// The same, with what it prints in a file of the sandbox, which can be read while it runs.
    pub(crate) fn start_telling(&self, arguments: &[&str], file: &str) -> Child {
        let told = File::create(self.path(file)).unwrap();
        self.command(arguments).stdout(told).stderr(Stdio::piped()).spawn().unwrap()
    }

    /// Shell: waits until a file of the sandbox is there. A test that fails leaves nobody waiting once all tests have ended.
    pub(crate) fn until_there(&self, name: &str) -> String {
        let path = self.path(name);
        format!("while [ ! -e {} ] && [ -e /proc/{} ]; do sleep 0.02; done", path.display(), std::process::id())
    }

    /// The counts of the last event of `pipe run --json`.
    pub(crate) fn run(&self, arguments: &[&str]) -> Value {
        let ended = self.pipe(&[&["run", "--json"], arguments].concat());
        let last = ended.stdout.lines().last().unwrap_or_else(|| panic!("no event\n{}", ended.stderr));
        let mut outcome: Value = serde_json::from_str(last).unwrap();
        outcome["code"] = ended.code.into();
        outcome["stderr"] = ended.stderr.into();
        outcome
    }

    pub(crate) fn json(&self, arguments: &[&str]) -> Value {
        let ended = self.ok(arguments);
        serde_json::from_str(&ended.stdout).unwrap_or_else(|error| panic!("{error}: {}", ended.stdout))
    }

    /// The digest of a stage's output, as `pipe show` tells it.
    pub(crate) fn digest(&self, stage: &str) -> String {
        self.json(&["show", "--json", stage])["digest"].as_str().unwrap().to_owned()
    }
}

impl Ended {
    pub(crate) fn of(output: &Output) -> Self {
        Self {
            code: output.status.code(),
            stdout: String::from_utf8_lossy(&output.stdout).into_owned(),
            stderr: String::from_utf8_lossy(&output.stderr).into_owned(),
        }
    }
}

/// Waits until `done`, or panics with `what` after so long that no machine is as slow.
pub(crate) fn wait_for(what: &str, mut done: impl FnMut() -> bool) {
    let begin = Instant::now();
    while !done() {
        assert!(begin.elapsed() < Duration::from_secs(300), "waited in vain for {what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// Every regular file below `folder`.
pub(crate) fn files(folder: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    let mut folders = vec![folder.to_owned()];
    while let Some(folder) = folders.pop() {
        let Ok(entries) = fs::read_dir(&folder) else { continue };
        for entry in entries {
            let entry = entry.unwrap();
            if entry.file_type().unwrap().is_dir() {
                folders.push(entry.path());
            } else {
                found.push(entry.path());
            }
        }
    }
    found.sort();
    found
}
