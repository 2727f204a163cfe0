//! `pipe graph`: the stages of an experiment and what rests on what, drawn.
//!
//! A `drawing::Drawing` is what is to be seen; `layout` places it, and one file for each format writes it down.

mod dot;
mod drawing;
mod layout;
mod mermaid;
mod svg;
mod text;

use std::path::{Path, PathBuf};

use crate::cli::failure::Failure;
use crate::cli::graph::drawing::Drawing;
use crate::cli::{Files, Session, render};
use crate::pipeline::plan::Plan;

/// More stages than these are no picture any more.
const DRAWABLE: usize = 500;

/// Draw what rests on what; trials of a sweep lie on top of each other
#[derive(Debug, clap::Args)]
pub struct Args {
    #[command(flatten)]
    files: Files,
    /// Only this trial
    #[arg(long, value_name = "TRIAL")]
    trial: Option<String>,
    /// How to draw [default: as FILE is called, or else text]
    #[arg(long, value_enum, value_name = "text|svg|dot|mermaid", hide_possible_values = true)]
    format: Option<Format>,
    /// Write into this file, whose ending says the format
    #[arg(long, short, value_name = "FILE")]
    output: Option<PathBuf>,
}

/// A way to write a graph down.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
enum Format {
    /// For the terminal
    Text,
    /// A picture
    Svg,
    /// For Graphviz
    Dot,
    /// For Markdown
    Mermaid,
}

impl Format {
    fn of(file: &Path) -> Option<Self> {
        match file.extension()?.to_str()? {
            "txt" => Some(Self::Text),
            "svg" => Some(Self::Svg),
            "dot" | "gv" => Some(Self::Dot),
            "mmd" | "mermaid" => Some(Self::Mermaid),
            _ => None,
        }
    }
}

/// The whole plan as SVG, with what each stage took; `None` where it is too large to look at.
pub fn timed(plan: &Plan) -> Option<String> {
    let drawing = Drawing::of(plan, None, true);
    (drawing.vertices.len() <= DRAWABLE).then(|| svg::write(&drawing))
}

/// With `--json`, `{stages: [{experiment, stage, kind, count, trials, states}], edges: [{from, to, outputs}]}`, where `from`
/// and `to` count the stages from 0.
pub fn run(args: &Args, session: &Session) -> Result<(), Failure> {
    let format = match (args.format, &args.output) {
        (Some(format), _) => format,
        (None, None) => Format::Text,
        (None, Some(file)) => Format::of(file).ok_or_else(|| {
            let problem = format!("`{}` does not say which format is meant", file.display());
            Failure::wrong(problem).hint("it ends in `.svg`, `.dot`, `.mmd` or `.txt`, or `--format` says it")
        })?,
    };
    let experiments = session.read(&args.files.files, &args.files.sets)?;
    let store = session.existing_store()?;
    let plan = session.plan(&experiments, store.as_ref())?;
    if let Some(wanted) = args.trial.as_deref().filter(|wanted| !plan.trials.iter().any(|trial| trial.trial == *wanted))
    {
        let near = render::near(wanted, plan.trials.iter().map(|trial| trial.trial.as_str()));
        let failure = Failure::wrong(format!("there is no trial `{wanted}`"));
        return Err(match near.first() {
            Some(near) => failure.hint(format!("did you mean `{near}`?")),
            None => failure.hint("`pipe plan` names the trials"),
        });
    }
    let drawing = Drawing::of(&plan, args.trial.as_deref(), false);
    if session.ui.is_json() {
        return session.ui.json_pretty(&drawing);
    }
    let count = drawing.vertices.len();
    if count > DRAWABLE && format != Format::Dot {
        let problem = format!("{} are too many to draw", render::plural(count, "stage"));
        return Err(Failure::wrong(problem).hint("`--format dot` writes them for a program that lays out large graphs"));
    }
    let color = args.output.is_none() && session.ui.output_color();
    let text = match format {
        Format::Text => text::write(&drawing, color, session.ui.output_width().map_or(usize::MAX, usize::from)),
        Format::Svg => svg::write(&drawing),
        Format::Dot => dot::write(&drawing),
        Format::Mermaid => mermaid::write(&drawing),
    };
    match &args.output {
        None => session.ui.data(&text),
        Some(file) => std::fs::write(file, text)
            .map_err(|error| Failure::failed(format!("cannot write `{}`: {error}", file.display()))),
    }
}
