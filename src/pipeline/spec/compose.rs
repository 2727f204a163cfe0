//! From files to one document: `extends`, then the pipeline beneath, then overlays in order, then `--set`.
//!
//! A file is read once however many experiments share it, so its mistakes have one place and are told once.

use std::collections::{BTreeSet, HashMap};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::pipeline::spec::diagnostic::{Mistake, Report, did_you_mean, expected};
use crate::pipeline::spec::parse::{parse, parse_path, parse_value};
use crate::pipeline::spec::source::{Sources, Span, absolute, folded};
use crate::pipeline::spec::tree::{Node, Value};

/// The tables and fields of an experiment's file.
const EXPERIMENT: [&str; 7] = ["description", "extends", "params", "pipeline", "stages", "sweep", "table"];
/// Those of a pipeline's.
const PIPELINE: [&str; 4] = ["description", "extends", "params", "stages"];
/// Those that `--set` may reach.
const SETTABLE: [&str; 5] = ["description", "params", "stages", "sweep", "table"];

/// An experiment's files as one document.
pub(super) struct Document {
    /// The stem of the file.
    pub(super) name: String,
    /// The file, as it was named.
    pub(super) path: PathBuf,
    /// The beginning of the file.
    pub(super) span: Span,
    /// `params`, `stages`, `sweep`, `table` and `description`, merged.
    pub(super) root: Node,
    /// The parameters that only an overlay has: nothing of the pipeline can rest on them.
    pub(super) overlaid_params: BTreeSet<Arc<str>>,
    /// The texts of its files, and whose each is.
    pub(super) layers: Vec<(u32, Layer)>,
}

/// Whose file a text is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Layer {
    /// The pipeline's, or one that it extends.
    Pipeline,
    /// One that the experiment extends.
    Extends,
    /// The experiment's own.
    Experiment,
}

/// Reads files and lays them over each other.
pub(super) struct Composer {
    /// Every text.
    pub(super) sources: Sources,
    /// Every mistake.
    pub(super) report: Report,
    /// Files by their absolute path; none for one that could not be read.
    files: HashMap<PathBuf, Option<Arc<Node>>>,
    sets: Vec<Node>,
}

/// The files that one file stands for, lowest first.
#[derive(Default)]
struct Layers {
    overlays: Vec<Arc<Node>>,
    /// What the last `pipeline` among them names.
    pipeline: Option<(String, Span)>,
    whole: bool,
}

/// Whose file is read.
#[derive(Clone, Copy, PartialEq)]
enum Role {
    Experiment,
    Pipeline,
}

impl Composer {
    /// A composer that lays `sets` over every experiment.
    pub(super) fn new(sets: &[String]) -> Self {
        let (sources, report) = (Sources::default(), Report::default());
        let mut composer = Self { sources, report, files: HashMap::new(), sets: Vec::new() };
        for argument in sets {
            if let Some(node) = composer.set(argument) {
                composer.sets.push(node);
            }
        }
        composer
    }

    /// The experiment in `file`; none where it cannot be told what its stages are.
    pub(super) fn experiment(&mut self, file: &Path) -> Option<Document> {
        let mut layers = Layers { whole: true, ..Layers::default() };
        self.layers(file, None, Role::Experiment, &mut Vec::new(), &mut layers);
        let span = layers.overlays.last()?.span;
        let mut root = Node::empty(span);
        let mut sources: Vec<(u32, Layer)> = vec![(span.source, Layer::Experiment)];
        sources.extend(layers.overlays.iter().map(|layer| (layer.span.source, Layer::Extends)));
        let mut base_params = None;
        let mut whole = layers.whole;
        if let Some((pipeline, written)) = &layers.pipeline {
            let path = self.sources.get(written.source).folder.join(pipeline);
            let mut beneath = Layers { whole: true, ..Layers::default() };
            self.layers(&path, Some(*written), Role::Pipeline, &mut Vec::new(), &mut beneath);
            whole &= beneath.whole;
            beneath.overlays.iter().for_each(|layer| root.overlay(layer));
            sources.extend(beneath.overlays.iter().map(|layer| (layer.span.source, Layer::Pipeline)));
            root.remove("description");
            base_params = Some(params(&root));
        }
        for layer in &layers.overlays {
            root.overlay(layer);
            base_params.get_or_insert_with(|| params(&root));
        }
        self.sets.iter().for_each(|set| root.overlay(set));
        root.remove("pipeline");
        root.remove("extends");
        let base_params = base_params.unwrap_or_default();
        let overlaid_params = params(&root).into_iter().filter(|name| !base_params.contains(name)).collect();
        let name = file.file_stem().unwrap_or_default().to_string_lossy().into_owned();
        if whole && root.get("stages").is_none() {
            let hint = "name a pipeline with `pipeline = \"...\"` or add tables `[stages.NAME]`".to_owned();
            let at = Span { start: 0, end: 0, ..span };
            self.report.add(Mistake::at(at, format!("`{name}` has no stages")).hint(hint).absent_stage());
        }
        whole.then(|| Document { name, path: file.to_owned(), span, root, overlaid_params, layers: sources })
    }

    /// Every file that was read, by its absolute path.
    pub(super) fn paths(&self) -> BTreeSet<PathBuf> {
        self.files.keys().cloned().collect()
    }

    /// Adds the layers of `file`, those it extends beneath it.
    fn layers(
        &mut self,
        file: &Path,
        written: Option<Span>,
        role: Role,
        within: &mut Vec<PathBuf>,
        layers: &mut Layers,
    ) {
        let Some((path, node)) = self.load(file, written) else {
            layers.whole = false;
            return;
        };
        if let Some(begin) = within.iter().position(|outer| *outer == path) {
            let mut names: Vec<String> = within[begin..]
                .iter()
                .map(|path| path.file_name().unwrap_or_default().to_string_lossy().into())
                .collect();
            names.push(names[0].clone());
            let message = format!("the files extend themselves: `{}`", names.join(" -> "));
            self.report.extend(written.map(|written| Mistake::at(written, message)));
            layers.whole = false;
            return;
        }
        self.check_fields(&node, role);
        within.push(path);
        if let Some(extends) = node.get("extends") {
            let bases = extends.node.array().map_or(std::slice::from_ref(&extends.node), |items| items);
            for base in bases {
                match &base.value {
                    Value::String(text) => {
                        let path = self.sources.get(base.span.source).folder.join(text.as_ref());
                        self.layers(&path, Some(base.span), role, within, layers);
                    }
                    _ => self.not_a_path("extends", base, layers),
                }
            }
        }
        within.pop();
        if let (Role::Experiment, Some(pipeline)) = (role, node.get("pipeline")) {
            match &pipeline.node.value {
                Value::String(text) => layers.pipeline = Some((text.to_string(), pipeline.node.span)),
                _ => self.not_a_path("pipeline", &pipeline.node, layers),
            }
        }
        layers.overlays.push(node);
    }

    fn not_a_path(&mut self, field: &str, node: &Node, layers: &mut Layers) {
        layers.whole = false;
        let label = format!("expected the path of a file, found {}", node.type_name());
        self.report.add(Mistake::at(node.span, format!("wrong type of `{field}`")).label(label));
    }

    fn check_fields(&mut self, node: &Node, role: Role) {
        let known: &[&str] = if role == Role::Experiment { &EXPERIMENT } else { &PIPELINE };
        let what = if role == Role::Experiment { "an experiment" } else { "a pipeline" };
        for (name, entry) in node.table().into_iter().flatten() {
            if known.contains(&name.as_ref()) {
                continue;
            }
            let hint = match name.as_ref() {
                "run" => Some("how a stage runs stands in its own table, as `stages.NAME.run.cpus = 1`".to_owned()),
                name if EXPERIMENT.contains(&name) => {
                    Some("to build on another experiment, name it with `extends`".to_owned())
                }
                name => did_you_mean(name, known.iter().copied()),
            };
            let message = format!("unknown field `{name}` of {what}");
            self.report.add(Mistake::at(entry.key, message).label(expected(known.iter().copied())).hint(hint));
        }
    }

    /// The tree of a file and the path by which it is known.
    fn load(&mut self, file: &Path, written: Option<Span>) -> Option<(PathBuf, Arc<Node>)> {
        let shown = folded(file);
        let read = absolute(file).and_then(|path| {
            if self.files.contains_key(&path) {
                Ok((path, String::new()))
            } else {
                Ok((path, std::fs::read_to_string(file)?))
            }
        });
        let (path, text) = match read {
            Ok(read) => read,
            Err(error) => {
                let reason = match error.kind() {
                    std::io::ErrorKind::NotFound => "there is no such file".to_owned(),
                    std::io::ErrorKind::InvalidData => "it is not UTF-8 text".to_owned(),
                    _ => error.to_string(),
                };
                let message = format!("cannot read `{}`", shown.display());
                self.report.add(match written {
                    Some(written) => Mistake::at(written, message).label(reason),
                    None => Mistake::nowhere(format!("{message}: {reason}")),
                });
                return None;
            }
        };
        if let Some(known) = self.files.get(&path) {
            return known.clone().map(|node| (path, node));
        }
        let folder = file.parent().unwrap_or(Path::new("")).to_owned();
        let source = self.sources.add(shown, folder, text);
        let node = Arc::new(parse(&mut self.sources, source, &mut self.report));
        self.files.insert(path.clone(), Some(Arc::clone(&node)));
        Some((path, node))
    }

    /// The overlay that an argument `PATH=VALUE` stands for.
    fn set(&mut self, argument: &str) -> Option<Node> {
        let source = self.sources.add("--set".into(), PathBuf::new(), argument.to_owned());
        let whole = Span::new(source, 0..argument.len());
        let split = unquoted_equals(argument).and_then(|at| Some((at, parse_path(&argument[..at])?)));
        let Some((at, path)) = split else {
            let hint = "write it as `--set stages.sft.steps=10`".to_owned();
            self.report.add(Mistake::at(whole, "not an assignment").label("expected `PATH=VALUE`").hint(hint));
            return None;
        };
        let key = Span::new(source, 0..argument[..at].trim_end().len());
        if !SETTABLE.contains(&path[0].as_str()) {
            let label = format!("a path begins with {}", expected(SETTABLE).replace("expected ", ""));
            let message = format!("`{}` cannot be set", path[0]);
            self.report.add(Mistake::at(key, message).label(label).hint(did_you_mean(&path[0], SETTABLE)));
            return None;
        }
        let begin = at + 1 + (argument[at + 1..].len() - argument[at + 1..].trim_start().len());
        let value = parse_value(&self.sources, source, begin, &mut self.report);
        Some(Node::nested(&path, key, value))
    }
}

/// The first `=` outside of quotes.
fn unquoted_equals(text: &str) -> Option<usize> {
    let mut quote = None;
    text.char_indices().find_map(|(at, c)| match (quote, c) {
        (None, '=') => Some(at),
        (None, '"' | '\'') => {
            quote = Some(c);
            None
        }
        (Some(open), _) if open == c => {
            quote = None;
            None
        }
        _ => None,
    })
}

fn params(root: &Node) -> BTreeSet<Arc<str>> {
    let table = root.get("params").and_then(|entry| entry.node.table());
    table.into_iter().flatten().map(|(name, _)| Arc::clone(name)).collect()
}

#[cfg(test)]
mod tests {
    use crate::pipeline::spec::testing::{Files, PIPELINE};

    #[test]
    fn layers_merge_in_order() {
        let files = Files::new(&[
            ("pipelines/p.toml", PIPELINE),
            (
                "e/one.toml",
                "pipeline = \"../pipelines/p.toml\"\ndescription = \"one\"\n[params]\nrate = 0.5\n[stages.train]\nsteps = 20\nrewards.other = false\n",
            ),
            ("e/two.toml", "[stages.train]\nsteps = 30\noptimizer.beta = 0.5\n[stages.score]\nothers = [\"train\"]\n"),
            (
                "e/three.toml",
                "extends = [\"one.toml\", \"two.toml\"]\n[stages]\nscore = false\n[stages.train]\noptimizer.nesterov = true\n",
            ),
        ]);
        let experiment = files.good("e/three.toml", &["stages.train.seed=7", "stages.train.note=a b"]);
        assert_eq!((experiment.name.as_str(), experiment.description.as_str()), ("three", "one"));
        let stages = &experiment.trials[0].stages;
        assert_eq!(stages.keys().collect::<Vec<_>>(), ["data", "train"]);
        let params = stages["train"].stage.params();
        assert_eq!((params["steps"].clone(), params["learning_rate"].clone()), (30.into(), 0.5.into()));
        assert_eq!((params["seed"].clone(), params["note"].clone()), (7.into(), "a b".into()));
        let optimizer = serde_json::json!({"beta": 0.5, "decay": "cosine", "nesterov": true});
        assert_eq!(params["optimizer"], optimizer);
        assert_eq!(params["rewards"], serde_json::json!({"correct": {"kind": "correct", "weight": 1.0}}));
    }

    #[test]
    fn a_table_of_another_kind_replaces() {
        let files = Files::new(&[
            ("p.toml", PIPELINE),
            (
                "a.toml",
                "pipeline = \"p.toml\"\n[stages.train.rewards.other]\nkind = \"correct\"\n[stages.train.rewards.correct]\nweight = 2.0\n",
            ),
        ]);
        let experiment = files.good("a.toml", &[]);
        let params = experiment.trials[0].stages["train"].stage.params();
        assert_eq!(params["rewards"]["other"], serde_json::json!({"kind": "correct", "weight": 0.0}));
        assert_eq!(params["rewards"]["correct"], serde_json::json!({"kind": "correct", "weight": 2.0}));
    }

    #[test]
    fn mistakes_keep_their_places_through_every_layer() {
        let files = Files::new(&[
            ("p.toml", PIPELINE),
            ("base.toml", "pipeline = \"p.toml\"\n[params]\nrate = \"fast\"\n[stages.train]\nsteps = true\n"),
            (
                "a.toml",
                "extends = \"base.toml\"\n[stages.trian]\nsteps = 3\n[stages.train]\nrewards.corect.weight = 2\n[sweep.grid]\n\"stages.score.seed\" = [1, -2]\n",
            ),
        ]);
        insta::assert_snapshot!(files.bad("a.toml", &["stages.train.optimizer.beta=3", "stages.train.nte=x"]), @r#"
            error: missing field `kind` in stage `trian`
             --> a.toml:2:9
            2 | [stages.trian]
              |         ^^^^^ expected one of `draw`, `train`, `score`
            hint: did you mean the stage `train`?

            error: missing field `kind` in `rewards.corect` of stage `train`
             --> a.toml:5:9
            5 | rewards.corect.weight = 2
              |         ^^^^^^ expected one of `correct`, `expression`
            hint: did you mean `correct`?

            error: `seed` is out of range in stage `score`
             --> a.toml:7:27
            7 | "stages.score.seed" = [1, -2]
              |                           ^^ expected at least 0

            error: wrong type of `learning_rate` in stage `train`
             --> base.toml:3:8
            3 | rate = "fast"
              |        ^^^^^^ expected a number, found a string
            note: the value is used at p.toml:14:17

            error: wrong type of `steps` in stage `train`
             --> base.toml:5:9
            5 | steps = true
              |         ^^^^ expected an integer, found a boolean

            error: unknown field `nte` in stage `train`
             --> --set:1:1
            1 | stages.train.nte=x
              | ^^^^^^^^^^^^^^^^ expected one of `data`, `learning_rate`, `note`, `optimizer`, `rewards`, `seed`, `start`, `steps`, `validate`
            hint: did you mean `note`?

            error: `optimizer.beta` is out of range in stage `train`
             --> --set:1:29
            1 | stages.train.optimizer.beta=3
              |                             ^ expected at least 0 and at most 1
        "#);
    }

    #[test]
    fn files_that_are_missing_or_extend_themselves() {
        let files = Files::new(&[
            ("a.toml", "extends = \"b.toml\"\n"),
            ("b.toml", "extends = [\"a.toml\", 1]\n"),
            ("c.toml", "pipeline = \"gone/p.toml\"\n"),
            ("d.toml", "description = \"nothing\"\n"),
            ("e.toml", "pipeline = \"f.toml\"\nextend = \"x\"\n"),
            ("f.toml", "pipeline = \"p.toml\"\nstage.x = 1\n[stages]\n"),
        ]);
        insta::assert_snapshot!(files.read(&["a.toml", "c.toml", "d.toml", "e.toml"], &[]).err().unwrap(), @r#"
            error: the files extend themselves: `a.toml -> b.toml -> a.toml`
             --> b.toml:1:12
            1 | extends = ["a.toml", 1]
              |            ^^^^^^^^

            error: wrong type of `extends`
             --> b.toml:1:22
            1 | extends = ["a.toml", 1]
              |                      ^ expected the path of a file, found an integer

            error: cannot read `gone/p.toml`
             --> c.toml:1:12
            1 | pipeline = "gone/p.toml"
              |            ^^^^^^^^^^^^^ there is no such file

            error: `d` has no stages
             --> d.toml:1:1
            1 | description = "nothing"
              | ^
            hint: name a pipeline with `pipeline = "..."` or add tables `[stages.NAME]`

            error: unknown field `extend` of an experiment
             --> e.toml:2:1
            2 | extend = "x"
              | ^^^^^^ expected one of `description`, `extends`, `params`, `pipeline`, `stages`, `sweep`, `table`
            hint: did you mean `extends`?

            error: unknown field `pipeline` of a pipeline
             --> f.toml:1:1
            1 | pipeline = "p.toml"
              | ^^^^^^^^ expected one of `description`, `extends`, `params`, `stages`
            hint: to build on another experiment, name it with `extends`

            error: unknown field `stage` of a pipeline
             --> f.toml:2:1
            2 | stage.x = 1
              | ^^^^^ expected one of `description`, `extends`, `params`, `stages`
            hint: did you mean `stages`?
        "#);
    }

    #[test]
    fn arguments_that_set_nothing() {
        let files = Files::new(&[("p.toml", PIPELINE)]);
        let sets =
            ["steps=3", "stages.train.steps", "a b=1", "pipeline=x", "stages.train.steps=2.5", "params.seed=inf"];
        insta::assert_snapshot!(files.bad("p.toml", &sets), @r#"
            error: `pipeline` cannot be set
             --> --set:1:1
            1 | pipeline=x
              | ^^^^^^^^ a path begins with one of `description`, `params`, `stages`, `sweep`, `table`

            error: `steps` cannot be set
             --> --set:1:1
            1 | steps=3
              | ^^^^^ a path begins with one of `description`, `params`, `stages`, `sweep`, `table`

            error: not an assignment
             --> --set:1:1
            1 | stages.train.steps
              | ^^^^^^^^^^^^^^^^^^ expected `PATH=VALUE`
            hint: write it as `--set stages.sft.steps=10`

            error: not an assignment
             --> --set:1:1
            1 | a b=1
              | ^^^^^ expected `PATH=VALUE`
            hint: write it as `--set stages.sft.steps=10`

            error: not a finite number
             --> --set:1:13
            1 | params.seed=inf
              |             ^^^

            error: wrong type of `steps` in stage `train`
             --> --set:1:20
            1 | stages.train.steps=2.5
              |                    ^^^ expected an integer, found a float
        "#);
    }
}
