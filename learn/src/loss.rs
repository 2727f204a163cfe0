//! Losses and entropies: tensors in, tensors out.
//!
//! There is one kernel of policy gradients, [`policy_loss`], whose axes are free of one another; the methods of the
//! literature are points in their space. Denominators are arguments, counted by the caller over the whole optimizer batch,
//! so that a gradient is the same for every split into micro-batches. Shares and means leave here as sums with counts. It
//! knows no model and no batch.

use anyhow::{Result, ensure};
use pipe::stages::grpo::Axes;
use pipe::stages::grpo::axes::{ClipRule, Estimator, KlPlace, Ratio};
use tch::{Device, Kind, Reduction, Tensor, no_grad};

/// Log-probabilities `[N]` f32 of `targets` `[N]` i64 under softmax(`logits` / `temperature`), `logits` being `[N, V]` f32.
pub fn token_logprobs(logits: &Tensor, targets: &Tensor, temperature: f64) -> Tensor {
    let ignored = -100; // No token id is negative, so no target is ignored.
    -tempered(logits, temperature).cross_entropy_loss(targets, None::<&Tensor>, Reduction::None, ignored, 0.0)
}

/// Entropies `[N]` f32, in nats, of softmax(`logits` / `temperature`) for `logits` `[N, V]`, within the gradient graph. A
/// logit of minus infinity stands for a token that may not be drawn.
pub fn entropy(logits: &Tensor, temperature: f64) -> Tensor {
    let logprobs = tempered(logits, temperature).log_softmax(-1, logits.kind());
    // Chosen before it is multiplied: 0 times minus infinity is no number.
    let finite = logprobs.masked_fill(&logprobs.isneginf(), 0.0);
    -(logprobs.exp() * finite).sum_dim_intlist(-1, false, logits.kind())
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

/// Contiguous runs of tokens, in order, over which a ratio is formed: turns or sequences.
#[derive(Debug)]
pub struct Segments {
    /// `[S * L]` i64: the token at each place of the padded segments, the number of tokens standing for none.
    gather: Tensor,
    /// `[N]` i64: the segment of each token.
    owner: Tensor,
    /// `[S]` f64.
    lengths: Tensor,
}

impl Segments {
    /// Segments of the given numbers of tokens, none of which is 0.
    pub fn new(lengths: &[usize], device: Device) -> Self {
        let (tokens, longest) = (lengths.iter().sum::<usize>(), lengths.iter().copied().max().unwrap_or(0));
        let (mut gather, mut owner, mut first) = (Vec::new(), Vec::with_capacity(tokens), 0);
        for (segment, &length) in lengths.iter().enumerate() {
            gather.extend((0..longest).map(|place| if place < length { first + place } else { tokens } as i64));
            owner.extend(std::iter::repeat_n(segment as i64, length));
            first += length;
        }
        let counts: Vec<f64> = lengths.iter().map(|length| *length as f64).collect();
        Self {
            gather: Tensor::from_slice(&gather).to_device(device),
            owner: Tensor::from_slice(&owner).to_device(device),
            lengths: Tensor::from_slice(&counts).to_device(device),
        }
    }

    /// For each token `[N]` the mean of `values` `[N]` over its segment, in f64 and outside of the gradient graph.
    ///
    /// Sums run along padded rows, so the order of additions is fixed on every device.
    fn means(&self, values: &Tensor) -> Tensor {
        no_grad(|| {
            let values = Tensor::cat(
                &[values.to_kind(Kind::Double), self.lengths.new_zeros([1], (Kind::Double, values.device()))],
                0,
            );
            let padded = values.index_select(0, &self.gather).view([self.lengths.size()[0], -1]);
            (padded.sum_dim_intlist(-1, false, Kind::Double) / &self.lengths).index_select(0, &self.owner)
        })
    }
}

/// What [`policy_loss`] reads of the tokens at hand: `N` of them, all tensors `[N]` of one floating kind, f32 or f64.
#[derive(Debug)]
pub struct PolicyTokens<'a> {
    /// Log-probabilities under the policy that learns; the gradient flows through them.
    pub new: &'a Tensor,
    /// Log-probabilities under the policy that sampled.
    pub old: &'a Tensor,
    /// Log-probabilities under the reference, where one is loaded.
    pub reference: Option<&'a Tensor>,
    /// Entropies under the policy that learns; the gradient flows through them where the entropy term is on.
    pub entropy: &'a Tensor,
    /// Advantages.
    pub advantages: &'a Tensor,
    /// What each token's term of the policy loss is multiplied by. No denominator counts it.
    pub weights: &'a Tensor,
    /// What a token counts for in the policy term: one over its denominator, and 0 outside of the term.
    pub share: &'a Tensor,
    /// What a token counts for in the KL and the entropy term; never 0.
    pub covered: &'a Tensor,
    /// Turns or sequences, where the ratio is formed over them.
    pub segments: Option<&'a Segments>,
    /// No update has been made since the tokens were sampled: sampler and learner are one policy, so every ratio is exactly
    /// 1, and what their log-probabilities differ by is an error of computation.
    pub on_policy: bool,
}

/// What [`policy_loss`] gives: the loss to be differentiated, and sums that can be added up over micro-batches.
#[derive(Debug)]
pub struct PolicyLoss {
    /// Scalar.
    pub loss: Tensor,
    /// The sums.
    pub sums: PolicySums,
}

/// Sums over tokens. Those about ratios, clips and advantages are over the tokens of the policy term, the others over all.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct PolicySums {
    /// Tokens of the policy term.
    pub tokens: u64,
    /// All tokens.
    pub covered: u64,
    /// The policy term's part of the loss.
    pub policy_loss: f64,
    /// The KL term's part of the loss.
    pub kl_loss: f64,
    /// The entropy term's part of the loss.
    pub entropy_loss: f64,
    /// Ratios, as the loss reads them.
    pub ratio: f64,
    /// Squares of ratios.
    pub ratio_square: f64,
    /// The largest ratio; 0 without tokens.
    pub ratio_max: f64,
    /// `r - 1 - ln r` of the tokens' own ratios: the k3 estimate of KL(old || new) (Schulman 2020).
    pub old_kl: f64,
    /// The largest |new - old|: on policy the mismatch of sampler and trainer.
    pub mismatch_max: f64,
    /// The sum of |new - old|.
    pub mismatch: f64,
    /// Negative advantages whose ratio is below the range: their gradient is cut.
    pub clipped_low: u64,
    /// Positive advantages whose ratio is above the range: their gradient is cut; under CISPO any ratio above the bound,
    /// whose weight is cut off.
    pub clipped_high: u64,
    /// Negative advantages whose term the dual bound holds: their gradient is cut.
    pub clipped_dual: u64,
    /// Tokens through which the policy term has no gradient: cut, or with an advantage or weight of 0.
    pub idle: u64,
    /// The largest |advantage|.
    pub advantage_max: f64,
    /// k1 estimates of KL(new || reference).
    pub reference_k1: f64,
    /// k3 estimates of KL(new || reference).
    pub reference_k3: f64,
    /// Entropies in nats.
    pub entropy: f64,
}

impl PolicySums {
    /// Takes in the sums over other tokens.
    pub fn merge(&mut self, other: &Self) {
        self.tokens += other.tokens;
        self.covered += other.covered;
        self.policy_loss += other.policy_loss;
        self.kl_loss += other.kl_loss;
        self.entropy_loss += other.entropy_loss;
        self.ratio += other.ratio;
        self.ratio_square += other.ratio_square;
        self.ratio_max = self.ratio_max.max(other.ratio_max);
        self.old_kl += other.old_kl;
        self.mismatch_max = self.mismatch_max.max(other.mismatch_max);
        self.mismatch += other.mismatch;
        self.clipped_low += other.clipped_low;
        self.clipped_high += other.clipped_high;
        self.clipped_dual += other.clipped_dual;
        self.idle += other.idle;
        self.advantage_max = self.advantage_max.max(other.advantage_max);
        self.reference_k1 += other.reference_k1;
        self.reference_k3 += other.reference_k3;
        self.entropy += other.entropy;
    }
}

/// The policy-gradient loss `-sum share weight term + beta sum covered KL - coefficient sum covered entropy`.
///
/// With the ratio `r = exp(new - old)` of a token, or `r = exp(mean of new - old)` over its turn or sequence (GSPO, Zheng et
/// al. 2025), and the advantage A, the term of a token is
/// `min(r A, clamp(r, 1 - low, 1 + high) A)` (PPO, Schulman et al. 2017; clip-higher, Yu et al. 2025),
/// at least `bound A` where A < 0 (dual clip, Ye et al. 2020),
/// `stop_gradient(min(r, 1 + high)) A new` (CISPO, MiniMax-M1 2025) or `r A`.
/// The estimates of the KL are those of [`Estimator`]. Tokens outside of a term are taken out before any arithmetic.
pub fn policy_loss(axes: &Axes, tokens: &PolicyTokens<'_>) -> Result<PolicyLoss> {
    let PolicyTokens { new, old, reference, entropy, advantages, weights, share, covered, .. } = *tokens;
    let kind = new.kind();
    ensure!(
        matches!(kind, Kind::Float | Kind::Double),
        "log-probabilities of the kind {kind:?}: a loss wants f32 or f64"
    );
    for (name, tensor) in [
        ("old", Some(old)),
        ("reference", reference),
        ("entropy", Some(entropy)),
        ("advantages", Some(advantages)),
        ("weights", Some(weights)),
        ("share", Some(share)),
        ("covered", Some(covered)),
    ] {
        let Some(tensor) = tensor else { continue };
        ensure!(
            tensor.kind() == kind,
            "`{name}` is of the kind {:?}, the log-probabilities of {kind:?}",
            tensor.kind()
        );
        ensure!(tensor.size() == new.size(), "`{name}` has the shape {:?}, not {:?}", tensor.size(), new.size());
    }
    let inside = share.gt(0.0);
    let sampled = if tokens.on_policy { new.detach() } else { old.detach() };
    let own = new - &sampled;

    // 1. The policy term.
    let zeros = new.zeros_like();
    let moved = own.where_self(&inside, &zeros);
    let advantages = &advantages.detach().where_self(&inside, &zeros);
    let ratio = match (axes.ratio, tokens.segments) {
        (Ratio::Token, _) => moved.exp(),
        (_, Some(segments)) => {
            // The value is the segment's and the derivative each token's own (GSPO-token): with one advantage and weight in
            // the segment this is the derivative of the mean, and no sum stands in the gradient graph.
            let common = segments.means(&moved.detach()).exp().to_kind(kind);
            common * (&moved - moved.detach()).exp()
        }
        (level, None) => anyhow::bail!("a ratio over a {level:?} needs to know where one ends"),
    };
    let (low, high) = (1.0 - axes.clip.low.unwrap_or(1.0), axes.clip.high.or(axes.clip.low).map(|high| 1.0 + high));
    let straight = &ratio * advantages;
    let ranged = || match high {
        Some(high) => straight.minimum(&(ratio.clamp(low, high) * advantages)),
        None => straight.shallow_clone(),
    };
    let bound = axes.clip.bound.unwrap_or(f64::INFINITY);
    let term = match axes.clip.rule {
        ClipRule::Symmetric | ClipRule::Higher => ranged(),
        ClipRule::Dual => {
            let term = ranged();
            term.maximum(&(advantages * bound)).where_self(&advantages.lt(0.0), &term)
        }
        ClipRule::Cispo => {
            let weight = ratio.detach().clamp_max(high.unwrap_or(f64::INFINITY));
            weight * advantages * new.where_self(&inside, &zeros)
        }
        ClipRule::None => straight.shallow_clone(),
    };
    let policy = -(term * weights * share).sum(kind);

    // 2. The KL term and the entropy term, over every token.
    let toward = reference.map(|reference| reference.detach() - new);
    let mut loss = policy.shallow_clone();
    let kl = match &toward {
        Some(toward) if axes.kl.beta > 0.0 && axes.kl.place == KlPlace::Loss => {
            let estimate = match axes.kl.estimator {
                Estimator::K3RatioCorrected => own.exp() * estimate(toward, Estimator::K3),
                plain => estimate(toward, plain),
            };
            let kl = (estimate * covered).sum(kind) * axes.kl.beta;
            // Never in place: the term stays what it is.
            loss = loss.g_add(&kl);
            Some(kl)
        }
        None if axes.needs_reference() => anyhow::bail!("`kl.beta` is {}, but no reference is loaded", axes.kl.beta),
        _ => None,
    };
    let spread = (axes.entropy.coefficient != 0.0).then(|| -(entropy * covered).sum(kind) * axes.entropy.coefficient);
    if let Some(spread) = &spread {
        loss = loss.g_add(spread);
    }

    // 3. Sums.
    let sums = no_grad(|| {
        let value = |tensor: &Tensor| tensor.to_kind(Kind::Double).double_value(&[]);
        let sum = |tensor: &Tensor| tensor.to_kind(Kind::Double).sum(Kind::Double).double_value(&[]);
        let some = new.size()[0] > 0;
        let largest = |tensor: &Tensor| if some { value(&tensor.abs().max()) } else { 0.0 };
        let within = |tensor: &Tensor| tensor.detach().where_self(&inside, &zeros);
        let count = |flags: &Tensor| flags.logical_and(&inside).sum(Kind::Int64).int64_value(&[]) as u64;
        let (r, a) = (within(&ratio), advantages);
        let difference = within(&own).to_kind(Kind::Double);
        let gap = (new - old).detach();
        let (down, up) = (a.lt(0.0), a.gt(0.0));
        let never = inside.zeros_like();
        let above = || high.map_or_else(|| never.shallow_clone(), |high| r.gt(high));
        let (cut_low, cut_high, cut_dual) = match axes.clip.rule {
            ClipRule::Symmetric | ClipRule::Higher => {
                (r.lt(low).logical_and(&down), above().logical_and(&up), never.shallow_clone())
            }
            ClipRule::Dual => (r.lt(low).logical_and(&down), above().logical_and(&up), r.gt(bound).logical_and(&down)),
            ClipRule::Cispo => (never.shallow_clone(), above(), never.shallow_clone()),
            ClipRule::None => (never.shallow_clone(), never.shallow_clone(), never.shallow_clone()),
        };
        let still = (a * weights).eq(0.0);
        let still = if axes.clip.rule == ClipRule::Cispo {
            still
        } else {
            still.logical_or(&cut_low).logical_or(&cut_high).logical_or(&cut_dual)
        };
        PolicySums {
            tokens: count(&inside),
            covered: new.size()[0] as u64,
            policy_loss: value(&policy),
            kl_loss: kl.as_ref().map_or(0.0, value),
            entropy_loss: spread.as_ref().map_or(0.0, value),
            ratio: sum(&r.where_self(&inside, &zeros)),
            ratio_square: sum(&r.to_kind(Kind::Double).square().where_self(&inside, &zeros.to_kind(Kind::Double))),
            ratio_max: largest(&r.where_self(&inside, &zeros)),
            old_kl: sum(&(difference.expm1() - &difference)),
            mismatch_max: largest(&gap),
            mismatch: sum(&gap.abs()),
            clipped_low: count(&cut_low),
            clipped_high: count(&cut_high),
            clipped_dual: count(&cut_dual),
            idle: count(&still),
            advantage_max: largest(a),
            reference_k1: toward.as_ref().map_or(0.0, |toward| sum(&estimate(toward, Estimator::K1))),
            reference_k3: toward.as_ref().map_or(0.0, |toward| sum(&estimate(toward, Estimator::K3))),
            entropy: sum(entropy),
        }
    });
    Ok(PolicyLoss { loss, sums })
}

/// The estimate of KL(new || reference) from `toward` = log reference - log new, `[N]`, without any correction by a ratio.
pub fn estimate(toward: &Tensor, estimator: Estimator) -> Tensor {
    match estimator {
        Estimator::K1 => -toward,
        Estimator::K2 => toward.square() / 2.0,
        Estimator::K3 | Estimator::K3RatioCorrected => toward.expm1() - toward,
    }
}

#[cfg(test)]
mod tests;
