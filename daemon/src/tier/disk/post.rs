//! The way of a command to a device's thread.
//!
//! Upstairs:   `device::Handle` sends, `thread` takes.
//! Downstairs: a channel without a bound, and the places that bound it for all but wipes.

use std::sync::Arc;
use std::sync::mpsc::Sender;

use kvtier_store::disk::Waker;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use super::device::Command;

/// A command on its way to the thread, and its place among those that wait there.
pub(super) struct Sent {
    command: Command,
    place: Option<OwnedSemaphorePermit>,
}

impl Sent {
    /// The command. Its place is free for another.
    pub(super) fn take(self) -> Command {
        drop(self.place);
        self.command
    }
}

/// The way to the thread.
#[derive(Debug, Clone)]
pub(super) struct Post {
    pub(super) commands: Sender<Sent>,
    pub(super) waker: Waker,
    pub(super) places: Arc<Semaphore>,
}

impl Post {
    pub(super) fn send(&self, command: Command, place: Option<OwnedSemaphorePermit>) {
        // Where nobody is left to answer, the other end of the reply goes with the command.
        let _ = self.commands.send(Sent { command, place });
        self.waker.wake();
    }
}
