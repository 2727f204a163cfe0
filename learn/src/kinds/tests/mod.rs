//! Tests of the loops, end to end on tiny mazes: same run same bytes, stopped anywhere; laws of rollouts; refusals.

mod adapters;
mod by_hand;
mod continuing;
mod episodes;
mod new_tokens;
mod policy;
mod precision;
mod replayed;
mod selected;
mod supervised;

use std::time::Duration;

use pipe::pipeline::stage::{ArtifactType, StageEvent};
use pipe::stages::table::{self, Column};
use pipe::stages::tokens::TokensFolder;
use serde_json::{Value, json};

use super::testing::{End, FLOW, Flow, Job, digest};
use crate::order::Order;

fn sft() -> Value {
    json!({
        "model": "base", "data": "tokens", "steps": 7, "batch_size": 6, "micro_batch_size": 4, "learning_rate": 5e-3,
        "validate": {"every": 3, "samples": 6, "select": "progress"}, "seed": 3
    })
}

fn grpo() -> Value {
    json!({
        "model": "policy", "prompts": "tokens", "steps": 4, "prompts_per_step": 5, "group_size": 4,
        "generation_chunk": 2, "max_new_tokens": 10, "micro_batch_size": 7, "learning_rate": 1e-3,
        "rewards": {
            "correct": {"kind": "correct"},
            "near": {"kind": "expression", "expression": "progress - 0.1 * wall_hits", "weight": 0.5}
        },
        "validate": {"every": 2, "samples": 6}, "seed": 5
    })
}

fn evaluate() -> Value {
    json!({
        "model": "policy", "prompts": "tokens", "max_new_tokens": 10, "generation_chunk": 4, "temperature": 0.7
    })
}

/// Runs a stage whole, then again and again with stops of both kinds at places spread over its events, and compares.
fn stops_change_nothing(flow: &Flow, kind: &str, params: &Value, places: usize) {
    let whole = Job::new(flow, kind, params.clone());
    let digest = whole.run(&[]).unwrap();
    let again = Job::new(flow, kind, params.clone());
    assert_eq!(again.run(&[]).unwrap(), digest, "twice is not the same");
    let count = whole.count();
    let mut place = 0;
    for round in 0..places {
        let mut job = Job::new(flow, kind, params.clone());
        // Saves at every step, or only when asked to stop.
        job.save_every = if round % 2 == 0 { Duration::ZERO } else { Duration::from_secs(3600) };
        let mut next = || {
            place = (place * 5 + 7 * round + 3) % count;
            place + 1
        };
        let ends = [End::Kill(next()), End::Interrupt(next()), End::Kill(next()), End::Interrupt(next())];
        assert_eq!(job.run(&ends).unwrap(), digest, "{ends:?} changes the result");
        if kind != "evaluate" {
            assert_eq!(job.metrics(), whole.metrics(), "{ends:?} changes the metrics");
        }
    }
}

#[test]
fn sft_gives_the_same_bytes_wherever_it_is_stopped() {
    stops_change_nothing(&FLOW, "sft", &sft(), 6);
}

#[test]
fn grpo_gives_the_same_bytes_wherever_it_is_stopped() {
    let mut params = grpo();
    params["updates_per_step"] = json!(5);
    stops_change_nothing(&FLOW, "grpo", &params, 8);
}

#[test]
fn evaluate_gives_the_same_bytes_wherever_it_is_stopped() {
    stops_change_nothing(&FLOW, "evaluate", &evaluate(), 4);
}

#[test]
fn a_stop_in_mid_rollout_keeps_the_chunks_that_are_done() {
    let groups = |job: &Job<'_>| {
        let is_chunk = |event: &&StageEvent| matches!(event, StageEvent::Metrics { values } if values.keys().eq(["rollout/groups"]));
        job.events.lock().unwrap().iter().filter(is_chunk).count()
    };
    let whole = Job::new(&FLOW, "grpo", grpo());
    let digest = whole.run(&[]).unwrap();
    let first = whole.events.lock().unwrap().iter().position(|event| matches!(event, StageEvent::Metrics { .. }));
    let job = Job::new(&FLOW, "grpo", grpo());
    let stop = first.unwrap() + 1;
    let out = job.out();
    let killed = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| job.attempt(End::Kill(stop), &out)));
    assert!(killed.is_err());
    assert_eq!(groups(&job), 1);
    let journal = std::fs::read_to_string(job.logs().parent().unwrap().join("work/state/rollouts.jsonl")).unwrap();
    assert_eq!(journal.lines().count(), 1);
    assert_eq!(job.run(&[]).unwrap(), digest);
    let kept = std::fs::read_to_string(job.logs().parent().unwrap().join("work/state/rollouts.jsonl")).unwrap();
    assert!(kept.starts_with(&journal));
    assert!(job.events.lock().unwrap().contains(&StageEvent::Resumed { done: 0 }));
}

fn numbers(job: &Job<'_>, names: &[&str]) -> Vec<Vec<f64>> {
    let columns = table::read(&job.out().join("rollouts/rollouts.parquet"), names).unwrap();
    let numbers = |column| match column {
        Column::Number(values) => values.into_iter().map(Option::unwrap).collect(),
        Column::Integer(values) => values.into_iter().map(|value| value.unwrap() as f64).collect(),
        // Of tasks of one turn.
        Column::Numbers(values) => values.into_iter().map(|list| list[0]).collect(),
        Column::Flag(values) => values.into_iter().map(|flag| f64::from(u8::from(flag))).collect(),
        other => panic!("{other:?} are no numbers"),
    };
    columns.into_iter().map(numbers).collect()
}

#[test]
fn what_is_logged_is_what_is_optimised() {
    let job = Job::new(&FLOW, "grpo", grpo());
    job.run(&[]).unwrap();
    let columns = numbers(&job, &["step", "reward_correct", "reward_near", "total", "advantages", "solved", "kept"]);
    let [step, correct, near, total, advantage, solved, kept] = columns.try_into().unwrap();
    assert_eq!(correct, solved);
    for row in 0..total.len() {
        assert_eq!(total[row].to_bits(), (correct[row] + 0.5 * near[row]).to_bits());
    }
    // Advantages are those of the totals, group by group.
    let mut mixed = 0;
    for (totals, advantages) in total.chunks(4).zip(advantage.chunks(4)) {
        let mean = totals.iter().sum::<f64>() / 4.0;
        let deviation = (totals.iter().map(|total| (total - mean).powi(2)).sum::<f64>() / 3.0).sqrt();
        for (total, advantage) in totals.iter().zip(advantages) {
            let due = if deviation < 1e-12 { 0.0 } else { (total - mean) / (deviation + 1e-4) };
            assert!((advantage - due).abs() < 1e-9, "{advantage} for {total} in {totals:?}");
        }
        mixed += usize::from(deviation > 1e-12);
    }
    assert!(mixed > 4, "the policy gives too little to learn from for this test: {mixed}");
    for line in job.metrics() {
        let at = |name: &str| line[name].as_f64().unwrap_or_else(|| panic!("{name} is missing in {line}"));
        let rows: Vec<usize> = (0..total.len()).filter(|row| step[*row] + 1.0 == at("step")).collect();
        let mean = |values: &[f64]| rows.iter().map(|row| values[*row]).sum::<f64>() / rows.len() as f64;
        assert!((at("reward") - mean(&total)).abs() < 1e-12);
        assert!((at("rollout/solved") - mean(&solved)).abs() < 1e-12);
        assert!((at("reward") - at("reward/correct/mean") - 0.5 * at("reward/near/mean")).abs() < 1e-12);
        let shares = at("reward/correct/variance_share") + at("reward/near/variance_share");
        assert!((shares - 1.0).abs() < 1e-9, "{shares}");
        let discarded = rows.iter().filter(|row| kept[**row] == 0.0).count() as f64 / 4.0;
        assert!((at("groups/discarded") - discarded).abs() < 1e-12);
        assert!(at("sampling/logprob_difference_max") < 1e-4 && (at("policy/ratio_mean") - 1.0).abs() < 1e-5);
    }
}

#[test]
fn samples_of_a_group_differ_and_the_share_that_does_is_counted() {
    let distinct = |temperature: f64| {
        let mut params = grpo();
        params["temperature"] = json!(temperature);
        params["dynamic_sampling"] = json!({"enabled": false});
        params["validate"] = Value::Null;
        let job = Job::new(&FLOW, "grpo", params);
        job.run(&[]).unwrap();
        let path = job.out().join("rollouts/rollouts.parquet");
        let Column::Integers(ids) = table::read(&path, &["ids"]).unwrap().remove(0) else { panic!("no ids") };
        let step = numbers(&job, &["step"]).remove(0);
        let (mut all, mut most) = (0, 0);
        for line in job.metrics() {
            let of_step = (0..ids.len()).filter(|row| step[*row] + 1.0 == line["step"].as_f64().unwrap());
            let rows: Vec<&Vec<i32>> = of_step.map(|row| &ids[row]).collect();
            let kinds = |group: &[&Vec<i32>]| group.iter().collect::<std::collections::BTreeSet<_>>().len();
            let counts: Vec<usize> = rows.chunks(4).map(kinds).collect();
            let count: usize = counts.iter().sum();
            let share = line["completions/unique_share"].as_f64().unwrap();
            assert!((share - count as f64 / rows.len() as f64).abs() < 1e-12, "{line}");
            all += count;
            most = most.max(counts.into_iter().max().unwrap());
        }
        (all as f64 / ids.len() as f64, most)
    };
    let (share, most) = distinct(1.0);
    assert!(share > 0.5 && most == 4, "{share} of the completions differ, {most} in a group at most");
    // Next to greedy, all of a group are the same: that is what a lost stream of random numbers would look like.
    let (share, _) = distinct(1e-3);
    assert!(share < 0.4, "{share}");
}

#[test]
fn dynamic_sampling_takes_groups_in_the_order_of_prompts_and_refills_what_it_drops() {
    let mut params = grpo();
    params["rewards"] = json!({"correct": {"kind": "correct"}});
    params["dynamic_sampling"] = json!({"max_rounds": 3});
    let job = Job::new(&FLOW, "grpo", params);
    job.run(&[]).unwrap();
    let path = job.out().join("rollouts/rollouts.parquet");
    let Column::Text(instances) = table::read(&path, &["instance"]).unwrap().remove(0) else { panic!("no text") };
    let columns = numbers(&job, &["step", "round", "reward_correct", "kept"]);
    let [step, round, correct, kept] = columns.try_into().unwrap();
    // The order of prompts is that of the shuffle, each group once, over all steps and rounds.
    let tokens = TokensFolder::open(FLOW.path("tokens")).unwrap();
    let mut order = Order::new("grpo.order", 5, tokens.split("rl").unwrap());
    for (group, instance) in instances.chunks(4).enumerate() {
        assert_eq!(instance[0].as_deref(), Some(&*tokens.rows[order.at(group as u64)].instance));
    }
    let mut refilled = 0;
    for at in 0..4u8 {
        let groups = (0..step.len()).step_by(4).filter(|row| step[*row] == f64::from(at));
        let (mut missing, mut due) = (5, vec![]);
        for group in groups {
            let equal = (1..4).all(|sample| correct[group + sample] == correct[group]);
            assert_eq!(kept[group] == 0.0, equal);
            due.push((round[group], equal));
        }
        for number in 0..3 {
            let of_round: Vec<bool> =
                due.iter().filter(|(round, _)| *round == f64::from(number)).map(|(_, equal)| *equal).collect();
            assert_eq!(of_round.len(), missing, "step {at} round {number}");
            missing -= of_round.iter().filter(|equal| !**equal).count();
            refilled += usize::from(number > 0 && !of_round.is_empty());
        }
    }
    assert!(refilled > 0, "no step needed a second round, so nothing was tested");
}

#[test]
fn a_step_without_a_gradient_makes_no_update_and_is_counted() {
    let mut params = grpo();
    params["rewards"] = json!({"flat": {"kind": "expression", "expression": "0 * solved + 1"}});
    params["steps"] = json!(2);
    let job = Job::new(&FLOW, "grpo", params);
    job.run(&[]).unwrap();
    let last = job.metrics().pop().unwrap();
    assert_eq!(last["updates/steps_without"], json!(2.0));
    assert_eq!(last["groups/all_equal"], json!(10.0));
    let weights = |path: &std::path::Path| std::fs::read(path.join("model.safetensors")).unwrap();
    assert_eq!(weights(&job.out().join("last")), weights(FLOW.path("policy")));
}

#[test]
fn a_reward_without_a_value_stops_with_the_row_named() {
    let error = |expression: &str| {
        let mut params = grpo();
        params["rewards"] = json!({"broken": {"kind": "expression", "expression": expression}});
        format!("{:#}", Job::new(&FLOW, "grpo", params).run(&[]).unwrap_err())
    };
    let never = error("1 / (solved - solved)");
    assert!(never.contains("`broken` has no value for a demonstration of `rl-"), "{never}");
    // A demonstration solves its instance, so that this is found on the way.
    let unsolved = error("1 / solved");
    assert!(unsolved.contains("`broken`") && unsolved.contains("`rl-") && unsolved.contains("step 1"), "{unsolved}");
}

#[test]
fn validations_are_scored_and_watched() {
    let mut params = grpo();
    params["validate"] = json!({"every": 1, "samples": 6});
    params["alarm"] = json!({"window": 4});
    let job = Job::new(&FLOW, "grpo", params.clone());
    job.run(&[]).unwrap();
    for line in job.metrics() {
        let at = |name: &str| line[name].as_f64().unwrap_or_else(|| panic!("there is no {name}: {line}"));
        let total = at("validation/reward/correct") + 0.5 * at("validation/reward/near");
        assert!((at("validation/reward") - total).abs() < 1e-12);
        assert_eq!(at("validation/reward/correct"), at("validation/solved"));
        let solved = at("validation/solved");
        assert!(solved < 1.0, "nothing is unsolved");
        assert!(at("validation/reward_unsolved") <= at("validation/reward") + 1e-12);
        // Before the window is full nothing was looked at, and nothing is said.
        assert_eq!(line.get("alarm").is_some(), at("step") >= 4.0, "{line}");
    }
    assert_eq!(job.metrics().last().unwrap()["alarm"], json!(0.0));
    stops_change_nothing(&FLOW, "grpo", &params, 2);
}

#[test]
fn an_error_of_a_reward_is_counted_and_excluded_where_that_is_asked() {
    let mut params = grpo();
    let unsolved = json!({"kind": "expression", "expression": "progress / solved"});
    params["rewards"] = json!({"near": {"kind": "expression", "expression": "progress"}, "picky": unsolved});
    params["on_error"] = json!("exclude");
    params["steps"] = json!(2);
    let job = Job::new(&FLOW, "grpo", params);
    job.run(&[]).unwrap();
    let columns = numbers(&job, &["solved"]);
    let unsolved = columns[0].iter().filter(|solved| **solved == 0.0).count();
    let path = job.out().join("rollouts/rollouts.parquet");
    let columns = table::read(&path, &["total", "reward_picky", "reward_errors", "advantages"]).unwrap();
    let [Column::Number(total), Column::Number(picky), Column::Text(errors), Column::Numbers(advantages)] =
        &columns[..]
    else {
        panic!("other types")
    };
    assert!(unsolved > 0 && unsolved < total.len(), "{unsolved} of {}: nothing is told apart", total.len());
    for row in 0..total.len() {
        let excluded = errors[row].as_deref().is_some_and(|why| why.starts_with("picky: ") && why.contains("finite"));
        let agree = [total[row].is_none(), picky[row].is_none(), advantages[row].is_empty()];
        assert_eq!(agree, [excluded; 3], "row {row}: {:?}", errors[row]);
    }
    let sum = |name: &str| job.metrics().iter().map(|line| line[name].as_f64().unwrap_or(0.0)).sum::<f64>();
    assert_eq!(sum("samples/excluded"), unsolved as f64);
    assert_eq!(sum("rewards/errors"), unsolved as f64);
}

#[test]
fn a_program_scores_as_the_expression_that_it_computes_and_its_failure_comes_before_training() {
    let with = |reward: Value| {
        let mut params = grpo();
        params["rewards"] = json!({"correct": {"kind": "correct"}, "near": reward});
        params["steps"] = json!(2);
        Job::new(&FLOW, "grpo", params)
    };
    let program = |answer: &str| {
        let script = format!(
            "import json, sys\nfor line in sys.stdin:\n  samples = json.loads(line)['samples']\n  \
             print(json.dumps({{'rewards': {answer}}}), flush=True)"
        );
        json!({"kind": "program", "command": ["python3", "-c", script], "weight": 0.5, "batch_size": 3})
    };
    let expression = with(json!({"kind": "expression", "expression": "progress", "weight": 0.5}));
    expression.run(&[]).unwrap();
    let same = with(program("[s['measurements']['progress'] for s in samples]"));
    same.run(&[]).unwrap();
    let weights = |job: &Job| std::fs::read(job.out().join("last/model.safetensors")).unwrap();
    assert_eq!(weights(&expression), weights(&same));
    let error = format!("{:#}", with(program("[1, 2, 3, 4]")).run(&[]).unwrap_err());
    assert!(error.contains("before training") && error.contains("answered 4 rewards for 1 samples"), "{error}");
    let abstains = with(program("[None for s in samples]"));
    abstains.run(&[]).unwrap();
    let total = numbers(&abstains, &["total", "reward_correct"]);
    assert_eq!(total[0], total[1], "what abstains is no part of the total");
}

#[test]
fn a_loss_that_is_not_finite_stops_with_the_step_named_and_publishes_nothing() {
    let mut params = sft();
    params["learning_rate"] = json!(1e38);
    params["optimizer"] = json!({"max_gradient_norm": 0.0});
    params["validate"] = Value::Null;
    let job = Job::new(&FLOW, "sft", params);
    let error = format!("{:#}", job.run(&[]).unwrap_err());
    assert!(error.contains("at step 2") || error.contains("at step 3"), "{error}");
    assert!(std::fs::read_dir(job.out().join("last")).unwrap().next().is_none());
}

#[test]
fn best_is_the_earliest_highest_validation() {
    let mut params = sft();
    params["steps"] = json!(12);
    params["schedule"] = json!({"decay": "constant", "warmup_ratio": 0.0});
    let whole = Job::new(&FLOW, "sft", params.clone());
    whole.run(&[]).unwrap();
    let score = |line: &Value| Some((line["step"].as_u64()?, line["validation/progress"].as_f64()?));
    let scores: Vec<(u64, f64)> = whole.metrics().iter().filter_map(score).collect();
    assert_eq!(scores.iter().map(|(step, _)| *step).collect::<Vec<_>>(), [3, 6, 9, 12]);
    let highest = scores.iter().map(|(_, score)| *score).fold(f64::MIN, f64::max);
    let (best, _) = scores.iter().find(|(_, score)| *score == highest).unwrap();
    // At a constant rate, the same run cut short there ends in the weights that the whole run keeps as `best`.
    params["steps"] = json!(best);
    let short = Job::new(&FLOW, "sft", params);
    short.run(&[]).unwrap();
    let weights = |job: &Job<'_>, output: &str| std::fs::read(job.out().join(output).join("model.safetensors"));
    assert_eq!(weights(&whole, "best").unwrap(), weights(&short, "last").unwrap());
}

#[test]
fn an_evaluation_counts_every_row_and_agrees_with_its_examples() {
    let job = Job::new(&FLOW, "evaluate", evaluate());
    job.run(&[]).unwrap();
    let folder = job.out().join("evaluation");
    let metrics: Value = serde_json::from_slice(&std::fs::read(folder.join("metrics.json")).unwrap()).unwrap();
    let mut columns = table::read(&folder.join("examples.parquet"), &["solved", "finish", "data", "stratum"]).unwrap();
    let (Column::Text(strata), Column::Text(data)) = (columns.pop().unwrap(), columns.pop().unwrap()) else {
        panic!("no texts")
    };
    let (Column::Text(finish), Column::Number(solved)) = (columns.pop().unwrap(), columns.pop().unwrap()) else {
        panic!("no text and numbers")
    };
    assert_eq!(metrics["n"], json!(14.0));
    assert_eq!(solved.len(), 14);
    let mean = solved.iter().map(|value| value.unwrap()).sum::<f64>() / 14.0;
    assert!((metrics["solved"].as_f64().unwrap() - mean).abs() < 1e-12);
    let truncated = finish.iter().filter(|finish| finish.as_deref() == Some("length")).count() as f64 / 14.0;
    assert!((metrics["truncated"].as_f64().unwrap() - truncated).abs() < 1e-12);
    let (low, high) = (metrics["solved_low"].as_f64().unwrap(), metrics["solved_high"].as_f64().unwrap());
    assert!(low <= mean && mean <= high && low >= 0.0 && high <= 1.0 && high - low > 0.1);
    assert!(data.iter().all(|data| serde_json::from_str::<Value>(data.as_deref().unwrap()).unwrap().is_object()));
    let diagnoses = ["error_out_of_tokens", "error_no_answer", "error_malformed"];
    let mut wrong = table::read(&folder.join("examples.parquet"), &diagnoses).unwrap().into_iter().map(|column| {
        let Column::Number(values) = column else { panic!("no numbers") };
        values.into_iter().map(|value| value.unwrap()).sum::<f64>()
    });
    assert!((wrong.next().unwrap() / 14.0 - truncated).abs() < 1e-12, "what the token limit ended");
    assert!((metrics["error_malformed"].as_f64().unwrap() * 14.0 - wrong.nth(1).unwrap()).abs() < 1e-9);
    let stratum = strata[0].as_deref().unwrap();
    assert!(metrics[format!("solved.{stratum}")].is_f64() && metrics[format!("n.{stratum}")].is_f64());
}

#[test]
fn tokens_of_another_tokenizer_and_tokens_without_a_task_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    let copy = |name: &str| {
        let to = folder.path().join(name);
        std::fs::create_dir(&to).unwrap();
        for entry in std::fs::read_dir(FLOW.path("tokens")).unwrap() {
            let path = entry.unwrap().path();
            if path.is_file() {
                std::fs::write(to.join(path.file_name().unwrap()), std::fs::read(&path).unwrap()).unwrap();
            }
        }
        let file = to.join("task.json");
        let text: Value = serde_json::from_slice(&std::fs::read(&file).unwrap()).unwrap();
        (to, file, text)
    };
    let refuse = |tokens: &std::path::Path, says: &str| {
        let flow = FLOW.with("tokens", tokens, ArtifactType::Tokens);
        let error = format!("{:#}", Job::new(&flow, "evaluate", evaluate()).run(&[]).unwrap_err());
        assert!(error.contains(says), "{error}");
    };
    let (tokens, file, mut text) = copy("other");
    text["tokenizer"] = json!("0".repeat(64));
    std::fs::write(file, text.to_string()).unwrap();
    refuse(&tokens, "from one tokenizer");
    let (tokens, file, mut text) = copy("own");
    text["task"] = Value::Null;
    text["format"] = Value::Null;
    std::fs::write(file, text.to_string()).unwrap();
    refuse(&tokens, "have no task");
}
