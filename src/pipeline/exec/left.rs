//! What a stage has left in an output, as far as the engine looks at it.

use std::collections::BTreeMap;
use std::path::Path;

use anyhow::Context as _;
use serde_json::Value;

/// Whether there is a file anywhere below a folder, which may be missing.
pub(super) fn holds_file(folder: &Path) -> std::io::Result<bool> {
    let entries = match std::fs::read_dir(folder) {
        Ok(entries) => entries,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(false),
        Err(error) => return Err(error),
    };
    for entry in entries {
        let entry = entry?;
        if !entry.file_type()?.is_dir() || holds_file(&entry.path())? {
            return Ok(true);
        }
    }
    Ok(false)
}

/// The finite numbers of an output's `metrics.json`: of its table `metrics`, or of the whole file where it has none.
pub(super) fn read_metrics(folder: &Path) -> anyhow::Result<BTreeMap<String, f64>> {
    let text = match std::fs::read(folder.join("metrics.json")) {
        Ok(text) => text,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(BTreeMap::new()),
        Err(error) => return Err(error.into()),
    };
    let value: Value = serde_json::from_slice(&text)?;
    let fields = value.get("metrics").unwrap_or(&value).as_object().context("it is no table of numbers")?;
    let number = |(name, value): (&String, &Value)| {
        value.as_f64().filter(|number| number.is_finite()).map(|number| (name.clone(), number))
    };
    Ok(fields.iter().filter_map(number).collect())
}
