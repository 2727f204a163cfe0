//! The least that a schema takes, with every number as large as it may be.

use serde_json::{Map, Value, json};

/// A value that fits `schema`, whose definitions stand in `root`: required fields alone, and of alternatives the first.
pub(super) fn sample(schema: &Value, root: &Value) -> Value {
    if let Some(name) = schema["$ref"].as_str().and_then(|path| path.rsplit('/').next()) {
        return sample(&root["$defs"][name], root);
    }
    if let Some(constant) = schema.get("const") {
        return constant.clone();
    }
    if let Some(first) = ["anyOf", "oneOf"].iter().find_map(|key| schema[*key].as_array()?.first()) {
        // Fields beside alternatives are everyone's.
        let mut value = sample(first, root);
        if let (Some(own), Some(fields)) = (value.as_object_mut(), schema.get("properties")) {
            own.extend(required(schema, fields, root));
        }
        return value;
    }
    if let Some(first) = schema["enum"].as_array().and_then(|all| all.first()) {
        return first.clone();
    }
    match schema["type"].as_str() {
        Some("object") => Value::Object(required(schema, &schema["properties"], root)),
        Some("array") => {
            let count = schema["minItems"].as_u64().unwrap_or(1);
            (0..count).map(|_| sample(&schema["items"], root)).collect()
        }
        Some("integer") => schema.get("maximum").or(schema.get("minimum")).cloned().unwrap_or(json!(1)),
        Some("number") => schema.get("maximum").cloned().unwrap_or(json!(1.0)),
        Some("boolean") => json!(false),
        _ => json!("solved"),
    }
}

fn required(schema: &Value, fields: &Value, root: &Value) -> Map<String, Value> {
    let names = schema["required"].as_array().into_iter().flatten().filter_map(Value::as_str);
    names.map(|name| (name.to_owned(), sample(&fields[name], root))).collect()
}
