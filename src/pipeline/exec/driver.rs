//! The driver: performs what the scheduler says, and tells the scheduler and the user what came of it.
//!
//! One thread owns everything here; running stages talk to it over one channel. It waits on that channel, and looks up only
//! to see whether the user wants to stop.

use std::collections::{BTreeSet, HashMap, VecDeque};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::thread::Scope;
use std::time::{Duration, Instant};

use crate::pipeline::exec::device::{self, Gpus};
use crate::pipeline::exec::event::{Event, Outcome};
use crate::pipeline::exec::local::{self, Ending, News, Running, ToDriver, WorkerProgram};
use crate::pipeline::exec::request::{self, Made};
use crate::pipeline::exec::scheduler::{Action, Input, Phase, Scheduler, Shape};
use crate::pipeline::exec::slots::{Gpu, Grant, Limits, Need};
use crate::pipeline::exec::{ExecError, Options, select};
use crate::pipeline::plan::{Node, Plan, State, key};
use crate::pipeline::stage::Place;
use crate::pipeline::store::{Digest, Lookup, Manifest, RunRecord, Store};

/// How often the driver looks whether it is to stop, while nothing else happens.
const LOOK_UP: Duration = Duration::from_millis(50);
/// How often a key that another process holds is asked for.
const ASK: Duration = Duration::from_millis(50);

/// Runs what is missing of a plan. The outcome counts nodes; an error is one of the run as a whole, not of a stage.
pub fn execute(
    plan: &Plan,
    store: &Store,
    options: &Options,
    events: &mut dyn FnMut(&Event),
) -> Result<Outcome, ExecError> {
    run(plan, store, options, &WorkerProgram::open, events)
}

/// [`execute`] with a way to find the worker program.
pub(super) fn run(
    plan: &Plan,
    store: &Store,
    options: &Options,
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
    let gpus = Gpus::detect();
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let mut shapes = Vec::with_capacity(plan.nodes.len());
    let mut unfit = HashMap::new();
    let mut needs_worker = false;
    for (index, node) in plan.nodes.iter().enumerate() {
        let place = node.spec.kind.place;
        let again = again.contains(&index);
        let need = device::need(place, &node.spec.run, cores, gpus.count()).unwrap_or_else(|problem| {
            unfit.insert(index, problem);
            Need { cpus: 1, gpu: Gpu::None }
        });
        needs_worker |= place == Place::Worker && wanted[index] && (again || node.state != State::Cached);
        let inputs = node.edges.iter().map(|edge| edge.from).collect();
        shapes.push(Shape { inputs, need, wanted: wanted[index], again });
    }
    // Hours of data should not be made before it shows that nothing can train on it.
    let worker = if needs_worker { Some(find_worker()?) } else { None };
    let limits = Limits { cpus: cores, gpus: gpus.count(), jobs: if options.jobs == 0 { cores } else { options.jobs } };
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
            scheduler: Scheduler::new(shapes, limits, options.keep_going),
            gpus,
            worker,
            find_worker,
            unfit,
            again,
            inbox: VecDeque::from([Input::Begin]),
            made: vec![None; count],
            as_planned: vec![false; count],
            keys: vec![None; count],
            running: HashMap::new(),
            errors: HashMap::new(),
            stopping: false,
            killed: false,
            over: Arc::default(),
        };
        (driver.events)(&Event::Started { nodes: wanted.iter().filter(|wanted| **wanted).count() });
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
    running: HashMap<usize, (Running, Instant)>,
    errors: HashMap<usize, String>,
    stopping: bool,
    killed: bool,
    /// Tells the threads that ask for other processes' locks that nobody waits any more.
    over: Arc<AtomicBool>,
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
                return self.over.store(true, Ordering::Relaxed);
            }
            match receiver.recv_timeout(LOOK_UP) {
                Ok((node, news)) => self.hear(node, news),
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => unreachable!("the driver holds a sender itself"),
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
            self.running.values().for_each(|(running, _)| running.kill());
        }
    }

    fn perform(&mut self, action: &Action) {
        match *action {
            Action::Find(node) => {
                let input = match self.find(node) {
                    Ok(input) => input,
                    Err(problem) => {
                        self.fail(node, problem);
                        Input::Failed(node)
                    }
                };
                self.inbox.push_back(input);
            }
            Action::Start(node, grant) => {
                if let Err(problem) = self.start(node, grant) {
                    self.fail(node, problem);
                    self.inbox.push_back(Input::Failed(node));
                }
            }
            Action::Stop(node) => {
                if let Some((running, _)) = self.running.get(&node) {
                    running.stop();
                }
            }
            Action::Cached(node) => self.cached(node),
            Action::Share(node, maker) => {
                self.made[node] = self.made[maker].clone();
                self.cached(node);
            }
            Action::FailLike(node, other) => {
                let problem = self.errors.get(&other).cloned().unwrap_or_default();
                self.fail(node, problem);
            }
            Action::GiveUp(node) => {
                let problem = self.errors.get(&node).cloned().unwrap_or_default();
                self.fail(node, format!("{problem}; it was made again and is damaged again: the disk may be failing"));
            }
            Action::Waits(node) => {
                if let Some(key) = self.keys[node].clone() {
                    (self.events)(&Event::Waiting { node, name: self.plan.nodes[node].name().clone(), key });
                }
            }
            Action::Blocked(node) => {
                (self.events)(&Event::Blocked { node, name: self.plan.nodes[node].name().clone() });
            }
        }
    }

    /// Works out a node's key and looks for its result.
    fn find(&mut self, node: usize) -> Result<Input, String> {
        let planned = &self.plan.nodes[node];
        let known = planned.key.clone().filter(|_| planned.edges.iter().all(|edge| self.as_planned[edge.from]));
        let key = if let Some(key) = known {
            key
        } else {
            let parts = request::parts(planned, &planned.spec.stage.params(), &self.made)?;
            key::key(&parts).map_err(|error| error.to_string())?
        };
        // What the plan has just seen need not be looked up twice; whoever uses it reads every byte anyway.
        let seen = planned.result.as_ref().filter(|result| self.keys[node].is_none() && result.key == key);
        self.keys[node] = Some(key.clone());
        if let Some(manifest) = seen {
            self.made[node] = Some(made_of(manifest));
            self.as_planned[node] = true;
            return Ok(Input::Found { node, key, cached: true });
        }
        let cached = match self.store.lookup(&key).map_err(|error| error.to_string())? {
            Lookup::Hit(manifest) => {
                self.made[node] = Some(made_of(&manifest));
                self.as_planned[node] = planned.key.as_ref() == Some(&key) && planned.state == State::Cached;
                true
            }
            Lookup::Miss => false,
            Lookup::Damaged { what } => {
                self.store.quarantine(&key, &what).map_err(|error| error.to_string())?;
                let text = format!("the result of `{}` is damaged and was put aside: {what}", shown(planned));
                (self.events)(&Event::Warning { text });
                false
            }
        };
        Ok(Input::Found { node, key, cached })
    }

    fn start(&mut self, node: usize, grant: Grant) -> Result<(), String> {
        if let Some(problem) = self.unfit.get(&node) {
            return Err(problem.clone());
        }
        let planned = &self.plan.nodes[node];
        let key = self.keys[node].clone().ok_or("the stage has no key")?;
        let lock = self.store.try_lock(&key).map_err(|error| error.to_string())?;
        if lock.is_none() {
            self.wait_for(node, key)?;
            self.inbox.push_back(Input::Elsewhere(node));
            return Ok(());
        }
        // Whoever runs the stage takes it again, which is another process where the kind runs in the worker.
        drop(lock);
        let again = self.again.remove(&node);
        let request = request::request(planned, key.clone(), again, grant, self.store, &self.made)?;
        let kind = request.kind.clone();
        (self.events)(&Event::Running { node, name: planned.name().clone(), kind, key: key.clone() });
        let running = match planned.spec.kind.place {
            Place::InProcess => {
                let stage = planned.spec.stage.clone();
                local::start_thread(self.scope, self.store, node, request, stage, &self.sender)
                    .map_err(|error| format!("cannot start a thread: {error}"))?
            }
            Place::Worker => {
                let program = match self.worker.take() {
                    Some(program) => program,
                    None => (self.find_worker)().map_err(|error| error.to_string())?,
                };
                let program = self.worker.insert(program);
                let (log, visible) = (self.store.logs(&key).join("log.txt"), self.gpus.visible(grant.gpu));
                local::start_worker(self.scope, program, node, &request, log, visible, &self.sender)
                    .map_err(|error| format!("{error:#}"))?
            }
        };
        self.running.insert(node, (running, Instant::now()));
        Ok(())
    }

    /// Lets a thread wait until another process lets go of the key.
    fn wait_for(&self, node: usize, key: Digest) -> Result<(), String> {
        let (store, sender) = (self.store, self.sender.clone());
        let over = Arc::clone(&self.over);
        let wait = move || {
            // A lock that cannot be asked for counts as free: the attempt that follows says what is wrong.
            while !over.load(Ordering::Relaxed) && store.try_lock(&key).is_ok_and(|lock| lock.is_none()) {
                std::thread::sleep(ASK);
            }
            if sender.send((node, News::Freed)).is_err() {
                tracing::debug!(node, "nobody waits for the key any more");
            }
        };
        let spawned = std::thread::Builder::new().name("lock".to_owned()).spawn_scoped(self.scope, wait);
        spawned.map(drop).map_err(|error| format!("cannot start a thread: {error}"))
    }

    fn hear(&mut self, node: usize, news: News) {
        let ending = match news {
            News::Event(event) => return (self.events)(&Event::Stage { node, event }),
            News::Waiting => return self.inbox.push_back(Input::Waiting(node)),
            News::Freed => return self.inbox.push_back(Input::Freed(node)),
            News::Ended(ending) => ending,
        };
        let seconds = self.running.remove(&node).map_or(0.0, |(_, began)| began.elapsed().as_secs_f64());
        let input = match ending {
            Ending::Done(manifest) => match self.done(node, manifest, seconds) {
                Ok(()) => Input::Done(node),
                Err(problem) => {
                    self.fail(node, problem);
                    Input::Failed(node)
                }
            },
            Ending::Interrupted => {
                (self.events)(&Event::Interrupted { node, name: self.plan.nodes[node].name().clone() });
                Input::Interrupted(node)
            }
            Ending::Failed(problem) => {
                self.fail(node, problem);
                Input::Failed(node)
            }
            Ending::Damaged { reference, what } => self.damaged(node, &reference, &what),
        };
        self.inbox.push_back(input);
    }

    fn done(&mut self, node: usize, manifest: Option<Box<Manifest>>, seconds: f64) -> Result<(), String> {
        let key = self.keys[node].clone().ok_or("the stage has no key")?;
        let manifest = match manifest {
            Some(manifest) => *manifest,
            None => match self.store.lookup(&key).map_err(|error| error.to_string())? {
                Lookup::Hit(manifest) => Arc::unwrap_or_clone(manifest),
                Lookup::Miss => return Err("the worker said that it is done and there is no result".to_owned()),
                Lookup::Damaged { what } => return Err(format!("the result is damaged already: {what}")),
            },
        };
        self.made[node] = Some(made_of(&manifest));
        self.as_planned[node] = false;
        self.record(node, &key);
        let name = self.plan.nodes[node].name().clone();
        (self.events)(&Event::Done { node, name, key, seconds, metrics: manifest.metrics });
        Ok(())
    }

    fn cached(&mut self, node: usize) {
        if let Some(key) = self.made[node].as_ref().map(|made| made.key.clone()) {
            self.record(node, &key);
            (self.events)(&Event::Cached { node, name: self.plan.nodes[node].name().clone(), key });
        }
    }

    fn damaged(&mut self, node: usize, reference: &str, what: &str) -> Input {
        let planned = &self.plan.nodes[node];
        let problem = format!("the input `{reference}` is damaged: {what}");
        let Some(edge) = planned.edges.iter().find(|edge| edge.reference == reference) else {
            self.fail(node, problem);
            return Input::Failed(node);
        };
        self.as_planned[edge.from] = false;
        let text = format!("the input `{reference}` of `{}` is damaged and was put aside: {what}", shown(planned));
        (self.events)(&Event::Warning { text });
        self.errors.insert(node, problem);
        Input::Damaged { node, producer: edge.from }
    }

    fn fail(&mut self, node: usize, error: String) {
        self.errors.insert(node, error.clone());
        let log = self.keys[node].as_ref().map(|key| self.store.logs(key).join("log.txt"));
        let log = log.filter(|log| log.is_file()).map_or_else(String::new, |log| log.display().to_string());
        (self.events)(&Event::Failed { node, name: self.plan.nodes[node].name().clone(), error, log });
    }

    /// Writes down what every name of the node has become. The result is safe already; a view that cannot be written is
    /// worth a warning.
    fn record(&mut self, node: usize, key: &Digest) {
        let planned = &self.plan.nodes[node];
        for name in &planned.names {
            let file = self.plan.experiments.get(&name.experiment).cloned().unwrap_or_default();
            let (recipe, kind) = (planned.recipe.clone(), planned.spec.kind.name.to_owned());
            let record = RunRecord { recipe, key: key.clone(), kind, file };
            let written = self.store.record(name, &record).and_then(|()| self.store.link_tensorboard(name, key));
            if let Err(error) = written {
                let text = format!("the run of `{}` is not recorded: {error}", shown(planned));
                (self.events)(&Event::Warning { text });
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
                | Phase::Queued
                | Phase::Running => {}
            }
        }
        outcome
    }
}

fn made_of(manifest: &Manifest) -> Made {
    let outputs = manifest.outputs.iter().map(|output| (output.name.clone(), output.digest.clone())).collect();
    Made { key: manifest.key.clone(), outputs }
}

/// The name of a node in a sentence.
fn shown(node: &Node) -> String {
    let name = node.name();
    let parts = [&name.experiment, &name.trial, &name.stage].into_iter().filter(|part| !part.is_empty());
    parts.map(String::as_str).collect::<Vec<_>>().join("/")
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use serde_json::json;

    use super::*;
    use crate::pipeline::exec::worker::{Program, serve};
    use crate::pipeline::fixture::{Act, Remote, echo, experiment, run_remote, stage, toy, toys, trial, with_file};
    use crate::pipeline::spec::{Experiment, StageSpec};
    use crate::pipeline::stage::StageEvent;

    /// The name under which the tests' own program is started as a worker.
    const WORKER: &str = "pipe-worker-under-test";

    struct Place {
        folder: tempfile::TempDir,
        store: Store,
        options: Options,
    }

    /// What came of a run, with the names of the stages that ran, in order.
    #[derive(Debug)]
    struct Came {
        outcome: Outcome,
        ran: Vec<String>,
        events: Vec<Event>,
    }

    impl Came {
        fn failures(&self) -> Vec<&str> {
            let error = |event: &'_ Event| matches!(event, Event::Failed { .. });
            self.events
                .iter()
                .filter(|event| error(event))
                .map(|event| match event {
                    Event::Failed { error, .. } => error.as_str(),
                    _ => "",
                })
                .collect()
        }
    }

    impl Place {
        fn new() -> Self {
            let folder = tempfile::tempdir().unwrap();
            let store = Store::open(&folder.path().join("store")).unwrap();
            // These tests are about order, not about this machine's cores.
            Self { folder, store, options: Options { jobs: 4, ..Options::default() } }
        }

        fn plan(&self, experiments: &[Experiment]) -> Plan {
            Plan::new(experiments, Some(&self.store)).unwrap()
        }

        fn run(&self, experiments: &[Experiment]) -> Came {
            self.run_watched(experiments, &mut |_| {})
        }

        fn run_watched(&self, experiments: &[Experiment], watch: &mut dyn FnMut(&Event)) -> Came {
            let plan = self.plan(experiments);
            let (mut ran, mut events) = (Vec::new(), Vec::new());
            let link = self.folder.path().join(WORKER);
            let find_worker = || {
                if !link.exists() {
                    std::os::unix::fs::symlink(std::env::current_exe().unwrap(), &link).unwrap();
                }
                let test = "pipeline::exec::driver::tests::the_worker_side".to_owned();
                WorkerProgram::at(link.clone(), vec!["--exact".into(), test, "--nocapture".into()])
            };
            let outcome = super::run(&plan, &self.store, &self.options, &find_worker, &mut |event| {
                watch(event);
                if let Event::Running { name, .. } = event {
                    ran.push(name.stage.clone());
                }
                events.push(event.clone());
            });
            Came { outcome: outcome.unwrap(), ran, events }
        }

        fn text(&self, experiments: &[Experiment], stage: &str) -> String {
            let plan = self.plan(experiments);
            let node = plan.nodes.iter().find(|node| node.name().stage == stage).unwrap();
            let Lookup::Hit(manifest) = self.store.lookup(node.key.as_ref().unwrap()).unwrap() else {
                panic!("no result")
            };
            std::fs::read_to_string(self.store.object(&manifest.outputs[0].digest).join("text")).unwrap()
        }

        /// State and reasons by stage.
        fn plan_says(&self, experiments: &[Experiment]) -> Vec<(String, State, Vec<String>)> {
            let nodes = self.plan(experiments).nodes.into_iter();
            let said = |node: &Node| node.reasons.iter().map(ToString::to_string).collect();
            nodes.map(|node| (node.name().stage.clone(), node.state, said(&node))).collect()
        }
    }

    fn chain(first: &str) -> [Experiment; 1] {
        toys(vec![echo("a", first, &[]), toy("b", "b", Act::Constant, &["a"]), echo("c", "c", &["b", "b.second"])])
    }

    #[test]
    fn a_chain_runs_once_and_is_cached_ever_after() {
        let place = Place::new();
        let came = place.run(&chain("1"));
        assert_eq!((came.ran, came.outcome.run), (vec!["a".into(), "b".into(), "c".into()], 3));
        assert_eq!(place.text(&chain("1"), "c"), "cconstant outconstant second out");
        let came = place.run(&chain("1"));
        assert_eq!((came.ran.len(), came.outcome.cached), (0, 3));
        let record = place.store.recorded("toys", "", "c").unwrap().unwrap();
        assert_eq!(Some(record.key), place.plan(&chain("1")).nodes[2].key);
        assert!(record.file.is_absolute() && record.file.ends_with("toys.toml"));
    }

    #[test]
    fn an_input_that_comes_out_as_before_spares_what_follows() {
        let place = Place::new();
        place.run(&chain("1"));
        let says = place.plan_says(&chain("2"));
        assert_eq!(
            says,
            [
                ("a".into(), State::Run, vec!["text changed (\"1\" => \"2\")".into()]),
                ("b".into(), State::Maybe, vec!["input `a` runs".into()]),
                ("c".into(), State::Maybe, vec!["input `b` may run".into(), "input `b.second` may run".into()]),
            ]
        );
        let came = place.run(&chain("2"));
        assert_eq!((came.ran, came.outcome.cached), (vec!["a".into(), "b".into()], 1));
        assert_eq!(place.run(&chain("1")).outcome.cached, 3, "what was is still there");
    }

    #[test]
    fn renaming_and_reordering_run_nothing() {
        let place = Place::new();
        place.run(&chain("1"));
        let renamed = [experiment(
            "other",
            vec![trial(
                "x=1",
                vec![echo("z", "c", &["y.out", "y.second"]), toy("y", "b", Act::Constant, &["w"]), echo("w", "1", &[])],
            )],
        )];
        assert_eq!(place.run(&renamed).outcome.cached, 3);
    }

    #[test]
    fn a_changed_file_is_a_reason() {
        let place = Place::new();
        let file = place.folder.path().join("data.jsonl");
        std::fs::write(&file, "one").unwrap();
        place.run(&toys(vec![with_file("a", &file)]));
        std::fs::write(&file, "two").unwrap();
        let says = place.plan_says(&toys(vec![with_file("a", &file)]));
        assert_eq!(says, [("a".into(), State::Run, vec![format!("file {} changed", file.display())])]);
    }

    #[test]
    fn a_failure_stops_the_run_or_only_what_rests_on_it() {
        let mut place = Place::new();
        place.options.jobs = 1;
        let stages = || {
            toys(vec![toy("a", "", Act::Fail, &[]), echo("b", "", &["a"]), echo("c", "", &["b"]), echo("d", "d", &[])])
        };
        let came = place.run(&stages());
        let Outcome { run, failed, blocked, skipped, .. } = came.outcome;
        assert_eq!((run, failed, blocked, skipped), (0, 1, 2, 1));
        assert_eq!(came.failures(), ["it was meant to fail"]);
        place.options.keep_going = true;
        let Outcome { run, failed, blocked, skipped, .. } = place.run(&stages()).outcome;
        assert_eq!((run, failed, blocked, skipped), (1, 1, 2, 0));
    }

    #[test]
    fn a_panic_fails_its_stage_alone() {
        let place = Place::new();
        let came = place.run(&toys(vec![toy("a", "", Act::Panic, &[])]));
        assert_eq!(came.failures(), ["the stage panicked: it was meant to panic"]);
        let Some(Event::Failed { log, .. }) = came.events.iter().rfind(|event| matches!(event, Event::Failed { .. }))
        else {
            panic!("nothing failed")
        };
        assert!(std::fs::read_to_string(log).unwrap().contains("meant to panic"), "{log}");
    }

    #[test]
    fn a_stage_that_failed_runs_again() {
        let place = Place::new();
        let stages = || toys(vec![toy("a", "", Act::Flaky, &[])]);
        assert_eq!(place.run(&stages()).outcome.failed, 1);
        assert_eq!(place.plan_says(&stages())[0].1, State::Resume);
        assert_eq!(place.run(&stages()).outcome.run, 1);
    }

    #[test]
    fn until_limits_again_forces_and_a_typo_is_told() {
        let mut place = Place::new();
        place.options.until = vec!["b".into()];
        assert_eq!(place.run(&chain("1")).ran, ["a", "b"]);
        place.options.again = vec!["toys/b".into()];
        let came = place.run(&chain("1"));
        assert_eq!((came.ran, came.outcome.cached), (vec!["b".into()], 1));
        for (until, hint) in [("bb", "did you mean `"), ("evaluate", "expected one of `a`, `b`, `c`")] {
            place.options.until = vec![until.into()];
            let error = execute(&place.plan(&chain("1")), &place.store, &place.options, &mut |_| {}).unwrap_err();
            assert!(error.to_string().contains(hint), "{error}");
        }
    }

    #[test]
    fn an_interrupted_stage_saves_and_goes_on_at_the_next_run() {
        let mut place = Place::new();
        let stages = || toys(vec![toy("a", "", Act::Wait, &[]), echo("b", "", &["a"])]);
        let flag = Arc::clone(&place.options.interrupt);
        let came = place.run_watched(&stages(), &mut |event| {
            if matches!(event, Event::Stage { event: StageEvent::Progress { .. }, .. }) {
                flag.store(true, Ordering::Relaxed);
            }
        });
        assert_eq!((came.outcome.interrupted, came.outcome.run), (2, 0));
        assert!(came.events.iter().any(|event| matches!(event, Event::Interrupted { .. })));
        let says = place.plan_says(&stages());
        assert_eq!(says[0].1, State::Resume);
        assert_eq!(says[0].2, ["was interrupted at 1 of 2 waits"]);
        place.options.interrupt = Arc::default();
        assert_eq!(place.run(&stages()).outcome.run, 2);
    }

    #[test]
    fn recipes_that_meet_in_a_key_run_once() {
        let place = Place::new();
        let constant = |name: &str, text: &str| toy(name, text, Act::Constant, &[]);
        let came = place.run(&toys(vec![
            constant("a1", "1"),
            constant("a2", "2"),
            echo("b1", "b", &["a1"]),
            echo("b2", "b", &["a2"]),
        ]));
        assert_eq!((came.outcome.run, came.outcome.cached), (3, 1));
        assert!(place.store.recorded("toys", "", "b1").unwrap() != place.store.recorded("toys", "", "b2").unwrap());
    }

    #[test]
    fn a_result_that_rots_while_it_is_needed_is_made_again() {
        let place = Place::new();
        let short = || toys(vec![echo("a", "a", &[])]);
        let long = || toys(vec![echo("a", "a", &[]), echo("b", "b", &["a"])]);
        place.run(&short());
        let objects = place.store.root().join("objects");
        let came = place.run_watched(&long(), &mut |event| {
            if matches!(event, Event::Cached { .. }) {
                rot(&objects);
            }
        });
        assert_eq!((came.ran, came.outcome.run), (vec!["b".into(), "a".into(), "b".into()], 2));
        assert!(came.events.iter().any(|event| matches!(event, Event::Warning { text } if text.contains("toys/b"))));
        rot(&objects);
        assert_eq!(place.plan_says(&long())[0].1, State::Run);
        assert!(place.plan_says(&long())[0].2[0].starts_with("its result is damaged"));
        assert_eq!(place.run(&long()).outcome.failed, 0);
        assert_eq!(place.text(&long(), "b"), "ba out out");
    }

    /// Changes a byte of every file below a folder.
    fn rot(folder: &Path) {
        use std::os::unix::fs::PermissionsExt as _;
        let mut open = vec![folder.to_owned()];
        while let Some(folder) = open.pop() {
            for entry in std::fs::read_dir(&folder).unwrap().map(Result::unwrap) {
                if entry.path().is_dir() {
                    open.push(entry.path());
                } else {
                    std::fs::set_permissions(entry.path(), std::fs::Permissions::from_mode(0o644)).unwrap();
                    let mut bytes = std::fs::read(entry.path()).unwrap();
                    bytes[0] ^= 1;
                    std::fs::write(entry.path(), bytes).unwrap();
                }
            }
        }
    }

    #[test]
    fn a_key_held_elsewhere_is_waited_for() {
        let place = Place::new();
        let stages = toys(vec![echo("a", "a", &[])]);
        let key = place.plan(&stages).nodes[0].key.clone().unwrap();
        let mut lock = place.store.try_lock(&key).unwrap();
        assert!(lock.is_some());
        let came = place.run_watched(&stages, &mut |event| {
            if matches!(event, Event::Waiting { .. }) {
                lock = None;
            }
        });
        assert_eq!(came.outcome.run, 1);
        assert!(came.events.iter().any(|event| matches!(event, Event::Waiting { .. })));
    }

    #[test]
    fn a_hundred_stages_are_quick() {
        let place = Place::new();
        let name = |index: usize| format!("s{index:04}");
        let chain = (0..50).map(|index| {
            let above = if index == 0 { vec![] } else { vec![name(index - 1)] };
            echo(&name(index), &index.to_string(), &above.iter().map(String::as_str).collect::<Vec<_>>())
        });
        let fan = (50..100).map(|index| echo(&name(index), &index.to_string(), &["s0000"]));
        let stages = toys(chain.chain(fan).collect());
        let began = Instant::now();
        assert_eq!(place.run(&stages).outcome.run, 100);
        let first = began.elapsed();
        let began = Instant::now();
        assert_eq!(place.run(&stages).outcome.cached, 100);
        let again = began.elapsed();
        assert!(first < Duration::from_secs(20) && again < Duration::from_secs(5), "{first:?}, {again:?}");
    }

    fn remote(name: &str, act: Act, inputs: &[&str]) -> StageSpec {
        let mut spec = stage::<Remote>(name, json!({"text": name, "act": act, "inputs": inputs}));
        spec.run.device = "cpu".to_owned();
        spec
    }

    /// Started under the name of a worker, this is one; started as a test, it finds no driver.
    #[test]
    #[expect(
        clippy::disallowed_methods,
        reason = "as a worker it is a program, and the test harness must not speak after it"
    )]
    fn the_worker_side() {
        let program = Program { runners: &[("remote", run_remote)], prepare: |_| Ok(()), set_threads: |_| {} };
        if std::env::args().next().is_some_and(|name| name.ends_with(WORKER)) {
            std::process::exit(serve(&program).unwrap().into());
        }
        let error = serve(&program).unwrap_err().to_string();
        assert!(error.contains("no driver"), "{error}");
    }

    #[test]
    fn a_worker_runs_a_stage_and_tells_how_it_went() {
        let place = Place::new();
        let stages = || toys(vec![echo("a", "a", &[]), remote("b", Act::Echo, &["a"]), echo("c", "c", &["b"])]);
        let came = place.run(&stages());
        assert_eq!((came.outcome.run, came.failures()), (3, vec![]));
        assert_eq!(place.text(&stages(), "c"), "cba out out out");
        let came = place.run(&toys(vec![remote("fails", Act::Fail, &[])]));
        assert_eq!(came.failures(), ["it was meant to fail"]);
        let came = place.run(&toys(vec![remote("panics", Act::Panic, &[])]));
        assert_eq!(came.failures(), ["the stage panicked: it was meant to panic"]);
    }

    #[test]
    fn a_worker_that_dies_is_explained() {
        let place = Place::new();
        let came = place.run(&toys(vec![remote("killed", Act::Kill, &[])]));
        let error = came.failures().concat();
        assert!(error.starts_with("the worker was killed by signal 9 (out of memory?)"), "{error}");
        let came = place.run(&toys(vec![remote("aborts", Act::Abort, &[])]));
        let error = came.failures().concat();
        assert!(error.starts_with("the worker was killed by signal 6 (SIGABRT)"), "{error}");
        assert!(error.contains("running 1 test"), "its last words are shown: {error}");
    }

    #[test]
    fn a_worker_saves_when_asked_and_is_killed_when_it_does_not_listen() {
        let mut place = Place::new();
        let stages = |act| toys(vec![remote("a", act, &[])]);
        for act in [Act::Wait, Act::Deaf] {
            place.options.interrupt = Arc::default();
            place.options.kill = Arc::default();
            let (interrupt, kill) = (Arc::clone(&place.options.interrupt), Arc::clone(&place.options.kill));
            let came = place.run_watched(&stages(act), &mut |event| {
                if matches!(event, Event::Stage { event: StageEvent::Progress { .. }, .. }) {
                    kill.store(act == Act::Deaf && interrupt.load(Ordering::Relaxed), Ordering::Relaxed);
                    interrupt.store(true, Ordering::Relaxed);
                }
            });
            assert_eq!((came.outcome.interrupted, came.outcome.failed), (1, 0), "{:?}", came.events);
        }
        place.options.interrupt = Arc::default();
        place.options.kill = Arc::default();
        assert_eq!(place.run(&stages(Act::Wait)).outcome.run, 1);
    }

    #[test]
    fn a_missing_device_or_worker_is_told_before_anything_of_the_stage_runs() {
        let place = Place::new();
        let mut spec = remote("a", Act::Echo, &[]);
        spec.run.device = "cuda:99".to_owned();
        let came = place.run(&toys(vec![spec]));
        assert!(came.failures().concat().contains("the device `cuda:99` was asked for"), "{:?}", came.events);
        assert!(came.ran.is_empty());
        let plan = place.plan(&toys(vec![echo("a", "a", &[]), remote("b", Act::Echo, &["a"])]));
        let missing = || WorkerProgram::at("/nowhere/pipe-worker".into(), Vec::new());
        let error = super::run(&plan, &place.store, &place.options, &missing, &mut |_| {}).unwrap_err();
        assert!(matches!(error, ExecError::NoWorker { .. }), "{error}");
    }
}
