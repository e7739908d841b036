//! Promises of the io_uring lane that other lanes do not have.

use std::io::Write as _;

use rustix::thread::CapabilitySet;

use super::super::conformance::{arena, conformance, in_directories, op, read, run, write};
use super::*;
use crate::disk::OpKind;

/// Says that nothing was tested, past the test runner, which keeps what the print macros write.
fn skip(why: &str) {
    let _ = writeln!(
        std::io::stderr(),
        "SKIPPED a test of the io_uring lane: {why}"
    );
}

/// The lane in a fresh directory, or a printed line where the kernel forbids io_uring.
fn lane(depth: usize) -> Option<(RingLane, tempfile::TempDir)> {
    if let Err(why) = probe() {
        skip(&why.to_string());
        return None;
    }
    let home = tempfile::tempdir().unwrap();
    Some((RingLane::open(home.path(), depth).unwrap(), home))
}

#[test]
fn ring_lane_keeps_the_promises_of_a_disk() {
    if lane(1).is_none() {
        return;
    }
    let home = tempfile::tempdir().unwrap();
    conformance(in_directories(&home, |path, depth| {
        Box::new(RingLane::open(path, depth).unwrap())
    }));
}

#[test]
fn ring_moves_buffers_of_registered_and_other_arenas() {
    let Some((mut disk, _home)) = lane(4) else {
        return;
    };
    let file = disk.create("a", 4 << 20).unwrap();
    let (known, other) = (arena(4 << 20), arena(4 << 20));
    disk.attach(&known);
    assert_eq!(disk.registered_arenas(), 1, "{:?}", disk.report());
    for (tag, arena) in (1..).zip([&known, &other, &known]) {
        let mut buf = arena.alloc(1 << 20).unwrap();
        buf.fill(tag);
        let done = run(&mut disk, op(OpKind::Write, 0, file, 0, Some(buf)));
        assert_eq!(done.moved.unwrap(), 1 << 20);
        drop(done.buf);
        let buf = arena.alloc(1 << 20);
        let done = run(&mut disk, op(OpKind::Read, 0, file, 0, buf));
        assert!(done.buf.unwrap().iter().all(|byte| *byte == tag));
    }
}

#[test]
fn ring_reads_into_a_sealed_arena_that_others_can_only_read() {
    let Some((mut disk, _home)) = lane(4) else {
        return;
    };
    let file = disk.create("a", 1 << 20).unwrap();
    write(&mut disk, file, 0, &[9; 8192]);
    let arena = Arena::create("test", 4 << 20, crate::mem::Share::ReadOnly).unwrap();
    disk.attach(&arena);
    assert_eq!(disk.registered_arenas(), 1, "{:?}", disk.report());
    let done = run(&mut disk, op(OpKind::Read, 0, file, 0, arena.alloc(8192)));
    let at = done.buf.as_ref().unwrap().offset() as u64;
    let mut seen = [0; 8192];
    rustix::io::pread(arena.fd(), &mut seen, at).unwrap();
    assert_eq!(seen, [9; 8192]);
}

#[test]
fn ring_lets_go_of_an_arena_that_nobody_holds() {
    let Some((mut disk, _home)) = lane(4) else {
        return;
    };
    let first = arena(1 << 20);
    disk.attach(&first);
    disk.attach(&first);
    assert_eq!(disk.registered_arenas(), 1);
    drop(first);
    disk.attach(&arena(1 << 20));
    assert_eq!(
        disk.registered_arenas(),
        1,
        "the table fills up with the dead"
    );
}

#[test]
fn ring_works_on_after_it_moved_to_another_thread() {
    let Some((mut disk, _home)) = lane(4) else {
        return;
    };
    let file = disk.create("a", 1 << 20).unwrap();
    let arena = arena(1 << 20);
    disk.attach(&arena);
    write(&mut disk, file, 0, &[3; 4096]);
    let moved = std::thread::spawn(move || {
        let here = read(&mut disk, file, 0, 4096);
        let more = disk.create("b", 4096).unwrap();
        write(&mut disk, more, 0, &[4; 4096]);
        assert_eq!(disk.registered_arenas(), 1);
        (disk, here, more)
    });
    let (mut disk, there, more) = moved.join().unwrap();
    assert_eq!(there, [3; 4096]);
    assert_eq!(read(&mut disk, more, 0, 4096), [4; 4096]);
    drop(arena);
}

// Goal: D1 when the ring cannot be trusted any more.
// Method: move the lane to another thread with reads in flight, which ends it.
#[test]
fn ring_that_fails_answers_every_operation_and_leaks_its_memory() {
    let Some((mut disk, _home)) = lane(4) else {
        return;
    };
    let (file, arena) = (disk.create("a", 1 << 20).unwrap(), arena(16 << 10));
    for user in 0..4 {
        disk.submit(op(OpKind::Read, user, file, 0, arena.alloc(4096)))
            .unwrap();
    }
    let waker = disk.waker();
    let moved = std::thread::spawn(move || {
        let mut done = Vec::new();
        while done.len() < 4 {
            disk.reap(Wait::One, &mut done);
        }
        let (_, why) = disk.submit(op(OpKind::Sync, 9, file, 0, None)).unwrap_err();
        assert_eq!((why, disk.in_flight()), (SubmitError::Failed, 0));
        assert!(
            disk.create("b", 4096).is_err(),
            "a failed lane must not take files"
        );
        waker.wake();
        disk.reap(Wait::One, &mut done);
        done
    });
    let done = moved.join().unwrap();
    assert!(
        done.iter()
            .all(|one| one.moved.is_err() && one.buf.is_none())
    );
    assert!(
        arena.alloc(1).is_none(),
        "memory that a device may still write was given away"
    );
}

// Goal: an ordinary user with a small locked-memory limit gets a working lane and a clear line.
// Method: CAP_IPC_LOCK, which lifts the limit, belongs to a thread: drop it in this one.
#[test]
fn ring_goes_on_unregistered_and_names_the_limit_when_memory_cannot_be_locked() {
    let limit = rustix::process::getrlimit(rustix::process::Resource::Memlock).current;
    let Some(limit) = limit.and_then(|bytes| usize::try_from(bytes).ok()) else {
        return skip("locked memory is unlimited");
    };
    if limit > 64 << 20 {
        return skip(&format!(
            "{limit} bytes of locked memory are too many to fill"
        ));
    }
    let mut sets = rustix::thread::capabilities(None).unwrap();
    sets.effective.remove(CapabilitySet::IPC_LOCK);
    rustix::thread::set_capabilities(None, sets).unwrap();

    let Some((mut disk, _home)) = lane(4) else {
        return;
    };
    let large = arena(limit + (4 << 20));
    disk.attach(&large);
    assert_eq!(disk.registered_arenas(), 0);
    let report = disk.report();
    assert!(
        report
            .without
            .iter()
            .any(|line| line.contains("LimitMEMLOCK=")),
        "{report:?}"
    );
    let file = disk.create("a", 1 << 20).unwrap();
    let done = run(&mut disk, op(OpKind::Write, 0, file, 0, large.alloc(8192)));
    assert_eq!(done.moved.unwrap(), 8192);
}

#[test]
fn ring_refuses_operations_outside_its_restrictions() {
    let Some((mut disk, _home)) = lane(4) else {
        return;
    };
    assert!(disk.bind());
    if disk
        .without
        .iter()
        .any(|line| line.contains("restrictions"))
    {
        return skip(&format!("{:?}", disk.without));
    }
    let foreign = opcode::Nop::new().build().user_data(1);
    let unregistered = opcode::Fsync::new(types::Fd(0)).build().user_data(2);
    for entry in [foreign, unregistered] {
        // SAFETY: neither operation names memory.
        unsafe { disk.io.submission().push(&entry) }.unwrap();
        disk.io.submitter().submit_and_wait(1).unwrap();
        let result = disk.io.completion().next().unwrap().result();
        assert_eq!(result, -(Errno::ACCESS.raw_os_error()));
    }
    assert!(disk.io.submitter().register_personality().is_err());
}

#[test]
fn ring_takes_large_operations_at_once_and_small_ones_in_batches() {
    let Some((mut disk, _home)) = lane(64) else {
        return;
    };
    let (file, arena) = (disk.create("a", 4 << 20).unwrap(), arena(4 << 20));
    disk.submit(op(OpKind::Write, 0, file, 0, arena.alloc(1 << 20)))
        .unwrap();
    assert_eq!(disk.io.submission().len(), 0);
    disk.submit(op(OpKind::Read, 0, file, 0, arena.alloc(4096)))
        .unwrap();
    assert_eq!(disk.io.submission().len(), 1);
    for _ in 0..BATCH_MAX {
        disk.submit(op(OpKind::Read, 0, file, 0, arena.alloc(4096)))
            .unwrap();
    }
    assert!(disk.io.submission().len() < BATCH_MAX);
}
