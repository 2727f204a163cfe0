//! What a stage needs in memory, before its first step; and what is free.
//!
//! The forecast counts the tensors that live at the widest instant of a step: weights, gradients and moments throughout;
//! what the backward pass needs of the widest micro-batch, of all layers or with activation checkpointing of one; logits of the
//! positions with a target alone; or what a chunk of generation needs. In bf16 the layers' part is narrower. It is not exact: tests
//! hold it to measured peaks within a factor of 1.5. Of what is freed in blocks below 32 MiB the C library may keep some, which
//! is not counted. A forecast never changes a result: what does not fit is an error.

mod exhausted;
pub mod generation;
#[cfg(test)]
mod peaks;

use std::path::Path;

use anyhow::ensure;
use pipe::stages::tokens::TokensFolder;
use tch::{Device, Kind};

pub use crate::memory::exhausted::{explaining, remember};
pub use crate::memory::generation::{Generation, turns};
use crate::model::{ModelConfig, Transformer};
use crate::native::context;
use crate::order::Order;

/// Bytes of an fp32 element.
const ELEMENT: u64 = 4;
/// Rows drawn ahead at most to find the widest micro-batch; the batches behind them look alike.
const DRAWN: u64 = 1 << 20;

/// A micro-batch.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Shape {
    /// Rows.
    pub rows: u64,
    /// Tokens in the longest row.
    pub length: u64,
    /// Tokens that are computed: those of all rows, a prompt that rows share once.
    pub tokens: u64,
    /// Positions with a target.
    pub targets: u64,
}

/// Tables of the whole vocabulary at every target that a supervised loss needs at one time: logits, their log-softmax and
/// its gradient.
pub const SUPERVISED: u64 = 3;
/// The same of a policy loss: logits as they are and divided by the temperature, their log-softmax, and the four of their
/// entropy.
pub const POLICY: u64 = 7;

/// Bytes that a stage keeps and needs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Forecast {
    /// `training` or `evaluation`.
    what: &'static str,
    /// Weights, gradients, moments, the best weights and the reference.
    pub fixed: u64,
    /// Activations and logits of the widest micro-batch; what the optimizer computes when these are gone is less than a save.
    pub step: u64,
    /// What is laid out while a training state is saved.
    pub saving: u64,
    /// That micro-batch.
    pub widest: Shape,
    /// What generation needs.
    generations: Vec<Generation>,
}

impl Forecast {
    /// Of training a model on micro-batches of these shapes; `best` if the best weights are kept, and `tables` at each
    /// target.
    pub fn training(model: &Transformer, best: bool, tables: u64, shapes: impl Iterator<Item = Shape>) -> Self {
        let passes = Passes::of(model);
        let bytes = |shape: &Shape| activations(model.config(), *shape, tables, &passes);
        let widest = shapes.max_by_key(bytes).unwrap_or_default();
        let trained = model.weights().count();
        let base = if passes.adapted { model.base().count() } else { 0 };
        let frozen = if passes.adapted { model.base().bytes() } else { 0 };
        let (copy, best) = (ELEMENT * trained, u64::from(best));
        // A state has weights and moments, and at the end the frozen weights, in fp32, laid out one by one and then in one piece.
        let saving = 2 * (3 + best) * copy + 2 * ELEMENT * base;
        let (fixed, step) = ((4 + best) * copy + frozen + rotations(model), bytes(&widest));
        Self { what: "training", fixed, step, saving, widest, generations: Vec::new() }
    }

    /// Of a model that is not trained.
    pub fn evaluation(model: &Transformer) -> Self {
        let fixed = model.base().bytes() + rotations(model);
        let generations = Vec::new();
        Self { what: "evaluation", fixed, step: 0, saving: 0, widest: Shape::default(), generations }
    }

    /// With another model beside it, which is saved with the state unless the model has adapters.
    #[must_use]
    pub fn beside(mut self, model: &Transformer, reference: Option<&Transformer>) -> Self {
        self.fixed += reference.map_or(0, |reference| reference.base().bytes() + rotations(reference));
        let copy = reference.map_or(0, |reference| ELEMENT * reference.base().count());
        self.saving += if model.has_adapters() { 0 } else { 2 * copy };
        self
    }

    /// With generation between steps.
    #[must_use]
    pub fn generating(mut self, generation: Option<Generation>) -> Self {
        self.generations.extend(generation);
        self
    }

    /// All bytes at the widest instant.
    pub fn total(&self) -> u64 {
        let generation = self.generations.iter().map(|generation| generation.bytes).max().unwrap_or(0);
        self.fixed + self.step.max(self.saving).max(generation)
    }

    /// Refuses what does not fit into `free` bytes and says what to lower; gives one sentence otherwise.
    pub fn check(&self, free: Option<u64>) -> anyhow::Result<String> {
        let needs = format!("{} needs about {}", self.what, shown(self.total()));
        let step = (self.step > 0).then_some("`micro_batch_size`");
        let lower =
            step.into_iter().chain(self.generations.iter().map(|one| one.lower)).collect::<Vec<_>>().join(" or ");
        let lower = if lower.is_empty() { "the model is too large".to_owned() } else { format!("lower {lower}") };
        remember(format!("{needs} by the forecast ({}); {lower}", self.parts().join(", ")));
        let Some(free) = free else { return Ok(needs) };
        ensure!(
            self.total() <= free,
            "{needs}, but {} are free: {}; {}",
            shown(free),
            self.parts().join(", "),
            self.remedy(free)
        );
        Ok(format!("{needs} of {}", shown(free)))
    }

    /// What the bytes are for.
    fn parts(&self) -> Vec<String> {
        let mut parts = vec![format!("{} for weights", shown(self.fixed))];
        if self.step > 0 {
            let Shape { rows, length, targets, .. } = self.widest;
            parts[0] += ", gradients and moments";
            parts.push(format!(
                "{} for a step with the widest micro-batch ({rows} rows of {length} tokens, {targets} targets)",
                shown(self.step)
            ));
            parts.push(format!("{} to save a state", shown(self.saving)));
        }
        parts.extend(self.generations.iter().map(|one| format!("{} {}", shown(one.bytes), one.shown())));
        parts
    }

    /// What makes it fit into `free` bytes.
    fn remedy(&self, free: u64) -> String {
        if self.fixed + self.saving > free {
            return "the model is too large for this machine".to_owned();
        }
        let step = (self.step, "`micro_batch_size`");
        let generations = self.generations.iter().map(|one| (one.bytes, one.lower));
        let wide = std::iter::once(step).chain(generations).filter(|(bytes, _)| self.fixed + bytes > free);
        format!("lower {}", wide.map(|(_, lower)| lower).collect::<Vec<_>>().join(" and "))
    }
}

/// Bytes of the tables by which heads turn: a cosine and a sine for each position and pair of a head's elements.
fn rotations(model: &Transformer) -> u64 {
    let config = model.config();
    ELEMENT * (config.max_position_embeddings * config.head_dim) as u64
}

/// How a model's layers are computed.
struct Passes {
    /// By kernels of our own.
    kernels: bool,
    /// What they compute in.
    kind: Kind,
    /// With adapters beside frozen weights.
    adapted: bool,
    /// Activations are computed again in the backward pass.
    checkpoints: bool,
}

impl Passes {
    fn of(model: &Transformer) -> Self {
        Self {
            kernels: model.by_kernels(),
            kind: model.kind(),
            adapted: model.has_adapters(),
            checkpoints: model.activation_checkpointing(),
        }
    }

    /// In half precision.
    fn half(&self) -> bool {
        self.kind == Kind::BFloat16
    }

    /// Bytes of an element of the layers.
    fn element(&self) -> u64 {
        if self.half() { 2 } else { ELEMENT }
    }
}

/// Bytes that a forward and a backward pass keep of a micro-batch, at most at one time.
///
/// With kernels of ours, per token and layer: the residual stream and its norms (4 hidden), queries, keys and values with the
/// attention's output, and the feed-forward's gate, up and their product (3 inner). The gradients of one layer come on top.
///
/// libtorch's operations keep more: every norm also what it is before its weight (6 hidden), the activation of the gate (4
/// inner), the rotations of every token; and the attention its own queries, keys, values and output, in padded rows and with
/// a key head for every query head. In half precision norms and rotations are fp32 inside: of a norm
/// what it reads is kept in fp32, what it gives in half precision.
///
/// With activation checkpointing that is kept of one layer alone, and of all what they read.
///
/// Matrices that are rounded or get adapters where they act are kept as they act. Per target: the `tables` of its loss over the
/// vocabulary. The gradient of the widest matrix comes on top.
fn activations(config: &ModelConfig, shape: Shape, tables: u64, passes: &Passes) -> u64 {
    let size = |value: i64| value as u64;
    let (hidden, inner, layers) =
        (size(config.hidden_size), size(config.intermediate_size), size(config.num_hidden_layers));
    let queries = size(config.num_attention_heads * config.head_dim);
    let keys = size(config.num_key_value_heads * config.head_dim);
    let projected = queries + 2 * keys;
    let heads = size(config.num_attention_heads);
    let (tokens, places, element) = (shape.tokens, shape.rows * shape.length, passes.element());
    let (layer, backward) = if passes.kernels {
        let layer = 4 * hidden + queries + projected + 3 * inner + heads;
        (ELEMENT * tokens * layer, ELEMENT * tokens * (3 * inner + 3 * hidden))
    } else {
        let norms = if passes.half() { 16 * hidden } else { ELEMENT * 6 * hidden };
        let own = norms + element * (queries + projected + 4 * inner) + ELEMENT * size(config.head_dim);
        let kept = tokens * own + places * (element * 4 * queries + ELEMENT * heads);
        // More stands around norms that are fp32 inside.
        let around = if passes.half() { 8 * hidden } else { 2 * hidden };
        let feeding = tokens * (element * 4 * inner + ELEMENT * around);
        let attending = tokens * (ELEMENT * 3 * projected + element * 2 * hidden) + places * element * 3 * queries;
        (kept, feeding.max(attending))
    };
    let matrices = hidden * (2 * queries + 2 * keys + 3 * inner);
    let acting = if passes.half() || passes.adapted { element * matrices } else { 0 };
    let of_layers = if passes.checkpoints {
        layers * element * tokens * hidden + layer + acting
    } else {
        layers * (layer + acting)
    };
    let head = shape.targets * (tables * size(config.vocab_size) + 3 * hidden);
    let table = size(config.vocab_size) * hidden;
    // A gradient of half precision is widened before it is added; that of a tied table is set aside.
    let widest = ELEMENT * table.max(2 * inner * hidden) + if passes.half() { element * 2 * inner * hidden } else { 0 };
    let aside = if passes.checkpoints && config.tie_word_embeddings && !passes.adapted { ELEMENT * table } else { 0 };
    of_layers + backward + ELEMENT * head + widest + aside
}

/// The micro-batches of `steps` steps of `batch` rows each, sorted by length and cut into `micro` rows (0 is all).
pub fn micro_batches(
    tokens: &TokensFolder,
    order: &mut Order,
    steps: u64,
    batch: u64,
    micro: usize,
) -> impl Iterator<Item = Shape> {
    (0..steps.min(DRAWN.div_ceil(batch))).flat_map(move |step| {
        let mut rows = order.take(step * batch, batch);
        rows.sort_by_key(|&row| tokens.row_ids(row).len());
        let shape = |rows: &[usize]| Shape {
            rows: rows.len() as u64,
            length: rows.iter().map(|&row| tokens.row_ids(row).len() as u64).max().unwrap_or(0),
            tokens: rows.iter().map(|&row| tokens.row_ids(row).len() as u64).sum(),
            targets: rows.iter().flat_map(|&row| tokens.row_mask(row)).map(|&mask| u64::from(mask)).sum(),
        };
        rows.chunks(if micro == 0 { rows.len().max(1) } else { micro }).map(shape).collect::<Vec<_>>()
    })
}

/// Bytes that a process may still take on `device`; `None` where nothing tells.
///
/// On a processor that is what the kernel calls available, or what the control group leaves, whichever is less; on a GPU what
/// no process holds there.
pub fn free(device: Device) -> Option<u64> {
    if device != Device::Cpu {
        return context::free(device);
    }
    let available = field(&read("/proc/meminfo")?, "MemAvailable:").map(|kibibytes| kibibytes * 1024);
    available.into_iter().chain(group()).min()
}

/// What the control groups (version 2) of this process leave.
fn group() -> Option<u64> {
    let own = read("/proc/self/cgroup")?.lines().find_map(|line| line.strip_prefix("0::").map(str::to_owned))?;
    let root = Path::new("/sys/fs/cgroup");
    let folder = root.join(own.trim_start_matches('/'));
    let levels = folder.ancestors().take_while(|level| level.starts_with(root));
    levels.filter_map(|level| left(&level.join("memory.max"), &level.join("memory.current"), level)).min()
}

/// What one control group leaves; file pages that can be dropped count as free.
fn left(limit: &Path, used: &Path, level: &Path) -> Option<u64> {
    let number = |path: &Path| std::fs::read_to_string(path).ok()?.trim().parse::<u64>().ok();
    let (limit, used) = (number(limit)?, number(used)?);
    let pages = std::fs::read_to_string(level.join("memory.stat")).ok();
    let droppable = pages.and_then(|text| field(&text, "inactive_file")).unwrap_or(0);
    Some(limit.saturating_sub(used.saturating_sub(droppable)))
}

fn read(path: &str) -> Option<String> {
    std::fs::read_to_string(path).ok()
}

/// The most bytes that this process has held so far, or its tensors on a GPU; `None` where nothing tells.
pub fn peak(device: Device) -> Option<u64> {
    if device != Device::Cpu {
        return context::peak(device);
    }
    field(&read("/proc/self/status")?, "VmHWM:").map(|kibibytes| kibibytes * 1024)
}

/// Has [`peak`] begin anew at what is held now. Where that cannot be done a peak is told that may be too high.
pub fn forget_peak(device: Device) {
    context::reset(device);
    if device == Device::Cpu {
        // See proc(5): 5 resets the mark of the resident memory.
        let _ = std::fs::write("/proc/self/clear_refs", "5");
    }
}

/// The first number behind `name` at the beginning of a line.
fn field(text: &str, name: &str) -> Option<u64> {
    let line = text.lines().find(|line| line.split_whitespace().next() == Some(name))?;
    line.split_whitespace().nth(1)?.parse().ok()
}

/// Bytes as a person reads them: `1.2 GiB`.
fn shown(bytes: u64) -> String {
    let mebibytes = bytes as f64 / f64::from(1 << 20);
    if mebibytes < 1024.0 { format!("{mebibytes:.0} MiB") } else { format!("{:.1} GiB", mebibytes / 1024.0) }
}

#[cfg(test)]
mod tests {
    use serde_json::json;
    use tch::no_grad;

    use super::*;
    use crate::batch::{Batch, Row};
    use crate::loss::{entropy, supervised_loss, token_logprobs};
    use crate::native;
    use crate::optimizer::AdamW;
    use crate::pass::Pass;
    use crate::training_state::{self, State};

    /// A configuration, a micro-batch, and the tables of the loss.
    fn cases() -> Vec<(ModelConfig, Shape, u64)> {
        let config = |hidden: i64, layers: i64, shared: i64, vocabulary: i64| {
            ModelConfig::parse(json!({
                "model_type": "qwen2", "vocab_size": vocabulary, "hidden_size": hidden, "intermediate_size": 3 * hidden,
                "num_hidden_layers": layers, "num_attention_heads": 4, "num_key_value_heads": shared,
                "max_position_embeddings": 512, "rms_norm_eps": 1e-6, "eos_token_id": 1
            }))
            .unwrap()
        };
        let shape = |rows, length, targets| Shape { rows, length, targets, tokens: rows * length };
        vec![
            (config(64, 4, 4, 200), shape(32, 128, 32 * 60), SUPERVISED),
            (config(64, 2, 1, 8_000), shape(32, 64, 32 * 60), SUPERVISED),
            (config(256, 3, 2, 1_000), shape(2, 64, 64), SUPERVISED),
            (config(64, 2, 1, 8_000), shape(32, 64, 32 * 60), POLICY),
            (config(64, 12, 2, 200), shape(24, 96, 24 * 20), SUPERVISED),
        ]
    }

    /// The place of a model of many layers among the cases.
    const DEEP: usize = 4;

    /// How the layers are computed, each with the cases that are measured so.
    const ENGINES: [(&str, &[usize]); 5] = [
        ("kernels", &[0, 1, 2, 3]),
        ("plain", &[0, 1, 2, 3]),
        ("half", &[2, DEEP]),
        ("kernels-checkpoints", &[DEEP]),
        ("half-checkpoints", &[DEEP]),
    ];

    /// How far the peak of two steps and a save lies above what the process held before, and the forecast.
    fn measure(engine: &str, config: ModelConfig, shape: Shape, tables: u64) -> (u64, u64) {
        // Of a tiny model first: the library's own code and tables are no part of the forecast.
        let (tiny, ..) = cases().swap_remove(0);
        steps(engine, tiny, Shape { rows: 2, length: 8, targets: 4, tokens: 16 }, tables);
        let before = peaks::status("VmRSS:");
        let forecast = steps(engine, config, shape, tables);
        (peaks::status("VmHWM:") - before, forecast)
    }

    /// Two whole steps and a save; gives their forecast.
    fn steps(engine: &str, config: ModelConfig, shape: Shape, tables: u64) -> u64 {
        let kind = if engine.starts_with("half") { Kind::BFloat16 } else { Kind::Float };
        let model = Transformer::zeros_in(config, kind, Device::Cpu);
        let model = model.with_activation_checkpointing(engine.ends_with("checkpoints"));
        let mut optimizer = AdamW::new(model.weights(), &pipe::stages::training::Optimizer::default());
        let (length, per_row) = (shape.length as usize, (shape.targets / shape.rows) as usize);
        let ids: Vec<i64> = (0..length as i64).map(|at| at % 50).collect();
        let mask: Vec<u8> = (0..length).map(|at| u8::from(at >= length - per_row)).collect();
        let rows: Vec<Row<'_>> = (0..shape.rows).map(|_| Row { ids: &ids, mask: &mask }).collect();
        for _ in 0..2 {
            let batch = Batch::new(&rows, Device::Cpu).unwrap();
            model.zero_gradients();
            let pass = Pass::forward(&model, &batch);
            let logits = model.logits(pass.states());
            let temperature = if tables == POLICY { 0.8 } else { 1.0 };
            let new = token_logprobs(&logits, &batch.targets, temperature);
            let spread = (tables == POLICY).then(|| no_grad(|| entropy(&logits, temperature)));
            pass.backward(&batch, &supervised_loss(&new, shape.targets as f64)).unwrap();
            drop(spread);
            optimizer.step(model.weights(), 1e-3).unwrap();
        }
        let mut state = State::new(1, &json!({})).unwrap();
        state.tensors.extend(model.weights().named("weights.", model.weights().flat()));
        state.tensors.extend(optimizer.state(model.weights()));
        training_state::save(tempfile::tempdir().unwrap().path(), &state).unwrap();
        Forecast::training(&model, false, tables, std::iter::once(shape)).total()
    }

    const TEST: &str = "memory::tests::the_forecast_is_the_measured_peak_within_a_factor_of_one_and_a_half";

    #[test]
    fn the_forecast_is_the_measured_peak_within_a_factor_of_one_and_a_half() {
        if let Some((engine, case)) = peaks::asked() {
            let (config, shape, tables) = cases().swap_remove(case);
            let measured = || measure(&engine, config, shape, tables);
            let (taken, forecast) = if engine == "plain" { native::without(measured) } else { measured() };
            return peaks::tell(taken, forecast);
        }
        for (engine, case) in ENGINES.iter().flat_map(|(engine, cases)| cases.iter().map(move |case| (*engine, *case)))
        {
            peaks::hold(TEST, engine, case);
        }
    }

    #[test]
    fn activation_checkpointing_halves_the_peak_of_a_deep_model() {
        for engine in ["kernels", "half"] {
            let [[kept, _], [checkpoints, _]] =
                ["", "-checkpoints"].map(|how| peaks::of(TEST, &format!("{engine}{how}"), DEEP));
            println!("{engine}: {} with it, {} without", shown(checkpoints), shown(kept));
            assert!(2 * checkpoints < kept, "{engine}: {} with it, {} without", shown(checkpoints), shown(kept));
        }
    }

    #[test]
    fn what_does_not_fit_is_refused_with_what_to_lower() {
        let (config, shape, _) = cases().swap_remove(0);
        let model = Transformer::zeros(config, Device::Cpu);
        let forecast = Forecast::training(&model, false, SUPERVISED, [Shape::default(), shape].into_iter());
        let copy = 4 * model.weights().flat().numel() as u64;
        // A cosine and a sine for each of 512 positions and 8 pairs.
        let turns = 4 * 2 * 512 * 8;
        assert_eq!((forecast.widest, forecast.fixed, forecast.saving), (shape, 4 * copy + turns, 6 * copy));
        assert_eq!(forecast.total(), forecast.fixed + forecast.step);
        assert!(forecast.check(Some(1 << 40)).unwrap().ends_with("of 1024.0 GiB"));
        let error = forecast.check(Some(forecast.total() - 1)).unwrap_err().to_string();
        assert!(error.contains("32 rows of 128 tokens, 1920 targets") && error.ends_with("lower `micro_batch_size`"));
        let error = forecast.check(Some(1 << 20)).unwrap_err().to_string();
        assert!(error.contains("1 MiB are free") && error.contains("model is too large"), "{error}");
        assert!(forecast.check(None).unwrap().starts_with("training needs about"));
        let late = explaining(|| {
            forecast.check(None)?;
            Err::<(), _>(anyhow::anyhow!("CUDA out of memory. Tried to allocate 2.00 GiB"))
        });
        let late = late.unwrap_err().to_string();
        assert!(late.starts_with("memory ran out: training needs about") && late.contains("32 rows of 128"), "{late}");
        assert!(late.ends_with("; lower `micro_batch_size`"), "{late}");
        let chunk = |rows, new| generation::Chunk { prompts: 1, rows, length: 8, new };
        let generation = |lower, rows| Generation::new("rollouts", lower, &model, [chunk(rows, 4), chunk(rows, 9)]);
        let wide = forecast.clone().beside(&model, Some(&model)).generating(generation("`chunk`", 1 << 20));
        assert_eq!((wide.fixed, wide.saving), (5 * copy + 2 * turns, 8 * copy));
        let error = wide.check(Some(1 << 30)).unwrap_err().to_string();
        assert!(error.contains("to generate 1048576 completions of 9 tokens behind 8 for rollouts"), "{error}");
        assert!(error.ends_with("; lower `chunk`"), "{error}");
        let error = wide.check(Some(wide.fixed + wide.step - 1)).unwrap_err().to_string();
        assert!(error.ends_with("; lower `micro_batch_size` and `chunk`"), "{error}");
        let still = Forecast::evaluation(&model).generating(generation("`chunk`", 1 << 20));
        let error = still.check(Some(1 << 30)).unwrap_err().to_string();
        assert!(error.starts_with("evaluation needs") && !error.contains("moments"), "{error}");
        let free = free(Device::Cpu).expect("a kernel tells");
        assert!(free > 1 << 20 && free < 1 << 50);
    }
}
