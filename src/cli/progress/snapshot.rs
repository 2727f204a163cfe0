//! A run at a moment: what its screen shows, and what other terminals read of it.

use serde::{Deserialize, Serialize};

use crate::pipeline::exec::event::Outcome;
use crate::pipeline::store::{Digest, Published, Reached};

/// A run at a moment. Moments are seconds since 1970.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Snapshot {
    /// The number of its process.
    pub process: u32,
    /// Its machine.
    pub host: String,
    /// The experiments that it runs.
    pub experiments: Vec<String>,
    /// When it began.
    pub begun: f64,
    /// The moment.
    pub at: f64,
    /// Whether trials wait for what it finds.
    pub tunes: bool,
    /// Stages in all.
    pub stages: usize,
    /// Stages that are done, cached, failed or blocked.
    pub settled: usize,
    /// What came of stages so far.
    pub counts: Outcome,
    /// How long it still takes, where something is known of that.
    pub left: Option<Left>,
    /// The stages that run, in the order of the plan.
    pub running: Vec<RunningStage>,
    /// What has not begun, by the stage's name.
    pub waiting: Vec<WaitingStages>,
    /// The stages that failed, in the order in which they did; the first ones where there are many.
    pub failures: Vec<FailedStage>,
    /// Whether the run is over.
    pub is_over: bool,
}

/// How long something still takes.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Left {
    /// Seconds.
    pub seconds: f64,
    /// Seconds of it that are not of stages that run, and do not pass while these do.
    pub rest: f64,
    /// Whether there are stages of which no time is known.
    pub is_least: bool,
}

/// A stage that runs.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct RunningStage {
    /// Its name, short where there is one experiment.
    pub label: String,
    /// Its names as `EXPERIMENT[/TRIAL]/STAGE`; the first ones where there are many.
    pub names: Vec<String>,
    /// Its kind.
    pub kind: String,
    /// Its key.
    pub key: Digest,
    /// When it began.
    pub began: f64,
    /// Where it took up again what an earlier run had saved.
    pub resumed: Option<u64>,
    /// How far it is.
    pub reached: Option<Reached>,
    /// Units a second, over the last half minute.
    pub rate: Option<f64>,
    /// Seconds that it still takes at this rate.
    pub left: Option<f64>,
    /// The metrics that people look for first, and their newest values.
    pub metrics: Vec<(String, f64)>,
    /// How one of them has moved.
    pub trace: Option<Trace>,
}

/// How a metric has moved since the stage began, as the means of stretches of equal length.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Trace {
    /// The metric.
    pub name: String,
    /// The means.
    pub points: Vec<f64>,
}

/// Stages of one name that have not begun.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct WaitingStages {
    /// The name.
    pub stage: String,
    /// How many there are.
    pub count: usize,
    /// How many of them have all their inputs, and wait for a free place.
    pub ready: usize,
    /// How many of them another process is working on.
    pub elsewhere: usize,
    /// The names of stages that the others wait for.
    pub inputs: Vec<String>,
}

/// A stage that failed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FailedStage {
    /// `EXPERIMENT[/TRIAL]/STAGE`.
    pub name: String,
    /// The first line of its error.
    pub error: String,
    /// Its log file; empty where it said nothing.
    pub log: String,
}

/// How a run that another process has published stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Standing {
    /// It runs.
    Running,
    /// It came to its end.
    Ended,
    /// Its process is gone, and it did not come to its end.
    Died,
    /// It runs or ran on another machine, of which nothing is known here.
    Unknown,
}

impl Snapshot {
    /// What a process has published, and how it stands; `None` where that is of another version of this program.
    ///
    /// The lock of a process on another machine may not be seen here, so its silence proves nothing.
    pub fn read(published: &Published, host: &str) -> Option<(Self, Standing)> {
        let snapshot: Self = serde_json::from_slice(&published.bytes).ok()?;
        let standing = match (published.is_living, snapshot.is_over) {
            (_, true) => Standing::Ended,
            (true, false) => Standing::Running,
            (false, false) if snapshot.host == host => Standing::Died,
            (false, false) => Standing::Unknown,
        };
        Some((snapshot, standing))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_run_that_was_killed_is_never_shown_as_running() {
        let read = |is_living: bool, is_over: bool, host: &str| {
            let snapshot = Snapshot { host: host.to_owned(), is_over, ..Snapshot::default() };
            let bytes = serde_json::to_vec(&snapshot).unwrap();
            Snapshot::read(&Published { is_living, bytes }, "here").unwrap().1
        };
        assert_eq!(read(true, false, "here"), Standing::Running);
        assert_eq!(read(false, false, "here"), Standing::Died);
        assert_eq!(read(false, false, "there"), Standing::Unknown);
        assert_eq!(read(false, true, "there"), Standing::Ended);
        assert_eq!(read(true, true, "here"), Standing::Ended, "it is about to end");
        assert!(Snapshot::read(&Published { is_living: true, bytes: b"{}".to_vec() }, "here").is_none());
    }
}
