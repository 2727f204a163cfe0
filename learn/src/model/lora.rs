//! Low-rank adapters (LoRA, Hu et al. 2021): a model's own weights stay, and `W + alpha / rank * B A` takes W's place.
//!
//! The sum is formed once in a forward pass and once for a generation, from the same tensors, so sampler and trainer cannot
//! use different adapters. The adapters are a buffer of weights of their own: an optimizer, its moments and a training
//! state that are given it hold nothing of the frozen model. A checkpoint is always merged.

use std::collections::BTreeMap;

use anyhow::{Result, ensure};
use pipe::random::{normal, rng};
use pipe::stages::training::Lora;
use tch::{Device, Tensor, no_grad};

use crate::model::ModelConfig;
use crate::model::transformer::plan;
use crate::model::weights::Weights;

/// The adapters of a model.
#[derive(Debug)]
pub(crate) struct Adapters {
    /// `NAME.lora_A.weight` `[rank, in]` and `NAME.lora_B.weight` `[out, rank]` for every projection NAME.
    pub(crate) weights: Weights,
    by_weight: BTreeMap<String, Adapter>,
}

/// What is added to one matrix.
#[derive(Debug)]
pub(crate) struct Adapter {
    /// `[rank, in]`.
    a: Tensor,
    /// `[out, rank]`.
    b: Tensor,
    scale: f64,
}

impl Adapter {
    /// `alpha / rank * B A`, in the gradient graph.
    pub(crate) fn delta(&self) -> Tensor {
        self.b.matmul(&self.a) * self.scale
    }

    pub(crate) fn shallow_clone(&self) -> Self {
        Self { a: self.a.shallow_clone(), b: self.b.shallow_clone(), scale: self.scale }
    }
}

impl Adapters {
    /// Adapters at their beginning: A is normal with deviation `1 / sqrt(in)`, B is 0, so the model is what it was.
    pub(crate) fn new(config: &ModelConfig, lora: &Lora, seed: u64, device: Device) -> Result<Self> {
        let rank = lora.rank as i64;
        let mut adapted = Vec::new();
        let mut own = Vec::new();
        for (weight, shape, _) in plan(config) {
            let Some(name) = weight.strip_suffix(".weight") else { continue };
            let Some((_, short)) = name.rsplit_once('.').filter(|_| name.starts_with("model.layers.")) else {
                continue;
            };
            let Some(&[rows, columns]) = shape.first_chunk().filter(|_| lora.adapts(short)) else { continue };
            let least = rows.min(columns);
            ensure!(rank <= least, "`lora.rank` is {rank}, but `{weight}` has only {least} rows or columns");
            own.push((format!("{name}.lora_A.weight"), vec![rank, columns], true));
            own.push((format!("{name}.lora_B.weight"), vec![rows, rank], true));
            adapted.push((weight.clone(), name.to_owned()));
        }
        let weights = Weights::zeros(own, device);
        let mut by_weight = BTreeMap::new();
        for (weight, name) in adapted {
            let (down, up) = (format!("{name}.lora_A.weight"), format!("{name}.lora_B.weight"));
            let (a, b) = (weights.leaf(&down), weights.leaf(&up));
            // The name stands in the purpose, so that an adapter does not depend on which others there are.
            let mut stream = rng(&format!("lora {down}"), &[seed]);
            let size = a.size();
            let deviation = (size[1] as f64).sqrt().recip();
            let drawn: Vec<f32> = (0..size[0] * size[1]).map(|_| (normal(&mut stream) * deviation) as f32).collect();
            no_grad(|| a.shallow_clone().copy_(&Tensor::from_slice(&drawn).view(size.as_slice())));
            by_weight.insert(weight, Adapter { a, b, scale: lora.scale() });
        }
        Ok(Self { weights, by_weight })
    }

    /// The adapter of a matrix, by the matrix's name.
    pub(crate) fn of(&self, weight: &str) -> Option<&Adapter> {
        self.by_weight.get(weight)
    }
}

#[cfg(test)]
mod tests {
    use pipe::stages::training::Precision;
    use serde_json::{Value, json};
    use tch::Kind;

    use super::*;
    use crate::model::Transformer;
    use crate::model::decoding::Decoding;
    use crate::optimizer::AdamW;
    use crate::sandbox::{self, distance};

    fn lora(value: Value) -> Lora {
        serde_json::from_value(value).expect("parameters of adapters")
    }

    fn ids() -> Tensor {
        Tensor::from_slice2(&[[1i64, 5, 7, 3, 8, 9, 2], [4, 4, 1, 10, 3, 12, 2]])
    }

    fn logits(model: &Transformer) -> Tensor {
        model.logits(&sandbox::hidden(model, &ids()).flatten(0, 1))
    }

    /// A loss under which every projection matters.
    fn backward(model: &Transformer) {
        model.zero_gradients();
        let targets = ids().flatten(0, 1);
        logits(model).cross_entropy_for_logits(&targets).backward();
    }

    fn each_family(lora: &Lora) -> Vec<(Transformer, Transformer)> {
        let adapted = |model: Transformer| model.adapt(lora, 3).expect("adapters");
        sandbox::families().into_iter().zip(sandbox::families().into_iter().map(adapted)).collect()
    }

    #[test]
    fn before_the_first_step_nothing_has_changed_and_only_b_has_a_gradient() {
        for (base, adapted) in each_family(&lora(json!({"rank": 2}))) {
            assert_eq!(no_grad(|| logits(&base)), no_grad(|| logits(&adapted)));
            backward(&adapted);
            for (name, gradient) in adapted.weights().named("", adapted.weights().gradient()) {
                let largest = gradient.abs().max().double_value(&[]);
                assert_eq!(largest > 0.0, name.contains("lora_B"), "{name}: {largest}");
            }
        }
    }

    #[test]
    fn only_adapters_move_and_all_of_them_do() {
        for (base, adapted) in each_family(&lora(json!({"rank": 2, "alpha": 8.0}))) {
            let before = adapted.weights().flat().copy();
            let frozen = adapted.base().flat().copy();
            let mut optimizer = AdamW::new(adapted.weights(), &pipe::stages::training::Optimizer::default());
            for _ in 0..2 {
                backward(&adapted);
                optimizer.step(adapted.weights(), 0.05).expect("a step");
            }
            assert_eq!(adapted.base().flat(), &frozen);
            assert_eq!(adapted.base().gradient().numel(), 0, "the frozen weights have no gradients");
            let moved = adapted.weights().flat() - &before;
            for (name, moved) in adapted.weights().named("", &moved) {
                assert!(moved.abs().max().double_value(&[]) > 0.0, "{name} has not moved");
            }
            assert!(distance(&no_grad(|| logits(&adapted)), &no_grad(|| logits(&base))) > 1e-2);
            // The sampler sees the adapters: its logits are the trainer's.
            let rows = Vec::<i64>::try_from(&ids().view(-1)).expect("ids");
            let prompts: Vec<&[i64]> = rows.chunks(7).collect();
            let (_, next) = Decoding::begin(&adapted, &prompts, &[0, 1], 1).expect("two prompts");
            let trained = no_grad(|| logits(&adapted)).view([2, 7, -1]).select(1, 6);
            assert!(distance(&next, &trained) < 1e-5);
        }
    }

    #[test]
    fn a_merged_folder_is_the_adapted_model() {
        let (folder, base) = sandbox::model(&json!({}));
        base.save(folder.path(), folder.path()).expect("saved");
        let parameters = lora(json!({"rank": 3, "targets": ["q_proj", "down_proj"]}));
        let load = || {
            let lora = Some(&parameters);
            Transformer::load_to_train(folder.path(), Device::Cpu, Precision::Fp32, lora, 1).expect("a model")
        };
        let adapted = load();
        let names: Vec<String> = adapted.weights().entries().iter().map(|entry| entry.name.clone()).collect();
        assert_eq!(names.len(), 2 * 2 * 2, "two layers, two targets, A and B: {names:?}");
        sandbox::stir(&adapted, 0.2);
        let merged = tempfile::tempdir().expect("a folder");
        adapted.save(merged.path(), folder.path()).expect("saved");
        let merged = Transformer::load(merged.path(), Device::Cpu).expect("a plain model");
        assert!(distance(&no_grad(|| logits(&merged)), &no_grad(|| logits(&adapted))) <= 1e-5);
        assert!(distance(&no_grad(|| logits(&merged)), &no_grad(|| logits(&base))) > 1e-2);
        let changed: Vec<String> = merged
            .weights()
            .leaves()
            .into_iter()
            .zip(base.weights().leaves())
            .filter(|((_, merged), (_, base))| merged != base)
            .map(|((name, _), _)| name)
            .collect();
        assert!(changed.iter().all(|name| name.contains("q_proj.weight") || name.contains("down_proj.weight")));
        assert_eq!(changed.len(), 4, "{changed:?}");
        assert_eq!(load().weights().flat(), load().weights().flat(), "the seed decides the beginning");
    }

    #[test]
    fn a_base_in_bf16_takes_half_the_memory_of_its_projections_and_computes_the_same() {
        for (model, other) in sandbox::families().into_iter().zip(sandbox::families()) {
            let (trained, wide) = (model.half(), other.base().bytes());
            let adapted = other.half().adapt(&lora(json!({"rank": 2})), 3).expect("adapters");
            let (count, bytes) = (adapted.base().count(), adapted.base().bytes());
            assert_eq!((4 * count, adapted.base().entries().len()), (wide, model.base().entries().len()));
            let projections = adapted.base().entries().iter().filter(|entry| entry.half).map(|entry| &entry.shape);
            let halves: i64 = projections.map(|shape| shape.iter().product::<i64>()).sum();
            assert!(halves > 0 && bytes == wide - 2 * halves as u64, "{bytes} of {wide}");
            // The projections act rounded in either model; whatever acts in fp32 is kept in fp32.
            assert_eq!(no_grad(|| logits(&trained)), no_grad(|| logits(&adapted)));
            backward(&adapted);
            let gradient = adapted.weights().gradient();
            assert!(gradient.kind() == Kind::Float && gradient.norm().double_value(&[]) > 0.0);
            // A state and a checkpoint hold fp32, and a model that is restored from them is the same.
            let state: BTreeMap<String, Tensor> = adapted.frozen().into_iter().collect();
            assert!(state.values().all(|tensor| tensor.kind() == Kind::Float));
            assert!(adapted.merged().iter().all(|(_, tensor)| tensor.kind() == Kind::Float));
            adapted.base().load("base.", &state).expect("its own weights");
            assert_eq!(no_grad(|| logits(&trained)), no_grad(|| logits(&adapted)));
        }
    }

    #[test]
    fn gradients_are_those_of_the_product() {
        // Against finite differences, for a model whose B is not 0.
        let model = sandbox::families().remove(2).adapt(&lora(json!({"rank": 1, "alpha": 2.0})), 3).expect("adapters");
        sandbox::stir(&model, 0.1);
        backward(&model);
        let gradient = model.weights().gradient().copy();
        let loss = || no_grad(|| logits(&model).cross_entropy_for_logits(&ids().flatten(0, 1)).double_value(&[]));
        let flat = model.weights().flat();
        let direction = Tensor::arange(flat.numel() as i64, (Kind::Float, Device::Cpu)).cos();
        let step = 1e-2;
        let at = |by: f64| {
            let _ = no_grad(|| flat.shallow_clone().g_add_(&(&direction * by)));
            let value = loss();
            let _ = no_grad(|| flat.shallow_clone().g_add_(&(&direction * -by)));
            value
        };
        let numeric = (at(step) - at(-step)) / (2.0 * step);
        let analytic = (gradient * &direction).sum(Kind::Double).double_value(&[]);
        assert!((numeric - analytic).abs() < 2e-2 * analytic.abs().max(0.1), "{numeric} against {analytic}");
    }

    #[test]
    fn a_rank_that_is_none_is_refused() {
        let model = sandbox::families().remove(0);
        let error = model.adapt(&lora(json!({"rank": 17})), 0).expect_err("more than the width").to_string();
        assert!(error.contains("`lora.rank` is 17"), "{error}");
    }
}
