//! The rewards of a stage, ready to score whole batches.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use serde::Serialize;
use serde_json::Value;

use crate::program::ProgramError;
use crate::rewards::program::ProgramReward;
use crate::rewards::rule::Rule;
use crate::rewards::{Outcome, RewardError, RewardSpec, total};
use crate::tasks::{Finish, Measurements};

/// One sample as rewards see it; a program is sent these fields under these names.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct ScoreInput<'a> {
    /// The task's structured instance; null where there is none.
    pub instance: &'a Value,
    /// What the model read first.
    pub prompt: &'a str,
    /// What was said behind the prompt; of several turns, the replies and what the model read between.
    pub completion: &'a str,
    /// Why the last reply ended.
    pub finish: Finish,
    /// The verdict's measurements.
    pub measurements: &'a Measurements,
    /// Each turn's measurements; never empty.
    pub turns: &'a [Measurements],
    /// The tokens of each reply, its end included; empty where they are not known.
    pub lengths: &'a [u64],
}

/// Why a batch could not be scored: not the error of one sample, but of a reward as a whole.
#[derive(Debug, thiserror::Error)]
pub enum ScoreError {
    /// A reward could not be made ready.
    #[error("the reward `{name}` cannot be computed")]
    Reward {
        /// Its name.
        name: String,
        /// Why.
        source: RewardError,
    },
    /// The program of a reward failed.
    #[error("the reward `{name}` failed")]
    Program {
        /// Its name.
        name: String,
        /// Why.
        source: ProgramError,
    },
}

impl ScoreError {
    /// Whether the interrupt was set while a program was asked.
    pub fn is_interrupt(&self) -> bool {
        matches!(self, Self::Program { source: ProgramError::Interrupted, .. })
    }
}

/// The rewards of a stage by name, compiled and, where they are programs, running.
pub struct Scorer {
    names: Vec<String>,
    weights: Vec<f64>,
    rewards: Vec<Reward>,
}

enum Reward {
    Rule(Rule),
    Program(ProgramReward),
}

impl Scorer {
    /// Compiles the rewards and starts their programs. Setting `interrupt` ends a call of a program early.
    pub fn new(specs: &BTreeMap<String, RewardSpec>, interrupt: Option<&Arc<AtomicBool>>) -> Result<Self, ScoreError> {
        let mut rewards = Vec::with_capacity(specs.len());
        for (name, spec) in specs {
            let failed = |source| ScoreError::Reward { name: name.clone(), source };
            rewards.push(match Rule::compile(spec).map_err(failed)? {
                Some(rule) => Reward::Rule(rule),
                None => Reward::Program(
                    ProgramReward::start(spec, interrupt)
                        .map_err(|source| ScoreError::Program { name: name.clone(), source })?,
                ),
            });
        }
        let weights = specs.values().map(RewardSpec::weight).collect();
        Ok(Self { names: specs.keys().cloned().collect(), weights, rewards })
    }

    /// The names of the rewards, sorted: the order of every list of outcomes.
    pub fn names(&self) -> &[String] {
        &self.names
    }

    /// What each reward is multiplied by before they are summed.
    pub fn weights(&self) -> &[f64] {
        &self.weights
    }

    /// The outcomes of every sample, `[sample][reward]`. After an error of a program the scorer is of no further use.
    pub fn score(&mut self, samples: &[ScoreInput<'_>]) -> Result<Vec<Vec<Outcome>>, ScoreError> {
        let mut outcomes: Vec<Vec<Outcome>> = samples.iter().map(|_| Vec::with_capacity(self.names.len())).collect();
        for (name, reward) in self.names.iter().zip(&mut self.rewards) {
            match reward {
                Reward::Rule(rule) => {
                    for (sample, outcomes) in samples.iter().zip(&mut outcomes) {
                        outcomes.push(rule.score(sample));
                    }
                }
                Reward::Program(program) => {
                    let scored = program.score(samples);
                    let scored = scored.map_err(|source| ScoreError::Program { name: name.clone(), source })?;
                    outcomes.iter_mut().zip(scored).for_each(|(outcomes, outcome)| outcomes.push(outcome));
                }
            }
        }
        Ok(outcomes)
    }

    /// The weighted sum of a sample's outcomes, as [`total`] has it.
    pub fn total(&self, outcomes: &[Outcome]) -> Option<f64> {
        total(&self.weights, outcomes)
    }
}
