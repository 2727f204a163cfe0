//! A table for the terminal: a block of rows for metrics, for differences within arms and from the baseline.

use crate::cli::arms::Claim;
use crate::cli::comparison::{Comparison, Tested, difference_name};
use crate::cli::render;
use crate::statistics::Estimate;

const METRIC_HEADER: [&str; 5] = ["metric", "arm", "mean", "95 % interval", "n"];

/// The column of Holm's correction in [`tested_header`].
const HOLM: usize = 6;

fn tested_header(what: &str) -> [&str; 7] {
    [what, "arm", "mean", "95 % interval", "n", "p", "p (Holm)"]
}

/// Blocks of rows: metrics, differences within an arm, differences from the baseline; then what they mean.
pub(super) fn text(comparison: &Comparison, width: Option<u16>) -> String {
    if comparison.metrics.is_empty() {
        return "nothing to show: no evaluation has a result yet, and no `[table]` names a metric\n".to_owned();
    }
    let one_arm = comparison.arms.len() == 1;
    let mut blocks = Vec::new();
    let mut rows = Vec::new();
    for metric in &comparison.metrics {
        let share = comparison.shares.contains(metric);
        for (place, arm) in comparison.arms.iter().enumerate() {
            let mut row = vec![if place == 0 { metric.clone() } else { String::new() }, arm.arm.clone()];
            match arm.metrics.get(metric).copied().flatten() {
                Some(found) => row.extend([
                    mean(&found, share),
                    interval(found.low, found.high, share, false),
                    render::count(found.n as u64),
                ]),
                None => row.extend(["-".to_owned(), String::new(), String::new()]),
            }
            rows.push(row);
        }
    }
    blocks.push(block(&METRIC_HEADER, rows, one_arm, width));

    let mut rows = Vec::new();
    for (first, second) in &comparison.differences {
        let name = difference_name(first, second);
        let share = comparison.shares.contains(first) && comparison.shares.contains(second);
        for (place, arm) in comparison.arms.iter().enumerate() {
            let label = if place == 0 { name.clone() } else { String::new() };
            rows.push(tested_row(label, &arm.arm, arm.differences.get(&name).copied().flatten(), share));
        }
    }
    if !rows.is_empty() {
        blocks.push(block(&tested_header("difference"), rows, one_arm, width));
    }

    if let Some(baseline) = &comparison.baseline {
        let mut rows = Vec::new();
        for metric in &comparison.metrics {
            let share = comparison.shares.contains(metric);
            let others = comparison.arms.iter().filter_map(|arm| Some((arm, arm.versus_baseline.as_ref()?)));
            for (place, (arm, versus)) in others.enumerate() {
                let label = if place == 0 { metric.clone() } else { String::new() };
                rows.push(tested_row(label, &arm.arm, versus.get(metric).copied().flatten(), share));
            }
        }
        if !rows.is_empty() {
            let table = block(&tested_header("minus the baseline"), rows, false, width);
            blocks.push(format!("baseline: {baseline}\n{table}"));
        }
    }
    let meaning = meaning(comparison, false);
    let width = width.map_or(usize::MAX, usize::from);
    blocks.push(meaning.lines().flat_map(|line| render::folded(line, width)).collect::<Vec<_>>().join("\n"));
    blocks.join("\n")
}

fn block(header: &[&str], mut rows: Vec<Vec<String>>, without_arm: bool, width: Option<u16>) -> String {
    let mut header = header.to_vec();
    // Holm's correction of a single test is the test.
    if header.ends_with(&["p", "p (Holm)"]) && rows.iter().filter(|row| !row[HOLM].is_empty()).count() < 2 {
        header.truncate(HOLM);
        for row in &mut rows {
            row.truncate(HOLM);
        }
    }
    let mut right: Vec<usize> = (2..header.len()).collect();
    if without_arm {
        header.remove(1);
        right = (1..header.len()).collect();
        for row in &mut rows {
            row.remove(1);
        }
    }
    let whole = render::columns(&header, &right, rows.clone(), None);
    let is_wide = |text: &str| width.is_some_and(|width| text.lines().any(|line| line.chars().count() > width.into()));
    if !is_wide(&whole) {
        return whole;
    }
    if without_arm {
        return render::columns(&header, &right, rows, width);
    }
    let headed = headed(&header, &right, &rows);
    if is_wide(&headed) { render::columns(&header, &right, rows, width) } else { headed }
}

/// The same with what stands in the first column as a line of its own above its rows.
fn headed(header: &[&str], right: &[usize], rows: &[Vec<String>]) -> String {
    let cells = rows.iter().map(|row| {
        let arm = format!("  {}", row[1]);
        std::iter::once(arm).chain(row[2..].iter().cloned()).collect()
    });
    let right: Vec<usize> = right.iter().map(|place| place - 1).collect();
    let body = render::columns(&[&["  arm"], &header[2..]].concat(), &right, cells.collect(), None);
    let mut lines = body.lines();
    let mut text = format!("{}\n{}\n", header[0], lines.next().unwrap_or_default());
    for (row, line) in rows.iter().zip(lines) {
        if !row[0].is_empty() {
            text.push_str(&row[0]);
            text.push('\n');
        }
        text.push_str(line);
        text.push('\n');
    }
    text
}

fn tested_row(label: String, arm: &str, tested: Option<Tested>, share: bool) -> Vec<String> {
    let mut row = vec![label, arm.to_owned()];
    match tested {
        Some(Tested { difference, p_holm }) => row.extend([
            change(difference.mean, share),
            interval(difference.low, difference.high, share, true),
            render::count(difference.n as u64),
            difference.p.map(render::p_value).unwrap_or_default(),
            p_holm.map(render::p_value).unwrap_or_default(),
        ]),
        None => row.extend(["-".to_owned(), String::new(), String::new(), String::new(), String::new()]),
    }
    row
}

/// `87.3 %`, `0.4123`.
pub(super) fn mean(found: &Estimate, share: bool) -> String {
    if share { format!("{} %", render::percent(found.mean)) } else { render::number(found.mean) }
}

/// `+2.1 pp`, `-0.4`.
pub(super) fn change(difference: f64, share: bool) -> String {
    if share { format!("{} pp", signed(render::percent(difference))) } else { signed(render::number(difference)) }
}

/// `[85.1, 89.2]`, or nothing.
pub(super) fn interval(low: Option<f64>, high: Option<f64>, share: bool, sign: bool) -> String {
    let (Some(low), Some(high)) = (low, high) else { return String::new() };
    let bound = |value: f64| {
        let text = if share { render::percent(value) } else { render::number(value) };
        if sign { signed(text) } else { text }
    };
    format!("[{}, {}]", bound(low), bound(high))
}

fn signed(number: String) -> String {
    if number.starts_with('-') || number.chars().all(|digit| matches!(digit, '0' | '.')) {
        number
    } else {
        format!("+{number}")
    }
}

/// What the numbers claim and how they were made; `is_corrected` where p stands there after Holm's correction alone.
pub(in crate::cli) fn meaning(comparison: &Comparison, is_corrected: bool) -> String {
    let tests = !comparison.differences.is_empty() || comparison.baseline.is_some();
    let fewest = comparison.arms.iter().map(|arm| arm.seeds).filter(|seeds| *seeds > 0).min().unwrap_or(0);
    let mut text = match comparison.claim {
        Claim::Recipe => format!(
            "Claim B, about the recipe: n counts seeds ({fewest} or more an arm); intervals are Student's t over seeds."
        ),
        Claim::Checkpoints if fewest > 1 => {
            "Claim A, about these checkpoints: n counts instances, each averaged over its seeds; intervals are Student's t, \
             Wilson's where all are 0 or 1.\nA claim about the recipe needs at least 5 seeds."
                .to_owned()
        }
        Claim::Checkpoints => "Claim A, about these checkpoints: n counts instances; intervals are Wilson's for shares, \
                               Student's t otherwise.\nA claim about the recipe needs at least 5 seeds."
            .to_owned(),
    };
    if tests {
        text.push_str(match comparison.claim {
            Claim::Recipe => "\nDifferences are paired by instance and seed; p is the t test's over seeds",
            Claim::Checkpoints => {
                "\nDifferences are paired by instance and seed: Student's t interval, p from sign flips within instances"
            }
        });
        text.push_str(if is_corrected {
            ".\nEvery p is after Holm's correction over the tests of a block."
        } else {
            ".\nHolm's correction is over the tests of a block."
        });
    }
    let mut shown = comparison.arms.iter().flat_map(|arm| arm.metrics.values().flatten());
    if comparison.claim == Claim::Checkpoints && shown.any(|found| found.low.is_none()) {
        text.push_str("\nWhere a run has but one number, n counts runs, and fewer than 5 of them give no interval.");
    }
    for line in places(comparison) {
        text.push('\n');
        text.push_str(&line);
    }
    text
}

/// Where curves were read, and whose weights were evaluated.
fn places(comparison: &Comparison) -> Vec<String> {
    let mut lines: Vec<(String, Vec<&str>)> = Vec::new();
    for (name, matched) in &comparison.matched {
        let amount = if matched.axis == "kl" {
            format!("a KL of {} from the start", render::number(matched.value))
        } else {
            format!("{} {}", render::number(matched.value), matched.axis)
        };
        let which = match (matched.is_common, name.ends_with("@auc")) {
            (true, true) => format!("mean height up to {amount}, where the shortest run ends"),
            (true, false) => format!("read at {amount}, the most that every run reached"),
            (false, _) => format!("read at {amount}"),
        };
        match lines.iter_mut().find(|(known, _)| *known == which) {
            Some((_, names)) => names.push(name),
            None => lines.push((which, vec![name])),
        }
    }
    let mut lines: Vec<String> =
        lines.into_iter().map(|(which, names)| format!("{}: {which}.", names.join(", "))).collect();
    let best = comparison.checkpoints.iter().filter(|(_, output)| output.rsplit('.').next() == Some("best"));
    let best: Vec<String> = best.map(|(stage, output)| format!("{stage} evaluates {output}")).collect();
    if !best.is_empty() {
        lines.push(format!("{}: the checkpoint that validation chose.", best.join(", ")));
    }
    lines
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::table::tests::comparison;

    #[test]
    fn a_narrow_terminal_breaks_no_name() {
        let narrow = text(&comparison(), Some(72));
        insta::assert_snapshot!(narrow, @r"
metric       arm              mean  95 % interval      n
sft.solved   drop=none      72.0 %   [70.0, 74.0]  1,000
             drop=progress  72.0 %   [70.0, 74.0]  1,000
grpo.solved  drop=none           -
             drop=progress       -

difference
  arm               mean  95 % interval      n        p  p (Holm)
grpo.solved - sft.solved
  drop=none      +6.1 pp   [+4.0, +8.2]  1,000  < 0.001   < 0.001
  drop=progress  +6.1 pp   [+4.0, +8.2]  1,000  < 0.001   < 0.001

baseline: drop=none
minus the baseline
  arm               mean  95 % interval      n        p
sft.solved
  drop=progress  -1.0 pp   [+4.0, +8.2]  1,000  < 0.001
grpo.solved
  drop=progress        -

Claim A, about these checkpoints: n counts instances; intervals are
Wilson's for shares, Student's t otherwise.
A claim about the recipe needs at least 5 seeds.
Differences are paired by instance and seed: Student's t interval, p
from sign flips within instances.
Holm's correction is over the tests of a block.
");
        assert!(narrow.lines().all(|line| line.chars().count() <= 72), "{narrow}");
    }
}
