//! Every weight of a model in one buffer, each weight a leaf of the gradient graph that looks into it.
//!
//! One buffer for weights and one for gradients make an optimizer step a handful of long vector operations whatever the
//! number of weights. Matrices that decay come first, so decay is one operation on a prefix. It knows names and shapes
//! and nothing of what they are for.

use std::borrow::Cow;
use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};
use safetensors::{Dtype, SafeTensors, View};
use tch::{Device, Kind, Tensor, no_grad};

/// One weight: its place in the buffer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    /// The name in `model.safetensors`.
    pub name: String,
    /// Its shape.
    pub shape: Vec<i64>,
    /// Whether weight decay applies to it.
    pub decays: bool,
    /// The first element in the buffer.
    pub offset: i64,
}

impl Entry {
    fn length(&self) -> i64 {
        self.shape.iter().product()
    }
}

/// All weights of a model and their gradients.
#[derive(Debug)]
pub struct Weights {
    flat: Tensor,
    gradient: Tensor,
    decayed: i64,
    entries: Vec<Entry>,
    leaves: Vec<Tensor>,
}

impl Weights {
    /// Weights with the names, shapes and decay flags of `plan`, all zero, on `device`.
    ///
    /// Neighbours of the plan with the same decay flag are neighbours in the buffer.
    pub fn zeros(plan: Vec<(String, Vec<i64>, bool)>, device: Device) -> Self {
        let mut entries: Vec<Entry> =
            plan.into_iter().map(|(name, shape, decays)| Entry { name, shape, decays, offset: 0 }).collect();
        let mut offset = 0;
        let mut decayed = 0;
        for decays in [true, false] {
            for entry in entries.iter_mut().filter(|entry| entry.decays == decays) {
                entry.offset = offset;
                offset += entry.length();
            }
            if decays {
                decayed = offset;
            }
        }
        let flat = Tensor::zeros([offset], (Kind::Float, device));
        let gradient = flat.zeros_like();
        let leaves: Vec<Tensor> =
            entries.iter().map(|entry| view(&flat, entry).detach().set_requires_grad(true)).collect();
        for (leaf, entry) in leaves.iter().zip(&entries) {
            // A backward pass adds into a gradient that exists, so giving each leaf's gradient the buffer's memory once
            // gathers all gradients there for good.
            (leaf * 0.0).sum(Kind::Float).backward();
            leaf.grad().set_data(&view(&gradient, entry));
        }
        let _ = no_grad(|| gradient.shallow_clone().zero_());
        Self { flat, gradient, decayed, entries, leaves }
    }

    /// All weights, `[P]` f32; writing to it changes the model.
    pub fn flat(&self) -> &Tensor {
        &self.flat
    }

    /// All gradients, `[P]` f32, in the order of [`Weights::flat`].
    pub fn gradient(&self) -> &Tensor {
        &self.gradient
    }

    /// Elements at the beginning of the buffer to which weight decay applies.
    pub fn decayed(&self) -> i64 {
        self.decayed
    }

    /// The weights' places, in the order of the plan.
    pub fn entries(&self) -> &[Entry] {
        &self.entries
    }

    /// The leaf `name`.
    pub fn leaf(&self, name: &str) -> Tensor {
        let index = self.entries.iter().position(|entry| entry.name == name);
        self.leaves[index.expect("a model asks for the weights that it planned")].shallow_clone()
    }

    /// Every leaf with its name, in the order of the plan.
    pub fn leaves(&self) -> Vec<(String, Tensor)> {
        self.entries.iter().zip(&self.leaves).map(|(entry, leaf)| (entry.name.clone(), leaf.shallow_clone())).collect()
    }

    /// The neighbouring matrices `first` .. `last` as one matrix over the same memory, outside of the gradient graph.
    ///
    /// They must have equal columns; `rows` is the sum of their rows.
    pub fn stacked(&self, first: &str, rows: i64) -> Tensor {
        let entry = self.entries.iter().find(|entry| entry.name == first);
        let entry = entry.expect("a model asks for the weights that it planned");
        let columns: i64 = entry.shape[1..].iter().product();
        let mut shape = entry.shape.clone();
        shape[0] = rows;
        self.flat.narrow(0, entry.offset, rows * columns).view(shape.as_slice())
    }

    /// A buffer shaped like [`Weights::flat`] as named tensors over its memory: `prefix` goes before each name.
    pub fn named(&self, prefix: &str, flat: &Tensor) -> Vec<(String, Tensor)> {
        self.entries.iter().map(|entry| (format!("{prefix}{}", entry.name), view(flat, entry))).collect()
    }

    /// Fills the buffer `flat` with the tensors that [`Weights::named`] would name.
    pub fn fill(&self, prefix: &str, flat: &Tensor, tensors: &BTreeMap<String, Tensor>) -> Result<()> {
        for entry in &self.entries {
            let name = format!("{prefix}{}", entry.name);
            let tensor = tensors.get(&name).with_context(|| format!("the weight `{name}` is missing"))?;
            let size = tensor.size();
            ensure!(size == entry.shape, "the weight `{name}` has the shape {size:?}, but {:?} is due", entry.shape);
            no_grad(|| view(flat, entry).copy_(tensor));
        }
        Ok(())
    }

    /// Sets every gradient to zero.
    pub fn zero_gradients(&self) {
        let _ = no_grad(|| self.gradient.shallow_clone().zero_());
    }
}

fn view(flat: &Tensor, entry: &Entry) -> Tensor {
    flat.narrow(0, entry.offset, entry.length()).view(entry.shape.as_slice())
}

/// Reads all tensors of a folder's `model.safetensors`, or of the shards that its index names, as f32 on the CPU.
pub fn read_folder(folder: &Path) -> Result<BTreeMap<String, Tensor>> {
    let mut tensors = BTreeMap::new();
    for path in files(folder)? {
        let bytes = std::fs::read(&path).with_context(|| format!("cannot read `{}`", path.display()))?;
        let read = SafeTensors::deserialize(&bytes)
            .with_context(|| format!("`{}` is no whole safetensors file", path.display()))?;
        for (name, tensor) in read.iter() {
            let kind = match tensor.dtype() {
                Dtype::F32 => Kind::Float,
                Dtype::BF16 => Kind::BFloat16,
                Dtype::F16 => Kind::Half,
                other => bail!("the weight `{name}` of `{}` has the type {other:?}", path.display()),
            };
            let shape: Vec<i64> = tensor.shape().iter().map(|&size| size as i64).collect();
            let value = Tensor::f_from_data_size(tensor.data(), &shape, kind)
                .with_context(|| format!("cannot take the weight `{name}` of `{}`", path.display()))?;
            let double = tensors.insert(name.to_owned(), value.to_kind(Kind::Float));
            ensure!(double.is_none(), "the weight `{name}` stands twice in `{}`", folder.display());
        }
    }
    Ok(tensors)
}

fn files(folder: &Path) -> Result<Vec<PathBuf>> {
    let index = folder.join("model.safetensors.index.json");
    if !index.exists() {
        return Ok(vec![folder.join("model.safetensors")]);
    }
    let text = std::fs::read_to_string(&index).with_context(|| format!("cannot read `{}`", index.display()))?;
    let parsed: serde_json::Value =
        serde_json::from_str(&text).with_context(|| format!("`{}` is no JSON", index.display()))?;
    let map = parsed["weight_map"].as_object();
    let map = map.with_context(|| format!("`{}` has no `weight_map`", index.display()))?;
    let names: BTreeSet<&str> = map.values().filter_map(serde_json::Value::as_str).collect();
    Ok(names.into_iter().map(|name| folder.join(name)).collect())
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
