//! AdamW over one buffer of weights, clipping by the global norm, and the learning rate of a step.
//!
//! The moments are tensors of the caller's to save and restore, which the optimizers of libtorch's C interface do not
//! offer; and with all weights in one buffer a step is a dozen vector operations whatever the model.

use std::collections::BTreeMap;

use anyhow::{Result, ensure};
use pipe::stages::training::{Decay, Optimizer, Schedule};
use tch::{Tensor, no_grad};

use crate::model::weights::Weights;

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
            let scaled = clipped.then(|| weights.gradient() * (max_gradient_norm / (norm + 1e-6)));
            let gradient = scaled.as_ref().unwrap_or(weights.gradient());
            self.steps += 1;
            let _ = self.first.lerp_(gradient, 1.0 - beta1);
            let _ = self.second.lerp_(&(gradient * gradient), 1.0 - beta2);
            if learning_rate == 0.0 {
                return Ok(norm);
            }
            let mut flat = weights.flat().shallow_clone();
            if weight_decay > 0.0 {
                let _ = flat.narrow(0, 0, weights.decayed()).g_mul_scalar_(1.0 - learning_rate * weight_decay);
            }
            // -rate * (first / c1) / (sqrt(second / c2) + epsilon), with every scalar moved into the divisor.
            let count = self.steps as f64;
            let (c1, c2) = (1.0 - beta1.powf(count), 1.0 - beta2.powf(count));
            let scale = -c1 / learning_rate;
            let mut divisor = self.second.sqrt();
            let _ = divisor.g_mul_scalar_(scale / c2.sqrt());
            let _ = divisor.g_add_scalar_(scale * epsilon);
            let _ = flat.addcdiv_(&self.first, &divisor);
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

/// The learning rate of step `step` (from 0) of `steps`, `peak` being the highest.
///
/// Over the first `warmup_ratio * steps` steps (rounded, w) it is `peak * (step + 1) / w`; then it decays so that the last
/// step has `final_ratio * peak`.
pub fn learning_rate(schedule: &Schedule, peak: f64, step: u64, steps: u64) -> f64 {
    let (done, total) = ((step + 1) as f64, steps as f64);
    let warmup = (schedule.warmup_ratio * total).round();
    if done <= warmup {
        return peak * done / warmup;
    }
    let along = ((done - warmup) / (total - warmup)).min(1.0);
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
