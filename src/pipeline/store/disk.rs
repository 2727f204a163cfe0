//! What the store asks of a file system: everything that it reads or writes goes through [`Disk`].
//!
//! One small trait lets a test stand in for the disk, fail at any operation and lose what was not synced. It is made of
//! system calls, not of intentions: what survives a power cut is decided above it, by the order of calls.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::fmt;
use std::fs::{File, Metadata, OpenOptions, Permissions};
use std::io::{self, Write as _};
use std::os::unix::fs::{MetadataExt as _, OpenOptionsExt as _, PermissionsExt as _};
use std::path::Path;
use std::sync::{Mutex, PoisonError};
use std::time::{SystemTime, UNIX_EPOCH};

use super::FileStat;

/// What lies under a name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Sort {
    /// A plain file.
    File,
    /// A folder.
    Folder,
    /// A symbolic link.
    Link,
    /// A socket, a pipe or a device.
    Special,
}

/// What is known of a file without reading it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Stat {
    /// What it is.
    pub(super) sort: Sort,
    /// Permission bits.
    pub(super) mode: u32,
    /// How many names it has.
    pub(super) links: u64,
    /// By it a file is known to be unchanged.
    pub(super) identity: FileStat,
}

impl Stat {
    /// Its size in bytes.
    pub(super) fn size(&self) -> u64 {
        self.identity.2
    }

    /// Whether anyone may execute it.
    pub(super) fn is_executable(&self) -> bool {
        self.mode & 0o111 != 0
    }
}

/// A name in a folder.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Entry {
    /// The name.
    pub(super) name: OsString,
    /// Whether it is a folder, and no link to one.
    pub(super) is_folder: bool,
}

/// An open file to read in pieces, by several threads.
pub(super) trait Content: Send + Sync {
    /// Its stat as it is now.
    fn stat(&self) -> io::Result<Stat>;

    /// Reads some bytes from a place on; none where the file ends.
    fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<usize>;
}

/// The operations of a file system. Paths are absolute; errors are those of the system.
pub(super) trait Disk: fmt::Debug + Send + Sync {
    /// The stat of what a name stands for itself.
    fn stat(&self, path: &Path) -> io::Result<Stat>;

    /// The stat of what a name leads to through symbolic links.
    fn stat_target(&self, path: &Path) -> io::Result<Stat>;

    /// The names in a folder, in no order.
    fn list(&self, folder: &Path) -> io::Result<Vec<Entry>>;

    /// A whole file.
    fn read(&self, path: &Path) -> io::Result<Vec<u8>>;

    /// A file to read piece by piece.
    fn open(&self, path: &Path) -> io::Result<Box<dyn Content>>;

    /// Where a symbolic link points.
    fn read_link(&self, path: &Path) -> io::Result<std::path::PathBuf>;

    /// Whether this process may make and remove names in a folder.
    fn check_writable(&self, folder: &Path) -> io::Result<()>;

    /// Makes a file that is not there yet.
    fn create(&self, path: &Path, bytes: &[u8]) -> io::Result<()>;

    /// Adds bytes at the end of a file, in one write; makes it where it is not there.
    fn append(&self, path: &Path, bytes: &[u8]) -> io::Result<()>;

    /// Makes a new file with the content of another.
    fn copy(&self, from: &Path, to: &Path) -> io::Result<()>;

    /// Makes a folder in one that is there.
    fn create_folder(&self, path: &Path) -> io::Result<()>;

    /// Makes a symbolic link.
    fn link(&self, target: &Path, path: &Path) -> io::Result<()>;

    /// Gives a file or folder another name, in place of a file or an empty folder of that name.
    fn rename(&self, from: &Path, to: &Path) -> io::Result<()>;

    /// Removes a file or a link.
    fn remove_file(&self, path: &Path) -> io::Result<()>;

    /// Removes an empty folder.
    fn remove_folder(&self, path: &Path) -> io::Result<()>;

    /// Removes a folder with everything in it; links are removed and not followed, this one too. What is in it may go meanwhile.
    fn remove_tree(&self, folder: &Path) -> io::Result<()> {
        if self.stat(folder)?.sort == Sort::Link {
            return self.remove_file(folder);
        }
        for entry in self.list(folder)? {
            let path = folder.join(&entry.name);
            match if entry.is_folder { self.remove_tree(&path) } else { self.remove_file(&path) } {
                Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
                _ => {}
            }
        }
        self.remove_folder(folder)
    }

    /// Sets the permission bits of a file or folder.
    fn set_mode(&self, path: &Path, mode: u32) -> io::Result<()>;

    /// Makes the content of a file, or the names in a folder, survive a power cut.
    fn sync(&self, path: &Path) -> io::Result<()>;

    /// Makes everything on the file system of `path` survive a power cut.
    fn sync_all(&self, path: &Path) -> io::Result<()>;

    /// The time by which files are said to have changed, in nanoseconds since 1970.
    fn now(&self) -> i128 {
        let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        i128::try_from(since.as_nanos()).expect("a clock this side of the year 10^22")
    }

    /// A name of the time since the machine was last started; empty where it has none.
    fn boot(&self) -> String {
        std::fs::read_to_string("/proc/sys/kernel/random/boot_id")
            .map(|name| name.trim().to_owned())
            .unwrap_or_default()
    }

    /// The file of a lock; made where it is not there, never emptied.
    fn open_lock(&self, path: &Path) -> io::Result<File>;

    /// The file of a lock that is there, to see whether anybody has it: also where nothing may be written.
    fn open_lock_there(&self, path: &Path) -> io::Result<File>;
}

/// The file systems of this machine.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Native;

impl Disk for Native {
    fn stat(&self, path: &Path) -> io::Result<Stat> {
        std::fs::symlink_metadata(path).map(|metadata| stat_of(&metadata))
    }

    fn stat_target(&self, path: &Path) -> io::Result<Stat> {
        std::fs::metadata(path).map(|metadata| stat_of(&metadata))
    }

    fn list(&self, folder: &Path) -> io::Result<Vec<Entry>> {
        let entry = |entry: io::Result<std::fs::DirEntry>| {
            let entry = entry?;
            Ok(Entry { is_folder: entry.file_type()?.is_dir(), name: entry.file_name() })
        };
        std::fs::read_dir(folder)?.map(entry).collect()
    }

    fn read(&self, path: &Path) -> io::Result<Vec<u8>> {
        std::fs::read(path)
    }

    fn open(&self, path: &Path) -> io::Result<Box<dyn Content>> {
        Ok(Box::new(File::open(path)?))
    }

    fn read_link(&self, path: &Path) -> io::Result<std::path::PathBuf> {
        std::fs::read_link(path)
    }

    fn check_writable(&self, folder: &Path) -> io::Result<()> {
        Ok(rustix::fs::access(folder, rustix::fs::Access::WRITE_OK | rustix::fs::Access::EXEC_OK)?)
    }

    fn create(&self, path: &Path, bytes: &[u8]) -> io::Result<()> {
        OpenOptions::new().write(true).create_new(true).mode(0o644).open(path)?.write_all(bytes)
    }

    fn append(&self, path: &Path, bytes: &[u8]) -> io::Result<()> {
        OpenOptions::new().append(true).create(true).mode(0o644).open(path)?.write_all(bytes)
    }

    fn copy(&self, from: &Path, to: &Path) -> io::Result<()> {
        std::fs::copy(from, to).map(drop)
    }

    fn create_folder(&self, path: &Path) -> io::Result<()> {
        std::fs::create_dir(path)
    }

    fn link(&self, target: &Path, path: &Path) -> io::Result<()> {
        std::os::unix::fs::symlink(target, path)
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        std::fs::rename(from, to)
    }

    fn remove_file(&self, path: &Path) -> io::Result<()> {
        std::fs::remove_file(path)
    }

    fn remove_folder(&self, path: &Path) -> io::Result<()> {
        std::fs::remove_dir(path)
    }

    fn remove_tree(&self, folder: &Path) -> io::Result<()> {
        std::fs::remove_dir_all(folder)
    }

    fn set_mode(&self, path: &Path, mode: u32) -> io::Result<()> {
        std::fs::set_permissions(path, Permissions::from_mode(mode))
    }

    fn sync(&self, path: &Path) -> io::Result<()> {
        // Another descriptor than the one that wrote: the kernel syncs the file, and tells its errors to whoever asks first.
        File::open(path)?.sync_all()
    }

    fn sync_all(&self, path: &Path) -> io::Result<()> {
        // By device, open from the first time on: a descriptor hears every error since it was opened, and a new one none that
        // anybody has heard.
        static OPENED: Mutex<BTreeMap<u64, File>> = Mutex::new(BTreeMap::new());
        let folder = File::open(path)?;
        let device = folder.metadata()?.dev();
        let mut opened = OPENED.lock().unwrap_or_else(PoisonError::into_inner);
        Ok(rustix::fs::syncfs(opened.entry(device).or_insert(folder))?)
    }

    fn open_lock(&self, path: &Path) -> io::Result<File> {
        // Some network file systems lock only what is open for writing.
        OpenOptions::new().read(true).write(true).create(true).truncate(false).open(path)
    }

    fn open_lock_there(&self, path: &Path) -> io::Result<File> {
        File::open(path)
    }
}

impl Content for File {
    fn stat(&self) -> io::Result<Stat> {
        self.metadata().map(|metadata| stat_of(&metadata))
    }

    fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<usize> {
        std::os::unix::fs::FileExt::read_at(self, buffer, offset)
    }
}

fn stat_of(metadata: &Metadata) -> Stat {
    let nanoseconds = |seconds: i64, rest: i64| i128::from(seconds) * 1_000_000_000 + i128::from(rest);
    let modified = nanoseconds(metadata.mtime(), metadata.mtime_nsec());
    let changed = nanoseconds(metadata.ctime(), metadata.ctime_nsec());
    let sort = match metadata.file_type() {
        sort if sort.is_file() => Sort::File,
        sort if sort.is_dir() => Sort::Folder,
        sort if sort.is_symlink() => Sort::Link,
        _ => Sort::Special,
    };
    Stat {
        sort,
        mode: metadata.mode() & 0o7777,
        links: metadata.nlink(),
        identity: (metadata.dev(), metadata.ino(), metadata.len(), modified, changed),
    }
}
