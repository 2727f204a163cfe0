//! Intervals of one mean over independent instances, and the unbiased pass@k.

use super::{Estimate, moments, normal_quantile, t_quantile};

/// The Wilson score interval of a share: `successes` of `n`.
///
/// Wilson (1927), "Probable inference, the law of succession, and statistical inference". Unlike the normal interval it
/// keeps its coverage near 0 and 1 and never leaves `[0, 1]`.
pub fn wilson(successes: u64, n: u64, level: f64) -> Option<Estimate> {
    if n == 0 {
        return None;
    }
    let (count, z) = (n as f64, normal_quantile(level));
    let share = successes as f64 / count;
    let shrink = 1.0 + z * z / count;
    let centre = (share + z * z / (2.0 * count)) / shrink;
    let half = z / shrink * (share * (1.0 - share) / count + z * z / (4.0 * count * count)).sqrt();
    // At 0 and n successes the formula gives exactly 0 and 1, but for rounding.
    let low = if successes == 0 { 0.0 } else { centre - half };
    let high = if successes == n { 1.0 } else { centre + half };
    Some(Estimate { mean: share, low: Some(low), high: Some(high), n: n as usize })
}

/// Student's interval of the mean of independent values; of a single value there is no interval.
pub fn t_interval(values: &[f64], level: f64) -> Option<Estimate> {
    if values.is_empty() {
        return None;
    }
    let (mean, deviation) = moments(values);
    if values.len() < 2 {
        return Some(Estimate { mean, low: None, high: None, n: 1 });
    }
    let n = values.len() as f64;
    let half = t_quantile(level, n - 1.0) * deviation / n.sqrt();
    Some(Estimate { mean, low: Some(mean - half), high: Some(mean + half), n: values.len() })
}

/// The interval of a mean: Wilson's where every value is 0 or 1, Student's otherwise.
#[expect(clippy::float_cmp, reason = "0 and 1 are written exactly by whoever counts successes")]
pub fn mean_interval(values: &[f64], level: f64) -> Option<Estimate> {
    if values.iter().all(|&value| value == 0.0 || value == 1.0) {
        let successes = values.iter().filter(|&&value| value == 1.0).count();
        return wilson(successes as u64, values.len() as u64, level);
    }
    t_interval(values, level)
}

/// The unbiased pass@k of one instance, `1 - C(n - c, k) / C(n, k)`: the chance that `k` of its `draws` hold a correct one.
///
/// Chen et al. (2021), "Evaluating large language models trained on code", equation 1, as a product that does not
/// overflow. It asks for `draws >= 2 k`: with fewer the variance makes the number useless.
pub fn pass_at_k(draws: u64, correct: u64, k: u64) -> Option<f64> {
    if k == 0 || correct > draws || draws < 2 * k {
        return None;
    }
    if draws - correct < k {
        return Some(1.0);
    }
    let all_wrong: f64 = (draws - correct + 1..=draws).map(|i| 1.0 - k as f64 / i as f64).product();
    Some(1.0 - all_wrong)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn near(found: Option<f64>, wanted: f64) {
        let found = found.expect("there is a bound");
        assert!((found - wanted).abs() < 1e-9, "{found} is not {wanted}");
    }

    #[test]
    fn wilson_is_what_scipy_says() {
        // scipy.stats.binomtest(86, 100).proportion_ci(0.95, "wilson")
        let estimate = wilson(86, 100, 0.95).unwrap();
        near(estimate.low, 0.778_628_117_890);
        near(estimate.high, 0.914_736_563_401);
        let none = wilson(0, 20, 0.95).unwrap();
        near(none.low, 0.0);
        near(none.high, 0.161_125_158_053);
        let all = wilson(20, 20, 0.95).unwrap();
        near(all.high, 1.0);
        near(all.low, 1.0 - 0.161_125_158_053);
        assert_eq!(wilson(0, 0, 0.95), None);
    }

    #[test]
    fn t_is_what_scipy_says() {
        // scipy.stats.t.interval(0.95, 4, loc, scipy.stats.sem([1, 2, 4, 8, 9.5]))
        let estimate = t_interval(&[1.0, 2.0, 4.0, 8.0, 9.5], 0.95).unwrap();
        near(Some(estimate.mean), 4.9);
        near(estimate.low, 0.287_422_967_016);
        near(estimate.high, 9.512_577_032_984);
        assert_eq!(t_interval(&[3.0], 0.95).unwrap().low, None);
        assert_eq!(t_interval(&[], 0.95), None);
    }

    #[test]
    fn a_share_gets_wilson_and_a_measurement_t() {
        assert_eq!(mean_interval(&[1.0, 0.0, 1.0], 0.95), wilson(2, 3, 0.95));
        assert_eq!(mean_interval(&[1.0, 0.5, 1.0], 0.95), t_interval(&[1.0, 0.5, 1.0], 0.95));
    }

    #[test]
    fn pass_at_k_is_the_share_of_subsets_with_a_success() {
        // Of the C(4, 2) = 6 pairs of draws, 3 hold the one correct draw.
        near(pass_at_k(4, 1, 2), 0.5);
        near(pass_at_k(10, 3, 1), 0.3);
        near(pass_at_k(10, 3, 5), 1.0 - 21.0 / 252.0);
        near(pass_at_k(4, 3, 2), 1.0);
        assert_eq!(pass_at_k(3, 1, 2), None, "too few draws for k");
    }
}
