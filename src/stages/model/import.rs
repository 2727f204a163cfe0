//! A checkpoint from a Hugging Face folder, on bytes: copied as it is, or with rows for new tokens.
//!
//! A token that a model has never seen needs a row in the embedding *and* one in the output projection, and both must be
//! declared: rows that stay as a folder happened to have them are noise that no one asked for. Which ids are new is written
//! beside the weights, so that a training can say afterwards whether they have learnt anything.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fs;
use std::io::Read as _;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, bail, ensure};
use half::{bf16, f16};
use safetensors::tensor::TensorView;
use safetensors::{Dtype, SafeTensors};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use crate::random::{normal, rng};
use crate::stages::model::{NewTokens, copy_files, ends};
use crate::stages::tokenizer::{self, TOKENIZER_FILE};

/// The families of decoders that are implemented, as `model_type` names them.
pub const FAMILIES: &[&str] = &["qwen2", "qwen3", "llama"];
/// The file that names the tokens which a model had not before.
pub const NEW_TOKENS_FILE: &str = "new_tokens.json";

const INDEX_FILE: &str = "model.safetensors.index.json";
const EMBEDDING: &str = "model.embed_tokens.weight";
const HEAD: &str = "lm_head.weight";

/// The content of [`NEW_TOKENS_FILE`].
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct NewTokensFile {
    /// The new ids, rising.
    pub ids: Vec<u32>,
    /// Their texts, in the same order.
    pub tokens: Vec<String>,
    /// How their rows began, in the embedding and in the output projection.
    pub rows: NewTokens,
}

/// Whether a file of a source folder belongs to a checkpoint: everything but weights in other forms than safetensors.
pub(super) fn is_wanted(name: &str) -> bool {
    let path = Path::new(name);
    let extension = path.extension().and_then(|extension| extension.to_str()).unwrap_or_default();
    let other = matches!(extension, "bin" | "pt" | "pth" | "h5" | "msgpack" | "onnx" | "gguf" | "ot");
    // A new file of new tokens says what is new to the folder, and an old one what was.
    !other && !name.starts_with('.') && !name.ends_with(".bin.index.json") && name != NEW_TOKENS_FILE
}

fn is_weights(name: &str) -> bool {
    Path::new(name).extension().is_some_and(|extension| extension == "safetensors") || name == INDEX_FILE
}

/// What a checkpoint is made from.
pub(super) struct Import<'a> {
    /// The source folder.
    pub(super) from: &'a Path,
    /// The folder of the tokenizer that takes the place of its own.
    pub(super) tokenizer: Option<&'a Path>,
    /// How new rows begin.
    pub(super) init: Option<NewTokens>,
    /// Decides what they draw.
    pub(super) seed: u64,
}

/// The rows that a model's tables get.
struct Growth {
    /// Rows of the tables afterwards.
    rows: usize,
    /// Ids of tokens that the model had: those whose rows a mean is taken of.
    old: Vec<usize>,
    /// Every row to be written: those of the new tokens, and of ids between them that no token has.
    written: BTreeSet<usize>,
    init: NewTokens,
    seed: u64,
}

impl Import<'_> {
    /// Writes the checkpoint to `folder`; gives one sentence on it.
    pub(super) fn write(&self, folder: &Path) -> anyhow::Result<String> {
        let path = self.from.join("config.json");
        let mut config = read_json(&path)?;
        let model_type = config["model_type"].as_str().unwrap_or_default().to_owned();
        ensure!(
            FAMILIES.contains(&model_type.as_str()),
            "the model type `{model_type}` of `{}` is not implemented: there are `{}`",
            path.display(),
            FAMILIES.join("`, `")
        );
        let rows =
            config["vocab_size"].as_u64().with_context(|| format!("`{}` has no `vocab_size`", path.display()))?;
        let (growth, new) = self.growth(rows as usize)?;
        copy_files(self.from, folder, &|name| is_wanted(name) && !is_weights(name))?;
        if let Some(tokenizer) = self.tokenizer {
            // All of it is replaced, so that no file of the old one stays beside the new.
            for name in TOKENIZER_FILES.iter().map(|name| folder.join(name)).filter(|path| path.exists()) {
                fs::remove_file(&name).with_context(|| format!("cannot remove `{}`", name.display()))?;
            }
            copy_files(tokenizer, folder, &|_| true)?;
        }
        config["vocab_size"] = json!(growth.as_ref().map_or(rows as usize, |growth| growth.rows));
        // The default of both Qwens and of Llama.
        let tied = config["tie_word_embeddings"].as_bool().unwrap_or(false);
        let ids = frame(folder, &mut config)?;
        write_json(&folder.join("config.json"), &config)?;
        copy_weights(self.from, folder, rows as usize, growth.as_ref(), tied)?;
        if let Some(file) = &new {
            write_json(&folder.join(NEW_TOKENS_FILE), &serde_json::to_value(file).context("plain data")?)?;
        }
        let added = new.map_or_else(String::new, |new| format!(", {} new tokens", new.ids.len()));
        Ok(format!("a `{model_type}` of {} tokens{added}; {ids}", config["vocab_size"]))
    }

    /// The rows that the tokenizer asks for beyond those that the model has learnt, and the file that says so.
    fn growth(&self, rows: usize) -> anyhow::Result<(Option<Growth>, Option<NewTokensFile>)> {
        let own = self.from.join(TOKENIZER_FILE).exists().then(|| tokenizer::read(self.from)).transpose()?;
        let Some(folder) = self.tokenizer else {
            let own = own.with_context(|| {
                format!("`{}` has no `{TOKENIZER_FILE}`: give the stage a `tokenizer`", self.from.display())
            })?;
            refuse_overflow(&own.get_vocab(true), rows, self.from)?;
            return Ok((None, None));
        };
        let vocabulary = tokenizer::read(folder)?.get_vocab(true);
        let had: HashMap<String, u32> = match own {
            Some(own) => own.get_vocab(true),
            // Without a tokenizer of its own, every row is taken for learnt.
            None => {
                vocabulary.iter().filter(|(_, id)| (**id as usize) < rows).map(|(t, id)| (t.clone(), *id)).collect()
            }
        };
        for (token, id) in &had {
            let now = vocabulary.get(token);
            ensure!(
                now == Some(id),
                "the tokenizer `{}` does not fit the model `{}`: `{token}` has the id {id} there and {} here; make it with \
                 `from` the same folder",
                folder.display(),
                self.from.display(),
                now.map_or_else(|| "none".to_owned(), u32::to_string)
            );
        }
        let new: BTreeMap<u32, &String> =
            vocabulary.iter().filter(|(token, _)| !had.contains_key(*token)).map(|(token, id)| (*id, token)).collect();
        let Some((&last, _)) = new.last_key_value() else {
            refuse_overflow(&vocabulary, rows, folder)?;
            return Ok((None, None));
        };
        let Some(init) = self.init else {
            bail!(
                "the tokenizer adds {} tokens to those of `{}`, as `{}`: declare how their rows begin, as in \
                 `new_tokens = {{ init = \"mean\" }}`",
                new.len(),
                self.from.display(),
                new.first_key_value().map_or("", |(_, token)| token)
            );
        };
        let grown = rows.max(last as usize + 1);
        let old: BTreeSet<usize> = had.values().map(|id| *id as usize).filter(|id| *id < rows).collect();
        let written = (0..grown).filter(|row| new.contains_key(&(*row as u32)) || (*row >= rows && !old.contains(row)));
        let growth =
            Growth { rows: grown, written: written.collect(), old: old.into_iter().collect(), init, seed: self.seed };
        let (ids, tokens) = new.into_iter().map(|(id, token)| (id, token.clone())).unzip();
        Ok((Some(growth), Some(NewTokensFile { ids, tokens, rows: init })))
    }
}

/// Files that belong to a tokenizer.
const TOKENIZER_FILES: &[&str] = &[
    TOKENIZER_FILE,
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "vocab.txt",
    "tokenizer.model",
    "chat_template.jinja",
    "chat_template.json",
];

fn refuse_overflow(vocabulary: &HashMap<String, u32>, rows: usize, folder: &Path) -> anyhow::Result<()> {
    if let Some((token, id)) = vocabulary.iter().max_by_key(|(_, id)| **id).filter(|(_, id)| **id as usize >= rows) {
        bail!(
            "the tokenizer `{}` does not fit the model: `{token}` has the id {id}, but `vocab_size` is {rows}",
            folder.display()
        );
    }
    Ok(())
}

/// Sets the ids that frame sequences in `config` and `generation_config.json` to those of the tokenizer in `folder`; what
/// ended a sequence before still does. Gives one sentence on them.
fn frame(folder: &Path, config: &mut Value) -> anyhow::Result<String> {
    let path = folder.join("generation_config.json");
    let mut generation = if path.exists() { read_json(&path)? } else { json!({}) };
    let (specials, mut all, wrong) = ends(folder)?;
    for file in [&*config, &generation] {
        let more = match &file["eos_token_id"] {
            Value::Array(ids) => ids.iter().filter_map(Value::as_u64).collect(),
            id => Vec::from_iter(id.as_u64()),
        };
        for id in more {
            if !all.contains(&id) {
                all.push(id);
            }
        }
    }
    let eos = match all.as_slice() {
        [] => Value::Null,
        [one] => json!(one),
        many => json!(many),
    };
    for file in [config, &mut generation] {
        file["eos_token_id"] = eos.clone();
        for (name, id) in [("bos_token_id", specials.begin), ("pad_token_id", specials.pad)] {
            if let Some(id) = id {
                file[name] = json!(id);
            }
        }
    }
    write_json(&path, &generation)?;
    let wrong = wrong.map_or_else(String::new, |wrong| format!("; {wrong}"));
    let ids = if all.is_empty() {
        "no token ends a sequence, so completions will all run to their limit".to_owned()
    } else {
        let all: Vec<String> = all.iter().map(u64::to_string).collect();
        format!("sequences end with the ids {}", all.join(", "))
    };
    Ok(ids + &wrong)
}

/// Copies the weights, file by file, with the rows of `growth` written; a copy of a tied projection is left out then.
/// Tables of other than `rows` rows are refused.
fn copy_weights(from: &Path, to: &Path, rows: usize, growth: Option<&Growth>, tied: bool) -> anyhow::Result<()> {
    let single = from.join("model.safetensors");
    let mut index = None;
    let names: BTreeSet<String> = if single.exists() {
        BTreeSet::from(["model.safetensors".to_owned()])
    } else {
        let path = from.join(INDEX_FILE);
        ensure!(
            path.exists(),
            "`{}` has neither `model.safetensors` nor `{INDEX_FILE}`: save the model as safetensors",
            from.display()
        );
        let read = read_json(&path)?;
        let map = read["weight_map"].as_object();
        let map = map.with_context(|| format!("`{}` has no `weight_map`", path.display()))?;
        let names = map.values().filter_map(Value::as_str).map(str::to_owned).collect();
        index = Some((path, read));
        names
    };
    let mut found = Vec::new();
    let mut change = 0;
    for name in &names {
        let path = from.join(name);
        let reading = || match &index {
            Some((index, _)) => format!("cannot read the shard `{name}` that `{}` names", index.display()),
            None => format!("cannot read `{}`", path.display()),
        };
        let header = header(&path).with_context(reading)?;
        for table in [EMBEDDING, HEAD] {
            let Some(shape) = header.get(table).map(|entry| &entry["shape"]) else { continue };
            ensure!(
                shape[0].as_u64() == Some(rows as u64),
                "the weight `{table}` of `{}` has the shape {shape}, but `vocab_size` of `config.json` is {rows}",
                path.display()
            );
        }
        let Some(growth) = growth else {
            fs::copy(&path, to.join(name)).with_context(reading)?;
            continue;
        };
        let bytes = fs::read(&path).with_context(reading)?;
        let grown = grow(&bytes, growth, tied, &mut found).with_context(|| format!("in `{}`", path.display()))?;
        let written = grown.as_deref().unwrap_or(&bytes);
        change += written.len() as i64 - bytes.len() as i64;
        fs::write(to.join(name), written).with_context(|| format!("cannot write `{name}`"))?;
    }
    if growth.is_some() {
        for name in std::iter::once(EMBEDDING).chain((!tied).then_some(HEAD)) {
            ensure!(found.iter().any(|found| found == name), "`{}` has no weight `{name}`", from.display());
        }
    }
    let Some((_, mut index)) = index else { return Ok(()) };
    if growth.is_some() {
        // Headers are a few bytes of it; the figure is for progress bars.
        if let Some(size) = index["metadata"]["total_size"].as_i64() {
            index["metadata"]["total_size"] = json!(size + change);
        }
        if tied && let Some(map) = index["weight_map"].as_object_mut() {
            map.remove(HEAD);
        }
    }
    write_json(&to.join(INDEX_FILE), &index)
}

/// What a safetensors file says of its tensors, without reading them.
fn header(path: &Path) -> anyhow::Result<Value> {
    let mut file = fs::File::open(path)?;
    let mut length = [0; 8];
    file.read_exact(&mut length).context("no whole safetensors file")?;
    let mut text = Vec::new();
    file.take(u64::from_le_bytes(length)).read_to_end(&mut text)?;
    serde_json::from_slice(&text).context("no whole safetensors file")
}

/// A safetensors file with the rows of `growth` written into the tables that it holds; `None` where it holds none.
fn grow(bytes: &[u8], growth: &Growth, tied: bool, found: &mut Vec<String>) -> anyhow::Result<Option<Vec<u8>>> {
    let file = SafeTensors::deserialize(bytes).context("no whole safetensors file")?;
    let mut tables = BTreeMap::new();
    for name in [EMBEDDING, HEAD] {
        let Ok(table) = file.tensor(name) else { continue };
        found.push(name.to_owned());
        if !(name == HEAD && tied) {
            tables.insert(name, growth.table(name, &table)?);
        }
    }
    if tables.is_empty() && file.tensor(HEAD).is_err() {
        return Ok(None);
    }
    let mut views = Vec::new();
    for (name, view) in file.iter().filter(|(name, _)| !(*name == HEAD && tied)) {
        let view = match tables.get(name) {
            Some(table) => TensorView::new(view.dtype(), vec![growth.rows, view.shape()[1]], table)?,
            None => view,
        };
        views.push((name, view));
    }
    // One entry only: the file's header is written in the order of a hash map.
    let metadata = HashMap::from([("format".to_owned(), "pt".to_owned())]);
    safetensors::serialize(views, Some(metadata)).context("cannot lay the weights out").map(Some)
}

impl Growth {
    /// The bytes of a table `[rows, width]` with the new rows written, in the type that it has.
    fn table(&self, name: &str, table: &TensorView<'_>) -> anyhow::Result<Vec<u8>> {
        let &[rows, width] = table.shape() else { bail!("the weight `{name}` has the shape {:?}", table.shape()) };
        let size = match table.dtype() {
            Dtype::F32 => 4,
            Dtype::BF16 | Dtype::F16 => 2,
            other => bail!("the weight `{name}` has the type {other:?}, not F32, BF16 or F16"),
        };
        let read = |element: &[u8]| match (table.dtype(), element) {
            (Dtype::BF16, &[a, b]) => bf16::from_le_bytes([a, b]).to_f64(),
            (Dtype::F16, &[a, b]) => f16::from_le_bytes([a, b]).to_f64(),
            (_, &[a, b, c, d]) => f64::from(f32::from_le_bytes([a, b, c, d])),
            _ => f64::NAN,
        };
        let write = |value: f64, bytes: &mut Vec<u8>| match table.dtype() {
            Dtype::BF16 => bytes.extend(bf16::from_f64(value).to_le_bytes()),
            Dtype::F16 => bytes.extend(f16::from_f64(value).to_le_bytes()),
            _ => bytes.extend((value as f32).to_le_bytes()),
        };
        let mut centre = vec![0.0; width];
        if matches!(self.init, NewTokens::Mean { .. }) {
            let learnt: Vec<usize> = self.old.iter().copied().filter(|row| *row < rows).collect();
            ensure!(!learnt.is_empty(), "no row of `{name}` belongs to a token, so there is no mean");
            for &row in &learnt {
                let row = &table.data()[row * width * size..(row + 1) * width * size];
                for (sum, element) in centre.iter_mut().zip(row.chunks(size)) {
                    *sum += read(element);
                }
            }
            for sum in &mut centre {
                *sum /= learnt.len() as f64;
            }
        }
        let (NewTokens::Mean { std } | NewTokens::Normal { std }) = self.init;
        let mut bytes = Vec::with_capacity(self.rows * width * size);
        for row in 0..self.rows {
            if !self.written.contains(&row) {
                bytes.extend_from_slice(&table.data()[row * width * size..(row + 1) * width * size]);
                continue;
            }
            // Keyed by the id, so that a row does not depend on how many are added.
            let mut stream = rng(&format!("new token rows {name}"), &[self.seed, row as u64]);
            for centre in &centre {
                let noise = if std > 0.0 { normal(&mut stream) * std } else { 0.0 };
                write(centre + noise, &mut bytes);
            }
        }
        Ok(bytes)
    }
}

fn read_json(path: &PathBuf) -> anyhow::Result<Value> {
    let text = fs::read_to_string(path).with_context(|| format!("cannot read `{}`", path.display()))?;
    serde_json::from_str(&text).with_context(|| format!("`{}` is no JSON", path.display()))
}

fn write_json(path: &Path, value: &Value) -> anyhow::Result<()> {
    let text = serde_json::to_string_pretty(value).context("a configuration is plain data")?;
    fs::write(path, text + "\n").with_context(|| format!("cannot write `{}`", path.display()))
}
