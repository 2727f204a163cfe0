//! Arms whose difference changes nothing: stages that say so have equal normal forms, and so has all that rests on them.

use std::collections::BTreeMap;

use crate::pipeline::plan::{Plan, PlanError, key};
use crate::pipeline::spec::Experiment;
use crate::pipeline::store::Digest;

/// Arms of one experiment that are the same arm.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SameArms {
    /// The experiment's name.
    pub experiment: String,
    /// Two or more, in the order of the file.
    pub arms: Vec<String>,
}

/// A digest for each stage of each seed.
type Recipes<'a> = BTreeMap<String, BTreeMap<&'a str, &'a Digest>>;

impl Plan {
    /// The arms of `experiments`, which the plan was made of, that provably compute the same but for rounding, as
    /// [`crate::pipeline::stage::Stage::normal_form`] has it.
    pub fn same_arms(&self, experiments: &[Experiment]) -> Result<Vec<SameArms>, PlanError> {
        let trials = || experiments.iter().flat_map(|experiment| &experiment.trials);
        let first = |experiment: &Experiment| experiment.trials.first().map(|trial| trial.arm.clone());
        let several = |experiment: &&Experiment| {
            experiment.trials.iter().any(|trial| Some(&trial.arm) != first(experiment).as_ref())
        };
        if !experiments.iter().any(|experiment| several(&experiment)) {
            return Ok(Vec::new());
        }
        let mut normal: Vec<Digest> = Vec::with_capacity(self.nodes.len());
        for node in &self.nodes {
            let made_by = |edge: &super::Edge| key::made_by(&normal[edge.from], &edge.output);
            let parts = node.parts(&node.spec.stage.normal_form(), &made_by);
            let recipe = key::recipe(&parts).map_err(|error| PlanError::stage(&node.spec, error))?;
            normal.push(recipe);
        }
        let mut arms: BTreeMap<(&str, &str), Recipes<'_>> = BTreeMap::new();
        for (trial, planned) in trials().zip(&self.trials) {
            let seed = trial.seed.as_ref().map(ToString::to_string).unwrap_or_default();
            let stages = planned.stages.iter().map(|(name, node)| (name.as_str(), &normal[*node])).collect();
            arms.entry((&planned.experiment, &trial.arm)).or_default().insert(seed, stages);
        }
        let mut same = Vec::new();
        for experiment in experiments.iter().filter(several) {
            let mut groups: Vec<(&Recipes<'_>, Vec<String>)> = Vec::new();
            for trial in &experiment.trials {
                let recipes = &arms[&(experiment.name.as_str(), trial.arm.as_str())];
                match groups.iter_mut().find(|(known, _)| *known == recipes) {
                    Some((_, names)) if names.contains(&trial.arm) => {}
                    Some((_, names)) => names.push(trial.arm.clone()),
                    None => groups.push((recipes, vec![trial.arm.clone()])),
                }
            }
            let several = groups.into_iter().map(|(_, arms)| arms).filter(|arms| arms.len() > 1);
            same.extend(several.map(|arms| SameArms { experiment: experiment.name.clone(), arms }));
        }
        Ok(same)
    }
}
