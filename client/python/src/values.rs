//! Answers of the daemon as Python sees them.
//!
//! Upstairs:   `session`, `restore` and `events` return these.
//! Downstairs: values of the SDK.

use kvtier_client::{Miss, Tier};
use pyo3::prelude::*;
use pyo3::types::PyBytes;

use crate::words;

/// What is known about one block: it is on `tier`, or missing for `miss`.
#[pyclass(frozen, eq, module = "kvtier")]
#[derive(Debug, PartialEq)]
pub(crate) struct BlockStatus {
    tier: Option<Tier>,
    miss: Option<Miss>,
}

impl From<kvtier_client::BlockStatus> for BlockStatus {
    fn from(status: kvtier_client::BlockStatus) -> Self {
        use kvtier_client::BlockStatus::{Missing, Present};
        let (tier, miss) = match status {
            Present(tier) => (Some(tier), None),
            Missing(miss) => (None, Some(miss)),
        };
        Self { tier, miss }
    }
}

#[pymethods]
impl BlockStatus {
    #[getter]
    fn tier(&self) -> Option<&'static str> {
        self.tier.map(words::tier)
    }

    #[getter]
    fn miss(&self) -> Option<&'static str> {
        self.miss.map(words::miss)
    }

    #[getter]
    fn is_present(&self) -> bool {
        self.tier.is_some()
    }

    fn __repr__(&self) -> String {
        match (self.tier, self.miss) {
            (Some(tier), _) => format!("BlockStatus(tier={:?})", words::tier(tier)),
            (None, miss) => format!("BlockStatus(miss={:?})", miss.map(words::miss)),
        }
    }
}

/// Answer of a lookup.
#[pyclass(frozen, module = "kvtier")]
#[derive(Debug)]
pub(crate) struct Lookup {
    lookup: kvtier_client::Lookup,
    prefix_tokens: usize,
}

impl Lookup {
    /// `tokens`: those of the prompt, where its last block may be short.
    pub(crate) fn new(
        lookup: kvtier_client::Lookup,
        block_tokens: u32,
        tokens: Option<usize>,
    ) -> Self {
        let each = usize::try_from(block_tokens).unwrap_or(usize::MAX);
        let prefix_tokens = lookup.prefix_blocks.saturating_mul(each);
        Self {
            lookup,
            prefix_tokens: prefix_tokens.min(tokens.unwrap_or(usize::MAX)),
        }
    }
}

#[pymethods]
impl Lookup {
    /// Leading blocks that can all be restored.
    #[getter]
    fn prefix_blocks(&self) -> usize {
        self.lookup.prefix_blocks
    }

    /// Tokens in them.
    #[getter]
    fn prefix_tokens(&self) -> usize {
        self.prefix_tokens
    }

    /// One for each key; a prefix lookup ends with the first missing block.
    #[getter]
    fn blocks(&self) -> Vec<BlockStatus> {
        let blocks = self.lookup.blocks.iter().copied();
        blocks.map(BlockStatus::from).collect()
    }

    fn __repr__(&self) -> String {
        let (blocks, tokens) = (self.lookup.prefix_blocks, self.prefix_tokens);
        format!("Lookup(prefix_blocks={blocks}, prefix_tokens={tokens})")
    }
}

/// Answer of a prefetch, in blocks.
#[pyclass(frozen, module = "kvtier")]
#[derive(Debug)]
pub(crate) struct Prefetched(pub(crate) kvtier_client::Prefetched);

#[pymethods]
impl Prefetched {
    #[getter]
    fn resident(&self) -> usize {
        self.0.resident
    }

    #[getter]
    fn started(&self) -> usize {
        self.0.started
    }

    fn __repr__(&self) -> String {
        format!("{:?}", self.0)
    }
}

/// One stored form of a block.
#[pyclass(frozen, module = "kvtier")]
#[derive(Debug)]
pub(crate) struct Variant(kvtier_client::Variant);

#[pymethods]
impl Variant {
    #[getter]
    fn kind(&self) -> &'static str {
        words::kind(self.0.kind)
    }

    #[getter]
    fn tier(&self) -> &'static str {
        words::tier(self.0.tier)
    }

    #[getter]
    fn level(&self) -> u8 {
        self.0.level.0
    }

    #[getter]
    fn level_name(&self) -> &str {
        &self.0.level_name
    }

    #[getter]
    fn stored_bytes(&self) -> u64 {
        self.0.stored_bytes
    }

    #[getter]
    fn raw_bytes(&self) -> u64 {
        self.0.raw_bytes
    }

    #[getter]
    fn leases(&self) -> u32 {
        self.0.leases
    }

    #[getter]
    fn tokens(&self) -> u32 {
        self.0.tokens
    }

    #[getter]
    fn parent<'py>(&self, py: Python<'py>) -> Bound<'py, PyBytes> {
        PyBytes::new(py, self.0.parent.as_bytes())
    }

    #[getter]
    fn pinned(&self) -> bool {
        self.0.pinned
    }

    #[getter]
    fn place(&self) -> &str {
        &self.0.place
    }

    #[getter]
    fn device(&self) -> Option<u32> {
        self.0.device
    }

    fn __repr__(&self) -> String {
        format!("{:?}", self.0)
    }
}

/// Where a block is, and why a restore would miss.
#[pyclass(frozen, module = "kvtier")]
#[derive(Debug)]
pub(crate) struct Explanation(pub(crate) kvtier_client::Explanation);

#[pymethods]
impl Explanation {
    #[getter]
    fn variants(&self) -> Vec<Variant> {
        self.0.variants.iter().cloned().map(Variant).collect()
    }

    #[getter]
    fn miss(&self) -> Option<&'static str> {
        self.0.miss.map(words::miss)
    }

    #[getter]
    fn notes(&self) -> Vec<String> {
        self.0.notes.clone()
    }

    fn __repr__(&self) -> String {
        format!("{:?}", self.0)
    }
}
