//! One metric of one arm over its seeds, and what may be claimed of it.
//!
//! Instances and seeds are crossed. With five seeds or more a table speaks of the recipe (claim B): one number a seed is
//! an observation. With fewer it speaks of these checkpoints (claim A): an instance's mean over the seeds is one.

use std::collections::BTreeMap;
use std::sync::Arc;

use serde::Serialize;

use crate::cli::results::Values;
use crate::statistics::mean::mean_interval;
use crate::statistics::paired::clustered_difference;
use crate::statistics::seeds::{FEWEST, difference_over_seeds, over_seeds};
use crate::statistics::{Difference, Estimate, LEVEL};

/// What a table's intervals are about.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub enum Claim {
    /// These checkpoints, on other instances of the same kind.
    #[serde(rename = "A")]
    Checkpoints,
    /// The recipe: what another seed would give.
    #[serde(rename = "B")]
    Recipe,
}

impl Claim {
    /// What the seeds of the arm that has the fewest allow.
    pub fn of(fewest_seeds: usize) -> Self {
        if fewest_seeds >= FEWEST { Self::Recipe } else { Self::Checkpoints }
    }
}

/// One metric of one arm, by seed (as text; empty where seeds are not swept).
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Sample {
    /// The values of each seed that has a result.
    pub seeds: BTreeMap<String, Values>,
}

impl Sample {
    /// Whether every value of every instance is 0 or 1.
    #[expect(clippy::float_cmp, reason = "0 and 1 are written exactly by whoever counts successes")]
    pub fn is_share(&self) -> bool {
        self.seeds.values().all(|values| match values {
            Values::Instances(by_instance) => by_instance.values().all(|&value| value == 0.0 || value == 1.0),
            Values::Whole(_) => false,
        })
    }

    /// The mean and the interval that `claim` allows; `None` without any result.
    pub fn estimate(&self, claim: Claim) -> Option<Estimate> {
        let by_seed: Vec<f64> = self.seeds.values().map(mean).collect();
        match (claim, self.by_instance()) {
            (Claim::Recipe, _) => over_seeds(&by_seed, LEVEL).ok().or_else(|| bare(&by_seed)),
            (Claim::Checkpoints, Some(clusters)) => {
                let means: Vec<f64> = clusters.values().map(|values| average(values)).collect();
                mean_interval(&means, LEVEL)
            }
            (Claim::Checkpoints, None) => bare(&by_seed),
        }
    }

    /// This minus `other`, paired by instance and seed; `None` where no pair is shared.
    pub fn minus(&self, other: &Self, claim: Claim) -> Option<Difference> {
        let mut paired: Vec<(&Arc<str>, f64)> = Vec::new();
        let mut by_seed = Vec::new();
        let mut whole = false;
        for (seed, first) in &self.seeds {
            let Some(second) = other.seeds.get(seed) else { continue };
            let (Values::Instances(first), Values::Instances(second)) = (first, second) else {
                whole = true;
                by_seed.push(mean(first) - mean(second));
                continue;
            };
            // Both are sorted, so one walk along the two finds the pairs.
            let (begin, mut others) = (paired.len(), second.iter().peekable());
            for (instance, value) in first {
                while others.next_if(|(other, _)| *other < instance).is_some() {}
                if let Some((_, against)) = others.next_if(|(other, _)| *other == instance) {
                    paired.push((instance, value - against));
                }
            }
            let differences = &paired[begin..];
            if !differences.is_empty() {
                let sum: f64 = differences.iter().map(|(_, difference)| difference).sum();
                by_seed.push(sum / differences.len() as f64);
            }
        }
        let unproven = || {
            let estimate = bare(&by_seed)?;
            Some(Difference { mean: estimate.mean, low: None, high: None, n: estimate.n, p: None })
        };
        match claim {
            Claim::Recipe => difference_over_seeds(&by_seed, LEVEL).ok().or_else(unproven),
            Claim::Checkpoints if whole => unproven(),
            Claim::Checkpoints => {
                paired.sort_by_key(|(instance, _)| *instance);
                let clusters = paired.chunk_by(|one, other| one.0 == other.0);
                let clusters = clusters.map(|cluster| cluster.iter().map(|(_, difference)| *difference).collect());
                clustered_difference(&clusters.collect::<Vec<Vec<f64>>>(), LEVEL)
            }
        }
    }

    /// The values of each instance over the seeds; `None` where a seed has but one number.
    fn by_instance(&self) -> Option<BTreeMap<&Arc<str>, Vec<f64>>> {
        let mut clusters: BTreeMap<&Arc<str>, Vec<f64>> = BTreeMap::new();
        for values in self.seeds.values() {
            let Values::Instances(by_instance) = values else { return None };
            for (instance, value) in by_instance {
                clusters.entry(instance).or_default().push(*value);
            }
        }
        Some(clusters)
    }
}

/// The mean of one seed.
pub fn mean(values: &Values) -> f64 {
    match values {
        Values::Instances(by_instance) => by_instance.values().sum::<f64>() / by_instance.len() as f64,
        Values::Whole(value) => *value,
    }
}

fn average(values: &[f64]) -> f64 {
    values.iter().sum::<f64>() / values.len() as f64
}

/// A mean that nothing more can be said of.
fn bare(values: &[f64]) -> Option<Estimate> {
    (!values.is_empty()).then(|| Estimate { mean: average(values), low: None, high: None, n: values.len() })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::statistics::mean::wilson;
    use crate::statistics::paired::paired_difference;

    fn instances(values: &[f64]) -> Values {
        Values::Instances(
            values.iter().enumerate().map(|(place, &value)| (format!("i{place}").into(), value)).collect(),
        )
    }

    fn sample(seeds: &[&[f64]]) -> Sample {
        Sample { seeds: seeds.iter().enumerate().map(|(seed, values)| (seed.to_string(), instances(values))).collect() }
    }

    #[test]
    fn one_seed_speaks_of_its_checkpoint() {
        let (a, b) = ([1.0, 1.0, 0.0, 1.0], [0.0, 1.0, 0.0, 0.0]);
        let (first, second) = (sample(&[&a]), sample(&[&b]));
        assert!(first.is_share());
        assert_eq!(first.estimate(Claim::of(1)), wilson(3, 4, LEVEL));
        assert_eq!(first.minus(&second, Claim::Checkpoints), paired_difference(&a, &b, LEVEL));
    }

    #[test]
    fn few_seeds_are_clustered_by_instance() {
        let three = sample(&[&[1.0, 0.0], &[1.0, 1.0], &[0.0, 1.0]]);
        let found = three.estimate(Claim::of(3)).unwrap();
        assert_eq!(found.n, 2, "the instance is the unit");
        assert!((found.mean - 4.0 / 6.0).abs() < 1e-12);
    }

    #[test]
    fn five_seeds_speak_of_the_recipe() {
        let up: Vec<Vec<f64>> = (0..5).map(|seed| vec![1.0, f64::from(seed % 2), 1.0]).collect();
        let up = sample(&up.iter().map(Vec::as_slice).collect::<Vec<_>>());
        let down: [&[f64]; 5] = [&[0.0, 0.0, 1.0]; 5];
        let down = sample(&down);
        let found = up.minus(&down, Claim::of(5)).unwrap();
        assert_eq!(found.n, 5, "the seed is the unit");
        assert!(found.p.unwrap() < 0.01);
        assert_eq!(up.estimate(Claim::Recipe).unwrap().n, 5);
    }

    #[test]
    fn single_numbers_and_missing_pairs_carry_no_interval() {
        let whole = Sample { seeds: [("1".to_owned(), Values::Whole(0.4))].into() };
        let estimate = whole.estimate(Claim::Checkpoints).unwrap();
        assert_eq!((estimate.low, estimate.n), (None, 1));
        assert_eq!(whole.minus(&whole, Claim::Checkpoints).unwrap().p, None);
        let elsewhere = Sample { seeds: [("2".to_owned(), Values::Whole(0.4))].into() };
        assert_eq!(whole.minus(&elsewhere, Claim::Checkpoints), None);
        assert_eq!(Sample::default().estimate(Claim::Checkpoints), None);
    }

    #[test]
    fn only_shared_instances_are_paired() {
        let first = Sample { seeds: [("1".to_owned(), instances(&[1.0, 1.0, 0.0]))].into() };
        let second = Sample { seeds: [("1".to_owned(), instances(&[1.0, 0.0]))].into() };
        let found = first.minus(&second, Claim::Checkpoints).unwrap();
        assert_eq!((found.n, found.mean.to_bits()), (2, 0.5f64.to_bits()));
    }
}
