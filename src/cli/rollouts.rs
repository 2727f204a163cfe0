//! What the stored completions of a training say of its rewards, as metrics of the stage: computed when a table asks, from
//! what every training keeps, so that no result has to hold them.

use std::collections::BTreeMap;
use std::path::Path;

use anyhow::bail;
use serde_json::Value;

use crate::stages::table::{Column, read};
use crate::statistics::components::variance_shares;

/// `reward/NAME/variance_share` of every reward: its share in the variance of the total within groups, over the whole run.
///
/// `folder` holds `rollouts.parquet`; `rewards` is the stage's table of rewards, which has their weights. Without a group
/// whose totals differ there are no shares.
pub fn metrics(folder: &Path, rewards: &Value) -> anyhow::Result<BTreeMap<String, f64>> {
    let weights: BTreeMap<&String, f64> = rewards
        .as_object()
        .into_iter()
        .flatten()
        .map(|(name, spec)| (name, spec["weight"].as_f64().unwrap_or(1.0)))
        .collect();
    let named: Vec<String> = weights.keys().map(|name| format!("reward_{name}")).collect();
    let path = folder.join("rollouts.parquet");
    let Column::Integer(sample) = read(&path, &["sample"])?.remove(0) else {
        bail!("the column `sample` of `{}` holds no integers", path.display())
    };
    let number = |name: &str| match read(&path, &[name])?.remove(0) {
        Column::Number(values) => Ok(values),
        _ => bail!("the column `{name}` of `{}` holds no numbers", path.display()),
    };
    let total = number("total")?;
    let earned: Vec<Vec<Option<f64>>> = named.iter().map(|name| number(name)).collect::<anyhow::Result<_>>()?;
    let contributions: Vec<Vec<f64>> = (0..sample.len())
        .map(|row| weights.values().zip(&earned).map(|(weight, own)| weight * own[row].unwrap_or(0.0)).collect())
        .collect();
    let mut groups: Vec<Vec<usize>> = Vec::new();
    for (row, sample) in sample.iter().enumerate() {
        if *sample == Some(0) {
            groups.push(Vec::new());
        }
        // A sample without a total takes no part in learning.
        if let Some(group) = groups.last_mut().filter(|_| total[row].is_some()) {
            group.push(row);
        }
    }
    let shares = variance_shares(&contributions, &groups).unwrap_or_default();
    Ok(weights.keys().zip(shares).map(|(name, share)| (format!("reward/{name}/variance_share"), share)).collect())
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::stages::table::{ColumnType, TableWriter};

    #[test]
    fn shares_are_those_within_groups_over_the_whole_run() {
        let folder = tempfile::tempdir().unwrap();
        let columns = [
            ("sample", ColumnType::Integer),
            ("reward_a", ColumnType::Number),
            ("reward_b", ColumnType::Number),
            ("total", ColumnType::Number),
        ];
        let write = |a: &[Option<f64>], b: &[Option<f64>], total: &[Option<f64>]| {
            let path = folder.path().join("rollouts.parquet");
            if path.exists() {
                std::fs::remove_file(&path).unwrap();
            }
            let mut table = TableWriter::create(&path, &columns).unwrap();
            let sample = Column::integer((0..a.len()).map(|row| (row % 2) as i64));
            table
                .write(vec![
                    sample,
                    Column::Number(a.to_vec()),
                    Column::Number(b.to_vec()),
                    Column::Number(total.to_vec()),
                ])
                .unwrap();
            table.finish().unwrap();
        };
        let rewards = json!({"a": {"kind": "correct", "weight": 2.0}, "b": {"kind": "format", "weight": -1.0}});
        // Totals 2 a - b: 2, 0 | 3, 1.5 (its partner has an error) | 1, 2. Means within groups are 1 and 1.5.
        let a = [Some(1.0), Some(0.0), Some(2.0), Some(1.0), Some(0.5), Some(1.0)];
        let b = [Some(0.0), None, Some(1.0), Some(0.5), Some(0.0), Some(0.0)];
        write(&a, &b, &[Some(2.0), Some(0.0), Some(3.0), None, Some(1.0), Some(2.0)]);
        let found = metrics(folder.path(), &rewards).unwrap();
        assert_eq!(found.keys().collect::<Vec<_>>(), ["reward/a/variance_share", "reward/b/variance_share"]);
        assert!((found["reward/a/variance_share"] - 1.0).abs() < 1e-12, "b does not vary within a group: {found:?}");
        assert!(found["reward/b/variance_share"].abs() < 1e-12);
        // By hand: totals 2 and 1, of a 2 and 2, of b 0 and -1.
        write(&[Some(1.0), Some(1.0)], &[Some(0.0), Some(1.0)], &[Some(2.0), Some(1.0)]);
        let found = metrics(folder.path(), &rewards).unwrap();
        assert!((found["reward/b/variance_share"] - 1.0).abs() < 1e-12, "{found:?}");
        write(&[Some(1.0), Some(1.0)], &[Some(0.0), Some(0.0)], &[Some(2.0), Some(2.0)]);
        assert!(metrics(folder.path(), &rewards).unwrap().is_empty(), "nothing varies");
    }
}
