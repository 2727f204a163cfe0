//! What sets a run back: attempts that fail, results that prove damaged, inputs that are taken away again.

use super::{Action, Ending, Phase, REBUILDS, Scheduler};

impl Scheduler {
    /// Makes a result again that proved damaged before it was durable. Its consumers wait for it already.
    pub(super) fn make_again(&mut self, node: usize, actions: &mut Vec<Action>) {
        let followers = self.take_followers(node);
        self.nodes[node].key = None;
        for waiting in followers.into_iter().chain([node]) {
            if let Some(ending) = self.ending {
                self.close(waiting, ending);
            } else {
                self.nodes[waiting].phase = Phase::Pending;
                self.wait_again(waiting, actions);
            }
        }
    }

    pub(super) fn failed(&mut self, node: usize, lasting: bool, actions: &mut Vec<Action>) {
        // The end may have been called while its key was being worked out, or an input taken back.
        match self.nodes[node].phase {
            Phase::Finding | Phase::Running => {}
            // What has begun meanwhile goes on: it has the right bytes, wherever they come to lie.
            Phase::Prepared if self.nodes[node].spoiled => {
                self.nodes[node].spoiled = false;
                self.leave_running(node);
                return self.make_again(node, actions);
            }
            Phase::Prepared => self.take_back(node, actions),
            _ => return,
        }
        self.leave_running(node);
        self.leave_finding(node);
        let state = &mut self.nodes[node];
        let may_retry = !lasting && self.ending.is_none() && state.shape.retries > 0;
        let Some(key) = state.key.as_ref().filter(|_| may_retry) else {
            return self.give_up(node, actions);
        };
        let retried = self.retried.entry(key.clone()).or_default();
        if *retried >= state.shape.retries {
            return self.give_up(node, actions);
        }
        *retried += 1;
        state.phase = Phase::Retrying;
        self.active += 1;
        actions.push(Action::Retry(node, *retried));
    }

    /// Makes again what was lost before it was durable, or gives up.
    pub(super) fn lost(&mut self, node: usize, actions: &mut Vec<Action>) {
        let state = &mut self.nodes[node];
        let was_prepared = state.phase == Phase::Prepared;
        if !was_prepared && state.phase != Phase::Running {
            return;
        }
        let was_spoiled = std::mem::take(&mut state.spoiled);
        if !was_spoiled {
            state.rebuilds += 1;
        }
        let is_hopeless = state.rebuilds > REBUILDS;
        // Nobody has begun with what was never told to be usable.
        if was_prepared && !was_spoiled {
            self.take_back(node, actions);
        }
        self.leave_running(node);
        if is_hopeless {
            actions.push(Action::GiveUp(node));
            return self.give_up(node, actions);
        }
        self.make_again(node, actions);
    }

    pub(super) fn give_up(&mut self, node: usize, actions: &mut Vec<Action>) {
        let followers = self.take_followers(node);
        self.nodes[node].phase = Phase::Failed;
        self.failed += 1;
        actions.push(Action::Fail(node));
        if let Some(key) = self.nodes[node].key.clone() {
            self.failures.insert(key, node);
        }
        for &follower in &followers {
            self.nodes[follower].phase = Phase::Failed;
            actions.push(Action::FailLike(follower, node));
        }
        let roots = std::iter::once(node).chain(followers);
        self.close_consumers(roots.collect(), Phase::Blocked, actions);
        if self.ending.is_none() && self.most_failures.is_some_and(|most| self.failed >= most) {
            self.end(Ending::Failure, actions);
        }
    }

    /// Settles everything that rests on `roots` and has not begun.
    pub(super) fn close_consumers(&mut self, roots: Vec<usize>, phase: Phase, actions: &mut Vec<Action>) {
        let mut stack = roots;
        while let Some(node) = stack.pop() {
            for position in 0..self.nodes[node].consumers.len() {
                let consumer = self.nodes[node].consumers[position];
                // An input can be unmade by a rebuild that fails; what was started or finished before keeps its end.
                let open = match self.nodes[consumer].phase {
                    Phase::Pending => true,
                    Phase::Skipped => phase == Phase::Blocked,
                    _ => false,
                };
                if open {
                    self.nodes[consumer].phase = phase;
                    if phase == Phase::Blocked {
                        actions.push(Action::Blocked(consumer));
                    }
                    stack.push(consumer);
                }
            }
        }
    }

    pub(super) fn damaged(&mut self, node: usize, producer: usize, actions: &mut Vec<Action>) {
        self.leave_running(node);
        if let Some(ending) = self.ending {
            for follower in self.take_followers(node) {
                self.close(follower, ending);
            }
            return self.close(node, ending);
        }
        let state = &mut self.nodes[producer];
        if state.phase.is_ok() || state.phase == Phase::Prepared && !state.spoiled {
            if state.rebuilds >= REBUILDS {
                actions.push(Action::GiveUp(node));
                return self.give_up(node, actions);
            }
            state.rebuilds += 1;
            if state.phase == Phase::Prepared {
                state.spoiled = true;
                self.take_back(producer, actions);
            } else {
                self.unmake(producer, actions);
            }
        }
        let followers = self.take_followers(node);
        for waiting in followers.into_iter().chain([node]) {
            self.nodes[waiting].phase = Phase::Pending;
            self.wait_again(waiting, actions);
        }
        self.wait_again(producer, actions);
    }

    /// Finds a pending node's key if it can, or closes it: an input may have failed while it had all of them.
    pub(super) fn wait_again(&mut self, node: usize, actions: &mut Vec<Action>) {
        self.find_if_ready(node, actions);
        for input in self.nodes[node].shape.inputs.clone() {
            self.close_behind(input, actions);
        }
    }

    /// Settles what rests on a node that has ended without a result.
    fn close_behind(&mut self, producer: usize, actions: &mut Vec<Action>) {
        if let Phase::Failed | Phase::Blocked | Phase::Interrupted = self.nodes[producer].phase {
            let phase =
                if self.nodes[producer].phase == Phase::Interrupted { Phase::Interrupted } else { Phase::Blocked };
            self.close_consumers(vec![producer], phase, actions);
        }
    }

    /// Takes back a result that proved damaged, and with it the keys of those that were about to use it.
    fn unmake(&mut self, producer: usize, actions: &mut Vec<Action>) {
        self.nodes[producer].phase = Phase::Pending;
        if let Some(key) = self.nodes[producer].key.take() {
            self.made.remove(&key);
        }
        self.take_back(producer, actions);
    }

    /// Makes the consumers of a node that have not begun wait for it again.
    fn take_back(&mut self, producer: usize, actions: &mut Vec<Action>) {
        let consumers = self.nodes[producer].consumers.clone();
        // All of them first: one that steps back lets those of its key look for themselves.
        for &consumer in &consumers {
            self.nodes[consumer].missing += 1;
        }
        for consumer in consumers {
            self.step_back(consumer, actions);
        }
    }

    /// Returns a node that has a key but has not begun to `pending`; those that followed it look for themselves.
    pub(super) fn step_back(&mut self, node: usize, actions: &mut Vec<Action>) {
        match self.nodes[node].phase {
            Phase::Queued => self.leave_queue(node),
            Phase::Finding => self.leave_finding(node),
            Phase::Follows(_) | Phase::Elsewhere | Phase::Retrying => {}
            _ => return,
        }
        if !matches!(self.nodes[node].phase, Phase::Follows(_)) {
            self.active -= 1;
        }
        let followers = self.take_followers(node);
        self.nodes[node].phase = Phase::Pending;
        for follower in followers {
            self.nodes[follower].phase = Phase::Pending;
            self.find_if_ready(follower, actions);
        }
    }
}
