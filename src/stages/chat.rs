//! Chat templates: conversations as the text that a model of a Hugging Face folder reads and writes.
//!
//! There is one renderer for training rows, rollouts and evaluation, so that a model is asked in the very form in which it
//! was taught. It renders like `apply_chat_template` of `transformers`, except that no clock is read: `strftime_now` is
//! undefined, and a template that can do without it takes its own fixed date. The template writes the beginning of the
//! sequence where its model wants one, so its text is encoded with nothing added.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, anyhow, bail, ensure};
use minijinja::syntax::SyntaxConfig;
use minijinja::value::{Kwargs, ValueKind};
use minijinja::{Environment, Error, ErrorKind, Value, escape_formatter};
use serde::{Deserialize, Serialize};
use serde_json::ser::{Formatter, PrettyFormatter, Serializer};

use crate::stages::tokenizer::TOKENIZER_FILE;

/// The file with a template of its own.
pub const TEMPLATE_FILE: &str = "chat_template.jinja";
/// The file that may hold templates beside its other entries.
pub(crate) const CONFIG_FILE: &str = "tokenizer_config.json";
/// Where special tokens stood before `tokenizer_config.json` had them.
pub(crate) const SPECIALS_FILE: &str = "special_tokens_map.json";
/// The names of special tokens that a template sees as variables.
const SPECIALS: &[&str] = &["bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token"];
/// Instructions that one rendering may take: a template that never ends is an error.
const FUEL: u64 = 50_000_000;
/// A message whose place in a rendered text can be found again.
const PLACEHOLDER: &str = "pipe0placeholder0text";

/// A message of a conversation.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Message {
    /// Who speaks, such as `system`, `user` or `assistant`.
    pub role: String,
    /// What is said.
    pub content: String,
}

impl Message {
    /// The role of the model.
    pub const ASSISTANT: &'static str = "assistant";

    /// A message of the role `role`.
    pub fn new(role: &str, content: &str) -> Self {
        Self { role: role.to_owned(), content: content.to_owned() }
    }
}

/// A conversation as text: what the model reads first, and its turns.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Conversation {
    /// Everything up to and including the first generation prompt.
    pub prompt: String,
    /// The model's turns, at least one.
    pub turns: Vec<Turn>,
}

impl Conversation {
    /// All of it in one piece, each turn ended by `end_of_turn`.
    pub fn text(&self, end_of_turn: &str) -> String {
        let turns = self.turns.iter().flat_map(|turn| [turn.reply.as_str(), end_of_turn, turn.observation.as_str()]);
        std::iter::once(self.prompt.as_str()).chain(turns).collect()
    }
}

/// A turn of the model within a [`Conversation`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Turn {
    /// What the model writes, without the token that ends its turn.
    pub reply: String,
    /// What follows that token up to and including the next generation prompt; empty after the last turn.
    pub observation: String,
}

/// The chat template of a tokenizer's folder.
#[derive(Debug)]
pub struct ChatTemplate {
    environment: Environment<'static>,
    specials: BTreeMap<String, String>,
    end_of_turn: String,
    path: PathBuf,
}

impl ChatTemplate {
    /// Reads the template of a tokenizer's or a checkpoint's folder; `None` where it has none.
    ///
    /// `chat_template.jinja` goes before the entry `chat_template` of `tokenizer_config.json`, which is a template or a
    /// list of named ones, of which `default` is taken.
    pub fn open(folder: &Path) -> anyhow::Result<Option<Self>> {
        let Some((source, path)) = Self::source(folder)? else { return Ok(None) };
        let config = read_json(&folder.join(CONFIG_FILE))?;
        let older = read_json(&folder.join(SPECIALS_FILE))?;
        let specials = SPECIALS.iter().filter_map(|name| {
            let text = [&config, &older].into_iter().find_map(|file| content(file.get(*name)?))?;
            Some(((*name).to_owned(), text))
        });
        let mut template = Self {
            environment: environment(&source).with_context(|| format!("`{}` is no chat template", path.display()))?,
            specials: specials.collect(),
            end_of_turn: String::new(),
            path,
        };
        template.end_of_turn = template.find_end_of_turn(&special_tokens(folder)?)?;
        Ok(Some(template))
    }

    /// The template as it is written in a folder, and the file that it stands in; see [`ChatTemplate::open`].
    pub fn source(folder: &Path) -> anyhow::Result<Option<(String, PathBuf)>> {
        let path = folder.join(TEMPLATE_FILE);
        if path.exists() {
            let source = fs::read_to_string(&path).with_context(|| format!("reading `{}`", path.display()))?;
            return Ok(Some((source, path)));
        }
        let path = folder.join(CONFIG_FILE);
        let config = read_json(&path)?;
        let Some(entry) = config.get("chat_template").filter(|entry| !entry.is_null()) else { return Ok(None) };
        let source = named(entry).with_context(|| format!("reading `{}`", path.display()))?;
        Ok(Some((source, path)))
    }

    /// The text of the special token that ends the model's turn.
    pub fn end_of_turn(&self) -> &str {
        &self.end_of_turn
    }

    /// The text of `messages`, with the beginning of the model's next turn if `add_generation_prompt`.
    pub fn render(&self, messages: &[Message], add_generation_prompt: bool) -> anyhow::Result<String> {
        let mut context: BTreeMap<&str, Value> =
            self.specials.iter().map(|(name, text)| (name.as_str(), Value::from(text))).collect();
        let plain = |message: &Message| {
            Value::from_pairs([("role", message.role.as_str()), ("content", message.content.as_str())])
        };
        context.insert("messages", messages.iter().map(plain).collect());
        context.insert("tools", Value::from(()));
        context.insert("documents", Value::from(()));
        context.insert("add_generation_prompt", Value::from(add_generation_prompt));
        let render = || self.environment.get_template("chat")?.render(context);
        render().map_err(|error: Error| {
            let hint = match error.detail() {
                Some(detail) if detail.contains("strftime_now") => {
                    "; no result may depend on today's date: write a fixed one into the template"
                }
                _ => "",
            };
            let messages = messages.len();
            anyhow!("the chat template `{}` fails on {messages} messages: {error}{hint}", self.path.display())
        })
    }

    /// What the model reads before its first turn when its task shows `observation`.
    pub fn first(&self, observation: &str) -> anyhow::Result<String> {
        self.render(&[Message::new("user", observation)], true)
    }

    /// What the model reads after the end of a turn, before its next, when its task shows `observation`.
    pub fn next(&self, observation: &str) -> anyhow::Result<String> {
        let [asked, said] = [Message::new("user", PLACEHOLDER), Message::new(Message::ASSISTANT, PLACEHOLDER)];
        let messages = [asked, said, Message::new("user", observation)];
        let (_, end) = self.turn(&messages[..2])?;
        let all = self.render(&messages, true)?;
        Ok(self.after(&messages[..2], &end, &all)?.to_owned())
    }

    /// A conversation as the model reads and writes it; its last message is the model's.
    ///
    /// A reply is what the template adds to the text that the model had read, up to the end of the turn. So what was
    /// written must stand unchanged in the text of the longer conversation; a template that rewrites it is refused.
    pub fn conversation(&self, messages: &[Message]) -> anyhow::Result<Conversation> {
        let replies: Vec<usize> = (0..messages.len()).filter(|&at| messages[at].role == Message::ASSISTANT).collect();
        ensure!(!replies.is_empty(), "no message has the role `{}`: there is nothing to learn", Message::ASSISTANT);
        ensure!(
            replies.last() == Some(&(messages.len() - 1)),
            "the last message has the role `{}`: no reply of the role `{}` follows it",
            messages[messages.len() - 1].role,
            Message::ASSISTANT
        );
        let prompt = self.render(&messages[..replies[0]], true)?;
        let mut turns = Vec::with_capacity(replies.len());
        for (turn, &at) in replies.iter().enumerate() {
            let (reply, read) = self.turn(&messages[..=at])?;
            let observation = match replies.get(turn + 1) {
                Some(&next) => {
                    let all = self.render(&messages[..next], true)?;
                    self.after(&messages[..=at], &read, &all)?.to_owned()
                }
                None => String::new(),
            };
            turns.push(Turn { reply, observation });
        }
        Ok(Conversation { prompt, turns })
    }

    /// The reply that ends `messages`, and the whole text up to and including its end of turn.
    fn turn(&self, messages: &[Message]) -> anyhow::Result<(String, String)> {
        let before = self.render(&messages[..messages.len() - 1], true)?;
        let whole = self.render(messages, false)?;
        let added = self.after(&messages[..messages.len() - 1], &before, &whole)?;
        let Some(end) = added.rfind(&self.end_of_turn) else {
            bail!(
                "the chat template `{}` ends message {} without `{}`: a model trained on it would not learn to stop",
                self.path.display(),
                messages.len(),
                self.end_of_turn
            );
        };
        let read = whole[..before.len() + end + self.end_of_turn.len()].to_owned();
        Ok((added[..end].to_owned(), read))
    }

    /// What stands in `whole` after the text `before` of `messages`, which must be its beginning.
    fn after<'a>(&self, messages: &[Message], before: &str, whole: &'a str) -> anyhow::Result<&'a str> {
        if let Some(rest) = whole.strip_prefix(before) {
            return Ok(rest);
        }
        let common = before.char_indices().zip(whole.chars()).take_while(|((_, one), other)| one == other);
        let shown = |text: &str| text.chars().skip(common.clone().count()).take(40).collect::<String>();
        bail!(
            "the chat template `{}` rewrites the first {} messages when another follows: `{}` becomes `{}`. What the model \
             reads would not be what it was taught: use a template that leaves earlier messages as they are, or \
             conversations of one reply",
            self.path.display(),
            messages.len(),
            shown(before).escape_debug(),
            shown(whole).escape_debug()
        )
    }

    /// The first special token behind the content of a model's message.
    fn find_end_of_turn(&self, specials: &[String]) -> anyhow::Result<String> {
        let messages = [Message::new("user", "q"), Message::new(Message::ASSISTANT, PLACEHOLDER)];
        let text = self.render(&messages, false)?;
        let tail = text.rsplit_once(PLACEHOLDER).map(|(_, tail)| tail).with_context(|| {
            format!("the chat template `{}` does not show what the role `assistant` says", self.path.display())
        })?;
        let places = specials.iter().filter_map(|token| Some((tail.find(token)?, token)));
        // Of two that begin at one place, the longer is the token.
        let first = places.min_by_key(|(place, token)| (*place, usize::MAX - token.len()));
        first.map(|(_, token)| token.clone()).with_context(|| {
            format!(
                "the chat template `{}` ends an assistant's message without a special token: a model trained on it would \
                 not learn to stop",
                self.path.display()
            )
        })
    }
}

/// The template in an environment that behaves like the one of `transformers`.
fn environment(source: &str) -> anyhow::Result<Environment<'static>> {
    let mut environment = Environment::new();
    environment.set_syntax(SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build()?);
    environment.set_fuel(Some(FUEL));
    environment.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
    environment.set_formatter(|out, state, value| match value.kind() {
        ValueKind::Bool => escape_formatter(out, state, &Value::from(if value.is_true() { "True" } else { "False" })),
        ValueKind::None => escape_formatter(out, state, &Value::from("None")),
        ValueKind::Seq | ValueKind::Map | ValueKind::Iterable => {
            Err(Error::new(ErrorKind::InvalidOperation, "a list or a map is written as text; use the filter `tojson`"))
        }
        _ => escape_formatter(out, state, value),
    });
    environment.add_function("raise_exception", |message: String| -> Result<Value, Error> {
        Err(Error::new(ErrorKind::InvalidOperation, message))
    });
    environment.add_filter("tojson", |value: &Value, arguments: Kwargs| to_json(value, &arguments));
    environment.add_template_owned("chat", without_generation_tags(source))?;
    Ok(environment)
}

/// `json.dumps` as `transformers` calls it: no escapes of HTML or of other scripts, a blank after `,` and `:`.
fn to_json(value: &Value, arguments: &Kwargs) -> Result<String, Error> {
    let indent: Option<usize> = arguments.get("indent")?;
    arguments.assert_all_used()?;
    let mut bytes = Vec::new();
    let written = match indent {
        None => value.serialize(&mut Serializer::with_formatter(&mut bytes, Spaced)),
        Some(width) => {
            let width = " ".repeat(width);
            let formatter = PrettyFormatter::with_indent(width.as_bytes());
            value.serialize(&mut Serializer::with_formatter(&mut bytes, formatter))
        }
    };
    let wrong = |error: &dyn std::fmt::Display| Error::new(ErrorKind::InvalidOperation, error.to_string());
    written.map_err(|error| wrong(&error))?;
    String::from_utf8(bytes).map_err(|error| wrong(&error))
}

/// The separators of Python's `json.dumps`.
struct Spaced;

impl Formatter for Spaced {
    fn begin_array_value<W: std::io::Write + ?Sized>(&mut self, writer: &mut W, first: bool) -> std::io::Result<()> {
        if first { Ok(()) } else { writer.write_all(b", ") }
    }

    fn begin_object_key<W: std::io::Write + ?Sized>(&mut self, writer: &mut W, first: bool) -> std::io::Result<()> {
        if first { Ok(()) } else { writer.write_all(b", ") }
    }

    fn begin_object_value<W: std::io::Write + ?Sized>(&mut self, writer: &mut W) -> std::io::Result<()> {
        writer.write_all(b": ")
    }
}

/// The template with `{% generation %}` as a plain scope: which tokens are the model's is told by the rendering itself.
fn without_generation_tags(source: &str) -> String {
    let mut changed = String::with_capacity(source.len());
    let mut rest = source;
    while let Some(begin) = rest.find("{%") {
        let Some(length) = rest[begin..].find("%}") else { break };
        let tag = &rest[begin + 2..begin + length];
        let name = tag.trim_matches(|c: char| c.is_whitespace() || c == '-' || c == '+');
        changed.push_str(&rest[..begin + 2]);
        match name {
            "generation" => changed.push_str(&tag.replace("generation", "with")),
            "endgeneration" => changed.push_str(&tag.replace("endgeneration", "endwith")),
            _ => changed.push_str(tag),
        }
        rest = &rest[begin + length..];
    }
    changed + rest
}

/// A JSON object in a file; an empty one where there is no file.
pub(crate) fn read_json(path: &Path) -> anyhow::Result<serde_json::Map<String, serde_json::Value>> {
    if !path.exists() {
        return Ok(serde_json::Map::new());
    }
    let reading = || format!("reading `{}`", path.display());
    let bytes = fs::read(path).with_context(reading)?;
    serde_json::from_slice(&bytes).with_context(reading)
}

/// The template in the entry `chat_template`: the text itself, or the one named `default`.
fn named(entry: &serde_json::Value) -> anyhow::Result<String> {
    if let Some(text) = entry.as_str() {
        return Ok(text.to_owned());
    }
    let list = entry.as_array().context("`chat_template` is neither a text nor a list of named templates")?;
    let field = |template: &serde_json::Value, name: &str| Some(template.get(name)?.as_str()?.to_owned());
    let names: Vec<String> = list.iter().filter_map(|template| field(template, "name")).collect();
    let default = list.iter().find(|template| template["name"] == "default");
    default.and_then(|template| field(template, "template")).with_context(|| {
        format!("no template of `chat_template` is named `default`; there are `{}`", names.join("`, `"))
    })
}

/// The text of a special token, which is a string or an object with a `content`.
pub(crate) fn content(token: &serde_json::Value) -> Option<String> {
    token.as_str().or_else(|| token.get("content")?.as_str()).map(str::to_owned)
}

/// The special tokens of `tokenizer.json`.
fn special_tokens(folder: &Path) -> anyhow::Result<Vec<String>> {
    #[derive(Deserialize)]
    struct File {
        #[serde(default)]
        added_tokens: Vec<Added>,
    }
    #[derive(Deserialize)]
    struct Added {
        content: String,
        #[serde(default)]
        special: bool,
    }
    let path = folder.join(TOKENIZER_FILE);
    let reading = || format!("reading `{}`", path.display());
    let bytes = fs::read(&path).with_context(reading)?;
    let file: File = serde_json::from_slice(&bytes).with_context(reading)?;
    Ok(file.added_tokens.into_iter().filter(|token| token.special).map(|token| token.content).collect())
}

#[cfg(test)]
mod tests;
