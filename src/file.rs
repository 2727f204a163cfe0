//! Files of the user's as parameters name them, and the working folders in which programs find them.
//!
//! A file reads from a plain string and writes a tagged object, so that one walk over serialised parameters finds every
//! file without knowing whose they are.

use std::fs::Permissions;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Component, Path, PathBuf};

use anyhow::Context as _;
use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use serde_json::{Value, json};

/// A file or folder of the user's, known by its content alone.
///
/// It reads from a string, relative to the TOML file that names it, and writes `{"$file": absolute path}`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SourceFile {
    /// Where it lies, absolute once the specification is read.
    pub path: PathBuf,
}

/// A file or folder of the user's, known by its content and by the relative path at which it must stand.
///
/// It writes `{"$file": absolute path, "as": relative path}`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PlacedFile {
    /// Where it lies, absolute once the specification is read.
    pub path: PathBuf,
    /// The relative path, as the user wrote it, at which the stage finds it.
    pub placed: String,
}

impl Serialize for SourceFile {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        json!({"$file": self.path}).serialize(serializer)
    }
}

impl<'de> Deserialize<'de> for SourceFile {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        tagged_string(deserializer, "$file").map(|(path, _)| Self { path: path.into() })
    }
}

impl JsonSchema for SourceFile {
    fn schema_name() -> std::borrow::Cow<'static, str> {
        "SourceFile".into()
    }

    fn inline_schema() -> bool {
        true
    }

    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        json_schema!({"type": "string", "x-file": "content"})
    }
}

impl Serialize for PlacedFile {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        json!({"$file": self.path, "as": self.placed}).serialize(serializer)
    }
}

impl<'de> Deserialize<'de> for PlacedFile {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let (path, placed) = tagged_string(deserializer, "$file")?;
        Ok(Self { placed: placed.unwrap_or_else(|| path.clone()), path: path.into() })
    }
}

impl JsonSchema for PlacedFile {
    fn schema_name() -> std::borrow::Cow<'static, str> {
        "PlacedFile".into()
    }

    fn inline_schema() -> bool {
        true
    }

    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        json_schema!({"type": "string", "x-file": "placed"})
    }
}

/// A folder of the user's, known by its content, or a repository of a hub, known by its name and commit.
///
/// It reads from a string, relative to the TOML file that names it where there is such a folder, and writes
/// `{"$file": absolute path}` or the name as it is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Source {
    /// Where the folder lies, absolute once the specification is read.
    Folder(PathBuf),
    /// `organisation/name` or `organisation/name@commit`.
    Repository(String),
}

/// Whether a text that is no path names a repository of a hub: `organisation/name`, with or without `@commit`.
pub fn names_a_repository(text: &str) -> bool {
    let name = text.split_once('@').map_or(text, |(name, _)| name);
    let word = |word: &str| {
        word.starts_with(|c: char| c.is_ascii_alphanumeric())
            && word.chars().all(|c| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.'))
    };
    name.split_once('/').is_some_and(|(organisation, name)| word(organisation) && word(name))
}

impl Serialize for Source {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self {
            Self::Folder(path) => json!({"$file": path}).serialize(serializer),
            Self::Repository(name) => name.serialize(serializer),
        }
    }
}

impl<'de> Deserialize<'de> for Source {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let value = Value::deserialize(deserializer)?;
        match value.as_str() {
            Some(text) if names_a_repository(text) => Ok(Self::Repository(text.to_owned())),
            _ => {
                let read = tagged_string(value, "$file").map_err(serde::de::Error::custom);
                read.map(|(path, _)| Self::Folder(path.into()))
            }
        }
    }
}

impl JsonSchema for Source {
    fn schema_name() -> std::borrow::Cow<'static, str> {
        "Source".into()
    }

    fn inline_schema() -> bool {
        true
    }

    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        json_schema!({"type": "string", "x-file": "source"})
    }
}

/// Reads a plain string, or the object that a tagged type writes; gives the string and the object's `as`.
pub(crate) fn tagged_string<'de, D: Deserializer<'de>>(
    deserializer: D,
    tag: &str,
) -> Result<(String, Option<String>), D::Error> {
    use serde::de::Error as _;
    match Value::deserialize(deserializer)? {
        Value::String(text) => Ok((text, None)),
        Value::Object(fields) => {
            let text = fields.get(tag).and_then(Value::as_str);
            let placed = fields.get("as").and_then(Value::as_str).map(str::to_owned);
            text.map(|text| (text.to_owned(), placed)).ok_or_else(|| D::Error::custom(format!("expected `{tag}`")))
        }
        other => Err(D::Error::custom(format!("expected a string, found `{other}`"))),
    }
}

/// A file that has no place in a working folder.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Misplaced {
    /// Its index in the list of files.
    pub index: usize,
    /// What is wrong.
    pub message: String,
    /// What the user may do.
    pub hint: Option<String>,
}

/// The files that lie outside of the working folder or where another one lies.
pub fn misplaced(files: &[PlacedFile]) -> Vec<Misplaced> {
    let mut found = Vec::new();
    let mut seen: Vec<PathBuf> = Vec::new();
    for (index, file) in files.iter().enumerate() {
        match place(&file.placed) {
            None => {
                let message = format!("`{}` has no place in the working folder", file.placed);
                let hint = "give a relative path without `..`: files stand where they lie beside the TOML file";
                found.push(Misplaced { index, message, hint: Some(hint.to_owned()) });
            }
            Some(place) if seen.iter().any(|other| other.starts_with(&place) || place.starts_with(other)) => {
                found.push(Misplaced { index, message: format!("`{}` is there already", file.placed), hint: None });
            }
            Some(place) => seen.push(place),
        }
    }
    found
}

/// Copies every file to its place in `folder`.
pub fn lay_out(files: &[PlacedFile], folder: &Path) -> anyhow::Result<()> {
    for file in files {
        let place = place(&file.placed).with_context(|| format!("`{}` cannot be placed", file.placed))?;
        copy(&file.path, &folder.join(place))?;
    }
    Ok(())
}

/// The relative path at which a file stands, without `.`; `None` if that is not below the folder.
fn place(path: &str) -> Option<PathBuf> {
    let mut place = PathBuf::new();
    for component in Path::new(path).components() {
        match component {
            Component::Normal(name) => place.push(name),
            Component::CurDir => {}
            Component::ParentDir | Component::RootDir | Component::Prefix(_) => return None,
        }
    }
    (place != PathBuf::new()).then_some(place)
}

/// Copies a user's file or folder; links become what they point at, and of the mode only the executable bit is kept.
fn copy(from: &Path, to: &Path) -> anyhow::Result<()> {
    let failed = || format!("cannot copy `{}` to `{}`", from.display(), to.display());
    if let Some(folder) = to.parent() {
        std::fs::create_dir_all(folder).with_context(failed)?;
    }
    let metadata = std::fs::metadata(from).with_context(failed)?;
    if metadata.is_dir() {
        std::fs::create_dir_all(to).with_context(failed)?;
        for entry in std::fs::read_dir(from).with_context(failed)? {
            let entry = entry.with_context(failed)?;
            copy(&entry.path(), &to.join(entry.file_name()))?;
        }
        return Ok(());
    }
    std::fs::copy(from, to).with_context(failed)?;
    let mode = if metadata.permissions().mode() & 0o111 == 0 { 0o644 } else { 0o755 };
    std::fs::set_permissions(to, Permissions::from_mode(mode)).with_context(failed)
}
