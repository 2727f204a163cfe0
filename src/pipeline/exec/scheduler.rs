//! The scheduler: what happened goes in, what to do comes out. No thread, no clock, no file: every order of events can
//! be tested.
//!
//! ```text
//! pending -> finding -> ok | follows (same key here) | elsewhere (same key in another process) | queued -> running
//! running -> prepared -> ok | retrying -> queued | failed | interrupted
//! and, without having run: blocked | skipped | interrupted
//! ```
//! Only `running` holds a share of the machine. What rests on a node begins when it is prepared: nobody waits for a disk. It never knows what a key is made of: whoever performs
//! [`Action::Find`] says which key a node has and whether its result is there.

mod setbacks;
mod words;

pub use words::{Action, Input, Phase, Shape};

use std::collections::{BTreeSet, HashMap};

use crate::pipeline::exec::slots::{Grant, Limits, Slots};
use crate::pipeline::store::Digest;

/// How often a result is made again because a consumer found it damaged. More than this means a broken disk.
pub const REBUILDS: u32 = 2;

/// How many results may wait to be made durable before nothing new starts: each holds the lock of its key open.
pub const MOST_PREPARED: usize = 256;

/// How the run ends before everything is done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Ending {
    Failure,
    Interrupt,
}

#[derive(Debug)]
struct Node {
    shape: Shape,
    consumers: Vec<usize>,
    phase: Phase,
    /// How many of its inputs are not there.
    missing: usize,
    key: Option<Digest>,
    grant: Option<Grant>,
    rebuilds: u32,
    /// Whether it proved damaged before it was durable, so that it is made again once it is.
    spoiled: bool,
}

/// The state of a run.
#[derive(Debug)]
pub struct Scheduler {
    nodes: Vec<Node>,
    slots: Slots,
    /// After so many failures nothing new begins.
    most_failures: Option<usize>,
    failed: usize,
    ending: Option<Ending>,
    /// The node that works on a key, and those that wait for it.
    leaders: HashMap<Digest, (usize, Vec<usize>)>,
    /// Keys whose result was made in this run.
    made: HashMap<Digest, usize>,
    /// Keys that failed in this run: what failed once would fail again.
    failures: HashMap<Digest, usize>,
    /// How often a key was tried again.
    retried: HashMap<Digest, u32>,
    /// Nodes whose keys are being worked out. Nothing behind them in rank starts meanwhile, or the next stage of one trial
    /// would always come too late to go before the first of another.
    finding: BTreeSet<(u32, usize)>,
    /// Nodes in finding, elsewhere, retrying, queued, running or prepared: when there are none, the run is over.
    active: usize,
    running: BTreeSet<usize>,
    /// Nodes whose results are being made durable.
    prepared: BTreeSet<usize>,
}

impl Scheduler {
    /// A run of `shapes` within `limits`, in which nothing new begins after `most_failures`.
    pub fn new(shapes: Vec<Shape>, limits: Limits, most_failures: Option<usize>) -> Self {
        let mut nodes: Vec<Node> = Vec::with_capacity(shapes.len());
        for (index, mut shape) in shapes.into_iter().enumerate() {
            shape.inputs.sort_unstable();
            shape.inputs.dedup();
            for &input in &shape.inputs {
                nodes[input].consumers.push(index);
            }
            let phase = if shape.wanted { Phase::Pending } else { Phase::Unwanted };
            let missing = shape.inputs.len();
            let (consumers, key, grant) = (Vec::new(), None, None);
            nodes.push(Node { shape, consumers, phase, missing, key, grant, rebuilds: 0, spoiled: false });
        }
        // What is found first starts first where there is room, so that nodes are found in the order of their ranks.
        let ranks: Vec<u32> = nodes.iter().map(|node| node.shape.rank).collect();
        for node in &mut nodes {
            node.consumers.sort_by_key(|consumer| ranks[*consumer]);
        }
        Self {
            nodes,
            slots: Slots::new(limits),
            most_failures,
            failed: 0,
            ending: None,
            leaders: HashMap::new(),
            made: HashMap::new(),
            failures: HashMap::new(),
            retried: HashMap::new(),
            finding: BTreeSet::new(),
            active: 0,
            running: BTreeSet::new(),
            prepared: BTreeSet::new(),
        }
    }

    /// Where the node stands.
    pub fn phase(&self, node: usize) -> Phase {
        self.nodes[node].phase
    }

    /// Whether nothing more will happen.
    pub fn is_finished(&self) -> bool {
        self.active == 0
    }

    /// Takes in what happened; says what to do.
    pub fn on(&mut self, input: Input) -> Vec<Action> {
        let mut actions = Vec::new();
        match input {
            Input::Begin => {
                let mut order: Vec<usize> = (0..self.nodes.len()).collect();
                order.sort_by_key(|node| self.nodes[*node].shape.rank);
                for node in order {
                    self.find_if_ready(node, &mut actions);
                }
            }
            Input::Found { node, key, cached } => self.found(node, key, cached, &mut actions),
            Input::Elsewhere(node) => self.elsewhere(node, &mut actions),
            Input::Freed(node) => {
                if self.nodes[node].phase == Phase::Elsewhere {
                    self.step_back(node, &mut actions);
                    self.wait_again(node, &mut actions);
                }
            }
            Input::Prepared(node) => {
                self.release(node);
                self.running.remove(&node);
                self.prepared.insert(node);
                self.settle_ok(node, Phase::Prepared, &mut actions);
            }
            Input::Lost(node) => self.lost(node, &mut actions),
            Input::Done(node) => self.done(node, Phase::Done, &mut actions),
            Input::Taken(node) => self.done(node, Phase::Cached, &mut actions),
            Input::Failed { node, lasting } => self.failed(node, lasting, &mut actions),
            Input::Due(node) => {
                if self.nodes[node].phase == Phase::Retrying {
                    self.queue(node);
                }
            }
            Input::Interrupted(node) => self.interrupted(node),
            Input::Damaged { node, producer } => self.damaged(node, producer, &mut actions),
            Input::Interrupt => self.interrupt(&mut actions),
        }
        if self.ending.is_none() {
            while self.prepared.len() < MOST_PREPARED
                && let Some((node, grant)) = self.slots.start_next(self.finding.first().copied())
            {
                self.nodes[node].phase = Phase::Running;
                self.nodes[node].grant = Some(grant);
                self.running.insert(node);
                actions.push(Action::Start(node, grant));
            }
        }
        actions
    }

    fn find_if_ready(&mut self, node: usize, actions: &mut Vec<Action>) {
        let state = &mut self.nodes[node];
        if self.ending.is_none() && state.phase == Phase::Pending && state.missing == 0 {
            state.phase = Phase::Finding;
            self.finding.insert((state.shape.rank, node));
            self.active += 1;
            actions.push(Action::Find(node));
        }
    }

    fn found(&mut self, node: usize, key: Digest, cached: bool, actions: &mut Vec<Action>) {
        if self.nodes[node].phase != Phase::Finding {
            return;
        }
        self.leave_finding(node);
        self.nodes[node].key = Some(key.clone());
        if let Some((leader, followers)) = self.leaders.get_mut(&key) {
            // After a rebuild of its input a node finds the key that it already waits for.
            if !followers.contains(&node) {
                followers.push(node);
            }
            self.nodes[node].phase = Phase::Follows(*leader);
            self.active -= 1;
        } else if let Some(&maker) = self.made.get(&key).filter(|maker| **maker != node) {
            self.active -= 1;
            actions.push(Action::Share(node, maker));
            self.settle_ok(node, Phase::Cached, actions);
        } else if cached && !self.nodes[node].shape.again {
            self.active -= 1;
            actions.push(Action::Cached(node));
            self.settle_ok(node, Phase::Cached, actions);
        } else if let Some(&other) = self.failures.get(&key).filter(|other| **other != node) {
            self.active -= 1;
            self.nodes[node].phase = Phase::Failed;
            actions.push(Action::FailLike(node, other));
            self.close_consumers(vec![node], Phase::Blocked, actions);
        } else {
            self.leaders.insert(key, (node, Vec::new()));
            self.queue(node);
        }
    }

    fn leave_finding(&mut self, node: usize) {
        self.finding.remove(&(self.nodes[node].shape.rank, node));
    }

    fn queue(&mut self, node: usize) {
        let state = &mut self.nodes[node];
        state.phase = Phase::Queued;
        self.slots.push(node, state.shape.rank, &state.shape.need);
    }

    fn leave_queue(&mut self, node: usize) {
        let shape = &self.nodes[node].shape;
        self.slots.remove(node, shape.rank, &shape.need);
    }

    fn settle_ok(&mut self, node: usize, phase: Phase, actions: &mut Vec<Action>) {
        self.nodes[node].phase = phase;
        for position in 0..self.nodes[node].consumers.len() {
            let consumer = self.nodes[node].consumers[position];
            self.nodes[consumer].missing -= 1;
            self.find_if_ready(consumer, actions);
        }
    }

    fn release(&mut self, node: usize) {
        if let Some(grant) = self.nodes[node].grant.take() {
            self.slots.release(grant, &self.nodes[node].shape.need);
        }
    }

    fn leave_running(&mut self, node: usize) {
        self.release(node);
        self.running.remove(&node);
        self.prepared.remove(&node);
        self.active -= 1;
    }

    fn elsewhere(&mut self, node: usize, actions: &mut Vec<Action>) {
        self.release(node);
        self.running.remove(&node);
        match self.ending {
            None => {
                self.nodes[node].phase = Phase::Elsewhere;
                actions.push(Action::Waits(node));
            }
            Some(ending) => {
                self.active -= 1;
                for follower in self.take_followers(node) {
                    self.close(follower, ending);
                }
                self.close(node, ending);
            }
        }
    }

    fn done(&mut self, node: usize, phase: Phase, actions: &mut Vec<Action>) {
        self.leave_running(node);
        // Forced once is enough: a rebuild after damage is decided by what the store has.
        self.nodes[node].shape.again = false;
        if std::mem::take(&mut self.nodes[node].spoiled) {
            return self.make_again(node, actions);
        }
        let key = self.nodes[node].key.clone();
        let followers = self.take_followers(node);
        if let Some(key) = key {
            self.made.insert(key, node);
        }
        if self.nodes[node].phase == Phase::Prepared {
            self.nodes[node].phase = phase;
        } else {
            self.settle_ok(node, phase, actions);
        }
        for follower in followers {
            actions.push(Action::Share(follower, node));
            self.settle_ok(follower, Phase::Cached, actions);
        }
    }

    /// Ends the node's leadership; gives those that still wait for it.
    fn take_followers(&mut self, node: usize) -> Vec<usize> {
        let key = self.nodes[node].key.as_ref();
        let Some(key) = key.filter(|key| self.leaders.get(*key).is_some_and(|(leader, _)| *leader == node)) else {
            return Vec::new();
        };
        let (_, mut followers) = self.leaders.remove(key).unwrap_or_default();
        followers.retain(|follower| self.nodes[*follower].phase == Phase::Follows(node));
        followers
    }

    fn interrupted(&mut self, node: usize) {
        self.leave_running(node);
        let followers = self.take_followers(node);
        for &node in std::iter::once(&node).chain(&followers) {
            self.nodes[node].phase = Phase::Interrupted;
        }
        let roots = std::iter::once(node).chain(followers);
        self.close_consumers(roots.collect(), Phase::Interrupted, &mut Vec::new());
    }

    fn interrupt(&mut self, actions: &mut Vec<Action>) {
        if self.ending == Some(Ending::Interrupt) {
            return;
        }
        self.end(Ending::Interrupt, actions);
        actions.extend(self.running.iter().map(|node| Action::Stop(*node)));
    }

    /// From here on nothing starts: whatever has not begun is closed, unless the node it follows has. Where failures
    /// end the run, what waits for another attempt has failed; where the user does, the next run goes on with it.
    fn end(&mut self, ending: Ending, actions: &mut Vec<Action>) {
        self.ending = Some(ending);
        self.finding.clear();
        if ending == Ending::Failure {
            for node in 0..self.nodes.len() {
                if self.nodes[node].phase == Phase::Retrying {
                    self.active -= 1;
                    self.give_up(node, actions);
                }
            }
        }
        for node in 0..self.nodes.len() {
            let phase = self.nodes[node].phase;
            if let Phase::Follows(leader) = phase
                && matches!(self.nodes[leader].phase, Phase::Running | Phase::Prepared)
            {
                continue;
            }
            if phase.waits() {
                if phase == Phase::Queued {
                    self.leave_queue(node);
                }
                if matches!(phase, Phase::Finding | Phase::Elsewhere | Phase::Retrying | Phase::Queued) {
                    self.active -= 1;
                }
                self.close(node, ending);
            }
        }
    }

    fn close(&mut self, node: usize, ending: Ending) {
        self.nodes[node].phase = match ending {
            Ending::Failure => Phase::Skipped,
            Ending::Interrupt => Phase::Interrupted,
        };
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use proptest::prelude::*;

    use super::*;
    use crate::pipeline::exec::slots::{Gpu, Need};

    const LIMITS: Limits = Limits { cpus: 3, gpus: 2, jobs: 3, memory: 10, named: Vec::new() };

    fn shape(inputs: &[usize]) -> Shape {
        Shape { inputs: inputs.to_vec(), wanted: true, ..Shape::default() }
    }

    fn limits(cpus: usize) -> Limits {
        Limits { cpus, jobs: cpus, ..Limits::default() }
    }

    fn failed(node: usize) -> Input {
        Input::Failed { node, lasting: false }
    }

    fn key(text: &str) -> Digest {
        Digest(text.to_owned())
    }

    fn found(node: usize, text: &str, cached: bool) -> Input {
        Input::Found { node, key: key(text), cached }
    }

    const ONE: Grant = Grant { cpus: 1, gpu: None };

    #[test]
    fn a_chain_runs_in_order_and_ends() {
        let mut scheduler = Scheduler::new(vec![shape(&[]), shape(&[0])], LIMITS, Some(1));
        assert_eq!(scheduler.on(Input::Begin), [Action::Find(0)]);
        assert_eq!(scheduler.on(found(0, "a", false)), [Action::Start(0, ONE)]);
        assert_eq!(scheduler.on(Input::Done(0)), [Action::Find(1)]);
        assert_eq!(scheduler.on(found(1, "b", true)), [Action::Cached(1)]);
        assert!(scheduler.is_finished());
    }

    #[test]
    fn nodes_that_meet_in_a_key_run_once() {
        let mut scheduler = Scheduler::new(vec![shape(&[]), shape(&[]), shape(&[1])], LIMITS, Some(1));
        scheduler.on(Input::Begin);
        scheduler.on(found(0, "same", false));
        assert_eq!(scheduler.on(found(1, "same", false)), []);
        assert_eq!(scheduler.phase(1), Phase::Follows(0));
        assert_eq!(scheduler.on(Input::Done(0)), [Action::Share(1, 0), Action::Find(2)]);
    }

    #[test]
    fn the_follower_of_a_failure_fails_too_and_its_consumers_are_blocked() {
        let mut scheduler = Scheduler::new(vec![shape(&[]), shape(&[]), shape(&[1])], LIMITS, None);
        scheduler.on(Input::Begin);
        scheduler.on(found(0, "same", false));
        scheduler.on(found(1, "same", false));
        assert_eq!(scheduler.on(failed(0)), [Action::Fail(0), Action::FailLike(1, 0), Action::Blocked(2)]);
        assert!(scheduler.is_finished());
    }

    #[test]
    fn a_first_failure_stops_starts_but_running_nodes_end_normally() {
        let shapes = vec![shape(&[]), shape(&[]), shape(&[]), shape(&[1])];
        let mut scheduler = Scheduler::new(shapes, limits(2), Some(1));
        scheduler.on(Input::Begin);
        for (node, text) in ["a", "b", "c"].iter().enumerate() {
            scheduler.on(found(node, text, false));
        }
        assert_eq!(scheduler.on(failed(0)), [Action::Fail(0)]);
        assert!(!scheduler.is_finished());
        assert_eq!(scheduler.on(Input::Done(1)), []);
        assert!(scheduler.is_finished());
        assert_eq!(
            [0, 1, 2, 3].map(|node| scheduler.phase(node)),
            [Phase::Failed, Phase::Done, Phase::Skipped, Phase::Skipped]
        );
    }

    #[test]
    fn a_key_that_cannot_be_worked_out_after_the_end_changes_nothing() {
        for most_failures in [Some(1), None] {
            let mut scheduler = Scheduler::new(vec![shape(&[]), shape(&[]), shape(&[])], LIMITS, most_failures);
            scheduler.on(Input::Begin);
            scheduler.on(found(0, "a", false));
            let (end, closed) = match most_failures {
                Some(_) => (Input::Failed { node: 1, lasting: true }, Phase::Skipped),
                None => (Input::Interrupt, Phase::Interrupted),
            };
            scheduler.on(end);
            assert_eq!(scheduler.on(Input::Failed { node: 2, lasting: true }), []);
            assert!(!scheduler.is_finished(), "the first still runs");
            scheduler.on(Input::Done(0));
            assert!(scheduler.is_finished());
            assert_eq!(scheduler.phase(2), closed);
        }
    }

    #[test]
    fn an_interrupt_stops_what_runs_and_closes_the_rest() {
        let mut scheduler = Scheduler::new(vec![shape(&[]), shape(&[]), shape(&[0])], limits(1), None);
        scheduler.on(Input::Begin);
        scheduler.on(found(0, "a", false));
        scheduler.on(found(1, "b", false));
        assert_eq!(scheduler.on(Input::Interrupt), [Action::Stop(0)]);
        assert_eq!(scheduler.on(Input::Interrupt), []);
        assert_eq!(scheduler.on(Input::Interrupted(0)), []);
        assert!(scheduler.is_finished());
        assert!((0..3).all(|node| scheduler.phase(node) == Phase::Interrupted));
    }

    #[test]
    fn a_damaged_input_is_made_again_and_no_more_than_twice() {
        let mut scheduler = Scheduler::new(vec![shape(&[]), shape(&[0])], LIMITS, Some(1));
        scheduler.on(Input::Begin);
        assert_eq!(scheduler.on(found(0, "a", true)), [Action::Cached(0), Action::Find(1)]);
        for _ in 0..REBUILDS {
            assert_eq!(scheduler.on(found(1, "b", false)), [Action::Start(1, ONE)]);
            assert_eq!(scheduler.on(Input::Damaged { node: 1, producer: 0 }), [Action::Find(0)]);
            assert_eq!(scheduler.on(found(0, "a", false)), [Action::Start(0, ONE)]);
            assert_eq!(scheduler.on(Input::Done(0)), [Action::Find(1)]);
        }
        scheduler.on(found(1, "b", false));
        assert_eq!(scheduler.on(Input::Damaged { node: 1, producer: 0 }), [Action::GiveUp(1), Action::Fail(1)]);
        assert!(scheduler.is_finished());
        assert_eq!((scheduler.phase(0), scheduler.phase(1)), (Phase::Done, Phase::Failed));
    }

    #[test]
    fn what_is_prepared_lets_its_consumers_begin_and_takes_no_share() {
        let mut scheduler = Scheduler::new(vec![shape(&[]), shape(&[0]), shape(&[])], limits(1), Some(1));
        scheduler.on(Input::Begin);
        scheduler.on(found(0, "a", false));
        assert_eq!(scheduler.on(found(2, "a", false)), []);
        assert_eq!(scheduler.on(Input::Prepared(0)), [Action::Find(1)]);
        assert_eq!(scheduler.on(found(1, "b", false)), [Action::Start(1, ONE)]);
        assert_eq!(scheduler.phase(2), Phase::Follows(0), "it is told of what is durable");
        assert_eq!(scheduler.on(Input::Done(0)), [Action::Share(2, 0)]);
        scheduler.on(Input::Prepared(1));
        assert!(!scheduler.is_finished());
        scheduler.on(Input::Done(1));
        assert!(scheduler.is_finished());
    }

    #[test]
    fn what_could_not_be_made_durable_fails_and_what_has_begun_goes_on() {
        let shapes = vec![shape(&[]), shape(&[0]), Shape { rank: 1, ..shape(&[0]) }, shape(&[1])];
        let mut scheduler = Scheduler::new(shapes, limits(1), None);
        scheduler.on(Input::Begin);
        scheduler.on(found(0, "a", false));
        scheduler.on(Input::Prepared(0));
        assert_eq!(scheduler.on(found(1, "b", false)), [Action::Start(1, ONE)]);
        assert_eq!(scheduler.on(found(2, "c", false)), []);
        assert_eq!(scheduler.on(failed(0)), [Action::Fail(0), Action::Blocked(2)]);
        assert_eq!(scheduler.on(Input::Done(1)), [Action::Find(3)]);
        scheduler.on(found(3, "d", true));
        assert!(scheduler.is_finished());
        assert_eq!([0, 1].map(|node| scheduler.phase(node)), [Phase::Failed, Phase::Done]);
    }

    #[test]
    fn what_proves_damaged_before_it_is_durable_is_made_again_when_it_is() {
        let mut scheduler = Scheduler::new(vec![shape(&[]), shape(&[0])], LIMITS, None);
        scheduler.on(Input::Begin);
        scheduler.on(found(0, "a", false));
        scheduler.on(Input::Prepared(0));
        scheduler.on(found(1, "b", false));
        assert_eq!(scheduler.on(Input::Damaged { node: 1, producer: 0 }), []);
        assert_eq!(scheduler.on(Input::Done(0)), [Action::Find(0)]);
        assert_eq!(scheduler.on(found(0, "a", false)), [Action::Start(0, ONE)]);
        assert_eq!(scheduler.on(Input::Prepared(0)), [Action::Find(1)]);
        scheduler.on(found(1, "b", false));
        scheduler.on(Input::Done(1));
        scheduler.on(Input::Done(0));
        assert!(scheduler.is_finished());
        assert_eq!([0, 1].map(|node| scheduler.phase(node)), [Phase::Done, Phase::Done]);
    }

    #[test]
    fn damage_at_one_input_does_not_hide_that_another_has_failed() {
        let mut scheduler = Scheduler::new(vec![shape(&[]), shape(&[]), shape(&[0, 1])], LIMITS, None);
        scheduler.on(Input::Begin);
        scheduler.on(found(0, "a", true));
        scheduler.on(found(1, "b", false));
        scheduler.on(Input::Prepared(1));
        scheduler.on(found(2, "c", false));
        scheduler.on(failed(1));
        assert_eq!(scheduler.on(Input::Damaged { node: 2, producer: 0 }), [Action::Blocked(2), Action::Find(0)]);
        scheduler.on(found(0, "a", true));
        assert!(scheduler.is_finished());
        assert_eq!(scheduler.phase(2), Phase::Blocked);
    }

    #[test]
    fn what_is_lost_before_it_is_durable_is_made_again_and_no_more_than_twice() {
        for damaged in [false, true] {
            let mut scheduler = Scheduler::new(vec![shape(&[]), shape(&[0])], LIMITS, None);
            scheduler.on(Input::Begin);
            for _ in 0..REBUILDS {
                scheduler.on(found(0, "a", false));
                scheduler.on(Input::Prepared(0));
                scheduler.on(found(1, "b", false));
                if damaged {
                    assert_eq!(scheduler.on(Input::Damaged { node: 1, producer: 0 }), []);
                    assert_eq!(scheduler.on(failed(0)), [Action::Find(0)]);
                } else {
                    assert_eq!(scheduler.on(Input::Lost(0)), [Action::Find(0)]);
                    assert_eq!(scheduler.on(Input::Damaged { node: 1, producer: 0 }), []);
                }
            }
            scheduler.on(found(0, "a", false));
            scheduler.on(Input::Prepared(0));
            assert_eq!(scheduler.on(Input::Lost(0))[..2], [Action::GiveUp(0), Action::Fail(0)]);
        }
    }

    #[test]
    fn nothing_starts_while_too_much_waits_for_the_disk() {
        let mut scheduler = Scheduler::new(vec![shape(&[]); MOST_PREPARED + 2], limits(1), None);
        scheduler.on(Input::Begin);
        for node in 0..MOST_PREPARED + 2 {
            scheduler.on(found(node, &node.to_string(), false));
        }
        for node in 0..MOST_PREPARED - 1 {
            assert_eq!(scheduler.on(Input::Prepared(node)), [Action::Start(node + 1, ONE)]);
        }
        assert_eq!(scheduler.on(Input::Prepared(MOST_PREPARED - 1)), []);
        assert_eq!(scheduler.on(Input::Done(7)), [Action::Start(MOST_PREPARED, ONE)]);
    }

    #[test]
    fn an_interrupt_lets_what_is_prepared_become_durable() {
        let mut scheduler = Scheduler::new(vec![shape(&[]), shape(&[0]), shape(&[])], LIMITS, None);
        scheduler.on(Input::Begin);
        scheduler.on(found(0, "a", false));
        scheduler.on(found(2, "a", false));
        scheduler.on(Input::Prepared(0));
        assert_eq!(scheduler.on(Input::Interrupt), []);
        assert_eq!((scheduler.phase(1), scheduler.is_finished()), (Phase::Interrupted, false));
        assert_eq!(scheduler.on(Input::Done(0)), [Action::Share(2, 0)]);
        assert!(scheduler.is_finished());
        assert_eq!([0, 2].map(|node| scheduler.phase(node)), [Phase::Done, Phase::Cached]);
    }

    #[test]
    fn a_key_that_another_process_holds_takes_no_share() {
        let mut scheduler = Scheduler::new(vec![shape(&[]), shape(&[])], limits(1), None);
        scheduler.on(Input::Begin);
        assert_eq!(scheduler.on(found(0, "a", false)), [Action::Start(0, ONE)]);
        scheduler.on(found(1, "b", false));
        assert_eq!(scheduler.on(Input::Elsewhere(0)), [Action::Waits(0), Action::Start(1, ONE)]);
        assert_eq!(scheduler.on(Input::Elsewhere(1)), [Action::Waits(1)]);
        assert_eq!(scheduler.on(Input::Freed(0)), [Action::Find(0)]);
        assert_eq!(scheduler.on(found(0, "a", true)), [Action::Cached(0)]);
        assert_eq!(scheduler.on(Input::Freed(1)), [Action::Find(1)]);
        assert_eq!(scheduler.on(found(1, "b", false)), [Action::Start(1, ONE)], "the other process died");
        assert_eq!(scheduler.on(Input::Done(1)), []);
        assert!(scheduler.is_finished());
    }

    #[test]
    fn a_failed_attempt_is_repeated_after_a_while_and_holds_no_share() {
        let flaky = Shape { retries: 2, ..shape(&[]) };
        let shapes = vec![flaky, shape(&[]), shape(&[0])];
        let mut scheduler = Scheduler::new(shapes, limits(1), Some(1));
        scheduler.on(Input::Begin);
        scheduler.on(found(0, "a", false));
        scheduler.on(found(1, "b", false));
        assert_eq!(scheduler.on(failed(0)), [Action::Retry(0, 1), Action::Start(1, ONE)]);
        assert_eq!(scheduler.on(Input::Due(0)), [], "the only core is taken");
        assert_eq!(scheduler.on(Input::Done(1)), [Action::Start(0, ONE)]);
        assert_eq!(scheduler.on(failed(0)), [Action::Retry(0, 2)]);
        assert!(!scheduler.is_finished());
        assert_eq!(scheduler.on(Input::Due(0)), [Action::Start(0, ONE)]);
        assert_eq!(scheduler.on(failed(0)), [Action::Fail(0), Action::Blocked(2)]);
        assert!(scheduler.is_finished());
    }

    #[test]
    fn a_lasting_failure_is_not_repeated_and_damage_is_no_attempt() {
        let retrying = Shape { retries: 1, ..shape(&[0]) };
        let mut scheduler = Scheduler::new(vec![shape(&[]), retrying], LIMITS, None);
        scheduler.on(Input::Begin);
        scheduler.on(found(0, "a", true));
        scheduler.on(found(1, "b", false));
        assert_eq!(scheduler.on(Input::Damaged { node: 1, producer: 0 }), [Action::Find(0)]);
        scheduler.on(found(0, "a", false));
        scheduler.on(Input::Done(0));
        scheduler.on(found(1, "b", false));
        assert_eq!(scheduler.on(failed(1)), [Action::Retry(1, 1)]);
        scheduler.on(Input::Due(1));
        assert_eq!(scheduler.on(Input::Failed { node: 1, lasting: true }), [Action::Fail(1)]);
        assert!(scheduler.is_finished());
    }

    #[test]
    fn the_end_of_a_run_ends_the_wait_for_another_attempt() {
        for ends in [Input::Interrupt, failed(1)] {
            let shapes = vec![Shape { retries: 9, ..shape(&[]) }, shape(&[])];
            let mut scheduler = Scheduler::new(shapes, LIMITS, Some(1));
            scheduler.on(Input::Begin);
            scheduler.on(found(0, "a", false));
            scheduler.on(found(1, "b", false));
            scheduler.on(failed(0));
            let actions = scheduler.on(ends.clone());
            if ends == Input::Interrupt {
                assert_eq!(actions, [Action::Stop(1)]);
                scheduler.on(Input::Interrupted(1));
                assert_eq!(scheduler.phase(0), Phase::Interrupted);
            } else {
                assert_eq!(actions, [Action::Fail(1), Action::Fail(0)]);
                assert_eq!(scheduler.phase(0), Phase::Failed);
            }
            assert!(scheduler.is_finished());
            assert_eq!(scheduler.on(Input::Due(0)), []);
        }
    }

    #[test]
    fn nothing_new_begins_after_so_many_failures() {
        let mut scheduler = Scheduler::new(vec![shape(&[]), shape(&[]), shape(&[])], limits(1), Some(2));
        scheduler.on(Input::Begin);
        for (node, text) in ["a", "b", "c"].iter().enumerate() {
            scheduler.on(found(node, text, false));
        }
        assert_eq!(scheduler.on(failed(0)), [Action::Fail(0), Action::Start(1, ONE)]);
        assert_eq!(scheduler.on(failed(1)), [Action::Fail(1)]);
        assert!(scheduler.is_finished());
        assert_eq!(scheduler.phase(2), Phase::Skipped);
    }

    #[test]
    fn hundreds_of_thousands_of_nodes_take_a_moment() {
        let count = 350_000;
        let chain: Vec<Shape> = (0..count).map(|node| shape(&[node.max(1) - 1][..node.min(1)])).collect();
        let fan: Vec<Shape> = (0..count).map(|node| shape(&[0][..node.min(1)])).collect();
        for shapes in [chain, fan] {
            let began = std::time::Instant::now();
            let mut scheduler = Scheduler::new(shapes, LIMITS, Some(1));
            let mut work = scheduler.on(Input::Begin);
            while let Some(action) = work.pop() {
                match action {
                    Action::Find(node) => work.extend(scheduler.on(found(node, &node.to_string(), false))),
                    Action::Start(node, _) => work.extend(scheduler.on(Input::Done(node))),
                    other => panic!("{other:?}"),
                }
            }
            assert!(scheduler.is_finished() && (0..count).all(|node| scheduler.phase(node) == Phase::Done));
            // A second or so; a walk over all nodes for each would take minutes.
            assert!(began.elapsed().as_secs() < 60, "{:?}", began.elapsed());
        }
    }

    /// A made-up project: what each node is, and what the outside world will do.
    #[derive(Clone, Debug)]
    struct World {
        shapes: Vec<Shape>,
        /// Stands for a node's own parameters; nodes of one label and equal inputs meet in one key.
        labels: Vec<u8>,
        most_failures: Option<usize>,
        /// Damage and other processes take part.
        trouble: bool,
        interrupt_after: Option<usize>,
        choices: Vec<u16>,
    }

    fn hash(text: &str) -> u8 {
        blake3::hash(text.as_bytes()).as_bytes()[0]
    }

    impl World {
        fn key(&self, node: usize, outputs: &[Option<String>]) -> String {
            let inputs = self.shapes[node].inputs.iter();
            let inputs: Vec<&str> =
                inputs.map(|input| outputs[*input].as_deref().expect("the input is there")).collect();
            format!("{}({})", self.labels[node], inputs.join(","))
        }

        /// Odd labels give the same output whatever their inputs: the early cutoff.
        fn output(&self, node: usize, key: &str) -> String {
            if self.labels[node] % 2 == 1 { format!("constant{}", self.labels[node]) } else { format!("<{key}>") }
        }

        /// How many attempts at a key fail, and whether they say that others would be in vain.
        fn failures(key: &str) -> (u32, bool) {
            match hash(&format!("fails {key}")) {
                0..15 => (u32::MAX, false),
                15..30 => (u32::MAX, true),
                30..50 => (1, false),
                50..70 => (2, false),
                _ => (0, false),
            }
        }

        /// Whether the key comes out well in the end, and how many attempts that takes.
        fn attempts(&self, node: usize, key: &str) -> (bool, u32) {
            let (failures, lasting) = Self::failures(key);
            let attempts = if lasting { 1 } else { self.shapes[node].retries + 1 };
            (failures < attempts, attempts.min(failures.saturating_add(1)))
        }

        fn stored(key: &str) -> bool {
            hash(&format!("stored {key}")) < 80
        }

        /// The naive answer: one node after the other. Gives each node's end and how often each key ran.
        fn oracle(&self) -> (Vec<Phase>, HashMap<String, u32>) {
            let mut outputs = vec![None; self.shapes.len()];
            let mut ends = Vec::new();
            let mut ran = HashMap::new();
            for (node, shape) in self.shapes.iter().enumerate() {
                ends.push(if !shape.wanted {
                    Phase::Unwanted
                } else if shape.inputs.iter().any(|input| outputs[*input].is_none()) {
                    Phase::Blocked
                } else {
                    let key = self.key(node, &outputs);
                    let runs = shape.again || !Self::stored(&key);
                    let (well, attempts) = self.attempts(node, &key);
                    if well || !runs {
                        outputs[node] = Some(self.output(node, &key));
                    }
                    if runs {
                        ran.insert(key, attempts);
                    }
                    if well || !runs { Phase::Done } else { Phase::Failed }
                });
            }
            (ends, ran)
        }
    }

    fn worlds() -> impl Strategy<Value = World> {
        let node = (any::<u16>(), 0..6_u8, 0..5_usize, 0..4_usize, any::<bool>());
        let nodes = prop::collection::vec(node, 1..14);
        let choices = prop::collection::vec(any::<u16>(), 64);
        let most = prop::option::of(1..3_usize);
        (nodes, most, any::<bool>(), prop::option::weighted(0.3, 0..12_usize), choices).prop_map(
            |(nodes, most_failures, trouble, interrupt_after, choices)| {
                // Nodes that meet in a key are forced together: what runs for one of them would run for all.
                let forced = choices[0].to_le_bytes()[1] % 12;
                let labels: Vec<u8> = nodes.iter().map(|node| node.1).collect();
                let mut shapes: Vec<Shape> = Vec::new();
                for (index, (bits, label, cpus, gpu, wanted)) in nodes.into_iter().enumerate() {
                    let inputs = (0..index).filter(|input| bits & (bits >> 3) & (1 << input) != 0).collect();
                    let gpu = [Gpu::None, Gpu::Any, Gpu::Index(1), Gpu::Index(7)][gpu];
                    let (memory, named) = (u64::from(bits) % 13, vec![(0, usize::from(bits >> 8) % 3)]);
                    let need = Need { cpus, gpu, memory, named };
                    let (rank, retries) = (u32::from(bits) % 3, u32::from(label) % 3);
                    shapes.push(Shape { inputs, need, rank, retries, wanted, again: label == forced });
                }
                for node in (0..shapes.len()).rev().filter(|node| shapes[*node].wanted).collect::<Vec<_>>() {
                    let mut stack = vec![node];
                    while let Some(node) = stack.pop() {
                        shapes[node].wanted = true;
                        stack.extend(shapes[node].inputs.clone());
                    }
                }
                World { shapes, labels, most_failures, trouble, interrupt_after, choices }
            },
        )
    }

    /// Lets the scheduler run in the world; panics where it breaks a rule. Gives it back with how often each key ran.
    fn simulate(world: &World) -> (Scheduler, HashMap<String, u32>) {
        let count = world.shapes.len();
        let machine = Limits { named: vec![1], ..LIMITS };
        let mut scheduler = Scheduler::new(world.shapes.clone(), machine.clone(), world.most_failures);
        let mut outputs: Vec<Option<String>> = vec![None; count];
        let mut keys = vec![String::new(); count];
        let mut stored: HashSet<String> = HashSet::new();
        let mut lost: HashSet<String> = HashSet::new();
        let mut running: Vec<(usize, Grant)> = Vec::new();
        let mut prepared: Vec<usize> = Vec::new();
        let mut elsewhere: Vec<usize> = Vec::new();
        let mut retrying: Vec<usize> = Vec::new();
        let mut ran: HashMap<String, u32> = HashMap::new();
        let (mut may_start, mut interrupted, mut failures) = (true, false, 0);
        let mut steps = 0;
        let mut choices = world.choices.iter().cycle();
        let mut choose = |bound: usize| usize::from(*choices.next().expect("a cycle")) % bound;
        let mut inbox = std::collections::VecDeque::from([Input::Begin]);
        loop {
            while let Some(input) = inbox.pop_front() {
                for action in scheduler.on(input) {
                    match action {
                        Action::Find(node) => {
                            keys[node] = world.key(node, &outputs);
                            if world.trouble && choose(8) == 0 {
                                inbox.push_back(Input::Failed { node, lasting: true });
                                continue;
                            }
                            let text = &keys[node];
                            let cached = stored.contains(text) || World::stored(text) && !lost.contains(text);
                            inbox.push_back(Input::Found { node, key: key(text), cached });
                        }
                        Action::Start(node, grant) => {
                            assert!(may_start, "nothing starts after the end was called");
                            assert!(running.iter().all(|(other, _)| *other != node), "a node runs once at a time");
                            assert!(running.iter().all(|(other, _)| keys[*other] != keys[node]), "so does a key");
                            assert!(
                                prepared.iter().all(|other| keys[*other] != keys[node]),
                                "which is held to the end"
                            );
                            if world.trouble && choose(4) == 0 {
                                elsewhere.push(node);
                                inbox.push_back(Input::Elsewhere(node));
                                continue;
                            }
                            running.push((node, grant));
                            let grants: Vec<Grant> = running.iter().map(|(_, grant)| *grant).collect();
                            let needs = || running.iter().map(|(node, _)| &world.shapes[*node].need);
                            assert!(needs().map(|need| need.memory.min(machine.memory)).sum::<u64>() <= machine.memory);
                            assert!(needs().map(|need| need.named[0].1.min(1)).sum::<usize>() <= machine.named[0]);
                            assert!(grants.iter().map(|grant| grant.cpus).sum::<usize>() <= LIMITS.cpus);
                            assert!(grants.len() <= LIMITS.jobs);
                            let gpus: Vec<usize> = grants.iter().filter_map(|grant| grant.gpu).collect();
                            assert_eq!(gpus.iter().collect::<HashSet<_>>().len(), gpus.len(), "a GPU has one user");
                            assert!(gpus.iter().all(|gpu| *gpu < LIMITS.gpus));
                        }
                        Action::Cached(node) => outputs[node] = Some(world.output(node, &keys[node])),
                        Action::Share(node, maker) => {
                            assert_eq!(keys[node], keys[maker]);
                            outputs[node] = Some(world.output(node, &keys[node]));
                        }
                        Action::FailLike(node, other) => assert_eq!(keys[node], keys[other]),
                        Action::Fail(_) => {
                            failures += 1;
                            may_start &= world.most_failures.is_none_or(|most| failures < most);
                        }
                        Action::Retry(node, retry) => {
                            assert!(may_start && (1..=world.shapes[node].retries).contains(&retry));
                            retrying.push(node);
                        }
                        Action::Stop(node) => assert!(
                            running.iter().any(|(other, _)| *other == node) || elsewhere.contains(&node),
                            "only what runs can be stopped"
                        ),
                        Action::Waits(_) | Action::Blocked(_) | Action::GiveUp(_) => {}
                    }
                }
            }
            if scheduler.is_finished() {
                assert!(running.is_empty() && prepared.is_empty());
                return (scheduler, ran);
            }
            steps += 1;
            assert!(steps < 1_000, "it does not end");
            if world.interrupt_after == Some(steps) {
                (may_start, interrupted) = (false, true);
                inbox.push_back(Input::Interrupt);
                continue;
            }
            if !prepared.is_empty() && (running.is_empty() || choose(2) == 0) {
                let node = prepared.remove(choose(prepared.len()));
                inbox.push_back(if world.trouble && choose(6) == 0 {
                    outputs[node] = None;
                    if choose(2) == 0 { Input::Lost(node) } else { Input::Failed { node, lasting: choose(2) == 0 } }
                } else {
                    if !lost.contains(&keys[node]) {
                        stored.insert(keys[node].clone());
                    }
                    Input::Done(node)
                });
                continue;
            }
            let outside = elsewhere.len() + retrying.len();
            assert!(running.len() + outside > 0, "it is stuck");
            let pick = choose(running.len() + outside);
            if pick >= running.len() {
                let pick = pick - running.len();
                inbox.push_back(match elsewhere.get(pick) {
                    Some(_) => Input::Freed(elsewhere.remove(pick)),
                    None => Input::Due(retrying.remove(pick - elsewhere.len())),
                });
                continue;
            }
            let (node, _) = running.remove(pick);
            let inputs = &world.shapes[node].inputs;
            if world.trouble && choose(5) == 0 {
                elsewhere.push(node);
                inbox.push_back(Input::Elsewhere(node));
            } else if interrupted && choose(2) == 0 {
                inbox.push_back(Input::Interrupted(node));
            } else if world.trouble && choose(8) == 0 {
                inbox.push_back(Input::Lost(node));
            } else if world.trouble && !inputs.is_empty() && choose(6) == 0 {
                let producer = inputs[choose(inputs.len())];
                stored.remove(&keys[producer]);
                lost.insert(keys[producer].clone());
                inbox.push_back(Input::Damaged { node, producer });
            } else {
                let attempts = ran.entry(keys[node].clone()).or_default();
                *attempts += 1;
                let (failing, lasting) = World::failures(&keys[node]);
                if *attempts <= failing {
                    inbox.push_back(Input::Failed { node, lasting });
                } else {
                    lost.remove(&keys[node]);
                    outputs[node] = Some(world.output(node, &keys[node]));
                    if choose(2) == 0 {
                        prepared.push(node);
                        inbox.push_back(Input::Prepared(node));
                        continue;
                    }
                    stored.insert(keys[node].clone());
                    let taken = world.trouble && choose(5) == 0;
                    inbox.push_back(if taken { Input::Taken(node) } else { Input::Done(node) });
                }
            }
        }
    }

    fn same(got: Phase, expected: Phase) -> bool {
        got == expected || got.is_ok() && expected.is_ok()
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 2_000, failure_persistence: None, ..ProptestConfig::default() })]

        /// Left alone, the scheduler comes to the naive answer, in whatever order things end, and runs each key as often as
        /// it takes.
        #[test]
        fn it_agrees_with_the_naive_answer(world in worlds()) {
            let world = World { most_failures: None, trouble: false, interrupt_after: None, ..world };
            let (ends, expected) = world.oracle();
            let (scheduler, ran) = simulate(&world);
            for (node, end) in ends.iter().enumerate() {
                prop_assert!(same(scheduler.phase(node), *end), "{node}: {:?}, not {end:?}", scheduler.phase(node));
            }
            prop_assert_eq!(ran, expected);
        }

        /// Whatever happens, the run ends, every wanted node has an end, and no result is used that the naive answer
        /// would not have.
        #[test]
        fn it_ends_whatever_happens(world in worlds()) {
            let (ends, _) = world.oracle();
            let (scheduler, _) = simulate(&world);
            for (node, end) in ends.iter().enumerate() {
                let phase = scheduler.phase(node);
                let ended = !phase.waits() && !matches!(phase, Phase::Running | Phase::Prepared);
                prop_assert!(ended, "{node} is left {phase:?}");
                prop_assert_eq!(phase == Phase::Unwanted, *end == Phase::Unwanted);
                // Damage makes a stored result run again, which may fail where the naive answer took it from the store.
                if phase.is_ok() {
                    prop_assert!(end.is_ok());
                }
                if phase == Phase::Skipped {
                    prop_assert!(world.most_failures.is_some());
                }
                if phase == Phase::Interrupted {
                    prop_assert!(world.interrupt_after.is_some());
                }
            }
        }
    }
}
