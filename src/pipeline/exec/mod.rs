//! Running a plan: a pure scheduler, backends that start stages, and one closed stream of events to everyone else.

pub mod attempt;
mod committer;
pub mod device;
mod driver;
pub mod event;
mod failure;
mod left;
mod local;
pub mod machine;
mod numerics;
mod request;
pub mod scheduler;
pub mod select;
pub mod slots;
pub mod throttle;
pub mod worker;
mod workload;

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

pub use driver::execute;
pub use local::{run_worker, worker_output};

/// How to run a plan; nothing of it changes a result.
#[derive(Clone, Debug, Default)]
pub struct Options {
    /// Stages at once, at most; 0 is as many as cores.
    pub jobs: usize,
    /// Once so many stages have failed nothing new begins, and what runs goes on to its end; `None` runs whatever does not
    /// rest on a failed stage.
    pub most_failures: Option<usize>,
    /// How much there is of each named slot; of one that is not named there is 1.
    pub slots: BTreeMap<String, usize>,
    /// Run only these stages (by name) and what they need; empty runs all.
    pub until: Vec<String>,
    /// Run these stages (by name) even where their result is cached.
    pub again: Vec<String>,
    /// Set by a signal: running stages save and stop.
    pub interrupt: Arc<AtomicBool>,
    /// Set by a second signal: workers are killed, and their stages go on later from what they saved last.
    pub kill: Arc<AtomicBool>,
}

/// Why a run as a whole did not come about, or broke off.
#[derive(Debug, thiserror::Error)]
pub enum ExecError {
    /// A name on the command line means no stage.
    #[error("no stage `{name}` for `{option}`; {hint}")]
    UnknownStage {
        /// The option.
        option: &'static str,
        /// The name.
        name: String,
        /// Names that there are.
        hint: String,
    },
    /// A stage asks for more of a named slot than there is.
    #[error("stage `{stage}` asks for {asked} of the slot `{slot}`, and there is {there}")]
    TooFewSlots {
        /// The stage's name.
        stage: String,
        /// The slot's name.
        slot: String,
        /// What the stage asks for.
        asked: usize,
        /// What there is.
        there: usize,
    },
    /// The worker program is not there.
    #[error("cannot open the worker program `{}`: {cause}; build it with `cargo build --workspace`", path.display())]
    NoWorker {
        /// Where it was looked for.
        path: PathBuf,
        /// What the system said.
        cause: std::io::Error,
    },
}
