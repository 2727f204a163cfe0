//! A store in a temporary folder, for the tests of everything that rests on one.

use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use serde_json::Value;

use super::disk::Native;
use super::faults::Faulty;
use super::{Digest, DraftOutput, KeyParts, Manifest, ManifestDraft, Store, StoreError, StoredFile, digest_folder};
use crate::pipeline::stage::ArtifactType;

/// A store that is gone when it is dropped.
pub(crate) struct Sandbox {
    /// The store.
    pub(crate) store: Store,
    /// Its folder, and beside it room for a user's files.
    pub(crate) place: tempfile::TempDir,
    folders: AtomicUsize,
}

/// A key by number.
pub(crate) fn key(number: usize) -> Digest {
    super::hash_json("key", &serde_json::to_value(parts(number)).unwrap()).unwrap()
}

impl Sandbox {
    /// A new one.
    pub(crate) fn new() -> Self {
        // In memory where there is such a place: syncs of a busy disk would make the tests slow.
        let place = tempfile::tempdir_in("/dev/shm").or_else(|_| tempfile::tempdir()).unwrap();
        let store = Store::open(&place.path().join("store")).unwrap();
        Self { store, place, folders: AtomicUsize::new(0) }
    }

    /// A new one on a disk that can be made to fail.
    pub(super) fn faulty() -> (Self, Arc<Faulty>) {
        let mut sandbox = Self::new();
        let disk = Arc::new(Faulty::new(Arc::new(Native)));
        sandbox.store = Store::open_on(disk.clone(), &sandbox.place.path().join("store")).unwrap();
        (sandbox, disk)
    }

    /// Another process's store in the same folder, which must be gone before the first one is.
    pub(crate) fn beside(other: &Self) -> Self {
        let place = tempfile::tempdir().unwrap();
        Self { store: Store::open(other.store.root()).unwrap(), place, folders: AtomicUsize::new(1_000_000) }
    }

    /// Opens the store as another process would.
    pub(crate) fn reopen(&mut self) {
        self.store = Store::open(&self.place.path().join("store")).unwrap();
    }

    /// A folder in the store's work with these files.
    pub(crate) fn folder(&self, files: &[(&str, &str)]) -> PathBuf {
        let number = self.folders.fetch_add(1, Ordering::Relaxed);
        let folder = self.store.root().join("work").join(format!("draft-{number}"));
        for (path, content) in files {
            let path = folder.join(path);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, content).unwrap();
        }
        folder
    }

    /// The digest of a folder with these files.
    pub(crate) fn digest(&self, files: &[(&str, &str)]) -> (Digest, Vec<StoredFile>) {
        digest_folder(&self.folder(files)).unwrap()
    }

    /// The folder of an object, opened for a test to do harm in it.
    pub(crate) fn opened(&self, digest: &Digest) -> PathBuf {
        let object = self.store.object(digest);
        std::fs::set_permissions(&object, std::fs::Permissions::from_mode(0o755)).unwrap();
        object
    }

    /// Puts aside what is damaged of a key's result.
    pub(crate) fn quarantine(&self, number: usize, what: &str) {
        let lock = self.store.lock(&key(number)).unwrap();
        self.store.quarantine(&lock, what).unwrap();
    }

    /// Publishes these files as the output `out` of a key.
    pub(crate) fn publish(&self, number: usize, files: &[(&str, &str)]) -> Manifest {
        self.try_publish(number, files).unwrap()
    }

    /// The same, if it works.
    pub(crate) fn try_publish(&self, number: usize, files: &[(&str, &str)]) -> Result<Manifest, StoreError> {
        self.publish_folder(number, &self.folder(files))
    }

    /// The same with a folder.
    pub(crate) fn publish_folder(&self, number: usize, folder: &Path) -> Result<Manifest, StoreError> {
        let lock = self.store.lock(&key(number))?;
        self.store.publish(&lock, draft(number, folder))
    }
}

impl Drop for Sandbox {
    fn drop(&mut self) {
        // Objects are read-only, so the temporary folder could not remove itself.
        <dyn super::disk::Disk>::clear(&super::disk::Native, self.place.path()).unwrap();
    }
}

/// A stage of a number that has left its output `out` in a folder of the store's work.
pub(crate) fn draft(number: usize, folder: &Path) -> ManifestDraft {
    let output = DraftOutput { name: "out".into(), artifact: ArtifactType::Files, folder: folder.to_owned() };
    ManifestDraft {
        recipe: key(number),
        parts: parts(number),
        params: Value::Null,
        inputs: [].into(),
        outputs: vec![output],
        seconds: 1.5,
        attempts: 1,
        numerics: [].into(),
        metrics: [("solved".to_owned(), 0.1 + 0.2)].into(),
    }
}

/// The parts of the key of a number, of no kind.
pub(crate) fn parts(number: usize) -> KeyParts {
    KeyParts { kind: "test".into(), version: 1, parts: vec![], params: number.into(), rng_abi: 1 }
}
