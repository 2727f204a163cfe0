//! A result outside of the store: its files, copied and held against their digests while they are, and files about them.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{Read as _, Write as _};
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};

use crate::pipeline::store::{self, Manifest, Store, StoreError, StoredOutput};

/// Why a result was not exported.
#[derive(Debug, thiserror::Error)]
pub enum ExportError {
    /// The folder has something in it.
    #[error("the folder `{}` is not empty", .0.display())]
    Occupied(PathBuf),
    /// The result is not what was stored.
    #[error("the result `{key}` is damaged: {what}")]
    Damaged {
        /// The first digits of its key.
        key: String,
        /// What is wrong, naming the file.
        what: String,
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

/// Adds the file and the action to an error of the system.
trait At<T> {
    fn at(self, action: &'static str, path: &Path) -> Result<T, ExportError>;
}

impl<T> At<T> for Result<T, std::io::Error> {
    fn at(self, action: &'static str, path: &Path) -> Result<T, ExportError> {
        self.map_err(|cause| ExportError::Io { action, path: path.to_owned(), cause })
    }
}

/// Copies an output's files into the new folder `folder`, with `about` beside them or in their place; gives the bytes copied.
///
/// Every byte is hashed on its way. The folder appears when it is whole; an empty one may be there.
pub fn export(
    store: &Store,
    manifest: &Manifest,
    output: &StoredOutput,
    about: &BTreeMap<String, String>,
    folder: &Path,
) -> Result<u64, ExportError> {
    match fs::read_dir(folder).map(Iterator::count) {
        Ok(0) => {}
        Ok(_) => return Err(ExportError::Occupied(folder.to_owned())),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
        Err(error) => return Err(error).at("list", folder),
    }
    if store.is_writable() {
        store.lease(&[&manifest.key])?;
    }
    let damaged = |what: String| ExportError::Damaged { key: manifest.key.short().to_owned(), what };
    // The name of the object is the digest of its list of files, and each file is held against that list.
    if store::digest_of_files(&output.files)? != output.digest {
        return Err(damaged("its list of files is not what was stored".to_owned()));
    }
    let parent = folder.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
    fs::create_dir_all(parent).at("make", parent)?;
    let made = tempfile::Builder::new().prefix(".export-").tempdir_in(parent).at("write into", parent)?;
    let object = store.object(&output.digest);
    let mut bytes = 0;
    for file in &output.files {
        let (from, to) = (object.join(&file.path), made.path().join(&file.path));
        if let Some(parent) = to.parent() {
            fs::create_dir_all(parent).at("make", parent)?;
        }
        let found = copied(&from, &to)?;
        if found.as_str() != file.digest.0 {
            return Err(damaged(format!("`{}` does not have the content that was stored", from.display())));
        }
        let mode = if file.executable { 0o755 } else { 0o644 };
        fs::set_permissions(&to, fs::Permissions::from_mode(mode)).at("write", &to)?;
        bytes += file.size;
    }
    for (name, text) in about {
        let path = made.path().join(name);
        fs::write(&path, text).at("write", &path)?;
    }
    fs::set_permissions(made.path(), fs::Permissions::from_mode(0o755)).at("write", made.path())?;
    // Nothing may be lost by it: only an empty folder gives way.
    fs::rename(made.path(), folder).at("write", folder)?;
    let _ = made.keep();
    Ok(bytes)
}

/// Copies a file; gives the digest of what was copied.
fn copied(from: &Path, to: &Path) -> Result<String, ExportError> {
    let mut source = File::open(from).at("read", from)?;
    let mut target = File::create_new(to).at("write", to)?;
    let mut hasher = blake3::Hasher::new();
    let mut buffer = vec![0; 1 << 20];
    loop {
        let count = source.read(&mut buffer).at("read", from)?;
        if count == 0 {
            break;
        }
        hasher.update(&buffer[..count]);
        target.write_all(&buffer[..count]).at("write", to)?;
    }
    Ok(hasher.finalize().to_hex().to_string())
}
