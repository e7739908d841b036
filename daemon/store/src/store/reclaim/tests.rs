//! Making room: eviction, pins, readers, a device without room, and wipes on the way.
#![allow(clippy::cast_possible_truncation, reason = "test numbers are small")]

use kvtier_proto::Miss;

use crate::disk::sim::{SimDisk, SimOptions};
use crate::testkit::*;
use crate::*;

/// Puts records until `recycled` segments were used again.
fn churn(store: &mut Fixture, from: u64, recycled: u64) -> u64 {
    let target = store.store.counters().get(Counter::Recycled) + recycled;
    let mut number = from;
    while store.store.counters().get(Counter::Recycled) < target {
        store.put_all(number..number + 5);
        number += 5;
    }
    number
}

#[test]
fn a_full_store_evicts_the_oldest_and_says_so() {
    let mut store = Fixture::new();
    let last = churn(&mut store, 0, 3);
    assert!(!store.hits(0) && store.hits(last - 1));
    assert_eq!(store.get(&want(NS, 0)), Err(Miss::Absent));
    assert!(store.evicted.contains(&(NS, key(0))) && !store.evicted.contains(&(NS, key(last - 1))));
    let here = (0..last).filter(|number| store.hits(*number)).count();
    assert_eq!(
        here + store.evicted.len(),
        last as usize,
        "every block is here or was evicted"
    );
    assert_eq!(store.store.usage().segments, 8);
}

#[test]
fn a_pinned_block_outlives_every_segment_and_a_restart() {
    let mut store = Fixture::new();
    store.put_all(0..20);
    assert!(store.store.pin(NS, &key(3)) && store.store.pin(NS, &key(11)));
    assert!(!store.store.pin(NS, &key(999)), "nothing to pin");
    let next = churn(&mut store, 100, 20);
    assert!(store.hits(3) && store.hits(11) && !store.hits(4));
    assert!(store.store.counters().get(Counter::BytesForwarded) > 0);
    store.store.unpin(NS, &key(3));
    churn(&mut store, next, 9);
    assert!(!store.hits(3) && store.hits(11));
    let mut store = Fixture::reopened(store.store.abandon().crash(1));
    assert!(store.hits(11));
}

// A copy by itself costs a sync; a batch of them costs one.
#[test]
fn pinned_blocks_are_copied_in_batches_with_one_sync_each() {
    let mut store = Fixture::new();
    store.put_all(0..15);
    (0..15).for_each(|number| assert!(store.store.pin(NS, &key(number))));
    let syncs = store.store.counters().get(Counter::Syncs);
    let mut puts = 0;
    while store.store.counters().get(Counter::BytesForwarded) < 300 * KIB {
        store.put_all([1000 + puts]);
        puts += 1;
    }
    let bytes = store.store.counters().get(Counter::BytesForwarded);
    let more = store.store.counters().get(Counter::Syncs) - syncs - puts;
    assert!(
        more <= bytes / (24 * KIB),
        "{more} syncs for copies of {bytes} bytes"
    );
    assert!((0..15).all(|number| store.hits(number)));
}

// A log that takes no writes overwrites nothing: blocks whose copies were under way are where they
// were.
#[test]
fn a_poisoned_log_loses_no_pinned_block() {
    let mut caught = 0;
    for good in 0..60 {
        let mut store = Fixture::new();
        store.put_all(0..15);
        (0..15).for_each(|number| assert!(store.store.pin(NS, &key(number))));
        store.store.disk_mut().fail_sync_after(good);
        let mut number = 1000;
        while store.store.state() != DeviceState::ReadOnly {
            store.put(NS, number, 0);
            store.step();
            number += 1;
        }
        store.rest();
        let drain = store.store.drain.as_ref();
        let left = drain.map(|drain| store.store.index.live_in(drain.victim));
        caught += left.unwrap_or(0);
        assert!(
            (0..15).all(|number| store.hits(number)),
            "after {good} syncs"
        );
    }
    assert!(caught > 0, "no copy was under way");
}

#[test]
fn pins_take_at_most_half_of_the_capacity() {
    let mut store = Fixture::new();
    store.put_all(0..75);
    let pinned = (0..75)
        .filter(|number| store.store.pin(NS, &key(*number)))
        .count();
    assert!((20..75).contains(&pinned), "{pinned} of 75");
    let bytes: u64 = store
        .store
        .blocks()
        .filter(|b| b.pinned)
        .map(|b| u64::from(b.place.len))
        .sum();
    assert!(bytes <= 4 * 256 * KIB);
    // Puts still get through.
    churn(&mut store, 1000, 12);
}

#[test]
fn a_wiped_pinned_block_is_not_copied_forward() {
    let mut store = Fixture::new();
    store.put_all(0..20);
    (0..20).for_each(|number| assert!(store.store.pin(NS, &key(number))));
    let mut number = 0;
    while store.store.counters().get(Counter::BytesForwarded) == 0 {
        store.put(OTHER, number, 0);
        store.step();
        number += 1;
    }
    let mut events = Vec::new();
    store.store.wipe(NS, &mut events).unwrap();
    events.into_iter().for_each(|event| store.note(event));
    store.rest();
    assert!((0..20).all(|number| !store.hits(number)));
    let mut store = Fixture::reopened(store.store.abandon().crash(1));
    assert!(
        (0..20).all(|number| !store.hits(number)),
        "a copy came back after the wipe"
    );
}

// What was wiped is not read, and a read is what would have woken the store.
#[test]
fn a_segment_whose_pinned_blocks_were_all_wiped_makes_room_for_who_waits() {
    let mut store = Fixture::new();
    store.put_all(0..20);
    (0..20).for_each(|number| assert!(store.store.pin(NS, &key(number))));
    let mut number = 0;
    while store
        .store
        .drain
        .as_ref()
        .is_none_or(|drain| drain.waiting.len() < 8)
    {
        store.put(OTHER, number, 0);
        store.step();
        number += 1;
        assert!(number < 1000, "no drain of many blocks");
    }
    let mut events = Vec::new();
    store.store.wipe(NS, &mut events).unwrap();
    events.into_iter().for_each(|event| store.note(event));
    let waiting: Vec<u64> = (0..60)
        .map(|more| store.put(OTHER, number + more, 0))
        .collect();
    store.rest();
    assert!(waiting.iter().all(|tag| store.puts[tag].is_ok()));
}

// The newest acknowledged blocks may be in a segment that nobody knows the age of.
#[test]
fn a_segment_that_was_not_read_whole_is_the_last_to_make_room() {
    let mut store = Fixture::new();
    store.put_all(0..200);
    let newest = store.place(199).segment;
    let mut disk = store.store.abandon().crash(1);
    disk.set_unreadable(&crate::format::segment::segment_name(newest), 0);
    let mut store = Fixture::reopened(disk);
    assert!(!store.hits(199));
    store.store.disk_mut().set_unreadable("none", 0);
    churn(&mut store, 1000, 5);
    let mut store = Fixture::reopened(store.store.abandon().crash(1));
    assert!(store.hits(199), "it went, and nobody was told");
}

#[test]
fn a_wipe_refuses_what_waits_and_answers_reads_under_way_as_absent() {
    let mut store = Fixture::new();
    store.put_all(0..5);
    let (tag, buf) = (store.tag(), store.buf());
    store.store.get(tag, &want(NS, 1), buf).unwrap();
    let (waiting, other) = (store.put(NS, 9, 0), store.put(OTHER, 9, 0));
    let mut events = Vec::new();
    assert_eq!(store.store.wipe(NS, &mut events).unwrap(), 5);
    events.into_iter().for_each(|event| store.note(event));
    store.rest();
    assert!(matches!(store.puts[&waiting], Err(PutError::Wiped { .. })));
    assert!(store.puts[&other].is_ok());
    assert_eq!(store.got[&tag], Err(Miss::Absent));
    assert_eq!(store.store.counters().get(Counter::Wipes), 1);
}

#[test]
fn a_device_without_room_for_more_evicts_and_goes_on() {
    // Room for the superblock and five segments of eight.
    let space = 128 * KIB + 5 * 256 * KIB;
    let disk = SimDisk::new(SimOptions {
        space,
        ..SimOptions::default()
    });
    let mut store = Fixture::on(disk, options(), None);
    let next = churn(&mut store, 0, 4);
    assert_eq!(
        (store.store.state(), store.store.usage().segments),
        (DeviceState::Full, 5)
    );
    assert!(store.hits(next - 1));
    assert_eq!(
        store.store.counters().get(Counter::PutsFailed),
        0,
        "no put fails for want of room"
    );
    // Room again: the store notices and grows to its capacity.
    store.store.disk_mut().set_space(u64::MAX);
    churn(&mut store, next, 20);
    assert_eq!(
        (store.store.state(), store.store.usage().segments),
        (DeviceState::Healthy, 8)
    );
    assert_eq!(store.states, [DeviceState::Full, DeviceState::Healthy]);
}

#[test]
fn a_device_without_room_for_one_segment_refuses_puts_and_lives() {
    let disk = SimDisk::new(SimOptions {
        space: 200 * KIB,
        ..SimOptions::default()
    });
    let mut store = Fixture::on(disk, options(), None);
    let tag = store.put(NS, 1, 0);
    store.rest();
    assert!(matches!(store.puts[&tag], Err(PutError::NoRoom)));
    assert_eq!(store.get(&want(NS, 1)), Err(Miss::Absent));
}

// A file that did not open, or that could not be removed, has a number and takes space. It is not
// touched, and the store does with the others what it did before.
#[test]
fn a_segment_file_that_is_not_in_use_costs_its_own_space_only() {
    let mut store = Fixture::new();
    let strays = [2, 3].map(crate::format::segment::segment_name);
    for name in &strays {
        store.store.disk_mut().plant(name, vec![9; 4096]);
    }
    let next = churn(&mut store, 0, 20);
    assert_eq!(store.store.usage().segments, 6);
    assert_eq!(store.store.state(), DeviceState::Healthy);
    assert!(store.hits(next - 1));
    for name in &strays {
        let content = store.store.disk_mut().content(name);
        assert_eq!(content, Some(&mut vec![9; 4096]));
    }
}

#[test]
fn a_condemned_block_is_gone_counted_and_can_be_put_again() {
    let mut store = Fixture::new();
    store.put_all([1]);
    let place = store.place(1);
    let stale = Place {
        sequence: place.sequence + 1,
        ..place
    };
    assert!(
        !store.store.condemn(NS, &key(1), &stale, Miss::PayloadCrc),
        "another record"
    );
    assert!(store.store.condemn(NS, &key(1), &place, Miss::PayloadCrc));
    assert!(!store.hits(1));
    assert_eq!(store.store.counters().get(Counter::Condemned), 1);
    let counted: u64 = store.store.misses().map(|(_, count)| count).sum();
    assert_eq!(counted, 3, "two verdicts and one absent read");
    store.put_all([1]);
    assert!(store.hits(1));
}

// L5, and writes go on: with a reader in every segment one is chosen all the same, gets no new
// reader, and is used again when the last has gone.
#[test]
fn a_segment_that_is_being_read_is_used_again_only_after_the_read() {
    let mut store = Fixture::new();
    for round in 0..3 {
        store.put_all(round * 60..round * 60 + 60);
    }
    let recycled = store.store.counters().get(Counter::Recycled);
    let here: Vec<u64> = (0..180)
        .filter(|number| store.store.peek(NS, &key(*number)).is_some())
        .collect();
    let mut read = std::collections::BTreeMap::new();
    for number in here {
        let segment = store.place(number).segment;
        read.entry(segment).or_insert_with(|| {
            let (tag, buf) = (store.tag(), store.buf());
            store.store.get(tag, &want(NS, number), buf).unwrap();
            (tag, number)
        });
    }
    assert!(read.len() >= 6, "{read:?}");
    store.put_all(200..230);
    assert!(store.store.counters().get(Counter::Recycled) > recycled);
    for (tag, number) in read.into_values() {
        let right = payload(NS, number, 0, stored_len(number));
        assert_eq!(store.got[&tag].as_ref(), Ok(&right), "record {number}");
    }
}
