//! What a reward says of a sample.

use serde::{Deserialize, Serialize};

/// A reward's word on one sample, unweighted. An abstention and an error are types of their own and never a 0.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Outcome {
    /// A finite number for the whole episode.
    Value(f64),
    /// A finite number for each turn; the episode's value is their sum.
    Turns(Vec<f64>),
    /// The reward has no opinion on this sample: the others decide alone.
    Abstain,
    /// The reward could not be computed for this sample, and why.
    Error(String),
}

impl Outcome {
    /// The values of turns; an error where their sum is not finite.
    pub fn turns(values: Vec<f64>) -> Self {
        let sum: f64 = values.iter().sum();
        if sum.is_finite() {
            Self::Turns(values)
        } else {
            Self::Error(format!("the sum of the turns' values is {sum}"))
        }
    }

    /// The value of the episode; `None` where there is none.
    pub fn value(&self) -> Option<f64> {
        match self {
            Self::Value(value) => Some(*value),
            Self::Turns(values) => Some(values.iter().sum()),
            Self::Abstain | Self::Error(_) => None,
        }
    }

    /// Why there is no value, where that is a mistake.
    pub fn error(&self) -> Option<&str> {
        match self {
            Self::Error(why) => Some(why),
            _ => None,
        }
    }

    /// The value of each of `count` turns: its parts, or else the whole at the last turn.
    pub fn by_turn(&self, count: usize) -> Option<Vec<f64>> {
        match self {
            Self::Turns(values) => Some(values.clone()),
            Self::Value(value) => {
                let mut turns = vec![0.0; count];
                *turns.last_mut()? = *value;
                Some(turns)
            }
            Self::Abstain | Self::Error(_) => None,
        }
    }
}

/// The sum of weight times value over the rewards that have one, in the order given.
///
/// `None` where every reward abstains or any has an error: such a sample has no total and takes no part in learning.
pub fn total(weights: &[f64], outcomes: &[Outcome]) -> Option<f64> {
    if outcomes.iter().any(|outcome| outcome.error().is_some()) {
        return None;
    }
    let values = weights.iter().zip(outcomes).filter_map(|(weight, outcome)| Some(weight * outcome.value()?));
    let (count, sum) = values.fold((0, 0.0), |(count, sum), value| (count + 1, sum + value));
    (count > 0 && f64::is_finite(sum)).then_some(sum)
}
