//! From a data set to tokens and back.

use serde_json::{Value, json};

use super::*;
use crate::stages::dataset;
use crate::stages::synthesize::Synthesize;
use crate::stages::testing::{context, digest, give};
use crate::stages::tokenizer;
use crate::stages::tokens::{TENSORS_FILE, TokensFolder};
use crate::tasks::{Finish, Start, replay};

/// A folder with a data set and a tokenizer of 4 x 4 mazes in `format`.
fn inputs(format: &Value) -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    let task = json!({"kind": "maze", "rows": 4, "columns": 4});
    let mut context = context(folder.path(), &["dataset", "tokenizer"]);
    let data: Synthesize = serde_json::from_value(json!({"task": task, "splits": {"train": 40, "test": 20}})).unwrap();
    data.run(&mut context).unwrap();
    let words: tokenizer::Tokenizer = serde_json::from_value(json!({"task": task, "format": format})).unwrap();
    words.run(&mut context).unwrap();
    folder
}

/// Runs the stage on the inputs in a folder; gives where the tokens lie.
fn run(inputs: &Path, name: &str, change: &Value) -> anyhow::Result<PathBuf> {
    let place = inputs.join(name);
    let mut context = context(&place, &["tokens"]);
    give(&mut context, "data", &inputs.join("out/dataset"), ArtifactType::Dataset);
    give(&mut context, "words", &inputs.join("out/tokenizer"), ArtifactType::Tokenizer);
    let mut value = json!({"dataset": "data", "tokenizer": "words"});
    value.as_object_mut().unwrap().extend(change.as_object().unwrap().clone());
    serde_json::from_value::<Tokenize>(value).unwrap().run(&mut context)?;
    Ok(place.join("out/tokens"))
}

fn formats() -> Vec<Value> {
    let compact = ["search", "path", "direct"].map(|trace| json!({"kind": "compact", "trace": trace}));
    let alphamaze = ["path", "direct"].map(|trace| json!({"kind": "alphamaze", "trace": trace}));
    let fused = [json!({"kind": "fused", "trace": "search", "order": "toward"})];
    compact.into_iter().chain(alphamaze).chain(fused).collect()
}

#[test]
fn twice_gives_the_same_bytes_and_another_seed_other_searches() {
    for format in formats() {
        let folder = inputs(&format);
        let change = json!({"format": format});
        let first = digest(&run(folder.path(), "1", &change).unwrap());
        assert_eq!(first, digest(&run(folder.path(), "2", &change).unwrap()));
        insta::assert_snapshot!(first);
        let other = digest(&run(folder.path(), "3", &json!({"format": format, "seed": 1})).unwrap());
        assert_eq!(first == other, format["trace"] != "search");
    }
}

#[test]
fn rows_read_back_are_prompts_and_demonstrations_that_solve() {
    for format in formats() {
        let folder = inputs(&format);
        let path = run(folder.path(), "t", &json!({"format": format})).unwrap();
        let tokens = TokensFolder::open(&path).unwrap();
        let encoder = Encoder::open(&path.join(TOKENIZER_FOLDER)).unwrap();
        assert_eq!(tokens.tokenizer_digest, encoder.digest);
        let (task, format) = tokens.task.clone().unwrap();
        let task = open(&task, &format).unwrap();
        assert_eq!(tokens.split("test").unwrap(), (0..20).collect::<Vec<_>>());
        assert_eq!(tokens.split("train").unwrap(), (20..60).collect::<Vec<_>>());
        let error = tokens.split("rl").unwrap_err().to_string();
        assert_eq!(error, "the tokens have no split `rl`; there are `test` (20 rows), `train` (40 rows)");
        for (row, of) in tokens.rows.iter().enumerate() {
            let (ids, prompt) = (tokens.row_ids(row), tokens.prompt_ids(row));
            assert_eq!((Some(ids[0]), ids[ids.len() - 1]), (encoder.begin, encoder.end));
            assert_eq!(encoder.decode(&prompt[1..]), tokens.prompt(row).unwrap());
            let completion = encoder.decode(&ids[prompt.len()..ids.len() - 1]);
            let data = tokens.data(row).unwrap().unwrap();
            assert_eq!(of.stratum.as_deref().map(str::to_owned), task.stratum(data));
            let start = Start { instance: data, seed: 0 };
            assert_eq!(task.begin(&[start]).unwrap().observe().unwrap()[0], tokens.prompt(row).unwrap());
            let (_, verdict) = replay(&*task, start, &[completion], Finish::Stop).unwrap();
            assert_eq!(verdict["solved"].to_bits(), 1f64.to_bits());
            let wanted: Vec<u8> = (0..ids.len()).map(|at| u8::from(at >= prompt.len())).collect();
            assert_eq!(tokens.row_mask(row), wanted, "the completion and one `eos`");
        }
    }
}

#[test]
fn the_mask_all_covers_everything_but_the_beginning() {
    let folder = inputs(&json!({"kind": "compact"}));
    let path = run(folder.path(), "t", &json!({"format": {"kind": "compact"}, "mask": "all"})).unwrap();
    let tokens = TokensFolder::open(&path).unwrap();
    for row in 0..tokens.rows.len() {
        let mask = tokens.row_mask(row);
        assert!(mask[0] == 0 && mask[1..].iter().all(|&target| target == 1));
    }
}

#[test]
fn the_tokens_of_wrong_attempts_are_no_targets_on_request() {
    let formats = [
        json!({"kind": "fused", "trace": "path", "retry": "junction", "retry_share": 1.0}),
        json!({"kind": "alphamaze", "trace": "path", "retry": "origin", "retry_share": 0.7}),
        json!({"kind": "alphamaze", "trace": "reprint", "prompt": "legend", "retry": "junction", "retry_share": 1.0}),
        json!({"kind": "alphamaze", "trace": "path", "prompt": "legend", "signs": "text", "retry_share": 1.0}),
    ];
    for format in formats {
        let folder = inputs(&format);
        let read = |name: &str, change: Value| TokensFolder::open(&run(folder.path(), name, &change).unwrap()).unwrap();
        let whole = read("whole", json!({"format": format}));
        let masked = read("masked", json!({"format": format, "mask_mistakes": true}));
        let all = read("all", json!({"format": format, "mask_mistakes": true, "mask": "all"}));
        assert_eq!(whole.ids, masked.ids);
        let encoder = Encoder::open(&folder.path().join("masked/out/tokens").join(TOKENIZER_FOLDER)).unwrap();
        let mut retried = 0;
        for row in 0..whole.rows.len() {
            let (ids, begin) = (whole.row_ids(row), whole.prompt_ids(row).len());
            let reply = encoder.decode(&ids[begin..ids.len() - 1]);
            let differ = (0..ids.len()).filter(|&at| whole.row_mask(row)[at] != masked.row_mask(row)[at]);
            let differ: Vec<usize> = differ.collect();
            let text: String = differ.iter().map(|&at| encoder.decode(&ids[at..=at])).collect();
            let has_reset = reply.contains("<|reset|>") || reply.contains("RESET");
            assert_eq!(differ.is_empty(), !has_reset, "{reply}");
            assert!(!text.contains("reset") && !text.contains("RESET") && !text.contains("think"), "{text}");
            // What is masked is what is said of the wrong way, to the token.
            let moves = ["up", "down", "left", "right"].map(|name| text.matches(name).count()).iter().sum::<usize>();
            assert!(differ.is_empty() || moves > 0, "{text}");
            let wanted = (0..ids.len()).map(|at| u8::from(at > 0 && !differ.contains(&at))).collect::<Vec<_>>();
            assert_eq!(all.row_mask(row), wanted);
            retried += usize::from(has_reset);
        }
        assert!(retried > 20, "{retried}");
        let path = folder.path().join("masked/out/tokens/metrics.json");
        let metrics: BTreeMap<String, u64> = serde_json::from_slice(&fs::read(path).unwrap()).unwrap();
        let targets = |tokens: &TokensFolder| tokens.mask.iter().map(|&target| u64::from(target)).sum::<u64>();
        assert_eq!(metrics["masked_tokens"], targets(&whole) - targets(&masked));
        assert_eq!(metrics["target_tokens"], targets(&masked));
    }
}

#[test]
fn a_chat_template_asks_for_a_maze_in_words() {
    let format = json!({"kind": "alphamaze", "trace": "reprint", "prompt": "legend", "retry_share": 0.5});
    let folder = inputs(&format);
    let chat = "{% for m in messages %}{{ '<|bos|>' if m.role == 'user' }}{{ m.content }}\
                {{ '\n' if m.role == 'user' }}{{ '<|eos|>' if m.role == 'assistant' }}{% endfor %}";
    fs::write(folder.path().join("out/tokenizer/chat_template.jinja"), chat).unwrap();
    let tokens = TokensFolder::open(&run(folder.path(), "t", &json!({"format": format})).unwrap()).unwrap();
    assert!(tokens.chat);
    let encoder = Encoder::open(&folder.path().join("t/out/tokens").join(TOKENIZER_FOLDER)).unwrap();
    let (task, written) = tokens.task.clone().unwrap();
    let task = open(&task, &written).unwrap();
    for row in 0..tokens.rows.len() {
        let prompt = encoder.decode(tokens.prompt_ids(row));
        assert!(prompt.starts_with("<|bos|>Find the way") && prompt.contains("\nMAZE:\n<|0-0|>"), "{prompt}");
        assert_eq!(task.parse(&prompt).unwrap(), *tokens.data(row).unwrap().unwrap());
        let reply = encoder.decode(&targets(&tokens, row).concat());
        let reply = reply.strip_suffix("<|eos|>").unwrap().to_owned();
        let start = Start { instance: tokens.data(row).unwrap().unwrap(), seed: 0 };
        assert_eq!(replay(&*task, start, &[reply], Finish::Stop).unwrap().1["solved"].to_bits(), 1f64.to_bits());
    }
}

#[test]
fn a_parameter_that_is_left_out_is_not_written() {
    let stage: Tokenize = serde_json::from_value(json!({"dataset": "data", "tokenizer": "words"})).unwrap();
    let fields = serde_json::to_value(&stage).unwrap();
    let names: Vec<&String> = fields.as_object().unwrap().keys().collect();
    assert_eq!(names, ["dataset", "format", "mask", "max_length", "overlong", "seed", "tokenizer"], "old keys stay");
}

#[test]
fn overlong_rows_fail_or_are_dropped_and_counted() {
    let folder = inputs(&json!({"kind": "compact"}));
    let change = json!({"format": {"kind": "compact", "trace": "path"}});
    let whole = TokensFolder::open(&run(folder.path(), "whole", &change).unwrap()).unwrap();
    let lengths: Vec<usize> = (0..60).map(|row| whole.row_ids(row).len()).collect();
    let (longest, short) = (*lengths.iter().max().unwrap(), lengths.iter().filter(|length| **length <= 36).count());
    assert!(short > 0 && short < 60);
    let mut limited = change;
    limited["max_length"] = 36.into();
    let error = run(folder.path(), "fails", &limited).unwrap_err().to_string();
    let wanted = format!("{} of 60 rows have more than 36 tokens; the longest has {longest}", 60 - short);
    assert!(error.starts_with(&wanted), "{error}");
    limited["overlong"] = "drop".into();
    let path = run(folder.path(), "drops", &limited).unwrap();
    let tokens = TokensFolder::open(&path).unwrap();
    assert_eq!(tokens.rows.len(), short);
    let metrics: BTreeMap<String, u64> = serde_json::from_slice(&fs::read(path.join("metrics.json")).unwrap()).unwrap();
    assert_eq!(metrics["dropped.train"] + metrics["dropped.test"], 60 - short as u64);
    assert_eq!((metrics["rows"], metrics["tokens"]), (short as u64, tokens.ids.len() as u64));
    let targets: u64 = tokens.mask.iter().map(|&target| u64::from(target)).sum();
    assert_eq!(metrics["target_tokens"], targets);
    assert!(metrics["longest_row"] <= 36);
    let kept: Vec<&str> = tokens.rows.iter().map(|row| &*row.instance).collect();
    let all = whole.rows.iter().zip(&lengths).filter(|(_, length)| **length <= 36);
    assert_eq!(kept, all.map(|(row, _)| &*row.instance).collect::<Vec<_>>());
    limited["max_length"] = 3.into();
    assert!(run(folder.path(), "none", &limited).unwrap_err().to_string().contains("no row is left"));
}

/// Replaces the data set by a user's own rows.
fn own(folder: &Path, lines: &str) {
    fs::remove_dir_all(folder.join("out/dataset")).unwrap();
    let file = folder.join("own.jsonl");
    fs::write(&file, lines).unwrap();
    let stage: dataset::Dataset = serde_json::from_value(json!({"files": {"train": file}})).unwrap();
    stage.run(&mut context(folder, &["dataset"])).unwrap();
}

#[test]
fn a_users_own_rows_become_tokens_without_a_task() {
    let folder = inputs(&json!({"kind": "compact"}));
    own(folder.path(), "{\"prompt\": \"<|up|>\", \"completion\": \"<|down|><|left|>\"}\n");
    let tokens = TokensFolder::open(&run(folder.path(), "t", &json!({})).unwrap()).unwrap();
    assert!(tokens.task.is_none());
    assert_eq!(tokens.ids, [1, 5, 6, 7, 2]);
    assert_eq!(tokens.mask, [0, 0, 1, 1, 1]);
    assert_eq!((tokens.prompt_lengths[0], tokens.data(0).unwrap()), (2, None));
}

#[test]
fn rows_without_targets_and_unknown_text_are_errors_that_name_the_row() {
    let folder = inputs(&json!({"kind": "compact"}));
    own(folder.path(), "{\"text\": \"<|up|>\"}\n{\"text\": \"\"}\n");
    let error = format!("{:#}", run(folder.path(), "1", &json!({})).unwrap_err());
    assert!(error.contains("`train-000001`") && error.contains("nothing to learn"), "{error}");
    own(folder.path(), "{\"text\": \"hello\"}\n");
    let error = format!("{:#}", run(folder.path(), "2", &json!({})).unwrap_err());
    assert!(error.contains("`train-000000`") && error.contains("`hello`"), "{error}");
}

#[test]
fn a_tokenizer_of_another_task_or_format_is_a_problem() {
    let maze = |rows: u64| json!({"kind": "maze", "rows": rows, "columns": 4, "algorithm": "dfs"});
    let problems = |words: Value| {
        let stages: BTreeMap<String, Value> =
            [("data".to_owned(), json!({"task": maze(4)})), ("words".to_owned(), words)].into();
        let stage: Tokenize = serde_json::from_value(
            json!({"dataset": "data", "tokenizer": "words", "format": {"kind": "compact", "trace": "direct"}}),
        )
        .unwrap();
        Stage::check(&stage, &Upstream { stages: &stages }).len()
    };
    assert_eq!(problems(json!({"task": maze(4), "format": {"kind": "compact", "trace": "search"}})), 0);
    assert_eq!(problems(json!({"task": maze(5), "format": {"kind": "compact"}})), 1);
    assert_eq!(problems(json!({"task": maze(4)})), 1);
    assert_eq!(problems(json!({"from": "somewhere"})), 0);
}

#[test]
fn damaged_tokens_are_refused() {
    let folder = inputs(&json!({"kind": "compact"}));
    let path = run(folder.path(), "t", &json!({"format": {"kind": "compact"}})).unwrap();
    let tensors = path.join(TENSORS_FILE);
    let bytes = fs::read(&tensors).unwrap();
    fs::write(&tensors, &bytes[..bytes.len() - 1]).unwrap();
    assert!(format!("{:#}", TokensFolder::open(&path).unwrap_err()).contains(TENSORS_FILE));
    fs::remove_file(&tensors).unwrap();
    assert!(format!("{:#}", TokensFolder::open(&path).unwrap_err()).contains(TENSORS_FILE));
}

/// A folder with a data set of number lines and the tokenizer of their texts.
fn number_lines() -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    let task = json!({"kind": "number_line", "max_position": 9});
    let mut context = context(folder.path(), &["dataset", "tokenizer"]);
    let data: Synthesize = serde_json::from_value(json!({"task": task, "splits": {"train": 20}})).unwrap();
    data.run(&mut context).unwrap();
    let words = json!({"task": task, "format": {"kind": "json"}});
    let words: tokenizer::Tokenizer = serde_json::from_value(words).unwrap();
    words.run(&mut context).unwrap();
    folder
}

/// A chat template whose frame is made of the vocabulary of `number_lines`.
const CHAT: &str = "{% for m in messages %}{{ '<|bos|>' if m.role == 'user' }}\
                    {{ ': ' if m.role == 'assistant' }}{{ m.content }}\
                    {{ '<|eos|>' if m.role == 'assistant' }}{% endfor %}\
                    {% if add_generation_prompt %}{{ ': ' }}{% endif %}";

/// Every run of targets of a row, as the ids of its tokens.
fn targets(tokens: &TokensFolder, row: usize) -> Vec<Vec<i32>> {
    let (ids, mask) = (tokens.row_ids(row), tokens.row_mask(row));
    let mut runs: Vec<Vec<i32>> = Vec::new();
    for at in 0..ids.len() {
        if mask[at] == 1 && mask[at - 1] == 0 {
            runs.push(Vec::new());
        }
        if mask[at] == 1 {
            runs.last_mut().unwrap().push(ids[at]);
        }
    }
    runs
}

#[test]
fn rows_of_several_turns_learn_replies_and_read_observations() {
    let folder = number_lines();
    let format = json!({"kind": "json"});
    let path = run(folder.path(), "t", &json!({"format": format})).unwrap();
    let digests = [digest(&path), digest(&run(folder.path(), "again", &json!({"format": format})).unwrap())];
    assert_eq!(digests[0], digests[1]);
    let tokens = TokensFolder::open(&path).unwrap();
    let encoder = Encoder::open(&path.join(TOKENIZER_FOLDER)).unwrap();
    let (task, format) = tokens.task.clone().unwrap();
    let task = open(&task, &format).unwrap();
    let mut longest = 0;
    for row in 0..tokens.rows.len() {
        let start = Start { instance: tokens.data(row).unwrap().unwrap(), seed: 0 };
        let replies: Vec<String> = targets(&tokens, row)
            .iter()
            .map(|run| {
                assert_eq!(run.iter().filter(|&&id| id == encoder.end).count(), 1, "one end a turn");
                assert_eq!(*run.last().unwrap(), encoder.end, "the end of the turn is a target");
                encoder.decode(&run[..run.len() - 1])
            })
            .collect();
        longest = longest.max(replies.len());
        let (turns, verdict) = replay(task.as_ref(), start, &replies, Finish::Stop).unwrap();
        assert!(turns.len() == replies.len() && turns.last().unwrap().terminated);
        assert_eq!(verdict["solved"].to_bits(), 1f64.to_bits());
        // The whole row is what an episode reads and writes, in order.
        let mut text = task.begin(&[start]).unwrap().observe().unwrap().remove(0);
        assert_eq!(encoder.decode(&tokens.prompt_ids(row)[1..]), text);
        for (reply, turn) in replies.iter().zip(&turns) {
            text += &[reply.as_str(), "<|eos|>", turn.observation.as_str()].concat();
        }
        assert_eq!(encoder.decode(&tokens.row_ids(row)[1..]), text);
    }
    assert!(longest > 2, "some episodes have several turns");
}

#[test]
fn a_chat_template_frames_the_episodes_of_a_task_unless_it_is_turned_off() {
    let folder = number_lines();
    fs::write(folder.path().join("out/tokenizer/chat_template.jinja"), CHAT).unwrap();
    let plain = run(folder.path(), "plain", &json!({"format": {"kind": "json"}, "template": "none"})).unwrap();
    let plain = TokensFolder::open(&plain).unwrap();
    let framed = run(folder.path(), "framed", &json!({"format": {"kind": "json"}})).unwrap();
    let encoder = Encoder::open(&framed.join(TOKENIZER_FOLDER)).unwrap();
    let framed = TokensFolder::open(&framed).unwrap();
    assert!(framed.chat && !plain.chat);
    for row in 0..plain.rows.len() {
        assert_eq!(targets(&plain, row), targets(&framed, row), "the same is learnt");
        // The template writes the beginning itself: there is one, not two.
        let decoded = encoder.decode(framed.prompt_ids(row));
        assert_eq!(decoded, format!("<|bos|>{}: ", plain.prompt(row).unwrap()));
        assert_eq!(framed.prompt(row).unwrap(), decoded);
        let begins =
            |tokens: &TokensFolder| tokens.row_ids(row).iter().filter(|&&id| Some(id) == encoder.begin).count();
        assert_eq!((begins(&plain), begins(&framed)), (1, targets(&framed, row).len()), "one a user's message");
    }
}

#[test]
fn conversations_are_written_by_the_template_and_every_reply_is_learnt_with_its_end() {
    let folder = number_lines();
    let rows = [
        json!([("user", "Target: 1\n"), ("assistant", "0"), ("user", "2"), ("assistant", "3")]),
        json!([("system", "0"), ("user", "1"), ("assistant", "2")]),
    ];
    let line = |row: &Value| {
        let message = |pair: &Value| json!({"role": pair[0], "content": pair[1]});
        json!({"messages": row.as_array().unwrap().iter().map(message).collect::<Vec<_>>()}).to_string()
    };
    own(folder.path(), &rows.iter().map(line).collect::<Vec<_>>().join("\n"));
    let error = format!("{:#}", run(folder.path(), "none", &json!({})).unwrap_err());
    assert!(error.contains("`train-000000`") && error.contains("messages need a chat template"), "{error}");
    fs::write(folder.path().join("out/tokenizer/chat_template.jinja"), CHAT).unwrap();
    let path = run(folder.path(), "t", &json!({})).unwrap();
    let encoder = Encoder::open(&path.join(TOKENIZER_FOLDER)).unwrap();
    let tokens = TokensFolder::open(&path).unwrap();
    let decoded = |row: usize| encoder.decode(tokens.row_ids(row));
    assert_eq!(decoded(0), "<|bos|>Target: 1\n: 0<|eos|><|bos|>2: 3<|eos|>");
    assert_eq!(decoded(1), "0<|bos|>1: 2<|eos|>");
    let learnt = |row: usize| targets(&tokens, row).iter().map(|run| encoder.decode(run)).collect::<Vec<_>>();
    assert_eq!(learnt(0), ["0<|eos|>", "3<|eos|>"]);
    assert_eq!(learnt(1), ["2<|eos|>"]);
    assert_eq!((tokens.prompt(0).unwrap(), tokens.data(0).unwrap()), ("<|bos|>Target: 1\n: ", None));
    own(folder.path(), &line(&json!([("user", "1"), ("assistant", "2"), ("user", "3")])));
    let error = format!("{:#}", run(folder.path(), "open", &json!({})).unwrap_err());
    assert!(error.contains("`train-000000`") && error.contains("the last message has the role `user`"), "{error}");
}

/// A data set and a tokenizer of the task that the documentation shows, its program changed.
fn program_inputs(change: impl Fn(&str) -> String) -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    let page = include_str!("../../../docs/programs.md");
    let text = page.split("```python\n").nth(2).unwrap().split("```").next().unwrap();
    let changed = change(text);
    assert_ne!(changed, text, "nothing is changed");
    fs::write(folder.path().join("sums.py"), changed).unwrap();
    let words: Vec<String> = (0..10).map(|digit| digit.to_string()).chain([" + ".into(), " =".into()]).collect();
    let task = json!({
        "kind": "program", "command": ["python3", "sums.py"], "measures": ["solved"], "vocabulary": words,
        "files": [{"$file": folder.path().join("sums.py"), "as": "sums.py"}], "timeout_seconds": 120
    });
    let mut context = context(folder.path(), &["dataset", "tokenizer"]);
    let data: Synthesize =
        serde_json::from_value(json!({"task": task, "splits": {"train": 30}, "unique": false})).unwrap();
    data.run(&mut context).unwrap();
    let plain = json!({"kind": "plain"});
    let words: tokenizer::Tokenizer = serde_json::from_value(json!({"task": task, "format": plain})).unwrap();
    words.run(&mut context).unwrap();
    folder
}

#[test]
fn a_task_that_is_a_program_may_forget_every_episode() {
    let most =
        "    if ask[\"call\"] == \"reset\":\n        assert len(episodes) < 10, \"too many episodes are open\"\n";
    let folder = program_inputs(|text| text.replace("    if ask[\"call\"] == \"reset\":\n", most));
    let path = run(folder.path(), "t", &json!({"format": {"kind": "plain"}})).unwrap();
    assert_eq!(TokensFolder::open(&path).unwrap().rows.len(), 30);
}

#[test]
fn rows_without_a_demonstration_are_prompts_alone_and_counted() {
    let half = "[str(sum)] if sum % 2 else None for sum";
    let folder = program_inputs(|text| text.replace("[str(sum)] for sum", half));
    for mask in ["completion", "all"] {
        let path = run(folder.path(), mask, &json!({"format": {"kind": "plain"}, "mask": mask})).unwrap();
        let tokens = TokensFolder::open(&path).unwrap();
        let mut alone = 0;
        for row in 0..tokens.rows.len() {
            let data = tokens.data(row).unwrap().unwrap();
            let odd = (data["a"].as_u64().unwrap() + data["b"].as_u64().unwrap()) % 2 == 1;
            assert_eq!(tokens.row_ids(row).len() > tokens.prompt_ids(row).len(), odd);
            assert_eq!(tokens.row_mask(row).contains(&1), odd);
            alone += u64::from(!odd);
        }
        assert!(alone > 0 && alone < 30);
        let metrics: Value = serde_json::from_slice(&fs::read(path.join("metrics.json")).unwrap()).unwrap();
        assert_eq!(metrics["rows_without_demonstration"], alone);
    }
}

#[test]
fn an_interrupt_while_a_program_demonstrates_is_the_stages_own() {
    let place = tempfile::tempdir().unwrap();
    let asked = place.path().join("asked");
    let verdict = "    if ask[\"call\"] == \"verdict\":\n";
    let path = json!(asked);
    let hang = format!("{verdict}        import time\n        open({path}, \"w\").close()\n        time.sleep(100)\n");
    let folder = program_inputs(|text| text.replace(verdict, &hang));
    let mut context = context(&folder.path().join("t"), &["tokens"]);
    give(&mut context, "data", &folder.path().join("out/dataset"), ArtifactType::Dataset);
    give(&mut context, "words", &folder.path().join("out/tokenizer"), ArtifactType::Tokenizer);
    let value = json!({"dataset": "data", "tokenizer": "words", "format": {"kind": "plain"}});
    let interrupt = std::sync::Arc::clone(&context.interrupt);
    let ctrl_c = std::thread::spawn(move || {
        let begun = std::time::Instant::now();
        while !asked.exists() && begun.elapsed().as_secs() < 60 {
            std::thread::sleep(std::time::Duration::from_millis(5));
        }
        interrupt.store(true, std::sync::atomic::Ordering::Relaxed);
    });
    let error = serde_json::from_value::<Tokenize>(value).unwrap().run(&mut context).unwrap_err();
    ctrl_c.join().unwrap();
    assert!(error.is::<crate::pipeline::stage::Interrupted>(), "{error:#}");
}
