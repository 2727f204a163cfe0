//! `config.json` of a Hugging Face folder, with its field names, and what of it is implemented.
//!
//! A setting that would change the forward pass and is not implemented is an error here, never ignored: a model that
//! loads is a model whose logits are right.

use std::path::Path;

use anyhow::{Context, Result, ensure};
use pipe::stages::model::FAMILIES;
use serde::Deserialize;
use serde_json::Value;

use crate::model::rope::Rope;

/// The families of decoders that are implemented, as `model_type` names them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Family {
    /// Qwen2 and Qwen2.5: biases on queries, keys and values.
    Qwen2,
    /// Qwen3: queries and keys are normed head by head.
    Qwen3,
    /// Llama.
    Llama,
}

/// The architecture of a checkpoint, with the field names of Hugging Face.
#[derive(Clone, Debug, PartialEq, Deserialize)]
pub struct ModelConfig {
    /// The family of the decoder.
    #[serde(rename = "model_type")]
    pub family: Family,
    /// Rows of the embedding: token ids are below it.
    pub vocab_size: i64,
    /// Width of the residual stream.
    pub hidden_size: i64,
    /// Width of the feed-forward layer.
    pub intermediate_size: i64,
    /// Decoder layers.
    pub num_hidden_layers: i64,
    /// Query heads.
    pub num_attention_heads: i64,
    /// Key and value heads; as many as query heads when absent.
    #[serde(default, deserialize_with = "zero_if_null")]
    pub num_key_value_heads: i64,
    /// Width of one head; the heads together need not be as wide as the residual stream.
    #[serde(default, deserialize_with = "zero_if_null")]
    pub head_dim: i64,
    /// Positions that the model was made for; longer sequences are errors.
    pub max_position_embeddings: i64,
    /// The rotary positions.
    #[serde(skip)]
    pub rope: Rope,
    /// Added to the mean square before its root.
    #[serde(default = "ModelConfig::default_rms_norm_eps")]
    pub rms_norm_eps: f64,
    /// Biases on all four projections of the attention (those of Qwen2 are another matter).
    #[serde(default)]
    attention_bias: bool,
    /// Biases on the projections of the feed-forward layer.
    #[serde(default)]
    mlp_bias: bool,
    /// The output projection is the embedding.
    #[serde(default)]
    pub tie_word_embeddings: bool,
    /// Begins a sequence.
    #[serde(default)]
    pub bos_token_id: Option<i64>,
    /// Ends a sequence; any of them does.
    #[serde(default, deserialize_with = "ends")]
    pub eos_token_id: Vec<i64>,
    /// Fills rows up to a common length; where the folder names none, or one without a row such as -1, 0 does, for it is
    /// never attended to nor trained on.
    #[serde(default)]
    pub pad_token_id: Option<i64>,
}

impl ModelConfig {
    fn default_rms_norm_eps() -> f64 {
        1e-6
    }

    /// Reads `config.json` of `folder` and refuses what is not implemented.
    ///
    /// Of `generation_config.json` it takes the ids that end a sequence, for chat models have several and name the others
    /// there alone, and nothing else: how to sample is the caller's to say, never a file's.
    pub fn read(folder: &Path) -> Result<Self> {
        let path = folder.join("config.json");
        let raw = read_json(&path)?;
        let mut config = Self::parse(raw).with_context(|| format!("cannot use the model of `{}`", path.display()))?;
        let generation = folder.join("generation_config.json");
        if generation.exists() {
            let raw = read_json(&generation)?;
            let ends = one_or_many(&raw["eos_token_id"])
                .with_context(|| format!("cannot use `eos_token_id` of `{}`", generation.display()))?;
            let more: Vec<i64> = ends.into_iter().filter(|id| !config.eos_token_id.contains(id)).collect();
            config.eos_token_id.extend(more);
        }
        Ok(config)
    }

    /// The configuration in `raw`, the content of a `config.json`.
    pub fn parse(raw: Value) -> Result<Self> {
        refuse(&raw)?;
        let rope = Rope::parse(&raw)?;
        let mut config = Self { rope, ..serde_json::from_value(raw)? };
        if config.num_key_value_heads == 0 {
            config.num_key_value_heads = config.num_attention_heads;
        }
        if config.head_dim == 0 {
            // Every folder of Qwen3 states it; this is the default of its configuration in transformers.
            let (hidden, heads) = (config.hidden_size, config.num_attention_heads.max(1));
            config.head_dim = if config.family == Family::Qwen3 { 128 } else { hidden / heads };
            ensure!(
                hidden % heads == 0 || config.family == Family::Qwen3,
                "`num_attention_heads` {heads} does not divide `hidden_size` {hidden}, and no `head_dim` is given"
            );
        }
        config.check()?;
        Ok(config)
    }

    /// Whether queries, keys and values have biases.
    pub fn projection_bias(&self) -> bool {
        self.family == Family::Qwen2 || self.attention_bias
    }

    /// Whether the attention's output projection has a bias.
    pub fn output_bias(&self) -> bool {
        self.family != Family::Qwen2 && self.attention_bias
    }

    /// Whether the feed-forward projections have biases.
    pub fn feed_forward_bias(&self) -> bool {
        self.family == Family::Llama && self.mlp_bias
    }

    /// Whether queries and keys are normed head by head before they turn.
    pub fn head_norms(&self) -> bool {
        self.family == Family::Qwen3
    }

    fn check(&self) -> Result<()> {
        let sizes = [
            ("vocab_size", self.vocab_size),
            ("hidden_size", self.hidden_size),
            ("intermediate_size", self.intermediate_size),
            ("num_hidden_layers", self.num_hidden_layers),
            ("num_attention_heads", self.num_attention_heads),
            ("num_key_value_heads", self.num_key_value_heads),
            ("max_position_embeddings", self.max_position_embeddings),
        ];
        for (name, size) in sizes {
            ensure!(size > 0, "`{name}` is {size}, but must be positive");
        }
        let (heads, shared) = (self.num_attention_heads, self.num_key_value_heads);
        ensure!(heads % shared == 0, "`num_key_value_heads` {shared} does not divide `num_attention_heads` {heads}");
        ensure!(self.head_dim > 0, "`head_dim` is {}, but must be positive", self.head_dim);
        ensure!(self.head_dim % 2 == 0, "rotary positions need an even `head_dim`, but it is {}", self.head_dim);
        Ok(())
    }

    /// The id that fills rows up.
    pub fn padding(&self) -> i64 {
        self.pad_token_id.filter(|id| (0..self.vocab_size).contains(id)).unwrap_or(0)
    }
}

/// Every setting that would change the forward pass and is not implemented.
fn refuse(raw: &Value) -> Result<()> {
    let model_type = raw["model_type"].as_str().unwrap_or_default();
    ensure!(
        FAMILIES.contains(&model_type),
        "the model type `{model_type}` is not implemented: there are `{}`",
        FAMILIES.join("`, `")
    );
    ensure!(raw["use_sliding_window"] != true, "`use_sliding_window` is set, but sliding windows are not implemented");
    if let Some(types) = raw["layer_types"].as_array() {
        let other = types.iter().find(|kind| kind.as_str() != Some("full_attention"));
        ensure!(other.is_none(), "the layer type {} is not implemented", other.unwrap_or(&Value::Null));
    }
    let activation = raw["hidden_act"].as_str().unwrap_or("silu");
    ensure!(activation == "silu", "the activation `{activation}` is not implemented: `silu` is");
    let dropout = raw["attention_dropout"].as_f64().unwrap_or(0.0);
    ensure!(dropout == 0.0, "`attention_dropout` is {dropout}, but dropout is not implemented");
    let full = raw["quantization_config"].is_null();
    ensure!(full, "the weights are quantized (`quantization_config`), which is not implemented: take the full ones");
    Ok(())
}

fn read_json(path: &Path) -> Result<Value> {
    let text = std::fs::read_to_string(path).with_context(|| format!("cannot read `{}`", path.display()))?;
    serde_json::from_str(&text).with_context(|| format!("`{}` is no JSON", path.display()))
}

/// Token ids given as one number, a list, or null.
fn one_or_many(ids: &Value) -> Result<Vec<i64>> {
    let id = |value: &Value| value.as_i64().with_context(|| format!("{value} is no token id"));
    match ids {
        Value::Null => Ok(Vec::new()),
        Value::Array(ids) => ids.iter().map(id).collect(),
        other => Ok(vec![id(other)?]),
    }
}

fn ends<'de, D: serde::Deserializer<'de>>(deserializer: D) -> Result<Vec<i64>, D::Error> {
    one_or_many(&Value::deserialize(deserializer)?).map_err(serde::de::Error::custom)
}

fn zero_if_null<'de, D: serde::Deserializer<'de>>(deserializer: D) -> Result<i64, D::Error> {
    Ok(Option::deserialize(deserializer)?.unwrap_or(0))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn raw() -> Value {
        json!({
            "model_type": "qwen2", "vocab_size": 10, "hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1,
            "num_attention_heads": 2, "max_position_embeddings": 32, "rms_norm_eps": 1e-6, "eos_token_id": 3
        })
    }

    #[test]
    fn absent_fields_take_the_meaning_that_transformers_gives_them() {
        let config = ModelConfig::parse(raw()).expect("a plain configuration");
        assert_eq!((config.num_key_value_heads, config.head_dim, config.rope.theta), (2, 4, 10_000.0));
        assert_eq!((config.eos_token_id, config.tie_word_embeddings), (vec![3], false));
        let mut newer = raw();
        newer["rope_parameters"] = json!({"rope_type": "default", "rope_theta": 5e5});
        newer["eos_token_id"] = json!([3, 4]);
        let config = ModelConfig::parse(newer).expect("the newer way to say it");
        assert_eq!((config.rope.theta, config.eos_token_id), (5e5, vec![3, 4]));
    }

    #[test]
    fn padding_has_a_row() {
        for (named, padding) in [(json!(null), 0), (json!(9), 9), (json!(10), 0), (json!(-1), 0)] {
            let mut raw = raw();
            raw["pad_token_id"] = named;
            assert_eq!(ModelConfig::parse(raw).expect("a configuration").padding(), padding);
        }
    }

    #[test]
    fn families_differ_in_their_biases_and_norms() {
        let of = |family: &str, field: &str, value: Value| {
            let mut raw = raw();
            raw["model_type"] = json!(family);
            raw[field] = value;
            let config = ModelConfig::parse(raw).expect(family);
            let biases = [config.projection_bias(), config.output_bias(), config.feed_forward_bias()];
            (biases, config.head_norms(), config.head_dim)
        };
        assert_eq!(of("qwen2", "attention_bias", json!(false)), ([true, false, false], false, 4));
        assert_eq!(of("qwen3", "head_dim", json!(6)), ([false, false, false], true, 6));
        assert_eq!(of("qwen3", "attention_bias", json!(true)), ([true, true, false], true, 128));
        assert_eq!(of("llama", "mlp_bias", json!(true)), ([false, false, true], false, 4));
        assert_eq!(of("llama", "attention_bias", json!(true)), ([true, true, false], false, 4));
        assert_eq!(of("llama", "head_dim", json!(null)), ([false, false, false], false, 4));
    }

    #[test]
    fn a_generation_config_adds_ends_and_decides_nothing_else() {
        let folder = tempfile::tempdir().expect("a folder");
        let write = |name: &str, value: &Value| std::fs::write(folder.path().join(name), value.to_string());
        write("config.json", &raw()).expect("written");
        let plain = ModelConfig::read(folder.path()).expect("a configuration");
        let generation = json!({"eos_token_id": [7, 3], "temperature": 0.6, "top_k": 20, "repetition_penalty": 1.1});
        write("generation_config.json", &generation).expect("written");
        let read = ModelConfig::read(folder.path()).expect("a configuration");
        assert_eq!(read.eos_token_id, [3, 7]);
        assert_eq!(ModelConfig { eos_token_id: vec![3], ..read }, plain);
        write("generation_config.json", &json!({"eos_token_id": "x"})).expect("written");
        let error = format!("{:#}", ModelConfig::read(folder.path()).expect_err("no id"));
        assert!(error.contains("generation_config.json") && error.contains("no token id"), "{error}");
    }

    #[test]
    fn what_is_not_implemented_is_refused_by_name() {
        let cases = [
            ("model_type", json!("mamba"), "`mamba` is not implemented: there are `qwen2`, `qwen3`, `llama`"),
            ("rope_scaling", json!({"type": "dynamic"}), "dynamic"),
            ("rope_parameters", json!({"rope_type": "longrope"}), "longrope"),
            ("quantization_config", json!({"bits": 4}), "quantized"),
            ("use_sliding_window", json!(true), "sliding"),
            ("layer_types", json!(["sliding_attention"]), "sliding_attention"),
            ("hidden_act", json!("gelu"), "gelu"),
            ("attention_dropout", json!(0.1), "dropout"),
            ("head_dim", json!(3), "even `head_dim`"),
            ("num_attention_heads", json!(3), "does not divide"),
            ("num_hidden_layers", json!(0), "must be positive"),
        ];
        for (field, value, says) in cases {
            let mut raw = raw();
            raw[field] = value;
            let error = ModelConfig::parse(raw).expect_err(field).to_string();
            assert!(error.contains(says), "{field}: {error}");
        }
    }
}
