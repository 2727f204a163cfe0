//! `[sweep]`: axes of values, multiplied into named assignments.

use std::collections::BTreeMap;

use serde_json::Value as Json;

use crate::pipeline::spec::diagnostic::{Mistake, Report, did_you_mean};
use crate::pipeline::spec::parse::parse_path;
use crate::pipeline::spec::source::Span;
use crate::pipeline::spec::tree::{Node, Value};

/// More trials than this are a mistake.
const MOST_TRIALS: usize = 100_000;

/// A swept path with its values.
#[derive(Debug)]
pub(super) struct Axis {
    /// The path as people see it.
    pub(super) path: String,
    segments: Vec<String>,
    /// Where the path is written.
    pub(super) key: Span,
    /// The values.
    pub(super) values: Vec<Node>,
    /// Whether its values are seeds.
    pub(super) is_seed: bool,
    /// The last segment, or the whole path where another axis ends alike.
    pub(super) label: String,
}

/// The values of one trial.
pub(super) struct Assignment {
    /// `beta=0.01,seed=1`; empty where nothing is swept.
    pub(super) name: String,
    /// The same without seeds.
    pub(super) arm: String,
    /// Path to value.
    pub(super) values: BTreeMap<String, Json>,
    /// The seed.
    pub(super) seed: Option<Json>,
    /// What to lay over the document.
    pub(super) overlays: Vec<Node>,
}

/// The axes of `[sweep]` in the document `root`, whose form is already checked.
pub(super) fn axes(root: &Node, report: &mut Report) -> Vec<Axis> {
    let mut axes = Vec::new();
    let Some(sweep) = root.get("sweep") else { return axes };
    if let Some(grid) = sweep.node.get("grid") {
        grid_axes(&grid.node, &mut Vec::new(), &mut axes);
    }
    if let Some(seeds) = sweep.node.get("seeds") {
        let path = seeds.node.get("path").and_then(|entry| Some((entry.node.text()?.to_owned(), entry.node.span)));
        let values = seeds.node.get("values").and_then(|entry| entry.node.array());
        if let (Some((path, key)), Some(values)) = (path, values) {
            let segments = parse_path(&path).unwrap_or_default();
            let values = values.to_vec();
            axes.push(Axis { path, segments, key, values, is_seed: true, label: String::new() });
        }
    }
    axes.retain(|axis| check_path(axis, root, report) && check_values(axis, report));
    for index in 0..axes.len() {
        let clash = axes[..index].iter().any(|other| other.segments == axes[index].segments);
        if clash {
            let message = format!("`{}` is swept twice", axes[index].path);
            report.add(Mistake::at(axes[index].key, message));
        }
        let last = |axis: &Axis| axis.segments.last().cloned();
        let is_shared = axes.iter().filter(|other| last(other) == last(&axes[index])).count() > 1;
        axes[index].label = if is_shared { axes[index].path.clone() } else { last(&axes[index]).unwrap_or_default() };
    }
    axes.sort_by(|a, b| (a.is_seed, &a.path).cmp(&(b.is_seed, &b.path)));
    axes
}

/// After how many failed trials a run begins nothing more.
pub(super) fn max_failures(sweep: &Node) -> Option<usize> {
    match sweep.get("max_failures")?.node.value {
        Value::Integer(count) => usize::try_from(count).ok(),
        _ => None,
    }
}

fn grid_axes(table: &Node, above: &mut Vec<String>, axes: &mut Vec<Axis>) {
    for (name, entry) in table.table().into_iter().flatten() {
        let added = parse_path(name).unwrap_or_else(|| vec![name.to_string()]);
        let depth = above.len();
        above.extend(added);
        match &entry.node.value {
            Value::Array(values) => {
                let segments = above.clone();
                let path = segments.join(".");
                let (key, values) = (entry.key, values.to_vec());
                axes.push(Axis { path, segments, key, values, is_seed: false, label: String::new() });
            }
            _ => grid_axes(&entry.node, above, axes),
        }
        above.truncate(depth);
    }
}

/// Whether the path leads somewhere. Fields of stages are judged by the stage's schema when the trial is resolved.
fn check_path(axis: &Axis, root: &Node, report: &mut Report) -> bool {
    let refuse = |message: String| Mistake::at(axis.key, message);
    let segment = |index: usize| axis.segments.get(index).map(String::as_str);
    let top = segment(0).unwrap_or_default();
    let (Some(name), "params" | "stages") = (segment(1), top) else {
        let message = format!("`{}` cannot be swept", axis.path);
        let mistake = refuse(message).label("a swept path begins with `params.` or `stages.`");
        report.add(mistake.hint(did_you_mean(top, ["params", "stages"])));
        return false;
    };
    let table = root.get(top).and_then(|entry| entry.node.table());
    if !table.is_some_and(|table| table.contains_key(name)) {
        let what = if top == "params" { "parameter" } else { "stage" };
        let names = table.into_iter().flatten().map(|(name, _)| name.as_ref());
        let mistake = refuse(format!("unknown {what} `{name}` in a swept path")).hint(did_you_mean(name, names));
        report.add(if top == "stages" { mistake.absent_stage() } else { mistake });
        return false;
    }
    let depth = axis.segments.len();
    if (top == "params" && depth != 2) || (top == "stages" && depth < 3) {
        report.add(refuse(format!("`{}` is not the path of a value", axis.path)));
        return false;
    }
    if top == "stages" && segment(2) == Some("run") {
        report.add(refuse(format!("`{}` cannot be swept", axis.path)).label("what `run` says changes no result"));
        return false;
    }
    true
}

fn check_values(axis: &Axis, report: &mut Report) -> bool {
    let mut is_good = true;
    for (index, value) in axis.values.iter().enumerate() {
        if value.scalar_text().is_none() {
            if value.value != Value::Invalid {
                let message = format!("{} cannot be swept", value.type_name());
                report.add(Mistake::at(value.span, message).label("expected a string, a number or a boolean"));
            }
            is_good = false;
        } else if axis.values[..index].iter().any(|other| is_same(&other.json(), &value.json())) {
            let message = format!("`{}` is swept over the same value twice", axis.path);
            report.add(
                Mistake::at(value.span, message).label("already among the values: its trial would be a duplicate"),
            );
            is_good = false;
        }
    }
    is_good
}

/// Whether two scalars are equal, 1 and 1.0 included.
pub(super) fn is_same(a: &Json, b: &Json) -> bool {
    match (a.as_f64(), b.as_f64()) {
        (Some(a), Some(b)) => a - b == 0.0,
        _ => a == b,
    }
}

/// Every combination of values, seeds varying fastest; one without values where nothing is swept.
pub(super) fn assignments(axes: &[Axis], report: &mut Report) -> Vec<Assignment> {
    let count = axes.iter().map(|axis| axis.values.len()).try_fold(1usize, usize::checked_mul);
    let count = count.filter(|count| *count <= MOST_TRIALS);
    let Some(count) = count else {
        let message = format!("the sweep has more than {MOST_TRIALS} trials");
        report.extend(axes.first().map(|axis| Mistake::at(axis.key, message)));
        return Vec::new();
    };
    let mut named: BTreeMap<String, usize> = BTreeMap::new();
    let mut assignments = Vec::with_capacity(count);
    for number in 0..count {
        let mut rest = number;
        let mut chosen = vec![0; axes.len()];
        for (index, axis) in axes.iter().enumerate().rev() {
            chosen[index] = rest % axis.values.len();
            rest /= axis.values.len();
        }
        let assignment = assignment(axes, &chosen);
        if named.insert(assignment.name.clone(), number).is_some() {
            let key = axes.first().map(|axis| axis.key);
            let message = format!("two trials would both be called `{}`", assignment.name);
            report.extend(key.map(|key| Mistake::at(key, message)));
        }
        assignments.push(assignment);
    }
    assignments
}

fn assignment(axes: &[Axis], chosen: &[usize]) -> Assignment {
    let mut shown = Vec::new();
    let mut seed = None;
    let mut values = BTreeMap::new();
    let mut overlays = Vec::new();
    for (axis, choice) in axes.iter().zip(chosen) {
        let value = &axis.values[*choice];
        // Trials name folders, so a slash inside a value may not make a folder of its own.
        let text = value.scalar_text().unwrap_or_default().replace(['/', '\\'], "_");
        shown.push((format!("{}={text}", axis.label), axis.is_seed));
        values.insert(axis.path.clone(), value.json());
        if axis.is_seed {
            seed = Some(value.json());
        }
        overlays.push(Node::nested(&axis.segments, axis.key, value.clone()));
    }
    shown.sort();
    let joined = |with_seeds: bool| {
        let kept = shown.iter().filter(|(_, is_seed)| with_seeds || !is_seed).map(|(text, _)| text.as_str());
        kept.collect::<Vec<_>>().join(",")
    };
    Assignment { name: joined(true), arm: joined(false), values, seed, overlays }
}

#[cfg(test)]
mod tests {
    use crate::pipeline::spec::testing::{Files, PIPELINE};

    fn swept(sweep: &str) -> Files {
        Files::new(&[("p.toml", PIPELINE), ("a.toml", &format!("pipeline = \"p.toml\"\n{sweep}"))])
    }

    #[test]
    fn axes_multiply_and_trials_have_names() {
        let files = swept(
            "[sweep]\nseeds = { path = \"params.seed\", values = [1, 2] }\n[sweep.grid]\n\
             \"stages.train.optimizer.beta\" = [0.0, 0.01]\nstages.train.note = [\"x/y\"]\n",
        );
        let trials = files.good("a.toml", &[]).trials;
        let names: Vec<&str> = trials.iter().map(|trial| trial.name.as_str()).collect();
        let expected = [
            "beta=0.0,note=x_y,seed=1",
            "beta=0.0,note=x_y,seed=2",
            "beta=0.01,note=x_y,seed=1",
            "beta=0.01,note=x_y,seed=2",
        ];
        let mut sorted = names.clone();
        sorted.sort_unstable();
        assert_eq!(sorted, expected);
        let trial = trials.iter().find(|trial| trial.name == expected[3]).unwrap();
        assert_eq!((trial.arm.as_str(), &trial.seed), ("beta=0.01,note=x_y", &Some(2.into())));
        assert_eq!(trial.assignment["stages.train.optimizer.beta"], serde_json::json!(0.01));
        assert_eq!(trial.assignment["params.seed"], serde_json::json!(2));
        let params = trial.stages["train"].stage.params();
        assert_eq!((params["seed"].clone(), params["note"].clone()), (2.into(), "x/y".into()));
        assert_eq!(params["optimizer"]["beta"], serde_json::json!(0.01));
    }

    #[test]
    fn paths_that_end_alike_are_shown_whole() {
        let files = swept(
            "[sweep.grid]\n\"stages.train.seed\" = [1]\n\"stages.score.seed\" = [2]\n\"stages.train.steps\" = [3]\n",
        );
        assert_eq!(files.good("a.toml", &[]).trials[0].name, "stages.score.seed=2,stages.train.seed=1,steps=3");
    }

    #[test]
    fn axes_that_lead_nowhere() {
        let sweep = "[sweep]\nseeds = { path = \"params.sead\", values = [] }\n[sweep.grid]\n\"stages.trian.steps\" = [1]\n\
                     \"stages.train.stps\" = [1, 2]\n\"stages.train.optimizer.bta\" = [0.1]\n\"stages.train\" = [1]\n\
                     \"stages.train.run.cpus\" = [1]\nsteps = [1]\n\"stages.score.seed\" = [1, 1]\n\
                     \"stages.train.rewards.correct\" = [{ kind = \"correct\" }]\n\"stages.train.steps\" = [0, 5, \"x\"]\n";
        insta::assert_snapshot!(swept(sweep).bad("a.toml", &[]), @r#"
            error: wrong length of `seeds.values` in `sweep`
             --> a.toml:3:42
            3 | seeds = { path = "params.sead", values = [] }
              |                                          ^^ expected at least 1, found 0
        "#);
        insta::assert_snapshot!(swept(&sweep.replace("[] }", "[1] }")).bad("a.toml", &[]), @r#"
            error: unknown parameter `sead` in a swept path
             --> a.toml:3:18
            3 | seeds = { path = "params.sead", values = [1] }
              |                  ^^^^^^^^^^^^^
            hint: did you mean `seed`?

            error: unknown stage `trian` in a swept path
             --> a.toml:5:1
            5 | "stages.trian.steps" = [1]
              | ^^^^^^^^^^^^^^^^^^^^
            hint: did you mean `train`?

            error: unknown field `stps` in stage `train`
             --> a.toml:6:1
            6 | "stages.train.stps" = [1, 2]
              | ^^^^^^^^^^^^^^^^^^^ expected one of `data`, `learning_rate`, `note`, `optimizer`, `rewards`, `seed`, `start`, `steps`, `validate`
            hint: did you mean `steps`?

            error: unknown field `bta` in `optimizer` of stage `train`
             --> a.toml:7:1
            7 | "stages.train.optimizer.bta" = [0.1]
              | ^^^^^^^^^^^^^^^^^^^^^^^^^^^^ expected one of `beta`, `decay`, `nesterov`
            hint: did you mean `beta`?

            error: `stages.train` is not the path of a value
             --> a.toml:8:1
            8 | "stages.train" = [1]
              | ^^^^^^^^^^^^^^

            error: `stages.train.run.cpus` cannot be swept
             --> a.toml:9:1
            9 | "stages.train.run.cpus" = [1]
              | ^^^^^^^^^^^^^^^^^^^^^^^ what `run` says changes no result

            error: `steps` cannot be swept
              --> a.toml:10:1
            10 | steps = [1]
               | ^^^^^ a swept path begins with `params.` or `stages.`

            error: `stages.score.seed` is swept over the same value twice
              --> a.toml:11:27
            11 | "stages.score.seed" = [1, 1]
               |                           ^ already among the values: its trial would be a duplicate

            error: a table cannot be swept
              --> a.toml:12:35
            12 | "stages.train.rewards.correct" = [{ kind = "correct" }]
               |                                   ^^^^^^^^^^^^^^^^^^^^ expected a string, a number or a boolean

            error: `steps` is out of range in stage `train`
              --> a.toml:13:25
            13 | "stages.train.steps" = [0, 5, "x"]
               |                         ^ expected at least 1

            error: wrong type of `steps` in stage `train`
              --> a.toml:13:31
            13 | "stages.train.steps" = [0, 5, "x"]
               |                               ^^^ expected an integer, found a string
        "#);
        insta::assert_snapshot!(swept("[sweep]\n").bad("a.toml", &[]), @r#"
            error: too few entries in `sweep`
             --> a.toml:2:2
            2 | [sweep]
              |  ^^^^^ expected at least 1, found 0
        "#);
    }
}
