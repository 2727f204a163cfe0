//! Where every stage of a run stands, from its events alone: what runs, what waits for what, what is over.
//!
//! An event costs as much as the edges that it touches. It draws nothing; [`Board::snapshot`] says how it stands at a moment.

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Instant, SystemTime};

use crate::cli::pace::Pace;
use crate::cli::progress::left::Estimate;
use crate::cli::progress::running::Running;
use crate::cli::progress::snapshot::{FailedStage, Snapshot, WaitingStages};
use crate::cli::render;
use crate::pipeline::exec::event::Outcome;
use crate::pipeline::plan::{NodeName, Plan};
use crate::pipeline::stage::StageEvent;
use crate::pipeline::store::Digest;

/// Names of a stage that are remembered: trials that share it may be many.
const NAMES: usize = 64;

/// Failures that are remembered.
const FAILURES: usize = 64;

/// Where a node stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    /// The run does not want it.
    Unwanted,
    /// It has not begun.
    Waiting,
    /// Another process works on it.
    Elsewhere,
    /// It runs.
    Running,
    /// Its result is there.
    Made,
    /// It failed, or an input of it did.
    Lost,
}

/// A node among the others.
struct Node {
    phase: Phase,
    /// Its place among the names of stages.
    group: usize,
    /// Nodes whose results it needs, and nodes that need its result.
    inputs: Vec<usize>,
    consumers: Vec<usize>,
    /// How many of its inputs are not there yet.
    missing: usize,
}

/// What came of the stages of one name.
#[derive(Clone, Debug, Default, PartialEq)]
pub(super) struct Sum {
    /// The name.
    pub(super) stage: String,
    /// How many ran.
    pub(super) run: usize,
    /// Seconds for which they ran, all together.
    pub(super) seconds: f64,
    /// How many were cached.
    pub(super) cached: usize,
    /// How many failed.
    pub(super) failed: usize,
    /// How many could not run because an input failed.
    pub(super) blocked: usize,
}

/// The stages of one name.
#[derive(Default)]
struct Group {
    sum: Sum,
    waiting: usize,
    ready: usize,
    elsewhere: usize,
    /// By the name of a stage, how many of its results those that wait still miss.
    misses: BTreeMap<usize, usize>,
}

/// Where a run stands.
pub(super) struct Board {
    host: String,
    experiments: Vec<String>,
    begun: SystemTime,
    clock: Instant,
    tunes: bool,
    nodes: Vec<Node>,
    groups: Vec<Group>,
    running: BTreeMap<usize, Running>,
    counts: Outcome,
    stages: usize,
    settled: usize,
    failures: Vec<FailedStage>,
    estimate: Option<Estimate>,
    is_over: bool,
    /// Grows with whatever happens.
    version: u64,
}

impl Board {
    /// Nothing of `plan` has begun; `wanted` says by node whether it shall run if it is missing.
    pub(super) fn new(plan: &Plan, wanted: &[bool], tunes: bool) -> Self {
        let mut groups: Vec<Group> = Vec::new();
        let mut known: BTreeMap<&str, usize> = BTreeMap::new();
        let mut nodes: Vec<Node> = Vec::with_capacity(plan.nodes.len());
        for (index, planned) in plan.nodes.iter().enumerate() {
            let stage = planned.name().stage.as_str();
            let group = *known.entry(stage).or_insert_with(|| {
                let sum = Sum { stage: stage.to_owned(), ..Sum::default() };
                groups.push(Group { sum, ..Group::default() });
                groups.len() - 1
            });
            let is_wanted = wanted.get(index).copied().unwrap_or(false);
            let inputs: BTreeSet<usize> = planned.edges.iter().map(|edge| edge.from).collect();
            let inputs: Vec<usize> = if is_wanted { inputs.into_iter().collect() } else { Vec::new() };
            for input in &inputs {
                nodes[*input].consumers.push(index);
                *groups[group].misses.entry(nodes[*input].group).or_default() += 1;
            }
            if is_wanted {
                groups[group].waiting += 1;
                groups[group].ready += usize::from(inputs.is_empty());
            }
            let phase = if is_wanted { Phase::Waiting } else { Phase::Unwanted };
            nodes.push(Node { phase, group, missing: inputs.len(), inputs, consumers: Vec::new() });
        }
        Self {
            host: rustix::system::uname().nodename().to_string_lossy().into_owned(),
            experiments: plan.experiments.keys().cloned().collect(),
            begun: SystemTime::now(),
            clock: Instant::now(),
            tunes,
            nodes,
            groups,
            running: BTreeMap::new(),
            counts: Outcome::default(),
            stages: wanted.iter().filter(|wanted| **wanted).count(),
            settled: 0,
            failures: Vec::new(),
            estimate: None,
            is_over: false,
            version: 0,
        }
    }

    /// Grows with whatever happens.
    pub(super) fn version(&self) -> u64 {
        self.version
    }

    /// A stage that runs.
    pub(super) fn running(&mut self, node: usize) -> Option<&mut Running> {
        self.running.get_mut(&node)
    }

    /// Seconds that a stage which runs still takes by its own count.
    pub(super) fn pace_of(&self, node: usize) -> Option<f64> {
        self.running.get(&node)?.left()
    }

    /// Whether nothing of it runs.
    pub(super) fn is_idle(&self) -> bool {
        self.running.is_empty()
    }

    /// Stages that are settled, and stages in all.
    pub(super) fn overall(&self) -> (usize, usize) {
        (self.settled, self.stages)
    }

    /// What came of stages, by their name, in the order of the plan.
    pub(super) fn sums(&self) -> impl Iterator<Item = &Sum> {
        self.groups.iter().map(|group| &group.sum)
    }

    /// What is known of the time that is left.
    pub(super) fn set_estimate(&mut self, estimate: Option<Estimate>) {
        self.estimate = estimate;
        self.version += 1;
    }

    /// The newest estimate.
    pub(super) fn estimate(&self) -> Option<Estimate> {
        self.estimate
    }

    /// A stage begins.
    pub(super) fn begin(&mut self, node: usize, label: String, names: &[NodeName], kind: &str, key: &Digest) {
        self.enter(node, Phase::Running);
        let running = Running {
            label,
            names: names.iter().take(NAMES).map(render::node).collect(),
            kind: kind.to_owned(),
            key: key.clone(),
            began: self.seconds(),
            resumed: None,
            pace: Pace::new(),
            metrics: BTreeMap::new(),
            traces: BTreeMap::new(),
            reached: None,
            told: Instant::now(),
        };
        self.running.insert(node, running);
    }

    /// A stage says something.
    pub(super) fn hear(&mut self, node: usize, event: &StageEvent) {
        let passed = self.clock.elapsed();
        if let Some(running) = self.running.get_mut(&node) {
            running.hear(event, passed);
            self.version += 1;
        }
    }

    /// A stage runs no more, and may begin again; gives whether it ran.
    pub(super) fn stop(&mut self, node: usize) -> bool {
        let ran = self.running.remove(&node).is_some();
        if ran {
            self.enter(node, Phase::Waiting);
        }
        ran
    }

    /// Another process works on a stage.
    pub(super) fn wait_for(&mut self, node: usize) {
        self.running.remove(&node);
        self.enter(node, Phase::Elsewhere);
    }

    /// A stage is done, or was so before.
    pub(super) fn made(&mut self, node: usize, seconds: Option<f64>) {
        self.running.remove(&node);
        let sum = &mut self.groups[self.nodes[node].group].sum;
        if let Some(seconds) = seconds {
            self.counts.run += 1;
            sum.run += 1;
            sum.seconds += seconds;
        } else {
            self.counts.cached += 1;
            sum.cached += 1;
        }
        self.enter(node, Phase::Made);
    }

    /// A stage failed.
    pub(super) fn failed(&mut self, node: usize, failure: FailedStage) {
        self.running.remove(&node);
        self.counts.failed += 1;
        self.groups[self.nodes[node].group].sum.failed += 1;
        if self.failures.len() < FAILURES {
            self.failures.push(failure);
        }
        self.enter(node, Phase::Lost);
    }

    /// An input of a stage failed.
    pub(super) fn blocked(&mut self, node: usize) {
        self.counts.blocked += 1;
        self.groups[self.nodes[node].group].sum.blocked += 1;
        self.enter(node, Phase::Lost);
    }

    /// The run is over, and all in all so much came of it, where that is known.
    pub(super) fn end(&mut self, outcome: Option<Outcome>) {
        self.counts = outcome.unwrap_or(self.counts);
        self.is_over = true;
        self.version += 1;
    }

    fn enter(&mut self, node: usize, phase: Phase) {
        self.version += 1;
        let before = self.nodes[node].phase;
        if before == phase {
            return;
        }
        let is_over = |phase| matches!(phase, Phase::Made | Phase::Lost);
        match (is_over(before), is_over(phase)) {
            (false, true) if before != Phase::Unwanted => self.settled += 1,
            (true, false) => self.settled = self.settled.saturating_sub(1),
            _ => {}
        }
        // Whoever needs it has one input more, or one less where it proved damaged.
        let flips = (before == Phase::Made) != (phase == Phase::Made);
        let consumers = if flips { self.nodes[node].consumers.clone() } else { Vec::new() };
        consumers.iter().chain([&node]).for_each(|one| self.count(*one, false));
        self.nodes[node].phase = phase;
        for consumer in &consumers {
            let missing = &mut self.nodes[*consumer].missing;
            *missing = if phase == Phase::Made { missing.saturating_sub(1) } else { *missing + 1 };
        }
        consumers.iter().chain([&node]).for_each(|one| self.count(*one, true));
    }

    /// Counts a node among those that wait, or takes it out.
    fn count(&mut self, node: usize, is_in: bool) {
        let Node { phase, group, missing, .. } = self.nodes[node];
        let change = |count: &mut usize| *count = if is_in { *count + 1 } else { count.saturating_sub(1) };
        match phase {
            Phase::Waiting if missing == 0 => {
                change(&mut self.groups[group].waiting);
                change(&mut self.groups[group].ready);
            }
            Phase::Waiting => {
                change(&mut self.groups[group].waiting);
                for input in &self.nodes[node].inputs {
                    if self.nodes[*input].phase != Phase::Made {
                        change(self.groups[group].misses.entry(self.nodes[*input].group).or_default());
                    }
                }
            }
            Phase::Elsewhere => change(&mut self.groups[group].elsewhere),
            _ => {}
        }
    }

    fn seconds(&self) -> f64 {
        let moment = self.begun + self.clock.elapsed();
        moment.duration_since(SystemTime::UNIX_EPOCH).map_or(0.0, |time| time.as_secs_f64())
    }

    /// How the run stands now.
    pub(super) fn snapshot(&self) -> Snapshot {
        let waits = |group: &&Group| group.waiting + group.elsewhere > 0;
        let waiting = |group: &Group| {
            let missed = group.misses.iter().filter(|(_, count)| **count > 0);
            WaitingStages {
                stage: group.sum.stage.clone(),
                count: group.waiting + group.elsewhere,
                ready: group.ready,
                elsewhere: group.elsewhere,
                inputs: missed.map(|(input, _)| self.groups[*input].sum.stage.clone()).collect(),
            }
        };
        let at = self.seconds();
        Snapshot {
            process: std::process::id(),
            host: self.host.clone(),
            experiments: self.experiments.clone(),
            begun: at - self.clock.elapsed().as_secs_f64(),
            at,
            tunes: self.tunes,
            stages: self.stages,
            settled: self.settled,
            counts: self.counts,
            left: self.estimate.and_then(|estimate| estimate.now(Instant::now())),
            running: self.running.values().map(Running::shown).collect(),
            waiting: self.groups.iter().filter(waits).map(waiting).collect(),
            failures: self.failures.clone(),
            is_over: self.is_over,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pipeline::fixture::{echo, experiment, trial};

    /// `a` feeds `b`, and both feed `c`, in two trials.
    fn board() -> Board {
        let one = |seed: &str| {
            let stages = vec![echo("a", seed, &[]), echo("b", seed, &["a"]), echo("c", seed, &["a", "b"])];
            trial(seed, stages)
        };
        let plan = Plan::new(&[experiment("e", vec![one("1"), one("2")])], None).unwrap();
        assert_eq!(plan.nodes.len(), 6);
        Board::new(&plan, &[true; 6], false)
    }

    fn waiting(board: &Board) -> Vec<String> {
        let text = |one: &WaitingStages| {
            format!(
                "{} {} ready {} elsewhere {} for {}",
                one.stage,
                one.count,
                one.ready,
                one.elsewhere,
                one.inputs.join("+")
            )
        };
        board.snapshot().waiting.iter().map(text).collect()
    }

    fn node(board: &Board, stage: &str, which: usize) -> usize {
        let is = |node: &&usize| board.groups[board.nodes[**node].group].sum.stage == stage;
        let all: Vec<usize> = (0..board.nodes.len()).collect();
        *all.iter().filter(is).nth(which).unwrap()
    }

    #[test]
    fn what_waits_for_what_follows_from_the_events() {
        let mut board = board();
        let key = Digest("k".into());
        let (a1, a2) = (node(&board, "a", 0), node(&board, "a", 1));
        let (b1, c1) = (node(&board, "b", 0), node(&board, "c", 0));
        assert_eq!(
            waiting(&board),
            ["a 2 ready 2 elsewhere 0 for ", "b 2 ready 0 elsewhere 0 for a", "c 2 ready 0 elsewhere 0 for a+b"]
        );
        board.begin(a1, "a".into(), &[], "echo", &key);
        board.wait_for(a2);
        assert_eq!(waiting(&board)[0], "a 1 ready 0 elsewhere 1 for ");
        board.made(a1, Some(1.0));
        assert_eq!(waiting(&board)[1], "b 2 ready 1 elsewhere 0 for a");
        board.made(a2, None);
        assert_eq!(waiting(&board), ["b 2 ready 2 elsewhere 0 for ", "c 2 ready 0 elsewhere 0 for b"]);
        board.begin(b1, "b".into(), &[], "echo", &key);
        board.failed(b1, FailedStage { name: "e/1/b".into(), error: "no".into(), log: String::new() });
        board.blocked(c1);
        assert_eq!(waiting(&board), ["b 1 ready 1 elsewhere 0 for ", "c 1 ready 0 elsewhere 0 for b"]);
        let snapshot = board.snapshot();
        assert_eq!((snapshot.settled, snapshot.stages), (4, 6));
        let Outcome { run, cached, failed, blocked, .. } = snapshot.counts;
        assert_eq!((run, cached, failed, blocked), (1, 1, 1, 1));
        let sums: Vec<(usize, usize, usize, usize)> =
            board.sums().map(|sum| (sum.run, sum.cached, sum.failed, sum.blocked)).collect();
        assert_eq!(sums, [(1, 1, 0, 0), (0, 0, 1, 0), (0, 0, 0, 1)]);
    }

    #[test]
    fn a_stage_that_is_tried_again_waits_and_one_that_proves_damaged_is_missing_again() {
        let mut board = board();
        let (a1, key) = (node(&board, "a", 0), Digest("k".into()));
        board.begin(a1, "a".into(), &[], "echo", &key);
        assert!(board.stop(a1) && !board.stop(a1));
        assert_eq!(waiting(&board)[0], "a 2 ready 2 elsewhere 0 for ");
        board.begin(a1, "a".into(), &[], "echo", &key);
        board.made(a1, Some(1.0));
        assert_eq!(board.snapshot().settled, 1);
        board.begin(a1, "a".into(), &[], "echo", &key);
        assert_eq!(board.snapshot().settled, 0);
        assert_eq!(waiting(&board)[1], "b 2 ready 0 elsewhere 0 for a");
        board.made(a1, Some(1.0));
        assert_eq!((board.snapshot().settled, waiting(&board)[1].as_str()), (1, "b 2 ready 1 elsewhere 0 for a"));
    }
}
