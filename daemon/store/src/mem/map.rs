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

use super::HUGE_PAGE;

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
    /// Maps `len` bytes of `fd`, shared, readable and writable.
    pub(super) fn shared(fd: BorrowedFd<'_>, len: usize) -> std::io::Result<Self> {
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
        let map = Self {
            reserved,
            reserved_len,
            base,
            len,
        };
        // SAFETY: replaces a part of the reservation made above, which nothing else refers to.
        //   Live    `map` owns the reservation; an error drops it.
        //   Stable  the address is fixed inside the reservation: skip + len <= reserved_len.
        //   Alone   nobody has been given the address yet.
        //   Drop    `Drop` unmaps the whole reservation.
        unsafe {
            rustix::mm::mmap(
                map.base.cast(),
                len,
                ProtFlags::READ | ProtFlags::WRITE,
                MapFlags::SHARED | MapFlags::FIXED,
                fd,
                0,
            )
        }?;
        // Both are wishes: an old kernel may refuse them and the mapping works all the same.
        // Blocks must not end up in a core dump: they can be turned back into a prompt.
        let _ = map.advise(0, len, Advice::LinuxHugepage);
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
