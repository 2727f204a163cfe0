//! The commit protocol. Outputs lie in their places; then
//!
//! 1. the manifests are written beside their places,
//! 2. all of that is synced: files, folders, names, manifests, and the outputs lose the mark of what is not;
//! 3. the manifests are renamed to their places,
//! 4. and their names are synced.
//!
//! What lies there before the third step is garbage that does no harm; after the fourth, the results are there for good. A
//! sync costs a disk much the same for one file as for many, so results that end together are committed together.
//!
//! A disk that fails to keep something tells it once, and to one process: an object that could not be synced must not bear its
//! name any more, or the next who finds it there would rely on it.

use std::collections::{BTreeSet, HashMap};
use std::io::{self, ErrorKind};
use std::path::{Path, PathBuf};

use super::error::At as _;
use super::publish::{Prepared, SEALED, Unsynced};
use super::{Digest, KeyLock, Manifest, Store, StoreError, sealed};

/// Paths up to which each is synced by itself; beyond, whole file systems are.
const SYNC_EACH: usize = 8;

impl Store {
    /// Makes what was prepared the results of their keys, durably; each has an answer of its own. Their locks are held, and
    /// their work folders stay until they are dropped.
    pub fn commit_all(&self, batch: &[(&KeyLock, &Prepared)]) -> Vec<Result<(), StoreError>> {
        let batch: Vec<_> =
            batch.iter().map(|(lock, done)| (*lock, &done.manifest, done.unsynced.as_slice())).collect();
        self.commit_each(&batch)
    }

    /// Writes the manifest of the lock's key, durably, once `unsynced` is durable: from here on the result is there. The caller
    /// has leased the objects before it looked at them.
    pub(super) fn commit(&self, lock: &KeyLock, manifest: &Manifest, unsynced: &[Unsynced]) -> Result<(), StoreError> {
        self.commit_each(&[(lock, manifest, unsynced)]).into_iter().collect()
    }

    fn commit_each(&self, batch: &[(&KeyLock, &Manifest, &[Unsynced])]) -> Vec<Result<(), StoreError>> {
        let mut written = Vec::with_capacity(batch.len());
        for (lock, manifest, unsynced) in batch {
            debug_assert_eq!(lock.key(), &manifest.key, "the lock of another key");
            written.push(self.write_beside(manifest).map(|new| {
                // The manifest first: on most file systems its sync takes the names along, and theirs then cost little.
                let objects = unsynced.iter().flat_map(|object| &object.paths);
                let paths: Vec<PathBuf> = std::iter::once(&new).chain(objects).cloned().collect();
                (new, paths)
            }));
        }
        let first: Vec<&[PathBuf]> =
            written.iter().map(|one| one.as_ref().map_or(&[][..], |(_, paths)| paths.as_slice())).collect();
        let synced = self.sync_groups(&first);
        let renamed: Vec<Result<PathBuf, StoreError>> = (written.into_iter().zip(synced).zip(batch))
            .map(|((written, synced), (_, manifest, unsynced))| {
                self.put_manifest(&written?.0, synced, manifest, unsynced)
            })
            .collect();
        let shelves: Vec<&[PathBuf]> =
            renamed.iter().map(|one| one.as_ref().map_or(&[][..], std::slice::from_ref)).collect();
        let durable = self.sync_groups(&shelves);
        let ended = renamed.into_iter().zip(durable).zip(batch);
        ended
            .map(|((renamed, durable), (_, manifest, _))| {
                renamed?;
                if let Err((_, error)) = durable {
                    // It can be read, and whoever did would tell a result that the disk may not have kept.
                    let _ = self.disk.remove_file(&self.manifest_path(&manifest.key));
                    return Err(error);
                }
                self.index_published(manifest);
                Ok(())
            })
            .collect()
    }

    /// Writes a manifest under a name that nobody looks at.
    fn write_beside(&self, manifest: &Manifest) -> Result<PathBuf, StoreError> {
        let path = self.manifest_path(&manifest.key);
        let shelf = path.parent().expect("manifests lie in a folder");
        if !self.disk.is_folder(shelf) {
            self.disk.ensure_folder(shelf, true)?;
        }
        let bytes = sealed::seal(&serde_json::to_vec(manifest).expect("a manifest is plain data"));
        self.disk.beside(shelf, ".new-", &|new| self.disk.create(new, &bytes)).at("write", &path)
    }

    /// Gives a manifest its name once all that it speaks of is durable; gives the shelf whose names have changed.
    fn put_manifest(
        &self,
        new: &Path,
        synced: Result<(), (PathBuf, StoreError)>,
        manifest: &Manifest,
        unsynced: &[Unsynced],
    ) -> Result<PathBuf, StoreError> {
        let path = self.manifest_path(&manifest.key);
        let put = match synced {
            Ok(()) => self.take_marks(unsynced).and_then(|()| self.disk.rename(new, &path).at("write", &path)),
            Err((lost, error)) => {
                for object in unsynced.iter().filter(|object| object.paths.contains(&lost)) {
                    self.unname(&object.digest);
                }
                Err(error)
            }
        };
        if put.is_err() {
            // It means nothing where it lies, and the next collection finds it.
            let _ = self.disk.remove_file(new);
        }
        put.map(|()| path.parent().expect("manifests lie in a folder").to_owned())
    }

    fn take_marks(&self, synced: &[Unsynced]) -> Result<(), StoreError> {
        for object in synced {
            let folder = self.object(&object.digest);
            match self.disk.set_mode(&folder, SEALED) {
                // Another user's: with the mark it only costs whoever stores the same content one more sync.
                Err(error) if matches!(error.kind(), ErrorKind::PermissionDenied | ErrorKind::ReadOnlyFilesystem) => {}
                marked => marked.at("change the mode of", &folder)?,
            }
        }
        Ok(())
    }

    /// Takes an object's name away, though it reads as it should: the disk may not have kept what memory still shows. It needs
    /// no room, since a full disk may be why.
    fn unname(&self, digest: &Digest) {
        let object = self.object(digest);
        let _lock = self.lock_object(digest);
        // A folder that may not be written cannot change its parent.
        let _ = self.disk.set_mode(&object, 0o755);
        let moved = self.disk.beside(&self.folder("trash"), "object-", &|to| self.disk.rename(&object, to));
        match moved {
            Err(error) if error.kind() != ErrorKind::NotFound => {
                if let Err(error) = self.disk.clear(&object) {
                    tracing::warn!(%digest, %error, "an object that the disk could not keep stays");
                }
            }
            _ => {}
        }
    }

    /// Makes every path of every group durable; of each group's first that is not, the path and the error.
    fn sync_groups(&self, groups: &[&[PathBuf]]) -> Vec<Result<(), (PathBuf, StoreError)>> {
        let count: usize = groups.iter().map(|group| group.len()).sum();
        // An error of a whole file system may be of a file that is none of ours: then each of ours is asked.
        if count > SYNC_EACH && self.sync_file_systems().is_ok() {
            return groups.iter().map(|_| Ok(())).collect();
        }
        // A disk tells only once what it could not keep: what one group was told holds for every group.
        let mut asked: HashMap<&Path, io::Result<()>> = HashMap::new();
        let mut all = Vec::with_capacity(groups.len());
        for group in groups {
            all.push(group.iter().try_for_each(|path| {
                let told = asked.entry(path).or_insert_with(|| self.disk.sync(path));
                let told = told.as_ref().copied().map_err(told_again);
                told.at("write", path).map_err(|error| (path.clone(), error))
            }));
        }
        all
    }

    /// Makes the file systems durable on which objects and manifests lie, which users may have moved to two disks.
    fn sync_file_systems(&self) -> io::Result<()> {
        let mut devices = BTreeSet::new();
        for folder in ["objects", "manifests"].map(|name| self.folder(name)) {
            if devices.insert(self.disk.stat_target(&folder)?.identity.0) {
                self.disk.sync_all(&folder)?;
            }
        }
        Ok(())
    }
}

/// The same error, for another who asks.
fn told_again(error: &io::Error) -> io::Error {
    error.raw_os_error().map_or_else(|| io::Error::new(error.kind(), error.to_string()), io::Error::from_raw_os_error)
}

#[cfg(test)]
mod tests {
    use super::super::faults::{FAULTS, Fault};
    use super::super::fixture::{Sandbox, draft, key};
    use super::super::{Lookup, Prepared};
    use super::*;

    fn prepare(sandbox: &Sandbox, number: usize, files: &[(&str, &str)]) -> (KeyLock, Prepared) {
        let lock = sandbox.store.lock(&key(number)).unwrap();
        let prepared = sandbox.store.prepare(&lock, draft(number, &sandbox.folder(files))).unwrap();
        (lock, prepared)
    }

    fn commit(sandbox: &Sandbox, batch: &[(KeyLock, Prepared)]) -> Vec<bool> {
        let batch: Vec<_> = batch.iter().map(|(lock, prepared)| (lock, prepared)).collect();
        sandbox.store.commit_all(&batch).iter().map(Result::is_ok).collect()
    }

    fn is_hit_after(sandbox: &Sandbox) -> bool {
        sandbox.publish(1, &[("data", "one")]);
        is_hit(sandbox, 1)
    }

    fn is_hit(sandbox: &Sandbox, number: usize) -> bool {
        match sandbox.store.lookup(&key(number)).unwrap() {
            Lookup::Hit(manifest) => {
                sandbox.store.verify_object(&manifest.outputs[0]).unwrap().unwrap();
                true
            }
            Lookup::Miss => false,
            Lookup::Damaged { what } => panic!("{what}"),
        }
    }

    #[test]
    fn what_is_prepared_can_be_read_and_is_no_result_yet() {
        let sandbox = Sandbox::new();
        let (lock, prepared) = prepare(&sandbox, 1, &[("data", "one")]);
        let object = sandbox.store.object(&prepared.manifest().outputs[0].digest);
        assert_eq!(std::fs::read_to_string(object.join("data")).unwrap(), "one");
        assert!(!is_hit(&sandbox, 1));
        let other = Store::open(sandbox.store.root()).unwrap();
        assert!(other.leased().unwrap().contains(&prepared.manifest().outputs[0].digest), "nobody may collect it");
        assert_eq!(commit(&sandbox, &[(lock, prepared)]), [true]);
        assert!(is_hit(&sandbox, 1));
    }

    #[test]
    fn many_results_are_committed_at_once_equal_ones_too() {
        let sandbox = Sandbox::new();
        let contents: Vec<String> = (0..20).map(|number| format!("{}", number % 7)).collect();
        let batch: Vec<_> =
            contents.iter().enumerate().map(|(number, text)| prepare(&sandbox, number, &[("data", text)])).collect();
        assert_eq!(commit(&sandbox, &batch), [true; 20]);
        assert!((0..20).all(|number| is_hit(&sandbox, number)));
    }

    /// Every operation of a batch fails in turn: what is told to be there is, and nothing lies in the way of the next attempt.
    #[test]
    fn a_fault_in_a_batch_costs_those_that_were_told_so() {
        for (fault, many) in FAULTS.into_iter().flat_map(|fault| [(fault, false), (fault, true)]) {
            let numbers = if many { 1..=4 } else { 1..=2 };
            let mut at = 0;
            loop {
                let (mut sandbox, disk) = Sandbox::faulty();
                let batch: Vec<_> =
                    numbers.clone().map(|number| prepare(&sandbox, number, &[("a/b", &number.to_string())])).collect();
                disk.fail_at(at, fault);
                let told = commit(&sandbox, &batch);
                let taken = disk.heal();
                drop(batch);
                sandbox.reopen();
                for (number, told) in numbers.clone().zip(told) {
                    assert!(is_hit(&sandbox, number) || !told, "{fault:?} at {at}");
                    let may_lie = !matches!(fault, Fault::ErrorOnce);
                    assert!(told || may_lie || !is_hit(&sandbox, number), "failed and there: {fault:?} at {at}");
                    sandbox.publish(number, &[("a/b", &number.to_string())]);
                    assert!(is_hit(&sandbox, number), "{fault:?} at {at}");
                }
                if taken <= at {
                    break;
                }
                at += 1;
            }
            assert!(at >= 8, "{at} operations failed in turn");
        }
    }

    #[test]
    fn what_a_disk_could_not_keep_is_told_to_everyone_who_rests_on_it() {
        let (sandbox, disk) = Sandbox::faulty();
        let root = sandbox.store.root();
        let (shelf, own) = (root.join("objects"), ["manifests", "work"].map(|name| root.join(name)));
        let groups = own.map(|own| vec![own, shelf.clone()]);
        disk.fail_at(1, Fault::ErrorOnce);
        let synced = sandbox.store.sync_groups(&groups.each_ref().map(Vec::as_slice));
        let lost: Vec<_> = synced.into_iter().map(|group| group.unwrap_err().0).collect();
        assert_eq!(lost, [shelf.clone(), shelf]);
    }

    #[test]
    fn an_error_of_the_file_system_that_is_none_of_ours_fails_nobody() {
        let (sandbox, disk) = Sandbox::faulty();
        let batch: Vec<_> = (1..=4).map(|number| prepare(&sandbox, number, &[("a", &number.to_string())])).collect();
        // Four times the shelf is looked at and the manifest is written, twice a disk is looked at; then all is synced.
        disk.fail_at(9, Fault::ErrorOnce);
        assert_eq!(commit(&sandbox, &batch), [true; 4]);
        assert!(disk.heal() > 20, "every path was synced by itself");
    }

    #[test]
    fn an_object_that_the_disk_could_not_keep_loses_its_name() {
        let (sandbox, disk) = Sandbox::faulty();
        let (lock, prepared) = prepare(&sandbox, 1, &[("data", "one")]);
        // The shelf is looked at, the manifest written and synced; then the object's file is synced.
        disk.fail_at(3, Fault::ErrorOnce);
        let error = sandbox.store.commit_all(&[(&lock, &prepared)]).remove(0).unwrap_err().to_string();
        disk.heal();
        assert!(error.contains("/data`"), "{error}");
        assert!(
            !sandbox.store.object(&prepared.manifest().outputs[0].digest).exists(),
            "memory shows it, the disk has not"
        );
        drop(lock);
        assert!(is_hit_after(&sandbox), "and the next attempt makes it anew");
    }

    #[test]
    fn a_full_disk_does_not_leave_what_it_could_not_keep_under_its_name() {
        let (sandbox, disk) = Sandbox::faulty();
        let (lock, prepared) = prepare(&sandbox, 1, &[("data", "one")]);
        disk.fail_at(3, Fault::Full);
        assert!(sandbox.store.commit_all(&[(&lock, &prepared)]).remove(0).is_err());
        disk.heal();
        // Nothing could be moved or removed then; whoever finds it must not rely on it.
        let object = sandbox.store.object(&prepared.manifest().outputs[0].digest);
        let mut unsynced = Vec::new();
        if object.exists() {
            let output = &prepared.manifest().outputs[0];
            sandbox.store.note_unsynced(&output.digest, &output.files, &mut unsynced).unwrap();
            assert_eq!(unsynced.len(), 1);
        }
        drop(lock);
        assert!(is_hit_after(&sandbox));
    }

    #[test]
    fn what_was_named_and_not_marked_before_a_kill_is_synced_by_the_next() {
        use std::os::unix::fs::PermissionsExt as _;
        let sandbox = Sandbox::new();
        let (lock, prepared) = prepare(&sandbox, 1, &[("data", "one")]);
        drop(lock);
        let object = sandbox.store.object(&prepared.manifest().outputs[0].digest);
        std::fs::set_permissions(&object, std::fs::Permissions::from_mode(0o755)).unwrap();
        let (lock, again) = prepare(&sandbox, 2, &[("data", "one")]);
        assert_eq!(again.unsynced.len(), 1);
        assert_eq!(commit(&sandbox, &[(lock, again)]), [true]);
        assert_eq!(std::fs::metadata(&object).unwrap().permissions().mode() & 0o7777, SEALED);
        let (_lock, third) = prepare(&sandbox, 3, &[("data", "one")]);
        assert!(third.unsynced.is_empty(), "it is durable now");
    }
}
