//! How the rows of evaluations came out, and some of them to look at.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::fs::File;
use std::path::Path;

use arrow_array::Array as _;
use arrow_array::cast::AsArray as _;
use arrow_schema::DataType;
use parquet::arrow::ProjectionMask;
use parquet::arrow::arrow_reader::ParquetRecordBatchReaderBuilder;
use rayon::prelude::*;

use crate::cli::render;
use crate::cli::report::html::escaped;
use crate::cli::report::trainings::arms;
use crate::cli::results::StageResult;
use crate::pipeline::plan::{Plan, State};
use crate::pipeline::spec::Experiment;
use crate::pipeline::stage::ArtifactType;
use crate::pipeline::store::Store;
use crate::tasks::maze::drawing::Drawing;

/// The ways in which a row may end, each with its colour in the page's style. The first that fits counts.
const ENDINGS: [(&str, &str); 5] =
    [("solved", "good"), ("cut off", "cut"), ("malformed", "form"), ("against a wall", "wall"), ("elsewhere", "else")];

/// Arms whose rows are shown, and rows of each that are solved and that are not.
const ARMS: usize = 4;
const EACH: usize = 3;

/// Rows that are looked through for these.
const LOOKED_AT: usize = 400;

/// Characters of a completion that are shown.
const LONGEST: usize = 1200;

/// Counts of the endings.
fn endings(result: &StageResult) -> Option<[usize; ENDINGS.len()]> {
    let solved = result.column("solved")?;
    let is = |name: &str, row: usize, wanted: &dyn Fn(f64) -> bool| {
        result.column(name).and_then(|column| column.get(row).copied().flatten()).is_some_and(wanted)
    };
    let mut counts = [0; ENDINGS.len()];
    for (row, solved) in solved.iter().enumerate() {
        let ending = if solved.is_some_and(|solved| solved >= 1.0) {
            0
        } else if is("truncated", row, &|cut| cut > 0.0) || is("finished", row, &|finished| finished < 1.0) {
            1
        } else if is("format", row, &|format| format < 1.0) {
            2
        } else if is("wall_hits", row, &|hits| hits > 0.0) {
            3
        } else {
            4
        };
        counts[ending] += 1;
    }
    Some(counts)
}

/// A bar an evaluation and arm.
pub(super) fn bars(experiment: &Experiment, plan: &Plan, store: &Store) -> String {
    let arms = arms(experiment);
    let mut asked: Vec<(usize, String, String, Vec<usize>)> = Vec::new();
    for (arm, trials) in &arms {
        let of_arm: Vec<_> = plan
            .trials
            .iter()
            .filter(|planned| planned.experiment == experiment.name)
            .filter(|planned| trials.iter().any(|trial| trial.name == planned.trial))
            .collect();
        let Some(first) = of_arm.first() else { continue };
        for (stage, place) in &first.stages {
            if !is_evaluation(plan, *place) {
                continue;
            }
            let mut nodes: Vec<usize> = of_arm.iter().filter_map(|trial| trial.stages.get(stage).copied()).collect();
            nodes.sort_unstable();
            nodes.dedup();
            // What arms share is one bar.
            if !asked.iter().any(|(_, _, known, other)| known == stage && *other == nodes) {
                asked.push((*place, (*arm).to_owned(), stage.clone(), nodes));
            }
        }
    }
    let order: BTreeMap<String, usize> =
        asked.iter().rev().map(|(place, _, stage, _)| (stage.clone(), *place)).collect();
    asked.sort_by_key(|(place, _, stage, _)| (order[stage], *place));
    let counted = asked.into_par_iter().filter_map(|(_, arm, stage, nodes)| {
        let mut sum = [0; ENDINGS.len()];
        for node in nodes {
            let node = &plan.nodes[node];
            let key = node.key.as_ref().filter(|_| node.state == State::Cached)?;
            let manifest = store.manifest_of(key).ok()??;
            let counts = endings(&StageResult::read(&manifest, store).ok()?)?;
            sum.iter_mut().zip(counts).for_each(|(sum, count)| *sum += count);
        }
        Some((arm, stage, sum))
    });
    let counted: Vec<_> = counted.collect();
    if counted.is_empty() {
        return String::new();
    }
    let mut text = String::from("<section>\n<h2>How attempts end</h2>\n<ul class=\"legend\">");
    for (place, (name, color)) in ENDINGS.iter().enumerate() {
        if counted.iter().any(|(_, _, counts)| counts[place] > 0) {
            let _ = write!(text, "<li><i style=\"background: var(--{color})\"></i>{name}</li>");
        }
    }
    text.push_str("</ul>\n<div class=\"bars\">\n");
    let several = arms.len() > 1;
    for (arm, stage, counts) in &counted {
        let all: usize = counts.iter().sum();
        let name = if several { format!("{stage}<br><small>{}</small>", escaped(arm)) } else { escaped(stage) };
        let _ = write!(text, "<div class=\"name\">{name}</div><div class=\"bar\">");
        for ((ending, color), count) in ENDINGS.iter().zip(counts).filter(|(_, count)| **count > 0) {
            let share = *count as f64 / all as f64;
            let label = if share > 0.09 { format!("{} %", render::percent(share)) } else { String::new() };
            let _ = write!(
                text,
                "<span style=\"width: {:.2}%; background: var(--{color})\" title=\"{ending}: {} of {}\">{label}</span>",
                100.0 * share,
                render::count(*count as u64),
                render::count(all as u64)
            );
        }
        text.push_str("</div>\n");
    }
    text.push_str("</div>\n</section>\n");
    text
}

fn is_evaluation(plan: &Plan, place: usize) -> bool {
    plan.nodes[place].spec.stage.outputs().iter().any(|output| output.artifact == ArtifactType::Evaluation)
}

/// A row as it is looked at.
struct Row {
    instance: String,
    data: Option<String>,
    prompt: String,
    completion: String,
    solved: bool,
}

/// Rows of the evaluation that stands last in the pipeline among `stages` (or all), of the first arms.
pub(super) fn walks(experiment: &Experiment, plan: &Plan, store: &Store, stages: &[&str]) -> String {
    let mut text = String::new();
    for (arm, trials) in arms(experiment).iter().take(ARMS) {
        let Some(first) = trials.first() else { continue };
        let planned = plan.trials.iter().find(|trial| trial.experiment == experiment.name && trial.trial == first.name);
        let Some(planned) = planned else { continue };
        let wanted = |stage: &str| stages.is_empty() || stages.contains(&stage);
        let evaluations = planned.stages.iter().filter(|(stage, place)| wanted(stage) && is_evaluation(plan, **place));
        let Some((stage, place)) = evaluations
            .max_by_key(|(stage, place)| (stages.iter().position(|known| *known == stage.as_str()), **place))
        else {
            continue;
        };
        let Some(rows) = rows_of(plan, *place, store) else { continue };
        let pick = |solved: bool| rows.iter().filter(move |row| row.solved == solved).take(EACH);
        let shown: Vec<&Row> = pick(false).chain(pick(true)).collect();
        if shown.is_empty() {
            continue;
        }
        let of = if first.name.is_empty() {
            String::new()
        } else {
            format!(" <span class=\"faint\">{}</span>", escaped(&first.name))
        };
        let _ = writeln!(text, "<h3>{}{of}</h3>\n<div class=\"walks\">", escaped(stage));
        shown.iter().for_each(|row| walk(row, &mut text));
        text.push_str("</div>\n");
        let _ = arm;
    }
    if text.is_empty() {
        return text;
    }
    format!(
        "<section>\n<h2>Attempts</h2>\n<p class=\"faint\">The first {EACH} that are not solved and the first {EACH} that are. In mazes \
         the walk is blue, what the reasoning visits grey, mistakes red; the pale band is the shortest way.</p>\n{text}</section>\n"
    )
}

fn walk(row: &Row, text: &mut String) {
    let data = row.data.as_ref().and_then(|data| serde_json::from_str(data).ok());
    let drawn = data.and_then(|data| Drawing::read(&data, Some(&row.completion)).ok());
    let word = if row.solved { "solved" } else { "not solved" };
    text.push_str("<div class=\"walk\">");
    let is_open = if let Some(drawn) = drawn {
        text.push_str(&drawn.picture().svg());
        ""
    } else {
        " open"
    };
    let shortened: String = row.completion.chars().take(LONGEST).collect();
    let more = if shortened.len() < row.completion.len() { " ..." } else { "" };
    let prompt: String = row.prompt.chars().take(LONGEST).collect();
    let _ = writeln!(
        text,
        "<details{is_open}><summary>{}: {word}</summary><pre>{}</pre><pre>{}{more}</pre></details></div>",
        escaped(&row.instance),
        escaped(&prompt),
        escaped(&shortened)
    );
}

fn rows_of(plan: &Plan, place: usize, store: &Store) -> Option<Vec<Row>> {
    let node = &plan.nodes[place];
    let key = node.key.as_ref().filter(|_| node.state == State::Cached)?;
    let manifest = store.manifest_of(key).ok()??;
    let output = manifest.outputs.iter().find(|output| output.artifact == ArtifactType::Evaluation)?;
    rows(&store.object(&output.digest).join("examples.parquet"))
}

/// The first rows of a table of examples; `None` where it cannot be read as one.
fn rows(path: &Path) -> Option<Vec<Row>> {
    let builder = ParquetRecordBatchReaderBuilder::try_new(File::open(path).ok()?).ok()?;
    let names = ["instance", "data", "prompt", "completion", "solved"];
    let fields = builder.schema().fields().clone();
    let roots = fields.iter().enumerate().filter(|(_, field)| names.contains(&field.name().as_str()));
    let mask = ProjectionMask::roots(builder.parquet_schema(), roots.map(|(place, _)| place).collect::<Vec<_>>());
    let mut rows = Vec::new();
    for batch in builder.with_projection(mask).with_limit(LOOKED_AT).build().ok()? {
        let batch = batch.ok()?;
        let text = |name: &str, row: usize| {
            let column = batch.column_by_name(name)?;
            let is_text = matches!(column.data_type(), DataType::Utf8) && !column.is_null(row);
            is_text.then(|| column.as_string::<i32>().value(row).to_owned())
        };
        let solved = batch.column_by_name("solved")?;
        let solved = match solved.data_type() {
            DataType::Float64 => solved.as_primitive::<arrow_array::types::Float64Type>(),
            _ => return None,
        };
        for row in 0..batch.num_rows() {
            rows.push(Row {
                instance: text("instance", row)?,
                data: text("data", row),
                prompt: text("prompt", row).unwrap_or_default(),
                completion: text("completion", row).unwrap_or_default(),
                solved: !solved.is_null(row) && solved.value(row) >= 1.0,
            });
        }
    }
    Some(rows)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_of_an_evaluation_are_read() {
        let folder = tempfile::tempdir().unwrap();
        crate::cli::results::fake::evaluation(folder.path(), &[("a", None, 1.0, None), ("b", None, 0.0, None)]);
        let rows = rows(&folder.path().join("examples.parquet")).unwrap();
        let shown: Vec<_> =
            rows.iter().map(|row| (row.instance.as_str(), row.completion.as_str(), row.solved)).collect();
        assert_eq!(shown, [("a", "up down", true), ("b", "up down", false)]);
        let mut text = String::new();
        walk(&rows[1], &mut text);
        assert!(text.contains("<details open><summary>b: not solved</summary>"), "{text}");
    }
}
