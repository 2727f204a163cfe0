//! Which results go: a pure function of what is there and what is asked.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};

use jiff::{SignedDuration, Timestamp};

use super::survey::{Stored, Survey};
use super::{GcPlan, GcPolicy, Gone, Kept, Removal};
use crate::pipeline::store::Digest;

/// A plan without garbage. What is leased, pinned, a root or among the newest always stays; of the rest, what is too old goes, then what was
/// used least recently until the store fits.
pub(super) fn choose(
    survey: &Survey,
    policy: &GcPolicy,
    leased: &HashSet<Digest>,
    pinned: &BTreeSet<Digest>,
    now: Timestamp,
) -> GcPlan {
    let mut kept: Vec<Option<Kept>> = survey.results.iter().map(|one| must_stay(one, policy, leased, pinned)).collect();
    if policy.keep_inputs {
        keep_inputs(&survey.results, &mut kept);
    }
    let mut gone: BTreeMap<usize, Gone> = BTreeMap::new();
    for (index, one) in survey.results.iter().enumerate().filter(|(index, _)| kept[*index].is_none()) {
        if let Some(why) = wanted_gone(one, policy, now) {
            gone.insert(index, why);
        }
    }
    let mut held = Held::new(&survey.results);
    let size = held.bytes;
    for index in gone.keys() {
        held.remove(&survey.results[*index]);
    }
    let mut by_use: Vec<usize> = (0..survey.results.len()).collect();
    by_use.sort_by_key(|index| (survey.results[*index].last_used, &survey.results[*index].key));
    let most = policy.max_size.unwrap_or(u64::MAX);
    for index in &by_use {
        if held.bytes <= most {
            break;
        }
        if kept[*index].is_none() && !gone.contains_key(index) {
            held.remove(&survey.results[*index]);
            gone.insert(*index, Gone::Size);
        }
    }
    let mut plan =
        GcPlan { size, freed: size - held.bytes, over: held.bytes.saturating_sub(most), ..GcPlan::default() };
    let mut inputs_of_kept = HashSet::new();
    for (index, one) in survey.results.iter().enumerate().filter(|(index, _)| !gone.contains_key(index)) {
        plan.kept.entry(kept[index].unwrap_or(Kept::NoRule)).or_default().add(one.bytes());
        inputs_of_kept.extend(&one.inputs);
    }
    let is_input = |one: &Stored| {
        // Another result that stays may have the same object: then nothing is lost.
        one.objects.keys().any(|object| inputs_of_kept.contains(object) && !held.count.contains_key(object))
    };
    for index in by_use {
        let (one, Some(why)) = (&survey.results[index], gone.get(&index)) else { continue };
        plan.inputs_of_kept += usize::from(is_input(one));
        let name = one.names.first().map(|(name, _)| name.to_string()).unwrap_or_default();
        plan.results.push(Removal {
            key: one.key.clone(),
            kind: one.kind.clone(),
            name,
            last_used: one.last_used,
            bytes: one.bytes(),
            why: *why,
        });
    }
    plan
}

fn must_stay(one: &Stored, policy: &GcPolicy, leased: &HashSet<Digest>, pinned: &BTreeSet<Digest>) -> Option<Kept> {
    let newest = policy.keep_last.is_some_and(|last| one.names.iter().any(|(_, newer)| *newer < last));
    let rules = [
        (leased.contains(&one.key), Kept::InUse),
        (pinned.contains(&one.key), Kept::Pinned),
        (policy.roots.contains(&one.key), Kept::Needed),
        (newest, Kept::Newest),
    ];
    rules.into_iter().find_map(|(holds, kept)| holds.then_some(kept))
}

/// Whether a rule that looks at one result alone wants it gone.
fn wanted_gone(one: &Stored, policy: &GcPolicy, now: Timestamp) -> Option<Gone> {
    if let Some(age) = policy.older_than {
        let age = SignedDuration::try_from(age).unwrap_or(SignedDuration::MAX);
        return (now.duration_since(one.last_used) > age).then_some(Gone::Old);
    }
    // A result without a name is no older version of anything: only its age or its size can speak against it.
    let superseded = policy.keep_last.is_some() && policy.max_size.is_none() && !one.names.is_empty();
    superseded.then_some(Gone::Superseded)
}

/// What results that stay were made from stays, and so on.
fn keep_inputs(results: &[Stored], kept: &mut [Option<Kept>]) {
    let mut makers: HashMap<&Digest, Vec<usize>> = HashMap::new();
    for (index, one) in results.iter().enumerate() {
        one.objects.keys().for_each(|object| makers.entry(object).or_default().push(index));
    }
    let mut open: Vec<usize> = (0..results.len()).filter(|index| kept[*index].is_some()).collect();
    while let Some(index) = open.pop() {
        for maker in results[index].inputs.iter().filter_map(|input| makers.get(input)).flatten() {
            if kept[*maker].is_none() {
                kept[*maker] = Some(Kept::Input);
                open.push(*maker);
            }
        }
    }
}

/// The bytes of the results that stay, each object counted once.
struct Held<'a> {
    count: HashMap<&'a Digest, usize>,
    bytes: u64,
}

impl<'a> Held<'a> {
    fn new(results: &'a [Stored]) -> Self {
        let mut held = Self { count: HashMap::new(), bytes: 0 };
        for one in results {
            held.bytes += one.logs;
            for (object, bytes) in &one.objects {
                let count = held.count.entry(object).or_insert(0);
                held.bytes += if *count == 0 { *bytes } else { 0 };
                *count += 1;
            }
        }
        held
    }

    fn remove(&mut self, one: &Stored) {
        self.bytes -= one.logs;
        for (object, bytes) in &one.objects {
            let count = self.count.get_mut(object).expect("it was counted");
            *count -= 1;
            if *count == 0 {
                self.count.remove(object);
                self.bytes -= bytes;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::pipeline::plan::NodeName;
    use crate::pipeline::store::fixture::key;

    const NOW: i64 = 1_000_000;

    /// A result: its number, days since its last use, its objects with their bytes, its inputs, newer results of its name.
    fn stored(number: usize, days: i64, objects: &[(usize, u64)], inputs: &[usize], newer: Option<usize>) -> Stored {
        let name = NodeName { experiment: "e".into(), trial: String::new(), stage: format!("s{number}") };
        Stored {
            key: key(number),
            kind: "test".into(),
            objects: objects.iter().map(|(object, bytes)| (key(*object), *bytes)).collect(),
            inputs: inputs.iter().map(|input| key(*input)).collect(),
            logs: 1,
            last_used: Timestamp::from_second(NOW - days * 86_400).unwrap(),
            names: newer.map(|newer| (name, newer)).into_iter().collect(),
        }
    }

    /// Four results: 1 made 2, which shares an object with 3; 4 has no name.
    fn survey() -> Survey {
        let results = vec![
            stored(1, 9, &[(10, 100)], &[], Some(0)),
            stored(2, 3, &[(20, 200)], &[10], Some(0)),
            stored(3, 6, &[(20, 200), (30, 50)], &[], Some(1)),
            stored(4, 8, &[(40, 400)], &[], None),
        ];
        Survey { results, unreadable: 0 }
    }

    fn chosen(policy: &GcPolicy, leased: &[usize], pinned: &[usize]) -> (Vec<usize>, GcPlan) {
        let keys = |numbers: &[usize]| numbers.iter().map(|number| key(*number)).collect::<Vec<_>>();
        let (leased, pinned) = (keys(leased).into_iter().collect(), keys(pinned).into_iter().collect());
        let plan = choose(&survey(), policy, &leased, &pinned, Timestamp::from_second(NOW).unwrap());
        let number = |removal: &Removal| (1..5).find(|number| key(*number) == removal.key).unwrap();
        (plan.results.iter().map(number).collect(), plan)
    }

    fn days(days: u64) -> Duration {
        Duration::from_secs(days * 86_400)
    }

    #[test]
    fn without_a_rule_everything_stays_and_shared_bytes_count_once() {
        let (gone, plan) = chosen(&GcPolicy::default(), &[], &[]);
        assert!(gone.is_empty() && plan.freed == 0);
        assert_eq!(plan.size, 100 + 200 + 50 + 400 + 4);
        assert_eq!(plan.kept[&Kept::NoRule].count, 4);
    }

    #[test]
    fn age_counts_from_the_last_use_and_what_is_kept_is_kept() {
        let policy = GcPolicy { older_than: Some(days(5)), ..GcPolicy::default() };
        let (gone, plan) = chosen(&policy, &[], &[]);
        assert_eq!(gone, [1, 4, 3], "least recently used first");
        assert_eq!((plan.freed, plan.inputs_of_kept), (100 + 400 + 50 + 3, 1));
        assert_eq!(chosen(&policy, &[4], &[1]).0, [3]);
        let policy = GcPolicy { roots: [key(3)].into(), keep_inputs: true, ..policy };
        let (gone, plan) = chosen(&policy, &[2], &[]);
        assert_eq!(gone, [4]);
        let why: Vec<Kept> = plan.kept.into_keys().collect();
        assert_eq!(why, [Kept::InUse, Kept::Needed, Kept::Input]);
    }

    #[test]
    fn the_least_recently_used_go_until_the_store_fits() {
        let policy = |max_size| GcPolicy { max_size: Some(max_size), ..GcPolicy::default() };
        assert_eq!(chosen(&policy(754), &[], &[]).0, Vec::<usize>::new());
        assert_eq!(chosen(&policy(653), &[], &[]).0, [1]);
        assert_eq!(chosen(&policy(652), &[], &[]).0, [1, 4]);
        let (gone, plan) = chosen(&policy(0), &[4], &[]);
        assert_eq!((gone, plan.over), (vec![1, 3, 2], 401));
    }

    #[test]
    fn the_newest_stay_and_alone_the_rule_removes_what_they_replaced() {
        let last = GcPolicy { keep_last: Some(1), ..GcPolicy::default() };
        assert_eq!(chosen(&last, &[], &[]).0, [3]);
        assert_eq!(chosen(&GcPolicy { keep_last: Some(2), ..last.clone() }, &[], &[]).0, Vec::<usize>::new());
        assert_eq!(chosen(&GcPolicy { older_than: Some(days(7)), ..last.clone() }, &[], &[]).0, [4]);
        assert_eq!(chosen(&GcPolicy { max_size: Some(0), ..last }, &[], &[]).0, [4, 3]);
    }
}
