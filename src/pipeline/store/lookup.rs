//! Reading results back: a hit, a miss, or damage; and putting damaged things aside so that the next run rebuilds them.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::digest::digest_folder_on;
use super::disk::{Disk, Sort};
use super::error::At as _;
use super::{Digest, KeyLock, Manifest, Store, StoreError, StoredFile, StoredOutput, sealed};

/// What the store knows of a key.
#[derive(Clone, Debug)]
pub enum Lookup {
    /// The result is there and whole.
    Hit(Arc<Manifest>),
    /// There is no result.
    Miss,
    /// There is a result, and it is not what was stored.
    Damaged {
        /// What is wrong, naming the file.
        what: String,
    },
}

impl Store {
    /// What the store has for `key`. Files whose stat is not as recorded are hashed; nothing is written.
    pub fn lookup(&self, key: &Digest) -> Result<Lookup, StoreError> {
        let manifest = match self.manifest(key)? {
            None => return Ok(Lookup::Miss),
            Some(Err(what)) => return Ok(Lookup::Damaged { what }),
            Some(Ok(manifest)) => manifest,
        };
        for output in &manifest.outputs {
            let object = self.object(&output.digest);
            for file in &output.files {
                if let Some(what) = self.damage_of(&object.join(&file.path), file)? {
                    return Ok(Lookup::Damaged { what });
                }
            }
        }
        Ok(Lookup::Hit(Arc::new(manifest)))
    }

    /// What stands in the manifest of `key`, whatever became of its objects; `None` where there is none that can be read.
    pub fn manifest_of(&self, key: &Digest) -> Result<Option<Arc<Manifest>>, StoreError> {
        Ok(self.manifest(key)?.and_then(Result::ok).map(Arc::new))
    }

    /// The manifest of `key`: `None` where there is none, `Some(Err)` where it is damaged. Objects are not looked at. One that
    /// is whole and that this program does not understand is an error.
    pub(super) fn manifest(&self, key: &Digest) -> Result<Option<Result<Manifest, String>>, StoreError> {
        let path = self.manifest_path(key);
        let bytes =
            match self.disk.read(&path) {
                Ok(bytes) => bytes,
                Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
                Err(error) => {
                    let error = Err(error).at("read", &path);
                    return error.or_else(|error: StoreError| {
                        if error.means_damage() { Ok(Some(Err(error.to_string()))) } else { Err(error) }
                    });
                }
            };
        let damaged = |problem: &str| Ok(Some(Err(format!("the manifest `{}` {problem}", path.display()))));
        let Some(body) = sealed::open(&bytes) else { return damaged("does not have the digest that it carries") };
        match serde_json::from_slice::<Manifest>(&body) {
            Ok(manifest) if manifest.key != *key => damaged("is that of another key"),
            Ok(manifest) if !manifest.key_is_right() => damaged("has a key that is not the hash of its parts"),
            Ok(manifest) => Ok(Some(Ok(manifest))),
            // It is as it was written, so another program understands it.
            Err(error) => {
                let problem = format!("was written by another version of this program: {error}; use that version");
                Err(StoreError::unfit(&path, problem))
            }
        }
    }

    /// What is wrong with one stored file, if anything.
    fn damage_of(&self, path: &Path, file: &StoredFile) -> Result<Option<String>, StoreError> {
        let damage = |problem: &str| Ok(Some(format!("`{}` {problem}", path.display())));
        let stat = match self.disk.stat(path) {
            Ok(stat) => stat,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return damage("is missing"),
            Err(error) => {
                let error = StoreError::Io { action: "read", path: path.to_owned(), cause: error };
                return if error.means_damage() { Ok(Some(error.to_string())) } else { Err(error) };
            }
        };
        if stat.identity == file.stat && stat.is_executable() == file.executable {
            return Ok(None);
        }
        if stat.sort != Sort::File {
            return damage("is no longer a file");
        }
        if stat.size() != file.size {
            return damage(&format!("has {} bytes instead of {}", stat.size(), file.size));
        }
        if stat.is_executable() != file.executable {
            return damage("has another executable bit");
        }
        match self.cache.hash_file(path) {
            Ok(hashed) if hashed.digest == file.digest => Ok(None),
            Ok(_) => damage("does not have the content that was stored"),
            Err(error) if error.means_damage() => Ok(Some(error.to_string())),
            Err(error) => Err(error),
        }
    }

    /// Hashes every byte of an output's object; the inner error says what is damaged.
    pub fn verify_object(&self, output: &StoredOutput) -> Result<Result<(), String>, StoreError> {
        self.verify_digest(&output.digest)
    }

    /// Hashes every byte of an object; the inner error says what is damaged.
    pub fn verify_digest(&self, digest: &Digest) -> Result<Result<(), String>, StoreError> {
        let object = self.object(digest);
        match digest_folder_on(&*self.disk, &object) {
            Ok((found, _)) if found == *digest => Ok(Ok(())),
            Ok(_) => Ok(Err(format!("`{}` does not have the content that was stored", object.display()))),
            Err(error) if error.means_damage() => Ok(Err(error.to_string())),
            Err(error) => Err(error),
        }
    }

    /// Puts aside what is damaged of the result of the lock's key, so that the next run rebuilds it. `what` is kept beside it.
    /// Gives whether anything was.
    ///
    /// It needs the lock, because between a look and a rename another process could have rebuilt the result, and what is
    /// whole would be lost. The manifest goes first, so that a kill in between leaves a miss.
    pub fn quarantine(&self, lock: &KeyLock, what: &str) -> Result<bool, StoreError> {
        let key = lock.key();
        let mut bad_objects = Vec::new();
        match self.manifest(key)? {
            None => return Ok(false),
            Some(Err(_)) => {}
            Some(Ok(manifest)) => {
                for output in &manifest.outputs {
                    if self.verify_object(output)?.is_err() {
                        bad_objects.push(output.digest.clone());
                    }
                }
                if bad_objects.is_empty() {
                    return Ok(false);
                }
            }
        }
        let aside = self.put_aside(key, what)?;
        move_if_there(&*self.disk, &self.manifest_path(key), &aside.join("manifest.json"))?;
        for digest in bad_objects {
            self.move_bad_object(&digest, &aside)?;
        }
        Ok(true)
    }

    /// Puts a damaged object aside, whichever results it belongs to. It does nothing to one that is whole.
    pub fn quarantine_object(&self, digest: &Digest, what: &str) -> Result<(), StoreError> {
        if !self.disk.is_there(&self.object(digest)) || self.verify_digest(digest)?.is_ok() {
            return Ok(());
        }
        self.move_bad_object(digest, &self.put_aside(digest, what)?)
    }

    /// Moves an object that is still damaged once nobody else can put it aside: only where nothing lies can a whole one appear.
    fn move_bad_object(&self, digest: &Digest, aside: &Path) -> Result<(), StoreError> {
        let _lock = self.lock_object(digest)?;
        let object = self.object(digest);
        if !self.disk.is_there(&object) || self.verify_digest(digest)?.is_ok() {
            return Ok(());
        }
        move_if_there(&*self.disk, &object, &aside.join(&digest.0))
    }

    /// A new folder of `quarantine/` with a note of the reason.
    fn put_aside(&self, digest: &Digest, what: &str) -> Result<PathBuf, StoreError> {
        let quarantine = self.folder("quarantine");
        self.disk.ensure_folder(&quarantine, true)?;
        let when = jiff::Timestamp::now().strftime("%Y-%m-%dT%H-%M-%SZ").to_string();
        let prefix = format!("{when}-{}-", digest.short());
        let aside = self.disk.beside(&quarantine, &prefix, &|path| self.disk.create_folder(path));
        let aside = aside.at("write", &quarantine)?;
        self.disk.write_atomically(&aside.join("why.txt"), format!("{what}\n").as_bytes(), false)?;
        Ok(aside)
    }
}

/// Renames a file or a folder; one that is not there is no error, because another process may have been quicker.
fn move_if_there(disk: &dyn Disk, from: &Path, to: &Path) -> Result<(), StoreError> {
    let stat = match disk.stat(from) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(()),
        stat => stat.at("put aside", from)?,
    };
    if stat.sort == Sort::Folder {
        // A folder that may not be written cannot change its parent.
        let _ = disk.set_mode(from, 0o755);
    }
    match disk.rename(from, to) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(()),
        other => other.at("put aside", from),
    }
}

#[cfg(test)]
mod tests {
    use super::super::faults::Fault;
    use super::super::fixture::{Sandbox, key};
    use super::super::{Found, Repaired};
    use super::*;

    /// Changes one byte of a stored file and sets its mtime back.
    fn flip_a_byte(path: &Path) {
        use std::os::unix::fs::PermissionsExt as _;
        let (modified, mut bytes) =
            (std::fs::metadata(path).unwrap().modified().unwrap(), std::fs::read(path).unwrap());
        bytes[0] ^= 1;
        std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o644)).unwrap();
        std::fs::write(path, bytes).unwrap();
        std::fs::File::options().write(true).open(path).unwrap().set_modified(modified).unwrap();
        std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o444)).unwrap();
    }

    fn damage(sandbox: &Sandbox, key: &Digest) -> String {
        match sandbox.store.lookup(key).unwrap() {
            Lookup::Damaged { what } => what,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn what_is_published_is_found_with_its_exact_bytes() {
        let sandbox = Sandbox::new();
        assert!(matches!(sandbox.store.lookup(&key(1)).unwrap(), Lookup::Miss));
        let published = sandbox.publish(1, &[("a/b.txt", "one"), ("run", "two")]);
        let Lookup::Hit(found) = sandbox.store.lookup(&key(1)).unwrap() else { panic!("no hit") };
        assert_eq!(serde_json::to_value(&*found).unwrap(), serde_json::to_value(&published).unwrap());
        let object = sandbox.store.object(&found.outputs[0].digest);
        assert_eq!(std::fs::read_to_string(object.join("a/b.txt")).unwrap(), "one");
        assert!(sandbox.store.verify_object(&found.outputs[0]).unwrap().is_ok());
    }

    #[test]
    fn a_flipped_byte_is_found_put_aside_and_rebuilt() {
        let sandbox = Sandbox::new();
        let manifest = sandbox.publish(1, &[("data", "one")]);
        let object = sandbox.store.object(&manifest.outputs[0].digest);
        flip_a_byte(&object.join("data"));
        let what = damage(&sandbox, &key(1));
        assert!(what.contains("/data` does not have the content"), "{what}");
        assert!(sandbox.store.verify_object(&manifest.outputs[0]).unwrap().is_err());
        sandbox.quarantine(1, &what);
        assert!(matches!(sandbox.store.lookup(&key(1)).unwrap(), Lookup::Miss));
        assert!(!object.exists());
        let aside = std::fs::read_dir(sandbox.store.root().join("quarantine")).unwrap().next().unwrap().unwrap().path();
        assert_eq!(std::fs::read_to_string(aside.join("why.txt")).unwrap().trim(), what);
        assert!(aside.join(&manifest.outputs[0].digest.0).join("data").exists());
        sandbox.publish(1, &[("data", "one")]);
        assert!(matches!(sandbox.store.lookup(&key(1)).unwrap(), Lookup::Hit(_)));
    }

    #[test]
    fn every_sort_of_damage_has_its_words() {
        use std::os::unix::fs::PermissionsExt as _;
        type Harm = fn(&Store, &Path);
        let harms: [(&str, Harm); 5] = [
            ("is missing", |_, file| std::fs::remove_file(file).unwrap()),
            ("has 1 bytes instead of 3", |_, file| {
                std::fs::remove_file(file).unwrap();
                std::fs::write(file, "x").unwrap();
            }),
            ("another executable bit", |_, file| {
                std::fs::set_permissions(file, std::fs::Permissions::from_mode(0o555)).unwrap();
            }),
            ("is no longer a file", |_, file| {
                std::fs::remove_file(file).unwrap();
                std::os::unix::fs::symlink("/etc/hostname", file).unwrap();
            }),
            ("does not have the digest that it carries", |store, _| {
                let path = store.manifest_path(&key(1));
                let text = std::fs::read_to_string(&path).unwrap().replace("\"attempts\":1", "\"attempts\":2");
                std::fs::write(&path, text).unwrap();
            }),
        ];
        for (words, harm) in harms {
            let sandbox = Sandbox::new();
            let manifest = sandbox.publish(1, &[("data", "one")]);
            let object = sandbox.store.object(&manifest.outputs[0].digest);
            std::fs::set_permissions(&object, std::fs::Permissions::from_mode(0o755)).unwrap();
            harm(&sandbox.store, &object.join("data"));
            let what = damage(&sandbox, &key(1));
            assert!(what.contains(words), "{what}");
            sandbox.quarantine(1, &what);
            sandbox.publish(1, &[("data", "one")]);
            assert!(matches!(sandbox.store.lookup(&key(1)).unwrap(), Lookup::Hit(_)), "{words}");
        }
    }

    #[test]
    fn a_touched_or_copied_object_is_hashed_and_still_a_hit() {
        let sandbox = Sandbox::new();
        let manifest = sandbox.publish(1, &[("data", "one")]);
        let file = sandbox.store.object(&manifest.outputs[0].digest).join("data");
        let later = std::time::SystemTime::now() + std::time::Duration::from_secs(5);
        std::fs::File::open(&file).unwrap().set_modified(later).unwrap();
        assert!(matches!(sandbox.store.lookup(&key(1)).unwrap(), Lookup::Hit(_)));
    }

    #[test]
    fn what_is_whole_is_never_put_aside() {
        let sandbox = Sandbox::new();
        let manifest = sandbox.publish(1, &[("data", "one")]);
        sandbox.quarantine(1, "a false alarm");
        sandbox.quarantine(2, "not there at all");
        sandbox.store.quarantine_object(&manifest.outputs[0].digest, "a false alarm").unwrap();
        assert!(matches!(sandbox.store.lookup(&key(1)).unwrap(), Lookup::Hit(_)));
        assert_eq!(std::fs::read_dir(sandbox.store.root().join("quarantine")).unwrap().count(), 0);
    }

    #[test]
    fn a_whole_manifest_of_another_version_is_no_damage() {
        let sandbox = Sandbox::new();
        sandbox.publish(1, &[("data", "one")]);
        let path = sandbox.store.manifest_path(&key(1));
        std::fs::write(&path, sealed::seal(br#"{"key":{"of":"tomorrow"}}"#)).unwrap();
        let error = sandbox.store.lookup(&key(1)).unwrap_err().to_string();
        assert!(error.contains("another version of this program"), "{error}");
        assert!(sandbox.store.quarantine(&sandbox.store.lock(&key(1)).unwrap(), "it is new").is_err());
        assert!(path.exists());
    }

    #[test]
    fn verification_reads_everything_and_repair_makes_misses() {
        let sandbox = Sandbox::new();
        sandbox.publish(1, &[("data", "one")]);
        sandbox.publish(2, &[("data", "one")]);
        sandbox.publish(3, &[("data", "three")]);
        let four = sandbox.publish(4, &[("data", "four")]);
        let mut last = (0, 0);
        let report = sandbox.store.verify(None, &mut |done, total| last = (done, total)).unwrap();
        assert_eq!((report.manifests, report.objects, report.bytes, last), (4, 3, 12, (12, 12)));
        assert!(report.is_sound() && report.orphans.is_empty());
        let object = |content: &str| {
            let (digest, _) = sandbox.digest(&[("data", content)]);
            sandbox.opened(&digest)
        };
        flip_a_byte(&object("one").join("data"));
        std::fs::rename(object("three"), sandbox.store.root().join("elsewhere")).unwrap();
        std::fs::remove_file(sandbox.store.manifest_path(&key(4))).unwrap();
        let report = sandbox.store.verify(None, &mut |_, _| ()).unwrap();
        let keys = |damages: &[super::super::Damage]| damages.iter().map(|one| one.key.clone()).collect::<Vec<_>>();
        assert_eq!((keys(&report.damaged), keys(&report.missing)), (vec![key(1), key(2)], vec![key(3)]));
        assert_eq!(report.orphans, [sandbox.store.object(&four.outputs[0].digest)]);
        assert_eq!(sandbox.store.repair(&report).unwrap(), Repaired { aside: 3, busy: 0 });
        for number in 1..=4 {
            assert!(matches!(sandbox.store.lookup(&key(number)).unwrap(), Lookup::Miss), "{number}");
        }
        let asked = sandbox.store.verify(Some(&[key(1)]), &mut |_, _| ()).unwrap();
        assert!(asked.is_sound() && asked.manifests == 0, "what is put aside is no result any more");
    }

    #[test]
    fn a_manifest_under_the_name_of_another_key_is_no_hit() {
        let sandbox = Sandbox::new();
        for number in [1, 2] {
            sandbox.publish(number, &[("data", &number.to_string())]);
        }
        for (number, move_it) in [(2, false), (3, true)] {
            let (from, to) = (sandbox.store.manifest_path(&key(1)), sandbox.store.manifest_path(&key(number)));
            if move_it {
                std::fs::rename(from, to).unwrap();
            } else {
                std::fs::copy(from, to).map(drop).unwrap();
            }
            assert!(damage(&sandbox, &key(number)).contains("is that of another key"), "{number}");
            assert!(matches!(sandbox.store.find(&key(number)).unwrap(), Found::Damaged { .. }), "{number}");
        }
    }

    /// A damaged object is put aside, and between any two operations of that another process does so and stores it anew.
    #[test]
    fn what_another_process_has_rebuilt_meanwhile_is_never_put_aside() {
        use std::sync::atomic::{AtomicBool, Ordering};
        for (number, of_a_result) in (0..).flat_map(|number| [(number, false), (number, true)]) {
            let (sandbox, disk) = Sandbox::faulty();
            let digest = sandbox.publish(1, &[("data", "one")]).outputs[0].digest.clone();
            sandbox.publish(2, &[("data", "one")]);
            flip_a_byte(&sandbox.opened(&digest).join("data"));
            let other = Sandbox::beside(&sandbox);
            let (mut taken, object, rebuilt) = (0, digest.clone(), Arc::new(AtomicBool::new(false)));
            let rebuilds = Arc::clone(&rebuilt);
            disk.meanwhile(move |_, _| {
                // Where it would wait it comes later.
                let is_free = other.store.lock_file_is_free(&format!("object-{object}"));
                if taken >= number && is_free && other.store.verify_digest(&object).unwrap().is_err() {
                    other.quarantine(2, "it is damaged");
                    other.publish(2, &[("data", "one")]);
                    rebuilds.store(true, Ordering::Relaxed);
                }
                taken += 1;
            });
            disk.fail_at(usize::MAX, Fault::Killed);
            let lock = sandbox.store.lock(&key(1)).unwrap();
            if of_a_result {
                sandbox.store.quarantine(&lock, "it is damaged").unwrap();
            } else {
                sandbox.store.quarantine_object(&digest, "it is damaged").unwrap();
            }
            disk.undisturbed();
            let rebuilt = rebuilt.load(Ordering::Relaxed);
            let is_hit = matches!(sandbox.store.lookup(&key(2)).unwrap(), Lookup::Hit(_));
            let is_there = sandbox.store.object(&digest).exists();
            assert_eq!((is_hit, is_there), (rebuilt, rebuilt), "at {number}");
            if disk.heal() <= number && of_a_result {
                assert!(number > 20 && !rebuilt, "{number} operations");
                break;
            }
        }
    }

    #[test]
    fn a_result_whose_key_is_not_the_hash_of_its_parts_is_put_aside() {
        let sandbox = Sandbox::new();
        sandbox.publish(1, &[("data", "one")]);
        let path = sandbox.store.manifest_path(&key(1));
        let mut value = serde_json::to_value(&*sandbox.store.manifest_of(&key(1)).unwrap().unwrap()).unwrap();
        value["parts"]["version"] = 2.into();
        std::fs::write(&path, sealed::seal(&serde_json::to_vec(&value).unwrap())).unwrap();
        let report = sandbox.store.verify(None, &mut |_, _| ()).unwrap();
        assert!(damage(&sandbox, &key(1)).contains("not the hash of its parts"));
        assert_eq!(report.damaged.len(), 1);
        let busy = sandbox.store.lock(&report.damaged[0].key).unwrap();
        assert_eq!(sandbox.store.repair(&report).unwrap(), Repaired { aside: 0, busy: 1 });
        drop(busy);
        assert_eq!(sandbox.store.repair(&report).unwrap(), Repaired { aside: 1, busy: 0 });
        assert!(matches!(sandbox.store.lookup(&key(1)).unwrap(), Lookup::Miss));
    }
}
