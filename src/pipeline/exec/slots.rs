//! What a machine has to give at once (cores, memory, GPUs, named slots, jobs) and the queue of nodes that wait for a share.
//!
//! Of what fits, the first in rank starts, so a node that waits for a GPU keeps no core idle. Needs of cores and memory are
//! cut to what there is. A node whose turn it is and that does not fit is overtaken [`OVERTAKEN`] times; from then on what it
//! is short of is kept for it. It must never know threads, processes or time.

use std::collections::{BTreeMap, BTreeSet};

/// How many nodes behind it in rank may start before one whose turn it is, once it is at the head of those that wait.
pub const OVERTAKEN: u32 = 8;

/// The GPU that a node needs; a node has one at most.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub enum Gpu {
    /// None.
    #[default]
    None,
    /// Whichever is free.
    Any,
    /// This one, counted from 0.
    Index(usize),
}

/// What a node takes while it runs.
#[derive(Clone, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Need {
    /// Cores; more than there are means all of them, none means one.
    pub cpus: usize,
    /// The GPU.
    pub gpu: Gpu,
    /// Bytes of memory; more than there are means all of them.
    pub memory: u64,
    /// Named slots, by their index in [`Limits::named`], and how much of each.
    pub named: Vec<(usize, usize)>,
}

/// What a node was given, beside memory and named slots.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Grant {
    /// Cores.
    pub cpus: usize,
    /// The index of its GPU.
    pub gpu: Option<usize>,
}

/// How much there is.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Limits {
    /// Cores.
    pub cpus: usize,
    /// GPUs.
    pub gpus: usize,
    /// Nodes at once.
    pub jobs: usize,
    /// Bytes of memory.
    pub memory: u64,
    /// How much there is of each named slot.
    pub named: Vec<usize>,
}

/// A node's place in the queue: the smaller goes first.
type Place = (u32, usize);

/// The free shares and the queue.
#[derive(Debug)]
pub struct Slots {
    limits: Limits,
    free_cpus: usize,
    free_memory: u64,
    free_gpus: BTreeSet<usize>,
    free_named: Vec<usize>,
    free_jobs: usize,
    /// Nodes of one need are alike, so a look at the first of each is a look at all.
    queue: BTreeMap<Need, BTreeSet<Place>>,
    /// The first in rank of those that did not fit, and how often it was overtaken.
    overtaken: Option<(Place, u32)>,
}

impl Slots {
    /// All free, nobody waiting.
    pub fn new(limits: Limits) -> Self {
        let limits = Limits { cpus: limits.cpus.max(1), jobs: limits.jobs.max(1), ..limits };
        Self {
            free_cpus: limits.cpus,
            free_memory: limits.memory,
            free_gpus: (0..limits.gpus).collect(),
            free_named: limits.named.clone(),
            free_jobs: limits.jobs,
            limits,
            queue: BTreeMap::new(),
            overtaken: None,
        }
    }

    /// A need that can be met on this machine. A GPU that is not there is not waited for: whoever starts the node says
    /// that it is missing.
    fn possible(&self, need: &Need) -> Need {
        let gpu = match need.gpu {
            Gpu::Any if self.limits.gpus == 0 => Gpu::None,
            Gpu::Index(index) if index >= self.limits.gpus => Gpu::None,
            gpu => gpu,
        };
        let cut = |&(slot, count): &(usize, usize)| (slot, count.min(self.limits.named[slot]));
        Need {
            cpus: need.cpus.clamp(1, self.limits.cpus),
            gpu,
            memory: need.memory.min(self.limits.memory),
            named: need.named.iter().map(cut).collect(),
        }
    }

    /// Puts a node into the queue; of those that fit, the smallest `rank` starts first.
    pub fn push(&mut self, node: usize, rank: u32, need: &Need) {
        self.queue.entry(self.possible(need)).or_default().insert((rank, node));
    }

    /// Takes a node out of the queue.
    pub fn remove(&mut self, node: usize, rank: u32, need: &Need) {
        self.take((rank, node), &self.possible(need));
    }

    fn take(&mut self, place: Place, need: &Need) {
        if let Some(nodes) = self.queue.get_mut(need) {
            nodes.remove(&place);
            if nodes.is_empty() {
                self.queue.remove(need);
            }
        }
    }

    /// Gives the first node that fits its share and takes it out of the queue; none of `before` or after it.
    pub fn start_next(&mut self, before: Option<(u32, usize)>) -> Option<(usize, Grant)> {
        if self.free_jobs == 0 {
            return None;
        }
        let firsts = || self.queue.iter().filter_map(|(need, nodes)| Some((*nodes.first()?, need)));
        let head = firsts().filter(|(_, need)| !self.fits(need)).min();
        let times = |place| self.overtaken.filter(|(head, _)| *head == place).map_or(0, |(_, times)| times);
        let may_start = |place: Place, need: &Need| {
            let held_back = |(head, wanted): (Place, &Need)| {
                head < place && times(head) >= OVERTAKEN && self.takes_from(wanted, need)
            };
            before.is_none_or(|before| place < before) && self.fits(need) && !head.is_some_and(held_back)
        };
        let (place, need) = firsts().filter(|(place, need)| may_start(*place, need)).min()?;
        let overtakes = head.map(|(head, _)| head).filter(|head| *head < place);
        let overtaken = overtakes.map_or(self.overtaken, |head| Some((head, times(head) + 1)));
        let need = need.clone();
        self.overtaken = overtaken;
        self.take(place, &need);
        let gpu = match need.gpu {
            Gpu::None => None,
            Gpu::Any => self.free_gpus.pop_first(),
            Gpu::Index(index) => self.free_gpus.take(&index),
        };
        self.free_jobs -= 1;
        self.free_cpus -= need.cpus;
        self.free_memory -= need.memory;
        for (slot, count) in need.named {
            self.free_named[slot] -= count;
        }
        Some((place.1, Grant { cpus: need.cpus, gpu }))
    }

    fn fits(&self, need: &Need) -> bool {
        self.has_gpu(need) && self.has_named(need) && need.memory <= self.free_memory && need.cpus <= self.free_cpus
    }

    fn has_gpu(&self, need: &Need) -> bool {
        match need.gpu {
            Gpu::None => true,
            Gpu::Any => !self.free_gpus.is_empty(),
            Gpu::Index(index) => self.free_gpus.contains(&index),
        }
    }

    fn has_named(&self, need: &Need) -> bool {
        need.named.iter().all(|(slot, count)| *count <= self.free_named[*slot])
    }

    /// Whether `other` would take of what is kept for a node that wants `wanted` and does not fit.
    ///
    /// Shares are kept in one order, the rarest first: a GPU, named slots, memory, cores. What comes later in that order is not
    /// kept while something earlier is missing, or cores would lie idle for as long as another stage holds the GPU.
    fn takes_from(&self, wanted: &Need, other: &Need) -> bool {
        if !self.has_gpu(wanted) {
            return false;
        }
        let gpu = wanted.gpu != Gpu::None && other.gpu != Gpu::None;
        let wants = |slot: usize| wanted.named.iter().any(|(wanted, _)| *wanted == slot);
        let named = gpu || other.named.iter().any(|(slot, _)| wants(*slot));
        if !self.has_named(wanted) {
            return named;
        }
        let memory = named || wanted.memory > 0 && other.memory > 0;
        // Every node takes a core.
        memory || wanted.memory <= self.free_memory
    }

    /// Takes back the share of a node that needed `need`.
    pub fn release(&mut self, grant: Grant, need: &Need) {
        let possible = self.possible(need);
        self.free_jobs += 1;
        self.free_cpus += grant.cpus;
        self.free_gpus.extend(grant.gpu);
        self.free_memory += possible.memory;
        for (slot, count) in possible.named {
            self.free_named[slot] += count;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn need(cpus: usize, gpu: Gpu) -> Need {
        Need { cpus, gpu, ..Need::default() }
    }

    fn machine(cpus: usize, gpus: usize, jobs: usize) -> Limits {
        Limits { cpus, gpus, jobs, ..Limits::default() }
    }

    #[test]
    fn a_need_beyond_the_machine_takes_all_of_it() {
        let mut slots = Slots::new(machine(2, 0, 8));
        slots.push(0, 0, &need(64, Gpu::Any));
        slots.push(1, 0, &need(1, Gpu::None));
        assert_eq!(slots.start_next(None), Some((0, Grant { cpus: 2, gpu: None })));
        assert_eq!(slots.start_next(None), None, "no core is left");
        slots.release(Grant { cpus: 2, gpu: None }, &need(64, Gpu::Any));
        assert_eq!(slots.start_next(None), Some((1, Grant { cpus: 1, gpu: None })));
    }

    #[test]
    fn a_node_that_waits_for_a_gpu_is_overtaken() {
        let mut slots = Slots::new(machine(8, 2, 8));
        for node in 0..2 {
            slots.push(node, 0, &need(1, Gpu::Index(1)));
        }
        slots.push(2, 0, &need(1, Gpu::None));
        slots.push(3, 0, &need(1, Gpu::Any));
        slots.push(4, 0, &need(1, Gpu::Any));
        let started: Vec<_> = std::iter::from_fn(|| slots.start_next(None)).collect();
        let expected = [(0, Some(1)), (2, None), (3, Some(0))].map(|(node, gpu)| (node, Grant { cpus: 1, gpu }));
        assert_eq!(started, expected);
        slots.release(Grant { cpus: 1, gpu: Some(1) }, &need(1, Gpu::Index(1)));
        assert_eq!(slots.start_next(None), Some((1, Grant { cpus: 1, gpu: Some(1) })));
    }

    #[test]
    fn jobs_bound_everything_and_a_removed_node_never_starts() {
        let mut slots = Slots::new(machine(8, 0, 1));
        slots.push(0, 0, &need(1, Gpu::None));
        slots.push(1, 0, &need(1, Gpu::None));
        slots.remove(0, 0, &need(1, Gpu::None));
        assert_eq!(slots.start_next(None), Some((1, Grant { cpus: 1, gpu: None })));
        slots.push(2, 0, &need(1, Gpu::None));
        assert_eq!(slots.start_next(None), None);
    }

    #[test]
    fn rank_goes_before_the_order_of_nodes() {
        let mut slots = Slots::new(machine(1, 0, 1));
        slots.push(0, 2, &need(1, Gpu::None));
        slots.push(1, 1, &need(1, Gpu::None));
        assert_eq!(slots.start_next(None).map(|(node, _)| node), Some(1));
    }

    #[test]
    fn memory_and_named_slots_bound_what_runs_side_by_side() {
        let limits = Limits { memory: 10, named: vec![1, 3], ..machine(8, 0, 8) };
        let mut slots = Slots::new(limits);
        let memory = |memory| Need { memory, ..need(1, Gpu::None) };
        let named = |slot, count| Need { named: vec![(slot, count)], ..need(1, Gpu::None) };
        let needs = [memory(6), memory(6), memory(99), named(0, 1), named(0, 1), named(1, 2), named(1, 1)];
        for (node, need) in needs.iter().enumerate() {
            slots.push(node, 0, need);
        }
        let mut started = Vec::new();
        while let Some((node, grant)) = slots.start_next(None) {
            started.push((node, grant));
        }
        assert_eq!(started.iter().map(|(node, _)| *node).collect::<Vec<_>>(), [0, 3, 5, 6]);
        for (node, grant) in started {
            slots.release(grant, &needs[node]);
        }
        assert_eq!(slots.start_next(None).map(|(node, _)| node), Some(1));
        slots.release(Grant { cpus: 1, gpu: None }, &needs[1]);
        assert_eq!(slots.start_next(None).map(|(node, _)| node), Some(2), "more than there is means all of it");
    }

    /// Lets small nodes of `small` come for ever, two at a time; gives how many start before the one that needs `big`.
    fn overtakers(limits: Limits, big: &Need, small: &Need) -> usize {
        let mut slots = Slots::new(limits);
        let mut running = Vec::new();
        for node in 1..3 {
            slots.push(node, 1, small);
            running.push(slots.start_next(None).unwrap().1);
        }
        slots.push(0, 0, big);
        for node in 3..1_000 {
            slots.push(node, 1, small);
            if running.is_empty() {
                assert_eq!(slots.start_next(None).map(|(node, _)| node), Some(0));
                return node - 3;
            }
            slots.release(running.remove(0), small);
            while let Some((started, grant)) = slots.start_next(None) {
                if started == 0 {
                    return node - 3;
                }
                running.push(grant);
            }
        }
        panic!("it waits for ever");
    }

    #[test]
    fn a_big_need_is_not_overtaken_for_ever() {
        let most = OVERTAKEN as usize + 3;
        let passed = overtakers(machine(2, 0, 8), &need(2, Gpu::None), &need(1, Gpu::None));
        assert!(passed <= most, "{passed}");
        let memory = |memory| Need { memory, ..need(1, Gpu::None) };
        let passed = overtakers(Limits { memory: 2, ..machine(8, 0, 8) }, &memory(2), &memory(1));
        assert!(passed <= most, "{passed}");
        let named = |count| Need { named: vec![(0, count)], ..need(1, Gpu::None) };
        let passed = overtakers(Limits { named: vec![2], ..machine(8, 0, 8) }, &named(2), &named(1));
        assert!(passed <= most, "{passed}");
    }

    #[test]
    fn cores_are_not_kept_for_a_node_that_another_keeps_from_the_gpu() {
        let mut slots = Slots::new(machine(4, 1, 8));
        slots.push(0, 0, &need(2, Gpu::Any));
        let (_, long) = slots.start_next(None).unwrap();
        slots.push(1, 1, &need(4, Gpu::Any));
        let small = need(1, Gpu::None);
        for node in 2..50 {
            slots.push(node, 2, &small);
            let (started, grant) = slots.start_next(None).unwrap();
            assert_eq!(started, node);
            slots.release(grant, &small);
        }
        slots.push(50, 2, &small);
        let (_, last) = slots.start_next(None).unwrap();
        slots.release(long, &need(2, Gpu::Any));
        slots.push(51, 2, &small);
        slots.push(52, 2, &need(1, Gpu::Any));
        assert_eq!(slots.start_next(None), None, "now the cores are kept, and so is the GPU");
        slots.release(last, &small);
        assert_eq!(slots.start_next(None).map(|(node, _)| node), Some(1));
    }
}
