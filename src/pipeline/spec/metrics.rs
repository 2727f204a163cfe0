//! The metrics that a file names, held against what stages say they measure: known before anything runs.

use std::collections::BTreeSet;
use std::sync::Arc;

use crate::pipeline::spec::diagnostic::{Mistake, Report, did_you_mean, expected};
use crate::pipeline::spec::graph::{Checked, CheckedStages};
use crate::pipeline::spec::point::Point;
use crate::pipeline::spec::source::Span;
use crate::pipeline::spec::tree::Node;
use crate::pipeline::stage::Upstream;

/// Metrics by name, until a trial is met that has them.
pub(super) struct Wanted {
    open: Vec<Metric>,
    /// The stages of the document and of every trial.
    stages: BTreeSet<String>,
}

struct Metric {
    stage: String,
    name: String,
    span: Span,
    /// The section that names it.
    section: &'static str,
    /// What the stage measures instead, once it was met.
    known: Option<Vec<String>>,
    /// Where else there is one of that name.
    elsewhere: Option<String>,
}

impl Wanted {
    /// Nothing yet, of a document with these stages.
    pub(super) fn new(root: &Node) -> Self {
        let stages = root.get("stages").and_then(|entry| entry.node.table()).into_iter().flatten();
        Self { open: Vec::new(), stages: stages.map(|(name, _)| name.to_string()).collect() }
    }

    /// Adds the metric that `node` in `section` names as `STAGE.METRIC`, and gives the name.
    pub(super) fn add(&mut self, node: &Node, section: &'static str, report: &mut Report) -> String {
        let text = node.text().unwrap_or_default();
        match text.split_once('.') {
            Some((stage, name)) if !stage.is_empty() && !name.is_empty() => {
                let (stage, name) = (stage.to_owned(), name.to_owned());
                self.open.push(Metric { stage, name, span: node.span, section, known: None, elsewhere: None });
            }
            _ => {
                let mistake = Mistake::at(node.span, format!("`{text}` names no metric"));
                report.add(mistake.label("expected `STAGE.METRIC`, as in `evaluate.solved`"));
            }
        }
        text.to_owned()
    }

    /// Whether the document or a trial met so far has a stage of that name.
    pub(super) fn knows(&self, stage: &str) -> bool {
        self.stages.contains(stage)
    }

    /// Crosses out what one trial has, or may have.
    pub(super) fn meet(&mut self, trial: &CheckedStages, upstream: Upstream<'_>) {
        if self.open.is_empty() {
            return;
        }
        for name in trial.keys() {
            if !self.stages.contains(&**name) {
                self.stages.insert(name.to_string());
            }
        }
        let measured = |checked: &Checked| checked.spec.as_ref().and_then(|spec| spec.stage.metrics(&upstream));
        self.open.retain_mut(|metric| {
            let Some(checked) = trial.get(metric.stage.as_str()) else { return true };
            // Tables read curves too; nothing is tuned by the end of one.
            let curves = checked.spec.as_ref().filter(|_| metric.section == "table").map(|spec| spec.stage.curves());
            let (curve, _) = Point::split(&metric.name);
            if curves.is_some_and(|curves| curves.iter().any(|name| covers(name, curve))) {
                return false;
            }
            let Some(mut names) = measured(checked) else { return false };
            if names.iter().any(|name| covers(name, &metric.name)) {
                return false;
            }
            names.extend(curves.into_iter().flatten().map(|name| (*name).to_owned()));
            if metric.known.is_none() {
                // Nothing is tuned on the split `test`, so it is no place to point to.
                let is_tuned = metric.section != "table";
                let may = |checked: &Checked| {
                    let split = checked.spec.as_ref().and_then(|spec| spec.stage.split());
                    !is_tuned || split != Some("test")
                };
                let has = |checked: &&Arc<Checked>| {
                    may(checked)
                        && measured(checked).is_some_and(|names| names.iter().any(|name| covers(name, &metric.name)))
                };
                metric.elsewhere = trial.values().find(has).map(|checked| format!("{}.{}", checked.name, metric.name));
            }
            let known = metric.known.get_or_insert_default();
            for name in names {
                if !known.contains(&name) {
                    known.push(name);
                }
            }
            true
        });
    }

    /// Tells what no trial has.
    pub(super) fn report(self, report: &mut Report) {
        let stages = || self.stages.iter().map(String::as_str);
        for Metric { stage, name, span, section, known, elsewhere } in &self.open {
            let elsewhere = elsewhere.as_ref().map(|other| format!("did you mean `{other}`?"));
            match known {
                None if !self.stages.contains(stage) => {
                    let mistake = Mistake::at(*span, format!("unknown stage `{stage}` in `{section}`"));
                    report.add(mistake.label(expected(stages())).hint(did_you_mean(stage, stages())).absent_stage());
                }
                // No trial has come so far; what is wrong with it is told elsewhere.
                None => {}
                Some(known) if known.is_empty() => {
                    let mistake = Mistake::at(*span, format!("stage `{stage}` records no metrics"));
                    report.add(mistake.hint(elsewhere));
                }
                Some(known) => {
                    let names = || known.iter().map(String::as_str);
                    // Of a measurement over a part of the instances, the other parts are what one wants to see.
                    let measurement = |name: &str| name.split(['.', '/']).next().map(str::to_owned);
                    let akin: Vec<&str> = names().filter(|known| measurement(known) == measurement(name)).collect();
                    let label = if akin.is_empty() { expected(names()) } else { expected(akin) };
                    let mistake = Mistake::at(*span, format!("stage `{stage}` measures no `{name}`"));
                    report.add(mistake.label(label).hint(did_you_mean(name, names()).or(elsewhere)));
                }
            }
        }
    }
}

/// Whether a metric that a stage names is `name`, or a `...*` that `name` begins with.
fn covers(known: &str, name: &str) -> bool {
    known == name || known.strip_suffix('*').is_some_and(|begin| name.len() > begin.len() && name.starts_with(begin))
}

#[cfg(test)]
mod tests {
    use super::covers;
    use crate::pipeline::spec::testing::swept;

    #[test]
    fn metrics_that_no_stage_produces_are_told_before_anything_runs() {
        let table = "[table]\nmetrics = [\"score.solved\", \"score.solved.long\", \"score.solvd\", \"score.speed\", \"train.loss\"]\n\
                     differences = [[\"score.solved\", \"train.solved\"], [\"data.rows\", \"data.solved\"]]\n";
        insta::assert_snapshot!(swept(table).bad("a.toml", &[]), @r#"
            error: stage `score` measures no `solvd`
             --> a.toml:3:49
            3 | metrics = ["score.solved", "score.solved.long", "score.solvd", "score.speed", "train.loss"]
              |                                                 ^^^^^^^^^^^^^ expected one of `solved`, `solved.*`, `steps`
            hint: did you mean `solved`?

            error: stage `score` measures no `speed`
             --> a.toml:3:64
            3 | metrics = ["score.solved", "score.solved.long", "score.solvd", "score.speed", "train.loss"]
              |                                                                ^^^^^^^^^^^^^ expected one of `solved`, `solved.*`, `steps`

            error: stage `data` records no metrics
             --> a.toml:4:51
            4 | differences = [["score.solved", "train.solved"], ["data.rows", "data.solved"]]
              |                                                   ^^^^^^^^^^^

            error: stage `data` records no metrics
             --> a.toml:4:64
            4 | differences = [["score.solved", "train.solved"], ["data.rows", "data.solved"]]
              |                                                                ^^^^^^^^^^^^^
            hint: did you mean `score.solved`?
        "#);
    }

    #[test]
    fn a_metric_that_one_trial_has_is_enough() {
        let arm = "[[sweep.arm]]\nname = \"more\"\nstages.later = { kind = \"score\", model = \"train\" }\n[table]\n";
        swept(&format!("{arm}metrics = [\"later.solved\"]\n")).good("a.toml", &[]);
        insta::assert_snapshot!(swept(&format!("{arm}metrics = [\"later.solvd\", \"latr.solved\"]\n")).bad("a.toml", &[]), @r#"
            error: stage `later` measures no `solvd`
             --> a.toml:6:12
            6 | metrics = ["later.solvd", "latr.solved"]
              |            ^^^^^^^^^^^^^ expected one of `solved`, `solved.*`, `steps`
            hint: did you mean `solved`?

            error: unknown stage `latr` in `table`
             --> a.toml:6:27
            6 | metrics = ["later.solvd", "latr.solved"]
              |                           ^^^^^^^^^^^^^ expected one of `data`, `later`, `score`, `train`
            hint: did you mean `later`?
        "#);
    }

    #[test]
    fn what_a_wrong_stage_measures_is_not_asked() {
        let message = swept("[stages.score]\nsplit = 3\n[table]\nmetrics = [\"score.speed\"]\n").bad("a.toml", &[]);
        assert_eq!(message.matches("error:").count(), 1, "{message}");
    }

    #[test]
    fn a_star_covers_what_begins_so() {
        assert!(covers("solved", "solved") && covers("solved.*", "solved.long") && covers("solved.*", "solved.a.b"));
        assert!(!covers("solved.*", "solved") && !covers("solved.*", "solved.") && !covers("solved", "solved.long"));
    }
}
