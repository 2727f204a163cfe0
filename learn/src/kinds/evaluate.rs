//! `evaluate`: let a model act on held-out instances and measure every episode by simulation.
//!
//! A chunk of prompts is the unit of commit: finished chunks stand in a journal, and a run that resumes computes the rest.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::atomic::AtomicBool;

use anyhow::Context as _;
use pipe::pipeline::stage::{StageContext, StageEvent};
use pipe::stages::evaluate::Evaluate;
use pipe::stages::table::{Column, ColumnType, TableWriter};
use pipe::stages::tokens::TokensFolder;
use pipe::statistics::mean::wilson;
use pipe::telemetry::{Metrics, Recorder};
use serde::{Deserialize, Serialize};

use crate::generate::Sampling;
use crate::journal::Journal;
use crate::memory::{Forecast, Generation};
use crate::model::Transformer;
use crate::phases::Machine;
use crate::prompts::{Prompts, Purpose};
use crate::rollout::{distinct, finish_name, turns_column};
use crate::session::{states, tell_failure};
use crate::trajectory::{Request, Trajectory, play};
use crate::{device, memory, preflight};

/// A row each evaluated instance.
const EXAMPLES_FILE: &str = "examples.parquet";
/// The figures over them.
const METRICS_FILE: &str = "metrics.json";
/// The confidence of intervals.
const LEVEL: f64 = 0.95;

/// A line of the journal: one generation chunk.
#[derive(Debug, Serialize, Deserialize)]
struct Chunk {
    rows: Vec<usize>,
    played: Vec<Trajectory>,
}

/// Runs the stage.
pub fn run(params: &Evaluate, context: &mut StageContext) -> anyhow::Result<()> {
    // Open.
    let folder = context.input(&params.model)?.to_owned();
    let device = device::open(&context.resources)?;
    let free = memory::free(device);
    let model = Transformer::load_frozen(&folder, device)?;
    let prompts = Prompts::open(&folder, TokensFolder::open(context.input(&params.prompts)?)?, &context.interrupt)?;
    let mut rows = prompts.tokens.split(&params.split)?;
    if params.samples > 0 {
        let (there, asked) = (rows.len(), params.samples);
        anyhow::ensure!(
            there as u64 >= asked,
            "`samples` is {asked}, but the split `{}` has {there} rows: leave it out to take all",
            params.split
        );
        rows.truncate(asked as usize);
    }
    let checked = preflight::prompts(&prompts.tokens, &rows, model.config(), params.max_new_tokens)?;
    context.note(format!("evaluation: {checked}"));
    let at_once = params.generation_chunk.min(rows.len() as u64);
    let chunks = memory::turns(&prompts, &rows, model.config(), at_once, 1, params.max_new_tokens);
    let generation = Generation::new("evaluation", "`generation_chunk` or `max_new_tokens`", &model, chunks);
    context.note(Forecast::evaluation(&model).generating(generation).check(free)?);

    // Resume.
    let states = states(&context.work);
    std::fs::create_dir_all(&states).with_context(|| format!("creating the folder `{}`", states.display()))?;
    let chunks: Vec<&[usize]> = rows.chunks(params.generation_chunk as usize).collect();
    let (mut journal, finished) = Journal::open(&states.join("evaluation.jsonl"), 0, |_: &Chunk| true)?;
    let fits = finished.len() <= chunks.len() && finished.iter().zip(&chunks).all(|(done, rows)| done.rows == **rows);
    anyhow::ensure!(fits, "the journal in `{}` is of other rows; remove it to begin anew", states.display());
    let mut played: Vec<Trajectory> = finished.into_iter().flat_map(|chunk| chunk.played).collect();
    let total = rows.len() as u64;
    if !played.is_empty() {
        context.tell(StageEvent::Resumed { done: played.len() as u64 });
    }
    context.progress(played.len() as u64, total, "rows");

    // Where the time goes is nobody's result: it stands in the logs alone.
    let recorded = (!played.is_empty()).then_some(played.len() as u64);
    let (mut recorder, opened) = Recorder::open(&context.logs, recorded, "");
    tell_failure(context, "metrics are not recorded", &opened);
    let mut machine = Machine::measure(device, tch::Kind::Float);

    // Loop.
    for rows in chunks.iter().skip(played.len().div_ceil(params.generation_chunk as usize)) {
        context.stop_if_interrupted()?;
        let chunk = step(params, &model, &prompts, rows, &context.interrupt)?;
        journal.append(&chunk)?;
        played.extend(chunk.played);
        let done = recorder.record(played.len() as u64, &machine.metrics());
        tell_failure(context, "metrics are not recorded", &done);
        context.progress(played.len() as u64, total, "rows");
    }

    // Finish.
    let out = context.output("evaluation");
    let diagnoses = diagnose(&prompts, &rows, &played)?;
    write_examples(&prompts, &rows, &played, &diagnoses, &out.join(EXAMPLES_FILE))?;
    let values = metrics(&prompts, &rows, &played, &diagnoses);
    let path = out.join(METRICS_FILE);
    let text = serde_json::to_string_pretty(&values).context("metrics are plain data")?;
    std::fs::write(&path, text + "\n").with_context(|| format!("writing `{}`", path.display()))?;
    context.tell(StageEvent::Metrics { values });
    Ok(())
}

/// One chunk: a completion of each prompt, measured.
fn step(
    params: &Evaluate,
    model: &Transformer,
    prompts: &Prompts,
    rows: &[usize],
    interrupt: &AtomicBool,
) -> anyhow::Result<Chunk> {
    let place = |row: usize| vec![params.seed, Purpose::Evaluation as u64, row as u64];
    let asked: Vec<Request> = rows.iter().map(|&row| Request { row, samples: vec![place(row)] }).collect();
    let sampling = Sampling::open(&params.filters, params.temperature, params.max_new_tokens, &prompts.codec)?;
    let played = play(model, prompts, &asked, &sampling, interrupt, &mut |_| {})?;
    Ok(Chunk { rows: rows.to_vec(), played: played.into_iter().flatten().collect() })
}

/// What a task has to say of episodes beside its verdicts: the name of a diagnosis and its value by episode.
type Diagnosis = (String, Vec<f64>);

/// The diagnoses of the episodes on `rows`.
fn diagnose(prompts: &Prompts, rows: &[usize], played: &[Trajectory]) -> anyhow::Result<Vec<Diagnosis>> {
    let named = prompts.task.diagnoses().iter().map(|measure| (measure.name.clone().into_owned(), Vec::new()));
    let mut diagnoses: Vec<Diagnosis> = named.collect();
    if diagnoses.is_empty() {
        return Ok(diagnoses);
    }
    for (&row, one) in rows.iter().zip(played) {
        let replies: Vec<&str> = one.turns.iter().map(|turn| turn.text.as_str()).collect();
        let mut told = prompts.task.diagnose(prompts.instance(row)?, &replies, one.finish())?;
        for (name, values) in &mut diagnoses {
            values.push(told.remove(name).with_context(|| format!("the diagnosis lacks `{name}`"))?);
        }
    }
    Ok(diagnoses)
}

fn write_examples(
    prompts: &Prompts,
    rows: &[usize],
    played: &[Trajectory],
    diagnoses: &[Diagnosis],
    path: &Path,
) -> anyhow::Result<()> {
    use ColumnType::{Flag, Number, Text};
    let mut columns = vec![("instance", Text), ("stratum", Text), ("data", Text)];
    columns.extend([("prompt", Text), ("completion", Text), ("turns", Text), ("finish", Text), ("truncated", Flag)]);
    columns.extend(prompts.measures().iter().map(|name| (name.as_str(), Number)));
    columns.extend(diagnoses.iter().map(|(name, _)| (name.as_str(), Number)));
    distinct(&columns)?;
    let rows = || rows.iter().map(|&row| &prompts.tokens.rows[row]);
    let mut values = vec![
        Column::text(rows().map(|row| row.instance.clone())),
        Column::Text(rows().map(|row| row.stratum.clone()).collect()),
        Column::Text(rows().map(|row| row.data.as_ref().map(ToString::to_string)).collect()),
        Column::text(rows().map(|row| row.prompt.clone())),
        Column::text(played.iter().map(Trajectory::text)),
        turns_column(prompts, played.iter()),
        Column::text(played.iter().map(|one| finish_name(one.finish()).to_owned())),
        Column::Flag(played.iter().map(|one| one.truncated).collect()),
    ];
    values.extend(
        (0..prompts.measures().len())
            .map(|measure| Column::Number(played.iter().map(|one| Some(one.measurements[measure])).collect())),
    );
    values.extend(diagnoses.iter().map(|(_, told)| Column::Number(told.iter().copied().map(Some).collect())));
    let mut table = TableWriter::create(path, &columns)?;
    table.write(values)?;
    table.finish()
}

/// The figures: `n`, the mean of each measurement and diagnosis, the Wilson interval and the strata of `solved`, lengths,
/// truncations.
///
/// Every instance counts; a completion that the token limit cut off is judged as the task judges it, and counted apart.
fn metrics(prompts: &Prompts, rows: &[usize], played: &[Trajectory], diagnoses: &[Diagnosis]) -> BTreeMap<String, f64> {
    let solved = prompts.measure("solved").ok();
    let mut metrics = Metrics::default();
    for (&row, one) in rows.iter().zip(played) {
        metrics.total("n", 1.0);
        metrics.mean("completion_length", one.length() as f64, 1.0);
        metrics.mean("truncated", f64::from(u8::from(one.truncated)), 1.0);
        for (name, value) in prompts.measures().iter().zip(&one.measurements) {
            metrics.mean(name, *value, 1.0);
        }
        if let (Some(solved), Some(stratum)) = (solved, &prompts.tokens.rows[row].stratum) {
            // Of a stratum of several classes, as `10x10.long`, each counts for itself, too.
            let classes = stratum.split('.').filter(|class| class != stratum);
            for class in std::iter::once(stratum.as_str()).chain(classes) {
                metrics.mean(&format!("solved.{class}"), one.measurements[solved], 1.0);
                metrics.total(&format!("n.{class}"), 1.0);
            }
        }
    }
    for (name, told) in diagnoses {
        for value in told {
            metrics.mean(name, *value, 1.0);
        }
    }
    let mut values = metrics.values();
    if let Some(solved) = solved {
        let successes = played.iter().filter(|one| one.measurements[solved] > 0.5).count() as u64;
        if let Some(interval) = wilson(successes, played.len() as u64, LEVEL) {
            values.extend(interval.low.map(|low| ("solved_low".to_owned(), low)));
            values.extend(interval.high.map(|high| ("solved_high".to_owned(), high)));
        }
    }
    values
}
