//! Generation token by token: every prompt is read once, and each of its samples goes on from it.
//!
//! Three engines do the same: on a processor kernels of our own, which share a prompt's keys and values among its samples and
//! forget rows at once; on a GPU `steps`, which a GPU replays; where both are switched off, or numbers are of a kind that the
//! kernels do not take, `kv_cache`, in libtorch's operations alone. What is computed depends on the prompts, the samples
//! and when each ended, and on nothing else. Everything here runs outside of the gradient graph.

use anyhow::Result;
use tch::{Kind, Tensor, no_grad};

use crate::model::Transformer;
use crate::model::kv_cache::{Decoder, KvCache};
use crate::model::layout::Layout;
use crate::model::steps::Steps;
use crate::model::transformer::{Layer, add_norm, attention, heads, norm};
use crate::native::{LayerCache, Prompts, Rows, gpu};

/// Samples under way.
pub struct Decoding<'a> {
    engine: Engine<'a>,
    /// The sample in each row.
    rows: Vec<usize>,
    /// The prompt of each sample, and its length.
    owners: Vec<(usize, i64)>,
    /// Tokens that were appended to every row.
    used: i64,
}

enum Engine<'a> {
    Native(Native<'a>),
    Steps(Steps<'a>),
    Plain(Plain<'a>),
}

impl<'a> Decoding<'a> {
    /// Reads `prompts`, none of them empty; sample s goes on from the prompt `owners[s]`, owners never falling. There is room
    /// for `new` tokens a sample. Gives the logits `[samples, V]` of each sample's first token, too.
    pub fn begin(model: &'a Transformer, prompts: &[&[i64]], owners: &[usize], new: usize) -> Result<(Self, Tensor)> {
        let (engine, logits) = if model.by_kernels() {
            let (engine, logits) = no_grad(|| Native::begin(model, prompts, owners.len(), new))?;
            (Engine::Native(engine), logits)
        } else if gpu::takes(model.device()) {
            let (engine, logits) = Steps::begin(model, prompts, owners, new)?;
            (Engine::Steps(engine), logits)
        } else {
            let (engine, logits) = Plain::begin(model, prompts, owners, new);
            (Engine::Plain(engine), logits)
        };
        Ok(Self::of(engine, prompts, owners, &logits))
    }

    fn of(engine: Engine<'a>, prompts: &[&[i64]], owners: &[usize], logits: &Tensor) -> (Self, Tensor) {
        let places: Vec<i64> = owners.iter().map(|&owner| owner as i64).collect();
        let logits = logits.index_select(0, &Tensor::from_slice(&places).to_device(logits.device()));
        let owners: Vec<(usize, i64)> = owners.iter().map(|&owner| (owner, prompts[owner].len() as i64)).collect();
        (Self { engine, rows: (0..owners.len()).collect(), owners, used: 0 }, logits)
    }

    /// The sample in each row.
    pub fn rows(&self) -> &[usize] {
        &self.rows
    }

    /// Tokens that the next step reads the keys of, prompts that rows share once.
    pub fn seen(&self) -> i64 {
        let shares = matches!(self.engine, Engine::Native(_));
        let (mut seen, mut last) = (0, None);
        for &sample in &self.rows {
            let (prompt, length) = self.owners[sample];
            seen += self.used + 1 + if shares && last == Some(prompt) { 0 } else { length };
            last = Some(prompt);
        }
        seen
    }

    /// Forgets samples that have ended. Some may stay for a while.
    pub fn forget(&mut self, ended: impl Fn(usize) -> bool) {
        match &mut self.engine {
            Engine::Native(_) => self.rows.retain(|&sample| !ended(sample)),
            Engine::Steps(engine) => engine.compact(&mut self.rows, ended),
            Engine::Plain(engine) => engine.compact(&mut self.rows, &self.owners, ended),
        }
    }

    /// Appends to every row the last token of its sample; gives the logits `[rows, V]` of the next ones, to be read before the
    /// next step.
    pub fn step(&mut self, last: impl Fn(usize) -> i64) -> Result<Tensor> {
        let tokens: Vec<i64> = self.rows.iter().map(|&sample| last(sample)).collect();
        let positions: Vec<i64> = self.rows.iter().map(|&sample| self.owners[sample].1 + self.used).collect();
        let logits = match &mut self.engine {
            Engine::Native(engine) => {
                let prompt = self.rows.iter().map(|&sample| self.owners[sample].0 as i64).collect();
                let slot = self.rows.iter().map(|&sample| sample as i64).collect();
                let rows = Rows { prompt, slot, position: positions };
                no_grad(|| engine.step(&tokens, &rows, self.used))
            }
            Engine::Steps(engine) => engine.step(&tokens, &positions)?,
            Engine::Plain(engine) => engine.step(&tokens, &positions),
        };
        self.used += 1;
        Ok(logits)
    }
}

/// The kernels' engine.
struct Native<'a> {
    model: &'a Transformer,
    layers: Vec<Layer>,
    prompts: Prompts,
    caches: Vec<LayerCache>,
}

impl<'a> Native<'a> {
    fn begin(model: &'a Transformer, prompts: &[&[i64]], samples: usize, new: usize) -> Result<(Self, Tensor)> {
        let (config, kind) = (model.config(), model.base().flat().kind());
        let (heads, epsilon) = (heads(config), config.rms_norm_eps);
        let layers: Vec<Layer> = model.layers().iter().map(Layer::frozen).collect();
        let layout = Layout::rows(prompts.iter().map(|prompt| prompt.len()), model.device());
        let places = Prompts::new(prompts.iter().map(|prompt| prompt.len() as i64).collect(), kind);
        let last: Vec<i64> =
            (0..prompts.len()).map(|prompt| layout.first(prompt) + prompts[prompt].len() as i64 - 1).collect();
        let last = Tensor::from_slice(&last);
        let mut x = model.embedding().index_select(0, &Tensor::from_slice(&prompts.concat()));
        let (mut delta, mut caches) = (None, Vec::with_capacity(layers.len()));
        for (index, layer) in layers.iter().enumerate() {
            let normed;
            (x, normed) = add_norm(&x, delta.as_ref(), &layer.input_norm, epsilon);
            let projected = layer.project(&normed, heads, epsilon);
            // The last token of a completion is never read again.
            let mut cache = LayerCache::new(&places, heads, samples as i64, new as i64 - 1, kind);
            let tables = model.rotation().tables();
            cache.store(&places, &projected, heads, layout.table(), layout.positions(), tables)?;
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
        let engine = Self { model, layers, prompts: places, caches };
        let logits = engine.logits(x, delta);
        Ok((engine, logits))
    }

    fn step(&mut self, tokens: &[i64], rows: &Rows, used: i64) -> Tensor {
        let config = self.model.config();
        let (heads, epsilon) = (heads(config), config.rms_norm_eps);
        let mut x = self.model.embedding().index_select(0, &Tensor::from_slice(tokens));
        let mut delta = None;
        for (layer, cache) in self.layers.iter().zip(&mut self.caches) {
            let normed;
            (x, normed) = add_norm(&x, delta.as_ref(), &layer.input_norm, epsilon);
            let projected = layer.project(&normed, heads, epsilon);
            let mixed = cache.attend(&self.prompts, &projected, heads, rows, used, self.model.rotation().tables());
            let behind;
            (x, behind) = layer.feed(&x, &mixed, epsilon);
            delta = Some(behind);
        }
        self.logits(x, delta)
    }

    fn logits(&self, x: Tensor, delta: Option<Tensor>) -> Tensor {
        let x = match delta {
            Some(delta) => x + delta,
            None => x,
        };
        let (weight, head) = self.model.head();
        norm(&x, weight, self.model.config().rms_norm_eps).linear(head, None::<&Tensor>)
    }
}

/// The engine of libtorch's operations.
struct Plain<'a> {
    decoder: Decoder<'a>,
    cache: KvCache,
    /// What each row may see.
    mask: Option<Tensor>,
    longest: i64,
    slots: i64,
}

impl<'a> Plain<'a> {
    fn begin(model: &'a Transformer, prompts: &[&[i64]], owners: &[usize], new: usize) -> (Self, Tensor) {
        let decoder = Decoder::new(model);
        let tensor = |values: &[i64]| Tensor::from_slice(values).to_device(model.device());
        let longest = prompts.iter().map(|prompt| prompt.len()).max().unwrap_or(0);
        let mut ids = vec![model.config().padding(); prompts.len() * longest];
        for (row, prompt) in ids.chunks_mut(longest).zip(prompts) {
            row[..prompt.len()].copy_from_slice(prompt);
        }
        let lengths: Vec<i64> = prompts.iter().map(|prompt| prompt.len() as i64).collect();
        let ids = tensor(&ids).view([prompts.len() as i64, longest as i64]);
        let (prefilled, logits) = decoder.prefill(&ids, &tensor(&lengths));
        // The last token of a completion is never read again.
        let slots = (longest + new - 1) as i64;
        let places: Vec<i64> = owners.iter().map(|&owner| owner as i64).collect();
        let cache = prefilled.expand(&tensor(&places), slots);
        let mut engine = Self { decoder, cache, mask: None, longest: longest as i64, slots };
        engine.mask = engine.visible(owners.iter().map(|&owner| lengths[owner]));
        (engine, logits)
    }

    fn step(&mut self, tokens: &[i64], positions: &[i64]) -> Tensor {
        let tensor = |values: &[i64]| Tensor::from_slice(values).to_device(self.decoder.device());
        let (tokens, positions) = (tensor(tokens), tensor(positions));
        self.decoder.step(&tokens, &positions, &mut self.cache, self.mask.as_ref())
    }

    /// What rows with prompts of these lengths may see of their slots, `[R, 1, 1, slots]`: all but the gap behind a prompt
    /// shorter than the longest. `None` where no row has a gap.
    fn visible(&self, prompts: impl Iterator<Item = i64> + Clone) -> Option<Tensor> {
        if prompts.clone().all(|length| length == self.longest) {
            return None;
        }
        let rows = prompts.clone().count();
        let mut mask = vec![0f32; rows * self.slots as usize];
        for (row, length) in mask.chunks_mut(self.slots as usize).zip(prompts) {
            row[length as usize..self.longest as usize].fill(f32::NEG_INFINITY);
        }
        let mask = Tensor::from_slice(&mask).view([rows as i64, 1, 1, self.slots]).to_kind(Kind::Float);
        Some(mask.to_device(self.decoder.device()))
    }

    /// Moves the last rows that go on into the places of rows that have ended, once these are an eighth of all.
    fn compact(&mut self, rows: &mut Vec<usize>, owners: &[(usize, i64)], ended: impl Fn(usize) -> bool) {
        let active = rows.iter().filter(|&&row| !ended(row)).count();
        if (rows.len() - active) * 8 < rows.len() {
            return;
        }
        let holes = (0..active).filter(|&place| ended(rows[place]));
        let movers = (active..rows.len()).filter(|&place| !ended(rows[place]));
        let (to, from): (Vec<i64>, Vec<i64>) = holes.zip(movers).map(|(to, from)| (to as i64, from as i64)).unzip();
        for (&to, &from) in to.iter().zip(&from) {
            rows[to as usize] = rows[from as usize];
        }
        rows.truncate(active);
        let tensor = |values: &[i64]| Tensor::from_slice(values).to_device(self.decoder.device());
        self.cache.compact(&tensor(&from), &tensor(&to), active as i64);
        self.mask = self.visible(rows.iter().map(|&row| owners[row].1));
    }
}
