//! Whole transfers over a disk that interrupts, cuts short and refuses.

use super::*;
use crate::disk::sim::{Fault, Faults, SimDisk, SimOptions};
use crate::mem::{Arena, Share};

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
