//! What the stages of the play write, and how they are run and brought from elsewhere.

use serde_json::Value;

use super::super::fixture::{key, parts};
use super::super::volatile::Volatile;
use super::super::{Attempts, DraftOutput, KeyLock, ManifestDraft, Prepared, Store, StoreError};
use super::{ACCEPTED, ADOPTED, COLLECTED, Expected, UNDONE};
use crate::pipeline::stage::ArtifactType;

/// Path and content.
type Files = Vec<(String, String)>;

fn files(list: &[(&str, &str)]) -> Files {
    list.iter().map(|(path, content)| ((*path).to_owned(), (*content).to_owned())).collect()
}

/// More files than are synced one by one.
fn many() -> Files {
    (0..17).map(|number| (format!("{}/{number}", number % 2), format!("content {number}"))).collect()
}

/// The outputs that the stage of a key writes.
pub(super) fn outputs(number: usize) -> Vec<Files> {
    match number {
        1 | 2 | ACCEPTED | UNDONE => vec![files(&[("a/b", "one"), ("c", "two")])],
        3 => vec![files(&[("a/b", "one"), ("c", "two")]), files(&[("d", "three")])],
        4 => vec![many()],
        5 | 6 => vec![files(&[("data", "of which a byte is flipped")])],
        7 => vec![files(&[("data", "of which the end is lost")])],
        8 => vec![files(&[("data", "that is found by verification")])],
        9 => vec![files(&[("data", "committed together")]), files(&[("d", "three")])],
        10 => vec![files(&[("data", "committed together")]), files(&[("more", "than a few paths")])],
        ADOPTED => vec![files(&[("data", "that comes from elsewhere")])],
        COLLECTED => vec![files(&[("data", "that nobody needs")])],
        other => panic!("no key has the number {other}"),
    }
}

/// Brings a result from elsewhere, as an import does.
pub(super) fn adopt(store: &Store, disk: &Volatile, expected: &Expected) -> Result<(), StoreError> {
    let bundle = key(100);
    let _bundle = store.lock(&bundle)?;
    let aside = store.begin_import(&bundle)?.join("objects");
    let digest = &expected.carried.outputs[0].digest;
    for (path, content) in &outputs(ADOPTED)[0] {
        disk.put(&aside.join(&digest.0).join(path), content.as_bytes());
    }
    let folders = [(digest.clone(), aside.join(&digest.0))].into();
    store.adopt(&store.lock(&key(ADOPTED))?, expected.carried.clone(), &folders)?;
    store.end_import(&bundle)
}

pub(super) fn publish(store: &Store, disk: &Volatile, number: usize) -> Result<(), StoreError> {
    let (lock, draft) = attempt(store, disk, number)?;
    store.publish(&lock, draft).map(drop)
}

pub(super) fn prepare(store: &Store, disk: &Volatile, number: usize) -> Result<(KeyLock, Prepared), StoreError> {
    let (lock, draft) = attempt(store, disk, number)?;
    let prepared = store.prepare(&lock, draft)?;
    Ok((lock, prepared))
}

/// Runs the stage of a key.
fn attempt(store: &Store, disk: &Volatile, number: usize) -> Result<(KeyLock, ManifestDraft), StoreError> {
    let lock = store.lock(&key(number))?;
    let contents = outputs(number);
    let names: Vec<String> = (0..contents.len()).map(|index| index.to_string()).collect();
    let attempt = store.attempts(lock.key())?.map_or(1, |earlier| earlier.attempts + 1);
    let out = store.begin_attempt(&lock, attempt, &names.iter().map(String::as_str).collect::<Vec<_>>())?;
    store.save_attempts(lock.key(), &Attempts { attempts: attempt, ..Default::default() })?;
    for (name, files) in names.iter().zip(&contents) {
        for (path, content) in files {
            disk.put(&out.join(name).join(path), content.as_bytes());
        }
    }
    let output =
        |name: &String| DraftOutput { name: name.clone(), artifact: ArtifactType::Files, folder: out.join(name) };
    let draft = ManifestDraft {
        recipe: key(number),
        parts: parts(number),
        params: Value::Null,
        inputs: [].into(),
        outputs: names.iter().map(output).collect(),
        seconds: 1.0,
        attempts: attempt,
        numerics: [].into(),
        metrics: [].into(),
    };
    Ok((lock, draft))
}
