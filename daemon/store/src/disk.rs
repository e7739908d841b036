//! `Disk`: what the store needs of a device, and nothing a device knows of records.
//!
//! Upstairs:   `lane`, for `store` and `recover`, submits operations and steps on
//!             completions.
//! Downstairs: `disk::ring` (io_uring), `disk::file` (pread and pwrite), `disk::sim` (seeded,
//!             lying), `disk::fault` (a real lane that fails on demand).
//!
//! Two lanes behind one trait. The hot lane is `submit` and `reap`: reads, writes and syncs of
//! open files, many in flight, finished in any order. The cold lane is the calls that return
//! when they are done: list, create, remove.
//!
//! Invariants kept here
//!   D1  An operation owns its buffer from `submit` until `reap` returns it. Nobody else can
//!       touch, move or free it, whatever happens to whoever asked for the operation.
//!   D2  `moved` is what the device says it moved. A short count is not success: the caller
//!       submits the rest or gives up.
//!
//! Not here on purpose: no retry, no deadline, no checksum.

#[cfg(test)]
pub(crate) mod conformance;
mod dir;
#[cfg(debug_assertions)]
pub mod fault;
pub mod file;
#[cfg(any(test, feature = "sim"))]
pub mod hollow;
pub mod lane;
#[allow(
    unsafe_code,
    reason = "a named room: hands addresses of buffers to the kernel"
)]
pub mod ring;
mod rung;
mod shape;
#[cfg(any(test, feature = "sim"))]
pub mod sim;

use std::fmt;
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use crate::mem::{Arena, IoBuf};

/// A segment file that is open on this disk. Valid until [`Disk::remove`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct FileId(pub u32);

/// What an operation does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum OpKind {
    /// File to buffer.
    Read,
    /// Buffer to file.
    Write,
    /// Everything written and completed on this file before is durable afterwards.
    Sync,
}

/// Most files that a lane opens: bounds the table that a ring registers. 65,536 segments of
/// 256 MiB are 16 TiB.
pub const FILES_MAX: u32 = 1 << 16;

/// Most runs of memory behind the first in one operation.
pub const RUNS_MAX: usize = 63;

/// Memory that an operation moves behind what came before it in the file.
#[derive(Debug)]
pub struct Run {
    /// Memory to fill or to write out.
    pub buf: IoBuf,
    /// First byte of the buffer that takes part. Unit: bytes; aligned like `Op::at`.
    pub buf_at: usize,
    /// How much of it. Unit: bytes; aligned like `Op::at`; at least 1.
    pub len: usize,
}

/// One operation for the device.
#[derive(Debug)]
pub struct Op {
    /// Chosen by the caller, given back in [`Done`].
    pub user: u64,
    /// What to do.
    pub kind: OpKind,
    /// Where.
    pub file: FileId,
    /// Offset in the file. Unit: bytes; a multiple of [`Disk::align`].
    pub at: u64,
    /// Memory to fill or to write out; `None` for a sync.
    pub buf: Option<IoBuf>,
    /// First byte of the buffer that takes part. Unit: bytes; aligned like `at`.
    pub buf_at: usize,
    /// How much to move from or to `buf`. Unit: bytes; aligned like `at`; 0 for a sync.
    pub len: usize,
    /// More memory for the bytes behind `at + len`, in order; at most [`RUNS_MAX`] runs. One
    /// large operation costs a device less than several small ones.
    pub more: Vec<Run>,
}

impl Op {
    /// Bytes that the operation moves in all.
    pub fn total(&self) -> usize {
        let more: usize = self.more.iter().map(|run| run.len).sum();
        self.len.saturating_add(more)
    }

    /// The operation as it comes back.
    pub(crate) fn done(self, moved: std::io::Result<usize>) -> Done {
        let Self {
            user,
            kind,
            buf,
            more,
            ..
        } = self;
        Done {
            user,
            kind,
            buf,
            more,
            moved,
        }
    }
}

/// A finished operation; the buffer comes home whatever happened (D1).
#[derive(Debug)]
pub struct Done {
    /// The operation's own number.
    pub user: u64,
    /// What it did.
    pub kind: OpKind,
    /// The buffer that was handed over; `None` also when the lane failed and the device may still
    /// use it, and then `more` is empty.
    pub buf: Option<IoBuf>,
    /// The runs that were handed over with it.
    pub more: Vec<Run>,
    /// Bytes moved (D2), or why nothing is known to have moved.
    pub moved: Result<usize, std::io::Error>,
}

/// Why an operation was not taken. The operation comes back with it, untouched.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum SubmitError {
    /// Retry after a completion.
    #[error("disk queue is full at {depth} operations")]
    Full {
        /// Operations in flight.
        depth: u32,
    },
    /// The lane is gone; nothing will be taken again.
    #[error("disk lane has failed")]
    Failed,
}

/// How long [`Disk::reap`] may block.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Wait {
    /// Not at all.
    No,
    /// Until an operation finishes or the [`Waker`] is used.
    One,
    /// As `One`, and at most this long.
    For(Duration),
}

/// A file that the cold lane found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Found {
    /// Name inside the store's directory.
    pub name: String,
    /// Length of the file. Unit: bytes.
    pub len: u64,
}

/// A device, or something that behaves like one.
pub trait Disk: fmt::Debug {
    /// Files in the store's directory, in any order.
    fn list(&mut self) -> std::io::Result<Vec<Found>>;

    /// Opens an existing file.
    fn open(&mut self, name: &str) -> std::io::Result<FileId>;

    /// Creates a file of exactly `len` bytes, reserved on the device, and makes its name durable.
    /// Its content is undefined: zeros or what lay there before.
    fn create(&mut self, name: &str, len: u64) -> std::io::Result<FileId>;

    /// Closes and removes a file. No operation on it may be in flight.
    fn remove(&mut self, file: FileId) -> std::io::Result<()>;

    /// Closes a file and keeps it. No operation on it may be in flight.
    fn close(&mut self, file: FileId);

    /// Hands an operation to the device, or gives it back with the reason.
    fn submit(&mut self, op: Op) -> Result<(), (Op, SubmitError)>;

    /// Appends finished operations to `done`. Returns at once when nothing is in flight and
    /// `wait` is [`Wait::No`].
    fn reap(&mut self, wait: Wait, done: &mut Vec<Done>);

    /// Operations submitted and not yet reaped.
    fn in_flight(&self) -> usize;

    /// Most operations in flight.
    fn depth(&self) -> usize;

    /// Most files open at once.
    fn files_max(&self) -> u64 {
        u64::MAX
    }

    /// Alignment of offsets, lengths and memory. Unit: bytes, a power of two, at most 4096.
    fn align(&self) -> usize;

    /// Tells the lane that buffers of `arena` will come, so that it can register its memory.
    /// Worth it for arenas that are populated and long-lived; never needed for correctness.
    /// The lane lets go of the arena by itself. `Some` says why it cannot register it, though it
    /// would.
    fn attach(&mut self, _arena: &Arc<Arena>) -> Option<String> {
        None
    }

    /// Something another thread may use to end a [`Wait::One`].
    fn waker(&self) -> Waker;

    /// Name of the lane for logs and status: `io_uring`, `pread` or `sim`.
    fn lane(&self) -> &'static str;

    /// Time since some moment before the disk was opened; never goes back. What is decided by
    /// time above a disk is decided by this clock, so that a simulated disk decides it.
    fn now(&self) -> Duration {
        static START: OnceLock<Instant> = OnceLock::new();
        START.get_or_init(Instant::now).elapsed()
    }
}

impl<D: Disk + ?Sized> Disk for Box<D> {
    fn list(&mut self) -> std::io::Result<Vec<Found>> {
        (**self).list()
    }

    fn open(&mut self, name: &str) -> std::io::Result<FileId> {
        (**self).open(name)
    }

    fn create(&mut self, name: &str, len: u64) -> std::io::Result<FileId> {
        (**self).create(name, len)
    }

    fn remove(&mut self, file: FileId) -> std::io::Result<()> {
        (**self).remove(file)
    }

    fn close(&mut self, file: FileId) {
        (**self).close(file);
    }

    fn submit(&mut self, op: Op) -> Result<(), (Op, SubmitError)> {
        (**self).submit(op)
    }

    fn reap(&mut self, wait: Wait, done: &mut Vec<Done>) {
        (**self).reap(wait, done);
    }

    fn in_flight(&self) -> usize {
        (**self).in_flight()
    }

    fn depth(&self) -> usize {
        (**self).depth()
    }

    fn files_max(&self) -> u64 {
        (**self).files_max()
    }

    fn align(&self) -> usize {
        (**self).align()
    }

    fn waker(&self) -> Waker {
        (**self).waker()
    }

    fn attach(&mut self, arena: &Arc<Arena>) -> Option<String> {
        (**self).attach(arena)
    }

    fn lane(&self) -> &'static str {
        (**self).lane()
    }

    fn now(&self) -> Duration {
        (**self).now()
    }
}

/// Ends a blocking [`Disk::reap`] from another thread. Cheap to clone; never blocks.
#[derive(Clone)]
pub struct Waker(Arc<dyn Fn() + Send + Sync>);

impl Waker {
    /// A waker that runs `wake`.
    pub fn new(wake: impl Fn() + Send + Sync + 'static) -> Self {
        Self(Arc::new(wake))
    }

    /// Ends the current or the next [`Wait::One`].
    pub fn wake(&self) {
        (self.0)();
    }
}

impl fmt::Debug for Waker {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Waker")
    }
}
