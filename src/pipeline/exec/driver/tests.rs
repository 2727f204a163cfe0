//! Runs of toy stages, from the plan to the last event.

mod policy;

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

use serde_json::json;

use super::*;
use crate::pipeline::exec::worker::{Program, serve};
use crate::pipeline::fixture::{Act, Remote, echo, experiment, run_remote, stage, toy, toys, trial, with_file};
use crate::pipeline::plan::State;
use crate::pipeline::spec::{Experiment, StageSpec};
use crate::pipeline::stage::StageEvent;
use crate::pipeline::store::Lookup;

/// The name under which the tests' own program is started as a worker.
const WORKER: &str = "pipe-worker-under-test";

struct Place {
    folder: tempfile::TempDir,
    store: Store,
    options: Options,
    machine: Machine,
}

/// What came of a run, with the names of the stages that ran, in order.
#[derive(Debug)]
struct Came {
    outcome: Outcome,
    ran: Vec<String>,
    events: Vec<Event>,
}

impl Came {
    fn failures(&self) -> Vec<&str> {
        let error = |event: &'_ Event| matches!(event, Event::Failed { .. });
        self.events
            .iter()
            .filter(|event| error(event))
            .map(|event| match event {
                Event::Failed { error, .. } => error.as_str(),
                _ => "",
            })
            .collect()
    }
}

impl Place {
    fn new() -> Self {
        Self::at(tempfile::tempdir().unwrap())
    }

    /// One in memory where there is such a place: what is measured there is the engine alone, and no busy disk.
    fn in_memory() -> Self {
        Self::at(tempfile::tempdir_in("/dev/shm").or_else(|_| tempfile::tempdir()).unwrap())
    }

    fn at(folder: tempfile::TempDir) -> Self {
        let store = Store::open(&folder.path().join("store")).unwrap();
        // These tests are about order, not about this machine's cores.
        let machine = Machine { cores: 4, ..Machine::detect(BTreeMap::new()) };
        Self { folder, store, options: Options { jobs: 4, ..Options::default() }, machine }
    }

    fn plan(&self, experiments: &[Experiment]) -> Plan {
        Plan::new(experiments, Some(&self.store)).unwrap()
    }

    fn run(&self, experiments: &[Experiment]) -> Came {
        self.run_watched(experiments, &mut |_| {})
    }

    fn run_watched(&self, experiments: &[Experiment], watch: &mut dyn FnMut(&Event)) -> Came {
        let plan = self.plan(experiments);
        let (mut ran, mut events) = (Vec::new(), Vec::new());
        let link = self.folder.path().join(WORKER);
        let find_worker = || {
            if !link.exists() {
                std::os::unix::fs::symlink(std::env::current_exe().unwrap(), &link).unwrap();
            }
            let test = "pipeline::exec::driver::tests::the_worker_side".to_owned();
            WorkerProgram::at(link.clone(), vec!["--exact".into(), test, "--nocapture".into()])
        };
        let outcome = super::run(&plan, &self.store, &self.options, self.machine.clone(), &find_worker, &mut |event| {
            watch(event);
            if let Event::Running { name, .. } = event {
                ran.push(name.stage.clone());
            }
            events.push(event.clone());
        });
        Came { outcome: outcome.unwrap(), ran, events }
    }

    fn text(&self, experiments: &[Experiment], stage: &str) -> String {
        let plan = self.plan(experiments);
        let node = plan.nodes.iter().find(|node| node.name().stage == stage).unwrap();
        let Lookup::Hit(manifest) = self.store.lookup(node.key.as_ref().unwrap()).unwrap() else { panic!("no result") };
        std::fs::read_to_string(self.store.object(&manifest.outputs[0].digest).join("text")).unwrap()
    }

    /// State and reasons by stage.
    fn plan_says(&self, experiments: &[Experiment]) -> Vec<(String, State, Vec<String>)> {
        let nodes = self.plan(experiments).nodes.into_iter();
        let said = |node: &Node| node.reasons.iter().map(ToString::to_string).collect();
        nodes.map(|node| (node.name().stage.clone(), node.state, said(&node))).collect()
    }
}

fn chain(first: &str) -> [Experiment; 1] {
    toys(vec![echo("a", first, &[]), toy("b", "b", Act::Constant, &["a"]), echo("c", "c", &["b", "b.second"])])
}

#[test]
fn a_chain_runs_once_and_is_cached_ever_after() {
    let place = Place::new();
    let came = place.run(&chain("1"));
    assert_eq!((came.ran, came.outcome.run), (vec!["a".into(), "b".into(), "c".into()], 3));
    assert_eq!(place.text(&chain("1"), "c"), "cconstant outconstant second out");
    let came = place.run(&chain("1"));
    assert_eq!((came.ran.len(), came.outcome.cached), (0, 3));
    let record = place.store.recorded("toys", "", "c").unwrap().unwrap();
    assert_eq!(Some(record.key), place.plan(&chain("1")).nodes[2].key);
    assert!(record.file.is_absolute() && record.file.ends_with("toys.toml"));
}

#[test]
fn an_input_that_comes_out_as_before_spares_what_follows() {
    let place = Place::new();
    place.run(&chain("1"));
    let says = place.plan_says(&chain("2"));
    assert_eq!(
        says,
        [
            ("a".into(), State::Run, vec!["text changed (\"1\" => \"2\")".into()]),
            ("b".into(), State::Maybe, vec!["input `a` runs".into()]),
            ("c".into(), State::Maybe, vec!["input `b` may run".into(), "input `b.second` may run".into()]),
        ]
    );
    let came = place.run(&chain("2"));
    assert_eq!((came.ran, came.outcome.cached), (vec!["a".into(), "b".into()], 1));
    assert_eq!(place.run(&chain("1")).outcome.cached, 3, "what was is still there");
}

#[test]
fn renaming_and_reordering_run_nothing() {
    let place = Place::new();
    place.run(&chain("1"));
    let renamed = [experiment(
        "other",
        vec![trial(
            "x=1",
            vec![echo("z", "c", &["y.out", "y.second"]), toy("y", "b", Act::Constant, &["w"]), echo("w", "1", &[])],
        )],
    )];
    assert_eq!(place.run(&renamed).outcome.cached, 3);
}

#[test]
fn a_changed_file_is_a_reason() {
    let place = Place::new();
    let file = place.folder.path().join("data.jsonl");
    std::fs::write(&file, "one").unwrap();
    place.run(&toys(vec![with_file("a", &file)]));
    std::fs::write(&file, "two").unwrap();
    let says = place.plan_says(&toys(vec![with_file("a", &file)]));
    assert_eq!(says, [("a".into(), State::Run, vec![format!("file {} changed", file.display())])]);
}

#[test]
fn a_failure_stops_the_run_or_only_what_rests_on_it() {
    let mut place = Place::new();
    place.options.jobs = 1;
    place.options.most_failures = Some(1);
    let stages =
        || toys(vec![toy("a", "", Act::Fail, &[]), echo("b", "", &["a"]), echo("c", "", &["b"]), echo("d", "d", &[])]);
    let came = place.run(&stages());
    let Outcome { run, failed, blocked, skipped, .. } = came.outcome;
    assert_eq!((run, failed, blocked, skipped), (0, 1, 2, 1));
    assert_eq!(came.failures(), ["it was meant to fail"]);
    place.options.most_failures = None;
    let Outcome { run, failed, blocked, skipped, .. } = place.run(&stages()).outcome;
    assert_eq!((run, failed, blocked, skipped), (1, 1, 2, 0));
}

#[test]
fn a_panic_fails_its_stage_alone() {
    let place = Place::new();
    let came = place.run(&toys(vec![toy("a", "", Act::Panic, &[])]));
    assert_eq!(came.failures(), ["the stage panicked: it was meant to panic"]);
    let Some(Event::Failed { log, .. }) = came.events.iter().rfind(|event| matches!(event, Event::Failed { .. }))
    else {
        panic!("nothing failed")
    };
    assert!(std::fs::read_to_string(log).unwrap().contains("meant to panic"), "{log}");
}

#[test]
fn a_stage_that_failed_runs_again() {
    let place = Place::new();
    let stages = || toys(vec![toy("a", "", Act::Flaky, &[])]);
    assert_eq!(place.run(&stages()).outcome.failed, 1);
    assert_eq!(place.plan_says(&stages())[0].1, State::Resume);
    assert_eq!(place.run(&stages()).outcome.run, 1);
}

#[test]
fn until_limits_again_forces_and_a_typo_is_told() {
    let mut place = Place::new();
    place.options.until = vec!["b".into()];
    assert_eq!(place.run(&chain("1")).ran, ["a", "b"]);
    place.options.again = vec!["toys/b".into()];
    let came = place.run(&chain("1"));
    assert_eq!((came.ran, came.outcome.cached), (vec!["b".into()], 1));
    for (until, hint) in [("bb", "did you mean `"), ("evaluate", "expected one of `a`, `b`, `c`")] {
        place.options.until = vec![until.into()];
        let error = execute(&place.plan(&chain("1")), &place.store, &place.options, &mut |_| {}).unwrap_err();
        assert!(error.to_string().contains(hint), "{error}");
    }
}

#[test]
fn an_interrupted_stage_saves_and_goes_on_at_the_next_run() {
    let mut place = Place::new();
    let stages = || toys(vec![toy("a", "", Act::Wait, &[]), echo("b", "", &["a"])]);
    let flag = Arc::clone(&place.options.interrupt);
    let came = place.run_watched(&stages(), &mut |event| {
        if matches!(event, Event::Stage { event: StageEvent::Progress { .. }, .. }) {
            flag.store(true, Ordering::Relaxed);
        }
    });
    assert_eq!((came.outcome.interrupted, came.outcome.run), (2, 0));
    assert!(came.events.iter().any(|event| matches!(event, Event::Interrupted { .. })));
    let says = place.plan_says(&stages());
    assert_eq!(says[0].1, State::Resume);
    assert_eq!(says[0].2, ["was interrupted at 1 of 2 waits"]);
    place.options.interrupt = Arc::default();
    assert_eq!(place.run(&stages()).outcome.run, 2);
}

#[test]
fn recipes_that_meet_in_a_key_run_once() {
    let place = Place::new();
    let constant = |name: &str, text: &str| toy(name, text, Act::Constant, &[]);
    let came = place.run(&toys(vec![
        constant("a1", "1"),
        constant("a2", "2"),
        echo("b1", "b", &["a1"]),
        echo("b2", "b", &["a2"]),
    ]));
    assert_eq!((came.outcome.run, came.outcome.cached), (3, 1));
    assert!(place.store.recorded("toys", "", "b1").unwrap() != place.store.recorded("toys", "", "b2").unwrap());
}

#[test]
fn a_result_that_rots_while_it_is_needed_is_made_again() {
    let place = Place::new();
    let short = || toys(vec![echo("a", "a", &[])]);
    let long = || toys(vec![echo("a", "a", &[]), echo("b", "b", &["a"])]);
    place.run(&short());
    let objects = place.store.root().join("objects");
    let came = place.run_watched(&long(), &mut |event| {
        if matches!(event, Event::Cached { .. }) {
            rot(&objects);
        }
    });
    assert_eq!((came.ran, came.outcome.run), (vec!["b".into(), "a".into(), "b".into()], 2));
    assert!(came.events.iter().any(|event| matches!(event, Event::Warning { text } if text.contains("toys/b"))));
    rot(&objects);
    assert_eq!(place.plan_says(&long())[0].1, State::Run);
    assert!(place.plan_says(&long())[0].2[0].starts_with("its result is damaged"));
    assert_eq!(place.run(&long()).outcome.failed, 0);
    assert_eq!(place.text(&long(), "b"), "ba out out");
}

/// Changes a byte of every file below a folder.
fn rot(folder: &Path) {
    use std::os::unix::fs::PermissionsExt as _;
    let mut open = vec![folder.to_owned()];
    while let Some(folder) = open.pop() {
        for entry in std::fs::read_dir(&folder).unwrap().map(Result::unwrap) {
            if entry.path().is_dir() {
                open.push(entry.path());
            } else {
                std::fs::set_permissions(entry.path(), std::fs::Permissions::from_mode(0o644)).unwrap();
                let mut bytes = std::fs::read(entry.path()).unwrap();
                bytes[0] ^= 1;
                std::fs::write(entry.path(), bytes).unwrap();
            }
        }
    }
}

#[test]
fn a_damaged_result_that_another_makes_again_is_left_to_it() {
    let place = Place::new();
    let stages = toys(vec![echo("a", "a", &[])]);
    place.run(&stages);
    let key = place.plan(&stages).nodes[0].key.clone().unwrap();
    let whole = place.folder.path().join("whole");
    let objects = place.store.root().join("objects");
    assert!(std::process::Command::new("cp").arg("-a").args([&objects, &whole]).status().unwrap().success());
    rot(&objects);
    let mut lock = place.store.try_lock(&key).unwrap();
    let came = place.run_watched(&stages, &mut |event| {
        if matches!(event, Event::Waiting { .. }) {
            std::fs::rename(&objects, place.folder.path().join("rotten")).unwrap();
            std::fs::rename(&whole, &objects).unwrap();
            lock = None;
        }
    });
    assert_eq!((came.outcome.run, came.outcome.cached, came.ran.len()), (0, 1, 0), "{:?}", came.events);
}

#[test]
fn a_key_held_elsewhere_is_waited_for() {
    let place = Place::new();
    let stages = toys(vec![echo("a", "a", &[])]);
    let key = place.plan(&stages).nodes[0].key.clone().unwrap();
    let mut lock = place.store.try_lock(&key).unwrap();
    assert!(lock.is_some());
    let came = place.run_watched(&stages, &mut |event| {
        if matches!(event, Event::Waiting { .. }) {
            lock = None;
        }
    });
    assert_eq!(came.outcome.run, 1);
    assert!(came.events.iter().any(|event| matches!(event, Event::Waiting { .. })));
}

#[test]
fn a_hundred_stages_are_quick() {
    let place = Place::in_memory();
    let name = |index: usize| format!("s{index:04}");
    let chain = (0..50).map(|index| {
        let above = if index == 0 { vec![] } else { vec![name(index - 1)] };
        echo(&name(index), &index.to_string(), &above.iter().map(String::as_str).collect::<Vec<_>>())
    });
    let fan = (50..100).map(|index| echo(&name(index), &index.to_string(), &["s0000"]));
    let stages = toys(chain.chain(fan).collect());
    let began = Instant::now();
    assert_eq!(place.run(&stages).outcome.run, 100);
    let first = began.elapsed();
    let began = Instant::now();
    assert_eq!(place.run(&stages).outcome.cached, 100);
    let again = began.elapsed();
    // Objects are read-only, so the temporary folder could not remove itself.
    assert!(
        std::process::Command::new("chmod").args(["-R", "u+w"]).arg(place.folder.path()).status().unwrap().success()
    );
    assert!(first < Duration::from_secs(20) && again < Duration::from_secs(5), "{first:?}, {again:?}");
}

fn remote(name: &str, act: Act, inputs: &[&str]) -> StageSpec {
    let mut spec = stage::<Remote>(name, json!({"text": name, "act": act, "inputs": inputs}));
    spec.run.device = "cpu".to_owned();
    spec
}

/// Started under the name of a worker, this is one; started as a test, it finds no driver.
#[test]
#[expect(
    clippy::disallowed_methods,
    reason = "as a worker it is a program, and the test harness must not speak after it"
)]
fn the_worker_side() {
    let program = Program { runners: &[("remote", run_remote)], prepare: |_| Ok(()), set_threads: |_| {} };
    if std::env::args().next().is_some_and(|name| name.ends_with(WORKER)) {
        std::process::exit(serve(&program).unwrap().into());
    }
    let error = serve(&program).unwrap_err().to_string();
    assert!(error.contains("no driver"), "{error}");
}

#[test]
fn a_worker_runs_a_stage_and_tells_how_it_went() {
    let place = Place::new();
    let stages = || toys(vec![echo("a", "a", &[]), remote("b", Act::Echo, &["a"]), echo("c", "c", &["b"])]);
    let came = place.run(&stages());
    assert_eq!((came.outcome.run, came.failures()), (3, vec![]));
    assert_eq!(place.text(&stages(), "c"), "cba out out out");
    let came = place.run(&toys(vec![remote("fails", Act::Fail, &[])]));
    assert_eq!(came.failures(), ["it was meant to fail"]);
    let came = place.run(&toys(vec![remote("panics", Act::Panic, &[])]));
    assert_eq!(came.failures(), ["the stage panicked: it was meant to panic"]);
}

#[test]
fn a_worker_that_dies_is_explained() {
    let place = Place::new();
    let came = place.run(&toys(vec![remote("killed", Act::Kill, &[])]));
    let error = came.failures().concat();
    assert!(error.starts_with("the worker was killed by signal 9 (out of memory?)"), "{error}");
    let came = place.run(&toys(vec![remote("aborts", Act::Abort, &[])]));
    let error = came.failures().concat();
    assert!(error.starts_with("the worker was killed by signal 6 (SIGABRT)"), "{error}");
    assert!(error.contains("running 1 test"), "its last words are shown: {error}");
}

#[test]
fn a_worker_saves_when_asked_and_is_killed_when_it_does_not_listen() {
    let mut place = Place::new();
    let stages = |act| toys(vec![remote("a", act, &[])]);
    for act in [Act::Wait, Act::Deaf] {
        place.options.interrupt = Arc::default();
        place.options.kill = Arc::default();
        let (interrupt, kill) = (Arc::clone(&place.options.interrupt), Arc::clone(&place.options.kill));
        let came = place.run_watched(&stages(act), &mut |event| {
            if matches!(event, Event::Stage { event: StageEvent::Progress { .. }, .. }) {
                kill.store(act == Act::Deaf && interrupt.load(Ordering::Relaxed), Ordering::Relaxed);
                interrupt.store(true, Ordering::Relaxed);
            }
        });
        assert_eq!((came.outcome.interrupted, came.outcome.failed), (1, 0), "{:?}", came.events);
    }
    place.options.interrupt = Arc::default();
    place.options.kill = Arc::default();
    assert_eq!(place.run(&stages(Act::Wait)).outcome.run, 1);
}

#[test]
fn a_missing_device_or_worker_is_told_before_anything_of_the_stage_runs() {
    let place = Place::new();
    let mut spec = remote("a", Act::Echo, &[]);
    spec.run.device = "cuda:99".to_owned();
    let came = place.run(&toys(vec![spec]));
    assert!(came.failures().concat().contains("the device `cuda:99` was asked for"), "{:?}", came.events);
    assert!(came.ran.is_empty());
    let plan = place.plan(&toys(vec![echo("a", "a", &[]), remote("b", Act::Echo, &["a"])]));
    let missing = || WorkerProgram::at("/nowhere/pipe-worker".into(), Vec::new());
    let error = super::run(&plan, &place.store, &place.options, Machine::default(), &missing, &mut |_| {}).unwrap_err();
    assert!(matches!(error, ExecError::NoWorker { .. }), "{error}");
}
