//! What calibration reads: documents of K and V, and Fisher matrices, from safetensors bytes.
//!
//! Upstairs:   [`super::calibrate`]; the command line and benchmarks, which read the files.
//! Downstairs: the `safetensors` crate checks the header against the bytes.
//!
//! A document is `K` and `V` of `[layers, tokens, heads, dim]` in bf16, f16 or f32, token by token
//! from position 0. A Fisher file is `fisher_k` and `fisher_v` of `[layers, heads, dim, dim]` in
//! f32, and the scalar `tokens`.
//!
//! Invariants kept here
//!   S1  A tensor that exists has the bytes that its shape says, and no size of it is 0 or beyond
//!       the limits of the vocabulary. Nothing is allocated by a length of the file.
//!
//! Not here on purpose: no file is opened and nothing is copied: a document borrows its bytes.

use kvtier_proto::element::Element;
use kvtier_proto::layout::PartCode;
use kvtier_proto::limits::{HEADS_MAX, LAYERS_MAX, WIDTH_MAX};
use safetensors::tensor::{Dtype, TensorView};
use safetensors::{SafeTensorError, SafeTensors};

use crate::codec::quant::floats;

/// Most tokens of one document. Positions beyond are no prefix that an engine serves.
pub const DOCUMENT_TOKENS_MAX: usize = 1 << 20;

/// Why bytes are no samples.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SampleError {
    /// The bytes are no safetensors file.
    #[error("is no safetensors file")]
    File(#[source] SafeTensorError),
    /// A tensor is not in the file.
    #[error("has no tensor {name}")]
    Missing {
        /// Its name.
        name: &'static str,
    },
    /// A tensor has elements that calibration does not read.
    #[error("tensor {name} has elements {dtype:?}; accepted: {accepted}")]
    Elements {
        /// Its name.
        name: &'static str,
        /// What the file says.
        dtype: Dtype,
        /// What would be read.
        accepted: &'static str,
    },
    /// A tensor has another shape.
    #[error("tensor {name} has shape {got:?}; accepted: {accepted}")]
    Shape {
        /// Its name.
        name: &'static str,
        /// What the file says.
        got: Vec<usize>,
        /// What would be read.
        accepted: &'static str,
    },
    /// A value is no number.
    #[error("tensor {name} has a value that is not finite in layer {layer}")]
    NotFinite {
        /// Its name.
        name: &'static str,
        /// The layer.
        layer: usize,
    },
}

/// K and V of one document.
#[derive(Debug, Clone, Copy)]
pub struct Document<'a> {
    k: Tensor<'a>,
    v: Tensor<'a>,
}

/// One of the two.
#[derive(Debug, Clone, Copy)]
pub struct Tensor<'a> {
    name: &'static str,
    /// Type of the elements.
    pub element: Element,
    /// Layers.
    pub layers: usize,
    /// Tokens, from position 0.
    pub tokens: usize,
    /// Heads of a token.
    pub heads: usize,
    /// Elements of a head.
    pub dim: usize,
    data: &'a [u8],
}

const KV_SHAPE: &str = "[layers, tokens, heads, dim], none of them 0, the same layers and tokens \
                        in K and V";

impl<'a> Document<'a> {
    /// Finds K and V in the bytes of a file.
    ///
    /// # Errors
    /// [`SampleError`] names the tensor and what would be accepted.
    pub fn parse(bytes: &'a [u8]) -> Result<Self, SampleError> {
        let file = SafeTensors::deserialize(bytes).map_err(SampleError::File)?;
        let (k, v) = (Tensor::find(&file, "K")?, Tensor::find(&file, "V")?);
        let same = (k.layers, k.tokens, k.element) == (v.layers, v.tokens, v.element);
        match same {
            true => Ok(Self { k, v }),
            false => Err(SampleError::Shape {
                name: "V",
                got: vec![v.layers, v.tokens, v.heads, v.dim],
                accepted: KV_SHAPE,
            }),
        }
    }

    /// K or V.
    pub const fn tensor(&self, code: PartCode) -> &Tensor<'a> {
        match code {
            PartCode::V => &self.v,
            _ => &self.k,
        }
    }

    /// Type of the elements of both.
    pub const fn element(&self) -> Element {
        self.k.element
    }

    /// Layers of the model.
    pub const fn layers(&self) -> usize {
        self.k.layers
    }

    /// Tokens of the document.
    pub const fn tokens(&self) -> usize {
        self.k.tokens
    }
}

impl<'a> Tensor<'a> {
    fn find(file: &SafeTensors<'a>, name: &'static str) -> Result<Self, SampleError> {
        let tensor = view(file, name)?;
        let element = match tensor.dtype() {
            Dtype::BF16 => Element::Bf16,
            Dtype::F16 => Element::F16,
            Dtype::F32 => Element::F32,
            dtype => {
                let accepted = "BF16, F16, F32";
                return Err(SampleError::Elements {
                    name,
                    dtype,
                    accepted,
                });
            }
        };
        match *tensor.shape() {
            [layers, tokens, heads, dim] if fits(layers, heads, dim, tokens) => Ok(Self {
                name,
                element,
                layers,
                tokens,
                heads,
                dim,
                data: tensor.data(),
            }),
            ref got => Err(SampleError::Shape {
                name,
                got: got.to_vec(),
                accepted: KV_SHAPE,
            }),
        }
    }

    /// Channels of a token.
    pub const fn width(&self) -> usize {
        self.heads * self.dim
    }

    /// True when another document's tensor has the same layers, heads and elements.
    pub fn is_like(&self, other: &Tensor<'_>) -> bool {
        let shape = |of: &Tensor<'_>| (of.element, of.layers, of.heads, of.dim);
        shape(self) == shape(other)
    }

    /// The raw bytes of one layer, token by token; none of a layer that is not there.
    pub fn layer_bytes(&self, layer: usize) -> &'a [u8] {
        let len = self.tokens * self.width() * self.element.bytes();
        let from = layer.saturating_mul(len);
        self.data
            .get(from..from.saturating_add(len))
            .unwrap_or_default()
    }

    /// The values of one layer, token by token.
    ///
    /// # Errors
    /// [`SampleError::NotFinite`]: no statistics come of such values.
    pub fn layer(&self, layer: usize) -> Result<Vec<f32>, SampleError> {
        let values = floats::read(self.element, self.layer_bytes(layer));
        match values.iter().all(|value| value.is_finite()) {
            true => Ok(values),
            false => Err(SampleError::NotFinite {
                name: self.name,
                layer,
            }),
        }
    }
}

fn fits(layers: usize, heads: usize, dim: usize, tokens: usize) -> bool {
    let heads_max = usize::try_from(HEADS_MAX).unwrap_or(usize::MAX);
    let width_max = usize::try_from(WIDTH_MAX).unwrap_or(usize::MAX);
    (1..=LAYERS_MAX).contains(&layers)
        && (1..=heads_max).contains(&heads)
        && dim > 0
        && heads.saturating_mul(dim) <= width_max
        && (1..=DOCUMENT_TOKENS_MAX).contains(&tokens)
}

fn view<'a>(file: &SafeTensors<'a>, name: &'static str) -> Result<TensorView<'a>, SampleError> {
    file.tensor(name).map_err(|_| SampleError::Missing { name })
}

/// How much the next token's probability minds an error of K or V: second moments of gradients.
///
/// The sum over the tokens of a context, a mean over documents: an error of covariance `E` in
/// every token of a head is expected to cost `0.5 * trace(F E)` nats, summed over layers, codes
/// and heads.
#[derive(Debug, Clone)]
pub struct Fisher {
    /// Mean context that the sums ran over. Unit: tokens.
    pub tokens: f64,
    k: Matrices,
    v: Matrices,
}

#[derive(Debug, Clone)]
struct Matrices {
    layers: usize,
    heads: usize,
    dim: usize,
    data: Vec<f32>,
}

impl Fisher {
    /// Reads both tensors and the scalar from the bytes of a file.
    ///
    /// # Errors
    /// [`SampleError`] names the tensor and what would be accepted.
    pub fn parse(bytes: &[u8]) -> Result<Self, SampleError> {
        let file = SafeTensors::deserialize(bytes).map_err(SampleError::File)?;
        let tokens = view(&file, "tokens")?;
        let count = match (tokens.dtype(), tokens.data()) {
            (Dtype::F32, &[a, b, c, d]) => f64::from(f32::from_le_bytes([a, b, c, d])),
            (Dtype::I32, &[a, b, c, d]) => f64::from(i32::from_le_bytes([a, b, c, d])),
            (Dtype::F64, &[a, b, c, d, e, f, g, h]) => f64::from_le_bytes([a, b, c, d, e, f, g, h]),
            (dtype, _) => {
                return Err(SampleError::Elements {
                    name: "tokens",
                    dtype,
                    accepted: "one F32, F64 or I32",
                });
            }
        };
        Ok(Self {
            tokens: count,
            k: Matrices::find(&file, "fisher_k")?,
            v: Matrices::find(&file, "fisher_v")?,
        })
    }

    /// The matrix of one head, row by row; `None` where the file has none.
    pub fn head(&self, layer: usize, code: PartCode, head: usize) -> Option<&[f32]> {
        let of = match code {
            PartCode::V => &self.v,
            _ => &self.k,
        };
        let len = of.dim.saturating_mul(of.dim);
        let from = (layer * of.heads).saturating_add(head).saturating_mul(len);
        (head < of.heads)
            .then(|| of.data.get(from..from.saturating_add(len)))
            .flatten()
    }

    /// True when there is a matrix for every head of such documents.
    pub fn is_of(&self, document: &Document<'_>) -> bool {
        let is = |of: &Matrices, tensor: &Tensor<'_>| {
            (of.layers, of.heads, of.dim) == (tensor.layers, tensor.heads, tensor.dim)
        };
        is(&self.k, &document.k) && is(&self.v, &document.v)
    }
}

impl Matrices {
    fn find(file: &SafeTensors<'_>, name: &'static str) -> Result<Self, SampleError> {
        let tensor = view(file, name)?;
        if tensor.dtype() != Dtype::F32 {
            return Err(SampleError::Elements {
                name,
                dtype: tensor.dtype(),
                accepted: "F32",
            });
        }
        let (layers, heads, dim) = match *tensor.shape() {
            [layers, heads, dim, other] if dim == other && fits(layers, heads, dim, 1) => {
                (layers, heads, dim)
            }
            ref got => {
                return Err(SampleError::Shape {
                    name,
                    got: got.to_vec(),
                    accepted: "[layers, heads, dim, dim], none of them 0",
                });
            }
        };
        let data = floats::read(Element::F32, tensor.data());
        let in_layer = heads * dim * dim;
        match data.iter().position(|value| !value.is_finite()) {
            Some(at) => Err(SampleError::NotFinite {
                name,
                layer: at / in_layer.max(1),
            }),
            None => Ok(Self {
                layers,
                heads,
                dim,
                data,
            }),
        }
    }
}

#[cfg(test)]
mod tests;
