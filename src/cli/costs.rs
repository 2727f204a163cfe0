//! Where the time of a stage went, from the records of its steps.

use std::collections::BTreeMap;
use std::path::Path;

use serde_json::Value;

use crate::telemetry::METRICS_FILE;

/// Rates and shares that are shown as the median over the steps.
const RATES: &[&str] = &["mfu", "decode_bandwidth_share", "shared_prompt_share", "padding_share"];

/// Sums of `seconds/*`, medians of rates and shares, and the highest `peak_memory_bytes`, by name; empty where a stage records
/// no such thing.
pub fn read(logs: &Path) -> BTreeMap<String, f64> {
    let text = std::fs::read_to_string(logs.join(METRICS_FILE)).unwrap_or_default();
    // A line that was torn by a kill says nothing.
    let lines = text.lines().filter_map(|line| serde_json::from_str::<BTreeMap<String, Value>>(line).ok());
    let mut seen: BTreeMap<String, Vec<f64>> = BTreeMap::new();
    for (name, value) in lines.flatten() {
        let told = name.starts_with("seconds/")
            || name.starts_with("tokens_per_second")
            || name == "peak_memory_bytes"
            || RATES.contains(&name.as_str());
        if let Some(value) = value.as_f64().filter(|_| told) {
            seen.entry(name).or_default().push(value);
        }
    }
    let one = |(name, mut values): (String, Vec<f64>)| {
        values.sort_by(f64::total_cmp);
        let value = match name.as_str() {
            name if name.starts_with("seconds/") => values.iter().sum(),
            "peak_memory_bytes" => values[values.len() - 1],
            _ => values[values.len() / 2],
        };
        (name, value)
    };
    seen.into_iter().map(one).collect()
}

/// The same in two lines: seconds by phase, the longest first, and rates.
pub fn shown(costs: &BTreeMap<String, f64>) -> Vec<(&'static str, String)> {
    let mut phases: Vec<(&str, f64)> =
        costs.iter().filter_map(|(name, seconds)| Some((name.strip_prefix("seconds/")?, *seconds))).collect();
    phases.sort_by(|one, other| other.1.total_cmp(&one.1));
    let phases: Vec<String> = phases.iter().map(|(phase, seconds)| format!("{phase} {seconds:.3}")).collect();
    let rates = costs.iter().filter(|(name, _)| !name.starts_with("seconds/"));
    let rates = rates.map(|(name, value)| match name.as_str() {
        "peak_memory_bytes" => format!("peak memory {:.0} MiB", value / f64::from(1 << 20)),
        name if name.starts_with("tokens") => format!("{name} {value:.0}"),
        name => format!("{name} {value:.3}"),
    });
    let rates = rates.collect::<Vec<_>>().join(", ");
    [("seconds", phases.join(", ")), ("rates", rates)].into_iter().filter(|(_, text)| !text.is_empty()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn seconds_add_up_and_rates_are_medians() {
        let folder = tempfile::tempdir().unwrap();
        let lines = r#"{"step": 1, "loss": 2.0, "seconds/forward": 1.5, "mfu": 0.1, "peak_memory_bytes": 1048576}
{"step": 2, "loss": null, "seconds/forward": 0.25, "seconds/backward": 4.0, "mfu": 0.5, "peak_memory_bytes": 2097152}
{"step": 3, "mfu": 0.4, "tokens_per_second": 1234.4}
{"step": 4, "mf"#;
        std::fs::write(folder.path().join(METRICS_FILE), lines).unwrap();
        let costs = read(folder.path());
        assert!((costs["seconds/forward"] - 1.75).abs() < 1e-12 && (costs["mfu"] - 0.4).abs() < 1e-12);
        assert!(!costs.contains_key("loss"));
        assert_eq!(
            shown(&costs),
            [
                ("seconds", "backward 4.000, forward 1.750".to_owned()),
                ("rates", "mfu 0.400, peak memory 2 MiB, tokens_per_second 1234".to_owned())
            ]
        );
        assert!(read(&folder.path().join("none")).is_empty());
    }
}
