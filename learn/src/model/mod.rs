//! The model: a decoder of the families Qwen2, Qwen3 and Llama that reads and writes Hugging Face folders.
//!
//! `config` says what a folder holds and refuses what is not implemented, `rope` turns heads by position, `weights` keeps
//! every number in one buffer, `folder` reads and writes it as safetensors, `transformer` is the forward pass for training,
//! `layer` a layer of it, `layout` says where its tokens stand, `packed` is attention on a GPU in half precision, `plain` holds its
//! steps where no kernel of ours does them, `decoding` is the same pass one token at a time for generation, `steps` that on a
//! GPU, `kv_cache` in libtorch's operations alone, `lora` adapters beside frozen weights,
//! `new_tokens` the audit of rows that a training should have moved. It knows nothing of losses, tasks or text.

mod companions;
pub mod config;
pub mod decoding;
pub mod folder;
pub mod kv_cache;
mod layer;
pub mod layout;
pub(crate) mod lora;
pub mod new_tokens;
pub(crate) mod packed;
pub(crate) mod plain;
#[cfg(test)]
mod precision;
pub mod rope;
pub(crate) mod steps;
pub mod transformer;
pub mod weights;

pub use companions::save_companions;
pub use config::ModelConfig;
pub use layout::Layout;
pub use transformer::{BASE, Transformer, kind};
