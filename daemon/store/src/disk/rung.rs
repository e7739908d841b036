//! The flag in front of a wake-up: however often it is rung, it makes one noise an answer.
//!
//! Upstairs:   the wakers of the lanes, used by any thread, and the lane that they wake.
//! Downstairs: whatever makes the noise: an eventfd, a channel. It comes in as a closure.
//!
//! Invariants kept here
//!   B1  What a thread did before it rang is seen by the lane after an answer: that ring's or, when
//!       it made no noise, the one that it was still part of. No ring is lost.
//!
//! `models/tests/rings.rs` runs this file under every order of events that the memory model allows.

use crate::sync::{AtomicBool, Ordering};

/// Whether somebody rang since the last answer.
#[derive(Debug)]
pub(crate) struct Rung(AtomicBool);

impl Rung {
    /// Silent.
    pub(crate) fn new() -> Self {
        Self(AtomicBool::new(false))
    }

    /// Makes the noise, unless one was made that nobody has answered.
    pub(crate) fn ring(&self, noise: impl FnOnce()) {
        if !self.0.swap(true, Ordering::AcqRel) {
            noise();
        }
    }

    /// Takes the noise away, and then has the next ring make one. In this order: a ring between the
    /// two is part of this answer. It made no noise, so the flag must be read as it is cleared: a
    /// plain store would not see what that ring's thread had done.
    pub(crate) fn answer(&self, silence: impl FnOnce()) {
        silence();
        self.0.swap(false, Ordering::AcqRel);
    }
}
