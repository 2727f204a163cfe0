//! Published methods as points in the space of [`Axes`], and the form in which a file names one and overrides axes.

use schemars::JsonSchema;
use serde::Deserialize;

use super::axes::{
    Advantage, Aggregation, Axes, Centre, Clip, ClipRule, DynamicSampling, Entropy, Estimator, Kl, KlPlace, Level,
    Ratio, Reduction, Scale, Truncation,
};

/// A published method. It fixes the loss and dynamic sampling; batch sizes, learning rates and updates are the user's.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Preset {
    /// GRPO (Shao et al. 2024, 2402.03300): clip 0.2, mean of sequence means, group z-score, k3 with beta 0.04 in the loss.
    Grpo,
    /// Dr. GRPO (Liu et al. 2025, 2503.20783): token sums over a constant, no deviation, no KL.
    DrGrpo,
    /// DAPO (Yu et al. 2025, 2503.14476): clip 0.2 and 0.28, token mean, group z-score, dynamic sampling, no KL.
    #[default]
    Dapo,
    /// GSPO (Zheng et al. 2025, 2507.18071): one ratio a sequence, clip 3e-4 and 4e-4, mean over sequences, no KL.
    Gspo,
    /// CISPO (MiniMax-M1 2025, 2506.13585): weights cut off at 1 + 4 (the bound 5 of ScaleRL, 2510.13786), token mean, no KL.
    Cispo,
    /// RLOO (Ahmadian et al. 2024, 2402.14740): REINFORCE on whole sequences, leave-one-out baseline, KL 0.03 in the reward.
    Rloo,
    /// REINFORCE++ (Hu 2025, 2501.03262): returns by token with a KL of 0.001 in the reward, z-score over the batch, clip 0.2.
    ReinforcePp,
    /// MaxRL (2602.02710): the group's mean is taken away and divided by, clip 0.2, token mean, no KL.
    Maxrl,
}

/// The bounds that a rule has where nothing else is said.
fn clip(rule: ClipRule) -> Clip {
    let (low, high, bound) = match rule {
        ClipRule::Symmetric => (Some(0.2), None, None),
        ClipRule::Higher => (Some(0.2), Some(0.28), None),
        ClipRule::Dual => (Some(0.2), Some(0.28), Some(3.0)),
        ClipRule::Cispo => (None, Some(4.0), None),
        ClipRule::None => (None, None, None),
    };
    Clip { rule, low, high, bound }
}

/// The epsilon and degrees of freedom that a scale has where nothing else is said.
fn divisor(scale: Scale) -> (Option<f64>, Option<u64>) {
    match scale {
        Scale::GroupStd | Scale::BatchStd => (Some(1e-4), Some(1)),
        Scale::Mean => (Some(1e-6), None),
        Scale::None => (None, None),
    }
}

impl Preset {
    /// Every preset.
    pub const ALL: [Self; 8] =
        [Self::Grpo, Self::DrGrpo, Self::Dapo, Self::Gspo, Self::Cispo, Self::Rloo, Self::ReinforcePp, Self::Maxrl];

    /// The point that the name stands for.
    pub fn axes(self) -> Axes {
        let advantage = |level, centre, scale| {
            let (epsilon, ddof) = divisor(scale);
            Advantage { level, centre, scale, epsilon, ddof, aggregation: Aggregation::SumThenNormalize }
        };
        let base = Axes {
            ratio: Ratio::Token,
            clip: clip(ClipRule::Symmetric),
            reduction: Reduction::TokenMean,
            reduction_tokens: None,
            advantage: advantage(Level::Episode, Centre::GroupMean, Scale::GroupStd),
            kl: Kl { beta: 0.0, estimator: Estimator::K3, place: KlPlace::Loss },
            truncation: Truncation::Keep,
            entropy: Entropy { coefficient: 0.0 },
            dynamic_sampling: DynamicSampling { enabled: false, max_rounds: 2, max_tokens: 0 },
        };
        match self {
            Self::Grpo => {
                let kl = Kl { beta: 0.04, ..base.kl };
                Axes { reduction: Reduction::SequenceMean, kl, ..base }
            }
            Self::DrGrpo => {
                let advantage = advantage(Level::Episode, Centre::GroupMean, Scale::None);
                Axes { reduction: Reduction::Constant, advantage, ..base }
            }
            Self::Dapo => {
                let dynamic_sampling = DynamicSampling { enabled: true, ..base.dynamic_sampling };
                Axes { clip: clip(ClipRule::Higher), dynamic_sampling, ..base }
            }
            Self::Gspo => {
                let clip = Clip { low: Some(3e-4), high: Some(4e-4), ..clip(ClipRule::Higher) };
                Axes { ratio: Ratio::Sequence, clip, reduction: Reduction::SequenceMean, ..base }
            }
            Self::Cispo => Axes { clip: clip(ClipRule::Cispo), ..base },
            Self::Rloo => {
                let advantage = advantage(Level::Episode, Centre::LeaveOneOut, Scale::None);
                let kl = Kl { beta: 0.03, estimator: Estimator::K1, place: KlPlace::Reward };
                // A sequence's log-probability is the sum over its tokens: each counts for one token, whatever its length.
                let (reduction, reduction_tokens) = (Reduction::Constant, Some(1));
                Axes { clip: clip(ClipRule::None), reduction, reduction_tokens, advantage, kl, ..base }
            }
            Self::ReinforcePp => {
                let advantage = advantage(Level::Token, Centre::BatchMean, Scale::BatchStd);
                let kl = Kl { beta: 0.001, estimator: Estimator::K1, place: KlPlace::Reward };
                Axes { advantage, kl, ..base }
            }
            Self::Maxrl => Axes { advantage: advantage(Level::Episode, Centre::GroupMean, Scale::Mean), ..base },
        }
    }
}

/// The ratio's clip rule and its bounds.
#[derive(Clone, Debug, Default, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct ClipFile {
    /// The rule; the preset's where it is left out. Another rule than the preset's brings bounds of its own.
    rule: Option<ClipRule>,
    /// The ratio is clipped below at 1 - low.
    #[schemars(range(min = 0.0, max = 1.0))]
    low: Option<f64>,
    /// The ratio is clipped above at 1 + high.
    #[schemars(range(min = 0.0))]
    high: Option<f64>,
    /// Of the rule `dual`: the term of a negative advantage A is at least `bound` A.
    #[schemars(extend("exclusiveMinimum" = 1.0))]
    bound: Option<f64>,
}

/// How rewards become advantages.
#[derive(Clone, Debug, Default, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct AdvantageFile {
    /// What has an advantage of its own.
    level: Option<Level>,
    /// What is taken away from a reward.
    centre: Option<Centre>,
    /// What it is then divided by.
    scale: Option<Scale>,
    /// Added to the divisor.
    #[schemars(range(min = 0.0))]
    epsilon: Option<f64>,
    /// Delta degrees of freedom of a standard deviation: 0 or 1.
    #[schemars(range(min = 0, max = 1))]
    ddof: Option<u64>,
    /// Whether components are summed before they are normalised or after.
    aggregation: Option<Aggregation>,
}

/// The pull towards the stage's starting weights.
#[derive(Clone, Debug, Default, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct KlFile {
    /// Its coefficient; 0 turns it off.
    #[schemars(range(min = 0.0))]
    beta: Option<f64>,
    /// The estimate of the divergence.
    estimator: Option<Estimator>,
    /// Whether it is a term of the loss or a part of the reward.
    place: Option<KlPlace>,
}

/// The entropy term.
#[derive(Clone, Debug, Default, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct EntropyFile {
    /// The mean entropy of the model's tokens, in nats, times this is taken from the loss; 0 turns it off.
    coefficient: Option<f64>,
}

/// Dynamic sampling (DAPO): groups whose rewards are all equal carry no gradient and are replaced by further prompts.
#[derive(Clone, Debug, Default, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct DynamicSamplingFile {
    /// Whether such groups are dropped.
    enabled: Option<bool>,
    /// Rounds of generation in a step, at most, to fill the batch with informative groups.
    #[schemars(range(min = 1))]
    max_rounds: Option<u64>,
    /// Tokens generated in a step beyond which no further round begins; 0, the default, sets no limit.
    max_tokens: Option<u64>,
}

/// The loss as a file says it: a preset and the axes that differ from it.
#[derive(Clone, Debug, Default, Deserialize, JsonSchema)]
#[serde(default)]
pub struct AxesFile {
    /// A published method; `dapo` where it is left out. It names a point among the axes below, each of which overrides it.
    preset: Option<Preset>,
    /// What one probability ratio is formed over.
    ratio: Option<Ratio>,
    /// How far a ratio may move.
    clip: Option<ClipFile>,
    /// How the terms of tokens become one number.
    reduction: Option<Reduction>,
    /// Of the reduction `constant`: tokens that a sequence counts for; `max_new_tokens` where it is left out.
    #[schemars(range(min = 1))]
    reduction_tokens: Option<u64>,
    /// How rewards become advantages.
    advantage: Option<AdvantageFile>,
    /// The pull towards the stage's starting weights.
    kl: Option<KlFile>,
    /// What becomes of an episode that a token limit has cut off.
    truncation: Option<Truncation>,
    /// The entropy term.
    entropy: Option<EntropyFile>,
    /// Replacement of groups without a gradient.
    dynamic_sampling: Option<DynamicSamplingFile>,
}

impl From<AxesFile> for Axes {
    /// What is written wins, then the preset. Bounds follow their rule and numbers their scale: those of another rule than
    /// the preset's are that rule's own.
    fn from(file: AxesFile) -> Self {
        let preset = file.preset.unwrap_or_default().axes();
        let given = file.clip.unwrap_or_default();
        let rule = given.rule.unwrap_or(preset.clip.rule);
        let own = if rule == preset.clip.rule { preset.clip } else { clip(rule) };
        let clip =
            Clip { rule, low: given.low.or(own.low), high: given.high.or(own.high), bound: given.bound.or(own.bound) };

        let given = file.advantage.unwrap_or_default();
        let scale = given.scale.unwrap_or(preset.advantage.scale);
        let (epsilon, ddof) = if scale == preset.advantage.scale {
            (preset.advantage.epsilon, preset.advantage.ddof)
        } else {
            divisor(scale)
        };
        let advantage = Advantage {
            level: given.level.unwrap_or(preset.advantage.level),
            centre: given.centre.unwrap_or(preset.advantage.centre),
            scale,
            epsilon: given.epsilon.or(epsilon),
            ddof: given.ddof.or(ddof),
            aggregation: given.aggregation.unwrap_or(preset.advantage.aggregation),
        };

        let reduction = file.reduction.unwrap_or(preset.reduction);
        let counted = if reduction == preset.reduction { preset.reduction_tokens } else { None };
        let given = file.kl.unwrap_or_default();
        let kl = Kl {
            beta: given.beta.unwrap_or(preset.kl.beta),
            estimator: given.estimator.unwrap_or(preset.kl.estimator),
            place: given.place.unwrap_or(preset.kl.place),
        };
        let given = file.dynamic_sampling.unwrap_or_default();
        let dynamic_sampling = DynamicSampling {
            enabled: given.enabled.unwrap_or(preset.dynamic_sampling.enabled),
            max_rounds: given.max_rounds.unwrap_or(preset.dynamic_sampling.max_rounds),
            max_tokens: given.max_tokens.unwrap_or(preset.dynamic_sampling.max_tokens),
        };
        Self {
            ratio: file.ratio.unwrap_or(preset.ratio),
            clip,
            reduction,
            reduction_tokens: file.reduction_tokens.or(counted),
            advantage,
            kl,
            truncation: file.truncation.unwrap_or(preset.truncation),
            entropy: Entropy {
                coefficient: file.entropy.and_then(|entropy| entropy.coefficient).unwrap_or(preset.entropy.coefficient),
            },
            dynamic_sampling,
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn axes(file: Value) -> Axes {
        serde_json::from_value(file).unwrap()
    }

    #[test]
    fn without_a_preset_it_is_dapo() {
        let none = axes(json!({}));
        assert_eq!(none, axes(json!({"preset": "dapo"})));
        let written = json!({
            "ratio": "token", "clip": {"rule": "higher", "low": 0.2, "high": 0.28}, "reduction": "token_mean",
            "advantage": {
                "level": "episode", "centre": "group_mean", "scale": "group_std", "epsilon": 1e-4, "ddof": 1,
                "aggregation": "sum_then_normalize"
            },
            "kl": {"beta": 0.0, "estimator": "k3", "place": "loss"}, "truncation": "keep",
            "entropy": {"coefficient": 0.0},
            "dynamic_sampling": {"enabled": true, "max_rounds": 2, "max_tokens": 0}
        });
        assert_eq!(serde_json::to_value(none).unwrap(), written, "a key holds axes, never the name");
    }

    #[test]
    fn every_preset_is_legal_and_reads_back_what_it_writes() {
        let mut seen: Vec<Axes> = Vec::new();
        for preset in Preset::ALL {
            let point = preset.axes();
            assert_eq!(point.check(), [], "{preset:?}");
            let written = serde_json::to_value(&point).unwrap();
            assert!(written.get("preset").is_none());
            assert_eq!(axes(written), point, "{preset:?}");
            assert!(!seen.contains(&point), "{preset:?} is another preset");
            seen.push(point);
        }
    }

    #[test]
    fn what_is_written_wins_and_bounds_follow_their_rule() {
        let made = axes(json!({"preset": "gspo", "clip": {"high": 0.01}, "kl": {"beta": 0.1}}));
        let gspo = Preset::Gspo.axes();
        assert_eq!((made.clip.low, made.clip.high), (Some(3e-4), Some(0.01)));
        assert_eq!((made.kl.beta, made.ratio, made.advantage), (0.1, gspo.ratio, gspo.advantage));
        // DAPO's 0.28 would be a strange bound of CISPO.
        assert_eq!(axes(json!({"clip": {"rule": "cispo"}})).clip, Preset::Cispo.axes().clip);
        assert_eq!(axes(json!({"clip": {"rule": "dual", "low": 0.1}})).clip.bound, Some(3.0));
        let unscaled = axes(json!({"advantage": {"scale": "none"}})).advantage;
        assert_eq!((unscaled.epsilon, unscaled.ddof), (None, None));
        assert_eq!(axes(json!({"preset": "rloo", "reduction": "token_mean"})).reduction_tokens, None);
        assert_eq!(axes(json!({"preset": "rloo"})).reduction_tokens, Some(1));
    }
}
