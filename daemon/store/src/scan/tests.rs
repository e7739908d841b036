//! The walk through a segment: what it finds, what it steps over, what it refuses.

use super::*;
use crate::disk::sim::{Fault, Faults, SimDisk, SimOptions};
use crate::format::segment::segment_name;
use crate::testkit::*;

const SIZE: u64 = 256 << 10;

fn filled() -> (SimDisk, u64, Vec<crate::Place>) {
    let mut store = Fixture::new();
    store.put_all(0..8);
    let places: Vec<_> = (0..8).map(|number| store.place(number)).collect();
    (store.store.abandon().restart(1), places[0].epoch, places)
}

fn walk(disk: SimDisk, epoch: Option<u64>) -> (Vec<u64>, Vec<(u64, Miss)>) {
    let mut lane = Lane::new(disk);
    let file = lane.disk().open(&segment_name(0)).unwrap();
    let arena = Arena::create("test", 16 << 20, Share::Private).unwrap();
    let mut scanner = Scanner::new(options().new_store_id, 0, SIZE, epoch);
    let (mut good, mut bad) = (Vec::new(), Vec::new());
    let mut each = |verdict| match verdict {
        Verdict::Good(summary) => good.push(summary.place.offset),
        Verdict::Bad { offset, miss } => bad.push((offset, miss)),
    };
    scan(
        &mut lane,
        &arena,
        file,
        BLOCK..SIZE,
        &mut scanner,
        &mut each,
    )
    .unwrap();
    (good, bad)
}

use crate::mem::Share;

fn offsets(places: &[crate::Place]) -> Vec<u64> {
    let mut offsets: Vec<u64> = places.iter().map(|place| place.offset).collect();
    offsets.sort_unstable();
    offsets
}

#[test]
fn the_walk_finds_every_record_with_and_without_the_epoch() {
    let (disk, epoch, places) = filled();
    assert_eq!(
        walk(disk.restart(1), Some(epoch)),
        (offsets(&places), vec![])
    );
    assert_eq!(walk(disk, None), (offsets(&places), vec![]));
}

#[test]
fn the_walk_finds_nothing_of_another_epoch() {
    let (disk, epoch, _) = filled();
    let (good, bad) = walk(disk, Some(epoch + 1));
    assert!(good.is_empty() && bad.iter().any(|(_, miss)| *miss == Miss::StaleEpoch));
}

// A tenant chooses payloads: one that is a whole record of this very place, but for the store's
// identity, must not be found, not even when the record around it is damaged.
#[test]
fn a_record_hidden_in_a_payload_is_not_found_behind_a_damaged_header() {
    let mut store = Fixture::new();
    let inner = image(&store.arena, OTHER, 9, 0);
    let (at, len) = (3 * BLOCK, inner.layout().image_len);
    let mut inner = inner;
    inner.stamp(&crate::format::Stamp {
        store_id: StoreId([0x11; 16]),
        epoch: store.store.next_epoch,
        sequence: store.store.next_sequence,
        segment: 0,
        offset: at,
    });
    let mut bytes = vec![0; 4096];
    bytes.extend_from_slice(&inner.buf()[..len as usize]);
    let stored_len = u32::try_from(bytes.len()).unwrap();
    let code = crate::PartCode::Opaque;
    let spec = crate::PartSpec {
        layer: 0,
        code,
        flags: 0,
        stored_len,
        raw_len: stored_len,
    };
    let outer = build(&store.arena, &meta(NS, 1), &[spec], &bytes);
    store.store.put(1, outer).unwrap();
    store.rest();
    let mut disk = store.store.abandon().restart(1);
    disk.content(&segment_name(0)).unwrap()[4096 + 50] ^= 1;
    let (good, bad) = walk(disk, None);
    assert!(good.is_empty(), "a forged record was found");
    assert!(bad.contains(&(at, Miss::StaleEpoch)), "{bad:?}");
}

#[test]
fn blocks_that_cannot_be_read_cost_their_records_and_no_more() {
    let (disk, epoch, places) = filled();
    let faults = Faults::default().with(Fault::ReadError, 400_000);
    let (mut found, mut failed) = (0, 0);
    for seed in 0..12 {
        let options = SimOptions {
            seed,
            faults: faults.clone(),
            ..SimOptions::default()
        };
        let (good, bad) = walk(disk.clone_with(options), Some(epoch));
        assert!(good.iter().all(|offset| offsets(&places).contains(offset)));
        found += good.len();
        failed += bad.iter().filter(|(_, miss)| *miss == Miss::Device).count();
    }
    assert!(found > 0 && failed > 0, "{found} found, {failed} failed");
}
