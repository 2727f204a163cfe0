//! `pipe plan`: what a run would do, and why. It changes nothing, not even by making the store.

use serde_json::{Value, json};

use crate::cli::failure::Failure;
use crate::cli::ui::Look;
use crate::cli::{Files, Session, render, same_arms, tuning};
use crate::pipeline::plan::{Plan, State};

/// Show what a run would do with every stage, and why; changes nothing
#[derive(Debug, clap::Args)]
pub struct Args {
    #[command(flatten)]
    files: Files,
}

/// With `--json`, an array with an element for every stage of every trial.
pub fn run(args: &Args, session: &Session) -> Result<(), Failure> {
    let experiments = session.read(&args.files.files, &args.files.sets)?;
    let store = session.existing_store()?;
    let plan = session.plan(&experiments, store.as_ref())?;
    if session.ui.is_json() {
        return session.ui.json_pretty(&rows(&plan));
    }
    session.ui.data(&text(&plan, session.ui.output_color(), session.ui.output_width()))?;
    same_arms(session, &plan, &experiments)?;
    session.ui.note(&summary(&plan));
    for note in experiments.iter().filter_map(tuning::waiting) {
        session.ui.note(&note);
    }
    for hint in plan.nodes.iter().filter_map(|node| node.hint.as_deref()) {
        session.ui.note(&format!("hint: {hint}"));
    }
    Ok(())
}

/// The documented JSON of a plan.
fn rows(plan: &Plan) -> Vec<Value> {
    let mut rows = Vec::new();
    for trial in &plan.trials {
        for (stage, node) in in_order(&trial.stages) {
            let node = &plan.nodes[node];
            rows.push(json!({
                "experiment": trial.experiment,
                "trial": trial.trial,
                "stage": stage,
                "kind": node.spec.kind.name,
                "recipe": node.recipe,
                "key": node.key,
                "state": node.state,
                "reasons": node.reasons,
            }));
        }
    }
    rows
}

/// Stages of a trial, producers before consumers.
fn in_order(stages: &std::collections::BTreeMap<String, usize>) -> Vec<(&str, usize)> {
    let mut stages: Vec<(&str, usize)> = stages.iter().map(|(name, &node)| (name.as_str(), node)).collect();
    stages.sort_by_key(|&(_, node)| node);
    stages
}

fn text(plan: &Plan, color: bool, width: Option<u16>) -> String {
    let swept = plan.trials.iter().any(|trial| !trial.trial.is_empty());
    let mut header = vec!["experiment", "trial", "stage", "state", "key", "reason"];
    if !swept {
        header.remove(1);
    }
    let mut rows = Vec::new();
    for trial in &plan.trials {
        for (stage, node) in in_order(&trial.stages) {
            let node = &plan.nodes[node];
            let key = node.key.as_ref().map_or("-", |key| key.short()).to_owned();
            let mut row = vec![trial.experiment.clone(), trial.trial.clone(), stage.to_owned()];
            if !swept {
                row.remove(1);
            }
            row.extend([state_name(node.state).to_owned(), key, node.reasons.first().cloned().unwrap_or_default()]);
            rows.push(row);
        }
    }
    let table = render::columns(&header, &[], rows, width);
    // The header is painted whole: colour inside cells would count into their width.
    match table.split_once('\n') {
        Some((head, body)) if color => format!("{}\n{body}", Look::Bold.on(head, true)),
        _ => table,
    }
}

/// The word for a state, as in the JSON.
fn state_name(state: State) -> &'static str {
    match state {
        State::Cached => "cached",
        State::Run => "run",
        State::Resume => "resume",
        State::Maybe => "maybe",
        State::Blocked => "blocked",
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
