//! Axes of named overlays: `[[sweep.arm]]` lays a set of values, `drop_one` leaves one entry of a table out, `add_one` adds
//! one to those that always stay. What changes nothing is called `none`.

use std::collections::BTreeMap;
use std::sync::Arc;

use crate::pipeline::spec::diagnostic::{Mistake, Report, did_you_mean, expected};
use crate::pipeline::spec::source::Span;
use crate::pipeline::spec::sweep::doubt::Doubt;
use crate::pipeline::spec::sweep::{Axis, Column, Leaf, Point, Source, leaves, path};
use crate::pipeline::spec::tree::{Node, Value};

/// The value of an axis of names that changes nothing.
const NONE: &str = "none";

/// The axes of `arm`, `drop_one` and `add_one`.
pub(super) fn read(sweep: &Node, root: &Node, doubts: &mut Vec<Doubt>, report: &mut Report) -> Vec<Axis> {
    let mut axes = Vec::new();
    if let Some(entry) = sweep.get("arm") {
        let points = arms(entry.node.array().unwrap_or_default(), entry.key, root, doubts, report);
        axes.extend(axis("arm", Source::Arm, entry.key, points));
    }
    let mut varied: Option<(Vec<String>, Span)> = None;
    if let Some(entry) = sweep.get("drop_one")
        && let Some((segments, table)) = path::table_at(&entry.node, "drop_one", root, report)
    {
        let names: Vec<&str> = table.node.table().into_iter().flatten().map(|(name, _)| name.as_ref()).collect();
        if names.is_empty() {
            let message = format!("`drop_one` has nothing to leave out: `{}` is empty", segments.join("."));
            report.add(Mistake::at(entry.node.span, message));
        } else {
            let mut points = vec![named(NONE, entry.key, Vec::new())];
            points.extend(names.iter().map(|name| named(name, entry.key, vec![dropped(&segments, name, entry.key)])));
            if check_names(&names, "drop_one", entry.node.span, report) {
                axes.extend(axis("drop", Source::Drop, entry.key, points));
            }
        }
        varied = Some((segments, entry.node.span));
    }
    if let Some(entry) = sweep.get("add_one") {
        let path = entry.node.get("path").map_or(&entry.node, |entry| &entry.node);
        if let Some((segments, table)) = path::table_at(path, "add_one", root, report) {
            if let Some((_, other)) = varied.filter(|(other, _)| *other == segments) {
                let message = format!("`add_one` and `drop_one` both vary `{}`", segments.join("."));
                report.add(Mistake::at(path.span, message).also(other, "`drop_one` stands"));
                return axes;
            }
            let names: Vec<&str> = table.node.table().into_iter().flatten().map(|(name, _)| name.as_ref()).collect();
            let points = added(&entry.node, &segments, &names, entry.key, report);
            if check_names(&names, "add_one", path.span, report) {
                axes.extend(axis("add", Source::Add, entry.key, points));
            }
        }
    }
    axes
}

fn axis(name: &str, source: Source, key: Span, points: Vec<Point>) -> Option<Axis> {
    let column = Column { name: name.to_owned(), label: name.to_owned(), segments: Vec::new(), key };
    (!points.is_empty()).then(|| Axis { columns: vec![column], points, source })
}

fn named(name: &str, key: Span, overlays: Vec<Node>) -> Point {
    Point { values: vec![Node::new(Value::String(name.into()), key)], overlays, sets: Vec::new() }
}

/// An overlay that drops the entry `name` of the table at `segments`.
fn dropped(segments: &[String], name: &str, key: Span) -> Node {
    let path: Vec<String> = segments.iter().cloned().chain([name.to_owned()]).collect();
    Node::nested(&path, key, Node::new(Value::Boolean(false), key))
}

fn check_names(names: &[&str], option: &str, span: Span, report: &mut Report) -> bool {
    let is_taken = names.contains(&NONE);
    if is_taken {
        let message = format!("`{option}` varies an entry called `none`, which is the name of what changes nothing");
        report.add(Mistake::at(span, message).hint("call the entry otherwise".to_owned()));
    }
    !is_taken
}

/// The points of `add_one`: the base alone, and each further entry with it.
fn added(option: &Node, segments: &[String], names: &[&str], key: Span, report: &mut Report) -> Vec<Point> {
    let base = option.get("base").and_then(|entry| entry.node.array()).unwrap_or_default();
    for entry in base {
        let text = entry.text().unwrap_or_default();
        if !names.contains(&text) {
            let message = format!("`add_one` keeps `{text}`, which `{}` does not have", segments.join("."));
            let mistake = Mistake::at(entry.span, message).label(expected(names.iter().copied()));
            report.add(mistake.hint(did_you_mean(text, names.iter().copied())));
        }
    }
    let is_base = |name: &&str| base.iter().any(|entry| entry.text() == Some(*name));
    let optional: Vec<&str> = names.iter().copied().filter(|name| !is_base(name)).collect();
    if optional.is_empty() {
        let message = format!("`add_one` has nothing to add: `{}` holds no more than the base", segments.join("."));
        report.add(Mistake::at(key, message));
        return Vec::new();
    }
    let with =
        |kept: &str| optional.iter().filter(|name| **name != kept).map(|name| dropped(segments, name, key)).collect();
    // With nothing in the base there is nothing to begin from: each entry stands alone.
    let none = (optional.len() < names.len()).then(|| named(NONE, key, with("")));
    none.into_iter().chain(optional.iter().map(|name| named(name, key, with(name)))).collect()
}

/// The points of `[[sweep.arm]]`: the document as it is, and each named set laid over it.
fn arms(tables: &[Node], key: Span, root: &Node, doubts: &mut Vec<Doubt>, report: &mut Report) -> Vec<Point> {
    let mut points = vec![named(NONE, key, Vec::new())];
    let mut known: BTreeMap<String, Span> = BTreeMap::new();
    // What an arm makes of the document, to find two that make the same.
    let mut made: Vec<(String, serde_json::Value)> = vec![(NONE.to_owned(), without_sweep(root).json())];
    for table in tables {
        let Some(name) = table.get("name").map(|entry| &entry.node) else { continue };
        let text = name.text().unwrap_or_default();
        let is_name = !text.is_empty() && text.chars().all(|c| c.is_ascii_alphanumeric() || "_-.+".contains(c));
        if !is_name {
            let label = "expected ASCII letters, digits, `_`, `-`, `.` and `+`";
            report.add(Mistake::at(name.span, format!("`{text}` cannot be the name of an arm")).label(label));
            continue;
        }
        if text == NONE {
            let message = "`none` is the arm in which nothing is changed; it is always there";
            report.add(Mistake::at(name.span, message).hint("call this one otherwise".to_owned()));
            continue;
        }
        if let Some(first) = known.get(text) {
            report
                .add(Mistake::at(name.span, format!("two arms are called `{text}`")).also(*first, "the other stands"));
            continue;
        }
        known.insert(text.to_owned(), name.span);
        let mut set = table.clone();
        set.remove("name");
        let Some(sets) = settings(&set, root, report) else { continue };
        // Laid as one, so that a table that names another `kind` replaces the old one with all that it says.
        let mut overlay = Node::empty(table.span);
        for leaf in &sets {
            overlay.overlay(&leaf.overlay());
        }
        let mut laid = without_sweep(root);
        laid.overlay(&overlay);
        let laid = laid.json();
        if let Some((same, _)) = made.iter().find(|(_, other)| *other == laid) {
            let mistake = if same == NONE {
                Mistake::at(name.span, format!("the arm `{text}` changes nothing"))
                    .label("every value is what it is without the arm")
            } else {
                Mistake::at(name.span, format!("the arms `{same}` and `{text}` are the same"))
                    .also(known[same], "the other stands")
            };
            doubts.push(Doubt::new(text, same, mistake));
        } else {
            made.push((text.to_owned(), laid));
        }
        points.push(Point { values: vec![name.clone()], overlays: vec![overlay], sets });
    }
    points
}

/// The paths that an arm sets; none where one cannot be set.
fn settings(set: &Node, root: &Node, report: &mut Report) -> Option<Vec<Leaf>> {
    let params = root.get("params").and_then(|entry| entry.node.table());
    let mut is_good = true;
    let mut found = Vec::new();
    for (segments, key, value) in leaves(set) {
        if !path::check_begin(&segments, key, report) {
            is_good = false;
            continue;
        }
        let name = segments[1].as_str();
        if segments[0] == "params" && !params.is_some_and(|params| params.contains_key(name)) {
            let names = params.into_iter().flatten().map(|(name, _)| name.as_ref());
            report
                .add(Mistake::at(key, format!("unknown parameter `{name}` in an arm")).hint(did_you_mean(name, names)));
            is_good = false;
        }
        found.push(Leaf { segments, key, value: value.clone() });
    }
    is_good.then_some(found)
}

fn without_sweep(root: &Node) -> Node {
    let kept = |name: &Arc<str>| matches!(name.as_ref(), "params" | "stages");
    let table = root.table().into_iter().flatten().filter(|(name, _)| kept(name));
    Node::new(Value::Table(Arc::new(table.map(|(name, entry)| (Arc::clone(name), entry.clone())).collect())), root.span)
}

#[cfg(test)]
mod tests {
    use crate::pipeline::spec::testing::{Files, swept};

    fn names(sweep: &str) -> Vec<String> {
        swept(sweep).good("a.toml", &[]).trials.into_iter().map(|trial| trial.name).collect()
    }

    fn rewards(files: &Files, trial: &str) -> Vec<String> {
        let trials = files.good("a.toml", &[]).trials;
        let trial = trials.iter().find(|other| other.name == trial).unwrap_or_else(|| panic!("no {trial}"));
        trial.stages["train"].stage.params()["rewards"].as_object().unwrap().keys().cloned().collect()
    }

    #[test]
    fn named_sets_are_laid_over_the_file() {
        let files = swept(
            "[sweep]\ngrid = { \"params.seed\" = [1, 2] }\n[[sweep.arm]]\nname = \"alone\"\nstages.train.rewards.other = false\n\
             [[sweep.arm]]\nname = \"long\"\n\"stages.train.steps\" = 99\nparams.rate = 0.5\n[sweep.arm.stages.train.optimizer]\nbeta = 0.5\n\
             [[sweep.arm]]\nname = \"other-kind\"\nstages.train.rewards.correct = { kind = \"expression\", expression = \"a\" }\n\
             [table]\nbaseline = { arm = \"none\", seed = 1 }\n",
        );
        let experiment = files.good("a.toml", &[]);
        let arms: Vec<&str> = experiment.trials.iter().map(|trial| trial.name.as_str()).collect();
        assert_eq!(arms.len(), 8);
        assert_eq!(arms[..2], ["arm=none,seed=1", "arm=none,seed=2"]);
        assert_eq!(experiment.table.baseline.unwrap()["arm"], "none");
        assert_eq!(rewards(&files, "arm=none,seed=1"), ["correct", "other"]);
        assert_eq!(rewards(&files, "arm=alone,seed=2"), ["correct"]);
        let long = experiment.trials.iter().find(|trial| trial.name == "arm=long,seed=2").unwrap();
        let params = long.stages["train"].stage.params();
        assert_eq!(
            (params["steps"].clone(), params["learning_rate"].clone(), params["seed"].clone()),
            (99.into(), 0.5.into(), 2.into())
        );
        assert_eq!(params["optimizer"]["beta"], 0.5);
        assert_eq!(long.assignment["arm"], "long");
        let other = experiment.trials.iter().find(|trial| trial.name == "arm=other-kind,seed=1").unwrap();
        let correct = &other.stages["train"].stage.params()["rewards"]["correct"];
        assert_eq!(
            *correct,
            serde_json::json!({"kind": "expression", "expression": "a"}),
            "another kind replaces the table"
        );
    }

    #[test]
    fn one_entry_is_left_out_at_a_time() {
        let files = swept(
            "[sweep]\ndrop_one = \"stages.train.rewards\"\n[sweep.grid]\n\"stages.train.rewards.correct.weight\" = [0.5, 1.0]\n[table]\nbaseline = { drop = \"none\", weight = 0.5 }\n",
        );
        let trials: Vec<String> = files.good("a.toml", &[]).trials.into_iter().map(|trial| trial.name).collect();
        let expected =
            ["none", "correct", "other"].map(|drop| [0.5, 1.0].map(|weight| format!("drop={drop},weight={weight:?}")));
        assert_eq!(trials, expected.concat());
        assert_eq!(rewards(&files, "drop=none,weight=0.5"), ["correct", "other"]);
        assert_eq!(rewards(&files, "drop=correct,weight=0.5"), ["other"], "it is left out whatever is swept in it");
        assert_eq!(rewards(&files, "drop=other,weight=1.0"), ["correct"]);
        let plan = crate::pipeline::plan::Plan::new(&[files.good("a.toml", &[])], None).unwrap();
        // The weight of what is left out makes no difference: one `data`, and five times `train` and `score` for six trials.
        assert_eq!((plan.trials.len(), plan.nodes.len()), (6, 1 + 2 * 5));
    }

    #[test]
    fn one_entry_is_added_at_a_time() {
        let three = "[stages.train.rewards.third]\nkind = \"correct\"\n";
        let alone = format!("{three}[sweep]\nadd_one = \"stages.train.rewards\"\n");
        assert_eq!(names(&alone), ["add=correct", "add=other", "add=third"]);
        assert_eq!(rewards(&swept(&alone), "add=other"), ["other"]);
        let based = format!("{three}[sweep]\nadd_one = {{ path = \"stages.train.rewards\", base = [\"correct\"] }}\n");
        assert_eq!(names(&based), ["add=none", "add=other", "add=third"]);
        assert_eq!(rewards(&swept(&based), "add=none"), ["correct"]);
        assert_eq!(rewards(&swept(&based), "add=third"), ["correct", "third"]);
    }

    #[test]
    fn arms_that_are_no_arms() {
        let sweep = "[sweep]\ngrid = { \"stages.train.steps\" = [1, 2] }\n\
                     arm = [{ name = \"a\", stages.train.note = \"x\" }, { name = \"a\", stages.train.note = \"y\" }, \
                     { name = \"b\", stages.train = { note = \"x\" } }, { name = \"none\", params.seed = 2 }, \
                     { name = \"c\", params = { seed = 1 } }, { name = \"d e\", params.seed = 3 }, { name = \"f\", params.sede = 3 }, \
                     { name = \"g\", stage.train.note = \"x\" }, { name = \"h\", stages.train.run.cpus = 1 }, \
                     { name = \"i\", stages.train.steps = 3 }, { name = \"j\", stages.train.stepz = 3 }, { name = \"k\" }]\n";
        insta::assert_snapshot!(swept(sweep).bad("a.toml", &[]), @r#"
            error: too few entries in `arm[11]` of `sweep`
             --> a.toml:4:443
            4 | ...}, { name = "j", stages.train.stepz = 3 }, { name = "k" }]
              |                                               ^^^^^^^^^^^^^^ expected at least 2, found 1
        "#);
        insta::assert_snapshot!(swept(&sweep.replace(", { name = \"k\" }", "")).bad("a.toml", &[]), @r#"
            error: two arms are called `a`
             --> a.toml:4:58
            4 | arm = [{ name = "a", stages.train.note = "x" }, { name = "a", stages.train.note = "y" }, { name = "b", stages.train = { note = "x" } ...
              |                                                          ^^^
            note: the other stands at a.toml:4:17

            error: the arms `a` and `b` are the same
             --> a.toml:4:99
            4 | arm = [{ name = "a", stages.train.note = "x" }, { name = "a", stages.train.note = "y" }, { name = "b", stages.train = { note = "x" } ...
              |                                                                                                   ^^^
            note: the other stands at a.toml:4:17

            error: `none` is the arm in which nothing is changed; it is always there
             --> a.toml:4:146
            4 | ...y" }, { name = "b", stages.train = { note = "x" } }, { name = "none", params.seed = 2 }, { name = "c", params = { seed = 1 } }, { ...
              |                                                                  ^^^^^^
            hint: call this one otherwise

            error: the arm `c` changes nothing
             --> a.toml:4:182
            4 | ...ame = "none", params.seed = 2 }, { name = "c", params = { seed = 1 } }, { name = "d e", params.seed = 3 }, { name = "f", params.se...
              |                                              ^^^ every value is what it is without the arm

            error: `d e` cannot be the name of an arm
             --> a.toml:4:221
            4 | ... params = { seed = 1 } }, { name = "d e", params.seed = 3 }, { name = "f", params.sede = 3 }, { name = "g", stage.train.note = "x"...
              |                                       ^^^^^ expected ASCII letters, digits, `_`, `-`, `.` and `+`

            error: unknown parameter `sede` in an arm
             --> a.toml:4:268
            4 | ...1 } }, { name = "d e", params.seed = 3 }, { name = "f", params.sede = 3 }, { name = "g", stage.train.note = "x" }, { name = "h", s...
              |                                                                   ^^^^
            hint: did you mean `seed`?

            error: `stage.train.note` cannot be swept
             --> a.toml:4:306
            4 | ....sede = 3 }, { name = "g", stage.train.note = "x" }, { name = "h", stages.train.run.cpus = 1 }, { name = "i", stages.train.steps =...
              |                                           ^^^^ a swept path begins with `params.` or `stages.`
            hint: did you mean `stages`?

            error: `stages.train.run.cpus` cannot be swept
             --> a.toml:4:351
            4 | ....note = "x" }, { name = "h", stages.train.run.cpus = 1 }, { name = "i", stages.train.steps = 3 }, { name = "j", stages.train.stepz...
              |                                                  ^^^^ what `run` says changes no result

            error: an arm sets `stages.train.steps`, which is swept on its own
             --> a.toml:4:390
            4 | ... "h", stages.train.run.cpus = 1 }, { name = "i", stages.train.steps = 3 }, { name = "j", stages.train.stepz = 3 }]
              |                                                                  ^^^^^
            note: it is swept at a.toml:3:10

            error: unknown field `stepz` in stage `train`
             --> a.toml:4:430
            4 | ....train.stepz = 3 }]
              |           ^^^^^ expected one of `data`, `learning_rate`, `note`, `optimizer`, `rewards`, `seed`, `start`, `steps`, `validate`
            hint: did you mean `steps`?
        "#);
    }

    #[test]
    fn tables_of_which_nothing_can_be_left_out() {
        let mut told = Vec::new();
        for option in [
            "drop_one = \"stages.train.reward\"",
            "drop_one = \"stages.train\"",
            "drop_one = \"stages.train.steps\"",
            "drop_one = \"params\"",
            "drop_one = \"stages.data.splits\"",
            "add_one = { path = \"stages.train.rewards\", base = [\"corect\", \"other\"] }",
            "add_one = { path = \"stages.train.rewards\", base = [\"correct\", \"other\"] }",
            "drop_one = \"stages.train.rewards\"\nadd_one = \"stages.train.rewards\"",
        ] {
            told.push(swept(&format!("[sweep]\n{option}\n")).bad("a.toml", &[]));
        }
        let empty =
            "[stages.train.rewards]\nother = false\ncorrect = false\n[sweep]\ndrop_one = \"stages.train.rewards\"\n";
        told.push(swept(empty).bad("a.toml", &[]));
        let named = "[stages.train.rewards.none]\nkind = \"correct\"\n[sweep]\ndrop_one = \"stages.train.rewards\"\n";
        told.push(swept(named).bad("a.toml", &[]));
        insta::assert_snapshot!(told.join("\n"), @r#"
            error: `drop_one` names `stages.train.reward`, but `stages.train` has no `reward`
             --> a.toml:3:12
            3 | drop_one = "stages.train.reward"
              |            ^^^^^^^^^^^^^^^^^^^^^
            hint: did you mean `rewards`?

            error: `drop_one` names `stages.train`, which is no table of named tables
             --> a.toml:3:12
            3 | drop_one = "stages.train"
              |            ^^^^^^^^^^^^^^ `data` in it is no table

            error: `drop_one` names `stages.train.steps`, which is no table of named tables
             --> a.toml:3:12
            3 | drop_one = "stages.train.steps"
              |            ^^^^^^^^^^^^^^^^^^^^ expected a path such as `stages.grpo.rewards`

            error: `params` cannot be swept
             --> a.toml:3:12
            3 | drop_one = "params"
              |            ^^^^^^^^ a swept path begins with `params.` or `stages.`

            error: `drop_one` names `stages.data.splits`, which is no table of named tables
             --> a.toml:3:12
            3 | drop_one = "stages.data.splits"
              |            ^^^^^^^^^^^^^^^^^^^^ `test` in it is no table

            error: `add_one` keeps `corect`, which `stages.train.rewards` does not have
             --> a.toml:3:52
            3 | add_one = { path = "stages.train.rewards", base = ["corect", "other"] }
              |                                                    ^^^^^^^^ expected one of `correct`, `other`
            hint: did you mean `correct`?

            error: `add_one` has nothing to add: `stages.train.rewards` holds no more than the base
             --> a.toml:3:1
            3 | add_one = { path = "stages.train.rewards", base = ["correct", "other"] }
              | ^^^^^^^

            error: `add_one` and `drop_one` both vary `stages.train.rewards`
             --> a.toml:4:11
            4 | add_one = "stages.train.rewards"
              |           ^^^^^^^^^^^^^^^^^^^^^^
            note: `drop_one` stands at a.toml:3:12

            error: `drop_one` has nothing to leave out: `stages.train.rewards` is empty
             --> a.toml:6:12
            6 | drop_one = "stages.train.rewards"
              |            ^^^^^^^^^^^^^^^^^^^^^^

            error: `drop_one` varies an entry called `none`, which is the name of what changes nothing
             --> a.toml:5:12
            5 | drop_one = "stages.train.rewards"
              |            ^^^^^^^^^^^^^^^^^^^^^^
            hint: call the entry otherwise
        "#);
    }
}
