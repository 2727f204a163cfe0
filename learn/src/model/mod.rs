//! The model: a decoder of the families Qwen2, Qwen3 and Llama that reads and writes Hugging Face folders.
//!
//! `config` says what a folder holds and refuses what is not implemented, `rope` turns heads by position, `weights` keeps
//! every number in one buffer, `folder` reads and writes it as safetensors, `transformer` is the forward pass for training,
//! `kv_cache` the same pass one token at a time for generation, `lora` adapters beside frozen weights,
//! `new_tokens` the audit of rows that a training should have moved. It knows nothing of losses, tasks or text.

pub mod config;
pub mod folder;
pub mod kv_cache;
pub(crate) mod lora;
pub mod new_tokens;
pub mod rope;
pub mod transformer;
pub mod weights;

pub use config::ModelConfig;
pub use transformer::{BASE, Transformer, save_companions};
