//! `pipe score`: the log-probability of every token of given rows under a model, each given the tokens before it.
//!
//! Rows are read and judged before anything is computed: every bad row is told with its file and line, and then nothing is
//! written. Nothing is sampled and nothing trained; what a row scores does not depend on the rows beside it beyond the last
//! bits of a sum.

use std::fmt;
use std::io::Write;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, bail, ensure};
use serde_json::{Value, json};
use tch::{Device, Tensor, no_grad};

use crate::codec::Codec;
use crate::loss::token_logprobs;
use crate::memory;
use crate::model::{Layout, ModelConfig, Transformer};

/// Bad rows that are told of one file; the others are counted.
const SHOWN: usize = 20;
/// Logits at once, in elements: 256 MiB of them.
const LOGITS: i64 = 1 << 26;

/// A row to score.
#[derive(Clone, Debug, PartialEq)]
pub struct Row {
    /// The row's own name, given back as it is.
    pub id: Option<Value>,
    /// Token ids, one at least.
    pub ids: Vec<i64>,
    /// The line of the file that it stands on, from 1.
    pub line: usize,
}

/// What is wrong with the rows of a file, each with its line.
#[derive(Debug)]
pub struct BadRows {
    path: PathBuf,
    found: Vec<(usize, String)>,
}

impl fmt::Display for BadRows {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, (line, what)) in self.found.iter().take(SHOWN).enumerate() {
            let separator = if index == 0 { "" } else { "\nerror: " };
            write!(f, "{separator}{what}\n  --> {}:{line}", self.path.display())?;
        }
        match self.found.len().saturating_sub(SHOWN) {
            0 => Ok(()),
            more => write!(f, "\nand {more} more bad rows"),
        }
    }
}

impl std::error::Error for BadRows {}

/// Reads the rows of the JSON lines in `path` for the model in `folder`; empty lines are left out.
///
/// A row is `{"ids": [...]}` or `{"text": "..."}`, and may have an `id`. Texts are turned into ids as `transformers` does it,
/// with what the tokenizer adds by itself.
pub fn read_rows(path: &Path, folder: &Path, config: &ModelConfig) -> Result<Vec<Row>> {
    let text = std::fs::read_to_string(path).with_context(|| format!("cannot read `{}`", path.display()))?;
    // Opened when the first text asks for it: rows of ids need no tokenizer.
    let mut codec = None;
    let (mut rows, mut found) = (Vec::new(), Vec::new());
    for (index, line) in text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty()) {
        let row = serde_json::from_str(line).map_err(|error| format!("the row is no JSON: {error}"));
        let row = match row.and_then(|row: Value| Asked::of(&row).map(|asked| (row["id"].clone(), asked))) {
            Ok((id, Asked::Ids(ids))) => Ok((id, ids)),
            Ok((id, Asked::Text(text))) => {
                let codec = match &mut codec {
                    Some(codec) => codec,
                    empty => empty.insert(Codec::open(folder)?),
                };
                codec.encode_framed(&text).map(|ids| (id, ids)).map_err(|error| format!("{error:#}"))
            }
            Err(what) => Err(what),
        };
        match row.and_then(|(id, ids)| fits(&ids, config).map(|()| (id, ids))) {
            Ok((id, ids)) => rows.push(Row { id: Some(id).filter(|id| !id.is_null()), ids, line: index + 1 }),
            Err(what) => found.push((index + 1, what)),
        }
    }
    ensure!(found.is_empty(), BadRows { path: path.to_owned(), found });
    Ok(rows)
}

/// What a row holds.
enum Asked {
    Ids(Vec<i64>),
    Text(String),
}

impl Asked {
    fn of(row: &Value) -> Result<Self, String> {
        if !row.is_object() {
            return Err(r#"the row is no object: expected `{"ids": [...]}` or `{"text": "..."}`"#.to_owned());
        }
        match (&row["ids"], &row["text"]) {
            (Value::Array(ids), Value::Null) => {
                let id =
                    |value: &Value| value.as_i64().ok_or_else(|| format!("`ids` has {value}, which is no token id"));
                ids.iter().map(id).collect::<Result<_, _>>().map(Self::Ids)
            }
            (Value::Null, Value::String(text)) => Ok(Self::Text(text.clone())),
            (Value::Null, Value::Null) => Err("the row has neither `ids` nor `text`".to_owned()),
            (Value::Null, text) => Err(format!("`text` is {text}, which is no text")),
            (ids, Value::Null) => Err(format!("`ids` is {ids}, which is no list of token ids")),
            _ => Err("the row has both `ids` and `text`: give one".to_owned()),
        }
    }
}

/// Whether a model can read a row.
fn fits(ids: &[i64], config: &ModelConfig) -> Result<(), String> {
    if ids.is_empty() {
        return Err("the row has no token".to_owned());
    }
    if let Some(id) = ids.iter().find(|id| !(0..config.vocab_size).contains(*id)) {
        return Err(format!("the row has the token id {id}, but the model's `vocab_size` is {}", config.vocab_size));
    }
    let (length, limit) = (ids.len(), config.max_position_embeddings);
    if length as i64 > limit {
        return Err(format!("the row has {length} tokens, the model `max_position_embeddings` {limit}"));
    }
    Ok(())
}

/// The log-probability of every token but the first of each row, in the order of `rows`; `batch_size` rows at a time.
pub fn score(model: &Transformer, rows: &[Row], batch_size: usize) -> Result<Vec<Vec<f32>>> {
    memory::explaining(|| {
        memory::remember(format!("{batch_size} rows were scored at a time; lower `--batch-size`"));
        score_batches(model, rows, batch_size)
    })
}

fn score_batches(model: &Transformer, rows: &[Row], batch_size: usize) -> Result<Vec<Vec<f32>>> {
    let mut order: Vec<usize> = (0..rows.len()).collect();
    // Neighbours of like length share a batch with little padding; the longest come first, so that what does not fit into
    // memory fails at once.
    order.sort_by_key(|&row| (std::cmp::Reverse(rows[row].ids.len()), row));
    let mut scores = vec![Vec::new(); rows.len()];
    for batch in order.chunks(batch_size.max(1)) {
        let ids: Vec<&[i64]> = batch.iter().map(|&row| rows[row].ids.as_slice()).collect();
        for (&row, logprobs) in batch.iter().zip(no_grad(|| score_batch(model, &ids))?) {
            if let Some(place) = logprobs.iter().position(|value| !value.is_finite()) {
                let (line, value) = (rows[row].line, logprobs[place]);
                bail!("the log-probability of token {} of the row on line {line} is {value}", place + 1);
            }
            scores[row] = logprobs;
        }
    }
    Ok(scores)
}

fn score_batch(model: &Transformer, rows: &[&[i64]]) -> Result<Vec<Vec<f32>>> {
    let layout = Layout::rows(rows.iter().map(|row| row.len()), model.device());
    let (mut positions, mut targets) = (Vec::new(), Vec::new());
    for (index, row) in rows.iter().enumerate() {
        let first = layout.first(index);
        positions.extend(first..first + row.len() as i64 - 1);
        targets.extend(&row[1..]);
    }
    let tensor = |values: &[i64]| Tensor::from_slice(values).to_device(model.device());
    let hidden = model.hidden(&tensor(&rows.concat()), &layout);
    // A row of a single token has nothing to score.
    let mut all = Vec::with_capacity(targets.len());
    let chunk = (LOGITS / model.config().vocab_size).max(1) as usize;
    for (positions, targets) in positions.chunks(chunk).zip(targets.chunks(chunk)) {
        let logits = model.logits(&hidden.index_select(0, &tensor(positions)));
        let logprobs = token_logprobs(&logits, &tensor(targets), 1.0).to_device(Device::Cpu);
        all.extend(Vec::<f32>::try_from(&logprobs).context("taking log-probabilities out")?);
    }
    let mut rest = all.as_slice();
    Ok(rows
        .iter()
        .map(|row| {
            let (own, behind) = rest.split_at(row.len() - 1);
            rest = behind;
            own.to_vec()
        })
        .collect())
}

/// Writes one JSON line a row: its `id` if it has one, `ids`, and `logprobs`, the first of which is null.
pub fn write_rows(rows: &[Row], scores: &[Vec<f32>], to: &mut impl Write) -> Result<()> {
    for (row, logprobs) in rows.iter().zip(scores) {
        let logprobs: Vec<Value> = std::iter::once(Value::Null).chain(logprobs.iter().map(|&one| json!(one))).collect();
        let mut line = json!({"ids": row.ids, "logprobs": logprobs});
        if let Some(id) = &row.id {
            line["id"] = id.clone();
        }
        serde_json::to_writer(&mut *to, &line).context("writing scores")?;
        to.write_all(b"\n").context("writing scores")?;
    }
    to.flush().context("writing scores")
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::sandbox;

    fn rows(lengths: &[usize]) -> Vec<Row> {
        let ids = |row: usize, length: usize| (0..length).map(|place| ((row * 5 + place * 7) % 13) as i64).collect();
        lengths
            .iter()
            .enumerate()
            .map(|(row, &length)| Row { id: None, ids: ids(row, length), line: row + 1 })
            .collect()
    }

    #[test]
    fn scores_are_those_of_each_row_alone_in_the_order_of_rows() {
        for model in sandbox::families() {
            let rows = rows(&[3, 9, 1, 6, 9, 2]);
            let scores = score(&model, &rows, 4).expect("scores");
            for (row, scores) in rows.iter().zip(&scores) {
                assert_eq!(scores.len() + 1, row.ids.len());
                let logprobs = no_grad(|| {
                    let hidden = sandbox::hidden(&model, &Tensor::from_slice(&row.ids).unsqueeze(0)).flatten(0, 1);
                    model.logits(&hidden).log_softmax(-1, tch::Kind::Float)
                });
                for (place, score) in scores.iter().enumerate() {
                    let alone = logprobs.double_value(&[place as i64, row.ids[place + 1]]);
                    assert!((f64::from(*score) - alone).abs() < 1e-5, "{score} against {alone}");
                }
            }
        }
    }

    #[test]
    fn every_bad_row_is_told_with_its_line() {
        let (folder, model) = sandbox::model(&json!({}));
        let path = folder.path().join("rows.jsonl");
        let lines = [
            r#"{"ids": [1, 2, 3], "id": "a"}"#,
            "",
            r#"{"ids": [1, 99]}"#,
            r#"{"ids": [1, 2.5]}"#,
            r#"{"ids": []}"#,
            r#"{"idz": [1]}"#,
            r#"{"ids": [1], "text": "x"}"#,
            "[1]",
            "{",
        ];
        std::fs::write(&path, lines.join("\n")).expect("written");
        let told = read_rows(&path, folder.path(), model.config()).expect_err("bad rows").to_string();
        for (line, what) in [
            (3, "token id 99, but the model's `vocab_size` is 13"),
            (4, "`ids` has 2.5"),
            (5, "no token"),
            (6, "neither `ids` nor `text`"),
            (7, "both `ids` and `text`"),
            (8, "no object"),
            (9, "no JSON"),
        ] {
            let place = format!("rows.jsonl:{line}");
            let at = told.find(&place).unwrap_or_else(|| panic!("{place} is not told: {told}"));
            assert!(told[..at].rsplit("error: ").next().is_some_and(|said| said.contains(what)), "{what}: {told}");
        }
        assert_eq!(told.matches("-->").count(), 7, "{told}");
        std::fs::write(&path, format!("{}\n\n", lines[0])).expect("written");
        let rows = read_rows(&path, folder.path(), model.config()).expect("a row");
        assert_eq!(rows, [Row { id: Some(json!("a")), ids: vec![1, 2, 3], line: 1 }]);
        let long = format!(r#"{{"ids": {:?}}}"#, vec![1; 65]);
        std::fs::write(&path, long).expect("written");
        let told = read_rows(&path, folder.path(), model.config()).expect_err("too long").to_string();
        assert!(told.contains("65 tokens, the model `max_position_embeddings` 64"), "{told}");
    }

    #[test]
    fn a_line_says_what_was_scored() {
        let rows = [Row { id: Some(json!(7)), ids: vec![4, 5], line: 1 }, Row { id: None, ids: vec![4], line: 2 }];
        let mut written = Vec::new();
        write_rows(&rows, &[vec![-0.5], vec![]], &mut written).expect("written");
        let text = String::from_utf8(written).expect("text");
        let lines: Vec<Value> = text.lines().map(|line| serde_json::from_str(line).expect("JSON")).collect();
        assert_eq!(lines[0], json!({"id": 7, "ids": [4, 5], "logprobs": [null, -0.5]}));
        assert_eq!(lines[1], json!({"ids": [4], "logprobs": [null]}));
    }
}
