//! Kinds and experiments for the tests of planning and running.

use std::collections::BTreeMap;
use std::path::Path;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use crate::pipeline::spec::tune::Purpose;
use crate::pipeline::spec::{Experiment, Origin, StageSpec, TableSpec, Trial};
use crate::pipeline::stage::{
    Any, ArtifactType, Input, Interrupted, Kind, Output, Part, Place, RunOptions, SourceFile, Stage, StageContext,
};

/// What a toy does.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Act {
    /// Writes its text and its inputs.
    #[default]
    Echo,
    /// Writes the same whatever it is given: the early cutoff.
    Constant,
    /// Fails.
    Fail,
    /// Panics.
    Panic,
    /// Fails at the first attempt.
    Flaky,
    /// Saves and stops when asked to; goes on and ends at the next attempt.
    Wait,
    /// Ends its process.
    Abort,
    /// Is killed as one that takes too much memory.
    Kill,
    /// Never listens.
    Deaf,
    /// Writes which share of the machine it was given.
    Report,
}

/// A stage that does next to nothing.
#[derive(Clone, Debug, Default, Serialize, Deserialize, JsonSchema)]
#[serde(default)]
pub(crate) struct Toy {
    text: String,
    act: Act,
    inputs: Vec<Input<Any>>,
    file: Option<SourceFile>,
}

impl Stage for Toy {
    const KIND: &'static str = "toy";
    const VERSION: u32 = 1;

    fn outputs(&self) -> Vec<Output> {
        vec![Output::new("out", ArtifactType::Files), Output::new("second", ArtifactType::Files)]
    }

    fn parts(&self) -> Vec<Part> {
        vec![Part::new("task.toy", 1)]
    }

    fn run(&self, context: &mut StageContext) -> anyhow::Result<()> {
        let state = context.work.join("state");
        let before = state.exists();
        match self.act {
            Act::Echo | Act::Constant | Act::Report => {}
            Act::Flaky | Act::Wait if before => {}
            Act::Fail => anyhow::bail!("it was meant to fail"),
            Act::Panic => panic!("it was meant to panic"),
            Act::Flaky => {
                std::fs::create_dir_all(&context.work)?;
                std::fs::write(state, "")?;
                anyhow::bail!("the first attempt fails")
            }
            Act::Wait => {
                context.progress(1, 2, "waits");
                while !context.interrupted() {
                    std::thread::sleep(std::time::Duration::from_millis(2));
                }
                std::fs::create_dir_all(&context.work)?;
                std::fs::write(state, "")?;
                return Err(Interrupted.into());
            }
            Act::Abort => std::process::abort(),
            Act::Kill => rustix::process::kill_process(rustix::process::getpid(), rustix::process::Signal::KILL)?,
            Act::Deaf => loop {
                context.progress(1, 1, "waits");
                std::thread::sleep(std::time::Duration::from_millis(20));
            },
        }
        let mut text = match self.act {
            Act::Constant => "constant".to_owned(),
            Act::Report => {
                let visible = std::env::var("CUDA_VISIBLE_DEVICES").unwrap_or_default();
                format!("{} threads on {} of {visible}", context.resources.threads, context.resources.device)
            }
            _ => self.text.clone(),
        };
        for input in self.inputs.iter().filter(|_| self.act != Act::Constant) {
            text += &std::fs::read_to_string(context.input(input)?.join("text"))?;
        }
        // Two megabytes would be too many in a chain of thousands.
        text.truncate(1_000);
        for output in ["out", "second"] {
            std::fs::write(context.output(output).join("text"), format!("{text} {output}"))?;
        }
        Ok(())
    }
}

/// The same in a worker.
#[derive(Clone, Debug, Default, Serialize, Deserialize, JsonSchema)]
#[serde(transparent)]
pub(crate) struct Remote(Toy);

impl Stage for Remote {
    const KIND: &'static str = "remote";
    const VERSION: u32 = 1;
    const PLACE: Place = Place::Worker;

    fn outputs(&self) -> Vec<Output> {
        Stage::outputs(&self.0)
    }
}

/// Runs a [`Remote`] in the worker.
pub(crate) fn run_remote(params: &Value, context: &mut StageContext) -> anyhow::Result<()> {
    Stage::run(&serde_json::from_value::<Remote>(params.clone())?.0, context)
}

/// A stage of the kind `S` from its parameters.
pub(crate) fn stage<S: Stage>(name: &str, params: Value) -> StageSpec {
    let spec = stage_without_outputs::<S>(name, params);
    assert!(!spec.stage.outputs().is_empty());
    spec
}

/// The same for a kind that need not be run.
pub(crate) fn stage_without_outputs<S: Stage>(name: &str, params: Value) -> StageSpec {
    let kind = Kind::of::<S>();
    let stage = (kind.parse)(params).unwrap_or_else(|problem| panic!("{problem:?}"));
    let origin = Origin { file: "toy.toml".into(), line: 3, column: 1 };
    StageSpec { name: name.to_owned(), kind, stage, run: RunOptions { cpus: 1, ..RunOptions::default() }, origin }
}

/// A [`Toy`] that acts on inputs.
pub(crate) fn toy(name: &str, text: &str, act: Act, inputs: &[&str]) -> StageSpec {
    stage::<Toy>(name, json!({"text": text, "act": act, "inputs": inputs}))
}

/// A [`Toy`] that echoes.
pub(crate) fn echo(name: &str, text: &str, inputs: &[&str]) -> StageSpec {
    toy(name, text, Act::Echo, inputs)
}

/// A [`Toy`] with a file.
pub(crate) fn with_file(name: &str, file: &Path) -> StageSpec {
    stage::<Toy>(name, json!({"file": file}))
}

/// A trial of these stages.
pub(crate) fn trial(name: &str, stages: Vec<StageSpec>) -> Trial {
    let stages = stages.into_iter().map(|stage| (stage.name.clone(), stage)).collect();
    Trial {
        name: name.to_owned(),
        arm: name.to_owned(),
        assignment: BTreeMap::new(),
        seed: None,
        purpose: Purpose::Report,
        stages,
    }
}

/// An experiment of these trials.
pub(crate) fn experiment(name: &str, trials: Vec<Trial>) -> Experiment {
    Experiment {
        name: name.to_owned(),
        path: format!("{name}.toml").into(),
        description: String::new(),
        trials,
        table: TableSpec::default(),
        max_failures: None,
        tuning: None,
    }
}

/// An experiment `toys` of one trial.
pub(crate) fn toys(stages: Vec<StageSpec>) -> [Experiment; 1] {
    [experiment("toys", vec![trial("", stages)])]
}
