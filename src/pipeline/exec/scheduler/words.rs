//! The words in which the scheduler is spoken to: what happened, what to do, where a node stands.

use crate::pipeline::exec::slots::{Grant, Need};
use crate::pipeline::store::Digest;

/// A node as the scheduler sees it.
#[derive(Clone, Debug, Default)]
pub struct Shape {
    /// The nodes whose results it needs; all of them have a smaller index.
    pub inputs: Vec<usize>,
    /// What it takes while it runs.
    pub need: Need,
    /// Of what could start, the smallest rank does; the node's index decides between equals.
    pub rank: u32,
    /// How often a failed attempt is followed by another.
    pub retries: u32,
    /// Whether this run wants it; its inputs must be wanted too.
    pub wanted: bool,
    /// Whether it runs even where its result is there.
    pub again: bool,
}

/// Something that happened.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Input {
    /// The run begins.
    Begin,
    /// The answer to [`Action::Find`].
    Found {
        /// The node.
        node: usize,
        /// Its key.
        key: Digest,
        /// Whether the store has the result.
        cached: bool,
    },
    /// A node that was to start, or has started, does not run: another process holds its key.
    Elsewhere(usize),
    /// The other process let go of the node's key.
    Freed(usize),
    /// A running node has ended well and its outputs can be used; they are being made durable.
    Prepared(usize),
    /// A node published its result.
    Done(usize),
    /// What a prepared or running node had made was lost before it was durable.
    Lost(usize),
    /// A running node found the result that another process had made meanwhile.
    Taken(usize),
    /// A node failed.
    Failed {
        /// The node.
        node: usize,
        /// Whether another attempt in this run would be in vain.
        lasting: bool,
    },
    /// The time has come for a node's next attempt.
    Due(usize),
    /// A running node saved its work and stopped.
    Interrupted(usize),
    /// A running node ended because the result of `producer`, one of its inputs, is damaged.
    Damaged {
        /// The node.
        node: usize,
        /// The input's node.
        producer: usize,
    },
    /// The user wants the run to stop.
    Interrupt,
}

/// Something to do.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Action {
    /// Work out the node's key, look for its result, answer with [`Input::Found`].
    Find(usize),
    /// Start the node.
    Start(usize, Grant),
    /// Ask the running node to save and stop.
    Stop(usize),
    /// Say that the node's result was in the store.
    Cached(usize),
    /// The node takes the result that the other node (of the same key) has just made.
    Share(usize, usize),
    /// Say that the node failed.
    Fail(usize),
    /// The node fails because the other node (of the same key) did.
    FailLike(usize, usize),
    /// The node is about to fail because its result, or its input, was rebuilt too often.
    GiveUp(usize),
    /// The node failed and is tried again for the second number's time: after a while, answer with [`Input::Due`].
    Retry(usize, u32),
    /// Say that the node waits for another process.
    Waits(usize),
    /// Say that the node cannot run.
    Blocked(usize),
}

/// Where a node stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Phase {
    /// Not part of this run.
    Unwanted,
    /// An input is not there yet.
    Pending,
    /// Its key is being worked out.
    Finding,
    /// It waits for the node of the same key.
    Follows(usize),
    /// It waits for another process.
    Elsewhere,
    /// It failed and waits for its next attempt.
    Retrying,
    /// It waits for its share of the machine.
    Queued,
    /// It runs.
    Running,
    /// It has run; its outputs can be used, and are being made durable.
    Prepared,
    /// Its result was there.
    Cached,
    /// It has run.
    Done,
    /// It failed.
    Failed,
    /// An input failed.
    Blocked,
    /// Saved and stopped, or never begun, because of an interrupt.
    Interrupted,
    /// Never begun, because the run stops after so many failures.
    Skipped,
}

impl Phase {
    /// Whether its result can be used.
    pub fn is_ok(self) -> bool {
        matches!(self, Self::Cached | Self::Done)
    }

    /// Whether it is neither running nor at its end.
    pub(super) fn waits(self) -> bool {
        matches!(
            self,
            Self::Pending | Self::Finding | Self::Follows(_) | Self::Elsewhere | Self::Retrying | Self::Queued
        )
    }
}
