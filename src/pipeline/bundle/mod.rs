//! An experiment as one file that runs elsewhere: its TOML files, the user's files that it names, its results.
//!
//! ```text
//! bundle.json                what is in it: versions, experiments, run records, and size and digest of every other entry; sealed
//! files/<path>               the TOML files and what they name, as they lie to each other
//! logs/<key>/<path>          where asked for
//! manifests/<key>.json       results, without what belongs to one disk
//! objects/<digest>/<path>    their content
//! ```
//!
//! It is a tar file, compressed by zstd where its name says so, and it is reproducible: entries are sorted, bear no time and no
//! owner, and equal content gives equal bytes. A bundle is verified while it is packed. It is unpacked into a folder of the
//! store's where nobody looks, every digest is checked there, and only then does anything become visible: results through the
//! store's own commit protocol, files never in place of others.

mod layout;
mod pack;
mod unpack;

pub use layout::Layout;
pub use pack::{PackReport, Packing, pack};
pub use unpack::{ImportReport, Waits, check, import};

use std::collections::BTreeMap;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::pipeline::plan::NodeName;
use crate::pipeline::store::{Digest, StoreError};

/// The version of the layout of bundles.
const FORMAT: u32 = 1;

/// The largest list of contents that is read or written: some million entries.
const LARGEST_CONTENTS: u64 = 1 << 28;

/// The first entry.
const CONTENTS: &str = "bundle.json";

/// What a bundle holds.
#[derive(Clone, Debug, Serialize, Deserialize)]
struct Contents {
    /// [`FORMAT`].
    format: u32,
    /// The version of the program that packed it.
    pipe: String,
    /// The layout of the store that it was packed from.
    store: String,
    /// The version of the mapping from seeds to random numbers.
    rng_abi: u32,
    /// The experiments' files, as entries below `files/` without that.
    experiments: Vec<String>,
    /// What each stage was in its last run.
    records: Vec<Record>,
    /// Every other entry.
    entries: BTreeMap<String, Entry>,
}

/// An entry.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Entry {
    /// Bytes.
    size: u64,
    /// BLAKE3 of the content.
    digest: Digest,
    /// Whether it may be executed.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    executable: bool,
}

/// A run record whose file is an entry below `files/`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Record {
    name: NodeName,
    recipe: Digest,
    key: Digest,
    kind: String,
    file: String,
}

/// Why a bundle cannot be packed or unpacked.
#[derive(Debug, thiserror::Error)]
pub enum BundleError {
    /// The files cannot be laid out so that they read elsewhere as they read here.
    #[error("{0}")]
    Layout(String),
    /// A result is not what was stored.
    #[error("the result `{key}` is damaged: {what}", key = key.short())]
    Damaged {
        /// Its key.
        key: Digest,
        /// What is wrong, naming the file.
        what: String,
    },
    /// A file changed while it was packed.
    #[error("`{}` changed while it was packed", .0.display())]
    Changed(PathBuf),
    /// The file is no bundle, or not all of one.
    #[error("`{}` {problem}", file.display())]
    Broken {
        /// The bundle.
        file: PathBuf,
        /// What is wrong with it.
        problem: String,
    },
    /// Files stand where those of the bundle would go, and say something else.
    #[error("{} would take the place of {}", many(.0), first(.0))]
    Occupied(Vec<PathBuf>),
    /// There is no room for what it holds.
    #[error("`{}` holds {needed} bytes, and the disk of `{}` has room for {free}", file.display(), root.display())]
    NoRoom {
        /// The bundle.
        file: PathBuf,
        /// What it holds.
        needed: u64,
        /// The store.
        root: PathBuf,
        /// What fits.
        free: u64,
    },
    /// The system refused an operation on a file.
    #[error("cannot {action} `{}`: {cause}", path.display())]
    Io {
        /// What was tried, as a verb.
        action: &'static str,
        /// The file or folder.
        path: PathBuf,
        /// What the system said.
        cause: std::io::Error,
    },
    /// The store refused.
    #[error(transparent)]
    Store(#[from] StoreError),
}

fn many(paths: &[PathBuf]) -> String {
    match paths.len() {
        1 => "a file of the bundle".to_owned(),
        count => format!("{count} files of the bundle"),
    }
}

fn first(paths: &[PathBuf]) -> String {
    let shown: Vec<String> = paths.iter().take(5).map(|path| format!("`{}`", path.display())).collect();
    let more = if paths.len() > shown.len() { ", ..." } else { "" };
    let differ = if paths.len() == 1 { "which differs" } else { "which differ" };
    format!("{}{more}, {differ}", shown.join(", "))
}

/// Adds the file and the action to an error of the system.
trait At<T> {
    fn at(self, action: &'static str, path: &std::path::Path) -> Result<T, BundleError>;
}

impl<T> At<T> for Result<T, std::io::Error> {
    fn at(self, action: &'static str, path: &std::path::Path) -> Result<T, BundleError> {
        self.map_err(|cause| BundleError::Io { action, path: path.to_owned(), cause })
    }
}

/// A user's file as an entry.
fn hash(path: &std::path::Path) -> Result<Entry, BundleError> {
    use std::os::unix::fs::PermissionsExt as _;
    let mut hasher = blake3::Hasher::new();
    let file = std::fs::File::open(path).at("read", path)?;
    let executable = file.metadata().at("read", path)?.permissions().mode() & 0o111 != 0;
    hasher.update_reader(file).at("read", path)?;
    Ok(Entry { size: hasher.count(), digest: hasher.finalize().into(), executable })
}

/// The parts of an entry's path, if it leads nowhere but down: no `..`, no root, nothing empty, no other separator.
fn safe(path: &str) -> Option<PathBuf> {
    let is_safe = |part: &str| !part.is_empty() && part != "." && part != ".." && !part.contains(['\0', '\\']);
    path.split('/').all(is_safe).then(|| path.split('/').collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_paths_that_lead_down_are_safe() {
        for path in ["files/a", "objects/ab/c d/é"] {
            assert_eq!(safe(path), Some(PathBuf::from(path)), "{path}");
        }
        for path in ["", "/etc/passwd", "../a", "files/../../a", "files//a", "files/./a", "a/", "a\\..\\b", "a\0"] {
            assert_eq!(safe(path), None, "{path}");
        }
    }
}
