//! Rollouts: rounds of generation, grading and scoring, a chunk of groups at a time, every completion kept.
//!
//! A chunk (a fixed list of prompts, a pure function of step and round) is the unit of commit: it is computed whole, then
//! stands as one line of a journal. A run that resumes takes the lines of its step as they are and computes the others;
//! the two give the same bytes. It knows rewards and advantages and nothing of losses.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::path::Path;
use std::sync::atomic::AtomicBool;
use std::time::Instant;

use pipe::pipeline::stage::{StageContext, StageEvent};
use pipe::rewards::Outcome;
use pipe::stages::grpo::Grpo;
use pipe::stages::grpo::axes::KlPlace;
use pipe::stages::table::{Column, ColumnType, TableWriter};
use pipe::tasks::Finish;
use pipe::telemetry::Metrics;
use serde::{Deserialize, Serialize};

use crate::advantage::{Earned, Turn, advantages, of_tokens};
use crate::generate::Sampling;
use crate::journal::Journal;
use crate::model::Transformer;
use crate::order::Order;
use crate::policy::{PolicyRow, penalties};
use crate::prompts::{Prompts, Purpose};
use crate::rewards::{Rewards, Scored};
use crate::session::rate;
use crate::trajectory::{Request, Trajectory, play};

/// The file of the output `rollouts`.
pub const ROLLOUTS_FILE: &str = "rollouts.parquet";

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

impl Sample {
    /// What the sample earned, by the rewards' `weights`; `None` without a total.
    fn earned(&self, weights: &[f64]) -> Option<Earned> {
        let mut costs = self.penalties.iter().copied();
        let by_turn = |turn: usize| -> f64 {
            let of = |(outcome, weight): (&Outcome, &f64)| match outcome {
                Outcome::Turns(values) => weight * values.get(turn).copied().unwrap_or(0.0),
                Outcome::Value(_) | Outcome::Abstain | Outcome::Error(_) => 0.0,
            };
            self.rewards.iter().zip(weights).map(of).sum()
        };
        let turn = |(turn, tokens): (usize, usize)| Turn {
            arrived: by_turn(turn),
            penalties: (0..tokens).map(|_| costs.next().unwrap_or(0.0)).collect(),
        };
        Some(Earned {
            total: self.total?,
            components: self.rewards.iter().map(Outcome::value).collect(),
            turns: self.trajectory.turn_lengths().into_iter().enumerate().map(turn).collect(),
        })
    }
}

/// The sample on a row's `prompt` as a row to train on; `in_loss` as in [`PolicyRow`].
pub fn policy_row<'a>(params: &Grpo, prompt: &[i64], sample: &'a Sample, in_loss: bool) -> PolicyRow<'a> {
    let trajectory = &sample.trajectory;
    let turns = trajectory.turn_lengths();
    let advantages = if in_loss {
        of_tokens(params.axes.advantage.level, &sample.advantages, &turns)
    } else {
        vec![0.0; trajectory.length()]
    };
    PolicyRow {
        ids: [prompt, &trajectory.ids].concat(),
        mask: [vec![0; prompt.len()], trajectory.mask()].concat(),
        turn: turns.iter().zip(0..).flat_map(|(&tokens, turn)| std::iter::repeat_n(turn, tokens)).collect(),
        old: &trajectory.logprobs,
        kept: trajectory.kept.as_ref(),
        advantages,
        weights: None,
        in_loss,
    }
}

/// The completions of one prompt.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ScoredGroup {
    /// The row of the prompt.
    pub row: usize,
    /// The round that generated it.
    pub round: u64,
    /// Every sample has exactly the same reward components: there is nothing to learn from.
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
    /// Generated tokens a second of what was not read back from the journal; `None` where all was.
    pub tokens_per_second: Option<f64>,
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
}

impl<'a> Rollouts<'a> {
    /// Opens the journal at `path`, whose first `committed` bytes belong to finished steps, at step `step`. `reference` is
    /// wanted where the KL is a part of the reward.
    pub fn open(
        params: &'a Grpo,
        prompts: &'a Prompts,
        rewards: Rewards,
        reference: Option<&'a Transformer>,
        rows: Vec<usize>,
        path: &Path,
        committed: u64,
        step: u64,
    ) -> anyhow::Result<Self> {
        // Chunks of later steps were sampled from weights that this attempt has yet to reach again.
        let (journal, replay) = Journal::open(path, committed, |chunk: &Chunk| chunk.at.step == step)?;
        let order = Order::new("grpo.order", params.seed, rows);
        let sampling = Sampling::open(&params.filters, params.temperature, params.max_new_tokens, &prompts.codec)?;
        let sampling = Sampling { tells_kept: true, ..sampling };
        let replay = replay.into();
        Ok(Self { params, prompts, reference, sampling, order, rewards, journal, replay })
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
            let kept = groups.iter().filter(|group: &&ScoredGroup| group.kept).count() as u64;
            missing = self.params.prompts_per_step - kept;
        }
        *drawn = next;
        self.set_advantages(&mut groups)?;
        Ok(Rollout { groups, rounds, tokens_per_second: rate(generated, began) })
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
        let episodes: Vec<(usize, &Trajectory)> =
            rows.iter().zip(&played).flat_map(|(&row, played)| played.iter().map(move |one| (row, one))).collect();
        let mut scored = self.rewards.score(self.prompts, &episodes)?.into_iter();
        let groups = rows.iter().zip(played).map(|(&row, played)| {
            let samples = played.into_iter().zip(scored.by_ref()).map(|(trajectory, scored)| {
                let Scored { outcomes, total } = scored;
                Sample { trajectory, rewards: outcomes, total, penalties: Vec::new(), advantages: Vec::new() }
            });
            let samples: Vec<Sample> = samples.collect();
            let mut counted = samples.iter().filter(|sample| sample.total.is_some());
            let first = counted.next();
            let all_equal = first.is_none_or(|first| counted.all(|sample| sample.rewards == first.rewards));
            let kept = first.is_some() && !(all_equal && self.params.axes.dynamic_sampling.enabled);
            ScoredGroup { row, round, all_equal, kept, samples }
        });
        let mut groups: Vec<ScoredGroup> = groups.collect();
        self.set_penalties(&mut groups)?;
        Ok(groups)
    }

    /// The rewards, for whoever scores besides.
    pub fn rewards(&mut self) -> &mut Rewards {
        &mut self.rewards
    }

    /// Fills in what tokens cost, where the KL is a part of the reward. The reference never moves, so it is as much a
    /// property of the chunk as its completions.
    fn set_penalties(&self, groups: &mut [ScoredGroup]) -> anyhow::Result<()> {
        let kl = &self.params.axes.kl;
        let Some(reference) = self.reference.filter(|_| kl.beta > 0.0 && kl.place == KlPlace::Reward) else {
            return Ok(());
        };
        let rows: Vec<PolicyRow<'_>> = groups
            .iter()
            .flat_map(|group| group.samples.iter().map(move |sample| (self.prompts.prompt(group.row), sample)))
            .map(|(prompt, sample)| policy_row(self.params, &prompt, sample, false))
            .collect();
        let costs = penalties(self.params, reference, &rows)?;
        for (sample, costs) in groups.iter_mut().flat_map(|group| &mut group.samples).zip(costs) {
            sample.penalties = costs;
        }
        Ok(())
    }

    /// Fills in the advantages of a step's whole batch: a pure function of its rewards. Groups that are dropped are no part of
    /// the batch; their advantages are 0.
    fn set_advantages(&self, groups: &mut [ScoredGroup]) -> anyhow::Result<()> {
        let weights = self.rewards.weights();
        let kept = groups.iter().filter(|group| group.kept);
        let earned: Vec<_> =
            kept.map(|group| group.samples.iter().map(|sample| sample.earned(weights)).collect()).collect();
        let mut made = advantages(&self.params.axes.advantage, weights, &earned)?.into_iter();
        for group in groups {
            let of_group = if group.kept { made.next() } else { None };
            let mut of_samples = of_group.into_iter().flatten();
            for sample in &mut group.samples {
                let dropped = sample.total.map_or_else(Vec::new, |_| vec![0.0]);
                sample.advantages = if group.kept { of_samples.next().flatten().unwrap_or_default() } else { dropped };
            }
        }
        Ok(())
    }

    /// Writes every completion of the run to `path`; equal rollouts give equal bytes.
    pub fn publish(&self, path: &Path) -> anyhow::Result<()> {
        use ColumnType::{Flag, Integer, Integers, Number, Numbers, Text};
        let rewards: Vec<String> = self.params.rewards.keys().map(|name| format!("reward_{name}")).collect();
        let mut columns = vec![("step", Integer), ("round", Integer), ("row", Integer), ("instance", Text)];
        columns.extend([("sample", Integer), ("prompt", Text), ("completion", Text), ("turns", Text)]);
        columns.extend([("ids", Integers), ("logprobs", Numbers), ("finish", Text), ("truncated", Flag)]);
        columns.extend(rewards.iter().map(|name| (name.as_str(), Number)));
        columns.extend([("total", Number), ("reward_errors", Text), ("advantages", Numbers)]);
        columns.extend(self.prompts.measures().iter().map(|name| (name.as_str(), Number)));
        columns.push(("kept", Flag));
        distinct(&columns)?;
        let mut table = TableWriter::create(path, &columns)?;
        let (mut step, mut groups) = (0, Vec::new());
        self.journal.each(|chunk: Chunk| {
            if chunk.at.step != step {
                self.write(&mut table, step, &mut groups)?;
                step = chunk.at.step;
            }
            groups.extend(chunk.groups);
            Ok(())
        })?;
        self.write(&mut table, step, &mut groups)?;
        table.finish()
    }

    /// Writes the groups of a whole step, and empties the list.
    fn write(&self, table: &mut TableWriter, step: u64, groups: &mut Vec<ScoredGroup>) -> anyhow::Result<()> {
        self.set_advantages(groups)?;
        let rows: Vec<(&ScoredGroup, usize, &Sample)> = groups
            .iter()
            .flat_map(|group| group.samples.iter().enumerate().map(move |(index, sample)| (group, index, sample)))
            .collect();
        if rows.is_empty() {
            return Ok(());
        }
        let number = |value: &dyn Fn(&Sample) -> Option<f64>| {
            Column::Number(rows.iter().map(|(_, _, sample)| value(sample)).collect())
        };
        let about = |group: &ScoredGroup| &self.prompts.tokens.rows[group.row];
        let played = || rows.iter().map(|(_, _, sample)| &sample.trajectory);
        let mut columns = vec![
            Column::integer(rows.iter().map(|_| step as i64)),
            Column::integer(rows.iter().map(|(group, _, _)| group.round as i64)),
            Column::integer(rows.iter().map(|(group, _, _)| group.row as i64)),
            Column::text(rows.iter().map(|(group, _, _)| about(group).instance.clone())),
            Column::integer(rows.iter().map(|(_, index, _)| *index as i64)),
            Column::text(rows.iter().map(|(group, _, _)| about(group).prompt.clone())),
            Column::text(played().map(Trajectory::text)),
            turns_column(self.prompts, played()),
            Column::Integers(played().map(|one| one.ids.iter().map(|id| *id as i32).collect()).collect()),
            Column::Numbers(played().map(|one| one.logprobs.iter().map(|value| f64::from(*value)).collect()).collect()),
            Column::text(played().map(|one| finish_name(one.finish()).to_owned())),
            Column::Flag(played().map(|one| one.truncated).collect()),
        ];
        let names = self.rewards.names();
        columns.extend((0..names.len()).map(|reward| number(&|sample| sample.rewards[reward].value())));
        columns.push(number(&|sample| sample.total));
        columns.push(Column::Text(rows.iter().map(|(_, _, sample)| errors(names, &sample.rewards)).collect()));
        columns.push(Column::Numbers(rows.iter().map(|(_, _, sample)| sample.advantages.clone()).collect()));
        columns.extend(
            (0..self.prompts.measures().len()).map(|at| number(&|sample| Some(sample.trajectory.measurements[at]))),
        );
        columns.push(Column::Flag(rows.iter().map(|(group, _, _)| group.kept).collect()));
        table.write(columns)?;
        groups.clear();
        Ok(())
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
            for sample in &group.samples {
                if let Some(total) = sample.total {
                    metrics.mean("reward", total, 1.0);
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

/// The errors of a sample's rewards as `NAME: why`; null where there is none.
fn errors(names: &[String], outcomes: &[Outcome]) -> Option<String> {
    let named = names.iter().zip(outcomes);
    let errors: Vec<String> =
        named.filter_map(|(name, outcome)| Some(format!("{name}: {}", outcome.error()?))).collect();
    (!errors.is_empty()).then(|| errors.join("; "))
}

/// The turns of trajectories as JSON; null where an episode has one turn, of which the other columns say all.
pub fn turns_column<'a>(prompts: &Prompts, played: impl Iterator<Item = &'a Trajectory>) -> Column {
    let turns = |one: &Trajectory| {
        let alone = one.turns.len() == 1 && one.turns[0].measurements == prompts.named(&one.measurements);
        (!alone).then(|| serde_json::to_string(&one.turns).expect("turns are plain data"))
    };
    Column::Text(played.map(turns).collect())
}

/// The word for a finish reason in tables.
pub fn finish_name(finish: Finish) -> &'static str {
    match finish {
        Finish::Stop => "stop",
        Finish::Length => "length",
    }
}

/// Refuses a table with two columns of one name, as a measurement called `prompt` would make.
pub fn distinct(columns: &[(&str, ColumnType)]) -> anyhow::Result<()> {
    let mut counts: BTreeMap<&str, usize> = BTreeMap::new();
    for (name, _) in columns {
        *counts.entry(name).or_default() += 1;
    }
    let twice = counts.iter().find(|(_, count)| **count > 1);
    anyhow::ensure!(
        twice.is_none(),
        "two columns are called `{}`: rename the measurement",
        twice.map_or("", |(name, _)| name)
    );
    Ok(())
}
