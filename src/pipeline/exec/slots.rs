//! What a machine has to give at once (cores, GPUs, jobs) and the queue of nodes that wait for a share of it.
//!
//! Whatever fits starts, the earliest node of the plan first: a node that waits for a GPU never keeps a core idle. Every
//! need is cut to what there is, so nothing waits for ever. It must never know threads, processes or time.

use std::collections::{BTreeMap, BTreeSet};

/// The GPU that a node needs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Gpu {
    /// None.
    None,
    /// Whichever is free.
    Any,
    /// This one, counted from 0.
    Index(usize),
}

/// What a node takes while it runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Need {
    /// Cores; more than there are means all of them, none means one.
    pub cpus: usize,
    /// The GPU.
    pub gpu: Gpu,
}

/// What a node was given.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Grant {
    /// Cores.
    pub cpus: usize,
    /// The index of its GPU.
    pub gpu: Option<usize>,
}

/// How much there is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Cores.
    pub cpus: usize,
    /// GPUs.
    pub gpus: usize,
    /// Nodes at once.
    pub jobs: usize,
}

/// The free shares and the queue.
#[derive(Debug)]
pub struct Slots {
    cpus: usize,
    free_cpus: usize,
    free_gpus: BTreeSet<usize>,
    gpus: usize,
    free_jobs: usize,
    /// Nodes of one need are alike, so a look at the first of each is a look at all.
    queue: BTreeMap<Need, BTreeSet<usize>>,
}

impl Slots {
    /// All free, nobody waiting.
    pub fn new(limits: Limits) -> Self {
        let cpus = limits.cpus.max(1);
        Self {
            cpus,
            free_cpus: cpus,
            free_gpus: (0..limits.gpus).collect(),
            gpus: limits.gpus,
            free_jobs: limits.jobs.max(1),
            queue: BTreeMap::new(),
        }
    }

    /// A need that can be met on this machine. A GPU that is not there is not waited for: whoever starts the node says
    /// that it is missing.
    fn possible(&self, need: Need) -> Need {
        let gpu = match need.gpu {
            Gpu::Any if self.gpus == 0 => Gpu::None,
            Gpu::Index(index) if index >= self.gpus => Gpu::None,
            gpu => gpu,
        };
        Need { cpus: need.cpus.clamp(1, self.cpus), gpu }
    }

    /// Puts a node into the queue.
    pub fn push(&mut self, node: usize, need: Need) {
        self.queue.entry(self.possible(need)).or_default().insert(node);
    }

    /// Takes a node out of the queue.
    pub fn remove(&mut self, node: usize, need: Need) {
        let need = self.possible(need);
        if let Some(nodes) = self.queue.get_mut(&need) {
            nodes.remove(&node);
            if nodes.is_empty() {
                self.queue.remove(&need);
            }
        }
    }

    /// Gives the first node that fits its share and takes it out of the queue.
    pub fn start_next(&mut self) -> Option<(usize, Grant)> {
        if self.free_jobs == 0 {
            return None;
        }
        let fits = self.queue.iter().filter(|(need, _)| self.fits(**need));
        let (need, node) = fits.filter_map(|(need, nodes)| Some((*need, *nodes.first()?))).min_by_key(|pair| pair.1)?;
        self.remove(node, need);
        let gpu = match need.gpu {
            Gpu::None => None,
            Gpu::Any => self.free_gpus.pop_first(),
            Gpu::Index(index) => self.free_gpus.take(&index),
        };
        self.free_jobs -= 1;
        self.free_cpus -= need.cpus;
        Some((node, Grant { cpus: need.cpus, gpu }))
    }

    fn fits(&self, need: Need) -> bool {
        let gpu = match need.gpu {
            Gpu::None => true,
            Gpu::Any => !self.free_gpus.is_empty(),
            Gpu::Index(index) => self.free_gpus.contains(&index),
        };
        gpu && need.cpus <= self.free_cpus
    }

    /// Takes a share back.
    pub fn release(&mut self, grant: Grant) {
        self.free_jobs += 1;
        self.free_cpus += grant.cpus;
        self.free_gpus.extend(grant.gpu);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn need(cpus: usize, gpu: Gpu) -> Need {
        Need { cpus, gpu }
    }

    #[test]
    fn a_need_beyond_the_machine_takes_all_of_it() {
        let mut slots = Slots::new(Limits { cpus: 2, gpus: 0, jobs: 8 });
        slots.push(0, need(64, Gpu::Any));
        slots.push(1, need(1, Gpu::None));
        assert_eq!(slots.start_next(), Some((0, Grant { cpus: 2, gpu: None })));
        assert_eq!(slots.start_next(), None, "no core is left");
        slots.release(Grant { cpus: 2, gpu: None });
        assert_eq!(slots.start_next(), Some((1, Grant { cpus: 1, gpu: None })));
    }

    #[test]
    fn a_node_that_waits_for_a_gpu_is_overtaken() {
        let mut slots = Slots::new(Limits { cpus: 8, gpus: 2, jobs: 8 });
        for node in 0..2 {
            slots.push(node, need(1, Gpu::Index(1)));
        }
        slots.push(2, need(1, Gpu::None));
        slots.push(3, need(1, Gpu::Any));
        slots.push(4, need(1, Gpu::Any));
        let started: Vec<_> = std::iter::from_fn(|| slots.start_next()).collect();
        let expected = [(0, Some(1)), (2, None), (3, Some(0))].map(|(node, gpu)| (node, Grant { cpus: 1, gpu }));
        assert_eq!(started, expected);
        slots.release(Grant { cpus: 1, gpu: Some(1) });
        assert_eq!(slots.start_next(), Some((1, Grant { cpus: 1, gpu: Some(1) })));
    }

    #[test]
    fn jobs_bound_everything_and_a_removed_node_never_starts() {
        let mut slots = Slots::new(Limits { cpus: 8, gpus: 0, jobs: 1 });
        slots.push(0, need(1, Gpu::None));
        slots.push(1, need(1, Gpu::None));
        slots.remove(0, need(1, Gpu::None));
        assert_eq!(slots.start_next(), Some((1, Grant { cpus: 1, gpu: None })));
        slots.push(2, need(1, Gpu::None));
        assert_eq!(slots.start_next(), None);
    }
}
