//! Accumulators that merge: a metric is a sum and a count, a maximum or a minimum until it is printed.
//!
//! A mean of means is wrong wherever parts differ in size; parts are therefore merged as sums and divided once.

use std::collections::BTreeMap;

/// One metric under way.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Accumulator {
    /// Printed as `sum / count`.
    Mean { sum: f64, count: f64 },
    /// Printed as the sum.
    Total(f64),
    /// Printed as the greatest value.
    Max(f64),
    /// Printed as the smallest value.
    Min(f64),
    /// Printed as `sqrt(squares / count)`; `squares` are the squared distances from `mean`.
    Deviation { count: f64, mean: f64, squares: f64 },
}

/// Named accumulators. A name keeps the kind of its first use.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Metrics {
    accumulators: BTreeMap<String, Accumulator>,
}

impl Metrics {
    /// Adds `count` values whose sum is `sum` to a mean.
    pub fn mean(&mut self, name: &str, sum: f64, count: f64) {
        self.add(name, Accumulator::Mean { sum, count });
    }

    /// Adds to a sum.
    pub fn total(&mut self, name: &str, value: f64) {
        self.add(name, Accumulator::Total(value));
    }

    /// Takes `value` into a maximum; a value that is not a number stays visible.
    pub fn max(&mut self, name: &str, value: f64) {
        self.add(name, Accumulator::Max(value));
    }

    /// Takes `value` into a minimum; a value that is not a number stays visible.
    pub fn min(&mut self, name: &str, value: f64) {
        self.add(name, Accumulator::Min(value));
    }

    /// Takes `value` into a population standard deviation (merged as in Chan, Golub and LeVeque 1983).
    pub fn deviation(&mut self, name: &str, value: f64) {
        self.add(name, Accumulator::Deviation { count: 1.0, mean: value, squares: 0.0 });
    }

    /// Takes in the accumulators of another part of the same work.
    pub fn merge(&mut self, other: &Self) {
        for (name, accumulator) in &other.accumulators {
            self.add(name, *accumulator);
        }
    }

    /// The numbers to show; a mean over nothing is left out.
    pub fn values(&self) -> BTreeMap<String, f64> {
        let value = |accumulator: &Accumulator| match *accumulator {
            Accumulator::Mean { count, .. } if count <= 0.0 => None,
            Accumulator::Mean { sum, count } => Some(sum / count),
            Accumulator::Deviation { count, squares, .. } => Some((squares / count).sqrt()),
            Accumulator::Total(value) | Accumulator::Max(value) | Accumulator::Min(value) => Some(value),
        };
        self.accumulators.iter().filter_map(|(name, kept)| Some((name.clone(), value(kept)?))).collect()
    }

    fn add(&mut self, name: &str, new: Accumulator) {
        use Accumulator::{Deviation, Max, Mean, Min, Total};
        let Some(kept) = self.accumulators.get_mut(name) else {
            self.accumulators.insert(name.to_owned(), new);
            return;
        };
        match (kept, new) {
            (Mean { sum, count }, Mean { sum: more, count: further }) => {
                *sum += more;
                *count += further;
            }
            (Total(sum), Total(more)) => *sum += more,
            (Max(kept), Max(new)) => *kept = if kept.is_nan() || new.is_nan() { f64::NAN } else { kept.max(new) },
            (Min(kept), Min(new)) => *kept = if kept.is_nan() || new.is_nan() { f64::NAN } else { kept.min(new) },
            (Deviation { count, mean, squares }, Deviation { count: further, mean: other, squares: more }) => {
                let (whole, apart) = (*count + further, other - *mean);
                *squares += more + apart * apart * *count * further / whole;
                *mean += apart * further / whole;
                *count = whole;
            }
            (kept, new) => unreachable!("the metric `{name}` was {kept:?} and is now {new:?}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_merge_to_the_metrics_of_the_whole() {
        let rows = [1.0, 5.0, 0.5, 2.0, 8.0];
        let measure = |rows: &[f64]| {
            let mut metrics = Metrics::default();
            for row in rows {
                metrics.mean("loss", *row, 1.0);
                metrics.max("longest", *row);
                metrics.min("shortest", *row);
                metrics.total("tokens", *row);
            }
            metrics
        };
        let mut merged = measure(&rows[..1]);
        merged.merge(&measure(&rows[1..]));
        assert_eq!(merged, measure(&rows));
        let values = merged.values();
        assert_eq!(values["loss"].to_bits(), (16.5f64 / 5.0).to_bits());
        assert_eq!((values["longest"], values["shortest"], values["tokens"]), (8.0, 0.5, 16.5));
    }

    #[test]
    fn a_deviation_is_that_of_all_parts_together() {
        let deviation = |values: &[f64]| {
            let mut metrics = Metrics::default();
            for value in values {
                metrics.deviation("spread", *value);
            }
            metrics
        };
        let mut merged = deviation(&[2.0, 4.0, 4.0, 4.0]);
        merged.merge(&deviation(&[5.0, 5.0, 7.0, 9.0]));
        assert!((merged.values()["spread"] - 2.0).abs() < 1e-12, "{merged:?}");
    }

    #[test]
    fn nothing_is_no_zero_and_nan_stays() {
        let mut metrics = Metrics::default();
        metrics.mean("empty", 0.0, 0.0);
        metrics.max("peak", f64::NAN);
        metrics.max("peak", 1.0);
        let values = metrics.values();
        assert!(!values.contains_key("empty"));
        assert!(values["peak"].is_nan());
    }
}
