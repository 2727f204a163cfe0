//! From axes to named assignments: every combination that is not left out, with what it lays over the document.

use std::collections::{BTreeMap, HashMap, HashSet};

use serde_json::Value as Json;

use crate::pipeline::spec::diagnostic::{Mistake, Report};
use crate::pipeline::spec::sweep::{Axis, Sweep, counted, shown};
use crate::pipeline::spec::tree::Node;

/// More trials than this are a mistake.
pub(super) const MOST_TRIALS: u128 = 100_000;

/// The values of one trial.
#[derive(Default)]
pub(in crate::pipeline::spec) struct Assignment {
    /// `beta=0.01,seed=1`; empty where nothing is swept.
    pub(in crate::pipeline::spec) name: String,
    /// The same without seeds.
    pub(in crate::pipeline::spec) arm: String,
    /// Path to value; `arm`, `drop` and `add` to a name.
    pub(in crate::pipeline::spec) values: BTreeMap<String, Json>,
    /// The seed.
    pub(in crate::pipeline::spec) seed: Option<Json>,
    /// What to lay over the document, in this order.
    pub(in crate::pipeline::spec) overlays: Vec<Node>,
}

impl Sweep {
    /// Every combination that is not left out, seeds varying fastest; one without values where nothing is swept.
    pub(in crate::pipeline::spec) fn assignments(&self, report: &mut Report) -> Vec<Assignment> {
        let axes: Vec<&Axis> = self.axes.iter().collect();
        if !check_count(&axes, 1, report) {
            return Vec::new();
        }
        let assigned = |chosen: Vec<usize>| assignment(axes.iter().copied().zip(chosen));
        let assignments: Vec<Assignment> = self.kept(report).into_iter().map(assigned).collect();
        self.check_names(assignments.iter().map(|assignment| assignment.name.as_str()), report);
        self.check_arms(assignments.iter(), report);
        assignments
    }

    /// The points of every combination that is not left out.
    pub(super) fn kept(&self, report: &mut Report) -> Vec<Vec<usize>> {
        let mut idle: Vec<bool> = vec![true; self.exclusions.len()];
        let mut kept = Vec::new();
        for chosen in combinations(&self.axes.iter().collect::<Vec<_>>()) {
            let mut is_left_out = false;
            for (exclusion, idle) in self.exclusions.iter().zip(&mut idle) {
                if exclusion.fits(&chosen) {
                    (*idle, is_left_out) = (false, true);
                }
            }
            if !is_left_out {
                kept.push(chosen);
            }
        }
        let is_idle = |(_, idle): &(_, bool)| *idle;
        report.extend(self.exclusions.iter().zip(idle).filter(is_idle).map(|(exclusion, _)| exclusion.is_idle()));
        if kept.is_empty() {
            report.extend(
                self.key.map(|key| {
                    Mistake::at(key, "`exclude` leaves nothing of the sweep").label("every trial is excluded")
                }),
            );
        }
        kept
    }

    /// Arms of one name would be averaged as one.
    pub(super) fn check_arms<'a>(&self, assignments: impl Iterator<Item = &'a Assignment>, report: &mut Report) {
        let seeds: Vec<&str> =
            self.axes.iter().filter(|axis| axis.is_seed()).map(|axis| axis.columns[0].name.as_str()).collect();
        let mut known: HashMap<&str, Vec<(&String, &Json)>> = HashMap::new();
        // Where their trials have one name too, that was told.
        let (mut names, mut told) = (HashSet::new(), HashSet::new());
        for Assignment { arm, values, .. } in assignments.filter(|one| names.insert(one.name.as_str())) {
            let own = values.iter().filter(|(path, _)| !seeds.contains(&path.as_str()));
            let own: Vec<(&String, &Json)> = own.collect();
            if *known.entry(arm).or_insert_with(|| own.clone()) != own && told.insert(arm) {
                let message = format!("two arms would both be called `{arm}`");
                report.extend(self.key.map(|key| Mistake::at(key, message)));
            }
        }
    }

    /// Trials of one name would take each other's place.
    pub(super) fn check_names<'a>(&self, names: impl Iterator<Item = &'a str>, report: &mut Report) {
        let mut known = HashSet::new();
        for name in names {
            if !known.insert(name) {
                let message = format!("two trials would both be called `{name}`");
                report.extend(self.key.map(|key| Mistake::at(key, message)));
            }
        }
    }
}

/// Whether a sweep over these axes, `times` over, is of a size that can be planned.
pub(super) fn check_count(axes: &[&Axis], times: u128, report: &mut Report) -> bool {
    let count = axes.iter().fold(times, |count, axis| count.saturating_mul(axis.points.len() as u128));
    if count <= MOST_TRIALS {
        return true;
    }
    let mut long: Vec<&&Axis> = axes.iter().filter(|axis| axis.points.len() > 1).collect();
    long.sort_by_key(|axis| std::cmp::Reverse(axis.points.len()));
    let shown = |axis: &&&Axis| {
        let labels: Vec<&str> = axis.columns.iter().map(|column| column.label.as_str()).collect();
        format!("{} of `{}`", counted(axis.points.len() as u128), labels.join("` with `"))
    };
    let axes: Vec<String> = long.iter().map(shown).collect();
    let message = format!("the sweep has {} trials: {}", counted(count), axes.join(" x "));
    let label = format!("axes multiply; a sweep has at most {} trials", counted(MOST_TRIALS));
    let hint = "`[[sweep.zip]]` varies paths together, `[[sweep.arm]]` adds sets of values instead of multiplying them";
    let key = long.first().map(|axis| axis.columns[0].key);
    report.extend(key.map(|key| Mistake::at(key, message).label(label).hint(hint.to_owned())));
    false
}

/// The points of each axis in every combination, the last axis varying fastest.
pub(super) fn combinations(axes: &[&Axis]) -> impl Iterator<Item = Vec<usize>> {
    let lengths: Vec<usize> = axes.iter().map(|axis| axis.points.len()).collect();
    (0..lengths.iter().product()).map(move |number: usize| {
        let mut rest = number;
        let mut chosen = vec![0; lengths.len()];
        for (place, length) in lengths.iter().enumerate().rev() {
            chosen[place] = rest % length;
            rest /= length;
        }
        chosen
    })
}

/// The assignment of a point of each axis.
pub(super) fn assignment<'a>(points: impl IntoIterator<Item = (&'a Axis, usize)>) -> Assignment {
    let mut texts = Vec::new();
    let mut laid = Vec::new();
    let mut assignment = Assignment::default();
    for (axis, chosen) in points {
        let point = &axis.points[chosen];
        for (column, value) in axis.columns.iter().zip(&point.values) {
            // Trials name folders, so a slash inside a value may not make a folder of its own.
            let text = shown(value).unwrap_or_default().replace(['/', '\\'], "_");
            texts.push((format!("{}={text}", column.label), axis.is_seed()));
            assignment.values.insert(column.name.clone(), value.json());
        }
        if axis.is_seed() {
            assignment.seed = point.values.first().map(Node::json);
        }
        laid.push((axis.source, &point.overlays));
    }
    texts.sort();
    let joined = |with_seeds: bool| {
        let kept = texts.iter().filter(|(_, is_seed)| with_seeds || !is_seed).map(|(text, _)| text.as_str());
        kept.collect::<Vec<_>>().join(",")
    };
    (assignment.name, assignment.arm) = (joined(true), joined(false));
    laid.sort_by_key(|(source, _)| *source);
    assignment.overlays = laid.into_iter().flat_map(|(_, overlays)| overlays.iter().cloned()).collect();
    assignment
}

#[cfg(test)]
mod tests {
    use crate::pipeline::spec::testing::swept;

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

    fn names(sweep: &str) -> Vec<String> {
        swept(sweep).good("a.toml", &[]).trials.into_iter().map(|trial| trial.name).collect()
    }

    #[test]
    fn a_value_added_later_renames_nothing_and_shares_what_it_can() {
        let few = swept(
            "[sweep]\nseeds = { path = \"params.seed\", values = [1, 2] }\ngrid = { \"stages.train.steps\" = [5] }\n",
        );
        let more = swept(
            "[sweep]\nseeds = { path = \"params.seed\", values = [1, 2, 3] }\ngrid = { \"stages.train.steps\" = [5, 6] }\n\
             exclude = [{ steps = 6, seed = 3 }]\n",
        );
        let (few, mut more) = (few.good("a.toml", &[]), more.good("a.toml", &[]));
        more.name = "more".to_owned();
        assert_eq!(more.trials.len(), 5);
        for trial in &few.trials {
            let same = more.trials.iter().find(|other| other.name == trial.name).expect("it keeps its name");
            assert_eq!((&same.arm, &same.assignment), (&trial.arm, &trial.assignment));
        }
        let plan = crate::pipeline::plan::Plan::new(&[few, more], None).unwrap();
        // One `data` for all; a `train` and a `score` for each trial, those of both experiments once.
        assert_eq!(plan.nodes.len(), 1 + 2 * 5);
    }

    #[test]
    fn lists_are_values_and_have_names() {
        let lists = "[sweep.grid]\n\"stages.data.task\" = [1]\n";
        let message = swept(lists).bad("a.toml", &[]);
        assert!(message.contains("wrong type of `task`"), "{message}");
        let lists = "[sweep.grid]\n\"stages.score.others\" = [[\"data\"], [\"data.extra\", \"train\"], []]\n";
        assert_eq!(names(lists), ["others=[data]", "others=[data.extra,train]", "others=[]"]);
        let trials = swept(lists).good("a.toml", &[]).trials;
        assert_eq!(trials[0].assignment["stages.score.others"], serde_json::json!(["data"]));
        let others = trials[1].stages["score"].stage.params()["others"].as_array().unwrap().len();
        assert_eq!(others, 2);
    }

    #[test]
    fn names_that_meet_are_refused() {
        insta::assert_snapshot!(swept("[sweep.grid]\n\"stages.train.note\" = [\"a/b\", \"a_b\"]\n").bad("a.toml", &[]), @r#"
            error: two trials would both be called `note=a_b`
             --> a.toml:2:2
            2 | [sweep.grid]
              |  ^^^^^
        "#);
        insta::assert_snapshot!(swept("[sweep.grid]\n\"stages.score.others\" = [[\"data\", \"train\"], [\"data,train\"]]\n").bad("a.toml", &[]), @r#"
            error: two trials would both be called `others=[data,train]`
             --> a.toml:2:2
            2 | [sweep.grid]
              |  ^^^^^

            error: unknown stage `data,train` in `others[0]` of stage `score`
             --> a.toml:3:46
            3 | "stages.score.others" = [["data", "train"], ["data,train"]]
              |                                              ^^^^^^^^^^^^ expected one of `data`, `train`
        "#);
    }

    #[test]
    fn arms_that_meet_are_refused_even_where_their_trials_do_not() {
        let sweep = "[sweep]\nseeds = { path = \"params.seed\", values = [1, 2] }\n\
                     grid = { \"stages.train.note\" = [\"a/b\", \"a_b\"] }\n\
                     exclude = [{ note = \"a/b\", seed = 1 }, { note = \"a_b\", seed = 2 }]\n";
        insta::assert_snapshot!(swept(sweep).bad("a.toml", &[]), @r#"
            error: two arms would both be called `note=a_b`
             --> a.toml:2:2
            2 | [sweep]
              |  ^^^^^
        "#);
    }

    #[test]
    fn a_sweep_too_large_to_plan_says_how_large_it_is_and_why() {
        let values = |count: u64| (1..=count).map(|value| value.to_string()).collect::<Vec<_>>().join(", ");
        let thousand = values(1000);
        let sweep = format!(
            "[sweep.grid]\n\"stages.train.steps\" = [{thousand}]\n\"stages.train.seed\" = [{thousand}]\n\
             \"stages.train.note\" = [\"x\"]\n\"stages.score.seed\" = [{thousand}]\n"
        );
        let message = swept(&sweep).bad("a.toml", &[]);
        let title = message.lines().next().unwrap();
        assert_eq!(
            title,
            "error: the sweep has 1,000,000,000 trials: 1,000 of `stages.score.seed` x 1,000 of `stages.train.seed` x 1,000 of `steps`"
        );
        assert!(message.contains("--> a.toml:6:1") && message.contains("at most 100,000 trials"), "{message}");
        assert!(message.contains("hint: `[[sweep.zip]]` varies paths together"), "{message}");
        let sweep = format!(
            "[sweep]\nseeds = {{ path = \"params.seed\", values = [{}] }}\n[[sweep.zip]]\nstages.train.steps = [{}]\nparams.rate = [{}]\n",
            values(20_000),
            values(6),
            values(6)
        );
        let message = swept(&sweep).bad("a.toml", &[]);
        assert_eq!(
            message.lines().next().unwrap(),
            "error: the sweep has 120,000 trials: 20,000 of `seed` x 6 of `rate` with `steps`"
        );
    }
}
