//! `[table]`: what `pipe table` shows, checked against the stages and the axes it names.

use std::collections::{BTreeMap, BTreeSet};

use serde_json::Value as Json;

use crate::pipeline::spec::diagnostic::{Mistake, Report, did_you_mean, expected};
use crate::pipeline::spec::metrics::Wanted;
use crate::pipeline::spec::sweep::{Axis, find, is_same, leaves, not_swept};
use crate::pipeline::spec::tree::{Entry, Node};
use crate::pipeline::spec::{TableSpec, Trial};

/// The `[table]` of the document `root`, whose form is already checked.
pub(super) fn table(root: &Node, axes: &[Axis], wanted: &mut Wanted, report: &mut Report) -> TableSpec {
    let Some(entry) = root.get("table") else { return TableSpec::default() };
    let items = |name: &str| entry.node.get(name).and_then(|entry| entry.node.array()).unwrap_or_default();
    let mut metric = |node: &Node| wanted.add(node, "table", report);
    let metrics = items("metrics").iter().map(&mut metric).collect();
    let mut differences = Vec::new();
    for pair in items("differences") {
        if let Some([first, second]) = pair.array() {
            differences.push((metric(first), metric(second)));
        }
    }
    let baseline = entry.node.get("baseline").map(|entry| baseline(entry, axes, report));
    TableSpec { metrics, baseline, differences }
}

/// Whether the baseline is one of the arms of `trials`: `exclude` may leave it out, and a zip may have one of its values twice.
pub(super) fn check_baseline<'a>(
    root: &Node,
    table: &TableSpec,
    axes: &[Axis],
    trials: impl IntoIterator<Item = &'a Trial>,
    report: &mut Report,
) {
    let Some(baseline) = &table.baseline else { return };
    let Some(entry) = root.get("table").and_then(|entry| entry.node.get("baseline")) else { return };
    let is_fixed = |axis: &&Axis| axis.columns.iter().any(|column| baseline.contains_key(&column.name));
    let mut trials = trials.into_iter().peekable();
    // What is not fixed is told already, and without any trial something else is wrong.
    if trials.peek().is_none() || !axes.iter().filter(|axis| !axis.is_seed()).all(|axis| is_fixed(&axis)) {
        return;
    }
    let is_baseline = |trial: &&Trial| baseline.iter().all(|(name, value)| trial.assignment.get(name) == Some(value));
    let arms: BTreeSet<&str> = trials.filter(is_baseline).map(|trial| trial.arm.as_str()).collect();
    let mistake = |message: String| Mistake::at(entry.key, message).about("trials");
    match arms.iter().collect::<Vec<_>>().as_slice() {
        [] => {
            let label = "these values never meet, or `exclude` leaves them out";
            report.add(mistake("no trial has the values of the baseline".to_owned()).label(label));
        }
        [first, second, ..] => {
            let message = format!("the baseline is one arm, but `{first}` and `{second}` both have its values");
            report.add(mistake(message).label("fix more of the values that are varied together"));
        }
        [_] => {}
    }
}

/// The baseline by full names, with the values as the axes write them.
fn baseline(entry: &Entry, axes: &[Axis], report: &mut Report) -> BTreeMap<String, Json> {
    let mut fixed = BTreeMap::new();
    let mut is_fixed = vec![false; axes.len()];
    let open = || axes.iter().filter(|axis| !axis.is_seed()).flat_map(|axis| &axis.columns);
    for (segments, key, value) in leaves(&entry.node) {
        let name = segments.join(".");
        let found = find(axes, &name).filter(|(index, _)| !axes[*index].is_seed());
        let Some((index, column)) = found else {
            let mistake = Mistake::at(key, format!("nothing sweeps `{name}`, which the baseline fixes"));
            let label = if open().next().is_none() {
                "the sweep has no axis but the seeds".to_owned()
            } else {
                expected(open().map(|column| column.label.as_str()))
            };
            let names = open().flat_map(|column| [column.name.as_str(), column.label.as_str()]);
            report.add(mistake.label(label).hint(did_you_mean(&name, names)));
            continue;
        };
        is_fixed[index] = true;
        let given = value.json();
        if let Some(swept) = axes[index].values(column).map(Node::json).find(|swept| is_same(swept, &given)) {
            fixed.insert(axes[index].columns[column].name.clone(), swept);
        } else {
            let message = format!("the baseline's `{name}` is not among the swept values");
            report.add(not_swept(&axes[index], column, value, message));
        }
    }
    for (axis, _) in axes.iter().zip(is_fixed).filter(|(axis, is_fixed)| !is_fixed && !axis.is_seed()) {
        let labels: Vec<&str> = axis.columns.iter().map(|column| column.label.as_str()).collect();
        let message = format!("the baseline does not fix `{}`", labels.join("` or `"));
        let label = "the baseline fixes every axis but the seeds";
        report.add(Mistake::at(entry.key, message).label(label).about(axis.columns[0].name.clone()));
    }
    fixed
}

#[cfg(test)]
mod tests {
    use crate::pipeline::spec::testing::{Files, PIPELINE};

    const SWEEP: &str = "pipeline = \"p.toml\"\n[sweep]\nseeds = { path = \"params.seed\", values = [1, 2] }\n\
                         grid = { \"stages.train.steps\" = [5, 6], \"params.rate\" = [0.5, 1.0] }\n[table]\n";

    fn files(table: &str) -> Files {
        Files::new(&[("p.toml", PIPELINE), ("a.toml", &format!("{SWEEP}{table}"))])
    }

    #[test]
    fn a_table_names_metrics_and_a_baseline() {
        let files = files(
            "metrics = [\"score.solved\", \"score.solved.long\"]\nbaseline = { steps = 5, \"params.rate\" = 1 }\n\
             differences = [[\"score.solved\", \"train.loss\"]]\n",
        );
        let table = files.good("a.toml", &[]).table;
        assert_eq!(table.metrics, ["score.solved", "score.solved.long"]);
        assert_eq!(table.differences, [("score.solved".to_owned(), "train.loss".to_owned())]);
        let baseline = table.baseline.unwrap();
        assert_eq!(baseline["stages.train.steps"], serde_json::json!(5));
        assert_eq!(baseline["params.rate"], serde_json::json!(1.0));
    }

    #[test]
    fn a_baseline_that_is_left_out_is_a_mistake() {
        let excluded = "baseline = { steps = 5, rate = 1.0 }\n[[sweep.exclude]]\nsteps = 5\nrate = 1.0\n";
        insta::assert_snapshot!(files(excluded).bad("a.toml", &[]), @r#"
            error: no trial has the values of the baseline
             --> a.toml:6:1
            6 | baseline = { steps = 5, rate = 1.0 }
              | ^^^^^^^^ these values never meet, or `exclude` leaves them out
        "#);
    }

    #[test]
    fn a_baseline_that_is_two_arms_is_a_mistake() {
        let zip = "baseline = { steps = 5, rate = 1.0, note = \"a\" }\n[[sweep.zip]]\nstages.train.note = [\"a\", \"a\"]\n\
                   stages.score.split = [\"x\", \"y\"]\n";
        insta::assert_snapshot!(files(zip).bad("a.toml", &[]), @r#"
            error: the baseline is one arm, but `note=a,rate=1.0,split=x,steps=5` and `note=a,rate=1.0,split=y,steps=5` both have its values
             --> a.toml:6:1
            6 | baseline = { steps = 5, rate = 1.0, note = "a" }
              | ^^^^^^^^ fix more of the values that are varied together
        "#);
        files(&zip.replace("note = \"a\" }", "note = \"a\", split = \"x\" }")).good("a.toml", &[]);
    }

    #[test]
    fn names_in_a_table_are_checked() {
        let wrong = "metrics = [\"scre.solved\", \"solved\"]\nbaseline = { step = 5, rate = 0.7 }\n\
                     differences = [[\"score.solved\", \"tain.loss\"]]\n";
        insta::assert_snapshot!(files(wrong).bad("a.toml", &[]), @r#"
            error: unknown stage `scre` in `table`
             --> a.toml:6:12
            6 | metrics = ["scre.solved", "solved"]
              |            ^^^^^^^^^^^^^ expected one of `data`, `score`, `train`
            hint: did you mean `score`?

            error: `solved` names no metric
             --> a.toml:6:27
            6 | metrics = ["scre.solved", "solved"]
              |                           ^^^^^^^^ expected `STAGE.METRIC`, as in `evaluate.solved`

            error: the baseline does not fix `steps`
             --> a.toml:7:1
            7 | baseline = { step = 5, rate = 0.7 }
              | ^^^^^^^^ the baseline fixes every axis but the seeds

            error: nothing sweeps `step`, which the baseline fixes
             --> a.toml:7:14
            7 | baseline = { step = 5, rate = 0.7 }
              |              ^^^^ expected one of `rate`, `steps`
            hint: did you mean `steps`?

            error: the baseline's `rate` is not among the swept values
             --> a.toml:7:31
            7 | baseline = { step = 5, rate = 0.7 }
              |                               ^^^ expected one of `0.5`, `1.0`

            error: unknown stage `tain` in `table`
             --> a.toml:8:33
            8 | differences = [["score.solved", "tain.loss"]]
              |                                 ^^^^^^^^^^^ expected one of `data`, `score`, `train`
            hint: did you mean `train`?
        "#);
        insta::assert_snapshot!(files("metric = []\ndifferences = [[\"a.b\"]]\n").bad("a.toml", &[]), @r#"
            error: unknown field `metric` in `table`
             --> a.toml:6:1
            6 | metric = []
              | ^^^^^^ expected one of `baseline`, `differences`, `metrics`
            hint: did you mean `metrics`?

            error: wrong length of `differences[0]` in `table`
             --> a.toml:7:16
            7 | differences = [["a.b"]]
              |                ^^^^^^^ expected 2, found 1
        "#);
    }
}
