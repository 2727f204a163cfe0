//! A plan as the scheduler sees it on one machine: what each node takes, which goes first, and what cannot be had.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet, HashMap};

use crate::pipeline::exec::machine::Machine;
use crate::pipeline::exec::scheduler::Shape;
use crate::pipeline::exec::slots::{Limits, Need};
use crate::pipeline::exec::{ExecError, device};
use crate::pipeline::plan::{Node, Plan, State};
use crate::pipeline::spec::parse_size;
use crate::pipeline::stage::Place;

/// What a run has before it.
#[derive(Debug)]
pub(super) struct Workload {
    /// One for each node of the plan.
    pub(super) shapes: Vec<Shape>,
    /// What there is, named slots included.
    pub(super) limits: Limits,
    /// Nodes that cannot run on this machine, and why.
    pub(super) unfit: HashMap<usize, String>,
    /// What the user should know before anything runs.
    pub(super) warnings: BTreeSet<String>,
    /// Whether something may run in the worker program.
    pub(super) needs_worker: bool,
}

impl Workload {
    /// The nodes that are `wanted`, with those of `again` run even where they are cached. `jobs` is the most at once; 0 is as
    /// many as there are cores. An error says that a stage asks for more of a named slot than there is.
    pub(super) fn new(
        plan: &Plan,
        machine: &Machine,
        wanted: &[bool],
        again: &BTreeSet<usize>,
        jobs: usize,
    ) -> Result<Self, ExecError> {
        let ranks = ranks(plan);
        let mut named = BTreeMap::new();
        let mut workload = Self {
            shapes: Vec::with_capacity(plan.nodes.len()),
            limits: Limits {
                cpus: machine.cores,
                gpus: machine.gpus.count(),
                jobs: if jobs == 0 { machine.cores } else { jobs },
                memory: machine.memory,
                named: Vec::new(),
            },
            unfit: HashMap::new(),
            warnings: BTreeSet::new(),
            needs_worker: false,
        };
        for (index, node) in plan.nodes.iter().enumerate() {
            let again = again.contains(&index);
            let may_run = wanted[index] && (again || node.state != State::Cached);
            workload.needs_worker |= may_run && node.spec.kind.place == Place::Worker;
            // A cached result may prove damaged, so that its stage runs after all.
            let need = workload.need(index, node, may_run, machine, &mut named)?;
            let inputs = node.edges.iter().map(|edge| edge.from).collect();
            let retries = node.spec.run.retries;
            workload.shapes.push(Shape { inputs, need, rank: ranks[index], retries, wanted: wanted[index], again });
        }
        Ok(workload)
    }

    fn need<'plan>(
        &mut self,
        index: usize,
        node: &'plan Node,
        may_run: bool,
        machine: &Machine,
        named: &mut BTreeMap<&'plan str, usize>,
    ) -> Result<Need, ExecError> {
        let (run, stage) = (&node.spec.run, &node.spec.name);
        let mut need = match device::need(node.spec.kind.place, run, machine.cores, machine.gpus.count()) {
            Ok(need) => need,
            Err(problem) => {
                self.unfit.insert(index, problem);
                Need::default()
            }
        };
        if may_run && need.cpus > machine.cores {
            let (asked, there) = (need.cpus, machine.cores);
            self.warnings.insert(format!("`{stage}` asks for {asked} cores and gets all of this machine: {there}"));
        }
        if let Some(text) = &run.memory {
            match parse_size(text) {
                Ok(bytes) => need.memory = bytes,
                Err(problem) => {
                    self.unfit.insert(index, format!("`run.memory`: {problem}"));
                }
            }
            if may_run && need.memory > machine.memory {
                let there = machine.memory >> 20;
                let text =
                    format!("`{stage}` asks for {text} of memory and this machine has {there} MiB: it runs alone");
                self.warnings.insert(text);
            }
        }
        for (slot, &asked) in run.slots.iter().filter(|(_, asked)| **asked > 0) {
            let there = machine.slots.get(slot).copied().unwrap_or(1);
            if may_run && asked > there {
                let (stage, slot) = (stage.clone(), slot.clone());
                return Err(ExecError::TooFewSlots { stage, slot, asked, there });
            }
            let slot = *named.entry(slot).or_insert_with(|| {
                self.limits.named.push(there);
                self.limits.named.len() - 1
            });
            need.named.push((slot, asked));
        }
        Ok(need)
    }
}

/// The order in which nodes that could start do: trial by trial as the plan has them, a shared node with the first trial that
/// needs it, so that the first arms are whole early; within a trial what most rests on, by the length of the longest way to an
/// end; then by the plan's own order.
fn ranks(plan: &Plan) -> Vec<u32> {
    let mut heights = vec![0_u32; plan.nodes.len()];
    let mut trials = Vec::with_capacity(plan.nodes.len());
    for (index, node) in plan.nodes.iter().enumerate().rev() {
        for edge in &node.edges {
            heights[edge.from] = heights[edge.from].max(heights[index] + 1);
        }
    }
    // Nodes stand in the order of the trials that brought them.
    let mut trial = 0_u32;
    for (index, node) in plan.nodes.iter().enumerate() {
        let (name, before) = (node.name(), plan.nodes[index.saturating_sub(1)].name());
        trial += u32::from((&name.experiment, &name.trial) != (&before.experiment, &before.trial));
        trials.push(trial);
    }
    let mut order: Vec<usize> = (0..plan.nodes.len()).collect();
    order.sort_by_key(|&node| (trials[node], Reverse(heights[node]), node));
    let mut ranks = vec![0; order.len()];
    for (rank, node) in (0_u32..).zip(order) {
        ranks[node] = rank;
    }
    ranks
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pipeline::exec::scheduler::{Action, Input, Scheduler};
    use crate::pipeline::fixture::{echo, experiment, trial};
    use crate::pipeline::store::Digest;

    /// The names in the order in which stages end, each of which takes as many ticks as its name says.
    fn ends(plan: &Plan, jobs: usize) -> Vec<String> {
        let machine = Machine { cores: jobs, memory: 1, ..Machine::default() };
        let wanted = vec![true; plan.nodes.len()];
        let workload = Workload::new(plan, &machine, &wanted, &BTreeSet::new(), jobs).unwrap();
        let mut scheduler = Scheduler::new(workload.shapes, workload.limits, None);
        let ticks = |node: usize| match plan.nodes[node].name().stage.as_str() {
            "sft" => 5,
            "grpo" => 7,
            _ => 2,
        };
        let (mut now, mut running, mut ended) = (0, BTreeSet::new(), Vec::new());
        let mut inbox = vec![Input::Begin];
        loop {
            while let Some(input) = inbox.pop() {
                let mut found = Vec::new();
                for action in scheduler.on(input) {
                    match action {
                        Action::Find(node) => {
                            found.push(Input::Found { node, key: Digest(node.to_string()), cached: false });
                        }
                        Action::Start(node, _) => assert!(running.insert((now + ticks(node), node))),
                        other => panic!("{other:?}"),
                    }
                }
                inbox.extend(found.into_iter().rev());
            }
            let Some((then, node)) = running.pop_first() else { return ended };
            now = then;
            let name = plan.nodes[node].name();
            ended.push(format!("{}{}", name.stage, name.trial));
            inbox.push(Input::Done(node));
        }
    }

    fn sweep(trials: usize) -> Plan {
        let trials = (1..=trials).map(|number| {
            let text = number.to_string();
            let sft = echo("sft", &text, &["data"]);
            let check = echo("check", &format!("check {text}"), &["sft"]);
            let late = [echo("grpo", &text, &["sft"]), check, echo("eval", &text, &["grpo"])];
            trial(&text, [vec![echo("data", "", &[]), sft], late.to_vec()].concat())
        });
        Plan::new(&[experiment("e", trials.collect())], None).unwrap()
    }

    #[test]
    fn arms_end_one_after_the_other_and_what_most_rests_on_goes_first() {
        let plan = sweep(3);
        let whole = |number| ["sft", "grpo", "eval", "check"].map(|stage| format!("{stage}{number}"));
        let expected: Vec<String> = std::iter::once("data1".to_owned()).chain((1..=3).flat_map(whole)).collect();
        assert_eq!(ends(&plan, 1), expected);
    }

    #[test]
    fn the_first_arm_is_whole_before_the_last_one_has_begun_much() {
        let ended = ends(&sweep(6), 2);
        let place = |name: &str| ended.iter().position(|ended| ended == name).unwrap();
        let whole = |number: usize| place(&format!("eval{number}")).max(place(&format!("check{number}")));
        assert!((1..6).all(|number| whole(number) < whole(number + 1) || number % 2 == 1), "{ended:?}");
        assert!(whole(2) < place("sft4") && whole(4) < place("sft6"), "{ended:?}");
    }
}
