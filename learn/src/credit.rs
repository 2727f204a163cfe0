//! Credit: from the rewards of a step's samples to the advantage of each of the model's tokens, and to rows to train on.
//!
//! What a KL penalty in the reward costs belongs to a chunk, whose samples and reference never change; advantages are of the
//! whole batch of a step, and are computed anew wherever they are needed. The arithmetic is in [`crate::advantage`].

use pipe::rewards::Outcome;
use pipe::stages::grpo::Grpo;
use pipe::stages::grpo::axes::{Advantage, KlPlace};

use crate::advantage::{Earned, Turn, advantages, of_tokens};
use crate::model::Transformer;
use crate::policy::{PolicyRow, penalties};
use crate::prompts::Prompts;
use crate::rollout::{Sample, ScoredGroup};

/// Fills in what each token of the samples costs, where the KL is a part of the reward; else nothing. `policy` as in
/// [`penalties`].
pub fn set_penalties(
    params: &Grpo,
    prompts: &Prompts,
    policy: Option<&Transformer>,
    reference: &Transformer,
    groups: &mut [ScoredGroup],
) -> anyhow::Result<()> {
    let kl = &params.axes.kl;
    if kl.beta == 0.0 || kl.place != KlPlace::Reward {
        return Ok(());
    }
    let rows: Vec<PolicyRow<'_>> = groups
        .iter()
        .flat_map(|group| group.samples.iter().map(move |sample| (prompts.prompt(group.row), sample)))
        .map(|(prompt, sample)| policy_row(params, &prompt, sample, false))
        .collect();
    let costs = penalties(params, policy, reference, &rows)?;
    for (sample, costs) in groups.iter_mut().flat_map(|group| &mut group.samples).zip(costs) {
        sample.penalties = costs;
    }
    Ok(())
}

/// Fills in the advantages of a step's whole batch: a pure function of its rewards, whose `weights` stand in the order of
/// their names. Groups that are dropped are no part of the batch; their advantages are 0. Samples without a total get none.
pub fn set_advantages(rule: &Advantage, weights: &[f64], groups: &mut [ScoredGroup]) -> anyhow::Result<()> {
    let kept = groups.iter().filter(|group| group.kept);
    let earned: Vec<_> =
        kept.map(|group| group.samples.iter().map(|sample| earned(sample, weights)).collect()).collect();
    let mut made = advantages(rule, weights, &earned)?.into_iter();
    for group in groups {
        let of_group = if group.kept { made.next() } else { None };
        let mut of_samples = of_group.into_iter().flatten();
        for sample in &mut group.samples {
            let dropped = sample.total.map_or_else(Vec::new, |_| vec![0.0]);
            sample.advantages = if group.kept { of_samples.next().flatten().unwrap_or_default() } else { dropped };
        }
    }
    Ok(())
}

/// The sample on a row's `prompt` as a row to train on. Outside of the loss its advantages are 0.
pub fn policy_row<'a>(params: &Grpo, prompt: &[i64], sample: &'a Sample, in_loss: bool) -> PolicyRow<'a> {
    let trajectory = &sample.trajectory;
    let turns = trajectory.turn_lengths();
    let advantages = if in_loss {
        of_tokens(params.axes.advantage.level, &sample.advantages, &turns)
    } else {
        vec![0.0; trajectory.length()]
    };
    PolicyRow {
        ids: [prompt, &trajectory.ids].concat(),
        mask: [vec![0; prompt.len()], trajectory.mask()].concat(),
        turn: turns.iter().zip(0..).flat_map(|(&tokens, turn)| std::iter::repeat_n(turn, tokens)).collect(),
        old: &trajectory.logprobs,
        kept: trajectory.kept.as_ref(),
        advantages,
        weights: None,
        in_loss,
    }
}

/// What a sample earned, by the rewards' `weights`; `None` without a total.
fn earned(sample: &Sample, weights: &[f64]) -> Option<Earned> {
    let mut costs = sample.penalties.iter().copied();
    let arrived = |turn: usize| -> f64 {
        let of = |(outcome, weight): (&Outcome, &f64)| match outcome {
            Outcome::Turns(values) => weight * values.get(turn).copied().unwrap_or(0.0),
            Outcome::Value(_) | Outcome::Abstain | Outcome::Error(_) => 0.0,
        };
        sample.rewards.iter().zip(weights).map(of).sum()
    };
    let turn = |(turn, tokens): (usize, usize)| Turn {
        arrived: arrived(turn),
        penalties: (0..tokens).map(|_| costs.next().unwrap_or(0.0)).collect(),
    };
    Some(Earned {
        total: sample.total?,
        components: sample.rewards.iter().map(Outcome::value).collect(),
        turns: sample.trajectory.turn_lengths().into_iter().enumerate().map(turn).collect(),
    })
}

#[cfg(test)]
mod tests {
    use pipe::tasks::{Finish, Measurements};
    use serde_json::json;

    use super::*;
    use crate::trajectory::{Trajectory, TurnRecord};

    fn sample(rewards: Vec<Outcome>, total: Option<f64>, penalties: &[f64]) -> Sample {
        let turn = |begin: usize, end: usize| TurnRecord {
            observation: String::new(),
            begin,
            end,
            text: String::new(),
            finish: Finish::Stop,
            measurements: Measurements::new(),
        };
        let trajectory = Trajectory {
            ids: vec![5, 6, 9, 7],
            logprobs: vec![-0.1, -0.2, -0.3],
            kept: None,
            turns: vec![turn(0, 2), turn(3, 4)],
            truncated: false,
            measurements: Vec::new(),
        };
        Sample { trajectory, rewards, total, penalties: penalties.to_vec(), advantages: Vec::new() }
    }

    fn group(samples: Vec<Sample>, kept: bool) -> ScoredGroup {
        ScoredGroup { row: 0, round: 0, all_equal: !kept, kept, samples }
    }

    fn stage(extra: &serde_json::Value) -> Grpo {
        let mut file = json!({"model": "m", "prompts": "p", "steps": 1, "max_new_tokens": 8, "rewards": {}});
        file.as_object_mut().unwrap().extend(extra.as_object().unwrap().clone());
        serde_json::from_value(file).unwrap()
    }

    #[test]
    fn a_turns_reward_is_behind_the_turns_that_follow_and_each_token_has_its_turns_advantage() {
        let by_turn = |first: f64, second: f64| {
            sample(
                vec![Outcome::Turns(vec![first, second]), Outcome::Value(1.0)],
                Some(2.0 * (first + second) + 1.0),
                &[],
            )
        };
        let params = stage(&json!({"advantage": {"level": "turn", "scale": "none"}}));
        let excluded = sample(vec![Outcome::Abstain, Outcome::Error("no".into())], None, &[]);
        let mut groups = vec![
            group(vec![by_turn(1.0, 0.0), excluded.clone(), by_turn(0.0, 3.0)], true),
            group(vec![by_turn(9.0, 9.0), excluded], false),
        ];
        set_advantages(&params.axes.advantage, &[2.0, 1.0], &mut groups).unwrap();
        let made: Vec<Vec<f64>> =
            groups.iter().flat_map(|group| &group.samples).map(|one| one.advantages.clone()).collect();
        // To come from the first turn: 3 and 7; from the second: 1 and 7.
        assert_eq!(made, [vec![-2.0, -3.0], vec![], vec![2.0, 3.0], vec![0.0], vec![]]);
        let row = policy_row(&params, &[1, 2], &groups[0].samples[0], true);
        assert_eq!((row.ids, row.mask), (vec![1, 2, 5, 6, 9, 7], vec![0, 0, 1, 1, 0, 1]));
        assert_eq!((row.turn, row.advantages), (vec![0, 0, 1], vec![-2.0, -2.0, -3.0]));
    }

    #[test]
    fn penalties_are_taken_from_the_reward_of_the_token_that_costs_them_and_of_those_before() {
        let params = stage(&json!({
            "preset": "reinforce_pp", "advantage": {"scale": "none"}, "kl": {"beta": 0.5}
        }));
        let one = sample(vec![Outcome::Value(4.0)], Some(4.0), &[0.5, 1.0, 0.25]);
        let mut groups = vec![group(vec![one], true)];
        set_advantages(&params.axes.advantage, &[1.0], &mut groups).unwrap();
        let mean = (2.25 + 2.75 + 3.75) / 3.0;
        let made = &groups[0].samples[0].advantages;
        for (made, due) in made.iter().zip([2.25 - mean, 2.75 - mean, 3.75 - mean]) {
            assert!((made - due).abs() < 1e-12);
        }
        assert_eq!(policy_row(&params, &[1], &groups[0].samples[0], true).advantages.len(), 3);
    }
}
