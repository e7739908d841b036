//! The store over the real lanes: the same promises on files of this machine.
//!
//! Upstairs:   nothing.
//! Downstairs: `disk::ring` where the kernel allows it, `disk::file`.
#![allow(clippy::cast_possible_truncation, reason = "test numbers are small")]

use std::path::Path;

use crate::disk::lane::{LaneKind, open_lane};
use crate::disk::{Disk, Wait};
use crate::mem::{Arena, Share};
use crate::testkit::*;
use crate::verify::Severity;
use crate::*;

type Real = Store<Box<dyn Disk + Send>>;

fn open(folder: &Path, kind: LaneKind) -> (Real, RecoveryReport) {
    let catalog: Box<dyn Catalog> = Box::new(SledCatalog::new(folder.join("catalog")));
    let disk = open_lane(&folder.join("disk"), kind, 8, &[]).unwrap().disk;
    Store::open(disk, options(), Some(catalog), &mut |_| {}).unwrap()
}

fn rest(store: &mut Real) -> Vec<Event> {
    let mut events = Vec::new();
    while !store.is_idle() {
        store.step(Wait::One, &mut events);
    }
    events
}

fn expect_all(store: &mut Real, numbers: std::ops::Range<u64>) {
    let arena = Arena::create("test", 8 << 20, Share::Private).unwrap();
    for number in numbers {
        let buf = arena.alloc(64 << 10).unwrap();
        store.get(number, &want(NS, number), buf).unwrap();
        let Event::Got {
            result: Ok(got), ..
        } = rest(store).remove(0)
        else {
            panic!("no bytes")
        };
        let record = got.verify().unwrap();
        assert_eq!(record.payload(), payload(NS, number, 0, stored_len(number)));
    }
}

fn keeps_its_promises(kind: LaneKind) {
    let folder = tempfile::tempdir().unwrap();
    std::fs::create_dir(folder.path().join("disk")).unwrap();
    let arena = Arena::create("test", 8 << 20, Share::Private).unwrap();
    let (mut store, report) = open(folder.path(), kind);
    assert_eq!(report.superblock, SuperblockFound::New);
    for number in 0..40 {
        store.put(number, image(&arena, NS, number, 0)).unwrap();
    }
    let events = rest(&mut store);
    let durable = events
        .iter()
        .filter(|one| matches!(one, Event::Put { result: Ok(_), .. }));
    assert_eq!(durable.count(), 40);
    expect_all(&mut store, 0..40);

    // Dropped without a close, as by kill -9: the segments are scanned.
    drop(store.abandon());
    let (mut store, report) = open(folder.path(), kind);
    assert_eq!((report.source, report.blocks), (IndexSource::Segments, 40));
    expect_all(&mut store, 0..40);
    drop(store.close(&mut Vec::new()));

    let (mut store, report) = open(folder.path(), kind);
    assert_eq!((report.source, report.blocks), (IndexSource::Catalog, 40));
    expect_all(&mut store, 0..40);
    drop(store.close(&mut Vec::new()));

    // Without its catalog: every segment has a footer, the one that was prepared in vain as well.
    std::fs::remove_dir_all(folder.path().join("catalog")).unwrap();
    let (store, report) = open(folder.path(), kind);
    assert_eq!((report.scanned, report.blocks), (0, 40), "{report:?}");
    drop(store.close(&mut Vec::new()));

    let disk = open_lane(&folder.path().join("disk"), kind, 8, &[])
        .unwrap()
        .disk;
    let report = verify::run(disk, &mut |_| {}).unwrap();
    assert_eq!((report.severity(), report.records), (Severity::Sound, 40));
}

#[test]
fn store_keeps_its_promises_over_the_pread_lane() {
    keeps_its_promises(LaneKind::Pread);
}

#[test]
fn store_keeps_its_promises_over_the_best_lane_of_this_machine() {
    keeps_its_promises(LaneKind::Auto);
}
