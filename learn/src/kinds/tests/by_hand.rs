//! An instance by hand is written and judged as those of the tokens are.

use std::collections::BTreeMap;

use pipe::stages::samples::Samples;
use serde_json::json;
use tch::Device;

use super::super::testing::{FLOW, Flow, Job, LINES};
use crate::by_hand::{Asked, run};

/// `draws` says whether the environment draws at random, which it does otherwise for another place in the tokens.
fn answers_are_those_of_an_evaluation(flow: &Flow, max_new_tokens: u64, draws: bool) {
    let params =
        json!({"model": "policy", "prompts": "tokens", "max_new_tokens": max_new_tokens, "generation_chunk": 4});
    let job = Job::new(flow, "evaluate", params);
    job.run(&[]).unwrap();
    let samples = Samples::open(&job.out().join("evaluation"), &BTreeMap::new()).unwrap();
    let rows = &samples.rows[..4];
    let asked = Asked {
        model: flow.path("policy").to_owned(),
        tokens: flow.path("tokens").to_owned(),
        instances: rows.iter().map(|row| row.data.clone()).collect(),
        samples: 1,
        temperature: 0.0,
        max_new_tokens,
        seed: 0,
    };
    let played = run(&asked, Device::Cpu).unwrap();
    assert_eq!(played.len(), rows.len());
    for (one, row) in played.iter().zip(rows) {
        assert_eq!(one.prompt, row.prompt);
        assert!(row.completion.starts_with(&one.turns[0].text), "{} and {}", row.completion, one.turns[0].text);
        if !draws {
            let said: String = one.turns.iter().map(|turn| turn.text.as_str()).collect();
            assert_eq!(said, row.completion);
            // An evaluation stores what the task diagnoses beside the verdict.
            let mut verdict = row.measurements.clone();
            verdict.retain(|name, _| one.measurements.contains_key(name));
            assert_eq!((one.finish, &one.measurements), (row.finish, &verdict));
        }
    }
    let goes_on = played.iter().any(|one| one.turns.len() > 1 && !one.turns[1].observation.is_empty());
    assert_eq!(goes_on, draws, "an episode of several turns goes on behind its first");
    let drawn = run(&Asked { samples: 3, temperature: 1.0, ..asked }, Device::Cpu).unwrap();
    assert_eq!(drawn.iter().map(|one| one.instance).collect::<Vec<_>>(), [0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3]);
}

#[test]
fn a_maze_by_hand_is_answered_as_an_evaluation_answers_it() {
    answers_are_those_of_an_evaluation(&FLOW, 20, false);
}

#[test]
fn an_episode_of_several_turns_by_hand_begins_as_an_evaluation_does_and_goes_on() {
    answers_are_those_of_an_evaluation(&LINES, 20, true);
}

#[test]
fn what_is_no_instance_is_refused() {
    let asked = Asked {
        model: FLOW.path("policy").to_owned(),
        tokens: FLOW.path("tokens").to_owned(),
        instances: vec![json!({"rows": 2})],
        samples: 1,
        temperature: 0.0,
        max_new_tokens: 8,
        seed: 0,
    };
    assert!(format!("{:#}", run(&asked, Device::Cpu).unwrap_err()).contains("no maze"));
}
