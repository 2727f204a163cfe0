//! A training that goes on from another's end.

use super::*;
use crate::kinds::testing::LINES;

/// Eight steps at a constant rate, validated after every other one.
fn straight() -> Value {
    json!({
        "model": "base", "data": "tokens", "steps": 8, "batch_size": 7, "micro_batch_size": 3, "learning_rate": 5e-3,
        "schedule": {"decay": "constant", "warmup_ratio": 0.0}, "seed": 3,
        "validate": {"every": 2, "samples": 6, "select": "progress"}
    })
}

/// The same with some fields changed; `null` leaves one out.
fn changed(change: &Value) -> Value {
    let mut params = straight();
    let fields = params.as_object_mut().unwrap();
    fields.extend(change.as_object().unwrap().clone());
    fields.retain(|_, value| !value.is_null());
    params
}

/// A flow that also has the state behind the first four steps, as `half`; with the job that made it.
fn half() -> (Job<'static>, Flow) {
    let job = Job::new(&FLOW, "sft", changed(&json!({"steps": 4})));
    job.run(&[]).unwrap();
    let flow = FLOW.with("half", &job.out().join("state"), ArtifactType::TrainingState);
    (job, flow)
}

fn going_on(change: &Value) -> Value {
    let mut params = changed(&json!({"model": null, "continue": "half"}));
    params.as_object_mut().unwrap().extend(change.as_object().unwrap().clone());
    params
}

#[test]
fn four_steps_and_four_more_are_eight_byte_for_byte_wherever_it_is_stopped() {
    let (_half, flow) = half();
    let whole = Job::new(&FLOW, "sft", straight());
    let wanted = whole.run(&[]).unwrap();
    let more = Job::new(&flow, "sft", going_on(&json!({})));
    assert_eq!(more.run(&[]).unwrap(), wanted, "the same weights, the same best, the same state");
    assert_eq!(more.metrics(), whole.metrics()[4..], "the rest of the same curves");
    let events = more.count();
    for end in [End::Kill(3), End::Interrupt(events / 2), End::Interrupt(events - 2), End::Kill(events - 1)] {
        let mut job = Job::new(&flow, "sft", going_on(&json!({})));
        job.save_every = Duration::ZERO;
        assert_eq!(job.run(&[end]).unwrap(), wanted, "{end:?}");
    }
}

#[test]
fn a_constant_rate_that_goes_on_into_a_fall_is_a_stable_phase_and_its_decay_byte_for_byte() {
    let (_half, flow) = half();
    let schedule = json!({"schedule": {"decay": "linear", "warmup_ratio": 0.0, "decay_ratio": 0.5}});
    let whole = Job::new(&FLOW, "sft", changed(&schedule));
    let wanted = whole.run(&[]).unwrap();
    assert_eq!(Job::new(&flow, "sft", going_on(&schedule)).run(&[]).unwrap(), wanted);
    let rates: Vec<f64> = whole.metrics().iter().map(|line| line["learning_rate"].as_f64().unwrap()).collect();
    assert_eq!(rates[..4], [5e-3; 4]);
    assert!(rates[3..].windows(2).all(|pair| pair[1] < pair[0]), "{rates:?}");
}

#[test]
fn adapters_go_on_over_the_same_frozen_weights() {
    let lora = json!({"lora": {"rank": 2}, "validate": null});
    let with = |change: &Value| {
        let mut params = changed(&lora);
        params.as_object_mut().unwrap().extend(change.as_object().unwrap().clone());
        params.as_object_mut().unwrap().retain(|_, value| !value.is_null());
        params
    };
    let half = Job::new(&FLOW, "sft", with(&json!({"steps": 4})));
    half.run(&[]).unwrap();
    let flow = FLOW.with("half", &half.out().join("state"), ArtifactType::TrainingState);
    let wanted = Job::new(&FLOW, "sft", with(&json!({}))).run(&[]).unwrap();
    let more = with(&json!({"model": null, "continue": "half"}));
    assert_eq!(Job::new(&flow, "sft", more.clone()).run(&[End::Kill(3)]).unwrap(), wanted);
    let mut other = more;
    other["lora"] = json!({"rank": 3});
    let error = format!("{:#}", Job::new(&flow, "sft", other).run(&[]).unwrap_err());
    assert!(error.contains("`lora` is"), "{error}");
}

#[test]
fn what_decides_rows_must_be_the_same_and_steps_must_grow() {
    let (_half, flow) = half();
    let error = |change: Value| {
        let job = Job::new(&flow, "sft", going_on(&change));
        format!("{:#}", job.run(&[]).unwrap_err())
    };
    let text = error(json!({"batch_size": 6, "seed": 4}));
    assert!(text.contains("`batch_size` is 6 here and was 7, `seed` is 4 here and was 3"), "{text}");
    assert!(error(json!({"split": "rl"})).contains("`split` is \"rl\" here and was \"train\""));
    assert!(error(json!({"steps": 4})).contains("has done 4 steps, and `steps` is 4"));
    assert!(error(json!({"model": "base"})).contains("either at a `model` or where another ended"));
    let other = flow.with("tokens", FLOW.path("tokens"), ArtifactType::Tokens);
    let job = Job::new(&other, "sft", going_on(&json!({"learning_rate": 1e-3, "micro_batch_size": 0})));
    job.run(&[]).unwrap();
}

#[test]
fn the_best_weights_so_far_stay_unless_another_validation_chooses() {
    let (half, flow) = half();
    let best = |job: &Job<'_>| digest(&job.out().join("best"));
    // At a rate that moves nothing, no later validation beats the best before it.
    let still =
        json!({"learning_rate": 1e-30, "steps": 6, "validate": {"every": 1, "samples": 6, "select": "progress"}});
    let job = Job::new(&flow, "sft", going_on(&still));
    job.run(&[]).unwrap();
    assert_eq!(best(&job), best(&half));
    let mut other = still;
    other["validate"]["select"] = "solved".into();
    let job = Job::new(&flow, "sft", going_on(&other));
    job.run(&[]).unwrap();
    let told = job.events.lock().unwrap();
    let forgotten = |event: &StageEvent| matches!(event, StageEvent::Note { text } if text.contains("are forgotten"));
    assert!(told.iter().any(forgotten));
}

/// The same training with other fields; `null` leaves one out.
fn with(mut params: Value, change: &Value) -> Value {
    let fields = params.as_object_mut().unwrap();
    fields.extend(change.as_object().unwrap().clone());
    fields.retain(|_, value| !value.is_null());
    params
}

/// A flow that also has the state of the first two steps of a `grpo` stage, as `half`; with the job that made it.
fn two_steps<'a>(flow: &'a Flow, params: &Value) -> (Job<'a>, Flow) {
    let job = Job::new(flow, "grpo", with(params.clone(), &json!({"steps": 2})));
    job.run(&[]).unwrap();
    let half = flow.with("half", &job.out().join("state"), ArtifactType::TrainingState);
    (job, half)
}

/// Two steps and two more are four, in weights, state, curves and completions, wherever the second half is stopped.
fn two_and_two_are_four(flow: &Flow, params: &Value) {
    let (first, half) = two_steps(flow, params);
    let whole = Job::new(flow, "grpo", with(params.clone(), &json!({"steps": 4})));
    whole.run(&[]).unwrap();
    let more = with(params.clone(), &json!({"steps": 4, "model": null, "continue": "half"}));
    let second = Job::new(&half, "grpo", more.clone());
    let wanted = second.run(&[]).unwrap();
    for output in ["last", "best", "state"] {
        assert_eq!(digest(&second.out().join(output)), digest(&whole.out().join(output)), "{output}");
    }
    assert_eq!(second.metrics(), whole.metrics()[2..], "the rest of the same curves");
    let names = ["step", "round", "row", "sample", "ids", "logprobs", "completion", "total", "advantages", "kept"];
    let table = |job: &Job<'_>| table::read(&job.out().join("rollouts/rollouts.parquet"), &names).unwrap();
    let lines = |columns: &[Column]| -> Vec<String> {
        let shown: Vec<Vec<String>> = columns.iter().map(cells).collect();
        (0..shown[0].len())
            .map(|row| shown.iter().map(|column| column[row].as_str()).collect::<Vec<_>>().join(" "))
            .collect()
    };
    let (early, late) = (lines(&table(&first)), lines(&table(&second)));
    assert!(!early.is_empty() && !late.is_empty());
    assert_eq!([early, late].concat(), lines(&table(&whole)), "each half has its own completions");
    let events = second.count();
    for end in [End::Kill(5), End::Interrupt(events / 2), End::Kill(events - 1)] {
        let mut job = Job::new(&half, "grpo", more.clone());
        job.save_every = if matches!(end, End::Kill(5)) { Duration::from_secs(3600) } else { Duration::ZERO };
        assert_eq!(job.run(&[end]).unwrap(), wanted, "{end:?}");
    }
}

/// The values of a column, as text.
fn cells(column: &Column) -> Vec<String> {
    match column {
        Column::Integer(values) => values.iter().map(|value| format!("{value:?}")).collect(),
        Column::Number(values) => values.iter().map(|value| format!("{value:?}")).collect(),
        Column::Text(values) => values.iter().map(|value| format!("{value:?}")).collect(),
        Column::Flag(values) => values.iter().map(|value| format!("{value:?}")).collect(),
        Column::Integers(values) => values.iter().map(|value| format!("{value:?}")).collect(),
        Column::Numbers(values) => values.iter().map(|value| format!("{value:?}")).collect(),
    }
}

#[test]
fn two_steps_of_rollouts_and_two_more_are_four_byte_for_byte() {
    two_and_two_are_four(&FLOW, &with(grpo(), &json!({"updates_per_step": 5})));
}

#[test]
fn two_steps_of_episodes_and_two_more_are_four_byte_for_byte() {
    two_and_two_are_four(&LINES, &episodes::grpo());
}

#[test]
fn a_divergence_is_measured_to_where_the_first_training_began() {
    let pull = json!({"kl": {"beta": 0.2}, "learning_rate": 1e-2, "validate": null});
    two_and_two_are_four(&FLOW, &with(grpo(), &pull));
    // Below adapters the frozen weights are what it began with.
    two_and_two_are_four(&FLOW, &with(with(grpo(), &pull), &json!({"lora": {"rank": 2}})));
    let free = json!({"kl": {"beta": 0.0}, "validate": null});
    let (_first, half) = two_steps(&FLOW, &with(grpo(), &free));
    let more = with(with(grpo(), &pull), &json!({"model": null, "continue": "half"}));
    let error = format!("{:#}", Job::new(&half, "grpo", more).run(&[]).unwrap_err());
    assert!(error.contains("kept none: set `kl.beta` to 0"), "{error}");
}

#[test]
fn what_decides_prompts_must_be_the_same_and_the_alarm_forgets_validations_of_other_rewards() {
    let params = with(grpo(), &json!({"alarm": {"window": 4}, "validate": {"every": 1, "samples": 6}}));
    let (_first, half) = two_steps(&FLOW, &params);
    let job = |change: Value| {
        let going_on = with(params.clone(), &json!({"model": null, "continue": "half"}));
        Job::new(&half, "grpo", with(going_on, &change))
    };
    let error = |change: Value| format!("{:#}", job(change).run(&[]).unwrap_err());
    let text = error(json!({"group_size": 3, "updates_per_step": 5}));
    assert!(text.contains("`group_size` is 3 here and was 4, `updates_per_step` is 5 here and was 1"), "{text}");
    assert!(error(json!({"steps": 2})).contains("has done 2 steps, and `steps` is 2"));
    assert!(error(json!({"model": "policy"})).contains("either at a `model` or where another ended"));
    let supervised = Job::new(&half, "sft", going_on(&json!({})));
    let text = format!("{:#}", supervised.run(&[]).unwrap_err());
    assert!(text.contains("`kind` is \"sft\" here and was \"grpo\""), "{text}");
    // The two validations before count on only while they say the same.
    let kept = |change: Value| {
        let job = job(change);
        job.run(&[]).unwrap();
        let state = crate::training_state::load(&job.out().join("state")).unwrap().unwrap();
        state.json["own"]["validations"].as_array().unwrap().len()
    };
    assert_eq!(kept(json!({"steps": 3})), 3);
    assert_eq!(kept(json!({"steps": 3, "rewards": {"correct": {"kind": "correct"}}})), 1);
    assert_eq!(kept(json!({"steps": 3, "max_new_tokens": 11})), 1);
}

#[test]
fn the_rollouts_of_a_later_half_are_replayed_from_where_it_began() {
    let params = with(grpo(), &json!({"validate": null}));
    let (_first, half) = two_steps(&FLOW, &params);
    let more = with(params.clone(), &json!({"model": null, "continue": "half"}));
    let second = Job::new(&half, "grpo", more.clone());
    second.run(&[]).unwrap();
    let stored = half.with("stored", &second.out().join("rollouts"), ArtifactType::Rollouts);
    let again = Job::new(&stored, "grpo", with(more, &json!({"replay": "stored"})));
    again.run(&[]).unwrap();
    assert_eq!(digest(&again.out().join("last")), digest(&second.out().join("last")));
    let from_the_model = Job::new(&stored, "grpo", with(params, &json!({"replay": "stored"})));
    let error = format!("{:#}", from_the_model.run(&[]).unwrap_err());
    assert!(error.contains("begin at step 3, but this training at step 1"), "{error}");
}
