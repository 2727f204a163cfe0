//! `rejection_sampling`: a model's own completions as rows to fine-tune on, those for which an expression holds.
//!
//! Completions are taken as they were sampled, id by id, behind the prompts that they answered; the model's own tokens are
//! the targets. With every completion of a `grpo` stage it is the control that trains on the same completions, but for those
//! that the token limit ended: a row without an end teaches a model not to stop, and no training takes it.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::path::PathBuf;

use anyhow::{bail, ensure};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::pipeline::stage::{
    ArtifactType, Evaluation, Input, Output, Part, Problem, Rollouts, Stage, StageContext, Tokens, Upstream,
};
use crate::rewards::{COMPLETION_LENGTH, EXPRESSION_PART};
use crate::stages::condition::{self, Condition, TRUNCATED, number_of, numbers_of};
use crate::stages::samples::{Sample, Samples};
use crate::stages::tokenize::write_json;
use crate::stages::tokens::{Selection, TokensFolder};
use crate::stages::training::task_of;
use crate::tasks::Finish;

/// The step of a training, from 1, for conditions.
const STEP: &str = "step";
/// 1 where the training learnt from the completion's group, for conditions.
const KEPT: &str = "kept";

/// Turn a model's own completions into rows to fine-tune on: those that solve their instance, or that meet another condition.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct RejectionSampling {
    /// The tokens that the completions' prompts came from.
    pub prompts: Input<Tokens>,
    /// The completions of a `grpo` stage; or else `evaluation`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rollouts: Option<Input<Rollouts>>,
    /// The completions of an `evaluate` stage with `samples_per_prompt` above 1; or else `rollouts`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub evaluation: Option<Input<Evaluation>>,
    /// What must hold of a completion: an expression that is not 0 over the task's measurements, `completion_length`,
    /// `truncated`, the numbers of the instance and, of rollouts, `step` (from 1) and `kept` (1 where the training learnt from
    /// the completion's group). `1` takes all. One that the token limit ended is left out in any case.
    #[serde(default = "RejectionSampling::solved", rename = "where")]
    pub condition: String,
    /// Whether a completion that a prompt has twice, token by token, is taken once.
    #[serde(default = "RejectionSampling::once")]
    pub unique: bool,
    /// Completions of a prompt, at most, in the order in which they were sampled; 0 is no limit.
    #[serde(default)]
    pub per_prompt: u64,
    /// Splits of `prompts` that are taken over as they are, to validate on.
    #[serde(default = "RejectionSampling::validation")]
    pub keep_splits: Vec<String>,
}

impl RejectionSampling {
    fn solved() -> String {
        "solved".to_owned()
    }
    fn once() -> bool {
        true
    }
    fn validation() -> Vec<String> {
        vec!["validation".to_owned()]
    }

    /// The reference to where the completions come from, if there is one.
    fn source(&self) -> Option<&str> {
        let rollouts = self.rollouts.as_ref().map(|input| input.reference.as_str());
        rollouts.or(self.evaluation.as_ref().map(|input| input.reference.as_str()))
    }

    /// The names that the condition may use, where they can be told.
    fn known(&self, upstream: Upstream<'_>) -> Option<BTreeSet<String>> {
        let task = task_of(upstream, &self.prompts.reference)?;
        let mut known: BTreeSet<String> = numbers_of(&task)?.into_iter().collect();
        known.extend(task.measures().into_iter().map(|measure| measure.name.into_owned()));
        known.extend([COMPLETION_LENGTH, TRUNCATED].map(str::to_owned));
        if self.rollouts.is_some() {
            known.extend([STEP, KEPT].map(str::to_owned));
        } else {
            known.extend(task.diagnoses().iter().map(|measure| measure.name.clone().into_owned()));
        }
        Some(known)
    }

    /// What the stage that sampled the completions tells of them.
    fn check_source(&self, upstream: Upstream<'_>) -> Vec<Problem> {
        let field = if self.rollouts.is_some() { "rollouts" } else { "evaluation" };
        let Some(name) = self.source().and_then(|source| source.split('.').next()) else { return Vec::new() };
        let Some(params) = upstream.stages.get(name) else { return Vec::new() };
        let mut problems = Vec::new();
        if field == "evaluation" && params.get("samples_per_prompt").is_none() {
            let message = format!("`{name}` samples each prompt once, and then keeps text alone");
            let hint =
                "give it `samples_per_prompt = 2` or more and a `temperature`, or take the rollouts of a `grpo` stage";
            problems.push(Problem::new(field, message).hint(hint));
        }
        let split = params["split"].as_str().unwrap_or_default();
        if split == "test" {
            let message = format!("the completions of `{name}` are on the split `test`, which may not be trained on");
            problems.push(Problem::new(field, message));
        }
        if let Some(place) = self.keep_splits.iter().position(|kept| kept == split) {
            let message =
                format!("`{name}` sampled on the split `{split}`, whose rows cannot be kept beside its completions");
            problems.push(Problem::new(format!("keep_splits[{place}]"), message));
        }
        let tokenizer = |reference: &str| upstream.nearest(reference, "tokenizer").cloned();
        let theirs = params["prompts"]["$input"].as_str().and_then(tokenizer);
        let ours = tokenizer(&self.prompts.reference);
        if theirs.is_some() && ours.is_some() && theirs != ours {
            let message = format!("`{name}` sampled on tokens of another tokenizer");
            problems.push(Problem::new("prompts", message).hint("name the tokens that it has as its `prompts`"));
        }
        problems
    }
}

impl Stage for RejectionSampling {
    const KIND: &'static str = "rejection_sampling";
    const VERSION: u32 = 1;

    fn outputs(&self) -> Vec<Output> {
        vec![Output::new("tokens", ArtifactType::Tokens)]
    }

    fn parts(&self) -> Vec<Part> {
        vec![Part::new(EXPRESSION_PART.0, EXPRESSION_PART.1)]
    }

    fn check(&self, upstream: &Upstream<'_>) -> Vec<Problem> {
        let mut problems = match (&self.rollouts, &self.evaluation) {
            (Some(_), Some(_)) => {
                vec![Problem::new("evaluation", "`rollouts` and `evaluation` both say where the completions are")]
            }
            (None, None) => {
                let problem =
                    Problem::new("rollouts", "neither `rollouts` nor `evaluation` says where the completions are");
                vec![problem.hint("write `rollouts = \"grpo\"` with the name of a `grpo` stage")]
            }
            _ => self.check_source(*upstream),
        };
        problems.extend(condition::check("where", &self.condition, self.known(*upstream).as_ref()));
        problems
    }

    fn metrics(&self, _upstream: &Upstream<'_>) -> Option<Vec<String>> {
        let names =
            ["rows", "tokens", "target_tokens", "longest_row", "completions", "prompts", "kept", "prompts_without"];
        Some(names.into_iter().chain(["rows.*", "dropped.*"]).map(str::to_owned).collect())
    }

    fn run(&self, context: &mut StageContext) -> anyhow::Result<()> {
        let tokens = TokensFolder::open(context.input(&self.prompts)?)?;
        let stored: PathBuf = match (&self.rollouts, &self.evaluation) {
            (Some(rollouts), None) => context.input(rollouts)?.to_owned(),
            (None, Some(evaluation)) => context.input(evaluation)?.to_owned(),
            _ => anyhow::bail!("completions come either from `rollouts` or from an `evaluation`"),
        };
        let samples = Samples::open(&stored, &BTreeMap::new())?;
        let rows = Rows::of(&tokens);
        let condition = Condition::compile(&self.condition)?;
        let mut counts: BTreeMap<&str, u64> = BTreeMap::from(
            ["dropped.where", "dropped.unended", "dropped.duplicate", "dropped.per_prompt"].map(|why| (why, 0)),
        );
        let mut kept: Vec<(usize, &Sample)> = Vec::new();
        let mut taken: HashMap<usize, u64> = HashMap::new();
        let mut said: HashSet<(usize, &[i32])> = HashSet::new();
        for sample in &samples.rows {
            let row = rows.find(sample)?;
            let already = taken.entry(row).or_default();
            ensure!(
                !sample.ids.is_empty(),
                "the completion of `{}` is stored as text alone: evaluate with `samples_per_prompt` above 1",
                sample.instance
            );
            let data = tokens.data(row)?;
            let why = if !condition.holds(&|name| number(sample, data, name))? {
                "dropped.where"
            } else if sample.finish == Finish::Length {
                "dropped.unended"
            } else if self.unique && !said.insert((row, &sample.ids)) {
                "dropped.duplicate"
            } else if self.per_prompt > 0 && *already >= self.per_prompt {
                "dropped.per_prompt"
            } else {
                *already += 1;
                kept.push((row, sample));
                continue;
            };
            *counts.entry(why).or_default() += 1;
        }
        ensure!(
            !kept.is_empty(),
            "of {} completions none meets `{}` and has an end",
            samples.rows.len(),
            self.condition
        );
        let mut selection = Selection::new(&tokens);
        for split in &self.keep_splits {
            let there = (0..tokens.rows.len()).filter(|row| *tokens.rows[*row].split == **split);
            let there: Vec<usize> = there.collect();
            if there.is_empty() {
                context.note(format!("the tokens have no split `{split}` to keep"));
            }
            ensure!(
                !kept.iter().any(|(row, _)| *tokens.rows[*row].split == **split),
                "completions are on the split `{split}`, whose rows cannot be kept beside them"
            );
            for row in there {
                selection.take(row);
            }
        }
        for (row, sample) in &kept {
            selection.take_completed(*row, &sample.ids, &sample.replies);
        }
        counts.extend([
            ("completions", samples.rows.len() as u64),
            ("kept", kept.len() as u64),
            ("prompts", taken.len() as u64),
            ("prompts_without", taken.values().filter(|taken| **taken == 0).count() as u64),
        ]);
        context.note(format!(
            "{} of {} completions kept: {} do not meet `{}`, {} have no end, {} are duplicates, {} are more than a prompt may \
             have; {} of {} prompts have none",
            kept.len(),
            samples.rows.len(),
            counts["dropped.where"],
            self.condition,
            counts["dropped.unended"],
            counts["dropped.duplicate"],
            counts["dropped.per_prompt"],
            counts["prompts_without"],
            counts["prompts"],
        ));
        let folder = context.output("tokens");
        let mut all = selection.save(&folder)?;
        all.extend(counts.into_iter().map(|(name, count)| (name.to_owned(), count)));
        write_json(&folder.join("metrics.json"), &all)
    }
}

/// The number `name` of a completion: the task's own measurements go before all others.
fn number(sample: &Sample, instance: Option<&Value>, name: &str) -> Option<f64> {
    let flag = |flag: bool| f64::from(u8::from(flag));
    let measured = sample.measurements.get(name).copied();
    measured.or_else(|| match name {
        COMPLETION_LENGTH => Some(sample.lengths.iter().sum::<u64>() as f64),
        TRUNCATED => Some(flag(sample.truncated)),
        STEP => Some((sample.step + 1) as f64),
        KEPT => Some(flag(sample.kept)),
        _ => number_of(instance, name),
    })
}

/// The rows of tokens by instance.
struct Rows<'a> {
    tokens: &'a TokensFolder,
    by_instance: HashMap<&'a str, Vec<usize>>,
}

impl<'a> Rows<'a> {
    fn of(tokens: &'a TokensFolder) -> Self {
        let mut by_instance: HashMap<&str, Vec<usize>> = HashMap::new();
        for (row, about) in tokens.rows.iter().enumerate() {
            by_instance.entry(&about.instance).or_default().push(row);
        }
        Self { tokens, by_instance }
    }

    /// The row whose prompt a completion answers.
    fn find(&self, sample: &Sample) -> anyhow::Result<usize> {
        let rows = self.by_instance.get(sample.instance.as_str()).map(Vec::as_slice).unwrap_or_default();
        for &row in rows {
            if self.tokens.prompt(row)? == sample.prompt {
                return Ok(row);
            }
        }
        bail!("the completions are of other prompts: the tokens have no `{}` with its prompt", sample.instance)
    }
}

#[cfg(test)]
mod tests;
