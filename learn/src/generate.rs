//! Batched generation: prompts of groups to completions, with the sampler's law.
//!
//! One uniform number a token, drawn by the counters of the sample and the token's index; how it chooses a token is in
//! [`crate::draw`]. What is computed depends on the chunk's content alone: rows that have finished leave the batch at points
//! that the completions decide, never a clock. It knows ids, not text, and nothing of rewards.

use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::{Context, Result, ensure};
use pipe::pipeline::stage::Interrupted;
use pipe::random::{rng, uniform_at};
use pipe::stages::sampling::Filters;
use pipe::tasks::Finish;
use rayon::prelude::*;
use tch::Tensor;

use crate::codec::Codec;
use crate::draw::{Choice, Filter, draw, draw_filtered, draw_rows};
use crate::model::Transformer;
use crate::model::decoding::Decoding;
use crate::native::gpu;
use crate::phases;

pub use crate::draw::Kept;

/// How tokens are chosen.
#[derive(Clone, Debug, PartialEq)]
pub struct Sampling {
    /// Logits are divided by it; 0 is greedy.
    pub temperature: f64,
    /// Tokens in a completion, at most, its end included.
    pub max_new_tokens: usize,
    /// Which tokens may be drawn; `None` is every one.
    pub filter: Option<Filter>,
    /// Whether the tokens that might have been drawn are told with each completion.
    pub tells_kept: bool,
    /// Sequences of ids that end a completion as soon as it ends in one of them, besides the model's own end.
    pub stop: Vec<Vec<i64>>,
}

impl Sampling {
    /// Every token may be drawn, and the model's own end alone ends a completion.
    pub fn new(temperature: f64, max_new_tokens: u64) -> Self {
        let (filter, stop) = (None, Vec::new());
        Self { temperature, max_new_tokens: max_new_tokens as usize, filter, tells_kept: false, stop }
    }

    /// What a stage asks for; `codec` turns its stop texts into ids.
    pub fn open(filters: &Filters, temperature: f64, max_new_tokens: u64, codec: &Codec) -> Result<Self> {
        let Filters { top_k, top_p, min_p, stop } = filters;
        let encode = |text: &String| {
            let ids = codec.encode(text).with_context(|| format!("reading the stop text `{text}`"))?;
            ensure!(!ids.is_empty(), "the stop text `{text}` has no token");
            Ok(ids)
        };
        // Greedy choice takes the most probable token, which every filter keeps.
        let narrows = filters.narrows() && temperature > 0.0;
        let filter = narrows.then_some(Filter { top_k: *top_k as usize, top_p: *top_p, min_p: *min_p });
        let stop = stop.iter().map(encode).collect::<Result<_>>()?;
        Ok(Self { filter, stop, ..Self::new(temperature, max_new_tokens) })
    }
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
    /// How many of the last ids end the sequence and are no text: 1 for the model's own end, else 0. A stop text is text.
    pub unsaid: usize,
    /// The tokens that might have been drawn at each id, where a filter was on and they were asked for.
    pub kept: Option<Kept>,
}

/// Where one sample stands.
struct Sample {
    stream: rand_chacha::ChaCha8Rng,
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
    let tells_kept = sampling.tells_kept && sampling.filter.is_some();
    let mut samples: Vec<Sample> =
        groups.iter().flat_map(|group| group.samples.iter().map(|counters| begin(counters, tells_kept))).collect();
    if samples.is_empty() {
        return Ok(groups.iter().map(|_| Vec::new()).collect());
    }

    // 1. Each prompt once, for all of its samples.
    let prompts: Vec<&[i64]> = groups.iter().map(|group| group.prompt.as_slice()).collect();
    let owners: Vec<usize> =
        groups.iter().enumerate().flat_map(|(index, group)| group.samples.iter().map(move |_| index)).collect();
    let (mut decoding, mut logits) = phases::time("prefill", || {
        let begun = Decoding::begin(model, &prompts, &owners, sampling.max_new_tokens);
        phases::settle(model.device());
        begun
    })?;

    // 2. A token for every sample, until all have ended.
    for token in 0..sampling.max_new_tokens {
        if interrupt.load(Ordering::Relaxed) {
            return Err(Interrupted.into());
        }
        let written =
            phases::time("sampling", || choose(model, &logits, &mut samples, decoding.rows(), sampling, token))?;
        on_tokens(written);
        if samples.iter().all(|sample| sample.done) {
            break;
        }
        decoding.forget(|sample| samples[sample].done);
        phases::count_decoding(model, decoding.rows().len(), decoding.seen());
        logits = phases::time("decode", || {
            let logits = decoding.step(|sample| samples[sample].completion.ids.last().copied().unwrap_or(0));
            phases::settle(model.device());
            logits
        })?;
    }

    // 3. Back to groups.
    let mut completions = samples.into_iter().map(|sample| sample.completion);
    Ok(groups.iter().map(|group| completions.by_ref().take(group.samples.len()).collect()).collect())
}

fn check(model: &Transformer, groups: &[Group], sampling: &Sampling) -> Result<()> {
    let Sampling { temperature, max_new_tokens, .. } = *sampling;
    ensure!(temperature.is_finite() && temperature >= 0.0, "the temperature is {temperature}, but must be at least 0");
    ensure!(max_new_tokens > 0, "`max_new_tokens` is 0, so there is nothing to generate");
    ensure!(sampling.stop.iter().all(|ids| !ids.is_empty()), "a stop sequence without an id");
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

fn begin(counters: &[u64], tells_kept: bool) -> Sample {
    Sample {
        stream: rng("sample", counters),
        completion: Completion {
            ids: Vec::new(),
            logprobs: Vec::new(),
            finish: Finish::Length,
            unsaid: 0,
            kept: tells_kept.then(Kept::default),
        },
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
    let uniform = |index: usize| uniform_at(&samples[index].stream, token as u64);
    let going: Vec<(usize, usize)> =
        rows.iter().enumerate().map(|(row, &index)| (row, index)).filter(|&(_, index)| !samples[index].done).collect();
    let drawn: Vec<(usize, Option<Choice>)> = match &sampling.filter {
        // A filter puts tokens in order, which is done where they can be looked at one by one.
        None if gpu::takes(logits.device()) => {
            let greedy = sampling.temperature == 0.0;
            let uniforms: Vec<f64> = rows.iter().map(|&index| if greedy { 0.0 } else { uniform(index) }).collect();
            let mut chosen = draw_rows(logits, sampling.temperature, &uniforms)?;
            going.iter().map(|&(row, index)| (index, chosen[row].take())).collect()
        }
        filter => {
            let vocabulary = model.config().vocab_size as usize;
            let values = Vec::<f32>::try_from(&logits.view(-1)).context("cannot read the logits")?;
            let draw_row = |&(row, index): &(usize, usize)| {
                let row = &values[row * vocabulary..(row + 1) * vocabulary];
                let choice = match filter {
                    None => draw(row, sampling.temperature, || uniform(index)),
                    Some(filter) => draw_filtered(row, sampling.temperature, filter, || uniform(index)),
                };
                (index, choice)
            };
            // Threads pay for themselves only over large vocabularies; no result depends on them.
            if values.len() < 1 << 16 {
                going.iter().map(draw_row).collect()
            } else {
                going.par_iter().map(draw_row).collect()
            }
        }
    };
    for (index, choice) in &drawn {
        let Choice { id, logprob, kept } = choice.as_ref().with_context(|| {
            format!("the model's logits are not finite at token {token} of sample {index} of the chunk")
        })?;
        let sample = &mut samples[*index];
        let completion = &mut sample.completion;
        completion.ids.push(*id);
        completion.logprobs.push(*logprob);
        if let Some(all) = &mut completion.kept {
            all.push(kept);
        }
        let ends = model.config().eos_token_id.contains(id);
        if ends || sampling.stop.iter().any(|stop| completion.ids.ends_with(stop)) {
            completion.finish = Finish::Stop;
            completion.unsaid = usize::from(ends);
            sample.done = true;
        }
        sample.done |= token + 1 == sampling.max_new_tokens;
    }
    Ok(drawn.len() as u64)
}

#[cfg(test)]
mod tests {
    use rand_chacha::ChaCha8Rng;
    use serde_json::json;
    use tch::{Device, Kind, no_grad};

    use super::*;
    use crate::batch::{Batch, Row};
    use crate::loss::token_logprobs;
    use crate::native::{AsOnGpu, instead};
    use crate::sandbox;

    static NEVER: AtomicBool = AtomicBool::new(false);

    fn groups() -> Vec<Group> {
        let prompts: [&[i64]; 3] = [&[1, 5, 7, 3], &[1, 9], &[1, 4, 4]];
        let samples = |instance: u64| (0..4).map(|sample| vec![8, 0, 0, instance, sample]).collect();
        prompts
            .iter()
            .zip(0..)
            .map(|(prompt, index)| Group { prompt: prompt.to_vec(), samples: samples(index) })
            .collect()
    }

    fn run(model: &Transformer, groups: &[Group], temperature: f64) -> Vec<Vec<Completion>> {
        let sampling = Sampling::new(temperature, 12);
        let mut heard = 0;
        let made = generate(model, groups, &sampling, &NEVER, &mut |count| heard += count).expect("completions");
        assert_eq!(heard, made.iter().flatten().map(|completion| completion.ids.len() as u64).sum::<u64>());
        made
    }

    #[test]
    fn sampler_and_trainer_agree_on_log_probabilities() {
        let (_folder, model) = sandbox::model(&json!({}));
        for temperature in [0.7, 1.0] {
            let (groups, made) = (groups(), run(&model, &groups(), temperature));
            let mut compared = 0;
            for (group, completion) in
                groups.iter().zip(&made).flat_map(|(group, made)| made.iter().map(move |one| (group, one)))
            {
                let ids = [group.prompt.clone(), completion.ids.clone()].concat();
                let mask: Vec<u8> = (0..ids.len()).map(|place| u8::from(place >= group.prompt.len())).collect();
                let batch = Batch::new(&[Row { ids: &ids, mask: &mask }], Device::Cpu).expect("a batch");
                let trained = no_grad(|| {
                    let logits = model.logits(&batch.states(&model));
                    token_logprobs(&logits, &batch.targets, temperature)
                });
                let sampled = Tensor::from_slice(&completion.logprobs);
                assert!(sandbox::distance(&trained, &sampled) < 1e-4, "temperature {temperature}");
                compared += completion.ids.len();
            }
            assert!(compared > 50);
        }
    }

    #[test]
    fn tokens_are_the_hand_rolled_inverse_of_the_distribution_without_a_cache() {
        let (_folder, model) = sandbox::model(&json!({}));
        let (groups, temperature) = (groups(), 1.3);
        let made = run(&model, &groups, temperature);
        for (group, completions) in groups.iter().zip(&made) {
            for (counters, completion) in group.samples.iter().zip(completions) {
                let stream = rng("sample", counters);
                let mut ids = group.prompt.clone();
                for (token, &written) in completion.ids.iter().enumerate() {
                    let logits = no_grad(|| {
                        model.logits(&sandbox::hidden(&model, &Tensor::from_slice(&ids).unsqueeze(0)).select(1, -1))
                    });
                    let logits = Vec::<f64>::try_from(&logits.view(-1).to_kind(Kind::Double)).expect("numbers");
                    let weights: Vec<f64> = logits.iter().map(|logit| (logit / temperature).exp()).collect();
                    let mut left = uniform_at(&stream, token as u64) * weights.iter().sum::<f64>();
                    let chosen = weights.iter().position(|weight| {
                        left -= weight;
                        left < 0.0
                    });
                    assert_eq!(chosen, Some(written as usize));
                    ids.push(written);
                }
                let ended = completion.ids.last() == Some(&sandbox::END);
                assert_eq!(completion.finish == Finish::Stop, ended);
                assert!(ended || completion.ids.len() == 12);
                assert_eq!(completion.ids.iter().filter(|&&id| id == sandbox::END).count(), usize::from(ended));
            }
        }
        let finished = made.iter().flatten().filter(|completion| completion.finish == Finish::Stop).count();
        assert!(finished > 0 && finished < 12, "both ends occur, so rows left the batch: {finished}");
        assert_ne!(made[0][0].ids, made[0][1].ids, "samples of a group differ");
    }

    #[test]
    fn the_same_chunk_gives_the_same_bits_and_batch_mates_do_not_matter() {
        let (_folder, model) = sandbox::model(&json!({}));
        let made = run(&model, &groups(), 1.0);
        assert_eq!(made, run(&model, &groups(), 1.0));
        let alone = run(&model, &groups()[1..2], 1.0);
        let ids = |completions: &[Completion]| completions.iter().map(|one| one.ids.clone()).collect::<Vec<_>>();
        assert_eq!(ids(&made[1]), ids(&alone[0]));
    }

    #[test]
    fn every_engine_and_every_place_of_drawing_writes_the_same() {
        for model in sandbox::families() {
            for temperature in [0.0, 1.0] {
                let usual = run(&model, &groups(), temperature);
                for path in [AsOnGpu::No, AsOnGpu::Steps, AsOnGpu::WithAttention] {
                    let other = instead(path, || run(&model, &groups(), temperature));
                    for (one, other) in usual.iter().flatten().zip(other.iter().flatten()) {
                        assert_eq!((&one.ids, one.finish), (&other.ids, other.finish), "{path:?}");
                        let near = |(one, other): (&f32, &f32)| (one - other).abs() <= 1e-5;
                        assert!(one.logprobs.iter().zip(&other.logprobs).all(near), "{path:?}");
                    }
                }
            }
        }
    }

    #[test]
    fn sampler_and_trainer_agree_on_what_a_filter_keeps() {
        let (_folder, model) = sandbox::model(&json!({}));
        let filters = [
            Filter { top_k: 3, top_p: 1.0, min_p: 0.0 },
            Filter { top_k: 0, top_p: 0.7, min_p: 0.0 },
            Filter { top_k: 0, top_p: 1.0, min_p: 0.3 },
            Filter { top_k: 8, top_p: 0.9, min_p: 0.1 },
        ];
        for filter in filters {
            let sampling = Sampling { filter: Some(filter), tells_kept: true, ..Sampling::new(0.7, 12) };
            let made = generate(&model, &groups(), &sampling, &NEVER, &mut |_| {}).expect("completions");
            let mut narrowed = 0;
            for (group, completion) in
                groups().iter().zip(&made).flat_map(|(group, made)| made.iter().map(move |one| (group.clone(), one)))
            {
                let kept = completion.kept.as_ref().expect("they were asked for");
                let ids = [group.prompt.clone(), completion.ids.clone()].concat();
                let mask: Vec<u8> = (0..ids.len()).map(|place| u8::from(place >= group.prompt.len())).collect();
                let batch = Batch::new(&[Row { ids: &ids, mask: &mask }], Device::Cpu).expect("a batch");
                let logits = no_grad(|| model.logits(&batch.states(&model)) / 0.7);
                assert_eq!(kept.len(), completion.ids.len());
                for (place, (&id, &sampled)) in completion.ids.iter().zip(&completion.logprobs).enumerate() {
                    // Summed by hand over the set that was told.
                    let weight = |id: i64| logits.double_value(&[place as i64, id]).exp();
                    let total: f64 = kept.at(place).iter().map(|id| weight(i64::from(*id))).sum();
                    assert!(kept.at(place).contains(&(id as u32)));
                    assert!(((weight(id) / total).ln() - f64::from(sampled)).abs() < 1e-4, "{filter:?}");
                    narrowed += usize::from(kept.at(place).len() < 13);
                }
            }
            assert!(narrowed > 50, "{filter:?} filters nothing here");
        }
        let silent = Sampling { tells_kept: false, ..Sampling { filter: Some(filters[0]), ..Sampling::new(0.7, 12) } };
        let made = generate(&model, &groups(), &silent, &NEVER, &mut |_| {}).expect("completions");
        assert!(made.iter().flatten().all(|completion| completion.kept.is_none()));
    }

    #[test]
    fn a_completion_ends_in_the_first_stop_sequence_that_it_writes() {
        let (_folder, model) = sandbox::model(&json!({}));
        let free = run(&model, &groups(), 1.0);
        let longest = free.iter().flatten().max_by_key(|completion| completion.ids.len()).expect("completions");
        let (pair, single) = (longest.ids[2..4].to_vec(), longest.ids[5]);
        let sampling = Sampling { stop: vec![pair.clone(), vec![single]], ..Sampling::new(1.0, 12) };
        let made = generate(&model, &groups(), &sampling, &NEVER, &mut |_| {}).expect("completions");
        let mut stopped = 0;
        for (free, made) in free.iter().flatten().zip(made.iter().flatten()) {
            let ends = |end: &usize| free.ids[..*end].ends_with(&pair) || free.ids[..*end].ends_with(&[single]);
            let end = (1..=free.ids.len()).find(ends).unwrap_or(free.ids.len());
            assert_eq!(made.ids, free.ids[..end], "a stop changes no draw before it");
            let own = made.ids.last() == Some(&sandbox::END);
            assert_eq!(made.finish == Finish::Stop, own || ends(&end));
            assert_eq!(made.unsaid, usize::from(own), "a stop text is text, the model's own end is none");
            stopped += usize::from(ends(&end));
        }
        assert!(stopped > 0);
        let empty = Sampling { stop: vec![vec![]], ..Sampling::new(1.0, 12) };
        assert!(generate(&model, &groups(), &empty, &NEVER, &mut |_| {}).is_err());
    }

    #[test]
    fn what_cannot_be_generated_is_refused() {
        let (_folder, model) = sandbox::model(&json!({}));
        let error = |groups: &[Group], temperature: f64, max_new_tokens: u64, stop: bool| {
            let sampling = Sampling::new(temperature, max_new_tokens);
            let made = generate(&model, groups, &sampling, &AtomicBool::new(stop), &mut |_| {});
            made.expect_err("it is refused")
        };
        let with = |prompt: &[i64]| vec![Group { prompt: prompt.to_vec(), samples: vec![vec![1]] }];
        assert!(error(&with(&[]), 1.0, 4, false).to_string().contains("empty"));
        assert!(error(&with(&[13]), 1.0, 4, false).to_string().contains("13"));
        assert!(error(&with(&[1]), 1.0, 64, false).to_string().contains("64 positions"));
        assert!(error(&with(&[1]), -1.0, 4, false).to_string().contains("temperature"));
        assert!(error(&with(&[1]), f64::NAN, 4, false).to_string().contains("temperature"));
        assert!(error(&groups(), 1.0, 4, true).is::<Interrupted>());
        sandbox::stir(&model, f64::NAN);
        assert!(error(&groups(), 1.0, 4, false).to_string().contains("not finite"));
        let none: Vec<Group> = vec![Group { prompt: vec![1], samples: vec![] }];
        assert_eq!(run(&model, &none, 1.0), vec![Vec::new()]);
    }

    #[test]
    fn greedy_needs_no_stream() {
        let (_folder, model) = sandbox::model(&json!({}));
        let other: Vec<Group> =
            groups().into_iter().map(|group| Group { samples: vec![vec![99]; 4], ..group }).collect();
        assert_eq!(run(&model, &groups(), 0.0), run(&model, &other, 0.0));
        let stream: ChaCha8Rng = rng("sample", &[99]);
        assert!(uniform_at(&stream, 0) < 1.0);
    }
}
