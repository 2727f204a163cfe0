//! What a training loop tells while it runs: progress, metrics in all their views, notes; and when to save.
//!
//! Nothing here changes a result. Failures to record are told once, and training goes on.

use std::collections::BTreeMap;
use std::path::Path;
use std::time::Instant;

use pipe::pipeline::stage::{StageContext, StageEvent};
use pipe::telemetry::Recorder;
use serde::Serialize;

use crate::exhibits;
use crate::model::Transformer;
use crate::phases::Machine;

/// The steps of a stage's table of metrics, told and recorded.
pub struct Session {
    recorder: Recorder,
    steps: u64,
    saved: Instant,
    machine: Machine,
}

/// Parameters as they are shown beside curves.
pub fn config_text(params: &impl Serialize) -> anyhow::Result<String> {
    Ok(format!("```json\n{}\n```", serde_json::to_string_pretty(params)?))
}

impl Session {
    /// Opens the records of a stage of `steps` steps. `resumed_step` is the last step whose record is kept; `None` begins
    /// anew. The parameters are shown as text beside the curves.
    pub fn open(
        context: &mut StageContext,
        params: &impl Serialize,
        model: &Transformer,
        steps: u64,
        resumed_step: Option<u64>,
    ) -> anyhow::Result<Self> {
        let (recorder, opened) = Recorder::open(&context.logs, resumed_step, &config_text(params)?);
        tell_failure(context, "metrics are not recorded", &opened);
        if let Some(done) = resumed_step {
            context.tell(StageEvent::Resumed { done });
        }
        context.progress(resumed_step.unwrap_or(0), steps, "steps");
        Ok(Self { recorder, steps, saved: Instant::now(), machine: Machine::measure(model.device(), model.kind()) })
    }

    /// Records and tells the metrics of the finished step `step`, with where its time went.
    pub fn record(&mut self, context: &mut StageContext, step: u64, mut values: BTreeMap<String, f64>) {
        values.extend(self.machine.metrics());
        let shown = self.recorder.show(step, &exhibits::take());
        let recorded = self.recorder.record(step, &values).and(shown);
        tell_failure(context, "metrics are not recorded", &recorded);
        context.progress(step, self.steps, "steps");
        context.tell(StageEvent::Metrics { values });
    }

    /// Whether the wall seconds between two saves have passed. When to save never changes a result.
    pub fn save_is_due(&self, context: &StageContext) -> bool {
        self.saved.elapsed() >= context.resources.save_every
    }

    /// Begins to wait for the next save.
    pub fn saved(&mut self) {
        self.saved = Instant::now();
    }
}

/// Tells of a view that cannot be written, as a note.
pub fn tell_failure(context: &mut StageContext, what: &str, result: &std::io::Result<()>) {
    if let Err(error) = result {
        context.note(format!("{what} in `{}`: {error}; the stage goes on", context.logs.display()));
    }
}

/// Tokens over seconds since `since`; `None` where too little time has passed to say.
pub fn rate(tokens: u64, since: Instant) -> Option<f64> {
    let rate = tokens as f64 / since.elapsed().as_secs_f64();
    (tokens > 0 && rate.is_finite()).then_some(rate)
}

/// The folder of training states and journals in a stage's work folder.
pub fn states(work: &Path) -> std::path::PathBuf {
    work.join("state")
}
