//! `pipe logs`: what a stage says, while it runs and after.

use std::collections::BTreeSet;
use std::fs::File;
use std::io::{ErrorKind, Read as _, Seek as _, SeekFrom};
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde_json::json;

use crate::cli::failure::Failure;
use crate::cli::progress::snapshot::{Snapshot, Standing};
use crate::cli::{Session, show};
use crate::pipeline::store::{Digest, Store};

/// How often it looks for more.
const LOOK: Duration = Duration::from_millis(200);

/// Print what a stage has said, and follow what it says
///
/// It reads the log of the stage's last attempt: of one that runs now, of one that failed, or of the result that there is.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// `EXPERIMENT[/TRIAL]/STAGE` of the last run, or `FILE.toml[/TRIAL]/STAGE` as the file is now
    #[arg(value_name = "STAGE")]
    target: String,
    /// Go on while the stage runs
    #[arg(long, short)]
    follow: bool,
    /// Only the last N lines
    #[arg(long, short = 'n', value_name = "N")]
    lines: Option<usize>,
    /// Lay a value over the file, as for `pipe run`
    #[arg(long = "set", value_name = "PATH=VALUE")]
    sets: Vec<String>,
}

/// With `--json`, an object a line: `{line}`.
pub fn run(args: &Args, session: &Session) -> Result<(), Failure> {
    let Some(store) = session.existing_store()? else {
        return Err(Failure::wrong(format!("there is no store at `{}`", session.store.display()))
            .hint("`pipe run` makes it; `--store DIR` or PIPE_STORE names another"));
    };
    let log = find(args, session, &store)?;
    let unreadable = |error: std::io::Error| Failure::failed(format!("cannot read `{}`: {error}", log.path.display()));
    let mut tail = Tail::new(&log.path);
    let mut text = tail.read().map_err(unreadable)?;
    if let Some(lines) = args.lines {
        text = last_lines(&text, lines).to_owned();
    }
    let mut lines = Lines::default();
    print(session, &lines.take(&text))?;
    while args.follow && is_running(&log, &store)? {
        std::thread::sleep(LOOK);
        print(session, &lines.take(&tail.read().map_err(unreadable)?))?;
    }
    // What it said between the last look and its end, and a line that it never ended.
    let rest = if args.follow { tail.read().map_err(unreadable)? } else { String::new() };
    print(session, &lines.take(&rest))?;
    print(session, &lines.end())?;
    if tail.is_empty() && args.lines != Some(0) {
        session.ui.note(&format!("`{}` has said nothing", args.target));
    }
    Ok(())
}

fn print(session: &Session, lines: &[String]) -> Result<(), Failure> {
    if lines.is_empty() {
        return Ok(());
    }
    if session.ui.is_json() {
        return lines.iter().try_for_each(|line| session.ui.json_line(&json!({ "line": line })));
    }
    session.ui.data(&lines.join("\n"))
}

/// A log, and whose it is.
struct Log {
    path: PathBuf,
    key: Option<Digest>,
}

/// The log that a name means: of a stage that runs, else of one that failed, else of the last result.
fn find(args: &Args, session: &Session, store: &Store) -> Result<Log, Failure> {
    let target = &args.target;
    if !target.contains(".toml/")
        && let Some(log) = under_way(target, store)?
    {
        return Ok(log);
    }
    let key = show::key(target, &args.sets, session, store)?;
    Ok(Log { path: store.logs(&key).join("log.txt"), key: Some(key) })
}

/// The log of a stage in a run that goes on, or that has failed in the last one of its experiment.
fn under_way(target: &str, store: &Store) -> Result<Option<Log>, Failure> {
    let host = rustix::system::uname().nodename().to_string_lossy().into_owned();
    let published = store.live_runs().map_err(|error| Failure::stage(&error))?;
    let runs: Vec<(Snapshot, Standing)> = published.iter().filter_map(|one| Snapshot::read(one, &host)).collect();
    let running = runs.iter().filter(|(_, standing)| *standing == Standing::Running).flat_map(|(run, _)| &run.running);
    let mut found: Vec<(String, Digest)> = Vec::new();
    for stage in running {
        let name = stage.names.iter().find(|name| means(target, name));
        found.extend(name.map(|name| (name.clone(), stage.key.clone())));
    }
    let keys: BTreeSet<&Digest> = found.iter().map(|(_, key)| key).collect();
    if keys.len() > 1 {
        let names: Vec<String> = found.iter().take(8).map(|(name, _)| format!("`{name}`")).collect();
        return Err(Failure::wrong(format!("several stages that run are called `{target}`"))
            .hint(format!("name the trial: {}", names.join(", "))));
    }
    if let Some((_, key)) = found.into_iter().next() {
        return Ok(Some(Log { path: store.logs(&key).join("log.txt"), key: Some(key) }));
    }
    let experiment = target.split('/').next().unwrap_or_default();
    let last = runs.iter().find(|(run, _)| run.experiments.iter().any(|name| name == experiment));
    let failures = last.into_iter().flat_map(|(run, _)| &run.failures);
    let failed = failures.filter(|failure| means(target, &failure.name)).find(|failure| !failure.log.is_empty());
    Ok(failed.map(|failure| Log { path: PathBuf::from(&failure.log), key: None }))
}

/// Whether `EXPERIMENT[/TRIAL]/STAGE` names what is called `EXPERIMENT/TRIAL/STAGE`.
fn means(target: &str, name: &str) -> bool {
    if target == name {
        return true;
    }
    // A trial's values may hold slashes; an experiment's and a stage's name do not.
    let ends = |text: &str| {
        let (experiment, rest) = text.split_once('/')?;
        Some((experiment.to_owned(), rest.rsplit_once('/').map_or(rest, |(_, stage)| stage).to_owned()))
    };
    target.matches('/').count() == 1 && ends(target).is_some_and(|wanted| ends(name) == Some(wanted))
}

/// Whether somebody works on the stage.
fn is_running(log: &Log, store: &Store) -> Result<bool, Failure> {
    match &log.key {
        Some(key) => store.is_locked(key).map_err(|error| Failure::stage(&error)),
        None => Ok(false),
    }
}

/// A file that grows.
struct Tail {
    path: PathBuf,
    at: u64,
}

impl Tail {
    fn new(path: &Path) -> Self {
        Self { path: path.to_owned(), at: 0 }
    }

    /// Whether nothing was ever there.
    fn is_empty(&self) -> bool {
        self.at == 0
    }

    /// What has come since the last look; a file that was begun anew is read from its beginning.
    fn read(&mut self) -> std::io::Result<String> {
        let mut file = match File::open(&self.path) {
            Ok(file) => file,
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(String::new()),
            Err(error) => return Err(error),
        };
        if file.metadata()?.len() < self.at {
            self.at = 0;
        }
        file.seek(SeekFrom::Start(self.at))?;
        let mut bytes = Vec::new();
        file.read_to_end(&mut bytes)?;
        // A character of several bytes may be there in part: the rest comes with the next look.
        let whole = match std::str::from_utf8(&bytes) {
            Err(error) if error.error_len().is_none() => error.valid_up_to(),
            _ => bytes.len(),
        };
        self.at += whole as u64;
        Ok(String::from_utf8_lossy(&bytes[..whole]).into_owned())
    }
}

/// Text as it comes, line by line.
#[derive(Default)]
struct Lines(String);

impl Lines {
    /// The lines that have ended.
    fn take(&mut self, text: &str) -> Vec<String> {
        self.0.push_str(text);
        let Some(end) = self.0.rfind('\n') else { return Vec::new() };
        let rest = self.0.split_off(end + 1);
        let whole = std::mem::replace(&mut self.0, rest);
        whole.lines().map(str::to_owned).collect()
    }

    /// A last line that has not ended.
    fn end(&mut self) -> Vec<String> {
        let rest = std::mem::take(&mut self.0);
        if rest.is_empty() { Vec::new() } else { vec![rest] }
    }
}

/// The last so many lines.
fn last_lines(text: &str, count: usize) -> &str {
    let ends: Vec<usize> = text.match_indices('\n').map(|(at, _)| at + 1).collect();
    let is_ended = text.ends_with('\n') || text.is_empty();
    let lines = ends.len() + usize::from(!is_ended);
    let skipped = lines.saturating_sub(count);
    if skipped == 0 { text } else { ends.get(skipped - 1).map_or("", |at| &text[*at..]) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write as _;

    #[test]
    fn the_last_lines_are_those_at_the_end() {
        let text = "a\nb\nc\n";
        assert_eq!([0, 1, 2, 3, 9].map(|count| last_lines(text, count)), ["", "c\n", "b\nc\n", text, text]);
        assert_eq!(last_lines("a\nb", 1), "b");
        assert_eq!(last_lines("", 3), "");
    }

    #[test]
    fn a_log_is_followed_over_torn_lines_and_characters_and_over_a_new_beginning() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("log.txt");
        let mut tail = Tail::new(&path);
        let mut lines = Lines::default();
        assert!(lines.take(&tail.read().unwrap()).is_empty() && tail.is_empty());
        let mut file = File::create(&path).unwrap();
        file.write_all("one\ntw".as_bytes()).unwrap();
        assert_eq!(lines.take(&tail.read().unwrap()), ["one"]);
        file.write_all(&"ö\n".as_bytes()[..1]).unwrap();
        assert!(lines.take(&tail.read().unwrap()).is_empty());
        file.write_all(&"ö\n".as_bytes()[1..]).unwrap();
        assert_eq!(lines.take(&tail.read().unwrap()), ["twö"]);
        std::fs::write(&path, "new").unwrap();
        assert!(lines.take(&tail.read().unwrap()).is_empty());
        assert_eq!(lines.end(), ["new"]);
    }

    #[test]
    fn a_name_may_leave_the_trial_out() {
        for wanted in ["maze/sft", "maze/seed=1,from=a/b/sft"] {
            assert!(means(wanted, "maze/seed=1,from=a/b/sft"), "{wanted}");
        }
        for wanted in ["maze/grpo", "line/sft", "sft", "maze/seed=2/sft"] {
            assert!(!means(wanted, "maze/seed=1,from=a/b/sft"), "{wanted}");
        }
        assert!(means("maze/sft", "maze/sft"));
    }
}
