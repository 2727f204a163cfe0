//! A run as people watch it: one screen for all of its stages, or plain lines where there is no terminal.
//!
//! It turns events into lines and into the state that the screen and other terminals show, and knows nothing else of the
//! run. `board` holds where every stage stands, `screen` draws it, `publish` lets other terminals see it.

mod board;
mod left;
pub mod publish;
mod running;
pub mod screen;
pub mod snapshot;
mod words;

use std::collections::BTreeSet;
use std::fmt::Write as _;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant, SystemTime};

use indicatif::{ProgressBar, ProgressState, ProgressStyle};

use crate::cli::progress::board::{Board, Sum};
use crate::cli::progress::left::{Estimate, TimeLeft};
use crate::cli::progress::publish::{Publisher, Shared, open};
use crate::cli::progress::screen::Form;
use crate::cli::progress::snapshot::{FailedStage, Snapshot};
use crate::cli::render;
use crate::cli::ui::{Look, Ui};
use crate::pipeline::exec::event::Event;
use crate::pipeline::plan::{NodeName, Plan};
use crate::pipeline::stage::StageEvent;
use crate::pipeline::store::Store;

/// Without a terminal a running stage says how far it is at most this often.
const PLAIN_INTERVAL: Duration = Duration::from_secs(10);

/// Without a terminal the run as a whole says how far it is at most this often.
const PLAIN_OVERALL: Duration = Duration::from_secs(60);

/// Without a terminal the time left is estimated only in runs that take longer.
const UNSEEN: Duration = Duration::from_secs(5);

/// How often the screen is drawn anew.
const TICK: Duration = Duration::from_millis(200);

/// What was drawn is drawn again for so long, since every line above it has the screen drawn once more.
const KEEP: Duration = Duration::from_millis(50);

/// The display of one run.
pub struct Progress<'a> {
    ui: &'a Ui,
    plan: &'a Plan,
    store: &'a Store,
    publisher: &'a mut Publisher,
    /// Whether names need their experiment to be told apart.
    several: bool,
    /// Whether more follows, of which nothing is known yet.
    tunes: bool,
    board: Shared,
    screen: Option<ProgressBar>,
    time_left: TimeLeft<'a>,
    begun: Instant,
    /// When the run as a whole said something on a plain line.
    told: Instant,
    /// What failed, to be told again at the end.
    failures: Vec<Failed>,
    /// Whether something was told since the last failure.
    went_on: bool,
}

/// What was asked of a run.
pub struct Asked {
    /// By node, whether it shall run if it is missing.
    pub wanted: Vec<bool>,
    /// Nodes that run even where they are cached.
    pub again: BTreeSet<usize>,
    /// Stages at once; 0 is as many as cores.
    pub jobs: usize,
    /// Whether trials are not known yet, because they wait for what this run finds.
    pub tunes: bool,
}

/// A stage that failed.
struct Failed {
    label: String,
    error: String,
    log: String,
}

impl<'a> Progress<'a> {
    /// A display for the run of `plan`, which `publisher` lets others see.
    pub fn new(ui: &'a Ui, plan: &'a Plan, store: &'a Store, publisher: &'a mut Publisher, asked: Asked) -> Self {
        let Asked { wanted, again, jobs, tunes } = asked;
        let first = plan.trials.first().map(|trial| &trial.experiment);
        let several = plan.trials.iter().any(|trial| Some(&trial.experiment) != first);
        Self {
            ui,
            plan,
            store,
            publisher,
            several,
            tunes,
            board: Arc::new(Mutex::new(Board::new(plan, &wanted, tunes))),
            screen: None,
            time_left: TimeLeft::new(plan, store, wanted, again, jobs),
            begun: Instant::now(),
            told: Instant::now(),
            failures: Vec::new(),
            went_on: false,
        }
    }

    /// Shows one event.
    pub fn on(&mut self, event: &Event) {
        match event {
            Event::Started { .. } => {}
            Event::Cached { node, .. } => {
                // It may have begun, and found what another run had made meanwhile.
                open(&self.board).made(*node, None);
                self.time_left.settle(*node);
            }
            Event::Waiting { node, name, owner, reached, .. } => {
                open(&self.board).wait_for(*node);
                self.time_left.stop(*node);
                self.line("waiting", Look::Dim, name, &words::owner(owner.as_ref(), reached.as_ref()));
            }
            Event::Retrying { node, name, error, attempt, attempts, seconds } => {
                self.stop(*node);
                let when = if *seconds >= 1.0 { format!(" in {}", render::duration(*seconds)) } else { String::new() };
                let text = format!("retrying{when}, attempt {attempt} of {attempts}: {error}");
                self.line("failed", Look::Yellow, name, &text);
            }
            Event::Running { node, name, kind, key } => {
                let label = self.label(name);
                open(&self.board).begin(*node, label, &self.plan.nodes[*node].names, kind, key);
                self.time_left.begin(*node, Instant::now());
                self.publisher.show(&self.board, self.store);
                if self.ui.draws_bars() {
                    self.draw();
                } else {
                    self.line("start", Look::Dim, name, "");
                }
            }
            Event::Stage { node, event } => self.stage(*node, event),
            Event::Done { node, name, seconds, metrics, .. } => {
                open(&self.board).made(*node, Some(*seconds));
                let mut text = render::duration(*seconds);
                if !metrics.is_empty() {
                    text.push_str(", ");
                    text.push_str(&words::headline(metrics));
                }
                self.line("done", Look::Green, name, &text);
                self.time_left.learn(*node, *seconds);
                self.time_left.settle(*node);
                self.tell_overall();
            }
            Event::Failed { node, name, error, log } => self.failed(*node, name, error, log),
            Event::Blocked { node, name } => {
                open(&self.board).blocked(*node);
                self.time_left.settle(*node);
                self.line("blocked", Look::Yellow, name, "an input failed");
            }
            Event::Interrupted { node, name } => {
                // Stages that never began are interrupted too; there is nothing to say of them.
                if self.stop(*node) {
                    self.line("stopped", Look::Yellow, name, "the next run takes it up again");
                }
            }
            Event::Warning { text } => self.ui.warn(text),
            Event::Finished(_) => self.clear(),
        }
        // Other terminals want to know how long it takes also where this one shows nothing.
        if !open(&self.board).is_idle() {
            self.estimate();
        }
    }

    /// Tells what came of the stages by their names, where there are so many that nobody has followed each.
    pub fn sum_up(&self) {
        let board = open(&self.board);
        let sums: Vec<&Sum> = board.sums().filter(|sum| sum.run + sum.failed + sum.blocked > 0).collect();
        let ran: usize = sums.iter().map(|sum| sum.run + sum.failed + sum.blocked).sum();
        if ran > MANY && ran > sums.len() {
            self.ui.note(table(&sums).trim_end());
        }
    }

    /// Tells again what failed, one line each, unless it stands right above.
    pub fn recall_failures(&self) {
        if self.failures.is_empty() || !self.went_on && self.failures.len() == 1 {
            return;
        }
        let count = render::plural(self.failures.len(), "stage");
        let mut lines = vec![Look::Red.on(&format!("{count} failed:"), self.ui.error_color())];
        for Failed { label, error, log } in &self.failures {
            lines.push(format!("  {label}: {error}"));
            if !log.is_empty() {
                lines.push(format!("    {}", Look::Dim.on(log, self.ui.error_color())));
            }
        }
        self.ui.note(&lines.join("\n"));
    }

    /// Takes the screen away.
    pub fn clear(&mut self) {
        if let Some(screen) = self.screen.take() {
            screen.finish_and_clear();
            self.ui.bars().remove(&screen);
        }
    }

    fn label(&self, name: &NodeName) -> String {
        match (self.several, name.trial.is_empty()) {
            (true, _) => render::node(name),
            (false, true) => name.stage.clone(),
            (false, false) => format!("{}/{}", name.trial, name.stage),
        }
    }

    fn line(&mut self, word: &str, look: Look, name: &NodeName, text: &str) {
        self.went_on = true;
        let word = look.on(&format!("{word:>8}"), self.ui.error_color());
        self.ui.note(format!("{word}  {}  {text}", self.label(name)).trim_end());
    }

    /// Draws the screen from now on. It is one bar of several lines, so that whatever is written above it tears none of them.
    fn draw(&mut self) {
        if self.screen.is_some() {
            return;
        }
        let screen = self.ui.bars().add(ProgressBar::no_length());
        screen.set_style(screen_style(&self.board, self.ui.error_color()));
        screen.enable_steady_tick(TICK);
        self.screen = Some(screen);
    }

    fn stage(&mut self, node: usize, event: &StageEvent) {
        open(&self.board).hear(node, event);
        let draws_bars = self.ui.draws_bars();
        let said = {
            let mut board = open(&self.board);
            let Some(running) = board.running(node) else { return };
            match event {
                StageEvent::Resumed { done } => Some(format!("goes on from {}", render::count(*done))),
                StageEvent::Note { text } => Some(text.clone()),
                _ if draws_bars || running.reached.is_none() || running.told.elapsed() < PLAIN_INTERVAL => None,
                _ => {
                    running.told = Instant::now();
                    Some(plain(&running.shown()))
                }
            }
            .map(|text| format!("{}: {text}", running.label))
        };
        if let Some(text) = said {
            self.ui.note(&text);
        }
    }

    fn failed(&mut self, node: usize, name: &NodeName, error: &str, log: &str) {
        let label = render::node(name);
        let first = error.lines().next().unwrap_or_default().trim_end_matches(':').to_owned();
        let failure = FailedStage { name: label.clone(), error: first.clone(), log: log.to_owned() };
        open(&self.board).failed(node, failure);
        self.time_left.settle(node);
        self.ui.error(&format!("stage `{label}` failed: {error}"));
        if !log.is_empty() {
            self.ui.hint(&format!("its log is {log}"));
        }
        self.failures.push(Failed { label, error: first, log: log.to_owned() });
        self.went_on = false;
    }

    /// A stage runs no more, for now; whether it did.
    fn stop(&mut self, node: usize) -> bool {
        self.time_left.stop(node);
        open(&self.board).stop(node)
    }

    /// Estimates the time left anew, unless that would cost more than it is worth.
    fn estimate(&mut self) {
        let now = Instant::now();
        let board = &self.board;
        let pace = |node: usize| open(board).pace_of(node);
        // Where nothing is drawn, runs that are over in seconds need no history.
        let is_wanted = self.ui.draws_bars() || self.begun.elapsed() >= UNSEEN;
        let new = if is_wanted && self.time_left.is_due(now) { Some(self.time_left.estimate(now, pace)) } else { None };
        let mut board = open(board);
        let old = board.estimate();
        board.set_estimate(new.unwrap_or_else(|| old.map(Estimate::outdated)));
    }

    /// Without a terminal, how far the run as a whole is, now and then.
    fn tell_overall(&mut self) {
        if self.ui.draws_bars() || self.ui.is_quiet() || self.told.elapsed() < PLAIN_OVERALL {
            return;
        }
        self.told = Instant::now();
        self.estimate();
        let board = open(&self.board);
        let (settled, stages) = board.overall();
        let tuning = if self.tunes { " of tuning" } else { "" };
        let left = board.estimate().and_then(|estimate| estimate.now(Instant::now())?.later(0.0));
        let left = left.map(|left| format!(", {left}")).unwrap_or_default();
        drop(board);
        let stages = render::plural(stages, "stage");
        self.ui.note(&format!("{} of {stages}{tuning}{left}", render::count(settled as u64)));
    }
}

/// Stages that ran, above which what came of them is told by their names.
const MANY: usize = 8;

/// Names of stages in the table at the end, at most.
const ROWS: usize = 16;

/// What came of stages, a line a name.
fn table(sums: &[&Sum]) -> String {
    let count = |count: usize| if count == 0 { String::new() } else { render::count(count as u64) };
    let mut rows: Vec<Vec<String>> = Vec::new();
    for sum in sums.iter().take(ROWS) {
        let each = if sum.run > 0 { render::duration(sum.seconds / sum.run as f64) } else { String::new() };
        let counts = [sum.run, sum.cached, sum.failed, sum.blocked].map(count);
        rows.push([sum.stage.clone()].into_iter().chain(counts).chain([each]).collect());
    }
    let header = ["stage", "run", "cached", "failed", "blocked", "each"];
    // A column in which nothing stands says nothing.
    let kept: Vec<usize> = (0..header.len()).filter(|place| rows.iter().any(|row| !row[*place].is_empty())).collect();
    let header: Vec<&str> = kept.iter().map(|place| header[*place]).collect();
    let right: Vec<usize> = (1..header.len()).collect();
    let rows = rows.into_iter().map(|row| kept.iter().map(|place| row[*place].clone()).collect()).collect();
    let mut text = render::columns(&header, &right, rows, None);
    let more = sums.len().saturating_sub(ROWS);
    if more > 0 {
        let _ = writeln!(text, "and {more} more");
    }
    text
}

/// `1,200/3,000 steps, 21.3/s, 1m 24s left, loss 0.31`.
fn plain(stage: &snapshot::RunningStage) -> String {
    let mut parts = Vec::new();
    if let Some(reached) = &stage.reached {
        parts.push(format!("{}/{} {}", render::count(reached.done), render::count(reached.total), reached.unit));
    }
    parts.extend(stage.rate.map(words::rate));
    parts.extend(stage.left.map(|left| format!("{} left", render::duration(left))));
    parts.extend(stage.metrics.iter().map(|(name, value)| format!("{name} {}", render::number(*value))));
    parts.join(", ")
}

/// Now, in seconds since 1970.
pub fn now() -> f64 {
    SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).map_or(0.0, |time| time.as_secs_f64())
}

/// How the screen of a run looks in the terminal behind stderr, of which it takes a half.
fn screen_form(color: bool) -> Form {
    let (rows, columns) = console::Term::stderr().size();
    Form { width: usize::from(columns), height: usize::from(rows / 2).max(4), color }
}

fn screen_style(board: &Shared, color: bool) -> ProgressStyle {
    let board = Arc::clone(board);
    let kept: Mutex<Option<(Instant, String)>> = Mutex::new(None);
    let kept = Arc::new(kept);
    let draw = move |_: &ProgressState, text: &mut dyn std::fmt::Write| {
        let mut kept = kept.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        if kept.as_ref().is_none_or(|(when, _)| when.elapsed() >= KEEP) {
            let snapshot: Snapshot = open(&board).snapshot();
            let lines = screen::lines(&snapshot, snapshot.at, screen_form(color));
            *kept = Some((Instant::now(), lines.join("\n")));
        }
        if let Some((_, lines)) = &*kept {
            // What cannot be written is drawn again at the next tick.
            let _ = text.write_str(lines);
        }
    };
    ProgressStyle::with_template("{screen}").expect("the template is well formed").with_key("screen", draw)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_running_stage_says_where_it_is() {
        let mut running = running::tests::running("sft");
        let metrics = [("grad_norm".to_owned(), 1.0), ("loss".to_owned(), 0.312_111)];
        running.metrics.extend(metrics);
        let progress = |done| StageEvent::Progress { done, total: 3000, unit: "steps".to_owned() };
        running.hear(&progress(1000), Duration::from_secs(0));
        assert_eq!(plain(&running.shown()), "1,000/3,000 steps, loss 0.3121, grad_norm 1");
        running.hear(&progress(1200), Duration::from_secs(10));
        assert_eq!(plain(&running.shown()), "1,200/3,000 steps, 20.0/s, 1m 30s left, loss 0.3121, grad_norm 1");
    }

    #[test]
    fn many_stages_are_summed_up_by_their_names() {
        let sum = |stage: &str, run: usize, cached: usize, failed: usize| Sum {
            stage: stage.to_owned(),
            run,
            seconds: 72.0 * run as f64,
            cached,
            failed,
            blocked: 0,
        };
        let sums = [sum("tokens", 0, 1, 1), sum("sft", 12, 0, 2), sum("evaluate_sft", 2000, 3, 0)];
        insta::assert_snapshot!(table(&sums.iter().collect::<Vec<_>>()));
    }

    #[test]
    fn the_style_is_well_formed() {
        let plan = Plan::new(&[], None).unwrap();
        let board: Shared = Arc::new(Mutex::new(Board::new(&plan, &[], false)));
        ProgressBar::hidden().set_style(screen_style(&board, false));
    }
}
