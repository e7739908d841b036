//! The waker's side of the ring: an eventfd that the ring polls.
//!
//! Upstairs:   `disk::ring`, and any thread that holds a `Waker`.
//! Downstairs: `eventfd`.
//!
//! Not here on purpose: no read through the ring. A poll names no memory, so nothing can be
//! written anywhere when a ring is closed with the bell still armed.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::Duration;

use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec};

use crate::disk::rung::Rung;

/// Rung by anybody, answered by the lane.
#[derive(Debug)]
pub(super) struct Bell {
    fd: OwnedFd,
    rung: Rung,
}

impl Bell {
    pub(super) fn new() -> std::io::Result<Self> {
        let fd = rustix::event::eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        Ok(Self {
            fd,
            rung: Rung::new(),
        })
    }

    pub(super) fn fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }

    /// Makes the descriptor readable; once is enough until it is answered.
    pub(super) fn ring(&self) {
        self.rung.ring(|| {
            // Cannot fail: the counter holds 2^64 - 2 rings and each answer empties it.
            let _ = rustix::io::write(&self.fd, &1_u64.to_ne_bytes());
        });
    }

    /// Silences the bell.
    pub(super) fn answer(&self) {
        self.rung.answer(|| {
            let _ = rustix::io::read(&self.fd, &mut [0_u8; 8]);
        });
    }

    /// Blocks until the bell is rung, without a ring, and answers it. At most for `most`.
    pub(super) fn wait(&self, most: Option<Duration>) {
        let most = most.and_then(|most| Timespec::try_from(most).ok());
        let bell = PollFd::new(&self.fd, PollFlags::IN);
        let _ = rustix::event::poll(&mut [bell], most.as_ref());
        self.answer();
    }
}
