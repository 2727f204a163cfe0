//! Tests of passes in bf16 over fp32 master weights.

use pipe::stages::training::Optimizer;
use tch::{Device, Kind, Tensor, no_grad};

use crate::batch::{Batch, Row};
use crate::loss::{supervised_loss, token_logprobs};
use crate::model::Transformer;
use crate::model::decoding::Decoding;
use crate::optimizer::AdamW;
use crate::parity::Mismatch;
use crate::sandbox;

/// Elements of bf16 have 8 bits of precision: neighbours of a number are this far apart, beside it, at least.
const ULP: f64 = 1.0 / 256.0;

fn rows() -> Vec<(Vec<i64>, Vec<u8>)> {
    let row = |row: usize, length: usize| {
        let ids = (0..length).map(|place| ((row * 5 + place * 7 + place * place) % 13) as i64).collect();
        let mask = (0..length).map(|place| u8::from(place > 0 && (place > 2 || row.is_multiple_of(3)))).collect();
        (ids, mask)
    };
    [9usize, 4, 7, 9, 2, 5, 8, 3, 6, 9].into_iter().enumerate().map(|(index, length)| row(index, length)).collect()
}

/// The gradient of a supervised loss over all rows, in micro-batches of `size` rows.
fn gradient(model: &Transformer, rows: &[(Vec<i64>, Vec<u8>)], size: usize) -> Tensor {
    let borrowed: Vec<Row<'_>> = rows.iter().map(|(ids, mask)| Row { ids, mask }).collect();
    let targets = borrowed.iter().map(Row::targets).sum::<u64>() as f64;
    model.zero_gradients();
    for rows in borrowed.chunks(size) {
        let batch = Batch::new(rows, Device::Cpu).expect("a batch");
        let logits = model.logits(&batch.states(model));
        assert_eq!(logits.kind(), Kind::Float, "log-probabilities are fp32");
        supervised_loss(&token_logprobs(&logits, &batch.targets, 0.9), targets).backward();
    }
    model.weights().gradient().copy()
}

#[test]
fn layers_compute_in_bf16_and_gradients_are_gathered_in_fp32_near_those_of_fp32() {
    for model in sandbox::families() {
        let half = model.half();
        let ids = Tensor::from_slice2(&[[1i64, 5, 7, 3, 8, 9, 2]]);
        assert_eq!(no_grad(|| sandbox::hidden(&half, &ids)).kind(), Kind::BFloat16);
        assert_eq!((half.weights().flat().kind(), half.weights().gradient().kind()), (Kind::Float, Kind::Float));
        let (ours, wide) = (gradient(&half, &rows(), 10), gradient(&model, &rows(), 10));
        let distance = sandbox::relative(&ours, &wide);
        // Sharp little models make much of a rounding; a step that is missing or wrong would make more.
        assert!(distance > 1e-5 && distance < 0.15, "{distance} of {:?}", model.config());
        for (name, gradient) in half.weights().named("", half.weights().gradient()) {
            assert!(gradient.abs().max().double_value(&[]) > 0.0, "{name} has no gradient");
        }
        assert_eq!(gradient(&half, &rows(), 10), ours, "the same bits again");
    }
}

/// The bound is 1e-2: every micro-batch rounds its gradient of a matrix to bf16 once, and their sum is fp32.
#[test]
fn gradients_in_bf16_hardly_depend_on_the_split_or_the_order_of_rows() {
    for model in sandbox::families() {
        let model = model.half();
        let rows = rows();
        let mut permuted = rows.clone();
        permuted.reverse();
        let whole = gradient(&model, &rows, 10);
        for (rows, size) in [(&rows, 1), (&rows, 2), (&rows, 4), (&permuted, 10), (&permuted, 3)] {
            let distance = sandbox::relative(&gradient(&model, rows, size), &whole);
            assert!(distance <= 1e-2, "size {size}: {distance}");
        }
    }
}

#[test]
fn micro_batches_add_up_in_fp32() {
    let model = sandbox::families().swap_remove(1).half();
    let rows = rows();
    let batch = Batch::new(&[Row { ids: &rows[0].0, mask: &rows[0].1 }], Device::Cpu).expect("a batch");
    let add = |share: f64| {
        let logprobs = token_logprobs(&model.logits(&batch.states(&model)), &batch.targets, 1.0);
        supervised_loss(&logprobs, 1.0 / share).backward();
    };
    model.zero_gradients();
    add(1.0);
    let whole = model.weights().gradient().copy();
    // Each of these is below half of what bf16 resolves beside the first.
    (0..8).for_each(|_| add(1.0 / 1024.0));
    let more = (model.weights().gradient() - &whole) * 128.0;
    let distance = sandbox::relative(&more, &whole);
    assert!(distance < 1e-2, "{distance}");
}

#[test]
fn an_update_below_what_bf16_resolves_is_kept_and_adds_up() {
    let model = sandbox::families().swap_remove(1).half();
    let acting = || model.weights().flat().to_kind(Kind::BFloat16);
    let (before, rounded) = (model.weights().flat().copy(), acting());
    let parameters = Optimizer { max_gradient_norm: 0.0, ..Optimizer::default() };
    let mut optimizer = AdamW::new(model.weights(), &parameters);
    let _ = gradient(&model, &rows(), 10);
    optimizer.step(model.weights(), 1e-5).expect("a step");
    let moved = (model.weights().flat() - &before).abs();
    let has = model.weights().gradient().abs().gt(1e-6);
    let large = before.abs().gt(0.1).logical_and(&has);
    let count = large.sum(Kind::Int64).int64_value(&[]);
    assert!(count > 100, "{count} weights are looked at");
    let of_large = |tensor: &Tensor| tensor.masked_select(&large);
    // Adam's first step is the learning rate long.
    assert!(of_large(&moved).min().double_value(&[]) > 0.5e-5, "every update has arrived");
    assert!(of_large(&(&moved / before.abs())).max().double_value(&[]) < ULP / 10.0, "and none reaches bf16");
    let still = of_large(&acting().eq_tensor(&rounded).to_kind(Kind::Float)).mean(Kind::Float).double_value(&[]);
    assert!(still > 0.95, "{still} of the weights act as before");
    for _ in 0..400 {
        optimizer.step(model.weights(), 1e-5).expect("a step along the same gradient");
    }
    let still = of_large(&acting().eq_tensor(&rounded).to_kind(Kind::Float)).mean(Kind::Float).double_value(&[]);
    assert!(still < 0.2, "{still} of the weights act as before, though all have moved");
}

#[test]
fn the_sampler_is_the_trainer_within_the_bounds_of_bf16() {
    for (place, model) in sandbox::families().into_iter().enumerate() {
        let model = model.half();
        let prompts: Vec<Vec<i64>> =
            [7i64, 3, 12].iter().map(|&length| (0..length).map(|at| at * at % 13).collect()).collect();
        let prompts: Vec<&[i64]> = prompts.iter().map(Vec::as_slice).collect();
        let owners = [0usize, 0, 1, 1, 2, 2];
        let mut written: Vec<Vec<i64>> = owners.iter().map(|&owner| prompts[owner].to_vec()).collect();
        let mut pairs: Vec<(f32, f32)> = Vec::new();
        let (mut decoding, first) = Decoding::begin(&model, &prompts, &owners, 20).expect("it begins");
        let mut sampled: Vec<Tensor> = Vec::new();
        let mut logits = first;
        for token in 0..20usize {
            assert_eq!(logits.kind(), Kind::Float, "the head is fp32");
            sampled.push(logits.log_softmax(-1, Kind::Float));
            let next = |sample: usize| ((sample * 5 + token * 3) % 13) as i64;
            written.iter_mut().enumerate().for_each(|(sample, ids)| ids.push(next(sample)));
            if token < 19 {
                logits = decoding.step(next).expect("a step");
            }
        }
        for (sample, ids) in written.iter().enumerate() {
            let trained = no_grad(|| {
                model.logits(&sandbox::hidden(&model, &Tensor::from_slice(ids).unsqueeze(0)).squeeze_dim(0))
            });
            let trained = trained.log_softmax(-1, Kind::Float);
            let before = prompts[owners[sample]].len();
            for (token, sampled) in sampled.iter().enumerate() {
                let id = ids[before + token];
                let of = |table: &Tensor, row: i64| table.double_value(&[row, id]) as f32;
                pairs.push((of(sampled, sample as i64), of(&trained, (before + token) as i64 - 1)));
            }
        }
        let mismatch = Mismatch::of(pairs.into_iter());
        let bf16 = pipe::stages::training::Precision::Bf16;
        assert!(mismatch.is_rounding(bf16, 1.0), "family {place}: {mismatch:?}");
    }
}
