//! What lies in the store: every result with what it is made of, how large it is and when it was last used.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::io::ErrorKind;
use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};

use jiff::Timestamp;
use rayon::iter::{IntoParallelRefIterator as _, ParallelIterator as _};

use crate::pipeline::plan::NodeName;
use crate::pipeline::store::disk::Sort;
use crate::pipeline::store::error::At as _;
use crate::pipeline::store::{Digest, FileStat, Manifest, Store, StoreError, sealed};

/// A result.
#[derive(Clone, Debug)]
pub(super) struct Stored {
    pub(super) key: Digest,
    pub(super) kind: String,
    /// Its objects and their bytes.
    pub(super) objects: BTreeMap<Digest, u64>,
    /// The objects that it was made from.
    pub(super) inputs: BTreeSet<Digest>,
    /// Bytes of its logs.
    pub(super) logs: u64,
    /// When it was last used, or else made.
    pub(super) last_used: Timestamp,
    /// Its names, each with how many newer results bear it.
    pub(super) names: Vec<(NodeName, usize)>,
}

impl Stored {
    /// The bytes of its objects and logs.
    pub(super) fn bytes(&self) -> u64 {
        self.objects.values().sum::<u64>() + self.logs
    }
}

/// Every result.
#[derive(Clone, Debug, Default)]
pub(super) struct Survey {
    /// Sorted by key.
    pub(super) results: Vec<Stored>,
    /// Manifests that are damaged.
    pub(super) unreadable: usize,
}

/// Which objects results are made of, kept up to date at the cost of a stat for each manifest that has not changed.
#[derive(Debug, Default)]
pub(super) struct References {
    by_key: HashMap<Digest, (FileStat, Vec<Digest>)>,
}

impl References {
    /// Reads what is new; gives every object that a manifest names now.
    pub(super) fn refresh(&mut self, store: &Store) -> Result<BTreeSet<Digest>, StoreError> {
        let mut now = HashMap::with_capacity(self.by_key.len());
        for key in store.keys()? {
            let path = store.manifest_path(&key);
            let stat = match store.disk.stat(&path) {
                Ok(stat) => stat.identity,
                Err(error) if error.kind() == ErrorKind::NotFound => continue,
                Err(error) => return Err(error).at("read", &path),
            };
            let known = self.by_key.remove(&key).filter(|(old, _)| *old == stat);
            let objects = match known {
                Some((_, objects)) => objects,
                None => match read(store, &key)? {
                    Some(manifest) => manifest.outputs.into_iter().map(|output| output.digest).collect(),
                    None => Vec::new(),
                },
            };
            now.insert(key, (stat, objects));
        }
        self.by_key = now;
        Ok(self.by_key.values().flat_map(|(_, objects)| objects.iter().cloned()).collect())
    }
}

impl Store {
    /// Reads every manifest.
    pub(super) fn survey(&self, progress: &(dyn Fn(usize, usize) + Sync)) -> Result<Survey, StoreError> {
        let keys = self.keys()?;
        let mut names = self.names_by_key()?;
        let uses = self.last_uses()?;
        let done = AtomicUsize::new(0);
        let read: Vec<Option<Stored>> = keys
            .par_iter()
            .map(|key| {
                let manifest = read(self, key)?;
                progress(done.fetch_add(1, Ordering::Relaxed) + 1, keys.len());
                let Some(manifest) = manifest else { return Ok(None) };
                let bytes = |files: &[crate::pipeline::store::StoredFile]| files.iter().map(|file| file.size).sum();
                let made = manifest.finished.parse().unwrap_or(Timestamp::UNIX_EPOCH);
                Ok(Some(Stored {
                    kind: manifest.parts.kind,
                    objects: manifest.outputs.iter().map(|one| (one.digest.clone(), bytes(&one.files))).collect(),
                    inputs: manifest.inputs.into_values().collect(),
                    logs: self.tree_bytes(&self.logs(key))?,
                    last_used: uses.get(key).map_or(made, |used| made.max(*used)),
                    names: Vec::new(),
                    key: key.clone(),
                }))
            })
            .collect::<Result<_, StoreError>>()?;
        let unreadable = read.iter().filter(|one| one.is_none()).count();
        let mut results: Vec<Stored> = read.into_iter().flatten().collect();
        for result in &mut results {
            result.names = names.remove(&result.key).unwrap_or_default();
        }
        Ok(Survey { results, unreadable })
    }

    /// The names that keys have or had, each with how many newer results bear it.
    fn names_by_key(&self) -> Result<HashMap<Digest, Vec<(NodeName, usize)>>, StoreError> {
        let mut names: HashMap<Digest, Vec<(NodeName, usize)>> = HashMap::new();
        for (name, record) in self.every_record()? {
            let mut rank = 0;
            for key in std::iter::once(record.key).chain(record.earlier) {
                let newer = rank;
                // A result that is gone takes no place among the newest.
                if self.disk.is_there(&self.manifest_path(&key)) {
                    rank += 1;
                }
                names.entry(key).or_default().push((name.clone(), newer));
            }
        }
        Ok(names)
    }

    /// The bytes of every file below `path`, or of the file; none where it is not there. Links are not followed.
    pub(super) fn tree_bytes(&self, path: &Path) -> Result<u64, StoreError> {
        let mut open = match self.disk.stat(path) {
            Ok(stat) if stat.sort == Sort::Folder => vec![path.to_owned()],
            Ok(stat) => return Ok(stat.size()),
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(0),
            Err(error) => return Err(error).at("read", path),
        };
        let mut bytes = 0;
        while let Some(folder) = open.pop() {
            let entries = match self.disk.list(&folder) {
                Ok(entries) => entries,
                Err(error) if matches!(error.kind(), ErrorKind::NotFound | ErrorKind::NotADirectory) => continue,
                Err(error) => return Err(error).at("list", &folder),
            };
            for entry in entries {
                let path = folder.join(entry.name);
                if entry.is_folder {
                    open.push(path);
                } else {
                    bytes += self.disk.stat(&path).map_or(0, |stat| stat.size());
                }
            }
        }
        Ok(bytes)
    }
}

/// A manifest, or none where it is damaged or gone. One that the disk does not give, and one that is whole and says what
/// this program does not understand, are errors: what they refer to is not known, so nothing may be called garbage.
fn read(store: &Store, key: &Digest) -> Result<Option<Manifest>, StoreError> {
    let path = store.manifest_path(key);
    let bytes = match store.disk.read(&path) {
        Ok(bytes) => bytes,
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(error).at("read", &path),
    };
    let Some(body) = sealed::open(&bytes) else { return Ok(None) };
    let manifest = serde_json::from_slice::<Manifest>(&body).map_err(|_| {
        let problem = "was written by another version of this program, so it is not known what may go";
        StoreError::unfit(&path, format!("{problem}; collect with that version"))
    })?;
    Ok((manifest.key == *key).then_some(manifest))
}

#[cfg(test)]
mod tests {
    use crate::pipeline::store::fixture::Sandbox;

    #[test]
    fn the_bytes_of_a_tree_are_not_those_that_its_links_lead_to() {
        let sandbox = Sandbox::new();
        let folder = sandbox.folder(&[("a/b", "123"), ("c", "45")]);
        let other = sandbox.folder(&[("large", "0123456789")]);
        let link = folder.join("a/link");
        std::os::unix::fs::symlink(&other, &link).unwrap();
        std::os::unix::fs::symlink("..", folder.join("a/loop")).unwrap();
        let name = other.as_os_str().len() as u64;
        assert_eq!(sandbox.store.tree_bytes(&link).unwrap(), name);
        assert_eq!(sandbox.store.tree_bytes(&folder).unwrap(), 5 + name + 2);
        assert_eq!(sandbox.store.tree_bytes(&folder.join("none")).unwrap(), 0);
    }
}
