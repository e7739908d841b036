//! The engine's end of a restore: what it waits for, and what it computes.
//!
//! Upstairs:   engines that compute while blocks load.
//! Downstairs: `two_ended`.

use std::sync::Arc;

use super::Restore;
use crate::error::Error;
use crate::two_ended::ComputeEnd;

impl Restore {
    /// Waits for something new: an event, or a block that [`ComputeEnd::next`] gives out now. At
    /// once when the restore has ended. An example is at [`ComputeEnd`].
    ///
    /// Errors and cancel safety: as [`next`](Self::next).
    pub async fn wait(&mut self) -> Result<(), Error> {
        if !self.ready.is_empty() || self.ended {
            return Ok(());
        }
        let overdue = self.meeting.overdue_at();
        let late = async {
            match overdue {
                Some(overdue) => tokio::time::sleep_until(overdue).await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            biased;
            result = self.advance() => result,
            () = late => Ok(()),
        }
    }

    /// The engine's end: it says which block to compute next. For every restore: where nothing can
    /// be computed while blocks load, it gives out what did not come when the restore has ended.
    pub fn compute_end(&self) -> ComputeEnd {
        let reports = Arc::clone(&self.link.reports);
        ComputeEnd::new(Arc::clone(&self.meeting), reports)
    }
}
