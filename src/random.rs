//! Counter-based randomness: every draw is a pure function of a purpose, a seed and counters.
//!
//! Nothing in the project draws from a stateful or global generator. A draw is named by what it is for (`purpose`), the
//! seed of its stage and the counters that place it (step, round, instance, sample, token, ...), never by a stage's name,
//! a clock, a thread or the order in which work happens to finish. So a resumed run draws what the uninterrupted run
//! would have drawn, and rows can be computed in any order and on any number of threads.

use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

/// Raised when the bits behind a (purpose, counters) pair change; it enters the key of every stage.
pub const RNG_ABI: u32 = 1;

/// A generator for one place: the stream of `ChaCha8` whose 256-bit seed is the hash of `purpose` and `counters`.
pub fn rng(purpose: &str, counters: &[u64]) -> ChaCha8Rng {
    let mut hasher = blake3::Hasher::new_derive_key("pipe random v1");
    hasher.update(&(purpose.len() as u64).to_le_bytes());
    hasher.update(purpose.as_bytes());
    for counter in counters {
        hasher.update(&counter.to_le_bytes());
    }
    ChaCha8Rng::from_seed(*hasher.finalize().as_bytes())
}

/// One uniform number in `[0, 1)` with 53 random bits, for the `token`-th draw of a place.
///
/// `stream` is the generator that [`rng`] made for the place; drawing does not move it for other tokens, so a
/// generation that restarts at token `t` continues with exactly the draw that it would have made.
pub fn uniform_at(stream: &ChaCha8Rng, token: u64) -> f64 {
    let mut stream = stream.clone();
    stream.set_word_pos(u128::from(token) * 2);
    unit(stream.next_u64())
}

/// The uniform number in `[0, 1)` that 64 random bits stand for: their upper 53 bits over 2^53.
pub fn unit(bits: u64) -> f64 {
    (bits >> 11) as f64 / (1u64 << 53) as f64
}

/// An unbiased integer below `bound` (which must be positive), by rejection.
pub fn below(stream: &mut ChaCha8Rng, bound: u64) -> u64 {
    assert!(bound > 0, "an integer below 0 was asked for");
    let zone = u64::MAX - (u64::MAX % bound + 1) % bound;
    loop {
        let bits = stream.next_u64();
        if bits <= zone {
            return bits % bound;
        }
    }
}

/// Shuffles a slice in place (Fisher-Yates, from the last place down).
pub fn shuffle<T>(stream: &mut ChaCha8Rng, items: &mut [T]) {
    for last in (1..items.len()).rev() {
        let other = below(stream, last as u64 + 1) as usize;
        items.swap(last, other);
    }
}

/// A standard normal number (Box-Muller, the cosine branch of two fresh uniforms).
pub fn normal(stream: &mut ChaCha8Rng) -> f64 {
    let radius = (-2.0 * (1.0 - unit(stream.next_u64())).ln()).sqrt();
    radius * (std::f64::consts::TAU * unit(stream.next_u64())).cos()
}

#[cfg(test)]
#[expect(clippy::float_cmp, reason = "draws are equal to the bit or not at all")]
mod tests {
    use super::*;

    #[test]
    fn golden_values_hold_the_abi() {
        let mut stream = rng("golden", &[1, 2, 3]);
        let drawn: Vec<u64> = (0..4).map(|_| below(&mut stream, 1000)).collect();
        let mut order: Vec<u32> = (0..6).collect();
        shuffle(&mut rng("golden", &[4]), &mut order);
        let normal = normal(&mut rng("golden", &[5]));
        assert_eq!(
            format!("{drawn:?} {order:?} {normal:.12}"),
            "[873, 663, 426, 668] [5, 1, 0, 2, 3, 4] 1.021920992415"
        );
    }

    #[test]
    fn a_token_is_drawn_alike_in_any_order() {
        let stream = rng("sample", &[7]);
        let forwards: Vec<f64> = (0..5).map(|token| uniform_at(&stream, token)).collect();
        let backwards: Vec<f64> = (0..5).rev().map(|token| uniform_at(&stream, token)).collect();
        assert_eq!(forwards, backwards.into_iter().rev().collect::<Vec<_>>());
        assert!(forwards.windows(2).all(|pair| pair[0] != pair[1]));
    }

    #[test]
    fn counters_and_purposes_separate_streams() {
        let first = |stream: ChaCha8Rng| uniform_at(&stream, 0);
        assert_ne!(first(rng("a", &[1])), first(rng("a", &[2])));
        assert_ne!(first(rng("a", &[1])), first(rng("b", &[1])));
        assert_ne!(first(rng("a", &[1, 0])), first(rng("a", &[1])));
    }
}
