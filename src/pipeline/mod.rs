//! From TOML files to stored results, knowing no stage by name and no tensor.
//!
//! The flow, of which every command is a prefix and a printer:
//!
//! ```text
//! spec::read      files, --set, kinds  ->  experiments    text -> values, all mistakes at once
//! Plan::new       experiments, store   ->  plan           one node a recipe: cached | run | resume | maybe | blocked
//! exec::execute   plan, store          ->  outcome        events in between; only what is missing runs
//! ```

pub mod bundle;
pub mod exec;
pub mod export;
#[cfg(test)]
pub(crate) mod fixture;
pub mod plan;
#[cfg(test)]
mod proof;
pub mod spec;
pub mod stage;
pub mod store;
