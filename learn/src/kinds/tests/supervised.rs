//! Traps of supervised training, end to end: what is reported, what is padded, what an epoch covers.

use tch::{Device, no_grad};

use super::*;
use crate::batch::{Batch, Row};
use crate::loss::token_logprobs;
use crate::model::Transformer;
use crate::sandbox;

fn first_line(micro_batch_size: u64) -> Value {
    let mut params = sft();
    params["steps"] = json!(1);
    params["micro_batch_size"] = json!(micro_batch_size);
    let job = Job::new(&FLOW, "sft", params);
    job.run(&[]).unwrap();
    job.metrics().remove(0)
}

/// Minus the log-probability of each target of a row that is alone in its batch.
fn losses(model: &Transformer, ids: &[i64], mask: &[u8]) -> Vec<f64> {
    let batch = Batch::new(&[Row { ids, mask }], Device::Cpu).unwrap();
    let logits = no_grad(|| model.logits(&batch.states(model)));
    let logprobs = token_logprobs(&logits, &batch.targets, 1.0);
    Vec::<f32>::try_from(logprobs).unwrap().into_iter().map(|logprob| -f64::from(logprob)).collect()
}

#[test]
fn the_reported_loss_is_the_mean_over_all_targets_of_the_batch_whatever_the_micro_batch() {
    let model = Transformer::load(FLOW.path("base"), Device::Cpu).unwrap();
    let tokens = TokensFolder::open(FLOW.path("tokens")).unwrap();
    let drawn = Order::new("sft.order", 3, tokens.split("train").unwrap()).take(0, 6);
    let mut each = Vec::new();
    for row in drawn {
        let ids: Vec<i64> = tokens.row_ids(row).iter().map(|id| i64::from(*id)).collect();
        each.extend(losses(&model, &ids, tokens.row_mask(row)));
    }
    let wanted = each.iter().sum::<f64>() / each.len() as f64;
    for size in [0, 1, 4, 5] {
        let line = first_line(size);
        let loss = line["loss"].as_f64().unwrap();
        assert!((loss - wanted).abs() < 1e-5, "micro-batches of {size}: {loss} against {wanted}");
    }
}

#[test]
fn padding_with_the_end_of_sequence_takes_no_target_away_and_adds_none() {
    let (_folder, model) = sandbox::model(&json!({}));
    let end = sandbox::END;
    let (short, long) = ([1, 5, end], [1, 7, 8, 9, 4, end]);
    let rows = [Row { ids: &short, mask: &[0, 1, 1] }, Row { ids: &long, mask: &[0, 0, 0, 1, 1, 1] }];
    let gradient = |rows: &[Row<'_>]| {
        let batch = Batch::new(rows, Device::Cpu).unwrap();
        model.zero_gradients();
        let logits = model.logits(&batch.states(&model));
        crate::loss::supervised_loss(&token_logprobs(&logits, &batch.targets, 1.0), 5.0).backward();
        (Vec::<i64>::try_from(&batch.targets).unwrap(), model.weights().gradient().copy())
    };
    let (targets, both) = gradient(&rows);
    assert_eq!(targets, [5, end, 9, 4, end], "both ends are learnt");
    // Rows of unequal length have nothing between them that could be taken for an end.
    let apart = gradient(&rows[..1]).1 + gradient(&rows[1..]).1;
    let off = sandbox::relative(&both, &apart);
    assert!(off < 1e-6, "{off}");
}

#[test]
fn the_steps_of_an_epoch_take_every_row_once_the_tail_too() {
    let tokens = TokensFolder::open(FLOW.path("tokens")).unwrap();
    let rows = tokens.split("train").unwrap();
    // 48 rows in batches of 7: six whole batches and six rows more, which the next batch begins with.
    let mut order = Order::new("sft.order", 3, rows.clone());
    let mut drawn: Vec<usize> = (0..14).flat_map(|step| order.take(step * 7, 7)).collect();
    drawn.truncate(2 * rows.len());
    for epoch in drawn.chunks_mut(rows.len()) {
        epoch.sort_unstable();
        assert_eq!(epoch, rows);
    }
}
