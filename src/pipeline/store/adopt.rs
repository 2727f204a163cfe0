//! Results that come from another store: manifests in a form that names no machine, and their way through the commit
//! protocol.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use super::digest::digest_folder_on;
use super::error::At as _;
use super::{Digest, KeyLock, Lookup, Manifest, Owner, Store, StoreError, StoredFile, hash_json, sealed};

/// The file of a work folder that holds an import on its way.
pub(super) const IMPORT_MARK: &str = "import";

/// How long one waits for a key without saying so.
const PATIENCE: Duration = Duration::from_secs(1);

/// How often one asks for it meanwhile.
const ASK: Duration = Duration::from_millis(5);

impl Manifest {
    /// Its bytes without what belongs to one disk, sealed: equal results give equal bytes wherever they lie.
    pub(crate) fn portable(&self) -> Vec<u8> {
        let mut manifest = self.clone();
        for file in manifest.outputs.iter_mut().flat_map(|output| &mut output.files) {
            file.stat = (0, 0, file.size, 0, 0);
        }
        sealed::seal(&serde_json::to_vec(&manifest).expect("a manifest is plain data"))
    }

    /// Reads what [`Manifest::portable`] wrote; the error says what is wrong, as the end of a sentence.
    pub(crate) fn from_portable(bytes: &[u8]) -> Result<Self, String> {
        let body = sealed::open(bytes).ok_or("does not have the digest that it carries")?;
        let manifest: Self = serde_json::from_slice(&body).map_err(|error| format!("cannot be understood: {error}"))?;
        if manifest.key_is_right() {
            Ok(manifest)
        } else {
            Err("has a key that is not the hash of its parts".to_owned())
        }
    }

    /// Whether its key is the hash of its parts.
    pub(crate) fn key_is_right(&self) -> bool {
        let parts = serde_json::to_value(&self.parts).expect("the parts of a key are plain data");
        hash_json("key", &parts).is_ok_and(|key| key == self.key)
    }
}

/// Seals a JSON object: whoever opens it again knows that no byte has changed.
pub(crate) fn seal(body: &[u8]) -> Vec<u8> {
    sealed::seal(body)
}

/// The JSON object that was sealed, or `None` where any byte differs.
pub(crate) fn open_sealed(bytes: &[u8]) -> Option<Vec<u8>> {
    sealed::open(bytes)
}

/// The digest of a folder of these files.
pub(crate) fn digest_of_files(files: &[StoredFile]) -> Result<Digest, StoreError> {
    super::digest::digest_list(files)
}

impl Store {
    /// The layout of results as they travel. It is older than that of the store around them, and has not changed.
    pub(crate) const LAYOUT: &str = "1";

    /// [`Store::lock`] that after a second tells who has the key, where it is known.
    pub(crate) fn lock_telling(
        &self,
        key: &Digest,
        waiting: &mut dyn FnMut(Option<Owner>),
    ) -> Result<KeyLock, StoreError> {
        let begun = Instant::now();
        while begun.elapsed() < PATIENCE {
            if let Some(lock) = self.try_lock(key)? {
                return Ok(lock);
            }
            std::thread::sleep(ASK);
        }
        waiting(self.attempts(key)?.and_then(|attempts| attempts.owner));
        self.lock(key)
    }

    /// Makes a result of another store that of the lock's key, durably, unless there is one already. `folders` holds its objects on
    /// the store's own disk, by digest; what is used is taken away. Gives whether it was taken.
    pub(crate) fn adopt(
        &self,
        lock: &KeyLock,
        mut manifest: Manifest,
        folders: &BTreeMap<Digest, PathBuf>,
    ) -> Result<bool, StoreError> {
        // No manifest names the objects until the last moment, and one that is there already may be nobody's.
        let objects = manifest.outputs.iter().map(|output| &output.digest);
        self.lease(&std::iter::once(&manifest.key).chain(objects).collect::<Vec<_>>())?;
        match self.lookup(&manifest.key)? {
            Lookup::Hit(_) => return Ok(false),
            Lookup::Damaged { what } => self.quarantine(lock, &what).map(drop)?,
            Lookup::Miss => {}
        }
        let mut unsynced = Vec::new();
        for output in &mut manifest.outputs {
            let object = self.object(&output.digest);
            let folder = folders.get(&output.digest).filter(|folder| self.disk.is_there(folder));
            let (digest, files) = if let Some(folder) = folder {
                self.place(folder, &mut unsynced)?
            } else {
                // Another result brought it.
                let (digest, files) = digest_folder_on(&*self.disk, &object)?;
                self.note_unsynced(&output.digest, &files, &mut unsynced)?;
                (digest, files)
            };
            if digest != output.digest {
                return Err(StoreError::unfit(&object, "does not have the content that the bundle says"));
            }
            output.files = files;
        }
        self.commit(lock, &manifest, &unsynced)?;
        Ok(true)
    }

    /// Makes an empty folder in which an import gathers what it reads. Whoever calls holds the lock of `bundle`.
    pub(crate) fn begin_import(&self, bundle: &Digest) -> Result<PathBuf, StoreError> {
        let work = self.work(bundle);
        self.disk.clear(&work)?;
        self.disk.ensure_folder(&work, false)?;
        let mark = work.join(IMPORT_MARK);
        self.disk.create(&mark, b"").at("write", &mark)?;
        Ok(work)
    }

    /// Removes what an import has gathered.
    pub(crate) fn end_import(&self, bundle: &Digest) -> Result<(), StoreError> {
        self.disk.clear(&self.work(bundle))
    }

    /// Moves a folder of logs to its place, unless there are logs already.
    pub(crate) fn adopt_logs(&self, key: &Digest, folder: &std::path::Path) -> Result<(), StoreError> {
        let logs = self.logs(key);
        if self.disk.is_there(&logs) { Ok(()) } else { self.disk.rename(folder, &logs).at("write", &logs) }
    }
}

#[cfg(test)]
mod tests {
    use super::super::fixture::{Sandbox, key, parts};
    use super::super::{GcPolicy, Lookup};
    use super::*;

    #[test]
    fn whoever_is_waited_for_is_told_after_a_second() {
        let sandbox = Sandbox::new();
        let lock = sandbox.store.lock(&key(1)).unwrap();
        std::fs::create_dir_all(sandbox.store.work(&key(1))).unwrap();
        let attempts = super::super::Attempts { owner: Some(Owner::here()), ..Default::default() };
        sandbox.store.save_attempts(&key(1), &attempts).unwrap();
        let (mut lock, mut told) = (Some(lock), None);
        sandbox.store.lock_telling(&key(2), &mut |_| panic!("nobody has it")).unwrap();
        let mut tell = |owner: Option<Owner>| {
            told = owner;
            lock = None;
        };
        sandbox.store.lock_telling(&key(1), &mut tell).unwrap();
        assert_eq!(told.unwrap().process, std::process::id());
    }

    #[test]
    fn a_collection_goes_on_while_it_hashes_and_takes_nothing_of_it() {
        let (sandbox, disk) = Sandbox::faulty();
        let manifest = Manifest { key: key(2), parts: parts(2), ..sandbox.publish(1, &[("data", "one")]) };
        let other = Store::open(sandbox.store.root()).unwrap();
        let objects = sandbox.store.root().join("objects");
        disk.meanwhile(move |operation, path| {
            if operation == "open" && path.starts_with(&objects) {
                assert!(other.collector_may_go(), "it is kept away");
                let policy = GcPolicy { max_size: Some(0), ..GcPolicy::default() };
                let plan = other.plan_gc(&policy, &|_, _| ()).unwrap();
                other.collect_garbage(&plan, &mut |_, _| (), &mut || ()).unwrap();
            }
        });
        let lock = sandbox.store.lock(&key(2)).unwrap();
        assert!(sandbox.store.adopt(&lock, manifest, &BTreeMap::new()).unwrap());
        disk.undisturbed();
        assert!(matches!(sandbox.store.lookup(&key(1)).unwrap(), Lookup::Miss), "its result went");
        assert!(matches!(sandbox.store.lookup(&key(2)).unwrap(), Lookup::Hit(_)), "and its object stayed");
    }
}
