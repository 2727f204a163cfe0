//! The content-addressed store under `artifacts/`: objects, manifests, locks, work folders; the commit protocol.
//!
//! ```text
//! FORMAT                       the layout's version
//! objects/ab/<digest>/         folders named by their content, read-only, never changed
//! manifests/ab/<key>.json      one per finished stage; its rename into place is the only commit point
//! locks/<key>                  held by whoever works on the key; never removed
//! leases/                      what running processes rest on, and when each result was last used
//! pins/                        results that are never collected
//! work/<key>/                  survives a kill: training states, the files of a failed attempt
//! logs/<key>/                  log.txt, metrics.jsonl, tensorboard/: never part of a result
//! runs/, tensorboard/          views by people's names, which can be rebuilt
//! runs/.live/                  what running processes say of themselves to other terminals
//! quarantine/                  what was found damaged
//! trash/                       objects on their way out, whole
//! cache/                       what spares hashing unchanged files and reading manifests again
//! ```
//!
//! Nothing else in the project writes there, except a running stage into the folders that it is handed. The store knows
//! no kind: a draft goes in, a manifest comes out.

mod accept;
mod adopt;
mod cache;
pub(crate) mod canonical;
mod commit;
pub mod digest;
mod disk;
mod durable;
mod error;
#[cfg(test)]
mod faults;
#[cfg(test)]
pub(crate) mod fixture;
mod gc;
mod index;
mod lease;
mod live;
mod lock;
mod lookup;
mod pins;
#[cfg(test)]
mod proof;
mod publish;
mod record;
mod verify;
#[cfg(test)]
mod volatile;
mod work;

use std::collections::BTreeMap;
use std::fmt;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::pipeline::stage::{ArtifactType, Part};
pub use accept::{AcceptError, Acceptance, AcceptanceDraft};
use adopt::IMPORT_MARK;
pub(crate) use adopt::{digest_of_files, open_sealed, seal};
pub(crate) use digest::hash_canonical;
pub use digest::{digest_folder, hash_json, source_digest};
use disk::{Disk, Entry, Native, Sort};
use error::At as _;
pub use error::StoreError;
pub use gc::{Garbage, GarbageKind, GcPlan, GcPolicy, GcReport, Gone, Kept, Removal, Tally};
pub use index::{Found, StoredName, StoredResult};
pub use live::{LiveRun, Published};
pub use lock::KeyLock;
pub use lookup::Lookup;
pub use pins::Pin;
pub use publish::{DraftOutput, ManifestDraft, Prepared};
pub use record::{RunRecord, TrialRecords};
pub use verify::{Damage, Repaired, Verification, VerifyReport};
pub use work::{Attempts, Owner, Reached};

/// The layout that this program writes. Since `2` whoever uses a result leases it, so that a collection leaves it alone: a
/// program that knows only `1` would not, and refuses.
const FORMAT: &str = "2";

/// The layout before, in which everything else is the same: it is read as it is, and becomes [`FORMAT`] when it is next written.
const EARLIER: &str = "1";

/// The folders of a store.
const FOLDERS: [&str; 12] = [
    "objects",
    "manifests",
    "locks",
    "leases",
    "pins",
    "work",
    "logs",
    "runs",
    "tensorboard",
    "quarantine",
    "cache",
    "trash",
];

/// A BLAKE3 digest as 64 hexadecimal digits: of a folder object, a recipe or a key.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Digest(pub String);

impl Digest {
    /// The first ten digits, for people.
    pub fn short(&self) -> &str {
        &self.0[..self.0.len().min(10)]
    }

    /// Whether it has the form of a digest.
    fn is_whole(&self) -> bool {
        self.0.len() == 64 && self.0.bytes().all(|digit| matches!(digit, b'0'..=b'9' | b'a'..=b'f'))
    }
}

impl fmt::Display for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Debug for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Digest({})", self.short())
    }
}

/// What entered a key, kept beside the result so that a change can be explained.
///
/// The key is the BLAKE3 hash, under a derive-key context of its own, of the canonical JSON (RFC 8785) of exactly this value.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct KeyParts {
    /// The kind's name.
    pub kind: String,
    /// The kind's version.
    pub version: u32,
    /// Versions of tasks, formats, rewards and shared modules, sorted.
    pub parts: Vec<Part>,
    /// Every parameter with defaults; edges as `{"$input": content digest}`, files as `{"$file": content digest}` (and `as`).
    pub params: Value,
    /// [`crate::random::RNG_ABI`].
    pub rng_abi: u32,
}

/// The record of a finished stage; written last, it is the only commit point.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Manifest {
    /// The key, which names the manifest's file.
    pub key: Digest,
    /// The recipe under which it was first made.
    pub recipe: Digest,
    /// What the key is the hash of.
    pub parts: KeyParts,
    /// Parameters as planned, with references by name, for people.
    pub params: Value,
    /// Reference to (content digest, path at the time) of each input.
    pub inputs: BTreeMap<String, Digest>,
    /// The outputs, default one first.
    pub outputs: Vec<StoredOutput>,
    /// Wall seconds over all attempts.
    pub seconds: f64,
    /// How many attempts it took; 1 when never interrupted.
    pub attempts: u32,
    /// When it was published, RFC 3339.
    pub finished: String,
    /// Build, CPU features, libtorch, device, threads: what the numbers were computed with.
    pub numerics: BTreeMap<String, String>,
    /// The headline numbers of the stage's `metrics.json`, where it wrote one.
    pub metrics: BTreeMap<String, f64>,
    /// That it was accepted as another key's result, and not computed under its own.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub accepted: Option<Acceptance>,
}

/// A named output in the store.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct StoredOutput {
    /// Its name.
    pub name: String,
    /// What it carries.
    #[serde(rename = "type")]
    pub artifact: ArtifactType,
    /// The digest of the folder object.
    pub digest: Digest,
    /// Every file of the folder as it was recorded after the rename.
    pub files: Vec<StoredFile>,
}

/// A file of an object, with the stat that lets a hit skip hashing it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct StoredFile {
    /// Path below the folder, with `/`.
    pub path: String,
    /// Whether it is executable.
    pub executable: bool,
    /// Size in bytes.
    pub size: u64,
    /// BLAKE3 of its content.
    pub digest: Digest,
    /// (device, inode, size, mtime in ns, ctime in ns).
    pub stat: FileStat,
}

/// (device, inode, size, mtime in ns, ctime in ns): by it a file is known to be unchanged.
pub type FileStat = (u64, u64, u64, i128, i128);

/// An open store. It may be shared by threads, and a clone is the same store; processes share its folder.
#[derive(Clone, Debug)]
pub struct Store {
    root: PathBuf,
    disk: Arc<dyn Disk>,
    writable: bool,
    cache: Arc<cache::StatCache>,
    index: Arc<index::Index>,
    journals: Arc<record::Journals>,
    lease: Arc<lease::Lease>,
}

impl Store {
    /// Opens the store at `root` for writing, and makes it where there is nothing yet.
    pub fn open(root: &Path) -> Result<Self, StoreError> {
        Self::open_on(Arc::new(Native), root)
    }

    /// [`Store::open`] on another disk.
    fn open_on(disk: Arc<dyn Disk>, root: &Path) -> Result<Self, StoreError> {
        let root = &std::path::absolute(root).at("find", root)?;
        disk.ensure_folder(root, true).map_err(|error| match error {
            StoreError::Io { cause, .. } => StoreError::Io { action: "create the store", path: root.clone(), cause },
            other => other,
        })?;
        // Asked outright, because a store that has every folder already would only refuse the first result.
        disk.check_writable(root).at("write to the store", root)?;
        let format = format_of(&*disk, root)?;
        for folder in FOLDERS {
            disk.ensure_folder(&root.join(folder), format.is_some())?;
        }
        if format.is_none() {
            make_shelves(&*disk, root)?;
        }
        if format != Some(FORMAT) {
            // Last, because it says that everything else is there for good.
            let written = disk.write_atomically(&root.join("FORMAT"), format!("{FORMAT}\n").as_bytes(), true);
            match written {
                // Where there is no room for it, there must be a way to make some: `pipe gc` opens the store too.
                Err(error) if format.is_some() && error.is_full() => {
                    tracing::warn!(%error, "the store keeps its old format for now");
                }
                written => written?,
            }
        }
        Ok(Self::at(disk, root, true))
    }

    /// Opens the store at `root` for reading, where there is one. Nothing is ever written through it, caches included.
    pub fn open_existing(root: &Path) -> Result<Option<Self>, StoreError> {
        Self::open_existing_on(Arc::new(Native), root)
    }

    /// [`Store::open_existing`] on another disk.
    fn open_existing_on(disk: Arc<dyn Disk>, root: &Path) -> Result<Option<Self>, StoreError> {
        match disk.stat_target(root) {
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(error).at("open the store", root),
            Ok(stat) if stat.sort != Sort::Folder => {
                return Err(std::io::Error::from(ErrorKind::NotADirectory)).at("open the store", root);
            }
            Ok(_) => {}
        }
        let root = std::path::absolute(root).at("find", root)?;
        Ok(format_of(&*disk, &root)?.map(|_| Self::at(disk, &root, false)))
    }

    fn at(disk: Arc<dyn Disk>, root: &Path, writable: bool) -> Self {
        let cache = cache::StatCache::new(disk.clone(), root.join("cache/stat.json"), writable);
        let index = index::Index::new(disk.clone(), root.join("cache/index"), writable);
        Self {
            root: root.to_owned(),
            disk,
            writable,
            cache: Arc::new(cache),
            index: Arc::new(index),
            journals: Arc::default(),
            lease: Arc::default(),
        }
    }

    /// Whether it was opened for writing.
    pub fn is_writable(&self) -> bool {
        self.writable
    }

    /// Its folder, absolute.
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// The folder of an object, whether or not it is there.
    pub fn object(&self, digest: &Digest) -> PathBuf {
        sharded(&self.folder("objects"), digest).join(&digest.0)
    }

    /// The folder that survives a kill of whoever works on `key`.
    pub fn work(&self, key: &Digest) -> PathBuf {
        self.folder("work").join(&key.0)
    }

    /// The folder of the training states of `key`, inside its work folder.
    pub fn state(&self, key: &Digest) -> PathBuf {
        self.work(key).join("state")
    }

    /// The folder of the logs of `key`.
    pub fn logs(&self, key: &Digest) -> PathBuf {
        self.folder("logs").join(&key.0)
    }

    /// Whether a training state of `key` lies there, from which its stage would go on.
    pub fn has_saved_work(&self, key: &Digest) -> bool {
        self.disk.list(&self.state(key)).is_ok_and(|entries| !entries.is_empty())
    }

    /// The digest of a user's file or folder (see [`source_digest`]). A file whose stat is known is not read again.
    pub fn file_digest(&self, path: &Path) -> Result<Digest, StoreError> {
        digest::source_digest_by(&*self.disk, path, &|path| self.cache.hash_file(path))
    }

    /// Keeps what was hashed for the next process; dropping a store does the same. It is only ever a matter of time saved.
    pub fn save_cache(&self) -> Result<(), StoreError> {
        self.cache.save()
    }

    fn folder(&self, name: &str) -> PathBuf {
        self.root.join(name)
    }

    pub(crate) fn manifest_path(&self, key: &Digest) -> PathBuf {
        sharded(&self.folder("manifests"), key).join(format!("{key}.json"))
    }
}

impl Drop for Store {
    fn drop(&mut self) {
        // It says when results were last used, and no result rests on that. Two copies that go at once may leave it as a kill
        // would.
        if Arc::get_mut(&mut self.lease).is_some()
            && let Err(error) = self.end_lease()
        {
            tracing::debug!(%error, "the lease is not ended");
        }
    }
}

/// The subfolder by a digest's first two digits: one folder of 100,000 entries is slow in many tools.
fn sharded(folder: &Path, digest: &Digest) -> PathBuf {
    folder.join(digest.0.get(..2).unwrap_or("__"))
}

/// Makes every shelf of objects and manifests at once and for good, so that the first results need not each sync a new
/// one. A shelf that is missing is made when it is needed.
fn make_shelves(disk: &dyn Disk, root: &Path) -> Result<(), StoreError> {
    for folder in ["objects", "manifests"] {
        let folder = root.join(folder);
        for shelf in 0..=u8::MAX {
            disk.ensure_folder(&folder.join(format!("{shelf:02x}")), false)?;
        }
        disk.sync(&folder).at("write", &folder)?;
    }
    // Their own names are made durable with that of `FORMAT`.
    Ok(())
}

/// The format of the store at `root`, one that this program reads; `None` where it is empty, or where a store was begun.
/// Anything else is an error.
fn format_of(disk: &dyn Disk, root: &Path) -> Result<Option<&'static str>, StoreError> {
    let unusable = |problem: String| StoreError::Unusable { root: root.to_owned(), problem };
    match disk.read(&root.join("FORMAT")).map(|bytes| String::from_utf8_lossy(&bytes).into_owned()) {
        Ok(format) if format.trim() == FORMAT => Ok(Some(FORMAT)),
        Ok(format) if format.trim() == EARLIER => Ok(Some(EARLIER)),
        Ok(format) => Err(unusable(format!(
            "has format `{}`, and this program reads formats `{EARLIER}` and `{FORMAT}`; use the program that made it or name another folder",
            format.trim().chars().take(20).collect::<String>()
        ))),
        Err(error) if error.kind() == ErrorKind::NotFound => {
            for Entry { name, is_folder } in disk.list(root).at("list", root)? {
                // Hidden files may be a `.gitignore`, or what a kill in the middle of making the store left; folders of
                // a store without its format, which comes last, are from the same.
                let begun = is_folder && name.to_str().is_some_and(|name| FOLDERS.contains(&name));
                if !begun && !name.as_encoded_bytes().starts_with(b".") {
                    return Err(unusable(format!(
                        "is a folder with other files (`{}`) and no `FORMAT`; name a new or empty folder",
                        name.display()
                    )));
                }
            }
            Ok(None)
        }
        Err(error) => Err(error).at("read", &root.join("FORMAT")),
    }
}

/// Bytes that carry their own digest: a JSON object whose first field is the BLAKE3 of the rest.
mod sealed {
    const OPEN: &[u8] = b"{\"digest\":\"";
    const CLOSE: &[u8] = b"\",";

    /// Seals a JSON object that is not empty.
    pub(super) fn seal(body: &[u8]) -> Vec<u8> {
        let digest = blake3::hash(body).to_hex();
        [OPEN, digest.as_bytes(), CLOSE, &body[1..], b"\n"].concat()
    }

    /// The JSON object that was sealed, or `None` where any byte differs.
    pub(super) fn open(bytes: &[u8]) -> Option<Vec<u8>> {
        let (digest, rest) = bytes.strip_prefix(OPEN)?.split_at_checked(64)?;
        let body = [b"{", rest.strip_prefix(CLOSE)?.strip_suffix(b"\n")?].concat();
        (blake3::hash(&body).to_hex().as_bytes() == digest).then_some(body)
    }
}

#[cfg(test)]
mod tests {
    use super::faults::Fault;
    use super::fixture::{Sandbox, key};
    use super::*;

    /// Every question is answered, and nothing is written, where nothing can be.
    #[test]
    fn a_store_that_cannot_be_written_can_be_read() {
        let (mut sandbox, disk) = Sandbox::faulty();
        for number in 1..=4 {
            sandbox.publish(number, &[("data", &number.to_string())]);
        }
        sandbox.store.lease(&[&key(1)]).unwrap();
        sandbox.reopen();
        sandbox.store.lease(&[&key(2)]).unwrap();
        std::fs::create_dir_all(sandbox.store.work(&key(9)).join("out-1")).unwrap();
        let working = sandbox.store.lock(&key(9)).unwrap();
        disk.fail_at(0, Fault::ReadOnly);
        assert!(Store::open_on(disk.clone(), sandbox.store.root()).is_err());
        let store = Store::open_existing_on(disk.clone(), sandbox.store.root()).unwrap().unwrap();
        assert!(!store.is_writable());
        assert!(matches!(store.find(&key(1)).unwrap(), Found::Hit(_)));
        assert!(store.verify(None, &mut |_, _| ()).unwrap().is_sound());
        let policy = GcPolicy { max_size: Some(0), ..GcPolicy::default() };
        let plan = store.plan_gc(&policy, &|_, _| ()).unwrap();
        assert_eq!((plan.results.len(), plan.kept[&Kept::InUse].count, plan.garbage.len()), (3, 1, 0));
        drop(working);
        assert_eq!(store.plan_gc(&policy, &|_, _| ()).unwrap().garbage.len(), 1, "nobody works there any more");
    }

    #[test]
    fn a_store_is_made_once_and_found_again() {
        let place = tempfile::tempdir().unwrap();
        let root = place.path().join("deep/artifacts");
        assert!(Store::open_existing(&root).unwrap().is_none());
        assert!(!root.exists(), "looking makes nothing");
        Store::open(&root).unwrap();
        Store::open(&root).unwrap();
        assert!(Store::open_existing(&root).unwrap().is_some());
        assert_eq!(std::fs::read_to_string(root.join("FORMAT")).unwrap(), "2\n");
    }

    #[test]
    fn a_store_of_the_format_before_is_read_as_it_is_and_brought_up_to_date_when_written() {
        let (sandbox, disk) = Sandbox::faulty();
        sandbox.publish(1, &[("data", "one")]);
        sandbox.store.end_lease().unwrap();
        std::fs::remove_dir_all(sandbox.store.folder("leases")).unwrap();
        let root = sandbox.store.root();
        let format = || std::fs::read_to_string(root.join("FORMAT")).unwrap();
        std::fs::write(root.join("FORMAT"), "1\n").unwrap();
        for folder in ["pins", "trash"] {
            std::fs::remove_dir(root.join(folder)).unwrap();
        }
        let reader = Store::open_existing(root).unwrap().unwrap();
        assert!(matches!(reader.lookup(&key(1)).unwrap(), Lookup::Hit(_)));
        assert_eq!((format().as_str(), root.join("leases").exists()), ("1\n", false), "looking changes nothing");
        for folder in FOLDERS {
            std::fs::create_dir_all(root.join(folder)).unwrap();
        }
        disk.fail_at(0, Fault::NoRoom);
        Store::open_on(disk.clone(), root).unwrap();
        assert_eq!(format(), "1\n", "a full disk can be opened to free it");
        disk.heal();
        Store::open_on(disk.clone(), root).unwrap().lease(&[&key(1)]).unwrap();
        assert_eq!(format(), "2\n");
        assert!(matches!(reader.lookup(&key(1)).unwrap(), Lookup::Hit(_)));
    }

    #[test]
    fn folders_that_are_no_store_are_refused_with_the_reason() {
        let place = tempfile::tempdir().unwrap();
        let refused = |root: &Path| {
            let error = Store::open(root).unwrap_err().to_string();
            assert!(Store::open_existing(root).is_err(), "{error}");
            error
        };
        let file = place.path().join("file");
        std::fs::write(&file, "x").unwrap();
        assert!(refused(&file).contains("file`"));
        assert!(refused(place.path()).contains("other files (`file`)"));
        std::fs::write(place.path().join("FORMAT"), "7\n").unwrap();
        assert!(refused(place.path()).contains("has format `7`"));
        assert_eq!(std::fs::read_dir(place.path()).unwrap().count(), 2, "nothing was made");
    }

    #[test]
    fn a_store_that_cannot_be_made_says_where() {
        // `/proc` refuses every folder, whoever asks.
        let error = Store::open(Path::new("/proc/artifacts")).unwrap_err().to_string();
        assert!(error.contains("cannot create the store `/proc/artifacts`"), "{error}");
    }

    #[test]
    fn a_seal_breaks_with_any_byte() {
        let sealed = sealed::seal(br#"{"a":1}"#);
        let value: Value = serde_json::from_slice(&sealed).unwrap();
        assert_eq!(value["a"], 1);
        assert_eq!(sealed::open(&sealed).unwrap(), br#"{"a":1}"#);
        for index in 0..sealed.len() {
            let mut broken = sealed.clone();
            broken[index] ^= 1;
            assert!(sealed::open(&broken).is_none(), "byte {index}");
            assert!(sealed::open(&sealed[..index]).is_none(), "cut at {index}");
        }
    }
}
