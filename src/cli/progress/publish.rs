//! Tells other terminals how a run stands: `pipe status` reads what is written here.
//!
//! A thread of its own writes the newest state at most twice a second, whatever happens meanwhile, and says now and then
//! that it is there. It begins with the first stage that runs: where all is cached there is nothing to look at.

use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crate::cli::progress::board::Board;
use crate::pipeline::exec::event::Outcome;
use crate::pipeline::store::{LiveRun, Store};

/// Between two writes.
const BETWEEN: Duration = Duration::from_millis(500);

/// Where nothing happens, it is said so often that the run is there.
const HEARTBEAT: Duration = Duration::from_secs(10);

/// A board that threads share.
pub(super) type Shared = Arc<Mutex<Board>>;

/// The board, also where a thread that held it has panicked: it is only looked at.
pub(super) fn open(board: &Mutex<Board>) -> MutexGuard<'_, Board> {
    board.lock().unwrap_or_else(PoisonError::into_inner)
}

/// What other terminals see of this process.
#[derive(Default)]
pub struct Publisher {
    common: Arc<Common>,
    thread: Option<JoinHandle<()>>,
    failed: bool,
}

#[derive(Default)]
struct Common {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Default)]
struct State {
    /// The part of the run that is under way.
    board: Option<Shared>,
    is_over: bool,
}

impl Publisher {
    /// Shows a board from now on, in place of one before.
    pub(super) fn show(&mut self, board: &Shared, store: &Store) {
        self.state().board = Some(Arc::clone(board));
        if self.thread.is_some() || self.failed {
            return;
        }
        let common = Arc::clone(&self.common);
        // Nothing rests on being seen.
        let begun = store.begin_live().map_err(anyhow::Error::from).and_then(|live| {
            let publish = move || common.publish(&live);
            Ok(std::thread::Builder::new().name("status".to_owned()).spawn(publish)?)
        });
        match begun {
            Ok(thread) => self.thread = Some(thread),
            Err(error) => {
                self.failed = true;
                tracing::warn!(%error, "`pipe status` cannot show this run");
            }
        }
    }

    /// The run has come to its end.
    pub fn end(&mut self, outcome: Outcome) {
        if let Some(board) = &self.state().board {
            open(board).end(Some(outcome));
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.common.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Publisher {
    fn drop(&mut self) {
        {
            let mut state = self.state();
            if let Some(board) = &state.board {
                open(board).end(None);
            }
            state.is_over = true;
        }
        self.common.changed.notify_all();
        if let Some(thread) = self.thread.take() {
            // A thread that panicked has said so.
            let _ = thread.join();
        }
    }
}

impl Common {
    fn publish(&self, live: &LiveRun) {
        let mut last: Option<(Instant, usize, u64)> = None;
        let mut warned = false;
        loop {
            let (board, is_over) = {
                let state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
                (state.board.clone(), state.is_over)
            };
            if let Some(board) = board {
                let place = Arc::as_ptr(&board) as usize;
                let version = open(&board).version();
                let is_news = last.is_none_or(|(when, which, known)| {
                    (which, known) != (place, version) || when.elapsed() >= HEARTBEAT
                });
                if is_news {
                    let snapshot = open(&board).snapshot();
                    let bytes = serde_json::to_vec(&snapshot).expect("a snapshot is plain data");
                    if let Err(error) = live.say(&bytes)
                        && !std::mem::replace(&mut warned, true)
                    {
                        tracing::warn!(%error, "`pipe status` cannot follow this run");
                    }
                    last = Some((Instant::now(), place, version));
                }
            }
            if is_over {
                return;
            }
            let state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
            if !state.is_over {
                drop(self.changed.wait_timeout(state, BETWEEN));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::progress::snapshot::{Snapshot, Standing};
    use crate::pipeline::fixture::{echo, experiment, trial};
    use crate::pipeline::plan::Plan;
    use crate::pipeline::store::Digest;

    #[test]
    fn another_process_sees_what_runs_and_that_it_is_over() {
        let plan = Plan::new(&[experiment("e", vec![trial("", vec![echo("a", "", &[])])])], None).unwrap();
        let folder = tempfile::tempdir().unwrap();
        let store = Store::open(&folder.path().join("store")).unwrap();
        let board: Shared = Arc::new(Mutex::new(Board::new(&plan, &[true], false)));
        let seen = || {
            let published = store.live_runs().unwrap();
            let host = rustix::system::uname().nodename().to_string_lossy().into_owned();
            published.first().and_then(|one| Snapshot::read(one, &host))
        };
        let mut publisher = Publisher::default();
        open(&board).begin(0, "a".into(), plan.nodes[0].names.as_slice(), "toy", &Digest("k".into()));
        publisher.show(&board, &store);
        let began = Instant::now();
        while seen().is_none_or(|(snapshot, _)| snapshot.running.is_empty()) {
            assert!(began.elapsed() < Duration::from_secs(60), "it is never seen");
            std::thread::sleep(Duration::from_millis(5));
        }
        let (snapshot, standing) = seen().unwrap();
        assert_eq!((standing, snapshot.running[0].names.clone()), (Standing::Running, vec!["e/a".to_owned()]));
        open(&board).made(0, Some(1.0));
        publisher.end(Outcome { run: 1, ..Outcome::default() });
        drop(publisher);
        let (snapshot, standing) = seen().unwrap();
        assert_eq!((standing, snapshot.settled, snapshot.counts.run), (Standing::Ended, 1, 1));
    }
}
