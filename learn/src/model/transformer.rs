//! The forward pass: token ids to hidden states to logits, for every family of [`ModelConfig`].
//!
//! Sequences stand one behind another without padding, and only attention knows where one ends. Projections that read the
//! same states are one matrix. Weights that are trained are kept in fp32 whatever the precision of the passes; the last norm and
//! the output projection compute in fp32, too. It knows nothing of losses or text.

use std::collections::BTreeMap;
use std::path::Path;

use anyhow::Result;
use pipe::stages::training::{Lora, Precision};
use tch::{Device, Kind, Tensor, no_grad};

use crate::model::companions::save_companions;
pub(crate) use crate::model::layer::{Layer, add_norm, attention, heads, norm};
use crate::model::layer::{Projection, Weight};
use crate::model::lora::{Adapter, Adapters};
use crate::model::rope::Rotation;
use crate::model::weights::Weights;
use crate::model::{Layout, ModelConfig, folder};
use crate::native;

/// Before the names of frozen weights in a training state.
pub const BASE: &str = "base.";

/// A decoder with its weights.
#[derive(Debug)]
pub struct Transformer {
    config: ModelConfig,
    /// All weights of the model proper; frozen where there are adapters.
    base: Weights,
    adapters: Option<Adapters>,
    embedding: Tensor,
    layers: Vec<Layer>,
    norm: Tensor,
    head: Tensor,
    rotation: Rotation,
    device: Device,
    /// What the layers compute in.
    kind: Kind,
    activation_checkpointing: bool,
}

/// The names, shapes and decay flags of the weights that `config` needs, in the order of the layers.
///
/// Projections that read the same states are neighbours, and so are their biases: generation takes them as one matrix.
pub fn plan(config: &ModelConfig) -> Vec<(String, Vec<i64>, bool)> {
    let (hidden, inner) = (config.hidden_size, config.intermediate_size);
    let queries = config.num_attention_heads * config.head_dim;
    let keys = config.num_key_value_heads * config.head_dim;
    let mut plan = vec![("model.embed_tokens.weight".to_owned(), vec![config.vocab_size, hidden], false)];
    for layer in 0..config.num_hidden_layers {
        let mut add = |name: &str, shape: &[i64], decays: bool| {
            plan.push((format!("model.layers.{layer}.{name}"), shape.to_vec(), decays));
        };
        add("input_layernorm.weight", &[hidden], false);
        for (name, rows) in [("q", queries), ("k", keys), ("v", keys)] {
            add(&format!("self_attn.{name}_proj.weight"), &[rows, hidden], true);
        }
        if config.projection_bias() {
            for (name, rows) in [("q", queries), ("k", keys), ("v", keys)] {
                add(&format!("self_attn.{name}_proj.bias"), &[rows], false);
            }
        }
        if config.head_norms() {
            add("self_attn.q_norm.weight", &[config.head_dim], false);
            add("self_attn.k_norm.weight", &[config.head_dim], false);
        }
        add("self_attn.o_proj.weight", &[hidden, queries], true);
        if config.output_bias() {
            add("self_attn.o_proj.bias", &[hidden], false);
        }
        add("post_attention_layernorm.weight", &[hidden], false);
        let feed_forward = [("gate", inner, hidden), ("up", inner, hidden), ("down", hidden, inner)];
        for (name, rows, columns) in feed_forward {
            add(&format!("mlp.{name}_proj.weight"), &[rows, columns], true);
        }
        if config.feed_forward_bias() {
            for (name, rows, _) in feed_forward {
                add(&format!("mlp.{name}_proj.bias"), &[rows], false);
            }
        }
    }
    plan.push(("model.norm.weight".to_owned(), vec![hidden], false));
    if !config.tie_word_embeddings {
        plan.push(("lm_head.weight".to_owned(), vec![config.vocab_size, hidden], true));
    }
    plan
}

impl Transformer {
    /// Reads a Hugging Face folder to train it in fp32 on `device`; a missing, unused or misshapen weight is an error.
    pub fn load(folder: &Path, device: Device) -> Result<Self> {
        Self::load_to_train(folder, device, Precision::Fp32, None, 0)
    }

    /// The model of a folder that is not trained: it takes no memory for gradients, and in bf16 half the memory for layers.
    pub fn load_frozen(folder: &Path, device: Device, precision: Precision) -> Result<Self> {
        let config = ModelConfig::read(folder)?;
        let weights = frozen(&config, device, precision);
        Self::read(folder, config, weights, device, precision)
    }

    /// The model of a folder as a training begins with it: all of it, or frozen with fresh adapters that `seed` decides.
    pub fn load_to_train(
        folder: &Path,
        device: Device,
        precision: Precision,
        lora: Option<&Lora>,
        seed: u64,
    ) -> Result<Self> {
        if let Some(lora) = lora {
            return Self::load_frozen(folder, device, precision)?.adapt(lora, seed);
        }
        let config = ModelConfig::read(folder)?;
        let weights = Weights::zeros(plan(&config), device);
        Self::read(folder, config, weights, device, precision)
    }

    fn read(
        folder: &Path,
        config: ModelConfig,
        weights: Weights,
        device: Device,
        precision: Precision,
    ) -> Result<Self> {
        let tied = config.tie_word_embeddings.then_some(("lm_head.weight", "model.embed_tokens.weight"));
        folder::read(folder, &weights, tied)?;
        Ok(Self::of(config, weights, None, device, kind(precision)))
    }

    /// The model of a folder's configuration for a training state to fill: what is trained is 0 or fresh, and where there
    /// are adapters the frozen weights are those of `tensors` named `base.*`.
    pub fn empty(
        folder: &Path,
        device: Device,
        precision: Precision,
        lora: Option<(&Lora, u64)>,
        tensors: &BTreeMap<String, Tensor>,
    ) -> Result<Self> {
        let Some((lora, seed)) = lora else {
            let config = ModelConfig::read(folder)?;
            let weights = Weights::zeros(plan(&config), device);
            return Ok(Self::of(config, weights, None, device, kind(precision)));
        };
        Self::restored(folder, device, precision, BASE, tensors)?.adapt(lora, seed)
    }

    /// The model of a folder's configuration with the weights of `tensors` whose names begin with `prefix`, frozen.
    pub fn restored(
        folder: &Path,
        device: Device,
        precision: Precision,
        prefix: &str,
        tensors: &BTreeMap<String, Tensor>,
    ) -> Result<Self> {
        let config = ModelConfig::read(folder)?;
        let weights = frozen(&config, device, precision);
        weights.load(prefix, tensors)?;
        Ok(Self::of(config, weights, None, device, kind(precision)))
    }

    /// With the activations of layers computed again in the backward pass instead of kept (see [`crate::pass::Pass`]).
    #[must_use]
    pub fn with_activation_checkpointing(self, activation_checkpointing: bool) -> Self {
        Self { activation_checkpointing, ..self }
    }

    /// Whether adapters are trained and the weights of the model proper are frozen.
    pub fn has_adapters(&self) -> bool {
        self.adapters.is_some()
    }

    /// What a training state must hold beside what is trained: the frozen weights below adapters, f32.
    pub fn frozen(&self) -> Vec<(String, Tensor)> {
        let wide = |(name, tensor): (String, Tensor)| (name, tensor.to_kind(Kind::Float));
        if self.has_adapters() { self.base.tensors(BASE).into_iter().map(wide).collect() } else { Vec::new() }
    }

    /// A model whose weights are all 0.
    pub(crate) fn zeros(config: ModelConfig, device: Device) -> Self {
        Self::zeros_in(config, Kind::Float, device)
    }

    /// The same with layers that compute in `kind`.
    pub(crate) fn zeros_in(config: ModelConfig, kind: Kind, device: Device) -> Self {
        let weights = Weights::zeros(plan(&config), device);
        Self::of(config, weights, None, device, kind)
    }

    /// The same model in f64.
    #[cfg(test)]
    pub(crate) fn double(&self) -> Self {
        let weights = Weights::of_kind(plan(&self.config), Kind::Double, self.device);
        no_grad(|| weights.flat().shallow_clone().copy_(self.base.flat()));
        Self::of(self.config.clone(), weights, None, self.device, Kind::Double)
    }

    /// The same model with master weights of its own and passes in bf16.
    #[cfg(test)]
    pub(crate) fn half(&self) -> Self {
        let model = Self::zeros_in(self.config.clone(), Kind::BFloat16, self.device);
        no_grad(|| model.base.flat().shallow_clone().copy_(self.base.flat()));
        model
    }

    /// The same model with its weights frozen and adapters to train.
    pub(crate) fn adapt(self, lora: &Lora, seed: u64) -> Result<Self> {
        let adapters = Adapters::new(&self.config, lora, seed, self.device)?;
        let base = if self.base.gradient().numel() == 0 {
            self.base
        } else {
            let precision = if self.kind == Kind::BFloat16 { Precision::Bf16 } else { Precision::Fp32 };
            let frozen = frozen(&self.config, self.device, precision);
            frozen.load("", &self.base.tensors("").into_iter().collect())?;
            frozen
        };
        Ok(Self::of(self.config, base, Some(adapters), self.device, self.kind))
    }

    fn of(config: ModelConfig, weights: Weights, adapters: Option<Adapters>, device: Device, kind: Kind) -> Self {
        let heads = heads(&config);
        let layers = (0..config.num_hidden_layers)
            .map(|layer| {
                let leaf = |name: &str| weights.leaf(&format!("model.layers.{layer}.{name}"));
                let projection = |names: &[&str], rows: i64, biased: bool| {
                    let name = |name: &str, part: &str| format!("model.layers.{layer}.{name}.{part}");
                    let weight = match &adapters {
                        None => Weight::Whole(weights.joined(&name(names[0], "weight"), rows)),
                        Some(adapters) => Weight::Parts(
                            names
                                .iter()
                                .map(|part| name(part, "weight"))
                                .map(|name| (weights.leaf(&name), adapters.of(&name).map(Adapter::shallow_clone)))
                                .collect(),
                        ),
                    };
                    Projection { weight, bias: biased.then(|| weights.joined(&name(names[0], "bias"), rows)), kind }
                };
                let (projected, fed) = (config.projection_bias(), config.feed_forward_bias());
                let norms = || (leaf("self_attn.q_norm.weight"), leaf("self_attn.k_norm.weight"));
                let attention = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"];
                let (hidden, inner) = (config.hidden_size, config.intermediate_size);
                Layer {
                    input_norm: leaf("input_layernorm.weight"),
                    query_key_value: projection(&attention, heads.projected(), projected),
                    head_norms: config.head_norms().then(norms),
                    output: projection(&["self_attn.o_proj"], hidden, config.output_bias()),
                    post_norm: leaf("post_attention_layernorm.weight"),
                    gate_up: projection(&["mlp.gate_proj", "mlp.up_proj"], 2 * inner, fed),
                    down: projection(&["mlp.down_proj"], hidden, fed),
                }
            })
            .collect();
        let head = if config.tie_word_embeddings { "model.embed_tokens.weight" } else { "lm_head.weight" };
        Self {
            embedding: weights.leaf("model.embed_tokens.weight"),
            layers,
            norm: weights.leaf("model.norm.weight"),
            head: weights.leaf(head),
            rotation: Rotation::new(&config, weights.flat().kind(), device),
            config,
            base: weights,
            adapters,
            device,
            kind,
            activation_checkpointing: false,
        }
    }

    /// The architecture.
    pub fn config(&self) -> &ModelConfig {
        &self.config
    }

    /// Where the weights lie.
    pub fn device(&self) -> Device {
        self.device
    }

    /// The kind in which the layers compute and keep keys and values.
    pub fn kind(&self) -> Kind {
        self.kind
    }

    /// Whether the backward pass computes the activations of layers again.
    pub fn activation_checkpointing(&self) -> bool {
        self.activation_checkpointing
    }

    /// Whether layers are computed by kernels of our own.
    pub fn by_kernels(&self) -> bool {
        native::takes_kind(self.kind, self.device)
    }

    /// The weights that a training moves, with their gradients and names: all of the model's, or its adapters alone.
    pub fn weights(&self) -> &Weights {
        self.adapters.as_ref().map_or(&self.base, |adapters| &adapters.weights)
    }

    /// All weights of the model proper, without adapters.
    pub fn base(&self) -> &Weights {
        &self.base
    }

    /// Every weight with its adapter added, f32, by its Hugging Face name.
    pub fn merged(&self) -> Vec<(String, Tensor)> {
        let adapter = |name: &str| self.adapters.as_ref()?.of(name);
        let named = self.base.tensors("").into_iter();
        no_grad(|| {
            named
                .map(|(name, weight)| match adapter(&name) {
                    Some(adapter) => (name, weight + adapter.delta()),
                    None => (name, weight.to_kind(self.base.flat().kind())),
                })
                .collect()
        })
    }

    /// The matrix `name` as it acts: with its adapter, where it has one, outside of the gradient graph and in the kind that the
    /// layers compute in.
    pub(crate) fn effective(&self, name: &str) -> Tensor {
        let weight = self.base.leaf(name).detach();
        match self.adapters.as_ref().and_then(|adapters| adapters.of(name)) {
            Some(adapter) => no_grad(|| (weight + adapter.delta()).to_kind(self.kind)),
            None => weight.to_kind(self.kind),
        }
    }

    /// Neighbouring matrices as one, as they act, in the kind that the layers compute in; `rows` is the sum of their rows.
    pub(crate) fn stacked(&self, names: &[String], rows: i64) -> Tensor {
        if self.adapters.is_none() {
            return self.base.stacked(&names[0], rows).to_kind(self.kind);
        }
        Tensor::cat(&names.iter().map(|name| self.effective(name)).collect::<Vec<_>>(), 0)
    }

    /// The leaves of the gradient graph with their Hugging Face names, in a fixed order.
    pub fn parameters(&self) -> Vec<(String, Tensor)> {
        self.weights().leaves()
    }

    /// Sets every gradient to zero; backward passes add to them.
    pub fn zero_gradients(&self) {
        self.weights().zero_gradients();
    }

    /// Hidden states `[N, H]` behind the last layer, before the last norm, for ids `[N]` i64 that stand as `layout` says.
    pub fn hidden(&self, ids: &Tensor, layout: &Layout) -> Tensor {
        self.forward(ids, layout, None)
    }

    /// [`Transformer::hidden`] at the tokens `positions` `[M]` i64 alone, `[M, H]`: behind its attention the last layer computes
    /// nothing for others.
    pub fn hidden_at(&self, ids: &Tensor, layout: &Layout, positions: &Tensor) -> Tensor {
        self.forward(ids, layout, Some(positions))
    }

    fn forward(&self, ids: &Tensor, layout: &Layout, wanted: Option<&Tensor>) -> Tensor {
        let mut x = self.embed(ids, layout);
        // What the next norm adds before it norms.
        let mut delta: Option<Tensor> = None;
        for index in 0..self.layers.len() {
            let through = self.through(index, &x, delta.as_ref(), layout, wanted);
            (x, delta) = (through.states, Some(through.delta));
        }
        // Never in place: the norm's backward pass needs the sum as it was.
        match delta {
            Some(delta) => x + delta,
            None => x,
        }
    }

    /// The states `[N, H]` that the first layer reads.
    pub(crate) fn embed(&self, ids: &Tensor, layout: &Layout) -> Tensor {
        let positions = self.config.max_position_embeddings;
        assert!(layout.longest() <= positions, "a sequence of {} tokens in a model of {positions}", layout.longest());
        assert_eq!(ids.size(), [layout.tokens()], "ids as the layout has tokens");
        Tensor::embedding(&self.embedding, ids, -1, false, false).to_kind(self.kind)
    }

    /// The layer `index` on `x` `[N, H]` and what is still to be added to it. The last layer computes nothing behind its
    /// attention but for the tokens `wanted`.
    pub(crate) fn through(
        &self,
        index: usize,
        x: &Tensor,
        delta: Option<&Tensor>,
        layout: &Layout,
        wanted: Option<&Tensor>,
    ) -> Through {
        let (heads, epsilon, layer) = (heads(&self.config), self.config.rms_norm_eps, &self.layers[index]);
        let (read, normed) = add_norm(x, delta, &layer.input_norm, epsilon);
        let projected = layer.project(&normed, heads, epsilon);
        let mut mixed = attention(&projected, heads, layout, &self.rotation);
        let mut x = read.shallow_clone();
        if let Some(wanted) = wanted.filter(|_| index + 1 == self.layers.len()) {
            (x, mixed) = (x.index_select(0, wanted), mixed.index_select(0, wanted));
        }
        let (states, delta) = layer.feed(&x, &mixed, epsilon);
        Through { read, states, delta }
    }

    /// Logits `[N, V]` of hidden states `[N, H]`: the last norm and the output projection, in fp32 or wider.
    pub fn logits(&self, hidden: &Tensor) -> Tensor {
        let hidden = hidden.to_kind(self.head.kind());
        norm(&hidden, &self.norm, self.config.rms_norm_eps).linear(&self.head, None::<&Tensor>)
    }

    pub(crate) fn layers(&self) -> &[Layer] {
        &self.layers
    }

    /// The weights of the last norm, `[H]`, and of the output projection, `[V, H]`.
    pub(crate) fn head(&self) -> (&Tensor, &Tensor) {
        (&self.norm, &self.head)
    }

    /// The last norm's weight multiplied into the output projection, `[V, H]`, in fp32 or wider.
    pub(crate) fn folded_head(&self) -> Tensor {
        no_grad(|| &self.head * &self.norm)
    }

    /// The gradient of an embedding that is trained and is the output projection, too.
    pub(crate) fn tied_gradient(&self) -> Option<Tensor> {
        (self.config.tie_word_embeddings && self.embedding.requires_grad()).then(|| self.embedding.grad())
    }

    pub(crate) fn rotation(&self) -> &Rotation {
        &self.rotation
    }

    pub(crate) fn embedding(&self) -> &Tensor {
        &self.embedding
    }

    /// Writes a Hugging Face folder: the weights in fp32 with adapters merged, and configuration, tokenizer and generation files as they stand
    /// in `companions`, the folder that the model came from. The same weights give the same bytes.
    pub fn save(&self, folder: &Path, companions: &Path) -> Result<()> {
        save_companions(companions, folder)?;
        folder::write(&folder.join(folder::WEIGHTS_FILE), self.merged())
    }
}

/// What a layer makes.
pub(crate) struct Through {
    /// What it has read, all added, `[N, H]`.
    pub(crate) read: Tensor,
    /// Its states `[N, H]`, or `[M, H]` where only `M` are wanted.
    pub(crate) states: Tensor,
    /// What is to be added to them.
    pub(crate) delta: Tensor,
}

/// The kind in which layers compute.
pub fn kind(precision: Precision) -> Kind {
    match precision {
        Precision::Fp32 => Kind::Float,
        Precision::Bf16 => Kind::BFloat16,
    }
}

/// Weights of a model that is not trained. In bf16 the projections of layers are kept as they act; what computes in fp32 stays.
fn frozen(config: &ModelConfig, device: Device, precision: Precision) -> Weights {
    let halves = precision == Precision::Bf16;
    let half = |name: &str| halves && name.starts_with("model.layers.") && !name.ends_with("norm.weight");
    Weights::frozen(plan(config), half, device)
}

#[cfg(test)]
mod tests {
    use tch::Kind;

    use std::fs;

    use serde_json::{Value, json};

    use super::*;
    use crate::sandbox;

    fn ids(rows: &[&[i64]]) -> Tensor {
        Tensor::from_slice2(rows)
    }

    fn all_logits(model: &Transformer, ids: &Tensor) -> Tensor {
        no_grad(|| {
            let hidden = sandbox::hidden(model, ids);
            model.logits(&hidden.flatten(0, 1)).view([ids.size()[0], ids.size()[1], -1])
        })
    }

    /// The golden numbers come from `tests/fixtures/models.py`, run with transformers.
    #[test]
    fn logits_are_those_of_transformers() {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/models");
        for name in ["qwen2_tied", "qwen2_untied", "qwen2_yarn", "qwen3", "llama_llama3", "llama_linear"] {
            let model = Transformer::load(&folder.join(name), Device::Cpu).expect("the fixture loads");
            let text = fs::read_to_string(folder.join(name).join("golden.json")).expect("golden numbers");
            let golden: Value = serde_json::from_str(&text).expect("JSON");
            let ids: Vec<Vec<i64>> = serde_json::from_value(golden["ids"].clone()).expect("ids");
            let logits: Vec<f32> = serde_json::from_value(golden["logits"].clone()).expect("logits");
            let ours = all_logits(&model, &Tensor::from_slice2(&ids));
            let theirs = Tensor::from_slice(&logits).view_as(&ours);
            let distance = sandbox::distance(&ours, &theirs);
            assert!(distance < 1e-4, "{name}: {distance}");
            assert!(theirs.abs().max().double_value(&[]) > 0.5, "{name}: the logits say something");
        }
    }

    #[test]
    fn saving_is_byte_reproducible_and_loading_gives_the_same_model() {
        let (source, model) = sandbox::model(&json!({}));
        fs::write(source.path().join("tokenizer.json"), "{}").expect("a companion");
        let folders = [tempfile::tempdir().expect("a folder"), tempfile::tempdir().expect("a folder")];
        for folder in &folders {
            model.save(folder.path(), source.path()).expect("saved");
        }
        for name in ["config.json", "model.safetensors", "tokenizer.json", "generation_config.json"] {
            let read = |folder: &tempfile::TempDir| fs::read(folder.path().join(name)).expect(name);
            assert_eq!(read(&folders[0]), read(&folders[1]), "{name}");
        }
        let again = Transformer::load(folders[0].path(), Device::Cpu).expect("a model");
        assert_eq!(again.weights().flat(), model.weights().flat());
        assert_eq!(again.config(), model.config());
    }

    #[test]
    fn a_folder_with_other_weights_is_refused() {
        let refuse = |written: &Value, claimed: &Value| {
            let folder = tempfile::tempdir().expect("a folder");
            sandbox::write(folder.path(), claimed);
            let config = fs::read(folder.path().join("config.json")).expect("config");
            sandbox::write(folder.path(), written);
            fs::write(folder.path().join("config.json"), config).expect("written");
            format!("{:#}", Transformer::load(folder.path(), Device::Cpu).expect_err("it does not fit"))
        };
        let missing = refuse(&json!({}), &json!({"layers": 3}));
        assert!(missing.contains("`model.layers.2.input_layernorm.weight` is missing"), "{missing}");
        assert!(missing.contains("11 others"), "{missing}");
        let unused = refuse(&json!({"layers": 3}), &json!({}));
        assert!(unused.contains("model.layers.2") && unused.contains("no place"), "{unused}");
        let untied = refuse(&json!({"tie_word_embeddings": false}), &json!({}));
        assert!(untied.contains("lm_head.weight"), "{untied}");
        let shape = refuse(&json!({"intermediate_size": 32}), &json!({}));
        assert!(shape.contains("[16, 32]") && shape.contains("[16, 24]"), "{shape}");
    }

    #[test]
    fn padding_and_batch_mates_do_not_reach_a_row() {
        for model in sandbox::families() {
            let alone = all_logits(&model, &ids(&[&[1, 5, 7, 3]]));
            let padded = all_logits(&model, &ids(&[&[1, 5, 7, 3, 0, 0, 9], &[4, 4, 8, 2, 6, 1, 1]]));
            let distance = sandbox::distance(&padded.narrow(0, 0, 1).narrow(1, 0, 4), &alone);
            assert!(distance < 1e-5, "{distance}");
        }
    }

    #[test]
    fn every_weight_gets_a_gradient_in_the_common_buffer() {
        for model in sandbox::families() {
            gradients_gather(&model);
        }
    }

    fn gradients_gather(model: &Transformer) {
        let loss = || {
            model
                .logits(&sandbox::hidden(model, &ids(&[&[1, 5, 7, 3, 8, 9, 2]])).flatten(0, 1))
                .square()
                .sum(Kind::Float)
        };
        loss().backward();
        let once = model.weights().gradient().copy();
        for ((name, leaf), (_, gathered)) in
            model.parameters().iter().zip(model.weights().named("", model.weights().gradient()))
        {
            assert!(gathered.abs().max().double_value(&[]) > 0.0, "{name} has no gradient");
            assert_eq!(leaf.grad(), gathered, "{name}");
        }
        loss().backward();
        assert!(sandbox::relative(model.weights().gradient(), &(&once * 2.0)) < 1e-6, "gradients add up");
        model.zero_gradients();
        loss().backward();
        assert_eq!(*model.weights().gradient(), once, "the same pass gives the same bits");
    }
}
