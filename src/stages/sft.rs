//! `sft`: supervised fine-tuning of a model on tokenized examples. It runs in `pipe-worker`.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::pipeline::stage::{
    ArtifactType, Checkpoint, Continues, Input, Output, Part, Place, Problem, Stage, Tokens, TrainingState, Upstream,
};
use crate::stages::training::{
    Lora, Optimizer, Precision, Schedule, Validate, check_select, check_start, is_off, task_parts, versions,
};

/// Fine-tune a model on tokenized examples with a token-mean cross-entropy over the tokens that the mask marks.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Sft {
    /// The model to start from; not with `continue`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub model: Option<Input<Checkpoint>>,
    /// A stage of this kind to go on from, as if it had not ended; `steps` counts its steps, too. Data, `split`, `seed` and
    /// `batch_size` must be the same, and what else differs counts from here on; the learning rate is that of a run of
    /// `steps` steps. The best weights so far are kept where `validate` differs in nothing but `every`.
    #[serde(default, rename = "continue", skip_serializing_if = "Option::is_none")]
    pub continue_from: Option<Input<TrainingState>>,
    /// The tokenized examples.
    pub data: Input<Tokens>,
    /// The split of `data` to train on.
    #[serde(default = "Sft::default_split")]
    pub split: String,
    /// Optimizer steps.
    #[schemars(range(min = 1))]
    pub steps: u64,
    /// Rows in a step.
    #[serde(default = "Sft::default_batch_size")]
    #[schemars(range(min = 1))]
    pub batch_size: u64,
    /// Rows in a forward and backward pass; 0 takes the whole batch at once. The gradient is that of the whole batch.
    #[serde(default)]
    pub micro_batch_size: u64,
    /// Peak learning rate.
    #[serde(default = "Sft::default_learning_rate")]
    #[schemars(extend("exclusiveMinimum" = 0.0))]
    pub learning_rate: f64,
    /// How the learning rate moves.
    #[serde(default)]
    pub schedule: Schedule,
    /// AdamW and clipping.
    #[serde(default)]
    pub optimizer: Optimizer,
    /// Train low-rank adapters instead of the model's own weights.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub lora: Option<Lora>,
    /// The floating-point format of the model's passes: of training and validation.
    #[serde(default, skip_serializing_if = "Precision::is_default")]
    #[schemars(extend("default" = "fp32"))]
    pub precision: Precision,
    /// Keep what each layer reads and compute the rest of its activations again in the backward pass: less memory, a third more
    /// operations, the same gradient.
    #[serde(default, skip_serializing_if = "is_off")]
    #[schemars(extend("default" = false))]
    pub activation_checkpointing: bool,
    /// Validation on the way; without it `best` equals `last`.
    #[serde(default)]
    pub validate: Option<Validate>,
    /// Decides the order of rows.
    #[serde(default)]
    pub seed: u64,
}

impl Sft {
    fn default_split() -> String {
        "train".to_owned()
    }
    fn default_batch_size() -> u64 {
        64
    }
    fn default_learning_rate() -> f64 {
        1e-3
    }
}

impl Stage for Sft {
    const KIND: &'static str = "sft";
    const VERSION: u32 = 2;
    const PLACE: Place = Place::Worker;
    const CONTINUES: Option<Continues> = Some(Continues { field: "continue", grows: "steps" });

    fn outputs(&self) -> Vec<Output> {
        vec![
            Output::new("last", ArtifactType::Checkpoint),
            Output::new("best", ArtifactType::Checkpoint),
            Output::new("state", ArtifactType::TrainingState),
        ]
    }

    fn parts(&self) -> Vec<Part> {
        let mut parts = vec![
            Part::new("learn.model", versions::MODEL),
            Part::new("learn.generate", versions::GENERATE),
            Part::new("learn.loss", versions::LOSS),
            Part::new("learn.optimizer", versions::OPTIMIZER),
        ];
        parts.extend(self.lora.as_ref().map(|_| Part::new("learn.lora", versions::LORA)));
        if self.validate.is_some() {
            parts.extend(task_parts());
        }
        parts
    }

    // Its validations stand in its logs; what tables compare are evaluations of its checkpoints.
    fn metrics(&self, _upstream: &Upstream<'_>) -> Option<Vec<String>> {
        Some(Vec::new())
    }

    fn curves(&self) -> &'static [&'static str] {
        &[
            "loss",
            "token_accuracy",
            "learning_rate",
            "gradient_norm",
            "tokens",
            "tokens_per_second",
            "tokens_per_second/*",
            "validation/*",
            "seconds/*",
            "mfu",
            "decode_bandwidth_share",
            "padding_share",
            "peak_memory_bytes",
        ]
    }

    fn check(&self, upstream: &Upstream<'_>) -> Vec<Problem> {
        let validate = self.validate.as_ref();
        let mut problems =
            crate::stages::training::check(&self.split, self.micro_batch_size, self.batch_size, validate);
        problems.extend(check_start(self.model.is_some(), self.continue_from.is_some()));
        problems.extend(check_select(*upstream, &self.data.reference, validate));
        problems.extend(self.lora.iter().flat_map(Lora::problems));
        problems.extend(self.schedule.problems());
        problems
    }
}
