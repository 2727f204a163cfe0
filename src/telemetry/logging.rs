//! Where `tracing` events go: to the terminal of the driver, to a file for a stage.
//!
//! `PIPE_LOG` filters both (`debug`, `pipe=trace`, ..., as tracing-subscriber's `EnvFilter` reads it). It never changes
//! what a stage computes.

use std::fs::File;
use std::path::Path;
use std::sync::Mutex;

use anyhow::Context as _;
use tracing::Subscriber;
use tracing::subscriber::DefaultGuard;
use tracing_subscriber::fmt::MakeWriter;
use tracing_subscriber::layer::SubscriberExt as _;
use tracing_subscriber::util::SubscriberInitExt as _;
use tracing_subscriber::{EnvFilter, Layer as _};

/// The environment variable that filters what is logged.
pub const FILTER_VARIABLE: &str = "PIPE_LOG";

/// Logs of the driver to stderr, for the whole process; warnings and worse unless `PIPE_LOG` says otherwise.
///
/// `writer` is asked for a writer a line: whoever draws progress bars clears them around what it writes.
pub fn to_terminal<W>(writer: W) -> anyhow::Result<()>
where
    W: for<'a> MakeWriter<'a> + Send + Sync + 'static,
{
    let text = tracing_subscriber::fmt::layer().without_time().with_target(false).with_ansi(false);
    let text = text.with_writer(writer).with_filter(filter("warn")?);
    tracing_subscriber::registry().with(text).try_init().context("setting up logs to the terminal")
}

/// Logs of this thread to the end of the file at `path` while the guard lives: what a running stage says.
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
