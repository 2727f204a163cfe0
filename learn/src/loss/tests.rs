use pipe::stages::grpo::axes::Kl;
use pipe::stages::grpo::preset::Preset;
use serde_json::{Value, json};

use super::*;
use crate::policy::Denominator;

/// Two sequences, of one token and of three.
const LENGTHS: [usize; 2] = [1, 3];
const RATIOS: [f64; 4] = [1.5, 0.5, 1.1, 0.9];
const ADVANTAGES: [f64; 4] = [1.0, -0.5, -0.5, -0.5];
const NEW: [f64; 4] = [-0.4, -1.0, -0.3, -2.0];
/// log reference - log new.
const TOWARD: [f64; 4] = [0.3, -0.2, 0.1, 0.4];

fn doubles(values: &[f64]) -> Tensor {
    Tensor::from_slice(values)
}

fn axes(file: &Value) -> Axes {
    serde_json::from_value(file.clone()).unwrap()
}

/// The shares of the tokens of `lengths`, all of which are in the loss; a sequence counts for `constant` tokens.
fn shares(axes: &Axes, lengths: &[usize], constant: u64) -> Tensor {
    let all = Denominator::count(lengths.iter().copied());
    let share = |length: usize| vec![all.share(axes.reduction, constant, length); length];
    doubles(&lengths.iter().flat_map(|length| share(*length)).collect::<Vec<f64>>())
}

/// The loss of the two sequences off policy; `constant` is 4 for Dr. GRPO, and RLOO's own 1.
fn two_sequences(axes: &Axes, new: &Tensor, advantages: &[f64], on_policy: bool) -> PolicyLoss {
    let base = doubles(&NEW);
    let old = &base - doubles(&RATIOS).log();
    let reference = &base + doubles(&TOWARD);
    let share = shares(axes, &LENGTHS, axes.reduction_tokens.unwrap_or(4));
    let segments = Segments::new(&LENGTHS, Device::Cpu);
    let zero = doubles(&[0.0; 4]);
    policy_loss(
        axes,
        &PolicyTokens {
            new,
            old: &old,
            reference: Some(&reference),
            entropy: &zero,
            advantages: &doubles(advantages),
            weights: &doubles(&[1.0; 4]),
            share: &share,
            covered: &share,
            segments: Some(&segments),
            on_policy,
        },
    )
    .unwrap()
}

fn value(tensor: &Tensor) -> f64 {
    tensor.double_value(&[])
}

#[test]
fn temperature_divides_logits_in_log_probability_and_entropy() {
    let logits = Tensor::from_slice(&[1.0f32, 2.0, 4.0, 0.0, 0.0, 0.0]).view([2, 3]);
    let ours = token_logprobs(&logits, &Tensor::from_slice(&[2i64, 0]), 2.0);
    let total = 0.5f64.exp() + 1f64.exp() + 2f64.exp();
    assert!((ours.double_value(&[0]) - (2.0 - total.ln())).abs() < 1e-6);
    assert!((ours.double_value(&[1]) + 3f64.ln()).abs() < 1e-6);
    let spread = entropy(&logits, 2.0);
    let by_hand: f64 = [0.5, 1.0, 2.0].iter().map(|x: &f64| -(x.exp() / total) * (x - total.ln())).sum();
    assert!((spread.double_value(&[0]) - by_hand).abs() < 1e-6);
    assert!((spread.double_value(&[1]) - 3f64.ln()).abs() < 1e-6);
}

#[test]
fn tokens_that_could_not_be_drawn_take_no_part_and_leave_no_nan() {
    let barred = doubles(&[0.5, f64::NEG_INFINITY, -0.5, f64::NEG_INFINITY]).view([1, 4]).set_requires_grad(true);
    let open = doubles(&[0.5, -0.5]).view([1, 2]).set_requires_grad(true);
    let both = |logits: &Tensor, target: i64| {
        let target = Tensor::from_slice(&[target]);
        token_logprobs(logits, &target, 0.7).sum(Kind::Double) + entropy(logits, 0.7).sum(Kind::Double)
    };
    let (one, other) = (both(&barred, 2), both(&open, 1));
    assert!((value(&one) - value(&other)).abs() < 1e-12);
    one.backward();
    other.backward();
    let narrowed = barred.grad().index_select(1, &Tensor::from_slice(&[0i64, 2]));
    assert!(value(&(narrowed - open.grad()).abs().max()) < 1e-12);
    assert_eq!(barred.grad().double_value(&[0, 1]).to_bits(), 0f64.to_bits());
}

#[test]
fn supervised_sequences_share_one_token_mean() {
    let logprobs = doubles(&[-4.0, -1.0, -1.0, -2.0]);
    assert!((supervised_loss(&logprobs, 4.0).double_value(&[]) - 2.0).abs() < 1e-12);
}

#[test]
fn every_preset_has_its_closed_form() {
    // The geometric mean of 0.5, 1.1 and 0.9 is 0.79: below GSPO's range.
    let low = 1.0 - 3e-4;
    let k3: Vec<f64> = TOWARD.iter().map(|d| d.exp() - d - 1.0).collect();
    let cispo: f64 = (0..4).map(|token| RATIOS[token] * ADVANTAGES[token] * NEW[token]).sum();
    let cases = [
        (
            Preset::Grpo,
            -(1.2 + (-0.5 * 0.8 - 0.5 * 1.1 - 0.5 * 0.9) / 3.0) / 2.0
                + 0.04 * (k3[0] + (k3[1] + k3[2] + k3[3]) / 3.0) / 2.0,
        ),
        (Preset::DrGrpo, -(1.2 - 0.5 * (0.8 + 1.1 + 0.9)) / (2.0 * 4.0)),
        (Preset::Dapo, -(1.28 - 0.5 * (0.8 + 1.1 + 0.9)) / 4.0),
        (Preset::Gspo, -((1.0 + 4e-4) - 0.5 * low) / 2.0),
        (Preset::Cispo, -cispo / 4.0),
        (Preset::Rloo, -(1.5 - 0.5 * (0.5 + 1.1 + 0.9)) / 2.0),
        (Preset::ReinforcePp, -(1.2 - 0.5 * (0.8 + 1.1 + 0.9)) / 4.0),
        (Preset::Maxrl, -(1.2 - 0.5 * (0.8 + 1.1 + 0.9)) / 4.0),
    ];
    assert_eq!(cases.len(), Preset::ALL.len());
    for (preset, due) in cases {
        let made = two_sequences(&preset.axes(), &doubles(&NEW), &ADVANTAGES, false);
        assert!((value(&made.loss) - due).abs() < 1e-12, "{preset:?}: {} instead of {due}", value(&made.loss));
        let parts = made.sums.policy_loss + made.sums.kl_loss + made.sums.entropy_loss;
        assert!((parts - due).abs() < 1e-12, "{preset:?}: terms apart");
    }
    // Advantages by token, as REINFORCE++ has them.
    let tokens = [1.0, 2.0, -1.0, -0.5];
    let made = two_sequences(&Preset::ReinforcePp.axes(), &doubles(&NEW), &tokens, false);
    assert!((value(&made.loss) + (1.2 + 0.5 * 2.0 - 1.1 - 0.45) / 4.0).abs() < 1e-12);
}

#[test]
fn dual_clip_holds_the_huge_ratio_of_a_negative_advantage() {
    let axes = axes(&json!({"clip": {"rule": "dual", "bound": 2.0}}));
    let new = doubles(&[5f64.ln(), 1.5f64.ln(), 5f64.ln(), 0.0]).set_requires_grad(true);
    let zero = doubles(&[0.0; 4]);
    let share = doubles(&[0.25; 4]);
    let made = policy_loss(
        &axes,
        &PolicyTokens {
            new: &new,
            old: &zero,
            reference: None,
            entropy: &zero,
            advantages: &doubles(&[-1.0, -1.0, 1.0, 0.0]),
            weights: &doubles(&[1.0, 3.0, 1.0, 1.0]),
            share: &share,
            covered: &share,
            segments: None,
            on_policy: false,
        },
    )
    .unwrap();
    assert!((value(&made.loss) + (-2.0 - 3.0 * 1.5 + 1.28) / 4.0).abs() < 1e-12);
    made.loss.backward();
    let slopes = Vec::<f64>::try_from(&new.grad()).unwrap();
    assert_eq!((slopes[0], slopes[2], slopes[3]), (0.0, 0.0, 0.0));
    assert!((slopes[1] - 3.0 * 1.5 / 4.0).abs() < 1e-12);
    let sums = &made.sums;
    assert_eq!((sums.clipped_low, sums.clipped_high, sums.clipped_dual, sums.idle), (0, 1, 1, 3));
}

/// The logits of a small policy over three tokens, and what four tokens drawn from it were.
struct Small {
    logits: Tensor,
    targets: Tensor,
    old: Tensor,
    reference: Tensor,
    advantages: Tensor,
    segments: Segments,
}

fn small() -> Small {
    let logits = doubles(&[0.3, -0.2, 0.9, 1.1, 0.0, -0.7, 0.4, 0.2, -1.0, 0.6, -0.1, 0.5]).view([4, 3]);
    let targets = Tensor::from_slice(&[2i64, 0, 1, 1]);
    // Ratios on both sides of every range.
    let old = token_logprobs(&logits, &targets, 0.8) - doubles(&[0.4, -0.5, 0.8, 0.01]);
    Small {
        old,
        targets,
        logits,
        reference: doubles(&[-0.6, -0.9, -1.0, -0.7]),
        advantages: doubles(&[1.0, -0.6, -0.6, -0.6]),
        segments: Segments::new(&LENGTHS, Device::Cpu),
    }
}

/// By sequence, so that the derivative under a sequence's ratio is that of the mean.
const WEIGHTS: [f64; 4] = [2.0, 0.5, 0.5, 0.5];

impl Small {
    fn loss(&self, axes: &Axes, logits: &Tensor, on_policy: bool) -> Tensor {
        let share = shares(axes, &LENGTHS, axes.reduction_tokens.unwrap_or(4));
        let new = token_logprobs(logits, &self.targets, 0.8);
        policy_loss(
            axes,
            &PolicyTokens {
                new: &new,
                old: &self.old,
                reference: Some(&self.reference),
                entropy: &entropy(logits, 0.8),
                advantages: &self.advantages,
                weights: &doubles(&WEIGHTS),
                share: &share,
                covered: &share,
                segments: Some(&self.segments),
                on_policy,
            },
        )
        .unwrap()
        .loss
    }

    fn gradient(&self, axes: &Axes, on_policy: bool) -> Tensor {
        let leaf = self.logits.copy().set_requires_grad(true);
        self.loss(axes, &leaf, on_policy).backward();
        leaf.grad()
    }
}

/// Central differences of `loss` at `logits`.
fn slopes(logits: &Tensor, loss: &dyn Fn(&Tensor) -> f64) -> Tensor {
    let count = logits.numel() as i64;
    let slope = |index: i64| {
        let moved = |by: f64| {
            let change = Tensor::zeros([count], (Kind::Double, Device::Cpu));
            let _ = change.get(index).fill_(by);
            loss(&(logits + change.view_as(logits)))
        };
        (moved(1e-6) - moved(-1e-6)) / 2e-6
    };
    doubles(&(0..count).map(slope).collect::<Vec<f64>>()).view_as(logits)
}

#[test]
fn the_gradient_of_every_preset_and_term_is_that_of_finite_differences() {
    let small = small();
    let mut cases: Vec<(String, Axes)> =
        Preset::ALL.iter().map(|preset| (format!("{preset:?}"), preset.axes())).collect();
    for file in [
        json!({"clip": {"rule": "dual", "bound": 1.5}}),
        json!({"preset": "grpo", "kl": {"beta": 0.5, "estimator": "k2"}}),
        json!({"preset": "grpo", "kl": {"beta": 0.5, "estimator": "k3"}}),
        json!({"preset": "grpo", "kl": {"beta": 0.5, "estimator": "k3_ratio_corrected"}}),
        json!({"preset": "gspo", "kl": {"beta": 0.5, "estimator": "k3_ratio_corrected"}, "entropy": {"coefficient": 0.3}}),
        json!({"preset": "dapo", "entropy": {"coefficient": 0.3}}),
        json!({"ratio": "turn", "reduction": "sequence_mean", "clip": {"low": 0.9, "high": 0.9}}),
    ] {
        cases.push((file.to_string(), axes(&file)));
    }
    for (name, axes) in cases {
        assert_eq!(axes.check(), [], "{name}");
        let ours = small.gradient(&axes, false);
        // CISPO's weight is no function of the logits: it is held where it is.
        let held = if axes.clip.rule == ClipRule::Cispo {
            let ratios = (token_logprobs(&small.logits, &small.targets, 0.8) - &small.old).exp().clamp_max(5.0);
            Some(ratios * &small.advantages * doubles(&WEIGHTS) / 4.0)
        } else {
            None
        };
        let theirs = slopes(&small.logits, &|logits| match &held {
            Some(held) => -value(&(held * token_logprobs(logits, &small.targets, 0.8)).sum(Kind::Double)),
            None => value(&small.loss(&axes, logits, false)),
        });
        let distance = value(&(&ours - theirs).abs().max());
        assert!(distance < 1e-8, "{name}: {distance}");
        assert!(value(&ours.abs().max()) > 1e-3, "{name} has no gradient, so nothing was compared");
    }
}

/// Over all tokens of a softmax, weighted by their probability, a KL term in the loss has this gradient.
fn expected_gradient(estimator: &str, logits: &Tensor, reference: &Tensor) -> Tensor {
    let mut axes = axes(&json!({"preset": "grpo", "kl": {"beta": 1.0}}));
    axes.kl.estimator = serde_json::from_value(json!(estimator)).unwrap();
    let leaf = logits.copy().set_requires_grad(true);
    let new = leaf.log_softmax(-1, Kind::Double);
    let (zero, probabilities) = (new.zeros_like(), new.exp().detach());
    policy_loss(
        &axes,
        &PolicyTokens {
            new: &new,
            old: &new.detach(),
            reference: Some(reference),
            entropy: &zero,
            advantages: &zero,
            weights: &zero,
            share: &probabilities,
            covered: &probabilities,
            segments: None,
            on_policy: true,
        },
    )
    .unwrap()
    .loss
    .backward();
    leaf.grad()
}

#[test]
fn the_expected_gradients_of_kl_estimates_are_those_their_names_promise() {
    let logits = doubles(&[0.4, -0.3, 1.0]);
    let reference = doubles(&[-0.5, 0.8, 0.1]).log_softmax(-1, Kind::Double);
    let kl = |one: &Tensor, other: &Tensor| value(&(one.exp() * (one - other)).sum(Kind::Double));
    let forward = slopes(&logits, &|logits| kl(&logits.log_softmax(-1, Kind::Double), &reference));
    let reverse = slopes(&logits, &|logits| kl(&reference, &logits.log_softmax(-1, Kind::Double)));
    let apart = |one: &Tensor, other: &Tensor| value(&(one - other).abs().max());
    let made = |name: &str| expected_gradient(name, &logits, &reference);
    assert!(value(&made("k1").abs().max()) < 1e-12, "k1 pulls nowhere: it is refused as a loss");
    assert!(apart(&made("k2"), &forward) < 1e-8);
    assert!(apart(&made("k3_ratio_corrected"), &forward) < 1e-8);
    assert!(apart(&made("k3"), &reverse) < 1e-8);
    assert!(apart(&forward, &reverse) > 1e-2, "the two divergences differ here");
}

#[test]
fn arms_that_are_the_same_on_policy_have_equal_gradients_and_others_off_policy() {
    let small = small();
    let mut points: Vec<Axes> = Preset::ALL.iter().map(|preset| preset.axes()).collect();
    let files = [
        json!({"preset": "grpo", "kl": {"beta": 0.0}}),
        json!({"dynamic_sampling": {"enabled": false}}),
        json!({"dynamic_sampling": {"enabled": false}, "clip": {"rule": "dual", "bound": 1.5}}),
        json!({"dynamic_sampling": {"enabled": false}, "clip": {"rule": "symmetric", "low": 0.45}}),
        json!({"preset": "grpo", "kl": {"beta": 0.0}, "ratio": "turn", "clip": {"low": 0.9}}),
    ];
    points.extend(files.iter().map(axes));
    let mut same = 0;
    for (index, one) in points.iter().enumerate() {
        for other in &points[..index] {
            if one.normal_form(1) != other.normal_form(1) {
                continue;
            }
            same += 1;
            let distance = |on_policy| {
                let (one, other) = (small.gradient(one, on_policy), small.gradient(other, on_policy));
                value(&((&one - &other).norm() / other.norm()))
            };
            assert!(distance(true) <= 1e-6, "{one:?} and {other:?}: {}", distance(true));
            assert!(distance(false) > 1e-3, "{one:?} and {other:?} do not differ off policy");
        }
    }
    assert!(same >= 6, "{same} pairs are no test");
    // A range of no width cuts nothing from a ratio that is exactly 1.
    let narrow = small.gradient(&axes(&json!({"clip": {"rule": "symmetric", "low": 0.0}})), true);
    assert!(value(&(narrow - small.gradient(&Preset::Dapo.axes(), true)).abs().max()) < 1e-12);
    let constant = small.gradient(&Preset::DrGrpo.axes(), true);
    assert!(value(&(constant - small.gradient(&Preset::Dapo.axes(), true)).abs().max()) > 1e-3);
}

#[test]
fn clip_metrics_have_the_values_of_a_count_by_hand() {
    let ratios = [0.5, 0.5, 1.1, 1.5, 1.5, 0.9f64];
    let advantages = [1.0, -1.0, 2.0, 1.0, -1.0, -3.0];
    let (new, zero) = (doubles(&ratios.map(f64::ln)), doubles(&[0.0; 6]));
    let share = doubles(&[1.0 / 6.0; 6]);
    let axes = axes(&json!({"clip": {"high": 0.3}}));
    let tokens = PolicyTokens {
        new: &new,
        old: &zero,
        reference: None,
        entropy: &doubles(&[0.5; 6]),
        advantages: &doubles(&advantages),
        weights: &doubles(&[1.0; 6]),
        share: &share,
        covered: &share,
        segments: None,
        on_policy: false,
    };
    let made = policy_loss(&axes, &tokens).unwrap();
    assert!((value(&made.loss) + (0.5 - 0.8 + 2.2 + 1.3 - 1.5 - 2.7) / 6.0).abs() < 1e-12);
    let sums = &made.sums;
    assert_eq!((sums.tokens, sums.covered, sums.clipped_low, sums.clipped_high, sums.idle), (6, 6, 1, 1, 2));
    let near = |one: f64, other: f64| assert!((one - other).abs() < 1e-12, "{one} {other}");
    near(sums.ratio, 6.0);
    near(sums.ratio_max, 1.5);
    near(sums.ratio_square, 0.25 * 2.0 + 1.21 + 2.25 * 2.0 + 0.81);
    near(sums.mismatch_max, 2f64.ln());
    near(sums.old_kl, ratios.iter().map(|ratio| ratio - 1.0 - ratio.ln()).sum());
    near(sums.advantage_max, 3.0);
    near(sums.entropy, 3.0);
    // On policy the ratio is exactly 1, and what was told of the sampler is a mismatch.
    let first = policy_loss(&axes, &PolicyTokens { on_policy: true, ..tokens }).unwrap().sums;
    assert_eq!((first.ratio, first.ratio_max, first.old_kl, first.idle), (6.0, 1.0, 0.0, 0));
    near(first.mismatch_max, 2f64.ln());
    // Two micro-batches are the sums of one.
    let mut twice = first;
    twice.merge(&first);
    assert_eq!((twice.tokens, twice.ratio, twice.ratio_max), (12, 12.0, 1.0));
    let none = doubles(&[]);
    let nothing = PolicyTokens {
        new: &none,
        old: &none,
        reference: None,
        entropy: &none,
        advantages: &none,
        weights: &none,
        share: &none,
        covered: &none,
        segments: None,
        on_policy: false,
    };
    let nothing = policy_loss(&axes, &nothing).unwrap();
    assert_eq!((nothing.sums, value(&nothing.loss)), (PolicySums::default(), 0.0));
}

#[test]
fn what_is_outside_of_the_loss_leaves_no_nan_and_still_feels_the_pull() {
    for preset in Preset::ALL {
        let mut axes = preset.axes();
        axes.kl = Kl { beta: 0.1, estimator: Estimator::K3, place: KlPlace::Loss };
        let new = doubles(&[-0.5, -1.0, -0.2]).set_requires_grad(true);
        // The second sequence is out of the loss, and its ratio is infinite.
        let old = doubles(&[-0.6, f64::NEG_INFINITY, f64::NEG_INFINITY]);
        let segments = Segments::new(&[1, 2], Device::Cpu);
        let zero = doubles(&[0.0; 3]);
        let made = policy_loss(
            &axes,
            &PolicyTokens {
                new: &new,
                old: &old,
                reference: Some(&doubles(&[-0.4, -0.8, -0.3])),
                entropy: &zero,
                advantages: &doubles(&[1.0, f64::NAN, f64::INFINITY]),
                weights: &doubles(&[1.0; 3]),
                share: &doubles(&[1.0, 0.0, 0.0]),
                covered: &doubles(&[0.5, 0.25, 0.25]),
                segments: Some(&segments),
                on_policy: false,
            },
        )
        .unwrap();
        made.loss.backward();
        let slopes = Vec::<f64>::try_from(&new.grad()).unwrap();
        assert!(slopes.iter().all(|slope| slope.is_finite() && *slope != 0.0), "{preset:?}: {slopes:?}");
        assert_eq!((made.sums.tokens, made.sums.covered), (1, 3));
        assert!((slopes[1] - 0.1 * 0.25 * (1.0 - 0.2f64.exp())).abs() < 1e-12, "{preset:?}");
    }
}

#[test]
fn half_precision_and_wrong_shapes_are_refused() {
    let axes = Preset::Dapo.axes();
    let error = |new: &Tensor, old: &Tensor| {
        let zero = new.zeros_like();
        policy_loss(
            &axes,
            &PolicyTokens {
                new,
                old,
                reference: None,
                entropy: &zero,
                advantages: &zero,
                weights: &zero,
                share: &zero,
                covered: &zero,
                segments: None,
                on_policy: false,
            },
        )
        .unwrap_err()
        .to_string()
    };
    let numbers = doubles(&[1.0, 2.0]);
    let half = numbers.to_kind(Kind::BFloat16);
    assert!(error(&half, &half).contains("BFloat16"));
    assert!(error(&numbers, &numbers.to_kind(Kind::Float)).contains("`old`"));
    assert!(error(&numbers, &doubles(&[1.0])).contains("shape"));
}
