//! Kinds that are quick, for tests of what is shown of their results.

use std::path::PathBuf;

use tempfile::TempDir;

use crate::pipeline::plan::Plan;
use crate::pipeline::spec::Experiment;
use crate::pipeline::stage::{ArtifactType, Kind, Output, Stage, StageContext, Upstream};
use crate::pipeline::store::Store;
use crate::pipeline::{exec, spec};
use crate::telemetry::METRICS_FILE;

/// A stage that writes an evaluation in which the first `solved` of ten mazes but the `seed`-th are solved.
#[derive(serde::Serialize, serde::Deserialize, schemars::JsonSchema)]
#[serde(deny_unknown_fields)]
pub(crate) struct Fake {
    solved: usize,
    seed: u64,
    #[serde(default = "Fake::ten")]
    mazes: usize,
}

impl Fake {
    fn ten() -> usize {
        10
    }
}

impl Stage for Fake {
    const KIND: &'static str = "fake";
    const VERSION: u32 = 1;
    fn outputs(&self) -> Vec<Output> {
        vec![Output::new("evaluation", ArtifactType::Evaluation)]
    }
    fn run(&self, context: &mut StageContext) -> anyhow::Result<()> {
        let names: Vec<String> = (0..self.mazes).map(|place| format!("maze{place}")).collect();
        let rows: Vec<_> = names
            .iter()
            .enumerate()
            .map(|(place, name)| {
                let solved = place < self.solved && place as u64 != self.seed;
                let stratum = if place < self.mazes / 2 { "short" } else { "long" };
                (
                    name.as_str(),
                    Some(stratum),
                    f64::from(u8::from(solved)),
                    Some(((place as u64 * 7 + self.seed) % 13) as f64),
                )
            })
            .collect();
        crate::cli::results::fake::evaluation(&context.output("evaluation"), &rows);
        Ok(())
    }
}

/// What [`FakeTraining`] logs: as many curves as a real one shows.
const LOGGED: [&str; 14] = [
    "reward",
    "loss",
    "validation/solved",
    "validation/reward",
    "reward/correct/mean",
    "reward/short/mean",
    "rollout/solved",
    "completions/mean_length",
    "completions/clipped_share",
    "policy/entropy",
    "policy/old_kl",
    "groups/all_equal",
    "gradient_norm",
    "learning_rate",
];

/// A training of some steps, each of which earns `rate` more than the one before it.
#[derive(serde::Serialize, serde::Deserialize, schemars::JsonSchema)]
#[serde(deny_unknown_fields)]
pub(crate) struct FakeTraining {
    steps: u64,
    rate: f64,
    seed: u64,
}

impl Stage for FakeTraining {
    const KIND: &'static str = "fake_training";
    const VERSION: u32 = 1;
    fn outputs(&self) -> Vec<Output> {
        vec![Output::new("last", ArtifactType::Checkpoint)]
    }
    fn metrics(&self, _: &Upstream<'_>) -> Option<Vec<String>> {
        Some(Vec::new())
    }
    fn curves(&self) -> &'static [&'static str] {
        &["reward", "length"]
    }
    fn run(&self, context: &mut StageContext) -> anyhow::Result<()> {
        let line = |step: u64| {
            let mut line = serde_json::json!({"step": step, "length": 4, "seconds/step": 2.0});
            for name in LOGGED {
                line[name] = (step as f64 * self.rate).into();
            }
            line
        };
        let lines: Vec<String> = (1..=self.steps).map(|step| line(step).to_string()).collect();
        std::fs::create_dir_all(&context.logs)?;
        std::fs::write(context.logs.join(METRICS_FILE), lines.join("\n"))?;
        std::fs::write(context.output("last").join("weights"), format!("{} {}", self.steps, self.rate))?;
        Ok(())
    }
}

/// Both.
pub(crate) static KINDS: &[Kind] = &[Kind::of::<Fake>(), Kind::of::<FakeTraining>()];

/// The experiment of a file with this text, and the store in which it may have run. All is gone with the folder.
pub(crate) fn ran(text: &str, run: bool) -> (TempDir, Vec<Experiment>, Store) {
    let place = tempfile::tempdir().expect("a folder can be made");
    let file: PathBuf = place.path().join("maze.toml");
    std::fs::write(&file, text).expect("a file can be written");
    let experiments = spec::read(&[file], &[], KINDS).unwrap_or_else(|mistakes| panic!("{mistakes}"));
    let store = Store::open(&place.path().join("store")).expect("a store can be opened");
    if run {
        let plan = Plan::new(&experiments, Some(&store)).expect("it can be planned");
        exec::execute(&plan, &store, &exec::Options::default(), &mut |_| {}).expect("it runs");
    }
    (place, experiments, store)
}
