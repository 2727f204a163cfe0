//! Reading every byte of the store again, and saying what is damaged, missing or left over.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use super::error::At as _;
use super::{Digest, Manifest, Store, StoreError};

/// Something of a result that is not what was stored.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Damage {
    /// The key whose result it is part of.
    pub key: Digest,
    /// What is wrong, naming the file.
    pub what: String,
}

/// What a verification found.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct VerifyReport {
    /// Manifests that were read.
    pub manifests: usize,
    /// Objects that were hashed.
    pub objects: usize,
    /// Bytes that were hashed.
    pub bytes: u64,
    /// Results whose manifest or content is not what was stored.
    pub damaged: Vec<Damage>,
    /// Results of which an object is not there, and asked-for keys without a result.
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

impl Store {
    /// Hashes every object of the results of `keys`, or of all; `progress` is told bytes done and bytes in all.
    ///
    /// Nothing is changed; see [`Store::repair`].
    pub fn verify(
        &self,
        keys: Option<&[Digest]>,
        progress: &mut dyn FnMut(u64, u64),
    ) -> Result<VerifyReport, StoreError> {
        let mut report = VerifyReport::default();
        let everything = keys.is_none();
        let all;
        let keys = if let Some(keys) = keys {
            keys
        } else {
            all = self.keys()?;
            &all
        };
        let mut manifests: Vec<Manifest> = Vec::new();
        for key in keys {
            match self.manifest(key)? {
                Some(Ok(manifest)) => manifests.push(manifest),
                Some(Err(what)) => report.damaged.push(Damage { key: key.clone(), what }),
                None => {
                    report.missing.push(Damage { key: key.clone(), what: format!("there is no result of `{key}`") });
                }
            }
            report.manifests += 1;
        }
        // Results share objects: each is read once.
        let mut sizes: BTreeMap<&Digest, u64> = BTreeMap::new();
        for output in manifests.iter().flat_map(|manifest| &manifest.outputs) {
            sizes.insert(&output.digest, output.files.iter().map(|file| file.size).sum());
        }
        let total = sizes.values().sum();
        let mut bad: BTreeMap<&Digest, String> = BTreeMap::new();
        let mut done = 0;
        progress(done, total);
        for (digest, size) in &sizes {
            if let Err(what) = self.verify_digest(digest)? {
                bad.insert(*digest, what);
            }
            done += size;
            progress(done, total);
        }
        report.objects = sizes.len();
        report.bytes = done;
        for manifest in &manifests {
            for output in &manifest.outputs {
                let Some(what) = bad.get(&output.digest) else { continue };
                let there = self.disk.is_folder(&self.object(&output.digest));
                let list = if there { &mut report.damaged } else { &mut report.missing };
                list.push(Damage { key: manifest.key.clone(), what: what.clone() });
            }
        }
        if everything {
            let objects = self.shelved(&self.folder("objects"))?;
            report.orphans = objects.into_iter().filter(|path| !sizes.contains_key(&Digest(file_name(path)))).collect();
        }
        Ok(report)
    }

    /// Puts aside the damaged results of a report, so that the next run rebuilds them; gives how many. Orphans stay: one may belong
    /// to a result that another process is about to publish.
    pub fn repair(&self, report: &VerifyReport) -> Result<usize, StoreError> {
        let mut keys = BTreeSet::new();
        for damage in report.damaged.iter().chain(&report.missing) {
            // Whoever works on the key makes its result anew.
            if let Some(lock) = self.try_lock(&damage.key)? {
                self.quarantine(&lock, &damage.what)?;
            }
            keys.insert(&damage.key);
        }
        Ok(keys.len())
    }

    /// Every key that has a manifest, sorted.
    pub fn keys(&self) -> Result<Vec<Digest>, StoreError> {
        let manifests = self.shelved(&self.folder("manifests"))?;
        let name = |path: &PathBuf| file_name(path).strip_suffix(".json").map(|name| Digest(name.to_owned()));
        Ok(manifests.iter().filter_map(name).collect())
    }

    /// The entries of the subfolders of `folder`, sorted, without what a kill left half written.
    pub(super) fn shelved(&self, folder: &Path) -> Result<Vec<PathBuf>, StoreError> {
        let mut found = Vec::new();
        for shelf in self.disk.list(folder).at("list", folder)? {
            let shelf = folder.join(&shelf.name);
            let entries = self.disk.list(&shelf).at("list", &shelf)?;
            let shown = entries.iter().filter(|entry| !entry.name.as_encoded_bytes().starts_with(b"."));
            found.extend(shown.map(|entry| shelf.join(&entry.name)));
        }
        found.sort();
        Ok(found)
    }
}

fn file_name(path: &Path) -> String {
    path.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default()
}
