//! What a GPU computes with beside libtorch's ordinary operations, against these, before a stage begins: attention over
//! unequal lengths with its gradient and its isolation, attention of one token over a cache, and steps of generation that are
//! replayed.

use anyhow::{Context as _, Result, bail, ensure};
use serde_json::json;
use tch::{Device, Kind, Tensor, no_grad};

use super::{differentiated, distance, wave};
use crate::device;
use crate::model::layout::Segment;
use crate::model::rope::Rotation;
use crate::model::steps::Steps;
use crate::model::{Layout, ModelConfig, Transformer, packed, plain};
use crate::native::gpu::{self, Sequences};
use crate::native::{self, Heads};

/// The heads of the attention, as small as GPUs like them.
const HEADS: Heads = Heads { queries: 4, shared: 2, width: 64 };
/// Tokens of a prompt: more than a kernel takes at once, and no round number.
const PROMPT: usize = 147;

/// What is tried on `device`, `kind` being what attention over unequal lengths takes.
pub(super) fn check(device: Device, kind: Kind) -> Result<()> {
    if gpu::attends(device, kind, HEADS.width) {
        attention(device, kind).context("trying libtorch's attention over unequal lengths")?;
        isolation(device, kind).context("trying libtorch's attention over unequal lengths")?;
        cached(device, kind).context("trying libtorch's attention over unequal lengths")?;
    }
    if gpu::takes(device) {
        steps(device).context("trying steps of generation")?;
    }
    Ok(())
}

/// How far off results may be beside the largest of them.
fn allowed(kind: Kind) -> f64 {
    match kind {
        // Eight bits of precision, and sums of some hundred products of them. A mask or a scale that is wrong is off by much more.
        Kind::BFloat16 | Kind::Half => 5e-2,
        Kind::Double => 1e-11,
        _ => 2e-4,
    }
}

/// An error where `ours` is not near `plain`.
fn near(what: &str, ours: &Tensor, plain: &Tensor, kind: Kind) -> Result<()> {
    let (off, allowed) = (distance(ours, plain), allowed(kind));
    #[cfg(test)]
    let off = tests::planted(what, off);
    // What is no number is too far.
    if off.is_none_or(|off| off.is_nan() || off > allowed) {
        let off = off.map_or("of another shape than".to_owned(), |off| format!("{off:.1e} away from"));
        bail!(
            "{what} ({kind:?}) is {off} libtorch's ordinary operations on this GPU, where {allowed:.0e} is allowed: its results \
             cannot be trusted; {}",
            without()
        );
    }
    Ok(())
}

/// How to do without.
fn without() -> String {
    format!("set `{}=none` in the environment to compute without it, which is slower", native::SWITCH)
}

fn rotation(kind: Kind, device: Device) -> Result<Rotation> {
    Ok(Rotation::new(&config(HEADS.width, 4 * PROMPT)?, kind, device))
}

/// A decoder of two layers.
fn config(width: i64, positions: usize) -> Result<ModelConfig> {
    ModelConfig::parse(json!({"model_type": "qwen2", "vocab_size": 61, "hidden_size": HEADS.queries * width,
        "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": HEADS.queries,
        "num_key_value_heads": HEADS.shared, "head_dim": width, "max_position_embeddings": positions,
        "rms_norm_eps": 1e-6, "eos_token_id": 1}))
}

fn projected(tokens: i64, kind: Kind, device: Device, phase: f64) -> Tensor {
    (wave(&[tokens, HEADS.projected()], Kind::Double, phase) * 2.0).to_kind(kind).to_device(device)
}

/// Forward and backward pass over a prompt with two samples and one that stands alone, beside padded rectangles in fp32.
fn attention(device: Device, kind: Kind) -> Result<()> {
    let segment = |(length, continues)| Segment { length, continues };
    let tree = [(PROMPT, false), (70, true), (1, true), (33, false)].map(segment);
    let wide = if kind == Kind::Double { Kind::Double } else { Kind::Float };
    let (layout, rotation) = (Layout::new(&tree, device), rotation(wide, device)?);
    let input = projected(layout.tokens(), kind, device, 0.1);
    // The same rounded numbers, computed as wide as they should be.
    let plain = differentiated(vec![input.to_kind(wide)], |inputs| {
        vec![plain::attention(&inputs[0], HEADS, &layout, &rotation)]
    })?;
    let ours = differentiated(vec![input], |inputs| vec![packed::attention(&inputs[0], HEADS, &layout, &rotation)])?;
    near("attention over unequal lengths", &ours[0], &plain[0], kind)?;
    near("the gradient of attention over unequal lengths", &ours[1], &plain[1], kind)
}

/// A row at the same place beside other neighbours: the same bits, and no gradient in the neighbours.
fn isolation(device: Device, kind: Kind) -> Result<()> {
    let layout = Layout::rows([40, PROMPT, 65], device);
    let rotation = rotation(if kind == Kind::Double { kind } else { Kind::Float }, device)?;
    let length = PROMPT as i64;
    let beside = |phase: f64| -> Result<(Tensor, Tensor)> {
        let all = projected(layout.tokens(), kind, device, phase);
        no_grad(|| all.narrow(0, 40, length).copy_(&projected(length, kind, device, 0.7)));
        let all = all.set_requires_grad(true);
        let mixed = packed::attention(&all, HEADS, &layout, &rotation).narrow(0, 40, length);
        device::strictly(device, || mixed.to_kind(Kind::Float).square().sum(Kind::Float).backward())?;
        let gradient = all.grad();
        let outside = [gradient.narrow(0, 0, 40), gradient.narrow(0, 40 + length, 65)];
        let reached = outside.iter().any(|outside| outside.abs().max().double_value(&[]) != 0.0);
        ensure!(!reached, "a gradient of attention over unequal lengths reaches a neighbour; {}", without());
        Ok((mixed.detach(), gradient.narrow(0, 40, length).copy()))
    };
    let (one, other) = (beside(0.1)?, beside(0.4)?);
    ensure!(one == other, "attention over unequal lengths depends on neighbours; {}", without());
    Ok(())
}

/// One query a row over a cache whose rows are filled unequally, beside the same in fp32.
fn cached(device: Device, kind: Kind) -> Result<()> {
    let Heads { queries, shared, width } = HEADS;
    let (used, slots) = ([PROMPT as i64, 1, 64], PROMPT as i64 + 5);
    let made = |size: &[i64], phase: f64| wave(size, Kind::Double, phase).to_kind(kind).to_device(device);
    let query = made(&[3, queries, width], 0.1) * 2.0;
    let (keys, values) = (made(&[3 * slots, shared, width], 0.2) * 2.0, made(&[3 * slots, shared, width], 0.3));
    let begins = |step: i64| Tensor::arange(4, (Kind::Int64, device)).g_mul_scalar(step).to_kind(Kind::Int);
    let seen = Tensor::from_slice(&used).to_kind(Kind::Int).to_device(device);
    let sequences = Sequences {
        begins_q: &begins(1),
        begins_k: &begins(slots),
        longest_q: 1,
        longest_k: slots,
        causal: false,
        used: Some(&seen),
    };
    let ours = no_grad(|| gpu::attention(&query, &keys, &values, &sequences));
    let wide = if kind == Kind::Double { Kind::Double } else { Kind::Float };
    for (row, used) in (0..).zip(used) {
        let of = |x: &Tensor| {
            let live = x.narrow(0, row * slots, used).to_kind(wide).transpose(0, 1).unsqueeze(0);
            plain::repeat_heads(&live, queries)
        };
        let query = query.get(row).to_kind(wide).view([1, queries, 1, width]);
        let scores = query.matmul(&of(&keys).transpose(2, 3)) * (width as f64).powf(-0.5);
        let plain = scores.softmax(-1, wide).matmul(&of(&values)).view([queries, width]);
        near("attention over a cache", &ours.get(row), &plain, kind)?;
    }
    Ok(())
}

/// Tokens one after another behind two prompts, by steps that a GPU replays from the third on, beside one pass over whole
/// sequences, in fp32.
fn steps(device: Device) -> Result<()> {
    const NEW: usize = 14;
    let model = Transformer::zeros(config(16, 64)?, device);
    no_grad(|| {
        let mut flat = model.weights().flat().shallow_clone();
        flat.copy_(&(wave(&flat.size(), Kind::Float, 0.1) * 0.2));
    });
    let prompts: [&[i64]; 2] = [&[2, 3, 5, 7, 11, 13, 17], &[19, 23]];
    let owners = [0usize, 0, 1];
    let token = |sample: usize, place: usize| ((sample * 29 + place * 17 + place * place) % 61) as i64;
    let (mut steps, first) = Steps::begin(&model, &prompts, &owners, NEW)?;
    let mut logits = vec![first.index_select(0, &Tensor::from_slice(&[0i64, 0, 1]).to_device(device))];
    for place in 0..NEW - 1 {
        let tokens = [0, 1, 2].map(|sample| token(sample, place));
        let positions = owners.map(|owner| (prompts[owner].len() + place) as i64);
        logits.push(steps.step(&tokens, &positions)?.copy());
    }
    for (sample, &owner) in owners.iter().enumerate() {
        let written = (0..NEW - 1).map(|place| token(sample, place));
        let ids: Vec<i64> = prompts[owner].iter().copied().chain(written).collect();
        let whole = no_grad(|| {
            let layout = Layout::rows([ids.len()], device);
            model.logits(&model.hidden(&Tensor::from_slice(&ids).to_device(device), &layout))
        });
        let whole = whole.narrow(0, prompts[owner].len() as i64 - 1, NEW as i64);
        let ours: Vec<Tensor> = logits.iter().map(|logits| logits.get(sample as i64)).collect();
        near("a step of generation", &Tensor::stack(&ours, 0), &whole, Kind::Float)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;

    use super::*;
    use crate::native::{AsOnGpu, instead};

    thread_local! {
        /// What this thread finds far off.
        static BROKEN: Cell<Option<(&'static str, f64)>> = const { Cell::new(None) };
    }

    pub(super) fn planted(what: &str, off: Option<f64>) -> Option<f64> {
        match BROKEN.get().filter(|(broken, _)| *broken == what) {
            Some((_, by)) => Some(by),
            None => off,
        }
    }

    #[test]
    fn what_is_tried_on_a_gpu_holds_on_a_processor_by_the_reference() {
        instead(AsOnGpu::WithAttention, || {
            for kind in [Kind::Float, Kind::Double, Kind::BFloat16] {
                check(Device::Cpu, kind).unwrap();
            }
        });
    }

    #[test]
    fn what_is_far_off_is_named_with_how_to_do_without() {
        let cases = [
            ("attention over unequal lengths", 0.5),
            ("the gradient of attention over unequal lengths", f64::NAN),
            ("attention over a cache", 0.1),
            ("a step of generation", 0.01),
        ];
        for (what, by) in cases {
            BROKEN.set(Some((what, by)));
            let error = instead(AsOnGpu::WithAttention, || check(Device::Cpu, Kind::BFloat16)).unwrap_err();
            BROKEN.set(None);
            let error = format!("{error:#}");
            assert!(error.contains(&format!(": {what} (")) && error.contains("`PIPE_KERNELS=none`"), "{error}");
        }
        assert!(check(Device::Cpu, Kind::BFloat16).is_ok(), "nothing of it is used here");
    }
}
