//! I/O memory: arenas of memfd memory and the buffers cut from them.
//!
//! Upstairs:   lanes register arenas; the daemon's host tier keeps blocks in them; clients map
//!             a shared arena read-only.
//! Downstairs: `memfd_create`, `mmap`, `madvise`.
//!
//! One of the rooms that may be unsafe: it makes mappings and hands out slices of them.
//!
//! The pages behind an arena decide how fast a device can fill it: a direct transfer of 2 MiB is
//! one segment on a huge page and up to 512 on small ones. So an arena takes the best kind it can
//! have: the hugetlb pool if the operator filled it, else transparent huge pages, which
//! [`Arena::populate`] collapses explicitly (that works whatever `shmem_enabled` says, from Linux
//! 6.1), else 4 KiB pages.
//!
//! Invariants kept here
//!   M1  Live buffers of an arena never overlap, and each is inside the mapping.
//!   M2  A shared arena is sealed before anybody gets its descriptor: its size is fixed and no
//!       other mapping can be writable, so what a reader sees only this process can change.
//!   M3  A buffer's place is reused only after the buffer is dropped, with a new generation.
//!
//! Not here on purpose
//!   No zeroing of a reused place: whoever publishes a buffer has filled it first.
//!   No alignment of buffers to huge pages: a 2 MiB run that straddles two of them costs one more
//!   segment, while rounding a record of 2 MiB and a header up would cost half the arena.

mod free;
mod map;
mod runs;

use std::fmt;
use std::ops::{Deref, DerefMut};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock};

use rustix::fs::{MemfdFlags, SealFlags};

pub use free::FreeRuns;
use map::Map;
use runs::Runs;

/// Every buffer starts at a multiple of this. Unit: bytes.
pub const BUF_ALIGN: usize = 4096;

/// Size and alignment of a huge page. Unit: bytes.
pub const HUGE_PAGE: usize = 2 << 20;

/// After this many pages that would not collapse, the rest stays small: memory is fragmented, and
/// each try makes the kernel search it again.
const COLLAPSE_FAILURES_MAX: u32 = 8;

/// Gives heap that was freed back to the kernel, which the allocator keeps for a while otherwise.
/// For after work that took much memory once. Takes milliseconds; does nothing but with glibc.
pub(crate) fn trim_heap() {
    #[cfg(target_env = "gnu")]
    // SAFETY: only memory that nobody has is given back; the call may be made on any thread.
    //   Live    n/a
    //   Stable  n/a
    //   Alone   the allocator takes its own locks.
    //   Drop    n/a
    unsafe {
        libc::malloc_trim(0);
    }
}

/// Who may see an arena.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Share {
    /// Only this process.
    Private,
    /// Peers that are handed the descriptor, and they can only read (M2).
    ReadOnly,
}

/// What an arena asks the kernel for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Pages {
    /// The best kind that can be had.
    Best,
    /// 4 KiB pages, wherever the kernel is not set to give others by itself.
    Small,
}

/// What an arena's memory is made of.
#[derive(Debug, Clone, Copy, PartialEq, Eq, strum::Display, strum::IntoStaticStr)]
#[strum(serialize_all = "snake_case")]
pub enum PageKind {
    /// 2 MiB pages from the pool that `vm.nr_hugepages` sizes.
    Hugetlb,
    /// Transparent huge pages, for nine tenths of the arena or more.
    Transparent,
    /// 4 KiB pages, or an arena that was not populated yet.
    Small,
}

/// A mapping that buffers are cut from.
pub struct Arena {
    fd: OwnedFd,
    map: Map,
    pages: Pages,
    hugetlb: bool,
    huge_bytes: AtomicUsize,
    runs: Runs,
    on_freed: OnceLock<Box<dyn Fn() + Send + Sync>>,
    number: u64,
}

static NEXT_ARENA: AtomicU64 = AtomicU64::new(1);

impl Arena {
    /// Maps `len` bytes, rounded up to [`BUF_ALIGN`], and from 2 MiB on to [`HUGE_PAGE`], on the
    /// best pages there are.
    /// The memory is reserved lazily: call [`Arena::populate`] before it has to be fast.
    pub fn create(name: &str, len: usize, share: Share) -> std::io::Result<Arc<Self>> {
        Self::create_on(name, len, share, Pages::Best)
    }

    /// As [`Arena::create`], on the pages that are asked for.
    pub fn create_on(
        name: &str,
        len: usize,
        share: Share,
        pages: Pages,
    ) -> std::io::Result<Arc<Self>> {
        let unit = if len >= HUGE_PAGE {
            HUGE_PAGE
        } else {
            BUF_ALIGN
        };
        let len = len
            .max(1)
            .checked_next_multiple_of(unit)
            .ok_or(rustix::io::Errno::NOMEM)?;
        if (unit, pages) == (HUGE_PAGE, Pages::Best)
            && let Ok(arena) = Self::on_memfd(name, len, share, pages, true)
        {
            return Ok(arena);
        }
        Self::on_memfd(name, len, share, pages, false)
    }

    fn on_memfd(
        name: &str,
        len: usize,
        share: Share,
        pages: Pages,
        hugetlb: bool,
    ) -> std::io::Result<Arc<Self>> {
        let mut flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
        if hugetlb {
            flags |= MemfdFlags::HUGETLB | MemfdFlags::HUGE_2MB;
        }
        let fd = rustix::fs::memfd_create(name, flags)?;
        rustix::fs::ftruncate(&fd, len as u64)?;
        // The seal below lets only mappings that already exist be writable: map first.
        let map = if hugetlb {
            Map::hugetlb(fd.as_fd(), len)?
        } else {
            Map::shared(fd.as_fd(), len, pages)?
        };
        if share == Share::ReadOnly {
            rustix::fs::fchmod(&fd, rustix::fs::Mode::from_raw_mode(0o600))?;
            rustix::fs::fcntl_add_seals(
                &fd,
                SealFlags::SHRINK | SealFlags::GROW | SealFlags::FUTURE_WRITE | SealFlags::SEAL,
            )?;
        }
        Ok(Arc::new(Self {
            fd,
            map,
            pages,
            hugetlb,
            huge_bytes: AtomicUsize::new(if hugetlb { len } else { 0 }),
            runs: Runs::new(len),
            on_freed: OnceLock::new(),
            number: NEXT_ARENA.fetch_add(1, Ordering::Relaxed),
        }))
    }

    /// Gives every page its memory, as huge pages where that is possible, so that no transfer
    /// pays for a first touch. Content is not changed. `progress` hears (done, total) in bytes.
    ///
    /// Errors: the memory is not there. Pages that already have theirs keep it.
    pub fn populate(&self, progress: &mut dyn FnMut(usize, usize)) -> std::io::Result<PageKind> {
        let total = self.capacity();
        let (mut huge, mut failures) = (0, 0);
        let mut at = 0;
        while at < total {
            let step = HUGE_PAGE.min(total - at);
            if self.hugetlb || self.pages == Pages::Small || step < HUGE_PAGE {
                self.map.populate(at, step)?;
            } else {
                // The first page makes the run exist; collapsing it then fills in the rest.
                self.map.populate(at, BUF_ALIGN)?;
                let collapsed = failures < COLLAPSE_FAILURES_MAX && self.map.collapse(at, step);
                failures += u32::from(!collapsed);
                huge += if collapsed { step } else { 0 };
                self.map.populate(at, step)?;
            }
            at += step;
            progress(at, total);
        }
        if !self.hugetlb {
            self.huge_bytes.store(huge, Ordering::Relaxed);
        }
        Ok(self.page_kind())
    }

    /// What the memory is made of, as far as [`Arena::populate`] has settled it.
    pub fn page_kind(&self) -> PageKind {
        if self.hugetlb {
            PageKind::Hugetlb
        } else if self.huge_bytes() >= self.capacity() / 10 * 9 {
            PageKind::Transparent
        } else {
            PageKind::Small
        }
    }

    /// Bytes of the arena that lie on huge pages.
    pub fn huge_bytes(&self) -> usize {
        self.huge_bytes.load(Ordering::Relaxed)
    }

    /// Cuts a buffer of `len` bytes (rounded up to [`BUF_ALIGN`]) from the smallest run that
    /// holds it, or `None` when no run does.
    pub fn alloc(self: &Arc<Self>, len: usize) -> Option<IoBuf> {
        let room = len.max(1).checked_next_multiple_of(BUF_ALIGN)?;
        let (at, generation) = self.runs.take(room)?;
        Some(IoBuf {
            arena: Arc::clone(self),
            at,
            len,
            room,
            generation,
        })
    }

    /// As [`Arena::alloc`]; where there is no room, from an arena of its own, with room for one
    /// more like it.
    ///
    /// Errors: the memory is not there.
    pub(crate) fn alloc_or_own(self: &Arc<Self>, len: usize) -> std::io::Result<IoBuf> {
        if let Some(buf) = self.alloc(len) {
            return Ok(buf);
        }
        let own = Self::create("kvtier-store-large", len.saturating_mul(2), Share::Private)?;
        let none = || std::io::Error::other("no memory for a store buffer");
        own.alloc(len).ok_or_else(none)
    }

    /// Has `call` called whenever a buffer came home, from wherever it was dropped: it must not
    /// block. Only the first call of an arena counts.
    pub fn on_freed(&self, call: impl Fn() + Send + Sync + 'static) {
        // A second one is a mistake of the caller's that costs it nothing but its wake-ups.
        let _ = self.on_freed.set(Box::new(call));
    }

    /// Size of the mapping. Unit: bytes.
    pub fn capacity(&self) -> usize {
        self.map.len()
    }

    /// Bytes that no buffer holds. They may lie in several runs.
    pub fn free_bytes(&self) -> usize {
        self.runs.free().bytes()
    }

    /// Largest buffer that could be cut now. Unit: bytes.
    pub fn largest_free(&self) -> usize {
        self.runs.free().largest()
    }

    /// Process-wide number of this arena; never reused.
    pub fn number(&self) -> u64 {
        self.number
    }

    /// Descriptor to pass to a peer. That of a [`Share::Private`] arena is writable: it must not
    /// leave the process.
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }

    /// Start of the mapping, for registering it with a ring.
    pub fn base(&self) -> *mut u8 {
        self.map.base()
    }
}

impl fmt::Debug for Arena {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "Arena({}, {} of {} free)",
            self.number,
            self.free_bytes(),
            self.capacity()
        )
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
        let start = self.arena.map.base().wrapping_add(self.at);
        // SAFETY: a shared view of this buffer's own run.
        //   Live    `self.arena` keeps the mapping for as long as the slice is borrowed.
        //   Stable  a mapping never moves.
        //   Alone   runs do not overlap (M1), peers cannot write (M2), and a kernel write only
        //           happens while a lane owns the buffer.
        //   Drop    n/a
        unsafe { std::slice::from_raw_parts(start, self.len) }
    }
}

impl DerefMut for IoBuf {
    fn deref_mut(&mut self) -> &mut [u8] {
        let start = self.arena.map.base().wrapping_add(self.at);
        // SAFETY: as in `deref`, and `&mut self` proves that no other view of the run exists.
        //   Live    `self.arena` keeps the mapping for as long as the slice is borrowed.
        //   Stable  a mapping never moves.
        //   Alone   runs do not overlap (M1) and this one is borrowed mutably.
        //   Drop    n/a
        unsafe { std::slice::from_raw_parts_mut(start, self.len) }
    }
}

impl Drop for IoBuf {
    fn drop(&mut self) {
        self.arena.runs.give_back(self.at, self.room);
        if let Some(call) = self.arena.on_freed.get() {
            call();
        }
    }
}

impl fmt::Debug for IoBuf {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "IoBuf({}+{} of arena {})",
            self.at, self.len, self.arena.number
        )
    }
}

#[cfg(test)]
mod tests;
