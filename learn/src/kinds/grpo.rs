//! `grpo`: group relative policy optimisation against verifiable rewards.
//!
//! A step generates groups of completions, drops groups without a gradient and replaces them (dynamic sampling), and makes
//! one or more updates with a clipped, token-mean policy-gradient loss. The denominator of a loss counts the tokens of the
//! groups that its update trains on. A step without such a group makes no update, and is counted.

use std::collections::BTreeMap;
use std::time::Instant;

use anyhow::{Context as _, ensure};
use pipe::pipeline::stage::{Interrupted, StageContext};
use pipe::stages::grpo::Grpo;
use pipe::stages::tokens::TokensFolder;
use pipe::telemetry::Metrics;
use serde::{Deserialize, Serialize};
use tch::{Device, Kind, Tensor};

use crate::batch::{Batch, Row};
use crate::loss::{entropy, policy_loss, token_logprobs};
use crate::model::Transformer;
use crate::optimizer::learning_rate;
use crate::prompts::Prompts;
use crate::rewards::Rewards;
use crate::rollout::{ROLLOUTS_FILE, Rollout, Rollouts, Sample, ScoredGroup};
use crate::session::{Session, rate, states};
use crate::training::Training;
use crate::validate::Validation;
use crate::{device, preflight};

/// How far the sampler's log-probabilities may lie from the trainer's on the first step, in fp32 on a CPU, at temperature 1
/// or above; below, the temperature divides the logits' own error too.
const PARITY: f64 = 1e-4;

/// What the loop counts besides its steps.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
struct Own {
    /// Prompts drawn.
    drawn: u64,
    /// Bytes of the journal of rollouts that belong to finished steps.
    journal: u64,
    /// Steps that had no group to learn from.
    without_update: u64,
    /// Tokens generated.
    tokens: u64,
}

/// Runs the stage.
pub fn run(params: &Grpo, context: &mut StageContext) -> anyhow::Result<()> {
    // Open.
    let folder = context.input(&params.model)?.to_owned();
    let model = Transformer::load(&folder, device::open(&context.resources)?)?;
    let prompts = Prompts::open(&folder, TokensFolder::open(context.input(&params.prompts)?)?)?;
    let rows = prompts.tokens.split(&params.split)?;
    let checked = preflight::prompts(&prompts.tokens, &rows, model.config(), params.max_new_tokens)?;
    context.note(format!("rollouts: {checked}"));

    // Resume.
    let states = states(&context.work);
    let (mut training, resumed) = Training::<Own>::resume(model, &params.optimizer, &states, None)?;
    let recorded = training.counters.step - u64::from(training.counters.unrecorded.is_some());
    let journal = states.join("rollouts.jsonl");
    let (committed, at) = (training.counters.own.journal, training.counters.step);
    let rewards = Rewards::open(params, &prompts, &rows, context)?;
    let mut rollouts = Rollouts::open(params, &prompts, rewards, rows, &journal, committed, at)?;
    let recorded = (resumed || rollouts.replayed() > 0).then_some(recorded);
    let mut validation = None;
    if let Some(validate) = &params.validate {
        let (model, limit) = (&training.model, params.max_new_tokens);
        validation = Some(Validation::open(validate, &prompts, model, limit, params.seed, recorded, context)?);
    }
    let mut session = Session::open(context, params, params.steps, recorded)?;

    // Loop.
    while training.counters.step < params.steps || training.counters.unrecorded.is_some() {
        let mut metrics = match training.counters.unrecorded.take() {
            Some(metrics) => metrics,
            None => match step(params, &prompts, &mut rollouts, &mut training, context) {
                Ok(metrics) => metrics,
                Err(error) if error.is::<Interrupted>() => {
                    // Within a rollout the weights are those of the step's beginning; the journal has the rest.
                    save(&mut training, &rollouts)?;
                    return Err(error);
                }
                Err(error) => return Err(error),
            },
        };
        let done = training.counters.step;
        if let Some(validation) = validation.as_mut().filter(|validation| validation.is_due(done, params.steps)) {
            match validation.run(&training.model, &prompts, done, context) {
                Ok(validated) => {
                    training.consider(validated.selecting);
                    metrics.extend(validated.metrics);
                }
                Err(error) if error.is::<Interrupted>() => {
                    training.counters.unrecorded = Some(metrics);
                    save(&mut training, &rollouts)?;
                    return Err(error);
                }
                Err(error) => return Err(error.context(format!("validating step {done}"))),
            }
        }
        session.record(context, done, metrics);
        if context.interrupted() && done < params.steps {
            save(&mut training, &rollouts)?;
            return Err(Interrupted.into());
        }
        if session.save_is_due(context) {
            save(&mut training, &rollouts)?;
            session.saved();
        }
    }

    // Finish.
    rollouts.publish(&context.output("rollouts").join(ROLLOUTS_FILE))?;
    training.publish(&context.output("last"), &context.output("best"), &folder)
}

/// Saves the state, and before it what it counts on.
fn save(training: &mut Training<Own>, rollouts: &Rollouts<'_>) -> anyhow::Result<()> {
    rollouts.sync()?;
    training.save()
}

/// One step: a rollout, then its updates; gives its metrics.
fn step(
    params: &Grpo,
    prompts: &Prompts,
    rollouts: &mut Rollouts<'_>,
    training: &mut Training<Own>,
    context: &mut StageContext,
) -> anyhow::Result<BTreeMap<String, f64>> {
    let step = training.counters.step;
    let mut drawn = training.counters.own.drawn;
    let rollout = rollouts.collect(&training.model, step, &mut drawn, context);
    let rollout = rollout.map_err(|error| {
        if error.is::<Interrupted>() { error } else { error.context(format!("in the rollout of step {}", step + 1)) }
    })?;
    let mut metrics = rollouts.metrics(&rollout);
    metrics.merge(&train(params, prompts, &rollout, training).with_context(|| format!("at step {}", step + 1))?);
    let samples = rollout.groups.iter().flat_map(|group| &group.samples);
    let generated = samples.map(|sample| sample.trajectory.length() as u64);
    let own = &mut training.counters.own;
    own.tokens += generated.sum::<u64>();
    own.drawn = drawn;
    own.journal = rollouts.journal_length();
    metrics.total("tokens", own.tokens as f64);
    metrics.total("updates/steps_without", own.without_update as f64);
    training.counters.step += 1;
    Ok(metrics.values())
}

/// The updates of a step over the groups that are kept.
fn train(params: &Grpo, prompts: &Prompts, rollout: &Rollout, training: &mut Training<Own>) -> anyhow::Result<Metrics> {
    let began = Instant::now();
    let Training { model, optimizer, counters, .. } = training;
    let mut metrics = Metrics::default();
    let kept: Vec<&ScoredGroup> = rollout.groups.iter().filter(|group| group.kept).collect();
    let (mut read, mut updates) = (0, 0);
    let groups_an_update = (params.prompts_per_step / params.updates_per_step) as usize;
    for groups in kept.chunks(groups_an_update) {
        let mut rows: Vec<Sequence<'_>> = groups.iter().flat_map(|group| sequences(prompts, group)).collect();
        // Neighbours of like length share a micro-batch with little padding.
        rows.sort_by_key(|row| row.ids.len());
        // Counted over the whole update before the first backward pass, so that micro-batches do not change the gradient.
        let denominator: usize = rows.iter().map(|row| row.sample.trajectory.length()).sum();
        model.zero_gradients();
        for rows in rows.chunks(micro_batch(params.micro_batch_size, rows.len())) {
            let part = backward(params, model, rows, denominator as f64, updates == 0)?;
            metrics.merge(&part);
        }
        let at = counters.step * params.updates_per_step + updates;
        let all = params.steps * params.updates_per_step;
        let learning_rate = learning_rate(&params.schedule, params.learning_rate, at, all);
        metrics.mean("gradient_norm", optimizer.step(model.weights(), learning_rate)?, 1.0);
        metrics.mean("learning_rate", learning_rate, 1.0);
        read += rows.iter().map(|row| row.ids.len() as u64).sum::<u64>();
        updates += 1;
    }
    counters.own.without_update += u64::from(updates == 0);

    // Metrics.
    let mismatch = metrics.values().get("sampling/logprob_difference_max").copied().unwrap_or(0.0);
    ensure!(
        counters.step > 0 || model.device() != Device::Cpu || mismatch <= PARITY / params.temperature.min(1.0),
        "sampler and trainer disagree by {mismatch} in a log-probability before the first update: more than {PARITY}"
    );
    metrics.total("updates/made", updates as f64);
    if let Some(rate) = rate(read, began) {
        metrics.total("tokens_per_second/train", rate);
    }
    Ok(metrics)
}

/// A prompt and what follows it, of which the model's tokens alone are targets.
struct Sequence<'a> {
    ids: Vec<i64>,
    mask: Vec<u8>,
    sample: &'a Sample,
}

/// The sequences of a group: those of its samples that have a total.
fn sequences<'a>(prompts: &Prompts, group: &'a ScoredGroup) -> impl Iterator<Item = Sequence<'a>> {
    let prompt = prompts.prompt(group.row);
    group.samples.iter().filter(|sample| sample.total.is_some()).map(move |sample| {
        let mask = [vec![0; prompt.len()], sample.trajectory.mask()].concat();
        Sequence { ids: [prompt.as_slice(), &sample.trajectory.ids].concat(), mask, sample }
    })
}

/// Adds the gradient of a micro-batch; gives its metrics. `denominator` counts the tokens of the whole update.
///
/// `first` says that no update has been made since the samples were drawn: what sampler and trainer differ by is then an
/// error of computation alone.
fn backward(
    params: &Grpo,
    model: &Transformer,
    rows: &[Sequence<'_>],
    denominator: f64,
    first: bool,
) -> anyhow::Result<Metrics> {
    let inputs: Vec<Row<'_>> = rows.iter().map(|row| Row { ids: &row.ids, mask: &row.mask }).collect();
    let batch = Batch::new(&inputs, model.config().padding(), model.device())?;
    // Both [N] f32, in the order of the batch's targets: by row, then by place.
    let old: Vec<f32> = rows.iter().flat_map(|row| row.sample.trajectory.logprobs.iter().copied()).collect();
    let advantages: Vec<f32> = rows.iter().flat_map(|row| advantages(row.sample)).collect();
    let tensor = |values: &[f32]| Tensor::from_slice(values).to_device(model.device());
    let logits = model.logits(&batch.select(&model.hidden(&batch.ids)));
    let new = token_logprobs(&logits, &batch.targets, params.temperature);
    let clip = &params.clip;
    let policy = policy_loss(&new, &tensor(&old), &tensor(&advantages), clip.low, clip.high, denominator);
    let loss = policy.loss.double_value(&[]);
    ensure!(loss.is_finite(), "the loss is {loss}");
    policy.loss.backward();

    let mut metrics = Metrics::default();
    let tokens = policy.tokens as f64;
    // A token mean over all updates of the step: summands are weighted by their tokens, not by their update.
    metrics.mean("loss", loss * denominator, tokens);
    metrics.mean("policy/entropy", entropy(&logits, params.temperature).sum(Kind::Double).double_value(&[]), tokens);
    metrics.mean("policy/ratio_mean", policy.ratio_sum, tokens);
    metrics.max("policy/ratio_max", policy.ratio_max);
    metrics.mean("policy/old_kl", policy.old_kl_sum, tokens);
    metrics.mean("policy/clip_low", policy.clipped_low as f64, tokens);
    metrics.mean("policy/clip_high", policy.clipped_high as f64, tokens);
    if first {
        metrics.max("sampling/logprob_difference_max", policy.mismatch_max);
    }
    Ok(metrics)
}

/// The advantage of each of the model's tokens: that of its turn.
fn advantages(sample: &Sample) -> impl Iterator<Item = f32> {
    let turns = sample.trajectory.turns.iter().zip(&sample.advantages);
    turns.flat_map(|(turn, advantage)| std::iter::repeat_n(*advantage as f32, turn.end - turn.begin))
}

/// Rows in a forward pass; 0 stands for all.
fn micro_batch(size: u64, rows: usize) -> usize {
    if size == 0 { rows.max(1) } else { size as usize }
}
