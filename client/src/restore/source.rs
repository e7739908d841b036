//! Where the messages of a restore come from.
//!
//! Upstairs:   `restore`.
//! Downstairs: `mux`, or the task that reads an inline stream.

use tokio::sync::mpsc;

use crate::link::Task;
use crate::mux::{Feed, RESTORE, Running};

pub(crate) enum Source {
    Mux(Running),
    Inline(
        mpsc::Receiver<Feed>,
        #[expect(dead_code, reason = "ends with the restore")] Task,
    ),
}

impl Source {
    pub(super) async fn next(&mut self) -> Option<Feed> {
        match self {
            Self::Mux(running) => running.events.recv().await,
            Self::Inline(feed, _) => feed.recv().await,
        }
    }

    /// `None` when nothing is there yet.
    pub(super) fn try_next(&mut self) -> Option<Feed> {
        let (feed, gone) = match self {
            Self::Mux(running) => (running.events.try_recv().ok(), running.events.is_closed()),
            Self::Inline(feed, _) => (feed.try_recv().ok(), feed.is_closed()),
        };
        let lost = || Feed::Failed(RESTORE.lost("the restore stream ended"));
        feed.or_else(|| gone.then(lost))
    }
}
