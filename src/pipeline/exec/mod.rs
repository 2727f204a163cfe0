//! Running a plan: a pure scheduler, backends that start stages, and one closed stream of events to everyone else.

pub mod attempt;
pub mod event;
pub mod scheduler;
pub mod slots;

use std::sync::Arc;
use std::sync::atomic::AtomicBool;

/// How to run a plan; nothing of it changes a result.
#[derive(Clone, Debug, Default)]
pub struct Options {
    /// Stages at once, at most; 0 is as many as cores.
    pub jobs: usize,
    /// Run what does not rest on a failed stage instead of stopping at the first failure.
    pub keep_going: bool,
    /// Run only these stages (by name) and what they need; empty runs all.
    pub until: Vec<String>,
    /// Run these stages (by name) even where their result is cached.
    pub again: Vec<String>,
    /// Set by a signal: running stages save and stop.
    pub interrupt: Arc<AtomicBool>,
}
