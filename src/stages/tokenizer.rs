//! `tokenizer`: a Hugging Face tokenizer, of a task's vocabulary alone or of a folder with tokens added to it.
//!
//! Alone, every token of the task is one entry of a word-level model, so text and ids determine each other: text that is
//! not made of the vocabulary is an error, and there is no unknown token to hide it behind. A folder's tokenizer keeps all
//! its ids and reads the added tokens as wholes wherever they stand in a text.

use std::collections::BTreeSet;
use std::fs;
use std::ops::Range;
use std::path::Path;

use anyhow::{Context as _, anyhow};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use tokenizers::decoders::fuse::Fuse;
use tokenizers::models::wordlevel::WordLevel;
use tokenizers::pre_tokenizers::split::{Split, SplitPattern};
use tokenizers::processors::template::TemplateProcessing;
use tokenizers::tokenizer::{AddedToken, SplitDelimiterBehavior, Tokenizer as HuggingFaceTokenizer};

use crate::file::{Source, SourceFile};
use crate::pipeline::stage::{ArtifactType, Output, Part, Problem, Stage, StageContext, Upstream};
use crate::stages::chat::{CONFIG_FILE, ChatTemplate, SPECIALS_FILE, TEMPLATE_FILE, content, read_json};
use crate::stages::hub;
use crate::tasks::maze::{BEGIN, END, PAD};
use crate::tasks::{FormatSpec, TaskSpec, open};

/// The file that holds the tokenizer itself.
pub const TOKENIZER_FILE: &str = "tokenizer.json";

/// The files that make up a tokenizer in a Hugging Face folder besides [`TOKENIZER_FILE`].
const COMPANIONS: &[&str] = &[
    CONFIG_FILE,
    SPECIALS_FILE,
    TEMPLATE_FILE,
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "vocab.txt",
    "tokenizer.model",
];

/// Make a tokenizer with the companions that `transformers` reads: of a task, or of a folder with tokens added.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Tokenizer {
    /// The task whose vocabulary becomes the tokenizer, or is added to the one in `from`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub task: Option<TaskSpec>,
    /// The format in which the task is written.
    #[serde(default)]
    pub format: FormatSpec,
    /// A folder with a `tokenizer.json`, or a repository of the Hugging Face hub as `organisation/name@commit`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub from: Option<Source>,
    /// Tokens to add to the tokenizer in `from`, in the order of their ids; those that it has keep their ids. A token that
    /// the chat template writes, as `<|im_end|>`, becomes a special one.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(extend("default" = []))]
    pub added_tokens: Vec<String>,
    /// A chat template in Jinja, in place of the one that the folder has.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub chat_template: Option<SourceFile>,
}

impl Stage for Tokenizer {
    const KIND: &'static str = "tokenizer";
    const VERSION: u32 = 2;

    fn outputs(&self) -> Vec<Output> {
        vec![Output::new("tokenizer", ArtifactType::Tokenizer)]
    }

    fn parts(&self) -> Vec<Part> {
        let task = self.task.iter().flat_map(|task| [self.format.part(), task.part()]);
        task.map(|(name, version)| Part::new(name, version)).collect()
    }

    fn check(&self, _: &Upstream<'_>) -> Vec<Problem> {
        let mut problems = Vec::new();
        if let Some(Err(error)) = self.task.as_ref().map(|task| open(task, &self.format)) {
            problems.push(Problem::new("task", error.to_string()));
        }
        match &self.from {
            Some(source) => problems.extend(hub::check(source)),
            None if self.task.is_none() => {
                let problem = Problem::new("task", "a tokenizer needs a `task`, or a folder in `from`");
                problems.push(problem.hint("give `task = { kind = ... }`, `from = \"folder\"`, or both"));
            }
            None if !self.added_tokens.is_empty() => {
                problems.push(Problem::new("added_tokens", "there is no tokenizer in `from` to add tokens to"));
            }
            None => {}
        }
        if let Some(token) = self.added_tokens.iter().find(|token| token.trim().is_empty()) {
            problems.push(Problem::new("added_tokens", format!("`{token}` cannot be a token: it has nothing to read")));
        }
        problems
    }

    fn metrics(&self, _upstream: &Upstream<'_>) -> Option<Vec<String>> {
        Some(Vec::new())
    }

    fn run(&self, context: &mut StageContext) -> anyhow::Result<()> {
        let folder = context.output("tokenizer");
        let mut template = None;
        if let Some(file) = &self.chat_template {
            let reading = || format!("reading `{}`", file.path.display());
            template = Some((fs::read_to_string(&file.path).with_context(reading)?, reading));
        }
        match &self.from {
            Some(source) => self.import(source, template.as_ref().map(|(text, _)| text.as_str()), &folder, context)?,
            None => self.make(&folder)?,
        }
        let Some((text, reading)) = template else { return Ok(()) };
        write(&folder, TEMPLATE_FILE, &text)?;
        // One place for the template: an entry of the configuration would be another.
        let mut config = read_json(&folder.join(CONFIG_FILE))?;
        if config.remove("chat_template").is_some() {
            write(&folder, CONFIG_FILE, &pretty(&config.into()))?;
        }
        ChatTemplate::open(&folder).with_context(reading).map(drop)
    }
}

impl Tokenizer {
    /// The tokenizer of the task alone.
    fn make(&self, folder: &Path) -> anyhow::Result<()> {
        let task = self.task.as_ref().context("the stage names no task")?;
        let task = open(task, &self.format)?;
        let tokenizer = build(&task.vocabulary(), &task.pieces())?;
        write(folder, TOKENIZER_FILE, &text(&tokenizer)?)?;
        write(folder, CONFIG_FILE, &pretty(&config()))?;
        write(folder, SPECIALS_FILE, &pretty(&json!({"bos_token": BEGIN, "eos_token": END, "pad_token": PAD})))
    }

    /// The tokenizer of a folder, with the tokens that are asked for added behind its own.
    ///
    /// `template` is the chat template that takes the place of the folder's.
    fn import(
        &self,
        source: &Source,
        template: Option<&str>,
        folder: &Path,
        context: &mut StageContext,
    ) -> anyhow::Result<()> {
        let companion = |name: &str| name == TOKENIZER_FILE || COMPANIONS.contains(&name);
        let from = hub::folder(source, &context.work, &companion)?;
        for name in std::iter::once(&TOKENIZER_FILE).chain(COMPANIONS) {
            let path = from.join(name);
            if path.exists() {
                let bytes = fs::read(&path).with_context(|| format!("reading `{}`", path.display()))?;
                fs::write(folder.join(name), bytes).with_context(|| format!("writing `{name}`"))?;
            }
        }
        let mut tokenizer = read(&from)?;
        let specials = Specials::of(folder, &tokenizer)?;
        let mut tokens = self.added_tokens.clone();
        if let Some(task) = &self.task {
            // Of a task's own frame only what the tokenizer lacks: two tokens for one end would be two ends.
            let framed = [
                ("pad_token", PAD, specials.pad),
                ("bos_token", BEGIN, specials.begin.or(specials.end)),
                ("eos_token", END, specials.end),
            ];
            let stands = |token: &str| framed.iter().any(|(_, frame, has)| *frame == token && has.is_some());
            tokens.extend(open(task, &self.format)?.added_tokens().into_iter().filter(|token| !stands(token)));
            let mut config = read_json(&folder.join(CONFIG_FILE))?;
            for (name, frame, _) in framed.iter().filter(|(_, _, has)| has.is_none()) {
                config.insert((*name).to_owned(), json!(frame));
            }
            write(folder, CONFIG_FILE, &pretty(&config.into()))?;
        }
        if tokens.is_empty() {
            return Ok(());
        }
        let template = match template {
            Some(template) => template.to_owned(),
            None => ChatTemplate::source(folder)?.map_or_else(String::new, |(template, _)| template),
        };
        // What a template writes around words is a sign of the conversation, by which a turn can end; a word is not.
        let is_sign = |token: &String| !token.starts_with(char::is_alphanumeric) && template.contains(token.as_str());
        let special = |token: &String| {
            [PAD, BEGIN, END].contains(&token.as_str()) || (self.added_tokens.contains(token) && is_sign(token))
        };
        let before = tokenizer.get_vocab_size(true);
        // Tokens that were added before keep how they are read.
        let had: BTreeSet<String> =
            tokenizer.get_added_tokens_decoder().into_values().map(|token| token.content).collect();
        let added = tokens.iter().filter(|token| !had.contains(*token));
        let added = added.map(|token| AddedToken::from(token.clone(), special(token)).normalized(false));
        tokenizer.add_tokens(added).map_err(|error| anyhow!("{error}")).context("adding tokens")?;
        let new = tokenizer.get_vocab_size(true) - before;
        context.note(format!("{new} tokens added to {before}, {} were there", tokens.len() - new));
        write(folder, TOKENIZER_FILE, &text(&tokenizer)?)
    }
}

fn write(folder: &Path, name: &str, text: &str) -> anyhow::Result<()> {
    let path = folder.join(name);
    let end = if text.ends_with('\n') { "" } else { "\n" };
    fs::write(&path, format!("{text}{end}")).with_context(|| format!("writing `{}`", path.display()))
}

fn pretty(value: &Value) -> String {
    serde_json::to_string_pretty(value).expect("a JSON value is plain data")
}

fn text(tokenizer: &HuggingFaceTokenizer) -> anyhow::Result<String> {
    tokenizer.to_string(true).map_err(|error| anyhow!("{error}")).context("writing the tokenizer")
}

/// Reads `tokenizer.json` in a folder, without the limits that it may set: they are for the batches of whoever saved it,
/// and rows are neither cut nor filled up in silence.
pub fn read(folder: &Path) -> anyhow::Result<HuggingFaceTokenizer> {
    let path = folder.join(TOKENIZER_FILE);
    let reading = || format!("reading `{}`", path.display());
    let bytes = fs::read(&path).with_context(reading)?;
    let wrong = |error: tokenizers::Error| anyhow!("{error}");
    let mut tokenizer = HuggingFaceTokenizer::from_bytes(&bytes).map_err(wrong).with_context(reading)?;
    tokenizer.with_padding(None).with_truncation(None).map_err(wrong).with_context(reading)?;
    Ok(tokenizer)
}

/// The ids by which sequences are framed, as a tokenizer's folder names them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Specials {
    /// Begins a sequence, where the tokenizer wants that.
    pub begin: Option<u32>,
    /// Ends a sequence.
    pub end: Option<u32>,
    /// Fills sequences up.
    pub pad: Option<u32>,
}

impl Specials {
    /// What `tokenizer_config.json` or `special_tokens_map.json` of `folder` name, or else a task's own tokens.
    pub(crate) fn of(folder: &Path, tokenizer: &HuggingFaceTokenizer) -> anyhow::Result<Self> {
        let files = [read_json(&folder.join(CONFIG_FILE))?, read_json(&folder.join(SPECIALS_FILE))?];
        let id = |name: &str, own: &str| {
            if files.iter().all(serde_json::Map::is_empty) {
                return Ok(tokenizer.token_to_id(own));
            }
            let Some(token) = files.iter().find_map(|file| content(file.get(name)?)) else { return Ok(None) };
            let id = tokenizer.token_to_id(&token);
            id.map(Some).with_context(|| format!("`{}` has no `{token}`, its `{name}`", folder.display()))
        };
        Ok(Self { begin: id("bos_token", BEGIN)?, end: id("eos_token", END)?, pad: id("pad_token", PAD)? })
    }
}

fn config() -> Value {
    json!({
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BEGIN,
        "eos_token": END,
        "pad_token": PAD,
        "add_bos_token": true,
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
    // Rows begin with it, so a text that someone else turns into ids must, too.
    let begin = tokenizer.token_to_id(BEGIN).with_context(|| format!("the vocabulary lacks `{BEGIN}`"))?;
    let mut framed = TemplateProcessing::builder();
    framed.try_single(format!("{BEGIN} $A")).map_err(|error| anyhow!("{error}"))?;
    framed.try_pair(format!("{BEGIN} $A $B:1")).map_err(|error| anyhow!("{error}"))?;
    framed.special_tokens(vec![(BEGIN.to_owned(), begin)]);
    tokenizer.with_post_processor(Some(framed.build().map_err(|error| anyhow!("{error}"))?));
    Ok(tokenizer)
}

/// A tokenizer read from its folder, with the ids that rows are framed with.
pub(crate) struct Encoder {
    tokenizer: HuggingFaceTokenizer,
    /// The id that begins a row, where the tokenizer puts one before a text.
    pub(crate) begin: Option<i32>,
    /// The id that ends a row.
    pub(crate) end: i32,
    /// BLAKE3 of the bytes of `tokenizer.json`.
    pub(crate) digest: String,
}

impl Encoder {
    /// Reads the tokenizer of a folder.
    pub(crate) fn open(folder: &Path) -> anyhow::Result<Self> {
        let tokenizer = read(folder)?;
        let path = folder.join(TOKENIZER_FILE);
        let bytes = fs::read(&path).with_context(|| format!("reading `{}`", path.display()))?;
        let specials = Specials::of(folder, &tokenizer)?;
        let end = specials.end.with_context(|| {
            let folder = folder.display();
            format!("the tokenizer `{folder}` names no `eos_token`: rows need an end, name it in `{CONFIG_FILE}`")
        })?;
        // A name alone is no beginning: many models name a `bos_token` that their texts never had.
        let framed = tokenizer.encode_fast("", true).map_err(|error| anyhow!("{error}"));
        let framed = framed.with_context(|| format!("reading an empty text with `{}`", path.display()))?;
        let begin = framed.get_ids().first().copied();
        let begin = begin.filter(|id| *id != end || specials.begin == Some(end)).map(|id| id as i32);
        Ok(Self { begin, end: end as i32, digest: blake3::hash(&bytes).to_hex().to_string(), tokenizer })
    }

    /// The ids of a text, nothing added; an error shows the text that has none.
    pub(crate) fn encode(&self, text: &str, ids: &mut Vec<i32>) -> anyhow::Result<()> {
        let encoded = self.tokenizer.encode_fast(text, false).map_err(|error| lacking(text, &error))?;
        ids.extend(encoded.get_ids().iter().map(|&id| id as i32));
        Ok(())
    }

    /// The places, among the ids of a text, of those that begin within one of `spans` of its bytes.
    pub(crate) fn within(&self, text: &str, spans: &[Range<usize>]) -> anyhow::Result<Vec<usize>> {
        if spans.is_empty() {
            return Ok(Vec::new());
        }
        let encoded = self.tokenizer.encode(text, false).map_err(|error| lacking(text, &error))?;
        let is_within = |&(begin, _): &(usize, usize)| spans.iter().any(|span| span.contains(&begin));
        let places = encoded.get_offsets().iter().enumerate().filter(|(_, offsets)| is_within(offsets));
        Ok(places.map(|(place, _)| place).collect())
    }

    /// The text of ids, special tokens included.
    #[cfg(test)]
    pub(crate) fn decode(&self, ids: &[i32]) -> String {
        let ids: Vec<u32> = ids.iter().map(|&id| id as u32).collect();
        self.tokenizer.decode(&ids, false).unwrap()
    }
}

fn lacking(text: &str, error: &tokenizers::Error) -> anyhow::Error {
    let shown: String = text.chars().take(80).collect();
    anyhow!("`{shown}` has text that the vocabulary lacks ({error})")
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
            assert_eq!((encoder.begin, encoder.end), (Some(1), 2));
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

    /// Runs a stage of `params` and gives its folder.
    fn imported(params: Value) -> anyhow::Result<tempfile::TempDir> {
        let folder = tempfile::tempdir().unwrap();
        let stage: Tokenizer = serde_json::from_value(params).unwrap();
        assert_eq!(stage.check(&Upstream { stages: &std::collections::BTreeMap::new() }), []);
        stage.run(&mut context(folder.path(), &["tokenizer"]))?;
        Ok(folder)
    }

    #[test]
    fn a_folder_keeps_its_ids_and_gets_more() {
        let source = run(&json!({"kind": "compact"}));
        let source = source.path().join("out/tokenizer");
        let own = Encoder::open(&source).unwrap();
        let copy = imported(json!({"from": source})).unwrap();
        assert_eq!(digest(&copy.path().join("out/tokenizer")), digest(&source));
        let task = json!({"kind": "maze", "rows": 6, "columns": 6});
        let params =
            json!({"from": source, "task": task, "format": {"kind": "compact"}, "added_tokens": ["<new>", "<|up|>"]});
        let folder = imported(params.clone()).unwrap();
        assert_eq!(digest(folder.path()), digest(imported(params).unwrap().path()));
        let grown = Encoder::open(&folder.path().join("out/tokenizer")).unwrap();
        assert_eq!((grown.begin, grown.end), (own.begin, own.end));
        let before = own.tokenizer.get_vocab(true);
        let after = grown.tokenizer.get_vocab(true);
        assert!(before.iter().all(|(token, id)| after.get(token) == Some(id)), "an old token has another id");
        assert_eq!(after["<new>"] as usize, before.len(), "the first new id follows the last old one");
        let spec: TaskSpec = serde_json::from_value(task).unwrap();
        let vocabulary =
            open(&spec, &serde_json::from_value(json!({"kind": "compact"})).unwrap()).unwrap().vocabulary();
        assert!(vocabulary.iter().all(|token| after.contains_key(token)));
        let text = vocabulary.concat() + "<new>";
        let mut ids = Vec::new();
        grown.encode(&text, &mut ids).unwrap();
        assert_eq!((ids.len(), grown.decode(&ids)), (vocabulary.len() + 1, text));
    }

    #[test]
    fn a_folder_that_reads_text_gets_the_signs_of_a_task_and_none_of_its_words() {
        let source = run(&json!({"kind": "alphamaze", "prompt": "legend", "trace": "reprint"}));
        let source = source.path().join("out/tokenizer");
        let task = json!({"kind": "maze", "rows": 6, "columns": 5});
        let grown = |format: Value| {
            let folder = imported(json!({"from": source, "task": task, "format": format})).unwrap();
            let before = read(&source).unwrap().get_vocab(true);
            let after = read(&folder.path().join("out/tokenizer")).unwrap().get_vocab(true);
            let mut new: Vec<String> = after.into_keys().filter(|token| !before.contains_key(token)).collect();
            new.sort();
            new
        };
        let row = ["<|5-0|>", "<|5-1|>", "<|5-2|>", "<|5-3|>", "<|5-4|>"];
        assert_eq!(grown(json!({"kind": "alphamaze", "prompt": "legend", "trace": "path", "retry_share": 0.5})), row);
        assert!(grown(json!({"kind": "alphamaze", "prompt": "legend", "signs": "text"})).is_empty());
    }

    #[test]
    fn a_text_begins_as_the_rows_do_for_everyone() {
        let folder = run(&json!({"kind": "compact"}));
        let tokenizer = read(&folder.path().join("out/tokenizer")).unwrap();
        let tokens = |framed: bool| tokenizer.encode("<|up|>", framed).unwrap().get_tokens().to_vec();
        assert_eq!(
            (tokens(true), tokens(false)),
            (vec![BEGIN.to_owned(), "<|up|>".to_owned()], vec!["<|up|>".to_owned()])
        );
        assert_eq!(read_json(&folder.path().join("out/tokenizer").join(CONFIG_FILE)).unwrap()["add_bos_token"], true);
    }

    /// Changes the file of a folder's tokenizer.
    fn change(folder: &Path, by: impl FnOnce(&mut Value)) {
        let text = fs::read_to_string(folder.join(TOKENIZER_FILE)).unwrap();
        let mut file: Value = serde_json::from_str(&text).unwrap();
        by(&mut file);
        write(folder, TOKENIZER_FILE, &pretty(&file)).unwrap();
    }

    #[test]
    fn a_row_is_neither_cut_nor_filled_up() {
        let source = run(&json!({"kind": "compact"}));
        let source = source.path().join("out/tokenizer");
        change(&source, |file| {
            file["truncation"] =
                json!({"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0});
            file["padding"] = json!({"strategy": {"Fixed": 5}, "direction": "Right", "pad_to_multiple_of": null,
                "pad_id": 0, "pad_type_id": 0, "pad_token": PAD});
        });
        let grown = imported(json!({"from": source, "added_tokens": ["<new>"]})).unwrap();
        let written = read_json(&grown.path().join("out/tokenizer").join(TOKENIZER_FILE)).unwrap();
        assert_eq!((&written["truncation"], &written["padding"]), (&Value::Null, &Value::Null));
        for folder in [source, grown.path().join("out/tokenizer")] {
            let encoder = Encoder::open(&folder).unwrap();
            for text in ["<|up|><|up|><|up|><|up|>", "<|up|>"] {
                let mut ids = Vec::new();
                encoder.encode(text, &mut ids).unwrap();
                assert_eq!(encoder.decode(&ids), text);
            }
        }
    }

    #[test]
    fn an_added_token_can_end_the_turns_of_a_template_and_old_ones_stay_as_they_were() {
        let source = run(&json!({"kind": "compact"}));
        let source = source.path().join("out/tokenizer");
        change(&source, |file| {
            let old = json!({"id": 900, "content": "<old>", "single_word": false, "lstrip": true, "rstrip": true,
                "normalized": true, "special": true});
            file["model"]["vocab"]["<old>"] = json!(900);
            file["added_tokens"].as_array_mut().unwrap().push(old);
        });
        let template = source.join("chatml.jinja");
        let text = "{% for message in messages %}{{ '<|im_start|>' + message.role + message.content + '<|im_end|>' }}\
            {% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant' }}{% endif %}";
        fs::write(&template, text).unwrap();
        let added = ["<|im_start|>", "<|im_end|>", "<old>", "<|act|>", "assistant"];
        let folder = imported(json!({"from": source, "chat_template": template, "added_tokens": added})).unwrap();
        let folder = folder.path().join("out/tokenizer");
        assert_eq!(ChatTemplate::open(&folder).unwrap().unwrap().end_of_turn(), "<|im_end|>");
        let file = read_json(&folder.join(TOKENIZER_FILE)).unwrap();
        let entry = |token: &str| {
            let entries = file["added_tokens"].as_array().unwrap();
            entries.iter().find(|entry| entry["content"] == token).unwrap_or_else(|| panic!("{token}")).clone()
        };
        let special = |token: &str| entry(token)["special"].as_bool().unwrap();
        assert_eq!(added.map(special), [true, true, true, false, false]);
        assert_eq!(["lstrip", "rstrip", "normalized"].map(|flag| entry("<old>")[flag] == true), [true; 3]);
    }

    #[test]
    fn a_row_is_framed_as_the_folder_says() {
        let source = run(&json!({"kind": "compact"}));
        let folder = source.path().join("out/tokenizer");
        fs::remove_file(folder.join(SPECIALS_FILE)).unwrap();
        let begins = |with: Option<&str>| {
            let with = with.map(|token| {
                json!({"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": token, "type_id": 0}},
                    {"Sequence": {"id": "A", "type_id": 0}}], "pair": [{"Sequence": {"id": "A", "type_id": 0}},
                    {"Sequence": {"id": "B", "type_id": 0}}],
                    "special_tokens": {token: {"id": token, "ids": [if token == END { 2 } else { 1 }], "tokens": [token]}}})
            });
            change(&folder, |file| file["post_processor"] = with.unwrap_or_default());
        };
        let framed = |config: Value| {
            write(&folder, CONFIG_FILE, &pretty(&config)).unwrap();
            Encoder::open(&folder).map(|encoder| (encoder.begin, encoder.end)).map_err(|error| format!("{error:#}"))
        };
        assert_eq!(framed(json!({"bos_token": null, "eos_token": {"content": "<|pad|>"}})), Ok((Some(1), 0)));
        begins(Some(END));
        assert_eq!(framed(json!({"bos_token": "<|eos|>", "eos_token": "<|bos|>"})), Ok((Some(2), 1)));
        // One token for both, or an end behind the text.
        assert_eq!(framed(json!({"bos_token": "<|eos|>", "eos_token": "<|eos|>"})), Ok((Some(2), 2)));
        assert_eq!(framed(json!({"bos_token": "<|bos|>", "eos_token": "<|eos|>"})), Ok((None, 2)));
        begins(None);
        assert_eq!(framed(json!({"bos_token": "<|bos|>", "eos_token": "<|eos|>"})), Ok((None, 2)));
        assert!(framed(json!({"bos_token": "<|bos|>"})).unwrap_err().contains("names no `eos_token`"));
        assert!(framed(json!({"eos_token": "</s>"})).unwrap_err().contains("has no `</s>`, its `eos_token`"));
    }

    #[test]
    fn a_chat_template_takes_the_place_of_another() {
        let source = run(&json!({"kind": "compact"}));
        let source = source.path().join("out/tokenizer");
        let mut config = read_json(&source.join(CONFIG_FILE)).unwrap();
        config.insert("chat_template".to_owned(), json!("old"));
        write(&source, CONFIG_FILE, &pretty(&config.into())).unwrap();
        let template = source.join("new.jinja");
        let text = "{% for message in messages %}{{ message.role + message.content + eos_token }}{% endfor %}\
            {% if add_generation_prompt %}{{ 'assistant' }}{% endif %}";
        fs::write(&template, text).unwrap();
        let folder = imported(json!({"from": source, "chat_template": template})).unwrap();
        let folder = folder.path().join("out/tokenizer");
        assert!(!read_json(&folder.join(CONFIG_FILE)).unwrap().contains_key("chat_template"));
        assert_eq!(ChatTemplate::open(&folder).unwrap().unwrap().end_of_turn(), END);
        fs::write(&template, "{% for %}").unwrap();
        let error = format!("{:#}", imported(json!({"from": source, "chat_template": template})).err().unwrap());
        assert!(error.contains("new.jinja") && error.contains("no chat template"), "{error}");
    }

    #[test]
    fn a_tokenizer_has_a_beginning() {
        let problems = |params: Value| -> Vec<String> {
            let stage: Tokenizer = serde_json::from_value(params).unwrap();
            let none = std::collections::BTreeMap::new();
            stage.check(&Upstream { stages: &none }).into_iter().map(|problem| problem.path).collect()
        };
        let task = json!({"kind": "maze", "rows": 5, "columns": 5});
        assert_eq!(problems(json!({"task": task})), Vec::<String>::new());
        assert_eq!(problems(json!({})), ["task"]);
        assert_eq!(problems(json!({"task": task, "added_tokens": ["x"]})), ["added_tokens"]);
        assert_eq!(problems(json!({"from": "/a", "added_tokens": [" "]})), ["added_tokens"]);
        let stage: Tokenizer = serde_json::from_value(json!({"task": task})).unwrap();
        let fields = serde_json::to_value(&stage).unwrap();
        assert_eq!(fields.as_object().unwrap().keys().collect::<Vec<_>>(), ["format", "task"], "old keys stay");
    }

    #[test]
    fn a_folder_without_a_tokenizer_is_named() {
        let folder = tempfile::tempdir().unwrap();
        let error = format!("{:#}", Encoder::open(folder.path()).err().unwrap());
        assert!(error.contains("tokenizer.json"), "{error}");
    }
}
