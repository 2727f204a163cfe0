//! Tiny models for tests, in folders that vanish with them.

use std::path::Path;

use pipe::stages::model::{Architecture, SpecialIds, write_fresh};
use serde_json::{Value, json};
use tch::{Device, Kind, Tensor, no_grad};
use tempfile::TempDir;

use crate::model::{Layout, ModelConfig, Transformer};

/// The vocabulary of tiny models.
pub(crate) const VOCABULARY: u64 = 13;
/// The id that ends a sequence in tiny models.
pub(crate) const END: i64 = 2;

/// Writes a fresh model into `folder`: two layers of width 16 with two key heads for four query heads, changed by `extra`.
pub(crate) fn write(folder: &Path, extra: &Value) {
    let mut value = json!({"kind": "qwen2", "hidden_size": 16, "layers": 2, "heads": 4, "kv_heads": 2,
        "intermediate_size": 24, "max_position_embeddings": 64});
    value.as_object_mut().expect("an object").extend(extra.as_object().expect("an object").clone());
    let architecture: Architecture = serde_json::from_value(value).expect("an architecture");
    let ids = SpecialIds { pad: Some(0), bos: Some(1), eos: Some(END as u32) };
    write_fresh(folder, &architecture, VOCABULARY, ids, 5).expect("a fresh model");
}

/// A model as [`write`] makes it, with weights large enough for every part to matter; the folder holds the fresh one.
pub(crate) fn model(extra: &Value) -> (TempDir, Transformer) {
    let folder = tempfile::tempdir().expect("a folder");
    write(folder.path(), extra);
    let model = Transformer::load(folder.path(), Device::Cpu).expect("a model");
    stir(&model, 0.3);
    (folder, model)
}

/// Models of every family and setting that changes the forward pass, with weights large enough for every part to matter.
pub(crate) fn families() -> Vec<Transformer> {
    let yarn = json!({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8});
    let llama3 = json!({"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32});
    let own = [
        json!({"model_type": "qwen2", "tie_word_embeddings": true}),
        json!({"model_type": "qwen2", "num_key_value_heads": 4, "rope_scaling": yarn}),
        json!({"model_type": "qwen3", "head_dim": 6, "tie_word_embeddings": true}),
        json!({"model_type": "qwen3", "head_dim": 4, "attention_bias": true, "num_key_value_heads": 1}),
        json!({"model_type": "llama", "rope_scaling": llama3}),
        json!({"model_type": "llama", "head_dim": 8, "attention_bias": true, "mlp_bias": true,
            "rope_scaling": {"type": "linear", "factor": 2.0}}),
    ];
    own.into_iter()
        .map(|own| {
            let mut config = json!({"vocab_size": VOCABULARY, "hidden_size": 16, "intermediate_size": 24, "eos_token_id": END,
                "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64});
            config.as_object_mut().expect("an object").extend(own.as_object().expect("an object").clone());
            let model = Transformer::zeros(ModelConfig::parse(config).expect("a configuration"), Device::Cpu);
            no_grad(|| {
                for (name, mut leaf) in model.weights().leaves() {
                    let _ = leaf.fill_(f64::from(u8::from(name.ends_with("norm.weight"))));
                }
            });
            stir(&model, 0.3);
            model
        })
        .collect()
}

/// Adds a fixed wave of height `by` to all weights.
pub(crate) fn stir(model: &Transformer, by: f64) {
    no_grad(|| {
        let mut flat = model.weights().flat().shallow_clone();
        let wave = (Tensor::arange(flat.size()[0], (Kind::Double, Device::Cpu)) * 1.7).sin() * by;
        flat += wave.to_kind(Kind::Float);
    });
}

/// Hidden states `[B, T, H]` of rows `[B, T]`, which are sequences of equal length.
pub(crate) fn hidden(model: &Transformer, ids: &Tensor) -> Tensor {
    let (rows, length) = ids.size2().expect("two dimensions");
    let layout = Layout::rows((0..rows).map(|_| length as usize), model.device());
    model.hidden(&ids.reshape([-1]), &layout).view([rows, length, -1])
}

/// The largest absolute difference of two tensors.
pub(crate) fn distance(one: &Tensor, other: &Tensor) -> f64 {
    assert_eq!(one.size(), other.size());
    no_grad(|| (one.to_kind(Kind::Double) - other.to_kind(Kind::Double)).abs().max().double_value(&[]))
}

/// `|one - other| / |other|`.
pub(crate) fn relative(one: &Tensor, other: &Tensor) -> f64 {
    let (one, other) = (one.to_kind(Kind::Double), other.to_kind(Kind::Double));
    ((one - &other).norm() / other.norm()).double_value(&[])
}
