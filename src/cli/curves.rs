//! The curves of one training run, from the records of its steps, and what is read of them at a point.
//!
//! A run that was killed and taken up again has one record a step, so sums over records are sums over the steps that count.

use std::collections::BTreeMap;
use std::fmt;
use std::path::Path;

use serde::de::{IgnoredAny, MapAccess, Visitor};
use serde::{Deserializer as _, Serialize};
use serde_json::Value;

use crate::pipeline::spec::point::{Axis, Point};
use crate::statistics::curve::{Curve, Side};
use crate::telemetry::METRICS_FILE;

/// What every axis is made of.
const GROUPS: [&str; 2] = ["groups/all_equal", "groups/mixed"];
const STEP_SECONDS: &str = "seconds/step";
const OTHER_SECONDS: [&str; 2] = ["seconds/evaluation", "seconds/saving"];
const TOKENS: &str = "tokens";
const DIVERGENCE: &str = "policy/reference_k3";

/// The records of a run's steps.
#[derive(Clone, Debug, Default)]
pub struct Curves {
    steps: Vec<f64>,
    /// By name, the places in `steps` and the values; what is not finite is left out.
    columns: BTreeMap<String, Vec<(usize, f64)>>,
    /// Samples of a group; 0 where the stage has none.
    group_size: f64,
    /// The curve that selects the output `best`.
    selecting: Option<String>,
}

/// What a point of several runs' curves came to be.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Matched {
    /// The name of its axis.
    pub axis: &'static str,
    /// How much of it.
    pub value: f64,
    /// Whether it is the most that every run reached, and not what a file or an option asked for.
    pub is_common: bool,
}

impl Curves {
    /// Reads the curves that `wanted` says yes to, and what the axes are made of. A folder without records gives no curves.
    pub fn read(logs: &Path, params: &Value, wanted: &dyn Fn(&str) -> bool) -> Self {
        let text = std::fs::read_to_string(logs.join(METRICS_FILE)).unwrap_or_default();
        let mut curves = Self {
            group_size: params.get("group_size").and_then(Value::as_f64).unwrap_or(0.0),
            selecting: params
                .pointer("/validate/select")
                .and_then(Value::as_str)
                .map(|measure| format!("validation/{measure}")),
            ..Self::default()
        };
        let selecting = curves.selecting.clone();
        let keeps = |name: &str| {
            GROUPS.contains(&name)
                || OTHER_SECONDS.contains(&name)
                || [STEP_SECONDS, TOKENS, DIVERGENCE].contains(&name)
                || selecting.as_deref() == Some(name)
                || wanted(name)
        };
        for line in text.lines() {
            let mut record = Record { keeps: &keeps, curves: &mut curves, step: None, values: Vec::new() };
            // A line that was torn by a kill says nothing.
            if serde_json::Deserializer::from_str(line).deserialize_map(&mut record).is_ok() {
                record.take();
            }
        }
        curves
    }

    /// The names of its curves.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.columns.keys().map(String::as_str)
    }

    /// Whether nothing was recorded.
    pub fn is_empty(&self) -> bool {
        self.steps.is_empty()
    }

    /// A curve over steps; empty where there is none of that name.
    pub fn over_steps(&self, name: &str) -> Curve {
        let column = self.columns.get(name).map(Vec::as_slice).unwrap_or_default();
        Curve::new(column.iter().map(|(at, value)| (self.steps[*at], *value)))
    }

    /// What had been spent of `axis` by each step; empty where it is not recorded.
    fn spent(&self, axis: Axis) -> Curve {
        let sums = |weights: &[(&str, f64)]| {
            let mut each = vec![0.0; self.steps.len()];
            for (name, weight) in weights {
                for (at, value) in self.columns.get(*name).into_iter().flatten() {
                    each[*at] += weight * value;
                }
            }
            let total = each.into_iter().scan(0.0, |sum, value| {
                *sum += value;
                Some(*sum)
            });
            Curve::new(self.steps.iter().copied().zip(total))
        };
        let has = |name: &str| self.columns.contains_key(name);
        match axis {
            Axis::Steps => Curve::new(self.steps.iter().map(|step| (*step, *step))),
            Axis::Tokens => self.over_steps(TOKENS),
            Axis::Kl => self.over_steps(DIVERGENCE),
            Axis::Completions if self.group_size > 0.0 && has(GROUPS[0]) => {
                sums(&GROUPS.map(|name| (name, self.group_size)))
            }
            Axis::Seconds if has(STEP_SECONDS) => {
                sums(&[(STEP_SECONDS, 1.0), (OTHER_SECONDS[0], -1.0), (OTHER_SECONDS[1], -1.0)])
            }
            Axis::Completions | Axis::Seconds => Curve::default(),
        }
    }

    /// The most of `axis` that the run has spent; `None` where it is not recorded.
    pub fn most(&self, axis: Axis) -> Option<f64> {
        self.spent(axis).points().iter().map(|(_, spent)| *spent).reduce(f64::max)
    }

    /// The first and the last step with a value of the curve.
    pub fn span(&self, name: &str) -> Option<(f64, f64)> {
        let curve = self.over_steps(name);
        Some((curve.points().first()?.0, curve.points().last()?.0))
    }

    /// What of `name` is read at `point`. `common` is the most of the point's axis, or the span of steps, that every run has.
    pub fn read_at(&self, name: &str, point: Point, common: Option<(f64, f64)>) -> Option<f64> {
        let curve = self.over_steps(name);
        match point {
            Point::Last => curve.points().last().map(|(_, value)| *value),
            Point::Best => curve.at(self.best_step()?),
            Point::Spent(axis, value) => curve.at(self.step_at(axis, value.or(common.map(|(_, most)| most))?)?),
            Point::Reaches { axis, rises, height } => {
                let step = curve.reach(height, if rises { Side::AtLeast } else { Side::AtMost })?;
                self.spent(axis).at(step)
            }
            Point::Area => common.and_then(|(from, to)| curve.mean_height(from, to)),
        }
    }

    /// The step whose weights are the output `best`: the first of the highest validations.
    fn best_step(&self) -> Option<f64> {
        let curve = self.over_steps(self.selecting.as_deref()?);
        let highest = curve.points().iter().map(|(_, value)| *value).reduce(f64::max)?;
        curve.reach(highest, Side::AtLeast)
    }

    /// The step by which `value` of an axis had been spent; `None` where the run ended before. A divergence may fall again:
    /// there it is the first step that was so far away.
    fn step_at(&self, axis: Axis, value: f64) -> Option<f64> {
        // Sums of seconds and of shares are compared with what was summed up in the same way, but for rounding.
        let slack = value.abs() * 1e-9;
        let spent = self.spent(axis);
        let reached = spent.reach(value - slack, Side::AtLeast)?;
        if axis == Axis::Kl {
            return Some(reached);
        }
        let within = spent.points().iter().take_while(|(_, spent)| *spent <= value + slack);
        // Of the first step alone it may already be more: then nothing is known at so little.
        within.last().map(|(step, _)| *step)
    }
}

/// One line, as far as it is wanted.
struct Record<'a> {
    keeps: &'a dyn Fn(&str) -> bool,
    curves: &'a mut Curves,
    step: Option<f64>,
    values: Vec<(String, f64)>,
}

impl Record<'_> {
    fn take(self) {
        let Some(step) = self.step else { return };
        let at = self.curves.steps.len();
        self.curves.steps.push(step);
        for (name, value) in self.values {
            match self.curves.columns.get_mut(&name) {
                Some(column) => column.push((at, value)),
                None => drop(self.curves.columns.insert(name, vec![(at, value)])),
            }
        }
    }
}

impl<'de> Visitor<'de> for &mut Record<'_> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("the record of a step")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<(), A::Error> {
        while let Some(name) = map.next_key::<&str>()? {
            if name == "step" {
                self.step = Some(map.next_value()?);
            } else if (self.keeps)(name) {
                if let Some(value) = map.next_value::<Option<f64>>()? {
                    self.values.push((name.to_owned(), value));
                }
            } else {
                map.next_value::<IgnoredAny>()?;
            }
        }
        Ok(())
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use serde_json::json;

    /// Records of four steps with two validations.
    pub(crate) const RECORDS: &str = r#"{"step":1,"groups/all_equal":1,"groups/mixed":1,"reward":0.1,"seconds/step":2.0,"policy/reference_k3":0.0}
{"step":2,"groups/all_equal":0,"groups/mixed":2,"reward":0.2,"seconds/step":5.0,"seconds/evaluation":3.0,"validation/solved":0.5,"validation/reward":0.3,"policy/reference_k3":0.02}
{"step":3,"groups/all_equal":2,"groups/mixed":2,"reward":null,"seconds/step":2.0,"policy/reference_k3":0.05}
{"step":4,"groups/all_equal":0,"groups/mixed":2,"reward":0.4,"seconds/step":4.0,"seconds/evaluation":2.0,"validation/solved":0.5,"validation/reward":0.6,"policy/reference_k3":0.04}
{"step":5,"rew"#;

    fn curves() -> Curves {
        let logs = tempfile::tempdir().unwrap();
        std::fs::write(logs.path().join(METRICS_FILE), RECORDS).unwrap();
        let params = json!({"group_size": 8, "validate": {"select": "solved"}});
        Curves::read(logs.path(), &params, &|name| name == "reward" || name == "validation/reward")
    }

    #[test]
    fn axes_are_sums_over_the_steps() {
        let curves = curves();
        let most = Axis::ALL.map(|axis| curves.most(axis));
        assert_eq!(most, [Some(4.0), Some(80.0), None, Some(8.0), Some(0.05)]);
        assert_eq!(curves.span("validation/reward"), Some((2.0, 4.0)));
        assert!(!curves.names().any(|name| name == "seconds/decode"));
    }

    #[test]
    fn a_curve_is_read_at_equal_effort() {
        let curves = curves();
        let read = |name: &str, point: &str, common| curves.read_at(name, Point::parse(point).unwrap(), common);
        assert_eq!(read("reward", "last", None), Some(0.4));
        assert_eq!(read("validation/reward", "best", None), Some(0.3), "the earliest wins a tie");
        assert_eq!(read("reward", "steps=3", None), Some(0.2), "what is not a number was left out");
        assert_eq!(read("reward", "completions=40", None), Some(0.2), "16, 32, 64, 80");
        assert_eq!(read("reward", "completions=81", None), None, "the run made fewer");
        assert_eq!(read("reward", "completions", Some((0.0, 64.0))), Some(0.2));
        assert_eq!(read("reward", "completions=3", None), None, "nothing is known at so little");
        assert_eq!(read("reward", "seconds=4", None), Some(0.2), "validation is nobody's training");
        assert_eq!(read("reward", "kl=0.015", None), Some(0.2));
        assert_eq!(read("reward", "kl=0.3", None), None);
        assert_eq!(read("reward", "completions_to>=0.15", None), Some(32.0));
        assert_eq!(read("reward", "steps_to>=0.9", None), None);
        assert_eq!(read("reward", "steps_to<=0.1", None), Some(1.0));
        assert!((read("validation/reward", "auc", Some((2.0, 4.0))).unwrap() - 0.45).abs() < 1e-12);
        assert_eq!(read("reward", "tokens=4", None), None, "it is not recorded");
    }
}
