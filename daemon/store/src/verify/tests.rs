//! What `verify` says of stores whose state is known.

use kvtier_proto::Miss;

use super::*;
use crate::disk::sim::{Fault, Faults, SimDisk};
use crate::testkit::*;

fn closed(numbers: std::ops::Range<u64>) -> (SimDisk, BTreeMap<u64, crate::Place>) {
    let mut store = Fixture::new();
    store.put_all(numbers.clone());
    let places = numbers
        .map(|number| (number, store.place(number)))
        .collect();
    (store.store.close(&mut Vec::new()).restart(1), places)
}

fn report(disk: SimDisk) -> Report {
    run(disk, &mut |_| {}).unwrap()
}

#[test]
fn verify_calls_a_closed_store_sound_and_counts_every_record() {
    let mut last = VerifyProgress::default();
    let report = run(closed(0..40).0, &mut |now| last = *now).unwrap();
    assert_eq!(
        (report.severity(), report.records),
        (Severity::Sound, 40),
        "{report:?}"
    );
    assert_eq!(last.segments_done, last.segments_total);
    assert!(report.damage.is_empty() && report.segments.iter().all(|row| row.header && row.footer));
}

#[test]
fn verify_names_a_flipped_bit_in_a_payload_a_header_and_a_part_table() {
    for (into, reason) in [
        (5000, Miss::PayloadCrc),
        (60, Miss::HeaderCrc),
        (260, Miss::HeaderCrc),
    ] {
        let (mut disk, places) = closed(0..40);
        let place = places[&17];
        let name = crate::format::segment::segment_name(place.segment);
        disk.content(&name).unwrap()[index(place.offset) + into] ^= 4;
        let report = report(disk);
        assert_eq!((report.severity(), report.records), (Severity::Damaged, 39));
        assert_eq!(report.damage, BTreeMap::from([(reason, 1)]), "byte {into}");
        let row = &report.segments[place.segment as usize];
        assert_eq!((row.bad[0].offset, row.bad[0].key), (place.offset, key(17)));
    }
}

#[test]
fn verify_calls_a_crashed_store_untidy_and_changes_nothing() {
    let mut store = Fixture::new();
    store.put_all(0..5);
    let disk = store.store.abandon().restart(1);
    let mut kept = disk.restart(1);
    let report = report(disk);
    assert_eq!((report.severity(), report.records), (Severity::Untidy, 5));
    let again = run(kept.restart(2), &mut |_| {}).unwrap();
    assert_eq!(again, report);
    assert!(kept.content("segment-00000000.kvs").is_some());
}

#[test]
fn verify_says_lost_without_a_sound_superblock() {
    let (mut disk, _) = closed(0..5);
    disk.content("superblock.kvs").unwrap().fill(0);
    assert_eq!(report(disk).severity(), Severity::Lost);
    assert_eq!(
        report(SimDisk::new(crate::disk::sim::SimOptions::default()))
            .segments
            .len(),
        0
    );
}

// A daemon refuses such a store until its file has its length again: nothing is lost.
#[test]
fn verify_finds_a_sound_superblock_in_a_file_of_another_length() {
    const SLOT: usize = 64 << 10;
    for (len, bad_slots) in [(SLOT, 1), (SLOT + 100, 1), (3 * SLOT, 0)] {
        let (mut disk, _) = closed(0..5);
        disk.content("superblock.kvs").unwrap().resize(len, 0);
        let report = report(disk);
        assert_eq!(report.severity(), Severity::Damaged, "{len}");
        assert_eq!(report.superblock_misfit, Some(len as u64));
        assert_eq!((report.bad_slots, report.records), (bad_slots, 5));
    }
    let (mut disk, _) = closed(0..5);
    disk.content("superblock.kvs").unwrap().truncate(100);
    assert_eq!(report(disk).severity(), Severity::Lost);
}

#[test]
fn verify_says_lost_when_a_segment_is_younger_than_the_superblock() {
    let (mut disk, _) = closed(0..5);
    let old = disk.content("superblock.kvs").unwrap().clone();
    let mut store = Fixture::reopened(disk);
    store.put_all(10..15);
    let mut disk = store.store.close(&mut Vec::new()).restart(1);
    disk.plant("superblock.kvs", old);
    let report = report(disk);
    assert!(report.superblock_outdated);
    assert_eq!(report.severity(), Severity::Lost);
}

#[test]
fn verify_gives_every_record_its_verdict_in_order() {
    let (mut disk, places) = closed(0..40);
    let place = places[&17];
    let name = crate::format::segment::segment_name(place.segment);
    disk.content(&name).unwrap()[index(place.offset) + 5000] ^= 4;
    let mut store = Fixture::reopened(disk.restart(1));
    store.put_all(40..42);
    store.store.wipe(NS, &mut Vec::new()).unwrap();
    let wiped = store.store.close(&mut Vec::new()).restart(1);
    for (disk, sound, verdict) in [
        (disk, 39, RecordVerdict::Sound),
        (wiped, 0, RecordVerdict::Wiped),
    ] {
        let mut rows = Vec::new();
        let report = run_each(disk, &mut |_| {}, &mut |row| rows.push(*row)).unwrap();
        assert_eq!(report.records, sound);
        let order = |row: &RecordRow| (row.segment, row.offset);
        assert!(rows.is_sorted_by_key(order));
        let of = |number| rows.iter().find(|row| row.key == key(number)).unwrap();
        assert_eq!(of(17).verdict, RecordVerdict::Bad(Miss::PayloadCrc));
        assert_eq!((of(16).verdict, of(18).verdict), (verdict, verdict));
    }
}

#[test]
fn verify_finds_the_records_of_a_segment_whose_ends_are_gone() {
    let (mut disk, places) = closed(0..10);
    let name = crate::format::segment::segment_name(places[&0].segment);
    let bytes = disk.content(&name).unwrap();
    let len = bytes.len();
    bytes[..64].fill(0);
    bytes[len - 4096..].fill(0);
    let report = report(disk);
    assert_eq!((report.severity(), report.records), (Severity::Untidy, 10));
}

// Goal: a device that does not deliver is never passed over, footer or not.
// Method: read a crashed store over a device that fails some reads, from many seeds.
#[test]
fn verify_calls_blocks_that_the_device_does_not_deliver_damage_without_a_footer_too() {
    let mut store = Fixture::new();
    store.put_all(0..20);
    let disk = store.store.abandon();
    let mut seen = 0;
    for seed in 0..40 {
        let mut disk = disk.restart(seed);
        disk.set_faults(Faults::default().with(Fault::ReadError, 250_000));
        let Ok(report) = run(disk, &mut |_| {}) else {
            continue;
        };
        let unread: u64 = report
            .segments
            .iter()
            .filter_map(|row| row.other.get(&Miss::Device))
            .sum();
        if report.superblock.is_some() && unread > 0 {
            seen += 1;
            assert_eq!(report.severity(), Severity::Damaged, "{report:?}");
            assert!(report.damage[&Miss::Device] >= unread, "{report:?}");
        }
    }
    assert!(seen > 0, "no seed failed a read of a record");
}
