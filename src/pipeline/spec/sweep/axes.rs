//! Axes of values by path: `grid`, where every path is an axis of its own, `[[sweep.zip]]`, where several vary together,
//! and `seeds`.

use std::collections::HashSet;

use serde_json::Value as Json;

use crate::pipeline::spec::diagnostic::{Mistake, Report};
use crate::pipeline::spec::parse::parse_path;
use crate::pipeline::spec::source::Span;
use crate::pipeline::spec::sweep::{Axis, Column, Point, Source, leaves, path, shown};
use crate::pipeline::spec::tree::{Node, Value};

/// The axes of `grid`, `zip` and `seeds`.
pub(super) fn read(sweep: &Node, root: &Node, report: &mut Report) -> Vec<Axis> {
    let mut axes = sweep.get("grid").map(|entry| grid(&entry.node, Source::Grid, root, report)).unwrap_or_default();
    for table in sweep.get("zip").and_then(|entry| entry.node.array()).unwrap_or_default() {
        axes.extend(zip(table, root, report));
    }
    if let Some(seeds) = sweep.get("seeds") {
        let path = seeds.node.get("path").and_then(|entry| Some((entry.node.text()?, entry.node.span)));
        let values = seeds.node.get("values").and_then(|entry| entry.node.array());
        if let (Some((path, key)), Some(values)) = (path, values) {
            let columns = vec![(parse_path(path).unwrap_or_default(), key, values)];
            axes.extend(axis(columns, Source::Seeds, root, report));
        }
    }
    axes
}

/// An axis for each path of a table of lists.
pub(super) fn grid(table: &Node, source: Source, root: &Node, report: &mut Report) -> Vec<Axis> {
    let columns = columns(table, report);
    columns.into_iter().filter_map(|column| axis(vec![column], source, root, report)).collect()
}

/// The paths of a table of lists, as one axis.
fn zip(table: &Node, root: &Node, report: &mut Report) -> Option<Axis> {
    let columns = columns(table, report);
    if let Some(((first, first_key, first_values), rest)) = columns.split_first() {
        for (path, key, values) in rest.iter().filter(|(_, _, values)| values.len() != first_values.len()) {
            let message = format!(
                "`{}` and `{}` are zipped, but have {} and {} values",
                path.join("."),
                first.join("."),
                values.len(),
                first_values.len()
            );
            let hint =
                "every path of a zip has as many values as the others; axes that multiply stand in `[sweep.grid]`";
            report.add(Mistake::at(*key, message).also(*first_key, "the other stands").hint(hint.to_owned()));
        }
        if rest.iter().any(|(_, _, values)| values.len() != first_values.len()) {
            return None;
        }
    }
    axis(columns, Source::Zip, root, report)
}

/// A path, its place and its values.
pub(super) type Written<'a> = (Vec<String>, Span, &'a [Node]);

fn columns<'a>(table: &'a Node, report: &mut Report) -> Vec<Written<'a>> {
    let mut found = Vec::new();
    for (segments, key, node) in leaves(table) {
        match &node.value {
            Value::Array(values) if !values.is_empty() => found.push((segments, key, values.as_slice())),
            Value::Invalid => {}
            _ => {
                let message = format!("`{}` has no values to sweep over", segments.join("."));
                let found = if node.array().is_some() { "an empty one" } else { node.type_name() };
                report.add(Mistake::at(node.span, message).label(format!("expected a list of values, found {found}")));
            }
        }
    }
    found
}

/// The axis of these columns, which are of one length; none where a path or a value is wrong.
pub(super) fn axis(columns: Vec<Written<'_>>, source: Source, root: &Node, report: &mut Report) -> Option<Axis> {
    let mut is_good = !columns.is_empty();
    for (segments, key, values) in &columns {
        is_good &= path::check(segments, *key, root, report);
        for value in values.iter().filter(|value| shown(value).is_none()) {
            is_good = false;
            refuse(value, report);
        }
    }
    if !is_good {
        return None;
    }
    let count = columns[0].2.len();
    let mut seen = HashSet::with_capacity(count);
    for row in 0..count {
        let values: Vec<Json> = columns.iter().map(|(_, _, values)| normal(&values[row].json())).collect();
        if !seen.insert(Json::Array(values).to_string()) {
            let names: Vec<String> = columns.iter().map(|(path, _, _)| format!("`{}`", path.join("."))).collect();
            let (are, same) = if names.len() > 1 { ("are", "values") } else { ("is", "value") };
            let message = format!("{} {are} swept over the same {same} twice", names.join(" and "));
            let label = "already among the values: its trial would be a duplicate";
            report.add(Mistake::at(columns[0].2[row].span, message).label(label));
            is_good = false;
        }
    }
    let point = |row: usize| Point {
        values: columns.iter().map(|(_, _, values)| values[row].clone()).collect(),
        overlays: columns.iter().map(|(path, key, values)| Node::nested(path, *key, values[row].clone())).collect(),
        sets: Vec::new(),
    };
    let points = (0..count).map(point).collect();
    let column =
        |(segments, key, _): Written<'_>| Column { name: segments.join("."), label: String::new(), segments, key };
    is_good.then(|| Axis { points, columns: columns.into_iter().map(column).collect(), source })
}

fn refuse(value: &Node, report: &mut Report) {
    if value.has_invalid() {
        return;
    }
    let what = if value.array().is_some() { "an array with a table in it" } else { value.type_name() };
    let mistake = Mistake::at(value.span, format!("{what} cannot be swept"));
    let mistake = mistake.label("expected a string, a number, a boolean or a list of them");
    report.add(mistake.hint("give a table a name and its own `[[sweep.arm]]`".to_owned()));
}

/// The value with 1 written as 1.0.
fn normal(value: &Json) -> Json {
    match value {
        Json::Number(number) => Json::from(number.as_f64()),
        Json::Array(items) => Json::Array(items.iter().map(normal).collect()),
        other => other.clone(),
    }
}

#[cfg(test)]
mod tests {
    use crate::pipeline::spec::testing::swept;

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
              |                  ^^^^^^^^^^^^^ expected one of `rate`, `seed`
            hint: did you mean `seed`?

            error: unknown stage `trian` in a swept path
             --> a.toml:5:1
            5 | "stages.trian.steps" = [1]
              | ^^^^^^^^^^^^^^^^^^^^ expected one of `data`, `score`, `train`
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
              | ^^^^^^^^^^^^^^ expected a field of the stage behind it

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
               |                                   ^^^^^^^^^^^^^^^^^^^^ expected a string, a number, a boolean or a list of them
            hint: give a table a name and its own `[[sweep.arm]]`

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

    #[test]
    fn paths_whose_beginning_was_left_out_are_recognised_and_one_swept_twice_is_told_once() {
        let sweep = "[sweep.grid]\nrate = [0.1]\n\"train.steps\" = [1]\n\"params.seed\" = [1, 2]\n[[sweep.zip]]\n\"params.seed\" = [1, 2]\n";
        insta::assert_snapshot!(swept(sweep).bad("a.toml", &[]), @r#"
            error: `rate` cannot be swept
             --> a.toml:3:1
            3 | rate = [0.1]
              | ^^^^ a swept path begins with `params.` or `stages.`
            hint: did you mean `params.rate`?

            error: `train.steps` cannot be swept
             --> a.toml:4:1
            4 | "train.steps" = [1]
              | ^^^^^^^^^^^^^ a swept path begins with `params.` or `stages.`
            hint: did you mean `stages.train.steps`?

            error: `params.seed` is swept twice
             --> a.toml:7:1
            7 | "params.seed" = [1, 2]
              | ^^^^^^^^^^^^^
            note: it is swept first at a.toml:5:1
        "#);
    }

    #[test]
    fn a_zip_is_one_axis_and_shows_all_that_it_sets() {
        let sweep = "[sweep.grid]\nparams.seed = [1, 2]\n[[sweep.zip]]\nstages.train.steps = [10, 20, 40]\n\
                     \"stages.train.learning_rate\" = [1e-3, 5e-4, 1e-4]\n[[sweep.zip]]\nstages.train.note = [\"a\", \"b\"]\n";
        let trials = swept(sweep).good("a.toml", &[]).trials;
        assert_eq!(trials.len(), 12);
        let trial = trials.iter().find(|trial| trial.name == "learning_rate=0.0005,note=b,seed=2,steps=20").unwrap();
        let params = trial.stages["train"].stage.params();
        assert_eq!((params["steps"].clone(), params["learning_rate"].clone()), (20.into(), 5e-4.into()));
        assert!(
            !trials.iter().any(|trial| trial.name.contains("learning_rate=0.001") && trial.name.contains("steps=20"))
        );
        assert_eq!(trial.assignment.len(), 4);
    }

    #[test]
    fn zips_that_cannot_be_zipped() {
        let sweep = "[[sweep.zip]]\nstages.train.steps = [10, 20]\nstages.train.note = [\"a\", \"b\", \"c\"]\n\
                     [[sweep.zip]]\nparams.rate = [1.0]\nstages.train.learning_rat = [1.0, 2.0]\n\
                     stages.train.optimizer.beta = [0.5, 0.6]\n\
                     [[sweep.zip]]\nstages.score.seed = [1, 2, 1]\nstages.train.seed = [1, 3, 1]\n";
        insta::assert_snapshot!(swept(sweep).bad("a.toml", &[]), @r#"
            error: `stages.train.steps` and `stages.train.note` are zipped, but have 2 and 3 values
             --> a.toml:3:14
            3 | stages.train.steps = [10, 20]
              |              ^^^^^
            note: the other stands at a.toml:4:14
            hint: every path of a zip has as many values as the others; axes that multiply stand in `[sweep.grid]`

            error: `stages.train.learning_rat` and `params.rate` are zipped, but have 2 and 1 values
             --> a.toml:7:14
            7 | stages.train.learning_rat = [1.0, 2.0]
              |              ^^^^^^^^^^^^
            note: the other stands at a.toml:6:8
            hint: every path of a zip has as many values as the others; axes that multiply stand in `[sweep.grid]`

            error: `stages.train.optimizer.beta` and `params.rate` are zipped, but have 2 and 1 values
             --> a.toml:8:24
            8 | stages.train.optimizer.beta = [0.5, 0.6]
              |                        ^^^^
            note: the other stands at a.toml:6:8
            hint: every path of a zip has as many values as the others; axes that multiply stand in `[sweep.grid]`

            error: `stages.score.seed` and `stages.train.seed` are swept over the same values twice
              --> a.toml:10:28
            10 | stages.score.seed = [1, 2, 1]
               |                            ^ already among the values: its trial would be a duplicate
        "#);
        insta::assert_snapshot!(swept("[sweep]\nzip = [{}]\n").bad("a.toml", &[]), @r#"
            error: too few entries in `zip[0]` of `sweep`
             --> a.toml:3:8
            3 | zip = [{}]
              |        ^^ expected at least 1, found 0
        "#);
    }

    #[test]
    fn fields_that_are_not_written_may_be_swept_and_unknown_ones_may_not() {
        let sweep = "[sweep.grid]\n\"stages.train.note\" = [\"a\", \"b\"]\n\"stages.train.optimizer.nesterov\" = [true, false]\n\
                     \"stages.train.validate.every\" = [1]\n\"stages.train.validate.samples\" = [1, 2]\n";
        assert_eq!(swept(sweep).good("a.toml", &[]).trials.len(), 8);
        let sweep = "[sweep.grid]\n\"stages.train.learning_rat\" = [0.1]\n\"stages.train.rewards.corect.weight\" = [1]\n\
                     \"stages.train.optimizer.nesterow\" = [true]\n\"parms.seed\" = [1]\n";
        insta::assert_snapshot!(swept(sweep).bad("a.toml", &[]), @r#"
            error: unknown field `learning_rat` in stage `train`
             --> a.toml:3:1
            3 | "stages.train.learning_rat" = [0.1]
              | ^^^^^^^^^^^^^^^^^^^^^^^^^^^ expected one of `data`, `learning_rate`, `note`, `optimizer`, `rewards`, `seed`, `start`, `steps`, `validate`
            hint: did you mean `learning_rate`?

            error: missing field `kind` in `rewards.corect` of stage `train`
             --> a.toml:4:1
            4 | "stages.train.rewards.corect.weight" = [1]
              | ^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^ expected one of `correct`, `expression`
            hint: did you mean `correct`?

            error: unknown field `nesterow` in `optimizer` of stage `train`
             --> a.toml:5:1
            5 | "stages.train.optimizer.nesterow" = [true]
              | ^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^ expected one of `beta`, `decay`, `nesterov`
            hint: did you mean `nesterov`?

            error: `parms.seed` cannot be swept
             --> a.toml:6:1
            6 | "parms.seed" = [1]
              | ^^^^^^^^^^^^ a swept path begins with `params.` or `stages.`
            hint: did you mean `params`?
        "#);
    }

    #[test]
    fn a_path_within_another_is_refused() {
        for (first, second) in [("optimizer", "optimizer.beta"), ("optimizer.beta", "optimizer")] {
            let told = swept(&format!(
                "[sweep.grid]\n\"stages.train.{first}\" = [1]\n[[sweep.zip]]\nstages.train.{second} = [1]\n"
            ));
            let told = told.bad("a.toml", &[]);
            assert!(told.contains("are swept, and one lies within the other"), "{told}");
        }
    }

    #[test]
    fn a_path_is_swept_once() {
        let sweep = "[sweep]\nseeds = { path = \"stages.train.seed\", values = [1, 1.0, 2] }\n[sweep.grid]\nstages.train.seed = [1]\n\
                     params.rate = [1]\nstages.train.steps = 5\nstages.train.note = []\n[[sweep.zip]]\nparams.rate = [2]\n";
        insta::assert_snapshot!(swept(sweep).bad("a.toml", &[]), @r#"
            error: `stages.train.seed` is swept over the same value twice
             --> a.toml:3:52
            3 | seeds = { path = "stages.train.seed", values = [1, 1.0, 2] }
              |                                                    ^^^ already among the values: its trial would be a duplicate

            error: `stages.train.steps` has no values to sweep over
             --> a.toml:7:22
            7 | stages.train.steps = 5
              |                      ^ expected a list of values, found an integer

            error: `stages.train.note` has no values to sweep over
             --> a.toml:8:21
            8 | stages.train.note = []
              |                     ^^ expected a list of values, found an empty one

            error: `params.rate` is swept twice
              --> a.toml:10:8
            10 | params.rate = [2]
               |        ^^^^
            note: it is swept first at a.toml:6:8
        "#);
    }
}
