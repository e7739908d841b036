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
