//! Which arms of a table are shown, and in which order. Nothing that is computed depends on it: Holm's correction is over
//! all arms, hidden ones too.

use std::cmp::Ordering;

use serde_json::Value;

use crate::cli::comparison::{Arm, Comparison};
use crate::cli::failure::Failure;
use crate::cli::render;

/// How a value has to compare.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Sign {
    Equal,
    Unequal,
    AtLeast,
    AtMost,
    Above,
    Below,
}

/// Longer signs first, as `>=` begins with `>`.
const SIGNS: [(&str, Sign); 6] = [
    ("!=", Sign::Unequal),
    (">=", Sign::AtLeast),
    ("<=", Sign::AtMost),
    ("=", Sign::Equal),
    (">", Sign::Above),
    ("<", Sign::Below),
];

/// What an arm is asked for: the value of a parameter or the mean of a metric.
fn value(arm: &Arm, name: &str) -> Option<Value> {
    if name == "arm" {
        return Some(Value::from(arm.arm.as_str()));
    }
    arm.parameters
        .get(name)
        .cloned()
        .or_else(|| arm.metrics.get(name).copied().flatten().map(|found| found.mean.into()))
}

/// What can be asked for.
fn names(comparison: &Comparison) -> Vec<&str> {
    let parameters = comparison.arms.iter().flat_map(|arm| arm.parameters.keys());
    let mut names: Vec<&str> = parameters.chain(&comparison.metrics).map(String::as_str).collect();
    names.push("arm");
    names.sort_unstable();
    names.dedup();
    names
}

fn unknown(name: &str, comparison: &Comparison) -> Failure {
    let known = names(comparison);
    let failure = Failure::wrong(format!("`{name}` is no parameter and no column of `{}`", comparison.experiment));
    match render::near(name, known.iter().copied()).first() {
        Some(near) => failure.hint(format!("did you mean `{near}`?")),
        None => failure.hint(format!("there are: {}", known.join(", "))),
    }
}

/// Numbers by their size, whatever is no number by its text; what is missing comes last.
fn compare(one: Option<&Value>, other: Option<&Value>) -> Ordering {
    match (one, other) {
        (Some(one), Some(other)) => match (one.as_f64(), other.as_f64()) {
            (Some(one), Some(other)) => one.total_cmp(&other),
            _ => text(one).cmp(&text(other)),
        },
        (one, other) => other.is_some().cmp(&one.is_some()),
    }
}

fn text(value: &Value) -> String {
    value.as_str().map_or_else(|| value.to_string(), str::to_owned)
}

/// Leaves the arms for which every one of `conditions` (`NAME=VALUE`, also `!=`, `<`, `<=`, `>`, `>=`) holds.
pub(super) fn filter(comparison: &mut Comparison, conditions: &[String]) -> Result<(), Failure> {
    for condition in conditions {
        // A column's name may hold signs of its own: the longest name that the condition begins with is meant.
        let mut known: Vec<&str> = names(comparison);
        known.sort_by_key(|name| std::cmp::Reverse(name.len()));
        let sign = |rest: &str| SIGNS.into_iter().find(|(sign, _)| rest.starts_with(sign));
        let parsed = known.iter().find_map(|name| {
            let rest = condition.strip_prefix(name)?.trim_start();
            sign(rest).map(|(text, sign)| ((*name).to_owned(), sign, rest[text.len()..].trim().to_owned()))
        });
        let Some((name, sign, wanted)) = parsed else {
            let Some(at) = condition.find(['=', '!', '<', '>']) else {
                return Err(Failure::wrong(format!("`{condition}` is no condition"))
                    .hint("it reads `NAME=VALUE`, or has `!=`, `<`, `<=`, `>` or `>=` between the two"));
            };
            return Err(unknown(condition[..at].trim(), comparison));
        };
        let wanted: Value = serde_json::from_str(&wanted).unwrap_or(Value::from(wanted));
        comparison.arms.retain(|arm| {
            value(arm, &name).is_some_and(|own| {
                let order = compare(Some(&own), Some(&wanted));
                match sign {
                    Sign::Equal => order.is_eq(),
                    Sign::Unequal => order.is_ne(),
                    Sign::AtLeast => order.is_ge(),
                    Sign::AtMost => order.is_le(),
                    Sign::Above => order.is_gt(),
                    Sign::Below => order.is_lt(),
                }
            })
        });
    }
    Ok(())
}

/// Puts the arms in the order of `name`: a metric's greatest first, parameters as they grow; `reverse` turns that round.
pub(super) fn sort(comparison: &mut Comparison, name: &str, reverse: bool) -> Result<(), Failure> {
    if !names(comparison).contains(&name) {
        return Err(unknown(name, comparison));
    }
    let falls = comparison.metrics.iter().any(|metric| metric == name) != reverse;
    comparison.arms.sort_by(|one, other| {
        let (one, other) = (value(one, name), value(other, name));
        let order = compare(one.as_ref(), other.as_ref());
        // What is missing stays last either way.
        if falls && one.is_some() && other.is_some() { order.reverse() } else { order }
    });
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::table::tests::comparison;
    use serde_json::json;

    fn arms(change: impl FnOnce(&mut Comparison)) -> String {
        let mut comparison = comparison();
        for (arm, rate) in comparison.arms.iter_mut().zip([2e-4, 1e-3]) {
            arm.parameters = [("rate".to_owned(), json!(rate))].into();
        }
        comparison.arms[1].metrics.get_mut("sft.solved").unwrap().as_mut().unwrap().mean = 0.9;
        change(&mut comparison);
        comparison.arms.iter().map(|arm| arm.arm.as_str()).collect::<Vec<_>>().join(" ")
    }

    #[test]
    fn arms_are_put_in_order() {
        let sorted = |name: &'static str, reverse| arms(|table| sort(table, name, reverse).unwrap());
        assert_eq!(sorted("sft.solved", false), "drop=progress drop=none");
        assert_eq!(sorted("sft.solved", true), "drop=none drop=progress");
        assert_eq!(sorted("rate", true), "drop=progress drop=none");
        assert_eq!(sorted("grpo.solved", false), "drop=none drop=progress", "what is missing keeps its order");
        assert_eq!(sorted("arm", false), "drop=none drop=progress");
        let failure = sort(&mut comparison(), "sft.solvd", false).unwrap_err();
        assert_eq!(failure.parts().2, ["did you mean `sft.solved`?"]);
    }

    #[test]
    fn arms_are_left_out() {
        let kept = |condition: &str| arms(|table| filter(table, &[condition.to_owned()]).unwrap());
        assert_eq!(kept("rate=0.0002"), "drop=none");
        assert_eq!(kept("rate != 2e-4"), "drop=progress");
        assert_eq!(kept("sft.solved>0.8"), "drop=progress");
        assert_eq!(kept("rate<=1e-3"), "drop=none drop=progress");
        assert_eq!(kept("grpo.solved>=0"), "", "what is missing fits nothing");
        assert_eq!(kept("arm=drop=none"), "drop=none");
        let wrong = |condition: &str| filter(&mut comparison(), &[condition.to_owned()]).unwrap_err();
        assert_eq!(wrong("speed>1").parts().0, "`speed` is no parameter and no column of `maze`");
        assert_eq!(wrong("speed").parts().0, "`speed` is no condition");
    }
}
