//! `evaluate`: let a model act on held-out instances and measure every episode by simulation.
//!
//! A chunk of prompts is the unit of commit: finished chunks stand in a journal, and a run that resumes computes the rest.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::atomic::AtomicBool;

use anyhow::Context as _;
use pipe::pipeline::stage::{StageContext, StageEvent};
use pipe::rewards::COMPLETION_LENGTH;
use pipe::stages::evaluate::Evaluate;
use pipe::stages::table::{Column, ColumnType, TableWriter};
use pipe::stages::tokens::TokensFolder;
use pipe::statistics::mean::{mean_interval, pass_at_k};
use pipe::telemetry::{Metrics, Recorder};
use serde::{Deserialize, Serialize};

use crate::generate::Sampling;
use crate::journal::Journal;
use crate::memory::{Forecast, Generation};
use crate::model::Transformer;
use crate::phases::Machine;
use crate::prompts::{Prompts, Purpose};
use crate::rollout::{distinct, finish_name, turns_column};
use crate::session::{config_text, states, tell_failure};
use crate::trajectory::{Request, Trajectory, play};
use crate::validate::{LOGGED, show};
use crate::{device, exhibits, memory, preflight};

/// A row each completion.
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
    let model = Transformer::load_frozen(&folder, device, params.precision)?;
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
    let samples = params.samples_per_prompt;
    let chunks = memory::turns(&prompts, &rows, model.config(), at_once, samples, params.max_new_tokens);
    let generation = Generation::new("evaluation", "`generation_chunk` or `max_new_tokens`", &model, chunks);
    context.note(Forecast::evaluation(&model).generating(generation).check(free)?);

    // Resume.
    let states = states(&context.work);
    std::fs::create_dir_all(&states).with_context(|| format!("creating the folder `{}`", states.display()))?;
    let chunks: Vec<&[usize]> = rows.chunks(params.generation_chunk as usize).collect();
    let (mut journal, finished) = Journal::open(&states.join("evaluation.jsonl"), 0, |_: &Chunk| true)?;
    let fits = finished.len() <= chunks.len() && finished.iter().zip(&chunks).all(|(done, rows)| done.rows == **rows);
    anyhow::ensure!(fits, "the journal in `{}` is of other rows; remove it to begin anew", states.display());
    let done = finished.len();
    let mut played: Vec<Trajectory> = finished.into_iter().flat_map(|chunk| chunk.played).collect();
    let total = rows.len() as u64 * samples;
    if !played.is_empty() {
        context.tell(StageEvent::Resumed { done: played.len() as u64 });
    }
    context.progress(played.len() as u64, total, "rows");

    // Where the time goes is nobody's result: it stands in the logs alone.
    let recorded = (!played.is_empty()).then_some(played.len() as u64);
    let (mut recorder, opened) = Recorder::open(&context.logs, recorded, &config_text(params)?);
    tell_failure(context, "metrics are not recorded", &opened);
    let mut machine = Machine::measure(device, model.kind());

    // Loop.
    for rows in chunks.iter().skip(done) {
        context.stop_if_interrupted()?;
        let chunk = step(params, &model, &prompts, rows, &context.interrupt)?;
        journal.append(&chunk)?;
        played.extend(chunk.played);
        let done = recorder.record(played.len() as u64, &machine.metrics());
        tell_failure(context, "metrics are not recorded", &done);
        context.progress(played.len() as u64, total, "rows");
    }

    // Finish.
    for (&row, all) in rows.iter().zip(played.chunks(samples as usize)).take(LOGGED) {
        show("evaluation", &prompts, row, &all[0]);
    }
    exhibits::distribution("completions/length", played.iter().map(|one| one.length() as f64));
    let shown = recorder.show(total, &exhibits::take());
    tell_failure(context, "completions are not shown", &shown);
    let out = context.output("evaluation");
    // The row of each completion.
    let rows: Vec<usize> = rows.into_iter().flat_map(|row| std::iter::repeat_n(row, samples as usize)).collect();
    let pass = pass(params, &prompts, &played);
    let diagnoses = diagnose(&prompts, &rows, &played)?;
    let episodes = Episodes { prompts: &prompts, rows: &rows, played: &played, pass: &pass, diagnoses: &diagnoses };
    write_examples(params, &episodes, &out.join(EXAMPLES_FILE))?;
    let values = metrics(params, &episodes);
    let path = out.join(METRICS_FILE);
    let text = serde_json::to_string_pretty(&values).context("metrics are plain data")?;
    std::fs::write(&path, text + "\n").with_context(|| format!("writing `{}`", path.display()))?;
    context.tell(StageEvent::Metrics { values });
    Ok(())
}

/// One chunk: the completions of each prompt, measured.
fn step(
    params: &Evaluate,
    model: &Transformer,
    prompts: &Prompts,
    rows: &[usize],
    interrupt: &AtomicBool,
) -> anyhow::Result<Chunk> {
    // The first completion of several is the one that a single completion would be. Its further turns have their number, from
    // 1, where the other completions have a 0.
    let place = |row: usize, sample: u64| {
        let first = [params.seed, Purpose::Evaluation as u64, row as u64];
        if sample == 0 { first.to_vec() } else { [&first[..], &[0, sample]].concat() }
    };
    let places = |row: usize| (0..params.samples_per_prompt).map(|sample| place(row, sample)).collect();
    let asked: Vec<Request> = rows.iter().map(|&row| Request { row, samples: places(row) }).collect();
    let sampling = Sampling::open(&params.filters, params.temperature, params.max_new_tokens, &prompts.codec)?;
    let played = play(model, prompts, &asked, &sampling, interrupt, &mut |_| {})?;
    Ok(Chunk { rows: rows.to_vec(), played: played.into_iter().flatten().collect() })
}

/// Numbers by name, of each the value of every completion.
type Named = Vec<(String, Vec<f64>)>;

/// What was played, and what is told of it.
struct Episodes<'a> {
    prompts: &'a Prompts,
    /// The row of each completion.
    rows: &'a [usize],
    played: &'a [Trajectory],
    /// Each `pass@k`; the value of a completion is that of its instance.
    pass: &'a Named,
    /// What the task has to say of episodes beside its verdicts.
    diagnoses: &'a Named,
}

impl Episodes<'_> {
    /// Whether `completion_length` is the tokens that were written: a task's own measurement of the name goes before.
    fn tells_length(&self) -> bool {
        let diagnoses = self.diagnoses.iter().map(|(name, _)| name);
        !self.prompts.measures().iter().chain(diagnoses).any(|name| name == COMPLETION_LENGTH)
    }
}

/// Every `pass@k` that there are completions for; none where the task measures no `solved`.
fn pass(params: &Evaluate, prompts: &Prompts, played: &[Trajectory]) -> Named {
    let Ok(solved) = prompts.measure("solved") else { return Named::new() };
    let draws = params.samples_per_prompt;
    let value = |samples: &[Trajectory], k: u64| {
        let correct = samples.iter().filter(|one| one.measurements[solved] > 0.5).count() as u64;
        Some(std::iter::repeat_n(pass_at_k(draws, correct, k)?, samples.len()))
    };
    let of = |k: u64| {
        let values: Option<Vec<_>> = played.chunks(draws as usize).map(|samples| value(samples, k)).collect();
        Some((format!("pass@{k}"), values?.into_iter().flatten().collect()))
    };
    params.pass_at().filter_map(of).collect()
}

/// The diagnoses of the episodes on `rows`.
fn diagnose(prompts: &Prompts, rows: &[usize], played: &[Trajectory]) -> anyhow::Result<Named> {
    let named = prompts.task.diagnoses().iter().map(|measure| (measure.name.clone().into_owned(), Vec::new()));
    let mut diagnoses: Named = named.collect();
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

/// Writes a row each completion. Of several an instance each has its number and its ids.
fn write_examples(params: &Evaluate, episodes: &Episodes<'_>, path: &Path) -> anyhow::Result<()> {
    use ColumnType::{Flag, Integer, Integers, Number, Text};
    let Episodes { prompts, rows, played, pass, diagnoses } = *episodes;
    let several = params.samples_per_prompt > 1;
    let mut columns = vec![("instance", Text), ("stratum", Text), ("data", Text)];
    columns.extend([("prompt", Text), ("completion", Text), ("turns", Text), ("finish", Text)]);
    columns.extend([("sample", Integer), ("ids", Integers)].into_iter().filter(|_| several));
    columns.extend(episodes.tells_length().then_some((COMPLETION_LENGTH, Number)));
    columns.extend(pass.iter().map(|(name, _)| (name.as_str(), Number)));
    columns.push(("truncated", Flag));
    columns.extend(prompts.measures().iter().map(|name| (name.as_str(), Number)));
    columns.extend(diagnoses.iter().map(|(name, _)| (name.as_str(), Number)));
    distinct(&columns)?;
    let data = rows.iter().map(|&row| Ok(prompts.tokens.data_text(row)?.map(str::to_owned)));
    let data = data.collect::<anyhow::Result<_>>()?;
    let read = rows.iter().map(|&row| Ok(Some(prompts.tokens.prompt(row)?.to_owned())));
    let read = read.collect::<anyhow::Result<_>>()?;
    let rows = || rows.iter().map(|&row| &prompts.tokens.rows[row]);
    let mut values = vec![
        Column::text(rows().map(|row| row.instance.to_string())),
        Column::Text(rows().map(|row| row.stratum.as_deref().map(str::to_owned)).collect()),
        Column::Text(data),
        Column::Text(read),
        Column::text(played.iter().map(Trajectory::text)),
        turns_column(prompts, played.iter()),
        Column::text(played.iter().map(|one| finish_name(one.finish()).to_owned())),
    ];
    if several {
        let ids = |one: &Trajectory| one.ids.iter().map(|id| *id as i32).collect();
        values.extend([
            Column::integer((0..played.len() as u64).map(|at| (at % params.samples_per_prompt) as i64)),
            Column::Integers(played.iter().map(ids).collect()),
        ]);
    }
    if episodes.tells_length() {
        values.push(Column::Number(played.iter().map(|one| Some(one.length() as f64)).collect()));
    }
    values.extend(pass.iter().map(|(_, values)| Column::Number(values.iter().copied().map(Some).collect())));
    values.push(Column::Flag(played.iter().map(|one| one.truncated).collect()));
    values.extend(
        (0..prompts.measures().len())
            .map(|measure| Column::Number(played.iter().map(|one| Some(one.measurements[measure])).collect())),
    );
    values.extend(diagnoses.iter().map(|(_, told)| Column::Number(told.iter().copied().map(Some).collect())));
    let mut table = TableWriter::create(path, &columns)?;
    table.write(values)?;
    table.finish()
}

/// The figures: `n`, the mean of each measurement and diagnosis, the interval and the strata of `solved`, lengths, truncations,
/// each `pass@k`.
///
/// Every completion counts; one that the token limit cut off is judged as the task judges it, and counted apart. `n` counts
/// instances, and the interval rests on their means: completions of one instance are not independent.
fn metrics(params: &Evaluate, episodes: &Episodes<'_>) -> BTreeMap<String, f64> {
    let Episodes { prompts, rows, played, pass, diagnoses } = *episodes;
    let samples = params.samples_per_prompt as usize;
    let solved = prompts.measure("solved").ok();
    let mut metrics = Metrics::default();
    for (place, (&row, one)) in rows.iter().zip(played).enumerate() {
        let stratum = prompts.tokens.rows[row].stratum.as_deref().filter(|_| solved.is_some());
        let classes: Vec<&str> = stratum.map(classes).unwrap_or_default();
        if place.is_multiple_of(samples) {
            metrics.total("n", 1.0);
            for stratum in &classes {
                metrics.total(&format!("n.{stratum}"), 1.0);
            }
        }
        if episodes.tells_length() {
            metrics.mean(COMPLETION_LENGTH, one.length() as f64, 1.0);
        }
        metrics.mean("truncated", f64::from(u8::from(one.truncated)), 1.0);
        for (name, value) in prompts.measures().iter().zip(&one.measurements) {
            metrics.mean(name, *value, 1.0);
        }
        let solved = solved.map(|solved| ("solved", one.measurements[solved]));
        let pass = pass.iter().map(|(name, values)| (name.as_str(), values[place]));
        for (name, value) in pass.clone() {
            metrics.mean(name, value, 1.0);
        }
        for (name, value) in solved.into_iter().chain(pass) {
            for stratum in &classes {
                metrics.mean(&format!("{name}.{stratum}"), value, 1.0);
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
        let share = |samples: &[Trajectory]| {
            let successes = samples.iter().filter(|one| one.measurements[solved] > 0.5).count();
            successes as f64 / samples.len() as f64
        };
        let means: Vec<f64> = played.chunks(samples).map(share).collect();
        if let Some(interval) = mean_interval(&means, LEVEL) {
            values.extend(interval.low.map(|low| ("solved_low".to_owned(), low)));
            values.extend(interval.high.map(|high| ("solved_high".to_owned(), high)));
        }
    }
    values
}

/// The classes that a stratum counts for: itself and, of one like `10x10.long`, each of its parts.
fn classes(stratum: &str) -> Vec<&str> {
    let parts = stratum.split('.').filter(|part| *part != stratum);
    std::iter::once(stratum).chain(parts).collect()
}
