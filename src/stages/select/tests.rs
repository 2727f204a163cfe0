//! Rows of mazes chosen by length, by pass rate and in shares.

use std::path::{Path, PathBuf};

use serde_json::json;

use super::*;
use crate::stages::testing::{Said, about, context, digest, give, maze_tokens, store_completions};

/// Runs the stage on the tokens at `tokens`; gives where its output lies.
fn run(tokens: &Path, evaluation: Option<&Path>, params: &Value) -> anyhow::Result<(tempfile::TempDir, PathBuf)> {
    let place = tempfile::tempdir().unwrap();
    let mut context = context(place.path(), &["tokens"]);
    give(&mut context, "tokens", tokens, ArtifactType::Tokens);
    let mut value = json!({"tokens": "tokens"});
    value.as_object_mut().unwrap().extend(params.as_object().unwrap().clone());
    if let Some(evaluation) = evaluation {
        give(&mut context, "probe", evaluation, ArtifactType::Evaluation);
        value["evaluation"] = json!("probe");
    }
    serde_json::from_value::<Select>(value).unwrap().run(&mut context)?;
    let out = place.path().join("out/tokens");
    Ok((place, out))
}

fn counts(folder: &Path) -> BTreeMap<String, u64> {
    serde_json::from_slice(&std::fs::read(folder.join("metrics.json")).unwrap()).unwrap()
}

fn length(tokens: &TokensFolder, row: usize) -> u64 {
    tokens.data(row).unwrap().unwrap()["length"].as_u64().unwrap()
}

fn ids(tokens: &TokensFolder, rows: &[usize]) -> Vec<(Vec<i32>, Vec<u8>, i32)> {
    let whole =
        |row: &usize| (tokens.row_ids(*row).to_vec(), tokens.row_mask(*row).to_vec(), tokens.prompt_lengths[*row]);
    rows.iter().map(whole).collect()
}

#[test]
fn rows_that_hold_are_kept_in_order_and_other_splits_as_they_are() {
    let folder = tempfile::tempdir().unwrap();
    let path = maze_tokens(folder.path());
    let all = TokensFolder::open(&path).unwrap();
    let (_place, out) = run(&path, None, &json!({"where": "length >= 4"})).unwrap();
    let chosen = TokensFolder::open(&out).unwrap();
    let wanted: Vec<usize> =
        (0..all.rows.len()).filter(|row| *all.rows[*row].split != *"rl" || length(&all, *row) >= 4).collect();
    let rows: Vec<_> = wanted.iter().map(|row| about(&all, *row)).collect();
    assert_eq!((0..chosen.rows.len()).map(|row| about(&chosen, row)).collect::<Vec<_>>(), rows);
    assert_eq!(ids(&chosen, &(0..chosen.rows.len()).collect::<Vec<_>>()), ids(&all, &wanted));
    assert_eq!((&chosen.task, &chosen.tokenizer_digest, chosen.chat), (&all.task, &all.tokenizer_digest, all.chat));
    let counts = counts(&out);
    let kept = chosen.split("rl").unwrap().len() as u64;
    assert!(kept > 0 && kept < 30, "{counts:?}");
    assert_eq!((counts["seen"], counts["kept"], counts["dropped.where"]), (30, kept, 30 - kept));
    assert_eq!((counts["rows"], counts["rows.train"], counts["rows.rl"]), (30 + kept, 20, kept));
    assert_eq!(counts["tokens"], chosen.ids.len() as u64);
    let (_again, again) = run(&path, None, &json!({"where": "length >= 4"})).unwrap();
    assert_eq!(digest(&out), digest(&again));
    let (_none, everything) = run(&path, None, &json!({})).unwrap();
    for file in ["tokens.safetensors", "rows.parquet", "task.json"] {
        let bytes = |folder: &Path| std::fs::read(folder.join(file)).unwrap();
        assert!(bytes(&everything) == bytes(&path), "`{file}` of all rows is not that of the tokens");
    }
    let error = run(&path, None, &json!({"where": "length > 99"})).unwrap_err().to_string();
    assert_eq!(error, "of 30 rows of the split `rl` none meets `length > 99`");
}

#[test]
fn pass_rates_are_means_over_the_completions_of_an_instance() {
    let folder = tempfile::tempdir().unwrap();
    let path = maze_tokens(folder.path());
    let all = TokensFolder::open(&path).unwrap();
    let rl = all.split("rl").unwrap();
    // The first 20 were evaluated: the row number decides how many of four completions solve.
    let said = |place: usize, sample: i64| {
        let row = &all.rows[rl[place]];
        let solved = f64::from(u8::from(sample < place as i64 % 5));
        Said {
            instance: row.instance.to_string(),
            prompt: all.prompt(rl[place]).unwrap().to_owned(),
            sample,
            ids: vec![5; 3],
            solved,
            ..Said::default()
        }
    };
    let said: Vec<Said> = (0..20)
        .flat_map(|place| (0..4).map(move |sample| (place, sample)))
        .map(|(place, sample)| said(place, sample))
        .collect();
    store_completions(folder.path(), false, &said);
    let between = json!({"where": "solved >= 0.25 and solved <= 0.75 and completion_length == 3"});
    let (_place, out) = run(&path, Some(folder.path()), &between).unwrap();
    let chosen = TokensFolder::open(&out).unwrap();
    let wanted: Vec<&str> =
        (0..20).filter(|place| (1..=3).contains(&(place % 5))).map(|place| &*all.rows[rl[place]].instance).collect();
    let kept: Vec<&str> = chosen.split("rl").unwrap().into_iter().map(|row| &*chosen.rows[row].instance).collect();
    assert_eq!(kept, wanted);
    let counts = counts(&out);
    assert_eq!((counts["dropped.unmeasured"], counts["dropped.where"], counts["kept"]), (10, 8, 12));
    let alone = tempfile::tempdir().unwrap();
    store_completions(alone.path(), false, &said.iter().filter(|one| one.sample == 0).cloned().collect::<Vec<_>>());
    let (_place, out) = run(&path, Some(alone.path()), &json!({"where": "solved and completion_length == 3"})).unwrap();
    assert_eq!(self::counts(&out)["kept"], 16, "of one completion the length is known without its ids");
    let error = |params: &Value| format!("{:#}", run(&path, Some(folder.path()), params).unwrap_err());
    assert!(error(&json!({"split": "train"})).contains("no row of the split `train` was evaluated"));
    let other = tempfile::tempdir().unwrap();
    store_completions(other.path(), false, &[Said { prompt: "another".into(), ..said[0].clone() }]);
    let error = format!("{:#}", run(&path, Some(other.path()), &json!({})).unwrap_err());
    assert!(error.contains("the evaluation is of other tokens"), "{error}");
}

#[test]
fn shares_hold_as_far_as_the_scarcest_kind_allows() {
    let folder = tempfile::tempdir().unwrap();
    let path = maze_tokens(folder.path());
    let all = TokensFolder::open(&path).unwrap();
    let rl = all.split("rl").unwrap();
    let long = |row: &usize| length(&all, *row) >= 4;
    let there = rl.iter().filter(|row| long(row)).count();
    let (scarce, other) = (there.min(30 - there), if there <= 15 { 30 - there } else { there });
    assert!(scarce > 2 && other > scarce, "the mazes show nothing: {there} of 30 are long");
    let mix = json!([{"where": "length >= 4", "share": 0.5}]);
    let chosen = |params: &Value| {
        let (_place, out) = run(&path, None, params).unwrap();
        let chosen = TokensFolder::open(&out).unwrap();
        let rows: Vec<u64> = chosen.split("rl").unwrap().into_iter().map(|row| length(&chosen, row)).collect();
        (rows, counts(&out))
    };
    let (rows, told) = chosen(&json!({"mix": mix}));
    assert_eq!((rows.iter().filter(|length| **length >= 4).count(), rows.len()), (scarce, 2 * scarce));
    assert_eq!((told["dropped.mix"], told["dropped.rows"]), (30 - 2 * scarce as u64, 0));
    let (rows, told) = chosen(&json!({"mix": mix, "rows": 4}));
    assert_eq!((rows.iter().filter(|length| **length >= 4).count(), rows.len()), (2, 4));
    assert_eq!(told["dropped.rows"], 2 * scarce as u64 - 4);
    // The first of each kind, in the order of the tokens.
    let mut left = BTreeMap::from([(true, 2), (false, 2)]);
    let first: Vec<u64> = rl
        .iter()
        .filter(|row| {
            left.get_mut(&long(row)).is_some_and(|left| {
                *left -= 1;
                *left >= 0
            })
        })
        .map(|row| length(&all, *row))
        .collect();
    assert_eq!(rows, first);
    let (rows, _) = chosen(&json!({"mix": [{"where": "length >= 4", "share": 1.0}]}));
    assert_eq!(rows.len(), there, "nothing is left to rows of no kind");
    let error = run(&path, None, &json!({"mix": [{"where": "length > 99", "share": 0.5}]})).unwrap_err().to_string();
    assert!(error.contains("has no row with `length > 99`, of which a share of 0.5"), "{error}");
    let (rows, _) = chosen(&json!({"rows": 7}));
    assert_eq!(rows, rl[..7].iter().map(|row| length(&all, *row)).collect::<Vec<_>>());
}

#[test]
fn mistakes_are_told_while_planning() {
    let stages: BTreeMap<String, Value> = [
        ("mazes".to_owned(), json!({"task": {"kind": "maze", "rows": 5, "columns": 5}})),
        ("tokens".to_owned(), json!({"dataset": {"$input": "mazes", "wants": "dataset"}})),
        ("probe".to_owned(), json!({"split": "rl"})),
    ]
    .into();
    let problems = |params: &Value| -> Vec<String> {
        let mut value = json!({"tokens": "tokens"});
        value.as_object_mut().unwrap().extend(params.as_object().unwrap().clone());
        let found = Stage::check(&serde_json::from_value::<Select>(value).unwrap(), &Upstream { stages: &stages });
        found.into_iter().map(|problem| format!("{}: {}", problem.path, problem.message)).collect()
    };
    assert_eq!(problems(&json!({"where": "length >= 9"})), Vec::<String>::new());
    assert_eq!(problems(&json!({"where": "solved > 0"})), ["where: there is no number `solved` here"]);
    assert_eq!(problems(&json!({"where": "solved > 0", "evaluation": "probe"})), Vec::<String>::new());
    // What an evaluation diagnoses stands beside its measurements.
    assert_eq!(problems(&json!({"where": "error_wall > 0", "evaluation": "probe"})), Vec::<String>::new());
    assert_eq!(problems(&json!({"where": "error_wall > 0"})).len(), 1);
    let mix = json!({"mix": [{"where": "length >=", "share": 0.5}, {"where": "1", "share": 0.6}]});
    assert_eq!(
        problems(&mix),
        ["mix[0].where: the expression cannot be read from `>=` on", "mix: the shares sum to 1.1, more than 1"]
    );
    assert_eq!(
        problems(&json!({"evaluation": "probe", "split": "train"})),
        ["evaluation: `probe` evaluates the split `rl`, not `train`"]
    );
    assert_eq!(problems(&json!({"evaluation": "probe", "split": "test"})).len(), 2);
    assert_eq!(problems(&json!({"where": "length >= 14", "split": "test"})), Vec::<String>::new());
}
