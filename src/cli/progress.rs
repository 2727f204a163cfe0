//! A run as people watch it: a bar for every running stage and one for all, or plain lines where there is no terminal.
//!
//! It turns events into lines and bars and knows nothing else of the run.

mod left;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant, SystemTime};

use indicatif::{ProgressBar, ProgressState, ProgressStyle};

use crate::cli::pace::Pace;
use crate::cli::progress::left::{Estimate, TimeLeft};
use crate::cli::render;
use crate::cli::ui::{Look, Ui};
use crate::pipeline::exec::event::Event;
use crate::pipeline::plan::{NodeName, Plan};
use crate::pipeline::stage::StageEvent;
use crate::pipeline::store::{Owner, Reached, Store};

/// Without a terminal a running stage says how far it is at most this often.
const PLAIN_INTERVAL: Duration = Duration::from_secs(10);

/// Without a terminal the run as a whole says how far it is at most this often.
const PLAIN_OVERALL: Duration = Duration::from_secs(60);

/// Terminals narrower than this are not told how long the run has taken so far.
const NARROW: u16 = 50;

/// How often clocks and spinners move.
const TICK: Duration = Duration::from_millis(200);

/// Metrics on a line, at most.
const SHOWN_METRICS: usize = 4;

/// The display of one run.
pub struct Progress<'a> {
    ui: &'a Ui,
    /// Whether names need their experiment to be told apart.
    several: bool,
    /// Whether more follows, of which nothing is known yet.
    tunes: bool,
    total: usize,
    settled: usize,
    running: BTreeMap<usize, Running>,
    overall: Option<ProgressBar>,
    time_left: TimeLeft<'a>,
    /// The newest estimate, which the overall line shows as its clock moves.
    estimate: Arc<Mutex<Option<Estimate>>>,
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

/// A stage that runs now.
struct Running {
    label: String,
    pace: Pace,
    metrics: BTreeMap<String, f64>,
    /// Done, total and unit, once told.
    reached: Option<(u64, u64, String)>,
    bar: Option<ProgressBar>,
    /// When it last said something on a plain line.
    told: Instant,
}

impl<'a> Progress<'a> {
    /// A display for the run of `plan`.
    pub fn new(ui: &'a Ui, plan: &'a Plan, store: &'a Store, asked: Asked) -> Self {
        let Asked { wanted, again, jobs, tunes } = asked;
        let first = plan.trials.first().map(|trial| &trial.experiment);
        let several = plan.trials.iter().any(|trial| Some(&trial.experiment) != first);
        Self {
            ui,
            several,
            tunes,
            total: plan.nodes.len(),
            settled: 0,
            running: BTreeMap::new(),
            overall: None,
            time_left: TimeLeft::new(plan, store, wanted, again, jobs),
            estimate: Arc::default(),
            begun: Instant::now(),
            told: Instant::now(),
            failures: Vec::new(),
            went_on: false,
        }
    }

    /// Shows one event.
    pub fn on(&mut self, event: &Event) {
        match event {
            Event::Started { nodes } => self.total = *nodes,
            Event::Cached { node, .. } => {
                // It may have begun, and found what another run had made meanwhile.
                self.stop(*node);
                self.settle(*node);
            }
            Event::Waiting { name, owner, reached, .. } => {
                self.line("waiting", Look::Dim, name, &owner_text(owner.as_ref(), reached.as_ref()));
            }
            Event::Retrying { node, name, error, attempt, attempts, seconds } => {
                self.stop(*node);
                let when = if *seconds >= 1.0 { format!(" in {}", render::duration(*seconds)) } else { String::new() };
                let text = format!("retrying{when}, attempt {attempt} of {attempts}: {error}");
                self.line("failed", Look::Yellow, name, &text);
            }
            Event::Running { node, name, .. } => self.start(*node, name),
            Event::Stage { node, event } => self.stage(*node, event),
            Event::Done { node, name, seconds, metrics, .. } => {
                self.stop(*node);
                let mut text = render::duration(*seconds);
                if !metrics.is_empty() {
                    text.push_str(", ");
                    text.push_str(&headline(metrics));
                }
                self.line("done", Look::Green, name, &text);
                self.time_left.learn(*node, *seconds);
                self.settle(*node);
                self.tell_overall();
            }
            Event::Failed { node, name, error, log } => {
                self.stop(*node);
                self.settle(*node);
                self.ui.error(&format!("stage `{}` failed: {error}", render::node(name)));
                if !log.is_empty() {
                    self.ui.hint(&format!("its log is {log}"));
                }
                let error = error.lines().next().unwrap_or_default().trim_end_matches(':').to_owned();
                self.failures.push(Failed { label: render::node(name), error, log: log.clone() });
                self.went_on = false;
            }
            Event::Blocked { node, name } => {
                self.line("blocked", Look::Yellow, name, "an input failed");
                self.settle(*node);
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
        if self.overall.is_some() {
            self.estimate();
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

    /// Takes every bar away.
    pub fn clear(&mut self) {
        for running in std::mem::take(&mut self.running).into_values() {
            if let Some(bar) = running.bar {
                bar.finish_and_clear();
            }
        }
        if let Some(overall) = self.overall.take() {
            overall.finish_and_clear();
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

    fn start(&mut self, node: usize, name: &NodeName) {
        let label = self.label(name);
        let bar = self.ui.draws_bars().then(|| self.bar(&label));
        if bar.is_none() {
            self.line("start", Look::Dim, name, "");
        }
        let told = Instant::now();
        let running = Running { label, pace: Pace::new(), metrics: BTreeMap::new(), reached: None, bar, told };
        self.running.insert(node, running);
        self.time_left.begin(node, told);
    }

    /// A bar above the overall line, which comes with the first.
    fn bar(&mut self, label: &str) -> ProgressBar {
        let text = self.overall_text();
        let overall = self.overall.get_or_insert_with(|| {
            let overall = self.ui.bars().add(ProgressBar::no_length());
            overall.set_style(overall_style(self.ui.error_width(), &self.estimate));
            overall.set_message(text);
            overall.enable_steady_tick(TICK);
            overall
        });
        let bar = self.ui.bars().insert_before(overall, ProgressBar::no_length());
        bar.set_style(style("{prefix} {spinner} {time}"));
        bar.set_prefix(format!("{label:>16}"));
        bar.enable_steady_tick(TICK);
        bar
    }

    fn stage(&mut self, node: usize, event: &StageEvent) {
        let now = self.begun.elapsed();
        let width = self.ui.error_width();
        let Some(running) = self.running.get_mut(&node) else { return };
        match event {
            StageEvent::Progress { done, total, unit } => {
                running.pace.reach(now, *done);
                let begins = running.reached.is_none();
                running.reached = Some((*done, *total, unit.clone()));
                if let Some(bar) = &running.bar {
                    if begins {
                        bar.set_style(bar_style(width));
                    }
                    bar.set_length(*total);
                    bar.set_position(*done);
                    bar.set_message(running.text());
                }
            }
            StageEvent::Metrics { values } => {
                running.metrics.extend(values.iter().map(|(name, value)| (name.clone(), *value)));
                if let (Some(bar), Some(_)) = (&running.bar, &running.reached) {
                    bar.set_message(running.text());
                }
            }
            StageEvent::Resumed { done } => {
                running.pace.reach(now, *done);
                let text = format!("{}: goes on from {}", running.label, render::count(*done));
                self.ui.note(&text);
            }
            StageEvent::Note { text } => {
                let text = format!("{}: {text}", running.label);
                self.ui.note(&text);
            }
        }
        let Some(running) = self.running.get_mut(&node) else { return };
        if running.bar.is_none() && running.reached.is_some() && running.told.elapsed() >= PLAIN_INTERVAL {
            running.told = Instant::now();
            let text = format!("{}: {}", running.label, running.text());
            self.ui.note(&text);
        }
    }

    /// Takes a stage's bar away; whether there was such a stage.
    fn stop(&mut self, node: usize) -> bool {
        self.time_left.stop(node);
        let stopped = self.running.remove(&node);
        let was_running = stopped.is_some();
        if let Some(bar) = stopped.and_then(|running| running.bar) {
            bar.finish_and_clear();
            self.ui.bars().remove(&bar);
        }
        was_running
    }

    fn settle(&mut self, node: usize) {
        // A result that proves damaged is made again, and its stage settles a second time.
        self.settled += usize::from(self.time_left.settle(node));
        if let Some(overall) = &self.overall {
            overall.set_message(self.overall_text());
        }
    }

    fn overall_text(&self) -> String {
        let tuning = if self.tunes { " of tuning" } else { "" };
        format!("{} of {}{tuning}", render::count(self.settled as u64), render::plural(self.total, "stage"))
    }

    /// Estimates the time left anew, unless that would cost more than it is worth.
    fn estimate(&mut self) {
        let now = Instant::now();
        let pace = |node: usize| self.running.get(&node)?.left();
        let new = if self.time_left.is_due(now) { Some(self.time_left.estimate(now, pace)) } else { None };
        let mut estimate = self.estimate.lock().unwrap_or_else(PoisonError::into_inner);
        *estimate = new.unwrap_or_else(|| estimate.map(Estimate::outdated));
    }

    /// Without a terminal, how far the run as a whole is, now and then.
    fn tell_overall(&mut self) {
        if self.ui.draws_bars() || self.ui.is_quiet() || self.told.elapsed() < PLAIN_OVERALL {
            return;
        }
        self.told = Instant::now();
        self.estimate();
        let left = shown(&self.estimate).map(|left| format!(", {left}")).unwrap_or_default();
        self.ui.note(&format!("{}{left}", self.overall_text()));
    }
}

impl Running {
    /// Seconds that it still takes by its own count.
    fn left(&self) -> Option<f64> {
        let (_, total, _) = self.reached.as_ref()?;
        self.pace.left(*total)
    }

    /// `1,200/3,000 steps, 21.3/s, 1m 24s left, loss 0.31`: what matters most stands first, since narrow terminals cut.
    fn text(&self) -> String {
        let Some((done, total, unit)) = &self.reached else { return String::new() };
        let mut parts = vec![format!("{}/{} {unit}", render::count(*done), render::count(*total))];
        if let Some(rate) = self.pace.rate() {
            parts.push(format!("{}/s", rate_text(rate)));
        }
        if let Some(left) = self.left().filter(|_| done < total) {
            parts.push(format!("{} left", render::duration(left)));
        }
        if !self.metrics.is_empty() {
            parts.push(headline(&self.metrics));
        }
        parts.join(", ")
    }
}

/// Who works on a stage that this run waits for.
fn owner_text(owner: Option<&Owner>, reached: Option<&Reached>) -> String {
    let Some(Owner { process, host, since }) = owner else {
        return "another run is working on it".to_owned();
    };
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).map_or(0, |time| time.as_secs());
    let time = render::duration(now.saturating_sub(*since) as f64);
    let text = format!("process {process} on {host} has been working on it for {time}");
    match reached {
        Some(Reached { done, total, unit }) => {
            format!("{text}, {}/{} {unit}", render::count(*done), render::count(*total))
        }
        None => text,
    }
}

/// A rate with three digits: `0.42`, `21.3`, `1,250`.
fn rate_text(rate: f64) -> String {
    match rate {
        rate if rate >= 100.0 => render::count(rate.round() as u64),
        rate if rate >= 10.0 => format!("{rate:.1}"),
        rate => format!("{rate:.2}"),
    }
}

/// The metrics that people look for first, short.
fn headline(metrics: &BTreeMap<String, f64>) -> String {
    const FIRST: [&str; 4] = ["solved", "reward", "loss", "accuracy"];
    let rank = |name: &str| {
        let last = name.rsplit(['/', '.']).next().unwrap_or(name);
        FIRST.iter().position(|first| *first == last).unwrap_or(FIRST.len())
    };
    // A dotted name is a part of another number: `solved.long`, `rows.train`. Where the time goes is for `pipe show`.
    let is_told = |name: &&String| !name.contains('.') && !name.starts_with("seconds/");
    let mut names: Vec<&String> = metrics.keys().filter(is_told).collect();
    names.sort_by_key(|name| (rank(name), name.as_str()));
    let shown: Vec<String> =
        names.into_iter().take(SHOWN_METRICS).map(|name| format!("{name} {}", render::number(metrics[name]))).collect();
    shown.join(", ")
}

/// The estimate as it is now.
fn shown(estimate: &Mutex<Option<Estimate>>) -> Option<String> {
    estimate.lock().unwrap_or_else(PoisonError::into_inner).and_then(|estimate| estimate.text(Instant::now()))
}

/// `3 of 10 stages, about 12 min left, 4m 10s`.
fn overall_style(width: Option<u16>, estimate: &Arc<Mutex<Option<Estimate>>>) -> ProgressStyle {
    let estimate = Arc::clone(estimate);
    let left = move |_: &ProgressState, text: &mut dyn std::fmt::Write| {
        if let Some(left) = shown(&estimate) {
            // A line that cannot be written is redrawn at the next tick.
            let _ = write!(text, ", {left}");
        }
    };
    let is_narrow = width.is_some_and(|width| width < NARROW);
    style(if is_narrow { "{msg}{left}" } else { "{msg}{left}, {time}" }).with_key("left", left)
}

fn bar_style(width: Option<u16>) -> ProgressStyle {
    match width {
        Some(100..) | None => style("{prefix} {bar:24} {wide_msg}"),
        Some(60..) => style("{prefix} {bar:10} {wide_msg}"),
        Some(_) => style("{prefix} {percent:>3}% {wide_msg}"),
    }
}

fn style(template: &str) -> ProgressStyle {
    let time = |state: &ProgressState, text: &mut dyn std::fmt::Write| {
        // A bar that cannot be written is redrawn at the next tick.
        let _ = text.write_str(&render::duration(state.elapsed().as_secs_f64()));
    };
    let style = ProgressStyle::with_template(template).expect("the template is well formed");
    style.with_key("time", time).progress_chars("━╸ ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_metrics_are_those_that_people_look_for() {
        let names = ["loss", "mfu", "reward", "rollout/solved", "rollout/solved.long", "seconds/reward"];
        let shown = headline(&names.into_iter().map(|name| (name.to_owned(), 0.5)).collect());
        assert_eq!(shown, "rollout/solved 0.5, reward 0.5, loss 0.5, mfu 0.5");
    }

    #[test]
    fn a_running_stage_says_where_it_is() {
        let mut running = Running {
            label: "sft".to_owned(),
            pace: Pace::new(),
            metrics: BTreeMap::from([("grad_norm".to_owned(), 1.0), ("loss".to_owned(), 0.312_111)]),
            reached: Some((1200, 3000, "steps".to_owned())),
            bar: None,
            told: Instant::now(),
        };
        assert_eq!(running.text(), "1,200/3,000 steps, loss 0.3121, grad_norm 1");
        running.pace.reach(Duration::from_secs(0), 1000);
        running.pace.reach(Duration::from_secs(10), 1200);
        assert_eq!(running.text(), "1,200/3,000 steps, 20.0/s, 1m 30s left, loss 0.3121, grad_norm 1");
    }

    #[test]
    fn what_people_look_for_comes_first() {
        let names = ["a", "b", "c", "rows.train", "validation/solved", "sft/loss"];
        let metrics = names.map(|name| (name.to_owned(), 0.5)).into();
        assert_eq!(headline(&metrics), "validation/solved 0.5, sft/loss 0.5, a 0.5, b 0.5");
    }

    #[test]
    fn every_style_is_well_formed() {
        for width in [None, Some(20), Some(60), Some(200)] {
            bar_style(width);
        }
        let bar = ProgressBar::hidden().with_style(style("{prefix} {spinner} {time}"));
        for width in [None, Some(20), Some(200)] {
            bar.set_style(overall_style(width, &Arc::default()));
        }
    }
}
