//! AdamW over one buffer of weights, clipping by the global norm, and the learning rate of a step.
//!
//! The moments are tensors of the caller's to save and restore, which the optimizers of libtorch's C interface do not
//! offer; and with all weights in one buffer a step is one pass over four buffers on a processor, and a
//! dozen vector operations elsewhere, whatever the model.

use std::collections::BTreeMap;

use anyhow::{Result, ensure};
use pipe::stages::training::{Decay, Optimizer, Schedule};
use tch::{Tensor, no_grad};

use crate::model::weights::Weights;
use crate::native::{self, Step};

/// AdamW (Loshchilov and Hutter 2019) with its moments.
#[derive(Debug)]
pub struct AdamW {
    parameters: Optimizer,
    /// First moment, `[P]` f32.
    first: Tensor,
    /// Second moment, `[P]` f32.
    second: Tensor,
    /// Steps taken.
    steps: u64,
}

impl AdamW {
    /// An optimizer at its beginning: moments are 0.
    pub fn new(weights: &Weights, parameters: &Optimizer) -> Self {
        let zeros = || weights.flat().zeros_like();
        Self { parameters: parameters.clone(), first: zeros(), second: zeros(), steps: 0 }
    }

    /// Steps taken.
    pub fn steps(&self) -> u64 {
        self.steps
    }

    /// Moves the weights along their gradients at `learning_rate` and gives the gradients' global norm before clipping.
    ///
    /// A norm that is not finite is an error, and nothing moves. Gradients are kept; the caller sets them to zero.
    pub fn step(&mut self, weights: &Weights, learning_rate: f64) -> Result<f64> {
        let Optimizer { beta1, beta2, epsilon, weight_decay, max_gradient_norm } = self.parameters;
        no_grad(|| {
            let norm = weights.gradient().norm().double_value(&[]);
            ensure!(norm.is_finite(), "the gradient's norm is {norm} at optimizer step {}", self.steps + 1);
            let clipped = max_gradient_norm > 0.0 && norm > max_gradient_norm;
            let clip = if clipped { max_gradient_norm / (norm + 1e-6) } else { 1.0 };
            self.steps += 1;
            let count = self.steps as f64;
            let step = Step {
                decayed: if weight_decay > 0.0 { weights.decayed() } else { 0 },
                clip,
                betas: (beta1, beta2),
                rate: learning_rate,
                decay: weight_decay,
                corrections: (1.0 - beta1.powf(count), 1.0 - beta2.powf(count)),
                epsilon,
            };
            if native::takes(weights.flat()) {
                native::adamw(weights.flat(), weights.gradient(), &self.first, &self.second, &step);
            } else {
                plain(weights.flat(), weights.gradient(), &mut self.first, &mut self.second, &step);
            }
            Ok(norm)
        })
    }

    /// The moments as named tensors for a training state; [`AdamW::steps`] belongs with them.
    pub fn state(&self, weights: &Weights) -> Vec<(String, Tensor)> {
        let mut state = weights.named("first.", &self.first);
        state.extend(weights.named("second.", &self.second));
        state
    }

    /// Takes back what [`AdamW::state`] and [`AdamW::steps`] gave.
    pub fn load_state(&mut self, weights: &Weights, tensors: &BTreeMap<String, Tensor>, steps: u64) -> Result<()> {
        weights.fill("first.", &self.first, tensors)?;
        weights.fill("second.", &self.second, tensors)?;
        self.steps = steps;
        Ok(())
    }
}

/// One step in libtorch's operations, for devices without kernels of ours.
pub(crate) fn plain(weights: &Tensor, gradient: &Tensor, first: &mut Tensor, second: &mut Tensor, step: &Step) {
    let Step { decayed, clip, betas, rate, decay, corrections, epsilon } = *step;
    let gradient = gradient * clip;
    let _ = first.lerp_(&gradient, 1.0 - betas.0);
    let _ = second.lerp_(&(&gradient * &gradient), 1.0 - betas.1);
    if rate == 0.0 {
        return;
    }
    let mut flat = weights.shallow_clone();
    if decayed > 0 {
        let _ = flat.narrow(0, 0, decayed).g_mul_scalar_(1.0 - rate * decay);
    }
    // -rate * (first / c1) / (sqrt(second / c2) + epsilon), with every scalar moved into the divisor.
    let scale = -corrections.0 / rate;
    let mut divisor = second.sqrt();
    let _ = divisor.g_mul_scalar_(scale / corrections.1.sqrt());
    let _ = divisor.g_add_scalar_(scale * epsilon);
    let _ = flat.addcdiv_(first, &divisor);
}

/// The learning rate of step `step` (from 0) of `steps`, `peak` being the highest.
///
/// Over the first `warmup_ratio * steps` steps (rounded, w) it is `peak * (step + 1) / w`; over the last `decay_ratio * steps`
/// (rounded, and no more than are left after warm-up) it decays so that the last step has `final_ratio * peak`; between the
/// two it is `peak`.
pub fn learning_rate(schedule: &Schedule, peak: f64, step: u64, steps: u64) -> f64 {
    let (done, total) = ((step + 1) as f64, steps as f64);
    let warmup = (schedule.warmup_ratio * total).round();
    if done <= warmup {
        return peak * done / warmup;
    }
    let decay = (schedule.decay_ratio * total).round().min(total - warmup);
    let stable = total - decay;
    if done <= stable {
        return peak;
    }
    let along = ((done - stable) / decay).min(1.0);
    let share = match schedule.decay {
        Decay::Cosine => f64::midpoint(1.0, (std::f64::consts::PI * along).cos()),
        Decay::Linear => 1.0 - along,
        Decay::Constant => 1.0,
    };
    match schedule.decay {
        Decay::Constant => peak,
        _ => peak * (schedule.final_ratio + (1.0 - schedule.final_ratio) * share),
    }
}

#[cfg(test)]
mod tests {
    use tch::{Device, Kind};

    use super::*;

    /// A matrix that decays and a bias that does not.
    fn weights() -> Weights {
        let plan = vec![("bias".to_owned(), vec![2], false), ("matrix".to_owned(), vec![2, 2], true)];
        let weights = Weights::zeros(plan, Device::Cpu);
        fill(&weights, weights.flat(), &[0.5, -1.0, 2.0, 0.25], &[0.1, -0.2]);
        weights
    }

    fn fill(weights: &Weights, flat: &Tensor, matrix: &[f32], bias: &[f32]) {
        let named = [
            ("matrix".to_owned(), Tensor::from_slice(matrix).view([2, 2])),
            ("bias".to_owned(), Tensor::from_slice(bias)),
        ];
        weights.fill("", flat, &BTreeMap::from(named)).expect("the planned names");
    }

    fn numbers(weights: &Weights) -> Vec<f64> {
        let named = BTreeMap::from_iter(weights.named("", weights.flat()));
        let flat = Tensor::cat(&[named["matrix"].view(-1), named["bias"].view(-1)], 0).to_kind(Kind::Double);
        Vec::<f64>::try_from(&flat).expect("numbers")
    }

    const GRADIENTS: [([f32; 4], [f32; 2]); 3] = [
        ([0.3, -0.2, 0.05, 1.0], [0.5, -0.4]),
        ([3.0, 2.0, -4.0, 1.0], [1.5, 0.0]),
        ([0.01, 0.0, 0.0, -0.02], [0.0, 0.03]),
    ];

    fn parameters() -> Optimizer {
        Optimizer { weight_decay: 0.1, ..Optimizer::default() }
    }

    /// Weights and norms by `torch.optim.AdamW` and `clip_grad_norm_` of torch 2.11 with the same gradients.
    #[test]
    fn steps_are_those_of_torch() {
        native::each_set(golden);
        native::without(golden);
    }

    fn golden() {
        let golden = [
            (
                1.241_974_235,
                [0.489_500_016, -0.989_000_022, 1.988_000_035, 0.239_749_998, 0.090_000_004, -0.189_999_998],
            ),
            (
                5.678_908_348,
                [0.479_487_091, -0.991_981_447, 1.993_025_780, 0.231_338_188, 0.080_296_360, -0.183_266_997],
            ),
            (
                0.037_416_574,
                [0.471_501_142, -0.994_073_510, 1.996_480_823, 0.224_917_650, 0.072_759_002, -0.178_659_290],
            ),
        ];
        let weights = weights();
        let mut optimizer = AdamW::new(&weights, &parameters());
        for ((matrix, bias), (norm, expected)) in GRADIENTS.iter().zip(golden) {
            fill(&weights, weights.gradient(), matrix, bias);
            let ours = optimizer.step(&weights, 0.01).expect("finite");
            assert!((ours - norm).abs() < 1e-6, "{ours} against {norm}");
            for (ours, theirs) in numbers(&weights).iter().zip(expected) {
                assert!((ours - theirs).abs() < 2e-7, "{ours} against {theirs}");
            }
        }
        assert_eq!(optimizer.steps(), 3);
    }

    #[test]
    fn the_first_step_by_hand() {
        // Bias correction makes the first step rate * sign(gradient), decay comes on top for the matrix alone.
        let weights = weights();
        fill(&weights, weights.gradient(), &[0.1, -0.1, 0.0, 0.2], &[0.3, 0.0]);
        let parameters = Optimizer { max_gradient_norm: 0.0, ..parameters() };
        let norm = AdamW::new(&weights, &parameters).step(&weights, 0.1).expect("finite");
        assert!((norm - 0.15f64.sqrt()).abs() < 1e-7);
        let expected = [0.495 - 0.1, -0.99 + 0.1, 1.98, 0.2475 - 0.1, 0.0, -0.2];
        for (ours, by_hand) in numbers(&weights).iter().zip(expected) {
            assert!((ours - by_hand).abs() < 1e-6, "{ours} against {by_hand}");
        }
    }

    #[test]
    fn a_restored_optimizer_goes_on_bit_for_bit() {
        let run = |restore: bool| {
            let weights = weights();
            let mut optimizer = AdamW::new(&weights, &parameters());
            for (index, (matrix, bias)) in GRADIENTS.iter().enumerate() {
                if restore && index == 2 {
                    let state: BTreeMap<String, Tensor> =
                        optimizer.state(&weights).into_iter().map(|(name, tensor)| (name, tensor.copy())).collect();
                    let steps = optimizer.steps();
                    optimizer = AdamW::new(&weights, &parameters());
                    optimizer.load_state(&weights, &state, steps).expect("its own state");
                }
                fill(&weights, weights.gradient(), matrix, bias);
                optimizer.step(&weights, 0.01).expect("finite");
            }
            numbers(&weights)
        };
        assert_eq!(run(true), run(false));
    }

    #[test]
    fn a_gradient_that_is_not_finite_moves_nothing() {
        let weights = weights();
        let before = numbers(&weights);
        fill(&weights, weights.gradient(), &[f32::NAN, 0.0, 0.0, 0.0], &[0.0, 0.0]);
        let mut optimizer = AdamW::new(&weights, &parameters());
        assert!(optimizer.step(&weights, 0.01).expect_err("no number").to_string().contains("step 1"));
        assert_eq!((numbers(&weights), optimizer.steps()), (before.clone(), 0));
        fill(&weights, weights.gradient(), &[1.0, 0.0, 0.0, 0.0], &[0.0, 0.0]);
        optimizer.step(&weights, 0.0).expect("finite");
        assert_eq!((numbers(&weights), optimizer.steps()), (before, 1), "a rate of 0 moves nothing");
    }

    #[test]
    fn schedules_reach_their_marks() {
        let schedule = |decay, warmup_ratio| Schedule { decay, warmup_ratio, final_ratio: 0.1, decay_ratio: 1.0 };
        let close = |schedule: &Schedule, step: u64, expected: f64| {
            let rate = learning_rate(schedule, 2.0, step, 100);
            assert!((rate - expected).abs() < 1e-12, "step {step}: {rate} against {expected}");
        };
        for decay in [Decay::Cosine, Decay::Linear, Decay::Constant] {
            close(&schedule(decay, 0.1), 0, 0.2);
            close(&schedule(decay, 0.1), 4, 1.0);
            close(&schedule(decay, 0.1), 9, 2.0);
        }
        // Half-way of the decay is step 54 (45 of 90 done), the last step is 99.
        close(&schedule(Decay::Cosine, 0.1), 54, 1.1);
        close(&schedule(Decay::Linear, 0.1), 54, 1.1);
        close(&schedule(Decay::Linear, 0.1), 18, 2.0 * (0.1 + 0.9 * 0.9));
        close(&schedule(Decay::Cosine, 0.1), 39, 2.0 * (0.1 + 0.9 * 0.75));
        close(&schedule(Decay::Cosine, 0.1), 99, 0.2);
        close(&schedule(Decay::Linear, 0.0), 99, 0.2);
        close(&schedule(Decay::Constant, 0.1), 99, 2.0);
        close(&schedule(Decay::Linear, 0.0), 0, 2.0 * (0.1 + 0.9 * 0.99));
        close(&schedule(Decay::Cosine, 1.0), 99, 2.0);
    }

    #[test]
    fn a_stable_phase_stands_between_warm_up_and_decay() {
        let schedule = |decay, decay_ratio| Schedule { decay, warmup_ratio: 0.1, final_ratio: 0.1, decay_ratio };
        for decay in [Decay::Cosine, Decay::Linear] {
            let rate = |step| learning_rate(&schedule(decay, 0.2), 2.0, step, 100);
            let at = |step, expected: f64| {
                assert!((rate(step) - expected).abs() < 1e-12, "{decay:?} {step}: {}", rate(step));
            };
            at(4, 1.0);
            for step in 9..80 {
                at(step, 2.0);
            }
            // Step 89 is half-way of the twenty.
            at(89, 1.1);
            at(99, 0.2);
            assert!(rate(80) < 2.0 && (80..99).all(|step| rate(step + 1) < rate(step)));
        }
        // Linear by its closed form: 2 (0.1 + 0.9 (1 - 5 / 20)).
        let linear = learning_rate(&schedule(Decay::Linear, 0.2), 2.0, 84, 100);
        assert!((linear - 2.0 * (0.1 + 0.9 * 0.75)).abs() < 1e-12);
        // A share of all after warm-up, or more, is the schedule without a stable phase, to the bit.
        for step in 0..100 {
            let of = |ratio: f64| learning_rate(&schedule(Decay::Cosine, ratio), 2.0, step, 100);
            assert_eq!(of(1.0).to_bits(), of(0.9).to_bits());
        }
        // What is trained before the fall is a run at a constant rate: whoever goes on from it may choose how long to go on.
        let stable = Schedule { decay: Decay::Constant, warmup_ratio: 0.2, ..Schedule::default() };
        for step in 0..50 {
            let (before, whole) =
                (learning_rate(&stable, 2.0, step, 50), learning_rate(&schedule(Decay::Linear, 0.5), 2.0, step, 100));
            assert_eq!(before.to_bits(), whole.to_bits(), "step {step}");
        }
    }
}
