//! Blocks on their way to the daemon, in the background.
//!
//! Upstairs:   `session` starts it; engines poll it between steps.
//! Downstairs: one task of the runtime, which calls the SDK.
//!
//! Invariants kept here
//!   Q1  The engine's pages are read while `copied` is false, and never after it is true. Where all
//!       blocks are new it is true before any of the last ones is committed.
//!   Q2  A save ends: in outcomes, in an error, or cancelled.
//!   Q3  Saves out of one cache take turns: two that fill the staging memory together would be
//!       refused what each of them has room for alone.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

use kvtier_client::{
    Acknowledge, BlockKey, CommitOutcome, Error, ReservedSlot, SaveBlock, SaveOutcome,
};
use pyo3::prelude::*;
use pyo3::types::PyList;
use tokio::sync::watch;
use tokio::task::AbortHandle;

use crate::errors;
use crate::pages::Cache;
use crate::runtime::{self, Here};
use crate::save;
use crate::slot::Slot;

/// Most keys of one call that waits for durability.
const WAIT_MAX: usize = 4096;

/// How far a save has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Stage {
    Copying,
    Copied,
    Accepted,
    Done,
}

struct Shared {
    stage: watch::Sender<Stage>,
    /// What came of it; `None` while it runs, and when it was cancelled.
    result: Mutex<Option<Result<Vec<SaveOutcome>, Error>>>,
}

impl Shared {
    fn reach(&self, stage: Stage) {
        self.stage.send_if_modified(|now| {
            let further = stage > *now;
            if further {
                *now = stage;
            }
            further
        });
    }
}

/// Ends a save whose task ends, however it does (Q2).
struct End(Arc<Shared>);

impl Drop for End {
    fn drop(&mut self) {
        self.0.reach(Stage::Done);
    }
}

struct Running {
    shared: Arc<Shared>,
    task: AbortHandle,
}

/// Blocks on their way to the daemon. Dropping it leaves them on their way.
#[pyclass(frozen, module = "kvtier")]
pub(crate) struct Saving(Here<Running>);

impl Saving {
    /// Saves blocks out of the engine's pages.
    pub(crate) fn pages(
        py: Python<'_>,
        session: kvtier_client::Session,
        cache: Arc<Cache>,
        blocks: Vec<save::SaveBlock>,
        pages: Vec<usize>,
        wait: Acknowledge,
    ) -> PyResult<Self> {
        let blocks: Vec<SaveBlock> = blocks.into_iter().map(|block| block.0).collect();
        if let Some(block) = blocks.iter().find(|block| block.kind != cache.kind) {
            let (given, kind) = (block.kind.as_str(), cache.kind.as_str());
            return Err(errors::invalid(format!(
                "a block of kind {given}; accepted: {kind}, which the cache holds"
            )));
        }
        let mut split = Vec::new();
        if !blocks.is_empty() {
            split = cache.split(pages, blocks.len(), false)?;
        }
        let mut places = HashMap::with_capacity(blocks.len());
        for (block, pages) in blocks.iter().zip(split) {
            cache.pages_for(&pages, block.tokens)?;
            places.insert(block.key, pages);
        }
        let save = |session: kvtier_client::Session, shared: Arc<Shared>| async move {
            let keys: Vec<BlockKey> = blocks.iter().map(|block| block.key).collect();
            let mut left = parts(&session, &blocks);
            let turn = cache.turn.lock().await;
            let saved = session.save_blocks(blocks, Acknowledge::Accepted, |block, part, bytes| {
                let pages = places.get(&block.key);
                let done =
                    pages.is_some_and(|pages| cache.gather(part, pages, block.tokens, bytes));
                debug_assert!(done, "pages and shapes were checked before");
                left = left.saturating_sub(1);
                if left == 0 {
                    shared.reach(Stage::Copied);
                }
            });
            let saved = saved.await?;
            drop(turn);
            // Blocks that were there already, or refused, were never read.
            shared.reach(Stage::Copied);
            Ok((keys, saved))
        };
        Self::start(py, session, wait, Stage::Copying, save)
    }

    /// Commits slots: takes all of them, or none.
    ///
    /// Errors: `Invalid` for one that is not filled, `BufferError` for one that is in use.
    pub(crate) fn slots(
        py: Python<'_>,
        session: kvtier_client::Session,
        slots: &[Bound<'_, Slot>],
        wait: Acknowledge,
    ) -> PyResult<Self> {
        for (index, slot) in slots.iter().enumerate() {
            if let Some((layer, code)) = slot.get().unwritten()?.first() {
                return Err(errors::invalid(format!(
                    "part {code:?} of layer {layer} of slots[{index}] is not written"
                )));
            }
        }
        let mut taken: Vec<ReservedSlot> = Vec::with_capacity(slots.len());
        for slot in slots {
            match slot.get().take() {
                Ok(slot) => taken.push(slot),
                Err(error) => {
                    for (slot, held) in slots.iter().zip(taken) {
                        slot.get().put_back(held);
                    }
                    return Err(error);
                }
            }
        }
        let save = |session: kvtier_client::Session, _| async move {
            let keys = taken.iter().map(|slot| slot.block().key).collect();
            // One pass over the payload where the session sends checksums.
            let filled = taken.into_iter().map(ReservedSlot::finish);
            let filled = filled.collect::<Result<Vec<_>, _>>()?;
            let outcomes = session.commit(filled, Acknowledge::Accepted).await?;
            Ok((keys, outcomes.into_iter().map(save::committed).collect()))
        };
        Self::start(py, session, wait, Stage::Copied, save)
    }

    fn start<F>(
        py: Python<'_>,
        session: kvtier_client::Session,
        wait: Acknowledge,
        stage: Stage,
        save: impl FnOnce(kvtier_client::Session, Arc<Shared>) -> F,
    ) -> PyResult<Self>
    where
        F: Future<Output = Result<(Vec<BlockKey>, Vec<SaveOutcome>), Error>> + Send + 'static,
    {
        let (stage, _) = watch::channel(stage);
        let result = Mutex::new(None);
        let shared = Arc::new(Shared { stage, result });
        let end = End(Arc::clone(&shared));
        let save = save(session.clone(), Arc::clone(&shared));
        let task = runtime::runtime(py)?.spawn(async move {
            let outcomes = async {
                let (keys, mut outcomes) = save.await?;
                end.0.reach(Stage::Accepted);
                if wait == Acknowledge::Durable {
                    make_durable(&session, &keys, &mut outcomes).await?;
                }
                Ok(outcomes)
            };
            let outcomes = outcomes.await;
            let mut result = end.0.result.lock().unwrap_or_else(PoisonError::into_inner);
            *result = Some(outcomes);
            drop(result);
            drop(end);
        });
        let task = task.abort_handle();
        Ok(Self(Here::new(Running { shared, task })))
    }

    fn stage(&self) -> PyResult<Stage> {
        Ok(*self.0.get()?.shared.stage.borrow())
    }

    /// False when `timeout` passes first.
    fn wait(&self, py: Python<'_>, stage: Stage, timeout: Option<f64>) -> PyResult<bool> {
        let limit = runtime::limit(timeout)?;
        let mut stages = self.0.get()?.shared.stage.subscribe();
        let reached = async { stages.wait_for(|now| *now >= stage).await.is_ok() };
        Ok(runtime::wait_for(py, limit, reached)?.is_some())
    }

    /// What `result` of the module returns.
    pub(crate) fn result<'py>(
        &self,
        py: Python<'py>,
        timeout: Option<f64>,
    ) -> PyResult<Bound<'py, PyList>> {
        if !self.wait(py, Stage::Done, timeout)? {
            return Err(errors::timeout("the save"));
        }
        let shared = &self.0.get()?.shared;
        let result = {
            let result = shared.result.lock().unwrap_or_else(PoisonError::into_inner);
            result.clone()
        };
        let outcomes = result.ok_or_else(|| errors::cancelled("the save"))?;
        save::outcomes(py, outcomes.map_err(errors::raise)?.into_iter())
    }
}

/// Parts that are read when every block is taken: with the last of them nothing is read any more,
/// since a block is filled once. As good as infinite where a layout is not known.
fn parts(session: &kvtier_client::Session, blocks: &[SaveBlock]) -> usize {
    let of = |block: &SaveBlock| match session.layout(block.kind, block.tokens) {
        Ok(layout) => layout.parts().len(),
        Err(_) => usize::MAX,
    };
    blocks.iter().map(of).fold(0, usize::saturating_add)
}

/// Waits until what is accepted is durable. What was there before and will not become durable
/// stays what it is.
async fn make_durable(
    session: &kvtier_client::Session,
    keys: &[BlockKey],
    outcomes: &mut [SaveOutcome],
) -> Result<(), Error> {
    let accepted = |outcome: &SaveOutcome| {
        matches!(
            outcome,
            SaveOutcome::Stored(Acknowledge::Accepted)
                | SaveOutcome::Already(Acknowledge::Accepted)
        )
    };
    let waiting = keys.iter().zip(outcomes.iter_mut());
    let mut waiting: Vec<_> = waiting.filter(|(_, outcome)| accepted(outcome)).collect();
    for batch in waiting.chunks_mut(WAIT_MAX) {
        let keys: Vec<BlockKey> = batch.iter().map(|(key, _)| **key).collect();
        let durable = session.wait_durable(&keys).await?;
        for ((_, outcome), now) in batch.iter_mut().zip(durable) {
            **outcome = match (&**outcome, now) {
                (SaveOutcome::Already(_), CommitOutcome::Stored(level)) => {
                    SaveOutcome::Already(level)
                }
                (SaveOutcome::Already(level), CommitOutcome::Failed(_)) => {
                    SaveOutcome::Already(*level)
                }
                (_, now) => save::committed(now),
            };
        }
    }
    Ok(())
}

#[pymethods]
impl Saving {
    /// True when the engine's pages are no longer read.
    fn copied(&self) -> PyResult<bool> {
        Ok(self.stage()? >= Stage::Copied)
    }

    /// True when the daemon has taken everything that it takes. Never waits.
    fn accepted(&self) -> PyResult<bool> {
        Ok(self.stage()? >= Stage::Accepted)
    }

    /// True when everything is as durable as was asked, or the save has failed.
    fn done(&self) -> PyResult<bool> {
        Ok(self.stage()? >= Stage::Done)
    }

    #[pyo3(signature = (timeout=None))]
    fn wait_copied(&self, py: Python<'_>, timeout: Option<f64>) -> PyResult<bool> {
        self.wait(py, Stage::Copied, timeout)
    }

    #[pyo3(signature = (timeout=None))]
    fn wait_accepted(&self, py: Python<'_>, timeout: Option<f64>) -> PyResult<bool> {
        self.wait(py, Stage::Accepted, timeout)
    }

    /// One outcome a block, in order. Raises what went wrong with the save as a whole.
    #[pyo3(name = "result", signature = (timeout=None))]
    fn py_result<'py>(
        &self,
        py: Python<'py>,
        timeout: Option<f64>,
    ) -> PyResult<Bound<'py, PyList>> {
        self.result(py, timeout)
    }

    /// Saves nothing that is not on its way yet.
    fn cancel(&self) -> PyResult<()> {
        self.0.get()?.task.abort();
        Ok(())
    }
}
