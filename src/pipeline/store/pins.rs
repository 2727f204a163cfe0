//! Pins: results that are never collected, by key or by name.
//!
//! A pin by name holds what bore the name when it was pinned, and what bears it now: a later run under other settings
//! neither frees the results of a paper nor stays unprotected itself.

use std::collections::BTreeSet;

use serde::{Deserialize, Serialize};

use super::error::At as _;
use super::record::segment;
use super::{Digest, Store, StoreError};
use crate::pipeline::plan::NodeName;

/// A pin.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Pin {
    /// A key, or `EXPERIMENT[/TRIAL[/STAGE]]`.
    pub name: String,
    /// What it holds since it was made.
    pub keys: BTreeSet<Digest>,
    /// When it was made, RFC 3339.
    pub pinned: String,
}

impl Pin {
    /// Whether it holds what bears `name`.
    fn covers(&self, name: &NodeName) -> bool {
        covers(&self.name, name)
    }
}

/// Whether `pin` is the experiment, the trial, the stage or the whole of `name`.
fn covers(pin: &str, name: &NodeName) -> bool {
    let NodeName { experiment, trial, stage } = name;
    let Some(rest) = pin.strip_prefix(experiment.as_str()) else { return false };
    let Some(rest) = rest.strip_prefix('/') else { return rest.is_empty() };
    rest == stage
        || rest == trial
        || rest.strip_prefix(trial.as_str()).and_then(|rest| rest.strip_prefix('/')) == Some(stage)
}

impl Store {
    /// Pins a key that has a result, by its first digits (at least eight) or all, or a name that is recorded. `None` where
    /// there is nothing of that name.
    pub fn pin(&self, name: &str) -> Result<Option<Pin>, StoreError> {
        let (name, mut keys) = match self.key_that_begins(name)? {
            Some(key) => (key.0.clone(), BTreeSet::from([key])),
            None => (name.to_owned(), self.keys_named(name)?),
        };
        // From the look to the pin nothing may be collected: what was found by a long search is looked at again.
        let _hold = self.hold()?;
        keys.retain(|key| self.disk.is_there(&self.manifest_path(key)));
        if keys.is_empty() {
            return Ok(None);
        }
        let pinned = jiff::Timestamp::now().strftime("%Y-%m-%dT%H:%M:%SZ").to_string();
        let earlier = self.pins()?.into_iter().find(|pin| pin.name == name);
        let keys = keys.into_iter().chain(earlier.into_iter().flat_map(|pin| pin.keys)).collect();
        let pin = Pin { name, keys, pinned };
        let bytes = serde_json::to_vec_pretty(&pin).expect("a pin is plain data");
        self.disk.write_atomically(&self.pin_path(&pin.name), &bytes, true)?;
        Ok(Some(pin))
    }

    /// Removes a pin; gives whether there was one of this name.
    pub fn unpin(&self, name: &str) -> Result<bool, StoreError> {
        if self.remove(&self.pin_path(name))? {
            return Ok(true);
        }
        let pins = self.pins()?;
        let mut matching = pins.iter().filter(|pin| name.len() >= 8 && pin.name.starts_with(name));
        match (matching.next(), matching.next()) {
            (Some(pin), None) if Digest(pin.name.clone()).is_whole() => self.remove(&self.pin_path(&pin.name)),
            _ => Ok(false),
        }
    }

    /// Every pin, by name. A damaged one is an error: what it held must not be collected unasked.
    pub fn pins(&self) -> Result<Vec<Pin>, StoreError> {
        let mut pins = Vec::new();
        for (_, path) in self.names(&self.folder("pins"))? {
            let bytes = self.disk.read(&path).at("read", &path)?;
            let pin: Pin = serde_json::from_slice(&bytes).map_err(|error| {
                StoreError::unfit(&path, format!("is no pin: {error}; pin again or remove the file"))
            })?;
            pins.push(pin);
        }
        pins.sort_by(|a, b| a.name.cmp(&b.name));
        Ok(pins)
    }

    /// Every key that is pinned.
    pub(super) fn pinned(&self) -> Result<BTreeSet<Digest>, StoreError> {
        let pins = self.pins()?;
        let mut keys: BTreeSet<Digest> = pins.iter().flat_map(|pin| pin.keys.iter().cloned()).collect();
        if !pins.is_empty() {
            for (name, record) in self.every_record()? {
                if pins.iter().any(|pin| pin.covers(&name)) {
                    keys.insert(record.key);
                }
            }
        }
        Ok(keys)
    }

    /// The keys that bear a name now and have a result.
    fn keys_named(&self, name: &str) -> Result<BTreeSet<Digest>, StoreError> {
        let mut keys = BTreeSet::new();
        for (node, record) in self.every_record()? {
            if covers(name, &node) && self.disk.is_there(&self.manifest_path(&record.key)) {
                keys.insert(record.key);
            }
        }
        Ok(keys)
    }

    /// The only key with a result that begins with these digits.
    fn key_that_begins(&self, digits: &str) -> Result<Option<Digest>, StoreError> {
        if digits.len() < 8 || !digits.bytes().all(|digit| digit.is_ascii_hexdigit()) {
            return Ok(None);
        }
        let mut matching = self.keys()?.into_iter().filter(|key| key.0.starts_with(digits));
        Ok(matching.next().filter(|_| matching.next().is_none()))
    }

    fn pin_path(&self, name: &str) -> std::path::PathBuf {
        self.folder("pins").join(format!("{}.json", segment(name)))
    }
}

#[cfg(test)]
mod tests {
    use super::super::faults::Fault;
    use super::super::fixture::{Sandbox, key};
    use super::super::{GcPolicy, Lookup};
    use super::*;

    /// Between any two operations everything is collected that may be: what a pin then speaks of is there.
    #[test]
    fn what_is_pinned_is_there() {
        let mut gone = 0;
        for number in (0..).step_by(7) {
            let (sandbox, disk) = Sandbox::faulty();
            sandbox.publish(1, &[("data", "one")]);
            let (mut taken, mut done, other) = (0, false, Store::open(sandbox.store.root()).unwrap());
            disk.meanwhile(move |_, _| {
                // Where it would wait it comes later.
                if taken >= number && !done && other.collector_may_go() {
                    done = true;
                    let policy = GcPolicy { max_size: Some(0), ..GcPolicy::default() };
                    let plan = other.plan_gc(&policy, &|_, _| ()).unwrap();
                    other.collect_garbage(&plan, &mut |_, _| (), &mut || ()).unwrap();
                }
                taken += 1;
            });
            disk.fail_at(usize::MAX, Fault::Killed);
            let pinned = sandbox.store.pin(&key(1).0).unwrap();
            disk.undisturbed();
            let is_there = matches!(sandbox.store.lookup(&key(1)).unwrap(), Lookup::Hit(_));
            assert_eq!(pinned.is_some(), is_there, "at {number}");
            gone += usize::from(!is_there);
            if disk.heal() <= number {
                assert!(gone > 10 && is_there, "{gone} times it went before");
                break;
            }
        }
    }

    #[test]
    fn a_name_covers_what_lies_below_it() {
        let name = |trial: &str| NodeName { experiment: "maze".into(), trial: trial.into(), stage: "sft".into() };
        for pin in ["maze", "maze/sft", "maze/a=b/c,seed=1", "maze/a=b/c,seed=1/sft"] {
            assert!(covers(pin, &name("a=b/c,seed=1")), "{pin}");
        }
        for pin in ["maz", "maze2", "maze/", "maze/grpo", "maze/seed=1/sft", "maze/a=b/c,seed=1/grpo"] {
            assert!(!covers(pin, &name("a=b/c,seed=1")), "{pin}");
        }
        assert!(covers("maze/sft", &name("")));
    }
}
