//! Generation on a GPU: a step's shapes are those of its batch alone, so that a GPU can be given it once and replay it.
//!
//! Token t of a row lies in slot t of its cache, prompt and completion alike. Ids and positions are read from one place on
//! the device, and what a row may see follows from its position there: nothing of a step depends on how far it is. Rows are
//! computed up to the next power of two, and slots up to the next multiple of [`SLOTS`] where attention reads every slot
//! instead of the live ones. On a processor the same steps run without graphs, for tests. Everything here runs outside of
//! the gradient graph.

use std::collections::BTreeMap;

use anyhow::{Context as _, Result};
use tch::{Kind, Tensor, no_grad};

use crate::model::layout::Layout;
use crate::model::rope::Chosen;
use crate::model::transformer::{Layer, add_norm, attention, heads};
use crate::model::{Transformer, packed};
use crate::native::Heads;
use crate::native::gpu::{self, Graph, Pool, Sequences};

/// Slots to whose multiples attention reads, where it reads them all.
const SLOTS: i64 = 64;
/// Rows below which a step is as long: shapes of fewer would be recorded for nothing.
const FEWEST: u64 = 16;
/// Steps that must be left for a graph to be worth its recording, which costs about two steps.
const WORTH: usize = 8;

/// Keys and values of one layer. Behind a row's own there are zeros.
#[derive(Debug)]
struct Cache {
    keys: Tensor,
    values: Tensor,
}

/// How the elements of a [`Cache`] lie.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Order {
    /// `[rows, slots, kv heads, D]`, as attention over unequal lengths reads it.
    Slots,
    /// `[rows, kv heads, slots, D]`: what a head attends to lies together.
    Heads,
}

/// What one step knows of its rows, the same in every layer.
struct Rows {
    rotation: Chosen,
    /// Where the new keys and values go, among the rows of the cache's elements: `[B]` or `[B * kv heads]` i64.
    index: Tensor,
    sees: Sees,
}

/// What each row may see.
enum Sees {
    /// `[B]` i32: its first slots.
    Used(Tensor),
    /// `[B, 1, 1, slots]`: minus infinity where it may not.
    Mask(Tensor),
}

/// How one shape of a step is done.
enum Shape {
    /// It was done once, beside the usual stream.
    Warm,
    /// It is replayed, and its logits appear there.
    Recorded(Graph, Tensor),
}

/// The shapes that have occurred, by rows and slots, and the memory of their graphs.
struct Graphs {
    pool: Pool,
    shapes: BTreeMap<(i64, i64), Shape>,
}

/// Samples under way.
pub(crate) struct Steps<'a> {
    model: &'a Transformer,
    layers: Vec<Layer>,
    caches: Vec<Cache>,
    order: Order,
    /// `[2, R]` i64: the token and the position of each row.
    inputs: Tensor,
    /// `[R]` or `[R, kv heads]` i64: the first of each row's (and head's) elements among those of a cache.
    firsts: Tensor,
    /// `[slots]` i64: 0, 1, 2, ...
    places: Tensor,
    /// `[R + 1]` i32: 0, 1, 2, ... and 0, slots, 2 slots, ...
    begins: (Tensor, Tensor),
    rows: i64,
    slots: i64,
    /// Steps that may still come.
    left: usize,
    /// `None` where there are no graphs.
    graphs: Option<Graphs>,
}

impl<'a> Steps<'a> {
    /// Reads `prompts`; sample s goes on from `owners[s]`. Gives the logits `[prompts, V]` of each prompt's next token, too.
    pub(crate) fn begin(
        model: &'a Transformer,
        prompts: &[&[i64]],
        owners: &[usize],
        new: usize,
    ) -> Result<(Self, Tensor)> {
        no_grad(|| Self::read(model, prompts, owners, new))
    }

    fn read(model: &'a Transformer, prompts: &[&[i64]], owners: &[usize], new: usize) -> Result<(Self, Tensor)> {
        let (config, device) = (model.config(), model.device());
        let (heads, epsilon) = (heads(config), config.rms_norm_eps);
        let layers: Vec<Layer> = model.layers().iter().map(Layer::frozen).collect();
        let layout = Layout::rows(prompts.iter().map(|prompt| prompt.len()), device);
        let tensor = |values: &[i64]| Tensor::from_slice(values).to_device(device);
        let longest = prompts.iter().map(|prompt| prompt.len()).max().unwrap_or(0);
        // The last token of a completion is never read again.
        let (rows, slots) = (owners.len() as i64, (longest + new - 1) as i64);
        // The token of every row at each place; behind its prompt the last again, which is overwritten before it is seen.
        let source = owners.iter().flat_map(|&owner| {
            let (first, length) = (layout.first(owner), prompts[owner].len());
            (0..longest).map(move |place| first + place.min(length - 1) as i64)
        });
        let source = tensor(&source.collect::<Vec<_>>());
        let last = (0..prompts.len()).map(|prompt| layout.first(prompt) + prompts[prompt].len() as i64 - 1);
        let last = tensor(&last.collect::<Vec<_>>());
        let rotation = model.rotation().chosen(layout.positions());

        let mut x = embedded(model, &tensor(&prompts.concat()));
        let (mut delta, mut caches, mut order) = (None, Vec::with_capacity(layers.len()), Order::Heads);
        for (index, layer) in layers.iter().enumerate() {
            let normed;
            (x, normed) = add_norm(&x, delta.as_ref(), &layer.input_norm, epsilon);
            let projected = layer.project(&normed, heads, epsilon);
            order = if packed::takes(&projected, heads) { Order::Slots } else { Order::Heads };
            let cache = Cache::new(order, heads, [rows, slots], &projected);
            cache.fill(order, heads, &projected, &rotation, &source);
            caches.push(cache);
            let mut mixed = attention(&projected, heads, &layout, model.rotation());
            if index + 1 == layers.len() {
                // Of the last layer only the last token of each prompt is ever read.
                (x, mixed) = (x.index_select(0, &last), mixed.index_select(0, &last));
            }
            let behind;
            (x, behind) = layer.feed(&x, &mixed, epsilon);
            delta = Some(behind);
        }
        let logits = logits(model, x, delta);
        let count = |count: i64, kind: Kind| Tensor::arange(count, (kind, device));
        let firsts = match order {
            Order::Slots => count(rows, Kind::Int64) * slots,
            Order::Heads => (count(rows * heads.shared, Kind::Int64) * slots).view([rows, heads.shared]),
        };
        let begins = (count(rows + 1, Kind::Int), (count(rows + 1, Kind::Int64) * slots).to_kind(Kind::Int));
        let graphs =
            if gpu::graphs(device)? { Some(Graphs { pool: Pool::new()?, shapes: BTreeMap::new() }) } else { None };
        let inputs = Tensor::zeros([2, rows], (Kind::Int64, device));
        let places = count(slots, Kind::Int64);
        let left = new.saturating_sub(1);
        let steps = Self { model, layers, caches, order, inputs, firsts, places, begins, rows, slots, left, graphs };
        Ok((steps, logits))
    }

    /// Appends `tokens` at `positions`, one a row; gives the logits `[rows, V]` of the next ones, which the next step may
    /// overwrite.
    pub(crate) fn step(&mut self, tokens: &[i64], positions: &[i64]) -> Result<Tensor> {
        let rows = tokens.len() as i64;
        assert!(rows > 0 && rows <= self.rows && positions.len() == tokens.len(), "a token and a position a row");
        assert!(positions.iter().all(|position| (0..self.slots).contains(position)), "a slot for every token");
        // Rows that only fill up the shape stand at their first place, where nobody looks any more.
        let mut inputs = vec![0; 2 * self.rows as usize];
        inputs[..tokens.len()].copy_from_slice(tokens);
        inputs[self.rows as usize..][..tokens.len()].copy_from_slice(positions);
        no_grad(|| self.inputs.copy_(&Tensor::from_slice(&inputs).view([2, self.rows])));
        let used = positions.iter().max().map_or(0, |position| position + 1);
        let slots = match self.order {
            Order::Slots => self.slots,
            Order::Heads => ((used + SLOTS - 1) / SLOTS * SLOTS).min(self.slots),
        };
        self.left = self.left.saturating_sub(1);
        Ok(self.run((self.shape(rows), slots))?.narrow(0, 0, rows))
    }

    /// The rows that a step over `rows` rows computes.
    fn shape(&self, rows: i64) -> i64 {
        (rows.unsigned_abs().next_power_of_two().max(FEWEST) as i64).min(self.rows)
    }

    /// Moves rows to where others have ended, once that makes the shape smaller: `rows` are the samples in their rows.
    pub(crate) fn compact(&self, rows: &mut Vec<usize>, ended: impl Fn(usize) -> bool) {
        let active = rows.iter().filter(|&&row| !ended(row)).count();
        if active == 0 || self.shape(active as i64) == self.shape(rows.len() as i64) {
            return;
        }
        let holes = (0..active).filter(|&place| ended(rows[place]));
        let movers = (active..rows.len()).filter(|&place| !ended(rows[place]));
        let (to, from): (Vec<i64>, Vec<i64>) = holes.zip(movers).map(|(to, from)| (to as i64, from as i64)).unzip();
        for (&to, &from) in to.iter().zip(&from) {
            rows[to as usize] = rows[from as usize];
        }
        rows.truncate(active);
        if to.is_empty() {
            return;
        }
        let tensor = |values: &[i64]| Tensor::from_slice(values).to_device(self.model.device());
        let (to, from) = (tensor(&to), tensor(&from));
        no_grad(|| {
            for elements in self.caches.iter().flat_map(|cache| [&cache.keys, &cache.values]) {
                gpu::place(elements, &to, &elements.index_select(0, &from));
            }
        });
    }

    /// A step over `shape` rows and slots: by itself, and from the third time on replayed where there are graphs.
    fn run(&mut self, shape: (i64, i64)) -> Result<Tensor> {
        let device = self.model.device();
        let Some(Graphs { pool, mut shapes }) = self.graphs.take() else { return Ok(self.compute(shape)) };
        let made = match shapes.get(&shape) {
            Some(Shape::Recorded(graph, logits)) => graph.replay().map(|()| logits.shallow_clone()),
            _ if self.left < WORTH => Ok(self.compute(shape)),
            None => {
                shapes.insert(shape, Shape::Warm);
                gpu::warm(device, || self.compute(shape))
            }
            Some(Shape::Warm) => Graph::record(device, pool, || self.compute(shape)).and_then(|(graph, logits)| {
                graph.replay()?;
                shapes.insert(shape, Shape::Recorded(graph, logits.shallow_clone()));
                Ok(logits)
            }),
        };
        self.graphs = Some(Graphs { pool, shapes });
        made.with_context(|| {
            format!(
                "a step of generation over {} rows; set `{}=none` in the environment to do without CUDA graphs",
                shape.0,
                gpu::GRAPHS
            )
        })
    }

    /// The step itself: reads the inputs on the device and asks nothing of the host.
    fn compute(&self, (rows, slots): (i64, i64)) -> Tensor {
        no_grad(|| {
            let config = self.model.config();
            let (heads, epsilon) = (heads(config), config.rms_norm_eps);
            let of = |which: i64| self.inputs.get(which).narrow(0, 0, rows);
            let (ids, positions) = (of(0), of(1));
            let mut x = embedded(self.model, &ids);
            let at = self.at(&positions, slots, x.kind());
            let mut delta = None;
            for (layer, cache) in self.layers.iter().zip(&self.caches) {
                let normed;
                (x, normed) = add_norm(&x, delta.as_ref(), &layer.input_norm, epsilon);
                let projected = layer.project(&normed, heads, epsilon);
                let mixed = self.attend(cache, &projected, heads, &at, slots);
                let behind;
                (x, behind) = layer.feed(&x, &mixed, epsilon);
                delta = Some(behind);
            }
            logits(self.model, x, delta)
        })
    }

    fn at(&self, positions: &Tensor, slots: i64, kind: Kind) -> Rows {
        let rows = positions.size()[0];
        let firsts = self.firsts.narrow(0, 0, rows);
        let rotation = self.model.rotation().chosen(positions);
        match self.order {
            Order::Slots => {
                Rows { rotation, index: firsts + positions, sees: Sees::Used((positions + 1).to_kind(Kind::Int)) }
            }
            Order::Heads => {
                let hidden = self.places.narrow(0, 0, slots).unsqueeze(0).gt_tensor(&positions.unsqueeze(1));
                let mask = hidden.zeros_like().to_kind(kind).masked_fill(&hidden, f64::NEG_INFINITY);
                let index = (firsts + positions.unsqueeze(1)).view(-1);
                Rows { rotation, index, sees: Sees::Mask(mask.view([rows, 1, 1, slots])) }
            }
        }
    }

    /// Appends a token a row to `cache` and attends to all that the row may see; gives `[B, heads * D]`.
    fn attend(&self, cache: &Cache, projected: &Tensor, heads: Heads, at: &Rows, slots: i64) -> Tensor {
        let Heads { queries, shared, width } = heads;
        let rows = projected.size()[0];
        let all = projected.view([rows, queries + 2 * shared, width]);
        let turned = at.rotation.apply(&all.narrow(1, 0, queries + shared));
        let (query, key) = (turned.narrow(1, 0, queries), turned.narrow(1, queries, shared));
        let value = all.narrow(1, queries + shared, shared);
        match &at.sees {
            Sees::Used(used) => {
                let flat = |elements: &Tensor| elements.view([-1, shared, width]);
                let (keys, values) = (flat(&cache.keys), flat(&cache.values));
                gpu::place(&keys, &at.index, &key);
                gpu::place(&values, &at.index, &value);
                let sequences = Sequences {
                    begins_q: &self.begins.0.narrow(0, 0, rows + 1),
                    begins_k: &self.begins.1.narrow(0, 0, rows + 1),
                    longest_q: 1,
                    longest_k: slots,
                    causal: false,
                    used: Some(used),
                };
                gpu::attention(&query, &keys, &values, &sequences).reshape([rows, queries * width])
            }
            Sees::Mask(mask) => {
                let put = |elements: &Tensor, new: &Tensor| {
                    gpu::place(&elements.view([-1, width]), &at.index, &new.reshape([-1, width]));
                    let live = elements.narrow(0, 0, rows).view([rows * shared, self.slots, width]);
                    live.narrow(1, 0, slots)
                };
                let (keys, values) = (put(&cache.keys, &key), put(&cache.values, &value));
                let query = query.reshape([rows * shared, queries / shared, width]) * (width as f64).powf(-0.5);
                let scores = query.bmm(&keys.transpose(1, 2)).view([rows, shared, queries / shared, slots]) + mask;
                let kind = if scores.kind() == Kind::Double { Kind::Double } else { Kind::Float };
                let weights = scores.softmax(-1, kind).to_kind(projected.kind());
                let weights = weights.view([rows * shared, queries / shared, slots]);
                weights.bmm(&values).view([rows, queries * width])
            }
        }
    }
}

/// The states `[N, H]` that the first layer reads of ids `[N]`.
fn embedded(model: &Transformer, ids: &Tensor) -> Tensor {
    model.embedding().index_select(0, ids).to_kind(model.kind())
}

/// The logits of `x` and what is to be added to it, `[N, H]`.
fn logits(model: &Transformer, x: Tensor, delta: Option<Tensor>) -> Tensor {
    model.logits(&match delta {
        Some(delta) => x + delta,
        None => x,
    })
}

impl Cache {
    fn new(order: Order, heads: Heads, [rows, slots]: [i64; 2], like: &Tensor) -> Self {
        let size = match order {
            Order::Slots => [rows, slots, heads.shared, heads.width],
            Order::Heads => [rows, heads.shared, slots, heads.width],
        };
        // What is masked is multiplied by 0, which is 0 for numbers alone: nothing may be there that is none.
        let made = || Tensor::zeros(size, (like.kind(), like.device()));
        Self { keys: made(), values: made() }
    }

    /// Keeps the keys and values of prompts: `source` `[rows * longest]` i64 has the token of every row at each place.
    fn fill(&self, order: Order, heads: Heads, projected: &Tensor, rotation: &Chosen, source: &Tensor) {
        let Heads { queries, shared, width } = heads;
        let all = projected.view([-1, queries + 2 * shared, width]);
        let rows = self.keys.size()[0];
        let keep = |elements: &Tensor, of: &Tensor| {
            let all = of.index_select(0, source).view([rows, -1, shared, width]);
            let slots = all.size()[1];
            match order {
                Order::Slots => elements.narrow(1, 0, slots).copy_(&all),
                Order::Heads => elements.narrow(2, 0, slots).copy_(&all.transpose(1, 2)),
            }
        };
        keep(&self.keys, &rotation.apply(&all.narrow(1, queries, shared)));
        keep(&self.values, &all.narrow(1, queries + shared, shared));
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;
    use tch::Device;

    use super::*;
    use crate::model::decoding::Decoding;
    use crate::native::{AsOnGpu, instead, without};
    use crate::sandbox;

    /// Logits of every step of samples that end at different times, and the rows of each step.
    fn generated(model: &Transformer) -> (Vec<Vec<Tensor>>, Vec<usize>) {
        let prompts: Vec<Vec<i64>> =
            [21i64, 3, 17].iter().map(|&length| (0..length).map(|place| place * place % 13).collect()).collect();
        let prompts: Vec<&[i64]> = prompts.iter().map(Vec::as_slice).collect();
        let owners: Vec<usize> = (0..36).map(|sample| sample / 12).collect();
        let (new, mut computed) = (14usize, Vec::new());
        let mut logits: Vec<Vec<Tensor>> = owners.iter().map(|_| Vec::new()).collect();
        let (mut decoding, first) = Decoding::begin(model, &prompts, &owners, new).expect("it begins");
        let mut last = first;
        for token in 0..new {
            for (row, &sample) in decoding.rows().iter().enumerate() {
                logits[sample].push(last.get(row as i64).copy());
            }
            // The first ends first, so that rows must move into its place.
            let ended = |sample: usize| token > sample / 3 + 1;
            if token + 1 == new {
                break;
            }
            decoding.forget(ended);
            computed.push(decoding.rows().len());
            last = decoding.step(|sample| ((sample * 5 + token * 3) % 13) as i64).expect("a step");
        }
        (logits, computed)
    }

    #[test]
    fn steps_of_unchanging_shapes_give_the_logits_of_the_other_engines() {
        for model in sandbox::families() {
            // In fp64 beside the kernels' engine, in fp32 beside that of libtorch's operations, which is fp32 alone.
            for (model, bound) in [(model.double(), 1e-12), (model, 1e-5)] {
                let double = model.embedding().kind() == Kind::Double;
                let (plain, rows) = if double { generated(&model) } else { without(|| generated(&model)) };
                assert_eq!(rows.first(), Some(&36));
                for path in [AsOnGpu::Steps, AsOnGpu::WithAttention] {
                    let (ours, rows) = instead(path, || generated(&model));
                    let shrinks = rows.windows(2).filter(|pair| pair[1] < pair[0]).count();
                    assert_eq!((rows[0], shrinks), (36, 2), "rows leave where their number passes 32 and 16: {rows:?}");
                    for (sample, (ours, plain)) in ours.iter().zip(&plain).enumerate() {
                        let tokens = ours.len().min(plain.len());
                        assert!(tokens >= 14.min(sample / 3 + 3), "{tokens} tokens of sample {sample}");
                        for (token, (ours, plain)) in ours.iter().zip(plain).enumerate() {
                            let distance = sandbox::distance(ours, plain);
                            assert!(distance < bound, "token {token} of sample {sample}, {path:?}: {distance}");
                        }
                    }
                }
            }
        }
    }

    /// What a graph needs: the same inputs give the same bits, whatever was computed before and however often.
    #[test]
    fn a_step_reads_its_inputs_and_can_be_done_again() {
        let (_folder, model) = sandbox::model(&json!({"max_position_embeddings": 256}));
        for path in [AsOnGpu::Steps, AsOnGpu::WithAttention] {
            instead(path, || {
                let prompts: [&[i64]; 2] = [&[1, 5, 7, 3], &[1, 9]];
                let (mut steps, _) = Steps::begin(&model, &prompts, &[0, 0, 1], 100).expect("it begins");
                let mut shapes = Vec::new();
                for token in 0..70 {
                    let positions = [4 + token, 4 + token, 2 + token];
                    let logits = steps.step(&[3, 4, 5], &positions).expect("a step").copy();
                    let slots = if path == AsOnGpu::Steps { if token < 60 { 64 } else { 103 } } else { 103 };
                    assert_eq!(steps.compute((3, slots)), logits, "again, by the inputs that lie there");
                    assert!(sandbox::distance(&steps.compute((3, 103)), &logits) < 1e-5, "slots behind change nothing");
                    shapes.push(logits.size());
                }
                assert!(shapes.iter().all(|shape| *shape == [3, 13]));
                assert!(steps.graphs.is_none(), "a processor has no graphs");
                steps.rows = 100;
                assert_eq!([1, 16, 17, 64, 65].map(|rows| steps.shape(rows)), [16, 16, 32, 64, 100], "powers of two");
            });
        }
    }

    #[test]
    fn half_precision_keeps_its_kind_in_the_cache_and_is_near() {
        let heads = Heads { queries: 4, shared: 2, width: 8 };
        let projected = (Tensor::arange(5 * heads.projected(), (Kind::Float, Device::Cpu)) * 0.3).sin();
        let projected = projected.view([5, heads.projected()]).to_kind(Kind::BFloat16);
        let (_folder, model) = sandbox::model(&json!({"hidden_size": 32}));
        let rotation = model.rotation().chosen(&Tensor::from_slice(&[0i64, 1, 2, 0, 1]));
        let source = Tensor::from_slice(&[0i64, 1, 2, 3, 4, 4]);
        for order in [Order::Slots, Order::Heads] {
            let cache = Cache::new(order, heads, [2, 7], &projected);
            cache.fill(order, heads, &projected, &rotation, &source);
            assert_eq!((cache.keys.kind(), cache.values.kind()), (Kind::BFloat16, Kind::BFloat16));
            let values = if order == Order::Slots { cache.values.copy() } else { cache.values.transpose(1, 2) };
            let value = projected.view([5, 8, 8]).narrow(1, 6, 2);
            assert_eq!(values.narrow(1, 0, 3).get(0), value.narrow(0, 0, 3));
            assert_eq!(values.narrow(1, 0, 2).get(1), value.narrow(0, 3, 2));
            assert_eq!(values.narrow(1, 3, 4).abs().max().double_value(&[]).to_bits(), 0f64.to_bits());
        }
    }
}
