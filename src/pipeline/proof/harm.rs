//! What befalls a store: deletions, flips, truncations, of results and of everything around them.

use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use proptest::prelude::*;

/// One misfortune.
#[derive(Clone, Copy, Debug)]
pub(super) enum Harm {
    /// A file of a result or its manifest; `place` chooses it and the byte.
    File { manifests: bool, place: u16, sort: Sort },
    /// A whole object.
    Object { place: u16 },
    /// Any other file: locks, logs, records, the cache, what is left of work.
    Other { place: u16, sort: Sort },
    /// A whole folder other than the results.
    Folder { place: u16 },
}

/// What is done to a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Sort {
    Delete,
    /// One byte; mode and mtime are as before.
    Flip,
    Truncate,
    Append,
    /// Its mode.
    Executable,
}

pub(super) fn harms() -> impl Strategy<Value = Harm> {
    let sort = || {
        prop_oneof![
            Just(Sort::Delete),
            Just(Sort::Flip),
            Just(Sort::Truncate),
            Just(Sort::Append),
            Just(Sort::Executable)
        ]
    };
    prop_oneof![
        6 => (proptest::bool::ANY, any::<u16>(), sort())
            .prop_map(|(manifests, place, sort)| Harm::File { manifests, place, sort }),
        2 => any::<u16>().prop_map(|place| Harm::Object { place }),
        3 => (any::<u16>(), sort()).prop_map(|(place, sort)| Harm::Other { place, sort }),
        2 => any::<u16>().prop_map(|place| Harm::Folder { place }),
    ]
}

impl Harm {
    /// Does it to the store in `place`.
    pub(super) fn to(self, place: &Path) {
        let store = place.join("store");
        settle(place);
        match self {
            Self::File { manifests, place, sort } => {
                let files = files(&store.join(if manifests { "manifests" } else { "objects" }));
                if let Some(file) = pick(&files, place) {
                    // A manifest's mode is nobody's promise.
                    let sort = if manifests && sort == Sort::Executable { Sort::Flip } else { sort };
                    spoil(file, sort, place);
                }
            }
            Self::Object { place } => {
                let shelves = entries(&store.join("objects"));
                let objects: Vec<PathBuf> = shelves.iter().flat_map(|shelf| entries(shelf)).collect();
                if let Some(object) = pick(&objects, place) {
                    remove(object);
                }
            }
            Self::Other { place, sort } => {
                let mut files: Vec<PathBuf> = others(&store).iter().flat_map(|folder| files(folder)).collect();
                files.sort();
                if let Some(file) = pick(&files, place) {
                    spoil(file, sort, place);
                }
            }
            Self::Folder { place } => {
                if let Some(folder) = pick(&others(&store), place) {
                    remove(folder);
                }
            }
        }
    }
}

/// Waits until the disk's clock has moved: a change within one tick of it cannot be seen in any time.
fn settle(place: &Path) {
    use std::os::unix::fs::MetadataExt as _;
    let (before, after) = (place.join("before"), place.join("after"));
    std::fs::write(&before, "").unwrap();
    let times = |path: &Path| std::fs::metadata(path).map(|metadata| (metadata.ctime(), metadata.ctime_nsec()));
    loop {
        std::fs::write(&after, "").unwrap();
        if times(&before).unwrap() != times(&after).unwrap() {
            return;
        }
        std::thread::sleep(std::time::Duration::from_millis(1));
    }
}

/// Changes a byte of one file of a result.
pub(super) fn rot(store: &Path, place: u16) {
    if let Some(file) = pick(&files(&store.join("objects")), place) {
        spoil(file, Sort::Flip, place);
    }
}

fn spoil(file: &Path, sort: Sort, place: u16) {
    let metadata = std::fs::symlink_metadata(file).unwrap();
    if metadata.is_symlink() || sort == Sort::Delete {
        return std::fs::remove_file(file).unwrap();
    }
    let (mode, modified) = (metadata.permissions(), metadata.modified().unwrap());
    let mut bytes = std::fs::read(file).unwrap();
    let at = if bytes.is_empty() { 0 } else { usize::from(place) * 7919 % bytes.len() };
    match sort {
        Sort::Flip if !bytes.is_empty() => bytes[at] ^= 1 << (place % 8),
        Sort::Truncate => bytes.truncate(at),
        Sort::Append => bytes.push(b'x'),
        Sort::Delete | Sort::Flip | Sort::Executable => {}
    }
    std::fs::set_permissions(file, std::fs::Permissions::from_mode(0o644)).unwrap();
    if sort != Sort::Executable {
        std::fs::write(file, bytes).unwrap();
    }
    set_modified(file, modified);
    let mode = if sort == Sort::Executable { std::fs::Permissions::from_mode(0o555) } else { mode };
    std::fs::set_permissions(file, mode).unwrap();
}

fn set_modified(file: &Path, modified: SystemTime) {
    std::fs::File::options().append(true).open(file).unwrap().set_modified(modified).unwrap();
}

fn pick(paths: &[PathBuf], place: u16) -> Option<&PathBuf> {
    (!paths.is_empty()).then(|| &paths[usize::from(place) % paths.len()])
}

/// Everything of a store but its results and its format.
fn others(store: &Path) -> Vec<PathBuf> {
    let kept = ["FORMAT", "objects", "manifests", "quarantine"];
    entries(store).into_iter().filter(|path| !kept.iter().any(|name| path.ends_with(name))).collect()
}

fn entries(folder: &Path) -> Vec<PathBuf> {
    let Ok(found) = std::fs::read_dir(folder) else { return Vec::new() };
    let mut found: Vec<PathBuf> = found.map(|entry| entry.unwrap().path()).collect();
    found.sort();
    found
}

/// Every file below a folder.
fn files(folder: &Path) -> Vec<PathBuf> {
    let (mut found, mut open) = (Vec::new(), vec![folder.to_owned()]);
    while let Some(next) = open.pop() {
        for path in entries(&next) {
            let is_folder = std::fs::symlink_metadata(&path).is_ok_and(|metadata| metadata.is_dir());
            if is_folder { open.push(path) } else { found.push(path) }
        }
    }
    found.sort();
    found
}

/// Whether any file below a folder may be executed.
pub(super) fn is_executable(folder: &Path) -> bool {
    let mode = |file: &PathBuf| std::fs::metadata(file).map_or(0, |metadata| metadata.permissions().mode());
    files(folder).iter().any(|file| mode(file) & 0o111 != 0)
}

/// Removes a file or folder, read-only ones too.
pub(super) fn remove(path: &Path) {
    let _ = std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o755));
    if path.is_dir() {
        for entry in entries(path) {
            remove(&entry);
        }
        let _ = std::fs::remove_dir(path);
    } else {
        let _ = std::fs::remove_file(path);
    }
}

/// Copies a folder while others write in it: what vanishes meanwhile is left out.
pub(super) fn copy(from: &Path, to: &Path) {
    let Ok(metadata) = std::fs::symlink_metadata(from) else { return };
    if metadata.is_dir() {
        let _ = std::fs::create_dir(to);
        for entry in entries(from) {
            copy(&entry, &to.join(entry.file_name().unwrap()));
        }
        let _ = std::fs::set_permissions(to, metadata.permissions());
    } else if let Ok(target) = std::fs::read_link(from) {
        let _ = std::os::unix::fs::symlink(target, to);
    } else {
        let _ = std::fs::copy(from, to);
    }
}
