//! Arms whose difference changes nothing: stages that say so have equal normal forms, and so has all that rests on them.

use std::collections::{BTreeMap, HashMap, HashSet};

use crate::pipeline::plan::{Edge, Plan, PlanError, key};
use crate::pipeline::spec::Experiment;
use crate::pipeline::spec::tune::Purpose;
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
        let is_one_arm = |experiment: &Experiment| {
            let mut arms = experiment.reported().map(|trial| &trial.arm);
            let first = arms.next();
            arms.all(|arm| Some(arm) == first)
        };
        if experiments.iter().all(is_one_arm) {
            return Ok(Vec::new());
        }
        let mut normal: Vec<Digest> = Vec::with_capacity(self.nodes.len());
        for node in &self.nodes {
            let form = node.spec.stage.normal_form();
            // Where nothing upstream has a form of its own either, the recipe says it all.
            if form.is_none() && node.edges.iter().all(|edge| normal[edge.from] == self.nodes[edge.from].recipe) {
                normal.push(node.recipe.clone());
                continue;
            }
            let params = form.unwrap_or_else(|| node.spec.stage.params());
            let made_by = |edge: &Edge| key::made_by(&normal[edge.from], &edge.output);
            let recipe = key::recipe(&node.parts(&params, &made_by));
            normal.push(recipe.map_err(|error| PlanError::stage(&node.spec, error))?);
        }
        let mut arms: BTreeMap<(&str, &str), Recipes<'_>> = BTreeMap::new();
        let trials = experiments.iter().flat_map(|experiment| &experiment.trials);
        for (trial, planned) in trials.zip(&self.trials).filter(|(trial, _)| trial.purpose == Purpose::Report) {
            let seed = trial.seed.as_ref().map(ToString::to_string).unwrap_or_default();
            let stages = planned.stages.iter().map(|(name, node)| (name.as_str(), &normal[*node])).collect();
            arms.entry((&planned.experiment, &trial.arm)).or_default().insert(seed, stages);
        }
        let mut same = Vec::new();
        for experiment in experiments {
            let (mut seen, mut known) = (HashSet::new(), HashMap::new());
            let mut groups: Vec<Vec<String>> = Vec::new();
            for trial in experiment.reported().filter(|trial| seen.insert(&trial.arm)) {
                let recipes = &arms[&(experiment.name.as_str(), trial.arm.as_str())];
                let group = *known.entry(recipes).or_insert(groups.len());
                groups.resize_with(groups.len().max(group + 1), Vec::new);
                groups[group].push(trial.arm.clone());
            }
            let several = groups.into_iter().filter(|arms| arms.len() > 1);
            same.extend(several.map(|arms| SameArms { experiment: experiment.name.clone(), arms }));
        }
        Ok(same)
    }
}
