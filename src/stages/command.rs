//! `command`: any program of the user's, cached like every other stage.
//!
//! The program runs in a fresh folder in which `files` stand at their relative paths. Its whole environment is `PATH`, `HOME`,
//! `LANG`, the cores that it may use as libraries ask for them (`OMP_NUM_THREADS` and its like, from `run.cpus`), the GPUs that it
//! may see (`CUDA_VISIBLE_DEVICES`, from `run.device`), and the table `env`, which may replace any of them; `{inputs.NAME}` in an argument is the folder of that input. An output is the file or the
//! folder of that name which it leaves in its folder. The stored output is a folder that holds it *under its own name*, be it a file or
//! a folder: the output `out` of stage `a`, taken as `inputs = { x = "a" }`, is read at `{inputs.x}/out`.

mod process;

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::fs::Permissions;
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;

use anyhow::{Context as _, bail};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::file::{Misplaced, PlacedFile, lay_out, misplaced};
use crate::pipeline::stage::{
    Any, ArtifactType, Input, Interrupted, Output, Problem, Resources, Stage, StageContext, Upstream,
};
use crate::program;
use process::{Ended, Program};

/// The program's folder, beside the outputs: no output can bear this name, and a failed attempt keeps it.
const FOLDER: &str = ".folder";

/// Where numerical libraries look for the number of threads they may start.
const THREADS: &[&str] =
    &["OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMEXPR_NUM_THREADS", "RAYON_NUM_THREADS"];

/// Lines of the log that an error shows.
const TAIL: usize = 20;

/// Run any program; its outputs are files or folders that it leaves in its working folder.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Command {
    /// The program and its arguments. `{inputs.NAME}` stands for the folder of an input.
    #[schemars(length(min = 1))]
    pub command: Vec<String>,
    /// Outputs of other stages, by the name under which arguments mention them.
    #[serde(default)]
    pub inputs: BTreeMap<String, Input<Any>>,
    /// Files and folders, known by their content, that stand at these relative paths in the working folder.
    #[serde(default)]
    pub files: Vec<PlacedFile>,
    /// Names of files or folders that the program leaves in its working folder; the first is the default output.
    #[schemars(length(min = 1))]
    pub outputs: Vec<String>,
    /// Environment variables beside `PATH`, `HOME`, `LANG`, `OMP_NUM_THREADS` and its like, and `CUDA_VISIBLE_DEVICES`, which
    /// it may replace.
    #[serde(default)]
    pub env: BTreeMap<String, String>,
}

impl Stage for Command {
    const KIND: &'static str = "command";
    const VERSION: u32 = 1;

    fn outputs(&self) -> Vec<Output> {
        self.outputs.iter().map(|name| Output::new(name, ArtifactType::Files)).collect()
    }

    fn check(&self, _: &Upstream<'_>) -> Vec<Problem> {
        let mut problems = Vec::new();
        if self.command.first().is_none_or(String::is_empty) {
            problems
                .push(Problem::new("command", "no program is named").hint("as `command = [\"sh\", \"-c\", \"...\"]`"));
        }
        for (index, argument) in self.command.iter().enumerate() {
            let path = format!("command.{index}");
            if argument.contains('\0') {
                problems.push(Problem::new(&path, "an argument cannot hold a NUL character"));
            }
            for (name, _) in mentions(argument).filter(|(name, _)| !self.inputs.contains_key(*name)) {
                let problem = Problem::new(&path, format!("`{{inputs.{name}}}` names no input of the stage"));
                problems.push(problem.hint(self.known_inputs()));
            }
        }
        self.check_outputs(&mut problems);
        problems.extend(misplaced(&self.files).into_iter().map(|misplaced| {
            let Misplaced { index, message, hint } = misplaced;
            Problem { path: format!("files.{index}"), message, hint }
        }));
        for (name, value) in &self.env {
            if name.is_empty() || name.contains(['=', '\0']) || value.contains('\0') {
                let message = format!("`{}` cannot be an environment variable", name.escape_default());
                problems.push(Problem::new(format!("env.{name}"), message));
            }
        }
        problems
    }

    fn metrics(&self, _: &Upstream<'_>) -> Option<Vec<String>> {
        // Numbers are read from `metrics.json` of the first output, and an output holds nothing but what it is named for.
        if self.outputs.first().is_some_and(|name| name == "metrics.json") { None } else { Some(Vec::new()) }
    }

    fn run(&self, context: &mut StageContext) -> anyhow::Result<()> {
        let folder = context.out.join(FOLDER);
        std::fs::create_dir(&folder).with_context(|| format!("cannot create the folder `{}`", folder.display()))?;
        lay_out(&self.files, &folder)?;
        context.stop_if_interrupted()?;
        let arguments = self.arguments(context)?;
        let (name, arguments) = arguments.split_first().context("no program is named")?;
        let log = context.logs.join("log.txt");
        // Before it stands what earlier attempts said.
        let start = std::fs::metadata(&log).map_or(0, |metadata| metadata.len());
        let program =
            Program { name, arguments, folder: &folder, environment: self.environment(&context.resources), log: &log };
        match program.run(&context.interrupt)? {
            Ended::Interrupted => return Err(Interrupted.into()),
            Ended::Well => {}
            Ended::Badly(how) => {
                let tail =
                    process::tail(&log, start, TAIL).with_context(|| format!("cannot read `{}`", log.display()))?;
                let said = if tail.is_empty() { "; it wrote nothing".to_owned() } else { format!(":\n{tail}") };
                bail!("`{}` {how}{said}", self.command[0]);
            }
        }
        for name in &self.outputs {
            take(&folder, name, &context.output(name))?;
        }
        Ok(())
    }
}

impl Command {
    fn known_inputs(&self) -> String {
        if self.inputs.is_empty() {
            return "declare it as `inputs = { NAME = \"stage\" }`".to_owned();
        }
        let names: Vec<String> = self.inputs.keys().map(|name| format!("`{name}`")).collect();
        format!("its inputs are {}", names.join(", "))
    }

    fn check_outputs(&self, problems: &mut Vec<Problem>) {
        if self.outputs.is_empty() {
            problems.push(Problem::new("outputs", "no output is named").hint("as `outputs = [\"out\"]`"));
        }
        for (index, name) in self.outputs.iter().enumerate() {
            let path = format!("outputs.{index}");
            if !is_output_name(name) {
                let problem = Problem::new(&path, format!("`{name}` cannot name an output"));
                problems
                    .push(problem.hint("letters, digits, `_`, `-` and `.`, beginning with a letter, a digit or `_`"));
            }
            if self.outputs[..index].contains(name) {
                problems.push(Problem::new(path, format!("the output `{name}` is named twice")));
            }
        }
    }

    /// The command with the folders of its inputs filled in.
    fn arguments(&self, context: &StageContext) -> anyhow::Result<Vec<OsString>> {
        let mut arguments = Vec::with_capacity(self.command.len());
        for argument in &self.command {
            let mut filled = OsString::new();
            let mut rest = 0;
            for (name, range) in mentions(argument) {
                let input = self.inputs.get(name).with_context(|| format!("`{name}` names no input"))?;
                filled.push(&argument[rest..range.start]);
                filled.push(context.input(input)?);
                rest = range.end;
            }
            filled.push(&argument[rest..]);
            arguments.push(filled);
        }
        Ok(arguments)
    }

    /// The whole environment of the program.
    fn environment(&self, resources: &Resources) -> BTreeMap<OsString, OsString> {
        let threads = THREADS.iter().map(|name| ((*name).into(), resources.threads.to_string().into()));
        let visible = resources.visible_devices.iter().map(|gpus| ("CUDA_VISIBLE_DEVICES".into(), gpus.into()));
        let own = self.env.iter().map(|(name, value)| (name.into(), value.into()));
        program::inherited().chain(threads).chain(visible).chain(own).collect()
    }
}

/// The inputs that an argument mentions as `{inputs.NAME}`, with their places. Any other brace is the program's own.
fn mentions(argument: &str) -> impl Iterator<Item = (&str, std::ops::Range<usize>)> {
    const OPEN: &str = "{inputs.";
    argument.match_indices(OPEN).filter_map(|(start, _)| {
        let rest = &argument[start + OPEN.len()..];
        let name = &rest[..rest.find('}')?];
        let plain = name.chars().all(|character| character.is_alphanumeric() || "_-.".contains(character));
        (plain && !name.is_empty()).then(|| (name, start..start + OPEN.len() + name.len() + 1))
    })
}

fn is_output_name(name: &str) -> bool {
    let plain = |character: char| character.is_ascii_alphanumeric() || "_-.".contains(character);
    !name.starts_with(['.', '-']) && !name.is_empty() && name.len() <= 100 && name.chars().all(plain)
}

/// Moves an output from the program's folder into the stage's, under its own name.
fn take(folder: &Path, name: &str, output: &Path) -> anyhow::Result<()> {
    let made = folder.join(name);
    let metadata = match std::fs::symlink_metadata(&made) {
        Ok(metadata) => metadata,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
            let mut found = Vec::new();
            for entry in std::fs::read_dir(folder).with_context(|| format!("cannot list `{}`", folder.display()))? {
                found.push(format!("`{}`", entry?.file_name().display()));
            }
            found.sort();
            let found = if found.is_empty() { "nothing".to_owned() } else { found.join(", ") };
            bail!("the program ended well but left no `{name}` in its folder; there is {found}");
        }
        Err(error) => return Err(error).with_context(|| format!("cannot read `{}`", made.display())),
    };
    if metadata.is_dir() {
        // A folder that may not be written cannot change its parent.
        let open = std::fs::set_permissions(&made, Permissions::from_mode(0o755));
        open.with_context(|| format!("cannot change the mode of `{}`", made.display()))?;
    }
    std::fs::rename(&made, output.join(name)).with_context(|| format!("cannot move the output `{}`", made.display()))
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;
    use std::sync::Arc;
    use std::sync::atomic::{AtomicBool, Ordering};
    use std::time::{Duration, Instant};

    use serde_json::json;

    use super::*;
    use crate::pipeline::stage::{InputArtifact, Resources};

    /// A place for one run of a command.
    struct Bench {
        place: tempfile::TempDir,
        context: StageContext,
    }

    impl Bench {
        fn new() -> Self {
            let place = tempfile::tempdir().unwrap();
            let at = |name: &str| place.path().join(name);
            for folder in ["out/out", "out/second", "logs", "work", "input"] {
                std::fs::create_dir_all(at(folder)).unwrap();
            }
            std::fs::write(at("input/out"), "b\na\n").unwrap();
            let input = InputArtifact { path: at("input"), digest: "d".into(), artifact: ArtifactType::Files };
            let resources = Resources {
                device: "cpu".into(),
                threads: 3,
                visible_devices: None,
                save_every: Duration::from_secs(1),
            };
            let context = StageContext {
                inputs: BTreeMap::from([("stage".to_owned(), input)]),
                out: at("out"),
                work: at("work"),
                logs: at("logs"),
                resources,
                interrupt: Arc::default(),
                events: Box::new(|_| ()),
            };
            Self { place, context }
        }

        fn run(&mut self, command: &Command) -> anyhow::Result<()> {
            assert_eq!(problems(command), Vec::<Problem>::new());
            command.run(&mut self.context)
        }

        fn read(&self, path: &str) -> String {
            std::fs::read_to_string(self.place.path().join(path)).unwrap()
        }
    }

    fn shell(script: &str) -> Command {
        serde_json::from_value(json!({"command": ["sh", "-c", script], "outputs": ["out"]})).unwrap()
    }

    fn problems(command: &Command) -> Vec<Problem> {
        command.check(&Upstream { stages: &BTreeMap::new() })
    }

    fn error(script: &str) -> String {
        format!("{:#}", Bench::new().run(&shell(script)).unwrap_err())
    }

    #[test]
    fn its_numbers_are_those_of_a_first_output_called_metrics() {
        let metrics = |outputs: &[&str]| {
            let command: Command = serde_json::from_value(json!({"command": ["true"], "outputs": outputs})).unwrap();
            command.metrics(&Upstream { stages: &BTreeMap::new() })
        };
        assert_eq!(metrics(&["metrics.json", "out"]), None, "only the program knows");
        assert_eq!(metrics(&["out", "metrics.json"]), Some(Vec::new()), "tables read the first output alone");
    }

    #[test]
    fn a_program_sorts_an_input_into_an_output() {
        let mut bench = Bench::new();
        let mut command = shell("sort {inputs.a}/out > out; echo ${HOME:-none}} {inputs.}");
        command.inputs.insert("a".into(), Input::new("stage"));
        bench.run(&command).unwrap();
        assert_eq!(bench.read("out/out/out"), "a\nb\n");
        assert!(bench.read("logs/log.txt").ends_with("} {inputs.}\n"), "other braces are the program's");
    }

    #[test]
    fn outputs_are_files_or_folders_under_their_names() {
        let mut bench = Bench::new();
        let mut command = shell("mkdir -p second/deep; echo x > second/deep/file; echo y > out; chmod 555 second");
        command.outputs.push("second".into());
        bench.run(&command).unwrap();
        assert_eq!(
            (bench.read("out/out/out"), bench.read("out/second/second/deep/file")),
            ("y\n".into(), "x\n".into())
        );
    }

    #[test]
    fn the_environment_is_three_variables_the_machines_share_and_the_table() {
        let mut bench = Bench::new();
        let mut command = shell("env > out");
        command.env.insert("LANG".into(), "C".into());
        command.env.insert("MINE".into(), "a b=c".into());
        bench.run(&command).unwrap();
        let out = bench.read("out/out/out");
        // The shell itself adds these.
        let own = ["PWD", "SHLVL", "_", "OLDPWD"];
        let mut names: Vec<&str> = out.lines().filter_map(|line| line.split('=').next()).collect();
        names.retain(|name| !own.contains(name) && *name != "HOME");
        names.sort_unstable();
        let mut expected = vec!["LANG", "MINE", "PATH"];
        expected.extend(THREADS);
        expected.sort_unstable();
        assert_eq!(names, expected);
        assert!(out.contains("LANG=C\n") && out.contains("MINE=a b=c\n"));
    }

    #[test]
    fn a_program_is_told_its_cores_and_its_gpu_unless_its_table_says_otherwise() {
        let mut bench = Bench::new();
        bench.context.resources.visible_devices = Some("1".into());
        let mut command =
            shell("echo $OMP_NUM_THREADS $MKL_NUM_THREADS $RAYON_NUM_THREADS $CUDA_VISIBLE_DEVICES > out");
        command.env.insert("MKL_NUM_THREADS".into(), "7".into());
        bench.run(&command).unwrap();
        assert_eq!(bench.read("out/out/out"), "3 7 3 1\n");
    }

    #[test]
    fn files_stand_at_their_relative_paths_and_run() {
        let mut bench = Bench::new();
        let at = bench.place.path().join("users");
        std::fs::create_dir_all(at.join("data/deep")).unwrap();
        std::fs::write(at.join("data/deep/x"), "content").unwrap();
        std::fs::write(at.join("tool"), "#!/bin/sh\ncat data/deep/x > out\n").unwrap();
        std::fs::set_permissions(at.join("tool"), Permissions::from_mode(0o500)).unwrap();
        let mut command = shell("");
        command.command = vec!["./bin/tool".into()];
        command.files = vec![
            PlacedFile { path: at.join("tool"), placed: "./bin/tool".into() },
            PlacedFile { path: at.join("data"), placed: "data".into() },
        ];
        bench.run(&command).unwrap();
        assert_eq!(bench.read("out/out/out"), "content");
    }

    #[test]
    fn failures_name_the_status_the_signal_and_the_last_words() {
        let long = error("for i in $(seq 30); do echo line $i; done; echo the end >&2; exit 3");
        assert!(long.starts_with("`sh` ended with exit status 3:\nline 12\n") && long.ends_with("\nthe end"), "{long}");
        assert_eq!(error("exit 1"), "`sh` ended with exit status 1; it wrote nothing");
        assert!(error("kill -SEGV $$").contains("was ended by SIGSEGV"));
        assert!(error("touch other").contains("left no `out` in its folder; there is `other`"));
        let mut command = shell("");
        command.command = vec!["no-such-program".into()];
        let error = format!("{:#}", Bench::new().run(&command).unwrap_err());
        assert!(error.contains("cannot start `no-such-program`: no such program"), "{error}");
        let mut bench = Bench::new();
        let plain = bench.place.path().join("plain");
        std::fs::write(&plain, "#!/bin/sh\n").unwrap();
        command.command = vec!["./plain".into()];
        command.files = vec![PlacedFile { path: plain, placed: "plain".into() }];
        let error = format!("{:#}", bench.run(&command).unwrap_err());
        assert!(error.contains("cannot start `./plain`: it is not executable"), "{error}");
    }

    #[test]
    fn no_descriptor_of_the_driver_is_inherited() {
        let mut bench = Bench::new();
        let lock = std::fs::File::create(bench.place.path().join("lock")).unwrap();
        lock.lock().unwrap();
        bench.run(&shell("ls -l /proc/$$/fd | grep -o '[0-9]* ->.*' > out")).unwrap();
        let found = bench.read("out/out/out");
        assert!(["0 -> /dev/null", "1 -> ", "2 -> "].iter().all(|line| found.contains(line)), "{found}");
        assert!(!found.contains("/lock"), "{found}");
    }

    #[test]
    fn an_interrupt_ends_the_whole_group() {
        let mut bench = Bench::new();
        let interrupt = Arc::new(AtomicBool::new(false));
        bench.context.interrupt = interrupt.clone();
        let pids = bench.place.path().join("pids");
        let script = format!("sleep 600 & echo $! > {0}.new; mv {0}.new {0}; wait", pids.display());
        let begun = Instant::now();
        std::thread::scope(|scope| {
            let running = scope.spawn(|| bench.run(&shell(&script)));
            while !pids.exists() {
                assert!(begun.elapsed() < Duration::from_secs(120));
                std::thread::sleep(Duration::from_millis(2));
            }
            interrupt.store(true, Ordering::Relaxed);
            let error = running.join().unwrap().unwrap_err();
            assert!(error.is::<Interrupted>(), "{error:#}");
        });
        assert!(begun.elapsed() < Duration::from_secs(120));
        assert_gone(&std::fs::read_to_string(&pids).unwrap());
    }

    #[test]
    fn what_ends_well_because_it_was_asked_to_stop_is_not_done() {
        let mut bench = Bench::new();
        let interrupt = Arc::new(AtomicBool::new(false));
        bench.context.interrupt = interrupt.clone();
        let ready = bench.place.path().join("ready");
        let script =
            format!("trap 'echo half > out; exit 0' TERM; touch {}; while :; do sleep 0.02; done", ready.display());
        let begun = Instant::now();
        std::thread::scope(|scope| {
            let running = scope.spawn(|| bench.run(&shell(&script)));
            while !ready.exists() {
                assert!(begun.elapsed() < Duration::from_secs(120));
                std::thread::sleep(Duration::from_millis(2));
            }
            interrupt.store(true, Ordering::Relaxed);
            let error = running.join().unwrap().unwrap_err();
            assert!(error.is::<Interrupted>(), "{error:#}");
        });
    }

    #[test]
    fn nothing_that_the_program_started_outlives_it() {
        let mut bench = Bench::new();
        bench.run(&shell("sleep 600 & echo $! > out")).unwrap();
        assert_gone(&bench.read("out/out/out"));
    }

    /// The test runs itself as a driver, kills that, and looks whether the driver's program is gone too.
    #[test]
    fn a_program_does_not_outlive_a_killed_driver() {
        const PIDS: &str = "PIPE_TEST_COMMAND_PIDS";
        if let Some(pids) = std::env::var_os(PIDS) {
            let pids = pids.into_string().unwrap();
            // A program is announced to the watchdog right after its start. In the moment between, a killed driver leaves it
            // behind in a folder of its own, where it can harm nothing; on a busy machine that moment is no longer short.
            let script = format!("sleep 600 & sleep 1; echo $$ $! > {pids}.new; mv {pids}.new {pids}; wait");
            // The second program must not hold the watchdog's pipe open.
            Bench::new().run(&shell("echo > out")).unwrap();
            Bench::new().run(&shell(&script)).unwrap();
            return;
        }
        let place = tempfile::tempdir().unwrap();
        let pids = place.path().join("pids");
        let mut driver = std::process::Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "stages::command::tests::a_program_does_not_outlive_a_killed_driver"])
            .env(PIDS, &pids)
            .env("TMPDIR", place.path())
            .stdout(std::process::Stdio::null())
            .spawn()
            .unwrap();
        let begun = Instant::now();
        while !pids.exists() {
            assert!(begun.elapsed() < Duration::from_secs(120), "the driver did not start its program");
            std::thread::sleep(Duration::from_millis(2));
        }
        driver.kill().unwrap();
        driver.wait().unwrap();
        assert_gone(&std::fs::read_to_string(&pids).unwrap());
    }

    /// Holds that these processes end soon; one that waits to be reaped has ended.
    fn assert_gone(pids: &str) {
        let begun = Instant::now();
        for pid in pids.split_whitespace() {
            let alive = || {
                let status = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
                status.rsplit(") ").next().is_some_and(|rest| !rest.is_empty() && !rest.starts_with(['Z', 'X']))
            };
            while alive() {
                assert!(begun.elapsed() < Duration::from_secs(120), "process {pid} still runs");
                std::thread::sleep(Duration::from_millis(2));
            }
        }
    }

    #[test]
    fn a_trivial_program_costs_little_beyond_its_start() {
        let mut bench = Bench::new();
        bench.run(&shell("echo x > out")).unwrap();
        let fastest = (0..10).map(|_| {
            let begun = Instant::now();
            Bench::new().run(&shell("echo x > out")).unwrap();
            begun.elapsed()
        });
        // The bar is 3 ms on a quiet machine; this one catches only a change of kind, as a wait in steps of a clock, which the
        // fastest of ten shows as well as their mean does, and a busy machine leaves one of them alone.
        let fastest = fastest.min().unwrap();
        assert!(fastest < Duration::from_millis(200), "{fastest:?}");
    }

    #[test]
    fn mistakes_are_found_before_anything_runs() {
        let command: Command = serde_json::from_value(json!({
            "command": ["sh", "{inputs.a} {inputs.b} {inputs.b c}"],
            "inputs": {"a": "stage"},
            "files": ["../x", "/etc/passwd", "a/./b", "a/b", "."],
            "outputs": ["out", ".hidden", "a/b", "out"],
            "env": {"A=B": "x"},
        }))
        .unwrap();
        let found: Vec<String> = problems(&command).into_iter().map(|problem| problem.path).collect();
        let expected =
            ["command.1", "outputs.1", "outputs.2", "outputs.3", "files.0", "files.1", "files.3", "files.4", "env.A=B"];
        assert_eq!(found, expected);
        let nothing: Command = serde_json::from_value(json!({"command": [], "outputs": []})).unwrap();
        assert_eq!(problems(&nothing).len(), 2);
        assert!(serde_json::from_value::<Command>(json!({"command": ["x"], "outputs": ["o"], "input": {}})).is_err());
    }
}
