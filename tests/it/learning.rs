//! The learning half from the outside: a tiny policy is trained, killed, resumed and evaluated through the binary.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use crate::sandbox::{Ended, Sandbox, files, wait_for};

/// 3x3 mazes and a very small decoder: every stage takes a second or two.
pub(crate) const TINY: &str = r#"
    [params]
    seed = 1
    [stages.mazes]
    kind = "synthesize"
    task = { kind = "maze", rows = 3, columns = 3 }
    unique = false
    splits = { train = 400, rl = 60, validation = 20, test = 30 }
    [stages.tokenizer]
    kind = "tokenizer"
    task = { kind = "maze", rows = 3, columns = 3 }
    format = { kind = "compact", trace = "path" }
    [stages.tokens]
    kind = "tokenize"
    dataset = "mazes"
    tokenizer = "tokenizer"
    format = { kind = "compact", trace = "path" }
    [stages.base]
    kind = "model"
    tokenizer = "tokenizer"
    architecture = { kind = "qwen2", hidden_size = 32, layers = 2, heads = 2 }
    seed = "${params.seed}"
    [stages.sft]
    kind = "sft"
    model = "base"
    data = "tokens"
    steps = 120
    batch_size = 32
    learning_rate = 3e-3
    validate = { every = 40, samples = 20 }
    seed = "${params.seed}"
    run = { cpus = 1, save_every = "1s", device = "cpu" }
    [stages.grpo]
    kind = "grpo"
    model = "sft"
    prompts = "tokens"
    steps = 12
    prompts_per_step = 8
    group_size = 4
    generation_chunk = 2
    max_new_tokens = 40
    validate = { every = 6, samples = 20 }
    rewards = { correct = { kind = "correct" }, shaped = { kind = "expression", expression = "progress", weight = 0.5 } }
    seed = "${params.seed}"
    run = { cpus = 1, save_every = "1s", device = "cpu" }
    [stages.evaluate]
    kind = "evaluate"
    model = "grpo"
    prompts = "tokens"
    max_new_tokens = 40
    run = { cpus = 1, device = "cpu" }
"#;

const RESULTS: &[&str] =
    &["tiny/sft.last", "tiny/sft.best", "tiny/grpo.last", "tiny/grpo.best", "tiny/grpo.rollouts", "tiny/evaluate"];

fn digests(sandbox: &Sandbox) -> Vec<String> {
    RESULTS.iter().map(|result| sandbox.digest(result)).collect()
}

/// Kills the workers of a driver at once, as the system does when memory runs out.
fn kill_workers(driver: u32) {
    let _ = Command::new("pkill").args(["-KILL", "-P", &driver.to_string()]).status();
}

/// Waits until a training has made its first step.
fn wait_for_a_step(sandbox: &Sandbox) {
    let has_a_line = |path: &PathBuf| {
        path.ends_with("metrics.jsonl") && std::fs::metadata(path).is_ok_and(|metadata| metadata.len() > 0)
    };
    wait_for("a training's first step", || files(&sandbox.path("artifacts/logs")).iter().any(has_a_line));
}

#[test]
fn killed_ten_times_is_as_if_never_killed() {
    let whole = Sandbox::new();
    whole.write("tiny.toml", TINY);
    let begin = Instant::now();
    whole.ok(&["run", "tiny.toml"]);
    let taken = begin.elapsed();
    let wanted = digests(&whole);

    let torn = Sandbox::new();
    torn.write("tiny.toml", TINY);
    torn.ok(&["run", "tiny.toml", "--until", "base", "--until", "tokens"]);
    let mut bits: u64 = 0x9E37_79B9_7F4A_7C15;
    for round in 0..10 {
        bits ^= bits << 13;
        bits ^= bits >> 7;
        bits ^= bits << 17;
        let mut run = torn.start(&["run", "tiny.toml"]);
        if round == 0 {
            // This one comes inside a training, however slow the machine is.
            wait_for_a_step(&torn);
        } else {
            std::thread::sleep(Duration::from_millis(600) + taken.mul_f64((bits % 1000) as f64 / 6000.0));
        }
        if round % 2 == 0 {
            kill_workers(run.id());
        }
        run.kill().unwrap();
        run.wait().unwrap();
    }
    torn.ok(&["run", "tiny.toml"]);
    assert_eq!(digests(&torn), wanted);
    let shown = torn.json(&["show", "--json", "tiny/sft"]);
    assert!(shown["attempts"].as_u64() > Some(1), "no kill came inside the training: {shown}");
}

#[test]
fn an_interrupted_training_saves_and_goes_on() {
    let sandbox = Sandbox::new();
    sandbox.write("tiny.toml", TINY);
    sandbox.ok(&["run", "tiny.toml", "--until", "base", "--until", "tokens"]);
    let run = sandbox.start(&["run", "tiny.toml", "--set", "stages.sft.steps=100000"]);
    wait_for_a_step(&sandbox);
    assert!(Command::new("kill").args(["-INT", &run.id().to_string()]).status().unwrap().success());
    let ended = Ended::of(&run.wait_with_output().unwrap());
    assert_eq!(ended.code, Some(130), "{}", ended.stderr);
    let plan = sandbox.json(&["plan", "--json", "tiny.toml", "--set", "stages.sft.steps=100000"]);
    let sft = plan.as_array().unwrap().iter().find(|stage| stage["stage"] == "sft").unwrap();
    assert_eq!(sft["state"], "resume", "{plan}");
}

#[test]
fn a_device_that_is_not_there_is_a_clear_failure() {
    if Path::new("/dev/nvidia0").exists() {
        return;
    }
    let sandbox = Sandbox::new();
    sandbox.write("tiny.toml", TINY);
    let set = ["--set", "stages.sft.run.device=cuda:0"];
    let ended = sandbox.pipe(&["run", "tiny.toml", "--until", "sft", set[0], set[1]]);
    assert_eq!(ended.code, Some(1), "{}", ended.stderr);
    assert!(ended.stderr.contains("cuda:0"), "{}", ended.stderr);
}

#[test]
fn a_changed_learning_rate_reruns_its_stage_and_what_rests_on_it() {
    let sandbox = Sandbox::new();
    sandbox.write("tiny.toml", TINY);
    let short = ["--set", "stages.sft.steps=5", "--set", "stages.grpo.steps=1"];
    sandbox.ok(&[&["run", "tiny.toml"], &short[..]].concat());
    let outcome = sandbox.run(&[&["tiny.toml"], &short[..], &["--set", "stages.grpo.learning_rate=2e-4"]].concat());
    assert_eq!((&outcome["run"], &outcome["cached"]), (&2.into(), &5.into()), "{outcome}");
}

#[test]
fn tensorboard_has_a_run_a_stage_and_a_session_a_trial() {
    let sandbox = Sandbox::new();
    let sweep = "[sweep.grid]\n\"stages.grpo.learning_rate\" = [1e-4, 2e-4]\n";
    sandbox.write("tiny.toml", &format!("{TINY}{sweep}"));
    sandbox.ok(&["run", "tiny.toml", "--set", "stages.sft.steps=4", "--set", "stages.grpo.steps=1"]);
    let events = |run: &str| {
        let folder = sandbox.path("artifacts/tensorboard/tiny").join(run);
        let entries = std::fs::read_dir(&folder).unwrap_or_else(|error| panic!("{}: {error}", folder.display()));
        let path = entries.map(|entry| entry.unwrap().path()).next().unwrap();
        assert!(path.to_str().unwrap().contains("events.out.tfevents."), "{}", path.display());
        std::fs::read(path).unwrap()
    };
    let has = |bytes: &[u8], text: &str| bytes.windows(text.len()).any(|window| window == text.as_bytes());
    for trial in ["learning_rate=0.0001", "learning_rate=0.0002"] {
        for stage in ["sft", "grpo"] {
            let run = events(&format!("{trial}/{stage}"));
            for tag in ["loss", "validation/solved", "validation/completions/", "validation/walks/"] {
                assert!(has(&run, tag), "{stage} shows no {tag}");
            }
        }
        let rollout = events(&format!("{trial}/grpo"));
        for tag in ["completions/length", "reward/total", "policy/log_ratio"] {
            assert!(has(&rollout, tag), "no {tag}");
        }
        assert!(has(&events(&format!("{trial}/evaluate")), "evaluation/walks/"));
        let session = events(&format!("{trial}/hparams"));
        for tag in ["_hparams_/session_start_info", "learning_rate", "evaluate/solved", "_hparams_/session_end_info"] {
            assert!(has(&session, tag), "the session has no {tag}");
        }
    }
}

#[test]
fn scores_are_those_of_transformers_and_bad_rows_are_located() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("learn/tests/fixtures/models/qwen3");
    let golden = std::fs::read_to_string(folder.join("golden.json")).unwrap();
    let golden: serde_json::Value = serde_json::from_str(&golden).unwrap();
    let logits: Vec<f64> = serde_json::from_value(golden["logits"].clone()).unwrap();
    let rows: Vec<Vec<usize>> = serde_json::from_value(golden["ids"].clone()).unwrap();
    let sandbox = Sandbox::new();
    let lines: Vec<String> = rows.iter().map(|ids| format!("{{\"ids\": {ids:?}, \"id\": {}}}\n", ids[1])).collect();
    sandbox.write("rows.jsonl", &lines.concat());
    let model = folder.to_str().unwrap();
    let printed = sandbox.ok(&["score", model, "rows.jsonl", "--device", "cpu"]).stdout;
    let alone = ["--device", "cpu", "--batch-size", "1", "--output", "scores.jsonl"];
    assert_eq!(sandbox.ok(&[&["score", model, "rows.jsonl"], &alone[..]].concat()).stdout, "");
    let written = std::fs::read_to_string(sandbox.path("scores.jsonl")).unwrap();
    for (row, ids) in rows.iter().enumerate() {
        for text in [&printed, &written] {
            let line: serde_json::Value = serde_json::from_str(text.lines().nth(row).unwrap()).unwrap();
            assert_eq!((&line["id"], line["logprobs"][0].is_null()), (&ids[1].into(), true));
            for place in 1..ids.len() {
                let before = &logits[(row * ids.len() + place - 1) * 16..][..16];
                let total: f64 = before.iter().map(|logit| logit.exp()).sum();
                let theirs = before[ids[place]] - total.ln();
                let ours = line["logprobs"][place].as_f64().unwrap();
                assert!((ours - theirs).abs() < 1e-4, "row {row}, token {place}: {ours} against {theirs}");
            }
        }
    }
    sandbox.write("rows.jsonl", "{\"ids\": [1, 2]}\n{\"ids\": [1, 16]}\n");
    let ended = sandbox.pipe(&["score", model, "rows.jsonl", "--device", "cpu"]);
    assert_eq!((ended.code, ended.stdout.as_str()), (Some(2), ""));
    assert!(ended.stderr.starts_with("error: the row has the token id 16"), "{}", ended.stderr);
    assert!(ended.stderr.contains("--> rows.jsonl:2"), "{}", ended.stderr);
    let code = |arguments: &[&str]| sandbox.pipe(&[&["score"], arguments].concat()).code;
    assert_eq!(code(&["no-folder", "rows.jsonl", "--device", "cpu"]), Some(2));
    // What is right and cannot be done here is another matter.
    sandbox.write("rows.jsonl", "{\"ids\": [1, 2]}\n");
    assert_eq!(code(&[model, "rows.jsonl", "--device", "cpu", "--output", "no-folder/scores.jsonl"]), Some(1));
    assert_eq!(code(&[model, "rows.jsonl", "--device", "cuda:99"]), Some(1));
}

#[test]
fn arms_whose_difference_changes_nothing_are_told_and_pairs_that_mean_nothing_are_refused() {
    let sandbox = Sandbox::new();
    sandbox.write("tiny.toml", TINY);
    let sweep = |updates: u64| {
        format!(
            r#"
            pipeline = "tiny.toml"
            [stages.grpo]
            kl = {{ beta = 0.0 }}
            updates_per_step = {updates}
            [sweep]
            seeds = {{ path = "params.seed", values = [1, 2] }}
            grid = {{ "stages.grpo.preset" = ["grpo", "dr_grpo", "gspo"] }}
            "#
        )
    };
    sandbox.write("loss.toml", &sweep(1));
    let told = sandbox.ok(&["plan", "loss.toml"]).stderr;
    assert!(told.contains("arms `preset=grpo` and `preset=gspo` of `loss` are the same arm"), "{told}");
    assert!(!told.contains("dr_grpo"), "{told}");
    sandbox.write("loss.toml", &sweep(2));
    assert!(!sandbox.ok(&["plan", "loss.toml"]).stderr.contains("same arm"));

    let refused = sandbox.pipe(&[
        "check",
        "tiny.toml",
        "--set",
        "stages.grpo.preset=gspo",
        "--set",
        "stages.grpo.reduction=token_mean",
    ]);
    assert_eq!(refused.code, Some(2));
    assert!(
        refused.stderr.contains("counts its tokens once") && refused.stderr.contains("stages.grpo.reduction"),
        "{}",
        refused.stderr
    );
    let unknown =
        sandbox.pipe(&["check", "tiny.toml", "--set", "stages.grpo.top_q=1", "--set", "stages.grpo.kl.beat=1"]);
    assert_eq!(unknown.code, Some(2));
    for hint in ["did you mean `top_", "did you mean `beta`?"] {
        assert!(unknown.stderr.contains(hint), "{}", unknown.stderr);
    }
}
