//! Scratch memory: encoded records on their way to or from the device.
//!
//! Upstairs:   `save` and `load` take a buffer, and its drop gives the memory back.
//! Downstairs: `kvtier_store::mem`.
//!
//! The size of this arena bounds how much is in flight: who finds it empty waits, and is woken
//! when a buffer comes home.

use std::sync::Arc;
use std::time::Duration;

use kvtier_store::mem::{Arena, IoBuf, Share};
use tokio::sync::Notify;

/// See the module.
#[derive(Debug)]
pub struct Scratch {
    arena: Arc<Arena>,
    freed: Notify,
}

/// Buffers are dropped wherever they end; a waiter looks again at least this often.
const LOOK_AGAIN: Duration = Duration::from_millis(10);

impl Scratch {
    /// Reserves `bytes`.
    pub fn create(bytes: usize) -> std::io::Result<Self> {
        let arena = Arena::create("kvtier-scratch", bytes, Share::Private)?;
        Ok(Self {
            arena,
            freed: Notify::new(),
        })
    }

    /// The arena, to register with the ring.
    pub fn arena(&self) -> &Arc<Arena> {
        &self.arena
    }

    /// A buffer of `len` bytes; waits for one. `None` when so much can never be had.
    ///
    /// Cancel safety: nothing is taken until the future is ready.
    pub async fn take(&self, len: usize) -> Option<IoBuf> {
        if len > self.arena.capacity() {
            return None;
        }
        loop {
            let freed = self.freed.notified();
            if let Some(buf) = self.arena.alloc(len) {
                return Some(buf);
            }
            let _ = tokio::time::timeout(LOOK_AGAIN, freed).await;
        }
    }

    /// Says that a buffer has been dropped, so that waiters look at once.
    pub fn freed(&self) {
        self.freed.notify_waiters();
    }
}
