//! The committer: one thread that makes results durable, so that no stage waits for a disk.
//!
//! Whatever has ended while it was busy is committed together the next time. It holds the keys' locks meanwhile.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread::Scope;
use std::time::{Duration, Instant};

use crate::pipeline::exec::attempt::AttemptError;
use crate::pipeline::exec::failure::{note_failure, uncommitted};
use crate::pipeline::exec::local::{Ending, News, ToDriver, tell};
use crate::pipeline::store::{KeyLock, Prepared, Store};

/// How many results are committed together at most: those that wait for the first should not wait for long.
const BATCH: usize = 256;

/// For how long a result waits for others where one follows upon the other.
const GATHER: Duration = Duration::from_millis(5);

/// A node that has ended well.
pub(super) struct Finished {
    /// The node.
    pub(super) node: usize,
    /// The lock of its key.
    pub(super) lock: KeyLock,
    /// Its result.
    pub(super) prepared: Box<Prepared>,
}

/// The way to the committer. It ends when the last of these is dropped.
#[derive(Clone)]
pub(super) struct ToCommitter {
    committer: Sender<Finished>,
    driver: ToDriver,
}

impl ToCommitter {
    /// Has a result made durable; the driver hears what came of it.
    pub(super) fn hand_over(&self, finished: Finished) {
        if let Err(lost) = self.committer.send(finished) {
            let problem = "the thread that makes results durable has died".to_owned();
            tell(&self.driver, lost.0.node, News::Ended(Ending::failed(problem)));
        }
    }
}

/// Starts the committer.
pub(super) fn start<'scope>(
    scope: &'scope Scope<'scope, '_>,
    store: &'scope Store,
    driver: &ToDriver,
) -> std::io::Result<ToCommitter> {
    let (sender, receiver) = channel();
    let ours = driver.clone();
    std::thread::Builder::new().name("committer".to_owned()).spawn_scoped(scope, move || {
        let mut ended = None;
        while let Some(batch) = next(&receiver, ended) {
            commit(store, batch, &ours);
            ended = Some(Instant::now());
        }
    })?;
    Ok(ToCommitter { committer: sender, driver: driver.clone() })
}

/// Waits for a result and takes what else is there; `None` where nobody is left to send any. Results that follow upon each
/// other, as seen by when the last batch `ended`, gather for a while: a sync holds up whoever writes to the disk meanwhile.
fn next(receiver: &Receiver<Finished>, ended: Option<Instant>) -> Option<Vec<Finished>> {
    let mut batch = vec![receiver.recv().ok()?];
    if ended.is_some_and(|ended| ended.elapsed() < 4 * GATHER) {
        let until = Instant::now() + GATHER;
        while batch.len() < BATCH
            && let Ok(finished) = receiver.recv_timeout(until.saturating_duration_since(Instant::now()))
        {
            batch.push(finished);
        }
    }
    let room = BATCH - batch.len();
    batch.extend(receiver.try_iter().take(room));
    Some(batch)
}

fn commit(store: &Store, batch: Vec<Finished>, driver: &ToDriver) {
    let references: Vec<_> = batch.iter().map(|finished| (&finished.lock, &*finished.prepared)).collect();
    // Whatever happens here, the driver waits for an answer.
    let committed = catch_unwind(AssertUnwindSafe(|| store.commit_all(&references)));
    let mut committed = committed.unwrap_or_default().into_iter();
    for Finished { node, lock, prepared } in batch {
        let ending = match committed.next() {
            Some(Ok(())) => Ending::Done { manifest: Some(Box::new(prepared.manifest().clone())), ran: true },
            Some(Err(error)) => match uncommitted(store, &lock, &prepared, error) {
                AttemptError::Lost(what) => Ending::Lost { what },
                error => Ending::failed(error.to_string()),
            },
            None => {
                let problem = "the thread that makes results durable panicked";
                note_failure(store, &lock, prepared.manifest().seconds, problem);
                Ending::failed(problem.to_owned())
            }
        };
        let is_done = matches!(ending, Ending::Done { .. });
        tell(driver, node, News::Ended(ending));
        if is_done {
            store.drop_work(&lock);
        }
    }
}
