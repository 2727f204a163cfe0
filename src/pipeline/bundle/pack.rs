//! Packing: every byte is read once, and held against the digest that the store has for it while it is written.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::io::{self, BufReader, BufWriter, Read, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::{At as _, BundleError, CONTENTS, Contents, Entry, FORMAT, LARGEST_CONTENTS, Layout, Record, hash};
use crate::pipeline::plan::{Node, Plan};
use crate::pipeline::store::{self, Digest, Lookup, Manifest, Store};
use crate::random::RNG_ABI;

/// What is packed.
pub struct Packing<'a> {
    /// The experiments as they are.
    pub plan: &'a Plan,
    /// Their files.
    pub layout: &'a Layout,
    /// Whether logs and curves go along.
    pub logs: bool,
}

/// What was packed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize)]
pub struct PackReport {
    /// The user's files.
    pub files: usize,
    /// Results.
    pub results: usize,
    /// Stages that have no result yet and would run elsewhere.
    pub missing: usize,
    /// Bytes before compression.
    pub bytes: u64,
}

/// Where an entry's bytes come from.
enum From {
    File(PathBuf),
    /// A file of the result of a key.
    Object(PathBuf, Digest),
    Bytes(Vec<u8>),
}

/// Writes a bundle to `out`, which appears when it is whole. `progress` is told bytes done and in all.
pub fn pack(
    packing: &Packing<'_>,
    store: &Store,
    out: &Path,
    progress: &mut dyn FnMut(u64, u64),
) -> Result<PackReport, BundleError> {
    let mut entries: BTreeMap<String, (Entry, From)> = BTreeMap::new();
    for (path, file) in &packing.layout.files {
        entries.insert(format!("files/{path}"), (hash(file)?, From::File(file.clone())));
    }
    let mut report = PackReport { files: entries.len(), ..PackReport::default() };
    let mut results: BTreeMap<&Digest, Arc<Manifest>> = BTreeMap::new();
    let keys: Vec<&Digest> =
        packing.plan.nodes.iter().filter_map(|node| node.result.as_ref()).map(|result| &result.key).collect();
    if store.is_writable() {
        store.lease(&keys)?;
    }
    for key in keys {
        // What the plan saw may be damaged or gone by now: then it is missing.
        if let Lookup::Hit(manifest) = store.lookup(key)? {
            results.insert(key, manifest);
        }
    }
    report.results = results.len();
    let is_missing = |node: &&Node| node.result.as_ref().is_none_or(|result| !results.contains_key(&result.key));
    report.missing = packing.plan.nodes.iter().filter(is_missing).count();
    for manifest in results.values() {
        result_entries(manifest, store, &mut entries)?;
        if packing.logs {
            log_entries(&manifest.key, store, &mut entries)?;
        }
    }
    let contents = Contents {
        format: FORMAT,
        pipe: env!("CARGO_PKG_VERSION").to_owned(),
        store: Store::LAYOUT.to_owned(),
        rng_abi: RNG_ABI,
        experiments: packing.layout.experiments.clone(),
        records: records(packing, &results),
        entries: entries.iter().map(|(path, (entry, _))| (path.clone(), entry.clone())).collect(),
    };
    report.bytes = entries.values().map(|(entry, _)| entry.size).sum();
    let folder = out.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let file = tempfile::Builder::new().prefix(".bundle-").tempfile_in(folder).at("write", out)?;
    let is_compressed = out.extension().is_some_and(|extension| extension == "zst");
    let written = BufWriter::with_capacity(1 << 20, file.as_file());
    if is_compressed {
        let mut encoder = zstd::Encoder::new(written, 3).at("write", out)?;
        encoder.include_checksum(true).at("write", out)?;
        write(&contents, entries, &mut encoder, out, report.bytes, progress)?;
        encoder.finish().and_then(|mut written| written.flush()).at("write", out)?;
    } else {
        let mut written = written;
        write(&contents, entries, &mut written, out, report.bytes, progress)?;
        written.flush().at("write", out)?;
    }
    let open_to_all = <std::fs::Permissions as std::os::unix::fs::PermissionsExt>::from_mode(0o644);
    file.as_file().set_permissions(open_to_all).at("write", out)?;
    file.as_file().sync_all().at("write", out)?;
    file.persist(out).map_err(|error| error.error).at("write", out)?;
    Ok(report)
}

fn result_entries(
    manifest: &Manifest,
    store: &Store,
    entries: &mut BTreeMap<String, (Entry, From)>,
) -> Result<(), BundleError> {
    let bytes = manifest.portable();
    let entry = Entry { size: bytes.len() as u64, digest: blake3::hash(&bytes).into(), executable: false };
    entries.insert(format!("manifests/{}.json", manifest.key), (entry, From::Bytes(bytes)));
    for output in &manifest.outputs {
        let damaged = |what: String| BundleError::Damaged { key: manifest.key.clone(), what };
        // The name of the object is the digest of its list of files, and each file is held against that list below.
        if store::digest_of_files(&output.files)? != output.digest {
            return Err(damaged("its list of files is not that of its object".to_owned()));
        }
        let object = store.object(&output.digest);
        for file in &output.files {
            let entry = Entry { size: file.size, digest: file.digest.clone(), executable: file.executable };
            let from = From::Object(object.join(&file.path), manifest.key.clone());
            entries.insert(format!("objects/{}/{}", output.digest, file.path), (entry, from));
        }
    }
    Ok(())
}

/// The logs of a key; what a stage writes nowhere but there.
fn log_entries(key: &Digest, store: &Store, entries: &mut BTreeMap<String, (Entry, From)>) -> Result<(), BundleError> {
    let logs = store.logs(key);
    let mut open = vec![logs.clone()];
    while let Some(folder) = open.pop() {
        let found = match std::fs::read_dir(&folder) {
            Ok(found) => found,
            Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
            Err(error) => return Err(error).at("list", &folder),
        };
        for entry in found {
            let entry = entry.at("list", &folder)?;
            let (path, sort) = (entry.path(), entry.file_type().at("list", &folder)?);
            if sort.is_dir() {
                open.push(path);
            } else if let (true, Some(inside)) = (sort.is_file(), path.strip_prefix(&logs).ok().and_then(Path::to_str))
            {
                let name = format!("logs/{key}/{inside}");
                entries.insert(name, (hash(&path)?, From::File(path)));
            }
        }
    }
    Ok(())
}

/// What a run of the plan would have written down for every stage that has its result.
fn records(packing: &Packing<'_>, results: &BTreeMap<&Digest, Arc<Manifest>>) -> Vec<Record> {
    let mut file_of = BTreeMap::new();
    for ((name, _), file) in packing.plan.experiments.iter().zip(experiment_files(packing)) {
        file_of.insert(name.as_str(), file);
    }
    let mut records = BTreeSet::new();
    for node in &packing.plan.nodes {
        let Some(result) = node.result.as_ref().filter(|result| results.contains_key(&result.key)) else { continue };
        for name in &node.names {
            let file = file_of.get(name.experiment.as_str()).cloned().unwrap_or_default();
            records.insert((name.clone(), node.recipe.clone(), result.key.clone(), node.spec.kind.name, file));
        }
    }
    let record =
        |(name, recipe, key, kind, file): (_, _, _, &str, _)| Record { name, recipe, key, kind: kind.to_owned(), file };
    records.into_iter().map(record).collect()
}

/// The entry of each experiment of the plan, in the plan's order.
fn experiment_files<'a>(packing: &'a Packing<'_>) -> impl Iterator<Item = String> + 'a {
    packing.plan.experiments.keys().map(|name| {
        let is_its = |file: &&String| Path::new(file).file_stem().is_some_and(|stem| stem.to_string_lossy() == *name);
        packing.layout.experiments.iter().find(is_its).cloned().unwrap_or_default()
    })
}

fn write(
    contents: &Contents,
    entries: BTreeMap<String, (Entry, From)>,
    to: &mut dyn Write,
    out: &Path,
    total: u64,
    progress: &mut dyn FnMut(u64, u64),
) -> Result<(), BundleError> {
    let mut tar = tar::Builder::new(to);
    let first = store::seal(&serde_json::to_vec(contents).expect("the contents are plain data"));
    let (mut done, first_size) = (0, first.len() as u64);
    if first_size > LARGEST_CONTENTS {
        return Err(BundleError::Layout("the results and files are more than a bundle can list".to_owned()));
    }
    append(&mut tar, CONTENTS, first_size, false, &mut first.as_slice()).at("write", out)?;
    for (path, (entry, from)) in entries {
        let broken = |problem: &str, from: &From| match from {
            From::Object(path, key) => {
                BundleError::Damaged { key: key.clone(), what: format!("`{}` {problem}", path.display()) }
            }
            From::File(path) => BundleError::Changed(path.clone()),
            From::Bytes(_) => BundleError::Changed(out.to_owned()),
        };
        let reader: Box<dyn Read> = match &from {
            From::Bytes(bytes) => Box::new(bytes.as_slice()),
            From::File(path) | From::Object(path, _) => match File::open(path) {
                Ok(file) => Box::new(BufReader::with_capacity(1 << 20, file)),
                Err(error) if error.kind() == io::ErrorKind::NotFound => return Err(broken("is missing", &from)),
                Err(error) => return Err(error).at("read", path),
            },
        };
        let mut watched =
            Watched { inner: reader, left: entry.size, hasher: blake3::Hasher::new(), done, total, progress };
        let appended = append(&mut tar, &path, entry.size, entry.executable, &mut watched);
        let Watched { left, mut inner, hasher, .. } = watched;
        appended.at("write", out)?;
        let has_more = inner.read(&mut [0]).at("read", out)? > 0;
        if left > 0 || has_more || Digest::from(hasher.finalize()) != entry.digest {
            return Err(broken("does not have the content that was stored", &from));
        }
        done += entry.size;
    }
    tar.into_inner().and_then(Write::flush).at("write", out)
}

/// Adds an entry without time and owner.
fn append(
    tar: &mut tar::Builder<&mut dyn Write>,
    path: &str,
    size: u64,
    executable: bool,
    content: &mut dyn Read,
) -> io::Result<()> {
    let mut header = tar::Header::new_gnu();
    header.set_entry_type(tar::EntryType::Regular);
    header.set_size(size);
    header.set_mode(if executable { 0o755 } else { 0o644 });
    tar.append_data(&mut header, path, content)
}

/// Reads at most what an entry may hold, hashes it, and tells how far it is.
struct Watched<'a> {
    inner: Box<dyn Read + 'a>,
    left: u64,
    hasher: blake3::Hasher,
    done: u64,
    total: u64,
    progress: &'a mut dyn FnMut(u64, u64),
}

impl Read for Watched<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let room = usize::try_from(self.left).unwrap_or(usize::MAX).min(buffer.len());
        let read = self.inner.read(&mut buffer[..room])?;
        self.hasher.update(&buffer[..read]);
        self.left -= read as u64;
        self.done += read as u64;
        (self.progress)(self.done, self.total);
        Ok(read)
    }
}
