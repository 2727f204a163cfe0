//! Which rows a data set has: how lengths are spread, and which layouts each split may draw from.

use std::collections::BTreeMap;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::{Candidate, Synthesize};
use crate::pipeline::stage::Problem;
use crate::random;

/// How path lengths are spread.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Lengths {
    /// As the task draws them.
    #[default]
    Natural,
    /// Every length from `min_length` to `max_length` equally often in every split.
    Balanced,
    /// A share of the rows of every split as the task draws them, the others balanced.
    Mixed,
}

/// A part of a composition: instances of some lengths, as the task draws them.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Band {
    /// Moves of the shortest path, at least.
    #[schemars(range(min = 1))]
    pub min: u64,
    /// Moves of the shortest path, at most.
    #[schemars(range(min = 1))]
    pub max: u64,
    /// The share of the rows of every split.
    #[schemars(range(min = 0.0, max = 1.0))]
    pub share: f64,
}

/// Rows that are counted together.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Class {
    /// All.
    Any,
    /// Those of one path length.
    Length(u64),
    /// Those of a part of the composition.
    Band(usize),
}

impl Synthesize {
    pub(super) fn check_composition(&self) -> Vec<Problem> {
        let mut problems = Vec::new();
        if self.composition.is_empty() {
            return problems;
        }
        let mut complain = |message: String| problems.push(Problem::new("composition", message));
        if self.lengths != Lengths::Natural {
            complain("`composition` and `lengths` both say how lengths are spread".to_owned());
        }
        for (at, band) in self.composition.iter().enumerate() {
            let Band { min, max, .. } = *band;
            if min > max || max > self.longest() {
                let longest = self.longest();
                complain(format!(
                    "no path has {min} to {max} moves: at least `min`, at most `max`, never above {longest}"
                ));
            }
            if let Some(other) = self.composition[..at].iter().find(|other| other.min <= max && min <= other.max) {
                complain(format!("{min} to {max} moves and {} to {} moves overlap", other.min, other.max));
            }
        }
        let sum: f64 = self.composition.iter().map(|band| band.share).sum();
        if !is_whole(sum) {
            complain(format!("the shares sum to {sum}, not to 1"));
        }
        problems
    }

    pub(super) fn check_shares(&self) -> Vec<Problem> {
        let mut problems = Vec::new();
        if self.shares.is_empty() {
            return problems;
        }
        let sum: f64 = self.shares.values().sum();
        if !is_whole(sum) {
            problems.push(Problem::new("shares", format!("the shares sum to {sum}, not to 1")));
        }
        for (name, share) in &self.shares {
            if *share <= 0.0 {
                problems.push(Problem::new(format!("shares.{name}"), format!("the share of `{name}` is {share}")));
            }
        }
        for name in self.splits.keys().filter(|name| !self.shares.contains_key(*name)) {
            let problem = Problem::new("shares", format!("the split `{name}` has no share"));
            problems.push(problem.hint("name the share of every split; they sum to 1"));
        }
        problems
    }

    /// How many rows of each class a split of `rows` has.
    pub(super) fn wanted(&self, rows: u64) -> BTreeMap<Class, u64> {
        if !self.composition.is_empty() {
            return composed(&self.composition, rows);
        }
        let balanced = match self.lengths {
            Lengths::Natural => 0,
            Lengths::Balanced => rows,
            Lengths::Mixed => (self.balanced_share * rows as f64).round() as u64,
        };
        let mut wanted = BTreeMap::new();
        if self.lengths != Lengths::Balanced {
            wanted.insert(Class::Any, rows - balanced);
        }
        if self.lengths != Lengths::Natural {
            let lengths = self.min_length.unwrap_or(1)..=self.max_length.unwrap_or(self.longest());
            let count = lengths.clone().count() as u64;
            // What does not divide evenly goes to the shortest lengths, which are never scarce.
            let each = lengths.enumerate();
            wanted.extend(each.map(|(at, length)| {
                (Class::Length(length), balanced / count + u64::from((at as u64) < balanced % count))
            }));
        }
        wanted
    }

    /// The class in which a candidate may take a row; `None` where it may take none.
    pub(super) fn class(&self, candidate: &Candidate) -> Option<Class> {
        let length = candidate.row.length.unwrap_or(0);
        if !self.composition.is_empty() {
            let within = |band: &Band| (band.min..=band.max).contains(&length);
            return self.composition.iter().position(within).map(Class::Band);
        }
        // A coin of the candidate's own, so that the natural part is not what balancing has left over.
        let is_balanced = match self.lengths {
            Lengths::Natural => false,
            Lengths::Balanced => true,
            Lengths::Mixed => random::unit(candidate.coin) < self.balanced_share,
        };
        Some(if is_balanced { Class::Length(length) } else { Class::Any })
    }

    /// What a class is called where rows of it are missing.
    pub(super) fn name(&self, class: Class, rows: u64) -> String {
        match class {
            Class::Any => format!("{rows} rows"),
            Class::Length(length) => format!("{rows} of length {length}"),
            Class::Band(at) => format!("{rows} of {} to {} moves", self.composition[at].min, self.composition[at].max),
        }
    }
}

/// Whether shares are all there is.
fn is_whole(sum: f64) -> bool {
    (sum - 1.0).abs() < 1e-9
}

/// Rows by part: shares of `rows`, what does not divide evenly to those that lose most, the first of equals first.
fn composed(composition: &[Band], rows: u64) -> BTreeMap<Class, u64> {
    let exact: Vec<f64> = composition.iter().map(|band| band.share * rows as f64).collect();
    // A share of 0.1 times 1,000 is a little more or less than 100.
    let mut counts: Vec<u64> = exact.iter().map(|count| (count + 1e-6).floor() as u64).collect();
    let mut order: Vec<usize> = (0..counts.len()).collect();
    order.sort_by(|&one, &other| {
        let lost = |at: usize| exact[at] - counts[at] as f64;
        lost(other).total_cmp(&lost(one)).then(one.cmp(&other))
    });
    let missing = rows.saturating_sub(counts.iter().sum());
    order.into_iter().cycle().take(missing as usize).for_each(|at| counts[at] += 1);
    counts.into_iter().enumerate().map(|(at, count)| (Class::Band(at), count)).collect()
}

/// The range of 128-bit hashes that each split owns, the last one up to the highest hash: consecutive in the order of
/// names, each as wide as its share, or the root of its rows, has it.
pub(super) fn hash_ranges(stage: &Synthesize) -> BTreeMap<&str, (u128, u128)> {
    let weights: BTreeMap<&str, f64> = if stage.shares.is_empty() {
        stage.splits.iter().map(|(name, &rows)| (name.as_str(), (rows as f64).sqrt())).collect()
    } else {
        stage.shares.iter().map(|(name, &share)| (name.as_str(), share)).collect()
    };
    let total: f64 = weights.values().sum();
    let (mut sum, mut begin) = (0.0, 0);
    let last = weights.len().saturating_sub(1);
    let ranges = weights.into_iter().enumerate().map(|(at, (name, weight))| {
        sum += weight;
        // 2^53 steps are enough, and exact on every machine.
        let end = if at == last { u128::MAX } else { ((sum / total * (1u64 << 53) as f64) as u128) << 75 };
        let range = (begin, end);
        begin = end;
        (name, range)
    });
    ranges.collect()
}
