//! One process and one thread at a time works on a key: `flock` on a file of `locks/`.
//!
//! The kernel frees a lock with its process, however that ends, and lock files are never removed: a file that is gone
//! while another process waits for it would be two locks. Descriptors are closed in programs that a stage starts.

use std::fs::{File, TryLockError};
use std::io::ErrorKind;

use super::error::At as _;
use super::{Digest, Store, StoreError};

/// The right to work on a key, until it is dropped.
#[derive(Debug)]
pub struct KeyLock {
    key: Digest,
    file: File,
}

impl KeyLock {
    /// The key.
    pub fn key(&self) -> &Digest {
        &self.key
    }
}

impl Drop for KeyLock {
    fn drop(&mut self) {
        // Closing alone is not enough: a program that another thread is just starting holds a copy of the descriptor
        // for a moment. An error here cannot be acted upon, and the close that follows frees the lock a little later.
        if let Err(error) = self.file.unlock() {
            tracing::debug!(key = %self.key, %error, "cannot unlock");
        }
    }
}

impl Store {
    /// Waits for the right to work on `key`.
    pub fn lock(&self, key: &Digest) -> Result<KeyLock, StoreError> {
        let file = self.lock_file(key)?;
        loop {
            match file.lock() {
                Ok(()) => return Ok(KeyLock { key: key.clone(), file }),
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => return Err(error).at("lock", &self.folder("locks").join(&key.0)),
            }
        }
    }

    /// Waits for the right to put the object of this digest aside.
    pub(super) fn lock_object(&self, digest: &Digest) -> Result<KeyLock, StoreError> {
        self.lock(&Digest(format!("object-{digest}")))
    }

    /// The right to work on `key`, or `None` while another has it.
    pub fn try_lock(&self, key: &Digest) -> Result<Option<KeyLock>, StoreError> {
        let file = self.lock_file(key)?;
        loop {
            match file.try_lock() {
                Ok(()) => return Ok(Some(KeyLock { key: key.clone(), file })),
                Err(TryLockError::WouldBlock) => return Ok(None),
                Err(TryLockError::Error(error)) if error.kind() == ErrorKind::Interrupted => {}
                Err(TryLockError::Error(error)) => return Err(error).at("lock", &self.folder("locks").join(&key.0)),
            }
        }
    }

    fn lock_file(&self, key: &Digest) -> Result<File, StoreError> {
        let path = self.folder("locks").join(&key.0);
        self.disk.open_lock(&path).at("open the lock", &path)
    }
}
