//! How an engine uses kvtier: save a prefix after prefill, restore it before the next one.
//!
//! Upstairs:   `engine_process` runs jobs with it; whoever integrates an engine reads it.
//! Downstairs: the SDK (`kvtier_client`) on one side, the engine's cache on the other.
//!
//! An engine needs three things: a descriptor that says what its KV bytes mean, a function that
//! writes one part (K or V of one layer) of one block, and one that reads it back. Keys, memory,
//! tiers and codecs are the daemon's and the SDK's business.
//!
//! ```no_run
//! # use kvtier_tests::demo::engine_link::{EngineLink, Problem};
//! # use kvtier_tests::engine::{Model, Sequence, SequenceOptions};
//! # use std::sync::Arc;
//! # async fn serve(model: Arc<Model>, prompt: &[u32]) -> Result<(), Problem> {
//! let options = SequenceOptions::new(prompt.len());
//! let socket = "/run/kvtier/kvtierd.sock".as_ref();
//! let link = EngineLink::open(socket, &model, &options).await?;
//!
//! let mut sequence = Sequence::new(model, options)?;
//! link.restore_prefix(&mut sequence, prompt).await?;
//! sequence.prefill(&prompt[sequence.position()..])?;
//! link.save_prefix(&sequence, prompt).await?;
//! # Ok(())
//! # }
//! ```
//!
//! Invariants kept here
//!   N1  The position moves over restored tokens only after the daemon has confirmed that every
//!       lease was alive while it was read; on any error what was imported is forgotten.
//!   N2  At least the last token of the prompt is left to compute: without it there would be no
//!       logits to continue from.
//!
//! Not here on purpose
//!   No fallback code: an engine that gets an error or a miss computes, as it would have anyway.
//!   No overlap of loading and computing, and no hidden states: they have files of their own.

mod hidden;
mod two_ended;

pub use hidden::{place, reader};
pub use two_ended::{Met, Way};

use std::collections::BTreeMap;
use std::path::Path;
use std::time::{Duration, Instant};

use kvtier_client::{
    Acknowledge, BlockKey, Bytes, Client, ConnectOptions, Element, Endpoint, LayerSpec,
    LeasedBlock, ModelDescriptor, PartCode, PartOrder, PayloadKind, RestoreOptions, Rope, Session,
    SessionOptions, Shard, Tier,
};

use crate::engine::{Attention, CacheDtype, EngineError, Model, Part, Sequence, SequenceOptions};

/// Staging memory, at least. Unit: bytes.
const STAGING_MIN: u64 = 64 << 20;
/// Blocks that staging memory holds, at least: one window fills while another is committed.
const STAGING_BLOCKS: u64 = 4;
/// Staging memory comes in pages.
const PAGE_BYTES: u64 = 4096;
/// A durable commit waits for a device that may be slow and a processor that may be busy.
const COMMIT_TIMEOUT: Duration = Duration::from_secs(120);

/// Why a prefix could not be saved or restored. The engine goes on without.
#[derive(Debug, thiserror::Error)]
pub enum Problem {
    /// The daemon or the way to it.
    #[error(transparent)]
    Client(#[from] kvtier_client::Error),
    /// The engine's own cache.
    #[error(transparent)]
    Engine(#[from] EngineError),
    /// A dimension that the descriptor cannot express.
    #[error("{what} is {value}; accepted: at most {}", u32::MAX)]
    TooLarge {
        /// Which dimension.
        what: &'static str,
        /// Its value.
        value: usize,
    },
}

/// What became of the blocks of one prefix.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Saved {
    /// Blocks of the prefix; the last may be short.
    pub blocks: usize,
    /// Of these, blocks that survive kill -9 and power loss now.
    pub durable: usize,
    /// KV bytes of the prefix.
    pub bytes: usize,
}

/// What a restore brought.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Restored {
    /// Blocks of the prompt.
    pub asked: usize,
    /// Leading blocks that arrived, by the tier they came from.
    pub by_tier: BTreeMap<Tier, usize>,
    /// KV bytes that arrived.
    pub bytes: usize,
    /// Tokens that need no prefill.
    pub tokens: usize,
    /// Time of the lookup.
    pub lookup: Duration,
    /// Time from the request of the restore until the cache held it, leases returned.
    pub transfer: Duration,
}

impl Restored {
    /// Leading blocks that arrived.
    pub fn blocks(&self) -> usize {
        self.by_tier.values().sum()
    }
}

/// How one part of one block is stored on the daemon's side.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Stored {
    /// Level of the codec: "raw", "lossless".
    pub level: String,
    /// Size on the device, header and padding included. Unit: bytes.
    pub bytes: u64,
}

/// An engine's connection to the daemon of its host, for one model.
#[derive(Debug)]
pub struct EngineLink {
    session: Session,
}

impl EngineLink {
    /// Connects to the daemon at `socket` and says what this engine's KV looks like.
    pub async fn open(
        socket: &Path,
        model: &Model,
        options: &SequenceOptions,
    ) -> Result<Self, Problem> {
        let descriptor = descriptor(model, options)?;
        let mut connect = ConnectOptions::default();
        connect.timeouts.commit = COMMIT_TIMEOUT;
        let client = Client::connect(Endpoint::unix(socket), connect).await?;
        let block = model.config().bytes_per_token() * options.block_tokens;
        let staging = (STAGING_BLOCKS * block as u64).max(STAGING_MIN);
        let staging = Bytes(staging.next_multiple_of(PAGE_BYTES));
        let session = SessionOptions::new("kvtier reference engine").staging_bytes(staging);
        let session = session.reader(reader(model, options));
        let session = client.open_session(&descriptor, session).await?;
        Ok(Self { session })
    }

    /// The session, for whoever drives restores.
    pub const fn session(&self) -> &Session {
        &self.session
    }

    /// Saves the KV of `prompt`, which `sequence` has computed, and waits until it is durable.
    ///
    /// Blocks that are stored already are not sent again.
    pub async fn save_prefix(&self, sequence: &Sequence, prompt: &[u32]) -> Result<Saved, Problem> {
        let cache = sequence.cache();
        let mut failed = None;
        let wait = Acknowledge::Durable;
        let outcomes = self
            .session
            .save_prefix(prompt, b"", wait, |block, part, bytes| {
                let tokens = span(block.position, block.tokens);
                if let Err(error) =
                    cache.export(index(part.layer), engine_part(part.code), tokens, bytes)
                {
                    failed = Some(error);
                }
            });
        let outcomes = outcomes.await?;
        if let Some(error) = failed {
            return Err(error.into());
        }
        let durable = outcomes.iter().filter(|outcome| outcome.is_stored(wait));
        Ok(Saved {
            blocks: outcomes.len(),
            durable: durable.count(),
            bytes: sequence.model().config().bytes_per_token() * prompt.len(),
        })
    }

    /// Fills the cache of an empty `sequence` with as much of `prompt` as is stored, and moves its
    /// position there; the caller computes the rest.
    pub async fn restore_prefix(
        &self,
        sequence: &mut Sequence,
        prompt: &[u32],
    ) -> Result<Restored, Problem> {
        let begin = Instant::now();
        let keys = self.session.prefix_keys(prompt, b"");
        let found = self.session.lookup(&keys, PayloadKind::Kv).await?;
        let lookup = begin.elapsed();
        let present = keys.get(..found.prefix_blocks).unwrap_or(&keys);
        let outcome = self.bring(sequence, present, prompt.len()).await;
        if outcome.is_err() {
            // Whatever came before the error proves nothing (N1).
            sequence.rewind(sequence.position())?;
        }
        let mut restored = outcome?;
        restored.asked = keys.len();
        restored.lookup = lookup;
        Ok(restored)
    }

    /// Restores `keys` into `sequence`, block by block as they arrive.
    async fn bring(
        &self,
        sequence: &mut Sequence,
        keys: &[BlockKey],
        prompt_tokens: usize,
    ) -> Result<Restored, Problem> {
        let mut restored = Restored::default();
        if keys.is_empty() {
            return Ok(restored);
        }
        let begin = Instant::now();
        let block_tokens = index(self.session.model().block_tokens);
        let computed_last = prompt_tokens.saturating_sub(1);
        let options = RestoreOptions::default();
        let restore = self.session.restore(keys, PayloadKind::Kv, options).await?;
        let mut arrived: Vec<Option<(Tier, usize)>> = vec![None; keys.len()];
        let mut failed = None;
        let read = |block: &LeasedBlock, payload: &[u8]| {
            let start = block.index() * block_tokens;
            if let Err(error) = import(sequence, block, payload, start, computed_last) {
                failed = Some(error);
            }
            if let Some(place) = arrived.get_mut(block.index()) {
                *place = Some((block.tier(), payload.len()));
            }
        };
        // Returns once every lease is confirmed and given back: what was copied is right.
        let summary = restore.for_each(read).await?;
        if let Some(error) = failed {
            return Err(error.into());
        }
        for (tier, bytes) in arrived.into_iter().take(summary.usable_blocks).flatten() {
            *restored.by_tier.entry(tier).or_default() += 1;
            restored.bytes += bytes;
        }
        restored.tokens = (summary.usable_blocks * block_tokens).min(computed_last);
        sequence.resume_at(restored.tokens)?;
        // Blocks behind a gap are of no use here.
        sequence.rewind(restored.tokens)?;
        restored.transfer = begin.elapsed();
        Ok(restored)
    }

    /// How the device holds the blocks of `prompt`, in order; shorter where some are missing.
    pub async fn stored(&self, prompt: &[u32]) -> Result<Vec<Stored>, Problem> {
        let mut stored = Vec::new();
        for key in self.session.prefix_keys(prompt, b"") {
            let explanation = self.session.explain(&key).await?;
            let mut variants = explanation.variants.into_iter();
            let Some(on_disk) = variants.find(|variant| variant.tier == Tier::Disk) else {
                break;
            };
            stored.push(Stored {
                level: on_disk.level_name,
                bytes: on_disk.stored_bytes,
            });
        }
        Ok(stored)
    }
}

/// Copies a block into the cache, except what has to be computed anyway (N2). Parts are
/// token-major, so the first tokens of a part are its first bytes.
fn import(
    sequence: &mut Sequence,
    block: &LeasedBlock,
    payload: &[u8],
    start: usize,
    computed_last: usize,
) -> Result<(), EngineError> {
    let end = (start + index(block.tokens())).min(computed_last);
    if end <= start {
        return Ok(());
    }
    for part in block.layout().parts() {
        let (layer, code) = (index(part.layer), engine_part(part.code));
        let len = sequence.cache().part_bytes(layer, code, end - start)?;
        let bytes = payload.get(part.offset..part.offset + len);
        sequence.import(layer, code, start..end, bytes.unwrap_or_default())?;
    }
    Ok(())
}

/// Everything that decides what this engine's KV bytes mean. Two engines whose descriptors differ
/// in any field never see each other's blocks.
pub fn descriptor(model: &Model, options: &SequenceOptions) -> Result<ModelDescriptor, Problem> {
    let config = model.config();
    let layers = config.layers.iter().map(layer_spec);
    let widest = config.layers.iter().map(Attention::rope_width).max();
    Ok(ModelDescriptor {
        model: config.name.clone(),
        // An engine that rounds the input of each layer computes other bits.
        revision: match options.keep_hidden {
            true => "layer inputs rounded".to_owned(),
            false => String::new(),
        },
        // The SHA-256 of the file: a re-quantised or fine-tuned model is another model.
        weights_fingerprint: model.fingerprint().to_vec(),
        adapter: String::new(),
        element: match options.dtype {
            CacheDtype::Bf16 => Element::Bf16,
            CacheDtype::F16 => Element::F16,
        },
        layers: layers.collect::<Result<_, _>>()?,
        d_model: narrow("hidden", config.hidden)?,
        rope: Some(Rope {
            theta: config.rope_theta.into(),
            rotary_dim: narrow("rope width", widest.unwrap_or(0))?,
            rotate_half: true,
            scaling: String::new(),
        }),
        block_tokens: narrow("block_tokens", options.block_tokens)?,
        order: PartOrder::TokenMajor,
        shard: Shard::WHOLE,
        k_after_rope: true,
    })
}

fn layer_spec(layer: &Attention) -> Result<LayerSpec, Problem> {
    Ok(match *layer {
        Attention::Heads {
            kv_heads,
            key_dim,
            value_dim,
            window,
            ..
        } => LayerSpec::Attention {
            kv_heads: narrow("kv_heads", kv_heads)?,
            k_dim: narrow("key_dim", key_dim)?,
            v_dim: narrow("value_dim", value_dim)?,
            sliding_window: narrow("window", window.unwrap_or(0))?,
        },
        Attention::Latent {
            latent_dim,
            rope_dim,
            ..
        } => LayerSpec::Latent {
            latent_dim: narrow("latent_dim", latent_dim)?,
            rope_dim: narrow("rope_dim", rope_dim)?,
        },
    })
}

fn narrow(what: &'static str, value: usize) -> Result<u32, Problem> {
    u32::try_from(value).map_err(|_| Problem::TooLarge { what, value })
}

/// The engine's name of a stored part. A code that this engine does not have cannot come, since
/// its descriptor has no such layer; were it to come, the cache would refuse it by size.
const fn engine_part(code: PartCode) -> Part {
    match code {
        PartCode::K => Part::Key,
        PartCode::Latent => Part::Latent,
        PartCode::Rope => Part::Rope,
        PartCode::Hidden => Part::Hidden,
        _ => Part::Value,
    }
}

fn span(position: u32, tokens: u32) -> std::ops::Range<usize> {
    index(position)..index(position) + index(tokens)
}

fn index(number: u32) -> usize {
    usize::try_from(number).unwrap_or(usize::MAX)
}

#[cfg(test)]
mod tests;
