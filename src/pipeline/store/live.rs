//! What running processes say of themselves to other terminals.
//!
//! ```text
//! runs/.live/run-<process>-<n>.lock   held by the process while it lives
//! runs/.live/run-<process>-<n>.json   what it said last, as a whole
//! locks/live                          held for a moment by whoever begins
//! ```
//!
//! The kernel frees the lock with its process, however that ends, so that nobody who was killed passes for living; what it
//! said last stays. Like every view it may be lost: nothing rests on it, and nothing of it is synced.

use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::disk::Disk;
use super::error::At as _;
use super::lease::FileLock;
use super::{Store, StoreError};

/// Where it lies below `runs/`; hidden, since it is no experiment.
const FOLDER: &str = ".live";

/// How many that have ended are remembered.
const REMEMBERED: usize = 16;

/// This process, as others see it.
#[derive(Debug)]
pub struct LiveRun {
    path: PathBuf,
    disk: Arc<dyn Disk>,
    _lock: FileLock,
}

/// A process as another one sees it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Published {
    /// Whether it lives, as far as this machine can tell.
    pub is_living: bool,
    /// What it said last.
    pub bytes: Vec<u8>,
}

impl LiveRun {
    /// Says something in place of what was said before.
    pub fn say(&self, bytes: &[u8]) -> Result<(), StoreError> {
        self.disk.write_atomically(&self.path, bytes, false)
    }
}

impl Store {
    /// Lets others see this process until the value is dropped, or the process ends in any way.
    pub fn begin_live(&self) -> Result<LiveRun, StoreError> {
        let folder = self.live_folder();
        self.disk.ensure_folder(&folder, false)?;
        // A lock that was made just now and is not yet held would look like one of a process that has ended.
        let _moment = self.lock_whole("live")?;
        self.forget_ended(&folder)?;
        let make = |path: &Path| self.disk.create(&lock_of(path), b"");
        let path = self.disk.beside(&folder, "run-", &make).at("write", &folder)?;
        let lock = self.lock_path(&lock_of(&path))?;
        Ok(LiveRun { path: path.with_extension("json"), disk: Arc::clone(&self.disk), _lock: lock })
    }

    /// The processes that live, and some that have ended, in no order.
    pub fn live_runs(&self) -> Result<Vec<Published>, StoreError> {
        let mut found = Vec::new();
        for (name, path) in self.names(&self.live_folder())? {
            if name.strip_suffix(".json").is_none() {
                continue;
            }
            // Asked before it is read: one that ends in between is read as it ended.
            let is_living = self.is_held(&lock_of(&path))?.unwrap_or(false);
            match self.disk.read(&path) {
                Ok(bytes) => found.push(Published { is_living, bytes }),
                Err(error) if error.kind() == ErrorKind::NotFound => {}
                Err(error) => return Err(error).at("read", &path),
            }
        }
        Ok(found)
    }

    fn live_folder(&self) -> PathBuf {
        self.folder("runs").join(FOLDER)
    }

    /// Forgets those that ended first, and those that ended before they said anything.
    fn forget_ended(&self, folder: &Path) -> Result<(), StoreError> {
        let mut ended = Vec::new();
        for (name, lock) in self.names(folder)?.into_iter().filter(|(name, _)| name.strip_suffix(".lock").is_some()) {
            if self.is_held(&lock)? == Some(false) {
                let said = folder.join(name).with_extension("json");
                let when = self.disk.stat(&said).ok().map(|stat| stat.identity.3);
                ended.push((when, said, lock));
            }
        }
        ended.sort();
        let silent = ended.iter().filter(|(when, _, _)| when.is_none()).count();
        let old = ended.len().saturating_sub(REMEMBERED).max(silent);
        for (when, said, lock) in ended.into_iter().take(old) {
            if when.is_some() {
                self.remove(&said)?;
            }
            self.remove(&lock)?;
        }
        Ok(())
    }
}

fn lock_of(path: &Path) -> PathBuf {
    path.with_extension("lock")
}

#[cfg(test)]
mod tests {
    use super::super::fixture::Sandbox;
    use super::*;

    fn seen(store: &Store) -> Vec<(bool, String)> {
        let text = |one: Published| (one.is_living, String::from_utf8(one.bytes).unwrap());
        let mut seen: Vec<(bool, String)> = store.live_runs().unwrap().into_iter().map(text).collect();
        seen.sort();
        seen
    }

    #[test]
    fn what_a_run_says_is_seen_and_whether_it_lives() {
        let sandbox = Sandbox::new();
        let other = Store::open_existing(sandbox.store.root()).unwrap().unwrap();
        assert!(seen(&other).is_empty());
        let run = sandbox.store.begin_live().unwrap();
        assert!(seen(&other).is_empty(), "it has said nothing yet");
        run.say(b"one").unwrap();
        run.say(b"two").unwrap();
        assert_eq!(seen(&other), [(true, "two".to_owned())]);
        let second = sandbox.store.begin_live().unwrap();
        second.say(b"three").unwrap();
        drop(run);
        assert_eq!(seen(&other), [(false, "two".to_owned()), (true, "three".to_owned())]);
        assert!(sandbox.store.recorded_experiments().unwrap().is_empty(), "it is no experiment");
    }

    #[test]
    fn only_the_last_that_ended_are_remembered() {
        let sandbox = Sandbox::new();
        for number in 0..REMEMBERED + 5 {
            let run = sandbox.store.begin_live().unwrap();
            run.say(number.to_string().as_bytes()).unwrap();
        }
        drop(sandbox.store.begin_live().unwrap());
        let last = sandbox.store.begin_live().unwrap();
        last.say(b"last").unwrap();
        let seen = seen(&sandbox.store);
        assert_eq!(seen.last(), Some(&(true, "last".to_owned())));
        assert_eq!(seen.len(), REMEMBERED + 1);
        let files = std::fs::read_dir(sandbox.store.live_folder()).unwrap().count();
        assert_eq!(files, 2 * seen.len(), "each has a lock and what it said");
    }
}
