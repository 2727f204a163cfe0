//! One instance by hand: pasted or generated, played once by a checkpoint.

use std::ffi::OsString;
use std::io::Read as _;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::Args;
use crate::cli::Session;
use crate::cli::failure::Failure;
use crate::cli::show::{Found, find};
use crate::cli::stored::{Completions, Exchange};
use crate::pipeline::exec;
use crate::pipeline::stage::ArtifactType;
use crate::pipeline::store::Digest;
use crate::stages::samples::{Sample, Samples};
use crate::stages::tokens::{ROWS_FILE, TASK_FILE};
use crate::tasks::{self, Finish, FormatSpec, Measurements, Task, TaskSpec, maze};

/// Tokens in a reply where neither the stage nor the user says.
const MAX_NEW_TOKENS: u64 = 128;

/// What the worker is asked.
#[derive(Serialize)]
struct Asked {
    model: PathBuf,
    tokens: PathBuf,
    instances: Vec<Value>,
    samples: u64,
    temperature: f64,
    max_new_tokens: u64,
    seed: u64,
}

/// What the worker answers, a line an episode.
#[derive(Deserialize)]
struct Played {
    prompt: String,
    turns: Vec<Exchange>,
    finish: Finish,
    measurements: Measurements,
}

/// The task of tokens, as their folder says it.
#[derive(Deserialize)]
struct TaskFile {
    task: Option<TaskSpec>,
    format: Option<FormatSpec>,
}

/// Lets a checkpoint play the instance that is asked for.
pub(super) fn play(args: &Args, session: &Session) -> Result<Completions, Failure> {
    let found = find(&args.target, &args.sets, session)?;
    let (model, tokens) = (model(&found, &args.target)?, tokens(&found, &args.target)?);
    let instance = instance(args, &tokens)?;
    let of_stage = found.manifest().params.get("max_new_tokens").and_then(Value::as_u64);
    let asked = Asked {
        model,
        tokens,
        instances: vec![instance.clone()],
        samples: if args.temperature > 0.0 { args.count.unwrap_or(1) as u64 } else { 1 },
        temperature: args.temperature,
        max_new_tokens: args.max_new_tokens.or(of_stage).unwrap_or(MAX_NEW_TOKENS),
        seed: args.seed,
    };
    let played = ask(&asked, &args.device)?;
    let name =
        args.generate.map_or_else(|| "by hand".to_owned(), |index| format!("number {index} of seed {}", args.seed));
    Ok(completions(played, &instance, &name))
}

/// The checkpoint that a stage has made, or that it was given.
fn model(found: &Found<'_>, target: &str) -> Result<PathBuf, Failure> {
    let store = found.result().store;
    if found.names_output() {
        return Ok(store.object(&found.output()?.digest));
    }
    let made = found.manifest().outputs.iter().find(|output| output.artifact == ArtifactType::Checkpoint);
    let given = || input(found, |folder| folder.join("config.json").exists());
    made.map(|output| store.object(&output.digest)).or_else(given).ok_or_else(|| {
        Failure::wrong(format!("`{target}` has no model")).hint("name an `sft`, a `grpo` or an `evaluate` stage")
    })
}

/// The tokens that it was trained or measured on: they say how the task is written.
fn tokens(found: &Found<'_>, target: &str) -> Result<PathBuf, Failure> {
    input(found, |folder| folder.join(TASK_FILE).exists() && folder.join(ROWS_FILE).exists()).ok_or_else(|| {
        Failure::wrong(format!("`{target}` was given no tokens, so nobody knows how its task is written"))
            .hint("name an `sft`, a `grpo` or an `evaluate` stage")
    })
}

fn input(found: &Found<'_>, is_wanted: impl Fn(&Path) -> bool) -> Option<PathBuf> {
    let folder = |digest: &Digest| found.result().store.object(digest);
    found.manifest().inputs.values().map(folder).find(|folder| is_wanted(folder))
}

/// The instance that was pasted, or that is drawn.
fn instance(args: &Args, tokens: &Path) -> Result<Value, Failure> {
    if let Some(index) = args.generate {
        let task = task(tokens)?;
        let mut drawn = task.generate(args.seed, index..index + 1).map_err(|error| Failure::stage(error.as_ref()))?;
        return Ok(drawn.remove(0));
    }
    let path = args.prompt.as_deref().unwrap_or(Path::new("-"));
    let text = if path == Path::new("-") {
        let mut text = String::new();
        std::io::stdin().read_to_string(&mut text).map(|_| text)
    } else {
        std::fs::read_to_string(path)
    };
    let text = text.map_err(|error| Failure::wrong(format!("cannot read `{}`: {error}", path.display())))?;
    read(&text).map_err(|why| {
        Failure::wrong(format!("`{}` is no instance: {why}", path.display())).hint(
            "it is an instance as JSON (`pipe inspect` shows some in `data`), or a maze as `pipe sample` draws it",
        )
    })
}

/// An instance as JSON, or a drawn maze.
fn read(text: &str) -> Result<Value, String> {
    if text.trim_start().starts_with('{') {
        return serde_json::from_str(text).map_err(|error| error.to_string());
    }
    maze::drawing::drawn::read(text).map_err(|error| format!("{error:#}"))
}

fn task(tokens: &Path) -> Result<Box<dyn Task>, Failure> {
    let path = tokens.join(TASK_FILE);
    let failed = |error: String| Failure::failed(format!("cannot read `{}`: {error}", path.display()));
    let file = std::fs::read(&path).map_err(|error| failed(error.to_string()))?;
    let file: TaskFile = serde_json::from_slice(&file).map_err(|error| failed(error.to_string()))?;
    let (Some(task), Some(format)) = (file.task, file.format) else {
        return Err(Failure::wrong("the tokens have no task, so no instance can be drawn"));
    };
    tasks::open(&task.stored_in(tokens), &format).map_err(|error| Failure::stage(error.as_ref()))
}

fn ask(asked: &Asked, device: &str) -> Result<Vec<Played>, Failure> {
    let failed = |error: std::io::Error| Failure::failed(format!("cannot hand the instance over: {error}"));
    let file = tempfile::NamedTempFile::new().map_err(failed)?;
    std::fs::write(file.path(), serde_json::to_vec(asked).expect("an instance is plain data")).map_err(failed)?;
    let arguments = [OsString::from("play"), "--device".into(), device.into(), "--".into(), file.path().into()];
    let output = exec::worker_output(&arguments).map_err(|error| Failure::stage(&error))?;
    match output.status.code() {
        Some(0) => {}
        // It has said why.
        Some(code) => return Err(Failure::silent(u8::try_from(code).unwrap_or(1))),
        None => return Err(Failure::failed(format!("`pipe-worker` did not finish: {}", output.status))),
    }
    let lines = String::from_utf8_lossy(&output.stdout);
    let read = |line: &str| {
        serde_json::from_str(line).map_err(|error| Failure::failed(format!("`pipe-worker` answers `{line}`: {error}")))
    };
    lines.lines().map(read).collect()
}

/// Episodes as stored completions are.
fn completions(played: Vec<Played>, instance: &Value, name: &str) -> Completions {
    let mut completions = Completions::default();
    let measures = played.first().map(|one| one.measurements.keys().cloned().collect());
    completions.samples = Samples { measures: measures.unwrap_or_default(), ..Samples::default() };
    for (number, one) in played.into_iter().enumerate() {
        let said = one.turns.iter().map(|turn| turn.text.as_str());
        completions.samples.rows.push(Sample {
            step: 0,
            sample: number as i64,
            instance: name.to_owned(),
            data: instance.clone(),
            prompt: one.prompt,
            completion: said.collect(),
            finish: one.finish,
            truncated: one.finish != Finish::Stop,
            lengths: Vec::new(),
            ids: Vec::new(),
            replies: Vec::new(),
            kept: true,
            turns: vec![one.measurements.clone()],
            measurements: one.measurements,
            rewards: Vec::new(),
            total: None,
        });
        completions.exchanges.push(one.turns);
        completions.advantages.push(Vec::new());
        completions.kept.push(true);
    }
    completions
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_instance_is_json_or_a_drawing() {
        let drawn = read("┌───────┐\n│ O   T │\n│   ╷   │\n│   │   │\n└───┴───┘\n").unwrap();
        assert_eq!((&drawn["columns"], &drawn["length"]), (&2.into(), &1.into()));
        assert_eq!(read(&drawn.to_string()), Ok(drawn));
        assert!(read("{\"rows\": ").unwrap_err().contains("EOF"));
        assert!(read("a maze").unwrap_err().contains("odd number of lines"));
    }

    #[test]
    fn episodes_are_told_as_stored_completions_are() {
        let line = r#"{"instance": 0, "prompt": "p", "finish": "stop", "measurements": {"solved": 1.0, "steps": 2.0},
                       "turns": [{"observation": "", "begin": 0, "end": 1, "text": "a", "finish": "stop", "measurements": {}}]}"#;
        let all = completions(vec![serde_json::from_str(line).unwrap()], &Value::Null, "by hand");
        assert_eq!((all.rows()[0].completion.as_str(), all.is_solved(0)), ("a", Some(true)));
        assert_eq!(all.samples.measures, ["solved", "steps"]);
    }
}
