//! The engine beside an oracle that always computes everything: random graphs, random edits, random damage, random ends.
//!
//! After each edit a run must leave exactly the outputs that a computation from scratch gives, and must have run exactly the
//! stages whose tuple of code, parameters, inputs and files has no whole result in the store. The oracle never asks the
//! engine: it counts the lines that stages leave outside the store, and reads the store's bytes itself.
//!
//! `PIPE_CASES=10000 cargo test -p pipe --lib proof` runs more cases than the few of every day.

mod harm;
mod probe;
mod world;

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use proptest::prelude::*;
use proptest::test_runner::{Config, TestCaseError, TestRunner};

use self::harm::{Harm, harms};
use self::probe::{RAN, read};
use self::world::{Edit, Expected, Start, World, edits, starts};
use crate::pipeline::exec::event::{Event, Outcome};
use crate::pipeline::exec::{Options, execute};
use crate::pipeline::plan::{Node, NodeName, Plan, State};
use crate::pipeline::store::{Digest, Lookup, Store};

/// How a run goes.
#[derive(Clone, Copy, Debug)]
enum How {
    /// Undisturbed.
    Plain,
    /// Of one stage and what it needs.
    Until(u8),
    /// With one stage run in any case.
    Again(u8),
    /// Two runs of one plan at the same time.
    Twice,
    /// Asked to stop at an event.
    Interrupt(u8),
    /// Ended at an event as by SIGKILL: the next run finds the store as it lay there at that moment.
    Killed(u8),
    /// With damage done at an event.
    Rots(u8, u16),
}

fn ways() -> impl Strategy<Value = How> {
    prop_oneof![
        8 => Just(How::Plain),
        2 => any::<u8>().prop_map(How::Until),
        2 => any::<u8>().prop_map(How::Again),
        1 => Just(How::Twice),
        2 => (0u8..12).prop_map(How::Interrupt),
        2 => (0u8..12).prop_map(How::Killed),
        1 => (0u8..12, any::<u16>()).prop_map(|(event, place)| How::Rots(event, place)),
    ]
}

/// One thing between two runs.
#[derive(Clone, Copy, Debug)]
enum Change {
    Edit(Edit),
    Harm(Harm),
}

type Step = (Vec<Change>, How);

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let change = prop_oneof![4 => edits().prop_map(Change::Edit), 1 => harms().prop_map(Change::Harm)];
    proptest::collection::vec((proptest::collection::vec(change, 0..4), ways()), 1..6)
}

/// What is wrong with a run.
type Wrong = TestCaseError;

macro_rules! hold {
    ($condition:expr, $($message:tt)*) => {
        if !$condition {
            return Err(TestCaseError::fail(format!($($message)*)));
        }
    };
}

/// A world, its store, and what the oracle has seen of both.
struct Case {
    place: PathBuf,
    world: World,
    store: Store,
    /// The key of a tuple, as the engine said it.
    keys: HashMap<String, Digest>,
    /// The tuple of a key.
    tuples: HashMap<Digest, String>,
    /// The bytes of manifests as they were written; what was written anew may lie in a copy as it was before.
    manifests: HashMap<Digest, HashSet<Vec<u8>>>,
}

/// What came of a run.
#[derive(Default)]
struct Came {
    outcome: Outcome,
    /// How often each tuple ran.
    ran: HashMap<String, usize>,
    /// The keys of nodes that are done or cached.
    keys: Vec<(NodeName, Digest)>,
    failures: Vec<String>,
}

impl Case {
    fn new(start: Start, place: &Path) -> Self {
        let store = Store::open(&place.join("store")).unwrap();
        let world = World::new(start, place);
        let (keys, tuples, manifests) = Default::default();
        Self { place: place.to_owned(), world, store, keys, tuples, manifests }
    }

    fn step(&mut self, (changes, how): &Step) -> Result<(), Wrong> {
        for change in changes {
            match change {
                Change::Edit(edit) => self.world.edit(*edit),
                Change::Harm(harm) => harm.to(&self.place),
            }
        }
        // As another process would, which knows nothing but the folder.
        self.store = Store::open(&self.place.join("store")).unwrap();
        let expected = self.world.compute();
        match *how {
            How::Plain => self.check(&expected, &Options::default())?,
            How::Until(stage) => {
                let until = vec![self.world.name_of(stage)];
                self.check(&expected, &Options { until, ..Options::default() })?;
            }
            How::Again(stage) => {
                let again = vec![self.world.name_of(stage)];
                self.check(&expected, &Options { again, ..Options::default() })?;
            }
            How::Twice => self.twice(&expected)?,
            How::Interrupt(at) => self.interrupted(&expected, at)?,
            How::Killed(at) => self.killed(&expected, at)?,
            How::Rots(at, place) => self.rots(&expected, at, place)?,
        }
        // Whatever happened, a run after it puts everything right, and the one after that has nothing to do.
        let expected = self.world.compute();
        self.check(&expected, &Options::default())?;
        let plan = self.plan()?;
        for node in &plan.nodes {
            hold!(node.state == State::Cached, "`{}` is {:?} after a run", node.name().stage, node.state);
        }
        let came = self.execute(&plan, &Options::default(), &mut |_, _| {})?;
        hold!(came.ran.is_empty() && came.outcome.run == 0, "a second run ran {:?}", came.ran);
        hold!(came.outcome.cached == plan.nodes.len(), "a second run had {:?}", came.outcome);
        Ok(())
    }

    /// Plans a run, and forgets what earlier ones ran.
    fn plan(&self) -> Result<Plan, Wrong> {
        let _ = std::fs::remove_file(self.place.join(RAN));
        let planned = Plan::new(&self.world.experiments(), Some(&self.store));
        planned.map_err(|error| TestCaseError::fail(format!("no plan: {error}")))
    }

    fn execute(&self, plan: &Plan, options: &Options, watch: &mut dyn FnMut(usize, &Event)) -> Result<Came, Wrong> {
        let (mut came, mut count) = (Came::default(), 0);
        let outcome = execute(plan, &self.store, options, &mut |event| {
            match event {
                Event::Done { name, key, .. } | Event::Cached { name, key, .. } => {
                    came.keys.push((name.clone(), key.clone()));
                }
                Event::Failed { error, .. } => came.failures.push(error.clone()),
                _ => {}
            }
            watch(count, event);
            count += 1;
        });
        came.outcome = outcome.map_err(|error| TestCaseError::fail(error.to_string()))?;
        came.ran = lines(&self.place.join(RAN));
        Ok(came)
    }

    /// Runs, and holds the run against what must come of it.
    fn check(&mut self, expected: &Expected, options: &Options) -> Result<(), Wrong> {
        let wanted = expected.wanted(options.until.first().map(String::as_str));
        let before = self.look(expected);
        let plan = self.plan()?;
        let came = self.execute(&plan, options, &mut |_, _| {})?;
        hold!(came.failures.is_empty(), "failed: {:?}", came.failures);
        self.learn(expected, &came)?;
        let again: BTreeSet<String> = expected
            .stages
            .iter()
            .filter(|((_, stage), _)| options.again.contains(stage))
            .map(|(_, computed)| computed.tuple.line())
            .collect();
        let due = Due { wanted: &wanted, before: &before, again: &again };
        self.check_minimal(expected, &due, &came)?;
        self.check_plan(&plan, expected, &due, &came)?;
        self.check_bytes(expected, &wanted)
    }

    /// What the store has of each tuple before a run.
    fn look(&self, expected: &Expected) -> Before {
        let lines = expected.stages.values().map(|computed| (computed.tuple.line(), &computed.outputs));
        let stages = lines.map(|(line, outputs)| (line.clone(), self.had(&line, outputs))).collect();
        Before { stages, prepared: self.left_prepared() }
    }

    /// The keys for which killed runs have left a result prepared, which the next run takes where it is whole.
    fn left_prepared(&self) -> HashSet<Digest> {
        let works = std::fs::read_dir(self.place.join("store/work")).into_iter().flatten().flatten();
        let prepared = works.filter(|work| work.path().join("prepared.json").exists());
        prepared.map(|work| Digest(work.file_name().into_string().unwrap())).collect()
    }

    /// Whether a killed run had left a result of this tuple prepared. Its key may be known only after the run.
    fn was_prepared(&self, line: &str, before: &Before) -> bool {
        self.keys.get(line).is_some_and(|key| before.prepared.contains(key))
    }

    fn had(&self, line: &str, outputs: &[probe::Content]) -> Had {
        let Some(key) = self.keys.get(line) else { return Had::Nothing };
        let manifest = self.manifest_path(key);
        let Ok(bytes) = std::fs::read(manifest) else { return Had::Nothing };
        if !self.manifests.get(key).is_some_and(|written| written.contains(&bytes)) {
            return Had::Nothing;
        }
        let manifest: serde_json::Value = serde_json::from_slice(&bytes).unwrap();
        let mut broken = BTreeSet::new();
        for (output, content) in outputs.iter().enumerate() {
            let digest = Digest(manifest["outputs"][output]["digest"].as_str().unwrap().to_owned());
            let object = self.store.object(&digest);
            if read(&object) != *content || harm::is_executable(&object) {
                broken.insert(digest);
            }
        }
        if broken.is_empty() { Had::Whole } else { Had::Broken(broken) }
    }

    fn manifest_path(&self, key: &Digest) -> PathBuf {
        self.place.join("store/manifests").join(&key.0[..2]).join(format!("{key}.json"))
    }

    /// Holds that a tuple has one key and a key one tuple, and remembers what was written.
    fn learn(&mut self, expected: &Expected, came: &Came) -> Result<(), Wrong> {
        for (name, key) in &came.keys {
            let computed = &expected.stages[&(name.trial.clone(), name.stage.clone())];
            let line = computed.tuple.line();
            let known = self.keys.entry(line.clone()).or_insert_with(|| key.clone());
            hold!(known == key, "`{}` has the key {key} and had {known} for the same", name.stage);
            let known = self.tuples.entry(key.clone()).or_insert_with(|| line.clone());
            hold!(*known == line, "`{}` has the key {key} of another stage: {:?}", name.stage, computed.tuple);
        }
        for (key, line) in &self.tuples {
            // A manifest that was there before and was not written anew may have come to harm since.
            let is_new = came.ran.contains_key(line) || !self.manifests.contains_key(key);
            if let Some(bytes) = is_new.then(|| std::fs::read(self.manifest_path(key)).ok()).flatten() {
                self.manifests.entry(key.clone()).or_default().insert(bytes);
            }
        }
        Ok(())
    }

    fn check_minimal(&self, expected: &Expected, due: &Due<'_>, came: &Came) -> Result<(), Wrong> {
        let Due { wanted, before, again } = *due;
        let made = self.objects_of(came.ran.keys());
        let wanted: BTreeMap<String, &(String, String)> =
            wanted.iter().map(|name| (expected.stages[name].tuple.line(), name)).collect();
        for (line, name) in &wanted {
            let ran = came.ran.get(line).copied().unwrap_or(0);
            let needed = match &before.stages[line] {
                _ if again.contains(line) => (1, usize::MAX),
                Had::Whole => (0, 0),
                // Another stage of this run may have made the same object again before this one was looked at.
                Had::Broken(objects) if objects.is_subset(&made) => (0, 1),
                Had::Nothing if self.was_prepared(line, before) => (0, 1),
                Had::Broken(_) | Had::Nothing => (1, 1),
            };
            hold!(
                (needed.0..=needed.1).contains(&ran),
                "`{name:?}` ran {ran} times and not {needed:?}; it had {:?}",
                before.stages[line]
            );
        }
        for line in came.ran.keys() {
            hold!(wanted.contains_key(line), "a stage ran that nobody wanted");
        }
        Ok(())
    }

    /// Holds that the plan foretold the run.
    fn check_plan(&self, plan: &Plan, expected: &Expected, due: &Due<'_>, came: &Came) -> Result<(), Wrong> {
        let Due { wanted, before, again } = *due;
        let line = |node: &Node| {
            let name = node.name();
            expected.stages[&(name.trial.clone(), name.stage.clone())].tuple.line()
        };
        for node in &plan.nodes {
            let (name, line) = (node.name(), line(node));
            let has_ran = came.ran.contains_key(&line);
            let reasoned = node.reasons.is_empty() == (node.state == State::Cached);
            hold!(reasoned, "`{}` is {:?} because of {:?}", name.stage, node.state, node.reasons);
            if again.contains(&line) || !wanted.contains(&(name.trial.clone(), name.stage.clone())) {
                continue;
            }
            match node.state {
                State::Cached => hold!(!has_ran, "`{}` was cached in the plan and ran", name.stage),
                State::Run | State::Resume => {
                    // A node of which only the recipe is known may turn out to be what another one has made or was before.
                    let may_meet = node.key.is_none() && before.stages[&line] == Had::Whole;
                    let may_be_remade =
                        matches!(before.stages[&line], Had::Broken(_)) || self.was_prepared(&line, before);
                    hold!(
                        has_ran || may_meet || may_be_remade,
                        "`{}` should run ({:?}) and did not",
                        name.stage,
                        node.reasons
                    );
                }
                State::Maybe => {}
                State::Blocked => hold!(false, "`{}` is blocked", name.stage),
            }
        }
        Ok(())
    }

    /// The objects of the results of these tuples.
    fn objects_of<'a>(&self, lines: impl Iterator<Item = &'a String>) -> BTreeSet<Digest> {
        let keys = lines.filter_map(|line| self.keys.get(line));
        let manifests = keys.filter_map(|key| std::fs::read(self.manifest_path(key)).ok());
        let mut found = BTreeSet::new();
        for bytes in manifests {
            let manifest: serde_json::Value = serde_json::from_slice(&bytes).unwrap();
            let outputs = manifest["outputs"].as_array().unwrap().iter();
            found.extend(outputs.map(|output| Digest(output["digest"].as_str().unwrap().to_owned())));
        }
        found
    }

    /// Holds that what the store delivers of each stage is what must come out, to the byte.
    fn check_bytes(&self, expected: &Expected, wanted: &BTreeSet<(String, String)>) -> Result<(), Wrong> {
        for name in wanted {
            let computed = &expected.stages[name];
            let Some(key) = self.keys.get(&computed.tuple.line()) else {
                return Err(TestCaseError::fail(format!("`{name:?}` has no result")));
            };
            let found = self.store.lookup(key).unwrap();
            let Lookup::Hit(manifest) = found else {
                return Err(TestCaseError::fail(format!("`{name:?}` has no result after a run: {found:?}")));
            };
            hold!(manifest.outputs.len() == computed.outputs.len(), "`{name:?}` has other outputs");
            for (output, content) in manifest.outputs.iter().zip(&computed.outputs) {
                let found = read(&self.store.object(&output.digest));
                hold!(found == *content, "`{name:?}` delivers {found:?} instead of {content:?}");
            }
        }
        Ok(())
    }

    /// Two runs of one plan: together they run what one would.
    fn twice(&mut self, expected: &Expected) -> Result<(), Wrong> {
        let before = self.look(expected);
        let plan = self.plan()?;
        let other = Store::open(&self.place.join("store")).unwrap();
        let options = Options { jobs: 2, ..Options::default() };
        let came = std::thread::scope(|scope| {
            let second = scope.spawn(|| execute(&plan, &other, &options, &mut |_| {}).unwrap());
            let mut came = self.execute(&plan, &options, &mut |_, _| {})?;
            let second = second.join().unwrap();
            hold!(second.failed == 0, "the second run at a time: {second:?}");
            came.ran = lines(&self.place.join(RAN));
            Ok(came)
        })?;
        hold!(came.failures.is_empty(), "one of two runs failed: {:?}", came.failures);
        self.learn(expected, &came)?;
        let wanted = expected.wanted(None);
        let due = Due { wanted: &wanted, before: &before, again: &BTreeSet::new() };
        self.check_minimal(expected, &due, &came)?;
        self.check_bytes(expected, &wanted)
    }

    /// A run that is asked to stop runs nothing that it need not, and what it says is done stays done.
    fn interrupted(&mut self, expected: &Expected, at: u8) -> Result<(), Wrong> {
        let before = self.look(expected);
        let plan = self.plan()?;
        let options = Options { interrupt: Arc::new(AtomicBool::new(false)), jobs: 1, ..Options::default() };
        let came = self.execute(&plan, &options, &mut |count, _| {
            if count == usize::from(at) {
                options.interrupt.store(true, Ordering::Relaxed);
            }
        })?;
        hold!(came.failures.is_empty(), "an interrupted run failed: {:?}", came.failures);
        self.learn(expected, &came)?;
        for (line, ran) in &came.ran {
            hold!(*ran == 1, "a stage ran {ran} times in an interrupted run");
            hold!(!matches!(before.stages.get(line), Some(Had::Whole)), "a cached stage ran in an interrupted run");
        }
        let done = came.keys.iter().map(|(name, _)| (name.trial.clone(), name.stage.clone())).collect();
        self.check_bytes(expected, &done)
    }

    fn killed(&mut self, expected: &Expected, at: u8) -> Result<(), Wrong> {
        let plan = self.plan()?;
        let (store, copy) = (self.place.join("store"), self.place.join("copy"));
        let mut taken = false;
        let came = self.execute(&plan, &Options::default(), &mut |count, _| {
            if count == usize::from(at) {
                harm::copy(&store, &copy);
                taken = true;
            }
        })?;
        // The store of the run that went on knows every manifest that the copy can hold.
        self.learn(expected, &came)?;
        if taken {
            harm::remove(&store);
            std::fs::rename(&copy, &store).unwrap();
        }
        self.store = Store::open(&store).unwrap();
        Ok(())
    }

    /// Damage in the middle of a run costs some runs and nothing else.
    fn rots(&mut self, expected: &Expected, at: u8, place: u16) -> Result<(), Wrong> {
        let plan = self.plan()?;
        let store = self.place.join("store");
        let came = self.execute(&plan, &Options::default(), &mut |count, _| {
            if count == usize::from(at) {
                harm::rot(&store, place);
            }
        })?;
        hold!(came.failures.is_empty(), "a run failed for damage: {:?}", came.failures);
        self.learn(expected, &came)
    }
}

/// What the store has of a tuple.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Had {
    Whole,
    Broken(BTreeSet<Digest>),
    Nothing,
}

/// What a run was asked for, and with which store it began.
#[derive(Clone, Copy)]
struct Due<'a> {
    /// The stages of each trial that it must leave with a result.
    wanted: &'a BTreeSet<(String, String)>,
    /// What the store had.
    before: &'a Before,
    /// The tuples that run in any case.
    again: &'a BTreeSet<String>,
}

/// What the store has before a run.
struct Before {
    /// Of each tuple.
    stages: HashMap<String, Had>,
    /// See [`Case::left_prepared`].
    prepared: HashSet<Digest>,
}

/// How often each line stands in a file.
fn lines(path: &Path) -> HashMap<String, usize> {
    let mut lines = HashMap::new();
    for line in std::fs::read_to_string(path).unwrap_or_default().lines() {
        *lines.entry(line.to_owned()).or_default() += 1;
    }
    lines
}

#[test]
fn outputs_are_exact_and_exactly_the_missing_stages_run() {
    let cases = std::env::var("PIPE_CASES").ok().and_then(|cases| cases.parse().ok()).unwrap_or(64);
    let config = Config { cases, failure_persistence: None, max_shrink_iters: 2_000, ..Config::default() };
    let mut runner = TestRunner::new(config);
    let outcome = runner.run(&(starts(), steps()), |(start, steps)| {
        let place = tempfile::tempdir_in("/dev/shm").or_else(|_| tempfile::tempdir()).unwrap();
        let mut case = Case::new(start, place.path());
        let outcome = steps.iter().try_for_each(|step| case.step(step));
        drop(case);
        harm::remove(place.path());
        outcome
    });
    if let Err(error) = outcome {
        panic!("{error}");
    }
}
