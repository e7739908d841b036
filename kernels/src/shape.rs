//! Shape of a part: everything a codec may know about the bytes it is given.
//!
//! Upstairs:   the daemon derives one for each part of a block's layout.
//! Downstairs: `kvtier_proto::layout` and its limits.
//!
//! Invariants kept here
//!   C1  A shape that exists is within the limits: 1 to `BLOCK_TOKENS_MAX` rows, at least one
//!       element a row, heads divide the row, and at most `PART_BYTES_MAX` bytes in all. Codecs
//!       size their loops by it and never by a length that stands in stored bytes.
//!
//! Not here on purpose: no offset and no key. A part decodes the same wherever it lies.

use kvtier_proto::descriptor::PartOrder;
use kvtier_proto::element::Element;
use kvtier_proto::layout::{Part, PartCode};
use kvtier_proto::limits::{BLOCK_TOKENS_MAX, PART_BYTES_MAX};

/// Shape of one part: one tensor of one layer of one block.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct PartShape {
    layer: u32,
    code: PartCode,
    element: Element,
    tokens: u32,
    width: u32,
    heads: u32,
    order: PartOrder,
    position: u32,
    layers: u32,
    raw_bytes: usize,
}

/// Numbers that are no shape.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ShapeError {
    /// Rows out of range.
    #[error("part has {tokens} tokens; accepted: 1 to {BLOCK_TOKENS_MAX}")]
    Tokens {
        /// Rows asked for.
        tokens: u32,
    },
    /// Row of no elements.
    #[error("part is 0 elements wide; accepted: at least 1")]
    Width,
    /// Heads do not divide the row.
    #[error("part of {width} elements a token has {heads} heads; accepted: a divisor of {width}")]
    Heads {
        /// Elements a token.
        width: u32,
        /// Heads asked for.
        heads: u32,
    },
    /// Larger than a part may be.
    #[error("part has {bytes} bytes; accepted: at most {PART_BYTES_MAX}")]
    TooLarge {
        /// Size of the part. Unit: bytes.
        bytes: u64,
    },
}

impl PartShape {
    /// A part of `tokens` rows of `width` elements, token-major, of which nothing else is known.
    ///
    /// ```
    /// use kvtier_kernels::PartShape;
    /// use kvtier_proto::element::Element;
    ///
    /// let shape = PartShape::new(Element::Bf16, 256, 1024)?;
    /// assert_eq!(shape.raw_bytes(), 256 * 1024 * 2);
    /// assert!(PartShape::new(Element::Bf16, 0, 1024).is_err());
    /// # Ok::<(), kvtier_kernels::shape::ShapeError>(())
    /// ```
    ///
    /// # Errors
    /// [`ShapeError`] names the number that is out of range and the range (C1).
    pub fn new(element: Element, tokens: u32, width: u32) -> Result<Self, ShapeError> {
        if tokens == 0 || tokens > BLOCK_TOKENS_MAX {
            return Err(ShapeError::Tokens { tokens });
        }
        if width == 0 {
            return Err(ShapeError::Width);
        }
        let elements = u64::from(tokens) * u64::from(width);
        let bytes = elements.saturating_mul(element.bytes() as u64);
        let raw_bytes = usize::try_from(bytes)
            .ok()
            .filter(|_| bytes <= PART_BYTES_MAX.get())
            .ok_or(ShapeError::TooLarge { bytes })?;
        let (layer, code, heads, order) = (0, PartCode::Opaque, 1, PartOrder::TokenMajor);
        Ok(Self {
            layer,
            code,
            element,
            tokens,
            width,
            heads,
            order,
            position: 0,
            layers: 0,
            raw_bytes,
        })
    }

    /// Says which token of the prefix the first row is of: what RoPE turned it by, and whether
    /// the sinks at the front of a prefix are among its rows. Unit: tokens.
    #[must_use]
    pub const fn at_position(mut self, position: u32) -> Self {
        self.position = position;
        self
    }

    /// Says how many layers the model has: some levels treat the first ones with more care.
    #[must_use]
    pub const fn among_layers(mut self, layers: u32) -> Self {
        self.layers = layers;
        self
    }

    /// Says which tensor it is: levels with tables keep one a layer and code.
    #[must_use]
    pub const fn of_layer(mut self, layer: u32, code: PartCode) -> Self {
        self.layer = layer;
        self.code = code;
        self
    }

    /// Says how a row falls into heads, and which of token and head comes first.
    ///
    /// # Errors
    /// [`ShapeError::Heads`] when `heads` does not divide the row.
    pub fn with_heads(mut self, heads: u32, order: PartOrder) -> Result<Self, ShapeError> {
        if heads == 0 || !self.width.is_multiple_of(heads) {
            return Err(ShapeError::Heads {
                width: self.width,
                heads,
            });
        }
        self.heads = heads;
        self.order = order;
        Ok(self)
    }

    /// Shape of a part of a block's layout, in the order its descriptor names.
    ///
    /// # Errors
    /// [`ShapeError`] when the part is none that a layout makes.
    pub fn of(part: &Part, order: PartOrder) -> Result<Self, ShapeError> {
        Self::new(part.element, part.rows, part.width)?
            .of_layer(part.layer, part.code)
            .with_heads(part.heads, order)
    }

    /// Index of the layer in the model's descriptor.
    pub const fn layer(&self) -> u32 {
        self.layer
    }

    /// Which tensor of the layer it is.
    pub const fn code(&self) -> PartCode {
        self.code
    }

    /// Type of the elements.
    pub const fn element(&self) -> Element {
        self.element
    }

    /// Rows: tokens, or 1 for a state and for opaque bytes.
    pub const fn tokens(&self) -> u32 {
        self.tokens
    }

    /// Elements a row.
    pub const fn width(&self) -> u32 {
        self.width
    }

    /// Heads in a row; 1 where there are none.
    pub const fn heads(&self) -> u32 {
        self.heads
    }

    /// Order of tokens and heads.
    pub const fn order(&self) -> PartOrder {
        self.order
    }

    /// Index of the first row's token in the prefix. Unit: tokens.
    pub const fn position(&self) -> u32 {
        self.position
    }

    /// Layers of the model; 0 where nobody said.
    pub const fn layers(&self) -> u32 {
        self.layers
    }

    /// Size of the raw part. Unit: bytes.
    pub const fn raw_bytes(&self) -> usize {
        self.raw_bytes
    }
}

#[cfg(test)]
mod tests {
    use kvtier_proto::descriptor::{LayerSpec, ModelDescriptor, Shard};
    use kvtier_proto::layout::BlockLayout;
    use kvtier_proto::vocabulary::PayloadKind;

    use super::*;

    // Goal: whatever a descriptor lays out, a codec can be told.
    // Method: one layer of every kind; each part's shape has the part's size.
    #[test]
    fn shape_of_every_part_of_a_block_has_its_size() {
        let model = ModelDescriptor {
            model: "mixed".to_owned(),
            revision: String::new(),
            weights_fingerprint: vec![],
            adapter: String::new(),
            element: Element::Bf16,
            layers: vec![
                LayerSpec::Attention {
                    kv_heads: 3,
                    k_dim: 64,
                    v_dim: 48,
                    sliding_window: 0,
                },
                LayerSpec::Latent {
                    latent_dim: 512,
                    rope_dim: 64,
                },
                LayerSpec::State { bytes: 70_001 },
                LayerSpec::Opaque {
                    bytes_per_token: 656,
                    bytes_per_block: 5,
                },
            ],
            d_model: 576,
            rope: None,
            block_tokens: 256,
            order: PartOrder::HeadMajor,
            shard: Shard::WHOLE,
            k_after_rope: true,
        };
        for kind in [PayloadKind::Kv, PayloadKind::Hidden] {
            let layout = BlockLayout::new(&model, kind, 100).unwrap();
            for part in layout.parts() {
                let shape = PartShape::of(part, model.order).unwrap();
                assert_eq!(shape.raw_bytes(), part.len, "{part:?}");
                assert_eq!((shape.layer(), shape.code()), (part.layer, part.code));
                assert_eq!((shape.heads(), shape.order()), (part.heads, model.order));
            }
        }
    }

    #[test]
    fn shape_refuses_what_no_block_holds_and_names_the_number() {
        let cases = [
            (0, 8, "0 tokens"),
            (2049, 8, "2049 tokens; accepted: 1 to 2048"),
            (16, 0, "0 elements wide"),
            (2048, u32::MAX, "accepted: at most 1 GiB"),
        ];
        for (tokens, width, want) in cases {
            let problem = PartShape::new(Element::F32, tokens, width)
                .unwrap_err()
                .to_string();
            assert!(problem.contains(want), "{problem}");
        }
    }

    #[test]
    fn shape_accepts_the_largest_part_and_refuses_one_byte_more() {
        let width = 1 << 30;
        assert_eq!(
            PartShape::new(Element::U8, 1, width).unwrap().raw_bytes(),
            1 << 30
        );
        assert!(PartShape::new(Element::U8, 1, width + 1).is_err());
    }

    #[test]
    fn shape_refuses_heads_that_do_not_divide_a_row() {
        let shape = PartShape::new(Element::Bf16, 4, 192).unwrap();
        assert_eq!(
            shape.with_heads(3, PartOrder::HeadMajor).unwrap().heads(),
            3
        );
        for heads in [0, 5, 193] {
            assert!(
                shape.with_heads(heads, PartOrder::TokenMajor).is_err(),
                "{heads}"
            );
        }
    }
}
