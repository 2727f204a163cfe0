//! The choice of one token from its logits: the sampler's law.
//!
//! Probabilities and their cumulative sum are in fp64; the first id whose cumulative sum exceeds u times the last is drawn.
//! With filters the law is that of the tokens they keep, renormalised, and the log-probability told is the one under it. Every
//! filter keeps a beginning of one order: the higher logit first, the lower id among equals.

mod rows;

use std::cmp::Ordering;
use std::collections::BinaryHeap;

use serde::{Deserialize, Serialize};

pub use rows::{draw_rows, table_bytes};

/// A token that was chosen.
#[derive(Clone, Debug, PartialEq)]
pub struct Choice {
    /// The token.
    pub id: i64,
    /// Its log-probability under the distribution that it was drawn from; a greedy choice has that of temperature 1.
    pub logprob: f32,
    /// The tokens that might have been drawn, ascending; empty where no filter was on.
    pub kept: Vec<u32>,
}

/// Which tokens may be drawn, of the distribution at the run's temperature. The filters apply in this order, as in
/// transformers, each to what the one before has left, renormalised.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Filter {
    /// This many of the most probable; 0 is all.
    pub top_k: usize,
    /// The fewest of the most probable that together reach this probability (nucleus sampling, Holtzman et al. 2020).
    pub top_p: f64,
    /// Those whose probability is at least this share of the highest.
    pub min_p: f64,
}

/// The tokens that might have been drawn at each place of a completion.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Kept {
    /// The sets one after another, each ascending.
    ids: Vec<u32>,
    /// Where each set ends in `ids`.
    ends: Vec<usize>,
}

impl Kept {
    /// Adds the set of the next place.
    pub fn push(&mut self, ids: &[u32]) {
        self.ids.extend(ids);
        self.ends.push(self.ids.len());
    }

    /// Adds the sets of a completion that follows.
    pub fn extend(&mut self, other: &Self) {
        (0..other.len()).for_each(|place| self.push(other.at(place)));
    }

    /// Places.
    pub fn len(&self) -> usize {
        self.ends.len()
    }

    /// Whether there is no place.
    pub fn is_empty(&self) -> bool {
        self.ends.is_empty()
    }

    /// The set of a place.
    pub fn at(&self, place: usize) -> &[u32] {
        let begin = if place == 0 { 0 } else { self.ends[place - 1] };
        &self.ids[begin..self.ends[place]]
    }
}

/// Chooses an id by `logits` and gives it with its log-probability; `None` when a logit is not finite.
///
/// At temperature 0 it is the highest logit, the lowest id among equals. Else it is the first id with
/// `cdf > u * cdf_last`, the unnormalised cumulative sum being formed in fp64 in the order of ids.
pub fn draw(logits: &[f32], temperature: f64, uniform: impl FnOnce() -> f64) -> Option<Choice> {
    let highest = highest(logits)?;
    let greedy = temperature == 0.0;
    let temperature = if greedy { 1.0 } else { temperature };
    let top = f64::from(logits[highest]);
    let scaled = |logit: f32| (f64::from(logit) - top) / temperature;
    let mut total = 0.0;
    let cumulative: Vec<f64> = logits
        .iter()
        .map(|&logit| {
            total += scaled(logit).exp();
            total
        })
        .collect();
    let id = if greedy {
        highest
    } else {
        let bound = uniform() * total;
        // u < 1, so the last id qualifies unless rounding lifted the product to the total itself.
        cumulative.iter().position(|&sum| sum > bound).unwrap_or(highest)
    };
    Some(Choice { id: id as i64, logprob: (scaled(logits[id]) - total.ln()) as f32, kept: Vec::new() })
}

/// As [`draw`] above temperature 0, from the tokens that `filter` keeps.
pub fn draw_filtered(
    logits: &[f32],
    temperature: f64,
    filter: &Filter,
    uniform: impl FnOnce() -> f64,
) -> Option<Choice> {
    let highest = highest(logits)?;
    let top = f64::from(logits[highest]);
    let scaled = |id: u32| (f64::from(logits[id as usize]) - top) / temperature;
    let kept = kept(logits, filter, scaled);
    let mut total = 0.0;
    let cumulative: Vec<f64> = kept
        .iter()
        .map(|&id| {
            total += scaled(id).exp();
            total
        })
        .collect();
    let bound = uniform() * total;
    let id = cumulative.iter().position(|&sum| sum > bound).map_or(highest as u32, |place| kept[place]);
    Some(Choice { id: i64::from(id), logprob: (scaled(id) - total.ln()) as f32, kept })
}

/// The ids that `filter` keeps, ascending, of the log-weights `scaled` (0 the highest).
fn kept(logits: &[f32], filter: &Filter, scaled: impl Fn(u32) -> f64) -> Vec<u32> {
    let Filter { top_k, top_p, min_p } = *filter;
    let mut waiting: BinaryHeap<Candidate> =
        logits.iter().zip(0..).map(|(&logit, id)| Candidate { logit, id }).collect::<Vec<_>>().into();
    let count = if top_k == 0 { logits.len() } else { top_k.min(logits.len()) };
    let mut best: Vec<u32> = Vec::new();
    // Without top-k the mass to reach a share of is that of all tokens, so only the nucleus need be put in order.
    let total: f64 = if count == logits.len() {
        (0..logits.len() as u32).map(|id| scaled(id).exp()).sum()
    } else {
        best.extend(std::iter::from_fn(|| waiting.pop()).take(count).map(|candidate| candidate.id));
        best.iter().map(|&id| scaled(id).exp()).sum()
    };
    let (mut mass, mut kept, mut place) = (0.0, Vec::new(), 0);
    while place < count {
        if place == best.len() {
            best.extend(waiting.pop().map(|candidate| candidate.id));
        }
        let id = best[place];
        let weight = scaled(id).exp();
        // A token is kept while those before it do not reach top-p; the first always is.
        let beyond = top_p < 1.0 && mass >= top_p * total;
        if place > 0 && (beyond || weight < min_p) {
            break;
        }
        kept.push(id);
        mass += weight;
        place += 1;
    }
    kept.sort_unstable();
    kept
}

/// A token in the order of filters: greater is to be taken before.
#[derive(PartialEq)]
struct Candidate {
    /// Finite.
    logit: f32,
    id: u32,
}

impl Eq for Candidate {}

impl Ord for Candidate {
    fn cmp(&self, other: &Self) -> Ordering {
        // Two zeros of different sign are equal logits, which `total_cmp` would tell apart.
        self.logit.partial_cmp(&other.logit).unwrap_or(Ordering::Equal).then_with(|| other.id.cmp(&self.id))
    }
}

impl PartialOrd for Candidate {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

/// The highest logit, the lowest id among equals; `None` when a logit is not finite.
fn highest(logits: &[f32]) -> Option<usize> {
    let mut highest = 0;
    for (id, logit) in logits.iter().enumerate() {
        if !logit.is_finite() {
            return None;
        }
        if *logit > logits[highest] {
            highest = id;
        }
    }
    (!logits.is_empty()).then_some(highest)
}

#[cfg(test)]
mod tests {
    use pipe::random::{rng, uniform_at};
    use proptest::prelude::*;

    use super::*;

    const ALL: Filter = Filter { top_k: 0, top_p: 1.0, min_p: 0.0 };

    #[test]
    fn frequencies_are_the_probabilities() {
        let logits = [0.5f32, -1.0, 2.0, 0.0];
        let weights: Vec<f64> = logits.iter().map(|logit| (f64::from(*logit) / 0.7).exp()).collect();
        let total: f64 = weights.iter().sum();
        let (draws, mut counts) = (20_000u64, [0f64; 4]);
        for index in 0..draws {
            let Choice { id, logprob, .. } =
                draw(&logits, 0.7, || uniform_at(&rng("sample", &[index]), 0)).expect("finite");
            counts[id as usize] += 1.0;
            assert!((f64::from(logprob) - (weights[id as usize] / total).ln()).abs() < 1e-6);
        }
        for (count, weight) in counts.iter().zip(&weights) {
            let p = weight / total;
            let deviation = (p * (1.0 - p) / draws as f64).sqrt();
            assert!((count / draws as f64 - p).abs() < 4.0 * deviation, "{count} for {p}");
        }
    }

    #[test]
    fn the_borders_of_the_sampler() {
        let only = |logits: &[f32], u: f64| draw(logits, 1.0, || u).map(|choice| choice.id);
        assert_eq!(only(&[0.0, 0.0], 0.0), Some(0));
        assert_eq!(only(&[0.0, 0.0], 0.5), Some(1), "strictly greater than");
        assert_eq!(only(&[-200.0, 0.0], 0.0), Some(0), "a tiny probability holds the beginning of its range");
        assert_eq!(only(&[0.0, f32::NAN], 0.5), None);
        assert_eq!(only(&[0.0, f32::NEG_INFINITY], 0.5), None);
        let unused = || -> f64 { unreachable!("greedy choice draws nothing") };
        assert_eq!(draw(&[1.0, 3.0, 3.0], 0.0, unused).map(|choice| choice.id), Some(1), "the lowest of equals");
        let Choice { logprob, .. } = draw(&[0.0, 0.0], 0.0, unused).expect("finite");
        assert!((f64::from(logprob) - 0.5f64.ln()).abs() < 1e-7);
    }

    /// The kept ids of a distribution with the given probabilities at temperature 1.
    fn kept_of(probabilities: &[f64], filter: &Filter) -> Vec<u32> {
        let logits: Vec<f32> = probabilities.iter().map(|p| p.ln() as f32).collect();
        draw_filtered(&logits, 1.0, filter, || 0.3).expect("finite").kept
    }

    #[test]
    fn filters_by_hand() {
        let p = [0.1, 0.4, 0.05, 0.25, 0.2];
        let keep = |top_k, top_p, min_p| kept_of(&p, &Filter { top_k, top_p, min_p });
        assert_eq!(keep(0, 1.0, 0.0), [0, 1, 2, 3, 4]);
        assert_eq!(keep(2, 1.0, 0.0), [1, 3]);
        assert_eq!(keep(9, 1.0, 0.0), [0, 1, 2, 3, 4]);
        // 0.4, 0.65, 0.85, 0.95: the token that crosses the line is in.
        assert_eq!(keep(0, 0.3, 0.0), [1]);
        assert_eq!(keep(0, 0.6, 0.0), [1, 3]);
        assert_eq!(keep(0, 0.7, 0.0), [1, 3, 4]);
        assert_eq!(keep(0, 0.9, 0.0), [0, 1, 3, 4]);
        // At least half, and at least a quarter, of 0.4 (0.1 is a quarter but for rounding, so just below is asked).
        assert_eq!(keep(0, 1.0, 0.49), [1, 3, 4]);
        assert_eq!(keep(0, 1.0, 0.24), [0, 1, 3, 4]);
        assert_eq!(keep(0, 1.0, 1.0), [1]);
        // Top-p is of what top-k leaves: 0.4 / 0.65 reaches 0.6, where 0.4 of all does not.
        assert_eq!(keep(2, 0.6, 0.0), [1]);
        assert_eq!(keep(4, 0.9, 0.45), [1, 3, 4]);
    }

    #[test]
    fn among_equals_the_lowest_ids_are_kept() {
        let flat = [0.25; 4];
        assert_eq!(kept_of(&flat, &Filter { top_k: 2, ..ALL }), [0, 1]);
        assert_eq!(kept_of(&flat, &Filter { top_p: 0.5, ..ALL }), [0, 1], "half is reached by two");
        assert_eq!(kept_of(&flat, &Filter { top_p: 0.51, ..ALL }), [0, 1, 2]);
        assert_eq!(kept_of(&flat, &Filter { min_p: 1.0, ..ALL }), [0, 1, 2, 3]);
        let zeros = draw_filtered(&[-0.0, 0.0, -1.0], 1.0, &Filter { top_k: 1, ..ALL }, || 0.5).expect("finite");
        assert_eq!(zeros.kept, [0], "minus zero is zero");
    }

    #[test]
    fn the_temperature_comes_first_and_the_kept_are_renormalised() {
        let logits = [0.0f32, 2.0, 1.0, -1.0];
        let filter = Filter { top_p: 0.8, ..ALL };
        assert_eq!(draw_filtered(&logits, 1.0, &filter, || 0.0).expect("finite").kept, [1, 2]);
        assert_eq!(draw_filtered(&logits, 0.5, &filter, || 0.0).expect("finite").kept, [1]);
        assert_eq!(draw_filtered(&logits, 3.0, &filter, || 0.0).expect("finite").kept, [0, 1, 2]);
        let two = Filter { top_k: 2, ..ALL };
        let total = 1.0 + (-2.0f64).exp();
        for (uniform, id, weight) in [(0.0, 1, 1.0), (0.879, 1, 1.0), (0.882, 2, (-2.0f64).exp())] {
            let made = draw_filtered(&logits, 0.5, &two, || uniform).expect("finite");
            assert_eq!(made.id, id);
            assert!((f64::from(made.logprob) - (weight / total).ln()).abs() < 1e-6);
        }
        assert_eq!(draw_filtered(&[0.0, f32::NAN], 1.0, &two, || 0.0), None);
    }

    #[test]
    fn sets_come_back_as_they_were_told() {
        let mut kept = Kept::default();
        kept.push(&[1, 5]);
        kept.push(&[]);
        let mut more = Kept::default();
        more.push(&[7]);
        kept.extend(&more);
        assert_eq!((kept.len(), kept.at(0), kept.at(1), kept.at(2)), (3, &[1, 5][..], &[][..], &[7][..]));
        assert!(!kept.is_empty() && Kept::default().is_empty());
    }

    proptest! {
        #[test]
        fn kept_sets_are_those_of_a_full_sort(
            steps in proptest::collection::vec(-12i8..12, 1..40),
            top_k in 0usize..45,
            top_p in 0.01f64..=1.0,
            min_p in 0.0f64..=1.0,
            temperature in 0.2f64..3.0,
            u in 0.0f64..1.0,
        ) {
            // Coarse steps, so that ties are common.
            let logits: Vec<f32> = steps.iter().map(|step| f32::from(*step) / 4.0).collect();
            let filter = Filter { top_k, top_p, min_p };
            let made = draw_filtered(&logits, temperature, &filter, || u).expect("finite");

            let mut order: Vec<usize> = (0..logits.len()).collect();
            order.sort_by(|a, b| logits[*b].partial_cmp(&logits[*a]).expect("finite").then(a.cmp(b)));
            if top_k > 0 {
                order.truncate(top_k);
            }
            let weight = |id: usize| (f64::from(logits[id] - logits[order[0]]) / temperature).exp();
            let total: f64 = order.iter().map(|id| weight(*id)).sum();
            let before = |place: usize| order[..place].iter().map(|id| weight(*id)).sum::<f64>() / total;
            for (place, id) in order.iter().enumerate() {
                let (mass, share) = (before(place), weight(*id));
                // A value on the very edge may fall to either side by rounding.
                if (mass - top_p).abs() < 1e-9 || (share - min_p).abs() < 1e-9 {
                    continue;
                }
                let due = place == 0 || ((top_p >= 1.0 || mass < top_p) && share >= min_p);
                prop_assert_eq!(made.kept.contains(&(*id as u32)), due, "{} of {:?}", id, order);
            }
            prop_assert!(made.kept.is_sorted() && made.kept.iter().all(|id| order.contains(&(*id as usize))));
            prop_assert!(made.kept.contains(&(made.id as u32)));
            let mass: f64 = made.kept.iter().map(|id| weight(*id as usize)).sum();
            prop_assert!((f64::from(made.logprob) - (weight(made.id as usize) / mass).ln()).abs() < 1e-5);
            // Neutral filters draw what no filter draws.
            let (plain, neutral) = (draw(&logits, temperature, || u), draw_filtered(&logits, temperature, &ALL, || u));
            prop_assert_eq!(plain.map(|one| (one.id, one.logprob)), neutral.map(|one| (one.id, one.logprob)));
        }
    }
}
