//! Unpacking: everything is read, checked and laid aside before anything becomes visible; a kill leaves an import that the
//! next one repeats.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{File, Permissions};
use std::io::{self, BufReader, Read, Write as _};
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};

use super::{At as _, BundleError, CONTENTS, Contents, Entry, FORMAT, Record, hash, safe};
use crate::pipeline::store::{self, Digest, Manifest, RunRecord, Store};

/// The first bytes of what zstd has compressed.
const ZSTD: [u8; 4] = [0x28, 0xb5, 0x2f, 0xfd];

/// The largest list of contents that is read.
const LARGEST_CONTENTS: u64 = 1 << 30;

/// What was imported.
#[derive(Clone, Debug, Default, PartialEq, Eq, serde::Serialize)]
pub struct ImportReport {
    /// The experiments' files, absolute.
    pub experiments: Vec<PathBuf>,
    /// Files that were written.
    pub files: usize,
    /// Results that were new.
    pub results: usize,
    /// Results that were there already.
    pub known: usize,
    /// Bytes read, without compression.
    pub bytes: u64,
}

/// Reads the bundle `file` into the folder `into` and the store. `progress` is told bytes done and in all.
pub fn import(
    file: &Path,
    into: &Path,
    store: &Store,
    progress: &mut dyn FnMut(u64, u64),
) -> Result<ImportReport, BundleError> {
    let broken = |problem: String| BundleError::Broken { file: file.to_owned(), problem };
    let mut archive = tar::Archive::new(open(file)?);
    let (entries, sealed, contents) = begin(&mut archive, file)?;
    let bundle = Digest::from(blake3::hash(&sealed));
    let _lock = store.lock(&bundle)?;
    let aside = store.begin_import(&bundle)?;
    let imported = (|| {
        let total = contents.entries.values().map(|entry| entry.size).sum();
        let mut import = Import { into, store, aside: &aside, contents: &contents, done: 0, total, progress };
        for entry in entries {
            let mut entry = entry.map_err(|error| broken(ends_early(&error)))?;
            import.take(&mut entry, &broken)?;
        }
        import.publish(&broken)
    })();
    // What was laid aside is of no use to the next import, which reads the bundle anew.
    store.end_import(&bundle)?;
    imported
}

/// Whether `file` begins as a bundle that this program reads; nothing is written.
pub fn check(file: &Path) -> Result<(), BundleError> {
    begin(&mut tar::Archive::new(open(file)?), file).map(drop)
}

/// The entries after the first, the bytes of the first, and what they say.
type Begun<'a> = (tar::Entries<'a, Box<dyn Read>>, Vec<u8>, Contents);

/// Reads the first entry.
fn begin<'a>(archive: &'a mut tar::Archive<Box<dyn Read>>, file: &Path) -> Result<Begun<'a>, BundleError> {
    let broken = |problem: String| BundleError::Broken { file: file.to_owned(), problem };
    let mut entries = archive.entries().at("read", file)?;
    let first = entries.next().ok_or_else(|| broken("is empty".to_owned()))?;
    let mut first = first.map_err(|error| broken(format!("is no bundle: {error}")))?;
    let (sealed, contents) = contents(&mut first).map_err(broken)?;
    Ok((entries, sealed, contents))
}

/// The bundle's bytes, decompressed where its first bytes say so.
fn open(file: &Path) -> Result<Box<dyn Read>, BundleError> {
    let mut opened = File::open(file).at("read", file)?;
    let mut begin = Vec::new();
    Read::by_ref(&mut opened).take(4).read_to_end(&mut begin).at("read", file)?;
    let whole = BufReader::with_capacity(1 << 20, io::Cursor::new(begin.clone()).chain(opened));
    Ok(if begin == ZSTD { Box::new(zstd::Decoder::new(whole).at("read", file)?) } else { Box::new(whole) })
}

fn ends_early(error: &io::Error) -> String {
    format!("is damaged or ends too early: {error}")
}

/// What the contents of every version say.
#[derive(serde::Deserialize)]
struct Versions {
    format: u32,
    pipe: String,
    store: String,
}

/// The first entry: its sealed bytes and what they say.
fn contents(entry: &mut tar::Entry<'_, Box<dyn Read>>) -> Result<(Vec<u8>, Contents), String> {
    if entry.path_bytes().as_ref() != CONTENTS.as_bytes() || entry.size() > LARGEST_CONTENTS {
        return Err("is no bundle of this program".to_owned());
    }
    let mut sealed = Vec::new();
    entry.read_to_end(&mut sealed).map_err(|error| ends_early(&error))?;
    let body = store::open_sealed(&sealed)
        .ok_or("is damaged: its list of contents does not have the digest that it carries")?;
    let unreadable = |error: serde_json::Error| format!("has a list of contents that cannot be understood: {error}");
    let Versions { format, pipe, store } = serde_json::from_slice(&body).map_err(unreadable)?;
    if format != FORMAT || store != Store::LAYOUT {
        return Err(format!("was packed by pipe {pipe} in a format that this program does not read; use that version"));
    }
    Ok((sealed, serde_json::from_slice(&body).map_err(unreadable)?))
}

struct Import<'a> {
    into: &'a Path,
    store: &'a Store,
    /// The folder in which everything is gathered.
    aside: &'a Path,
    contents: &'a Contents,
    done: u64,
    total: u64,
    progress: &'a mut dyn FnMut(u64, u64),
}

type Broken<'a> = &'a dyn Fn(String) -> BundleError;

impl Import<'_> {
    /// Lays an entry aside, if it is what the contents say.
    fn take(&mut self, entry: &mut tar::Entry<'_, Box<dyn Read>>, broken: Broken<'_>) -> Result<(), BundleError> {
        let name = String::from_utf8_lossy(&entry.path_bytes()).into_owned();
        let Some(path) = safe(&name) else {
            return Err(broken(format!("holds `{}`, which leads out of its folder", name.escape_default())));
        };
        let Some(wanted) = self.contents.entries.get(&name) else {
            return Err(broken(format!("holds `{name}`, which is not in its list of contents")));
        };
        if !entry.header().entry_type().is_file() || entry.size() != wanted.size {
            return Err(broken(format!("holds `{name}` as something else than its list of contents says")));
        }
        let path = self.aside.join(path);
        if let Some(folder) = path.parent() {
            std::fs::create_dir_all(folder).at("create the folder", folder)?;
        }
        let mut out = File::create_new(&path).map_err(|error| match error.kind() {
            io::ErrorKind::AlreadyExists => broken(format!("holds `{name}` twice")),
            _ => BundleError::Io { action: "write", path: path.clone(), cause: error },
        })?;
        let mut hasher = blake3::Hasher::new();
        let mut piece = vec![0; 1 << 20];
        loop {
            let read = entry.read(&mut piece).map_err(|error| broken(ends_early(&error)))?;
            if read == 0 {
                break;
            }
            hasher.update(&piece[..read]);
            out.write_all(&piece[..read]).at("write", &path)?;
            self.done += read as u64;
            (self.progress)(self.done, self.total);
        }
        if Digest::from(hasher.finalize()) != wanted.digest {
            return Err(broken(format!("is damaged: `{name}` does not have the content that was packed")));
        }
        let mode = if wanted.executable { 0o755 } else { 0o644 };
        out.set_permissions(Permissions::from_mode(mode)).at("change the mode of", &path)
    }

    /// Checks what only the whole can show, then makes it visible: results, logs, records, and the user's files last, so that
    /// whoever sees them finds their results.
    fn publish(self, broken: Broken<'_>) -> Result<ImportReport, BundleError> {
        for name in self.contents.entries.keys() {
            if safe(name).is_none_or(|path| !self.aside.join(path).is_file()) {
                return Err(broken(format!("ends too early: `{name}` is missing")));
            }
        }
        let manifests = self.manifests(broken)?;
        let files = self.files(broken)?;
        let keys: Vec<&Digest> = manifests.iter().map(|manifest| &manifest.key).collect();
        // What was just brought here counts as used.
        self.store.lease(&keys)?;
        let objects: BTreeSet<&Digest> =
            manifests.iter().flat_map(|manifest| &manifest.outputs).map(|output| &output.digest).collect();
        let folders: BTreeMap<Digest, PathBuf> =
            objects.into_iter().map(|digest| (digest.clone(), self.aside.join("objects").join(&digest.0))).collect();
        let mut report = ImportReport { bytes: self.total, ..ImportReport::default() };
        for manifest in &manifests {
            if self.store.adopt(manifest.clone(), &folders)? {
                report.results += 1;
            } else {
                report.known += 1;
            }
            let logs = self.aside.join("logs").join(&manifest.key.0);
            if logs.is_dir() {
                self.store.adopt_logs(&manifest.key, &logs)?;
            }
        }
        for (from, to, entry) in files {
            report.files += usize::from(place(&from, &to, &entry)?);
        }
        for record in &self.contents.records {
            self.record(record)?;
        }
        report.experiments = self.contents.experiments.iter().map(|file| self.into.join(file)).collect();
        Ok(report)
    }

    /// Every manifest, each held against its key and its objects against their names.
    fn manifests(&self, broken: Broken<'_>) -> Result<Vec<Manifest>, BundleError> {
        let mut manifests = Vec::new();
        for name in self.contents.entries.keys() {
            let Some(key) = name.strip_prefix("manifests/").and_then(|name| name.strip_suffix(".json")) else {
                continue;
            };
            let path = self.aside.join(name);
            let bytes = std::fs::read(&path).at("read", &path)?;
            let manifest =
                Manifest::from_portable(&bytes).map_err(|what| broken(format!("holds `{name}`, which {what}")))?;
            if manifest.key.0 != key {
                return Err(broken(format!("holds `{name}`, which is that of another key")));
            }
            for output in &manifest.outputs {
                let has = |file: &store::StoredFile| {
                    let entry = self.contents.entries.get(&format!("objects/{}/{}", output.digest, file.path));
                    let (size, digest, executable) = (file.size, file.digest.clone(), file.executable);
                    entry == Some(&Entry { size, digest, executable })
                };
                let is_whole = output.files.iter().all(has) && store::digest_of_files(&output.files)? == output.digest;
                if !is_whole || output.files.is_empty() {
                    return Err(broken(format!("does not hold all of the output `{}` of `{name}`", output.name)));
                }
            }
            manifests.push(manifest);
        }
        let known: BTreeSet<&Digest> =
            manifests.iter().flat_map(|manifest| &manifest.outputs).map(|output| &output.digest).collect();
        let stray = self.contents.entries.keys().find(|name| {
            let mut parts = name.splitn(3, '/');
            match (parts.next(), parts.next()) {
                (Some("files"), _) => false,
                (Some("manifests"), Some(name)) => name.strip_suffix(".json").is_none(),
                (Some("objects"), Some(digest)) => !known.contains(&Digest(digest.to_owned())),
                (Some("logs"), Some(key)) => !manifests.iter().any(|manifest| manifest.key.0 == key),
                _ => true,
            }
        });
        match stray {
            Some(name) => Err(broken(format!("holds `{name}`, which belongs to nothing in it"))),
            None => Ok(manifests),
        }
    }

    /// Where each of the user's files goes. What stands there already must be the same.
    fn files(&self, broken: Broken<'_>) -> Result<Vec<(PathBuf, PathBuf, Entry)>, BundleError> {
        let mut files = Vec::new();
        let mut occupied = Vec::new();
        for (name, entry) in &self.contents.entries {
            let Some(inside) = name.strip_prefix("files/").and_then(safe) else { continue };
            let to = self.into.join(&inside);
            if leads_out(self.into, &inside).at("find", &to)? {
                return Err(broken(format!("holds `{name}`, which a link leads out of `{}`", self.into.display())));
            }
            match std::fs::symlink_metadata(&to) {
                Ok(metadata) if metadata.is_file() => {
                    if hash(&to)? != *entry {
                        occupied.push(to.clone());
                    }
                }
                Ok(_) => occupied.push(to.clone()),
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                // A file stands where a folder must be.
                Err(error) if error.kind() == io::ErrorKind::NotADirectory => occupied.push(to.clone()),
                Err(error) => return Err(error).at("read", &to),
            }
            files.push((self.aside.join(name), to, entry.clone()));
        }
        if occupied.is_empty() { Ok(files) } else { Err(BundleError::Occupied(occupied)) }
    }

    /// Writes a run record where there is none of its name.
    fn record(&self, record: &Record) -> Result<(), BundleError> {
        let Record { name, recipe, key, kind, file } = record;
        if self.store.recorded(&name.experiment, &name.trial, &name.stage)?.is_some() {
            return Ok(());
        }
        let file = safe(file).map_or_else(PathBuf::new, |file| self.into.join(file));
        let (recipe, key, kind) = (recipe.clone(), key.clone(), kind.clone());
        self.store.record(name, &RunRecord { recipe, key: key.clone(), kind, file, earlier: Vec::new() })?;
        Ok(self.store.link_tensorboard(name, &key)?)
    }
}

/// Whether a folder on the way to `inside` is a link to somewhere else.
fn leads_out(into: &Path, inside: &Path) -> io::Result<bool> {
    let root = match into.canonicalize() {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(false),
        root => root?,
    };
    for folder in inside.ancestors().skip(1) {
        match into.join(folder).canonicalize() {
            Ok(there) => return Ok(!there.starts_with(&root)),
            Err(error) if matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory) => {}
            Err(error) => return Err(error),
        }
    }
    Ok(false)
}

/// Puts a file in its place, whole and never over another; gives whether it was not there.
fn place(from: &Path, to: &Path, entry: &Entry) -> Result<bool, BundleError> {
    let folder = to.parent().unwrap_or(Path::new("."));
    std::fs::create_dir_all(folder).at("create the folder", folder)?;
    let mut new = tempfile::Builder::new().prefix(".import-").tempfile_in(folder).at("write", to)?;
    let mut content = File::open(from).at("read", from)?;
    io::copy(&mut content, new.as_file_mut()).at("write", to)?;
    let mode = if entry.executable { 0o755 } else { 0o644 };
    new.as_file().set_permissions(Permissions::from_mode(mode)).at("change the mode of", to)?;
    new.as_file().sync_all().at("write", to)?;
    match new.persist_noclobber(to) {
        Ok(_) => Ok(true),
        Err(error) if error.error.kind() == io::ErrorKind::AlreadyExists => {
            // It was there before, or somebody has written it since it was looked for.
            if hash(to)? == *entry { Ok(false) } else { Err(BundleError::Occupied(vec![to.to_owned()])) }
        }
        Err(error) => Err(error.error).at("write", to),
    }
}
