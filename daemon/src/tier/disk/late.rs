//! Questions that a device has not answered in time.
//!
//! Upstairs:   `device` waits for answers with a limit.
//! Downstairs: `roll` is told when that begins and when it is over.
//!
//! A question is never taken back: the device may answer it yet. Whoever asked goes on without
//! the answer, and the device is late until the last of these questions is answered. So nobody
//! has to find out whether it is well again: it says so itself.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::time::{Instant, timeout_at};

use super::device::Question;
use super::roll::Roll;
use crate::metrics::Device;

/// Why there is no answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub(super) enum Silent {
    /// There will be none.
    #[error("the disk thread ended")]
    Ended,
    /// It does not come in time.
    #[error("the disk did not answer")]
    Late,
}

/// See the module.
#[derive(Debug)]
pub(super) struct Late {
    device: Device,
    roll: Arc<Roll>,
    questions: Mutex<u64>,
}

impl Late {
    /// A device that has answered everything.
    pub(super) fn new(device: Device, roll: Arc<Roll>) -> Self {
        Self {
            device,
            roll,
            questions: Mutex::default(),
        }
    }

    /// Some question has waited longer than it should.
    pub(super) fn is(&self) -> bool {
        *self.lock() > 0
    }

    /// The answer, if it comes by `until`.
    pub(super) async fn answer<T: Send + 'static>(
        late: &Arc<Self>,
        until: Instant,
        mut question: Question<T>,
    ) -> Result<T, Silent> {
        if let Ok(answer) = timeout_at(until, &mut question).await {
            return answer.ok_or(Silent::Ended);
        }
        let waiting = Self::begin(late);
        tokio::spawn(async move {
            drop(question.await);
            drop(waiting);
        });
        Err(Silent::Late)
    }

    /// A question waits longer than it should, until what is returned is dropped.
    pub(super) fn begin(late: &Arc<Self>) -> Waiting {
        let mut questions = late.lock();
        *questions += 1;
        if *questions == 1 {
            late.roll.answers(late.device, false);
        }
        Waiting(Arc::clone(late))
    }

    fn lock(&self) -> MutexGuard<'_, u64> {
        self.questions
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }
}

/// A question that waits longer than it should.
pub(super) struct Waiting(Arc<Late>);

impl Drop for Waiting {
    fn drop(&mut self) {
        let late = &self.0;
        let mut questions = late.lock();
        *questions = questions.saturating_sub(1);
        if *questions == 0 {
            late.roll.answers(late.device, true);
        }
    }
}
