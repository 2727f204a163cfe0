//! The card of an exported result: front matter that the Hugging Face hub reads, and what people want to know.

use std::fmt::Write as _;

use serde_json::{Value, json};

use crate::cli::export::lineage::Lineage;
use crate::cli::render;
use crate::pipeline::stage::ArtifactType;
use crate::pipeline::store::{Manifest, StoredOutput};

/// The kind of the stages that begin a model.
const MODEL: Option<&str> = Some("model");

/// `README.md` of a result that is called `target`, whose export has the files `changed` in place of the stored or beside them.
pub(super) fn text(
    target: &str,
    manifest: &Manifest,
    output: &StoredOutput,
    lineage: &Lineage,
    changed: &[&str],
) -> String {
    let mut text = front_matter(target, manifest, output, lineage);
    let _ = write!(text, "\n# {target}\n\n{}\n", what(manifest, output, lineage));
    let mut section = |title: &str, body: String| {
        if !body.trim().is_empty() {
            let _ = write!(text, "\n## {title}\n\n{}\n", body.trim());
        }
    };
    section("Use", usage(output, lineage));
    section("Evaluation", evaluations(lineage));
    section("Parameters", parameters(&manifest.params));
    section("Files", files(output, changed));
    section("Where it comes from", provenance(manifest, output, lineage));
    text
}

/// YAML: every value is written as JSON, which YAML reads as well.
fn front_matter(target: &str, manifest: &Manifest, output: &StoredOutput, lineage: &Lineage) -> String {
    let mut fields: Vec<(&str, Value)> = Vec::new();
    let mut tags = vec!["pipe".to_owned(), manifest.parts.kind.clone()];
    tags.extend(task(lineage).map(str::to_owned));
    match output.artifact {
        ArtifactType::Checkpoint => {
            fields.push(("library_name", json!("transformers")));
            fields.push(("pipeline_tag", json!("text-generation")));
            if let Some(base) = base_repository(lineage) {
                fields.push(("base_model", json!(base)));
            }
            fields.push(("tags", json!(tags)));
            let results = results(lineage);
            if !results.is_empty() {
                fields.push(("model-index", json!([{"name": target, "results": results}])));
            }
        }
        ArtifactType::Dataset => {
            fields.push(("tags", json!(tags)));
            let splits = splits(output);
            let files: Vec<Value> = splits.iter().map(|(split, path)| json!({"split": split, "path": path})).collect();
            fields.push(("configs", json!([{"config_name": "default", "data_files": files}])));
        }
        _ => fields.push(("tags", json!(tags))),
    }
    let lines: Vec<String> = fields.into_iter().map(|(name, value)| format!("{name}: {value}")).collect();
    format!("---\n{}\n---\n", lines.join("\n"))
}

/// The Parquet files of a data set, a split each.
fn splits(output: &StoredOutput) -> Vec<(&str, &str)> {
    let files = output.files.iter().map(|file| file.path.as_str());
    files.filter_map(|path| Some((path.strip_suffix(".parquet")?, path))).collect()
}

fn task(lineage: &Lineage) -> Option<&str> {
    lineage.nearest(None, "/task/kind")?.as_str()
}

/// The repository of the hub that the model began with.
fn base_repository(lineage: &Lineage) -> Option<&str> {
    let from = lineage.nearest(MODEL, "/from")?.as_str()?;
    Some(from.split('@').next().unwrap_or(from))
}

/// The metrics of evaluations as the hub's model index has them.
fn results(lineage: &Lineage) -> Vec<Value> {
    let task = task(lineage).unwrap_or("task");
    let shown = lineage.evaluations.iter().filter(|evaluation| evaluation.metrics.contains_key("solved"));
    shown
        .map(|evaluation| {
            let split = evaluation.params["split"].as_str().unwrap_or("test");
            let metrics = ["solved", "solved_low", "solved_high"].into_iter();
            let metrics = metrics
                .filter_map(|name| Some(json!({"type": name, "name": name, "value": evaluation.metrics.get(name)?})));
            json!({
                "task": {"type": "text-generation", "name": task},
                "dataset": {"type": task, "name": format!("{task} ({})", evaluation.stage), "split": split},
                "metrics": metrics.collect::<Vec<_>>(),
            })
        })
        .collect()
}

fn what(manifest: &Manifest, output: &StoredOutput, lineage: &Lineage) -> String {
    let kind = &manifest.parts.kind;
    let of_task = task(lineage).map(|task| format!(" of the task `{task}`")).unwrap_or_default();
    let version = env!("CARGO_PKG_VERSION");
    match output.artifact {
        ArtifactType::Checkpoint => {
            let began = match (
                lineage.nearest(MODEL, "/from"),
                lineage.nearest(MODEL, "/architecture/kind").and_then(Value::as_str),
            ) {
                (Some(Value::String(from)), _) => format!(" It began with `{from}`."),
                (Some(_), _) => " It began with the weights of a folder.".to_owned(),
                (None, Some(architecture)) => {
                    format!(" It began with random weights of the architecture `{architecture}`.")
                }
                (None, None) => String::new(),
            };
            format!(
                "A language model{of_task}, the output `{}` of a `{kind}` stage of pipe {version}.{began}",
                output.name
            )
        }
        ArtifactType::Dataset => {
            format!("A data set{of_task}, made by a `{kind}` stage of pipe {version}: one Parquet file a split.")
        }
        other => format!("The output `{}` ({other}){of_task} of a `{kind}` stage of pipe {version}.", output.name),
    }
}

fn usage(output: &StoredOutput, lineage: &Lineage) -> String {
    match output.artifact {
        ArtifactType::Checkpoint => {
            let limit = lineage
                .evaluations
                .iter()
                .find_map(|evaluation| evaluation.params["max_new_tokens"].as_u64())
                .unwrap_or(64);
            format!(
                "```python\nfrom transformers import AutoModelForCausalLM, AutoTokenizer\n\n\
                 tokenizer = AutoTokenizer.from_pretrained(\".\")\nmodel = AutoModelForCausalLM.from_pretrained(\".\")\n\
                 prompt = \"...\"  # as the column `prompt` of an evaluation's examples.parquet has it\n\
                 ids = tokenizer(prompt, return_tensors=\"pt\")\n\
                 answer = model.generate(**ids, max_new_tokens={limit}, do_sample=False)\n\
                 print(tokenizer.decode(answer[0, ids[\"input_ids\"].shape[1]:]))\n```\n"
            )
        }
        ArtifactType::Dataset => {
            let first = splits(output).first().map_or("train", |(split, _)| split);
            format!(
                "```python\nfrom datasets import load_dataset\n\ndata = load_dataset(\".\")\n\
                 rows = load_dataset(\"parquet\", data_files={{\"{first}\": \"{first}.parquet\"}})\n```\n"
            )
        }
        _ => String::new(),
    }
}

fn evaluations(lineage: &Lineage) -> String {
    if lineage.evaluations.is_empty() {
        return String::new();
    }
    let mut text = String::from(
        "By `pipe`'s own generation and simulation; low and high are the ends of a 95 % interval: Wilson's, or Student's t over \
         instances where each was drawn several times.\n\n\
         | evaluation | split | temperature | solved | low | high | n |\n|---|---|---:|---:|---:|---:|---:|\n",
    );
    for evaluation in &lineage.evaluations {
        let number = |name: &str| evaluation.metrics.get(name).map_or(String::new(), |value| render::number(*value));
        let _ = writeln!(
            text,
            "| `{}` | {} | {} | {} | {} | {} | {} |",
            evaluation.stage,
            evaluation.params["split"].as_str().unwrap_or_default(),
            evaluation.params["temperature"],
            number("solved"),
            number("solved_low"),
            number("solved_high"),
            number("n"),
        );
    }
    let others: Vec<String> = lineage
        .evaluations
        .iter()
        .map(|evaluation| {
            let metrics =
                evaluation.metrics.iter().filter(|(name, _)| !name.contains('.') && !name.starts_with("solved"));
            let metrics = metrics.map(|(name, value)| format!("{name} {}", render::number(*value)));
            format!("- `{}`: {}", evaluation.stage, metrics.collect::<Vec<_>>().join(", "))
        })
        .collect();
    format!("{text}\n{}\n", others.join("\n"))
}

fn parameters(params: &Value) -> String {
    let mut lines = Vec::new();
    show_flat("", params, &mut lines);
    let rows = lines.into_iter().map(|(path, value)| format!("| `{path}` | `{}` |", value.replace('|', "\\|")));
    format!("| parameter | value |\n|---|---|\n{}\n", rows.collect::<Vec<_>>().join("\n"))
}

/// Parameters as dotted paths. Of a file of the user's only its name is told, which says nothing of a machine.
fn show_flat(path: &str, value: &Value, lines: &mut Vec<(String, String)>) {
    match value {
        Value::Object(fields) => {
            if let Some(Value::String(name)) = fields.get("$input") {
                lines.push((path.to_owned(), name.clone()));
            } else if let Some(Value::String(file)) = fields.get("$file") {
                let name = file.rsplit('/').next().unwrap_or(file);
                lines.push((path.to_owned(), fields.get("as").and_then(Value::as_str).unwrap_or(name).to_owned()));
            } else {
                for (name, value) in fields {
                    let path = if path.is_empty() { name.clone() } else { format!("{path}.{name}") };
                    show_flat(&path, value, lines);
                }
            }
        }
        Value::Array(items) if items.iter().any(Value::is_object) => {
            for (place, item) in items.iter().enumerate() {
                show_flat(&format!("{path}.{place}"), item, lines);
            }
        }
        other => lines.push((path.to_owned(), other.to_string())),
    }
}

fn files(output: &StoredOutput, changed: &[&str]) -> String {
    let rows = output
        .files
        .iter()
        .map(|file| format!("| `{}` | {} | `{}` |", file.path, render::bytes(file.size as f64), file.digest.short()));
    let changed: Vec<String> = changed.iter().map(|name| format!("`{name}`")).collect();
    let except = match changed.as_slice() {
        [] => String::new(),
        names => format!(" {} differ, so that `AutoTokenizer` takes `tokenizer.json` as it is.", names.join(" and ")),
    };
    format!(
        "As they are stored, with the beginning of each one's BLAKE3 digest; this card and `pipe.json` are about them.{except}\n\n\
         | file | size | digest |\n|---|---:|---|\n{}\n",
        rows.collect::<Vec<_>>().join("\n")
    )
}

fn provenance(manifest: &Manifest, output: &StoredOutput, lineage: &Lineage) -> String {
    let mut text = format!("```console\n$ {}\n```\n\n", lineage.again());
    if !lineage.trial.is_empty() {
        let _ = write!(text, "Of the trial `{}`.\n\n", lineage.trial);
    }
    text.push_str("| stage | kind | version | key |\n|---|---|---:|---|\n");
    for stage in &lineage.stages {
        let _ = writeln!(text, "| `{}` | `{}` | {} | `{}` |", stage.stage, stage.kind, stage.version, stage.key);
    }
    let parts = manifest.parts.parts.iter().map(|part| format!("`{}` {}", part.name, part.version));
    let parts = parts.collect::<Vec<_>>().join(", ");
    let _ = write!(
        text,
        "\nDigest of this output: `{}`. Finished {}, {} in {}.",
        output.digest,
        manifest.finished,
        render::duration(manifest.seconds),
        render::plural(manifest.attempts as usize, "attempt"),
    );
    if !parts.is_empty() {
        let _ = write!(text, " Versions of what it rests on: {parts}.");
    }
    let numerics = manifest.numerics.iter().map(|(name, value)| format!("{name} {value}"));
    let numerics = numerics.collect::<Vec<_>>().join(", ");
    if !numerics.is_empty() {
        let _ = write!(text, " Computed with: {numerics}.");
    }
    text.push('\n');
    text
}
