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

    /// Removes a folder with everything in it, also what a program has made read-only. It may be gone already, or go meanwhile
    /// because another process removes it as well.
    pub(super) fn clear(&self, folder: &Path) -> Result<(), StoreError> {
        match self.remove_tree(folder) {
            Err(error) if error.kind() == ErrorKind::PermissionDenied => {
                self.open_tree(folder)?;
                or_gone(self.remove_tree(folder)).at("remove", folder).map(drop)
            }
            other => or_gone(other).at("remove", folder).map(drop),
        }
    }

    /// Makes every folder of a tree one that may be written.
    fn open_tree(&self, folder: &Path) -> Result<(), StoreError> {
        let mut open = vec![folder.to_owned()];
        while let Some(folder) = open.pop() {
            or_gone(self.set_mode(&folder, 0o755)).at("change the mode of", &folder)?;
            let entries = or_gone(self.list(&folder)).at("list", &folder)?.unwrap_or_default();
            open.extend(entries.iter().filter(|entry| entry.is_folder).map(|entry| folder.join(&entry.name)));
        }
        Ok(())
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

/// The answer, or none where what was asked of is not there.
fn or_gone<T>(answer: std::io::Result<T>) -> std::io::Result<Option<T>> {
    match answer {
        Ok(answer) => Ok(Some(answer)),
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error),
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::super::disk::Native;
    use super::super::faults::{Fault, Faulty};
    use super::*;

    #[test]
    fn what_another_process_clears_meanwhile_is_gone_as_wanted() {
        let place = tempfile::tempdir().unwrap();
        let tree = place.path().join("tree");
        for number in 0.. {
            std::fs::create_dir_all(tree.join("a/b")).unwrap();
            std::fs::write(tree.join("a/b/c"), "x").unwrap();
            std::fs::write(tree.join("d"), "x").unwrap();
            let disk = Faulty::new(Arc::new(Native));
            let (mut taken, other) = (0, tree.clone());
            disk.meanwhile(move |_, _| {
                if taken == number {
                    std::fs::remove_dir_all(&other).unwrap();
                }
                taken += 1;
            });
            // The fourth operation: as for a folder that a program has made read-only.
            disk.fail_at(4, Fault::Denied);
            (&disk as &dyn Disk).clear(&tree).unwrap_or_else(|error| panic!("at {number}: {error}"));
            assert!(!tree.exists(), "at {number}");
            if disk.heal() <= number {
                assert!(number > 12, "{number} operations");
                break;
            }
        }
    }

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
