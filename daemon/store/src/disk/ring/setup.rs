//! Makes a ring with the best features that the kernel grants, and locks it down.
//!
//! Upstairs:   `disk::ring`.
//! Downstairs: `io_uring_setup`, `io_uring_register`.
//!
//! System call filters cannot see what goes through a ring, so the ring gets a filter of its own:
//! it starts disabled, is told that only reads, writes, syncs and the waker's poll are allowed,
//! all on registered files, and only then is enabled.
//!
//! Not here on purpose: no kernel version checks. Features are asked for and refused; versions
//! lie about backports.

use std::fmt;
use std::os::fd::{AsRawFd, BorrowedFd};

use io_uring::register::Restriction;
use io_uring::{IoUring, Probe, opcode, squeue};
use rustix::io::Errno;

use super::arenas;

/// `IORING_REGISTER_FILES_UPDATE`, which the crate does not export.
const REGISTER_FILES_UPDATE: u8 = 6;

/// `IORING_REGISTER_BUFFERS_UPDATE`, likewise.
const REGISTER_BUFFERS_UPDATE: u8 = 16;

/// Operations that the lane uses, and nothing else.
const OPERATIONS: [u8; 6] = [
    opcode::Read::CODE,
    opcode::Write::CODE,
    opcode::ReadFixed::CODE,
    opcode::WriteFixed::CODE,
    opcode::Fsync::CODE,
    opcode::PollAdd::CODE,
];

/// Operations of several runs; where the kernel lacks one, the lane does without.
const VECTORED: [u8; 4] = [
    opcode::Readv::CODE,
    opcode::Writev::CODE,
    opcode::ReadvFixed::CODE,
    opcode::WritevFixed::CODE,
];

/// A ring that nobody has used yet.
pub(super) struct Made {
    pub(super) io: IoUring,
    /// It must be enabled, on the thread that will use it.
    pub(super) disabled: bool,
    /// It has a table for registered buffers.
    pub(super) buffers: bool,
    /// It takes runs that lie in a registered buffer.
    pub(super) fixed_runs: bool,
    /// It can end a wait in time.
    pub(super) timed: bool,
    /// Features that the kernel refused.
    pub(super) without: Vec<String>,
}

/// Why there is no io_uring here, and what would change that.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NoRing(String);

impl fmt::Display for NoRing {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "io_uring is not usable: {}", self.0)
    }
}

impl std::error::Error for NoRing {}

/// Whether io_uring is usable for the lane. Makes a small ring and throws it away.
pub fn probe() -> Result<(), NoRing> {
    let io = IoUring::new(2).map_err(|error| NoRing(explain(&error)))?;
    let mut probe = Probe::new();
    let asked = io.submitter().register_probe(&mut probe);
    asked.map_err(|error| NoRing(format!("the kernel cannot say what it supports ({error})")))?;
    match OPERATIONS.iter().find(|code| !probe.is_supported(**code)) {
        None => Ok(()),
        Some(code) => Err(NoRing(format!(
            "the kernel lacks operation {code}; it needs 5.6"
        ))),
    }
}

fn explain(error: &std::io::Error) -> String {
    match Errno::from_io_error(error) {
        Some(Errno::NOSYS) => "this kernel was built without it".into(),
        Some(Errno::PERM | Errno::ACCESS) => {
            let sysctl = rustix::fs::open(
                "/proc/sys/kernel/io_uring_disabled",
                rustix::fs::OFlags::RDONLY | rustix::fs::OFlags::CLOEXEC,
                rustix::fs::Mode::empty(),
            );
            let mut text = [0; 8];
            let len = sysctl
                .and_then(|fd| rustix::io::read(&fd, &mut text))
                .unwrap_or(0);
            let text = String::from_utf8_lossy(text.get(..len).unwrap_or(&[]))
                .trim()
                .to_owned();
            match text.as_str() {
                "1" | "2" => format!("sysctl kernel.io_uring_disabled is {text}; set it to 0"),
                _ => "a system call filter forbids it; allow io_uring_setup, io_uring_enter \
                      and io_uring_register"
                    .into(),
            }
        }
        Some(Errno::NOMEM) => "no memory may be locked for it; raise LimitMEMLOCK=".into(),
        _ => error.to_string(),
    }
}

/// Makes a ring for `entries` queued operations with a table of `files` registered files, of
/// which number 0 is `bell`.
pub(super) fn make(entries: u32, files: u32, bell: BorrowedFd<'_>) -> std::io::Result<Made> {
    let (io, disabled, mut without) = build(entries)?;
    let submitter = io.submitter();
    submitter.register_files(&vec![-1; files as usize])?;
    submitter.register_files_update(0, &[bell.as_raw_fd()])?;
    let buffers = match submitter.register_buffers_sparse(u32::from(arenas::ENTRIES)) {
        Ok(()) => true,
        Err(error) => {
            without.push(format!("registered buffers: {error}; needs Linux 5.19"));
            false
        }
    };
    let vectored = vectored(&io);
    let fixed_runs = vectored.len() == VECTORED.len();
    if !fixed_runs {
        without.push("runs in registered buffers: needs Linux 6.15".into());
    }
    let mut allowed = restrictions(&vectored);
    if disabled && let Err(error) = submitter.register_restrictions(&mut allowed) {
        without.push(format!("ring restrictions: {error}"));
    }
    if !disabled {
        without.push("ring restrictions: needs Linux 5.10".into());
    }
    let timed = io.params().is_feature_ext_arg();
    if !timed {
        without.push("waits that end in time: needs Linux 5.11".into());
    }
    Ok(Made {
        io,
        disabled,
        buffers,
        fixed_runs,
        timed,
        without,
    })
}

/// Walks down from the best set of features to none.
fn build(entries: u32) -> std::io::Result<(IoUring, bool, Vec<String>)> {
    // Completions are posted when the owner asks for them, not by interrupting it.
    let mut best = IoUring::builder();
    best.setup_single_issuer()
        .setup_defer_taskrun()
        .setup_taskrun_flag();
    best.setup_submit_all().setup_r_disabled();
    let mut older = IoUring::builder();
    older
        .setup_coop_taskrun()
        .setup_taskrun_flag()
        .setup_submit_all()
        .setup_r_disabled();
    let mut restricted = IoUring::builder();
    restricted.setup_r_disabled();
    let plain = IoUring::builder();

    let deferred = "deferred task work: needs Linux 6.1";
    let cooperative = "cooperative task work: needs Linux 5.19";
    let ladder: [(_, bool, &[&str]); 4] = [
        (best, true, &[]),
        (older, true, &[deferred]),
        (restricted, true, &[deferred, cooperative]),
        (plain, false, &[deferred, cooperative]),
    ];
    let mut last = std::io::Error::from(Errno::INVAL);
    for (builder, disabled, without) in ladder {
        match builder.build(entries) {
            Ok(io) => {
                let without = without.iter().map(|text| (*text).to_owned()).collect();
                return Ok((io, disabled, without));
            }
            // The kernel does not know a flag: the next rung asks for less.
            Err(error) if Errno::from_io_error(&error) == Some(Errno::INVAL) => last = error,
            Err(error) => return Err(error),
        }
    }
    Err(last)
}

/// Which of [`VECTORED`] the kernel has.
fn vectored(io: &IoUring) -> Vec<u8> {
    let mut probe = Probe::new();
    if io.submitter().register_probe(&mut probe).is_err() {
        return Vec::new();
    }
    let known = VECTORED
        .into_iter()
        .filter(|code| probe.is_supported(*code));
    known.collect()
}

fn restrictions(vectored: &[u8]) -> Vec<Restriction> {
    let all = OPERATIONS.iter().chain(vectored);
    let mut list: Vec<_> = all.map(|code| Restriction::sqe_op(*code)).collect();
    list.push(Restriction::sqe_flags_required(
        squeue::Flags::FIXED_FILE.bits(),
    ));
    list.push(Restriction::register_op(REGISTER_FILES_UPDATE));
    list.push(Restriction::register_op(REGISTER_BUFFERS_UPDATE));
    list
}
