//! `pipe import`: what `pipe bundle` has packed, in another place.

use std::path::PathBuf;

use crate::cli::bundle::{ByteProgress, failure};
use crate::cli::failure::Failure;
use crate::cli::{Session, render, store_hint};
use crate::pipeline::bundle::{self, Waits};
use crate::pipeline::store::Store;

/// Unpack a bundle: its files into a folder, its results into the store
#[derive(Debug, clap::Args)]
pub struct Args {
    /// What `pipe bundle` has written
    #[arg(value_name = "BUNDLE")]
    bundle: PathBuf,
    /// The folder for its files; without `--store` and PIPE_STORE, its store is `artifacts` there
    #[arg(long, value_name = "DIR", default_value = ".", hide_default_value = true)]
    into: PathBuf,
}

/// With `--json`, what was imported.
pub fn run(args: &Args, session: &Session) -> Result<(), Failure> {
    let ui = &session.ui;
    let failed = |path: &std::path::Path, error: std::io::Error| {
        Failure::wrong(format!("cannot find `{}`: {error}", path.display()))
    };
    // A wrong name should not leave a store behind.
    std::fs::metadata(&args.bundle).map_err(|error| failed(&args.bundle, error))?;
    let into = std::path::absolute(&args.into).map_err(|error| failed(&args.into, error))?;
    let root = if session.store_is_named { session.store.clone() } else { into.join(&session.store) };
    bundle::check(&args.bundle).map_err(|error| failure(&error, session))?;
    let store = Store::open(&root).map_err(|error| Failure::input(&error).hint(store_hint(&root)))?;
    let mut progress = ByteProgress::new(ui, "importing");
    let report =
        bundle::import(&args.bundle, &into, &store, &mut |done, total| progress.tell(done, total), &mut |waits| {
            ui.note(&waiting(&waits));
        });
    progress.end();
    let report = report.map_err(|error| failure(&error, session))?;
    if ui.is_json() {
        return ui.json_pretty(&report);
    }
    let known =
        if report.known > 0 { format!(" ({} were there)", render::count(report.known as u64)) } else { String::new() };
    ui.note(&format!(
        "imported {}{known} and {} into `{}`",
        render::plural(report.results, "result"),
        render::plural(report.files, "file"),
        into.display()
    ));
    for experiment in &report.experiments {
        ui.note(&format!("pipe run {} --store {}", experiment.display(), root.display()));
    }
    Ok(())
}

/// Whom an import waits for.
fn waiting(waits: &Waits) -> String {
    match waits {
        Waits::Import => "waits for another import of this bundle".to_owned(),
        Waits::Result(key, None) => format!("waits for whoever works on the result `{}`", key.short()),
        Waits::Result(key, Some(owner)) => {
            format!(
                "waits for process {} on {}, which works on the result `{}`",
                owner.process,
                owner.host,
                key.short()
            )
        }
    }
}
