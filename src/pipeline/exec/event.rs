//! The closed stream of events from the executor to the terminal, the journal and `--json`.

use serde::{Deserialize, Serialize};

use crate::pipeline::plan::NodeName;
use crate::pipeline::stage::StageEvent;
use crate::pipeline::store::{Digest, Owner, Reached};

/// One thing that happened in a run. `node` is the index of the plan's node.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "snake_case")]
pub enum Event {
    /// The run begins.
    Started {
        /// Nodes that are in the plan.
        nodes: usize,
    },
    /// A node's key is known and its result is in the store.
    Cached {
        /// The node.
        node: usize,
        /// The names by which people know it.
        name: NodeName,
        /// Its key.
        key: Digest,
    },
    /// Another process works on the same key; this run waits for its result. Told again now and then while that lasts.
    Waiting {
        /// The node.
        node: usize,
        /// Its name.
        name: NodeName,
        /// Its key.
        key: Digest,
        /// Who works on it, where that is known.
        #[serde(default)]
        owner: Option<Owner>,
        /// How far it had come some seconds ago.
        #[serde(default)]
        reached: Option<Reached>,
    },
    /// An attempt at a node failed, and another follows.
    Retrying {
        /// The node.
        node: usize,
        /// Its name.
        name: NodeName,
        /// Why it failed, as a chain of causes.
        error: String,
        /// The number of the attempt that follows, counted in this run.
        attempt: u32,
        /// Attempts in all, at most.
        attempts: u32,
        /// Seconds until it begins.
        seconds: f64,
    },
    /// A node begins to run.
    Running {
        /// The node.
        node: usize,
        /// Its name.
        name: NodeName,
        /// Its kind.
        kind: String,
        /// Its key.
        key: Digest,
    },
    /// A running stage says something.
    Stage {
        /// The node.
        node: usize,
        /// What it says.
        #[serde(flatten)]
        event: StageEvent,
    },
    /// A node is done and published.
    Done {
        /// The node.
        node: usize,
        /// Its name.
        name: NodeName,
        /// Its key.
        key: Digest,
        /// Wall seconds of this attempt.
        seconds: f64,
        /// The headline metrics of the result.
        metrics: std::collections::BTreeMap<String, f64>,
    },
    /// A node failed.
    Failed {
        /// The node.
        node: usize,
        /// Its name.
        name: NodeName,
        /// Why, as a chain of causes.
        error: String,
        /// The stage's log file.
        log: String,
    },
    /// A node cannot run because an input failed.
    Blocked {
        /// The node.
        node: usize,
        /// Its name.
        name: NodeName,
    },
    /// A node saved its work and stopped because the run was interrupted.
    Interrupted {
        /// The node.
        node: usize,
        /// Its name.
        name: NodeName,
    },
    /// A damaged or changed thing was found and dealt with.
    Warning {
        /// One sentence.
        text: String,
    },
    /// The run is over.
    Finished(Outcome),
}

/// What came of a run, in nodes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Outcome {
    /// Ran to the end.
    pub run: usize,
    /// Taken from the store.
    pub cached: usize,
    /// Failed.
    pub failed: usize,
    /// Not run because an input failed.
    pub blocked: usize,
    /// Saved and stopped, or never begun, because of an interrupt.
    pub interrupted: usize,
    /// Never begun, because the run stopped after so many failures.
    #[serde(default)]
    pub skipped: usize,
    /// Wall seconds of the whole run.
    pub seconds: f64,
}
