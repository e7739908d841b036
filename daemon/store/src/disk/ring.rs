//! The io_uring lane: many operations in flight from one thread, straight into arena memory.
//!
//! Upstairs:   the store, through `disk::Disk`.
//! Downstairs: io_uring with `O_DIRECT`, registered files and registered buffers.
//!
//! One of the rooms that may be unsafe: it gives the kernel addresses of buffers.
//!
//! A ring belongs to one thread: the first that submits, reaps or changes files after `open`.
//! The lane may move to another thread when nothing is in flight; it then makes a new ring there.
//!
//! Invariants kept here
//!   D1  The slot owns an operation and its buffer until its completion is taken off the ring.
//!       When the ring cannot say any more whether the kernel is done, buffers are leaked on
//!       purpose: lost memory is better than memory that a device still writes.
//!   D3  A completion names slot and generation; one that nobody waits for ends the lane.
//!
//! Not here on purpose: no kernel polling thread (it costs a core; fixed buffers cost little
//! without), no retry of short operations (D2), no timeout (a device cannot be told to stop
//! writing into memory).

mod arenas;
mod bell;
mod entry;
mod face;
mod setup;
mod slots;

use std::collections::VecDeque;
use std::fmt;
use std::mem::ManuallyDrop;
use std::os::fd::AsRawFd;
use std::path::Path;
use std::sync::Arc;
use std::thread::ThreadId;
use std::time::{Duration, Instant};

use io_uring::{IoUring, opcode, types};
use rustix::io::Errno;

use self::arenas::ArenaTable;
use self::bell::Bell;
use self::slots::{Held, Slots};
use super::dir::{Access, Dir, OpenFile};
use super::lane::LaneReport;
use super::{Disk, Done, FileId, SubmitError, Wait};
use crate::mem::Arena;

pub use self::setup::{NoRing, probe};

/// Number of the waker's poll; no slot has it, since slot indices stay far below 2^32.
const BELL: u64 = u64::MAX;

/// Registered file 0 is the bell; files of the directory follow.
const FIRST_FILE: u32 = 1;

/// How often an operation that the kernel answers with "again" is handed in again.
const RETRIES_MAX: u32 = 8;

/// How often in a row the kernel may refuse to take operations before the lane gives up.
const REFUSALS_MAX: u32 = 100_000;

/// Operations of this size go to the device in `submit`; smaller ones are collected until `reap`
/// or until there are [`BATCH_MAX`]. Unit: bytes.
const AT_ONCE_BYTES: usize = 64 << 10;

/// Most small operations that wait for company.
const BATCH_MAX: usize = 16;

/// Most completions that are taken at a time. The caller answers them with new operations, and the
/// device has those before the rest of a burst is looked at: it stays busy.
const TAKEN_MAX: usize = 8;

/// How long a lane sleeps between two looks where the kernel cannot end a wait in time.
const NAP: Duration = Duration::from_micros(200);

/// After this many submissions the lane looks for arenas that are gone.
const SWEEP_EVERY: u32 = 1024;

/// Reads, writes and syncs through io_uring.
pub struct RingLane {
    // Order matters: the ring is closed before the slots that it may still point into.
    io: IoUring,
    owner: Option<ThreadId>,
    disabled: bool,
    buffers: bool,
    fixed_runs: bool,
    /// The kernel can end a wait in time.
    timed: bool,
    slots: Slots,
    dir: Dir,
    arenas: ArenaTable,
    bell: Arc<Bell>,
    bell_armed: bool,
    woken: bool,
    ready: VecDeque<Done>,
    cqes: Vec<(u64, i32)>,
    refusals: u32,
    until_sweep: u32,
    depth: usize,
    failed: bool,
    without: Vec<String>,
}

impl RingLane {
    /// Opens the directory `path` with room for `depth` operations.
    pub fn open(path: &Path, depth: usize) -> std::io::Result<Self> {
        let depth = super::lane::check_depth(depth)?;
        let dir = Dir::open(path, Access::Write)?;
        let bell = Bell::new()?;
        let made = setup::make(entries(depth), dir.files_max() + FIRST_FILE, bell.fd())?;
        let mut without = made.without;
        if !dir.direct() {
            without.push(super::lane::buffered(path));
        }
        Ok(Self {
            io: made.io,
            owner: None,
            disabled: made.disabled,
            buffers: made.buffers,
            fixed_runs: made.fixed_runs,
            timed: made.timed,
            slots: Slots::new(depth),
            dir,
            arenas: ArenaTable::default(),
            bell: Arc::new(bell),
            bell_armed: false,
            woken: false,
            ready: VecDeque::new(),
            cqes: Vec::new(),
            refusals: 0,
            until_sweep: SWEEP_EVERY,
            depth,
            failed: false,
            without,
        })
    }

    /// What the lane uses and what it does without.
    pub fn report(&self) -> LaneReport {
        let (direct, align, without) = (self.dir.direct(), self.dir.align(), self.without.clone());
        LaneReport {
            lane: "io_uring",
            direct,
            align,
            without,
        }
    }

    /// Arenas whose memory the ring has registered.
    pub fn registered_arenas(&self) -> usize {
        self.arenas.len()
    }

    /// Makes sure that this thread may use the ring. False when the lane has failed.
    fn bind(&mut self) -> bool {
        let me = std::thread::current().id();
        if self.failed || self.owner == Some(me) {
            return !self.failed;
        }
        if self.owner.is_some() {
            if self.slots.len() > 0 {
                self.fail("it moved to another thread with operations in flight");
                return false;
            }
            if let Err(error) = self.rebuild() {
                self.fail(&format!("no new ring for another thread: {error}"));
                return false;
            }
        }
        if self.disabled
            && let Err(error) = self.io.submitter().register_enable_rings()
        {
            self.fail(&format!("cannot be enabled: {error}"));
            return false;
        }
        self.owner = Some(me);
        true
    }

    /// Replaces the ring by a new one with the same files and arenas.
    fn rebuild(&mut self) -> std::io::Result<()> {
        let files = self.dir.files_max() + FIRST_FILE;
        let made = setup::make(entries(self.depth), files, self.bell.fd())?;
        (self.io, self.disabled, self.buffers) = (made.io, made.disabled, made.buffers);
        (self.owner, self.bell_armed) = (None, false);
        for file in self.dir.open_files() {
            let fd = file.fd.as_raw_fd();
            self.io
                .submitter()
                .register_files_update(file.slot + FIRST_FILE, &[fd])?;
        }
        for arena in self.arenas.drain() {
            self.register(&arena);
        }
        Ok(())
    }

    /// The lane is over: every operation is answered, and its buffer is leaked (D1).
    fn fail(&mut self, why: &str) {
        tracing::error!(
            why,
            in_flight = self.slots.len(),
            "io_uring lane has failed"
        );
        self.failed = true;
        for Held { op, runs, .. } in self.slots.take_all() {
            let (user, kind) = (op.user, op.kind);
            let _leaked = ManuallyDrop::new((op, runs));
            let moved = Err(std::io::Error::other(format!(
                "io_uring lane has failed: {why}"
            )));
            self.ready.push_back(Done {
                user,
                kind,
                buf: None,
                more: Vec::new(),
                moved,
            });
        }
    }

    /// Puts a file into the ring's table, or takes it out.
    fn set_file(&mut self, slot: u32, fd: i32) -> std::io::Result<()> {
        if self.failed || (self.owner.is_some() && !self.bind()) {
            return Err(std::io::Error::other(SubmitError::Failed));
        }
        self.io
            .submitter()
            .register_files_update(slot + FIRST_FILE, &[fd])
            .map(|_| ())
    }

    /// Registers a file that was just opened, or closes it again.
    fn adopt(&mut self, file: FileId) -> std::io::Result<FileId> {
        let Some((slot, fd)) = self.dir.get(file).map(|f| (f.slot, f.fd.as_raw_fd())) else {
            return Err(Errno::BADF.into());
        };
        self.set_file(slot, fd)
            .map(|()| file)
            .inspect_err(|_| drop(self.dir.close(file)))
    }

    fn retire(&mut self, file: FileId) -> Option<OpenFile> {
        let gone = self.dir.close(file)?;
        // A ring that fails here is found out by the next submit; the file is closed either way.
        let _ = self.set_file(gone.slot, -1);
        Some(gone)
    }

    /// Queues the operation of a slot. False when it cannot be.
    fn push(&mut self, number: u64) -> bool {
        let Some(entry) = self.entry(number) else {
            return false;
        };
        // SAFETY: the kernel may touch the bytes that `entry` names until its completion is taken.
        //   Live    the operation and its buffer sit in `self.slots`, which only `finish` (after
        //           the completion) and `fail` (which leaks the buffer) empty.
        //   Stable  a buffer is a run of a mapping, and the list of runs lies on the heap; moving
        //           the slot moves neither.
        //   Alone   the slot owns the buffer, and a buffer is the only owner of its run (M1).
        //   Drop    `Drop` waits for every slot, or leaks, before the ring is closed.
        unsafe { self.io.submission().push(&entry) }.is_ok()
    }

    /// Has the ring watch the bell, unless it does already.
    fn arm_bell(&mut self) {
        if self.bell_armed {
            return;
        }
        let events = u32::from(rustix::event::PollFlags::IN.bits());
        let poll = opcode::PollAdd::new(types::Fixed(0), events)
            .build()
            .user_data(BELL);
        // SAFETY: a poll names no memory.
        self.bell_armed = unsafe { self.io.submission().push(&poll) }.is_ok();
    }

    /// Hands queued operations to the kernel and waits for `want` completions, at most for
    /// `most` where the kernel can tell the time.
    fn enter(&mut self, want: usize, most: Option<Duration>) {
        let entered = match most.filter(|_| want > 0 && self.timed) {
            None => self.io.submitter().submit_and_wait(want),
            Some(most) => {
                let most = types::Timespec::from(most);
                let args = types::SubmitArgs::new().timespec(&most);
                self.io.submitter().submit_with_args(want, &args)
            }
        };
        let Err(error) = entered else {
            self.refusals = 0;
            return;
        };
        match Errno::from_io_error(&error) {
            // A signal, or the time is over: the caller looks again.
            Some(Errno::INTR | Errno::TIME) => {}
            // No memory for requests, or completions must be taken first: the caller takes
            // completions and comes back.
            Some(Errno::AGAIN | Errno::BUSY) if self.refusals < REFUSALS_MAX => {
                self.refusals += 1;
                std::thread::yield_now();
            }
            _ => self.fail(&format!("io_uring_enter: {error}")),
        }
    }

    /// Takes completions off the ring, [`TAKEN_MAX`] at most.
    fn collect(&mut self, done: &mut Vec<Done>) {
        let mut cqes = std::mem::take(&mut self.cqes);
        cqes.extend(
            self.io
                .completion()
                .take(TAKEN_MAX)
                .map(|cqe| (cqe.user_data(), cqe.result())),
        );
        for (number, result) in cqes.drain(..) {
            if number == BELL {
                self.bell.answer();
                (self.bell_armed, self.woken) = (false, true);
            } else if !self.failed {
                self.finish(number, result, done);
            }
        }
        self.cqes = cqes;
    }

    fn finish(&mut self, number: u64, result: i32, done: &mut Vec<Done>) {
        let Some(held) = self.slots.get_mut(number) else {
            self.fail("a completion names an operation that is not in flight (D3)");
            return;
        };
        let moved = usize::try_from(result)
            .map_err(|_| std::io::Error::from_raw_os_error(result.saturating_neg()));
        let again = moved.as_ref().is_err_and(|error| {
            matches!(
                Errno::from_io_error(error),
                Some(Errno::AGAIN | Errno::INTR)
            )
        });
        if again && held.retries < RETRIES_MAX {
            held.retries += 1;
            if self.push(number) {
                return;
            }
        }
        if let Some(Held { op, .. }) = self.slots.take(number) {
            done.push(op.done(moved));
        }
    }

    /// Whether the kernel has to be entered for anything but waiting.
    fn has_work(&mut self) -> bool {
        let queue = self.io.submission();
        !queue.is_empty() || queue.taskrun() || queue.cq_overflow()
    }

    /// One round of submitting, waiting and collecting.
    fn turn(&mut self, wait: Wait, done: &mut Vec<Done>) {
        let before = done.len();
        let most = match wait {
            Wait::For(most) => Some(most),
            Wait::No | Wait::One => None,
        };
        let until = most.and_then(|most| Instant::now().checked_add(most));
        loop {
            self.arm_bell();
            self.collect(done);
            let satisfied = self.woken || done.len() > before || !self.ready.is_empty();
            let left = until.map(|until| until.saturating_duration_since(Instant::now()));
            let over = left.is_some_and(|left| left.is_zero());
            let wanted = wait != Wait::No && !satisfied && !over && !self.failed;
            if self.failed || (!wanted && !self.has_work()) {
                break;
            }
            match left.filter(|_| wanted && !self.timed) {
                None => self.enter(usize::from(wanted), left),
                Some(left) => {
                    self.enter(0, None);
                    std::thread::sleep(left.min(NAP));
                }
            }
            self.collect(done);
            if !wanted {
                break;
            }
        }
        if wait != Wait::No {
            self.woken = false;
        }
    }

    /// Registers an arena's memory, part by part; all, or nothing and why.
    fn register(&mut self, arena: &Arc<Arena>) -> Option<String> {
        let parts = arenas::parts(arena.capacity());
        let Some(entries) = self.arenas.room(parts.len()) else {
            return self.note(format!(
                "{arena:?} is not registered: the ring's table is full"
            ));
        };
        for (entry, part) in entries.clone().zip(parts) {
            let base = arena.base().wrapping_add(part.start).cast();
            let part = libc::iovec {
                iov_base: base,
                iov_len: part.len(),
            };
            // SAFETY: the kernel pins the pages behind `part` until the entry is cleared.
            //   Live    the mapping is whole now; pinned pages outlive even its end.
            //   Stable  a mapping never moves.
            //   Alone   an entry is a permission; only operations in slots use it.
            //   Drop    `sweep` or the end of the ring clears the entry.
            let registered = unsafe {
                self.io
                    .submitter()
                    .register_buffers_update(u32::from(entry), &[part], None)
            };
            if let Err(error) = registered {
                self.clear(entries.start..entry);
                return self.note(format!(
                    "{arena:?} is not registered: {}",
                    explain_pin(&error)
                ));
            }
        }
        self.arenas.insert(arena, entries);
        None
    }

    fn clear(&mut self, entries: std::ops::Range<u16>) {
        for entry in entries {
            let none = libc::iovec {
                iov_base: std::ptr::null_mut(),
                iov_len: 0,
            };
            // SAFETY: an empty entry names no memory.
            let _ = unsafe {
                self.io
                    .submitter()
                    .register_buffers_update(u32::from(entry), &[none], None)
            };
        }
    }

    /// Unregisters arenas that nobody holds any more.
    fn sweep(&mut self) {
        self.until_sweep = SWEEP_EVERY;
        for entries in self.arenas.sweep() {
            self.clear(entries);
        }
    }

    fn note(&mut self, text: String) -> Option<String> {
        tracing::warn!("{text}");
        self.without.push(text.clone());
        Some(text)
    }
}

/// Queue entries for `depth` operations and the bell.
fn entries(depth: usize) -> u32 {
    u32::try_from((depth + 1).next_power_of_two()).unwrap_or(u32::MAX)
}

/// Why the kernel does not pin an arena, and what would change that.
fn explain_pin(error: &std::io::Error) -> String {
    if Errno::from_io_error(error) != Some(Errno::NOMEM) {
        return error.to_string();
    }
    let limit = rustix::process::getrlimit(rustix::process::Resource::Memlock).current;
    let limit = limit.map_or("unlimited".to_owned(), |bytes| format!("{bytes} bytes"));
    format!("locked memory is limited to {limit}; set LimitMEMLOCK=infinity")
}

impl fmt::Debug for RingLane {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "RingLane({} of {} in flight, {:?})",
            self.in_flight(),
            self.depth,
            self.arenas
        )
    }
}

#[cfg(test)]
mod tests;
