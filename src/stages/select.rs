//! `select`: the rows of one split for which an expression holds, in the shares that are asked for.
//!
//! The expression reads the numbers of a row's instance and, beside an evaluation, the mean of every measurement over the
//! instance's completions: its pass rate is `solved`. Order stays that of the tokens, and the other splits stay as they are.

use std::collections::{BTreeMap, BTreeSet};

use anyhow::{Context as _, bail, ensure};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::pipeline::stage::{
    ArtifactType, Evaluation, Input, Output, Part, Problem, Stage, StageContext, Tokens, Upstream,
};
use crate::rewards::{COMPLETION_LENGTH, EXPRESSION_PART};
use crate::stages::condition::{self, Condition, TRUNCATED, number_of, numbers_of};
use crate::stages::samples::Samples;
use crate::stages::tokenize::write_json;
use crate::stages::tokens::{Selection, TokensFolder};
use crate::stages::training::task_of;

/// Keep the rows of a split that meet a condition, such as prompts that a model solves sometimes, or long ones.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Select {
    /// The rows.
    pub tokens: Input<Tokens>,
    /// The split to select from; the others stay as they are.
    #[serde(default = "Select::default_split")]
    pub split: String,
    /// How a model does on the split: its measurements become numbers of each row, as means over the completions of its
    /// instance. Rows that it has not are left out.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub evaluation: Option<Input<Evaluation>>,
    /// What must hold of a row: an expression that is not 0, such as `length >= 9` or `solved >= 0.125 and solved <= 0.875`,
    /// over the numbers of its instance and those of `evaluation`.
    #[serde(default = "Select::everything", rename = "where")]
    pub condition: String,
    /// The shares of kinds of rows, such as half of them with `length >= 9`; a row is of the first kind whose `where` holds,
    /// and what the shares leave goes to rows of no kind. As many rows as the scarcest kind allows are kept.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(extend("default" = []))]
    pub mix: Vec<Share>,
    /// Rows to keep, at most, from the beginning of the split; 0 is no limit.
    #[serde(default)]
    pub rows: u64,
}

/// A kind of rows and its share.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Share {
    /// What holds of rows of the kind, as in the stage's own `where`.
    #[serde(rename = "where")]
    pub condition: String,
    /// Their share of the rows that are kept.
    #[schemars(range(max = 1.0), extend("exclusiveMinimum" = 0.0))]
    pub share: f64,
}

/// The share below which nothing is asked for: what shares that should sum to 1 may lack by rounding.
const NOTHING: f64 = 1e-9;

impl Select {
    fn default_split() -> String {
        "rl".to_owned()
    }
    fn everything() -> String {
        "1".to_owned()
    }

    /// What the shares leave to rows of no kind.
    fn rest(&self) -> f64 {
        1.0 - self.mix.iter().map(|kind| kind.share).sum::<f64>()
    }

    /// The names that a condition may use, where they can be told.
    fn known(&self, upstream: Upstream<'_>) -> Option<BTreeSet<String>> {
        let task = task_of(upstream, &self.tokens.reference)?;
        let mut known: BTreeSet<String> = numbers_of(&task)?.into_iter().collect();
        if self.evaluation.is_some() {
            let diagnoses = task.diagnoses().iter().cloned();
            known.extend(task.measures().into_iter().chain(diagnoses).map(|measure| measure.name.into_owned()));
            known.extend([COMPLETION_LENGTH, TRUNCATED].map(str::to_owned));
        }
        Some(known)
    }
}

impl Stage for Select {
    const KIND: &'static str = "select";
    const VERSION: u32 = 1;

    fn outputs(&self) -> Vec<Output> {
        vec![Output::new("tokens", ArtifactType::Tokens)]
    }

    fn parts(&self) -> Vec<Part> {
        vec![Part::new(EXPRESSION_PART.0, EXPRESSION_PART.1)]
    }

    fn check(&self, upstream: &Upstream<'_>) -> Vec<Problem> {
        let known = self.known(*upstream);
        let mut problems = condition::check("where", &self.condition, known.as_ref());
        for (place, kind) in self.mix.iter().enumerate() {
            problems.extend(condition::check(&format!("mix[{place}].where"), &kind.condition, known.as_ref()));
        }
        if self.rest() < -NOTHING {
            problems.push(Problem::new("mix", format!("the shares sum to {}, more than 1", 1.0 - self.rest())));
        }
        if let Some(evaluation) = &self.evaluation {
            if self.split == "test" {
                let message = "instances of the split `test` may not be chosen by how a model does on them";
                problems.push(Problem::new("split", message).hint("choose from `rl`, `train` or `validation`"));
            }
            let name = evaluation.reference.split('.').next().unwrap_or_default();
            let split = upstream.stages.get(name).and_then(|params| params["split"].as_str());
            if let Some(split) = split.filter(|split| *split != self.split) {
                let message = format!("`{name}` evaluates the split `{split}`, not `{}`", self.split);
                problems.push(Problem::new("evaluation", message));
            }
        }
        problems
    }

    fn metrics(&self, _upstream: &Upstream<'_>) -> Option<Vec<String>> {
        let names = ["rows", "tokens", "target_tokens", "longest_row", "seen", "kept", "rows.*", "dropped.*"];
        Some(names.map(str::to_owned).to_vec())
    }

    fn run(&self, context: &mut StageContext) -> anyhow::Result<()> {
        let tokens = TokensFolder::open(context.input(&self.tokens)?)?;
        let measured = self.evaluation.as_ref().map(|evaluation| Measured::open(context.input(evaluation)?));
        let measured = measured.transpose()?;
        let seen = tokens.split(&self.split)?;
        let mut dropped: BTreeMap<&str, u64> =
            BTreeMap::from(["unmeasured", "where", "mix", "rows"].map(|why| (why, 0)));
        let condition = Condition::compile(&self.condition)?;
        let kinds: Vec<Condition> =
            self.mix.iter().map(|kind| Condition::compile(&kind.condition)).collect::<anyhow::Result<_>>()?;
        // The rows that hold, each with its kind; the last kind is none.
        let mut holding: Vec<(usize, usize)> = Vec::new();
        for &row in &seen {
            let about = &tokens.rows[row];
            let means = measured.as_ref().map(|measured| measured.of(&about.instance, tokens.prompt(row)?));
            let means = means.transpose()?;
            if matches!(means, Some(None)) {
                *dropped.entry("unmeasured").or_default() += 1;
                continue;
            }
            let means = means.flatten();
            let data: Option<Value> = tokens.data_text(row)?.map(serde_json::from_str).transpose()?;
            let number = |name: &str| {
                means.and_then(|means| means.get(name).copied()).or_else(|| number_of(data.as_ref(), name))
            };
            let holds = |condition: &Condition| {
                condition.holds(&number).with_context(|| format!("selecting the row `{}`", about.instance))
            };
            if !holds(&condition)? {
                *dropped.entry("where").or_default() += 1;
                continue;
            }
            let mut kind = kinds.len();
            for (place, condition) in kinds.iter().enumerate() {
                if kind == kinds.len() && holds(condition)? {
                    kind = place;
                }
            }
            holding.push((row, kind));
        }
        ensure!(
            dropped["unmeasured"] < seen.len() as u64,
            "no row of the split `{}` was evaluated: the evaluation is of other instances",
            self.split
        );
        ensure!(
            !holding.is_empty(),
            "of {} rows of the split `{}` none meets `{}`",
            seen.len(),
            self.split,
            self.condition
        );
        let kept = self.mixed(&holding, &mut dropped)?;
        let mut selection = Selection::new(&tokens);
        for row in (0..tokens.rows.len()).filter(|row| *tokens.rows[*row].split != *self.split || kept.contains(row)) {
            selection.take(row);
        }
        let folder = context.output("tokens");
        let mut counts = selection.save(&folder)?;
        counts.extend([("seen".to_owned(), seen.len() as u64), ("kept".to_owned(), kept.len() as u64)]);
        counts.extend(dropped.iter().map(|(why, rows)| (format!("dropped.{why}"), *rows)));
        let told = dropped.iter().filter(|(_, rows)| **rows > 0).map(|(why, rows)| format!("{rows} by `{why}`"));
        let told: Vec<String> = told.collect();
        let left_out =
            if told.is_empty() { "none left out".to_owned() } else { format!("left out {}", told.join(", ")) };
        context.note(format!("{} of {} rows of `{}` kept, {left_out}", kept.len(), seen.len(), self.split));
        write_json(&folder.join("metrics.json"), &counts)
    }
}

impl Select {
    /// The first rows of every kind, as many as the shares and `rows` allow.
    fn mixed(&self, holding: &[(usize, usize)], dropped: &mut BTreeMap<&str, u64>) -> anyhow::Result<BTreeSet<usize>> {
        let mut shares: Vec<f64> = self.mix.iter().map(|kind| kind.share).collect();
        shares.push(if self.rest() < NOTHING { 0.0 } else { self.rest() });
        let mut there = vec![0u64; shares.len()];
        for (_, kind) in holding {
            there[*kind] += 1;
        }
        let mut most = u64::MAX;
        for (place, (&there, &share)) in there.iter().zip(&shares).enumerate().filter(|(_, (_, share))| **share > 0.0) {
            if there == 0 {
                let kind = self
                    .mix
                    .get(place)
                    .map_or("that is of no kind".to_owned(), |kind| format!("with `{}`", kind.condition));
                bail!("the split `{}` has no row {kind}, of which a share of {share} is asked for", self.split);
            }
            most = most.min((there as f64 / share + NOTHING) as u64);
        }
        let quotas =
            |rows: u64| -> Vec<u64> { shares.iter().map(|share| (share * rows as f64 + NOTHING) as u64).collect() };
        let all: u64 = quotas(most).iter().sum();
        let mut left = quotas(if self.rows == 0 { most } else { self.rows.min(most) });
        let taken: u64 = left.iter().sum();
        *dropped.entry("mix").or_default() += holding.len() as u64 - all;
        *dropped.entry("rows").or_default() += all - taken;
        let mut kept = BTreeSet::new();
        for &(row, kind) in holding {
            if left[kind] > 0 {
                left[kind] -= 1;
                kept.insert(row);
            }
        }
        Ok(kept)
    }
}

/// The means of an evaluation by instance.
struct Measured {
    instances: BTreeMap<String, (String, BTreeMap<String, f64>)>,
}

impl Measured {
    fn open(folder: &std::path::Path) -> anyhow::Result<Self> {
        let samples = Samples::open(folder, &BTreeMap::new())?;
        let mut instances: BTreeMap<String, (String, BTreeMap<String, f64>, f64)> = BTreeMap::new();
        for sample in samples.rows {
            let (_, sums, count) =
                instances.entry(sample.instance).or_insert_with(|| (sample.prompt, BTreeMap::new(), 0.0));
            let length = (!sample.lengths.is_empty()).then(|| sample.lengths.iter().sum::<u64>() as f64);
            let own = [(COMPLETION_LENGTH, length), (TRUNCATED, Some(f64::from(u8::from(sample.truncated))))];
            let own = own.into_iter().filter_map(|(name, value)| Some((name.to_owned(), value?)));
            // A task's own measurement of the name goes before.
            let mut numbers: BTreeMap<String, f64> = own.collect();
            numbers.extend(sample.measurements);
            for (name, value) in numbers {
                *sums.entry(name).or_default() += value;
            }
            *count += 1.0;
        }
        let mean = |(prompt, mut sums, count): (String, BTreeMap<String, f64>, f64)| {
            for sum in sums.values_mut() {
                *sum /= count;
            }
            (prompt, sums)
        };
        Ok(Self { instances: instances.into_iter().map(|(instance, sums)| (instance, mean(sums))).collect() })
    }

    /// The means of a row's instance; `None` where it was not evaluated, an error where something else was by its name.
    fn of(&self, instance: &str, asked: &str) -> anyhow::Result<Option<&BTreeMap<String, f64>>> {
        let Some((prompt, means)) = self.instances.get(instance) else { return Ok(None) };
        ensure!(
            *prompt == asked,
            "the evaluation is of other tokens: the prompt of its `{instance}` is another than that of the row"
        );
        Ok(Some(means))
    }
}

#[cfg(test)]
mod tests;
