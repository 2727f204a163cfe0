//! The kernels against libtorch's own operations, on a small fixed input before a stage begins.
//!
//! A processor, a compiler or a build that goes wrong in one of them would spoil a training without a word. It takes some
//! milliseconds and changes no result. What a GPU has instead is tried in `gpu`.

mod gpu;

use anyhow::{Context as _, Result, bail, ensure};
use serde_json::json;
use tch::{Device, Kind, Tensor, no_grad, with_grad};

use crate::device;
use crate::model::layout::Segment;
use crate::model::rope::Rotation;
use crate::model::{Layout, ModelConfig, plain};
use crate::native::{self, Heads, LayerCache, Prompts, Rows, Step};
use crate::optimizer;

/// Added to the mean square of a norm.
const EPSILON: f64 = 1e-6;
/// Tokens of the shorter prompt.
const SHORT: usize = 3;

/// How large the input is.
#[derive(Clone, Copy, Debug)]
struct Sizes {
    /// Rows of norms and activations.
    rows: i64,
    /// Their elements.
    width: i64,
    /// The heads of the attention.
    heads: Heads,
    /// Tokens of the longer prompt.
    prompt: usize,
    /// Tokens of each sample behind it.
    sample: usize,
}

/// Whole vectors and a rest of every size that a kernel treats on its own, and several partial sums.
const USUAL: Sizes =
    Sizes { rows: 70, width: 75, heads: Heads { queries: 4, shared: 2, width: 74 }, prompt: 83, sample: 19 };

/// One kernel: its name, and what it makes of the input, by itself (`true`) or in libtorch's operations.
type Case = (&'static str, fn(&Sizes, Kind, bool) -> Result<Vec<Tensor>>);

const CASES: [Case; 6] = [
    ("rms_norm", norm),
    ("add_rms_norm", add_norm),
    ("swiglu", swiglu),
    ("attention", attention),
    ("decode", decode),
    ("adamw", adamw),
];

/// Refuses a device on which a kernel does not do what libtorch's operations do: on a processor with numbers of `kind`, on a
/// GPU in bf16 and fp32. Where nothing beside these operations is used there is nothing to compare.
pub fn check(device: Device, kind: Kind) -> Result<()> {
    match device {
        _ if native::set(device)? == "none" => Ok(()),
        Device::Cpu => compare(&USUAL, kind),
        _ => gpu::check(device, Kind::BFloat16),
    }
}

fn compare(sizes: &Sizes, kind: Kind) -> Result<()> {
    let allowed = if kind == Kind::Double { 1e-11 } else { 2e-5 };
    for (name, case) in CASES {
        let of = |ours| case(sizes, kind, ours).with_context(|| format!("trying the kernel `{name}`"));
        let (ours, plain) = (of(true)?, of(false)?);
        #[cfg(test)]
        let ours = tests::planted(name, ours);
        ensure!(
            ours.len() == plain.len(),
            "the kernel `{name}` and libtorch's operations make unlike numbers of tensors"
        );
        for (ours, plain) in ours.iter().zip(&plain) {
            let off = distance(ours, plain);
            // What is no number is too far.
            if off.is_none_or(|off| off.is_nan() || off > allowed) {
                let off = off.map_or("of another shape than".to_owned(), |off| format!("{off:.1e} away from"));
                bail!(
                    "the kernel `{name}` (`{}`, {kind:?}) is {off} libtorch's own operations on this processor, where {allowed:.0e} \
                     is allowed: its results cannot be trusted; set `{}=none` in the environment to compute without \
                     kernels, which is slower",
                    native::set(Device::Cpu)?,
                    native::SWITCH
                );
            }
        }
    }
    Ok(())
}

/// The largest difference beside the largest element; `None` where the shapes differ.
fn distance(one: &Tensor, other: &Tensor) -> Option<f64> {
    let most = |x: &Tensor| x.abs().max().double_value(&[]);
    let double = |x: &Tensor| x.to_kind(Kind::Double);
    let off = || no_grad(|| most(&(double(one) - double(other))) / most(&double(other)));
    (one.size() == other.size()).then(off)
}

/// Fixed numbers between -1 and 1.
fn wave(size: &[i64], kind: Kind, phase: f64) -> Tensor {
    let places = Tensor::arange(size.iter().product::<i64>(), (Kind::Double, Device::Cpu));
    (places * 1.7 + phase).sin().to_kind(kind).view(size)
}

/// What `run` makes of `inputs`, and the gradient of a fixed sum of it in each of them.
fn differentiated(inputs: Vec<Tensor>, run: impl Fn(&[Tensor]) -> Vec<Tensor>) -> Result<Vec<Tensor>> {
    with_grad(|| {
        let leaves: Vec<Tensor> = inputs.into_iter().map(|input| input.set_requires_grad(true)).collect();
        let outputs = run(&leaves);
        let weighted = outputs.iter().zip(1..).map(|(output, phase)| {
            let wave = wave(&output.size(), output.kind(), f64::from(phase)).to_device(output.device());
            (output * wave).sum(output.kind())
        });
        let sum: Tensor = weighted.sum();
        device::strictly(sum.device(), || sum.backward())?;
        let gradients = leaves.iter().map(Tensor::grad);
        Ok(outputs.iter().map(Tensor::detach).chain(gradients).collect())
    })
}

fn norm(sizes: &Sizes, kind: Kind, ours: bool) -> Result<Vec<Tensor>> {
    let inputs = vec![wave(&[sizes.rows, sizes.width], kind, 0.1), wave(&[sizes.width], kind, 0.2)];
    differentiated(inputs, |inputs| {
        let (x, weight) = (&inputs[0], &inputs[1]);
        vec![if ours { native::rms_norm(x, weight, EPSILON) } else { plain::normalise(x, EPSILON) * weight }]
    })
}

fn add_norm(sizes: &Sizes, kind: Kind, ours: bool) -> Result<Vec<Tensor>> {
    let size = [sizes.rows, sizes.width];
    let inputs = vec![wave(&size, kind, 0.1), wave(&size, kind, 0.3), wave(&[sizes.width], kind, 0.2)];
    differentiated(inputs, |inputs| {
        let (x, delta, weight) = (&inputs[0], &inputs[1], &inputs[2]);
        let (sum, normed) = if ours {
            native::add_rms_norm(x, delta, weight, EPSILON)
        } else {
            let sum = x + delta;
            let normed = plain::normalise(&sum, EPSILON) * weight;
            (sum, normed)
        };
        vec![sum, normed]
    })
}

fn swiglu(sizes: &Sizes, kind: Kind, ours: bool) -> Result<Vec<Tensor>> {
    let inputs = vec![wave(&[sizes.rows, 2 * sizes.width], kind, 0.1) * 6.0];
    differentiated(inputs, |inputs| vec![if ours { native::swiglu(&inputs[0]) } else { plain::swiglu(&inputs[0]) }])
}

/// Two prompts, the first with two samples behind it, the second with one.
fn segments(sizes: &Sizes) -> Vec<Segment> {
    let segment = |length, continues| Segment { length, continues };
    let (prompt, sample) = (segment(sizes.prompt, false), segment(sizes.sample, true));
    vec![prompt, sample, sample, segment(SHORT, false), sample]
}

/// Projections of tokens, large enough that some scores differ much.
fn projected(sizes: &Sizes, kind: Kind, tokens: i64) -> Tensor {
    wave(&[tokens, sizes.heads.projected()], kind, 0.1) * 2.0
}

fn rotation(sizes: &Sizes, kind: Kind) -> Result<Rotation> {
    let config = json!({"model_type": "qwen3", "vocab_size": 2, "hidden_size": 2, "intermediate_size": 2,
        "num_hidden_layers": 1, "num_attention_heads": sizes.heads.queries, "num_key_value_heads": sizes.heads.shared,
        "head_dim": sizes.heads.width, "max_position_embeddings": sizes.prompt.max(SHORT) + sizes.sample, "rms_norm_eps": EPSILON,
        "eos_token_id": 1});
    Ok(Rotation::new(&ModelConfig::parse(config)?, kind, Device::Cpu))
}

fn attention(sizes: &Sizes, kind: Kind, ours: bool) -> Result<Vec<Tensor>> {
    let (layout, rotation) = (Layout::new(&segments(sizes), Device::Cpu), rotation(sizes, kind)?);
    differentiated(vec![projected(sizes, kind, layout.tokens())], |inputs| {
        vec![if ours {
            native::attention(&inputs[0], sizes.heads, layout.table(), layout.positions(), rotation.tables())
        } else {
            plain::attention(&inputs[0], sizes.heads, &layout, &rotation)
        }]
    })
}

/// The samples' tokens one after another behind stored prompts: what the attention over whole sequences gives there.
fn decode(sizes: &Sizes, kind: Kind, ours: bool) -> Result<Vec<Tensor>> {
    let (layout, rotation) = (Layout::new(&segments(sizes), Device::Cpu), rotation(sizes, kind)?);
    let projected = projected(sizes, kind, layout.tokens());
    // The token of every sample at each place.
    let tokens = |place: usize| Tensor::from_slice(&[1, 2, 4].map(|segment| layout.first(segment) + place as i64));
    if !ours {
        let all = no_grad(|| plain::attention(&projected, sizes.heads, &layout, &rotation));
        return Ok((0..sizes.sample).map(|place| all.index_select(0, &tokens(place))).collect());
    }
    let lengths = [sizes.prompt, SHORT];
    let prompts = Layout::rows(lengths, Device::Cpu);
    let places = Prompts::new(lengths.map(|length| length as i64).to_vec(), kind);
    let read = [(layout.first(0), lengths[0]), (layout.first(3), lengths[1])];
    let read = Tensor::cat(&read.map(|(first, length)| projected.narrow(0, first, length as i64)), 0);
    let mut cache = LayerCache::new(&places, sizes.heads, 3, sizes.sample as i64, kind);
    cache.store(&places, &read, sizes.heads, prompts.table(), prompts.positions(), rotation.tables())?;
    let step = |place: usize| {
        let position = [lengths[0], lengths[0], lengths[1]].map(|length| (length + place) as i64).to_vec();
        let rows = Rows { prompt: vec![0, 0, 1], slot: vec![0, 1, 2], position };
        let token = projected.index_select(0, &tokens(place));
        cache.attend(&places, &token, sizes.heads, &rows, place as i64, rotation.tables())
    };
    Ok((0..sizes.sample).map(step).collect())
}

#[expect(clippy::unnecessary_wraps, reason = "all cases have one type, and some can fail")]
fn adamw(sizes: &Sizes, kind: Kind, ours: bool) -> Result<Vec<Tensor>> {
    let count = sizes.rows * sizes.width;
    let made = |phase| wave(&[count], kind, phase);
    let (weights, gradient, mut first) = (made(0.1), made(0.2), made(0.3));
    let mut second = made(0.4).square();
    let step = Step {
        decayed: count / 2,
        clip: 0.7,
        betas: (0.9, 0.999),
        rate: 0.01,
        decay: 0.1,
        corrections: (0.5, 0.2),
        epsilon: 1e-8,
    };
    no_grad(|| {
        if ours {
            native::adamw(&weights, &gradient, &first, &second, &step);
        } else {
            optimizer::plain(&weights, &gradient, &mut first, &mut second, &step);
        }
    });
    Ok(vec![weights, first, second])
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;

    use super::*;

    thread_local! {
        /// The kernel that this thread finds broken, and what its last tensor is multiplied by.
        static BROKEN: Cell<Option<(&'static str, f64)>> = const { Cell::new(None) };
    }

    /// The tensors of a kernel, the largest element of the last gone wrong where a fault was planted.
    pub(super) fn planted(name: &str, mut made: Vec<Tensor>) -> Vec<Tensor> {
        if let Some((_, by)) = BROKEN.get().filter(|(broken, _)| *broken == name)
            && let Some(last) = made.pop()
        {
            let last = last.copy();
            let most = last.abs().argmax(None, false).int64_value(&[]);
            let _ = last.view(-1).get(most).g_mul_scalar_(by);
            made.push(last);
        }
        made
    }

    #[test]
    fn every_set_does_what_libtorch_does_whatever_the_sizes() {
        // Around the vectors of both kinds (16 and 8), of tiles (64) and of partial sums (64). A norm over one element has
        // no gradient but rounding.
        let sizes = [
            (1, 2, 2, 1, 1, 1, 1),
            (3, 7, 8, 5, 2, 6, 2),
            (64, 16, 16, 16, 8, 4, 1),
            (65, 33, 30, 17, 16, 3, 3),
            (130, 64, 64, 64, 17, 6, 2),
        ];
        for (rows, width, head, prompt, sample, queries, shared) in sizes {
            let sizes = Sizes { rows, width, heads: Heads { queries, shared, width: head }, prompt, sample };
            for kind in [Kind::Float, Kind::Double] {
                for (set, compared) in native::each_set(|| compare(&sizes, kind)) {
                    compared.with_context(|| format!("{set}, {sizes:?}")).unwrap();
                }
            }
        }
        for (set, compared) in native::each_set(|| check(Device::Cpu, Kind::Float)) {
            compared.context(set).unwrap();
        }
    }

    #[test]
    fn a_kernel_that_is_wrong_in_one_element_is_named() {
        let faults = CASES.iter().map(|(name, _)| (*name, 1.02)).chain([("swiglu", f64::NAN)]);
        for (name, by) in faults {
            BROKEN.set(Some((name, by)));
            for (set, compared) in native::each_set(|| check(Device::Cpu, Kind::Float)) {
                let error = compared.unwrap_err().to_string();
                assert!(error.starts_with(&format!("the kernel `{name}` (`{set}`, Float) is ")), "{error}");
                assert!(error.contains("`PIPE_KERNELS=none`"), "{error}");
            }
            check(Device::Cuda(0), Kind::Float).expect("no kernel of ours computes there");
            BROKEN.set(None);
        }
    }

    #[test]
    fn a_stage_does_not_begin_with_a_kernel_that_is_wrong() {
        BROKEN.set(Some(("decode", -1.0)));
        let error = crate::device::open(&crate::device::tests::resources("cpu")).unwrap_err().to_string();
        BROKEN.set(None);
        assert!(error.contains("the kernel `decode`"), "{error}");
    }
}
