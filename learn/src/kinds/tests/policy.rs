//! The axes of the loss and the filters of the sampler, from a stage's parameters to its bytes and metrics.

use super::*;

fn with(extra: &Value) -> Value {
    let mut params = grpo();
    params["steps"] = json!(2);
    params["validate"] = Value::Null;
    params.as_object_mut().unwrap().extend(extra.as_object().unwrap().clone());
    params
}

fn metrics(params: &Value) -> Vec<Value> {
    let job = Job::new(&FLOW, "grpo", params.clone());
    job.run(&[]).unwrap();
    job.metrics()
}

fn number(line: &Value, name: &str) -> f64 {
    line[name].as_f64().unwrap_or_else(|| panic!("{name} is missing in {line}"))
}

#[test]
fn every_preset_learns_from_its_first_step_on() {
    for preset in ["grpo", "dr_grpo", "dapo", "gspo", "cispo", "rloo", "reinforce_pp", "maxrl"] {
        // MaxRL wants rewards that are nowhere negative.
        let params =
            with(&json!({"preset": preset, "rewards": {"near": {"kind": "expression", "expression": "progress"}}}));
        let lines = metrics(&params);
        let first = &lines[0];
        assert!((number(first, "policy/ratio_mean") - 1.0).abs() < 1e-12, "{preset}: one update is on policy");
        assert!(number(first, "policy/clip_low") + number(first, "policy/clip_high") == 0.0, "{preset}");
        assert!(number(first, "sampling/logprob_difference_max") < 1e-4, "{preset}");
        assert!(number(first, "gradient_norm") > 1e-4, "{preset}: {first}");
        let has_reference = ["grpo", "rloo", "reinforce_pp"].contains(&preset);
        assert_eq!(first.get("policy/reference_k3").is_some(), has_reference, "{preset}");
        if has_reference {
            assert!(number(first, "policy/reference_k3").abs() < 1e-9, "{preset}: at first it is its own reference");
            assert!(number(&lines[1], "policy/reference_k3") > 1e-9, "{preset}: then it moves away");
        }
    }
}

#[test]
fn arms_that_are_told_to_be_the_same_end_in_the_same_weights_but_for_rounding() {
    let weights = |extra: &Value| {
        let job = Job::new(&FLOW, "grpo", with(extra));
        job.run(&[]).unwrap();
        let folder = job.out().join("last");
        crate::model::Transformer::load(&folder, tch::Device::Cpu).unwrap().weights().flat().copy()
    };
    let apart = |one: &Value, other: &Value| crate::sandbox::distance(&weights(one), &weights(other));
    let grpo = json!({"preset": "grpo", "kl": {"beta": 0.0}, "steps": 1});
    let gspo = json!({"preset": "gspo", "steps": 1});
    assert!(apart(&grpo, &gspo) < 1e-6);
    assert!(apart(&grpo, &json!({"preset": "dr_grpo", "steps": 1})) > 1e-6);
    let twice = |mut params: Value| {
        params["updates_per_step"] = json!(5);
        params["learning_rate"] = json!(1e-2);
        params
    };
    assert!(apart(&twice(grpo), &twice(gspo)) > 1e-6, "with several updates the clips differ");
}

#[test]
fn several_updates_of_one_rollout_leave_the_policy_that_sampled() {
    let lines = metrics(&with(&json!({
        "updates_per_step": 5, "learning_rate": 2e-2, "steps": 1, "clip": {"low": 0.05, "high": 0.05}
    })));
    assert!(number(&lines[0], "updates/made") > 2.0);
    assert!((number(&lines[0], "policy/ratio_mean") - 1.0).abs() > 1e-6 && number(&lines[0], "policy/old_kl") > 1e-6);
    assert!(number(&lines[0], "policy/clip_low") + number(&lines[0], "policy/clip_high") > 0.0);
    assert!(number(&lines[0], "policy/effective_share") < 1.0);
    assert!(number(&lines[0], "sampling/logprob_difference_max") < 1e-4, "of the first update alone");
}

#[test]
fn filters_keep_sampler_and_trainer_together() {
    let low = |extra: &Value| {
        let mut params = with(extra);
        params["temperature"] = json!(0.7);
        metrics(&params)
    };
    for filter in [
        json!({"top_k": 3}),
        json!({"top_p": 0.8}),
        json!({"min_p": 0.2}),
        json!({"top_k": 6, "top_p": 0.9, "min_p": 0.05}),
    ] {
        let lines = low(&filter);
        assert!(number(&lines[0], "sampling/logprob_difference_max") < 1e-4, "{filter}");
    }
    // What may not be drawn has no part in the entropy.
    assert!(
        number(&low(&json!({"top_k": 1, "dynamic_sampling": {"enabled": false}}))[0], "policy/entropy").abs() < 1e-6
    );
}

#[test]
fn kl_in_the_reward_gives_the_same_bytes_wherever_it_is_stopped() {
    let params = with(&json!({"preset": "reinforce_pp", "kl": {"beta": 0.1}, "learning_rate": 1e-2, "steps": 3}));
    stops_change_nothing(&FLOW, "grpo", &params, 3);
}

#[test]
fn filters_and_a_reference_give_the_same_bytes_wherever_they_are_stopped() {
    let params = with(&json!({
        "kl": {"beta": 0.1, "estimator": "k3_ratio_corrected"}, "entropy": {"coefficient": 0.01}, "top_p": 0.9,
        "updates_per_step": 5, "dynamic_sampling": {"max_rounds": 3}
    }));
    stops_change_nothing(&FLOW, "grpo", &params, 3);
}

#[test]
fn dropped_groups_still_feel_the_pull_of_the_reference() {
    let flat = json!({"flat": {"kind": "expression", "expression": "0 * solved + 1"}});
    let without = metrics(&with(&json!({"rewards": flat})));
    assert_eq!(without[1]["updates/steps_without"], json!(2.0));
    let pulled = metrics(&with(&json!({"rewards": flat, "kl": {"beta": 1.0}, "entropy": {"coefficient": 0.1}})));
    assert_eq!(pulled[1]["updates/steps_without"], json!(0.0));
    assert_eq!(pulled[0]["groups/discarded"], json!(10.0));
    assert!(number(&pulled[0], "loss/entropy") < 0.0 && number(&pulled[0], "loss/policy") == 0.0);
    assert!(number(&pulled[1], "loss/kl") > 0.0 && number(&pulled[0], "gradient_norm") > 0.0);
}

#[test]
fn truncated_episodes_are_masked_out_of_the_loss_and_stay_in_the_baseline() {
    let run = |truncation: &str| {
        let job = Job::new(
            &FLOW,
            "grpo",
            with(&json!({
                "truncation": truncation, "max_new_tokens": 5, "steps": 1,
                "rewards": {"near": {"kind": "expression", "expression": "progress + 0.01 * steps"}}
            })),
        );
        job.run(&[]).unwrap();
        (job.metrics().remove(0), numbers(&job, &["truncated", "advantages", "kept"]))
    };
    let (kept, masked) = (run("keep"), run("mask"));
    assert_eq!(kept.1, masked.1, "advantages are those of the whole group");
    let cut: f64 = kept.1[0].iter().sum();
    assert!(cut > 0.0 && cut < kept.1[0].len() as f64, "both ends occur: {cut}");
    assert_ne!(kept.0["loss"], masked.0["loss"]);
}

#[test]
fn a_budget_of_tokens_ends_the_rounds() {
    let rounds = |max_tokens: u64| {
        let lines = metrics(&with(&json!({
            "rewards": {"correct": {"kind": "correct"}}, "steps": 1,
            "dynamic_sampling": {"max_rounds": 6, "max_tokens": max_tokens}
        })));
        number(&lines[0], "groups/rounds")
    };
    let free = rounds(0);
    assert!(free > 1.0, "no second round was needed, so nothing was tested");
    assert!((rounds(1) - 1.0).abs() < 1e-12 && (rounds(1_000_000) - free).abs() < 1e-12);
}

#[test]
fn stop_texts_end_a_completion_and_are_part_of_its_text() {
    let texts = |stop: &Value| {
        let mut params = evaluate();
        params["stop"] = stop.clone();
        let job = Job::new(&FLOW, "evaluate", params);
        job.run(&[]).unwrap();
        let columns = table::read(&job.out().join("evaluation/examples.parquet"), &["completion", "finish"]).unwrap();
        let [completion, finish] = columns.try_into().unwrap();
        let text = |column| match column {
            Column::Text(values) => values.into_iter().map(Option::unwrap).collect::<Vec<String>>(),
            other => panic!("{other:?} is no text"),
        };
        (text(completion), text(finish))
    };
    let (free, _) = texts(&json!([]));
    let codec = crate::codec::Codec::open(FLOW.path("policy")).unwrap();
    // The second token of some completion, as text.
    let second = free.iter().map(|text| codec.encode(text).unwrap()).find(|ids| ids.len() > 2).unwrap()[1];
    let stop = codec.decode(&[second]).unwrap();
    let (cut, finish) = texts(&json!([stop]));
    let mut stopped = 0;
    for ((free, cut), finish) in free.iter().zip(&cut).zip(&finish) {
        let ids = codec.encode(free).unwrap();
        match ids.iter().position(|id| *id == second) {
            Some(place) => {
                assert_eq!((codec.encode(cut).unwrap(), finish.as_str()), (ids[..=place].to_vec(), "stop"));
                stopped += 1;
            }
            None => assert_eq!(free, cut),
        }
    }
    assert!(stopped > 0);
}

#[test]
fn a_batch_that_cannot_fit_is_an_error_before_the_first_step_that_says_what_to_lower() {
    let error = |extra: Value| {
        let job = Job::new(&FLOW, "grpo", with(&extra));
        let error = format!("{:#}", job.run(&[]).unwrap_err());
        let told = job.events.lock().unwrap();
        assert!(!told.iter().any(|event| matches!(event, StageEvent::Metrics { .. })), "a step was begun");
        error
    };
    let huge = json!({"prompts_per_step": 1_000_000, "generation_chunk": 1_000_000, "group_size": 1_000});
    let generation = error(huge);
    assert!(generation.contains("training needs about") && generation.contains("are free"), "{generation}");
    assert!(generation.contains("to generate 1000000000 completions of 10 tokens"), "{generation}");
    assert!(generation.ends_with("lower `generation_chunk` or `max_new_tokens`"), "{generation}");
    let whole = json!({"prompts_per_step": 1_000_000, "group_size": 1_000, "micro_batch_size": 0});
    assert!(error(whole).ends_with("lower `micro_batch_size`"));
}
