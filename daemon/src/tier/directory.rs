//! Directory of the blocks in one namespace's host arena: what is there, and what leaves first.
//!
//! Upstairs:   `tier::host` keeps it under a lock that is never held across a wait.
//! Downstairs: nothing; it decides, and moves no bytes.
//!
//! Order of eviction: the least recently used first, leaves before the blocks they follow.
//! Whoever uses a prefix touches its last block first, so that of one prefix the deepest block is
//! always the oldest.
//!
//! Invariants kept here
//!   T1  A block that anybody holds (lease, restore, pending write) is never evicted.
//!   T2  A block with a resident child is never evicted before the child.
//!   T3  A pinned block is not evicted before its pin ends.
//!
//! Not here on purpose: no clock. Time comes in as an argument.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;
use std::time::Instant;

use kvtier_proto::{BlockKey, PayloadKind};

use crate::block::HostBlock;

/// Name of a block inside one namespace.
pub type Name = (PayloadKind, BlockKey);

/// Most blocks looked at for one that may leave. When as many are held, the arena counts as full.
const SCAN_MAX: usize = 4096;

#[derive(Debug)]
struct Resident {
    block: Arc<HostBlock>,
    stamp: u64,
    pinned_until: Option<Instant>,
    durable: bool,
}

/// See the module.
#[derive(Debug, Default)]
pub struct Directory {
    blocks: HashMap<Name, Resident>,
    /// Resident blocks by the name of the block they follow, which need not be here itself.
    children: HashMap<Name, u32>,
    by_use: BTreeMap<u64, Name>,
    clock: u64,
}

/// What `explain` and `status` ask of a resident block.
#[derive(Debug, Clone)]
pub struct ResidentInfo {
    /// The block.
    pub block: Arc<HostBlock>,
    /// On the disk tier too.
    pub durable: bool,
    /// Kept until then.
    pub pinned_until: Option<Instant>,
    /// Holders besides the directory.
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

    /// The block, counted as used now.
    pub fn get(&mut self, name: &Name) -> Option<Arc<HostBlock>> {
        let block = Arc::clone(&self.blocks.get(name)?.block);
        self.touch(name);
        Some(block)
    }

    /// Facts about a resident block. Does not count as use.
    pub fn info(&self, name: &Name) -> Option<ResidentInfo> {
        self.blocks.get(name).map(|resident| ResidentInfo {
            block: Arc::clone(&resident.block),
            durable: resident.durable,
            pinned_until: resident.pinned_until,
            holders: Arc::strong_count(&resident.block).saturating_sub(1),
        })
    }

    /// Adds a block. When one of that name is there already, that one stays and is returned.
    pub fn insert(&mut self, block: Arc<HostBlock>, durable: bool) -> Arc<HostBlock> {
        let name = (block.id().kind, block.id().key);
        if let Some(resident) = self.blocks.get(&name) {
            return Arc::clone(&resident.block);
        }
        *self
            .children
            .entry((name.0, block.facts().parent))
            .or_default() += 1;
        self.clock += 1;
        let stamp = self.clock;
        let (kept, pinned_until) = (Arc::clone(&block), None);
        self.blocks.insert(
            name,
            Resident {
                block,
                stamp,
                pinned_until,
                durable,
            },
        );
        self.by_use.insert(stamp, name);
        kept
    }

    /// Counts a use.
    pub fn touch(&mut self, name: &Name) {
        if let Some(resident) = self.blocks.get_mut(name) {
            self.by_use.remove(&resident.stamp);
            self.clock += 1;
            resident.stamp = self.clock;
            self.by_use.insert(resident.stamp, *name);
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
        let resident = self.blocks.get_mut(name);
        resident
            .map(|resident| resident.pinned_until = until)
            .is_some()
    }

    /// Takes the block that should leave first out, or `None` when none may (T1, T2, T3).
    pub fn evict(&mut self, now: Instant) -> Option<Arc<HostBlock>> {
        let may_leave = |name: &&Name| {
            self.blocks.get(name).is_some_and(|resident| {
                !self.children.contains_key(*name)
                    && Arc::strong_count(&resident.block) == 1
                    && resident.pinned_until.is_none_or(|until| until <= now)
            })
        };
        let name = self
            .by_use
            .values()
            .take(SCAN_MAX)
            .find(may_leave)
            .copied()?;
        self.remove(&name)
    }

    /// Takes a block out, whoever holds it. The holders keep its bytes.
    pub fn remove(&mut self, name: &Name) -> Option<Arc<HostBlock>> {
        let resident = self.blocks.remove(name)?;
        self.by_use.remove(&resident.stamp);
        let parent = (name.0, resident.block.facts().parent);
        if let Some(children) = self.children.get_mut(&parent) {
            *children -= 1;
            if *children == 0 {
                self.children.remove(&parent);
            }
        }
        Some(resident.block)
    }

    /// Takes every block out.
    pub fn clear(&mut self) -> Vec<Arc<HostBlock>> {
        self.by_use.clear();
        self.children.clear();
        self.blocks
            .drain()
            .map(|(_, resident)| resident.block)
            .collect()
    }
}

#[cfg(test)]
mod tests;
