//! How much of scratch memory one device may hold.
//!
//! Upstairs:   `DiskTier` takes a share before a device has a record, or the memory for one.
//! Downstairs: nothing.
//!
//! A device that hangs keeps what it was given, without limit in time. So it is given only so
//! much that the others can go on with the rest: of several devices, each may hold half of its
//! equal part for records to be written, and half for those to be read. A single device may hold
//! all, since nobody else could use it.

use std::sync::Arc;

use tokio::sync::{OwnedSemaphorePermit, Semaphore};

/// What is counted. Unit: bytes.
const UNIT: usize = 4096;

/// See the module.
#[derive(Debug)]
pub(super) struct Budget {
    units: Arc<Semaphore>,
    most: u32,
}

/// A part of a device's budget, until it is dropped: to be kept as long as the device has the
/// memory.
#[derive(Debug)]
pub struct Held(#[expect(dead_code, reason = "its drop gives it back")] OwnedSemaphorePermit);

impl Budget {
    /// No limit.
    pub(super) fn unbounded() -> Self {
        Self::new(usize::MAX)
    }

    /// So many bytes; one record at a time at least.
    pub(super) fn new(bytes: usize) -> Self {
        let most = (bytes / UNIT).clamp(1, Semaphore::MAX_PERMITS);
        let most = u32::try_from(most).unwrap_or(u32::MAX);
        Self {
            units: Arc::new(Semaphore::new(most as usize)),
            most,
        }
    }

    fn units(&self, len: usize) -> u32 {
        u32::try_from(len.div_ceil(UNIT)).map_or(self.most, |units| units.min(self.most))
    }

    /// A part for `len` bytes, if it can be had now.
    pub(super) fn try_take(&self, len: usize) -> Option<Held> {
        let units = Arc::clone(&self.units).try_acquire_many_owned(self.units(len));
        units.ok().map(Held)
    }

    /// A part for `len` bytes.
    ///
    /// Cancel safety: nothing is taken until the future is ready.
    pub(super) async fn take(&self, len: usize) -> Option<Held> {
        let units = Arc::clone(&self.units).acquire_many_owned(self.units(len));
        units.await.ok().map(Held)
    }
}
