//! Tests of the order in which blocks leave host memory.

use std::sync::Arc;
use std::time::Duration;

use kvtier_proto::descriptor::PartOrder;
use kvtier_proto::{BlockLayout, LayoutFingerprint, NamespaceId};
use kvtier_store::mem::{Arena, Share};
use proptest::prelude::*;

use super::*;
use crate::block::{BlockFacts, BlockId};

fn arena() -> Arc<Arena> {
    Arena::create("directory", 1 << 20, Share::Private).unwrap()
}

fn block(arena: &Arc<Arena>, key: u8, parent: u8) -> Arc<HostBlock> {
    let id = BlockId {
        namespace: NamespaceId(1),
        kind: PayloadKind::Kv,
        key: BlockKey([key; 32]),
    };
    let layout = Arc::new(BlockLayout::opaque(16, 8).unwrap());
    let (parent, fingerprint) = (BlockKey([parent; 32]), LayoutFingerprint([0; 32]));
    let facts = BlockFacts {
        parent,
        position: 0,
        fingerprint,
        layout,
        order: PartOrder::TokenMajor,
    };
    Arc::new(HostBlock::new(id, facts, arena.alloc(8).unwrap(), 0).unwrap())
}

fn name(key: u8) -> Name {
    (PayloadKind::Kv, BlockKey([key; 32]))
}

fn evict_all(directory: &mut Directory) -> Vec<u8> {
    let now = Instant::now();
    std::iter::from_fn(|| directory.evict(now).map(|block| block.id().key.0[0])).collect()
}

#[test]
fn evict_takes_the_least_recently_used_first() {
    let (arena, mut directory) = (arena(), Directory::default());
    for key in [1, 2, 3] {
        directory.insert(block(&arena, key, 0), false);
    }
    assert!(directory.get(&name(1)).is_some());
    assert_eq!(evict_all(&mut directory), [2, 3, 1]);
    assert!(directory.is_empty());
}

#[test]
fn evict_takes_leaves_before_the_blocks_they_follow_in_any_order_of_arrival() {
    let arena = arena();
    for order in [[1, 2, 3], [3, 2, 1], [2, 3, 1]] {
        let mut directory = Directory::default();
        for key in order {
            directory.insert(block(&arena, key, key - 1), false);
        }
        assert_eq!(evict_all(&mut directory), [3, 2, 1], "arrival {order:?}");
    }
}

#[test]
fn evict_spares_held_and_pinned_blocks_until_they_are_free() {
    let (arena, mut directory) = (arena(), Directory::default());
    for key in [1, 2] {
        directory.insert(block(&arena, key, 0), false);
    }
    let lease = directory.get(&name(1)).unwrap();
    let now = Instant::now();
    assert!(directory.pin(&name(2), Some(now + Duration::from_secs(60))));
    assert!(directory.evict(now).is_none());
    assert!(
        directory.evict(now + Duration::from_secs(61)).is_some(),
        "the pin has ended"
    );
    drop(lease);
    assert_eq!(evict_all(&mut directory), [1]);
}

#[test]
fn insert_keeps_the_first_of_two_blocks_of_one_name() {
    let (arena, mut directory) = (arena(), Directory::default());
    let first = directory.insert(block(&arena, 1, 0), false);
    let second = directory.insert(block(&arena, 1, 0), false);
    assert!(Arc::ptr_eq(&first, &second));
    assert_eq!(directory.len(), 1);
}

proptest! {
    // Goal: T1 and T2 under any history; and nothing is left behind that could leave.
    #[test]
    fn evict_never_takes_a_held_block_or_one_with_a_resident_child(
        steps in proptest::collection::vec((0u8..5, 1u8..24), 1..200),
    ) {
        let (arena, mut directory) = (arena(), Directory::default());
        let mut held: Vec<Arc<HostBlock>> = Vec::new();
        for (what, key) in steps {
            match what {
                0 | 1 => drop(directory.insert(block(&arena, key, key / 2), false)),
                2 => held.extend(directory.get(&name(key))),
                3 => { held.pop(); }
                _ => if let Some(gone) = directory.evict(Instant::now()) {
                    let key = gone.id().key.0[0];
                    prop_assert!(!held.iter().any(|block| block.id() == gone.id()));
                    for child in (1u8..24).filter(|child| child / 2 == key) {
                        prop_assert!(!directory.contains(&name(child)), "{child} follows {key}");
                    }
                },
            }
        }
        held.clear();
        evict_all(&mut directory);
        prop_assert!(directory.is_empty());
        prop_assert_eq!(arena.free_bytes(), arena.capacity());
    }
}
