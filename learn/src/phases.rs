//! Where the time of a step goes: seconds by phase, and what the machine did in them.
//!
//! Phases do not nest: what runs within one belongs to it. Sums are kept for the thread and taken out once a step. Nothing
//! here changes a result, and nothing of it enters an output.
//!
//! - `seconds/<phase>`: seconds of `prefill`, `decode`, `sampling`, `reward`, `forward`, `backward`, `optimizer`,
//!   `evaluation` and `saving`; `seconds/step` is all of the step with what belongs to none.
//! - `mfu`: floating-point operations of the model's forward and backward passes over the computed tokens (3 times the
//!   forward's, whatever activation checkpointing computes again: 2 a weight of a matrix and token, behind the last attention and in the head a target instead of a token, and
//!   4 a query's element and key it sees), divided by the seconds of `forward`,
//!   `backward` and `optimizer` and by the operations a second of a product of two square matrices, measured when the stage
//!   begins: of the kind that the model's layers compute in, and of 1024 rows on a processor, of 8192 on a GPU, which smaller
//!   ones do not fill.
//! - `decode_bandwidth_share`: bytes that decoding must move (weights once a step, the live keys and values, logits), divided
//!   by the seconds of `decode` and by the bytes a second of a copy, measured when the stage begins: of 64 MiB on a
//!   processor, of 1 GiB on a GPU. Above 1, what is read comes from caches.
//! - `shared_prompt_share`: the share of the tokens trained on that was not computed because a neighbour has the same prompt.
//! - `padding_share`: the share of places of the attention that hold padding; no other step of a pass has any.
//! - `peak_memory_bytes`: the most that the process has held so far; on a GPU what its tensors have held there. What was
//!   needed to measure the machine is not in it.

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::time::Instant;

use tch::{Cuda, Device, Kind, Tensor, no_grad};

use crate::batch::Batch;
use crate::memory;
use crate::model::{ModelConfig, Transformer};

/// The beginnings of the names of metrics that say what a step cost: clocks decide them, and a stop within a step takes its
/// counts away.
pub const COSTS: &[&str] = &[
    "seconds/",
    "tokens_per_second",
    "mfu",
    "decode_bandwidth_share",
    "shared_prompt_share",
    "padding_share",
    "peak_memory_bytes",
];

thread_local! {
    static SPENT: RefCell<BTreeMap<&'static str, f64>> = const { RefCell::new(BTreeMap::new()) };
    static WITHIN: Cell<bool> = const { Cell::new(false) };
}

/// Runs `run` and counts its seconds to `phase`, unless it runs within another.
pub fn time<R>(phase: &'static str, run: impl FnOnce() -> R) -> R {
    if WITHIN.replace(true) {
        return run();
    }
    let began = Instant::now();
    let made = run();
    WITHIN.set(false);
    add(phase, began.elapsed().as_secs_f64());
    made
}

/// What is counted beside seconds.
mod counted {
    pub(super) const OPERATIONS: &str = "operations";
    pub(super) const BYTES: &str = "bytes";
    pub(super) const GENERATED: &str = "generated";
    pub(super) const ROWS: &str = "tokens of rows";
    pub(super) const COMPUTED: &str = "tokens computed";
    pub(super) const PLACES: &str = "places of the attention";
}

fn add(name: &'static str, value: f64) {
    SPENT.with_borrow_mut(|spent| *spent.entry(name).or_default() += value);
}

/// Counts a forward and a backward pass over a batch whose rows have `tokens` tokens, the forward pass being done.
pub fn count_training(model: &Transformer, batch: &Batch, tokens: usize) {
    if WITHIN.get() {
        return;
    }
    let config = model.config();
    let layout = &batch.layout;
    let head = config.vocab_size * config.hidden_size;
    let queries = config.num_attention_heads * config.head_dim;
    // Behind its attention the last layer computes the targets alone.
    let behind = config.hidden_size * (queries + 3 * config.intermediate_size);
    let everywhere = (matrices(config) - head - behind) as f64 * layout.tokens() as f64;
    let at_targets = (head + behind) as f64 * batch.count() as f64;
    let seen = (config.num_hidden_layers * queries) as f64 * layout.pairs() as f64;
    let forward = 2.0 * (everywhere + at_targets) + 4.0 * seen;
    add(counted::OPERATIONS, 3.0 * forward);
    add(counted::ROWS, tokens as f64);
    add(counted::COMPUTED, layout.tokens() as f64);
    add(counted::PLACES, layout.places() as f64);
}

/// Counts a step of generation of `rows` rows that see `seen` tokens together, of which prompts are read once each.
pub fn count_decoding(model: &Transformer, rows: usize, seen: i64) {
    if WITHIN.get() {
        return;
    }
    let config = model.config();
    let cached = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * seen;
    let head = config.vocab_size * config.hidden_size;
    let layers = (matrices(config) - head + cached) as f64;
    // The output projection and its logits are fp32 whatever the layers compute in.
    let bytes =
        model.kind().elt_size_in_bytes() as f64 * layers + 4.0 * (head + rows as i64 * config.vocab_size) as f64;
    add(counted::BYTES, bytes);
    add(counted::GENERATED, rows as f64);
}

/// Elements of the matrices that a token is multiplied with.
fn matrices(config: &ModelConfig) -> i64 {
    let (hidden, inner) = (config.hidden_size, config.intermediate_size);
    let (queries, keys) = (config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim);
    config.num_hidden_layers * hidden * (2 * queries + 2 * keys + 3 * inner) + config.vocab_size * hidden
}

/// What the machine can do, measured once.
#[derive(Clone, Copy, Debug)]
pub struct Machine {
    /// Operations a second of a matrix product.
    operations: f64,
    /// Bytes a second read and written by a copy.
    bandwidth: f64,
    device: Device,
    /// The most bytes that were held before the machine was measured.
    before: u64,
    step: Instant,
}

/// What is measured.
struct Probe {
    /// Rows and columns of a matrix, at most.
    side: i64,
    /// Bytes that are copied.
    bytes: i64,
}

/// What fills a processor, and what fills a GPU.
const PROCESSOR: Probe = Probe { side: 1024, bytes: 64 << 20 };
const GPU: Probe = Probe { side: 8192, bytes: 1 << 30 };

impl Machine {
    /// Measures `device` at numbers of `kind`; about a second at most.
    pub fn measure(device: Device, kind: Kind) -> Self {
        let before = memory::peak(device).unwrap_or(0);
        let probe = if device == Device::Cpu { PROCESSOR } else { GPU };
        let (operations, bandwidth) = no_grad(|| rates(&probe, device, kind));
        memory::forget_peak(device);
        Self { operations, bandwidth, device, before, step: Instant::now() }
    }

    /// The metrics of all that was counted since it was last asked.
    pub fn metrics(&mut self) -> BTreeMap<String, f64> {
        let spent = SPENT.take();
        let of = |name: &str| spent.get(name).copied().unwrap_or(0.0);
        let phases =
            ["prefill", "decode", "sampling", "reward", "forward", "backward", "optimizer", "evaluation", "saving"];
        let seconds = phases.iter().filter(|phase| spent.contains_key(*phase));
        let mut metrics: BTreeMap<String, f64> = seconds.map(|phase| (format!("seconds/{phase}"), of(phase))).collect();
        let mut tell = |name: &str, value: f64| {
            if value.is_finite() {
                metrics.insert(name.to_owned(), value);
            }
        };
        tell("seconds/step", self.step.elapsed().as_secs_f64());
        self.step = Instant::now();
        let training = of("forward") + of("backward") + of("optimizer");
        tell("mfu", of(counted::OPERATIONS) / training / self.operations);
        tell("decode_bandwidth_share", of(counted::BYTES) / of("decode") / self.bandwidth);
        tell("tokens_per_second/decode", of(counted::GENERATED) / (of("decode") + of("sampling")));
        tell("shared_prompt_share", 1.0 - of(counted::COMPUTED) / of(counted::ROWS));
        tell("padding_share", 1.0 - of(counted::COMPUTED) / of(counted::PLACES));
        if let Some(peak) = memory::peak(self.device) {
            tell("peak_memory_bytes", peak.max(self.before) as f64);
        }
        metrics
    }
}

/// Operations a second of a product and bytes a second of a copy. Everything is made and done once before it is timed.
fn rates(probe: &Probe, device: Device, kind: Kind) -> (f64, f64) {
    let once = |run: &mut dyn FnMut()| {
        let began = Instant::now();
        run();
        settle(device);
        began.elapsed().as_secs_f64()
    };
    let best = |run: &mut dyn FnMut()| {
        once(run);
        // The best of many: what else the machine does in these moments must not make it look slow.
        (0..16).map(|_| once(run)).fold(f64::INFINITY, f64::min)
    };
    let product = |side: i64| {
        let square = Tensor::ones([side, side], (kind, device));
        let out = square.empty_like();
        move || drop(square.matmul_out(&out, &square))
    };
    let side = timed_in_passing(probe.side, |side| {
        let mut run = product(side);
        (0..3).map(|_| once(&mut run)).fold(f64::INFINITY, f64::min)
    });
    let seconds = best(&mut product(side));
    let copy = {
        let from = Tensor::ones([probe.bytes], (Kind::Uint8, device));
        let mut to = from.empty_like();
        best(&mut || to.copy_(&from))
    };
    (2.0 * (side as f64).powi(3) / seconds, 2.0 * probe.bytes as f64 / copy)
}

/// The side of the largest square up to `most` rows, or the first of an eighth of them, whose product is over in a twentieth of a
/// second; `seconds` tells how long one takes. libtorch multiplies bf16 number by number where a processor has no instructions for
/// it, and a thousand rows take it seconds.
fn timed_in_passing(most: i64, mut seconds: impl FnMut(i64) -> f64) -> i64 {
    let mut side = most / 8;
    while side < most && seconds(2 * side) < 0.05 {
        side *= 2;
    }
    side
}

/// Waits until `device` has done what it was given, so that a phase's seconds are its own.
pub fn settle(device: Device) {
    if let Device::Cuda(index) = device {
        Cuda::synchronize(index as i64);
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn phases_do_not_nest_and_are_taken_once() {
        let mut machine = Machine::measure(Device::Cpu, Kind::Float);
        let _ = machine.metrics();
        let slept = || std::thread::sleep(Duration::from_millis(5));
        time("evaluation", || {
            time("decode", slept);
            add("seen", 1.0);
        });
        time("decode", slept);
        let metrics = machine.metrics();
        assert!(metrics["seconds/evaluation"] >= 0.005 && metrics["seconds/decode"] >= 0.005);
        assert!(metrics["seconds/step"] >= metrics["seconds/evaluation"] + metrics["seconds/decode"]);
        assert!(metrics["peak_memory_bytes"] > 1e6 && !metrics.contains_key("mfu"));
        assert!(!machine.metrics().contains_key("seconds/decode"));
    }

    #[test]
    fn a_slow_product_is_timed_at_a_size_that_takes_no_time() {
        let at = |rate: f64| timed_in_passing(1024, |side| 2.0 * (side as f64).powi(3) / rate);
        assert_eq!([at(1e12), at(5e10), at(6e9), at(2e9), at(5e8), at(1e6)], [1024, 1024, 512, 256, 128, 128]);
        let began = Instant::now();
        let machine = Machine::measure(Device::Cpu, Kind::BFloat16);
        assert!(began.elapsed() < Duration::from_secs(10) && machine.operations > 1e6, "{:?}", began.elapsed());
    }

    #[test]
    fn measuring_leaves_no_mark_on_the_peak_and_keeps_an_earlier_one() {
        const CHILD: &str = "PIPE_PHASES_CHILD";
        if std::env::var_os(CHILD).is_none() {
            // In a process of its own: others would move the mark.
            let name = "phases::tests::measuring_leaves_no_mark_on_the_peak_and_keeps_an_earlier_one";
            let mut child = std::process::Command::new(std::env::current_exe().unwrap());
            let child = child.args(["--exact", name, "--nocapture"]).env(CHILD, "1").output().unwrap();
            assert!(child.status.success(), "{}", String::from_utf8_lossy(&child.stderr));
            assert!(String::from_utf8_lossy(&child.stdout).contains("1 passed"), "the child ran the case");
            return;
        }
        let peak = |machine: &mut Machine| machine.metrics()["peak_memory_bytes"];
        let (buffers, mebibyte) = (2.0 * PROCESSOR.bytes as f64, f64::from(1 << 20));
        let held = memory::peak(Device::Cpu).unwrap() as f64;
        let mut machine = Machine::measure(Device::Cpu, Kind::Float);
        // The library's own memory and the matrices' are small beside the buffers of the copy.
        assert!(peak(&mut machine) < held + buffers / 2.0, "{} behind {held}", peak(&mut machine));
        drop(Tensor::ones([256 << 20], (Kind::Uint8, Device::Cpu)));
        let high = peak(&mut machine);
        assert!(high > held + 200.0 * mebibyte);
        let mut again = Machine::measure(Device::Cpu, Kind::Float);
        assert!(peak(&mut again) >= high && memory::peak(Device::Cpu).unwrap() < high as u64);
    }

    /// Of a machine that has all the time: what is done is counted, and no more.
    #[test]
    fn rates_are_what_was_done_over_the_time_it_took() {
        let began = Instant::now();
        let (operations, bandwidth) = rates(&Probe { side: 256, bytes: 1 << 20 }, Device::Cpu, Kind::Double);
        let all = began.elapsed().as_secs_f64();
        // Four of each are timed at least.
        assert!(operations >= 4.0 * 2.0 * 256f64.powi(3) / all, "{operations} in {all}");
        assert!(bandwidth >= 4.0 * 2.0 * f64::from(1 << 20) / all, "{bandwidth} in {all}");
        assert!(operations < 1e15 && bandwidth < 1e14);
    }

    /// A model of one layer, by hand: two prompts of 3 and 2 tokens, the first with two samples of one token.
    #[test]
    fn operations_and_bytes_are_counted_by_their_formulas() {
        let (_folder, model) = crate::sandbox::model(&serde_json::json!({"layers": 1}));
        let ids = [[1i64, 2, 3, 4], [1, 2, 3, 5]];
        let row = |ids| crate::batch::Row { ids, mask: &[0, 0, 0, 1] };
        let other = crate::batch::Row { ids: &[7, 8], mask: &[0, 1] };
        let batch = Batch::sharing_prompts(&[row(&ids[0]), row(&ids[1]), other], Device::Cpu).expect("a batch");
        let step = Instant::now();
        let mut machine = Machine { operations: 1.0, bandwidth: 1.0, device: Device::Cpu, before: 0, step };
        let _ = machine.metrics();
        count_training(&model, &batch, 10);
        add("forward", 2.0);
        count_decoding(&model, 3, 11);
        add("decode", 4.0);
        let metrics = machine.metrics();
        // Hidden 16, four heads and two key heads of width 4, inner 24, vocabulary 13.
        let matrices = 16.0 * (2.0 * 16.0 + 2.0 * 8.0 + 3.0 * 24.0);
        let pairs = 6.0 + 4.0 + 4.0 + 3.0;
        let behind = 16.0 * (16.0 + 3.0 * 24.0);
        let targets = 3.0 * (13.0 * 16.0 + behind);
        let operations = 3.0 * (2.0 * ((matrices - behind) * 7.0 + targets) + 4.0 * 16.0 * pairs);
        assert!((metrics["mfu"] - operations / 2.0).abs() < 1e-6, "{metrics:?}");
        let bytes = 4.0 * (matrices + 13.0 * 16.0 + 2.0 * 8.0 * 11.0 + 3.0 * 13.0);
        assert!((metrics["decode_bandwidth_share"] - bytes / 4.0).abs() < 1e-6);
        assert!((metrics["shared_prompt_share"] - 0.3).abs() < 1e-12 && metrics["padding_share"].abs() < 1e-12);
    }
}
