//! The disk in memory as the store asks for it: one system call each.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustix::io::Errno;

use super::super::disk::{Content, Disk, Entry, Stat};
use super::opened::Opened;
use super::{Body, Names, OsString, Volatile};

impl Disk for Volatile {
    fn stat(&self, path: &Path) -> io::Result<Stat> {
        let state = self.state.lock().unwrap();
        Ok(state.stat(state.find(path, false)?))
    }

    fn stat_target(&self, path: &Path) -> io::Result<Stat> {
        let state = self.state.lock().unwrap();
        Ok(state.stat(state.find(path, true)?))
    }

    fn list(&self, folder: &Path) -> io::Result<Vec<Entry>> {
        let state = self.state.lock().unwrap();
        let entry = |(name, number): (&OsString, &u64)| Entry {
            name: name.clone(),
            is_folder: matches!(state.inode(*number).body, Body::Folder { .. }),
        };
        Ok(state.names(state.find(folder, true)?)?.iter().map(entry).collect())
    }

    fn read(&self, path: &Path) -> io::Result<Vec<u8>> {
        Ok(self.state.lock().unwrap().bytes(path)?.1.to_vec())
    }

    fn open(&self, path: &Path) -> io::Result<Box<dyn Content>> {
        let state = self.state.lock().unwrap();
        let (number, bytes) = state.bytes(path)?;
        Ok(Box::new(Opened { stat: state.stat(number), bytes }))
    }

    fn read_link(&self, path: &Path) -> io::Result<PathBuf> {
        let state = self.state.lock().unwrap();
        match &state.inode(state.find(path, false)?).body {
            Body::Link(target) => Ok(target.clone()),
            _ => Err(Errno::INVAL.into()),
        }
    }

    fn check_writable(&self, folder: &Path) -> io::Result<()> {
        self.stat_target(folder).map(drop)
    }

    fn create(&self, path: &Path, bytes: &[u8]) -> io::Result<()> {
        let body = Body::File { bytes: Arc::new(bytes.to_vec()), synced: None };
        self.state.lock().unwrap().add(path, body, 0o644).map(drop)
    }

    fn append(&self, path: &Path, bytes: &[u8]) -> io::Result<()> {
        let mut state = self.state.lock().unwrap();
        match state.bytes(path) {
            Ok((number, old)) => state.write(number, [old.as_slice(), bytes].concat()),
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                let body = Body::File { bytes: Arc::new(bytes.to_vec()), synced: None };
                state.add(path, body, 0o644).map(drop)
            }
            Err(error) => Err(error),
        }
    }

    fn copy(&self, from: &Path, to: &Path) -> io::Result<()> {
        let bytes = self.read(from)?;
        self.create(to, &bytes)
    }

    fn create_folder(&self, path: &Path) -> io::Result<()> {
        let body = Body::Folder { names: Names::new(), synced: Names::new() };
        self.state.lock().unwrap().add(path, body, 0o755).map(drop)
    }

    fn link(&self, target: &Path, path: &Path) -> io::Result<()> {
        self.state.lock().unwrap().add(path, Body::Link(target.to_owned()), 0o777).map(drop)
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        let mut state = self.state.lock().unwrap();
        let (old, new) = (state.place(from)?, state.place(to)?);
        let number = *state.names(old.0)?.get(&old.1).ok_or(Errno::NOENT)?;
        let is_folder = matches!(state.inode(number).body, Body::Folder { .. });
        if is_folder && to.starts_with(from) && from != to {
            return Err(Errno::INVAL.into());
        }
        if from != to && from.starts_with(to) {
            return Err(Errno::NOTEMPTY.into());
        }
        if let Some(replaced) = state.names(new.0)?.get(&new.1) {
            match (is_folder, &state.inode(*replaced).body) {
                _ if *replaced == number => return Ok(()),
                (true, Body::Folder { names, .. }) if !names.is_empty() => return Err(Errno::NOTEMPTY.into()),
                (true, Body::Folder { .. }) => {}
                (true, _) => return Err(Errno::NOTDIR.into()),
                (false, Body::Folder { .. }) => return Err(Errno::ISDIR.into()),
                (false, _) => {}
            }
        }
        state.change(vec![(old.0, old.1, None), (new.0, new.1, Some(number))]);
        Ok(())
    }

    fn remove_file(&self, path: &Path) -> io::Result<()> {
        let mut state = self.state.lock().unwrap();
        let (folder, name) = state.place(path)?;
        let number = *state.names(folder)?.get(&name).ok_or(Errno::NOENT)?;
        if matches!(state.inode(number).body, Body::Folder { .. }) {
            return Err(Errno::ISDIR.into());
        }
        state.change(vec![(folder, name, None)]);
        Ok(())
    }

    fn remove_folder(&self, path: &Path) -> io::Result<()> {
        let mut state = self.state.lock().unwrap();
        let (folder, name) = state.place(path)?;
        let number = *state.names(folder)?.get(&name).ok_or(Errno::NOENT)?;
        if !state.names(number)?.is_empty() {
            return Err(Errno::NOTEMPTY.into());
        }
        state.change(vec![(folder, name, None)]);
        Ok(())
    }

    fn set_mode(&self, path: &Path, mode: u32) -> io::Result<()> {
        let mut state = self.state.lock().unwrap();
        let (number, now) = (state.find(path, true)?, state.tick());
        let inode = state.inode_mut(number);
        (inode.mode, inode.changed) = (mode, now);
        Ok(())
    }

    fn sync(&self, path: &Path) -> io::Result<()> {
        let mut state = self.state.lock().unwrap();
        let number = state.find(path, true)?;
        state.sync(number);
        Ok(())
    }

    fn sync_all(&self, path: &Path) -> io::Result<()> {
        let mut state = self.state.lock().unwrap();
        state.find(path, true)?;
        state.sync_all();
        Ok(())
    }

    fn now(&self) -> i128 {
        self.state.lock().unwrap().clock
    }

    fn boot(&self) -> String {
        self.state.lock().unwrap().boots.to_string()
    }

    fn open_lock(&self, path: &Path) -> io::Result<File> {
        let mut state = self.state.lock().unwrap();
        let number = match state.find(path, true) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                state.add(path, Body::File { bytes: Arc::default(), synced: None }, 0o644)?
            }
            found => found?,
        };
        let mut locks = self.locks.lock().unwrap();
        let new = || rustix::fs::memfd_create("lock", rustix::fs::MemfdFlags::CLOEXEC).unwrap().into();
        let file = locks.entry(number).or_insert_with(new);
        // Opened anew, because a lock is that of an open file and not of its copies.
        File::options().read(true).write(true).open(format!("/proc/self/fd/{}", file.as_raw_fd()))
    }

    fn open_lock_there(&self, path: &Path) -> io::Result<File> {
        self.stat(path)?;
        self.open_lock(path)
    }
}
