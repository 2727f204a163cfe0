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
        let logprobs = tempered(logits, temperature).log_softmax(-1, Kind::Float);
        -(logprobs.exp() * logprobs).sum_dim_intlist(-1, false, Kind::Float)
    })
}

fn tempered(logits: &Tensor, temperature: f64) -> Tensor {
    // Dividing by 1 changes no bit and costs a pass over the largest tensor of a step.
    if temperature == 1.0 { logits.shallow_clone() } else { logits / temperature }
}

/// Token-mean cross-entropy: minus the sum of `logprobs` `[N]` over `denominator` targets.
pub fn supervised_loss(logprobs: &Tensor, denominator: f64) -> Tensor {
    -logprobs.sum(Kind::Float) / denominator
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
    let loss = -(&ratio * &advantages).minimum(&(clipped * &advantages)).sum(Kind::Float) / denominator;
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
