//! Token ids to text and back for a checkpoint, with the digest by which a model and its prompts are held together.
//!
//! Text is for tasks and people: what a model is trained on are ids, never ids that went through text.

use std::path::Path;

use anyhow::{Context as _, anyhow, bail};
use pipe::stages::tokenizer::TOKENIZER_FILE;
use serde_json::Value;
use tokenizers::Tokenizer;

/// The tokenizer of a checkpoint.
#[derive(Debug)]
pub struct Codec {
    tokenizer: Tokenizer,
    digest: String,
}

impl Codec {
    /// Reads the `tokenizer.json` of a checkpoint or tokenizer folder; one whose ids a checkpoint has no rows for is refused.
    pub fn open(folder: &Path) -> anyhow::Result<Self> {
        let path = folder.join(TOKENIZER_FILE);
        let bytes = std::fs::read(&path).with_context(|| format!("reading `{}`", path.display()))?;
        let tokenizer = pipe::stages::tokenizer::read(folder)?;
        fits(&tokenizer, folder)?;
        Ok(Self { tokenizer, digest: blake3::hash(&bytes).to_hex().to_string() })
    }

    /// BLAKE3 of the bytes of `tokenizer.json`, in hexadecimal digits.
    pub fn digest(&self) -> &str {
        &self.digest
    }

    /// The ids of `text`; text that the tokenizer has no token for is an error.
    pub fn encode(&self, text: &str) -> anyhow::Result<Vec<i64>> {
        self.ids(text, false)
    }

    /// The ids of `text` as `transformers` reads it: with what the tokenizer itself puts around a text.
    pub fn encode_framed(&self, text: &str) -> anyhow::Result<Vec<i64>> {
        self.ids(text, true)
    }

    fn ids(&self, text: &str, framed: bool) -> anyhow::Result<Vec<i64>> {
        let encoded = self.tokenizer.encode_fast(text, framed).map_err(|error| anyhow!("{error}"));
        let shown = || text.chars().take(80).collect::<String>();
        let encoded = encoded.with_context(|| format!("`{}` has text that the vocabulary lacks", shown()))?;
        Ok(encoded.get_ids().iter().map(|id| i64::from(*id)).collect())
    }

    /// The text of `ids`, special tokens included.
    pub fn decode(&self, ids: &[i64]) -> anyhow::Result<String> {
        let ids: Vec<u32> = ids.iter().map(|id| *id as u32).collect();
        self.tokenizer.decode(&ids, false).map_err(|error| anyhow!("{error}")).context("turning ids into text")
    }
}

/// Refuses a tokenizer with ids that the model beside it, if there is one, has no rows for.
fn fits(tokenizer: &Tokenizer, folder: &Path) -> anyhow::Result<()> {
    let path = folder.join("config.json");
    if !path.exists() {
        return Ok(());
    }
    let text = std::fs::read_to_string(&path).with_context(|| format!("reading `{}`", path.display()))?;
    let config: Value = serde_json::from_str(&text).with_context(|| format!("`{}` is no JSON", path.display()))?;
    let rows = config["vocab_size"].as_u64().with_context(|| format!("`{}` has no `vocab_size`", path.display()))?;
    let highest = tokenizer.get_vocab(true).into_iter().max_by_key(|(_, id)| *id);
    if let Some((token, id)) = highest.filter(|(_, id)| u64::from(*id) >= rows) {
        bail!(
            "the tokenizer of `{}` does not fit its model: `{token}` has the id {id}, but `vocab_size` is {rows}; take the \
             model's own tokenizer, or add the tokens with a `model` stage, which grows the embedding",
            folder.display()
        );
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn a_text_is_neither_cut_nor_filled_up() {
        let folder = tempfile::tempdir().expect("a folder");
        let tokenizer = json!({
            "version": "1.0", "added_tokens": [], "normalizer": null, "pre_tokenizer": {"type": "WhitespaceSplit"},
            "truncation": {"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0},
            "padding": {"strategy": {"Fixed": 5}, "direction": "Right", "pad_to_multiple_of": null, "pad_id": 0,
                "pad_type_id": 0, "pad_token": "a"},
            "post_processor": null, "decoder": null, "model": {"type": "WordLevel", "vocab": {"a": 0, "b": 1}, "unk_token": "a"}
        });
        std::fs::write(folder.path().join("tokenizer.json"), tokenizer.to_string()).expect("written");
        let codec = Codec::open(folder.path()).expect("a tokenizer");
        for (text, ids) in [("b b b", vec![1; 3]), ("b", vec![1])] {
            assert_eq!((codec.encode(text).expect("ids"), codec.encode_framed(text).expect("ids")), (ids.clone(), ids));
        }
    }

    #[test]
    fn a_tokenizer_with_more_ids_than_its_model_has_rows_is_refused() {
        let folder = tempfile::tempdir().expect("a folder");
        let tokenizer = json!({
            "version": "1.0", "truncation": null, "padding": null, "added_tokens": [], "normalizer": null,
            "pre_tokenizer": null, "post_processor": null, "decoder": null,
            "model": {"type": "WordLevel", "vocab": {"a": 0, "b": 4}, "unk_token": "a"}
        });
        let write =
            |name: &str, value: &Value| std::fs::write(folder.path().join(name), value.to_string()).expect(name);
        write("tokenizer.json", &tokenizer);
        let codec = Codec::open(folder.path()).expect("a tokenizer alone");
        assert_eq!(codec.encode_framed("b").expect("a word"), [4]);
        write("config.json", &json!({"vocab_size": 5}));
        Codec::open(folder.path()).expect("as many rows as ids");
        write("config.json", &json!({"vocab_size": 4}));
        let error = format!("{:#}", Codec::open(folder.path()).expect_err("too few rows"));
        assert!(error.contains("`b` has the id 4, but `vocab_size` is 4"), "{error}");
    }
}
