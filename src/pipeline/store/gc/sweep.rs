//! The removal of what a plan proposes, in the order that the top of `gc` promises: manifests, then what nothing names.

use std::collections::{BTreeSet, HashSet};
use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::time::Duration;

use jiff::Timestamp;

use super::survey::References;
use super::{Garbage, GarbageKind, GcPlan, GcReport, Removal};
use crate::pipeline::store::error::{At as _, is_full};
use crate::pipeline::store::{Digest, IMPORT_MARK, Store, StoreError};

/// Manifests that go while the collector has the store alone, before others get their turn.
const MANIFESTS: usize = 256;

/// Objects that are renamed away in one turn.
const OBJECTS: usize = 4096;

impl Store {
    /// Removes what `plan` proposes, as far as nobody has begun to need it. `progress` is told things done and in all;
    /// `waiting` is called if others keep the collector waiting.
    ///
    /// A kill at any moment leaves results that are whole or gone, and garbage for the next collection.
    pub fn collect_garbage(
        &self,
        plan: &GcPlan,
        progress: &mut dyn FnMut(usize, usize),
        waiting: &mut dyn FnMut(),
    ) -> Result<GcReport, StoreError> {
        let mut sweep = Sweep { store: self, report: GcReport::default(), trash: BTreeSet::new() };
        let total = plan.results.len() + plan.garbage.len();
        let mut removed = Vec::new();
        for some in plan.results.chunks(MANIFESTS) {
            removed.extend(sweep.manifests(some, waiting)?);
            progress(removed.len(), total);
        }
        let shelves: BTreeSet<PathBuf> =
            removed.iter().filter_map(|key| self.manifest_path(key).parent().map(Path::to_owned)).collect();
        for shelf in shelves {
            self.disk.sync(&shelf).at("write", &shelf)?;
        }
        if !removed.is_empty() || plan.garbage.iter().any(|one| one.kind == GarbageKind::Object) {
            sweep.objects(waiting)?;
        }
        for key in &removed {
            sweep.logs(key)?;
        }
        for (done, garbage) in plan.garbage.iter().enumerate() {
            sweep.garbage(garbage, plan.older_than)?;
            progress(plan.results.len() + done + 1, total);
        }
        for path in std::mem::take(&mut sweep.trash) {
            sweep.report.freed += self.tree_bytes(&path)?;
            self.disk.clear(&path)?;
        }
        let alone = self.alone(waiting)?;
        let kept: HashSet<Digest> = self.keys()?.into_iter().collect();
        match self.fold_leases(&alone, &kept) {
            // The record of uses stays as it lies, in many files.
            Err(error) if error.is_full() => tracing::debug!(%error, "leases are not folded"),
            folded => folded?,
        }
        Ok(sweep.report)
    }
}

struct Sweep<'a> {
    store: &'a Store,
    report: GcReport,
    /// What was renamed away and is still to be taken apart.
    trash: BTreeSet<PathBuf>,
}

impl Sweep<'_> {
    /// Removes manifests that may still go; gives their keys.
    fn manifests(&mut self, some: &[Removal], waiting: &mut dyn FnMut()) -> Result<Vec<Digest>, StoreError> {
        let store = self.store;
        let _alone = store.alone(waiting)?;
        let leased = store.leased()?;
        let pinned = store.pinned()?;
        let uses = store.last_uses()?;
        let mut removed = Vec::new();
        for Removal { key, last_used, .. } in some {
            let used_since = uses.get(key).is_some_and(|used| used > last_used);
            if used_since || leased.contains(key) || pinned.contains(key) {
                self.report.busy += 1;
                continue;
            }
            let Some(_lock) = store.try_lock(key)? else {
                self.report.busy += 1;
                continue;
            };
            if store.remove(&store.manifest_path(key))? {
                self.report.results += 1;
                removed.push(key.clone());
            }
        }
        Ok(removed)
    }

    /// Renames away every object that no manifest names now, that no process reads and that was not prepared before a kill.
    fn objects(&mut self, waiting: &mut dyn FnMut()) -> Result<(), StoreError> {
        let store = self.store;
        let trash = store.folder("trash");
        let mut references = References::default();
        // Most manifests are read before anybody has to wait.
        references.refresh(store)?;
        loop {
            let alone = store.alone(waiting)?;
            let mut named = references.refresh(store)?;
            named.extend(store.leased()?);
            named.extend(store.prepared_objects()?);
            let unnamed = store.shelved("objects", "")?.into_iter().filter(|(digest, _)| !named.contains(digest));
            let some: Vec<PathBuf> = unnamed.map(|(_, path)| path).take(OBJECTS).collect();
            for path in &some {
                self.trash.extend(store.rename_away(path, &trash, &mut self.report.freed)?);
                self.report.objects += 1;
            }
            drop(alone);
            if some.len() < OBJECTS {
                return Ok(());
            }
        }
    }

    /// Removes the logs and the work of a result that is gone, unless it is being made again.
    fn logs(&mut self, key: &Digest) -> Result<(), StoreError> {
        let store = self.store;
        let Some(_lock) = store.try_lock(key)? else { return Ok(()) };
        let is_back = store.disk.is_there(&store.manifest_path(key)) || store.has_saved_work(key);
        if !is_back {
            self.clear(&store.logs(key))?;
        }
        Ok(())
    }

    /// Removes a piece of garbage if it still is one.
    fn garbage(&mut self, garbage: &Garbage, older_than: Option<Duration>) -> Result<(), StoreError> {
        let store = self.store;
        let (path, now) = (&garbage.path, Timestamp::now());
        let lock = match &garbage.key {
            Some(key) => {
                let Some(lock) = store.try_lock(key)? else {
                    self.report.busy += 1;
                    return Ok(());
                };
                Some(lock)
            }
            None => None,
        };
        let has_result =
            |key: &Option<Digest>| key.as_ref().is_some_and(|key| store.disk.is_there(&store.manifest_path(key)));
        let is_garbage = match garbage.kind {
            // They went with the objects of the results that went.
            GarbageKind::Object => return Ok(()),
            GarbageKind::FinishedWork => has_result(&garbage.key),
            GarbageKind::Logs => {
                let works = garbage.key.as_ref().is_some_and(|key| store.disk.is_there(&store.work(key)));
                !has_result(&garbage.key) && !works
            }
            GarbageKind::Link => !store.disk.is_folder(path),
            GarbageKind::OldWork => has_result(&garbage.key) || store.is_old_work(path, older_than, now)?,
            GarbageKind::FailedAttempt | GarbageKind::Quarantine => store.is_for_nobody(path, older_than, now),
            GarbageKind::Temporary => store.is_nobodys(path, now),
            GarbageKind::Import => store.disk.is_there(&path.join(IMPORT_MARK)),
            GarbageKind::KilledAttempt | GarbageKind::Trash => true,
        };
        if is_garbage {
            let removed = match garbage.kind {
                GarbageKind::Link | GarbageKind::Temporary => {
                    let removed = store.remove(&garbage.path)?;
                    self.report.freed += if removed { garbage.bytes } else { 0 };
                    removed
                }
                _ => self.clear(&garbage.path)?,
            };
            self.report.garbage += usize::from(removed);
        }
        drop(lock);
        Ok(())
    }

    /// Removes a folder; gives whether it was there.
    fn clear(&mut self, path: &Path) -> Result<bool, StoreError> {
        if !self.store.disk.is_there(path) {
            return Ok(false);
        }
        self.report.freed += self.store.tree_bytes(path)?;
        self.store.disk.clear(path)?;
        Ok(true)
    }
}

impl Store {
    /// Removes a file; gives whether it was there.
    pub(in crate::pipeline::store) fn remove(&self, path: &Path) -> Result<bool, StoreError> {
        match self.disk.remove_file(path) {
            Ok(()) => Ok(true),
            Err(error) if error.kind() == ErrorKind::NotFound => Ok(false),
            Err(error) => Err(error).at("remove", path),
        }
    }

    /// Moves an object into `trash`, whole; gives where it lies now. On a full disk it goes at once, and `freed` grows.
    fn rename_away(&self, path: &Path, trash: &Path, freed: &mut u64) -> Result<Option<PathBuf>, StoreError> {
        // A folder that may not be written cannot change its parent.
        let _ = self.disk.set_mode(path, 0o755);
        let moved = self.disk.beside(trash, "object-", &|to| self.disk.rename(path, to));
        match moved {
            Ok(to) => Ok(Some(to)),
            Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
            // There is not even room for a name. Cut short, this leaves an object of no result that whoever stores the same
            // content finds damaged and replaces.
            Err(error) if is_full(&error) => {
                *freed += self.tree_bytes(path)?;
                self.disk.clear(path).map(|()| None)
            }
            Err(error) => Err(error).at("remove", path),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
    use std::time::Duration;

    use crate::pipeline::plan::NodeName;
    use crate::pipeline::store::faults::{FAULTS, Fault};
    use crate::pipeline::store::fixture::{Sandbox, draft, key};
    use crate::pipeline::store::{GcPlan, GcPolicy, GcReport, Lookup, RunRecord, Store};

    /// Every result that nothing holds.
    fn everything() -> GcPolicy {
        GcPolicy { max_size: Some(0), ..GcPolicy::default() }
    }

    fn plan(store: &Store, policy: &GcPolicy) -> GcPlan {
        store.plan_gc(policy, &|_, _| ()).unwrap()
    }

    fn collect(store: &Store, policy: &GcPolicy) -> GcReport {
        store.collect_garbage(&plan(store, policy), &mut |_, _| (), &mut || ()).unwrap()
    }

    fn is_hit(store: &Store, number: usize) -> bool {
        match store.lookup(&key(number)).unwrap() {
            Lookup::Hit(_) => true,
            Lookup::Miss => false,
            Lookup::Damaged { what } => panic!("{what}"),
        }
    }

    /// Files below a folder of the store.
    fn count(store: &Store, folder: &str) -> usize {
        let mut open = vec![store.root().join(folder)];
        let mut files = 0;
        while let Some(folder) = open.pop() {
            for entry in std::fs::read_dir(folder).into_iter().flatten() {
                let path = entry.unwrap().path();
                if path.is_dir() && !path.is_symlink() { open.push(path) } else { files += 1 }
            }
        }
        files
    }

    #[test]
    fn what_goes_goes_whole_and_shared_content_stays() {
        let sandbox = Sandbox::new();
        sandbox.publish(1, &[("data", "one")]);
        sandbox.publish(2, &[("data", "one")]);
        sandbox.publish(3, &[("data", "three")]);
        sandbox.store.end_lease().unwrap();
        std::fs::create_dir_all(sandbox.store.logs(&key(3))).unwrap();
        std::fs::write(sandbox.store.logs(&key(3)).join("log.txt"), "said").unwrap();
        sandbox.store.pin(&key(2).0).unwrap().unwrap();
        let plan = plan(&sandbox.store, &everything());
        assert_eq!((plan.results.len(), plan.freed, plan.over), (2, 5 + 4, 3));
        let report = sandbox.store.collect_garbage(&plan, &mut |_, _| (), &mut || ()).unwrap();
        assert_eq!((report.results, report.objects, report.busy), (2, 1, 0));
        assert_eq!([1, 2, 3].map(|number| is_hit(&sandbox.store, number)), [false, true, false]);
        assert_eq!(["objects", "manifests", "logs", "trash"].map(|folder| count(&sandbox.store, folder)), [1, 1, 0, 0]);
        assert!(self::plan(&sandbox.store, &GcPolicy::default()).is_empty());
    }

    #[test]
    fn what_was_prepared_before_a_kill_is_still_there_for_the_next_run() {
        let mut sandbox = Sandbox::new();
        let lock = sandbox.store.lock(&key(1)).unwrap();
        let draft = draft(1, &sandbox.folder(&[("data", "one")]));
        sandbox.store.prepare(&lock, draft).unwrap();
        drop(lock);
        sandbox.store.end_lease().unwrap();
        sandbox.reopen();
        assert!(plan(&sandbox.store, &everything()).is_empty());
        sandbox.publish(2, &[("data", "two")]);
        sandbox.store.end_lease().unwrap();
        assert_eq!(collect(&sandbox.store, &everything()).objects, 1, "that of the other result alone");
        let lock = sandbox.store.lock(&key(1)).unwrap();
        let prepared = sandbox.store.recover(&lock).unwrap().expect("it is all there");
        assert!(sandbox.store.commit_all(&[(&lock, &prepared)]).remove(0).is_ok() && is_hit(&sandbox.store, 1));
    }

    #[test]
    fn leftovers_go_and_what_serves_somebody_stays() {
        let sandbox = Sandbox::new();
        let store = &sandbox.store;
        let manifest = sandbox.publish(1, &[("data", "one")]);
        sandbox.publish(2, &[("data", "two")]);
        store.end_lease().unwrap();
        std::fs::remove_file(store.manifest_path(&key(2))).unwrap();
        let write = |path: std::path::PathBuf| {
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, "0123456789").unwrap();
        };
        write(store.work(&key(1)).join("state/old"));
        write(store.work(&key(3)).join("state/saved"));
        write(store.work(&key(3)).join("out-1/out/half"));
        write(store.work(&key(3)).join("failed/out/look"));
        write(store.work(&key(4)).join("out-1/out/half"));
        write(store.logs(&key(3)).join("log.txt"));
        write(store.logs(&key(5)).join("log.txt"));
        write(store.root().join("quarantine/now/data"));
        write(store.root().join("trash/object-0/data"));
        std::fs::create_dir_all(store.root().join("tensorboard/e")).unwrap();
        std::os::unix::fs::symlink("../../logs/none", store.root().join("tensorboard/e/s")).unwrap();
        let _working = Store::open(store.root()).unwrap().lock(&key(4)).unwrap();
        collect(store, &GcPolicy::default());
        assert!(is_hit(store, 1) && store.object(&manifest.outputs[0].digest).exists());
        assert_eq!(count(store, "objects"), 1);
        let there = |path: std::path::PathBuf| path.exists();
        assert!(!there(store.work(&key(1))) && there(store.work(&key(3)).join("state/saved")));
        assert!(!there(store.work(&key(3)).join("out-1")) && there(store.work(&key(3)).join("failed/out/look")));
        assert!(there(store.work(&key(4)).join("out-1")), "somebody works there");
        assert!(there(store.logs(&key(3))) && !there(store.logs(&key(5))));
        assert!(there(store.root().join("quarantine/now")) && count(store, "trash") == 0);
        assert!(std::fs::symlink_metadata(store.root().join("tensorboard/e/s")).is_err());
        std::thread::sleep(Duration::from_millis(20));
        collect(store, &GcPolicy { older_than: Some(Duration::from_millis(1)), ..GcPolicy::default() });
        assert!(!there(store.work(&key(3))) && count(store, "quarantine") == 0 && !is_hit(store, 1));
    }

    #[test]
    fn an_object_that_a_process_reads_outlives_its_result() {
        let sandbox = Sandbox::new();
        let manifest = sandbox.publish(1, &[("data", "one")]);
        sandbox.store.end_lease().unwrap();
        let object = &manifest.outputs[0].digest;
        let reader = Store::open(sandbox.store.root()).unwrap();
        reader.lease(&[&key(1), object]).unwrap();
        std::fs::remove_file(sandbox.store.manifest_path(&key(1))).unwrap();
        assert_eq!(collect(&sandbox.store, &everything()).objects, 0);
        reader.verify_digest(object).unwrap().unwrap();
        drop(reader);
        assert_eq!(collect(&sandbox.store, &everything()).objects, 1);
        assert_eq!(count(&sandbox.store, "objects"), 0);
    }

    #[test]
    fn saved_work_that_somebody_goes_on_with_after_the_plan_stays() {
        let sandbox = Sandbox::new();
        let store = &sandbox.store;
        let set_back = |path: &std::path::Path| {
            let old = std::time::SystemTime::now() - Duration::from_secs(7200);
            std::fs::File::open(path).unwrap().set_modified(old).unwrap();
        };
        let works = [1, 2, 3].map(|number| store.work(&key(number)));
        for work in &works {
            std::fs::create_dir_all(work.join("state")).unwrap();
            set_back(&work.join("state"));
            set_back(work);
        }
        let hour = GcPolicy { older_than: Some(Duration::from_secs(3600)), ..GcPolicy::default() };
        let old = plan(store, &hour);
        assert_eq!(old.garbage.len(), 3);
        std::fs::write(works[0].join("state/saved"), "new").unwrap();
        std::fs::create_dir(works[1].join("failed")).unwrap();
        store.collect_garbage(&old, &mut |_, _| (), &mut || ()).unwrap();
        assert_eq!(works.map(|work| work.exists()), [true, true, false]);
    }

    #[test]
    fn a_full_disk_can_be_freed() {
        let (mut sandbox, disk) = Sandbox::faulty();
        for number in 1..=3 {
            sandbox.publish(number, &[("data", &number.to_string())]);
            sandbox.store.lease(&[&key(number)]).unwrap();
            sandbox.store = Store::open_on(disk.clone(), sandbox.store.root()).unwrap();
        }
        disk.fail_at(0, Fault::NoRoom);
        let report = collect(&sandbox.store, &everything());
        assert_eq!((report.results, report.objects, report.freed), (3, 3, 3));
        assert_eq!(count(&sandbox.store, "objects") + count(&sandbox.store, "trash"), 0);
        disk.heal();
        assert_eq!(count(&sandbox.store, "leases"), 3);
        collect(&sandbox.store, &GcPolicy::default());
        assert_eq!(count(&sandbox.store, "leases"), 1, "folded when there is room");
    }

    #[test]
    fn names_keep_their_newest_results() {
        let sandbox = Sandbox::new();
        let name = NodeName { experiment: "e".into(), trial: String::new(), stage: "s".into() };
        for number in [1, 2, 3, 2, 4] {
            sandbox.publish(number, &[("data", &number.to_string())]);
            let record = RunRecord {
                recipe: key(number),
                key: key(number),
                kind: "test".into(),
                file: "/e.toml".into(),
                earlier: Vec::new(),
            };
            sandbox.store.record(&name, &record).unwrap();
        }
        let last = |last| GcPolicy { keep_last: Some(last), ..GcPolicy::default() };
        assert!(plan(&sandbox.store, &last(4)).is_empty());
        collect(&sandbox.store, &last(2));
        assert_eq!([1, 2, 3, 4].map(|number| is_hit(&sandbox.store, number)), [false, true, false, true]);
        sandbox.publish(1, &[("data", "1")]);
        collect(&sandbox.store, &last(3));
        assert!(is_hit(&sandbox.store, 1), "what is gone takes no place among the newest");
    }

    #[test]
    fn what_is_used_or_pinned_after_the_plan_stays() {
        let mut sandbox = Sandbox::new();
        for number in 1..=4 {
            sandbox.publish(number, &[("data", &number.to_string())]);
        }
        let old = plan(&sandbox.store, &everything());
        assert_eq!(old.results.len(), 4);
        let other = Store::open(sandbox.store.root()).unwrap();
        other.lease(&[&key(1)]).unwrap();
        std::thread::sleep(Duration::from_millis(5));
        sandbox.store.lease(&[&key(2)]).unwrap();
        sandbox.reopen();
        sandbox.store.pin(&key(3).0[..12]).unwrap().unwrap();
        let report = sandbox.store.collect_garbage(&old, &mut |_, _| (), &mut || ()).unwrap();
        assert_eq!((report.results, report.busy), (1, 3));
        assert_eq!([1, 2, 3, 4].map(|number| is_hit(&sandbox.store, number)), [true, true, true, false]);
        drop(other);
        assert!(sandbox.store.unpin(&key(3).0[..12]).unwrap());
        assert_eq!(collect(&sandbox.store, &everything()).results, 3);
        assert_eq!(count(&sandbox.store, "objects"), 0);
    }

    #[test]
    fn a_failure_or_a_kill_at_any_operation_leaves_whole_results_and_the_next_collection_ends_the_work() {
        // Most operations list shelves. With a step of 1 every one fails in turn, which takes minutes.
        let step: usize = std::env::var("PIPE_FAULT_STEP").map_or(61, |step| step.parse().unwrap());
        for (begin, fault) in FAULTS.into_iter().enumerate() {
            for number in (begin % step..).step_by(step) {
                let (mut sandbox, disk) = Sandbox::faulty();
                for number in 1..=3 {
                    sandbox.publish(number, &[("data", &number.to_string())]);
                }
                sandbox.publish(4, &[("data", "1")]);
                std::fs::create_dir_all(sandbox.store.work(&key(1)).join("state")).unwrap();
                sandbox.store.pin(&key(4).0).unwrap().unwrap();
                let plan = plan(&sandbox.store, &everything());
                disk.fail_at(number, fault);
                let ended = sandbox.store.collect_garbage(&plan, &mut |_, _| (), &mut || ());
                let operations = disk.heal();
                sandbox.reopen();
                for number in 1..=4 {
                    // It panics where something is damaged.
                    assert!(is_hit(&sandbox.store, number) || number < 4, "{fault:?} at {number}");
                }
                collect(&sandbox.store, &everything());
                let left = ["objects", "manifests", "trash", "work"].map(|folder| count(&sandbox.store, folder));
                assert_eq!(left, [1, 1, 0, 0], "{fault:?} at {number}");
                assert!(is_hit(&sandbox.store, 4));
                if number >= operations {
                    ended.unwrap();
                    break;
                }
            }
        }
    }

    #[test]
    fn publishers_and_readers_never_lose_what_they_hold_to_collectors() {
        let sandbox = Sandbox::new();
        let root = sandbox.store.root();
        let (over, collected) = (AtomicBool::new(false), AtomicUsize::new(0));
        std::thread::scope(|scope| {
            for worker in 0..3_usize {
                let (sandbox, over, collected) = (&sandbox, &over, &collected);
                scope.spawn(move || {
                    for round in 0_usize.. {
                        if round >= 60 && (collected.load(Ordering::Relaxed) > 20 || round == 3000) {
                            break;
                        }
                        // As a process of its own: it leases, looks, makes what is missing, and rests on it.
                        let store = Store::open(root).unwrap();
                        let number = (worker * 31 + round * 7) % 60;
                        // Every key has the same content, so publishers meet each other's objects all the time.
                        store.lease(&[&key(number)]).unwrap();
                        if !is_hit(&store, number) {
                            sandbox.publish(number, &[("data", "same")]);
                        }
                        let Lookup::Hit(found) = store.lookup(&key(number)).unwrap() else { panic!("it went") };
                        std::thread::sleep(Duration::from_micros(300));
                        store.verify_object(&found.outputs[0]).unwrap().unwrap();
                    }
                    over.store(true, Ordering::Relaxed);
                });
            }
            for _ in 0..2 {
                scope.spawn(|| {
                    let store = Store::open(root).unwrap();
                    while !over.load(Ordering::Relaxed) {
                        collected.fetch_add(collect(&store, &everything()).results, Ordering::Relaxed);
                    }
                });
            }
        });
        assert!(collected.into_inner() > 20, "hardly anything was ever collected");
        assert!(sandbox.store.verify(None, &mut |_, _| ()).unwrap().is_sound());
    }
}
