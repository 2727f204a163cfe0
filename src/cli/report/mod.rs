//! `pipe report`: what experiments asked and found, as one file that can be sent to somebody.
//!
//! The page is made of what the store has for the files as they are now; nothing runs. `html` holds the page, `chart` a curve's
//! picture, `trainings`, `evaluations` and `provenance` one part each.

mod chart;
mod evaluations;
mod html;
mod provenance;
mod trainings;

use std::fmt::Write as _;
use std::path::PathBuf;

use serde_json::json;

use crate::cli::comparison::{Comparison, View, split};
use crate::cli::failure::Failure;
use crate::cli::report::html::{escaped, page, table};
use crate::cli::{Files, Session, graph, render, table as tables};
use crate::pipeline::plan::Plan;
use crate::pipeline::spec::Experiment;
use crate::pipeline::store::Store;

/// Write what experiments found into one HTML file: tables, curves, rewards, errors, attempts, where it comes from
#[derive(Debug, clap::Args)]
pub struct Args {
    #[command(flatten)]
    files: Files,
    /// The file to write
    #[arg(long, short, value_name = "FILE", default_value = "report.html")]
    output: PathBuf,
}

/// With `--json`, `{output, bytes, experiments}`.
pub fn run(args: &Args, session: &Session) -> Result<(), Failure> {
    let experiments = session.read(&args.files.files, &args.files.sets)?;
    let store = session.existing_store()?.ok_or_else(|| {
        Failure::wrong(format!("there is no store at `{}`", session.store.display()))
            .hint("`pipe run` makes it; `--store DIR` or PIPE_STORE names another")
    })?;
    let plan = session.plan(&experiments, Some(&store))?;
    let names: Vec<&str> = experiments.iter().map(|experiment| experiment.name.as_str()).collect();
    let mut body = String::new();
    if names.len() > 1 {
        let links = names.iter().map(|name| format!("<a href=\"#{0}\">{0}</a>", escaped(name)));
        let _ = writeln!(body, "<nav>{}</nav>", links.collect::<String>());
    }
    for experiment in experiments.iter() {
        body.push_str(&part(session, experiment, &plan, &store)?);
    }
    if let Some(drawn) = graph::timed(&plan) {
        let _ = writeln!(
            body,
            "<section>\n<h2>Stages and what they took</h2>\n<div class=\"graph\">{drawn}</div>\n</section>"
        );
    }
    body.push_str(&provenance::section(&experiments, &plan, &store));
    let text = page(&names.join(", "), &body);
    std::fs::write(&args.output, &text)
        .map_err(|error| Failure::failed(format!("cannot write `{}`: {error}", args.output.display())))?;
    if session.ui.is_json() {
        return session.ui.json_line(&json!({"output": args.output, "bytes": text.len(), "experiments": names}));
    }
    session.ui.note(&format!("wrote `{}` ({})", args.output.display(), render::bytes(text.len() as f64)));
    Ok(())
}

/// The part of one experiment.
fn part(session: &Session, experiment: &Experiment, plan: &Plan, store: &Store) -> Result<String, Failure> {
    let comparison = Comparison::new(experiment, plan, Some(store), &View::default())?;
    let mut text = format!("<h1 id=\"{0}\">{0}</h1>\n", escaped(&experiment.name));
    for (place, line) in experiment.description.lines().enumerate() {
        let class = if place == 0 { " class=\"question\"" } else { "" };
        let _ = writeln!(text, "<p{class}>{}</p>", escaped(line));
    }
    let trials = experiment.reported().count();
    let about = format!("{}, {}", render::plural(trials, "trial"), render::plural(comparison.arms.len(), "arm"));
    let _ = writeln!(text, "<p class=\"faint\">{about}</p>\n<section>\n<h2>Results</h2>");
    if comparison.metrics.is_empty() {
        text.push_str("<p>No evaluation has a result yet.</p>\n");
    } else {
        for wide in tables::wide(&comparison) {
            text.push_str(&table(&wide, comparison.baseline.as_deref()));
        }
        let _ = writeln!(text, "<p class=\"claim\">{}</p>", escaped(&tables::meaning(&comparison, true)));
    }
    if !comparison.notes.is_empty() {
        let notes = comparison.notes.iter().map(|note| format!("<li>{}</li>", escaped(note)));
        let _ = writeln!(text, "<ul class=\"notes\">{}</ul>", notes.collect::<String>());
        session.ui.note(&format!("`{}` has {}", experiment.name, render::plural(comparison.notes.len(), "note")));
    }
    text.push_str("</section>\n");
    let trained = trainings::sections(experiment, plan, store);
    if !trained.is_empty() {
        let _ = write!(text, "<h2>Training</h2>\n{trained}");
    }
    let stages: Vec<&str> = comparison.metrics.iter().map(|name| split(name).0).collect();
    text.push_str(&evaluations::bars(experiment, plan, store, &stages));
    text.push_str(&evaluations::walks(experiment, plan, store, &stages));
    Ok(text)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::comparison::fake::ran;
    use crate::cli::ui::{Color, Ui};

    const TEXT: &str = r#"
        description = "Do more steps <help>?"
        [stages.train]
        kind = "fake_training"
        steps = 5
        rate = 0.1
        seed = 1
        [stages.evaluate]
        kind = "fake"
        solved = 8
        seed = 1
        [sweep]
        seeds = { path = "stages.train.seed", values = [1, 2] }
        [sweep.grid]
        "stages.train.rate" = [0.1, 0.2]
        [table]
        metrics = ["evaluate.solved", "train.reward@auc"]
        baseline = { rate = 0.1 }
    "#;

    fn body(run: bool) -> String {
        body_of(TEXT, run)
    }

    fn body_of(text: &str, run: bool) -> String {
        let (place, experiments, store) = ran(text, run);
        let ui = Ui::new(false, true, Color::Never);
        let session = Session { ui, store: place.path().join("store"), store_is_named: true };
        let plan = Plan::new(&experiments, Some(&store)).unwrap();
        let text = part(&session, &experiments[0], &plan, &store).unwrap();
        text + &graph::timed(&plan).unwrap() + &provenance::section(&experiments, &plan, &store)
    }

    #[test]
    fn a_report_has_every_part() {
        let text = body(true);
        for wanted in [
            "Do more steps &lt;help&gt;?",
            "4 trials, 2 arms",
            "Minus the baseline rate=0.1",
            "Claim A",
            "<h2>Training</h2>",
            "<figcaption>reward</figcaption>",
            "data-label=\"rate=0.2\"",
            "<h2>How attempts end</h2>",
            "<h2>Attempts</h2>",
            "maze9: not solved",
            "<h2>Where it comes from</h2>",
            "fake_training 1",
        ] {
            assert!(text.contains(wanted), "no `{wanted}` in {text}");
        }
        let (opened, closed) = (text.matches("<div").count(), text.matches("</div>").count());
        assert_eq!(opened, closed);
        assert_eq!(text.matches("<section>").count(), text.matches("</section>").count());
        assert!(!text.contains("NaN") && !text.contains("inf"), "{text}");
    }

    #[test]
    fn a_report_of_64_trials_is_small() {
        let rates: Vec<String> = (1..=64).map(|rate| format!("0.{rate:03}")).collect();
        let text = TEXT.replace("[0.1, 0.2]", &format!("[{}]", rates.join(", "))).replace("steps = 5", "steps = 400");
        let text = text.replace("values = [1, 2]", "values = [1]").replace("rate = 0.1 }", "rate = 0.001 }");
        let body = page("64", &body_of(&text, true));
        assert!(body.matches("class=\"curve\"").count() == 64 * 14, "a curve an arm and metric");
        assert!(body.len() < 1_000_000, "{} bytes", body.len());
    }

    #[test]
    fn a_report_of_nothing_says_so() {
        let text = body(false);
        assert!(text.contains("`evaluate` has no result yet in 4 of 4 trials"), "{text}");
        assert!(!text.contains("<h2>Training</h2>") && text.contains("no result"), "{text}");
    }
}
