//! `pipe sample --generate` and `--prompt`: a checkpoint plays an instance once, outside of any stage.
//!
//! The instance becomes a row behind those of the tokens that the model was trained or measured on, written as these are, and
//! is then played as an evaluation plays them. Nothing is stored.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use anyhow::{Context as _, Result, ensure};
use pipe::stages::chat::ChatTemplate;
use pipe::stages::sampling::Filters;
use pipe::stages::tokens::{Row, TOKENIZER_FOLDER, TokensFolder};
use pipe::stages::training::Precision;
use pipe::tasks::{self, Finish, Measurements, Start};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use tch::Device;

use crate::codec::Codec;
use crate::generate::Sampling;
use crate::model::Transformer;
use crate::preflight;
use crate::prompts::{Prompts, Purpose};
use crate::trajectory::{Request, Trajectory, TurnRecord, play};

/// What to play.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Asked {
    /// The checkpoint's folder.
    pub model: PathBuf,
    /// The folder of tokens with the task and the form in which instances are written.
    pub tokens: PathBuf,
    /// The instances, as the task has them.
    pub instances: Vec<Value>,
    /// Completions of each.
    pub samples: u64,
    /// The sampling temperature; 0 is greedy.
    pub temperature: f64,
    /// Tokens in a reply, at most.
    pub max_new_tokens: u64,
    /// Decides what is drawn.
    pub seed: u64,
}

/// An episode that was played.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Played {
    /// The place of the instance among those asked for.
    pub instance: usize,
    /// What the model read first.
    pub prompt: String,
    /// The turns.
    pub turns: Vec<TurnRecord>,
    /// Why the last reply ended.
    pub finish: Finish,
    /// The verdict.
    pub measurements: Measurements,
}

/// Plays every instance; an error says what is wrong with the model, the tokens or an instance.
pub fn run(asked: &Asked, device: Device) -> Result<Vec<Played>> {
    let mut tokens = TokensFolder::open(&asked.tokens)?;
    let first = tokens.rows.len();
    let interrupt = Arc::new(AtomicBool::new(false));
    add(&mut tokens, asked, &interrupt)?;
    let prompts = Prompts::open(&asked.model, tokens, &interrupt)?;
    let model = Transformer::load_frozen(&asked.model, device, Precision::Fp32)?;
    let rows: Vec<usize> = (first..prompts.tokens.rows.len()).collect();
    preflight::prompts(&prompts.tokens, &rows, model.config(), asked.max_new_tokens)?;
    let sampling = Sampling::open(&Filters::default(), asked.temperature, asked.max_new_tokens, &prompts.codec)?;
    let place = |row: usize, sample| vec![asked.seed, Purpose::Evaluation as u64, (row - first) as u64, sample];
    let request =
        |&row: &usize| Request { row, samples: (0..asked.samples).map(|sample| place(row, sample)).collect() };
    let requests: Vec<Request> = rows.iter().map(request).collect();
    let played = play(&model, &prompts, &requests, &sampling, &interrupt, &mut |_| {})?;
    let told = |(instance, one): (usize, Trajectory)| -> Result<Played> {
        Ok(Played {
            instance,
            prompt: prompts.tokens.prompt(first + instance)?.to_owned(),
            finish: one.finish(),
            measurements: prompts.named(&one.measurements),
            turns: one.turns,
        })
    };
    let all =
        played.into_iter().enumerate().flat_map(|(instance, all)| all.into_iter().map(move |one| (instance, one)));
    all.map(told).collect()
}

/// Adds the instances to the rows of `tokens`, written as these are.
fn add(tokens: &mut TokensFolder, asked: &Asked, interrupt: &Arc<AtomicBool>) -> Result<()> {
    let (task, format) = tokens.task.as_ref().context("the tokens have no task, so nothing can be asked")?;
    let task = tasks::open_with(task, format, interrupt)?;
    let starts: Vec<Start<'_>> = asked.instances.iter().map(|instance| Start { instance, seed: asked.seed }).collect();
    let texts = task.begin(&starts)?.observe()?;
    let codec = Codec::open(&asked.model)?;
    let template = if tokens.chat { ChatTemplate::open(&tokens.path.join(TOKENIZER_FOLDER))? } else { None };
    // What stands before every prompt, where no template writes it: what the first row has more than its own text.
    let begin = match &template {
        None if !tokens.rows.is_empty() => {
            let own = codec.encode(tokens.prompt(0)?)?.len();
            let ids = tokens.prompt_ids(0);
            ensure!(own <= ids.len(), "the first row of the tokens is not written as their tokenizer writes it");
            ids[..ids.len() - own].to_vec()
        }
        _ => Vec::new(),
    };
    for (instance, prompt) in asked.instances.iter().zip(texts) {
        let text = template.as_ref().map_or_else(|| Ok(prompt.clone()), |template| template.first(&prompt))?;
        let mut ids = begin.clone();
        ids.extend(codec.encode(&text)?.into_iter().map(|id| id as i32));
        tokens.prompt_lengths.push(ids.len() as i32);
        tokens.mask.extend(vec![0; ids.len()]);
        tokens.ids.extend(ids);
        tokens.offsets.push(tokens.ids.len() as i64);
        tokens.rows.push(Row::new("by hand", "by hand", task.stratum(instance), prompt, Some(instance)));
    }
    Ok(())
}

/// Reads what is asked of a file.
pub fn read(path: &Path) -> Result<Asked> {
    let reading = || format!("reading `{}`", path.display());
    serde_json::from_slice(&std::fs::read(path).with_context(reading)?).with_context(reading)
}
