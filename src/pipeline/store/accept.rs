//! Accepting a result as that of another key: a recorded equivalence, after a change that the user knows to be cosmetic.
//!
//! It is a manifest like any other, of the new key and the old objects, with a note of who said so and why. So whatever
//! reads, verifies, bundles or collects results treats it alike, and undoing it is removing that manifest.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::error::At as _;
use super::{Digest, KeyParts, Lookup, Manifest, Store, StoreError};
use crate::pipeline::stage::Output;

/// That a result was accepted as another key's, and not computed under it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Acceptance {
    /// The key whose result it was.
    pub from: Digest,
    /// Why, in the user's words.
    pub reason: String,
    /// When, RFC 3339.
    pub when: String,
    /// Who.
    pub by: String,
    /// What differs between the two keys, in the words of `pipe why`.
    pub differences: Vec<String>,
    /// How `from` had come by the result, where that was accepted as well.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub earlier: Option<Box<Acceptance>>,
}

impl Acceptance {
    /// The key under which the result was computed.
    pub fn original(&self) -> &Digest {
        self.earlier.as_ref().map_or(&self.from, |earlier| earlier.original())
    }
}

/// What is to be accepted.
#[derive(Clone, Debug)]
pub struct AcceptanceDraft {
    /// The key that gets the result.
    pub key: Digest,
    /// Its recipe.
    pub recipe: Digest,
    /// What it is the hash of.
    pub parts: KeyParts,
    /// Parameters as planned.
    pub params: Value,
    /// Reference to content digest of each input.
    pub inputs: BTreeMap<String, Digest>,
    /// The outputs that the stage declares.
    pub outputs: Vec<Output>,
    /// The key whose result is accepted.
    pub from: Digest,
    /// See [`Acceptance::reason`].
    pub reason: String,
    /// See [`Acceptance::by`].
    pub by: String,
    /// See [`Acceptance::differences`].
    pub differences: Vec<String>,
}

/// Why a result cannot be accepted, or an acceptance not be undone. Texts continue `the result of ...`.
#[derive(Debug, thiserror::Error)]
pub enum AcceptError {
    /// The old result is not in the store.
    #[error("is no longer in the store, so there is nothing to accept")]
    Gone,
    /// The old result is not what was stored.
    #[error("is damaged: {what}")]
    Damaged {
        /// What is wrong, naming the file.
        what: String,
    },
    /// The old result has other outputs than the stage.
    #[error("has the outputs {old}, and the stage now has {new}")]
    Outputs {
        /// Those of the result.
        old: String,
        /// Those of the stage.
        new: String,
    },
    /// There is a result already.
    #[error("is there already, under the settings as they are now")]
    HasResult,
    /// There is a result already, which is not what was stored.
    #[error("is there already, under the settings as they are now, and is damaged: {what}")]
    HasDamaged {
        /// What is wrong, naming the file.
        what: String,
    },
    /// A process works on the key.
    #[error("is being made by another process right now")]
    Busy,
    /// There is no result of which an acceptance could be undone.
    #[error("is not there, so there is nothing to take back")]
    NoResult,
    /// There is nothing to undo.
    #[error("was not accepted but computed")]
    NotAccepted,
    /// The store refused.
    #[error(transparent)]
    Store(#[from] StoreError),
}

impl Store {
    /// Whether `draft` can be accepted; every byte of the old result is read. Gives the old result, which stays until this
    /// process ends.
    pub fn check_acceptance(&self, draft: &AcceptanceDraft) -> Result<Manifest, AcceptError> {
        // Before anything is looked at, and afterwards both count as used now.
        self.lease(&[&draft.key, &draft.from])?;
        match self.lookup(&draft.key)? {
            Lookup::Miss => {}
            Lookup::Hit(_) => return Err(AcceptError::HasResult),
            Lookup::Damaged { what } => return Err(AcceptError::HasDamaged { what }),
        }
        let old = match self.manifest(&draft.from)? {
            None => return Err(AcceptError::Gone),
            Some(Err(what)) => return Err(AcceptError::Damaged { what }),
            Some(Ok(old)) => old,
        };
        let stored: Vec<_> = old.outputs.iter().map(|output| (&output.name, output.artifact)).collect();
        let declared: Vec<_> = draft.outputs.iter().map(|output| (&output.name, output.artifact)).collect();
        if stored != declared {
            // The first is the default, so a change of order is one of meaning too.
            let words = |outputs: &[(&String, _)]| {
                let word = |(name, artifact): &(&String, crate::pipeline::stage::ArtifactType)| {
                    format!("`{name}` ({artifact})")
                };
                outputs.iter().map(word).collect::<Vec<_>>().join(", ")
            };
            return Err(AcceptError::Outputs { old: words(&stored), new: words(&declared) });
        }
        // Whatever becomes of the old result.
        self.lease(&old.outputs.iter().map(|output| &output.digest).collect::<Vec<_>>())?;
        for output in &old.outputs {
            if let Err(what) = self.verify_object(output)? {
                return Err(AcceptError::Damaged { what });
            }
        }
        Ok(old)
    }

    /// Makes the result of `draft.from` that of `draft.key`, durably.
    pub fn accept(&self, draft: AcceptanceDraft) -> Result<Manifest, AcceptError> {
        let lock = self.try_lock(&draft.key)?.ok_or(AcceptError::Busy)?;
        let old = self.check_acceptance(&draft)?;
        let when = jiff::Timestamp::now().strftime("%Y-%m-%dT%H:%M:%SZ").to_string();
        let AcceptanceDraft { key, recipe, parts, params, inputs, from, reason, by, differences, .. } = draft;
        let earlier = old.accepted.map(Box::new);
        let accepted = Some(Acceptance { from, reason, when, by, differences, earlier });
        let manifest = Manifest { key, recipe, parts, params, inputs, accepted, ..old };
        let mut unsynced = Vec::new();
        for output in &manifest.outputs {
            self.note_unsynced(&output.digest, &output.files, &mut unsynced)?;
        }
        self.commit(&lock, &manifest, &unsynced)?;
        Ok(manifest)
    }

    /// How the result of `key` was accepted, whatever became of its objects.
    fn acceptance(&self, key: &Digest) -> Result<Acceptance, AcceptError> {
        match self.manifest(key)? {
            None => Err(AcceptError::NoResult),
            Some(Err(what)) => Err(AcceptError::Damaged { what }),
            Some(Ok(manifest)) => manifest.accepted.ok_or(AcceptError::NotAccepted),
        }
    }

    /// Takes an acceptance back: the key has no result then. Gives what was taken back.
    pub fn undo_acceptance(&self, key: &Digest) -> Result<Acceptance, AcceptError> {
        // Before the lock: it is nobody's business who works on what was not accepted.
        self.acceptance(key)?;
        let _lock = self.try_lock(key)?.ok_or(AcceptError::Busy)?;
        let acceptance = self.acceptance(key)?;
        let path = self.manifest_path(key);
        self.remove(&path)?;
        if let Some(shelf) = path.parent() {
            self.disk.sync(shelf).at("write", shelf)?;
        }
        Ok(acceptance)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::{Arc, Mutex};

    use super::super::fixture::{Sandbox, key, parts};
    use super::super::{GcPolicy, Lookup};
    use super::*;
    use crate::pipeline::stage::ArtifactType;

    fn draft(from: usize, to: usize) -> AcceptanceDraft {
        AcceptanceDraft {
            key: key(to),
            recipe: key(to),
            parts: parts(to),
            params: Value::Null,
            inputs: [].into(),
            outputs: vec![Output { name: "out".into(), artifact: ArtifactType::Files }],
            from: key(from),
            reason: "it is the same".into(),
            by: "a test".into(),
            differences: Vec::new(),
        }
    }

    #[test]
    fn a_collection_goes_on_while_it_hashes_and_takes_nothing_of_it() {
        let (sandbox, disk) = Sandbox::faulty();
        sandbox.publish(1, &[("data", "one")]);
        sandbox.publish(3, &[("data", "three")]);
        let other = Store::open(sandbox.store.root()).unwrap();
        let objects = sandbox.store.root().join("objects");
        let collected = Arc::new(Mutex::new(Vec::new()));
        let told = Arc::clone(&collected);
        disk.meanwhile(move |operation, path| {
            // The object's bytes are being read: what would stand still if the collector were kept away.
            if operation == "open" && path.starts_with(&objects) {
                let policy = GcPolicy { max_size: Some(0), ..GcPolicy::default() };
                let plan = other.plan_gc(&policy, &|_, _| ()).unwrap();
                assert!(other.collector_may_go(), "it is kept away");
                told.lock().unwrap().push(other.collect_garbage(&plan, &mut |_, _| (), &mut || ()).unwrap().results);
            }
        });
        sandbox.store.accept(draft(1, 2)).unwrap();
        disk.undisturbed();
        assert_eq!(*collected.lock().unwrap(), [1], "3 alone");
        assert!(matches!(sandbox.store.lookup(&key(2)).unwrap(), Lookup::Hit(_)));
    }
}
