//! The driver: performs what the scheduler says, and tells the scheduler and the user what came of it.
//!
//! One thread owns everything here; running stages talk to it over one channel. It waits on that channel, and looks up only
//! to see whether the user wants to stop.

mod alarms;
mod begin;
mod end;
mod later;
#[cfg(test)]
mod tests;

use std::collections::{BTreeSet, HashMap, VecDeque};
use std::sync::atomic::Ordering;
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::thread::Scope;
use std::time::{Duration, Instant};

use crate::pipeline::exec::committer::ToCommitter;
use crate::pipeline::exec::device::Gpus;
use crate::pipeline::exec::driver::alarms::Alarms;
use crate::pipeline::exec::event::{Event, Outcome};
use crate::pipeline::exec::local::{News, Running, ToDriver, WorkerProgram};
use crate::pipeline::exec::machine::Machine;
use crate::pipeline::exec::request::Made;
use crate::pipeline::exec::scheduler::{Action, Input, Phase, Scheduler};
use crate::pipeline::exec::workload::Workload;
use crate::pipeline::exec::{ExecError, Options, select};
use crate::pipeline::plan::{Node, Plan};
use crate::pipeline::store::{Digest, Store, StoredResult};

/// How often the driver looks whether it is to stop, while nothing else happens.
const LOOK_UP: Duration = Duration::from_millis(50);

/// Runs what is missing of a plan. The outcome counts nodes; an error is one of the run as a whole, not of a stage.
pub fn execute(
    plan: &Plan,
    store: &Store,
    options: &Options,
    events: &mut dyn FnMut(&Event),
) -> Result<Outcome, ExecError> {
    let machine = Machine::detect(options.slots.clone());
    run(plan, store, options, machine, &WorkerProgram::open, events)
}

/// [`execute`] on a machine, with a way to find the worker program.
pub(super) fn run(
    plan: &Plan,
    store: &Store,
    options: &Options,
    machine: Machine,
    find_worker: &dyn Fn() -> Result<WorkerProgram, ExecError>,
    events: &mut dyn FnMut(&Event),
) -> Result<Outcome, ExecError> {
    let began = Instant::now();
    let again = select::nodes(plan, &options.again, "--again")?;
    let wanted = if options.until.is_empty() {
        vec![true; plan.nodes.len()]
    } else {
        select::with_ancestors(plan, select::nodes(plan, &options.until, "--until")?)
    };
    let workload = Workload::new(plan, &machine, &wanted, &again, options.jobs)?;
    // Hours of data should not be made before it shows that nothing can train on it.
    let worker = if workload.needs_worker { Some(find_worker()?) } else { None };
    let count = plan.nodes.len();
    let (sender, receiver) = channel();
    std::thread::scope(|scope| {
        let mut driver = Driver {
            plan,
            store,
            options,
            events,
            scope,
            sender,
            scheduler: Scheduler::new(workload.shapes, workload.limits, options.most_failures),
            gpus: machine.gpus,
            worker,
            find_worker,
            unfit: workload.unfit,
            again,
            inbox: VecDeque::from([Input::Begin]),
            made: vec![None; count],
            as_planned: vec![false; count],
            keys: vec![None; count],
            running: HashMap::new(),
            committer: None,
            seconds: HashMap::new(),
            alarms: Alarms::default(),
            errors: HashMap::new(),
            stopping: false,
            killed: false,
        };
        (driver.events)(&Event::Started { nodes: wanted.iter().filter(|wanted| **wanted).count() });
        for text in workload.warnings {
            (driver.events)(&Event::Warning { text });
        }
        driver.drive(&receiver);
        let outcome = driver.outcome(began.elapsed());
        (driver.events)(&Event::Finished(outcome));
        Ok(outcome)
    })
}

struct Driver<'scope, 'run> {
    plan: &'run Plan,
    store: &'scope Store,
    options: &'run Options,
    events: &'run mut dyn FnMut(&Event),
    scope: &'scope Scope<'scope, 'run>,
    sender: ToDriver,
    scheduler: Scheduler,
    gpus: Gpus,
    worker: Option<WorkerProgram>,
    find_worker: &'run dyn Fn() -> Result<WorkerProgram, ExecError>,
    /// Nodes that cannot run on this machine, and why.
    unfit: HashMap<usize, String>,
    again: BTreeSet<usize>,
    inbox: VecDeque<Input>,
    /// The results so far.
    made: Vec<Option<Made>>,
    /// Whether a result is the one that the plan has seen, so that the plan's keys below it hold.
    as_planned: Vec<bool>,
    keys: Vec<Option<Digest>>,
    running: HashMap<usize, Live>,
    /// Made when the first stage runs on a thread.
    committer: Option<ToCommitter>,
    /// For how long those ran whose results are being made durable.
    seconds: HashMap<usize, f64>,
    alarms: Alarms,
    /// Why nodes failed last.
    errors: HashMap<usize, String>,
    stopping: bool,
    killed: bool,
}

/// A stage that runs now.
struct Live {
    running: Running,
    began: Instant,
    /// Whether it was asked to end because it had run for as long as it may.
    timed_out: bool,
}

impl Driver<'_, '_> {
    fn drive(&mut self, receiver: &Receiver<(usize, News)>) {
        loop {
            while let Some(input) = self.inbox.pop_front() {
                for action in self.scheduler.on(input) {
                    self.perform(&action);
                }
                self.look_up();
            }
            if self.scheduler.is_finished() {
                return;
            }
            match receiver.recv_timeout(self.alarms.patience(LOOK_UP)) {
                Ok((node, news)) => self.hear(node, news),
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => unreachable!("the driver holds a sender itself"),
            }
            while let Some((node, alarm)) = self.alarms.ring(Instant::now()) {
                self.rung(node, alarm);
            }
            self.look_up();
        }
    }

    /// Sees whether the user wants to stop.
    fn look_up(&mut self) {
        let kill = self.options.kill.load(Ordering::Relaxed);
        if !self.stopping && (kill || self.options.interrupt.load(Ordering::Relaxed)) {
            self.stopping = true;
            self.inbox.push_back(Input::Interrupt);
        }
        if kill && !self.killed {
            self.killed = true;
            self.running.values().for_each(|live| live.running.kill());
        }
    }

    fn perform(&mut self, action: &Action) {
        match *action {
            Action::Find(node) => {
                let input = match self.find(node) {
                    Ok(input) => input,
                    Err(problem) => self.failed(node, problem, true),
                };
                self.inbox.push_back(input);
            }
            Action::Start(node, grant) => {
                if let Err(problem) = self.start(node, grant) {
                    let input = self.failed(node, problem, self.unfit.contains_key(&node));
                    self.inbox.push_back(input);
                }
            }
            Action::Stop(node) => {
                if let Some(live) = self.running.get(&node) {
                    live.running.stop();
                }
            }
            Action::Cached(node) => self.cached(node),
            Action::Share(node, maker) => {
                self.made[node] = self.made[maker].clone();
                self.cached(node);
            }
            Action::Fail(node) => self.tell_failure(node, node),
            Action::FailLike(node, other) => self.tell_failure(node, other),
            Action::GiveUp(node) => {
                let problem = self.errors.entry(node).or_default();
                problem.push_str("; it was made again and is damaged again: the disk may be failing");
            }
            Action::Retry(node, retry) => self.retry(node, retry),
            Action::Waits(node) => self.wait_for(node),
            Action::Blocked(node) => {
                (self.events)(&Event::Blocked { node, name: self.plan.nodes[node].name().clone() });
            }
        }
    }

    fn outcome(&self, elapsed: Duration) -> Outcome {
        let mut outcome = Outcome { seconds: elapsed.as_secs_f64(), ..Outcome::default() };
        for node in 0..self.plan.nodes.len() {
            match self.scheduler.phase(node) {
                Phase::Done => outcome.run += 1,
                Phase::Cached => outcome.cached += 1,
                Phase::Failed => outcome.failed += 1,
                Phase::Blocked => outcome.blocked += 1,
                Phase::Interrupted => outcome.interrupted += 1,
                Phase::Skipped => outcome.skipped += 1,
                Phase::Unwanted
                | Phase::Pending
                | Phase::Finding
                | Phase::Follows(_)
                | Phase::Elsewhere
                | Phase::Retrying
                | Phase::Queued
                | Phase::Running
                | Phase::Prepared => {}
            }
        }
        outcome
    }
}

fn made_of(stored: &StoredResult) -> Made {
    let outputs = stored.outputs.iter().map(|output| (output.name.clone(), output.digest.clone())).collect();
    Made { key: stored.key.clone(), outputs }
}

/// The name of a node in a sentence.
fn shown(node: &Node) -> String {
    let name = node.name();
    let parts = [&name.experiment, &name.trial, &name.stage].into_iter().filter(|part| !part.is_empty());
    parts.map(String::as_str).collect::<Vec<_>>().join("/")
}
