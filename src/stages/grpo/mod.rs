//! `grpo`: group relative policy optimisation against verifiable rewards. It runs in `pipe-worker`.

pub mod axes;
pub mod preset;

use std::collections::BTreeMap;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::pipeline::stage::{
    ArtifactType, Checkpoint, Continues, Input, Output, Part, Place, Problem, Rollouts, Stage, Tokens, TrainingState,
    Upstream,
};
use crate::rewards::{OnError, RewardSpec};
pub use crate::stages::grpo::axes::{Axes, DynamicSampling};
use crate::stages::sampling::Filters;
use crate::stages::training::{
    Alarm, Lora, Optimizer, Precision, Schedule, Validate, check_select, check_start, is_off, task_of, task_parts,
    versions,
};

/// Improve a model by its own graded attempts: groups of completions a prompt, policy-gradient loss. The loss is a point in
/// a space of axes; a `preset` names one, and every axis can be overridden.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[schemars(extend("additionalProperties" = false))]
pub struct Grpo {
    /// The model to start from; not with `continue`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub model: Option<Input<Checkpoint>>,
    /// A stage of this kind to go on from, as if it had not ended; `steps` counts its steps, too. `prompts`, `split`, `seed`,
    /// `prompts_per_step`, `group_size`, `updates_per_step` and `lora` must be the same, and what else differs counts from here
    /// on; the learning rate is that of a run of `steps` steps. The output `rollouts` has the completions of this stage alone.
    /// A KL is measured to the weights that the first of the stages began with.
    #[serde(default, rename = "continue", skip_serializing_if = "Option::is_none")]
    pub continue_from: Option<Input<TrainingState>>,
    /// The prompts, with their task.
    pub prompts: Input<Tokens>,
    /// The split of `prompts`: instances that supervised training has not seen.
    #[serde(default = "Grpo::default_split")]
    pub split: String,
    /// Optimizer steps times `updates_per_step`: one step is one batch of rollouts.
    #[schemars(range(min = 1))]
    pub steps: u64,
    /// Groups in a step.
    #[serde(default = "Grpo::default_prompts_per_step")]
    #[schemars(range(min = 1))]
    pub prompts_per_step: u64,
    /// Completions in a group.
    #[serde(default = "Grpo::default_group_size")]
    #[schemars(range(min = 2))]
    pub group_size: u64,
    /// Optimizer updates in a step: the batch is split into this many minibatches of whole groups.
    #[serde(default = "Grpo::default_updates_per_step")]
    #[schemars(range(min = 1))]
    pub updates_per_step: u64,
    /// Rows in a forward and backward pass; 0 takes the whole minibatch at once. The gradient does not depend on it.
    #[serde(default)]
    pub micro_batch_size: u64,
    /// Groups generated at once: the unit of commit and of restart.
    #[serde(default = "Grpo::default_generation_chunk")]
    #[schemars(range(min = 1))]
    pub generation_chunk: u64,
    /// Tokens in a completion, at most.
    #[schemars(range(min = 1))]
    pub max_new_tokens: u64,
    /// The sampling temperature; the training half uses the same.
    #[serde(default = "Grpo::default_temperature")]
    #[schemars(extend("exclusiveMinimum" = 0.0))]
    pub temperature: f64,
    /// Which tokens may be drawn in rollouts, and what ends a completion. The training half keeps to the same tokens.
    #[serde(flatten)]
    pub filters: Filters,
    /// The rewards by name, each with its weight.
    pub rewards: BTreeMap<String, RewardSpec>,
    /// What an error of a reward on one sample does.
    #[serde(default, skip_serializing_if = "OnError::is_stop")]
    #[schemars(extend("default" = "stop"))]
    pub on_error: OnError,
    /// The loss.
    #[serde(flatten)]
    pub axes: Axes,
    /// Peak learning rate.
    #[serde(default = "Grpo::default_learning_rate")]
    #[schemars(extend("exclusiveMinimum" = 0.0))]
    pub learning_rate: f64,
    /// How the learning rate moves.
    #[serde(default = "Schedule::constant")]
    pub schedule: Schedule,
    /// AdamW and clipping.
    #[serde(default)]
    pub optimizer: Optimizer,
    /// Train low-rank adapters instead of the model's own weights.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub lora: Option<Lora>,
    /// The floating-point format of the model's passes: of training, generation, validation and the reference.
    #[serde(default, skip_serializing_if = "Precision::is_default")]
    #[schemars(extend("default" = "fp32"))]
    pub precision: Precision,
    /// Keep what each layer reads and compute the rest of its activations again in the backward pass: less memory, a third more
    /// operations, the same gradient.
    #[serde(default, skip_serializing_if = "is_off")]
    #[schemars(extend("default" = false))]
    pub activation_checkpointing: bool,
    /// Validation on the way; without it `best` equals `last`.
    #[serde(default)]
    pub validate: Option<Validate>,
    /// The alarm over validations: reward up while solved goes down, or reward of unsolved instances up. It stops nothing.
    #[serde(default, skip_serializing_if = "Alarm::is_default")]
    pub alarm: Alarm,
    /// Train on stored completions instead of sampling: the output `rollouts` of another `grpo` stage on the same prompts, step
    /// by step. Rewards, advantages and losses are those of this stage.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub replay: Option<Input<Rollouts>>,
    /// Decides the order of prompts and every sampled token.
    #[serde(default)]
    pub seed: u64,
}

impl Grpo {
    fn default_split() -> String {
        "rl".to_owned()
    }
    fn default_prompts_per_step() -> u64 {
        32
    }
    fn default_group_size() -> u64 {
        8
    }
    fn default_updates_per_step() -> u64 {
        1
    }
    fn default_generation_chunk() -> u64 {
        32
    }
    fn default_temperature() -> f64 {
        1.0
    }
    fn default_learning_rate() -> f64 {
        1e-4
    }

    /// Whether stored completions were drawn from the distribution that this stage would draw from.
    fn check_replay(&self, upstream: Upstream<'_>) -> Vec<Problem> {
        let Some(replay) = &self.replay else { return Vec::new() };
        let mut problems = Vec::new();
        let name = replay.reference.split('.').next().unwrap_or_default();
        let other = upstream.stages.get(name).and_then(|params| serde_json::from_value::<Self>(params.clone()).ok());
        if self.filters.narrows() || other.as_ref().is_some_and(|other| other.filters.narrows()) {
            let message = "stored completions do not tell which tokens a filter had left";
            problems
                .push(Problem::new("replay", message).hint("leave out `top_k`, `top_p` and `min_p` in both stages"));
        }
        if let Some(other) = other.filter(|other| other.temperature.to_bits() != self.temperature.to_bits()) {
            let message =
                format!("`{name}` sampled at the temperature {}, not at {}", other.temperature, self.temperature);
            problems
                .push(Problem::new("temperature", message).hint("stored log-probabilities are of their temperature"));
        }
        problems
    }

    /// Tokens that a sequence counts for under the reduction `constant`.
    pub fn reduction_tokens(&self) -> u64 {
        self.axes.reduction_tokens.unwrap_or(self.max_new_tokens)
    }

    /// Whether the training to go on from has kept the weights to which a KL is measured.
    fn check_reference(&self, upstream: Upstream<'_>) -> Option<Problem> {
        let from = self.continue_from.as_ref().filter(|_| self.axes.needs_reference())?;
        let stage = from.reference.split('.').next()?;
        let before: Self = serde_json::from_value(upstream.stages.get(stage)?.clone()).ok()?;
        // Below adapters the weights that training began with are frozen, and thereby kept.
        (before.lora.is_none() && !before.axes.needs_reference()).then(|| {
            let beta = self.axes.kl.beta;
            let message = format!(
                "`kl.beta` is {beta}, but the stage `{stage}` to go on from has none and keeps no weights to measure a KL to"
            );
            let hint = format!("set it to 0, give `{stage}` a `kl.beta`, or begin anew from its weights with `model`");
            Problem::new("kl.beta", message).hint(hint)
        })
    }
}

impl Stage for Grpo {
    const KIND: &'static str = "grpo";
    const VERSION: u32 = 4;
    const PLACE: Place = Place::Worker;
    const CONTINUES: Option<Continues> = Some(Continues { field: "continue", grows: "steps" });

    fn outputs(&self) -> Vec<Output> {
        vec![
            Output::new("last", ArtifactType::Checkpoint),
            Output::new("best", ArtifactType::Checkpoint),
            Output::new("rollouts", ArtifactType::Rollouts),
            Output::new("state", ArtifactType::TrainingState),
        ]
    }

    fn parts(&self) -> Vec<Part> {
        let mut parts = vec![
            Part::new("learn.model", versions::MODEL),
            Part::new("learn.generate", versions::GENERATE),
            Part::new("learn.policy", versions::POLICY),
            Part::new("learn.optimizer", versions::OPTIMIZER),
        ];
        parts.extend(self.lora.as_ref().map(|_| Part::new("learn.lora", versions::LORA)));
        parts.extend(self.rewards.values().map(|reward| Part::new(reward.part().0, reward.part().1)));
        parts.extend(task_parts());
        parts.sort();
        parts.dedup();
        parts
    }

    // Its validations stand in its logs; what tables compare are evaluations of its checkpoints. What each reward did is told
    // by the completions it has kept.
    fn metrics(&self, _upstream: &Upstream<'_>) -> Option<Vec<String>> {
        Some(self.rewards.keys().map(|name| format!("reward/{name}/variance_share")).collect())
    }

    fn check(&self, upstream: &Upstream<'_>) -> Vec<Problem> {
        let rows = self.prompts_per_step * self.group_size / self.updates_per_step.max(1);
        let mut problems =
            crate::stages::training::check(&self.split, self.micro_batch_size, rows, self.validate.as_ref());
        problems.extend(check_start(self.model.is_some(), self.continue_from.is_some()));
        problems.extend(self.check_reference(*upstream));
        problems.extend(self.axes.check());
        problems.extend(self.filters.check("", self.temperature));
        problems.extend(self.check_replay(*upstream));
        if self.rewards.is_empty() {
            let problem = Problem::new("rewards", "no reward is given");
            problems
                .push(problem.hint("add a table such as `[stages.NAME.rewards.correct]` with `kind = \"correct\"`"));
        }
        let reference = &self.prompts.reference;
        problems.extend(check_select(*upstream, reference, self.validate.as_ref()));
        problems.extend(self.lora.iter().flat_map(Lora::problems));
        problems.extend(self.schedule.problems());
        if let Some(task) = task_of(*upstream, reference) {
            for (name, reward) in &self.rewards {
                for (field, message, hint) in reward.check(&task.measures()) {
                    let place = [name, field.as_str()].into_iter().filter(|part| !part.is_empty());
                    let path = ["rewards"].into_iter().chain(place).collect::<Vec<_>>().join(".");
                    problems.push(Problem { path, message, hint });
                }
            }
        }
        if !self.prompts_per_step.is_multiple_of(self.updates_per_step) {
            let message = format!(
                "`updates_per_step` {} does not divide the {} groups of a step",
                self.updates_per_step, self.prompts_per_step
            );
            problems.push(Problem::new("updates_per_step", message));
        }
        problems
    }

    fn curves(&self) -> &'static [&'static str] {
        &[
            "loss",
            "loss/*",
            "reward",
            "reward/*",
            "rewards/*",
            "rollout/*",
            "validation/*",
            "completions/*",
            "episodes/*",
            "groups/*",
            "samples/excluded",
            "policy/*",
            "sampling/*",
            "updates/*",
            "alarm",
            "alarms",
            "learning_rate",
            "gradient_norm",
            "gradient_norm_clipped",
            "tokens",
            "tokens_per_second/*",
            "seconds/*",
            "mfu",
            "decode_bandwidth_share",
            "shared_prompt_share",
            "padding_share",
            "peak_memory_bytes",
        ]
    }

    fn normal_form(&self) -> Option<Value> {
        // Stored completions are another policy's, so the ratio moves from the first update on.
        let updates = if self.replay.is_some() { u64::MAX } else { self.updates_per_step };
        let normal = Self { axes: self.axes.normal_form(updates), ..self.clone() };
        Some(serde_json::to_value(normal).expect("a stage's parameters are plain data"))
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn problems(rewards: &Value, select: &str) -> Vec<Problem> {
        let maze = json!({"kind": "maze", "rows": 4, "columns": 4, "algorithm": "dfs"});
        let stages: BTreeMap<String, Value> = [
            ("mazes".to_owned(), json!({"task": maze})),
            ("tokens".to_owned(), json!({"dataset": {"$input": "mazes", "wants": "dataset"}})),
        ]
        .into();
        let stage: Grpo = serde_json::from_value(json!({
            "model": "sft", "prompts": "tokens", "steps": 1, "max_new_tokens": 8, "rewards": rewards,
            "validate": {"every": 1, "samples": 1, "select": select},
        }))
        .unwrap();
        Stage::check(&stage, &Upstream { stages: &stages })
    }

    #[test]
    fn rewards_and_selection_may_only_name_what_the_task_measures() {
        let good =
            json!({"right": {"kind": "correct"}, "close": {"kind": "expression", "expression": "progress / shortest"}});
        assert_eq!(problems(&good, "solved"), []);
        let bad = json!({"close": {"kind": "expression", "expression": "progres + 1"}, "form": {"kind": "format"}});
        let found = problems(&bad, "solvd");
        let wanted = [
            Problem::new("validate.select", "the task has no measurement `solvd`").hint("did you mean `solved`?"),
            Problem::new("rewards.close.expression", "the task has no measurement `progres`")
                .hint("did you mean `progress`?"),
        ];
        assert_eq!(found, wanted);
        let malformed = json!({"close": {"kind": "expression", "expression": "1 +"}});
        assert_eq!(problems(&malformed, "solved")[0].path, "rewards.close.expression");
    }

    #[test]
    fn stored_completions_of_another_distribution_are_refused_and_make_no_arms_equal() {
        let file = |extra: &Value| {
            let mut file = json!({
                "model": "sft", "prompts": "tokens", "steps": 1, "max_new_tokens": 8, "rewards": {"r": {"kind": "correct"}},
            });
            file.as_object_mut().unwrap().extend(extra.as_object().unwrap().clone());
            serde_json::from_value::<Grpo>(file).unwrap()
        };
        let problems = |source: &Value, own: &Value| -> Vec<String> {
            let stages: BTreeMap<String, Value> =
                [("other".to_owned(), serde_json::to_value(file(source)).unwrap())].into();
            let mut own = own.clone();
            own["replay"] = json!("other.rollouts");
            let found = Stage::check(&file(&own), &Upstream { stages: &stages });
            found.into_iter().map(|problem| problem.path).collect()
        };
        assert_eq!(problems(&json!({}), &json!({})), Vec::<String>::new());
        assert_eq!(problems(&json!({"top_p": 0.9}), &json!({})), ["replay"]);
        assert_eq!(problems(&json!({}), &json!({"top_k": 3})), ["replay"]);
        assert_eq!(problems(&json!({"temperature": 0.7}), &json!({})), ["temperature"]);
        let normal = |extra: Value| Stage::normal_form(&file(&extra));
        let (grpo, gspo) =
            (json!({"preset": "dapo", "clip": {"high": 0.3}}), json!({"preset": "dapo", "clip": {"high": 0.4}}));
        assert_eq!(normal(grpo.clone()), normal(gspo.clone()));
        let replayed = |mut extra: Value| {
            extra["replay"] = json!("other.rollouts");
            normal(extra)
        };
        assert_ne!(replayed(grpo), replayed(gspo));
    }

    #[test]
    fn the_versions_of_tasks_and_rewards_are_parts() {
        let stage: Grpo = serde_json::from_value(json!({
            "model": "sft", "prompts": "tokens", "steps": 1, "max_new_tokens": 8, "rewards": {"r": {"kind": "correct"}},
        }))
        .unwrap();
        let names: Vec<String> = Stage::parts(&stage).into_iter().map(|part| part.name).collect();
        assert!(
            names.is_sorted() && ["reward.correct", "task.maze"].iter().all(|name| names.contains(&(*name).into()))
        );
    }

    #[test]
    fn presets_and_filters_stand_beside_the_other_fields() {
        let stage = |extra: Value| -> Grpo {
            let mut file = json!({
                "model": "sft", "prompts": "tokens", "steps": 1, "max_new_tokens": 8,
                "rewards": {"r": {"kind": "correct"}},
            });
            file.as_object_mut().unwrap().extend(extra.as_object().unwrap().clone());
            serde_json::from_value(file).unwrap()
        };
        let made = stage(json!({"preset": "dr_grpo", "top_k": 5, "kl": {"beta": 0.5}}));
        assert_eq!((made.filters.top_k, made.axes.kl.beta, made.reduction_tokens()), (5, 0.5, 8));
        let written = serde_json::to_value(&made).unwrap();
        assert_eq!(serde_json::to_value(stage(written.clone())).unwrap(), written);
        assert!(written.get("preset").is_none() && written.get("top_p").is_none());
        let cold = stage(json!({"preset": "gspo", "reduction": "token_mean", "top_p": 0.9, "stop": [""]}));
        let paths: Vec<String> = Stage::check(&cold, &Upstream { stages: &BTreeMap::new() })
            .into_iter()
            .map(|problem| problem.path)
            .collect();
        assert_eq!(paths, ["reduction", "stop[0]"]);
        let once = |extra| Stage::normal_form(&stage(extra));
        assert_eq!(once(json!({"preset": "gspo"})), once(json!({"preset": "grpo", "kl": {"beta": 0.0}})));
        let twice = |preset| once(json!({"preset": preset, "kl": {"beta": 0.0}, "updates_per_step": 2}));
        assert_ne!(twice("gspo"), twice("grpo"));
    }

    #[test]
    fn a_divergence_needs_weights_that_the_training_before_has_kept() {
        let stage = |extra: Value| -> Grpo {
            let mut file = json!({
                "prompts": "tokens", "steps": 2, "max_new_tokens": 8, "rewards": {"r": {"kind": "correct"}},
            });
            file.as_object_mut().unwrap().extend(extra.as_object().unwrap().clone());
            serde_json::from_value(file).unwrap()
        };
        let found = |before: Value, beta: f64| {
            let before = serde_json::to_value(stage(before)).unwrap();
            let stages: BTreeMap<String, Value> = [("first".to_owned(), before)].into();
            let second = stage(json!({"continue": "first.state", "kl": {"beta": beta}}));
            Stage::check(&second, &Upstream { stages: &stages })
        };
        let free = || json!({"model": "sft", "kl": {"beta": 0.0}});
        assert_eq!(found(free(), 0.0), []);
        assert_eq!(found(json!({"model": "sft", "kl": {"beta": 0.1}}), 0.2), []);
        assert_eq!(found(json!({"model": "sft", "kl": {"beta": 0.0}, "lora": {"rank": 2}}), 0.2), []);
        let problem = found(free(), 0.2).remove(0);
        assert_eq!(problem.path, "kl.beta");
        assert!(problem.message.contains("the stage `first` to go on from has none"), "{problem:?}");
        let begins = |extra: Value| Stage::check(&stage(extra), &Upstream { stages: &BTreeMap::new() });
        assert_eq!(begins(json!({}))[0].path, "model");
        assert_eq!(begins(json!({"model": "sft", "continue": "first"}))[0].path, "continue");
    }
}
