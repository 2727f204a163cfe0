//! A table for other programs: one row a number, as data frames want it.

use crate::cli::arms::Claim;
use crate::cli::comparison::{Comparison, Tested, difference_name};

const HEADER: [&str; 13] =
    ["experiment", "arm", "seeds", "what", "metric", "mean", "low", "high", "n", "p", "p_holm", "claim", "read_at"];

/// Rows of `what` = `mean`, `difference` (within the arm) and `versus_baseline`; what is not known is empty. Parameters stand
/// behind, a column each.
pub(super) fn write(comparison: &Comparison, with_header: bool) -> String {
    let mut parameters: Vec<&str> =
        comparison.arms.iter().flat_map(|arm| arm.parameters.keys().map(String::as_str)).collect();
    parameters.sort_unstable();
    parameters.dedup();
    let mut text = String::new();
    let mut line = |cells: Vec<String>| {
        text.push_str(&cells.iter().map(|cell| quoted(cell)).collect::<Vec<_>>().join(","));
        text.push('\n');
    };
    if with_header {
        line(HEADER.iter().chain(&parameters).map(|name| (*name).to_owned()).collect());
    }
    let claim = match comparison.claim {
        Claim::Checkpoints => "A",
        Claim::Recipe => "B",
    };
    let number = |value: Option<f64>| value.map(|value| value.to_string()).unwrap_or_default();
    for arm in &comparison.arms {
        let mut row = |what: &str, metric: &str, numbers: [Option<f64>; 6]| {
            let [mean, low, high, n, p, p_holm] = numbers.map(number);
            let read_at = comparison.matched.get(metric);
            let read_at = read_at.map(|matched| format!("{}={}", matched.axis, matched.value)).unwrap_or_default();
            let mut cells = vec![comparison.experiment.clone(), arm.arm.clone(), arm.seeds.to_string()];
            cells.extend([
                what.to_owned(),
                metric.to_owned(),
                mean,
                low,
                high,
                n,
                p,
                p_holm,
                claim.to_owned(),
                read_at,
            ]);
            cells.extend(parameters.iter().map(|name| {
                let value = arm.parameters.get(*name);
                value.map(|value| value.as_str().map_or_else(|| value.to_string(), str::to_owned)).unwrap_or_default()
            }));
            line(cells);
        };
        let tested = |tested: &Tested| {
            let difference = &tested.difference;
            let n = Some(difference.n as f64);
            [Some(difference.mean), difference.low, difference.high, n, difference.p, tested.p_holm]
        };
        for metric in &comparison.metrics {
            let found = arm.metrics.get(metric).copied().flatten();
            let numbers = found
                .map_or([None; 6], |found| [Some(found.mean), found.low, found.high, Some(found.n as f64), None, None]);
            row("mean", metric, numbers);
        }
        for (first, second) in &comparison.differences {
            let name = difference_name(first, second);
            let found = arm.differences.get(&name).copied().flatten();
            row("difference", &name, found.as_ref().map_or([None; 6], tested));
        }
        for metric in &comparison.metrics {
            let Some(versus) = &arm.versus_baseline else { continue };
            let found = versus.get(metric).copied().flatten();
            row("versus_baseline", metric, found.as_ref().map_or([None; 6], tested));
        }
    }
    text
}

/// A field as RFC 4180 has it.
fn quoted(cell: &str) -> String {
    if cell.contains([',', '"', '\n', '\r']) { format!("\"{}\"", cell.replace('"', "\"\"")) } else { cell.to_owned() }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::table::tests::comparison;

    #[test]
    fn every_number_is_a_row() {
        let mut comparison = comparison();
        comparison.arms[1].parameters = [("drop".to_owned(), "a,\"b\"".into())].into();
        insta::assert_snapshot!(write(&comparison, true), @r#"
        experiment,arm,seeds,what,metric,mean,low,high,n,p,p_holm,claim,read_at,drop
        maze,drop=none,1,mean,sft.solved,0.72,0.7,0.74,1000,,,A,,
        maze,drop=none,1,mean,grpo.solved,,,,,,,A,,
        maze,drop=none,1,difference,grpo.solved - sft.solved,0.061,0.04,0.082,1000,0.0001,0.0002,A,,
        maze,drop=progress,1,mean,sft.solved,0.72,0.7,0.74,1000,,,A,,"a,""b"""
        maze,drop=progress,1,mean,grpo.solved,,,,,,,A,,"a,""b"""
        maze,drop=progress,1,difference,grpo.solved - sft.solved,0.061,0.04,0.082,1000,0.0001,0.0002,A,,"a,""b"""
        maze,drop=progress,1,versus_baseline,sft.solved,-0.01,0.04,0.082,1000,0.0001,0.3,A,,"a,""b"""
        maze,drop=progress,1,versus_baseline,grpo.solved,,,,,,,A,,"a,""b"""
        "#);
        assert!(!write(&comparison, false).contains("experiment,"));
    }
}
