//! `tokenizer`: the vocabulary of a task in a format, as a Hugging Face tokenizer.
//!
//! Every token of the task is one entry of a word-level model, so text and ids determine each other: text that is not
//! made of the vocabulary is an error, and there is no unknown token to hide it behind.

use std::fs;

use anyhow::{Context as _, anyhow};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use tokenizers::decoders::fuse::Fuse;
use tokenizers::models::wordlevel::WordLevel;
use tokenizers::pre_tokenizers::split::{Split, SplitPattern};
use tokenizers::tokenizer::{AddedToken, SplitDelimiterBehavior, Tokenizer as HuggingFaceTokenizer};

use crate::pipeline::stage::{ArtifactType, Output, Part, Problem, Stage, StageContext, Upstream};
use crate::tasks::maze::{BEGIN, END, PAD};
use crate::tasks::{FormatSpec, TaskSpec, open};

/// The file that holds the tokenizer itself.
pub const TOKENIZER_FILE: &str = "tokenizer.json";

/// Make the tokenizer of a task: `tokenizer.json` and the companions that `transformers` reads.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Tokenizer {
    /// The task.
    pub task: TaskSpec,
    /// The format in which the task is written.
    #[serde(default)]
    pub format: FormatSpec,
}

impl Stage for Tokenizer {
    const KIND: &'static str = "tokenizer";
    const VERSION: u32 = 1;

    fn outputs(&self) -> Vec<Output> {
        vec![Output::new("tokenizer", ArtifactType::Tokenizer)]
    }

    fn parts(&self) -> Vec<Part> {
        [self.format.part(), self.task.part()].map(|(name, version)| Part::new(name, version)).into()
    }

    fn check(&self, _: &Upstream<'_>) -> Vec<Problem> {
        match open(&self.task, &self.format) {
            Ok(_) => Vec::new(),
            Err(error) => vec![Problem::new("task", error.to_string())],
        }
    }

    fn run(&self, context: &mut StageContext) -> anyhow::Result<()> {
        let task = open(&self.task, &self.format)?;
        let folder = context.output("tokenizer");
        let tokenizer = build(&task.vocabulary(), &task.pieces())?;
        let text = tokenizer.to_string(true).map_err(|error| anyhow!("{error}")).context("writing the tokenizer")?;
        let write = |name: &str, text: String| {
            let path = folder.join(name);
            fs::write(&path, text + "\n").with_context(|| format!("writing `{}`", path.display()))
        };
        let pretty = |value: &Value| serde_json::to_string_pretty(value).expect("a JSON value is plain data");
        write(TOKENIZER_FILE, text)?;
        write("tokenizer_config.json", pretty(&config()))?;
        write("special_tokens_map.json", pretty(&json!({"bos_token": BEGIN, "eos_token": END, "pad_token": PAD})))
    }
}

fn config() -> Value {
    json!({
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BEGIN,
        "eos_token": END,
        "pad_token": PAD,
        "add_bos_token": false,
        "add_eos_token": false,
        "clean_up_tokenization_spaces": false,
        "padding_side": "left",
        "model_input_names": ["input_ids", "attention_mask"],
    })
}

/// The tokenizer whose ids are the places in `vocabulary`; the expression `pieces` cuts text into its tokens.
fn build(vocabulary: &[String], pieces: &str) -> anyhow::Result<HuggingFaceTokenizer> {
    let wrong = |error: tokenizers::Error| anyhow!("{error}");
    let words = vocabulary.iter().cloned().zip(0..).collect();
    // The name of the unknown token is not in the vocabulary, so unknown text is an error.
    let model = WordLevel::builder().vocab(words).unk_token("<|unknown|>".to_owned()).build().map_err(wrong)?;
    let mut tokenizer = HuggingFaceTokenizer::new(model);
    let pattern = SplitPattern::Regex(pieces.to_owned());
    let split = Split::new(pattern, SplitDelimiterBehavior::Isolated, false).map_err(wrong)?;
    tokenizer.with_pre_tokenizer(Some(split));
    tokenizer.with_decoder(Some(Fuse::default()));
    let specials = [PAD, BEGIN, END].map(|token| AddedToken::from(token, true));
    tokenizer.add_special_tokens(specials).map_err(wrong)?;
    Ok(tokenizer)
}

/// A tokenizer read from its folder, with the ids that rows are framed with.
pub(crate) struct Encoder {
    tokenizer: HuggingFaceTokenizer,
    /// The id of `<|bos|>`.
    pub(crate) begin: i32,
    /// The id of `<|eos|>`.
    pub(crate) end: i32,
    /// BLAKE3 of the bytes of `tokenizer.json`.
    pub(crate) digest: String,
}

impl Encoder {
    /// Reads `tokenizer.json` in a folder.
    pub(crate) fn open(folder: &std::path::Path) -> anyhow::Result<Self> {
        let path = folder.join(TOKENIZER_FILE);
        let reading = || format!("reading `{}`", path.display());
        let bytes = fs::read(&path).with_context(reading)?;
        let tokenizer =
            HuggingFaceTokenizer::from_bytes(&bytes).map_err(|error| anyhow!("{error}")).with_context(reading)?;
        let id = |token: &str| {
            let id = tokenizer.token_to_id(token).map(|id| id as i32);
            id.with_context(|| format!("`{}` has no token `{token}`", path.display()))
        };
        let (begin, end) = (id(BEGIN)?, id(END)?);
        Ok(Self { begin, end, digest: blake3::hash(&bytes).to_hex().to_string(), tokenizer })
    }

    /// The ids of a text, nothing added; an error shows the text that has none.
    pub(crate) fn encode(&self, text: &str, ids: &mut Vec<i32>) -> anyhow::Result<()> {
        let encoded = self.tokenizer.encode_fast(text, false).map_err(|error| {
            let shown: String = text.chars().take(80).collect();
            anyhow!("`{shown}` has text that the vocabulary lacks ({error})")
        })?;
        ids.extend(encoded.get_ids().iter().map(|&id| id as i32));
        Ok(())
    }

    /// The text of ids, special tokens included.
    #[cfg(test)]
    pub(crate) fn decode(&self, ids: &[i32]) -> String {
        let ids: Vec<u32> = ids.iter().map(|&id| id as u32).collect();
        self.tokenizer.decode(&ids, false).unwrap()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::stages::testing::{context, digest};

    fn run(format: &Value) -> tempfile::TempDir {
        let folder = tempfile::tempdir().unwrap();
        let stage: Tokenizer =
            serde_json::from_value(json!({"task": {"kind": "maze", "rows": 5, "columns": 5}, "format": format}))
                .unwrap();
        stage.run(&mut context(folder.path(), &["tokenizer"])).unwrap();
        folder
    }

    #[test]
    fn twice_gives_the_same_bytes() {
        for format in [json!({"kind": "alphamaze"}), json!({"kind": "compact"})] {
            let digests = [(), ()].map(|()| digest(&run(&format).path().join("out/tokenizer")));
            assert_eq!(digests[0], digests[1]);
            insta::assert_snapshot!(digests[0]);
        }
    }

    #[test]
    fn text_and_ids_determine_each_other() {
        for format in [json!({"kind": "alphamaze"}), json!({"kind": "compact"})] {
            let folder = run(&format);
            let encoder = Encoder::open(&folder.path().join("out/tokenizer")).unwrap();
            let spec: FormatSpec = serde_json::from_value(format).unwrap();
            let task = open(&serde_json::from_value(json!({"kind": "maze", "rows": 5, "columns": 5})).unwrap(), &spec)
                .unwrap();
            let vocabulary = task.vocabulary();
            assert_eq!((encoder.begin, encoder.end), (1, 2));
            let mut ids = Vec::new();
            encoder.encode(&vocabulary.concat(), &mut ids).unwrap();
            assert_eq!(ids, (0..vocabulary.len() as i32).collect::<Vec<_>>());
            assert_eq!(encoder.decode(&ids), vocabulary.concat());
            let instance = task.generate(0, 0..1).unwrap().remove(0);
            let start = crate::tasks::Start { instance: &instance, seed: 0 };
            let text = task.begin(&[start]).unwrap().observe().unwrap().remove(0)
                + &task.demonstrate(&instance, 0).unwrap()[0];
            ids.clear();
            encoder.encode(&text, &mut ids).unwrap();
            assert_eq!(encoder.decode(&ids), text);
            assert_eq!(ids.len(), text.matches('>').count(), "one id a token");
        }
    }

    #[test]
    fn text_outside_the_vocabulary_is_an_error() {
        let folder = run(&json!({"kind": "alphamaze"}));
        let encoder = Encoder::open(&folder.path().join("out/tokenizer")).unwrap();
        for text in [" ", "x", "<|up|> <|down|>", "<|sideways|>", "<|up|>\n", "<|up", "<|up|>é"] {
            assert!(encoder.encode(text, &mut Vec::new()).is_err(), "`{text}` is taken");
        }
    }

    #[test]
    fn a_folder_without_a_tokenizer_is_named() {
        let folder = tempfile::tempdir().unwrap();
        let error = format!("{:#}", Encoder::open(folder.path()).err().unwrap());
        assert!(error.contains("tokenizer.json"), "{error}");
    }
}
