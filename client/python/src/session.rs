//! A session: names, questions, hints, and where saves and restores begin.
//!
//! Upstairs:   engines.
//! Downstairs: `kvtier_client::Session`; `saving` and `restoring` run what takes long.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use kvtier_client::{
    ModelDescriptor as Descriptor, PayloadKind, PrefillStep, Quality, SessionState,
};
use pyo3::prelude::*;
use pyo3::types::{PyBytes, PyList, PyTuple};

use crate::errors;
use crate::events::Events;
use crate::keys::{self, NOTHING, Naming};
use crate::memory::array::numbers;
use crate::model::ModelDescriptor;
use crate::pages::PagedCache;
use crate::pending::Pending;
use crate::restore::{self, Restore};
use crate::restoring::Restoring;
use crate::runtime::{self, Here, seconds};
use crate::save::{self, SaveBlock};
use crate::saving::Saving;
use crate::slot::Slot;
use crate::values::{Explanation, Lookup, Prefetched};
use crate::words::{self, Word};

/// A session of one model in one namespace.
#[pyclass(frozen, module = "kvtier")]
pub(crate) struct Session {
    session: Here<Mutex<Option<kvtier_client::Session>>>,
    model: Arc<Descriptor>,
}

impl Session {
    pub(crate) fn new(session: kvtier_client::Session, model: &Arc<Descriptor>) -> Self {
        Self {
            session: Here::new(Mutex::new(Some(session))),
            model: Arc::clone(model),
        }
    }

    fn slot(&self) -> PyResult<std::sync::MutexGuard<'_, Option<kvtier_client::Session>>> {
        let session = self.session.get()?;
        Ok(session.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Errors: `Invalid` once it is closed, `Forked`.
    fn open(&self) -> PyResult<kvtier_client::Session> {
        let session = self.slot()?.clone();
        session.ok_or_else(|| errors::invalid("the session is closed"))
    }

    fn naming(&self, extra: &[u8], salt: &str, adapter: Option<&str>) -> PyResult<Naming> {
        Ok(Naming::new(self.open()?.keys(), extra, salt, adapter))
    }
}

#[pymethods]
impl Session {
    fn close(&self) -> PyResult<()> {
        let session = self.slot()?.take();
        drop(session);
        Ok(())
    }

    fn __enter__(slf: Bound<'_, Self>) -> Bound<'_, Self> {
        slf
    }

    #[pyo3(signature = (kind, error, trace, /))]
    fn __exit__(
        &self,
        kind: Option<Bound<'_, PyAny>>,
        error: Option<Bound<'_, PyAny>>,
        trace: Option<Bound<'_, PyAny>>,
    ) -> PyResult<()> {
        let _ = (kind, error, trace);
        self.close()
    }

    #[getter]
    fn model(&self) -> ModelDescriptor {
        ModelDescriptor(Arc::clone(&self.model))
    }

    #[getter]
    fn namespace(&self) -> PyResult<String> {
        Ok(self.open()?.namespace().to_owned())
    }

    #[getter]
    fn namespace_id(&self) -> PyResult<u32> {
        Ok(self.open()?.namespace_id().0)
    }

    #[getter]
    fn daemon_version(&self) -> PyResult<String> {
        Ok(self.open()?.daemon_version())
    }

    /// True when blocks can reach a durable tier.
    #[getter]
    fn is_durable(&self) -> PyResult<bool> {
        Ok(self.open()?.is_durable())
    }

    /// True when payload travels through shared memory, false when inline.
    #[getter]
    fn is_shared(&self) -> PyResult<bool> {
        Ok(self.open()?.is_shared())
    }

    /// What is known about the daemon's side. Asks nothing.
    #[getter]
    fn state(&self) -> PyResult<&'static str> {
        Ok(match self.open()?.state() {
            SessionState::Open => "open",
            SessionState::Draining { .. } => "draining",
            _ => "lost",
        })
    }

    /// Why it is draining or lost; empty while it is open.
    #[getter]
    fn state_reason(&self) -> PyResult<String> {
        Ok(match self.open()?.state() {
            SessionState::Draining { reason } | SessionState::Lost { reason } => reason,
            _ => String::new(),
        })
    }

    /// Waits until the session is draining or lost. False when `timeout` passes first.
    #[pyo3(signature = (timeout=None))]
    fn wait_not_open(&self, py: Python<'_>, timeout: Option<f64>) -> PyResult<bool> {
        let (session, limit) = (self.open()?, runtime::limit(timeout)?);
        let waited = runtime::wait_for(py, limit, session.until_not_open())?;
        Ok(waited.is_some())
    }

    /// Opens a lost session again and keeps trying for `reopen_wait`.
    fn reopen(&self, py: Python<'_>) -> PyResult<()> {
        runtime::call(py, self.open()?.reopen())
    }

    /// Waits until everything dropped before has been given back to the daemon.
    fn flush(&self, py: Python<'_>) -> PyResult<()> {
        runtime::call(py, self.open()?.flush())
    }

    /// Keys of all blocks of a prompt; the last block may be short.
    #[pyo3(signature = (tokens, *, extra=NOTHING, salt="", adapter=None))]
    fn prefix_keys<'py>(
        &self,
        tokens: &Bound<'py, PyAny>,
        extra: &[u8],
        salt: &str,
        adapter: Option<&str>,
    ) -> PyResult<Bound<'py, PyList>> {
        let py = tokens.py();
        let naming = self.naming(extra, salt, adapter)?;
        let tokens: Vec<u32> = numbers("tokens", tokens)?;
        let block_tokens = self.model.block_tokens;
        let made = py.detach(|| naming.chain(&tokens, block_tokens));
        keys::list(py, &made)
    }

    /// Key of the block that follows `parent` (`ROOT` for the first).
    #[pyo3(signature = (parent, tokens, *, extra=NOTHING, salt="", adapter=None))]
    fn derive_key<'py>(
        &self,
        parent: &[u8],
        tokens: &Bound<'py, PyAny>,
        extra: &[u8],
        salt: &str,
        adapter: Option<&str>,
    ) -> PyResult<Bound<'py, PyBytes>> {
        let naming = self.naming(extra, salt, adapter)?;
        let list: Vec<u32> = numbers("tokens", tokens)?;
        let key = naming.one(&keys::read(parent)?, &list);
        Ok(keys::bytes(tokens.py(), &key))
    }

    /// Keys from the engine's own block hashes, one each.
    #[pyo3(signature = (hashes, *, extra=NOTHING, salt="", adapter=None))]
    fn hash_keys<'py>(
        &self,
        hashes: &Bound<'py, PyAny>,
        extra: &[u8],
        salt: &str,
        adapter: Option<&str>,
    ) -> PyResult<Bound<'py, PyList>> {
        let naming = self.naming(extra, salt, adapter)?;
        let one = |hash: PyResult<Bound<'_, PyAny>>| {
            let hash = hash?.cast_into::<PyBytes>()?;
            Ok(naming.hash(hash.as_bytes()))
        };
        let made: Vec<_> = hashes.try_iter()?.map(one).collect::<PyResult<_>>()?;
        keys::list(hashes.py(), &made)
    }

    /// Blocks of one prefix of `tokens` tokens, from block `first` on, to save.
    #[pyo3(signature = (keys, tokens, *, kind="kv", first=0))]
    fn chain(
        &self,
        keys: &Bound<'_, PyAny>,
        tokens: usize,
        kind: &str,
        first: usize,
    ) -> PyResult<Vec<SaveBlock>> {
        let (keys, kind) = (keys::read_all(keys)?, PayloadKind::read(kind)?);
        let block_tokens = self.model.block_tokens;
        let blocks = kvtier_client::SaveBlock::chain(&keys, tokens, block_tokens, kind);
        Ok(blocks.into_iter().skip(first).map(SaveBlock).collect())
    }

    /// Says how much of a prefix can be restored now.
    #[pyo3(signature = (keys, kind="kv", *, accept="exact", tokens=None))]
    fn lookup(
        &self,
        py: Python<'_>,
        keys: &Bound<'_, PyAny>,
        kind: &str,
        accept: &str,
        tokens: Option<usize>,
    ) -> PyResult<Lookup> {
        let (keys, kind) = (keys::read_all(keys)?, PayloadKind::read(kind)?);
        let (session, accept) = (self.open()?, Quality::read(accept)?);
        let found = runtime::call(py, session.lookup_accepting(&keys, kind, accept))?;
        Ok(Lookup::new(found, self.model.block_tokens, tokens))
    }

    /// As `lookup`, in the background.
    #[pyo3(signature = (keys, kind="kv", *, accept="exact", tokens=None))]
    fn start_lookup(
        &self,
        py: Python<'_>,
        keys: &Bound<'_, PyAny>,
        kind: &str,
        accept: &str,
        tokens: Option<usize>,
    ) -> PyResult<Pending> {
        let (keys, kind) = (keys::read_all(keys)?, PayloadKind::read(kind)?);
        let (session, accept) = (self.open()?, Quality::read(accept)?);
        let block_tokens = self.model.block_tokens;
        let call = async move { session.lookup_accepting(&keys, kind, accept).await };
        Pending::start(py, call, move |py, found| {
            let found = Lookup::new(found, block_tokens, tokens);
            Ok(Py::new(py, found)?.into_any())
        })
    }

    /// As `lookup`, with a status for every key.
    #[pyo3(signature = (keys, kind="kv"))]
    fn lookup_each(&self, py: Python<'_>, keys: &Bound<'_, PyAny>, kind: &str) -> PyResult<Lookup> {
        let (keys, kind) = (keys::read_all(keys)?, PayloadKind::read(kind)?);
        let found = runtime::call(py, self.open()?.lookup_each(&keys, kind))?;
        Ok(Lookup::new(found, self.model.block_tokens, None))
    }

    /// Starts moving blocks to the daemon's memory.
    #[pyo3(signature = (keys, kind="kv", *, accept="exact"))]
    fn prefetch(
        &self,
        py: Python<'_>,
        keys: &Bound<'_, PyAny>,
        kind: &str,
        accept: &str,
    ) -> PyResult<Prefetched> {
        let (keys, kind) = (keys::read_all(keys)?, PayloadKind::read(kind)?);
        let (session, accept) = (self.open()?, Quality::read(accept)?);
        let moved = runtime::call(py, session.prefetch_accepting(&keys, kind, accept))?;
        Ok(Prefetched(moved))
    }

    /// As `prefetch`, in the background.
    #[pyo3(signature = (keys, kind="kv", *, accept="exact"))]
    fn start_prefetch(
        &self,
        py: Python<'_>,
        keys: &Bound<'_, PyAny>,
        kind: &str,
        accept: &str,
    ) -> PyResult<Pending> {
        let (keys, kind) = (keys::read_all(keys)?, PayloadKind::read(kind)?);
        let (session, accept) = (self.open()?, Quality::read(accept)?);
        let call = async move { session.prefetch_accepting(&keys, kind, accept).await };
        Pending::start(py, call, |py, moved| {
            Ok(Py::new(py, Prefetched(moved))?.into_any())
        })
    }

    /// Keeps blocks from eviction for `ttl` seconds. Returns how many exist.
    #[pyo3(signature = (keys, ttl, kind="kv"))]
    fn pin(
        &self,
        py: Python<'_>,
        keys: &Bound<'_, PyAny>,
        ttl: f64,
        kind: &str,
    ) -> PyResult<usize> {
        let (keys, kind) = (keys::read_all(keys)?, PayloadKind::read(kind)?);
        let ttl = seconds("ttl", ttl)?;
        runtime::call(py, self.open()?.pin(&keys, kind, ttl))
    }

    #[pyo3(signature = (keys, kind="kv"))]
    fn unpin(&self, py: Python<'_>, keys: &Bound<'_, PyAny>, kind: &str) -> PyResult<usize> {
        let (keys, kind) = (keys::read_all(keys)?, PayloadKind::read(kind)?);
        runtime::call(py, self.open()?.unpin(&keys, kind))
    }

    fn explain(&self, py: Python<'_>, key: &[u8]) -> PyResult<Explanation> {
        let key = keys::read(key)?;
        runtime::call(py, self.open()?.explain(&key)).map(Explanation)
    }

    /// Forgets every block of this session's namespace. Returns how many there were.
    fn wipe(&self, py: Python<'_>) -> PyResult<u64> {
        runtime::call(py, self.open()?.wipe())
    }

    fn watch_events(&self, py: Python<'_>) -> PyResult<Events> {
        let events = runtime::call(py, self.open()?.watch_events())?;
        Ok(Events::new(events))
    }

    /// Tells the daemon how long a prefill step took: `tokens` computed after `before`.
    fn report_prefill(&self, before: u32, tokens: u32, seconds: f64) -> PyResult<()> {
        let took: Duration = runtime::seconds("seconds", seconds)?;
        let step = PrefillStep {
            before,
            tokens,
            took,
        };
        self.open()?.report_prefill(&[step]);
        Ok(())
    }

    /// How good what is computed behind a block can be, as far as this session knows.
    fn quality_of(&self, key: &[u8]) -> PyResult<&'static str> {
        let key = keys::read(key)?;
        Ok(words::quality(self.open()?.quality_of(&key)))
    }

    /// Says how good the engine's own blocks are: what is saved behind them is no better.
    fn set_quality(&self, keys: &Bound<'_, PyAny>, quality: &str) -> PyResult<()> {
        let (keys, quality) = (keys::read_all(keys)?, Quality::read(quality)?);
        self.open()?.set_quality(&keys, quality);
        Ok(())
    }

    /// Saves blocks out of the engine's cache, in the background.
    #[pyo3(signature = (cache, blocks, pages, *, wait="durable"))]
    fn save_pages(
        &self,
        py: Python<'_>,
        cache: &Bound<'_, PagedCache>,
        blocks: Vec<SaveBlock>,
        pages: &Bound<'_, PyAny>,
        wait: &str,
    ) -> PyResult<Saving> {
        let pages: Vec<usize> = numbers("pages", pages)?;
        let (session, cache) = (self.open()?, cache.get().now());
        Saving::pages(py, session, cache, blocks, pages, Word::read(wait)?)
    }

    /// A slot to fill for each block that is new, or why there is none, in order.
    fn reserve<'py>(
        &self,
        py: Python<'py>,
        blocks: Vec<SaveBlock>,
    ) -> PyResult<Bound<'py, PyList>> {
        let blocks: Vec<_> = blocks.into_iter().map(|block| block.0).collect();
        let reserved = runtime::call(py, self.open()?.reserve(&blocks))?;
        save::reservations(py, reserved, self.model.order)
    }

    /// As `reserve`, in the background.
    fn start_reserve(&self, py: Python<'_>, blocks: Vec<SaveBlock>) -> PyResult<Pending> {
        let blocks: Vec<_> = blocks.into_iter().map(|block| block.0).collect();
        let (session, order) = (self.open()?, self.model.order);
        let call = async move { session.reserve(&blocks).await };
        Pending::start(py, call, move |py, reserved| {
            Ok(save::reservations(py, reserved, order)?.into_any().unbind())
        })
    }

    /// Hands filled slots over and waits until each is stored. Takes the slots.
    #[pyo3(signature = (slots, wait="durable"))]
    fn commit<'py>(
        &self,
        py: Python<'py>,
        slots: Vec<Bound<'py, Slot>>,
        wait: &str,
    ) -> PyResult<Bound<'py, PyList>> {
        let saving = self.start_commit(py, slots, wait)?;
        saving.result(py, None)
    }

    /// As `commit`, in the background.
    #[pyo3(signature = (slots, wait="durable"))]
    fn start_commit<'py>(
        &self,
        py: Python<'py>,
        slots: Vec<Bound<'py, Slot>>,
        wait: &str,
    ) -> PyResult<Saving> {
        let wait = Word::read(wait)?;
        let session = self.open()?;
        Saving::slots(py, session, &slots, wait)
    }

    /// Waits until blocks that were accepted before are durable.
    fn wait_durable<'py>(
        &self,
        py: Python<'py>,
        keys: &Bound<'py, PyAny>,
    ) -> PyResult<Bound<'py, PyList>> {
        let keys = keys::read_all(keys)?;
        let outcomes = runtime::call(py, self.open()?.wait_durable(&keys))?;
        save::outcomes(py, outcomes.into_iter().map(save::committed))
    }

    /// Restores blocks into the engine's cache, in the background.
    #[pyo3(signature = (
        cache, keys, pages, *, accept="exact", deadline=None, scattered=false, after=None,
        two_ended=None
    ))]
    #[expect(clippy::too_many_arguments, reason = "named arguments of a function")]
    fn restore_pages(
        &self,
        py: Python<'_>,
        cache: &Bound<'_, PagedCache>,
        keys: &Bound<'_, PyAny>,
        pages: &Bound<'_, PyAny>,
        accept: &str,
        deadline: Option<f64>,
        scattered: bool,
        after: Option<&[u8]>,
        two_ended: Option<(u32, u32)>,
    ) -> PyResult<Restoring> {
        let options = restore::options(accept, deadline, scattered, after, two_ended)?;
        let (keys, pages) = (keys::read_all(keys)?, numbers("pages", pages)?);
        let (session, cache) = (self.open()?, cache.get().now());
        Restoring::start(py, session, cache, keys, pages, options)
    }

    /// Starts a restore that hands out blocks to read in place, as events.
    #[pyo3(signature = (
        keys, kind="kv", *, accept="exact", deadline=None, scattered=false, after=None,
        two_ended=None
    ))]
    #[expect(clippy::too_many_arguments, reason = "named arguments of a function")]
    fn restore(
        &self,
        py: Python<'_>,
        keys: &Bound<'_, PyAny>,
        kind: &str,
        accept: &str,
        deadline: Option<f64>,
        scattered: bool,
        after: Option<&[u8]>,
        two_ended: Option<(u32, u32)>,
    ) -> PyResult<Restore> {
        let options = restore::options(accept, deadline, scattered, after, two_ended)?;
        let (keys, kind) = (keys::read_all(keys)?, PayloadKind::read(kind)?);
        let session = self.open()?;
        let restore = runtime::call(py, session.restore(&keys, kind, options))?;
        Ok(Restore::new(restore, self.model.order))
    }

    /// Gives leases back and confirms that all were alive until now. Takes the blocks.
    fn release(&self, py: Python<'_>, blocks: &Bound<'_, PyAny>) -> PyResult<()> {
        let blocks: Vec<_> = blocks.try_iter()?.collect::<PyResult<_>>()?;
        let taken = crate::memory::block::take_all(&PyTuple::new(py, blocks)?)?;
        runtime::call(py, self.open()?.release(taken))
    }

    fn __repr__(&self) -> PyResult<String> {
        let session = self.slot()?;
        let session = session.as_ref();
        let state = session.map_or_else(|| "closed".into(), |one| format!("{:?}", one.state()));
        Ok(format!("Session({:?}, {state})", self.model.model))
    }
}
