//! What the demo asks of an engine process, and what that process reports.
//!
//! Upstairs:   `story` writes jobs and reads reports; `engine_process` does the reverse.
//! Downstairs: JSON files in the demo's temporary folder.
//!
//! Not here on purpose: tokens of the prompt and bytes of the KV. Each engine process makes its own
//! from the model and the text; only the daemon carries KV from one to the other.

use std::path::PathBuf;
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use super::DemoError;
use crate::engine::{self, Attention, Model, ModelConfig, Tokenizer};
use crate::{text, weights};

/// Seed of the weights of [`ModelSource::Tiny`].
const TINY_SEED: u64 = 7;

/// Which model an engine process runs.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(super) enum ModelSource {
    /// A GGUF file.
    File(PathBuf),
    /// A small model with random weights and layers of every kind, for tests: nothing to download.
    Tiny,
}

impl ModelSource {
    /// Loads it. The tiny model has no tokenizer.
    pub(super) fn load(&self) -> Result<(Arc<Model>, Option<Tokenizer>), DemoError> {
        match self {
            Self::File(path) => {
                // Hashed again here: the descriptor names the very bytes that are loaded.
                let file = weights::model_file(Some(path))?;
                let (model, tokenizer) = engine::load(&file.path, file.sha256)?;
                Ok((Arc::new(model), Some(tokenizer)))
            }
            Self::Tiny => Ok((Arc::new(Model::random(tiny(), TINY_SEED)?), None)),
        }
    }
}

fn tiny() -> ModelConfig {
    let heads = |kv_heads, window| Attention::Heads {
        query_heads: 4,
        kv_heads,
        key_dim: 16,
        value_dim: 24,
        window,
    };
    let latent = Attention::Latent {
        query_heads: 4,
        latent_dim: 40,
        rope_dim: 16,
        nope_dim: 16,
        value_dim: 16,
    };
    ModelConfig {
        name: "tiny random model".to_owned(),
        vocab: 512,
        hidden: 64,
        intermediate: 128,
        rope_theta: 10_000.0,
        norm_epsilon: 1e-5,
        max_positions: 8192,
        layers: vec![heads(2, None), heads(1, Some(300)), latent, heads(4, None)],
    }
}

/// The first `count` tokens of the long text; made-up ones for a model without a tokenizer.
pub(super) fn prompt(
    tokenizer: Option<&Tokenizer>,
    vocab: usize,
    count: usize,
) -> Result<Vec<u32>, DemoError> {
    let mut tokens = match tokenizer {
        Some(tokenizer) => tokenizer.encode(text::CONSTITUTION)?,
        None => {
            let bytes = text::CONSTITUTION.bytes().enumerate();
            let mixed = bytes.map(|(at, byte)| (usize::from(byte) * 31 + at) % vocab);
            mixed
                .map(|token| u32::try_from(token).unwrap_or(0))
                .collect()
        }
    };
    if count > tokens.len() {
        return Err(DemoError::Usage(format!(
            "--tokens is {count}; accepted: 2 to {}, the length of the shipped text for this model",
            tokens.len()
        )));
    }
    tokens.truncate(count);
    Ok(tokens)
}

/// One job of an engine process.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(super) struct Job {
    /// What to run.
    pub(super) model: ModelSource,
    /// Length of the prompt. Unit: tokens.
    pub(super) prompt_tokens: usize,
    /// Length of the continuation. Unit: tokens.
    pub(super) generate: usize,
    /// What to do with it.
    pub(super) work: Work,
}

/// What an engine process does.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(super) enum Work {
    /// Compute the prompt, save it to the daemon behind each socket, continue.
    Compute {
        /// Control sockets.
        save_to: Vec<PathBuf>,
    },
    /// Restore the prompt into an empty cache, `times` times over, and continue each time.
    Restore {
        /// Control socket.
        from: PathBuf,
        /// The first comes from wherever the blocks are, later ones from host memory.
        times: usize,
        /// Flip one bit of the restored KV, to see that the demo notices.
        flip: bool,
    },
}

/// Report of [`Work::Compute`].
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(super) struct Computed {
    /// Name of the model.
    pub(super) model: String,
    /// Prefill and first token.
    pub(super) ttft_s: f64,
    /// What was saved to each daemon, in order.
    pub(super) saves: Vec<Save>,
    /// The continuation, to compare others with.
    pub(super) run: Run,
    /// Its text, where the model has a tokenizer.
    pub(super) text: String,
}

/// One prompt saved to one daemon.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(super) struct Save {
    /// Blocks of the prompt.
    pub(super) blocks: usize,
    /// Of these, acknowledged durable.
    pub(super) durable: usize,
    /// Their KV. Unit: bytes.
    pub(super) bytes: u64,
    /// What they take on the device. Unit: bytes.
    pub(super) stored_bytes: u64,
    /// Codec levels that the device holds them with.
    pub(super) levels: Vec<String>,
    /// Time until all were durable.
    pub(super) seconds: f64,
}

/// One restore and its continuation.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(super) struct Restore {
    /// Blocks of the prompt.
    pub(super) blocks: usize,
    /// Leading blocks that came from NVMe.
    pub(super) from_disk: usize,
    /// Leading blocks that came from host memory.
    pub(super) from_host: usize,
    /// Their KV. Unit: bytes.
    pub(super) bytes: u64,
    /// Tokens that were not computed.
    pub(super) tokens: usize,
    /// Time of the lookup.
    pub(super) lookup_s: f64,
    /// Time until the restored KV was in the engine's cache.
    pub(super) transfer_s: f64,
    /// Everything from the request to the first token.
    pub(super) ttft_s: f64,
    /// The continuation.
    pub(super) run: Run,
}

/// What a run is compared by.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Run {
    /// Tokens generated greedily.
    pub(super) tokens: Vec<u32>,
    /// SHA-256 of the KV of the whole prompt, all layers.
    pub(super) kv_sha256: String,
    /// SHA-256 of the scores that the first token was chosen by.
    pub(super) scores_sha256: String,
}
