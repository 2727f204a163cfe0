//! How long the nodes of a plan will take, from what such nodes have taken before.
//!
//! The nearest history counts: the same key, then the last run of the same name, then the same stage in other trials, then
//! other stages of the kind where that is one of the worker's: light ones are as different as the programs of `command`. Where a kind names the number that grows with its work ([`Continues::grows`]), times are scaled
//! by it. It must never decide anything, and reads only as much as `READ` allows.

use std::collections::HashMap;

use crate::pipeline::plan::{Node, Plan, State};
use crate::pipeline::stage::{Continues, Place};
use crate::pipeline::store::{Manifest, Store, StoreError};

/// Manifests that are read for one forecast besides those that planning has read, at most.
const READ: usize = 1_000;

/// What the nodes of a plan will take.
#[derive(Clone)]
pub struct Forecast<'plan> {
    plan: &'plan Plan,
    /// The number that grows with the work of each node, where its kind has one.
    sizes: Vec<Option<f64>>,
    /// What the node itself has taken before.
    own: Vec<Option<Taken>>,
    /// Seconds of each node that saved work spares.
    spared: Vec<f64>,
    history: History<'plan>,
    /// What each node would take if it ran; nothing where no history says.
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
    /// GPUs.
    pub gpus: usize,
    /// Nodes at once.
    pub jobs: usize,
}

/// What a node takes of a machine while it runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Share {
    /// Cores.
    pub cpus: usize,
    /// Whether it has a GPU to itself.
    pub has_gpu: bool,
}

/// A time that was taken.
#[derive(Clone, Copy, Debug)]
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
#[derive(Clone, Debug, Default)]
struct History<'plan> {
    /// By kind and stage.
    stages: HashMap<(&'static str, &'plan str), Vec<Taken>>,
    /// By kind.
    kinds: HashMap<&'static str, Vec<Taken>>,
}

impl<'plan> History<'plan> {
    fn add(&mut self, node: &'plan Node, taken: Taken) {
        let kind = node.spec.kind.name;
        self.stages.entry((kind, &node.name().stage)).or_default().push(taken);
        self.kinds.entry(kind).or_default().push(taken);
    }

    /// What the same stage of other trials has taken, or else other stages of the kind.
    fn of(&self, node: &Node, size: Option<f64>) -> Option<f64> {
        let kind = node.spec.kind.name;
        let stage = median(self.stages.get(&(kind, node.name().stage.as_str())), size);
        let is_alike = node.spec.kind.place == Place::Worker;
        stage.or_else(|| median(self.kinds.get(kind).filter(|_| is_alike), size))
    }
}

impl<'plan> Forecast<'plan> {
    /// The forecast of a plan over the store that it was made with.
    pub fn new(plan: &'plan Plan, store: Option<&Store>) -> Result<Self, StoreError> {
        let count = plan.nodes.len();
        let mut history = History::default();
        let mut own: Vec<Option<Taken>> = vec![None; count];
        let mut spared = vec![0.0; count];
        let sizes: Vec<Option<f64>> = plan.nodes.iter().map(size).collect();
        let mut left = READ;
        for (index, node) in plan.nodes.iter().enumerate() {
            own[index] = match (&node.result, store) {
                (Some(result), _) => Some(Taken { seconds: result.seconds, size: sizes[index] }),
                (None, Some(store)) if left > 0 => {
                    left -= 1;
                    // What was saved need not be done again.
                    spared[index] = if node.state == State::Resume { spent_on(node, store)? } else { 0.0 };
                    last(node, store)?.map(|manifest| Taken::of(node.spec.kind.continues, &manifest))
                }
                (None, _) => None,
            };
            if let Some(taken) = own[index] {
                history.add(node, taken);
            }
        }
        let mut forecast = Self { plan, sizes, own, spared, history, seconds: vec![None; count] };
        forecast.refresh();
        Ok(forecast)
    }

    /// The seconds that a run would spend on a node; nothing where it is cached or no history says.
    pub fn seconds(&self, node: usize) -> Option<f64> {
        let is_cached = self.plan.nodes.get(node).is_none_or(|node| node.state == State::Cached);
        if is_cached { None } else { self.seconds_if_run(node) }
    }

    /// The seconds that a node takes if it runs, be it cached or not; nothing where no history says.
    pub fn seconds_if_run(&self, node: usize) -> Option<f64> {
        self.seconds.get(node).copied().flatten()
    }

    /// The seconds that a run would spend on a node, 0 where it is cached; nothing where no history says.
    pub fn to_do(&self, node: usize) -> Option<f64> {
        let is_cached = self.plan.nodes.get(node).is_none_or(|node| node.state == State::Cached);
        if is_cached { Some(0.0) } else { self.seconds_if_run(node) }
    }

    /// A node has taken so many seconds just now, which says something of those like it. Call [`Self::refresh`] after it.
    pub fn learn(&mut self, node: usize, seconds: f64) {
        // What went on from saved work tells only of its rest.
        let Some(of) = self.plan.nodes.get(node).filter(|_| self.spared[node] <= 0.0) else { return };
        self.history.add(of, Taken { seconds, size: self.sizes[node] });
    }

    /// Predicts anew from all that is known by now.
    pub fn refresh(&mut self) {
        let mut known: HashMap<(&str, &str, Option<u64>), Option<f64>> = HashMap::new();
        for (index, node) in self.plan.nodes.iter().enumerate() {
            let size = self.sizes[index];
            let seconds = match self.own[index] {
                Some(taken) => Some(taken.scaled(size)),
                None => *known
                    .entry((node.spec.kind.name, &node.name().stage, size.map(f64::to_bits)))
                    .or_insert_with(|| self.history.of(node, size)),
            };
            self.seconds[index] = seconds.map(|seconds| (seconds - self.spared[index]).max(0.0));
        }
    }

    /// What the nodes of the plan take together, with the seconds that each still has before it from `left`; nothing there
    /// is a node of which they are not known. A forecast of the whole plan takes them from [`Self::to_do`].
    pub fn total(&self, width: Width, share: impl Fn(&Node) -> Share, left: impl Fn(usize) -> Option<f64>) -> Total {
        let mut total = Total::default();
        // When each node can be done at the earliest, and what all nodes take of the machine.
        let mut ends: Vec<f64> = Vec::with_capacity(self.plan.nodes.len());
        let (mut longest, mut cores_taken, mut gpus_taken, mut jobs_taken) = (0.0_f64, 0.0, 0.0, 0.0);
        for (index, node) in self.plan.nodes.iter().enumerate() {
            let begin = node.edges.iter().map(|edge| ends[edge.from]).fold(0.0, f64::max);
            let seconds = left(index);
            total.unknown += usize::from(seconds.is_none());
            let seconds = seconds.unwrap_or(0.0);
            if node.state == State::Maybe {
                total.maybe += seconds;
            } else {
                total.work += seconds;
            }
            if seconds > 0.0 {
                let Share { cpus, has_gpu } = share(node);
                cores_taken += seconds * cpus.clamp(1, width.cpus.max(1)) as f64;
                gpus_taken += if has_gpu { seconds } else { 0.0 };
                jobs_taken += seconds;
            }
            ends.push(begin + seconds);
            longest = longest.max(begin + seconds);
        }
        let bounds = [(cores_taken, width.cpus), (gpus_taken, width.gpus), (jobs_taken, width.jobs)];
        total.wall = bounds.into_iter().map(|(taken, there)| taken / there.max(1) as f64).fold(longest, f64::max);
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
    use crate::pipeline::fixture::{Remote, echo, experiment, stage, toys, trial};
    use serde_json::json;

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
        let share = |cpus| move |_: &Node| Share { cpus, has_gpu: false };
        // One `data` of 2 s, four `train` of 3 s, of which one is not known.
        let mut seconds = vec![Some(3.0); 5];
        (seconds[0], seconds[4]) = (Some(2.0), None);
        let forecast = Forecast { seconds, ..Forecast::new(&plan, None).unwrap() };
        let to_do = |node| forecast.to_do(node);
        let wide = Width { cpus: 8, gpus: 2, jobs: 8 };
        let total = forecast.total(wide, share(1), to_do);
        assert_eq!(total, Total { work: 11.0, maybe: 0.0, wall: 5.0, unknown: 1 });
        let wall = |width, share: &dyn Fn(&Node) -> Share| forecast.total(width, share, to_do).wall;
        assert!((wall(Width { jobs: 1, ..wide }, &share(1)) - 11.0).abs() < 1e-9);
        assert!((wall(wide, &share(8)) - 11.0).abs() < 1e-9, "each takes every core");
        assert!((wall(wide, &|_| Share { cpus: 1, has_gpu: true }) - 5.5).abs() < 1e-9, "two GPUs for all");
        let left = forecast.total(wide, share(1), |node| if node == 2 || node == 3 { to_do(node) } else { Some(0.0) });
        assert_eq!((left.work, left.wall, left.unknown), (6.0, 3.0, 0));
    }

    #[test]
    fn what_was_done_just_now_tells_of_those_like_it() {
        let plan = planned(3);
        let mut forecast = Forecast::new(&plan, None).unwrap();
        assert_eq!(forecast.seconds, vec![None; 4]);
        forecast.learn(1, 4.0);
        forecast.refresh();
        assert_eq!(forecast.seconds, [None, Some(4.0), Some(4.0), Some(4.0)], "`data` is another stage");
        forecast.learn(0, 1.0);
        forecast.refresh();
        assert_eq!(forecast.seconds, [1.0, 4.0, 4.0, 4.0].map(Some));
        let workers = vec![stage::<Remote>("sft", json!({})), stage::<Remote>("grpo", json!({"text": "x"}))];
        let plan = Plan::new(&toys(workers), None).unwrap();
        let mut forecast = Forecast::new(&plan, None).unwrap();
        forecast.learn(1, 5.0);
        forecast.refresh();
        assert_eq!(forecast.seconds, [Some(5.0); 2], "another stage of a worker's kind is better than nothing");
    }
}
