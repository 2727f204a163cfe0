//! The rewards of a stage over episodes as they were played, and the check of them before training.
//!
//! Outcomes are kept per reward; a sample has a total where at least one reward has a value and none has an error. What an
//! error does is the stage's `on_error`: it ends the stage, or it is counted and the sample takes no part in learning.

use anyhow::{Context as _, bail};
use pipe::pipeline::stage::{Interrupted, StageContext};
use pipe::rewards::{OnError, Outcome, ScoreError, ScoreInput, Scorer};
use pipe::stages::grpo::Grpo;
use pipe::tasks::{Finish, Measurements, Start, replay};

use crate::prompts::Prompts;
use crate::trajectory::Trajectory;

/// The rewards of a stage, ready to score.
pub struct Rewards {
    scorer: Scorer,
    on_error: OnError,
}

/// What the rewards say of one episode.
#[derive(Clone, Debug, PartialEq)]
pub struct Scored {
    /// Each reward, unweighted, in the order of their names.
    pub outcomes: Vec<Outcome>,
    /// The weighted sum; `None` where the episode takes no part in learning.
    pub total: Option<f64>,
}

/// An episode's text and measurements, as rewards take them.
struct Said {
    completion: String,
    finish: Finish,
    verdict: Measurements,
    turns: Vec<Measurements>,
    lengths: Vec<u64>,
}

impl Rewards {
    /// Compiles the rewards, starts their programs, and scores a demonstration of the first of `rows`: a reward that has no
    /// value for it, a program that crashes, hangs or answers the wrong count is an error before the first step.
    pub fn open(params: &Grpo, prompts: &Prompts, rows: &[usize], context: &mut StageContext) -> anyhow::Result<Self> {
        let scorer = Scorer::new(&params.rewards, Some(&context.interrupt)).map_err(interrupted)?;
        let mut rewards = Self { scorer, on_error: params.on_error };
        let Some(&row) = rows.first() else { return Ok(rewards) };
        let said = demonstration(prompts, row).context("judging a demonstration before training")?;
        let scored = rewards.outcomes(prompts, &[(row, said)]).context("scoring a demonstration before training")?;
        for (name, outcome) in rewards.scorer.names().iter().zip(&scored[0]) {
            if let Some(why) = outcome.error() {
                let instance = &prompts.tokens.rows[row].instance;
                let what = format!("the reward `{name}` has no value for a demonstration of `{instance}`: {why}");
                match rewards.on_error {
                    OnError::Stop => bail!(what),
                    OnError::Exclude => context.note(what),
                }
            }
        }
        Ok(rewards)
    }

    /// The names of the rewards, sorted: the order of all outcomes.
    pub fn names(&self) -> &[String] {
        self.scorer.names()
    }

    /// What each reward is multiplied by.
    pub fn weights(&self) -> &[f64] {
        self.scorer.weights()
    }

    /// Scores episodes with the rows that began them, all at once.
    pub fn score(&mut self, prompts: &Prompts, played: &[(usize, &Trajectory)]) -> anyhow::Result<Vec<Scored>> {
        let said: Vec<(usize, Said)> = played.iter().map(|(row, one)| (*row, said(prompts, one))).collect();
        let outcomes = self.outcomes(prompts, &said)?;
        let mut scored = Vec::with_capacity(outcomes.len());
        for ((row, said), outcomes) in said.iter().zip(outcomes) {
            let total = self.scorer.total(&outcomes);
            if self.on_error == OnError::Stop && total.is_none() {
                self.refuse(&outcomes).with_context(|| {
                    let instance = &prompts.tokens.rows[*row].instance;
                    format!("a completion of `{instance}` cannot be scored: `{}`", said.completion)
                })?;
            }
            scored.push(Scored { outcomes, total });
        }
        Ok(scored)
    }

    /// The error of a sample without a total, if it is one.
    fn refuse(&self, outcomes: &[Outcome]) -> anyhow::Result<()> {
        for (name, outcome) in self.names().iter().zip(outcomes) {
            if let Some(why) = outcome.error() {
                bail!("the reward `{name}` has no value: {why}");
            }
        }
        if outcomes.iter().any(|outcome| outcome.value().is_some()) {
            bail!("the weighted sum of the rewards is not finite");
        }
        Ok(())
    }

    fn outcomes(&mut self, prompts: &Prompts, said: &[(usize, Said)]) -> anyhow::Result<Vec<Vec<Outcome>>> {
        let samples = said.iter().map(|(row, said)| {
            Ok(ScoreInput {
                instance: prompts.instance(*row)?,
                prompt: prompts.tokens.prompt(*row)?,
                completion: &said.completion,
                finish: said.finish,
                measurements: &said.verdict,
                turns: &said.turns,
                lengths: &said.lengths,
            })
        });
        let samples = samples.collect::<anyhow::Result<Vec<_>>>()?;
        self.scorer.score(&samples).map_err(interrupted)
    }
}

fn interrupted(error: ScoreError) -> anyhow::Error {
    if error.is_interrupt() { Interrupted.into() } else { error.into() }
}

fn said(prompts: &Prompts, one: &Trajectory) -> Said {
    Said {
        completion: one.text(),
        finish: one.finish(),
        verdict: prompts.named(&one.measurements),
        turns: one.turns.iter().map(|turn| turn.measurements.clone()).collect(),
        lengths: one.turn_lengths().into_iter().map(|tokens| tokens as u64).collect(),
    }
}

/// What a demonstration of a row says and earns; of a task without one, an empty reply.
fn demonstration(prompts: &Prompts, row: usize) -> anyhow::Result<Said> {
    let instance = prompts.instance(row)?;
    let mut replies = prompts.task.demonstrate(instance, 0)?;
    if replies.is_empty() {
        replies.push(String::new());
    }
    let (turns, verdict) = replay(prompts.task.as_ref(), Start { instance, seed: 0 }, &replies, Finish::Stop)?;
    let verdict = prompts.named(&prompts.values(verdict)?);
    let read = turns.iter().map(|turn| turn.observation.as_str());
    let completion = replies.iter().map(String::as_str).zip(std::iter::once("").chain(read));
    let completion = completion.map(|(reply, before)| [before, reply].concat()).collect();
    let turns: Vec<Measurements> = turns.into_iter().map(|turn| turn.measurements).collect();
    let tokens = |reply: &String| Ok(prompts.codec.encode(reply)?.len() as u64 + 1);
    let lengths = replies.iter().take(turns.len()).map(tokens).collect::<anyhow::Result<_>>()?;
    Ok(Said { completion, finish: Finish::Stop, verdict, turns, lengths })
}
