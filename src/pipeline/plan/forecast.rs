//! How long the nodes of a plan will take, from what such nodes have taken before.
//!
//! The nearest history counts: the same key, then the last run of the same name, then the same stage in other trials, then
//! other stages of the kind. Where a kind names the number that grows with its work ([`Continues::grows`]), times are scaled
//! by it. It must never decide anything, and reads only as much as `READ` allows.

use std::collections::HashMap;

use crate::pipeline::plan::{Node, Plan, State};
use crate::pipeline::stage::Continues;
use crate::pipeline::store::{Manifest, Store, StoreError};

/// Manifests that are read for one forecast besides those that planning has read, at most.
const READ: usize = 1_000;

/// What the nodes of a plan will take.
#[derive(Clone, Debug)]
pub struct Forecast {
    /// Of each node; nothing where it is cached or no history says.
    seconds: Vec<Option<f64>>,
}

/// What a part of a plan takes in all.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Total {
    /// Seconds of work that is sure to be done, of nodes for which they are known.
    pub work: f64,
    /// Seconds of work that may be spared.
    pub maybe: f64,
    /// Seconds until the end at the earliest, everything that may run included.
    pub wall: f64,
    /// Nodes for which no history says how long they take.
    pub unknown: usize,
}

/// What a machine gives at once.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Width {
    /// Cores.
    pub cpus: usize,
    /// Nodes at once.
    pub jobs: usize,
}

/// A time that was taken.
#[derive(Clone, Copy)]
struct Taken {
    seconds: f64,
    /// The number that grows with the work, where the kind has one.
    size: Option<f64>,
}

impl Taken {
    fn of(continues: Option<Continues>, manifest: &Manifest) -> Self {
        let size = continues.and_then(|continues| manifest.params.get(continues.grows)?.as_f64());
        Self { seconds: manifest.seconds, size }
    }

    /// What work of `size` would have taken.
    fn scaled(self, size: Option<f64>) -> f64 {
        match (size, self.size) {
            (Some(new), Some(old)) if old > 0.0 => self.seconds * new / old,
            _ => self.seconds,
        }
    }
}

/// Times of nodes alike.
type History<'a, Name> = HashMap<Name, Vec<Taken>>;

impl Forecast {
    /// The forecast of a plan over the store that it was made with.
    pub fn new(plan: &Plan, store: Option<&Store>) -> Result<Self, StoreError> {
        let mut stages: History<'_, (&str, &str)> = HashMap::new();
        let mut kinds: History<'_, &str> = HashMap::new();
        let mut own: Vec<Option<Taken>> = vec![None; plan.nodes.len()];
        let mut spent = vec![0.0; plan.nodes.len()];
        let mut left = READ;
        for (index, node) in plan.nodes.iter().enumerate() {
            let kind = &node.spec.kind;
            let taken = match (&node.result, store) {
                (Some(result), _) => Some(Taken { seconds: result.seconds, size: size(node) }),
                (None, Some(store)) if left > 0 => {
                    left -= 1;
                    spent[index] = spent_on(node, store)?;
                    own[index] = last(node, store)?.map(|manifest| Taken::of(kind.continues, &manifest));
                    own[index]
                }
                (None, _) => None,
            };
            if let Some(taken) = taken {
                stages.entry((kind.name, &node.name().stage)).or_default().push(taken);
                kinds.entry(kind.name).or_default().push(taken);
            }
        }
        let predict = |(index, node): (usize, &Node)| {
            if node.state == State::Cached {
                return None;
            }
            let kind = &node.spec.kind;
            let size = kind.continues.and_then(|continues| node.spec.stage.params().get(continues.grows)?.as_f64());
            let seconds = match own[index] {
                Some(taken) => Some(taken.scaled(size)),
                None => median(stages.get(&(kind.name, &node.name().stage)), size)
                    .or_else(|| median(kinds.get(kind.name), size)),
            };
            // What was saved need not be done again.
            let spared = if node.state == State::Resume { spent[index] } else { 0.0 };
            seconds.map(|seconds| (seconds - spared).max(0.0))
        };
        Ok(Self { seconds: plan.nodes.iter().enumerate().map(predict).collect() })
    }

    /// The seconds that a run would spend on a node; nothing where it is cached or no history says.
    pub fn seconds(&self, node: usize) -> Option<f64> {
        self.seconds.get(node).copied().flatten()
    }

    /// What the nodes that `counts` lets count take together, cached ones aside; `cpus` gives the cores of a node. A run uses
    /// it for the time left by letting those count that are not done yet.
    pub fn total(
        &self,
        plan: &Plan,
        width: Width,
        cpus: impl Fn(&Node) -> usize,
        counts: impl Fn(usize) -> bool,
    ) -> Total {
        let mut total = Total::default();
        // When each node can be done at the earliest, and what all nodes take of the machine.
        let mut ends: Vec<f64> = Vec::with_capacity(plan.nodes.len());
        let (mut longest, mut cores_taken, mut jobs_taken) = (0.0_f64, 0.0, 0.0);
        for (index, node) in plan.nodes.iter().enumerate() {
            let begin = node.edges.iter().map(|edge| ends[edge.from]).fold(0.0, f64::max);
            let is_counted = node.state != State::Cached && counts(index);
            let seconds = if is_counted { self.seconds(index) } else { Some(0.0) };
            total.unknown += usize::from(seconds.is_none());
            let seconds = seconds.unwrap_or(0.0);
            if node.state == State::Maybe {
                total.maybe += seconds;
            } else {
                total.work += seconds;
            }
            cores_taken += seconds * cpus(node).clamp(1, width.cpus.max(1)) as f64;
            jobs_taken += seconds;
            ends.push(begin + seconds);
            longest = longest.max(begin + seconds);
        }
        total.wall = longest.max(cores_taken / width.cpus.max(1) as f64).max(jobs_taken / width.jobs.max(1) as f64);
        total
    }
}

/// The number that grows with the work of a node, where its kind has one.
fn size(node: &Node) -> Option<f64> {
    let continues = node.spec.kind.continues?;
    node.spec.stage.params().get(continues.grows)?.as_f64()
}

/// Seconds that attempts at a node have taken whose saved work it would go on from.
fn spent_on(node: &Node, store: &Store) -> Result<f64, StoreError> {
    let Some(key) = node.key.as_ref().filter(|_| node.state == State::Resume) else { return Ok(0.0) };
    Ok(store.attempts(key)?.map_or(0.0, |attempts| attempts.seconds))
}

/// What stands in the store of the same key, or else of the last run of the same name.
fn last(node: &Node, store: &Store) -> Result<Option<std::sync::Arc<Manifest>>, StoreError> {
    if let Some(key) = &node.key
        && let Some(manifest) = store.manifest_of(key)?
    {
        return Ok(Some(manifest));
    }
    for name in node.names.iter().take(4) {
        if let Some(record) = store.recorded(&name.experiment, &name.trial, &name.stage)?
            && record.kind == node.spec.kind.name
            && let Some(manifest) = store.manifest_of(&record.key)?
        {
            return Ok(Some(manifest));
        }
    }
    Ok(None)
}

fn median(history: Option<&Vec<Taken>>, size: Option<f64>) -> Option<f64> {
    let mut seconds: Vec<f64> = history?.iter().map(|taken| taken.scaled(size)).collect();
    seconds.sort_by(f64::total_cmp);
    let middle = seconds.len() / 2;
    let high = seconds.get(middle)?;
    Some(if seconds.len() % 2 == 1 { *high } else { f64::midpoint(seconds[middle - 1], *high) })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pipeline::fixture::{echo, experiment, trial};

    fn planned(count: usize) -> Plan {
        let one = |seed: usize| {
            let text = seed.to_string();
            trial(&format!("seed={seed}"), vec![echo("data", "d", &[]), echo("train", &text, &["data"])])
        };
        Plan::new(&[experiment("a", (0..count).map(one).collect())], None).unwrap()
    }

    #[test]
    fn times_are_scaled_by_what_grows_and_their_median_is_taken() {
        let taken = |seconds, size| Taken { seconds, size };
        assert_eq!(median(None, None), None);
        assert_eq!(median(Some(&vec![taken(1.0, None), taken(9.0, None), taken(2.0, None)]), Some(5.0)), Some(2.0));
        assert_eq!(median(Some(&vec![taken(1.0, Some(10.0)), taken(3.0, Some(10.0))]), Some(20.0)), Some(4.0));
    }

    #[test]
    fn the_end_is_bounded_by_the_longest_way_and_by_the_machine() {
        let plan = planned(4);
        // One `data` of 2 s, four `train` of 3 s, of which one is not known.
        let mut seconds = vec![Some(3.0); 5];
        (seconds[0], seconds[4]) = (Some(2.0), None);
        let forecast = Forecast { seconds };
        let wide = Width { cpus: 8, jobs: 8 };
        let total = forecast.total(&plan, wide, |_| 1, |_| true);
        assert_eq!(total, Total { work: 11.0, maybe: 0.0, wall: 5.0, unknown: 1 });
        let one_at_once = forecast.total(&plan, Width { cpus: 8, jobs: 1 }, |_| 1, |_| true);
        let every_core_each = forecast.total(&plan, wide, |_| 8, |_| true);
        assert!((one_at_once.wall - 11.0).abs() < 1e-9 && (every_core_each.wall - 11.0).abs() < 1e-9);
        let left = forecast.total(&plan, wide, |_| 1, |node| node == 2 || node == 3);
        assert_eq!((left.work, left.wall, left.unknown), (6.0, 3.0, 0));
    }
}
