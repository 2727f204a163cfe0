//! `[sweep]`: what varies between trials, as data.
//!
//! ```text
//! axes      grid, zip, seeds            ->  axes of values by path
//! arms      arm, drop_one, add_one      ->  axes of named overlays: `arm=no_kl`, `drop=progress`, `add=none`
//! exclude   axes, tables of values      ->  which combinations are left out
//! tune      grid, seeds, metric         ->  what is chosen for each arm before it is reported
//! assign    axes, exclusions            ->  named assignments: every trial with what it lays over the document
//! ```
//!
//! Axes multiply. A trial is called by its values alone, so a value, an arm or an exclusion that is added later renames
//! nothing. Nothing here knows a kind: whether a path is a field is for the stage's schema to say when it is resolved.

mod arms;
mod assign;
mod axes;
mod doubt;
mod exclude;
mod path;
mod schema;
mod tune;

use std::collections::{HashMap, HashSet};

use serde_json::Value as Json;

use crate::pipeline::spec::diagnostic::{Mistake, Report};
use crate::pipeline::spec::source::Span;
pub(super) use crate::pipeline::spec::sweep::assign::Assignment;
use crate::pipeline::spec::sweep::doubt::Doubt;
use crate::pipeline::spec::sweep::exclude::Exclusion;
pub(super) use crate::pipeline::spec::sweep::exclude::{find, not_swept};
pub(super) use crate::pipeline::spec::sweep::path::leaves;
pub(super) use crate::pipeline::spec::sweep::schema::{schema, told_schema};
pub(super) use crate::pipeline::spec::sweep::tune::{Candidates, Tune};
use crate::pipeline::spec::tree::{Node, Value};

/// A checked `[sweep]`.
#[derive(Default)]
pub(super) struct Sweep {
    /// Seeds last, others by name.
    pub(super) axes: Vec<Axis>,
    exclusions: Vec<Exclusion>,
    /// After how many failed trials a run begins nothing more.
    pub(super) max_failures: Option<usize>,
    /// What is chosen for each arm first.
    pub(super) tune: Option<Tune>,
    /// Arms that look as if they were the same.
    pub(super) doubts: Vec<Doubt>,
    /// Where it is written.
    key: Option<Span>,
}

/// Values of which every trial has one.
pub(super) struct Axis {
    /// What its points set: one column, or several that are varied together.
    pub(super) columns: Vec<Column>,
    /// The values.
    points: Vec<Point>,
    source: Source,
}

/// One name that the points of an axis give a value.
#[derive(Clone)]
pub(super) struct Column {
    /// The path as people see it, or `arm`, `drop` or `add`.
    pub(super) name: String,
    /// The last segment, or the whole path where another column ends alike.
    pub(super) label: String,
    /// The path's segments; none for names that are no path.
    segments: Vec<String>,
    /// Where it is written.
    pub(super) key: Span,
}

/// One point of an axis.
struct Point {
    /// A value for each column.
    values: Vec<Node>,
    /// What is laid over the document.
    overlays: Vec<Node>,
    /// The paths that an arm sets of its own.
    sets: Vec<Leaf>,
}

/// A path with a value.
struct Leaf {
    segments: Vec<String>,
    key: Span,
    value: Node,
}

/// What an axis comes from, in the order in which overlays are laid: what drops a table comes after what sets in it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Source {
    Grid,
    Zip,
    Tune,
    Seeds,
    Arm,
    Add,
    Drop,
}

impl Axis {
    /// Whether its values are seeds.
    pub(super) fn is_seed(&self) -> bool {
        self.source == Source::Seeds
    }

    /// The values of the column number `column`, in their order.
    pub(super) fn values(&self, column: usize) -> impl Iterator<Item = &Node> {
        self.points.iter().map(move |point| &point.values[column])
    }
}

impl Column {
    /// Whether people may call it so.
    pub(super) fn is_called(&self, name: &str) -> bool {
        self.name == name || self.label == name
    }
}

impl Sweep {
    /// The `[sweep]` of the document `root`, whose form is already checked.
    pub(super) fn read(root: &Node, report: &mut Report) -> Self {
        let Some(entry) = root.get("sweep") else { return Self::default() };
        let mut axes = axes::read(&entry.node, root, report);
        let mut doubts = Vec::new();
        axes.extend(arms::read(&entry.node, root, &mut doubts, report));
        let tune = entry.node.get("tune");
        axes.extend(tune.map(|tune| tune::axes(&tune.node, root, report)).unwrap_or_default());
        check_overlap(&mut axes, report);
        label(&mut axes);
        axes.sort_by(|a, b| (a.is_seed(), &a.columns[0].name).cmp(&(b.is_seed(), &b.columns[0].name)));
        let (tuned, axes): (Vec<Axis>, _) = axes.into_iter().partition(|axis| axis.source == Source::Tune);
        let exclusions = exclude::read(&entry.node, &axes, report);
        let max_failures = match entry.node.get("max_failures").map(|entry| &entry.node.value) {
            Some(Value::Integer(count)) => usize::try_from(*count).ok(),
            _ => None,
        };
        let tune = tune.and_then(|tune| Tune::read(tune, tuned, &axes, report));
        Self { axes, exclusions, max_failures, tune, doubts, key: Some(entry.key) }
    }

    /// Every path that something sets, with its place.
    pub(super) fn paths(&self) -> impl Iterator<Item = (&[String], Span)> {
        let tuned = self.tune.iter().flat_map(|tune| &tune.axes);
        let columns = self.axes.iter().chain(tuned).flat_map(|axis| &axis.columns);
        let columns =
            columns.filter(|column| !column.segments.is_empty()).map(|column| (&*column.segments, column.key));
        let points = self.axes.iter().flat_map(|axis| &axis.points);
        columns.chain(points.flat_map(|point| &point.sets).map(|leaf| (&*leaf.segments, leaf.key)))
    }
}

/// No path may be set twice: one value would silently win. An axis whose path is another's goes, since of its trials nothing
/// more can be said.
fn check_overlap(axes: &mut Vec<Axis>, report: &mut Report) {
    let mut known: HashMap<&[String], Span> = HashMap::new();
    let mut doubled = HashSet::new();
    for column in axes.iter().flat_map(|axis| &axis.columns).filter(|column| !column.segments.is_empty()) {
        if let Some(first) = known.get(&*column.segments) {
            let mistake = Mistake::at(column.key, format!("`{}` is swept twice", column.name));
            report.add(mistake.also(*first, "it is swept first"));
            doubled.insert(column.key);
            continue;
        }
        let is_around = |path: &[String]| path.starts_with(&column.segments) || column.segments.starts_with(path);
        if let Some((path, first)) = known.iter().find(|(path, _)| is_around(path)) {
            let (name, other) = (&column.name, path.join("."));
            let message = format!("`{name}` and `{other}` are swept, and one lies within the other");
            report.add(Mistake::at(column.key, message).also(*first, "the other is swept"));
        }
        known.insert(&column.segments, column.key);
    }
    for leaf in axes.iter().flat_map(|axis| &axis.points).flat_map(|point| &point.sets) {
        // `false` drops a table with all that is swept in it; that is what it is for.
        let drops = leaf.value.value == Value::Boolean(false);
        let clash = known
            .iter()
            .find(|(path, _)| leaf.segments.starts_with(path) || (!drops && path.starts_with(&leaf.segments)));
        if let Some((path, swept)) = clash {
            let message = format!("an arm sets `{}`, which is swept on its own", path.join("."));
            report.add(Mistake::at(leaf.key, message).also(*swept, "it is swept"));
        }
    }
    axes.retain(|axis| !axis.columns.iter().any(|column| doubled.contains(&column.key)));
}

/// Gives every column the shortest name that is its own.
fn label(axes: &mut [Axis]) {
    let last = |column: &Column| column.segments.last().unwrap_or(&column.name).clone();
    let mut count: HashMap<String, usize> = HashMap::new();
    for column in axes.iter().flat_map(|axis| &axis.columns) {
        *count.entry(last(column)).or_default() += 1;
    }
    for column in axes.iter_mut().flat_map(|axis| &mut axis.columns) {
        let last = last(column);
        column.label = if count[&last] > 1 { column.name.clone() } else { last };
    }
}

/// A value as it stands in the names of trials: a scalar, or a list as `[1,2]`.
pub(super) fn shown(value: &Node) -> Option<String> {
    match &value.value {
        Value::Array(items) => {
            let items: Option<Vec<String>> = items.iter().map(shown).collect();
            Some(format!("[{}]", items?.join(",")))
        }
        _ => value.scalar_text(),
    }
}

/// Whether two values are equal, 1 and 1.0 included.
pub(super) fn is_same(a: &Json, b: &Json) -> bool {
    match (a, b) {
        (Json::Array(a), Json::Array(b)) => a.len() == b.len() && a.iter().zip(b).all(|(a, b)| is_same(a, b)),
        _ => match (a.as_f64(), b.as_f64()) {
            (Some(a), Some(b)) => a - b == 0.0,
            _ => a == b,
        },
    }
}

/// A number as people read it: `1,000,000`.
fn counted(number: u128) -> String {
    let digits = number.to_string();
    let mut text = String::with_capacity(digits.len() + digits.len() / 3);
    for (place, digit) in digits.chars().enumerate() {
        if place > 0 && (digits.len() - place).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}
