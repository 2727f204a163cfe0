//! How far sampler and trainer lie apart in the log-probabilities of tokens that one policy has drawn, and how far they may.
//!
//! Both compute the same function by different operations. In fp32 they differ by the rounding of sums; in bf16 by that of every
//! step, so that single tokens may lie far apart and the bound is on their mean and on nearly all of them.

use pipe::stages::training::Precision;
use pipe::telemetry::Metrics;

/// The largest difference in fp32 on a CPU, at temperature 1 or above; below, the temperature divides the logits' own error too.
pub const PARITY: f64 = 1e-4;
/// The same in bf16, of the mean and of the 99th percentile.
pub const PARITY_BF16: [f64; 2] = [5e-3, 5e-2];

/// Absolute differences of log-probabilities, in nats.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Mismatch {
    /// Their mean.
    pub mean: f64,
    /// What 99 of 100 do not exceed.
    pub p99: f64,
    /// The largest. It is not finite where one is no number.
    pub max: f64,
}

impl Mismatch {
    /// Of the pairs of what the sampler and the trainer say of each token; 0 of none.
    pub fn of(pairs: impl Iterator<Item = (f32, f32)>) -> Self {
        let mut gaps: Vec<f64> = pairs.map(|(one, other)| (f64::from(one) - f64::from(other)).abs()).collect();
        gaps.sort_by(f64::total_cmp);
        let Some(max) = gaps.last().copied() else { return Self::default() };
        let rank = (gaps.len() * 99).div_ceil(100);
        Self { mean: gaps.iter().sum::<f64>() / gaps.len() as f64, p99: gaps[rank - 1], max }
    }

    /// Whether sampler and trainer may be one policy, in `precision` and at `temperature`.
    pub fn is_rounding(&self, precision: Precision, temperature: f64) -> bool {
        let scale = temperature.min(1.0);
        match precision {
            Precision::Fp32 => self.max <= PARITY / scale,
            Precision::Bf16 => self.mean <= PARITY_BF16[0] / scale && self.p99 <= PARITY_BF16[1] / scale,
        }
    }

    /// `sampling/logprob_difference_mean`, `_p99` and `_max`.
    pub fn metrics(&self) -> Metrics {
        let mut metrics = Metrics::default();
        metrics.mean("sampling/logprob_difference_mean", self.mean, 1.0);
        metrics.mean("sampling/logprob_difference_p99", self.p99, 1.0);
        metrics.max("sampling/logprob_difference_max", self.max);
        metrics
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn means_percentiles_and_bounds_by_hand() {
        let of = |gaps: &[f32]| Mismatch::of(gaps.iter().map(|gap| (-1.0, gap - 1.0)));
        assert_eq!(of(&[]), Mismatch::default());
        // 198 of 200 are small: the third largest is the 99th percentile no more.
        let mut gaps = vec![0.25f32; 198];
        gaps.extend([8.0, 4.0]);
        let made = of(&gaps);
        assert!((made.mean - (198.0 * 0.25 + 12.0) / 200.0).abs() < 1e-12, "{made:?}");
        assert!((made.p99 - 0.25).abs() < 1e-12 && (made.max - 8.0).abs() < 1e-12, "{made:?}");
        gaps[0] = 2.0;
        assert!((of(&gaps).p99 - 2.0).abs() < 1e-12);
        let allowed =
            |mean, p99, max, precision, temperature| Mismatch { mean, p99, max }.is_rounding(precision, temperature);
        let (fp32, bf16) = (Precision::Fp32, Precision::Bf16);
        assert!(allowed(1e-5, 9e-5, 9e-5, fp32, 2.0) && !allowed(1e-5, 9e-5, 2e-4, fp32, 1.0));
        assert!(allowed(1e-5, 9e-5, 2e-4, fp32, 0.5), "a temperature below 1 divides the error, too");
        assert!(allowed(4e-3, 4e-2, 1.0, bf16, 1.0) && allowed(9e-3, 9e-2, 1.0, bf16, 0.5));
        assert!(!allowed(6e-3, 4e-2, 1.0, bf16, 1.0) && !allowed(4e-3, 6e-2, 1.0, bf16, 1.0));
        let lost = of(&[0.0, f32::NAN]);
        assert!(!lost.is_rounding(bf16, 1.0) && !lost.is_rounding(fp32, 1.0), "{lost:?}");
    }
}
