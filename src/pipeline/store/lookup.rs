//! Reading results back: a hit, a miss, or damage; and putting damaged things aside so that the next run rebuilds them.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::digest::{digest_folder, is_executable, stat_of};
use super::error::At as _;
use super::{Digest, Manifest, Store, StoreError, StoredFile, StoredOutput, create_folder, sealed, write_atomically};

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

    /// The manifest of `key`: `None` where there is none, `Some(Err)` where it is damaged. Objects are not looked at.
    pub(super) fn manifest(&self, key: &Digest) -> Result<Option<Result<Manifest, String>>, StoreError> {
        let path = self.manifest_path(key);
        let bytes = match std::fs::read(&path) {
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
            Ok(manifest) if manifest.key == *key => Ok(Some(Ok(manifest))),
            Ok(_) => damaged("is that of another key"),
            Err(error) => damaged(&format!("cannot be understood: {error}")),
        }
    }

    /// What is wrong with one stored file, if anything.
    fn damage_of(&self, path: &Path, file: &StoredFile) -> Result<Option<String>, StoreError> {
        let damage = |problem: &str| Ok(Some(format!("`{}` {problem}", path.display())));
        let metadata = match std::fs::symlink_metadata(path) {
            Ok(metadata) => metadata,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return damage("is missing"),
            Err(error) => {
                let error = StoreError::Io { action: "read", path: path.to_owned(), cause: error };
                return if error.means_damage() { Ok(Some(error.to_string())) } else { Err(error) };
            }
        };
        if stat_of(&metadata) == file.stat && is_executable(&metadata) == file.executable {
            return Ok(None);
        }
        if !metadata.is_file() {
            return damage("is no longer a file");
        }
        if metadata.len() != file.size {
            return damage(&format!("has {} bytes instead of {}", metadata.len(), file.size));
        }
        if is_executable(&metadata) != file.executable {
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
        match digest_folder(&object) {
            Ok((found, _)) if found == *digest => Ok(Ok(())),
            Ok(_) => Ok(Err(format!("`{}` does not have the content that was stored", object.display()))),
            Err(error) if error.means_damage() => Ok(Err(error.to_string())),
            Err(error) => Err(error),
        }
    }

    /// Puts aside what is damaged of the result of `key`, so that the next run rebuilds it. `what` is kept beside it.
    ///
    /// Everything is checked once more: what another process has rebuilt meanwhile stays. The manifest goes first, so
    /// that a kill in between leaves a miss.
    pub fn quarantine(&self, key: &Digest, what: &str) -> Result<(), StoreError> {
        let mut bad_objects = Vec::new();
        match self.manifest(key)? {
            None => return Ok(()),
            Some(Err(_)) => {}
            Some(Ok(manifest)) => {
                for output in &manifest.outputs {
                    if self.verify_object(output)?.is_err() {
                        bad_objects.push(output.digest.clone());
                    }
                }
                if bad_objects.is_empty() {
                    return Ok(());
                }
            }
        }
        let aside = self.put_aside(key, what)?;
        move_if_there(&self.manifest_path(key), &aside.join("manifest.json"))?;
        bad_objects.dedup();
        for digest in bad_objects {
            move_if_there(&self.object(&digest), &aside.join(&digest.0))?;
        }
        Ok(())
    }

    /// Puts a damaged object aside, whichever results it belongs to. It does nothing to one that is whole.
    pub fn quarantine_object(&self, digest: &Digest, what: &str) -> Result<(), StoreError> {
        let object = self.object(digest);
        if std::fs::symlink_metadata(&object).is_err() || self.verify_digest(digest)?.is_ok() {
            return Ok(());
        }
        move_if_there(&object, &self.put_aside(digest, what)?.join(&digest.0))
    }

    /// A new folder of `quarantine/` with a note of the reason.
    fn put_aside(&self, digest: &Digest, what: &str) -> Result<PathBuf, StoreError> {
        let quarantine = self.folder("quarantine");
        create_folder(&quarantine)?;
        let when = jiff::Timestamp::now().strftime("%Y-%m-%dT%H-%M-%SZ").to_string();
        let prefix = format!("{when}-{}-", digest.short());
        let aside = tempfile::Builder::new().prefix(&prefix).tempdir_in(&quarantine).at("write", &quarantine)?.keep();
        write_atomically(&aside.join("why.txt"), format!("{what}\n").as_bytes(), false)?;
        Ok(aside)
    }
}

/// Renames a file or a folder; one that is not there is no error, because another process may have been quicker.
fn move_if_there(from: &Path, to: &Path) -> Result<(), StoreError> {
    use std::os::unix::fs::PermissionsExt as _;
    let Ok(metadata) = std::fs::symlink_metadata(from) else { return Ok(()) };
    if metadata.is_dir() {
        // A folder that may not be written cannot change its parent.
        let _ = std::fs::set_permissions(from, std::fs::Permissions::from_mode(0o755));
    }
    match std::fs::rename(from, to) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(()),
        other => other.at("put aside", from),
    }
}
