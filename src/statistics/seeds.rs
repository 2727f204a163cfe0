//! Claims about a recipe (claim B): what another training run of it would give, known only from several seeds.

use statrs::distribution::{ContinuousCDF as _, StudentsT};

use super::mean::t_interval;
use super::{Difference, Estimate, moments};

/// Fewer seeds than this carry no interval: with 2 to 4 the t quantile is 12.7 to 3.2 and the deviation itself unknown.
pub const FEWEST: usize = 5;

/// Why a claim over seeds was refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("a claim about the recipe needs at least {FEWEST} seeds, found {found}")]
pub struct TooFewSeeds {
    /// How many there are.
    pub found: usize,
}

/// Student's interval of the mean over seeds; one value a seed.
pub fn over_seeds(values: &[f64], level: f64) -> Result<Estimate, TooFewSeeds> {
    let too_few = TooFewSeeds { found: values.len() };
    if values.len() < FEWEST {
        return Err(too_few);
    }
    let estimate = t_interval(values, level).ok_or(too_few)?;
    // Seeds that agree to the last bit are one result told several times (a stage that the seed does not reach), not a
    // recipe without spread.
    let alike = values.iter().all(|value| value.to_bits() == values[0].to_bits());
    Ok(if alike { Estimate { low: None, high: None, ..estimate } } else { estimate })
}

/// The one-sample t test and interval of per-seed differences (first minus second arm under the same seed).
///
/// Student (1908); the pairing by seed is Colas et al. 2018, "How many random seeds?", section 3.
pub fn difference_over_seeds(differences: &[f64], level: f64) -> Result<Difference, TooFewSeeds> {
    let estimate = over_seeds(differences, level)?;
    let (mean, deviation) = moments(differences);
    let n = differences.len() as f64;
    // No spread and a difference: see `over_seeds`. Nothing is shown by it.
    let p = if deviation > 0.0 {
        let t = mean.abs() / (deviation / n.sqrt());
        Some(2.0 * StudentsT::new(0.0, 1.0, n - 1.0).expect("there are at least five seeds").sf(t))
    } else {
        (mean == 0.0).then_some(1.0)
    };
    Ok(Difference { mean, low: estimate.low, high: estimate.high, n: estimate.n, p })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_test_is_scipys() {
        // scipy.stats.ttest_1samp([.03, .05, -.01, .04, .02], 0)
        let found = difference_over_seeds(&[0.03, 0.05, -0.01, 0.04, 0.02], 0.95).unwrap();
        assert!((found.p.unwrap() - 0.064_985_910_342).abs() < 1e-9);
        assert!((found.low.unwrap() - -0.002_585_251_910).abs() < 1e-9);
        assert!((found.high.unwrap() - 0.054_585_251_910).abs() < 1e-9);
        assert_eq!(found.n, 5);
    }

    #[test]
    fn one_result_told_five_times_shows_nothing() {
        let copies = over_seeds(&[0.7; 5], 0.95).unwrap();
        assert_eq!((copies.mean, copies.low, copies.high), (0.7, None, None));
        let difference = difference_over_seeds(&[0.1; 5], 0.95).unwrap();
        assert_eq!((difference.low, difference.high, difference.p), (None, None, None));
    }

    #[test]
    fn four_seeds_are_refused() {
        let refused = difference_over_seeds(&[0.1; 4], 0.95).unwrap_err();
        assert_eq!(refused.to_string(), "a claim about the recipe needs at least 5 seeds, found 4");
        assert_eq!(difference_over_seeds(&[0.0; 5], 0.95).unwrap().p, Some(1.0));
    }
}
