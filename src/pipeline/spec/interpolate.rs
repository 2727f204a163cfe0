//! `${params.x}`: whole-string references keep the type of x, references inside a longer string become text.
//!
//! `$${` stands for a literal `${`. Parameters may rest on other parameters, not on themselves.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use crate::pipeline::spec::diagnostic::{Mistake, Report, did_you_mean};
use crate::pipeline::spec::source::{Sources, Span};
use crate::pipeline::spec::tree::{Entry, Node, Table, Value};

/// The parameters of a trial, resolved.
pub(super) struct Params {
    values: BTreeMap<Arc<str>, Node>,
}

/// A piece of a string.
#[derive(Debug, PartialEq)]
enum Piece<'a> {
    Text(&'a str),
    /// What stands between `${` and `}`.
    Reference(&'a str),
    /// A `${` without an end.
    Unclosed(&'a str),
}

impl Params {
    /// Resolves the table `[params]`.
    pub(super) fn resolve(table: Option<&Entry>, sources: &Sources, report: &mut Report) -> Self {
        let mut params = Self { values: BTreeMap::new() };
        let Some(entry) = table else { return params };
        let Some(table) = entry.node.table() else {
            report.add(Mistake::at(entry.node.span, "`params` is not a table"));
            return params;
        };
        for name in table.keys() {
            params.resolve_one(name, table, &mut Vec::new(), sources, report);
        }
        params
    }

    fn resolve_one(
        &mut self,
        name: &Arc<str>,
        table: &Table,
        within: &mut Vec<Arc<str>>,
        sources: &Sources,
        report: &mut Report,
    ) {
        if self.values.contains_key(name) {
            return;
        }
        let entry = &table[name];
        if let Some(begin) = within.iter().position(|outer| outer == name) {
            let mut names: Vec<&str> = within[begin..].iter().map(AsRef::as_ref).collect();
            names.push(name);
            let message = format!("the parameters rest on themselves: `{}`", names.join(" -> "));
            report.add(Mistake::at(entry.node.span, message));
            within[begin..].iter().for_each(|name| {
                self.values.insert(Arc::clone(name), Node::new(Value::Invalid, table[name].node.span));
            });
            return;
        }
        within.push(Arc::clone(name));
        if let Some(text) = entry.node.text() {
            for referred in referred(text) {
                if let Some((referred, _)) = table.get_key_value(referred) {
                    self.resolve_one(referred, table, within, sources, report);
                }
            }
        }
        within.pop();
        if self.values.contains_key(name) {
            return;
        }
        let node = if matches!(entry.node.value, Value::Array(_) | Value::Table(_)) {
            let found = entry.node.type_name();
            let message = format!("the parameter `{name}` is {found}, but parameters are scalars");
            report.add(Mistake::at(entry.node.span, message));
            Node::new(Value::Invalid, entry.node.span)
        } else {
            let names = table.keys().map(AsRef::as_ref).collect();
            self.apply_among(&entry.node, &names, sources, report).unwrap_or_else(|| entry.node.clone())
        };
        self.values.insert(Arc::clone(name), node);
    }

    /// `node` with every reference replaced; `None` where it has none.
    pub(super) fn apply(&self, node: &Node, sources: &Sources, report: &mut Report) -> Option<Node> {
        if !mentions_any(node) {
            return None;
        }
        self.apply_among(node, &self.values.keys().map(AsRef::as_ref).collect(), sources, report)
    }

    fn apply_among(&self, node: &Node, names: &BTreeSet<&str>, sources: &Sources, report: &mut Report) -> Option<Node> {
        match &node.value {
            Value::String(text) => {
                if text.contains("${") {
                    Some(self.string(node, text, names, sources, report))
                } else {
                    None
                }
            }
            Value::Array(items) => {
                let replaced: Vec<Option<Node>> =
                    items.iter().map(|item| self.apply_among(item, names, sources, report)).collect();
                if replaced.iter().all(Option::is_none) {
                    return None;
                }
                let whole = items.iter().zip(replaced).map(|(old, new)| new.unwrap_or_else(|| old.clone())).collect();
                Some(Node { value: Value::Array(Arc::new(whole)), ..*node })
            }
            Value::Table(table) => {
                let mut changed: Option<Table> = None;
                for (key, entry) in table.iter() {
                    if let Some(new) = self.apply_among(&entry.node, names, sources, report) {
                        let copy = changed.get_or_insert_with(|| table.as_ref().clone());
                        copy.insert(Arc::clone(key), Entry { key: entry.key, node: new });
                    }
                }
                changed.map(|table| Node { value: Value::Table(Arc::new(table)), ..*node })
            }
            _ => None,
        }
    }

    fn string(&self, node: &Node, text: &str, names: &BTreeSet<&str>, sources: &Sources, report: &mut Report) -> Node {
        let pieces = pieces(text);
        let mut joined = String::new();
        let mut valid = true;
        for piece in &pieces {
            match piece {
                Piece::Text(text) => joined.push_str(text),
                Piece::Unclosed(text) => {
                    let span = narrowed(node.span, text, sources);
                    let hint = "write `$${` for a literal `${`".to_owned();
                    report.add(Mistake::at(span, "`${` without its `}`").hint(hint));
                    valid = false;
                }
                Piece::Reference(inner) => {
                    let value = inner.trim().strip_prefix("params.").and_then(|name| self.values.get(name));
                    match value {
                        Some(value) if pieces.len() == 1 => {
                            return Node { via: Some(node.span), ..value.clone() };
                        }
                        Some(value) => match value.scalar_text() {
                            Some(text) => joined.push_str(&text),
                            None => valid = false,
                        },
                        None => {
                            report.add(unknown(inner, narrowed(node.span, &format!("${{{inner}}}"), sources), names));
                            valid = false;
                        }
                    }
                }
            }
        }
        let value = if valid { Value::String(joined.into()) } else { Value::Invalid };
        Node { value, ..*node }
    }
}

/// Whether anything in a value may refer to a parameter.
fn mentions_any(node: &Node) -> bool {
    match &node.value {
        Value::String(text) => text.contains("${"),
        Value::Array(items) => items.iter().any(mentions_any),
        Value::Table(table) => table.values().any(|entry| mentions_any(&entry.node)),
        _ => false,
    }
}

/// The names of the parameters that a text refers to.
pub(super) fn referred(text: &str) -> Vec<&str> {
    let name = |piece| match piece {
        Piece::Reference(inner) => str::trim(inner).strip_prefix("params."),
        Piece::Text(_) | Piece::Unclosed(_) => None,
    };
    pieces(text).into_iter().filter_map(name).collect()
}

fn unknown(inner: &str, span: Span, names: &BTreeSet<&str>) -> Mistake {
    let inner = inner.trim();
    let Some(name) = inner.strip_prefix("params.") else {
        let hint = if names.contains(inner) {
            format!("did you mean `${{params.{inner}}}`?")
        } else {
            "only `${params.NAME}` is known; write `$${` for a literal `${`".to_owned()
        };
        return Mistake::at(span, format!("unknown reference `${{{inner}}}`")).hint(hint);
    };
    let known: Vec<String> = names.iter().map(|name| format!("`{name}`")).collect();
    let label =
        if known.is_empty() { "there are no parameters".to_owned() } else { format!("known are {}", known.join(", ")) };
    Mistake::at(span, format!("unknown parameter `{name}`"))
        .label(label)
        .hint(did_you_mean(name, names.iter().copied()).or_else(|| Some(format!("add `{name} = ...` to `[params]`"))))
}

/// The place of `text` inside the literal at `span`, where it stands there as it is.
fn narrowed(span: Span, text: &str, sources: &Sources) -> Span {
    sources.text(span).find(text).map_or(span, |at| {
        let start = span.start + at as u32;
        Span { start, end: start + text.len() as u32, ..span }
    })
}

fn pieces(text: &str) -> Vec<Piece<'_>> {
    let mut pieces = Vec::new();
    let mut rest = text;
    while let Some(at) = rest.find("${") {
        if rest[..at].ends_with('$') {
            // Of `$${` the second dollar is dropped: what stays is the literal.
            push_text(&mut pieces, &rest[..at - 1]);
            push_text(&mut pieces, &rest[at..at + 2]);
            rest = &rest[at + 2..];
            continue;
        }
        push_text(&mut pieces, &rest[..at]);
        let Some(end) = rest[at..].find('}') else {
            pieces.push(Piece::Unclosed(&rest[at..]));
            return pieces;
        };
        pieces.push(Piece::Reference(&rest[at + 2..at + end]));
        rest = &rest[at + end + 1..];
    }
    push_text(&mut pieces, rest);
    pieces
}

fn push_text<'a>(pieces: &mut Vec<Piece<'a>>, text: &'a str) {
    if !text.is_empty() {
        pieces.push(Piece::Text(text));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pipeline::spec::parse::parse;

    fn applied(text: &str) -> (serde_json::Value, String) {
        let mut sources = Sources::default();
        let source = sources.add("a.toml".into(), "".into(), text.to_owned());
        let mut report = Report::default();
        let root = parse(&mut sources, source, &mut report);
        let params = Params::resolve(root.get("params"), &sources, &mut report);
        let stages = &root.get("stages").unwrap().node;
        let applied = params.apply(stages, &sources, &mut report).unwrap_or_else(|| stages.clone());
        (applied.json(), report.finish(&sources).render(false))
    }

    #[test]
    fn whole_references_keep_their_type_and_others_become_text() {
        let (json, errors) = applied(
            "[params]\nrate = 1e-5\ntwice = \"${params.rate}\"\nname = \"r${params.rate}\"\n[stages]\na = \"${params.twice}\"\n\
             b = [\"x-${ params.name }-$${params.rate}-{inputs.a}\"]\nc = { d = \"$$${params.name}\", e = 1 }\n",
        );
        assert_eq!(errors, "");
        let expected = serde_json::json!({"a": 1e-5, "b": ["x-r1e-5-${params.rate}-{inputs.a}"], "c": {"d": "$${params.name}", "e": 1}});
        assert_eq!(json, expected);
    }

    #[test]
    fn unknown_and_circular_references_are_told_where_they_stand() {
        let (json, errors) = applied(
            "[params]\nseed = 1\na = \"${params.b}\"\nb = \"${params.a}\"\nlist = [1]\n[stages]\nx = \"v ${params.sead} w\"\n\
             y = \"${seed}\"\nz = \"${params.a\"\nw = \"${params.a}\"\n",
        );
        assert_eq!(json, serde_json::json!({"x": null, "y": null, "z": null, "w": null}));
        insta::assert_snapshot!(errors, @r#"
            error: the parameters rest on themselves: `a -> b -> a`
             --> a.toml:3:5
            3 | a = "${params.b}"
              |     ^^^^^^^^^^^^^

            error: the parameter `list` is an array, but parameters are scalars
             --> a.toml:5:8
            5 | list = [1]
              |        ^^^

            error: unknown parameter `sead`
             --> a.toml:7:8
            7 | x = "v ${params.sead} w"
              |        ^^^^^^^^^^^^^^ known are `a`, `b`, `list`, `seed`
            hint: did you mean `seed`?

            error: unknown reference `${seed}`
             --> a.toml:8:6
            8 | y = "${seed}"
              |      ^^^^^^^
            hint: did you mean `${params.seed}`?

            error: `${` without its `}`
             --> a.toml:9:6
            9 | z = "${params.a"
              |      ^^^^^^^^^^
            hint: write `$${` for a literal `${`
        "#);
    }
}
