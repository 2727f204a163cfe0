//! `pipe status`: the runs that are under way, as their own terminals show them.

use std::path::Path;
use std::time::Duration;

use indicatif::{ProgressBar, ProgressStyle};
use serde::Serialize;

use crate::cli::failure::Failure;
use crate::cli::progress::screen::{self, Form};
use crate::cli::progress::snapshot::{Snapshot, Standing};
use crate::cli::{Session, progress, render};
use crate::pipeline::store::Store;

/// How often it looks.
const LOOK: Duration = Duration::from_millis(500);

/// Columns where there is no terminal.
const COLUMNS: usize = 120;

/// Lines where there is no terminal.
const LINES: usize = 60;

/// Show the runs that are under way: what runs, what waits for what, how fast, how long still
///
/// In a terminal it follows them until they end; Ctrl-C leaves them alone. Where nothing runs it shows how the last run ended. A
/// run that was killed is shown as such.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Only the runs of these experiments, by name or by file [default: all runs of the store]
    #[arg(value_name = "FILES|EXPERIMENT")]
    of: Vec<String>,
    /// Show once how they stand, and end; so it is where there is no terminal
    #[arg(long)]
    once: bool,
}

/// A run and how it stands.
#[derive(Serialize)]
struct Seen {
    standing: Standing,
    #[serde(flatten)]
    run: Snapshot,
}

/// With `--json`, an array of runs.
pub fn run(args: &Args, session: &Session) -> Result<(), Failure> {
    let ui = &session.ui;
    let store = session.existing_store()?;
    let seen = match &store {
        Some(store) => look(&args.of, store)?,
        None => Vec::new(),
    };
    if ui.is_json() {
        return ui.json_pretty(&seen);
    }
    let Some(store) = store.filter(|_| !seen.is_empty()) else {
        return ui.data(&format!("nothing runs in the store `{}`", session.store.display()));
    };
    let is_followed = !args.once && !ui.is_quiet() && ui.draws_bars() && console::Term::stdout().is_term();
    let seen = if is_followed { follow(&args.of, session, &store)? } else { seen };
    let width = ui.output_width().map_or(COLUMNS, usize::from);
    let form = Form { width, height: LINES, color: ui.output_color() };
    ui.data(&picture(&seen, form).join("\n"))
}

/// Draws the runs until none of them is under way; gives how they ended.
fn follow(of: &[String], session: &Session, store: &Store) -> Result<Vec<Seen>, Failure> {
    let bar = session.ui.bars().add(ProgressBar::no_length());
    bar.set_style(ProgressStyle::with_template("{msg}").expect("the template is well formed"));
    let mut followed: Vec<(u32, String)> = Vec::new();
    let seen = loop {
        let mut seen = look(of, store)?;
        for one in seen.iter().filter(|one| one.standing == Standing::Running) {
            let run = (one.run.process, one.run.host.clone());
            if !followed.contains(&run) {
                followed.push(run);
            }
        }
        if !seen.iter().any(|one| one.standing == Standing::Running) {
            // Those that it has followed, and where there were none, the last.
            if !followed.is_empty() {
                seen = all(of, store)?;
                seen.retain(|one| {
                    followed.iter().any(|(process, host)| (*process, host) == (one.run.process, &one.run.host))
                });
            }
            break seen;
        }
        let (rows, columns) = console::Term::stderr().size();
        let height = usize::from(rows).saturating_sub(1);
        let form = Form { width: usize::from(columns), height, color: session.ui.error_color() };
        bar.set_message(picture(&seen, form).join("\n"));
        bar.tick();
        std::thread::sleep(LOOK);
    };
    bar.finish_and_clear();
    Ok(seen)
}

/// Every run one below the other, in a share of the lines each; those for which there is no room are counted.
fn picture(seen: &[Seen], form: Form) -> Vec<String> {
    const LEAST: usize = 4;
    let fits = seen.len().min((form.height / (LEAST + 1)).max(1));
    let each = (form.height / fits.max(1)).saturating_sub(usize::from(fits > 1)).max(1);
    let now = progress::now();
    let mut lines = Vec::new();
    for one in &seen[..fits] {
        if !lines.is_empty() {
            lines.push(String::new());
        }
        lines.extend(screen::whole(&one.run, one.standing, now, Form { height: each, ..form }));
    }
    if seen.len() > fits {
        lines.push(format!("and {}", render::plural(seen.len() - fits, "run")));
    }
    lines
}

/// Every run that the store remembers of the experiments that are asked for; those that began last stand first.
fn all(of: &[String], store: &Store) -> Result<Vec<Seen>, Failure> {
    let wanted: Vec<&str> = of.iter().map(|one| experiment(one)).collect();
    let is_wanted = |run: &Snapshot| {
        wanted.is_empty() || run.experiments.iter().any(|experiment| wanted.contains(&experiment.as_str()))
    };
    let host = rustix::system::uname().nodename().to_string_lossy().into_owned();
    let published = store.live_runs().map_err(|error| Failure::stage(&error))?;
    let read = published.iter().filter_map(|one| Snapshot::read(one, &host));
    let wanted = read.filter(|(run, _)| is_wanted(run));
    let mut seen: Vec<Seen> = wanted.map(|(run, standing)| Seen { standing, run }).collect();
    seen.sort_by(|one, other| other.run.begun.total_cmp(&one.run.begun));
    Ok(seen)
}

/// The runs to show: those under way, and of other experiments those that died; where there are none, the last that ended.
fn look(of: &[String], store: &Store) -> Result<Vec<Seen>, Failure> {
    let mut seen = all(of, store)?;
    let last = seen.first().map(|one| (one.run.process, one.run.begun.to_bits()));
    let mut known: Vec<Vec<String>> = Vec::new();
    seen.retain(|one| {
        let is_newest = !known.contains(&one.run.experiments);
        known.push(one.run.experiments.clone());
        one.standing == Standing::Running || is_newest && matches!(one.standing, Standing::Died | Standing::Unknown)
    });
    if seen.is_empty() && last.is_some() {
        seen = all(of, store)?;
        seen.truncate(1);
    }
    // What runs matters more than what is over.
    seen.sort_by_key(|one| one.standing != Standing::Running);
    Ok(seen)
}

/// The experiment of a file, or of its name.
fn experiment(named: &str) -> &str {
    let path = Path::new(named);
    match (path.extension().and_then(|extension| extension.to_str()), path.file_stem().and_then(|stem| stem.to_str())) {
        (Some("toml"), Some(stem)) => stem,
        _ => named,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pipeline::store::LiveRun;

    fn say(live: &LiveRun, begun: f64, experiment: &str, is_over: bool) {
        let host = rustix::system::uname().nodename().to_string_lossy().into_owned();
        let run = Snapshot { host, begun, experiments: vec![experiment.to_owned()], is_over, ..Snapshot::default() };
        live.say(&serde_json::to_vec(&run).unwrap()).unwrap();
    }

    #[test]
    fn what_runs_comes_first_then_what_died_and_else_the_last_that_ended() {
        let folder = tempfile::tempdir().unwrap();
        let store = Store::open(&folder.path().join("store")).unwrap();
        let shown = |of: &[&str]| -> Vec<(String, Standing)> {
            let of: Vec<String> = of.iter().map(|one| (*one).to_owned()).collect();
            look(&of, &store).unwrap().into_iter().map(|one| (one.run.experiments.concat(), one.standing)).collect()
        };
        assert!(shown(&[]).is_empty());
        let ended = store.begin_live().unwrap();
        say(&ended, 1.0, "maze", true);
        drop(ended);
        assert_eq!(shown(&[]), [("maze".to_owned(), Standing::Ended)]);
        let died = store.begin_live().unwrap();
        say(&died, 2.0, "line", false);
        drop(died);
        let runs = store.begin_live().unwrap();
        say(&runs, 3.0, "maze", false);
        assert_eq!(shown(&[]), [("maze".to_owned(), Standing::Running), ("line".to_owned(), Standing::Died)]);
        assert_eq!(shown(&["experiments/line.toml"]), [("line".to_owned(), Standing::Died)]);
        assert_eq!(shown(&["maze"]), [("maze".to_owned(), Standing::Running)]);
        // A run of the same experiment takes the place of the one that died.
        let again = store.begin_live().unwrap();
        say(&again, 4.0, "line", true);
        assert_eq!(shown(&["line"]), [("line".to_owned(), Standing::Ended)]);
        assert!(shown(&["other"]).is_empty());
    }
}
