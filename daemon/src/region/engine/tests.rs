//! Tests of an engine's slots: one transfer at a time, names that are good once, and an end.

use std::os::fd::AsFd;

use kvtier_proto::{PayloadKind, Piece};
use rustix::fs::{MemfdFlags, SealFlags};

use super::*;
use crate::region::tests::planned;

const SLOT: usize = 100;

/// Four slots of 100 bytes in two rows each, and the file that they lie in.
fn region() -> (Arc<EngineRegion>, OwnedFd) {
    let piece = Piece {
        offset: 10,
        slot_stride: 200,
        rows: 2,
        row_bytes: 50,
        row_stride: 75,
    };
    let geometry = RegionGeometry {
        kind: PayloadKind::Opaque,
        slots: 4,
        pieces: vec![piece],
    };
    geometry.check(1000, None).unwrap();
    let region = EngineRegion::new(3, 1000, geometry, Arc::new(Metrics::new()));
    let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
    let fd = rustix::fs::memfd_create("engine", flags).unwrap();
    rustix::fs::ftruncate(&fd, 1000).unwrap();
    (Arc::new(region), fd)
}

fn adopted() -> (Arc<EngineRegion>, OwnedFd) {
    let (region, fd) = region();
    assert_eq!(
        region.adopt(fd.as_fd().try_clone_to_owned().unwrap()),
        Handover::Taken
    );
    (region, fd)
}

fn bytes_at(fd: &OwnedFd, at: u64) -> u8 {
    let mut byte = [0];
    rustix::io::pread(fd, &mut byte, at).unwrap();
    byte[0]
}

#[test]
fn write_puts_each_row_in_its_place_and_take_reads_it_back() {
    let (region, fd) = adopted();
    let payload: Vec<u8> = (0..100).collect();
    let reserved = region.reserve(&[2, 1]).unwrap();
    reserved.write(1, &payload).unwrap();
    assert_eq!(
        [bytes_at(&fd, 210), bytes_at(&fd, 259), bytes_at(&fd, 260)],
        [0, 49, 0]
    );
    assert_eq!(
        [bytes_at(&fd, 285), bytes_at(&fd, 334), bytes_at(&fd, 335)],
        [50, 99, 0]
    );
    let wrong = Unmoved::Size {
        block: 99,
        slot: SLOT,
    };
    assert_eq!(reserved.write(0, &payload[..99]), Err(wrong));
    drop(reserved);
    let name = region.grant(planned(1, SLOT as u64), 1).unwrap();
    let taken = region.take(&name, &[1; 32]).unwrap();
    let mut copy = vec![0; SLOT];
    taken.copy_into(&mut copy).unwrap();
    assert_eq!(copy, payload);
    let moved = |way| region.metrics.region_moved.of(way).get();
    assert_eq!((moved(Moved::Restored), moved(Moved::Saved)), (100, 100));
}

#[test]
fn reserve_lends_all_slots_or_none_and_take_knows_a_name_once() {
    let (region, _fd) = adopted();
    let number = BadSlot::Number { slot: 4, slots: 4 };
    assert_eq!(region.reserve(&[0, 4]).unwrap_err(), number);
    assert_eq!(region.reserve(&[0, 1, 0]).unwrap_err(), BadSlot::Twice(0));
    let reserved = region.reserve(&[0, 1]).unwrap();
    assert_eq!(region.reserve(&[2, 1]).unwrap_err(), BadSlot::Busy(1));
    assert!(region.grant(planned(1, 100), 1).is_none());
    drop(reserved);
    let name = region.grant(planned(1, 100), 1).unwrap();
    let changed: [fn(&mut SlotName); 4] = [
        |name| name.region += 1,
        |name| name.offset += 1,
        |name| name.length += 1,
        |name| name.generation += 1,
    ];
    for change in changed {
        let mut other = name;
        change(&mut other);
        assert_eq!(region.take(&other, &[1; 32]).unwrap_err(), StaleSlot);
    }
    assert_eq!(region.take(&name, &[2; 32]).unwrap_err(), StaleSlot);
    let taken = region.take(&name, &[1; 32]).unwrap();
    assert_eq!(region.take(&name, &[1; 32]).unwrap_err(), StaleSlot);
    assert_eq!(region.release(&name), Err(StaleSlot), "it is on its way");
    drop(taken);
    let name = region.grant(planned(1, 100), 1).unwrap();
    region.release(&name).unwrap();
    assert_eq!(region.release(&name), Err(StaleSlot));
    assert!(region.reserve(&[0, 1, 2, 3]).is_ok());
}

#[test]
fn nothing_moves_without_memory_or_after_close() {
    let (region, fd) = region();
    let reserved = region.reserve(&[0]).unwrap();
    assert_eq!(reserved.write(0, &[1; 100]), Err(Unmoved::NoMemory));
    assert_eq!(
        region.adopt(fd.as_fd().try_clone_to_owned().unwrap()),
        Handover::Taken
    );
    let again = region.adopt(fd.as_fd().try_clone_to_owned().unwrap());
    assert_eq!(again, Handover::Refused, "one descriptor a region");
    region.close();
    assert_eq!(reserved.write(0, &[1; 100]), Err(Unmoved::Closed));
    assert_eq!(bytes_at(&fd, 10), 0);
}

// Goal: R5. A file that was cut short and made longer again has lost bytes.
#[test]
fn a_file_that_changed_its_size_is_not_used_any_more() {
    let (region, fd) = adopted();
    let reserved = region.reserve(&[0]).unwrap();
    reserved.write(0, &[1; 100]).unwrap();
    rustix::fs::ftruncate(&fd, 20).unwrap();
    let lost = reserved.write(0, &[1; 100]);
    assert!(matches!(lost, Err(Unmoved::Lost(_))), "{lost:?}");
    rustix::fs::ftruncate(&fd, 1000).unwrap();
    assert_eq!(reserved.write(0, &[1; 100]), Err(Unmoved::Closed));
    let refused = &region.metrics.regions_refused;
    assert_eq!(refused.of(RegionRefused::Lost).get(), 1);
}

#[test]
fn a_sealed_file_is_mapped_and_keeps_its_size() {
    let (region, fd) = region();
    rustix::fs::fcntl_add_seals(&fd, SealFlags::SHRINK).unwrap();
    assert_eq!(
        region.adopt(fd.as_fd().try_clone_to_owned().unwrap()),
        Handover::Taken
    );
    assert!(region.memory.get().unwrap().is_mapped());
    assert!(rustix::fs::ftruncate(&fd, 20).is_err());
    rustix::fs::ftruncate(&fd, 2000).unwrap();
    region.reserve(&[3]).unwrap().write(0, &[9; 100]).unwrap();
    assert_eq!(bytes_at(&fd, 10 + 600), 9);
}
