//! The stat cache: the digest of a file that has the (device, inode, size, mtime, ctime) of when it was hashed.
//!
//! ctime is in it because a program may set mtime back but not ctime. A file that was changed so shortly before it was
//! hashed that a later change could bear the same times is not remembered (git's racy rule).
//!
//! Users' programs sync nothing. A power cut may leave a file with its new times and its old bytes, so what was hashed before
//! the system has surely written it is believed only until the machine is started again.

use std::collections::HashMap;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use serde::{Deserialize, Serialize};

use super::digest::{HashedFile, hash_content};
use super::disk::Disk;
use super::error::At as _;
use super::{Digest, FileStat, StoreError, sealed};

/// A change within this many nanoseconds before hashing may be followed by one with the same times. Two seconds is the
/// coarsest clock of any file system in use.
pub(super) const RACY: i128 = 2_000_000_000;

/// Nanoseconds after which what was written lies on the disk unasked: well beyond what any kernel's writeback waits.
const SETTLED: i128 = 600 * 1_000_000_000;

/// Entries that are kept, at most; beyond, only those that this process has met.
const MOST: usize = 200_000;

/// Times that a file is hashed again because it changed under the reader.
const TRIES: usize = 3;

/// See the module.
#[derive(Debug)]
pub(super) struct StatCache {
    disk: Arc<dyn Disk>,
    path: PathBuf,
    writable: bool,
    known: Mutex<Known>,
}

#[derive(Debug, Default)]
struct Known {
    loaded: bool,
    /// From earlier processes.
    old: HashMap<FileStat, Digest>,
    /// Met by this process.
    met: HashMap<FileStat, Digest>,
    changed: bool,
}

#[derive(Serialize, Deserialize)]
struct OnDisk {
    files: Vec<(FileStat, Digest)>,
    /// Those that are believed until the machine is started again.
    #[serde(default)]
    fresh: Vec<(FileStat, Digest)>,
    /// Since when it runs.
    #[serde(default)]
    boot: String,
}

impl StatCache {
    /// The cache that lies at `path`; it is read at the first question, and never written unless `writable`.
    pub(super) fn new(disk: Arc<dyn Disk>, path: PathBuf, writable: bool) -> Self {
        Self { disk, path, writable, known: Mutex::default() }
    }

    /// The digest of a file's content, read only where it may have changed.
    pub(super) fn hash_file(&self, path: &Path) -> Result<HashedFile, StoreError> {
        for _ in 0..TRIES {
            let stat = self.disk.stat_target(path).at("read", path)?;
            if let Some(digest) = self.find(&stat.identity) {
                return Ok(HashedFile { digest, stat });
            }
            let file = self.disk.open(path).at("read", path)?;
            let stat = file.stat().at("read", path)?;
            let begun = self.disk.now();
            let digest = match hash_content(&*file, stat.size()) {
                Err(error) if error.kind() == ErrorKind::UnexpectedEof => continue,
                digest => digest.at("read", path)?,
            };
            if file.stat().at("read", path)?.identity == stat.identity {
                self.remember(stat.identity, &digest, begun);
                return Ok(HashedFile { digest, stat });
            }
        }
        Err(StoreError::unfit(path, "keeps changing while it is read"))
    }

    fn find(&self, stat: &FileStat) -> Option<Digest> {
        let mut known = self.known();
        if let Some(digest) = known.met.get(stat) {
            return Some(digest.clone());
        }
        let digest = known.old.get(stat)?.clone();
        known.met.insert(*stat, digest.clone());
        Some(digest)
    }

    /// Keeps a digest unless the file's last change is too near to `begun` (ns since 1970), when it was hashed.
    fn remember(&self, stat: FileStat, digest: &Digest, begun: i128) {
        if stat.4 + RACY < begun {
            let mut known = self.known();
            known.met.insert(stat, digest.clone());
            known.changed = true;
        }
    }

    fn known(&self) -> MutexGuard<'_, Known> {
        let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        if !known.loaded {
            known.loaded = true;
            known.old = self.load();
        }
        known
    }

    /// Writes what is new, together with what other processes wrote meanwhile.
    pub(super) fn save(&self) -> Result<(), StoreError> {
        if !self.writable {
            return Ok(());
        }
        let mut known = self.known();
        if !known.changed {
            return Ok(());
        }
        let mut all = self.load();
        if all.len() + known.met.len() > MOST {
            all.clear();
        }
        all.extend(known.met.iter().map(|(stat, digest)| (*stat, digest.clone())));
        let mut files: Vec<_> = all.into_iter().collect();
        files.sort();
        // They have not changed since, and the machine still runs: what is old enough by now is on the disk.
        let (settled, now) = (|stat: &FileStat, now| stat.4 + SETTLED < now, self.disk.now());
        let (files, fresh) = files.into_iter().partition(|(stat, _)| settled(stat, now));
        let body =
            serde_json::to_vec(&OnDisk { files, fresh, boot: self.disk.boot() }).expect("plain data has a JSON form");
        self.disk.write_atomically(&self.path, &sealed::seal(&body), false)?;
        known.changed = false;
        Ok(())
    }

    /// What the file holds; nothing where it is missing or damaged, because it only saves time.
    fn load(&self) -> HashMap<FileStat, Digest> {
        let body = self.disk.read(&self.path).ok().and_then(|bytes| sealed::open(&bytes));
        let on_disk = body.and_then(|body| serde_json::from_slice::<OnDisk>(&body).ok());
        let Some(OnDisk { files, fresh, boot }) = on_disk else { return HashMap::new() };
        let is_same = !boot.is_empty() && boot == self.disk.boot();
        files.into_iter().chain(fresh.into_iter().filter(|_| is_same)).collect()
    }
}

impl Drop for StatCache {
    fn drop(&mut self) {
        if let Err(error) = self.save() {
            tracing::debug!(%error, "the stat cache is not saved; files will be hashed again");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::disk::Native;
    use super::super::volatile::{Dice, Volatile};
    use super::*;

    fn cache(path: &Path, writable: bool) -> StatCache {
        StatCache::new(Arc::new(Native), path.to_owned(), writable)
    }

    fn digest(text: &str) -> Digest {
        blake3::hash(text.as_bytes()).into()
    }

    #[test]
    fn a_file_changed_just_before_hashing_is_not_remembered() {
        let cache = cache(Path::new("/nowhere/stat.json"), false);
        let stat = |changed| (1, 2, 3, 4, changed);
        cache.remember(stat(10 * RACY), &digest("racy"), 11 * RACY);
        cache.remember(stat(5 * RACY), &digest("old"), 11 * RACY);
        assert_eq!(cache.find(&stat(10 * RACY)), None);
        assert_eq!(cache.find(&stat(5 * RACY)), Some(digest("old")));
    }

    #[test]
    fn an_edit_of_equal_size_with_times_set_back_is_seen() {
        let place = tempfile::tempdir().unwrap();
        let (path, cache) = (place.path().join("data"), cache(&place.path().join("stat.json"), true));
        std::fs::write(&path, "one").unwrap();
        let modified = std::fs::metadata(&path).unwrap().modified().unwrap();
        assert_eq!(cache.hash_file(&path).unwrap().digest, digest("one"));
        std::fs::write(&path, "two").unwrap();
        std::fs::File::options().write(true).open(&path).unwrap().set_modified(modified).unwrap();
        assert_eq!(cache.hash_file(&path).unwrap().digest, digest("two"));
    }

    #[test]
    fn what_was_fresh_is_forgotten_when_the_machine_starts_again() {
        let disk = |volatile| -> Arc<dyn Disk> { Arc::new(volatile) };
        let before = Volatile::new();
        let (fresh, old) = (Path::new("/user/fresh"), Path::new("/user/old"));
        before.put(old, b"one");
        before.pass(SETTLED);
        before.put(fresh, b"one");
        before.pass(2 * RACY);
        for name in ["/", "/user", "/user/fresh", "/user/old"] {
            before.sync(Path::new(name)).unwrap();
        }
        let before = Arc::new(before);
        let first = StatCache::new(before.clone(), "/stat.json".into(), true);
        let stats = [fresh, old].map(|path| first.hash_file(path).unwrap().stat.identity);
        first.save().unwrap();
        let known = |disk: Arc<dyn Disk>| {
            let cache = StatCache::new(disk, "/stat.json".into(), false);
            stats.map(|stat| cache.find(&stat).is_some())
        };
        assert_eq!(known(disk(before.after_kill())), [true, true]);
        before.sync(Path::new("/stat.json")).unwrap();
        before.sync(Path::new("/")).unwrap();
        assert_eq!(known(disk(before.after_cut(&mut Dice(0)))), [false, true]);
    }

    #[test]
    fn what_is_saved_is_found_by_the_next_process_and_damage_is_forgotten() {
        let place = tempfile::tempdir().unwrap();
        let path = place.path().join("stat.json");
        let (one, two) = ((1, 1, 1, 1, 1), (2, 2, 2, 2, 2));
        let first = cache(&path, true);
        let second = cache(&path, true);
        first.remember(one, &digest("one"), Native.now());
        second.remember(two, &digest("two"), Native.now());
        drop((first, second));
        let third = cache(&path, false);
        assert_eq!((third.find(&one), third.find(&two)), (Some(digest("one")), Some(digest("two"))));
        let mut bytes = std::fs::read(&path).unwrap();
        let middle = bytes.len() / 2;
        bytes[middle] ^= 1;
        std::fs::write(&path, bytes).unwrap();
        assert_eq!(cache(&path, false).find(&one), None);
    }
}
