//! What an attempt at a node is told: the plan's node and its inputs' results as one [`Request`].

use std::collections::BTreeMap;

use serde_json::{Map, Value};

use crate::pipeline::exec::attempt::{PROTOCOL, Request, RequestInput};
use crate::pipeline::exec::slots::Grant;
use crate::pipeline::plan::{Edge, Node};
use crate::pipeline::spec::parse_duration;
use crate::pipeline::store::{Digest, KeyParts, Store};

/// What a finished node has to give: its key, and the content digest of each output.
#[derive(Clone, Debug)]
pub(super) struct Made {
    /// The key.
    pub(super) key: Digest,
    /// Output name to content digest.
    pub(super) outputs: Vec<(String, Digest)>,
}

impl Made {
    fn output(&self, name: &str) -> Option<&Digest> {
        self.outputs.iter().find(|(output, _)| output == name).map(|(_, digest)| digest)
    }
}

/// The parts of a node's key, from the results of its producers.
fn parts(node: &Node, params: &Value, made: &[Option<Made>]) -> Result<KeyParts, String> {
    for edge in &node.edges {
        input(edge, made)?;
    }
    let digest = |edge: &Edge| input(edge, made).map_or(Value::Null, |(_, digest)| Value::String(digest.0.clone()));
    Ok(node.parts(params, &digest))
}

/// The key of a node, from the results of its producers.
pub(super) fn key(node: &Node, made: &[Option<Made>]) -> Result<Digest, String> {
    for edge in &node.edges {
        input(edge, made)?;
    }
    let digest = |edge: &Edge| input(edge, made).ok().map(|(_, digest)| digest);
    node.key_of(&digest).ok_or_else(|| "an input is not there".to_owned())
}

fn input<'a>(edge: &Edge, made: &'a [Option<Made>]) -> Result<(&'a Made, &'a Digest), String> {
    let made = made[edge.from].as_ref().ok_or_else(|| format!("the input `{}` is not there", edge.reference))?;
    let digest = made.output(&edge.output).ok_or_else(|| {
        format!(
            "the stored result behind the input `{}` has no output `{}`; run its stage with `--again`",
            edge.reference, edge.output
        )
    })?;
    Ok((made, digest))
}

/// The request for an attempt at `node`.
pub(super) fn request(
    node: &Node,
    key: Digest,
    again: bool,
    grant: Grant,
    visible_devices: Option<String>,
    store: &Store,
    made: &[Option<Made>],
) -> Result<Request, String> {
    let params = node.spec.stage.params();
    let mut inputs = BTreeMap::new();
    for edge in &node.edges {
        let (made, digest) = input(edge, made)?;
        let (key, digest) = (made.key.clone(), digest.clone());
        let input = RequestInput { key, output: edge.output.clone(), digest, artifact: edge.artifact };
        inputs.insert(edge.reference.clone(), input);
    }
    Ok(Request {
        protocol: PROTOCOL,
        store: store.root().to_owned(),
        key,
        recipe: node.recipe.clone(),
        kind: node.spec.kind.name.to_owned(),
        parts: parts(node, &params, made)?,
        outputs: node.spec.stage.outputs(),
        inputs,
        files: node.files.clone(),
        names: node.names.clone(),
        again,
        // The worker sees one GPU, whichever it is.
        device: if grant.gpu.is_some() { "cuda:0" } else { "cpu" }.to_owned(),
        threads: grant.cpus,
        visible_devices,
        save_every_seconds: parse_duration(&node.spec.run.save_every)?.as_secs_f64(),
        config_text: config_text(node.spec.kind.name, &params),
        numerics: BTreeMap::new(),
        params,
    })
}

/// A stage's resolved table as a person would write it: edges and files as strings, no empty fields.
fn config_text(kind: &str, params: &Value) -> String {
    let mut table = Map::from_iter([("kind".to_owned(), Value::String(kind.to_owned()))]);
    if let Value::Object(fields) = plain(params).unwrap_or_default() {
        table.extend(fields);
    }
    toml::to_string(&table).unwrap_or_else(|_| format!("{:#}\n", Value::Object(table)))
}

fn plain(value: &Value) -> Option<Value> {
    match value {
        Value::Null => None,
        Value::Object(fields) => {
            Some(match fields.get("$input").or_else(|| fields.get("as")).or_else(|| fields.get("$file")) {
                Some(Value::String(text)) if fields.contains_key("$input") || fields.contains_key("$file") => {
                    Value::String(text.clone())
                }
                _ => fields.iter().filter_map(|(name, value)| Some((name.clone(), plain(value)?))).collect(),
            })
        }
        Value::Array(items) => Some(items.iter().filter_map(plain).collect()),
        other => Some(other.clone()),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn the_configuration_reads_like_the_users_own() {
        let params = json!({
            "steps": 10, "model": {"$input": "sft", "wants": "checkpoint"}, "preset": null,
            "files": [{"$file": "/a/b", "as": "b"}], "kl": {"beta": 0.5}
        });
        let text = config_text("grpo", &params);
        let table: toml::Table = text.parse().unwrap();
        let expected: toml::Table =
            "kind = 'grpo'\nsteps = 10\nmodel = 'sft'\nfiles = ['b']\n[kl]\nbeta = 0.5".parse().unwrap();
        assert_eq!(table, expected, "{text}");
    }
}
