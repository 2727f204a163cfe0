//! JSON Schemas compiled to the few forms that a TOML value is walked against.
//!
//! A kind's schema is generated once a process. References are followed, `Option` loses its null, and alternatives
//! are told apart by a constant field (`kind`) where they have one. Nothing here knows a place or a message.

use std::collections::{BTreeMap, HashMap};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use schemars::generate::SchemaSettings;
use serde_json::{Map, Value as Json};

use crate::pipeline::stage::{Kind, RunOptions};

/// The keyword of a schema under which it says what people shall be told to write there.
pub(super) const EXPECTED: &str = "x-expected";

/// The number of a shape among its [`Shapes`].
pub(super) type ShapeId = usize;

/// A compiled schema.
#[derive(Debug)]
pub(super) struct Shapes {
    all: Vec<Shape>,
    root: ShapeId,
    /// What is told of some shapes instead of their types.
    expected: HashMap<ShapeId, String>,
}

/// What a value may be.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Shape {
    /// Anything at all.
    Any,
    /// A string.
    Text(Text),
    /// One of these strings.
    Names(Vec<String>),
    /// An integer in a range.
    Integer(Range),
    /// An integer or a float in a range.
    Number(Range),
    /// A boolean.
    Boolean,
    /// An array.
    Array(Array),
    /// A table.
    Table(Fields),
    /// A table of the form that its field `tag` names.
    Tagged {
        /// The field.
        tag: String,
        /// What it may say, with the form of the table for each.
        forms: BTreeMap<String, ShapeId>,
    },
    /// Any of these.
    Choice(Vec<ShapeId>),
}

/// What a string stands for.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Text {
    /// Itself, of at least so many characters.
    Plain(usize),
    /// The output of a stage, of this type (`any` for any).
    Input(String),
    /// A file or folder.
    File,
    /// A file or folder that stands at its relative path.
    Placed,
    /// A folder, or the name of a repository where there is none.
    Source,
}

/// Bounds of a number.
#[derive(Clone, Debug, Default, PartialEq)]
pub(super) struct Range {
    /// At least.
    pub(super) minimum: Option<f64>,
    /// At most.
    pub(super) maximum: Option<f64>,
    /// Above.
    pub(super) above: Option<f64>,
    /// Below.
    pub(super) below: Option<f64>,
}

/// The elements of an array.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Array {
    /// The first ones.
    pub(super) first: Vec<ShapeId>,
    /// All others; none takes anything.
    pub(super) items: Option<ShapeId>,
    /// How many at least.
    pub(super) least: usize,
    /// How many at most.
    pub(super) most: usize,
}

/// The fields of a table.
#[derive(Clone, Debug, Default, PartialEq)]
pub(super) struct Fields {
    /// Those with a name.
    pub(super) named: BTreeMap<String, ShapeId>,
    /// The names that must be there.
    pub(super) required: Vec<String>,
    /// What all others are; none refuses them.
    pub(super) others: Option<ShapeId>,
    /// How many at least.
    pub(super) least: usize,
}

impl Shapes {
    /// The shapes of a kind's parameters.
    pub(super) fn of_kind(kind: &'static Kind) -> Arc<Self> {
        static CACHE: OnceLock<Mutex<HashMap<usize, Arc<Shapes>>>> = OnceLock::new();
        // A kind lives as long as the process, so its address names it.
        let address = std::ptr::from_ref(kind) as usize;
        let mut cache = CACHE.get_or_init(Mutex::default).lock().unwrap_or_else(PoisonError::into_inner);
        let make = || {
            let mut generator = SchemaSettings::draft2020_12().into_generator();
            let schema = (kind.schema)(&mut generator);
            Arc::new(Self::compile(schema.as_value(), &generator.take_definitions(true)))
        };
        Arc::clone(cache.entry(address).or_insert_with(make))
    }

    /// The shapes of a stage's `run` table.
    pub(super) fn of_run() -> &'static Self {
        static RUN: OnceLock<Shapes> = OnceLock::new();
        RUN.get_or_init(|| {
            let mut generator = SchemaSettings::draft2020_12().into_generator();
            let schema = <RunOptions as schemars::JsonSchema>::json_schema(&mut generator);
            Self::compile(schema.as_value(), &generator.take_definitions(true))
        })
    }

    /// Compiles `schema`, whose references are to `definitions`.
    pub(super) fn compile(schema: &Json, definitions: &Map<String, Json>) -> Self {
        let (known, expected) = (HashMap::new(), HashMap::new());
        let mut compiler = Compiler { definitions, all: Vec::new(), known, expected };
        let root = compiler.shape(schema);
        Self { all: compiler.all, root, expected: compiler.expected }
    }

    /// The shape of the whole.
    pub(super) fn root(&self) -> ShapeId {
        self.root
    }

    /// What is told of the shape number `id` instead of its type, where its schema says so in [`EXPECTED`].
    pub(super) fn expected(&self, id: ShapeId) -> Option<&str> {
        self.expected.get(&id).map(String::as_str)
    }

    /// The shape number `id`.
    pub(super) fn get(&self, id: ShapeId) -> &Shape {
        &self.all[id]
    }
}

struct Compiler<'a> {
    definitions: &'a Map<String, Json>,
    all: Vec<Shape>,
    /// Definitions that are compiled or being compiled: a schema may refer to itself.
    known: HashMap<String, ShapeId>,
    expected: HashMap<ShapeId, String>,
}

impl Compiler<'_> {
    fn add(&mut self, shape: Shape) -> ShapeId {
        self.all.push(shape);
        self.all.len() - 1
    }

    fn shape(&mut self, schema: &Json) -> ShapeId {
        let Some(object) = schema.as_object() else { return self.add(Shape::Any) };
        let is_alone = !["properties", "allOf", "oneOf", "anyOf"].iter().any(|key| object.contains_key(*key));
        if let (true, Some(name)) = (is_alone, reference(object)) {
            if let Some(id) = self.known.get(name) {
                return *id;
            }
            let id = self.add(Shape::Any);
            self.known.insert(name.to_owned(), id);
            if let Some(definition) = self.definitions.get(name).cloned() {
                let inner = self.shape(&definition);
                self.all[id] = self.all[inner].clone();
            }
            return id;
        }
        let shape = self.form(object);
        let id = self.add(shape);
        if let Some(text) = object.get(EXPECTED).and_then(Json::as_str) {
            self.expected.insert(id, text.to_owned());
        }
        id
    }

    fn form(&mut self, schema: &Map<String, Json>) -> Shape {
        if let Some(alternatives) = alternatives(schema) {
            let whole = alternatives.iter().map(|alternative| self.joined(schema, alternative)).collect();
            return self.choice(whole);
        }
        if schema.contains_key("allOf") || (schema.contains_key("$ref") && schema.contains_key("properties")) {
            let joined = self.joined(schema, &Json::Object(Map::new()));
            return self.plain(&joined);
        }
        self.plain(schema)
    }

    /// The schema `outer`, without its alternatives, and `inner` as one: fields of both, everything that either asks.
    fn joined(&self, outer: &Map<String, Json>, inner: &Json) -> Map<String, Json> {
        let mut joined = Map::new();
        let mut parts = vec![];
        self.flatten(inner, &mut parts);
        if ["properties", "allOf", "$ref", "additionalProperties"].iter().any(|key| outer.contains_key(*key)) {
            let mut rest = outer.clone();
            rest.remove("oneOf");
            rest.remove("anyOf");
            self.flatten(&Json::Object(rest), &mut parts);
        }
        for part in parts {
            for (key, value) in part {
                match (key.as_str(), joined.get_mut(&key), value) {
                    ("properties", Some(Json::Object(known)), Json::Object(more)) => {
                        for (name, field) in more {
                            known.entry(name).or_insert(field);
                        }
                    }
                    ("required", Some(Json::Array(known)), Json::Array(more)) => known.extend(more),
                    (_, None, value) => drop(joined.insert(key, value)),
                    _ => {}
                }
            }
        }
        joined
    }

    /// `schema` with what it refers to and all that it joins, as schemas without references of their own.
    fn flatten(&self, schema: &Json, parts: &mut Vec<Map<String, Json>>) {
        let Some(object) = schema.as_object() else { return };
        let mut own = object.clone();
        let target = reference(object).and_then(|name| self.definitions.get(name)).cloned();
        own.remove("$ref");
        let all = own.remove("allOf");
        parts.push(own);
        if let Some(target) = target {
            self.flatten(&target, parts);
        }
        all.iter().filter_map(Json::as_array).flatten().for_each(|part| self.flatten(part, parts));
    }

    fn choice(&mut self, alternatives: Vec<Map<String, Json>>) -> Shape {
        let mut kept = Vec::new();
        for alternative in alternatives.into_iter().filter(|alternative| !is_null(alternative)) {
            // An alternative that is itself a choice is spread out.
            match self.form(&alternative) {
                Shape::Choice(inner) => kept.extend(inner.into_iter().map(|id| (self.all[id].clone(), None))),
                shape => kept.push((shape, Some(alternative))),
            }
        }
        if kept.len() == 1 {
            return kept.remove(0).0;
        }
        let names =
            kept.iter().map(|(shape, _)| if let Shape::Names(names) = shape { Some(names.clone()) } else { None });
        if let Some(names) = names.collect::<Option<Vec<_>>>() {
            return Shape::Names(names.concat());
        }
        if let Some(tag) = self.common_tag(&kept) {
            let mut forms = BTreeMap::new();
            for (shape, _) in kept {
                let name = self.tags(&shape).get(&tag).cloned().unwrap_or_default();
                let id = self.add(shape);
                forms.insert(name, id);
            }
            return Shape::Tagged { tag, forms };
        }
        Shape::Choice(kept.into_iter().map(|(shape, _)| self.add(shape)).collect())
    }

    /// The required field that names one constant in every alternative, another one in each.
    fn common_tag(&self, alternatives: &[(Shape, Option<Map<String, Json>>)]) -> Option<String> {
        let all: Vec<BTreeMap<String, String>> = alternatives.iter().map(|(shape, _)| self.tags(shape)).collect();
        let distinct = |tag: &&String| {
            let names: Option<std::collections::BTreeSet<_>> = all.iter().map(|tags| tags.get(*tag)).collect();
            names.is_some_and(|names| names.len() == all.len())
        };
        all.first()?.keys().find(distinct).cloned()
    }

    fn tags(&self, shape: &Shape) -> BTreeMap<String, String> {
        let Shape::Table(fields) = shape else { return BTreeMap::new() };
        let constant = |name: &String| match self.all.get(*fields.named.get(name)?)? {
            Shape::Names(names) if names.len() == 1 => Some((name.clone(), names[0].clone())),
            _ => None,
        };
        fields.required.iter().filter_map(constant).collect()
    }

    fn plain(&mut self, schema: &Map<String, Json>) -> Shape {
        if let Some(name) = schema.get("const").and_then(Json::as_str) {
            return Shape::Names(vec![name.to_owned()]);
        }
        if let Some(values) = schema.get("enum").and_then(Json::as_array) {
            let names: Vec<String> = values.iter().filter_map(Json::as_str).map(str::to_owned).collect();
            return if names.is_empty() { Shape::Any } else { Shape::Names(names) };
        }
        match schema.get("type") {
            Some(Json::String(name)) => self.typed(name, schema),
            Some(Json::Array(names)) => {
                let names: Vec<&str> = names.iter().filter_map(Json::as_str).filter(|name| *name != "null").collect();
                if let [name] = names[..] {
                    return self.typed(name, schema);
                }
                let shapes: Vec<Shape> = names.iter().map(|name| self.typed(name, schema)).collect();
                Shape::Choice(shapes.into_iter().map(|shape| self.add(shape)).collect())
            }
            _ if schema.contains_key("properties") => self.typed("object", schema),
            _ => Shape::Any,
        }
    }

    fn typed(&mut self, name: &str, schema: &Map<String, Json>) -> Shape {
        let count = |key: &str| schema.get(key).and_then(Json::as_u64).map(|count| count as usize);
        match name {
            "string" => Shape::Text(text(schema, count("minLength").unwrap_or(0))),
            "integer" => Shape::Integer(range(schema)),
            "number" => Shape::Number(range(schema)),
            "boolean" => Shape::Boolean,
            "array" => {
                let first: Vec<Json> = schema.get("prefixItems").and_then(Json::as_array).cloned().unwrap_or_default();
                let first: Vec<ShapeId> = first.iter().map(|item| self.shape(item)).collect();
                let items = schema.get("items").filter(|items| items.is_object()).map(|items| self.shape(items));
                let least = count("minItems").unwrap_or(0);
                Shape::Array(Array { first, items, least, most: count("maxItems").unwrap_or(usize::MAX) })
            }
            "object" => {
                let none = Map::new();
                let properties = schema.get("properties").and_then(Json::as_object).unwrap_or(&none);
                let named: BTreeMap<String, ShapeId> =
                    properties.iter().map(|(name, field)| (name.clone(), self.shape(field))).collect();
                let required = schema.get("required").and_then(Json::as_array).into_iter().flatten();
                let required = required.filter_map(Json::as_str).map(str::to_owned).collect();
                let others = match schema.get("additionalProperties").or_else(|| schema.get("unevaluatedProperties")) {
                    Some(Json::Bool(false)) => None,
                    Some(others) => Some(self.shape(others)),
                    // serde would ignore an unknown field in silence; a table with named fields refuses it.
                    None if named.is_empty() => Some(self.add(Shape::Any)),
                    None => None,
                };
                Shape::Table(Fields { named, required, others, least: count("minProperties").unwrap_or(0) })
            }
            _ => Shape::Any,
        }
    }
}

fn reference(schema: &Map<String, Json>) -> Option<&str> {
    schema.get("$ref")?.as_str()?.rsplit('/').next()
}

fn alternatives(schema: &Map<String, Json>) -> Option<&Vec<Json>> {
    schema.get("oneOf").or_else(|| schema.get("anyOf"))?.as_array()
}

fn is_null(schema: &Map<String, Json>) -> bool {
    schema.get("type").is_some_and(|name| name == "null")
}

fn text(schema: &Map<String, Json>, least: usize) -> Text {
    let extension = |key: &str| schema.get(key).and_then(Json::as_str);
    match (extension("x-input"), extension("x-file")) {
        (Some(wants), _) => Text::Input(wants.to_owned()),
        (_, Some("placed")) => Text::Placed,
        (_, Some("source")) => Text::Source,
        (_, Some(_)) => Text::File,
        _ => Text::Plain(least),
    }
}

fn range(schema: &Map<String, Json>) -> Range {
    let bound = |key: &str| schema.get(key).and_then(Json::as_f64);
    Range {
        minimum: bound("minimum"),
        maximum: bound("maximum"),
        above: bound("exclusiveMinimum"),
        below: bound("exclusiveMaximum"),
    }
}

impl Range {
    /// What the range asks for, where `number` is outside of it.
    pub(super) fn refuses(&self, number: f64) -> Option<String> {
        let shown = |bound: f64| {
            if bound.fract() == 0.0 && bound.abs() < 1e15 { format!("{bound:.0}") } else { format!("{bound:?}") }
        };
        let inside = self.minimum.is_none_or(|bound| number >= bound)
            && self.maximum.is_none_or(|bound| number <= bound)
            && self.above.is_none_or(|bound| number > bound)
            && self.below.is_none_or(|bound| number < bound);
        if inside {
            return None;
        }
        let asked =
            [(self.minimum, "at least"), (self.above, "above"), (self.maximum, "at most"), (self.below, "below")];
        let asked = asked.into_iter().filter_map(|(bound, word)| Some(format!("{word} {}", shown(bound?))));
        Some(asked.collect::<Vec<_>>().join(" and "))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn compiled(schema: &Json) -> Shapes {
        Shapes::compile(schema, schema.get("$defs").and_then(Json::as_object).unwrap_or(&Map::new()))
    }

    #[test]
    fn options_lose_their_null_and_enums_become_names() {
        let shapes = compiled(&json!({"anyOf": [{"$ref": "#/$defs/Decay"}, {"type": "null"}], "$defs": {"Decay": {
            "oneOf": [{"const": "cosine", "type": "string"}, {"enum": ["linear", "constant"], "type": "string"}]
        }}}));
        let names = ["cosine", "linear", "constant"].map(str::to_owned).to_vec();
        assert_eq!(shapes.get(shapes.root()), &Shape::Names(names));
        let shapes = compiled(&json!({"type": ["integer", "null"], "minimum": 2}));
        assert_eq!(shapes.get(shapes.root()), &Shape::Integer(Range { minimum: Some(2.0), ..Range::default() }));
    }

    #[test]
    fn alternatives_with_a_constant_are_told_apart_by_it() {
        let shapes = compiled(&json!({
            "type": "object", "properties": {"weight": {"type": "number"}},
            "oneOf": [
                {"type": "object", "properties": {"kind": {"const": "a", "type": "string"}, "x": {"type": "integer"}}, "required": ["kind", "x"]},
                {"$ref": "#/$defs/B", "properties": {"kind": {"const": "b", "type": "string"}}, "required": ["kind"]}
            ],
            "$defs": {"B": {"type": "object", "properties": {"y": {"type": "string"}}, "additionalProperties": false}}
        }));
        let Shape::Tagged { tag, forms } = shapes.get(shapes.root()) else { panic!("{shapes:?}") };
        assert_eq!(tag, "kind");
        let names = |form: &str| {
            let Shape::Table(fields) = shapes.get(forms[form]) else { panic!("no table") };
            fields.named.keys().cloned().collect::<Vec<_>>()
        };
        assert_eq!(names("a"), ["kind", "weight", "x"]);
        assert_eq!(names("b"), ["kind", "weight", "y"]);
    }

    #[test]
    fn a_schema_may_refer_to_itself() {
        let shapes = compiled(&json!({"$ref": "#/$defs/Tree", "$defs": {"Tree": {
            "type": "object", "properties": {"children": {"type": "array", "items": {"$ref": "#/$defs/Tree"}}}
        }}}));
        let Shape::Table(fields) = shapes.get(shapes.root()) else { panic!("{shapes:?}") };
        let Shape::Array(array) = shapes.get(fields.named["children"]) else { panic!("{shapes:?}") };
        assert_eq!(shapes.get(array.items.unwrap()), shapes.get(shapes.root()));
    }

    #[test]
    fn a_range_says_what_it_asks() {
        let range = Range { minimum: Some(0.0), below: Some(0.5), ..Range::default() };
        assert_eq!(range.refuses(0.25), None);
        assert_eq!(range.refuses(0.5).unwrap(), "at least 0 and below 0.5");
    }
}
