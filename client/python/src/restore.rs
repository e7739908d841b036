//! A running restore as events: blocks to read in place.
//!
//! Upstairs:   engines that place blocks themselves.
//! Downstairs: `kvtier_client::Restore`.
//!
//! Invariants kept here
//!   O1  `cancel` and `progress` are heard while another thread waits for the next event.

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use kvtier_client::{
    BlockStatus, Error, NextCompute, PartOrder, PrefillStep, Quality, RestoreEvent, RestoreOptions,
    RestoreSummary as Summary, TwoEnded,
};
use pyo3::exceptions::PyStopIteration;
use pyo3::prelude::*;
use pyo3::types::PyList;
use tokio::sync::{Mutex, Notify};

use crate::errors;
use crate::keys;
use crate::memory::block::LeasedBlock;
use crate::runtime::{self, Here};
use crate::values;
use crate::words::{self, Word};

/// How to restore, from plain values.
pub(crate) fn options(
    accept: &str,
    deadline: Option<f64>,
    scattered: bool,
    after: Option<&[u8]>,
    two_ended: Option<(u32, u32)>,
) -> PyResult<RestoreOptions> {
    let mut options = RestoreOptions::default().accept(Quality::read(accept)?);
    options.deadline = deadline
        .map(|value| runtime::seconds("deadline", value))
        .transpose()?;
    options.scattered = scattered;
    options.after = after.map(keys::read).transpose()?;
    if let Some((first_token, suffix_tokens)) = two_ended {
        options = options.two_ended(TwoEnded::new(suffix_tokens).after(first_token));
    }
    Ok(options)
}

/// What will happen to each block asked for. Comes first, once.
#[pyclass(frozen, module = "kvtier")]
#[derive(Debug)]
pub(crate) struct RestorePlan(Vec<BlockStatus>);

#[pymethods]
impl RestorePlan {
    #[getter]
    fn blocks(&self) -> Vec<values::BlockStatus> {
        let blocks = self.0.iter().copied();
        blocks.map(values::BlockStatus::from).collect()
    }

    fn __repr__(&self) -> String {
        format!("RestorePlan({} blocks)", self.0.len())
    }
}

/// How a restore ended. Comes last, once.
#[pyclass(frozen, module = "kvtier")]
#[derive(Debug)]
pub(crate) struct RestoreSummary(pub(crate) Summary);

#[pymethods]
impl RestoreSummary {
    /// Leading blocks that all arrived, or that the engine had computed.
    #[getter]
    fn usable_blocks(&self) -> usize {
        self.0.usable_blocks
    }

    /// Index and reason of the blocks that did not arrive.
    #[getter]
    fn missed(&self) -> Vec<(usize, &'static str)> {
        let missed = self.0.missed.iter();
        missed
            .map(|(index, miss)| (*index, words::miss(*miss)))
            .collect()
    }

    #[getter]
    fn cancelled(&self) -> bool {
        self.0.cancelled
    }

    fn __repr__(&self) -> String {
        let (usable, missed) = (self.0.usable_blocks, self.0.missed.len());
        format!("RestoreSummary(usable_blocks={usable}, {missed} missed)")
    }
}

/// What the owner of a handle asks of a restore that something else is driving (O1).
#[derive(Default)]
pub(crate) struct Wishes {
    cancel: AtomicBool,
    computed: AtomicUsize,
    some: Notify,
}

impl Wishes {
    pub(crate) fn cancel(&self) {
        self.cancel.store(true, Ordering::Release);
        self.some.notify_one();
    }

    pub(crate) fn progress(&self, computed_blocks: usize) {
        self.computed.fetch_max(computed_blocks, Ordering::AcqRel);
        self.some.notify_one();
    }

    /// Passes on what was asked.
    pub(crate) fn grant(&self, restore: &mut kvtier_client::Restore) {
        restore.progress(self.computed.load(Ordering::Acquire));
        if self.cancel.swap(false, Ordering::AcqRel) {
            restore.cancel();
        }
    }

    /// Waits until something is asked. Cancel safe.
    pub(crate) async fn some(&self) {
        self.some.notified().await;
    }
}

struct Running {
    restore: Mutex<kvtier_client::Restore>,
    wishes: Wishes,
    compute: kvtier_client::ComputeEnd,
    ended: AtomicBool,
}

impl Running {
    async fn next(&self) -> Result<Option<RestoreEvent>, Error> {
        let mut restore = self.restore.lock().await;
        loop {
            self.wishes.grant(&mut restore);
            tokio::select! {
                biased;
                () = self.wishes.some() => {}
                event = restore.next() => return event,
            }
        }
    }

    async fn wait(&self) -> Result<(), Error> {
        let mut restore = self.restore.lock().await;
        loop {
            self.wishes.grant(&mut restore);
            tokio::select! {
                biased;
                () = self.wishes.some() => {}
                done = restore.wait() => return done,
            }
        }
    }

    /// Passes on what was asked at once, unless another thread does it.
    fn nudge(&self) {
        if let Ok(mut restore) = self.restore.try_lock() {
            self.wishes.grant(&mut restore);
        }
    }
}

/// A running restore, as events. Dropping it cancels; blocks that were handed out stay.
#[pyclass(frozen, module = "kvtier")]
pub(crate) struct Restore {
    running: Here<Running>,
    order: PartOrder,
}

impl Restore {
    pub(crate) fn new(restore: kvtier_client::Restore, order: PartOrder) -> Self {
        let running = Running {
            compute: restore.compute_end(),
            restore: Mutex::new(restore),
            wishes: Wishes::default(),
            ended: AtomicBool::new(false),
        };
        Self {
            running: Here::new(running),
            order,
        }
    }

    /// The event's object; notes the end.
    fn made(
        &self,
        py: Python<'_>,
        event: Result<Option<RestoreEvent>, Error>,
    ) -> PyResult<Option<Py<PyAny>>> {
        let running = self.running.get()?;
        let end = || running.ended.store(true, Ordering::Release);
        let made = match event {
            Ok(Some(RestoreEvent::Ready(block))) => {
                Py::new(py, LeasedBlock::new(block, self.order)?)?.into_any()
            }
            Ok(Some(RestoreEvent::Plan(plan))) => Py::new(py, RestorePlan(plan))?.into_any(),
            Ok(Some(RestoreEvent::Done(summary))) => {
                end();
                Py::new(py, RestoreSummary(summary))?.into_any()
            }
            Ok(_) => return Ok(None),
            Err(error) => {
                end();
                return Err(errors::raise(error));
            }
        };
        Ok(Some(made))
    }
}

#[pymethods]
impl Restore {
    /// The next event; `None` after the summary.
    #[pyo3(signature = (timeout=None))]
    fn next(&self, py: Python<'_>, timeout: Option<f64>) -> PyResult<Option<Py<PyAny>>> {
        let running = self.running.get()?;
        let event = runtime::wait_for(py, runtime::limit(timeout)?, running.next())?;
        let event = event.ok_or_else(|| errors::timeout("the next event"))?;
        self.made(py, event)
    }

    /// The next event if there is one; `None` when there is none now, or it has ended.
    fn try_next(&self, py: Python<'_>) -> PyResult<Option<Py<PyAny>>> {
        let running = self.running.get()?;
        let Ok(mut restore) = running.restore.try_lock() else {
            return Ok(None);
        };
        let event = restore.try_next();
        drop(restore);
        self.made(py, event)
    }

    /// True when the last event has been handed out, or the restore has failed.
    fn ended(&self) -> PyResult<bool> {
        Ok(self.running.get()?.ended.load(Ordering::Acquire))
    }

    fn __iter__(slf: Bound<'_, Self>) -> Bound<'_, Self> {
        slf
    }

    fn __next__(&self, py: Python<'_>) -> PyResult<Py<PyAny>> {
        let event = self.next(py, None)?;
        event.ok_or_else(|| PyStopIteration::new_err(()))
    }

    /// Waits for all of it: the blocks that arrived, by index, and how it ended.
    fn collect<'py>(&self, py: Python<'py>) -> PyResult<(Bound<'py, PyList>, RestoreSummary)> {
        let running = self.running.get()?;
        let all = async {
            let mut blocks = Vec::new();
            loop {
                match running.next().await? {
                    Some(RestoreEvent::Ready(block)) => blocks.push(block),
                    Some(RestoreEvent::Done(summary)) => return Ok((blocks, Some(summary))),
                    Some(_) => {}
                    None => return Ok((blocks, None)),
                }
            }
        };
        let all = runtime::call(py, all);
        running.ended.store(true, Ordering::Release);
        let (mut blocks, summary) = all?;
        let summary = summary.ok_or_else(|| errors::invalid("the restore has ended before"))?;
        blocks.sort_by_key(kvtier_client::LeasedBlock::index);
        let list = PyList::empty(py);
        for block in blocks {
            list.append(LeasedBlock::new(block, self.order)?)?;
        }
        Ok((list, RestoreSummary(summary)))
    }

    /// Leading blocks that the engine has computed itself meanwhile. Never waits.
    fn progress(&self, computed_blocks: usize) -> PyResult<()> {
        let running = self.running.get()?;
        running.wishes.progress(computed_blocks);
        running.nudge();
        Ok(())
    }

    fn cancel(&self) -> PyResult<()> {
        let running = self.running.get()?;
        running.wishes.cancel();
        running.nudge();
        Ok(())
    }

    /// Waits for an event, or for a block that `compute_end` gives out now.
    #[pyo3(signature = (timeout=None))]
    fn wait(&self, py: Python<'_>, timeout: Option<f64>) -> PyResult<()> {
        let running = self.running.get()?;
        let waited = runtime::wait_for(py, runtime::limit(timeout)?, running.wait())?;
        let waited = waited.ok_or_else(|| errors::timeout("the next event"))?;
        waited.map_err(errors::raise)
    }

    fn compute_end(&self) -> PyResult<ComputeEnd> {
        Ok(ComputeEnd(Here::new(self.running.get()?.compute.clone())))
    }
}

/// The engine's end of a two-ended restore. Never waits.
#[pyclass(frozen, module = "kvtier")]
pub(crate) struct ComputeEnd(Here<kvtier_client::ComputeEnd>);

/// What the engine does next, as Python sees it.
#[derive(IntoPyObject)]
pub(crate) enum Next {
    Block(usize),
    Word(&'static str),
}

impl From<NextCompute> for Next {
    fn from(next: NextCompute) -> Self {
        match next {
            NextCompute::Block(index) => Self::Block(index),
            NextCompute::Wait => Self::Word("wait"),
            NextCompute::Finished => Self::Word("finished"),
        }
    }
}

/// A step that a computed block took; none where nothing was said.
pub(crate) fn step(before: u32, tokens: u32, seconds: f64) -> PyResult<Option<PrefillStep>> {
    let took: Duration = runtime::seconds("seconds", seconds)?;
    let step = PrefillStep {
        before,
        tokens,
        took,
    };
    Ok((tokens > 0 && !took.is_zero()).then_some(step))
}

#[pymethods]
impl ComputeEnd {
    /// The block to compute now; `"wait"` for what is loading; `"finished"` when all are here.
    fn next(&self) -> PyResult<Next> {
        Ok(self.0.get()?.next().into())
    }

    /// A block that was given out is in the engine's cache.
    #[pyo3(signature = (index, *, before=0, tokens=0, seconds=0.0))]
    fn computed(&self, index: usize, before: u32, tokens: u32, seconds: f64) -> PyResult<()> {
        let step = step(before, tokens, seconds)?;
        self.0.get()?.computed(index, step);
        Ok(())
    }
}
