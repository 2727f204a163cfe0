//! Reading every byte of the store again, and saying what is damaged, missing or left over.

use std::collections::{BTreeMap, BTreeSet};
use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use jiff::{SignedDuration, Timestamp};
use rayon::iter::{
    IndexedParallelIterator as _, IntoParallelIterator as _, IntoParallelRefIterator as _, ParallelIterator as _,
};
use serde::{Deserialize, Serialize};

use super::error::At as _;
use super::{Digest, FileStat, Manifest, Store, StoreError, digest, sealed};

/// Something of a result that is not what was stored.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Damage {
    /// The key whose result it is part of.
    pub key: Digest,
    /// What is wrong, naming the file.
    pub what: String,
}

/// How a verification goes.
#[derive(Clone, Copy, Debug, Default)]
pub struct Verification<'a> {
    /// The results; none for all.
    pub keys: Option<&'a [Digest]>,
    /// Whether it writes down how far it came, and goes on from where the last one was interrupted.
    pub goes_on: bool,
    /// Whether it begins anew all the same.
    pub is_fresh: bool,
    /// Set when it should stop after the objects at hand.
    pub interrupt: Option<&'a AtomicBool>,
}

/// How often it is written down how far a verification has come.
const SAVE: Duration = Duration::from_secs(2);

/// What was hashed longer ago than this by an interrupted verification is hashed again.
const FRESH: SignedDuration = SignedDuration::from_hours(7 * 24);

/// How far an interrupted verification came, as it lies on disk.
#[derive(Default, Serialize, Deserialize)]
struct Hashed {
    /// Objects that are as stored.
    hashed: BTreeMap<Digest, Sound>,
}

/// That an object was found to be as stored.
#[derive(Clone, Serialize, Deserialize)]
struct Sound {
    /// When it was hashed.
    when: Timestamp,
    /// The stats of its files, taken before.
    stats: Digest,
}

/// How far a verification has come.
struct State {
    hashed: BTreeMap<Digest, Sound>,
    saved: Instant,
    bad: BTreeMap<Digest, String>,
    bytes: u64,
}

/// A manifest, and the stat of its file from before it was read.
type Read = (Manifest, FileStat);

/// What a verification found.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct VerifyReport {
    /// Manifests that were read.
    pub manifests: usize,
    /// Objects that were hashed.
    pub objects: usize,
    /// Bytes that were hashed.
    pub bytes: u64,
    /// Objects that an interrupted verification had hashed before.
    pub resumed: usize,
    /// Whether it was stopped before the end.
    pub interrupted: bool,
    /// Results whose manifest or content is not what was stored.
    pub damaged: Vec<Damage>,
    /// Results of which an object is not there.
    pub missing: Vec<Damage>,
    /// Objects of no result, left by a kill or by results that were replaced: harmless. Looked for among all keys only.
    pub orphans: Vec<PathBuf>,
}

impl VerifyReport {
    /// Whether every result is what was stored.
    pub fn is_sound(&self) -> bool {
        self.damaged.is_empty() && self.missing.is_empty()
    }
}

/// What a repair has done.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Repaired {
    /// Results that were put aside.
    pub aside: usize,
    /// Damaged results that stay as they are, because another process works on their keys.
    pub busy: usize,
}

impl Store {
    /// Hashes every object of the results of `keys`, or of all; `progress` is told bytes done and bytes in all.
    ///
    /// Nothing is changed; see [`Store::repair`]. A collection may go on beside it: what it takes, or what is made anew, is no
    /// longer verified, and an asked-for key without a result is passed over.
    pub fn verify(
        &self,
        keys: Option<&[Digest]>,
        progress: &mut (dyn FnMut(u64, u64) + Send),
    ) -> Result<VerifyReport, StoreError> {
        self.verify_in_pieces(&Verification { keys, ..Verification::default() }, progress)
    }

    /// [`Store::verify`] that can be stopped and goes on where it stopped.
    pub fn verify_in_pieces(
        &self,
        verification: &Verification<'_>,
        progress: &mut (dyn FnMut(u64, u64) + Send),
    ) -> Result<VerifyReport, StoreError> {
        let mut report = VerifyReport::default();
        // Before the manifests, which are written after them.
        let objects = if verification.keys.is_none() { self.shelved("objects", "")? } else { Vec::new() };
        let all;
        let keys = if let Some(keys) = verification.keys {
            keys
        } else {
            all = self.keys()?;
            &all
        };
        let mut manifests: Vec<Read> = Vec::new();
        for key in keys {
            match self.manifest_with_stat(key)? {
                Some(Ok(manifest)) => manifests.push(manifest),
                Some(Err(what)) => report.damaged.push(Damage { key: key.clone(), what }),
                None => continue,
            }
            report.manifests += 1;
        }
        // Results share objects: each is read once.
        let mut sizes: BTreeMap<&Digest, u64> = BTreeMap::new();
        for output in manifests.iter().flat_map(|(manifest, _)| &manifest.outputs) {
            sizes.insert(&output.digest, output.files.iter().map(|file| file.size).sum());
        }
        let bad = self.hash_objects(&sizes, verification, &mut report, progress)?;
        for manifest in &manifests {
            self.blame(manifest, &bad, &mut report)?;
        }
        if verification.keys.is_none() {
            let orphans = objects.into_iter().filter(|(digest, _)| !sizes.contains_key(digest));
            report.orphans = orphans.map(|(_, path)| path).collect();
        } else if !bad.is_empty() {
            self.blame_others(keys, &bad, &mut report)?;
        }
        Ok(report)
    }

    /// Hashes objects, on as many threads as there are; gives what is wrong with those that are not as stored.
    fn hash_objects(
        &self,
        sizes: &BTreeMap<&Digest, u64>,
        verification: &Verification<'_>,
        report: &mut VerifyReport,
        progress: &mut (dyn FnMut(u64, u64) + Send),
    ) -> Result<BTreeMap<Digest, String>, StoreError> {
        let path = self.folder("cache").join("verify.json");
        let mut state = State { hashed: BTreeMap::new(), saved: Instant::now(), bad: BTreeMap::new(), bytes: 0 };
        if verification.goes_on && !verification.is_fresh {
            state.hashed = self.hashed_before(&path, sizes);
        }
        report.resumed = state.hashed.len();
        let left: Vec<(&Digest, u64)> = sizes
            .iter()
            .filter(|(digest, _)| !state.hashed.contains_key(*digest))
            .map(|(one, size)| (*one, *size))
            .collect();
        let total = left.iter().map(|(_, size)| size).sum();
        progress(0, total);
        let stops = || verification.interrupt.is_some_and(|interrupt| interrupt.load(Ordering::Relaxed));
        let shared = Mutex::new((&mut state, progress));
        left.par_iter().with_max_len(1).try_for_each(|(digest, size)| {
            if stops() {
                return Ok(());
            }
            // Before, so that what changes meanwhile is hashed again by whoever goes on.
            let stats = digest::stats_of_folder(&*self.disk, &self.object(digest));
            let verified = self.verify_digest(digest)?;
            let mut shared = shared.lock().unwrap_or_else(PoisonError::into_inner);
            let (state, progress) = &mut *shared;
            match verified {
                Ok(()) => {
                    // They cannot be had where it came while it was looked for: then the next one hashes it again.
                    let stats = stats.unwrap_or_else(|_| Digest(String::new()));
                    state.hashed.insert((*digest).clone(), Sound { when: Timestamp::now(), stats });
                }
                Err(what) => {
                    state.bad.insert((*digest).clone(), what);
                }
            }
            state.bytes += size;
            progress(state.bytes, total);
            if verification.goes_on && state.saved.elapsed() > SAVE {
                self.save_hashed(&path, &state.hashed)?;
                state.saved = Instant::now();
            }
            Ok::<(), StoreError>(())
        })?;
        report.bytes = state.bytes;
        report.objects = state.hashed.len() + state.bad.len() - report.resumed;
        report.interrupted = report.objects < left.len();
        if verification.goes_on {
            if report.interrupted { self.save_hashed(&path, &state.hashed)? } else { self.remove(&path).map(drop)? }
        }
        Ok(state.bad)
    }

    /// The manifest of `key` as [`Store::manifest`] gives it, with the stat of its file from before it was read.
    fn manifest_with_stat(&self, key: &Digest) -> Result<Option<Result<Read, String>>, StoreError> {
        let path = self.manifest_path(key);
        let stat = match self.disk.stat(&path) {
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
            stat => stat.at("read", &path)?.identity,
        };
        Ok(self.manifest(key)?.map(|manifest| manifest.map(|manifest| (manifest, stat))))
    }

    /// Adds the results that nobody asked about and that share what is damaged.
    fn blame_others(
        &self,
        asked: &[Digest],
        bad: &BTreeMap<Digest, String>,
        report: &mut VerifyReport,
    ) -> Result<(), StoreError> {
        let asked: BTreeSet<&Digest> = asked.iter().collect();
        let mut others = Vec::new();
        for key in self.keys()?.iter().filter(|key| !asked.contains(*key)) {
            let manifest = self.manifest_with_stat(key)?.and_then(Result::ok);
            let shares = |manifest: &Manifest| manifest.outputs.iter().any(|output| bad.contains_key(&output.digest));
            others.extend(manifest.filter(|(manifest, _)| shares(manifest)));
        }
        // They may have been made after it was hashed, and it with them.
        let mut still_bad = BTreeMap::new();
        for output in others.iter().flat_map(|(manifest, _)| &manifest.outputs) {
            if bad.contains_key(&output.digest)
                && !still_bad.contains_key(&output.digest)
                && let Err(what) = self.verify_object(output)?
            {
                still_bad.insert(output.digest.clone(), what);
            }
        }
        others.iter().try_for_each(|manifest| self.blame(manifest, &still_bad, report))
    }

    /// Adds what is wrong with a result whose objects are among the bad ones.
    ///
    /// As long as its manifest lies there no object of it can be collected, so one that is bad is damaged. Where the manifest is
    /// no longer the one that was read before they were hashed, the result was collected or made anew, and nothing is said.
    fn blame(
        &self,
        (manifest, stat): &Read,
        bad: &BTreeMap<Digest, String>,
        report: &mut VerifyReport,
    ) -> Result<(), StoreError> {
        let path = self.manifest_path(&manifest.key);
        match self.disk.stat(&path) {
            Ok(now) if now.identity == *stat => {}
            Err(error) if error.kind() != ErrorKind::NotFound => return Err(error).at("read", &path),
            _ => return Ok(()),
        }
        for output in &manifest.outputs {
            let Some(what) = bad.get(&output.digest) else { continue };
            let there = self.disk.is_folder(&self.object(&output.digest));
            let list = if there { &mut report.damaged } else { &mut report.missing };
            list.push(Damage { key: manifest.key.clone(), what: what.clone() });
        }
        Ok(())
    }

    /// What of these objects an interrupted verification has hashed not long ago, and what has not changed since; nothing
    /// where that cannot be read.
    fn hashed_before(&self, path: &Path, sizes: &BTreeMap<&Digest, u64>) -> BTreeMap<Digest, Sound> {
        let sealed = self.disk.read(path).ok().and_then(|bytes| sealed::open(&bytes));
        let hashed = sealed.and_then(|body| serde_json::from_slice::<Hashed>(&body).ok()).unwrap_or_default().hashed;
        let now = Timestamp::now();
        let is_unchanged = |(digest, sound): &(Digest, Sound)| {
            sizes.contains_key(digest)
                && now.duration_since(sound.when) < FRESH
                && digest::stats_of_folder(&*self.disk, &self.object(digest)).is_ok_and(|stats| stats == sound.stats)
        };
        hashed.into_par_iter().filter(is_unchanged).collect()
    }

    fn save_hashed(&self, path: &Path, hashed: &BTreeMap<Digest, Sound>) -> Result<(), StoreError> {
        let body = serde_json::to_vec(&Hashed { hashed: hashed.clone() }).expect("times are plain data");
        self.disk.write_atomically(path, &sealed::seal(&body), false)
    }

    /// Puts aside the damaged results of a report, so that the next run rebuilds them. Orphans stay: one may belong to a result
    /// that another process is about to publish.
    pub fn repair(&self, report: &VerifyReport) -> Result<Repaired, StoreError> {
        let (mut aside, mut busy) = (BTreeSet::new(), BTreeSet::new());
        for damage in report.damaged.iter().chain(&report.missing) {
            match self.try_lock(&damage.key)? {
                Some(lock) if self.quarantine(&lock, &damage.what)? => aside.insert(&damage.key),
                Some(_) => continue,
                None => busy.insert(&damage.key),
            };
        }
        Ok(Repaired { aside: aside.len(), busy: busy.len() })
    }

    /// Every key that has a manifest, sorted.
    pub fn keys(&self) -> Result<Vec<Digest>, StoreError> {
        Ok(self.shelved("manifests", ".json")?.into_iter().map(|(key, _)| key).collect())
    }

    /// What lies on the shelves of a folder under a digest and `ending`, sorted. What bears another name is not the store's: what
    /// a kill left half written, what a file manager or a person has put there.
    pub(super) fn shelved(&self, folder: &str, ending: &str) -> Result<Vec<(Digest, PathBuf)>, StoreError> {
        let folder = self.folder(folder);
        let mut found = Vec::new();
        for shelf in self.disk.list(&folder).at("list", &folder)?.into_iter().filter(|shelf| shelf.is_folder) {
            let shelf = folder.join(&shelf.name);
            for entry in self.disk.list(&shelf).at("list", &shelf)? {
                let digest = entry.name.to_str().and_then(|name| name.strip_suffix(ending));
                let digest = digest.map(|digest| Digest(digest.to_owned())).filter(Digest::is_whole);
                found.extend(digest.map(|digest| (digest, shelf.join(&entry.name))));
            }
        }
        found.sort();
        Ok(found)
    }
}

#[cfg(test)]
mod tests {
    use super::super::GcPolicy;
    use super::super::fixture::{Sandbox, key};
    use super::*;

    /// The first time that an object is read, every result is collected, or all but the one that is asked for.
    #[test]
    fn what_is_collected_meanwhile_is_neither_missing_nor_damaged() {
        for asked in [None, Some([key(1)])] {
            let (sandbox, disk) = Sandbox::faulty();
            for number in 1..=4 {
                sandbox.publish(number, &[("data", &number.to_string())]);
            }
            sandbox.publish(5, &[("data", "1")]);
            sandbox.store.end_lease().unwrap();
            let (other, mut done) = (Store::open(sandbox.store.root()).unwrap(), false);
            let objects = sandbox.store.root().join("objects");
            disk.meanwhile(move |operation, path| {
                if operation == "open" && path.starts_with(&objects) && !std::mem::replace(&mut done, true) {
                    let policy = GcPolicy { max_size: Some(0), ..GcPolicy::default() };
                    let plan = other.plan_gc(&policy, &|_, _| ()).unwrap();
                    assert_eq!(other.collect_garbage(&plan, &mut |_, _| (), &mut || ()).unwrap().objects, 4);
                }
            });
            let report = sandbox.store.verify(asked.as_ref().map(|keys| &keys[..]), &mut |_, _| ()).unwrap();
            disk.undisturbed();
            assert!(report.is_sound(), "{report:?}");
            let gone = sandbox.store.verify(Some(&[key(1)]), &mut |_, _| ()).unwrap();
            assert!(gone.is_sound() && gone.manifests == 0, "{gone:?}");
        }
    }

    #[test]
    fn what_lies_among_the_shelves_and_is_not_the_stores_is_left_alone() {
        let sandbox = Sandbox::new();
        let store = &sandbox.store;
        sandbox.publish(1, &[("data", "one")]);
        store.end_lease().unwrap();
        for folder in ["objects", "manifests"] {
            for path in ["notes.txt", ".DS_Store", "00/notes.txt", "00/notes.json"] {
                std::fs::write(store.root().join(folder).join(path), "x").unwrap();
            }
            std::fs::create_dir_all(store.root().join(folder).join("00/mine/deep")).unwrap();
        }
        let report = store.verify(None, &mut |_, _| ()).unwrap();
        assert!(report.is_sound() && report.manifests == 1 && report.orphans.is_empty(), "{report:?}");
        let plan = store.plan_gc(&GcPolicy { max_size: Some(0), ..GcPolicy::default() }, &|_, _| ()).unwrap();
        assert_eq!((plan.results.len(), plan.garbage.len(), plan.unreadable), (1, 0, 0));
        assert_eq!(store.collect_garbage(&plan, &mut |_, _| (), &mut || ()).unwrap().objects, 1);
        assert!(store.root().join("objects/00/mine/deep").exists());
    }

    #[test]
    fn what_has_changed_or_gone_since_the_interruption_is_looked_at_again() {
        let sandbox = Sandbox::new();
        let objects = ["one", "two", "three", "four"].map(|content| {
            let number = content.len() * 10 + usize::from(content.as_bytes()[0]);
            let manifest = sandbox.publish(number, &[("data", content)]);
            manifest.outputs[0].digest.clone()
        });
        let now = Timestamp::now();
        let stats = |object: &Digest| digest::stats_of_folder(&*sandbox.store.disk, &sandbox.store.object(object));
        let sound = |object: &Digest| (object.clone(), Sound { when: now, stats: stats(object).unwrap() });
        let path = sandbox.store.folder("cache").join("verify.json");
        // All but the last, as if it had been interrupted there.
        sandbox.store.save_hashed(&path, &objects[..3].iter().map(sound).collect()).unwrap();
        let changed = sandbox.opened(&objects[0]).join("data");
        std::fs::remove_file(&changed).unwrap();
        std::fs::write(&changed, "eno").unwrap();
        std::fs::rename(sandbox.opened(&objects[1]), sandbox.place.path().join("elsewhere")).unwrap();
        let verification = Verification { goes_on: true, ..Verification::default() };
        let report = sandbox.store.verify_in_pieces(&verification, &mut |_, _| ()).unwrap();
        assert_eq!((report.resumed, report.objects), (1, 3));
        assert_eq!((report.damaged.len(), report.missing.len()), (1, 1));
        assert!(!path.exists());
    }
}
