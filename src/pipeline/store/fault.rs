//! Places at which a test may make the commit protocol fail. Outside tests they are nothing.

use std::path::Path;

use super::StoreError;

/// Counts the steps of a commit and fails at the one that a test names.
#[derive(Debug, Default)]
pub(super) struct Faults {
    #[cfg(test)]
    pub(super) script: std::sync::Mutex<Script>,
}

/// Which steps fail.
#[cfg(test)]
#[derive(Debug, Default)]
pub(super) struct Script {
    /// Steps taken so far.
    pub(super) taken: usize,
    /// The first step to fail, from 0.
    pub(super) fail_at: Option<usize>,
    /// Whether every later step fails too, as after a kill.
    pub(super) dead: bool,
}

impl Faults {
    /// Stands before one operation on `path`.
    #[cfg(test)]
    pub(super) fn step(&self, path: &Path) -> Result<(), StoreError> {
        let mut script = self.script.lock().unwrap();
        let step = script.taken;
        script.taken += 1;
        let fails = script.fail_at.is_some_and(|at| step == at || (script.dead && step > at));
        if !fails {
            return Ok(());
        }
        let cause = rustix::io::Errno::NOSPC.into();
        Err(StoreError::Io { action: "write", path: path.to_owned(), cause })
    }

    /// Stands before one operation on `path`.
    #[cfg(not(test))]
    #[inline]
    #[expect(clippy::unused_self, clippy::unnecessary_wraps, reason = "its other half is a test's")]
    pub(super) fn step(&self, _path: &Path) -> Result<(), StoreError> {
        Ok(())
    }
}
