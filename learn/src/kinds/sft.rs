//! `sft`: supervised fine-tuning, a token-mean cross-entropy over the tokens that the mask marks.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Instant;

use anyhow::{Context as _, bail, ensure};
use pipe::pipeline::stage::{Interrupted, Stage as _, StageContext};
use pipe::stages::sft::Sft;
use pipe::stages::tokens::TokensFolder;
use pipe::stages::training::Validate;
use pipe::telemetry::Metrics;
use serde::{Deserialize, Serialize};
use serde_json::json;
use tch::Kind;

use crate::batch::{Batch, Row};
use crate::codec::Codec;
use crate::loss::{supervised_loss, token_logprobs};
use crate::memory::Forecast;
use crate::model::{Transformer, new_tokens};
use crate::optimizer::learning_rate;
use crate::order::Order;
use crate::pass::Pass;
use crate::prompts::Prompts;
use crate::session::{Session, rate, states};
use crate::training::{Published, Terms, Training, VALIDATE};
use crate::validate::Validation;
use crate::{device, memory, phases, preflight};

/// What the loop counts besides its steps.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
struct Own {
    /// Tokens that went through the model, padding not counted.
    tokens: u64,
}

/// Runs the stage.
pub fn run(params: &Sft, context: &mut StageContext) -> anyhow::Result<()> {
    // Open.
    let device = device::open(&context.resources)?;
    let free = memory::free(device);
    let terms = terms(params, context)?;
    let (folder, model, from) = match (&params.model, &params.continue_from) {
        (Some(model), None) => {
            let folder = context.input(model)?.to_owned();
            let lora = params.lora.as_ref();
            let model = Transformer::load_to_train(&folder, device, params.precision, lora, params.seed)?;
            (folder, model, None)
        }
        (None, Some(from)) => {
            let folder = context.input(from)?.to_owned();
            let from = Published::open(&folder)?;
            from.check(&terms, params.steps, &[VALIDATE])?;
            let model = from.model(&folder, device, params.precision, params.lora.as_ref(), params.seed)?;
            (folder, model, Some(from))
        }
        _ => bail!("a training begins either at a `model` or where another ended (`continue`)"),
    };
    let model = model.with_activation_checkpointing(params.activation_checkpointing);
    let tokens = Arc::new(TokensFolder::open(context.input(&params.data)?)?);
    preflight::tokenizers(&folder, Codec::open(&folder)?.digest(), &tokens)?;
    let rows = tokens.split(&params.split)?;
    context.note(format!("training: {}", preflight::rows(&tokens, &rows, model.config(), &folder)?));
    if params.lora.is_some()
        && let Some(note) = new_tokens::refuse(&folder, rows.iter().map(|&row| tokens.row_ids(row)))?
    {
        context.note(note);
    }
    let mut order = Order::new("sft.order", params.seed, rows);
    let micro = params.micro_batch_size as usize;
    let shapes = memory::micro_batches(&tokens, &mut order, params.steps, params.batch_size, micro);
    let mut forecast = Forecast::training(&model, params.validate.is_some(), memory::SUPERVISED, shapes);

    // Resume.
    let (mut training, resumed) =
        Training::<Own>::resume(model, &params.optimizer, &states(&context.work), from.as_ref())?;
    if let Some(from) = &from {
        training.goes_on(from, &terms, context);
    }
    // Adapters leave the rows of tokens as they are.
    if params.lora.is_none() {
        training.counters.occurred.watch(&folder)?;
    }
    let recorded = training.counters.step - u64::from(training.counters.unrecorded.is_some());
    let recorded = resumed.then_some(recorded);
    let mut validation = None;
    if let Some(validate) = &params.validate {
        let prompts = Prompts::open(&folder, Arc::clone(&tokens), &context.interrupt)?;
        let positions = training.model.config().max_position_embeddings as u64;
        let limit = completion_limit(&tokens, &params.split, &validate.split, positions)?;
        let opened = Validation::open(validate, &prompts, &training.model, limit, params.seed, recorded, context)?;
        forecast = forecast.generating(opened.forecast(&training.model, &prompts));
        validation = Some((opened, prompts));
    }
    context.note(forecast.check(free)?);
    let mut session = Session::open(context, params, &training.model, params.steps, recorded)?;

    // Loop.
    while training.counters.step < params.steps || training.counters.unrecorded.is_some() {
        let mut metrics = match training.counters.unrecorded.take() {
            Some(metrics) => metrics,
            None => step(params, &tokens, &mut order, &mut training)?,
        };
        let done = training.counters.step;
        if let Some((validation, prompts)) = validation.as_mut().filter(|(due, _)| due.is_due(done, params.steps)) {
            let validated =
                phases::time("evaluation", || validation.run(&training.model, prompts, done, None, context));
            match validated {
                Ok(validated) => {
                    training.consider(validated.selecting);
                    metrics.extend(validated.metrics);
                }
                Err(error) if error.is::<Interrupted>() => {
                    training.counters.unrecorded = Some(metrics);
                    training.save()?;
                    return Err(error);
                }
                Err(error) => return Err(error.context(format!("validating step {done}"))),
            }
        }
        session.record(context, done, metrics);
        if context.interrupted() && done < params.steps {
            training.save()?;
            return Err(Interrupted.into());
        }
        if session.save_is_due(context) {
            phases::time("saving", || training.save())?;
            session.saved();
        }
    }

    // Finish.
    if from.is_none() {
        training.audit(&folder, context)?;
    }
    training.publish_state(&context.output("state"), &folder, &terms, None)?;
    training.publish(&context.output("last"), &context.output("best"), &folder)
}

/// What a stage that goes on from this one must agree with: what decides which rows a step takes, and what `best` means.
fn terms(params: &Sft, context: &StageContext) -> anyhow::Result<Terms> {
    let data = context.inputs.get(&params.data.reference).map(|data| data.digest.clone());
    // How often it is made does not change what a validation finds.
    let validate = params.validate.as_ref().map(|validate| Validate { every: 1, ..validate.clone() });
    Ok(Terms::from([
        ("kind".to_owned(), json!(Sft::KIND)),
        ("data".to_owned(), json!(data)),
        ("split".to_owned(), json!(params.split)),
        ("seed".to_owned(), json!(params.seed)),
        ("batch_size".to_owned(), json!(params.batch_size)),
        ("lora".to_owned(), json!(params.lora)),
        (VALIDATE.to_owned(), serde_json::to_value(validate)?),
    ]))
}

/// One optimizer step over the next `batch_size` rows; gives its metrics.
fn step(
    params: &Sft,
    tokens: &TokensFolder,
    order: &mut Order,
    training: &mut Training<Own>,
) -> anyhow::Result<BTreeMap<String, f64>> {
    let began = Instant::now();
    let Training { model, optimizer, counters, .. } = training;
    let step = counters.step;
    let mut rows = order.take(step * params.batch_size, params.batch_size);
    // Neighbours of like length share a micro-batch with little padding; which rows are in the batch is settled before.
    rows.sort_by_key(|&row| tokens.row_ids(row).len());
    let ids: Vec<Vec<i64>> =
        rows.iter().map(|&row| tokens.row_ids(row).iter().map(|id| i64::from(*id)).collect()).collect();
    let rows: Vec<Row<'_>> = rows.iter().zip(&ids).map(|(&row, ids)| Row { ids, mask: tokens.row_mask(row) }).collect();
    // Counted over the whole batch before the first backward pass, so that micro-batches do not change the gradient.
    let targets: u64 = rows.iter().map(Row::targets).sum();
    let read: u64 = ids.iter().map(|ids| ids.len() as u64).sum();
    let mut metrics = Metrics::default();
    model.zero_gradients();
    for rows in rows.chunks(micro_batch(params.micro_batch_size, rows.len())) {
        let batch = Batch::new(rows, model.device())?;
        if batch.count() == 0 {
            continue;
        }
        let (pass, logits, loss, value) = phases::time("forward", || {
            let pass = Pass::forward(model, &batch);
            let logits = model.logits(pass.states());
            let loss = supervised_loss(&token_logprobs(&logits, &batch.targets, 1.0), targets as f64);
            let value = loss.double_value(&[]);
            (pass, logits, loss, value)
        });
        phases::count_training(model, &batch, rows.iter().map(|row| row.ids.len()).sum());
        ensure!(value.is_finite(), "the loss is {value} at step {}", step + 1);
        phases::time("backward", || {
            pass.backward(&batch, &loss)?;
            phases::settle(model.device());
            anyhow::Ok(())
        })?;
        let right = logits.argmax(-1, false).eq_tensor(&batch.targets).sum(Kind::Int64).int64_value(&[]);
        metrics.total("loss", value);
        metrics.mean("token_accuracy", right as f64, batch.count() as f64);
    }
    let learning_rate = learning_rate(&params.schedule, params.learning_rate, step, params.steps);
    let norm = phases::time("optimizer", || optimizer.step(model.weights(), learning_rate));
    let norm = norm.with_context(|| format!("at step {}", step + 1))?;
    counters.step += 1;
    counters.own.tokens += read;
    for row in &rows {
        counters.occurred.note(row.ids, row.mask);
    }

    // Metrics.
    metrics.total("learning_rate", learning_rate);
    metrics.total("gradient_norm", norm);
    metrics.total("tokens", counters.own.tokens as f64);
    if let Some(rate) = rate(read, began) {
        metrics.total("tokens_per_second", rate);
    }
    Ok(metrics.values())
}

/// Rows in a forward pass; 0 stands for all.
fn micro_batch(size: u64, rows: usize) -> usize {
    if size == 0 { rows.max(1) } else { size as usize }
}

/// Tokens that a reply of a validation may have: those of the longest demonstrated reply of either split, as far as the
/// model's positions reach behind the longest prompt.
fn completion_limit(tokens: &TokensFolder, train: &str, validation: &str, positions: u64) -> anyhow::Result<u64> {
    let (train, validation) = (tokens.split(train)?, tokens.split(validation)?);
    let prompt = |row: &usize| tokens.prompt_ids(*row).len() as u64;
    let reply = |row: &usize| {
        let turns = preflight::turns_of(tokens, *row).into_iter();
        turns.map(|turn| (turn.end as u64).saturating_sub(prompt(row).max(turn.start as u64))).max().unwrap_or(0)
    };
    let longest = train.iter().chain(&validation).map(reply).max().unwrap_or(0);
    let room = positions.saturating_sub(validation.iter().map(prompt).max().unwrap_or(0));
    Ok(longest.min(room).max(1))
}
