//! An instance by hand is written and judged as those of the tokens are.

use std::collections::BTreeMap;

use pipe::stages::samples::Samples;
use serde_json::json;
use tch::Device;

use super::super::testing::{FLOW, Flow, Job, LINES};
use crate::by_hand::{Asked, run};

fn answers_are_those_of_an_evaluation(flow: &Flow, max_new_tokens: u64) {
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
        let said: String = one.turns.iter().flat_map(|turn| [turn.observation.as_str(), turn.text.as_str()]).collect();
        assert_eq!((&one.prompt, said.as_str()), (&row.prompt, row.completion.as_str()));
        assert_eq!((one.finish, &one.measurements), (row.finish, &row.measurements));
    }
    let drawn = run(&Asked { samples: 3, temperature: 1.0, ..asked }, Device::Cpu).unwrap();
    assert_eq!(drawn.iter().map(|one| one.instance).collect::<Vec<_>>(), [0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3]);
}

#[test]
fn a_maze_by_hand_is_answered_as_an_evaluation_answers_it() {
    answers_are_those_of_an_evaluation(&FLOW, 20);
}

#[test]
fn an_episode_of_several_turns_by_hand_is_that_of_an_evaluation() {
    answers_are_those_of_an_evaluation(&LINES, 20);
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
