//! Tuning from the outside: every arm tries the same candidates on seeds of their own, and reports what they chose.

use std::fs;

use serde_json::{Value, json};

use crate::sandbox::Sandbox;

/// Two arms, two candidates, two tuning seeds, three reporting seeds. With the `plain` arm the rate 2 is the better one, with
/// `turned` the rate 1. A file `broken` beside the store makes one tuning run fail.
fn experiment(sandbox: &Sandbox) {
    let broken = sandbox.path("broken");
    let text = r#"
        [params]
        seed = 1
        rate = 1
        sign = 1
        [stages.data]
        kind = "command"
        command = ["sh", "-c", "echo data > out"]
        outputs = ["out"]
        [stages.train]
        kind = "command"
        command = ["sh", "-c", "test ${params.sign}${params.rate}${params.seed} = -12102 && test -e BROKEN && exit 1; echo $((${params.sign} * ${params.rate} * 1000 + ${params.seed})) > out"]
        inputs = { data = "data" }
        outputs = ["out"]
        [stages.validate]
        kind = "command"
        command = ["sh", "-c", "echo \"{\\\"score\\\": $(cat {inputs.model}/out)}\" > metrics.json"]
        inputs = { model = "train" }
        outputs = ["metrics.json"]
        [stages.test]
        kind = "command"
        command = ["sh", "-c", "echo \"{\\\"score\\\": $(cat {inputs.model}/out)}\" > metrics.json; : test"]
        inputs = { model = "train" }
        outputs = ["metrics.json"]
        [sweep]
        seeds = { path = "params.seed", values = [1, 2, 3] }
        [[sweep.arm]]
        name = "turned"
        params.sign = -1
        [sweep.tune]
        grid = { "params.rate" = [1, 2] }
        seeds = [101, 102]
        metric = "validate.score"
        [table]
        metrics = ["test.score"]
        baseline = { arm = "none" }
    "#;
    sandbox.write("tuned.toml", &text.replace("BROKEN", broken.to_str().unwrap()));
}

fn trials(plan: &Value) -> Vec<String> {
    let mut names: Vec<String> =
        plan.as_array().unwrap().iter().map(|row| row["trial"].as_str().unwrap().to_owned()).collect();
    names.dedup();
    names
}

fn count(outcome: &Value, name: &str) -> u64 {
    outcome[name].as_u64().unwrap_or_else(|| panic!("{outcome}"))
}

#[test]
fn arms_are_tuned_and_then_reported_in_one_command() {
    let sandbox = Sandbox::new();
    experiment(&sandbox);
    assert_eq!(sandbox.ok(&["check", "tuned.toml"]).stdout.trim(), "ok: 1 experiment, 14 trials, 48 stages");
    let planned = sandbox.json(&["plan", "--json", "tuned.toml"]);
    assert_eq!(trials(&planned).len(), 8);
    assert!(trials(&planned).iter().all(|name| name.starts_with("tune:")), "{planned}");
    assert!(planned.as_array().unwrap().iter().all(|row| row["stage"] != "test"));
    let waiting = sandbox.ok(&["plan", "tuned.toml"]).stderr;
    assert!(
        waiting.contains("6 trials of `tuned` wait for the choice by `validate.score` among 8 tuning trials"),
        "{waiting}"
    );

    let outcome = sandbox.run(&["tuned.toml"]);
    // One `data`; a `train` and a `validate` for each tuning trial; `train`, `validate` and `test` for each that reports.
    assert_eq!((count(&outcome, "run"), count(&outcome, "cached")), (1 + 8 * 2 + 6 * 3, 0), "{outcome}");
    let tuned: Value =
        serde_json::from_slice(&fs::read(sandbox.path("artifacts/runs/tuned/tuned.json")).unwrap()).unwrap();
    assert_eq!((tuned["awaiting"].clone(), tuned["metric"].clone()), (0.into(), "validate.score".into()));
    let chosen: Vec<&Value> = tuned["arms"].as_array().unwrap().iter().map(|arm| &arm["assignment"]).collect();
    assert_eq!(chosen, [&json!({"params.rate": 2}), &json!({"params.rate": 1})]);
    let first = &tuned["arms"][0]["candidates"][0];
    assert_eq!(first["mean"], 1101.5);
    assert_eq!(first["runs"][0]["trial"], "tune:arm=none,rate=1,seed=101");
    assert_eq!(first["runs"][0]["key"].as_str().unwrap().len(), 64);

    let planned = sandbox.json(&["plan", "--json", "tuned.toml"]);
    assert_eq!(trials(&planned).len(), 8 + 6);
    assert!(planned.as_array().unwrap().iter().all(|row| row["state"] == "cached"));
    let table: Value = sandbox.json(&["table", "--json", "tuned.toml"]);
    let means: Vec<(&str, f64)> = table["arms"]
        .as_array()
        .unwrap()
        .iter()
        .map(|arm| (arm["arm"].as_str().unwrap(), arm["metrics"]["test.score"]["mean"].as_f64().unwrap()))
        .collect();
    assert_eq!(means, [("arm=none", 2002.0), ("arm=turned", -998.0)], "reporting seeds alone, as chosen");
    assert_eq!(table["tuning"]["arms"][1]["chosen"], "rate=1");
    let shown = sandbox.ok(&["table", "tuned.toml"]);
    assert!(
        shown.stderr.contains(
            "arm=turned: tuned to rate=1 (mean validate.score -898.5 over 2 seeds, the best of 2 candidates)"
        ),
        "{}",
        shown.stderr
    );

    fs::remove_file(sandbox.path("artifacts/runs/tuned/tuned.json")).unwrap();
    let again = sandbox.run(&["tuned.toml"]);
    assert_eq!((count(&again, "run"), count(&again, "cached")), (0, 35));
    assert!(sandbox.path("artifacts/runs/tuned/tuned.json").exists(), "it is a view of results");
}

#[test]
fn an_arm_whose_tuning_failed_waits_and_the_next_run_goes_on() {
    let sandbox = Sandbox::new();
    experiment(&sandbox);
    sandbox.write("broken", "");
    let outcome = sandbox.run(&["tuned.toml"]);
    assert_eq!((outcome["code"].clone(), count(&outcome, "failed")), (1.into(), 1), "{outcome}");
    assert_eq!(count(&outcome, "run"), 1 + 7 * 2 + 3 * 3, "the other arm is reported");
    let waiting = sandbox.ok(&["table", "tuned.toml"]).stderr;
    assert!(waiting.contains("3 trials of `tuned` wait"), "{waiting}");
    fs::remove_file(sandbox.path("broken")).unwrap();
    let outcome = sandbox.run(&["tuned.toml"]);
    assert_eq!((count(&outcome, "run"), count(&outcome, "failed")), (2 + 3 * 3, 0), "{outcome}");
}

#[test]
fn names_on_the_command_line_reach_stages_that_wait() {
    let sandbox = Sandbox::new();
    experiment(&sandbox);
    let unknown = sandbox.pipe(&["run", "tuned.toml", "--until", "tests"]);
    assert_eq!(unknown.code, Some(2));
    assert!(unknown.stderr.contains("did you mean `test`?"), "{}", unknown.stderr);
    let outcome = sandbox.run(&["tuned.toml", "--until", "train"]);
    assert_eq!(count(&outcome, "run"), 1 + 8, "{outcome}");
    let outcome = sandbox.run(&["tuned.toml", "--until", "test"]);
    assert_eq!(count(&outcome, "run"), 8 + 6 * 2, "all of the tuning, and of the rest no `validate`: {outcome}");
}

#[test]
fn a_metric_that_tuning_trials_do_not_have_is_told() {
    let sandbox = Sandbox::new();
    experiment(&sandbox);
    let text = fs::read_to_string(sandbox.path("tuned.toml")).unwrap().replace("validate.score", "validate.scores");
    sandbox.write("tuned.toml", &text);
    let outcome = sandbox.pipe(&["run", "tuned.toml"]);
    assert_eq!(outcome.code, Some(2));
    assert!(outcome.stderr.contains("`tuned` is tuned by `scores`, which `validate` of `tune:"), "{}", outcome.stderr);
    assert!(outcome.stderr.contains("it measured score"), "{}", outcome.stderr);
}

#[test]
fn what_runs_again_does_so_once_and_events_tell_their_phase() {
    let sandbox = Sandbox::new();
    experiment(&sandbox);
    let events = |arguments: &[&str]| -> Vec<Value> {
        let ended = sandbox.ok(arguments);
        ended.stdout.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
    };
    let first = events(&["run", "--json", "tuned.toml"]);
    let started: Vec<&Value> = first.iter().filter(|event| event["type"] == "started").collect();
    assert_eq!(started.iter().map(|event| event["phase"].as_u64().unwrap()).collect::<Vec<_>>(), [1, 2]);
    let (last, others) = first.split_last().unwrap();
    assert!(last["type"] == "finished" && last["phase"].is_null(), "the outcome is of all phases: {last}");
    let second = others.iter().position(|event| event["phase"] == 2).unwrap();
    assert!(others[..second].iter().all(|event| event["phase"] == 1));
    assert!(others[second..].iter().all(|event| event["phase"] == 2));

    // A store in which nothing is chosen yet: both phases have `data`, which has run in the first.
    fs::remove_dir_all(sandbox.path("artifacts")).unwrap();
    let outcome = sandbox.run(&["tuned.toml", "--again", "data"]);
    assert_eq!((count(&outcome, "run"), count(&outcome, "cached")), (1 + 8 * 2 + 6 * 3, 0), "{outcome}");
    // What only the second phase has runs again too.
    let outcome = sandbox.run(&["tuned.toml", "--again", "data", "--again", "test"]);
    assert_eq!(count(&outcome, "run"), 1 + 6, "{outcome}");
}
