//! `pipe why`: why a stage would run, followed upstream to the causes. It changes nothing.

use std::collections::{BTreeSet, HashMap};
use std::fmt::Write as _;
use std::sync::Arc;

use serde_json::{Value, json};

use crate::cli::failure::Failure;
use crate::cli::plan::{state_look, state_name};
use crate::cli::ui::Look;
use crate::cli::{FilesAndStage, Session, render};
use crate::pipeline::exec::ExecError;
use crate::pipeline::exec::select;
use crate::pipeline::plan::explain::Compared;
use crate::pipeline::plan::reason::Reason;
use crate::pipeline::plan::{NodeName, Plan};
use crate::pipeline::spec::origin::Origins;
use crate::pipeline::spec::{Experiment, Origin};
use crate::pipeline::store::{Acceptance, Manifest, Store, StoreError};
use crate::stages::KINDS;

/// Inputs upstream that are told one below the other; beyond them only the causes are.
const DEEPEST: usize = 12;

/// Stages told in full, at most: who asks for more is served by `pipe plan`.
const MOST: usize = 100;

/// Explain why a stage would run: what changed, old => new, followed upstream to the cause
#[derive(Debug, clap::Args)]
pub struct Args {
    #[command(flatten)]
    named: FilesAndStage,
}

/// With `--json`, an array of `{names, kind, recipe, key, state, because, reasons, compared_with, made}` of the stages asked
/// for, each followed by those upstream in which its reasons lie.
pub fn run(args: &Args, session: &Session) -> Result<(), Failure> {
    let (files, stage) = args.named.split();
    let experiments = session.read(&files, &args.named.sets)?;
    let store = session.existing_store()?;
    let plan = session.plan(&experiments, store.as_ref())?;
    let meant: BTreeSet<usize> = match stage {
        Some(stage) => select::nodes(&plan, &[stage.to_owned()], "why").map_err(unknown)?,
        None => ends(&plan),
    };
    let mut told = Told::new(&plan, store.as_ref(), Sources { experiments: &experiments, sets: &args.named.sets });
    let groups = plan.alike(meant);
    if session.ui.is_json() {
        let mut rows = Vec::new();
        for node in groups.into_iter().flatten() {
            told.rows(node, &mut rows).map_err(|error| Failure::stage(&error))?;
        }
        return session.ui.json_pretty(&rows);
    }
    let hidden = groups.len().saturating_sub(MOST);
    for (place, group) in groups.iter().take(MOST).enumerate() {
        let text = told.text(group, session.ui.output_color()).map_err(|error| Failure::stage(&error))?;
        session.ui.data(&if place > 0 { format!("\n{text}") } else { text })?;
    }
    if hidden > 0 {
        session
            .ui
            .note(&format!("{} more with other reasons; name a trial to see them", render::plural(hidden, "stage")));
    }
    Ok(())
}

fn unknown(error: ExecError) -> Failure {
    match error {
        ExecError::UnknownStage { name, hint, .. } => Failure::wrong(format!("no stage is called `{name}`")).hint(hint),
        other => Failure::stage(&other),
    }
}

/// `FILE:LINE`, or `--set`.
pub(super) fn place(origin: &Origin) -> String {
    let file = origin.file.display();
    if origin.file.as_os_str() == "--set" { file.to_string() } else { format!("{file}:{}", origin.line) }
}

/// Stages that nothing rests on.
fn ends(plan: &Plan) -> BTreeSet<usize> {
    let used: BTreeSet<usize> = plan.nodes.iter().flat_map(|node| &node.edges).map(|edge| edge.from).collect();
    (0..plan.nodes.len()).filter(|node| !used.contains(node)).collect()
}

/// What was told so far: each stage is explained once.
struct Told<'a> {
    plan: &'a Plan,
    store: Option<&'a Store>,
    distances: Vec<Option<usize>>,
    seen: BTreeSet<usize>,
    sources: Sources<'a>,
    /// Where the values of a trial come from, by experiment and trial, once asked for.
    origins: HashMap<(&'a str, &'a str), Option<Origins>>,
}

/// What the plan was read from.
struct Sources<'a> {
    experiments: &'a [Experiment],
    sets: &'a [String],
}

impl Sources<'_> {
    fn origins(&self, experiment: &str, trial: &str) -> Option<Origins> {
        let experiment = self.experiments.iter().find(|known| known.name == experiment)?;
        let trial = experiment.trials.iter().find(|known| known.name == trial)?;
        Origins::of(&experiment.path, self.sets, trial, KINDS)
    }
}

impl<'a> Told<'a> {
    fn new(plan: &'a Plan, store: Option<&'a Store>, sources: Sources<'a>) -> Self {
        let distances = plan.distances();
        Self { plan, store, distances, seen: BTreeSet::new(), sources, origins: HashMap::new() }
    }

    /// Where a changed parameter of a node is written.
    fn place(&mut self, node: usize, reason: &Reason) -> Option<Origin> {
        let Reason::Parameter { path, .. } = reason else { return None };
        let name = self.plan.nodes[node].name();
        let sources = &self.sources;
        let origins = self
            .origins
            .entry((&name.experiment, &name.trial))
            .or_insert_with(|| sources.origins(&name.experiment, &name.trial));
        Some(origins.as_ref()?.of_parameter(&name.stage, path)?.place.clone())
    }

    /// A reason, with the place of the parameter that changed.
    fn sentence(&mut self, node: usize, reason: &Reason) -> String {
        match self.place(node, reason) {
            Some(origin) => format!("{reason}, at {}", place(&origin)),
            None => reason.to_string(),
        }
    }

    /// The reasons of a node, and what those lie in: the nearest cause first.
    fn reasons(&self, node: usize) -> Vec<(&'a Reason, Option<usize>)> {
        let planned = &self.plan.nodes[node];
        let mut reasons: Vec<(&Reason, Option<usize>)> = planned
            .reasons
            .iter()
            .map(|reason| (reason, reason.input().and_then(|input| planned.producer(input))))
            .collect();
        reasons.sort_by_key(|(reason, from)| match from {
            Some(from) if reason.rests_on_a_run() => self.distances[*from].map_or(usize::MAX, |distance| distance + 1),
            _ => 0,
        });
        reasons
    }

    /// Stages that were never run are compared with the result most like them.
    fn compared(&self, node: usize) -> Result<Option<Compared>, StoreError> {
        let is_new = |reason: &Reason| matches!(reason, Reason::NeverRun | Reason::NewTrial);
        match self.store {
            Some(store) if self.plan.nodes[node].reasons.iter().any(is_new) => self.plan.compared(node, store),
            _ => Ok(None),
        }
    }

    /// The record of the result of a node that is cached.
    fn made(&self, node: usize) -> Result<Option<Arc<Manifest>>, StoreError> {
        match (self.store, &self.plan.nodes[node].result) {
            (Some(store), Some(result)) => store.manifest_of(&result.key),
            _ => Ok(None),
        }
    }

    /// The nearest cause in one sentence, where it lies upstream.
    fn because(&self, node: usize) -> Option<String> {
        let way = self.plan.way_to_cause(node, &self.distances);
        let cause = *way.last()?;
        let reason = self.plan.nodes[cause].reasons.iter().find(|reason| !reason.rests_on_a_run())?;
        Some(if cause == node {
            reason.to_string()
        } else {
            format!("{}: {reason}", render::node(self.plan.nodes[cause].name()))
        })
    }

    fn text(&mut self, group: &[usize], color: bool) -> Result<String, StoreError> {
        let mut text = String::new();
        // Depth-first without recursion; a stage's own lines come before those of its inputs.
        let mut stack = vec![(group[0], 0, Some(group))];
        while let Some((node, depth, group)) = stack.pop() {
            let planned = &self.plan.nodes[node];
            let indent = "  ".repeat(depth);
            let names = group.map_or_else(|| title(&planned.names), |group| self.title_of(group));
            let again = !self.seen.insert(node);
            let state = state_look(planned.state).on(state_name(planned.state), color);
            let _ = writeln!(
                text,
                "{indent}{state}  {}{}",
                Look::Bold.on(&names, color),
                if again { "  (see above)" } else { "" }
            );
            if again {
                continue;
            }
            if let (0, Some(because), Some(1..)) = (depth, self.because(node), self.distances[node]) {
                let _ = writeln!(text, "{indent}  because {because}");
            }
            if let Some(manifest) = self.made(node)? {
                let by = if manifest.recipe == planned.recipe {
                    String::new()
                } else {
                    format!(", under the recipe {}", manifest.recipe.short())
                };
                let took = render::duration(manifest.seconds);
                let _ = writeln!(text, "{indent}  made {} in {took}{by}", manifest.finished);
                if let Some(accepted) = &manifest.accepted {
                    let Acceptance { reason, when, by, differences, .. } = accepted;
                    let _ = writeln!(text, "{indent}  accepted {when} by {by}: {reason}");
                    for difference in differences {
                        let _ = writeln!(text, "{indent}    - {difference}");
                    }
                }
            }
            let mut inputs = Vec::new();
            // That a result was accepted is told above, with who did it and when.
            let is_told = |reason: &Reason| matches!(reason, Reason::Accepted { .. });
            for (reason, from) in self.reasons(node).into_iter().filter(|(reason, _)| !is_told(reason)) {
                let _ = writeln!(text, "{indent}  - {}", self.sentence(node, reason));
                inputs.extend(from.map(|from| (from, depth + 1, None)));
            }
            if let Some(Compared { with, differences }) = self.compared(node)? {
                let _ = writeln!(text, "{indent}    compared with {}:", render::node(&with));
                for reason in &differences {
                    let _ = writeln!(text, "{indent}    - {}", self.sentence(node, reason));
                }
            }
            if let Some(hint) = &planned.hint {
                let _ = writeln!(text, "{indent}  hint: {hint}");
            }
            if depth >= DEEPEST && !inputs.is_empty() {
                self.beyond(node, &indent, &mut text);
                continue;
            }
            inputs.dedup_by_key(|(from, ..)| *from);
            stack.extend(inputs.into_iter().rev());
        }
        Ok(text)
    }

    /// The end of a way that is too long to be told step by step.
    fn beyond(&self, node: usize, indent: &str, text: &mut String) {
        let way = self.plan.way_to_cause(node, &self.distances);
        if let (Some(&cause), 3..) = (way.last(), way.len()) {
            let between = render::plural(way.len() - 2, "stage");
            let planned = &self.plan.nodes[cause];
            let state = state_name(planned.state);
            let _ =
                writeln!(text, "{indent}    ... {between} further up\n{indent}    {state}  {}", title(&planned.names));
            for reason in &planned.reasons {
                let _ = writeln!(text, "{indent}      - {reason}");
            }
        }
    }

    fn title_of(&self, group: &[usize]) -> String {
        let first = title(&self.plan.nodes[group[0]].names);
        match group.len() {
            1 => first,
            count => format!("{first} and {} alike", render::plural(count - 1, "other stage")),
        }
    }

    /// The stage and those upstream in which its reasons lie, as JSON.
    fn rows(&mut self, node: usize, rows: &mut Vec<Value>) -> Result<(), StoreError> {
        let mut stack = vec![node];
        while let Some(node) = stack.pop() {
            if !self.seen.insert(node) {
                continue;
            }
            let planned = &self.plan.nodes[node];
            let reasons = self.reasons(node);
            let compared = self.compared(node)?;
            let said: Vec<Value> = reasons.iter().map(|(reason, from)| self.reason(node, reason, *from)).collect();
            rows.push(json!({
                "names": planned.names,
                "kind": planned.spec.kind.name,
                "recipe": planned.recipe,
                "key": planned.key,
                "state": planned.state,
                "because": self.because(node),
                "reasons": said,
                "compared_with": compared.map(|compared| json!({
                    "name": compared.with,
                    "differences": compared.differences,
                })),
                "made": self.made(node)?.map(|manifest| json!({
                    "finished": manifest.finished, "seconds": manifest.seconds, "recipe": manifest.recipe,
                    "accepted": manifest.accepted,
                })),
            }));
            stack.extend(reasons.iter().rev().filter_map(|(_, from)| *from));
        }
        Ok(())
    }

    fn reason(&mut self, node: usize, reason: &Reason, from: Option<usize>) -> Value {
        let place = self.place(node, reason);
        json!({
            "text": reason,
            "input": from.map(|from| self.plan.nodes[from].name()),
            "file": place.as_ref().map(|place| &place.file),
            "line": place.as_ref().map(|place| place.line),
        })
    }
}

/// A stage's first name, and how many share it.
fn title(names: &[NodeName]) -> String {
    match names {
        [one] => render::node(one),
        [first, others @ ..] => {
            format!("{} (shared by {} trials)", render::node(first), render::count(others.len() as u64 + 1))
        }
        [] => String::new(),
    }
}
