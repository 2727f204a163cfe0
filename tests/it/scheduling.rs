//! Many stages on one machine, from the outside: failures, attempts, limits of time, named slots, and runs that share work.

use std::fs;
use std::process::Command;
use std::time::{Duration, Instant};

use serde_json::Value;

use crate::sandbox::{Ended, Sandbox, wait_for};

/// A `command` stage that runs a shell script, which may mention its inputs.
fn stage(name: &str, script: &str, inputs: &[&str], run: &str) -> String {
    let inputs: Vec<String> = inputs.iter().map(|input| format!("{input} = \"{input}\"")).collect();
    format!(
        "[stages.{name}]\nkind = \"command\"\noutputs = [\"out\"]\ncommand = [\"sh\", \"-c\", '''{script}''']\n\
         inputs = {{ {} }}\nrun = {{ {run} }}\n",
        inputs.join(", ")
    )
}

fn events(ended: &Ended) -> Vec<Value> {
    ended.stdout.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

fn count(outcome: &Value, name: &str) -> u64 {
    outcome[name].as_u64().unwrap_or_else(|| panic!("{outcome}"))
}

#[test]
fn a_failure_blocks_what_rests_on_it_and_nothing_else_unless_asked() {
    let sandbox = Sandbox::new();
    let text = stage("a", "echo no luck >&2; exit 3", &[], "")
        + &stage("b", "cat {inputs.a}/out > out", &["a"], "")
        + &stage("c", "exit 4", &[], "")
        + &stage("d", "echo d > out", &[], "");
    sandbox.write("p.toml", &text);
    let outcome = sandbox.run(&["p.toml", "--jobs", "1", "--fail-fast"]);
    assert_eq!((count(&outcome, "failed"), count(&outcome, "run"), count(&outcome, "skipped")), (1, 0, 2));
    let outcome = sandbox.run(&["p.toml", "--jobs", "1", "--max-failures", "2"]);
    assert_eq!((count(&outcome, "failed"), count(&outcome, "skipped"), outcome["code"].as_u64()), (2, 1, Some(1)));
    let ended = sandbox.pipe(&["run", "p.toml", "--jobs", "1"]);
    assert_eq!(ended.code, Some(1));
    let recalled = ended.stderr.split("2 stages failed:").nth(1).unwrap_or_else(|| panic!("{}", ended.stderr));
    assert!(recalled.contains("p/a: `sh` ended with exit status 3") && recalled.contains("p/c: "), "{recalled}");
    assert!(recalled.contains("log.txt") && !recalled.contains("no luck"), "one line each: {recalled}");
    let outcome = sandbox.run(&["p.toml", "--keep-going"]);
    assert_eq!((count(&outcome, "failed"), count(&outcome, "blocked"), count(&outcome, "cached")), (2, 1, 1));
}

#[test]
fn the_experiment_says_how_many_failures_end_it_and_the_command_line_knows_better() {
    let sandbox = Sandbox::new();
    sandbox.write("p.toml", &format!("[params]\nx = 0\n{}", stage("a", "exit ${params.x}", &[], "")));
    sandbox
        .write("e.toml", "pipeline = \"p.toml\"\n[sweep]\nmax_failures = 1\n[sweep.grid]\n\"params.x\" = [1, 2, 3]\n");
    let outcome = sandbox.run(&["e.toml", "--jobs", "1"]);
    assert_eq!((count(&outcome, "failed"), count(&outcome, "skipped")), (1, 2));
    let outcome = sandbox.run(&["e.toml", "--jobs", "1", "--max-failures", "2"]);
    assert_eq!((count(&outcome, "failed"), count(&outcome, "skipped")), (2, 1));
}

#[test]
fn a_flaky_program_is_tried_again_and_every_attempt_is_in_its_log() {
    let sandbox = Sandbox::new();
    let script = format!(
        "echo try >> {0}; echo said $(wc -l < {0}); [ $(wc -l < {0}) -ge 3 ] && echo x > out",
        sandbox.path("tries").display()
    );
    sandbox.write("p.toml", &stage("a", &script, &[], "retries = 2, backoff = \"20ms\""));
    let ended = sandbox.ok(&["run", "--json", "p.toml"]);
    let told = events(&ended);
    let retries: Vec<_> = told.iter().filter(|event| event["type"] == "retrying").collect();
    assert_eq!(retries.iter().map(|event| event["attempt"].as_u64().unwrap()).collect::<Vec<_>>(), [2, 3]);
    assert_eq!(retries[0]["attempts"], 3);
    assert!(ended.stderr.contains("attempt 2 of 3: `sh` ended with exit status 1"), "{}", ended.stderr);
    let log = told.iter().find(|event| event["type"] == "done").unwrap()["key"].as_str().unwrap().to_owned();
    let log = fs::read_to_string(sandbox.path("artifacts/logs").join(log).join("log.txt")).unwrap();
    assert!(log.contains("said 1") && log.contains("said 2") && log.contains("said 3"), "{log}");
    assert!(log.contains("attempt=1") && log.contains("attempt=3"), "{log}");
}

#[test]
fn a_program_that_takes_too_long_is_ended_and_has_failed() {
    let sandbox = Sandbox::new();
    sandbox.write("p.toml", &stage("a", "sleep 600", &[], "timeout = \"200ms\""));
    let began = Instant::now();
    let ended = sandbox.pipe(&["run", "p.toml"]);
    assert_eq!(ended.code, Some(1));
    assert!(ended.stderr.contains("timed out after 200ms") && began.elapsed().as_secs() < 60, "{}", ended.stderr);
}

#[test]
fn an_interrupt_ends_the_pause_before_another_attempt() {
    let sandbox = Sandbox::new();
    sandbox.write("p.toml", &stage("a", "exit 1", &[], "retries = 1, backoff = \"1h\""));
    let run = sandbox.start_telling(&["run", "--json", "p.toml"], "told");
    wait_for("the pause", || fs::read_to_string(sandbox.path("told")).unwrap().contains("\"retrying\""));
    assert!(Command::new("kill").args(["-INT", &run.id().to_string()]).status().unwrap().success());
    let ended = Ended::of(&run.wait_with_output().unwrap());
    assert_eq!(ended.code, Some(130), "{}", ended.stderr);
}

#[test]
fn named_slots_are_shared_and_asking_for_more_than_there_is_stops_the_run_before_it_begins() {
    let sandbox = Sandbox::new();
    // Each fails where another holds the slot at the same time.
    let script = format!("mkdir {0} && sleep 0.1 && rmdir {0} && echo x$0 > out", sandbox.path("held").display());
    let text: String =
        (0..3).map(|i| stage(&format!("s{i}"), &format!(": {i}; {script}"), &[], "slots = { gate = 1 }")).collect();
    sandbox.write("p.toml", &text);
    assert_eq!(count(&sandbox.run(&["p.toml", "--jobs", "3"]), "run"), 3);
    sandbox.write(
        "q.toml",
        &(stage("a", "echo a > out", &[], "") + &stage("b", "echo b > out", &[], "slots = { gate = 2 }")),
    );
    let ended = sandbox.pipe(&["run", "q.toml"]);
    assert_eq!(ended.code, Some(2), "{}", ended.stderr);
    assert!(ended.stderr.contains("stage `b` asks for 2 of the slot `gate`, and there is 1"), "{}", ended.stderr);
    assert!(ended.stderr.contains("--slot gate=2"), "{}", ended.stderr);
    let set = sandbox.command(&["run", "q.toml", "--until", "a"]).env("PIPE_SLOTS", "gate=two").output().unwrap();
    assert_eq!(set.status.code(), Some(2));
    assert!(sandbox.command(&["run", "q.toml"]).env("PIPE_SLOTS", "gate=2").status().unwrap().success());
    assert!(sandbox.pipe(&["run", "q.toml", "--again", "b", "--slot", "gate=3"]).code == Some(0));
}

#[test]
fn a_program_is_told_the_cores_that_it_was_given() {
    let sandbox = Sandbox::new();
    let text = stage("a", "echo $OMP_NUM_THREADS > out", &[], "cpus = 1")
        + &stage("b", "echo b $OMP_NUM_THREADS > out", &[], "cpus = 9999");
    sandbox.write("p.toml", &text);
    let ended = sandbox.ok(&["run", "p.toml"]);
    assert!(ended.stderr.contains("`b` asks for 9999 cores"), "{}", ended.stderr);
    let shown = sandbox.json(&["show", "--json", "p/a"]);
    let out = sandbox.path(shown["path"].as_str().unwrap()).join("out");
    assert_eq!(fs::read_to_string(out).unwrap(), "1\n");
}

#[test]
fn two_runs_split_the_work_between_them() {
    const STAGES: usize = 40;
    let sandbox = Sandbox::new();
    let log = sandbox.path("ran");
    let go = sandbox.until_there("go");
    let script = |i: usize| format!("echo {i} >> {}; {go}; sleep 0.05; echo {i} > out", log.display());
    let text: String = (0..STAGES).map(|i| stage(&format!("s{i}"), &script(i), &[], "")).collect();
    sandbox.write("p.toml", &text);
    let runs = [(); 2].map(|()| sandbox.start(&["run", "--json", "--jobs", "1", "p.toml"]));
    let lines = || fs::read_to_string(&log).unwrap_or_default().lines().count();
    wait_for("a stage of each run", || lines() == 2);
    sandbox.write("go", "");
    let mut ran = Vec::new();
    for run in runs {
        let ended = Ended::of(&run.wait_with_output().unwrap());
        assert_eq!(ended.code, Some(0), "{}", ended.stderr);
        let outcome = events(&ended).pop().unwrap();
        assert_eq!(count(&outcome, "run") + count(&outcome, "cached"), STAGES as u64, "{outcome}");
        ran.push(count(&outcome, "run"));
    }
    let mut lines: Vec<String> = fs::read_to_string(&log).unwrap().lines().map(str::to_owned).collect();
    assert_eq!(lines.len(), STAGES);
    lines.sort();
    lines.dedup();
    assert_eq!(lines.len(), STAGES, "each ran once");
    assert_eq!(ran.iter().sum::<u64>(), STAGES as u64);
    assert!(ran.iter().all(|ran| *ran >= STAGES as u64 / 5), "one run did nearly all: {ran:?}");
}

#[test]
fn who_waits_is_told_for_whom_and_takes_over_at_once() {
    let sandbox = Sandbox::new();
    let first = sandbox.path("first");
    let script = format!("if mkdir {}; then sleep 600; fi; echo done > out", first.display());
    // The waiting run has one job, which the stage that it waits for must not hold.
    sandbox.write("p.toml", &(stage("a", &script, &[], "") + &stage("z", "echo z > out", &[], "")));
    let mut holder = sandbox.start(&["run", "p.toml", "--until", "a"]);
    wait_for("the first run", || first.exists());
    let waiter = sandbox.start(&["run", "--json", "--jobs", "1", "p.toml"]);
    wait_for("the other stage", || sandbox.pipe(&["show", "p/z"]).code == Some(0));
    holder.kill().unwrap();
    let (pid, killed) = (holder.id(), Instant::now());
    holder.wait().unwrap();
    let ended = Ended::of(&waiter.wait_with_output().unwrap());
    assert_eq!(ended.code, Some(0), "{}", ended.stderr);
    assert!(killed.elapsed() < Duration::from_secs(60), "{:?}", killed.elapsed());
    let told = events(&ended);
    let waiting = told.iter().find(|event| event["type"] == "waiting").unwrap_or_else(|| panic!("{}", ended.stdout));
    assert_eq!(waiting["owner"]["process"], pid);
    assert!(ended.stderr.contains(&format!("process {pid} on ")), "{}", ended.stderr);
}
