//! The kinds of stages. [`KINDS`] is the one list; a new kind is a file here and a line there.

pub mod chat;
pub mod command;
pub mod condition;
pub mod dataset;
pub mod evaluate;
pub mod grpo;
mod hub;
pub mod model;
pub mod rejection_sampling;
pub mod samples;
pub mod sampling;
pub mod select;
pub mod sft;
pub mod synthesize;
pub mod table;
#[cfg(test)]
mod testing;
pub mod tokenize;
pub mod tokenizer;
pub mod tokens;
pub mod training;

use crate::pipeline::stage::{Interrupted, Kind};
use crate::program::ProgramError;

/// Every kind that a file may name.
pub static KINDS: &[Kind] = &[
    Kind::of::<synthesize::Synthesize>(),
    Kind::of::<dataset::Dataset>(),
    Kind::of::<tokenizer::Tokenizer>(),
    Kind::of::<tokenize::Tokenize>(),
    Kind::of::<select::Select>(),
    Kind::of::<rejection_sampling::RejectionSampling>(),
    Kind::of::<model::Model>(),
    Kind::of::<sft::Sft>(),
    Kind::of::<grpo::Grpo>(),
    Kind::of::<evaluate::Evaluate>(),
    Kind::of::<command::Command>(),
];

/// The error of a stage: an interrupt that reached it in the call of a user's program is the stage's own.
pub fn interrupted(error: anyhow::Error) -> anyhow::Error {
    let is_interrupt = |cause: &(dyn std::error::Error + 'static)| {
        cause.downcast_ref::<ProgramError>().is_some_and(|error| *error == ProgramError::Interrupted)
    };
    if error.chain().any(is_interrupt) { Interrupted.into() } else { error }
}
