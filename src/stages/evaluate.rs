//! `evaluate`: a model's solved share and other measurements on held-out instances. It runs in `pipe-worker`.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::pipeline::stage::{ArtifactType, Checkpoint, Input, Output, Part, Place, Problem, Stage, Tokens, Upstream};
use crate::stages::sampling::Filters;
use crate::stages::training::{Precision, task_of, task_parts, versions};

/// Let a model act on held-out instances and measure every episode by simulation.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[schemars(extend("additionalProperties" = false))]
pub struct Evaluate {
    /// The model.
    pub model: Input<Checkpoint>,
    /// The prompts, with their task.
    pub prompts: Input<Tokens>,
    /// The split of `prompts`.
    #[serde(default = "Evaluate::default_split")]
    pub split: String,
    /// Instances, from the beginning of the split; 0 takes all.
    #[serde(default)]
    pub samples: u64,
    /// Tokens in a completion, at most; a completion that reaches it is a failure and counts.
    #[schemars(range(min = 1))]
    pub max_new_tokens: u64,
    /// The sampling temperature; 0 is greedy.
    #[serde(default)]
    #[schemars(range(min = 0.0))]
    pub temperature: f64,
    /// Which tokens may be drawn, and what ends a completion.
    #[serde(flatten)]
    pub filters: Filters,
    /// The floating-point format of the model's passes.
    #[serde(default, skip_serializing_if = "Precision::is_default")]
    pub precision: Precision,
    /// Prompts generated at once.
    #[serde(default = "Evaluate::default_generation_chunk")]
    #[schemars(range(min = 1))]
    pub generation_chunk: u64,
    /// Decides every sampled token where the temperature is above 0.
    #[serde(default)]
    pub seed: u64,
}

impl Evaluate {
    fn default_split() -> String {
        "test".to_owned()
    }
    fn default_generation_chunk() -> u64 {
        256
    }
}

impl Stage for Evaluate {
    const KIND: &'static str = "evaluate";
    const VERSION: u32 = 2;
    const PLACE: Place = Place::Worker;

    fn outputs(&self) -> Vec<Output> {
        vec![Output::new("evaluation", ArtifactType::Evaluation)]
    }

    fn parts(&self) -> Vec<Part> {
        let mut parts =
            vec![Part::new("learn.generate", versions::GENERATE), Part::new("learn.model", versions::MODEL)];
        parts.extend(task_parts());
        parts
    }

    fn check(&self, _upstream: &Upstream<'_>) -> Vec<Problem> {
        self.filters.check("", self.temperature)
    }

    fn metrics(&self, upstream: &Upstream<'_>) -> Option<Vec<String>> {
        let task = task_of(*upstream, &self.prompts.reference)?;
        let measures: Vec<String> = task.measures().into_iter().map(|measure| measure.name.into_owned()).collect();
        // `MEASUREMENT.STRATUM` is a measurement over the instances of one stratum; of a task of the user's own they are not
        // known before it has run.
        let strata = task.strata().unwrap_or_else(|| vec!["*"]);
        let means: Vec<&str> = measures.iter().map(String::as_str).chain(["truncated"]).collect();
        let mut names: Vec<String> =
            means.iter().copied().chain(["completion_length", "n"]).map(str::to_owned).collect();
        if means.contains(&"solved") {
            names.extend(["solved_low", "solved_high"].map(str::to_owned));
        }
        let stratified = means.iter().copied().chain(["n"]);
        names.extend(stratified.flat_map(|name| strata.iter().map(move |stratum| format!("{name}.{stratum}"))));
        Some(names)
    }

    fn split(&self) -> Option<&str> {
        Some(&self.split)
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use serde_json::json;

    use super::*;

    #[test]
    fn metrics_are_the_tasks_measurements_in_all_and_by_stratum() {
        let evaluate: Evaluate =
            serde_json::from_value(json!({"model": "sft", "prompts": "tokens", "max_new_tokens": 8})).unwrap();
        let of = |task: serde_json::Value| {
            let stages = BTreeMap::from([("tokens".to_owned(), json!({"task": task}))]);
            Stage::metrics(&evaluate, &Upstream { stages: &stages })
        };
        let small = of(json!({"kind": "maze", "rows": 3, "columns": 3})).unwrap();
        let has = |name: &str| small.iter().any(|known| known == name);
        assert!(
            ["solved", "solved.short", "solved.medium", "progress", "n", "solved_low", "truncated.short"].map(has)
                == [true; 7]
        );
        assert!(!has("solved.long"), "no path in 3 x 3 cells has nine moves");
        let program = of(json!({"kind": "program", "command": ["x"], "measures": ["score"]}));
        let program = program.unwrap();
        assert!(
            program.iter().any(|name| name == "score.*") && !program.iter().any(|name| name == "solved_low"),
            "{program:?}"
        );
        assert_eq!(of(json!(null)), None, "the task is not known");
        assert_eq!(Stage::split(&evaluate), Some("test"));
    }
}
