//! The superblock survives what it must, and an acknowledged wipe is never forgotten.

use kvtier_proto::Miss;

use super::*;
use crate::disk::sim::{Fault, Faults, SimDisk, SimOptions};
use crate::testkit::*;
use crate::{SuperblockFound, WipeError};

const SLOT: usize = 64 << 10;

fn wiped_store() -> SimDisk {
    let mut store = Fixture::new();
    store.put_all(0..5);
    store.store.wipe(NS, &mut Vec::new()).unwrap();
    store.store.abandon()
}

#[test]
fn a_wipe_outlives_crashes_and_damage_to_either_slot() {
    for slot in [None, Some(0), Some(1)] {
        let mut disk = wiped_store().crash(2);
        if let Some(slot) = slot {
            disk.content(SUPERBLOCK_NAME).unwrap()[slot * SLOT + 20] ^= 1;
        }
        let mut store = Fixture::reopened(disk);
        let found = store.report.superblock;
        assert_eq!(found == SuperblockFound::OneSlot, slot.is_some());
        assert_eq!(store.report.wiped, 5);
        assert!((0..5).all(|number| !store.hits(number)));
        store.put_all(0..5);
        assert!((0..5).all(|number| store.hits(number)), "a wipe is no ban");
        // Both slots are whole again after an opening.
        let report = Fixture::reopened(store.store.abandon().crash(1)).report;
        assert_eq!(report.superblock, SuperblockFound::Sound);
    }
}

// Goal: a wipe that was not made durable can be repeated by a later process, and takes exactly what
// it took the first time.
#[test]
fn a_wipe_repeated_by_its_sequence_leaves_what_was_put_since() {
    let mut store = Fixture::new();
    store.put_all(0..5);
    let forgotten = store.store.forget_namespace(NS, None, &mut Vec::new());
    assert_eq!(forgotten.blocks, 5);
    assert!((0..5).all(|number| !store.hits(number)), "at once");
    store.put_all(5..10);
    let mut store = Fixture::reopened(store.store.abandon().crash(1));
    assert!(store.store.wiped_below(NS) < forgotten.below);
    assert!(
        (0..10).all(|number| store.hits(number)),
        "nothing was durable"
    );
    let again = store
        .store
        .forget_namespace(NS, Some(forgotten.below), &mut Vec::new());
    assert_eq!(again, forgotten);
    store.store.keep_wipes(NS, &mut Vec::new()).unwrap();
    let mut store = Fixture::reopened(store.store.abandon().crash(1));
    assert_eq!(store.store.wiped_below(NS), forgotten.below);
    assert!((0..5).all(|number| !store.hits(number)));
    assert!((5..10).all(|number| store.hits(number)));
}

// P4: whoever wipes again and again asks nothing of the device that others wait for.
#[test]
fn a_wipe_of_what_is_wiped_already_asks_nothing_of_the_device() {
    let mut store = Fixture::new();
    store.put_all(0..5);
    assert_eq!(store.store.wipe(NS, &mut Vec::new()).unwrap(), 5);
    store.store.forget_namespace(OTHER, None, &mut Vec::new());
    store.store.keep_wipes(OTHER, &mut Vec::new()).unwrap();
    let below = store.store.wiped_below(NS);
    let before = store.store.disk().taken();
    for namespace in [NS, OTHER, NS] {
        assert_eq!(store.store.wipe(namespace, &mut Vec::new()).unwrap(), 0);
    }
    // What waits goes all the same, and nothing of it was written.
    let waiting = store.put(NS, 5, 0);
    let mut events = Vec::new();
    let forgotten = store.store.forget_namespace(NS, None, &mut events);
    assert_eq!((forgotten.below, forgotten.blocks), (below, 0));
    events.into_iter().for_each(|event| store.note(event));
    assert!(matches!(
        store.puts[&waiting],
        Err(crate::PutError::Wiped { .. })
    ));
    assert_eq!(store.store.disk().taken(), before);
    // What was put since is wiped by the next, and what the next writes is durable.
    store.put_all(5..8);
    assert_eq!(store.store.wipe(NS, &mut Vec::new()).unwrap(), 3);
    let mut store = Fixture::reopened(store.store.abandon().crash(1));
    assert!((0..8).all(|number| !store.hits(number)));
}

// L2: bytes of a put that failed may be on the device: they are wiped like any other.
#[test]
fn a_wipe_after_a_put_that_failed_is_a_new_one() {
    let mut store = Fixture::new();
    store.store.wipe(NS, &mut Vec::new()).unwrap();
    let failing = Faults::default().with(Fault::WriteError, 1_000_000);
    store.put_all([1]);
    store.store.wipe(NS, &mut Vec::new()).unwrap();
    store.store.disk_mut().set_faults(failing);
    let tag = store.put(NS, 2, 0);
    store.rest();
    assert!(store.puts[&tag].is_err());
    store.store.disk_mut().set_faults(Faults::default());
    let below = store.store.wiped_below(NS);
    store.store.wipe(NS, &mut Vec::new()).unwrap();
    assert!(store.store.wiped_below(NS) > below);
}

#[test]
fn without_a_sound_slot_every_record_is_stale_and_the_store_works() {
    let mut store = Fixture::new();
    store.put_all(0..5);
    let mut disk = store.store.abandon().crash(1);
    disk.content(SUPERBLOCK_NAME).unwrap().fill(0x11);
    let mut options = options();
    options.new_store_id = crate::StoreId([0x77; 16]);
    let mut store = Fixture::on(disk, options, None);
    assert_eq!(store.report.superblock, SuperblockFound::Lost);
    assert!((0..5).all(|number| !store.hits(number)));
    store.put_all(0..5);
    assert!((0..5).all(|number| store.hits(number)));
}

// A superblock from a backup has forgotten a wipe: it must not bring the records back.
#[test]
fn a_superblock_older_than_a_segment_is_worth_nothing() {
    let mut store = Fixture::new();
    store.put_all(0..5);
    let mut disk = store.store.abandon().crash(1);
    let old = disk.content(SUPERBLOCK_NAME).unwrap().clone();
    let mut store = Fixture::reopened(disk);
    store.store.wipe(NS, &mut Vec::new()).unwrap();
    store.put_all(10..15);
    let mut disk = store.store.abandon().crash(1);
    disk.plant(SUPERBLOCK_NAME, old);
    let mut options = options();
    options.new_store_id = crate::StoreId([0x77; 16]);
    let mut store = Fixture::on(disk, options, None);
    assert_eq!(store.report.superblock, SuperblockFound::Lost);
    assert_eq!(store.get(&want(NS, 1)), Err(Miss::Absent));
}

#[test]
fn a_wipe_whose_writes_get_lost_is_not_acknowledged() {
    let mut store = Fixture::new();
    store.put_all(0..5);
    for fault in [Fault::LostWrite, Fault::WriteError, Fault::FlipOnWrite] {
        store
            .store
            .disk_mut()
            .set_faults(Faults::default().with(fault, 1_000_000));
        let outcome = store.store.wipe(NS, &mut Vec::new());
        assert!(
            matches!(outcome, Err(WipeError::Superblock { .. })),
            "{fault:?}"
        );
        assert!(!store.hits(1), "gone from this process all the same");
    }
    store.store.disk_mut().set_faults(Faults::default());
    store.store.wipe(NS, &mut Vec::new()).unwrap();
    let mut store = Fixture::reopened(store.store.abandon().crash(3));
    assert!((0..5).all(|number| !store.hits(number)));
}

// L3: no second sync is asked for what the first one failed to keep.
#[test]
fn a_wipe_whose_sync_fails_is_not_acknowledged_and_stops_the_log() {
    let mut store = Fixture::new();
    store.put_all(0..5);
    let failing = Faults::default().with(Fault::SyncError, 1_000_000);
    store.store.disk_mut().set_faults(failing);
    let outcome = store.store.wipe(NS, &mut Vec::new());
    assert!(matches!(outcome, Err(WipeError::Superblock { .. })));
    assert_eq!(store.store.disk().fired().times(Fault::SyncError), 1);
    store.store.disk_mut().set_faults(Faults::default());
    assert_eq!(store.store.state(), crate::DeviceState::ReadOnly);
    let outcome = store.store.wipe(NS, &mut Vec::new());
    assert!(matches!(outcome, Err(WipeError::Poisoned { .. })));
}

#[test]
fn a_device_that_delivers_no_slot_is_an_error_and_forgets_nothing() {
    let mut store = Fixture::new();
    store.put_all(0..5);
    let mut disk = store.store.abandon().crash(1);
    disk.set_faults(Faults::default().with(Fault::ReadError, 1_000_000));
    let sound = disk.restart(1);
    let outcome = crate::Store::open(disk, options(), None, &mut |_| {});
    assert!(matches!(outcome, Err(crate::OpenError::Superblock(_))));
    assert!(Fixture::reopened(sound).hits(1));
}

#[test]
fn a_device_that_takes_no_write_opens_read_only() {
    let mut store = Fixture::new();
    store.put_all(0..5);
    let disk = store.store.abandon().crash(1);
    let faults = Faults::default().with(Fault::WriteError, 1_000_000);
    let disk = disk.clone_with(SimOptions {
        faults,
        ..SimOptions::default()
    });
    let mut store = Fixture::reopened(disk);
    assert_eq!(store.store.state(), crate::DeviceState::ReadOnly);
    assert!((0..5).all(|number| store.hits(number)));
}

#[test]
fn a_store_that_opens_read_only_removes_and_writes_nothing() {
    let mut store = Fixture::new();
    store.put_all(0..70);
    let disk = store.store.abandon().crash(1);
    let faults = Faults::default().with(Fault::WriteError, 1_000_000);
    let disk = disk.clone_with(SimOptions {
        faults,
        ..SimOptions::default()
    });
    let mut smaller = options();
    smaller.capacity = 4 * smaller.segment_size;
    let store = Fixture::on(disk, smaller, None);
    assert_eq!(store.report.removed, 0);
    let superblock_tries = u64::from(TRIES);
    let failed = store.store.disk().fired().times(Fault::WriteError);
    assert_eq!(failed, superblock_tries, "only the superblock was tried");
}

#[test]
fn a_sound_superblock_in_a_file_of_another_length_is_refused_and_kept() {
    for len in [SLOT, SLOT + 100, 3 * SLOT] {
        let mut store = Fixture::new();
        store.put_all(0..5);
        let mut disk = store.store.abandon().crash(1);
        let mut bytes = disk.content(SUPERBLOCK_NAME).unwrap().clone();
        let whole = bytes.clone();
        bytes.resize(len, 0);
        disk.plant(SUPERBLOCK_NAME, bytes);
        let mut kept = disk.restart(1);
        let problem = crate::Store::open(disk, options(), None, &mut |_| {}).unwrap_err();
        let text = problem.to_string();
        assert!(text.contains("truncate -s 131072"), "{text}");
        kept.plant(SUPERBLOCK_NAME, whole);
        assert!(Fixture::reopened(kept).hits(1));
    }
}

#[test]
fn a_file_that_grew_is_kept_for_its_second_slot_alone() {
    let mut store = Fixture::new();
    store.put_all(0..5);
    let mut disk = store.store.abandon().crash(1);
    let bytes = disk.content(SUPERBLOCK_NAME).unwrap();
    bytes[20] ^= 1;
    bytes.resize(3 * SLOT, 0);
    let problem = crate::Store::open(disk, options(), None, &mut |_| {}).unwrap_err();
    let text = problem.to_string();
    assert!(text.contains("truncate -s 131072"), "{text}");
}
