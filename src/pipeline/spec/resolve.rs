//! From a merged document to checked trials: parameters substituted, stages walked and parsed, edges followed.
//!
//! A stage that is the same in two trials is walked once. A stage that is wrong takes part in the graph, so that its
//! consumers are not blamed for it.

mod tuned;

use std::collections::{BTreeSet, HashMap};
use std::hash::{DefaultHasher, Hash, Hasher};
use std::sync::{Arc, OnceLock};

use rayon::iter::{IntoParallelRefIterator as _, ParallelIterator as _};

use crate::pipeline::spec::compose::Document;
use crate::pipeline::spec::diagnostic::{Mistake, Report, did_you_mean, expected};
use crate::pipeline::spec::graph::{self, Checked, CheckedStages, Serialized};
use crate::pipeline::spec::interpolate::{Params, referred};
use crate::pipeline::spec::metrics::Wanted;
use crate::pipeline::spec::schema::Section;
use crate::pipeline::spec::shape::Shapes;
use crate::pipeline::spec::source::Sources;
use crate::pipeline::spec::sweep::{Assignment, Sweep};
use crate::pipeline::spec::tree::{Entry, Node, Table, Value};
use crate::pipeline::spec::tune::Purpose;
use crate::pipeline::spec::walk::{Edge, locate, meant_sibling, walk};
use crate::pipeline::spec::{Experiment, StageSpec, TableSpec, Trial, parse_duration, parse_size, table};
use crate::pipeline::stage::{Kind, Problem, RunOptions, Upstream};

/// The experiment that `document` describes. Whether it is right is for the report to say.
pub(super) fn experiment(
    document: &Document,
    kinds: &'static [Kind],
    sources: &Sources,
    report: &mut Report,
) -> Experiment {
    let root = &document.root;
    let mut section = |section: Section| {
        let Some(entry) = root.get(section.name()) else { return true };
        let (_, found) = walk(section.shapes(), entry, &format!("`{}`", section.name()), sources, &[]);
        let is_clean = found.is_clean();
        report.extend(found.mistakes);
        is_clean
    };
    let is_described = section(Section::Description);
    let is_swept = section(Section::Sweep);
    let is_tabled = section(Section::Table);
    let sweep = if is_swept { Sweep::read(root, report) } else { Sweep::default() };
    check_params(document, &sweep, report);
    let mut wanted = Wanted::new(root);
    let table =
        if is_tabled && is_swept { table::table(root, &sweep.axes, &mut wanted, report) } else { TableSpec::default() };
    let description = root.get("description").filter(|_| is_described).and_then(|entry| entry.node.text());
    let mut resolver = Resolver::new(kinds, sources);
    let (trials, tuning) = if let Some(tune) = &sweep.tune {
        let candidates = sweep.candidates(tune, report);
        let (trials, tuning) = resolver.tuned(root, tune, candidates, &mut wanted, report);
        (trials, Some(tuning))
    } else {
        let assignments = sweep.assignments(report).into_iter();
        (assignments.map(|assignment| resolver.trial(root, assignment, &mut wanted, report)).collect(), None)
    };
    wanted.report(report);
    let reporting = tuning.iter().flat_map(|tuning| &tuning.arms).flat_map(|arm| &arm.candidates);
    let reporting = reporting.flat_map(|candidate| &candidate.reporting);
    let reported: Vec<&Trial> = if tuning.is_some() { reporting.collect() } else { trials.iter().collect() };
    report.extend(sweep.doubts.into_iter().filter_map(|doubt| doubt.settled(&reported)));
    match &tuning {
        Some(tuning) => {
            let candidates = tuning.arms.iter().filter_map(|arm| arm.candidates.first());
            table::check_baseline(
                root,
                &table,
                &sweep.axes,
                candidates.flat_map(|candidate| &candidate.reporting),
                report,
            );
        }
        None => table::check_baseline(root, &table, &sweep.axes, &trials, report),
    }
    Experiment {
        name: document.name.clone(),
        path: document.path.clone(),
        description: description.unwrap_or_default().to_owned(),
        trials,
        table,
        max_failures: sweep.max_failures,
        tuning,
    }
}

/// A parameter that is swept or laid over must be read by something: else a slip of the pen changes nothing in silence.
fn check_params(document: &Document, sweep: &Sweep, report: &mut Report) {
    let swept = || sweep.paths().filter(|(path, _)| path[0] == "params");
    if document.overlaid_params.is_empty() && swept().next().is_none() {
        return;
    }
    let mut read = BTreeSet::new();
    for name in ["params", "stages", "sweep"] {
        if let Some(entry) = document.root.get(name) {
            collect_references(&entry.node, &mut read);
        }
    }
    let label = |name: &str| format!("no `${{params.{name}}}` stands in any stage");
    let hint = |name: &str| did_you_mean(name, read.iter().copied().filter(|other| *other != name));
    let table = document.root.get("params").and_then(|entry| entry.node.table());
    // Of one that is swept it is told at the sweep.
    let is_swept = |name: &str| swept().any(|(path, _)| path[1] == name);
    for name in document.overlaid_params.iter().filter(|name| !is_swept(name)) {
        if let Some(entry) = table.and_then(|table| table.get(name)).filter(|_| !read.contains(name.as_ref())) {
            let message = format!("nothing reads the parameter `{name}`");
            report.add(Mistake::at(entry.key, message).label(label(name)).hint(hint(name)));
        }
    }
    for (path, key) in swept().filter(|(path, _)| !read.contains(path[1].as_str())) {
        let name = &path[1];
        let message = format!("nothing reads the swept parameter `{name}`, so its trials would all be the same");
        report.add(Mistake::at(key, message).label(label(name)).hint(hint(name)));
    }
}

fn collect_references<'a>(node: &'a Node, read: &mut BTreeSet<&'a str>) {
    match &node.value {
        Value::String(text) if text.contains("${") => read.extend(referred(text)),
        Value::Array(items) => items.iter().for_each(|item| collect_references(item, read)),
        Value::Table(table) => table.values().for_each(|entry| collect_references(&entry.node, read)),
        _ => {}
    }
}

/// From this many stages on, more than one thread is worth waking.
const MANY: usize = 256;

/// What `each` makes of every item, in their order.
fn mapped<T: Sync, R: Send>(items: &[T], each: impl Fn(&T) -> R + Sync + Send) -> Vec<R> {
    if items.len() < MANY { items.iter().map(each).collect() } else { items.par_iter().map(each).collect() }
}

/// Resolves the trials of one experiment.
struct Resolver<'a> {
    kinds: &'static [Kind],
    sources: &'a Sources,
    /// Stages that were checked before, by the hash of their name and value.
    known: HashMap<u64, Vec<Arc<Checked>>>,
    /// The stages of the trial that was resolved last.
    current: CheckedStages,
}

impl<'a> Resolver<'a> {
    fn new(kinds: &'static [Kind], sources: &'a Sources) -> Self {
        Self { kinds, sources, known: HashMap::new(), current: CheckedStages::new() }
    }

    fn trial(&mut self, root: &Node, assignment: Assignment, wanted: &mut Wanted, report: &mut Report) -> Trial {
        let mut laid = None;
        for overlay in &assignment.overlays {
            laid.get_or_insert_with(|| root.clone()).overlay(overlay);
        }
        let root = laid.as_ref().unwrap_or(root);
        let params = Params::resolve(root.get("params"), self.sources, report);
        let none = Table::new();
        let table = match root.get("stages") {
            Some(entry) => entry.node.table().unwrap_or_else(|| {
                report.add(Mistake::at(entry.node.span, "`stages` is not a table"));
                &none
            }),
            None => &none,
        };
        let mut entries = Vec::with_capacity(table.len());
        for (name, entry) in table {
            let node = params.apply(&entry.node, self.sources, report).unwrap_or_else(|| entry.node.clone());
            entries.push((name, Entry { key: entry.key, node }));
        }
        let stages: CheckedStages = table.keys().cloned().zip(self.checked(&entries, table, report)).collect();
        let sound = graph::check(&stages, report);
        let upstream = Upstream { stages: &Serialized(&stages) };
        let problems =
            mapped(&sound, |checked| checked.spec.as_ref().map(|spec| spec.stage.check(&upstream)).unwrap_or_default());
        for (checked, problems) in sound.into_iter().zip(problems) {
            report.extend(problems.into_iter().map(|problem| from_problem(problem, &checked.name, &checked.entry)));
        }
        wanted.meet(&stages, upstream);
        self.current = stages;
        let stages = self.current.iter().filter_map(|(name, checked)| Some((name.to_string(), checked.spec.clone()?)));
        Trial {
            name: assignment.name,
            arm: assignment.arm,
            assignment: assignment.values,
            seed: assignment.seed,
            purpose: Purpose::Report,
            stages: stages.collect(),
        }
    }

    /// The stages of `entries`, each checked now or before.
    fn checked(&mut self, entries: &[(&Arc<str>, Entry)], siblings: &Table, report: &mut Report) -> Vec<Arc<Checked>> {
        let hashes = mapped(entries, |(name, entry)| {
            let mut hasher = DefaultHasher::new();
            name.hash(&mut hasher);
            entry.node.hash(&mut hasher);
            hasher.finish()
        });
        let mut all: Vec<Option<Arc<Checked>>> = Vec::with_capacity(entries.len());
        let mut fresh = Vec::new();
        for (index, (name, entry)) in entries.iter().enumerate() {
            let same = self.known.get(&hashes[index]).map_or(&[][..], Vec::as_slice);
            let known = same.iter().find(|known| known.name == **name && known.entry == *entry);
            if known.is_none() {
                fresh.push(index);
            }
            all.push(known.map(Arc::clone));
        }
        let made = mapped(&fresh, |&index| {
            let (name, entry) = &entries[index];
            let mut report = Report::default();
            let (spec, edges) = stage(name, entry, siblings, self.kinds, self.sources, &mut report);
            let outputs = spec.as_ref().map(|spec| spec.stage.outputs()).unwrap_or_default();
            let (name, entry) = (Arc::clone(name), entry.clone());
            (Arc::new(Checked { name, entry, spec, outputs, edges, params: OnceLock::new() }), report)
        });
        for (index, (checked, found)) in fresh.into_iter().zip(made) {
            report.absorb(found);
            self.known.entry(hashes[index]).or_default().push(Arc::clone(&checked));
            all[index] = Some(checked);
        }
        all.into_iter().flatten().collect()
    }
}

/// Walks and parses one stage.
fn stage(
    name: &str,
    entry: &Entry,
    siblings: &Table,
    kinds: &'static [Kind],
    sources: &Sources,
    report: &mut Report,
) -> (Option<StageSpec>, Vec<Edge>) {
    let owner = format!("stage `{name}`");
    let is_name = !name.is_empty() && name.chars().all(|c| c.is_ascii_alphanumeric() || matches!(c, '_' | '-'));
    if !is_name {
        let label = "expected ASCII letters, digits, `_` and `-`";
        report.add(Mistake::at(entry.key, format!("`{name}` cannot be the name of a stage")).label(label));
    }
    let Some(table) = entry.node.table() else {
        if entry.node.value == Value::Boolean(false) {
            let is_whole = |node: &Node| node.table().is_some();
            let hint = meant_sibling(name, siblings, is_whole).map(|meant| format!("did you mean `{meant}`?"));
            report.add(Mistake::at(entry.key, format!("there is no {owner} to drop")).hint(hint).absent_stage());
        } else if entry.node.value != Value::Invalid {
            let label = format!("expected a table, found {}", entry.node.type_name());
            report.add(Mistake::at(entry.node.span, format!("{owner} is not a table")).label(label));
        }
        return (None, Vec::new());
    };
    let run =
        table.get("run").map_or_else(|| Some(RunOptions::default()), |run| run_options(run, name, sources, report));
    let Some(kind) = kind(name, entry, table, siblings, kinds, report) else { return (None, Vec::new()) };
    let mut params = entry.clone();
    params.node.remove("kind");
    params.node.remove("run");
    let (json, found) = walk(&Shapes::of_kind(kind), &params, &owner, sources, &["kind", "run"]);
    let is_clean = found.is_clean();
    report.extend(found.mistakes);
    let stage = if is_clean && is_name {
        (kind.parse)(json).map_err(|problem| report.add(from_problem(problem, name, &params))).ok()
    } else {
        None
    };
    let spec = stage.zip(run).map(|(stage, run)| StageSpec {
        name: name.to_owned(),
        kind: *kind,
        stage,
        run,
        origin: sources.origin(entry.key),
    });
    (spec, found.edges)
}

/// The kind that a stage names.
fn kind(
    name: &str,
    entry: &Entry,
    table: &Table,
    siblings: &Table,
    kinds: &'static [Kind],
    report: &mut Report,
) -> Option<&'static Kind> {
    let names = || kinds.iter().map(|kind| kind.name);
    let Some(field) = table.get("kind") else {
        let is_whole = |node: &Node| node.get("kind").is_some();
        let hint = meant_sibling(name, siblings, is_whole).map(|meant| format!("did you mean the stage `{meant}`?"));
        let mistake = Mistake::at(entry.key, format!("missing field `kind` in stage `{name}`"));
        report.add(mistake.label(expected(names())).hint(hint).about(format!("{name}.kind")).absent_field());
        return None;
    };
    let Some(text) = field.node.text() else {
        if field.node.value != Value::Invalid {
            let label = format!("{}, found {}", expected(names()), field.node.type_name());
            let message = format!("wrong type of `kind` in stage `{name}`");
            report.add(Mistake::at(field.node.span, message).label(label).via(field.node.via));
        }
        return None;
    };
    let kind = kinds.iter().find(|kind| kind.name == text);
    if kind.is_none() {
        let mistake = Mistake::at(field.node.span, format!("unknown kind `{text}` of stage `{name}`"));
        report.add(mistake.label(expected(names())).hint(did_you_mean(text, names())).via(field.node.via));
    }
    kind
}

/// The `run` table of a stage.
fn run_options(entry: &Entry, name: &str, sources: &Sources, report: &mut Report) -> Option<RunOptions> {
    let owner = format!("`run` of stage `{name}`");
    let (json, found) = walk(Shapes::of_run(), entry, &owner, sources, &[]);
    let mut is_clean = found.is_clean();
    report.extend(found.mistakes);
    let mut check = |field: &str, is_good: fn(&str) -> bool, label: &str| {
        let Some(value) = entry.node.get(field).map(|entry| &entry.node) else { return };
        if let Some(text) = value.text().filter(|text| !is_good(text)) {
            is_clean = false;
            let message = format!("unknown {field} `{text}` in {owner}");
            report.add(Mistake::at(value.span, message).label(label).via(value.via));
        }
    };
    check("device", is_device, "expected `auto`, `cpu`, `cuda` or `cuda:N`");
    let is_time = |text: &str| parse_duration(text).is_ok();
    let a_time = "expected a time such as `30s`, `5m` or `1h`";
    check("save_every", is_time, a_time);
    check("backoff", is_time, a_time);
    check("timeout", |text| parse_duration(text).is_ok_and(|time| !time.is_zero()), a_time);
    check("memory", |text| parse_size(text).is_ok(), "expected a size such as `512MiB`, `4GiB` or `2GB`");
    if !is_clean {
        return None;
    }
    let problem = |error: serde_json::Error| from_problem(Problem::new("", error.to_string()), name, entry);
    serde_json::from_value(json).map_err(|error| report.add(problem(error))).ok()
}

fn is_device(text: &str) -> bool {
    let is_number = |number: &str| !number.is_empty() && number.bytes().all(|digit| digit.is_ascii_digit());
    matches!(text, "auto" | "cpu" | "cuda") || text.strip_prefix("cuda:").is_some_and(is_number)
}

/// A stage's own complaint at the place of the path that it names.
fn from_problem(problem: Problem, name: &str, entry: &Entry) -> Mistake {
    let (span, via, is_there) = locate(entry, &problem.path);
    let mistake = Mistake::at(span, format!("{} in stage `{name}`", problem.message)).hint(problem.hint).via(via);
    let is_field = !problem.path.is_empty() && problem.path != ".";
    if is_there && is_field { mistake } else { mistake.about(format!("{name}: {}", problem.path)) }
}

#[cfg(test)]
mod tests {
    use crate::pipeline::spec::testing::{Files, PIPELINE, mistakes};

    #[test]
    fn kinds_and_names_of_stages() {
        insta::assert_snapshot!(mistakes(
            "stages.a = 1\nstages.b.kind = 2\n[stages.c]\n[stages.d]\nkind = \"drwa\"\n[stages.\"e f\"]\nkind = \"draw\"\ntask = { kind = \"maze\", rows = 2 }\n"
        ), @r#"
            error: stage `a` is not a table
             --> a.toml:1:12
            1 | stages.a = 1
              |            ^ expected a table, found an integer

            error: wrong type of `kind` in stage `b`
             --> a.toml:2:17
            2 | stages.b.kind = 2
              |                 ^ expected one of `draw`, `train`, `score`, found an integer

            error: missing field `kind` in stage `c`
             --> a.toml:3:9
            3 | [stages.c]
              |         ^ expected one of `draw`, `train`, `score`

            error: unknown kind `drwa` of stage `d`
             --> a.toml:5:8
            5 | kind = "drwa"
              |        ^^^^^^ expected one of `draw`, `train`, `score`
            hint: did you mean `draw`?

            error: `e f` cannot be the name of a stage
             --> a.toml:6:9
            6 | [stages."e f"]
              |         ^^^^^ expected ASCII letters, digits, `_` and `-`
        "#);
    }

    #[test]
    fn every_class_of_wrong_value() {
        insta::assert_snapshot!(mistakes(r#"[stages.data]
kind = "draw"
task = { kind = "list", items = ["a", 1], rows = 3 }
splits = { train = 1.0, test = "5", more = -1 }
source = "none.jsonl"
placed = ["../up.txt", "/etc/passwd", "nowhere.txt"]
seed = 1979-05-27

[stages.train]
kind = "train"
data = ["data"]
steps = 0
learning_rate = 0
optimizer = { decay = "cosin", nesterov = "true" }
validate = { every = 1 }
rewards.a = { kind = "expresion" }
rewards.b = { weight = 1.0 }
rewards.c = { kind = "correct", weight = "${params.heavy}" }
rewards.d = false

[params]
heavy = "much"
"#), @r#"
            error: wrong type of `task.items[1]` in stage `data`
             --> a.toml:3:39
            3 | task = { kind = "list", items = ["a", 1], rows = 3 }
              |                                       ^ expected a string, found an integer

            error: unknown field `rows` in `task` of stage `data`
             --> a.toml:3:43
            3 | task = { kind = "list", items = ["a", 1], rows = 3 }
              |                                           ^^^^ expected one of `items`, `kind`

            error: wrong type of `splits.train` in stage `data`
             --> a.toml:4:20
            4 | splits = { train = 1.0, test = "5", more = -1 }
              |                    ^^^ expected an integer, found a float
            hint: write it as an integer: `1`

            error: wrong type of `splits.test` in stage `data`
             --> a.toml:4:32
            4 | splits = { train = 1.0, test = "5", more = -1 }
              |                                ^^^ expected an integer, found a string
            hint: leave the quotes out

            error: `splits.more` is out of range in stage `data`
             --> a.toml:4:44
            4 | splits = { train = 1.0, test = "5", more = -1 }
              |                                            ^^ expected at least 0

            error: cannot find the file of `source` in stage `data`
             --> a.toml:5:10
            5 | source = "none.jsonl"
              |          ^^^^^^^^^^^^ there is no `none.jsonl`
            hint: paths are relative to the file in which they are written

            error: `placed[0]` leads out of its folder in stage `data`
             --> a.toml:6:11
            6 | placed = ["../up.txt", "/etc/passwd", "nowhere.txt"]
              |           ^^^^^^^^^^^ expected a relative path without `..`

            error: `placed[1]` leads out of its folder in stage `data`
             --> a.toml:6:24
            6 | placed = ["../up.txt", "/etc/passwd", "nowhere.txt"]
              |                        ^^^^^^^^^^^^^ expected a relative path without `..`

            error: cannot find the file of `placed[2]` in stage `data`
             --> a.toml:6:39
            6 | placed = ["../up.txt", "/etc/passwd", "nowhere.txt"]
              |                                       ^^^^^^^^^^^^^ there is no `nowhere.txt`
            hint: paths are relative to the file in which they are written

            error: dates and times are not supported
             --> a.toml:7:8
            7 | seed = 1979-05-27
              |        ^^^^^^^^^^
            hint: write it as a string, in quotes

            error: wrong type of `data` in stage `train`
              --> a.toml:11:8
            11 | data = ["data"]
               |        ^^^^^^^^ expected the name of a stage that makes a dataset, found an array

            error: `steps` is out of range in stage `train`
              --> a.toml:12:9
            12 | steps = 0
               |         ^ expected at least 1

            error: `learning_rate` is out of range in stage `train`
              --> a.toml:13:17
            13 | learning_rate = 0
               |                 ^ expected above 0

            error: unknown value `cosin` of `optimizer.decay` in stage `train`
              --> a.toml:14:23
            14 | optimizer = { decay = "cosin", nesterov = "true" }
               |                       ^^^^^^^ expected one of `cosine`, `constant`
            hint: did you mean `cosine`?

            error: wrong type of `optimizer.nesterov` in stage `train`
              --> a.toml:14:43
            14 | optimizer = { decay = "cosin", nesterov = "true" }
               |                                           ^^^^^^ expected a boolean, found a string
            hint: leave the quotes out

            error: missing field `samples` in `validate` of stage `train`
              --> a.toml:15:1
            15 | validate = { every = 1 }
               | ^^^^^^^^ expected `samples`, an integer

            error: unknown kind `expresion` in `rewards.a` of stage `train`
              --> a.toml:16:22
            16 | rewards.a = { kind = "expresion" }
               |                      ^^^^^^^^^^^ expected one of `correct`, `expression`
            hint: did you mean `expression`?

            error: missing field `kind` in `rewards.b` of stage `train`
              --> a.toml:17:9
            17 | rewards.b = { weight = 1.0 }
               |         ^ expected one of `correct`, `expression`

            error: wrong type of `rewards.d` in stage `train`
              --> a.toml:19:13
            19 | rewards.d = false
               |             ^^^^^ expected a table, found a boolean
            hint: `false` drops a table that it is laid over, and there is none

            error: wrong type of `rewards.c.weight` in stage `train`
              --> a.toml:22:9
            22 | heavy = "much"
               |         ^^^^^^ expected a number, found a string
            note: the value is used at a.toml:18:42
        "#);
    }

    #[test]
    fn run_options_are_checked() {
        let run = |run: &str| mistakes(&PIPELINE.replace("{ cpus = 2, save_every = \"30s\" }", run));
        insta::assert_snapshot!(run("{ cpu = 2, device = \"gpu\", save_every = \"30\" }"), @r#"
            error: unknown field `cpu` in `run` of stage `train`
              --> a.toml:18:9
            18 | run = { cpu = 2, device = "gpu", save_every = "30" }
               |         ^^^ expected one of `backoff`, `cpus`, `device`, `memory`, `retries`, `save_every`, `slots`, `timeout`
            hint: did you mean `cpus`?

            error: unknown device `gpu` in `run` of stage `train`
              --> a.toml:18:27
            18 | run = { cpu = 2, device = "gpu", save_every = "30" }
               |                           ^^^^^ expected `auto`, `cpu`, `cuda` or `cuda:N`

            error: unknown save_every `30` in `run` of stage `train`
              --> a.toml:18:47
            18 | run = { cpu = 2, device = "gpu", save_every = "30" }
               |                                               ^^^^ expected a time such as `30s`, `5m` or `1h`
        "#);
        let limits =
            "{ memory = \"4G\", timeout = \"0s\", backoff = \"soon\", retries = -1, slots = { licence = \"1\" } }";
        insta::assert_snapshot!(run(limits), @r#"
            error: unknown memory `4G` in `run` of stage `train`
              --> a.toml:18:18
            18 | run = { memory = "4G", timeout = "0s", backoff = "soon", retries = -1, slots = { licence = "1" } }
               |                  ^^^^ expected a size such as `512MiB`, `4GiB` or `2GB`

            error: unknown timeout `0s` in `run` of stage `train`
              --> a.toml:18:34
            18 | run = { memory = "4G", timeout = "0s", backoff = "soon", retries = -1, slots = { licence = "1" } }
               |                                  ^^^^ expected a time such as `30s`, `5m` or `1h`

            error: unknown backoff `soon` in `run` of stage `train`
              --> a.toml:18:50
            18 | run = { memory = "4G", timeout = "0s", backoff = "soon", retries = -1, slots = { licence = "1" } }
               |                                                  ^^^^^^ expected a time such as `30s`, `5m` or `1h`

            error: `retries` is out of range in `run` of stage `train`
              --> a.toml:18:68
            18 | run = { memory = "4G", timeout = "0s", backoff = "soon", retries = -1, slots = { licence = "1" } }
               |                                                                    ^^ expected at least 0

            error: wrong type of `slots.licence` in `run` of stage `train`
              --> a.toml:18:92
            18 | run = { memory = "4G", timeout = "0s", backoff = "soon", retries = -1, slots = { licence = "1" } }
               |                                                                                            ^^^ expected an integer, found a string
            hint: leave the quotes out
        "#);
        insta::assert_snapshot!(run("{ cpus = -1, device = \"cuda:x\" }"), @r#"
            error: `cpus` is out of range in `run` of stage `train`
              --> a.toml:18:16
            18 | run = { cpus = -1, device = "cuda:x" }
               |                ^^ expected at least 0

            error: unknown device `cuda:x` in `run` of stage `train`
              --> a.toml:18:29
            18 | run = { cpus = -1, device = "cuda:x" }
               |                             ^^^^^^^^ expected `auto`, `cpu`, `cuda` or `cuda:N`
        "#);
    }

    #[test]
    fn a_stages_own_complaints_stand_at_their_paths() {
        let text = PIPELINE.replace("a + b", "a ?? b").replace("steps = 10", "steps = 10\nnote = \"absent\"");
        insta::assert_snapshot!(mistakes(&text), @r#"
            error: nothing is validated in stage `train`
              --> a.toml:10:9
            10 | [stages.train]
               |         ^^^^^

            error: `??` is no operator in stage `train`
              --> a.toml:18:53
            18 | rewards.other = { kind = "expression", expression = "a ?? b" }
               |                                                     ^^^^^^^^
            hint: write arithmetic
        "#);
    }

    #[test]
    fn parameters_that_nothing_reads_are_mistakes_where_they_are_laid_over_or_swept() {
        let overlay =
            "pipeline = \"p.toml\"\n[params]\nsede = 2\n[sweep]\nseeds = { path = \"params.idle\", values = [1] }\n";
        let pipeline = PIPELINE.replace("seed = 1\n", "seed = 1\nidle = 2\n");
        let files = Files::new(&[("p.toml", &pipeline), ("a.toml", overlay)]);
        insta::assert_snapshot!(files.bad("a.toml", &["params.rat=1"]), @r#"
            error: nothing reads the parameter `sede`
             --> a.toml:3:1
            3 | sede = 2
              | ^^^^ no `${params.sede}` stands in any stage
            hint: did you mean `seed`?

            error: nothing reads the swept parameter `idle`, so its trials would all be the same
             --> a.toml:5:18
            5 | seeds = { path = "params.idle", values = [1] }
              |                  ^^^^^^^^^^^^^ no `${params.idle}` stands in any stage

            error: nothing reads the parameter `rat`
             --> --set:1:1
            1 | params.rat=1
              | ^^^^^^^^^^ no `${params.rat}` stands in any stage
            hint: did you mean `rate`?
        "#);
        files.good("p.toml", &[]);
    }

    #[test]
    fn files_are_absolute_and_relative_to_where_they_are_written() {
        let pipeline = "[stages.data]\nkind = \"draw\"\ntask = { kind = \"maze\", rows = 5 }\nsource = \"rows.jsonl\"\nplaced = [\"./x/run.sh\"]\n";
        let overlay = "pipeline = \"pipelines/p.toml\"\n[stages.data]\nplaced = [\"own.sh\"]\n";
        let files = Files::new(&[
            ("pipelines/p.toml", pipeline),
            ("pipelines/rows.jsonl", ""),
            ("pipelines/x/run.sh", ""),
            ("own.sh", ""),
            ("a.toml", overlay),
        ]);
        let params = files.good("a.toml", &[]).trials[0].stages["data"].stage.params();
        let absolute = |path: &str| files.path(path).canonicalize().unwrap();
        assert_eq!(params["source"], serde_json::json!({"$file": absolute("pipelines/rows.jsonl")}));
        assert_eq!(params["placed"], serde_json::json!([{"$file": absolute("own.sh"), "as": "own.sh"}]));
        let params = files.good("pipelines/p.toml", &[]).trials[0].stages["data"].stage.params();
        let placed = serde_json::json!([{"$file": absolute("pipelines/x/run.sh"), "as": "./x/run.sh"}]);
        assert_eq!(params["placed"], placed);
    }
}
