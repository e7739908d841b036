//! Shapes of models: what one layer caches and how it attends.
//!
//! Upstairs:   loaders fill it, the layers and the cache read it.
//! Downstairs: nothing.
//!
//! Invariant: a [`ModelConfig`] that passed [`ModelConfig::check`] has no zero dimension, every
//! query head belongs to exactly one KV head, and every rotated width is even.
//!
//! Not here on purpose: nothing about files, weights or blocks on disk.

use super::error::EngineError;

/// Tokens a block holds unless told otherwise.
pub const DEFAULT_BLOCK_TOKENS: usize = 256;

/// Largest dimension of any kind; a corrupt header must not make us allocate the machine.
const DIMENSION_MAX: usize = 1 << 20;

/// In what the cache stores its numbers. Two bytes each, little endian.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum CacheDtype {
    /// Brain float 16, what serving engines use by default.
    #[default]
    Bf16,
    /// IEEE half precision.
    F16,
}

impl CacheDtype {
    /// Size of one number. Unit: bytes.
    pub const BYTES: usize = 2;
}

/// One of the two things a layer caches for each token.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Part {
    /// Keys after RoPE, `[tokens, kv_heads, key_dim]`.
    Key,
    /// Values, `[tokens, kv_heads, value_dim]`.
    Value,
    /// The compressed latent of MLA after its norm, `[tokens, 1, latent_dim]`.
    Latent,
    /// The shared rotated key of MLA, `[tokens, 1, rope_dim]`.
    Rope,
    /// The input of the layer before its norm, `[tokens, 1, hidden]`; not of the cache proper.
    Hidden,
}

/// Shape of one cached part.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PartSpec {
    /// Which part.
    pub part: Part,
    /// KV heads.
    pub heads: usize,
    /// Numbers a head.
    pub width: usize,
}

impl PartSpec {
    /// Numbers a token.
    pub const fn elements(&self) -> usize {
        self.heads * self.width
    }

    /// Bytes a token.
    pub const fn bytes(&self) -> usize {
        self.elements() * CacheDtype::BYTES
    }
}

/// How one layer attends.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Attention {
    /// Keys and values by head: MHA (`kv_heads == query_heads`), GQA, MQA (`kv_heads == 1`).
    Heads {
        /// Query heads.
        query_heads: usize,
        /// KV heads; divides `query_heads`.
        kv_heads: usize,
        /// Width of a query and key head; even, for RoPE.
        key_dim: usize,
        /// Width of a value head.
        value_dim: usize,
        /// A token sees itself and the `window - 1` tokens before it; all of them if absent.
        window: Option<usize>,
    },
    /// Multi-head latent attention: one latent and one rotated key shared by all heads.
    Latent {
        /// Query heads.
        query_heads: usize,
        /// Width of the cached latent.
        latent_dim: usize,
        /// Width of the cached rotated key; even.
        rope_dim: usize,
        /// Width of the unrotated part of a query head.
        nope_dim: usize,
        /// Width of a value head after it is rebuilt from the latent.
        value_dim: usize,
    },
}

impl Attention {
    /// What this layer caches, in canonical order.
    pub const fn parts(&self) -> [PartSpec; 2] {
        match *self {
            Self::Heads {
                kv_heads,
                key_dim,
                value_dim,
                ..
            } => [
                PartSpec {
                    part: Part::Key,
                    heads: kv_heads,
                    width: key_dim,
                },
                PartSpec {
                    part: Part::Value,
                    heads: kv_heads,
                    width: value_dim,
                },
            ],
            Self::Latent {
                latent_dim,
                rope_dim,
                ..
            } => [
                PartSpec {
                    part: Part::Latent,
                    heads: 1,
                    width: latent_dim,
                },
                PartSpec {
                    part: Part::Rope,
                    heads: 1,
                    width: rope_dim,
                },
            ],
        }
    }

    /// Width that RoPE turns.
    pub const fn rope_width(&self) -> usize {
        match *self {
            Self::Heads { key_dim, .. } => key_dim,
            Self::Latent { rope_dim, .. } => rope_dim,
        }
    }

    fn dimensions(&self) -> Vec<(&'static str, usize)> {
        match *self {
            Self::Heads {
                query_heads,
                kv_heads,
                key_dim,
                value_dim,
                window,
            } => vec![
                ("query_heads", query_heads),
                ("kv_heads", kv_heads),
                ("key_dim", key_dim),
                ("value_dim", value_dim),
                ("window", window.unwrap_or(1)),
            ],
            Self::Latent {
                query_heads,
                latent_dim,
                rope_dim,
                nope_dim,
                value_dim,
            } => vec![
                ("query_heads", query_heads),
                ("latent_dim", latent_dim),
                ("rope_dim", rope_dim),
                ("nope_dim", nope_dim),
                ("value_dim", value_dim),
            ],
        }
    }
}

/// A decoder-only model: embedding, layers of attention and gated feed-forward, norm, head.
#[derive(Debug, Clone, PartialEq)]
pub struct ModelConfig {
    /// Name for people.
    pub name: String,
    /// Size of the vocabulary.
    pub vocab: usize,
    /// Width of the residual stream.
    pub hidden: usize,
    /// Width of the feed-forward layer.
    pub intermediate: usize,
    /// Base of the RoPE frequencies.
    pub rope_theta: f32,
    /// Added to the mean square in every norm.
    pub norm_epsilon: f32,
    /// Positions the model was made for. Unit: tokens.
    pub max_positions: usize,
    /// One entry a layer.
    pub layers: Vec<Attention>,
}

impl ModelConfig {
    /// Bytes that one token takes in the cache, all layers.
    pub fn bytes_per_token(&self) -> usize {
        self.layers
            .iter()
            .flat_map(Attention::parts)
            .map(|part| part.bytes())
            .sum()
    }

    /// A small model of plain multi-head attention, for seeded weights: its hidden states are a
    /// quarter of its keys and values, where those of most published models are larger than them.
    pub fn wide_heads(layers: usize) -> Self {
        let attention = Attention::Heads {
            query_heads: 8,
            kv_heads: 8,
            key_dim: 64,
            value_dim: 64,
            window: None,
        };
        Self {
            name: format!("wide-heads-{layers}"),
            vocab: 512,
            hidden: 256,
            intermediate: 512,
            rope_theta: 10_000.0,
            norm_epsilon: 1e-5,
            max_positions: 8192,
            layers: vec![attention; layers],
        }
    }

    /// Bytes that one token's layer inputs take, all layers.
    pub const fn hidden_bytes_per_token(&self) -> usize {
        self.layers.len() * self.hidden * CacheDtype::BYTES
    }

    /// Refuses what cannot be run, naming the field, its value and what is accepted.
    pub fn check(&self) -> Result<(), EngineError> {
        for (field, value) in [
            ("vocab", self.vocab),
            ("hidden", self.hidden),
            ("intermediate", self.intermediate),
            ("max_positions", self.max_positions),
            ("layers", self.layers.len()),
        ] {
            check_dimension(field.to_owned(), value)?;
        }
        if !(self.rope_theta.is_finite() && self.rope_theta > 1.0) {
            return Err(refusal(
                "rope_theta",
                self.rope_theta,
                "a finite number above 1",
            ));
        }
        if !(self.norm_epsilon.is_finite() && self.norm_epsilon > 0.0) {
            return Err(refusal(
                "norm_epsilon",
                self.norm_epsilon,
                "a finite number above 0",
            ));
        }
        for (index, layer) in self.layers.iter().enumerate() {
            check_layer(index, layer)?;
        }
        Ok(())
    }
}

fn check_layer(index: usize, layer: &Attention) -> Result<(), EngineError> {
    for (field, value) in layer.dimensions() {
        check_dimension(format!("layers[{index}].{field}"), value)?;
    }
    if let Attention::Heads {
        query_heads,
        kv_heads,
        ..
    } = *layer
        && !query_heads.is_multiple_of(kv_heads)
    {
        let field = format!("layers[{index}].kv_heads");
        return Err(refusal(
            field,
            kv_heads,
            format!("a divisor of query_heads ({query_heads})"),
        ));
    }
    if !layer.rope_width().is_multiple_of(2) {
        let field = format!("layers[{index}]: the width RoPE turns");
        return Err(refusal(field, layer.rope_width(), "an even number"));
    }
    Ok(())
}

fn check_dimension(field: String, value: usize) -> Result<(), EngineError> {
    if (1..=DIMENSION_MAX).contains(&value) {
        return Ok(());
    }
    Err(refusal(field, value, format!("1 ..= {DIMENSION_MAX}")))
}

/// A configuration error, spelled in one place.
pub(super) fn refusal(
    field: impl Into<String>,
    got: impl ToString,
    accepted: impl Into<String>,
) -> EngineError {
    EngineError::Config {
        field: field.into(),
        got: got.to_string(),
        accepted: accepted.into(),
    }
}
