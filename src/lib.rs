//! `pipe`: declarative, cached experiments that teach language models to act. ARCHITECTURE.md is the map.

pub mod cli;
pub mod file;
pub mod pipeline;
pub mod program;
pub mod random;
pub mod rewards;
pub mod stages;
pub mod statistics;
pub mod tasks;
pub mod telemetry;
