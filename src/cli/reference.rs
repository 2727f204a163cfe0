//! `pipe reference`: everything that files and command lines may say, made of what the code knows of it.

mod commands;
mod fields;
mod sample;

use std::fmt::Write as _;
use std::path::PathBuf;

use serde_json::{Value, json};

use crate::cli::Session;
use crate::cli::failure::{self, Failure};
use crate::cli::reference::fields::{Fields, cell};
use crate::cli::reference::sample::sample;
use crate::pipeline::spec::{self, SchemaKind};
use crate::pipeline::stage::{Kind, Place, Upstream};
use crate::stages::KINDS;
use crate::tasks::TaskSpec;

/// Print the reference: every kind, field, task, format, reward, metric, command and exit code
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Write it to FILE instead of stdout
    #[arg(long, value_name = "FILE")]
    write: Option<PathBuf>,
}

/// Markdown; with `--json`, the schemas that it is made of.
pub fn run(args: &Args, session: &Session) -> Result<(), Failure> {
    if session.ui.is_json() {
        let [pipeline, experiment] =
            [SchemaKind::Pipeline, SchemaKind::Experiment].map(|which| spec::schema(KINDS, which));
        return session.ui.json_pretty(&json!({"pipeline": pipeline, "experiment": experiment}));
    }
    let text = reference();
    let Some(path) = &args.write else { return session.ui.data(&text) };
    if path.is_file() && std::fs::read_to_string(path).is_ok_and(|old| old == text) {
        return Ok(());
    }
    std::fs::write(path, text)
        .map_err(|error| Failure::wrong(format!("cannot write `{}`: {error}", path.display())))?;
    session.ui.note(&format!("wrote {}", path.display()));
    Ok(())
}

/// The definitions that have sections of their own.
const TASK: &str = "TaskSpec";
const FORMAT: &str = "FormatSpec";
const REWARD: &str = "RewardSpec";
const RUN: &str = "RunOptions";

/// What `${...}` and overlays may do, which no table of fields says.
const FILES: &str = "\
A pipeline is a graph of stages, an experiment uses one (or holds its stages itself) and says what varies. In every scalar's
place a text `${params.NAME}` may stand; where it is the whole text, the parameter's type is kept. What an experiment says of
a stage is laid over the pipeline's: tables merge, values replace, `false` drops. `docs/engine.md` tells sweeps and keys.
";

/// The whole text.
fn reference() -> String {
    let pipeline = spec::schema(KINDS, SchemaKind::Pipeline);
    let experiment = spec::schema(KINDS, SchemaKind::Experiment);
    let fields = Fields::new(&pipeline, &[TASK, FORMAT, REWARD, RUN]);
    let mut text = String::from(
        "# Reference\n\nWritten by `./pipe reference --write docs/reference.md` from the code; a test holds that it is current. \
         `pipe schema` gives the same to editors.\n\n",
    );
    text.push_str(
        "[Files](#files) · [Kinds](#kinds) · [Run options](#run-options) · [Tasks](#tasks) · [Formats](#formats) · \
         [Rewards](#rewards) · [Tables and choices](#tables-and-choices) · [Metrics](#metrics) · [Commands](#commands) · \
         [Exit codes](#exit-codes)\n",
    );
    let mut section = |title: &str, body: &str| {
        let _ = write!(text, "\n## {title}\n\n{}\n", body.trim());
    };
    let overlay = Fields::new(&experiment, &[]);
    section("Files", &format!("{FILES}\n{}", overlay.root(&experiment, &["sweep", "table"])));
    section("Kinds", &kinds(&pipeline, &fields));
    section("Run options", &fields.definition(RUN));
    section("Tasks", &tasks(&fields));
    section("Formats", &fields.definition(FORMAT));
    section("Rewards", &fields.definition(REWARD));
    section("Tables and choices", &fields.others());
    section("Metrics", &metrics(&pipeline));
    section("Commands", &commands::commands());
    section("Exit codes", &exit_codes());
    text
}

/// Every kind with its fields, in the order of the list.
fn kinds(pipeline: &Value, fields: &Fields<'_>) -> String {
    let mut text = String::new();
    for (kind, schema) in KINDS.iter().zip(schemas(pipeline)) {
        let _ = write!(text, "### `{}`\n\n", kind.name);
        let description = schema.get("description").and_then(Value::as_str).unwrap_or_default();
        let place = match kind.place {
            Place::InProcess => "It runs in `pipe`'s own process.",
            Place::Worker => "It runs in `pipe-worker`, with libtorch.",
        };
        let _ = writeln!(text, "{} {place} Version {}.", cell(description), kind.version);
        if let Some(stage) = parsed(kind, schema, pipeline) {
            let outputs = stage.outputs();
            let named = outputs.iter().map(|output| format!("`{}` ({})", output.name, output.artifact));
            let _ = writeln!(text, "Outputs: {}.", named.collect::<Vec<_>>().join(", "));
        }
        let _ = write!(text, "\n{}\n", fields.table(schema, &["kind"], &[]));
    }
    text
}

/// The schema of every kind, in the order of [`KINDS`].
fn schemas(pipeline: &Value) -> &[Value] {
    pipeline["properties"]["stages"]["additionalProperties"]["oneOf"].as_array().map_or(&[], Vec::as_slice)
}

/// A stage of the kind, with no more than it must have.
fn parsed(kind: &Kind, schema: &Value, root: &Value) -> Option<std::sync::Arc<dyn crate::pipeline::stage::AnyStage>> {
    let mut params = sample(schema, root);
    params.as_object_mut()?.remove("kind");
    (kind.parse)(params).ok()
}

/// A task of every form, as large as it may be.
fn all_tasks(root: &Value) -> Vec<TaskSpec> {
    let forms = root["$defs"][TASK]["oneOf"].as_array();
    forms.into_iter().flatten().filter_map(|form| serde_json::from_value(sample(form, root)).ok()).collect()
}

/// Tasks with what they measure.
fn tasks(fields: &Fields<'_>) -> String {
    let mut text = fields.definition(TASK);
    for task in all_tasks(fields.root_schema()) {
        let name = json!(task)["kind"].as_str().unwrap_or_default().to_owned();
        let measures = task.measures();
        if measures.is_empty() {
            continue;
        }
        let _ = write!(
            text,
            "\n`{name}` measures, for rewards, metrics and tables to name:\n\n| name | what |\n|---|---|\n"
        );
        for measure in measures {
            let _ = writeln!(text, "| `{}` | {} |", measure.name, cell(&measure.meaning));
        }
        if let Some(strata) = task.strata() {
            let strata = strata.iter().map(|stratum| format!("`{stratum}`")).collect::<Vec<_>>();
            let _ = writeln!(text, "\nIts strata: {}.", strata.join(", "));
        }
    }
    text
}

/// The names of the numbers that tables may show.
fn metrics(root: &Value) -> String {
    let mut text = String::from(
        "`[table]` and `sweep.tune` name them as `STAGE.METRIC`. A name that ends in `.*` stands for every name that begins so; \
         `METRIC.STRATUM` is a metric over the instances of one stratum.\n\n| kind | of the task | metrics |\n|---|---|---|\n",
    );
    let tasks = all_tasks(root);
    for (kind, schema) in KINDS.iter().zip(schemas(root)) {
        let Some(stage) = parsed(kind, schema, root) else { continue };
        let mut rows: Vec<(String, Vec<String>)> = Vec::new();
        for task in &tasks {
            let params = json!({"task": task});
            let stages = Everywhere(params.clone());
            let names = stage.metrics(&Upstream { stages: &stages }).unwrap_or_default();
            rows.push((format!("`{}`", params["task"]["kind"].as_str().unwrap_or_default()), names));
        }
        let is_same = rows.windows(2).all(|pair| pair[0].1 == pair[1].1);
        if is_same {
            rows.truncate(1);
            if let Some(row) = rows.first_mut() {
                "any".clone_into(&mut row.0);
            }
        }
        for (task, names) in rows.into_iter().filter(|(_, names)| !names.is_empty()) {
            let names = names.iter().map(|name| format!("`{name}`")).collect::<Vec<_>>();
            let _ = writeln!(text, "| `{}` | {task} | {} |", kind.name, names.join(", "));
        }
    }
    text
}

/// One stage under every name.
#[derive(Debug)]
struct Everywhere(Value);

impl crate::pipeline::stage::Stages for Everywhere {
    fn get(&self, _: &str) -> Option<&Value> {
        Some(&self.0)
    }
}

fn exit_codes() -> String {
    let rows = failure::CODES.iter().map(|(code, what)| format!("| {code} | {what} |"));
    format!("| code | when |\n|---:|---|\n{}\n", rows.collect::<Vec<_>>().join("\n"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_kind_task_reward_and_command_has_its_place() {
        let text = reference();
        let pipeline = spec::schema(KINDS, SchemaKind::Pipeline);
        assert_eq!(schemas(&pipeline).len(), KINDS.len());
        for (kind, schema) in KINDS.iter().zip(schemas(&pipeline)) {
            assert!(text.contains(&format!("### `{}`", kind.name)), "{}", kind.name);
            assert!(
                parsed(kind, schema, &pipeline).is_some(),
                "`{}` has no sample: {}",
                kind.name,
                sample(schema, &pipeline)
            );
            for name in schema["properties"].as_object().unwrap().keys().filter(|name| *name != "kind") {
                assert!(text.contains(&format!("| `{name}` |")), "{}.{name}", kind.name);
            }
        }
        for command in crate::cli::arguments().get_subcommands() {
            assert!(text.contains(&format!("### `pipe {}`", command.get_name())), "{}", command.get_name());
        }
        assert!(text.contains("**`kind = \"correct\"`**") && text.contains("**`kind = \"fused\"`**"));
        assert!(text.contains("`solved.very_long`") && text.contains("| `wall_hits` |"));
        assert!(!text.contains("| |  |"), "an empty row");
    }

    #[test]
    fn every_link_leads_to_a_heading() {
        let text = reference();
        let anchor = |heading: &str| -> String {
            let kept = heading.trim_start_matches('#').trim().to_lowercase();
            kept.chars().filter(|c| c.is_alphanumeric() || " -_".contains(*c)).collect::<String>().replace(' ', "-")
        };
        let anchors: Vec<String> = text.lines().filter(|line| line.starts_with('#')).map(anchor).collect();
        let mut links = 0;
        for link in text.split("](#").skip(1).map(|rest| rest.split(')').next().unwrap()) {
            assert!(anchors.iter().any(|anchor| anchor == link), "`#{link}` leads nowhere");
            links += 1;
        }
        assert!(links > 30);
        let mut unique = anchors.clone();
        unique.sort();
        unique.dedup();
        assert_eq!(unique.len(), anchors.len(), "two headings have one anchor");
    }
}
