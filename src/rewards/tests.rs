use std::collections::BTreeMap;

use serde_json::json;

use super::*;
use crate::tasks::{Finish, Measurements};

const MEASURES: &[Measure] = &[
    Measure::new("solved", ""),
    Measure::new("format", ""),
    Measure::new("progress", ""),
    Measure::new("shortest", ""),
    Measure::new("steps", ""),
];

fn verdict(values: [f64; 5]) -> Measurements {
    MEASURES.iter().map(|measure| measure.name.clone().into_owned()).zip(values).collect()
}

fn expression(text: &str) -> RewardSpec {
    serde_json::from_value(json!({"kind": "expression", "expression": text})).unwrap()
}

fn python(script: &str, more: &serde_json::Value) -> RewardSpec {
    let mut spec = json!({"kind": "program", "command": ["python3", "-c", script], "timeout_seconds": 20});
    spec.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    serde_json::from_value(spec).unwrap()
}

/// The outcome of one reward on verdicts of episodes of one turn.
fn outcomes(spec: &RewardSpec, verdicts: &[Measurements]) -> Result<Vec<Outcome>, ScoreError> {
    let specs = BTreeMap::from([("r".to_owned(), spec.clone())]);
    let instance = json!({"size": 3});
    let samples: Vec<ScoreInput<'_>> = verdicts
        .iter()
        .map(|measurements| ScoreInput {
            instance: &instance,
            prompt: "where?",
            completion: "up down",
            finish: Finish::Stop,
            measurements,
            turns: std::slice::from_ref(measurements),
            lengths: &[],
        })
        .collect();
    let outcomes = Scorer::new(&specs, None)?.score(&samples)?;
    Ok(outcomes.into_iter().map(|mut outcomes| outcomes.remove(0)).collect())
}

fn outcome(spec: &RewardSpec, verdict: &Measurements) -> Outcome {
    outcomes(spec, std::slice::from_ref(verdict)).unwrap().remove(0)
}

fn chain(error: &ScoreError) -> String {
    let source = std::error::Error::source(error).map(ToString::to_string).unwrap_or_default();
    format!("{error}: {source}")
}

#[test]
fn fixed_rewards_read_their_measurement() {
    let verdict = verdict([1.0, 0.5, 0.0, 4.0, 4.0]);
    assert_eq!(outcome(&RewardSpec::Correct { weight: 3.0 }, &verdict), Outcome::Value(1.0));
    assert_eq!(outcome(&RewardSpec::Format { weight: 3.0 }, &verdict), Outcome::Value(0.5));
    let missing = outcome(&RewardSpec::Correct { weight: 1.0 }, &Measurements::new());
    assert_eq!(missing, Outcome::Error("the verdict has no measurement `solved`".into()));
    let nan = self::verdict([f64::NAN, 1.0, 1.0, 1.0, 1.0]);
    assert!(outcome(&RewardSpec::Correct { weight: 1.0 }, &nan).error().is_some());
}

#[test]
fn the_published_expression_scores_as_arithmetic_does() {
    let reward = expression("0.5 * progress + 0.5 * solved * shortest / max(steps, shortest)");
    assert!(reward.check(MEASURES).is_empty());
    let verdicts = [verdict([1.0, 1.0, 1.0, 4.0, 8.0]), verdict([0.0, 1.0, 0.5, 4.0, 8.0])];
    assert_eq!(outcomes(&reward, &verdicts).unwrap(), [Outcome::Value(0.75), Outcome::Value(0.25)]);
}

#[test]
fn a_division_by_zero_is_an_error_wherever_it_hides() {
    let verdict = verdict([0.0, 1.0, 0.0, 4.0, 0.0]);
    for text in ["1 / steps", "min(1, 1 / steps)", "0 * (1 / steps)", "solved / steps", "(1 / steps) ^ 0", "ln(steps)"]
    {
        let outcome = outcome(&expression(text), &verdict);
        let error = outcome.error().unwrap_or_else(|| panic!("{text}: {outcome:?}"));
        assert!(error.contains("steps = 0"), "{error}");
        assert_eq!(outcome.value(), None);
    }
    assert!(outcome(&expression("exp(1000)"), &verdict).error().is_some());
}

#[test]
fn names_are_checked_with_a_suggestion() {
    let complaints = expression("progres + solvd").check(MEASURES);
    assert_eq!(complaints.len(), 2);
    assert_eq!(complaints[0].0, "expression");
    assert_eq!(complaints[0].1, "the task has no measurement `progres`");
    assert_eq!(complaints[0].2.as_deref(), Some("did you mean `progress`?"));
    let far = expression("elephants").check(MEASURES);
    assert!(far[0].2.as_deref().unwrap().contains("the task measures `solved`, `format`"), "{far:?}");
    assert_eq!(RewardSpec::Correct { weight: 1.0 }.check(&MEASURES[1..]).len(), 1);
    assert_eq!(RewardSpec::Correct { weight: f64::INFINITY }.check(MEASURES)[0].0, "weight");
}

#[test]
fn malformed_expressions_are_complaints_and_errors() {
    for text in ["", "  ", "1 +", "(solved", "max(solved)", "solved +* 2", "foo(solved)", "solved solved", "@"] {
        assert!(!expression(text).check(MEASURES).is_empty(), "`{text}` is taken");
        let error = outcomes(&expression(text), &[]).unwrap_err();
        assert!(matches!(error, ScoreError::Reward { source: RewardError::Malformed { .. }, .. }), "`{text}`: {error}");
    }
}

#[test]
fn programs_are_checked_before_anything_runs() {
    let complaints = |value: serde_json::Value| -> Vec<String> {
        let spec: RewardSpec = serde_json::from_value(value).unwrap();
        spec.check(MEASURES).into_iter().map(|(field, message, _)| format!("{field}: {message}")).collect()
    };
    let good = json!({"kind": "program", "command": ["./r.py"], "files": ["r.py", "words/a.txt"]});
    assert_eq!(complaints(good), Vec::<String>::new());
    let empty = complaints(json!({"kind": "program", "command": [], "timeout_seconds": 0.0, "files": ["../r.py"]}));
    assert_eq!(
        empty,
        [
            "command: no program is named",
            "timeout_seconds: `0` is no time limit",
            "files.0: `../r.py` has no place in the working folder"
        ]
    );
}

#[test]
fn fields_that_came_later_leave_what_was_written_as_it_was() {
    let written = serde_json::to_value(expression("solved")).unwrap();
    assert_eq!(written, json!({"kind": "expression", "expression": "solved", "weight": 1.0}));
}

#[test]
fn a_total_is_the_weighted_sum_of_what_has_a_value() {
    let value = Outcome::Value;
    let weights = [1.0, 0.5, -2.0];
    assert_eq!(total(&weights, &[value(1.0), value(0.5), Outcome::turns(vec![0.25, 0.25])]), Some(0.25));
    assert_eq!(total(&weights, &[value(1.0), Outcome::Abstain, value(0.25)]), Some(0.5));
    assert_eq!(total(&weights, &[Outcome::Abstain, Outcome::Abstain, Outcome::Abstain]), None);
    assert_eq!(total(&weights, &[value(1.0), Outcome::Abstain, Outcome::Error("no".into())]), None);
    assert_eq!(total(&[1.0, 1.0], &[value(f64::MAX), value(f64::MAX)]), None, "an overflow is no total");
}

#[test]
fn turns_are_scored_each_and_summed() {
    let specs: BTreeMap<String, RewardSpec> = serde_json::from_value(json!({
        "env": {"kind": "expression", "expression": "2 * reward", "per": "turn"},
        "end": {"kind": "correct"},
    }))
    .unwrap();
    let turn = |reward: f64| Measurements::from([("reward".to_owned(), reward)]);
    let (turns, instance) = ([turn(0.0), turn(-1.0), turn(1.5)], json!(null));
    let measurements = verdict([1.0; 5]);
    let (prompt, completion, finish) = ("", "", Finish::Stop);
    let lengths = &[];
    let sample = ScoreInput {
        instance: &instance,
        prompt,
        completion,
        finish,
        measurements: &measurements,
        turns: &turns,
        lengths,
    };
    let mut scorer = Scorer::new(&specs, None).unwrap();
    assert_eq!(scorer.names(), ["end", "env"]);
    let scored = scorer.score(&[sample]).unwrap().remove(0);
    assert_eq!(scored, [Outcome::Value(1.0), Outcome::Turns(vec![0.0, -2.0, 3.0])]);
    assert_eq!(scorer.total(&scored), Some(2.0));
    assert_eq!(scored[1].by_turn(3), Some(vec![0.0, -2.0, 3.0]));
    assert_eq!(scored[0].by_turn(3), Some(vec![0.0, 0.0, 1.0]));
    let missing = ScoreInput { turns: &turns[..0], ..sample };
    assert_eq!(scorer.score(&[missing]).unwrap()[0][1].value(), Some(0.0));
}

#[test]
fn the_tokens_of_replies_are_known_by_episode_and_by_turn() {
    let specs: BTreeMap<String, RewardSpec> = serde_json::from_value(json!({
        "short": {"kind": "expression", "expression": "solved * clamp(1 - completion_length / 20, 0, 1)"},
        "turn": {"kind": "expression", "expression": "-completion_length", "per": "turn"},
    }))
    .unwrap();
    assert!(specs["short"].check(MEASURES).is_empty());
    let (instance, measurements) = (json!(null), verdict([1.0; 5]));
    let turns = [Measurements::new(), Measurements::new()];
    let score = |measurements: &Measurements, lengths: &[u64]| {
        let (instance, finish) = (&instance, Finish::Stop);
        let sample = ScoreInput { instance, prompt: "", completion: "", finish, measurements, turns: &turns, lengths };
        Scorer::new(&specs, None).unwrap().score(&[sample]).unwrap().remove(0)
    };
    assert_eq!(score(&measurements, &[3, 2]), [Outcome::Value(0.75), Outcome::Turns(vec![-3.0, -2.0])]);
    let unknown = score(&measurements, &[]);
    assert_eq!(unknown[0], Outcome::Error("the verdict has no measurement `completion_length`".into()));
    assert!(unknown[1].error().is_some());
    let mut own = measurements.clone();
    own.insert(COMPLETION_LENGTH.to_owned(), 10.0);
    assert_eq!(score(&own, &[3, 2])[0], Outcome::Value(0.5), "a task's own measurement goes before");
}

#[test]
fn the_control_draws_from_instance_and_completion_alone() {
    let draw = |seed: u64, size: u64, completion: &str, solved: f64| {
        let specs = BTreeMap::from([("r".to_owned(), RewardSpec::Random { seed, weight: 1.0 })]);
        let (instance, measurements) = (json!({"size": size}), verdict([solved; 5]));
        let (prompt, finish, turns, lengths) = ("", Finish::Stop, &[][..], &[][..]);
        let measurements = &measurements;
        let sample = ScoreInput { instance: &instance, prompt, completion, finish, measurements, turns, lengths };
        Scorer::new(&specs, None).unwrap().score(&[sample]).unwrap()[0][0].value().unwrap()
    };
    let first = draw(1, 3, "up", 0.0);
    assert!((0.0..1.0).contains(&first));
    assert_eq!(first.to_bits(), draw(1, 3, "up", 1.0).to_bits(), "the verdict has no part in it");
    for other in [draw(2, 3, "up", 0.0), draw(1, 4, "up", 0.0), draw(1, 3, "down", 0.0)] {
        assert_ne!(first.to_bits(), other.to_bits());
    }
    let mean = (0..400).map(|size| draw(7, size, "x", 0.0)).sum::<f64>() / 400.0;
    assert!((mean - 0.5).abs() < 0.06, "{mean}");
}

#[test]
fn the_reward_of_the_documentation_scores_abstains_and_errs() {
    let text = include_str!("../../docs/programs.md");
    let code = &text[text.find("```python\n").unwrap() + "```python\n".len()..];
    let place = tempfile::tempdir().unwrap();
    std::fs::write(place.path().join("brevity.py"), &code[..code.find("```").unwrap()]).unwrap();
    let file = json!({"$file": place.path().join("brevity.py"), "as": "brevity.py"});
    let spec: RewardSpec = serde_json::from_value(json!({
        "kind": "program", "command": ["python3", "brevity.py"], "files": [file], "batch_size": 2,
    }))
    .unwrap();
    let mut scorer = Scorer::new(&BTreeMap::from([("brevity".to_owned(), spec)]), None).unwrap();
    let (instance, measurements) = (json!({}), verdict([1.0; 5]));
    let sample = |completion: &'static str, finish| ScoreInput {
        instance: &instance,
        prompt: "",
        completion,
        finish,
        measurements: &measurements,
        turns: std::slice::from_ref(&measurements),
        lengths: &[2],
    };
    let samples = [
        sample("up down", Finish::Stop),
        sample("up", Finish::Length),
        sample(" ", Finish::Stop),
        sample("up", Finish::Stop),
    ];
    let scored = scorer.score(&samples).unwrap();
    let error = Outcome::Error("an empty answer".into());
    assert_eq!(scored, [[Outcome::Value(0.5)], [Outcome::Abstain], [error], [Outcome::Value(1.0)]]);
}

/// The rewards over mazes that the documentation lists.
fn documented() -> BTreeMap<String, RewardSpec> {
    #[derive(serde::Deserialize)]
    struct File {
        stages: BTreeMap<String, Stage>,
    }
    #[derive(serde::Deserialize)]
    struct Stage {
        rewards: BTreeMap<String, RewardSpec>,
    }
    let text = include_str!("../../docs/learning.md");
    let begin = text.find("```toml\n# As AlphaMaze's text").unwrap() + "```toml\n".len();
    let code = &text[begin..];
    let mut file = toml::from_str::<File>(&code[..code.find("```").unwrap()]).unwrap();
    file.stages.remove("grpo").unwrap().rewards
}

#[test]
fn the_rewards_of_the_documentation_pay_what_papers_say() {
    use crate::tasks::{Start, TaskSpec, open, probes::probes, replay};
    let spec: TaskSpec = serde_json::from_value(json!({"kind": "maze", "rows": 5, "columns": 5})).unwrap();
    let task = open(&spec, &spec.any_format()).unwrap();
    let rewards = documented();
    for (name, reward) in &rewards {
        assert_eq!(reward.check(&spec.measures()), [], "{name}");
    }
    let instances = task.generate(5, 0..2).unwrap();
    let (instance, other) = (&instances[0], &instances[1]);
    let mut scorer = Scorer::new(&rewards, None).unwrap();
    let mut score = |replies: &[String], finish: Finish| {
        let (turns, measurements) = replay(task.as_ref(), Start { instance, seed: 0 }, replies, finish).unwrap();
        let turns: Vec<Measurements> = turns.into_iter().map(|turn| turn.measurements).collect();
        let (completion, measurements) = (replies.concat(), &measurements);
        let (completion, lengths, turns) = (completion.as_str(), &[50][..], &turns[..]);
        let sample = ScoreInput { instance, prompt: "", completion, finish, measurements, turns, lengths };
        let outcomes = scorer.score(&[sample]).unwrap().remove(0);
        let earned: BTreeMap<String, f64> = scorer
            .names()
            .iter()
            .zip(scorer.weights())
            .zip(outcomes)
            .map(|((name, weight), outcome)| (name.clone(), weight * outcome.value().unwrap()))
            .collect();
        (measurements["solved"], earned)
    };
    let length = instance["length"].as_f64().unwrap();
    let (solved, right) = score(&task.demonstrate(instance, 0).unwrap(), Finish::Stop);
    assert_eq!(solved.to_bits(), 1f64.to_bits());
    for (name, due) in [
        ("text_correctness", 0.2 * length),
        ("text_integrity", 0.5 * length),
        ("text_thinking", 0.25),
        ("code_correctness", 0.2 * length),
        ("code_integrity", 1.0),
        ("code_thinking", 0.25),
        ("progress", 1.0),
        ("walls", 0.0),
        ("efficiency", 1.0),
        ("brevity", 0.75),
        ("form", 1.0),
    ] {
        assert!((right[name] - due).abs() < 1e-12, "{name}: {} and not {due}", right[name]);
    }
    assert_eq!(rewards.len(), 12, "and `random`");
    // Without solving: the text's reward pays for walking on, the code's and the shaped ones do not.
    let sum = |earned: &BTreeMap<String, f64>, prefix: &str| -> f64 {
        earned.iter().filter(|(name, _)| name.starts_with(prefix)).map(|(_, value)| value).sum()
    };
    let mut unsolved: BTreeMap<&str, f64> = BTreeMap::new();
    for probe in probes(task.as_ref(), instance, Some(other), 0) {
        let (solved, earned) = score(&probe.replies, probe.finish);
        for prefix in ["text_", "code_", "progress", "efficiency", "brevity"] {
            let most = unsolved.entry(prefix).or_insert(f64::NEG_INFINITY);
            *most = most.max(if solved < 1.0 { sum(&earned, prefix) } else { f64::NEG_INFINITY });
        }
    }
    assert!(unsolved["text_"] > sum(&right, "text_"), "{unsolved:?}");
    for prefix in ["code_", "efficiency", "brevity"] {
        assert!(unsolved[prefix] < sum(&right, prefix), "{prefix}: {unsolved:?}");
    }
}

#[test]
fn what_a_program_may_not_answer_is_an_error_that_names_it() {
    let answers = |list: &str, samples: usize| {
        let script = format!("import sys\nfor line in sys.stdin: print('{{\"rewards\": {list}}}', flush=True)");
        let verdicts = vec![verdict([1.0; 5]); samples];
        outcomes(&python(&script, &json!({})), &verdicts)
    };
    assert_eq!(answers("[1, null]", 2).unwrap(), [Outcome::Value(1.0), Outcome::Abstain]);
    assert_eq!(answers("[[0.5]]", 1).unwrap(), [Outcome::Turns(vec![0.5])]);
    let says = |list: &str, samples: usize, words: &str| {
        let error = chain(&answers(list, samples).unwrap_err());
        assert!(error.contains("`r`") && error.contains("`python3`") && error.contains(words), "{list}: {error}");
    };
    says("[1]", 2, "answered 1 rewards for 2 samples");
    says("[NaN]", 1, "`NaN` or `Infinity`, which is no number");
    says("[1e999]", 1, "no JSON");
    says("[\"1\"]", 1, "`\"1\"` (a reward is a finite number");
    says("[true]", 1, "for sample 0");
    says("[[1, 2]]", 1, "2 numbers for the 1 turns");
    says("{}", 1, "of another form");
}

#[test]
fn a_program_that_crashes_or_hangs_is_an_error_and_no_zero() {
    let crash = outcomes(&python("raise SystemExit('no model here')", &json!({})), &[verdict([1.0; 5])]).unwrap_err();
    assert!(chain(&crash).contains("exit status 1; it said:\nno model here"), "{}", chain(&crash));
    let hang = python("import time; time.sleep(99)", &json!({"timeout_seconds": 0.3}));
    let hang = outcomes(&hang, &[verdict([1.0; 5])]).unwrap_err();
    assert!(chain(&hang).contains("no answer within 0.3 s"), "{}", chain(&hang));
}

#[test]
fn what_a_program_does_once_does_not_end_the_run() {
    let place = tempfile::tempdir().unwrap();
    let mark = place.path().join("tried");
    for (trouble, seconds) in [("raise SystemExit(1)", 60.0), ("import time; time.sleep(99)", 2.0)] {
        // The first to answer leaves a mark, and then fails; what is started after it finds the mark.
        let script = format!(
            "import json, os, sys\nfor line in sys.stdin:\n  n = len(json.loads(line)['samples'])\n  \
             if n == 2 and not os.path.exists({mark:?}):\n    open({mark:?}, 'w')\n    {trouble}\n  \
             print(json.dumps({{'rewards': [0.5] * n}}), flush=True)"
        );
        let verdicts = vec![verdict([1.0; 5]); 4];
        let spec = python(&script, &json!({"batch_size": 2, "timeout_seconds": seconds}));
        assert_eq!(outcomes(&spec, &verdicts).unwrap(), vec![Outcome::Value(0.5); 4], "{trouble}");
        assert!(mark.exists());
        std::fs::remove_file(&mark).unwrap();
    }
}

#[test]
fn a_python_reward_scores_ten_thousand_completions_a_second() {
    let script = "import json, sys\nfor line in sys.stdin:\n  s = json.loads(line)['samples']\n  \
                  print(json.dumps({'rewards': [x['measurements']['solved'] / len(x['completion']) for x in s]}), flush=True)";
    let spec = python(script, &json!({}));
    let mut scorer = Scorer::new(&BTreeMap::from([("r".to_owned(), spec)]), None).unwrap();
    // As large as those of mazes: a layout, a trace and its answer.
    let instance = json!({"walls": vec![9; 25], "origin": 3, "target": 21, "rows": 5, "columns": 5, "length": 12});
    let (prompt, completion) = ("<|cell|><|wall|>".repeat(20), "<|up|><|3-2|>".repeat(20));
    let measurements = verdict([1.0; 5]);
    let sample = ScoreInput {
        instance: &instance,
        prompt: &prompt,
        completion: &completion,
        finish: Finish::Stop,
        measurements: &measurements,
        turns: std::slice::from_ref(&measurements),
        lengths: &[20],
    };
    let samples = vec![sample; 2_000];
    scorer.score(&samples[..1]).unwrap();
    // A busy machine may be slow for a while, and not each of thirty times.
    let mut best = 0.0_f64;
    for _ in 0..30 {
        let began = std::time::Instant::now();
        let scored = scorer.score(&samples).unwrap();
        best = best.max(scored.len() as f64 / began.elapsed().as_secs_f64());
        if best >= 10_000.0 {
            break;
        }
    }
    assert!(best >= 10_000.0, "{best:.0} completions a second");
}
