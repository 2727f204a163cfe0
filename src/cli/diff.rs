//! `pipe diff`: what two results differ in, and what comes of it.

use std::collections::{BTreeMap, BTreeSet};

use serde::Serialize;
use serde_json::Value;

use crate::cli::comparison::fits;
use crate::cli::curves::Curves;
use crate::cli::failure::Failure;
use crate::cli::results::{StageResult, Values};
use crate::cli::show::{StageObjects, find, flatten};
use crate::cli::stored::SOLVED;
use crate::cli::ui::Look;
use crate::cli::{Session, render};
use crate::pipeline::spec::point::Point;
use crate::pipeline::stage::ArtifactType;
use crate::pipeline::store::{Digest, Lookup, Manifest, Store};

/// Compare two results: parameters, code, inputs, metrics, and the instances that only one of them solves
///
/// A and B are two stages, or two trials, of which every stage is compared.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// `EXPERIMENT[/TRIAL]/STAGE`, `FILE.toml[/TRIAL]/STAGE`, or a trial as `EXPERIMENT[/TRIAL]`
    #[arg(value_name = "A")]
    one: String,
    /// The same of the other
    #[arg(value_name = "B")]
    other: String,
    /// Instances to name on either side, at most
    #[arg(long, value_name = "N", default_value_t = 8)]
    count: usize,
}

/// The curves of a training whose ends are compared.
const TOLD: [&str; 8] = [
    "loss",
    "reward",
    "reward/*/mean",
    "token_accuracy",
    "validation/*",
    "rollout/solved",
    "completions/mean_length",
    "policy/reference_k3",
];

/// A value on either side; none where one side has no such thing.
#[derive(Clone, Debug, PartialEq, Serialize)]
struct Change<T> {
    a: Option<T>,
    b: Option<T>,
}

/// Named changes.
type Changes<T> = BTreeMap<String, Change<T>>;

/// Instances by who solves them.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
struct Solved {
    both: usize,
    neither: usize,
    only_a: Vec<String>,
    only_b: Vec<String>,
    /// Instances that only one side has.
    unpaired: usize,
}

/// What two results differ in.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
struct Difference {
    /// Whether they are one result.
    is_same: bool,
    params: Changes<String>,
    /// Kinds, versions, and what the numbers were computed with.
    code: Changes<String>,
    inputs: Changes<String>,
    /// Whether each output is the same to the last byte.
    outputs: BTreeMap<String, bool>,
    metrics: Changes<f64>,
    instances: Option<Solved>,
}

/// What two trials differ in.
#[derive(Debug, Serialize)]
struct Trials {
    stages: BTreeMap<String, Difference>,
    only_a: Vec<String>,
    only_b: Vec<String>,
}

/// With `--json`, `{params, code, inputs, outputs, metrics, instances}` with `{a, b}` for each that differs; of two trials, that
/// for each of their `stages`.
pub fn run(args: &Args, session: &Session) -> Result<(), Failure> {
    let ui = &session.ui;
    let store = session.existing_store()?;
    let trial = |name: &str| match &store {
        Some(store) if !name.contains(".toml/") => trial(name, store),
        _ => Ok(None),
    };
    match (trial(&args.one)?, trial(&args.other)?) {
        (Some(one), Some(other)) => {
            let store = store.as_ref().expect("trials are recorded in a store");
            let trials = trials(&one, &other, store)?;
            if ui.is_json() { ui.json_pretty(&trials) } else { ui.data(&trials_text(&trials, args, ui.output_color())) }
        }
        (None, None) => {
            let (one, other) = (find(&args.one, &[], session)?, find(&args.other, &[], session)?);
            let difference = difference(&one.result(), &other.result())?;
            if ui.is_json() {
                ui.json_pretty(&difference)
            } else {
                ui.data(&text(&difference, args, ui.output_color()))
            }
        }
        (Some(_), None) => Err(unlike(&args.one, &args.other)),
        (None, Some(_)) => Err(unlike(&args.other, &args.one)),
    }
}

fn unlike(trial: &str, stage: &str) -> Failure {
    Failure::wrong(format!("`{trial}` is a trial, and `{stage}` is none"))
        .hint("compare two trials, or two stages: `EXPERIMENT/TRIAL/STAGE`")
}

/// The keys of a trial's stages, where the name is one of a trial.
fn trial(name: &str, store: &Store) -> Result<Option<BTreeMap<String, Digest>>, Failure> {
    let (experiment, trial) = name.split_once('/').unwrap_or((name, ""));
    let mut trials = store.recorded_trials(experiment).map_err(|error| Failure::stage(&error))?;
    let records = trials.remove(trial);
    Ok(records.map(|stages| stages.into_iter().map(|(stage, record)| (stage, record.key)).collect()))
}

fn trials(one: &BTreeMap<String, Digest>, other: &BTreeMap<String, Digest>, store: &Store) -> Result<Trials, Failure> {
    let only = |some: &BTreeMap<String, Digest>, others: &BTreeMap<String, Digest>| {
        some.keys().filter(|name| !others.contains_key(*name)).cloned().collect()
    };
    let mut stages = BTreeMap::new();
    for (name, key) in one {
        let Some(second) = other.get(name) else { continue };
        let found = if key == second {
            Difference { is_same: true, ..Difference::default() }
        } else {
            let (first, second) = (manifest(key, name, store)?, manifest(second, name, store)?);
            let (a, b) = (StageObjects { store, manifest: &first }, StageObjects { store, manifest: &second });
            difference(&a, &b)?
        };
        stages.insert(name.clone(), found);
    }
    Ok(Trials { stages, only_a: only(one, other), only_b: only(other, one) })
}

fn manifest(key: &Digest, stage: &str, store: &Store) -> Result<std::sync::Arc<Manifest>, Failure> {
    match store.lookup(key).map_err(|error| Failure::stage(&error))? {
        Lookup::Hit(manifest) => Ok(manifest),
        Lookup::Miss => Err(Failure::wrong(format!("`{stage}` has no result: its result is no longer in the store"))
            .hint("`pipe run` makes it")),
        Lookup::Damaged { what } => Err(Failure::failed(format!("the result of `{stage}` is damaged: {what}"))
            .hint("`pipe verify --repair` puts it aside and the next run makes it again")),
    }
}

fn difference(a: &StageObjects<'_>, b: &StageObjects<'_>) -> Result<Difference, Failure> {
    let (first, second) = (a.manifest, b.manifest);
    let results = [a, b]
        .map(|found| StageResult::read(found.manifest, found.store).map_err(|error| Failure::stage(error.as_ref())));
    let [one, other] = results;
    let (one, other) = (one?, other?);
    let outputs = first.outputs.iter().filter_map(|output| {
        let like = second.outputs.iter().find(|other| other.name == output.name)?;
        Some((output.name.clone(), like.digest == output.digest))
    });
    Ok(Difference {
        is_same: first.key == second.key,
        params: changes(&params(&first.params), &params(&second.params)),
        code: changes(&code(first), &code(second)),
        inputs: changes(&inputs(&first.parts.params), &inputs(&second.parts.params)),
        outputs: outputs.collect(),
        metrics: changes(&metrics(a), &metrics(b)),
        instances: instances(&one, &other),
    })
}

/// What was measured; of a training, the end of each curve that people look for.
fn metrics(found: &StageObjects<'_>) -> BTreeMap<String, f64> {
    let mut metrics = found.manifest.metrics.clone();
    if found.manifest.outputs.iter().any(|output| output.artifact == ArtifactType::Evaluation) {
        return metrics;
    }
    let wanted = |name: &str| TOLD.iter().any(|told| fits(told, name));
    let curves = Curves::read(&found.store.logs(&found.manifest.key), &found.manifest.params, &wanted);
    for name in curves.names().filter(|name| wanted(name)) {
        if let Some(value) = curves.read_at(name, Point::Last, None) {
            metrics.entry(name.to_owned()).or_insert(value);
        }
    }
    metrics
}

/// What differs of two sets of named values.
fn changes<T: Clone + PartialEq>(one: &BTreeMap<String, T>, other: &BTreeMap<String, T>) -> Changes<T> {
    let names: BTreeSet<&String> = one.keys().chain(other.keys()).collect();
    let change = |name: &&String| Change { a: one.get(*name).cloned(), b: other.get(*name).cloned() };
    let all = names.iter().map(|name| ((*name).clone(), change(name)));
    all.filter(|(_, change)| change.a != change.b).collect()
}

fn params(params: &Value) -> BTreeMap<String, String> {
    let mut lines = Vec::new();
    flatten("", params, &mut lines);
    lines.into_iter().collect()
}

/// What each input was, by the parameter that names it: another stage's name for the same content is no difference.
fn inputs(params: &Value) -> BTreeMap<String, String> {
    let mut found = BTreeMap::new();
    let mut left = vec![(String::new(), params)];
    while let Some((path, value)) = left.pop() {
        let below = |name: &str| if path.is_empty() { name.to_owned() } else { format!("{path}.{name}") };
        match value {
            Value::Object(fields) => match fields.get("$input").and_then(Value::as_str) {
                Some(digest) => {
                    found.insert(path, digest.chars().take(10).collect());
                }
                None => left.extend(fields.iter().map(|(name, value)| (below(name), value))),
            },
            Value::Array(items) => {
                left.extend(items.iter().enumerate().map(|(at, value)| (below(&at.to_string()), value)));
            }
            _ => {}
        }
    }
    found
}

/// The versions of what a result rests on, and what it was computed with.
fn code(manifest: &Manifest) -> BTreeMap<String, String> {
    let parts = &manifest.parts;
    let mut code = BTreeMap::from([
        ("kind".to_owned(), parts.kind.clone()),
        (format!("{} version", parts.kind), parts.version.to_string()),
        ("random numbers version".to_owned(), parts.rng_abi.to_string()),
    ]);
    code.extend(parts.parts.iter().map(|part| (format!("{} version", part.name), part.version.to_string())));
    code.extend(manifest.numerics.clone());
    code
}

/// Who solves what, where both have measured it by instance. An instance counts as solved where more than half of its
/// completions are.
fn instances(one: &StageResult, other: &StageResult) -> Option<Solved> {
    let (Values::Instances(one), Values::Instances(other)) = (one.values(SOLVED)?, other.values(SOLVED)?) else {
        return None;
    };
    let mut solved = Solved::default();
    for (name, value) in &one {
        match other.get(name).map(|other| (*value > 0.5, *other > 0.5)) {
            None => solved.unpaired += 1,
            Some((true, true)) => solved.both += 1,
            Some((false, false)) => solved.neither += 1,
            Some((true, false)) => solved.only_a.push(name.to_string()),
            Some((false, true)) => solved.only_b.push(name.to_string()),
        }
    }
    solved.unpaired += other.keys().filter(|name| !one.contains_key(*name)).count();
    Some(solved)
}

fn text(difference: &Difference, args: &Args, color: bool) -> String {
    if difference.is_same {
        return "they are one result: the same key".to_owned();
    }
    let mut parts = Vec::new();
    let bold = |text: &str| Look::Bold.on(text, color);
    for (title, changes) in [("params", &difference.params), ("code", &difference.code), ("inputs", &difference.inputs)]
    {
        if !changes.is_empty() {
            parts.push(format!("{}\n{}", bold(title), lines(changes)));
        }
    }
    let same: Vec<&str> = difference.outputs.iter().filter(|(_, same)| **same).map(|(name, _)| name.as_str()).collect();
    if !same.is_empty() {
        parts.push(format!("{}\n  {} came out the same to the last byte", bold("outputs"), same.join(", ")));
    }
    if !difference.metrics.is_empty() {
        let number = |value: Option<f64>| value.map_or_else(|| "-".to_owned(), render::number);
        let row = |(name, Change { a, b }): (&String, &Change<f64>)| {
            let apart = a.zip(*b).map_or_else(String::new, |(a, b)| {
                let sign = if b > a { "+" } else { "" };
                format!("{sign}{}", render::number(b - a))
            });
            vec![format!("  {name}"), number(*a), number(*b), apart]
        };
        let rows = difference.metrics.iter().map(row).collect();
        let header = ["  metric", "A", "B", "B - A"];
        parts.push(format!("{}\n{}", bold("metrics"), render::columns(&header, &[1, 2, 3], rows, None).trim_end()));
    }
    if let Some(solved) = &difference.instances {
        parts.push(format!("{}\n{}", bold("instances"), solved_text(solved, args)));
    }
    parts.join("\n\n")
}

/// `name  a => b`, a line each.
fn lines(changes: &Changes<String>) -> String {
    let width = changes.keys().map(|name| name.chars().count()).max().unwrap_or(0);
    let side = |side: &Option<String>| side.clone().unwrap_or_else(|| "-".to_owned());
    let line = |(name, change): (&String, &Change<String>)| {
        format!("  {name:<width$}  {} => {}", side(&change.a), side(&change.b))
    };
    changes.iter().map(line).collect::<Vec<_>>().join("\n")
}

fn solved_text(solved: &Solved, args: &Args) -> String {
    let Solved { both, neither, only_a, only_b, unpaired } = solved;
    let mut lines = vec![format!(
        "  {} solved by both, {} by neither, {} only by A, {} only by B",
        render::count(*both as u64),
        render::count(*neither as u64),
        render::count(only_a.len() as u64),
        render::count(only_b.len() as u64)
    )];
    for (side, names, failing) in [("A", only_a, &args.other), ("B", only_b, &args.one)] {
        let Some(first) = names.first() else { continue };
        let shown = names.iter().take(args.count).map(String::as_str).collect::<Vec<_>>().join(", ");
        let more = names.len().saturating_sub(args.count);
        let more = if more > 0 { format!(" and {more} more") } else { String::new() };
        lines.push(format!("  only {side}: {shown}{more}"));
        lines.push(format!("    how the other fails: pipe sample {failing} --instance {first}"));
    }
    if *unpaired > 0 {
        lines.push(format!("  {} stand on one side only", render::plural(*unpaired, "instance")));
    }
    lines.join("\n")
}

/// Of every stage what differs in it, those first whose inputs are the same: there it begins.
fn trials_text(trials: &Trials, args: &Args, color: bool) -> String {
    let mut parts = Vec::new();
    let same: Vec<&str> = trials.stages.iter().filter(|(_, one)| one.is_same).map(|(name, _)| name.as_str()).collect();
    if !same.is_empty() {
        parts.push(format!("the same: {}", same.join(", ")));
    }
    let mut differing: Vec<(&String, &Difference)> = trials.stages.iter().filter(|(_, one)| !one.is_same).collect();
    differing.sort_by_key(|(_, one)| !one.inputs.is_empty());
    for (name, one) in differing {
        let args =
            Args { one: format!("{}/{name}", args.one), other: format!("{}/{name}", args.other), count: args.count };
        let body =
            text(one, &args, false).lines().map(|line| format!("  {line}").trim_end().to_owned()).collect::<Vec<_>>();
        parts.push(format!("{}\n{}", Look::Bold.on(name, color), body.join("\n")));
    }
    for (side, names) in [("A", &trials.only_a), ("B", &trials.only_b)] {
        if !names.is_empty() {
            parts.push(format!("only in {side}: {}", names.join(", ")));
        }
    }
    if parts.is_empty() { "neither trial has a stage".to_owned() } else { parts.join("\n\n") }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn args() -> Args {
        Args { one: "maze/seed=1/evaluate".to_owned(), other: "maze/seed=2/evaluate".to_owned(), count: 2 }
    }

    fn example() -> Difference {
        let change = |a: &str, b: Option<&str>| Change { a: Some(a.to_owned()), b: b.map(str::to_owned) };
        Difference {
            is_same: false,
            params: BTreeMap::from([
                ("seed".to_owned(), change("1", Some("2"))),
                ("kl.beta".to_owned(), change("0.01", None)),
            ]),
            code: BTreeMap::from([("task.maze version".to_owned(), change("1", Some("2")))]),
            inputs: BTreeMap::from([("model".to_owned(), change("3f2a", Some("77aa")))]),
            outputs: BTreeMap::from([("last".to_owned(), true), ("best".to_owned(), false)]),
            metrics: BTreeMap::from([("solved".to_owned(), Change { a: Some(0.75), b: Some(0.5) })]),
            instances: Some(Solved {
                both: 1_200,
                neither: 3,
                only_a: ["t-1", "t-2", "t-3"].map(str::to_owned).into(),
                only_b: vec![],
                unpaired: 1,
            }),
        }
    }

    #[test]
    fn differences_are_told_from_cause_to_effect() {
        insta::assert_snapshot!(text(&example(), &args(), false));
        let same = Difference { is_same: true, ..Difference::default() };
        assert_eq!(text(&same, &args(), false), "they are one result: the same key");
    }

    #[test]
    fn of_two_trials_the_stage_where_it_begins_comes_first() {
        let begins = Difference { inputs: BTreeMap::new(), instances: None, ..example() };
        let stages = BTreeMap::from([
            ("evaluate".to_owned(), example()),
            ("sft".to_owned(), begins),
            ("tokens".to_owned(), Difference { is_same: true, ..Difference::default() }),
        ]);
        let trials = Trials { stages, only_a: vec![], only_b: vec!["grpo".to_owned()] };
        let args = Args { one: "maze/seed=1".to_owned(), other: "maze/seed=2".to_owned(), count: 2 };
        let text = trials_text(&trials, &args, false);
        let place = |word: &str| text.find(word).unwrap_or_else(|| panic!("{word}: {text}"));
        assert!(place("the same: tokens") < place("\nsft\n") && place("\nsft\n") < place("\nevaluate\n"));
        assert!(text.contains("pipe sample maze/seed=2/evaluate --instance t-1") && text.ends_with("only in B: grpo"));
    }

    #[test]
    fn inputs_are_found_by_the_parameters_that_name_them() {
        let params = serde_json::json!({"model": {"$input": "3f2a"}, "list": [{"a": {"$input": "77"}}], "seed": 1});
        let found: Vec<(String, String)> = inputs(&params).into_iter().collect();
        assert_eq!(found, [("list.0.a".into(), "77".into()), ("model".into(), "3f2a".into())]);
    }

    #[test]
    fn what_is_equal_is_no_change() {
        let side = |pairs: &[(&str, i32)]| pairs.iter().map(|(name, value)| ((*name).to_owned(), *value)).collect();
        let found = changes(&side(&[("a", 1), ("b", 2), ("c", 3)]), &side(&[("a", 1), ("b", 5), ("d", 4)]));
        let found: Vec<_> = found.into_iter().map(|(name, change)| (name, change.a, change.b)).collect();
        assert_eq!(
            found,
            [("b".to_owned(), Some(2), Some(5)), ("c".to_owned(), Some(3), None), ("d".to_owned(), None, Some(4))]
        );
    }
}
