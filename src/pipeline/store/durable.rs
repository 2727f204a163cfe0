//! Writes made of several operations of a [`Disk`], in the order that lets a kill or a power cut do no harm.

use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use super::StoreError;
use super::disk::{Disk, Sort};
use super::error::At as _;

impl dyn Disk + '_ {
    /// Replaces a file as a whole: readers see the old or the new one. `durable` survives a power cut as well.
    pub(super) fn write_atomically(&self, path: &Path, bytes: &[u8], durable: bool) -> Result<(), StoreError> {
        let folder = path.parent().unwrap_or(Path::new("."));
        let written = |new: &Path| {
            self.create(new, bytes)?;
            if durable { self.sync(new) } else { Ok(()) }
        };
        let new = self.beside(folder, ".new-", &written).at("write", path)?;
        if let Err(error) = self.rename(&new, path) {
            let _ = self.remove_file(&new);
            return Err(error).at("write", path);
        }
        if durable { self.sync(folder).at("write", folder) } else { Ok(()) }
    }

    /// Writes a file that counts as absent where a kill cuts it short: as a whole only where there is one already.
    pub(super) fn write_loosely(&self, path: &Path, bytes: &[u8]) -> Result<(), StoreError> {
        match self.create(path, bytes) {
            Err(error) if error.kind() == ErrorKind::AlreadyExists => self.write_atomically(path, bytes, false),
            other => other.at("write", path),
        }
    }

    /// Makes something under a new name of `folder` that begins with `prefix`; gives its path. What a failure leaves half
    /// made is removed where it is a file.
    pub(super) fn beside(
        &self,
        folder: &Path,
        prefix: &str,
        make: &dyn Fn(&Path) -> std::io::Result<()>,
    ) -> std::io::Result<PathBuf> {
        static MADE: AtomicU64 = AtomicU64::new(0);
        loop {
            let number = MADE.fetch_add(1, Ordering::Relaxed);
            let path = folder.join(format!("{prefix}{}-{number}", std::process::id()));
            match make(&path) {
                Ok(()) => return Ok(path),
                // An earlier process of this number, or one of another host, was killed in the middle of the same.
                Err(error) if matches!(error.kind(), ErrorKind::AlreadyExists | ErrorKind::DirectoryNotEmpty) => {}
                Err(error) => {
                    let _ = self.remove_file(&path);
                    return Err(error);
                }
            }
        }
    }

    /// Makes a folder and those above it. Where `durable`, new ones survive a power cut.
    pub(super) fn ensure_folder(&self, folder: &Path, durable: bool) -> Result<(), StoreError> {
        let mut made = self.create_folder(folder);
        if let (Err(error), Some(above)) = (&made, folder.parent())
            && error.kind() == ErrorKind::NotFound
        {
            self.ensure_folder(above, durable)?;
            made = self.create_folder(folder);
        }
        match made {
            Ok(()) => {}
            Err(error) if error.kind() == ErrorKind::AlreadyExists => {
                return match self.stat_target(folder) {
                    Ok(stat) if stat.sort == Sort::Folder => Ok(()),
                    Ok(_) => Err(error),
                    Err(unknown) => Err(unknown),
                }
                .at("create the folder", folder);
            }
            Err(error) => return Err(error).at("create the folder", folder),
        }
        match folder.parent() {
            Some(above) if durable => self.sync(above).at("write", above),
            _ => Ok(()),
        }
    }

    /// Removes a folder with everything in it, also what a program has made read-only. It may be gone already.
    pub(super) fn clear(&self, folder: &Path) -> Result<(), StoreError> {
        match self.remove_tree(folder) {
            Err(error) if error.kind() == ErrorKind::PermissionDenied => {
                let mut open = vec![folder.to_owned()];
                while let Some(folder) = open.pop() {
                    self.set_mode(&folder, 0o755).at("change the mode of", &folder)?;
                    let entries = self.list(&folder).at("list", &folder)?;
                    open.extend(entries.iter().filter(|entry| entry.is_folder).map(|entry| folder.join(&entry.name)));
                }
                self.remove_tree(folder).at("remove", folder)
            }
            Err(error) if error.kind() == ErrorKind::NotFound => Ok(()),
            other => other.at("remove", folder),
        }
    }

    /// Whether there is a folder, or a link to one.
    pub(super) fn is_folder(&self, path: &Path) -> bool {
        self.stat_target(path).is_ok_and(|stat| stat.sort == Sort::Folder)
    }

    /// Whether there is anything of this name.
    pub(super) fn is_there(&self, path: &Path) -> bool {
        self.stat(path).is_ok()
    }
}

#[cfg(test)]
mod tests {
    use super::super::disk::Native;
    use super::*;

    #[test]
    fn a_name_that_a_killed_process_has_left_is_passed_over() {
        let place = tempfile::tempdir().unwrap();
        let disk: &dyn Disk = &Native;
        let first = disk.beside(place.path(), "a-", &|path| disk.create_folder(path)).unwrap();
        let (prefix, number) = first.to_str().unwrap().rsplit_once('-').unwrap();
        let number: u64 = number.parse().unwrap();
        for next in number + 1..number + 100 {
            std::fs::create_dir_all(format!("{prefix}-{next}/full")).unwrap();
        }
        std::fs::write(first.join("file"), "x").unwrap();
        let moved = disk.beside(place.path(), "a-", &|path| disk.rename(&first, path)).unwrap();
        assert!(moved.join("file").exists() && !moved.join("full").exists());
    }
}
