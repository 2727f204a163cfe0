//! Completions become rows: which, in what order, with which targets, and what is refused.

use std::path::Path;

use serde_json::json;

use super::*;
use crate::stages::testing::{Said, about, context, digest, give, maze_tokens, store_completions};

/// Runs the stage on tokens and completions; gives where its output lies.
fn run(tokens: &Path, stored: &Path, source: &str, params: &Value) -> anyhow::Result<(tempfile::TempDir, PathBuf)> {
    let place = tempfile::tempdir().unwrap();
    let mut context = context(place.path(), &["tokens"]);
    give(&mut context, "tokens", tokens, ArtifactType::Tokens);
    give(&mut context, "source", stored, ArtifactType::Rollouts);
    let mut value = json!({"prompts": "tokens", source: "source"});
    value.as_object_mut().unwrap().extend(params.as_object().unwrap().clone());
    serde_json::from_value::<RejectionSampling>(value).unwrap().run(&mut context)?;
    let out = place.path().join("out/tokens");
    Ok((place, out))
}

fn counts(folder: &Path) -> BTreeMap<String, u64> {
    serde_json::from_slice(&std::fs::read(folder.join("metrics.json")).unwrap()).unwrap()
}

/// Two steps over the first prompts of `rl`, the prompts of the first step again in the second: four completions each, the
/// last two the same but for the verdict of the group's number.
fn completions(tokens: &TokensFolder) -> Vec<Said> {
    let rl = tokens.split("rl").unwrap();
    let mut said = Vec::new();
    for (step, prompt) in [(0, 0), (0, 1), (1, 2), (1, 0)] {
        for sample in 0..4i64 {
            let row = &tokens.rows[rl[prompt]];
            let ids = vec![7 + prompt as i32, 20 + step as i32, 30 + sample.min(2) as i32, 2];
            said.push(Said {
                instance: row.instance.to_string(),
                prompt: tokens.prompt(rl[prompt]).unwrap().to_owned(),
                step,
                sample,
                ids,
                solved: f64::from(u8::from(prompt != 1 && sample > 0)),
                truncated: sample == 0,
                kept: prompt != 1,
                ..Said::default()
            });
        }
    }
    said
}

fn completion(tokens: &TokensFolder, row: usize) -> &[i32] {
    &tokens.row_ids(row)[tokens.prompt_lengths[row] as usize..]
}

#[test]
fn every_completion_can_be_taken_exactly_as_it_was_sampled() {
    let folder = tempfile::tempdir().unwrap();
    let path = maze_tokens(folder.path());
    let tokens = TokensFolder::open(&path).unwrap();
    let mut said = completions(&tokens);
    // Two turns: the tokens between the replies are the environment's.
    let turn = |begin, end| json!({"begin": begin, "end": end, "measurements": {"solved": 0.0}});
    said[1].turns = Some(json!([turn(0, 1), turn(3, 4)]).to_string());
    store_completions(folder.path(), true, &said);
    let all = json!({"where": "1", "unique": false});
    let (_place, out) = run(&path, folder.path(), "rollouts", &all).unwrap();
    let made = TokensFolder::open(&out).unwrap();
    let rows = made.split("rl").unwrap();
    assert_eq!(rows.len(), said.len());
    for (&row, said) in rows.iter().zip(&said) {
        let from = tokens.rows.iter().position(|row| *row.instance == *said.instance).unwrap();
        assert_eq!(about(&made, row), about(&tokens, from));
        assert_eq!(made.prompt_ids(row), tokens.prompt_ids(from));
        assert_eq!(completion(&made, row), said.ids);
        let (before, mask) = made.row_mask(row).split_at(made.prompt_lengths[row] as usize);
        assert!(before.iter().all(|target| *target == 0));
        assert_eq!(mask, if said.turns.is_some() { [1, 0, 0, 1] } else { [1; 4] });
    }
    // Validation is kept to validate on; the demonstrations to train on are not.
    assert_eq!(made.split("validation").unwrap().len(), 10);
    assert!(made.split("train").is_err());
    assert_eq!((&made.task, &made.tokenizer_digest), (&tokens.task, &tokens.tokenizer_digest));
    let (_again, again) = run(&path, folder.path(), "rollouts", &all).unwrap();
    assert_eq!(digest(&out), digest(&again));
    let counts = counts(&out);
    assert_eq!((counts["completions"], counts["kept"], counts["prompts"], counts["prompts_without"]), (16, 16, 3, 0));
    assert_eq!((counts["rows"], counts["rows.rl"], counts["target_tokens"] > 60), (26, 16, true));
}

#[test]
fn what_is_left_out_is_counted_by_its_reason() {
    let folder = tempfile::tempdir().unwrap();
    let path = maze_tokens(folder.path());
    let tokens = TokensFolder::open(&path).unwrap();
    store_completions(folder.path(), true, &completions(&tokens));
    let chosen = |params: &Value| {
        let (_place, out) = run(&path, folder.path(), "rollouts", params).unwrap();
        let made = TokensFolder::open(&out).unwrap();
        let rows: Vec<Vec<i32>> =
            made.split("rl").unwrap().iter().map(|row| completion(&made, *row).to_vec()).collect();
        let counts = counts(&out);
        let dropped: u64 =
            ["where", "unended", "duplicate", "per_prompt"].iter().map(|why| counts[&format!("dropped.{why}")]).sum();
        assert_eq!(counts["kept"] + dropped, counts["completions"]);
        assert_eq!(counts["kept"], rows.len() as u64);
        (rows, counts)
    };
    let (rows, told) = chosen(&json!({}));
    let wanted = [[7, 20, 31, 2], [7, 20, 32, 2], [9, 21, 31, 2], [9, 21, 32, 2], [7, 21, 31, 2], [7, 21, 32, 2]];
    assert_eq!(rows, wanted, "solved, once, in the order of sampling");
    assert_eq!((told["dropped.where"], told["dropped.duplicate"], told["prompts_without"]), (7, 3, 1));
    let (rows, told) = chosen(&json!({"per_prompt": 1}));
    assert_eq!(rows, [wanted[0], wanted[2]], "the second step's completions of the first prompt are more than one");
    assert_eq!(told["dropped.per_prompt"], 4);
    let (rows, _) =
        chosen(&json!({"where": "kept and step == 2 and truncated and length > 0 and completion_length == 4"}));
    assert_eq!(rows, [[9, 21, 30, 2], [7, 21, 30, 2]]);
    // One that the token limit ended is no row, and its twin no duplicate.
    let mut cut = completions(&tokens);
    cut[2].unended = true;
    store_completions(folder.path(), true, &cut);
    let (rows, told) = chosen(&json!({}));
    assert_eq!(
        (rows.as_slice(), told["dropped.unended"], told["dropped.duplicate"]),
        (&wanted.map(Vec::from)[..], 1, 2)
    );
    let error = run(&path, folder.path(), "rollouts", &json!({"where": "solved > 1"})).unwrap_err().to_string();
    assert_eq!(error, "of 16 completions none meets `solved > 1` and has an end");
}

#[test]
fn an_evaluation_serves_where_it_kept_ids() {
    let folder = tempfile::tempdir().unwrap();
    let path = maze_tokens(folder.path());
    let tokens = TokensFolder::open(&path).unwrap();
    let mut said = completions(&tokens);
    said.truncate(8);
    store_completions(folder.path(), false, &said);
    let (_place, out) = run(&path, folder.path(), "evaluation", &json!({})).unwrap();
    assert_eq!(counts(&out)["kept"], 2);
    let refused = |said: &[Said], params: &Value| {
        let other = tempfile::tempdir().unwrap();
        store_completions(other.path(), false, said);
        format!("{:#}", run(&path, other.path(), "evaluation", params).unwrap_err())
    };
    let bare = Said { ids: Vec::new(), ..said[1].clone() };
    assert!(refused(&[bare], &json!({})).contains("stored as text alone"));
    let other = Said { prompt: "another".into(), ..said[1].clone() };
    assert!(refused(&[other], &json!({})).contains("the completions are of other prompts"));
    let both = refused(&said, &json!({"keep_splits": ["rl"]}));
    assert!(both.contains("completions are on the split `rl`"), "{both}");
}

#[test]
fn mistakes_are_told_while_planning() {
    let input = |reference: &str| json!({"$input": reference, "wants": "tokens"});
    let stages: BTreeMap<String, Value> = [
        ("mazes".to_owned(), json!({"task": {"kind": "maze", "rows": 5, "columns": 5}})),
        ("tokens".to_owned(), json!({"dataset": {"$input": "mazes"}, "tokenizer": {"$input": "words"}})),
        ("others".to_owned(), json!({"dataset": {"$input": "mazes"}, "tokenizer": {"$input": "more_words"}})),
        ("grpo".to_owned(), json!({"prompts": input("tokens"), "split": "rl"})),
        ("once".to_owned(), json!({"prompts": input("tokens"), "split": "rl"})),
        ("tested".to_owned(), json!({"prompts": input("tokens"), "split": "test", "samples_per_prompt": 4})),
    ]
    .into();
    let problems = |params: &Value| -> Vec<String> {
        let mut value = json!({"prompts": "tokens"});
        value.as_object_mut().unwrap().extend(params.as_object().unwrap().clone());
        let stage = serde_json::from_value::<RejectionSampling>(value).unwrap();
        let found = Stage::check(&stage, &Upstream { stages: &stages });
        found.into_iter().map(|problem| format!("{}: {}", problem.path, problem.message)).collect()
    };
    let good = json!({"rollouts": "grpo", "where": "solved and kept and steps <= shortest and length >= 9"});
    assert_eq!(problems(&good), Vec::<String>::new());
    assert_eq!(problems(&json!({"rollouts": "grpo", "where": "solvd"})), ["where: there is no number `solvd` here"]);
    // Trainings have no diagnoses, and evaluations do.
    let optimal = "where: there is no number `optimal` here";
    assert_eq!(problems(&json!({"rollouts": "grpo", "where": "optimal"})), [optimal]);
    assert!(!problems(&json!({"evaluation": "probe", "where": "optimal"})).contains(&optimal.to_owned()));
    let starts = |params: &Value, words: &str| {
        let found = problems(params);
        assert!(found.len() == 1 && found[0].starts_with(words), "{found:?}");
    };
    starts(&json!({}), "rollouts: neither");
    starts(&json!({"rollouts": "grpo", "evaluation": "once"}), "evaluation: `rollouts` and");
    starts(&json!({"evaluation": "once"}), "evaluation: `once` samples each prompt once");
    starts(&json!({"evaluation": "tested"}), "evaluation: the completions of `tested` are on the split `test`");
    starts(&json!({"rollouts": "grpo", "keep_splits": ["rl"]}), "keep_splits[0]: `grpo` sampled on the split `rl`");
    starts(&json!({"rollouts": "grpo", "prompts": "others"}), "prompts: `grpo` sampled on tokens of another tokenizer");
}
