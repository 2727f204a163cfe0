//! Rewards: numbers computed from episodes, each kept apart with its weight until they are summed.
//!
//! A built-in reward reads named measurements and nothing else: no gold string, no model. A program of the user's reads
//! whole samples. What a reward says of a sample is an [`Outcome`]: a value, an abstention or an error, and the last two
//! are never a 0. A [`Scorer`] scores a batch under all rewards of a stage at once.

mod expression;
mod outcome;
mod program;
mod rule;
mod scorer;

pub use expression::{Expression, GRAMMAR};
pub use outcome::{Outcome, total};
pub use scorer::{ScoreError, ScoreInput, Scorer};

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::file::{Misplaced, PlacedFile, misplaced};
use crate::tasks::Measure;

/// What expressions may name besides a task's measurements: the tokens that the model wrote, the ends of its replies
/// included; of a turn, those of its reply.
pub const COMPLETION_LENGTH: &str = "completion_length";

/// The piece of code behind expressions and its version, for keys.
pub const EXPRESSION_PART: (&str, u32) = ("reward.expression", 1);

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
    /// An arithmetic expression over the verdict's measurements and `completion_length`, the tokens that the model wrote.
    Expression {
        /// The expression, such as `0.5 * progress + 0.5 * solved`.
        expression: String,
        /// What it reads: the episode's verdict, or each turn's own measurements, whose values are summed.
        #[serde(default, skip_serializing_if = "Per::is_episode")]
        #[schemars(extend("default" = "episode"))]
        per: Per,
        /// What the reward is multiplied by before rewards are summed.
        #[serde(default = "one")]
        weight: f64,
    },
    /// A program that reads samples as JSON lines and answers with their rewards.
    Program {
        /// The program and its arguments.
        #[schemars(length(min = 1))]
        command: Vec<String>,
        /// Files and folders, known by their content, that stand at these relative paths in the program's folder.
        #[serde(default)]
        files: Vec<PlacedFile>,
        /// Seconds that an answer may take; the program's start counts for the first.
        #[serde(default = "sixty")]
        #[schemars(extend("exclusiveMinimum" = 0.0))]
        timeout_seconds: f64,
        /// Samples in a request, at most.
        #[serde(default = "sixty_four")]
        #[schemars(range(min = 1))]
        batch_size: u64,
        /// What the reward is multiplied by before rewards are summed.
        #[serde(default = "one")]
        weight: f64,
    },
    /// A control that knows nothing: a uniform number in [0, 1) drawn from the instance and the completion alone.
    Random {
        /// Decides the draws.
        #[serde(default)]
        seed: u64,
        /// What the reward is multiplied by before rewards are summed.
        #[serde(default = "one")]
        weight: f64,
    },
}

/// What an error of a reward on one sample does. A program that fails as a whole ends the stage in any case.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum OnError {
    /// It ends the stage.
    #[default]
    Stop,
    /// It is counted, and the sample takes no part in learning.
    Exclude,
}

impl OnError {
    /// Whether it is the default, which is not written.
    pub fn is_stop(&self) -> bool {
        matches!(self, Self::Stop)
    }
}

/// What an expression is evaluated on.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Per {
    /// The verdict of the whole episode.
    #[default]
    Episode,
    /// Each turn by itself; the reward is the sum, and turn-level advantages use the parts.
    Turn,
}

impl Per {
    #[expect(clippy::trivially_copy_pass_by_ref, reason = "serde hands a reference")]
    fn is_episode(&self) -> bool {
        matches!(self, Self::Episode)
    }
}

fn one() -> f64 {
    1.0
}

fn sixty() -> f64 {
    60.0
}

fn sixty_four() -> u64 {
    64
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
    /// The expression cannot be read.
    #[error("`{expression}` cannot be read: {message}")]
    Malformed {
        /// The expression.
        expression: String,
        /// What is wrong with it.
        message: String,
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
            Self::Expression { .. } => EXPRESSION_PART,
            Self::Program { .. } => ("reward.program", 1),
            Self::Random { .. } => ("reward.random", 1),
        }
    }

    /// What the reward is multiplied by before rewards are summed.
    pub fn weight(&self) -> f64 {
        match self {
            Self::Correct { weight }
            | Self::Format { weight }
            | Self::Expression { weight, .. }
            | Self::Program { weight, .. }
            | Self::Random { weight, .. } => *weight,
        }
    }
}

impl RewardSpec {
    /// Whether the reward looks at how many tokens the model wrote, as far as can be told.
    pub fn reads_lengths(&self) -> bool {
        match self {
            Self::Expression { expression, .. } => Expression::compile(expression)
                .is_ok_and(|compiled| compiled.names().iter().any(|name| name == COMPLETION_LENGTH)),
            Self::Program { .. } => true,
            Self::Correct { .. } | Self::Format { .. } | Self::Random { .. } => false,
        }
    }
}

/// What is wrong with a reward: the field (empty for the reward as a whole), the message, and what the user may do.
pub type Complaint = (String, String, Option<String>);

impl RewardSpec {
    /// Whether the reward can be computed from what the task measures; one complaint a mistake.
    pub fn check(&self, measures: &[Measure]) -> Vec<Complaint> {
        let mut complaints = Vec::new();
        if !self.weight().is_finite() {
            complaints.push(("weight".to_owned(), format!("`{}` is no finite number", self.weight()), None));
        }
        match self {
            Self::Correct { .. } | Self::Format { .. } => {
                let name = self.measure();
                if let Some((message, hint)) = unknown_measure(name, measures) {
                    complaints.push((String::new(), message, hint));
                }
            }
            Self::Expression { expression, per, .. } => {
                let at = |(message, hint)| ("expression".to_owned(), message, hint);
                match Expression::compile(expression) {
                    Err(message) => complaints.push(at((message, Some(GRAMMAR.to_owned())))),
                    // What turns measure is a task's own affair: names are checked on a demonstration before training.
                    Ok(_) if *per == Per::Turn => {}
                    Ok(compiled) => {
                        let names = compiled.names().iter().filter(|name| *name != COMPLETION_LENGTH);
                        complaints.extend(names.filter_map(|name| unknown_measure(name, measures)).map(at));
                    }
                }
            }
            Self::Program { command, files, timeout_seconds, .. } => {
                if command.first().is_none_or(String::is_empty) {
                    let hint = "as `command = [\"python3\", \"reward.py\"]`".to_owned();
                    complaints.push(("command".to_owned(), "no program is named".to_owned(), Some(hint)));
                }
                for (index, _) in command.iter().enumerate().filter(|(_, argument)| argument.contains('\0')) {
                    let message = "an argument cannot hold a NUL character".to_owned();
                    complaints.push((format!("command.{index}"), message, None));
                }
                if !(*timeout_seconds > 0.0 && *timeout_seconds < 1e9) {
                    let message = format!("`{timeout_seconds}` is no time limit");
                    let hint = "a positive number of seconds".to_owned();
                    complaints.push(("timeout_seconds".to_owned(), message, Some(hint)));
                }
                complaints.extend(misplaced(files).into_iter().map(|misplaced| {
                    let Misplaced { index, message, hint } = misplaced;
                    (format!("files.{index}"), message, hint)
                }));
            }
            Self::Random { .. } => {}
        }
        complaints
    }

    /// The measurement that a fixed reward reads.
    fn measure(&self) -> &'static str {
        if matches!(self, Self::Format { .. }) { "format" } else { "solved" }
    }
}

/// What is wrong with a measurement's name, and the name that was probably meant; `None` when the task measures it.
pub fn unknown_measure(name: &str, measures: &[Measure]) -> Option<(String, Option<String>)> {
    if measures.iter().any(|measure| measure.name == name) {
        return None;
    }
    let distance = |measure: &&Measure| strsim::damerau_levenshtein(name, &measure.name);
    let nearest = measures.iter().min_by_key(distance).filter(|measure| distance(measure) <= 2);
    let hint = nearest.map_or_else(
        || {
            let names: Vec<String> = measures.iter().map(|measure| format!("`{}`", measure.name)).collect();
            format!("the task measures {}", names.join(", "))
        },
        |measure| format!("did you mean `{}`?", measure.name),
    );
    Some((format!("the task has no measurement `{name}`"), Some(hint)))
}

#[cfg(test)]
mod tests;
