//! What is written by a program and committed is current, and every file that we ship reads without a mistake.

use std::fs;
use std::path::Path;
use std::process::Command;

use serde_json::Value;

fn pipe(arguments: &[&str]) -> (Option<i32>, String) {
    let output = Command::new(env!("CARGO_BIN_EXE_pipe"))
        .args(arguments)
        .current_dir(env!("CARGO_MANIFEST_DIR"))
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr);
    (output.status.code(), text)
}

#[test]
fn the_committed_schemas_are_those_of_the_kinds() {
    for which in ["pipeline", "experiment"] {
        let (code, text) = pipe(&["schema", which]);
        assert_eq!(code, Some(0), "{text}");
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join(format!("schemas/{which}.json"));
        assert!(fs::read_to_string(&path).unwrap() == text, "run `./pipe schema --write schemas`");
    }
}

#[test]
fn the_committed_reference_is_that_of_the_code() {
    let (code, text) = pipe(&["reference"]);
    assert_eq!(code, Some(0), "{text}");
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/reference.md");
    assert!(fs::read_to_string(&path).unwrap() == text, "run `./pipe reference --write docs/reference.md`");
}

/// Calls `each` with every field of a schema and its path.
fn fields(schema: &Value, path: &str, each: &mut dyn FnMut(&str, &Value)) {
    for (name, field) in schema["properties"].as_object().into_iter().flatten() {
        let path = format!("{path}.{name}");
        each(&path, field);
        fields(field, &path, each);
    }
    for key in ["oneOf", "anyOf", "allOf", "prefixItems"] {
        for (index, form) in schema[key].as_array().into_iter().flatten().enumerate() {
            fields(form, &format!("{path}/{index}"), each);
        }
    }
    for key in ["items", "additionalProperties", "unevaluatedProperties"] {
        if schema[key].is_object() {
            fields(&schema[key], &format!("{path}/{key}"), each);
        }
    }
}

#[test]
fn editors_can_say_of_every_field_what_it_is() {
    for which in ["pipeline", "experiment"] {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join(format!("schemas/{which}.json"));
        let schema: Value = serde_json::from_str(&fs::read_to_string(path).unwrap()).unwrap();
        let mut count = 0;
        let mut bare = Vec::new();
        let mut told = |path: &str, field: &Value| {
            count += 1;
            if field["description"].as_str().is_none_or(str::is_empty) {
                bare.push(path.to_owned());
            }
        };
        fields(&schema, "", &mut told);
        for (name, definition) in schema["$defs"].as_object().unwrap() {
            fields(definition, name, &mut told);
        }
        assert!(count > 150, "{count}");
        assert!(bare.is_empty(), "{which}: no description of {bare:?}");
        // What a kind's field is when it is left out, and its range.
        let text = schema.to_string();
        for said in ["\"minimum\":1", "\"exclusiveMinimum\":0.0", "\"default\":"] {
            assert!(text.contains(said), "{which}: {said}");
        }
    }
}

#[test]
fn editors_can_say_what_a_field_is_that_is_left_out() {
    for kind in pipe::stages::KINDS {
        let mut generator = schemars::generate::SchemaSettings::draft2020_12().into_generator();
        let schema = (kind.schema)(&mut generator).to_value();
        let definitions = Value::Object(generator.take_definitions(true));
        let is_null = |form: &Value| form["type"] == "null";
        let mut without = Vec::new();
        let mut look = |path: &str, table: &Value| {
            let required = table["required"].as_array().cloned().unwrap_or_default();
            for (name, field) in table["properties"].as_object().into_iter().flatten() {
                let is_optional = field["type"].as_array().is_some_and(|types| types.iter().any(|one| one == "null"))
                    || field["anyOf"].as_array().is_some_and(|forms| forms.iter().any(is_null));
                let target = field["$ref"].as_str().and_then(|path| path.rsplit('/').next());
                // The fields of a table that may be left out say their own.
                let is_table = target.is_some_and(|target| definitions[target]["properties"].is_object());
                let is_given = required.contains(&name.as_str().into()) || field.get("const").is_some();
                if !is_given && !is_optional && !is_table && field.get("default").is_none() {
                    without.push(format!("{path}.{name}"));
                }
            }
        };
        look(kind.name, &schema);
        for (name, definition) in definitions.as_object().unwrap() {
            look(name, definition);
            definition["oneOf"].as_array().into_iter().flatten().for_each(|form| look(name, form));
        }
        assert!(without.is_empty(), "no default of {without:?}: say it with `#[schemars(extend(\"default\" = ..))]`");
    }
}

#[test]
fn every_pipeline_and_experiment_checks() {
    for folder in ["pipelines", "experiments"] {
        let files = fs::read_dir(Path::new(env!("CARGO_MANIFEST_DIR")).join(folder)).unwrap();
        // What stands in a folder below wants files that are not ours to give.
        let files = files.map(|file| file.unwrap().path()).filter(|path| path.extension().is_some());
        let files: Vec<String> = files.map(|path| path.to_string_lossy().into_owned()).collect();
        assert!(!files.is_empty());
        let arguments: Vec<&str> = std::iter::once("check").chain(files.iter().map(String::as_str)).collect();
        let (code, text) = pipe(&arguments);
        assert_eq!(code, Some(0), "{text}");
    }
}
