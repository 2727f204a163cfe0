//! A task that is a program of the user's: any executable that answers JSON lines (`program` has the protocol).
//!
//! Requests name their call: `generate`, `reset`, `step`, `verdict`, `demonstrate`. The program is started at the first
//! call and answers for many episodes at a time. What it answers must be a pure function of what it was asked: instances
//! of seed and index, episodes of instance, seed and replies. An instance may say of itself in `canonical` (a string) what
//! must not be split apart, in `stratum` the class it is counted in and in `length` how long it is.

use std::collections::BTreeMap;
use std::ops::Range;
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use anyhow::{Context as _, bail, ensure};
use schemars::JsonSchema;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use crate::file::{PlacedFile, lay_out, misplaced};
use crate::program::{Launch, Program, ProgramError};
use crate::tasks::maze::{BEGIN, END, PAD};
use crate::tasks::{Episodes, FormatSpec, Measure, Measurements, Reply, Start, Task, Turn};

/// The version of the protocol and of what is made of its answers.
pub const VERSION: u32 = 1;
/// The version of the format `plain`.
pub const PLAIN_VERSION: u32 = 1;
/// The folder of an artifact that holds a program's files.
const FOLDER: &str = "program";
/// Lists of calls and of answers differ in length by a mistake of the program.
const CALLS: &str = "generate, reset, step, verdict and demonstrate";

/// A program and what it promises.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct ProgramTask {
    /// The program and its arguments; it answers `generate`, `reset`, `step`, `verdict` and `demonstrate`.
    pub command: Vec<String>,
    /// The files in its working folder, at the places where they lie beside the TOML file.
    #[serde(default)]
    pub files: Vec<PlacedFile>,
    /// The names of the measurements in every verdict; `solved` is one of them.
    pub measures: Vec<String>,
    /// Turns in an episode, at most.
    #[serde(default = "one")]
    #[schemars(range(min = 1))]
    pub max_turns: u64,
    /// Every token that observations and replies are made of, for a tokenizer made from the task; the longest that fits
    /// is taken first.
    #[serde(default)]
    pub vocabulary: Vec<String>,
    /// Seconds that the program may take for an answer.
    #[serde(default = "minute")]
    #[schemars(range(min = 1))]
    pub timeout_seconds: u64,
}

fn one() -> u64 {
    1
}

fn minute() -> u64 {
    60
}

impl ProgramTask {
    /// What verdicts measure.
    pub fn measurements(&self) -> Vec<Measure> {
        let measure =
            |name: &String| Measure { name: name.clone().into(), meaning: "as the program measures it".into() };
        self.measures.iter().map(measure).collect()
    }

    /// The same with the program's files below the folder of an artifact that [`ProgramTask::store`] has written.
    #[must_use]
    pub fn stored_in(&self, folder: &Path) -> Self {
        let path = |file: &PlacedFile| folder.join(FOLDER).join(&file.placed);
        let files = self.files.iter().map(|file| PlacedFile { path: path(file), placed: file.placed.clone() });
        Self { files: files.collect(), ..self.clone() }
    }

    /// Copies the program's files into the folder of an artifact; gives the task as its `task.json` names it, free of
    /// this machine's paths.
    pub fn store(&self, folder: &Path) -> anyhow::Result<Self> {
        lay_out(&self.files, &folder.join(FOLDER)).context("storing the task's program")?;
        let file = |file: &PlacedFile| PlacedFile { path: file.placed.clone().into(), placed: file.placed.clone() };
        Ok(Self { files: self.files.iter().map(file).collect(), ..self.clone() })
    }

    /// Opens the task; the program is started when it is first asked, and `interrupt` ends its calls early.
    pub fn open(&self, format: &FormatSpec, interrupt: Option<Arc<AtomicBool>>) -> anyhow::Result<impl Task + use<>> {
        ensure!(
            matches!(format, FormatSpec::Plain {}),
            "a program writes its own text: set `format = {{ kind = \"plain\" }}`"
        );
        ensure!(!self.command.is_empty(), "`command` names no program");
        ensure!(self.measures.iter().any(|name| name == "solved"), "`measures` must name `solved`");
        if let Some(wrong) = misplaced(&self.files).first() {
            bail!("{}", wrong.message);
        }
        let server = Server { task: self.clone(), interrupt, started: Mutex::new(None), episodes: AtomicU64::new(0) };
        Ok(Remote { server: Arc::new(server), measures: self.measurements() })
    }
}

/// The program, one for all episodes.
struct Server {
    task: ProgramTask,
    interrupt: Option<Arc<AtomicBool>>,
    started: Mutex<Option<Started>>,
    /// Episodes begun so far; each has a number of its own.
    episodes: AtomicU64,
}

/// The program once it runs.
struct Started {
    program: Program,
    /// Requests so far; each has its number, so that an answer can name its request.
    requests: u64,
    /// What was asked when the program failed, and how it did: the cause of all that fails later.
    failed: Option<(String, ProgramError)>,
}

impl Server {
    /// Asks for `count` answers in the field `field`. After an error every call ends with that error.
    fn ask<A: DeserializeOwned>(&self, request: Value, field: &str, count: usize) -> anyhow::Result<Vec<A>> {
        let mut guard = self.started.lock().unwrap_or_else(PoisonError::into_inner);
        let started = match &mut *guard {
            Some(started) => started,
            none => {
                let ProgramTask { command, files, timeout_seconds, .. } = &self.task;
                let (timeout, interrupt) = (Duration::from_secs(*timeout_seconds), self.interrupt.clone());
                let program = Program::start(&Launch { command, files, timeout, interrupt })?;
                none.insert(Started { program, requests: 0, failed: None })
            }
        };
        if let Some((call, error)) = &started.failed {
            return Err(error.clone()).context(call.clone());
        }
        let call = format!("asking the task's program to `{}`", request["call"].as_str().unwrap_or(CALLS));
        started.ask(request, field, count).map_err(|error| {
            started.failed = Some((call.clone(), error.clone()));
            anyhow::Error::from(error).context(call)
        })
    }
}

impl Started {
    fn ask<A: DeserializeOwned>(
        &mut self,
        mut request: Value,
        field: &str,
        count: usize,
    ) -> Result<Vec<A>, ProgramError> {
        let number = self.requests;
        self.requests += 1;
        request["request"] = number.into();
        let mut answer: BTreeMap<String, Value> = self.program.call(&request)?;
        if let Some(other) = answer.remove("request").filter(|named| *named != number) {
            return Err(self.program.refuse(format!("answered the request {other}, but {number} was asked")));
        }
        let Some(answers) = answer.remove(field) else {
            return Err(self.program.refuse(format!("answered without `{field}`")));
        };
        let answers: Vec<A> = serde_json::from_value(answers)
            .map_err(|error| self.program.refuse(format!("answered with other `{field}`: {error}")))?;
        if answers.len() != count {
            let what = format!("answered with {} `{field}`, but {count} were asked for", answers.len());
            return Err(self.program.refuse(what));
        }
        Ok(answers)
    }
}

/// The task on this side of the pipe.
struct Remote {
    server: Arc<Server>,
    measures: Vec<Measure>,
}

impl Task for Remote {
    fn generate(&self, seed: u64, indices: Range<u64>) -> anyhow::Result<Vec<Value>> {
        let indices: Vec<u64> = indices.collect();
        let request = json!({"call": "generate", "seed": seed, "indices": indices});
        self.server.ask(request, "instances", indices.len())
    }

    fn canonical(&self, instance: &Value) -> anyhow::Result<Vec<u8>> {
        match instance.get("canonical") {
            Some(Value::String(text)) => Ok(text.clone().into_bytes()),
            Some(other) => bail!("`canonical` of an instance is a string, not `{other}`"),
            // The keys of an object are sorted, so equal instances have equal text.
            None => Ok(instance.to_string().into_bytes()),
        }
    }

    fn begin(&self, starts: &[Start<'_>]) -> anyhow::Result<Box<dyn Episodes>> {
        let first = self.server.episodes.fetch_add(starts.len() as u64, Ordering::Relaxed);
        let ids: Vec<u64> = (first..first + starts.len() as u64).collect();
        let episodes: Vec<Value> = ids
            .iter()
            .zip(starts)
            .map(|(id, start)| json!({"id": id, "instance": start.instance, "seed": start.seed}))
            .collect();
        let request = json!({"call": "reset", "episodes": episodes});
        let observations = self.server.ask(request, "observations", starts.len())?;
        Ok(Box::new(RemoteEpisodes { server: Arc::clone(&self.server), ids, observations }))
    }

    fn demonstrate(&self, instance: &Value, seed: u64) -> anyhow::Result<Vec<String>> {
        let request = json!({"call": "demonstrate", "demonstrations": [{"instance": instance, "seed": seed}]});
        let mut replies: Vec<Option<Vec<String>>> = self.server.ask(request, "replies", 1)?;
        Ok(replies.remove(0).unwrap_or_default())
    }

    fn vocabulary(&self) -> Vec<String> {
        let mut tokens: Vec<String> = [PAD, BEGIN, END].map(str::to_owned).into();
        for token in &self.server.task.vocabulary {
            if !tokens.contains(token) {
                tokens.push(token.clone());
            }
        }
        tokens
    }

    fn pieces(&self) -> String {
        let mut tokens = self.vocabulary();
        tokens.sort_by_key(|token| std::cmp::Reverse(token.len()));
        tokens.iter().map(|token| escape(token)).collect::<Vec<_>>().join("|")
    }

    fn measures(&self) -> &[Measure] {
        &self.measures
    }

    fn max_turns(&self) -> usize {
        self.server.task.max_turns as usize
    }

    fn stratum(&self, instance: &Value) -> Option<String> {
        Some(instance.get("stratum")?.as_str()?.to_owned())
    }
}

/// A text as a regular expression that matches it alone.
fn escape(text: &str) -> String {
    text.chars()
        .flat_map(|character| {
            let special = r"\.+*?()|[]{}^$#&-~/".contains(character);
            special.then_some('\\').into_iter().chain([character])
        })
        .collect()
}

/// Episodes that the program plays.
struct RemoteEpisodes {
    server: Arc<Server>,
    /// The program's numbers of the episodes.
    ids: Vec<u64>,
    observations: Vec<String>,
}

/// What a program says of a turn.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Answer {
    #[serde(default)]
    observation: String,
    terminated: bool,
    truncated: bool,
    #[serde(default)]
    measurements: Measurements,
}

impl Episodes for RemoteEpisodes {
    fn observe(&mut self) -> anyhow::Result<Vec<String>> {
        Ok(self.observations.clone())
    }

    fn step(&mut self, replies: &[Reply<'_>]) -> anyhow::Result<Vec<Turn>> {
        if replies.is_empty() {
            return Ok(Vec::new());
        }
        let said =
            |reply: &Reply<'_>| json!({"id": self.ids[reply.episode], "text": reply.text, "finish": reply.finish});
        let request = json!({"call": "step", "replies": replies.iter().map(said).collect::<Vec<_>>()});
        let answers: Vec<Answer> = self.server.ask(request, "turns", replies.len())?;
        let turn = |Answer { observation, terminated, truncated, measurements }| Turn {
            measurements,
            terminated,
            truncated,
            observation,
        };
        Ok(answers.into_iter().map(turn).collect())
    }

    fn verdicts(&mut self) -> anyhow::Result<Vec<Measurements>> {
        let verdicts = self.server.ask(json!({"call": "verdict", "ids": self.ids}), "verdicts", self.ids.len())?;
        for verdict in &verdicts {
            let verdict: &Measurements = verdict;
            for name in &self.server.task.measures {
                ensure!(verdict.contains_key(name), "the task's program gave a verdict without `{name}`: {verdict:?}");
            }
        }
        Ok(verdicts)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tasks::{Finish, TaskSpec, open, open_with, replay};

    /// The task that the documentation shows, in a folder of its own.
    fn sums(folder: &Path, change: impl Fn(&str) -> String) -> TaskSpec {
        let page = include_str!("../../docs/programs.md");
        let text = page.split("```python\n").nth(2).expect("the second example").split("```").next().expect("its end");
        std::fs::write(folder.join("sums.py"), change(text)).unwrap();
        let words: Vec<String> = (0..10).map(|digit| digit.to_string()).chain([" + ".into(), " =".into()]).collect();
        let task = json!({
            "kind": "program", "command": ["python3", "sums.py"], "measures": ["solved"], "vocabulary": words,
            "files": [{"$file": folder.join("sums.py"), "as": "sums.py"}], "timeout_seconds": 20
        });
        serde_json::from_value(task).unwrap()
    }

    fn opened(folder: &Path, change: impl Fn(&str) -> String) -> Box<dyn Task> {
        open(&sums(folder, change), &FormatSpec::Plain {}).unwrap()
    }

    #[test]
    fn the_documented_task_generates_demonstrates_and_judges() {
        let folder = tempfile::tempdir().unwrap();
        let task = opened(folder.path(), str::to_owned);
        let instances = task.generate(7, 3..8).unwrap();
        assert_eq!(instances, opened(folder.path(), str::to_owned).generate(7, 3..8).unwrap());
        assert_eq!(instances[2..], task.generate(7, 5..8).unwrap());
        for instance in &instances {
            let start = Start { instance, seed: 0 };
            let observation = task.begin(&[start]).unwrap().observe().unwrap().remove(0);
            assert_eq!(observation, format!("{} + {} =", instance["a"], instance["b"]));
            let right = task.demonstrate(instance, 0).unwrap();
            assert_eq!(replay(&*task, start, &right, Finish::Stop).unwrap().1["solved"].to_bits(), 1f64.to_bits());
            let (turns, verdict) = replay(&*task, start, &["99".to_owned()], Finish::Stop).unwrap();
            assert_eq!((turns.len(), turns[0].terminated, verdict["solved"].to_bits()), (1, true, 0f64.to_bits()));
            assert_eq!(task.canonical(instance).unwrap(), instance.to_string().into_bytes());
        }
        assert_eq!(task.pieces().split('|').count(), 15 + 6, "three specials with two escaped bars each");
        assert!(task.pieces().contains(r" \+ "));
    }

    #[test]
    fn episodes_are_played_side_by_side_in_few_calls() {
        let folder = tempfile::tempdir().unwrap();
        let task = opened(folder.path(), str::to_owned);
        let instances = task.generate(1, 0..50).unwrap();
        let starts: Vec<Start<'_>> = instances.iter().map(|instance| Start { instance, seed: 0 }).collect();
        let (mut one, mut other) = (task.begin(&starts).unwrap(), task.begin(&starts[..10]).unwrap());
        let text = |instance: &Value| (instance["a"].as_u64().unwrap() + instance["b"].as_u64().unwrap()).to_string();
        let texts: Vec<String> = instances.iter().map(text).collect();
        let finish = Finish::Stop;
        let replies: Vec<Reply<'_>> =
            texts.iter().enumerate().map(|(episode, text)| Reply { episode, text, finish }).collect();
        other.step(&[Reply { episode: 3, text: "no", finish }]).unwrap();
        assert_eq!(one.step(&replies).unwrap().len(), 50);
        assert!(one.verdicts().unwrap().iter().all(|verdict| verdict["solved"] > 0.5));
        assert!(other.verdicts().unwrap().iter().all(|verdict| verdict["solved"] < 0.5));
    }

    #[test]
    fn wrong_answers_name_the_call_and_the_mistake() {
        let folder = tempfile::tempdir().unwrap();
        let error = |from: &str, to: &str| {
            let task = opened(folder.path(), |text| {
                assert!(text.contains(from), "the example has no `{from}`");
                text.replace(from, to)
            });
            let instance = json!({"a": 1, "b": 2});
            let play = || {
                task.generate(0, 0..2)?;
                replay(&*task, Start { instance: &instance, seed: 0 }, &["3".to_owned()], Finish::Stop)
            };
            format!("{:#}", play().expect_err(to))
        };
        assert!(error("ask[\"indices\"]", "ask[\"indices\"][1:]").contains("`generate`"));
        assert!(error("ask[\"indices\"]", "ask[\"indices\"][1:]").contains("1 `instances`, but 2 were asked for"));
        assert!(error("\"terminated\": True", "\"terminated\": 3").contains("other `turns`"));
        assert!(error("{\"solved\": episodes.pop", "{\"soled\": episodes.pop").contains("without `solved`"));
        assert!(error("\"verdicts\"", "\"verdict\"").contains("without `verdicts`"));
        assert!(error("float(", "flat(").contains("NameError"));
    }

    #[test]
    fn every_call_after_a_failure_ends_with_its_cause() {
        let folder = tempfile::tempdir().unwrap();
        let task = opened(folder.path(), |text| text.replace("float(", "flat("));
        let instance = json!({"a": 1, "b": 2});
        let start = Start { instance: &instance, seed: 0 };
        let first = format!("{:#}", replay(&*task, start, &["3".to_owned()], Finish::Stop).unwrap_err());
        assert!(first.contains("`step`") && first.contains("NameError"), "{first}");
        assert_eq!(format!("{:#}", task.generate(0, 0..1).unwrap_err()), first);
    }

    #[test]
    fn an_answer_to_another_request_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let echoing = |number: &str| {
            let with = format!("json.dumps({{**answer(it := json.loads(line)), \"request\": {number}}})");
            let task = opened(folder.path(), |text| text.replace("json.dumps(answer(json.loads(line)))", &with));
            task.generate(0, 0..1)?;
            task.generate(0, 0..1)
        };
        echoing("it[\"request\"]").unwrap();
        let error = format!("{:#}", echoing("0").unwrap_err());
        assert!(error.contains("answered the request 0, but 1 was asked"), "{error}");
    }

    #[test]
    fn an_interrupt_ends_a_call() {
        let folder = tempfile::tempdir().unwrap();
        let interrupt = Arc::new(AtomicBool::new(true));
        let spec = sums(folder.path(), |text| format!("import time\ntime.sleep(100)\n{text}"));
        let task = open_with(&spec, &FormatSpec::Plain {}, &interrupt).unwrap();
        let error = task.generate(0, 0..1).unwrap_err();
        assert_eq!(error.downcast_ref::<ProgramError>(), Some(&ProgramError::Interrupted));
    }

    #[test]
    fn the_program_travels_inside_artifacts_without_this_machines_paths() {
        let (source, artifact) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let stored = sums(source.path(), str::to_owned).store(artifact.path()).unwrap();
        let text = serde_json::to_string(&stored).unwrap();
        assert!(!text.contains(source.path().to_str().unwrap()), "{text}");
        drop(source);
        let read: TaskSpec = serde_json::from_str(&text).unwrap();
        let task = open(&read.stored_in(artifact.path()), &FormatSpec::Plain {}).unwrap();
        assert_eq!(task.generate(0, 0..1).unwrap().len(), 1);
    }

    #[test]
    fn promises_that_cannot_hold_are_refused_when_it_is_opened() {
        let folder = tempfile::tempdir().unwrap();
        let TaskSpec::Program(good) = sums(folder.path(), str::to_owned) else { panic!("a program") };
        let refuse = |task: ProgramTask, says: &str| {
            let error = open(&TaskSpec::Program(task), &FormatSpec::Plain {}).err().unwrap().to_string();
            assert!(error.contains(says), "{error}");
        };
        refuse(ProgramTask { command: vec![], ..good.clone() }, "`command`");
        refuse(ProgramTask { measures: vec!["right".into()], ..good.clone() }, "`solved`");
        let spec = TaskSpec::Program(good);
        assert!(open(&spec, &FormatSpec::default()).err().unwrap().to_string().contains("plain"));
    }
}
