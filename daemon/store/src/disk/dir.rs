//! The store's directory: the cold calls of the real lanes, and the table of open files.
//!
//! Upstairs:   `disk::ring` and `disk::file`, which add the hot calls.
//! Downstairs: plain system calls, relative to one directory descriptor.
//!
//! Invariants kept here
//!   O1  A [`FileId`] names one open file and is never used for another, so an operation that
//!       was queued too late finds no file instead of a wrong one.
//!   O2  `create` returns only when the name, the length and the reserved space are durable; if
//!       it fails, it leaves no file.
//!
//! Not here on purpose
//!   No directory sync in `remove`: a file that comes back after a crash holds sound records of
//!   this store, and recovery takes them for what they are.
//!   No io_uring: these calls are rare, slow in the kernel either way, and block the same.

use std::collections::BTreeMap;
use std::io::{Error, ErrorKind};
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustix::fs::{AtFlags, FallocateFlags, FileType, Mode, OFlags, StatxFlags};
use rustix::io::Errno;

use super::shape::{self, check_name};
use super::{FILES_MAX, FileId, Found, Op};

/// Fewest descriptors left to the rest of the process; a quarter of the limit where that is more.
const FILES_SPARE: u32 = 64;

/// Alignment that is asked of operations when the filesystem does not say. Unit: bytes.
const ALIGN_UNKNOWN: usize = 4096;

/// Alignment that is asked where no direct I/O is possible, so that callers behave the same on
/// every filesystem. Unit: bytes.
const ALIGN_BUFFERED: usize = 512;

/// Name of the file that shows what a filesystem without unnamed files can do.
const PROBE: &str = ".kvtier-probe";

/// One open file. The descriptor lives until the last operation that holds it ends.
#[derive(Debug)]
pub(super) struct OpenFile {
    pub(super) fd: Arc<OwnedFd>,
    /// Dense number below [`Dir::files_max`], reused after the file is closed.
    pub(super) slot: u32,
    name: String,
}

/// What a lane may do in its directory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Access {
    /// Everything.
    Write,
    /// Read files that are there: works on a read-only mount.
    Read,
}

/// A directory and what is open in it.
#[derive(Debug)]
pub(super) struct Dir {
    access: Access,
    fd: OwnedFd,
    path: PathBuf,
    files: BTreeMap<FileId, OpenFile>,
    free_slots: Vec<u32>,
    next_id: u32,
    next_slot: u32,
    files_max: u32,
    direct: bool,
    align: usize,
}

impl Dir {
    /// Opens an existing directory and finds out what its filesystem can do.
    pub(super) fn open(path: &Path, access: Access) -> std::io::Result<Self> {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let fd = rustix::fs::open(path, flags, Mode::empty())
            .map_err(|e| naming(e, &format!("cannot open directory {}", path.display())))?;
        let (direct, align) = match access {
            Access::Write => direct_io(made_here(&fd)?)?,
            Access::Read => direct_io(found_here(&fd)?)?,
        };
        if access == Access::Write {
            // Whoever was killed in the middle of a create left a file whose name may not be
            // durable. Nothing is put into it before it is.
            rustix::fs::fsync(&fd)
                .map_err(|e| naming(e, &format!("cannot sync directory {}", path.display())))?;
        }
        let limit = rustix::process::getrlimit(rustix::process::Resource::Nofile).current;
        let limit = limit
            .and_then(|n| u32::try_from(n).ok())
            .unwrap_or(FILES_MAX);
        Ok(Self {
            access,
            fd,
            path: path.to_owned(),
            files: BTreeMap::new(),
            free_slots: Vec::new(),
            next_id: 1,
            next_slot: 0,
            files_max: limit
                .saturating_sub(FILES_SPARE.max(limit / 4))
                .clamp(1, FILES_MAX),
            direct,
            align,
        })
    }

    /// Whether files are opened with `O_DIRECT`.
    pub(super) fn direct(&self) -> bool {
        self.direct
    }

    pub(super) fn align(&self) -> usize {
        self.align
    }

    /// Most files open at once.
    pub(super) fn files_max(&self) -> u32 {
        self.files_max
    }

    pub(super) fn get(&self, file: FileId) -> Option<&OpenFile> {
        self.files.get(&file)
    }

    pub(super) fn open_files(&self) -> impl Iterator<Item = &OpenFile> {
        self.files.values()
    }

    /// Regular files with a UTF-8 name. Others were not made by this store.
    pub(super) fn list(&self) -> std::io::Result<Vec<Found>> {
        let mut found = Vec::new();
        for entry in rustix::fs::Dir::read_from(&self.fd)? {
            let entry = entry?;
            let Ok(name) = entry.file_name().to_str() else {
                continue;
            };
            let stat = match rustix::fs::statat(&self.fd, name, AtFlags::SYMLINK_NOFOLLOW) {
                Err(Errno::NOENT) => continue,
                stat => stat?,
            };
            if FileType::from_raw_mode(stat.st_mode) == FileType::RegularFile {
                let len = u64::try_from(stat.st_size).unwrap_or(0);
                found.push(Found {
                    name: name.to_owned(),
                    len,
                });
            }
        }
        Ok(found)
    }

    /// Opens an existing regular file.
    pub(super) fn open_file(&mut self, name: &str) -> std::io::Result<FileId> {
        check_name(name)?;
        let fd = rustix::fs::openat(&self.fd, name, self.flags(), Mode::empty())
            .map_err(|e| self.naming(e, "cannot open", name))?;
        let stat = rustix::fs::fstat(&fd)?;
        if FileType::from_raw_mode(stat.st_mode) != FileType::RegularFile {
            let text = format!("{} is not a regular file", self.path.join(name).display());
            return Err(Error::new(ErrorKind::InvalidInput, text));
        }
        self.enter(fd, name)
    }

    /// Creates a file of `len` bytes (O2).
    pub(super) fn create_file(&mut self, name: &str, len: u64) -> std::io::Result<FileId> {
        check_name(name)?;
        self.may_write()?;
        let flags = self.flags() | OFlags::CREATE | OFlags::EXCL;
        let fd = rustix::fs::openat(&self.fd, name, flags, Mode::RUSR | Mode::WUSR)
            .map_err(|e| self.naming(e, "cannot create", name))?;
        let made = rustix::fs::fallocate(&fd, FallocateFlags::empty(), 0, len)
            .and_then(|()| rustix::fs::fsync(&fd))
            .and_then(|()| rustix::fs::fsync(&self.fd))
            .map_err(|e| self.naming(e, &format!("cannot reserve {len} bytes for"), name))
            .and_then(|()| self.enter(fd, name));
        if made.is_err() {
            self.unmake(name);
        }
        made
    }

    /// Takes away a file that was created and cannot be used.
    pub(super) fn unmake(&self, name: &str) {
        let _ = rustix::fs::unlinkat(&self.fd, name, AtFlags::empty());
    }

    /// Closes a file and takes it out of the table.
    pub(super) fn close(&mut self, file: FileId) -> Option<OpenFile> {
        let gone = self.files.remove(&file)?;
        self.free_slots.push(gone.slot);
        Some(gone)
    }

    /// Removes the file that `close` returned.
    pub(super) fn unlink(&self, gone: &OpenFile) -> std::io::Result<()> {
        self.may_write()?;
        rustix::fs::unlinkat(&self.fd, &gone.name, AtFlags::empty())
            .map_err(|e| self.naming(e, "cannot remove", &gone.name))
    }

    /// What is wrong with an operation, in words, before a device is asked.
    pub(super) fn check(&self, op: &Op) -> std::io::Result<()> {
        if !self.files.contains_key(&op.file) {
            let text = format!("{:?} is not open", op.file);
            return Err(Error::new(ErrorKind::InvalidInput, text));
        }
        shape::check(op, self.align)
    }

    fn enter(&mut self, fd: OwnedFd, name: &str) -> std::io::Result<FileId> {
        let slot = match self.free_slots.pop() {
            Some(slot) => slot,
            None if self.next_slot < self.files_max => {
                self.next_slot += 1;
                self.next_slot - 1
            }
            None => {
                let text = format!("{} files are open; raise LimitNOFILE=", self.files_max);
                return Err(Error::other(text));
            }
        };
        let file = FileId(self.next_id);
        self.next_id = self.next_id.checked_add(1).ok_or_else(|| {
            Error::other("this lane has opened 2^32 files; open the directory again")
        })?;
        self.files.insert(
            file,
            OpenFile {
                fd: Arc::new(fd),
                slot,
                name: name.to_owned(),
            },
        );
        Ok(file)
    }

    fn flags(&self) -> OFlags {
        let direct = if self.direct {
            OFlags::DIRECT
        } else {
            OFlags::empty()
        };
        let access = match self.access {
            Access::Write => OFlags::RDWR,
            Access::Read => OFlags::RDONLY,
        };
        access | OFlags::CLOEXEC | OFlags::NOFOLLOW | direct
    }

    fn may_write(&self) -> std::io::Result<()> {
        match self.access {
            Access::Write => Ok(()),
            Access::Read => Err(naming(
                Errno::ROFS,
                &format!("{} is opened to be read", self.path.display()),
            )),
        }
    }

    fn naming(&self, error: Errno, what: &str, name: &str) -> Error {
        naming(error, &format!("{what} {}", self.path.join(name).display()))
    }
}

/// The same kind of error, saying what was tried.
fn naming(error: Errno, what: &str) -> Error {
    let error = Error::from(error);
    Error::new(error.kind(), format!("{what}: {error}"))
}

/// An unnamed file for `direct_io`, opened with `O_DIRECT`; `None` where that is refused.
fn made_here(dir: &OwnedFd) -> std::io::Result<Option<OwnedFd>> {
    let flags = OFlags::RDWR | OFlags::CLOEXEC | OFlags::DIRECT;
    let mode = Mode::RUSR | Mode::WUSR;
    let file = match rustix::fs::openat(dir, c".", flags | OFlags::TMPFILE, mode) {
        // No unnamed files here: one with a name for a moment.
        Err(Errno::OPNOTSUPP | Errno::ISDIR) => {
            let file = rustix::fs::openat(dir, PROBE, flags | OFlags::CREATE, mode);
            let _ = rustix::fs::unlinkat(dir, PROBE, AtFlags::empty());
            file
        }
        file => file,
    };
    match file {
        Err(Errno::INVAL) => Ok(None),
        file => file
            .map(Some)
            .map_err(|e| naming(e, "cannot write to the store's directory")),
    }
}

/// The first regular file, for `direct_io`; `None` where there is none or that is refused.
fn found_here(dir: &OwnedFd) -> std::io::Result<Option<OwnedFd>> {
    let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NOFOLLOW | OFlags::DIRECT;
    for entry in rustix::fs::Dir::read_from(dir)? {
        let entry = entry?;
        if entry.file_type() == FileType::RegularFile {
            match rustix::fs::openat(dir, entry.file_name(), flags, Mode::empty()) {
                Err(Errno::INVAL) => return Ok(None),
                Err(_) => {}
                Ok(file) => return Ok(Some(file)),
            }
        }
    }
    Ok(None)
}

/// Whether this filesystem takes direct I/O, and the alignment that it asks for. Only an open
/// file can tell.
fn direct_io(file: Option<OwnedFd>) -> std::io::Result<(bool, usize)> {
    let Some(file) = file else {
        return Ok((false, ALIGN_BUFFERED));
    };
    let mask = StatxFlags::DIOALIGN;
    let Ok(stat) = rustix::fs::statx(&file, c"", AtFlags::EMPTY_PATH, mask) else {
        return Ok((true, ALIGN_UNKNOWN));
    };
    if stat.stx_mask & mask.bits() == 0 {
        return Ok((true, ALIGN_UNKNOWN));
    }
    let align = stat.stx_dio_mem_align.max(stat.stx_dio_offset_align) as usize;
    match align {
        0 => Ok((false, ALIGN_BUFFERED)),
        _ if align.is_power_of_two() && align <= ALIGN_UNKNOWN => Ok((true, align)),
        // Buffers are only aligned to 4096: a device that wants more is served buffered.
        _ => Ok((false, ALIGN_BUFFERED)),
    }
}
