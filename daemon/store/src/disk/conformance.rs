//! What every disk promises, as one suite that each lane runs.
//!
//! Upstairs:   the tests of `disk::ring`, `disk::file` and any other `Disk`.
//! Downstairs: `disk::Disk` only.
//!
//! Not here on purpose: nothing that only one lane can do, and no timing.

use std::collections::BTreeSet;
use std::io::ErrorKind;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use super::{Disk, Done, FileId, Op, OpKind, RUNS_MAX, Run, SubmitError, Wait};
use crate::mem::{Arena, IoBuf, Share};

/// Size of one test operation: a multiple of every alignment. Unit: bytes.
const STEP: usize = 8192;

/// Makes a fresh, empty disk of the depth that is asked for.
pub(crate) type Make<'a> = dyn FnMut(usize) -> Box<dyn Disk> + 'a;

type Promise = fn(&mut Make<'_>);
type Spoil = fn(&mut Op);

/// Runs every promise; the name of a broken one is printed before its panic.
pub(crate) fn conformance(mut make: impl FnMut(usize) -> Box<dyn Disk>) {
    let promises: [(&str, Promise); 12] = [
        ("cold calls tell the truth", cold_calls_tell_the_truth),
        ("failed create leaves no file", failed_create_leaves_no_file),
        ("written bytes come back", written_bytes_come_back),
        ("runs move in their order", runs_move_in_their_order),
        (
            "misshapen operations are refused",
            misshapen_operations_are_refused,
        ),
        ("read past the end is short", read_past_the_end_is_short),
        (
            "full queue returns the operation intact",
            full_queue_returns_the_operation_intact,
        ),
        (
            "waker ends the current or next wait",
            waker_ends_the_current_or_next_wait,
        ),
        (
            "a wait ends in time",
            a_wait_ends_in_time_and_hears_the_waker,
        ),
        (
            "every operation ends once",
            every_operation_ends_once_and_depth_is_respected,
        ),
        (
            "museum 01",
            museum_01_memory_of_an_operation_is_not_free_before_its_completion,
        ),
        ("drop waits", drop_waits_for_what_is_in_flight),
    ];
    for (name, promise) in promises {
        println!("{name}");
        promise(&mut make);
    }
}

/// Makes disks in numbered directories of `home`.
pub(crate) fn in_directories(
    home: &tempfile::TempDir,
    mut open: impl FnMut(&Path, usize) -> Box<dyn Disk>,
) -> impl FnMut(usize) -> Box<dyn Disk> {
    let mut made = 0;
    move |depth| {
        made += 1;
        let path = home.path().join(made.to_string());
        rustix::fs::mkdir(&path, rustix::fs::Mode::RWXU).unwrap();
        open(&path, depth)
    }
}

pub(crate) fn arena(len: usize) -> Arc<Arena> {
    Arena::create("conformance", len, Share::Private).unwrap()
}

pub(crate) fn op(kind: OpKind, user: u64, file: FileId, at: u64, buf: Option<IoBuf>) -> Op {
    let len = buf.as_ref().map_or(0, |buf| buf.len());
    Op {
        user,
        kind,
        file,
        at,
        buf,
        buf_at: 0,
        len,
        more: Vec::new(),
    }
}

/// Bytes that depend on `tag` and on their place.
fn pattern(tag: u64, len: usize) -> Vec<u8> {
    let byte = |i: u64| i.wrapping_mul(31) ^ (i >> 9) ^ tag.wrapping_mul(97);
    (0..len as u64).map(|i| byte(i).to_le_bytes()[0]).collect()
}

/// Submits one operation and waits for it.
pub(crate) fn run(disk: &mut dyn Disk, op: Op) -> Done {
    disk.submit(op).unwrap();
    let mut done = Vec::new();
    while done.is_empty() {
        disk.reap(Wait::One, &mut done);
    }
    done.pop().unwrap()
}

pub(crate) fn write(disk: &mut dyn Disk, file: FileId, at: u64, bytes: &[u8]) {
    let mut buf = arena(bytes.len()).alloc(bytes.len()).unwrap();
    buf.copy_from_slice(bytes);
    let done = run(disk, op(OpKind::Write, 0, file, at, Some(buf)));
    assert_eq!(done.moved.unwrap(), bytes.len());
}

pub(crate) fn read(disk: &mut dyn Disk, file: FileId, at: u64, len: usize) -> Vec<u8> {
    let buf = arena(len).alloc(len).unwrap();
    let done = run(disk, op(OpKind::Read, 0, file, at, Some(buf)));
    done.buf.unwrap()[..done.moved.unwrap()].to_vec()
}

pub(crate) fn cold_calls_tell_the_truth(make: &mut Make<'_>) {
    let mut disk = make(2);
    assert_eq!(disk.list().unwrap(), vec![]);
    assert_eq!(disk.open("a").unwrap_err().kind(), ErrorKind::NotFound);
    let file = disk.create("a", 3 * STEP as u64).unwrap();
    assert_eq!(
        disk.create("a", 1).unwrap_err().kind(),
        ErrorKind::AlreadyExists
    );
    let found = disk.list().unwrap();
    assert_eq!(
        (found.len(), found[0].name.as_str(), found[0].len),
        (1, "a", 3 * STEP as u64)
    );
    disk.close(file);
    let again = disk.open("a").unwrap();
    assert_ne!(
        file, again,
        "an old number must not name a file that was opened later"
    );
    disk.remove(again).unwrap();
    assert_eq!(disk.list().unwrap(), vec![]);
}

pub(crate) fn failed_create_leaves_no_file(make: &mut Make<'_>) {
    let mut disk = make(2);
    assert!(disk.create("huge", 1 << 62).is_err());
    for name in ["", ".", "..", "../up", "a/b", ".hidden", &"x".repeat(256)] {
        assert_eq!(
            disk.create(name, 1).unwrap_err().kind(),
            ErrorKind::InvalidInput,
            "{name}"
        );
    }
    assert_eq!(disk.list().unwrap(), vec![]);
}

pub(crate) fn written_bytes_come_back(make: &mut Make<'_>) {
    let mut disk = make(4);
    let file = disk.create("a", 16 * STEP as u64).unwrap();
    for tag in [5, 2, 9, 0] {
        write(&mut *disk, file, tag * STEP as u64, &pattern(tag, STEP));
    }
    let sync = run(&mut *disk, op(OpKind::Sync, 7, file, 0, None));
    assert_eq!(
        (sync.user, sync.kind, sync.moved.unwrap()),
        (7, OpKind::Sync, 0)
    );
    disk.close(file);
    let file = disk.open("a").unwrap();
    for tag in [9, 0, 5, 2] {
        assert_eq!(
            read(&mut *disk, file, tag * STEP as u64, STEP),
            pattern(tag, STEP)
        );
    }
    // A part of a larger buffer: the rest of it is left alone.
    let mut buf = arena(4 * STEP).alloc(3 * STEP).unwrap();
    buf.fill(0xEE);
    let mut part = op(OpKind::Read, 0, file, 2 * STEP as u64, Some(buf));
    (part.buf_at, part.len) = (STEP, STEP);
    let buf = run(&mut *disk, part).buf.unwrap();
    assert_eq!(buf[STEP..2 * STEP], pattern(2, STEP));
    assert!(
        buf[..STEP]
            .iter()
            .chain(&buf[2 * STEP..])
            .all(|byte| *byte == 0xEE)
    );
}

pub(crate) fn misshapen_operations_are_refused(make: &mut Make<'_>) {
    let mut disk = make(4);
    let file = disk.create("a", 16 * STEP as u64).unwrap();
    let spoil: [(&str, Spoil); 7] = [
        ("offset not aligned", |op| op.at += 1),
        ("place in buffer not aligned", |op| op.buf_at += 1),
        ("length not aligned", |op| op.len -= 1),
        ("length 0", |op| op.len = 0),
        ("end outside the buffer", |op| op.buf_at = STEP),
        ("offset past any file", |op| op.at = u64::MAX - 4095),
        ("no such file", |op| op.file = FileId(op.file.0 + 1)),
    ];
    for (what, spoil) in spoil {
        for kind in [OpKind::Read, OpKind::Write] {
            let buf = arena(STEP).alloc(STEP).unwrap();
            let generation = buf.generation();
            let mut bad = op(kind, 11, file, 0, Some(buf));
            spoil(&mut bad);
            let done = run(&mut *disk, bad);
            assert_eq!(
                done.moved.expect_err(what).kind(),
                ErrorKind::InvalidInput,
                "{what}"
            );
            assert_eq!(
                (done.user, done.buf.unwrap().generation()),
                (11, generation)
            );
        }
    }
    let without = Op {
        len: STEP,
        ..op(OpKind::Read, 0, file, 0, None)
    };
    assert!(run(&mut *disk, without).moved.is_err());
    disk.close(file);
    assert!(
        run(&mut *disk, op(OpKind::Sync, 0, file, 0, None))
            .moved
            .is_err()
    );
}

pub(crate) fn read_past_the_end_is_short(make: &mut Make<'_>) {
    let mut disk = make(2);
    let file = disk.create("a", 2 * STEP as u64).unwrap();
    write(&mut *disk, file, STEP as u64, &pattern(1, STEP));
    assert_eq!(
        read(&mut *disk, file, STEP as u64, 4 * STEP),
        pattern(1, STEP)
    );
    assert!(read(&mut *disk, file, 2 * STEP as u64, STEP).is_empty());
}

pub(crate) fn full_queue_returns_the_operation_intact(make: &mut Make<'_>) {
    let mut disk = make(3);
    let (file, arena) = (disk.create("a", 8 * STEP as u64).unwrap(), arena(8 * STEP));
    for user in 0..3 {
        disk.submit(op(OpKind::Read, user, file, 0, arena.alloc(STEP)))
            .unwrap();
    }
    let mut buf = arena.alloc(STEP).unwrap();
    buf.fill(0x77);
    let generation = buf.generation();
    let (back, why) = disk
        .submit(op(OpKind::Write, 9, file, 0, Some(buf)))
        .unwrap_err();
    assert_eq!(why, SubmitError::Full { depth: 3 });
    let buf = back.buf.as_ref().unwrap();
    assert_eq!(
        (back.user, buf.generation(), disk.in_flight()),
        (9, generation, 3)
    );
    assert!(buf.iter().all(|byte| *byte == 0x77));

    let mut done = Vec::new();
    while done.is_empty() {
        disk.reap(Wait::One, &mut done);
    }
    disk.submit(back).expect("a completion makes room");
}

/// Too short fails here; too long would hang.
pub(crate) fn a_wait_ends_in_time_and_hears_the_waker(make: &mut Make<'_>) {
    let mut disk = make(2);
    let (waker, mut done) = (disk.waker(), Vec::new());
    let (before, most) = (disk.now(), Duration::from_millis(3));
    disk.reap(Wait::For(most), &mut done);
    assert!(disk.now() >= before + most, "it ended early");
    disk.reap(Wait::For(Duration::ZERO), &mut done);

    waker.wake();
    disk.reap(Wait::For(Duration::from_secs(86_400)), &mut done);
    let file = disk.create("file", 4 * STEP as u64).unwrap();
    let buf = arena(STEP).alloc(STEP).unwrap();
    disk.submit(op(OpKind::Read, 1, file, 0, Some(buf)))
        .unwrap();
    while done.is_empty() {
        disk.reap(Wait::For(Duration::from_secs(86_400)), &mut done);
    }
    assert_eq!(done.len(), 1);
}

pub(crate) fn waker_ends_the_current_or_next_wait(make: &mut Make<'_>) {
    let mut disk = make(2);
    let waker = disk.waker();
    let mut done = Vec::new();
    disk.reap(Wait::No, &mut done);

    waker.wake();
    waker.wake();
    disk.reap(Wait::One, &mut done);

    // A wake that a non-blocking reap runs into is kept for the next wait.
    waker.wake();
    disk.reap(Wait::No, &mut done);
    disk.reap(Wait::No, &mut done);
    disk.reap(Wait::One, &mut done);

    // Each of many wakes from elsewhere is heard: a lost one would hang here.
    let (ask, asked) = std::sync::mpsc::channel();
    let other = std::thread::spawn(move || asked.iter().for_each(|()| waker.wake()));
    for _ in 0..1000 {
        ask.send(()).unwrap();
        disk.reap(Wait::One, &mut done);
    }
    drop(ask);
    other.join().unwrap();
    assert!(done.is_empty());
}

pub(crate) fn every_operation_ends_once_and_depth_is_respected(make: &mut Make<'_>) {
    const DEPTH: usize = 5;
    const OPS: u64 = 400;
    const KINDS: [OpKind; 3] = [OpKind::Write, OpKind::Read, OpKind::Sync];
    let mut disk = make(DEPTH);
    let (file, arena) = (
        disk.create("a", 64 * STEP as u64).unwrap(),
        arena(16 * STEP),
    );
    let (mut ended, mut done, mut next) = (BTreeSet::new(), Vec::new(), 0);
    while (ended.len() as u64) < OPS {
        while next < OPS && disk.in_flight() < disk.depth() {
            let at = next % 64 * STEP as u64;
            let kind = KINDS[usize::try_from(next % 3).unwrap()];
            let buf = if kind == OpKind::Sync {
                None
            } else {
                arena.alloc(STEP)
            };
            let at = if kind == OpKind::Sync { 0 } else { at };
            disk.submit(op(kind, next, file, at, buf)).unwrap();
            next += 1;
        }
        assert!(disk.in_flight() <= DEPTH);
        let before = disk.in_flight();
        disk.reap(if next % 2 == 0 { Wait::One } else { Wait::No }, &mut done);
        assert_eq!(disk.in_flight() + done.len(), before);
        for one in done.drain(..) {
            assert!(ended.insert(one.user), "operation {} ended twice", one.user);
            assert_eq!(
                one.moved.unwrap(),
                if one.kind == OpKind::Sync { 0 } else { STEP }
            );
        }
    }
    assert_eq!(ended.last(), Some(&(OPS - 1)));
    assert_eq!(
        arena.free_bytes(),
        arena.capacity(),
        "a buffer did not come home"
    );
}

// Goal: bug museum, row 1: whoever asked for a read goes away, its memory is reused, and the
// device then writes into somebody else's bytes.
// Method: an arena of exactly as many buffers as operations. Everything the caller holds is
// dropped at once. Memory must stay taken until an operation is reaped; what is cut then is
// filled with a mark that no later completion may change.
pub(crate) fn museum_01_memory_of_an_operation_is_not_free_before_its_completion(
    make: &mut Make<'_>,
) {
    const DEPTH: usize = 16;
    let mut disk = make(DEPTH);
    let file = disk.create("a", 64 * STEP as u64).unwrap();
    for tag in 0..64 {
        write(&mut *disk, file, tag * STEP as u64, &pattern(tag, STEP));
    }
    let arena = arena(DEPTH * STEP);
    let mut done = Vec::new();
    for round in 0..200 {
        for user in 0..DEPTH as u64 {
            let at = (user + round) % 64 * STEP as u64;
            disk.submit(op(OpKind::Read, user, file, at, arena.alloc(STEP)))
                .unwrap();
        }
        assert!(
            arena.alloc(1).is_none(),
            "memory of an operation in flight was given away"
        );
        let mut reused = Vec::new();
        while disk.in_flight() > 0 {
            disk.reap(Wait::One, &mut done);
            done.clear();
            while let Some(mut buf) = arena.alloc(STEP) {
                buf.fill(0xA5);
                reused.push(buf);
            }
            assert_eq!(reused.len() + disk.in_flight(), DEPTH);
        }
        let marked = reused
            .iter()
            .all(|buf| buf.iter().all(|byte| *byte == 0xA5));
        assert!(marked, "a completed operation still wrote");
    }
}

pub(crate) fn drop_waits_for_what_is_in_flight(make: &mut Make<'_>) {
    const DEPTH: usize = 16;
    let arena = arena(DEPTH * STEP);
    for _ in 0..20 {
        let mut disk = make(DEPTH);
        let file = disk.create("a", DEPTH as u64 * STEP as u64).unwrap();
        // Written first: a read of space that was only reserved would not reach the device.
        write(&mut *disk, file, 0, &pattern(1, DEPTH * STEP));
        for user in 0..DEPTH as u64 {
            let at = user * STEP as u64;
            disk.submit(op(OpKind::Read, user, file, at, arena.alloc(STEP)))
                .unwrap();
        }
        drop(disk);
        assert_eq!(arena.free_bytes(), arena.capacity());
        let mut all = arena.alloc(DEPTH * STEP).unwrap();
        all.fill(0xA5);
        std::thread::yield_now();
        assert!(
            all.iter().all(|byte| *byte == 0xA5),
            "the device wrote after the disk was gone"
        );
    }
}

pub(crate) fn runs_move_in_their_order(make: &mut Make<'_>) {
    let mut disk = make(2);
    let file = disk.create("a", 16 * STEP as u64).unwrap();
    // Two arenas, one of which the lane may have registered: the runs need not lie in one.
    let arenas = [arena(16 * STEP), arena(16 * STEP)];
    disk.attach(&arenas[0]);
    for both in [false, true] {
        let from = |number: usize| &arenas[usize::from(both && number % 2 == 1)];
        let run = |number: usize, fill: Option<u64>| {
            let mut buf = from(number).alloc(2 * STEP).unwrap();
            buf.fill(0);
            if let Some(tag) = fill {
                buf[STEP..].copy_from_slice(&pattern(tag, STEP));
            }
            Run {
                buf,
                buf_at: STEP,
                len: STEP,
            }
        };
        let vectored = |kind, fill: fn(u64) -> Option<u64>| {
            let Run { buf, buf_at, len } = run(0, fill(0));
            let more = (1..4)
                .map(|number| run(number, fill(number as u64)))
                .collect();
            Op {
                buf_at,
                len,
                more,
                ..op(kind, 1, file, STEP as u64, Some(buf))
            }
        };
        let done = super::conformance::run(&mut *disk, vectored(OpKind::Write, Some));
        assert_eq!((done.moved.unwrap(), done.more.len()), (4 * STEP, 3));
        let all: Vec<u8> = (0..4).flat_map(|tag| pattern(tag, STEP)).collect();
        assert_eq!(read(&mut *disk, file, STEP as u64, 4 * STEP), all);
        drop(done.more);
        let done = super::conformance::run(&mut *disk, vectored(OpKind::Read, |_| None));
        assert_eq!(done.moved.unwrap(), 4 * STEP);
        let bufs = done.buf.iter().chain(done.more.iter().map(|run| &run.buf));
        let back: Vec<u8> = bufs.flat_map(|buf| buf[STEP..].to_vec()).collect();
        assert!(back == all, "runs came back in another order");
    }
    let mut many = op(OpKind::Read, 2, file, 0, arenas[0].alloc(4096));
    let small = arena(4096 * (RUNS_MAX + 1));
    let more = (0..=RUNS_MAX).map(|_| Run {
        buf: small.alloc(4096).unwrap(),
        buf_at: 0,
        len: 4096,
    });
    many.more = more.collect();
    let done = super::conformance::run(&mut *disk, many);
    assert_eq!(done.moved.unwrap_err().kind(), ErrorKind::InvalidInput);
    assert_eq!(done.more.len(), RUNS_MAX + 1, "refused memory comes home");
}
