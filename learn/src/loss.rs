//! Losses, advantages and entropies: tensors in, tensors out.
//!
//! Denominators are arguments, counted by the caller over the whole optimizer batch, so that a gradient is the same for
//! every split into micro-batches. Shares and means leave here as sums with counts. It knows no model and no batch.

use pipe::stages::grpo::Scale;
use tch::{Kind, Reduction, Tensor, no_grad};

/// Log-probabilities `[N]` f32 of `targets` `[N]` i64 under softmax(`logits` / `temperature`), `logits` being `[N, V]` f32.
pub fn token_logprobs(logits: &Tensor, targets: &Tensor, temperature: f64) -> Tensor {
    let ignored = -100; // No token id is negative, so no target is ignored.
    -tempered(logits, temperature).cross_entropy_loss(targets, None::<&Tensor>, Reduction::None, ignored, 0.0)
}

/// Entropies `[N]` f32, in nats, of softmax(`logits` / `temperature`) for `logits` `[N, V]`; outside of the gradient graph.
pub fn entropy(logits: &Tensor, temperature: f64) -> Tensor {
    no_grad(|| {
        let logprobs = tempered(logits, temperature).log_softmax(-1, logits.kind());
        -(logprobs.exp() * logprobs).sum_dim_intlist(-1, false, logits.kind())
    })
}

#[expect(clippy::float_cmp, reason = "1 is what a user writes, and only exactly 1 may be left out")]
fn tempered(logits: &Tensor, temperature: f64) -> Tensor {
    // Dividing by 1 changes no bit and costs a pass over the largest tensor of a step.
    if temperature == 1.0 { logits.shallow_clone() } else { logits / temperature }
}

/// Token-mean cross-entropy: minus the sum of `logprobs` `[N]` over `denominator` targets.
pub fn supervised_loss(logprobs: &Tensor, denominator: f64) -> Tensor {
    -logprobs.sum(logprobs.kind()) / denominator
}

/// What [`policy_loss`] gives: the loss to be differentiated, and sums over the tokens at hand.
#[derive(Debug)]
pub struct PolicyLoss {
    /// Scalar f32.
    pub loss: Tensor,
    /// Tokens: the count behind every sum here.
    pub tokens: u64,
    /// Sum of the probability ratios.
    pub ratio_sum: f64,
    /// The largest probability ratio; 0 without tokens.
    pub ratio_max: f64,
    /// Sum of `ratio - 1 - ln ratio`, the k3 estimate of KL(old || new) (Schulman 2020).
    pub old_kl_sum: f64,
    /// The largest |new - old|; 0 without tokens. On the first update it is the mismatch of sampler and trainer.
    pub mismatch_max: f64,
    /// Tokens with a negative advantage whose ratio is below the range: their gradient is cut.
    pub clipped_low: u64,
    /// Tokens with a positive advantage whose ratio is above the range: their gradient is cut.
    pub clipped_high: u64,
}

/// The clipped policy-gradient loss with a token mean (PPO's clip, Schulman et al. 2017; clip-higher and token mean of
/// DAPO, Yu et al. 2025): `-sum min(r A, clamp(r, 1 - clip_low, 1 + clip_high) A) / denominator`, `r = exp(new - old)`.
///
/// `new`, `old` and `advantages` are `[N]` f32; the gradient flows through `new` alone. `denominator` counts the tokens of
/// the whole optimizer batch.
pub fn policy_loss(
    new: &Tensor,
    old: &Tensor,
    advantages: &Tensor,
    clip_low: f64,
    clip_high: f64,
    denominator: f64,
) -> PolicyLoss {
    let (old, advantages) = (old.detach(), advantages.detach());
    let difference = new - &old;
    let ratio = difference.exp();
    let clipped = ratio.clamp(1.0 - clip_low, 1.0 + clip_high);
    let loss = -(&ratio * &advantages).minimum(&(clipped * &advantages)).sum(new.kind()) / denominator;
    no_grad(|| {
        let (difference, ratio) = (difference.detach().to_kind(Kind::Double), ratio.detach().to_kind(Kind::Double));
        let tokens = ratio.size()[0] as u64;
        let sum = |values: Tensor| values.sum(Kind::Double).double_value(&[]);
        let largest = |values: &Tensor| if tokens == 0 { 0.0 } else { values.max().double_value(&[]) };
        let both = |one: Tensor, other: Tensor| sum(one.logical_and(&other).to_kind(Kind::Double)) as u64;
        PolicyLoss {
            tokens,
            ratio_sum: sum(ratio.shallow_clone()),
            ratio_max: largest(&ratio),
            old_kl_sum: sum(&ratio - 1.0 - &difference),
            mismatch_max: largest(&difference.abs()),
            clipped_low: both(ratio.lt(1.0 - clip_low), advantages.lt(0.0)),
            clipped_high: both(ratio.gt(1.0 + clip_high), advantages.gt(0.0)),
            loss,
        }
    })
}

/// Group-relative advantages (GRPO, Shao et al. 2024): each reward minus its group's mean, over the group's standard
/// deviation (with `ddof` delta degrees of freedom) plus `epsilon` where `scale` says so.
///
/// Consecutive `group_size` rewards are a group. A group whose rewards are all equal gets exactly 0.
///
/// # Panics
/// When the rewards are no whole number of groups.
#[expect(clippy::float_cmp, reason = "only rewards that are exactly equal carry no signal")]
pub fn group_advantages(rewards: &[f64], group_size: usize, scale: Scale, epsilon: f64, ddof: u64) -> Vec<f64> {
    assert!(group_size > 0 && rewards.len().is_multiple_of(group_size), "rewards come in whole groups");
    rewards
        .chunks(group_size)
        .flat_map(|group| {
            // Equality is asked of the rewards: the deviation of equal numbers need not come out as 0 in floating point.
            if group.iter().all(|reward| *reward == group[0]) {
                return vec![0.0; group.len()];
            }
            let count = group.len() as f64;
            let mean = group.iter().sum::<f64>() / count;
            let squares: f64 = group.iter().map(|reward| (reward - mean).powi(2)).sum();
            let divisor = match scale {
                Scale::GroupStd => (squares / (count - ddof as f64)).sqrt() + epsilon,
                Scale::None => 1.0,
            };
            group.iter().map(|reward| (reward - mean) / divisor).collect()
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn doubles(values: &[f64]) -> Tensor {
        Tensor::from_slice(values)
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
    fn two_sequences_share_one_token_mean() {
        // A sequence of one token and one of three: the mean is over four tokens, not over two means.
        let logprobs = doubles(&[-4.0, -1.0, -1.0, -2.0]);
        assert!((supervised_loss(&logprobs, 4.0).double_value(&[]) - 2.0).abs() < 1e-12);
        let (zero, advantages) = (doubles(&[0.0; 4]), doubles(&[1.0, -0.5, -0.5, -0.5]));
        let new = zero.copy().set_requires_grad(true);
        let policy = policy_loss(&new, &zero, &advantages, 0.2, 0.28, 4.0);
        assert!((policy.loss.double_value(&[]) - (-(1.0 - 1.5) / 4.0)).abs() < 1e-12);
        policy.loss.backward();
        // On policy the gradient is minus the advantage over the denominator, whatever the sequence's length.
        assert_eq!(new.grad(), -advantages / 4.0);
        assert_eq!((policy.tokens, policy.clipped_low, policy.clipped_high), (4, 0, 0));
        assert!((policy.ratio_sum - 4.0).abs() < 1e-12 && policy.mismatch_max == 0.0 && policy.old_kl_sum == 0.0);
    }

    #[test]
    fn the_clip_takes_the_pessimistic_side() {
        let ratios = [0.5, 0.5, 1.1, 1.5, 1.5, 0.9f64];
        let advantages = [1.0, -1.0, 2.0, 1.0, -1.0, -3.0];
        let new = doubles(&ratios.map(f64::ln));
        let made = policy_loss(&new, &doubles(&[0.0; 6]), &doubles(&advantages), 0.2, 0.3, 6.0);
        let by_hand = -(0.5 - 0.8 + 2.2 + 1.3 - 1.5 - 2.7) / 6.0;
        assert!((made.loss.double_value(&[]) - by_hand).abs() < 1e-12);
        assert_eq!((made.clipped_low, made.clipped_high, made.tokens), (1, 1, 6));
        assert!((made.ratio_max - 1.5).abs() < 1e-12 && (made.ratio_sum - 6.0).abs() < 1e-12);
        assert!((made.mismatch_max - 2f64.ln()).abs() < 1e-12);
        let kl: f64 = ratios.iter().map(|ratio| ratio - 1.0 - ratio.ln()).sum();
        assert!((made.old_kl_sum - kl).abs() < 1e-12);
        let nothing = policy_loss(&doubles(&[]), &doubles(&[]), &doubles(&[]), 0.2, 0.3, 6.0);
        assert_eq!((nothing.tokens, nothing.ratio_max, nothing.loss.double_value(&[])), (0, 0.0, 0.0));
    }

    #[test]
    fn the_policy_gradient_is_that_of_finite_differences() {
        let logits = doubles(&[0.3, -0.2, 0.9, 1.1, 0.0, -0.7, 0.4, 0.2, -1.0]).view([3, 3]);
        let (targets, old) = (Tensor::from_slice(&[2i64, 0, 1]), doubles(&[-0.9, -0.35, -0.1]));
        let advantages = doubles(&[1.0, -0.6, 0.8]);
        let loss = |logits: &Tensor| {
            policy_loss(&token_logprobs(logits, &targets, 0.8), &old, &advantages, 0.2, 0.28, 3.0).loss
        };
        let leaf = logits.copy().set_requires_grad(true);
        loss(&leaf).backward();
        for index in 0..9 {
            let moved = |by: f64| {
                let change = Tensor::zeros([9], (Kind::Double, tch::Device::Cpu));
                let _ = change.get(index).fill_(by);
                loss(&(&logits + change.view([3, 3]))).double_value(&[])
            };
            let slope = (moved(1e-6) - moved(-1e-6)) / 2e-6;
            let ours = leaf.grad().double_value(&[index / 3, index % 3]);
            assert!((slope - ours).abs() < 1e-8, "{index}: {slope} against {ours}");
        }
    }

    #[test]
    fn advantages_by_hand_and_exactly_zero_without_spread() {
        // 0.1 + 0.2 style sums do not cancel: only equality of the rewards themselves gives 0.
        let equal = group_advantages(&[0.1; 7], 7, Scale::GroupStd, 0.0, 1);
        assert!(equal.iter().all(|advantage| *advantage == 0.0));
        let made = group_advantages(&[1.0, 0.0, 0.0, 1.0, 3.0, 3.0, 3.0, 3.0], 4, Scale::GroupStd, 0.0, 1);
        let deviation = (1.0f64 / 3.0).sqrt();
        assert!((made[0] - 0.5 / deviation).abs() < 1e-12 && (made[1] + 0.5 / deviation).abs() < 1e-12);
        assert_eq!(made[4..], [0.0; 4]);
        let population = group_advantages(&[1.0, 0.0, 0.0, 1.0], 4, Scale::GroupStd, 0.5, 0);
        assert!((population[0] - 0.5).abs() < 1e-12);
        assert_eq!(group_advantages(&[1.0, 0.0], 2, Scale::None, 9.0, 1), [0.5, -0.5]);
    }
}
