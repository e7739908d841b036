//! What can go wrong in the reference engine, said so that the reader can act on it.
//!
//! Upstairs:   every file of the engine.
//! Downstairs: nothing.
//!
//! Not here on purpose: no retry, no recovery; an engine error ends the run that caused it.

use std::ops::Range;
use std::path::PathBuf;

use super::config::Part;

/// Why the engine refused or failed.
#[derive(Debug, thiserror::Error)]
pub enum EngineError {
    /// A model configuration that cannot be run.
    #[error("model configuration: {field} is {got}; accepted: {accepted}")]
    Config {
        /// The field at fault.
        field: String,
        /// Its value.
        got: String,
        /// What would have been taken.
        accepted: String,
    },
    /// A model file that cannot be used.
    #[error("{}: {problem}", path.display())]
    ModelFile {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        problem: String,
    },
    /// Tokens outside what the sequence holds or may hold.
    #[error("{what}: tokens {}..{} asked; accepted: within {}..{}", got.start, got.end,
        accepted.start, accepted.end)]
    Tokens {
        /// The operation.
        what: &'static str,
        /// The tokens asked for.
        got: Range<usize>,
        /// The tokens that would have been in range.
        accepted: Range<usize>,
    },
    /// A layer or part that the model does not have.
    #[error("layer {layer} has no {part:?} part; the model has layers 0..{layers}")]
    NoSuchPart {
        /// The layer asked for.
        layer: usize,
        /// The part asked for.
        part: Part,
        /// How many layers there are.
        layers: usize,
    },
    /// A buffer of the wrong size.
    #[error("{what}: the buffer is {got} bytes; expected exactly {expected}")]
    BufferSize {
        /// The operation.
        what: &'static str,
        /// The size that came. Unit: bytes.
        got: usize,
        /// The size that was needed. Unit: bytes.
        expected: usize,
    },
    /// A token of the cache that was neither computed nor restored.
    #[error("layer {layer}, {part:?}: token {token} was neither computed nor restored")]
    Hole {
        /// The layer.
        layer: usize,
        /// The part.
        part: Part,
        /// The first missing token.
        token: usize,
    },
    /// Hidden states were asked of a sequence that does not keep them.
    #[error("this sequence keeps no hidden states; set SequenceOptions::keep_hidden")]
    NoHidden,
    /// A driver asked for a block or layers that the restore does not have.
    #[error("block {block}, layers {}..{} asked to be computed; accepted: blocks 0..{blocks}, \
        layers within 0..{model_layers}", layers.start, layers.end)]
    Cells {
        /// The block.
        block: usize,
        /// Its layers.
        layers: Range<usize>,
        /// Blocks of the restore.
        blocks: usize,
        /// Layers of the model.
        model_layers: usize,
    },
    /// Whoever drives a restore cannot go on.
    #[error("the restore cannot go on")]
    Driver(#[source] Box<dyn std::error::Error + Send + Sync>),
    /// A token id outside the vocabulary.
    #[error("token id {token} is not in the vocabulary; accepted: 0..{vocab}")]
    Vocabulary {
        /// The id.
        token: u32,
        /// Size of the vocabulary.
        vocab: usize,
    },
    /// Nothing has been computed yet, so there is nothing to continue from.
    #[error("no token has been computed in this sequence; prefill at least one first")]
    NothingComputed,
    /// Text or tokens the tokenizer refused.
    #[error("tokenizer: {0}")]
    Tokenizer(String),
    /// The tensor library failed.
    #[error("tensor library: {0}")]
    Compute(#[from] candle_core::Error),
}
