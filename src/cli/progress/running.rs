//! A stage that runs: how far it is, how fast, and how its metrics move.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use crate::cli::pace::Pace;
use crate::cli::progress::snapshot::{RunningStage, Trace};
use crate::cli::progress::words;
use crate::pipeline::stage::StageEvent;
use crate::pipeline::store::{Digest, Reached};

/// Metrics that are shown, at most.
const SHOWN_METRICS: usize = 4;

/// Points of a trace, at most.
const POINTS: usize = 48;

/// A stage that runs.
pub(super) struct Running {
    pub(super) label: String,
    pub(super) names: Vec<String>,
    pub(super) kind: String,
    pub(super) key: Digest,
    /// Seconds since 1970.
    pub(super) began: f64,
    pub(super) resumed: Option<u64>,
    pub(super) pace: Pace,
    pub(super) metrics: BTreeMap<String, f64>,
    /// Of the metrics that people look for.
    pub(super) traces: BTreeMap<String, Moving>,
    pub(super) reached: Option<Reached>,
    /// When it last said something on a plain line.
    pub(super) told: Instant,
}

/// Means over stretches of a metric's values; a stretch doubles in length whenever there are too many.
#[derive(Clone, Debug, Default, PartialEq)]
pub(super) struct Moving {
    points: Vec<f64>,
    stretch: u32,
    sum: f64,
    taken: u32,
}

impl Moving {
    fn take(&mut self, value: f64) {
        self.stretch = self.stretch.max(1);
        self.sum += value;
        self.taken += 1;
        if self.taken < self.stretch {
            return;
        }
        self.points.push(std::mem::take(&mut self.sum) / f64::from(std::mem::take(&mut self.taken)));
        if self.points.len() == POINTS {
            self.points = self.points.chunks(2).map(|pair| pair.iter().sum::<f64>() / pair.len() as f64).collect();
            self.stretch *= 2;
        }
    }
}

impl Running {
    /// It says something, so long after the run began.
    pub(super) fn hear(&mut self, event: &StageEvent, passed: Duration) {
        match event {
            StageEvent::Progress { done, total, unit } => {
                self.pace.reach(passed, *done);
                self.reached = Some(Reached { done: *done, total: *total, unit: unit.clone() });
            }
            StageEvent::Metrics { values } => {
                for (name, value) in values.iter().filter(|(_, value)| value.is_finite()) {
                    if words::is_looked_for(name) {
                        self.traces.entry(name.clone()).or_default().take(*value);
                    }
                    self.metrics.insert(name.clone(), *value);
                }
            }
            StageEvent::Resumed { done } => {
                self.pace.reach(passed, *done);
                self.resumed = Some(*done);
            }
            StageEvent::Note { .. } => {}
        }
    }

    /// Seconds that it still takes by its own count.
    pub(super) fn left(&self) -> Option<f64> {
        let reached = self.reached.as_ref()?;
        self.pace.left(reached.total)
    }

    /// The stage as it is shown.
    pub(super) fn shown(&self) -> RunningStage {
        let metrics: Vec<(String, f64)> =
            words::first(&self.metrics, SHOWN_METRICS).map(|(name, value)| (name.clone(), *value)).collect();
        // The first that has moved at all.
        let moved = |(name, _): &(String, f64)| {
            let moving = self.traces.get(name).filter(|moving| moving.points.len() > 2)?;
            Some(Trace { name: name.clone(), points: moving.points.clone() })
        };
        RunningStage {
            label: self.label.clone(),
            names: self.names.clone(),
            kind: self.kind.clone(),
            key: self.key.clone(),
            began: self.began,
            resumed: self.resumed,
            reached: self.reached.clone(),
            rate: self.pace.rate(),
            left: self.left().filter(|_| self.reached.as_ref().is_some_and(|reached| reached.done < reached.total)),
            trace: metrics.iter().find_map(moved),
            metrics,
        }
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    pub(in crate::cli::progress) fn running(label: &str) -> Running {
        Running {
            label: label.to_owned(),
            names: vec![format!("maze/{label}")],
            kind: "sft".to_owned(),
            key: Digest("k".into()),
            began: 1000.0,
            resumed: None,
            pace: Pace::new(),
            metrics: BTreeMap::new(),
            traces: BTreeMap::new(),
            reached: None,
            told: Instant::now(),
        }
    }

    #[test]
    fn a_trace_keeps_the_whole_curve_in_few_points() {
        let mut moving = Moving::default();
        for step in 0..10_000 {
            moving.take(f64::from(step));
        }
        assert!((POINTS / 2..POINTS).contains(&moving.points.len()), "{}", moving.points.len());
        assert!(moving.points.is_sorted() && moving.points[0] < 400.0 && moving.points.last().unwrap() > &9_000.0);
    }

    #[test]
    fn a_stage_shows_how_far_it_is_and_what_moves() {
        let mut stage = running("sft");
        let passed = Duration::from_secs;
        for step in 0..6_u64 {
            let values = [("loss", 1.0 / (step + 1) as f64), ("grad_norm", f64::NAN), ("mfu", 0.5)];
            let values = values.map(|(name, value)| (name.to_owned(), value)).into();
            stage.hear(&StageEvent::Metrics { values }, passed(step));
            stage.hear(&StageEvent::Progress { done: step * 10, total: 100, unit: "steps".into() }, passed(step));
        }
        let shown = stage.shown();
        assert_eq!(shown.reached, Some(Reached { done: 50, total: 100, unit: "steps".into() }));
        assert_eq!((shown.rate, shown.left), (Some(10.0), Some(5.0)));
        assert_eq!(shown.metrics.iter().map(|(name, _)| name.as_str()).collect::<Vec<_>>(), ["loss", "mfu"]);
        assert_eq!(shown.trace.map(|trace| (trace.name, trace.points.len())), Some(("loss".to_owned(), 6)));
        stage.hear(&StageEvent::Progress { done: 100, total: 100, unit: "steps".into() }, passed(10));
        assert_eq!(stage.shown().left, None, "it only has to end");
    }
}
