//! Engine regions: the host pool of an engine, whose slots the daemon copies blocks from and to.
//!
//! Upstairs:   `session` owns the regions of its client; the server's calls name slots in them.
//! Downstairs: `shm::foreign` is the memory, `kvtier_proto::region` where its slots lie.
//!
//! ```text
//!            grant (Save)             take (Commit)          drop
//!   free ----------------> granted ---------------> moving ------> free
//!    ^                        | release                               ^
//!    +------------------------+                                       |
//!   free ----------- reserve (Restore) -----------> moving --- drop --+
//! ```
//!
//! The engine keeps its slots; what it lends for a transfer it gets back when the transfer's end is
//! told. Until then nobody else is given the slot, and the engine leaves it alone.
//!
//! Invariants kept here
//!   R2  A slot is taken at most once, by whoever names its number, length, generation and key all
//!       as granted; anything else is stale and touches nothing.
//!   R3  A slot is of one transfer at a time, and nothing is written to one of no restore.
//!   R4  After `close` has returned no byte is copied from or to the region, whoever is at it.
//!   R5  A file that changed its size is not used any more: what it tells of itself is wrong.

use std::collections::{HashMap, HashSet};
use std::ops::Range;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use kvtier_proto::region::Handover;
use kvtier_proto::{PayloadKind, RegionGeometry};

use super::{SlotName, StaleSlot};
use crate::block::PlannedBlock;
use crate::metrics::{Metrics, Moved, RegionRefused};
use crate::planted::{Bug, planted};
use crate::shm::foreign::{Foreign, Lost};
use crate::sync::{Mutex, MutexGuard, RwLock};
use crate::tier::save::Payload;

/// How long a region waits for its memory: as long as the ticket for it is good.
pub const TICKET_LIFE: Duration = Duration::from_secs(10);
/// Bytes that are copied before anybody who closes the region gets his turn.
const STEP: usize = 1 << 20;

/// Memory of an engine, in one session.
#[derive(Debug)]
pub struct EngineRegion {
    number: u32,
    bytes: u64,
    geometry: RegionGeometry,
    slot_bytes: usize,
    metrics: Arc<Metrics>,
    /// From when the engine has handed it over.
    memory: OnceLock<Foreign>,
    made: Instant,
    /// There will be no memory.
    refused: AtomicBool,
    slots: Mutex<Slots>,
    /// Held while bytes move, so that whoever closes waits for them (R4).
    open: RwLock<bool>,
}

#[derive(Debug, Default)]
struct Slots {
    used: HashMap<u32, Use>,
    generation: u64,
}

#[derive(Debug)]
enum Use {
    Granted {
        generation: u64,
        block: PlannedBlock,
    },
    Moving,
}

/// Why slots cannot be used as asked.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum BadSlot {
    /// There is none of that number.
    #[error("slot {slot} of {slots}")]
    Number {
        /// The number.
        slot: u32,
        /// How many there are.
        slots: u32,
    },
    /// Another transfer has it.
    #[error("slot {0}, which is in use")]
    Busy(u32),
    /// The same transfer names it twice.
    #[error("slot {0} twice")]
    Twice(u32),
}

/// Why a block was not copied. The slot may hold some of its bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Unmoved {
    /// No descriptor was handed over.
    #[error("the region has no memory yet: its descriptor was not handed over")]
    NoMemory,
    /// The session has ended, or the file had changed before.
    #[error("the region is closed")]
    Closed,
    /// The block has another size than the slots.
    #[error("a block of {block} bytes; accepted: exactly {slot}, a slot")]
    Size {
        /// Bytes of the block.
        block: usize,
        /// Bytes of a slot.
        slot: usize,
    },
    /// The file does not have the bytes, or does not take them.
    #[error(transparent)]
    Lost(#[from] Lost),
}

impl EngineRegion {
    /// A region of `bytes` bytes with a geometry that was checked for them, and no memory yet.
    pub fn new(number: u32, bytes: u64, geometry: RegionGeometry, metrics: Arc<Metrics>) -> Self {
        let slot_bytes = geometry.slot_bytes().unwrap_or_default();
        Self {
            number,
            bytes,
            slot_bytes: usize::try_from(slot_bytes).unwrap_or_default(),
            geometry,
            metrics,
            memory: OnceLock::new(),
            made: Instant::now(),
            refused: AtomicBool::new(false),
            slots: Mutex::new(Slots::default()),
            open: RwLock::new(true),
        }
    }

    /// Number in the session.
    pub fn number(&self) -> u32 {
        self.number
    }

    /// What its slots hold.
    pub fn kind(&self) -> PayloadKind {
        self.geometry.kind
    }

    /// Size. Unit: bytes.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Bytes of a slot: only blocks of this size go there.
    pub fn slot_bytes(&self) -> usize {
        self.slot_bytes
    }

    /// Takes the engine's file, once. The answer is for the engine.
    pub fn adopt(&self, fd: OwnedFd) -> Handover {
        let taken = Foreign::adopt(fd, self.bytes);
        let mapped = taken.as_ref().is_ok_and(Foreign::is_mapped);
        let answer = match taken.map(|memory| self.memory.set(memory)) {
            Ok(Ok(())) => Handover::Taken,
            Ok(Err(_)) => Handover::Refused,
            Err(unfit) => unfit,
        };
        if answer == Handover::Taken {
            let (region, bytes, slots) = (self.number, self.bytes, self.geometry.slots);
            tracing::info!(
                region,
                bytes,
                slots,
                mapped,
                "an engine's region was registered"
            );
        } else {
            self.refuse(answer);
        }
        answer
    }

    /// False when it has no memory and never will: it was refused, or the ticket to hand it over
    /// with is no longer taken.
    pub fn is_usable(&self) -> bool {
        let refused = self.refused.load(Ordering::Acquire);
        self.memory.get().is_some() || (!refused && self.made.elapsed() < TICKET_LIFE)
    }

    /// Says why there will be no memory.
    pub fn refuse(&self, answer: Handover) {
        self.refused.store(true, Ordering::Release);
        self.metrics.regions_refused.of(answer.into()).inc();
        tracing::warn!(region = self.number, reason = %answer, "an engine's region was refused");
    }

    /// Whether the slot could be granted or reserved, if nobody has it.
    ///
    /// # Errors
    /// There is none of that number.
    pub fn check(&self, slot: u32) -> Result<(), BadSlot> {
        let slots = self.geometry.slots;
        (slot < slots)
            .then_some(())
            .ok_or(BadSlot::Number { slot, slots })
    }

    /// Lends a slot for a block that the engine has in it. `None` when it is in use (R3).
    pub fn grant(&self, block: PlannedBlock, slot: u32) -> Option<SlotName> {
        self.check(slot).ok()?;
        let mut slots = self.lock();
        if slots.used.contains_key(&slot) {
            return None;
        }
        slots.generation += 1;
        let generation = slots.generation;
        let length = block.facts.layout.payload_len() as u64;
        slots.used.insert(slot, Use::Granted { generation, block });
        Some(SlotName {
            region: self.number,
            offset: slot.into(),
            length,
            generation,
        })
    }

    /// Takes a granted slot over (R2). It is the engine's again when the result is dropped.
    pub fn take(self: &Arc<Self>, name: &SlotName, key: &[u8]) -> Result<LentSlot, StaleSlot> {
        let slot = u32::try_from(name.offset).map_err(|_| StaleSlot)?;
        let mut slots = self.lock();
        let Some(Use::Granted { generation, block }) = slots.used.get(&slot) else {
            return Err(StaleSlot);
        };
        let same = *generation == name.generation
            && name.region == self.number
            && name.length == block.facts.layout.payload_len() as u64
            && block.id.key.as_bytes() == key;
        if !same {
            return Err(StaleSlot);
        }
        let block = block.clone();
        slots.used.insert(slot, Use::Moving);
        let reserved = Reserved {
            region: Arc::clone(self),
            slots: vec![slot],
        };
        Ok(LentSlot { reserved, block })
    }

    /// Gives a granted slot back unread.
    pub fn release(&self, name: &SlotName) -> Result<(), StaleSlot> {
        let slot = u32::try_from(name.offset).map_err(|_| StaleSlot)?;
        let mut slots = self.lock();
        match slots.used.get(&slot) {
            Some(Use::Granted { generation, .. }) if *generation == name.generation => {
                slots.used.remove(&slot);
                Ok(())
            }
            _ => Err(StaleSlot),
        }
    }

    /// Lends slots for a restore, all of them or none (R3).
    ///
    /// # Errors
    /// The first that there is not, that is named twice, or that is in use.
    pub fn reserve(self: &Arc<Self>, wanted: &[u32]) -> Result<Reserved, BadSlot> {
        wanted.iter().try_for_each(|slot| self.check(*slot))?;
        let mut seen = HashSet::with_capacity(wanted.len());
        if let Some(twice) = wanted.iter().find(|slot| !seen.insert(**slot)) {
            return Err(BadSlot::Twice(*twice));
        }
        let mut slots = self.lock();
        let mut reserved = Reserved {
            region: Arc::clone(self),
            slots: Vec::with_capacity(wanted.len()),
        };
        for slot in wanted {
            if slots.used.contains_key(slot) {
                let busy = BadSlot::Busy(*slot);
                drop(slots);
                return Err(busy);
            }
            slots.used.insert(*slot, Use::Moving);
            reserved.slots.push(*slot);
        }
        drop(slots);
        Ok(reserved)
    }

    /// Ends every transfer, and waits for the bytes that move (R4).
    pub fn close(&self) {
        *self.open.write().unwrap_or_else(PoisonError::into_inner) = false;
    }

    /// Goes through the bytes of a slot, in the order of the payload.
    fn copy(
        &self,
        slot: u32,
        copy: impl FnMut(&Foreign, u64, Range<usize>) -> Result<(), Lost>,
    ) -> Result<(), Unmoved> {
        let moved = self.copy_runs(slot, copy);
        if let Err(Unmoved::Lost(problem)) = &moved {
            self.close();
            self.metrics.regions_refused.of(RegionRefused::Lost).inc();
            tracing::warn!(
                region = self.number, slot, %problem, "an engine's region is not used any more"
            );
        }
        moved
    }

    fn copy_runs(
        &self,
        slot: u32,
        mut copy: impl FnMut(&Foreign, u64, Range<usize>) -> Result<(), Lost>,
    ) -> Result<(), Unmoved> {
        let memory = self.memory.get().ok_or(Unmoved::NoMemory)?;
        for run in self.geometry.runs(slot) {
            let (mut at, mut from, mut left) = (run.at, run.from, run.len);
            while left > 0 {
                let step = left.min(STEP);
                let open = self.open.read().unwrap_or_else(PoisonError::into_inner);
                if !*open && !planted(Bug::CopyAfterClose) {
                    return Err(Unmoved::Closed);
                }
                copy(memory, at, from..from + step)?;
                drop(open);
                (at, from, left) = (at + step as u64, from + step, left - step);
            }
        }
        Ok(memory.unchanged()?)
    }

    fn lock(&self) -> MutexGuard<'_, Slots> {
        self.slots.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Slots that a transfer has: they are the engine's again when this is dropped.
#[derive(Debug)]
pub struct Reserved {
    region: Arc<EngineRegion>,
    slots: Vec<u32>,
}

impl Reserved {
    /// The region.
    pub fn region(&self) -> &EngineRegion {
        &self.region
    }

    /// The slot of this place in the list that was asked for.
    pub fn slot(&self, index: usize) -> Option<u32> {
        self.slots.get(index).copied()
    }

    /// Copies a block into the slot of this place.
    ///
    /// # Errors
    /// Why the slot does not hold it.
    pub fn write(&self, index: usize, payload: &[u8]) -> Result<(), Unmoved> {
        let (block, slot_bytes) = (payload.len(), self.region.slot_bytes);
        let wrong = Unmoved::Size {
            block,
            slot: slot_bytes,
        };
        let slot = self
            .slot(index)
            .filter(|_| block == slot_bytes)
            .ok_or(wrong)?;
        self.region.copy(slot, |memory, at, range| {
            memory.copy_in(at, payload.get(range).unwrap_or_default())
        })?;
        self.region.count(Moved::Restored, block);
        Ok(())
    }
}

impl EngineRegion {
    fn count(&self, way: Moved, bytes: usize) {
        self.metrics.region_moved.of(way).inc_by(bytes as u64);
    }
}

impl Drop for Reserved {
    fn drop(&mut self) {
        let mut slots = self.region.lock();
        for slot in &self.slots {
            slots.used.remove(slot);
        }
    }
}

/// A granted slot on its way into the host tier.
#[derive(Debug)]
pub struct LentSlot {
    reserved: Reserved,
    block: PlannedBlock,
}

impl LentSlot {
    /// What the slot holds.
    pub fn block(&self) -> &PlannedBlock {
        &self.block
    }
}

impl Payload for LentSlot {
    /// The engine may still write the slot; the copy is what counts.
    fn copy_into(&self, into: &mut [u8]) -> Result<(), String> {
        let region = &self.reserved.region;
        let slot = self.reserved.slot(0).unwrap_or(u32::MAX);
        let copied = region.copy(slot, |memory, at, range| {
            memory.copy_out(at, into.get_mut(range).unwrap_or_default())
        });
        copied.map_err(|problem| problem.to_string())?;
        region.count(Moved::Saved, into.len());
        Ok(())
    }
}

#[cfg(test)]
mod tests;
