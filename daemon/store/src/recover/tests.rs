//! Openings of stores that something happened to.
#![allow(clippy::cast_possible_truncation, reason = "test numbers are small")]

use crate::disk::sim::{SimDisk, SimOptions};
use crate::format::segment::segment_name;
use crate::testkit::*;
use crate::*;

#[test]
fn a_torn_tail_ends_the_open_segment_and_keeps_what_was_durable() {
    let mut store = Fixture::new();
    store.put_all(0..5);
    let place = store.place(4);
    store.put_all([5]);
    let mut disk = store.store.abandon().restart(1);
    let torn = (place.offset + u64::from(place.len)) as usize;
    disk.content(&segment_name(place.segment)).unwrap()[torn + 4096..torn + 4608].fill(0xdd);
    let mut store = Fixture::reopened(disk);
    assert!((0..5).all(|number| store.hits(number)) && !store.hits(5));
    assert_eq!(store.report.refused.values().sum::<u64>(), 1);
    // The segment that was scanned has a footer now: nobody scans it again.
    let scanned = Fixture::reopened(store.store.abandon().crash(1))
        .report
        .scanned;
    assert!(scanned < store.report.scanned);
}

#[test]
fn a_hole_that_a_failed_write_left_hides_nothing_behind_it() {
    let mut store = Fixture::new();
    store.put_all(0..8);
    let place = store.place(3);
    let mut disk = store.store.abandon().restart(1);
    let file = disk.content(&segment_name(place.segment)).unwrap();
    file[place.offset as usize..][..place.len as usize].fill(0x99);
    let mut store = Fixture::reopened(disk);
    let found: Vec<u64> = (0..8).filter(|number| store.hits(*number)).collect();
    assert_eq!(found, [0, 1, 2, 4, 5, 6, 7]);
}

#[test]
fn records_of_an_earlier_life_of_a_segment_are_never_found() {
    let mut store = Fixture::new();
    // Fill and recycle every segment, so that old records lie behind the newest ones.
    for round in 0..5 {
        store.put_all(round * 60..round * 60 + 60);
    }
    let live = store.index();
    let mut store = Fixture::reopened(store.store.abandon().crash(1));
    assert_eq!(store.index(), live);
    assert!(
        store
            .report
            .refused
            .contains_key(&kvtier_proto::Miss::StaleEpoch)
    );
    assert!(
        (0..100).all(|number| !store.hits(number)),
        "the first rounds were evicted"
    );
}

#[test]
fn a_segment_file_that_was_cut_short_keeps_what_it_has_and_is_replaced_later() {
    let mut store = Fixture::new();
    store.put_all(0..30);
    let (place, mut disk) = (
        store.place(0),
        store.store.close(&mut Vec::new()).restart(1),
    );
    let bytes = disk.content(&segment_name(place.segment)).unwrap().clone();
    disk.plant(&segment_name(place.segment), bytes[..100 << 10].to_vec());
    let mut store = Fixture::reopened(disk);
    let kept = (0..30).filter(|number| store.hits(*number)).count();
    assert!((10..30).contains(&kept), "{kept} of 30");
    for round in 1..6 {
        store.put_all(round * 100..round * 100 + 60);
    }
    let whole = store
        .store
        .disk_mut()
        .content(&segment_name(place.segment))
        .unwrap()
        .len();
    assert_eq!(whole, 256 << 10, "the short file was replaced");
}

// What lies behind the end of a cut file is gone, and a number out of bounds is nobody's segment:
// neither is a reason to go without a catalog.
#[test]
fn a_cut_file_and_a_stray_one_cost_no_catalog() {
    let folder = tempfile::tempdir().unwrap();
    let catalog = || shelf(&folder);
    let mut store = Fixture::new();
    store.put_all(0..30);
    let name = segment_name(store.place(0).segment);
    let mut disk = store.store.abandon().crash(1);
    let bytes = disk.content(&name).unwrap()[..100 << 10].to_vec();
    disk.plant(&name, bytes);
    disk.plant("segment-ffffffff.kvs", vec![1; 8192]);
    let mut store = Fixture::on(disk, options(), catalog());
    assert_eq!(store.report.unopened, 0);
    let kept: Vec<u64> = (0..30).filter(|number| store.hits(*number)).collect();
    assert!((5..30).contains(&kept.len()), "{kept:?}");
    let disk = store.store.close(&mut Vec::new()).restart(1);
    let mut store = Fixture::on(disk, options(), catalog());
    assert_eq!(store.report.source, IndexSource::Catalog);
    assert!(kept.into_iter().all(|number| store.hits(number)));
}

#[test]
fn a_deleted_segment_file_costs_its_own_blocks_only() {
    let mut store = Fixture::new();
    store.put_all(0..40);
    let gone = store.place(0).segment;
    let lost = store
        .index()
        .values()
        .filter(|place| place.segment == gone)
        .count();
    let mut disk = store.store.close(&mut Vec::new()).restart(1);
    let file = crate::disk::Disk::open(&mut disk, &segment_name(gone)).unwrap();
    crate::disk::Disk::remove(&mut disk, file).unwrap();
    let mut store = Fixture::reopened(disk);
    assert_eq!(
        (0..40).filter(|number| store.hits(*number)).count(),
        40 - lost
    );
}

#[test]
fn less_capacity_removes_the_oldest_segments() {
    let mut store = Fixture::new();
    store.put_all(0..70);
    let disk = store.store.close(&mut Vec::new()).restart(1);
    let mut smaller = options();
    smaller.capacity = 4 * smaller.segment_size;
    let mut store = Fixture::on(disk, smaller, None);
    assert_eq!(
        (
            store.report.segments - store.report.removed,
            store.store.usage().segments
        ),
        (4, 4)
    );
    assert!(!store.hits(0) && store.hits(69));
}

#[test]
fn less_capacity_keeps_the_youngest_segment_whatever_its_header_says() {
    let mut store = Fixture::new();
    store.put_all(0..70);
    let youngest = segment_name(store.place(69).segment);
    let mut disk = store.store.abandon().crash(1);
    disk.content(&youngest).unwrap()[..4096].fill(0x77);
    let mut smaller = options();
    smaller.capacity = 4 * smaller.segment_size;
    let mut store = Fixture::on(disk, smaller, None);
    assert!(store.report.removed > 0);
    assert!(!store.hits(0) && store.hits(69));
}

#[test]
fn another_segment_size_in_the_options_does_not_change_a_store() {
    let mut store = Fixture::new();
    store.put_all(0..5);
    let disk = store.store.close(&mut Vec::new()).restart(1);
    let mut other = options();
    other.segment_size = 128 << 10;
    let mut store = Fixture::on(disk, other, None);
    assert_eq!(store.store.usage().segment_size, 256 << 10);
    assert!((0..5).all(|number| store.hits(number)));
}

#[test]
fn foreign_files_in_the_folder_are_left_alone() {
    let mut disk = SimDisk::new(SimOptions::default());
    for name in ["notes.txt", "segment-1.kvs", "segment-ffffffff.kvs"] {
        disk.plant(name, vec![1; 8192]);
    }
    let mut store = Fixture::on(disk, options(), None);
    store.put_all(0..5);
    for name in ["notes.txt", "segment-1.kvs", "segment-ffffffff.kvs"] {
        assert_eq!(
            store.store.disk_mut().content(name),
            Some(&mut vec![1; 8192])
        );
    }
}

#[test]
fn progress_counts_up_to_every_segment() {
    let mut store = Fixture::new();
    store.put_all(0..60);
    let disk = store.store.abandon().crash(1);
    let mut seen: Vec<Progress> = Vec::new();
    let (_, report) = Store::open(disk, options(), None, &mut |now| seen.push(*now)).unwrap();
    let last = seen.last().unwrap();
    assert_eq!(
        (last.segments_done, last.segments_total),
        (report.segments, report.segments)
    );
    assert_eq!((last.records, last.bytes), (report.records, report.bytes));
    assert!(
        seen.windows(2)
            .all(|pair| pair[0].segments_done <= pair[1].segments_done)
    );
}

// L1: records of a writer that died before its sync are found, counted as durable, and then the
// power goes.
#[test]
fn what_recovery_finds_and_counts_as_stored_survives_a_power_cut() {
    let mut found = 0;
    for seed in 0..40 {
        let mut store = Fixture::new();
        store.put_all(0..3);
        let puts: Vec<u64> = (3..9).map(|number| store.put(NS, number, 0)).collect();
        for _ in 0..seed % 5 {
            store.step();
        }
        let early = puts
            .iter()
            .filter(|tag| store.puts.contains_key(tag))
            .count();
        let mut store = Fixture::reopened(store.store.abandon().killed(seed));
        let here: Vec<u64> = (0..9).filter(|number| store.hits(*number)).collect();
        assert!(here.starts_with(&[0, 1, 2]));
        found += here.len() - 3 - early;
        let mut store = Fixture::reopened(store.store.abandon().crash(seed));
        for number in here {
            assert!(store.hits(number), "seed {seed}, record {number}");
        }
    }
    assert!(
        found > 20,
        "only {found} records were found that no sync had covered"
    );
}

#[test]
fn a_segment_that_cannot_be_synced_after_a_walk_counts_for_nothing() {
    let mut store = Fixture::new();
    store.put_all(0..5);
    let mut disk = store.store.abandon().killed(1);
    // The superblock's two syncs pass, the walked segment's does not.
    disk.fail_sync_after(2);
    let mut store = Fixture::reopened(disk);
    assert_eq!((store.report.unsynced, store.report.blocks), (1, 0));
    assert_eq!(store.store.state(), DeviceState::ReadOnly);
    assert!((0..5).all(|number| !store.hits(number)));
}

#[test]
fn a_lost_header_does_not_bring_back_the_life_before() {
    let mut store = Fixture::new();
    for round in 0..5 {
        store.put_all(round * 60..round * 60 + 60);
    }
    let live = store.index();
    let newest = (240..300).max_by_key(|number| store.place(*number).sequence);
    let open = store.place(newest.unwrap()).segment;
    let mut disk = store.store.abandon().crash(1);
    disk.content(&segment_name(open)).unwrap()[..4096].fill(0);
    let mut store = Fixture::reopened(disk);
    assert_eq!(store.index(), live, "every record says itself what it is");
    assert!(store.hits(newest.unwrap()));
}

fn shelf(folder: &tempfile::TempDir) -> Option<Box<dyn crate::catalog::Catalog>> {
    Some(Box::new(SledCatalog::new(folder.path().join("catalog"))))
}

// The walk learns the epoch; a catalog has none, and the last block has that of the life before.
#[test]
fn a_lost_header_does_not_bring_back_the_life_before_in_any_later_life() {
    let folder = tempfile::tempdir().unwrap();
    let mut store = Fixture::new();
    for round in 0..5 {
        store.put_all(round * 60..round * 60 + 60);
    }
    let live = store.index();
    let newest = (240..300).max_by_key(|number| store.place(*number).sequence);
    let open = segment_name(store.place(newest.unwrap()).segment);
    let mut disk = store.store.abandon().crash(1);
    disk.content(&open).unwrap()[..4096].fill(0);
    for life in 1..4 {
        let mut store = Fixture::on(disk, options(), shelf(&folder));
        assert_eq!(store.index(), live, "life {life}");
        assert!(store.hits(newest.unwrap()), "life {life}");
        disk = store.store.close(&mut Vec::new()).restart(life);
    }
}

#[test]
fn a_record_that_a_walk_misread_once_is_found_and_one_misread_twice_is_absent_once() {
    // A record of an open segment, or of a sealed one whose last block is lost.
    for (sealed, payload, times) in [false, true]
        .into_iter()
        .flat_map(|sealed| [(sealed, false), (sealed, true)])
        .flat_map(|(sealed, payload)| [(sealed, payload, 1), (sealed, payload, 2)])
    {
        let told = format!("sealed: {sealed}, payload: {payload}, {times} times");
        let folder = tempfile::tempdir().unwrap();
        let mut store = Fixture::new();
        store.put_all(0..8);
        let (place, name) = (store.place(3), segment_name(store.place(3).segment));
        let mut disk = match sealed {
            true => store.store.close(&mut Vec::new()).restart(1),
            false => store.store.abandon().restart(1),
        };
        if sealed {
            let file = disk.content(&name).unwrap();
            let last = file.len() - 4096;
            file[last..].fill(0);
        }
        let head = u64::from(place.head_len);
        let at = place.offset + if payload { head } else { 8 };
        disk.misread(&name, at, times);
        let mut store = Fixture::on(disk, options(), shelf(&folder));
        let others = (0..8).filter(|number| *number != 3);
        assert!(
            others.into_iter().all(|number| store.hits(number)),
            "{told}"
        );
        assert_eq!(store.hits(3), times == 1, "{told}");
        let disk = store.store.close(&mut Vec::new()).restart(1);
        let mut store = Fixture::on(disk, options(), shelf(&folder));
        assert!((0..8).all(|number| store.hits(number)), "later, {told}");
    }
}

// Misread, the header of a segment that is prepared for its next life makes the records of the last
// one look like what is stored.
#[test]
fn a_header_that_was_misread_is_read_again_and_else_its_records_are_promised_to_nobody() {
    for times in 1..4 {
        let mut store = Fixture::new();
        store.put_all(0..200);
        let ready = |life| life == crate::segments::Life::Ready;
        let prepared = store.store.segments.iter().find(|one| ready(one.life));
        let name = segment_name(prepared.expect("the next one").number);
        let mut disk = store.store.abandon().restart(1);
        disk.misread(&name, 20, times);
        let half = Fixture::reopened(disk);
        assert!(half.report.blocks > 50);
        let found = half.index();
        let later = Fixture::reopened(half.store.abandon().crash(1)).index();
        for (name, place) in found {
            assert_eq!(later.get(&name), Some(&place), "misread {times} times");
        }
    }
}

#[test]
fn a_store_with_more_segments_than_may_be_open_is_refused() {
    let problem = super::too_many_files(&options(), 8).unwrap();
    assert!(
        problem.contains("8 segments of 262144; this process may hold 7"),
        "{problem}"
    );
    assert_eq!(super::too_many_files(&options(), 9), None);
}

// Goal: a setting that does not fit a store that exists removes nothing of it.
#[test]
fn a_store_whose_own_segments_do_not_fit_the_capacity_is_refused_by_their_size() {
    let mut store = Fixture::new();
    store.put_all(0..30);
    let disk = store.store.close(&mut Vec::new());
    let mut asked = options();
    (asked.capacity, asked.segment_size) = (4 * 64 * KIB, 64 * KIB);
    assert_eq!(
        asked.problems(),
        Vec::<String>::new(),
        "fine for a new store"
    );
    let refused = Store::open(disk.restart(1), asked, None, &mut |_| {});
    let Err(OpenError::Options(problems)) = refused else {
        panic!("a store of 8 segments of 256 KiB was opened with room for one");
    };
    let text = problems.join("; ");
    assert!(
        text.contains("capacity is 262144 bytes, which is 1 segments of 262144"),
        "{text}"
    );
    assert!(
        text.contains("was made with a segment_size of 262144 bytes"),
        "{text}"
    );
    let mut store = Fixture::reopened(disk.restart(2));
    assert!((0..30).all(|number| store.hits(number)));
}

// A segment that is prepared for its next life has the records of the last one until they are
// overwritten. With a header that is not read for once, they look like what is stored.
#[test]
fn records_behind_a_header_that_was_not_read_are_promised_to_nobody() {
    let mut store = Fixture::new();
    store.put_all(0..200);
    let ready = |life| life == crate::segments::Life::Ready;
    let prepared = store.store.segments.iter().find(|one| ready(one.life));
    let name = segment_name(prepared.expect("the next one").number);
    let mut disk = store.store.abandon().restart(1);
    disk.set_unreadable(&name, 0);
    let mut half = Fixture::reopened(disk);
    assert!(half.report.blocks > 50);
    let found = half.index();
    half.store.disk_mut().set_unreadable("none", 0);
    let later = Fixture::reopened(half.store.abandon().crash(1)).index();
    for (name, place) in found {
        assert_eq!(later.get(&name), Some(&place), "it was here, and is not");
    }
}
