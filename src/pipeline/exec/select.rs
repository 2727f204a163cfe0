//! Which nodes a name on the command line means: `stage`, `TRIAL/stage`, `EXPERIMENT/stage` or `EXPERIMENT/TRIAL/stage`.

use std::collections::BTreeSet;

use crate::pipeline::exec::ExecError;
use crate::pipeline::plan::{NodeName, Plan};

/// The nodes that `names` mean; a name that means none is an error. `option` is the option that they were given to.
pub fn nodes(plan: &Plan, names: &[String], option: &'static str) -> Result<BTreeSet<usize>, ExecError> {
    let mut found = BTreeSet::new();
    for wanted in names {
        let meant = plan.nodes.iter().enumerate().filter(|(_, node)| node.names.iter().any(|name| means(wanted, name)));
        let meant: Vec<usize> = meant.map(|(index, _)| index).collect();
        if meant.is_empty() {
            return Err(ExecError::UnknownStage { option, name: wanted.clone(), hint: hint(plan, wanted) });
        }
        found.extend(meant);
    }
    Ok(found)
}

/// The nodes of `roots` and everything that they need.
pub fn with_ancestors(plan: &Plan, roots: BTreeSet<usize>) -> Vec<bool> {
    let mut wanted = vec![false; plan.nodes.len()];
    for root in roots {
        wanted[root] = true;
    }
    // Producers stand before consumers, so one pass from the end finds everything.
    for index in (0..plan.nodes.len()).rev().filter(|index| wanted[*index]).collect::<Vec<_>>() {
        let mut stack = vec![index];
        while let Some(index) = stack.pop() {
            for edge in &plan.nodes[index].edges {
                if !wanted[edge.from] {
                    wanted[edge.from] = true;
                    stack.push(edge.from);
                }
            }
        }
    }
    wanted
}

fn means(wanted: &str, name: &NodeName) -> bool {
    let Some((above, stage)) = wanted.rsplit_once('/') else { return wanted == name.stage };
    stage == name.stage
        && (above == name.trial
            || above == name.experiment
            || above.strip_prefix(name.experiment.as_str()).and_then(|rest| rest.strip_prefix('/'))
                == Some(&name.trial))
}

fn hint(plan: &Plan, wanted: &str) -> String {
    let names = || plan.nodes.iter().flat_map(|node| &node.names);
    let known: BTreeSet<String> = if wanted.contains('/') {
        names()
            .flat_map(|name| [format!("{}/{}", name.trial, name.stage), format!("{}/{}", name.experiment, name.stage)])
            .collect()
    } else {
        names().map(|name| name.stage.clone()).collect()
    };
    let near = known.iter().map(|name| (strsim::damerau_levenshtein(wanted, name), name)).min();
    match near {
        Some((distance, name)) if distance <= 2.max(wanted.chars().count() / 3) => format!("did you mean `{name}`?"),
        _ => {
            let shown: Vec<String> = known.iter().take(12).map(|name| format!("`{name}`")).collect();
            let more = if known.len() > shown.len() { ", ..." } else { "" };
            format!("expected one of {}{more}", shown.join(", "))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_may_say_the_trial_and_the_experiment() {
        let of = |experiment: &str, trial: &str| NodeName {
            experiment: experiment.to_owned(),
            trial: trial.to_owned(),
            stage: "sft".to_owned(),
        };
        let name = of("maze", "seed=1");
        for wanted in ["sft", "seed=1/sft", "maze/sft", "maze/seed=1/sft"] {
            assert!(means(wanted, &name), "{wanted}");
        }
        for wanted in ["grpo", "seed=2/sft", "other/sft", "maze/seed=2/sft", "/sft"] {
            assert!(!means(wanted, &name), "{wanted}");
        }
        assert!(means("maze/sft", &of("maze", "")));
    }
}
