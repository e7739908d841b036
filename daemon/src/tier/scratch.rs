//! Scratch memory: encoded records on their way to or from the device.
//!
//! Upstairs:   `save` and `load` take a buffer, and its drop gives the memory back.
//! Downstairs: `kvtier_store::mem`.
//!
//! The size of this arena bounds how much is in flight, of all namespaces together. Whoever finds
//! it empty stands in line, one for saves and one for loads: the first of a line is served before
//! those behind it, however large its buffer, and neither kind of work waits for the other's line.
//!
//! Invariants kept here
//!   M4  Nobody waits for room in a namespace's arena while holding scratch memory: that may take
//!       as long as a client keeps its leases, and every namespace would wait with it.

use std::sync::Arc;

use kvtier_store::mem::{Arena, IoBuf, Pages, Share};
use tokio::sync::{Mutex, Notify};

/// What the memory is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Line {
    /// A record to be written.
    Save,
    /// A record to be read.
    Load,
}

/// See the module.
#[derive(Debug)]
pub struct Scratch {
    arena: Arc<Arena>,
    freed: Arc<Notify>,
    /// Held by the first of each line. These locks are handed on in the order of their waiters.
    saves: Mutex<()>,
    loads: Mutex<()>,
}

impl Scratch {
    /// Reserves `bytes`.
    pub fn create(bytes: usize, pages: Pages) -> std::io::Result<Self> {
        let arena = Arena::create_on("kvtier-scratch", bytes, Share::Private, pages)?;
        let freed = Arc::new(Notify::new());
        let heard = Arc::clone(&freed);
        arena.on_freed(move || heard.notify_waiters());
        Ok(Self {
            arena,
            freed,
            saves: Mutex::default(),
            loads: Mutex::default(),
        })
    }

    /// The arena, to register with the ring.
    pub fn arena(&self) -> &Arc<Arena> {
        &self.arena
    }

    /// A buffer of `len` bytes; waits for one. `None` when so much can never be had.
    ///
    /// Cancel safety: nothing is taken until the future is ready.
    pub async fn take(&self, len: usize, line: Line) -> Option<IoBuf> {
        if len > self.arena.capacity() {
            return None;
        }
        let line = match line {
            Line::Save => &self.saves,
            Line::Load => &self.loads,
        };
        let _first = line.lock().await;
        loop {
            let freed = self.freed.notified();
            if let Some(buf) = self.arena.alloc(len) {
                return Some(buf);
            }
            freed.await;
        }
    }
}

#[cfg(test)]
mod tests;
