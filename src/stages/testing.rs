//! What tests of light kinds share: a context over a temporary folder, and the digest of what a stage wrote.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::Duration;

use serde_json::{Value, json};

use crate::pipeline::stage::{ArtifactType, InputArtifact, Resources, Stage as _, StageContext};
use crate::stages::synthesize::Synthesize;
use crate::stages::table::{Column, ColumnType, TableWriter};
use crate::stages::tokenize::Tokenize;
use crate::stages::tokenizer::Tokenizer;
use crate::stages::tokens::TokensFolder;

/// A context whose `out` has an empty folder for each of `outputs`.
pub(crate) fn context(folder: &Path, outputs: &[&str]) -> StageContext {
    for output in outputs {
        std::fs::create_dir_all(folder.join("out").join(output)).unwrap();
    }
    StageContext {
        inputs: BTreeMap::new(),
        out: folder.join("out"),
        work: folder.join("work"),
        logs: folder.join("logs"),
        resources: Resources {
            device: "cpu".to_owned(),
            threads: 2,
            visible_devices: None,
            save_every: Duration::from_mins(1),
        },
        interrupt: Arc::new(AtomicBool::new(false)),
        events: Box::new(|_| {}),
    }
}

/// Hands an input to a context.
pub(crate) fn give(context: &mut StageContext, reference: &str, path: &Path, artifact: ArtifactType) {
    let given = InputArtifact { path: path.to_owned(), digest: String::new(), artifact };
    context.inputs.insert(reference.to_owned(), given);
}

/// The digest of every path and byte below a folder.
pub(crate) fn digest(folder: &Path) -> String {
    let mut files: Vec<PathBuf> = Vec::new();
    let mut folders = vec![folder.to_owned()];
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() { folders.push(path) } else { files.push(path) }
        }
    }
    files.sort();
    let mut hasher = blake3::Hasher::new();
    for file in files {
        hasher.update(file.strip_prefix(folder).unwrap().to_str().unwrap().as_bytes());
        hasher.update(blake3::hash(&std::fs::read(&file).unwrap()).as_bytes());
    }
    hasher.finalize().to_hex().to_string()
}

/// The values of a text column without nulls.
pub(crate) fn strings(column: Column) -> Vec<String> {
    match column {
        Column::Text(values) => values.into_iter().map(Option::unwrap).collect(),
        other => panic!("{other:?} is no text"),
    }
}

/// Tokens of 3 x 3 mazes with the splits `rl` (30 rows), `train` (20) and `validation` (10); gives where they lie.
pub(crate) fn maze_tokens(folder: &Path) -> PathBuf {
    let task = json!({"kind": "maze", "rows": 3, "columns": 3});
    let format = json!({"kind": "compact", "trace": "path"});
    let mut context = context(folder, &["dataset", "tokenizer", "tokens"]);
    let splits = json!({"train": 20, "rl": 30, "validation": 10});
    let mazes: Synthesize = serde_json::from_value(json!({"task": task, "splits": splits})).unwrap();
    mazes.run(&mut context).unwrap();
    let words: Tokenizer = serde_json::from_value(json!({"task": task, "format": format})).unwrap();
    words.run(&mut context).unwrap();
    give(&mut context, "data", &folder.join("out/dataset"), ArtifactType::Dataset);
    give(&mut context, "words", &folder.join("out/tokenizer"), ArtifactType::Tokenizer);
    let tokenize = json!({"dataset": "data", "tokenizer": "words", "format": format});
    serde_json::from_value::<Tokenize>(tokenize).unwrap().run(&mut context).unwrap();
    folder.join("out/tokens")
}

/// All that a row of tokens was made from: instance, split, stratum, prompt and data.
pub(crate) fn about(tokens: &TokensFolder, row: usize) -> (String, String, Option<String>, String, Option<Value>) {
    let one = &tokens.rows[row];
    let (prompt, data) = (tokens.prompt(row).unwrap().to_owned(), tokens.data(row).unwrap().cloned());
    (one.instance.to_string(), one.split.to_string(), one.stratum.as_deref().map(str::to_owned), prompt, data)
}

/// A completion as a training or an evaluation stores it.
#[derive(Clone, Debug, Default)]
pub(crate) struct Said {
    pub(crate) instance: String,
    pub(crate) prompt: String,
    pub(crate) step: i64,
    pub(crate) sample: i64,
    pub(crate) ids: Vec<i32>,
    pub(crate) turns: Option<String>,
    pub(crate) solved: f64,
    pub(crate) truncated: bool,
    /// The token limit ended it.
    pub(crate) unended: bool,
    pub(crate) kept: bool,
}

/// Writes `rollouts.parquet`, or an evaluation's `examples.parquet` of one or several completions an instance.
pub(crate) fn store_completions(folder: &Path, is_training: bool, said: &[Said]) {
    use ColumnType::{Flag, Integer, Integers, Number, Numbers, Text};
    let text = |value: &dyn Fn(&Said) -> String| Column::text(said.iter().map(value));
    let integer = |value: &dyn Fn(&Said) -> i64| Column::integer(said.iter().map(value));
    let number = |value: &dyn Fn(&Said) -> f64| Column::Number(said.iter().map(|one| Some(value(one))).collect());
    let flag = |value: &dyn Fn(&Said) -> bool| Column::Flag(said.iter().map(value).collect());
    let mut columns = vec![
        ("instance", Text, text(&|one| one.instance.clone())),
        ("sample", Integer, integer(&|one| one.sample)),
        ("prompt", Text, text(&|one| one.prompt.clone())),
        ("completion", Text, text(&|_| "words".to_owned())),
        ("turns", Text, Column::Text(said.iter().map(|one| one.turns.clone()).collect())),
        ("ids", Integers, Column::Integers(said.iter().map(|one| one.ids.clone()).collect())),
        ("finish", Text, text(&|one| if one.unended { "length".to_owned() } else { "stop".to_owned() })),
        ("truncated", Flag, flag(&|one| one.truncated)),
    ];
    if !is_training {
        let length = number(&|one| one.ids.len() as f64);
        columns.insert(columns.len() - 1, ("completion_length", Number, length));
        if said.iter().all(|one| one.sample == 0) {
            columns.retain(|(name, ..)| !["sample", "ids"].contains(name));
        }
    }
    if is_training {
        columns.insert(0, ("step", Integer, integer(&|one| one.step)));
        columns.push(("reward_correct", Number, number(&|one| one.solved)));
        columns.push(("total", Number, number(&|one| one.solved)));
        columns.push(("advantages", Numbers, Column::Numbers(said.iter().map(|_| vec![0.0]).collect())));
    }
    columns.push(("solved", Number, number(&|one| one.solved)));
    if is_training {
        columns.push(("kept", Flag, flag(&|one| one.kept)));
    }
    let (names, values): (Vec<_>, Vec<_>) =
        columns.into_iter().map(|(name, kind, column)| ((name, kind), column)).unzip();
    let file = if is_training { "rollouts.parquet" } else { "examples.parquet" };
    let path = folder.join(file);
    if path.exists() {
        std::fs::remove_file(&path).unwrap();
    }
    let mut table = TableWriter::create(&path, &names).unwrap();
    table.write(values).unwrap();
    table.finish().unwrap();
}
