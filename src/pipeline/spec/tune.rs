//! What is chosen for each arm before it is reported: candidates, the runs that tell them apart, and the choice.
//!
//! Every arm has the same candidates and the same tuning seeds. A tuning trial ends with the stage that measures; the trials
//! that report are made for every candidate when the files are read, and those of the chosen ones run. Nothing here reads a
//! store: who has results says what a trial measured.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::pipeline::spec::{Experiment, Trial};

/// What a trial is for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Purpose {
    /// Its results are reported.
    #[default]
    Report,
    /// It helps to choose what is reported.
    Tune,
}

/// Which of two values of a metric is better.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Goal {
    /// The larger.
    Max,
    /// The smaller.
    Min,
}

/// How the arms of an experiment are tuned.
#[derive(Clone)]
pub struct Tuning {
    /// `stage.metric`, averaged over the tuning seeds.
    pub metric: String,
    /// Which is better.
    pub goal: Goal,
    /// In the order of the trials.
    pub arms: Vec<TunedArm>,
    /// Of the arms whose tuning runs are done.
    pub choices: Vec<Choice>,
}

/// One arm with all that is tried for it.
#[derive(Clone)]
pub struct TunedArm {
    /// Its name.
    pub arm: String,
    /// In the order of the grid.
    pub candidates: Vec<Candidate>,
}

/// One combination of tuned values in one arm.
#[derive(Clone)]
pub struct Candidate {
    /// `learning_rate=0.0001`.
    pub name: String,
    /// Path to value.
    pub assignment: BTreeMap<String, Value>,
    /// The names of its tuning trials.
    pub tuning: Vec<String>,
    /// The trials that report the arm where this one is chosen.
    pub reporting: Vec<Trial>,
}

/// What was chosen for an arm, and what for.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Choice {
    /// The arm.
    pub arm: String,
    /// The name of the candidate.
    pub chosen: String,
    /// Its values: path to value.
    pub assignment: BTreeMap<String, Value>,
    /// Every candidate, in the order of the grid.
    pub candidates: Vec<Tried>,
}

/// A candidate with what its tuning runs measured.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Tried {
    /// Its name.
    pub candidate: String,
    /// The mean over the tuning seeds; no number where one of them measured nothing.
    pub mean: f64,
    /// One for each tuning seed.
    pub runs: Vec<TuningRun>,
}

/// What one tuning trial measured.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct TuningRun {
    /// Its name.
    pub trial: String,
    /// The value of the metric; no number where it measured nothing.
    pub value: f64,
    /// The key of the result that holds it.
    pub key: String,
}

impl Goal {
    /// Whether `first` is strictly better than `second`, as every number is than none.
    fn prefers(self, first: f64, second: f64) -> bool {
        match self {
            _ if second.is_nan() => !first.is_nan(),
            Self::Max => first > second,
            Self::Min => first < second,
        }
    }
}

impl Tuning {
    /// The choice for each arm of which `measured` knows every tuning trial: the best mean, the first in the order of the
    /// grid where several are best. The others wait, because candidates are compared on the same runs.
    pub fn choose(&self, measured: &dyn Fn(&str) -> Option<TuningRun>) -> Vec<Choice> {
        self.arms.iter().filter_map(|arm| arm.choose(self.goal, measured)).collect()
    }

    /// The reporting trials that wait for a choice, as the first candidate of their arm would have them.
    pub fn waiting(&self) -> impl Iterator<Item = &Trial> {
        let open = self.arms.iter().filter(|arm| self.chosen(arm).is_none());
        open.filter_map(|arm| arm.candidates.first()).flat_map(|candidate| &candidate.reporting)
    }

    /// How many reporting trials wait for a choice.
    pub fn awaiting(&self) -> usize {
        self.waiting().count()
    }

    fn chosen<'a>(&self, arm: &'a TunedArm) -> Option<&'a Candidate> {
        let choice = self.choices.iter().find(|choice| choice.arm == arm.arm)?;
        arm.candidates.iter().find(|candidate| candidate.name == choice.chosen)
    }
}

impl TunedArm {
    fn choose(&self, goal: Goal, measured: &dyn Fn(&str) -> Option<TuningRun>) -> Option<Choice> {
        let mut candidates: Vec<Tried> = Vec::with_capacity(self.candidates.len());
        let mut best = 0;
        for (place, candidate) in self.candidates.iter().enumerate() {
            let runs: Vec<TuningRun> = candidate.tuning.iter().map(|trial| measured(trial)).collect::<Option<_>>()?;
            let mean = runs.iter().map(|run| run.value).sum::<f64>() / runs.len() as f64;
            if candidates.get(best).is_some_and(|other| goal.prefers(mean, other.mean)) {
                best = place;
            }
            candidates.push(Tried { candidate: candidate.name.clone(), mean, runs });
        }
        let chosen = self.candidates.get(best)?;
        Some(Choice {
            arm: self.arm.clone(),
            chosen: chosen.name.clone(),
            assignment: chosen.assignment.clone(),
            candidates,
        })
    }
}

impl Experiment {
    /// The same experiment with these choices made: its trials are those that tune and those that report what is chosen.
    pub fn choose(&mut self, choices: Vec<Choice>) {
        let Some(tuning) = &mut self.tuning else { return };
        tuning.choices = choices;
        self.trials.retain(|trial| trial.purpose == Purpose::Tune);
        let chosen = tuning.arms.iter().filter_map(|arm| tuning.chosen(arm));
        self.trials.extend(chosen.flat_map(|candidate| candidate.reporting.iter().cloned()));
    }

    /// The trials that will be reported once it is chosen how; see [`Tuning::waiting`].
    pub fn waiting(&self) -> impl Iterator<Item = &Trial> {
        self.tuning.iter().flat_map(Tuning::waiting)
    }

    /// The trials whose results are reported.
    pub fn reported(&self) -> impl Iterator<Item = &Trial> {
        self.trials.iter().filter(|trial| trial.purpose == Purpose::Report)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pipeline::spec::testing::swept;

    const SWEEP: &str = "[stages.final]\nkind = \"score\"\nmodel = \"train\"\nsplit = \"test\"\n[sweep]\n\
                         seeds = { path = \"params.seed\", values = [1, 2, 3] }\ndrop_one = \"stages.train.rewards\"\n\
                         exclude = [{ drop = \"other\", seed = 3 }]\n\
                         [sweep.tune]\ngrid = { \"params.rate\" = [0.1, 0.2], \"stages.train.steps\" = [5, 6] }\nseeds = [101, 102]\n\
                         metric = \"score.solved\"\n[table]\nmetrics = [\"final.solved\"]\nbaseline = { drop = \"none\" }\n";

    /// What a trial of the name measures: candidates are the better the more steps they make.
    fn measured(name: &str) -> TuningRun {
        let value = if name.contains("steps=6") { 0.5 } else { 0.25 };
        TuningRun { trial: name.to_owned(), value, key: String::new() }
    }

    #[test]
    fn every_arm_has_the_same_tuning_runs_and_reports_what_they_choose() {
        let mut experiment = swept(SWEEP).good("a.toml", &[]);
        let names: Vec<String> = experiment.trials.iter().map(|trial| trial.name.clone()).collect();
        assert_eq!(names.len(), 3 * 4 * 2, "arms, candidates, tuning seeds");
        assert_eq!(
            names[..2],
            ["tune:drop=none,rate=0.1,seed=101,steps=5", "tune:drop=none,rate=0.1,seed=102,steps=5"]
        );
        let first = &experiment.trials[0];
        assert_eq!(first.stages.keys().collect::<Vec<_>>(), ["data", "score", "train"], "no stage beyond the metric's");
        assert_eq!((first.purpose, first.arm.as_str()), (Purpose::Tune, "drop=none"));
        let params = first.stages["train"].stage.params();
        assert_eq!((params["seed"].clone(), params["steps"].clone()), (101.into(), 5.into()));
        let tuning = experiment.tuning.as_ref().unwrap();
        assert_eq!((tuning.metric.as_str(), tuning.goal, tuning.awaiting()), ("score.solved", Goal::Max, 3 + 3 + 2));
        assert!(experiment.reported().next().is_none());

        let choices = tuning.choose(&|name| Some(measured(name)));
        assert_eq!(choices.len(), 3);
        assert_eq!(choices[0].chosen, "rate=0.1,steps=6", "the first of the best");
        assert_eq!(choices[0].candidates.iter().map(|tried| tried.runs.len()).collect::<Vec<_>>(), [2, 2, 2, 2]);
        experiment.choose(choices);
        assert_eq!(experiment.trials.len(), 24 + 8);
        assert_eq!(experiment.tuning.as_ref().unwrap().awaiting(), 0);
        let reported: Vec<&Trial> = experiment.reported().collect();
        assert_eq!(reported[0].name, "drop=none,seed=1");
        assert_eq!(reported.last().unwrap().name, "drop=other,seed=2");
        assert_eq!(reported[0].stages["train"].stage.params()["steps"], 6);
        assert_eq!(reported[0].stages["train"].stage.params()["learning_rate"], 0.1);
        assert_eq!(reported[0].assignment["stages.train.steps"], 6);
        assert!(reported[0].stages.contains_key("final"));
    }

    #[test]
    fn what_one_arm_leaves_out_is_tuned_in_the_others() {
        let grid = "grid = { \"stages.train.rewards.correct.weight\" = [0.5, 1.0], \"stages.train.steps\" = [5, 6] }";
        let old = "grid = { \"params.rate\" = [0.1, 0.2], \"stages.train.steps\" = [5, 6] }";
        let experiment = swept(&SWEEP.replace(old, grid)).good("a.toml", &[]);
        let arms = experiment.tuning.unwrap().arms;
        let candidates = |arm: usize| -> Vec<String> {
            arms[arm].candidates.iter().map(|candidate| candidate.name.clone()).collect()
        };
        assert_eq!(arms[1].arm, "drop=correct");
        assert_eq!(candidates(1), ["steps=5,weight=0.5", "steps=6,weight=0.5"], "its weight makes no difference there");
        assert_eq!((candidates(0).len(), candidates(2).len()), (4, 4));
        assert_eq!(experiment.trials.len(), (4 + 2 + 4) * 2);

        // Where every arm leaves it out, tuning it was not meant.
        let gone = "exclude = [{ drop = \"other\" }, { drop = \"none\" }]";
        let nowhere = SWEEP.replace(old, grid).replace("exclude = [{ drop = \"other\", seed = 3 }]", gone);
        let message = swept(
            &nowhere
                .replace("[table]\n", "")
                .replace("baseline = { drop = \"none\" }\n", "")
                .replace("metrics = [\"final.solved\"]\n", ""),
        )
        .bad("a.toml", &[]);
        assert!(
            message.contains("`score.solved` cannot tell `steps=5,weight=0.5` from `steps=5,weight=1.0`"),
            "{message}"
        );
    }

    #[test]
    fn an_arm_waits_for_its_last_run_and_the_goal_decides() {
        let mut experiment =
            swept(&SWEEP.replace("\"score.solved\"\n", "\"score.steps\"\ngoal = \"min\"\n")).good("a.toml", &[]);
        let tuning = experiment.tuning.clone().unwrap();
        let missing = "tune:drop=correct,rate=0.2,seed=102,steps=6";
        let choices = tuning.choose(&|name| (name != missing).then(|| measured(name)));
        assert_eq!(choices.iter().map(|choice| choice.arm.as_str()).collect::<Vec<_>>(), ["drop=none", "drop=other"]);
        assert_eq!(choices[0].chosen, "rate=0.1,steps=5");
        experiment.choose(choices);
        assert_eq!(experiment.reported().count(), 5);
        assert_eq!(experiment.tuning.as_ref().unwrap().awaiting(), 3);
        experiment.choose(tuning.choose(&|name| Some(measured(name))));
        assert_eq!(experiment.reported().count(), 8, "choosing again takes the place of what was chosen");
    }

    #[test]
    fn a_candidate_that_measured_nothing_is_not_chosen() {
        for goal in ["max", "min"] {
            let metric = format!("\"score.solved\"\ngoal = \"{goal}\"\n");
            let experiment = swept(&SWEEP.replace("\"score.solved\"\n", &metric)).good("a.toml", &[]);
            for silent in ["rate=0.1,seed=101,steps=5", "rate=0.1,seed=102,steps=5"] {
                let measured = |name: &str| {
                    let value = if name.ends_with(silent) { f64::NAN } else { 0.5 };
                    Some(TuningRun { value, ..measured(name) })
                };
                let choices = experiment.tuning.as_ref().unwrap().choose(&measured);
                assert_eq!(choices[0].chosen, "rate=0.1,steps=6", "{goal} without {silent}");
                assert!(choices[0].candidates[0].mean.is_nan());
            }
        }
    }

    #[test]
    fn nothing_that_the_metric_rests_on_reads_the_split_test() {
        let told = swept(&format!("{SWEEP}[stages.score]\nothers = [\"final\"]\n")).bad("a.toml", &[]);
        assert!(told.starts_with("error: the split `test` selects nothing"), "{told}");
        assert!(told.contains("`final` reads `split = \"test\"`"), "{told}");
    }

    #[test]
    fn tuning_that_cannot_choose() {
        let mut told = Vec::new();
        for (old, new) in [
            ("seeds = [101, 102]", "seeds = [101, 3, 101, [1]]"),
            ("metric = \"score.solved\"", "metric = \"final.solved\""),
            ("metric = \"score.solved\"", "metric = \"score.solvd\"\ngoal = \"maximum\""),
            ("metric = \"score.solved\"", "metric = \"score.solvd\""),
            ("metric = \"score.solved\"", "metric = \"scor.solved\""),
            ("metric = \"score.solved\"", "metric = \"data.solved\""),
            ("\"params.rate\" = [0.1, 0.2], \"stages.train.steps\" = [5, 6]", "\"params.rate\" = [0.1]"),
            ("\"params.rate\" = [0.1, 0.2], \"stages.train.steps\" = [5, 6]", "\"stages.final.seed\" = [1, 2]"),
            ("\"params.rate\" = [0.1, 0.2]", "\"params.seed\" = [7, 8], \"stages.train.stepz\" = [1]"),
            ("baseline = { drop = \"none\" }", "baseline = { drop = \"none\", rate = 0.1 }"),
            ("seeds = { path = \"params.seed\", values = [1, 2, 3] }\n", ""),
        ] {
            let sweep = SWEEP.replace(old, new);
            assert_ne!(sweep, SWEEP);
            told.push(swept(&sweep).bad("a.toml", &[]));
        }
        insta::assert_snapshot!(told.join("\n"), @r#"
            error: a tuning seed is a reporting seed
              --> a.toml:12:15
            12 | seeds = [101, 3, 101, [1]]
               |               ^ what was chosen on a seed looks better there than it is
            note: it reports at a.toml:7:49

            error: a tuning seed is given twice
              --> a.toml:12:18
            12 | seeds = [101, 3, 101, [1]]
               |                  ^^^

            error: an array is no seed
              --> a.toml:12:23
            12 | seeds = [101, 3, 101, [1]]
               |                       ^^^

            error: the split `test` selects nothing
              --> a.toml:13:10
            13 | metric = "final.solved"
               |          ^^^^^^^^^^^^^^
            hint: measure another split in a stage of its own: `final` reads `split = "test"`

            error: unknown value `maximum` of `tune.goal` in `sweep`
              --> a.toml:14:8
            14 | goal = "maximum"
               |        ^^^^^^^^^ expected one of `max`, `min`

            error: stage `score` measures no `solvd`
              --> a.toml:13:10
            13 | metric = "score.solvd"
               |          ^^^^^^^^^^^^^ expected one of `solved`, `solved.*`, `steps`
            hint: did you mean `solved`?

            error: unknown stage `scor` in `sweep.tune`
              --> a.toml:13:10
            13 | metric = "scor.solved"
               |          ^^^^^^^^^^^^^ expected one of `data`, `final`, `score`, `train`
            hint: did you mean `score`?

            error: `data.solved` cannot tell `rate=0.1,steps=5` from `rate=0.1,steps=6`
              --> a.toml:13:10
            13 | metric = "data.solved"
               |          ^^^^^^^^^^^^^ what they differ in does not lead to stage `data`

            error: stage `data` records no metrics
              --> a.toml:13:10
            13 | metric = "data.solved"
               |          ^^^^^^^^^^^^^
            hint: did you mean `score.solved`?

            error: there is nothing to choose from: the grid of `sweep.tune` has one candidate
              --> a.toml:10:8
            10 | [sweep.tune]
               |        ^^^^
            hint: give a path several values

            error: nothing sweeps `seed`, which is excluded
             --> a.toml:9:30
            9 | exclude = [{ drop = "other", seed = 3 }]
              |                              ^^^^ expected one of `drop`, `params.seed`

            error: `score.solved` cannot tell `stages.final.seed=1` from `stages.final.seed=2`
              --> a.toml:13:10
            13 | metric = "score.solved"
               |          ^^^^^^^^^^^^^^ what they differ in does not lead to stage `score`

            error: `params.seed` is swept twice
              --> a.toml:11:10
            11 | grid = { "params.seed" = [7, 8], "stages.train.stepz" = [1], "stages.train.steps" = [5, 6] }
               |          ^^^^^^^^^^^^^
            note: it is swept first at a.toml:7:18

            error: unknown field `stepz` in stage `train`
              --> a.toml:11:34
            11 | grid = { "params.seed" = [7, 8], "stages.train.stepz" = [1], "stages.train.steps" = [5, 6] }
               |                                  ^^^^^^^^^^^^^^^^^^^^ expected one of `data`, `learning_rate`, `note`, `optimizer`, `rewards`, `seed`, `start`, `steps`, `validate`
            hint: did you mean `steps`?

            error: nothing sweeps `rate`, which the baseline fixes
              --> a.toml:16:29
            16 | baseline = { drop = "none", rate = 0.1 }
               |                             ^^^^ expected `drop`

            error: nothing sweeps `seed`, which is excluded
             --> a.toml:8:30
            8 | exclude = [{ drop = "other", seed = 3 }]
              |                              ^^^^ expected `drop`

            error: `sweep.tune` needs `sweep.seeds`: tuning and reporting differ in their seeds
              --> a.toml:11:1
            11 | seeds = [101, 102]
               | ^^^^^
            hint: as `seeds = { path = "params.seed", values = [1, 2, 3] }` in `[sweep]`
        "#);
    }
}
