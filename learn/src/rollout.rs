//! Rollouts: rounds of generation, grading and scoring, a chunk of groups at a time, every completion kept.
//!
//! A chunk (a fixed list of prompts, a pure function of step and round) is the unit of commit: it is computed whole, then
//! stands as one line of a journal. A run that resumes takes the lines of its step as they are and computes the others;
//! the two give the same bytes. It knows rewards and advantages and nothing of losses.

mod table;

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::path::Path;
use std::sync::atomic::AtomicBool;
use std::time::Instant;

use pipe::pipeline::stage::{StageContext, StageEvent};
use pipe::rewards::Outcome;
use pipe::stages::grpo::Grpo;
use pipe::stages::training::Precision;
use pipe::tasks::Finish;
use pipe::telemetry::Metrics;
use serde::{Deserialize, Serialize};

use crate::credit::{policy_row, set_advantages, set_penalties};
use crate::exhibits;
use crate::generate::Sampling;
use crate::journal::Journal;
use crate::model::Transformer;
use crate::order::Order;
use crate::parity::Mismatch;
use crate::phases;
use crate::policy::{pairs, recompute};
use crate::prompts::{Prompts, Purpose};
use crate::replay::StoredRollouts;
use crate::rewards::{Rewards, Scored};
use crate::session::rate;
use crate::trajectory::{Request, Trajectory, play};

pub use table::{ROLLOUTS_FILE, distinct, finish_name, turns_column};

/// A completion with its rewards.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Sample {
    /// The episode as it was played.
    pub trajectory: Trajectory,
    /// Each reward, unweighted, in the order of their names.
    pub rewards: Vec<Outcome>,
    /// The weighted sum of the rewards: what is optimised and what is logged. `None` where all rewards abstain or one has an
    /// error: the sample takes no part in learning.
    pub total: Option<f64>,
    /// What each of the model's tokens costs, where the KL is a part of the reward; else empty.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub penalties: Vec<f64>,
    /// Of the episode, of each turn or of each token, relative to the batch of the step; empty until all rounds are done, and
    /// without a total.
    #[serde(skip)]
    pub advantages: Vec<f64>,
}

/// The completions of one prompt.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ScoredGroup {
    /// The row of the prompt.
    pub row: usize,
    /// The round that generated it.
    pub round: u64,
    /// Every sample has the same outcome of each reward that weighs something: there is nothing to learn from.
    pub all_equal: bool,
    /// Whether the step trains on it.
    pub kept: bool,
    /// Its samples.
    pub samples: Vec<Sample>,
}

/// A line of the journal: one generation chunk.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
struct Chunk {
    at: Place,
    groups: Vec<ScoredGroup>,
}

/// Where in a run a chunk belongs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Place {
    step: u64,
    round: u64,
    /// Prompts drawn in the whole run before the chunk's first.
    drawn: u64,
}

/// The rollout of one step.
pub struct Rollout {
    /// All generated groups, in the order of their prompts.
    pub groups: Vec<ScoredGroup>,
    /// Rounds of generation.
    pub rounds: u64,
    /// The policy that learns is the one that sampled. Stored completions are another's once the two have parted.
    pub on_policy: bool,
    /// Generated tokens a second of what was not read back from the journal; `None` where all was.
    pub tokens_per_second: Option<f64>,
}

/// How far the training state of a stage is.
#[derive(Clone, Copy, Debug)]
pub struct Done<'a> {
    /// The journal of rollouts.
    pub journal: &'a Path,
    /// Its bytes that belong to finished steps.
    pub committed: u64,
    /// Finished steps.
    pub step: u64,
}

/// What generates the rollouts of a stage.
pub struct Rollouts<'a> {
    params: &'a Grpo,
    prompts: &'a Prompts,
    reference: Option<&'a Transformer>,
    sampling: Sampling,
    order: Order,
    rewards: Rewards,
    journal: Journal,
    replay: VecDeque<Chunk>,
    stored: Option<StoredRollouts>,
    /// Steps that were done when it was opened.
    done: u64,
}

impl<'a> Rollouts<'a> {
    /// Opens the rollouts of a stage behind what is done.
    pub fn open(
        params: &'a Grpo,
        prompts: &'a Prompts,
        rewards: Rewards,
        rows: Vec<usize>,
        done: &Done<'_>,
    ) -> anyhow::Result<Self> {
        // Chunks of later steps were sampled from weights that this attempt has yet to reach again.
        let (journal, replay) =
            Journal::open(done.journal, done.committed, |chunk: &Chunk| chunk.at.step == done.step)?;
        let order = Order::new("grpo.order", params.seed, rows);
        let sampling = Sampling::open(&params.filters, params.temperature, params.max_new_tokens, &prompts.codec)?;
        let sampling = Sampling { tells_kept: true, ..sampling };
        let replay = replay.into();
        let (reference, stored) = (None, None);
        Ok(Self { params, prompts, reference, sampling, order, rewards, journal, replay, stored, done: done.step })
    }

    /// With stored completions to take instead of sampling.
    pub fn with_stored(self, stored: Option<StoredRollouts>) -> anyhow::Result<Self> {
        if let Some(stored) = &stored {
            let (there, asked) = (stored.steps(), self.params.steps);
            anyhow::ensure!(there >= asked, "the stored rollouts have {there} steps, but `steps` is {asked}");
            for group in (0..asked).flat_map(|step| stored.groups(step)) {
                let (samples, wanted) = (group.trajectories.len() as u64, self.params.group_size);
                anyhow::ensure!(
                    samples == wanted,
                    "the stored groups have {samples} samples, but `group_size` is {wanted}"
                );
                let row = &self.prompts.tokens.rows[group.row];
                anyhow::ensure!(
                    *row.split == *self.params.split,
                    "the stored completion of `{}` is of the split `{}`, but `split` is `{}`",
                    row.instance,
                    row.split,
                    self.params.split
                );
            }
            anyhow::ensure!(
                stored.first() <= self.done,
                "the stored rollouts begin at step {}, but this training at step {}: go on from the training that theirs \
                 went on from, with `continue`",
                stored.first() + 1,
                self.done + 1
            );
        }
        Ok(Self { stored, ..self })
    }

    /// With the reference that the KL is measured to, where it is a part of the reward.
    #[must_use]
    pub fn with_reference(self, reference: Option<&'a Transformer>) -> Self {
        Self { reference, ..self }
    }

    /// Chunks of the step at hand that an earlier attempt has finished.
    pub fn replayed(&self) -> usize {
        self.replay.len()
    }

    /// Bytes of the journal so far.
    pub fn journal_length(&self) -> u64 {
        self.journal.length()
    }

    /// Waits until all finished chunks are on the disk: before a state is saved that counts on them.
    pub fn sync(&self) -> anyhow::Result<()> {
        self.journal.sync()
    }

    /// The rollout of `step`: a round over as many new prompts as the step has groups, then, with dynamic sampling, further
    /// rounds over as many as were dropped. `drawn` counts the prompts drawn in the whole run and is moved at the end.
    ///
    /// A round never generates more than is missing, so no surplus arises, and groups are kept in the order of prompts.
    /// It ends with `Interrupted` between chunks or within one; finished chunks are in the journal then.
    pub fn collect(
        &mut self,
        model: &Transformer,
        step: u64,
        drawn: &mut u64,
        context: &mut StageContext,
    ) -> anyhow::Result<Rollout> {
        if self.stored.is_some() {
            return self.collect_stored(model, step, drawn, context);
        }
        let (began, mut generated) = (Instant::now(), 0);
        let dynamic = &self.params.axes.dynamic_sampling;
        let spent = |groups: &[ScoredGroup]| -> u64 {
            groups.iter().flat_map(|group| &group.samples).map(|sample| sample.trajectory.length() as u64).sum()
        };
        let (mut groups, mut rounds, mut next) = (Vec::new(), 0, *drawn);
        let mut missing = self.params.prompts_per_step;
        while missing > 0 && dynamic.allows_round(rounds, spent(&groups)) {
            let last = next + missing;
            while next < last {
                let rows = self.order.take(next, self.params.generation_chunk.min(last - next));
                let at = Place { step, round: rounds, drawn: next };
                let done = if let Some(done) = self.replay.pop_front() {
                    check(&done, at, &rows)?;
                    done
                } else {
                    context.stop_if_interrupted()?;
                    let mut on_tokens = |tokens| generated += tokens;
                    let groups = self.generate(model, at, &rows, &context.interrupt, &mut on_tokens)?;
                    let done = Chunk { at, groups };
                    self.journal.append(&done)?;
                    done
                };
                groups.extend(done.groups);
                next += rows.len() as u64;
                let along = groups.len() as f64;
                context.tell(StageEvent::Metrics { values: BTreeMap::from([("rollout/groups".to_owned(), along)]) });
            }
            rounds += 1;
            if step == 0 && rounds == 1 && self.params.axes.compares_groups() {
                context.note(forecast(&groups));
            }
            let kept = groups.iter().filter(|group: &&ScoredGroup| group.kept).count() as u64;
            missing = self.params.prompts_per_step - kept;
        }
        *drawn = next;
        if step == 0 && self.params.axes.compares_groups() {
            refuse_silence(&groups)?;
        }
        set_advantages(&self.params.axes.advantage, self.rewards.weights(), &mut groups)?;
        Ok(Rollout { groups, rounds, on_policy: true, tokens_per_second: rate(generated, began) })
    }

    /// The stored rollout of `step`: every group that was generated for it, scored anew, in one chunk.
    fn collect_stored(
        &mut self,
        model: &Transformer,
        step: u64,
        drawn: &mut u64,
        context: &mut StageContext,
    ) -> anyhow::Result<Rollout> {
        let groups = self.stored.as_ref().map_or(&[][..], |stored| stored.groups(step));
        let rows: Vec<usize> = groups.iter().map(|group| group.row).collect();
        let at = Place { step, round: 0, drawn: *drawn };
        let (done, on_policy) = if let Some(done) = self.replay.pop_front() {
            check(&done, at, &rows)?;
            let on_policy = self.is_of(model, &done.groups)?;
            (done, on_policy)
        } else {
            context.stop_if_interrupted()?;
            let rounds: Vec<u64> = groups.iter().map(|group| group.round).collect();
            let played = groups.iter().map(|group| group.trajectories.clone()).collect();
            let mut groups = self.score(at.round, &rows, played)?;
            groups.iter_mut().zip(rounds).for_each(|(group, round)| group.round = round);
            // Under other rewards more groups may be informative than a step trains on: the first of them are kept.
            for surplus in groups.iter_mut().filter(|group| group.kept).skip(self.params.prompts_per_step as usize) {
                surplus.kept = false;
            }
            let on_policy = self.is_of(model, &groups)?;
            self.penalise(on_policy.then_some(model), &mut groups)?;
            let done = Chunk { at, groups };
            self.journal.append(&done)?;
            (done, on_policy)
        };
        let mut groups = done.groups;
        *drawn += groups.len() as u64;
        set_advantages(&self.params.axes.advantage, self.rewards.weights(), &mut groups)?;
        let rounds = groups.iter().map(|group| group.round + 1).max().unwrap_or(0);
        Ok(Rollout { groups, rounds, on_policy, tokens_per_second: None })
    }

    /// Whether the samples of `groups` may be `model`'s, by their log-probabilities.
    fn is_of(&self, model: &Transformer, groups: &[ScoredGroup]) -> anyhow::Result<bool> {
        let mut rows = Vec::new();
        for group in groups {
            let prompt = self.prompts.prompt(group.row);
            rows.extend(group.samples.iter().map(|sample| policy_row(self.params, &prompt, sample, false)));
        }
        // Asked of every row: one that is nearly sure of itself says little of the others.
        let recomputed = recompute(self.params, model, &rows)?;
        Ok(Mismatch::of(pairs(&rows, &recomputed)).is_rounding(self.params.precision, self.params.temperature))
    }

    /// Fills in what the KL in the reward costs. In bf16 the log-probabilities of the `policy` that sampled are computed anew.
    fn penalise(&self, policy: Option<&Transformer>, groups: &mut [ScoredGroup]) -> anyhow::Result<()> {
        let Some(reference) = self.reference else { return Ok(()) };
        let policy = policy.filter(|_| self.params.precision == Precision::Bf16);
        set_penalties(self.params, self.prompts, policy, reference, groups)
    }

    fn generate(
        &mut self,
        model: &Transformer,
        at: Place,
        rows: &[usize],
        interrupt: &AtomicBool,
        on_tokens: &mut dyn FnMut(u64),
    ) -> anyhow::Result<Vec<ScoredGroup>> {
        let Place { step, round, drawn } = at;
        let asked: Vec<Request> = (drawn..)
            .zip(rows)
            .map(|(drawn, &row)| {
                // The number of the draw stands for the instance: a small split may come by twice in one step.
                let place = |sample| vec![self.params.seed, Purpose::Training as u64, step, round, drawn, sample];
                Request { row, samples: (0..self.params.group_size).map(place).collect() }
            })
            .collect();
        let played = play(model, self.prompts, &asked, &self.sampling, interrupt, on_tokens)?;
        let mut groups = self.score(round, rows, played)?;
        self.penalise(Some(model), &mut groups)?;
        Ok(groups)
    }

    /// Scores the episodes of a chunk, a group for each of `rows`.
    fn score(&mut self, round: u64, rows: &[usize], played: Vec<Vec<Trajectory>>) -> anyhow::Result<Vec<ScoredGroup>> {
        let episodes: Vec<(usize, &Trajectory)> =
            rows.iter().zip(&played).flat_map(|(&row, played)| played.iter().map(move |one| (row, one))).collect();
        let mut scored = phases::time("reward", || self.rewards.score(self.prompts, &episodes))?.into_iter();
        let weights = self.rewards.weights();
        let groups = rows.iter().zip(played).map(|(&row, played)| {
            let samples = played.into_iter().zip(scored.by_ref()).map(|(trajectory, scored)| {
                let Scored { outcomes, total } = scored;
                Sample { trajectory, rewards: outcomes, total, penalties: Vec::new(), advantages: Vec::new() }
            });
            let samples: Vec<Sample> = samples.collect();
            let mut counted = samples.iter().filter(|sample| sample.total.is_some());
            let first = counted.next();
            // A reward of weight 0 is looked at, and learnt from no more than a clock is.
            let all_equal = first.is_none_or(|first| counted.all(|sample| earns_like(sample, first, weights)));
            let kept = first.is_some() && !(all_equal && self.params.axes.dynamic_sampling.enabled);
            ScoredGroup { row, round, all_equal, kept, samples }
        });
        Ok(groups.collect())
    }

    /// The rewards, for whoever scores besides.
    pub fn rewards(&mut self) -> &mut Rewards {
        &mut self.rewards
    }

    /// What is measured of a step's rollout: rewards and outcomes over all generated groups, dropped ones included.
    pub fn metrics(&self, rollout: &Rollout) -> Metrics {
        let mut metrics = Metrics::default();
        let limit = Finish::Length;
        for group in &rollout.groups {
            metrics.total("groups/all_equal", f64::from(u8::from(group.all_equal)));
            metrics.total("groups/mixed", f64::from(u8::from(!group.all_equal)));
            metrics.total("groups/discarded", f64::from(u8::from(!group.kept)));
            let distinct: BTreeSet<&[i64]> =
                group.samples.iter().map(|sample| sample.trajectory.ids.as_slice()).collect();
            metrics.mean("completions/unique_share", distinct.len() as f64, group.samples.len() as f64);
            let lengths = group.samples.iter().map(|sample| sample.trajectory.length() as f64);
            exhibits::distribution("completions/length", lengths);
            exhibits::distribution("reward/total", group.samples.iter().filter_map(|sample| sample.total));
            for sample in &group.samples {
                if let Some(total) = sample.total {
                    metrics.mean("reward", total, 1.0);
                    if !sample.penalties.is_empty() {
                        let penalty = sample.penalties.iter().sum::<f64>();
                        metrics.mean("reward/kl_penalty", penalty, 1.0);
                        metrics.mean("reward/optimised", total - penalty, 1.0);
                    }
                }
                let abstained = sample.rewards.iter().filter(|outcome| **outcome == Outcome::Abstain).count();
                let errors = sample.rewards.iter().filter(|outcome| outcome.error().is_some()).count();
                metrics.total("rewards/abstentions", abstained as f64);
                metrics.total("rewards/errors", errors as f64);
                metrics.total("samples/excluded", f64::from(u8::from(sample.total.is_none())));
                let trajectory = &sample.trajectory;
                metrics.mean("completions/mean_length", trajectory.length() as f64, 1.0);
                metrics.mean("completions/clipped_share", f64::from(u8::from(trajectory.finish() == limit)), 1.0);
                metrics.mean("episodes/turns", trajectory.turns.len() as f64, 1.0);
                metrics.mean("episodes/truncated_share", f64::from(u8::from(trajectory.truncated)), 1.0);
                for (name, outcome) in self.rewards.names().iter().zip(&sample.rewards) {
                    if let Some(value) = outcome.value() {
                        metrics.mean(&format!("reward/{name}/mean"), value, 1.0);
                        metrics.deviation(&format!("reward/{name}/std"), value);
                    }
                }
                for (name, value) in self.prompts.measures().iter().zip(&sample.trajectory.measurements) {
                    metrics.mean(&format!("rollout/{name}"), *value, 1.0);
                }
            }
            for ((index, name), weight) in self.rewards.names().iter().enumerate().zip(self.rewards.weights()) {
                let (covariance, variance) = spread(group, index);
                // w Cov(r, R) / Var(R) within groups: the shares of all rewards sum to 1, and one may be negative.
                metrics.mean(&format!("reward/{name}/variance_share"), weight * covariance, variance);
            }
        }
        metrics.total("groups/rounds", rollout.rounds as f64);
        if let Some(rate) = rollout.tokens_per_second {
            metrics.total("tokens_per_second/generate", rate);
        }
        metrics
    }
}

/// What the first round of a run says of those to come: how many groups carry a gradient.
fn forecast(groups: &[ScoredGroup]) -> String {
    let (all, mixed) = (groups.len(), groups.iter().filter(|group| !group.all_equal).count());
    let share = 100.0 * mixed as f64 / all.max(1) as f64;
    let hint = if mixed == 0 { "; without one no step can learn: look at rewards, model and temperature" } else { "" };
    format!("{mixed} of the first {all} groups carry a gradient ({share:.0} %){hint}")
}

/// Groups of a first step below which chance alone may silence all.
const TELLING: usize = 8;

/// Refuses a run whose first step has nothing but completions that were cut off, without a difference in any group.
fn refuse_silence(groups: &[ScoredGroup]) -> anyhow::Result<()> {
    let mut played = groups.iter().flat_map(|group| &group.samples).map(|sample| &sample.trajectory);
    let silent = groups.iter().all(|group| group.all_equal) && played.all(|one| one.finish() == Finish::Length);
    anyhow::ensure!(
        groups.len() < TELLING || !silent,
        "every completion of the first {} groups was cut off at `max_new_tokens`, and no group has a difference: there is \
         nothing to learn from; raise `max_new_tokens`, or begin with a model that ends its answers",
        groups.len()
    );
    Ok(())
}

/// Whether two samples have the same outcome of every reward that weighs something.
fn earns_like(one: &Sample, other: &Sample, weights: &[f64]) -> bool {
    let pairs = one.rewards.iter().zip(&other.rewards).zip(weights);
    pairs.filter(|(_, weight)| **weight != 0.0).all(|((one, other), _)| one == other)
}

/// Refuses a chunk that was read back and is not the one that is due.
fn check(done: &Chunk, at: Place, rows: &[usize]) -> anyhow::Result<()> {
    let there = done.groups.iter().map(|group| group.row);
    anyhow::ensure!(
        done.at == at && there.eq(rows.iter().copied()),
        "the journal of rollouts does not continue at {at:?}; remove the work folder to begin anew"
    );
    Ok(())
}

/// The sums over a group of `(r - mean r)(R - mean R)` and `(R - mean R)^2`, r being one reward and R the total.
///
/// A reward that abstains adds nothing to the total, so it counts as 0 in its own share: the shares still sum to 1.
fn spread(group: &ScoredGroup, reward: usize) -> (f64, f64) {
    let counted = group.samples.iter().filter_map(|sample| {
        let own = sample.rewards[reward].value().unwrap_or(0.0);
        sample.total.map(|total| (own, total))
    });
    let pairs: Vec<(f64, f64)> = counted.collect();
    let count = pairs.len().max(1) as f64;
    let own = pairs.iter().map(|(own, _)| own).sum::<f64>() / count;
    let all = pairs.iter().map(|(_, total)| total).sum::<f64>() / count;
    let pairs = pairs.into_iter().map(|(r, total)| (r - own, total - all));
    pairs.fold((0.0, 0.0), |(covariance, variance), (r, total)| (covariance + r * total, variance + total * total))
}
