//! Model descriptors: what the bytes of a block mean, checked and hashed.
//!
//! Upstairs:   sessions check a client's descriptor once; keys and records carry its fingerprint.
//! Downstairs: `layout` computes sizes from it.
//!
//! Invariants kept here
//!   F1  Two descriptors with one fingerprint lay out every block alike and mean the same model.
//!       Everything but the adapter is hashed; the adapter is a field of every key instead.
//!   F2  A descriptor that passes [`ModelDescriptor::validate`] has blocks within the limits.

use crate::element::Element;
use crate::key::{LayoutFingerprint, field};
use crate::layout::BlockLayout;
use crate::limits::{
    BLOCK_BYTES_MAX, BLOCK_TOKENS_MAX, BLOCK_TOKENS_MIN, HEADS_MAX, LAYERS_MAX, NAME_BYTES_MAX,
    WIDTH_MAX,
};
use crate::vocabulary::PayloadKind;

/// Domain separation of the fingerprint: changed with the list of hashed fields.
const DOMAIN: &[u8] = b"kvtier layout fingerprint v1";

/// What one decoder layer stores.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum LayerSpec {
    /// Multi-head, grouped-query or multi-query attention.
    Attention {
        /// KV heads of this shard.
        kv_heads: u32,
        /// Width of a K head. Unit: elements.
        k_dim: u32,
        /// Width of a V head. Unit: elements.
        v_dim: u32,
        /// Tokens a query sees; 0 for all.
        sliding_window: u32,
    },
    /// Multi-head latent attention: one compressed latent and one rope part a token.
    Latent {
        /// Width of the latent. Unit: elements.
        latent_dim: u32,
        /// Width of the rope part. Unit: elements; may be 0.
        rope_dim: u32,
    },
    /// Uses the KV of an earlier layer and stores nothing.
    SharesWith(u32),
    /// Recurrent state after the last token of the block.
    State {
        /// Size of the state. Unit: bytes.
        bytes: u32,
    },
    /// Bytes only the engine understands.
    Opaque {
        /// Unit: bytes.
        bytes_per_token: u32,
        /// Unit: bytes, once a block.
        bytes_per_block: u32,
    },
}

/// Order of the elements of one part of one layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum PartOrder {
    /// `[tokens, heads, dim]`
    TokenMajor = 1,
    /// `[heads, tokens, dim]`
    HeadMajor = 2,
}

/// Rotary position embedding.
#[derive(Debug, Clone, PartialEq)]
pub struct Rope {
    /// Base of the frequencies.
    pub theta: f64,
    /// Leading elements of a head that rotate.
    pub rotary_dim: u32,
    /// True: pairs `(i, i + dim/2)`. False: pairs `(2i, 2i + 1)`.
    pub rotate_half: bool,
    /// Scaling in the engine's own words.
    pub scaling: String,
}

/// Place of this engine rank in tensor and pipeline parallelism.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Shard {
    /// Rank among `tp_size`.
    pub tp_rank: u32,
    /// Tensor-parallel size, at least 1.
    pub tp_size: u32,
    /// Rank among `pp_size`.
    pub pp_rank: u32,
    /// Pipeline-parallel size, at least 1.
    pub pp_size: u32,
}

impl Shard {
    /// The only shard of a model that is not split.
    pub const WHOLE: Shard = Shard {
        tp_rank: 0,
        tp_size: 1,
        pp_rank: 0,
        pp_size: 1,
    };
}

/// What the blocks of a session hold.
#[derive(Debug, Clone, PartialEq)]
pub struct ModelDescriptor {
    /// Repository or path of the model.
    pub model: String,
    /// Revision of the model.
    pub revision: String,
    /// Hash of the weights, or empty.
    pub weights_fingerprint: Vec<u8>,
    /// Adapter (LoRA) identity, or empty. Part of every key, not of the fingerprint.
    pub adapter: String,
    /// Element type of everything stored.
    pub element: Element,
    /// One for each decoder layer of this shard.
    pub layers: Vec<LayerSpec>,
    /// Width of a hidden state. Unit: elements.
    pub d_model: u32,
    /// Rotary embedding; `None` for models without.
    pub rope: Option<Rope>,
    /// Tokens of a full block.
    pub block_tokens: u32,
    /// Order of the elements of a part.
    pub order: PartOrder,
    /// Which shard of the model this is.
    pub shard: Shard,
    /// True when stored K has been rotated already.
    pub k_after_rope: bool,
}

/// One thing wrong with a descriptor.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("model.{field} is {value}; accepted: {accepted}")]
pub struct DescriptorProblem {
    /// Path of the field.
    pub field: String,
    /// What it holds.
    pub value: String,
    /// What would be accepted.
    pub accepted: String,
}

impl ModelDescriptor {
    /// Every problem at once; empty when the descriptor is usable (F2).
    pub fn validate(&self) -> Vec<DescriptorProblem> {
        let mut problems = Problems(Vec::new());
        self.check_names(&mut problems);
        problems.range("d_model", self.d_model, 1, WIDTH_MAX);
        problems.range(
            "block_tokens",
            self.block_tokens,
            BLOCK_TOKENS_MIN,
            BLOCK_TOKENS_MAX,
        );
        let shard = self.shard;
        problems.range("shard.tp_size", shard.tp_size, 1, u32::MAX);
        problems.range("shard.pp_size", shard.pp_size, 1, u32::MAX);
        problems.range(
            "shard.tp_rank",
            shard.tp_rank,
            0,
            shard.tp_size.saturating_sub(1),
        );
        problems.range(
            "shard.pp_rank",
            shard.pp_rank,
            0,
            shard.pp_size.saturating_sub(1),
        );
        if let Some(rope) = &self.rope {
            problems.range("rope.rotary_dim", rope.rotary_dim, 2, WIDTH_MAX);
            if !rope.theta.is_finite() || rope.theta <= 0.0 {
                problems.add("rope.theta", rope.theta, "a finite number above 0");
            }
        }
        if self.layers.is_empty() || self.layers.len() > LAYERS_MAX {
            problems.add(
                "layers",
                format!("{} entries", self.layers.len()),
                format!("1 to {LAYERS_MAX} entries"),
            );
        }
        for (index, layer) in self.layers.iter().enumerate().take(LAYERS_MAX) {
            self.check_layer(index, layer, &mut problems);
        }
        if problems.0.is_empty() {
            self.check_sizes(&mut problems);
        }
        problems.0
    }

    fn check_names(&self, problems: &mut Problems) {
        let mut name = |field: &str, len: usize, min: usize| {
            if len < min || len > NAME_BYTES_MAX {
                problems.add(
                    field,
                    format!("{len} bytes long"),
                    format!("{min} to {NAME_BYTES_MAX} bytes"),
                );
            }
        };
        name("model", self.model.len(), 1);
        name("revision", self.revision.len(), 0);
        name("weights_fingerprint", self.weights_fingerprint.len(), 0);
        name("adapter", self.adapter.len(), 0);
        if let Some(rope) = &self.rope {
            name("rope.scaling", rope.scaling.len(), 0);
        }
    }

    fn check_layer(&self, index: usize, layer: &LayerSpec, problems: &mut Problems) {
        let at = |field: &str| format!("layers[{index}].{field}");
        match *layer {
            LayerSpec::Attention {
                kv_heads,
                k_dim,
                v_dim,
                sliding_window: _,
            } => {
                problems.range(at("kv_heads"), kv_heads, 1, HEADS_MAX);
                problems.range(at("k_dim"), k_dim, 1, WIDTH_MAX);
                problems.range(at("v_dim"), v_dim, 1, WIDTH_MAX);
            }
            LayerSpec::Latent {
                latent_dim,
                rope_dim,
            } => {
                problems.range(at("latent_dim"), latent_dim, 1, WIDTH_MAX);
                problems.range(at("rope_dim"), rope_dim, 0, WIDTH_MAX);
            }
            LayerSpec::SharesWith(other) => {
                let target = usize::try_from(other).ok().filter(|other| *other < index);
                let stores = target
                    .and_then(|other| self.layers.get(other))
                    .is_some_and(|layer| {
                        matches!(
                            layer,
                            LayerSpec::Attention { .. } | LayerSpec::Latent { .. }
                        )
                    });
                if !stores {
                    problems.add(
                        at("shares_with"),
                        other,
                        "an earlier layer that stores KV itself",
                    );
                }
            }
            LayerSpec::State { bytes } => problems.range(at("bytes"), bytes, 1, 1 << 30),
            LayerSpec::Opaque {
                bytes_per_token,
                bytes_per_block,
            } => {
                if bytes_per_token == 0 && bytes_per_block == 0 {
                    problems.add(
                        at("opaque"),
                        "0 bytes",
                        "bytes_per_token or bytes_per_block above 0",
                    );
                }
            }
        }
    }

    fn check_sizes(&self, problems: &mut Problems) {
        for kind in [PayloadKind::Kv, PayloadKind::Hidden] {
            if let Err(problem) = BlockLayout::new(self, kind, self.block_tokens) {
                problems.add(
                    "layers",
                    format!(
                        "{} block of {} tokens: {problem}",
                        kind.as_str(),
                        self.block_tokens
                    ),
                    format!("blocks of at most {BLOCK_BYTES_MAX}"),
                );
            }
        }
    }

    /// Hash of everything that decides what a block's bytes mean, except the adapter (F1).
    pub fn fingerprint(&self) -> LayoutFingerprint {
        let mut hash = blake3::Hasher::new();
        hash.update(DOMAIN);
        field(&mut hash, b'm', self.model.as_bytes());
        field(&mut hash, b'r', self.revision.as_bytes());
        field(&mut hash, b'w', &self.weights_fingerprint);
        field(
            &mut hash,
            b'e',
            &[
                self.element as u8,
                self.order as u8,
                u8::from(self.k_after_rope),
            ],
        );
        numbers(&mut hash, b'd', &[self.d_model, self.block_tokens]);
        let shard = self.shard;
        numbers(
            &mut hash,
            b's',
            &[shard.tp_rank, shard.tp_size, shard.pp_rank, shard.pp_size],
        );
        if let Some(rope) = &self.rope {
            field(&mut hash, b'o', &rope.theta.to_le_bytes());
            numbers(
                &mut hash,
                b'p',
                &[rope.rotary_dim, u32::from(rope.rotate_half)],
            );
            field(&mut hash, b'q', rope.scaling.as_bytes());
        }
        for layer in &self.layers {
            match *layer {
                LayerSpec::Attention {
                    kv_heads,
                    k_dim,
                    v_dim,
                    sliding_window,
                } => {
                    numbers(&mut hash, b'A', &[kv_heads, k_dim, v_dim, sliding_window]);
                }
                LayerSpec::Latent {
                    latent_dim,
                    rope_dim,
                } => {
                    numbers(&mut hash, b'L', &[latent_dim, rope_dim]);
                }
                LayerSpec::SharesWith(other) => numbers(&mut hash, b'H', &[other]),
                LayerSpec::State { bytes } => numbers(&mut hash, b'S', &[bytes]),
                LayerSpec::Opaque {
                    bytes_per_token,
                    bytes_per_block,
                } => {
                    numbers(&mut hash, b'O', &[bytes_per_token, bytes_per_block]);
                }
            }
        }
        LayoutFingerprint(*hash.finalize().as_bytes())
    }
}

fn numbers(hash: &mut blake3::Hasher, tag: u8, values: &[u32]) {
    let bytes: Vec<u8> = values
        .iter()
        .flat_map(|value| value.to_le_bytes())
        .collect();
    field(hash, tag, &bytes);
}

struct Problems(Vec<DescriptorProblem>);

impl Problems {
    fn add(&mut self, field: impl Into<String>, value: impl ToString, accepted: impl Into<String>) {
        let (field, value, accepted) = (field.into(), value.to_string(), accepted.into());
        self.0.push(DescriptorProblem {
            field,
            value,
            accepted,
        });
    }

    fn range(&mut self, field: impl Into<String>, value: u32, min: u32, max: u32) {
        if value < min || value > max {
            self.add(field, value, format!("{min} to {max}"));
        }
    }
}

#[cfg(test)]
pub(crate) mod tests;
