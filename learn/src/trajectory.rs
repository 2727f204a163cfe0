//! Trajectories: episodes as a model played them, from the first prompt to the verdict, several turns where the task asks.
//!
//! The environment's text stands between the model's replies and is read, never learnt: a turn says which tokens are the
//! model's. What is trained on are the ids as sampled; text is for the task alone. All episodes of a chunk are played
//! turn by turn, so what is computed depends on the chunk's content alone. It knows nothing of rewards.

use std::sync::atomic::AtomicBool;

use anyhow::{Context as _, ensure};
use pipe::random::rng;
use pipe::tasks::{Finish, Measurements, Reply, Start};
use rand_chacha::rand_core::Rng as _;
use serde::{Deserialize, Serialize};

use crate::generate::{Completion, Group, Kept, Sampling, generate};
use crate::model::Transformer;
use crate::phases;
use crate::prompts::Prompts;

/// One turn of a trajectory.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct TurnRecord {
    /// What the model read since its last reply; empty in the first turn, whose prompt is the row's.
    pub observation: String,
    /// The first of the reply's ids in [`Trajectory::ids`].
    pub begin: usize,
    /// The first place behind the reply's ids, the end of the sequence included in them.
    pub end: usize,
    /// The reply without the end of the sequence.
    pub text: String,
    /// Why the reply ended.
    pub finish: Finish,
    /// What the task measured in this turn.
    pub measurements: Measurements,
}

/// One episode as it was played.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Trajectory {
    /// Everything behind the first prompt: replies, and the environment's text between them.
    pub ids: Vec<i64>,
    /// The sampler's log-probability of each of the model's ids, in order.
    pub logprobs: Vec<f32>,
    /// The tokens that might have been drawn at each of the model's ids, where a filter was on and they were asked for.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub kept: Option<Kept>,
    /// The turns; never empty.
    pub turns: Vec<TurnRecord>,
    /// The episode was cut off: by the task's limit of turns, by a reply's limit of tokens or by the model's positions.
    pub truncated: bool,
    /// The verdict's measurements in the order of [`Prompts::measures`].
    pub measurements: Vec<f64>,
}

impl Trajectory {
    /// 1 for each of [`Trajectory::ids`] that is the model's, 0 for the environment's.
    pub fn mask(&self) -> Vec<u8> {
        let mut mask = vec![0; self.ids.len()];
        for turn in &self.turns {
            mask[turn.begin..turn.end].fill(1);
        }
        mask
    }

    /// Whether a limit ended the episode or its last reply.
    pub fn is_cut_off(&self) -> bool {
        self.truncated || self.finish() == Finish::Length
    }

    /// Why the last reply ended.
    pub fn finish(&self) -> Finish {
        self.turns.last().map_or(Finish::Length, |turn| turn.finish)
    }

    /// The model's tokens in each turn.
    pub fn turn_lengths(&self) -> Vec<usize> {
        self.turns.iter().map(|turn| turn.end - turn.begin).collect()
    }

    /// Tokens that the model wrote.
    pub fn length(&self) -> usize {
        self.logprobs.len()
    }

    /// Everything that was said, as text: of one turn its reply, of several the replies and what the model read between.
    pub fn text(&self) -> String {
        self.turns.iter().flat_map(|turn| [turn.observation.as_str(), turn.text.as_str()]).collect()
    }
}

/// The episodes to play on one row.
#[derive(Clone, Debug)]
pub struct Request {
    /// The row whose prompt begins them.
    pub row: usize,
    /// The counters of each episode, by which the model and the environment draw: seed, purpose, ..., sample.
    pub samples: Vec<Vec<u64>>,
}

/// Plays every episode of every request; the result is `[request][sample]`.
///
/// `sampling.max_new_tokens` limits a reply. `on_tokens` hears how many tokens were written. Setting `interrupt` ends it
/// with `Interrupted`.
pub fn play(
    model: &Transformer,
    prompts: &Prompts,
    requests: &[Request],
    sampling: &Sampling,
    interrupt: &AtomicBool,
    on_tokens: &mut dyn FnMut(u64),
) -> anyhow::Result<Vec<Vec<Trajectory>>> {
    let mut playing = Playing::begin(prompts, requests)?;
    // 1. The first replies: each prompt is read once for all of its samples.
    let groups: Vec<Group> = requests
        .iter()
        .map(|request| Group { prompt: prompts.prompt(request.row), samples: request.samples.clone() })
        .collect();
    let completions = generate(model, &groups, sampling, interrupt, on_tokens)?;
    let asked = (0..playing.owners.len()).map(|episode| (episode, Observation::default()));
    let mut asked = playing.take(asked.collect(), completions)?;
    // 2. Further turns: every episode that goes on is read anew to its end.
    let room = model.config().max_position_embeddings as usize;
    let mut turn = 1;
    while !asked.is_empty() {
        let mut groups = Vec::with_capacity(asked.len());
        asked.retain(|(episode, observation)| {
            let prompt = playing.context(*episode);
            let fits = prompt.len() + observation.ids.len() + sampling.max_new_tokens <= room;
            if fits {
                let samples = vec![[playing.owners[*episode].1, &[turn]].concat()];
                groups.push(Group { prompt: [prompt, observation.ids.clone()].concat(), samples });
            } else {
                playing.trajectories[*episode].truncated = true;
            }
            fits
        });
        let completions = generate(model, &groups, sampling, interrupt, on_tokens)?;
        asked = playing.take(asked, completions)?;
        turn += 1;
    }
    // 3. The verdicts, and back to requests.
    let mut trajectories = playing.finish()?.into_iter();
    Ok(requests.iter().map(|request| trajectories.by_ref().take(request.samples.len()).collect()).collect())
}

/// What a model reads next, as text and as ids; nothing in the first turn, whose prompt is the row's.
#[derive(Default)]
struct Observation {
    text: String,
    ids: Vec<i64>,
}

/// The episodes of a chunk under way.
struct Playing<'a> {
    prompts: &'a Prompts,
    episodes: Box<dyn pipe::tasks::Episodes>,
    /// The row and the counters of each episode.
    owners: Vec<(usize, &'a [u64])>,
    trajectories: Vec<Trajectory>,
}

impl<'a> Playing<'a> {
    fn begin(prompts: &'a Prompts, requests: &'a [Request]) -> anyhow::Result<Self> {
        let owners: Vec<(usize, &[u64])> = requests
            .iter()
            .flat_map(|request| request.samples.iter().map(move |counters| (request.row, counters.as_slice())))
            .collect();
        let starts = owners.iter().map(|(row, counters)| {
            let seed = rng("episode", counters).next_u64();
            Ok(Start { instance: prompts.instance(*row)?, seed })
        });
        let starts = starts.collect::<anyhow::Result<Vec<_>>>()?;
        let episodes = prompts.task.begin(&starts).context("beginning episodes")?;
        let empty = || Trajectory {
            ids: Vec::new(),
            logprobs: Vec::new(),
            kept: None,
            turns: Vec::new(),
            truncated: false,
            measurements: Vec::new(),
        };
        Ok(Self { prompts, episodes, trajectories: owners.iter().map(|_| empty()).collect(), owners })
    }

    /// All that the model has read and written in an episode.
    fn context(&self, episode: usize) -> Vec<i64> {
        [self.prompts.prompt(self.owners[episode].0), self.trajectories[episode].ids.clone()].concat()
    }

    /// Takes the completions of the episodes that were asked, in their order, steps the environment, and gives what the
    /// episodes that go on are asked next.
    fn take(
        &mut self,
        asked: Vec<(usize, Observation)>,
        completions: Vec<Vec<Completion>>,
    ) -> anyhow::Result<Vec<(usize, Observation)>> {
        let completions: Vec<Completion> = completions.into_iter().flatten().collect();
        let texts: Vec<String> =
            completions.iter().map(|completion| self.prompts.text(completion)).collect::<anyhow::Result<_>>()?;
        let said = asked.iter().zip(&completions).zip(&texts);
        let said: Vec<Reply<'_>> = said
            .map(|(((episode, _), completion), text)| Reply { episode: *episode, text, finish: completion.finish })
            .collect();
        let turns = phases::time("reward", || self.episodes.step(&said)).context("stepping episodes")?;
        ensure!(turns.len() == said.len(), "the task answered {} of {} replies", turns.len(), said.len());
        let mut next = Vec::new();
        for ((((episode, observation), completion), text), turn) in
            asked.into_iter().zip(completions).zip(texts).zip(turns)
        {
            let trajectory = &mut self.trajectories[episode];
            trajectory.ids.extend(observation.ids);
            let begin = trajectory.ids.len();
            trajectory.ids.extend(&completion.ids);
            trajectory.logprobs.extend(&completion.logprobs);
            if let Some(kept) = &completion.kept {
                trajectory.kept.get_or_insert_default().extend(kept);
            }
            // A reply that was cut off has no end that the model could read on from.
            let cut = completion.finish == Finish::Length;
            trajectory.truncated = !turn.terminated && (turn.truncated || cut);
            trajectory.turns.push(TurnRecord {
                observation: observation.text,
                begin,
                end: trajectory.ids.len(),
                text,
                finish: completion.finish,
                measurements: turn.measurements,
            });
            if !turn.terminated && !trajectory.truncated {
                let most = self.prompts.task.max_turns();
                ensure!(trajectory.turns.len() < most, "the task goes on after its {most} turns");
                let mut ids: Vec<i64> = self.prompts.closing(completion.ids.last().copied()).into_iter().collect();
                ids.extend(self.prompts.observation(&turn.observation)?);
                next.push((episode, Observation { text: turn.observation, ids }));
            }
        }
        Ok(next)
    }

    fn finish(mut self) -> anyhow::Result<Vec<Trajectory>> {
        let verdicts = self.episodes.verdicts().context("asking for verdicts")?;
        ensure!(
            verdicts.len() == self.trajectories.len(),
            "the task gave {} verdicts on {} episodes",
            verdicts.len(),
            self.trajectories.len()
        );
        for ((trajectory, verdict), (row, _)) in self.trajectories.iter_mut().zip(verdicts).zip(&self.owners) {
            let values = self.prompts.values(verdict);
            trajectory.measurements = values.with_context(|| {
                let instance = &self.prompts.tokens.rows[*row].instance;
                format!("judging a completion of `{instance}`: `{}`", trajectory.text())
            })?;
        }
        Ok(self.trajectories)
    }
}
