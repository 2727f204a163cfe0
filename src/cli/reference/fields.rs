//! Tables of fields, made of the published schemas.

use std::collections::BTreeMap;
use std::fmt::Write as _;

use serde_json::{Map, Value};

/// A schema's definitions as sections of a page.
pub(super) struct Fields<'a> {
    root: &'a Value,
    definitions: BTreeMap<&'a str, &'a Value>,
    /// Those that have a place of their own on the page.
    placed: Vec<&'a str>,
}

/// Text for a cell of a table: on one line.
pub(super) fn cell(text: &str) -> String {
    text.split_whitespace().collect::<Vec<_>>().join(" ").replace('|', "\\|")
}

impl<'a> Fields<'a> {
    /// The definitions of the schema `root`, of which those in `placed` are written elsewhere than the rest.
    pub(super) fn new(root: &'a Value, placed: &[&'a str]) -> Self {
        let definitions = root["$defs"].as_object().into_iter().flatten().map(|(name, schema)| (name.as_str(), schema));
        Self { root, definitions: definitions.collect(), placed: placed.to_vec() }
    }

    /// The schema that holds the definitions.
    pub(super) fn root_schema(&self) -> &'a Value {
        self.root
    }

    /// The fields of the file itself, and of the tables `opened` in it.
    pub(super) fn root(&self, root: &Value, opened: &[&str]) -> String {
        let mut text = self.table(root, &[], opened);
        for name in opened {
            let schema = &root["properties"][*name];
            let description = cell(schema["description"].as_str().unwrap_or_default());
            let _ = write!(text, "\n### `[{name}]`\n\n{description}\n\n{}", self.table(schema, &[], &[]));
        }
        text
    }

    /// A definition: its forms with their fields, its choices, or its fields.
    pub(super) fn definition(&self, name: &str) -> String {
        let Some(schema) = self.definitions.get(name) else { return String::new() };
        let schema = plain(schema);
        let mut text = format!("{}\n", cell(schema["description"].as_str().unwrap_or_default()));
        let forms = alternatives(&schema);
        if forms.is_empty() {
            let _ = write!(text, "\n{}", self.table(&schema, &[], &[]));
        } else if forms.iter().all(|form| form.get("const").is_some() || form.get("enum").is_some()) {
            text.push_str("\n| choice | what |\n|---|---|\n");
            for form in forms {
                let _ = writeln!(
                    text,
                    "| {} | {} |",
                    constants(form),
                    cell(form["description"].as_str().unwrap_or_default())
                );
            }
        } else {
            for form in forms {
                let tag = form["properties"].as_object().and_then(|fields| {
                    fields.iter().find_map(|(name, field)| Some((name.as_str(), field.get("const")?.as_str()?)))
                });
                let description = cell(form["description"].as_str().unwrap_or_default());
                if let Some((tag, constant)) = tag {
                    let _ = write!(text, "\n**`{tag} = \"{constant}\"`**: {description}\n");
                    let table = self.table(form, &[tag], &[]);
                    if !table.is_empty() {
                        let _ = write!(text, "\n{table}");
                    }
                }
            }
        }
        text
    }

    /// Every definition without a place of its own.
    pub(super) fn others(&self) -> String {
        let others = self.definitions.keys().filter(|name| !self.placed.contains(name));
        let sections = others.map(|name| format!("### {}\n\n{}", title(name), self.definition(name)));
        sections.collect::<Vec<_>>().join("\n")
    }

    /// The fields of a table but those `without`; empty where there are none. What is in the tables `closed` is not shown.
    pub(super) fn table(&self, schema: &Value, without: &[&str], closed: &[&str]) -> String {
        let mut rows = Vec::new();
        self.rows("", schema, (without, closed), &mut rows);
        if rows.is_empty() {
            return String::new();
        }
        format!("| field | type | default | what |\n|---|---|---|---|\n{}\n", rows.join("\n"))
    }

    fn rows(&self, path: &str, schema: &Value, (without, closed): (&[&str], &[&str]), rows: &mut Vec<String>) {
        let required: Vec<&str> =
            schema["required"].as_array().into_iter().flatten().filter_map(Value::as_str).collect();
        let fields = schema["properties"].as_object().into_iter().flatten();
        // What must be given stands first.
        let mut fields: Vec<(&String, &Value)> = fields.filter(|(name, _)| !without.contains(&name.as_str())).collect();
        fields.sort_by_key(|(name, _)| (!required.contains(&name.as_str()), name.as_str()));
        for (name, field) in fields {
            let field = plain(field);
            let default = match field.get("default") {
                _ if required.contains(&name.as_str()) => "required".to_owned(),
                Some(default) => format!("`{}`", toml_text(default).replace('|', "\\|")),
                None => String::new(),
            };
            let what = field.get("description").and_then(Value::as_str).map(cell);
            let what = what.or_else(|| self.described(&field)).unwrap_or_default();
            rows.push(format!("| `{path}{name}` | {} | {default} | {what} |", self.type_of(&field)));
            if closed.contains(&name.as_str()) {
                continue;
            }
            if field.get("properties").is_some() {
                self.rows(&format!("{path}{name}."), &field, (&[], &[]), rows);
            }
            if let Some(items) = field.get("items").filter(|items| items.get("properties").is_some()) {
                self.rows(&format!("{path}{name}[]."), items, (&[], &[]), rows);
            }
            for form in alternatives(&field).into_iter().filter(|form| form.get("properties").is_some()) {
                self.rows(&format!("{path}{name}."), form, (&[], &[]), rows);
            }
        }
    }

    /// The description of what a field refers to.
    fn described(&self, field: &Value) -> Option<String> {
        let target = self.definitions.get(reference(field)?)?;
        Some(cell(target["description"].as_str()?))
    }

    /// What may stand there, in a few words.
    fn type_of(&self, schema: &Value) -> String {
        let schema = plain(schema);
        if let Some(name) = reference(&schema) {
            return self.link(name);
        }
        if let Some(artifact) = schema["x-input"].as_str() {
            return format!("a stage's {}", artifact.replace('_', " "));
        }
        match schema["x-file"].as_str() {
            Some("source") => return "a folder, or `organisation/name@commit`".to_owned(),
            Some(_) => return "a file".to_owned(),
            None => {}
        }
        if schema.get("const").is_some() || schema.get("enum").is_some() {
            return constants(&schema);
        }
        let forms = alternatives(&schema);
        if !forms.is_empty() {
            let mut shown: Vec<String> = forms.iter().map(|form| self.type_of(form)).collect();
            shown.dedup();
            return shown.join(" or ");
        }
        if let Some(types) = schema["type"].as_array() {
            return types.iter().filter_map(Value::as_str).collect::<Vec<_>>().join(" or ");
        }
        match schema["type"].as_str() {
            Some(number @ ("integer" | "number")) => ranged(number, &schema),
            Some("array") => match schema.get("items") {
                Some(items) => format!("list: {}", self.type_of(items)),
                None => "list".to_owned(),
            },
            Some("object") => match schema.get("additionalProperties") {
                Some(entries @ Value::Object(_))
                    if reference(entries).is_some()
                        || entries.get("type").is_some()
                        || entries.get("anyOf").is_some() =>
                {
                    format!("table by name: {}", self.type_of(entries))
                }
                Some(Value::Object(_)) => "table by name".to_owned(),
                _ => "table".to_owned(),
            },
            Some(other) => other.to_owned(),
            None => "anything".to_owned(),
        }
    }

    fn link(&self, name: &str) -> String {
        let anchor = match name {
            "TaskSpec" => "tasks".to_owned(),
            "FormatSpec" => "formats".to_owned(),
            "RewardSpec" => "rewards".to_owned(),
            "RunOptions" => "run-options".to_owned(),
            _ if !self.definitions.contains_key(name) => return "table".to_owned(),
            other => title(other).to_lowercase().replace(' ', "-"),
        };
        format!("[{}](#{anchor})", title(name.trim_end_matches(".overlay")).to_lowercase())
    }
}

/// A definition's name for people: `DynamicSamplingFile` as `Dynamic sampling`.
fn title(name: &str) -> String {
    let name = name.strip_suffix("Spec").or(name.strip_suffix("File")).unwrap_or(name);
    let mut title = String::new();
    for c in name.chars() {
        if c.is_uppercase() && !title.is_empty() {
            title.push(' ');
            title.extend(c.to_lowercase());
        } else {
            title.push(c);
        }
    }
    title
}

/// The name that a schema refers to.
fn reference(schema: &Value) -> Option<&str> {
    schema["$ref"].as_str()?.rsplit('/').next()
}

/// The schema without what every scalar and every table of an overlay may be as well.
fn plain(schema: &Value) -> Value {
    let is_extra = |form: &Value| {
        form["pattern"].as_str().is_some_and(|pattern| pattern.starts_with("\\$\\{"))
            || form["const"] == Value::Bool(false)
    };
    let Some(forms) = schema["anyOf"].as_array() else { return schema.clone() };
    let mut kept = forms.iter().filter(|form| !is_extra(form));
    let (Some(only), None) = (kept.next(), kept.next()) else { return schema.clone() };
    let mut merged = plain(only).as_object().cloned().unwrap_or_default();
    let own = schema.as_object().into_iter().flatten().filter(|(key, _)| *key != "anyOf");
    merged.extend(own.map(|(key, value)| (key.clone(), value.clone())));
    Value::Object(merged)
}

fn alternatives(schema: &Value) -> Vec<&Value> {
    ["oneOf", "anyOf"].iter().filter_map(|key| schema[*key].as_array()).flatten().collect()
}

fn constants(schema: &Value) -> String {
    let one = schema.get("const").into_iter();
    let all = one.chain(schema["enum"].as_array().into_iter().flatten());
    all.map(|constant| format!("`{}`", toml_text(constant))).collect::<Vec<_>>().join(", ")
}

/// A number with its range, as `integer >= 1`.
fn ranged(name: &str, schema: &Value) -> String {
    let bound = |key: &str, sign: &str| schema.get(key).map(|value| format!("{sign} {value}"));
    let bounds = [("minimum", ">="), ("exclusiveMinimum", ">"), ("maximum", "<="), ("exclusiveMaximum", "<")];
    let bounds: Vec<String> = bounds.into_iter().filter_map(|(key, sign)| bound(key, sign)).collect();
    if bounds.is_empty() { name.to_owned() } else { format!("{name} {}", bounds.join(", ")) }
}

/// A value as a TOML file has it.
fn toml_text(value: &Value) -> String {
    match value {
        Value::Object(fields) if fields.is_empty() => "{}".to_owned(),
        Value::Object(fields) => format!("{{ {} }}", entries(fields)),
        Value::Array(items) => format!("[{}]", items.iter().map(toml_text).collect::<Vec<_>>().join(", ")),
        other => other.to_string(),
    }
}

fn entries(fields: &Map<String, Value>) -> String {
    let kept = fields.iter().filter(|(_, value)| !value.is_null());
    kept.map(|(name, value)| format!("{name} = {}", toml_text(value))).collect::<Vec<_>>().join(", ")
}
