//! Differences between two measurements of the same instances (claim A: about these checkpoints).

use super::permutation::sign_flip;
use super::{Difference, mean::t_interval};

/// The paired difference of `a` minus `b`, which hold the same independent instances in the same order.
///
/// The interval is Student's on the per-instance differences; p is the sign-flip permutation test's. Pairing removes the
/// variance that the instances share (Dror et al. 2018, "The hitchhiker's guide to testing statistical significance").
pub fn paired_difference(a: &[f64], b: &[f64], level: f64) -> Option<Difference> {
    assert_eq!(a.len(), b.len(), "paired values come in equal numbers");
    let differences: Vec<f64> = a.iter().zip(b).map(|(a, b)| a - b).collect();
    of_differences(&differences, level)
}

/// The same where each instance was measured several times (seeds, draws): `clusters` holds the differences of each.
///
/// An instance's differences are not independent, so its mean is one observation: the unit of the interval and of the
/// permutation is the instance (Miller 2024, "Adding error bars to evals", section 2.2, with clusters of one instance).
pub fn clustered_difference(clusters: &[Vec<f64>], level: f64) -> Option<Difference> {
    let means: Vec<f64> = clusters
        .iter()
        .filter(|cluster| !cluster.is_empty())
        .map(|cluster| cluster.iter().sum::<f64>() / cluster.len() as f64)
        .collect();
    of_differences(&means, level)
}

fn of_differences(differences: &[f64], level: f64) -> Option<Difference> {
    let estimate = t_interval(differences, level)?;
    let p = Some(sign_flip(differences));
    // Student's interval of differences that are all alike has no width, which would say that there can be no others.
    let alike = differences.iter().all(|value| value.to_bits() == differences[0].to_bits());
    let (low, high) = if alike { (None, None) } else { (estimate.low, estimate.high) };
    Some(Difference { mean: estimate.mean, low, high, n: estimate.n, p })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_interval_is_scipys_for_the_differences() {
        // scipy.stats.ttest_rel(a, b).confidence_interval(0.95)
        let (a, b) = ([1.0, 1.0, 0.0, 1.0, 1.0, 0.0], [0.0, 1.0, 0.0, 0.0, 1.0, 1.0]);
        let found = paired_difference(&a, &b, 0.95).unwrap();
        assert!((found.mean - 1.0 / 6.0).abs() < 1e-12);
        assert!((found.low.unwrap() - -0.623_319_783_825).abs() < 1e-9);
        assert!((found.high.unwrap() - 0.956_653_117_159).abs() < 1e-9);
        assert_eq!(found.p, Some(1.0), "two gained, one lost");
        assert_eq!(paired_difference(&[], &[], 0.95), None);
    }

    #[test]
    fn differences_that_are_all_alike_have_no_interval() {
        let same = paired_difference(&[1.0, 0.0, 1.0], &[1.0, 0.0, 1.0], 0.95).unwrap();
        assert_eq!((same.mean, same.low, same.high, same.p), (0.0, None, None, Some(1.0)));
        let apart = paired_difference(&[1.0; 9], &[0.0; 9], 0.95).unwrap();
        assert_eq!((apart.mean, apart.low), (1.0, None));
        assert!((apart.p.unwrap() - 2.0 / 512.0).abs() < 1e-12);
    }

    #[test]
    fn repeating_a_measurement_adds_no_evidence() {
        let once: Vec<Vec<f64>> = [1.0, 0.0, 1.0, -1.0, 1.0, 0.5].iter().map(|&value| vec![value]).collect();
        let often: Vec<Vec<f64>> = once.iter().map(|cluster| cluster.repeat(5)).collect();
        let (once, often) = (clustered_difference(&once, 0.95).unwrap(), clustered_difference(&often, 0.95).unwrap());
        assert_eq!(once.n, often.n);
        assert!((once.low.unwrap() - often.low.unwrap()).abs() < 1e-12);
        assert_eq!(once.p, often.p);
    }
}
