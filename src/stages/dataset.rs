//! `dataset`: a user's own rows, from JSON lines or Parquet, as a data set that the other kinds read.
//!
//! A file has a text column (the whole text is to be learnt), a prompt and a completion column, or a column of messages
//! (a conversation, which the tokenizer's chat template writes). With a `task`, prompts that show its instances, as those of
//! a published bench, are read back into instances: stages that follow write them anew and judge by simulation. Whatever is not plain text in the right place is an error
//! that names file and line; nothing is skipped or guessed.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{BufRead as _, BufReader};
use std::path::Path;

use anyhow::{Context as _, bail, ensure};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use crate::pipeline::stage::{ArtifactType, Output, Part, Problem, SourceFile, Stage, StageContext, Upstream};
use crate::stages::chat::Message;
use crate::stages::synthesize::{self, instance_id, is_plain_name, write_task};
use crate::stages::table::{self, Column, ColumnType, TableWriter};
use crate::tasks::{Drawn, Task, TaskSpec, open, open_with};

/// Rows written at a time.
const CHUNK: usize = 16_384;

/// The column of a data set that holds conversations, as JSON.
pub(crate) const MESSAGES_COLUMN: &str = "messages";

/// Take a data set from files of your own: JSON lines (`.jsonl`) or Parquet, with a text, a prompt and a completion, or
/// messages.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Dataset {
    /// A file by split, such as `{ train = "data/train.jsonl", test = "data/test.parquet" }`.
    pub files: BTreeMap<String, SourceFile>,
    /// The column with whole texts.
    #[serde(default = "Dataset::default_text_column")]
    pub text_column: String,
    /// The column with what the model reads.
    #[serde(default = "Dataset::default_prompt_column")]
    pub prompt_column: String,
    /// The column with what the model should write.
    #[serde(default = "Dataset::default_completion_column")]
    pub completion_column: String,
    /// The column with conversations: lists of `{ role, content }`.
    #[serde(default = "Dataset::default_messages_column", skip_serializing_if = "Dataset::is_default_messages_column")]
    #[schemars(extend("default" = "messages"))]
    pub messages_column: String,
    /// The task whose instances the prompts show; other columns are left aside.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub task: Option<TaskSpec>,
}

impl Dataset {
    fn default_text_column() -> String {
        "text".to_owned()
    }
    fn default_prompt_column() -> String {
        "prompt".to_owned()
    }
    fn default_completion_column() -> String {
        "completion".to_owned()
    }
    fn default_messages_column() -> String {
        MESSAGES_COLUMN.to_owned()
    }
    fn is_default_messages_column(name: &str) -> bool {
        name == MESSAGES_COLUMN
    }
}

/// How a file's rows are made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Shape {
    Text,
    Pair,
    Messages,
    /// A prompt that shows an instance of a task.
    Instance,
}

impl Shape {
    /// The columns that are written.
    fn columns(self) -> &'static [&'static str] {
        match self {
            Self::Text | Self::Pair => &["prompt", "completion"],
            Self::Messages => &[MESSAGES_COLUMN],
            Self::Instance => &["prompt"],
        }
    }
}

impl Stage for Dataset {
    const KIND: &'static str = "dataset";
    const VERSION: u32 = 1;

    fn outputs(&self) -> Vec<Output> {
        vec![Output::new("dataset", ArtifactType::Dataset)]
    }

    fn parts(&self) -> Vec<Part> {
        self.task.iter().map(TaskSpec::part).map(|(name, version)| Part::new(name, version)).collect()
    }

    fn check(&self, _: &Upstream<'_>) -> Vec<Problem> {
        let mut problems = Vec::new();
        if let Some(Err(error)) = self.task.as_ref().map(|task| open(task, &task.any_format())) {
            problems.push(Problem::new("task", error.to_string()));
        }
        if self.files.is_empty() {
            let problem = Problem::new("files", "no file is given");
            problems.push(problem.hint("write `files = { train = \"data/train.jsonl\" }`"));
        }
        for (split, file) in &self.files {
            let path = format!("files.{split}");
            if !is_plain_name(split) {
                let message =
                    format!("the split name `{split}` has other characters than letters, digits, `_` and `-`");
                problems.push(Problem::new(&path, message));
            }
            if format_of(&file.path).is_none() {
                let message = format!("`{}` is neither JSON lines nor Parquet by its name", file.path.display());
                problems.push(Problem::new(&path, message).hint("name it `.jsonl` or `.parquet`"));
            }
        }
        let columns = [
            ("text_column", &self.text_column),
            ("prompt_column", &self.prompt_column),
            ("completion_column", &self.completion_column),
            ("messages_column", &self.messages_column),
        ];
        for (at, (field, name)) in columns.iter().enumerate() {
            if let Some((other, _)) = columns[..at].iter().find(|(_, earlier)| earlier == name) {
                problems.push(Problem::new(*field, format!("`{field}` and `{other}` are one column, `{name}`")));
            }
        }
        problems
    }

    fn metrics(&self, _upstream: &Upstream<'_>) -> Option<Vec<String>> {
        Some(Vec::new())
    }

    fn run(&self, context: &mut StageContext) -> anyhow::Result<()> {
        let folder = context.output("dataset");
        let mut shapes: Vec<(Shape, &Path)> = Vec::new();
        let task =
            self.task.as_ref().map(|task| open_with(task, &task.any_format(), &context.interrupt)).transpose()?;
        for (done, (split, file)) in self.files.iter().enumerate() {
            context.stop_if_interrupted()?;
            context.progress(done as u64, self.files.len() as u64, "files");
            let (shape, rows) = match format_of(&file.path) {
                Some(Format::Lines) => self.read_lines(&file.path)?,
                Some(Format::Parquet) => self.read_parquet(&file.path)?,
                None => bail!("`{}` is neither `.jsonl` nor `.parquet`", file.path.display()),
            };
            ensure!(!rows.is_empty(), "`{}` has no rows", file.path.display());
            if let Some((_, other)) = shapes.iter().find(|(earlier, _)| *earlier != shape) {
                bail!(
                    "`{}` and `{}` differ: each has another of texts, prompts with completions, and messages",
                    other.display(),
                    file.path.display()
                );
            }
            shapes.push((shape, &file.path));
            match &task {
                Some(task) => write_instances(&folder, split, &file.path, task.as_ref(), &rows)?,
                None => write_split(&folder, split, shape, &rows)?,
            }
        }
        if let Some(task) = &self.task {
            write_task(&folder, task)?;
        }
        context.progress(self.files.len() as u64, self.files.len() as u64, "files");
        Ok(())
    }
}

enum Format {
    Lines,
    Parquet,
}

fn format_of(path: &Path) -> Option<Format> {
    match path.extension()?.to_str()? {
        "jsonl" | "ndjson" => Some(Format::Lines),
        "parquet" => Some(Format::Parquet),
        _ => None,
    }
}

/// A row is a text for each of [`Shape::columns`].
type Rows = Vec<Vec<String>>;

impl Dataset {
    /// Which columns rows are made from, given which there are.
    fn shape(&self, there: &[&str]) -> anyhow::Result<Shape> {
        let has = |name: &String| there.contains(&name.as_str());
        let list = || there.iter().map(|name| format!("`{name}`")).collect::<Vec<_>>().join(", ");
        let Self { text_column, prompt_column, completion_column, messages_column, .. } = self;
        if self.task.is_some() {
            ensure!(has(prompt_column), "there is no column `{prompt_column}`; there are {}", list());
            return Ok(Shape::Instance);
        }
        match (has(text_column), has(messages_column), has(prompt_column), has(completion_column)) {
            (true, false, false, false) => Ok(Shape::Text),
            (false, true, false, false) => Ok(Shape::Messages),
            (false, false, true, true) => Ok(Shape::Pair),
            (false, true, _, _) | (true, true, false, false) => bail!(
                "there is a column `{messages_column}` and also a text, prompt or completion column; name the ones to read"
            ),
            (true, _, _, _) => bail!(
                "there is a text column `{text_column}` and also a prompt or completion column; name the ones to read"
            ),
            _ => bail!(
                "there is neither a column `{text_column}` nor `{messages_column}` nor the two columns \
                 `{prompt_column}` and `{completion_column}`; there are {}",
                list()
            ),
        }
    }

    fn read_parquet(&self, path: &Path) -> anyhow::Result<(Shape, Rows)> {
        let names = table::column_names(path)?;
        let names: Vec<&str> = names.iter().map(String::as_str).collect();
        let shape = self.shape(&names).with_context(|| format!("reading `{}`", path.display()))?;
        let wanted: Vec<&str> = match shape {
            Shape::Text => vec![&self.text_column],
            Shape::Pair => vec![&self.prompt_column, &self.completion_column],
            Shape::Instance => vec![&self.prompt_column],
            Shape::Messages => return Ok((shape, self.read_conversations(path)?)),
        };
        let mut columns = Vec::with_capacity(2);
        for (column, name) in table::read(path, &wanted)?.into_iter().zip(&wanted) {
            let Column::Text(values) = column else {
                bail!("column `{name}` of `{}` holds numbers, not strings", path.display());
            };
            let full = |(row, value): (usize, Option<String>)| {
                value.with_context(|| format!("row {} of `{}` has no `{name}`", row + 1, path.display()))
            };
            columns.push(values.into_iter().enumerate().map(full).collect::<anyhow::Result<Vec<String>>>()?);
        }
        let completions = columns.pop().expect("one or two columns are read");
        if shape == Shape::Instance {
            return Ok((shape, completions.into_iter().map(|prompt| vec![prompt]).collect()));
        }
        let prompts = columns.pop().unwrap_or_else(|| vec![String::new(); completions.len()]);
        Ok((shape, prompts.into_iter().zip(completions).map(|(prompt, completion)| vec![prompt, completion]).collect()))
    }

    /// The conversations of a Parquet file: lists of structures, or JSON as text.
    fn read_conversations(&self, path: &Path) -> anyhow::Result<Rows> {
        let values = table::read_json(path, &self.messages_column)?;
        let read = |(row, value): (usize, Value)| {
            let name = &self.messages_column;
            let value = match value {
                Value::String(text) => serde_json::from_str(&text).unwrap_or(Value::String(text)),
                other => other,
            };
            conversation(value).with_context(|| format!("`{name}` in row {} of `{}`", row + 1, path.display()))
        };
        values.into_iter().enumerate().map(read).collect()
    }

    fn read_lines(&self, path: &Path) -> anyhow::Result<(Shape, Rows)> {
        let file = File::open(path).with_context(|| format!("opening `{}`", path.display()))?;
        let mut reader = BufReader::new(file);
        let mut first: Option<Shape> = None;
        let mut rows = Vec::new();
        let mut line = Vec::new();
        for number in 1usize.. {
            line.clear();
            let read = reader.read_until(b'\n', &mut line);
            if read.with_context(|| format!("reading `{}`", path.display()))? == 0 {
                break;
            }
            if line.trim_ascii().is_empty() {
                continue;
            }
            let (shape, row) = self.read_line(&line).with_context(|| format!("{}:{number}", path.display()))?;
            if *first.get_or_insert(shape) != shape {
                bail!(
                    "{}:{number}: texts, pairs of prompt and completion, or messages are mixed in one file",
                    path.display()
                );
            }
            rows.push(row);
        }
        Ok((first.unwrap_or(Shape::Text), rows))
    }

    fn read_line(&self, line: &[u8]) -> anyhow::Result<(Shape, Vec<String>)> {
        let line = std::str::from_utf8(line).context("the line is not UTF-8")?;
        let mut fields: Map<String, Value> = serde_json::from_str(line).map_err(|error| {
            // The place in a line of its own says nothing.
            let said = error.to_string();
            anyhow::anyhow!("the line is no JSON object: {}", said.split(" at line ").next().unwrap_or_default())
        })?;
        let there: Vec<&str> = fields.keys().map(String::as_str).collect();
        let shape = self.shape(&there)?;
        let mut take = |name: &str| match fields.remove(name) {
            Some(Value::String(text)) => Ok(text),
            other => bail!("`{name}` is `{}`, not a string", other.unwrap_or_default()),
        };
        let row = match shape {
            Shape::Text => vec![String::new(), take(&self.text_column)?],
            Shape::Pair => vec![take(&self.prompt_column)?, take(&self.completion_column)?],
            Shape::Instance => vec![take(&self.prompt_column)?],
            Shape::Messages => {
                let name = &self.messages_column;
                conversation(fields.remove(name).unwrap_or_default()).with_context(|| format!("`{name}`"))?
            }
        };
        Ok((shape, row))
    }
}

/// A conversation as it is written: JSON of messages. What a message has beside its role and its content must be null.
fn conversation(value: Value) -> anyhow::Result<Vec<String>> {
    let Value::Array(list) = value else { bail!("it is `{value}`, not a list of messages") };
    let message = |(place, mut value): (usize, Value)| {
        if let Some(fields) = value.as_object_mut() {
            fields.retain(|_, field| !field.is_null());
        }
        serde_json::from_value(value).with_context(|| format!("message {} is no `{{ role, content }}`", place + 1))
    };
    let messages: Vec<Message> = list.into_iter().enumerate().map(message).collect::<anyhow::Result<_>>()?;
    ensure!(!messages.is_empty(), "it has no message");
    Ok(vec![serde_json::to_string(&messages).expect("messages are plain data")])
}

/// Writes the instances that prompts show, as `synthesize` writes those that it draws.
fn write_instances(folder: &Path, split: &str, path: &Path, task: &dyn Task, rows: &Rows) -> anyhow::Result<()> {
    let read = |(row, prompt): (usize, &Vec<String>)| {
        let drawn = task.parse(&prompt[0]).and_then(|instance| Drawn::new(task, &instance));
        let place = || format!("the prompt of row {} of `{}`", row + 1, path.display());
        Ok(synthesize::Row::from(drawn.with_context(place)?))
    };
    let rows: Vec<synthesize::Row> = rows.iter().enumerate().map(read).collect::<anyhow::Result<_>>()?;
    synthesize::write_split(folder, split, &rows)
}

fn write_split(folder: &Path, split: &str, shape: Shape, rows: &[Vec<String>]) -> anyhow::Result<()> {
    let names = ["instance", "split"].iter().chain(shape.columns());
    let columns: Vec<(&str, ColumnType)> = names.map(|name| (*name, ColumnType::Text)).collect();
    let mut writer = TableWriter::create(&folder.join(format!("{split}.parquet")), &columns)?;
    for (chunk, rows) in rows.chunks(CHUNK).enumerate() {
        let first = chunk * CHUNK;
        let mut columns = vec![
            Column::text((first..first + rows.len()).map(|row| instance_id(split, row))),
            Column::text(rows.iter().map(|_| split.to_owned())),
        ];
        columns.extend((0..shape.columns().len()).map(|at| Column::text(rows.iter().map(|row| row[at].clone()))));
        writer.write(columns)?;
    }
    writer.finish()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::stages::testing::{context, digest, strings};

    /// Runs the stage on files by split and name; gives the output folder.
    fn run(files: &[(&str, &str, &[u8])]) -> anyhow::Result<tempfile::TempDir> {
        let folder = tempfile::tempdir().unwrap();
        let mut named = Map::new();
        for (split, name, bytes) in files {
            std::fs::write(folder.path().join(name), bytes).unwrap();
            named.insert((*split).to_owned(), json!(folder.path().join(name)));
        }
        let stage: Dataset = serde_json::from_value(json!({"files": named})).unwrap();
        stage.run(&mut context(folder.path(), &["dataset"]))?;
        Ok(folder)
    }

    fn pairs(folder: &tempfile::TempDir, split: &str) -> (Vec<String>, Vec<String>, Vec<String>) {
        let path = folder.path().join(format!("out/dataset/{split}.parquet"));
        let columns = table::read(&path, &["instance", "prompt", "completion"]).unwrap();
        let mut columns = columns.into_iter().map(strings);
        (columns.next().unwrap(), columns.next().unwrap(), columns.next().unwrap())
    }

    #[test]
    fn conversations_are_read_from_lines_and_from_text_in_parquet() {
        let lines =
            br#"{"messages": [{"role": "user", "content": "a", "name": null}, {"content": "b", "role": "assistant"}]}"#;
        let folder = run(&[("train", "t.jsonl", lines)]).unwrap();
        let path = folder.path().join("out/dataset/train.parquet");
        let read = |path: &Path| strings(table::read(path, &["messages"]).unwrap().remove(0));
        let wanted = [r#"[{"role":"user","content":"a"},{"role":"assistant","content":"b"}]"#];
        assert_eq!(read(&path), wanted);
        let again = run(&[("train", "t.parquet", &std::fs::read(path).unwrap())]).unwrap();
        assert_eq!(read(&again.path().join("out/dataset/train.parquet")), wanted);
    }

    const PAIRS: &[u8] =
        b"{\"prompt\": \"a\", \"completion\": \"b\", \"more\": 1}\n\n{\"completion\":\"d\",\"prompt\":\"c\"}";

    #[test]
    fn twice_gives_the_same_bytes() {
        let digests =
            [(), ()].map(|()| digest(&run(&[("train", "t.jsonl", PAIRS)]).unwrap().path().join("out/dataset")));
        assert_eq!(digests[0], digests[1]);
        insta::assert_snapshot!(digests[0]);
    }

    #[test]
    fn pairs_and_texts_are_read_from_both_kinds_of_file() {
        let folder = run(&[("train", "t.jsonl", PAIRS)]).unwrap();
        let wanted: (Vec<String>, Vec<String>, Vec<String>) = (
            ["train-000000", "train-000001"].map(str::to_owned).into(),
            ["a", "c"].map(str::to_owned).into(),
            ["b", "d"].map(str::to_owned).into(),
        );
        assert_eq!(pairs(&folder, "train"), wanted);
        let parquet = std::fs::read(folder.path().join("out/dataset/train.parquet")).unwrap();
        assert_eq!(pairs(&run(&[("train", "t.parquet", &parquet)]).unwrap(), "train"), wanted);
        let texts = run(&[("test", "t.jsonl", b"{\"text\": \"x\"}\r\n")]).unwrap();
        assert_eq!(pairs(&texts, "test"), (vec!["test-000000".into()], vec![String::new()], vec!["x".into()]));
    }

    #[test]
    fn bad_files_are_located() {
        let says = |files: &[(&str, &str, &[u8])], words: &str| {
            let error = format!("{:#}", run(files).unwrap_err());
            assert!(error.contains(words), "{error}");
        };
        says(&[("a", "a.jsonl", b"{\"text\": \"x\"}\n{\"text\": 1}\n")], "a.jsonl:2: `text` is `1`, not a string");
        says(&[("a", "a.jsonl", b"{\"text\": \"x\"}\nnot JSON\n")], "a.jsonl:2: the line is no JSON object");
        says(
            &[("a", "a.jsonl", b"{\"text\": \"x\"}\n{\"prompt\": \"p\", \"completion\": \"c\"}")],
            "a.jsonl:2: texts, pairs",
        );
        says(&[("a", "a.jsonl", b"{\"text\": \"\xff\"}\n")], "a.jsonl:1: the line is not UTF-8");
        says(&[("a", "a.jsonl", b"{\"prompt\": \"x\"}\n")], "a.jsonl:1: there is neither a column `text`");
        says(&[("a", "a.jsonl", b"{\"text\": \"x\", \"prompt\": \"\"}\n")], "a.jsonl:1: there is a text column");
        says(&[("a", "a.jsonl", b"[1]\n")], "a.jsonl:1: the line is no JSON object");
        says(&[("a", "a.jsonl", b"\n \n")], "a.jsonl` has no rows");
        says(&[("a", "a.parquet", b"no Parquet")], "a.parquet");
        says(&[("a", "a.jsonl", b"{\"text\": \"x\", \"messages\": []}\n")], "a.jsonl:1: there is a column `messages`");
        says(&[("a", "a.jsonl", b"{\"messages\": \"x\"}\n")], "a.jsonl:1: `messages`: it is `\"x\"`, not a list");
        says(&[("a", "a.jsonl", b"{\"messages\": []}\n")], "a.jsonl:1: `messages`: it has no message");
        let calls = br#"{"messages": [{"role": "assistant", "content": "", "tool_calls": []}]}"#;
        says(&[("a", "a.jsonl", calls)], "a.jsonl:1: `messages`: message 1 is no `{ role, content }`: unknown field");
        says(&[("a", "a.jsonl", b"{\"text\": \"x\"}"), ("b", "b.jsonl", PAIRS)], "differ: each has another");
    }

    /// Runs the stage on a file of prompts; gives the folder.
    fn bench(file: &str, bytes: &[u8], change: &Value) -> anyhow::Result<tempfile::TempDir> {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join(file);
        std::fs::write(&path, bytes).unwrap();
        let mut value = json!({
            "files": {"test": path}, "prompt_column": "Prompt", "task": {"kind": "maze", "rows": 5, "columns": 5}
        });
        value.as_object_mut().unwrap().extend(change.as_object().unwrap().clone());
        let stage: Dataset = serde_json::from_value(value).unwrap();
        stage.run(&mut context(folder.path(), &["dataset"]))?;
        Ok(folder)
    }

    #[test]
    fn the_prompts_of_a_bench_become_instances_as_synthesize_writes_them() {
        let folder = tempfile::tempdir().unwrap();
        let task = json!({"kind": "maze", "rows": 5, "columns": 5});
        let drawn: synthesize::Synthesize =
            serde_json::from_value(json!({"task": task, "splits": {"test": 30}})).unwrap();
        drawn.run(&mut context(folder.path(), &["dataset"])).unwrap();
        let drawn = folder.path().join("out/dataset");
        let data = strings(table::read(&drawn.join("test.parquet"), &["data"]).unwrap().remove(0));
        let opened = open(&serde_json::from_value(task).unwrap(), &crate::tasks::FormatSpec::default()).unwrap();
        let prompt = |data: &String| {
            let instance: Value = serde_json::from_str(data).unwrap();
            let start = crate::tasks::Start { instance: &instance, seed: 0 };
            opened.begin(&[start]).unwrap().observe().unwrap().remove(0)
        };
        // Rows of cells are lines, as in the published bench.
        let lines = |prompt: String| {
            (1..5).fold(prompt, |text, row| text.replace(&format!("<|{row}-0|>"), &format!("\n<|{row}-0|>")))
        };
        let rows: Vec<Value> = data
            .iter()
            .map(|data| json!({"Prompt": lines(prompt(data)), "Level": "easy", "Maze_image": null}))
            .collect();
        let text: String = rows.iter().map(|row| row.to_string() + "\n").collect();
        let read = bench("bench.jsonl", text.as_bytes(), &json!({})).unwrap();
        let read = read.path().join("out/dataset");
        assert_eq!(digest(&read), digest(&drawn), "the same rows, the same task");
        let path = folder.path().join("bench.parquet");
        let columns = [("Level", ColumnType::Text), ("Prompt", ColumnType::Text), ("n", ColumnType::Integer)];
        let mut writer = TableWriter::create(&path, &columns).unwrap();
        let prompts = || rows.iter().map(|row| row["Prompt"].as_str().unwrap().to_owned());
        let written = vec![Column::text(prompts()), Column::text(prompts()), Column::integer(0..30)];
        writer.write(written).unwrap();
        writer.finish().unwrap();
        let read = bench("bench.parquet", &std::fs::read(path).unwrap(), &json!({})).unwrap();
        assert_eq!(digest(&read.path().join("out/dataset")), digest(&drawn));
    }

    #[test]
    fn a_bench_that_is_none_is_located() {
        let says = |line: Value, change: Value, words: &str| {
            let good = "<|0-0|><|up_left_right_wall|><|origin|><|0-1|><|up_left_right_wall|><|blank|>\n\
                        <|1-0|><|down_left_wall|><|blank|><|1-1|><|down_right_wall|><|target|>";
            let text = json!({"Prompt": good}).to_string() + "\n" + &line.to_string();
            let error = format!("{:#}", bench("b.jsonl", text.as_bytes(), &change).unwrap_err());
            assert!(error.contains(words), "{error}");
        };
        let small = json!({"task": {"kind": "maze", "rows": 2, "columns": 2}});
        says(json!({"Prompt": "<|0-0|>"}), small.clone(), "the prompt of row 2 of");
        says(json!({"Prompt": "<|0-0|>"}), small.clone(), "the cell <|0-0|> is not whole");
        says(json!({"Prompt": "none"}), small.clone(), "there is no cell of a maze");
        says(json!({"prompt": "none"}), small, "b.jsonl:2: there is no column `Prompt`");
        says(json!({"Prompt": ""}), json!({}), "the prompt of row 1 of");
        says(json!({"Prompt": ""}), json!({}), "2 x 2 cells, the task 5 x 5");
    }

    #[test]
    fn parameters_that_cannot_be_are_problems() {
        let paths = |value: Value| {
            let stage: Dataset = serde_json::from_value(value).unwrap();
            let stages = BTreeMap::new();
            let problems = Stage::check(&stage, &Upstream { stages: &stages });
            problems.into_iter().map(|problem| problem.path).collect::<Vec<_>>()
        };
        assert!(paths(json!({"files": {"a": "/x.jsonl", "b": "/x.parquet"}})).is_empty());
        assert_eq!(paths(json!({"files": {}})), ["files"]);
        assert_eq!(paths(json!({"files": {"a b": "/x.csv"}})), ["files.a b", "files.a b"]);
        assert_eq!(paths(json!({"files": {"a": "/x.jsonl"}, "prompt_column": "text"})), ["prompt_column"]);
    }
}
