//! A training that goes on from another's end.

use super::*;

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
