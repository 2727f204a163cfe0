//! The kinds of stages. [`KINDS`] is the one list; a new kind is a file here and a line there.

pub mod evaluate;
pub mod grpo;
pub mod model;
pub mod sft;
pub mod table;
pub mod tokens;
pub mod training;

use crate::pipeline::stage::Kind;

/// Every kind that a file may name.
pub static KINDS: &[Kind] =
    &[Kind::of::<model::Model>(), Kind::of::<sft::Sft>(), Kind::of::<grpo::Grpo>(), Kind::of::<evaluate::Evaluate>()];
