//! Rewards: numbers computed from a verdict's measurements, each kept apart with its weight until they are summed.
//!
//! A reward reads named measurements and nothing else: no completion, no gold string, no model. Where it has no finite
//! value it is an error, never a 0.

mod expression;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::rewards::expression::Expression;
use crate::tasks::{Measure, Measurements};

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
            Self::Expression { expression, .. } => {
                let at = |(message, hint)| ("expression".to_owned(), message, hint);
                match Expression::compile(expression) {
                    Err(message) => complaints.push(at((message, Some(expression::GRAMMAR.to_owned())))),
                    Ok(compiled) => {
                        let names = compiled.names().iter();
                        complaints.extend(names.filter_map(|name| unknown_measure(name, measures)).map(at));
                    }
                }
            }
        }
        complaints
    }

    /// The reward of one verdict, unweighted. To score many, build a [`Reward`] once.
    pub fn score(&self, verdict: &Measurements) -> Result<f64, RewardError> {
        Reward::new(self)?.score(verdict)
    }

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

/// A reward ready to score: what a [`RewardSpec`] says, compiled once.
#[derive(Clone, Debug)]
pub struct Reward {
    weight: f64,
    rule: Rule,
}

#[derive(Clone, Debug)]
enum Rule {
    Measurement(&'static str),
    Expression(Expression),
}

impl Reward {
    /// Compiles a reward.
    pub fn new(spec: &RewardSpec) -> Result<Self, RewardError> {
        let rule = match spec {
            RewardSpec::Correct { .. } | RewardSpec::Format { .. } => Rule::Measurement(spec.measure()),
            RewardSpec::Expression { expression, .. } => {
                let compiled = Expression::compile(expression);
                let malformed = |message| RewardError::Malformed { expression: expression.clone(), message };
                Rule::Expression(compiled.map_err(malformed)?)
            }
        };
        Ok(Self { weight: spec.weight(), rule })
    }

    /// What the score is multiplied by before rewards are summed.
    pub fn weight(&self) -> f64 {
        self.weight
    }

    /// The reward of one verdict, unweighted.
    pub fn score(&self, verdict: &Measurements) -> Result<f64, RewardError> {
        match &self.rule {
            Rule::Measurement(name) => {
                let value = *verdict.get(*name).ok_or_else(|| RewardError::Missing((*name).to_owned()))?;
                let not_finite =
                    || RewardError::NotFinite { expression: (*name).to_owned(), at: format!("{name} = {value}") };
                value.is_finite().then_some(value).ok_or_else(not_finite)
            }
            Rule::Expression(expression) => expression.evaluate(verdict),
        }
    }
}

/// The sum of weight times score, in the order given.
pub fn total(weights: &[f64], scores: &[f64]) -> f64 {
    weights.iter().zip(scores).map(|(weight, score)| weight * score).sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    static MEASURES: &[Measure] = &[
        Measure::new("solved", ""),
        Measure::new("format", ""),
        Measure::new("progress", ""),
        Measure::new("shortest", ""),
        Measure::new("steps", ""),
    ];

    fn verdict(values: [f64; 5]) -> Measurements {
        MEASURES.iter().map(|measure| measure.name.clone().into_owned()).zip(values).collect()
    }

    fn expression(text: &str) -> RewardSpec {
        RewardSpec::Expression { expression: text.to_owned(), weight: 1.0 }
    }

    #[test]
    fn fixed_rewards_read_their_measurement() {
        let verdict = verdict([1.0, 0.5, 0.0, 4.0, 4.0]);
        assert_eq!(RewardSpec::Correct { weight: 3.0 }.score(&verdict), Ok(1.0));
        assert_eq!(RewardSpec::Format { weight: 3.0 }.score(&verdict), Ok(0.5));
        let empty = Measurements::new();
        assert_eq!(RewardSpec::Correct { weight: 1.0 }.score(&empty), Err(RewardError::Missing("solved".into())));
    }

    #[test]
    fn the_published_expression_scores_as_arithmetic_does() {
        let text = "0.5 * progress + 0.5 * solved * shortest / max(steps, shortest)";
        let reward = Reward::new(&expression(text)).unwrap();
        assert!(expression(text).check(MEASURES).is_empty());
        assert_eq!(reward.score(&verdict([1.0, 1.0, 1.0, 4.0, 8.0])), Ok(0.75));
        assert_eq!(reward.score(&verdict([0.0, 1.0, 0.5, 4.0, 8.0])), Ok(0.25));
    }

    #[test]
    fn a_division_by_zero_is_an_error_wherever_it_hides() {
        let verdict = verdict([0.0, 1.0, 0.0, 4.0, 0.0]);
        for text in
            ["1 / steps", "min(1, 1 / steps)", "0 * (1 / steps)", "solved / steps", "(1 / steps) ^ 0", "ln(steps)"]
        {
            let error = expression(text).score(&verdict).unwrap_err();
            let RewardError::NotFinite { at, .. } = &error else { panic!("{text}: {error}") };
            assert!(at.contains("steps = 0"), "{at}");
        }
        assert!(matches!(expression("exp(1000)").score(&verdict), Err(RewardError::NotFinite { .. })));
    }

    #[test]
    fn names_are_checked_with_a_suggestion() {
        let complaints = expression("progres + solvd").check(MEASURES);
        assert_eq!(complaints.len(), 2);
        assert_eq!(complaints[0].0, "expression");
        assert_eq!(complaints[0].1, "the task has no measurement `progres`");
        assert_eq!(complaints[0].2.as_deref(), Some("did you mean `progress`?"));
        let far = expression("elephants").check(MEASURES);
        assert!(far[0].2.as_deref().unwrap().contains("the task measures `solved`, `format`"), "{far:?}");
        assert_eq!(RewardSpec::Correct { weight: 1.0 }.check(&MEASURES[1..]).len(), 1);
        assert_eq!(RewardSpec::Correct { weight: f64::INFINITY }.check(MEASURES)[0].0, "weight");
    }

    #[test]
    fn malformed_expressions_are_complaints_and_errors() {
        for text in ["", "  ", "1 +", "(solved", "max(solved)", "solved +* 2", "foo(solved)", "solved solved", "@"] {
            let complaints = expression(text).check(MEASURES);
            assert!(!complaints.is_empty(), "`{text}` is taken");
            let error = expression(text).score(&verdict([1.0; 5])).unwrap_err();
            assert!(!matches!(error, RewardError::NotFinite { .. }), "`{text}`: {error}");
        }
    }

    #[test]
    fn a_missing_measurement_is_an_error() {
        let error = expression("solved + other").score(&verdict([1.0; 5])).unwrap_err();
        assert_eq!(error, RewardError::Missing("other".into()));
    }

    #[test]
    fn the_total_is_the_weighted_sum() {
        assert!((total(&[1.0, 0.5, -2.0], &[1.0, 0.5, 0.25]) - 0.75).abs() < 1e-15);
    }
}
