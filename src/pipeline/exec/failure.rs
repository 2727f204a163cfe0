//! How an attempt that has no result is written down: in its log, for `pipe show`, and what it had written for people.

use std::any::Any;
use std::io::ErrorKind;
use std::path::Path;

use crate::pipeline::exec::attempt::AttemptError;
use crate::pipeline::store::{Attempts, KeyLock, Prepared, Store, StoreError};

/// Why a stage that has run has no result, written down where people look for it.
pub(super) fn uncommitted(store: &Store, lock: &KeyLock, prepared: &Prepared, error: StoreError) -> AttemptError {
    let text = error.to_string();
    note_failure(store, lock, prepared.manifest().seconds, &text);
    // Somebody found an output damaged and put it aside.
    if error.io().is_some_and(|cause| cause.kind() == ErrorKind::NotFound) {
        return AttemptError::Lost(text);
    }
    AttemptError::Store(error)
}

/// Writes down why an attempt at the lock's key, which took so many seconds, has no result.
pub(super) fn note_failure(store: &Store, lock: &KeyLock, seconds: f64, problem: &str) {
    let attempts = store.attempts(lock.key()).ok().flatten().unwrap_or_default();
    let ended = Attempts { seconds, error: Some(first_line(problem)), owner: None, ..attempts };
    let noted = store.append_log(lock.key(), &format!("failed: {problem}"));
    if let Err(error) = noted.and_then(|()| store.save_attempts(lock.key(), &ended)) {
        tracing::warn!(%error, "the reason of a failure is not written down");
    }
}

/// What a list shows of an error.
fn first_line(problem: &str) -> String {
    problem.lines().next().unwrap_or_default().trim_end_matches(':').to_owned()
}

/// Keeps what a failed attempt left, and its reason at the end of its log.
pub(super) fn fail(store: &Store, lock: &KeyLock, out: &Path, ended: &Attempts, error: anyhow::Error) -> anyhow::Error {
    let ended = Attempts { error: Some(first_line(&format!("{error:#}"))), ..ended.clone() };
    let kept = store.save_attempts(lock.key(), &ended).and_then(|()| store.keep_failed(lock, out));
    let logged = store.append_log(lock.key(), &format!("failed: {error:#}"));
    // The stage's own error is what the user must see; that its traces could not be kept is the smaller news.
    if let Err(second) = kept {
        tracing::warn!(error = %second, "the files of a failed attempt are not kept");
    }
    if let Err(second) = logged {
        tracing::warn!(error = %second, "the reason of a failure is not in its log");
    }
    error
}

/// What a panic said.
pub(super) fn panic_text(panic: &(dyn Any + Send)) -> &str {
    panic
        .downcast_ref::<&str>()
        .copied()
        .or_else(|| panic.downcast_ref::<String>().map(String::as_str))
        .unwrap_or("no message")
}
