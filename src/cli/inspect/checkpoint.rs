//! A checkpoint: its configuration, how many parameters it has, and its tensors. Only the headers of the weights are read.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::fs::File;
use std::io::Read as _;
use std::path::Path;

use anyhow::{Context as _, ensure};
use safetensors::tensor::{Metadata, TensorInfo};
use serde_json::{Value, json};

use super::{Look, Seen, more};
use crate::cli::render;

/// Fields of a configuration that are shown first; the others follow by name.
const FIRST: [&str; 8] = [
    "model_type",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "intermediate_size",
    "vocab_size",
    "max_position_embeddings",
];

/// A header may be so long, in bytes; a longer one is no header.
const HEADER: u64 = 100 << 20;

/// A tensor.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize)]
struct Tensor {
    name: String,
    shape: Vec<usize>,
    dtype: String,
}

impl Tensor {
    fn elements(&self) -> usize {
        self.shape.iter().product()
    }
}

pub(super) fn inspect(folder: &Path, look: &Look<'_>) -> anyhow::Result<Seen> {
    let path = folder.join("config.json");
    let config = std::fs::read(&path).with_context(|| format!("reading `{}`", path.display()))?;
    let config: serde_json::Map<String, Value> =
        serde_json::from_slice(&config).with_context(|| format!("reading `{}`", path.display()))?;
    let mut tensors = Vec::new();
    for file in weights(folder)? {
        tensors.extend(header(&folder.join(file))?);
    }
    tensors.sort_by_cached_key(|tensor: &Tensor| natural(&tensor.name));
    let parameters: usize = tensors.iter().map(Tensor::elements).sum();
    let mut text =
        format!("{} parameters in {}\n\n", render::count(parameters as u64), render::plural(tensors.len(), "tensor"));
    let known = FIRST.iter().filter_map(|name| Some((*name, config.get(*name)?)));
    let others =
        config.iter().filter(|(name, _)| !FIRST.contains(&name.as_str())).map(|(name, value)| (name.as_str(), value));
    let width = config.keys().map(String::len).max().unwrap_or(0);
    for (name, value) in known.chain(others) {
        let _ = writeln!(text, "  {name:<width$}  {value}");
    }
    let stacked = stacked(&tensors);
    let shown = stacked.len().min(look.args.count.max(24));
    let rows = stacked.iter().take(shown).map(|(name, times, tensor)| {
        let shape: Vec<String> = tensor.shape.iter().map(usize::to_string).collect();
        let all = tensor.elements() * times;
        let times = if *times > 1 { format!("x {times}") } else { String::new() };
        vec![name.clone(), shape.join(" x "), tensor.dtype.clone(), times, render::count(all as u64)]
    });
    text.push('\n');
    text += &render::columns(&["tensor", "shape", "type", "", "parameters"], &[1, 4], rows.collect(), None);
    text += &more(stacked.len(), shown);
    Ok(Seen { value: json!({"parameters": parameters, "config": config, "tensors": tensors}), text })
}

/// The content of an index of weights.
#[derive(serde::Deserialize)]
struct Index {
    weight_map: BTreeMap<String, String>,
}

/// The files of the weights: one, or those that an index names.
fn weights(folder: &Path) -> anyhow::Result<Vec<String>> {
    let index = folder.join("model.safetensors.index.json");
    if !index.exists() {
        return Ok(vec!["model.safetensors".to_owned()]);
    }
    let reading = || format!("reading `{}`", index.display());
    let index: Index = serde_json::from_slice(&std::fs::read(&index).with_context(reading)?).with_context(reading)?;
    let mut files: Vec<String> = index.weight_map.into_values().collect();
    files.sort();
    files.dedup();
    Ok(files)
}

/// The tensors that a file of weights says it has.
fn header(path: &Path) -> anyhow::Result<Vec<Tensor>> {
    let read = || {
        let mut file = File::open(path)?;
        let mut length = [0; 8];
        file.read_exact(&mut length)?;
        let length = u64::from_le_bytes(length);
        ensure!(length <= HEADER && length <= file.metadata()?.len(), "it is no safetensors file");
        let mut bytes = vec![0; length as usize];
        file.read_exact(&mut bytes)?;
        let metadata: Metadata = serde_json::from_slice(&bytes)?;
        let tensor = |(name, info): (String, &TensorInfo)| Tensor {
            name,
            shape: info.shape.clone(),
            dtype: format!("{:?}", info.dtype).to_lowercase(),
        };
        Ok(metadata.tensors().into_iter().map(tensor).collect())
    };
    read().with_context(|| format!("reading `{}`", path.display()))
}

/// A name in which numbers sort as numbers.
fn natural(name: &str) -> Vec<(String, u64)> {
    name.split('.').map(|part| part.parse().map_or((part.to_owned(), 0), |number| (String::new(), number))).collect()
}

/// Tensors of all layers that are alike as one, named with `*` for the layer.
fn stacked(tensors: &[Tensor]) -> Vec<(String, usize, &Tensor)> {
    let mut all: Vec<(String, usize, &Tensor)> = Vec::new();
    for tensor in tensors {
        let is_number = |part: &&str| part.parse::<u64>().is_ok();
        let parts: Vec<&str> = tensor.name.split('.').map(|part| if is_number(&part) { "*" } else { part }).collect();
        let name = parts.join(".");
        match all.iter_mut().find(|(known, _, like)| {
            *known == name && like.shape == tensor.shape && like.dtype == tensor.dtype && name.contains('*')
        }) {
            Some((_, times, _)) => *times += 1,
            None => all.push((name, 1, tensor)),
        }
    }
    all
}

#[cfg(test)]
mod tests {
    use super::super::tests::look_at;
    use super::*;

    #[test]
    fn a_folder_of_transformers_is_read_without_its_weights() {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("learn/tests/fixtures/models/qwen2_tied");
        let seen = look_at(&[], |look| inspect(&folder, look)).unwrap();
        insta::assert_snapshot!(seen.text);
        let elements = |tensor: &Value| {
            tensor["shape"].as_array().unwrap().iter().map(|side| side.as_u64().unwrap()).product::<u64>()
        };
        let sum: u64 = seen.value["tensors"].as_array().unwrap().iter().map(elements).sum();
        assert_eq!(seen.value["parameters"], sum);
        let sharded = Path::new(env!("CARGO_MANIFEST_DIR")).join("learn/tests/fixtures/models/qwen2_yarn");
        let seen = look_at(&[], |look| inspect(&sharded, look)).unwrap();
        assert!(seen.value["tensors"].as_array().unwrap().len() > 10);
    }

    #[test]
    fn what_is_no_file_of_weights_is_named() {
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join("config.json"), "{}").unwrap();
        std::fs::write(folder.path().join("model.safetensors"), [255; 40]).unwrap();
        let error = format!("{:#}", look_at(&[], |look| inspect(folder.path(), look)).err().unwrap());
        assert!(error.contains("model.safetensors") && error.contains("no safetensors file"), "{error}");
    }
}
