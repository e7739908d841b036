//! Where the messages of a restore come from.
//!
//! Upstairs:   `restore`.
//! Downstairs: `mux`, or the task that reads an inline stream.

use tokio::sync::mpsc::{self, error::TryRecvError};

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

    /// `None` when nothing is there yet. An end is one only when the channel itself says so: asked
    /// apart, it may close right behind a last message that was not seen.
    pub(super) fn try_next(&mut self) -> Option<Feed> {
        let feed = match self {
            Self::Mux(running) => running.events.try_recv(),
            Self::Inline(feed, _) => feed.try_recv(),
        };
        match feed {
            Ok(feed) => Some(feed),
            Err(TryRecvError::Empty) => None,
            Err(TryRecvError::Disconnected) => {
                Some(Feed::Failed(RESTORE.lost("the restore stream ended")))
            }
        }
    }
}
