//! `[sweep.tune]`: every arm gets the same number of tuning runs, on seeds of their own, and reports what they chose.
//!
//! All that may be reported is assigned here, for every candidate, so that it is checked before the first tuning run.

use std::collections::BTreeMap;

use serde_json::Value as Json;

use crate::pipeline::spec::diagnostic::{Mistake, Report};
use crate::pipeline::spec::sweep::assign::{assignment, check_count, combinations};
use crate::pipeline::spec::sweep::{Assignment, Axis, Source, Sweep, axes, is_same};
use crate::pipeline::spec::tree::{Entry, Node};
use crate::pipeline::spec::tune::Goal;

/// What the names of tuning trials begin with: no name of a path does.
const PREFIX: &str = "tune:";

/// A checked `[sweep.tune]`.
pub(in crate::pipeline::spec) struct Tune {
    /// What is tried.
    pub(super) axes: Vec<Axis>,
    /// The path of the reporting seeds, with other values.
    seeds: Axis,
    /// `STAGE.METRIC`.
    pub(in crate::pipeline::spec) metric: Node,
    /// Which is better.
    pub(in crate::pipeline::spec) goal: Goal,
}

/// One arm and all that is tried for it.
pub(in crate::pipeline::spec) struct Candidates {
    /// The arm's name.
    pub(in crate::pipeline::spec) arm: String,
    /// In the order of the grid.
    pub(in crate::pipeline::spec) all: Vec<Candidate>,
}

/// One combination of tuned values in one arm.
pub(in crate::pipeline::spec) struct Candidate {
    /// `learning_rate=0.0001`.
    pub(in crate::pipeline::spec) name: String,
    /// Path to value.
    pub(in crate::pipeline::spec) values: BTreeMap<String, Json>,
    /// One for each tuning seed.
    pub(in crate::pipeline::spec) tuning: Vec<Assignment>,
    /// One for each reporting seed, in case that it is chosen.
    pub(in crate::pipeline::spec) reporting: Vec<Assignment>,
}

/// The axes of `[sweep.tune]`'s grid.
pub(super) fn axes(tune: &Node, root: &Node, report: &mut Report) -> Vec<Axis> {
    tune.get("grid").map(|entry| axes::grid(&entry.node, Source::Tune, root, report)).unwrap_or_default()
}

impl Tune {
    /// The `[sweep.tune]` in `entry`, whose grid is `tuned`, beside the other axes of the sweep.
    pub(super) fn read(entry: &Entry, tuned: Vec<Axis>, axes: &[Axis], report: &mut Report) -> Option<Self> {
        let seeds = entry.node.get("seeds")?;
        let metric = entry.node.get("metric")?.node.clone();
        let goal = match entry.node.get("goal").and_then(|entry| entry.node.text()) {
            Some("min") => Goal::Min,
            _ => Goal::Max,
        };
        let candidates = tuned.iter().map(|axis| axis.points.len()).fold(1, usize::saturating_mul);
        // Without axes the grid is wrong, and that was told.
        if candidates < 2 && !tuned.is_empty() {
            let message = "there is nothing to choose from: the grid of `sweep.tune` has one candidate";
            report.add(Mistake::at(entry.key, message).hint("give a path several values".to_owned()));
            return None;
        }
        let Some(reporting) = axes.iter().find(|axis| axis.is_seed()) else {
            let message = "`sweep.tune` needs `sweep.seeds`: tuning and reporting differ in their seeds";
            let hint = "as `seeds = { path = \"params.seed\", values = [1, 2, 3] }` in `[sweep]`".to_owned();
            report.add(Mistake::at(seeds.key, message).about("seeds").hint(hint));
            return None;
        };
        let mut is_good = true;
        for value in seeds.node.array().unwrap_or_default() {
            if let Some(same) = reporting.values(0).find(|other| is_same(&other.json(), &value.json())) {
                let message = "a tuning seed is a reporting seed";
                let mistake = Mistake::at(value.span, message).also(same.span, "it reports");
                report.add(mistake.label("what was chosen on a seed looks better there than it is"));
                is_good = false;
            }
        }
        let mut points = Vec::new();
        for value in seeds.node.array().unwrap_or_default() {
            if points.iter().any(|point: &super::Point| is_same(&point.values[0].json(), &value.json())) {
                report.add(Mistake::at(value.span, "a tuning seed is given twice"));
                is_good = false;
            }
            if value.scalar_text().is_none() {
                report.add(Mistake::at(value.span, format!("{} is no seed", value.type_name())));
                is_good = false;
            }
            let column = &reporting.columns[0];
            let overlays = vec![Node::nested(&column.segments, column.key, value.clone())];
            points.push(super::Point { values: vec![value.clone()], overlays, sets: Vec::new() });
        }
        let columns = reporting.columns.clone();
        let seeds = Axis { columns, points, source: Source::Seeds };
        (is_good && !tuned.is_empty()).then_some(Self { axes: tuned, seeds, metric, goal })
    }
}

impl Sweep {
    /// Every arm with its candidates, as `tune` tries them.
    pub(in crate::pipeline::spec) fn candidates(&self, tune: &Tune, report: &mut Report) -> Vec<Candidates> {
        let (open, seeds): (Vec<&Axis>, Vec<&Axis>) = self.axes.iter().partition(|axis| !axis.is_seed());
        let [seed] = seeds.as_slice() else { return Vec::new() };
        let tuned: Vec<&Axis> = tune.axes.iter().collect();
        let counted: Vec<&Axis> = open.iter().chain(&tuned).copied().collect();
        if !check_count(&counted, (seed.points.len() + tune.seeds.points.len()) as u128, report) {
            return Vec::new();
        }
        // The axis of seeds comes last.
        let mut arms: Vec<(Vec<usize>, Vec<usize>)> = Vec::new();
        for mut chosen in self.kept(report) {
            let seed = chosen.pop().unwrap_or_default();
            match arms.last_mut().filter(|(arm, _)| *arm == chosen) {
                Some((_, seeds)) => seeds.push(seed),
                None => arms.push((chosen, vec![seed])),
            }
        }
        let mut found = Vec::new();
        for (arm, seeds) in arms {
            let own = || open.iter().copied().zip(arm.iter().copied());
            let name = assignment(own()).name;
            let mut all = Vec::new();
            for candidate in combinations(&tuned) {
                let values = || tuned.iter().copied().zip(candidate.iter().copied());
                let tuning = (0..tune.seeds.points.len()).map(|seed| {
                    let whole = assignment(own().chain(values()).chain([(&tune.seeds, seed)]));
                    Assignment { name: format!("{PREFIX}{}", whole.name), arm: name.clone(), ..whole }
                });
                let reporting = seeds.iter().map(|&at| {
                    let shown = assignment(own().chain([(*seed, at)]));
                    let whole = assignment(own().chain(values()).chain([(*seed, at)]));
                    Assignment { name: shown.name, arm: name.clone(), ..whole }
                });
                let (tuning, reporting) = (tuning.collect(), reporting.collect());
                let Assignment { name, values, .. } = assignment(values());
                all.push(Candidate { name, values, tuning, reporting });
            }
            found.push(Candidates { arm: name, all });
        }
        let first = || found.iter().filter_map(|arm: &Candidates| arm.all.first());
        self.check_names(first().flat_map(|one| &one.reporting).map(|one| one.name.as_str()), report);
        self.check_arms(first().flat_map(|one| &one.reporting), report);
        let tried = found.iter().flat_map(|arm| &arm.all).flat_map(|one| &one.tuning);
        self.check_names(tried.map(|one| one.name.as_str()), report);
        found
    }
}
