//! `pipe accept`: the last result of a stage counts for it as it is now, because what changed is cosmetic.

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;

use serde_json::{Value, json};

use crate::cli::failure::Failure;
use crate::cli::{Session, render, store_hint};
use crate::pipeline::plan::{Node, NodeName, Plan, State};
use crate::pipeline::store::{
    AcceptError, Acceptance, AcceptanceDraft, Digest, KeyParts, Manifest, RunRecord, Store, StoreError,
};

/// Let a stage's last result count as it is, after a change that does not matter
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Experiment or pipeline files
    #[arg(required = true, value_name = "FILES")]
    files: Vec<PathBuf>,
    /// The stage, in every trial that has it; `TRIAL/STAGE` is one of them
    #[arg(value_name = "STAGE")]
    stage: String,
    /// Lay a value over every file, as for `pipe run`
    #[arg(long = "set", value_name = "PATH=VALUE")]
    sets: Vec<String>,
    /// Why the change does not matter; it is kept with the result
    #[arg(long, value_name = "TEXT", required_unless_present = "undo")]
    reason: Option<String>,
    /// Take the acceptance back: the stage runs again
    #[arg(long, conflicts_with = "reason")]
    undo: bool,
}

/// With `--json`, an array of what was accepted or taken back. Where one of several trials refuses, nothing is accepted.
pub fn run(args: &Args, session: &Session) -> Result<(), Failure> {
    let reason = args.reason.as_deref().map(str::trim).unwrap_or_default();
    if reason.is_empty() && !args.undo {
        return Err(Failure::wrong("the reason is empty")
            .hint("say why the change does not matter: it is kept with the result"));
    }
    let experiments = session.read(&args.files, &args.sets)?;
    if session.existing_store()?.is_none() {
        return Err(Failure::wrong(format!("there is no store at `{}`", session.store.display()))
            .hint("`pipe run` makes it; `--store DIR` or PIPE_STORE names another"));
    }
    let store = Store::open(&session.store).map_err(|error| Failure::input(&error).hint(store_hint(&session.store)))?;
    let plan = session.plan(&experiments, Some(&store))?;
    let nodes = named(&plan, &args.stage)?;
    if args.undo { undo(&plan, &nodes, session, &store) } else { accept(&plan, &nodes, reason, session, &store) }
}

fn accept(plan: &Plan, nodes: &[usize], reason: &str, session: &Session, store: &Store) -> Result<(), Failure> {
    // Nodes that have come to one key get one result.
    let mut drafts: Vec<(Vec<&Node>, AcceptanceDraft, Manifest)> = Vec::new();
    for node in nodes.iter().map(|node| &plan.nodes[*node]).filter(|node| node.state != State::Cached) {
        let draft = draft(plan, node, reason, store)?;
        let manifest = store.check_acceptance(&draft).map_err(|error| refused(node.name(), &error))?;
        let Some((same, _, other)) = drafts.iter_mut().find(|(_, other, _)| other.key == draft.key) else {
            drafts.push((vec![node], draft, manifest));
            continue;
        };
        let content = |manifest: &Manifest| manifest.outputs.iter().map(|one| one.digest.clone()).collect::<Vec<_>>();
        if content(&manifest) != content(other) {
            return Err(Failure::wrong(format!(
                "`{}` and `{}` are one computation as they are now, and their last results differ",
                same[0].name(),
                node.name()
            ))
            .hint("run it: only then is it known which is right"));
        }
        same.push(node);
    }
    if drafts.is_empty() {
        let name = plan.nodes[nodes[0]].name();
        return Err(Failure::wrong(format!("`{name}` has its result already: nothing would run"))
            .hint("`pipe plan` shows what would run"));
    }
    let mut done = Vec::new();
    for (same, draft, _) in drafts {
        let (from, differences) = (draft.from.clone(), draft.differences.clone());
        let manifest = match store.accept(draft) {
            Ok(manifest) => manifest,
            // A disk that is full or a process that works there: what was accepted before that stays so, and is told.
            Err(error) => {
                told(session, &done, &format!("accepted ({reason})"))?;
                return Err(refused(same[0].name(), &error));
            }
        };
        for node in same {
            record(plan, node, &manifest.key, store)?;
            done.push(json!({
                "name": node.name().to_string(), "key": manifest.key, "from": from, "reason": reason,
                "differences": differences,
            }));
        }
    }
    told(session, &done, &format!("accepted ({reason})"))
}

fn undo(plan: &Plan, nodes: &[usize], session: &Session, store: &Store) -> Result<(), Failure> {
    let mut done = Vec::new();
    let mut undone: BTreeMap<&Digest, Acceptance> = BTreeMap::new();
    for node in nodes.iter().map(|node| &plan.nodes[*node]) {
        let Some(key) = &node.key else { continue };
        if !undone.contains_key(key) {
            match store.undo_acceptance(key) {
                Ok(acceptance) => undone.insert(key, acceptance),
                Err(AcceptError::NoResult | AcceptError::NotAccepted) => continue,
                Err(error) => {
                    told(session, &done, "taken back")?;
                    return Err(refused(node.name(), &error));
                }
            };
        }
        let acceptance = &undone[key];
        // The names go back to what they were, so that the next plan compares with it.
        record(plan, node, &acceptance.from, store)?;
        done.push(json!({
            "name": node.name().to_string(), "key": key, "from": acceptance.from, "reason": acceptance.reason,
        }));
    }
    if done.is_empty() {
        let name = plan.nodes[nodes[0]].name();
        return Err(Failure::wrong(format!(
            "the result of `{name}` was not accepted, so there is nothing to take back"
        )));
    }
    told(session, &done, "taken back")
}

fn told(session: &Session, done: &[Value], what: &str) -> Result<(), Failure> {
    if session.ui.is_json() {
        return session.ui.json_pretty(&done);
    }
    for one in done {
        let from = one["from"].as_str().unwrap_or_default();
        let differences = one["differences"].as_array().into_iter().flatten().filter_map(Value::as_str);
        let what = std::iter::once(what).chain(differences).collect::<Vec<_>>().join("; ");
        let name = one["name"].as_str().unwrap_or_default();
        session.ui.note(&format!("{name}: {what}, from {}", &from[..from.len().min(10)]));
    }
    Ok(())
}

/// The nodes that bear the stage's name, each once.
fn named(plan: &Plan, stage: &str) -> Result<Vec<usize>, Failure> {
    let is_meant = |name: &NodeName| {
        let NodeName { trial, stage: own, .. } = name;
        own == stage || stage.strip_prefix(trial.as_str()).and_then(|rest| rest.strip_prefix('/')) == Some(own)
    };
    let mut found = Vec::new();
    for (index, node) in plan.nodes.iter().enumerate() {
        if node.names.iter().any(is_meant) {
            found.push(index);
        }
    }
    if found.is_empty() {
        let known: BTreeSet<&str> =
            plan.nodes.iter().flat_map(|node| &node.names).map(|name| name.stage.as_str()).collect();
        let failure = Failure::wrong(format!("there is no stage `{stage}`"));
        let near = render::near(stage, known.iter().copied());
        return Err(match near.first() {
            Some(near) => failure.hint(format!("did you mean `{near}`?")),
            None => failure.hint(format!("there are: {}", known.into_iter().take(12).collect::<Vec<_>>().join(", "))),
        });
    }
    Ok(found)
}

/// What would be accepted for a node, from the last recorded run of its names.
fn draft(plan: &Plan, node: &Node, reason: &str, store: &Store) -> Result<AcceptanceDraft, Failure> {
    let name = node.name();
    let inputs = inputs(plan, node)?;
    let (Some(key), params) = (node.key.clone(), node.spec.stage.params()) else {
        return Err(Failure::wrong(format!("`{name}` cannot be accepted: its key is not known yet")));
    };
    let parts: KeyParts = node.parts(&params, &|edge| json!(inputs[&edge.reference]));
    let mut record = None;
    for name in &node.names {
        record = record.or(store.recorded(&name.experiment, &name.trial, &name.stage).map_err(failed)?);
    }
    let Some(record) = record else {
        return Err(Failure::wrong(format!("`{name}` was never run, so there is nothing to accept"))
            .hint("`pipe run` makes its result"));
    };
    if record.kind != node.spec.kind.name {
        let (old, new) = (&record.kind, node.spec.kind.name);
        return Err(Failure::wrong(format!(
            "`{name}` was a `{old}` stage and is a `{new}` stage now: that is no cosmetic change"
        )));
    }
    let who = ["USER", "LOGNAME"].into_iter().find_map(|name| std::env::var(name).ok().filter(|who| !who.is_empty()));
    Ok(AcceptanceDraft {
        key,
        recipe: node.recipe.clone(),
        parts,
        params,
        inputs,
        outputs: node.spec.stage.outputs(),
        from: record.key,
        reason: reason.to_owned(),
        by: who.unwrap_or_else(|| "unknown".to_owned()),
        differences: node.reasons.iter().map(ToString::to_string).collect(),
    })
}

/// The content of every input, all of which must be there.
fn inputs(plan: &Plan, node: &Node) -> Result<BTreeMap<String, Digest>, Failure> {
    let mut inputs = BTreeMap::new();
    for edge in &node.edges {
        let output = plan.nodes[edge.from].result.as_ref().and_then(|result| {
            result.outputs.iter().find(|output| output.name == edge.output).map(|output| output.digest.clone())
        });
        let Some(digest) = output else {
            return Err(Failure::wrong(format!(
                "`{}` cannot be accepted: its input `{}` is not there",
                node.name(),
                edge.reference
            ))
            .hint(format!("run or accept `{}` first", plan.nodes[edge.from].name().stage)));
        };
        inputs.insert(edge.reference.clone(), digest);
    }
    Ok(inputs)
}

/// Writes down that every name of the node has this key now.
fn record(plan: &Plan, node: &Node, key: &Digest, store: &Store) -> Result<(), Failure> {
    for name in &node.names {
        let file = plan.experiments.get(&name.experiment).cloned().unwrap_or_default();
        let (recipe, kind) = (node.recipe.clone(), node.spec.kind.name.to_owned());
        store.record(name, &RunRecord { recipe, key: key.clone(), kind, file, earlier: Vec::new() }).map_err(failed)?;
        store.link_tensorboard(name, key).map_err(failed)?;
    }
    Ok(())
}

fn refused(name: &NodeName, error: &AcceptError) -> Failure {
    match error {
        AcceptError::Store(error) => Failure::stage(error),
        AcceptError::Busy => Failure::failed(format!("the result of `{name}` {error}")),
        AcceptError::Damaged { .. } | AcceptError::HasDamaged { .. } => {
            Failure::failed(format!("the result of `{name}` {error}"))
                .hint("`pipe verify --repair` puts it aside, and the next run makes it again")
        }
        AcceptError::Gone
        | AcceptError::Outputs { .. }
        | AcceptError::HasResult
        | AcceptError::NoResult
        | AcceptError::NotAccepted => Failure::wrong(format!("the result of `{name}` {error}")),
    }
}

#[expect(clippy::needless_pass_by_value, reason = "it is handed to `map_err`")]
fn failed(error: StoreError) -> Failure {
    Failure::stage(&error)
}
