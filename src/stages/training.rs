//! Parameters that the training kinds share: optimizer, learning-rate schedule, validation on the way.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::pipeline::stage::{Part, Problem, Upstream};
use crate::rewards::unknown_measure;
use crate::stages::sampling::Filters;
use crate::tasks::TaskSpec;

/// The floating-point format of a model's passes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Precision {
    /// 32 bits throughout.
    #[default]
    Fp32,
    /// bfloat16 in the layers, with fp32 inside norms and rotations; weights that are trained, their gradients and moments, the
    /// output projection and log-probabilities stay fp32.
    Bf16,
}

impl Precision {
    /// Whether it is the default, which is not written.
    pub fn is_default(&self) -> bool {
        *self == Self::default()
    }
}

/// Whether an option is off, which is not written.
#[expect(clippy::trivially_copy_pass_by_ref, reason = "serde hands a reference")]
pub(crate) fn is_off(option: &bool) -> bool {
    !option
}

/// AdamW and gradient clipping (Loshchilov and Hutter 2019, decoupled weight decay).
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Optimizer {
    /// Decay of the first moment, per step.
    #[schemars(range(min = 0.0), extend("exclusiveMaximum" = 1.0))]
    pub beta1: f64,
    /// Decay of the second moment, per step.
    #[schemars(range(min = 0.0), extend("exclusiveMaximum" = 1.0))]
    pub beta2: f64,
    /// Added to the root of the second moment.
    #[schemars(extend("exclusiveMinimum" = 0.0))]
    pub epsilon: f64,
    /// Decoupled weight decay on matrices (embeddings, norms and biases have none), times the learning rate.
    #[schemars(range(min = 0.0))]
    pub weight_decay: f64,
    /// The gradient's global norm is clipped to this; 0 turns clipping off.
    #[schemars(range(min = 0.0))]
    pub max_gradient_norm: f64,
}

impl Default for Optimizer {
    fn default() -> Self {
        Self { beta1: 0.9, beta2: 0.98, epsilon: 1e-8, weight_decay: 0.0, max_gradient_norm: 1.0 }
    }
}

/// How the learning rate falls after warm-up.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Decay {
    /// Along half a cosine to `final_ratio`.
    Cosine,
    /// Along a line to `final_ratio`.
    Linear,
    /// Not at all.
    Constant,
}

/// The learning-rate schedule: linear warm-up, then decay; with a `decay_ratio` below 1 a constant rate between the two.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Schedule {
    /// The shape after warm-up.
    pub decay: Decay,
    /// The share of all steps over which the rate rises from 0 to its peak.
    #[schemars(range(min = 0.0, max = 1.0))]
    pub warmup_ratio: f64,
    /// The rate at the last step, as a share of the peak.
    #[schemars(range(min = 0.0, max = 1.0))]
    pub final_ratio: f64,
    /// The share of all steps, at the end, over which the rate falls (warm-up, stable, decay); 1 is all steps after warm-up.
    #[serde(skip_serializing_if = "Schedule::is_all")]
    #[schemars(range(max = 1.0), extend("exclusiveMinimum" = 0.0))]
    #[schemars(extend("default" = 1.0))]
    pub decay_ratio: f64,
}

impl Default for Schedule {
    fn default() -> Self {
        Self { decay: Decay::Cosine, warmup_ratio: 0.05, final_ratio: 0.1, decay_ratio: 1.0 }
    }
}

impl Schedule {
    /// Warm-up over a twentieth of the steps, then a constant rate: what reinforcement learning starts from.
    pub fn constant() -> Self {
        Self { decay: Decay::Constant, ..Self::default() }
    }

    // A parameter that came later: keys from before it stay what they were.
    #[expect(clippy::trivially_copy_pass_by_ref, reason = "serde hands a reference")]
    fn is_all(ratio: &f64) -> bool {
        *ratio >= 1.0
    }

    /// What is wrong with the parameters beyond their schema.
    pub fn problems(&self) -> Option<Problem> {
        if self.decay_ratio >= 1.0 {
            return None;
        }
        if self.decay == Decay::Constant {
            let problem = Problem::new("schedule.decay_ratio", "a `constant` rate does not fall");
            return Some(problem.hint("set `decay` to `cosine` or `linear`, or leave `decay_ratio` out"));
        }
        (self.warmup_ratio + self.decay_ratio > 1.0 + 1e-9).then(|| {
            let (warmup, decay) = (self.warmup_ratio, self.decay_ratio);
            let message = format!("warm-up ({warmup}) and decay ({decay}) are more than all steps together");
            Problem::new("schedule.decay_ratio", message)
        })
    }
}

/// Validation on the way: generation on held-out instances, and which state becomes the output `best`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[schemars(extend("additionalProperties" = false))]
pub struct Validate {
    /// Steps between two validations; the last step is always validated.
    #[schemars(range(min = 1))]
    pub every: u64,
    /// Instances of the validation split, from its beginning.
    #[schemars(range(min = 1))]
    pub samples: u64,
    /// The measurement whose highest mean selects `best` (the earliest wins a tie).
    #[serde(default = "Validate::default_select")]
    pub select: String,
    /// The split to validate on; the test split selects nothing.
    #[serde(default = "Validate::default_split")]
    pub split: String,
    /// The sampling temperature; 0 is greedy.
    #[serde(default)]
    #[schemars(range(min = 0.0))]
    pub temperature: f64,
    /// Which tokens may be drawn, and what ends a completion.
    #[serde(flatten)]
    pub filters: Filters,
}

impl Validate {
    fn default_select() -> String {
        "solved".to_owned()
    }
    fn default_split() -> String {
        "validation".to_owned()
    }
}

/// When a run is told that its reward rises without the task being solved: over validations, with a share of false alarms.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Alarm {
    /// Validations that are looked at together.
    #[schemars(range(min = 4))]
    pub window: u64,
    /// The chance of a false alarm in a whole run.
    #[schemars(extend("exclusiveMinimum" = 0.0, "exclusiveMaximum" = 1.0))]
    pub level: f64,
}

impl Alarm {
    /// Whether it is the default, which is not written.
    pub fn is_default(&self) -> bool {
        *self == Self::default()
    }
}

impl Default for Alarm {
    fn default() -> Self {
        Self { window: 8, level: 0.05 }
    }
}

/// Low-rank adapters (LoRA, Hu et al. 2021): the model's own weights stay, and `W + alpha / rank * B A` takes the place of
/// each adapted matrix W. Checkpoints are merged: plain models.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Lora {
    /// Rows of A and columns of B.
    #[schemars(range(min = 1))]
    pub rank: u64,
    /// The product is scaled by alpha / rank; 0 takes twice the rank.
    #[serde(default)]
    #[schemars(range(min = 0.0))]
    pub alpha: f64,
    /// The projections that get adapters, such as `["q_proj", "v_proj"]`; `all` stands for every one of a layer.
    #[serde(default = "Lora::default_targets")]
    pub targets: Vec<String>,
    /// Dropout before A; only 0 is implemented.
    #[serde(default)]
    #[schemars(range(min = 0.0, max = 1.0))]
    pub dropout: f64,
}

/// The projections of a layer, by the names that [`Lora::targets`] may hold.
pub const PROJECTIONS: &[&str] = &["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"];

impl Lora {
    const ALL: &'static str = "all";

    fn default_targets() -> Vec<String> {
        vec![Self::ALL.to_owned()]
    }

    /// alpha / rank, with the default written out.
    pub fn scale(&self) -> f64 {
        if self.alpha > 0.0 { self.alpha / self.rank as f64 } else { 2.0 }
    }

    /// Whether the projection `name` gets an adapter.
    pub fn adapts(&self, name: &str) -> bool {
        PROJECTIONS.contains(&name) && self.targets.iter().any(|target| target == name || target == Self::ALL)
    }

    /// What is wrong with the parameters beyond their schema.
    pub fn problems(&self) -> Vec<Problem> {
        let mut problems = Vec::new();
        let names = format!("`{}` or `{}`", PROJECTIONS.join("`, `"), Self::ALL);
        if self.targets.is_empty() {
            problems.push(Problem::new("lora.targets", "no projection gets an adapter").hint(format!("name {names}")));
        }
        for target in &self.targets {
            if !PROJECTIONS.contains(&target.as_str()) && target != Self::ALL {
                let near = PROJECTIONS.iter().max_by(|one, other| {
                    strsim::jaro_winkler(target, one).total_cmp(&strsim::jaro_winkler(target, other))
                });
                let hint = format!("did you mean `{}`? there are {names}", near.unwrap_or(&Self::ALL));
                problems.push(Problem::new("lora.targets", format!("`{target}` is no projection")).hint(hint));
            }
        }
        if self.dropout > 0.0 {
            let message = format!("`dropout` is {}, but dropout on adapters is not implemented", self.dropout);
            let hint = "leave it out: sampler and trainer must use the same weights";
            problems.push(Problem::new("lora.dropout", message).hint(hint));
        }
        problems
    }
}

/// The versions of the shared learning modules; each is raised when its results move.
pub mod versions {
    /// The transformer's forward pass and its weights' names.
    pub const MODEL: u32 = 2;
    /// Batched generation and the sampler.
    pub const GENERATE: u32 = 2;
    /// AdamW, clipping and schedules.
    pub const OPTIMIZER: u32 = 2;
    /// Low-rank adapters.
    pub const LORA: u32 = 1;
    /// The supervised loss.
    pub const LOSS: u32 = 1;
    /// Advantages and the policy-gradient loss.
    pub const POLICY: u32 = 2;
}

/// Every task and format as parts of a key: which of them judges completions stands in the tokens, not in parameters.
pub(crate) fn task_parts() -> impl Iterator<Item = Part> {
    crate::tasks::parts().into_iter().map(|(name, version)| Part::new(name, version))
}

/// The task behind the tokens `reference`, where the file tells.
pub(crate) fn task_of(upstream: Upstream<'_>, reference: &str) -> Option<TaskSpec> {
    upstream.nearest(reference, "task").and_then(|task| serde_json::from_value(task.clone()).ok())
}

/// Whether `validate.select` names a measurement of the task behind the tokens `reference`.
pub(crate) fn check_select(upstream: Upstream<'_>, reference: &str, validate: Option<&Validate>) -> Option<Problem> {
    let (message, hint) = unknown_measure(&validate?.select, &task_of(upstream, reference)?.measures())?;
    Some(Problem { path: "validate.select".to_owned(), message, hint })
}

/// Whether a training begins at exactly one of a model and the end of another training.
pub fn check_start(has_model: bool, continues: bool) -> Option<Problem> {
    match (has_model, continues) {
        (true, true) => {
            let problem = Problem::new("continue", "`model` and `continue` both say where to begin");
            Some(problem.hint("leave `model` out to go on from the end of another training"))
        }
        (false, false) => {
            let problem = Problem::new("model", "neither `model` nor `continue` says where to begin");
            Some(problem.hint("write `model = \"STAGE\"`, or `continue = \"STAGE\"` to go on from a training's end"))
        }
        _ => None,
    }
}

/// What the shared parameters may not say together. `split` is trained on, in batches of `batch_size` rows.
pub fn check(split: &str, micro_batch_size: u64, batch_size: u64, validate: Option<&Validate>) -> Vec<Problem> {
    let mut problems = Vec::new();
    if split == "test" {
        let problem = Problem::new("split", "the split `test` may not be trained on");
        problems.push(problem.hint("`test` is for `evaluate`"));
    }
    if micro_batch_size > batch_size {
        let message = format!("`micro_batch_size` {micro_batch_size} is larger than the batch of {batch_size} rows");
        problems.push(Problem::new("micro_batch_size", message).hint("leave it out to take the whole batch at once"));
    }
    if let Some(validate) = validate {
        problems.extend(validate.filters.check("validate.", validate.temperature));
        let hint = "validate on `validation`; `test` is for `evaluate`";
        if validate.split == "test" {
            let message = "the split `test` may not select a checkpoint";
            problems.push(Problem::new("validate.split", message).hint(hint));
        } else if validate.split == split {
            let message = format!("the split `{split}` is trained on and may not select a checkpoint");
            problems.push(Problem::new("validate.split", message).hint(hint));
        }
    }
    problems
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn precisions_are_two_and_defaults_are_not_written() {
        use crate::stages::{evaluate::Evaluate, grpo::Grpo, sft::Sft};
        fn written<S: Serialize + serde::de::DeserializeOwned>(file: &serde_json::Value) -> Result<String, String> {
            let stage: S = serde_json::from_value(file.clone()).map_err(|error| error.to_string())?;
            Ok(serde_json::to_value(stage).unwrap().to_string())
        }
        let check =
            |run: &dyn Fn(&serde_json::Value) -> Result<String, String>, mut file: serde_json::Value, trains: bool| {
                let plain = run(&file).unwrap();
                assert!(!plain.contains("precision") && !plain.contains("checkpointing"), "old keys stay: {plain}");
                file["precision"] = serde_json::json!("fp32");
                assert_eq!(run(&file).unwrap(), plain, "the default by name is the default");
                file["precision"] = serde_json::json!("bf16");
                assert!(run(&file).unwrap().contains(r#""precision":"bf16""#));
                if trains {
                    file["activation_checkpointing"] = serde_json::json!(true);
                    assert!(run(&file).unwrap().contains(r#""activation_checkpointing":true"#));
                }
                file["precision"] = serde_json::json!("fp16");
                let error = run(&file).unwrap_err();
                assert!(error.contains("`fp16`") && error.contains("`fp32` or `bf16`"), "{error}");
            };
        let sft = serde_json::json!({"model": "m", "data": "t", "steps": 1});
        check(&written::<Sft>, sft, true);
        let grpo = serde_json::json!({"model": "m", "prompts": "t", "steps": 1, "max_new_tokens": 4, "rewards": {}});
        check(&written::<Grpo>, grpo, true);
        check(&written::<Evaluate>, serde_json::json!({"model": "m", "prompts": "t", "max_new_tokens": 4}), false);
        let schema = schemars::schema_for!(Precision).to_value().to_string();
        assert!(schema.contains("fp32") && schema.contains("bf16") && !schema.contains("fp16"), "{schema}");
    }

    #[test]
    fn adapters_have_targets_and_no_dropout() {
        let problems = |json: serde_json::Value| serde_json::from_value::<Lora>(json).unwrap().problems();
        assert_eq!(problems(serde_json::json!({"rank": 4})), []);
        assert_eq!(problems(serde_json::json!({"rank": 4, "targets": []}))[0].path, "lora.targets");
        let wrong =
            problems(serde_json::json!({"rank": 4, "targets": ["q_proj", "query_proj", "all"], "dropout": 0.1}));
        assert_eq!(
            wrong.iter().map(|problem| problem.path.as_str()).collect::<Vec<_>>(),
            ["lora.targets", "lora.dropout"]
        );
        assert!(wrong[0].hint.as_ref().unwrap().starts_with("did you mean `q_proj`?"), "{wrong:?}");
        let lora = |json: serde_json::Value| serde_json::from_value::<Lora>(json).unwrap();
        assert!((lora(serde_json::json!({"rank": 4})).scale() - 2.0).abs() < 1e-12);
        assert!((lora(serde_json::json!({"rank": 4, "alpha": 2.0})).scale() - 0.5).abs() < 1e-12);
        assert!(lora(serde_json::json!({"rank": 4})).adapts("up_proj"));
        assert!(!lora(serde_json::json!({"rank": 4, "targets": ["v_proj"]})).adapts("up_proj"));
    }

    #[test]
    fn a_stable_phase_is_written_where_there_is_one_and_must_end_in_a_fall() {
        let schedule = |json: serde_json::Value| serde_json::from_value::<Schedule>(json).unwrap();
        let written = |json| serde_json::to_value(schedule(json)).unwrap();
        let plain = serde_json::json!({"decay": "cosine", "warmup_ratio": 0.05, "final_ratio": 0.1});
        assert_eq!(written(serde_json::json!({})), plain);
        assert_eq!(written(serde_json::json!({"decay_ratio": 1.0})), plain);
        assert_eq!(written(serde_json::json!({"decay_ratio": 0.2}))["decay_ratio"], 0.2);
        let path = |json| schedule(json).problems().map(|problem| problem.path);
        assert_eq!(path(serde_json::json!({"decay": "linear", "decay_ratio": 0.2})), None);
        assert_eq!(path(serde_json::json!({"decay": "constant"})), None);
        let wrong = Some("schedule.decay_ratio".to_owned());
        assert_eq!(path(serde_json::json!({"decay": "constant", "decay_ratio": 0.2})), wrong);
        assert_eq!(path(serde_json::json!({"warmup_ratio": 0.9, "decay_ratio": 0.2})), wrong);
    }

    #[test]
    fn a_training_begins_at_one_place() {
        let path = |model, continues| check_start(model, continues).map(|problem| problem.path);
        assert_eq!((path(true, false), path(false, true)), (None, None));
        assert_eq!((path(true, true), path(false, false)), (Some("continue".to_owned()), Some("model".to_owned())));
    }

    #[test]
    fn the_test_split_trains_and_selects_nothing() {
        let validate = |split: &str| {
            let json = serde_json::json!({"every": 1, "samples": 1, "split": split});
            serde_json::from_value::<Validate>(json).unwrap()
        };
        let paths = |split: &str, validated: &str| -> Vec<String> {
            check(split, 0, 8, Some(&validate(validated))).into_iter().map(|problem| problem.path).collect()
        };
        assert!(paths("train", "validation").is_empty());
        assert_eq!(paths("test", "validation"), ["split"]);
        assert_eq!(paths("train", "test"), ["validate.split"]);
        assert_eq!(paths("train", "train"), ["validate.split"]);
        assert_eq!(check("train", 9, 8, None)[0].path, "micro_batch_size");
    }
}
