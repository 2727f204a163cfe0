//! The reward that is a program of the user's: batches of samples out, as many outcomes back.

use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::file::PlacedFile;
use crate::program::{Launch, Program, ProgramError};
use crate::rewards::{Outcome, RewardSpec, ScoreInput};

/// A running program that scores samples.
pub(super) struct ProgramReward {
    start: Start,
    program: Program,
    batch_size: usize,
}

/// How it is started.
struct Start {
    command: Vec<String>,
    files: Vec<PlacedFile>,
    timeout: Duration,
    interrupt: Option<Arc<AtomicBool>>,
}

impl Start {
    fn program(&self) -> Result<Program, ProgramError> {
        let Self { command, files, timeout, interrupt } = self;
        Program::start(&Launch { command, files, timeout: *timeout, interrupt: interrupt.clone() })
    }
}

#[derive(Serialize)]
struct Request<'a> {
    samples: &'a [ScoreInput<'a>],
}

#[derive(Deserialize)]
struct Answer {
    rewards: Vec<Value>,
}

impl ProgramReward {
    /// Starts the program of a `program` reward.
    pub(super) fn start(spec: &RewardSpec, interrupt: Option<&Arc<AtomicBool>>) -> Result<Self, ProgramError> {
        let RewardSpec::Program { command, files, timeout_seconds, batch_size, .. } = spec else {
            return Err(ProgramError::Start("the reward is no program".to_owned()));
        };
        let timeout = Duration::try_from_secs_f64(*timeout_seconds)
            .map_err(|error| ProgramError::Start(format!("`{timeout_seconds}` is no time limit: {error}")))?;
        let (command, files) = (command.clone(), files.clone());
        let start = Start { command, files, timeout, interrupt: interrupt.cloned() };
        Ok(Self { program: start.program()?, start, batch_size: (*batch_size).max(1) as usize })
    }

    /// Asks for a batch. A program that crashed or hung is started again and asked once more: equal requests have equal
    /// answers, and hours of training should not end with what an answer anew puts right. What it says wrongly it would say
    /// again.
    fn ask(&mut self, samples: &[ScoreInput<'_>]) -> Result<Answer, ProgramError> {
        let request = Request { samples };
        match self.program.call(&request) {
            Err(error @ (ProgramError::Ended { .. } | ProgramError::Timeout { .. })) => {
                tracing::warn!("{error}; it is started again and asked once more");
                self.program = self.start.program()?;
                self.program.call(&request)
            }
            answered => answered,
        }
    }

    /// One outcome a sample; anything else that the program does is an error of the program.
    pub(super) fn score(&mut self, samples: &[ScoreInput<'_>]) -> Result<Vec<Outcome>, ProgramError> {
        let mut outcomes = Vec::with_capacity(samples.len());
        for samples in samples.chunks(self.batch_size) {
            let Answer { rewards } = self.ask(samples)?;
            if rewards.len() != samples.len() {
                let (given, asked) = (rewards.len(), samples.len());
                return Err(self.program.refuse(format!("answered {given} rewards for {asked} samples")));
            }
            for (place, (sample, answer)) in samples.iter().zip(rewards).enumerate() {
                let outcome = outcome(&answer, sample.turns.len());
                outcomes.push(
                    outcome.map_err(|what| {
                        self.program.refuse(format!("answered {what} for sample {place} of its batch"))
                    })?,
                );
            }
        }
        Ok(outcomes)
    }
}

/// What an answer says of a sample of so many turns, or what is wrong with it.
fn outcome(answer: &Value, turns: usize) -> Result<Outcome, String> {
    let wanted =
        "a reward is a finite number, a list of one number a turn, `null` to abstain, or `{\"error\": \"why\"}`";
    let number = |value: &Value| value.as_f64().filter(|value| value.is_finite());
    match answer {
        Value::Null => return Ok(Outcome::Abstain),
        Value::Number(_) => {
            if let Some(value) = number(answer) {
                return Ok(Outcome::Value(value));
            }
        }
        Value::Array(values) => {
            if values.len() != turns {
                return Err(format!("{} numbers for the {turns} turns", values.len()));
            }
            if let Some(values) = values.iter().map(number).collect() {
                return Ok(Outcome::turns(values));
            }
        }
        Value::Object(fields) if fields.len() == 1 => {
            if let Some(Value::String(why)) = fields.get("error") {
                return Ok(Outcome::Error(why.clone()));
            }
        }
        _ => {}
    }
    Err(format!("`{answer}` ({wanted})"))
}
