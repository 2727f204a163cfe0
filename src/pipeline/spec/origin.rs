//! Where every value of a trial comes from: file and line, and by which way it came.
//!
//! The files are read once more and only for this, so that planning carries none of it. It judges nothing: what is asked of is
//! a trial that has been read without a mistake.

use std::collections::{BTreeMap, HashSet};
use std::fmt;
use std::path::Path;

use serde::{Serialize, Serializer};
use serde_json::{Map, Value as Json};

use crate::pipeline::spec::compose::{Composer, Document, Layer};
use crate::pipeline::spec::interpolate::{Params, referred};
use crate::pipeline::spec::shape::Shapes;
use crate::pipeline::spec::source::{Sources, Span};
use crate::pipeline::spec::sweep::Sweep;
use crate::pipeline::spec::tree::{Entry, Node, Value};
use crate::pipeline::spec::walk::walk;
use crate::pipeline::spec::{Origin, StageSpec, Trial};
use crate::pipeline::stage::Kind;

/// By which way a value came.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Way {
    /// The pipeline's file, or one that it extends.
    Pipeline,
    /// A file that the experiment extends.
    Extends,
    /// The experiment's own file.
    Experiment,
    /// An argument `--set`.
    Set,
    /// The experiment's `[sweep]`.
    Sweep,
    /// Another field, as a preset, stands for it.
    Derived,
}

impl fmt::Display for Way {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Pipeline => "pipeline",
            Self::Extends => "extends",
            Self::Experiment => "experiment",
            Self::Set => "--set",
            Self::Sweep => "sweep",
            Self::Derived => "derived",
        })
    }
}

impl Serialize for Way {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

/// Where a value is written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Written {
    /// By which way it came.
    pub way: Way,
    /// Where it is written.
    pub place: Origin,
    /// Where `${...}` took it from there.
    pub used_at: Option<Origin>,
    /// The parameters that it was taken from or that stand inside it, each with its own place, and the field from which it is
    /// derived.
    pub by: Vec<(String, Origin)>,
}

/// Where the values of one trial come from.
#[derive(Debug, Default)]
pub struct Origins {
    /// Values as the files say them, `${...}` left as it is: `params` and `stages`.
    pub document: Map<String, Json>,
    /// By segments such as `stages`, `sft`, `steps`; elements of arrays by their numbers.
    written: BTreeMap<Vec<String>, Written>,
}

impl Origins {
    /// Where the values of `trial` come from, which was read from `file` with `sets`.
    ///
    /// Nothing where the files are no longer what they were.
    pub fn of(file: &Path, sets: &[String], trial: &Trial, kinds: &'static [Kind]) -> Option<Self> {
        let mut composer = Composer::new(sets);
        let document = composer.experiment(file)?;
        let mut report = std::mem::take(&mut composer.report);
        let sources = &composer.sources;
        let assignments = Sweep::read(&document.root, &mut report).assignments(&mut report);
        let assignment = assignments.into_iter().find(|assignment| assignment.name == trial.name)?;
        let mut root = document.root.clone();
        let mut swept = HashSet::new();
        for overlay in &assignment.overlays {
            spans(overlay, &mut swept);
            root.overlay(overlay);
        }
        let params = Params::resolve(root.get("params"), sources, &mut report);
        let mut walk = Places { sources, document: &document, swept, root: &root, written: BTreeMap::new() };
        for name in ["params", "stages"] {
            if let Some(entry) = root.get(name) {
                let node = params.apply(&entry.node, sources, &mut report);
                walk.value(&mut vec![name.to_owned()], node.as_ref().unwrap_or(&entry.node));
                if let Some(stages) = node.as_ref().unwrap_or(&entry.node).table().filter(|_| name == "stages") {
                    for (stage, entry) in stages {
                        if let Some(spec) = trial.stages.get(stage.as_ref())
                            && let Some(kind) = kinds.iter().find(|kind| kind.name == spec.kind.name)
                        {
                            walk.derived(spec, kind, entry);
                        }
                    }
                }
            }
        }
        let written = walk.written;
        let said =
            ["params", "stages"].into_iter().filter_map(|name| Some((name.to_owned(), root.get(name)?.node.json())));
        Some(Self { document: said.collect(), written })
    }

    /// Where the value at a path is written; nothing where it is a default.
    pub fn written<S: AsRef<str>>(&self, path: &[S]) -> Option<&Written> {
        let path: Vec<String> = path.iter().map(|segment| segment.as_ref().to_owned()).collect();
        self.written.get(&path)
    }

    /// Where a parameter of a stage is written, or else the nearest thing above it; `path` is dotted as reasons have it.
    pub fn of_parameter(&self, stage: &str, path: &str) -> Option<&Written> {
        let mut segments = vec!["stages".to_owned(), stage.to_owned()];
        segments.extend(path.split('.').map(str::to_owned));
        while segments.len() > 2 {
            if let Some(written) = self.written.get(&segments) {
                return Some(written);
            }
            segments.pop();
        }
        None
    }
}

/// The walk that notes places.
struct Places<'a> {
    sources: &'a Sources,
    document: &'a Document,
    /// Where the values of the sweep's assignment are written.
    swept: HashSet<Span>,
    /// The document with the assignment laid over it.
    root: &'a Node,
    written: BTreeMap<Vec<String>, Written>,
}

impl Places<'_> {
    fn value(&mut self, path: &mut Vec<String>, node: &Node) {
        match &node.value {
            Value::Table(table) => {
                for (name, entry) in table.iter() {
                    path.push(name.to_string());
                    self.value(path, &entry.node);
                    path.pop();
                }
                return;
            }
            Value::Array(items) => {
                for (index, item) in items.iter().enumerate() {
                    path.push(index.to_string());
                    self.value(path, item);
                    path.pop();
                }
            }
            _ => {}
        }
        let written = self.written(node);
        self.written.insert(path.clone(), written);
    }

    fn written(&self, node: &Node) -> Written {
        let text = self.sources.text(node.via.unwrap_or(node.span));
        let mut by = Vec::new();
        for name in referred(text) {
            let entry = self.root.get("params").and_then(|params| params.node.get(name));
            by.extend(entry.map(|entry| (format!("params.{name}"), self.sources.origin(entry.node.span))));
        }
        Written {
            way: self.way(node.span),
            place: self.sources.origin(node.span),
            used_at: node.via.map(|via| self.sources.origin(via)),
            by,
        }
    }

    fn way(&self, span: Span) -> Way {
        if self.swept.contains(&span) {
            return Way::Sweep;
        }
        match self.document.layers.iter().find(|(source, _)| *source == span.source) {
            Some((_, Layer::Pipeline)) => Way::Pipeline,
            Some((_, Layer::Extends)) => Way::Extends,
            Some((_, Layer::Experiment)) => Way::Experiment,
            None => Way::Set,
        }
    }

    /// Notes for what a field stands that its kind replaces by others, as a preset: whatever is otherwise without it.
    fn derived(&mut self, spec: &StageSpec, kind: &'static Kind, entry: &Entry) {
        let resolved = spec.stage.params();
        let fields = entry.node.table().into_iter().flatten();
        let replaced = fields.filter(|(name, entry)| {
            !matches!(name.as_ref(), "kind" | "run")
                && resolved.get(name.as_ref()).is_none()
                && entry.node.table().is_none()
        });
        for (name, field) in replaced {
            let mut rest = entry.clone();
            for dropped in ["kind", "run", name] {
                rest.node.remove(dropped);
            }
            let (json, found) = walk(&Shapes::of_kind(kind), &rest, "", self.sources, &[]);
            let Some(without) = found.is_clean().then(|| (kind.parse)(json).ok()).flatten() else { continue };
            let mut differing = Vec::new();
            let mut path = vec!["stages".to_owned(), spec.name.clone()];
            differences(&resolved, Some(&without.params()), &mut path, &mut differing);
            let mut written = self.written(&field.node);
            written.by.push((name.to_string(), written.place.clone()));
            written.way = Way::Derived;
            for path in differing {
                self.written.entry(path).or_insert_with(|| written.clone());
            }
        }
    }
}

/// The paths of scalars and arrays that differ.
fn differences(new: &Json, old: Option<&Json>, path: &mut Vec<String>, found: &mut Vec<Vec<String>>) {
    if let Json::Object(fields) = new {
        for (name, value) in fields {
            path.push(name.clone());
            differences(value, old.and_then(|old| old.get(name)), path, found);
            path.pop();
        }
    } else if Some(new) != old {
        found.push(path.clone());
    }
}

/// The places of every value in a tree.
fn spans(node: &Node, found: &mut HashSet<Span>) {
    found.insert(node.span);
    match &node.value {
        Value::Table(table) => table.values().for_each(|entry| spans(&entry.node, found)),
        Value::Array(items) => items.iter().for_each(|item| spans(item, found)),
        _ => {}
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pipeline::spec::testing::{Files, KINDS, PIPELINE};

    #[test]
    fn every_way_of_a_value_is_known_with_its_place() {
        let files = Files::new(&[
            ("p.toml", PIPELINE),
            ("base.toml", "pipeline = \"p.toml\"\n[stages.train]\nsteps = 20\n"),
            (
                "a.toml",
                "extends = \"base.toml\"\n[params]\nname = \"x${params.rate}\"\n[stages.train]\nnote = \"${params.name} y\"\n\
                 [sweep]\nseeds = { path = \"params.seed\", values = [7, 8] }\n",
            ),
        ]);
        let sets = ["stages.train.optimizer.beta=0.5".to_owned()];
        let experiment = files.good("a.toml", &[&sets[0]]);
        let trial = experiment.trials.iter().find(|trial| trial.name == "seed=8").unwrap();
        let origins = Origins::of(&files.path("a.toml"), &sets, trial, KINDS).unwrap();
        let said = |path: &[&str]| {
            let path = [&["stages", "train"], path].concat();
            origins.written(&path).map(|written| {
                let name = written.place.file.file_name().unwrap().to_string_lossy().into_owned();
                (written.way, format!("{name}:{}", written.place.line), written.used_at.as_ref().map(|at| at.line))
            })
        };
        assert_eq!(said(&["data"]), Some((Way::Pipeline, "p.toml:12".into(), None)));
        assert_eq!(said(&["steps"]), Some((Way::Extends, "base.toml:3".into(), None)));
        assert_eq!(said(&["note"]), Some((Way::Experiment, "a.toml:5".into(), None)));
        assert_eq!(said(&["optimizer", "beta"]), Some((Way::Set, "--set:1".into(), None)));
        let seed = said(&["seed"]).unwrap();
        assert_eq!((seed.0, seed.1.as_str()), (Way::Sweep, "a.toml:7"));
        assert!(seed.2.is_some(), "where `${{params.seed}}` stands");
        assert_eq!(said(&["optimizer", "decay"]), None);
        let note = origins.written(&["stages", "train", "note"]).unwrap();
        assert_eq!(
            note.by.iter().map(|(name, place)| (name.as_str(), place.line)).collect::<Vec<_>>(),
            [("params.name", 3)]
        );
        assert_eq!(origins.of_parameter("train", "steps.deeper").unwrap().place.line, 3);
        assert!(origins.of_parameter("train", "optimizer.decay").is_none());
        assert_eq!(origins.document["stages"]["train"]["seed"], "${params.seed}");
        assert_eq!(origins.document["params"]["seed"], 8);
    }
}
