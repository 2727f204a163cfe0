//! Keeps a chatty stage from flooding whoever watches it.

use std::time::{Duration, Instant};

use crate::pipeline::stage::StageEvent;

/// Between two `progress` events of a stage.
const BETWEEN: Duration = Duration::from_millis(100);

/// Lets through about ten `progress` events a second, the last one always, and everything else.
#[derive(Debug, Default)]
pub struct Throttle {
    last: Option<Instant>,
}

impl Throttle {
    /// Whether an event of the moment `now` is told.
    pub fn lets_through(&mut self, event: &StageEvent, now: Instant) -> bool {
        let StageEvent::Progress { done, total, .. } = event else { return true };
        let due = done >= total || self.last.is_none_or(|last| now.duration_since(last) >= BETWEEN);
        if due {
            self.last = Some(now);
        }
        due
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ten_a_second_and_the_last() {
        let mut throttle = Throttle::default();
        let start = Instant::now();
        let progress = |done| StageEvent::Progress { done, total: 1_000, unit: "rows".into() };
        let told =
            (0..=1_000).filter(|done| throttle.lets_through(&progress(*done), start + Duration::from_millis(*done)));
        assert_eq!(told.collect::<Vec<_>>(), (0..=10).map(|tenth| tenth * 100).collect::<Vec<_>>());
        assert!(throttle.lets_through(&StageEvent::Note { text: "now".into() }, start));
    }
}
