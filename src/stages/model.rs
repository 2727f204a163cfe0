//! `model`: a checkpoint to train, with fresh weights or those of a folder. It needs no libtorch and runs in process.
//!
//! `fresh` draws weights for an architecture; `import` takes a Hugging Face folder as it is, or with rows for tokens that a
//! tokenizer adds. Weights keep the type in which the folder has them.

mod fresh;
mod import;

use std::path::Path;

use anyhow::Context as _;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

pub use crate::stages::model::fresh::{Architecture, SpecialIds, write_fresh};
pub use crate::stages::model::import::{FAMILIES, NEW_TOKENS_FILE, NewTokensFile};

use crate::file::Source;
use crate::pipeline::stage::{ArtifactType, Input, Output, Part, Problem, Stage, StageContext, Tokenizer, Upstream};
use crate::stages::chat::ChatTemplate;
use crate::stages::tokenizer::{Specials, read};
use crate::stages::training::versions;
use crate::stages::{hub, model::import::Import};

/// Make a model: with fresh weights for a tokenizer, or from a folder, with rows for new tokens where asked for.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Model {
    /// The tokenizer that the model reads and writes; its files become part of the checkpoint. A model in `from` keeps its
    /// own without one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tokenizer: Option<Input<Tokenizer>>,
    /// What a model with fresh weights is made of.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub architecture: Option<Architecture>,
    /// A folder as `transformers` saves it, or a repository of the Hugging Face hub as `organisation/name@commit`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub from: Option<Source>,
    /// How the rows of tokens begin that `tokenizer` adds to those of the model in `from`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub new_tokens: Option<NewTokens>,
    /// Decides the fresh weights.
    #[serde(default)]
    pub seed: u64,
}

/// How new rows begin, in the embedding and in the output projection alike.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(tag = "init", rename_all = "snake_case", deny_unknown_fields)]
pub enum NewTokens {
    /// The mean of the rows of all tokens that the model had, plus normal noise.
    Mean {
        /// The standard deviation of the noise; 0 makes all new rows equal.
        #[serde(default)]
        #[schemars(range(min = 0.0))]
        std: f64,
    },
    /// Normal around 0.
    Normal {
        /// The standard deviation.
        #[serde(default = "NewTokens::default_std")]
        #[schemars(range(min = 0.0))]
        std: f64,
    },
}

impl NewTokens {
    fn default_std() -> f64 {
        0.02
    }
}

impl Stage for Model {
    const KIND: &'static str = "model";
    const VERSION: u32 = 1;

    fn outputs(&self) -> Vec<Output> {
        vec![Output::new("checkpoint", ArtifactType::Checkpoint)]
    }

    fn parts(&self) -> Vec<Part> {
        vec![Part::new("learn.model", versions::MODEL)]
    }

    fn check(&self, _: &Upstream<'_>) -> Vec<Problem> {
        let mut problems = Vec::new();
        match (&self.architecture, &self.from) {
            (Some(architecture), None) => {
                problems.extend(architecture.problems());
                if self.tokenizer.is_none() {
                    let problem = Problem::new("tokenizer", "a model with fresh weights needs a tokenizer");
                    problems.push(problem.hint("give `tokenizer`, the name of a `tokenizer` stage"));
                }
                if self.new_tokens.is_some() {
                    problems.push(Problem::new("new_tokens", "every token is new to a model with fresh weights"));
                }
            }
            (None, Some(source)) => {
                problems.extend(hub::check(source));
                if self.new_tokens.is_some() && self.tokenizer.is_none() {
                    let problem = Problem::new("new_tokens", "there is no tokenizer that adds tokens");
                    problems.push(problem.hint("give `tokenizer`, a `tokenizer` stage with the same `from`"));
                }
            }
            (Some(_), Some(_)) => {
                let problem =
                    Problem::new("from", "a model has either an `architecture` or a folder in `from`, not both");
                problems.push(problem.hint("the folder's own `config.json` says what it is made of"));
            }
            (None, None) => {
                let problem = Problem::new("architecture", "a model needs an `architecture`, or a folder in `from`");
                problems.push(problem.hint("give `architecture = { kind = ... }` or `from = \"folder\"`"));
            }
        }
        problems
    }

    fn metrics(&self, _upstream: &Upstream<'_>) -> Option<Vec<String>> {
        Some(Vec::new())
    }

    fn run(&self, context: &mut StageContext) -> anyhow::Result<()> {
        let tokenizer = self.tokenizer.as_ref().map(|input| context.input(input).map(Path::to_owned)).transpose()?;
        let folder = context.output("checkpoint");
        if let Some(source) = &self.from {
            let from = hub::folder(source, &context.work, &import::is_wanted)?;
            let import =
                Import { from: &from, tokenizer: tokenizer.as_deref(), init: self.new_tokens, seed: self.seed };
            let note = import.write(&folder)?;
            context.note(note);
            return Ok(());
        }
        let architecture = self.architecture.as_ref().context("the stage names no architecture")?;
        let from = tokenizer.context("the stage names no tokenizer")?;
        let tokenizer = read(&from)?;
        // Ids need not be dense, so the table is as long as the highest one asks for.
        let vocabulary = tokenizer.get_vocab(true).values().max().map_or(0, |&id| u64::from(id) + 1);
        anyhow::ensure!(vocabulary > 0, "the tokenizer `{}` has no tokens", from.display());
        let specials = Specials::of(&from, &tokenizer)?;
        let ids = SpecialIds { pad: specials.pad, bos: specials.begin, eos: specials.end };
        if ids.eos.is_none() {
            context.note("the tokenizer names no end: the model's completions will all run to their limit");
        }
        copy_files(&from, &folder, &|_| true)?;
        write_fresh(&folder, architecture, vocabulary, ids, self.seed)
    }
}

/// Copies the files of a folder that `wanted` names. Contents only: what the store keeps is read-only.
fn copy_files(from: &Path, to: &Path, wanted: &dyn Fn(&str) -> bool) -> anyhow::Result<()> {
    let listing = || format!("cannot list `{}`", from.display());
    for entry in std::fs::read_dir(from).with_context(listing)? {
        let path = entry.with_context(listing)?.path();
        let Some(name) = path.file_name().and_then(|name| name.to_str()).filter(|_| path.is_file()) else { continue };
        if wanted(name) {
            let bytes = std::fs::read(&path).with_context(|| format!("cannot read `{}`", path.display()))?;
            let to = to.join(name);
            std::fs::write(&to, bytes).with_context(|| format!("cannot write `{}`", to.display()))?;
        }
    }
    Ok(())
}

/// The ids that end what a model writes: the tokenizer's end, and the end of a turn of its chat template; and what is wrong
/// with that template, which no one may ever use.
fn ends(folder: &Path) -> anyhow::Result<(Specials, Vec<u64>, Option<String>)> {
    let tokenizer = read(folder)?;
    let specials = Specials::of(folder, &tokenizer)?;
    let mut ends: Vec<u64> = specials.end.into_iter().map(u64::from).collect();
    let mut wrong = None;
    match ChatTemplate::open(folder) {
        Ok(Some(template)) => {
            let turn = tokenizer.token_to_id(template.end_of_turn()).map(u64::from);
            ends.extend(turn.filter(|id| !ends.contains(id)));
        }
        Ok(None) => {}
        Err(error) => wrong = Some(format!("its chat template cannot be used: {error:#}")),
    }
    Ok((specials, ends, wrong))
}

#[cfg(test)]
mod tests;
