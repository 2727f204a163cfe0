//! Kernels for processors that libtorch lacks, as operations on tensors with gradients; and what `tch` lacks of libtorch: its
//! switches (`context`) and its GPUs (`gpu`).
//!
//! `kernels.cpp` holds the arithmetic, compiled once for each instruction set and chosen when first used; `ops.cpp` gives it
//! to libtorch's gradient graph. Both are compiled by `build.rs` against libtorch's own headers. Nothing here depends on the
//! number of threads but the time it takes. Tensors are f32, or f64 in tests, and lie on a processor.

#![expect(unsafe_code, reason = "the kernels stand behind a C interface")]

pub mod context;
pub mod gpu;
#[cfg(test)]
mod reference;

use std::ffi::{CStr, OsStr, OsString, c_char};
use std::sync::LazyLock;

use anyhow::{Context as _, Result, bail};
use tch::{Device, Kind, Tensor};
use torch_sys::C_tensor;

#[allow(clippy::allow_attributes, improper_ctypes, reason = "a tensor is an opaque pointer")]
unsafe extern "C" {
    fn pipe_native_error() -> *const c_char;
    fn pipe_native_set() -> *const c_char;
    #[cfg(test)]
    fn pipe_native_sets() -> i64;
    #[cfg(test)]
    fn pipe_native_choose(set: i64) -> bool;
    fn pipe_native_vector(wide: bool) -> i64;
    fn pipe_native_rms_norm(x: *const C_tensor, weight: *const C_tensor, epsilon: f64) -> *mut C_tensor;
    fn pipe_native_add_rms_norm(
        x: *const C_tensor,
        delta: *const C_tensor,
        weight: *const C_tensor,
        epsilon: f64,
        out: *mut *mut C_tensor,
    ) -> bool;
    fn pipe_native_swiglu(gate_up: *const C_tensor) -> *mut C_tensor;
    fn pipe_native_attention(
        projected: *const C_tensor,
        segments: *const C_tensor,
        positions: *const C_tensor,
        cosine: *const C_tensor,
        sine: *const C_tensor,
        queries: i64,
        shared: i64,
        width: i64,
    ) -> *mut C_tensor;
    fn pipe_native_store_prompts(
        projected: *const C_tensor,
        segments: *const C_tensor,
        positions: *const C_tensor,
        cosine: *const C_tensor,
        sine: *const C_tensor,
        offsets: *const i64,
        keys: *mut C_tensor,
        values: *mut C_tensor,
        queries: i64,
        shared: i64,
        width: i64,
    ) -> bool;
    fn pipe_native_decode(
        projected: *const C_tensor,
        group: *const i64,
        slot: *const i64,
        position: *const i64,
        used: i64,
        cosine: *const C_tensor,
        sine: *const C_tensor,
        offsets: *const i64,
        lengths: *const i64,
        prompt_keys: *const C_tensor,
        prompt_values: *const C_tensor,
        own_keys: *mut C_tensor,
        own_values: *mut C_tensor,
        slots: i64,
        queries: i64,
        shared: i64,
        width: i64,
    ) -> *mut C_tensor;
    fn pipe_native_adamw(
        weights: *mut C_tensor,
        gradient: *const C_tensor,
        first: *mut C_tensor,
        second: *mut C_tensor,
        decayed: i64,
        clip: f64,
        beta1: f64,
        beta2: f64,
        rate: f64,
        decay: f64,
        c1: f64,
        c2: f64,
        epsilon: f64,
    ) -> bool;
}

/// The heads of an attention.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Heads {
    /// Query heads.
    pub queries: i64,
    /// Key and value heads; query heads share them in equal runs.
    pub shared: i64,
    /// Elements of a head.
    pub width: i64,
}

impl Heads {
    /// Elements of a token's queries, keys and values together.
    pub fn projected(&self) -> i64 {
        (self.queries + 2 * self.shared) * self.width
    }
}

/// The environment variable that turns the kernels off with `none`.
pub const SWITCH: &str = "PIPE_KERNELS";

/// Whether the environment variable `switch` turns something off; an error where it says anything else but `auto`.
fn off(switch: &'static str) -> Result<bool> {
    static SAID: LazyLock<[Option<OsString>; 2]> = LazyLock::new(|| [SWITCH, gpu::GRAPHS].map(std::env::var_os));
    match SAID[usize::from(switch == gpu::GRAPHS)].as_deref().map(OsStr::as_encoded_bytes) {
        None | Some(b"" | b"auto") => Ok(false),
        Some(b"none") => Ok(true),
        Some(other) => bail!("`{switch}` is `{}`: expected `auto` or `none`", String::from_utf8_lossy(other)),
    }
}

/// Whether the kernels take tensors like this one.
pub fn takes(tensor: &Tensor) -> bool {
    takes_kind(tensor.kind(), tensor.device())
}

/// Whether the kernels take tensors of `kind` on `device`.
pub fn takes_kind(kind: Kind, device: Device) -> bool {
    #[cfg(test)]
    if AS_ON_GPU.get().is_some() {
        return false;
    }
    let kernels = || !matches!(off(SWITCH), Ok(true));
    device == Device::Cpu && matches!(kind, Kind::Float | Kind::Double) && kernels()
}

/// With which kernels `device` computes: the instructions of ours on a processor (`avx512`, `avx2` or `base`), what a GPU has
/// (`flash`, `graphs` or `flash+graphs`), or `none`. Results differ between them by rounding.
pub fn set(device: Device) -> Result<&'static str> {
    if off(SWITCH)? {
        return Ok("none");
    }
    if device != Device::Cpu {
        return gpu::set(device);
    }
    // SAFETY: the text is a constant and ends with a zero.
    let name = unsafe { CStr::from_ptr(pipe_native_set()) };
    name.to_str().context("the name of a set of instructions")
}

/// What a thread without kernels of ours does on a processor, in tests.
#[cfg(test)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum AsOnGpu {
    /// libtorch's ordinary operations.
    No,
    /// Steps of generation whose shapes never change.
    Steps,
    /// The same, and attention over unequal lengths, as `reference` has it.
    WithAttention,
}

#[cfg(test)]
thread_local! {
    /// Whether this thread does without the kernels, and with what instead.
    static AS_ON_GPU: std::cell::Cell<Option<AsOnGpu>> = const { std::cell::Cell::new(None) };
}

/// Runs `run` as on a device without kernels of ours.
#[cfg(test)]
pub(crate) fn without<R>(run: impl FnOnce() -> R) -> R {
    instead(AsOnGpu::No, run)
}

/// Runs `run` with `path` in place of the kernels.
#[cfg(test)]
pub(crate) fn instead<R>(path: AsOnGpu, run: impl FnOnce() -> R) -> R {
    AS_ON_GPU.set(Some(path));
    let made = run();
    AS_ON_GPU.set(None);
    made
}

/// Runs `run` with each set of instructions that this processor has, on this thread alone; gives what each made by its name.
#[cfg(test)]
pub(crate) fn each_set<R>(run: impl Fn() -> R) -> Vec<(&'static str, R)> {
    /// Goes back to the best set, after a panic, too.
    struct Chosen;
    impl Drop for Chosen {
        fn drop(&mut self) {
            // SAFETY: it sets a variable of this thread.
            unsafe { pipe_native_choose(-1) };
        }
    }
    let _back = Chosen;
    // SAFETY: as above.
    let sets = unsafe { pipe_native_sets() };
    let with = |index| {
        // SAFETY: as above.
        assert!(unsafe { pipe_native_choose(index) }, "a set of this processor");
        (set(Device::Cpu).expect("kernels"), run())
    };
    (0..sets).map(with).collect()
}

/// Elements to which the widths and slots of a key-value cache are padded.
pub fn vector(kind: Kind) -> i64 {
    // SAFETY: it reads a constant.
    unsafe { pipe_native_vector(kind == Kind::Double) }
}

/// `x * weight / sqrt(mean(x^2) + epsilon)` over the last dimension.
pub fn rms_norm(x: &Tensor, weight: &Tensor, epsilon: f64) -> Tensor {
    // SAFETY: both are tensors, and the callee checks their shapes and types.
    taken(unsafe { pipe_native_rms_norm(x.as_ptr(), weight.as_ptr(), epsilon) })
}

/// `x + delta`, and [`rms_norm`] of it.
pub fn add_rms_norm(x: &Tensor, delta: &Tensor, weight: &Tensor, epsilon: f64) -> (Tensor, Tensor) {
    let mut out = [std::ptr::null_mut(); 2];
    // SAFETY: as above; `out` has room for the two tensors that are given.
    unsafe { pipe_native_add_rms_norm(x.as_ptr(), delta.as_ptr(), weight.as_ptr(), epsilon, out.as_mut_ptr()) };
    (taken(out[0]), taken(out[1]))
}

/// `silu(gate) * up` of `[.., 2 I]`, gate first; gives `[.., I]`.
pub fn swiglu(gate_up: &Tensor) -> Tensor {
    // SAFETY: as above.
    taken(unsafe { pipe_native_swiglu(gate_up.as_ptr()) })
}

/// Rotates and attends over a batch without padding: `projected` is `[N, (queries + 2 shared) width]`, `segments` `[S, 3]`
/// i64 (first token, tokens, parent or -1; children behind their parent), `positions` `[N]` i64, the tables `[positions,
/// width / 2]`. Gives `[N, queries * width]`.
pub fn attention(
    projected: &Tensor,
    heads: Heads,
    segments: &Tensor,
    positions: &Tensor,
    (cosine, sine): (&Tensor, &Tensor),
) -> Tensor {
    let Heads { queries, shared, width } = heads;
    // SAFETY: `Layout` makes segments that lie within the tokens and positions within the tables.
    taken(unsafe {
        pipe_native_attention(
            projected.as_ptr(),
            segments.as_ptr(),
            positions.as_ptr(),
            cosine.as_ptr(),
            sine.as_ptr(),
            queries,
            shared,
            width,
        )
    })
}

/// One step of AdamW on `[P]` buffers: its plain numbers.
#[derive(Clone, Copy, Debug)]
pub struct Step {
    /// Elements at the beginning that decay.
    pub decayed: i64,
    /// What the gradient is multiplied by.
    pub clip: f64,
    /// The decays of the moments.
    pub betas: (f64, f64),
    /// The learning rate; at 0 the moments alone move.
    pub rate: f64,
    /// Decay of the weights.
    pub decay: f64,
    /// What is left of the moments' bias: `1 - beta^t` of each.
    pub corrections: (f64, f64),
    /// Added to the root of the second moment.
    pub epsilon: f64,
}

/// Moves weights and moments in one pass.
pub fn adamw(weights: &Tensor, gradient: &Tensor, first: &Tensor, second: &Tensor, step: &Step) {
    let Step { decayed, clip, betas, rate, decay, corrections, epsilon } = *step;
    let size = weights.size();
    assert!([gradient, first, second].iter().all(|buffer| buffer.size() == size), "buffers of one length");
    let [mut weights, mut first, mut second] = [weights, first, second].map(Tensor::shallow_clone);
    // SAFETY: four whole buffers of one length, as was asserted.
    let done = unsafe {
        pipe_native_adamw(
            weights.as_mut_ptr(),
            gradient.as_ptr(),
            first.as_mut_ptr(),
            second.as_mut_ptr(),
            decayed,
            clip,
            betas.0,
            betas.1,
            rate,
            decay,
            corrections.0,
            corrections.1,
            epsilon,
        )
    };
    assert!(done, "{}", error());
}

/// Rotated keys and values of prompts and of what is generated behind them, of one layer.
#[derive(Debug)]
pub struct LayerCache {
    prompt_keys: Tensor,
    prompt_values: Tensor,
    own_keys: Tensor,
    own_values: Tensor,
}

/// Where prompts lie in a [`LayerCache`].
#[derive(Debug)]
pub struct Prompts {
    /// Tokens of each.
    lengths: Vec<i64>,
    /// The first slot of each; slots are padded to whole vectors.
    offsets: Vec<i64>,
    /// All slots.
    total: i64,
}

impl Prompts {
    /// Places for prompts of these lengths.
    pub fn new(lengths: Vec<i64>, kind: Kind) -> Self {
        let vector = vector(kind);
        let mut total = 0;
        let place = |length: &i64| {
            let first = total;
            total += (length + vector - 1) / vector * vector;
            first
        };
        let offsets = lengths.iter().map(place).collect();
        Self { lengths, offsets, total }
    }
}

/// The rows of a step of generation, those of one prompt side by side.
#[derive(Clone, Debug, Default)]
pub struct Rows {
    /// The prompt of each row, never falling.
    pub prompt: Vec<i64>,
    /// The place of each row's own keys and values.
    pub slot: Vec<i64>,
    /// The rotary position of each row's token.
    pub position: Vec<i64>,
}

impl LayerCache {
    /// Room for `prompts` and for `samples` rows of `new` tokens each.
    pub fn new(prompts: &Prompts, heads: Heads, samples: i64, new: i64, kind: Kind) -> Self {
        let vector = vector(kind);
        let padded = |count: i64| (count + vector - 1) / vector * vector;
        let (width, slots) = (padded(heads.width), padded(new.max(1)));
        let empty = |size: &[i64]| Tensor::empty(size, (kind, Device::Cpu));
        Self {
            prompt_keys: empty(&[prompts.total * heads.shared * heads.width]),
            prompt_values: empty(&[prompts.total * heads.shared * width]),
            own_keys: empty(&[samples, heads.shared, heads.width, slots]),
            own_values: empty(&[samples, heads.shared, slots, width]),
        }
    }

    /// Keeps the keys and values of prompts, whose segments stand in the order of `prompts`.
    pub fn store(
        &mut self,
        prompts: &Prompts,
        projected: &Tensor,
        heads: Heads,
        segments: &Tensor,
        positions: &Tensor,
        (cosine, sine): (&Tensor, &Tensor),
    ) -> Result<()> {
        let Heads { queries, shared, width } = heads;
        assert_eq!(segments.size(), [prompts.lengths.len() as i64, 3], "a segment each prompt");
        // SAFETY: the buffers were made for these prompts, and there is an offset for each.
        let done = unsafe {
            pipe_native_store_prompts(
                projected.as_ptr(),
                segments.as_ptr(),
                positions.as_ptr(),
                cosine.as_ptr(),
                sine.as_ptr(),
                prompts.offsets.as_ptr(),
                self.prompt_keys.as_mut_ptr(),
                self.prompt_values.as_mut_ptr(),
                queries,
                shared,
                width,
            )
        };
        if done { Ok(()) } else { bail!("keeping prompts: {}", error()) }
    }

    /// Appends one token a row behind `used` others and attends to the row's prompt and its own tokens; gives `[R, queries *
    /// width]`.
    pub fn attend(
        &mut self,
        prompts: &Prompts,
        projected: &Tensor,
        heads: Heads,
        rows: &Rows,
        used: i64,
        (cosine, sine): (&Tensor, &Tensor),
    ) -> Tensor {
        let Heads { queries, shared, width } = heads;
        let (count, own) = (projected.size()[0] as usize, self.own_keys.size());
        assert!([&rows.prompt, &rows.slot, &rows.position].iter().all(|part| part.len() == count), "one of each a row");
        assert!(used < own[3] && rows.slot.iter().all(|slot| (0..own[0]).contains(slot)), "a slot for each row");
        assert!(rows.position.iter().all(|position| (0..cosine.size()[0]).contains(position)), "a known position");
        // SAFETY: what the indices lead to was asserted to be there.
        taken(unsafe {
            pipe_native_decode(
                projected.as_ptr(),
                rows.prompt.as_ptr(),
                rows.slot.as_ptr(),
                rows.position.as_ptr(),
                used,
                cosine.as_ptr(),
                sine.as_ptr(),
                prompts.offsets.as_ptr(),
                prompts.lengths.as_ptr(),
                self.prompt_keys.as_ptr(),
                self.prompt_values.as_ptr(),
                self.own_keys.as_mut_ptr(),
                self.own_values.as_mut_ptr(),
                own[3],
                queries,
                shared,
                width,
            )
        })
    }
}

/// The tensor behind a pointer that a kernel gave; it fails as libtorch's own operations do.
fn taken(pointer: *mut C_tensor) -> Tensor {
    assert!(!pointer.is_null(), "{}", error());
    // SAFETY: the pointer is that of a new tensor, which is nobody else's.
    unsafe { Tensor::from_ptr(pointer) }
}

fn error() -> String {
    // SAFETY: the text ends with a zero and lives until the next call on this thread.
    unsafe { CStr::from_ptr(pipe_native_error()) }.to_string_lossy().into_owned()
}

#[cfg(test)]
mod tests {
    use tch::no_grad;

    use super::*;
    use crate::model::Layout;
    use crate::model::Transformer;
    use crate::model::decoding::Decoding;
    use crate::model::layout::Segment;
    use crate::sandbox;

    /// Prompts of unequal lengths with no, one, two and eight samples behind them.
    fn trees() -> Vec<Segment> {
        let mut segments = Vec::new();
        for (prompt, samples) in [(21usize, 8usize), (5, 0), (17, 1), (1, 2), (33, 2), (16, 0)] {
            segments.push(Segment { length: prompt, continues: false });
            segments
                .extend((0..samples).map(|sample| Segment { length: 1 + (sample * 7 + prompt) % 19, continues: true }));
        }
        segments
    }

    fn ids(count: i64) -> Tensor {
        Tensor::arange(count, (Kind::Int64, Device::Cpu)).square().remainder(13)
    }

    /// The sum of waves over all hidden states, and the gradient of every weight.
    fn states_and_gradient(model: &Transformer, layout: &Layout) -> (Tensor, Tensor) {
        model.zero_gradients();
        let hidden = model.hidden(&ids(layout.tokens()), layout);
        let wave = Tensor::arange(hidden.numel() as i64, (hidden.kind(), Device::Cpu)).sin().view_as(&hidden);
        (&hidden * wave).sum(hidden.kind()).backward();
        (hidden.detach(), model.weights().gradient().copy())
    }

    #[test]
    fn every_set_of_this_processor_can_be_chosen_and_is_what_computes() {
        let has = |feature: bool, name: &'static str| feature.then_some(name);
        #[cfg(target_arch = "x86_64")]
        let vectors = {
            let avx512 = is_x86_feature_detected!("avx512f")
                && is_x86_feature_detected!("avx512dq")
                && is_x86_feature_detected!("avx512bw")
                && is_x86_feature_detected!("avx512vl");
            [has(avx512, "avx512"), has(is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma"), "avx2")]
        };
        #[cfg(not(target_arch = "x86_64"))]
        let vectors = [None, None];
        let expected: Vec<&str> = vectors.into_iter().flatten().chain(has(true, "base")).collect();
        let usual = set(Device::Cpu).expect("kernels");
        assert_eq!(usual, expected[0], "the best is taken by itself");
        // A sum of many products, which is rounded once a product or twice. The backward pass is the set's own, too.
        let x = Tensor::arange(4096, (Kind::Float, Device::Cpu)).sin().view([4, 1024]);
        let weight = Tensor::ones([1024], (Kind::Float, Device::Cpu));
        let norms = each_set(|| {
            let x = x.copy().set_requires_grad(true);
            let normed = rms_norm(&x, &weight, 1e-6);
            (normed.get(1) * normed.get(2)).sum(Kind::Float).backward();
            (set(Device::Cpu).expect("kernels"), normed.detach(), x.grad())
        });
        assert_eq!(norms.iter().map(|(name, _)| *name).collect::<Vec<_>>(), expected);
        assert!(norms.iter().all(|(name, (within, ..))| name == within));
        let differ = |one: usize, other: usize| {
            let (one, other) = (&norms[one].1, &norms[other].1);
            one.1 != other.1 && one.2 != other.2
        };
        assert!(norms.len() == 1 || differ(0, norms.len() - 1), "a product and a sum are one instruction in one alone");
        assert_eq!(set(Device::Cpu).expect("kernels"), usual, "and back");
        assert_eq!(set(Device::Cuda(0)).expect("none"), "none");
    }

    #[test]
    fn the_switch_turns_the_kernels_off_and_what_it_does_not_know_is_refused() {
        let name = "native::tests::the_switch_turns_the_kernels_off_and_what_it_does_not_know_is_refused";
        let x = Tensor::ones([2, 2], (Kind::Float, Device::Cpu));
        match std::env::var(SWITCH).as_deref() {
            Ok("none") => {
                assert!(!takes(&x) && set(Device::Cpu).expect("no kernels") == "none");
                crate::preflight::kernels::check(Device::Cpu, Kind::Float).expect("nothing is tried");
            }
            Ok("some") => {
                let error = set(Device::Cpu).expect_err("an unknown value").to_string();
                assert_eq!(error, "`PIPE_KERNELS` is `some`: expected `auto` or `none`");
            }
            // The environment is the process's, so each value has one of its own.
            _ => {
                assert!(takes(&x));
                for value in ["none", "some"] {
                    let mut child = std::process::Command::new(std::env::current_exe().expect("this program"));
                    let child = child.args(["--exact", name, "--nocapture"]).env(SWITCH, value).output();
                    let child = child.expect("a child");
                    assert!(child.status.success(), "{value}: {}", String::from_utf8_lossy(&child.stderr));
                    assert!(String::from_utf8_lossy(&child.stdout).contains("1 passed"), "the child ran the case");
                }
            }
        }
    }

    #[test]
    fn kernels_are_libtorchs_operations_and_so_are_their_gradients() {
        let layout = Layout::new(&trees(), Device::Cpu);
        for model in sandbox::families() {
            for (model, bound) in [(model.double(), 1e-11), (model, 2e-5)] {
                let (plain, theirs) = without(|| states_and_gradient(&model, &layout));
                for (set, (states, gradient)) in each_set(|| states_and_gradient(&model, &layout)) {
                    let distances = (sandbox::relative(&states, &plain), sandbox::relative(&gradient, &theirs));
                    let near = distances.0 < bound && distances.1 < bound;
                    assert!(near, "{distances:?} with {set} of {:?}", model.config());
                }
            }
        }
    }

    #[test]
    fn threads_and_neighbours_change_no_bit_of_a_kernel() {
        each_set(threads_and_neighbours);
    }

    fn threads_and_neighbours() {
        let model = sandbox::families().swap_remove(0);
        let layout = Layout::new(&trees(), Device::Cpu);
        let before = tch::get_num_threads();
        let made = [1, 2].map(|threads| {
            tch::set_num_threads(threads);
            let hidden = model.hidden(&ids(layout.tokens()), &layout);
            let projected = Tensor::arange(layout.tokens() * 32, (Kind::Float, Device::Cpu)).sin().view([-1, 32]);
            let projected = projected.set_requires_grad(true);
            let heads = Heads { queries: 4, shared: 2, width: 4 };
            let mixed = attention(&projected, heads, layout.table(), layout.positions(), model.rotation().tables());
            mixed.square().sum(Kind::Float).backward();
            (no_grad(|| hidden.copy()), mixed.detach(), projected.grad())
        });
        tch::set_num_threads(before);
        assert_eq!(made[0].1, made[1].1);
        assert_eq!(made[0].2, made[1].2);
        // The same sequence beside others, and none of their gradient in it.
        let lengths = [9usize, 30, 4];
        let heads = Heads { queries: 4, shared: 2, width: 4 };
        let all = Layout::rows(lengths, Device::Cpu);
        let projected =
            Tensor::arange(43 * 32, (Kind::Float, Device::Cpu)).cos().view([-1, 32]).set_requires_grad(true);
        let tables = model.rotation().tables();
        let mixed = attention(&projected, heads, all.table(), all.positions(), tables);
        let own = mixed.narrow(0, 9, 30);
        own.square().sum(Kind::Float).backward();
        let gradient = projected.grad();
        assert_eq!(gradient.narrow(0, 0, 9).abs().max().double_value(&[]).to_bits(), 0f64.to_bits());
        assert_eq!(gradient.narrow(0, 39, 4).abs().max().double_value(&[]).to_bits(), 0f64.to_bits());
        let alone = Layout::rows([30], Device::Cpu);
        let single = projected.detach().narrow(0, 9, 30).contiguous().set_requires_grad(true);
        let mixed = attention(&single, heads, alone.table(), alone.positions(), tables);
        mixed.square().sum(Kind::Float).backward();
        assert_eq!(mixed.detach(), own.detach());
        assert_eq!(single.grad(), gradient.narrow(0, 9, 30));
    }

    /// Logits of every step of samples that end at different times, by the samples that go on.
    fn generated(model: &Transformer) -> Vec<Vec<Tensor>> {
        let prompts: Vec<Vec<i64>> = [21usize, 3, 17]
            .iter()
            .map(|&length| (0..length as i64).map(|place| place * place % 13).collect())
            .collect();
        let prompts: Vec<&[i64]> = prompts.iter().map(Vec::as_slice).collect();
        let owners = [0usize, 0, 0, 1, 2, 2];
        let mut logits: Vec<Vec<Tensor>> = owners.iter().map(|_| Vec::new()).collect();
        let (mut decoding, first) = Decoding::begin(model, &prompts, &owners, 9).expect("it begins");
        let mut last = first;
        for token in 0..9usize {
            for (row, &sample) in decoding.rows().iter().enumerate() {
                logits[sample].push(last.get(row as i64));
            }
            let ended = |sample: usize| token > 2 * sample;
            if (0..owners.len()).all(ended) || token == 8 {
                break;
            }
            decoding.forget(ended);
            last = decoding.step(|sample| ((sample * 5 + token * 3) % 13) as i64).expect("a step");
        }
        logits
    }

    #[test]
    fn generation_by_kernels_is_that_of_libtorchs_operations() {
        for model in sandbox::families() {
            let plain = without(|| generated(&model));
            for (set, (ours, again)) in each_set(|| (generated(&model), generated(&model))) {
                for (sample, (ours, plain)) in ours.iter().zip(&plain).enumerate() {
                    assert_eq!(ours.len(), 9.min(2 * sample + 2), "tokens of sample {sample}");
                    for (token, (ours, plain)) in ours.iter().zip(plain).enumerate() {
                        let distance = sandbox::distance(ours, plain);
                        assert!(distance < 1e-5, "token {token} of sample {sample} with {set}: {distance}");
                    }
                }
                assert_eq!(ours, again, "the same bits again with {set}");
            }
        }
    }
}
