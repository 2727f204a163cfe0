//! Safetensors in a Hugging Face folder: reading a file or its shards into [`Weights`], and laying tensors out in bytes.
//!
//! Weights go from the file's bytes straight to their place and are widened to f32 there, so a folder of any size and
//! type costs the bytes of one shard besides the model. It knows names, shapes and types, and nothing of what they are for.

use std::borrow::Cow;
use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};
use safetensors::tensor::TensorView;
use safetensors::{Dtype, SafeTensors, View};
use serde_json::Value;
use tch::{Device, Kind, Tensor, no_grad};

use crate::model::weights::Weights;

/// The one file of a folder without shards.
pub const WEIGHTS_FILE: &str = "model.safetensors";
/// The file that says which shard holds which weight.
pub const INDEX_FILE: &str = "model.safetensors.index.json";

/// Reads the weights of `folder` (f32, bf16 or f16) into `weights`.
///
/// Every weight must stand in the folder once, in its shape; a weight without a place in the model is an error.
/// `tied` names a copy that some programs write of another weight, `(copy, original)`: an equal one is let pass.
pub fn read(folder: &Path, weights: &Weights, tied: Option<(&str, &str)>) -> Result<()> {
    let mut missing: BTreeSet<&str> = weights.entries().iter().map(|entry| entry.name.as_str()).collect();
    let mut copy = None;
    let (files, index) = files(folder)?;
    for path in &files {
        let bytes = std::fs::read(path).with_context(|| match &index {
            Some(index) => format!("cannot read the shard `{}` that `{}` names", path.display(), index.display()),
            None => format!("cannot read `{}`", path.display()),
        })?;
        let read = SafeTensors::deserialize(&bytes)
            .with_context(|| format!("`{}` is no whole safetensors file", path.display()))?;
        // In the order of names, so that of several mistakes the same is told every time.
        for (name, view) in read.iter().collect::<BTreeMap<_, _>>() {
            // Old folders of Llama keep the rotary frequencies, which the configuration determines.
            if name.ends_with(".rotary_emb.inv_freq") {
                continue;
            }
            let tensor = tensor(&view).with_context(|| format!("the weight `{name}` of `{}`", path.display()))?;
            if tied.is_some_and(|(copy, _)| copy == name) {
                copy = Some(tensor);
                continue;
            }
            let placed = weights.set(name, &tensor).with_context(|| format!("in `{}`", path.display()))?;
            ensure!(placed, "the weight `{name}` of `{}` has no place in the model", path.display());
            ensure!(missing.remove(name), "the weight `{name}` stands twice in `{}`", folder.display());
        }
    }
    if let Some(name) = missing.first() {
        let others = match missing.len() - 1 {
            0 => String::new(),
            others => format!(", and so are {others} others"),
        };
        bail!("the weight `{name}` is missing in `{}`{others}", index.unwrap_or_else(|| folder.to_owned()).display());
    }
    if let (Some((name, original)), Some(copy)) = (tied, copy) {
        // A copy is harmless, another matrix would be a lost weight.
        let stored = weights.leaf(original).detach();
        let same = copy.size() == stored.size() && copy.to_device(stored.device()) == stored;
        ensure!(same, "`{}` ties `{name}` to `{original}`, but they differ", folder.display());
    }
    Ok(())
}

/// Reads the weight `name` of `folder` as f32 on the CPU.
pub fn read_one(folder: &Path, name: &str) -> Result<Tensor> {
    for path in files(folder)?.0 {
        let reading = || format!("cannot read `{}`", path.display());
        let bytes = std::fs::read(&path).with_context(reading)?;
        let file = SafeTensors::deserialize(&bytes).with_context(reading)?;
        if let Ok(view) = file.tensor(name) {
            return tensor(&view).with_context(|| format!("the weight `{name}` of `{}`", path.display()));
        }
    }
    bail!("the weight `{name}` is missing in `{}`", folder.display())
}

/// A stored tensor as f32 on the CPU.
fn tensor(view: &TensorView<'_>) -> Result<Tensor> {
    let kind = match view.dtype() {
        Dtype::F32 => Kind::Float,
        Dtype::BF16 => Kind::BFloat16,
        Dtype::F16 => Kind::Half,
        other => bail!("its type is {other:?}, not F32, BF16 or F16"),
    };
    let shape: Vec<i64> = view.shape().iter().map(|&size| size as i64).collect();
    Ok(Tensor::f_from_data_size(view.data(), &shape, kind)?.to_kind(Kind::Float))
}

/// The files that hold the weights, and the index that names them where there is one.
fn files(folder: &Path) -> Result<(Vec<PathBuf>, Option<PathBuf>)> {
    let (one, index) = (folder.join(WEIGHTS_FILE), folder.join(INDEX_FILE));
    if one.exists() {
        return Ok((vec![one], None));
    }
    if !index.exists() {
        let other = folder.join("pytorch_model.bin").exists() || folder.join("pytorch_model.bin.index.json").exists();
        let hint = if other { ": `pytorch_model.bin` is not read, save the model as safetensors" } else { "" };
        bail!("`{}` has neither `{WEIGHTS_FILE}` nor `{INDEX_FILE}`{hint}", folder.display());
    }
    let text = std::fs::read_to_string(&index).with_context(|| format!("cannot read `{}`", index.display()))?;
    let parsed: Value = serde_json::from_str(&text).with_context(|| format!("`{}` is no JSON", index.display()))?;
    let map = parsed["weight_map"].as_object();
    let map = map.with_context(|| format!("`{}` has no `weight_map`", index.display()))?;
    let names: BTreeSet<&str> = map.values().filter_map(Value::as_str).collect();
    for name in &names {
        let path = folder.join(name);
        ensure!(path.exists(), "the shard `{name}` that `{}` names is missing", index.display());
    }
    Ok((names.into_iter().map(|name| folder.join(name)).collect(), Some(index)))
}

/// Writes `tensors` as the file `path`; the same tensors give the same bytes.
pub fn write(path: &Path, tensors: Vec<(String, Tensor)>) -> Result<()> {
    let tensors: Vec<(String, Stored)> =
        tensors.into_iter().map(|(name, tensor)| Ok((name, Stored::tensor(&tensor)?))).collect::<Result<_>>()?;
    // One entry only: the file's header is written in the order of a hash map.
    let metadata = std::collections::HashMap::from([("format".to_owned(), "pt".to_owned())]);
    safetensors::serialize_to_file(tensors, Some(metadata), path)
        .with_context(|| format!("cannot write `{}`", path.display()))
}

/// The bytes of a tensor for a safetensors file.
#[derive(Debug)]
pub struct Stored {
    dtype: Dtype,
    shape: Vec<usize>,
    bytes: Vec<u8>,
}

impl Stored {
    /// An opaque row of bytes.
    pub fn bytes(bytes: &[u8]) -> Self {
        Self { dtype: Dtype::U8, shape: vec![bytes.len()], bytes: bytes.to_vec() }
    }

    /// A tensor's elements, little-endian; f32, f64 and i64 can be stored.
    pub fn tensor(tensor: &Tensor) -> Result<Self> {
        let flat = no_grad(|| tensor.detach().to_device(Device::Cpu).contiguous().view(-1));
        let (dtype, bytes) = match tensor.kind() {
            Kind::Float => (Dtype::F32, little_endian(&Vec::<f32>::try_from(&flat)?, f32::to_le_bytes)),
            Kind::Double => (Dtype::F64, little_endian(&Vec::<f64>::try_from(&flat)?, f64::to_le_bytes)),
            Kind::Int64 => (Dtype::I64, little_endian(&Vec::<i64>::try_from(&flat)?, i64::to_le_bytes)),
            other => bail!("tensors of the type {other:?} are not stored"),
        };
        Ok(Self { dtype, shape: tensor.size().iter().map(|&size| size as usize).collect(), bytes })
    }
}

fn little_endian<T: Copy, const N: usize>(values: &[T], bytes: impl Fn(T) -> [u8; N]) -> Vec<u8> {
    values.iter().flat_map(|&value| bytes(value)).collect()
}

impl View for Stored {
    fn dtype(&self) -> Dtype {
        self.dtype
    }
    fn shape(&self) -> &[usize] {
        &self.shape
    }
    fn data(&self) -> Cow<'_, [u8]> {
        Cow::Borrowed(&self.bytes)
    }
    fn data_len(&self) -> usize {
        self.bytes.len()
    }
}

#[cfg(test)]
mod tests {
    use tch::Device;

    use super::*;

    fn weights() -> Weights {
        let plan = [("a", vec![2, 2], true), ("b", vec![3], false), ("c", vec![2, 2], true)];
        Weights::zeros(plan.map(|(name, shape, decays)| (name.to_owned(), shape, decays)).into(), Device::Cpu)
    }

    fn tensor(values: &[f32], kind: Kind) -> Tensor {
        Tensor::from_slice(values).to_kind(kind)
    }

    /// Writes bf16 and f16 as well, which [`Stored`] does not.
    fn file(path: &Path, tensors: &[(&str, Tensor)]) {
        let named: Vec<(&str, Tensor)> = tensors.iter().map(|(name, tensor)| (*name, tensor.shallow_clone())).collect();
        Tensor::write_safetensors(&named, path).expect("written");
    }

    fn shards(folder: &Path) {
        let [a, b, c] = [[1.0, 2.0, 3.0, 4.0].as_slice(), &[5.0, 6.0, 7.5], &[-1.0, 0.5, 0.25, 8.0]];
        let square = |values: &[f32], kind| tensor(values, kind).view([2, 2]);
        file(&folder.join("one.safetensors"), &[("a", square(a, Kind::BFloat16)), ("b", tensor(b, Kind::Half))]);
        file(&folder.join("two.safetensors"), &[("c", square(c, Kind::Float))]);
        let map = serde_json::json!({"a": "one.safetensors", "b": "one.safetensors", "c": "two.safetensors"});
        std::fs::write(folder.join(INDEX_FILE), serde_json::json!({"weight_map": map}).to_string()).expect("written");
    }

    fn refused(folder: &Path, tied: Option<(&str, &str)>) -> String {
        format!("{:#}", read(folder, &weights(), tied).expect_err("it is refused"))
    }

    #[test]
    fn shards_of_any_type_are_widened_into_place() {
        let folder = tempfile::tempdir().expect("a folder");
        shards(folder.path());
        let weights = weights();
        read(folder.path(), &weights, None).expect("all weights");
        let all = Vec::<f32>::try_from(weights.flat()).expect("numbers");
        assert_eq!(all, [1.0, 2.0, 3.0, 4.0, -1.0, 0.5, 0.25, 8.0, 5.0, 6.0, 7.5]);
    }

    #[test]
    fn what_is_wrong_with_a_folder_is_named() {
        let folder = tempfile::tempdir().expect("a folder");
        let folder = folder.path();
        assert!(refused(folder, None).contains("neither `model.safetensors` nor"));
        std::fs::write(folder.join("pytorch_model.bin"), "").expect("written");
        assert!(refused(folder, None).contains("`pytorch_model.bin` is not read"));
        shards(folder);
        std::fs::remove_file(folder.join("two.safetensors")).expect("removed");
        let missing = refused(folder, None);
        assert!(missing.contains("`two.safetensors`") && missing.contains(INDEX_FILE), "{missing}");
        let whole = |value: f32| tensor(&[value; 4], Kind::Float).view([2, 2]);
        file(&folder.join("two.safetensors"), &[("d", whole(1.0))]);
        assert!(refused(folder, None).contains("`d`"));
        file(&folder.join("two.safetensors"), &[("c", tensor(&[1.0; 4], Kind::Float))]);
        assert!(refused(folder, None).contains("`c` has the shape [4], but [2, 2]"));
        file(&folder.join("two.safetensors"), &[("a", whole(1.0)), ("c", whole(1.0))]);
        assert!(refused(folder, None).contains("`a` stands twice"));
        file(&folder.join("two.safetensors"), &[("c", tensor(&[1.0; 4], Kind::Double).view([2, 2]))]);
        assert!(refused(folder, None).contains("F64"));
        std::fs::write(folder.join("two.safetensors"), "short").expect("written");
        assert!(refused(folder, None).contains("no whole safetensors file"));
    }

    #[test]
    fn a_tied_copy_must_be_one() {
        let folder = tempfile::tempdir().expect("a folder");
        shards(folder.path());
        let copy = |values: &[f32]| {
            let tensors = [("head", tensor(values, Kind::Float).view([2, 2]))];
            let c = ("c", tensor(&[0.0; 4], Kind::Float).view([2, 2]));
            file(&folder.path().join("two.safetensors"), &[c, ("head", tensors[0].1.shallow_clone())]);
        };
        copy(&[1.0, 2.0, 3.0, 4.0]);
        read(folder.path(), &weights(), Some(("head", "a"))).expect("an equal copy");
        assert!(refused(folder.path(), None).contains("`head`"));
        copy(&[1.0, 2.0, 3.0, 5.0]);
        assert!(refused(folder.path(), Some(("head", "a"))).contains("they differ"));
    }
}
