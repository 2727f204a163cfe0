//! What waits for its time: another attempt, the end of a stage that takes too long, a key that another process holds.

use std::time::{Duration, Instant};

use super::Driver;
use super::alarms::Alarm;
use crate::pipeline::exec::event::Event;
use crate::pipeline::exec::scheduler::Input;
use crate::pipeline::spec::parse_duration;
use crate::pipeline::store::Attempts;

/// How long a stage that has timed out may take to save and end before its process is killed.
const GRACE: Duration = if cfg!(test) { Duration::from_millis(300) } else { Duration::from_secs(30) };

/// The pause before another attempt doubles up to this, or stays as the stage says where that is longer.
const LONGEST_BACKOFF: Duration = Duration::from_secs(600);

/// How often a key that another process holds is asked for: soon at first, since most stages are short.
const FIRST_ASK: Duration = Duration::from_millis(2);
const LAST_ASK: Duration = Duration::from_millis(50);

/// How often the user is told how far the other process is.
const TELL: Duration = Duration::from_secs(10);

impl Driver<'_, '_> {
    /// Does what was to be done about a node at this moment.
    pub(super) fn rung(&mut self, node: usize, alarm: Alarm) {
        match alarm {
            Alarm::Due => self.inbox.push_back(Input::Due(node)),
            // A stage that the user has asked to stop is stopping already.
            Alarm::Timeout if self.stopping => {}
            Alarm::Timeout => {
                if let Some(live) = self.running.get_mut(&node) {
                    live.timed_out = true;
                    live.running.stop();
                    self.alarms.set(node, Instant::now() + GRACE, Alarm::Kill);
                }
            }
            Alarm::Kill => {
                if let Some(live) = self.running.get(&node) {
                    live.running.kill();
                }
            }
            Alarm::Ask { pause, told } => self.ask(node, pause, told),
        }
    }

    /// Lets a while pass before a node's attempt after the failure number `retry`.
    pub(super) fn retry(&mut self, node: usize, retry: u32) {
        let planned = &self.plan.nodes[node];
        let pause = backoff(&planned.spec.run.backoff, retry);
        // A pause so long that no clock shows its end never ends.
        if let Some(moment) = Instant::now().checked_add(pause) {
            self.alarms.set(node, moment, Alarm::Due);
        }
        (self.events)(&Event::Retrying {
            node,
            name: planned.name().clone(),
            error: self.errors.get(&node).cloned().unwrap_or_default(),
            attempt: retry + 1,
            attempts: planned.spec.run.retries + 1,
            seconds: pause.as_secs_f64(),
        });
    }

    /// Begins to wait for a key that another process holds.
    pub(super) fn wait_for(&mut self, node: usize) {
        self.tell_owner(node);
        self.alarms.set(node, Instant::now() + FIRST_ASK, Alarm::Ask { pause: FIRST_ASK, told: Instant::now() });
    }

    /// Asks whether the key is free. A lock that cannot be asked for counts as free: the attempt that follows says what is
    /// wrong.
    fn ask(&mut self, node: usize, pause: Duration, mut told: Instant) {
        let held =
            self.keys[node].as_ref().is_some_and(|key| self.store.try_lock(key).is_ok_and(|lock| lock.is_none()));
        if !held {
            return self.inbox.push_back(Input::Freed(node));
        }
        if told.elapsed() >= TELL {
            told = Instant::now();
            self.tell_owner(node);
        }
        let pause = (pause * 2).min(LAST_ASK);
        self.alarms.set(node, Instant::now() + pause, Alarm::Ask { pause, told });
    }

    fn tell_owner(&mut self, node: usize) {
        let Some(key) = self.keys[node].clone() else { return };
        // Who works on it is for people alone, so that it cannot be read is no error.
        let Attempts { owner, reached, .. } = self.store.attempts(&key).ok().flatten().unwrap_or_default();
        (self.events)(&Event::Waiting { node, name: self.plan.nodes[node].name().clone(), key, owner, reached });
    }
}

/// The pause after the failure number `retry`: `first`, twice that, four times that.
fn backoff(first: &str, retry: u32) -> Duration {
    let first = parse_duration(first).unwrap_or(Duration::from_secs(1));
    let factor = 1_u32.checked_shl(retry.saturating_sub(1)).unwrap_or(u32::MAX);
    first.saturating_mul(factor).min(LONGEST_BACKOFF.max(first))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pauses_double_up_to_a_bound() {
        let pauses = [1, 2, 3, 7, 99].map(|retry| backoff("10s", retry).as_secs());
        assert_eq!(pauses, [10, 20, 40, 600, 600]);
        assert_eq!(backoff("1h", 3).as_secs(), 3600);
        assert_eq!(backoff("0s", 30), Duration::ZERO);
    }
}
