//! `evaluate`: a model's solved share and other measurements on held-out instances. It runs in `pipe-worker`.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::pipeline::stage::{ArtifactType, Checkpoint, Input, Output, Part, Place, Problem, Stage, Tokens, Upstream};
use crate::stages::sampling::Filters;
use crate::stages::training::{task_parts, versions};

/// Let a model act on held-out instances and measure every episode by simulation.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[schemars(extend("additionalProperties" = false))]
pub struct Evaluate {
    /// The model.
    pub model: Input<Checkpoint>,
    /// The prompts, with their task.
    pub prompts: Input<Tokens>,
    /// The split of `prompts`.
    #[serde(default = "Evaluate::default_split")]
    pub split: String,
    /// Instances, from the beginning of the split; 0 takes all.
    #[serde(default)]
    pub samples: u64,
    /// Tokens in a completion, at most; a completion that reaches it is a failure and counts.
    #[schemars(range(min = 1))]
    pub max_new_tokens: u64,
    /// The sampling temperature; 0 is greedy.
    #[serde(default)]
    #[schemars(range(min = 0.0))]
    pub temperature: f64,
    /// Which tokens may be drawn, and what ends a completion.
    #[serde(flatten)]
    pub filters: Filters,
    /// Prompts generated at once.
    #[serde(default = "Evaluate::default_generation_chunk")]
    #[schemars(range(min = 1))]
    pub generation_chunk: u64,
    /// Decides every sampled token where the temperature is above 0.
    #[serde(default)]
    pub seed: u64,
}

impl Evaluate {
    fn default_split() -> String {
        "test".to_owned()
    }
    fn default_generation_chunk() -> u64 {
        256
    }
}

impl Stage for Evaluate {
    const KIND: &'static str = "evaluate";
    const VERSION: u32 = 2;
    const PLACE: Place = Place::Worker;

    fn outputs(&self) -> Vec<Output> {
        vec![Output::new("evaluation", ArtifactType::Evaluation)]
    }

    fn parts(&self) -> Vec<Part> {
        let mut parts =
            vec![Part::new("learn.generate", versions::GENERATE), Part::new("learn.model", versions::MODEL)];
        parts.extend(task_parts());
        parts
    }

    fn check(&self, _upstream: &Upstream<'_>) -> Vec<Problem> {
        self.filters.check("", self.temperature)
    }
}
