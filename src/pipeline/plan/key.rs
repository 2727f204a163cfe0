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
use crate::pipeline::stage::{ArtifactType, Output, Part, references};
use crate::pipeline::store::canonical::{self, Inexact};
use crate::pipeline::store::{Digest, KeyParts, StoreError, hash_canonical, hash_json};
use crate::random::RNG_ABI;

/// What a plan must know of a stage, taken from its parameters once: what it rests on, and the text of its key with holes
/// where inputs and files are to be said. Recipe and key fill the same holes, each in its own way.
#[derive(Debug)]
pub struct Outline {
    /// Its outputs, default one first.
    pub outputs: Vec<Output>,
    /// Every reference with what it wants, sorted; a reference of two types stands here twice.
    pub references: Vec<(String, Option<ArtifactType>)>,
    /// The path of every file, sorted.
    pub files: Vec<String>,
    text: Vec<u8>,
    holes: Vec<Hole>,
}

/// A place in the text of an [`Outline`].
#[derive(Debug)]
struct Hole {
    at: usize,
    what: What,
}

/// What belongs into a hole.
#[derive(Clone, Copy, Debug)]
enum What {
    /// The input of this number among the distinct references.
    Input(usize),
    /// The file of this number.
    File(usize),
}

impl Outline {
    /// The outline of a stage.
    pub fn of(spec: &StageSpec) -> Result<Self, StoreError> {
        let params = spec.stage.params();
        let references = references(&params);
        let files = files(&params).into_iter().map(str::to_owned).collect();
        let outputs = spec.stage.outputs();
        let mut outline = Self { outputs, references, files, text: Vec::new(), holes: Vec::new() };
        let mut distinct: Vec<&str> = outline.references.iter().map(|(reference, _)| reference.as_str()).collect();
        distinct.dedup();
        let mut writer = Writer { inputs: &distinct, files: &outline.files, holes: Vec::new() };
        let mut text = Vec::with_capacity(256);
        // The fields of `KeyParts` in the order of their names, as canonical JSON has them.
        text.extend_from_slice(b"{\"kind\":");
        canonical::write_string(spec.kind.name, &mut text);
        text.extend_from_slice(b",\"params\":");
        if let Err(Inexact) = writer.write(&params, &mut text) {
            // The slow way knows the place of the number.
            let nothing = |_: &str| Value::Null;
            recipe(&parts(spec, &params, &nothing, &nothing))?;
        }
        text.extend_from_slice(b",\"parts\":[");
        for (index, Part { name, version }) in sorted_parts(spec).into_iter().enumerate() {
            text.extend_from_slice(if index == 0 { b"{\"name\":" } else { b",{\"name\":" });
            canonical::write_string(&name, &mut text);
            text.extend_from_slice(format!(",\"version\":{version}}}").as_bytes());
        }
        text.extend_from_slice(format!("],\"rng_abi\":{RNG_ABI},\"version\":{}}}", spec.kind.version).as_bytes());
        text.shrink_to_fit();
        (outline.holes, outline.text) = (writer.holes, text);
        Ok(outline)
    }

    /// The recipe; `made_by` gives the producer's recipe and output of the input of a number, `file` the digest of a file.
    pub fn recipe<'a>(
        &self,
        made_by: impl Fn(usize) -> (&'a Digest, &'a str),
        file: impl Fn(usize) -> Option<&'a Digest>,
    ) -> Digest {
        let input = |number: usize, text: &mut Vec<u8>| {
            let (recipe, output) = made_by(number);
            text.extend_from_slice(b"{\"output\":");
            canonical::write_string(output, text);
            text.extend_from_slice(b",\"recipe\":");
            canonical::write_string(&recipe.0, text);
            text.push(b'}');
        };
        hash_canonical("recipe", &self.filled(input, file))
    }

    /// The key; `input` gives the content digest of the input of a number, `file` the digest of a file.
    pub fn key<'a>(&self, input: impl Fn(usize) -> &'a Digest, file: impl Fn(usize) -> Option<&'a Digest>) -> Digest {
        let input = |number: usize, text: &mut Vec<u8>| canonical::write_string(&input(number).0, text);
        hash_canonical("key", &self.filled(input, file))
    }

    fn filled<'a>(&self, input: impl Fn(usize, &mut Vec<u8>), file: impl Fn(usize) -> Option<&'a Digest>) -> Vec<u8> {
        let mut text = Vec::with_capacity(self.text.len() + self.holes.len() * 100);
        let mut from = 0;
        for hole in &self.holes {
            text.extend_from_slice(&self.text[from..hole.at]);
            from = hole.at;
            match hole.what {
                What::Input(number) => input(number, &mut text),
                What::File(number) => match file(number) {
                    Some(digest) => canonical::write_string(&digest.0, &mut text),
                    None => text.extend_from_slice(b"null"),
                },
            }
        }
        text.extend_from_slice(&self.text[from..]);
        text
    }
}

/// Writes the parameters of an [`Outline`].
struct Writer<'a> {
    /// The distinct references, sorted.
    inputs: &'a [&'a str],
    /// The files, sorted.
    files: &'a [String],
    holes: Vec<Hole>,
}

impl Writer<'_> {
    /// Writes parameters, with holes as [`replaced`] would replace.
    fn write(&mut self, value: &Value, text: &mut Vec<u8>) -> Result<(), Inexact> {
        match value {
            Value::Object(fields) => {
                let input = tagged(fields, "$input");
                if let Some(number) = input.and_then(|reference| self.inputs.binary_search(&reference).ok()) {
                    text.extend_from_slice(b"{\"$input\":");
                    self.holes.push(Hole { at: text.len(), what: What::Input(number) });
                    text.push(b'}');
                    return Ok(());
                }
                let file = tagged(fields, "$file");
                let number = file.and_then(|path| self.files.binary_search_by(|known| known.as_str().cmp(path)).ok());
                if let Some(number) = number {
                    text.extend_from_slice(b"{\"$file\":");
                    self.holes.push(Hole { at: text.len(), what: What::File(number) });
                    if let Some(placed) = fields.get("as") {
                        text.extend_from_slice(b",\"as\":");
                        canonical::write(placed, text)?;
                    }
                    text.push(b'}');
                    return Ok(());
                }
                canonical::write_fields(fields, text, |value, text| self.write(value, text))
            }
            Value::Array(items) => {
                text.push(b'[');
                for (index, item) in items.iter().enumerate() {
                    if index > 0 {
                        text.push(b',');
                    }
                    self.write(item, text)?;
                }
                text.push(b']');
                Ok(())
            }
            scalar => canonical::write(scalar, text),
        }
    }
}

fn tagged<'a>(fields: &'a Map<String, Value>, tag: &str) -> Option<&'a str> {
    fields.get(tag).and_then(Value::as_str)
}

fn sorted_parts(spec: &StageSpec) -> Vec<Part> {
    let mut parts = spec.stage.parts();
    parts.sort();
    parts.dedup();
    parts
}

/// The parts of a stage, with `input` and `file` saying what stands for a reference and for a path.
///
/// `params` are those of [`crate::pipeline::stage::AnyStage::params`].
pub fn parts(
    spec: &StageSpec,
    params: &Value,
    input: &dyn Fn(&str) -> Value,
    file: &dyn Fn(&str) -> Value,
) -> KeyParts {
    let parts = sorted_parts(spec);
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
    use proptest::prelude::*;

    use super::*;
    use crate::pipeline::fixture;
    use crate::pipeline::stage::Stage;

    #[test]
    fn paths_references_and_wants_do_not_enter() {
        let params =
            json!({"model": {"$input": "sft", "wants": "checkpoint"}, "text": [{"$file": "/a", "as": "a"}, 1]});
        let replaced = replaced(&params, &|reference| json!(reference.len()), &|path| json!(path.len()));
        assert_eq!(replaced, json!({"model": {"$input": 3}, "text": [{"$file": 2, "as": "a"}, 1]}));
        assert_eq!(files(&params), ["/a"]);
    }

    /// Parameters of any shape.
    #[derive(serde::Serialize, serde::Deserialize, schemars::JsonSchema)]
    #[serde(transparent)]
    struct Free(Value);

    impl Stage for Free {
        const KIND: &'static str = "free";
        const VERSION: u32 = 7;

        fn outputs(&self) -> Vec<Output> {
            Vec::new()
        }

        fn parts(&self) -> Vec<Part> {
            ["b", "a", "b"].map(|name| Part::new(name, 3)).into()
        }
    }

    fn params() -> impl Strategy<Value = Value> {
        let name = || prop_oneof!["[abé]{1,2}", Just("$input".to_owned()), Just("$file".to_owned())];
        let leaf = prop_oneof![
            any::<i32>().prop_map(Value::from),
            (-1e3..1e3_f64).prop_map(Value::from),
            "[ab\"]{0,2}".prop_map(Value::from),
            name().prop_map(|name| json!({"$input": name, "wants": "files"})),
            name().prop_map(|name| json!({"$file": name, "as": "./x"})),
            name().prop_map(|name| json!({"$file": name})),
        ];
        leaf.prop_recursive(4, 40, 5, move |inner| {
            prop_oneof![
                prop::collection::vec(inner.clone(), 0..5).prop_map(Value::from),
                prop::collection::btree_map(name(), inner, 0..5)
                    .prop_map(|fields| Value::Object(fields.into_iter().collect())),
            ]
        })
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 1_000, failure_persistence: None, ..ProptestConfig::default() })]

        /// An outline hashes what the parts hash: old keys stay what they are.
        #[test]
        fn outlines_are_the_parts_in_short(params in params()) {
            let spec = fixture::stage_without_outputs::<Free>("s", params.clone());
            let outline = Outline::of(&spec).unwrap();
            let digest = |text: &str| -> Digest { blake3::hash(text.as_bytes()).into() };
            let mut inputs: Vec<&str> = outline.references.iter().map(|(name, _)| name.as_str()).collect();
            inputs.dedup();
            let input_digests: Vec<Digest> = inputs.iter().map(|name| digest(name)).collect();
            let file_digests: Vec<Digest> = outline.files.iter().map(|path| digest(path)).collect();
            let file = |path: &str| json!(digest(path));
            let made_by_name = |name: &str| made_by(&digest(name), name);
            prop_assert_eq!(
                outline.recipe(|number| (&input_digests[number], inputs[number]), |number| file_digests.get(number)),
                recipe(&super::parts(&spec, &params, &made_by_name, &file)).unwrap()
            );
            let by_content = |name: &str| json!(digest(name));
            prop_assert_eq!(
                outline.key(|number| &input_digests[number], |number| file_digests.get(number)),
                key(&super::parts(&spec, &params, &by_content, &file)).unwrap()
            );
        }
    }

    #[test]
    fn an_integer_that_has_no_exact_form_is_refused_with_its_place() {
        let spec = fixture::stage_without_outputs::<Free>("s", json!({"a": [0, {"seed": (1_u64 << 53) + 1}]}));
        let error = Outline::of(&spec).unwrap_err().to_string();
        assert!(error.contains("`9007199254740993` at `params.a.1.seed`"), "{error}");
    }

    #[test]
    fn a_recipe_is_never_a_key() {
        let parts = |version| KeyParts { kind: "k".into(), version, parts: vec![], params: json!({}), rng_abi: 1 };
        assert_ne!(recipe(&parts(1)).unwrap(), key(&parts(1)).unwrap());
        assert_ne!(key(&parts(1)).unwrap(), key(&parts(2)).unwrap());
    }
}
