//! Parameters that the training kinds share: optimizer, learning-rate schedule, validation on the way.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::pipeline::stage::{Part, Problem, Upstream};
use crate::rewards::unknown_measure;
use crate::stages::sampling::Filters;
use crate::tasks::TaskSpec;

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

/// The learning-rate schedule: linear warm-up, then decay.
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
}

impl Default for Schedule {
    fn default() -> Self {
        Self { decay: Decay::Cosine, warmup_ratio: 0.05, final_ratio: 0.1 }
    }
}

impl Schedule {
    /// Warm-up over a twentieth of the steps, then a constant rate: what reinforcement learning starts from.
    pub fn constant() -> Self {
        Self { decay: Decay::Constant, ..Self::default() }
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

/// The versions of the shared learning modules; each is raised when its results move.
pub mod versions {
    /// The transformer's forward pass and its weights' names.
    pub const MODEL: u32 = 1;
    /// Batched generation and the sampler.
    pub const GENERATE: u32 = 1;
    /// AdamW, clipping and schedules.
    pub const OPTIMIZER: u32 = 1;
    /// The supervised loss.
    pub const LOSS: u32 = 1;
    /// Advantages and the policy-gradient loss.
    pub const POLICY: u32 = 1;
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
