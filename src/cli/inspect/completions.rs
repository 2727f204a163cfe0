//! Rollouts and evaluations: groups with rewards and advantages, types of errors, and where reward and solved part.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::path::Path;

use anyhow::ensure;
use serde_json::{Value, json};

use super::{Look, Seen, more};
use crate::cli::render;
use crate::cli::stored::{Completions, SOLVED, outcome};

/// Gaps that are shown on either side.
const GAPS: usize = 5;

pub(super) fn inspect(folder: &Path, completions: &Completions, look: &Look<'_>) -> anyhow::Result<Seen> {
    let rows: Vec<usize> = (0..completions.rows().len()).collect();
    let mut text = format!(
        "{} of {}\n",
        render::plural(rows.len(), "completion"),
        render::plural(completions.samples.groups.len(), if completions.is_training { "group" } else { "prompt" })
    );
    let mut value = json!({"completions": rows.len(), "prompts": completions.samples.groups.len()});
    if completions.is_training {
        let (groups, steps) = groups(completions, look)?;
        let _ = write!(text, "\n{groups}");
        value["step"] = steps;
        let (shown, gaps) = gaps(completions, &rows);
        text += &shown;
        value["gaps"] = gaps;
    }
    // Of a training the errors of its last step say more than those of all steps together.
    let step = look.args.step.unwrap_or_else(|| completions.last_step());
    let rows: Vec<usize> = rows.into_iter().filter(|row| completions.rows()[*row].step == step).collect();
    let (shown, outcomes) = outcomes(completions, &rows);
    let of_step = if completions.is_training { format!(" of step {step}") } else { String::new() };
    let _ = write!(text, "\nhow the {}{of_step} ended\n{shown}", render::plural(rows.len(), "completion"));
    value["outcomes"] = outcomes;
    if let Ok(bytes) = std::fs::read(folder.join("metrics.json"))
        && let Ok(metrics) = serde_json::from_slice::<BTreeMap<String, f64>>(&bytes)
    {
        let rows = metrics.iter().map(|(name, value)| vec![name.clone(), render::number(*value)]).collect();
        let _ = write!(text, "\n{}", render::columns(&["metric", "value"], &[1], rows, None));
        value["metrics"] = json!(metrics);
    }
    Ok(Seen { value, text })
}

/// The groups of a step, a line a completion.
fn groups(completions: &Completions, look: &Look<'_>) -> anyhow::Result<(String, Value)> {
    let step = look.args.step.unwrap_or_else(|| completions.last_step());
    let of_step: Vec<&Vec<usize>> =
        completions.samples.groups.iter().filter(|group| completions.rows()[group[0]].step == step).collect();
    ensure!(!of_step.is_empty(), "nothing is stored of step {step}; the last is {}", completions.last_step());
    let number = |value: Option<f64>| value.map_or_else(|| "none".to_owned(), render::number);
    let mut lines = Vec::new();
    for group in of_step.iter().take(look.args.count) {
        for (place, row) in group.iter().enumerate() {
            let sample = &completions.rows()[*row];
            let dropped = if completions.kept[*row] { "" } else { " (dropped)" };
            let name = if place == 0 { format!("{}{dropped}", sample.instance) } else { String::new() };
            let mut line = vec![name, sample.sample.to_string(), outcome(sample).into_owned()];
            line.extend(sample.rewards.iter().map(|reward| number(*reward)));
            line.push(number(sample.total));
            let advantages = &completions.advantages[*row];
            line.push(advantages.iter().map(|one| format!("{one:+.3}")).collect::<Vec<_>>().join(" "));
            lines.push(line);
        }
    }
    let header: Vec<&str> = ["instance", "sample", "ended"]
        .into_iter()
        .chain(completions.rewards.iter().map(String::as_str))
        .chain(["reward", "advantage"])
        .collect();
    let right: Vec<usize> = [1].into_iter().chain(3..header.len()).collect();
    let informative = of_step.iter().filter(|group| completions.kept[group[0]]).count();
    let mut text =
        format!("step {step}: {}, {informative} of them learnt from\n", render::plural(of_step.len(), "group"));
    text += &render::columns(&header, &right, lines, None);
    text += &more(of_step.len(), look.args.count);
    let groups: Vec<Value> = of_step
        .iter()
        .map(|group| {
            let samples: Vec<Value> = group.iter().map(|row| value(completions, *row)).collect();
            json!({"instance": completions.rows()[group[0]].instance, "kept": completions.kept[group[0]], "samples": samples})
        })
        .collect();
    Ok((text, json!({"number": step, "groups": groups})))
}

fn value(completions: &Completions, row: usize) -> Value {
    let sample = &completions.rows()[row];
    let rewards: serde_json::Map<String, Value> =
        completions.rewards.iter().cloned().zip(sample.rewards.iter().map(|value| json!(value))).collect();
    json!({
        "step": sample.step,
        "instance": sample.instance,
        "sample": sample.sample,
        "outcome": outcome(sample),
        "solved": sample.measurements.get(SOLVED),
        "rewards": rewards,
        "total": sample.total,
        "advantages": completions.advantages[row],
    })
}

/// What is paid best although it is not solved, and what is paid worst although it is.
fn gaps(completions: &Completions, rows: &[usize]) -> (String, Value) {
    let mut text = String::new();
    let mut found = serde_json::Map::new();
    for (name, title, solved) in
        [("unsolved", "not solved, and paid best", false), ("solved", "solved, and paid worst", true)]
    {
        let mut some: Vec<(f64, usize)> = rows
            .iter()
            .filter(|row| completions.is_solved(**row) == Some(solved))
            .filter_map(|row| Some((completions.rows()[*row].total?, *row)))
            .collect();
        some.sort_by(|one, other| {
            let order = one.0.total_cmp(&other.0);
            if solved { order } else { order.reverse() }
        });
        some.truncate(GAPS);
        if !some.is_empty() {
            let line = |(total, row): &(f64, usize)| {
                let sample = &completions.rows()[*row];
                vec![
                    render::number(*total),
                    sample.step.to_string(),
                    sample.instance.clone(),
                    sample.sample.to_string(),
                    outcome(sample).into_owned(),
                ]
            };
            let lines = some.iter().map(line).collect();
            let table = render::columns(&["reward", "step", "instance", "sample", "ended"], &[0, 1, 3], lines, None);
            let _ = write!(text, "\n{title}\n{table}");
        }
        found.insert(name.to_owned(), some.iter().map(|(_, row)| value(completions, *row)).collect());
    }
    (text, Value::Object(found))
}

/// How many completions ended how, the most frequent first.
fn outcomes(completions: &Completions, rows: &[usize]) -> (String, Value) {
    let mut counts: BTreeMap<Cow<'static, str>, usize> = BTreeMap::new();
    for row in rows {
        *counts.entry(outcome(&completions.rows()[*row])).or_default() += 1;
    }
    let mut counts: Vec<(Cow<'static, str>, usize)> = counts.into_iter().collect();
    counts.sort_by_key(|(_, count)| std::cmp::Reverse(*count));
    let line = |(name, count): &(Cow<'static, str>, usize)| {
        let share = *count as f64 / rows.len().max(1) as f64;
        vec![name.to_string(), render::count(*count as u64), format!("{} %", render::percent(share))]
    };
    let text = render::columns(&["ended", "n", "share"], &[1, 2], counts.iter().map(line).collect(), None);
    (
        text,
        counts.iter().map(|(name, count)| (name.to_string(), json!(count))).collect::<serde_json::Map<_, _>>().into(),
    )
}

#[cfg(test)]
mod tests {
    use super::super::tests::look_at;
    use super::*;
    use crate::cli::stored::tests::rollouts;

    #[test]
    fn groups_rewards_advantages_and_gaps_of_a_step() {
        let folder = tempfile::tempdir().unwrap();
        let completions = rollouts(folder.path());
        let see = |options: &[&str]| look_at(options, |look| inspect(folder.path(), &completions, look));
        let seen = see(&["--step", "1"]).unwrap();
        insta::assert_snapshot!(seen.text);
        assert_eq!(seen.value["step"]["groups"][1]["kept"], false);
        assert_eq!(seen.value["step"]["groups"][0]["samples"][0]["advantages"], json!([1.0]));
        assert_eq!(seen.value["gaps"]["unsolved"][0]["total"], 0.75);
        assert_eq!(see(&[]).unwrap().value["step"]["number"], 2);
        let error = see(&["--step", "9"]).err().unwrap().to_string();
        assert_eq!(error, "nothing is stored of step 9; the last is 2");
    }
}
