//! The proof that no failing operation and no power cut makes a store wrong: one play of all that a store does, with a fault
//! at every operation in turn, and with a cut at every operation after which any part of what was not synced is lost.
//!
//! `PIPE_PROOF=20` throws the dice of the cuts twenty times as often, and from 4 on every operation fails in every way.

mod omission;
mod stages;

use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::path::Path;
use std::sync::Arc;

use serde_json::Value;

use self::stages::{adopt, prepare, publish};
use super::disk::Disk;
use super::faults::{FAULTS, Fault, Faulty};
use super::fixture::{key, parts};
use super::volatile::{Dice, Volatile};
use super::{AcceptError, AcceptanceDraft, Digest, Found, GcPolicy, Lookup, Manifest, RunRecord, Store, StoreError};
use crate::pipeline::plan::NodeName;
use crate::pipeline::stage::{ArtifactType, Output};

/// The keys of the play. What was stored for these is damaged before it begins.
const KEYS: std::ops::RangeInclusive<usize> = 1..=14;
const HARMED: [usize; 3] = [5, 7, 8];
const USED: usize = 7;
const ACCEPTED: usize = 11;
const UNDONE: usize = 12;
const ADOPTED: usize = 13;
const COLLECTED: usize = 14;

/// What results are when nothing fails.
struct Expected {
    /// The digests of the outputs of every key.
    outputs: BTreeMap<usize, Vec<Digest>>,
    /// The result that comes from elsewhere.
    carried: Manifest,
}

/// What a user was told to have succeeded.
#[derive(Clone, Debug, Default)]
struct Told {
    /// The keys that have a result.
    results: BTreeSet<usize>,
    /// Whether the first of them is pinned.
    pinned: bool,
    /// Whether an acceptance was taken back.
    undone: bool,
}

/// A store on a disk in memory, and what its user was told.
struct Play {
    disk: Arc<Volatile>,
    faulty: Arc<Faulty>,
    store: Result<Store, StoreError>,
    told: Told,
    errors: Vec<String>,
    /// How many operations there were when each thing was done.
    ends: Vec<usize>,
}

fn root() -> &'static Path {
    Path::new("/store")
}

fn user_file() -> &'static Path {
    Path::new("/user/data")
}

fn node() -> NodeName {
    NodeName { experiment: "e".into(), trial: "seed=1".into(), stage: "s".into() }
}

fn record(number: usize) -> RunRecord {
    RunRecord { recipe: key(100), key: key(number), kind: "test".into(), file: "/e.toml".into(), earlier: Vec::new() }
}

impl Play {
    /// A process that opens the store of `disk`; the operation of the fault's number fails.
    fn begin(disk: Volatile, fault: Option<(usize, Fault)>, omitted: &HashSet<usize>) -> Self {
        let disk = Arc::new(disk);
        let faulty = Arc::new(Faulty::omitting(disk.clone(), omitted.clone()));
        if let Some((number, fault)) = fault {
            faulty.fail_at(number, fault);
        }
        Self::on(disk, faulty)
    }

    fn on(disk: Arc<Volatile>, faulty: Arc<Faulty>) -> Self {
        let store = Store::open_on(faulty.clone(), root());
        Self { disk, faulty, store, told: Told::default(), errors: Vec::new(), ends: Vec::new() }
    }

    /// A process for which nothing fails.
    fn well(disk: Volatile) -> Self {
        Self::begin(disk, None, &HashSet::new())
    }

    /// Does something, and goes on after a failure as the stages of a run do.
    fn act(&mut self, act: impl FnOnce(&Store, &Volatile) -> Result<(), StoreError>) -> bool {
        let outcome = match &self.store {
            Ok(store) => act(store, &self.disk).map_err(|error| error.to_string()),
            Err(error) => Err(error.to_string()),
        };
        self.errors.extend(outcome.as_ref().err().cloned());
        self.ends.push(self.faulty.changes().len());
        outcome.is_ok()
    }

    /// Runs the stage of a key.
    fn publish(&mut self, number: usize) {
        if self.act(|store, disk| publish(store, disk, number)) {
            self.told.results.insert(number);
        }
    }

    /// Runs the stages of two keys, whose results are committed together.
    fn publish_together(&mut self, numbers: [usize; 2]) {
        let mut told = Vec::new();
        self.act(|store, disk| {
            let prepared: Vec<_> = numbers.into_iter().map(|number| prepare(store, disk, number)).collect();
            // Whatever cannot be prepared fails alone.
            let (ready, failed): (Vec<_>, Vec<_>) = prepared.into_iter().zip(numbers).partition(|(one, _)| one.is_ok());
            let ready: Vec<_> = ready.into_iter().map(|(one, number)| (one.expect("it is ready"), number)).collect();
            let batch: Vec<_> = ready.iter().map(|((lock, prepared), _)| (lock, prepared)).collect();
            let mut outcome = failed.into_iter().try_for_each(|(one, _)| one.map(drop));
            for (committed, (_, number)) in store.commit_all(&batch).into_iter().zip(&ready) {
                match committed {
                    Ok(()) => told.push(*number),
                    Err(error) => outcome = Err(error),
                }
            }
            ready.iter().filter(|(_, number)| told.contains(number)).for_each(|((lock, _), _)| store.drop_work(lock));
            outcome
        });
        self.told.results.extend(told);
    }

    /// What a run does that finds everything stale: what is damaged goes, and every stage runs.
    fn every_stage(&mut self) {
        for number in KEYS {
            self.act(|store, _| match store.lookup(&key(number))? {
                Lookup::Damaged { what } => store.quarantine(&store.lock(&key(number))?, &what).map(drop),
                _ => Ok(()),
            });
            self.publish(number);
        }
    }

    /// Everything that a store is asked to do.
    fn everything(&mut self, expected: &Expected) {
        self.act(|store, _| store.file_digest(user_file()).and(store.save_cache()));
        self.act(|store, _| store.lease(&[&key(1)]));
        self.publish(1);
        self.publish(2);
        self.act(|store, _| store.record(&node(), &record(1)).map(drop));
        self.publish(3);
        self.act(|store, _| store.lookup(&key(1)).and(store.lookup(&key(99))).map(drop));
        let mut pinned = false;
        if self.act(|store, _| store.pin(&key(1).0).map(|pin| pinned = pin.is_some())) {
            self.told.pinned = pinned;
        }
        self.accept(ACCEPTED);
        self.accept(UNDONE);
        self.told.results.remove(&UNDONE);
        if self.act(|store, _| store.undo_acceptance(&key(UNDONE)).map(drop).map_err(of_the_store)) {
            self.told.undone = true;
        }
        if self.act(|store, disk| adopt(store, disk, expected)) {
            self.told.results.insert(ADOPTED);
        }
        self.publish(COLLECTED);
        self.publish(4);
        self.publish_together([9, 10]);
        self.publish(6);
        self.act(|store, _| match store.lookup(&key(7))? {
            Lookup::Damaged { what } => store.quarantine(&store.lock(&key(7))?, &what).map(drop),
            _ => Ok(()),
        });
        self.publish(7);
        self.act(|store, _| store.record(&node(), &record(2)).map(drop));
        self.act(|store, _| {
            let report = store.verify(None, &mut |_, _| ())?;
            store.repair(&report).map(drop)
        });
        self.act(|store, disk| {
            let lock = store.lock(&key(8))?;
            let out = store.begin_attempt(&lock, 1, &["0"])?;
            disk.put(&out.join("0/half"), b"of what a failed attempt wrote");
            store.keep_failed(&lock, &out)
        });
        self.publish(8);
        // What a user wants gone need not be there any more, and may be until it was told.
        for gone in [8, COLLECTED] {
            self.told.results.remove(&gone);
        }
        self.act(|store, _| {
            // What this process has made it would keep until it ends.
            store.end_lease()?;
            let roots = KEYS.filter(|number| ![8, COLLECTED].contains(number)).map(key).collect();
            let plan = store.plan_gc(&GcPolicy { max_size: Some(0), roots, ..GcPolicy::default() }, &|_, _| ())?;
            store.collect_garbage(&plan, &mut |_, _| (), &mut || ()).map(drop)
        });
        self.publish(8);
        // Again what is there: in its place, and where a failure in the middle of the repair has made it a miss.
        self.publish(1);
        self.publish(5);
    }

    /// Accepts the first result as that of another key.
    fn accept(&mut self, number: usize) {
        let draft = AcceptanceDraft {
            key: key(number),
            recipe: key(number),
            parts: parts(number),
            params: Value::Null,
            inputs: [].into(),
            outputs: vec![Output { name: "0".into(), artifact: ArtifactType::Files }],
            from: key(1),
            reason: "it is the same".into(),
            by: "a test".into(),
            differences: Vec::new(),
        };
        if self.act(|store, _| store.accept(draft).map(drop).map_err(of_the_store)) {
            self.told.results.insert(number);
        }
    }
}

fn of_the_store(error: AcceptError) -> StoreError {
    match error {
        AcceptError::Store(error) => error,
        other => StoreError::unfit(root(), other.to_string()),
    }
}

/// The results by a store that never failed.
fn expected() -> Expected {
    let mut play = Play::well(Volatile::new());
    let mut outputs = BTreeMap::new();
    let mut manifest = |number: usize| {
        play.publish(number);
        let Lookup::Hit(manifest) = play.store.as_ref().unwrap().lookup(&key(number)).unwrap() else { panic!() };
        outputs.insert(number, manifest.outputs.iter().map(|output| output.digest.clone()).collect());
        manifest
    };
    KEYS.for_each(|number| drop(manifest(number)));
    let carried = Manifest::clone(&manifest(ADOPTED));
    Expected { outputs, carried }
}

/// The disk on which the play begins: some results are there, damaged; some shelves are not.
fn scene(expected: &Expected) -> Volatile {
    let mut play = Play::well(Volatile::new());
    for number in HARMED {
        play.publish(number);
    }
    // An earlier process has used one of them.
    play.act(|store, _| store.lease(&[&key(USED)]).and_then(|()| store.end_lease()));
    let (store, disk) = (play.store.as_ref().unwrap(), &play.disk);
    let data = |number: usize| store.object(&expected.outputs[&number][0]).join("data");
    let mut bytes = disk.read(&data(5)).unwrap();
    bytes[3] ^= 1;
    disk.put(&data(5), &bytes);
    disk.put(&data(7), &bytes[..5]);
    bytes[4] ^= 1;
    disk.put(&data(8), &bytes);
    disk.put(user_file(), b"the user's");
    for folder in ["objects", "manifests"] {
        let folder = root().join(folder);
        for entry in disk.list(&folder).unwrap() {
            // It fails where something lies.
            let _ = disk.remove_folder(&folder.join(entry.name));
        }
    }
    disk.sync_all(root()).unwrap();
    // The user has written it anew just now, as programs do, which sync nothing.
    disk.put(user_file(), b"the USER'S");
    assert!(play.errors.is_empty(), "{:?}", play.errors);
    disk.after_kill()
}

/// What is wrong with the store of a disk that a fault or a cut has left, if anything. `told` must be there.
fn wrong(disk: Volatile, told: &Told, expected: &Expected) -> Result<(), String> {
    let mut play = Play::well(disk);
    let store = play.store.as_ref().map_err(|error| format!("it does not open: {error}"))?;
    let unexpected = |error: StoreError| error.to_string();
    for number in KEYS {
        // The index answers first, as for a plan; what it leaves out must not be what is asked next.
        let found = match store.find(&key(number)).map_err(unexpected)? {
            Found::Hit(result) => Some(result.outputs.iter().map(|output| output.digest.clone()).collect::<Vec<_>>()),
            Found::Miss | Found::Damaged { .. } => None,
        };
        let is_hit = matches!(store.lookup(&key(number)).map_err(unexpected)?, Lookup::Hit(_));
        if found.is_some() != is_hit || found.is_some_and(|digests| digests != expected.outputs[&number]) {
            return Err(format!("the index and the manifests disagree about {number}"));
        }
        match store.lookup(&key(number)).map_err(unexpected)? {
            Lookup::Hit(_) if told.undone && number == UNDONE => return Err("what was taken back is back".to_owned()),
            Lookup::Hit(manifest) => {
                let digests: Vec<Digest> = manifest.outputs.iter().map(|output| output.digest.clone()).collect();
                if digests != expected.outputs[&number] {
                    return Err(format!("{number} has another result"));
                }
            }
            Lookup::Miss if told.results.contains(&number) => return Err(format!("{number} was told and is lost")),
            Lookup::Miss => {}
            Lookup::Damaged { .. } if HARMED.contains(&number) && !told.results.contains(&number) => {}
            Lookup::Damaged { what } => return Err(format!("{number} is damaged: {what}")),
        }
    }
    let report = store.verify(None, &mut |_, _| ()).map_err(unexpected)?;
    for damage in report.damaged.iter().chain(&report.missing) {
        if told.results.iter().any(|number| key(*number) == damage.key)
            || !HARMED.iter().any(|number| key(*number) == damage.key)
        {
            return Err(format!("verification finds {}", damage.what));
        }
    }
    match store.recorded("e", "seed=1", "s").map_err(unexpected)? {
        Some(found) if found.key != key(1) && found.key != key(2) => return Err("another record".to_owned()),
        _ => {}
    }
    let pins = store.pins().map_err(unexpected)?;
    if told.pinned && !pins.iter().any(|pin| pin.keys.contains(&key(1))) {
        return Err("a pin is lost".to_owned());
    }
    store.plan_gc(&GcPolicy::default(), &|_, _| ()).map_err(unexpected)?;
    if told.results.contains(&USED) && !store.last_uses().map_err(unexpected)?.contains_key(&key(USED)) {
        return Err("it is forgotten when a result was used".to_owned());
    }
    let user = store.file_digest(user_file()).map_err(unexpected)?;
    if user != blake3::hash(&play.disk.read(user_file()).map_err(|error| error.to_string())?).into() {
        return Err("the user's file has another digest".to_owned());
    }
    play.every_stage();
    if !play.errors.is_empty() {
        return Err(format!("the next run fails: {:?}", play.errors));
    }
    let store = play.store.as_ref().expect("it was opened");
    for number in KEYS {
        let Lookup::Hit(manifest) = store.lookup(&key(number)).map_err(unexpected)? else {
            return Err(format!("{number} is no hit after the next run"));
        };
        for output in &manifest.outputs {
            store.verify_object(output).map_err(unexpected)??;
        }
    }
    Ok(())
}

/// A disk on which there is no store yet.
fn empty() -> Volatile {
    let disk = Volatile::new();
    disk.put(user_file(), b"the user's");
    disk.sync_all(Path::new("/")).unwrap();
    disk
}

/// How much is tried, as a multiple of the quick setting.
fn effort() -> u64 {
    std::env::var("PIPE_PROOF").ok().and_then(|text| text.parse().ok()).unwrap_or(1)
}

/// The operations of a play in which nothing fails.
struct Score {
    /// Of each whether it may change anything.
    changes: Vec<bool>,
    /// How many there were when each thing was done.
    ends: Vec<usize>,
}

impl Score {
    fn of(begin: &Volatile, act: &dyn Fn(&mut Play)) -> Self {
        let mut play = Play::begin(begin.after_kill(), Some((usize::MAX, Fault::Killed)), &HashSet::new());
        act(&mut play);
        assert!(play.errors.is_empty(), "{:?}", play.errors);
        Self { changes: play.faulty.changes(), ends: play.ends }
    }

    /// Every moment for a cut, as the operation before which it comes. Between two of them neither the disk changes nor what was
    /// told.
    fn cuts(&self) -> Vec<usize> {
        let after = self.changes.iter().enumerate().filter(|(_, changes)| **changes).map(|(number, _)| number + 1);
        after.chain(self.ends.iter().copied()).chain([0]).collect::<BTreeSet<_>>().into_iter().collect()
    }
}

/// Cuts the power before the operation of a number and says what is wrong afterwards, dice by dice.
fn cut_at(
    number: usize,
    seeds: std::ops::Range<u64>,
    scene: &Volatile,
    omitted: &HashSet<usize>,
    expected: &Expected,
) -> Vec<String> {
    let mut play = Play::begin(scene.after_kill(), Some((number, Fault::Killed)), omitted);
    play.everything(expected);
    let cuts = seeds.map(|seed| play.disk.after_cut(&mut Dice(seed << 32 | number as u64)));
    // A kill loses nothing, which a throw of the dice may mean too.
    let killed = number.is_multiple_of(4).then(|| play.disk.after_kill());
    let left = cuts.chain(killed);
    left.filter_map(|disk| wrong(disk, &play.told, expected).err())
        .map(|what| format!("at operation {number}: {what}"))
        .collect()
}

/// Does something for every number, on all cores, and gives what was found.
fn each(numbers: &[usize], find: impl Fn(usize) -> Vec<String> + Send + Sync) -> Vec<String> {
    use rayon::iter::{IntoParallelRefIterator as _, ParallelIterator as _};
    numbers.par_iter().flat_map_iter(|number| find(*number)).collect()
}

#[test]
fn a_power_cut_at_any_operation_loses_nothing_that_was_told_and_leaves_nothing_wrong() {
    let expected = expected();
    let scene = scene(&expected);
    let cuts = Score::of(&scene, &|play| play.everything(&expected)).cuts();
    assert!(cuts.len() > 300, "{} moments", cuts.len());
    let found = each(&cuts, |number| cut_at(number, 0..effort(), &scene, &HashSet::new(), &expected));
    assert!(found.is_empty(), "{} of {}: {:#?}", found.len(), cuts.len(), &found[..found.len().min(5)]);
}

#[test]
fn a_fault_at_any_operation_leaves_a_hit_or_a_miss_and_nothing_stuck() {
    let expected = expected();
    let scene = scene(&expected);
    let changes = Score::of(&scene, &|play| play.everything(&expected)).changes;
    let faults: Vec<Fault> = FAULTS.into_iter().filter(|fault| *fault != Fault::Killed).collect();
    // In the quick setting the operations take turns with the faults.
    for turn in 0..faults.len().min(usize::try_from(effort()).unwrap()) {
        // And of the operations that change nothing every third fails.
        let quick = |number: &usize| effort() > 1 || changes[*number] || number.is_multiple_of(3);
        let numbers: Vec<usize> = (0..changes.len()).filter(quick).collect();
        let found = each(&numbers, |number| {
            let fault = faults[(number + turn) % faults.len()];
            let mut play = Play::begin(scene.after_kill(), Some((number, fault)), &HashSet::new());
            play.everything(&expected);
            play.faulty.heal();
            let told = wrong(play.disk.after_kill(), &play.told, &expected).err();
            // The same process goes on once the disk is well.
            play.errors.clear();
            if play.store.is_ok() {
                play.every_stage();
            }
            let stuck = (!play.errors.is_empty()).then(|| format!("it goes on failing: {:?}", play.errors));
            told.into_iter().chain(stuck).map(|what| format!("{fault:?} at operation {number}: {what}")).collect()
        });
        assert!(found.is_empty(), "{} of {}: {:#?}", found.len(), numbers.len(), &found[..found.len().min(5)]);
    }
}

#[test]
fn a_store_whose_making_is_cut_short_is_made_by_the_next_process() {
    let make = |fault: Option<(usize, Fault)>| Play::begin(empty(), fault, &HashSet::new());
    let length = make(Some((usize::MAX, Fault::Killed))).faulty.heal();
    // Most operations make one of many shelves like any other.
    let told = |number: usize| number < 40 || number + 20 > length || number.is_multiple_of(16);
    let numbers: Vec<usize> = (0..=length).filter(|number| told(*number)).collect();
    let found = each(&numbers, |number| {
        let play = make(Some((number, Fault::Killed)));
        let left = (0..3 * effort()).map(|seed| play.disk.after_cut(&mut Dice(seed << 32 | number as u64)));
        let opened = left.filter_map(|disk| {
            let mut play = Play::well(disk);
            play.publish(1);
            // What was told then survives a cut in its turn.
            let mut next = Play::well(play.disk.after_cut(&mut Dice(number as u64)));
            next.act(|store, _| match store.lookup(&key(1))? {
                Lookup::Hit(_) => Ok(()),
                other => Err(StoreError::unfit(root(), format!("has {other:?}"))),
            });
            let errors: Vec<String> = play.errors.into_iter().chain(next.errors).collect();
            (!errors.is_empty()).then(|| format!("at operation {number}: {errors:?}"))
        });
        opened.collect()
    });
    assert!(found.is_empty(), "{} of {length}: {:#?}", found.len(), &found[..found.len().min(5)]);
}
