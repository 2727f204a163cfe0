//! What generating a chunk of completions needs in memory.
//!
//! Every completion is taken to be as long as it may become: the cache is laid out for that at the beginning. Episodes of
//! several turns are read anew in each turn, so that the last turn of the longest is the widest.

use tch::Kind;

use super::ELEMENT;
use crate::draw;
use crate::model::{ModelConfig, Transformer};
use crate::native::{self, gpu};
use crate::prompts::Prompts;

/// Completions that are made at once.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Chunk {
    /// Different texts to read.
    pub prompts: u64,
    /// Completions of all of them.
    pub rows: u64,
    /// Tokens in the longest text.
    pub length: u64,
    /// Tokens in a completion, at most.
    pub new: u64,
}

/// The bytes for the widest chunk of a kind.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Generation {
    /// What the completions are for.
    pub purpose: &'static str,
    /// Bytes beside the weights.
    pub bytes: u64,
    /// That chunk.
    pub widest: Chunk,
    /// What makes it smaller.
    pub lower: &'static str,
}

impl Generation {
    /// Of the widest of `chunks`.
    pub fn new(
        purpose: &'static str,
        lower: &'static str,
        model: &Transformer,
        chunks: impl IntoIterator<Item = Chunk>,
    ) -> Option<Self> {
        let measured = chunks.into_iter().map(|widest| (bytes(model, widest), widest));
        let (bytes, widest) = measured.max_by_key(|(bytes, _)| *bytes)?;
        Some(Self { purpose, bytes, widest, lower })
    }

    /// What is needed, in words.
    pub fn shown(&self) -> String {
        let Chunk { rows, length, new, .. } = self.widest;
        format!("to generate {rows} completions of {new} tokens behind {length} for {}", self.purpose)
    }
}

/// The first turn of `at_once` of the prompts `rows`, `samples` completions each, and the last turn where there are several.
pub fn turns(
    prompts: &Prompts,
    rows: &[usize],
    config: &ModelConfig,
    at_once: u64,
    samples: u64,
    max_new_tokens: u64,
) -> Vec<Chunk> {
    let length = rows.iter().map(|&row| prompts.tokens.prompt_ids(row).len() as u64).max().unwrap_or(0);
    let first = Chunk { prompts: at_once, rows: at_once * samples, length, new: max_new_tokens };
    let room = (config.max_position_embeddings as u64).saturating_sub(max_new_tokens);
    let before = (prompts.task.max_turns() as u64 - 1).saturating_mul(max_new_tokens);
    let last = Chunk { prompts: first.rows, length: length.saturating_add(before).min(room), ..first };
    if before > 0 { vec![first, last] } else { vec![first] }
}

/// Bytes at the widest instant.
fn bytes(model: &Transformer, chunk: Chunk) -> u64 {
    if model.by_kernels() {
        ELEMENT * kernels(model, chunk) + drawing(model, chunk)
    } else if gpu::takes(model.device()) {
        steps(model, chunk)
    } else {
        plain(model, chunk)
    }
}

/// Bytes that drawing a token on a processor takes beside the logits: they are read into one place, and of each row that is drawn
/// at the moment there is a sum up to every id, in fp64.
fn drawing(model: &Transformer, chunk: Chunk) -> u64 {
    let vocabulary = model.config().vocab_size as u64;
    ELEMENT * chunk.rows * vocabulary + 8 * vocabulary * chunk.rows.min(rayon::current_num_threads() as u64)
}

/// Elements that the kernels' engine needs: the keys and values of the texts and of the completions, which are laid out at the
/// beginning, and a layer over the texts or over one token of every completion with its logits.
fn kernels(model: &Transformer, chunk: Chunk) -> u64 {
    let Chunk { prompts, rows, length, new } = chunk;
    let config = model.config();
    let size = |value: i64| value as u64;
    let vector = size(native::vector(model.base().flat().kind()));
    let padded = |count: u64| count.div_ceil(vector) * vector;
    let (hidden, inner, layers) =
        (size(config.hidden_size), size(config.intermediate_size), size(config.num_hidden_layers));
    let (queries, shared, width) =
        (size(config.num_attention_heads), size(config.num_key_value_heads), size(config.head_dim));
    let slot = layers * shared * (width + padded(width));
    // What adapters change is copied.
    let matrices = hidden * (2 * queries + 2 * shared) * width + 3 * hidden * inner;
    let adapted = if model.has_adapters() { layers * matrices } else { 0 };
    let layer = |tokens: u64| tokens * (5 * hidden + 2 * (queries + shared) * width + 3 * inner);
    let own = slot * rows * padded(new.saturating_sub(1).max(1));
    // A token's logits stay until the next ones are there.
    let writing = layer(rows) + rows * size(config.vocab_size);
    adapted + slot * prompts * padded(length) + own + layer(prompts * length).max(writing)
}

/// What libtorch's operations compute with.
struct Operations {
    /// Bytes of an element.
    element: u64,
    /// Whether matrices are rounded or get adapters, and so are copied.
    copies: bool,
    hidden: u64,
    inner: u64,
    layers: u64,
    heads: u64,
    queries: u64,
    keys: u64,
    vocabulary: u64,
}

impl Operations {
    fn of(model: &Transformer) -> Self {
        let config = model.config();
        let size = |value: i64| value as u64;
        let half = model.kind() == Kind::BFloat16;
        Self {
            element: if half { 2 } else { ELEMENT },
            copies: model.has_adapters() || (half && model.weights().gradient().numel() > 0),
            hidden: size(config.hidden_size),
            inner: size(config.intermediate_size),
            layers: size(config.num_hidden_layers),
            heads: size(config.num_attention_heads),
            queries: size(config.num_attention_heads * config.head_dim),
            keys: size(config.num_key_value_heads * config.head_dim),
            vocabulary: size(config.vocab_size),
        }
    }

    /// Bytes of the keys and values of all layers.
    fn cached(&self, rows: u64, slots: u64) -> u64 {
        self.element * 2 * self.layers * rows * slots * self.keys
    }

    /// Bytes of a layer's values, which all live to its end: residuals and norms, projections before and after rotation, the
    /// feed-forward.
    fn layer(&self, tokens: u64) -> u64 {
        self.element * tokens * (4 * self.hidden + 3 * self.queries + 3 * self.keys + 4 * self.inner)
    }

    /// Bytes of a table of logits.
    fn table(&self, rows: u64) -> u64 {
        ELEMENT * rows * self.vocabulary
    }
}

/// Bytes that steps of unchanging shapes need on a GPU: matrices that are copied; then the whole cache, which grows by a layer as
/// the texts are read, with a layer over them and the keys that go to every completion; or one token of every completion.
fn steps(model: &Transformer, chunk: Chunk) -> u64 {
    let Chunk { prompts, rows, length, new } = chunk;
    let of = Operations::of(model);
    let matrices = of.hidden * (2 * of.queries + 2 * of.keys + 3 * of.inner);
    let copied = if of.copies { of.element * of.layers * matrices } else { 0 };
    let reading = of.layer(prompts * length) + of.element * rows * length * of.keys;
    let attending = 2 * ELEMENT * rows * of.heads * (length + new);
    let stepping = of.layer(rows) + attending + of.table(rows);
    // The graph of a step keeps its logits while a token is drawn from theirs.
    let writing = of.table(rows) + stepping.max(of.table(rows) + draw::table_bytes(rows, of.vocabulary));
    copied + of.cached(rows, length + new) + reading.max(writing)
}

/// Bytes that libtorch's operations need: the weights as generation multiplies, rounds and stacks them; then the layers over the
/// texts with their keys and values, or these copied to every completion, or one token of every completion over a full cache.
/// In half precision the fused attention has a key head for every query head.
fn plain(model: &Transformer, chunk: Chunk) -> u64 {
    let Chunk { prompts, rows, length, new } = chunk;
    let of = Operations::of(model);
    let half = of.element != ELEMENT;
    // What is kept in bf16 acts where it lies.
    let fed = if half && !of.copies { 0 } else { of.hidden * 2 * of.inner };
    let stacked = of.hidden * (of.queries + 2 * of.keys) + fed;
    let copied = if of.copies { of.hidden * (of.queries + of.inner) } else { 0 };
    let weights = of.element * of.layers * (stacked + copied) + ELEMENT * of.vocabulary * of.hidden;
    let read = of.cached(prompts, length);
    let reading = read + of.layer(prompts * length);
    let full = of.cached(rows, length + new);
    let copying = read + full + of.cached(rows, length) + of.table(prompts) + of.table(rows);
    let attending = if half {
        of.element * 2 * rows * (length + new) * of.queries
    } else {
        2 * ELEMENT * rows * of.heads * (length + new)
    };
    // A token's logits stay while it is drawn, and until the next ones stand beside them.
    let stepping = of.layer(rows) + attending + of.table(rows);
    let writing = full + of.table(rows) + stepping.max(drawing(model, chunk));
    weights + reading.max(copying).max(writing)
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::AtomicBool;

    use serde_json::json;
    use tch::Device;

    use super::*;
    use crate::generate::{Group, Sampling, generate};
    use crate::memory::peaks;
    use crate::native::AsOnGpu;

    fn cases() -> Vec<(ModelConfig, Chunk)> {
        let config = |hidden: i64, layers: i64, shared: i64, vocabulary: i64| {
            ModelConfig::parse(json!({
                "model_type": "qwen2", "vocab_size": vocabulary, "hidden_size": hidden, "intermediate_size": 3 * hidden,
                "num_hidden_layers": layers, "num_attention_heads": 4, "num_key_value_heads": shared,
                "max_position_embeddings": 512, "rms_norm_eps": 1e-6, "eos_token_id": 1
            }))
            .unwrap()
        };
        let chunk = |prompts, samples, length, new| Chunk { prompts, rows: prompts * samples, length, new };
        vec![
            (config(64, 4, 4, 200), chunk(32, 8, 64, 16)),
            (config(64, 2, 1, 16_000), chunk(16, 16, 16, 8)),
            (config(128, 4, 2, 500), chunk(256, 1, 128, 4)),
            (config(64, 4, 4, 200), chunk(64, 4, 128, 4)),
        ]
    }

    /// How far the peak of a generation lies above what the process held before, and the forecast.
    fn measure(kind: Kind, config: ModelConfig, chunk: Chunk) -> (u64, u64) {
        // Of a tiny model first: the library's own code and tables are no part of the forecast.
        let (tiny, _) = cases().swap_remove(0);
        complete(&Transformer::zeros_in(tiny, kind, Device::Cpu), Chunk { prompts: 1, rows: 2, length: 8, new: 3 });
        let model = Transformer::zeros_in(config, kind, Device::Cpu);
        let before = peaks::status("VmRSS:");
        complete(&model, chunk);
        (peaks::status("VmHWM:") - before, bytes(&model, chunk))
    }

    fn complete(model: &Transformer, chunk: Chunk) {
        // The first token of a model of zeros is every token alike.
        let group = |at: u64| Group {
            prompt: vec![5; chunk.length as usize],
            samples: (0..chunk.rows / chunk.prompts).map(|sample| vec![at, sample]).collect(),
        };
        let groups: Vec<Group> = (0..chunk.prompts).map(group).collect();
        generate(model, &groups, &Sampling::new(1.0, chunk.new), &AtomicBool::new(false), &mut |_| {}).unwrap();
    }

    #[test]
    fn the_forecast_of_a_chunk_is_the_measured_peak_within_a_factor_of_one_and_a_half() {
        if let Some((engine, case)) = peaks::asked() {
            let (config, chunk) = cases().swap_remove(case);
            let kind = if engine == "half" { Kind::BFloat16 } else { Kind::Float };
            let measured = || measure(kind, config, chunk);
            let (taken, forecast) = match engine.as_str() {
                "plain" => native::without(measured),
                "gpu" => native::instead(AsOnGpu::Steps, measured),
                _ => measured(),
            };
            return peaks::tell(taken, forecast);
        }
        let name =
            "memory::generation::tests::the_forecast_of_a_chunk_is_the_measured_peak_within_a_factor_of_one_and_a_half";
        for (case, engine) in
            (0..cases().len()).flat_map(|case| ["kernels", "plain", "gpu", "half"].map(|engine| (case, engine)))
        {
            peaks::hold(name, engine, case);
        }
    }
}
