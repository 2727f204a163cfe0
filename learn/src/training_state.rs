//! The whole state of a training on disk: what a killed run goes on from as if it had never stopped.
//!
//! A state is one safetensors file whose metadata holds the JSON part and whose name holds the digest of its bytes. It is
//! written beside, synced and renamed, so a file under its final name is whole or detectably not. Two states are kept: if
//! the newest is damaged, the one before is loaded. It knows nothing of what the state means.

use std::collections::{BTreeMap, HashMap};
use std::fs::{self, File};
use std::io::Write as _;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use safetensors::{Dtype, SafeTensors};
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::Value;
use tch::{Kind, Tensor};

use crate::model::folder::Stored;

/// States that are kept.
const KEPT: usize = 2;
const BLOB: &str = "blob:";

/// A training at one instant.
#[derive(Debug)]
pub struct State {
    /// Orders states: the highest is the newest. Saving one that stands already replaces it.
    pub sequence: u64,
    /// Weights, moments and other tensors (f32, f64 or i64).
    pub tensors: BTreeMap<String, Tensor>,
    /// Opaque bytes: pending rollouts and the like.
    pub blobs: BTreeMap<String, Vec<u8>>,
    /// Counters, cursors, sums. JSON has no numbers beyond the finite: nan and inf do not come back.
    pub json: Value,
}

impl State {
    /// A state without tensors and blobs, whose JSON part is `value`.
    pub fn new(sequence: u64, value: &impl Serialize) -> Result<Self> {
        let json = serde_json::to_value(value).context("cannot write the training state as JSON")?;
        Ok(Self { sequence, tensors: BTreeMap::new(), blobs: BTreeMap::new(), json })
    }

    /// The JSON part as a value of type `T`.
    pub fn read<T: DeserializeOwned>(&self) -> Result<T> {
        T::deserialize(&self.json).context("the training state was written by another version")
    }
}

/// Saves `state` in `folder` durably, then removes all but the newest two.
pub fn save(folder: &Path, state: &State) -> Result<()> {
    fs::create_dir_all(folder).with_context(|| format!("cannot make `{}`", folder.display()))?;
    let mut stored = Vec::with_capacity(state.tensors.len() + state.blobs.len());
    for (name, tensor) in &state.tensors {
        ensure!(!name.starts_with(BLOB), "`{name}` is no name for a tensor of a training state");
        stored.push((name.clone(), Stored::tensor(tensor).with_context(|| format!("cannot store `{name}`"))?));
    }
    stored.extend(state.blobs.iter().map(|(name, bytes)| (format!("{BLOB}{name}"), Stored::bytes(bytes))));
    let text = serde_json::to_string(&state.json).context("a JSON value is JSON")?;
    let metadata = HashMap::from([("state".to_owned(), text)]);
    let bytes = safetensors::serialize(stored, Some(metadata)).context("cannot lay the training state out")?;
    let name = format!("state-{:020}-{}.safetensors", state.sequence, blake3::hash(&bytes).to_hex());
    let (partial, path) = (folder.join("state.partial"), folder.join(name));
    write_synced(&partial, &bytes).with_context(|| format!("cannot write `{}`", partial.display()))?;
    fs::rename(&partial, &path).with_context(|| format!("cannot put `{}` in place", path.display()))?;
    File::open(folder)
        .and_then(|opened| opened.sync_all())
        .with_context(|| format!("cannot sync `{}`", folder.display()))?;
    for (_, _, old) in listed(folder)?.into_iter().filter(|(_, _, other)| *other != path).skip(KEPT - 1) {
        fs::remove_file(&old).with_context(|| format!("cannot remove `{}`", old.display()))?;
    }
    Ok(())
}

fn write_synced(path: &Path, bytes: &[u8]) -> std::io::Result<()> {
    let mut file = File::create(path)?;
    file.write_all(bytes)?;
    file.sync_all()
}

/// The states of `folder` by their names, newest first: sequence, digest, path.
fn listed(folder: &Path) -> Result<Vec<(u64, String, PathBuf)>> {
    let listing = || format!("cannot list `{}`", folder.display());
    let mut found = Vec::new();
    for entry in fs::read_dir(folder).with_context(listing)? {
        let path = entry.with_context(listing)?.path();
        let parts = path.file_name().and_then(|name| name.to_str()).and_then(|name| {
            let (sequence, digest) = name.strip_prefix("state-")?.strip_suffix(".safetensors")?.split_once('-')?;
            Some((sequence.parse().ok()?, digest.to_owned()))
        });
        if let Some((sequence, digest)) = parts {
            found.push((sequence, digest, path));
        }
    }
    found.sort_by(|one, other| other.cmp(one));
    Ok(found)
}

/// Loads the newest whole state of `folder`; `None` where there is none. Damaged ones are passed over with a warning.
pub fn load(folder: &Path) -> Result<Option<State>> {
    if !folder.exists() {
        return Ok(None);
    }
    for (sequence, digest, path) in listed(folder)? {
        let bytes = fs::read(&path).with_context(|| format!("cannot read `{}`", path.display()))?;
        if blake3::hash(&bytes).to_hex().as_str() != digest {
            tracing::warn!(path = %path.display(), "a training state is damaged and passed over");
            continue;
        }
        let state = parse(sequence, &bytes).with_context(|| format!("cannot use `{}`", path.display()))?;
        return Ok(Some(state));
    }
    Ok(None)
}

fn parse(sequence: u64, bytes: &[u8]) -> Result<State> {
    let (_, metadata) = SafeTensors::read_metadata(bytes)?;
    let text = metadata.metadata().as_ref().and_then(|entries| entries.get("state"));
    let json = serde_json::from_str(text.context("its metadata has no entry `state`")?)?;
    let (mut tensors, mut blobs) = (BTreeMap::new(), BTreeMap::new());
    for (name, tensor) in SafeTensors::deserialize(bytes)?.iter() {
        if let Some(name) = name.strip_prefix(BLOB) {
            blobs.insert(name.to_owned(), tensor.data().to_vec());
            continue;
        }
        let kind = match tensor.dtype() {
            Dtype::F32 => Kind::Float,
            Dtype::F64 => Kind::Double,
            Dtype::I64 => Kind::Int64,
            other => anyhow::bail!("`{name}` has the type {other:?}"),
        };
        let shape: Vec<i64> = tensor.shape().iter().map(|&size| size as i64).collect();
        tensors.insert(name.to_owned(), Tensor::f_from_data_size(tensor.data(), &shape, kind)?);
    }
    Ok(State { sequence, tensors, blobs, json })
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn state(sequence: u64) -> State {
        let mut state = State::new(sequence, &json!({"step": sequence, "loss": 0.1})).expect("a state");
        state.tensors.insert("weights".to_owned(), Tensor::from_slice(&[1.5f32, -0.0, sequence as f32]).view([3, 1]));
        state.tensors.insert("sums".to_owned(), Tensor::from_slice(&[0.1f64, 1e300]));
        state.blobs.insert("pending".to_owned(), vec![0, 255, 7]);
        state.blobs.insert("empty".to_owned(), Vec::new());
        state
    }

    fn sequence(folder: &Path) -> Option<u64> {
        load(folder).expect("readable").map(|state| state.sequence)
    }

    #[test]
    fn a_state_comes_back_bit_for_bit() {
        let folder = tempfile::tempdir().expect("a folder");
        assert!(load(&folder.path().join("none")).expect("no folder is no state").is_none());
        assert!(load(folder.path()).expect("readable").is_none());
        let saved = state(3);
        save(folder.path(), &saved).expect("saved");
        let loaded = load(folder.path()).expect("readable").expect("a state");
        assert_eq!((loaded.sequence, &loaded.json, &loaded.blobs), (3, &saved.json, &saved.blobs));
        assert_eq!(loaded.tensors.keys().collect::<Vec<_>>(), saved.tensors.keys().collect::<Vec<_>>());
        for (name, tensor) in &saved.tensors {
            assert_eq!(loaded.tensors[name], *tensor);
            assert_eq!(loaded.tensors[name].kind(), tensor.kind());
        }
        let read: BTreeMap<String, f64> = loaded.read().expect("its own type");
        assert_eq!((read["step"], read["loss"]), (3.0, 0.1));
        assert!(loaded.read::<Vec<u64>>().is_err());
    }

    #[test]
    fn two_states_are_kept_and_damage_falls_back_to_the_older() {
        let folder = tempfile::tempdir().expect("a folder");
        for step in 1..=4 {
            save(folder.path(), &state(step)).expect("saved");
        }
        let states = listed(folder.path()).expect("listed");
        assert_eq!(states.iter().map(|(step, _, _)| *step).collect::<Vec<_>>(), [4, 3]);
        let whole = fs::read(&states[0].2).expect("the newest");
        for length in [0, 1, 100, whole.len() - 1] {
            fs::write(&states[0].2, &whole[..length]).expect("torn");
            assert_eq!(sequence(folder.path()), Some(3), "torn at {length}");
        }
        for place in [0, 9, whole.len() / 2, whole.len() - 1] {
            let mut flipped = whole.clone();
            flipped[place] ^= 1;
            fs::write(&states[0].2, &flipped).expect("flipped");
            assert_eq!(sequence(folder.path()), Some(3), "flipped at {place}");
        }
        fs::write(folder.path().join("state.partial"), &whole[..50]).expect("killed while writing");
        assert_eq!(sequence(folder.path()), Some(3));
        // What is saved after a fall-back replaces the damaged one.
        save(folder.path(), &state(4)).expect("saved");
        assert_eq!(sequence(folder.path()), Some(4));
        fs::write(&states[1].2, b"damaged too").expect("written");
        fs::write(&states[0].2, b"damaged").expect("written");
        assert_eq!(sequence(folder.path()), None);
    }
}
