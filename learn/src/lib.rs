//! Everything of `pipe` that holds a tensor: models, generation, losses, the optimizer, the state of a training.
//!
//! It knows the parameters of stages and nothing of the command line. Mathematics stands once, in the modules named here;
//! the loops over it are in `kinds`.

pub mod advantage;
pub mod batch;
pub mod by_hand;
pub mod codec;
pub mod credit;
pub mod device;
pub mod draw;
pub mod exhibits;
pub mod generate;
pub mod journal;
pub mod kinds;
pub mod loss;
pub mod memory;
pub mod model;
pub mod native;
pub mod optimizer;
pub mod order;
pub mod parity;
pub mod pass;
pub mod phases;
pub mod policy;
pub mod preflight;
pub mod prompts;
pub mod replay;
pub mod rewards;
pub mod rollout;
pub mod score;
pub mod session;
pub mod training;
pub mod training_state;
pub mod trajectory;
pub mod validate;

#[cfg(test)]
mod sandbox;
