//! Chance for the disk in memory: what a cut keeps is a function of a seed.

/// A small generator of random numbers (SplitMix64), for what a cut keeps.
#[derive(Clone, Debug)]
pub(in super::super) struct Dice(pub(in super::super) u64);

impl Dice {
    /// A number below `sides`.
    pub(in super::super) fn roll(&mut self, sides: usize) -> usize {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        ((mixed ^ (mixed >> 31)) % sides as u64) as usize
    }
}
