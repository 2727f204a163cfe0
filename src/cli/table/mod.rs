//! `pipe table`: arms by metrics, with intervals, tests, and what they are about.

mod csv;
mod order;
mod paper;
mod text;

pub(in crate::cli) use paper::{Wide, tables as wide};
pub(in crate::cli) use text::meaning;

use crate::cli::comparison::{Comparison, View};
use crate::cli::failure::Failure;
use crate::cli::ui::Look;
use crate::cli::{Files, Session};
use crate::pipeline::plan::Plan;
use crate::pipeline::spec::Experiment;
use crate::pipeline::spec::point::Point;
use crate::pipeline::store::Store;

/// Show the arms of experiments by their metrics: mean, interval, n, paired tests
///
/// Curves of trainings stand beside evaluations: `STAGE.CURVE@POINT`, where POINT is `last`, `best`, `steps=100` (also
/// `completions`, `tokens`, `seconds`, `kl`), the same without a value for the most that every run reached, `steps_to>=0.5` for
/// how long it took, or `auc` for the mean height.
#[derive(Debug, clap::Args)]
pub struct Args {
    #[command(flatten)]
    files: Files,
    /// The columns instead of those of `[table]`, as `evaluate_grpo.solved*,grpo.reward/*/mean@best`; `*` stands for anything
    #[arg(long, value_name = "NAMES", value_delimiter = ',')]
    columns: Vec<String>,
    /// Where curves are read that say no point [default: last]
    #[arg(long, value_name = "POINT", value_parser = point)]
    at: Option<Point>,
    /// Order the arms by a column (greatest first) or a parameter
    #[arg(long, value_name = "NAME")]
    sort: Option<String>,
    /// Turn the order round
    #[arg(long)]
    reverse: bool,
    /// Show only arms of which this holds, as `learning_rate=1e-4` or `evaluate.solved>0.5`; may be given several times
    #[arg(long, value_name = "CONDITION")]
    filter: Vec<String>,
    /// How to write it [default: text]
    #[arg(long, value_enum, value_name = "text|markdown|csv|latex|json", hide_possible_values = true)]
    format: Option<Format>,
}

/// A way to write a table down.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
enum Format {
    /// For the terminal
    Text,
    /// For READMEs and issues
    #[value(alias = "md")]
    Markdown,
    /// One row a number, for other programs
    Csv,
    /// For papers; needs the package `booktabs`
    #[value(alias = "tex")]
    Latex,
    /// As `--json`
    Json,
}

fn point(text: &str) -> Result<Point, String> {
    Point::parse(text)
        .ok_or_else(|| "expected `last`, `best`, `steps=100`, `completions`, `seconds` or the like".to_owned())
}

/// With `--json`, one object a line for each experiment.
pub fn run(args: &Args, session: &Session) -> Result<(), Failure> {
    let experiments = session.read(&args.files.files, &args.files.sets)?;
    let store = session.existing_store()?;
    let plan = session.plan(&experiments, store.as_ref())?;
    let format = args.format.unwrap_or(if session.ui.is_json() { Format::Json } else { Format::Text });
    let view = View { columns: args.columns.clone(), at: args.at };
    for (place, experiment) in experiments.iter().enumerate() {
        let mut comparison = Comparison::new(experiment, &plan, store.as_ref(), &view)?;
        order::filter(&mut comparison, &args.filter)?;
        if let Some(name) = &args.sort {
            order::sort(&mut comparison, name, args.reverse)?;
        } else if args.reverse {
            comparison.arms.reverse();
        }
        let gap = if place > 0 { "\n" } else { "" };
        match format {
            Format::Json => {
                session.ui.json_line(&comparison)?;
                continue;
            }
            Format::Csv => session.ui.data(&csv::write(&comparison, place == 0))?,
            Format::Markdown => {
                session.ui.data(&format!("{gap}{}", paper::markdown(&comparison, &experiment.description)))?;
            }
            Format::Latex => {
                session.ui.data(&format!("{gap}{}", paper::latex(&comparison, &experiment.description)))?;
            }
            Format::Text => {
                if place > 0 {
                    session.ui.data("")?;
                }
                print(session, experiment, &comparison)?;
            }
        }
        if format != Format::Text {
            tell_notes(session, &comparison);
        }
        note_accepted(session, experiment, &plan);
    }
    Ok(())
}

fn tell_notes(session: &Session, comparison: &Comparison) {
    comparison.notes.iter().for_each(|note| session.ui.note(&format!("note: {note}")));
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
        let comparison = Comparison::new(experiment, plan, Some(store), &View::default())?;
        if comparison.has_results() {
            session.ui.data("")?;
            print(session, experiment, &comparison)?;
            note_accepted(session, experiment, plan);
        } else if !experiment.table.metrics.is_empty() {
            // Metrics were asked for, and there is no table to say so.
            tell_notes(session, &comparison);
        }
    }
    Ok(())
}

fn print(session: &Session, experiment: &Experiment, comparison: &Comparison) -> Result<(), Failure> {
    let ui = &session.ui;
    let heading = Look::Bold.on(&experiment.name, ui.output_color());
    let question = experiment.description.lines().next().unwrap_or_default();
    let heading = if question.is_empty() { heading } else { format!("{heading}: {question}") };
    ui.data(&format!("{heading}\n\n{}", text::text(comparison, ui.output_width())))?;
    tell_notes(session, comparison);
    Ok(())
}

#[cfg(test)]
pub(super) mod tests {
    use super::text::text;
    use super::*;
    use crate::cli::arms::Claim;
    use crate::cli::comparison::{Arm, Tested};
    use crate::statistics::{Difference, Estimate};
    use std::collections::{BTreeMap, BTreeSet};

    /// Two arms, a baseline and a difference.
    pub(in crate::cli::table) fn comparison() -> Comparison {
        let estimate = |mean: f64| Some(Estimate { mean, low: Some(mean - 0.02), high: Some(mean + 0.02), n: 1000 });
        let difference = Difference { mean: 0.061, low: Some(0.04), high: Some(0.082), n: 1000, p: Some(0.0001) };
        let name = "grpo.solved - sft.solved".to_owned();
        let arm = |arm: &str, versus: Option<BTreeMap<String, Option<Tested>>>| Arm {
            arm: arm.to_owned(),
            parameters: BTreeMap::new(),
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
            matched: BTreeMap::new(),
            checkpoints: BTreeMap::new(),
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
