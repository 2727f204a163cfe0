//! One decoder layer: its leaves, and the steps of a forward pass through it.
//!
//! Everything but norms and rotations is computed in the kind of the model's precision. Weights that are kept wider are
//! rounded to it where they act, within the gradient graph, so that gradients reach them as wide as they are. On a processor
//! norms, attention and activation are kernels of our own where the kind allows (`native`), elsewhere libtorch's operations
//! (`packed` on a GPU in half precision, `plain`).

use tch::{Kind, Tensor, no_grad};

use crate::model::lora::Adapter;
use crate::model::plain::widened;
use crate::model::rope::Rotation;
use crate::model::{Layout, ModelConfig, packed, plain};
use crate::native::{self, Heads};

/// The leaves of one decoder layer.
#[derive(Debug)]
pub(crate) struct Layer {
    pub(crate) input_norm: Tensor,
    pub(crate) query_key_value: Projection,
    /// The norms of every query head and every key head, `[D]` each.
    pub(crate) head_norms: Option<(Tensor, Tensor)>,
    pub(crate) output: Projection,
    pub(crate) post_norm: Tensor,
    pub(crate) gate_up: Projection,
    pub(crate) down: Projection,
}

impl Layer {
    /// The layer outside of the gradient graph, adapters added to the weights.
    pub(crate) fn frozen(&self) -> Self {
        let norms = |(query, key): &(Tensor, Tensor)| (query.detach(), key.detach());
        Self {
            input_norm: self.input_norm.detach(),
            query_key_value: self.query_key_value.frozen(),
            head_norms: self.head_norms.as_ref().map(norms),
            output: self.output.frozen(),
            post_norm: self.post_norm.detach(),
            gate_up: self.gate_up.frozen(),
            down: self.down.frozen(),
        }
    }

    /// Queries, keys and values `[N, (queries + 2 shared) width]` of normed states `[N, H]`, not yet rotated.
    pub(crate) fn project(&self, normed: &Tensor, heads: Heads, epsilon: f64) -> Tensor {
        let projected = self.query_key_value.of(normed);
        match &self.head_norms {
            Some((query, key)) => norm_heads(&projected, heads, query, key, epsilon),
            None => projected,
        }
    }

    /// What the layer adds to `x` `[N, H]` behind its attention `mixed`: the states, and what is to be added to them.
    pub(crate) fn feed(&self, x: &Tensor, mixed: &Tensor, epsilon: f64) -> (Tensor, Tensor) {
        let (x, normed) = add_norm(x, Some(&self.output.of(mixed)), &self.post_norm, epsilon);
        let delta = self.down.of(&swiglu(&self.gate_up.of(&normed)));
        (x, delta)
    }
}

/// Matrices that read the same states, as one, and their biases.
#[derive(Debug)]
pub(crate) struct Projection {
    pub(crate) weight: Weight,
    pub(crate) bias: Option<Tensor>,
    /// What it computes in, however wide its weights are kept.
    pub(crate) kind: Kind,
}

#[derive(Debug)]
pub(crate) enum Weight {
    /// Neighbours in the buffer of weights are one leaf.
    Whole(Tensor),
    /// With adapters each part acts with its own.
    Parts(Vec<(Tensor, Option<Adapter>)>),
}

impl Projection {
    /// The matrix as it acts: with adapters, where it has some, whose sum is formed before it is rounded.
    fn effective(&self) -> Tensor {
        match &self.weight {
            Weight::Whole(weight) => weight.to_kind(self.kind),
            Weight::Parts(parts) => {
                let effective = parts.iter().map(|(weight, adapter)| match adapter {
                    Some(adapter) => (weight + adapter.delta()).to_kind(self.kind),
                    None => weight.to_kind(self.kind),
                });
                Tensor::cat(&effective.collect::<Vec<_>>(), 0)
            }
        }
    }

    /// `x @ weight^T + bias`.
    fn of(&self, x: &Tensor) -> Tensor {
        x.linear(&self.effective(), self.bias.as_ref().map(|bias| bias.to_kind(self.kind)).as_ref())
    }

    fn frozen(&self) -> Self {
        let weight = Weight::Whole(no_grad(|| self.effective()).detach());
        let bias = self.bias.as_ref().map(|bias| bias.detach().to_kind(self.kind));
        Self { weight, bias, kind: self.kind }
    }
}

/// The heads of the attention.
pub(crate) fn heads(config: &ModelConfig) -> Heads {
    let (queries, shared) = (config.num_attention_heads, config.num_key_value_heads);
    Heads { queries, shared, width: config.head_dim }
}

/// RMSNorm over the last dimension (Zhang and Sennrich 2019): of half precision in fp32, rounded once at the end.
pub(crate) fn norm(x: &Tensor, weight: &Tensor, epsilon: f64) -> Tensor {
    let wide = widened(x);
    let normed = if native::takes(&wide) {
        native::rms_norm(&wide, weight, epsilon)
    } else {
        plain::norm(&wide, weight, epsilon)
    };
    normed.to_kind(x.kind())
}

/// The sum of `x` and what is added to it, and its norm.
pub(crate) fn add_norm(x: &Tensor, delta: Option<&Tensor>, weight: &Tensor, epsilon: f64) -> (Tensor, Tensor) {
    match delta {
        Some(delta) if native::takes(x) => native::add_rms_norm(x, delta, weight, epsilon),
        _ => {
            let x = delta.map_or(x.shallow_clone(), |delta| x + delta);
            let normed = norm(&x, weight, epsilon);
            (x, normed)
        }
    }
}

fn swiglu(gate_up: &Tensor) -> Tensor {
    if native::takes(gate_up) { native::swiglu(gate_up) } else { plain::swiglu(gate_up) }
}

pub(crate) fn attention(projected: &Tensor, heads: Heads, layout: &Layout, rotation: &Rotation) -> Tensor {
    if native::takes(projected) {
        native::attention(projected, heads, layout.table(), layout.positions(), rotation.tables())
    } else if packed::takes(projected, heads) {
        packed::attention(projected, heads, layout, rotation)
    } else {
        plain::attention(projected, heads, layout, rotation)
    }
}

/// Norms every query head and every key head of projections `[N, (queries + 2 shared) width]`.
fn norm_heads(projected: &Tensor, heads: Heads, query: &Tensor, key: &Tensor, epsilon: f64) -> Tensor {
    let Heads { queries, shared, width } = heads;
    let all = projected.view([-1, queries + 2 * shared, width]);
    let normed = |first: i64, count: i64, weight: &Tensor| norm(&all.narrow(1, first, count), weight, epsilon);
    let values = all.narrow(1, queries + shared, shared);
    Tensor::cat(&[normed(0, queries, query), normed(queries, shared, key), values], 1).view_as(projected)
}
