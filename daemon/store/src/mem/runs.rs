//! The runs of an arena as they go from hand to hand.
//!
//! Upstairs:   `mem::Arena`, from any thread.
//! Downstairs: `mem::free`, under a lock that is held for its arithmetic only.
//!
//! Invariants kept here
//!   M1  A run that was taken is nobody else's until it is given back.
//!   M3  No two uses of a place have one generation. Whoever takes a run sees everything that its
//!       holder before did to its bytes: the lock hands that over.
//!
//! `models/tests/runs.rs` runs this file under every order of events that the memory model allows.

use std::sync::PoisonError;

use super::free::FreeRuns;
use crate::sync::{AtomicU64, Mutex, MutexGuard, Ordering};

/// See the module.
#[derive(Debug)]
pub(super) struct Runs {
    free: Mutex<FreeRuns>,
    generation: AtomicU64,
}

impl Runs {
    /// One free run of `len` bytes.
    pub(super) fn new(len: usize) -> Self {
        Self {
            free: Mutex::new(FreeRuns::new(len)),
            generation: AtomicU64::new(1),
        }
    }

    /// Takes a run of `room` bytes: where it begins, and the number of this use.
    pub(super) fn take(&self, room: usize) -> Option<(usize, u64)> {
        let at = self.free().take(room)?;
        // Only told apart, never compared: any order will do.
        Some((at, self.generation.fetch_add(1, Ordering::Relaxed)))
    }

    /// Gives back what `take(room)` returned.
    pub(super) fn give_back(&self, at: usize, room: usize) {
        self.free().give_back(at, room);
    }

    /// The free runs as they are.
    pub(super) fn free(&self) -> MutexGuard<'_, FreeRuns> {
        self.free.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
