//! The walk of a value against its shape: every unknown, missing, mistyped and out-of-range value, and the clean JSON.
//!
//! On the way it collects the edges and turns the paths of files into absolute ones. It knows no kind by name.

use serde_json::{Map, Value as Json};

use crate::file::names_a_repository;
use crate::pipeline::spec::diagnostic::{Mistake, did_you_mean, expected, nearest};
use crate::pipeline::spec::shape::{Array, Fields, Shape, ShapeId, Shapes, Text};
use crate::pipeline::spec::source::{Sources, Span, absolute};
use crate::pipeline::spec::tree::{Entry, Node, Table, Value};

/// An edge as it is written.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Edge {
    /// The field that holds it.
    pub(super) field: String,
    /// `stage` or `stage.output`.
    pub(super) reference: String,
    /// The type that is wanted; `any` for any.
    pub(super) wants: String,
    /// Where it is written.
    pub(super) span: Span,
    /// Where `${...}` used it.
    pub(super) via: Option<Span>,
}

/// What a walk found.
#[derive(Debug, Default)]
pub(super) struct Findings {
    /// What is wrong.
    pub(super) mistakes: Vec<Mistake>,
    /// The edges, in the order of the fields.
    pub(super) edges: Vec<Edge>,
    /// Whether something was met that had been reported before.
    pub(super) invalid: bool,
}

impl Findings {
    /// Whether the value is as it should be.
    pub(super) fn is_clean(&self) -> bool {
        self.mistakes.is_empty() && !self.invalid
    }
}

/// Walks `entry` against `shapes`; `owner` is how messages call what the value belongs to, such as "stage `sft`".
pub(super) fn walk(shapes: &Shapes, entry: &Entry, owner: &str, sources: &Sources, extra: &[&str]) -> (Json, Findings) {
    let mut walk = Walk { shapes, sources, owner, extra, path: Vec::new(), siblings: None, found: Findings::default() };
    let json = walk.value(shapes.root(), &entry.node, entry.key);
    (json, walk.found)
}

struct Walk<'a> {
    shapes: &'a Shapes,
    sources: &'a Sources,
    owner: &'a str,
    /// Names that the outermost table also knows, for suggestions.
    extra: &'a [&'a str],
    path: Vec<String>,
    /// The map of which the walk is at an entry, and the entry's name: what a stray entry may have meant.
    siblings: Option<(&'a Table, &'a str)>,
    found: Findings,
}

impl<'a> Walk<'a> {
    fn value(&mut self, shape: ShapeId, node: &'a Node, key: Span) -> Json {
        let shapes = self.shapes;
        match (shapes.get(shape), &node.value) {
            (_, Value::Invalid) => {
                self.found.invalid = true;
                Json::Null
            }
            (Shape::Any, _) => {
                self.found.invalid |= node.has_invalid();
                node.json()
            }
            (Shape::Text(text), Value::String(value)) => self.text(text, value, node),
            (Shape::Names(names), Value::String(value)) => {
                if !names.iter().any(|name| **name == **value) {
                    let names = || names.iter().map(String::as_str);
                    let message = format!("unknown value `{value}` of {} in {}", self.here(), self.owner);
                    let mistake = Mistake::at(node.span, message).label(expected(names()));
                    self.found.mistakes.push(mistake.hint(did_you_mean(value, names())).via(node.via));
                }
                node.json()
            }
            (Shape::Integer(range) | Shape::Number(range), Value::Integer(number)) => {
                self.number(range.refuses(*number as f64), node)
            }
            (Shape::Number(range), Value::Float(number)) => self.number(range.refuses(*number), node),
            (Shape::Boolean, Value::Boolean(_)) => node.json(),
            (Shape::Array(array), Value::Array(items)) => self.array(array, items, node),
            (Shape::Table(fields), Value::Table(table)) => self.table(fields, table, node, key),
            (Shape::Tagged { tag, forms }, Value::Table(table)) => self.tagged(tag, forms, table, node, key),
            (Shape::Choice(choices), _) => self.choice(shape, choices, node, key),
            (wanted, _) => {
                let text = shapes.expected(shape).map_or_else(|| shapes.describe(wanted), str::to_owned);
                self.mistyped(&text, wanted, node);
                Json::Null
            }
        }
    }

    /// The dotted path of where the walk stands.
    fn here(&self) -> String {
        format!("`{}`", self.path.join(".").replace(".[", "["))
    }

    /// ` in PATH of OWNER`, or ` in OWNER` at the outermost table.
    fn within(&self) -> String {
        if self.path.is_empty() {
            format!("in {}", self.owner)
        } else {
            format!("in {} of {}", self.here(), self.owner)
        }
    }

    fn number(&mut self, refused: Option<String>, node: &Node) -> Json {
        if let Some(asked) = refused {
            let message = format!("{} is out of range in {}", self.here(), self.owner);
            self.found.mistakes.push(Mistake::at(node.span, message).label(format!("expected {asked}")).via(node.via));
        }
        node.json()
    }

    fn mistyped(&mut self, wanted: &str, shape: &Shape, node: &Node) {
        let message = if self.path.is_empty() {
            format!("{} is not {wanted}", self.owner)
        } else {
            format!("wrong type of {} in {}", self.here(), self.owner)
        };
        let hint = match (shape, &node.value) {
            (Shape::Integer(_), Value::Float(number)) if number.fract() == 0.0 && number.abs() < 1e15 => {
                Some(format!("write it as an integer: `{number:.0}`"))
            }
            (Shape::Integer(_) | Shape::Number(_), Value::String(text)) if text.trim().parse::<f64>().is_ok() => {
                Some("leave the quotes out".to_owned())
            }
            (Shape::Boolean, Value::String(text)) if matches!(text.as_ref(), "true" | "false") => {
                Some("leave the quotes out".to_owned())
            }
            (Shape::Text(Text::Input(_)), Value::Table(_)) => Some("an input is the name of a stage".to_owned()),
            (Shape::Table(_) | Shape::Tagged { .. }, Value::Boolean(false)) => {
                Some("`false` drops a table that it is laid over, and there is none".to_owned())
            }
            _ => None,
        };
        let label = format!("expected {wanted}, found {}", node.type_name());
        self.found.mistakes.push(Mistake::at(node.span, message).label(label).hint(hint).via(node.via));
    }

    fn text(&mut self, text: &Text, value: &str, node: &Node) -> Json {
        match text {
            Text::Plain(least) => {
                if value.chars().count() < *least {
                    let message = format!("{} is too short in {}", self.here(), self.owner);
                    let label = format!("expected at least {least} character{}", if *least == 1 { "" } else { "s" });
                    self.found.mistakes.push(Mistake::at(node.span, message).label(label).via(node.via));
                }
                Json::from(value)
            }
            Text::Input(wants) => {
                self.found.edges.push(Edge {
                    field: self.path.join(".").replace(".[", "["),
                    reference: value.to_owned(),
                    wants: wants.clone(),
                    span: node.span,
                    via: node.via,
                });
                Json::from(value)
            }
            Text::Source if names_a_repository(value) && !self.beside(value, node).exists() => Json::from(value),
            Text::File | Text::Source => {
                self.file(value, node).map_or(Json::Null, |path| serde_json::json!({"$file": path}))
            }
            Text::Placed => {
                let inside = std::path::Path::new(value)
                    .components()
                    .all(|part| matches!(part, std::path::Component::Normal(_) | std::path::Component::CurDir));
                if !inside {
                    let message = format!("{} leads out of its folder in {}", self.here(), self.owner);
                    let label = "expected a relative path without `..`";
                    self.found.mistakes.push(Mistake::at(node.span, message).label(label).via(node.via));
                    return Json::Null;
                }
                self.file(value, node).map_or(Json::Null, |path| serde_json::json!({"$file": path, "as": value}))
            }
        }
    }

    /// The path `value` as seen from the text in which it is written.
    fn beside(&self, value: &str, node: &Node) -> std::path::PathBuf {
        self.sources.get(node.span.source).folder.join(value)
    }

    /// The absolute path of the file that `value` names, relative to the text in which it is written.
    fn file(&mut self, value: &str, node: &Node) -> Option<std::path::PathBuf> {
        let path = self.beside(value, node);
        match absolute(&path) {
            Ok(path) => Some(path),
            Err(error) => {
                let shown = crate::pipeline::spec::source::folded(&path);
                let label = match error.kind() {
                    std::io::ErrorKind::NotFound => format!("there is no `{}`", shown.display()),
                    _ => format!("`{}`: {error}", shown.display()),
                };
                let message = format!("cannot find the file of {} in {}", self.here(), self.owner);
                let hint = "paths are relative to the file in which they are written".to_owned();
                self.found.mistakes.push(Mistake::at(node.span, message).label(label).hint(hint).via(node.via));
                None
            }
        }
    }

    fn array(&mut self, array: &Array, items: &'a [Node], node: &Node) -> Json {
        if items.len() < array.least || items.len() > array.most {
            let message = format!("wrong length of {} in {}", self.here(), self.owner);
            let asked = match (array.least, array.most) {
                (least, most) if least == most => format!("{least}"),
                (least, usize::MAX) => format!("at least {least}"),
                (0, most) => format!("at most {most}"),
                (least, most) => format!("{least} to {most}"),
            };
            let label = format!("expected {asked}, found {}", items.len());
            self.found.mistakes.push(Mistake::at(node.span, message).label(label).via(node.via));
        }
        let walked = items.iter().enumerate().map(|(index, item)| {
            let Some(shape) = array.first.get(index).copied().or(array.items) else { return item.json() };
            self.path.push(format!("[{index}]"));
            let json = self.value(shape, item, item.span);
            self.path.pop();
            json
        });
        Json::Array(walked.collect())
    }

    fn table(&mut self, fields: &Fields, table: &'a Table, node: &Node, key: Span) -> Json {
        let mut json = Map::new();
        let mut misspelt = Vec::new();
        let known = || fields.named.keys().map(String::as_str);
        for (name, entry) in table {
            let Some(shape) = fields.named.get(name.as_ref()).copied().or(fields.others) else {
                let message = format!("unknown field `{name}` {}", self.within());
                let extra = if self.path.is_empty() { self.extra } else { &[] };
                // What is given already cannot be what was meant.
                let open = || known().filter(|field| !table.contains_key(*field));
                let meant = nearest(name, open().chain(extra.iter().copied()));
                misspelt.extend(meant);
                let meant = meant.or_else(|| nearest(name, known()));
                let hint = meant.map(|meant| format!("did you mean `{meant}`?"));
                // A long list hides what may be missing.
                let label = if known().count() > 12 { expected(open()) } else { expected(known()) };
                self.found.mistakes.push(Mistake::at(entry.key, message).label(label).hint(hint));
                continue;
            };
            self.path.push(name.to_string());
            let is_named = fields.named.contains_key(name.as_ref());
            let outer = std::mem::replace(&mut self.siblings, (!is_named).then_some((table, name.as_ref())));
            let value = self.value(shape, &entry.node, entry.key);
            self.siblings = outer;
            self.path.pop();
            json.insert(name.to_string(), value);
        }
        for name in &fields.required {
            if !table.contains_key(name.as_str()) && !misspelt.contains(&name.as_str()) {
                self.missing(name, fields, node, key);
            }
        }
        // Of a field that is missing it is told already.
        if table.len() < fields.least && fields.required.iter().all(|name| table.contains_key(name.as_str())) {
            let message = format!("too few entries {}", self.within());
            let label = format!("expected at least {}, found {}", fields.least, table.len());
            self.found.mistakes.push(Mistake::at(key, message).label(label).about(self.path.join(".")));
        }
        Json::Object(json)
    }

    /// Which other entry of the map was meant, where this one lacks what makes it whole.
    fn meant(&self) -> Option<String> {
        let others = self
            .siblings
            .into_iter()
            .flat_map(|(table, own)| table.keys().map(AsRef::as_ref).filter(move |other| *other != own));
        did_you_mean(self.path.last()?, others)
    }

    fn missing(&mut self, name: &str, fields: &Fields, node: &Node, key: Span) {
        let what = fields.named.get(name).map(|shape| self.shapes.describe(self.shapes.get(*shape)));
        let message = format!("missing field `{name}` {}", self.within());
        let about = format!("{}.{}.{name}", self.owner, self.path.join("."));
        let label = what.map_or_else(String::new, |what| format!("expected `{name}`, {what}"));
        let mistake = Mistake::at(key, message).label(label).about(about).via(node.via).absent_field();
        self.found.mistakes.push(mistake.hint(self.meant()));
    }

    fn tagged(
        &mut self,
        tag: &str,
        forms: &std::collections::BTreeMap<String, ShapeId>,
        table: &'a Table,
        node: &'a Node,
        key: Span,
    ) -> Json {
        let names = || forms.keys().map(String::as_str);
        let Some(entry) = table.get(tag) else {
            let message = format!("missing field `{tag}` {}", self.within());
            let about = format!("{}.{}.{tag}", self.owner, self.path.join("."));
            let mistake = Mistake::at(key, message).label(expected(names())).about(about).via(node.via);
            self.found.mistakes.push(mistake.hint(self.meant()).absent_field());
            return Json::Null;
        };
        match &entry.node.value {
            Value::String(name) => {
                if let Some(form) = forms.get(name.as_ref()) {
                    return self.value(*form, node, key);
                }
                let message = format!("unknown {tag} `{name}` {}", self.within());
                let mistake = Mistake::at(entry.node.span, message).label(expected(names()));
                self.found.mistakes.push(mistake.hint(did_you_mean(name, names())).via(entry.node.via));
            }
            Value::Invalid => self.found.invalid = true,
            _ => {
                self.path.push(tag.to_owned());
                let wanted = Shape::Names(names().map(str::to_owned).collect());
                self.mistyped(&self.shapes.describe(&wanted), &wanted, &entry.node);
                self.path.pop();
            }
        }
        Json::Null
    }

    /// The alternative that fits, or the one that fits best.
    fn choice(&mut self, shape: ShapeId, choices: &[ShapeId], node: &'a Node, key: Span) -> Json {
        let fitting: Vec<ShapeId> =
            choices.iter().copied().filter(|choice| self.shapes.get(*choice).takes(&node.value)).collect();
        if fitting.is_empty() {
            let wanted: Vec<String> =
                choices.iter().map(|choice| self.shapes.describe(self.shapes.get(*choice))).collect();
            let text = self.shapes.expected(shape).map_or_else(|| wanted.join(" or "), str::to_owned);
            self.mistyped(&text, &Shape::Any, node);
            return Json::Null;
        }
        let attempts = fitting.into_iter().map(|choice| {
            let before = std::mem::take(&mut self.found);
            let json = self.value(choice, node, key);
            (json, std::mem::replace(&mut self.found, before))
        });
        let best = attempts.min_by_key(|(_, found)| found.mistakes.len());
        let Some((json, found)) = best else { return Json::Null };
        self.found.mistakes.extend(found.mistakes);
        self.found.edges.extend(found.edges);
        self.found.invalid |= found.invalid;
        json
    }
}

impl Shapes {
    /// What people call a shape: "an integer", "a table", "the name of a stage that makes tokens".
    fn describe(&self, shape: &Shape) -> String {
        match shape {
            Shape::Any => "a value".to_owned(),
            Shape::Text(Text::Plain(_)) => "a string".to_owned(),
            Shape::Text(Text::Input(wants)) if wants == "any" => "the name of a stage".to_owned(),
            Shape::Text(Text::Input(wants)) => format!("the name of a stage that makes {}", with_article(wants)),
            Shape::Text(Text::File | Text::Placed) => "the path of a file".to_owned(),
            Shape::Text(Text::Source) => "the path of a folder or `organisation/name@commit`".to_owned(),
            Shape::Names(names) => {
                let shown: Vec<String> = names.iter().map(|name| format!("`{name}`")).collect();
                format!("one of {}", shown.join(", "))
            }
            Shape::Integer(_) => "an integer".to_owned(),
            Shape::Number(_) => "a number".to_owned(),
            Shape::Boolean => "a boolean".to_owned(),
            Shape::Array(_) => "an array".to_owned(),
            Shape::Table(_) | Shape::Tagged { .. } => "a table".to_owned(),
            Shape::Choice(choices) => {
                let shown: Vec<String> = choices.iter().map(|choice| self.describe(self.get(*choice))).collect();
                shown.join(" or ")
            }
        }
    }
}

impl Shape {
    /// Whether a value is of the right type, whatever is in it.
    fn takes(&self, value: &Value) -> bool {
        matches!(
            (self, value),
            (Self::Any | Self::Choice(_), _)
                | (_, Value::Invalid)
                | (Self::Text(_) | Self::Names(_), Value::String(_))
                | (Self::Integer(_) | Self::Number(_), Value::Integer(_))
                | (Self::Number(_), Value::Float(_))
                | (Self::Boolean, Value::Boolean(_))
                | (Self::Array(_), Value::Array(_))
                | (Self::Table(_) | Self::Tagged { .. }, Value::Table(_))
        )
    }
}

/// `a dataset`, `an evaluation`, but `tokens`.
pub(super) fn with_article(artifact: &str) -> String {
    match artifact {
        "tokens" | "rollouts" | "files" => artifact.to_owned(),
        "evaluation" => "an evaluation".to_owned(),
        _ => format!("a {artifact}"),
    }
}

/// The entry at a path such as `rewards.progress.expression` or `files[2]`, or the nearest one above it that exists;
/// and whether the path was followed to its end.
pub(super) fn locate<'a>(root: &'a Entry, path: &str) -> (Span, Option<Span>, bool) {
    let mut at: (Span, &'a Node) = (root.key, &root.node);
    for segment in path.split(['.', '[']).map(|segment| segment.trim_end_matches(']')).filter(|part| !part.is_empty()) {
        let next = match &at.1.value {
            Value::Table(table) => table.get(segment).map(|entry| (entry.key, &entry.node)),
            Value::Array(items) => {
                segment.parse().ok().and_then(|index: usize| items.get(index)).map(|item| (item.span, item))
            }
            _ => None,
        };
        match next {
            Some(next) => at = next,
            None => return (at.0, at.1.via, false),
        }
    }
    let span = if at.1.table().is_some() { at.0 } else { at.1.span };
    (span, at.1.via, true)
}

/// The sibling of `name` that was probably meant, for tables that an overlay made by accident.
pub(super) fn meant_sibling<'a>(name: &str, table: &'a Table, is_whole: impl Fn(&Node) -> bool) -> Option<&'a str> {
    let siblings = table.iter().filter(|(other, entry)| other.as_ref() != name && is_whole(&entry.node));
    nearest(name, siblings.map(|(other, _)| other.as_ref()))
}
