//! Fresh weights: an architecture, and the Hugging Face folder of a model that has learnt nothing yet.
//!
//! Every weight draws from a stream of its own, named by the seed and the weight's place, so a deeper model of the same
//! width begins with the same first layers.

use std::collections::HashMap;
use std::path::Path;

use anyhow::Context as _;
use rayon::prelude::*;
use safetensors::Dtype;
use safetensors::tensor::TensorView;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::json;

use crate::pipeline::stage::Problem;
use crate::random::{normal, rng};

/// The standard deviation of fresh matrices.
const DEVIATION: f64 = 0.02;

/// What the model is made of.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(tag = "kind", rename_all = "snake_case", deny_unknown_fields)]
pub enum Architecture {
    /// The decoder of Qwen2: RMSNorm, rotary positions, grouped queries with biases, SwiGLU.
    Qwen2 {
        /// Width of the residual stream.
        #[schemars(range(min = 2))]
        hidden_size: u64,
        /// Decoder layers.
        #[schemars(range(min = 1))]
        layers: u64,
        /// Query heads.
        #[schemars(range(min = 1))]
        heads: u64,
        /// Key and value heads; 0 takes as many as query heads.
        #[serde(default)]
        kv_heads: u64,
        /// Width of the feed-forward layer; 0 takes 8/3 of `hidden_size`, rounded up to a multiple of 16.
        #[serde(default)]
        intermediate_size: u64,
        /// Positions, at most, of a prompt and its completion.
        #[serde(default = "default_positions")]
        #[schemars(range(min = 1))]
        max_position_embeddings: u64,
        /// Base of the rotary frequencies.
        #[serde(default = "default_rope_theta")]
        #[schemars(extend("exclusiveMinimum" = 0.0))]
        rope_theta: f64,
        /// Added to the mean square before its root.
        #[serde(default = "default_epsilon")]
        #[schemars(extend("exclusiveMinimum" = 0.0))]
        rms_norm_eps: f64,
        /// The output projection is the embedding.
        #[serde(default = "default_tied")]
        tie_word_embeddings: bool,
    },
}

fn default_positions() -> u64 {
    1024
}
fn default_rope_theta() -> f64 {
    10_000.0
}
fn default_epsilon() -> f64 {
    1e-6
}
fn default_tied() -> bool {
    true
}

/// The ids by which a model begins, ends and fills up sequences.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SpecialIds {
    /// Fills sequences up.
    pub pad: Option<u32>,
    /// Begins a sequence.
    pub bos: Option<u32>,
    /// Ends a sequence.
    pub eos: Option<u32>,
}

/// How a fresh weight is filled.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Fill {
    Ones,
    Zeros,
    Normal(f64),
}

struct Weight {
    name: String,
    shape: Vec<usize>,
    fill: Fill,
}

impl Architecture {
    /// Key and value heads with the default written out.
    fn kv_heads(&self) -> u64 {
        let Self::Qwen2 { heads, kv_heads, .. } = *self;
        if kv_heads == 0 { heads } else { kv_heads }
    }

    /// Width of the feed-forward layer with the default written out.
    fn inner(&self) -> u64 {
        let Self::Qwen2 { hidden_size, intermediate_size, .. } = *self;
        if intermediate_size == 0 { (hidden_size * 8).div_ceil(3).next_multiple_of(16) } else { intermediate_size }
    }

    /// What the sizes may not say together.
    pub(super) fn problems(&self) -> Vec<Problem> {
        let Self::Qwen2 { hidden_size, heads, .. } = *self;
        let kv_heads = self.kv_heads();
        let mut problems = Vec::new();
        if heads == 0 || hidden_size % heads != 0 {
            let message = format!("{heads} heads do not divide `hidden_size` {hidden_size}");
            problems.push(Problem::new("architecture.heads", message));
        } else if (hidden_size / heads) % 2 != 0 {
            let message = format!("a head has {} dimensions, but rotary positions turn pairs", hidden_size / heads);
            problems.push(Problem::new("architecture.heads", message).hint("choose heads of an even size"));
        }
        if heads % kv_heads.max(1) != 0 {
            let message = format!("{kv_heads} key and value heads do not divide {heads} heads");
            problems.push(Problem::new("architecture.kv_heads", message));
        }
        problems
    }

    /// The content of `config.json`.
    fn config(&self, vocabulary: u64, ids: SpecialIds) -> serde_json::Value {
        let Self::Qwen2 {
            hidden_size,
            layers,
            heads,
            max_position_embeddings,
            rope_theta,
            rms_norm_eps,
            tie_word_embeddings,
            ..
        } = *self;
        json!({
            "architectures": ["Qwen2ForCausalLM"],
            "attention_dropout": 0.0,
            "bos_token_id": ids.bos,
            "eos_token_id": ids.eos,
            "hidden_act": "silu",
            "hidden_size": hidden_size,
            "initializer_range": DEVIATION,
            "intermediate_size": self.inner(),
            "max_position_embeddings": max_position_embeddings,
            "model_type": "qwen2",
            "num_attention_heads": heads,
            "num_hidden_layers": layers,
            "num_key_value_heads": self.kv_heads(),
            "pad_token_id": ids.pad,
            "rms_norm_eps": rms_norm_eps,
            "rope_theta": rope_theta,
            "tie_word_embeddings": tie_word_embeddings,
            "torch_dtype": "float32",
            "use_cache": true,
            "use_sliding_window": false,
            "vocab_size": vocabulary,
        })
    }

    /// Every weight with its Hugging Face name.
    fn weights(&self, vocabulary: u64) -> Vec<Weight> {
        let Self::Qwen2 { hidden_size, layers, heads, tie_word_embeddings, .. } = *self;
        let (hidden, inner, vocabulary) = (hidden_size as usize, self.inner() as usize, vocabulary as usize);
        let shared = (hidden_size / heads * self.kv_heads()) as usize;
        // Each layer adds twice to the residual stream; this keeps the sum's spread that of one addition (GPT-2).
        let residual = Fill::Normal(DEVIATION / (2.0 * layers as f64).sqrt());
        let matrix = Fill::Normal(DEVIATION);
        let mut weights = Vec::new();
        let mut add = |name: String, shape: &[usize], fill| weights.push(Weight { name, shape: shape.to_vec(), fill });
        add("model.embed_tokens.weight".to_owned(), &[vocabulary, hidden], matrix);
        for layer in 0..layers {
            let mut add = |name: &str, shape: &[usize], fill| add(format!("model.layers.{layer}.{name}"), shape, fill);
            add("input_layernorm.weight", &[hidden], Fill::Ones);
            for (name, rows) in [("q", hidden), ("k", shared), ("v", shared)] {
                add(&format!("self_attn.{name}_proj.weight"), &[rows, hidden], matrix);
                add(&format!("self_attn.{name}_proj.bias"), &[rows], Fill::Zeros);
            }
            add("self_attn.o_proj.weight", &[hidden, hidden], residual);
            add("post_attention_layernorm.weight", &[hidden], Fill::Ones);
            add("mlp.gate_proj.weight", &[inner, hidden], matrix);
            add("mlp.up_proj.weight", &[inner, hidden], matrix);
            add("mlp.down_proj.weight", &[hidden, inner], residual);
        }
        add("model.norm.weight".to_owned(), &[hidden], Fill::Ones);
        if !tie_word_embeddings {
            add("lm_head.weight".to_owned(), &[vocabulary, hidden], matrix);
        }
        weights
    }
}

impl Weight {
    /// Its elements as little-endian f32.
    fn draw(&self, seed: u64) -> Vec<u8> {
        let count = self.shape.iter().product();
        let constant = |value: f32| value.to_le_bytes().repeat(count);
        match self.fill {
            Fill::Ones => constant(1.0),
            Fill::Zeros => constant(0.0),
            Fill::Normal(deviation) => {
                // The name stands in the purpose, so that a weight does not depend on how many come before it.
                let mut stream = rng(&format!("initial weights {}", self.name), &[seed]);
                (0..count).flat_map(|_| ((normal(&mut stream) * deviation) as f32).to_le_bytes()).collect()
            }
        }
    }
}

/// Writes `config.json`, `generation_config.json` and `model.safetensors` of a fresh model into `folder`.
///
/// Matrices are normal with deviation 0.02 (over the root of twice the layers where they feed the residual stream),
/// norms 1, biases 0. The same arguments give the same bytes.
pub fn write_fresh(
    folder: &Path,
    architecture: &Architecture,
    vocabulary: u64,
    ids: SpecialIds,
    seed: u64,
) -> anyhow::Result<()> {
    let write = |name: &str, bytes: &[u8]| {
        let path = folder.join(name);
        std::fs::write(&path, bytes).with_context(|| format!("cannot write `{}`", path.display()))
    };
    let generation = json!({"bos_token_id": ids.bos, "eos_token_id": ids.eos, "pad_token_id": ids.pad});
    for (name, value) in [("config.json", architecture.config(vocabulary, ids)), ("generation_config.json", generation)]
    {
        let text = serde_json::to_string_pretty(&value).context("a configuration is plain data")?;
        write(name, (text + "\n").as_bytes())?;
    }
    let weights = architecture.weights(vocabulary);
    let bytes: Vec<Vec<u8>> = weights.par_iter().map(|weight| weight.draw(seed)).collect();
    let mut views = Vec::with_capacity(weights.len());
    for (weight, bytes) in weights.iter().zip(&bytes) {
        let view = TensorView::new(Dtype::F32, weight.shape.clone(), bytes).context("a weight has its own size")?;
        views.push((weight.name.as_str(), view));
    }
    // One entry only: the file's header is written in the order of a hash map.
    let metadata = HashMap::from([("format".to_owned(), "pt".to_owned())]);
    write("model.safetensors", &safetensors::serialize(views, Some(metadata)).context("cannot lay the weights out")?)
}

#[cfg(test)]
mod tests {
    use safetensors::SafeTensors;

    use super::*;

    fn architecture(extra: &serde_json::Value) -> Architecture {
        let mut value = json!({"kind": "qwen2", "hidden_size": 16, "layers": 2, "heads": 4});
        value.as_object_mut().expect("an object").extend(extra.as_object().expect("an object").clone());
        serde_json::from_value(value).expect("an architecture")
    }

    #[test]
    fn absent_sizes_are_resolved_in_the_configuration() {
        let config = architecture(&json!({})).config(11, SpecialIds { eos: Some(3), ..SpecialIds::default() });
        assert_eq!((config["intermediate_size"].as_u64(), config["num_key_value_heads"].as_u64()), (Some(48), Some(4)));
        assert_eq!((config["eos_token_id"].as_u64(), config["pad_token_id"].as_u64()), (Some(3), None));
        assert_eq!(architecture(&json!({"hidden_size": 128})).inner(), 352);
    }

    #[test]
    fn sizes_that_do_not_fit_are_problems_with_a_place() {
        let problem = |extra: serde_json::Value| {
            architecture(&extra).problems().into_iter().map(|problem| problem.path).collect::<Vec<_>>()
        };
        assert_eq!(problem(json!({})), Vec::<String>::new());
        assert_eq!(problem(json!({"heads": 3})), ["architecture.heads"]);
        assert_eq!(problem(json!({"heads": 16})), ["architecture.heads"]);
        assert_eq!(problem(json!({"kv_heads": 3})), ["architecture.kv_heads"]);
        assert!(serde_json::from_value::<Architecture>(json!({"kind": "qwen2", "hiden_size": 1})).is_err());
    }

    #[test]
    fn weights_have_the_spread_that_they_should() {
        let folder = tempfile::tempdir().expect("a folder");
        let architecture = architecture(&json!({"hidden_size": 64, "kv_heads": 2, "tie_word_embeddings": false}));
        write_fresh(folder.path(), &architecture, 50, SpecialIds::default(), 1).expect("a model");
        let bytes = std::fs::read(folder.path().join("model.safetensors")).expect("the weights");
        let read = SafeTensors::deserialize(&bytes).expect("a whole file");
        let spread = |name: &str| {
            let data = read.tensor(name).expect("a weight").data().to_vec();
            let values: Vec<f64> =
                data.chunks(4).map(|four| f64::from(f32::from_le_bytes(four.try_into().expect("four")))).collect();
            (values.iter().map(|value| value * value).sum::<f64>() / values.len() as f64).sqrt()
        };
        assert!((spread("model.embed_tokens.weight") - 0.02).abs() < 1e-3);
        assert!((spread("model.layers.1.mlp.down_proj.weight") - 0.01).abs() < 5e-4);
        assert!((spread("model.norm.weight") - 1.0).abs() < 1e-12);
        assert!(spread("model.layers.0.self_attn.q_proj.bias") < 1e-12);
        let shape = |name: &str| read.tensor(name).expect("a weight").shape().to_vec();
        assert_eq!(shape("model.layers.0.self_attn.k_proj.weight"), [32, 64]);
        assert_eq!(shape("lm_head.weight"), [50, 64]);
        assert_eq!(read.len(), 3 + 2 * 12);
    }
}
