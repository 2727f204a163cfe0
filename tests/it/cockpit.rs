//! A run as another terminal sees it: while it goes on, after it, and after it was killed.

use std::process::Child;
use std::time::Instant;

use serde_json::Value;

use crate::sandbox::{Sandbox, wait_for};

/// A stage that says something and waits for a file, and one that rests on it, for two seeds.
fn slow(sandbox: &Sandbox) {
    let text = r#"
        [stages.slow]
        kind = "command"
        command = ["sh", "-c", "echo seed ${params.seed}; echo begun; UNTIL; echo ended; echo ${params.seed} > out"]
        outputs = ["out"]
        run = { cpus = 1 }
        [stages.after]
        kind = "command"
        command = ["sh", "-c", "cat {inputs.a}/out > out"]
        inputs = { a = "slow" }
        outputs = ["out"]
        [params]
        seed = 0
    "#;
    sandbox.write("pipeline.toml", &text.replace("UNTIL", &sandbox.until_there("go")));
    sandbox.write("slow.toml", "pipeline = \"pipeline.toml\"\n[sweep.grid]\n\"params.seed\" = [1, 2]\n");
}

fn status(sandbox: &Sandbox) -> Vec<Value> {
    sandbox.json(&["status", "--json"]).as_array().unwrap().clone()
}

fn running(sandbox: &Sandbox) -> usize {
    status(sandbox).first().map_or(0, |run| run["running"].as_array().unwrap().len())
}

/// Ends a process in whatever way the test ends.
struct Ending(Child);

impl Drop for Ending {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
fn another_terminal_sees_a_run_and_follows_its_logs() {
    let sandbox = Sandbox::new();
    slow(&sandbox);
    assert!(sandbox.ok(&["status"]).stdout.contains("nothing runs in the store"));
    let mut run = Ending(sandbox.start(&["run", "slow.toml", "--jobs", "2"]));
    wait_for("both stages to be seen", || running(&sandbox) == 2);
    let seen = &status(&sandbox)[0];
    assert_eq!((&seen["standing"], &seen["stages"]), (&"running".into(), &4.into()));
    assert_eq!(seen["experiments"], serde_json::json!(["slow"]));
    assert_eq!(seen["waiting"][0]["stage"], "after");
    assert_eq!(seen["waiting"][0]["inputs"], serde_json::json!(["slow"]));
    let began = Instant::now();
    let shown = sandbox.ok(&["status", "slow"]).stdout;
    // On an idle machine it takes a few milliseconds; a test machine may be busy.
    assert!(began.elapsed().as_secs() < 5);
    assert!(shown.contains("seed=1/slow") && shown.contains("2 after for slow"), "{shown}");
    assert!(shown.contains("0 of 4 stages, 2 running"), "{shown}");
    assert!(sandbox.ok(&["status", "other"]).stdout.contains("nothing runs"));

    let several = sandbox.pipe(&["logs", "slow/slow"]);
    assert_eq!(several.code, Some(2));
    assert!(
        several.stderr.contains("several stages that run") && several.stderr.contains("`slow/seed=1/slow`"),
        "{}",
        several.stderr
    );
    wait_for("the stage to speak", || sandbox.ok(&["logs", "slow/seed=2/slow"]).stdout.contains("begun"));
    let mut follower = Ending(sandbox.start_telling(&["logs", "slow/seed=2/slow", "--follow", "-n", "1"], "followed"));
    let followed = || std::fs::read_to_string(sandbox.path("followed")).unwrap();
    wait_for("the follower to begin", || !followed().is_empty());
    sandbox.write("go", "");
    assert!(follower.0.wait().unwrap().success(), "it ends with the stage");
    let followed = followed();
    assert!(followed.lines().any(|line| line.ends_with("ended")), "{followed}");
    assert!(
        !followed.lines().any(|line| line.ends_with("seed 2")),
        "only the last line of what was before: {followed}"
    );
    assert!(run.0.wait().unwrap().success());

    let seen = &status(&sandbox)[0];
    assert_eq!((&seen["standing"], &seen["counts"]["run"]), (&"ended".into(), &4.into()));
    assert!(sandbox.ok(&["status"]).stdout.contains("4 of 4 stages: 4 run"));
    assert!(sandbox.ok(&["logs", "slow/seed=1/slow"]).stdout.contains("ended"), "after the run, too");
    assert_eq!(sandbox.ok(&["logs", "slow/seed=1/slow", "-n", "1", "--json"]).stdout.lines().count(), 1);
}

#[test]
fn a_run_that_was_killed_is_shown_as_dead() {
    let sandbox = Sandbox::new();
    slow(&sandbox);
    let mut run = Ending(sandbox.start(&["run", "slow.toml", "--jobs", "2"]));
    wait_for("the stages to be seen", || running(&sandbox) == 2);
    run.0.kill().unwrap();
    run.0.wait().unwrap();
    assert_eq!(status(&sandbox)[0]["standing"], "died");
    let shown = sandbox.ok(&["status"]).stdout;
    assert!(shown.contains("died") && shown.contains("seed=1/slow"), "{shown}");
    sandbox.write("go", "");
    sandbox.ok(&["run", "slow.toml"]);
    assert_eq!(status(&sandbox)[0]["standing"], "ended", "the run that went on takes its place");
}

#[test]
fn a_stage_that_failed_is_told_with_its_log_and_its_log_is_found() {
    let sandbox = Sandbox::new();
    sandbox.write(
        "bad.toml",
        "[stages.bad]\nkind = \"command\"\ncommand = [\"sh\", \"-c\", \"echo what went wrong >&2; exit 3\"]\noutputs = [\"out\"]\n",
    );
    let ended = sandbox.pipe(&["run", "bad.toml"]);
    assert_eq!(ended.code, Some(1));
    let shown = sandbox.ok(&["status"]).stdout;
    assert!(shown.contains("failed  bad/bad") && shown.contains("log.txt"), "{shown}");
    assert!(sandbox.ok(&["logs", "bad/bad"]).stdout.contains("what went wrong"));
}

#[test]
fn two_trials_and_two_stages_are_compared() {
    let sandbox = Sandbox::new();
    slow(&sandbox);
    sandbox.write("go", "");
    sandbox.ok(&["run", "slow.toml"]);
    let trials = sandbox.json(&["diff", "slow/seed=1", "slow/seed=2", "--json"]);
    assert!(trials["stages"]["slow"]["inputs"].as_object().unwrap().is_empty(), "there it begins: {trials}");
    assert!(!trials["stages"]["after"]["inputs"].as_object().unwrap().is_empty());
    let text = sandbox.ok(&["diff", "slow/seed=1/after", "slow/seed=2/after"]).stdout;
    assert!(text.contains("inputs") && text.contains("=>"), "{text}");
    assert!(sandbox.ok(&["diff", "slow/seed=1/after", "slow/seed=1/after"]).stdout.contains("one result"));
    let mixed = sandbox.pipe(&["diff", "slow/seed=1", "slow/seed=2/after"]);
    assert!(mixed.stderr.contains("`slow/seed=1` is a trial"), "{}", mixed.stderr);
    let files = sandbox.json(&["inspect", "slow/seed=1/after", "--json"]);
    assert_eq!((&files["type"], &files["files"][0]["name"]), (&"files".into(), &"out".into()));
}

#[test]
fn what_a_model_says_is_drawn_looked_into_and_asked_for_by_hand() {
    let sandbox = Sandbox::new();
    sandbox.write("tiny.toml", crate::learning::TINY);
    sandbox.ok(&["run", "tiny.toml", "--set", "stages.sft.steps=20", "--set", "stages.grpo.steps=2"]);
    let drawn = sandbox.ok(&["sample", "tiny/evaluate", "--count", "2", "--svg", "a.svg", "--png", "a.png"]).stdout;
    assert_eq!(drawn.matches("answers").count(), 2, "{drawn}");
    assert!(drawn.contains('┌') && drawn.contains('O') && drawn.contains('T'), "{drawn}");
    assert!(std::fs::read_to_string(sandbox.path("a.svg")).unwrap().ends_with("</svg>\n"));
    assert!(std::fs::read(sandbox.path("a.png")).unwrap().starts_with(b"\x89PNG"));
    let rollouts = sandbox.json(&["sample", "tiny/grpo", "--step", "0", "--count", "999", "--json"]);
    // Groups from which nothing can be learnt are drawn anew, and kept as well.
    let count = rollouts.as_array().unwrap().len();
    assert!(count >= 32 && count.is_multiple_of(4), "8 prompts of 4 at least: {count}");
    assert!(rollouts[0]["rewards"]["shaped"].is_number() && rollouts[0]["data"]["walls"].is_array());

    let groups = sandbox.json(&["inspect", "tiny/grpo.rollouts", "--step", "1", "--json"]);
    assert!(groups["step"]["groups"].as_array().unwrap().len() >= 8);
    let first = &groups["step"]["groups"][0]["samples"];
    assert_eq!(first.as_array().unwrap().len(), 4);
    let tokens = sandbox.json(&["inspect", "tiny/tokens", "--split", "train", "--row", "3", "--json"]);
    let row = &tokens["row"];
    assert_eq!(row["tokens"].as_array().unwrap().len(), row["mask"].as_array().unwrap().len());
    assert_eq!((&row["mask"][0], &row["tokens"][0]), (&0.into(), &"<|bos|>".into()));
    let model = sandbox.json(&["inspect", "tiny/sft", "--json"]);
    assert!(model["parameters"].as_u64().unwrap() > 10_000 && model["config"]["hidden_size"] == 32);
    let evaluation = sandbox.json(&["inspect", "tiny/evaluate", "--json"]);
    let ended: u64 = evaluation["outcomes"].as_object().unwrap().values().map(|count| count.as_u64().unwrap()).sum();
    assert_eq!((ended, &evaluation["metrics"]["n"]), (30, &30.0.into()));

    // What a model says by hand of an instance that it was measured on is what it said then.
    let stored = sandbox.json(&["sample", "tiny/evaluate", "--count", "1", "--json"]);
    sandbox.write("maze.json", &stored[0]["data"].to_string());
    let asked = ["sample", "tiny/grpo", "--prompt", "maze.json", "--device", "cpu", "--json"];
    let by_hand = sandbox.json(&asked);
    assert_eq!(
        (&by_hand[0]["prompt"], &by_hand[0]["turns"][0]["text"]),
        (&stored[0]["prompt"], &stored[0]["turns"][0]["text"])
    );
    // The stored evaluation has the task's diagnoses beside the verdict.
    for (name, value) in by_hand[0]["measurements"].as_object().unwrap() {
        assert_eq!(value, &stored[0]["measurements"][name], "{name}");
    }
    let generated = sandbox.ok(&["sample", "tiny/evaluate", "--generate", "5", "--device", "cpu"]).stdout;
    assert!(generated.starts_with("number 5 of seed 0"), "{generated}");
    sandbox.write("bad.txt", "no maze");
    let bad = sandbox.pipe(&["sample", "tiny/grpo", "--prompt", "bad.txt"]);
    assert_eq!(bad.code, Some(2));
    assert!(bad.stderr.contains("`bad.txt` is no instance"), "{}", bad.stderr);
}
