//! What tests of the loops share: a tiny flow of real stages (mazes, tokenizer, tokens, model), and ways to run a stage
//! on it that is interrupted or killed at a chosen event.

use std::collections::BTreeMap;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{LazyLock, Mutex};
use std::time::Duration;

use pipe::pipeline::stage::{ArtifactType, InputArtifact, Interrupted, Resources, StageContext, StageEvent};
use pipe::stages::KINDS;
use serde_json::{Value, json};

use super::RUNNERS;

/// How an attempt ends before its time.
#[derive(Clone, Copy, Debug)]
pub(super) enum End {
    /// Not at all.
    Never,
    /// It is asked to stop at this event and saves.
    Interrupt(usize),
    /// It dies at this event, with nothing saved.
    Kill(usize),
}

/// Folders of artifacts by the name under which stages refer to them.
pub(super) struct Flow {
    root: tempfile::TempDir,
    inputs: BTreeMap<String, InputArtifact>,
}

/// One stage in a folder of its own, run in any number of attempts.
pub(super) struct Job<'a> {
    flow: &'a Flow,
    kind: &'a str,
    params: Value,
    folder: tempfile::TempDir,
    /// Wall seconds between saves.
    pub(super) save_every: Duration,
    /// Everything that the attempts told.
    pub(super) events: Arc<Mutex<Vec<StageEvent>>>,
}

/// The flow that most tests share; its model `policy` has learned the form of an answer and little else.
pub(super) static FLOW: LazyLock<Flow> = LazyLock::new(|| {
    let task = json!({"kind": "maze", "rows": 3, "columns": 3});
    let format = json!({"kind": "compact", "trace": "direct"});
    let mut flow = Flow { root: tempfile::tempdir().unwrap(), inputs: BTreeMap::new() };
    let splits = json!({"train": 48, "rl": 20, "validation": 10, "test": 14});
    flow.add("mazes", "synthesize", &json!({"task": task, "splits": splits}));
    flow.add("tokenizer", "tokenizer", &json!({"task": task, "format": format}));
    flow.add("tokens", "tokenize", &json!({"dataset": "mazes", "tokenizer": "tokenizer", "format": format}));
    let architecture = json!({
        "kind": "qwen2", "hidden_size": 16, "layers": 1, "heads": 2, "intermediate_size": 32,
        "max_position_embeddings": 48
    });
    flow.add("base", "model", &json!({"tokenizer": "tokenizer", "architecture": architecture, "seed": 1}));
    let sft = json!({"model": "base", "data": "tokens", "steps": 60, "batch_size": 8, "learning_rate": 1e-2});
    flow.add("policy", "sft", &sft);
    flow
});

/// A flow over episodes of several turns: number lines, whose model is as it was drawn.
pub(super) static LINES: LazyLock<Flow> = LazyLock::new(|| {
    let task = json!({"kind": "number_line", "max_position": 9, "max_turns": 4});
    let format = json!({"kind": "json", "thoughts": false});
    let mut flow = Flow { root: tempfile::tempdir().unwrap(), inputs: BTreeMap::new() };
    let splits = json!({"train": 48, "rl": 20, "validation": 10, "test": 14});
    flow.add("lines", "synthesize", &json!({"task": task, "splits": splits, "unique": false, "max_length": 4}));
    flow.add("tokenizer", "tokenizer", &json!({"task": task, "format": format}));
    flow.add("tokens", "tokenize", &json!({"dataset": "lines", "tokenizer": "tokenizer", "format": format}));
    let architecture = json!({
        "kind": "qwen2", "hidden_size": 16, "layers": 1, "heads": 2, "intermediate_size": 32,
        "max_position_embeddings": 224
    });
    flow.add("base", "model", &json!({"tokenizer": "tokenizer", "architecture": architecture, "seed": 1}));
    let sft = json!({"model": "base", "data": "tokens", "steps": 60, "batch_size": 8, "learning_rate": 1e-2});
    flow.add("policy", "sft", &sft);
    flow
});

impl Flow {
    /// Runs a stage to its end and keeps its first output under `name`.
    fn add(&mut self, name: &str, kind: &str, params: &Value) {
        let out = self.root.path().join(name);
        let job = Job::new(self, kind, params.clone());
        job.attempt(End::Never, &out).unwrap();
        let first = job.outputs().remove(0);
        self.inputs.insert(
            name.to_owned(),
            InputArtifact { path: out.join(&first.name), digest: String::new(), artifact: first.artifact },
        );
    }

    /// The folder of an artifact.
    pub(super) fn path(&self, name: &str) -> &Path {
        &self.inputs[name].path
    }

    /// The same flow with one more artifact.
    pub(super) fn with(&self, name: &str, path: &Path, artifact: ArtifactType) -> Self {
        let mut inputs = self.inputs.clone();
        inputs.insert(name.to_owned(), InputArtifact { path: path.to_owned(), digest: String::new(), artifact });
        Self { root: tempfile::tempdir().unwrap(), inputs }
    }
}

impl<'a> Job<'a> {
    pub(super) fn new(flow: &'a Flow, kind: &'a str, params: Value) -> Self {
        let folder = tempfile::tempdir().unwrap();
        Self { flow, kind, params, folder, save_every: Duration::from_secs(3600), events: Arc::default() }
    }

    fn stage(&self) -> Arc<dyn pipe::pipeline::stage::AnyStage> {
        let kind = KINDS.iter().find(|kind| kind.name == self.kind).unwrap();
        (kind.parse)(self.params.clone()).unwrap()
    }

    fn outputs(&self) -> Vec<pipe::pipeline::stage::Output> {
        self.stage().outputs()
    }

    /// Where the stage's logs lie.
    pub(super) fn logs(&self) -> PathBuf {
        self.folder.path().join("logs")
    }

    /// Where the outputs of the last whole run lie.
    pub(super) fn out(&self) -> PathBuf {
        self.folder.path().join("out")
    }

    /// One attempt with its outputs in `out`, which is emptied first, as the executor would.
    pub(super) fn attempt(&self, end: End, out: &Path) -> anyhow::Result<()> {
        let (stage, interrupt) = (self.stage(), Arc::new(AtomicBool::new(false)));
        if out.exists() {
            std::fs::remove_dir_all(out).unwrap();
        }
        for output in stage.outputs() {
            std::fs::create_dir_all(out.join(output.name)).unwrap();
        }
        let (work, logs) = (self.folder.path().join("work"), self.logs());
        std::fs::create_dir_all(&work).unwrap();
        std::fs::create_dir_all(&logs).unwrap();
        let (flag, told, mut count) = (Arc::clone(&interrupt), Arc::clone(&self.events), 0);
        let mut context = StageContext {
            inputs: self.flow.inputs.clone(),
            out: out.to_owned(),
            work,
            logs,
            resources: Resources {
                device: "cpu".to_owned(),
                threads: 2,
                visible_devices: None,
                save_every: self.save_every,
            },
            interrupt,
            events: Box::new(move |event| {
                told.lock().unwrap().push(event);
                count += 1;
                match end {
                    End::Interrupt(at) if at == count => flag.store(true, Ordering::Relaxed),
                    End::Kill(at) if at == count => std::panic::resume_unwind(Box::new("killed")),
                    _ => {}
                }
            }),
        };
        match RUNNERS.iter().find(|(name, _)| *name == self.kind) {
            Some((_, runner)) => runner(&stage.params(), &mut context),
            None => stage.run(&mut context),
        }
    }

    /// Runs to the end, the n-th attempt ending early as the n-th of `ends` says; gives the digest of the outputs.
    pub(super) fn run(&self, ends: &[End]) -> anyhow::Result<String> {
        for end in ends.iter().chain(&[End::Never]) {
            let attempt = catch_unwind(AssertUnwindSafe(|| self.attempt(*end, &self.out())));
            match (attempt, end) {
                (Ok(Ok(())), _) => return Ok(digest(&self.out())),
                (Ok(Err(error)), End::Interrupt(_)) if error.is::<Interrupted>() => {}
                (Ok(Err(error)), _) => return Err(error),
                (Err(_), End::Kill(_)) => {}
                (Err(panic), _) => std::panic::resume_unwind(panic),
            }
        }
        unreachable!("the last attempt ends or fails")
    }

    /// How many events a run that is never stopped tells.
    pub(super) fn count(&self) -> usize {
        self.events.lock().unwrap().len()
    }

    /// The lines of `metrics.jsonl` without what it cost.
    pub(super) fn metrics(&self) -> Vec<Value> {
        let text = std::fs::read_to_string(self.logs().join("metrics.jsonl")).unwrap();
        let mut lines: Vec<Value> = text.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
        for line in &mut lines {
            line.as_object_mut()
                .unwrap()
                .retain(|name, _| !crate::phases::COSTS.iter().any(|cost| name.starts_with(cost)));
        }
        lines
    }
}

/// The digest of every path and byte below a folder.
pub(super) fn digest(folder: &Path) -> String {
    let (mut files, mut folders) = (Vec::new(), vec![folder.to_owned()]);
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
        hasher.update(&[0]);
        hasher.update(blake3::hash(&std::fs::read(&file).unwrap()).as_bytes());
    }
    hasher.finalize().to_hex().to_string()
}
