//! The training half of policy optimisation: rows of trajectories to micro-batches to the loss kernel to gradients.
//!
//! Denominators are counted over all rows of an update before its first backward pass. Two are stated: that of the policy
//! term counts the rows that are in the loss; that of the KL and entropy terms counts every row, so that these terms hold
//! the policy also where no reward tells samples apart. It knows neither tasks nor rewards.

use anyhow::{Context as _, Result, ensure};
use pipe::stages::grpo::axes::{ClipRule, Ratio, Reduction};
use pipe::stages::grpo::{Axes, Grpo};
use pipe::telemetry::Metrics;
use tch::{Device, Kind, Tensor, no_grad};

use crate::batch::{Batch, Row};
use crate::generate::Kept;
use crate::loss::{PolicySums, PolicyTokens, Segments, entropy, estimate, policy_loss, token_logprobs};
use crate::model::Transformer;
use crate::parity::Mismatch;
use crate::pass::Pass;
use crate::{exhibits, phases};

/// One trajectory to train on. "Targets" are the model's own tokens, in order.
#[derive(Clone, Debug)]
pub struct PolicyRow<'a> {
    /// The prompt and everything behind it: what the model wrote and what its environment answered.
    pub ids: Vec<i64>,
    /// 1 where the token is the model's, else 0; as long as `ids`.
    pub mask: Vec<u8>,
    /// The turn of each target, never falling.
    pub turn: Vec<u32>,
    /// The sampler's log-probability of each target.
    pub old: &'a [f32],
    /// The tokens that might have been drawn at each target, where a filter was on.
    pub kept: Option<&'a Kept>,
    /// The advantage of each target.
    pub advantages: Vec<f32>,
    /// What the policy term of each target is multiplied by; `None` is 1. No denominator counts it.
    pub weights: Option<Vec<f32>>,
    /// Whether the row is in the policy term. Rows of dropped groups and masked truncations are not; KL and entropy terms
    /// cover them too.
    pub in_loss: bool,
}

impl PolicyRow<'_> {
    fn targets(&self) -> usize {
        self.old.len()
    }

    fn check(&self, index: usize) -> Result<()> {
        let targets = self.targets();
        let marked = self.mask.iter().filter(|mask| **mask != 0).count();
        let lengths = [
            ("marked tokens", marked),
            ("turns", self.turn.len()),
            ("advantages", self.advantages.len()),
            ("weights", self.weights.as_ref().map_or(targets, Vec::len)),
            ("kept sets", self.kept.map_or(targets, Kept::len)),
        ];
        for (what, length) in lengths {
            ensure!(length == targets, "row {index} has {targets} log-probabilities, but {length} {what}");
        }
        ensure!(self.turn.is_sorted(), "the turns of row {index} are out of order");
        Ok(())
    }
}

/// Sequences and tokens that a term's mean is over.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Denominator {
    /// Rows with a target.
    pub sequences: u64,
    /// Targets.
    pub tokens: u64,
}

impl Denominator {
    /// Counts rows by their numbers of targets.
    pub fn count(targets: impl Iterator<Item = usize>) -> Self {
        let mut all = Self::default();
        for targets in targets.filter(|targets| *targets > 0) {
            all.sequences += 1;
            all.tokens += targets as u64;
        }
        all
    }

    /// What one token counts for, in a sequence of `targets` tokens; `constant` is the tokens that a sequence counts for
    /// under [`Reduction::Constant`].
    pub fn share(&self, reduction: Reduction, constant: u64, targets: usize) -> f64 {
        1.0 / match reduction {
            Reduction::SequenceMean => self.sequences as f64 * targets as f64,
            Reduction::TokenMean => self.tokens as f64,
            Reduction::Constant => self.sequences as f64 * constant as f64,
        }
    }
}

/// Adds the gradient of one update over `rows` to the model's, and gives the sums behind its metrics.
///
/// `on_policy` says that no update has been made since the rows were sampled. The gradient does not depend on the order of
/// rows or on `micro_batch_size`.
pub fn backward(
    params: &Grpo,
    model: &Transformer,
    reference: Option<&Transformer>,
    rows: &[PolicyRow<'_>],
    on_policy: bool,
) -> Result<PolicySums> {
    let axes = &params.axes;
    let inside = Denominator::count(rows.iter().filter(|row| row.in_loss).map(PolicyRow::targets));
    let covered = Denominator::count(rows.iter().map(PolicyRow::targets));
    let mut sums = PolicySums::default();
    for places in trained(rows).chunks(micro_batch(params.micro_batch_size, rows.len())) {
        let rows: Vec<&PolicyRow<'_>> = places.iter().map(|&place| &rows[place]).collect();
        let (mut forward, new, reference, spread) = phases::time("forward", || {
            let forward = Forward::new(params, model, &rows)?;
            let new = forward.new_logprobs();
            let reference = reference.filter(|_| axes.needs_reference()).map(|reference| forward.under(reference));
            let graph = || entropy(&forward.logits, params.temperature);
            let spread = if axes.entropy.coefficient == 0.0 { no_grad(graph) } else { graph() };
            phases::settle(model.device());
            anyhow::Ok((forward, new, reference, spread))
        })?;
        phases::count_training(model, &forward.batch, rows.iter().map(|row| row.ids.len()).sum());
        let of_rows = |value: &dyn Fn(&PolicyRow<'_>) -> f64| {
            let values: Vec<f32> =
                rows.iter().flat_map(|row| std::iter::repeat_n(value(row) as f32, row.targets())).collect();
            Tensor::from_slice(&values).to_device(model.device())
        };
        let constant = params.reduction_tokens();
        let share = of_rows(&|row| {
            if row.in_loss { inside.share(axes.reduction, constant, row.targets()) } else { 0.0 }
        });
        let whole = of_rows(&|row| covered.share(axes.reduction, constant, row.targets()));
        let of_targets = |values: &dyn Fn(&PolicyRow<'_>) -> Vec<f32>| {
            Tensor::from_slice(&rows.iter().flat_map(|row| values(row)).collect::<Vec<f32>>()).to_device(model.device())
        };
        let old = of_targets(&|row| row.old.to_vec());
        show_ratios(&new, &old, &share);
        let made = policy_loss(
            axes,
            &PolicyTokens {
                new: &new,
                old: &old,
                reference: reference.as_ref(),
                entropy: &spread,
                advantages: &of_targets(&|row| row.advantages.clone()),
                weights: &of_targets(&|row| row.weights.clone().unwrap_or_else(|| vec![1.0; row.targets()])),
                share: &share,
                covered: &whole,
                segments: segments(axes.ratio, &rows, model.device()).as_ref(),
                on_policy,
            },
        )?;
        let loss = made.loss.double_value(&[]);
        ensure!(loss.is_finite(), "the loss is {loss}");
        phases::time("backward", || {
            forward.backward(&made.loss)?;
            phases::settle(model.device());
            anyhow::Ok(())
        })?;
        sums.merge(&made.sums);
    }
    Ok(sums)
}

/// Shows how the log-ratios of the tokens in the policy term lie; all tensors `[N]`.
fn show_ratios(new: &Tensor, old: &Tensor, share: &Tensor) {
    let ratios = no_grad(|| (new - old).masked_select(&share.gt(0.0)).to_kind(Kind::Double).to_device(Device::Cpu));
    // What cannot be read is not shown.
    exhibits::distribution("policy/log_ratio", Vec::<f64>::try_from(&ratios).unwrap_or_default());
}

/// What each target costs where the KL is a part of the reward: `beta` times the estimate of KL(old || reference), `[row]
/// [target]`, with the log-probabilities of the policy that sampled.
///
/// Where a `policy` is given, it is the one that sampled, and its log-probabilities are computed anew.
pub fn penalties(
    params: &Grpo,
    policy: Option<&Transformer>,
    reference: &Transformer,
    rows: &[PolicyRow<'_>],
) -> Result<Vec<Vec<f64>>> {
    let kl = &params.axes.kl;
    let recomputed = policy.map(|policy| recompute(params, policy, rows)).transpose()?;
    let mut costs = vec![Vec::new(); rows.len()];
    for places in trained(rows).chunks(micro_batch(params.micro_batch_size, rows.len())) {
        let chosen: Vec<&PolicyRow<'_>> = places.iter().map(|&place| &rows[place]).collect();
        let forward = no_grad(|| Forward::new(params, reference, &chosen))?;
        let of = |&place: &usize| recomputed.as_ref().map_or(rows[place].old, |recomputed| &recomputed[place]);
        let old: Vec<f32> = places.iter().flat_map(of).copied().collect();
        let toward = no_grad(|| forward.new_logprobs()) - Tensor::from_slice(&old).to_device(reference.device());
        let estimates = estimate(&toward, kl.estimator).to_kind(Kind::Double).to_device(Device::Cpu);
        let estimates = Vec::<f64>::try_from(&estimates).context("cannot read the estimates")?;
        let mut estimates = estimates.into_iter().map(|estimate| kl.beta * estimate);
        for (&place, row) in places.iter().zip(&chosen) {
            costs[place] = estimates.by_ref().take(row.targets()).collect();
        }
    }
    Ok(costs)
}

/// The log-probabilities of the targets of `rows` under `model`, `[row][target]`, as the trainer computes them.
pub fn recompute(params: &Grpo, model: &Transformer, rows: &[PolicyRow<'_>]) -> Result<Vec<Vec<f32>>> {
    let mut made = vec![Vec::new(); rows.len()];
    for places in trained(rows).chunks(micro_batch(params.micro_batch_size, rows.len())) {
        let chosen: Vec<&PolicyRow<'_>> = places.iter().map(|&place| &rows[place]).collect();
        let new = no_grad(|| Forward::new(params, model, &chosen).map(|forward| forward.new_logprobs()))?;
        let new = Vec::<f32>::try_from(&new.to_device(Device::Cpu)).context("cannot read the log-probabilities")?;
        let mut new = new.into_iter();
        for (&place, row) in places.iter().zip(&chosen) {
            made[place] = new.by_ref().take(row.targets()).collect();
        }
    }
    Ok(made)
}

/// How far the log-probabilities that the sampler gave `rows` lie from those that the trainer gives them.
pub fn mismatch(rows: &[PolicyRow<'_>], recomputed: &[Vec<f32>]) -> Mismatch {
    Mismatch::of(rows.iter().zip(recomputed).flat_map(|(row, own)| row.old.iter().copied().zip(own.iter().copied())))
}

/// A forward pass over some rows.
struct Forward<'a> {
    batch: Batch,
    /// What the backward pass goes through; `None` behind it.
    pass: Option<Pass<'a>>,
    /// `[N, V]` f32, minus infinity at tokens that could not be drawn.
    logits: Tensor,
    /// `[N, V]` bool, true at these; `None` where every token could be drawn.
    barred: Option<Tensor>,
    temperature: f64,
}

impl<'a> Forward<'a> {
    fn new(params: &Grpo, model: &'a Transformer, rows: &[&PolicyRow<'_>]) -> Result<Self> {
        for (index, row) in rows.iter().enumerate() {
            row.check(index)?;
        }
        let inputs: Vec<Row<'_>> = rows.iter().map(|row| Row { ids: &row.ids, mask: &row.mask }).collect();
        let batch = Batch::sharing_prompts(&inputs, model.device())?;
        let barred = barred(rows, model.config().vocab_size, model.device())?;
        let pass = Pass::forward(model, &batch);
        let logits = narrowed(model.logits(pass.states()), barred.as_ref());
        Ok(Self { batch, pass: Some(pass), logits, barred, temperature: params.temperature })
    }

    /// Adds the gradient of a loss to the model's, once.
    fn backward(&mut self, loss: &Tensor) -> Result<()> {
        self.pass.take().context("a pass goes back once")?.backward(&self.batch, loss)
    }

    /// The log-probabilities `[N]` f32 of the targets.
    fn new_logprobs(&self) -> Tensor {
        token_logprobs(&self.logits, &self.batch.targets, self.temperature)
    }

    /// The same under another model, outside of the gradient graph.
    fn under(&self, model: &Transformer) -> Tensor {
        no_grad(|| {
            let logits = narrowed(model.logits(&self.batch.states(model)), self.barred.as_ref());
            token_logprobs(&logits, &self.batch.targets, self.temperature)
        })
    }
}

fn narrowed(logits: Tensor, barred: Option<&Tensor>) -> Tensor {
    match barred {
        Some(barred) => logits.masked_fill(barred, f64::NEG_INFINITY),
        None => logits,
    }
}

/// Where logits `[N, V]` stand for tokens that the sampler would not have drawn; `None` where it could draw all.
fn barred(rows: &[&PolicyRow<'_>], vocabulary: i64, device: Device) -> Result<Option<Tensor>> {
    if rows.iter().all(|row| row.kept.is_none()) {
        return Ok(None);
    }
    let (mut open, mut target) = (Vec::new(), 0);
    for row in rows {
        let targets = row.ids.iter().zip(&row.mask).filter(|(_, mask)| **mask != 0).map(|(id, _)| *id);
        for (index, id) in targets.enumerate() {
            let could = row.kept.is_none_or(|kept| kept.at(index).iter().any(|kept| i64::from(*kept) == id));
            ensure!(could, "the token {id} of a row stands outside of the tokens that it was drawn from");
            match row.kept {
                Some(kept) => open.extend(kept.at(index).iter().map(|id| target * vocabulary + i64::from(*id))),
                None => open.extend(target * vocabulary..(target + 1) * vocabulary),
            }
            target += 1;
        }
    }
    // No place stands twice in `open`, so the order of writes is nobody's business.
    let open = Tensor::from_slice(&open).to_device(device);
    let all = Tensor::ones([target * vocabulary], (Kind::Bool, device)).index_fill(0, &open, 0);
    Ok(Some(all.view([target, vocabulary])))
}

/// Where turns or sequences end, where the ratio asks for it.
fn segments(ratio: Ratio, rows: &[&PolicyRow<'_>], device: Device) -> Option<Segments> {
    let lengths: Vec<usize> = match ratio {
        Ratio::Token => return None,
        Ratio::Turn => {
            rows.iter().flat_map(|row| row.turn.chunk_by(|one, other| one == other)).map(<[u32]>::len).collect()
        }
        Ratio::Sequence => rows.iter().map(|row| row.targets()).collect(),
    };
    Some(Segments::new(&lengths, device))
}

/// The places of rows with a target, in their order: samples of one prompt stay side by side and share its forward pass.
fn trained(rows: &[PolicyRow<'_>]) -> Vec<usize> {
    (0..rows.len()).filter(|place| rows[*place].targets() > 0).collect()
}

/// Rows in a forward pass; 0 stands for all.
fn micro_batch(size: u64, rows: usize) -> usize {
    if size == 0 { rows.max(1) } else { size as usize }
}

impl PolicySums {
    /// The metrics of one update that these are the sums of; `on_policy` as in [`backward`].
    pub fn metrics(&self, axes: &Axes, on_policy: bool) -> Metrics {
        let mut metrics = Metrics::default();
        let (tokens, covered) = (self.tokens as f64, self.covered as f64);
        metrics.mean("loss", self.policy_loss + self.kl_loss + self.entropy_loss, 1.0);
        metrics.mean("policy/entropy", self.entropy, covered);
        metrics.mean("policy/ratio_mean", self.ratio, tokens);
        metrics.max("policy/ratio_max", self.ratio_max);
        // Kish's effective sample size of the ratios as weights, over their number.
        if self.ratio_square > 0.0 {
            metrics.mean("policy/effective_share", self.ratio * self.ratio / self.ratio_square, tokens);
        }
        metrics.mean("policy/old_kl", self.old_kl, tokens);
        metrics.mean("policy/clip_low", self.clipped_low as f64, tokens);
        metrics.mean("policy/clip_high", self.clipped_high as f64, tokens);
        if axes.clip.rule == ClipRule::Dual {
            metrics.mean("policy/clip_dual", self.clipped_dual as f64, tokens);
        }
        metrics.mean("policy/zero_gradient_share", self.idle as f64, tokens);
        metrics.max("policy/advantage_max", self.advantage_max);
        if axes.needs_reference() {
            metrics.mean("policy/reference_k1", self.reference_k1, covered);
            metrics.mean("policy/reference_k3", self.reference_k3, covered);
        }
        if axes.covers_dropped() {
            metrics.mean("loss/policy", self.policy_loss, 1.0);
            metrics.mean("loss/kl", self.kl_loss, 1.0);
            metrics.mean("loss/entropy", self.entropy_loss, 1.0);
        }
        if on_policy {
            metrics.max("sampling/logprob_difference_max", self.mismatch_max);
            metrics.mean("sampling/logprob_difference_mean", self.mismatch, covered);
        }
        metrics
    }
}

#[cfg(test)]
mod tests {
    use pipe::stages::grpo::preset::Preset;
    use serde_json::{Value, json};

    use super::*;
    use crate::sandbox;

    fn params(axes: &Axes, temperature: f64, micro_batch_size: u64) -> Grpo {
        let mut file = json!({
            "model": "m", "prompts": "p", "steps": 1, "max_new_tokens": 8, "temperature": temperature,
            "micro_batch_size": micro_batch_size, "rewards": {}
        });
        let axes = serde_json::to_value(axes).unwrap();
        file.as_object_mut().unwrap().extend(axes.as_object().unwrap().clone());
        serde_json::from_value(file).unwrap()
    }

    fn axes(file: &Value) -> Axes {
        serde_json::from_value(file.clone()).unwrap()
    }

    /// Rows of one to three turns, some out of the loss, with log-probabilities of some older policy.
    struct Rows {
        old: Vec<Vec<f32>>,
        kept: Vec<Option<Kept>>,
    }

    const LENGTHS: [usize; 10] = [9, 4, 7, 9, 3, 5, 8, 3, 6, 9];

    fn ids(row: usize) -> Vec<i64> {
        (0..LENGTHS[row]).map(|place| ((row * 5 + place * 7 + place * place) % 13) as i64).collect()
    }

    fn mask(row: usize) -> Vec<u8> {
        // The environment speaks at place 4 of long rows.
        (0..LENGTHS[row]).map(|place| u8::from(place > row % 2 && place != 4)).collect()
    }

    impl Rows {
        /// `apart` says how far the older policy is; filtered rows may draw every token but one at each place.
        fn new(model: &Transformer, apart: f64, filtered: bool) -> Self {
            let mut made = Self { old: Vec::new(), kept: Vec::new() };
            for row in 0..LENGTHS.len() {
                let (ids, mask) = (ids(row), mask(row));
                let targets: Vec<i64> =
                    (1..ids.len()).filter(|place| mask[*place] == 1).map(|place| ids[place]).collect();
                let kept = (filtered && row % 3 != 1).then(|| {
                    let mut kept = Kept::default();
                    for target in &targets {
                        let barred = (target + 1 + row as i64) % 12;
                        let barred = if barred == *target { 12 } else { barred };
                        kept.push(&(0..13).filter(|id| *id != barred as u32).collect::<Vec<u32>>());
                    }
                    kept
                });
                made.old.push(vec![0.0; targets.len()]);
                made.kept.push(kept);
            }
            let params = params(&Preset::Dapo.axes(), 0.9, 0);
            for row in 0..LENGTHS.len() {
                let new = {
                    let rows = made.rows();
                    let forward = no_grad(|| Forward::new(&params, model, &[&rows[row]])).unwrap();
                    Vec::<f32>::try_from(&no_grad(|| forward.new_logprobs())).unwrap()
                };
                let moved = new.iter().zip(0..).map(|(new, place)| {
                    let wave = f64::from(row as u32 * 17 + place * 5).sin();
                    new - (apart * wave) as f32
                });
                made.old[row] = moved.collect();
            }
            made
        }

        fn rows(&self) -> Vec<PolicyRow<'_>> {
            (0..LENGTHS.len())
                .map(|row| {
                    let targets = self.old[row].len();
                    let places: Vec<usize> = (1..LENGTHS[row]).filter(|place| mask(row)[*place] == 1).collect();
                    PolicyRow {
                        ids: ids(row),
                        mask: mask(row),
                        turn: places.iter().map(|place| u32::from(*place > 4)).collect(),
                        old: &self.old[row],
                        kept: self.kept[row].as_ref(),
                        advantages: vec![(row as f32 * 0.7).cos(); targets],
                        weights: (row % 4 == 0).then(|| vec![0.5; targets]),
                        in_loss: row != 3 && row != 4,
                    }
                })
                .collect()
        }
    }

    fn gradient(
        params: &Grpo,
        model: &Transformer,
        reference: &Transformer,
        rows: &[PolicyRow<'_>],
        on_policy: bool,
    ) -> (Tensor, PolicySums) {
        model.zero_gradients();
        let sums = backward(params, model, Some(reference), rows, on_policy).expect("a gradient");
        (model.weights().gradient().copy(), sums)
    }

    fn points() -> Vec<(String, Axes)> {
        let mut points: Vec<(String, Axes)> =
            Preset::ALL.iter().map(|preset| (format!("{preset:?}"), preset.axes())).collect();
        for file in [
            json!({"preset": "grpo", "kl": {"beta": 0.3, "estimator": "k2"}, "entropy": {"coefficient": 0.1}}),
            json!({"preset": "dapo", "kl": {"beta": 0.3, "estimator": "k3_ratio_corrected"}}),
            json!({"preset": "dr_grpo", "kl": {"beta": 0.3}, "clip": {"rule": "dual", "bound": 1.1}}),
            json!({"ratio": "turn", "reduction": "sequence_mean", "advantage": {"level": "turn"}}),
        ] {
            points.push((file.to_string(), axes(&file)));
        }
        points
    }

    #[test]
    fn gradients_of_every_preset_do_not_depend_on_the_split_or_the_order_of_rows() {
        let (_folder, model) = sandbox::model(&json!({}));
        let (_other, reference) = sandbox::model(&json!({}));
        sandbox::stir(&reference, 0.02);
        let (plain, filtered) = (Rows::new(&model, 0.3, false), Rows::new(&model, 0.3, true));
        for (name, axes) in points() {
            assert_eq!(axes.check(), [], "{name}");
            let made =
                |rows: &[PolicyRow<'_>], size| gradient(&params(&axes, 0.9, size), &model, &reference, rows, false);
            let compare = |rows: &[PolicyRow<'_>], whole: &(Tensor, PolicySums), size| {
                let (split, parts) = made(rows, size);
                let distance = sandbox::relative(&split, &whole.0);
                assert!(distance <= 1e-5, "{name}, size {size}: {distance}");
                assert_eq!((parts.tokens, parts.covered), (whole.1.tokens, whole.1.covered));
                assert!((parts.policy_loss - whole.1.policy_loss).abs() < 1e-5);
            };
            let rows = plain.rows();
            let whole = made(&rows, 0);
            assert!(whole.0.norm().double_value(&[]) > 1e-3, "{name}");
            let mut permuted = rows.clone();
            permuted.reverse();
            permuted.swap(1, 6);
            for (rows, size) in [(&rows, 1), (&rows, 2), (&rows, 4), (&rows, 8), (&permuted, 0), (&permuted, 3)] {
                compare(rows, &whole, size);
            }
            let narrowed = filtered.rows();
            let whole = made(&narrowed, 0);
            compare(&narrowed, &whole, 3);
            assert_eq!(made(&narrowed, 0).0, whole.0, "{name}: the same bits again");
        }
    }

    #[test]
    fn padding_changes_no_gradient() {
        let (_folder, model) = sandbox::model(&json!({}));
        let made = Rows::new(&model, 0.3, false);
        let rows: Vec<PolicyRow<'_>> = made.rows().into_iter().filter(|row| row.in_loss).collect();
        // A long row that is in no term widens every tensor of the batch.
        let wide = PolicyRow {
            ids: vec![1; 40],
            mask: [vec![0; 39], vec![1]].concat(),
            turn: vec![0],
            old: &[-1.0],
            kept: None,
            advantages: vec![9.0],
            weights: None,
            in_loss: false,
        };
        let padded = [rows.clone(), vec![wide]].concat();
        for (name, axes) in points().into_iter().filter(|(_, axes)| !axes.covers_dropped()) {
            let params = params(&axes, 0.9, 0);
            let gradient = |rows| gradient(&params, &model, &model, rows, false).0;
            assert!(sandbox::relative(&gradient(&padded), &gradient(&rows)) <= 1e-5, "{name}");
        }
    }

    #[test]
    fn a_reference_that_is_the_policy_is_at_no_distance_and_penalties_are_beta_times_the_estimate() {
        let (_folder, model) = sandbox::model(&json!({}));
        let (_other, reference) = sandbox::model(&json!({}));
        let made = Rows::new(&model, 0.0, true);
        let params = params(&axes(&json!({"preset": "reinforce_pp", "kl": {"beta": 0.5}})), 0.9, 3);
        let (_, sums) = gradient(&params, &model, &reference, &made.rows(), true);
        assert!(
            sums.mismatch_max < 1e-5 && sums.reference_k3.abs() < 1e-9 && sums.ratio_max.to_bits() == 1f64.to_bits()
        );
        let costs = penalties(&params, None, &reference, &made.rows()).unwrap();
        assert!(costs.iter().flatten().all(|cost| cost.abs() < 1e-5));
        sandbox::stir(&reference, 0.1);
        let costs = penalties(&params, None, &reference, &made.rows()).unwrap();
        let alone = penalties(&params, None, &reference, &made.rows()[6..7]).unwrap();
        assert_eq!(costs[6].len(), made.old[6].len());
        for (one, other) in costs[6].iter().zip(&alone[0]) {
            assert!((one - other).abs() < 1e-5 && one.abs() > 1e-6);
        }
    }

    #[test]
    fn two_updates_of_one_rollout_really_clip() {
        let (_folder, model) = sandbox::model(&json!({}));
        let made = Rows::new(&model, 0.0, false);
        let params = params(&axes(&json!({"clip": {"rule": "symmetric", "low": 0.01}})), 0.9, 4);
        let (step, first) = gradient(&params, &model, &model, &made.rows(), true);
        assert_eq!((first.clipped_low, first.clipped_high, first.ratio), (0, 0, first.tokens as f64));
        let norm = step.norm().double_value(&[]);
        no_grad(|| {
            let mut flat = model.weights().flat().shallow_clone();
            flat -= step * (0.02 / norm);
        });
        let (_, second) = gradient(&params, &model, &model, &made.rows(), false);
        assert!(second.clipped_low > 0 && second.clipped_high > 0, "{second:?}");
        assert!(second.ratio_max > 1.01 && second.idle >= second.clipped_low + second.clipped_high);
        assert!(second.policy_loss < first.policy_loss, "a step along the gradient lowers the loss");
    }

    #[test]
    fn denominators_by_hand_and_rows_that_do_not_fit_are_refused() {
        let all = Denominator::count([2, 0, 6].into_iter());
        assert_eq!(all, Denominator { sequences: 2, tokens: 8 });
        let share = |reduction| all.share(reduction, 10, 2);
        let near = |one: f64, other: f64| assert!((one - other).abs() < 1e-15);
        near(share(Reduction::SequenceMean), 1.0 / 4.0);
        near(share(Reduction::TokenMean), 1.0 / 8.0);
        near(share(Reduction::Constant), 1.0 / 20.0);

        let (_folder, model) = sandbox::model(&json!({}));
        let made = Rows::new(&model, 0.0, false);
        let params = params(&Preset::Dapo.axes(), 0.9, 0);
        let mut strange = Kept::default();
        made.old[2].iter().for_each(|_| strange.push(&[12]));
        let error = |change: &dyn Fn(&mut PolicyRow<'_>)| {
            let mut rows = made.rows();
            change(&mut rows[2]);
            backward(&params, &model, None, &rows[2..3], true).unwrap_err().to_string()
        };
        assert!(error(&|row| row.mask.fill(0)).contains("0 marked tokens"));
        assert!(error(&|row| row.turn.clear()).contains("0 turns"));
        assert!(error(&|row| row.turn.reverse()).contains("out of order"));
        assert!(error(&|row| row.weights = Some(vec![])).contains("0 weights"));
        assert!(error(&|row| row.advantages.push(0.0)).contains("advantages"));
        let mut foreign = made.rows();
        foreign[2].kept = Some(&strange);
        let outside = backward(&params, &model, None, &foreign[2..3], true).unwrap_err().to_string();
        assert!(outside.contains("outside of the tokens"), "{outside}");
    }
}
