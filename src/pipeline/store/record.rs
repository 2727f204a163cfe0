//! Views by people's names: which key an experiment's stage last had, and where TensorBoard finds its curves. Both can be
//! rebuilt from plans and manifests, so a damaged one counts as absent.

use std::collections::BTreeMap;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::disk::{Disk, Sort};
use super::error::At as _;
use super::{Digest, Store, StoreError};
use crate::pipeline::plan::NodeName;

/// What an experiment's stage was in its last run.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RunRecord {
    /// Its recipe.
    pub recipe: Digest,
    /// Its key.
    pub key: Digest,
    /// Its kind.
    pub kind: String,
    /// The experiment's file, absolute.
    pub file: PathBuf,
    /// The keys that it had before, newest first, without those it came back to. Whoever records a run leaves it empty.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub earlier: Vec<Digest>,
}

/// Earlier keys that are remembered.
const EARLIER: usize = 100;

/// A record as it lies on disk, with the name that its path only hints at.
#[derive(Serialize, Deserialize)]
struct OnDisk {
    name: NodeName,
    #[serde(flatten)]
    record: RunRecord,
}

impl OnDisk {
    fn bytes(&self) -> Vec<u8> {
        let mut bytes = serde_json::to_vec_pretty(self).expect("a record is plain data");
        bytes.push(b'\n');
        bytes
    }
}

impl Store {
    /// Keeps what a stage was in this run, and the keys that it had before.
    pub fn record(&self, name: &NodeName, record: &RunRecord) -> Result<(), StoreError> {
        let path = self.record_path(&name.experiment, &name.trial, &name.stage);
        let mut on_disk = OnDisk { name: name.clone(), record: record.clone() };
        // In most runs most records stand already, and reading is cheaper than writing.
        if let Ok(bytes) = self.disk.read(&path) {
            if bytes == on_disk.bytes() {
                return Ok(());
            }
            if let Ok(old) = serde_json::from_slice::<OnDisk>(&bytes) {
                let before = (old.record.key != record.key).then_some(old.record.key);
                let earlier = before.into_iter().chain(old.record.earlier).filter(|key| *key != record.key);
                on_disk.record.earlier = earlier.take(EARLIER).collect();
                if bytes == on_disk.bytes() {
                    return Ok(());
                }
            }
        }
        let folder = path.parent().expect("records lie in a folder");
        self.disk.ensure_folder(folder, false)?;
        self.disk.write_atomically(&path, &on_disk.bytes(), false)
    }

    /// Every recorded stage of every experiment.
    pub(super) fn every_record(&self) -> Result<Vec<(NodeName, RunRecord)>, StoreError> {
        let mut records = Vec::new();
        for experiment in entries(&*self.disk, &self.folder("runs"))? {
            for trial in entries(&*self.disk, &experiment)? {
                for stage in entries(&*self.disk, &trial)? {
                    records.extend(read(&*self.disk, &stage)?.map(|on_disk| (on_disk.name, on_disk.record)));
                }
            }
        }
        Ok(records)
    }

    /// What a stage was in the last run that had it.
    pub fn recorded(&self, experiment: &str, trial: &str, stage: &str) -> Result<Option<RunRecord>, StoreError> {
        Ok(read(&*self.disk, &self.record_path(experiment, trial, stage))?.map(|on_disk| on_disk.record))
    }

    /// Every recorded stage of an experiment, by trial and stage.
    pub fn recorded_trials(
        &self,
        experiment: &str,
    ) -> Result<BTreeMap<String, BTreeMap<String, RunRecord>>, StoreError> {
        let mut trials: BTreeMap<String, BTreeMap<String, RunRecord>> = BTreeMap::new();
        for trial in entries(&*self.disk, &self.folder("runs").join(segment(experiment)))? {
            for stage in entries(&*self.disk, &trial)? {
                if let Some(OnDisk { name, record }) = read(&*self.disk, &stage)? {
                    trials.entry(name.trial).or_default().insert(name.stage, record);
                }
            }
        }
        Ok(trials)
    }

    /// The names of every recorded experiment.
    pub fn recorded_experiments(&self) -> Result<Vec<String>, StoreError> {
        let mut names = std::collections::BTreeSet::new();
        for experiment in entries(&*self.disk, &self.folder("runs"))? {
            'one: for trial in entries(&*self.disk, &experiment)? {
                for stage in entries(&*self.disk, &trial)? {
                    if let Some(on_disk) = read(&*self.disk, &stage)? {
                        names.insert(on_disk.name.experiment);
                        break 'one;
                    }
                }
            }
        }
        Ok(names.into_iter().collect())
    }

    /// Makes `tensorboard/<experiment>/<trial>/<stage>` a relative link to the event files of `key`, or removes a link to
    /// another key's where `key` has none.
    pub fn link_tensorboard(&self, name: &NodeName, key: &Digest) -> Result<(), StoreError> {
        let mut link = self.folder("tensorboard").join(segment(&name.experiment));
        let mut target = PathBuf::from("../..");
        if !name.trial.is_empty() {
            link.push(segment(&name.trial));
            target.push("..");
        }
        let folder = link.clone();
        link.push(segment(&name.stage));
        target.extend(["logs", &key.0, "tensorboard"]);
        let old = self.disk.read_link(&link).ok();
        if !self.has_curves(key) {
            if old.is_some() {
                self.disk.remove_file(&link).at("remove", &link)?;
            }
            return Ok(());
        }
        if old.as_ref() == Some(&target) {
            return Ok(());
        }
        self.disk.ensure_folder(&folder, false)?;
        // Made beside and renamed, so that a viewer never finds it missing.
        let new = self.disk.beside(&folder, ".new-", &|path| self.disk.link(&target, path)).at("link", &link)?;
        self.disk.rename(&new, &link).at("link", &link)
    }

    /// Whether `key` has written event files.
    pub(crate) fn has_curves(&self, key: &Digest) -> bool {
        let curves = self.logs(key).join("tensorboard");
        self.disk.stat(&curves).is_ok_and(|stat| stat.sort == Sort::Folder)
    }

    fn record_path(&self, experiment: &str, trial: &str, stage: &str) -> PathBuf {
        let trial = if trial.is_empty() { "_".to_owned() } else { segment(trial) };
        self.folder("runs").join(segment(experiment)).join(trial).join(format!("{}.json", segment(stage)))
    }
}

/// A name as one component of a path: `/`, `%`, control characters and a leading `.` or lone `_` are escaped, and what is too
/// long for a file name ends in a digest instead.
pub(super) fn segment(name: &str) -> String {
    let mut text = String::with_capacity(name.len());
    for (index, character) in name.chars().enumerate() {
        let escape =
            matches!(character, '/' | '%' | '\\') || character.is_control() || (index == 0 && character == '.');
        if escape || name == "_" {
            text.extend(["%".to_owned(), format!("{:02X}", u32::from(character))]);
        } else {
            text.push(character);
        }
    }
    if text.len() <= 200 {
        return text;
    }
    let kept = text.char_indices().map(|(at, _)| at).take_while(|at| *at <= 160).last().unwrap_or(0);
    format!("{}~{}", &text[..kept], &blake3::hash(name.as_bytes()).to_hex()[..16])
}

fn read(disk: &dyn Disk, path: &Path) -> Result<Option<OnDisk>, StoreError> {
    let bytes = match disk.read(path) {
        Ok(bytes) => bytes,
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(error).at("read", path),
    };
    match serde_json::from_slice(&bytes) {
        Ok(on_disk) => Ok(Some(on_disk)),
        Err(error) => {
            tracing::warn!(file = %path.display(), %error, "a record is damaged and counts as absent");
            Ok(None)
        }
    }
}

/// The sorted entries of a folder that are not hidden; none where it is not there.
fn entries(disk: &dyn Disk, folder: &Path) -> Result<Vec<PathBuf>, StoreError> {
    let found = match disk.list(folder) {
        Ok(found) => found,
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(error).at("list", folder),
    };
    let shown = found.iter().filter(|entry| !entry.name.as_encoded_bytes().starts_with(b"."));
    let mut paths: Vec<PathBuf> = shown.map(|entry| folder.join(&entry.name)).collect();
    paths.sort();
    Ok(paths)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn name(trial: &str, stage: &str) -> NodeName {
        NodeName { experiment: "maze".into(), trial: trial.into(), stage: stage.into() }
    }

    #[test]
    fn records_come_back_under_any_name() {
        let place = tempfile::tempdir().unwrap();
        let store = Store::open(place.path()).unwrap();
        let long = "x".repeat(400);
        let record = |kind: &str| RunRecord {
            recipe: Digest("r".into()),
            key: Digest("k".into()),
            kind: kind.into(),
            file: "/a/maze.toml".into(),
            earlier: Vec::new(),
        };
        let trials = ["", "_", "seed=1,path=../../x/%", &long, "."];
        for trial in trials {
            store.record(&name(trial, "sft"), &record(trial)).unwrap();
        }
        for trial in trials {
            assert_eq!(store.recorded("maze", trial, "sft").unwrap(), Some(record(trial)), "{trial}");
        }
        assert_eq!(store.recorded("maze", "", "grpo").unwrap(), None);
        assert_eq!(store.recorded_trials("maze").unwrap().len(), trials.len());
        assert_eq!(store.recorded_experiments().unwrap(), ["maze"]);
        assert!(store.recorded_trials("other").unwrap().is_empty());
    }

    #[test]
    fn curves_are_linked_relatively_and_follow_the_key() {
        let place = tempfile::tempdir().unwrap();
        let store = Store::open(&place.path().join("here")).unwrap();
        let (one, two) = (Digest("1".repeat(64)), Digest("2".repeat(64)));
        for (key, text) in [(&one, "one"), (&two, "two")] {
            std::fs::create_dir_all(store.logs(key).join("tensorboard")).unwrap();
            std::fs::write(store.logs(key).join("tensorboard/events"), text).unwrap();
        }
        for (key, text) in [(&one, "one"), (&two, "two"), (&two, "two")] {
            store.link_tensorboard(&name("", "sft"), key).unwrap();
            store.link_tensorboard(&name("seed=1", "sft"), key).unwrap();
            for path in ["maze/sft/events", "maze/seed=1/sft/events"] {
                assert_eq!(std::fs::read_to_string(store.root().join("tensorboard").join(path)).unwrap(), text);
            }
        }
        std::fs::rename(place.path().join("here"), place.path().join("there")).unwrap();
        assert!(place.path().join("there/tensorboard/maze/seed=1/sft/events").exists(), "the store may be moved");
        let store = Store::open(&place.path().join("there")).unwrap();
        store.link_tensorboard(&name("", "sft"), &Digest("3".repeat(64))).unwrap();
        assert!(!store.root().join("tensorboard/maze/sft").exists());
    }
}
