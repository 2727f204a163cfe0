//! The work folder of a key: what must survive a kill between attempts, and where each attempt begins afresh.
//!
//! ```text
//! attempts.json   how many attempts there were, and under which conditions
//! state/          training states, where a stage has made it; whoever finds one goes on from it
//! out-<attempt>/  one folder an output; only the newest attempt's is ever looked at
//! prepared.json   what an attempt has made whose result is being made durable
//! failed/         what the last failed attempt had written, for people
//! ```

use std::collections::BTreeMap;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use serde::{Deserialize, Serialize};

use super::error::At as _;
use super::{Digest, KeyLock, Store, StoreError};

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
    /// How far the last attempt had come when this was written.
    #[serde(default)]
    pub reached: Option<Reached>,
    /// The first line of the error of the last attempt, where it failed.
    #[serde(default)]
    pub error: Option<String>,
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
}

impl Owner {
    /// This process, which begins now.
    pub(crate) fn here() -> Self {
        let host = rustix::system::uname().nodename().to_string_lossy().into_owned();
        let since = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).map_or(0, |time| time.as_secs());
        Self { process: std::process::id(), host, since }
    }
}

/// How far a stage has come.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Reached {
    /// Units done.
    pub done: u64,
    /// Units in all.
    pub total: u64,
    /// What is counted, as `steps`.
    pub unit: String,
}

impl Store {
    /// Writes down what is known of the attempts at `key`, whose lock the caller has.
    pub(crate) fn save_attempts(&self, key: &Digest, attempts: &Attempts) -> Result<(), StoreError> {
        let bytes = serde_json::to_vec_pretty(attempts).expect("plain data has a JSON form");
        self.disk.write_loosely(&self.work(key).join("attempts.json"), &bytes)
    }

    /// Keeps a stage's resolved table beside its logs, for people.
    pub(crate) fn save_config(&self, lock: &KeyLock, text: &str) -> Result<(), StoreError> {
        self.disk.write_loosely(&self.logs(lock.key()).join("config.toml"), text.as_bytes())
    }

    /// Adds a line to the log of a key.
    pub(crate) fn append_log(&self, key: &Digest, line: &str) -> Result<(), StoreError> {
        let path = self.logs(key).join("log.txt");
        self.disk.append(&path, format!("{line}\n").as_bytes()).at("write", &path)
    }

    /// What is known of earlier attempts at `key`; `None` where there were none, or nothing readable is left of them.
    pub fn attempts(&self, key: &Digest) -> Result<Option<Attempts>, StoreError> {
        let path = self.work(key).join("attempts.json");
        match self.disk.read(&path) {
            Ok(bytes) => Ok(serde_json::from_slice(&bytes).ok()),
            Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error).at("read", &path),
        }
    }

    /// Makes the empty folder in which attempt `number` puts its outputs, after removing those of attempts before it.
    pub(crate) fn begin_attempt(&self, lock: &KeyLock, number: u32, outputs: &[&str]) -> Result<PathBuf, StoreError> {
        let work = self.work(lock.key());
        self.disk.ensure_folder(&self.logs(lock.key()), false)?;
        match self.disk.create_folder(&work) {
            Err(error) if error.kind() == ErrorKind::AlreadyExists => {
                for entry in self.disk.list(&work).at("list", &work)? {
                    if entry.name.as_encoded_bytes().starts_with(b"out-") {
                        self.disk.clear(&work.join(&entry.name))?;
                    }
                }
            }
            made => made.at("create the folder", &work)?,
        }
        let out = work.join(format!("out-{number}"));
        for folder in std::iter::once(out.clone()).chain(outputs.iter().map(|name| out.join(name))) {
            self.disk.create_folder(&folder).at("create the folder", &folder)?;
        }
        Ok(out)
    }

    /// Drops the training states of a key, so that its stage begins anew.
    pub(crate) fn forget_state(&self, lock: &KeyLock) -> Result<(), StoreError> {
        self.disk.clear(&self.state(lock.key()))
    }

    /// Drops what an attempt has written; its training states stay.
    pub(crate) fn drop_out(&self, out: &Path) -> Result<(), StoreError> {
        self.disk.clear(out)
    }

    /// Keeps what a failed attempt has written, in place of what an earlier one left.
    pub(crate) fn keep_failed(&self, lock: &KeyLock, out: &Path) -> Result<(), StoreError> {
        let failed = self.work(lock.key()).join("failed");
        self.disk.clear(&failed)?;
        self.disk.rename(out, &failed).at("keep the failed attempt's files in", &failed)
    }
}
