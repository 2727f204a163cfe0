//! Validation on the way: generation on held-out instances, the mean of every measurement, a few completions to read.

use std::collections::BTreeMap;
use std::sync::atomic::AtomicBool;

use anyhow::Context as _;
use pipe::pipeline::stage::StageContext;
use pipe::stages::training::Validate;
use pipe::telemetry::{Metrics, StepLines};
use serde_json::json;

use crate::generate::Sampling;
use crate::model::Transformer;
use crate::preflight;
use crate::prompts::{Prompts, Purpose};
use crate::session::tell_failure;
use crate::trajectory::{Request, play};

/// Prompts generated at once. Batch shapes move the last bits of logits, so it is fixed.
const CHUNK: usize = 128;
/// Completions that are logged each time.
const LOGGED: usize = 8;
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
    /// `validation/<measure>`, `validation/mean_length` and `validation/clipped_share`.
    pub metrics: BTreeMap<String, f64>,
    /// The mean of the selecting measurement.
    pub selecting: f64,
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

    /// Whether the finished step `step` of `steps` is validated: every so many, and always the last.
    pub fn is_due(&self, step: u64, steps: u64) -> bool {
        step.is_multiple_of(self.params.every) || step == steps
    }

    /// Generates and measures; ends with `Interrupted` when the stage should stop, having changed nothing.
    pub fn run(
        &mut self,
        model: &Transformer,
        prompts: &Prompts,
        step: u64,
        context: &mut StageContext,
    ) -> anyhow::Result<Validated> {
        let interrupt: &AtomicBool = &context.interrupt;
        let (mut metrics, mut logged) = (Metrics::default(), Vec::new());
        for rows in self.rows.chunks(CHUNK) {
            let counters = |row: usize| vec![self.seed, Purpose::Validation as u64, step, row as u64];
            let asked: Vec<Request> = rows.iter().map(|&row| Request { row, samples: vec![counters(row)] }).collect();
            let played = play(model, prompts, &asked, &self.sampling, interrupt, &mut |_| {})?;
            for (&row, one) in rows.iter().zip(played.iter().flatten()) {
                for (name, value) in prompts.measures().iter().zip(&one.measurements) {
                    metrics.mean(&format!("validation/{name}"), *value, 1.0);
                }
                let clipped = f64::from(u8::from(one.finish() == pipe::tasks::Finish::Length));
                metrics.mean("validation/mean_length", one.length() as f64, 1.0);
                metrics.mean("validation/clipped_share", clipped, 1.0);
                if logged.len() < LOGGED {
                    let about = &prompts.tokens.rows[row];
                    logged.push(json!({
                        "step": step, "instance": about.instance, "prompt": about.prompt, "completion": one.text(),
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
        Ok(Validated { metrics, selecting })
    }
}
