//! Tests of the host tier: blocks that are handed out, come back, and make room.

use std::pin::{Pin, pin};
use std::task::{Context, Waker};

use kvtier_proto::descriptor::PartOrder;
use kvtier_proto::{BlockKey, BlockLayout, LayoutFingerprint, Level, PayloadKind, Quality};

use super::*;
use crate::block::BlockFacts;

const BLOCK: usize = 4096;

fn tier(blocks: usize) -> HostTier {
    HostTier::create(NamespaceId(1), "test", blocks * BLOCK, Pages::Small).unwrap()
}

fn name(key: u8) -> Name {
    (PayloadKind::Kv, BlockKey([key; 32]))
}

fn add(tier: &HostTier, key: u8) -> Arc<HostBlock> {
    add_from(tier, key, Level::RAW)
}

fn add_from(tier: &HostTier, key: u8, level: Level) -> Arc<HostBlock> {
    let (kind, key) = name(key);
    let namespace = tier.namespace();
    let facts = BlockFacts {
        parent: BlockKey::ROOT,
        position: 0,
        through: Quality::Exact,
        fingerprint: LayoutFingerprint([0; 32]),
        layout: Arc::new(BlockLayout::opaque(16, BLOCK as u64).unwrap()),
        order: PartOrder::TokenMajor,
    };
    let id = BlockId {
        namespace,
        kind,
        key,
    };
    let image = tier.room(BLOCK).image.unwrap();
    let block = HostBlock::restored(id, facts, level, (image, 0)).unwrap();
    tier.insert(block, false, tier.life()).unwrap()
}

#[test]
fn room_is_made_only_from_blocks_that_nobody_holds() {
    let tier = tier(2);
    let (first, second) = (add(&tier, 1), add(&tier, 2));
    let again = tier.get(&name(1)).unwrap();
    assert!(Arc::ptr_eq(&first, &again), "everybody holds the same");
    assert_eq!(tier.info(&name(1)).unwrap().holders, 2);
    assert!(tier.room(BLOCK).image.is_none());
    drop(first);
    assert!(tier.room(BLOCK).image.is_none(), "one holder is left");
    drop(second);
    let taken = tier.room(BLOCK);
    assert_eq!(taken.evicted, [name(2)]);
    drop(again);
    assert_eq!(tier.info(&name(1)).unwrap().holders, 0);
    assert_eq!(tier.room(BLOCK).evicted, [name(1)]);
}

// Goal: A2, and that a reader of the worse block keeps its bytes, its pin the name.
#[test]
fn a_better_block_takes_the_place_of_a_worse_one_and_never_the_other_way_round() {
    let tier = tier(3);
    let worse = add_from(&tier, 1, Level::INT8);
    assert!(tier.pin(&name(1), Some(Duration::from_secs(60))));
    let better = add_from(&tier, 1, Level::LOSSLESS);
    assert_eq!(better.level(), Level::LOSSLESS);
    assert_eq!((worse.level(), worse.payload().len()), (Level::INT8, BLOCK));
    assert!(Arc::ptr_eq(&better, &tier.get(&name(1)).unwrap()));
    drop(worse);
    assert_eq!(
        tier.info(&name(1)).unwrap().holders,
        1,
        "the better one is held"
    );
    let again = add_from(&tier, 1, Level::SMALL);
    assert!(Arc::ptr_eq(&better, &again), "a worse one changes nothing");
    drop((better, again));
    assert_eq!((tier.len(), tier.info(&name(1)).unwrap().holders), (1, 0));
    let held = add(&tier, 2);
    let rest = tier.room(BLOCK).image.unwrap();
    assert!(tier.room(BLOCK).image.is_none(), "the pin is the name's");
    drop((held, rest));
}

// Goal: the end of a hold on a block of the life before says nothing of the block that has its
// name now, and the memory it still had is heard of when it is free.
#[test]
fn a_block_held_across_a_wipe_does_not_free_the_one_that_was_saved_since() {
    let tier = tier(2);
    let old = add(&tier, 1);
    tier.clear(|| ());
    let new = add(&tier, 1);
    assert!(!Arc::ptr_eq(&old, &new));
    drop(old);
    assert_eq!(tier.info(&name(1)).unwrap().holders, 1);
    let other = add(&tier, 2);
    assert!(tier.room(BLOCK).image.is_none(), "both are held");
    drop((new, other));
    assert_eq!(tier.room(BLOCK).evicted, [name(1)]);
}

#[test]
fn set_durable_of_an_earlier_life_says_nothing_of_the_block_saved_since() {
    let tier = tier(2);
    let before = tier.life();
    drop(add(&tier, 1));
    tier.clear(|| ());
    drop(add(&tier, 1));
    tier.set_durable(&name(1), true, before);
    assert!(!tier.info(&name(1)).unwrap().durable);
    tier.set_durable(&name(1), true, tier.life());
    assert!(tier.info(&name(1)).unwrap().durable);
}

// Goal: whoever waits for room is woken by what makes it; nobody looks again by the clock.
#[test]
fn freed_is_heard_when_a_holder_goes_and_when_memory_comes_home() {
    let tier = tier(2);
    let (held, loose) = (add(&tier, 1), tier.room(BLOCK).image.unwrap());
    let is_heard = |freed: Pin<&mut dyn Future<Output = ()>>| {
        let mut context = Context::from_waker(Waker::noop());
        freed.poll(&mut context).is_ready()
    };
    let mut freed = pin!(tier.freed());
    assert!(!is_heard(freed.as_mut()));
    drop(held);
    assert!(is_heard(freed));
    let mut freed = pin!(tier.freed());
    assert!(!is_heard(freed.as_mut()));
    drop(loose);
    assert!(is_heard(freed));
}
