//! Memory shared with a client: a sealed memfd that it fills and the daemon copies from, or whose
//! bytes both claim one by one.
//!
//! Upstairs:   `region` cuts slots from it, `claims` keeps maps there; a client maps the same
//!             pages.
//! Downstairs: `memfd_create`, `mmap`. Next door: `foreign`, memory that an engine hands over.
//!
//! The only room of this package that may be unsafe.
//!
//! Invariants kept here
//!   S1  The size never changes after creation: sealed, so that no client can shrink it under a
//!       copy (SIGBUS).
//!   S2  No reference to this memory is ever made: another process writes it at any time. Bytes
//!       are copied out once, and only the copy is looked at; single bytes are atomics.

pub mod foreign;

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicU8, Ordering};

use memmap2::{MmapOptions, MmapRaw};
use rustix::fs::{MemfdFlags, SealFlags};

/// Memory shared with one client, writable by both.
#[derive(Debug)]
pub struct SharedMemory {
    fd: OwnedFd,
    map: MmapRaw,
}

/// A copy that would leave the mapping.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("{len} bytes at {at} do not lie within {size} bytes of shared memory")]
pub struct OutOfBounds {
    at: usize,
    len: usize,
    size: usize,
}

impl SharedMemory {
    /// Creates and seals `len` bytes of zeros (S1).
    pub fn create(len: usize) -> std::io::Result<Self> {
        let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
        let fd = rustix::fs::memfd_create("kvtier-staging", flags)?;
        rustix::fs::ftruncate(&fd, len as u64)?;
        let seals = SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL;
        rustix::fs::fcntl_add_seals(&fd, seals)?;
        let map = MmapOptions::new().len(len).map_raw(&fd)?;
        Ok(Self { fd, map })
    }

    /// Size. Unit: bytes.
    pub fn len(&self) -> usize {
        self.map.len()
    }

    /// True for a mapping of nothing, which `create` never makes.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Descriptor to pass to the client.
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }

    /// Copies `into.len()` bytes from `at`. What a client writes meanwhile may or may not be in
    /// the copy; the copy itself no longer changes (S2).
    pub fn copy_out(&self, at: usize, into: &mut [u8]) -> Result<(), OutOfBounds> {
        let (len, size) = (into.len(), self.len());
        if at.checked_add(len).is_none_or(|end| end > size) {
            return Err(OutOfBounds { at, len, size });
        }
        let from = self.map.as_ptr().wrapping_add(at);
        // SAFETY: a plain copy from the mapping into private memory.
        //   Live    `self.map` is mapped while `self` is borrowed, and S1 keeps every page backed.
        //   Stable  a mapping never moves; the range was checked above.
        //   Alone   `into` is borrowed mutably and is not part of the mapping, to which no
        //           reference exists (S2). Another process may write `from` meanwhile: each byte
        //           copied is then an old or a new one, and no value is assumed of any.
        //   Drop    n/a
        unsafe { std::ptr::copy_nonoverlapping(from, into.as_mut_ptr(), len) };
        Ok(())
    }

    /// The byte at `at`, as both ends see it: zero outside.
    pub fn byte(&self, at: usize) -> u8 {
        self.atom(at).map_or(0, |byte| byte.load(Ordering::Acquire))
    }

    /// Writes one byte; nothing outside.
    pub fn set_byte(&self, at: usize, to: u8) {
        if let Some(byte) = self.atom(at) {
            byte.store(to, Ordering::Release);
        }
    }

    /// Writes one byte if it is `from`. True when it was.
    pub fn swap_byte(&self, at: usize, from: u8, to: u8) -> bool {
        self.atom(at).is_some_and(|byte| {
            byte.compare_exchange(from, to, Ordering::AcqRel, Ordering::Acquire)
                .is_ok()
        })
    }

    fn atom(&self, at: usize) -> Option<&AtomicU8> {
        if at >= self.len() {
            return None;
        }
        let byte = self.map.as_mut_ptr().wrapping_add(at);
        // SAFETY: one byte of the mapping, used as an atomic by both processes.
        //   Live    `self.map` is mapped while `self` is borrowed, and S1 keeps every page backed.
        //   Stable  a mapping never moves; `at` was checked above; a byte is always aligned.
        //   Alone   an atomic needs no exclusive access; no other reference to it exists (S2), and
        //           whatever value the other process writes is one of a `u8`.
        //   Drop    the borrow of `self` outlives the reference.
        Some(unsafe { AtomicU8::from_ptr(byte) })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn copy_out_sees_what_another_mapping_wrote() {
        let memory = SharedMemory::create(8192).unwrap();
        rustix::io::pwrite(memory.fd(), b"hello", 4094).unwrap();
        let mut copy = [0; 5];
        memory.copy_out(4094, &mut copy).unwrap();
        assert_eq!(&copy, b"hello");
    }

    #[test]
    fn copy_out_refuses_what_leaves_the_mapping() {
        let memory = SharedMemory::create(8192).unwrap();
        for (at, len) in [(8192, 1), (8000, 193), (usize::MAX, 2), (0, 8193)] {
            let mut copy = vec![0; len];
            assert_eq!(
                memory.copy_out(at, &mut copy),
                Err(OutOfBounds {
                    at,
                    len,
                    size: 8192
                })
            );
        }
    }

    #[test]
    fn swap_byte_lets_one_of_two_have_it_and_touches_nothing_outside() {
        let memory = SharedMemory::create(8192).unwrap();
        assert!(memory.swap_byte(4099, 0, 7));
        assert!(!memory.swap_byte(4099, 0, 8));
        assert_eq!(memory.byte(4099), 7);
        memory.set_byte(8191, 9);
        let mut seen = [0; 1];
        memory.copy_out(8191, &mut seen).unwrap();
        assert_eq!(seen, [9]);
        for outside in [8192, usize::MAX] {
            memory.set_byte(outside, 1);
            assert!(!memory.swap_byte(outside, 0, 1));
            assert_eq!(memory.byte(outside), 0);
        }
    }

    // Goal: a client cannot take pages away from under the daemon.
    #[test]
    fn create_seals_the_size() {
        let memory = SharedMemory::create(8192).unwrap();
        assert!(rustix::fs::ftruncate(memory.fd(), 4096).is_err());
        assert!(rustix::fs::ftruncate(memory.fd(), 16384).is_err());
        assert!(rustix::fs::fcntl_add_seals(memory.fd(), SealFlags::WRITE).is_err());
    }
}
