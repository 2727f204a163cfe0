//! What lies in the store besides results that somebody may want: found by a plan, looked at again before it goes.

use std::collections::{BTreeSet, HashSet};
use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::time::Duration;

use jiff::Timestamp;

use super::survey::Survey;
use super::{Garbage, GarbageKind};
use crate::pipeline::store::disk::Sort;
use crate::pipeline::store::error::At as _;
use crate::pipeline::store::{Digest, IMPORT_MARK, Store, StoreError};

/// How long what people may want to look at stays: damaged files, and what failed attempts had written.
const FOR_PEOPLE: Duration = Duration::from_secs(30 * 86_400);

/// A half-written file this old is nobody's any more.
const HALF_WRITTEN: Duration = Duration::from_secs(86_400);

impl Store {
    /// Every piece of garbage. `older_than` is also the age at which saved work, damaged files and failed attempts go. An
    /// object that is `leased` may belong to a result that is about to be committed, and what was prepared before a kill is
    /// taken by the next run.
    pub(super) fn garbage(
        &self,
        survey: &Survey,
        leased: &HashSet<Digest>,
        older_than: Option<Duration>,
        now: Timestamp,
    ) -> Result<Vec<Garbage>, StoreError> {
        let mut found = Found { store: self, now, garbage: Vec::new() };
        let keys: HashSet<&Digest> = survey.results.iter().map(|one| &one.key).collect();
        let named: BTreeSet<&Digest> = survey.results.iter().flat_map(|one| one.objects.keys()).collect();
        let prepared = self.prepared_objects()?;
        for (digest, path) in self.shelved("objects", "")? {
            if !named.contains(&digest) && !leased.contains(&digest) && !prepared.contains(&digest) {
                found.add(GarbageKind::Object, path, None)?;
            }
        }
        for (name, path) in self.names(&self.folder("work"))? {
            let key = Digest(name);
            if key.is_whole() {
                found.work(&key, &path, keys.contains(&key), older_than)?;
            }
        }
        for (name, path) in self.names(&self.folder("logs"))? {
            let key = Digest(name);
            if key.is_whole() && !keys.contains(&key) && !self.disk.is_there(&self.work(&key)) {
                found.add(GarbageKind::Logs, path, Some(key))?;
            }
        }
        for (_, path) in self.names(&self.folder("quarantine"))? {
            if self.is_for_nobody(&path, older_than, now) {
                found.add(GarbageKind::Quarantine, path, None)?;
            }
        }
        for (_, path) in self.names(&self.folder("trash"))? {
            found.add(GarbageKind::Trash, path, None)?;
        }
        found.below(&self.folder("tensorboard"), &mut |found, path, sort| {
            let is_stale = sort == Sort::Link && !found.store.disk.is_folder(path);
            is_stale.then_some(GarbageKind::Link)
        })?;
        for folder in ["manifests", "leases", "pins", "cache", "runs"] {
            found.below(&self.folder(folder), &mut |found, path, sort| {
                let name = path.file_name().unwrap_or_default().as_encoded_bytes();
                let is_left = sort == Sort::File && name.starts_with(b".new-") && found.store.is_nobodys(path, now);
                is_left.then_some(GarbageKind::Temporary)
            })?;
        }
        Ok(found.garbage)
    }

    /// Whether nobody went on with a work folder for `older_than`.
    pub(super) fn is_old_work(
        &self,
        path: &Path,
        older_than: Option<Duration>,
        now: Timestamp,
    ) -> Result<bool, StoreError> {
        let Some(age) = older_than else { return Ok(false) };
        let parts = self.names(path)?;
        Ok(parts.iter().all(|(_, part)| self.is_older(part, age, now)) && self.is_older(path, age, now))
    }

    /// Whether what people may want to look at has lain there for long enough.
    pub(super) fn is_for_nobody(&self, path: &Path, older_than: Option<Duration>, now: Timestamp) -> bool {
        self.is_older(path, older_than.unwrap_or(FOR_PEOPLE), now)
    }

    /// Whether a half-written file is nobody's any more.
    pub(super) fn is_nobodys(&self, path: &Path, now: Timestamp) -> bool {
        self.is_older(path, HALF_WRITTEN, now)
    }

    /// Whether the last change lies further back than `age`.
    fn is_older(&self, path: &Path, age: Duration, now: Timestamp) -> bool {
        let Ok(stat) = self.disk.stat(path) else { return false };
        let since = now.as_nanosecond() - stat.identity.3;
        u128::try_from(since).is_ok_and(|since| since > age.as_nanos())
    }

    /// The names in a folder that are not hidden, with their paths, sorted; none where it is not there.
    pub(in crate::pipeline::store) fn names(&self, folder: &Path) -> Result<Vec<(String, PathBuf)>, StoreError> {
        let entries = match self.disk.list(folder) {
            Ok(entries) => entries,
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(Vec::new()),
            Err(error) => return Err(error).at("list", folder),
        };
        let named = entries.into_iter().filter_map(|entry| {
            let name = entry.name.to_str().filter(|name| !name.starts_with('.'))?.to_owned();
            Some((name, folder.join(entry.name)))
        });
        let mut names: Vec<_> = named.collect();
        names.sort();
        Ok(names)
    }
}

struct Found<'a> {
    store: &'a Store,
    now: Timestamp,
    garbage: Vec<Garbage>,
}

impl Found<'_> {
    fn add(&mut self, kind: GarbageKind, path: PathBuf, key: Option<Digest>) -> Result<(), StoreError> {
        let bytes = self.store.tree_bytes(&path)?;
        self.garbage.push(Garbage { kind, path, bytes, key });
        Ok(())
    }

    /// What of a work folder goes. One that is locked is being worked in.
    fn work(
        &mut self,
        key: &Digest,
        path: &Path,
        has_result: bool,
        older_than: Option<Duration>,
    ) -> Result<(), StoreError> {
        if self.store.is_locked(key)? {
            return Ok(());
        }
        if self.store.disk.is_there(&path.join(IMPORT_MARK)) {
            return self.add(GarbageKind::Import, path.to_owned(), Some(key.clone()));
        }
        if has_result {
            return self.add(GarbageKind::FinishedWork, path.to_owned(), Some(key.clone()));
        }
        if self.store.is_old_work(path, older_than, self.now)? {
            return self.add(GarbageKind::OldWork, path.to_owned(), Some(key.clone()));
        }
        for (name, part) in self.store.names(path)? {
            if name.starts_with("out-") {
                self.add(GarbageKind::KilledAttempt, part, Some(key.clone()))?;
            } else if name == "failed" && self.store.is_for_nobody(&part, older_than, self.now) {
                self.add(GarbageKind::FailedAttempt, part, Some(key.clone()))?;
            }
        }
        Ok(())
    }

    /// Adds what `judge` says of everything below `folder`; links are not followed.
    fn below(
        &mut self,
        folder: &Path,
        judge: &mut dyn FnMut(&Self, &Path, Sort) -> Option<GarbageKind>,
    ) -> Result<(), StoreError> {
        let mut open = vec![folder.to_owned()];
        while let Some(folder) = open.pop() {
            let entries = match self.store.disk.list(&folder) {
                Ok(entries) => entries,
                Err(error) if error.kind() == ErrorKind::NotFound => continue,
                Err(error) => return Err(error).at("list", &folder),
            };
            for entry in entries {
                let path = folder.join(&entry.name);
                if entry.is_folder {
                    open.push(path);
                } else if let Ok(stat) = self.store.disk.stat(&path)
                    && let Some(kind) = judge(self, &path, stat.sort)
                {
                    self.garbage.push(Garbage { kind, path, bytes: stat.size(), key: None });
                }
            }
        }
        Ok(())
    }
}
