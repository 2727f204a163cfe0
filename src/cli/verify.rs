//! `pipe verify`: reads every byte of the store again.

use std::collections::BTreeSet;
use std::path::PathBuf;
use std::time::Duration;

use indicatif::{ProgressBar, ProgressStyle};
use serde_json::json;

use crate::cli::failure::Failure;
use crate::cli::pace::Pace;
use crate::cli::{Session, render};
use crate::pipeline::plan::Plan;
use crate::pipeline::store::{Digest, Lookup, Store, VerifyReport};

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
        Some(stored_keys(&plan, &store)?)
    };
    let report = hash(session, &store, keys.as_deref())?;
    let repaired = if args.repair { store.repair(&report).map_err(|error| Failure::stage(&error))? } else { 0 };
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
            "repaired": repaired,
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
    if report.is_sound() {
        return Ok(());
    }
    if args.repair {
        ui.note(&format!("{} put aside; the next run makes what it needs again", render::plural(repaired, "result")));
        return Ok(());
    }
    Err(Failure::failed(format!(
        "{} not as stored",
        render::plural(report.damaged.len() + report.missing.len(), "result")
    ))
    .hint("`--repair` puts them aside, so that the next run makes them again"))
}

/// The keys of the plan that have anything in the store, also below a damaged input, where only the last run knows them.
fn stored_keys(plan: &Plan, store: &Store) -> Result<Vec<Digest>, Failure> {
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
    let mut stored = Vec::new();
    for key in keys {
        if !matches!(store.lookup(&key).map_err(failed)?, Lookup::Miss) {
            stored.push(key);
        }
    }
    Ok(stored)
}

fn hash(session: &Session, store: &Store, keys: Option<&[Digest]>) -> Result<VerifyReport, Failure> {
    let ui = &session.ui;
    let bar = ui.bars().add(ProgressBar::no_length());
    bar.set_style(ProgressStyle::with_template("{prefix} {bar:20} {wide_msg}").expect("the template is well formed"));
    bar.set_prefix("hashing");
    let mut pace = Pace::new();
    let begun = std::time::Instant::now();
    let mut told = Duration::ZERO;
    let report = store.verify(keys, &mut |done, total| {
        let now = begun.elapsed();
        pace.reach(now, done);
        let rate = pace.rate().map(|rate| format!(", {}/s", render::bytes(rate))).unwrap_or_default();
        let line = format!("{} of {}{rate}", render::bytes(done as f64), render::bytes(total as f64));
        if ui.draws_bars() {
            bar.set_length(total);
            bar.set_position(done);
            bar.set_message(line);
        } else if now > told + Duration::from_secs(10) {
            told = now;
            ui.note(&format!("hashed {line}"));
        }
    });
    bar.finish_and_clear();
    report.map_err(|error| Failure::stage(&error))
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
    if !report.orphans.is_empty() {
        parts.push(format!("{} of no result", render::plural(report.orphans.len(), "object")));
    }
    parts.join(", ")
}
