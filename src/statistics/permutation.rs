//! The sign-flip permutation test of paired differences.
//!
//! If there is no difference, each pair could as well have come out the other way round: the test asks how often random
//! signs give a sum at least as far from 0 as the one seen (Fisher 1935; for 0/1 outcomes it is McNemar's exact test).

use rand::Rng as _;
use rand_chacha::ChaCha8Rng;
use statrs::distribution::{Binomial, Continuous as _, ContinuousCDF as _, DiscreteCDF as _, Normal};

use crate::random;

/// Random sign vectors where enumeration would take too long and there are too few for a tail in closed form.
const FLIPS: u64 = 10_000;

/// At most this many unequal differences are enumerated: 65,536 sign vectors.
const ENUMERATED: usize = 16;

/// As many differences of one size as the unequal ones have to be worth (their kurtosis says) for a tail in closed form.
const MANY: f64 = 64.0;

/// The two-sided p that independent differences are symmetric about 0. Zeros are concordant pairs and say nothing.
///
/// Exact where all differences are of one size (a binomial) or few. Of many it is the saddlepoint approximation of the
/// permutation distribution's tail (Robinson 1982), whose relative error is below one percent however far out. Between the
/// two it comes from 10,000 seeded random sign vectors with the seen one counted among them (Phipson and Smyth 2010), so
/// that it is never 0 and the same every time.
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
    if sizes.len() <= ENUMERATED {
        return enumerate(&sizes, threshold);
    }
    let groups = grouped(&sizes, tolerance);
    let moment = |power: i32| groups.iter().map(|&(size, count)| f64::from(count) * size.powi(power)).sum::<f64>();
    if moment(2).powi(2) >= MANY * moment(4) {
        tail(&groups, threshold + tolerance, tolerance)
    } else {
        sample(&groups, threshold)
    }
}

/// Sizes with how often each comes, from the smallest on.
fn grouped(sizes: &[f64], tolerance: f64) -> Vec<(f64, u32)> {
    let mut groups: Vec<(f64, u32)> = Vec::new();
    for &size in sizes {
        match groups.last_mut() {
            Some((value, count)) if size - *value <= tolerance => *count += 1,
            _ => groups.push((size, 1)),
        }
    }
    groups
}

/// The chance that random signs give a sum as far from 0 as `sum`: Lugannani and Rice (1980), with the second continuity
/// correction of Daniels (1987) where the sums lie on a lattice.
fn tail(groups: &[(f64, u32)], sum: f64, tolerance: f64) -> f64 {
    let over =
        |term: &dyn Fn(f64) -> f64| groups.iter().map(|&(size, count)| f64::from(count) * term(size)).sum::<f64>();
    let half_step = lattice(groups, tolerance);
    let reached = sum - half_step;
    if reached <= 0.0 {
        return 1.0;
    }
    if reached >= over(&|size| size) - tolerance {
        return 2.0 * 0.5_f64.powf(over(&|_| 1.0));
    }
    // The cumulants' derivative is concave from 0 on, so Newton's steps come from the left and never overshoot.
    let mut tilt = 0.0;
    for _ in 0..100 {
        let slope = over(&|size| (size / (tilt * size).cosh()).powi(2));
        let step = (reached - over(&|size| size * (tilt * size).tanh())) / slope;
        if !step.is_finite() {
            break;
        }
        tilt += step;
        if step.abs() <= 1e-10 * tilt {
            break;
        }
    }
    let log_cosh = |x: f64| x + (-2.0 * x).exp().ln_1p() - std::f64::consts::LN_2;
    let deviance = (2.0 * (tilt * reached - over(&|size| log_cosh(tilt * size)))).max(0.0).sqrt();
    let spread = over(&|size| (size / (tilt * size).cosh()).powi(2)).sqrt();
    let tilted = if half_step > 0.0 { (tilt * half_step).sinh() / half_step } else { tilt };
    let normal = Normal::standard();
    let beyond = normal.sf(deviance) + normal.pdf(deviance) * correction(tilted * spread, deviance);
    (2.0 * beyond).clamp(f64::MIN_POSITIVE, 1.0)
}

/// `1 / u - 1 / w`, which goes to 0 in the middle of a symmetric distribution, where neither can be divided by.
fn correction(u: f64, w: f64) -> f64 {
    if w > 1e-4 { 1.0 / u - 1.0 / w } else { 0.0 }
}

/// The greatest number of which every size is a multiple: two sums are twice that apart. 0 where there is none to speak of.
fn lattice(groups: &[(f64, u32)], tolerance: f64) -> f64 {
    let mut unit = groups[0].0;
    for &(size, _) in groups {
        let mut rest = size;
        while rest > 1e3 * tolerance {
            let left = unit % rest;
            // What is nearly a whole multiple is one.
            (unit, rest) = (rest, if rest - left <= 1e3 * tolerance { 0.0 } else { left });
        }
        if unit < 1e6 * tolerance {
            return 0.0;
        }
    }
    unit
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
fn sample(groups: &[(f64, u32)], threshold: f64) -> f64 {
    let pairs: u32 = groups.iter().map(|(_, count)| count).sum();
    let mut bits = Bits { stream: random::rng("sign flip", &[u64::from(pairs)]), word: 0, left: 0 };
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
    fn many_differences_come_near_the_normal_limit_and_always_alike() {
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

    /// The exact p of integer sizes, from the number of sign vectors for every sum.
    fn counted(differences: &[i32]) -> f64 {
        let total: i32 = differences.iter().map(|value| value.abs()).sum();
        let mut chance = vec![0.0; 2 * total as usize + 1];
        chance[total as usize] = 1.0;
        for size in differences.iter().map(|value| value.unsigned_abs() as usize).filter(|size| *size > 0) {
            let mut next = vec![0.0; chance.len()];
            for (at, mass) in chance.iter().enumerate().filter(|(_, mass)| **mass > 0.0) {
                next[at - size] += mass / 2.0;
                next[at + size] += mass / 2.0;
            }
            chance = next;
        }
        let seen = differences.iter().sum::<i32>().unsigned_abs() as usize;
        let is_far = |at: usize| at.abs_diff(total as usize) >= seen;
        chance.iter().enumerate().filter(|(at, _)| is_far(*at)).map(|(_, mass)| mass).sum()
    }

    #[test]
    fn the_tail_of_many_differences_is_the_exact_one_within_a_percent() {
        for (pairs, above, every) in [(120, 3, 1), (300, 5, 1), (300, 13, 1), (900, 12, 7), (400, 2, 3), (2000, 3, 1)] {
            for lead in [0, 1, 2, 4, 7, 12] {
                let sign = |place: i32| if place % 20 < 10 + lead / 2 && place % 3 != 0 { 1 } else { -1 };
                let differences: Vec<i32> =
                    (0..pairs).map(|place| sign(place) * (1 + (place * 7 / every) % above)).collect();
                let (exact, values) = (counted(&differences), differences.iter().map(|value| f64::from(*value)));
                // Means over three seeds lie on a lattice of thirds.
                for scale in [1.0, 1.0 / 3.0] {
                    let p = sign_flip(&values.clone().map(|value| value * scale).collect::<Vec<_>>());
                    assert!((p / exact - 1.0).abs() < 0.01, "{p} against {exact}: {pairs} {above} {lead} {scale}");
                }
            }
        }
    }

    #[test]
    fn one_difference_that_outweighs_all_others_is_left_to_sampling() {
        let mut differences = vec![1000.0];
        differences.extend((0..200).map(|place| if place % 2 == 0 { 1.5 } else { -1.0 }));
        // The others sum to 50, 2.8 of their deviations, and have to fall on the side of the one; a smooth tail says 0.29.
        let p = sign_flip(&differences);
        assert!((0.001..0.01).contains(&p), "{p}");
    }

    #[test]
    fn grouped_heads_follow_the_binomial() {
        let mut bits = Bits { stream: random::rng("heads", &[]), word: 0, left: 0 };
        let counts: Vec<f64> = (0..4000).map(|_| f64::from(bits.heads(100))).collect();
        let (mean, deviation) = super::super::moments(&counts);
        assert!((mean - 50.0).abs() < 0.4 && (deviation - 5.0).abs() < 0.3, "{mean} {deviation}");
    }
}
