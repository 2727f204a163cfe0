//! The results of an experiment as far as a table asks for them, read side by side.

use std::collections::{BTreeMap, BTreeSet};

use rayon::prelude::*;

use crate::cli::arms::Sample;
use crate::cli::curves::{Curves, Matched};
use crate::cli::failure::Failure;
use crate::cli::render;
use crate::cli::results::{StageResult, Values};
use crate::pipeline::plan::{Node, Plan, State};
use crate::pipeline::spec::point::{Axis, Point};
use crate::pipeline::spec::{Experiment, Trial};
use crate::pipeline::stage::ArtifactType;
use crate::pipeline::store::{Lookup, Store};

/// What a table is to show beside what the experiment's file says.
#[derive(Clone, Debug, Default)]
pub struct View {
    /// Names and patterns (`evaluate_*.solved*`) instead of `table.metrics`; none shows these.
    pub columns: Vec<String>,
    /// Where curves are read whose names say no point.
    pub at: Option<Point>,
}

/// The results of an experiment, by trial and stage.
pub(super) struct Results {
    by_trial: BTreeMap<String, BTreeMap<String, usize>>,
    by_node: BTreeMap<usize, StageRun>,
    /// What the points of some columns came to be, by the column's name.
    pub(super) matched: BTreeMap<String, Matched>,
    /// By column, what every run has of its axis, or the steps that every run has.
    common: BTreeMap<String, (f64, f64)>,
    at: Point,
}

/// The result of a node.
struct StageRun {
    stage: StageResult,
    curves: Curves,
}

/// One metric as it is named: `stage`, `metric`, and the point where a curve is read.
struct Column<'a> {
    stage: &'a str,
    whole: &'a str,
    curve: &'a str,
    point: Option<Point>,
}

impl<'a> Column<'a> {
    fn of(name: &'a str) -> Self {
        let (stage, whole) = split(name);
        let (curve, point) = Point::split(whole);
        Self { stage, whole, curve, point }
    }
}

/// `stage` and `metric` of `stage.metric`.
pub fn split(name: &str) -> (&str, &str) {
    name.split_once('.').unwrap_or((name, ""))
}

/// Whether `text` fits `pattern`, in which `*` stands for anything.
pub fn fits(pattern: &str, text: &str) -> bool {
    match pattern.split_once('*') {
        None => pattern == text,
        Some((begin, rest)) => text.strip_prefix(begin).is_some_and(|behind| {
            let ends = behind.char_indices().map(|(at, _)| at).chain([behind.len()]);
            ends.into_iter().any(|at| fits(rest, &behind[at..]))
        }),
    }
}

impl Results {
    /// Reads what the stages of `experiment` have that are named by a column or a difference, or by nothing: then every
    /// evaluation.
    pub(super) fn gather(
        experiment: &Experiment,
        plan: &Plan,
        store: Option<&Store>,
        view: &View,
        notes: &mut Vec<String>,
    ) -> Result<Self, Failure> {
        let table = &experiment.table;
        let columns = if view.columns.is_empty() { &table.metrics } else { &view.columns };
        let pairs = table.differences.iter().flat_map(|(first, second)| [first, second]);
        let asked: Vec<Column<'_>> = columns.iter().chain(pairs).map(|name| Column::of(name)).collect();
        let mut by_trial = BTreeMap::new();
        let mut open: BTreeMap<usize, &str> = BTreeMap::new();
        for trial in plan.trials.iter().filter(|trial| trial.experiment == experiment.name) {
            by_trial.insert(trial.trial.clone(), trial.stages.clone());
            for (stage, &place) in &trial.stages {
                let all = columns.is_empty() && is_evaluation(&plan.nodes[place]);
                if plan.nodes[place].state == State::Cached
                    && (all || asked.iter().any(|column| fits(column.stage, stage)))
                {
                    open.insert(place, stage);
                }
            }
        }
        let read = |(place, stage): (usize, &str)| -> Result<(usize, Result<Option<StageRun>, String>), Failure> {
            let node = &plan.nodes[place];
            let (Some(store), Some(key)) = (store, &node.key) else { return Ok((place, Ok(None))) };
            match store.lookup(key).map_err(|error| Failure::stage(&error))? {
                Lookup::Hit(manifest) => {
                    let result = StageResult::read(&manifest, store)
                        .map_err(|error| Failure::failed(format!("stage `{stage}`: {error:#}")))?;
                    let wanted =
                        |name: &str| asked.iter().any(|column| fits(column.stage, stage) && fits(column.curve, name));
                    let curves = if is_evaluation(node) {
                        Curves::default()
                    } else {
                        Curves::read(&store.logs(key), &manifest.params, &wanted)
                    };
                    Ok((place, Ok(Some(StageRun { stage: result, curves }))))
                }
                Lookup::Miss => Ok((place, Ok(None))),
                Lookup::Damaged { what } => Ok((place, Err(format!("`{stage}` is damaged: {what}")))),
            }
        };
        let read: Vec<_> = open.into_par_iter().map(read).collect::<Result<_, Failure>>()?;
        let mut by_node = BTreeMap::new();
        for (place, result) in read {
            match result {
                Ok(Some(result)) => drop(by_node.insert(place, result)),
                Ok(None) => {}
                Err(note) => notes.push(note),
            }
        }
        let at = view.at.unwrap_or(Point::Last);
        Ok(Self { by_trial, by_node, matched: BTreeMap::new(), common: BTreeMap::new(), at })
    }

    fn result(&self, trial: &Trial, stage: &str) -> Option<&StageRun> {
        self.by_node.get(self.by_trial.get(&trial.name)?.get(stage)?)
    }

    /// Settles where the curves among `names` are read: what every run of `trials` has of their axes.
    pub(super) fn settle<'n>(
        &mut self,
        trials: &[&Trial],
        names: impl IntoIterator<Item = &'n String>,
        notes: &mut Vec<String>,
    ) {
        for name in names {
            let column = Column::of(name);
            let runs = || trials.iter().filter_map(|trial| self.result(trial, column.stage));
            if runs().any(|run| run.stage.values(column.whole).is_some()) || runs().all(|run| run.curves.is_empty()) {
                continue;
            }
            let point = column.point.unwrap_or(self.at);
            let (common, matched) = match point {
                Point::Spent(axis, value) => {
                    let least = runs()
                        .map(|run| run.curves.most(axis))
                        .try_fold(f64::INFINITY, |least, most| most.map(|most| least.min(most)));
                    let Some(least) = least else {
                        notes.push(format!("`{name}`: `{}` does not record {}", column.stage, recorded(axis)));
                        continue;
                    };
                    let matched =
                        Matched { axis: axis.name(), value: value.unwrap_or(least), is_common: value.is_none() };
                    (Some((0.0, least)), Some(matched))
                }
                Point::Area => {
                    let spans = runs().filter_map(|run| run.curves.span(column.curve));
                    let span = spans.reduce(|one, other| (one.0.max(other.0), one.1.min(other.1)));
                    let axis = Axis::Steps.name();
                    (span, span.map(|(_, to)| Matched { axis, value: to, is_common: true }))
                }
                Point::Last | Point::Best | Point::Reaches { .. } => (None, None),
            };
            self.common.extend(common.map(|common| (name.clone(), common)));
            self.matched.extend(matched.map(|matched| (name.clone(), matched)));
        }
    }

    /// One column of one arm. Where one of its runs has no number at the point asked for, the arm has none: what is left out
    /// would be the slowest.
    pub(super) fn sample(&self, trials: &[&Trial], name: &str, notes: &mut BTreeSet<String>) -> Sample {
        let column = Column::of(name);
        let mut sample = Sample::default();
        let mut without = 0;
        for trial in trials {
            let Some(result) = self.result(trial, column.stage) else { continue };
            let values = result.stage.values(column.whole).or_else(|| {
                let point = column.point.unwrap_or(self.at);
                let read = result.curves.read_at(column.curve, point, self.common.get(name).copied());
                let is_curve = result.curves.span(column.curve).is_some();
                without += usize::from(is_curve && read.is_none());
                read.map(Values::Whole)
            });
            if let Some(values) = values {
                let seed = trial.seed.as_ref().map(ToString::to_string).unwrap_or_default();
                sample.seeds.insert(seed, values);
            }
        }
        if without > 0 {
            let arm = trials.first().map_or("", |trial| trial.arm.as_str());
            let of = if arm.is_empty() { String::new() } else { format!(" of {arm}") };
            notes.insert(format!(
                "`{name}`: {without} of {}{of} did not get there, so there is no number",
                render::plural(trials.len(), "run")
            ));
            return Sample::default();
        }
        sample
    }

    /// The stages that have a result, in the order in which they run, each with one of its nodes.
    fn stages(&self, experiment: &Experiment) -> Vec<(usize, &str)> {
        let mut stages: Vec<(usize, &str)> = Vec::new();
        let mut seen = BTreeSet::new();
        for trial in experiment.reported() {
            for (stage, &place) in self.by_trial.get(&trial.name).into_iter().flatten() {
                if self.by_node.contains_key(&place) && seen.insert(stage.as_str()) {
                    stages.push((place, stage));
                }
            }
        }
        stages.sort_unstable();
        stages
    }

    /// Every metric of every evaluation, stages in the order in which they run.
    pub(super) fn every_metric(&self, experiment: &Experiment) -> Vec<String> {
        let names = |(place, stage): (usize, &str)| {
            let metrics = self.by_node[&place].stage.metrics();
            metrics.into_iter().map(|metric| format!("{stage}.{metric}")).collect::<Vec<_>>()
        };
        self.stages(experiment).into_iter().flat_map(names).collect()
    }

    /// The names that `patterns` stand for; what has no `*` stands for itself.
    pub(super) fn expand(&self, experiment: &Experiment, patterns: &[String]) -> Result<Vec<String>, Failure> {
        let mut names: Vec<String> = Vec::new();
        for pattern in patterns {
            if !pattern.contains('*') {
                names.push(pattern.clone());
                continue;
            }
            let asked = Column::of(pattern);
            let mut found = 0;
            for (place, stage) in self.stages(experiment) {
                let result = &self.by_node[&place];
                let point = asked.point.map(|point| format!("@{point}")).unwrap_or_default();
                let metrics = result.stage.every_name().into_iter().filter(|name| fits(asked.whole, name));
                let curves = result.curves.names().filter(|name| fits(asked.curve, name));
                let metrics = metrics.chain(curves.map(|name| format!("{name}{point}")));
                for name in metrics.filter(|_| fits(asked.stage, stage)).map(|metric| format!("{stage}.{metric}")) {
                    found += 1;
                    if !names.contains(&name) {
                        names.push(name);
                    }
                }
            }
            if found == 0 {
                let known = self.every_metric(experiment);
                let failure =
                    Failure::wrong(format!("no result of `{}` has a metric like `{pattern}`", experiment.name));
                let shown = known.iter().take(8).cloned().collect::<Vec<_>>().join(", ");
                return Err(if shown.is_empty() { failure } else { failure.hint(format!("there are: {shown}")) });
            }
        }
        Ok(names)
    }

    /// Says why cells are empty.
    pub(super) fn note_missing(&self, trials: &[&Trial], wanted: &[&String], notes: &mut Vec<String>) {
        let mut told = BTreeSet::new();
        for name in wanted {
            let column = Column::of(name);
            let stage = column.stage;
            let having: Vec<&&Trial> = trials.iter().filter(|trial| trial.stages.contains_key(stage)).collect();
            let without = having.iter().filter(|trial| self.result(trial, stage).is_none()).count();
            if having.is_empty() {
                let known: BTreeSet<&str> =
                    trials.iter().flat_map(|trial| trial.stages.keys().map(String::as_str)).collect();
                let near = render::near(stage, known);
                let meant = near.first().map(|near| format!("; did you mean `{near}`?")).unwrap_or_default();
                notes.push(format!("`{name}`: there is no stage `{stage}`{meant}"));
            } else if without > 0 && told.insert(stage) {
                let of =
                    if having.len() > 1 { format!(" in {without} of {} trials", having.len()) } else { String::new() };
                notes.push(format!("`{stage}` has no result yet{of}"));
            }
            let Some(result) = having.iter().find_map(|trial| self.result(trial, stage)) else { continue };
            if result.stage.values(column.whole).is_none() && result.curves.span(column.curve).is_none() {
                let known = result.stage.known();
                let known = if known.is_empty() { "no metrics".to_owned() } else { known.join(", ") };
                notes.push(format!("`{stage}` measured no `{}`; it has {known}", column.whole));
            }
        }
    }
}

/// Whether a node's result holds measurements by instance.
fn is_evaluation(node: &Node) -> bool {
    node.spec.stage.outputs().iter().any(|output| output.artifact == ArtifactType::Evaluation)
}

/// What is missing where an axis is not recorded.
fn recorded(axis: Axis) -> &'static str {
    match axis {
        Axis::Steps => "steps",
        Axis::Completions => "completions",
        Axis::Tokens => "tokens",
        Axis::Seconds => "seconds",
        Axis::Kl => "its divergence from where it began: that needs `kl.beta` above 0",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_splits_at_its_first_dot() {
        assert_eq!(split("evaluate.solved.long"), ("evaluate", "solved.long"));
    }

    #[test]
    fn a_star_stands_for_anything() {
        assert!(fits("reward/*/mean", "reward/correct/mean") && fits("*", "") && fits("a*", "a"));
        assert!(fits("*.é*", "x.é") && !fits("reward/*/mean", "reward/mean") && !fits("solved", "solved.long"));
    }
}
