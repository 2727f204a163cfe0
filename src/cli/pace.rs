//! How fast something goes and how long it still takes, from the last half minute.

use std::collections::VecDeque;
use std::time::Duration;

/// How far back the rate looks.
const WINDOW: Duration = Duration::from_secs(30);

/// How far apart kept observations lie.
const SPACING: Duration = Duration::from_millis(250);

/// Observations of a counter. Times count from any fixed moment; the caller owns the clock.
#[derive(Clone, Debug, Default)]
pub struct Pace {
    seen: VecDeque<(Duration, u64)>,
    newest: Option<(Duration, u64)>,
}

impl Pace {
    /// No observation yet.
    pub fn new() -> Self {
        Self::default()
    }

    /// The counter stands at `done` at the moment `now`. One that falls starts over.
    pub fn reach(&mut self, now: Duration, done: u64) {
        if self.newest.is_some_and(|(_, before)| done < before) {
            self.seen.clear();
        }
        self.newest = Some((now, done));
        if self.seen.back().is_none_or(|(last, _)| now.saturating_sub(*last) >= SPACING) {
            self.seen.push_back((now, done));
        }
        // One observation beyond the window stays, so that slow counters keep a rate.
        while self.seen.len() > 2 && now.saturating_sub(self.seen[1].0) >= WINDOW {
            self.seen.pop_front();
        }
    }

    /// Units a second; `None` until there are two moments to compare.
    pub fn rate(&self) -> Option<f64> {
        let ((from, first), (to, last)) = (*self.seen.front()?, self.newest?);
        let seconds = to.saturating_sub(from).as_secs_f64();
        (seconds > 0.0 && last > first).then(|| (last - first) as f64 / seconds)
    }

    /// Seconds until `total` at this rate.
    pub fn left(&self, total: u64) -> Option<f64> {
        let (_, done) = self.newest?;
        Some(total.saturating_sub(done) as f64 / self.rate()?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_rate_follows_the_last_half_minute() {
        let mut pace = Pace::new();
        assert_eq!(pace.rate(), None);
        for second in 0..100u64 {
            let done = if second < 50 { second * 10 } else { 500 + (second - 50) * 20 };
            pace.reach(Duration::from_secs(second), done);
        }
        assert!((pace.rate().unwrap() - 20.0).abs() < 0.5, "{:?}", pace.rate());
        assert!((pace.left(1680).unwrap() - 10.0).abs() < 0.5);
    }

    #[test]
    fn what_was_done_before_is_no_speed() {
        let mut pace = Pace::new();
        pace.reach(Duration::from_secs(5), 1000);
        assert_eq!(pace.rate(), None);
        pace.reach(Duration::from_secs(7), 1010);
        assert!((pace.rate().unwrap() - 5.0).abs() < 1e-9);
        pace.reach(Duration::from_secs(8), 0);
        assert_eq!(pace.rate(), None, "a counter that falls starts over");
    }

    #[test]
    fn slow_counters_keep_a_rate() {
        let mut pace = Pace::new();
        pace.reach(Duration::from_secs(0), 0);
        pace.reach(Duration::from_secs(100), 1);
        pace.reach(Duration::from_secs(200), 2);
        assert!((pace.rate().unwrap() - 0.01).abs() < 1e-9);
    }
}
