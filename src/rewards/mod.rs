//! Rewards: numbers computed from a verdict's measurements, each kept apart with its weight until they are summed.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// A reward by name in a stage's `rewards` table.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(tag = "kind", rename_all = "snake_case", deny_unknown_fields)]
pub enum RewardSpec {
    /// 1 where the task's `solved` is 1, else 0.
    Correct {
        /// What the reward is multiplied by before rewards are summed.
        #[serde(default = "one")]
        weight: f64,
    },
    /// The verdict's `format`: 1 where the completion has the form that was asked for.
    Format {
        /// What the reward is multiplied by before rewards are summed.
        #[serde(default = "one")]
        weight: f64,
    },
    /// An arithmetic expression over the verdict's measurements.
    Expression {
        /// The expression, such as `0.5 * progress + 0.5 * solved`.
        expression: String,
        /// What the reward is multiplied by before rewards are summed.
        #[serde(default = "one")]
        weight: f64,
    },
}

fn one() -> f64 {
    1.0
}

/// Why a reward has no value. Never a 0.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum RewardError {
    /// The arithmetic has no finite result.
    #[error("`{expression}` is not finite at {at}")]
    NotFinite {
        /// The expression.
        expression: String,
        /// The measurements it read.
        at: String,
    },
    /// A measurement is missing.
    #[error("the verdict has no measurement `{0}`")]
    Missing(String),
}

impl RewardSpec {
    /// The piece of code behind the reward and its version, for keys.
    pub fn part(&self) -> (&'static str, u32) {
        match self {
            Self::Correct { .. } => ("reward.correct", 1),
            Self::Format { .. } => ("reward.format", 1),
            Self::Expression { .. } => ("reward.expression", 1),
        }
    }

    /// What the reward is multiplied by before rewards are summed.
    pub fn weight(&self) -> f64 {
        match self {
            Self::Correct { weight } | Self::Format { weight } | Self::Expression { weight, .. } => *weight,
        }
    }
}
