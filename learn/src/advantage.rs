//! Rewards to advantages, in fp64 and without a tensor, over the whole batch of a step after its last round.
//!
//! Components are joined, what is still to come is counted from each unit on (the episode, a turn, a token), then it is
//! centred and scaled. Where all rewards that are compared are equal (but for the rounding of sums) the advantage is exactly
//! 0: that is asked of the rewards, never of a deviation, which need not come out as 0. An excluded sample is nobody's baseline. It knows no model and no loss.

use anyhow::{Result, ensure};
use pipe::stages::grpo::axes::{Advantage, Aggregation, Centre, Level, Scale};

/// Differences below this share of the numbers that are compared are the rounding of sums.
const ROUNDING: f64 = 1e-13;

/// What one sample earned.
#[derive(Clone, Debug, PartialEq)]
pub struct Earned {
    /// The weighted sum of the components that have a value: what is logged is what is optimised.
    pub total: f64,
    /// Each component of the reward over the whole episode, unweighted; `None` where it abstains.
    pub components: Vec<Option<f64>>,
    /// The model's turns; not empty.
    pub turns: Vec<Turn>,
}

/// One turn of the model's.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Turn {
    /// The part of the weighted sum of components that arrived with this turn. It is no longer to come in later turns; a
    /// reward that only the episode's end gives stands in no turn. Only levels below the episode read it.
    pub arrived: f64,
    /// What each of the turn's tokens costs: `beta` times the KL estimate where that is a part of the reward, else 0.
    pub penalties: Vec<f64>,
}

/// The samples of a group; `None` is excluded: its reward ended in an error.
pub type Group = Vec<Option<Earned>>;

/// One number a unit of the level for every sample of a group; `None` for samples that are excluded.
pub type GroupAdvantages = Vec<Option<Vec<f64>>>;

/// The advantages of every sample of a batch: `[group][sample][unit]`, units being one episode, its turns or its tokens.
///
/// Groups that a step does not train on are not in the batch. `weights` are those of the components. Fails where the rule
/// has no value for the rewards.
pub fn advantages(rule: &Advantage, weights: &[f64], groups: &[Group]) -> Result<Vec<GroupAdvantages>> {
    if rule.aggregation == Aggregation::NormalizeThenSum {
        return Ok(normalized_then_summed(rule, weights, groups));
    }
    let mut units: Vec<GroupAdvantages> = groups
        .iter()
        .map(|group| {
            let of = |sample: &Option<Earned>| sample.as_ref().map(|sample| to_come(rule.level, sample));
            group.iter().map(of).collect()
        })
        .collect();

    // Centre, and scale by what is the group's own.
    let batch = mean(units.iter().flatten().flatten().flatten().copied()).unwrap_or(0.0);
    let batch_is_flat = is_flat(units.iter().flatten().flatten().flatten().copied());
    for group in &mut units {
        match rule.centre {
            Centre::GroupMean | Centre::LeaveOneOut => {
                let longest = group.iter().flatten().map(Vec::len).max().unwrap_or(0);
                for unit in 0..longest {
                    let mut peers: Vec<&mut f64> =
                        group.iter_mut().flatten().filter_map(|values| values.get_mut(unit)).collect();
                    let moved = relative(rule, &peers.iter().map(|value| **value).collect::<Vec<_>>())?;
                    peers.iter_mut().zip(moved).for_each(|(value, moved)| **value = moved);
                }
            }
            Centre::BatchMean => {
                let centred = |value: &mut f64| *value = if batch_is_flat { 0.0 } else { *value - batch };
                group.iter_mut().flatten().flatten().for_each(centred);
            }
            Centre::None => {}
        }
    }
    if rule.scale == Scale::BatchStd {
        divide_by_batch(rule, &mut units);
    }
    Ok(units)
}

/// One number for each of the model's tokens from one for each unit; `turns` counts the tokens of each turn.
pub fn of_tokens(level: Level, units: &[f64], turns: &[usize]) -> Vec<f32> {
    match level {
        Level::Token => units.iter().map(|value| *value as f32).collect(),
        Level::Turn => {
            units.iter().zip(turns).flat_map(|(value, &tokens)| std::iter::repeat_n(*value as f32, tokens)).collect()
        }
        Level::Episode => vec![units[0] as f32; turns.iter().sum()],
    }
}

/// What is still to come from each unit on: of the total, and of the tokens' costs, a token's own included.
fn to_come(level: Level, earned: &Earned) -> Vec<f64> {
    let mut cost: f64 = earned.turns.iter().flat_map(|turn| &turn.penalties).sum();
    let mut left = earned.total;
    let mut units = Vec::new();
    if level == Level::Episode {
        return vec![left - cost];
    }
    for turn in &earned.turns {
        if level == Level::Turn {
            units.push(left - cost);
        }
        for penalty in &turn.penalties {
            if level == Level::Token {
                units.push(left - cost);
            }
            cost -= penalty;
        }
        left -= turn.arrived;
    }
    units
}

/// Rewards of one group centred and, where the scale is the group's, divided.
fn relative(rule: &Advantage, rewards: &[f64]) -> Result<Vec<f64>> {
    if is_flat(rewards.iter().copied()) {
        return Ok(vec![0.0; rewards.len()]);
    }
    let count = rewards.len() as f64;
    let mean = rewards.iter().sum::<f64>() / count;
    let divisor = match rule.scale {
        Scale::GroupStd => deviation(rewards, rule.ddof) + rule.epsilon.unwrap_or(0.0),
        Scale::Mean => {
            let least = rewards.iter().copied().fold(f64::INFINITY, f64::min);
            ensure!(
                least >= 0.0,
                "a reward is {least}, but `advantage.scale` is `mean`, which needs rewards that are nowhere negative"
            );
            mean + rule.epsilon.unwrap_or(0.0)
        }
        Scale::BatchStd | Scale::None => 1.0,
    };
    // r - mean of the others = (r - mean of all) G / (G - 1).
    let stretch = if rule.centre == Centre::LeaveOneOut { count / (count - 1.0) } else { 1.0 };
    Ok(rewards.iter().map(|reward| (reward - mean) * stretch / divisor).collect())
}

/// Each component's z-score in its group, summed with the weights, over the deviation of these sums in the batch.
///
/// The sums of a group have the mean 0, so the batch has, and nothing is left to take away from it. A component that abstains
/// moves its sample neither up nor down.
fn normalized_then_summed(rule: &Advantage, weights: &[f64], groups: &[Group]) -> Vec<GroupAdvantages> {
    let mut units: Vec<GroupAdvantages> = groups
        .iter()
        .map(|group| {
            let mut sums: GroupAdvantages = group.iter().map(|sample| sample.as_ref().map(|_| vec![0.0])).collect();
            let mut sizes = vec![0.0; group.len()];
            for (index, weight) in weights.iter().enumerate() {
                let values: Vec<f64> = spoken(group, index).collect();
                if is_flat(values.iter().copied()) {
                    continue;
                }
                let (mean, divisor) = (mean_of(&values), deviation(&values, rule.ddof) + rule.epsilon.unwrap_or(0.0));
                for ((sum, size), sample) in sums.iter_mut().zip(&mut sizes).zip(group) {
                    let value = sample.as_ref().and_then(|sample| sample.components[index]);
                    if let (Some(sum), Some(value)) = (sum, value) {
                        let score = weight * (value - mean) / divisor;
                        sum[0] += score;
                        *size += score.abs();
                    }
                }
            }
            // Components that cancel leave nothing but rounding, which the batch's deviation would blow up.
            for (sum, size) in sums.iter_mut().zip(sizes) {
                let rounding = |sum: &&mut f64| sum.abs() <= ROUNDING * size;
                sum.iter_mut().flatten().filter(rounding).for_each(|sum| *sum = 0.0);
            }
            sums
        })
        .collect();
    divide_by_batch(rule, &mut units);
    units
}

/// Divides centred values by their deviation in the batch; a batch without spread is 0 already.
fn divide_by_batch(rule: &Advantage, units: &mut [GroupAdvantages]) {
    let all: Vec<f64> = units.iter().flatten().flatten().flatten().copied().collect();
    if !is_flat(all.iter().copied()) {
        let divisor = deviation(&all, rule.ddof) + rule.epsilon.unwrap_or(0.0);
        units.iter_mut().flatten().flatten().flatten().for_each(|value| *value /= divisor);
    }
}

/// The values that component `index` has in a group.
fn spoken(group: &[Option<Earned>], index: usize) -> impl Iterator<Item = f64> {
    group.iter().flatten().filter_map(move |sample| sample.components[index])
}

/// Whether numbers are all equal, but for the rounding of the sums that they are: 0.1 + 0.2 is 0.3.
fn is_flat(values: impl Iterator<Item = f64>) -> bool {
    let (mut least, mut most) = (f64::INFINITY, f64::NEG_INFINITY);
    for value in values {
        if value.is_nan() {
            return false;
        }
        (least, most) = (least.min(value), most.max(value));
    }
    least >= most || most - least <= ROUNDING * least.abs().max(most.abs())
}

fn mean(values: impl Iterator<Item = f64>) -> Option<f64> {
    let (sum, count) = values.fold((0.0, 0u64), |(sum, count), value| (sum + value, count + 1));
    (count > 0).then(|| sum / count as f64)
}

fn mean_of(values: &[f64]) -> f64 {
    values.iter().sum::<f64>() / values.len() as f64
}

/// The standard deviation with `ddof` delta degrees of freedom (1 where the rule names none); of two values or more.
fn deviation(values: &[f64], ddof: Option<u64>) -> f64 {
    let mean = mean_of(values);
    let squares: f64 = values.iter().map(|value| (value - mean).powi(2)).sum();
    (squares / (values.len() as f64 - ddof.unwrap_or(1) as f64)).sqrt()
}

#[cfg(test)]
mod tests {
    use pipe::stages::grpo::Axes;
    use pipe::stages::grpo::preset::Preset;
    use serde_json::{Value, json};

    use super::*;

    fn rule(file: &Value) -> Advantage {
        let axes: Axes = serde_json::from_value(json!({"advantage": file})).unwrap();
        axes.advantage
    }

    #[expect(clippy::unnecessary_wraps, reason = "an element of a group")]
    fn one(components: &[Option<f64>]) -> Option<Earned> {
        let total = components.iter().flatten().sum();
        Some(Earned { total, components: components.to_vec(), turns: vec![Turn::default()] })
    }

    fn plain(rewards: &[f64]) -> Group {
        rewards.iter().map(|reward| one(&[Some(*reward)])).collect()
    }

    fn flat(made: Vec<GroupAdvantages>) -> Vec<f64> {
        made.into_iter().flatten().flatten().flatten().collect()
    }

    fn close(made: &[f64], due: &[f64]) {
        assert_eq!(made.len(), due.len(), "{made:?}");
        for (made_one, due_one) in made.iter().zip(due) {
            assert!((made_one - due_one).abs() < 1e-12, "{made:?} instead of {due:?}");
        }
    }

    #[test]
    fn the_presets_by_hand() {
        let groups = [plain(&[1.0, 0.0, 0.0, 1.0]), plain(&[3.0, 0.0, 0.0, 0.0])];
        let made = |preset: Preset| flat(advantages(&preset.axes().advantage, &[1.0], &groups).unwrap());
        let (first, second) = ((1.0f64 / 3.0).sqrt() + 1e-4, 1.5 + 1e-4);
        let z = [0.5 / first, -0.5 / first, -0.5 / first, 0.5 / first];
        let z = [&z[..], &[2.25 / second, -0.75 / second, -0.75 / second, -0.75 / second]].concat();
        for preset in [Preset::Grpo, Preset::Dapo, Preset::Gspo, Preset::Cispo] {
            close(&made(preset), &z);
        }
        close(&made(Preset::DrGrpo), &[0.5, -0.5, -0.5, 0.5, 2.25, -0.75, -0.75, -0.75]);
        let others = [2.0 / 3.0, -2.0 / 3.0, -2.0 / 3.0, 2.0 / 3.0, 3.0, -1.0, -1.0, -1.0];
        close(&made(Preset::Rloo), &others);
        let (half, quarters) = (0.5 + 1e-6, 0.75 + 1e-6);
        let maxrl = [0.5 / half, -0.5 / half, -0.5 / half, 0.5 / half];
        let maxrl = [&maxrl[..], &[2.25 / quarters, -0.75 / quarters, -0.75 / quarters, -0.75 / quarters]].concat();
        close(&made(Preset::Maxrl), &maxrl);
        // One token each: the z-score over all eight, mean 5/8, squares 11 - 25/8.
        let tokens = groups.map(|group| {
            let with = |sample: Option<Earned>| {
                sample.map(|sample| Earned { turns: vec![Turn { arrived: 0.0, penalties: vec![0.0] }], ..sample })
            };
            group.into_iter().map(with).collect::<Group>()
        });
        let made = flat(advantages(&Preset::ReinforcePp.axes().advantage, &[1.0], &tokens).unwrap());
        let spread = ((11.0 - 25.0 / 8.0) / 7.0f64).sqrt() + 1e-4;
        close(&made, &[1.0, 0.0, 0.0, 1.0, 3.0, 0.0, 0.0, 0.0].map(|reward| (reward - 0.625) / spread));
    }

    #[test]
    fn no_spread_is_exactly_zero() {
        // Seven times 0.1 has a mean that is not 0.1, and so a deviation that is not 0.
        let groups = [plain(&[0.1; 7]), plain(&[0.7, 0.1, 0.1])];
        for file in
            [json!({"epsilon": 0.0}), json!({"scale": "none"}), json!({"scale": "mean"}), json!({"scale": "batch_std"})]
        {
            let made = advantages(&rule(&file), &[1.0], &groups).unwrap();
            assert!(flat(made[..1].to_vec()).iter().all(|advantage| *advantage == 0.0));
            assert!(flat(made[1..].to_vec()).iter().all(|advantage| *advantage != 0.0));
        }
        let sums = rule(&json!({"epsilon": 0.0}));
        let group = vec![one(&[Some(0.1), Some(0.2)]), one(&[Some(0.3), Some(0.0)])];
        assert_eq!(flat(advantages(&sums, &[1.0, 1.0], &[group]).unwrap()), [0.0, 0.0], "0.1 + 0.2 is 0.3");
        let batch = rule(&json!({"centre": "batch_mean", "scale": "batch_std", "epsilon": 0.0}));
        let made = flat(advantages(&batch, &[1.0], &[plain(&[0.1; 7]), plain(&[0.1; 3])]).unwrap());
        assert!(made.iter().all(|advantage| *advantage == 0.0));
        let alone = rule(&json!({"centre": "leave_one_out", "scale": "none"}));
        assert_eq!(flat(advantages(&alone, &[1.0], &[plain(&[5.0])]).unwrap()), [0.0], "nobody to compare with");
        let bare = rule(&json!({"centre": "none", "scale": "none"}));
        assert_eq!(flat(advantages(&bare, &[1.0], &[plain(&[0.1; 2])]).unwrap()), [0.1; 2], "nothing is taken away");
    }

    #[test]
    fn group_mean_over_the_deviation_of_the_batch() {
        let made = advantages(
            &rule(&json!({"scale": "batch_std", "ddof": 0, "epsilon": 0.0})),
            &[1.0],
            &[plain(&[2.0, 0.0]), plain(&[11.0, 9.0])],
        );
        // Centred they are 1, -1, 1, -1, whose deviation is 1: the groups' own means do not enter it.
        close(&flat(made.unwrap()), &[1.0, -1.0, 1.0, -1.0]);
    }

    #[test]
    fn excluded_samples_are_nobodys_baseline() {
        let mut group = plain(&[1.0, 0.0, 0.5]);
        group.insert(1, None);
        for file in [json!({"scale": "none"}), json!({"aggregation": "normalize_then_sum"})] {
            let made = advantages(&rule(&file), &[1.0], std::slice::from_ref(&group)).unwrap().remove(0);
            assert_eq!(made[1], None);
            let due = flat(advantages(&rule(&file), &[1.0], &[plain(&[1.0, 0.0, 0.5])]).unwrap());
            close(&made.into_iter().flatten().flatten().collect::<Vec<_>>(), &due);
        }
    }

    #[test]
    fn normalise_then_sum_ends_in_a_batch_z_score() {
        let rule = rule(&json!({"aggregation": "normalize_then_sum", "epsilon": 0.0, "ddof": 0}));
        // A component a hundred times as large has the same say.
        let group = vec![one(&[Some(1.0), Some(0.0)]), one(&[Some(0.0), Some(100.0)]), one(&[Some(0.0), Some(100.0)])];
        let flat_group = vec![one(&[Some(2.0), Some(3.0)]); 3];
        let made = flat(advantages(&rule, &[1.0, 1.0], &[group.clone(), flat_group]).unwrap());
        assert!(made.iter().all(|advantage| *advantage == 0.0), "equal and opposite z-scores: {made:?}");
        let made = flat(advantages(&rule, &[1.0, 0.0], &[group, vec![one(&[Some(2.0), None]); 3]]).unwrap());
        // z of 1, 0, 0 is (2, -1, -1) / sqrt 2; with three exact zeros their mean square is 1/2.
        close(&made, &[2.0, -1.0, -1.0, 0.0, 0.0, 0.0]);
        assert_eq!(made[3..], [0.0; 3]);
        let abstains = vec![one(&[Some(1.0), None]), one(&[Some(0.0), Some(1.0)]), one(&[Some(0.5), Some(0.0)])];
        let made = flat(advantages(&rule, &[0.0, 1.0], &[abstains]).unwrap());
        assert!(made[0] == 0.0 && made[1] > 0.0 && (made[1] + made[2]).abs() < 1e-12);
    }

    #[test]
    fn what_is_still_to_come_from_a_turn_and_from_a_token() {
        let turn = |arrived: f64, penalties: &[f64]| Turn { arrived, penalties: penalties.to_vec() };
        let earned = Earned {
            total: 10.0,
            components: vec![Some(10.0)],
            turns: vec![turn(3.0, &[0.1, 0.2]), turn(2.0, &[0.3]), turn(0.0, &[0.4])],
        };
        close(&to_come(Level::Episode, &earned), &[9.0]);
        close(&to_come(Level::Turn, &earned), &[9.0, 7.0 - 0.7, 5.0 - 0.4]);
        close(&to_come(Level::Token, &earned), &[9.0, 10.0 - 0.9, 7.0 - 0.7, 5.0 - 0.4]);
        assert_eq!(of_tokens(Level::Turn, &[1.0, 2.0], &[2, 1]), [1.0, 1.0, 2.0]);
        assert_eq!(of_tokens(Level::Episode, &[1.0], &[2, 1]), [1.0, 1.0, 1.0]);
        assert_eq!(of_tokens(Level::Token, &[1.0, 2.0, 3.0], &[2, 1]), [1.0, 2.0, 3.0]);

        // Turns are compared with the same turn of the others; a turn that one alone reached is compared with nobody.
        let short = Earned { total: 4.0, components: vec![Some(4.0)], turns: vec![turn(1.0, &[0.0])] };
        let made = advantages(
            &rule(&json!({"level": "turn", "scale": "none"})),
            &[1.0],
            &[vec![
                Some(Earned {
                    total: 8.0,
                    components: vec![Some(8.0)],
                    turns: vec![turn(3.0, &[0.0]), turn(5.0, &[0.0])],
                }),
                Some(short),
            ]],
        )
        .unwrap();
        assert_eq!(made[0], [Some(vec![2.0, 0.0]), Some(vec![-2.0])]);
    }

    #[test]
    fn a_negative_reward_has_no_mean_to_divide_by() {
        let error = advantages(&Preset::Maxrl.axes().advantage, &[1.0], &[plain(&[1.0, -0.5])]).unwrap_err();
        assert!(error.to_string().contains("-0.5") && error.to_string().contains("`mean`"), "{error}");
        let failed = advantages(&Preset::Maxrl.axes().advantage, &[1.0], &[plain(&[0.0, 0.0])]).unwrap();
        assert_eq!(flat(failed), [0.0, 0.0]);
    }
}
