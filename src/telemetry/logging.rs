//! Where `tracing` events go: to the terminal of the driver, to a file for a stage.
//!
//! `PIPE_LOG` filters both (`debug`, `pipe=trace`, ..., as tracing-subscriber's `EnvFilter` reads it). It never changes
//! what a stage computes.

use std::fs::File;
use std::io::IsTerminal as _;
use std::path::Path;
use std::sync::Mutex;

use anyhow::Context as _;
use tracing::Subscriber;
use tracing::subscriber::DefaultGuard;
use tracing_indicatif::IndicatifLayer;
use tracing_indicatif::filter::IndicatifFilter;
use tracing_subscriber::layer::SubscriberExt as _;
use tracing_subscriber::util::SubscriberInitExt as _;
use tracing_subscriber::{EnvFilter, Layer as _};

/// The environment variable that filters what is logged.
pub const FILTER_VARIABLE: &str = "PIPE_LOG";

/// Logs of the driver to stderr, for the whole process; warnings and worse unless `PIPE_LOG` says otherwise.
///
/// With `bars`, a span that carries `indicatif.pb_show` is a live progress bar and log lines are printed above the bars.
/// Without, as when stderr is no terminal, lines are all there is.
pub fn to_terminal(bars: bool) -> anyhow::Result<()> {
    let text = tracing_subscriber::fmt::layer().without_time().with_target(false);
    let text = text.with_ansi(std::io::stderr().is_terminal());
    let registry = tracing_subscriber::registry();
    if bars {
        let bars = IndicatifLayer::new();
        let text = text.with_writer(bars.get_stderr_writer()).with_filter(filter("warn")?);
        registry.with(text).with(bars.with_filter(IndicatifFilter::new(false))).try_init()
    } else {
        registry.with(text.with_writer(std::io::stderr).with_filter(filter("warn")?)).try_init()
    }
    .context("setting up logs to the terminal")
}

/// Logs of this whole process to the end of the file at `path`: what a worker calls for its one stage.
pub fn to_file(path: &Path) -> anyhow::Result<()> {
    file_subscriber(path)?.try_init().with_context(|| format!("setting up logs to `{}`", path.display()))
}

/// Logs of this thread to the end of the file at `path` while the guard lives: for a stage in the driver's process.
pub fn thread_to_file(path: &Path) -> anyhow::Result<DefaultGuard> {
    Ok(tracing::subscriber::set_default(file_subscriber(path)?))
}

fn file_subscriber(path: &Path) -> anyhow::Result<impl Subscriber + Send + Sync + 'static> {
    if let Some(folder) = path.parent() {
        std::fs::create_dir_all(folder).with_context(|| format!("creating the folder `{}`", folder.display()))?;
    }
    let file = File::options().append(true).create(true).open(path);
    let file = file.with_context(|| format!("opening the log `{}`", path.display()))?;
    let text = tracing_subscriber::fmt::layer().with_ansi(false).with_writer(Mutex::new(file));
    Ok(tracing_subscriber::registry().with(text.with_filter(filter("info")?)))
}

fn filter(default: &str) -> anyhow::Result<EnvFilter> {
    match std::env::var(FILTER_VARIABLE) {
        Ok(directives) if !directives.is_empty() => EnvFilter::try_new(&directives)
            .with_context(|| format!("`{FILTER_VARIABLE}={directives}` is no filter; try `debug` or `pipe=debug`")),
        _ => Ok(EnvFilter::new(default)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stage_logs_to_its_own_file_and_appends() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("logs/stage.log");
        for attempt in 1..=2 {
            let guard = thread_to_file(&path).unwrap();
            tracing::info!(attempt, "begins");
            tracing::debug!("not asked for");
            drop(guard);
            tracing::info!("elsewhere");
        }
        let text = std::fs::read_to_string(&path).unwrap();
        assert_eq!(text.lines().count(), 2, "{text}");
        assert!(text.contains("attempt=1") && text.contains("attempt=2"), "{text}");
    }
}
