//! Collecting what nobody needs: first a plan that changes nothing, then its removal, beside running runs.
//!
//! What is in danger, and what keeps it safe:
//!
//! | in danger                                             | safe because |
//! |-------------------------------------------------------|--------------|
//! | a result that a run has found and will read hours later | the run leased its key before it looked (`lease.rs`); leases are read again just before each removal |
//! | an input of a stage that computes now, also in a worker that has outlived its driver | the attempt leases its inputs, results and objects, in its own process before it verifies them |
//! | an object that a publisher found there already, before its own manifest names it | whoever publishes, accepts or imports leases the object before it looks whether it is there; an object goes only while the collector has `locks/store` alone, after every lease and every manifest that is there *then* has been read |
//! | a result that is made again under the same key         | its manifest goes only under the key's own lock, which the maker holds; keys that are locked are left |
//! | a reader who comes between two removals                | the manifest goes first, durably, so what a kill leaves is objects of no result: garbage for the next collection |
//! | a folder that is half removed                          | it is renamed into `trash/` first, whole, and taken apart there |
//!
//! The collector has the store alone for some thousand renames at a time and lets others in between, so nobody waits for
//! longer than a moment, and a run of a week stops no collection. Whoever takes a lease has the store's lock shared for as
//! long as that takes, and hashes nothing meanwhile.
//!
//! A plan is only a proposal: between it and the removal hours may pass in front of a question. So everything is asked again
//! on removal, and what is leased, pinned, used, locked or named by a new manifest since then stays.

mod choose;
mod garbage;
mod survey;
mod sweep;

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;
use std::time::Duration;

use jiff::Timestamp;
use serde::Serialize;

use super::{Digest, Store, StoreError};

/// Which results may go, and which must stay. The default lets every result stay.
#[derive(Clone, Debug, Default)]
pub struct GcPolicy {
    /// Results that were last used longer ago than this go.
    pub older_than: Option<Duration>,
    /// The results used least recently go until the store has at most this many bytes.
    pub max_size: Option<u64>,
    /// The newest results of every stage of every trial stay; given alone, the others go.
    pub keep_last: Option<usize>,
    /// Results that stay.
    pub roots: BTreeSet<Digest>,
    /// What a result that stays was made from stays as well.
    pub keep_inputs: bool,
}

/// Why a result stays.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Kept {
    /// A run that is at work rests on it.
    InUse,
    /// It is pinned.
    Pinned,
    /// The experiments that were named need it.
    Needed,
    /// It is one of the newest of its stage.
    Newest,
    /// A result that stays was made from it.
    Input,
    /// No rule wants it gone.
    NoRule,
}

/// Why a result goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Gone {
    /// It was last used too long ago.
    Old,
    /// Newer results of its stage stand in its place.
    Superseded,
    /// The store is too large, and others were used more recently.
    Size,
}

/// A result that goes.
#[derive(Clone, Debug, Serialize)]
pub struct Removal {
    /// Its key.
    pub key: Digest,
    /// Its kind.
    pub kind: String,
    /// `EXPERIMENT[/TRIAL]/STAGE` of one of its names; empty where none is recorded.
    pub name: String,
    /// When it was last used.
    pub last_used: Timestamp,
    /// The bytes of its objects, shared or not, and of its logs.
    pub bytes: u64,
    /// Why.
    pub why: Gone,
}

/// What lies in the store and is of no use.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum GarbageKind {
    /// An object of no result.
    Object,
    /// The work folder of a stage that has its result.
    FinishedWork,
    /// What a killed attempt had written.
    KilledAttempt,
    /// What a failed attempt had written, after some time.
    FailedAttempt,
    /// Saved work that nobody went on with for as long as results are kept.
    OldWork,
    /// An import that was killed.
    Import,
    /// Logs of a result that is gone.
    Logs,
    /// Damaged files, after some time.
    Quarantine,
    /// A link to curves that are gone.
    Link,
    /// A file that was half written.
    Temporary,
    /// What an earlier collection left.
    Trash,
}

/// A piece of garbage.
#[derive(Clone, Debug, Serialize)]
pub struct Garbage {
    /// What it is.
    pub kind: GarbageKind,
    /// Where.
    pub path: PathBuf,
    /// How large.
    pub bytes: u64,
    /// The key whose lock guards it.
    #[serde(skip)]
    key: Option<Digest>,
}

/// How many, and how large together.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Tally {
    /// How many.
    pub count: usize,
    /// Bytes, with what is shared counted each time.
    pub bytes: u64,
}

impl Tally {
    fn add(&mut self, bytes: u64) {
        self.count += 1;
        self.bytes += bytes;
    }
}

/// What a collection would do.
#[derive(Clone, Debug, Default, Serialize)]
pub struct GcPlan {
    /// Results that go, least recently used first.
    pub results: Vec<Removal>,
    /// Why the others stay.
    pub kept: BTreeMap<Kept, Tally>,
    /// What goes besides; objects of results that go are not in it.
    pub garbage: Vec<Garbage>,
    /// Bytes of all results and garbage now.
    pub size: u64,
    /// Bytes of them that go.
    pub freed: u64,
    /// Bytes by which the store stays above the size asked for.
    pub over: u64,
    /// Results that go and that results which stay were made from: those stay whole, but making them again needs these.
    pub inputs_of_kept: usize,
    /// Manifests that cannot be read: `pipe verify --repair` deals with them.
    pub unreadable: usize,
    /// The age of garbage that the policy gave.
    #[serde(skip)]
    older_than: Option<Duration>,
}

impl GcPlan {
    /// Whether there is nothing to do.
    pub fn is_empty(&self) -> bool {
        self.results.is_empty() && self.garbage.is_empty()
    }
}

/// What a collection has done.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct GcReport {
    /// Results removed.
    pub results: usize,
    /// Objects removed.
    pub objects: usize,
    /// Other things removed.
    pub garbage: usize,
    /// Bytes freed.
    pub freed: u64,
    /// What stayed because a process works on it or has begun to use it since the plan.
    pub busy: usize,
}

impl Store {
    /// What a collection under `policy` would do now. Nothing is changed. `progress` is told manifests read and in all.
    pub fn plan_gc(&self, policy: &GcPolicy, progress: &(dyn Fn(usize, usize) + Sync)) -> Result<GcPlan, StoreError> {
        let now = Timestamp::now();
        let survey = self.survey(progress)?;
        let leased = self.leased()?;
        let pinned = self.pinned()?;
        let mut plan = choose::choose(&survey, policy, &leased, &pinned, now);
        let garbage = self.garbage(&survey, &leased, policy.older_than, now)?;
        plan.size += garbage.iter().map(|one| one.bytes).sum::<u64>();
        plan.freed += garbage.iter().map(|one| one.bytes).sum::<u64>();
        plan.garbage = garbage;
        plan.older_than = policy.older_than;
        plan.unreadable = survey.unreadable;
        Ok(plan)
    }
}
