//! Directory of the blocks in one namespace's host arena: what is there, and what leaves first.
//!
//! Upstairs:   `tier::host` keeps it under a lock that is never held across a wait.
//! Downstairs: nothing; it decides, and moves no bytes.
//!
//! Order of eviction: the least recently used first, leaves before the blocks they follow.
//! Whoever uses a prefix touches its last block first, so that a prefix is cut from its end. That
//! is a preference only: blocks that may leave are kept in an order of their own, and whatever
//! order they were used in, finding the next one takes no search.
//!
//! Invariants kept here
//!   T1  A block that anybody holds (lease, restore, pending write) is never evicted.
//!   T2  A block with a resident child is never evicted before the child.
//!   T3  A pinned block is not evicted before its pin ends.
//!   T5  Any other block can be evicted, however many there are that cannot.
//!   A2  A block makes room for a better one of its name, and never for a worse one.
//!
//! Not here on purpose: no clock. Time comes in as an argument.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::Arc;
use std::time::Instant;

use kvtier_proto::{BlockKey, PayloadKind};

use crate::block::RawBlock;

/// Name of a block inside one namespace.
pub type Name = (PayloadKind, BlockKey);

/// Where a block ends and its children begin: its name, and the position of the token after it.
/// Positions grow along a prefix, so that no claim of a client's makes blocks follow each other
/// in a circle, none of which could ever leave.
type End = (Name, u64);

fn end_of(block: &RawBlock) -> End {
    let (id, facts) = (block.id(), block.facts());
    let position = u64::from(facts.position) + u64::from(facts.layout.tokens());
    ((id.kind, id.key), position)
}

fn followed_by(block: &RawBlock) -> End {
    let (id, facts) = (block.id(), block.facts());
    ((id.kind, facts.parent), u64::from(facts.position))
}

#[derive(Debug)]
struct Resident {
    block: Arc<RawBlock>,
    stamp: u64,
    held: bool,
    pinned_until: Option<Instant>,
    durable: bool,
}

/// See the module.
#[derive(Debug, Default)]
pub struct Directory {
    blocks: HashMap<Name, Resident>,
    /// Resident blocks by what they follow, which need not be here itself.
    children: HashMap<End, u32>,
    /// Blocks that may leave, by their last use: not held, not pinned, no child here.
    leaving: BTreeMap<u64, Name>,
    /// Pinned blocks by the end of their pin.
    pinned: BTreeSet<(Instant, Name)>,
    clock: u64,
}

/// What `explain` and `status` ask of a resident block.
#[derive(Debug, Clone)]
pub struct ResidentInfo {
    /// The block.
    pub block: Arc<RawBlock>,
    /// On the disk tier too.
    pub durable: bool,
    /// Kept until then.
    pub pinned_until: Option<Instant>,
    /// How many hold it: the host tier counts them.
    pub holders: usize,
}

impl Directory {
    /// Blocks in host memory.
    pub fn len(&self) -> usize {
        self.blocks.len()
    }

    /// True when nothing is in host memory.
    pub fn is_empty(&self) -> bool {
        self.blocks.is_empty()
    }

    /// True when the block is in host memory. Does not count as use.
    pub fn contains(&self, name: &Name) -> bool {
        self.blocks.contains_key(name)
    }

    /// The block. Does not count as use.
    pub fn get(&self, name: &Name) -> Option<&Arc<RawBlock>> {
        self.blocks.get(name).map(|resident| &resident.block)
    }

    /// Facts about a resident block. Does not count as use.
    pub fn info(&self, name: &Name) -> Option<ResidentInfo> {
        self.blocks.get(name).map(|resident| ResidentInfo {
            block: Arc::clone(&resident.block),
            durable: resident.durable,
            pinned_until: resident.pinned_until,
            holders: usize::from(resident.held),
        })
    }

    /// Adds a block, which nobody holds. When one of that name is there already that is as good,
    /// that one stays. Returns the one that left for it; its holders keep its bytes.
    pub fn insert(&mut self, block: Arc<RawBlock>, durable: bool) -> Option<Arc<RawBlock>> {
        let name = (block.id().kind, block.id().key);
        let before = self.blocks.get(&name);
        let worse = |one: &Resident| one.block.quality() > block.quality();
        if before.is_some_and(|one| !worse(one)) {
            return None;
        }
        let pinned_until = before.and_then(|one| one.pinned_until);
        let replaced = self.remove(&name);
        let parent = followed_by(&block);
        self.clock += 1;
        let (stamp, held) = (self.clock, false);
        self.blocks.insert(
            name,
            Resident {
                block,
                stamp,
                held,
                pinned_until,
                durable,
            },
        );
        if let Some(until) = pinned_until {
            self.pinned.insert((until, name));
        }
        self.settle(&name);
        *self.children.entry(parent).or_default() += 1;
        self.settle(&parent.0);
        replaced
    }

    /// Counts a use.
    pub fn touch(&mut self, name: &Name) {
        if let Some(resident) = self.blocks.get_mut(name) {
            self.leaving.remove(&resident.stamp);
            self.clock += 1;
            resident.stamp = self.clock;
            self.settle(name);
        }
    }

    /// Somebody holds the block now, or nobody any more.
    pub fn set_held(&mut self, name: &Name, held: bool) {
        if let Some(resident) = self.blocks.get_mut(name) {
            resident.held = held;
            self.settle(name);
        }
    }

    /// The disk tier has it too (or no longer).
    pub fn set_durable(&mut self, name: &Name, durable: bool) {
        if let Some(resident) = self.blocks.get_mut(name) {
            resident.durable = durable;
        }
    }

    /// Keeps a block until `until`; `None` takes the pin away. False when it is not here.
    pub fn pin(&mut self, name: &Name, until: Option<Instant>) -> bool {
        let Some(resident) = self.blocks.get_mut(name) else {
            return false;
        };
        let before = std::mem::replace(&mut resident.pinned_until, until);
        if let Some(before) = before {
            self.pinned.remove(&(before, *name));
        }
        if let Some(until) = until {
            self.pinned.insert((until, *name));
        }
        self.settle(name);
        true
    }

    /// Takes the block that should leave first out, or `None` when none may (T1, T2, T3).
    pub fn evict(&mut self, now: Instant) -> Option<Arc<RawBlock>> {
        while let Some((_, name)) = self.pinned.first().filter(|(until, _)| *until <= now) {
            let name = *name;
            self.pin(&name, None);
        }
        let name = *self.leaving.first_key_value()?.1;
        self.remove(&name)
    }

    /// Takes a block out, whoever holds it. The holders keep its bytes.
    pub fn remove(&mut self, name: &Name) -> Option<Arc<RawBlock>> {
        let resident = self.blocks.remove(name)?;
        self.leaving.remove(&resident.stamp);
        if let Some(until) = resident.pinned_until {
            self.pinned.remove(&(until, *name));
        }
        let parent = followed_by(&resident.block);
        if let Some(children) = self.children.get_mut(&parent) {
            *children -= 1;
            if *children == 0 {
                self.children.remove(&parent);
                self.settle(&parent.0);
            }
        }
        Some(resident.block)
    }

    /// Takes every block out.
    pub fn clear(&mut self) -> Vec<Arc<RawBlock>> {
        let clock = self.clock;
        let blocks = std::mem::take(self).blocks;
        self.clock = clock;
        blocks
            .into_values()
            .map(|resident| resident.block)
            .collect()
    }

    /// Puts a block among those that may leave, or takes it out, as things stand now.
    fn settle(&mut self, name: &Name) {
        let Some(resident) = self.blocks.get(name) else {
            return;
        };
        let stays = resident.held
            || resident.pinned_until.is_some()
            || self.children.contains_key(&end_of(&resident.block));
        if stays {
            self.leaving.remove(&resident.stamp);
        } else {
            self.leaving.insert(resident.stamp, *name);
        }
    }
}

#[cfg(test)]
mod tests;
