//! A forward pass and its backward pass, with every activation kept or with activation checkpointing (Chen et al. 2016).
//!
//! With checkpointing layers run outside of the gradient graph, and only what each of them reads is kept. The backward pass
//! goes from the loss to the final states and then down the layers: each runs again, now in the graph, and hands its gradient
//! down. The operations and their order of sums are those of a pass that keeps everything, so the gradients are its bits.

use anyhow::Result;
use tch::{Tensor, no_grad};

use crate::batch::Batch;
use crate::model::Transformer;
use crate::{device, native};

/// A forward pass that waits for its backward pass.
pub struct Pass<'a> {
    model: &'a Transformer,
    states: Tensor,
    checkpoints: Option<Checkpoints>,
}

/// What is kept of the layers.
struct Checkpoints {
    /// The states that the first layer reads, in the gradient graph of the embedding.
    embedded: Tensor,
    /// What each layer reads, `[T, H]`, outside of any graph.
    read: Vec<Tensor>,
}

impl<'a> Pass<'a> {
    /// The states of `batch` under `model`, which says whether activations are kept.
    pub fn forward(model: &'a Transformer, batch: &Batch) -> Self {
        if !model.activation_checkpointing() {
            return Self { model, states: batch.states(model), checkpoints: None };
        }
        let embedded = model.embed(&batch.ids, &batch.layout);
        let (states, read) = no_grad(|| {
            let (mut x, mut delta, mut read) = (embedded.detach(), None, Vec::new());
            for index in 0..model.layers().len() {
                let through = model.through(index, &x, delta.as_ref(), &batch.layout, Some(&batch.positions));
                read.push(through.read);
                (x, delta) = (through.states, Some(through.delta));
            }
            (delta.map_or_else(|| x.shallow_clone(), |delta| &x + delta), read)
        });
        Self { model, states: states.set_requires_grad(true), checkpoints: Some(Checkpoints { embedded, read }) }
    }

    /// The hidden states `[N, H]` that predict the targets, from which the gradient graph goes on.
    pub fn states(&self) -> &Tensor {
        &self.states
    }

    /// Adds the gradient of `loss`, a scalar made of the states of `batch`, to the model's; deterministic on a GPU, too
    /// ([`device::strictly`]).
    pub fn backward(self, batch: &Batch, loss: &Tensor) -> Result<()> {
        device::strictly(self.model.device(), || self.differentiate(batch, loss))
    }

    fn differentiate(self, batch: &Batch, loss: &Tensor) {
        let Self { model, states, checkpoints } = self;
        let Some(Checkpoints { embedded, read }) = checkpoints else { return loss.backward() };
        // What two places of one pass add to a weight is summed before it joins the sum of other passes.
        let tied = model.tied_gradient().map(|gradient| (gradient.copy(), gradient));
        if let Some((_, gradient)) = &tied {
            let _ = no_grad(|| gradient.shallow_clone().zero_());
        }
        loss.backward();
        let mut gradient = states.grad();
        drop(states);
        for (index, read) in read.into_iter().enumerate().rev() {
            let from = read.set_requires_grad(index > 0 || embedded.requires_grad());
            // A kernel adds and norms at once, and so does its gradient; adding this zero changes no bit.
            let nothing = (index > 0 && native::takes(&from)).then(|| from.full_like(-0.0).detach());
            let through = model.through(index, &from, nothing.as_ref(), &batch.layout, Some(&batch.positions));
            hand(&(through.states + through.delta), &gradient);
            if from.requires_grad() {
                gradient = from.grad();
            }
        }
        if embedded.requires_grad() {
            hand(&embedded, &gradient);
        }
        if let Some((before, gradient)) = tied {
            let _ = no_grad(|| gradient.shallow_clone().g_add_(&before));
        }
    }
}

/// Hands `gradient` down from `made` to the leaves of its graph.
fn hand(made: &Tensor, gradient: &Tensor) {
    // The derivative of a sum is 1 in every element, and the gradient its other factor: no bit of it is lost.
    (made * gradient).sum(made.kind()).backward();
}

#[cfg(test)]
mod tests {
    use serde_json::json;
    use tch::{Device, Kind};

    use super::*;
    use crate::batch::Row;
    use crate::loss::token_logprobs;
    use crate::sandbox;

    /// Samples of two prompts, three and one, and a row of its own.
    fn rows() -> Vec<(Vec<i64>, Vec<u8>)> {
        let row = |prompt: i64, tokens: i64, own: i64| {
            let id = |place: i64| (if place < prompt { place * place + prompt } else { place * 5 + own }) % 13;
            let marked = |place: i64| u8::from(place >= prompt && (place == prompt || (place + own) % 4 != 0));
            ((0..tokens).map(id).collect(), (0..tokens).map(marked).collect())
        };
        vec![row(6, 11, 0), row(6, 8, 1), row(6, 14, 2), row(3, 9, 3), row(1, 12, 4)]
    }

    /// The gradient of a weighted sum of log-probabilities in micro-batches of `size` rows, the first of them twice.
    fn gradient(model: &Transformer, size: usize) -> Tensor {
        let rows = rows();
        model.zero_gradients();
        for chunk in rows.chunks(size).chain([&rows[..1]]) {
            let chunk: Vec<Row<'_>> = chunk.iter().map(|(ids, mask)| Row { ids, mask }).collect();
            let batch = Batch::sharing_prompts(&chunk, Device::Cpu).expect("a batch");
            let pass = Pass::forward(model, &batch);
            let logprobs = token_logprobs(&model.logits(pass.states()), &batch.targets, 0.9);
            let weights = Tensor::arange(batch.count(), (logprobs.kind(), Device::Cpu)).sin();
            pass.backward(&batch, &(logprobs * weights).sum(Kind::Float)).expect("a gradient");
        }
        model.weights().gradient().copy()
    }

    fn same_bits(name: &str, model: Transformer) {
        let kept = [2, 5].map(|size| gradient(&model, size));
        assert!(kept.iter().all(|kept| kept.norm().double_value(&[]) > 1e-3), "{name}");
        let model = model.with_activation_checkpointing(true);
        for (size, kept) in [2, 5].into_iter().zip(&kept) {
            let checkpoints = gradient(&model, size);
            let distance = sandbox::relative(&checkpoints, kept);
            assert_eq!(checkpoints, *kept, "{name}, micro-batches of {size}: {distance} apart");
        }
    }

    fn adapted(model: Transformer, targets: &[&str]) -> Transformer {
        let lora = serde_json::from_value(json!({"rank": 2, "targets": targets})).expect("parameters of adapters");
        let model = model.adapt(&lora, 3).expect("adapters");
        sandbox::stir(&model, 0.1);
        model
    }

    #[test]
    fn activation_checkpointing_changes_no_bit_of_a_gradient() {
        let each = |engine: &str| {
            for (place, model) in sandbox::families().into_iter().enumerate() {
                same_bits(&format!("{engine}, family {place}"), model);
            }
        };
        native::each_set(|| each("kernels"));
        native::without(|| each("libtorch"));
    }

    #[test]
    fn nor_does_it_of_adapters_or_in_bf16() {
        for (place, model) in sandbox::families().into_iter().enumerate() {
            let (half, targets) = (model.half(), [&["all"][..], &["v_proj", "down_proj"]][place % 2]);
            same_bits(&format!("bf16 adapters, family {place}"), adapted(model.half(), targets));
            same_bits(&format!("bf16, family {place}"), half);
            same_bits(&format!("adapters, family {place}"), adapted(model, targets));
        }
    }

    #[test]
    fn states_and_losses_are_those_of_a_pass_that_keeps_everything() {
        let rows = rows();
        let rows: Vec<Row<'_>> = rows.iter().map(|(ids, mask)| Row { ids, mask }).collect();
        let batch = Batch::sharing_prompts(&rows, Device::Cpu).expect("a batch");
        for model in sandbox::families() {
            let kept = batch.states(&model);
            let model = model.with_activation_checkpointing(true);
            let pass = Pass::forward(&model, &batch);
            assert!(pass.states().requires_grad() && *pass.states() == kept);
        }
    }
}
