//! Validation on the way: generation on held-out instances, the mean of every measurement, a few completions to read.

use std::collections::BTreeMap;
use std::sync::atomic::AtomicBool;

use anyhow::Context as _;
use pipe::pipeline::stage::StageContext;
use pipe::stages::training::Validate;
use pipe::statistics::alarm::Evaluation;
use pipe::tasks::maze::drawing::Drawing;
use pipe::telemetry::{Metrics, Picture, StepLines};
use serde_json::json;

use crate::exhibits::{self, Shown};
use crate::generate::Sampling;
use crate::memory::{self, Generation};
use crate::model::Transformer;
use crate::preflight;
use crate::prompts::{Prompts, Purpose};
use crate::rewards::{Rewards, Scored};
use crate::session::tell_failure;
use crate::trajectory::{Request, Trajectory, play};

/// Prompts generated at once. Batch shapes move the last bits of logits, so it is fixed.
const CHUNK: usize = 128;
/// Completions that are logged each time.
pub const LOGGED: usize = 8;
/// The log of completions.
const LOG_FILE: &str = "validation.jsonl";

/// The validation of a training stage.
pub struct Validation {
    params: Validate,
    rows: Vec<usize>,
    sampling: Sampling,
    seed: u64,
    select: usize,
    log: std::io::Result<StepLines>,
}

/// What a validation found.
pub struct Validated {
    /// `validation/<measure>`, `validation/mean_length` and `validation/clipped_share`; with rewards, `validation/reward`,
    /// `validation/reward_unsolved` and `validation/reward/<name>`.
    pub metrics: BTreeMap<String, f64>,
    /// The mean of the selecting measurement.
    pub selecting: f64,
    /// What the alarm looks at; absent without rewards, or where the task measures no `solved`.
    pub evaluation: Option<Evaluation>,
}

impl Validation {
    /// Prepares the validation that `params` ask for; tells its preflight as a note.
    ///
    /// `resumed_step` is the last step whose log is kept.
    pub fn open(
        params: &Validate,
        prompts: &Prompts,
        model: &Transformer,
        max_new_tokens: u64,
        seed: u64,
        resumed_step: Option<u64>,
        context: &mut StageContext,
    ) -> anyhow::Result<Self> {
        let select = prompts.measure(&params.select).context("`validate.select` cannot be followed")?;
        let mut rows = prompts.tokens.split(&params.split)?;
        if (rows.len() as u64) < params.samples {
            let (there, asked) = (rows.len(), params.samples);
            context.note(format!("validation takes all {there} rows of `{}`; {asked} were asked for", params.split));
        }
        rows.truncate(params.samples as usize);
        let checked = preflight::prompts(&prompts.tokens, &rows, model.config(), max_new_tokens)?;
        context.note(format!("validation: {checked}"));
        let sampling = Sampling::open(&params.filters, params.temperature, max_new_tokens, &prompts.codec)
            .context("`validate.stop` cannot be followed")?;
        let log = StepLines::open(&context.logs.join(LOG_FILE), resumed_step);
        if let Err(error) = &log {
            context.note(format!("validation completions are not logged in `{}`: {error}", context.logs.display()));
        }
        Ok(Self { params: params.clone(), rows, sampling, seed, select, log })
    }

    /// What its generation needs in memory.
    pub fn forecast(&self, model: &Transformer, prompts: &Prompts) -> Option<Generation> {
        let at_once = self.rows.len().min(CHUNK) as u64;
        let limit = self.sampling.max_new_tokens as u64;
        let chunks = memory::turns(prompts, &self.rows, model.config(), at_once, 1, limit);
        Generation::new("validation", "`validate.samples`", model, chunks)
    }

    /// Whether the finished step `step` of `steps` is validated: every so many, and always the last.
    pub fn is_due(&self, step: u64, steps: u64) -> bool {
        step.is_multiple_of(self.params.every) || step == steps
    }

    /// Generates, measures and scores; ends with `Interrupted` when the stage should stop, having changed nothing.
    pub fn run(
        &mut self,
        model: &Transformer,
        prompts: &Prompts,
        step: u64,
        mut rewards: Option<&mut Rewards>,
        context: &mut StageContext,
    ) -> anyhow::Result<Validated> {
        let interrupt: &AtomicBool = &context.interrupt;
        let (mut metrics, mut logged) = (Metrics::default(), Vec::new());
        let solved = prompts.measure("solved").ok();
        let mut evaluation = rewards.is_some().then(|| Evaluation { step, ..Evaluation::default() });
        for rows in self.rows.chunks(CHUNK) {
            let counters = |row: usize| vec![self.seed, Purpose::Validation as u64, step, row as u64];
            let asked: Vec<Request> = rows.iter().map(|&row| Request { row, samples: vec![counters(row)] }).collect();
            let played = play(model, prompts, &asked, &self.sampling, interrupt, &mut |_| {})?;
            let episodes: Vec<(usize, &Trajectory)> = rows.iter().copied().zip(played.iter().flatten()).collect();
            if let Some(rewards) = rewards.as_deref_mut() {
                for (scored, (_, one)) in rewards.score(prompts, &episodes)?.iter().zip(&episodes) {
                    let solved = solved.map(|solved| one.measurements[solved]);
                    measure(&mut metrics, rewards.names(), scored, solved);
                    if let Some((evaluation, solved)) = evaluation.as_mut().zip(solved) {
                        evaluation.reward.push(scored.total);
                        evaluation.solved.push(solved);
                    }
                }
            }
            for (row, one) in episodes {
                for (name, value) in prompts.measures().iter().zip(&one.measurements) {
                    metrics.mean(&format!("validation/{name}"), *value, 1.0);
                }
                let clipped = f64::from(u8::from(one.finish() == pipe::tasks::Finish::Length));
                metrics.mean("validation/mean_length", one.length() as f64, 1.0);
                metrics.mean("validation/clipped_share", clipped, 1.0);
                if logged.len() < LOGGED {
                    let about = &prompts.tokens.rows[row];
                    show("validation", prompts, row, one);
                    logged.push(json!({
                        "step": step, "instance": about.instance, "prompt": prompts.tokens.prompt(row)?, "completion": one.text(),
                        "finish": one.finish(), "measurements": prompts.named(&one.measurements),
                    }));
                }
            }
        }
        if let Ok(log) = &mut self.log {
            let written = logged.iter().try_for_each(|line| log.append(line));
            if written.is_err() {
                tell_failure(context, "validation completions are not logged", &written);
                self.log = Err(std::io::Error::other("the log was given up"));
            }
        }
        let metrics = metrics.values();
        let selecting = metrics[&format!("validation/{}", prompts.measures()[self.select])];
        let evaluation = evaluation.filter(|evaluation| !evaluation.solved.is_empty());
        Ok(Validated { metrics, selecting, evaluation })
    }
}

/// Shows a completion, and what it does where its task can be drawn.
pub fn show(section: &str, prompts: &Prompts, row: usize, one: &Trajectory) {
    let about = &prompts.tokens.rows[row];
    let completion = one.text();
    let named = prompts.measures().iter().map(String::as_str);
    let shown = Shown {
        instance: &about.instance,
        prompt: prompts.tokens.prompt(row).unwrap_or_default(),
        completion: &completion,
        finish: one.finish(),
        measurements: named.zip(one.measurements.iter().copied()).collect(),
    };
    let instance = &about.instance;
    exhibits::text(&format!("{section}/completions/{instance}"), exhibits::completions([shown]));
    let walk = prompts.instance(row).ok().and_then(|maze| Drawing::read(maze, Some(&completion)).ok());
    if let Some(png) = walk.and_then(|walk| walk.picture().png().ok()) {
        let picture = Picture { width: png.width, height: png.height, png: png.bytes };
        exhibits::picture(&format!("{section}/walks/{instance}"), picture);
    }
}

/// Adds the rewards of one episode; that of unsolved episodes also by itself.
fn measure(metrics: &mut Metrics, names: &[String], scored: &Scored, solved: Option<f64>) {
    if let Some(total) = scored.total {
        metrics.mean("validation/reward", total, 1.0);
        if let Some(unsolved) = solved.map(|solved| 1.0 - solved).filter(|unsolved| *unsolved > 0.0) {
            metrics.mean("validation/reward_unsolved", unsolved * total, unsolved);
        }
    }
    for (name, outcome) in names.iter().zip(&scored.outcomes) {
        if let Some(value) = outcome.value() {
            metrics.mean(&format!("validation/reward/{name}"), value, 1.0);
        }
    }
}
