//! The trials of a tuned experiment: those that tune, cut down to what leads to the metric, and those of every candidate
//! that may be reported, so that a mistake in any of them is told before the first tuning run.

use std::collections::hash_map::Entry as Slot;
use std::collections::{BTreeSet, HashMap};
use std::sync::Arc;

use crate::pipeline::spec::Trial;
use crate::pipeline::spec::diagnostic::{Mistake, Report};
use crate::pipeline::spec::metrics::Wanted;
use crate::pipeline::spec::resolve::Resolver;
use crate::pipeline::spec::sweep::{Candidates, Tune};
use crate::pipeline::spec::tree::Node;
use crate::pipeline::spec::tune::{Candidate, Purpose, TunedArm, Tuning};

impl Resolver<'_> {
    /// The trials that tune, with the stages alone that lead to the metric, and what is chosen from.
    pub(super) fn tuned(
        &mut self,
        root: &Node,
        tune: &Tune,
        candidates: Vec<Candidates>,
        wanted: &mut Wanted,
        report: &mut Report,
    ) -> (Vec<Trial>, Tuning) {
        let metric = wanted.add(&tune.metric, "sweep.tune", report);
        let stage = metric.split('.').next().unwrap_or_default();
        let mistake = |message: String| Mistake::at(tune.metric.span, message);
        let cannot_tell = |one: &str, other: &str| {
            let label = format!("what they differ in does not lead to stage `{stage}`");
            mistake(format!("`{metric}` cannot tell `{one}` from `{other}`")).label(label).about("same")
        };
        let mut trials = Vec::new();
        let mut arms = Vec::new();
        // By arm, the candidates that are another under a second name there.
        let mut doubles: Vec<HashMap<String, String>> = Vec::new();
        for Candidates { arm, all } in candidates {
            // By the stages that lead to the metric: the same ones measure the same.
            let mut known: HashMap<Stages, (String, Vec<Stages>)> = HashMap::new();
            let mut double = HashMap::new();
            let mut candidates = Vec::new();
            for candidate in all {
                let mut tuning = Vec::new();
                let mut is_whole = true;
                for assignment in candidate.tuning {
                    let mut trial = self.trial(root, assignment, wanted, report);
                    let needed = self.needed_by(stage);
                    trial.stages.retain(|name, _| needed.contains(name.as_str()));
                    trial.purpose = Purpose::Tune;
                    if needed.is_empty() && wanted.knows(stage) {
                        report.add(mistake(format!(
                            "the arm `{arm}` is tuned by stage `{stage}`, which it does not have"
                        )));
                    }
                    let testing = trial.stages.iter().find(|(_, spec)| spec.stage.split() == Some("test"));
                    if let Some((stage, _)) = testing {
                        let hint =
                            format!("measure another split in a stage of its own: `{stage}` reads `split = \"test\"`");
                        report.add(mistake("the split `test` selects nothing".to_owned()).hint(hint).about("test"));
                    }
                    // Where a stage is wrong, what is left of it tells nothing.
                    is_whole &= !needed.is_empty() && trial.stages.len() == needed.len();
                    tuning.push(trial);
                }
                let reporting = candidate.reporting.into_iter();
                let reporting: Vec<Trial> =
                    reporting.map(|assignment| self.trial(root, assignment, wanted, report)).collect();
                if let Some(first) = tuning.first().filter(|_| is_whole) {
                    let reported: Vec<Stages> = reporting.iter().map(stages).collect();
                    match known.entry(stages(first)) {
                        Slot::Vacant(new) => drop(new.insert((candidate.name.clone(), reported))),
                        // The arm has nothing of what they differ in.
                        Slot::Occupied(same) if same.get().1 == reported => {
                            double.insert(candidate.name, same.get().0.clone());
                            continue;
                        }
                        Slot::Occupied(same) => report.add(cannot_tell(&same.get().0, &candidate.name)),
                    }
                }
                candidates.push(Candidate {
                    name: candidate.name,
                    assignment: candidate.values,
                    tuning: tuning.iter().map(|trial| trial.name.clone()).collect(),
                    reporting,
                });
                trials.extend(tuning);
            }
            arms.push(TunedArm { arm, candidates });
            doubles.push(double);
        }
        // What an arm leaves out may be tuned in the others; what is nowhere told apart was not meant.
        let is_everywhere = |one: &String, other: &String| {
            doubles.iter().all(|double| double.get(one).unwrap_or(one) == double.get(other).unwrap_or(other))
        };
        let idle = doubles.first().into_iter().flatten().filter(|(other, one)| is_everywhere(one, other)).min();
        report.extend(idle.map(|(other, one)| cannot_tell(one, other)));
        (trials, Tuning { metric: metric.clone(), goal: tune.goal, arms, choices: Vec::new() })
    }

    /// The stage `name` of the current trial and all that it needs; nothing where there is no such stage.
    fn needed_by(&self, name: &str) -> BTreeSet<&str> {
        let mut needed = BTreeSet::new();
        let mut stack: Vec<&str> = vec![name];
        while let Some(name) = stack.pop() {
            let Some((name, checked)) = self.current.get_key_value(name) else { continue };
            if needed.insert(&**name) {
                stack.extend(checked.edges.iter().filter_map(|edge| edge.reference.split('.').next()));
            }
        }
        needed
    }
}

/// The stages of a trial. One that is the same in two trials was checked once, and stands at one place in memory.
type Stages = Vec<*const ()>;

fn stages(trial: &Trial) -> Stages {
    trial.stages.values().map(|spec| Arc::as_ptr(&spec.stage).cast()).collect()
}
