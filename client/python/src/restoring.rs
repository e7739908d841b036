//! A restore into the engine's pages, in the background.
//!
//! Upstairs:   `session` starts it; engines poll it, or wait for a layer or a block.
//! Downstairs: one task of the runtime: it takes blocks as they come, copies each to its pages
//!             layer after layer, and has the leases confirmed.
//!
//! Invariants kept here
//!   J1  A block or a layer is ready only when all of it is in the pages.
//!   J2  A result is returned only when every lease was confirmed after its copy.
//!   J3  No page is written once the restore is done.
//!   J4  No block is given out to compute while a block before it is still being copied.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use kvtier_client::{
    BlockKey, ComputeEnd, Error, LeasedBlock, ReadError, RestoreEvent, RestoreOptions,
    RestoreSummary as Summary, Session,
};
use pyo3::prelude::*;
use tokio::sync::watch;
use tokio::task::AbortHandle;

use crate::errors;
use crate::pages::Cache;
use crate::restore::{Next, RestoreSummary, Wishes, step};
use crate::runtime::{self, Here};

/// Blocks that are copied before their leases are confirmed.
const BATCH: usize = 64;

/// What a restore has done so far. Bumped counters wake whoever waits.
struct Shared {
    wishes: Wishes,
    /// Counts what is new; odd things are looked up in the rest.
    news: watch::Sender<u64>,
    progress: Mutex<Progress>,
    /// Blocks of which each layer is in the pages.
    layers: Vec<AtomicUsize>,
    compute: Mutex<Option<ComputeEnd>>,
    /// Held from the moment a block is taken until it is in the pages (J4).
    copying: Mutex<()>,
}

#[derive(Default)]
struct Progress {
    /// Blocks that `poll` has not returned.
    fresh: VecDeque<usize>,
    ready: Vec<bool>,
    /// Blocks that will come, as far as is known.
    expected: usize,
    /// The end; the outer `None` while it runs, the inner one when it was cancelled by dropping.
    result: Option<Option<Result<Summary, Error>>>,
}

impl Shared {
    fn progress(&self) -> std::sync::MutexGuard<'_, Progress> {
        self.progress.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn bump(&self) {
        self.news.send_modify(|count| *count += 1);
    }

    fn end(&self, result: Option<Result<Summary, Error>>) {
        self.progress().result.get_or_insert(result);
        self.bump();
    }

    fn is_done(&self) -> bool {
        self.progress().result.is_some()
    }

    fn layer_ready(&self, layer: u32) -> bool {
        let count = usize::try_from(layer)
            .ok()
            .and_then(|layer| self.layers.get(layer));
        let count = count.map_or(0, |count| count.load(Ordering::Acquire));
        let progress = self.progress();
        let whole = matches!(progress.result, Some(Some(Ok(_))));
        whole || (progress.expected > 0 && count >= progress.expected)
    }
}

/// Ends a restore whose task ends, however it does.
struct End(Arc<Shared>);

impl Drop for End {
    fn drop(&mut self) {
        self.0.end(None);
    }
}

/// What the task works on.
struct Work {
    session: Session,
    cache: Arc<Cache>,
    /// Pages of each block.
    pages: Vec<Vec<usize>>,
    shared: Arc<Shared>,
}

impl Work {
    async fn run(&self, keys: &[BlockKey], options: RestoreOptions) -> Result<Summary, Error> {
        let scattered = options.scattered;
        let mut restore = self.session.restore(keys, self.cache.kind, options).await?;
        {
            let mut compute = self.compute();
            *compute = Some(restore.compute_end());
        }
        self.shared.bump();
        let mut read = Vec::new();
        loop {
            let summary = self.take(&mut restore, scattered, &mut read)?;
            self.shared.bump();
            if summary.is_some() || !read.is_empty() {
                self.session.release(std::mem::take(&mut read)).await?;
            }
            if let Some(summary) = summary {
                return Ok(summary);
            }
            self.shared.wishes.grant(&mut restore);
            tokio::select! {
                biased;
                () = self.shared.wishes.some() => {}
                waited = restore.wait() => waited?,
            }
        }
    }

    fn compute(&self) -> std::sync::MutexGuard<'_, Option<ComputeEnd>> {
        let compute = self.shared.compute.lock();
        compute.unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes what has come, at most a batch of blocks. Returns the end once it is there.
    fn take(
        &self,
        restore: &mut kvtier_client::Restore,
        scattered: bool,
        read: &mut Vec<LeasedBlock>,
    ) -> Result<Option<Summary>, Error> {
        let copying = self.shared.copying.lock();
        let _copying = copying.unwrap_or_else(PoisonError::into_inner);
        while read.len() < BATCH {
            match restore.try_next()? {
                Some(RestoreEvent::Ready(block)) => {
                    self.scatter(&block)?;
                    read.push(block);
                    self.shared.bump();
                }
                Some(RestoreEvent::Plan(plan)) => {
                    let present = plan.iter().filter(|status| status.is_present()).count();
                    let leading = plan.iter().take_while(|status| status.is_present()).count();
                    self.shared.progress().expected = if scattered { present } else { leading };
                }
                Some(RestoreEvent::Done(summary)) => return Ok(Some(summary)),
                _ => return Ok(None),
            }
        }
        Ok(None)
    }

    /// Copies a block to its pages, layer after layer (J1).
    fn scatter(&self, block: &LeasedBlock) -> Result<(), Error> {
        let (index, tokens) = (block.index(), block.tokens());
        let pages = self.pages.get(index).map_or(&[][..], Vec::as_slice);
        let parts = block.layout().parts();
        for (at, part) in parts.iter().enumerate() {
            let from = block.part(part.layer, part.code)?;
            if !self.cache.scatter(part, pages, tokens, from) {
                let given = pages.len();
                return Err(Error::Invalid {
                    message: format!("{given} pages for block {index} of {tokens} tokens"),
                });
            }
            let last = parts
                .get(at + 1)
                .is_none_or(|next| next.layer != part.layer);
            let layer = usize::try_from(part.layer).unwrap_or(usize::MAX);
            if let (true, Some(count)) = (last, self.shared.layers.get(layer)) {
                // A lease that is lost by now may have been copied from a place in other use.
                block.payload().map_err(|_| ReadError::LeaseLost)?;
                count.fetch_add(1, Ordering::AcqRel);
                self.shared.bump();
            }
        }
        let mut progress = self.shared.progress();
        if let Some(ready) = progress.ready.get_mut(index) {
            *ready = true;
        }
        progress.fresh.push_back(index);
        Ok(())
    }
}

struct Running {
    shared: Arc<Shared>,
    task: AbortHandle,
    /// The last news that `wait_event` has returned for.
    seen: Mutex<u64>,
}

impl Drop for Running {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// A restore into the engine's cache that runs in the background. Dropping it cancels.
#[pyclass(frozen, module = "kvtier")]
pub(crate) struct Restoring(Here<Running>);

impl Restoring {
    pub(crate) fn start(
        py: Python<'_>,
        session: Session,
        cache: Arc<Cache>,
        keys: Vec<BlockKey>,
        pages: Vec<usize>,
        options: RestoreOptions,
    ) -> PyResult<Self> {
        let pages = cache.split(pages, keys.len(), true)?;
        let progress = Progress {
            ready: vec![false; keys.len()],
            ..Progress::default()
        };
        let shared = Arc::new(Shared {
            wishes: Wishes::default(),
            news: watch::channel(0).0,
            progress: Mutex::new(progress),
            layers: cache
                .model
                .layers
                .iter()
                .map(|_| AtomicUsize::new(0))
                .collect(),
            compute: Mutex::new(None),
            copying: Mutex::new(()),
        });
        let work = Work {
            session,
            cache,
            pages,
            shared: Arc::clone(&shared),
        };
        let end = End(Arc::clone(&shared));
        let task = runtime::runtime(py)?.spawn(async move {
            let result = work.run(&keys, options).await;
            end.0.end(Some(result));
        });
        let running = Running {
            shared,
            task: task.abort_handle(),
            seen: Mutex::new(0),
        };
        Ok(Self(Here::new(running)))
    }

    /// Waits until `look` is true, or the restore has ended. False when `timeout` passes first.
    fn until(
        &self,
        py: Python<'_>,
        timeout: Option<f64>,
        look: impl Fn(&Shared) -> bool + Send + Sync,
    ) -> PyResult<bool> {
        let limit = runtime::limit(timeout)?;
        let shared = &self.0.get()?.shared;
        let mut news = shared.news.subscribe();
        let seen = async {
            let there = news.wait_for(|_| shared.is_done() || look(shared));
            there.await.is_ok()
        };
        Ok(runtime::wait_for(py, limit, seen)?.is_some())
    }

    /// The end, when it is there.
    fn ended(&self) -> PyResult<Option<Summary>> {
        let result = self.0.get()?.shared.progress().result.clone();
        match result {
            None => Ok(None),
            Some(None) => Err(errors::cancelled("the restore")),
            Some(Some(result)) => result.map(Some).map_err(errors::raise),
        }
    }
}

#[pymethods]
impl Restoring {
    /// Blocks that became ready since the last call, in the order in which they came.
    fn poll(&self) -> PyResult<Vec<usize>> {
        let running = self.0.get()?;
        Ok(running.shared.progress().fresh.drain(..).collect())
    }

    /// All blocks that are ready, by index.
    fn ready(&self) -> PyResult<Vec<usize>> {
        let running = self.0.get()?;
        let progress = running.shared.progress();
        let ready = progress.ready.iter().enumerate();
        Ok(ready
            .filter_map(|(index, ready)| ready.then_some(index))
            .collect())
    }

    /// True when this layer of every block that comes is in its pages.
    fn layer_ready(&self, layer: u32) -> PyResult<bool> {
        Ok(self.0.get()?.shared.layer_ready(layer))
    }

    /// Waits for `layer_ready`, or the end of the restore. False when `timeout` passes first.
    #[pyo3(signature = (layer, timeout=None))]
    fn wait_layer(&self, py: Python<'_>, layer: u32, timeout: Option<f64>) -> PyResult<bool> {
        let came = self.until(py, timeout, |shared| shared.layer_ready(layer))?;
        self.ended()?;
        Ok(came)
    }

    /// Waits until the block is ready, or the restore has ended without it (`False`).
    #[pyo3(signature = (index, timeout=None))]
    fn wait_block(&self, py: Python<'_>, index: usize, timeout: Option<f64>) -> PyResult<bool> {
        let ready = |shared: &Shared| {
            let progress = shared.progress();
            progress.ready.get(index).copied().unwrap_or(true)
        };
        self.until(py, timeout, ready)?;
        self.ended()?;
        let running = self.0.get()?;
        let progress = running.shared.progress();
        Ok(progress.ready.get(index).copied().unwrap_or(false))
    }

    /// True when `result` answers at once. Never waits.
    fn done(&self) -> PyResult<bool> {
        Ok(self.0.get()?.shared.is_done())
    }

    /// Waits for the end: every block that came is in its pages and confirmed (J2).
    #[pyo3(signature = (timeout=None))]
    fn result(&self, py: Python<'_>, timeout: Option<f64>) -> PyResult<RestoreSummary> {
        self.until(py, timeout, |_| false)?;
        let summary = self.ended()?;
        let summary = summary.ok_or_else(|| errors::timeout("the restore"))?;
        Ok(RestoreSummary(summary))
    }

    fn progress(&self, computed_blocks: usize) -> PyResult<()> {
        self.0.get()?.shared.wishes.progress(computed_blocks);
        Ok(())
    }

    /// Asks it to stop. Pages are no longer written once `done` is true (J3).
    fn cancel(&self) -> PyResult<()> {
        self.0.get()?.shared.wishes.cancel();
        Ok(())
    }

    /// As `ComputeEnd.next`; also `"wait"` while a block is being copied to its pages (J4).
    fn next_compute(&self) -> PyResult<Next> {
        let shared = &self.0.get()?.shared;
        let Ok(_copying) = shared.copying.try_lock() else {
            return Ok(Next::Word("wait"));
        };
        let compute = shared
            .compute
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        let next = compute.as_ref().map(ComputeEnd::next);
        Ok(next.map_or(Next::Word("wait"), Next::from))
    }

    #[pyo3(signature = (index, *, before=0, tokens=0, seconds=0.0))]
    fn computed(&self, index: usize, before: u32, tokens: u32, seconds: f64) -> PyResult<()> {
        let step = step(before, tokens, seconds)?;
        let shared = &self.0.get()?.shared;
        let compute = shared
            .compute
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        if let Some(compute) = compute.as_ref() {
            compute.computed(index, step);
        }
        Ok(())
    }

    /// Waits until something is new since the last call. False when `timeout` passes first.
    #[pyo3(signature = (timeout=None))]
    fn wait_event(&self, py: Python<'_>, timeout: Option<f64>) -> PyResult<bool> {
        let limit = runtime::limit(timeout)?;
        let running = self.0.get()?;
        let before = *running.seen.lock().unwrap_or_else(PoisonError::into_inner);
        let mut news = running.shared.news.subscribe();
        let wait = async {
            news.wait_for(|count| *count > before)
                .await
                .map(|count| *count)
        };
        let Some(count) = runtime::wait_for(py, limit, wait)? else {
            return Ok(false);
        };
        let mut seen = running.seen.lock().unwrap_or_else(PoisonError::into_inner);
        *seen = count.unwrap_or(before);
        Ok(true)
    }

    fn __repr__(&self) -> PyResult<String> {
        let running = self.0.get()?;
        let progress = running.shared.progress();
        let ready = progress.ready.iter().filter(|ready| **ready).count();
        let (blocks, done) = (progress.ready.len(), progress.result.is_some());
        Ok(format!(
            "Restoring({ready} of {blocks} blocks, done={done})"
        ))
    }
}
