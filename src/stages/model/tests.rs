//! The stage as a whole: fresh models, folders taken as they are, and rows for new tokens.

use std::collections::{BTreeMap, BTreeSet};

use half::bf16;
use safetensors::tensor::TensorView;
use safetensors::{Dtype, SafeTensors};
use serde_json::{Value, json};

use super::*;
use crate::stages::testing::{context, digest, give};

/// Tokens of the models here; the id is the place.
const TOKENS: &[&str] = &["<|pad|>", "<|bos|>", "<|eos|>", "a", "b"];
const WIDTH: usize = 16;

fn tokenizer(folder: &Path, tokens: &[&str]) {
    let vocabulary: BTreeMap<&str, usize> = tokens.iter().copied().zip(0..).collect();
    let tokenizer = json!({
        "version": "1.0", "truncation": null, "padding": null, "added_tokens": [], "normalizer": null,
        "pre_tokenizer": null, "post_processor": null, "decoder": null,
        "model": {"type": "WordLevel", "vocab": vocabulary, "unk_token": "a"}
    });
    std::fs::write(folder.join("tokenizer.json"), tokenizer.to_string()).unwrap();
}

/// A folder with a fresh model of eight rows, three of them spare, in the type `dtype` and in two shards if `shards`.
fn source(tied: bool, dtype: Dtype, shards: bool) -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    let architecture =
        json!({"kind": "qwen2", "hidden_size": WIDTH, "layers": 1, "heads": 2, "tie_word_embeddings": tied});
    let ids = SpecialIds { pad: Some(0), bos: Some(1), eos: Some(4) };
    write_fresh(folder.path(), &serde_json::from_value(architecture).unwrap(), 8, ids, 3).unwrap();
    tokenizer(folder.path(), TOKENS);
    let path = folder.path().join("model.safetensors");
    let bytes = std::fs::read(&path).unwrap();
    let read = SafeTensors::deserialize(&bytes).unwrap();
    let narrow = |data: &[u8]| -> Vec<u8> {
        let four = data.chunks(4).map(|four| f32::from_le_bytes(four.try_into().unwrap()));
        four.flat_map(|value| bf16::from_f32(value).to_le_bytes()).collect()
    };
    let tensors: BTreeMap<String, (Vec<usize>, Vec<u8>)> = read
        .iter()
        .map(|(name, view)| {
            let data = if dtype == Dtype::BF16 { narrow(view.data()) } else { view.data().to_vec() };
            (name.to_owned(), (view.shape().to_vec(), data))
        })
        .collect();
    let of_shard = |name: &str| if shards && name == "lm_head.weight" { "two.safetensors" } else { "one.safetensors" };
    let files = if shards { vec!["one.safetensors", "two.safetensors"] } else { vec!["one.safetensors"] };
    for file in files {
        let views: Vec<(&String, TensorView<'_>)> = tensors
            .iter()
            .filter(|(name, _)| of_shard(name) == file)
            .map(|(name, (shape, data))| (name, TensorView::new(dtype, shape.clone(), data).unwrap()))
            .collect();
        let place = if shards { folder.path().join(file) } else { path.clone() };
        std::fs::write(place, safetensors::serialize(views, None).unwrap()).unwrap();
    }
    if shards {
        std::fs::remove_file(&path).unwrap();
        let map: BTreeMap<&String, &str> = tensors.keys().map(|name| (name, of_shard(name))).collect();
        let index = json!({"metadata": {"total_size": 1000}, "weight_map": map});
        std::fs::write(folder.path().join("model.safetensors.index.json"), index.to_string()).unwrap();
    }
    folder
}

/// Runs a `model` stage of `params` with the tokenizer in `given`; gives its checkpoint.
fn run(params: &Value, given: Option<&Path>) -> anyhow::Result<(tempfile::TempDir, std::path::PathBuf)> {
    let folder = tempfile::tempdir().unwrap();
    let mut context = context(folder.path(), &["checkpoint"]);
    if let Some(path) = given {
        give(&mut context, "words", path, ArtifactType::Tokenizer);
    }
    let stage: Model = serde_json::from_value(params.clone()).unwrap();
    assert_eq!(stage.check(&Upstream { stages: &BTreeMap::new() }), []);
    stage.run(&mut context)?;
    let out = folder.path().join("out/checkpoint");
    Ok((folder, out))
}

/// A table of a checkpoint as rows of numbers, wherever it stands.
fn table(folder: &Path, name: &str) -> Vec<Vec<f64>> {
    for file in ["model", "one", "two"].map(|stem| folder.join(format!("{stem}.safetensors"))) {
        let Ok(bytes) = std::fs::read(file) else { continue };
        let read = SafeTensors::deserialize(&bytes).unwrap();
        let Ok(view) = read.tensor(name) else { continue };
        let numbers: Vec<f64> = match view.dtype() {
            Dtype::BF16 => {
                view.data().chunks(2).map(|two| bf16::from_le_bytes(two.try_into().unwrap()).to_f64()).collect()
            }
            _ => view.data().chunks(4).map(|four| f32::from_le_bytes(four.try_into().unwrap()).into()).collect(),
        };
        return numbers.chunks(view.shape()[1]).map(<[f64]>::to_vec).collect();
    }
    panic!("no `{name}` in `{}`", folder.display())
}

fn json_of(path: &Path) -> Value {
    serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap()
}

#[test]
fn a_fresh_model_is_the_same_folder_twice() {
    let folder = tempfile::tempdir().unwrap();
    tokenizer(folder.path(), TOKENS);
    let architecture = json!({"kind": "qwen2", "hidden_size": 16, "layers": 2, "heads": 4});
    let params = json!({"tokenizer": "words", "architecture": architecture, "seed": 7});
    let runs = [(), ()].map(|()| run(&params, Some(folder.path())).unwrap());
    assert_eq!(digest(&runs[0].1), digest(&runs[1].1));
    let config = json_of(&runs[0].1.join("config.json"));
    assert_eq!((config["vocab_size"].as_u64(), config["eos_token_id"].as_u64()), (Some(5), Some(2)));
}

#[test]
fn a_folder_is_taken_as_it_is() {
    for shards in [false, true] {
        let source = source(false, Dtype::BF16, shards);
        let unwanted = ["pytorch_model.bin", "new_tokens.json", ".hidden"];
        for name in unwanted {
            std::fs::write(source.path().join(name), "x").unwrap();
        }
        let (_folder, out) = run(&json!({"from": source.path()}), None).unwrap();
        for entry in std::fs::read_dir(source.path()).unwrap() {
            let name = entry.unwrap().file_name().into_string().unwrap();
            assert_eq!(out.join(&name).exists(), !unwanted.contains(&name.as_str()), "{name}");
            if name.ends_with(".safetensors") || name == "tokenizer.json" {
                assert_eq!(std::fs::read(source.path().join(&name)).unwrap(), std::fs::read(out.join(&name)).unwrap());
            }
        }
        // The tokenizer's own end comes first, and what ended a sequence before still does.
        for name in ["config.json", "generation_config.json"] {
            let file = json_of(&out.join(name));
            assert_eq!((&file["eos_token_id"], &file["pad_token_id"]), (&json!([2, 4]), &json!(0)), "{name}");
        }
        assert_eq!(json_of(&out.join("config.json"))["vocab_size"], 8);
    }
}

#[test]
fn new_tokens_get_rows_in_both_tables() {
    for (tied, dtype, shards) in [(true, Dtype::F32, false), (false, Dtype::F32, true), (false, Dtype::BF16, false)] {
        let source = source(tied, dtype, shards);
        let words = tempfile::tempdir().unwrap();
        // Ids 5 to 7 are spare rows of the model, 8 and 9 grow it.
        let more = ["<up>", "<down>", "<left>", "<right>", "<stay>"];
        tokenizer(words.path(), &[TOKENS, &more].concat());
        let params = |init: Value| json!({"from": source.path(), "tokenizer": "words", "new_tokens": init, "seed": 5});
        let (_mean, out) = run(&params(json!({"init": "mean"})), Some(words.path())).unwrap();
        let (_normal, other) = run(&params(json!({"init": "normal", "std": 0.5})), Some(words.path())).unwrap();
        let (_again, again) = run(&params(json!({"init": "normal", "std": 0.5})), Some(words.path())).unwrap();
        assert_eq!(digest(&other), digest(&again));
        assert_eq!(json_of(&out.join("config.json"))["vocab_size"], 10);
        let file = json!({"ids": [5, 6, 7, 8, 9], "tokens": more, "rows": {"init": "mean", "std": 0.0}});
        assert_eq!(json_of(&out.join(NEW_TOKENS_FILE)), file);
        let names =
            if tied { vec!["model.embed_tokens.weight"] } else { vec!["model.embed_tokens.weight", "lm_head.weight"] };
        for name in names {
            let (before, mean, normal) = (table(source.path(), name), table(&out, name), table(&other, name));
            assert_eq!((before.len(), mean.len(), normal.len()), (8, 10, 10));
            for learnt in 0..5 {
                assert_eq!((&mean[learnt], &normal[learnt]), (&before[learnt], &before[learnt]), "{name} {learnt}");
            }
            for column in 0..WIDTH {
                let centre = (0..5).map(|row| before[row][column]).sum::<f64>() / 5.0;
                for (row, values) in mean.iter().enumerate().skip(5) {
                    assert!((values[column] - centre).abs() < 2e-4, "{name} {row}: {} for {centre}", values[column]);
                }
            }
            let new: Vec<f64> = normal[5..].concat();
            let spread = (new.iter().map(|value| value * value).sum::<f64>() / new.len() as f64).sqrt();
            assert!((spread - 0.5).abs() < 0.15, "{name}: {spread}");
            let distinct: BTreeSet<String> = normal[5..].iter().map(|row| format!("{row:?}")).collect();
            assert_eq!(distinct.len(), 5, "{name}: every new row is its own");
        }
        if !tied {
            let rows = ["model.embed_tokens.weight", "lm_head.weight"].map(|name| table(&other, name)[9].clone());
            assert_ne!(rows[0], rows[1], "the tables draw apart");
        }
    }
}

#[test]
fn a_tokenizer_that_does_not_fit_is_refused() {
    let source = source(true, Dtype::F32, false);
    let words = tempfile::tempdir().unwrap();
    let refused = |params: &Value| format!("{:#}", run(params, Some(words.path())).err().unwrap());
    let plain = json!({"from": source.path(), "tokenizer": "words"});
    tokenizer(words.path(), &[TOKENS, &["<up>"]].concat());
    assert!(refused(&plain).contains("declare how their rows begin"), "{}", refused(&plain));
    tokenizer(words.path(), &["<|pad|>", "<|bos|>", "<|eos|>", "b", "a"]);
    assert!(refused(&plain).contains("has the id"), "{}", refused(&plain));
    // The folder's own tokenizer has more ids than the model has rows.
    tokenizer(source.path(), &[TOKENS, &["c", "d", "e", "f"]].concat());
    let alone = json!({"from": source.path()});
    assert!(refused(&alone).contains("`f` has the id 8, but `vocab_size` is 8"), "{}", refused(&alone));
    std::fs::remove_file(source.path().join("tokenizer.json")).unwrap();
    assert!(refused(&alone).contains("no `tokenizer.json`"), "{}", refused(&alone));
    std::fs::write(source.path().join("config.json"), r#"{"model_type": "mamba", "vocab_size": 8}"#).unwrap();
    assert!(refused(&alone).contains("there are `qwen2`, `qwen3`, `llama`"), "{}", refused(&alone));
}

#[test]
fn a_model_has_one_beginning() {
    let problems = |params: Value| -> Vec<String> {
        let stage: Model = serde_json::from_value(params).unwrap();
        stage.check(&Upstream { stages: &BTreeMap::new() }).into_iter().map(|problem| problem.path).collect()
    };
    let architecture = json!({"kind": "qwen2", "hidden_size": 16, "layers": 1, "heads": 2});
    assert_eq!(problems(json!({"architecture": architecture, "tokenizer": "t"})), Vec::<String>::new());
    assert_eq!(problems(json!({"from": "/a/b"})), Vec::<String>::new());
    assert_eq!(problems(json!({"architecture": architecture})), ["tokenizer"]);
    assert_eq!(problems(json!({"architecture": architecture, "from": "/a/b", "tokenizer": "t"})), ["from"]);
    assert_eq!(problems(json!({"tokenizer": "t"})), ["architecture"]);
    assert_eq!(problems(json!({"from": "/a/b", "new_tokens": {"init": "mean"}})), ["new_tokens"]);
    assert_eq!(problems(json!({"from": "organisation/name"})), ["from"]);
    // Parameters without the newer fields are what they were.
    let stage: Model = serde_json::from_value(json!({"architecture": architecture, "tokenizer": "t"})).unwrap();
    let fields = serde_json::to_value(&stage).unwrap();
    assert_eq!(fields.as_object().unwrap().keys().collect::<Vec<_>>(), ["architecture", "seed", "tokenizer"]);
}

#[test]
fn tables_have_as_many_rows_as_the_configuration_says() {
    for (tied, shards, rows, weight) in
        [(true, false, 7, "model.embed_tokens.weight"), (false, true, 9, "model.embed_tokens.weight")]
    {
        let source = source(tied, Dtype::F32, shards);
        let mut config = json_of(&source.path().join("config.json"));
        config["vocab_size"] = json!(rows);
        std::fs::write(source.path().join("config.json"), config.to_string()).unwrap();
        let words = tempfile::tempdir().unwrap();
        tokenizer(words.path(), &[TOKENS, &["c"]].concat());
        let grown = json!({"from": source.path(), "tokenizer": "words", "new_tokens": {"init": "mean"}});
        for (params, given) in [(json!({"from": source.path()}), None), (grown, Some(words.path()))] {
            let error = format!("{:#}", run(&params, given).unwrap_err());
            let says = [format!("`{weight}`"), "one.safetensors".to_owned(), format!("`config.json` is {rows}")];
            let says = says.map(|says| if shards { says } else { says.replace("one.", "model.") });
            assert!(says.iter().all(|says| error.contains(says)), "{error}");
        }
    }
}

#[test]
fn a_chat_template_that_cannot_be_used_stops_no_import() {
    let source = source(true, Dtype::F32, false);
    std::fs::write(source.path().join("chat_template.jinja"), "{% for %}").unwrap();
    let (_folder, out) = run(&json!({"from": source.path()}), None).unwrap();
    assert_eq!(json_of(&out.join("config.json"))["eos_token_id"], json!([2, 4]));
    let (_, ends, wrong) = ends(&out).unwrap();
    assert!(ends == [2] && wrong.is_some_and(|wrong| wrong.contains("chat template cannot be used")), "{ends:?}");
}
