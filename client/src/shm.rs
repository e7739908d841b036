//! Shared memory: the only room of the SDK with unsafe code.
//!
//! Upstairs:   `slot` fills spans of the staging region, `restore` reads leased views of the arena,
//!             `two_ended` claims blocks in single bytes.
//! Downstairs: `memmap2`, on descriptors that `descriptor` has checked.
//!
//! Every mapping is of a sealed memfd of exactly the mapped size, so no access can fault. What
//! makes an access sound is held as a value: a view owns its lease, a span owns its claim.
//!
//! Invariants kept here
//!   M1  No view or span reaches outside its mapping.
//!   M2  Two spans of one region never overlap, whatever the daemon grants.
//!   M3  A view's bytes are handed out only while its session lives.
//!
//! Not here on purpose
//!   No view of the arena without a lease, and no view of a staging span for anyone but its
//!   owner: the other end may write the rest at any time.

use std::collections::BTreeMap;
use std::ops::Range;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use memmap2::{MmapOptions, MmapRaw};

use crate::release::LeaseGuard;

/// The daemon's arena, mapped read-only.
pub(crate) struct Arena {
    map: MmapRaw,
}

impl Arena {
    /// Maps `len` bytes of a descriptor whose size and seals were checked.
    pub(crate) fn map(fd: &OwnedFd, len: usize) -> std::io::Result<Self> {
        let map = MmapOptions::new().len(len).map_raw_read_only(fd)?;
        Ok(Self { map })
    }

    pub(crate) fn len(&self) -> usize {
        self.map.len()
    }
}

/// One leased place in the arena.
pub(crate) struct LeasedView {
    arena: Arc<Arena>,
    range: Range<usize>,
    lease: LeaseGuard,
}

impl LeasedView {
    /// `None` when the range is not inside the arena (M1); the lease is given back then.
    pub(crate) fn new(arena: Arc<Arena>, range: Range<usize>, lease: LeaseGuard) -> Option<Self> {
        let inside = range.start <= range.end && range.end <= arena.len();
        inside.then_some(Self {
            arena,
            range,
            lease,
        })
    }

    /// The leased bytes; `None` when the session that leased them is lost (M3).
    pub(crate) fn bytes(&self) -> Option<&[u8]> {
        if self.lease.is_lost() {
            return None;
        }
        // SAFETY: the pointer stays inside the mapping.
        //   Live    `self.arena` keeps the mapping; its memfd is sealed at this size.
        //   Stable  a mapping does not move; M1 was checked when the view was made.
        //   Alone   n/a: nothing is read through it here.
        //   Drop    the borrow of `self` ends before the view, hence before the mapping.
        let start = unsafe { self.arena.map.as_ptr().add(self.range.start) };
        // SAFETY: the bytes can be read and do not change under the slice.
        //   Live    as above.
        //   Stable  the daemon does not write a leased slot until the lease is released, and
        //           `self.lease` releases on drop only. When the daemon drops the session first,
        //           the check above fails; a copy made across that moment is detected by
        //           `Session::release`, which confirms that the leases were alive.
        //   Alone   read-only mapping; other readers are welcome.
        //   Drop    as above.
        Some(unsafe { std::slice::from_raw_parts(start, self.range.len()) })
    }

    pub(crate) fn into_lease(self) -> LeaseGuard {
        self.lease
    }
}

/// A staging region, mapped for writing, and which ranges of it are being filled.
pub(crate) struct Staging {
    map: MmapRaw,
    /// End of each claimed range by its start.
    claims: Mutex<BTreeMap<usize, usize>>,
}

impl Staging {
    /// Maps `len` bytes of a descriptor whose size and seals were checked.
    pub(crate) fn map(fd: &OwnedFd, len: usize) -> std::io::Result<Arc<Self>> {
        let map = MmapOptions::new().len(len).map_raw(fd)?;
        let claims = Mutex::new(BTreeMap::new());
        Ok(Arc::new(Self { map, claims }))
    }

    pub(crate) fn len(&self) -> usize {
        self.map.len()
    }

    /// Takes a range for one writer. `None` when it is empty, outside the region or overlaps a
    /// range that another writer still has (M1, M2).
    pub(crate) fn claim(self: &Arc<Self>, range: Range<usize>) -> Option<Span> {
        if range.start >= range.end || range.end > self.map.len() {
            return None;
        }
        let mut claims = self.claims.lock().unwrap_or_else(PoisonError::into_inner);
        let before = claims.range(..range.end).next_back();
        if before.is_some_and(|(_, end)| *end > range.start) {
            return None;
        }
        claims.insert(range.start, range.end);
        let staging = Arc::clone(self);
        Some(Span { staging, range })
    }
}

/// A range of a staging region that nobody else on this side touches.
pub(crate) struct Span {
    staging: Arc<Staging>,
    range: Range<usize>,
}

impl Span {
    /// The bytes, for reading what was filled in.
    pub(crate) fn bytes(&self) -> &[u8] {
        let start = self.start();
        // SAFETY: the bytes can be read and do not change under the slice.
        //   Live    `self.staging` keeps the mapping; its memfd is sealed at this size.
        //   Stable  the daemon never writes a staging region; a mapping does not move.
        //   Alone   the claim is this span's (M2); writing needs `&mut self`.
        //   Drop    the borrow of `self` ends before the claim and the mapping.
        unsafe { std::slice::from_raw_parts(start, self.range.len()) }
    }

    /// The bytes, for filling in.
    pub(crate) fn bytes_mut(&mut self) -> &mut [u8] {
        let start = self.start();
        // SAFETY: the bytes can be written and nobody else uses them.
        //   Live    `self.staging` keeps the mapping; its memfd is sealed at this size.
        //   Stable  a mapping does not move.
        //   Alone   the claim is this span's (M2) and `&mut self` its only user; the daemon
        //           reads a slot only after it was committed, which consumes the span.
        //   Drop    the borrow of `self` ends before the claim and the mapping.
        unsafe { std::slice::from_raw_parts_mut(start, self.range.len()) }
    }

    fn start(&self) -> *mut u8 {
        // SAFETY: the pointer stays inside the mapping.
        //   Live    `self.staging` keeps the mapping.
        //   Stable  M1 was checked when the span was claimed.
        //   Alone   n/a: nothing is accessed through it here.
        //   Drop    n/a: the caller bounds its use by a borrow of `self`.
        unsafe { self.staging.map.as_mut_ptr().add(self.range.start) }
    }
}

impl Drop for Span {
    fn drop(&mut self) {
        let mut claims = self.staging.claims.lock();
        let claims = claims.as_deref_mut().ok();
        if let Some(claims) = claims {
            claims.remove(&self.range.start);
        }
    }
}

/// A region for claims: single bytes that both ends read and write.
pub(crate) struct Bytes {
    map: MmapRaw,
}

impl Bytes {
    /// Maps `len` bytes of a descriptor whose size and seals were checked.
    pub(crate) fn map(fd: &OwnedFd, len: usize) -> std::io::Result<Self> {
        let map = MmapOptions::new().len(len).map_raw(fd)?;
        Ok(Self { map })
    }

    pub(crate) fn len(&self) -> usize {
        self.map.len()
    }

    /// The byte at `at`; zero outside.
    pub(crate) fn get(&self, at: usize) -> u8 {
        self.atom(at).map_or(0, |byte| byte.load(Ordering::Acquire))
    }

    /// Writes one byte; nothing outside.
    pub(crate) fn set(&self, at: usize, to: u8) {
        if let Some(byte) = self.atom(at) {
            byte.store(to, Ordering::Release);
        }
    }

    /// Writes one byte if it is `from`. True when it was.
    pub(crate) fn swap(&self, at: usize, from: u8, to: u8) -> bool {
        self.atom(at).is_some_and(|byte| {
            byte.compare_exchange(from, to, Ordering::AcqRel, Ordering::Acquire)
                .is_ok()
        })
    }

    fn atom(&self, at: usize) -> Option<&AtomicU8> {
        if at >= self.len() {
            return None;
        }
        // SAFETY: the pointer stays inside the mapping.
        //   Live    `self.map` is mapped while `self` is borrowed.
        //   Stable  a mapping does not move; `at` was checked above.
        //   Alone   n/a: nothing is accessed through it here.
        //   Drop    n/a
        let byte = unsafe { self.map.as_mut_ptr().add(at) };
        // SAFETY: one byte of the mapping, used as an atomic by both processes.
        //   Live    as above; the memfd is sealed at this size.
        //   Stable  as above; a byte is always aligned.
        //   Alone   no reference to this memory but such atomics is ever made, and every value
        //           that the other process writes is one of a `u8`.
        //   Drop    the borrow of `self` outlives the reference.
        Some(unsafe { AtomicU8::from_ptr(byte) })
    }
}

#[cfg(test)]
mod tests;
