//! What tests of light kinds share: a context over a temporary folder, and the digest of what a stage wrote.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::Duration;

use crate::pipeline::stage::{ArtifactType, InputArtifact, Resources, StageContext};
use crate::stages::table::Column;

/// A context whose `out` has an empty folder for each of `outputs`.
pub(crate) fn context(folder: &Path, outputs: &[&str]) -> StageContext {
    for output in outputs {
        std::fs::create_dir_all(folder.join("out").join(output)).unwrap();
    }
    StageContext {
        inputs: BTreeMap::new(),
        out: folder.join("out"),
        work: folder.join("work"),
        logs: folder.join("logs"),
        resources: Resources {
            device: "cpu".to_owned(),
            threads: 2,
            visible_devices: None,
            save_every: Duration::from_mins(1),
        },
        interrupt: Arc::new(AtomicBool::new(false)),
        events: Box::new(|_| {}),
    }
}

/// Hands an input to a context.
pub(crate) fn give(context: &mut StageContext, reference: &str, path: &Path, artifact: ArtifactType) {
    let given = InputArtifact { path: path.to_owned(), digest: String::new(), artifact };
    context.inputs.insert(reference.to_owned(), given);
}

/// The digest of every path and byte below a folder.
pub(crate) fn digest(folder: &Path) -> String {
    let mut files: Vec<PathBuf> = Vec::new();
    let mut folders = vec![folder.to_owned()];
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() { folders.push(path) } else { files.push(path) }
        }
    }
    files.sort();
    let mut hasher = blake3::Hasher::new();
    for file in files {
        hasher.update(file.strip_prefix(folder).unwrap().to_str().unwrap().as_bytes());
        hasher.update(blake3::hash(&std::fs::read(&file).unwrap()).as_bytes());
    }
    hasher.finalize().to_hex().to_string()
}

/// The values of a text column without nulls.
pub(crate) fn strings(column: Column) -> Vec<String> {
    match column {
        Column::Text(values) => values.into_iter().map(Option::unwrap).collect(),
        other => panic!("{other:?} is no text"),
    }
}
