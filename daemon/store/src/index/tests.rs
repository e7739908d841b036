//! The index against a plain map, under a seeded stream of inserts and removals.

#![allow(clippy::cast_possible_truncation, reason = "test numbers are small")]

use std::collections::BTreeMap;

use kvtier_proto::{NamespaceId, Quality};
use proptest::collection::vec;
use proptest::prelude::*;

use super::*;
use crate::disk::sim::Seeded;
use crate::testkit::{NS, key};

fn stored(number: u64, segment: u32, sequence: u64) -> Stored {
    let place = Place {
        segment,
        offset: 4096 * (1 + number),
        len: 8192,
        head_len: 4096,
        epoch: 100 + u64::from(segment),
        sequence,
    };
    Stored {
        namespace: NS,
        key: key(number),
        kind: PayloadKind::Kv,
        level: Level(0),
        through: Quality::Exact,
        layout_tag: 5,
        pinned: false,
        place,
    }
}

fn with_segments(count: u32) -> Index {
    let mut index = Index::new(StoreId([3; 16]));
    (0..count).for_each(|segment| index.set_epoch(segment, 100 + u64::from(segment)));
    index
}

#[test]
fn index_agrees_with_a_map_after_every_insert_and_removal() {
    let mut random = Seeded::new(4);
    let (mut index, mut map) = (with_segments(5), BTreeMap::new());
    for sequence in 1..20_000 {
        let number = random.below(700);
        if random.below(3) == 0 {
            let removed = index.remove(NS, &key(number));
            assert_eq!(
                removed,
                map.remove(&number),
                "removal of {number} at {sequence}"
            );
        } else {
            let one = stored(number, random.below(5) as u32, sequence);
            let want = match map.insert(number, one) {
                None => Inserted::New,
                Some(old) => Inserted::Replaced(old),
            };
            assert_eq!(index.insert(&one), want, "insert of {number} at {sequence}");
        }
        assert_eq!(index.len(), map.len());
    }
    for number in 0..700 {
        assert_eq!(index.get(NS, &key(number)), map.get(&number).copied());
    }
    assert_eq!(index.iter().count(), map.len());
    for segment in 0..5 {
        let listed: Vec<Stored> = index.in_segment(segment).collect();
        let want = map
            .values()
            .filter(|one| one.place.segment == segment)
            .count();
        assert_eq!(
            (listed.len(), index.live_in(segment) as usize),
            (want, want)
        );
        assert!(listed.iter().all(|one| one.place.segment == segment));
    }
}

#[test]
fn insert_keeps_the_higher_sequence_whatever_comes_first() {
    let mut index = with_segments(2);
    assert_eq!(index.insert(&stored(1, 0, 9)), Inserted::New);
    assert_eq!(index.insert(&stored(1, 1, 8)), Inserted::Older);
    assert_eq!(index.get(NS, &key(1)).unwrap().place.sequence, 9);
    assert!(matches!(
        index.insert(&stored(1, 1, 10)),
        Inserted::Replaced(_)
    ));
    assert_eq!(index.get(NS, &key(1)).unwrap().place.sequence, 10);
}

#[test]
fn replacing_a_pinned_record_keeps_the_pin() {
    let mut index = with_segments(2);
    index.insert(&stored(1, 0, 1));
    index.set_pinned(NS, &key(1), true);
    index.insert(&stored(1, 1, 2));
    assert!(index.get(NS, &key(1)).unwrap().pinned);
}

proptest! {
    // Reclaim asks for these sums at every recycled segment: they are what a walk would find.
    #[test]
    fn pinned_bytes_are_those_of_a_walk(
        steps in vec((0..40u64, 0..4u32, 0..5u64, 1..6u32), 1..400),
    ) {
        let mut index = with_segments(4);
        for (sequence, (number, segment, what, blocks)) in (1..).zip(steps) {
            match what {
                0 => drop(index.remove(NS, &key(number))),
                1 => index.set_pinned(NS, &key(number), true),
                2 => index.set_pinned(NS, &key(number), false),
                _ => {
                    let mut one = stored(number, segment, sequence);
                    one.place.len = 4096 * blocks;
                    index.insert(&one);
                }
            }
            let pinned = |one: &Stored| if one.pinned { u64::from(one.place.len) } else { 0 };
            for segment in 0..4 {
                let walk: u64 = index.in_segment(segment).map(|one| pinned(&one)).sum();
                prop_assert_eq!(index.pinned_in(segment), walk);
            }
            let walk: u64 = index.iter().map(|one| pinned(&one)).sum();
            prop_assert_eq!(index.pinned_bytes(), walk);
        }
        index.clear();
        prop_assert_eq!((index.pinned_bytes(), index.pinned_in(0)), (0, 0));
    }
}

#[test]
fn the_same_key_in_two_namespaces_is_two_blocks() {
    let mut index = with_segments(1);
    let other = Stored {
        namespace: NamespaceId(99),
        ..stored(1, 0, 2)
    };
    index.insert(&stored(1, 0, 1));
    index.insert(&other);
    assert_eq!(index.len(), 2);
    assert_eq!(index.remove(NamespaceId(99), &key(1)), Some(other));
    assert!(index.get(NS, &key(1)).is_some());
}

#[test]
fn index_takes_at_most_160_bytes_a_block_at_every_size() {
    let mut index = with_segments(1);
    let mut worst = 0;
    for number in 0..200_000u64 {
        index.insert(&stored(number, 0, number + 1));
        if number > 20_000 {
            worst = worst.max(index.bytes() / index.len());
        }
    }
    assert!(worst <= 160, "{worst} bytes a block");
}

#[test]
fn a_cleared_index_takes_blocks_again_and_keeps_epochs() {
    let mut index = with_segments(3);
    index.reserve(5000);
    let before = index.bytes();
    for round in 0..2 {
        for number in 0..5000 {
            let one = stored(number, (number % 3) as u32, number + 1);
            assert_eq!(index.insert(&one), Inserted::New, "round {round}");
        }
        assert_eq!(index.get(NS, &key(7)), Some(stored(7, 1, 8)));
        assert_eq!(
            index.bytes(),
            before,
            "room for all of them was taken before"
        );
        index.clear();
        assert_eq!(
            (index.len(), index.iter().count(), index.live_in(1)),
            (0, 0, 0)
        );
        assert_eq!(index.get(NS, &key(7)), None);
    }
}
