//! Stages in bf16 and with activation checkpointing: the same laws, bounds of their own, the same state.

use super::*;
use crate::policy::FORWARDS;

fn with(mut params: Value, extra: &Value) -> Value {
    params.as_object_mut().unwrap().extend(extra.as_object().unwrap().clone());
    params
}

fn lines(kind: &str, params: &Value) -> Vec<Value> {
    lines_over(&FLOW, kind, params)
}

fn lines_over(flow: &Flow, kind: &str, params: &Value) -> Vec<Value> {
    let job = Job::new(flow, kind, params.clone());
    job.run(&[]).unwrap();
    job.metrics()
}

/// The shared flow with a policy of more layers and width, given to `look`: a processor that multiplies bf16 in fp32 rounds so
/// few of the shared policy's numbers otherwise that less than one token of a hundred differs.
fn with_wide_policy(look: impl FnOnce(&Flow)) {
    let architecture = json!({
        "kind": "qwen2", "hidden_size": 64, "layers": 3, "heads": 4, "intermediate_size": 192,
        "max_position_embeddings": 48
    });
    let base = Job::new(&FLOW, "model", json!({"tokenizer": "tokenizer", "architecture": architecture, "seed": 1}));
    base.run(&[]).unwrap();
    let drawn = FLOW.with("base", &base.out().join("checkpoint"), ArtifactType::Checkpoint);
    let sft = json!({"model": "base", "data": "tokens", "steps": 60, "batch_size": 8, "learning_rate": 3e-3});
    let policy = Job::new(&drawn, "sft", sft);
    policy.run(&[]).unwrap();
    look(&FLOW.with("policy", &policy.out().join("last"), ArtifactType::Checkpoint));
}

fn number(line: &Value, name: &str) -> f64 {
    line[name].as_f64().unwrap_or_else(|| panic!("{name} is missing in {line}"))
}

#[test]
fn trainings_in_bf16_give_the_same_bytes_wherever_they_are_stopped() {
    stops_change_nothing(&FLOW, "sft", &with(sft(), &json!({"precision": "bf16"})), 1);
    let several = json!({"precision": "bf16", "updates_per_step": 5, "activation_checkpointing": true});
    stops_change_nothing(&FLOW, "grpo", &with(grpo(), &several), 1);
    let adapters = json!({"precision": "bf16", "lora": {"rank": 2}, "preset": "reinforce_pp", "kl": {"beta": 0.1}});
    stops_change_nothing(&FLOW, "grpo", &with(grpo(), &adapters), 1);
    stops_change_nothing(&FLOW, "evaluate", &with(evaluate(), &json!({"precision": "bf16"})), 1);
}

#[test]
fn activation_checkpointing_ends_in_the_same_bytes() {
    let digest = |kind: &str, params: Value| Job::new(&FLOW, kind, params).run(&[]).unwrap();
    for extra in [json!({}), json!({"lora": {"rank": 2}}), json!({"precision": "bf16"})] {
        for (kind, params) in [("sft", sft()), ("grpo", grpo())] {
            let kept = with(params, &extra);
            let checkpoints = with(kept.clone(), &json!({"activation_checkpointing": true}));
            assert_eq!(digest(kind, kept), digest(kind, checkpoints), "{kind} with {extra}");
        }
    }
}

/// The losses differ by less than a twentieth from step 20 on, and both come down alike.
#[test]
fn supervised_training_in_bf16_learns_like_fp32() {
    let params = json!({"model": "base", "data": "tokens", "steps": 60, "batch_size": 8, "learning_rate": 1e-2});
    let losses = |extra: &Value| -> Vec<f64> {
        lines("sft", &with(params.clone(), extra)).iter().map(|line| number(line, "loss")).collect()
    };
    let (wide, half) = (losses(&json!({})), losses(&json!({"precision": "bf16"})));
    assert_ne!(wide, half, "bf16 is another computation");
    let mean = |losses: &[f64]| losses.iter().sum::<f64>() / losses.len() as f64;
    assert!(mean(&half[50..]) < 0.7 * half[0], "{half:?}");
    for step in (20..60).step_by(10) {
        let (wide, half) = (mean(&wide[step..step + 10]), mean(&half[step..step + 10]));
        assert!((wide - half).abs() < 0.05 * wide, "steps from {step}: {half} in bf16, {wide} in fp32");
    }
}

#[test]
fn sampler_and_trainer_agree_in_bf16_and_tell_how_well() {
    let several = json!({"precision": "bf16", "updates_per_step": 5, "steps": 2, "preset": "grpo", "temperature": 0.9});
    with_wide_policy(|flow| {
        for line in lines_over(flow, "grpo", &with(grpo(), &several)) {
            let [mean, p99, max] =
                ["mean", "p99", "max"].map(|name| number(&line, &format!("sampling/logprob_difference_{name}")));
            assert!(mean > 0.0 && mean <= p99 && p99 <= max, "{line}");
            assert!(mean <= 5e-3 / 0.9 && p99 <= 5e-2 / 0.9, "mean {mean}, 99th percentile {p99}, max {max}");
        }
    });
    let first = lines("grpo", &with(grpo(), &json!({"precision": "bf16", "steps": 1, "preset": "grpo"}))).remove(0);
    assert!((number(&first, "policy/ratio_mean") - 1.0).abs() < 1e-12, "{first}");
    assert!(number(&first, "policy/reference_k3").abs() < 1e-9, "at first it is its own reference: {first}");
    // The old policy is the trainer's: where no step moves it, the ratios of later updates are exactly 1.
    let still =
        json!({"precision": "bf16", "updates_per_step": 5, "steps": 1, "learning_rate": 1e-30, "preset": "dr_grpo"});
    let line = lines("grpo", &with(grpo(), &still)).remove(0);
    assert_eq!(number(&line, "policy/ratio_max").to_bits(), 1f64.to_bits(), "{line}");
    assert!(number(&line, "sampling/logprob_difference_max") > 1e-4, "the sampler's would show: {line}");
}

/// The first update's own pass tells what its rows' log-probabilities were; only later updates need a pass before it.
#[test]
fn the_first_update_in_bf16_costs_one_pass() {
    for (updates, again) in [(1u64, 0.0), (5, 1.0)] {
        let params = json!({"updates_per_step": updates, "micro_batch_size": 0, "preset": "grpo", "steps": 3});
        let params = with(grpo(), &params);
        let passes = |precision: &str| {
            let before = FORWARDS.get();
            let lines = lines("grpo", &with(params.clone(), &json!({"precision": precision})));
            let made: Vec<f64> = lines.iter().map(|line| number(line, "updates/made")).collect();
            assert!(made.iter().all(|made| *made > 0.0), "{made:?}");
            let more = made.iter().map(|made| again * (made - 1.0)).sum::<f64>();
            ((FORWARDS.get() - before) as f64, made.iter().sum::<f64>(), more)
        };
        let (fp32, updates, _) = passes("fp32");
        assert_eq!(fp32, updates);
        let (bf16, updates, more) = passes("bf16");
        assert_eq!(bf16, updates + more);
    }
}

/// Nothing was learnt from, so nothing was compared.
#[test]
fn a_step_without_an_update_in_bf16_tells_no_difference() {
    let silent =
        json!({"precision": "bf16", "steps": 1, "rewards": {"none": {"kind": "expression", "expression": "0"}}});
    let line = lines("grpo", &with(grpo(), &silent)).remove(0);
    assert_eq!(number(&line, "updates/made").to_bits(), 0f64.to_bits());
    assert!(line.get("sampling/logprob_difference_mean").is_none(), "{line}");
}

#[test]
fn stored_completions_of_a_run_in_bf16_end_in_its_bytes() {
    // A KL in the reward is computed with a chunk's shape, and bf16 rounds by it.
    let params = with(grpo(), &json!({"precision": "bf16", "preset": "grpo", "steps": 3}));
    let first = Job::new(&FLOW, "grpo", params.clone());
    first.run(&[]).unwrap();
    let flow = FLOW.with("stored", &first.out().join("rollouts"), ArtifactType::Rollouts);
    let again = Job::new(&flow, "grpo", with(params, &json!({"replay": "stored"})));
    again.run(&[]).unwrap();
    let weights = |job: &Job<'_>| std::fs::read(job.out().join("last/model.safetensors")).unwrap();
    assert_eq!(weights(&again), weights(&first));
}

#[test]
fn checkpoints_and_states_are_fp32() {
    let job = Job::new(&FLOW, "sft", with(sft(), &json!({"precision": "bf16", "lora": {"rank": 2}})));
    job.run(&[]).unwrap();
    let state = std::fs::read_dir(job.out().join("state")).unwrap().map(|entry| entry.unwrap().path());
    let state = state.filter(|path| path.file_name().is_some_and(|name| name.to_string_lossy().starts_with("state-")));
    let files: Vec<_> = state.chain([job.out().join("last/model.safetensors")]).collect();
    assert_eq!(files.len(), 2);
    for file in files {
        let bytes = std::fs::read(&file).unwrap();
        let read = safetensors::SafeTensors::deserialize(&bytes).unwrap();
        let weights = read.iter().filter(|(name, _)| name.contains("model."));
        let kinds: Vec<_> = weights.map(|(_, view)| view.dtype()).collect();
        assert!(!kinds.is_empty() && kinds.iter().all(|kind| *kind == safetensors::Dtype::F32), "{}", file.display());
    }
}
