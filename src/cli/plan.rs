//! `pipe plan`: what a run would do, and why. It changes nothing, not even by making the store.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use serde_json::{Value, json};

use crate::cli::failure::Failure;
use crate::cli::ui::Look;
use crate::cli::{Files, Session, render, same_arms, tuning};
use crate::pipeline::exec::device::{self, Gpus};
use crate::pipeline::exec::slots::Gpu;
use crate::pipeline::plan::forecast::{Forecast, Share, Total, Width};
use crate::pipeline::plan::reason::Reason;
use crate::pipeline::plan::{Node, Plan, State};

/// The exit code that `--exit-code` gives where something would run.
const WOULD_RUN: u8 = 3;

/// Up to so many stages each has a line of its own; beyond, stages that share stage, state and reason have one together.
const LINES: usize = 40;

/// Show what a run would do with every stage, and why; changes nothing
#[derive(Debug, clap::Args)]
pub struct Args {
    #[command(flatten)]
    files: Files,
    /// A line for every stage of every trial
    #[arg(long)]
    all: bool,
    /// Exit with 3 where something would run, with 0 where everything is cached
    #[arg(long)]
    exit_code: bool,
    /// Predict the time of a run with so many stages at once [default: as many as cores allow]
    #[arg(long, short, value_name = "N", default_value_t = 0, hide_default_value = true)]
    jobs: usize,
}

/// With `--json`, an array with an element for every stage of every trial.
pub fn run(args: &Args, session: &Session) -> Result<(), Failure> {
    let experiments = session.read(&args.files.files, &args.files.sets)?;
    let store = session.existing_store()?;
    let plan = session.plan(&experiments, store.as_ref())?;
    let forecast = Forecast::new(&plan, store.as_ref()).map_err(|error| Failure::stage(&error))?;
    if session.ui.is_json() {
        session.ui.json_pretty(&rows(&plan, &forecast))?;
        return ended(args, &plan);
    }
    let table = Table::new(&plan, &forecast, args.all);
    session.ui.data(&table.text(session.ui.output_color(), session.ui.output_width()))?;
    same_arms(session, &plan, &experiments)?;
    session.ui.note(&summary(&plan));
    let (width, share) = machine(args.jobs);
    if let Some(time) = time(&forecast.total(width, share, |node| forecast.to_do(node)), args.jobs) {
        session.ui.note(&time);
    }
    for node in &plan.nodes {
        if let [Reason::Damaged { what }] = node.reasons.as_slice() {
            session.ui.warn(&format!("`{}` would be made again: {what}", render::node(node.name())));
        }
    }
    for note in experiments.iter().filter_map(tuning::waiting) {
        session.ui.note(&note);
    }
    for hint in plan.nodes.iter().filter_map(|node| node.hint.as_deref()) {
        session.ui.note(&format!("hint: {hint}"));
    }
    ended(args, &plan)
}

fn ended(args: &Args, plan: &Plan) -> Result<(), Failure> {
    let would_run = plan.nodes.iter().any(|node| node.state != State::Cached);
    if args.exit_code && would_run { Err(Failure::silent(WOULD_RUN)) } else { Ok(()) }
}

/// What this machine gives at once to a run of so many jobs, 0 being as many as cores, and what a node takes of it.
pub(super) fn machine(jobs: usize) -> (Width, impl Fn(&Node) -> Share) {
    let cpus = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
    let gpus = Gpus::detect().count();
    let share = move |node: &Node| {
        // A device that is not there is for the run to refuse.
        let need = device::need(node.spec.kind.place, &node.spec.run, cpus, gpus).unwrap_or_default();
        Share { cpus: need.cpus, has_gpu: need.gpu != Gpu::None }
    };
    (Width { cpus, gpus, jobs: if jobs == 0 { cpus } else { jobs } }, share)
}

/// `about 12m 00s of work, 6m 00s with 2 jobs; of 3 stages the time is not known`; nothing where nothing would run.
fn time(total: &Total, jobs: usize) -> Option<String> {
    let Total { work, maybe, wall, unknown } = *total;
    let mut parts = Vec::new();
    if work + maybe > 0.0 {
        let mut clauses = vec![format!("about {} of work", render::duration(work))];
        if maybe > 0.0 {
            clauses.push(format!("and {} that may be spared", render::duration(maybe)));
        }
        if wall < 0.95 * (work + maybe) {
            let place =
                if jobs == 0 { "on this machine".to_owned() } else { format!("with {}", render::plural(jobs, "job")) };
            clauses.push(format!("{} {place}", render::duration(wall)));
        }
        parts.push(clauses.join(", "));
    }
    if unknown > 0 {
        parts.push(format!("how long {} will take is not known", render::plural(unknown, "stage")));
    }
    (!parts.is_empty()).then(|| parts.join("; "))
}

/// The documented JSON of a plan.
fn rows(plan: &Plan, forecast: &Forecast<'_>) -> Vec<Value> {
    let mut rows = Vec::new();
    for trial in &plan.trials {
        for (stage, index) in in_order(&trial.stages) {
            let node = &plan.nodes[index];
            rows.push(json!({
                "experiment": trial.experiment,
                "trial": trial.trial,
                "stage": stage,
                "kind": node.spec.kind.name,
                "recipe": node.recipe,
                "key": node.key,
                "state": node.state,
                "reasons": node.reasons,
                "seconds": forecast.seconds(index),
                "shared_by": node.names.len(),
            }));
        }
    }
    rows
}

/// Stages of a trial, producers before consumers.
fn in_order(stages: &BTreeMap<String, usize>) -> Vec<(&str, usize)> {
    let mut stages: Vec<(&str, usize)> = stages.iter().map(|(name, &node)| (name.as_str(), node)).collect();
    stages.sort_by_key(|&(_, node)| node);
    stages
}

/// A line of the plan: one stage of one trial, one node, or nodes of which the same is to be said.
struct Line<'a> {
    experiment: String,
    trial: String,
    stage: &'a str,
    nodes: Vec<usize>,
}

/// The plan as people read it.
struct Table<'a> {
    plan: &'a Plan,
    forecast: &'a Forecast<'a>,
    lines: Vec<Line<'a>>,
}

impl<'a> Table<'a> {
    fn new(plan: &'a Plan, forecast: &'a Forecast<'a>, all: bool) -> Self {
        let lines = if all {
            let stages = plan.trials.iter().flat_map(|trial| {
                in_order(&trial.stages).into_iter().map(move |(stage, node)| Line {
                    experiment: trial.experiment.clone(),
                    trial: trial.trial.clone(),
                    stage,
                    nodes: vec![node],
                })
            });
            stages.collect()
        } else if plan.nodes.len() <= LINES {
            (0..plan.nodes.len()).map(|node| Line::of(plan, vec![node])).collect()
        } else {
            let mut groups: Vec<Vec<usize>> = Vec::new();
            let mut known = HashMap::new();
            for (index, node) in plan.nodes.iter().enumerate() {
                let name = node.name();
                let reason = node.reasons.first().map(ToString::to_string);
                let group = *known
                    .entry((&name.experiment, &name.stage, state_name(node.state), reason))
                    .or_insert(groups.len());
                groups.resize_with(groups.len().max(group + 1), Vec::new);
                groups[group].push(index);
            }
            groups.into_iter().map(|nodes| Line::of(plan, nodes)).collect()
        };
        Self { plan, forecast, lines }
    }

    fn text(&self, color: bool, width: Option<u16>) -> String {
        let swept = self.plan.trials.iter().any(|trial| !trial.trial.is_empty());
        let timed = (0..self.plan.nodes.len()).any(|node| self.forecast.seconds(node).is_some());
        let shown = |name: &str| (name != "trial" || swept) && (name != "time" || timed);
        let all = ["experiment", "trial", "stage", "state", "time", "key", "reason"];
        let header: Vec<&str> = all.into_iter().filter(|name| shown(name)).collect();
        let rows = self.lines.iter().map(|line| {
            let first = &self.plan.nodes[line.nodes[0]];
            let key = match (line.nodes.len(), &first.key) {
                (1, Some(key)) => key.short().to_owned(),
                _ => "-".to_owned(),
            };
            let cells = [
                line.experiment.clone(),
                line.trial.clone(),
                match line.nodes.len() {
                    1 => line.stage.to_owned(),
                    count => format!("{} x{}", line.stage, render::count(count as u64)),
                },
                state_name(first.state).to_owned(),
                self.time(line),
                key,
                first.reasons.first().map(ToString::to_string).unwrap_or_default(),
            ];
            cells.into_iter().zip(all).filter(|(_, name)| shown(name)).map(|(cell, _)| cell).collect()
        });
        let table = render::columns(&header, &[], rows.collect(), width);
        // The header is painted whole: colour inside cells would count into their width.
        match table.split_once('\n') {
            Some((head, body)) if color => format!("{}\n{body}", Look::Bold.on(head, true)),
            _ => table,
        }
    }

    /// What a line's nodes take together; `?` where that of none is known.
    fn time(&self, line: &Line<'_>) -> String {
        if self.plan.nodes[line.nodes[0]].state == State::Cached {
            return String::new();
        }
        let known: Vec<f64> = line.nodes.iter().filter_map(|node| self.forecast.seconds(*node)).collect();
        if known.is_empty() { "?".to_owned() } else { render::duration(known.iter().sum()) }
    }
}

impl<'a> Line<'a> {
    fn of(plan: &'a Plan, nodes: Vec<usize>) -> Self {
        let names = || nodes.iter().flat_map(|node| &plan.nodes[*node].names);
        let experiments: BTreeSet<&str> = names().map(|name| name.experiment.as_str()).collect();
        let trials: BTreeSet<(&str, &str)> =
            names().map(|name| (name.experiment.as_str(), name.trial.as_str())).collect();
        let first = plan.nodes[nodes[0]].name();
        let experiment = match experiments.len() {
            1 | 2 => experiments.into_iter().collect::<Vec<_>>().join(", "),
            count => format!("{count} experiments"),
        };
        let is_swept = trials.iter().any(|(_, trial)| !trial.is_empty());
        let trial = match trials.len() {
            1 => first.trial.clone(),
            _ if !is_swept => String::new(),
            count => match shared(&trials) {
                shared if shared.is_empty() => render::plural(count, "trial"),
                shared => format!("{shared} ({})", render::plural(count, "trial")),
            },
        };
        Self { experiment, trial, stage: &first.stage, nodes }
    }
}

/// What the names of trials have in common: `seed=1` of `rate=0.1,seed=1` and `rate=0.2,seed=1`.
fn shared(trials: &BTreeSet<(&str, &str)>) -> String {
    let mut names = trials.iter().map(|(_, trial)| trial.split(','));
    let mut common: Vec<&str> = names.next().map(Iterator::collect).unwrap_or_default();
    for name in names {
        let parts: Vec<&str> = name.collect();
        common.retain(|part| parts.contains(part));
    }
    common.join(",")
}

/// The word for a state, as in the JSON.
pub(super) fn state_name(state: State) -> &'static str {
    match state {
        State::Cached => "cached",
        State::Run => "run",
        State::Resume => "resume",
        State::Maybe => "maybe",
        State::Blocked => "blocked",
    }
}

/// How a state looks.
pub(super) fn state_look(state: State) -> Look {
    match state {
        State::Cached => Look::Green,
        State::Run | State::Resume => Look::Yellow,
        State::Maybe => Look::Cyan,
        State::Blocked => Look::Red,
    }
}

/// `3 stages: 1 cached, 2 run`; shared stages count once.
fn summary(plan: &Plan) -> String {
    let states = [State::Cached, State::Run, State::Resume, State::Maybe, State::Blocked];
    let counts: Vec<String> = states
        .into_iter()
        .map(|state| (plan.nodes.iter().filter(|node| node.state == state).count(), state))
        .filter(|(count, _)| *count > 0)
        .map(|(count, state)| format!("{} {}", render::count(count as u64), state_name(state)))
        .collect();
    format!("{}: {}", render::plural(plan.nodes.len(), "stage"), counts.join(", "))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_time_says_what_is_sure_what_may_be_spared_and_what_is_not_known() {
        let total = Total { work: 720.0, maybe: 60.0, wall: 400.0, unknown: 1 };
        assert_eq!(
            time(&total, 2).unwrap(),
            "about 12m 00s of work, and 1m 00s that may be spared, 6m 40s with 2 jobs; how long 1 stage will take is not \
             known"
        );
        assert_eq!(time(&Total { work: 5.0, wall: 5.0, ..Total::default() }, 0).unwrap(), "about 5.0s of work");
        assert_eq!(time(&Total::default(), 0), None);
    }
}
