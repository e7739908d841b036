//! What a pass reads, finds, condemns and leaves alone.
#![allow(clippy::cast_possible_truncation, reason = "test numbers are small")]

use crate::disk::sim::{Fault, Faults};
use crate::testkit::*;
use crate::*;

use super::*;

const FAST: u64 = 1 << 40;

/// Two sealed segments and some records in the open one.
fn filled() -> Fixture {
    let mut store = Fixture::new();
    store.put_all(0..50);
    store
}

fn pass(store: &mut Fixture, rate: u64) -> ScrubProgress {
    store.store.scrub(rate);
    for _ in 0..100_000 {
        store.step();
        if let Some(progress) = store.scrubs.pop() {
            return progress;
        }
    }
    panic!("no end: {:?}", store.store.scrub_progress());
}

/// Flips a bit in the payload of a stored record.
fn damage(store: &mut Fixture, number: u64) -> Place {
    let place = store.place(number);
    let name = format!("segment-{:08x}.kvs", place.segment);
    let file = store.store.disk_mut().content(&name).unwrap();
    file[(place.offset + u64::from(place.head_len)) as usize + 1] ^= 4;
    place
}

fn sealed(store: &Fixture) -> Vec<Stored> {
    let open = store.place(49).segment;
    let blocks = store.store.blocks();
    blocks.filter(|one| one.place.segment != open).collect()
}

#[test]
fn a_pass_reads_every_sealed_record_once_and_condemns_none_that_is_sound() {
    let mut store = filled();
    let here = sealed(&store);
    assert!(here.len() > 20, "{}", here.len());
    let progress = pass(&mut store, FAST);
    let bytes: u64 = here.iter().map(|one| u64::from(one.place.len)).sum();
    let seen = (progress.records, progress.bytes, progress.bad);
    assert_eq!(seen, (here.len() as u64, bytes, 0));
    assert_eq!(store.store.counters().get(Counter::ScrubBytes), bytes);
    assert!(store.store.scrub_progress().is_none() && store.condemned.is_empty());
    assert_eq!(store.store.usage().blocks, 50);
}

#[test]
fn a_flipped_bit_is_found_and_its_record_condemned_before_anybody_asks_for_it() {
    let mut store = filled();
    let places = [2, 5].map(|number| damage(&mut store, number));
    assert_eq!(pass(&mut store, FAST).bad, 2);
    store.condemned.sort_by_key(|place| place.offset);
    assert_eq!(store.condemned, places);
    assert_eq!(store.store.counters().get(Counter::ScrubBad), 2);
    assert_eq!(store.get(&want(NS, 2)), Err(Miss::Absent));
    assert!(store.hits(3));
    assert_eq!(pass(&mut store, FAST).bad, 0, "found once");
}

#[test]
fn what_is_wrong_only_on_the_way_condemns_nothing() {
    let mut store = filled();
    let count = sealed(&store).len();
    // About every tenth read, so that hardly any record is unlucky twice.
    let faults = Faults::default().with(Fault::FlipOnRead, 100_000);
    store.store.disk_mut().set_faults(faults);
    pass(&mut store, FAST);
    let flips = store.store.disk_mut().fired().times(Fault::FlipOnRead);
    assert!(flips > 0);
    assert!(
        (store.condemned.len() as u64) < flips.min(3),
        "{count} records"
    );
}

#[test]
fn a_device_that_fails_condemns_nothing_and_ends_the_pass() {
    let mut store = filled();
    store.store.scrub(FAST);
    store.step();
    store.store.disk_mut().die();
    for _ in 0..20 {
        store.step();
    }
    assert_eq!(store.store.state(), DeviceState::Failed);
    assert!(store.store.scrub_progress().is_none() && store.condemned.is_empty());
    assert_eq!(store.store.usage().blocks, 50);
}

#[test]
fn a_pass_takes_the_time_that_its_rate_says() {
    let mut store = filled();
    let rate = 100 << 10;
    let progress = pass(&mut store, rate);
    let due = Duration::from_millis(progress.bytes * 1000 / rate);
    assert!(
        progress.time + due / 10 >= due,
        "{:?} of {due:?}",
        progress.time
    );
    assert!(
        progress.time <= due + due / 10,
        "{:?} of {due:?}",
        progress.time
    );
}

// Segments come and go while the pass is under way: reclaim never waits for it, and what was
// replaced is nobody's damage.
#[test]
fn a_pass_beside_recycling_condemns_nothing_and_ends() {
    let mut store = filled();
    store.store.scrub(1 << 20);
    for round in 1..20 {
        store.put_all(round * 100..round * 100 + 30);
    }
    assert!(store.store.counters().get(Counter::Recycled) > 5);
    while store.scrubs.is_empty() {
        store.step();
    }
    assert!(store.condemned.is_empty());
}

// A daemon that is started more often than a pass takes reads everything all the same.
#[test]
fn every_life_begins_its_pass_elsewhere_and_every_segment_has_its_turn() {
    let mut store = Fixture::new();
    store.put_all(0..120);
    let mut first = std::collections::BTreeSet::new();
    let segments = store.store.usage().segments;
    assert!(segments >= 5, "{segments}");
    for life in 0..2 * segments {
        store = Fixture::reopened(store.store.abandon().crash(life));
        store.store.scrub(FAST);
        let pass = store.store.scrub.as_ref().unwrap();
        let all: std::collections::BTreeSet<u32> = pass.ahead.iter().copied().collect();
        assert_eq!(all.len() as u64, segments, "once round");
        first.insert(pass.ahead[0]);
    }
    assert_eq!(first.len() as u64, segments, "{first:?}");
}

#[test]
fn a_pass_without_memory_waits_for_it_and_skips_nothing() {
    let mut store = filled();
    let bytes: u64 = sealed(&store)
        .iter()
        .map(|one| u64::from(one.place.len))
        .sum();
    store.store.no_memory = true;
    store.store.scrub(FAST);
    (0..20).for_each(|_| store.step());
    let progress = store.store.scrub_progress().expect("it is under way");
    assert!(progress.records == 0 && progress.segments_done < progress.segments);
    assert!(
        progress.time >= NO_MEMORY_PAUSE,
        "no pause between two tries"
    );
    store.store.no_memory = false;
    while store.scrubs.is_empty() {
        store.step();
    }
    assert_eq!(store.scrubs[0].bytes, bytes);
}

#[test]
fn a_pass_that_is_started_anew_forgets_the_one_before() {
    let mut store = filled();
    store.store.scrub(FAST);
    store.step();
    let progress = pass(&mut store, FAST);
    assert_eq!(progress.records as usize, sealed(&store).len());
    assert!(store.scrubs.is_empty(), "one end, not two");
}
