//! What stands beside the weights of a folder: configuration, tokenizer and generation files.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result};
use serde_json::{Value, json};

/// Writes what stands beside the weights of a folder of fp32: configuration, tokenizer and generation files of `companions`.
pub fn save_companions(companions: &Path, folder: &Path) -> Result<()> {
    fs::create_dir_all(folder).with_context(|| format!("cannot make `{}`", folder.display()))?;
    copy_companions(companions, folder)?;
    let from = companions.join("config.json");
    let text = fs::read_to_string(&from).with_context(|| format!("cannot read `{}`", from.display()))?;
    let mut config: Value = serde_json::from_str(&text).with_context(|| format!("`{}` is no JSON", from.display()))?;
    // Older and newer programs call the type of the stored weights by these two names.
    let field = if config["dtype"].is_null() { "torch_dtype" } else { "dtype" };
    config[field] = json!("float32");
    let to = folder.join("config.json");
    let text = serde_json::to_string_pretty(&config).context("a configuration is plain data")?;
    fs::write(&to, text + "\n").with_context(|| format!("cannot write `{}`", to.display()))
}

/// Copies what stands beside the weights: every file of `from` but weights and configuration.
fn copy_companions(from: &Path, to: &Path) -> Result<()> {
    let listing = || format!("cannot list `{}`", from.display());
    for entry in fs::read_dir(from).with_context(listing)? {
        let path = entry.with_context(listing)?.path();
        let Some(name) = path.file_name().and_then(|name| name.to_str()).filter(|_| path.is_file()) else { continue };
        let extension = path.extension().and_then(|extension| extension.to_str()).unwrap_or_default();
        let weights = matches!(extension, "safetensors" | "bin" | "pt" | "pth") || name.ends_with(".index.json");
        if !weights && name != "config.json" {
            // The bytes alone are copied: an artifact is read-only, what is written here is not.
            let bytes = fs::read(&path).with_context(|| format!("cannot read `{}`", path.display()))?;
            fs::write(to.join(name), bytes).with_context(|| format!("cannot write `{name}` to `{}`", to.display()))?;
        }
    }
    Ok(())
}
