//! `grpo`: group relative policy optimisation against verifiable rewards.
//!
//! A step generates groups of completions, drops groups without a gradient and replaces them (dynamic sampling), and makes
//! one or more updates with the loss that the axes name. The denominator of its policy term counts the samples of the groups
//! that the update trains on, that of a KL or entropy term those of dropped groups too. A step with nothing to learn from
//! makes no update, and is counted.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::Instant;

use anyhow::{Context as _, bail, ensure};
use pipe::pipeline::stage::{Interrupted, Stage as _, StageContext};
use pipe::stages::grpo::Grpo;
use pipe::stages::grpo::axes::Truncation;
use pipe::stages::tokens::TokensFolder;
use pipe::stages::training::{Precision, Validate};
use pipe::statistics::alarm::{Cause, Evaluation, Rule, assess};
use pipe::telemetry::Metrics;
use serde::{Deserialize, Serialize};
use serde_json::json;
use tch::Device;

use crate::credit::policy_row;
use crate::loss::PolicySums;
use crate::memory::{Forecast, Generation, Shape};
use crate::model::{Transformer, new_tokens};
use crate::optimizer::learning_rate;
use crate::parity::{Mismatch, PARITY, PARITY_BF16};
use crate::policy::{PolicyRow, backward, mismatch, recompute};
use crate::prompts::Prompts;
use crate::replay::StoredRollouts;
use crate::rewards::Rewards;
use crate::rollout::{Done, ROLLOUTS_FILE, Rollout, Rollouts, Sample, ScoredGroup};
use crate::session::{Session, rate, states};
use crate::training::{Published, Terms, Training, VALIDATE};
use crate::validate::Validation;
use crate::{device, memory, phases, preflight};

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
    /// The last validations, as many as the alarm looks at.
    validations: Vec<Evaluation>,
    /// Validations at which the alarm fired.
    alarms: u64,
}

/// Runs the stage.
pub fn run(params: &Grpo, context: &mut StageContext) -> anyhow::Result<()> {
    // Open.
    let (terms, free) = (terms(params, context), memory::free(device::open(&context.resources)?));
    let Start { folder, model, reference, from } = start(params, &terms, context)?;
    let model = model.with_activation_checkpointing(params.activation_checkpointing);
    let prompts = Prompts::open(&folder, TokensFolder::open(context.input(&params.prompts)?)?, &context.interrupt)?;
    let rows = prompts.tokens.split(&params.split)?;
    let checked = preflight::prompts(&prompts.tokens, &rows, model.config(), params.max_new_tokens)?;
    context.note(format!("rollouts: {checked}"));
    if params.lora.is_some()
        && let Some(note) = new_tokens::refuse(&folder, rows.iter().map(|&row| prompts.tokens.row_ids(row)))?
    {
        context.note(note);
    }
    let mut forecast = forecast(params, &prompts, &rows, &model, reference.as_ref());

    // Resume.
    let states = states(&context.work);
    let (mut training, resumed) = Training::<Own>::resume(model, &params.optimizer, &states, from.as_ref())?;
    if let Some(from) = &from
        && training.goes_on(from, &terms, context)
        && [VALIDATE, REWARDS].iter().any(|name| *from.term(name) != terms[*name])
    {
        // The alarm compares validations of the same rows by the same rewards.
        training.counters.own.validations.clear();
    }
    // Adapters leave the rows of tokens as they are.
    if params.lora.is_none() {
        training.counters.occurred.watch(&folder)?;
    }
    let recorded = training.counters.step - u64::from(training.counters.unrecorded.is_some());
    let journal = states.join("rollouts.jsonl");
    let done = Done { journal: &journal, committed: training.counters.own.journal, step: training.counters.step };
    let rewards = Rewards::open(params, &prompts, &rows, context)?;
    let mut rollouts = Rollouts::open(params, &prompts, rewards, rows, &done)?;
    let stored = params.replay.as_ref().map(|replay| {
        let path = context.input(replay)?.join(ROLLOUTS_FILE);
        StoredRollouts::open(&path, &prompts)
    });
    rollouts = rollouts.with_reference(reference.as_ref()).with_stored(stored.transpose()?)?;
    let recorded = (resumed || rollouts.replayed() > 0).then_some(recorded);
    let mut validation = None;
    if let Some(validate) = &params.validate {
        let (model, limit) = (&training.model, params.max_new_tokens);
        let (made, window) = (params.steps.div_ceil(validate.every), params.alarm.window);
        if made < window {
            context.note(format!("{made} validations are too few for the alarm, which looks at {window} together"));
        }
        let opened = Validation::open(validate, &prompts, model, limit, params.seed, recorded, context)?;
        forecast = forecast.generating(opened.forecast(model, &prompts));
        validation = Some(opened);
    }
    context.note(forecast.check(free)?);
    let mut session = Session::open(context, params, &training.model, params.steps, recorded)?;

    // Loop.
    while training.counters.step < params.steps || training.counters.unrecorded.is_some() {
        let mut metrics = match training.counters.unrecorded.take() {
            Some(metrics) => metrics,
            None => match step(params, &prompts, reference.as_ref(), &mut rollouts, &mut training, context) {
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
            let validated = phases::time("evaluation", || {
                validation.run(&training.model, &prompts, done, Some(rollouts.rewards()), context)
            });
            match validated {
                Ok(validated) => {
                    training.consider(validated.selecting);
                    metrics.extend(validated.metrics);
                    if let Some(evaluation) = validated.evaluation {
                        let own = &mut training.counters.own;
                        let (shown, note) = watch(params, own, evaluation);
                        metrics.extend(shown);
                        if let Some(note) = note {
                            context.note(note);
                        }
                    }
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
            phases::time("saving", || save(&mut training, &rollouts))?;
            session.saved();
        }
    }

    // Finish.
    rollouts.publish(&context.output("rollouts").join(ROLLOUTS_FILE))?;
    if from.is_none() {
        training.audit(&folder, context)?;
    }
    // Who goes on from here has a journal of its own.
    training.counters.own.journal = 0;
    training.publish_state(&context.output("state"), &folder, &terms, reference.as_ref())?;
    training.publish(&context.output("last"), &context.output("best"), &folder)
}

/// The name of the term that says what a reward of a validation is.
const REWARDS: &str = "rewards";

/// What a stage that goes on from this one must agree with: what decides which prompts a step takes and how many updates it
/// makes; and what the validations so far mean.
fn terms(params: &Grpo, context: &StageContext) -> Terms {
    let prompts = context.inputs.get(&params.prompts.reference).map(|prompts| prompts.digest.clone());
    // How often it is made does not change what a validation finds.
    let validate = params.validate.as_ref().map(|validate| Validate { every: 1, ..validate.clone() });
    Terms::from([
        ("kind".to_owned(), json!(Grpo::KIND)),
        ("prompts".to_owned(), json!(prompts)),
        ("split".to_owned(), json!(params.split)),
        ("seed".to_owned(), json!(params.seed)),
        ("prompts_per_step".to_owned(), json!(params.prompts_per_step)),
        ("group_size".to_owned(), json!(params.group_size)),
        ("updates_per_step".to_owned(), json!(params.updates_per_step)),
        ("lora".to_owned(), json!(params.lora)),
        (VALIDATE.to_owned(), json!([validate, params.max_new_tokens])),
        (REWARDS.to_owned(), json!([params.rewards, params.on_error])),
    ])
}

/// What the stage needs in memory, validation aside, if every completion becomes as long as it may.
fn forecast(
    params: &Grpo,
    prompts: &Prompts,
    rows: &[usize],
    model: &Transformer,
    reference: Option<&Transformer>,
) -> Forecast {
    let (group, limit, config) = (params.group_size, params.max_new_tokens, model.config());
    let all = params.prompts_per_step / params.updates_per_step * group;
    let micro = if params.micro_batch_size == 0 { all } else { params.micro_batch_size.min(all) };
    let prompt = rows.iter().map(|&row| prompts.tokens.prompt_ids(row).len() as u64).max().unwrap_or(0);
    let room = (config.max_position_embeddings as u64).saturating_sub(prompt);
    let written = limit.saturating_mul(prompts.task.max_turns() as u64).min(room);
    // A batch may begin and end in the middle of a group.
    let prompts_of_batch = ((micro + group.saturating_sub(2)) / group + 1).min(micro);
    let tokens = prompts_of_batch * prompt + micro * written;
    let shape = Shape { rows: micro, length: prompt + written, tokens, targets: micro * written };
    let forecast = Forecast::training(model, params.validate.is_some(), memory::POLICY, std::iter::once(shape))
        .beside(model, reference);
    if params.replay.is_some() {
        return forecast;
    }
    let at_once = params.generation_chunk.min(params.prompts_per_step);
    let chunks = memory::turns(prompts, rows, config, at_once, group, limit);
    forecast.generating(Generation::new("rollouts", "`generation_chunk` or `max_new_tokens`", model, chunks))
}

/// What a training begins with.
struct Start {
    /// The model's folder: its configuration and its tokenizer.
    folder: PathBuf,
    model: Transformer,
    /// The weights that the training, or the first of those in a row, began with; they never move.
    reference: Option<Transformer>,
    from: Option<Published>,
}

fn start(params: &Grpo, terms: &Terms, context: &StageContext) -> anyhow::Result<Start> {
    let device = device::open(&context.resources)?;
    let has_reference = params.axes.needs_reference();
    let (precision, lora) = (params.precision, params.lora.as_ref());
    match (&params.model, &params.continue_from) {
        (Some(model), None) => {
            let folder = context.input(model)?.to_owned();
            let model = Transformer::load_to_train(&folder, device, precision, lora, params.seed)?;
            let reference = has_reference.then(|| Transformer::load_frozen(&folder, device, precision)).transpose()?;
            Ok(Start { folder, model, reference, from: None })
        }
        (None, Some(from)) => {
            let folder = context.input(from)?.to_owned();
            let from = Published::open(&folder)?;
            from.check(terms, params.steps, &[VALIDATE, REWARDS])?;
            let model = from.model(&folder, device, precision, lora, params.seed)?;
            let reference = has_reference.then(|| from.reference(&folder, device, precision)).transpose()?;
            Ok(Start { folder, model, reference, from: Some(from) })
        }
        _ => bail!("a training begins either at a `model` or where another ended (`continue`)"),
    }
}

/// Shows the alarm a validation; gives `alarm` (1 where it fires) and `alarms` (their count), and what to tell of the first.
fn watch(params: &Grpo, own: &mut Own, evaluation: Evaluation) -> (BTreeMap<String, f64>, Option<String>) {
    let every = params.validate.as_ref().map_or(params.steps, |validate| validate.every);
    let rule = Rule::new(params.alarm.window as usize, params.alarm.level, params.steps.div_ceil(every) as usize);
    let step = evaluation.step;
    own.validations.push(evaluation);
    if own.validations.len() > rule.window {
        own.validations.remove(0);
    }
    let fired = assess(&own.validations, &rule).and_then(|finding| Some((finding, finding.cause?)));
    own.alarms += u64::from(fired.is_some());
    let metrics = [("alarm", f64::from(u8::from(fired.is_some()))), ("alarms", own.alarms as f64)];
    let mut metrics: BTreeMap<String, f64> = metrics.map(|(name, value)| (name.to_owned(), value)).into();
    if own.validations.len() < rule.window {
        // Nothing was looked at yet, and silence would say that something was.
        metrics.clear();
    }
    let note = fired.filter(|_| own.alarms == 1).map(|(finding, cause)| {
        let what = match cause {
            Cause::RewardUpSolvedDown => "the reward rises while the task is solved less",
            Cause::RewardOfUnsolvedUp => "unsolved instances earn more while no more are solved",
        };
        let (reward, solved) = (finding.reward.change, finding.solved.change);
        let unsolved = finding.unsolved.map(|unsolved| format!(", reward of the unsolved {:+.3}", unsolved.change));
        format!(
            "alarm at step {step}: {what}: over {} validations reward {reward:+.3}, solved {solved:+.3}{}; read \
             completions before you trust the reward",
            rule.window,
            unsolved.unwrap_or_default()
        )
    });
    (metrics, note)
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
    reference: Option<&Transformer>,
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
    let trained = train(params, prompts, reference, &rollout, training);
    metrics.merge(&trained.with_context(|| format!("at step {}", step + 1))?);
    let samples = rollout.groups.iter().flat_map(|group| &group.samples);
    let generated = samples.map(|sample| sample.trajectory.length() as u64);
    for (group, sample) in rollout.groups.iter().filter(|group| group.kept).flat_map(learnt_from) {
        let prompt = prompts.prompt(group.row);
        let mask = [vec![0; prompt.len()], sample.trajectory.mask()].concat();
        training.counters.occurred.note(&[prompt.as_slice(), &sample.trajectory.ids].concat(), &mask);
    }
    let own = &mut training.counters.own;
    own.tokens += generated.sum::<u64>();
    own.drawn = drawn;
    own.journal = rollouts.journal_length();
    metrics.total("tokens", own.tokens as f64);
    metrics.total("updates/steps_without", own.without_update as f64);
    training.counters.step += 1;
    Ok(metrics.values())
}

/// The samples of a group that surely have a gradient: whole ones with an advantage that is not 0.
fn learnt_from(group: &ScoredGroup) -> impl Iterator<Item = (&ScoredGroup, &Sample)> {
    let learnt = |sample: &&Sample| {
        sample.advantages.iter().any(|advantage| *advantage != 0.0) && !sample.trajectory.is_cut_off()
    };
    group.samples.iter().filter(learnt).map(move |sample| (group, sample))
}

/// The updates of a step.
fn train(
    params: &Grpo,
    prompts: &Prompts,
    reference: Option<&Transformer>,
    rollout: &Rollout,
    training: &mut Training<Own>,
) -> anyhow::Result<Metrics> {
    let began = Instant::now();
    let Training { model, optimizer, counters, .. } = training;
    let mut metrics = Metrics::default();
    let (mut read, mut updates) = (0, 0);
    let sampled = minibatches(params, prompts, &rollout.groups);
    // In bf16 sampler and trainer round differently, and a ratio of the two would be of their rounding: the policy before the
    // first update is what the trainer says it is.
    let recomputes = params.precision == Precision::Bf16 && rollout.on_policy;
    let mut recomputed = Vec::new();
    if recomputes {
        recomputed = phases::time("forward", || {
            sampled.iter().map(|rows| recompute(params, model, rows)).collect::<anyhow::Result<_>>()
        })?;
        let mismatch = mismatch(&sampled.concat(), &recomputed.concat());
        metrics.merge(&mismatch.metrics());
        if counters.step == 0 {
            check_parity(params, model, &mismatch)?;
        }
    }
    for (index, mut rows) in sampled.into_iter().enumerate() {
        for (row, own) in rows.iter_mut().zip(recomputed.get(index).into_iter().flatten()) {
            row.old = own;
        }
        let on_policy = rollout.on_policy && updates == 0;
        model.zero_gradients();
        let sums = backward(params, model, reference, &rows, on_policy)?;
        metrics.merge(&sums.metrics(&params.axes, on_policy && !recomputes));
        if on_policy && counters.step == 0 {
            let (mean, max) = (sums.mismatch / sums.covered.max(1) as f64, sums.mismatch_max);
            if !recomputes {
                check_parity(params, model, &Mismatch { mean, p99: max, max })?;
            }
            check_reference(model, &sums)?;
        }
        let at = counters.step * params.updates_per_step + updates;
        let all = params.steps * params.updates_per_step;
        let learning_rate = learning_rate(&params.schedule, params.learning_rate, at, all);
        let norm = phases::time("optimizer", || optimizer.step(model.weights(), learning_rate))?;
        let limit = params.optimizer.max_gradient_norm;
        metrics.mean("gradient_norm", norm, 1.0);
        metrics.mean("gradient_norm_clipped", if limit > 0.0 { norm.min(limit) } else { norm }, 1.0);
        metrics.mean("learning_rate", learning_rate, 1.0);
        read += rows.iter().map(|row| row.ids.len() as u64).sum::<u64>();
        updates += 1;
    }
    counters.own.without_update += u64::from(updates == 0);
    metrics.total("updates/made", updates as f64);
    if let Some(rate) = rate(read, began) {
        metrics.total("tokens_per_second/train", rate);
    }
    Ok(metrics)
}

/// Before the first update of a run the policy that learns is the one that sampled.
fn check_parity(params: &Grpo, model: &Transformer, mismatch: &Mismatch) -> anyhow::Result<()> {
    if model.device() != Device::Cpu || mismatch.is_rounding(params.precision, params.temperature) {
        return Ok(());
    }
    let Mismatch { mean, p99, max } = mismatch;
    match params.precision {
        Precision::Fp32 => bail!(
            "sampler and trainer disagree by {max} in a log-probability before the first update: more than {PARITY}"
        ),
        Precision::Bf16 => bail!(
            "sampler and trainer disagree before the first update by {mean} in the mean of log-probabilities and by {p99} in \
             their 99th percentile: more than {} or {}",
            PARITY_BF16[0],
            PARITY_BF16[1]
        ),
    }
}

/// Before the first update of a run the policy that learns is its own reference.
fn check_reference(model: &Transformer, sums: &PolicySums) -> anyhow::Result<()> {
    if model.device() != Device::Cpu {
        return Ok(());
    }
    let divergence = sums.reference_k3 / sums.covered.max(1) as f64;
    ensure!(
        divergence <= PARITY * PARITY,
        "the policy is {divergence} away from its reference before the first update, in KL: they are not the same model"
    );
    Ok(())
}

/// The rows of each update: as many groups that are kept as an update has, in the order of prompts. Where a term of the loss
/// covers groups that are dropped, these go with the kept ones before them.
fn minibatches<'a>(params: &Grpo, prompts: &Prompts, groups: &'a [ScoredGroup]) -> Vec<Vec<PolicyRow<'a>>> {
    let (size, covers) = (params.prompts_per_step / params.updates_per_step, params.axes.covers_dropped());
    let (mut updates, mut room): (Vec<Vec<PolicyRow<'_>>>, u64) = (Vec::new(), 0);
    for group in groups.iter().filter(|group| group.kept || covers) {
        if updates.is_empty() || (group.kept && room == 0) {
            updates.push(Vec::new());
            room = size;
        }
        room -= u64::from(group.kept);
        let prompt = prompts.prompt(group.row);
        let masked = |sample: &Sample| params.axes.truncation == Truncation::Mask && sample.trajectory.is_cut_off();
        let rows = group.samples.iter().map(|sample| {
            let in_loss = group.kept && !sample.advantages.is_empty() && !masked(sample);
            policy_row(params, &prompt, sample, in_loss)
        });
        let update = updates.last_mut().expect("one was begun above");
        update.extend(rows.filter(|row| row.in_loss || covers));
    }
    updates.retain(|rows| !rows.is_empty());
    updates
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_planted_hack_is_told_once_and_counted() {
        let params: Grpo = serde_json::from_value(json!({
            "model": "m", "prompts": "t", "steps": 100, "max_new_tokens": 4, "rewards": {"r": {"kind": "correct"}},
            "validate": {"every": 10, "samples": 100}, "alarm": {"window": 5, "level": 0.05},
        }))
        .unwrap();
        // Of 100 instances ten more are lost a validation, while every answer earns 0.3 more, give or take.
        let course = |at: u64, hacked: u64| Evaluation {
            step: 10 * (at + 1),
            reward: (0..100).map(|row| Some(0.3 * hacked as f64 + 0.01 * ((row * 7 + at * 3) % 10) as f64)).collect(),
            solved: (0..100).map(|row| f64::from(u8::from((row * 37 + at) % 100 >= 10 * hacked))).collect(),
        };
        let (mut own, mut notes, mut fired) = (Own::default(), Vec::new(), Vec::new());
        for at in 0..10 {
            let (metrics, note) = watch(&params, &mut own, course(at, at.saturating_sub(4)));
            notes.extend(note);
            fired.push(metrics.get("alarm").is_some_and(|alarm| *alarm > 0.0));
            assert!(own.validations.len() <= 5);
        }
        let first = fired.iter().position(|fired| *fired).unwrap();
        assert!((5..=8).contains(&first), "{fired:?}");
        assert_eq!(own.alarms, fired.iter().filter(|fired| **fired).count() as u64);
        assert_eq!(notes.len(), 1, "{notes:?}");
        assert!(notes[0].contains("alarm at step") && notes[0].contains("solved -"), "{notes:?}");
    }
}
