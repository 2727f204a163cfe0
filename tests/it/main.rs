//! The one integration binary: what holds for the whole tree rather than for a module.

mod architecture;
mod engine;
mod learning;
mod sandbox;
