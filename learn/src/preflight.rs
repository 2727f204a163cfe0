//! What is checked before step 0: lengths against limits, targets, ends of sequence, vocabulary, tokenizers.
//!
//! What would spoil a run is an error here, before an hour of training; what a person should only know is one note.

use std::path::Path;

use anyhow::{bail, ensure};
use pipe::stages::tokens::TokensFolder;

use crate::model::ModelConfig;

/// Refuses tokens that were made with another tokenizer than the model's.
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
    Ok(())
}

/// Refuses rows that cannot be trained on; gives one sentence on those that can.
pub fn rows(tokens: &TokensFolder, rows: &[usize], config: &ModelConfig) -> anyhow::Result<String> {
    vocabulary(tokens, rows, config)?;
    let limit = config.max_position_embeddings as usize;
    let (mut shortest, mut longest, mut targets, mut total, mut untargeted) = (usize::MAX, 0, 0, 0, 0);
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
        let ends = ids.iter().zip(mask).filter(|(id, mask)| **mask != 0 && is_end(config, **id)).count();
        if marked == 0 {
            untargeted += 1;
        } else {
            ensure!(
                ends == 1,
                "the row `{name}` has {ends} end-of-sequence targets, not one: a model trained on it does not learn to stop"
            );
        }
        shortest = shortest.min(ids.len());
        longest = longest.max(ids.len());
        targets += marked;
        total += ids.len();
    }
    ensure!(targets > 0, "no row has a target: there is nothing to learn");
    let rest = if untargeted == 0 { String::new() } else { format!("; {untargeted} rows have no target") };
    Ok(format!(
        "{} rows of {shortest} to {longest} tokens (limit {limit}), {targets} targets among {total} tokens, one end of \
         sequence a row{rest}",
        rows.len()
    ))
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
        ensure!(tokens.rows[row].data.is_some(), "the row `{}` has no task instance", tokens.rows[row].instance);
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
            folder.rows.push(Row {
                instance: format!("train-{index}"),
                split: "train".to_owned(),
                stratum: None,
                prompt: String::new(),
                data: Some(json!({})),
            });
        }
        folder
    }

    #[test]
    fn rows_that_would_spoil_a_run_are_named() {
        let good = tokens(&[(&[1, 5, 6, 3], &[0, 0, 1, 1], 2), (&[1, 3], &[0, 0], 1)]);
        let note = rows(&good, &[0, 1], &config()).unwrap();
        assert!(
            note.contains("2 rows of 2 to 4 tokens (limit 6), 2 targets") && note.contains("1 rows have no"),
            "{note}"
        );
        let cases: [(&[i32], &[u8], &str); 5] = [
            (&[1, 5, 6, 7, 8, 9, 3], &[0, 0, 0, 0, 0, 1, 1], "has 7 tokens"),
            (&[1, 5, 6], &[0, 1, 1], "0 end-of-sequence targets"),
            (&[1, 3, 6, 3], &[0, 1, 1, 1], "2 end-of-sequence targets"),
            (&[1, 10, 3], &[0, 1, 1], "token id 10"),
            (&[1, 5, 3], &[0, 0, 0], "no row has a target"),
        ];
        for (ids, mask, says) in cases {
            let error = rows(&tokens(&[(ids, mask, 1)]), &[0], &config()).unwrap_err().to_string();
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
