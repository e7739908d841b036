//! I/O memory: arenas of memfd memory and the buffers cut from them.
//!
//! Upstairs:   lanes register arenas; the daemon's host tier keeps blocks in them; clients map
//!             a shared arena read-only.
//! Downstairs: `memfd_create`, `mmap`.
//!
//! One of the rooms that may be unsafe: it hands out slices of a mapping.
//!
//! Invariants kept here
//!   M1  Live buffers of an arena never overlap, and each is inside the mapping.
//!   M2  A shared arena is sealed before anybody gets its descriptor: its size is fixed and no
//!       other mapping can be writable, so what a reader sees only this process can change.
//!   M3  A buffer's place is reused only after the buffer is dropped, with a new generation.

use std::collections::BTreeMap;
use std::fmt;
use std::ops::{Deref, DerefMut};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use memmap2::{MmapOptions, MmapRaw};
use rustix::fs::{MemfdFlags, SealFlags};

/// Every buffer starts at a multiple of this. Unit: bytes.
pub const BUF_ALIGN: usize = 4096;

/// Who may see an arena.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Share {
    /// Only this process.
    Private,
    /// Peers that are handed the descriptor, and they can only read (M2).
    ReadOnly,
}

/// A mapping that buffers are cut from.
pub struct Arena {
    fd: OwnedFd,
    map: MmapRaw,
    free: Mutex<Free>,
    generation: AtomicU64,
    number: u32,
}

/// Free runs by offset; neighbours are always merged.
struct Free {
    runs: BTreeMap<usize, usize>,
    bytes: usize,
}

static NEXT_ARENA: AtomicU64 = AtomicU64::new(1);

impl Arena {
    /// Maps `len` bytes (rounded up to [`BUF_ALIGN`]).
    pub fn create(name: &str, len: usize, share: Share) -> std::io::Result<Arc<Self>> {
        let len = len.next_multiple_of(BUF_ALIGN);
        let fd = rustix::fs::memfd_create(name, MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)?;
        rustix::fs::ftruncate(&fd, len as u64)?;
        let map = MmapOptions::new().len(len).map_raw(&fd)?;
        if share == Share::ReadOnly {
            rustix::fs::fchmod(&fd, rustix::fs::Mode::from_raw_mode(0o600))?;
            rustix::fs::fcntl_add_seals(
                &fd,
                SealFlags::SHRINK | SealFlags::GROW | SealFlags::FUTURE_WRITE | SealFlags::SEAL,
            )?;
        }
        let number = u32::try_from(NEXT_ARENA.fetch_add(1, Ordering::Relaxed)).unwrap_or(u32::MAX);
        let free = Free { runs: BTreeMap::from([(0, len)]), bytes: len };
        let (free, generation) = (Mutex::new(free), AtomicU64::new(1));
        Ok(Arc::new(Self { fd, map, free, generation, number }))
    }

    /// Cuts a buffer of `len` bytes (rounded up to [`BUF_ALIGN`]), or `None` when no run fits.
    pub fn alloc(self: &Arc<Self>, len: usize) -> Option<IoBuf> {
        let room = len.max(1).next_multiple_of(BUF_ALIGN);
        let mut free = self.lock();
        let (at, run) = free.runs.iter().map(|(a, b)| (*a, *b)).find(|(_, run)| *run >= room)?;
        free.runs.remove(&at);
        if run > room {
            free.runs.insert(at + room, run - room);
        }
        free.bytes -= room;
        let generation = self.generation.fetch_add(1, Ordering::Relaxed);
        Some(IoBuf { arena: Arc::clone(self), at, len, room, generation })
    }

    /// Size of the mapping. Unit: bytes.
    pub fn capacity(&self) -> usize {
        self.map.len()
    }

    /// Bytes that no buffer holds. They may lie in several runs.
    pub fn free_bytes(&self) -> usize {
        self.lock().bytes
    }

    /// Process-wide number of this arena; never reused.
    pub fn number(&self) -> u32 {
        self.number
    }

    /// Descriptor to pass to a peer.
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }

    /// Start of the mapping, for registering it with a ring.
    pub fn base(&self) -> *mut u8 {
        self.map.as_mut_ptr()
    }

    fn give_back(&self, at: usize, room: usize) {
        let mut free = self.lock();
        let (mut start, mut len) = (at, room);
        if let Some((&before, &run)) = free.runs.range(..at).next_back()
            && before + run == at
        {
            free.runs.remove(&before);
            (start, len) = (before, run + len);
        }
        if let Some(run) = free.runs.remove(&(at + room)) {
            len += run;
        }
        free.runs.insert(start, len);
        free.bytes += room;
    }

    fn lock(&self) -> MutexGuard<'_, Free> {
        self.free.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl fmt::Debug for Arena {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Arena({}, {} of {} free)", self.number, self.free_bytes(), self.capacity())
    }
}

/// A run of an arena that exactly one owner holds. Dropping it frees the run.
pub struct IoBuf {
    arena: Arc<Arena>,
    at: usize,
    len: usize,
    room: usize,
    generation: u64,
}

impl IoBuf {
    /// The arena it was cut from.
    pub fn arena(&self) -> &Arc<Arena> {
        &self.arena
    }

    /// Offset in the arena. Unit: bytes, a multiple of [`BUF_ALIGN`].
    pub fn offset(&self) -> usize {
        self.at
    }

    /// Number of this use of the place; no two buffers of an arena share one (M3).
    pub fn generation(&self) -> u64 {
        self.generation
    }
}

impl Deref for IoBuf {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        // SAFETY: a shared view of this buffer's own run.
        //   Live    `self.arena` keeps the mapping for as long as the slice is borrowed.
        //   Stable  a mapping never moves.
        //   Alone   runs do not overlap (M1), peers cannot write (M2), and a kernel write only
        //           happens while a lane owns the buffer.
        //   Drop    n/a
        unsafe { std::slice::from_raw_parts(self.arena.map.as_ptr().wrapping_add(self.at), self.len) }
    }
}

impl DerefMut for IoBuf {
    fn deref_mut(&mut self) -> &mut [u8] {
        // SAFETY: as in `deref`, and `&mut self` proves that no other view of the run exists.
        //   Live    `self.arena` keeps the mapping for as long as the slice is borrowed.
        //   Stable  a mapping never moves.
        //   Alone   runs do not overlap (M1) and this one is borrowed mutably.
        //   Drop    n/a
        unsafe {
            std::slice::from_raw_parts_mut(self.arena.map.as_mut_ptr().wrapping_add(self.at), self.len)
        }
    }
}

impl Drop for IoBuf {
    fn drop(&mut self) {
        self.arena.give_back(self.at, self.room);
    }
}

impl fmt::Debug for IoBuf {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "IoBuf({}+{} of arena {})", self.at, self.len, self.arena.number)
    }
}
