//! Adversarial answers to an instance, built from a task's vocabulary and demonstrations alone: what a reward may pay for
//! although nothing is solved. They suit every task, a user's program included, because they know none.

use serde_json::Value;

use crate::random::{below, rng};
use crate::tasks::{Finish, Task};

/// Tokens of a large vocabulary that are tried by themselves.
const MOST_TOKENS: usize = 160;
/// Tokens that loops are made of.
const LOOP_TOKENS: usize = 12;
/// Tokens in a spam, a loop or a random answer.
const LENGTH: usize = 24;
/// Random answers.
const RANDOM: u64 = 6;

/// An answer that no honest model gives.
#[derive(Clone, Debug, PartialEq)]
pub struct Probe {
    /// Its family: `empty`, `spam`, `loop`, `random`, `overshoot`, `truncated` or `other instance`.
    pub family: &'static str,
    /// What is said, a reply a turn; the last holds for all further turns.
    pub replies: Vec<String>,
    /// Why the last reply ended.
    pub finish: Finish,
}

/// Adversarial answers to `instance`; `other` is another instance, whose demonstration is tried here.
///
/// A task without demonstrations gives those that need none.
pub fn probes(task: &dyn Task, instance: &Value, other: Option<&Value>, seed: u64) -> Vec<Probe> {
    let turns = task.max_turns().min(64);
    let mut found = Vec::new();
    let mut add = |family, replies: Vec<String>, finish| found.push(Probe { family, replies, finish });
    add("empty", vec![String::new(); turns], Finish::Stop);
    let mut vocabulary = task.vocabulary();
    vocabulary.retain(|token| !token.is_empty());
    let mut draws = rng("probes", &[seed]);
    let demonstration = task.demonstrate(instance, seed).ok().filter(|replies| !replies.is_empty());
    // 1. Noise: one token over and over, and any tokens.
    for place in 0..vocabulary.len().min(MOST_TOKENS) {
        let token = &vocabulary[place * vocabulary.len() / vocabulary.len().min(MOST_TOKENS)];
        add("spam", vec![token.repeat(LENGTH); turns], Finish::Stop);
    }
    for _ in 0..RANDOM.min(vocabulary.len() as u64) {
        let reply = (0..LENGTH).map(|_| vocabulary[below(&mut draws, vocabulary.len() as u64) as usize].as_str());
        add("random", vec![reply.collect(); turns], Finish::Stop);
    }
    let Some(demonstration) = demonstration else { return found };
    let whole: Vec<Vec<String>> = demonstration.iter().map(|reply| pieces(reply, &vocabulary)).collect();
    // 2. The right answer and then more, less of it, and its end alone.
    add("overshoot", demonstration.iter().map(|reply| reply.repeat(2)).collect(), Finish::Stop);
    for finish in [Finish::Stop, Finish::Length] {
        let cut = whole.iter().map(|pieces| pieces[..pieces.len() / 2].concat());
        add("truncated", cut.collect(), finish);
        let nearly = whole.iter().map(|pieces| pieces[..pieces.len().saturating_sub(1)].concat());
        add("truncated", nearly.collect(), finish);
    }
    add("overshoot", vec![demonstration[0].clone(); turns], Finish::Stop);
    // 3. Loops of two tokens of answers, behind every beginning of the demonstration that keeps its form.
    let mut answer: Vec<String> = Vec::new();
    for seed in seed..seed + 4 {
        for reply in [Some(instance), other].into_iter().flatten().filter_map(|one| task.demonstrate(one, seed).ok()) {
            for piece in reply.iter().flat_map(|reply| pieces(reply, &vocabulary).into_iter().rev()) {
                if answer.len() < LOOP_TOKENS && !answer.contains(&piece) {
                    answer.push(piece);
                }
            }
        }
    }
    let last = &whole[whole.len() - 1];
    let before = &demonstration[..demonstration.len() - 1];
    let mut cuts: Vec<usize> = (0..=last.len().min(4)).map(|back| last.len() - back).collect();
    cuts.extend([last.len() / 2, 1.min(last.len()), 0]);
    cuts.extend(last.len().checked_sub(8));
    cuts.sort_unstable();
    cuts.dedup();
    for (place, first) in answer.iter().enumerate() {
        for second in &answer[..=place] {
            for cut in &cuts {
                let looped = last[..*cut].concat() + &[first.as_str(), second.as_str()].concat().repeat(LENGTH / 2);
                add("loop", [before, &[looped]].concat(), Finish::Stop);
            }
        }
    }
    // 4. The right answer to something else.
    let elsewhere = other.and_then(|other| task.demonstrate(other, seed).ok());
    if let Some(elsewhere) = elsewhere.filter(|replies| !replies.is_empty()) {
        add("other instance", elsewhere, Finish::Stop);
    }
    found
}

/// A text as tokens, the longest that fits first; a character that no token begins with stands by itself.
pub fn pieces(text: &str, vocabulary: &[String]) -> Vec<String> {
    let (mut found, mut rest) = (Vec::new(), text);
    while let Some(first) = rest.chars().next() {
        let fits = vocabulary.iter().filter(|token| rest.starts_with(token.as_str())).map(String::len).max();
        let (piece, behind) = rest.split_at(fits.unwrap_or(first.len_utf8()));
        found.push(piece.to_owned());
        rest = behind;
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tasks::{FormatSpec, Start, TaskSpec, open, replay};
    use serde_json::json;

    #[test]
    fn walking_on_the_spot_is_among_the_answers_and_none_of_noise_solves() {
        let spec: TaskSpec = serde_json::from_value(json!({"kind": "maze", "rows": 5, "columns": 5})).unwrap();
        let task = open(&spec, &FormatSpec::default()).unwrap();
        let instances = task.generate(3, 0..2).unwrap();
        let found = probes(task.as_ref(), &instances[0], Some(&instances[1]), 1);
        for family in ["empty", "spam", "random", "overshoot", "truncated", "loop", "other instance"] {
            assert!(found.iter().any(|probe| probe.family == family), "no {family}");
        }
        let mut most: f64 = 0.0;
        for probe in &found {
            let start = Start { instance: &instances[0], seed: 0 };
            let (_, verdict) = replay(task.as_ref(), start, &probe.replies, probe.finish).unwrap();
            if ["empty", "spam", "random"].contains(&probe.family) {
                assert!(verdict["solved"] < 1.0, "{probe:?}");
            }
            if verdict["solved"] < 1.0 {
                most = most.max(verdict["valid_moves"]);
            }
        }
        assert!(most >= 20.0, "the longest walk that leads nowhere has {most} moves");
        assert_eq!(found, probes(task.as_ref(), &instances[0], Some(&instances[1]), 1));
    }

    #[test]
    fn texts_fall_into_their_longest_tokens() {
        let vocabulary = ["a", "ab", "c"].map(str::to_owned);
        assert_eq!(pieces("abcax", &vocabulary), ["ab", "c", "a", "x"]);
    }
}
