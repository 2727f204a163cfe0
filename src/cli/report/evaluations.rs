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
use crate::cli::stored::ERROR;
use crate::pipeline::plan::{Plan, State};
use crate::pipeline::spec::Experiment;
use crate::pipeline::stage::ArtifactType;
use crate::pipeline::store::Store;
use crate::tasks::maze::drawing::Drawing;

/// Colours of the page's style for the ways in which a row may end, each with what its name has in it.
const COLORS: [(&str, &str); 5] =
    [("solved", "good"), ("tokens", "cut"), ("cut off", "cut"), ("malformed", "form"), ("wall", "wall")];

/// The colours of the others, in their order.
const OTHERS: [&str; 5] = ["s5", "s3", "s7", "s1", "else"];

/// Arms whose rows are shown, and rows of each that are solved and that are not.
const ARMS: usize = 4;
const EACH: usize = 3;

/// Rows that are looked through for these.
const LOOKED_AT: usize = 400;

/// Characters of a completion that are shown.
const LONGEST: usize = 1200;

/// A measurement, and what its value has to be.
type Sign<'a> = (&'a str, &'a dyn Fn(f64) -> bool);

/// How many rows ended in which way; the first way that fits a row counts. Where the task has columns `error_*`, these are the
/// ways; else they are read from what every task measures, and from what mazes do.
fn endings(result: &StageResult) -> Option<Vec<(String, usize)>> {
    let rows = result.column("solved")?.len();
    let holds = |name: &str, row: usize, wanted: &dyn Fn(f64) -> bool| {
        result.column(name).and_then(|column| column.get(row).copied().flatten()).is_some_and(wanted)
    };
    let yes: &dyn Fn(f64) -> bool = &|value| value > 0.0;
    let no: &dyn Fn(f64) -> bool = &|value| value < 1.0;
    let solved: &dyn Fn(f64) -> bool = &|value| value >= 1.0;
    let mut ways: Vec<(String, Vec<Sign<'_>>)> = vec![("solved".to_owned(), vec![("solved", solved)])];
    let own: Vec<&str> = result.measured().filter(|name| name.starts_with(ERROR)).collect();
    if own.is_empty() {
        ways.push(("cut off".to_owned(), vec![("truncated", yes), ("finished", no)]));
        ways.push(("malformed".to_owned(), vec![("format", no)]));
        ways.push(("runs into a wall".to_owned(), vec![("wall_hits", yes)]));
    }
    ways.extend(own.iter().map(|name| (name[ERROR.len()..].replace('_', " "), vec![(*name, yes)])));
    ways.push((if own.is_empty() { "ends elsewhere" } else { "other" }.to_owned(), Vec::new()));
    let mut counts = vec![0; ways.len()];
    for row in 0..rows {
        let way = ways.iter().position(|(_, signs)| signs.iter().any(|(name, wanted)| holds(name, row, *wanted)));
        counts[way.unwrap_or(ways.len() - 1)] += 1;
    }
    Some(ways.into_iter().map(|(name, _)| name).zip(counts).collect())
}

/// The results of one evaluation that one bar is drawn of.
struct Asked {
    arms: Vec<String>,
    stage: String,
    nodes: Vec<usize>,
}

/// A bar an evaluation and arm; the evaluations in the order of `stages`, then of the plan.
pub(super) fn bars(experiment: &Experiment, plan: &Plan, store: &Store, stages: &[&str]) -> String {
    let arms = arms(experiment);
    let mut asked: Vec<Asked> = Vec::new();
    for (arm, trials) in &arms {
        let of_arm: Vec<_> = plan
            .trials
            .iter()
            .filter(|planned| planned.experiment == experiment.name)
            .filter(|planned| trials.iter().any(|trial| trial.name == planned.trial))
            .collect();
        let Some(first) = of_arm.first() else { continue };
        for (stage, _) in first.stages.iter().filter(|(_, place)| is_evaluation(plan, **place)) {
            let mut nodes: Vec<usize> = of_arm.iter().filter_map(|trial| trial.stages.get(stage).copied()).collect();
            nodes.sort_unstable();
            nodes.dedup();
            // What arms share is one bar.
            match asked.iter_mut().find(|known| known.stage == *stage && known.nodes == nodes) {
                Some(known) => known.arms.push((*arm).to_owned()),
                None => asked.push(Asked { arms: vec![(*arm).to_owned()], stage: stage.clone(), nodes }),
            }
        }
    }
    let place = |stage: &str| stages.iter().position(|known| *known == stage).unwrap_or(stages.len());
    let mut order: Vec<String> = Vec::new();
    for one in &asked {
        if !order.contains(&one.stage) {
            order.push(one.stage.clone());
        }
    }
    asked.sort_by_key(|one| (place(&one.stage), order.iter().position(|stage| *stage == one.stage)));
    let several = arms.len();
    let label = |shared: &[String]| match shared {
        _ if several == 1 => String::new(),
        shared if shared.len() == several => "all arms".to_owned(),
        [arm] => arm.clone(),
        [arm, others @ ..] => format!("{arm} and {}", render::plural(others.len(), "other")),
        [] => String::new(),
    };
    let counted = asked.into_par_iter().filter_map(|Asked { arms, stage, nodes }| {
        let mut sum: Vec<(String, usize)> = Vec::new();
        for node in nodes {
            let node = &plan.nodes[node];
            let key = node.key.as_ref().filter(|_| node.state == State::Cached)?;
            let manifest = store.manifest_of(key).ok()??;
            for (ending, count) in endings(&StageResult::read(&manifest, store).ok()?)? {
                match sum.iter_mut().find(|(known, _)| *known == ending) {
                    Some((_, sum)) => *sum += count,
                    None => sum.push((ending, count)),
                }
            }
        }
        Some((label(&arms), stage, sum))
    });
    let counted: Vec<_> = counted.collect();
    if counted.is_empty() {
        return String::new();
    }
    let mut names: Vec<&str> = Vec::new();
    for (ending, _) in counted.iter().flat_map(|(_, _, counts)| counts) {
        if !names.contains(&ending.as_str()) {
            names.push(ending);
        }
    }
    // What never happens needs no colour.
    names.retain(|name| {
        counted.iter().any(|(_, _, counts)| counts.iter().any(|(way, count)| way == name && *count > 0))
    });
    let mut others = OTHERS.iter();
    let mut colors: BTreeMap<&str, &str> = BTreeMap::new();
    for name in &names {
        let known = COLORS.iter().find(|(part, _)| name.contains(part)).map(|(_, color)| *color);
        let color = known.or_else(|| others.next().copied()).unwrap_or("else");
        colors.insert(name, color);
    }
    let mut text = String::from("<section>\n<h2>How attempts end</h2>\n<ul class=\"legend\">");
    for name in &names {
        let _ = write!(text, "<li><i style=\"background: var(--{})\"></i>{}</li>", colors[name], escaped(name));
    }
    text.push_str("</ul>\n<div class=\"bars\">\n");
    for (arm, stage, counts) in &counted {
        let all: usize = counts.iter().map(|(_, count)| count).sum();
        let stage = escaped(stage);
        let name = if arm.is_empty() { stage } else { format!("{stage}<br><small>{}</small>", escaped(arm)) };
        let _ = write!(text, "<div class=\"name\">{name}</div><div class=\"bar\">");
        for (ending, count) in counts.iter().filter(|(_, count)| *count > 0) {
            let share = *count as f64 / all as f64;
            let label = if share > 0.09 { format!("{} %", render::percent(share)) } else { String::new() };
            let _ = write!(
                text,
                "<span style=\"width: {:.2}%; background: var(--{})\" title=\"{}: {} of {}\">{label}</span>",
                100.0 * share,
                colors[ending.as_str()],
                escaped(ending),
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
    for (_, trials) in arms(experiment).iter().take(ARMS) {
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
        for row in shown {
            walk(row, &mut text);
        }
        text.push_str("</div>\n");
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
