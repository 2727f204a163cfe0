//! Every line of the store that asks for a sync, left out in turn: the play must become wrong, or the line is not needed.

use std::collections::{BTreeMap, HashSet};
use std::sync::Arc;

use rayon::iter::{IntoParallelRefIterator as _, ParallelIterator as _};

use super::super::faults::{Asked, Fault, Faulty};
use super::super::volatile::{Dice, Volatile};
use super::{Expected, Play, Score, expected, scene, wrong};

/// By the number of an act the syncs that a site asks for in it, as numbers and as they were asked for.
type Places = BTreeMap<usize, (HashSet<usize>, Vec<Asked>)>;

/// A place to begin, and what is done from there.
struct Act<'a> {
    begin: &'a Volatile,
    act: &'a (dyn Fn(&mut Play) + Sync),
}

impl Act<'_> {
    /// Where syncs are asked for, in order.
    fn asked(&self) -> Vec<Asked> {
        let disk = Arc::new(self.begin.after_kill());
        let faulty = Arc::new(Faulty::tracing(disk.clone()));
        let mut play = Play::on(disk, faulty);
        (self.act)(&mut play);
        assert!(play.errors.is_empty(), "{:?}", play.errors);
        play.faulty.asked()
    }

    /// Whether a cut after one of the syncs that are left out shows that they were.
    fn misses(&self, syncs: &[Asked], omitted: &HashSet<usize>, expected: &Expected) -> bool {
        let score = Score::of(self.begin, self.act);
        let cuts = score.cuts();
        let shows = |cut: usize, seeds: std::ops::Range<u64>| {
            let mut play = Play::begin(self.begin.after_kill(), Some((cut, Fault::Killed)), omitted);
            (self.act)(&mut play);
            let mut left = seeds.map(|seed| play.disk.after_cut(&mut Dice(seed << 32 | cut as u64)));
            left.any(|disk| wrong(disk, &play.told, expected).is_err())
        };
        // When somebody was told first, and then at every moment that follows.
        let some = || syncs.iter().take(6).map(|asked| asked.operation);
        some().any(|from| score.ends.iter().filter(|end| **end > from).take(2).any(|end| shows(*end, 0..4)))
            || score.ends.last().is_some_and(|end| shows(*end, 0..8))
            || some().any(|from| cuts.iter().filter(|cut| **cut > from).take(40).any(|cut| shows(*cut, 0..6)))
    }
}

#[test]
fn every_line_that_asks_for_a_sync_is_missed() {
    let expected = expected();
    let (scene, empty) = (scene(&expected), super::empty());
    let everything = |play: &mut Play| play.everything(&expected);
    let first = |play: &mut Play| play.publish(1);
    let acts = [Act { begin: &scene, act: &everything }, Act { begin: &empty, act: &first }];
    // For each the acts that come to it, and which syncs it asks for there.
    let mut sites: BTreeMap<String, Places> = BTreeMap::new();
    for (which, act) in acts.iter().enumerate() {
        for (number, asked) in act.asked().into_iter().enumerate() {
            let (numbers, syncs) = sites.entry(asked.site.clone()).or_default().entry(which).or_default();
            numbers.insert(number);
            syncs.push(asked);
        }
    }
    assert!(sites.len() > 15 && sites.keys().all(|site| site.contains(".rs:")), "{:#?}", sites.keys());
    let is_missed =
        |found: &Places| found.iter().any(|(which, (numbers, syncs))| acts[*which].misses(syncs, numbers, &expected));
    let needless: Vec<&String> =
        sites.par_iter().filter(|(_, found)| !is_missed(found)).map(|(site, _)| site).collect();
    assert!(needless.is_empty(), "of {} nobody misses {needless:#?}", sites.len());
}
