//! What the blocks of a session hold, from plain values.
//!
//! Upstairs:   engines describe their model; sessions, caches and views take it.
//! Downstairs: `kvtier_client::ModelDescriptor` and `BlockLayout`, which check and hash it.

use std::sync::Arc;

use kvtier_client::{
    Element, LayerCost, ModelDescriptor as Descriptor, PartOrder, PayloadKind, ReaderSpec as Spec,
};
use pyo3::prelude::*;
use pyo3::types::{PyBytes, PyTuple};

use crate::errors;
use crate::keys::NOTHING;
use crate::words::{self, Word};

/// What one decoder layer stores.
#[pyclass(frozen, eq, module = "kvtier", from_py_object)]
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct LayerSpec(kvtier_client::LayerSpec);

#[pymethods]
impl LayerSpec {
    /// Multi-head, grouped-query or multi-query attention; heads of this shard.
    #[staticmethod]
    #[pyo3(signature = (kv_heads, k_dim, v_dim=None, *, sliding_window=0))]
    fn attention(kv_heads: u32, k_dim: u32, v_dim: Option<u32>, sliding_window: u32) -> Self {
        let v_dim = v_dim.unwrap_or(k_dim);
        Self(kvtier_client::LayerSpec::Attention {
            kv_heads,
            k_dim,
            v_dim,
            sliding_window,
        })
    }

    /// Multi-head latent attention: a latent and a rope part a token. Unit: elements.
    #[staticmethod]
    fn latent(latent_dim: u32, rope_dim: u32) -> Self {
        Self(kvtier_client::LayerSpec::Latent {
            latent_dim,
            rope_dim,
        })
    }

    /// Uses the KV of an earlier layer and stores nothing.
    #[staticmethod]
    fn shares_with(layer: u32) -> Self {
        Self(kvtier_client::LayerSpec::SharesWith(layer))
    }

    /// Recurrent state after the last token of the block.
    #[staticmethod]
    fn state(nbytes: u32) -> Self {
        Self(kvtier_client::LayerSpec::State { bytes: nbytes })
    }

    /// Bytes only the engine understands.
    #[staticmethod]
    #[pyo3(signature = (*, bytes_per_token=0, bytes_per_block=0))]
    fn opaque(bytes_per_token: u32, bytes_per_block: u32) -> Self {
        Self(kvtier_client::LayerSpec::Opaque {
            bytes_per_token,
            bytes_per_block,
        })
    }

    fn __repr__(&self) -> String {
        format!("LayerSpec({:?})", self.0)
    }
}

/// Rotary position embedding.
#[pyclass(frozen, module = "kvtier")]
#[derive(Debug)]
pub(crate) struct Rope(kvtier_client::Rope);

#[pymethods]
impl Rope {
    #[new]
    #[pyo3(signature = (theta, rotary_dim, *, rotate_half=true, scaling=""))]
    fn new(theta: f64, rotary_dim: u32, rotate_half: bool, scaling: &str) -> Self {
        Self(kvtier_client::Rope {
            theta,
            rotary_dim,
            rotate_half,
            scaling: scaling.to_owned(),
        })
    }

    fn __repr__(&self) -> String {
        format!("{:?}", self.0)
    }
}

/// Place of this engine rank in tensor and pipeline parallelism.
#[pyclass(frozen, module = "kvtier")]
#[derive(Debug)]
pub(crate) struct Shard(kvtier_client::Shard);

#[pymethods]
impl Shard {
    #[new]
    #[pyo3(signature = (*, tp_rank=0, tp_size=1, pp_rank=0, pp_size=1))]
    fn new(tp_rank: u32, tp_size: u32, pp_rank: u32, pp_size: u32) -> Self {
        Self(kvtier_client::Shard {
            tp_rank,
            tp_size,
            pp_rank,
            pp_size,
        })
    }

    fn __repr__(&self) -> String {
        format!("{:?}", self.0)
    }
}

/// What the blocks of a session hold. Two descriptors that differ in anything but `adapter` have
/// unrelated keys.
#[pyclass(frozen, module = "kvtier")]
#[derive(Debug)]
pub(crate) struct ModelDescriptor(pub(crate) Arc<Descriptor>);

#[pymethods]
impl ModelDescriptor {
    #[new]
    #[pyo3(signature = (
        model, layers, *, d_model, block_tokens=256, element="bf16", order="token_major",
        revision="", weights_fingerprint=NOTHING, adapter="", rope=None, shard=None, k_after_rope=true
    ))]
    #[expect(
        clippy::too_many_arguments,
        reason = "named arguments of a constructor"
    )]
    fn new(
        model: &str,
        layers: Vec<LayerSpec>,
        d_model: u32,
        block_tokens: u32,
        element: &str,
        order: &str,
        revision: &str,
        weights_fingerprint: &[u8],
        adapter: &str,
        rope: Option<&Bound<'_, Rope>>,
        shard: Option<&Bound<'_, Shard>>,
        k_after_rope: bool,
    ) -> PyResult<Self> {
        let descriptor = Descriptor {
            model: model.to_owned(),
            revision: revision.to_owned(),
            weights_fingerprint: weights_fingerprint.to_vec(),
            adapter: adapter.to_owned(),
            element: Element::read(element)?,
            layers: layers.into_iter().map(|layer| layer.0).collect(),
            d_model,
            rope: rope.map(|rope| rope.get().0.clone()),
            block_tokens,
            order: PartOrder::read(order)?,
            shard: shard.map_or(kvtier_client::Shard::WHOLE, |shard| shard.get().0),
            k_after_rope,
        };
        let problems = descriptor.validate();
        if problems.is_empty() {
            return Ok(Self(Arc::new(descriptor)));
        }
        let problems: Vec<_> = problems.iter().map(ToString::to_string).collect();
        Err(errors::invalid(problems.join("; ")))
    }

    #[getter]
    fn model(&self) -> &str {
        &self.0.model
    }

    #[getter]
    fn adapter(&self) -> &str {
        &self.0.adapter
    }

    #[getter]
    fn element(&self) -> &'static str {
        words::element(self.0.element)
    }

    #[getter]
    fn order(&self) -> &'static str {
        words::order(self.0.order)
    }

    #[getter]
    fn block_tokens(&self) -> u32 {
        self.0.block_tokens
    }

    /// Number of decoder layers.
    #[getter]
    fn layers(&self) -> usize {
        self.0.layers.len()
    }

    /// 32 bytes that all keys of this model are derived with.
    #[getter]
    fn fingerprint<'py>(&self, py: Python<'py>) -> Bound<'py, PyBytes> {
        PyBytes::new(py, &self.0.fingerprint().0)
    }

    /// Where each part of a block of `tokens` tokens (a full block) lies.
    #[pyo3(signature = (kind="kv", *, tokens=None))]
    fn layout(&self, kind: &str, tokens: Option<u32>) -> PyResult<BlockLayout> {
        let tokens = tokens.unwrap_or(self.0.block_tokens);
        let layout = kvtier_client::BlockLayout::new(&self.0, PayloadKind::read(kind)?, tokens);
        let layout = layout.map_err(|error| errors::invalid(error.to_string()))?;
        Ok(BlockLayout {
            layout: Arc::new(layout),
            order: self.0.order,
        })
    }

    fn __repr__(&self) -> String {
        let (model, tokens) = (&self.0.model, self.0.block_tokens);
        let layers = self.0.layers.len();
        format!("ModelDescriptor({model:?}, {layers} layers, block_tokens={tokens})")
    }
}

/// What an engine does with restores while they run. Changes no byte and no key.
#[pyclass(frozen, module = "kvtier")]
#[derive(Debug)]
pub(crate) struct ReaderSpec(pub(crate) Spec);

#[pymethods]
impl ReaderSpec {
    #[new]
    #[pyo3(signature = (
        *, two_ended=false, layer_events=false, hidden_projection=false, layers=None
    ))]
    fn new(
        two_ended: bool,
        layer_events: bool,
        hidden_projection: bool,
        layers: Option<Vec<(u64, u64, u64)>>,
    ) -> Self {
        let cost = |(token_flop, pair_flop, projection_flop)| LayerCost {
            token_flop,
            pair_flop,
            projection_flop,
        };
        let layers = layers.unwrap_or_default().into_iter();
        let mut spec = Spec::default().layers(layers.map(cost).collect());
        spec.two_ended = two_ended;
        spec.layer_events = layer_events;
        spec.hidden_projection = hidden_projection;
        Self(spec)
    }

    fn __repr__(&self) -> String {
        format!("{:?}", self.0)
    }
}

/// Number of rows and columns as Python sees a part.
pub(crate) fn shape_of(part: &kvtier_client::Part, order: PartOrder) -> Vec<usize> {
    use kvtier_client::PartCode::{K, Opaque, State, V};
    let size = |value: u32| usize::try_from(value).unwrap_or(usize::MAX);
    let (rows, heads) = (size(part.rows), size(part.heads));
    let dim = size(part.width) / heads.max(1);
    match (part.code, order) {
        (K | V, PartOrder::TokenMajor) => vec![rows, heads, dim],
        (K | V, PartOrder::HeadMajor) => vec![heads, rows, dim],
        (State | Opaque, _) => vec![part.len],
        _ => vec![rows, size(part.width)],
    }
}

/// One part of a block: one tensor of one layer.
#[pyclass(frozen, module = "kvtier")]
#[derive(Debug)]
pub(crate) struct Part {
    part: kvtier_client::Part,
    order: PartOrder,
}

#[pymethods]
impl Part {
    #[getter]
    fn layer(&self) -> u32 {
        self.part.layer
    }

    #[getter]
    fn code(&self) -> &'static str {
        words::code(self.part.code)
    }

    /// First byte in the payload.
    #[getter]
    fn offset(&self) -> usize {
        self.part.offset
    }

    #[getter]
    fn nbytes(&self) -> usize {
        self.part.len
    }

    /// `(tokens, heads, dim)` or `(heads, tokens, dim)` for K and V, `(tokens, width)` for latents
    /// and hidden states, `(bytes,)` for state and opaque bytes.
    #[getter]
    fn shape<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyTuple>> {
        PyTuple::new(py, shape_of(&self.part, self.order))
    }

    #[getter]
    fn element(&self) -> &'static str {
        words::element(self.part.element)
    }

    fn __repr__(&self) -> String {
        let (layer, code) = (self.part.layer, words::code(self.part.code));
        format!(
            "Part(layer={layer}, code={code:?}, nbytes={})",
            self.part.len
        )
    }
}

/// Where the parts of a block lie in its payload: back to back, layer after layer.
#[pyclass(frozen, module = "kvtier")]
#[derive(Debug)]
pub(crate) struct BlockLayout {
    pub(crate) layout: Arc<kvtier_client::BlockLayout>,
    pub(crate) order: PartOrder,
}

impl BlockLayout {
    /// Another handle of the same layout.
    pub(crate) fn again(&self) -> Self {
        Self {
            layout: Arc::clone(&self.layout),
            order: self.order,
        }
    }

    fn made(&self, part: &kvtier_client::Part) -> Part {
        Part {
            part: *part,
            order: self.order,
        }
    }
}

#[pymethods]
impl BlockLayout {
    #[getter]
    fn kind(&self) -> &'static str {
        words::kind(self.layout.kind())
    }

    #[getter]
    fn tokens(&self) -> u32 {
        self.layout.tokens()
    }

    #[getter]
    fn nbytes(&self) -> usize {
        self.layout.payload_len()
    }

    #[getter]
    fn parts(&self) -> Vec<Part> {
        let parts = self.layout.parts().iter();
        parts.map(|part| self.made(part)).collect()
    }

    fn part(&self, layer: u32, code: &str) -> PyResult<Option<Part>> {
        let code = kvtier_client::PartCode::read(code)?;
        let part = self.layout.part(layer, code);
        Ok(part.map(|part| self.made(part)))
    }

    fn __repr__(&self) -> String {
        let (parts, nbytes) = (self.layout.parts().len(), self.layout.payload_len());
        format!("BlockLayout({parts} parts, nbytes={nbytes})")
    }
}
