//! Token ids to text and back for a checkpoint, with the digest by which a model and its prompts are held together.
//!
//! Text is for tasks and people: what a model is trained on are ids, never ids that went through text.

use std::path::Path;

use anyhow::{Context as _, anyhow};
use tokenizers::Tokenizer;

/// The tokenizer of a checkpoint.
#[derive(Debug)]
pub struct Codec {
    tokenizer: Tokenizer,
    digest: String,
}

impl Codec {
    /// Reads the `tokenizer.json` of a checkpoint or tokenizer folder.
    pub fn open(folder: &Path) -> anyhow::Result<Self> {
        let path = folder.join("tokenizer.json");
        let bytes = std::fs::read(&path).with_context(|| format!("reading `{}`", path.display()))?;
        let tokenizer = Tokenizer::from_bytes(&bytes)
            .map_err(|error| anyhow!("{error}"))
            .with_context(|| format!("`{}` is no tokenizer", path.display()))?;
        Ok(Self { tokenizer, digest: blake3::hash(&bytes).to_hex().to_string() })
    }

    /// BLAKE3 of the bytes of `tokenizer.json`, in hexadecimal digits.
    pub fn digest(&self) -> &str {
        &self.digest
    }

    /// The ids of `text`; text that the tokenizer has no token for is an error.
    pub fn encode(&self, text: &str) -> anyhow::Result<Vec<i64>> {
        let encoded = self.tokenizer.encode(text, false).map_err(|error| anyhow!("{error}"));
        Ok(encoded.context("turning text into ids")?.get_ids().iter().map(|id| i64::from(*id)).collect())
    }

    /// The text of `ids`, special tokens included.
    pub fn decode(&self, ids: &[i64]) -> anyhow::Result<String> {
        let ids: Vec<u32> = ids.iter().map(|id| *id as u32).collect();
        self.tokenizer.decode(&ids, false).map_err(|error| anyhow!("{error}")).context("turning ids into text")
    }
}
