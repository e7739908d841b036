//! The bug museum: incidents of other systems, each kept out by a test with its row's number.
//!
//! Upstairs:   `docs/MUSEUM.md` lists the rows.
//! Downstairs: `Store` over `disk::sim`, catalogs in real folders.
#![allow(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    reason = "a panic is the failure report"
)]
#![allow(clippy::cast_possible_truncation, reason = "test numbers are small")]

use kvtier_proto::Miss;

use crate::disk::Wait;
use crate::disk::sim::{Fault, Faults, SimDisk, SimOptions};
use crate::format::Stamp;
use crate::format::segment::segment_name;
use crate::testkit::*;
use crate::*;

fn copy_record(disk: &mut SimDisk, from: &Place, to: &Place) {
    let whole =
        |place: &Place| place.offset as usize..(place.offset + u64::from(place.len)) as usize;
    let bytes = disk.content(&segment_name(from.segment)).unwrap()[whole(from)].to_vec();
    let len = bytes.len().min(to.len as usize);
    let target = disk.content(&segment_name(to.segment)).unwrap();
    target[to.offset as usize..][..len].copy_from_slice(&bytes[..len]);
}

// Row 1, foyer#1286: a read that nobody waits for any more wrote into memory that was reused.
// Method: start reads, never collect them, and hand out every free byte of the arena: no new
// buffer may overlap one that the device still holds, and stepping gives all of them back.
#[test]
fn museum_01_memory_of_an_abandoned_read_is_not_handed_out_again() {
    let mut store = Fixture::new();
    store.put_all(0..4);
    let held: Vec<(usize, u64)> = (0..4)
        .map(|number| {
            let buf = store.buf();
            let place = (buf.offset(), buf.generation());
            store.store.get(number, &want(NS, number), buf).unwrap();
            place
        })
        .collect();
    let fresh: Vec<_> = std::iter::from_fn(|| store.arena.alloc(64 * 1024)).collect();
    assert!(!fresh.is_empty());
    for buf in &fresh {
        assert!(
            held.iter().all(|(at, _)| *at != buf.offset()),
            "memory of a read handed out"
        );
    }
    drop(fresh);
    store.rest();
    assert_eq!(
        store.got.len(),
        4,
        "every read comes back, waited for or not"
    );
}

// Row 2, LMCache#4385: the disk tier returned other requests' KV.
// Method: a whole, valid record of another block, of another namespace, or of the same segment in
// an earlier life lies where the index points.
#[test]
fn museum_02_a_valid_record_of_another_block_is_a_miss() {
    let mut store = Fixture::new();
    store.put_all([1, 2]);
    let foreign = store.put(OTHER, 3, 0);
    store.rest();
    let (one, two) = (store.place(1), store.place(2));
    let three = *store.puts[&foreign].as_ref().unwrap();
    for from in [two, three] {
        copy_record(store.store.disk_mut(), &from, &one);
        assert_eq!(store.get(&want(NS, 1)), Err(Miss::Misdirected));
    }
    assert!(store.hits(2));
}

/// Writes a record of the lengths of record 1 over it, with good checksums and a stamp for the
/// very place; `change` says what is foreign about it.
fn forge(store: &mut Fixture, meta: &RecordMeta, change: impl FnOnce(&mut Stamp)) {
    let place = store.place(1);
    let mut stamp = Stamp {
        store_id: options().new_store_id,
        epoch: place.epoch,
        sequence: place.sequence,
        segment: place.segment,
        offset: place.offset,
    };
    change(&mut stamp);
    let foreign = payload(OTHER, 1, 1, stored_len(1));
    let mut forged = build(&store.arena, meta, &parts(1), &foreign);
    forged.stamp(&stamp);
    let bytes = forged.into_buf();
    assert_eq!(
        bytes.len(),
        place.len as usize,
        "nothing but identity tells"
    );
    let name = segment_name(place.segment);
    let file = store.store.disk_mut().content(&name).unwrap();
    file[place.offset as usize..][..bytes.len()].copy_from_slice(&bytes);
}

// As above, with a record that claims the very place: only its identity is another's.
#[test]
fn museum_02_a_record_forged_for_the_place_is_a_miss() {
    type Change = fn(&mut Stamp);
    let cases: [(RecordMeta, Change, Miss); 5] = [
        (meta(OTHER, 1), |_| (), Miss::WrongKey),
        (meta(NS, 2), |_| (), Miss::WrongKey),
        (meta(NS, 1), |stamp| stamp.epoch -= 1, Miss::StaleEpoch),
        (meta(NS, 1), |stamp| stamp.sequence -= 1, Miss::StaleEpoch),
        (
            meta(NS, 1),
            |stamp| stamp.store_id.0[0] ^= 1,
            Miss::StaleEpoch,
        ),
    ];
    for (case, (meta, change, miss)) in cases.into_iter().enumerate() {
        let mut store = Fixture::new();
        store.put_all([1]);
        forge(&mut store, &meta, change);
        assert_eq!(store.get(&want(NS, 1)).err(), Some(miss), "case {case}");
    }
}

// Row 3, LMCache#4492: corrupted responses after a restart.
// Method: put, crash, open, compare every survivor byte by byte, three times over.
#[test]
fn museum_03_every_survivor_of_a_restart_is_compared_byte_by_byte() {
    let mut store = Fixture::new();
    for round in 0..3 {
        store.put_all(round * 15..round * 15 + 15);
        store = Fixture::reopened(store.store.abandon().crash(round));
        for number in 0..round * 15 + 15 {
            assert!(store.hits(number), "round {round}, record {number}");
        }
    }
}

// Row 7, LMCache#4463, dynamo#14416: the engine changed its layout, the cache restored garbage.
#[test]
fn museum_07_a_record_of_another_layout_is_a_miss_as_wrong_layout() {
    let mut store = Fixture::new();
    store.put_all([1]);
    let other = Want {
        layout: layout(2),
        ..want(NS, 1)
    };
    assert_eq!(store.get(&other), Err(Miss::WrongLayout));
    let (tag, buf) = (store.tag(), store.buf());
    store.store.get_parts(tag, &other, 0..1, buf).unwrap();
    store.rest();
    assert_eq!(store.got[&tag], Err(Miss::WrongLayout));
    assert!(store.hits(1));
}

// Row 9, CVE-2025-25183: a hash that can be predicted and collides gives another prompt's KV.
// Method: two keys that differ in the last bit only, side by side and then one in the other's
// place: they are two blocks for the index, and the record compares all of its key.
#[test]
fn museum_09_keys_that_differ_in_the_last_bit_are_two_blocks() {
    let twin = |mut key: kvtier_proto::BlockKey| {
        key.0[31] ^= 1;
        key
    };
    let mut store = Fixture::new();
    store.put_all([1]);
    let mut near = want(NS, 1);
    near.key = twin(near.key);
    assert_eq!(store.get(&near), Err(Miss::Absent));
    let meta = RecordMeta {
        key: near.key,
        ..meta(NS, 1)
    };
    let bytes = payload(OTHER, 1, 1, stored_len(1));
    let image = build(&store.arena, &meta, &parts(1), &bytes);
    let tag = store.tag();
    store.store.put(tag, image).unwrap();
    store.rest();
    assert_eq!(store.get(&near), Ok(bytes));
    assert!(store.hits(1), "the twin replaced nothing");
    forge(&mut store, &meta, |_| ());
    assert_eq!(store.get(&want(NS, 1)).err(), Some(Miss::WrongKey));
}

// Row 10, sled#1533, #1166: a snapshot that cannot be opened after an abrupt stop.
// Method: every file of a cleanly closed catalog is cut, filled with noise, emptied or removed.
#[test]
fn museum_10_a_broken_catalog_is_moved_aside_and_rebuilt() {
    for damage in 0..4u8 {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("catalog");
        let catalog = || -> Option<Box<dyn Catalog>> { Some(Box::new(SledCatalog::new(&path))) };
        let disk = SimDisk::new(SimOptions::default());
        let mut store = Fixture::on(disk, options(), catalog());
        store.put_all(0..30);
        let disk = store.store.close(&mut Vec::new()).restart(1);
        spoil(&path, damage);
        let mut store = Fixture::on(disk, options(), catalog());
        assert!(
            matches!(store.report.source, IndexSource::SegmentsAfter(_)),
            "damage {damage}: {:?}",
            store.report.source
        );
        assert!((0..30).all(|number| store.hits(number)), "damage {damage}");
        // And the catalog that took its place is trusted again after a clean close.
        let disk = store.store.close(&mut Vec::new()).restart(2);
        let store = Fixture::on(disk, options(), catalog());
        assert_eq!(store.report.source, IndexSource::Catalog, "damage {damage}");
    }
}

fn spoil(path: &std::path::Path, damage: u8) {
    if damage == 3 {
        return std::fs::remove_dir_all(path).unwrap();
    }
    let (mut folders, mut spoilt) = (vec![path.to_owned()], 0);
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(folder).unwrap().map(Result::unwrap) {
            if entry.file_type().unwrap().is_dir() {
                folders.push(entry.path());
                continue;
            }
            let bytes = std::fs::read(entry.path()).unwrap();
            let bytes = match damage {
                0 => bytes[..bytes.len() / 2].to_vec(),
                1 => bytes.iter().map(|byte| byte ^ 0x5a).collect(),
                _ => Vec::new(),
            };
            std::fs::write(entry.path(), bytes).unwrap();
            spoilt += 1;
        }
    }
    assert!(spoilt > 0);
}

// Row 11, LMCache#562: the disk index lived in memory only, a restart lost everything.
#[test]
fn museum_11_a_restart_keeps_at_least_99_percent_of_the_hits() {
    let mut store = Fixture::new();
    store.put_all(0..80);
    let before = (0..80).filter(|number| store.hits(*number)).count();
    let mut store = Fixture::reopened(store.store.abandon().crash(4));
    let after = (0..80).filter(|number| store.hits(*number)).count();
    assert!(
        before >= 80 && after * 100 >= before * 99,
        "{before} hits before, {after} after"
    );
}

// Row 12, Rebello et al. 2020: after a failed fsync the page is marked clean.
// Method: one sync fails, later ones would succeed; nothing may be acknowledged after it, reads
// go on, and the next opening writes again.
#[test]
fn museum_12_nothing_is_acknowledged_after_a_failed_sync() {
    let mut store = Fixture::new();
    store.put_all(0..10);
    store
        .store
        .disk_mut()
        .set_faults(Faults::default().with(Fault::SyncError, 1_000_000));
    let failed: Vec<u64> = (10..14).map(|number| store.put(NS, number, 0)).collect();
    while store.store.disk().fired().times(Fault::SyncError) == 0 {
        store.step();
    }
    store.store.disk_mut().set_faults(Faults::default());
    let later = store.put(NS, 20, 0);
    store.rest();
    for tag in failed.iter().chain([&later]) {
        assert!(
            matches!(store.puts[tag], Err(PutError::Poisoned { .. })),
            "{:?}",
            store.puts[tag]
        );
    }
    assert_eq!(store.states, [DeviceState::ReadOnly]);
    assert!((0..10).all(|number| store.hits(number)), "reads go on");
    assert!((10..14).all(|number| !store.hits(number)));
    let mut events = Vec::new();
    assert!(matches!(
        store.store.wipe(NS, &mut events),
        Err(WipeError::Poisoned { .. })
    ));

    let mut store = Fixture::reopened(store.store.abandon().crash(5));
    store.put_all([20]);
    assert!(store.hits(20) && (0..10).all(|number| store.hits(number)));
}

// Row 12 again: three failed writes in a row count like a failed sync, two do not.
#[test]
fn museum_12_three_failed_writes_in_a_row_stop_the_log() {
    let mut store = Fixture::new();
    store.put_all(0..2);
    store
        .store
        .disk_mut()
        .set_faults(Faults::default().with(Fault::WriteError, 1_000_000));
    for number in 2..4 {
        let tag = store.put(NS, number, 0);
        while !store.puts.contains_key(&tag) {
            store.step();
        }
        assert!(matches!(
            store.puts[&tag],
            Err(PutError::Indeterminate { .. })
        ));
    }
    assert_eq!(store.store.state(), DeviceState::Healthy);
    let tag = store.put(NS, 4, 0);
    store.rest();
    assert!(matches!(
        store.puts[&tag],
        Err(PutError::Indeterminate { .. })
    ));
    assert_eq!(store.store.state(), DeviceState::ReadOnly);
    let image = image(&store.arena, NS, 5, 0);
    assert!(matches!(
        store.store.put(9, image),
        Err((_, PutError::Poisoned { .. }))
    ));
    let mut events = Vec::new();
    store.store.step(Wait::No, &mut events);
    assert!(events.is_empty() && store.hits(1));
}
