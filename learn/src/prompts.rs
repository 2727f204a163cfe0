//! Prompts with their task: what a model is asked, and what simulation says of its answers.
//!
//! The verdict alone judges; no completion is ever compared with a demonstration.

use std::collections::BTreeSet;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use anyhow::{Context as _, bail, ensure};
use pipe::stages::chat::ChatTemplate;
use pipe::stages::tokens::{TOKENIZER_FOLDER, TokensFolder};
use pipe::tasks::{self, Measurements, Task};
use serde_json::Value;

use crate::codec::Codec;
use crate::generate::Completion;
use crate::preflight;

/// What a sample counter is for; the first counter after the seed, so that no two uses share a draw.
#[derive(Clone, Copy, Debug)]
pub enum Purpose {
    /// Rollouts to train on.
    Training = 0,
    /// Validation on the way.
    Validation = 1,
    /// An `evaluate` stage.
    Evaluation = 2,
}

/// Tokens of a task, opened for generation.
pub struct Prompts {
    /// The tokens and their rows.
    pub tokens: Arc<TokensFolder>,
    /// The task.
    pub task: Box<dyn Task>,
    /// The tokenizer of model and tokens.
    pub codec: Codec,
    /// What wrote the rows, where a chat template did; it writes what the environment says later, too.
    template: Option<ChatTemplate>,
    /// What ends a turn in the rows; `None` where no row has a target.
    end: Option<i64>,
    measures: Vec<String>,
}

impl Prompts {
    /// Opens `tokens` for the model in the folder `model`; refuses tokens of another tokenizer or without a task. The
    /// stage's `interrupt` ends the calls of a task that is a program.
    pub fn open(
        model: &Path,
        tokens: impl Into<Arc<TokensFolder>>,
        interrupt: &Arc<AtomicBool>,
    ) -> anyhow::Result<Self> {
        let tokens = tokens.into();
        let codec = Codec::open(model)?;
        preflight::tokenizers(model, codec.digest(), &tokens)?;
        let Some((task, format)) = &tokens.task else {
            bail!(
                "the tokens `{}` have no task: completions of a user's own data set cannot be judged; tokenize a \
                 `synthesize` stage's data to generate and measure",
                tokens.path.display()
            );
        };
        let task = tasks::open_with(task, format, interrupt)?;
        let names: BTreeSet<String> = task.measures().iter().map(|measure| measure.name.clone().into_owned()).collect();
        let folder = tokens.path.join(TOKENIZER_FOLDER);
        let template = if tokens.chat { ChatTemplate::open(&folder)? } else { None };
        let ended = (0..tokens.rows.len()).find(|&row| tokens.row_mask(row).last() == Some(&1));
        let end = ended.and_then(|row| tokens.row_ids(row).last()).map(|id| i64::from(*id));
        Ok(Self { tokens, task, codec, template, end, measures: names.into_iter().collect() })
    }

    /// The names of the task's measurements, sorted.
    pub fn measures(&self) -> &[String] {
        &self.measures
    }

    /// The place of the measurement `name` in the values of a verdict.
    pub fn measure(&self, name: &str) -> anyhow::Result<usize> {
        let place = self.measures.iter().position(|measure| measure == name);
        place.with_context(|| format!("the task measures no `{name}`; it measures `{}`", self.measures.join("`, `")))
    }

    /// The prompt of a row.
    pub fn prompt(&self, row: usize) -> Vec<i64> {
        self.tokens.prompt_ids(row).iter().map(|id| i64::from(*id)).collect()
    }

    /// The task instance of a row.
    pub fn instance(&self, row: usize) -> anyhow::Result<&Value> {
        let data = self.tokens.data(row)?;
        data.with_context(|| format!("the row `{}` has no task instance", self.tokens.rows[row].instance))
    }

    /// What a completion says, without the end of the sequence.
    pub fn text(&self, completion: &Completion) -> anyhow::Result<String> {
        self.codec.decode(&completion.ids[..completion.ids.len() - completion.unsaid])
    }

    /// What must stand between a reply that ends with the id `last` and what the environment says: the end of a turn, where
    /// a stop text or another of the model's ends ended the reply and rows have that one.
    pub fn closing(&self, last: Option<i64>) -> Option<i64> {
        self.end.filter(|end| last != Some(*end))
    }

    /// The ids of what the environment says between two replies; a chat template frames it as it did in the rows.
    pub fn observation(&self, text: &str) -> anyhow::Result<Vec<i64>> {
        let reading = || format!("reading the observation `{text}`");
        match &self.template {
            Some(template) => self.codec.encode(&template.next(text).with_context(reading)?),
            None => self.codec.encode(text),
        }
        .with_context(reading)
    }

    /// The values of a verdict in the order of [`Prompts::measures`]; one that is missing or not finite is an error.
    pub fn values(&self, mut verdict: Measurements) -> anyhow::Result<Vec<f64>> {
        let value = |name: &String| {
            let value = verdict.remove(name).with_context(|| format!("the verdict lacks `{name}`"))?;
            ensure!(value.is_finite(), "the measurement `{name}` is {value}");
            Ok(value)
        };
        self.measures.iter().map(value).collect()
    }

    /// The values of [`Prompts::values`] by name.
    pub fn named(&self, values: &[f64]) -> Measurements {
        self.measures.iter().cloned().zip(values.iter().copied()).collect()
    }
}
