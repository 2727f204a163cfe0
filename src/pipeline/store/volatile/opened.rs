//! A file of the disk in memory as it was opened: what is written later is not seen through it.

use std::io;
use std::sync::Arc;

use super::super::disk::{Content, Stat};

/// A file as it was opened.
pub(super) struct Opened {
    pub(super) stat: Stat,
    pub(super) bytes: Arc<Vec<u8>>,
}

impl Content for Opened {
    fn stat(&self) -> io::Result<Stat> {
        Ok(self.stat)
    }

    fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<usize> {
        let from = usize::try_from(offset).unwrap().min(self.bytes.len());
        let read = buffer.len().min(self.bytes.len() - from);
        buffer[..read].copy_from_slice(&self.bytes[from..from + read]);
        Ok(read)
    }
}
