//! The simulator itself: deterministic, honest without faults, and as cruel as it says.

use super::*;
use crate::disk::conformance::conformance;
use crate::mem::{Arena, Share};

#[test]
fn simulated_disk_keeps_the_promises_of_a_disk() {
    for align in [512, 4096] {
        conformance(|depth| {
            Box::new(SimDisk::new(SimOptions {
                depth,
                align,
                refuses: true,
                ..SimOptions::default()
            }))
        });
    }
}

#[test]
#[should_panic(expected = "multiples of 512")]
fn a_misshapen_operation_does_not_pass() {
    let mut disk = SimDisk::new(SimOptions::default());
    let file = disk.create("file", 1 << 20).unwrap();
    let arena = Arena::create("test", 1 << 20, Share::Private).unwrap();
    let mut op = crate::disk::conformance::op(OpKind::Write, 1, file, 0, arena.alloc(8192));
    (op.buf_at, op.len) = (100, 4096);
    let _ = disk.submit(op);
}

fn run(options: SimOptions, ops: u64) -> (SimDisk, Vec<String>) {
    let mut disk = SimDisk::new(options);
    let file = disk.create("file", 1 << 20).unwrap();
    let arena = Arena::create("test", 1 << 20, Share::Private).unwrap();
    let (mut log, mut done) = (Vec::new(), Vec::new());
    for user in 0..ops {
        let kind = [OpKind::Write, OpKind::Read, OpKind::Sync][index(user % 3)];
        let mut buf = arena.alloc(8192).unwrap();
        buf.fill(u8::try_from(user % 250).unwrap());
        let (buf, len) = if kind == OpKind::Sync {
            (None, 0)
        } else {
            (Some(buf), 8192)
        };
        let op = Op {
            user,
            kind,
            file,
            at: user % 100 * 8192,
            buf,
            buf_at: 0,
            len,
            more: Vec::new(),
        };
        disk.submit(op).unwrap();
        disk.reap(Wait::No, &mut done);
        log.extend(
            done.drain(..)
                .map(|one| format!("{} {:?}", one.user, one.moved.ok())),
        );
    }
    (disk, log)
}

#[test]
fn the_same_seed_gives_the_same_run_and_another_seed_another() {
    let options = |seed| SimOptions {
        seed,
        faults: Faults::all(50_000),
        ..SimOptions::default()
    };
    assert_eq!(run(options(1), 200).1, run(options(1), 200).1);
    assert_ne!(run(options(1), 200).1, run(options(2), 200).1);
}

#[test]
fn without_faults_nothing_fires_and_every_operation_is_whole() {
    let (disk, log) = run(SimOptions::default(), 200);
    assert!(Fault::iter_all().all(|fault| disk.fired().times(fault) == 0));
    assert!(
        log.iter()
            .all(|line| line.ends_with("Some(8192)") || line.ends_with("Some(0)"))
    );
}

#[test]
fn a_crash_keeps_what_was_synced_and_loses_some_of_the_rest() {
    let mut disk = SimDisk::new(SimOptions::default());
    let file = disk.create("file", 1 << 20).unwrap();
    let arena = Arena::create("test", 1 << 20, Share::Private).unwrap();
    let write = |disk: &mut SimDisk, at: u64, fill: u8| {
        let mut buf = arena.alloc(16384).unwrap();
        buf.fill(fill);
        let (kind, buf) = (OpKind::Write, Some(buf));
        disk.submit(Op {
            user: 1,
            kind,
            file,
            at,
            buf,
            buf_at: 0,
            len: 16384,
            more: Vec::new(),
        })
        .unwrap();
        while disk.in_flight() > 0 {
            disk.reap(Wait::One, &mut Vec::new());
        }
    };
    write(&mut disk, 0, 1);
    let op = Op {
        user: 2,
        kind: OpKind::Sync,
        file,
        at: 0,
        buf: None,
        buf_at: 0,
        len: 0,
        more: Vec::new(),
    };
    disk.submit(op).unwrap();
    disk.reap(Wait::One, &mut Vec::new());
    write(&mut disk, 16384, 2);
    let (mut none, mut all, mut torn) = (0, 0, 0);
    for seed in 0..60 {
        let mut after = disk.crash(seed);
        let bytes = after.content("file").unwrap();
        assert!(
            bytes[..16384].iter().all(|byte| *byte == 1),
            "synced bytes were lost"
        );
        match bytes[16384..32768]
            .iter()
            .filter(|byte| **byte == 2)
            .count()
        {
            0 => none += 1,
            16384 => all += 1,
            _ => torn += 1,
        }
    }
    assert!(
        none > 5 && all > 5 && torn > 5,
        "{none} lost, {all} whole, {torn} torn"
    );
}

#[test]
fn the_power_goes_where_it_was_told_to() {
    let options = SimOptions {
        crash_at: Some(3),
        ..SimOptions::default()
    };
    let mut disk = SimDisk::new(options);
    assert!(disk.create("a", 4096).is_ok() && disk.list().is_ok() && disk.open("a").is_ok());
    assert!(!disk.has_crashed());
    assert!(disk.list().is_err() && disk.has_crashed());
    assert!(disk.crash(1).list().is_ok(), "the next life has power");
}

// A lane that hears of the cut reaps what it had in flight: none of those writes is there for
// certain, and none is gone for certain.
#[test]
fn writes_in_flight_when_the_power_goes_may_be_there_whoever_reaps_them() {
    let mut disk = SimDisk::new(SimOptions::default());
    let file = disk.create("file", 1 << 20).unwrap();
    let arena = Arena::create("test", 1 << 20, Share::Private).unwrap();
    for user in 0..5 {
        let mut buf = arena.alloc(8192).unwrap();
        buf.fill(1);
        let at = user * 8192;
        disk.submit(crate::disk::conformance::op(
            OpKind::Write,
            user,
            file,
            at,
            Some(buf),
        ))
        .unwrap();
    }
    disk.cut_power_after(0);
    assert!(disk.list().is_err());
    let mut done = Vec::new();
    while disk.in_flight() > 0 {
        disk.reap(Wait::One, &mut done);
    }
    assert!(done.len() == 5 && done.iter().all(|one| one.moved.is_err()));
    assert_eq!(disk.unsynced(), 5);
    let mut after = disk.crash_with(1, |write| match write {
        2 => Fate::Whole,
        _ => Fate::Lost,
    });
    let written = after.content("file").unwrap();
    assert_eq!(written.iter().filter(|byte| **byte == 1).count(), 8192);
}

#[test]
fn create_beyond_the_space_answers_enospc() {
    let mut disk = SimDisk::new(SimOptions {
        space: 10_000,
        ..SimOptions::default()
    });
    disk.create("a", 8192).unwrap();
    assert_eq!(disk.create("b", 8192).unwrap_err().raw_os_error(), Some(28));
}
