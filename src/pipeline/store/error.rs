//! What can go wrong with the store, each with the file it went wrong at.

use std::io;
use std::path::{Path, PathBuf};

/// Why the store could not do what it was asked. Damage is not among these: it is an answer, not a failure.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// The system refused an operation on a file.
    #[error("cannot {action} `{}`: {cause}{}", path.display(), hint(cause))]
    Io {
        /// What was tried, as a verb: `read`, `create the folder`.
        action: &'static str,
        /// The file or folder.
        path: PathBuf,
        /// What the system said.
        cause: io::Error,
    },
    /// The folder cannot serve as a store.
    #[error("the store `{}` {problem}", root.display())]
    Unusable {
        /// The folder.
        root: PathBuf,
        /// What is wrong with it, and what the user may do.
        problem: String,
    },
    /// A file or folder is not of a sort that can be kept or hashed.
    #[error("`{}` {problem}", path.display())]
    Unfit {
        /// The file or folder.
        path: PathBuf,
        /// What is wrong with it.
        problem: String,
    },
    /// A value has no canonical form.
    #[error("cannot hash {domain}: {problem}")]
    Unhashable {
        /// What the value is.
        domain: String,
        /// What is wrong with it, with its place.
        problem: String,
    },
}

impl StoreError {
    /// What the system said, where it was asked.
    pub fn io(&self) -> Option<&io::Error> {
        match self {
            Self::Io { cause, .. } => Some(cause),
            _ => None,
        }
    }

    /// Whether the disk is full.
    pub(super) fn is_full(&self) -> bool {
        self.io().is_some_and(is_full)
    }

    /// Whether the failure tells that a stored file is gone or unreadable for good, as opposed to a passing want of
    /// descriptors, memory or rights: only then may a file count as damaged.
    pub(super) fn means_damage(&self) -> bool {
        use io::ErrorKind::{InvalidData, IsADirectory, NotADirectory, NotFound, UnexpectedEof};
        match self {
            Self::Io { cause, .. } => {
                matches!(cause.kind(), NotFound | NotADirectory | IsADirectory | InvalidData | UnexpectedEof)
                    || cause.raw_os_error() == Some(rustix::io::Errno::IO.raw_os_error())
            }
            Self::Unfit { .. } => true,
            Self::Unusable { .. } | Self::Unhashable { .. } => false,
        }
    }

    /// A file or folder that cannot be kept or hashed.
    pub(super) fn unfit(path: &Path, problem: impl Into<String>) -> Self {
        Self::Unfit { path: path.to_owned(), problem: problem.into() }
    }
}

/// Whether an error of the system says that the disk is full.
pub(super) fn is_full(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded)
}

/// What the user may do about an error of the system.
fn hint(cause: &io::Error) -> &'static str {
    match cause.kind() {
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => {
            "; free some space and run again: nothing that was finished is lost"
        }
        io::ErrorKind::ReadOnlyFilesystem => "; name a store on a writable disk with `--store`",
        _ => "",
    }
}

/// Adds the file and the action to an error of the system.
pub(super) trait At<T> {
    /// The same with what was tried, and on which file.
    fn at(self, action: &'static str, path: &Path) -> Result<T, StoreError>;
}

impl<T, E: Into<io::Error>> At<T> for Result<T, E> {
    fn at(self, action: &'static str, path: &Path) -> Result<T, StoreError> {
        self.map_err(|cause| StoreError::Io { action, path: path.to_owned(), cause: cause.into() })
    }
}
