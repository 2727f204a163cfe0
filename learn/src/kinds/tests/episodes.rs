//! The laws over episodes of several turns, on short number lines.

use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use pipe::tasks::{Finish, Start, replay};
use tch::{Device, no_grad};

use super::*;
use crate::batch::{Batch, Row};
use crate::generate::Sampling;
use crate::kinds::testing::LINES;
use crate::loss::token_logprobs;
use crate::model::Transformer;
use crate::preflight;
use crate::prompts::Prompts;
use crate::sandbox;
use crate::trajectory::{Request, Trajectory, play};

const TEMPERATURE: f64 = 0.8;

static NEVER: AtomicBool = AtomicBool::new(false);

/// The model, the prompts and what the model made of them: two episodes on each row.
struct Played {
    model: Transformer,
    prompts: Prompts,
    requests: Vec<Request>,
    trajectories: Vec<Vec<Trajectory>>,
}

fn sampling() -> Sampling {
    Sampling::new(TEMPERATURE, 16)
}

fn played() -> Played {
    let folder = LINES.path("policy");
    let model = Transformer::load(folder, Device::Cpu).unwrap();
    let prompts = Prompts::open(folder, TokensFolder::open(LINES.path("tokens")).unwrap(), &Arc::default()).unwrap();
    let rows = prompts.tokens.split("rl").unwrap();
    let counters = |row: usize, sample: u64| vec![11, 0, row as u64, sample];
    let requests: Vec<Request> =
        rows.into_iter().map(|row| Request { row, samples: vec![counters(row, 0), counters(row, 1)] }).collect();
    let trajectories = play(&model, &prompts, &requests, &sampling(), &NEVER, &mut |_| {}).unwrap();
    Played { model, prompts, requests, trajectories }
}

/// Tokens of number lines whose rows a chat template frames.
fn framed() -> (tempfile::TempDir, TokensFolder) {
    let place = tempfile::tempdir().unwrap();
    let tokenizer = place.path().join("tokenizer");
    std::fs::create_dir(&tokenizer).unwrap();
    for entry in std::fs::read_dir(LINES.path("tokenizer")).unwrap() {
        let path = entry.unwrap().path();
        std::fs::copy(&path, tokenizer.join(path.file_name().unwrap())).unwrap();
    }
    let template = "{% for m in messages %}{{ '<|bos|>' if m.role == 'user' else ': ' }}{{ m.content }}\
                    {{ '<|eos|>' if m.role == 'assistant' }}{% endfor %}{{ ': ' if add_generation_prompt }}";
    std::fs::write(tokenizer.join("chat_template.jinja"), template).unwrap();
    let flow = LINES.with("tokenizer", &tokenizer, ArtifactType::Tokenizer);
    let format = json!({"kind": "json", "thoughts": false});
    let params = json!({"dataset": "lines", "tokenizer": "tokenizer", "format": format});
    let out = place.path().join("out");
    Job::new(&flow, "tokenize", params).attempt(End::Never, &out).unwrap();
    let tokens = TokensFolder::open(&out.join("tokens")).unwrap();
    (place, tokens)
}

#[test]
fn what_an_episode_reads_is_what_the_rows_taught_with_and_without_a_chat_template() {
    let (_place, framed) = framed();
    let plain = TokensFolder::open(LINES.path("tokens")).unwrap();
    assert!(framed.chat && !plain.chat);
    for tokens in [plain, framed] {
        let prompts = Prompts::open(LINES.path("policy"), tokens, &Arc::default()).unwrap();
        let mut several = 0;
        for row in 0..prompts.tokens.rows.len() {
            let ids: Vec<i64> = prompts.tokens.row_ids(row).iter().map(|id| i64::from(*id)).collect();
            let runs = preflight::runs(prompts.tokens.row_mask(row));
            let text = |run: &std::ops::Range<usize>| prompts.codec.decode(&ids[run.start..run.end - 1]).unwrap();
            let replies: Vec<String> = runs.iter().map(text).collect();
            let start = Start { instance: prompts.instance(row).unwrap(), seed: 0 };
            let (turns, _) = replay(prompts.task.as_ref(), start, &replies, Finish::Stop).unwrap();
            assert_eq!(prompts.prompt(row), ids[..runs[0].start], "the first prompt");
            for (at, pair) in runs.windows(2).enumerate() {
                let read = prompts.observation(&turns[at].observation).unwrap();
                assert_eq!(read, ids[pair[0].end..pair[1].start], "what is read in turn {}", at + 2);
                several += 1;
            }
        }
        assert!(several > 0);
    }
}

#[test]
fn a_model_with_another_chat_template_than_the_rows_is_refused() {
    let (_place, tokens) = framed();
    let model = tempfile::tempdir().unwrap();
    for entry in std::fs::read_dir(LINES.path("policy")).unwrap() {
        let path = entry.unwrap().path();
        std::fs::copy(&path, model.path().join(path.file_name().unwrap())).unwrap();
    }
    let taught = tokens.path.join("tokenizer/chat_template.jinja");
    let open = |template: &str| {
        std::fs::write(model.path().join("chat_template.jinja"), template).unwrap();
        Prompts::open(model.path(), TokensFolder::open(&tokens.path).unwrap(), &Arc::default())
    };
    let template = std::fs::read_to_string(&taught).unwrap();
    assert!(open(&template).is_ok());
    let error = format!("{:#}", open(&template.replace("': '", "'; '")).err().unwrap());
    assert!(error.contains("is not the one that wrote the rows") && error.contains("from line 1 on"), "{error}");
    assert!(error.contains(&*taught.to_string_lossy()) && error.contains("from one tokenizer"), "{error}");
    // Rows that no template wrote do not care.
    assert!(Prompts::open(model.path(), TokensFolder::open(LINES.path("tokens")).unwrap(), &Arc::default()).is_ok());
}

#[test]
fn a_trajectory_is_what_the_environment_saw_and_the_model_read() {
    let Played { model, prompts, requests, trajectories: played } = played();
    let (mut several, mut whole) = (0, 0);
    for (request, samples) in requests.iter().zip(&played) {
        for (counters, one) in request.samples.iter().zip(samples) {
            // The environment's text and the model's, in turn, as ids.
            let (mut at, mut written) = (0, 0);
            for (index, turn) in one.turns.iter().enumerate() {
                assert_eq!(turn.observation.is_empty(), index == 0);
                let read = prompts.observation(&turn.observation).unwrap();
                assert_eq!(one.ids[at..turn.begin], read[..]);
                let ended = one.ids[turn.end - 1] == model.config().eos_token_id[0];
                assert_eq!(turn.finish == Finish::Stop, ended);
                let text = prompts.codec.decode(&one.ids[turn.begin..turn.end - usize::from(ended)]).unwrap();
                assert_eq!(turn.text, text);
                assert!(turn.finish == Finish::Stop || index + 1 == one.turns.len(), "nothing follows a reply cut off");
                (at, written) = (turn.end, written + turn.end - turn.begin);
            }
            assert_eq!((at, written), (one.ids.len(), one.length()));
            // Another player of the same replies comes to the same verdict, random steps included.
            let replies: Vec<String> = one.turns.iter().map(|turn| turn.text.clone()).collect();
            let seed = rand_chacha::rand_core::Rng::next_u64(&mut pipe::random::rng("episode", counters));
            let start = Start { instance: prompts.instance(request.row).unwrap(), seed };
            let (turns, verdict) = replay(&*prompts.task, start, &replies, one.finish()).unwrap();
            assert_eq!(verdict, prompts.named(&one.measurements));
            let told = one.turns.iter().map(|turn| &turn.measurements);
            assert!(turns.iter().map(|turn| &turn.measurements).eq(told));
            assert_eq!(one.truncated, !turns.last().unwrap().terminated);
            several += usize::from(one.turns.len() > 1);
            whole += usize::from(!one.truncated);
        }
    }
    assert!(
        several > 10 && whole > 2,
        "the policy is no test: {several} of several turns, {whole} that reached the end"
    );
}

#[test]
fn sampler_and_trainer_agree_over_whole_episodes_and_only_replies_are_targets() {
    let Played { model, prompts, requests, trajectories: played } = played();
    let mut compared = 0;
    for (request, samples) in requests.iter().zip(&played) {
        let prompt = prompts.prompt(request.row);
        for one in samples {
            let ids = [prompt.as_slice(), &one.ids].concat();
            let mask = [vec![0; prompt.len()], one.mask()].concat();
            let batch = Batch::new(&[Row { ids: &ids, mask: &mask }], Device::Cpu).unwrap();
            assert_eq!(batch.count() as usize, one.length());
            let trained = no_grad(|| {
                let logits = model.logits(&batch.states(&model));
                token_logprobs(&logits, &batch.targets, TEMPERATURE)
            });
            let sampled = tch::Tensor::from_slice(&one.logprobs);
            assert!(sandbox::distance(&trained, &sampled) < 1e-4);
            compared += one.length();
            // Every reply that ended teaches its end, once.
            let ends = ids.iter().zip(&mask).filter(|(id, mask)| **mask == 1 && **id == model.config().eos_token_id[0]);
            let finished = one.turns.iter().filter(|turn| turn.finish == Finish::Stop);
            assert_eq!(ends.count(), finished.count());
        }
    }
    assert!(compared > 500);
}

#[test]
fn the_same_chunk_gives_the_same_trajectories_and_episodes_do_not_matter_to_each_other() {
    let Played { model, prompts, requests, trajectories: played } = played();
    let again = play(&model, &prompts, &requests, &sampling(), &NEVER, &mut |_| {}).unwrap();
    assert_eq!(played, again);
    let alone = play(&model, &prompts, &requests[3..4], &sampling(), &NEVER, &mut |_| {}).unwrap();
    for (one, other) in alone[0].iter().zip(&played[3]) {
        assert_eq!((&one.ids, &one.measurements), (&other.ids, &other.measurements));
    }
    assert!(played.iter().any(|samples| samples[0].ids != samples[1].ids), "samples of a group differ");
}

#[test]
fn a_reply_that_a_stop_text_ended_is_closed_before_the_environment_speaks() {
    let Played { model, prompts, requests, .. } = played();
    let end = model.config().eos_token_id[0];
    let stopped = Sampling { stop: vec![prompts.codec.encode("}").unwrap()], ..sampling() };
    let played = play(&model, &prompts, &requests, &stopped, &NEVER, &mut |_| {}).unwrap();
    let mut closed = 0;
    for one in played.iter().flatten() {
        for pair in one.turns.windows(2) {
            let read = &one.ids[pair[0].end..pair[1].begin];
            let own = one.ids[pair[0].end - 1] == end;
            assert_eq!(read[0] == end, !own, "rows have one end between a reply and what follows");
            assert_eq!(read[usize::from(!own)..], prompts.observation(&pair[1].observation).unwrap()[..]);
            closed += usize::from(!own);
        }
        let marked = one.mask().iter().map(|mask| usize::from(*mask)).sum::<usize>();
        assert_eq!(marked, one.length(), "the end that was put there is no target");
    }
    assert!(closed > 5, "no reply went on behind a stop text: {closed}");
}

#[test]
fn an_episode_that_outgrows_the_models_positions_is_cut_off_and_counted() {
    let Played { model, prompts, requests, .. } = played();
    let prompt = requests.iter().map(|request| prompts.prompt(request.row).len()).max().unwrap();
    // Room for the first reply and for no second one.
    let long = Sampling::new(TEMPERATURE, 224 - prompt as u64);
    let played = play(&model, &prompts, &requests[..4], &long, &NEVER, &mut |_| {}).unwrap();
    for one in played.iter().flatten() {
        assert_eq!(one.turns.len(), 1);
        assert!(one.truncated || one.measurements[prompts.measure("reached_goal").unwrap()] == 1.0);
    }
}

pub(super) fn grpo() -> Value {
    json!({
        "model": "policy", "prompts": "tokens", "steps": 3, "prompts_per_step": 4, "group_size": 4,
        "generation_chunk": 2, "max_new_tokens": 16, "micro_batch_size": 5, "learning_rate": 1e-3,
        "rewards": {"goal": {"kind": "expression", "expression": "reached_goal"}, "valid": {"kind": "expression", "expression": "valid"}},
        "validate": {"every": 2, "samples": 6}, "seed": 5
    })
}

#[test]
fn grpo_over_episodes_gives_the_same_bytes_wherever_it_is_stopped() {
    stops_change_nothing(&LINES, "grpo", &grpo(), 5);
}

#[test]
fn sft_over_episodes_gives_the_same_bytes_wherever_it_is_stopped() {
    let params = json!({
        "model": "base", "data": "tokens", "steps": 5, "batch_size": 6, "micro_batch_size": 4, "learning_rate": 5e-3,
        "validate": {"every": 3, "samples": 6, "select": "valid"}, "seed": 3
    });
    stops_change_nothing(&LINES, "sft", &params, 4);
}

#[test]
fn evaluate_over_episodes_gives_the_same_bytes_wherever_it_is_stopped() {
    let params = json!({
        "model": "policy", "prompts": "tokens", "max_new_tokens": 16, "generation_chunk": 4, "temperature": 0.7
    });
    stops_change_nothing(&LINES, "evaluate", &params, 3);
}
