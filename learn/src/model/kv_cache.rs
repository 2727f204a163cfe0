//! The forward pass for generation: a prompt at once, then one token a row, over keys and values kept from before.
//!
//! A row of the cache is one sequence: its prompt fills the first slots, gaps up to the longest prompt stay unused and
//! masked, and token t of every row lies in the same slot behind, so a step writes one slice. Slots are not positions:
//! each row's rotation follows its own length. Everything here runs outside of the gradient graph.

use tch::{Device, Kind, Tensor, no_grad};

use crate::model::Transformer;
use crate::model::plain::{attend, normalise, repeat_heads, widened};
use crate::model::rope::{Turn, paired};
use crate::model::transformer::norm;

/// Keys and values of all layers, `[layers, 2, rows, kv heads, slots, D]` in the model's kind: what a head attends to lies together.
#[derive(Debug)]
pub struct KvCache {
    entries: Tensor,
    /// Rows in use, from the first.
    rows: i64,
    /// Slots in use, from the first.
    used: i64,
}

impl KvCache {
    /// Rows in use.
    pub fn rows(&self) -> i64 {
        self.rows
    }

    /// Slots in use.
    pub fn used(&self) -> i64 {
        self.used
    }

    /// A cache with room for `slots` slots whose row r begins as row `source[r]` of `self`; `source` is `[R]` i64.
    #[must_use]
    pub fn expand(&self, source: &Tensor, slots: i64) -> Self {
        no_grad(|| {
            let rows = source.size()[0];
            let mut size = self.entries.size();
            (size[2], size[4]) = (rows, slots);
            let entries = Tensor::empty(size.as_slice(), (self.entries.kind(), self.entries.device()));
            entries.narrow(4, 0, self.used).copy_(&self.entries.narrow(4, 0, self.used).index_select(2, source));
            Self { entries, rows, used: self.used }
        })
    }

    /// Copies row `from[i]` over row `to[i]` (both `[M]` i64, disjoint) and forgets all rows from `rows` on.
    pub fn compact(&mut self, from: &Tensor, to: &Tensor, rows: i64) {
        no_grad(|| {
            let mut used = self.entries.narrow(4, 0, self.used);
            let moved = used.index_select(2, from);
            let _ = used.index_copy_(2, to, &moved);
        });
        self.rows = rows;
    }

    /// Appends keys and values `[rows, T, kv heads, D]` of `layer` and gives all of that layer so far, `[rows, kv heads, S, D]`.
    fn append(&self, layer: i64, key: &Tensor, value: &Tensor) -> (Tensor, Tensor) {
        let length = key.size()[1];
        let store = |which: i64, new: &Tensor| {
            let rows = self.entries.get(layer).get(which).narrow(0, 0, self.rows);
            rows.narrow(2, self.used, length).copy_(&new.transpose(1, 2));
            rows.narrow(2, 0, self.used + length)
        };
        (store(0, key), store(1, value))
    }
}

/// Attention of one query a row, `[R, 1, heads, D]`, over `keys` and `values` `[R, kv heads, S, D]`; gives `[R, heads * D]`.
///
/// Two products over all heads at once beat the fused kernel here, which is made for many queries a head, and query heads
/// that share a key head are rows of one product, so nothing is repeated. In half precision that would round scores, which the
/// fused kernel does not, and training uses the fused one.
fn attend_last(query: &Tensor, keys: &Tensor, values: &Tensor, mask: Option<&Tensor>) -> Tensor {
    let size = keys.size();
    let [rows, shared, slots, width] = [size[0], size[1], size[2], size[3]];
    let heads = query.size()[2];
    if query.kind() == Kind::BFloat16 {
        let (query, mask) = (query.transpose(1, 2), mask.map(|mask| mask.to_kind(Kind::BFloat16)));
        let (keys, values) = (repeat_heads(keys, heads), repeat_heads(values, heads));
        let mixed =
            Tensor::scaled_dot_product_attention(&query, &keys, &values, mask.as_ref(), 0.0, false, None, false);
        return mixed.reshape([rows, heads * width]);
    }
    let query = query.reshape([rows * shared, heads / shared, width]) * (width as f64).powf(-0.5);
    let mut scores = query.bmm(&keys.view([rows * shared, slots, width]).transpose(1, 2));
    if let Some(mask) = mask {
        let mut by_row = scores.view([rows, shared, heads / shared, slots]);
        by_row += mask;
    }
    scores = scores.softmax(-1, Kind::Float);
    scores.bmm(&values.view([rows * shared, slots, width])).view([rows, heads * width])
}

/// Causal attention over `[B, T, heads, D]`; gives `[B, T, heads, D]`.
fn attend_all(query: &Tensor, key: &Tensor, value: &Tensor) -> Tensor {
    let heads = query.size()[2];
    let [query, key, value] = [query, key, value].map(|x| x.transpose(1, 2));
    attend(&query, &repeat_heads(&key, heads), &repeat_heads(&value, heads), None).transpose(1, 2)
}

/// Rotates heads `[B, T, heads, D]`, after norming each where the family does; `norm` broadcasts over them, its last
/// dimension in the order of [`paired`].
fn turn(rotation: &Turn, heads: &Tensor, norm: Option<&Tensor>, epsilon: f64) -> Tensor {
    match norm {
        Some(norm) => rotation.apply(&(normalise(&widened(heads), epsilon) * norm).to_kind(heads.kind())),
        None => rotation.apply(heads),
    }
}

/// The projections of a layer that read the same states, in the order in which they are stacked.
const QUERY_KEY_VALUE: [&str; 3] = ["self_attn.q_proj.weight", "self_attn.k_proj.weight", "self_attn.v_proj.weight"];

/// `x` normed by `weight`, or to be multiplied with a matrix that has the weight in it.
fn normed(x: &Tensor, weight: Option<&Tensor>, epsilon: f64) -> Tensor {
    weight.map_or_else(|| normalise(x, epsilon), |weight| norm(x, weight, epsilon))
}

/// One layer's weights with its norms multiplied in and its projections stacked.
#[derive(Debug)]
struct Layer {
    /// Its two norms in half precision: a product with them would round otherwise than in training.
    norms: [Option<Tensor>; 2],
    projection: Projection,
    /// The norm of each query and key head, `[heads + kv heads, D]`.
    head_norms: Option<Tensor>,
    output: Projection,
    gate_up: Projection,
    down: Projection,
}

/// A matrix and its bias.
#[derive(Debug)]
struct Projection {
    weight: Tensor,
    bias: Option<Tensor>,
}

impl Projection {
    fn of(&self, x: &Tensor) -> Tensor {
        x.linear(&self.weight, self.bias.as_ref())
    }
}

/// A model prepared for generation. It sees the weights as they were when it was made.
#[derive(Debug)]
pub struct Decoder<'a> {
    model: &'a Transformer,
    layers: Vec<Layer>,
    head: Tensor,
}

impl<'a> Decoder<'a> {
    pub(crate) fn new(model: &'a Transformer) -> Self {
        let (config, weights, kind) = (model.config(), model.base(), model.kind());
        let half = kind == Kind::BFloat16;
        let (heads, shared, size) = (config.num_attention_heads, config.num_key_value_heads, config.head_dim);
        // Queries and keys come first in the stack; their rows are paired, those of values are not.
        let paired_stack = |stack: &Tensor| {
            let (turning, all) = (heads + shared, stack.size()[0]);
            let values = stack.narrow(0, turning * size, all - turning * size);
            Tensor::cat(&[paired(&stack.narrow(0, 0, turning * size), turning), values], 0)
        };
        let layers = (0..config.num_hidden_layers)
            .map(|layer| {
                let name = |name: &str| format!("model.layers.{layer}.{name}");
                let leaf = |short: &str| weights.leaf(&name(short)).detach();
                let stacked = |short: &[&str], rows: i64| {
                    model.stacked(&short.iter().map(|short| name(short)).collect::<Vec<_>>(), rows)
                };
                let biases = |short: &str, rows: i64| weights.stacked(&name(short), rows).to_kind(kind);
                let times = |matrix: Tensor, norm: &str| if half { matrix } else { matrix * leaf(norm) };
                let norms = ["input_layernorm.weight", "post_attention_layernorm.weight"];
                let (projected, inner) = ((heads + 2 * shared) * size, config.intermediate_size);
                let fed = config.feed_forward_bias();
                let head_norms = || {
                    let norm =
                        |short: &str, heads: i64| paired(&leaf(short), 1).unsqueeze(0).expand([heads, size], false);
                    Tensor::cat(&[norm("self_attn.q_norm.weight", heads), norm("self_attn.k_norm.weight", shared)], 0)
                };
                Layer {
                    norms: norms.map(|norm| half.then(|| leaf(norm))),
                    projection: Projection {
                        weight: paired_stack(&times(stacked(&QUERY_KEY_VALUE, projected), norms[0])),
                        bias: config
                            .projection_bias()
                            .then(|| paired_stack(&biases("self_attn.q_proj.bias", projected))),
                    },
                    head_norms: config.head_norms().then(head_norms),
                    output: Projection {
                        weight: model.effective(&name("self_attn.o_proj.weight")),
                        bias: config.output_bias().then(|| leaf("self_attn.o_proj.bias").to_kind(kind)),
                    },
                    gate_up: Projection {
                        weight: times(stacked(&["mlp.gate_proj.weight", "mlp.up_proj.weight"], 2 * inner), norms[1]),
                        bias: fed.then(|| biases("mlp.gate_proj.bias", 2 * inner)),
                    },
                    down: Projection {
                        weight: model.effective(&name("mlp.down_proj.weight")),
                        bias: fed.then(|| leaf("mlp.down_proj.bias").to_kind(kind)),
                    },
                }
            })
            .collect();
        Self { model, layers, head: model.folded_head() }
    }

    pub(crate) fn device(&self) -> Device {
        self.model.device()
    }

    /// Reads prompts `[G, P]` i64 padded on the right, of `lengths` `[G]` i64; gives their cache and the logits `[G, V]` of
    /// each prompt's next token.
    pub fn prefill(&self, ids: &Tensor, lengths: &Tensor) -> (KvCache, Tensor) {
        no_grad(|| {
            let (rows, length) = ids.size2().expect("ids have two dimensions");
            let config = self.model.config();
            let size = [config.num_hidden_layers, 2, rows, config.num_key_value_heads, length, config.head_dim];
            let entries = Tensor::empty(size, (self.model.kind(), self.model.device()));
            let mut cache = KvCache { entries, rows, used: 0 };
            let hidden = self.forward(ids, &mut cache, &self.model.rotation().first(length), None);
            let last = Tensor::arange(rows, (Kind::Int64, self.model.device())) * length + lengths - 1;
            let logits = self.logits(&hidden.view([rows * length, -1]).index_select(0, &last));
            (cache, logits)
        })
    }

    /// One token a row: `tokens` and `positions` are `[R]` i64 for the rows in use, `mask` is `[R, 1, 1, slots]` f32 with
    /// -inf at the slots that a row may not see, or `None` where all may. Gives logits `[R, V]`.
    pub fn step(&self, tokens: &Tensor, positions: &Tensor, cache: &mut KvCache, mask: Option<&Tensor>) -> Tensor {
        no_grad(|| {
            let visible = mask.map(|mask| mask.narrow(3, 0, cache.used + 1));
            let rotation = self.model.rotation().at(positions);
            let hidden = self.forward(&tokens.unsqueeze(1), cache, &rotation, visible.as_ref());
            self.logits(&hidden.squeeze_dim(1))
        })
    }

    fn forward(&self, ids: &Tensor, cache: &mut KvCache, rotation: &Turn, mask: Option<&Tensor>) -> Tensor {
        let (rows, length) = ids.size2().expect("ids have two dimensions");
        let config = self.model.config();
        let (heads, shared, size) = (config.num_attention_heads, config.num_key_value_heads, config.head_dim);
        let mut x = Tensor::embedding(self.model.embedding(), ids, -1, false, false).to_kind(self.model.kind());
        for (index, layer) in self.layers.iter().enumerate() {
            let [input, behind] = &layer.norms;
            let read = normed(&x, input.as_ref(), config.rms_norm_eps);
            let projected = layer.projection.of(&read).view([rows, length, heads + 2 * shared, size]);
            // Queries and keys lie side by side and turn together.
            let turning = projected.narrow(2, 0, heads + shared);
            let turned = turn(rotation, &turning, layer.head_norms.as_ref(), config.rms_norm_eps);
            let (query, key) = (turned.narrow(2, 0, heads), turned.narrow(2, heads, shared));
            let value = projected.narrow(2, heads + shared, shared);
            let (keys, values) = cache.append(index as i64, &key, &value);
            let mixed =
                if length == 1 { attend_last(&query, &keys, &values, mask) } else { attend_all(&query, &key, &value) };
            x += layer.output.of(&mixed.reshape([rows, length, heads * size]));
            let read = normed(&x, behind.as_ref(), config.rms_norm_eps);
            let mut parts = layer.gate_up.of(&read).chunk(2, -1).into_iter();
            let (gate, up) = parts.next().zip(parts.next()).expect("a chunking in two has two parts");
            x += layer.down.of(&(gate.silu() * up));
        }
        cache.used += length;
        x
    }

    fn logits(&self, hidden: &Tensor) -> Tensor {
        normalise(&widened(hidden), self.model.config().rms_norm_eps).linear(&self.head, None::<&Tensor>)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sandbox;

    /// Logits at the last place of one row, without a cache.
    fn uncached(model: &Transformer, ids: &[i64]) -> Tensor {
        no_grad(|| {
            let hidden = sandbox::hidden(model, &Tensor::from_slice(ids).unsqueeze(0));
            model.logits(&hidden.select(1, -1))
        })
    }

    #[test]
    fn cached_logits_are_the_uncached_ones() {
        for model in sandbox::families() {
            let decoder = Decoder::new(&model);
            // Two prompts of unequal lengths; the second is expanded to two rows.
            let mut rows = vec![vec![1, 5, 7, 3], vec![1, 9], vec![1, 9]];
            let prompts = Tensor::from_slice2(&[[1i64, 5, 7, 3], [1, 9, 0, 0]]);
            let (prefilled, logits) = decoder.prefill(&prompts, &Tensor::from_slice(&[4i64, 2]));
            for (row, prompt) in [0, 1].into_iter().zip(&rows) {
                assert!(sandbox::distance(&logits.narrow(0, row, 1), &uncached(&model, prompt)) < 1e-5);
            }
            let mut cache = prefilled.expand(&Tensor::from_slice(&[0i64, 1, 1]), 10);
            let hidden = f32::NEG_INFINITY;
            let mut mask = Tensor::zeros([3, 1, 1, 10], (Kind::Float, Device::Cpu));
            let _ = mask.narrow(0, 1, 2).narrow(3, 2, 2).fill_(f64::from(hidden));
            for token in 0..3i64 {
                let tokens = [3 + token, 6 + token, 11 - token];
                let positions: Vec<i64> = rows.iter().map(|row| row.len() as i64).collect();
                rows.iter_mut().zip(tokens).for_each(|(row, id)| row.push(id));
                let logits = decoder.step(
                    &Tensor::from_slice(&tokens),
                    &Tensor::from_slice(&positions),
                    &mut cache,
                    Some(&mask),
                );
                for (index, row) in rows.iter().enumerate() {
                    let ours = logits.narrow(0, index as i64, 1);
                    let distance = sandbox::distance(&ours, &uncached(&model, row));
                    assert!(distance < 1e-5, "row {index} at token {token}: {distance}");
                }
            }
            // The first row leaves, the last takes its place.
            cache.compact(&Tensor::from_slice(&[2i64]), &Tensor::from_slice(&[0i64]), 2);
            mask = mask.index_select(0, &Tensor::from_slice(&[2i64, 1]));
            rows.swap_remove(0);
            assert_eq!((cache.rows(), cache.used()), (2, 7));
            let positions: Vec<i64> = rows.iter().map(|row| row.len() as i64).collect();
            for row in &mut rows {
                row.push(4);
            }
            let logits =
                decoder.step(&Tensor::from_slice(&[4i64, 4]), &Tensor::from_slice(&positions), &mut cache, Some(&mask));
            for (index, row) in rows.iter().enumerate() {
                assert!(sandbox::distance(&logits.narrow(0, index as i64, 1), &uncached(&model, row)) < 1e-5);
            }
        }
    }
}
