//! What a recipe and a key are made of.
//!
//! Both are hashes of the same parts and differ in what stands for an input. The *recipe* says how the input is made (its
//! producer's recipe and output), so it is known before anything runs; it merges equal stages of all trials. The *key* says
//! what the input is (the digest of its content), so it is known when the input is there; it names the result. An input that
//! comes out byte-equal after a change upstream leads to the same key, and nothing below it runs again.
//!
//! | enters                                              | why |
//! |-----------------------------------------------------|-----|
//! | the kind's name and VERSION                         | the code that computes the result |
//! | names and VERSIONs of its parts                     | tasks, formats, rewards and shared modules are code too |
//! | every parameter, defaults written out               | a default that changes later must not change old results |
//! | inputs: recipe and output, or content digest        | see above |
//! | files: digest of the content, and `as` where placed | what they say counts, not where they lie |
//! | [`RNG_ABI`]                                         | the mapping from seeds to numbers |
//!
//! | does not enter                     | why |
//! |------------------------------------|-----|
//! | name of the stage, text of a reference, `wants` | a renamed stage computes the same |
//! | paths of files, of the TOML, of the store       | a moved project computes the same |
//! | comments, order of keys, `1` or `1.0`           | the canonical JSON is equal |
//! | the `run` table, device, threads, host, time    | they say how it runs, not what comes out |
//! | experiment, trial, description, `table`         | they say who asks |
//!
//! It must never read a file or ask the store for one.

use serde_json::{Map, Value, json};

use crate::pipeline::spec::StageSpec;
use crate::pipeline::store::{Digest, KeyParts, StoreError, hash_json};
use crate::random::RNG_ABI;

/// The parts of a stage, with `input` and `file` saying what stands for a reference and for a path.
///
/// `params` are those of [`crate::pipeline::stage::AnyStage::params`].
pub fn parts(
    spec: &StageSpec,
    params: &Value,
    input: &dyn Fn(&str) -> Value,
    file: &dyn Fn(&str) -> Value,
) -> KeyParts {
    let mut parts = spec.stage.parts();
    parts.sort();
    parts.dedup();
    let params = replaced(params, input, file);
    KeyParts { kind: spec.kind.name.to_owned(), version: spec.kind.version, parts, params, rng_abi: RNG_ABI }
}

/// What stands for an input in a recipe.
pub fn made_by(recipe: &Digest, output: &str) -> Value {
    json!({"recipe": recipe, "output": output})
}

/// The recipe of parts whose inputs are [`made_by`].
pub fn recipe(parts: &KeyParts) -> Result<Digest, StoreError> {
    hash("recipe", parts)
}

/// The key of parts whose inputs are content digests.
pub fn key(parts: &KeyParts) -> Result<Digest, StoreError> {
    hash("key", parts)
}

fn hash(domain: &str, parts: &KeyParts) -> Result<Digest, StoreError> {
    hash_json(domain, &serde_json::to_value(parts).expect("the parts of a key are plain data"))
}

fn replaced(value: &Value, input: &dyn Fn(&str) -> Value, file: &dyn Fn(&str) -> Value) -> Value {
    match value {
        Value::Object(fields) => {
            if let Some(Value::String(reference)) = fields.get("$input") {
                return json!({"$input": input(reference)});
            }
            if let Some(Value::String(path)) = fields.get("$file") {
                let mut kept = Map::from_iter([("$file".to_owned(), file(path))]);
                kept.extend(fields.get("as").map(|placed| ("as".to_owned(), placed.clone())));
                return Value::Object(kept);
            }
            fields.iter().map(|(name, value)| (name.clone(), replaced(value, input, file))).collect()
        }
        Value::Array(items) => items.iter().map(|item| replaced(item, input, file)).collect(),
        other => other.clone(),
    }
}

/// The paths of every file in serialised parameters, sorted.
pub fn files(params: &Value) -> Vec<&str> {
    let mut found = Vec::new();
    let mut stack = vec![params];
    while let Some(value) = stack.pop() {
        match value {
            Value::Object(fields) => match fields.get("$file") {
                Some(Value::String(path)) => found.push(path.as_str()),
                _ => stack.extend(fields.values()),
            },
            Value::Array(items) => stack.extend(items),
            _ => {}
        }
    }
    found.sort_unstable();
    found.dedup();
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_references_and_wants_do_not_enter() {
        let params =
            json!({"model": {"$input": "sft", "wants": "checkpoint"}, "text": [{"$file": "/a", "as": "a"}, 1]});
        let replaced = replaced(&params, &|reference| json!(reference.len()), &|path| json!(path.len()));
        assert_eq!(replaced, json!({"model": {"$input": 3}, "text": [{"$file": 2, "as": "a"}, 1]}));
        assert_eq!(files(&params), ["/a"]);
    }

    #[test]
    fn a_recipe_is_never_a_key() {
        let parts = |version| KeyParts { kind: "k".into(), version, parts: vec![], params: json!({}), rng_abi: 1 };
        assert_ne!(recipe(&parts(1)).unwrap(), key(&parts(1)).unwrap());
        assert_ne!(key(&parts(1)).unwrap(), key(&parts(2)).unwrap());
    }
}
