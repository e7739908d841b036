//! An engine's own memory: a file that it hands over, and may do anything to.
//!
//! Upstairs:   `region::engine`.
//! Downstairs: `mmap` where nobody can shrink the file, `pread` and `pwrite` elsewhere.
//!
//! A mapping of a file that its owner truncates ends the process that touches it (SIGBUS). So only
//! a memfd that is sealed against shrinking is mapped; any other file is copied from and to by the
//! kernel, which answers instead. See docs/decisions/0016-engine-regions.md.
//!
//! Invariants kept here
//!   S1  What is mapped cannot shrink: sealed, and of small pages, so that no page of it can be
//!       missing. Anything else is touched by system calls only.
//!   S2  No reference to this memory is ever made: the engine writes it at any time. Bytes are
//!       copied out once, and only the copy is looked at.

use std::os::fd::{AsFd, OwnedFd};

use kvtier_proto::region::Handover;
use memmap2::{MmapOptions, MmapRaw};
use rustix::fs::{FileType, OFlags, SealFlags};
use rustix::io::Errno;

/// What `statfs` says of a memfd of small pages and of files on tmpfs.
const TMPFS_MAGIC: i64 = 0x0102_1994;

/// Memory of an engine.
#[derive(Debug)]
pub struct Foreign {
    fd: OwnedFd,
    /// Bytes that are the region's: the first ones of the file.
    len: u64,
    /// Bytes of the file when it was taken.
    size: u64,
    /// Where the file cannot shrink.
    map: Option<MmapRaw>,
}

/// Why bytes were not copied. The memory may hold some of them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Lost {
    /// The bytes are not the region's.
    #[error("{len} bytes at {at} do not lie within the region's {size}")]
    Outside {
        /// First byte.
        at: u64,
        /// How many.
        len: usize,
        /// Bytes of the region.
        size: u64,
    },
    /// The file has another size than it had when it was registered.
    #[error("the file has {now} bytes; accepted: the {size} that it was registered with")]
    Resized {
        /// Bytes of the file now.
        now: u64,
        /// Bytes it had.
        size: u64,
    },
    /// The kernel did not copy.
    #[error("the kernel did not copy: {0}")]
    Refused(Errno),
}

impl Foreign {
    /// Takes a file over whose first `len` bytes are the region.
    ///
    /// # Errors
    /// Why it is not taken, as the engine is told.
    pub fn adopt(fd: OwnedFd, len: u64) -> Result<Self, Handover> {
        let unmapped = |_| Handover::Unmapped;
        let stat = rustix::fs::fstat(&fd).map_err(unmapped)?;
        let system = rustix::fs::fstatfs(&fd).map_err(unmapped)?;
        let plain = FileType::from_raw_mode(stat.st_mode) == FileType::RegularFile;
        if !plain || system.f_type != TMPFS_MAGIC {
            return Err(Handover::NotMemory);
        }
        let flags = rustix::fs::fcntl_getfl(&fd).map_err(unmapped)?;
        let misplaced = flags.intersects(OFlags::APPEND | OFlags::DIRECT | OFlags::PATH);
        if misplaced || flags & OFlags::RWMODE != OFlags::RDWR {
            return Err(Handover::NotWritable);
        }
        let seals = rustix::fs::fcntl_get_seals(&fd).map_err(unmapped)?;
        if seals.intersects(SealFlags::WRITE | SealFlags::FUTURE_WRITE) {
            return Err(Handover::Sealed);
        }
        // Its size is asked after its seals: from when it cannot shrink it stays as long (S1).
        let size = rustix::fs::fstat(&fd).map_err(unmapped)?.st_size;
        let size = u64::try_from(size).unwrap_or_default();
        if size < len {
            return Err(Handover::TooSmall);
        }
        let map = match seals.contains(SealFlags::SHRINK) {
            true => Some(map(&fd, len)?),
            false => None,
        };
        Ok(Self { fd, len, size, map })
    }

    /// True when it is mapped: copies take no system calls.
    pub fn is_mapped(&self) -> bool {
        self.map.is_some()
    }

    /// Copies `into.len()` bytes from `at`. What the engine writes meanwhile may or may not be in
    /// the copy; the copy itself no longer changes (S2).
    ///
    /// # Errors
    /// `into` holds nothing of use.
    pub fn copy_out(&self, at: u64, into: &mut [u8]) -> Result<(), Lost> {
        let start = self.inside(at, into.len())?;
        let Some(map) = &self.map else {
            return self.read(at, into);
        };
        let from = map.as_ptr().wrapping_add(start);
        // SAFETY: a plain copy from the mapping into private memory.
        //   Live    `self.map` is mapped while `self` is borrowed, and S1 keeps every page backed.
        //   Stable  a mapping never moves; `inside` has checked the range.
        //   Alone   `into` is borrowed mutably and is not part of the mapping, to which no
        //           reference exists (S2). Another process may write `from` meanwhile: each byte
        //           copied is then an old or a new one, and no value is assumed of any.
        //   Drop    n/a
        unsafe { std::ptr::copy_nonoverlapping(from, into.as_mut_ptr(), into.len()) };
        Ok(())
    }

    /// Copies `from` to `at`.
    ///
    /// # Errors
    /// Some of it may be there.
    pub fn copy_in(&self, at: u64, from: &[u8]) -> Result<(), Lost> {
        let start = self.inside(at, from.len())?;
        let Some(map) = &self.map else {
            return self.write(at, from);
        };
        let to = map.as_mut_ptr().wrapping_add(start);
        // SAFETY: a plain copy into the mapping.
        //   Live    `self.map` is mapped while `self` is borrowed, and S1 keeps every page backed.
        //   Stable  a mapping never moves; `inside` has checked the range.
        //   Alone   no reference to the mapping exists (S2), and `from` is not part of it. Whoever
        //           else writes these bytes at the same time spoils the engine's memory only.
        //   Drop    n/a
        unsafe { std::ptr::copy_nonoverlapping(from.as_ptr(), to, from.len()) };
        Ok(())
    }

    /// Looks whether the file is as it was. What is mapped cannot be otherwise.
    ///
    /// # Errors
    /// The engine has changed its size.
    pub fn unchanged(&self) -> Result<(), Lost> {
        if self.map.is_some() {
            return Ok(());
        }
        let stat = rustix::fs::fstat(&self.fd).map_err(Lost::Refused)?;
        let (now, size) = (u64::try_from(stat.st_size).unwrap_or_default(), self.size);
        match now == size {
            true => Ok(()),
            false => Err(Lost::Resized { now, size }),
        }
    }

    fn inside(&self, at: u64, len: usize) -> Result<usize, Lost> {
        let end = at.checked_add(len as u64);
        let start = usize::try_from(at).ok();
        let start = start.filter(|_| end.is_some_and(|end| end <= self.len));
        let size = self.len;
        start.ok_or(Lost::Outside { at, len, size })
    }

    fn read(&self, mut at: u64, mut into: &mut [u8]) -> Result<(), Lost> {
        while !into.is_empty() {
            match rustix::io::pread(&self.fd, &mut *into, at) {
                Ok(0) => return self.ended(),
                Ok(read) => {
                    at += read as u64;
                    into = into.get_mut(read..).unwrap_or_default();
                }
                Err(Errno::INTR) => {}
                Err(errno) => return Err(Lost::Refused(errno)),
            }
        }
        Ok(())
    }

    fn write(&self, mut at: u64, mut from: &[u8]) -> Result<(), Lost> {
        while !from.is_empty() {
            match rustix::io::pwrite(self.fd.as_fd(), from, at) {
                Ok(0) => return self.ended(),
                Ok(written) => {
                    at += written as u64;
                    from = from.get(written..).unwrap_or_default();
                }
                Err(Errno::INTR) => {}
                Err(errno) => return Err(Lost::Refused(errno)),
            }
        }
        Ok(())
    }

    /// The kernel copied nothing: the file ends there now.
    fn ended(&self) -> Result<(), Lost> {
        self.unchanged()?;
        Err(Lost::Refused(Errno::IO))
    }
}

fn map(fd: &OwnedFd, len: u64) -> Result<MmapRaw, Handover> {
    let len = usize::try_from(len).map_err(|_| Handover::Unmapped)?;
    let map = MmapOptions::new().len(len).map_raw(fd);
    map.map_err(|_| Handover::Unmapped)
}

#[cfg(test)]
mod tests;
