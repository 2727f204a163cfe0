//! What the numbers of an experiment are worth: intervals, paired tests, corrections and sample sizes.
//!
//! Pure functions over slices; nothing here knows a pipeline, a file or a model. Each formula names its source.
//! [`mean`] holds intervals of one mean, [`paired`] differences on the same instances, [`permutation`] their exact test,
//! [`seeds`] claims about a recipe, [`curve`] what runs had at equal effort, [`family`] the correction for many tests, [`power`] what a sample can show.

pub mod alarm;
pub mod components;
pub mod curve;
pub mod family;
pub mod mean;
pub mod paired;
pub mod permutation;
pub mod power;
pub mod seeds;

use serde::Serialize;
use statrs::distribution::{ContinuousCDF as _, Normal, StudentsT};

/// The share of intervals that cover the truth, everywhere in the program unless a caller says otherwise.
pub const LEVEL: f64 = 0.95;

/// A mean with its interval.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Estimate {
    /// The mean.
    pub mean: f64,
    /// The lower end; absent where too little is known for an interval.
    pub low: Option<f64>,
    /// The upper end.
    pub high: Option<f64>,
    /// The independent units that the interval rests on.
    pub n: usize,
}

impl Estimate {
    /// The same of a share: Student's interval does not know that it lies in `[0, 1]`, and cut there it covers as much.
    #[must_use]
    pub fn of_share(self) -> Self {
        let within = |end: f64| end.clamp(0.0, 1.0);
        Self { low: self.low.map(within), high: self.high.map(within), ..self }
    }
}

/// A paired difference (first minus second) with its interval and test.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Difference {
    /// The mean difference.
    pub mean: f64,
    /// The lower end of its interval; absent where too little is known for one.
    pub low: Option<f64>,
    /// The upper end.
    pub high: Option<f64>,
    /// The independent pairs that it rests on.
    pub n: usize,
    /// The two-sided p of "there is no difference"; absent where no test can be made.
    pub p: Option<f64>,
}

impl Difference {
    /// The same of two shares, which lies in `[-1, 1]`.
    #[must_use]
    pub fn of_shares(self) -> Self {
        let within = |end: f64| end.clamp(-1.0, 1.0);
        Self { low: self.low.map(within), high: self.high.map(within), ..self }
    }
}

/// The two-sided quantile of Student's t: half the mass `level` lies between it and 0.
fn t_quantile(level: f64, freedom: f64) -> f64 {
    StudentsT::new(0.0, 1.0, freedom).expect("degrees of freedom are positive").inverse_cdf(f64::midpoint(1.0, level))
}

/// The two-sided quantile of the standard normal.
fn normal_quantile(level: f64) -> f64 {
    Normal::standard().inverse_cdf(f64::midpoint(1.0, level))
}

/// The mass of the standard normal within `z` of 0.
#[cfg(test)]
fn level_within(z: f64) -> f64 {
    1.0 - 2.0 * Normal::standard().sf(z)
}

/// The mean, and the unbiased standard deviation (denominator n - 1; 0 for a single value).
fn moments(values: &[f64]) -> (f64, f64) {
    let n = values.len() as f64;
    let mean = values.iter().sum::<f64>() / n;
    if values.len() < 2 {
        return (mean, 0.0);
    }
    // Two passes: the sum of squares minus the square of the sum cancels where the spread is small.
    let squares: f64 = values.iter().map(|value| (value - mean).powi(2)).sum();
    (mean, (squares / (n - 1.0)).sqrt())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_interval_of_shares_ends_where_shares_do() {
        // Student's interval of these five is [-0.07, 0.17].
        let estimate = seeds::over_seeds(&[0.0, 0.0, 0.02, 0.01, 0.22], LEVEL).unwrap();
        assert!(estimate.low.unwrap() < 0.0);
        let share = estimate.of_share();
        assert_eq!((share.low, share.high, share.mean), (Some(0.0), estimate.high, estimate.mean));
        let apart = Difference { mean: 0.9, low: Some(0.7), high: Some(1.1), n: 5, p: Some(0.01) }.of_shares();
        assert_eq!((apart.low, apart.high), (Some(0.7), Some(1.0)));
    }
}
