//! What happens to the namespace's blocks, as it happens.
//!
//! Upstairs:   routers and engines that mirror what the daemon holds.
//! Downstairs: `kvtier_client::Events`.

use std::time::Duration;

use kvtier_client::{BlockChange, Error};
use pyo3::exceptions::PyStopIteration;
use pyo3::prelude::*;
use pyo3::types::PyBytes;
use tokio::sync::Mutex;

use crate::errors;
use crate::keys;
use crate::runtime::{self, Here};
use crate::words;

/// What happened to a block of the namespace.
#[pyclass(frozen, module = "kvtier")]
#[derive(Debug)]
pub(crate) struct BlockEvent(kvtier_client::BlockEvent);

#[pymethods]
impl BlockEvent {
    /// `ROOT` when events were dropped.
    #[getter]
    fn key<'py>(&self, py: Python<'py>) -> Bound<'py, PyBytes> {
        keys::bytes(py, &self.0.key)
    }

    #[getter]
    fn change(&self) -> &'static str {
        match self.0.change {
            BlockChange::Stored(_) => "stored",
            BlockChange::Removed(_) => "removed",
            _ => "dropped",
        }
    }

    #[getter]
    fn tier(&self) -> Option<&'static str> {
        match self.0.change {
            BlockChange::Stored(tier) | BlockChange::Removed(tier) => Some(words::tier(tier)),
            _ => None,
        }
    }

    /// Events that this watcher was too slow for.
    #[getter]
    fn dropped(&self) -> u64 {
        match self.0.change {
            BlockChange::Dropped(count) => count,
            _ => 0,
        }
    }

    #[getter]
    fn reason(&self) -> Option<&'static str> {
        self.0.reason.map(words::miss)
    }

    fn __repr__(&self) -> String {
        let (key, tier) = (self.0.key.short(), self.tier().unwrap_or_default());
        format!("BlockEvent({key}.., {:?}, {tier:?})", self.change())
    }
}

/// A stream of events. Dropping it ends the watch.
#[pyclass(frozen, module = "kvtier")]
pub(crate) struct Events(Here<Mutex<kvtier_client::Events>>);

type Event = Result<Option<kvtier_client::BlockEvent>, Error>;

impl Events {
    pub(crate) fn new(events: kvtier_client::Events) -> Self {
        Self(Here::new(Mutex::new(events)))
    }

    /// `None` when `limit` passes first.
    fn within(&self, py: Python<'_>, limit: Option<Duration>) -> PyResult<Option<Event>> {
        let events = self.0.get()?;
        runtime::wait_for(py, limit, async { events.lock().await.next().await })
    }
}

fn made(event: Event) -> PyResult<Option<BlockEvent>> {
    let event = event.map_err(errors::raise)?;
    Ok(event.map(BlockEvent))
}

#[pymethods]
impl Events {
    /// The next event; `None` when the daemon ends the stream.
    #[pyo3(signature = (timeout=None))]
    fn next(&self, py: Python<'_>, timeout: Option<f64>) -> PyResult<Option<BlockEvent>> {
        let event = self.within(py, runtime::limit(timeout)?)?;
        made(event.ok_or_else(|| errors::timeout("the next event"))?)
    }

    /// The next event if there is one.
    fn try_next(&self, py: Python<'_>) -> PyResult<Option<BlockEvent>> {
        let event = self.within(py, Some(Duration::ZERO))?;
        event.map_or(Ok(None), made)
    }

    fn __iter__(slf: Bound<'_, Self>) -> Bound<'_, Self> {
        slf
    }

    fn __next__(&self, py: Python<'_>) -> PyResult<BlockEvent> {
        self.next(py, None)?
            .ok_or_else(|| PyStopIteration::new_err(()))
    }
}
