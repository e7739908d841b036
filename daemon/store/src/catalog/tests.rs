//! The catalog is trusted after a clean close and at no other time.

use super::*;
use crate::format::StoreId;
use crate::testkit::*;
use crate::{IndexSource, Store};

fn sled(folder: &tempfile::TempDir) -> Option<Box<dyn Catalog>> {
    Some(Box::new(SledCatalog::new(folder.path().join("catalog"))))
}

fn open(disk: crate::disk::sim::SimDisk, folder: &tempfile::TempDir) -> Fixture {
    Fixture::on(disk, options(), sled(folder))
}

fn closed(folder: &tempfile::TempDir) -> crate::disk::sim::SimDisk {
    let mut store = open(crate::disk::sim::SimDisk::new(Default::default()), folder);
    store.put_all(0..40);
    store.store.close(&mut Vec::new()).restart(1)
}

#[test]
fn catalog_is_trusted_after_a_clean_close_and_no_record_is_read() {
    let folder = tempfile::tempdir().unwrap();
    let mut store = open(closed(&folder), &folder);
    assert_eq!(store.report.source, IndexSource::Catalog);
    assert_eq!(
        (
            store.report.by_footer,
            store.report.scanned,
            store.report.blocks
        ),
        (0, 0, 40)
    );
    assert!((0..40).all(|number| store.hits(number)));
    // And again: a store that was opened from the catalog keeps it whole.
    store.put_all(40..60);
    let disk = store.store.close(&mut Vec::new()).restart(2);
    let mut store = open(disk, &folder);
    assert_eq!(store.report.source, IndexSource::Catalog);
    assert!((0..60).all(|number| store.hits(number)));
}

#[test]
fn catalog_equals_the_index_after_evictions_wipes_and_replacements() {
    let folder = tempfile::tempdir().unwrap();
    let mut store = open(crate::disk::sim::SimDisk::new(Default::default()), &folder);
    for round in 0..4 {
        for number in 0..60 {
            store.put(NS, number, round);
            store.put(OTHER, number + round * 50, 0);
        }
        store.rest();
    }
    assert!(!store.evicted.is_empty());
    let mut events = Vec::new();
    store.store.wipe(OTHER, &mut events).unwrap();
    store.put_all(500..505);
    let live: usize = store.index().len();
    let disk = store.store.close(&mut Vec::new()).restart(1);
    let without = Fixture::reopened(disk.restart(1)).index();
    let with = open(disk, &folder);
    assert_eq!(with.report.source, IndexSource::Catalog);
    assert_eq!(with.index(), without, "P7: catalog and segments disagree");
    assert!(with.index().len() <= live);
}

#[test]
fn catalog_is_not_trusted_after_a_crash() {
    let folder = tempfile::tempdir().unwrap();
    let mut store = open(closed(&folder), &folder);
    store.put_all(40..50);
    let disk = store.store.abandon().crash(1);
    let mut store = open(disk, &folder);
    assert_eq!(store.report.source, IndexSource::Segments);
    assert!((0..50).all(|number| store.hits(number)));
}

#[test]
fn catalog_of_an_older_close_or_another_store_is_not_trusted() {
    let (first, second) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let disk = closed(&first);
    // The store lives on with another catalog; the first one is now out of date.
    let mut store = open(disk, &second);
    store.put_all(40..50);
    let disk = store.store.close(&mut Vec::new()).restart(1);
    let mut store = open(disk, &first);
    assert!(
        matches!(store.report.source, IndexSource::SegmentsAfter(_)),
        "{:?}",
        store.report
    );
    assert!((0..50).all(|number| store.hits(number)));
}

#[test]
fn sum_shows_a_lost_a_changed_and_a_doubled_row() {
    let mut store = Fixture::new();
    store.put_all(0..10);
    let rows: Vec<Stored> = store.store.blocks().collect();
    let sum = |rows: &[Stored]| {
        let mut sum = Sum::default();
        rows.iter().for_each(|row| sum.add(row));
        sum.close()
    };
    let whole = sum(&rows);
    let mut changed = rows.clone();
    changed[3].place.offset += 4096;
    let mut reversed = rows.clone();
    reversed.reverse();
    assert_ne!(sum(&rows[1..]), whole);
    assert_ne!(sum(&changed), whole);
    assert_ne!(sum(&[&rows[..], &rows[..1]].concat()), whole);
    assert_eq!(sum(&reversed), whole, "the order must not count");
}

#[test]
fn rows_round_trip_and_short_ones_are_refused() {
    let mut store = Fixture::new();
    store.put_all([1]);
    let stored = store.store.blocks().next().unwrap();
    let row = row_of(&stored);
    let mut back = read_row(&row).unwrap();
    back.place.epoch = stored.place.epoch;
    assert_eq!(back, stored);
    assert_eq!(read_row(&row[1..]), None);
}

// Goal: a row that differs from another in any one byte changes the sum.
#[test]
fn sum_shows_a_flip_of_any_byte_of_a_row() {
    let mut store = Fixture::new();
    store.put_all([1]);
    let stored = store.store.blocks().next().unwrap();
    let sum = |stored: &Stored| {
        let mut sum = Sum::default();
        sum.add(stored);
        sum.close()
    };
    let row = row_of(&stored);
    let mut seen = 0;
    for at in 0..ROW_LEN {
        let mut flipped = row;
        flipped[at] ^= 1;
        // Not every byte says something, and not every value of those that do is a row.
        if let Some(other) = read_row(&flipped).filter(|other| row_of(other) != row) {
            assert_ne!(sum(&other), sum(&stored), "byte {at}");
            seen += 1;
        }
    }
    assert!(seen > 55, "{seen} of {ROW_LEN}");
}

// Goal: what is left of a segment whose blocks went is what the catalog gives back.
// Method: write a segment in several pieces, then again in fewer, then empty.
#[test]
fn catalog_forgets_the_pieces_that_a_segment_no_longer_has() {
    let folder = tempfile::tempdir().unwrap();
    let mut store = Fixture::new();
    store.put_all([1]);
    let one = store.store.blocks().next().unwrap();
    let row = |number: u64| {
        let mut row = one;
        row.key = key(number);
        row
    };
    let stamp = |rows: &[Stored]| {
        let mut sum = Sum::default();
        rows.iter().for_each(|row| sum.add(row));
        Stamp {
            store_id: StoreId([1; 16]),
            incarnation: 1,
            close: sum.close(),
        }
    };
    for (round, count) in [700, 300, 0, 10].into_iter().enumerate() {
        let mut index = Index::new(StoreId([1; 16]));
        index.set_epoch(one.place.segment, one.place.epoch);
        for number in 0..count {
            index.insert(&row(number));
        }
        let mut changed = Changed::default();
        changed.start();
        changed.sealed(one.place.segment);
        let mut catalog = SledCatalog::new(folder.path().join("catalog"));
        changed.write(&mut catalog, &index).unwrap();
        let rows: Vec<Stored> = (0..count).map(row).collect();
        catalog.close(&stamp(&rows)).unwrap();
        let mut found = Vec::new();
        let mut catalog = SledCatalog::new(folder.path().join("catalog"));
        let mut each = |row: &Stored| found.push(row.key);
        catalog.load(&stamp(&rows), &mut each).unwrap();
        found.sort_unstable();
        let mut want: Vec<_> = rows.iter().map(|row| row.key).collect();
        want.sort_unstable();
        assert_eq!(found, want, "round {round}");
    }
}

#[test]
fn store_works_on_when_the_catalog_folder_cannot_be_made() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("file");
    std::fs::write(&file, "not a folder").unwrap();
    let catalog = SledCatalog::new(file.join("catalog"));
    let disk = crate::disk::sim::SimDisk::new(Default::default());
    let (store, _) = Store::open(disk, options(), Some(Box::new(catalog)), &mut |_| {}).unwrap();
    assert_eq!(store.state(), crate::DeviceState::Healthy);
}
