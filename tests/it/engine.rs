//! The engine from the outside, on `command` stages: what runs, what is cached, what survives damage and kills.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::process::Command;

use serde_json::Value;

use crate::sandbox::{Ended, Sandbox, files, wait_for};

/// Three stages in a row; each counts its runs in a file of its own outside the store.
fn chain(sandbox: &Sandbox) {
    sandbox.write("numbers.txt", "3\n1\n2\n");
    let log = sandbox.path("ran");
    let text = r#"
        [params]
        keep = 1
        [stages.sorted]
        kind = "command"
        command = ["sh", "-c", "echo sorted >> RAN; sort numbers.txt > out"]
        files = ["numbers.txt"]
        outputs = ["out"]
        [stages.first]
        kind = "command"
        command = ["sh", "-c", "echo first >> RAN; head -n ${params.keep} {inputs.a}/out > out"]
        inputs = { a = "sorted" }
        outputs = ["out"]
        [stages.last]
        kind = "command"
        command = ["sh", "-c", "echo last >> RAN; cat {inputs.a}/out > out"]
        inputs = { a = "first" }
        outputs = ["out"]
    "#;
    sandbox.write("chain.toml", &text.replace("RAN", log.to_str().unwrap()));
}

fn ran(sandbox: &Sandbox) -> Vec<String> {
    let text = fs::read_to_string(sandbox.path("ran")).unwrap_or_default();
    let _ = fs::remove_file(sandbox.path("ran"));
    text.lines().map(str::to_owned).collect()
}

fn counts(outcome: &Value) -> (u64, u64, u64) {
    let count = |name: &str| outcome[name].as_u64().unwrap_or_else(|| panic!("{outcome}"));
    (count("run"), count("cached"), count("failed"))
}

/// The only file of an output.
fn content(sandbox: &Sandbox, stage: &str) -> String {
    let shown = sandbox.json(&["show", "--json", stage]);
    let folder = sandbox.path(shown["path"].as_str().unwrap());
    fs::read_to_string(folder.join("out")).unwrap()
}

#[test]
fn the_second_run_runs_nothing_and_says_so() {
    let sandbox = Sandbox::new();
    chain(&sandbox);
    assert_eq!(counts(&sandbox.run(&["chain.toml"])), (3, 0, 0));
    assert_eq!(ran(&sandbox), ["sorted", "first", "last"]);
    assert_eq!(content(&sandbox, "chain/last"), "1\n");
    assert_eq!(counts(&sandbox.run(&["chain.toml"])), (0, 3, 0));
    assert!(sandbox.ok(&["run", "chain.toml"]).stderr.contains("nothing to run"));
    assert!(ran(&sandbox).is_empty());
}

#[test]
fn what_changes_no_result_runs_nothing() {
    let sandbox = Sandbox::new();
    chain(&sandbox);
    sandbox.run(&["chain.toml"]);
    let text = fs::read_to_string(sandbox.path("chain.toml")).unwrap();
    let renamed = text.replace("stages.first", "stages.top").replace("a = \"first\"", "a = \"top\"");
    let (sorted, rest) = renamed.split_once("[stages.top]").unwrap();
    let (head, sorted) = sorted.split_once("[stages.sorted]").unwrap();
    let moved = format!("# a comment\n{head}[stages.top]{rest}\n[stages.sorted]{sorted}\nrun = {{ cpus = 1 }}\n");
    sandbox.write("chain.toml", &moved);
    assert_eq!(counts(&sandbox.run(&["chain.toml"])), (0, 3, 0));
}

#[test]
fn a_change_runs_what_rests_on_it_and_going_back_runs_nothing() {
    let sandbox = Sandbox::new();
    chain(&sandbox);
    sandbox.run(&["chain.toml"]);
    ran(&sandbox);
    assert_eq!(counts(&sandbox.run(&["chain.toml", "--set", "params.keep=2"])), (2, 1, 0));
    assert_eq!(ran(&sandbox), ["first", "last"]);
    assert_eq!(counts(&sandbox.run(&["chain.toml"])), (0, 3, 0));
}

#[test]
fn an_input_that_comes_out_as_before_stops_the_rerun() {
    let sandbox = Sandbox::new();
    chain(&sandbox);
    sandbox.run(&["chain.toml"]);
    ran(&sandbox);
    sandbox.write("numbers.txt", "9\n3\n1\n2\n");
    assert_eq!(counts(&sandbox.run(&["chain.toml"])), (2, 1, 0));
    assert_eq!(ran(&sandbox), ["sorted", "first"]);
}

#[test]
fn an_edit_of_equal_size_and_restored_time_is_seen() {
    let sandbox = Sandbox::new();
    chain(&sandbox);
    sandbox.run(&["chain.toml"]);
    let path = sandbox.path("numbers.txt");
    let time = fs::metadata(&path).unwrap().modified().unwrap();
    sandbox.write("numbers.txt", "3\n0\n2\n");
    fs::File::options().append(true).open(&path).unwrap().set_modified(time).unwrap();
    assert_eq!(counts(&sandbox.run(&["chain.toml"])), (3, 0, 0));
    assert_eq!(content(&sandbox, "chain/last"), "0\n");
}

#[test]
fn five_mistakes_are_five_located_errors_and_nothing_runs() {
    let sandbox = Sandbox::new();
    let text = [
        "[stages.a]",
        "kind = \"command\"",
        "comand = [\"true\"]",
        "outputs = [\"out\"]",
        "[stages.b]",
        "kind = \"comand\"",
        "[stages.c]",
        "kind = \"command\"",
        "command = \"true\"",
        "outputs = [\"out\"]",
        "inputs = { a = \"aa\" }",
        "[stages.d]",
        "kind = \"command\"",
        "command = [\"true\", \"${params.none}\"]",
        "outputs = [\"out\"]",
    ];
    sandbox.write("wrong.toml", &text.join("\n"));
    let ended = sandbox.pipe(&["run", "wrong.toml"]);
    assert_eq!(ended.code, Some(2), "{}", ended.stderr);
    for place in ["wrong.toml:3:1", "wrong.toml:6:8", "wrong.toml:9:11", "wrong.toml:11:16", "wrong.toml:14:"] {
        assert!(ended.stderr.contains(place), "nothing at {place}:\n{}", ended.stderr);
    }
    assert!(files(&sandbox.path("artifacts/objects")).is_empty());
}

#[test]
fn a_failing_stage_is_told_with_its_last_words_and_keeps_the_others() {
    let sandbox = Sandbox::new();
    let text = r#"
        [stages.good]
        kind = "command"
        command = ["sh", "-c", "echo good > out"]
        outputs = ["out"]
        [stages.bad]
        kind = "command"
        command = ["sh", "-c", "echo no such luck >&2; exit 7"]
        outputs = ["out"]
        [stages.after]
        kind = "command"
        command = ["sh", "-c", "cat {inputs.a}/out > out"]
        inputs = { a = "bad" }
        outputs = ["out"]
    "#;
    sandbox.write("fails.toml", text);
    let outcome = sandbox.run(&["fails.toml"]);
    assert_eq!(counts(&outcome), (1, 0, 1));
    assert_eq!((&outcome["blocked"], &outcome["code"]), (&1.into(), &1.into()));
    let ended = sandbox.pipe(&["run", "fails.toml"]);
    assert!(ended.stderr.contains("no such luck") && ended.stderr.contains('7'), "{}", ended.stderr);
}

#[test]
fn a_flipped_byte_is_set_aside_and_rebuilt() {
    let sandbox = Sandbox::new();
    chain(&sandbox);
    sandbox.run(&["chain.toml"]);
    ran(&sandbox);
    let shown = sandbox.json(&["show", "--json", "chain/first"]);
    let file = sandbox.path(shown["path"].as_str().unwrap()).join("out");
    fs::set_permissions(&file, fs::Permissions::from_mode(0o644)).unwrap();
    fs::write(&file, "7\n").unwrap();
    assert_eq!(sandbox.pipe(&["verify"]).code, Some(1));
    let outcome = sandbox.run(&["chain.toml"]);
    assert_eq!(outcome["failed"], 0, "{outcome}");
    assert!(ran(&sandbox).contains(&"first".to_owned()));
    assert_eq!(content(&sandbox, "chain/last"), "1\n");
    assert!(!files(&sandbox.path("artifacts/quarantine")).is_empty());
    assert_eq!(sandbox.pipe(&["verify"]).code, Some(0));
}

#[test]
fn planning_changes_nothing() {
    let sandbox = Sandbox::new();
    chain(&sandbox);
    let plan = sandbox.json(&["plan", "--json", "chain.toml"]);
    assert_eq!(plan.as_array().unwrap().len(), 3);
    assert!(plan.as_array().unwrap().iter().all(|stage| stage["state"] != "cached"));
    assert!(!sandbox.path("artifacts").exists());
    sandbox.run(&["chain.toml"]);
    let plan = sandbox.json(&["plan", "--json", "chain.toml"]);
    assert!(plan.as_array().unwrap().iter().all(|stage| stage["state"] == "cached" && stage["key"].is_string()));
}

#[test]
fn two_runs_at_once_do_the_work_once() {
    let sandbox = Sandbox::new();
    let log = sandbox.path("ran");
    let text = format!(
        "[stages.slow]\nkind = \"command\"\noutputs = [\"out\"]\n\
         command = [\"sh\", \"-c\", \"echo slow >> {}; {}; echo done > out\"]\n",
        log.display(),
        sandbox.until_there("go")
    );
    sandbox.write("slow.toml", &text);
    let told = ["told-0", "told-1", "told-2"];
    let runs = told.map(|file| sandbox.start_telling(&["run", "--json", "slow.toml"], file));
    let waits = |file: &&str| fs::read_to_string(sandbox.path(file)).unwrap().contains("\"waiting\"");
    wait_for("two that wait for the third", || told.iter().filter(|file| waits(file)).count() == 2);
    sandbox.write("go", "");
    for run in runs {
        let ended = Ended::of(&run.wait_with_output().unwrap());
        assert_eq!(ended.code, Some(0), "{}", ended.stderr);
    }
    assert_eq!(ran(&sandbox), ["slow"]);
}

#[test]
fn a_killed_driver_leaves_nothing_to_clean_by_hand() {
    let sandbox = Sandbox::new();
    let log = sandbox.path("ran");
    let first = sandbox.path("first");
    // Only the first attempt is slow.
    let text = format!(
        "[stages.slow]\nkind = \"command\"\noutputs = [\"out\"]\n\
         command = [\"sh\", \"-c\", \"echo slow >> {}; if mkdir {}; then sleep 600; fi; echo done > out\"]\n",
        log.display(),
        first.display()
    );
    sandbox.write("slow.toml", &text);
    let mut run = sandbox.start(&["run", "slow.toml"]);
    wait_for("the stage", || first.exists());
    run.kill().unwrap();
    run.wait().unwrap();
    assert_eq!(counts(&sandbox.run(&["slow.toml"])), (1, 0, 0));
    assert_eq!(ran(&sandbox), ["slow", "slow"]);
    assert_eq!(content(&sandbox, "slow/slow"), "done\n");
}

#[test]
fn an_interrupt_ends_as_interrupted() {
    let sandbox = Sandbox::new();
    let log = sandbox.path("ran");
    let text = format!(
        "[stages.slow]\nkind = \"command\"\noutputs = [\"out\"]\n\
         command = [\"sh\", \"-c\", \"echo slow >> {}; sleep 30; echo done > out\"]\n",
        log.display()
    );
    sandbox.write("slow.toml", &text);
    let run = sandbox.start(&["run", "--json", "slow.toml"]);
    wait_for("the stage", || log.exists());
    assert!(Command::new("kill").args(["-INT", &run.id().to_string()]).status().unwrap().success());
    let ended = Ended::of(&run.wait_with_output().unwrap());
    assert_eq!(ended.code, Some(130), "{}", ended.stderr);
    let outcome: Value = serde_json::from_str(ended.stdout.lines().last().unwrap()).unwrap();
    assert_eq!(outcome["interrupted"], 1);
}

#[test]
fn a_read_only_store_and_a_missing_file_are_clear_errors() {
    let sandbox = Sandbox::new();
    chain(&sandbox);
    sandbox.write("occupied", "");
    let ended = sandbox.pipe(&["--store", "occupied", "run", "chain.toml"]);
    assert_eq!(ended.code, Some(2), "{}", ended.stderr);
    assert!(ended.stderr.contains("occupied"), "{}", ended.stderr);
    let ended = sandbox.pipe(&["run", "missing.toml"]);
    assert_eq!(ended.code, Some(2));
    assert!(ended.stderr.contains("missing.toml"), "{}", ended.stderr);
}

#[test]
fn a_command_sees_only_the_environment_it_declares() {
    let sandbox = Sandbox::new();
    let text = r#"
        [stages.env]
        kind = "command"
        command = ["sh", "-c", "env | cut -d= -f1 | grep -v -e PWD -e SHLVL -e '^_$' -e OLDPWD | sort > out"]
        env = { WORD = "x" }
        outputs = ["out"]
    "#;
    sandbox.write("env.toml", text);
    let status = sandbox
        .command(&["run", "env.toml"])
        .env("SECRET", "1")
        .env("LANG", "C.UTF-8")
        .env_remove("CUDA_VISIBLE_DEVICES")
        .status()
        .unwrap();
    assert!(status.success());
    assert_eq!(
        content(&sandbox, "env/env"),
        "HOME\nLANG\nMKL_NUM_THREADS\nNUMEXPR_NUM_THREADS\nOMP_NUM_THREADS\nOPENBLAS_NUM_THREADS\nPATH\nRAYON_NUM_THREADS\nWORD\n"
    );
}

#[test]
fn a_sweep_runs_shared_stages_once() {
    let sandbox = Sandbox::new();
    chain(&sandbox);
    sandbox.write("sweep.toml", "pipeline = \"chain.toml\"\n[sweep.grid]\n\"params.keep\" = [1, 2]\n");
    assert_eq!(counts(&sandbox.run(&["sweep.toml"])), (5, 0, 0));
    sandbox.write("sweep.toml", "pipeline = \"chain.toml\"\n[sweep.grid]\n\"params.keep\" = [1, 2, 3]\n");
    assert_eq!(counts(&sandbox.run(&["sweep.toml"])), (2, 5, 0));
    assert_eq!(content(&sandbox, "sweep/keep=2/last"), "1\n2\n");
}
