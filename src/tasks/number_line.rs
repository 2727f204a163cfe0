//! NumberLine: bring a number to a target by steps of one, a step a turn (`NumberLine-v0` of gym-cards, Zhai et al. 2024,
//! arXiv 2405.10292, observed as text).
//!
//! The environment's rules are the paper's: a step that reaches the target earns 1 and ends the episode, one that brings
//! it no nearer earns -1, others 0; an episode may have ten turns; its return counts as success where it is above 0, so
//! that one wrong step spoils it. A reply that names not exactly one action moves at random, by the counters of the
//! episode. The published parser looks at the last character where the key `action` is missing; here that is no action.

use std::ops::Range;

use anyhow::{Context as _, bail, ensure};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::random;
use crate::tasks::maze::{BEGIN, END, PAD};
use crate::tasks::words::{cut, digits};
use crate::tasks::{Episode, Episodes, Finish, FormatSpec, Measure, Measurements, Start, Task, Turn, stratum};

/// The version of instances, rules and verdicts.
pub const VERSION: u32 = 1;
/// The version of the texts of the format `json`.
pub const JSON_VERSION: u32 = 1;

/// What a verdict measures; turns measure `reward`, `valid` and `format` of their own.
pub static MEASURES: &[Measure] = &[
    Measure::new("solved", "1 where the return is above 0: the target was reached and no step led away from it"),
    Measure::new("reached_goal", "1 where the target was reached within the turns that an episode may have"),
    Measure::new("return", "the sum of the environment's rewards: 1 at the target, -1 for a step that leads no nearer"),
    Measure::new("steps", "turns of the episode"),
    Measure::new("shortest", "turns of the best episode"),
    Measure::new("valid", "the share of turns whose reply names exactly one action"),
    Measure::new("format", "the share of turns whose reply is a JSON object with exactly the keys asked for"),
    Measure::new("finished", "the share of turns whose reply the model ended, not the token limit"),
];

/// The strata of instances by their distance to the target, each with the least distance in it.
pub static STRATA: &[(u64, &str)] = &[(0, "near"), (2, "middle"), (4, "far")];

/// Where an episode stands at its beginning.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
struct Instance {
    start: u64,
    goal: u64,
    /// The distance between the two.
    length: u64,
}

/// Number lines of one length in the format `json`.
#[derive(Clone, Copy, Debug)]
pub struct NumberLine {
    max_position: u64,
    max_turns: u64,
    thoughts: bool,
}

/// A step of one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Action {
    Down,
    Up,
}

impl Action {
    const ALL: [Self; 2] = [Self::Down, Self::Up];

    fn symbol(self) -> char {
        match self {
            Self::Down => '-',
            Self::Up => '+',
        }
    }

    fn apply(self, number: u64, most: u64) -> u64 {
        match self {
            Self::Down => number.saturating_sub(1),
            Self::Up => (number + 1).min(most),
        }
    }
}

impl NumberLine {
    /// Numbers from 0 to `max_position` (1 to 99), `max_turns` turns at most.
    pub fn new(max_position: u64, max_turns: u64, format: &FormatSpec) -> anyhow::Result<Self> {
        ensure!((1..=99).contains(&max_position), "a number line ends at 1 to 99, not at {max_position}");
        ensure!(max_turns > 0, "an episode has at least one turn");
        let FormatSpec::Json { thoughts } = *format else {
            bail!("a number line is written in the format `json`: set `format = {{ kind = \"json\" }}`");
        };
        Ok(Self { max_position, max_turns, thoughts })
    }

    fn read(&self, value: &Value) -> anyhow::Result<Instance> {
        let instance = Instance::deserialize(value).context("the instance is no number line")?;
        let Instance { start, goal, length } = instance;
        let fits = start.max(goal) <= self.max_position && start != goal && start.abs_diff(goal) == length;
        ensure!(fits, "{start} to {goal} at distance {length} is no instance on a line to {}", self.max_position);
        Ok(instance)
    }

    fn rules(&self) -> String {
        let keys: Vec<String> = self.keys().iter().map(|key| format!("\"{key}\"")).collect();
        format!(
            "You move along the numbers 0 to {} until the current number is the target. The action \"-\" subtracts 1, \
             the action \"+\" adds 1. Answer in JSON with {}.\n",
            self.max_position,
            keys.join(", ")
        )
    }

    fn keys(&self) -> &'static [&'static str] {
        if self.thoughts { &["current number", "target number", "thoughts", "action"] } else { &["action"] }
    }

    fn reply(&self, current: u64, goal: u64, action: Action) -> String {
        let symbol = action.symbol();
        if !self.thoughts {
            return format!("{{\"action\": \"{symbol}\"}}");
        }
        let thought = match action {
            Action::Up => format!("{current} is less than {goal}, so I add"),
            Action::Down => format!("{current} is more than {goal}, so I subtract"),
        };
        format!(
            "{{\"current number\": {current}, \"target number\": {goal}, \"thoughts\": \"{thought}\", \"action\": \
             \"{symbol}\"}}"
        )
    }
}

/// What the model reads of a state.
fn observation(current: u64, goal: u64) -> String {
    format!("Target: {goal}\nCurrent: {current}\n")
}

/// The one action that a reply names after the key `action`; `None` where it names none or several.
fn read_action(reply: &str) -> Option<Action> {
    let lower = reply.to_lowercase();
    let (_, after) = lower.split_once("\"action\":")?;
    let mut named = Action::ALL.into_iter().filter(|action| after.contains(action.symbol()));
    let action = named.next()?;
    named.next().is_none().then_some(action)
}

impl Task for NumberLine {
    fn generate(&self, seed: u64, indices: Range<u64>) -> anyhow::Result<Vec<Value>> {
        let draw = |index| {
            let mut random = random::rng("task.number_line", &[seed, self.max_position, index]);
            let start = random::below(&mut random, self.max_position + 1);
            let mut goal = random::below(&mut random, self.max_position + 1);
            if goal == start {
                goal = (goal + 1) % self.max_position.max(2);
            }
            let instance = Instance { start, goal, length: start.abs_diff(goal) };
            serde_json::to_value(instance).expect("an instance is plain data")
        };
        Ok(indices.map(draw).collect())
    }

    fn canonical(&self, instance: &Value) -> anyhow::Result<Vec<u8>> {
        let Instance { start, goal, .. } = self.read(instance)?;
        Ok([self.max_position, start, goal].map(|number| number as u8).into())
    }

    fn begin(&self, starts: &[Start<'_>]) -> anyhow::Result<Box<dyn Episodes>> {
        let begin = |start: &Start<'_>| {
            let Instance { start: current, goal, length } = self.read(start.instance)?;
            Ok(Walk { line: *self, seed: start.seed, current, goal, shortest: length, sums: Sums::default() })
        };
        Ok(Box::new(starts.iter().map(begin).collect::<anyhow::Result<Vec<_>>>()?))
    }

    fn demonstrate(&self, instance: &Value, _: u64) -> anyhow::Result<Vec<String>> {
        let Instance { start, goal, length } = self.read(instance)?;
        ensure!(length <= self.max_turns, "the target is {length} steps away, but `max_turns` is {}", self.max_turns);
        let action = if start < goal { Action::Up } else { Action::Down };
        let mut current = start;
        let mut replies = Vec::new();
        while current != goal {
            replies.push(self.reply(current, goal, action));
            current = action.apply(current, self.max_position);
        }
        Ok(replies)
    }

    fn vocabulary(&self) -> Vec<String> {
        let mut tokens: Vec<String> = [PAD, BEGIN, END].map(str::to_owned).into();
        let texts = [self.rules(), observation(0, 0), self.reply(0, 1, Action::Up), self.reply(1, 0, Action::Down)];
        let pieces = texts.iter().flat_map(|text| cut(text).into_iter().map(str::to_owned));
        for piece in digits().chain(pieces) {
            if !tokens.contains(&piece) {
                tokens.push(piece);
            }
        }
        tokens
    }

    fn pieces(&self) -> String {
        r"<\|[^<>]*\|>| ?[A-Za-z]+| ?[0-9]|[^A-Za-z0-9]".to_owned()
    }

    fn measures(&self) -> &[Measure] {
        MEASURES
    }

    fn max_turns(&self) -> usize {
        self.max_turns as usize
    }

    fn stratum(&self, instance: &Value) -> Option<String> {
        stratum(STRATA, instance.get("length")?.as_u64()?).map(str::to_owned)
    }
}

/// What an episode has added up to.
#[derive(Clone, Copy, Debug, Default)]
struct Sums {
    turns: u64,
    total: f64,
    valid: u64,
    format: u64,
    finished: u64,
    reached: bool,
}

/// One episode.
struct Walk {
    line: NumberLine,
    seed: u64,
    current: u64,
    goal: u64,
    shortest: u64,
    sums: Sums,
}

impl Episode for Walk {
    fn observe(&self) -> String {
        self.line.rules() + &observation(self.current, self.goal)
    }

    fn step(&mut self, reply: &str, finish: Finish) -> Turn {
        let named = read_action(reply).filter(|_| finish == Finish::Stop);
        let well_formed = finish == Finish::Stop && is_well_formed(reply, self.line.keys());
        let turn = self.sums.turns;
        let action = named.unwrap_or_else(|| {
            let mut random = random::rng("task.number_line.fallback", &[self.seed, turn]);
            Action::ALL[random::below(&mut random, 2) as usize]
        });
        let before = self.current.abs_diff(self.goal);
        self.current = action.apply(self.current, self.line.max_position);
        let after = self.current.abs_diff(self.goal);
        let reward = match after {
            0 => 1.0,
            _ if after >= before => -1.0,
            _ => 0.0,
        };
        let number = |flag: bool| u64::from(flag);
        self.sums = Sums {
            turns: turn + 1,
            total: self.sums.total + reward,
            valid: self.sums.valid + number(named.is_some()),
            format: self.sums.format + number(well_formed),
            finished: self.sums.finished + number(finish == Finish::Stop),
            reached: after == 0,
        };
        let truncated = after > 0 && self.sums.turns >= self.line.max_turns;
        let values =
            [("reward", reward), ("valid", number(named.is_some()) as f64), ("format", number(well_formed) as f64)];
        Turn {
            measurements: values.map(|(name, value)| (name.to_owned(), value)).into(),
            terminated: after == 0,
            truncated,
            observation: if after == 0 || truncated { String::new() } else { observation(self.current, self.goal) },
        }
    }

    fn verdict(&self) -> Measurements {
        let Sums { turns, total, valid, format, finished, reached } = self.sums;
        let flag = |flag: bool| f64::from(u8::from(flag));
        let share = |count: u64| if turns == 0 { 0.0 } else { count as f64 / turns as f64 };
        let values = [
            flag(total > 0.0),
            flag(reached),
            total,
            turns as f64,
            self.shortest as f64,
            share(valid),
            share(format),
            share(finished),
        ];
        MEASURES.iter().map(|measure| measure.name.clone().into_owned()).zip(values).collect()
    }
}

/// Whether a reply is a JSON object with exactly `keys`.
fn is_well_formed(reply: &str, keys: &[&str]) -> bool {
    let Ok(Value::Object(fields)) = serde_json::from_str(reply) else { return false };
    fields.len() == keys.len() && keys.iter().all(|key| fields.contains_key(*key))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::tasks::{Reply, TaskSpec, open, replay};

    fn task(thoughts: bool) -> Box<dyn Task> {
        open(&TaskSpec::NumberLine { max_position: 5, max_turns: 10 }, &FormatSpec::Json { thoughts }).unwrap()
    }

    fn say(action: &str) -> String {
        format!("{{\"action\": \"{action}\"}}")
    }

    #[test]
    fn demonstrations_succeed_by_the_shortest_way_in_tokens_of_the_vocabulary() {
        for thoughts in [true, false] {
            let task = task(thoughts);
            let vocabulary = task.vocabulary();
            for instance in task.generate(1, 0..60).unwrap() {
                let replies = task.demonstrate(&instance, 0).unwrap();
                let start = Start { instance: &instance, seed: 0 };
                let (turns, verdict) = replay(&*task, start, &replies, Finish::Stop).unwrap();
                assert_eq!((verdict["solved"], verdict["reached_goal"], verdict["return"]), (1.0, 1.0, 1.0));
                assert_eq!((verdict["steps"], verdict["valid"], verdict["format"]), (verdict["shortest"], 1.0, 1.0));
                assert!(turns.last().unwrap().terminated && turns.len() == replies.len());
                let prompt = task.begin(&[start]).unwrap().observe().unwrap().remove(0);
                let texts = turns.iter().map(|turn| &turn.observation).chain(&replies).chain([&prompt]);
                for piece in texts.flat_map(|text| cut(text)) {
                    assert!(vocabulary.iter().any(|token| token == piece), "`{piece}` is no token");
                }
            }
        }
    }

    #[test]
    fn the_rewards_are_those_of_the_published_environment() {
        let (task, instance) = (task(false), json!({"start": 1, "goal": 3, "length": 2}));
        let start = Start { instance: &instance, seed: 4 };
        let judge = |actions: &[&str]| {
            let replies: Vec<String> = actions.iter().map(|action| say(action)).collect();
            let (turns, verdict) = replay(&*task, start, &replies, Finish::Stop).unwrap();
            (turns.iter().map(|turn| turn.measurements["reward"]).collect::<Vec<_>>(), verdict)
        };
        let (rewards, verdict) = judge(&["-", "-", "+", "+", "+"]);
        // The second step stays at 0, which is no nearer either.
        assert_eq!(rewards, [-1.0, -1.0, 0.0, 0.0, 1.0]);
        assert_eq!((verdict["reached_goal"], verdict["solved"], verdict["return"]), (1.0, 0.0, -1.0));
        let (rewards, verdict) = judge(&["-", "+", "+", "+"]);
        assert_eq!((rewards.iter().sum::<f64>(), verdict["solved"]), (0.0, 0.0), "one wrong step spoils an episode");
        let turns = ["-"; 12];
        let (rewards, verdict) = judge(&turns);
        assert_eq!((rewards.len(), verdict["return"], verdict["steps"]), (10, -10.0, 10.0), "ten turns at most");
    }

    /// Derived for uniformly random actions: 28.3 % of the episodes have a return above 0.
    #[test]
    fn replies_without_an_action_walk_at_random_by_the_episodes_counters() {
        let task = task(true);
        let instances = task.generate(3, 0..4_000).unwrap();
        let play = |seed: u64| {
            let starts: Vec<Start<'_>> =
                instances.iter().zip(0..).map(|(instance, at)| Start { instance, seed: seed + at }).collect();
            let mut episodes = task.begin(&starts).unwrap();
            let mut active: Vec<usize> = (0..starts.len()).collect();
            while !active.is_empty() {
                let finish = Finish::Stop;
                let replies: Vec<_> = active.iter().map(|&episode| Reply { episode, text: "{}", finish }).collect();
                let turns = episodes.step(&replies).unwrap();
                active = active
                    .into_iter()
                    .zip(turns)
                    .filter(|(_, turn)| !turn.terminated && !turn.truncated)
                    .unzip::<_, _, Vec<_>, Vec<_>>()
                    .0;
            }
            episodes.verdicts().unwrap()
        };
        let verdicts = play(7);
        let mean = |name: &str| verdicts.iter().map(|verdict| verdict[name]).sum::<f64>() / 4_000.0;
        assert!((mean("solved") - 0.283).abs() < 0.025, "{}", mean("solved"));
        assert_eq!((mean("valid"), mean("format")), (0.0, 0.0));
        assert_eq!(verdicts, play(7));
        assert_ne!(verdicts, play(100_000));
    }

    #[test]
    fn an_action_is_read_after_its_key_alone_and_must_be_one() {
        let cases = [
            ("{\"action\": \"+\"}", Some(Action::Up)),
            ("{\"thoughts\": \"3 - 1\", \"ACTION\": \"-\"}", None),
            ("{\"thoughts\": \"3 - 1\", \"Action\": \"+\"}", Some(Action::Up)),
            ("\"action\": - or +", None),
            ("+", None),
            ("{\"action\": \"up\"}", None),
            ("", None),
        ];
        for (reply, wanted) in cases {
            let wanted = if reply.contains("ACTION") { Some(Action::Down) } else { wanted };
            assert_eq!(read_action(reply), wanted, "{reply}");
        }
        assert!(is_well_formed(&say("+"), &["action"]) && !is_well_formed("{\"action\": \"+\"", &["action"]));
        assert!(!is_well_formed("{\"action\": \"+\", \"x\": 1}", &["action"]));
    }

    #[test]
    fn a_reply_that_was_cut_off_is_no_action() {
        let (task, instance) = (task(false), json!({"start": 0, "goal": 1, "length": 1}));
        let start = Start { instance: &instance, seed: 4 };
        let (turns, verdict) = replay(&*task, start, &[say("+")], Finish::Length).unwrap();
        assert_eq!((turns[0].measurements["valid"], verdict["finished"], verdict["format"]), (0.0, 0.0, 0.0));
    }

    #[test]
    fn endpoints_are_drawn_as_published_and_other_values_are_refused() {
        let task = task(true);
        let mut seen = std::collections::BTreeMap::new();
        for instance in task.generate(0, 0..36_000).unwrap() {
            let pair = (instance["start"].as_u64().unwrap(), instance["goal"].as_u64().unwrap());
            *seen.entry(pair).or_insert(0u32) += 1;
        }
        assert_eq!(seen.len(), 30);
        // Equal draws move the goal up by one modulo 5, so (4, 0) and (5, 1) come up twice as often as others do.
        for ((start, goal), count) in seen {
            let twice = (start + 1) % 5 == goal;
            assert!(
                (f64::from(count) / if twice { 2.0 } else { 1.0 } - 1000.0).abs() < 160.0,
                "{start} to {goal}: {count}"
            );
        }
        for wrong in
            [json!({}), json!({"start": 1, "goal": 1, "length": 0}), json!({"start": 0, "goal": 6, "length": 6})]
        {
            assert!(task.canonical(&wrong).is_err() && task.begin(&[Start { instance: &wrong, seed: 0 }]).is_err());
        }
        let spec = TaskSpec::NumberLine { max_position: 5, max_turns: 10 };
        assert!(open(&spec, &FormatSpec::default()).err().unwrap().to_string().contains("json"));
    }
}
