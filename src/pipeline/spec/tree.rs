//! The spanned tree: TOML values of which every one knows where it was written, through overlays and substitutions.
//!
//! It knows no schema. Tables and arrays are shared, so that the trials of a sweep copy only what differs between them.

use std::collections::BTreeMap;
use std::hash::{Hash, Hasher};
use std::sync::Arc;

use serde_json::Value as Json;

use crate::pipeline::spec::source::Span;

/// A value and its place.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Node {
    /// The value.
    pub(super) value: Value,
    /// Where it is written.
    pub(super) span: Span,
    /// Where `${...}` took it from `span`, if anything did.
    pub(super) via: Option<Span>,
}

/// A value.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Value {
    /// Something that was wrong and has been reported; nothing more is said of it.
    Invalid,
    /// A string.
    String(Arc<str>),
    /// An integer of at most 2^53 in magnitude.
    Integer(i64),
    /// A finite float.
    Float(f64),
    /// A boolean.
    Boolean(bool),
    /// An array.
    Array(Arc<Vec<Node>>),
    /// A table.
    Table(Arc<Table>),
}

/// A table: key to entry.
pub(super) type Table = BTreeMap<Arc<str>, Entry>;

/// A value under a key.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Entry {
    /// Where the key is written; for a table, where it was first.
    pub(super) key: Span,
    /// The value.
    pub(super) node: Node,
}

impl Node {
    /// `value` at `span`.
    pub(super) fn new(value: Value, span: Span) -> Self {
        Self { value, span, via: None }
    }

    /// A table without entries.
    pub(super) fn empty(span: Span) -> Self {
        Self::new(Value::Table(Arc::default()), span)
    }

    /// `node` under `path`, every key at the place `key`.
    pub(super) fn nested(path: &[String], key: Span, node: Self) -> Self {
        path.iter().rev().fold(node, |node, name| {
            let entry = Entry { key, node };
            Self::new(Value::Table(Arc::new(Table::from([(Arc::from(name.as_str()), entry)]))), key)
        })
    }

    /// The entries, where it is a table.
    pub(super) fn table(&self) -> Option<&Table> {
        if let Value::Table(table) = &self.value { Some(table) } else { None }
    }

    /// The elements, where it is an array.
    pub(super) fn array(&self) -> Option<&[Self]> {
        if let Value::Array(items) = &self.value { Some(items) } else { None }
    }

    /// The text, where it is a string.
    pub(super) fn text(&self) -> Option<&str> {
        if let Value::String(text) = &self.value { Some(text) } else { None }
    }

    /// The entry under `key`, where it is a table that has one.
    pub(super) fn get(&self, key: &str) -> Option<&Entry> {
        self.table()?.get(key)
    }

    /// Takes the entry under `key` out.
    pub(super) fn remove(&mut self, key: &str) -> Option<Entry> {
        if let Value::Table(table) = &mut self.value { Arc::make_mut(table).remove(key) } else { None }
    }

    /// Lays `over` on top: tables merge, arrays and scalars replace, `false` over a table drops it.
    ///
    /// A table that says another `kind` replaces: what the old kind was told means nothing to the new one.
    pub(super) fn overlay(&mut self, over: &Self) {
        let (Value::Table(base), Value::Table(over_table)) = (&mut self.value, &over.value) else {
            *self = over.clone();
            return;
        };
        let base = Arc::make_mut(base);
        for (key, entry) in over_table.iter() {
            let Some(existing) = base.get_mut(key) else {
                base.insert(Arc::clone(key), entry.clone());
                continue;
            };
            match (&existing.node.value, &entry.node.value) {
                (Value::Table(_), Value::Table(_)) if !entry.node.is_another_kind_than(&existing.node) => {
                    existing.node.overlay(&entry.node);
                }
                (Value::Table(_), Value::Boolean(false)) => {
                    base.remove(key);
                }
                _ => *existing = entry.clone(),
            }
        }
    }

    /// Whether both are tables that say their `kind`, and differ in it.
    fn is_another_kind_than(&self, other: &Self) -> bool {
        let kind = |node: &Self| node.get("kind").and_then(|entry| entry.node.text().map(str::to_owned));
        matches!((kind(self), kind(other)), (Some(own), Some(others)) if own != others)
    }

    /// What people call its type.
    pub(super) fn type_name(&self) -> &'static str {
        match self.value {
            Value::Invalid => "something invalid",
            Value::String(_) => "a string",
            Value::Integer(_) => "an integer",
            Value::Float(_) => "a float",
            Value::Boolean(_) => "a boolean",
            Value::Array(_) => "an array",
            Value::Table(_) => "a table",
        }
    }

    /// A scalar as text, as it appears inside a longer string and in the names of trials.
    pub(super) fn scalar_text(&self) -> Option<String> {
        match &self.value {
            Value::String(text) => Some(text.to_string()),
            Value::Integer(number) => Some(number.to_string()),
            Value::Float(number) => Some(format!("{number:?}")),
            Value::Boolean(truth) => Some(truth.to_string()),
            Value::Invalid | Value::Array(_) | Value::Table(_) => None,
        }
    }

    /// The plain value; what is invalid becomes null.
    pub(super) fn json(&self) -> Json {
        match &self.value {
            Value::Invalid => Json::Null,
            Value::String(text) => Json::from(text.as_ref()),
            Value::Integer(number) => Json::from(*number),
            Value::Float(number) => Json::from(*number),
            Value::Boolean(truth) => Json::from(*truth),
            Value::Array(items) => Json::Array(items.iter().map(Self::json).collect()),
            Value::Table(table) => {
                Json::Object(table.iter().map(|(key, entry)| (key.to_string(), entry.node.json())).collect())
            }
        }
    }

    /// Whether anything in it is invalid.
    pub(super) fn has_invalid(&self) -> bool {
        match &self.value {
            Value::Invalid => true,
            Value::Array(items) => items.iter().any(Self::has_invalid),
            Value::Table(table) => table.values().any(|entry| entry.node.has_invalid()),
            _ => false,
        }
    }
}

impl Hash for Node {
    fn hash<H: Hasher>(&self, state: &mut H) {
        self.span.hash(state);
        self.via.hash(state);
        std::mem::discriminant(&self.value).hash(state);
        match &self.value {
            Value::Invalid => {}
            Value::String(text) => text.hash(state),
            Value::Integer(number) => number.hash(state),
            Value::Float(number) => number.to_bits().hash(state),
            Value::Boolean(truth) => truth.hash(state),
            Value::Array(items) => items.hash(state),
            Value::Table(table) => {
                for (key, entry) in table.iter() {
                    key.hash(state);
                    entry.key.hash(state);
                    entry.node.hash(state);
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn node(json: &Json, start: u32) -> Node {
        let span = Span { source: 0, start, end: start };
        let value = match json {
            Json::Null => Value::Invalid,
            Json::Bool(truth) => Value::Boolean(*truth),
            Json::Number(number) => {
                number.as_i64().map_or_else(|| Value::Float(number.as_f64().unwrap()), Value::Integer)
            }
            Json::String(text) => Value::String(text.as_str().into()),
            Json::Array(items) => Value::Array(Arc::new(items.iter().map(|item| node(item, start)).collect())),
            Json::Object(fields) => {
                let entry = |(key, value): (&String, &Json)| {
                    (Arc::from(key.as_str()), Entry { key: span, node: node(value, start) })
                };
                Value::Table(Arc::new(fields.iter().map(entry).collect()))
            }
        };
        Node::new(value, span)
    }

    #[test]
    fn tables_merge_arrays_and_scalars_replace_and_false_drops() {
        let mut base = node(
            &serde_json::json!({"a": {"x": 1, "y": {"deep": 1, "kept": 2}}, "list": [1, 2, 3], "gone": {"z": 1}, "flag": true}),
            1,
        );
        let over = serde_json::json!({"a": {"y": {"deep": 5}, "new": "n"}, "list": [9], "gone": false, "flag": false});
        base.overlay(&node(&over, 2));
        let merged = serde_json::json!({
            "a": {"x": 1, "y": {"deep": 5, "kept": 2}, "new": "n"}, "list": [9], "flag": false
        });
        assert_eq!(base.json(), merged);
        let place = |path: &[&str]| path.iter().fold(&base, |node, key| &node.get(key).unwrap().node).span.start;
        assert_eq!([place(&["a", "x"]), place(&["a", "y", "deep"]), place(&["a", "y", "kept"])], [1, 2, 1]);
        assert_eq!(base.get("a").unwrap().key.start, 1, "a merged table keeps its header");
    }

    #[test]
    fn a_nested_path_lays_over_one_value() {
        let mut base = node(&serde_json::json!({"stages": {"a": {"x": 1, "y": 2}}}), 1);
        let path = ["stages", "a", "y"].map(str::to_owned);
        base.overlay(&Node::nested(&path, Span { source: 0, start: 7, end: 8 }, node(&serde_json::json!(3), 9)));
        assert_eq!(base.json(), serde_json::json!({"stages": {"a": {"x": 1, "y": 3}}}));
    }
}
