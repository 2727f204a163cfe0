//! The curves of an experiment's trainings: a line an arm, over its seeds, and what the rewards were worth.

use std::collections::BTreeMap;
use std::fmt::Write as _;

use rayon::prelude::*;
use serde_json::Value;

use crate::cli::comparison::fits;
use crate::cli::curves::Curves;
use crate::cli::render;
use crate::cli::report::chart::{Line, chart};
use crate::cli::report::html::{escaped, table};
use crate::cli::table::Wide;
use crate::pipeline::plan::Plan;
use crate::pipeline::spec::{Experiment, Trial};
use crate::pipeline::store::Store;
use crate::statistics::curve::Curve;

/// What is drawn, the most telling first.
const SHOWN: [&str; 16] = [
    "validation/solved",
    "validation/reward",
    "reward",
    "loss",
    "reward/*/mean",
    "token_accuracy",
    "rollout/solved",
    "completions/mean_length",
    "completions/clipped_share",
    "policy/entropy",
    "policy/old_kl",
    "policy/reference_k3",
    "groups/all_equal",
    "gradient_norm",
    "learning_rate",
    "reward/*/variance_share",
];

/// Charts of one training.
const MOST: usize = 15;

/// The last share of a run's steps over which rewards are averaged.
const END: usize = 10;

/// A training run.
struct Run {
    curves: Curves,
    params: Value,
}

/// Arms in the order of the file, each with its trials.
pub(super) fn arms(experiment: &Experiment) -> Vec<(&str, Vec<&Trial>)> {
    let mut arms: Vec<(&str, Vec<&Trial>)> = Vec::new();
    for trial in experiment.reported() {
        match arms.iter_mut().rev().find(|(arm, _)| *arm == trial.arm) {
            Some((_, trials)) => trials.push(trial),
            None => arms.push((&trial.arm, vec![trial])),
        }
    }
    arms
}

/// The runs that one line is drawn of.
struct Group {
    label: String,
    color: usize,
    nodes: Vec<usize>,
}

/// The sections of every training that has curves.
pub(super) fn sections(experiment: &Experiment, plan: &Plan, store: &Store) -> String {
    let arms = arms(experiment);
    let places: BTreeMap<&str, &BTreeMap<String, usize>> = plan
        .trials
        .iter()
        .filter(|trial| trial.experiment == experiment.name)
        .map(|trial| (trial.trial.as_str(), &trial.stages))
        .collect();
    let mut stages: Vec<(usize, &str)> = Vec::new();
    for (stage, place) in places.values().flat_map(|stages| stages.iter()) {
        match stages.iter_mut().find(|(_, known)| known == stage) {
            Some((first, _)) => *first = (*first).min(*place),
            None => stages.push((*place, stage)),
        }
    }
    stages.sort_unstable();
    let mut text = String::new();
    for (_, stage) in stages {
        let mut groups: Vec<Group> = Vec::new();
        for (color, (arm, trials)) in arms.iter().enumerate() {
            let nodes = trials.iter().filter_map(|trial| places.get(trial.name.as_str())?.get(stage).copied());
            let mut nodes: Vec<usize> = nodes.collect();
            nodes.sort_unstable();
            match groups.iter_mut().find(|group| group.nodes == nodes) {
                Some(group) => group.label.extend(["\n", arm]),
                None => groups.push(Group { label: (*arm).to_owned(), color, nodes }),
            }
        }
        for group in &mut groups {
            let count = group.label.lines().count();
            if count == arms.len() {
                group.label = String::new();
            } else if count > 1 {
                let first = group.label.lines().next().unwrap_or_default();
                group.label = format!("{first} and {}", render::plural(count - 1, "other"));
            }
        }
        let mut nodes: Vec<usize> = groups.iter().flat_map(|group| group.nodes.iter().copied()).collect();
        nodes.sort_unstable();
        nodes.dedup();
        let read = |node: usize| {
            let key = plan.nodes[node].key.as_ref()?;
            let manifest = store.manifest_of(key).ok()??;
            let wanted = |name: &str| SHOWN.iter().any(|shown| fits(shown, name));
            let curves = Curves::read(&store.logs(key), &manifest.params, &wanted);
            (!curves.is_empty()).then(|| (node, Run { curves, params: manifest.params.clone() }))
        };
        let runs: BTreeMap<usize, Run> = nodes.into_par_iter().filter_map(read).collect();
        let kind =
            plan.nodes.get(runs.keys().next().copied().unwrap_or(usize::MAX)).map_or("", |node| node.spec.kind.name);
        text.push_str(&section(stage, kind, &groups, &runs));
    }
    text
}

fn section(stage: &str, kind: &str, groups: &[Group], runs: &BTreeMap<usize, Run>) -> String {
    let mut charts = Vec::new();
    for pattern in SHOWN {
        let mut names: Vec<&str> =
            runs.values().flat_map(|run| run.curves.names()).filter(|name| fits(pattern, name)).collect();
        names.sort_unstable();
        names.dedup();
        for name in names {
            let lines: Vec<Line> = groups.iter().map(|group| line(group, runs, name)).collect();
            let lines: Vec<Line> = lines.into_iter().filter(|line| line.points.len() > 1).collect();
            charts.push(chart(name, "step", &lines));
        }
    }
    charts.retain(|chart| !chart.is_empty());
    charts.truncate(MOST);
    if charts.is_empty() {
        return String::new();
    }
    let mut text = format!("<section>\n<h3>{} <span class=\"faint\">{}</span></h3>\n", escaped(stage), escaped(kind));
    if groups.len() > 1 {
        text.push_str("<ul class=\"legend\">\n");
        for group in groups {
            let (label, color) = (escaped(&group.label), group.color % super::chart::COLORS);
            let _ =
                writeln!(text, "<li data-label=\"{label}\"><i style=\"background: var(--s{color})\"></i>{label}</li>");
        }
        text.push_str("</ul>\n");
    }
    let seeds = groups.iter().map(|group| group.nodes.len()).max().unwrap_or(1);
    if seeds > 1 {
        let bands = if groups.len() > 8 { "" } else { "; bands reach from the lowest to the highest" };
        let _ = writeln!(text, "<p class=\"faint\">Curves are means over {seeds} seeds{bands}.</p>");
    }
    let _ = writeln!(text, "<div class=\"charts\">\n{}</div>", charts.concat());
    text.push_str(&decomposition(groups, runs));
    text.push_str("</section>\n");
    text
}

/// The mean over the runs of a group at the steps that all of them have.
fn line(group: &Group, runs: &BTreeMap<usize, Run>, name: &str) -> Line {
    let curves: Vec<_> = group.nodes.iter().filter_map(|node| Some(runs.get(node)?.curves.over_steps(name))).collect();
    let mut at: BTreeMap<u64, Vec<f64>> = BTreeMap::new();
    for (step, value) in curves.iter().flat_map(Curve::points) {
        at.entry(*step as u64).or_default().push(*value);
    }
    let points = at.into_iter().filter(|(_, values)| values.len() == curves.len()).map(|(step, values)| {
        let mean = values.iter().sum::<f64>() / values.len() as f64;
        let (low, high) = (values.iter().copied().reduce(f64::min), values.iter().copied().reduce(f64::max));
        (step as f64, mean, low.unwrap_or(mean), high.unwrap_or(mean))
    });
    Line { label: group.label.clone(), color: group.color, points: points.collect() }
}

/// A number for the points of a curve.
type Summary<'a> = &'a dyn Fn(&[(f64, f64)]) -> f64;

/// What each reward was at the beginning and at the end, and how much of the total's variance it makes.
fn decomposition(groups: &[Group], runs: &BTreeMap<usize, Run>) -> String {
    let mut rows = Vec::new();
    for group in groups {
        let mut names: Vec<&str> = group
            .nodes
            .iter()
            .filter_map(|node| runs.get(node))
            .flat_map(|run| run.curves.names())
            .filter_map(|name| name.strip_prefix("reward/")?.strip_suffix("/mean"))
            .collect();
        names.sort_unstable();
        names.dedup();
        for name in names {
            let mean = |curve: &str, of: Summary<'_>| {
                let curves = group.nodes.iter().filter_map(|node| Some(runs.get(node)?.curves.over_steps(curve)));
                let values: Vec<f64> =
                    curves.filter(|curve| !curve.points().is_empty()).map(|curve| of(curve.points())).collect();
                (!values.is_empty()).then(|| values.iter().sum::<f64>() / values.len() as f64)
            };
            let average = |points: &[(f64, f64)]| points.iter().map(|(_, y)| y).sum::<f64>() / points.len() as f64;
            let part = |points: &[(f64, f64)]| points.len().div_ceil(END);
            let begin = |points: &[(f64, f64)]| average(&points[..part(points)]);
            let end = |points: &[(f64, f64)]| average(&points[points.len() - part(points)..]);
            let value = format!("reward/{name}/mean");
            let share = mean(&format!("reward/{name}/variance_share"), &average);
            let weight = group.nodes.iter().find_map(|node| {
                runs.get(node)?.params.get("rewards")?.get(name)?.get("weight").and_then(Value::as_f64)
            });
            let weight = weight.unwrap_or(1.0);
            let number = |value: Option<f64>| value.map_or_else(|| "-".to_owned(), render::number);
            let end = mean(&value, &end);
            rows.push(vec![
                if group.label.is_empty() { name.to_owned() } else { format!("{}: {name}", group.label) },
                render::number(weight),
                number(mean(&value, &begin)),
                number(end),
                number(end.map(|end| weight * end)),
                share.map_or_else(|| "-".to_owned(), |share| format!("{} %", render::percent(share))),
            ]);
        }
    }
    if rows.is_empty() {
        return String::new();
    }
    let header = ["reward", "weight", "first tenth", "last tenth", "weighted", "share of the variance"];
    let wide =
        Wide { title: "What the reward is made of".to_owned(), header: header.map(str::to_owned).to_vec(), rows };
    format!(
        "{}<p class=\"faint\">Means over completions in the first and the last tenth of the steps; the share of the \
         variance is w Cov(r, R) / Var(R) within groups, over all steps.</p>\n",
        table(&wide, None)
    )
}
