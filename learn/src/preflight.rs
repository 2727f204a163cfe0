//! What is checked before step 0: lengths against limits, targets, ends of sequence, vocabulary, tokenizers; and (`kernels`)
//! that the kernels compute what they should.
//!
//! What would spoil a run is an error here, before an hour of training; what a person should only know is one note.

pub mod kernels;

use std::ops::Range;
use std::path::Path;

use anyhow::{Context as _, bail, ensure};
use pipe::stages::chat::ChatTemplate;
use pipe::stages::model::{NEW_TOKENS_FILE, NewTokensFile};
use pipe::stages::tokens::{TOKENIZER_FOLDER, TokensFolder};
use pipe::tasks::TaskSpec;

use crate::model::ModelConfig;

/// Refuses tokens that were made with another tokenizer, or written by another chat template, than the model's.
pub fn tokenizers(model: &Path, model_digest: &str, tokens: &TokensFolder) -> anyhow::Result<()> {
    ensure!(
        model_digest == tokens.tokenizer_digest,
        "the tokenizer of the model `{}` is not the one that the tokens `{}` were made with (BLAKE3 {} and {}): make \
         the tokens and the model from one tokenizer",
        model.display(),
        tokens.path.display(),
        short(model_digest),
        short(&tokens.tokenizer_digest)
    );
    if tokens.chat { templates(model, &tokens.path.join(TOKENIZER_FOLDER)) } else { Ok(()) }
}

/// Refuses a model with another chat template than the one that wrote the rows: what it is asked after training would be
/// framed otherwise than what it was taught. A model without a template takes that of the rows.
fn templates(model: &Path, tokenizer: &Path) -> anyhow::Result<()> {
    let (Some((own, own_path)), Some((taught, taught_path))) =
        (ChatTemplate::source(model)?, ChatTemplate::source(tokenizer)?)
    else {
        return Ok(());
    };
    let differ = own.lines().zip(taught.lines()).take_while(|(own, taught)| own == taught).count() + 1;
    ensure!(
        own == taught,
        "the chat template of the model in `{}` is not the one that wrote the rows, in `{}`: they differ from line {differ} \
         on; make the tokens and the model from one tokenizer",
        own_path.display(),
        taught_path.display()
    );
    Ok(())
}

/// Refuses rows that cannot be trained on; gives one sentence on those that can.
///
/// Every turn must end with an end of sequence and have no other, unless the prompt is learnt too.
///
/// `model` is the folder of the model, whose new tokens are named where no row has them.
pub fn rows(tokens: &TokensFolder, rows: &[usize], config: &ModelConfig, model: &Path) -> anyhow::Result<String> {
    vocabulary(tokens, rows, config)?;
    let limit = config.max_position_embeddings as usize;
    let (mut shortest, mut longest, mut targets, mut total) = (usize::MAX, 0, 0, 0);
    let (mut untargeted, mut turns) = (0, 0);
    for &row in rows {
        let (ids, mask) = (tokens.row_ids(row), tokens.row_mask(row));
        let name = &tokens.rows[row].instance;
        ensure!(
            ids.len() <= limit,
            "the row `{name}` has {} tokens, the model `max_position_embeddings` {limit}: raise it or make shorter rows",
            ids.len()
        );
        ensure!(mask[0] == 0, "the row `{name}` has its first token as a target, but nothing precedes it");
        let marked = mask.iter().filter(|mask| **mask != 0).count();
        if marked == 0 {
            untargeted += 1;
        }
        let prompt = tokens.prompt_ids(row).len();
        for (turn, span) in turns_of(tokens, row).into_iter().enumerate() {
            let ends = span.clone().filter(|&at| mask[at] != 0 && is_end(config, ids[at])).count();
            let last = ids[span.end - 1];
            let hint = if ends == 0 && tokens.chat {
                format!("; if its last token {last} ends a turn, the model's `eos_token_id` must have it")
            } else {
                String::new()
            };
            ensure!(
                ends == 1 || (ends > 1 && span.start < prompt),
                "the row `{name}` has {ends} end-of-sequence targets in its turn {}, not one: a model trained on it does \
                 not learn to stop{hint}",
                turn + 1
            );
            ensure!(
                is_end(config, last),
                "the turn {} of the row `{name}` goes on behind its end of sequence with the token {last}",
                turn + 1
            );
            turns += 1;
        }
        shortest = shortest.min(ids.len());
        longest = longest.max(ids.len());
        targets += marked;
        total += ids.len();
    }
    ensure!(targets > 0, "no row has a target: there is nothing to learn");
    let mut rest = if turns + untargeted == rows.len() { String::new() } else { format!("; {turns} turns") };
    if untargeted > 0 {
        rest = format!("{rest}; {untargeted} rows have no target");
    }
    Ok(format!(
        "{} rows of {shortest} to {longest} tokens (limit {limit}), {targets} targets among {total} tokens, one end of \
         sequence a turn{rest}; {}",
        rows.len(),
        unseen(tokens, rows, config, model)?
    ))
}

/// The turns of a row, each from its first target to its last.
///
/// Mistakes within a reply may be no targets: then a turn has several runs of them. Mazes alone have such rows, and one turn.
pub fn turns_of(tokens: &TokensFolder, row: usize) -> Vec<Range<usize>> {
    let runs = runs(tokens.row_mask(row));
    match (&tokens.task, &runs[..]) {
        (Some((TaskSpec::Maze(_), _)), [first, .., last]) => std::iter::once(first.start..last.end).collect(),
        _ => runs,
    }
}

/// The runs of targets in a mask: one a reply, where only replies are learnt and they are learnt whole.
pub fn runs(mask: &[u8]) -> Vec<Range<usize>> {
    let mut runs: Vec<Range<usize>> = Vec::new();
    for at in (0..mask.len()).filter(|&at| mask[at] != 0) {
        match runs.last_mut() {
            Some(run) if run.end == at => run.end += 1,
            _ => runs.push(at..at + 1),
        }
    }
    runs
}

/// How many of the model's token ids stand in no row: their vectors are not trained. New tokens among them are named.
fn unseen(tokens: &TokensFolder, rows: &[usize], config: &ModelConfig, model: &Path) -> anyhow::Result<String> {
    let mut seen = vec![false; config.vocab_size as usize];
    for id in rows.iter().flat_map(|&row| tokens.row_ids(row)) {
        seen[*id as usize] = true;
    }
    let missing = seen.iter().filter(|seen| !**seen).count();
    let mut text = format!("{missing} of {} token ids stand in no row", seen.len());
    let new = new_tokens(model)?;
    let untrained: Vec<&str> = new
        .iter()
        .filter(|(_, id)| !seen.get(*id as usize).copied().unwrap_or(false))
        .map(|(token, _)| token.as_str())
        .collect();
    if !untrained.is_empty() {
        let shown = untrained[..untrained.len().min(8)].join("`, `");
        let more = if untrained.len() > 8 { " ..." } else { "" };
        let count = untrained.len();
        text = format!("{text}, {count} new tokens among them, which stay as they were made: `{shown}`{more}");
    }
    Ok(text)
}

/// The tokens that a model had not before, with their ids; none where no file tells of them.
fn new_tokens(model: &Path) -> anyhow::Result<Vec<(String, u32)>> {
    let path = model.join(NEW_TOKENS_FILE);
    if !path.exists() {
        return Ok(Vec::new());
    }
    let reading = || format!("reading `{}`", path.display());
    let bytes = std::fs::read(&path).with_context(reading)?;
    let file: NewTokensFile = serde_json::from_slice(&bytes).with_context(reading)?;
    Ok(file.tokens.into_iter().zip(file.ids).collect())
}

/// Refuses prompts from which `max_new_tokens` would lead past the model's positions; gives one sentence on the others.
pub fn prompts(
    tokens: &TokensFolder,
    rows: &[usize],
    config: &ModelConfig,
    max_new_tokens: u64,
) -> anyhow::Result<String> {
    vocabulary(tokens, rows, config)?;
    ensure!(!config.eos_token_id.is_empty(), "the model names no `eos_token_id`: a completion could never end");
    let limit = config.max_position_embeddings as u64;
    let mut longest = 0;
    for &row in rows {
        let length = tokens.prompt_ids(row).len() as u64;
        ensure!(
            length + max_new_tokens <= limit,
            "the prompt of `{}` has {length} tokens; with `max_new_tokens` {max_new_tokens} it passes the model's \
             `max_position_embeddings` {limit}",
            tokens.rows[row].instance
        );
        ensure!(tokens.data_text(row)?.is_some(), "the row `{}` has no task instance", tokens.rows[row].instance);
        longest = longest.max(length);
    }
    Ok(format!(
        "{} prompts of at most {longest} tokens, completions of at most {max_new_tokens} (limit {limit})",
        rows.len()
    ))
}

fn vocabulary(tokens: &TokensFolder, rows: &[usize], config: &ModelConfig) -> anyhow::Result<()> {
    for &row in rows {
        let outside = tokens.row_ids(row).iter().find(|id| **id < 0 || i64::from(**id) >= config.vocab_size);
        if let Some(id) = outside {
            let name = &tokens.rows[row].instance;
            bail!("the row `{name}` has the token id {id}, but the model's `vocab_size` is {}", config.vocab_size);
        }
    }
    Ok(())
}

fn is_end(config: &ModelConfig, id: i32) -> bool {
    config.eos_token_id.contains(&i64::from(id))
}

fn short(digest: &str) -> &str {
    digest.get(..12).unwrap_or(digest)
}

#[cfg(test)]
mod tests {
    use pipe::stages::tokens::Row;
    use pipe::tasks::FormatSpec;
    use pipe::tasks::maze::MazeSpec;
    use serde_json::json;

    use super::*;

    fn config() -> ModelConfig {
        ModelConfig::parse(json!({
            "model_type": "qwen2", "vocab_size": 10, "hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1,
            "num_attention_heads": 2, "max_position_embeddings": 6, "rms_norm_eps": 1e-6, "eos_token_id": 3
        }))
        .unwrap()
    }

    fn tokens(rows: &[(&[i32], &[u8], i32)]) -> TokensFolder {
        let mut folder = TokensFolder {
            ids: Vec::new(),
            offsets: vec![0],
            mask: Vec::new(),
            prompt_lengths: Vec::new(),
            rows: Vec::new(),
            task: None,
            chat: false,
            tokenizer_digest: "aa".to_owned(),
            path: "tokens".into(),
        };
        for (index, (ids, mask, prompt)) in rows.iter().enumerate() {
            folder.ids.extend(*ids);
            folder.mask.extend(*mask);
            folder.offsets.push(folder.ids.len() as i64);
            folder.prompt_lengths.push(*prompt);
            folder.rows.push(Row::new(&format!("train-{index}"), "train", None, String::new(), Some(&json!({}))));
        }
        folder
    }

    #[test]
    fn rows_that_would_spoil_a_run_are_named() {
        let good = tokens(&[(&[1, 5, 6, 3], &[0, 0, 1, 1], 2), (&[1, 3], &[0, 0], 1)]);
        let note = rows(&good, &[0, 1], &config(), Path::new("m")).unwrap();
        assert!(
            note.contains("2 rows of 2 to 4 tokens (limit 6), 2 targets") && note.contains("1 rows have no"),
            "{note}"
        );
        assert!(note.contains("6 of 10 token ids stand in no row"), "{note}");
        let turns = tokens(&[(&[1, 5, 3, 6, 7, 3], &[0, 1, 1, 0, 1, 1], 1)]);
        let note = rows(&turns, &[0], &config(), Path::new("m")).unwrap();
        assert!(note.contains("one end of sequence a turn; 2 turns;"), "{note}");
        let whole = tokens(&[(&[1, 5, 3, 6, 7, 3], &[0, 1, 1, 1, 1, 1], 4)]);
        assert!(
            rows(&whole, &[0], &config(), Path::new("m")).is_ok(),
            "prompts that are learnt too may have ends of their own"
        );
        let cases: [(&[i32], &[u8], &str); 8] = [
            (&[1, 5, 3, 6, 7, 8], &[0, 1, 1, 0, 1, 1], "0 end-of-sequence targets in its turn 2"),
            (&[1, 5, 5, 6, 7, 3], &[0, 1, 1, 0, 1, 1], "0 end-of-sequence targets in its turn 1"),
            (&[1, 5, 3, 6], &[0, 1, 1, 1], "goes on behind its end of sequence with the token 6"),
            (&[1, 5, 6, 7, 8, 9, 3], &[0, 0, 0, 0, 0, 1, 1], "has 7 tokens"),
            (&[1, 5, 6], &[0, 1, 1], "0 end-of-sequence targets"),
            (&[1, 3, 6, 3], &[0, 1, 1, 1], "2 end-of-sequence targets"),
            (&[1, 10, 3], &[0, 1, 1], "token id 10"),
            (&[1, 5, 3], &[0, 0, 0], "no row has a target"),
        ];
        for (ids, mask, says) in cases {
            let error = rows(&tokens(&[(ids, mask, 1)]), &[0], &config(), Path::new("m")).unwrap_err().to_string();
            assert!(error.contains(says), "{error}");
        }
    }

    #[test]
    fn new_tokens_that_stand_in_no_row_are_named() {
        let folder = tempfile::tempdir().unwrap();
        let tokens = tokens(&[(&[1, 5, 6, 3], &[0, 0, 1, 1], 2)]);
        let new = json!({"ids": [6, 7, 9], "tokens": ["<|a|>", "<|b|>", "<|c|>"], "rows": {"init": "mean"}});
        std::fs::write(folder.path().join(NEW_TOKENS_FILE), new.to_string()).unwrap();
        let note = rows(&tokens, &[0], &config(), folder.path()).unwrap();
        assert!(note.contains("6 of 10 token ids stand in no row, 2 new tokens among them"), "{note}");
        assert!(note.ends_with("`<|b|>`, `<|c|>`"), "{note}");
    }

    #[test]
    fn mistakes_that_are_no_targets_do_not_end_the_turn_of_a_maze() {
        let mazes = |ids: &[i32]| TokensFolder {
            task: Some((TaskSpec::Maze(MazeSpec::new(2, 2)), FormatSpec::default())),
            ..tokens(&[(ids, &[0, 1, 0, 0, 1, 1], 1)])
        };
        let good = mazes(&[1, 5, 6, 7, 8, 3]);
        assert_eq!(turns_of(&good, 0), vec![1..6; 1]);
        let note = rows(&good, &[0], &config(), Path::new("m")).unwrap();
        assert!(note.contains("3 targets among 6 tokens, one end of sequence a turn; "), "{note}");
        assert!(!note.contains("turns"), "{note}");
        for (ids, says) in [
            ([1, 5, 6, 7, 8, 8], "0 end-of-sequence targets in its turn 1"),
            ([1, 5, 3, 7, 8, 8], "0 end-of-sequence targets in its turn 1"),
            ([1, 3, 6, 7, 8, 3], "2 end-of-sequence targets in its turn 1"),
        ] {
            let error = rows(&mazes(&ids), &[0], &config(), Path::new("m")).unwrap_err().to_string();
            assert!(error.contains(says), "{error}");
        }
    }

    #[test]
    fn prompts_leave_room_for_their_completions() {
        let tokens = tokens(&[(&[1, 5, 6, 3], &[0, 0, 1, 1], 2)]);
        assert!(prompts(&tokens, &[0], &config(), 4).unwrap().contains("at most 2 tokens"));
        let error = prompts(&tokens, &[0], &config(), 5).unwrap_err().to_string();
        assert!(error.contains("`max_new_tokens` 5") && error.contains("`train-0`"), "{error}");
    }

    #[test]
    fn another_tokenizer_is_refused() {
        let tokens = tokens(&[(&[1, 3], &[0, 1], 1)]);
        tokenizers(Path::new("m"), "aa", &tokens).unwrap();
        assert!(tokenizers(Path::new("m"), "ab", &tokens).unwrap_err().to_string().contains("one tokenizer"));
    }
}
