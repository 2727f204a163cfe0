//! Models with new tokens: what a training meets is audited, what it does not meet is carried on.

use pipe::pipeline::stage::{ArtifactType, StageEvent};
use serde_json::{Value, json};

use super::super::testing::{FLOW, Job};
use super::{grpo, sft, stops_change_nothing};

#[test]
fn new_rows_are_audited_and_what_was_not_met_is_carried_on() {
    for (kind, params, model) in [("sft", sft(), "base"), ("grpo", grpo(), "policy")] {
        let folder = tempfile::tempdir().unwrap();
        for entry in std::fs::read_dir(FLOW.path(model)).unwrap() {
            let path = entry.unwrap().path();
            std::fs::write(folder.path().join(path.file_name().unwrap()), std::fs::read(&path).unwrap()).unwrap();
        }
        // The padding never occurs, the end of a sequence does.
        let file = json!({"ids": [0, 2], "tokens": ["<|pad|>", "<|eos|>"], "rows": {"init": "normal", "std": 0.02}});
        std::fs::write(folder.path().join("new_tokens.json"), file.to_string()).unwrap();
        let flow = FLOW.with("fresh", folder.path(), ArtifactType::Checkpoint);
        let mut params = params;
        params["model"] = json!("fresh");
        stops_change_nothing(&flow, kind, &params, 1);
        let job = Job::new(&flow, kind, params.clone());
        job.run(&[]).unwrap();
        let told = |event: &StageEvent| matches!(event, StageEvent::Note { text } if text.starts_with("new tokens: 1 occurred"));
        assert!(job.events.lock().unwrap().iter().any(told), "{kind}");
        for output in ["last", "best"] {
            let left = std::fs::read_to_string(job.out().join(output).join("new_tokens.json")).unwrap();
            let left: Value = serde_json::from_str(&left).unwrap();
            assert_eq!((&left["ids"], &left["tokens"]), (&json!([0]), &json!(["<|pad|>"])), "{kind} {output}");
        }
        params["lora"] = json!({"rank": 2});
        let refused = format!("{:#}", Job::new(&flow, kind, params.clone()).run(&[]).unwrap_err());
        assert!(refused.contains("train the model without `lora` first"), "{refused}");
        // What is left over occurs nowhere, so adapters do not miss it.
        let left = job.out().join("last/new_tokens.json");
        std::fs::copy(left, folder.path().join("new_tokens.json")).unwrap();
        let job = Job::new(&flow, kind, params);
        job.run(&[]).unwrap();
        let told = |event: &StageEvent| matches!(event, StageEvent::Note { text } if text.contains("stay so: the rows do not have"));
        assert!(job.events.lock().unwrap().iter().any(told), "{kind}");
        assert!(job.out().join("best/new_tokens.json").exists(), "{kind}");
    }
}
