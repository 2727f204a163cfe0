//! From bytes to digests: canonical JSON, files, folders. It reads and never writes, and knows no store.
//!
//! A folder is the sorted list of its files as (path, executable bit, size, BLAKE3); its digest is that of the list. So
//! empty folders, times, owners and other mode bits are not part of a content.

use std::io;
use std::path::{Path, PathBuf};

use blake3::hazmat::{self, ChainingValue, HasherExt as _, Mode};
use rayon::iter::{IntoParallelRefIterator as _, ParallelIterator as _};
use serde_json::{Value, json};

use super::disk::{Content, Disk, Entry, Native, Sort, Stat};
use super::error::At as _;
use super::{Digest, StoreError, StoredFile, canonical};

/// Integers beyond this have no exact number in canonical JSON, which knows doubles only.
const EXACT: u64 = 1 << 53;

/// Bytes from which on several threads hash a file.
const LARGE: u64 = 1 << 20;

/// Bytes up to which one thread hashes a part of a large file.
const ONE_THREAD: u64 = 1 << 24;

/// Bytes that are read at once: few enough to be still in a core's own cache when they are hashed.
const PIECE: usize = 1 << 18;

impl From<blake3::Hash> for Digest {
    fn from(hash: blake3::Hash) -> Self {
        Self(hash.to_hex().to_string())
    }
}

/// The BLAKE3 digest of `value` as canonical JSON (RFC 8785), apart from equal values of another `domain`.
///
/// Integers beyond 2^53 are refused with their place: the canonical form would merge neighbours.
pub fn hash_json(domain: &str, value: &Value) -> Result<Digest, StoreError> {
    let mut text = Vec::with_capacity(256);
    if canonical::write(value, &mut text).is_err() {
        let (place, number) = inexact(value).unwrap_or_default();
        let problem = format!("the integer `{number}` at `{place}` is beyond 2^53; write it as a string");
        return Err(StoreError::Unhashable { domain: domain.to_owned(), problem });
    }
    Ok(hash_canonical(domain, &text))
}

/// [`hash_json`] of what is canonical JSON already.
pub(crate) fn hash_canonical(domain: &str, text: &[u8]) -> Digest {
    let mut hasher = blake3::Hasher::new_derive_key(&format!("pipe v1 {domain}"));
    hasher.update(text);
    hasher.finalize().into()
}

/// The place and text of an integer that a double cannot hold apart from its neighbours.
fn inexact(value: &Value) -> Option<(String, String)> {
    match value {
        Value::Number(number) => {
            let large = number.as_u64().or_else(|| number.as_i64().map(i64::unsigned_abs));
            large.filter(|size| *size > EXACT).map(|_| (String::new(), number.to_string()))
        }
        Value::Array(items) => items.iter().enumerate().find_map(|(index, item)| within(&index.to_string(), item)),
        Value::Object(fields) => fields.iter().find_map(|(name, item)| within(name, item)),
        Value::Null | Value::Bool(_) | Value::String(_) => None,
    }
}

fn within(step: &str, value: &Value) -> Option<(String, String)> {
    inexact(value).map(|(rest, number)| {
        let place = if rest.is_empty() { step.to_owned() } else { format!("{step}.{rest}") };
        (place, number)
    })
}

/// The digest of a folder's content and its sorted files. Symbolic links and special files are errors that name them.
pub fn digest_folder(folder: &Path) -> Result<(Digest, Vec<StoredFile>), StoreError> {
    digest_folder_on(&Native, folder)
}

/// [`digest_folder`] on any disk.
pub(super) fn digest_folder_on(disk: &dyn Disk, folder: &Path) -> Result<(Digest, Vec<StoredFile>), StoreError> {
    digest_listed(disk, &list(disk, folder, Links::Refuse)?)
}

/// The digest of a folder whose files are these, and the files.
pub(super) fn digest_listed(disk: &dyn Disk, listed: &[Listed]) -> Result<(Digest, Vec<StoredFile>), StoreError> {
    let files = hash_listed(listed, &|path| hash_file(disk, path))?;
    Ok((digest_list(&files)?, files))
}

/// The digest of a user's file or folder, without any cache. Symbolic links count as what they point at.
///
/// A plain file's digest is the BLAKE3 of its content; an executable one differs, because a program may be run.
pub fn source_digest(path: &Path) -> Result<Digest, StoreError> {
    source_digest_by(&Native, path, &|path| hash_file(&Native, path))
}

/// How one file is hashed: as it is, or through a cache.
pub(super) type HashOne<'a> = &'a (dyn Fn(&Path) -> Result<HashedFile, StoreError> + Sync);

/// [`source_digest`] with a way to hash one file.
pub(super) fn source_digest_by(disk: &dyn Disk, path: &Path, hash: HashOne<'_>) -> Result<Digest, StoreError> {
    match disk.stat_target(path).at("read", path)?.sort {
        Sort::Folder => return digest_list(&hash_listed(&list(disk, path, Links::Follow)?, hash)?),
        Sort::File => {}
        Sort::Link | Sort::Special => return Err(StoreError::unfit(path, "is neither a file nor a folder")),
    }
    let hashed = hash(path)?;
    if hashed.stat.is_executable() { hash_json("executable file", &json!(hashed.digest)) } else { Ok(hashed.digest) }
}

/// The digest of a folder of these files, which are sorted.
pub(super) fn digest_list(files: &[StoredFile]) -> Result<Digest, StoreError> {
    let rows = files.iter().map(|file| json!([file.path, file.executable, file.size, file.digest])).collect();
    hash_json("folder", &Value::Array(rows))
}

/// What to do with symbolic links.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Links {
    /// They are errors.
    Refuse,
    /// They stand for what they point at.
    Follow,
}

/// A file below a folder.
pub(super) struct Listed {
    /// Its path below the folder, with `/`.
    pub(super) relative: String,
    /// Its path.
    pub(super) path: PathBuf,
    /// Its stat when it was listed.
    pub(super) stat: Stat,
}

/// Every file below `folder`, sorted by path.
pub(super) fn list(disk: &dyn Disk, folder: &Path, links: Links) -> Result<Vec<Listed>, StoreError> {
    let mut found = Vec::new();
    let mut open = vec![(folder.to_owned(), String::new(), Vec::new())];
    while let Some((folder, prefix, mut above)) = open.pop() {
        if links == Links::Follow {
            let (device, inode, ..) = disk.stat_target(&folder).at("read", &folder)?.identity;
            let identity = (device, inode);
            if above.contains(&identity) {
                return Err(StoreError::unfit(&folder, "is a symbolic link to a folder that holds it"));
            }
            above.push(identity);
        }
        for Entry { name, .. } in disk.list(&folder).at("list", &folder)? {
            let path = folder.join(&name);
            let Ok(name) = name.into_string() else {
                return Err(StoreError::unfit(&path, "has a name that is not UTF-8"));
            };
            let relative = if prefix.is_empty() { name } else { format!("{prefix}/{name}") };
            let stat = match links {
                Links::Refuse => disk.stat(&path),
                Links::Follow => disk.stat_target(&path),
            }
            .at("read", &path)?;
            match stat.sort {
                Sort::Folder => open.push((path, relative, above.clone())),
                Sort::File => found.push(Listed { relative, path, stat }),
                Sort::Link | Sort::Special => {
                    let sort = if stat.sort == Sort::Link { "a symbolic link" } else { "a special file" };
                    return Err(StoreError::unfit(&path, format!("is {sort}; only files and folders can be kept")));
                }
            }
        }
    }
    found.sort_by(|a, b| a.relative.cmp(&b.relative));
    Ok(found)
}

fn hash_listed(listed: &[Listed], hash: HashOne<'_>) -> Result<Vec<StoredFile>, StoreError> {
    let one = |file: &Listed| {
        let hashed = hash(&file.path)?;
        let HashedFile { digest, stat } = hashed;
        let (executable, size) = (stat.is_executable(), stat.size());
        Ok(StoredFile { path: file.relative.clone(), executable, size, digest, stat: stat.identity })
    };
    // Waking other threads costs more than hashing a few small files.
    if listed.len() < 2 || listed.iter().map(|file| file.stat.size()).sum::<u64>() < LARGE && listed.len() < 64 {
        return listed.iter().map(one).collect();
    }
    listed.par_iter().map(one).collect()
}

/// A file's content by digest, with the stat from before its bytes were read.
pub(super) struct HashedFile {
    /// BLAKE3 of the content.
    pub(super) digest: Digest,
    /// Its stat.
    pub(super) stat: Stat,
}

/// Reads and hashes a file.
pub(super) fn hash_file(disk: &dyn Disk, path: &Path) -> Result<HashedFile, StoreError> {
    let file = disk.open(path).at("read", path)?;
    let stat = file.stat().at("read", path)?;
    let digest = hash_content(&*file, stat.size()).at("read", path)?;
    Ok(HashedFile { digest, stat })
}

/// Hashes a file of `size` bytes. One that is cut short meanwhile is an `UnexpectedEof`.
///
/// A file is a tree to BLAKE3: threads hash subtrees of a large one, each through a buffer that stays in its core's cache. A
/// memory map would spare that copy, but a file that is cut short or a failing disk would then end the whole process with a
/// signal instead of an error.
pub(super) fn hash_content(content: &dyn Content, size: u64) -> io::Result<Digest> {
    if size < LARGE {
        // To its end, wherever that is by now.
        let mut hasher = blake3::Hasher::new();
        let mut buffer = vec![0; PIECE.min(usize::try_from(size).unwrap_or(PIECE) + 1)];
        let mut offset = 0;
        loop {
            match read_at(content, &mut buffer, offset)? {
                0 => return Ok(hasher.finalize().into()),
                read => hasher.update(&buffer[..read]),
            };
            offset = hasher.count();
        }
    }
    let (left, right) = hash_halves(content, 0, size)?;
    Ok(hazmat::merge_subtrees_root(&left, &right, Mode::Hash).into())
}

/// The chaining values of the two subtrees of `size` bytes from `offset` on.
fn hash_halves(content: &dyn Content, offset: u64, size: u64) -> io::Result<(ChainingValue, ChainingValue)> {
    let middle = hazmat::left_subtree_len(size);
    let (left, right) =
        rayon::join(|| hash_subtree(content, offset, middle), || hash_subtree(content, offset + middle, size - middle));
    Ok((left?, right?))
}

fn hash_subtree(content: &dyn Content, offset: u64, size: u64) -> io::Result<ChainingValue> {
    if size > ONE_THREAD {
        let (left, right) = hash_halves(content, offset, size)?;
        return Ok(hazmat::merge_subtrees_non_root(&left, &right, Mode::Hash));
    }
    let mut hasher = blake3::Hasher::new();
    hasher.set_input_offset(offset);
    let mut buffer = vec![0; PIECE];
    while hasher.count() < size {
        let left = size - hasher.count();
        let wanted = usize::try_from(left).map_or(PIECE, |left| left.min(PIECE));
        match read_at(content, &mut buffer[..wanted], offset + hasher.count())? {
            0 => return Err(io::ErrorKind::UnexpectedEof.into()),
            read => hasher.update(&buffer[..read]),
        };
    }
    Ok(hasher.finalize_non_root())
}

/// Reads some bytes, again where a signal came between.
fn read_at(content: &dyn Content, buffer: &mut [u8], offset: u64) -> io::Result<usize> {
    loop {
        match content.read_at(buffer, offset) {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            other => return other,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{PermissionsExt, symlink};

    use super::*;

    fn folder() -> tempfile::TempDir {
        tempfile::tempdir().unwrap()
    }

    #[test]
    fn golden_digests_hold() {
        let place = folder();
        std::fs::create_dir_all(place.path().join("b/empty")).unwrap();
        std::fs::write(place.path().join("a.txt"), "hello\n").unwrap();
        std::fs::write(place.path().join("b/run"), "#!/bin/sh\n").unwrap();
        std::fs::set_permissions(place.path().join("b/run"), PermissionsExt::from_mode(0o755)).unwrap();
        let (digest, files) = digest_folder(place.path()).unwrap();
        let shown: Vec<_> = files.iter().map(|file| (file.path.as_str(), file.executable, file.size)).collect();
        assert_eq!(shown, [("a.txt", false, 6), ("b/run", true, 10)]);
        assert_eq!(digest.0, "c13ea6a34f5741e1fefe4582b8b46e5fd913dca7c889306ce0aeb0607a2abe7c");
        assert_eq!(
            hash_json("key", &json!({"b": 1.0, "a": [true, null, "é"]})).unwrap().0,
            "bd6e514f1117b8c6d098074ec059216fa32450c54944ec2919cad33d24dd6cdf"
        );
        assert_eq!(source_digest(&place.path().join("a.txt")).unwrap(), blake3::hash(b"hello\n").into());
        assert_eq!(source_digest(place.path()).unwrap(), digest);
    }

    #[test]
    fn canonical_json_forgets_order_and_keeps_domains() {
        let one: Value = serde_json::from_str(r#"{"a":1,"b":2.0}"#).unwrap();
        let two: Value = serde_json::from_str(r#"{"b":2,"a":1.0}"#).unwrap();
        assert_eq!(hash_json("key", &one).unwrap(), hash_json("key", &two).unwrap());
        assert_ne!(hash_json("key", &one).unwrap(), hash_json("recipe", &one).unwrap());
    }

    #[test]
    fn integers_without_an_exact_double_are_refused_with_their_place() {
        assert!(hash_json("key", &json!({"seed": EXACT})).is_ok());
        for number in [json!(EXACT + 1), json!(-(EXACT as i64) - 1), json!(u64::MAX)] {
            let error = hash_json("key", &json!({"a": [0, {"seed": number}]})).unwrap_err().to_string();
            assert!(error.contains("`a.1.seed`") && error.contains(&number.to_string()), "{error}");
        }
    }

    #[test]
    fn links_and_special_files_are_refused_by_name() {
        let place = folder();
        symlink("elsewhere", place.path().join("link")).unwrap();
        let error = digest_folder(place.path()).unwrap_err().to_string();
        assert!(error.contains("/link` is a symbolic link"), "{error}");
        let place = folder();
        drop(std::os::unix::net::UnixListener::bind(place.path().join("socket")).unwrap());
        let error = digest_folder(place.path()).unwrap_err().to_string();
        assert!(error.contains("/socket` is a special file"), "{error}");
    }

    #[test]
    fn a_users_links_are_followed_but_not_in_circles() {
        let place = folder();
        std::fs::create_dir(place.path().join("real")).unwrap();
        std::fs::write(place.path().join("real/file"), "x").unwrap();
        symlink("real", place.path().join("view")).unwrap();
        assert_eq!(
            source_digest(&place.path().join("view")).unwrap(),
            source_digest(&place.path().join("real")).unwrap()
        );
        symlink("..", place.path().join("real/up")).unwrap();
        let error = source_digest(place.path()).unwrap_err().to_string();
        assert!(error.contains("a folder that holds it"), "{error}");
    }

    #[test]
    fn large_files_hash_alike_in_pieces() {
        let place = folder();
        let path = place.path().join("large");
        let all: Vec<u8> = (0..(ONE_THREAD as usize) * 3 + 12_345).map(|index| (index % 251) as u8).collect();
        let large = LARGE as usize;
        for size in [0, 1, large - 1, large, large + 1, PIECE * 9, (ONE_THREAD as usize) * 2, all.len()] {
            std::fs::write(&path, &all[..size]).unwrap();
            assert_eq!(hash_file(&Native, &path).unwrap().digest, blake3::hash(&all[..size]).into(), "{size} bytes");
        }
        let file = std::fs::File::open(&path).unwrap();
        let error = hash_content(&file, all.len() as u64 + 1).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::UnexpectedEof, "a file that was cut short meanwhile");
    }
}
