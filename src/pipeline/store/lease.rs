//! Which results running processes rest on, so that none is collected under them; and when each was last used.
//!
//! ```text
//! leases/run-<random>   a process at work: the keys that it rests on, and the objects that it reads whatever becomes of their
//!                       results, one a line; it holds the file's lock while it lives
//! leases/<digest>       what an ended process rested on, named by its keys; its last line says until when
//! leases/used.json      the same of many processes, folded together by the collector
//! locks/store           held shared, for moments, by whoever takes a lease or pins; alone by the collector
//! locks/door            passed on the way to `locks/store`: the collector shuts it, so that it need not wait for ever
//! ```
//!
//! The order is the promise: a process *first* writes a key into its lease and *then* looks whether the result is there.
//! While it writes it holds `locks/store`, which the collector holds from reading the leases to the last removal that rests
//! on them. So what a process finds after that stays until it ends, also where it ends by a kill: the kernel frees its locks,
//! and what it had leased counts as used. Nobody ever waits for a run to end.
//!
//! Whoever finds results before it can lease them, as a plan does, leases them and looks again ([`Store::lease_found`]). Whoever
//! only reads, as a verification, leases nothing and asks afterwards whether what it missed was there all the time.

use std::collections::{BTreeMap, HashSet};
use std::fs::{File, TryLockError};
use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use jiff::Timestamp;

use super::error::At as _;
use super::{Digest, Store, StoreError, sealed};

/// How often a process that waits for the collector, or the collector for a process, asks again.
const ASK: Duration = Duration::from_millis(1);

/// The folded records of use.
const FOLDED: &str = "used.json";

/// How the line begins that says when a lease ended.
const ENDED: &str = "@";

/// How the name of a living process's lease begins.
const LIVING: &str = "run-";

/// While it lives, nothing is collected. It is held for moments, in which nothing is hashed: the collector waits for it.
#[derive(Debug)]
pub(super) struct Hold(#[expect(dead_code, reason = "it is held, not read")] FileLock);

/// The right to collect: nobody publishes or takes a lease while it lives.
#[derive(Debug)]
pub(super) struct Alone {
    _door: FileLock,
    _store: FileLock,
}

/// A lock of the kernel's on a whole file.
#[derive(Debug)]
pub(super) struct FileLock(File);

impl Drop for FileLock {
    fn drop(&mut self) {
        // Closing alone is not enough: a program that another thread is just starting holds a copy of the descriptor.
        if let Err(error) = self.0.unlock() {
            tracing::debug!(%error, "cannot unlock");
        }
    }
}

/// The lease of this process, taken when it is first needed.
#[derive(Debug, Default)]
pub(super) struct Lease(Mutex<Option<Taken>>);

#[derive(Debug)]
struct Taken {
    path: PathBuf,
    lock: FileLock,
    keys: HashSet<Digest>,
}

impl Store {
    /// Keeps the collector away while the result lives. One thread must not hold two: the second would wait for a collector
    /// that waits for the first.
    pub(super) fn hold(&self) -> Result<Hold, StoreError> {
        let door = self.lock_shared("door")?;
        let lock = self.lock_shared("store")?;
        drop(door);
        Ok(Hold(lock))
    }

    /// Writes down that this process rests on the results of `keys`, which may be objects as well, until it ends. Look them up
    /// after it, or again: what is there then stays.
    pub fn lease(&self, keys: &[&Digest]) -> Result<(), StoreError> {
        let known = self.lease.0.lock().unwrap_or_else(PoisonError::into_inner);
        if known.as_ref().is_some_and(|taken| keys.iter().all(|key| taken.keys.contains(*key))) {
            return Ok(());
        }
        drop(known);
        let _hold = self.hold()?;
        self.write_lease(keys.iter().copied())
    }

    /// [`Store::lease`] for `keys` of which a look before has `found` the results of some: gives whether all of these are still
    /// there, and so stay.
    pub fn lease_found(&self, keys: &[&Digest], found: &[&Digest]) -> Result<bool, StoreError> {
        self.lease(keys)?;
        for path in found.iter().map(|key| self.manifest_path(key)) {
            // A manifest goes before its objects, so it alone is asked.
            match self.disk.stat(&path) {
                Ok(_) => {}
                Err(error) if error.kind() == ErrorKind::NotFound => return Ok(false),
                Err(error) => return Err(error).at("read", &path),
            }
        }
        Ok(true)
    }

    /// The right to collect. `waiting` is called once if it does not come at once.
    pub(super) fn alone(&self, waiting: &mut dyn FnMut()) -> Result<Alone, StoreError> {
        let mut said = false;
        let mut lock = |name| {
            let (file, path) = self.lock_named(name)?;
            let begun = Instant::now();
            loop {
                match file.try_lock() {
                    Ok(()) => return Ok(FileLock(file)),
                    Err(TryLockError::WouldBlock) => std::thread::sleep(ASK),
                    Err(TryLockError::Error(error)) if error.kind() == ErrorKind::Interrupted => {}
                    Err(TryLockError::Error(error)) => return Err(error).at("lock", &path),
                }
                if !said && begun.elapsed() > Duration::from_secs(1) {
                    said = true;
                    waiting();
                }
            }
        };
        let door = lock("door")?;
        Ok(Alone { _store: lock("store")?, _door: door })
    }

    /// Whether [`Store::alone`] would come at once.
    #[cfg(test)]
    pub(super) fn collector_may_go(&self) -> bool {
        ["door", "store"].iter().all(|name| self.lock_file_is_free(name))
    }

    /// Whether nobody has a file of `locks/`.
    #[cfg(test)]
    pub(super) fn lock_file_is_free(&self, name: &str) -> bool {
        self.lock_named(name).unwrap().0.try_lock().is_ok()
    }

    /// The keys and objects that living processes rest on. Certain only for whoever is [`Store::alone`].
    pub(super) fn leased(&self) -> Result<HashSet<Digest>, StoreError> {
        let mut keys = HashSet::new();
        for (path, living) in self.leases()? {
            if living {
                keys.extend(keys_of(&self.bytes_of(&path)?));
            }
        }
        Ok(keys)
    }

    /// When each key was last used, as far as it was written down; living processes use what they rest on now.
    pub(super) fn last_uses(&self) -> Result<BTreeMap<Digest, Timestamp>, StoreError> {
        let mut uses = self.folded()?;
        for (path, living) in self.leases()? {
            let bytes = self.bytes_of(&path)?;
            let when = if living { Timestamp::now() } else { self.ended(&path, &bytes)? };
            for key in keys_of(&bytes) {
                let last = uses.entry(key).or_insert(when);
                *last = (*last).max(when);
            }
        }
        Ok(uses)
    }

    /// Folds what ended processes have left into one file that speaks of `kept` keys alone.
    pub(super) fn fold_leases(&self, _alone: &Alone, kept: &HashSet<Digest>) -> Result<(), StoreError> {
        let ended: Vec<PathBuf> =
            self.leases()?.into_iter().filter(|(_, living)| !living).map(|(path, _)| path).collect();
        let folded = self.folded()?;
        if ended.is_empty() && folded.keys().all(|key| kept.contains(key)) {
            return Ok(());
        }
        let mut uses = self.last_uses()?;
        uses.retain(|key, _| kept.contains(key));
        let body = serde_json::to_vec(&serde_json::json!({ "uses": uses })).expect("times are plain data");
        // The new record first: a kill in between leaves both, which say the same.
        self.disk.write_atomically(&self.folder("leases").join(FOLDED), &sealed::seal(&body), true)?;
        for path in ended {
            self.remove(&path)?;
        }
        Ok(())
    }

    /// Every lease, and whether its process lives.
    fn leases(&self) -> Result<Vec<(PathBuf, bool)>, StoreError> {
        let mut found = Vec::new();
        for (name, path) in self.names(&self.folder("leases"))? {
            if name == FOLDED {
                continue;
            }
            if !name.starts_with(LIVING) {
                found.push((path, false));
            } else if let Some(living) = self.is_held(&path)? {
                found.push((path, living));
            }
            // Otherwise it has ended just now and bears its other name.
        }
        Ok(found)
    }

    /// Whether another works on `key`. Nothing is made where nobody ever did.
    pub fn is_locked(&self, key: &Digest) -> Result<bool, StoreError> {
        Ok(self.is_held(&self.folder("locks").join(&key.0))?.unwrap_or(false))
    }

    /// Whether a process has a lock alone; none where there is no such file. It is asked through a lock that is shared, which
    /// needs no right to write.
    pub(super) fn is_held(&self, path: &Path) -> Result<Option<bool>, StoreError> {
        let file = match self.disk.open_lock_there(path) {
            Ok(file) => file,
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(error).at("open the lock", path),
        };
        loop {
            match file.try_lock_shared() {
                Ok(()) => {
                    drop(FileLock(file));
                    return Ok(Some(false));
                }
                Err(TryLockError::WouldBlock) => return Ok(Some(true)),
                Err(TryLockError::Error(error)) if error.kind() == ErrorKind::Interrupted => {}
                Err(TryLockError::Error(error)) => return Err(error).at("lock", path),
            }
        }
    }

    /// The folded records. Damaged ones are an error: without them results look older than they are.
    fn folded(&self) -> Result<BTreeMap<Digest, Timestamp>, StoreError> {
        #[derive(serde::Deserialize)]
        struct OnDisk {
            uses: BTreeMap<Digest, Timestamp>,
        }
        let path = self.folder("leases").join(FOLDED);
        let bytes = match self.disk.read(&path) {
            Ok(bytes) => bytes,
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(BTreeMap::new()),
            Err(error) => return Err(error).at("read", &path),
        };
        let body = sealed::open(&bytes);
        let on_disk = body.and_then(|body| serde_json::from_slice::<OnDisk>(&body).ok()).ok_or_else(|| {
            let problem =
                "does not say when results were last used; remove it, and they count as used when they were made";
            StoreError::unfit(&path, problem)
        })?;
        Ok(on_disk.uses)
    }

    /// Appends to the lease; the caller holds `locks/store`.
    fn write_lease<'k>(&self, keys: impl IntoIterator<Item = &'k Digest>) -> Result<(), StoreError> {
        let mut lease = self.lease.0.lock().unwrap_or_else(PoisonError::into_inner);
        let known = lease.as_ref().map(|taken| &taken.keys);
        let mut new: Vec<&Digest> =
            keys.into_iter().filter(|key| known.is_none_or(|known| !known.contains(*key))).collect();
        new.sort();
        new.dedup();
        if new.is_empty() {
            return Ok(());
        }
        if lease.is_none() {
            let folder = self.folder("leases");
            let path = self.disk.beside(&folder, LIVING, &|path| self.disk.create(path, b"")).at("write", &folder)?;
            let file = self.disk.open_lock(&path).at("open the lock", &path)?;
            // Whoever reads the leases just now holds it for a moment.
            while let Err(error) = file.lock() {
                if error.kind() != ErrorKind::Interrupted {
                    return Err(error).at("lock", &path);
                }
            }
            *lease = Some(Taken { path, lock: FileLock(file), keys: HashSet::new() });
        }
        let taken = lease.as_mut().expect("it was taken just now");
        // A write that a full disk has cut short must not swallow what comes after it.
        let mut lines = String::with_capacity(new.len() * 65 + 1);
        lines.push('\n');
        for key in &new {
            lines.push_str(&key.0);
            lines.push('\n');
        }
        self.disk.append(&taken.path, lines.as_bytes()).at("write", &taken.path)?;
        taken.keys.extend(new.into_iter().cloned());
        Ok(())
    }

    /// Ends this process's lease: what it rested on becomes what was used now.
    pub(super) fn end_lease(&self) -> Result<(), StoreError> {
        let taken = self.lease.0.lock().unwrap_or_else(PoisonError::into_inner).take();
        let Some(Taken { path, lock, keys }) = taken else { return Ok(()) };
        let _hold = self.hold()?;
        let mut keys: Vec<Digest> = keys.into_iter().collect();
        keys.sort();
        let mut hasher = blake3::Hasher::new();
        for key in &keys {
            hasher.update(key.0.as_bytes());
        }
        self.disk.append(&path, format!("\n{ENDED}{}\n", Timestamp::now()).as_bytes()).at("write", &path)?;
        // The same run again takes the place of the one before, so that runs which change nothing leave nothing.
        let ended = path.with_file_name(hasher.finalize().to_hex().as_str());
        self.disk.rename(&path, &ended).at("write", &ended)?;
        drop(lock);
        Ok(())
    }

    /// When an ended process used what it had leased: when it says that it ended, or when it last wrote before it was killed.
    fn ended(&self, path: &Path, bytes: &[u8]) -> Result<Timestamp, StoreError> {
        let last = std::str::from_utf8(bytes).ok().and_then(|text| text.lines().next_back());
        if let Some(said) = last.and_then(|line| line.strip_prefix(ENDED)?.parse().ok()) {
            return Ok(said);
        }
        match self.disk.stat(path) {
            Ok(stat) => Ok(Timestamp::from_nanosecond(stat.identity.3).unwrap_or(Timestamp::UNIX_EPOCH)),
            Err(error) if error.kind() == ErrorKind::NotFound => Ok(Timestamp::UNIX_EPOCH),
            Err(error) => Err(error).at("read", path),
        }
    }

    /// A file's bytes; none where it is not there.
    fn bytes_of(&self, path: &Path) -> Result<Vec<u8>, StoreError> {
        match self.disk.read(path) {
            Ok(bytes) => Ok(bytes),
            Err(error) if error.kind() == ErrorKind::NotFound => Ok(Vec::new()),
            Err(error) => Err(error).at("read", path),
        }
    }

    /// Waits until nobody has a file of `locks/` alone.
    pub(super) fn lock_shared(&self, name: &str) -> Result<FileLock, StoreError> {
        self.lock_by(name, File::lock_shared)
    }

    /// Waits until nobody has a file of `locks/`.
    pub(super) fn lock_whole(&self, name: &str) -> Result<FileLock, StoreError> {
        self.lock_by(name, File::lock)
    }

    fn lock_by(&self, name: &str, lock: fn(&File) -> std::io::Result<()>) -> Result<FileLock, StoreError> {
        let (file, path) = self.lock_named(name)?;
        locked(file, &path, lock)
    }

    /// Waits until nobody has the lock file at `path`.
    pub(super) fn lock_path(&self, path: &Path) -> Result<FileLock, StoreError> {
        locked(self.disk.open_lock(path).at("open the lock", path)?, path, File::lock)
    }

    fn lock_named(&self, name: &str) -> Result<(File, PathBuf), StoreError> {
        let path = self.folder("locks").join(name);
        Ok((self.disk.open_lock(&path).at("open the lock", &path)?, path))
    }
}

fn locked(file: File, path: &Path, lock: fn(&File) -> std::io::Result<()>) -> Result<FileLock, StoreError> {
    loop {
        match lock(&file) {
            Ok(()) => return Ok(FileLock(file)),
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            Err(error) => return Err(error).at("lock", path),
        }
    }
}

/// The keys in the lines of a lease; a line that a kill has cut short is none.
fn keys_of(bytes: &[u8]) -> impl Iterator<Item = Digest> {
    bytes
        .split_inclusive(|byte| *byte == b'\n')
        .filter_map(|line| std::str::from_utf8(line).ok()?.strip_suffix('\n'))
        .filter(|line| line.len() == 64)
        .map(|line| Digest(line.to_owned()))
}

#[cfg(test)]
mod tests {
    use super::super::fixture::{Sandbox, key};
    use super::*;

    fn ended(sandbox: &Sandbox) -> usize {
        sandbox.store.leases().unwrap().iter().filter(|(_, living)| !living).count()
    }

    #[test]
    fn what_is_leased_is_known_to_others_until_its_process_ends() {
        let mut sandbox = Sandbox::new();
        let other = Store::open(sandbox.store.root()).unwrap();
        sandbox.store.lease(&[&key(1), &key(2)]).unwrap();
        sandbox.store.lease(&[&key(2), &key(3)]).unwrap();
        let leased = other.leased().unwrap();
        assert_eq!(leased, [key(1), key(2), key(3)].into());
        sandbox.reopen();
        assert!(other.leased().unwrap().is_empty());
        assert_eq!(other.last_uses().unwrap().into_keys().collect::<HashSet<_>>(), leased);
    }

    #[test]
    fn what_went_between_the_look_and_the_lease_is_told() {
        let sandbox = Sandbox::new();
        sandbox.publish(1, &[("data", "one")]);
        sandbox.publish(2, &[("data", "two")]);
        let other = Store::open(sandbox.store.root()).unwrap();
        let everything = super::super::GcPolicy { max_size: Some(0), ..Default::default() };
        let collect = |store: &Store| {
            let plan = store.plan_gc(&everything, &|_, _| ()).unwrap();
            store.collect_garbage(&plan, &mut |_, _| (), &mut || ()).unwrap().results
        };
        assert!(sandbox.store.lease_found(&[&key(1), &key(3)], &[&key(1)]).unwrap());
        assert_eq!(collect(&other), 1);
        assert!(!sandbox.store.lease_found(&[&key(1), &key(2)], &[&key(1), &key(2)]).unwrap(), "2 went");
        assert!(sandbox.store.lease_found(&[&key(1), &key(2)], &[&key(1)]).unwrap());
        sandbox.publish(2, &[("data", "two")]);
        assert_eq!(collect(&other), 0);
    }

    #[test]
    fn a_line_that_a_full_disk_has_cut_short_swallows_nothing() {
        use super::super::faults::Fault;
        let (sandbox, disk) = Sandbox::faulty();
        sandbox.store.lease(&[&key(1)]).unwrap();
        // The two locks are opened, then the lease is written.
        disk.fail_at(2, Fault::ShortWrite);
        assert!(sandbox.store.lease(&[&key(2)]).is_err());
        disk.heal();
        sandbox.store.lease(&[&key(3)]).unwrap();
        assert_eq!(Store::open(sandbox.store.root()).unwrap().leased().unwrap(), [key(1), key(3)].into());
    }

    #[test]
    fn the_same_run_again_leaves_nothing_more() {
        let mut sandbox = Sandbox::new();
        for _ in 0..3 {
            sandbox.store.lease(&[&key(2)]).unwrap();
            sandbox.store.lease(&[&key(1)]).unwrap();
            sandbox.reopen();
            sandbox.store.lease(&[&key(1), &key(2)]).unwrap();
            sandbox.reopen();
        }
        assert_eq!(ended(&sandbox), 1);
    }

    #[test]
    fn uses_are_folded_and_only_kept_keys_stay() {
        let mut sandbox = Sandbox::new();
        for number in 1..4 {
            sandbox.store.lease(&[&key(number), &key(9)]).unwrap();
            sandbox.reopen();
        }
        let before = sandbox.store.last_uses().unwrap();
        let alone = sandbox.store.alone(&mut || ()).unwrap();
        sandbox.store.fold_leases(&alone, &[key(1), key(9)].into()).unwrap();
        let after = sandbox.store.last_uses().unwrap();
        assert_eq!(ended(&sandbox), 0);
        assert_eq!(after, before.into_iter().filter(|(one, _)| [key(1), key(9)].contains(one)).collect());
    }

    #[test]
    fn a_damaged_record_of_use_stops_the_collection() {
        let sandbox = Sandbox::new();
        let path = sandbox.store.folder("leases").join(FOLDED);
        assert!(sandbox.store.last_uses().unwrap().is_empty());
        for bytes in ["", "{}"] {
            std::fs::write(&path, bytes).unwrap();
            let error = sandbox.store.plan_gc(&super::super::GcPolicy::default(), &|_, _| ()).unwrap_err().to_string();
            assert!(error.contains("used.json` does not say"), "{error}");
        }
    }

    #[test]
    fn a_collector_gets_its_turn_among_many_who_publish() {
        let sandbox = Sandbox::new();
        let stop = std::sync::atomic::AtomicBool::new(false);
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    while !stop.load(std::sync::atomic::Ordering::Relaxed) {
                        let _hold = sandbox.store.hold().unwrap();
                        std::thread::sleep(Duration::from_millis(3));
                    }
                });
            }
            for _ in 0..5 {
                let begun = std::time::Instant::now();
                drop(sandbox.store.alone(&mut || ()).unwrap());
                // Without a turn of its own it would wait for as long as the others go on.
                assert!(begun.elapsed() < Duration::from_secs(60));
            }
            stop.store(true, std::sync::atomic::Ordering::Relaxed);
        });
    }
}
