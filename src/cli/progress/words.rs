//! The words in which a run is told: rates, metrics, who works on what.

use std::collections::BTreeMap;
use std::time::SystemTime;

use crate::cli::render;
use crate::cli::stored::ERROR;
use crate::pipeline::store::{Owner, Reached};

/// Metrics on a line, at most.
const SHOWN_METRICS: usize = 4;

/// The metrics that people look for first.
const FIRST: [&str; 4] = ["solved", "reward", "loss", "accuracy"];

fn rank(name: &str) -> usize {
    let last = name.rsplit(['/', '.']).next().unwrap_or(name);
    FIRST.iter().position(|first| *first == last).unwrap_or(FIRST.len())
}

/// Whether a metric is one that people look for first.
pub(super) fn is_looked_for(name: &str) -> bool {
    rank(name) < FIRST.len() && !name.contains('.')
}

/// The first metrics that people look for, at most so many.
pub(super) fn first(metrics: &BTreeMap<String, f64>, most: usize) -> impl Iterator<Item = (&String, &f64)> {
    // A dotted name is a part of another number: `solved.long`, `rows.train`. Where the time goes is for `pipe show`.
    // Ways to go wrong are many, and each is a part of what is not solved.
    let is_told = |(name, _): &(&String, &f64)| {
        !name.contains('.') && !["seconds/", ERROR].iter().any(|begin| name.starts_with(begin))
    };
    let mut told: Vec<(&String, &f64)> = metrics.iter().filter(is_told).collect();
    told.sort_by_key(|(name, _)| (rank(name), name.as_str()));
    told.into_iter().take(most)
}

/// The metrics that people look for first, short.
pub(super) fn headline(metrics: &BTreeMap<String, f64>) -> String {
    let shown = first(metrics, SHOWN_METRICS).map(|(name, value)| format!("{name} {}", render::number(*value)));
    shown.collect::<Vec<_>>().join(", ")
}

/// A rate with three digits: `0.42/s`, `21.3/s`, `1,250/s`.
pub(super) fn rate(rate: f64) -> String {
    match rate {
        rate if rate >= 100.0 => format!("{}/s", render::count(rate.round() as u64)),
        rate if rate >= 10.0 => format!("{rate:.1}/s"),
        rate => format!("{rate:.2}/s"),
    }
}

/// Who works on a stage that this run waits for.
pub(super) fn owner(owner: Option<&Owner>, reached: Option<&Reached>) -> String {
    let Some(Owner { process, host, since }) = owner else {
        return "another run is working on it".to_owned();
    };
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).map_or(0, |time| time.as_secs());
    let time = render::duration(now.saturating_sub(*since) as f64);
    let text = format!("process {process} on {host} has been working on it for {time}");
    match reached {
        Some(Reached { done, total, unit }) => {
            format!("{text}, {}/{} {unit}", render::count(*done), render::count(*total))
        }
        None => text,
    }
}

/// Values as a line of blocks, the least lowest, `width` of them; the whole curve is in it.
pub(super) fn curve(points: &[f64], width: usize) -> String {
    const BLOCKS: [char; 8] = ['▁', '▂', '▃', '▄', '▅', '▆', '▇', '█'];
    let width = width.min(points.len());
    let bin = |place: usize| {
        let part = &points[place * points.len() / width..(place + 1) * points.len() / width];
        part.iter().sum::<f64>() / part.len() as f64
    };
    let bins: Vec<f64> = (0..width).map(bin).collect();
    let (low, high) =
        bins.iter().fold((f64::INFINITY, f64::NEG_INFINITY), |(low, high), bin| (low.min(*bin), high.max(*bin)));
    let block = |bin: &f64| {
        let share = if high > low { (bin - low) / (high - low) } else { 0.5 };
        BLOCKS[((share * 8.0) as usize).min(7)]
    };
    bins.iter().map(block).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_metrics_are_those_that_people_look_for() {
        let names = ["error_wall", "loss", "mfu", "reward", "rollout/solved", "rollout/solved.long", "seconds/reward"];
        let shown = headline(&names.into_iter().map(|name| (name.to_owned(), 0.5)).collect());
        assert_eq!(shown, "rollout/solved 0.5, reward 0.5, loss 0.5, mfu 0.5");
    }

    #[test]
    fn what_people_look_for_comes_first() {
        let names = ["a", "b", "c", "rows.train", "validation/solved", "sft/loss"];
        let metrics = names.map(|name| (name.to_owned(), 0.5)).into();
        assert_eq!(headline(&metrics), "validation/solved 0.5, sft/loss 0.5, a 0.5, b 0.5");
        assert!(is_looked_for("sft/loss") && !is_looked_for("solved.long") && !is_looked_for("mfu"));
    }

    #[test]
    fn a_curve_shows_all_of_its_points() {
        let falling: Vec<f64> = (0..40).map(|step| 1.0 / f64::from(step + 1)).collect();
        assert_eq!(curve(&falling, 6), "█▂▁▁▁▁");
        assert_eq!(curve(&[1.0, 2.0, 3.0], 8), "▁▅█");
        assert_eq!(curve(&[2.0, 2.0], 8), "▅▅");
        assert_eq!(curve(&[], 8), "");
    }

    #[test]
    fn rates_have_three_digits() {
        assert_eq!([0.42, 21.34, 1250.0].map(rate), ["0.42/s", "21.3/s", "1,250/s"]);
    }
}
