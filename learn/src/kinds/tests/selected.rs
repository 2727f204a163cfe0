//! Several completions an instance, what is chosen by them, and a model's own completions as rows to train on.

use super::*;
use crate::kinds::testing::LINES;
use pipe::statistics::mean::{mean_interval, wilson};
use std::collections::BTreeMap;

fn several(samples: u64) -> Value {
    let mut params = evaluate();
    params["samples_per_prompt"] = json!(samples);
    params
}

/// Four completions of each prompt to train on, of which the policy solves some.
fn probe() -> Value {
    let mut params = several(4);
    params["split"] = json!("rl");
    params["temperature"] = json!(1.0);
    params
}

fn figures(job: &Job<'_>) -> BTreeMap<String, f64> {
    serde_json::from_slice(&std::fs::read(job.out().join("evaluation/metrics.json")).unwrap()).unwrap()
}

fn column(job: &Job<'_>, name: &str) -> Column {
    table::read(&job.out().join("evaluation/examples.parquet"), &[name]).unwrap().remove(0)
}

fn values(job: &Job<'_>, name: &str) -> Vec<f64> {
    match column(job, name) {
        Column::Number(values) => values.into_iter().map(Option::unwrap).collect(),
        other => panic!("{other:?} are no numbers"),
    }
}

#[test]
fn several_completions_give_the_same_bytes_wherever_evaluation_is_stopped() {
    stops_change_nothing(&FLOW, "evaluate", &several(4), 4);
}

#[test]
fn one_completion_is_the_default_and_the_first_of_several() {
    let (one, many) = (Job::new(&FLOW, "evaluate", several(1)), Job::new(&FLOW, "evaluate", several(4)));
    let (digest, again) = (one.run(&[]).unwrap(), Job::new(&FLOW, "evaluate", evaluate()).run(&[]).unwrap());
    assert_eq!(digest, again, "one completion is the default");
    many.run(&[]).unwrap();
    let names = |job: &Job<'_>| table::column_names(&job.out().join("evaluation/examples.parquet")).unwrap();
    let columns = names(&one);
    let told =
        ["instance", "stratum", "data", "prompt", "completion", "turns", "finish", "completion_length", "truncated"];
    assert_eq!(columns[..told.len()], told, "and then the measurements");
    let added: Vec<String> = names(&many).into_iter().filter(|name| !columns.contains(name)).collect();
    assert_eq!(added, ["sample", "ids", "pass@1", "pass@2"]);
    let Column::Text(all) = column(&many, "completion") else { panic!("no text") };
    let Column::Text(alone) = column(&one, "completion") else { panic!("no text") };
    assert_eq!(alone, all.iter().step_by(4).cloned().collect::<Vec<_>>());
    let distinct = |group: &[Option<String>]| group.iter().collect::<std::collections::BTreeSet<_>>().len();
    assert!(all.chunks(4).any(|group| distinct(group) > 1), "the completions of an instance are draws of their own");
}

/// Of every instance that is shown the first completion, beside its own prompt.
#[test]
fn completions_are_shown_with_the_instances_that_they_answer() {
    let job = Job::new(&FLOW, "evaluate", several(4));
    job.run(&[]).unwrap();
    let texts = |name| match column(&job, name) {
        Column::Text(texts) => texts.into_iter().step_by(4).map(Option::unwrap).collect::<Vec<String>>(),
        other => panic!("{other:?} are no texts"),
    };
    let (instances, prompts, completions) = (texts("instance"), texts("prompt"), texts("completion"));
    let events = std::fs::read_dir(job.logs().join("tensorboard")).unwrap().map(|file| file.unwrap().path());
    let events: Vec<u8> = events.flat_map(|file| std::fs::read(file).unwrap()).collect();
    let events = String::from_utf8_lossy(&events);
    for place in 0..crate::validate::LOGGED {
        let instance = &instances[place];
        let measured = events.split(&format!("**{instance}**: ")).nth(1).unwrap_or_else(|| panic!("{instance}"));
        let shown = measured.split("\n\n").collect::<Vec<_>>();
        let indented = |words: &str| format!("    {}", words.replace('\n', "\n    "));
        assert_eq!((shown[1], shown[3]), ("prompt", "completion"), "{instance}");
        assert_eq!((shown[2], shown[4]), (&*indented(&prompts[place]), &*indented(&completions[place])), "{instance}");
    }
}

#[test]
fn pass_at_k_and_its_interval_count_instances() {
    let job = Job::new(&FLOW, "evaluate", probe());
    job.run(&[]).unwrap();
    let (solved, figures) = (values(&job, "solved"), figures(&job));
    let instances: Vec<&[f64]> = solved.chunks(4).collect();
    assert_eq!((instances.len(), figures["n"]), (20, 20.0));
    let mean = solved.iter().sum::<f64>() / solved.len() as f64;
    assert!((figures["solved"] - mean).abs() < 1e-12 && (figures["pass@1"] - mean).abs() < 1e-12);
    // Of the six pairs of four draws, those with a success.
    let pairs = |draws: &[f64]| {
        let pairs = (0..4).flat_map(|one| (0..one).map(move |other| (one, other)));
        pairs.filter(|(one, other)| draws[*one] + draws[*other] > 0.5).count() as f64 / 6.0
    };
    let by_hand: Vec<f64> = instances.iter().map(|draws| pairs(draws)).collect();
    assert!((figures["pass@2"] - by_hand.iter().sum::<f64>() / 20.0).abs() < 1e-12);
    for (at, value) in values(&job, "pass@2").iter().enumerate() {
        assert!((value - by_hand[at / 4]).abs() < 1e-12);
    }
    assert!(mean > 0.0 && mean < 1.0, "the policy solves some: {mean}");
    let means: Vec<f64> = instances.iter().map(|draws| draws.iter().sum::<f64>() / 4.0).collect();
    let interval = mean_interval(&means, 0.95).unwrap();
    assert_eq!((figures["solved_low"], figures["solved_high"]), (interval.low.unwrap(), interval.high.unwrap()));
    let naive = wilson(solved.iter().sum::<f64>() as u64, solved.len() as u64, 0.95).unwrap();
    assert_ne!(Some(figures["solved_high"]), naive.high, "80 completions are not 80 instances");
    let Column::Integers(ids) = column(&job, "ids") else { panic!("no ids") };
    let lengths: Vec<f64> = ids.iter().map(|ids| ids.len() as f64).collect();
    assert_eq!(values(&job, "completion_length"), lengths, "episodes of one turn are their reply");
}

#[test]
fn rows_to_train_on_are_what_grpo_has_generated() {
    for (flow, params) in [(&*FLOW, grpo()), (&*LINES, episodes::grpo())] {
        let trained = Job::new(flow, "grpo", params);
        trained.run(&[]).unwrap();
        let with = flow.with("rollouts", &trained.out().join("rollouts"), ArtifactType::Rollouts);
        let all = json!({"prompts": "tokens", "rollouts": "rollouts", "where": "1", "unique": false});
        let made = Job::new(&with, "rejection_sampling", all);
        made.run(&[]).unwrap();
        let rows = TokensFolder::open(&made.out().join("tokens")).unwrap();
        let path = trained.out().join("rollouts/rollouts.parquet");
        let stored = table::read(&path, &["row", "ids", "logprobs", "finish"]).unwrap();
        let [Column::Integer(row), Column::Integers(ids), Column::Numbers(logprobs), Column::Text(finish)] =
            &stored[..]
        else {
            panic!("other columns")
        };
        // A completion without an end would teach a model not to stop.
        let ended: Vec<usize> = (0..ids.len()).filter(|at| finish[*at].as_deref() == Some("stop")).collect();
        let counts: BTreeMap<String, u64> =
            serde_json::from_slice(&std::fs::read(made.out().join("tokens/metrics.json")).unwrap()).unwrap();
        assert_eq!(counts["dropped.unended"] as usize, ids.len() - ended.len());
        let tokens = TokensFolder::open(flow.path("tokens")).unwrap();
        let taken = rows.split("rl").unwrap();
        assert_eq!(taken.len(), ended.len());
        for (place, &taken) in ended.into_iter().zip(&taken) {
            let from = row[place].unwrap() as usize;
            assert_eq!(rows.row_ids(taken), [tokens.prompt_ids(from), &ids[place]].concat());
            // The model's own tokens are the targets, and nothing that it read.
            let targets = rows.row_mask(taken).iter().map(|target| usize::from(*target)).sum::<usize>();
            assert_eq!(targets, logprobs[place].len());
        }
        // They train a model like any other rows, validated on the split that was kept.
        let with = with.with("rows", &made.out().join("tokens"), ArtifactType::Tokens);
        let supervised = json!({
            "model": "policy", "data": "rows", "split": "rl", "steps": 3, "batch_size": 6, "learning_rate": 1e-3,
            "validate": {"every": 3, "samples": 4}
        });
        let supervised = Job::new(&with, "sft", supervised);
        supervised.run(&[]).unwrap();
        assert!(supervised.metrics()[2]["validation/solved"].is_number());
    }
}

#[test]
fn prompts_are_chosen_by_how_often_a_model_solves_them() {
    let probed = Job::new(&FLOW, "evaluate", probe());
    probed.run(&[]).unwrap();
    let with = FLOW.with("probe", &probed.out().join("evaluation"), ArtifactType::Evaluation);
    let select = json!({"tokens": "tokens", "evaluation": "probe", "where": "solved > 0 and solved < 1"});
    let chosen = Job::new(&with, "select", select);
    chosen.run(&[]).unwrap();
    let rows = TokensFolder::open(&chosen.out().join("tokens")).unwrap();
    let solved = values(&probed, "solved");
    let mixed = solved.chunks(4).filter(|draws| (1.0..=3.0).contains(&draws.iter().sum::<f64>())).count();
    assert!(mixed > 0 && mixed < 20, "the probe shows nothing: {mixed}");
    assert_eq!(rows.split("rl").unwrap().len(), mixed);
    // Training takes them as its prompts, and solved completions of the probe as rows.
    let with = with.with("chosen", &chosen.out().join("tokens"), ArtifactType::Tokens);
    let mut params = grpo();
    params["prompts"] = json!("chosen");
    params["steps"] = json!(1);
    Job::new(&with, "grpo", params).run(&[]).unwrap();
    let rejection = Job::new(&with, "rejection_sampling", json!({"prompts": "chosen", "evaluation": "probe"}));
    let error = format!("{:#}", rejection.run(&[]).unwrap_err());
    assert!(error.contains("the completions are of other prompts"), "{error}");
    let made =
        Job::new(&with, "rejection_sampling", json!({"prompts": "tokens", "evaluation": "probe", "unique": false}));
    made.run(&[]).unwrap();
    let made = TokensFolder::open(&made.out().join("tokens")).unwrap();
    assert_eq!(made.split("rl").unwrap().len(), solved.iter().filter(|solved| **solved > 0.5).count());
}

#[test]
fn a_reward_sees_how_many_tokens_were_written() {
    let mut params = grpo();
    params["rewards"] = json!({"short": {"kind": "expression", "expression": "solved - completion_length / 10"}});
    let job = Job::new(&FLOW, "grpo", params);
    job.run(&[]).unwrap();
    let path = job.out().join("rollouts/rollouts.parquet");
    let columns = table::read(&path, &["total", "solved", "logprobs"]).unwrap();
    let [Column::Number(total), Column::Number(solved), Column::Numbers(logprobs)] = &columns[..] else {
        panic!("other columns")
    };
    for ((total, solved), logprobs) in total.iter().zip(solved).zip(logprobs) {
        assert_eq!(total.unwrap(), solved.unwrap() - logprobs.len() as f64 / 10.0);
    }
}
