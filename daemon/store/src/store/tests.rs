//! The store's promises without faults: what is put is found, alone, whole and again.

use std::collections::BTreeSet;

use kvtier_proto::{Level, Miss};

use crate::disk::Wait;
use crate::disk::sim::{SimDisk, SimOptions};
use crate::format::segment::segment_name;
use crate::testkit::*;
use crate::*;

#[test]
fn get_returns_the_bytes_of_every_durable_put() {
    let mut store = Fixture::new();
    store.put_all(0..40);
    for number in 0..40 {
        assert!(store.hits(number), "record {number}");
    }
    assert_eq!(store.store.usage().blocks, 40);
}

#[test]
fn get_misses_as_absent_for_unknown_keys_and_other_namespaces() {
    let mut store = Fixture::new();
    store.put_all([1]);
    assert_eq!(store.get(&want(NS, 2)), Err(Miss::Absent));
    assert_eq!(store.get(&want(OTHER, 1)), Err(Miss::Absent));
    assert!(store.hits(1));
}

#[test]
fn reopening_finds_every_durable_put() {
    let mut store = Fixture::new();
    store.put_all(0..40);
    let before = store.index();
    let disk = store.store.abandon().crash(3);
    let mut store = Fixture::reopened(disk);
    assert_eq!(store.index(), before);
    for number in 0..40 {
        assert!(store.hits(number), "record {number}");
    }
}

#[test]
fn get_parts_returns_exactly_the_parts_asked_for() {
    let mut store = Fixture::new();
    store.put_all(0..10);
    for number in 0..10 {
        let all = payload(NS, number, 0, stored_len(number));
        for (first, last) in [(0, 1), (1, 2), (2, 4), (0, 4), (3, 4)] {
            let (tag, buf) = (store.tag(), store.buf());
            store
                .store
                .get_parts(tag, &want(NS, number), first..last, buf)
                .unwrap();
            store.rest();
            let got = store.got.remove(&tag).unwrap().unwrap();
            let lens: Vec<usize> = parts(number)
                .iter()
                .map(|part| part.stored_len as usize)
                .collect();
            let from: usize = lens[..first].iter().sum();
            let len: usize = lens[first..last].iter().sum();
            assert_eq!(
                got,
                all[from..from + len],
                "record {number}, parts {first}..{last}"
            );
        }
    }
}

#[test]
fn get_parts_reads_a_head_once_and_checks_every_part_all_the_same() {
    let mut store = Fixture::new();
    store.put_all([1]);
    let read = |store: &mut Fixture, part: usize| {
        let (tag, buf) = (store.tag(), store.buf());
        let before = store.store.disk().taken();
        let taken = store
            .store
            .get_parts(tag, &want(NS, 1), part..part + 1, buf);
        taken.unwrap();
        store.rest();
        let operations = store.store.disk().taken() - before;
        (store.got.remove(&tag).unwrap(), operations)
    };
    let all = payload(NS, 1, 0, stored_len(1));
    let lens: Vec<usize> = parts(1).iter().map(|p| p.stored_len as usize).collect();
    let mut from = 0;
    for (part, len) in lens.iter().enumerate() {
        let (got, operations) = read(&mut store, part);
        assert_eq!(got.unwrap(), all[from..from + len]);
        assert_eq!(operations, if part == 0 { 2 } else { 1 }, "part {part}");
        from += len;
    }
    // The head is known; what lies there now is not what it speaks of.
    let place = store.place(1);
    let file = segment_name(place.segment);
    let payload_at = place.offset + u64::from(place.head_len);
    let last = crate::format::index(payload_at) + from - 1;
    store.store.disk_mut().content(&file).unwrap()[last] ^= 1;
    assert_eq!(read(&mut store, 3).0, Err(Miss::PayloadCrc));
    // A condemned head is read again.
    store.store.condemn(NS, &key(1), &place, Miss::PayloadCrc);
    store.put_all([1]);
    assert_eq!(read(&mut store, 3).1, 2);
}

#[test]
fn get_head_reads_a_head_in_one_operation_and_checks_it_whatever_the_layout() {
    let mut store = Fixture::new();
    store.put_all([1]);
    let read = |store: &mut Fixture, key| {
        let (tag, buf) = (store.tag(), store.buf());
        let before = store.store.disk().taken();
        let taken = store.store.get_head(tag, (NS, key), buf);
        taken.map_err(|(_, miss)| miss)?;
        store.rest();
        assert_eq!(store.store.disk().taken() - before, 1);
        store.got.remove(&tag).unwrap()
    };
    assert_eq!(read(&mut store, key(1)), Ok(Vec::new()), "no part of it");
    assert_eq!(read(&mut store, key(2)), Err(Miss::Absent));
    let place = store.place(1);
    let file = segment_name(place.segment);
    let at = crate::format::index(place.offset);
    store.store.disk_mut().content(&file).unwrap()[at + 24] ^= 1;
    assert_eq!(read(&mut store, key(1)), Err(Miss::HeaderCrc));
}

#[test]
fn get_parts_misses_when_the_record_has_no_such_part() {
    let mut store = Fixture::new();
    store.put_all([1]);
    for parts in [4..5, 2..2, 0..9] {
        let (tag, buf) = (store.tag(), store.buf());
        store
            .store
            .get_parts(tag, &want(NS, 1), parts, buf)
            .unwrap();
        store.rest();
        assert_eq!(store.got.remove(&tag), Some(Err(Miss::Absent)));
    }
}

#[test]
fn get_refuses_a_buffer_that_is_too_short() {
    let mut store = Fixture::new();
    store.put_all([1]);
    let buf = store.arena.alloc(4096).unwrap();
    let (_, miss) = store.store.get(1, &want(NS, 1), buf).unwrap_err();
    assert_eq!(miss, Miss::NoSpace);
}

#[test]
fn put_of_what_is_here_is_answered_durable_without_a_write() {
    let mut store = Fixture::new();
    store.put_all([1]);
    let written = store.store.counters().get(Counter::BytesWritten);
    let first = store.place(1);
    let tag = store.put(NS, 1, 0);
    store.rest();
    assert_eq!(store.puts[&tag].as_ref().unwrap(), &first);
    assert_eq!(store.store.counters().get(Counter::BytesWritten), written);
}

#[test]
fn put_of_another_level_replaces_what_is_here() {
    let mut store = Fixture::new();
    store.put_all([1]);
    store.put(NS, 1, 3);
    store.rest();
    assert_eq!(store.store.peek(NS, &key(1)).unwrap().level, Level(3));
    let bytes = store.get(&want(NS, 1)).unwrap();
    assert_eq!(bytes, payload(NS, 1, 3, stored_len(1)));
    let mut store = Fixture::reopened(store.store.abandon().crash(1));
    assert_eq!(
        store.get(&want(NS, 1)).unwrap(),
        payload(NS, 1, 3, stored_len(1))
    );
}

// Goal: nothing is visible before it is durable (L1).
// Method: look after every step; a block that can be found must survive a crash at that moment.
#[test]
fn a_block_that_can_be_found_survives_a_crash_at_that_moment() {
    let mut store = Fixture::new();
    for number in 0..30 {
        store.put(NS, number, 0);
    }
    let mut looked = 0;
    while !store.store.is_idle() {
        store.step();
        let visible: BTreeSet<_> = store.index().into_keys().collect();
        let after = Fixture::reopened(store.store.disk().crash(looked));
        let survived: BTreeSet<_> = after.index().into_keys().collect();
        assert!(survived.is_superset(&visible), "after {looked} steps");
        looked += 1;
    }
    assert!(looked > 5, "the run was too short to show anything");
}

#[test]
fn puts_that_come_together_share_a_sync() {
    let mut store = Fixture::new();
    store.put_all(0..8);
    assert!(store.store.counters().get(Counter::Syncs) <= 2);
}

#[test]
fn put_refuses_what_no_segment_can_hold() {
    let mut store = Fixture::new();
    let spec = [PartSpec {
        layer: 0,
        code: PartCode::K,
        flags: 0,
        stored_len: 256 * 1024,
        raw_len: 256 * 1024,
    }];
    let image = build(&store.arena, &meta(NS, 1), &spec, &vec![7; 256 * 1024]);
    let (_, problem) = store.store.put(1, image).unwrap_err();
    assert!(matches!(problem, PutError::TooLarge { .. }), "{problem}");
    assert!(
        problem
            .to_string()
            .contains("segments of this store take up to")
    );
}

#[test]
fn put_refuses_one_more_than_the_queue_holds() {
    let mut options = options();
    options.queue_max = 2;
    let mut store = Fixture::on(SimDisk::new(SimOptions::default()), options, None);
    let tags: Vec<u64> = (0..3).map(|number| store.put(NS, number, 0)).collect();
    assert!(matches!(
        store.puts[&tags[2]],
        Err(PutError::Busy { queued: 2 })
    ));
    store.rest();
    assert!(store.puts[&tags[0]].is_ok() && store.puts[&tags[1]].is_ok());
}

#[test]
fn closing_and_reopening_keeps_everything_with_a_footer() {
    let mut store = Fixture::new();
    for number in 0..20 {
        store.put(NS, number, 0);
    }
    let mut events = Vec::new();
    let disk = store.store.close(&mut events).crash(9);
    let durable = events
        .iter()
        .filter(|one| matches!(one, Event::Put { result: Ok(_), .. }));
    assert_eq!(durable.count(), 20);
    let mut store = Fixture::reopened(disk);
    assert_eq!(
        store.report.scanned, 0,
        "a closed store has a footer in every segment"
    );
    assert!((0..20).all(|number| store.hits(number)));
}

#[test]
fn options_out_of_bounds_are_all_named() {
    let mut options = StoreOptions::new(1000, [1; 16]);
    options.segment_size = 1000;
    options.queue_max = 0;
    options.window_bytes = 0;
    let problems = options.problems();
    assert_eq!(problems.len(), 4, "{problems:?}");
    let disk = SimDisk::new(SimOptions::default());
    let problem = Store::open(disk, options, None, &mut |_| {}).unwrap_err();
    assert!(
        problem
            .to_string()
            .contains("segment_size is 1000 bytes; accepted is"),
        "{problem}"
    );
}

#[test]
fn step_without_work_reports_nothing() {
    let mut store = Fixture::new();
    let mut events = Vec::new();
    store.store.step(Wait::One, &mut events);
    assert!(events.is_empty() && store.store.is_idle());
}

#[test]
fn everybody_is_answered_when_the_lane_dies() {
    for steps in 0..6 {
        let mut store = Fixture::new();
        store.put_all(0..10);
        let puts: Vec<u64> = (10..20).map(|number| store.put(NS, number, 0)).collect();
        let reads: Vec<u64> = (0..5)
            .map(|number| {
                let (tag, buf) = (store.tag(), store.buf());
                store.store.get(tag, &want(NS, number), buf).unwrap();
                tag
            })
            .collect();
        (0..steps).for_each(|_| store.step());
        store.store.disk_mut().die();
        // Something is under way when the store finds out.
        let last = store.put(NS, 30, 0);
        store.rest();
        assert!(store.puts[&last].is_err());
        assert!(
            puts.iter().all(|tag| store.puts.contains_key(tag)),
            "after {steps} steps"
        );
        assert!(
            reads.iter().all(|tag| store.got.contains_key(tag)),
            "after {steps} steps"
        );
        assert!(store.store.state() >= DeviceState::ReadOnly);
    }
}

#[test]
fn a_device_without_room_for_one_segment_is_asked_again() {
    let mut store = Fixture::new();
    store.store.disk_mut().set_space(0);
    let refused = store.put(NS, 1, 0);
    store.rest();
    assert!(matches!(store.puts[&refused], Err(PutError::NoRoom)));
    assert_eq!(store.store.state(), DeviceState::Full);
    store.store.disk_mut().set_space(1 << 30);
    store.put_all([1]);
    assert!(store.hits(1));
    assert_eq!(store.store.state(), DeviceState::Healthy);
}
