//! The table of an experiment as data: arms by metrics, differences within arms and against the baseline.
//!
//! It reads what the store has for the files as they are now and never runs anything; what is missing is a note.

use std::collections::{BTreeMap, BTreeSet};

use serde::Serialize;
use serde_json::Value;

use crate::cli::arms::{Claim, Sample};
use crate::cli::failure::Failure;
use crate::cli::render;
use crate::cli::results::StageResult;
use crate::cli::tuning::{self, Tuned};
use crate::pipeline::plan::{Plan, State};
use crate::pipeline::spec::{Experiment, Trial};
use crate::pipeline::stage::ArtifactType;
use crate::pipeline::store::{Lookup, Store};
use crate::statistics::family::holm;
use crate::statistics::{Difference, Estimate};

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
    /// Metrics whose every value is 0 or 1.
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

    /// Gathers the table of `experiment`, one of those that `plan` was made of.
    pub fn new(experiment: &Experiment, plan: &Plan, store: Option<&Store>) -> Result<Self, Failure> {
        let mut notes = Vec::new();
        let results = Results::gather(experiment, plan, store, &mut notes)?;
        let metrics = if experiment.table.metrics.is_empty() {
            results.every_metric(experiment)
        } else {
            experiment.table.metrics.clone()
        };
        let mut arms: Vec<(&str, Vec<&Trial>)> = Vec::new();
        for trial in experiment.reported() {
            match arms.iter_mut().find(|(arm, _)| *arm == trial.arm) {
                Some((_, trials)) => trials.push(trial),
                None => arms.push((&trial.arm, vec![trial])),
            }
        }

        let pairs = &experiment.table.differences;
        let mut wanted: Vec<&String> = metrics.iter().collect();
        wanted.extend(pairs.iter().flat_map(|(first, second)| [first, second]));
        wanted.sort();
        wanted.dedup();
        let samples: Vec<BTreeMap<&str, Sample>> = arms
            .iter()
            .map(|(_, trials)| wanted.iter().map(|name| (name.as_str(), results.sample(trials, name))).collect())
            .collect();
        notes.extend(tuning::chosen(experiment));
        notes.extend(tuning::waiting(experiment));
        results.note_missing(&experiment.reported().collect::<Vec<_>>(), &wanted, &mut notes);

        let seeds_of = |samples: &BTreeMap<&str, Sample>| {
            samples.values().flat_map(|sample| sample.seeds.keys()).collect::<BTreeSet<_>>().len()
        };
        let fewest = samples.iter().map(seeds_of).filter(|seeds| *seeds > 0).min().unwrap_or(0);
        let claim = Claim::of(fewest);
        let baseline = baseline(experiment, &arms, &mut notes);

        let mut rows = Vec::new();
        for (place, ((arm, _), own)) in arms.iter().zip(&samples).enumerate() {
            let tested =
                |difference: Option<Difference>| difference.map(|difference| Tested { difference, p_holm: None });
            let differences = pairs.iter().map(|(first, second)| {
                let (first_values, second_values) = (&own[first.as_str()], &own[second.as_str()]);
                (difference_name(first, second), tested(first_values.minus(second_values, claim)))
            });
            let versus = baseline.filter(|&baseline| baseline != place).map(|baseline| {
                let against = |name: &String| own[name.as_str()].minus(&samples[baseline][name.as_str()], claim);
                metrics.iter().map(|name| (name.clone(), tested(against(name)))).collect()
            });
            rows.push(Arm {
                arm: (*arm).to_owned(),
                seeds: seeds_of(own),
                metrics: metrics.iter().map(|name| (name.clone(), own[name.as_str()].estimate(claim))).collect(),
                differences: differences.collect(),
                versus_baseline: versus,
            });
        }
        correct(rows.iter_mut().flat_map(|arm| arm.differences.values_mut()));
        correct(rows.iter_mut().filter_map(|arm| arm.versus_baseline.as_mut()).flat_map(BTreeMap::values_mut));
        let shares = wanted
            .iter()
            .filter(|name| samples.iter().all(|own| own[name.as_str()].is_share()))
            .map(|name| (*name).clone())
            .collect();
        Ok(Self {
            experiment: experiment.name.clone(),
            metrics,
            claim,
            tuning: experiment.tuning.as_ref().map(Tuned::of),
            baseline: baseline.map(|place| arms[place].0.to_owned()),
            arms: rows,
            notes,
            shares,
            differences: pairs.clone(),
        })
    }
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

/// The results of an experiment, by trial and stage.
struct Results {
    by_trial: BTreeMap<String, BTreeMap<String, usize>>,
    by_node: BTreeMap<usize, StageResult>,
}

impl Results {
    fn gather(
        experiment: &Experiment,
        plan: &Plan,
        store: Option<&Store>,
        notes: &mut Vec<String>,
    ) -> Result<Self, Failure> {
        let table = &experiment.table;
        let named: BTreeSet<&str> = table
            .metrics
            .iter()
            .chain(table.differences.iter().flat_map(|(first, second)| [first, second]))
            .map(|name| split(name).0)
            .collect();
        let mut results = Self { by_trial: BTreeMap::new(), by_node: BTreeMap::new() };
        for trial in plan.trials.iter().filter(|trial| trial.experiment == experiment.name) {
            results.by_trial.insert(trial.trial.clone(), trial.stages.clone());
            for (stage, &place) in &trial.stages {
                let node = &plan.nodes[place];
                let evaluates =
                    node.spec.stage.outputs().iter().any(|output| output.artifact == ArtifactType::Evaluation);
                if !(named.contains(stage.as_str()) || table.metrics.is_empty() && evaluates) {
                    continue;
                }
                let (Some(store), State::Cached, Some(key)) = (store, node.state, &node.key) else { continue };
                if results.by_node.contains_key(&place) {
                    continue;
                }
                match store.lookup(key).map_err(|error| Failure::stage(&error))? {
                    Lookup::Hit(manifest) => {
                        let result = StageResult::read(&manifest, store)
                            .map_err(|error| Failure::failed(format!("stage `{stage}`: {error:#}")))?;
                        results.by_node.insert(place, result);
                    }
                    Lookup::Miss => {}
                    Lookup::Damaged { what } => notes.push(format!("`{stage}` is damaged: {what}")),
                }
            }
        }
        Ok(results)
    }

    fn result(&self, trial: &Trial, stage: &str) -> Option<&StageResult> {
        self.by_node.get(self.by_trial.get(&trial.name)?.get(stage)?)
    }

    fn sample(&self, trials: &[&Trial], name: &str) -> Sample {
        let (stage, metric) = split(name);
        let mut sample = Sample::default();
        for trial in trials {
            if let Some(values) = self.result(trial, stage).and_then(|result| result.values(metric)) {
                let seed = trial.seed.as_ref().map(ToString::to_string).unwrap_or_default();
                sample.seeds.insert(seed, values);
            }
        }
        sample
    }

    /// Every metric of every evaluation, stages in the order in which they run.
    fn every_metric(&self, experiment: &Experiment) -> Vec<String> {
        let mut stages: Vec<(usize, &str)> = Vec::new();
        let mut seen = BTreeSet::new();
        for trial in experiment.reported() {
            for (stage, &place) in self.by_trial.get(&trial.name).into_iter().flatten() {
                if self.by_node.contains_key(&place) && seen.insert(stage.as_str()) {
                    stages.push((place, stage));
                }
            }
        }
        stages.sort_unstable();
        stages
            .into_iter()
            .flat_map(|(place, stage)| {
                self.by_node[&place].metrics().into_iter().map(move |metric| format!("{stage}.{metric}"))
            })
            .collect()
    }

    /// Says why cells are empty.
    fn note_missing(&self, trials: &[&Trial], wanted: &[&String], notes: &mut Vec<String>) {
        let mut told = BTreeSet::new();
        for name in wanted {
            let (stage, metric) = split(name);
            let having: Vec<&&Trial> = trials.iter().filter(|trial| trial.stages.contains_key(stage)).collect();
            let without = having.iter().filter(|trial| self.result(trial, stage).is_none()).count();
            if having.is_empty() {
                let known: BTreeSet<&str> =
                    trials.iter().flat_map(|trial| trial.stages.keys().map(String::as_str)).collect();
                let near = render::near(stage, known);
                let meant = near.first().map(|near| format!("; did you mean `{near}`?")).unwrap_or_default();
                notes.push(format!("`{name}`: there is no stage `{stage}`{meant}"));
            } else if without > 0 && told.insert(stage) {
                let of =
                    if having.len() > 1 { format!(" in {without} of {} trials", having.len()) } else { String::new() };
                notes.push(format!("`{stage}` has no result yet{of}"));
            }
            let Some(result) = having.iter().find_map(|trial| self.result(trial, stage)) else { continue };
            if result.values(metric).is_none() {
                let known = result.known();
                let known = if known.is_empty() { "no metrics".to_owned() } else { known.join(", ") };
                notes.push(format!("`{stage}` measured no `{metric}`; it has {known}"));
            }
        }
    }
}

/// `stage` and `metric` of `stage.metric`.
fn split(name: &str) -> (&str, &str) {
    name.split_once('.').unwrap_or((name, ""))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pipeline::stage::{Kind, Output, StageContext};
    use crate::pipeline::{exec, spec};

    /// A stage that writes an evaluation in which the first `solved` of ten mazes but the `seed`-th are solved.
    #[derive(serde::Serialize, serde::Deserialize, schemars::JsonSchema)]
    #[serde(deny_unknown_fields)]
    struct Fake {
        solved: usize,
        seed: u64,
    }

    impl crate::pipeline::stage::Stage for Fake {
        const KIND: &'static str = "fake";
        const VERSION: u32 = 1;
        fn outputs(&self) -> Vec<Output> {
            vec![Output::new("evaluation", ArtifactType::Evaluation)]
        }
        fn run(&self, context: &mut StageContext) -> anyhow::Result<()> {
            let names: Vec<String> = (0..10).map(|place| format!("maze{place}")).collect();
            let rows: Vec<_> = names
                .iter()
                .enumerate()
                .map(|(place, name)| {
                    let solved = place < self.solved && place as u64 != self.seed;
                    let stratum = if place < 5 { "short" } else { "long" };
                    (name.as_str(), Some(stratum), f64::from(u8::from(solved)), Some(place as f64))
                })
                .collect();
            crate::cli::results::fake::evaluation(&context.output("evaluation"), &rows);
            Ok(())
        }
    }

    static KINDS: &[Kind] = &[Kind::of::<Fake>()];

    fn compared(text: &str, run: bool) -> Comparison {
        let place = tempfile::tempdir().unwrap();
        let file = place.path().join("maze.toml");
        std::fs::write(&file, text).unwrap();
        let experiments = spec::read(&[file], &[], KINDS).unwrap_or_else(|mistakes| panic!("{mistakes}"));
        let store = Store::open(&place.path().join("store")).unwrap();
        let plan = Plan::new(&experiments, Some(&store)).unwrap();
        if run {
            exec::execute(&plan, &store, &exec::Options::default(), &mut |_| {}).unwrap();
        }
        let plan = Plan::new(&experiments, Some(&store)).unwrap();
        Comparison::new(&experiments[0], &plan, Some(&store)).unwrap()
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
    fn a_name_splits_at_its_first_dot() {
        assert_eq!(split("evaluate.solved.long"), ("evaluate", "solved.long"));
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
