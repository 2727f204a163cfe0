//! `pipe verify`: reads every byte of the store again.

use std::collections::BTreeSet;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use serde_json::json;
use signal_hook::consts::{SIGINT, SIGTERM};

use crate::cli::bundle::ByteProgress;
use crate::cli::failure::Failure;
use crate::cli::{Session, render, store_hint};
use crate::pipeline::plan::Plan;
use crate::pipeline::store::{Digest, Repaired, Store, Verification, VerifyReport};

/// Hash every stored result again and report what is damaged
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Only the results of these files; without, of the whole store
    #[arg(value_name = "FILES")]
    files: Vec<PathBuf>,
    /// Lay a value over every file, as for `pipe run`
    #[arg(long = "set", value_name = "PATH=VALUE", requires = "files")]
    sets: Vec<String>,
    /// Put damaged results aside, so that the next run makes them again
    #[arg(long)]
    repair: bool,
    /// Begin anew, and not where an interrupted verification stopped
    #[arg(long)]
    fresh: bool,
}

/// Fails where something is damaged and stays so.
pub fn run(args: &Args, session: &Session) -> Result<(), Failure> {
    let ui = &session.ui;
    let Some(store) = session.existing_store()? else {
        if !session.store.exists() {
            return Err(Failure::wrong(format!("there is no store at `{}`", session.store.display()))
                .hint("name it with `--store DIR` or PIPE_STORE"));
        }
        return Err(Failure::wrong(format!("`{}` is not a store", session.store.display())));
    };
    let keys = if args.files.is_empty() {
        None
    } else {
        let experiments = session.read(&args.files, &args.sets)?;
        let plan = session.plan(&experiments, Some(&store))?;
        Some(planned_keys(&plan, &store)?)
    };
    let writable = match Store::open(&session.store) {
        Ok(writable) => Some(writable),
        Err(error) if args.repair => return Err(Failure::input(&error).hint(store_hint(&session.store))),
        Err(error) => {
            ui.note(&format!("where it is interrupted it will begin anew: {error}"));
            None
        }
    };
    let interrupt = Arc::new(AtomicBool::new(false));
    for signal in [SIGINT, SIGTERM] {
        // The second one ends the process at once.
        let deaf = |error: std::io::Error| Failure::failed(format!("cannot listen for signals: {error}"));
        signal_hook::flag::register_conditional_shutdown(signal, 130, Arc::clone(&interrupt)).map_err(deaf)?;
        signal_hook::flag::register(signal, Arc::clone(&interrupt)).map_err(deaf)?;
    }
    let verification = Verification {
        keys: keys.as_deref(),
        goes_on: writable.is_some(),
        is_fresh: args.fresh,
        interrupt: Some(&interrupt),
    };
    let mut progress = ByteProgress::new(ui, "hashing");
    let hashed = writable.as_ref().unwrap_or(&store);
    let report = hashed.verify_in_pieces(&verification, &mut |done, total| progress.tell(done, total));
    progress.end();
    let report = report.map_err(|error| Failure::stage(&error))?;
    let repaired =
        if args.repair { hashed.repair(&report).map_err(|error| Failure::stage(&error))? } else { Repaired::default() };
    if ui.is_json() {
        let damages = |list: &[crate::pipeline::store::Damage]| {
            list.iter().map(|damage| json!({"key": damage.key, "what": damage.what})).collect::<Vec<_>>()
        };
        ui.json_pretty(&json!({
            "results": report.manifests,
            "objects": report.objects,
            "bytes": report.bytes,
            "damaged": damages(&report.damaged),
            "missing": damages(&report.missing),
            "orphans": report.orphans,
            "resumed": report.resumed,
            "interrupted": report.interrupted,
            "repaired": repaired.aside,
            "busy": repaired.busy,
        }))?;
    } else {
        for damage in &report.damaged {
            ui.error(&format!("damaged {}: {}", damage.key.short(), damage.what));
        }
        for damage in &report.missing {
            ui.error(&format!("missing {}: {}", damage.key.short(), damage.what));
        }
        ui.data(&text(&report))?;
    }
    if report.interrupted {
        ui.hint("run the same command to go on where it stopped");
        return Err(Failure::silent(130));
    }
    if report.is_sound() {
        return Ok(());
    }
    if args.repair {
        let aside = render::plural(repaired.aside, "result");
        ui.note(&format!("{aside} put aside; the next run makes what it needs again"));
        return if repaired.busy == 0 { Ok(()) } else { Err(busy(repaired.busy)) };
    }
    Err(Failure::failed(format!(
        "{} not as stored",
        render::plural(report.damaged.len() + report.missing.len(), "result")
    ))
    .hint("`--repair` puts them aside, so that the next run makes them again"))
}

fn busy(count: usize) -> Failure {
    let text = format!("{} not repaired: other processes work on their keys", render::plural(count, "damaged result"));
    Failure::failed(text).hint("run it again when they have ended")
}

/// The keys of the plan, also below a damaged input, where only the last run knows them.
fn planned_keys(plan: &Plan, store: &Store) -> Result<Vec<Digest>, Failure> {
    let failed = |error: crate::pipeline::store::StoreError| Failure::stage(&error);
    let mut keys = BTreeSet::new();
    for node in &plan.nodes {
        if let Some(key) = &node.key {
            keys.insert(key.clone());
        }
        for name in &node.names {
            let recorded = store.recorded(&name.experiment, &name.trial, &name.stage).map_err(failed)?;
            keys.extend(recorded.filter(|record| record.recipe == node.recipe).map(|record| record.key));
        }
    }
    Ok(keys.into_iter().collect())
}

fn text(report: &VerifyReport) -> String {
    let mut parts = vec![
        format!(
            "{} in {}, {}",
            render::plural(report.manifests, "result"),
            render::plural(report.objects, "object"),
            render::bytes(report.bytes as f64)
        ),
        format!("{} damaged", report.damaged.len()),
        format!("{} missing", report.missing.len()),
    ];
    if report.resumed > 0 {
        parts.push(format!("{} hashed before the interruption", render::plural(report.resumed, "object")));
    }
    if !report.orphans.is_empty() {
        parts.push(format!("{} of no result", render::plural(report.orphans.len(), "object")));
    }
    parts.join(", ")
}
