//! The reference engine: a small language model on the CPU whose KV cache is open to us.
//!
//! Upstairs:   the demo, the end-to-end tests, the benches that need real KV.
//! Downstairs: `candle` reads and dequantises GGUF, `pulp` picks vector instructions; nothing of
//!             ours.
//!
//! A serving engine hides its cache; this one hands out and takes back, for any run of tokens,
//! exactly the bytes that its attention reads. That makes "the continuation is identical" a
//! statement about the cache between two runs and about nothing else.
//!
//! Invariants kept here
//!   E1  Attention reads keys and values only from the cache, after rounding to the stored
//!       dtype: restored bytes and computed bytes cannot behave differently.
//!   E2  What a token gets depends on its position and on what stands before it, not on the step
//!       that computed it: a prompt cut anywhere, decoded token by token, or resumed at any
//!       token ends in the same bits.
//!   E3  The same bits on every run and with any number of threads: a sum is never split by
//!       thread, by timing, or by how many rows are at hand. (Machines with and without fused
//!       multiply-add differ.)
//!   E4  Where hidden states are kept, the residual stream is rounded to the stored dtype before
//!       each layer, as in engines whose activations have it: keys and values that are rebuilt
//!       from hidden states have the bits of those that were computed.
//!
//! Not here on purpose: sampling, batching of sequences, paging. None of them changes what a
//! cache has to keep.

mod attention;
mod cache;
mod config;
mod cost;
mod driven;
mod error;
mod gguf;
mod gradient;
mod kernel;
mod layer;
mod math;
mod matrix;
mod model;
mod prepared;
mod random;
mod sequence;
mod tokenizer;

#[cfg(test)]
mod tests;

pub use cache::KvCache;
pub use config::{Attention, CacheDtype, DEFAULT_BLOCK_TOKENS, ModelConfig, Part, PartSpec};
pub use cost::{PrefillCost, SlowEngine};
pub use driven::{Cells, Driver, Intake};
pub use error::EngineError;
pub use gguf::load;
pub use gradient::{Backward, KeysValues, Tape, context};
pub use model::Model;
pub use sequence::{Observer, Sequence, SequenceOptions, restorable_tokens};
pub use tokenizer::Tokenizer;
