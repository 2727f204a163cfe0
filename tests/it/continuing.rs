//! `continue` from the outside: the reference finds the state, the plan tells of it, and nothing is trained twice.

use crate::sandbox::Sandbox;

const TINY: &str = r#"
    [stages.mazes]
    kind = "synthesize"
    task = { kind = "maze", rows = 3, columns = 3 }
    unique = false
    splits = { train = 60 }
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
    steps = 3
    batch_size = 8
    schedule = { decay = "constant", warmup_ratio = 0.0 }
    run = { cpus = 1, device = "cpu" }
"#;

const MORE: &str = r#"
    [stages.more]
    kind = "sft"
    continue = "sft"
    data = "tokens"
    steps = 5
    batch_size = 8
    schedule = { decay = "constant", warmup_ratio = 0.0 }
    run = { cpus = 1, device = "cpu" }
    [stages.straight]
    kind = "sft"
    model = "base"
    data = "tokens"
    steps = 5
    batch_size = 8
    schedule = { decay = "constant", warmup_ratio = 0.0 }
    run = { cpus = 1, device = "cpu" }
"#;

#[test]
fn a_stage_goes_on_from_another_and_the_plan_tells_that_it_could() {
    let sandbox = Sandbox::new();
    sandbox.write("a.toml", TINY);
    assert_eq!(sandbox.run(&["a.toml"])["code"], 0);
    let longer = sandbox.ok(&["plan", "a.toml", "--set", "stages.sft.steps=5"]).stderr;
    assert!(longer.contains("`sft` has done 3 of these 5 steps before") && longer.contains("`continue = \"sft\"`"));
    let other = sandbox.ok(&["plan", "a.toml", "--set", "stages.sft.steps=5", "--set", "stages.sft.seed=1"]).stderr;
    assert!(!other.contains("hint"), "{other}");
    let shorter = sandbox.ok(&["plan", "a.toml", "--set", "stages.sft.steps=2"]).stderr;
    assert!(!shorter.contains("hint"), "{shorter}");
    sandbox.write("a.toml", &(TINY.to_owned() + MORE));
    let outcome = sandbox.run(&["a.toml"]);
    assert_eq!((&outcome["code"], &outcome["run"]), (&0.into(), &2.into()), "{outcome}");
    for output in ["last", "best", "state"] {
        let digest = |stage: &str| sandbox.digest(&format!("a/{stage}.{output}"));
        assert_eq!(digest("more"), digest("straight"), "{output}");
    }
}

#[test]
fn a_training_begins_at_one_place_which_is_the_end_of_a_training() {
    let sandbox = Sandbox::new();
    let mistake = |text: String| {
        let ended = sandbox.write("a.toml", &text).pipe(&["check", "a.toml"]);
        assert_eq!(ended.code, Some(2), "{}", ended.stderr);
        ended.stderr
    };
    let text = TINY.to_owned() + MORE;
    let both = mistake(text.replace("continue = \"sft\"", "continue = \"sft\"\n    model = \"base\""));
    assert!(both.contains("both say where to begin") && both.contains("a.toml:31:"), "{both}");
    let none = mistake(text.replace("continue = \"sft\"", ""));
    assert!(none.contains("neither `model` nor `continue` says where to begin"), "{none}");
    let base = mistake(text.replace("continue = \"sft\"", "continue = \"base\""));
    assert!(base.contains("`continue` of stage `more` wants a training_state, but `base` is a checkpoint"), "{base}");
    let best = mistake(text.replace("continue = \"sft\"", "continue = \"sft.best\""));
    assert!(best.contains("but `sft.best` is a checkpoint") && best.contains("did you mean `sft.state`?"), "{best}");
}
