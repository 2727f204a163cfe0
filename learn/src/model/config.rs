//! `config.json` of a Hugging Face folder, with its field names, and what of it is implemented.
//!
//! A setting that would change the forward pass and is not implemented is an error here, never ignored: a model that
//! loads is a model whose logits are right.

use std::path::Path;

use anyhow::{Context, Result, bail, ensure};
use serde::Deserialize;
use serde_json::Value;

/// The architecture of a checkpoint (Qwen2), with the field names of Hugging Face.
#[derive(Clone, Debug, PartialEq, Deserialize)]
pub struct ModelConfig {
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
    #[serde(default)]
    pub num_key_value_heads: i64,
    /// Positions that the model was made for; longer sequences are errors.
    pub max_position_embeddings: i64,
    /// Base of the rotary frequencies.
    #[serde(default = "ModelConfig::default_rope_theta")]
    pub rope_theta: f64,
    /// Added to the mean square before its root.
    pub rms_norm_eps: f64,
    /// The output projection is the embedding.
    #[serde(default)]
    pub tie_word_embeddings: bool,
    /// Begins a sequence.
    #[serde(default)]
    pub bos_token_id: Option<i64>,
    /// Ends a sequence; any of them does.
    #[serde(default, deserialize_with = "one_or_many")]
    pub eos_token_id: Vec<i64>,
    /// Fills rows up to a common length; 0 where the folder names none, for it is never attended to nor trained on.
    #[serde(default)]
    pub pad_token_id: Option<i64>,
}

impl ModelConfig {
    fn default_rope_theta() -> f64 {
        10_000.0
    }

    /// Reads `config.json` of `folder` and refuses what is not implemented.
    pub fn read(folder: &Path) -> Result<Self> {
        let path = folder.join("config.json");
        let text = std::fs::read_to_string(&path).with_context(|| format!("cannot read `{}`", path.display()))?;
        let raw: Value = serde_json::from_str(&text).with_context(|| format!("`{}` is no JSON", path.display()))?;
        Self::parse(raw).with_context(|| format!("cannot use the model of `{}`", path.display()))
    }

    /// The configuration in `raw`, the content of a `config.json`.
    pub fn parse(mut raw: Value) -> Result<Self> {
        refuse(&raw)?;
        // Newer folders keep the base of the frequencies in a table of their own.
        if let Some(theta) = raw.pointer("/rope_parameters/rope_theta").cloned() {
            raw["rope_theta"] = theta;
        }
        let mut config: Self = serde_json::from_value(raw)?;
        if config.num_key_value_heads == 0 {
            config.num_key_value_heads = config.num_attention_heads;
        }
        config.check()?;
        Ok(config)
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
        let (hidden, heads, shared) = (self.hidden_size, self.num_attention_heads, self.num_key_value_heads);
        ensure!(hidden % heads == 0, "`num_attention_heads` {heads} does not divide `hidden_size` {hidden}");
        ensure!(heads % shared == 0, "`num_key_value_heads` {shared} does not divide `num_attention_heads` {heads}");
        ensure!(self.head_size() % 2 == 0, "rotary positions need an even head size, but it is {}", self.head_size());
        Ok(())
    }

    /// Width of one head.
    pub fn head_size(&self) -> i64 {
        self.hidden_size / self.num_attention_heads
    }

    /// The id that fills rows up.
    pub fn padding(&self) -> i64 {
        self.pad_token_id.unwrap_or(0)
    }
}

/// Every setting that would change the forward pass and is not implemented.
fn refuse(raw: &Value) -> Result<()> {
    let model_type = raw["model_type"].as_str().unwrap_or_default();
    ensure!(model_type == "qwen2", "the model type `{model_type}` is not implemented: `qwen2` is");
    if !raw["rope_scaling"].is_null() {
        bail!("`rope_scaling` is not implemented: {}", raw["rope_scaling"]);
    }
    if let Some(rope_type) = raw.pointer("/rope_parameters/rope_type").and_then(Value::as_str) {
        ensure!(rope_type == "default", "the rope type `{rope_type}` is not implemented: `default` is");
    }
    ensure!(raw["use_sliding_window"] != true, "`use_sliding_window` is set, but sliding windows are not implemented");
    if let Some(types) = raw["layer_types"].as_array() {
        let other = types.iter().find(|kind| kind.as_str() != Some("full_attention"));
        ensure!(other.is_none(), "the layer type {} is not implemented", other.unwrap_or(&Value::Null));
    }
    let activation = raw["hidden_act"].as_str().unwrap_or("silu");
    ensure!(activation == "silu", "the activation `{activation}` is not implemented: `silu` is");
    let dropout = raw["attention_dropout"].as_f64().unwrap_or(0.0);
    ensure!(dropout == 0.0, "`attention_dropout` is {dropout}, but dropout is not implemented");
    if let (Some(head), Some(hidden), Some(heads)) =
        (raw["head_dim"].as_i64(), raw["hidden_size"].as_i64(), raw["num_attention_heads"].as_i64())
    {
        ensure!(head * heads == hidden, "`head_dim` {head} times {heads} heads is not `hidden_size` {hidden}");
    }
    Ok(())
}

/// Token ids given as one number, a list, or null.
fn one_or_many<'de, D: serde::Deserializer<'de>>(deserializer: D) -> Result<Vec<i64>, D::Error> {
    #[derive(Deserialize)]
    #[serde(untagged)]
    enum Ids {
        None(()),
        One(i64),
        Many(Vec<i64>),
    }
    Ok(match Ids::deserialize(deserializer)? {
        Ids::None(()) => Vec::new(),
        Ids::One(id) => vec![id],
        Ids::Many(ids) => ids,
    })
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
        assert_eq!((config.num_key_value_heads, config.rope_theta), (2, 10_000.0));
        assert_eq!((config.eos_token_id, config.tie_word_embeddings), (vec![3], false));
        let mut newer = raw();
        newer["rope_parameters"] = json!({"rope_type": "default", "rope_theta": 5e5});
        newer["eos_token_id"] = json!([3, 4]);
        let config = ModelConfig::parse(newer).expect("the newer way to say it");
        assert_eq!((config.rope_theta, config.eos_token_id), (5e5, vec![3, 4]));
    }

    #[test]
    fn what_is_not_implemented_is_refused_by_name() {
        let cases = [
            ("model_type", json!("llama"), "llama"),
            ("rope_scaling", json!({"type": "yarn"}), "rope_scaling"),
            ("rope_parameters", json!({"rope_type": "yarn"}), "yarn"),
            ("use_sliding_window", json!(true), "sliding"),
            ("layer_types", json!(["sliding_attention"]), "sliding_attention"),
            ("hidden_act", json!("gelu"), "gelu"),
            ("attention_dropout", json!(0.1), "dropout"),
            ("head_dim", json!(16), "head_dim"),
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
