//! The kinds of stages. [`KINDS`] is the one list; a new kind is a file here and a line there.

pub mod command;
pub mod evaluate;
pub mod grpo;
pub mod sft;
pub mod training;

use crate::pipeline::stage::Kind;

/// Every kind that a file may name.
pub static KINDS: &[Kind] = &[
    Kind::of::<command::Command>(),
    Kind::of::<sft::Sft>(),
    Kind::of::<grpo::Grpo>(),
    Kind::of::<evaluate::Evaluate>(),
];
