//! How long a run still takes: what history says of the stages before it, and how far those that run have come.
//!
//! It must never decide anything. An estimate is shown long after it was made, since a stage may say nothing for hours, so it
//! counts down by the clock, as far as the stages that run can bring it down.

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

use crate::cli::plan;
use crate::cli::progress::snapshot::Left;
use crate::pipeline::plan::forecast::{Forecast, Share, Width};
use crate::pipeline::plan::{Node, Plan};
use crate::pipeline::store::Store;

/// Estimates may take one part in so many of a run's time,
const SHARE: u32 = 200;

/// and so much of it at once, since events come together.
const BURST: Duration = Duration::from_millis(100);

/// What a run still has before it.
pub(super) struct TimeLeft<'a> {
    plan: &'a Plan,
    store: &'a Store,
    /// Made when it is first needed: a run that finds everything cached reads no history.
    forecast: Option<Forecast<'a>>,
    width: Width,
    share: Box<dyn Fn(&Node) -> Share + 'a>,
    /// By node, whether it was asked for and is not settled yet.
    open: Vec<bool>,
    /// Nodes that run even where they are cached.
    again: BTreeSet<usize>,
    /// When the stages that run began.
    running: BTreeMap<usize, Instant>,
    /// What was learned since the last estimate.
    learned: Vec<(usize, f64)>,
    begun: Instant,
    /// What estimates have cost so far.
    spent: Duration,
}

/// The time left as it was at a moment.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Estimate {
    /// Seconds.
    left: f64,
    /// Seconds of it that are not of stages that run, and do not pass while these do.
    rest: f64,
    /// Whether there are stages of which no time is known.
    is_least: bool,
    at: Instant,
}

impl<'a> TimeLeft<'a> {
    /// Of a run of the nodes of `plan` that are `wanted`, with those of `again` run even where they are cached, and so many
    /// jobs at once; 0 is as many as cores.
    pub(super) fn new(
        plan: &'a Plan,
        store: &'a Store,
        wanted: Vec<bool>,
        again: BTreeSet<usize>,
        jobs: usize,
    ) -> Self {
        let (width, share) = plan::machine(jobs);
        Self {
            plan,
            store,
            forecast: None,
            width,
            share: Box::new(share),
            open: wanted,
            again,
            running: BTreeMap::new(),
            learned: Vec::new(),
            begun: Instant::now(),
            spent: Duration::ZERO,
        }
    }

    /// A stage begins.
    pub(super) fn begin(&mut self, node: usize, now: Instant) {
        self.running.insert(node, now);
    }

    /// A stage runs no more; it may be tried again.
    pub(super) fn stop(&mut self, node: usize) {
        self.running.remove(&node);
    }

    /// A stage is done, failed or blocked: nothing of it is left. Gives whether something was.
    pub(super) fn settle(&mut self, node: usize) -> bool {
        self.running.remove(&node);
        self.open.get_mut(node).is_some_and(std::mem::take)
    }

    /// A stage has taken so many seconds, which says something of those like it.
    pub(super) fn learn(&mut self, node: usize, seconds: f64) {
        self.learned.push((node, seconds));
    }

    /// Whether there is time for an estimate.
    pub(super) fn is_due(&self, now: Instant) -> bool {
        self.spent <= BURST + now.saturating_duration_since(self.begun) / SHARE
    }

    /// The time left; `pace` gives the seconds that a stage which runs says it still takes. Nothing where no history can be
    /// read: a run does not fail for that.
    pub(super) fn estimate(&mut self, now: Instant, pace: impl Fn(usize) -> Option<f64>) -> Option<Estimate> {
        let clock = Instant::now();
        if self.forecast.is_none() {
            self.forecast = Some(Forecast::new(self.plan, Some(self.store)).ok()?);
        }
        let forecast = self.forecast.as_mut()?;
        if !self.learned.is_empty() {
            self.learned.drain(..).for_each(|(node, seconds)| forecast.learn(node, seconds));
            forecast.refresh();
        }
        let forecast = &*forecast;
        let waiting = |node: usize| match () {
            () if !self.open[node] => Some(0.0),
            () if self.again.contains(&node) => forecast.seconds_if_run(node),
            () => forecast.to_do(node),
        };
        // One that takes longer than ever before takes nobody knows how long.
        let running = |node: usize, begun: Instant| {
            let passed = now.saturating_duration_since(begun).as_secs_f64();
            pace(node).or_else(|| Some(forecast.seconds_if_run(node)? - passed).filter(|left| *left >= 0.0))
        };
        let left = |node: usize| match self.running.get(&node) {
            Some(begun) => running(node, *begun),
            None => waiting(node),
        };
        let total = forecast.total(self.width, &self.share, left);
        let without = |node: usize| if self.running.contains_key(&node) { Some(0.0) } else { waiting(node) };
        let rest = forecast.total(self.width, &self.share, without).wall;
        self.spent += clock.elapsed();
        Some(Estimate { left: total.wall, rest, is_least: total.unknown > 0, at: now })
    }
}

impl Estimate {
    /// The same when something has happened since: what runs is not what it was made of.
    pub(super) fn outdated(self) -> Self {
        Self { rest: 0.0, ..self }
    }

    /// What is left now; nothing where nothing is known to be left.
    pub(super) fn now(&self, now: Instant) -> Option<Left> {
        let passed = now.saturating_duration_since(self.at).as_secs_f64();
        let seconds = (self.left - passed).max(self.rest);
        (seconds >= 1.0).then_some(Left { seconds, rest: self.rest, is_least: self.is_least })
    }
}

impl Left {
    /// `about 12 min left`, so many seconds later; nothing where nothing is known to be left.
    pub(super) fn later(&self, passed: f64) -> Option<String> {
        let seconds = (self.seconds - passed.max(0.0)).max(self.rest);
        let about = if self.is_least { "at least" } else { "about" };
        (seconds >= 1.0).then(|| format!("{about} {} left", roughly(seconds)))
    }
}

/// No more digits than a forecast has: `40 s`, `12 min`, `2.5 h`, `3 days`.
fn roughly(seconds: f64) -> String {
    match seconds {
        seconds if seconds < 7.5 => format!("{seconds:.0} s"),
        seconds if seconds < 57.5 => format!("{:.0} s", (seconds / 5.0).round() * 5.0),
        seconds if seconds < 5400.0 => format!("{:.0} min", (seconds / 60.0).round()),
        seconds if seconds < 129_600.0 => format!("{} h", (seconds / 1800.0).round() / 2.0),
        seconds => format!("{:.0} days", (seconds / 86_400.0).round()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn text(estimate: &Estimate, now: Instant) -> Option<String> {
        estimate.now(now)?.later(0.0)
    }

    use crate::pipeline::fixture::{echo, experiment, trial};

    #[test]
    fn what_runs_counts_by_its_own_pace_and_what_waits_by_history() {
        let one = |seed: usize| trial(&seed.to_string(), vec![echo("train", &seed.to_string(), &[])]);
        let plan = Plan::new(&[experiment("a", (0..4).map(one).collect())], None).unwrap();
        let folder = tempfile::tempdir().unwrap();
        let store = Store::open(&folder.path().join("store")).unwrap();
        let mut wanted = vec![true; 4];
        wanted[3] = false;
        let mut time = TimeLeft::new(&plan, &store, wanted, BTreeSet::new(), 1);
        let at = Instant::now();
        let after = |seconds| at + Duration::from_secs(seconds);
        time.begin(0, at);
        assert!(time.is_due(at));
        time.spent = Duration::from_secs(1);
        assert!(!time.is_due(after(170)) && time.is_due(after(190)), "a two-hundredth of the time");
        time.spent = Duration::ZERO;
        let first = time.estimate(at, |_| None).unwrap();
        assert_eq!((first.left, first.is_least, text(&first, at)), (0.0, true, None), "nothing has ever run");
        let told = time.estimate(after(1), |node| (node == 0).then_some(30.0)).unwrap();
        assert_eq!((told.left, told.rest, told.is_least), (30.0, 0.0, true));
        time.learn(0, 40.0);
        time.settle(0);
        time.begin(1, after(40));
        let second = time.estimate(after(50), |_| None).unwrap();
        assert_eq!(
            (second.left, second.rest, second.is_least),
            (70.0, 40.0, false),
            "10 of 40 s have passed, and one waits"
        );
        assert!(time.estimate(after(90), |_| None).unwrap().is_least, "it takes longer than the other has");
        time.stop(1);
        assert!((time.estimate(after(95), |_| None).unwrap().left - 80.0).abs() < 1e-9, "it is tried again");
    }

    #[test]
    fn a_forecast_is_told_as_roughly_as_it_is_known() {
        let cases = [
            (1.4, "1 s"),
            (7.4, "7 s"),
            (8.0, "10 s"),
            (41.0, "40 s"),
            (57.4, "55 s"),
            (58.0, "1 min"),
            (89.0, "1 min"),
            (725.0, "12 min"),
            (5399.0, "90 min"),
            (5400.0, "1.5 h"),
            (86_400.0, "24 h"),
            (200_000.0, "2 days"),
        ];
        for (seconds, text) in cases {
            assert_eq!(roughly(seconds), text, "{seconds}");
        }
    }

    #[test]
    fn it_counts_down_as_far_as_what_runs_can_bring_it() {
        let at = Instant::now();
        let after = |seconds| at + Duration::from_secs(seconds);
        let estimate = Estimate { left: 600.0, rest: 300.0, is_least: false, at };
        assert_eq!(text(&estimate, at).unwrap(), "about 10 min left");
        assert_eq!(text(&estimate, after(120)).unwrap(), "about 8 min left");
        assert_eq!(text(&estimate, after(3600)).unwrap(), "about 5 min left", "the rest waits for what runs");
        assert_eq!(
            estimate.now(at).unwrap().later(3600.0),
            text(&estimate, after(3600)),
            "also where it is read elsewhere"
        );
        assert_eq!(text(&estimate.outdated(), after(540)).unwrap(), "about 1 min left");
        let last = Estimate { rest: 0.0, is_least: true, ..estimate };
        assert_eq!(text(&last, after(540)).unwrap(), "at least 1 min left");
        assert_eq!(text(&last, after(700)), None, "it takes longer than ever before, and how long nobody knows");
    }
}
