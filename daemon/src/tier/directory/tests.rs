//! Tests of the order in which blocks leave host memory.

use std::sync::Arc;
use std::time::Duration;

use kvtier_proto::descriptor::PartOrder;
use kvtier_proto::{BlockLayout, LayoutFingerprint, NamespaceId, Quality};
use kvtier_store::mem::{Arena, Share};
use proptest::prelude::*;

use super::*;
use crate::block::{BlockFacts, BlockId, HostBlock};

/// Memory for `blocks` blocks.
fn arena_of(blocks: usize) -> Arc<Arena> {
    Arena::create("directory", blocks * 4096, Share::Private).unwrap()
}

fn arena() -> Arc<Arena> {
    arena_of(256)
}

fn key(number: u32) -> BlockKey {
    let mut key = [0; 32];
    key[..4].copy_from_slice(&number.to_le_bytes());
    BlockKey(key)
}

const TOKENS: u32 = 16;

/// A block that `depth` others come before.
fn block_at(arena: &Arc<Arena>, number: u32, parent: u32, depth: u32) -> Arc<RawBlock> {
    let id = BlockId {
        namespace: NamespaceId(1),
        kind: PayloadKind::Kv,
        key: key(number),
    };
    let layout = Arc::new(BlockLayout::opaque(TOKENS, 8).unwrap());
    let (parent, fingerprint) = (key(parent), LayoutFingerprint([0; 32]));
    let facts = BlockFacts {
        parent,
        position: depth * TOKENS,
        through: Quality::Exact,
        fingerprint,
        layout,
        order: PartOrder::TokenMajor,
    };
    let block = HostBlock::new(id, facts, arena.alloc(8).unwrap(), 0).unwrap();
    Arc::clone(block.raw())
}

/// A block that follows nothing.
fn block(arena: &Arc<Arena>, number: u32) -> Arc<RawBlock> {
    block_at(arena, number, 0, 0)
}

fn name(number: u32) -> Name {
    (PayloadKind::Kv, key(number))
}

fn number(block: &RawBlock) -> u32 {
    u32::from_le_bytes(block.id().key.0[..4].try_into().unwrap())
}

fn evict_all(directory: &mut Directory) -> Vec<u32> {
    let now = Instant::now();
    std::iter::from_fn(|| directory.evict(now).map(|block| number(&block))).collect()
}

#[test]
fn evict_takes_the_least_recently_used_first() {
    let (arena, mut directory) = (arena(), Directory::default());
    for number in [1, 2, 3] {
        directory.insert(block(&arena, number), false);
    }
    directory.touch(&name(1));
    assert_eq!(evict_all(&mut directory), [2, 3, 1]);
    assert!(directory.is_empty());
}

#[test]
fn evict_takes_leaves_before_the_blocks_they_follow_in_any_order_of_arrival() {
    let arena = arena();
    for order in [[1, 2, 3], [3, 2, 1], [2, 3, 1]] {
        let mut directory = Directory::default();
        for number in order {
            directory.insert(block_at(&arena, number, number - 1, number), false);
        }
        assert_eq!(evict_all(&mut directory), [3, 2, 1], "arrival {order:?}");
    }
}

// Goal: T5, with more blocks that may not leave than anybody would search: prefixes are saved
// front to back and side by side, so that the oldest thousands are all followed by another.
#[test]
fn evict_finds_the_leaf_of_long_prefixes_that_were_saved_side_by_side() {
    let (arena, mut directory) = (arena_of(8192), Directory::default());
    let (prompts, length) = (8, 1024);
    let number = |prompt: u32, at: u32| 1 + prompt * length + at;
    for at in 0..length {
        for prompt in 0..prompts {
            let parent = if at == 0 { 0 } else { number(prompt, at - 1) };
            directory.insert(block_at(&arena, number(prompt, at), parent, at), false);
        }
    }
    let gone = evict_all(&mut directory);
    assert_eq!(gone.len(), (prompts * length) as usize);
    assert_eq!(gone[0], number(0, length - 1), "the oldest of the leaves");
    assert!(directory.is_empty());
}

#[test]
fn evict_finds_one_free_block_behind_thousands_that_are_held() {
    let (arena, mut directory) = (arena_of(10_000), Directory::default());
    for number in 1..=10_000 {
        directory.insert(block(&arena, number), false);
        directory.set_held(&name(number), number != 9_000);
    }
    assert_eq!(evict_all(&mut directory), [9_000]);
    directory.set_held(&name(3), false);
    assert_eq!(evict_all(&mut directory), [3], "given back");
}

#[test]
fn evict_spares_held_and_pinned_blocks_until_they_are_free() {
    let (arena, mut directory) = (arena(), Directory::default());
    for number in [1, 2] {
        directory.insert(block(&arena, number), false);
    }
    directory.set_held(&name(1), true);
    let now = Instant::now();
    assert!(directory.pin(&name(2), Some(now + Duration::from_secs(60))));
    assert!(directory.evict(now).is_none());
    assert!(
        directory.evict(now + Duration::from_secs(61)).is_some(),
        "the pin has ended"
    );
    directory.set_held(&name(1), false);
    assert_eq!(evict_all(&mut directory), [1]);
}

// Goal: T5 against a client that says that blocks follow each other in a circle.
#[test]
fn evict_takes_blocks_that_claim_to_follow_each_other() {
    let arena = arena();
    for depths in [[1, 1], [1, 2], [2, 1], [0, u32::MAX / TOKENS]] {
        let mut directory = Directory::default();
        directory.insert(block_at(&arena, 1, 2, depths[0]), false);
        directory.insert(block_at(&arena, 2, 1, depths[1]), false);
        assert_eq!(evict_all(&mut directory).len(), 2, "{depths:?}");
    }
}

#[test]
fn insert_keeps_the_first_of_two_blocks_of_one_name() {
    let (arena, mut directory) = (arena(), Directory::default());
    let first = block(&arena, 1);
    directory.insert(Arc::clone(&first), false);
    directory.insert(block(&arena, 1), false);
    assert!(Arc::ptr_eq(&first, directory.get(&name(1)).unwrap()));
    assert_eq!(directory.len(), 1);
}

/// What the directory should do, in the plainest words.
#[derive(Default)]
struct Model {
    /// Number, parent, held, end of the pin; the least recently used first.
    blocks: Vec<(u32, u32, bool, Option<u64>)>,
}

impl Model {
    fn of(&mut self, number: u32) -> Option<&mut (u32, u32, bool, Option<u64>)> {
        self.blocks.iter_mut().find(|block| block.0 == number)
    }

    fn touch(&mut self, number: u32) {
        if let Some(at) = self.blocks.iter().position(|block| block.0 == number) {
            let block = self.blocks.remove(at);
            self.blocks.push(block);
        }
    }

    fn evict(&mut self, now: u64) -> Option<u32> {
        let may_leave = |(number, _, held, pin): &(u32, u32, bool, Option<u64>)| {
            let followed = self.blocks.iter().any(|(_, parent, ..)| parent == number);
            !followed && !held && pin.is_none_or(|until| until <= now)
        };
        let at = self.blocks.iter().position(may_leave)?;
        Some(self.blocks.remove(at).0)
    }
}

proptest! {
    // Goal: T1, T2, T3 and T5 under any history: the directory evicts exactly what a search
    // through all blocks would, and nothing is left behind that could leave.
    #[test]
    fn evict_does_what_a_search_through_all_blocks_would(
        steps in proptest::collection::vec((0u8..9, 1u32..24, 0u64..40), 1..200),
    ) {
        let (arena, mut directory, mut model) = (arena(), Directory::default(), Model::default());
        let start = Instant::now();
        let at = |second: u64| start + Duration::from_secs(second);
        let mut now = 0;
        for (what, number, until) in steps {
            let (name, parent) = (name(number), number / 2);
            match what {
                0..=2 => {
                    if model.of(number).is_none() {
                        model.blocks.push((number, parent, false, None));
                    }
                    directory.insert(block_at(&arena, number, parent, number.ilog2()), false);
                }
                3 => {
                    directory.touch(&name);
                    model.touch(number);
                }
                4 | 5 => {
                    directory.set_held(&name, what == 4);
                    if let Some(block) = model.of(number) {
                        block.2 = what == 4;
                    }
                }
                6 => {
                    let until = (until > 10).then_some(until);
                    let here = directory.pin(&name, until.map(at));
                    prop_assert_eq!(here, model.of(number).is_some());
                    if let Some(block) = model.of(number) {
                        block.3 = until;
                    }
                }
                7 => {
                    let gone = directory.remove(&name);
                    prop_assert_eq!(gone.is_some(), model.of(number).is_some());
                    model.blocks.retain(|block| block.0 != number);
                }
                _ => {
                    now = now.max(until / 2);
                    let gone = directory.evict(at(now)).map(|block| super::tests::number(&block));
                    prop_assert_eq!(gone, model.evict(now));
                }
            }
            prop_assert_eq!(directory.len(), model.blocks.len());
        }
        for number in 1..24 {
            directory.set_held(&name(number), false);
            directory.pin(&name(number), None);
        }
        evict_all(&mut directory);
        prop_assert!(directory.is_empty());
        prop_assert_eq!(arena.free_bytes(), arena.capacity());
    }
}
