//! Where each part of a block lies in its raw payload.
//!
//! Upstairs:   the SDK fills slots by it, the daemon builds records by it, codecs decode by it.
//! Downstairs: `descriptor`.
//!
//! A raw payload is the block's parts back to back, layer after layer: K then V, or latent then
//! rope, or one hidden state a layer. Nothing is padded, so that the size of a block is what the
//! model's arithmetic says.
//!
//! Invariants kept here
//!   B1  Parts are in payload order, touch each other and cover the payload.

use crate::descriptor::{LayerSpec, ModelDescriptor};
use crate::element::Element;
use crate::limits::{BLOCK_BYTES_MAX, BLOCK_TOKENS_MAX, PART_BYTES_MAX};
use crate::vocabulary::PayloadKind;

/// What a part is. The number is the one in records.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, strum::IntoStaticStr, strum::EnumIter)]
#[strum(serialize_all = "snake_case")]
#[repr(u8)]
pub enum PartCode {
    /// Keys of one layer.
    K = 1,
    /// Values of one layer.
    V = 2,
    /// MLA latent of one layer.
    Latent = 3,
    /// MLA rope part of one layer.
    Rope = 4,
    /// Recurrent state of one layer.
    State = 5,
    /// Input of one decoder layer.
    Hidden = 6,
    /// Bytes only the engine understands.
    Opaque = 7,
}

impl PartCode {
    /// Reads the number of a record.
    pub const fn from_number(number: u8) -> Option<Self> {
        Some(match number {
            1 => Self::K,
            2 => Self::V,
            3 => Self::Latent,
            4 => Self::Rope,
            5 => Self::State,
            6 => Self::Hidden,
            7 => Self::Opaque,
            _ => return None,
        })
    }
}

/// One part of a block: one tensor of one layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Part {
    /// Index of the layer in the descriptor.
    pub layer: u32,
    /// What it is.
    pub code: PartCode,
    /// First byte in the raw payload.
    pub offset: usize,
    /// Size. Unit: bytes.
    pub len: usize,
    /// Rows: tokens, or 1 for a state.
    pub rows: u32,
    /// Elements a row: `heads * dim` for K and V.
    pub width: u32,
    /// KV heads in a row; 1 for kinds without heads.
    pub heads: u32,
    /// Element type; `U8` for state and opaque parts.
    pub element: Element,
}

/// Why a layout cannot be made.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum LayoutError {
    /// The number of tokens is out of range.
    #[error("{tokens} tokens; accepted: 1 to {max}")]
    Tokens {
        /// Tokens asked for.
        tokens: u32,
        /// Tokens of a full block.
        max: u32,
    },
    /// No layer of the model stores this kind.
    #[error("the model stores nothing of kind {}", kind.as_str())]
    NothingStored {
        /// Kind asked for.
        kind: PayloadKind,
    },
    /// The payload is larger than a block may be.
    #[error("{bytes} bytes; accepted: at most {}", BLOCK_BYTES_MAX)]
    TooLarge {
        /// Size of the payload, or of as much as was added up.
        bytes: u64,
    },
    /// An opaque payload has no size in the descriptor, so the message must give one.
    #[error("{bytes} opaque bytes; accepted: 1 to {}", BLOCK_BYTES_MAX)]
    Opaque {
        /// Size asked for.
        bytes: u64,
    },
}

/// Layout of the raw payload of one block.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BlockLayout {
    kind: PayloadKind,
    tokens: u32,
    layers: u32,
    parts: Vec<Part>,
    len: usize,
}

impl BlockLayout {
    /// Layout of a block of `tokens` tokens (1 to the descriptor's `block_tokens`).
    ///
    /// `Kv` holds whatever the layers store: K and V, latent and rope, state, opaque, each layer
    /// by its spec. `Latent`, `State` and `Opaque` hold those layers only; `Hidden` holds the
    /// input of every layer.
    pub fn new(
        model: &ModelDescriptor,
        kind: PayloadKind,
        tokens: u32,
    ) -> Result<Self, LayoutError> {
        let max = model.block_tokens.min(BLOCK_TOKENS_MAX);
        if tokens == 0 || tokens > max {
            return Err(LayoutError::Tokens { tokens, max });
        }
        let mut builder = Builder {
            parts: Vec::new(),
            len: 0,
            tokens,
        };
        for (layer, spec) in (0u32..).zip(&model.layers) {
            builder.layer(layer, model, spec, kind)?;
        }
        if builder.parts.is_empty() {
            return Err(LayoutError::NothingStored { kind });
        }
        let len = usize::try_from(builder.len).unwrap_or(usize::MAX);
        Ok(Self {
            kind,
            tokens,
            layers: u32::try_from(model.layers.len()).unwrap_or(u32::MAX),
            parts: builder.parts,
            len,
        })
    }

    /// Layout of a block that is `bytes` bytes only the engine understands.
    pub fn opaque(tokens: u32, bytes: u64) -> Result<Self, LayoutError> {
        let width = u32::try_from(bytes)
            .ok()
            .filter(|_| bytes >= 1 && bytes <= BLOCK_BYTES_MAX.get())
            .ok_or(LayoutError::Opaque { bytes })?;
        let len = usize::try_from(bytes).map_err(|_| LayoutError::Opaque { bytes })?;
        let part = Part {
            layer: 0,
            code: PartCode::Opaque,
            offset: 0,
            len,
            rows: 1,
            width,
            heads: 1,
            element: Element::U8,
        };
        Ok(Self {
            kind: PayloadKind::Opaque,
            tokens,
            layers: 0,
            parts: vec![part],
            len,
        })
    }

    /// Layers of the model, whether they store anything or not; 0 where no descriptor says.
    pub fn layers(&self) -> u32 {
        self.layers
    }

    /// Kind of the payload.
    pub fn kind(&self) -> PayloadKind {
        self.kind
    }

    /// Tokens in the block.
    pub fn tokens(&self) -> u32 {
        self.tokens
    }

    /// Parts in payload order (B1).
    pub fn parts(&self) -> &[Part] {
        &self.parts
    }

    /// Size of the raw payload. Unit: bytes.
    pub fn payload_len(&self) -> usize {
        self.len
    }

    /// The part of a layer with this code.
    pub fn part(&self, layer: u32, code: PartCode) -> Option<&Part> {
        self.parts
            .iter()
            .find(|part| part.layer == layer && part.code == code)
    }

    /// Bytes of one page: all parts of one layer. `None` when the layer stores nothing.
    pub fn page(&self, layer: u32) -> Option<std::ops::Range<usize>> {
        let mut parts = self.parts.iter().filter(|part| part.layer == layer);
        let first = parts.next()?;
        let last = parts.next_back().unwrap_or(first);
        Some(first.offset..last.offset + last.len)
    }
}

struct Builder {
    parts: Vec<Part>,
    len: u64,
    tokens: u32,
}

impl Builder {
    fn layer(
        &mut self,
        layer: u32,
        model: &ModelDescriptor,
        spec: &LayerSpec,
        kind: PayloadKind,
    ) -> Result<(), LayoutError> {
        let tokens = self.tokens;
        let element = model.element;
        if kind == PayloadKind::Hidden {
            return self.push(layer, PartCode::Hidden, tokens, model.d_model, 1, element);
        }
        let all = kind == PayloadKind::Kv;
        match *spec {
            LayerSpec::Attention {
                kv_heads,
                k_dim,
                v_dim,
                ..
            } if all => {
                self.heads(layer, PartCode::K, kv_heads, k_dim, element)?;
                self.heads(layer, PartCode::V, kv_heads, v_dim, element)
            }
            LayerSpec::Latent {
                latent_dim,
                rope_dim,
            } if all || kind == PayloadKind::Latent => {
                self.push(layer, PartCode::Latent, tokens, latent_dim, 1, element)?;
                self.push(layer, PartCode::Rope, tokens, rope_dim, 1, element)
            }
            LayerSpec::State { bytes } if all || kind == PayloadKind::State => {
                self.push(layer, PartCode::State, 1, bytes, 1, Element::U8)
            }
            LayerSpec::Opaque {
                bytes_per_token,
                bytes_per_block,
            } if all || kind == PayloadKind::Opaque => {
                let bytes = u64::from(bytes_per_token) * u64::from(tokens);
                let bytes = bytes + u64::from(bytes_per_block);
                let width = u32::try_from(bytes).map_err(|_| LayoutError::TooLarge { bytes })?;
                self.push(layer, PartCode::Opaque, 1, width, 1, Element::U8)
            }
            _ => Ok(()),
        }
    }

    fn heads(
        &mut self,
        layer: u32,
        code: PartCode,
        heads: u32,
        dim: u32,
        element: Element,
    ) -> Result<(), LayoutError> {
        let width = heads
            .checked_mul(dim)
            .ok_or(LayoutError::TooLarge { bytes: u64::MAX })?;
        self.push(layer, code, self.tokens, width, heads, element)
    }

    fn push(
        &mut self,
        layer: u32,
        code: PartCode,
        rows: u32,
        width: u32,
        heads: u32,
        element: Element,
    ) -> Result<(), LayoutError> {
        let values = u64::from(rows) * u64::from(width);
        let bytes = values.saturating_mul(element.bytes() as u64);
        if bytes == 0 {
            return Ok(());
        }
        let end = self.len.saturating_add(bytes);
        if bytes > PART_BYTES_MAX.get() || end > BLOCK_BYTES_MAX.get() {
            return Err(LayoutError::TooLarge { bytes: end });
        }
        let too_large = |_| LayoutError::TooLarge { bytes: end };
        let offset = usize::try_from(self.len).map_err(too_large)?;
        let len = usize::try_from(bytes).map_err(too_large)?;
        self.parts.push(Part {
            layer,
            code,
            offset,
            len,
            rows,
            width,
            heads,
            element,
        });
        self.len = end;
        Ok(())
    }
}

#[cfg(test)]
pub(crate) mod tests;
