//! Tests of an engine's memory: what is taken, and what a change of its size does.

use std::fs::File;
use std::os::fd::AsRawFd as _;

use rustix::fs::MemfdFlags;

use super::*;

const LEN: u64 = 16 << 10;

fn memfd(seals: SealFlags) -> OwnedFd {
    let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
    let fd = rustix::fs::memfd_create("engine", flags).unwrap();
    rustix::fs::ftruncate(&fd, LEN).unwrap();
    rustix::fs::fcntl_add_seals(&fd, seals).unwrap();
    fd
}

/// The same memory, sealed and not: mapped and not.
fn both() -> [Foreign; 2] {
    let sealed = Foreign::adopt(memfd(SealFlags::SHRINK), LEN).unwrap();
    let open = Foreign::adopt(memfd(SealFlags::empty()), LEN).unwrap();
    assert!(sealed.is_mapped() && !open.is_mapped());
    [sealed, open]
}

#[test]
fn copies_arrive_on_both_ways_and_nothing_leaves_the_region() {
    for memory in both() {
        memory.copy_in(4090, b"hello").unwrap();
        let mut seen = [0; 7];
        memory.copy_out(4089, &mut seen).unwrap();
        assert_eq!(&seen, b"\0hello\0");
        for (at, len) in [(LEN, 1), (LEN - 4, 5), (u64::MAX, 2), (0, 16_385)] {
            let mut bytes = vec![0; len];
            let outside = Lost::Outside { at, len, size: LEN };
            assert_eq!(memory.copy_in(at, &bytes), Err(outside));
            assert_eq!(memory.copy_out(at, &mut bytes), Err(outside));
        }
    }
}

// Goal: an engine that truncates its pool under the daemon gets an error; nobody gets a signal.
#[test]
fn a_file_that_shrinks_is_an_error_and_one_that_is_sealed_cannot() {
    let [sealed, open] = both();
    assert!(rustix::fs::ftruncate(&sealed.fd, 0).is_err());
    rustix::fs::ftruncate(&open.fd, 4096).unwrap();
    let resized = Lost::Resized {
        now: 4096,
        size: LEN,
    };
    assert_eq!(open.copy_out(8192, &mut [0; 16]), Err(resized));
    assert_eq!(open.unchanged(), Err(resized));
    assert_eq!(sealed.unchanged(), Ok(()));
}

#[test]
fn adopt_takes_no_file_on_a_disk_no_pipe_and_no_large_pages() {
    let file = tempfile::tempfile_in(env!("CARGO_MANIFEST_DIR")).unwrap();
    file.set_len(LEN).unwrap();
    let (pipe, _end) = rustix::pipe::pipe().unwrap();
    let null = File::options().read(true).write(true).open("/dev/null");
    for fd in [file.into(), pipe, null.unwrap().into()] {
        assert_eq!(Foreign::adopt(fd, LEN).unwrap_err(), Handover::NotMemory);
    }
    if let Ok(huge) = rustix::fs::memfd_create("huge", MemfdFlags::HUGETLB) {
        assert_eq!(Foreign::adopt(huge, 0).unwrap_err(), Handover::NotMemory);
    }
}

#[test]
fn adopt_says_what_is_wrong_with_memory_that_it_cannot_use() {
    let refused = |fd: OwnedFd, len: u64| Foreign::adopt(fd, len).unwrap_err();
    assert_eq!(
        refused(memfd(SealFlags::SHRINK), LEN + 1),
        Handover::TooSmall
    );
    for seal in [SealFlags::WRITE, SealFlags::FUTURE_WRITE] {
        assert_eq!(refused(memfd(seal), LEN), Handover::Sealed);
    }
    let again = |open: &mut std::fs::OpenOptions| {
        let path = format!("/proc/self/fd/{}", fd_of().as_raw_fd());
        open.open(path).map(OwnedFd::from)
    };
    let read_only = again(File::options().read(true)).unwrap();
    assert_eq!(refused(read_only, LEN), Handover::NotWritable);
    let appending = again(File::options().read(true).append(true)).unwrap();
    assert_eq!(refused(appending, LEN), Handover::NotWritable);
}

/// Memory that stays open as long as the tests run, to be opened again by its path.
fn fd_of() -> &'static OwnedFd {
    static MEMORY: std::sync::OnceLock<OwnedFd> = std::sync::OnceLock::new();
    MEMORY.get_or_init(|| memfd(SealFlags::empty()))
}
