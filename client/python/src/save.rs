//! Blocks to save, and what became of them.
//!
//! Upstairs:   `session`, `saving`.
//! Downstairs: values of the SDK.

use kvtier_client::{
    Acknowledge, BlockKey, CommitOutcome, PartOrder, PayloadKind, Reservation,
    SaveOutcome as Outcome,
};
use pyo3::prelude::*;
use pyo3::types::{PyBytes, PyList};

use crate::keys;
use crate::slot::Slot;
use crate::words::{self, Word};

/// A block to save: its name, place in the prefix and size.
#[pyclass(frozen, eq, module = "kvtier", from_py_object)]
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct SaveBlock(pub(crate) kvtier_client::SaveBlock);

#[pymethods]
impl SaveBlock {
    #[new]
    #[pyo3(signature = (
        key, *, tokens, parent=None, position=0, kind="kv", opaque_bytes=0
    ))]
    fn new(
        key: &[u8],
        tokens: u32,
        parent: Option<&[u8]>,
        position: u32,
        kind: &str,
        opaque_bytes: u64,
    ) -> PyResult<Self> {
        let parent = parent.map_or(Ok(BlockKey::ROOT), keys::read)?;
        Ok(Self(kvtier_client::SaveBlock {
            key: keys::read(key)?,
            parent,
            position,
            tokens,
            kind: PayloadKind::read(kind)?,
            opaque_bytes,
        }))
    }

    #[getter]
    fn key<'py>(&self, py: Python<'py>) -> Bound<'py, PyBytes> {
        keys::bytes(py, &self.0.key)
    }

    #[getter]
    fn parent<'py>(&self, py: Python<'py>) -> Bound<'py, PyBytes> {
        keys::bytes(py, &self.0.parent)
    }

    #[getter]
    fn position(&self) -> u32 {
        self.0.position
    }

    #[getter]
    fn tokens(&self) -> u32 {
        self.0.tokens
    }

    #[getter]
    fn kind(&self) -> &'static str {
        words::kind(self.0.kind)
    }

    #[getter]
    fn opaque_bytes(&self) -> u64 {
        self.0.opaque_bytes
    }

    fn __repr__(&self) -> String {
        let (key, position, tokens) = (self.0.key.short(), self.0.position, self.0.tokens);
        format!("SaveBlock({key}.., position={position}, tokens={tokens})")
    }
}

/// What became of one block of a reserve, a commit or a save.
#[pyclass(frozen, eq, module = "kvtier")]
#[derive(Debug, PartialEq)]
pub(crate) struct SaveOutcome(Outcome);

#[pymethods]
impl SaveOutcome {
    #[getter]
    fn status(&self) -> &'static str {
        match self.0 {
            Outcome::Stored(_) => "stored",
            Outcome::Already(_) => "already",
            Outcome::Refused(_) => "refused",
            Outcome::Failed(_) => "failed",
        }
    }

    /// What is promised, for `stored` and `already`.
    #[getter]
    fn acknowledged(&self) -> Option<&'static str> {
        match self.0 {
            Outcome::Stored(level) | Outcome::Already(level) => Some(words::acknowledge(level)),
            Outcome::Refused(_) | Outcome::Failed(_) => None,
        }
    }

    /// Why not, for `refused` and `failed`.
    #[getter]
    fn reason(&self) -> Option<&'static str> {
        match self.0 {
            Outcome::Stored(_) | Outcome::Already(_) => None,
            Outcome::Refused(why) => Some(words::refusal(why)),
            Outcome::Failed(why) => Some(words::failure(why)),
        }
    }

    #[pyo3(signature = (at_least="accepted"))]
    fn is_stored(&self, at_least: &str) -> PyResult<bool> {
        Ok(self.0.is_stored(Acknowledge::read(at_least)?))
    }

    fn __repr__(&self) -> String {
        let detail = self.acknowledged().or(self.reason()).unwrap_or_default();
        format!("SaveOutcome({:?}, {detail:?})", self.status())
    }
}

pub(crate) fn committed(outcome: CommitOutcome) -> Outcome {
    match outcome {
        CommitOutcome::Stored(level) => Outcome::Stored(level),
        CommitOutcome::Failed(why) => Outcome::Failed(why),
    }
}

pub(crate) fn outcomes<'py>(
    py: Python<'py>,
    outcomes: impl Iterator<Item = Outcome>,
) -> PyResult<Bound<'py, PyList>> {
    let made: Vec<_> = outcomes.map(SaveOutcome).collect();
    PyList::new(py, made)
}

/// A slot, or why there is none, for each block.
pub(crate) fn reservations<'py>(
    py: Python<'py>,
    reserved: Vec<Reservation>,
    order: PartOrder,
) -> PyResult<Bound<'py, PyList>> {
    let list = PyList::empty(py);
    for reservation in reserved {
        match reservation {
            Reservation::Slot(slot) => list.append(Slot::new(slot, order))?,
            Reservation::Already(level) => list.append(SaveOutcome(Outcome::Already(level)))?,
            Reservation::Refused(why) => list.append(SaveOutcome(Outcome::Refused(why)))?,
        }
    }
    Ok(list)
}
