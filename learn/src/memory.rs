//! What a training step needs in memory, before the first one is made; and what is free.
//!
//! The forecast counts the tensors that live at the widest instant of a step: weights, gradients and moments throughout;
//! what the backward pass needs of the widest micro-batch; logits of the positions with a target alone. It is not exact: a
//! test holds it to the measured peak within a factor of 1.5. It never changes a result: what does not fit is an error.

use std::path::Path;

use anyhow::ensure;
use pipe::stages::tokens::TokensFolder;
use tch::Device;

use crate::model::{ModelConfig, Transformer};
use crate::order::Order;

/// Bytes of an element; everything is fp32.
const ELEMENT: u64 = 4;
/// Rows drawn ahead at most to find the widest micro-batch; the batches behind them look alike.
const DRAWN: u64 = 1 << 20;

/// A micro-batch as a padded rectangle.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Shape {
    /// Rows.
    pub rows: u64,
    /// Tokens in the longest row; others are padded to it.
    pub length: u64,
    /// Positions with a target.
    pub targets: u64,
}

/// Bytes that training keeps and needs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Forecast {
    /// Weights, gradients, moments and the best weights.
    pub fixed: u64,
    /// Activations and logits of the widest micro-batch, and what an optimizer step computes.
    pub step: u64,
    /// What is laid out while a training state is saved.
    pub saving: u64,
    /// That micro-batch.
    pub widest: Shape,
}

impl Forecast {
    /// Of training a model on micro-batches of these shapes; `best` if the best weights are kept.
    pub fn new(model: &Transformer, best: bool, shapes: impl Iterator<Item = Shape>) -> Self {
        let bytes = |shape: &Shape| activations(model.config(), *shape);
        let widest = shapes.max_by_key(bytes).unwrap_or_default();
        let (trained, all) = (model.weights().flat().numel() as u64, model.base().flat().numel() as u64);
        let frozen = if model.frozen().is_empty() { 0 } else { ELEMENT * all };
        let (copy, best) = (ELEMENT * trained, u64::from(best));
        // A state has weights and moments, and at the end the frozen weights, laid out one by one and then in one piece.
        let saving = 2 * (3 + best) * copy + 2 * frozen;
        Self { fixed: (4 + best) * copy + frozen, step: 2 * copy + bytes(&widest), saving, widest }
    }

    /// All bytes at the widest instant.
    pub fn total(&self) -> u64 {
        self.fixed + self.step.max(self.saving)
    }

    /// Refuses what does not fit into `free` bytes and says what to lower; gives one sentence otherwise.
    pub fn check(&self, free: Option<u64>) -> anyhow::Result<String> {
        let Shape { rows, length, targets } = self.widest;
        let Some(free) = free else { return Ok(format!("training needs about {}", shown(self.total()))) };
        ensure!(
            self.total() <= free,
            "training needs about {}, but {} are free: {} for weights, gradients and moments, {} for a step with the widest \
             micro-batch ({rows} rows of {length} tokens, {targets} targets), {} to save a state; {}",
            shown(self.total()),
            shown(free),
            shown(self.fixed),
            shown(self.step),
            shown(self.saving),
            if self.fixed + self.saving > free {
                "the model is too large for this machine"
            } else {
                "lower `micro_batch_size`"
            }
        );
        Ok(format!("training needs about {} of {}", shown(self.total()), shown(free)))
    }
}

/// Bytes that a forward and a backward pass keep of a micro-batch, at most at one time.
///
/// Per token and layer: the residual stream and its norms (5 hidden), queries, keys and values before and after rotation
/// with the attention's output (4 of all heads, 3 of the key and value heads), and the feed-forward's gate, its SiLU, up
/// and their product (4 inner). Per target: logits, their log-softmax and its gradient (3 vocabulary). The gradients of
/// one layer come on top, and each projection's weight times its norm, which the backward pass keeps.
fn activations(config: &ModelConfig, shape: Shape) -> u64 {
    let size = |value: i64| value as u64;
    let (hidden, inner, layers) =
        (size(config.hidden_size), size(config.intermediate_size), size(config.num_hidden_layers));
    let queries = size(config.num_attention_heads * config.head_dim);
    let keys = size(config.num_key_value_heads * config.head_dim);
    let repeated = if queries == keys { 0 } else { 2 * queries };
    let layer = 5 * hidden + 4 * queries + 3 * keys + repeated + 4 * inner;
    let backward = 3 * inner + 2 * hidden;
    let folded = layers * hidden * (2 * (queries + 2 * keys) + 2 * inner) + 2 * size(config.vocab_size) * hidden;
    let tokens = shape.rows * shape.length;
    let head = shape.targets * (3 * size(config.vocab_size) + 3 * hidden);
    ELEMENT * (tokens * (layers * layer + backward) + head + folded)
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
            targets: rows.iter().flat_map(|&row| tokens.row_mask(row)).map(|&mask| u64::from(mask)).sum(),
        };
        rows.chunks(if micro == 0 { rows.len().max(1) } else { micro }).map(shape).collect::<Vec<_>>()
    })
}

/// Bytes that a process may still take on `device`; `None` where nothing tells.
///
/// On a processor that is what the kernel calls available, or what the control group leaves, whichever is less.
pub fn free(device: Device) -> Option<u64> {
    if device != Device::Cpu {
        // libtorch's C interface does not tell.
        return None;
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
    use std::process::Command;

    use serde_json::json;
    use tch::{Kind, Tensor};

    use super::*;
    use crate::batch::{Batch, Row};
    use crate::loss::{supervised_loss, token_logprobs};
    use crate::optimizer::AdamW;
    use crate::training_state::{self, State};

    /// Set in the process that is measured: which of the cases it is.
    const CASE: &str = "PIPE_MEMORY_CASE";

    /// A configuration, and a micro-batch.
    fn cases() -> Vec<(ModelConfig, Shape)> {
        let config = |hidden: i64, layers: i64, shared: i64, vocabulary: i64| {
            ModelConfig::parse(json!({
                "model_type": "qwen2", "vocab_size": vocabulary, "hidden_size": hidden, "intermediate_size": 3 * hidden,
                "num_hidden_layers": layers, "num_attention_heads": 4, "num_key_value_heads": shared,
                "max_position_embeddings": 512, "rms_norm_eps": 1e-6, "eos_token_id": 1
            }))
            .unwrap()
        };
        let shape = |rows, length, targets| Shape { rows, length, targets };
        vec![
            (config(64, 4, 4, 200), shape(32, 128, 32 * 60)),
            (config(64, 2, 1, 8_000), shape(32, 64, 32 * 60)),
            (config(256, 3, 2, 1_000), shape(2, 64, 64)),
        ]
    }

    fn status(name: &str) -> u64 {
        1024 * field(&read("/proc/self/status").unwrap(), name).unwrap()
    }

    /// Two whole steps and a save: how far the peak lies above what the process held before, and the forecast.
    fn measure(config: ModelConfig, shape: Shape) -> (u64, u64) {
        let _ =
            Tensor::ones([8, 8], (Kind::Float, Device::Cpu)).matmul(&Tensor::ones([8, 8], (Kind::Float, Device::Cpu)));
        let before = status("VmRSS:");
        let model = Transformer::zeros(config, Device::Cpu);
        let mut optimizer = AdamW::new(model.weights(), &pipe::stages::training::Optimizer::default());
        let (length, per_row) = (shape.length as usize, (shape.targets / shape.rows) as usize);
        let ids: Vec<i64> = (0..length as i64).map(|at| at % 50).collect();
        let mask: Vec<u8> = (0..length).map(|at| u8::from(at >= length - per_row)).collect();
        let rows: Vec<Row<'_>> = (0..shape.rows).map(|_| Row { ids: &ids, mask: &mask }).collect();
        for _ in 0..2 {
            let batch = Batch::new(&rows, 0, Device::Cpu).unwrap();
            model.zero_gradients();
            let logits = model.logits(&batch.select(&model.hidden(&batch.ids)));
            supervised_loss(&token_logprobs(&logits, &batch.targets, 1.0), shape.targets as f64).backward();
            optimizer.step(model.weights(), 1e-3).unwrap();
        }
        let mut state = State::new(1, &json!({})).unwrap();
        state.tensors.extend(model.weights().named("weights.", model.weights().flat()));
        state.tensors.extend(optimizer.state(model.weights()));
        training_state::save(tempfile::tempdir().unwrap().path(), &state).unwrap();
        let peak = status("VmHWM:") - before;
        (peak, Forecast::new(&model, false, std::iter::once(shape)).total())
    }

    #[test]
    fn the_forecast_is_the_measured_peak_within_a_factor_of_one_and_a_half() {
        if let Ok(case) = std::env::var(CASE) {
            let (config, shape) = cases().swap_remove(case.parse().unwrap());
            let (peak, forecast) = measure(config, shape);
            assert!(
                forecast as f64 <= 1.5 * peak as f64 && peak as f64 <= 1.5 * forecast as f64,
                "case {case}: {} forecast, {} measured",
                shown(forecast),
                shown(peak)
            );
            return;
        }
        // Each case in a process of its own, because the peak of a process never falls.
        for case in 0..cases().len() {
            let name = "memory::tests::the_forecast_is_the_measured_peak_within_a_factor_of_one_and_a_half";
            let mut child = Command::new(std::env::current_exe().unwrap());
            let child = child.args(["--exact", name, "--nocapture"]).env(CASE, case.to_string()).output().unwrap();
            let said = String::from_utf8_lossy(&child.stderr);
            assert!(child.status.success(), "{said}");
            assert!(String::from_utf8_lossy(&child.stdout).contains("1 passed"), "the child ran the case");
        }
    }

    #[test]
    fn what_does_not_fit_is_refused_with_what_to_lower() {
        let (config, shape) = cases().swap_remove(0);
        let model = Transformer::zeros(config, Device::Cpu);
        let forecast = Forecast::new(&model, false, [Shape::default(), shape].into_iter());
        let copy = 4 * model.weights().flat().numel() as u64;
        assert_eq!((forecast.widest, forecast.fixed, forecast.saving), (shape, 4 * copy, 6 * copy));
        assert_eq!(forecast.total(), forecast.fixed + forecast.step);
        assert!(forecast.check(Some(1 << 40)).unwrap().ends_with("of 1024.0 GiB"));
        let error = forecast.check(Some(forecast.total() - 1)).unwrap_err().to_string();
        assert!(error.contains("32 rows of 128 tokens, 1920 targets") && error.ends_with("lower `micro_batch_size`"));
        let error = forecast.check(Some(1 << 20)).unwrap_err().to_string();
        assert!(error.contains("1 MiB are free") && error.contains("model is too large"), "{error}");
        assert!(forecast.check(None).unwrap().starts_with("training needs about"));
        let free = free(Device::Cpu).expect("a kernel tells");
        assert!(free > 1 << 20 && free < 1 << 50);
    }
}
