//! The axes of a policy-gradient loss, each free of the others, and the pairs of them that mean nothing.
//!
//! A published method is a point in this space (see [`super::preset`]); what enters a key is the point, never its name.
//! The formulas stand beside the mathematics, in `learn/src/loss.rs` and `learn/src/advantage.rs`.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::preset::AxesFile;
use crate::pipeline::stage::Problem;

/// What one probability ratio `r = new / old` is formed over.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Ratio {
    /// Every token has its own (PPO, GRPO).
    Token,
    /// The geometric mean over the tokens of a turn.
    Turn,
    /// The geometric mean over all of the model's tokens in an episode (GSPO).
    Sequence,
}

/// How far a ratio may move before its gradient is cut.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum ClipRule {
    /// `min(r A, clamp(r, 1 - low, 1 + low) A)` (PPO).
    Symmetric,
    /// `min(r A, clamp(r, 1 - low, 1 + high) A)` (DAPO's clip-higher).
    Higher,
    /// As `higher`, and never below `bound A` where the advantage A is negative (dual-clip PPO, Ye et al. 2020).
    Dual,
    /// `stop_gradient(min(r, 1 + high)) A log new`: no token loses its gradient (CISPO, MiniMax-M1).
    Cispo,
    /// `r A`: importance-weighted REINFORCE.
    None,
}

/// The clip rule with its bounds. A bound that the rule does not read is absent.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Clip {
    /// The rule.
    pub rule: ClipRule,
    /// Distance of the lower bound from 1.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub low: Option<f64>,
    /// Distance of the upper bound from 1.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub high: Option<f64>,
    /// Of `dual`: the multiple of a negative advantage that bounds its term.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub bound: Option<f64>,
}

/// How the terms of tokens become one number. Denominators count the whole optimizer batch.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Reduction {
    /// The mean over sequences of each one's mean over its tokens (GRPO, GSPO).
    SequenceMean,
    /// The mean over all tokens (DAPO).
    TokenMean,
    /// The sum over tokens, over the number of sequences times `reduction_tokens` (Dr. GRPO).
    Constant,
}

/// What has an advantage of its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Level {
    /// Every token: what is still to come from it on, a KL penalty in the reward included (REINFORCE++).
    Token,
    /// Every turn: what is still to come from it on, beside the same turn of the other samples.
    Turn,
    /// The episode as a whole.
    Episode,
}

/// What is taken away from a reward.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Centre {
    /// The mean of its group.
    GroupMean,
    /// The mean of the others in its group (RLOO).
    LeaveOneOut,
    /// The mean of the batch (REINFORCE++).
    BatchMean,
    /// Nothing.
    None,
}

/// What a centred reward is divided by.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Scale {
    /// The standard deviation of its group plus `epsilon` (GRPO).
    GroupStd,
    /// The standard deviation of the centred rewards of the batch plus `epsilon` (REINFORCE++).
    BatchStd,
    /// The mean of its group plus `epsilon`, for rewards that are nowhere negative (MaxRL).
    Mean,
    /// Nothing (Dr. GRPO).
    None,
}

/// How the components of a reward become one number.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Aggregation {
    /// Their weighted sum, which is then centred and scaled.
    SumThenNormalize,
    /// Each is centred and scaled in its group; the weighted sum of these ends in a z-score over the batch (GDPO).
    NormalizeThenSum,
}

/// How rewards become advantages. A number that the scale does not read is absent.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Advantage {
    /// What has an advantage of its own.
    pub level: Level,
    /// What is taken away.
    pub centre: Centre,
    /// The divisor.
    pub scale: Scale,
    /// Added to the divisor.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub epsilon: Option<f64>,
    /// Delta degrees of freedom of a standard deviation: 0 or 1.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ddof: Option<u64>,
    /// How components are joined.
    pub aggregation: Aggregation,
}

/// An estimate of KL(new || reference) from one token, `d = log reference - log new` (Schulman 2020).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Estimator {
    /// `-d`: unbiased; as a loss its expected gradient is zero.
    K1,
    /// `d^2 / 2`: biased; as a loss its expected gradient is that of KL(new || reference).
    K2,
    /// `exp(d) - d - 1`: unbiased, never negative; as a loss its expected gradient is that of KL(reference || new).
    K3,
    /// `r (exp(d) - d - 1)` with the gradient through the token's ratio r too: as a loss its expected gradient is that of
    /// KL(new || reference), for samples of the old policy (DeepSeek-V3.2).
    K3RatioCorrected,
}

/// Where the KL penalty enters.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum KlPlace {
    /// As a term of the loss, over every sample, those of dropped groups too.
    Loss,
    /// As a part of the reward, of the policy that sampled.
    Reward,
}

/// The pull towards the stage's starting weights.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Kl {
    /// Its coefficient; 0 loads no reference.
    pub beta: f64,
    /// The estimate.
    pub estimator: Estimator,
    /// Where it enters.
    pub place: KlPlace,
}

/// What becomes of an episode that a token limit has cut off.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Truncation {
    /// It is trained on as it is rewarded.
    Keep,
    /// It is left out of the policy loss (DAPO's overlong filtering) and stays in its group's baseline.
    Mask,
}

/// Dynamic sampling (DAPO): groups whose rewards are all equal carry no gradient and are replaced by further prompts.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct DynamicSampling {
    /// Whether such groups are dropped.
    pub enabled: bool,
    /// Rounds of generation in a step, at most, to fill the batch with informative groups.
    pub max_rounds: u64,
    /// Tokens generated in a step beyond which no further round begins; 0 sets no limit.
    pub max_tokens: u64,
}

impl DynamicSampling {
    /// Whether a step that has made `rounds` rounds and generated `tokens` tokens may begin another. It is asked between
    /// rounds, so that a round is never cut short.
    pub fn allows_round(&self, rounds: u64, tokens: u64) -> bool {
        rounds == 0 || (self.enabled && rounds < self.max_rounds && (self.max_tokens == 0 || tokens < self.max_tokens))
    }
}

/// The entropy term.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Entropy {
    /// The mean entropy of the model's tokens, in nats, times this is taken from the loss.
    pub coefficient: f64,
}

/// A point in the space of losses.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(from = "AxesFile")]
#[schemars(with = "AxesFile")]
pub struct Axes {
    /// What one ratio is formed over.
    pub ratio: Ratio,
    /// How far it may move.
    pub clip: Clip,
    /// How tokens become one number.
    pub reduction: Reduction,
    /// Of `constant`: tokens that a sequence counts for; absent where that is `max_new_tokens`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub reduction_tokens: Option<u64>,
    /// How rewards become advantages.
    pub advantage: Advantage,
    /// The pull towards the starting weights.
    pub kl: Kl,
    /// What becomes of truncated episodes.
    pub truncation: Truncation,
    /// The entropy term.
    pub entropy: Entropy,
    /// Replacement of groups without a gradient.
    pub dynamic_sampling: DynamicSampling,
}

impl Axes {
    /// Whether a reference policy is needed.
    pub fn needs_reference(&self) -> bool {
        self.kl.beta > 0.0
    }

    /// Whether samples outside of the policy term still count: dropped groups and masked truncations under a KL or an
    /// entropy term.
    pub fn covers_dropped(&self) -> bool {
        (self.kl.beta > 0.0 && self.kl.place == KlPlace::Loss) || self.entropy.coefficient != 0.0
    }

    /// Whether a sample learns from its own group alone: a group without a difference then has no gradient at all.
    pub fn compares_groups(&self) -> bool {
        matches!(self.advantage.centre, Centre::GroupMean | Centre::LeaveOneOut) && !self.covers_dropped()
    }

    /// The pairs that mean nothing, each with the reason.
    pub fn check(&self) -> Vec<Problem> {
        let mut problems = self.check_clip();
        problems.extend(self.check_reduction());
        problems.extend(self.check_advantage());
        problems.extend(self.check_kl());
        if self.dynamic_sampling.enabled && matches!(self.advantage.centre, Centre::BatchMean | Centre::None) {
            let message = "a group whose rewards are all equal has a gradient when its own mean is not taken away, so \
                           it may not be dropped";
            problems.push(
                Problem::new("dynamic_sampling.enabled", message)
                    .hint("set it to false, or `advantage.centre` to `group_mean` or `leave_one_out`"),
            );
        }
        if !self.dynamic_sampling.enabled && self.dynamic_sampling.max_tokens > 0 {
            let message = "without dynamic sampling a step has one round, which no budget ends";
            problems.push(Problem::new("dynamic_sampling.max_tokens", message).hint("leave it out"));
        }
        problems
    }

    fn check_clip(&self) -> Vec<Problem> {
        let Clip { rule, low, high, bound } = &self.clip;
        let mut problems = Vec::new();
        let mut unread = |field: &str, message: &str| {
            problems.push(Problem::new(format!("clip.{field}"), message).hint("leave it out"));
        };
        match rule {
            ClipRule::Symmetric => {
                if high.is_some() {
                    unread("high", "the `symmetric` rule has one distance for both sides, which is `low`");
                }
            }
            ClipRule::Higher | ClipRule::Dual => {}
            ClipRule::Cispo => {
                if low.is_some() {
                    unread("low", "the `cispo` rule bounds a ratio from above alone");
                }
            }
            ClipRule::None => {
                for (field, given) in [("low", low), ("high", high)] {
                    if given.is_some() {
                        unread(field, "without a clip rule no ratio is bounded");
                    }
                }
            }
        }
        if *rule != ClipRule::Dual && bound.is_some() {
            unread("bound", "only the `dual` rule bounds the term of a negative advantage");
        }
        if self.ratio != Ratio::Token {
            let what = match rule {
                ClipRule::Cispo => Some(
                    "`cispo` weights the log-probability of each token by the token's own ratio; a ratio of a whole turn \
                     or sequence is no weight of a token",
                ),
                ClipRule::Dual => Some(
                    "`dual` guards against the huge ratio of a single token; the mean over a turn or sequence does not \
                     reach its bound",
                ),
                ClipRule::None => Some(
                    "an unclipped mean ratio is neither the importance weight of a token nor that of a sequence, which \
                     is the product",
                ),
                ClipRule::Symmetric | ClipRule::Higher => None,
            };
            problems.extend(what.map(|what| Problem::new("clip.rule", what).hint("set `ratio` to `token`")));
        }
        problems
    }

    fn check_reduction(&self) -> Vec<Problem> {
        let mut problems = Vec::new();
        if self.ratio != Ratio::Token && self.reduction != Reduction::SequenceMean {
            let message = "a ratio over a turn or sequence counts its tokens once; a reduction over tokens would weight \
                           it by their number again, so it needs `sequence_mean`";
            problems.push(Problem::new("reduction", message).hint("set `reduction` to `sequence_mean`"));
        }
        if self.clip.rule == ClipRule::Cispo && self.reduction == Reduction::SequenceMean {
            let message = "`cispo` is a sum over tokens that are all alike; a mean within each sequence would weight \
                           them by its length";
            problems.push(Problem::new("reduction", message).hint("set `reduction` to `token_mean` or `constant`"));
        }
        if self.reduction != Reduction::Constant && self.reduction_tokens.is_some() {
            let message = "only the `constant` reduction counts a fixed number of tokens for a sequence";
            problems.push(Problem::new("reduction_tokens", message).hint("leave it out"));
        }
        problems
    }

    fn check_advantage(&self) -> Vec<Problem> {
        let Advantage { level, centre, scale, epsilon, ddof, aggregation } = &self.advantage;
        let mut problems = Vec::new();
        let mut wrong = |field: &str, message: &str, hint: &str| {
            problems.push(Problem::new(format!("advantage.{field}"), message).hint(hint));
        };
        let own_group = matches!(centre, Centre::GroupMean | Centre::LeaveOneOut);
        if *level == Level::Token && (own_group || matches!(scale, Scale::GroupStd | Scale::Mean)) {
            let message = "the n-th tokens of two completions are no samples of one quantity, so a group has no mean or \
                           deviation by token";
            wrong("level", message, "set `centre` to `batch_mean` and `scale` to `batch_std`, or `level` to `episode`");
        }
        match (self.ratio, level) {
            (Ratio::Sequence, Level::Turn | Level::Token) => {
                let message = "one ratio for the whole sequence cannot be clipped on the right side for parts whose \
                               advantages differ in sign";
                wrong("level", message, "set `level` to `episode`, or `ratio` to what has an advantage");
            }
            (Ratio::Turn, Level::Token) => {
                let message = "one ratio for a turn cannot be clipped on the right side for tokens whose advantages \
                               differ in sign";
                wrong("level", message, "set `level` to `turn` or `episode`, or `ratio` to `token`");
            }
            _ => {}
        }
        match (centre, scale) {
            (Centre::LeaveOneOut, Scale::GroupStd) => {
                let message = "leaving one out multiplies a group's centred rewards by G / (G - 1), which a division by \
                               its deviation makes a mere learning rate; the pair is `group_mean` in disguise";
                wrong("scale", message, "set `centre` to `group_mean`, or `scale` to `none` or `batch_std`");
            }
            (Centre::LeaveOneOut | Centre::BatchMean | Centre::None, Scale::Mean) => {
                let message = "MaxRL's estimate divides by the same group mean that it takes away";
                wrong("scale", message, "set `centre` to `group_mean`");
            }
            (Centre::BatchMean | Centre::None, Scale::GroupStd) => {
                let message = "a group's deviation is measured about the group's mean, which is not taken away";
                wrong("scale", message, "set `centre` to `group_mean`, or `scale` to `batch_std`");
            }
            (Centre::None, Scale::BatchStd) => {
                let message = "the batch's deviation is measured about a mean, which is not taken away";
                wrong("scale", message, "set `centre` to `batch_mean`");
            }
            _ => {}
        }
        if *aggregation == Aggregation::NormalizeThenSum
            && (*centre, *scale, *level) != (Centre::GroupMean, Scale::GroupStd, Level::Episode)
        {
            let message = "`normalize_then_sum` is the sum of each component's z-score in its group; it needs \
                           `group_mean`, `group_std` and `episode`";
            wrong("aggregation", message, "set it to `sum_then_normalize`");
        }
        if *scale == Scale::None && epsilon.is_some() {
            wrong("epsilon", "nothing is divided by, so there is nothing to add it to", "leave it out");
        }
        if matches!(scale, Scale::None | Scale::Mean) && ddof.is_some() {
            wrong("ddof", "no standard deviation is formed", "leave it out");
        }
        problems
    }

    fn check_kl(&self) -> Vec<Problem> {
        let Kl { beta, estimator, place } = &self.kl;
        let mut problems = Vec::new();
        if *beta == 0.0 {
            return problems;
        }
        match (estimator, place) {
            (Estimator::K1, KlPlace::Loss) => {
                let message = "as a loss `k1` has the gradient of the log-probability itself, which is zero on the mean: \
                               it adds noise and no pull";
                problems
                    .push(Problem::new("kl.estimator", message).hint("set it to `k2`, `k3_ratio_corrected` or `k3`"));
            }
            (Estimator::K3RatioCorrected, KlPlace::Reward) => {
                let message = "in the reward the estimate is a number of the policy that sampled: there is no ratio to \
                               correct by";
                problems.push(Problem::new("kl.estimator", message).hint("set it to `k1` or `k3`"));
            }
            _ => {}
        }
        if *place == KlPlace::Reward {
            let mut wrong = |message: &str, hint: &str| problems.push(Problem::new("kl.place", message).hint(hint));
            if self.advantage.aggregation == Aggregation::NormalizeThenSum {
                wrong(
                    "a penalty inside of the reward is no component with a scale of its own, so it cannot be normalised \
                     before the sum",
                    "set `kl.place` to `loss`, or `advantage.aggregation` to `sum_then_normalize`",
                );
            }
            if self.advantage.scale == Scale::Mean {
                wrong(
                    "division by the mean needs rewards that are nowhere negative, and a penalty makes them so",
                    "set `kl.place` to `loss`",
                );
            }
            if self.dynamic_sampling.enabled {
                wrong(
                    "groups of equal rewards still differ in their penalties, so dropping them would drop the pull",
                    "set `kl.place` to `loss`, or `dynamic_sampling.enabled` to false",
                );
            }
        }
        problems
    }

    /// The axes with all that has no effect set to one value, where a step makes `updates` updates: equal normal forms
    /// have provably equal gradients.
    ///
    /// With one update the policy that learns is the one that sampled, so every ratio is exactly 1: no bound is met, a mean
    /// over a turn or sequence is that of ones, and `cispo`'s weight is 1. Only a KL term that is multiplied by the ratio
    /// keeps its derivative, and it is the token's under every rule.
    #[must_use]
    pub fn normal_form(&self, updates: u64) -> Self {
        let mut normal = self.clone();
        if updates == 1 {
            normal.ratio = Ratio::Token;
            normal.clip = Clip { rule: ClipRule::None, low: None, high: None, bound: None };
        }
        if normal.kl.beta == 0.0 {
            normal.kl = Kl { beta: 0.0, estimator: Estimator::K3, place: KlPlace::Loss };
        }
        if !normal.dynamic_sampling.enabled {
            normal.dynamic_sampling = DynamicSampling { enabled: false, max_rounds: 1, max_tokens: 0 };
        }
        normal
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;
    use crate::stages::grpo::preset::Preset;

    fn axes(file: &Value) -> Axes {
        serde_json::from_value(file.clone()).unwrap()
    }

    #[test]
    fn pairs_that_mean_nothing_are_refused_with_the_place_and_the_reason() {
        let off = json!({"enabled": false});
        let cases = [
            (json!({"preset": "cispo", "reduction": "sequence_mean"}), "reduction", "length"),
            (json!({"preset": "cispo", "ratio": "sequence", "reduction": "sequence_mean"}), "clip.rule", "own ratio"),
            (json!({"preset": "gspo", "reduction": "token_mean"}), "reduction", "sequence_mean"),
            (json!({"ratio": "turn"}), "reduction", "sequence_mean"),
            (json!({"preset": "gspo", "clip": {"rule": "dual"}}), "clip.rule", "single token"),
            (json!({"preset": "gspo", "clip": {"rule": "none"}}), "clip.rule", "product"),
            (json!({"preset": "gspo", "advantage": {"level": "turn"}}), "advantage.level", "sign"),
            (json!({"clip": {"rule": "symmetric", "high": 0.3}}), "clip.high", "both sides"),
            (json!({"clip": {"rule": "cispo", "low": 0.3}}), "clip.low", "above alone"),
            (json!({"clip": {"rule": "none", "high": 0.3}}), "clip.high", "no ratio"),
            (json!({"clip": {"bound": 3.0}}), "clip.bound", "dual"),
            (json!({"reduction_tokens": 5}), "reduction_tokens", "constant"),
            (json!({"advantage": {"level": "token"}}), "advantage.level", "n-th tokens"),
            (json!({"advantage": {"centre": "leave_one_out"}}), "advantage.scale", "G / (G - 1)"),
            (json!({"advantage": {"centre": "leave_one_out", "scale": "mean"}}), "advantage.scale", "MaxRL"),
            (
                json!({"advantage": {"centre": "batch_mean"}, "dynamic_sampling": off}),
                "advantage.scale",
                "group's mean",
            ),
            (
                json!({"advantage": {"centre": "none", "scale": "batch_std"}, "dynamic_sampling": off}),
                "advantage.scale",
                "about a mean",
            ),
            (
                json!({"advantage": {"centre": "batch_mean", "scale": "batch_std"}}),
                "dynamic_sampling.enabled",
                "has a gradient",
            ),
            (
                json!({"advantage": {"scale": "batch_std", "aggregation": "normalize_then_sum"}}),
                "advantage.aggregation",
                "z-score in its group",
            ),
            (json!({"advantage": {"scale": "none", "epsilon": 1.0}}), "advantage.epsilon", "divided"),
            (json!({"advantage": {"scale": "mean", "ddof": 1}}), "advantage.ddof", "deviation"),
            (json!({"kl": {"beta": 0.1, "estimator": "k1"}}), "kl.estimator", "zero on the mean"),
            (
                json!({"kl": {"beta": 0.1, "estimator": "k3_ratio_corrected", "place": "reward"}, "dynamic_sampling": off}),
                "kl.estimator",
                "no ratio",
            ),
            (json!({"kl": {"beta": 0.1, "place": "reward"}}), "kl.place", "dropping"),
            (json!({"preset": "maxrl", "kl": {"beta": 0.1, "place": "reward"}}), "kl.place", "negative"),
            (
                json!({
                    "preset": "grpo", "kl": {"place": "reward"}, "advantage": {"aggregation": "normalize_then_sum"}
                }),
                "kl.place",
                "component",
            ),
            (
                json!({"preset": "grpo", "dynamic_sampling": {"max_tokens": 9}}),
                "dynamic_sampling.max_tokens",
                "one round",
            ),
        ];
        for (file, path, reason) in cases {
            let problems = axes(&file).check();
            let due = problems.iter().find(|problem| problem.path == path && problem.message.contains(reason));
            assert!(due.is_some(), "{file}: {problems:?}");
            assert!(problems.iter().all(|problem| problem.hint.is_some()), "{file}");
        }
    }

    #[test]
    fn what_has_no_effect_is_not_refused_while_it_is_off() {
        for file in [
            json!({"kl": {"beta": 0.0, "estimator": "k1"}}),
            json!({"preset": "reinforce_pp", "kl": {"beta": 0.0}}),
            json!({"advantage": {"level": "turn"}}),
            json!({"ratio": "turn", "reduction": "sequence_mean", "advantage": {"level": "turn"}}),
            json!({"advantage": {"centre": "leave_one_out", "scale": "batch_std"}}),
        ] {
            assert_eq!(axes(&file).check(), [], "{file}");
        }
    }

    #[test]
    fn one_update_a_rollout_makes_ratio_and_clip_idle() {
        let gspo = Preset::Gspo.axes();
        let mut grpo = Preset::Grpo.axes();
        grpo.kl.beta = 0.0;
        assert_eq!(gspo.normal_form(1), grpo.normal_form(1));
        assert_ne!(gspo.normal_form(2), grpo.normal_form(2));
        assert_ne!(Preset::Grpo.axes().normal_form(1), grpo.normal_form(1), "beta counts");
        let mut dapo = Preset::Dapo.axes();
        assert_ne!(dapo.normal_form(1), Preset::Cispo.axes().normal_form(1), "dynamic sampling counts");
        dapo.dynamic_sampling.enabled = false;
        assert_eq!(dapo.normal_form(1), Preset::Cispo.axes().normal_form(1));
        assert_ne!(dapo.normal_form(1), Preset::DrGrpo.axes().normal_form(1));
    }

    #[test]
    fn rounds_end_with_the_rounds_or_the_tokens() {
        let of = |enabled, max_tokens| DynamicSampling { enabled, max_rounds: 3, max_tokens };
        let rounds = |dynamic: &DynamicSampling, tokens: &[u64]| {
            (0..).zip(tokens).take_while(|(rounds, tokens)| dynamic.allows_round(*rounds, **tokens)).count()
        };
        let spent = [0, 100, 200, 300, 400];
        assert_eq!(rounds(&of(true, 0), &spent), 3);
        assert_eq!(rounds(&of(false, 0), &spent), 1);
        assert_eq!(rounds(&of(true, 201), &spent), 3);
        assert_eq!(rounds(&of(true, 200), &spent), 2, "a budget that is spent begins nothing");
        assert_eq!(rounds(&of(true, 1), &spent), 1, "the first round is always made");
    }
}
