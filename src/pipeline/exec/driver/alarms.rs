//! The driver's clock: at most one moment a node at which something is to be done about it.

use std::collections::{BTreeSet, HashMap};
use std::time::{Duration, Instant};

/// What is to be done about a node.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Alarm {
    /// Its next attempt is due.
    Due,
    /// It has run for as long as it may.
    Timeout,
    /// It was asked to end and has had its time.
    Kill,
    /// Ask for its key again, which another process holds.
    Ask {
        /// How long this wait was.
        pause: Duration,
        /// When the user was last told who holds it.
        told: Instant,
    },
}

/// Alarms by their moment.
#[derive(Debug, Default)]
pub(super) struct Alarms {
    moments: BTreeSet<(Instant, usize)>,
    of: HashMap<usize, (Instant, Alarm)>,
}

impl Alarms {
    /// Sets a node's alarm in place of the one it had.
    pub(super) fn set(&mut self, node: usize, moment: Instant, alarm: Alarm) {
        self.cancel(node);
        self.moments.insert((moment, node));
        self.of.insert(node, (moment, alarm));
    }

    /// Takes a node's alarm away.
    pub(super) fn cancel(&mut self, node: usize) {
        if let Some((moment, _)) = self.of.remove(&node) {
            self.moments.remove(&(moment, node));
        }
    }

    /// How long until the first one, and `most` where that is longer or there is none.
    pub(super) fn patience(&self, most: Duration) -> Duration {
        let first = self.moments.first();
        first.map_or(most, |(moment, _)| moment.saturating_duration_since(Instant::now()).min(most))
    }

    /// The first one whose moment has come by `now`, which then is over.
    pub(super) fn ring(&mut self, now: Instant) -> Option<(usize, Alarm)> {
        let (_, node) = *self.moments.first().filter(|(moment, _)| *moment <= now)?;
        let (_, alarm) = *self.of.get(&node)?;
        self.cancel(node);
        Some((node, alarm))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn alarms_ring_in_order_and_once() {
        let mut alarms = Alarms::default();
        let now = Instant::now();
        let second = Duration::from_secs(1);
        assert_eq!(alarms.patience(second), second);
        alarms.set(0, now + second * 3, Alarm::Timeout);
        alarms.set(1, now + second, Alarm::Due);
        alarms.set(0, now + second * 2, Alarm::Kill);
        alarms.set(2, now + second, Alarm::Due);
        alarms.cancel(2);
        assert!(alarms.patience(second * 9) <= second);
        assert_eq!(alarms.ring(now), None);
        assert_eq!(alarms.ring(now + second * 5), Some((1, Alarm::Due)));
        assert_eq!(alarms.ring(now + second * 5), Some((0, Alarm::Kill)));
        assert_eq!(alarms.ring(now + second * 5), None);
    }
}
