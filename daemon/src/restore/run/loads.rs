//! The loads of one restore that are under way.
//!
//! Upstairs:   `run`.
//! Downstairs: a task each. What a task does ends in host memory for whoever asks next, once its
//!             read has begun.

use std::collections::HashMap;
use std::future::Future;
use std::sync::Arc;

use kvtier_proto::Miss;
use tokio::task::{AbortHandle, JoinError, JoinSet};

use crate::block::HostBlock;
use crate::tier::Tier;

/// Which block, and what came of it.
pub(super) type Load = (usize, Result<(Arc<HostBlock>, Tier), Miss>);

/// See the module.
#[derive(Debug, Default)]
pub(super) struct Loads {
    tasks: JoinSet<Load>,
    handles: HashMap<usize, AbortHandle>,
}

impl Loads {
    /// Begins one.
    pub(super) fn start(
        &mut self,
        index: usize,
        load: impl Future<Output = Load> + Send + 'static,
    ) {
        self.handles.insert(index, self.tasks.spawn(load));
    }

    /// True when none is under way.
    pub(super) fn is_empty(&self) -> bool {
        self.tasks.is_empty()
    }

    /// Nobody waits for a block any more: one whose read has not begun is not read.
    pub(super) fn abandon(&mut self, index: usize) {
        if let Some(handle) = self.handles.remove(&index) {
            handle.abort();
        }
    }

    /// Waits until any has ended; those that have by then. Abandoned ones end with nothing.
    ///
    /// Cancel safety: dropped early, nothing is lost.
    pub(super) async fn ended(&mut self) -> Vec<Load> {
        let mut ended = Vec::new();
        let mut next = self.tasks.join_next().await;
        while let Some(load) = next {
            ended.extend(self.end(load));
            next = self.tasks.try_join_next();
        }
        ended
    }

    fn end(&mut self, load: Result<Load, JoinError>) -> Option<Load> {
        match load {
            Ok(load) => {
                self.handles.remove(&load.0);
                Some(load)
            }
            Err(ended) if ended.is_cancelled() => None,
            Err(problem) => {
                tracing::error!(%problem, "a load ended without an answer");
                None
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    const MISSED: Result<(Arc<HostBlock>, Tier), Miss> = Err(Miss::Absent);

    // Goal: a block that the engine took over is not waited for, and the others are.
    #[tokio::test]
    async fn ended_brings_what_was_not_abandoned() {
        let mut loads = Loads::default();
        loads.start(1, std::future::pending());
        loads.start(2, async { (2, MISSED) });
        loads.abandon(1);
        loads.abandon(7);
        let mut all = Vec::new();
        while !loads.is_empty() {
            let ended = tokio::time::timeout(Duration::from_secs(10), loads.ended());
            all.extend(ended.await.unwrap().into_iter().map(|(index, _)| index));
        }
        assert_eq!(all, [2]);
    }
}
