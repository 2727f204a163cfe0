//! The table of an experiment as data: arms by metrics, differences within arms and against the baseline.
//!
//! It reads what the store has for the files as they are now and never runs anything; what is missing is a note.

#[cfg(test)]
pub(crate) mod fake;
mod gather;

use std::collections::{BTreeMap, BTreeSet, HashMap};

use rayon::prelude::*;
use serde::Serialize;
use serde_json::Value;

use crate::cli::arms::{Claim, Sample};
use crate::cli::curves::Matched;
use crate::cli::failure::Failure;
use crate::cli::tuning::{self, Tuned};
use crate::pipeline::plan::Plan;
use crate::pipeline::spec::point::Point;
use crate::pipeline::spec::{Experiment, Trial};
use crate::pipeline::stage::ArtifactType;
use crate::pipeline::store::Store;
use crate::statistics::family::holm;
use crate::statistics::{Difference, Estimate};

use gather::Results;
pub use gather::{View, fits, split};

/// What `pipe table` knows of an experiment; its JSON is what scripts rely on.
#[derive(Debug, Serialize)]
pub struct Comparison {
    /// The experiment's name.
    pub experiment: String,
    /// `stage.metric`, in the order to show.
    pub metrics: Vec<String>,
    /// What the intervals are about.
    pub claim: Claim,
    /// How the arms were tuned, where they were.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tuning: Option<Tuned>,
    /// The arm that others are compared with.
    pub baseline: Option<String>,
    /// In the order of the files.
    pub arms: Vec<Arm>,
    /// What is missing or wrong, in sentences.
    pub notes: Vec<String>,
    /// By column, how much every run had spent where its curve is read.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub matched: BTreeMap<String, Matched>,
    /// By evaluation, the output of the stage whose weights it evaluates, as `grpo.last`.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub checkpoints: BTreeMap<String, String>,
    /// Metrics that are shares of instances, shown as percentages.
    #[serde(skip)]
    pub shares: BTreeSet<String>,
    /// The names of differences, in the order to show.
    #[serde(skip)]
    pub differences: Vec<(String, String)>,
}

/// One arm: its trials differ in nothing but the seed.
#[derive(Debug, Serialize)]
pub struct Arm {
    /// Its name; empty where nothing but seeds is swept.
    pub arm: String,
    /// What is swept, by its name in tables, without the seeds.
    pub parameters: BTreeMap<String, Value>,
    /// Seeds that have any result.
    pub seeds: usize,
    /// By metric.
    pub metrics: BTreeMap<String, Option<Estimate>>,
    /// By `a - b`.
    pub differences: BTreeMap<String, Option<Tested>>,
    /// By metric: this arm minus the baseline; absent for the baseline itself, or without one.
    pub versus_baseline: Option<BTreeMap<String, Option<Tested>>>,
}

/// A difference with its p as one of a family.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Tested {
    /// The difference.
    #[serde(flatten)]
    pub difference: Difference,
    /// p after Holm's correction over all tests of the same block of the table.
    pub p_holm: Option<f64>,
}

impl Comparison {
    /// Whether any number stands in it.
    pub fn has_results(&self) -> bool {
        self.arms.iter().any(|arm| arm.metrics.values().any(Option::is_some))
    }

    /// Gathers the table of `experiment`, one of those that `plan` was made of, as `view` wants to see it.
    pub fn new(experiment: &Experiment, plan: &Plan, store: Option<&Store>, view: &View) -> Result<Self, Failure> {
        let mut notes = Vec::new();
        let mut results = Results::gather(experiment, plan, store, view, &mut notes)?;
        let metrics = match (view.columns.is_empty(), experiment.table.metrics.is_empty()) {
            (false, _) => results.expand(experiment, &view.columns)?,
            (true, true) => results.every_metric(experiment),
            (true, false) => experiment.table.metrics.clone(),
        };
        let mut arms: Vec<(&str, Vec<&Trial>)> = Vec::new();
        let mut places: HashMap<&str, usize> = HashMap::new();
        for trial in experiment.reported() {
            let place = *places.entry(&trial.arm).or_insert_with(|| {
                arms.push((&trial.arm, Vec::new()));
                arms.len() - 1
            });
            arms[place].1.push(trial);
        }

        let pairs = &experiment.table.differences;
        let mut wanted: Vec<&String> = metrics.iter().collect();
        wanted.extend(pairs.iter().flat_map(|(first, second)| [first, second]));
        wanted.sort();
        wanted.dedup();
        let trials: Vec<&Trial> = experiment.reported().collect();
        results.settle(&trials, wanted.iter().copied(), &mut notes);
        let mut unreached = BTreeSet::new();
        let samples: Vec<BTreeMap<&str, Sample>> = arms
            .iter()
            .map(|(_, trials)| {
                wanted.iter().map(|name| (name.as_str(), results.sample(trials, name, &mut unreached))).collect()
            })
            .collect();
        notes.extend(tuning::chosen(experiment));
        notes.extend(tuning::waiting(experiment));
        results.note_missing(&trials, &wanted, &mut notes);
        notes.extend(unreached);

        let seeds_of = |samples: &BTreeMap<&str, Sample>| {
            samples.values().flat_map(|sample| sample.seeds.keys()).collect::<BTreeSet<_>>().len()
        };
        let fewest = samples.iter().map(seeds_of).filter(|seeds| *seeds > 0).min().unwrap_or(0);
        let claim = Claim::of(fewest);
        let baseline = baseline(experiment, &arms, &mut notes);

        let shares: BTreeSet<String> = wanted
            .iter()
            .filter(|name| is_share_by_name(name) || samples.iter().all(|own| own[name.as_str()].is_share()))
            .map(|name| (*name).clone())
            .collect();
        let row = |place: usize| {
            let ((arm, trials), own) = (&arms[place], &samples[place]);
            let tested = |difference: Option<Difference>, are_shares: bool| {
                let difference = difference?;
                let difference = if are_shares { difference.of_shares() } else { difference };
                Some(Tested { difference, p_holm: None })
            };
            let differences = pairs.iter().map(|(first, second)| {
                let found = own[first.as_str()].minus(&own[second.as_str()], claim);
                (difference_name(first, second), tested(found, shares.contains(first) && shares.contains(second)))
            });
            let estimate = |name: &String| {
                let found = own[name.as_str()].estimate(claim)?;
                Some(if shares.contains(name) { found.of_share() } else { found })
            };
            let versus = baseline.filter(|&baseline| baseline != place).map(|baseline| {
                let against = |name: &String| own[name.as_str()].minus(&samples[baseline][name.as_str()], claim);
                metrics.iter().map(|name| (name.clone(), tested(against(name), shares.contains(name)))).collect()
            });
            Arm {
                arm: (*arm).to_owned(),
                parameters: trials.first().map(|trial| parameters(trial)).unwrap_or_default(),
                seeds: seeds_of(own),
                metrics: metrics.iter().map(|name| (name.clone(), estimate(name))).collect(),
                differences: differences.collect(),
                versus_baseline: versus,
            }
        };
        // Permutations take their time: arms side by side.
        let mut rows: Vec<Arm> = (0..arms.len()).into_par_iter().map(row).collect();
        correct(rows.iter_mut().flat_map(|arm| arm.differences.values_mut()));
        correct(rows.iter_mut().filter_map(|arm| arm.versus_baseline.as_mut()).flat_map(BTreeMap::values_mut));
        let checkpoints = checkpoints(experiment, plan, &wanted);
        Ok(Self {
            experiment: experiment.name.clone(),
            metrics: metrics.clone(),
            claim,
            tuning: experiment.tuning.as_ref().map(Tuned::of),
            baseline: baseline.map(|place| arms[place].0.to_owned()),
            arms: rows,
            notes,
            matched: results.matched,
            checkpoints,
            shares,
            differences: pairs.clone(),
        })
    }
}

/// Whether a metric is a share of instances by its definition, also where several draws make an instance's value a fraction.
fn is_share_by_name(name: &str) -> bool {
    let metric = Point::split(split(name).1).0;
    let metric = metric.strip_prefix("validation/").or_else(|| metric.strip_prefix("rollout/")).unwrap_or(metric);
    metric == "solved" || metric.starts_with("solved.") || metric.starts_with("pass@")
}

/// What a trial's arm fixes: the last segment of each path, or the path where two end alike.
pub fn parameters(trial: &Trial) -> BTreeMap<String, Value> {
    let last = |path: &str| path.rsplit('.').next().unwrap_or_default().to_owned();
    let mut named = BTreeMap::new();
    for (path, value) in &trial.assignment {
        let alike = trial.assignment.keys().filter(|other| last(other) == last(path)).count();
        let name = if alike > 1 { path.clone() } else { last(path) };
        // What is left out of the arm's name is the seed.
        let is_in_arm = trial.arm.split(',').any(|part| part.split_once('=').is_some_and(|(label, _)| label == name));
        if is_in_arm || trial.seed.as_ref() != Some(value) {
            named.insert(name, value.clone());
        }
    }
    named
}

/// By evaluation among `wanted`, whose weights it evaluates: `grpo.last`, `base.checkpoint`.
fn checkpoints(experiment: &Experiment, plan: &Plan, wanted: &[&String]) -> BTreeMap<String, String> {
    let mut found = BTreeMap::new();
    let Some(trial) = plan.trials.iter().find(|trial| trial.experiment == experiment.name) else { return found };
    for stage in wanted.iter().map(|name| split(name).0) {
        let Some(node) = trial.stages.get(stage).map(|place| &plan.nodes[*place]) else { continue };
        let of = node.edges.iter().find(|edge| edge.artifact == ArtifactType::Checkpoint);
        if let Some(edge) = of.filter(|_| !found.contains_key(stage)) {
            let from = trial.stages.iter().find(|(_, place)| **place == edge.from).map_or("", |(name, _)| name);
            found.insert(stage.to_owned(), format!("{from}.{}", edge.output));
        }
    }
    found
}

/// `a - b`, the name of a difference.
pub fn difference_name(first: &str, second: &str) -> String {
    format!("{first} - {second}")
}

/// Holm's correction over one block of tests.
fn correct<'a>(block: impl Iterator<Item = &'a mut Option<Tested>>) {
    let mut tests: Vec<&mut Tested> =
        block.filter_map(Option::as_mut).filter(|tested| tested.difference.p.is_some()).collect();
    let family: Vec<f64> = tests.iter().filter_map(|tested| tested.difference.p).collect();
    for (tested, p) in tests.iter_mut().zip(holm(&family)) {
        tested.p_holm = Some(p);
    }
}

/// The place of the arm that the baseline's assignment names.
fn baseline(experiment: &Experiment, arms: &[(&str, Vec<&Trial>)], notes: &mut Vec<String>) -> Option<usize> {
    let wanted = experiment.table.baseline.as_ref()?;
    let fits = |trial: &&Trial| {
        wanted.iter().all(|(axis, value)| {
            let own = trial.assignment.get(axis).or_else(|| {
                let last = |path: &str| path.rsplit('.').next().unwrap_or_default().to_owned();
                trial.assignment.iter().find(|(path, _)| last(path) == *axis).map(|(_, own)| own)
            });
            own.is_some_and(|own| same(own, value))
        })
    };
    let found: Vec<usize> =
        arms.iter().enumerate().filter(|(_, (_, trials))| trials.iter().all(fits)).map(|(place, _)| place).collect();
    match found[..] {
        [one] => Some(one),
        [] => {
            notes.push("no arm has the values of `table.baseline`".to_owned());
            None
        }
        _ => {
            notes.push(format!("`table.baseline` fits {} arms; it must fix every axis but the seeds", found.len()));
            None
        }
    }
}

/// Equality of TOML values, where `0` is `0.0`.
fn same(first: &Value, second: &Value) -> bool {
    match (first.as_f64(), second.as_f64()) {
        (Some(first), Some(second)) => first.to_bits() == second.to_bits() || (first == 0.0 && second == 0.0),
        _ => first == second,
    }
}

#[cfg(test)]
mod tests {
    use super::fake::{KINDS, ran};
    use super::*;
    use crate::pipeline::spec;

    fn compared(text: &str, run: bool) -> Comparison {
        viewed(text, run, &View::default()).unwrap()
    }

    fn viewed(text: &str, run: bool, view: &View) -> Result<Comparison, Failure> {
        let (_place, experiments, store) = ran(text, run);
        let plan = Plan::new(&experiments, Some(&store)).unwrap();
        Comparison::new(&experiments[0], &plan, Some(&store), view)
    }

    const TRAINED: &str = r#"
        [stages.train]
        kind = "fake_training"
        steps = 4
        rate = 0.1
        seed = 1
        [sweep.grid]
        "stages.train.steps" = [4, 2]
        [table]
        metrics = ["train.reward", "train.reward@steps", "train.reward@seconds=6", "train.reward@seconds_to>=0.2", "train.reward@steps_to>=0.4"]
        baseline = { steps = 4 }
    "#;

    #[test]
    fn sixty_four_arms_by_five_metrics_are_compared_quickly() {
        let seeds: Vec<String> = (0..64).map(|seed| seed.to_string()).collect();
        let text = format!(
            "[stages.test]\nkind = \"fake\"\nsolved = 700\nseed = 0\nmazes = 1000\n[sweep.grid]\n\"stages.test.seed\" = [{}]\n\
             [table]\nmetrics = [\"test.solved\", \"test.solved.short\", \"test.solved.long\", \"test.steps\", \"test.steps.long\"]\n\
             baseline = {{ seed = 0 }}\n",
            seeds.join(", ")
        );
        let (_place, experiments, store) = ran(&text, true);
        let plan = Plan::new(&experiments, Some(&store)).unwrap();
        let begin = std::time::Instant::now();
        let found = Comparison::new(&experiments[0], &plan, Some(&store), &View::default()).unwrap();
        let taken = begin.elapsed();
        assert_eq!((found.arms.len(), found.arms[9].metrics.len()), (64, 5));
        assert_eq!(found.arms[63].versus_baseline.as_ref().unwrap()["test.solved"].unwrap().difference.n, 1000);
        // Generous for an unoptimised build on a busy machine.
        assert!(taken < std::time::Duration::from_secs(10), "{taken:?}");
    }

    #[test]
    fn curves_are_read_at_equal_effort() {
        let found = compared(TRAINED, true);
        let arm = |name: &str| found.arms.iter().find(|arm| arm.arm == name).unwrap();
        let mean = |name: &str, column: &str| arm(name).metrics[column].map(|found| found.mean);
        assert_eq!(mean("steps=4", "train.reward"), Some(0.4), "the end of each run");
        assert_eq!(mean("steps=2", "train.reward"), Some(0.2));
        for name in ["steps=4", "steps=2"] {
            assert_eq!(mean(name, "train.reward@steps"), Some(0.2), "the most that both have");
            assert_eq!(mean(name, "train.reward@seconds_to>=0.2"), Some(4.0));
        }
        let equal = found.arms[1].versus_baseline.as_ref().unwrap()["train.reward@steps"].unwrap();
        assert!(equal.difference.mean.abs() < 1e-12);
        assert!((mean("steps=4", "train.reward@seconds=6").unwrap() - 0.3).abs() < 1e-12);
        assert_eq!(mean("steps=2", "train.reward@seconds=6"), None);
        assert_eq!(found.matched["train.reward@steps"], Matched { axis: "steps", value: 2.0, is_common: true });
        assert_eq!(found.arms[0].parameters["steps"], 4);
        assert_eq!(
            found.notes,
            [
                "`train.reward@seconds=6`: 1 of 1 run of steps=2 did not get there, so there is no number",
                "`train.reward@steps_to>=0.4`: 1 of 1 run of steps=2 did not get there, so there is no number"
            ]
        );
    }

    #[test]
    fn columns_may_be_asked_for_and_points_given() {
        let view =
            View { columns: vec!["t*.re*d".to_owned(), "train.length@last".to_owned()], at: Point::parse("steps") };
        let found = viewed(TRAINED, true, &view).unwrap();
        assert_eq!(found.metrics, ["train.reward", "train.length@last"]);
        assert!((found.arms[0].metrics["train.reward"].unwrap().mean - 0.2).abs() < 1e-12);
        assert_eq!(found.matched["train.reward"], Matched { axis: "steps", value: 2.0, is_common: true });
        let view = View { columns: vec!["train.x*".to_owned()], at: None };
        let failure = viewed(TRAINED, true, &view).err().unwrap();
        assert!(failure.parts().0.contains("has a metric like `train.x*`"), "{:?}", failure.parts());
        let view = View { columns: vec!["train.reward@kl".to_owned()], at: None };
        let notes = viewed(TRAINED, true, &view).unwrap().notes;
        assert!(notes[0].contains("needs `kl.beta` above 0"), "{notes:?}");
    }

    #[test]
    fn a_curve_that_no_training_logs_is_told_when_the_file_is_read() {
        let place = tempfile::tempdir().unwrap();
        let file = place.path().join("maze.toml");
        std::fs::write(&file, TRAINED.replace("\"train.reward\"", "\"train.rewrd@best\"")).unwrap();
        let mistakes = spec::read(&[file], &[], KINDS).err().unwrap().to_string();
        assert!(mistakes.contains("stage `train` measures no `rewrd@best`"), "{mistakes}");
        assert!(mistakes.contains("`length`, `reward`") || mistakes.contains("`reward`, `length`"), "{mistakes}");
    }

    const SWEPT: &str = r#"
        [stages.before]
        kind = "fake"
        solved = 4
        seed = 9
        [stages.after]
        kind = "fake"
        solved = 8
        seed = 9
        [sweep.grid]
        "stages.after.solved" = [8, 6]
        [table]
        metrics = ["after.solved", "after.solved.long", "after.speed"]
        baseline = { "stages.after.solved" = 8 }
        differences = [["after.solved", "before.solved"]]
    "#;

    #[test]
    fn results_become_arms_differences_and_notes() {
        let found = compared(SWEPT, true);
        assert_eq!(found.claim, Claim::Checkpoints);
        assert_eq!(found.baseline.as_deref(), Some("solved=8"));
        let arm = |name: &str| found.arms.iter().find(|arm| arm.arm == name).unwrap();
        let solved = arm("solved=8").metrics["after.solved"].unwrap();
        assert_eq!((solved.mean.to_bits(), solved.n), (0.8f64.to_bits(), 10));
        assert_eq!(arm("solved=8").metrics["after.solved.long"].unwrap().n, 5);
        assert_eq!(arm("solved=8").metrics["after.speed"], None);
        assert!(arm("solved=8").versus_baseline.is_none());
        let versus = arm("solved=6").versus_baseline.as_ref().unwrap()["after.solved"].unwrap();
        assert!((versus.difference.mean + 0.2).abs() < 1e-12);
        let within = arm("solved=6").differences["after.solved - before.solved"].unwrap();
        assert!((within.difference.mean - 0.2).abs() < 1e-12);
        assert_eq!(found.notes, ["`after` measured no `speed`; it has solved, steps"]);
    }

    #[test]
    fn what_has_not_run_is_noted_and_null() {
        let found = compared(SWEPT, false);
        assert!(!found.has_results());
        assert_eq!(
            found.notes,
            ["`after` has no result yet in 2 of 2 trials", "`before` has no result yet in 2 of 2 trials"]
        );
    }

    #[test]
    fn five_seeds_make_a_claim_about_the_recipe() {
        let seeded = "[stages.test]\nkind = \"fake\"\nsolved = 8\n\
                      [sweep]\nseeds = { path = \"stages.test.seed\", values = [1, 2, 3, 4, 9] }\n";
        let found = compared(seeded, true);
        assert_eq!((found.claim, found.arms.len(), found.arms[0].seeds), (Claim::Recipe, 1, 5));
        assert_eq!(found.metrics, ["test.solved", "test.steps"]);
        let solved = found.arms[0].metrics["test.solved"].unwrap();
        assert_eq!(solved.n, 5);
        assert!((solved.mean - 0.72).abs() < 1e-12, "four seeds miss one maze each");
    }

    #[test]
    fn intervals_of_shares_over_seeds_stay_among_shares() {
        // One maze, which the first seed misses: Student's interval of 0, 1, 1, 1, 1 goes from 0.245 to 1.355.
        let seeded = "[stages.test]\nkind = \"fake\"\nsolved = 1\nmazes = 1\n\
                      [sweep]\nseeds = { path = \"stages.test.seed\", values = [0, 2, 3, 4, 5] }\n";
        let solved = compared(seeded, true).arms[0].metrics["test.solved"].unwrap();
        assert_eq!(
            (solved.n, solved.low.is_some_and(|low| low > 0.2), solved.high),
            (5, true, Some(1.0)),
            "{solved:?}"
        );
    }

    #[test]
    fn a_baseline_compares_numbers_as_numbers() {
        assert!(same(&0.into(), &0.0.into()));
        assert!(!same(&0.into(), &"0".into()));
    }

    #[test]
    fn each_block_is_a_family() {
        let tested = |p: Option<f64>| {
            Some(Tested { difference: Difference { mean: 0.1, low: None, high: None, n: 5, p }, p_holm: None })
        };
        let mut block = [tested(Some(0.01)), None, tested(None), tested(Some(0.04))];
        correct(block.iter_mut());
        let adjusted: Vec<Option<f64>> = block.iter().flatten().map(|tested| tested.p_holm).collect();
        assert_eq!(adjusted, [Some(0.02), None, Some(0.04)]);
    }
}
