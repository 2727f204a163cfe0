//! `pipe table`: arms by metrics, with intervals, tests, and what they are about.

use crate::cli::arms::Claim;
use crate::cli::comparison::{Comparison, Tested, difference_name};
use crate::cli::failure::Failure;
use crate::cli::ui::Look;
use crate::cli::{Files, Session, render};
use crate::pipeline::plan::Plan;
use crate::pipeline::spec::Experiment;
use crate::pipeline::store::Store;

/// Show the arms of experiments by their metrics: mean, interval, n, paired tests
#[derive(Debug, clap::Args)]
pub struct Args {
    #[command(flatten)]
    files: Files,
}

/// With `--json`, one object a line for each experiment.
pub fn run(args: &Args, session: &Session) -> Result<(), Failure> {
    let experiments = session.read(&args.files.files, &args.files.sets)?;
    let store = session.existing_store()?;
    let plan = session.plan(&experiments, store.as_ref())?;
    for (place, experiment) in experiments.iter().enumerate() {
        let comparison = Comparison::new(experiment, &plan, store.as_ref())?;
        if session.ui.is_json() {
            session.ui.json_line(&comparison)?;
            continue;
        }
        if place > 0 {
            session.ui.data("")?;
        }
        print(session, experiment, &comparison)?;
        note_accepted(session, experiment, &plan);
    }
    Ok(())
}

/// Says which results were accepted and not computed under the settings as they are.
fn note_accepted(session: &Session, experiment: &Experiment, plan: &Plan) {
    let accepted = plan.nodes.iter().filter_map(|node| {
        let name = node.names.iter().find(|name| name.experiment == experiment.name)?;
        let reason = &node.result.as_ref()?.accepted.as_ref()?.reason;
        Some(format!("`{name}` ({reason})"))
    });
    let accepted: Vec<String> = accepted.collect();
    if !accepted.is_empty() {
        session.ui.note(&format!("note: accepted and not computed anew: {}", accepted.join(", ")));
    }
}

/// The tables of a run that went well, where there is anything to show.
pub fn print_after_run(
    session: &Session,
    experiments: &[Experiment],
    plan: &Plan,
    store: &Store,
) -> Result<(), Failure> {
    for experiment in experiments {
        let comparison = Comparison::new(experiment, plan, Some(store))?;
        if comparison.has_results() {
            session.ui.data("")?;
            print(session, experiment, &comparison)?;
            note_accepted(session, experiment, plan);
        } else if !experiment.table.metrics.is_empty() {
            // Metrics were asked for, and there is no table to say so.
            comparison.notes.iter().for_each(|note| session.ui.note(&format!("note: {note}")));
        }
    }
    Ok(())
}

fn print(session: &Session, experiment: &Experiment, comparison: &Comparison) -> Result<(), Failure> {
    let ui = &session.ui;
    let heading = Look::Bold.on(&experiment.name, ui.output_color());
    let question = experiment.description.lines().next().unwrap_or_default();
    let heading = if question.is_empty() { heading } else { format!("{heading}: {question}") };
    ui.data(&format!("{heading}\n\n{}", text(comparison, ui.output_width())))?;
    for note in &comparison.notes {
        ui.note(&format!("note: {note}"));
    }
    Ok(())
}

const METRIC_HEADER: [&str; 5] = ["metric", "arm", "mean", "95 % interval", "n"];

/// The column of Holm's correction in [`tested_header`].
const HOLM: usize = 6;

fn tested_header(what: &str) -> [&str; 7] {
    [what, "arm", "mean", "95 % interval", "n", "p", "p (Holm)"]
}

/// Blocks of rows: metrics, differences within an arm, differences from the baseline; then what they mean.
fn text(comparison: &Comparison, width: Option<u16>) -> String {
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
                    if share { format!("{} %", render::percent(found.mean)) } else { render::number(found.mean) },
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
    blocks.push(meaning(comparison));
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
    render::columns(&header, &right, rows, width)
}

fn tested_row(label: String, arm: &str, tested: Option<Tested>, share: bool) -> Vec<String> {
    let mut row = vec![label, arm.to_owned()];
    match tested {
        Some(Tested { difference, p_holm }) => row.extend([
            if share {
                format!("{} pp", signed(render::percent(difference.mean)))
            } else {
                signed(render::number(difference.mean))
            },
            interval(difference.low, difference.high, share, true),
            render::count(difference.n as u64),
            difference.p.map(render::p_value).unwrap_or_default(),
            p_holm.map(render::p_value).unwrap_or_default(),
        ]),
        None => row.extend(["-".to_owned(), String::new(), String::new(), String::new(), String::new()]),
    }
    row
}

/// `[85.1, 89.2]`, or nothing.
fn interval(low: Option<f64>, high: Option<f64>, share: bool, sign: bool) -> String {
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

/// What the numbers claim and how they were made.
fn meaning(comparison: &Comparison) -> String {
    let tests = !comparison.differences.is_empty() || comparison.baseline.is_some();
    let fewest = comparison.arms.iter().map(|arm| arm.seeds).filter(|seeds| *seeds > 0).min().unwrap_or(0);
    let mut text = match comparison.claim {
        Claim::Recipe => format!(
            "Claim B, about the recipe: n counts seeds ({fewest} or more an arm); intervals are Student's t over seeds."
        ),
        Claim::Checkpoints if fewest > 1 => {
            "Claim A, about these checkpoints: n counts instances, each averaged over its seeds; intervals are Student's t.\n\
             A claim about the recipe needs at least 5 seeds."
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
        text.push_str(".\nHolm's correction is over the tests of a block.");
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::comparison::Arm;
    use crate::statistics::{Difference, Estimate};
    use std::collections::{BTreeMap, BTreeSet};

    fn comparison() -> Comparison {
        let estimate = |mean: f64| Some(Estimate { mean, low: Some(mean - 0.02), high: Some(mean + 0.02), n: 1000 });
        let difference = Difference { mean: 0.061, low: Some(0.04), high: Some(0.082), n: 1000, p: Some(0.0001) };
        let name = "grpo.solved - sft.solved".to_owned();
        let arm = |arm: &str, versus: Option<BTreeMap<String, Option<Tested>>>| Arm {
            arm: arm.to_owned(),
            seeds: 1,
            metrics: BTreeMap::from([("sft.solved".to_owned(), estimate(0.72)), ("grpo.solved".to_owned(), None)]),
            differences: BTreeMap::from([(name.clone(), Some(Tested { difference, p_holm: Some(0.0002) }))]),
            versus_baseline: versus,
        };
        let versus = Tested { difference: Difference { mean: -0.01, ..difference }, p_holm: Some(0.3) };
        Comparison {
            experiment: "maze".to_owned(),
            metrics: vec!["sft.solved".to_owned(), "grpo.solved".to_owned()],
            claim: Claim::Checkpoints,
            tuning: None,
            baseline: Some("drop=none".to_owned()),
            arms: vec![
                arm("drop=none", None),
                arm("drop=progress", Some([("sft.solved".to_owned(), Some(versus))].into())),
            ],
            notes: Vec::new(),
            shares: BTreeSet::from(["sft.solved".to_owned(), "grpo.solved".to_owned()]),
            differences: vec![("grpo.solved".to_owned(), "sft.solved".to_owned())],
        }
    }

    #[test]
    fn the_table_reads_well() {
        insta::assert_snapshot!(text(&comparison(), None), @r"
metric       arm              mean  95 % interval      n
sft.solved   drop=none      72.0 %   [70.0, 74.0]  1,000
             drop=progress  72.0 %   [70.0, 74.0]  1,000
grpo.solved  drop=none           -
             drop=progress       -

difference                arm               mean  95 % interval      n        p  p (Holm)
grpo.solved - sft.solved  drop=none      +6.1 pp   [+4.0, +8.2]  1,000  < 0.001   < 0.001
                          drop=progress  +6.1 pp   [+4.0, +8.2]  1,000  < 0.001   < 0.001

baseline: drop=none
minus the baseline  arm               mean  95 % interval      n        p
sft.solved          drop=progress  -1.0 pp   [+4.0, +8.2]  1,000  < 0.001
grpo.solved         drop=progress        -

Claim A, about these checkpoints: n counts instances; intervals are Wilson's for shares, Student's t otherwise.
A claim about the recipe needs at least 5 seeds.
Differences are paired by instance and seed: Student's t interval, p from sign flips within instances.
Holm's correction is over the tests of a block.
");
    }

    #[test]
    fn the_json_is_what_scripts_rely_on() {
        let json = serde_json::to_value(comparison()).unwrap();
        assert_eq!(json["claim"], "A");
        assert_eq!(json["arms"][0]["metrics"]["sft.solved"]["n"], 1000);
        assert_eq!(json["arms"][0]["metrics"]["grpo.solved"], serde_json::Value::Null);
        assert_eq!(json["arms"][0]["versus_baseline"], serde_json::Value::Null);
        assert_eq!(json["arms"][1]["versus_baseline"]["sft.solved"]["mean"], -0.01);
        assert_eq!(json["arms"][1]["differences"]["grpo.solved - sft.solved"]["p"], 0.0001);
    }

    #[test]
    fn a_single_arm_needs_no_column() {
        let mut one = comparison();
        one.arms.truncate(1);
        assert!(!text(&one, None).lines().next().unwrap().contains("arm"));
    }
}
