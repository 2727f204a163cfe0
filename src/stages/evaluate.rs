//! `evaluate`: a model's solved share and other measurements on held-out instances. It runs in `pipe-worker`.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::pipeline::stage::{ArtifactType, Checkpoint, Input, Output, Part, Place, Problem, Stage, Tokens, Upstream};
use crate::rewards::COMPLETION_LENGTH;
use crate::stages::sampling::Filters;
use crate::stages::training::{Precision, task_of, task_parts, versions};
use crate::tasks::DIAGNOSES_VERSION;

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
    /// Completions of each instance. From 2 on, `pass@k` is told for every power of two k of which there are twice as many, and
    /// intervals rest on the instances, however many completions each has.
    #[serde(default = "Evaluate::default_samples_per_prompt", skip_serializing_if = "Evaluate::is_one")]
    #[schemars(range(min = 1))]
    #[schemars(extend("default" = 1))]
    pub samples_per_prompt: u64,
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
    #[schemars(extend("default" = "fp32"))]
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
    fn default_samples_per_prompt() -> u64 {
        1
    }
    fn default_generation_chunk() -> u64 {
        256
    }

    // A parameter that came later: keys from before it stay what they were.
    #[expect(clippy::trivially_copy_pass_by_ref, reason = "serde hands a reference")]
    fn is_one(samples: &u64) -> bool {
        *samples == 1
    }

    /// The k of every `pass@k`: powers of two with at least twice as many completions an instance. None of a single one.
    pub fn pass_at(&self) -> impl Iterator<Item = u64> {
        let most = self.samples_per_prompt / 2;
        std::iter::successors(Some(1u64), |k| k.checked_mul(2)).take_while(move |k| *k <= most)
    }
}

impl Stage for Evaluate {
    const KIND: &'static str = "evaluate";
    const VERSION: u32 = 3;
    const PLACE: Place = Place::Worker;

    fn outputs(&self) -> Vec<Output> {
        vec![Output::new("evaluation", ArtifactType::Evaluation)]
    }

    fn parts(&self) -> Vec<Part> {
        let mut parts =
            vec![Part::new("learn.generate", versions::GENERATE), Part::new("learn.model", versions::MODEL)];
        parts.extend(task_parts());
        // Trainings have no diagnoses, so their keys do not depend on them.
        parts.push(Part::new("task.diagnoses", DIAGNOSES_VERSION));
        parts
    }

    fn check(&self, _upstream: &Upstream<'_>) -> Vec<Problem> {
        let mut problems = self.filters.check("", self.temperature);
        if self.samples_per_prompt > 1 && self.temperature == 0.0 {
            let message = "at temperature 0 every completion of an instance is the same";
            problems
                .push(Problem::new("samples_per_prompt", message).hint("leave it out, or set a `temperature` above 0"));
        }
        problems
    }

    fn metrics(&self, upstream: &Upstream<'_>) -> Option<Vec<String>> {
        let task = task_of(*upstream, &self.prompts.reference)?;
        let measures = task.measures().into_iter().chain(task.diagnoses().iter().cloned());
        let measures: Vec<String> = measures.map(|measure| measure.name.into_owned()).collect();
        // `MEASUREMENT.STRATUM` is a measurement over the instances of one stratum; of a task of the user's own they are not
        // known before it has run.
        let strata = task.strata().unwrap_or_else(|| vec!["*".to_owned()]);
        let solved = measures.iter().any(|name| name == "solved");
        let pass: Vec<String> = self.pass_at().filter(|_| solved).map(|k| format!("pass@{k}")).collect();
        let means = measures.iter().map(String::as_str).chain(["truncated"]).chain(pass.iter().map(String::as_str));
        // A task's own measurement of the name goes before.
        let length = Some(COMPLETION_LENGTH).filter(|name| !measures.iter().any(|own| own == name));
        let counted: Vec<&str> = means.chain(length).chain(["n"]).collect();
        let mut names: Vec<String> = counted.iter().map(|name| (*name).to_owned()).collect();
        if solved {
            names.extend(["solved_low", "solved_high"].map(str::to_owned));
        }
        names.extend(counted.iter().flat_map(|name| strata.iter().map(move |stratum| format!("{name}.{stratum}"))));
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
        assert!(["harness", "error_wall", "first_attempt.short"].map(has) == [true; 3], "diagnoses are metrics, too");
        assert!(["completion_length", "completion_length.short"].map(has) == [true; 2], "so is what the model wrote");
        let several = json!({"kind": "maze", "rows": 5, "columns": 5, "sizes": [[4, 4], [5, 5]]});
        let several = of(several).unwrap();
        for name in ["solved.5x5", "solved.4x4.long", "solved.very_long"] {
            assert!(several.iter().any(|known| known == name), "{name}");
        }
        let program = of(json!({"kind": "program", "command": ["x"], "measures": ["score"]}));
        let program = program.unwrap();
        assert!(
            program.iter().any(|name| name == "score.*") && !program.iter().any(|name| name == "solved_low"),
            "{program:?}"
        );
        assert!(!has("pass@1"), "one completion an instance has no pass@k");
        let several = Evaluate { samples_per_prompt: 9, temperature: 1.0, ..evaluate.clone() };
        let stages =
            BTreeMap::from([("tokens".to_owned(), json!({"task": {"kind": "maze", "rows": 3, "columns": 3}}))]);
        let several = Stage::metrics(&several, &Upstream { stages: &stages }).unwrap();
        let pass: Vec<&String> = several.iter().filter(|name| name.starts_with("pass@")).collect();
        assert_eq!(pass.len(), 3 * 3, "k = 1, 2, 4, in all and of two strata: {pass:?}");
        assert!(["pass@4", "pass@1.medium"].iter().all(|name| several.iter().any(|one| one == name)));
        let own = of(json!({"kind": "program", "command": ["x"], "measures": ["completion_length"]})).unwrap();
        assert_eq!(own.iter().filter(|name| *name == "completion_length").count(), 1, "the task's own goes before");
        assert_eq!(of(json!(null)), None, "the task is not known");
        assert_eq!(Stage::split(&evaluate), Some("test"));
    }

    #[test]
    fn one_completion_is_not_written_and_several_need_a_temperature() {
        let parse = |more: serde_json::Value| {
            let mut value = json!({"model": "sft", "prompts": "tokens", "max_new_tokens": 8});
            value.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
            serde_json::from_value::<Evaluate>(value).unwrap()
        };
        let one = parse(json!({"samples_per_prompt": 1}));
        assert_eq!(serde_json::to_value(&one).unwrap(), serde_json::to_value(parse(json!({}))).unwrap());
        assert!(serde_json::to_value(&one).unwrap().get("samples_per_prompt").is_none());
        let problems = |more| -> Vec<String> {
            let stages: BTreeMap<String, serde_json::Value> = BTreeMap::new();
            let found = Stage::check(&parse(more), &Upstream { stages: &stages });
            found.into_iter().map(|problem| problem.path).collect()
        };
        assert_eq!(problems(json!({"samples_per_prompt": 4})), ["samples_per_prompt"]);
        assert_eq!(problems(json!({"samples_per_prompt": 4, "temperature": 1.0})), Vec::<String>::new());
        for (samples, most) in [(1, None), (2, Some(1)), (7, Some(2)), (8, Some(4)), (64, Some(32))] {
            assert_eq!(parse(json!({"samples_per_prompt": samples})).pass_at().last(), most, "{samples}");
        }
    }
}
