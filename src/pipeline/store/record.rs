//! Views by people's names: which key an experiment's stage last had, and where TensorBoard finds its curves. Both can be
//! rebuilt from plans and manifests, so a damaged one counts as absent.
//!
//! The records of a trial are one file, `runs/<experiment>/<trial>/stages.jsonl`, to which each change of a stage adds a line
//! in one write: what runs at the same time add stands side by side, and a run that changes nothing reads one file. The last
//! line of a stage says what it was; those before it, which keys it had. A file `<stage>.json` beside it is from a time when
//! there was one for every stage; it is read, and taken into the other when that is next written.

use std::collections::{BTreeMap, HashMap};
use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use serde::{Deserialize, Serialize};

use super::disk::{Disk, Sort};
use super::error::At as _;
use super::{Digest, FileStat, Store, StoreError};
use crate::pipeline::plan::NodeName;
use crate::telemetry::EVENTS_FOLDER;
use crate::telemetry::hparams::SESSION_RUN;

/// The file of a trial.
const JOURNAL: &str = "stages.jsonl";

/// The lock in `locks/` that is held, for a moment, shared by whoever adds to a journal and alone by whoever writes one anew.
const JOURNALS: &str = "journals";

/// A journal of this many lines per stage, and no fewer than [`FEW`] in all, is written anew.
const CROWDED: usize = 32;

/// See [`CROWDED`].
const FEW: usize = 4096;

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

impl RunRecord {
    /// The record with the keys of the one before it among its earlier ones.
    fn after(mut self, old: Self) -> Self {
        for key in std::iter::once(old.key).chain(old.earlier) {
            if key != self.key && self.earlier.len() < EARLIER && !self.earlier.contains(&key) {
                self.earlier.push(key);
            }
        }
        self
    }
}

/// Earlier keys that are remembered.
const EARLIER: usize = 100;

/// Stage to record.
pub type TrialRecords = BTreeMap<String, RunRecord>;

/// A record as it lies on disk, with the name that its path only hints at.
#[derive(Serialize, Deserialize)]
struct OnDisk {
    name: NodeName,
    #[serde(flatten)]
    record: RunRecord,
}

impl OnDisk {
    /// The record as a line; the newline stands before it, so that one which was torn ends where the next begins.
    fn line(name: &NodeName, record: &RunRecord) -> String {
        let on_disk = Self { name: name.clone(), record: record.clone() };
        format!("\n{}", serde_json::to_string(&on_disk).expect("a record is plain data"))
    }
}

/// The journals that this process has read, by experiment and trial.
#[derive(Debug, Default)]
pub(super) struct Journals(Mutex<HashMap<String, HashMap<String, Journal>>>);

/// The records of a trial.
#[derive(Clone, Debug, Default)]
struct Journal {
    stages: Arc<TrialRecords>,
    /// That of the file when it was read; none where there is none.
    stat: Option<FileStat>,
    lines: usize,
    /// Files of the time when there was one for every stage.
    old: Vec<PathBuf>,
}

impl Journal {
    /// Takes in a record that is newer than those before.
    fn take(&mut self, stage: &str, record: RunRecord) {
        let stages = Arc::make_mut(&mut self.stages);
        let record = match stages.remove(stage) {
            Some(old) => record.after(old),
            None => record,
        };
        stages.insert(stage.to_owned(), record);
    }

    /// Whether a record says nothing new.
    fn says(&self, stage: &str, record: &RunRecord) -> bool {
        self.stages.get(stage).is_some_and(|known| {
            known.key == record.key
                && known.recipe == record.recipe
                && known.kind == record.kind
                && known.file == record.file
        })
    }

    /// Every record as lines.
    fn lines(&self, experiment: &str, trial: &str) -> String {
        let name = |stage: &String| NodeName {
            experiment: experiment.to_owned(),
            trial: trial.to_owned(),
            stage: stage.clone(),
        };
        self.stages.iter().map(|(stage, record)| OnDisk::line(&name(stage), record)).collect()
    }
}

/// What lies in the folder of a trial.
#[derive(Default)]
struct ReadTrial {
    records: BTreeMap<NodeName, RunRecord>,
    stat: Option<FileStat>,
    lines: usize,
    old: Vec<PathBuf>,
}

impl ReadTrial {
    /// Takes in a line, which is newer than those before.
    fn take(&mut self, line: &[u8], path: &Path) {
        match serde_json::from_slice::<OnDisk>(line) {
            Ok(OnDisk { name, record }) => {
                let record = match self.records.remove(&name) {
                    Some(old) => record.after(old),
                    None => record,
                };
                self.records.insert(name, record);
            }
            Err(error) => {
                tracing::warn!(file = %path.display(), %error, "a record is damaged and counts as absent");
            }
        }
    }
}

impl Store {
    /// Keeps what a stage was in this run, and the keys that it had before; gives whether that is news.
    pub fn record(&self, name: &NodeName, record: &RunRecord) -> Result<bool, StoreError> {
        let mut journals = self.journals.0.lock().unwrap_or_else(PoisonError::into_inner);
        if !journals.get(&name.experiment).is_some_and(|trials| trials.contains_key(&name.trial)) {
            let journal = self.read_journal(&name.experiment, &name.trial)?;
            journals.entry(name.experiment.clone()).or_default().insert(name.trial.clone(), journal);
        }
        let trials = journals.get_mut(&name.experiment).expect("it was read just now");
        let journal = trials.get_mut(&name.trial).expect("it was read just now");
        if journal.says(&name.stage, record) {
            return Ok(false);
        }
        let folder = self.trial_folder(&name.experiment, &name.trial);
        let path = folder.join(JOURNAL);
        if journal.old.is_empty() && journal.lines < FEW.max(CROWDED * journal.stages.len()) {
            // Nobody writes the file anew, so that what is added stays.
            let _together = self.lock_shared(JOURNALS)?;
            let line = OnDisk::line(name, record);
            let mut appended = self.disk.append(&path, line.as_bytes());
            if appended.as_ref().is_err_and(|error| error.kind() == ErrorKind::NotFound) {
                self.disk.ensure_folder(&folder, false)?;
                appended = self.disk.append(&path, line.as_bytes());
            }
            appended.at("write", &path)?;
            journal.take(&name.stage, record.clone());
            journal.lines += 1;
        } else {
            let _alone = self.lock_whole(JOURNALS)?;
            // Another run may have added to it, or done the same, since it was read.
            let mut whole = self.read_journal(&name.experiment, &name.trial)?;
            whole.take(&name.stage, record.clone());
            whole.lines = whole.stages.len();
            self.disk.write_atomically(&path, whole.lines(&name.experiment, &name.trial).as_bytes(), false)?;
            for old in std::mem::take(&mut whole.old) {
                self.remove(&old)?;
            }
            *journal = whole;
        }
        // Whoever asks next looks at the file again.
        journal.stat = None;
        Ok(true)
    }

    /// Keeps how the arms of an experiment were tuned as `tuned.json` beside its trials: a view, which results can give again.
    pub fn record_tuning(&self, experiment: &str, tuned: &impl Serialize) -> Result<(), StoreError> {
        let folder = self.folder("runs").join(segment(experiment));
        let path = folder.join("tuned.json");
        let mut bytes = serde_json::to_vec_pretty(tuned).expect("what was tuned is plain data");
        bytes.push(b'\n');
        if self.disk.read(&path).is_ok_and(|old| old == bytes) {
            return Ok(());
        }
        self.disk.ensure_folder(&folder, false)?;
        self.disk.write_atomically(&path, &bytes, false)
    }

    /// Every recorded stage of every experiment.
    pub(super) fn every_record(&self) -> Result<Vec<(NodeName, RunRecord)>, StoreError> {
        let mut records = Vec::new();
        for experiment in entries(&*self.disk, &self.folder("runs"))? {
            for trial in entries(&*self.disk, &experiment)? {
                records.extend(self.read_trial(&trial)?.records);
            }
        }
        Ok(records)
    }

    /// What a stage was in the last run that had it.
    pub fn recorded(&self, experiment: &str, trial: &str, stage: &str) -> Result<Option<RunRecord>, StoreError> {
        Ok(self.recorded_trial(experiment, trial)?.get(stage).cloned())
    }

    /// What every stage of a trial was in the last run that had it.
    pub fn recorded_trial(&self, experiment: &str, trial: &str) -> Result<Arc<TrialRecords>, StoreError> {
        let mut journals = self.journals.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(journal) = journals.get(experiment).and_then(|trials| trials.get(trial)) {
            let path = self.trial_folder(experiment, trial).join(JOURNAL);
            let stat = self.disk.stat(&path).ok().map(|stat| stat.identity);
            if stat.is_some() && stat == journal.stat {
                return Ok(Arc::clone(&journal.stages));
            }
        }
        let journal = self.read_journal(experiment, trial)?;
        let stages = Arc::clone(&journal.stages);
        journals.entry(experiment.to_owned()).or_default().insert(trial.to_owned(), journal);
        Ok(stages)
    }

    /// Whether anything of an experiment is recorded.
    pub fn is_recorded(&self, experiment: &str) -> Result<bool, StoreError> {
        Ok(!entries(&*self.disk, &self.folder("runs").join(segment(experiment)))?.is_empty())
    }

    /// Every recorded stage of an experiment, by trial and stage.
    pub fn recorded_trials(&self, experiment: &str) -> Result<BTreeMap<String, TrialRecords>, StoreError> {
        let mut trials: BTreeMap<String, TrialRecords> = BTreeMap::new();
        for trial in entries(&*self.disk, &self.folder("runs").join(segment(experiment)))? {
            for (name, record) in self.read_trial(&trial)?.records {
                trials.entry(name.trial).or_default().insert(name.stage, record);
            }
        }
        Ok(trials)
    }

    /// The names of every recorded experiment.
    pub fn recorded_experiments(&self) -> Result<Vec<String>, StoreError> {
        let mut names = std::collections::BTreeSet::new();
        for experiment in entries(&*self.disk, &self.folder("runs"))? {
            for trial in entries(&*self.disk, &experiment)? {
                if let Some((name, _)) = self.read_trial(&trial)?.records.into_iter().next() {
                    names.insert(name.experiment);
                    break;
                }
            }
        }
        Ok(names.into_iter().collect())
    }

    fn read_journal(&self, experiment: &str, trial: &str) -> Result<Journal, StoreError> {
        let ReadTrial { records, stat, lines, old } = self.read_trial(&self.trial_folder(experiment, trial))?;
        let own = records.into_iter().filter(|(name, _)| name.experiment == experiment && name.trial == trial);
        let stages = own.map(|(name, record)| (name.stage, record)).collect();
        Ok(Journal { stages: Arc::new(stages), stat, lines, old })
    }

    /// Reads the folder of a trial.
    fn read_trial(&self, folder: &Path) -> Result<ReadTrial, StoreError> {
        let disk = &*self.disk;
        let mut read = ReadTrial::default();
        let mut journal = None;
        for path in entries(disk, folder)? {
            if path.ends_with(JOURNAL) {
                journal = Some(path);
            } else if path.extension().is_some_and(|extension| extension == "json") {
                match disk.read(&path) {
                    Ok(bytes) => read.take(&bytes, &path),
                    Err(error) if error.kind() == ErrorKind::NotFound => {}
                    Err(error) => return Err(error).at("read", &path),
                }
                read.old.push(path);
            }
        }
        if let Some(path) = journal {
            // The stat from before, so that what is added meanwhile is read the next time.
            read.stat = disk.stat(&path).ok().map(|stat| stat.identity);
            let bytes = match disk.read(&path) {
                Err(error) if error.kind() == ErrorKind::NotFound => Vec::new(),
                other => other.at("read", &path)?,
            };
            for line in bytes.split(|byte| *byte == b'\n').filter(|line| !line.is_empty()) {
                read.lines += 1;
                read.take(line, &path);
            }
        }
        Ok(read)
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
        target.extend(["logs", &key.0, EVENTS_FOLDER]);
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

    /// The folder of a trial's session in TensorBoard's view, beside those of its stages. Who writes it makes it.
    pub fn tensorboard_session(&self, experiment: &str, trial: &str) -> PathBuf {
        let mut folder = self.folder("tensorboard").join(segment(experiment));
        if !trial.is_empty() {
            folder.push(segment(trial));
        }
        folder.join(SESSION_RUN)
    }

    /// Whether `key` has written event files.
    pub(crate) fn has_curves(&self, key: &Digest) -> bool {
        let curves = self.logs(key).join(EVENTS_FOLDER);
        self.disk.stat(&curves).is_ok_and(|stat| stat.sort == Sort::Folder)
    }

    fn trial_folder(&self, experiment: &str, trial: &str) -> PathBuf {
        let trial = if trial.is_empty() { "_".to_owned() } else { segment(trial) };
        self.folder("runs").join(segment(experiment)).join(trial)
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

/// The sorted entries of a folder that are not hidden; none where it is not there.
fn entries(disk: &dyn Disk, folder: &Path) -> Result<Vec<PathBuf>, StoreError> {
    let found = match disk.list(folder) {
        Ok(found) => found,
        // Beside the folders of trials lies what was chosen, which is a file.
        Err(error) if matches!(error.kind(), ErrorKind::NotFound | ErrorKind::NotADirectory) => return Ok(Vec::new()),
        Err(error) => return Err(error).at("list", folder),
    };
    let shown = found.iter().filter(|entry| !entry.name.as_encoded_bytes().starts_with(b"."));
    let mut paths: Vec<PathBuf> = shown.map(|entry| folder.join(&entry.name)).collect();
    paths.sort();
    Ok(paths)
}

#[cfg(test)]
mod tests {
    use super::super::faults::Fault;
    use super::super::fixture::Sandbox;
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
        store.record_tuning("maze", &["chosen"]).unwrap();
        assert!(std::fs::read_to_string(place.path().join("runs/maze/tuned.json")).unwrap().contains("chosen"));
        assert_eq!(store.recorded("maze", "", "grpo").unwrap(), None);
        assert_eq!(store.recorded_trials("maze").unwrap().len(), trials.len());
        assert_eq!(store.recorded_experiments().unwrap(), ["maze"]);
        assert!(store.recorded_trials("other").unwrap().is_empty());
    }

    fn record(key: &str) -> RunRecord {
        let (recipe, key) = (Digest("r".into()), Digest(key.into()));
        RunRecord { recipe, key, kind: "sft".into(), file: "/a/maze.toml".into(), earlier: Vec::new() }
    }

    fn keys(record: &RunRecord) -> Vec<&str> {
        std::iter::once(&record.key).chain(&record.earlier).map(|key| key.0.as_str()).collect()
    }

    #[test]
    fn a_run_that_changes_nothing_writes_nothing_and_what_two_runs_say_stands() {
        let place = tempfile::tempdir().unwrap();
        let [one, two] = [(); 2].map(|()| Store::open(place.path()).unwrap());
        let journal = place.path().join("runs/maze/_").join(JOURNAL);
        one.record(&name("", "sft"), &record("1")).unwrap();
        two.record(&name("", "sft"), &record("1")).unwrap();
        assert_eq!(std::fs::read_to_string(&journal).unwrap().lines().filter(|line| !line.is_empty()).count(), 1);
        one.record(&name("", "grpo"), &record("g")).unwrap();
        two.record(&name("", "sft"), &record("2")).unwrap();
        one.record(&name("", "sft"), &record("3")).unwrap();
        one.record(&name("", "sft"), &record("1")).unwrap();
        for store in [&one, &two, &Store::open(place.path()).unwrap()] {
            let stages = store.recorded_trial("maze", "").unwrap();
            assert_eq!(keys(&stages["sft"]), ["1", "3", "2"]);
            assert_eq!(keys(&stages["grpo"]), ["g"]);
        }
        std::fs::write(&journal, [&std::fs::read(&journal).unwrap()[..], b"\n{\"name\":"].concat()).unwrap();
        two.record(&name("", "dpo"), &record("d")).unwrap();
        let stages = one.recorded_trial("maze", "").unwrap();
        assert_eq!(stages.keys().collect::<Vec<_>>(), ["dpo", "grpo", "sft"], "a torn line is no line");
    }

    #[test]
    fn records_of_the_time_when_each_had_a_file_are_taken_over() {
        let place = tempfile::tempdir().unwrap();
        let store = Store::open(place.path()).unwrap();
        let folder = place.path().join("runs/maze/_");
        std::fs::create_dir_all(&folder).unwrap();
        for (stage, key) in [("sft", "1"), ("grpo", "g")] {
            let mut old = record(key);
            old.earlier = vec![Digest("0".into())];
            let old = OnDisk { name: name("", stage), record: old };
            std::fs::write(folder.join(format!("{stage}.json")), serde_json::to_vec_pretty(&old).unwrap()).unwrap();
        }
        assert_eq!(keys(&store.recorded("maze", "", "sft").unwrap().unwrap()), ["1", "0"]);
        store.record(&name("", "sft"), &record("1")).unwrap();
        assert!(folder.join("sft.json").exists(), "nothing has changed");
        store.record(&name("", "sft"), &record("2")).unwrap();
        assert_eq!(std::fs::read_dir(&folder).unwrap().count(), 1);
        let stages = Store::open(place.path()).unwrap().recorded_trial("maze", "").unwrap();
        assert_eq!(keys(&stages["sft"]), ["2", "1", "0"]);
        assert_eq!(keys(&stages["grpo"]), ["g", "0"]);
    }

    #[test]
    fn two_runs_that_take_old_records_over_at_once_lose_nothing() {
        for number in 0.. {
            let (sandbox, disk) = Sandbox::faulty();
            let (one, two) = (sandbox.store.clone(), Store::open(sandbox.store.root()).unwrap());
            let folder = sandbox.store.root().join("runs/maze/_");
            std::fs::create_dir_all(&folder).unwrap();
            for stage in ["sft", "grpo"] {
                let old = OnDisk { name: name("", stage), record: record("0") };
                std::fs::write(folder.join(format!("{stage}.json")), serde_json::to_vec_pretty(&old).unwrap()).unwrap();
            }
            for store in [&one, &two] {
                assert_eq!(store.recorded_trial("maze", "").unwrap().len(), 2);
            }
            let (mut taken, other) = (0, two.clone());
            disk.meanwhile(move |_, _| {
                // Where it would wait it comes later.
                if taken >= number && other.lock_file_is_free(JOURNALS) {
                    other.record(&name("", "grpo"), &record("g")).unwrap();
                }
                taken += 1;
            });
            disk.fail_at(usize::MAX, Fault::Killed);
            one.record(&name("", "sft"), &record("s")).unwrap();
            disk.undisturbed();
            two.record(&name("", "grpo"), &record("g")).unwrap();
            let stages = Store::open(sandbox.store.root()).unwrap().recorded_trial("maze", "").unwrap();
            assert_eq!((keys(&stages["sft"]), keys(&stages["grpo"])), (vec!["s", "0"], vec!["g", "0"]), "at {number}");
            assert_eq!(std::fs::read_dir(&folder).unwrap().count(), 1, "at {number}");
            if disk.heal() <= number {
                assert!(number >= 8, "{number} operations");
                break;
            }
        }
    }

    #[test]
    fn a_crowded_journal_is_written_anew_with_what_counts() {
        let place = tempfile::tempdir().unwrap();
        let store = Store::open(place.path()).unwrap();
        let lines: String = (0..FEW).map(|key| OnDisk::line(&name("", "sft"), &record(&key.to_string()))).collect();
        std::fs::create_dir_all(place.path().join("runs/maze/_")).unwrap();
        std::fs::write(place.path().join("runs/maze/_").join(JOURNAL), lines).unwrap();
        store.record(&name("", "sft"), &record("new")).unwrap();
        let text = std::fs::read_to_string(place.path().join("runs/maze/_").join(JOURNAL)).unwrap();
        assert_eq!(text.lines().filter(|line| !line.is_empty()).count(), 1);
        let found = Store::open(place.path()).unwrap().recorded("maze", "", "sft").unwrap().unwrap();
        assert_eq!((keys(&found)[..3].to_vec(), found.earlier.len()), (vec!["new", "4095", "4094"], EARLIER));
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
