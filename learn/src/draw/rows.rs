//! [`super::draw`] for a whole batch where its logits lie: of a GPU's logits only the tokens travel to the host.
//!
//! The cumulative sum is formed in two levels: of blocks of ids, and within the block where a token falls. It is the same sum
//! in fp64 in another order, so that a token differs from the host's where the uniform number lies within some 1e-13 of a
//! border. Sums are products with a triangle of ones, because libtorch's own running sum has no fixed order on a GPU.

use anyhow::{Context as _, Result, ensure};
use tch::{Kind, Tensor, no_grad};

use super::Choice;

/// Ids in a block.
const BLOCK: i64 = 512;
/// Elements in fp64 at a time: 256 MiB.
const ELEMENTS: i64 = 1 << 25;

/// Bytes of the widest table that [`draw_rows`] forms of `rows` rows of `vocabulary` logits.
pub fn table_bytes(rows: u64, vocabulary: u64) -> u64 {
    let width = vocabulary.next_multiple_of(BLOCK as u64);
    8 * width * rows.min((ELEMENTS as u64 / vocabulary).max(1))
}

/// Chooses an id in each row of `logits` `[R, V]` f32 by the uniform number of that row; `None` where a logit is not finite.
/// At temperature 0 the numbers do not matter.
pub fn draw_rows(logits: &Tensor, temperature: f64, uniforms: &[f64]) -> Result<Vec<Option<Choice>>> {
    let (rows, vocabulary) = logits.size2().context("logits have two dimensions")?;
    ensure!(uniforms.len() as i64 == rows && vocabulary > 0, "a uniform number for every row");
    let at_once = (ELEMENTS / vocabulary).max(1);
    let uniforms = Tensor::from_slice(uniforms).to_device(logits.device());
    let drawn = no_grad(|| {
        let some = |first: i64| {
            let count = at_once.min(rows - first);
            draw_some(&logits.narrow(0, first, count), temperature, &uniforms.narrow(0, first, count))
        };
        Tensor::cat(&(0..rows).step_by(at_once as usize).map(some).collect::<Vec<_>>(), 1)
    });
    let drawn = Vec::<f64>::try_from(&drawn.view(-1)).context("cannot read the tokens drawn")?;
    let count = rows as usize;
    let choice = |row: usize| {
        let (id, logprob, finite) = (drawn[row], drawn[count + row], drawn[2 * count + row] > 0.0);
        finite.then(|| Choice { id: id as i64, logprob: logprob as f32, kept: Vec::new() })
    };
    Ok((0..count).map(choice).collect())
}

/// `[3, R]` f64: ids, log-probabilities, and 1 where all logits are finite.
fn draw_some(logits: &Tensor, temperature: f64, uniforms: &Tensor) -> Tensor {
    let (rows, vocabulary) = logits.size2().expect("two dimensions");
    let blocks = (vocabulary + BLOCK - 1) / BLOCK;
    let device = logits.device();
    // A logit that is no number makes both of its row none.
    let (lowest, top) = logits.aminmax(-1, true);
    let finite = lowest.isfinite().logical_and(&top.isfinite());
    let highest = logits.argmax(-1, true);
    let greedy = temperature == 0.0;
    let temperature = if greedy { 1.0 } else { temperature };
    let top = top.to_kind(Kind::Double);

    let weights = Tensor::zeros([rows, blocks * BLOCK], (Kind::Double, device));
    let mut real = weights.narrow(1, 0, vocabulary);
    real.copy_(logits);
    real -= &top;
    real /= temperature;
    let _ = real.exp_();
    let weights = weights.view([rows, blocks, BLOCK]);
    // [R, blocks]: the sum up to each block's end.
    let ends = running(&weights.sum_dim_intlist([-1i64].as_slice(), false, Kind::Double));
    let total = ends.narrow(1, blocks - 1, 1);
    let id = if greedy {
        highest
    } else {
        let bound = uniforms.unsqueeze(1) * &total;
        let block = first_above(&ends, &bound).clamp_max(blocks - 1);
        let begins = Tensor::cat(&[total.zeros_like(), ends.narrow(1, 0, blocks - 1)], 1);
        let within = weights.gather(1, &block.unsqueeze(2).expand([rows, 1, BLOCK], false), false).squeeze_dim(1);
        let place = first_above(&(running(&within) + begins.gather(1, &block, false)), &bound);
        // u < 1, so some id qualifies unless rounding lifted the product to the sum itself.
        let found = place.lt(BLOCK).logical_and(&bound.lt_tensor(&total));
        (block * BLOCK + place).where_self(&found, &highest)
    };
    let chosen = logits.gather(1, &id, false).to_kind(Kind::Double);
    let logprob = (chosen - top) / temperature - total.log();
    Tensor::cat(&[id.to_kind(Kind::Double), logprob, finite.to_kind(Kind::Double)], 1).tr().contiguous()
}

/// The sums of the first elements of each row, `[R, N]` f64.
fn running(x: &Tensor) -> Tensor {
    let count = x.size()[1];
    x.matmul(&Tensor::ones([count, count], (Kind::Double, x.device())).triu(0))
}

/// The first place in each row of `sums` `[R, N]`, which rise, that is above `bound` `[R, 1]`; N where none is.
fn first_above(sums: &Tensor, bound: &Tensor) -> Tensor {
    bound.searchsorted(sums, false, true, "right", None::<&Tensor>)
}

#[cfg(test)]
mod tests {
    use pipe::random::{rng, uniform_at};
    use tch::Device;

    use super::super::draw;
    use super::*;

    /// Logits of many shapes: flat and peaked, with ties, fewer and more than a block.
    fn logits(rows: i64, vocabulary: i64, height: f64) -> Tensor {
        let wave = (Tensor::arange(rows * vocabulary, (Kind::Double, Device::Cpu)) * 12.9898).sin() * 43758.5453;
        ((&wave - wave.floor()) * 16.0).floor().to_kind(Kind::Float).view([rows, vocabulary]) * (height / 16.0)
    }

    #[test]
    fn tokens_are_those_that_the_host_draws() {
        let mut compared = 0u64;
        for (vocabulary, height) in [(3i64, 1.0), (13, 8.0), (511, 4.0), (512, 0.5), (513, 30.0), (5000, 12.0)] {
            for temperature in [0.0, 0.6, 1.0, 1.7] {
                let rows = 200;
                let logits = logits(rows, vocabulary, height);
                let uniforms: Vec<f64> =
                    (0..rows as u64).map(|row| uniform_at(&rng("sample", &[row, vocabulary as u64]), 0)).collect();
                let drawn = draw_rows(&logits, temperature, &uniforms).expect("tokens");
                let host = Vec::<f32>::try_from(&logits.view(-1)).expect("numbers");
                for ((drawn, row), uniform) in drawn.iter().zip(host.chunks(vocabulary as usize)).zip(&uniforms) {
                    let (ours, hosts) = (drawn.as_ref().expect("finite"), draw(row, temperature, || *uniform));
                    let hosts = hosts.expect("finite");
                    assert_eq!(ours.id, hosts.id, "{vocabulary} ids, temperature {temperature}");
                    assert!((ours.logprob - hosts.logprob).abs() <= 1e-6 && ours.kept.is_empty());
                    compared += 1;
                }
            }
        }
        assert_eq!(compared, 4800);
    }

    #[test]
    fn the_borders_are_the_hosts() {
        let only = |logits: &[f32], temperature: f64, u: f64| {
            let rows = Tensor::from_slice(logits).unsqueeze(0);
            draw_rows(&rows, temperature, &[u]).expect("tokens").remove(0).map(|choice| choice.id)
        };
        assert_eq!(only(&[0.0, 0.0], 1.0, 0.0), Some(0));
        assert_eq!(only(&[0.0, 0.0], 1.0, 0.5), Some(1), "strictly greater than");
        assert_eq!(only(&[-200.0, 0.0], 1.0, 0.0), Some(0), "a tiny probability holds the beginning of its range");
        assert_eq!(only(&[1.0, 3.0, 3.0], 0.0, 0.9), Some(1), "the lowest of equals");
        assert_eq!(only(&[0.0, f32::NAN], 1.0, 0.5), None);
        assert_eq!(only(&[0.0, f32::NEG_INFINITY], 1.0, 0.5), None);
        assert_eq!(only(&[f32::INFINITY, 0.0], 0.0, 0.5), None);
        let almost = 1.0 - f64::EPSILON / 2.0;
        for count in [1usize, 2, 511, 513, 1025] {
            let flat = vec![0.25f32; count];
            let last = only(&flat, 1.0, almost);
            assert_eq!(last, draw(&flat, 1.0, || almost).map(|choice| choice.id), "{count}");
        }
        // A row that is none spoils no other.
        let rows = Tensor::from_slice2(&[[0f32, f32::NAN], [0.0, 5.0]]);
        let drawn = draw_rows(&rows, 1.0, &[0.5, 0.5]).expect("tokens");
        assert!(drawn[0].is_none() && drawn[1].as_ref().is_some_and(|choice| choice.id == 1));
        assert!(draw_rows(&rows, 1.0, &[0.5]).is_err());
    }

    #[test]
    fn tokens_come_as_often_as_they_should() {
        let (rows, vocabulary) = (4000i64, 1500i64);
        // One id of the third block has half of all, one of the first a quarter.
        let logits = Tensor::full([rows, vocabulary], (0.25f64 / 1498.0).ln(), (Kind::Float, Device::Cpu));
        let _ = logits.narrow(1, 1100, 1).fill_(0.5f64.ln());
        let _ = logits.narrow(1, 7, 1).fill_(0.25f64.ln());
        let uniforms: Vec<f64> = (0..rows as u64).map(|row| uniform_at(&rng("sample", &[row]), 0)).collect();
        let drawn = draw_rows(&logits, 1.0, &uniforms).expect("tokens");
        let share = |id: i64| drawn.iter().flatten().filter(|choice| choice.id == id).count() as f64 / rows as f64;
        for (id, p) in [(1100, 0.5), (7, 0.25)] {
            let deviation = (p * (1.0 - p) / rows as f64).sqrt();
            assert!((share(id) - p).abs() < 4.0 * deviation, "{} for {p}", share(id));
        }
    }
}
