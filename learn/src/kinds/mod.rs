//! The libtorch kinds: one file a kind, the same sections in the same order: open, resume, loop, finish; the step.
//!
//! A loop stands in view and repeats in every kind; mathematics, generation, grading and saving stand once, elsewhere.

pub mod evaluate;
pub mod grpo;
pub mod sft;
#[cfg(test)]
mod testing;
#[cfg(test)]
#[expect(clippy::float_cmp, reason = "the laws under test are about equal bytes")]
mod tests;

use anyhow::Context as _;
use pipe::pipeline::stage::{Stage, StageContext};
use pipe::stages::evaluate::Evaluate;
use pipe::stages::grpo::Grpo;
use pipe::stages::interrupted;
use pipe::stages::sft::Sft;
use serde_json::Value;

use crate::memory::explaining;

/// Runs a stage from its parameters, as `AnyStage::params` wrote them.
pub type Runner = fn(&Value, &mut StageContext) -> anyhow::Result<()>;

/// Every kind that the worker can run, by name.
pub static RUNNERS: &[(&str, Runner)] = &[
    (Sft::KIND, |params, context| explaining(|| sft::run(&parse(params)?, context)).map_err(interrupted)),
    (Grpo::KIND, |params, context| explaining(|| grpo::run(&parse(params)?, context)).map_err(interrupted)),
    (Evaluate::KIND, |params, context| explaining(|| evaluate::run(&parse(params)?, context)).map_err(interrupted)),
];

fn parse<S: Stage>(params: &Value) -> anyhow::Result<S> {
    serde_json::from_value(params.clone()).with_context(|| format!("reading the parameters of a `{}` stage", S::KIND))
}
