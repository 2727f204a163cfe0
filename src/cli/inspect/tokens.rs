//! Tokens: a row token by token, and which of them are targets of the loss; and the vocabulary of a tokenizer.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::path::Path;

use anyhow::{anyhow, ensure};
use serde_json::{Value, json};
use tokenizers::Tokenizer;

use super::{Look, Seen, more};
use crate::cli::render;
use crate::cli::ui::Look as Ink;
use crate::stages::tokens::{TOKENIZER_FOLDER, TokensFolder};

pub(super) fn inspect(folder: &Path, look: &Look<'_>) -> anyhow::Result<Seen> {
    let tokens = TokensFolder::open(folder)?;
    let tokenizer = open(&folder.join(TOKENIZER_FOLDER))?;
    let mut splits: BTreeMap<&str, [usize; 4]> = BTreeMap::new();
    for (row, about) in tokens.rows.iter().enumerate() {
        let [rows, all, targets, longest] = splits.entry(&about.split).or_default();
        let length = tokens.row_ids(row).len();
        *rows += 1;
        *all += length;
        *targets += learnt(tokens.row_mask(row));
        *longest = (*longest).max(length);
    }
    let count = |count: usize| render::count(count as u64);
    let lines = splits
        .iter()
        .map(|(name, counts)| [vec![(*name).to_owned()], counts.iter().map(|one| count(*one)).collect()].concat());
    let mut text =
        render::columns(&["split", "rows", "tokens", "targets", "longest"], &[1, 2, 3, 4], lines.collect(), None);
    if let Some((task, format)) = &tokens.task {
        let _ =
            writeln!(text, "\ntask    {}\nformat  {}", serde_json::to_string(task)?, serde_json::to_string(format)?);
    }
    let of_split: Vec<usize> = match &look.args.split {
        Some(split) => tokens.split(split)?,
        None => (0..tokens.rows.len()).collect(),
    };
    let number = look.args.row.unwrap_or(0);
    ensure!(number < of_split.len(), "there is no row {number}: there are {}", of_split.len());
    let row = of_split[number];
    let about = &tokens.rows[row];
    let (ids, mask) = (tokens.row_ids(row), tokens.row_mask(row));
    let names: Vec<String> = ids.iter().map(|id| name(&tokenizer, *id)).collect();
    let _ = writeln!(
        text,
        "\nrow {number}: {} of {}, {} tokens, {} of them targets",
        about.instance,
        about.split,
        count(ids.len()),
        count(learnt(mask))
    );
    text += &masked(&names, mask, look.width, look.color);
    let splits: Vec<Value> = splits
        .iter()
        .map(|(name, [rows, all, targets, longest])| {
            json!({"split": name, "rows": rows, "tokens": all, "targets": targets, "longest": longest})
        })
        .collect();
    let task = tokens.task.as_ref().map(|(task, format)| json!({"task": task, "format": format}));
    let row = json!({
        "number": number,
        "instance": about.instance,
        "split": *about.split,
        "stratum": about.stratum.as_deref(),
        "ids": ids,
        "tokens": names,
        "mask": mask,
    });
    Ok(Seen { value: json!({"splits": splits, "task": task, "chat": tokens.chat, "row": row}), text })
}

/// Targets in a mask.
fn learnt(mask: &[u8]) -> usize {
    mask.iter().map(|mask| usize::from(*mask)).sum()
}

/// Tokens in stretches of the same kind, each with the place of its first token: those that are read, and those that are
/// learnt.
fn masked(names: &[String], mask: &[u8], width: usize, color: bool) -> String {
    const HEAD: usize = 15;
    let mut text = String::new();
    let mut begin = 0;
    for stretch in mask.chunk_by(|one, other| one == other) {
        let end = begin + stretch.len();
        let is_target = stretch[0] == 1;
        let (word, ink) = if is_target { ("target", Ink::Green) } else { ("read", Ink::Dim) };
        let mut line = format!("{begin:>6}  {word:<7}");
        let mut used = 0;
        for name in &names[begin..end] {
            let length = name.chars().count();
            if used > 0 && HEAD + used + 1 + length > width {
                text += line.trim_end();
                text.push('\n');
                line = " ".repeat(HEAD);
                used = 0;
            }
            let gap = if used == 0 { "" } else { " " };
            let _ = write!(line, "{gap}{}", ink.on(name, color));
            used += gap.len() + length;
        }
        text += line.trim_end();
        text.push('\n');
        begin = end;
    }
    text
}

pub(super) fn vocabulary(folder: &Path, look: &Look<'_>) -> anyhow::Result<Seen> {
    let tokenizer = open(folder)?;
    let size = tokenizer.get_vocab_size(true);
    let special = |id: u32| tokenizer.get_added_tokens_decoder().get(&id).is_some_and(|token| token.special);
    let first = look.args.row.unwrap_or(0);
    let shown: Vec<u32> = (0..size as u32).skip(first).take(look.args.count).collect();
    let rows = shown.iter().map(|id| {
        let mark = if special(*id) { "special" } else { "" };
        vec![id.to_string(), name(&tokenizer, *id as i32), mark.to_owned()]
    });
    let mut text = format!("{} tokens\n\n", render::count(size as u64));
    text += &render::columns(&["id", "token", ""], &[0], rows.collect(), None);
    text += &more(size, first + shown.len());
    let all: Vec<Value> = (0..size as u32)
        .map(|id| json!({"id": id, "token": tokenizer.id_to_token(id), "special": special(id)}))
        .collect();
    Ok(Seen { value: json!({"size": size, "tokens": all}), text })
}

fn open(folder: &Path) -> anyhow::Result<Tokenizer> {
    let path = folder.join("tokenizer.json");
    Tokenizer::from_file(&path).map_err(|error| anyhow!("cannot read `{}`: {error}", path.display()))
}

/// A token as it is written, with what cannot be seen made visible.
fn name(tokenizer: &Tokenizer, id: i32) -> String {
    let token = u32::try_from(id).ok().and_then(|id| tokenizer.id_to_token(id));
    token.map_or_else(|| format!("<id {id}>"), |token| token.replace('\n', "⏎").replace(' ', "␣"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn targets_stand_apart_from_what_is_read() {
        let names: Vec<String> =
            ["<bos>", "2-2", "up", "<think>", "up", "</think>", "<eos>", "x"].map(str::to_owned).into();
        let mask = [0, 0, 0, 1, 1, 1, 1, 0];
        assert_eq!(
            masked(&names, &mask, 34, false),
            "     0  read   <bos> 2-2 up\n     3  target <think> up </think>\n               <eos>\n     7  read   x\n"
        );
        assert!(masked(&names, &mask, 80, true).contains("\x1b[32mup\x1b[0m"));
    }
}
