//! A record that is re-encoded is there before, meanwhile and afterwards, and never comes back in
//! place of a newer one.

use kvtier_proto::Miss;

use crate::testkit::*;
use crate::*;

/// Records that fill more than one segment, so that the first ones lie in a sealed one.
const MANY: u64 = 40;

fn stored(store: &Fixture, number: u64) -> Stored {
    store.store.peek(NS, &key(number)).unwrap()
}

/// Queues version `version` of a record in place of `from`.
fn recode(store: &mut Fixture, number: u64, version: u64, from: &Stored) -> u64 {
    let tag = store.tag();
    let image = image(&store.arena, NS, number, version);
    if let Err((_, problem)) = store.store.recode(tag, image, from) {
        store.puts.insert(tag, Err(problem));
    }
    tag
}

fn reads(store: &mut Fixture, number: u64, version: u64) {
    let bytes = store.get(&want(NS, number));
    let want = payload(NS, number, version, stored_len(number));
    assert!(
        bytes == Ok(want),
        "record {number} is not version {version}"
    );
}

fn is_superseded(store: &Fixture, tag: u64) -> bool {
    matches!(store.puts[&tag], Err(PutError::Superseded))
}

#[test]
fn a_recoded_record_takes_the_place_of_its_other_form_and_keeps_it_after_a_crash() {
    let mut store = Fixture::new();
    store.put_all(0..MANY);
    assert!(store.store.pin(NS, &key(2)));
    let before = stored(&store, 2);
    let tag = recode(&mut store, 2, 1, &before);
    store.rest();
    reads(&mut store, 2, 1);
    assert!(store.puts[&tag].is_ok(), "{:?}", store.puts[&tag]);
    let after = stored(&store, 2);
    assert_eq!(after.place.sequence, before.place.sequence);
    assert!(after.place.epoch > before.place.epoch && after.pinned);
    let mut store = Fixture::reopened(store.store.abandon().crash(5));
    reads(&mut store, 2, 1);
    assert_eq!(store.store.usage().blocks, MANY);
}

// Goal: at no moment of a crash is there nothing, or anything but one of the two forms.
// Method: the power goes after each step of a re-encode, with several outcomes of what was not
// synced.
#[test]
fn a_record_survives_a_crash_at_every_step_of_its_recoding() {
    let mut forms = [0, 0];
    for (steps, seed) in (0..12).flat_map(|steps| (0..4).map(move |seed| (steps, seed))) {
        let mut store = Fixture::new();
        store.put_all(0..MANY);
        let before = stored(&store, 2);
        recode(&mut store, 2, 1, &before);
        for _ in 0..steps {
            store.step();
        }
        let mut store = Fixture::reopened(store.store.abandon().crash(seed));
        let bytes = store.get(&want(NS, 2)).unwrap();
        let form = [0, 1].map(|version| payload(NS, 2, version, stored_len(2)));
        let which = form.iter().position(|form| *form == bytes);
        forms[which.expect("one of the two forms")] += 1;
    }
    assert!(forms[0] > 0 && forms[1] > 0, "{forms:?}");
}

// Goal: a save that comes while a block is being re-encoded wins, whichever is written first, now
// and after a crash.
#[test]
fn a_newer_put_goes_before_a_recoding_in_either_order() {
    for put_first in [true, false] {
        let mut store = Fixture::new();
        store.put_all(0..MANY);
        let before = stored(&store, 2);
        let put = |store: &mut Fixture| store.put(NS, 2, 8);
        let (newer, tag) = if put_first {
            let newer = put(&mut store);
            (newer, recode(&mut store, 2, 1, &before))
        } else {
            let tag = recode(&mut store, 2, 1, &before);
            (put(&mut store), tag)
        };
        store.rest();
        assert!(store.puts[&newer].is_ok());
        assert!(store.puts[&tag].is_ok() || is_superseded(&store, tag));
        reads(&mut store, 2, 8);
        let mut store = Fixture::reopened(store.store.abandon().crash(1));
        reads(&mut store, 2, 8);
    }
}

#[test]
fn a_recoding_of_what_is_not_there_any_more_is_superseded() {
    let mut store = Fixture::new();
    store.put_all(0..MANY);
    let before = stored(&store, 2);
    let newer = store.put(NS, 2, 8);
    store.rest();
    assert!(store.puts[&newer].is_ok());
    let tag = recode(&mut store, 2, 1, &before);
    store.rest();
    assert!(is_superseded(&store, tag));
    reads(&mut store, 2, 8);
    // A record that was found damaged stays away.
    let damaged = stored(&store, 3);
    let tag = recode(&mut store, 3, 1, &damaged);
    store
        .store
        .condemn(NS, &key(3), &damaged.place, Miss::PayloadCrc);
    store.rest();
    assert!(is_superseded(&store, tag));
    assert_eq!(store.get(&want(NS, 3)), Err(Miss::Absent));
    // The newest records lie in the open segment, which is no older than the next record.
    let newest = stored(&store, MANY - 1);
    let tag = recode(&mut store, MANY - 1, 1, &newest);
    assert!(is_superseded(&store, tag));
}

#[test]
fn a_recoding_of_a_wiped_namespace_is_not_stored() {
    let mut store = Fixture::new();
    store.put_all(0..MANY);
    let before = stored(&store, 2);
    let tag = recode(&mut store, 2, 1, &before);
    let mut events = Vec::new();
    store.store.wipe(NS, &mut events).unwrap();
    events.into_iter().for_each(|event| store.note(event));
    store.rest();
    assert!(store.puts[&tag].is_err());
    let mut store = Fixture::reopened(store.store.abandon().crash(1));
    assert_eq!(store.get(&want(NS, 2)), Err(Miss::Absent));
}

#[test]
fn a_put_over_a_record_that_looks_the_same_is_written() {
    let mut store = Fixture::new();
    store.put_all(0..3);
    let before = store.place(1);
    let same = store.put(NS, 1, 0);
    store.rest();
    assert_eq!(store.puts[&same].as_ref().unwrap(), &before, "not written");
    let tag = store.tag();
    let again = image(&store.arena, NS, 1, 0);
    store.store.put_over(tag, again, before).unwrap();
    store.rest();
    let after = store.place(1);
    assert!(after.sequence > before.sequence);
    // Another record has taken its place meanwhile: that one is an answer.
    let tag = store.tag();
    let again = image(&store.arena, NS, 1, 0);
    store.store.put_over(tag, again, before).unwrap();
    store.rest();
    assert_eq!(store.place(1), after);
    assert!(store.puts[&tag].is_ok() && store.hits(1));
}

#[test]
fn sealed_segments_come_oldest_first_with_what_they_hold() {
    let mut store = Fixture::new();
    store.put_all(0..MANY);
    let (mut epoch, mut seen) = (0, 0);
    while let Some((next, blocks)) = store.store.sealed_after(epoch) {
        assert!(next > epoch);
        assert!(blocks.iter().all(|one| one.place.epoch == next));
        (epoch, seen) = (next, seen + blocks.len());
    }
    assert!(seen > 0 && seen < crate::format::index(MANY), "{seen}");
}
