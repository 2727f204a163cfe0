//! The removal of what a plan proposes, in the order that the top of `gc` promises: manifests, then what nothing names.

use std::collections::{BTreeSet, HashSet};
use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use super::survey::References;
use super::{Garbage, GarbageKind, GcPlan, GcReport, Removal};
use crate::pipeline::store::error::At as _;
use crate::pipeline::store::{Digest, Store, StoreError};

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
            sweep.garbage(garbage)?;
            progress(plan.results.len() + done + 1, total);
        }
        for path in std::mem::take(&mut sweep.trash) {
            sweep.report.freed += self.tree_bytes(&path)?;
            self.disk.clear(&path)?;
        }
        let alone = self.alone(waiting)?;
        let kept: HashSet<Digest> = self.keys()?.into_iter().collect();
        self.fold_leases(&alone, &kept)?;
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

    /// Renames away every object that no manifest names now.
    fn objects(&mut self, waiting: &mut dyn FnMut()) -> Result<(), StoreError> {
        let store = self.store;
        let trash = store.folder("trash");
        store.disk.ensure_folder(&trash, false)?;
        let mut references = References::default();
        // Most manifests are read before anybody has to wait.
        references.refresh(store)?;
        loop {
            let alone = store.alone(waiting)?;
            let named = references.refresh(store)?;
            let unnamed = store.objects_there()?.into_iter().filter(|(digest, _)| !named.contains(digest));
            let some: Vec<PathBuf> = unnamed.map(|(_, path)| path).take(OBJECTS).collect();
            for path in &some {
                self.trash.extend(store.rename_away(path, &trash)?);
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
    fn garbage(&mut self, garbage: &Garbage) -> Result<(), StoreError> {
        let store = self.store;
        let lock = match &garbage.key {
            Some(key) => match store.try_lock(key)? {
                Some(lock) => Some(lock),
                None => {
                    self.report.busy += 1;
                    return Ok(());
                }
            },
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
            GarbageKind::Link => !store.disk.is_folder(&garbage.path),
            GarbageKind::KilledAttempt
            | GarbageKind::FailedAttempt
            | GarbageKind::OldWork
            | GarbageKind::Import
            | GarbageKind::Quarantine
            | GarbageKind::Temporary
            | GarbageKind::Trash => true,
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

    /// Moves an object into `trash`, whole; gives where it lies now.
    fn rename_away(&self, path: &Path, trash: &Path) -> Result<Option<PathBuf>, StoreError> {
        // A folder that may not be written cannot change its parent.
        let _ = self.disk.set_mode(path, 0o755);
        let moved = self.disk.beside(trash, "object-", &|to| self.disk.rename(path, to));
        match moved {
            Ok(to) => Ok(Some(to)),
            Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error).at("remove", path),
        }
    }
}
