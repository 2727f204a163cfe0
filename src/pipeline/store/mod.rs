//! The content-addressed store under `artifacts/`: objects, manifests, locks, work folders; the commit protocol.

use std::collections::BTreeMap;
use std::fmt;

use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::pipeline::stage::{ArtifactType, Part};

/// A BLAKE3 digest as 64 hexadecimal digits: of a folder object, a recipe or a key.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Digest(pub String);

impl Digest {
    /// The first ten digits, for people.
    pub fn short(&self) -> &str {
        &self.0[..self.0.len().min(10)]
    }
}

impl fmt::Display for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Debug for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Digest({})", self.short())
    }
}

/// What entered a key, kept beside the result so that a change can be explained.
///
/// The key is the BLAKE3 hash of the canonical JSON (RFC 8785) of exactly this value.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct KeyParts {
    /// The kind's name.
    pub kind: String,
    /// The kind's version.
    pub version: u32,
    /// Versions of tasks, formats, rewards and shared modules, sorted.
    pub parts: Vec<Part>,
    /// Every parameter with defaults; edges as `{"$input": content digest}`, files as `{"$file": content digest}` (and `as`).
    pub params: Value,
    /// [`crate::random::RNG_ABI`].
    pub rng_abi: u32,
}

/// The record of a finished stage; written last, it is the only commit point.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Manifest {
    /// The key, which names the manifest's file.
    pub key: Digest,
    /// The recipe under which it was first made.
    pub recipe: Digest,
    /// What the key is the hash of.
    pub parts: KeyParts,
    /// Parameters as planned, with references by name, for people.
    pub params: Value,
    /// Reference to (content digest, path at the time) of each input.
    pub inputs: BTreeMap<String, Digest>,
    /// The outputs, default one first.
    pub outputs: Vec<StoredOutput>,
    /// Wall seconds over all attempts.
    pub seconds: f64,
    /// How many attempts it took; 1 when never interrupted.
    pub attempts: u32,
    /// When it was published, RFC 3339.
    pub finished: String,
    /// Build, CPU features, libtorch, device, threads: what the numbers were computed with.
    pub numerics: BTreeMap<String, String>,
    /// The headline numbers of the stage's `metrics.json`, where it wrote one.
    pub metrics: BTreeMap<String, f64>,
}

/// A named output in the store.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct StoredOutput {
    /// Its name.
    pub name: String,
    /// What it carries.
    #[serde(rename = "type")]
    pub artifact: ArtifactType,
    /// The digest of the folder object.
    pub digest: Digest,
    /// Every file of the folder as it was recorded after the rename.
    pub files: Vec<StoredFile>,
}

/// A file of an object, with the stat that lets a hit skip hashing it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct StoredFile {
    /// Path below the folder, with `/`.
    pub path: String,
    /// Whether it is executable.
    pub executable: bool,
    /// Size in bytes.
    pub size: u64,
    /// BLAKE3 of its content.
    pub digest: Digest,
    /// (device, inode, size, mtime in ns, ctime in ns).
    pub stat: (u64, u64, u64, i128, i128),
}
