//! Whole transfers over a disk that interrupts, cuts short and refuses.
#![allow(clippy::cast_possible_truncation, reason = "test numbers are small")]

use std::io::ErrorKind;

use super::*;
use crate::disk::FileId;
use crate::disk::sim::{Fault, Faults, SimDisk, SimOptions};
use crate::mem::{Arena, Share};

mod queue;

fn lane(faults: Faults) -> (Lane<SimDisk>, FileId, IoBuf) {
    let options = SimOptions {
        faults,
        depth: 2,
        ..SimOptions::default()
    };
    let mut lane = Lane::new(SimDisk::new(options));
    let file = lane.disk().create("file", 1 << 20).unwrap();
    let arena = Arena::create("test", 1 << 20, Share::Private).unwrap();
    (lane, file, arena.alloc(64 << 10).unwrap())
}

#[test]
fn a_transfer_is_whole_in_spite_of_short_counts_and_interruptions() {
    let faults = Faults::default()
        .with(Fault::Short, 700_000)
        .with(Fault::Interrupted, 300_000);
    let (mut lane, file, mut buf) = lane(faults);
    for fill in 1..9u8 {
        buf.fill(fill);
        let (back, result) = lane.run(Transfer::write(file, 4096, buf, 64 << 10));
        result.unwrap();
        buf = back.unwrap();
        let written = &lane.disk().content("file").unwrap()[4096..][..64 << 10];
        assert!(written.iter().all(|byte| *byte == fill));
        buf.fill(0);
        let (back, result) = lane.run(Transfer::read(file, 4096, buf, 64 << 10));
        result.unwrap();
        buf = back.unwrap();
        assert!(buf.iter().all(|byte| *byte == fill));
    }
    assert!(lane.disk().fired().times(Fault::Short) > 0);
}

#[test]
fn a_read_behind_the_end_of_a_file_fails_and_gives_the_buffer_back() {
    let (mut lane, file, buf) = lane(Faults::default());
    let (buf, result) = lane.run(Transfer::read(file, (1 << 20) - 4096, buf, 64 << 10));
    assert_eq!(result.unwrap_err().kind(), ErrorKind::UnexpectedEof);
    assert!(buf.is_some());
}

#[test]
fn a_device_that_only_interrupts_fails_in_the_end() {
    let (mut lane, file, buf) = lane(Faults::default().with(Fault::Interrupted, 1_000_000));
    let (buf, result) = lane.run(Transfer::read(file, 0, buf, 4096));
    assert_eq!(result.unwrap_err().kind(), ErrorKind::Interrupted);
    assert!(buf.is_some());
}

#[test]
fn more_transfers_than_the_queue_takes_all_end_in_their_order() {
    let (mut lane, file, buf) = lane(Faults::default());
    let arena = std::sync::Arc::clone(buf.arena());
    let transfers: Vec<Transfer> = (0..10u8)
        .map(|number| {
            let mut buf = arena.alloc(4096).unwrap();
            buf.fill(number);
            Transfer::write(file, u64::from(number) * 4096, buf, 4096)
        })
        .collect();
    let results = lane.run_all(transfers);
    assert_eq!(results.len(), 10);
    for (number, (buf, result)) in results.into_iter().enumerate() {
        result.unwrap();
        assert_eq!(usize::from(buf.unwrap()[0]), number);
    }
}

#[test]
fn unsent_writes_end_and_unsent_reads_go_on_when_the_log_is_poisoned() {
    let (mut lane, file, buf) = lane(Faults::default());
    let arena = std::sync::Arc::clone(buf.arena());
    let buf = || arena.alloc(4096).unwrap();
    for _ in 0..4 {
        lane.start(Transfer::write(file, 0, buf(), 4096));
    }
    // Two of them fill the queue.
    lane.pump();
    let read = lane.start(Transfer::read(file, 0, buf(), 4096));
    lane.drop_unsent_writes();
    let mut finished = Vec::new();
    while lane.busy() > 0 {
        lane.collect(Wait::One, &mut finished);
    }
    assert_eq!(finished.len(), 5);
    assert_eq!(finished.iter().filter(|one| one.result.is_err()).count(), 2);
    assert!(
        finished
            .iter()
            .any(|one| one.user == read && one.result.is_ok())
    );
}

/// Writes `count` transfers of 64 KiB side by side, in the order that `order` gives, and returns
/// how many operations the device saw.
fn side_by_side(faults: Faults, order: &[u64]) -> (Lane<SimDisk>, FileId, u64) {
    let options = SimOptions {
        faults,
        depth: 4,
        ..SimOptions::default()
    };
    let mut lane = Lane::new(SimDisk::new(options));
    let file = lane.disk().create("file", 8 << 20).unwrap();
    let before = lane.disk_ref().taken();
    let arena = Arena::create("test", 8 << 20, Share::Private).unwrap();
    let transfers = order.iter().map(|number| {
        let mut buf = arena.alloc(64 << 10).unwrap();
        buf.fill(*number as u8 + 1);
        Transfer::write(file, number << 16, buf, 64 << 10)
    });
    for (_, result) in lane.run_all(transfers.collect()) {
        result.unwrap();
    }
    let operations = lane.disk_ref().taken() - before;
    (lane, file, operations)
}

fn read_back(lane: &mut Lane<SimDisk>, file: FileId, order: &[u64]) -> Vec<Result<(), Error>> {
    let arena = Arena::create("test", 8 << 20, Share::Private).unwrap();
    let transfer = |number: &u64| {
        let buf = arena.alloc(64 << 10).unwrap();
        Transfer::read(file, number << 16, buf, 64 << 10)
    };
    let results = lane.run_all(order.iter().map(transfer).collect());
    let mut outcomes = Vec::new();
    for ((buf, result), number) in results.into_iter().zip(order) {
        let buf = buf.expect("the buffer comes home");
        if result.is_ok() {
            let right = buf.iter().all(|byte| *byte == *number as u8 + 1);
            assert!(right, "bytes of {number} went elsewhere");
        }
        outcomes.push(result);
    }
    outcomes
}

#[test]
fn transfers_side_by_side_go_to_the_device_as_one_operation_whatever_their_order() {
    let up: Vec<u64> = (0..16).collect();
    let down: Vec<u64> = (0..16).rev().collect();
    let mixed = [3, 2, 4, 1, 5, 0, 9, 8, 7, 6, 10, 12, 11, 13, 15, 14];
    for order in [up.as_slice(), &down, &mixed] {
        let (mut lane, file, operations) = side_by_side(Faults::default(), order);
        assert_eq!(operations, 1, "1 MiB in {order:?}");
        assert!(read_back(&mut lane, file, order).iter().all(Result::is_ok));
    }
    // Apart they stay apart, and no operation grows without bound.
    let apart: Vec<u64> = (0..16).map(|number| number * 3).collect();
    assert_eq!(side_by_side(Faults::default(), &apart).2, 16);
    let many: Vec<u64> = (0..100).collect();
    let operations = side_by_side(Faults::default(), &many).2;
    assert!((4..=7).contains(&operations), "{operations}");
}

#[test]
fn short_counts_of_merged_operations_lose_nothing() {
    let faults = Faults::default()
        .with(Fault::Short, 600_000)
        .with(Fault::Interrupted, 200_000);
    let order: Vec<u64> = (0..60).collect();
    let (mut lane, file, _) = side_by_side(faults, &order);
    assert!(lane.disk_ref().fired().times(Fault::Short) > 0);
    assert!(read_back(&mut lane, file, &order).iter().all(Result::is_ok));
}

// D4: the error of an operation is nobody's until each transfer has had its own try.
#[test]
fn an_error_of_a_merged_operation_costs_no_transfer_but_its_own() {
    let order: Vec<u64> = (0..64).collect();
    let (mut lane, file, _) = side_by_side(Faults::default(), &order);
    let rare = Faults::default().with(Fault::ReadError, 100_000);
    lane.disk().set_faults(rare);
    let mut failed = 0;
    for _ in 0..20 {
        let outcomes = read_back(&mut lane, file, &order);
        failed += outcomes.iter().filter(|outcome| outcome.is_err()).count();
    }
    let errors = lane.disk_ref().fired().times(Fault::ReadError);
    assert!(
        errors > 0 && failed as u64 <= errors,
        "{failed} of {errors}"
    );
    assert!(failed < 64 * 20 / 5, "{failed}: whole operations failed");
}

#[test]
fn a_dead_lane_ends_every_transfer_of_a_merged_operation() {
    let (mut lane, file, _) = side_by_side(Faults::default(), &[0]);
    let arena = Arena::create("test", 8 << 20, Share::Private).unwrap();
    for number in 0..20u64 {
        let buf = arena.alloc(64 << 10).unwrap();
        lane.start(Transfer::read(file, number << 16, buf, 64 << 10));
    }
    lane.pump();
    lane.disk().die();
    let mut finished = Vec::new();
    while lane.busy() > 0 {
        lane.collect(Wait::One, &mut finished);
    }
    assert_eq!(finished.len(), 20);
    assert!(finished.iter().all(|one| one.result.is_err()));
    assert!(lane.has_failed(), "known before anybody hears of an error");
}

/// A lane with a reader that always has `open` reads, and the arena of both.
struct Beside {
    lane: Lane<SimDisk>,
    file: FileId,
    arena: std::sync::Arc<Arena>,
    reads: std::collections::BTreeSet<u64>,
    finished: Vec<Finished>,
}

impl Beside {
    fn new(faults: Faults) -> Self {
        let options = SimOptions {
            faults,
            depth: 16,
            ..SimOptions::default()
        };
        let mut lane = Lane::new(SimDisk::new(options));
        let file = lane.disk().create("file", 8 << 20).unwrap();
        Self {
            lane,
            file,
            arena: Arena::create("test", 8 << 20, Share::Private).unwrap(),
            reads: std::collections::BTreeSet::new(),
            finished: Vec::new(),
        }
    }

    fn keep_reading(&mut self, open: usize) {
        while self.reads.len() < open {
            let buf = self.arena.alloc(64 << 10).unwrap();
            let at = (4 << 20) + ((self.reads.len() as u64) << 18);
            let read = Transfer::read(self.file, at, buf, 64 << 10);
            self.reads.insert(self.lane.start(read));
        }
    }

    /// Collects until transfer `user` ends; says how many reads ended before it.
    fn run_until(&mut self, user: u64, open: usize) -> (usize, Finished) {
        let mut reads = 0;
        for _ in 0..100_000 {
            self.keep_reading(open);
            self.lane.collect(Wait::One, &mut self.finished);
            let ended: Vec<Finished> = self.finished.drain(..).collect();
            for one in ended {
                if one.user == user {
                    return (reads, one);
                }
                assert!(self.reads.remove(&one.user) && one.result.is_ok());
                reads += 1;
            }
        }
        panic!("F2: it never ended");
    }
}

fn noise(arena: &std::sync::Arc<Arena>, len: usize) -> IoBuf {
    let mut buf = arena.alloc(len).unwrap();
    let mut random = crate::disk::sim::Seeded::new(len as u64);
    buf.iter_mut().for_each(|byte| *byte = random.draw() as u8);
    buf
}

// Beside reads a save goes in pieces, none of them lost, and reads overtake it.
#[test]
fn a_save_beside_reads_goes_in_pieces_and_arrives_whole() {
    let faults = Faults::default()
        .with(Fault::Short, 200_000)
        .with(Fault::Interrupted, 200_000);
    for faults in [Faults::default(), faults] {
        for class in [Class::Save, Class::Background] {
            let mut beside = Beside::new(faults.clone());
            let buf = noise(&beside.arena, 256 << 10);
            let right = buf.to_vec();
            beside.keep_reading(8);
            beside.lane.collect(Wait::No, &mut beside.finished);
            let write = Transfer::write(beside.file, 4096, buf, 256 << 10);
            let user = beside.lane.start(write.of(class));
            let (reads, one) = beside.run_until(user, 8);
            one.result.unwrap();
            let bytes = &beside.lane.disk().content("file").unwrap()[4096..][..256 << 10];
            assert!(bytes == right, "a piece went elsewhere");
            assert!(reads > 32, "{reads} reads beside 32 pieces");
        }
    }
}

#[test]
fn a_read_does_not_wait_for_the_saves_before_it() {
    let mut beside = Beside::new(Faults::default());
    beside.keep_reading(1);
    let mut saves = Vec::new();
    for number in 0..32u64 {
        let buf = beside.arena.alloc(64 << 10).unwrap();
        let write = Transfer::write(beside.file, number << 16, buf, 64 << 10);
        saves.push(beside.lane.start(write.of(Class::Save)));
    }
    let first = *beside.reads.first().unwrap();
    while beside.reads.contains(&first) {
        beside.lane.collect(Wait::One, &mut beside.finished);
        for one in beside.finished.drain(..) {
            assert!(
                !saves.contains(&one.user),
                "a save of 64 KiB went before the read"
            );
            beside.reads.remove(&one.user);
        }
    }
}

// L3: a piece that is with the device when the log is poisoned is the last.
#[test]
fn a_poisoned_lane_sends_no_further_piece() {
    let mut beside = Beside::new(Faults::default());
    beside.keep_reading(4);
    let buf = noise(&beside.arena, 256 << 10);
    let write = Transfer::write(beside.file, 0, buf, 256 << 10);
    let user = beside.lane.start(write.of(Class::Save));
    beside.lane.collect(Wait::No, &mut beside.finished);
    beside.lane.drop_unsent_writes();
    let before = beside.lane.disk().content("file").unwrap().clone();
    let ended = beside.finished.iter().any(|one| one.user == user);
    if !ended {
        let (_, one) = beside.run_until(user, 4);
        assert!(one.result.is_err());
    }
    let after = beside.lane.disk().content("file").unwrap();
    let changed = before
        .iter()
        .zip(after.iter())
        .filter(|(a, b)| a != b)
        .count();
    assert!(changed <= pace::PIECE, "{changed} bytes after the end");
}

// What is held is let go in time, though nothing else happens: the lane wakes itself.
#[test]
fn work_that_is_held_goes_on_when_the_reader_leaves() {
    let mut beside = Beside::new(Faults::default());
    beside.keep_reading(4);
    let buf = beside.arena.alloc(1 << 20).unwrap();
    let write = Transfer::write(beside.file, 0, buf, 1 << 20);
    let user = beside.lane.start(write.of(Class::Background));
    let mut ended = Vec::new();
    for _ in 0..1000 {
        beside.lane.collect(Wait::One, &mut ended);
        if beside.lane.busy() == 0 {
            break;
        }
    }
    assert!(
        ended
            .iter()
            .any(|one| one.user == user && one.result.is_ok())
    );
    assert_eq!(ended.len(), 5);
}
