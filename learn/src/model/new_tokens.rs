//! The audit of new tokens after a training: a row that was used and has not moved is a row that was never trained.
//!
//! A `model` stage writes which tokens are new (`new_tokens.json`). A training notes which of them it reads and which it
//! asks for; at its end the rows of the embedding and of the output projection are compared with those that it began with.
//! What the training never met stays in the file of its checkpoints, for a training after it.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

use anyhow::{Context as _, Result, bail};
use pipe::stages::model::{NEW_TOKENS_FILE, NewTokensFile};
use serde::{Deserialize, Serialize};
use tch::Tensor;

use crate::model::{Transformer, folder};

/// Tokens named in a message, at most.
const SHOWN: usize = 5;
/// Rows of an output projection that differ by no more than this, beyond their length, have not moved: weight decay
/// shortens every row alike, with rounding.
const STILL: f64 = 1e-6;
const EMBEDDING: &str = "model.embed_tokens.weight";
const HEAD: &str = "lm_head.weight";

/// The new tokens that a training has met.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Occurred {
    /// Those to look for.
    #[serde(skip)]
    watched: BTreeSet<i64>,
    /// Those that a target was predicted from: their rows of the embedding have had a gradient.
    inputs: BTreeSet<i64>,
    /// Those that were targets: their rows of the output projection have had one.
    targets: BTreeSet<i64>,
}

impl Occurred {
    /// Looks for the new tokens of the model in `folder` from now on.
    pub fn watch(&mut self, folder: &Path) -> Result<()> {
        self.watched = read(folder)?.map_or_else(BTreeSet::new, |file| file.ids.into_iter().map(i64::from).collect());
        Ok(())
    }

    /// Whether none has been met.
    pub fn is_empty(&self) -> bool {
        self.inputs.is_empty() && self.targets.is_empty()
    }

    /// Notes a row that was trained on; `mask` is 1 at its targets and as long as `ids`.
    pub fn note(&mut self, ids: &[i64], mask: &[u8]) {
        if self.watched.is_empty() {
            return;
        }
        let last = mask.iter().rposition(|mask| *mask != 0).unwrap_or(0);
        self.inputs.extend(ids[..last].iter().filter(|id| self.watched.contains(id)));
        let targets = ids.iter().zip(mask).filter(|(_, mask)| **mask != 0).map(|(id, _)| id);
        self.targets.extend(targets.filter(|id| self.watched.contains(id)));
    }
}

/// What an audit has found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Audit {
    /// New tokens that occurred; every row of theirs that was used has moved.
    pub moved: usize,
    /// New tokens that never occurred: their rows are as they began, or pushed about by other targets.
    pub unseen: Vec<String>,
}

/// Compares the new rows of `after` with those of the folder `before`; a row that was used and has not moved is an error.
///
/// `None` where the folder has no new tokens.
pub fn audit(before: &Path, after: &Transformer, occurred: &Occurred) -> Result<Option<Audit>> {
    let Some(file) = read(before)? else { return Ok(None) };
    let tied = after.config().tie_word_embeddings;
    // A tied row is read and asked for through one matrix.
    let mut tables = vec![(EMBEDDING, "embedding", &occurred.inputs)];
    tables.push((if tied { EMBEDDING } else { HEAD }, "output projection", &occurred.targets));
    let merged = after.merged();
    for (name, called, used) in tables {
        let used: Vec<i64> = used.iter().copied().collect();
        if used.is_empty() {
            continue;
        }
        let now = merged.iter().find(|(own, _)| own == name).map(|(_, tensor)| tensor);
        let now = now.with_context(|| format!("the model has no weight `{name}`"))?;
        let rows = |table: &Tensor| -> Result<Vec<Vec<f64>>> {
            let rows = table.index_select(0, &Tensor::from_slice(&used).to_device(table.device()));
            Ok(Vec::<Vec<f64>>::try_from(&rows.to_kind(tch::Kind::Double).to_device(tch::Device::Cpu))?)
        };
        let (then, now) = (rows(&folder::read_one(before, name)?)?, rows(now)?);
        let still: Vec<i64> = used
            .iter()
            .zip(then.iter().zip(&now))
            .filter(|(_, (one, two))| is_still(one, two))
            .map(|(id, _)| *id)
            .collect();
        if !still.is_empty() {
            let text = |id: &i64| {
                let place = file.ids.iter().position(|own| i64::from(*own) == *id);
                format!("`{}` ({id})", place.map_or("", |place| &file.tokens[place]))
            };
            let shown: Vec<String> = still.iter().take(SHOWN).map(text).collect();
            bail!(
                "{} new tokens occurred in training, but their rows of the {called} (`{name}`) are as they began: {}; \
                 they were never trained",
                still.len(),
                shown.join(", ")
            );
        }
    }
    let seen = |id: &u32| occurred.inputs.contains(&i64::from(*id)) || occurred.targets.contains(&i64::from(*id));
    let unseen: Vec<String> =
        file.ids.iter().zip(&file.tokens).filter(|(id, _)| !seen(id)).map(|(_, token)| token.clone()).collect();
    Ok(Some(Audit { moved: file.ids.len() - unseen.len(), unseen }))
}

impl std::fmt::Display for Audit {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "new tokens: {} occurred and moved", self.moved)?;
        if !self.unseen.is_empty() {
            let shown: Vec<&str> = self.unseen.iter().take(SHOWN).map(String::as_str).collect();
            write!(f, ", {} never occurred, as `{}`", self.unseen.len(), shown.join("`, `"))?;
        }
        Ok(())
    }
}

/// Leaves in the file of `folder`, a checkpoint that was trained, only the new tokens that did not occur.
pub fn carry(folder: &Path, occurred: &Occurred) -> Result<()> {
    let Some(file) = read(folder)? else { return Ok(()) };
    let path = folder.join(NEW_TOKENS_FILE);
    let seen = |id: u32| occurred.inputs.contains(&i64::from(id)) || occurred.targets.contains(&i64::from(id));
    let (ids, tokens): (Vec<u32>, Vec<String>) =
        file.ids.into_iter().zip(file.tokens).filter(|(id, _)| !seen(*id)).unzip();
    if ids.is_empty() {
        return fs::remove_file(&path).with_context(|| format!("cannot remove `{}`", path.display()));
    }
    let left = NewTokensFile { ids, tokens, ..file };
    let text = serde_json::to_string_pretty(&left).context("plain data")?;
    fs::write(&path, text + "\n").with_context(|| format!("cannot write `{}`", path.display()))
}

/// Refuses a model whose embedding stays frozen while rows of `rows` have new tokens; gives one sentence on new tokens that
/// they do not have, which may stay as they are.
pub fn refuse<'a>(folder: &Path, rows: impl Iterator<Item = &'a [i32]>) -> Result<Option<String>> {
    let Some(file) = read(folder)? else { return Ok(None) };
    let new: BTreeSet<u32> = file.ids.iter().copied().collect();
    let met: BTreeSet<u32> = rows.flatten().map(|id| *id as u32).filter(|id| new.contains(id)).collect();
    let shown = |shown: &mut dyn Iterator<Item = &String>| {
        let texts: Vec<&str> = shown.take(SHOWN).map(String::as_str).collect();
        texts.join("`, `")
    };
    if !met.is_empty() {
        let mut texts = file.ids.iter().zip(&file.tokens).filter(|(id, _)| met.contains(id)).map(|(_, token)| token);
        bail!(
            "{} tokens of the rows, as `{}`, are new to the model `{}`: their rows of its tables were never trained, and \
             adapters leave them so; train the model without `lora` first",
            met.len(),
            shown(&mut texts),
            folder.display()
        );
    }
    Ok(Some(format!(
        "{} new tokens of the model, as `{}`, were never trained and stay so: the rows do not have them",
        file.ids.len(),
        shown(&mut file.tokens.iter())
    )))
}

fn read(folder: &Path) -> Result<Option<NewTokensFile>> {
    let path = folder.join(NEW_TOKENS_FILE);
    if !path.exists() {
        return Ok(None);
    }
    let text = fs::read_to_string(&path).with_context(|| format!("cannot read `{}`", path.display()))?;
    let file: NewTokensFile =
        serde_json::from_str(&text).with_context(|| format!("`{}` names no new tokens", path.display()))?;
    Ok(Some(file).filter(|file| !file.ids.is_empty()))
}

/// Whether `now` is `then`, but for its length.
fn is_still(then: &[f64], now: &[f64]) -> bool {
    let dot = |one: &[f64], two: &[f64]| one.iter().zip(two).map(|(a, b)| a * b).sum::<f64>();
    let length = dot(then, then);
    if length == 0.0 {
        return dot(now, now) == 0.0;
    }
    let scale = dot(then, now) / length;
    // Decay shortens by a little; a row that has grown was trained.
    let beside: f64 = then.iter().zip(now).map(|(a, b)| (b - scale * a).powi(2)).sum();
    scale <= 1.0 + STILL && beside.sqrt() <= STILL * length.sqrt()
}

#[cfg(test)]
mod tests {
    use serde_json::json;
    use tch::{Device, no_grad};

    use super::*;
    use crate::sandbox;

    /// An untied model whose ids 10 to 12 are new, and its folder.
    fn model() -> (tempfile::TempDir, Transformer) {
        let folder = tempfile::tempdir().expect("a folder");
        sandbox::write(folder.path(), &json!({"tie_word_embeddings": false}));
        let file =
            json!({"ids": [10, 11, 12], "tokens": ["<up>", "<down>", "<left>"], "rows": {"init": "mean", "std": 0.0}});
        fs::write(folder.path().join(NEW_TOKENS_FILE), file.to_string()).expect("written");
        let model = Transformer::load(folder.path(), Device::Cpu).expect("a model");
        (folder, model)
    }

    fn occurred(folder: &Path) -> Occurred {
        let mut occurred = Occurred::default();
        occurred.watch(folder).expect("new tokens");
        // 11 ends the row: it is asked for, and nothing is predicted from it.
        occurred.note(&[1, 10, 5, 11], &[0, 0, 1, 1]);
        occurred
    }

    fn push(model: &Transformer, name: &str, row: i64) {
        let leaf = model.weights().leaf(name);
        no_grad(|| {
            let _ = leaf.get(row).narrow(0, 0, 1).g_add_scalar_(1e-4);
        });
    }

    #[test]
    fn what_was_used_must_have_moved() {
        let (folder, model) = model();
        let occurred = occurred(folder.path());
        let refused = |model: &Transformer| format!("{:#}", audit(folder.path(), model, &occurred).expect_err("still"));
        assert!(
            refused(&model).contains("`<up>` (10)") && refused(&model).contains("embedding"),
            "{}",
            refused(&model)
        );
        push(&model, EMBEDDING, 10);
        // The head as it was shipped, or only decayed.
        assert!(refused(&model).contains("`<down>` (11)") && refused(&model).contains(HEAD), "{}", refused(&model));
        no_grad(|| {
            let _ = model.weights().leaf(HEAD).g_mul_scalar_(0.97);
        });
        assert!(refused(&model).contains("`<down>` (11)"), "{}", refused(&model));
        push(&model, HEAD, 11);
        let found = audit(folder.path(), &model, &occurred).expect("all moved").expect("new tokens");
        assert_eq!(found, Audit { moved: 2, unseen: vec!["<left>".to_owned()] });
        assert_eq!(found.to_string(), "new tokens: 2 occurred and moved, 1 never occurred, as `<left>`");
    }

    #[test]
    fn adapters_are_refused_only_where_a_new_token_occurs() {
        let (folder, _model) = model();
        let asked = |rows: &[&[i32]]| refuse(folder.path(), rows.iter().copied());
        let error = asked(&[&[1, 2], &[5, 11, 3]]).expect_err("adapters train no row").to_string();
        assert!(error.contains("1 tokens of the rows, as `<down>`") && error.contains("without `lora`"), "{error}");
        let note = asked(&[&[1, 2], &[5, 3]]).expect("no new token occurs").expect("a note");
        assert!(note.contains("3 new tokens") && note.contains("`<up>`, `<down>`, `<left>`"), "{note}");
        fs::remove_file(folder.path().join(NEW_TOKENS_FILE)).expect("removed");
        assert_eq!(asked(&[&[11]]).expect("nothing is new"), None);
    }

    #[test]
    fn what_was_not_met_is_carried_on() {
        let (folder, model) = model();
        let mut occurred = occurred(folder.path());
        let state = serde_json::to_string(&occurred).expect("plain data");
        let mut again: Occurred = serde_json::from_str(&state).expect("its own state");
        again.watch(folder.path()).expect("new tokens");
        assert_eq!(again, occurred);
        carry(folder.path(), &occurred).expect("carried");
        assert_eq!(read(folder.path()).expect("a file").expect("a token").tokens, ["<left>"]);
        occurred.note(&[12, 1], &[0, 1]);
        carry(folder.path(), &occurred).expect("carried");
        assert!(!folder.path().join(NEW_TOKENS_FILE).exists());
        assert_eq!(audit(folder.path(), &model, &occurred).expect("nothing to audit"), None);
        let mut nothing = Occurred::default();
        nothing.watch(folder.path()).expect("no file");
        nothing.note(&[1, 2, 10], &[0, 1, 1]);
        assert_eq!(nothing, Occurred::default());
    }
}
