//! A built-in reward, compiled: it reads measurements alone, but for the control, which reads none.

use rand::Rng as _;

use crate::random::{rng, unit};
use crate::rewards::expression::Expression;
use crate::rewards::{COMPLETION_LENGTH, Outcome, Per, RewardError, RewardSpec, ScoreInput};
use crate::tasks::Measurements;

/// What a built-in [`RewardSpec`] says, compiled once.
#[derive(Clone, Debug)]
pub(super) enum Rule {
    Measurement(&'static str),
    Expression(Expression, Per),
    Random(u64),
}

impl Rule {
    /// Compiles a reward; `None` for one that is no rule but a program.
    pub(super) fn compile(spec: &RewardSpec) -> Result<Option<Self>, RewardError> {
        Ok(Some(match spec {
            RewardSpec::Correct { .. } => Self::Measurement("solved"),
            RewardSpec::Format { .. } => Self::Measurement("format"),
            RewardSpec::Expression { expression, per, .. } => {
                let compiled = Expression::compile(expression);
                let malformed = |message| RewardError::Malformed { expression: expression.clone(), message };
                Self::Expression(compiled.map_err(malformed)?, *per)
            }
            RewardSpec::Random { seed, .. } => Self::Random(*seed),
            RewardSpec::Program { .. } => return Ok(None),
        }))
    }

    /// The reward of one sample, unweighted.
    pub(super) fn score(&self, sample: &ScoreInput<'_>) -> Outcome {
        let value = match self {
            Self::Measurement(name) => measurement(name, sample.measurements).map(Outcome::Value),
            Self::Expression(expression, Per::Episode) => {
                let length = (!sample.lengths.is_empty()).then(|| sample.lengths.iter().sum());
                expression.evaluate(&|name| named(name, sample.measurements, length)).map(Outcome::Value)
            }
            Self::Expression(expression, Per::Turn) => {
                let turns = sample.turns.iter().enumerate().map(|(turn, measured)| {
                    expression.evaluate(&|name| named(name, measured, sample.lengths.get(turn).copied()))
                });
                turns.collect::<Result<Vec<f64>, RewardError>>().map(Outcome::turns)
            }
            Self::Random(seed) => Ok(Outcome::Value(random(*seed, sample))),
        };
        value.unwrap_or_else(|error| Outcome::Error(error.to_string()))
    }
}

/// What an expression finds under a name: a measurement of the task's, or else what is known of every completion.
fn named(name: &str, measured: &Measurements, length: Option<u64>) -> Option<f64> {
    let known = || length.filter(|_| name == COMPLETION_LENGTH).map(|tokens| tokens as f64);
    measured.get(name).copied().or_else(known)
}

fn measurement(name: &str, verdict: &Measurements) -> Result<f64, RewardError> {
    let value = *verdict.get(name).ok_or_else(|| RewardError::Missing(name.to_owned()))?;
    let not_finite = || RewardError::NotFinite { expression: name.to_owned(), at: format!("{name} = {value}") };
    value.is_finite().then_some(value).ok_or_else(not_finite)
}

/// A draw from what was asked and answered, so that equal answers to one instance earn the same.
fn random(seed: u64, sample: &ScoreInput<'_>) -> f64 {
    let mut hasher = blake3::Hasher::new();
    let instance = sample.instance.to_string();
    hasher.update(&(instance.len() as u64).to_le_bytes());
    hasher.update(instance.as_bytes());
    hasher.update(sample.completion.as_bytes());
    let words = hasher.finalize();
    let counters: Vec<u64> = words
        .as_bytes()
        .chunks_exact(8)
        .map(|bytes| u64::from_le_bytes(bytes.try_into().expect("a chunk has eight bytes")))
        .collect();
    unit(rng("reward.random", &[&[seed], counters.as_slice()].concat()).next_u64())
}
