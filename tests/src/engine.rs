//! The reference engine: a small language model on the CPU whose KV cache is open to us.
//!
//! Upstairs:   the demo, the end-to-end tests, the benches that need real KV.
//! Downstairs: `candle` reads GGUF and multiplies dense matrices; nothing of ours.
//!
//! A serving engine hides its cache; this one hands out and takes back, for any run of tokens,
//! exactly the bytes that its attention reads. That makes "the continuation is identical" a
//! statement about the cache between two runs and about nothing else.
//!
//! Invariants kept here
//!   E1  Attention reads keys and values only from the cache, after rounding to the stored
//!       dtype: restored bytes and computed bytes cannot behave differently.
//!   E2  Steps start and end on block boundaries wherever the prompt allows, so a run that
//!       resumes at a block boundary does the same arithmetic as one that started at zero.
//!   E3  The same steps give the same bits: no reduction is split by thread or by timing.
//!
//! Not here on purpose: sampling, batching of sequences, paging. None of them changes what a
//! cache has to keep.

mod attention;
mod cache;
mod config;
mod error;
mod gguf;
mod layer;
mod math;
mod matrix;
mod model;
mod random;
mod sequence;
mod tokenizer;

#[cfg(test)]
mod tests;

pub use cache::KvCache;
pub use config::{Attention, CacheDtype, DEFAULT_BLOCK_TOKENS, ModelConfig, Part, PartSpec};
pub use error::EngineError;
pub use gguf::load;
pub use model::Model;
pub use sequence::{Observer, Sequence, SequenceOptions, restorable_tokens};
pub use tokenizer::Tokenizer;
