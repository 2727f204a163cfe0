//! A run as lines of a terminal: the stages that run, what waits for what, and the run as a whole, in as few lines as there are.
//!
//! What does not fit is counted. It is given all that it shows, the moment and the size included, and draws nothing itself.

use crate::cli::progress::snapshot::{RunningStage, Snapshot, Standing, WaitingStages};
use crate::cli::progress::words;
use crate::cli::render;
use crate::cli::ui::Look;
use crate::pipeline::exec::event::Outcome;
use std::fmt::Write as _;

/// From this width on a line has room for a longer bar, units and several metrics.
const WIDE: usize = 100;

/// Below this width a line is a name and a share.
const NARROW: usize = 60;

/// Seconds after which a run that has said nothing is told to be silent.
const SILENT: f64 = 30.0;

/// How a screen is to look.
#[derive(Clone, Copy, Debug)]
pub struct Form {
    /// Columns.
    pub width: usize,
    /// Lines, at most.
    pub height: usize,
    /// Whether it takes colour.
    pub color: bool,
}

/// The run at the moment `now`, in seconds since 1970, as its own terminal shows it.
pub fn lines(run: &Snapshot, now: f64, form: Form) -> Vec<String> {
    let waiting = waiting(&run.waiting, form, 2);
    // The line of the run as a whole is there always, that of the columns where there is room for two stages.
    let room = form.height.saturating_sub(1 + waiting.len());
    let has_heading = room > 2 && form.width >= NARROW && run.running.iter().any(|stage| stage.reached.is_some());
    let room = room.saturating_sub(usize::from(has_heading));
    let fits = if run.running.len() > room { room.saturating_sub(1) } else { run.running.len() };
    let (shown, more) = run.running.split_at(fits);
    let columns = Columns::of(shown, now, form);
    let mut lines = Vec::with_capacity(form.height);
    if has_heading && !shown.is_empty() {
        lines.push(Look::Dim.on(&cut(&columns.heading(), form.width), form.color));
    }
    lines.extend(shown.iter().map(|stage| columns.line(stage)));
    if !more.is_empty() && room > 0 {
        lines.push(Look::Dim.on(&cut(&format!("and {} more that run", more.len()), form.width), form.color));
    }
    if form.height > waiting.len() + 1 {
        lines.extend(waiting);
    }
    lines.push(overall(run, now, form));
    lines
}

/// The run as another terminal shows it: whose it is, and what failed, above and below [`lines`].
pub fn whole(run: &Snapshot, standing: Standing, now: f64, form: Form) -> Vec<String> {
    let Form { width, height, color } = form;
    let experiments = names(run.experiments.iter().map(String::as_str), 3);
    let passed = render::duration((if standing == Standing::Running { now } else { run.at }) - run.begun);
    let owner = format!("process {} on {}", run.process, run.host);
    let heard = render::duration((now - run.at).max(0.0));
    let (look, text) = match standing {
        Standing::Running if now - run.at > SILENT => {
            (Look::Yellow, format!("{owner}, running for {passed}, silent for {heard}"))
        }
        Standing::Running => (Look::Dim, format!("{owner}, running for {passed}")),
        Standing::Ended => (Look::Dim, format!("{owner} ended {heard} ago, after {passed}")),
        Standing::Died => (Look::Red, format!("{owner} died; it was last heard {heard} ago, after {passed}")),
        Standing::Unknown => (Look::Yellow, format!("{owner}, of which nothing is known here, spoke {heard} ago")),
    };
    // Colour is put on what is cut already.
    let room = width.saturating_sub(experiments.chars().count() + 2);
    let mut all =
        vec![format!("{}  {}", Look::Bold.on(&cut(&experiments, width), color), look.on(&cut(&text, room), color))];
    let failures = failures(run, form, (height / 4).max(2));
    let left = Form { height: height.saturating_sub(1 + failures.len()).max(1), ..form };
    let shown = match standing {
        Standing::Running => lines(run, now, left),
        // Nothing of it runs or waits any more.
        _ => vec![cut(&over(run, standing), width)],
    };
    all.extend(shown);
    let overall = all.len() - 1;
    all.splice(overall..overall, failures);
    all
}

/// What failed, and where its log is: so many lines at most.
fn failures(run: &Snapshot, form: Form, most: usize) -> Vec<String> {
    let fits = if run.failures.len() * 2 <= most { run.failures.len() } else { (most - 1) / 2 };
    let mut lines = Vec::new();
    for failure in &run.failures[..fits] {
        let text = format!("{}  {}", failure.name, failure.error);
        let room = form.width.saturating_sub(8);
        lines.push(format!("{}  {}", Look::Red.on("failed", form.color), cut(&text, room)));
        if !failure.log.is_empty() {
            // A path that is cut would be of no use: the terminal folds it.
            lines.push(format!("        {}", Look::Dim.on(&failure.log, form.color)));
        }
    }
    let more = run.counts.failed.saturating_sub(fits);
    if more > 0 && fits > 0 {
        lines.push(Look::Red.on(&format!("and {more} more that failed"), form.color));
    }
    lines
}

/// `3 of 10 stages, 2 running, 1 failed, about 12 min left, 4m 10s`.
fn overall(run: &Snapshot, now: f64, Form { width, color, .. }: Form) -> String {
    let tuning = if run.tunes { " of tuning" } else { "" };
    let mut parts = vec![(
        None,
        format!("{} of {}{tuning}", render::count(run.settled as u64), render::plural(run.stages, "stage")),
    )];
    let mut counted = |count: usize, word: &str, look| {
        if count > 0 {
            parts.push((look, format!("{} {word}", render::count(count as u64))));
        }
    };
    counted(run.running.len(), "running", None);
    counted(run.counts.failed, "failed", Some(Look::Red));
    counted(run.counts.blocked, "blocked", Some(Look::Yellow));
    counted(run.counts.interrupted, "interrupted", Some(Look::Yellow));
    parts.extend(run.left.and_then(|left| left.later(now - run.at)).map(|text| (None, text)));
    parts.push((None, render::duration((now - run.begun).max(0.0))));
    let mut text = String::new();
    let mut used = 0;
    for (look, part) in parts {
        let gap = if used == 0 { "" } else { ", " };
        used += gap.len() + part.chars().count();
        if used > width {
            break;
        }
        text.push_str(gap);
        text.push_str(&look.map_or_else(|| part.clone(), |look: Look| look.on(&part, color)));
    }
    text
}

/// `9 of 64 stages: 5 run, 3 cached, 1 failed; 2 were running`.
fn over(run: &Snapshot, standing: Standing) -> String {
    let Outcome { run: ran, cached, failed, blocked, interrupted, skipped, .. } = run.counts;
    let counts = [
        (ran, "run"),
        (cached, "cached"),
        (failed, "failed"),
        (blocked, "blocked"),
        (interrupted, "interrupted"),
        (skipped, "not begun"),
    ];
    let counts = counts.into_iter().filter(|(count, _)| *count > 0);
    let counts: Vec<String> = counts.map(|(count, word)| format!("{} {word}", render::count(count as u64))).collect();
    let mut text = format!("{} of {}", render::count(run.settled as u64), render::plural(run.stages, "stage"));
    if !counts.is_empty() {
        let _ = write!(text, ": {}", counts.join(", "));
    }
    if standing != Standing::Ended && !run.running.is_empty() {
        let running = names(run.running.iter().map(|stage| stage.label.as_str()), 3);
        let _ = write!(text, "; when it was last heard {running} ran");
    }
    text
}

/// `waiting  4 sft (ready), 6 grpo for sft`, folded to so many lines; what does not fit is counted.
fn waiting(stages: &[WaitingStages], form: Form, most: usize) -> Vec<String> {
    const HEAD: &str = "waiting  ";
    let text = |one: &WaitingStages| {
        let WaitingStages { stage, count, ready, elsewhere, inputs } = one;
        let mut why = Vec::new();
        match (*ready, count - elsewhere) {
            (0, _) => {}
            (ready, all) if ready == all => why.push("ready".to_owned()),
            (ready, _) => why.push(format!("{} ready", render::count(ready as u64))),
        }
        if *elsewhere > 0 {
            why.push(format!("{elsewhere} in another run"));
        }
        if ready + elsewhere < *count && !inputs.is_empty() {
            let others = if why.is_empty() { "" } else { "the others " };
            why.push(format!("{others}for {}", names(inputs.iter().map(String::as_str), 3)));
        }
        let times = if *count > 1 { format!("{} ", render::count(*count as u64)) } else { String::new() };
        match why.as_slice() {
            [] => format!("{times}{stage}"),
            [one] if one.starts_with("for ") => format!("{times}{stage} {one}"),
            why => format!("{times}{stage} ({})", why.join(", ")),
        }
    };
    let mut lines: Vec<String> = Vec::new();
    let mut line = HEAD.to_owned();
    for (place, stage) in stages.iter().enumerate() {
        let next = text(stage);
        let gap = if line == HEAD || line.trim().is_empty() { "" } else { "; " };
        // The last line leaves room for how many more there are.
        let more = format!("; {} more", stages.len() - place);
        let spare = if lines.len() + 1 == most && place + 1 < stages.len() { more.len() } else { 0 };
        if line.len() + gap.len() + next.chars().count() + spare <= form.width || gap.is_empty() {
            line.push_str(gap);
            line.push_str(&next);
        } else if lines.len() + 1 < most {
            lines.push(std::mem::replace(&mut line, format!("{:width$}{next}", "", width = HEAD.len())));
        } else {
            line.push_str(&more);
            break;
        }
    }
    if !stages.is_empty() {
        lines.push(line);
    }
    lines.into_iter().map(|line| Look::Dim.on(&cut(&line, form.width), form.color)).collect()
}

/// How wide each column is, over the stages that are shown.
struct Columns {
    now: f64,
    form: Form,
    label: usize,
    bar: usize,
    done: usize,
    rate: usize,
    left: usize,
}

impl Columns {
    fn of(stages: &[RunningStage], now: f64, form: Form) -> Self {
        let widest = |cell: &dyn Fn(&RunningStage) -> String, heading: usize| {
            stages.iter().map(|stage| cell(stage).chars().count()).max().map_or(0, |width| width.max(heading))
        };
        let is_wide = form.width >= WIDE;
        let most = form.width / 3;
        let columns = Self { now, form, label: 0, bar: 0, done: 0, rate: 0, left: 0 };
        let label = widest(&|stage| stage.label.clone(), 5).min(most.max(12));
        if form.width < NARROW {
            return Self { label: label.min(form.width.saturating_sub(6)), ..columns };
        }
        let bar = if is_wide { 16 } else { 6 };
        let done = widest(&|stage| done(stage, now, is_wide), 4);
        let left = widest(&left, 4);
        let mut rate = widest(&rate, 4);
        // Where it is tight, the metric that moves is worth more than how fast that goes.
        if !is_wide && label + bar + done + left + rate + 10 + 14 > form.width {
            rate = 0;
        }
        Self { label, bar, done, rate, left, ..columns }
    }

    fn heading(&self) -> String {
        let Self { label, bar, done, rate, left, .. } = self;
        let mut text = format!("{:label$}  {:bar$}  {:>done$}", "stage", "", "done");
        for (name, width) in [("rate", rate), ("left", left)] {
            if *width > 0 {
                let _ = write!(text, "  {name:>width$}");
            }
        }
        text
    }

    fn line(&self, stage: &RunningStage) -> String {
        let Form { width, color, .. } = self.form;
        let label = shortened(&stage.label, self.label);
        let share = stage.reached.as_ref().map(|reached| reached.done as f64 / reached.total.max(1) as f64);
        if width < NARROW {
            let share = share.map_or(String::new(), |share| format!("{:.0}%", share.min(1.0) * 100.0));
            let line = format!("{label:room$} {share:>4}", room = self.label);
            return cut(line.trim_end(), width);
        }
        let is_wide = width >= WIDE;
        let bar = share.map_or_else(|| " ".repeat(self.bar), |share| bar(share, self.bar));
        let mut cells = vec![(None, format!("{label:width$}", width = self.label)), (Some(Look::Cyan), bar)];
        cells.push((None, format!("{:>width$}", done(stage, self.now, is_wide), width = self.done)));
        for (cell, width) in [(rate(stage), self.rate), (left(stage), self.left)] {
            if width > 0 {
                cells.push((Some(Look::Dim), format!("{cell:>width$}")));
            }
        }
        let used: usize = cells.iter().map(|(_, cell)| cell.chars().count() + 2).sum();
        let mut text = cells
            .iter()
            .map(|(look, cell)| look.map_or_else(|| cell.clone(), |look: Look| look.on(cell, color)))
            .collect::<Vec<_>>()
            .join("  ");
        let metrics = self.metrics(stage, width.saturating_sub(used));
        if !metrics.is_empty() {
            text.push_str("  ");
            text.push_str(&metrics);
        }
        text.trim_end().to_owned()
    }

    /// `loss 0.3121 █▅▃▂▁  mfu 0.5`: as many metrics as fit, and how one of them has moved.
    fn metrics(&self, stage: &RunningStage, room: usize) -> String {
        let color = self.form.color;
        let mut text = String::new();
        let mut used = 0;
        for (name, value) in &stage.metrics {
            let value = render::number(*value);
            let last = name.rsplit('/').next().unwrap_or(name);
            let gap = if used == 0 { 0 } else { 2 };
            // A name that is too long for the line loses where it comes from.
            let whole = if self.form.width >= WIDE { name.as_str() } else { last };
            let name = [whole, last].into_iter().find(|name| used + gap + name.len() + 1 + value.len() <= room);
            let Some(name) = name else { break };
            text.push_str(&" ".repeat(gap));
            let _ = write!(text, "{} {value}", Look::Dim.on(name, color));
            used += gap + name.len() + 1 + value.len();
            let moves = stage.trace.as_ref().filter(|trace| trace.name.ends_with(name));
            let width = room.saturating_sub(used + 1).min(if self.form.width >= WIDE { 16 } else { 8 });
            if let Some(trace) = moves.filter(|_| width >= 4) {
                let curve = words::curve(&trace.points, width);
                used += 1 + curve.chars().count();
                let _ = write!(text, " {}", Look::Cyan.on(&curve, color));
            }
        }
        text
    }
}

fn done(stage: &RunningStage, now: f64, with_unit: bool) -> String {
    match &stage.reached {
        None => render::duration((now - stage.began).max(0.0)),
        Some(reached) => {
            let text = format!("{}/{}", render::count(reached.done), render::count(reached.total));
            if with_unit { format!("{text} {}", reached.unit) } else { text }
        }
    }
}

fn rate(stage: &RunningStage) -> String {
    stage.rate.map(words::rate).unwrap_or_default()
}

fn left(stage: &RunningStage) -> String {
    stage.left.map(render::duration).unwrap_or_default()
}

/// `━━━━╸   `.
fn bar(share: f64, width: usize) -> String {
    let halves = (share.clamp(0.0, 1.0) * 2.0 * width as f64).floor() as usize;
    let mut text = "━".repeat(halves / 2);
    if halves % 2 == 1 {
        text.push('╸');
    }
    let blank = width - text.chars().count();
    text + &" ".repeat(blank)
}

/// `a, b, c and 4 more`.
fn names<'a>(all: impl Iterator<Item = &'a str>, most: usize) -> String {
    let all: Vec<&str> = all.collect();
    let shown = all[..all.len().min(most)].join(", ");
    match all.len().saturating_sub(most) {
        0 => shown,
        more => format!("{shown} and {more} more"),
    }
}

/// The end of a text that is too long: of a name that is the stage.
fn shortened(text: &str, width: usize) -> String {
    let length = text.chars().count();
    if length <= width {
        return text.to_owned();
    }
    let kept: String = text.chars().skip(length + 1 - width.max(1)).collect();
    format!("…{kept}")
}

/// The beginning of a text that is too long.
fn cut(text: &str, width: usize) -> String {
    if text.chars().count() <= width {
        return text.to_owned();
    }
    let kept: String = text.chars().take(width.saturating_sub(1)).collect();
    format!("{kept}…")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::progress::snapshot::{FailedStage, Left, Trace};
    use crate::pipeline::store::{Digest, Reached};

    fn stage(label: &str, done: u64, total: u64, metrics: &[(&str, f64)]) -> RunningStage {
        RunningStage {
            label: label.to_owned(),
            names: vec![format!("maze/{label}")],
            kind: "sft".to_owned(),
            key: Digest("k".into()),
            began: 1_000.0,
            resumed: None,
            reached: (total > 0).then(|| Reached { done, total, unit: "steps".to_owned() }),
            rate: (total > 0).then_some(done as f64 / 60.0),
            left: (total > 0).then(|| (total - done) as f64 * 60.0 / done as f64),
            metrics: metrics.iter().map(|(name, value)| ((*name).to_owned(), *value)).collect(),
            trace: metrics.first().filter(|_| total > 0).map(|(name, value)| Trace {
                name: (*name).to_owned(),
                points: (0..20).map(|step| value + 1.0 / f64::from(step + 1)).collect(),
            }),
        }
    }

    fn waits(stage: &str, count: usize, ready: usize, inputs: &[&str]) -> WaitingStages {
        let inputs = inputs.iter().map(|name| (*name).to_owned()).collect();
        WaitingStages { stage: stage.to_owned(), count, ready, elsewhere: 0, inputs }
    }

    fn run(running: usize) -> Snapshot {
        let mut stages = vec![
            stage(
                "seed=1,beta=0.01/sft",
                1200,
                3000,
                &[("loss", 0.3121), ("grad_norm", 1.25), ("learning_rate", 1.5e-3)],
            ),
            stage("seed=2,beta=0.01/grpo", 120, 400, &[("rollout/solved", 0.61), ("rollout/reward", 0.83)]),
            stage("tokens", 0, 0, &[]),
        ];
        stages.extend(
            (3..).map(|seed| stage(&format!("seed={seed},beta=0.01/sft"), 10 * seed, 3000, &[("loss", 0.5)])).take(60),
        );
        stages.truncate(running);
        Snapshot {
            process: 4711,
            host: "node-1".to_owned(),
            experiments: vec!["maze".to_owned()],
            begun: 900.0,
            at: 1_060.0,
            stages: 64,
            settled: 9,
            counts: Outcome { run: 5, cached: 3, failed: 1, ..Outcome::default() },
            left: Some(Left { seconds: 725.0, rest: 0.0, is_least: false }),
            running: stages,
            waiting: vec![
                waits("sft", 4, 4, &[]),
                waits("grpo", 14, 0, &["sft"]),
                waits("evaluate_grpo", 16, 1, &["grpo", "tokens"]),
                waits("evaluate_sft_greedy", 16, 0, &["sft", "tokens"]),
                waits("evaluate_grpo_greedy", 16, 0, &["grpo", "tokens"]),
            ],
            failures: vec![FailedStage {
                name: "maze/seed=3,beta=0.01/sft".to_owned(),
                error: "the loss is not finite at step 12".to_owned(),
                log: "/data/artifacts/logs/3f2a/log.txt".to_owned(),
            }],
            ..Snapshot::default()
        }
    }

    fn form(width: usize, height: usize) -> Form {
        Form { width, height, color: false }
    }

    #[test]
    fn screens_of_every_size() {
        let mut text = String::new();
        for (stages, width, height) in [(3, 80, 12), (3, 140, 12), (8, 80, 8), (3, 40, 8), (0, 80, 4), (3, 80, 2)] {
            let lines = lines(&run(stages), 1_060.0, form(width, height));
            assert!(lines.len() <= height, "{lines:#?}");
            assert!(lines.iter().all(|line| line.chars().count() <= width), "{lines:#?}");
            writeln!(text, "-- {stages} stages, {width} x {height}\n{}", lines.join("\n")).unwrap();
        }
        insta::assert_snapshot!(text);
    }

    #[test]
    fn another_terminal_is_told_whose_run_it_is_and_what_failed() {
        let mut text = String::new();
        for (standing, now) in [
            (Standing::Running, 1_061.0),
            (Standing::Running, 2_000.0),
            (Standing::Ended, 1_660.0),
            (Standing::Died, 1_660.0),
            (Standing::Unknown, 1_660.0),
        ] {
            let lines = whole(&run(2), standing, now, form(80, 20));
            writeln!(text, "-- {standing:?}\n{}", lines.join("\n")).unwrap();
        }
        insta::assert_snapshot!(text);
    }

    #[test]
    fn whatever_the_size_it_stays_within_and_colour_moves_nothing() {
        for width in [20, 33, 59, 60, 79, 99, 100, 200] {
            for height in 1..12 {
                let plain = lines(&run(5), 1_100.0, form(width, height));
                assert!(plain.len() <= height, "{width} x {height}: {plain:#?}");
                assert!(plain.iter().all(|line| line.chars().count() <= width), "{width} x {height}: {plain:#?}");
                let colored = lines(&run(5), 1_100.0, Form { color: true, ..form(width, height) });
                let bare = |line: &String| {
                    let mut rest = line.as_str();
                    let mut text = String::new();
                    while let Some((before, code)) = rest.split_once('\x1b') {
                        text += before;
                        rest = code.split_once('m').map_or("", |(_, rest)| rest);
                    }
                    (text + rest).trim_end().to_owned()
                };
                assert_eq!(colored.iter().map(bare).collect::<Vec<_>>(), plain);
            }
        }
    }
}
