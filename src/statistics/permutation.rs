//! The sign-flip permutation test of paired differences.
//!
//! If there is no difference, each pair could as well have come out the other way round: the test asks how often random
//! signs give a sum at least as far from 0 as the one seen (Fisher 1935; for 0/1 outcomes it is McNemar's exact test).

use rand::Rng as _;
use rand_chacha::ChaCha8Rng;
use statrs::distribution::{Binomial, DiscreteCDF as _};

use crate::random;

/// Random sign vectors where enumeration would take too long.
const FLIPS: u64 = 10_000;

/// At most this many unequal differences are enumerated: 65,536 sign vectors.
const ENUMERATED: usize = 16;

/// The two-sided p that independent differences are symmetric about 0. Zeros are concordant pairs and say nothing.
///
/// Exact where all differences are of one size (a binomial) or few; otherwise from 10,000 seeded random sign vectors with
/// the seen one counted among them (Phipson and Smyth 2010), so that it is never 0 and the same every time.
pub fn sign_flip(differences: &[f64]) -> f64 {
    let mut sizes: Vec<f64> = differences.iter().map(|value| value.abs()).filter(|&size| size > 0.0).collect();
    sizes.sort_by(f64::total_cmp);
    let (Some(&smallest), Some(&largest)) = (sizes.first(), sizes.last()) else { return 1.0 };
    // Means over seeds come out of a division: sizes that differ in the last bits are the same size.
    let tolerance = largest * 1e-9;
    if largest - smallest <= tolerance {
        let positive = differences.iter().filter(|&&value| value > 0.0).count() as u64;
        return two_sided_sign(positive, sizes.len() as u64);
    }
    let threshold = differences.iter().sum::<f64>().abs() - tolerance;
    if sizes.len() <= ENUMERATED { enumerate(&sizes, threshold) } else { sample(&sizes, threshold, tolerance) }
}

/// Twice the smaller tail of `positive` heads in `n` fair throws, at most 1.
fn two_sided_sign(positive: u64, n: u64) -> f64 {
    let tail = positive.min(n - positive);
    let fair = Binomial::new(0.5, n).expect("a half is a probability");
    (2.0 * fair.cdf(tail)).min(1.0)
}

/// The share of all sign vectors whose sum is as far from 0 as `threshold`.
fn enumerate(sizes: &[f64], threshold: f64) -> f64 {
    let vectors = 1u32 << sizes.len();
    let extreme = (0..vectors).filter(|signs| {
        let sum: f64 =
            sizes.iter().enumerate().map(|(place, size)| if signs >> place & 1 == 1 { *size } else { -size }).sum();
        sum.abs() >= threshold
    });
    extreme.count() as f64 / f64::from(vectors)
}

/// The share of random sign vectors; pairs of one size are counted together, sixty-four to a word of random bits.
fn sample(sizes: &[f64], threshold: f64, tolerance: f64) -> f64 {
    let mut groups: Vec<(f64, u32)> = Vec::new();
    for &size in sizes {
        match groups.last_mut() {
            Some((value, count)) if size - *value <= tolerance => *count += 1,
            _ => groups.push((size, 1)),
        }
    }
    let mut bits = Bits { stream: random::rng("sign flip", &[sizes.len() as u64]), word: 0, left: 0 };
    let extreme = (0..FLIPS).filter(|_| {
        let sum: f64 = groups
            .iter()
            .map(|&(size, count)| {
                let heads = bits.heads(count);
                size * (2.0 * f64::from(heads) - f64::from(count))
            })
            .sum();
        sum.abs() >= threshold
    });
    (extreme.count() + 1) as f64 / (FLIPS + 1) as f64
}

/// Random bits, handed out without waste.
struct Bits {
    stream: ChaCha8Rng,
    word: u64,
    left: u32,
}

impl Bits {
    /// How many of `throws` fair throws are heads.
    fn heads(&mut self, mut throws: u32) -> u32 {
        let mut heads = 0;
        while throws > 0 {
            if self.left == 0 {
                (self.word, self.left) = (self.stream.next_u64(), 64);
            }
            let taken = throws.min(self.left);
            heads += (self.word & (u64::MAX >> (64 - taken))).count_ones();
            self.word = self.word.checked_shr(taken).unwrap_or(0);
            self.left -= taken;
            throws -= taken;
        }
        heads
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn zero_or_one_outcomes_give_the_exact_mcnemar_test() {
        // scipy.stats.binomtest(12, 17).pvalue: AlphaMaze's 86 against 93 of 100 with 12 gained and 5 lost.
        let mut differences = vec![0.0; 83];
        differences.extend([1.0; 12]);
        differences.extend([-1.0; 5]);
        assert!((sign_flip(&differences) - 0.143_463_134_766).abs() < 1e-12);
        assert!((sign_flip(&[1.0; 7]) - 2.0 / 128.0).abs() < 1e-12);
        assert_eq!(sign_flip(&[0.0; 9]).to_bits(), 1.0f64.to_bits());
        assert_eq!(sign_flip(&[1.0, -1.0]).to_bits(), 1.0f64.to_bits());
    }

    #[test]
    fn few_unequal_differences_are_enumerated() {
        // Of the 8 sums of +-1 +-2 +-4, only +7 and -7 reach 7, and 4 reach 5.
        assert!((sign_flip(&[1.0, 2.0, 4.0]) - 0.25).abs() < 1e-12);
        assert!((sign_flip(&[-1.0, 2.0, 4.0]) - 0.5).abs() < 1e-12);
    }

    #[test]
    fn many_differences_are_sampled_near_the_normal_limit_and_always_alike() {
        let mut stream = random::rng("test", &[1]);
        let differences: Vec<f64> = (0..400).map(|_| random::normal(&mut stream) + 0.12).collect();
        let p = sign_flip(&differences);
        assert_eq!(p.to_bits(), sign_flip(&differences).to_bits());
        let sum: f64 = differences.iter().sum();
        let deviation = differences.iter().map(|value| value * value).sum::<f64>().sqrt();
        let limit = 1.0 - super::super::level_within(sum.abs() / deviation);
        assert!((p - limit).abs() < 0.01, "{p} against {limit}");
        assert!(sign_flip(&(1..=200).map(f64::from).collect::<Vec<_>>()) > 0.0, "the seen vector counts");
    }

    #[test]
    fn grouped_heads_follow_the_binomial() {
        let mut bits = Bits { stream: random::rng("heads", &[]), word: 0, left: 0 };
        let counts: Vec<f64> = (0..4000).map(|_| f64::from(bits.heads(100))).collect();
        let (mean, deviation) = super::super::moments(&counts);
        assert!((mean - 50.0).abs() < 0.4 && (deviation - 5.0).abs() < 0.3, "{mean} {deviation}");
    }
}
