//! Prompts with their task: what a model is asked, and what simulation says of its answers.
//!
//! The verdict alone judges; no completion is ever compared with a demonstration.

use std::collections::BTreeSet;
use std::path::Path;

use anyhow::{Context as _, bail, ensure};
use pipe::stages::tokens::TokensFolder;
use pipe::tasks::{self, Finish, Measurements, Task};
use serde::{Deserialize, Serialize};

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
    pub tokens: TokensFolder,
    /// The task.
    pub task: Box<dyn Task>,
    /// The tokenizer of model and tokens.
    pub codec: Codec,
    measures: Vec<String>,
}

/// A completion and what came of it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Graded {
    /// The ids as sampled, the end of the sequence included.
    pub ids: Vec<i64>,
    /// The text without the end of the sequence.
    pub text: String,
    /// Why it ended.
    pub finish: Finish,
    /// The verdict's measurements in the order of [`Prompts::measures`].
    pub measurements: Vec<f64>,
}

impl Prompts {
    /// Opens `tokens` for the model in the folder `model`; refuses tokens of another tokenizer or without a task.
    pub fn open(model: &Path, tokens: TokensFolder) -> anyhow::Result<Self> {
        let codec = Codec::open(model)?;
        preflight::tokenizers(model, codec.digest(), &tokens)?;
        let Some((task, format)) = &tokens.task else {
            bail!(
                "the tokens `{}` have no task: completions of a user's own data set cannot be judged; tokenize a \
                 `synthesize` stage's data to generate and measure",
                tokens.path.display()
            );
        };
        let task = tasks::open(task, format)?;
        let names: BTreeSet<String> = task.measures().iter().map(|measure| measure.name.to_owned()).collect();
        Ok(Self { tokens, task, codec, measures: names.into_iter().collect() })
    }

    /// The names of the task's measurements, sorted.
    pub fn measures(&self) -> &[String] {
        &self.measures
    }

    /// The place of the measurement `name` in [`Graded::measurements`].
    pub fn measure(&self, name: &str) -> anyhow::Result<usize> {
        let place = self.measures.iter().position(|measure| measure == name);
        place.with_context(|| format!("the task measures no `{name}`; it measures `{}`", self.measures.join("`, `")))
    }

    /// The prompt of a row.
    pub fn prompt(&self, row: usize) -> Vec<i64> {
        self.tokens.prompt_ids(row).iter().map(|id| i64::from(*id)).collect()
    }

    /// Plays a completion of a row's prompt and measures it; the error names the row.
    pub fn grade(&self, row: usize, completion: Completion) -> anyhow::Result<Graded> {
        let row = &self.tokens.rows[row];
        self.play(row.data.as_ref(), completion).with_context(|| format!("judging a completion of `{}`", row.instance))
    }

    /// The measurements of a graded completion by name.
    pub fn named(&self, graded: &Graded) -> Measurements {
        self.measures.iter().cloned().zip(graded.measurements.iter().copied()).collect()
    }

    fn play(&self, data: Option<&serde_json::Value>, completion: Completion) -> anyhow::Result<Graded> {
        let Completion { ids, finish, .. } = completion;
        let written = if finish == Finish::Stop { &ids[..ids.len() - 1] } else { &ids[..] };
        let text = self.codec.decode(written)?;
        let mut episode = self.task.reset(data.context("the row has no task instance")?)?;
        let turn = episode.step(&text, finish);
        ensure!(turn.terminated || turn.truncated, "the task asks for a second turn, which is not implemented");
        let mut verdict = episode.verdict();
        let mut measurements = Vec::with_capacity(self.measures.len());
        for name in &self.measures {
            let value = verdict.remove(name).with_context(|| format!("the verdict lacks `{name}`"))?;
            ensure!(value.is_finite(), "the measurement `{name}` is {value}");
            measurements.push(value);
        }
        Ok(Graded { ids, text, finish, measurements })
    }
}
