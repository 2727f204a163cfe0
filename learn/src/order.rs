//! The order in which training draws rows: a fresh shuffle every epoch, from counters alone.
//!
//! The n-th row drawn is a pure function of the seed and n, so a run that resumes needs to know only how many it drew.

use pipe::random;

/// Rows in shuffled order, epoch after epoch.
#[derive(Clone, Debug)]
pub struct Order {
    purpose: &'static str,
    seed: u64,
    rows: Vec<usize>,
    epoch: Option<u64>,
    shuffled: Vec<usize>,
}

impl Order {
    /// The order of `rows` (not empty); `purpose` keeps the draws of different kinds apart.
    pub fn new(purpose: &'static str, seed: u64, rows: Vec<usize>) -> Self {
        assert!(!rows.is_empty(), "an order of no rows was asked for");
        Self { purpose, seed, rows, epoch: None, shuffled: Vec::new() }
    }

    /// The row that is drawn after `drawn` others.
    pub fn at(&mut self, drawn: u64) -> usize {
        let (epoch, place) = (drawn / self.rows.len() as u64, drawn % self.rows.len() as u64);
        if self.epoch != Some(epoch) {
            self.shuffled.clone_from(&self.rows);
            random::shuffle(&mut random::rng(self.purpose, &[self.seed, epoch]), &mut self.shuffled);
            self.epoch = Some(epoch);
        }
        self.shuffled[place as usize]
    }

    /// The `count` rows that are drawn after `drawn` others.
    pub fn take(&mut self, drawn: u64, count: u64) -> Vec<usize> {
        (drawn..drawn + count).map(|drawn| self.at(drawn)).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_epoch_draws_every_row_once_in_an_order_of_its_own() {
        let rows: Vec<usize> = (10..17).collect();
        let mut order = Order::new("test", 1, rows.clone());
        let epochs: Vec<Vec<usize>> = (0..3).map(|epoch| order.take(epoch * 7, 7)).collect();
        for epoch in &epochs {
            let mut sorted = epoch.clone();
            sorted.sort_unstable();
            assert_eq!(sorted, rows);
        }
        assert!(epochs[0] != epochs[1] && epochs[1] != epochs[2] && epochs[0] != rows);
        assert_ne!(Order::new("test", 2, rows).take(0, 7), epochs[0]);
    }

    #[test]
    fn a_row_is_drawn_alike_wherever_one_begins() {
        let mut whole = Order::new("test", 3, (0..5).collect());
        let all = whole.take(0, 20);
        for begin in [13, 4, 19, 0] {
            assert_eq!(Order::new("test", 3, (0..5).collect()).at(begin), all[begin as usize]);
        }
    }
}
