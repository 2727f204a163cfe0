//! The index: one append-only file that spares reading and parsing a manifest for every lookup.
//!
//! A record says what a lookup needs of one result, together with the stat of the manifest from which it was taken. It is
//! believed only as long as the manifest still has that stat (device, inode, size, mtime, ctime) and every file of every
//! object has its own: a manifest that was removed, put aside, replaced or written to is asked itself. So the index can
//! make a lookup slow and never wrong, and may be deleted at any time.
//!
//! ```text
//! \n<32 digits: BLAKE3 of the rest> <64 digits: the key> <JSON>
//! ```
//!
//! A record is one write in append mode, begins with a newline and carries its own digest, so that one which a kill or a full
//! disk has torn costs nothing but itself. The last of a key counts. Records are not synced. Whoever publishes appends while
//! it still holds the key's lock, under which alone a manifest changes; whoever has read a manifest instead appends only
//! when its last change is long past (see [`RACY`]).

use std::borrow::Cow;
use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use serde::{Deserialize, Serialize};

use super::cache::RACY;
use super::disk::Disk;
use super::{Acceptance, Digest, FileStat, Lookup, Manifest, Store, StoreError};
use crate::pipeline::stage::ArtifactType;

/// Digits of a record's own digest.
const SEAL: usize = 32;

/// Digits of a key.
const KEY: usize = 64;

/// A file with this many records per key, and no fewer than [`FEW`] in all, is written anew.
const CROWDED: usize = 4;

/// See [`CROWDED`].
const FEW: usize = 4096;

/// A result as far as planning needs it.
#[derive(Clone, Debug, PartialEq)]
pub struct StoredResult {
    /// Its key.
    pub key: Digest,
    /// Wall seconds over all attempts.
    pub seconds: f64,
    /// Its outputs, default one first.
    pub outputs: Vec<StoredName>,
    /// See [`Manifest::accepted`].
    pub accepted: Option<Acceptance>,
}

/// A named output without its files.
#[derive(Clone, Debug, PartialEq)]
pub struct StoredName {
    /// Its name.
    pub name: String,
    /// What it carries.
    pub artifact: ArtifactType,
    /// The digest of the folder object.
    pub digest: Digest,
}

impl StoredResult {
    /// What planning needs of a manifest.
    pub fn of(manifest: &Manifest) -> Self {
        let output = |output: &super::StoredOutput| StoredName {
            name: output.name.clone(),
            artifact: output.artifact,
            digest: output.digest.clone(),
        };
        let outputs = manifest.outputs.iter().map(output).collect();
        Self { key: manifest.key.clone(), seconds: manifest.seconds, outputs, accepted: manifest.accepted.clone() }
    }
}

/// What the store knows of a key; [`Lookup`] without the manifest.
#[derive(Clone, Debug)]
pub enum Found {
    /// The result is there and whole.
    Hit(Arc<StoredResult>),
    /// There is no result.
    Miss,
    /// There is a result, and it is not what was stored.
    Damaged {
        /// What is wrong, naming the file.
        what: String,
    },
}

/// The JSON of a record.
#[derive(Debug, Serialize, Deserialize)]
struct Record<'a> {
    /// The manifest's.
    stat: FileStat,
    seconds: f64,
    #[serde(borrow)]
    outputs: Vec<Output<'a>>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    accepted: Option<Acceptance>,
}

/// Name, type, digest, files.
type Output<'a> = (Cow<'a, str>, ArtifactType, Cow<'a, str>, Vec<File<'a>>);

/// Path below the object, executable bit, stat.
type File<'a> = (Cow<'a, str>, bool, FileStat);

/// See the module.
#[derive(Debug)]
pub(super) struct Index {
    disk: Arc<dyn Disk>,
    path: PathBuf,
    writable: bool,
    known: Mutex<Option<Arc<Known>>>,
    /// What this process has appended since it read the file.
    added: Mutex<HashMap<Digest, Arc<[u8]>>>,
}

/// The file as it was read.
#[derive(Debug, Default)]
struct Known {
    bytes: Vec<u8>,
    /// Key to where its last record begins and ends.
    last: HashMap<[u8; KEY], (usize, usize)>,
}

impl Index {
    /// The index at `path`; it is read at the first question and never written unless `writable`.
    pub(super) fn new(disk: Arc<dyn Disk>, path: PathBuf, writable: bool) -> Self {
        Self { disk, path, writable, known: Mutex::default(), added: Mutex::default() }
    }

    /// What belongs to a key, if the record is whole: handed on while it lies where it was read.
    fn with<R>(&self, key: &Digest, then: impl FnOnce(Record<'_>) -> Option<R>) -> Option<R> {
        let added = self.added().get(key).cloned();
        if let Some(record) = added {
            return then(opened(&record, key)?);
        }
        let known = self.known();
        let &(start, end) = known.last.get(&key_bytes(key)?)?;
        then(opened(&known.bytes[start..end], key)?)
    }

    /// Adds what `manifest`, whose file has the stat `stat`, says of its key.
    fn add(&self, manifest: &Manifest, stat: FileStat) {
        if !self.writable || key_bytes(&manifest.key).is_none() {
            return;
        }
        let files = |files: &'_ [super::StoredFile]| -> Vec<File<'static>> {
            files.iter().map(|file| (file.path.clone().into(), file.executable, file.stat)).collect()
        };
        let outputs = manifest.outputs.iter().map(|output| {
            let digest = output.digest.0.as_str().into();
            (output.name.as_str().into(), output.artifact, digest, files(&output.files))
        });
        let accepted = manifest.accepted.clone();
        let record = Record { stat, seconds: manifest.seconds, outputs: outputs.collect(), accepted };
        let json = serde_json::to_string(&record).expect("a record is plain data");
        let rest = format!("{} {json}", manifest.key);
        let line: Arc<[u8]> = format!("{} {rest}", seal(rest.as_bytes())).into_bytes().into();
        if let Err(error) = self.disk.append(&self.path, &[b"\n", &*line].concat()) {
            tracing::debug!(%error, "the index misses a record; its manifest will be read");
        }
        self.added().insert(manifest.key.clone(), line);
    }

    fn added(&self) -> MutexGuard<'_, HashMap<Digest, Arc<[u8]>>> {
        self.added.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn known(&self) -> Arc<Known> {
        let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        Arc::clone(known.get_or_insert_with(|| Arc::new(self.read())))
    }

    fn read(&self) -> Known {
        // Without it everything is looked up in the manifests, as when it is not there yet.
        let bytes = self.disk.read(&self.path).unwrap_or_default();
        let mut last = HashMap::new();
        let (mut records, mut start) = (0, 0);
        while start < bytes.len() {
            let length = bytes[start..].iter().position(|byte| *byte == b'\n');
            let end = length.map_or(bytes.len(), |length| start + length);
            if let Some(key) = bytes[start..end].get(SEAL + 1..SEAL + 1 + KEY) {
                last.insert(key.try_into().expect("the range has that length"), (start, end));
                records += 1;
            }
            start = end + 1;
        }
        let known = Known { bytes, last };
        if self.writable && records >= FEW && records > CROWDED * known.last.len() {
            self.rewrite(&known);
        }
        known
    }

    /// Writes the last record of every key alone. What others append meanwhile may be lost: their manifests are read then.
    fn rewrite(&self, known: &Known) {
        let mut bytes = Vec::with_capacity(known.bytes.len() / CROWDED);
        for &(start, end) in known.last.values() {
            bytes.push(b'\n');
            bytes.extend_from_slice(&known.bytes[start..end]);
        }
        if let Err(error) = self.disk.write_atomically(&self.path, &bytes, false) {
            tracing::debug!(%error, "the index stays as crowded as it is");
        }
    }
}

fn key_bytes(key: &Digest) -> Option<[u8; KEY]> {
    key.0.as_bytes().try_into().ok()
}

fn seal(rest: &[u8]) -> String {
    blake3::hash(rest).to_hex()[..SEAL].to_owned()
}

/// The record in a line, if it is whole and of this key.
fn opened<'a>(line: &'a [u8], key: &Digest) -> Option<Record<'a>> {
    let (own, rest) = line.split_at_checked(SEAL)?;
    let rest = rest.strip_prefix(b" ")?;
    if seal(rest).as_bytes() != own {
        return None;
    }
    let json = rest.strip_prefix(key.0.as_bytes())?.strip_prefix(b" ")?;
    serde_json::from_slice(json).ok()
}

impl Store {
    /// What the store has for `key`, like [`Store::lookup`], without its manifest where the index spares reading it.
    pub fn find(&self, key: &Digest) -> Result<Found, StoreError> {
        let path = self.manifest_path(key);
        if let Some(stored) = self.index.with(key, |record| self.still(&path, key, &record)) {
            return Ok(Found::Hit(Arc::new(stored)));
        }
        let before = self.disk.stat(&path);
        match self.lookup(key)? {
            Lookup::Hit(manifest) => {
                if let (Ok(before), Ok(after)) = (before, self.disk.stat(&path)) {
                    let stat = before.identity;
                    let is_known = self.index.with(key, |record| Some(record.stat == stat)) == Some(true);
                    if stat == after.identity && stat.4 + RACY < self.disk.now() && !is_known {
                        self.index.add(&manifest, stat);
                    }
                }
                Ok(Found::Hit(Arc::new(StoredResult::of(&manifest))))
            }
            Lookup::Miss => Ok(Found::Miss),
            Lookup::Damaged { what } => Ok(Found::Damaged { what }),
        }
    }

    /// The result in a record, if the manifest and every file are as they were then.
    fn still(&self, manifest: &Path, key: &Digest, record: &Record<'_>) -> Option<StoredResult> {
        let is_same = |path: &Path, stat: &FileStat| self.disk.stat(path).ok().filter(|now| now.identity == *stat);
        is_same(manifest, &record.stat)?;
        let mut outputs = Vec::with_capacity(record.outputs.len());
        for (name, artifact, digest, files) in &record.outputs {
            let digest = Digest(digest.clone().into_owned());
            let object = self.object(&digest);
            for (path, executable, stat) in files {
                is_same(&object.join(&**path), stat).filter(|now| now.is_executable() == *executable)?;
            }
            outputs.push(StoredName { name: name.clone().into_owned(), artifact: *artifact, digest });
        }
        Some(StoredResult { key: key.clone(), seconds: record.seconds, outputs, accepted: record.accepted.clone() })
    }

    /// Adds a manifest to the index that was written just now; the caller holds the key's lock, so it is the one that lies
    /// there.
    pub(super) fn index_published(&self, manifest: &Manifest) {
        if let Ok(stat) = self.disk.stat(&self.manifest_path(&manifest.key)) {
            self.index.add(manifest, stat.identity);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use super::super::fixture::{Sandbox, key};
    use super::*;

    fn index(sandbox: &Sandbox) -> PathBuf {
        sandbox.store.root().join("cache/index")
    }

    /// Whether the index alone answers for a key.
    fn is_indexed(sandbox: &Sandbox, number: usize) -> bool {
        let (store, key) = (&sandbox.store, key(number));
        store.index.with(&key, |record| store.still(&store.manifest_path(&key), &key, &record)).is_some()
    }

    fn hit(sandbox: &Sandbox, number: usize) -> Arc<StoredResult> {
        match sandbox.store.find(&key(number)).unwrap() {
            Found::Hit(stored) => stored,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn it_says_what_the_manifest_says() {
        let mut sandbox = Sandbox::new();
        let manifests = [1, 2].map(|number| sandbox.publish(number, &[("a/b", &number.to_string()), ("c", "é")]));
        for reopened in [false, true] {
            if reopened {
                sandbox.reopen();
            }
            for (number, manifest) in (1..).zip(&manifests) {
                assert!(is_indexed(&sandbox, number));
                assert_eq!(*hit(&sandbox, number), StoredResult::of(manifest));
            }
            assert!(matches!(sandbox.store.find(&key(3)).unwrap(), Found::Miss));
        }
    }

    #[test]
    fn a_manifest_that_is_gone_replaced_or_written_to_is_asked_itself() {
        let mut sandbox = Sandbox::new();
        sandbox.publish(1, &[("a", "1")]);
        let path = sandbox.store.manifest_path(&key(1));
        let bytes = std::fs::read(&path).unwrap();
        std::fs::remove_file(&path).unwrap();
        assert!(matches!(sandbox.store.find(&key(1)).unwrap(), Found::Miss));
        std::fs::write(&path, &bytes).unwrap();
        assert!(!is_indexed(&sandbox, 1), "the same bytes in another file");
        hit(&sandbox, 1);
        let second = sandbox.publish(1, &[("a", "2")]);
        assert_eq!(hit(&sandbox, 1).outputs[0].digest, second.outputs[0].digest);
        sandbox.reopen();
        assert_eq!(hit(&sandbox, 1).outputs[0].digest, second.outputs[0].digest, "the last record counts");
        let mut flipped = std::fs::read(&path).unwrap();
        let last = flipped.len() - 10;
        flipped[last] ^= 1;
        std::fs::write(&path, flipped).unwrap();
        assert!(matches!(sandbox.store.find(&key(1)).unwrap(), Found::Damaged { .. }));
    }

    #[test]
    fn a_file_that_changed_is_looked_at() {
        let sandbox = Sandbox::new();
        let manifest = sandbox.publish(1, &[("a", "1")]);
        let file = sandbox.opened(&manifest.outputs[0].digest).join("a");
        std::fs::set_permissions(&file, std::fs::Permissions::from_mode(0o644)).unwrap();
        assert!(!is_indexed(&sandbox, 1));
        hit(&sandbox, 1);
        std::fs::write(&file, "2").unwrap();
        assert!(matches!(sandbox.store.find(&key(1)).unwrap(), Found::Damaged { .. }));
        std::fs::remove_file(&file).unwrap();
        assert!(matches!(sandbox.store.find(&key(1)).unwrap(), Found::Damaged { .. }));
    }

    #[test]
    fn no_flip_and_no_cut_of_the_index_changes_an_answer() {
        let mut sandbox = Sandbox::new();
        let manifests = [1, 2].map(|number| StoredResult::of(&sandbox.publish(number, &[("a", &number.to_string())])));
        let whole = std::fs::read(index(&sandbox)).unwrap();
        for at in 0..whole.len() {
            let mut flipped = whole.clone();
            flipped[at] ^= 1 << (at % 8);
            for bytes in [&flipped, &whole[..at]] {
                std::fs::write(index(&sandbox), bytes).unwrap();
                sandbox.reopen();
                for (number, manifest) in (1..).zip(&manifests) {
                    assert_eq!(*hit(&sandbox, number), *manifest, "byte {at}");
                }
            }
        }
    }

    #[test]
    fn a_torn_record_costs_only_itself_and_a_lost_index_grows_again() {
        let (mut sandbox, disk) = Sandbox::faulty();
        let reopen = |sandbox: &mut Sandbox| {
            sandbox.store = Store::open_on(disk.clone(), &sandbox.place.path().join("store")).unwrap();
        };
        sandbox.publish(1, &[("a", "1")]);
        sandbox.store.disk.append(&index(&sandbox), b"\n0123456789").unwrap();
        sandbox.publish(2, &[("a", "2")]);
        reopen(&mut sandbox);
        assert!(is_indexed(&sandbox, 1) && is_indexed(&sandbox, 2));
        std::fs::remove_file(index(&sandbox)).unwrap();
        reopen(&mut sandbox);
        // However long all that took, the clock shows a time before it.
        disk.pass(-1_000 * RACY);
        hit(&sandbox, 1);
        assert!(!is_indexed(&sandbox, 1), "its manifest changed too shortly ago");
        disk.pass(2_000 * RACY);
        hit(&sandbox, 1);
        assert!(is_indexed(&sandbox, 1));
        let size = std::fs::metadata(index(&sandbox)).unwrap().len();
        hit(&sandbox, 1);
        assert_eq!(std::fs::metadata(index(&sandbox)).unwrap().len(), size);
    }

    #[test]
    fn a_crowded_index_is_written_anew() {
        let mut sandbox = Sandbox::new();
        let manifest = sandbox.publish(1, &[("a", "1")]);
        let record = std::fs::read(index(&sandbox)).unwrap();
        std::fs::write(index(&sandbox), record.repeat(FEW)).unwrap();
        sandbox.reopen();
        assert_eq!(*hit(&sandbox, 1), StoredResult::of(&manifest));
        assert_eq!(std::fs::read(index(&sandbox)).unwrap(), record);
    }

    #[test]
    fn a_store_that_is_only_read_grows_no_index() {
        let sandbox = Sandbox::new();
        sandbox.publish(1, &[("a", "1")]);
        std::fs::remove_file(index(&sandbox)).unwrap();
        let store = Store::open_existing(sandbox.store.root()).unwrap().unwrap();
        assert!(matches!(store.find(&key(1)).unwrap(), Found::Hit(_)));
        assert!(!index(&sandbox).exists());
    }
}
