//! Every weight of a model in one buffer, each weight a leaf of the gradient graph that looks into it.
//!
//! One buffer for weights and one for gradients make an optimizer step a handful of long vector operations whatever the
//! number of weights. Matrices that decay come first, so decay is one operation on a prefix. Weights that are frozen may
//! lie in part in a second buffer, of half precision. It knows names and shapes and nothing of what they are for.

use std::collections::BTreeMap;

use anyhow::{Context, Result, ensure};
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
    /// The first element in its buffer.
    pub offset: i64,
    /// Whether it lies in the buffer of half precision.
    pub half: bool,
}

impl Entry {
    /// Elements.
    fn length(&self) -> i64 {
        self.shape.iter().product()
    }
}

/// All weights of a model and their gradients.
#[derive(Debug)]
pub struct Weights {
    flat: Tensor,
    /// Frozen weights of half precision, `[Q]` bf16; empty where there are none.
    half: Tensor,
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
        Self::of_kind(plan, Kind::Float, device)
    }

    /// [`Weights::zeros`] of another floating kind.
    pub(crate) fn of_kind(plan: Vec<(String, Vec<i64>, bool)>, kind: Kind, device: Device) -> Self {
        let (entries, decayed, [length, _]) = lay_out(plan, |_| false);
        let flat = Tensor::zeros([length], (kind, device));
        let (gradient, half) = (flat.zeros_like(), Tensor::zeros([0], (Kind::BFloat16, device)));
        let leaves = entries.iter().map(|entry| leaf(&flat, &gradient, entry)).collect();
        Self { flat, half, gradient, decayed, entries, leaves }
    }

    /// [`Weights::zeros`] outside of the gradient graph: they take no gradients and no memory for them. Those that `half` names
    /// are kept in bf16.
    pub fn frozen(plan: Vec<(String, Vec<i64>, bool)>, half: impl Fn(&str) -> bool, device: Device) -> Self {
        let (entries, decayed, [length, halves]) = lay_out(plan, half);
        let flat = Tensor::zeros([length], (Kind::Float, device));
        let half = Tensor::zeros([halves], (Kind::BFloat16, device));
        let gradient = Tensor::zeros([0], (Kind::Float, device));
        let leaves = entries.iter().map(|entry| view(if entry.half { &half } else { &flat }, entry)).collect();
        Self { flat, half, gradient, decayed, entries, leaves }
    }

    /// All weights that are not of half precision, `[P]` f32; writing to it changes the model.
    pub fn flat(&self) -> &Tensor {
        &self.flat
    }

    /// Bytes of the weights alone.
    pub fn bytes(&self) -> u64 {
        (self.flat.numel() * self.flat.kind().elt_size_in_bytes() + self.half.numel() * 2) as u64
    }

    /// Weights of either precision.
    pub fn count(&self) -> u64 {
        (self.flat.numel() + self.half.numel()) as u64
    }

    /// All gradients, `[P]` f32, in the order of [`Weights::flat`]; empty where the weights are frozen.
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
        self.buffer(entry).narrow(0, entry.offset, rows * columns).view(shape.as_slice())
    }

    /// Where a weight lies.
    fn buffer(&self, entry: &Entry) -> &Tensor {
        if entry.half { &self.half } else { &self.flat }
    }

    /// The neighbours `first` .. as one leaf of the gradient graph, whose gradient lies where theirs do; `rows` is the sum of
    /// their rows.
    pub fn joined(&self, first: &str, rows: i64) -> Tensor {
        let entry = self.entries.iter().find(|entry| entry.name == first);
        let entry = entry.expect("a model asks for the weights that it planned");
        let mut shape = entry.shape.clone();
        shape[0] = rows;
        let joined = Entry { shape, ..entry.clone() };
        if self.gradient.numel() == 0 {
            view(self.buffer(entry), &joined)
        } else {
            leaf(&self.flat, &self.gradient, &joined)
        }
    }

    /// Every weight over its own memory, in the kind that it is kept in: `prefix` goes before each name.
    pub fn tensors(&self, prefix: &str) -> Vec<(String, Tensor)> {
        self.entries.iter().map(|entry| (format!("{prefix}{}", entry.name), view(self.buffer(entry), entry))).collect()
    }

    /// Takes the weights that [`Weights::tensors`] would name.
    pub fn load(&self, prefix: &str, tensors: &BTreeMap<String, Tensor>) -> Result<()> {
        self.take(prefix, tensors, |entry| self.buffer(entry))
    }

    /// A buffer shaped like [`Weights::flat`] of weights that are trained, as named tensors over its memory: `prefix` goes before each name.
    pub fn named(&self, prefix: &str, flat: &Tensor) -> Vec<(String, Tensor)> {
        self.entries.iter().map(|entry| (format!("{prefix}{}", entry.name), view(flat, entry))).collect()
    }

    /// Fills the buffer `flat` with the tensors that [`Weights::named`] would name.
    pub fn fill(&self, prefix: &str, flat: &Tensor, tensors: &BTreeMap<String, Tensor>) -> Result<()> {
        self.take(prefix, tensors, |_| flat)
    }

    fn take<'a>(
        &self,
        prefix: &str,
        tensors: &BTreeMap<String, Tensor>,
        buffer: impl Fn(&Entry) -> &'a Tensor,
    ) -> Result<()> {
        for entry in &self.entries {
            let name = format!("{prefix}{}", entry.name);
            let tensor = tensors.get(&name).with_context(|| format!("the weight `{name}` is missing"))?;
            let size = tensor.size();
            ensure!(size == entry.shape, "the weight `{name}` has the shape {size:?}, but {:?} is due", entry.shape);
            no_grad(|| view(buffer(entry), entry).copy_(tensor));
        }
        Ok(())
    }

    /// Sets the weight `name`; `false` where there is none of this name. Another shape is an error.
    pub fn set(&self, name: &str, tensor: &Tensor) -> Result<bool> {
        let Some(entry) = self.entries.iter().find(|entry| entry.name == name) else { return Ok(false) };
        let size = tensor.size();
        ensure!(size == entry.shape, "the weight `{name}` has the shape {size:?}, but {:?} is due", entry.shape);
        no_grad(|| view(self.buffer(entry), entry).copy_(tensor));
        Ok(true)
    }

    /// Sets every gradient to zero.
    pub fn zero_gradients(&self) {
        let _ = no_grad(|| self.gradient.shallow_clone().zero_());
    }
}

/// Places for the weights of a plan, those that decay first; the elements of these that are not of half precision, and of
/// either buffer.
fn lay_out(plan: Vec<(String, Vec<i64>, bool)>, half: impl Fn(&str) -> bool) -> (Vec<Entry>, i64, [i64; 2]) {
    let entry = |(name, shape, decays): (String, _, _)| Entry { half: half(&name), name, shape, decays, offset: 0 };
    let mut entries: Vec<Entry> = plan.into_iter().map(entry).collect();
    let (mut offsets, mut decayed) = ([0, 0], 0);
    for decays in [true, false] {
        for entry in entries.iter_mut().filter(|entry| entry.decays == decays) {
            let offset = &mut offsets[usize::from(entry.half)];
            entry.offset = *offset;
            *offset += entry.length();
        }
        if decays {
            decayed = offsets[0];
        }
    }
    (entries, decayed, offsets)
}

/// An entry as a leaf of the gradient graph, whose gradients are gathered in `gradient`.
fn leaf(flat: &Tensor, gradient: &Tensor, entry: &Entry) -> Tensor {
    let leaf = view(flat, entry).detach().set_requires_grad(true);
    // A backward pass adds into a gradient that exists, so giving the leaf's gradient the buffer's memory once gathers all
    // gradients there for good.
    (&leaf * 0.0).sum(leaf.kind()).backward();
    leaf.grad().set_data(&view(gradient, entry));
    leaf
}

fn view(flat: &Tensor, entry: &Entry) -> Tensor {
    flat.narrow(0, entry.offset, entry.length()).view(entry.shape.as_slice())
}
