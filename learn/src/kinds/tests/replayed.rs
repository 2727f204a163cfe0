//! Training on stored rollouts, and what the first round of a run forecasts.

use super::*;
use crate::kinds::testing::LINES;
use crate::prompts::Prompts;
use crate::replay::StoredRollouts;
use std::sync::Arc;

/// The weights that a run ended in.
fn weights(job: &Job<'_>) -> Vec<u8> {
    std::fs::read(job.out().join("last/model.safetensors")).unwrap()
}

#[test]
fn the_same_training_on_stored_rollouts_ends_in_the_same_bytes() {
    for (flow, params) in [(&*FLOW, grpo()), (&*LINES, episodes::grpo())] {
        let sampled = Job::new(flow, "grpo", params.clone());
        sampled.run(&[]).unwrap();
        let flow = flow.with("stored", &sampled.out().join("rollouts"), ArtifactType::Rollouts);
        let mut params = params;
        params["replay"] = json!("stored");
        let replayed = Job::new(&flow, "grpo", params.clone());
        let digest = replayed.run(&[]).unwrap();
        assert_eq!(weights(&replayed), weights(&sampled));
        // And it is a training like any other: stopped anywhere, it ends the same.
        let stopped = Job::new(&flow, "grpo", params.clone());
        assert_eq!(stopped.run(&[End::Kill(6), End::Interrupt(5)]).unwrap(), digest);
        // More steps than are stored are refused, and so are the completions of other prompts.
        params["steps"] = json!(99);
        let error = format!("{:#}", Job::new(&flow, "grpo", params).run(&[]).unwrap_err());
        assert!(error.contains("`steps` is 99"), "{error}");
    }
}

#[test]
fn other_rewards_over_the_same_completions_train_another_policy() {
    let sampled = Job::new(&FLOW, "grpo", grpo());
    sampled.run(&[]).unwrap();
    let flow = FLOW.with("stored", &sampled.out().join("rollouts"), ArtifactType::Rollouts);
    let mut params = grpo();
    params["replay"] = json!("stored");
    params["rewards"] = json!({"short": {"kind": "expression", "expression": "0 - steps"}});
    let other = Job::new(&flow, "grpo", params);
    other.run(&[]).unwrap();
    assert_ne!(weights(&other), weights(&sampled));
    let path = |job: &Job<'_>| job.out().join("rollouts/rollouts.parquet");
    let read = |job: &Job<'_>, name: &str| table::read(&path(job), &[name]).unwrap().remove(0);
    // The completions are those that were stored, step by step; the rewards are not.
    assert_eq!(read(&other, "ids"), read(&sampled, "ids"));
    assert_eq!(read(&other, "logprobs"), read(&sampled, "logprobs"));
    let (Column::Number(total), Column::Number(steps)) = (read(&other, "total"), read(&other, "steps")) else {
        panic!("no numbers")
    };
    assert!(total.iter().zip(&steps).all(|(total, steps)| total.unwrap() == -steps.unwrap()));
    // One update a step, whatever was stored; once the two policies have parted, the ratio says so.
    let mut parted = 0;
    for line in other.metrics() {
        assert!(line["updates/made"].as_f64().unwrap() <= 1.0);
        let ratio = line["policy/ratio_max"].as_f64().unwrap_or(1.0);
        parted += usize::from(line["step"].as_u64().unwrap() > 1 && (ratio - 1.0).abs() > 1e-4);
    }
    assert!(parted > 0, "no step was off policy");
}

#[test]
fn more_informative_groups_than_a_step_has_are_left_out_in_the_order_of_prompts() {
    let sampled = Job::new(&FLOW, "grpo", grpo());
    sampled.run(&[]).unwrap();
    let flow = FLOW.with("stored", &sampled.out().join("rollouts"), ArtifactType::Rollouts);
    let mut params = grpo();
    params["replay"] = json!("stored");
    params["prompts_per_step"] = json!(2);
    let fewer = Job::new(&flow, "grpo", params.clone());
    fewer.run(&[]).unwrap();
    let kept = table::read(&fewer.out().join("rollouts/rollouts.parquet"), &["step", "kept"]).unwrap();
    let [Column::Integer(step), Column::Flag(kept)] = &kept[..] else { panic!("no columns") };
    for at in 0..4 {
        let groups = step.iter().zip(kept).filter(|(step, kept)| **step == Some(at) && **kept).count() / 4;
        assert!(groups <= 2, "step {at} keeps {groups} groups");
    }
    assert!(fewer.metrics().iter().all(|line| line["updates/made"].as_f64().unwrap() <= 1.0));
    // Other samples a group and another split are refused.
    let refuse = |field: &str, value: Value, says: &str| {
        let mut params = params.clone();
        params[field] = value;
        let error = format!("{:#}", Job::new(&flow, "grpo", params).run(&[]).unwrap_err());
        assert!(error.contains(says), "{error}");
    };
    refuse("group_size", json!(3), "`group_size` is 3");
    refuse("split", json!("train"), "`split` is `train`");
}

#[test]
fn a_reward_of_weight_zero_is_looked_at_and_makes_no_group_informative() {
    let mut params = grpo();
    params["rewards"] = json!({"correct": {"kind": "correct"}});
    let alone = Job::new(&FLOW, "grpo", params.clone());
    alone.run(&[]).unwrap();
    params["rewards"]["length"] = json!({"kind": "expression", "expression": "steps + valid_moves", "weight": 0.0});
    let watched = Job::new(&FLOW, "grpo", params);
    watched.run(&[]).unwrap();
    assert_eq!(weights(&watched), weights(&alone));
}

#[test]
fn rollouts_of_other_prompts_are_refused_by_name() {
    let sampled = Job::new(&LINES, "grpo", episodes::grpo());
    sampled.run(&[]).unwrap();
    let prompts =
        Prompts::open(FLOW.path("policy"), TokensFolder::open(FLOW.path("tokens")).unwrap(), &Arc::default()).unwrap();
    let error = StoredRollouts::open(&sampled.out().join("rollouts/rollouts.parquet"), &prompts).unwrap_err();
    assert!(format!("{error:#}").contains("rollouts.parquet"), "{error:#}");
}

#[test]
fn a_run_begins_with_a_forecast_of_informative_groups_or_ends_where_nothing_can_be_learnt() {
    let notes = |job: &Job<'_>| -> Vec<String> {
        let events = job.events.lock().unwrap();
        events
            .iter()
            .filter_map(|event| match event {
                StageEvent::Note { text } => Some(text.clone()),
                _ => None,
            })
            .collect()
    };
    let job = Job::new(&FLOW, "grpo", grpo());
    job.run(&[]).unwrap();
    assert!(
        notes(&job).iter().any(|note| note.contains("of the first 5 groups carry a gradient")),
        "{:?}",
        notes(&job)
    );
    let mut params = grpo();
    params["max_new_tokens"] = json!(1);
    params["rewards"] = json!({"correct": {"kind": "correct"}});
    let error = format!("{:#}", Job::new(&FLOW, "grpo", params).run(&[]).unwrap_err());
    assert!(error.contains("raise `max_new_tokens`"), "{error}");
}
