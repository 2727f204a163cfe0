//! Reading pipelines and experiments: TOML text to checked values, every mistake with its place, all in one pass.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;

use serde_json::Value;

use crate::pipeline::stage::{AnyStage, Kind, RunOptions};

/// An experiment as its files say it, with every trial resolved and checked.
pub struct Experiment {
    /// The stem of its file.
    pub name: String,
    /// Its file.
    pub path: PathBuf,
    /// What it asks, in the user's words; may be empty.
    pub description: String,
    /// One element a combination of swept values; one without a name where nothing is swept.
    pub trials: Vec<Trial>,
    /// What `pipe table` shows.
    pub table: TableSpec,
}

/// The `[table]` of an experiment.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct TableSpec {
    /// `stage.metric`, in the order to show; empty shows every metric of every evaluation.
    pub metrics: Vec<String>,
    /// The assignment of the arm that others are compared with; fixes every axis but the seeds.
    pub baseline: Option<BTreeMap<String, Value>>,
    /// Pairs of `stage.metric` whose paired difference (first minus second) is shown within each arm.
    pub differences: Vec<(String, String)>,
}

/// One combination of swept values.
#[derive(Clone)]
pub struct Trial {
    /// The sorted assignment as `seed=1,beta=0.01` (last path segments, full paths where those collide); empty unswept.
    pub name: String,
    /// The same without the seeds: the arm.
    pub arm: String,
    /// Path to value, seeds included.
    pub assignment: BTreeMap<String, Value>,
    /// The seed of this trial, where `sweep.seeds` is used.
    pub seed: Option<Value>,
    /// Stages by name.
    pub stages: BTreeMap<String, StageSpec>,
}

/// A stage of a trial, resolved, parsed and checked.
#[derive(Clone)]
pub struct StageSpec {
    /// Its name in the file.
    pub name: String,
    /// Its kind.
    pub kind: Kind,
    /// Its parameters.
    pub stage: Arc<dyn AnyStage>,
    /// Its `run` table.
    pub run: RunOptions,
    /// Where the stage is declared, for messages.
    pub origin: Origin,
}

/// A place in a file of the user's.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Origin {
    /// The file, as it was named.
    pub file: PathBuf,
    /// Line, from 1.
    pub line: usize,
    /// Column in characters, from 1.
    pub column: usize,
}
