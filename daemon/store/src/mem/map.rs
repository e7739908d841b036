//! One shared mapping of a descriptor, aligned so that huge pages can back it.
//!
//! Upstairs:   `mem::Arena`.
//! Downstairs: `mmap`, `madvise`, `munmap`.
//!
//! Part of the room `mem` that may be unsafe.
//!
//! Invariants kept here
//!   M1  `base .. base + len` is mapped, readable and writable from construction to drop, and
//!       never moves.
//!
//! Not here on purpose: no `memmap2`, which cannot choose the address; without a 2 MiB boundary
//! there the kernel cannot use huge pages.

use std::ffi::c_void;
use std::os::fd::BorrowedFd;

use rustix::mm::{Advice, MapFlags, ProtFlags};

use super::{HUGE_PAGE, Pages};

/// A mapping inside a reservation that is a huge page longer.
pub(super) struct Map {
    reserved: *mut c_void,
    reserved_len: usize,
    base: *mut u8,
    len: usize,
}

// SAFETY: the mapping belongs to the process, not to a thread; `Map` only hands out its address.
unsafe impl Send for Map {}
// SAFETY: as above; no method of `Map` reads or writes the memory behind the address.
unsafe impl Sync for Map {}

impl Map {
    /// Maps `len` bytes of `fd`, a memfd of huge pages: the kernel aligns those by itself. No fixed
    /// address, because without a filled pool this fails every time, and a fixed mapping that
    /// fails is a hazard (see `release_around`).
    pub(super) fn hugetlb(fd: BorrowedFd<'_>, len: usize) -> std::io::Result<Self> {
        let prot = ProtFlags::READ | ProtFlags::WRITE;
        // SAFETY: a new mapping at an address of the kernel's choice touches no other memory.
        let base =
            unsafe { rustix::mm::mmap(std::ptr::null_mut(), len, prot, MapFlags::SHARED, fd, 0) }?;
        let map = Self {
            reserved: base,
            reserved_len: len,
            base: base.cast(),
            len,
        };
        let _ = map.advise(0, len, Advice::LinuxDontDump);
        Ok(map)
    }

    /// Maps `len` bytes of `fd`, shared, readable and writable.
    pub(super) fn shared(fd: BorrowedFd<'_>, len: usize, pages: Pages) -> std::io::Result<Self> {
        let reserved_len = len.checked_add(HUGE_PAGE).ok_or(rustix::io::Errno::NOMEM)?;
        let flags = MapFlags::PRIVATE | MapFlags::NORESERVE;
        // SAFETY: a new mapping at an address of the kernel's choice touches no other memory.
        let reserved = unsafe {
            rustix::mm::mmap_anonymous(
                std::ptr::null_mut(),
                reserved_len,
                ProtFlags::empty(),
                flags,
            )
        }?;
        let skip = reserved.addr().next_multiple_of(HUGE_PAGE) - reserved.addr();
        let base = reserved.wrapping_byte_add(skip).cast::<u8>();
        // SAFETY: replaces a part of the reservation made above, which nothing else refers to.
        //   Live    the reservation is this function's until `Map` takes it.
        //   Stable  the address is fixed inside the reservation: skip + len <= reserved_len.
        //   Alone   nobody has been given the address yet.
        //   Drop    `Map::drop` unmaps the whole reservation; a failure is answered below.
        let mapped = unsafe {
            rustix::mm::mmap(
                base.cast(),
                len,
                ProtFlags::READ | ProtFlags::WRITE,
                MapFlags::SHARED | MapFlags::FIXED,
                fd,
                0,
            )
        };
        if let Err(problem) = mapped {
            release_around(reserved, reserved_len, skip, len);
            return Err(problem.into());
        }
        let map = Self {
            reserved,
            reserved_len,
            base,
            len,
        };
        // Both are wishes: an old kernel may refuse them and the mapping works all the same.
        // Blocks must not end up in a core dump: they can be turned back into a prompt.
        if pages == Pages::Best {
            let _ = map.advise(0, len, Advice::LinuxHugepage);
        }
        let _ = map.advise(0, len, Advice::LinuxDontDump);
        Ok(map)
    }

    pub(super) fn base(&self) -> *mut u8 {
        self.base
    }

    pub(super) fn len(&self) -> usize {
        self.len
    }

    /// Gives `at .. at + len` its memory without changing content.
    pub(super) fn populate(&self, at: usize, len: usize) -> std::io::Result<()> {
        match self.advise(at, len, Advice::LinuxPopulateWrite) {
            // Before Linux 5.14: memory comes with the first touch instead.
            Err(rustix::io::Errno::INVAL) => Ok(()),
            done => Ok(done?),
        }
    }

    /// Makes one huge page of `at .. at + len`. False when the kernel cannot.
    pub(super) fn collapse(&self, at: usize, len: usize) -> bool {
        assert!(
            at.checked_add(len).is_some_and(|end| end <= self.len),
            "outside the mapping"
        );
        let start = self.base.wrapping_add(at).cast::<c_void>();
        // SAFETY: MADV_COLLAPSE moves pages and changes no content; the assertion above keeps the
        // range inside the mapping that `self` owns.
        let done = unsafe { libc::madvise(start, len, libc::MADV_COLLAPSE) };
        done == 0
    }

    fn advise(&self, at: usize, len: usize, advice: Advice) -> rustix::io::Result<()> {
        assert!(
            at.checked_add(len).is_some_and(|end| end <= self.len),
            "outside the mapping"
        );
        let start = self.base.wrapping_add(at).cast::<c_void>();
        // SAFETY: only advice that keeps content is passed here (huge page, no dump, populate);
        // the assertion above keeps the range inside the mapping that `self` owns.
        unsafe { rustix::mm::madvise(start, len, advice) }
    }
}

/// Unmaps a reservation except `skip .. skip + len`, where a fixed mapping failed.
///
/// A failed fixed mapping may have removed what lay there and left a hole, and another thread may
/// have mapped something of its own into it since: unmapping it would pull memory from under that
/// thread. Address space that stays reserved costs nothing.
fn release_around(reserved: *mut c_void, reserved_len: usize, skip: usize, len: usize) {
    let end = skip + len;
    for (from, to) in [(0, skip), (end, reserved_len)] {
        if from < to {
            let start = reserved.wrapping_byte_add(from);
            // SAFETY: unmaps a part of the reservation that the fixed mapping never touched.
            //   Live    the caller owns the reservation and has given out no address in it.
            //   Stable  n/a
            //   Alone   n/a
            //   Drop    a failure leaves address space behind, never dangling memory.
            let _ = unsafe { rustix::mm::munmap(start, to - from) };
        }
    }
}

impl Drop for Map {
    fn drop(&mut self) {
        // SAFETY: unmaps exactly what `shared` reserved.
        //   Live    every buffer holds the arena that owns this mapping, so none is left.
        //   Stable  n/a
        //   Alone   n/a
        //   Drop    a failure leaves address space behind, never dangling memory.
        let _ = unsafe { rustix::mm::munmap(self.reserved, self.reserved_len) };
    }
}
