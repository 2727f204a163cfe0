//! JSON Schemas: those of an experiment's own sections, and the published ones that editors read.
//!
//! What is published is looser than what is checked: every scalar may be a `${...}` string, and an overlay requires
//! nothing and may drop a table with `false`. Exact checking is the reader's.

use std::collections::BTreeSet;
use std::sync::OnceLock;

use schemars::generate::SchemaSettings;
use serde_json::{Map, Value as Json, json};

use crate::pipeline::spec::shape::Shapes;
use crate::pipeline::spec::sweep;
use crate::pipeline::stage::{Kind, RunOptions};

/// Which files a published schema describes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SchemaKind {
    /// A pipeline: whole stages.
    Pipeline,
    /// An experiment: stages laid over a pipeline's, a sweep, a table.
    Experiment,
}

/// A part of an experiment's file that is no stage.
#[derive(Clone, Copy)]
pub(super) enum Section {
    Description,
    Sweep,
    Table,
}

impl Section {
    /// Its key in the file.
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Description => "description",
            Self::Sweep => "sweep",
            Self::Table => "table",
        }
    }

    /// What it may say.
    pub(super) fn shapes(self) -> &'static Shapes {
        static SHAPES: OnceLock<[Shapes; 3]> = OnceLock::new();
        let all = SHAPES.get_or_init(|| {
            let told = |section: Self| match section {
                Self::Sweep => sweep::told_schema(),
                other => other.schema(),
            };
            [Self::Description, Self::Sweep, Self::Table].map(|section| Shapes::compile(&told(section), &Map::new()))
        });
        &all[self as usize]
    }

    fn schema(self) -> Json {
        let strings = json!({"type": "array", "items": {"type": "string"}});
        match self {
            Self::Description => json!({"type": "string", "description": "What the experiment asks."}),
            Self::Sweep => sweep::schema(),
            Self::Table => json!({
                "type": "object",
                "description": "What `pipe table` shows.",
                "additionalProperties": false,
                "properties": {
                    "metrics": {"description": "`STAGE.METRIC`, or `STAGE.CURVE@POINT` of a training's curve (`@best`, `@steps=100`, `@completions`, `@steps_to>=0.5`, `@auc`), in the order to show.", "type": "array", "items": {"type": "string"}},
                    "baseline": {
                        "type": "object",
                        "description": "The arm that others are compared with: a value for every axis but the seeds.",
                        "additionalProperties": true
                    },
                    "differences": {
                        "type": "array",
                        "description": "Pairs of `STAGE.METRIC` whose paired difference is shown within each arm.",
                        "items": {"minItems": 2, "maxItems": 2, "type": "array", "items": strings["items"]}
                    }
                }
            }),
        }
    }
}

/// The JSON Schema of the files that `which` names, with every kind's parameters.
pub fn schema(kinds: &[Kind], which: SchemaKind) -> Json {
    let is_overlay = which == SchemaKind::Experiment;
    let mut generator = SchemaSettings::draft2020_12().into_generator();
    let run = generator.subschema_for::<RunOptions>().to_value();
    let mut stages: Vec<Json> = kinds
        .iter()
        .map(|kind| {
            let schema = (kind.schema)(&mut generator).to_value();
            stage_schema(kind, schema, &run)
        })
        .collect();
    let publisher = Publisher { definitions: generator.take_definitions(true) };
    for stage in &mut stages {
        *stage = publisher.publish(stage, is_overlay);
    }
    let stage = if is_overlay {
        stages.push(json!({"const": false, "description": "Drops the stage."}));
        json!({"anyOf": stages})
    } else {
        json!({"oneOf": stages})
    };
    let path = json!({"type": "string", "description": "The path of a file, relative to this one."});
    let mut properties = Map::new();
    let mut add = |name: &str, schema: Json| properties.insert(name.to_owned(), schema);
    add("description", Section::Description.schema());
    add(
        "extends",
        json!({
            "description": "Files that this one is laid over, the last on top.",
            "anyOf": [path, {"type": "array", "items": path}]
        }),
    );
    add(
        "params",
        json!({
            "type": "object",
            "description": "Scalars that stages read as `${params.NAME}`.",
            "additionalProperties": {"type": ["string", "number", "boolean"]}
        }),
    );
    add("stages", json!({"type": "object", "description": "Stages by name.", "additionalProperties": stage}));
    if is_overlay {
        add("pipeline", json!({"type": "string", "description": "The pipeline that this experiment uses."}));
        add("sweep", Section::Sweep.schema());
        add("table", Section::Table.schema());
    }
    let mut root = json!({
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": if is_overlay { "An experiment of pipe" } else { "A pipeline of pipe" },
        "type": "object",
        "properties": properties,
        "additionalProperties": false
    });
    let definitions = publisher.reachable(&root);
    if !definitions.is_empty() {
        root["$defs"] = Json::Object(definitions);
    }
    root
}

/// A kind's parameters with `kind` and `run`.
fn stage_schema(kind: &Kind, mut schema: Json, run: &Json) -> Json {
    let mut constant = json!({"type": "string", "const": kind.name});
    if let Some(description) = schema.get("description") {
        constant["description"] = description.clone();
    }
    let mut run = run.clone();
    run["description"] = Json::from("How the stage runs, never what it computes.");
    let own = json!({"kind": constant, "run": run});
    let Some(object) = schema.as_object_mut() else { return own };
    object.insert("title".to_owned(), Json::from(kind.name));
    object.insert("type".to_owned(), Json::from("object"));
    let properties = object.entry("properties").or_insert_with(|| json!({}));
    if let (Some(properties), Json::Object(own)) = (properties.as_object_mut(), own) {
        properties.extend(own);
    }
    let required = object.entry("required").or_insert_with(|| json!([]));
    if let Some(required) = required.as_array_mut() {
        required.insert(0, Json::from("kind"));
    }
    // Parameters that are themselves alternatives bring fields which only `unevaluatedProperties` sees.
    let closing = if ["oneOf", "anyOf", "allOf", "$ref"].iter().any(|key| object.contains_key(*key)) {
        object.remove("additionalProperties");
        "unevaluatedProperties"
    } else {
        "additionalProperties"
    };
    object.insert(closing.to_owned(), Json::Bool(false));
    schema
}

/// What marks the form of a definition in which nothing is required.
const OVERLAY: &str = ".overlay";

struct Publisher {
    definitions: Map<String, Json>,
}

impl Publisher {
    /// `schema` with `${...}` admitted for scalars and, in an overlay, nothing required.
    fn publish(&self, schema: &Json, is_overlay: bool) -> Json {
        let Some(object) = schema.as_object() else { return schema.clone() };
        let mut published = Map::new();
        for (key, value) in object {
            let value = match key.as_str() {
                "format" => continue,
                "required" | "minProperties" if is_overlay => continue,
                "$ref" if is_overlay => Json::from(format!("{}{OVERLAY}", value.as_str().unwrap_or_default())),
                "properties" => Json::Object(
                    value
                        .as_object()
                        .into_iter()
                        .flatten()
                        .map(|(name, field)| (name.clone(), described(self.field(field, is_overlay), object)))
                        .collect(),
                ),
                "additionalProperties" | "unevaluatedProperties" => self.field(value, is_overlay),
                // An array replaces what it is laid over, so its elements are whole.
                "items" => self.publish(value, false),
                "prefixItems" => self.each(value, false),
                "oneOf" | "anyOf" | "allOf" => self.each(value, is_overlay),
                // The default of a null says nothing in TOML.
                "default" if value.is_null() => continue,
                _ => value.clone(),
            };
            // Without required fields several alternatives fit at once.
            let key = if key == "oneOf" && is_overlay { "anyOf".to_owned() } else { key.clone() };
            published.insert(key, value);
        }
        without_null(&mut published);
        if is_scalar(&published) { with_reference(published) } else { Json::Object(published) }
    }

    fn each(&self, schemas: &Json, is_overlay: bool) -> Json {
        let all = schemas.as_array().into_iter().flatten();
        let all = all.filter(|schema| schema.get("type") != Some(&Json::from("null")));
        // The constants of an enum get their `${...}` as a whole, not one by one.
        Json::Array(
            all.map(|schema| if is_constant(schema) { schema.clone() } else { self.publish(schema, is_overlay) })
                .collect(),
        )
    }

    /// A field of a table: the constant that tells alternatives apart stays as it is, and an overlay may drop a table.
    fn field(&self, schema: &Json, is_overlay: bool) -> Json {
        if is_constant(schema) {
            return schema.clone();
        }
        let published = self.publish(schema, is_overlay);
        if !is_overlay || !self.is_table(schema) {
            return published;
        }
        // What is said of the table stands outside, where editors look for it whichever alternative is meant.
        let Json::Object(mut published) = published else { return published };
        let mut whole = taken(&mut published, &["description", "default"]);
        whole.insert("anyOf".to_owned(), json!([published, {"const": false, "description": "Drops the table."}]));
        Json::Object(whole)
    }

    fn is_table(&self, schema: &Json) -> bool {
        let target = schema.get("$ref").and_then(Json::as_str).and_then(|path| path.rsplit('/').next());
        let target = target.and_then(|name| self.definitions.get(name));
        let alternatives = ["oneOf", "anyOf"].iter().filter_map(|key| schema.get(*key)?.as_array()).flatten();
        schema.get("type") == Some(&Json::from("object"))
            || target.is_some_and(|target| self.is_table(target))
            || alternatives.into_iter().any(|alternative| self.is_table(alternative))
    }

    /// The definitions that `root` rests on, published in the form in which it names them.
    fn reachable(&self, root: &Json) -> Map<String, Json> {
        let mut names = BTreeSet::new();
        let mut found = Map::new();
        let mut waiting = vec![root.clone()];
        while let Some(schema) = waiting.pop() {
            let mut named = BTreeSet::new();
            collect_references(&schema, &mut named);
            for name in named {
                if !names.insert(name.clone()) {
                    continue;
                }
                let plain = name.trim_end_matches(OVERLAY);
                if let Some(definition) = self.definitions.get(plain) {
                    let published = self.publish(definition, plain != name);
                    waiting.push(published.clone());
                    found.insert(name, published);
                }
            }
        }
        found
    }
}

fn collect_references(schema: &Json, names: &mut BTreeSet<String>) {
    match schema {
        Json::Object(object) => {
            if let Some(name) = object.get("$ref").and_then(Json::as_str).and_then(|path| path.rsplit('/').next()) {
                names.insert(name.to_owned());
            }
            object.values().for_each(|value| collect_references(value, names));
        }
        Json::Array(items) => items.iter().for_each(|item| collect_references(item, names)),
        _ => {}
    }
}

/// The constant that tells a table's form, with what is said of that form.
fn described(mut field: Json, table: &Map<String, Json>) -> Json {
    if is_constant(&field)
        && field.get("description").is_none()
        && let Some(description) = table.get("description")
    {
        field["description"] = description.clone();
    }
    field
}

fn is_constant(schema: &Json) -> bool {
    schema.get("const").is_some()
}

/// Takes the null out of a list of types.
fn without_null(schema: &mut Map<String, Json>) {
    let Some(Json::Array(types)) = schema.get_mut("type") else { return };
    types.retain(|name| name != "null");
    if let [one] = types.as_slice() {
        let one = one.clone();
        schema.insert("type".to_owned(), one);
    }
}

/// Whether a string with `${...}` would not be admitted although a scalar is meant.
fn is_scalar(schema: &Map<String, Json>) -> bool {
    let is_typed = ["integer", "number", "boolean"].iter().any(|name| schema.get("type") == Some(&Json::from(*name)));
    let is_enum = schema.contains_key("enum")
        || ["oneOf", "anyOf"]
            .iter()
            .any(|key| schema.get(*key).and_then(Json::as_array).is_some_and(|all| all.iter().all(is_constant)));
    is_typed || is_enum
}

/// Takes the entries `keys` out of a schema.
fn taken(schema: &mut Map<String, Json>, keys: &[&str]) -> Map<String, Json> {
    keys.iter().filter_map(|key| schema.remove_entry(*key)).collect()
}

/// The schema or a string with `${...}`.
fn with_reference(mut schema: Map<String, Json>) -> Json {
    let mut whole = taken(&mut schema, &["description", "default", "title"]);
    let reference = json!({"type": "string", "pattern": "\\$\\{params\\.[^}]+\\}"});
    whole.insert("anyOf".to_owned(), json!([schema, reference]));
    Json::Object(whole)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pipeline::spec::testing::KINDS;

    #[test]
    fn a_pipelines_stages_are_told_apart_by_kind_and_whole() {
        let schema = schema(KINDS, SchemaKind::Pipeline);
        let stages = schema["properties"]["stages"]["additionalProperties"]["oneOf"].as_array().unwrap();
        let kinds: Vec<&str> =
            stages.iter().map(|stage| stage["properties"]["kind"]["const"].as_str().unwrap()).collect();
        assert_eq!(kinds, ["draw", "train", "score"]);
        let train = &stages[1];
        assert_eq!(train["required"], json!(["kind", "data", "steps"]));
        assert_eq!(train["additionalProperties"], json!(false));
        assert_eq!(train["properties"]["run"]["$ref"], json!("#/$defs/RunOptions"));
        let steps = &train["properties"]["steps"];
        assert_eq!(steps["anyOf"][0], json!({"type": "integer", "minimum": 1}));
        assert_eq!(steps["anyOf"][1]["type"], json!("string"));
        assert_eq!(steps["description"], json!("Steps."));
        assert!(schema["$defs"].as_object().unwrap().keys().all(|name| !name.ends_with(OVERLAY)));
    }

    #[test]
    fn an_overlay_requires_nothing_and_may_drop_tables() {
        let schema = schema(KINDS, SchemaKind::Experiment);
        let stages = schema["properties"]["stages"]["additionalProperties"]["anyOf"].as_array().unwrap();
        assert_eq!(stages.last().unwrap()["const"], json!(false));
        let train = &stages[1];
        assert_eq!(train.get("required"), None);
        let reward = &train["properties"]["rewards"]["anyOf"][0]["additionalProperties"]["anyOf"];
        assert_eq!(reward[0]["$ref"], json!("#/$defs/Reward.overlay"));
        assert_eq!(reward[1]["const"], json!(false));
        let forms = schema["$defs"]["Reward.overlay"]["anyOf"].as_array().unwrap();
        assert!(forms.iter().all(|form| form.get("required").is_none()));
        assert_eq!(forms[0]["properties"]["kind"]["const"], json!("correct"), "the tag stays a constant");
        let mut names = BTreeSet::new();
        collect_references(&schema, &mut names);
        assert!(names.iter().all(|name| schema["$defs"].get(name).is_some()), "{names:?}");
        assert!(schema["properties"]["sweep"].is_object());
    }
}
