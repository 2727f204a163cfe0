//! The work folder of a key: what must survive a kill between attempts, and where each attempt begins afresh.
//!
//! ```text
//! attempts.json   how many attempts there were, and under which conditions
//! state/          training states; whoever finds one goes on from it
//! out-<attempt>/  one folder an output; only the newest attempt's is ever looked at
//! failed/         what the last failed attempt had written, for people
//! ```

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use serde::{Deserialize, Serialize};

use super::error::At as _;
use super::{Digest, KeyLock, Store, StoreError, remove_tree, write_atomically};

/// What is known of the attempts at a key that has no result yet.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Attempts {
    /// How many were begun.
    pub attempts: u32,
    /// Threads of the attempt from which a training state stems.
    pub threads: usize,
    /// Its device: `cpu` or `cuda:0`.
    pub device: String,
    /// Wall seconds of all attempts, as far as they could be written down.
    pub seconds: f64,
    /// What the last attempt computed with.
    pub numerics: BTreeMap<String, String>,
    /// Who makes the attempt that runs now; for people alone, since only the lock tells whether one runs.
    #[serde(default)]
    pub owner: Option<Owner>,
}

/// A process that works on a key.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Owner {
    /// Its number.
    pub process: u32,
    /// Its machine.
    pub host: String,
    /// When it began, in seconds since 1970.
    pub since: u64,
    /// Units done, units in all, and what is counted, as of some seconds ago.
    pub progress: Option<(u64, u64, String)>,
}

impl Owner {
    /// This process, which begins now.
    pub(crate) fn here() -> Self {
        let host = rustix::system::uname().nodename().to_string_lossy().into_owned();
        let since = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).map_or(0, |time| time.as_secs());
        Self { process: std::process::id(), host, since, progress: None }
    }
}

impl Attempts {
    /// Writes them into a work folder.
    pub(crate) fn save(&self, work: &Path) -> Result<(), StoreError> {
        let bytes = serde_json::to_vec_pretty(self).expect("plain data has a JSON form");
        write_atomically(&work.join("attempts.json"), &bytes, false)
    }
}

impl Store {
    /// What is known of earlier attempts at `key`; `None` where there were none, or nothing readable is left of them.
    pub fn attempts(&self, key: &Digest) -> Result<Option<Attempts>, StoreError> {
        let path = self.work(key).join("attempts.json");
        match std::fs::read(&path) {
            Ok(bytes) => Ok(serde_json::from_slice(&bytes).ok()),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error).at("read", &path),
        }
    }

    /// Makes the empty folder in which attempt `number` puts its outputs, after removing those of attempts before it.
    pub(crate) fn begin_attempt(&self, lock: &KeyLock, number: u32, outputs: &[&str]) -> Result<PathBuf, StoreError> {
        let work = self.work(lock.key());
        let logs = self.logs(lock.key());
        for folder in [&self.state(lock.key()), &logs] {
            std::fs::create_dir_all(folder).at("create the folder", folder)?;
        }
        for entry in std::fs::read_dir(&work).at("list", &work)? {
            let entry = entry.at("list", &work)?;
            if entry.file_name().as_encoded_bytes().starts_with(b"out-") {
                remove_tree(&entry.path())?;
            }
        }
        let out = work.join(format!("out-{number}"));
        for folder in std::iter::once(out.clone()).chain(outputs.iter().map(|name| out.join(name))) {
            std::fs::create_dir(&folder).at("create the folder", &folder)?;
        }
        Ok(out)
    }

    /// Drops the training states of a key, so that its stage begins anew.
    pub(crate) fn forget_state(&self, lock: &KeyLock) -> Result<(), StoreError> {
        remove_tree(&self.state(lock.key()))
    }

    /// Drops what an attempt has written; its training states stay.
    pub(crate) fn drop_out(out: &Path) -> Result<(), StoreError> {
        remove_tree(out)
    }

    /// Keeps what a failed attempt has written, in place of what an earlier one left.
    pub(crate) fn keep_failed(&self, lock: &KeyLock, out: &Path) -> Result<(), StoreError> {
        let failed = self.work(lock.key()).join("failed");
        remove_tree(&failed)?;
        std::fs::rename(out, &failed).at("keep the failed attempt's files in", &failed)
    }
}
