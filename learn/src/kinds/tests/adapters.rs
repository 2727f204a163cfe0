//! Training with low-rank adapters: the same laws, a state without the frozen model, plain checkpoints.

use std::path::Path;

use serde_json::json;
use tch::Device;

use super::super::testing::{End, FLOW, Job};
use super::{grpo, sft, stops_change_nothing};
use crate::model::Transformer;

#[test]
fn adapters_give_the_same_bytes_wherever_a_training_is_stopped() {
    for (kind, mut params) in [("sft", sft()), ("grpo", grpo())] {
        params["lora"] = json!({"rank": 2, "targets": ["q_proj", "v_proj", "up_proj"]});
        stops_change_nothing(&FLOW, kind, &params, 2);
    }
}

#[test]
fn a_state_holds_adapters_alone_and_a_checkpoint_is_merged() {
    let mut params = sft();
    params["lora"] = json!({"rank": 2, "targets": ["v_proj"]});
    let mut job = Job::new(&FLOW, "sft", params);
    job.save_every = std::time::Duration::ZERO;
    job.run(&[End::Never]).unwrap();
    let states = job.logs().parent().unwrap().join("work/state");
    let state = std::fs::read_dir(states).unwrap().map(|entry| entry.unwrap().path());
    let mut state = state.filter(|path| path.extension().is_some_and(|end| end == "safetensors"));
    let bytes = std::fs::read(state.next().unwrap()).unwrap();
    let file = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    let tensors: Vec<&str> = file.names().into_iter().filter(|name| name.contains("model.")).collect();
    assert!(!tensors.is_empty());
    assert!(tensors.iter().all(|name| name.contains("v_proj.lora_")), "{tensors:?}");
    let load = |folder: &Path| Transformer::load(folder, Device::Cpu).unwrap().weights().leaves();
    let moved: Vec<String> = load(FLOW.path("base"))
        .into_iter()
        .zip(load(&job.out().join("last")))
        .filter(|((_, before), (_, after))| before != after)
        .map(|((name, _), _)| name)
        .collect();
    assert_eq!(moved, ["model.layers.0.self_attn.v_proj.weight"]);
}
