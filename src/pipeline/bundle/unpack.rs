//! Unpacking: everything is read, checked and laid aside before anything becomes visible; a kill leaves an import that the
//! next one repeats.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{File, Permissions};
use std::io::{self, BufReader, Read, Write as _};
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};

use super::{At as _, BundleError, CONTENTS, Contents, Entry, FORMAT, LARGEST_CONTENTS, Record, hash, safe};
use crate::pipeline::store::{self, Digest, Manifest, Owner, RunRecord, Store};

/// The first bytes of what zstd has compressed.
const ZSTD: [u8; 4] = [0x28, 0xb5, 0x2f, 0xfd];

/// The longest name of an entry that is read.
const LONGEST_NAME: u64 = 1 << 16;

/// Whom an import waits for.
#[derive(Clone, Debug)]
pub enum Waits {
    /// Another import of the same bundle.
    Import,
    /// Whoever works on the result of this key.
    Result(Digest, Option<Owner>),
}

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

/// Reads the bundle `file` into the folder `into` and the store. `progress` is told bytes done and in all, and `waiting` whom it
/// waits for, where that takes long.
pub fn import(
    file: &Path,
    into: &Path,
    store: &Store,
    progress: &mut dyn FnMut(u64, u64),
    waiting: &mut dyn FnMut(Waits),
) -> Result<ImportReport, BundleError> {
    let broken = |problem: String| BundleError::Broken { file: file.to_owned(), problem };
    let mut archive = tar::Archive::new(open(file)?);
    let (entries, sealed, contents) = begin(&mut archive, file)?;
    let total = room(file, &contents, store)?;
    let bundle = Digest::from(blake3::hash(&sealed));
    let _lock = store.lock_telling(&bundle, &mut |_| waiting(Waits::Import))?;
    let aside = store.begin_import(&bundle)?;
    let imported = (|| {
        let mut import =
            Import { into, store, bundle: &bundle, aside: &aside, contents: &contents, done: 0, total, progress };
        let mut long_name = None;
        for entry in entries {
            let mut entry = entry.map_err(|error| broken(ends_early(&error)))?;
            if entry.header().entry_type().is_gnu_longname() && long_name.is_none() {
                long_name = Some(read_name(&mut entry).map_err(broken)?);
                continue;
            }
            let name = long_name.take().unwrap_or_else(|| entry.path_bytes().into_owned());
            import.take(&String::from_utf8_lossy(&name), &mut entry, &broken)?;
        }
        import.publish(waiting, &broken)
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
    // Raw, because otherwise names are read into memory however long they say that they are.
    let mut entries = archive.entries().at("read", file)?.raw(true);
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

/// The bytes of everything that the contents list, if the store's disk has room for them.
fn room(file: &Path, contents: &Contents, store: &Store) -> Result<u64, BundleError> {
    let needed = contents.entries.values().fold(0_u64, |sum, entry| sum.saturating_add(entry.size));
    let disk = rustix::fs::statvfs(store.root()).map_err(io::Error::from).at("read", store.root())?;
    let free = disk.f_bavail.saturating_mul(disk.f_frsize);
    // Some file systems of users' programs do not say how large they are.
    if needed <= free || disk.f_blocks == 0 {
        return Ok(needed);
    }
    Err(BundleError::NoRoom { file: file.to_owned(), needed, root: store.root().to_owned(), free })
}

/// The name of the entry after this one, which is too long for its header.
fn read_name(entry: &mut tar::Entry<'_, Box<dyn Read>>) -> Result<Vec<u8>, String> {
    if entry.size() > LONGEST_NAME {
        return Err(format!("holds a name of {} bytes, and none may have more than {LONGEST_NAME}", entry.size()));
    }
    let mut name = Vec::new();
    entry.read_to_end(&mut name).map_err(|error| ends_early(&error))?;
    while name.last() == Some(&0) {
        name.pop();
    }
    Ok(name)
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
    /// The digest of its list of contents.
    bundle: &'a Digest,
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
    fn take(
        &mut self,
        name: &str,
        entry: &mut tar::Entry<'_, Box<dyn Read>>,
        broken: Broken<'_>,
    ) -> Result<(), BundleError> {
        let Some(path) = safe(name) else {
            return Err(broken(format!("holds `{}`, which leads out of its folder", name.escape_default())));
        };
        let Some(wanted) = self.contents.entries.get(name) else {
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
        let mut piece = vec![0; usize::try_from(wanted.size).map_or(1 << 20, |size| size.clamp(1, 1 << 20))];
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
    fn publish(self, waiting: &mut dyn FnMut(Waits), broken: Broken<'_>) -> Result<ImportReport, BundleError> {
        for name in self.contents.entries.keys() {
            if safe(name).is_none_or(|path| !self.aside.join(path).is_file()) {
                return Err(broken(format!("ends too early: `{name}` is missing")));
            }
        }
        let manifests = self.manifests(broken)?;
        self.check_records(&manifests, broken)?;
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
            let key = &manifest.key;
            let lock = self.store.lock_telling(key, &mut |owner| waiting(Waits::Result(key.clone(), owner)))?;
            if self.store.adopt(&lock, manifest.clone(), &folders)? {
                report.results += 1;
            } else {
                report.known += 1;
            }
            let logs = self.aside.join("logs").join(&manifest.key.0);
            if logs.is_dir() {
                self.store.adopt_logs(&manifest.key, &logs)?;
            }
        }
        for (number, (from, to, entry)) in files.into_iter().enumerate() {
            let begun = format!(".import-{}-{number}", self.bundle.short());
            report.files += usize::from(place(&from, &to, &entry, &begun)?);
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
        let keys: BTreeSet<&str> = manifests.iter().map(|manifest| manifest.key.0.as_str()).collect();
        let known: BTreeSet<&Digest> =
            manifests.iter().flat_map(|manifest| &manifest.outputs).map(|output| &output.digest).collect();
        let stray = self.contents.entries.keys().find(|name| {
            let mut parts = name.splitn(3, '/');
            match (parts.next(), parts.next()) {
                (Some("files"), _) => false,
                (Some("manifests"), Some(name)) => name.strip_suffix(".json").is_none(),
                (Some("objects"), Some(digest)) => !known.contains(&Digest(digest.to_owned())),
                (Some("logs"), Some(key)) => !keys.contains(key),
                _ => true,
            }
        });
        match stray {
            Some(name) => Err(broken(format!("holds `{name}`, which belongs to nothing in it"))),
            None => Ok(manifests),
        }
    }

    /// Holds that every record speaks of a result that the bundle brings, and of a file in it.
    fn check_records(&self, manifests: &[Manifest], broken: Broken<'_>) -> Result<(), BundleError> {
        let kinds: BTreeMap<&Digest, &str> =
            manifests.iter().map(|manifest| (&manifest.key, manifest.parts.kind.as_str())).collect();
        for Record { name, key, kind, file, .. } in &self.contents.records {
            if kinds.get(key) != Some(&kind.as_str()) {
                return Err(broken(format!("names the result `{}` of `{name}`, which is not in it", key.short())));
            }
            if !file.is_empty() && !self.contents.entries.contains_key(&format!("files/{file}")) {
                return Err(broken(format!("names the file `{file}` of `{name}`, which is not in it")));
            }
        }
        for file in &self.contents.experiments {
            if !self.contents.entries.contains_key(&format!("files/{file}")) {
                return Err(broken(format!("names the experiment `{file}`, which is not in it")));
            }
        }
        Ok(())
    }

    /// Where each of the user's files goes: into the folder, and not into the store, which may lie there as well. What stands
    /// there already must be the same.
    fn files(&self, broken: Broken<'_>) -> Result<Vec<(PathBuf, PathBuf, Entry)>, BundleError> {
        let mut files = Vec::new();
        let mut occupied = Vec::new();
        let into = resolved(self.into).at("find", self.into)?;
        let root = resolved(self.store.root()).at("find", self.store.root())?;
        for (name, entry) in &self.contents.entries {
            let Some(inside) = name.strip_prefix("files/").and_then(safe) else { continue };
            let to = self.into.join(&inside);
            let there = match to.parent() {
                Some(folder) => resolved(folder).at("find", folder)?.join(inside.file_name().unwrap_or_default()),
                None => to.clone(),
            };
            if !there.starts_with(&into) {
                return Err(broken(format!("holds `{name}`, which a link leads out of `{}`", self.into.display())));
            }
            if there.starts_with(&root) {
                return Err(BundleError::Layout(format!(
                    "`{name}` of the bundle would be written into the store `{}` itself",
                    self.store.root().display()
                )));
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

/// A path with the links in as much of it as is there resolved.
fn resolved(path: &Path) -> io::Result<PathBuf> {
    for above in path.ancestors() {
        match above.canonicalize() {
            Ok(there) => return Ok(there.join(path.strip_prefix(above).expect("it is one of its ancestors"))),
            Err(error) if matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory) => {}
            Err(error) => return Err(error),
        }
    }
    Ok(path.to_owned())
}

/// Puts a file in its place, whole and never over another; gives whether it was not there. It is written beside its place as
/// `begun`, which only this import uses: what a kill has left there goes, for it may lie in a folder that a stage reads.
fn place(from: &Path, to: &Path, entry: &Entry, begun: &str) -> Result<bool, BundleError> {
    let folder = to.parent().unwrap_or(Path::new("."));
    std::fs::create_dir_all(folder).at("create the folder", folder)?;
    match std::fs::remove_file(folder.join(begun)) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error).at("write", &folder.join(begun)),
        _ => {}
    }
    let mut new = tempfile::Builder::new().prefix(begun).rand_bytes(0).tempfile_in(folder).at("write", to)?;
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pipeline::plan::NodeName;
    use crate::pipeline::store::fixture::{Sandbox, key};

    /// A bundle of one result of its own store, `Forged` by each test in its way.
    struct Forged {
        sandbox: Sandbox,
        contents: Contents,
        /// Name and content of every entry.
        entries: Vec<(String, Vec<u8>)>,
    }

    impl Forged {
        fn new() -> Self {
            let sandbox = Sandbox::new();
            let manifest = sandbox.publish(1, &[("data", "one")]);
            let record = Record {
                name: NodeName { experiment: "e".into(), trial: String::new(), stage: "s".into() },
                recipe: key(1),
                key: key(1),
                kind: "test".into(),
                file: "e.toml".into(),
            };
            let contents = Contents {
                format: FORMAT,
                pipe: "0".into(),
                store: Store::LAYOUT.into(),
                rng_abi: 1,
                experiments: vec!["e.toml".into()],
                records: vec![record],
                entries: BTreeMap::new(),
            };
            let mut forged = Self { sandbox, contents, entries: Vec::new() };
            forged.add("files/e.toml", b"x");
            forged.add(&format!("manifests/{}.json", key(1)), &manifest.portable());
            forged.add(&format!("objects/{}/data", manifest.outputs[0].digest), b"one");
            forged
        }

        fn add(&mut self, name: &str, content: &[u8]) {
            let (size, digest) = (content.len() as u64, blake3::hash(content).into());
            self.contents.entries.insert(name.into(), Entry { size, digest, executable: false });
            self.entries.push((name.into(), content.into()));
        }

        /// Imports it into another store; `more` goes between the contents and the entries.
        fn import(&self, more: &[u8], into: &str) -> Result<ImportReport, String> {
            let mut tar = tar::Builder::new(Vec::new());
            let append = |tar: &mut tar::Builder<Vec<u8>>, name: &str, content: &[u8]| {
                let mut header = tar::Header::new_gnu();
                header.set_size(content.len() as u64);
                header.set_mode(0o644);
                tar.append_data(&mut header, name, content).unwrap();
            };
            append(&mut tar, CONTENTS, &store::seal(&serde_json::to_vec(&self.contents).unwrap()));
            tar.get_mut().extend(more);
            for (name, content) in &self.entries {
                append(&mut tar, name, content);
            }
            let place = self.sandbox.place.path();
            let file = place.join("forged.tar");
            std::fs::write(&file, tar.into_inner().unwrap()).unwrap();
            let store = Store::open(&place.join("there/artifacts")).unwrap();
            import(&file, &place.join(into), &store, &mut |_, _| (), &mut |_| ()).map_err(|error| error.to_string())
        }
    }

    #[track_caller]
    fn refused(outcome: Result<ImportReport, String>, words: &str) {
        let error = outcome.unwrap_err();
        assert!(error.contains(words), "{error}");
    }

    #[test]
    fn names_of_any_honest_length_are_read_and_no_others() {
        let mut forged = Forged::new();
        let long = format!("files/{}", ["x".repeat(120), "y".repeat(120)].join("/"));
        forged.add(&long, b"deep");
        assert_eq!(forged.import(b"", "there").unwrap().files, 2);
        let mut header = tar::Header::new_gnu();
        header.set_entry_type(tar::EntryType::GNULongName);
        header.set_size(1 << 40);
        header.set_cksum();
        refused(forged.import(header.as_bytes(), "there"), "a name of 1099511627776 bytes");
    }

    #[test]
    fn what_a_kill_left_beside_a_file_goes_with_the_next_import() {
        let forged = Forged::new();
        let bundle = Digest::from(blake3::hash(&store::seal(&serde_json::to_vec(&forged.contents).unwrap())));
        let there = forged.sandbox.place.path().join("there");
        std::fs::create_dir_all(&there).unwrap();
        let names = || {
            let names = std::fs::read_dir(&there).unwrap().map(|entry| entry.unwrap().file_name());
            names.filter(|name| name != "artifacts").collect::<Vec<_>>()
        };
        for placed in [false, true] {
            std::fs::write(there.join(format!(".import-{}-0", bundle.short())), "half").unwrap();
            assert_eq!(names().len(), if placed { 2 } else { 1 });
            forged.import(b"", "there").unwrap();
            assert_eq!(names(), ["e.toml"]);
        }
    }

    #[test]
    fn records_speak_of_what_is_brought() {
        for harm in [0, 1] {
            let mut forged = Forged::new();
            let record = &mut forged.contents.records[0];
            if harm == 0 {
                record.key = key(2);
            } else {
                record.kind = "other".into();
            }
            refused(forged.import(b"", "there"), "of `e/s`, which is not in it");
        }
        let mut forged = Forged::new();
        forged.contents.records[0].file = "../../x.toml".into();
        refused(forged.import(b"", "there"), "names the file `../../x.toml`");
    }

    #[test]
    fn nothing_is_written_into_the_store_but_by_the_store() {
        let mut forged = Forged::new();
        refused(forged.import(b"", "there/artifacts"), "into the store");
        refused(forged.import(b"", "there/artifacts/deep/er"), "into the store");
        forged.add("files/artifacts/manifests/00/x.json", b"x");
        refused(forged.import(b"", "there"), "into the store");
        forged.import(b"", "elsewhere").unwrap();
    }

    #[test]
    fn what_no_disk_has_room_for_is_refused_before_it_is_read() {
        let mut forged = Forged::new();
        for name in ["files/one", "files/two"] {
            forged.add(name, b"x");
            forged.contents.entries.get_mut(name).unwrap().size = u64::MAX - 1;
        }
        refused(forged.import(b"", "there"), "has room for");
    }
}
