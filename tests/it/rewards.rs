//! Rewards from the outside: stored completions under other rewards, and the audit before training.

use crate::sandbox::Sandbox;

/// Mazes, a base model and one short training.
const TINY: &str = r#"
    [stages.mazes]
    kind = "synthesize"
    task = { kind = "maze", rows = 3, columns = 3 }
    unique = false
    splits = { train = 60, rl = 30, validation = 10, test = 10 }
    [stages.tokenizer]
    kind = "tokenizer"
    task = { kind = "maze", rows = 3, columns = 3 }
    format = { kind = "compact", trace = "direct" }
    [stages.tokens]
    kind = "tokenize"
    dataset = "mazes"
    tokenizer = "tokenizer"
    format = { kind = "compact", trace = "direct" }
    [stages.base]
    kind = "model"
    tokenizer = "tokenizer"
    architecture = { kind = "qwen2", hidden_size = 16, layers = 1, heads = 2 }
    [stages.sft]
    kind = "sft"
    model = "base"
    data = "tokens"
    steps = 60
    batch_size = 32
    learning_rate = 5e-3
    run = { cpus = 1, device = "cpu" }
    [stages.grpo]
    kind = "grpo"
    model = "sft"
    prompts = "tokens"
    steps = 2
    prompts_per_step = 6
    group_size = 4
    max_new_tokens = 20
    run = { cpus = 1, device = "cpu" }
    [stages.grpo.rewards.correct]
    kind = "correct"
    [stages.grpo.rewards.moves]
    kind = "expression"
    expression = "0.5 * valid_moves"
"#;

#[test]
fn stored_completions_are_scored_anew_without_a_model() {
    let sandbox = Sandbox::new();
    sandbox.write("tiny.toml", TINY);
    sandbox.ok(&["run", "tiny.toml"]);
    // The same rewards give the same totals.
    let same = "[rewards.correct]\nkind = \"correct\"\n[rewards.moves]\nkind = \"expression\"\nexpression = \"0.5 * valid_moves\"\n";
    sandbox.write("same.toml", same);
    let report = sandbox.json(&[
        "rescore",
        "--json",
        "tiny/grpo",
        "--rewards",
        "same.toml",
        "-o",
        &sandbox.path("s.parquet").display().to_string(),
    ]);
    assert!((report["rank_agreement"].as_f64().unwrap() - 1.0).abs() < 1e-9, "{report}");
    assert_eq!(report["informative"]["before"], report["informative"]["after"]);
    assert_eq!(report["completions"].as_u64().unwrap(), 4 * report["groups"].as_u64().unwrap());
    let shares: Vec<f64> =
        report["rewards"].as_array().unwrap().iter().map(|reward| reward["variance_share"].as_f64().unwrap()).collect();
    assert!((shares.iter().sum::<f64>() - 1.0).abs() < 1e-9, "{shares:?}");
    let columns = pipe::stages::table::column_names(&sandbox.path("s.parquet")).unwrap();
    assert!(columns.iter().any(|column| column == "reward_moves"), "{columns:?}");
    let audited = sandbox.json(&["audit", "rewards", "tiny.toml", "--completions", "tiny/grpo", "--json"]);
    assert_eq!(audited[0]["completions"], report["completions"]);
    // A program reads structured instances; another reward has other totals.
    let script = "import json, sys\nfor line in sys.stdin:\n  s = json.loads(line)['samples']\n  \
                  print(json.dumps({'rewards': [len(x['instance']) if x['instance'] else None for x in s]}), flush=True)\n";
    sandbox.write("size.py", script);
    sandbox.write(
        "other.toml",
        "[rewards.size]\nkind = \"program\"\ncommand = [\"python3\", \"size.py\"]\nfiles = [\"size.py\"]\n",
    );
    let other = sandbox.json(&["rescore", "--json", "tiny/grpo", "--rewards", "other.toml"]);
    assert_eq!(other["rewards"][0]["abstained"], 0, "{other}");
    assert_eq!(other["informative"]["after"], 0);
    sandbox.write("bad.toml", "[rewards.x]\nkind = \"expression\"\nexpression = \"valid_move\"\n");
    let bad = sandbox.pipe(&["rescore", "tiny/grpo", "--rewards", "bad.toml"]);
    assert_eq!(bad.code, Some(2));
    assert!(bad.stderr.contains("rewards.x.expression") && bad.stderr.contains("valid_moves"), "{}", bad.stderr);
    let none = sandbox.pipe(&["rescore", "tiny/sft", "--rewards", "same.toml"]);
    assert_eq!(none.code, Some(2), "{}", none.stderr);
}

#[test]
fn a_reward_for_every_valid_move_is_named_as_a_hole_before_training() {
    let sandbox = Sandbox::new();
    sandbox.write("tiny.toml", TINY);
    // Nothing has run: it needs no model, no data and no worker.
    let reports = sandbox.json(&["audit", "rewards", "tiny.toml", "--json"]);
    let report = &reports[0];
    assert_eq!(report["stage"], "grpo");
    assert_eq!(report["holes"]["moves"]["pays_unsolved"], true, "{report}");
    assert_eq!(report["holes"]["correct"]["pays_unsolved"], false, "{report}");
    assert_eq!(report["total"]["pays_unsolved"], true);
    assert!(report["total"]["unsolved"].as_f64().unwrap() > report["total"]["mean_solved"].as_f64().unwrap());
    assert_eq!(report["total"]["answer"]["family"], "loop", "{report}");
    let shown = sandbox.ok(&["audit", "rewards", "tiny.toml"]);
    assert!(
        shown.stdout.contains("`moves` is a hole") && shown.stdout.contains("`correct` is no hole"),
        "{}",
        shown.stdout
    );
    assert!(shown.stdout.contains("without solving: loop `"), "{}", shown.stdout);
    let denied = sandbox.pipe(&["audit", "rewards", "tiny.toml", "--deny"]);
    assert_eq!(denied.code, Some(1), "{}", denied.stderr);
    // Paid only when solved, there is no hole and nothing to deny.
    let honest = "stages.grpo.rewards.moves.expression=0.5 * solved * shortest / max(steps, shortest)";
    sandbox.ok(&["audit", "rewards", "tiny.toml", "--deny", "--set", honest]);
    let wrong = sandbox.pipe(&["audit", "rewards", "tiny.toml", "--stage", "sft"]);
    assert_eq!(wrong.code, Some(2));
    assert!(wrong.stderr.contains("no stage of kind `grpo`"), "{}", wrong.stderr);
}

/// Several completions of each prompt, prompts chosen by them, and the training's own completions as rows.
const CHOSEN: &str = r#"
    [stages.probe]
    kind = "evaluate"
    model = "sft"
    prompts = "tokens"
    split = "rl"
    samples_per_prompt = 4
    temperature = 1.0
    max_new_tokens = 20
    run = { cpus = 1, device = "cpu" }
    [stages.chosen]
    kind = "select"
    tokens = "tokens"
    evaluation = "probe"
    where = "length >= 2 and progress < 1"
    [stages.own]
    kind = "rejection_sampling"
    prompts = "tokens"
    rollouts = "grpo"
    where = "kept"
    [stages.again]
    kind = "sft"
    model = "sft"
    data = "own"
    split = "rl"
    steps = 2
    batch_size = 8
    run = { cpus = 1, device = "cpu" }
    [table]
    metrics = [
        "grpo.reward/correct/variance_share", "grpo.reward/moves/variance_share",
        "probe.pass@1", "probe.pass@2", "probe.solved", "chosen.kept", "own.kept",
    ]
"#;

#[test]
fn a_table_shows_pass_at_k_what_was_chosen_and_what_each_reward_did() {
    let sandbox = Sandbox::new();
    sandbox.write("tiny.toml", &[TINY, CHOSEN].concat());
    sandbox.ok(&["run", "tiny.toml"]);
    let table = sandbox.json(&["table", "--json", "tiny.toml"]);
    let metrics = &table["arms"][0]["metrics"];
    let mean = |name: &str| metrics[name]["mean"].as_f64().unwrap_or_else(|| panic!("no `{name}`: {table}"));
    assert!((mean("probe.pass@1") - mean("probe.solved")).abs() < 1e-12);
    assert!(mean("probe.pass@2") >= mean("probe.pass@1"));
    assert_eq!(metrics["probe.pass@2"]["n"], metrics["probe.solved"]["n"], "instances, and not completions");
    assert!(mean("chosen.kept") > 0.0 && mean("own.kept") > 0.0);
    // The shares over the run are those that the same rewards have over the stored completions.
    let rewards = "[rewards.correct]\nkind = \"correct\"\n[rewards.moves]\nkind = \"expression\"\nexpression = \"0.5 * valid_moves\"\n";
    sandbox.write("same.toml", rewards);
    let report = sandbox.json(&["rescore", "--json", "tiny/grpo", "--rewards", "same.toml"]);
    for reward in report["rewards"].as_array().unwrap() {
        let name = format!("grpo.reward/{}/variance_share", reward["name"].as_str().unwrap());
        assert!((mean(&name) - reward["variance_share"].as_f64().unwrap()).abs() < 1e-9, "{name}");
    }
    // A name that no stage measures is told before anything runs.
    sandbox.write("wrong.toml", &[TINY, &CHOSEN.replace("pass@2", "pass@4")].concat());
    let told = sandbox.pipe(&["check", "wrong.toml"]);
    assert_ne!(told.code, Some(0), "{}", told.stderr);
    assert!(told.stderr.contains("pass@4"), "{}", told.stderr);
}
