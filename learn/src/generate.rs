//! Batched generation: prompts of groups to completions, with the sampler's law.
//!
//! One uniform number a token, drawn by the counters of the sample and the token's index; probabilities and their
//! cumulative sum in fp64; the first id whose cumulative sum exceeds u times the last. What is computed depends on the
//! chunk's content alone: rows that have finished leave the batch at points that the completions decide, never a clock.
//! It knows ids, not text, and nothing of rewards.

use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::{Context, Result, ensure};
use pipe::pipeline::stage::Interrupted;
use pipe::random::{rng, uniform_at};
use pipe::tasks::Finish;
use rayon::prelude::*;
use tch::{Kind, Tensor};

use crate::model::Transformer;
use crate::model::kv_cache::KvCache;

/// How tokens are chosen.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Sampling {
    /// Logits are divided by it; 0 is greedy.
    pub temperature: f64,
    /// Tokens in a completion, at most, its end included.
    pub max_new_tokens: usize,
}

/// A prompt and the samples to draw for it.
#[derive(Clone, Debug)]
pub struct Group {
    /// The prompt's ids; not empty.
    pub prompt: Vec<i64>,
    /// The counters of each sample, by which its uniform numbers are drawn: seed, step, round, instance, sample.
    pub samples: Vec<Vec<u64>>,
}

/// What the model wrote.
#[derive(Clone, Debug, PartialEq)]
pub struct Completion {
    /// The ids; the last one ends the sequence where `finish` is [`Finish::Stop`].
    pub ids: Vec<i64>,
    /// The log-probability of each id under the distribution that it was drawn from, temperature applied; a greedy choice
    /// has that of temperature 1.
    pub logprobs: Vec<f32>,
    /// Why it ended.
    pub finish: Finish,
}

/// Where one sample stands.
struct Sample {
    stream: rand_chacha::ChaCha8Rng,
    prompt: i64,
    completion: Completion,
    done: bool,
}

/// Completes every sample of every group; the result is `[group][sample]`.
///
/// `on_tokens` hears after every token how many were written. Setting `interrupt` ends it with [`Interrupted`].
pub fn generate(
    model: &Transformer,
    groups: &[Group],
    sampling: &Sampling,
    interrupt: &AtomicBool,
    on_tokens: &mut dyn FnMut(u64),
) -> Result<Vec<Vec<Completion>>> {
    check(model, groups, sampling)?;
    let device = model.device();
    let tensor = |values: &[i64]| Tensor::from_slice(values).to_device(device);
    let mut samples: Vec<Sample> =
        groups.iter().flat_map(|group| group.samples.iter().map(|counters| begin(group, counters))).collect();
    if samples.is_empty() {
        return Ok(groups.iter().map(|_| Vec::new()).collect());
    }

    // 1. Each prompt once, then its keys and values and its logits for each of its samples.
    let decoder = model.decoder();
    let longest = groups.iter().map(|group| group.prompt.len()).max().unwrap_or(0);
    let mut ids = vec![model.config().padding(); groups.len() * longest];
    for (row, group) in ids.chunks_mut(longest).zip(groups) {
        row[..group.prompt.len()].copy_from_slice(&group.prompt);
    }
    let lengths: Vec<i64> = groups.iter().map(|group| group.prompt.len() as i64).collect();
    let (prompts, logits) =
        decoder.prefill(&tensor(&ids).view([groups.len() as i64, longest as i64]), &tensor(&lengths));
    let owners: Vec<i64> =
        groups.iter().enumerate().flat_map(|(index, group)| group.samples.iter().map(move |_| index as i64)).collect();
    let mut logits = logits.index_select(0, &tensor(&owners));
    // The last token of a completion is never read again.
    let slots = longest + sampling.max_new_tokens - 1;
    let mut cache = prompts.expand(&tensor(&owners), slots as i64);
    drop(prompts);

    // 2. A token for every row, until all have ended. `rows` says which sample a row of the cache holds.
    let mut rows: Vec<usize> = (0..samples.len()).collect();
    let mut mask = visible(&samples, &rows, longest, slots).map(|mask| mask.to_device(device));
    for token in 0..sampling.max_new_tokens {
        if interrupt.load(Ordering::Relaxed) {
            return Err(Interrupted.into());
        }
        let written = choose(model, &logits, &mut samples, &rows, sampling, token)?;
        on_tokens(written);
        if samples.iter().all(|sample| sample.done) {
            break;
        }
        if compact(&mut cache, &mut rows, &samples, &tensor) {
            mask = visible(&samples, &rows, longest, slots).map(|mask| mask.to_device(device));
        }
        let last = |row: &usize| samples[*row].completion.ids.last().copied().unwrap_or(0);
        // A row that has ended and not left yet stays at its last position: what it computes is never used.
        let place = |row: &usize| samples[*row].prompt + samples[*row].completion.ids.len() as i64 - 1;
        let tokens: Vec<i64> = rows.iter().map(last).collect();
        let positions: Vec<i64> = rows.iter().map(place).collect();
        logits = decoder.step(&tensor(&tokens), &tensor(&positions), &mut cache, mask.as_ref());
    }

    // 3. Back to groups.
    let mut completions = samples.into_iter().map(|sample| sample.completion);
    Ok(groups.iter().map(|group| completions.by_ref().take(group.samples.len()).collect()).collect())
}

fn check(model: &Transformer, groups: &[Group], sampling: &Sampling) -> Result<()> {
    let Sampling { temperature, max_new_tokens } = *sampling;
    ensure!(temperature.is_finite() && temperature >= 0.0, "the temperature is {temperature}, but must be at least 0");
    ensure!(max_new_tokens > 0, "`max_new_tokens` is 0, so there is nothing to generate");
    let (limit, vocabulary) = (model.config().max_position_embeddings, model.config().vocab_size);
    for (index, group) in groups.iter().enumerate() {
        let length = group.prompt.len();
        ensure!(length > 0, "the prompt of group {index} is empty");
        ensure!(
            (length + max_new_tokens) as i64 <= limit,
            "the prompt of group {index} has {length} tokens: with {max_new_tokens} new ones it exceeds the model's {limit} positions"
        );
        let strange = group.prompt.iter().find(|&&id| !(0..vocabulary).contains(&id));
        ensure!(
            strange.is_none(),
            "the prompt of group {index} has the id {strange:?} beyond the vocabulary of {vocabulary}"
        );
    }
    Ok(())
}

fn begin(group: &Group, counters: &[u64]) -> Sample {
    Sample {
        stream: rng("sample", counters),
        prompt: group.prompt.len() as i64,
        completion: Completion { ids: Vec::new(), logprobs: Vec::new(), finish: Finish::Length },
        done: false,
    }
}

/// Draws the token `token` of every row whose sample goes on, from `logits` `[R, V]`; gives how many were written.
fn choose(
    model: &Transformer,
    logits: &Tensor,
    samples: &mut [Sample],
    rows: &[usize],
    sampling: &Sampling,
    token: usize,
) -> Result<u64> {
    let vocabulary = model.config().vocab_size as usize;
    let values = Vec::<f32>::try_from(&logits.view(-1)).context("cannot read the logits")?;
    let draw_row = |(row, &index): (usize, &usize)| -> Option<(usize, Option<(i64, f32)>)> {
        let sample = &samples[index];
        let uniform = || uniform_at(&sample.stream, token as u64);
        let row = &values[row * vocabulary..(row + 1) * vocabulary];
        (!sample.done).then(|| (index, draw(row, sampling.temperature, uniform)))
    };
    // Threads pay for themselves only over large vocabularies; no result depends on them.
    let drawn: Vec<(usize, Option<(i64, f32)>)> = if values.len() < 1 << 16 {
        rows.iter().enumerate().filter_map(draw_row).collect()
    } else {
        rows.par_iter().enumerate().filter_map(draw_row).collect()
    };
    for (index, choice) in &drawn {
        let (id, logprob) = choice.with_context(|| {
            format!("the model's logits are not finite at token {token} of sample {index} of the chunk")
        })?;
        let sample = &mut samples[*index];
        sample.completion.ids.push(id);
        sample.completion.logprobs.push(logprob);
        if model.config().eos_token_id.contains(&id) {
            sample.completion.finish = Finish::Stop;
            sample.done = true;
        }
        sample.done |= token + 1 == sampling.max_new_tokens;
    }
    Ok(drawn.len() as u64)
}

/// Chooses an id by `logits` and gives it with its log-probability; `None` when a logit is not finite.
///
/// At temperature 0 it is the highest logit, the lowest id among equals. Else it is the first id with
/// `cdf > u * cdf_last`, the unnormalised cumulative sum being formed in fp64 in the order of ids.
pub fn draw(logits: &[f32], temperature: f64, uniform: impl FnOnce() -> f64) -> Option<(i64, f32)> {
    let mut highest = 0;
    for (id, logit) in logits.iter().enumerate() {
        if !logit.is_finite() {
            return None;
        }
        if *logit > logits[highest] {
            highest = id;
        }
    }
    let greedy = temperature == 0.0;
    let temperature = if greedy { 1.0 } else { temperature };
    let top = f64::from(*logits.get(highest)?);
    let scaled = |logit: f32| (f64::from(logit) - top) / temperature;
    let mut total = 0.0;
    let cumulative: Vec<f64> = logits
        .iter()
        .map(|&logit| {
            total += scaled(logit).exp();
            total
        })
        .collect();
    let id = if greedy {
        highest
    } else {
        let bound = uniform() * total;
        // u < 1, so the last id qualifies unless rounding lifted the product to the total itself.
        cumulative.iter().position(|&sum| sum > bound).unwrap_or(highest)
    };
    Some((id as i64, (scaled(logits[id]) - total.ln()) as f32))
}

/// What each row may see of its slots, `[R, 1, 1, slots]`: all but the gap behind a prompt shorter than the longest.
/// `None` where no row has a gap.
fn visible(samples: &[Sample], rows: &[usize], longest: usize, slots: usize) -> Option<Tensor> {
    if rows.iter().all(|&row| samples[row].prompt == longest as i64) {
        return None;
    }
    let mut mask = vec![0f32; rows.len() * slots];
    for (row, &index) in mask.chunks_mut(slots).zip(rows) {
        row[samples[index].prompt as usize..longest].fill(f32::NEG_INFINITY);
    }
    Some(Tensor::from_slice(&mask).view([rows.len() as i64, 1, 1, slots as i64]).to_kind(Kind::Float))
}

/// Moves the last rows that go on into the places of rows that have ended, once these are an eighth of all.
fn compact(cache: &mut KvCache, rows: &mut Vec<usize>, samples: &[Sample], tensor: &dyn Fn(&[i64]) -> Tensor) -> bool {
    let active = rows.iter().filter(|&&row| !samples[row].done).count();
    if (rows.len() - active) * 8 < rows.len() {
        return false;
    }
    let holes = (0..active).filter(|&place| samples[rows[place]].done);
    let movers = (active..rows.len()).filter(|&place| !samples[rows[place]].done);
    let (to, from): (Vec<i64>, Vec<i64>) = holes.zip(movers).map(|(to, from)| (to as i64, from as i64)).unzip();
    for (&to, &from) in to.iter().zip(&from) {
        rows[to as usize] = rows[from as usize];
    }
    rows.truncate(active);
    cache.compact(&tensor(&from), &tensor(&to), active as i64);
    true
}
