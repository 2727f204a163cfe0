//! What narrows sampling: the tokens that may be drawn, and the texts that end a completion.
//!
//! Training, validation and evaluation each have settings of their own. Nothing is ever read from a model's files: a
//! `generation_config.json` changes no draw.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::pipeline::stage::Problem;

/// Filters on the distribution, in this order, each over what the one before has left; and stop texts.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default)]
pub struct Filters {
    /// Only this many of the most probable tokens may be drawn (the lowest id among equals); 0 is all.
    #[serde(skip_serializing_if = "is_zero")]
    #[schemars(extend("default" = 0))]
    pub top_k: u64,
    /// Only the most probable tokens that together reach this probability may be drawn (the lowest id among equals); 1 is all.
    #[serde(skip_serializing_if = "is_one")]
    #[schemars(range(max = 1.0), extend("exclusiveMinimum" = 0.0, "default" = 1.0))]
    pub top_p: f64,
    /// Only tokens at least this share as probable as the most probable may be drawn; 0 is all.
    #[serde(skip_serializing_if = "is_none")]
    #[schemars(range(min = 0.0, max = 1.0), extend("default" = 0.0))]
    pub min_p: f64,
    /// Texts that end a completion besides the model's own end: as soon as the ids written end in the ids of one of them.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    #[schemars(extend("default" = []))]
    pub stop: Vec<String>,
}

impl Default for Filters {
    fn default() -> Self {
        Self { top_k: 0, top_p: 1.0, min_p: 0.0, stop: Vec::new() }
    }
}

// A setting that filters nothing is left out of the key, so that keys from before the setting stay what they were.
#[expect(clippy::trivially_copy_pass_by_ref, reason = "serde hands a reference")]
fn is_zero(count: &u64) -> bool {
    *count == 0
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "serde hands a reference")]
fn is_one(share: &f64) -> bool {
    *share >= 1.0
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "serde hands a reference")]
fn is_none(share: &f64) -> bool {
    *share <= 0.0
}

impl Filters {
    /// Whether some token may not be drawn.
    pub fn narrows(&self) -> bool {
        self.top_k > 0 || self.top_p < 1.0 || self.min_p > 0.0
    }

    /// What is wrong with settings whose fields stand at `prefix`, beside `temperature`.
    pub fn check(&self, prefix: &str, temperature: f64) -> Vec<Problem> {
        let mut problems = Vec::new();
        if temperature == 0.0 {
            let set = [("top_k", self.top_k > 0), ("top_p", self.top_p < 1.0), ("min_p", self.min_p > 0.0)];
            for (field, _) in set.into_iter().filter(|(_, set)| *set) {
                let message = "at temperature 0 the most probable token is taken, whatever else may be drawn";
                problems.push(
                    Problem::new(format!("{prefix}{field}"), message)
                        .hint("leave it out, or set a `temperature` above 0"),
                );
            }
        }
        if let Some(place) = self.stop.iter().position(String::is_empty) {
            let path = format!("{prefix}stop[{place}]");
            problems.push(Problem::new(path, "the empty text ends every completion before it begins"));
        }
        problems
    }
}
