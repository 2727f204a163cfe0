//! `pipe config`: what the files of a trial come to, every value with the place it was written at.

use std::collections::BTreeMap;

use serde_json::{Map, Value as Json, json};

use crate::cli::failure::Failure;
use crate::cli::ui::Look;
use crate::cli::why::place;
use crate::cli::{FilesAndStage, Session, render};
use crate::pipeline::spec::origin::{Origins, Way, Written};
use crate::pipeline::spec::{Experiment, Trial, resolved_value};
use crate::stages::KINDS;

/// Comments stand at most so far to the right; a longer line has its comment right behind it.
const COMMENTS: usize = 48;

/// Show the configuration that the files come to, as TOML that reads again
#[derive(Debug, clap::Args)]
pub struct Args {
    #[command(flatten)]
    named: FilesAndStage,
    /// Only this trial
    #[arg(long, value_name = "TRIAL")]
    trial: Option<String>,
    /// Every default written out and every `${...}` replaced
    #[arg(long)]
    resolved: bool,
    /// Behind every value, where it comes from
    #[arg(long)]
    origin: bool,
}

/// With `--json`, an array with `{experiment, trial, values}` for every trial, where `values` is a table of path to
/// `{value, source, file, line}`.
pub fn run(args: &Args, session: &Session) -> Result<(), Failure> {
    let (files, stage) = args.named.split();
    let experiments = session.read(&files, &args.named.sets)?;
    let chosen = chosen(&experiments, args.trial.as_deref())?;
    let (color, several) = (session.ui.output_color(), chosen.len() > 1);
    let mut rows = Vec::new();
    for (experiment, trial) in chosen {
        if let Some(stage) = stage.filter(|stage| !trial.stages.contains_key(*stage)) {
            let near = render::near(stage, trial.stages.keys().map(String::as_str));
            let failure = Failure::wrong(format!("no stage is called `{stage}`"));
            let known = trial.stages.keys().map(|name| format!("`{name}`")).collect::<Vec<_>>().join(", ");
            return Err(match near.first() {
                Some(near) => failure.hint(format!("did you mean `{near}`?")),
                None => failure.hint(format!("expected one of {known}")),
            });
        }
        let origins = Origins::of(&experiment.path, &args.named.sets, trial, KINDS)
            .ok_or_else(|| Failure::failed(format!("`{}` changed while it was read", experiment.path.display())))?;
        let mut document = if args.resolved { resolved_value(trial) } else { Json::Object(origins.document.clone()) };
        if let Some(stage) = stage {
            document = json!({"stages": {stage: document["stages"][stage].clone()}});
        }
        let mut text = Toml { origins: args.origin.then_some(&origins), color, lines: Vec::new() };
        if session.ui.is_json() {
            let mut values = BTreeMap::new();
            flatten(&document, &mut Vec::new(), &origins, &mut values);
            rows.push(json!({"experiment": experiment.name, "trial": trial.name, "values": values}));
            continue;
        }
        if several {
            let name = if trial.name.is_empty() { String::new() } else { format!("/{}", trial.name) };
            session.ui.data(&Look::Bold.on(&format!("# {}{name}", experiment.name), color))?;
        }
        text.table(&document, &mut Vec::new());
        session.ui.data(&text.finish())?;
        if several {
            session.ui.data("")?;
        }
    }
    if session.ui.is_json() { session.ui.json_pretty(&rows) } else { Ok(()) }
}

/// The trials that are meant.
fn chosen<'a>(experiments: &'a [Experiment], trial: Option<&str>) -> Result<Vec<(&'a Experiment, &'a Trial)>, Failure> {
    let all =
        || experiments.iter().flat_map(|experiment| experiment.trials.iter().map(move |trial| (experiment, trial)));
    let chosen: Vec<_> = all().filter(|(_, known)| trial.is_none_or(|name| name == known.name)).collect();
    match trial.filter(|_| chosen.is_empty()) {
        None => Ok(chosen),
        Some(wanted) => {
            let names: Vec<&str> = all().map(|(_, trial)| trial.name.as_str()).collect();
            let failure = Failure::wrong(format!("there is no trial `{wanted}`"));
            Err(match render::near(wanted, names.iter().copied()).first().or(names.first()) {
                Some(name) if !name.is_empty() => failure.hint(format!("there is `{name}`")),
                _ => failure.hint("nothing is swept, so leave `--trial` out"),
            })
        }
    }
}

/// The leaves of a document with their origins.
fn flatten(value: &Json, path: &mut Vec<String>, origins: &Origins, found: &mut BTreeMap<String, Json>) {
    match value {
        Json::Object(fields) if !fields.is_empty() => {
            for (name, value) in fields {
                path.push(name.clone());
                flatten(value, path, origins, found);
                path.pop();
            }
        }
        leaf => {
            let written = origins.written(path);
            let source = written.map_or_else(|| "default".to_owned(), |written| written.way.to_string());
            let by: Vec<Json> = written
                .iter()
                .flat_map(|written| &written.by)
                .map(|(name, place)| json!({"name": name, "file": place.file, "line": place.line}))
                .collect();
            found.insert(
                path.iter().map(|segment| key(segment)).collect::<Vec<_>>().join("."),
                json!({
                    "value": leaf,
                    "source": source,
                    "file": written.map(|written| &written.place.file),
                    "line": written.map(|written| written.place.line),
                    "used_at": written.and_then(|written| written.used_at.as_ref()).map(place),
                    "by": by,
                }),
            );
        }
    }
}

/// A TOML document in the making, line by line.
struct Toml<'a> {
    origins: Option<&'a Origins>,
    color: bool,
    /// Text and comment.
    lines: Vec<(String, String)>,
}

impl Toml<'_> {
    /// Scalars and arrays of a table first, then the tables in it: TOML wants it so.
    fn table(&mut self, value: &Json, path: &mut Vec<String>) {
        let Some(fields) = value.as_object() else { return };
        let is_table = |value: &&Json| value.is_object();
        if !path.is_empty() && (fields.values().any(|value| !value.is_object()) || fields.is_empty()) {
            let name = path.iter().map(|segment| key(segment)).collect::<Vec<_>>().join(".");
            if !self.lines.is_empty() {
                self.lines.push((String::new(), String::new()));
            }
            self.lines.push((format!("[{name}]"), String::new()));
        }
        // What a stage is stands on top of what it is told.
        let leaves = || fields.iter().filter(|(_, value)| !is_table(value));
        let is_kind = |name: &str| name == "kind";
        for (name, leaf) in
            leaves().filter(|(name, _)| is_kind(name)).chain(leaves().filter(|(name, _)| !is_kind(name)))
        {
            path.push(name.clone());
            let comment = self.origins.map(|origins| comment(origins.written(path))).unwrap_or_default();
            path.pop();
            self.lines.push((format!("{} = {}", key(name), inline(leaf)), comment));
        }
        for (name, table) in fields.iter().filter(|(_, value)| is_table(value)) {
            path.push(name.clone());
            self.table(table, path);
            path.pop();
        }
    }

    /// The text, its comments in one column.
    fn finish(self) -> String {
        let lengths = self.lines.iter().filter(|(_, comment)| !comment.is_empty());
        let column = lengths.map(|(text, _)| text.chars().count()).filter(|length| *length <= COMMENTS).max();
        let column = column.unwrap_or(0);
        let line = |(text, comment): &(String, String)| {
            if comment.is_empty() {
                return text.clone();
            }
            format!("{text:<column$}  {}", Look::Dim.on(&format!("# {comment}"), self.color))
        };
        self.lines.iter().map(line).collect::<Vec<_>>().join("\n")
    }
}

/// `default`, `pipeline a.toml:3`, `sweep a.toml:9 (params.seed, used at p.toml:30)`.
fn comment(written: Option<&Written>) -> String {
    let Some(Written { way, place: at, used_at, by }) = written else { return "default".to_owned() };
    let text = if *way == Way::Set { place(at) } else { format!("{way} {}", place(at)) };
    let mut notes: Vec<String> = Vec::new();
    for (name, from) in by {
        // What was taken whole stands where its parameter stands.
        notes.push(if from == at { name.clone() } else { format!("{name} {}", place(from)) });
    }
    notes.extend(used_at.as_ref().map(|at| format!("used at {}", place(at))));
    if notes.is_empty() { text } else { format!("{text} ({})", notes.join(", ")) }
}

/// A key as TOML has it.
fn key(name: &str) -> String {
    let is_bare = !name.is_empty() && name.chars().all(|c| c.is_ascii_alphanumeric() || matches!(c, '_' | '-'));
    if is_bare { name.to_owned() } else { inline(&Json::from(name)) }
}

/// A value as TOML has it on one line.
fn inline(value: &Json) -> String {
    match value {
        Json::Array(items) => format!("[{}]", items.iter().map(inline).collect::<Vec<_>>().join(", ")),
        Json::Object(fields) => inline_table(fields),
        Json::String(text) => toml::Value::String(text.clone()).to_string(),
        // Numbers and truths are written alike in both.
        Json::Number(number) if number.is_f64() => format!("{:?}", number.as_f64().unwrap_or_default()),
        other => other.to_string(),
    }
}

fn inline_table(fields: &Map<String, Json>) -> String {
    if fields.is_empty() {
        return "{}".to_owned();
    }
    let fields: Vec<String> = fields.iter().map(|(name, value)| format!("{} = {}", key(name), inline(value))).collect();
    format!("{{ {} }}", fields.join(", "))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_value_is_toml_and_reads_again() {
        let document = json!({
            "stages": {
                "a": {"kind": "x", "apple": 1, "rate": 1e-5, "whole": 2.0, "text": "two\nlines \"quoted\" \\ $${x}", "list": [1, [true], {"a b": "c"}]},
                "b": {"empty": {}, "deep": {"er": {"x": -3}}},
            },
        });
        let mut text = Toml { origins: None, color: false, lines: Vec::new() };
        text.table(&document, &mut Vec::new());
        let text = text.finish();
        let read: Json = toml::from_str(&text).unwrap_or_else(|error| panic!("{error}\n{text}"));
        assert_eq!(read, document, "{text}");
        assert!(text.starts_with("[stages.a]\nkind = \"x\"\napple = 1\n"), "{text}");
    }
}
