//! The model: a Qwen2-style decoder that reads and writes Hugging Face folders.
//!
//! `config` says what a folder holds and refuses what is not implemented, `weights` keeps every number in one buffer,
//! `transformer` is the forward pass for training, `kv_cache` the same pass one token at a time for generation. It knows
//! nothing of losses, tasks or text.

pub mod config;
pub mod kv_cache;
pub mod transformer;
pub mod weights;

pub use config::ModelConfig;
pub use transformer::Transformer;
