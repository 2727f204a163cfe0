//! The one integration binary: what holds for the whole tree rather than for a module.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on should stop where it stands")]

mod architecture;
mod cockpit;
mod continuing;
mod documentation;
mod engine;
mod errors;
mod explanation;
mod generated;
mod learning;
mod lifecycle;
mod metric_names;
mod proof;
mod rewards;
mod sandbox;
mod scheduling;
mod traps;
mod tuning;
