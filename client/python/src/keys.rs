//! Names of blocks: from token ids, or from the hashes that an engine has made of them.
//!
//! Upstairs:   `session`.
//! Downstairs: `kvtier_client::KeyDeriver`.
//!
//! Invariants kept here
//!   N1  A salt or a hash changes what goes into `extra` so that no other salt, hash and `extra`
//!       give the same bytes, unless an engine's own `extra` begins with one of the marks below.

use kvtier_client::{BlockKey, KeyDeriver};
use pyo3::prelude::*;
use pyo3::types::{PyBytes, PyList};

use crate::errors;

/// What `extra` is where none is given.
pub(crate) const NOTHING: &[u8] = b"";

const SALT: &[u8] = b"kvtier salt v1\0";
const HASH: &[u8] = b"kvtier engine hash v1\0";

/// What goes into each key beside tokens and parent.
pub(crate) struct Naming {
    keys: KeyDeriver,
    extra: Vec<u8>,
}

impl Naming {
    pub(crate) fn new(keys: &KeyDeriver, extra: &[u8], salt: &str, adapter: Option<&str>) -> Self {
        let keys = match adapter {
            Some(adapter) => keys.with_adapter(adapter),
            None => keys.clone(),
        };
        let extra = if salt.is_empty() {
            extra.to_vec()
        } else {
            marked(SALT, salt.as_bytes(), extra)
        };
        Self { keys, extra }
    }

    pub(crate) fn chain(&self, tokens: &[u32], block_tokens: u32) -> Vec<BlockKey> {
        let block_tokens = usize::try_from(block_tokens).unwrap_or(usize::MAX);
        self.keys.chain(tokens, block_tokens, &self.extra)
    }

    pub(crate) fn one(&self, parent: &BlockKey, tokens: &[u32]) -> BlockKey {
        self.keys.derive(parent, tokens, &self.extra)
    }

    /// The key of a block that the engine's hash names, with all before it.
    pub(crate) fn hash(&self, hash: &[u8]) -> BlockKey {
        let extra = marked(HASH, hash, &self.extra);
        self.keys.derive(&BlockKey::ROOT, &[], &extra)
    }
}

/// A mark, a length and its bytes, then the rest.
fn marked(mark: &[u8], bytes: &[u8], rest: &[u8]) -> Vec<u8> {
    let len = u64::try_from(bytes.len()).unwrap_or(u64::MAX);
    [mark, &len.to_le_bytes(), bytes, rest].concat()
}

/// Reads one key. Errors: `Invalid` unless it has 32 bytes.
pub(crate) fn read(key: &[u8]) -> PyResult<BlockKey> {
    BlockKey::from_slice(key).ok_or_else(|| {
        let len = key.len();
        errors::invalid(format!("a key of {len} bytes; accepted: 32 bytes"))
    })
}

/// Reads a sequence of keys.
pub(crate) fn read_all(keys: &Bound<'_, PyAny>) -> PyResult<Vec<BlockKey>> {
    let one = |key: PyResult<Bound<'_, PyAny>>| read(key?.cast::<PyBytes>()?.as_bytes());
    keys.try_iter()?.map(one).collect()
}

pub(crate) fn bytes<'py>(py: Python<'py>, key: &BlockKey) -> Bound<'py, PyBytes> {
    PyBytes::new(py, key.as_bytes())
}

pub(crate) fn list<'py>(py: Python<'py>, keys: &[BlockKey]) -> PyResult<Bound<'py, PyList>> {
    PyList::new(py, keys.iter().map(|key| bytes(py, key)))
}
