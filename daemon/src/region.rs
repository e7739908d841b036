//! Staging regions: memory a client fills, cut into slots that Save grants and Commit hands over.
//!
//! Upstairs:   `session` owns the regions of its client.
//! Downstairs: `shm` is the memory, `kvtier_store::mem::FreeRuns` the arithmetic. Next door:
//!             `engine`, regions of an engine's own memory.
//!
//! ```text
//!            grant              take                drop
//!   free ------------> granted ------> taken ------------> free
//!    ^                    | release
//!    +--------------------+
//! ```
//!
//! Invariants kept here
//!   R1  Slots of a region never overlap.
//!   R2  A slot is taken at most once, by whoever names its offset, length, generation and key
//!       all as granted; anything else is stale and touches nothing.

pub mod engine;

use std::collections::HashMap;
use std::sync::{Arc, PoisonError};

use kvtier_store::mem::FreeRuns;

use crate::block::PlannedBlock;
use crate::planted::{Bug, planted};
use crate::shm::SharedMemory;
use crate::sync::{Mutex, MutexGuard};
use crate::tier::save::Payload;

/// Slots start at multiples of this, so that a client's copies are aligned. Unit: bytes.
const SLOT_ALIGN: usize = 4096;

/// A place in a region, as the wire names it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SlotName {
    /// Region in the session.
    pub region: u32,
    /// First byte; in an engine's region the number of the slot.
    pub offset: u64,
    /// Size. Unit: bytes.
    pub length: u64,
    /// Number of this use of the place.
    pub generation: u64,
}

#[derive(Debug)]
struct Granted {
    generation: u64,
    room: usize,
    block: PlannedBlock,
}

#[derive(Debug)]
struct Slots {
    free: FreeRuns,
    granted: HashMap<usize, Granted>,
    generation: u64,
}

/// One staging region of one session.
#[derive(Debug)]
pub struct Staging {
    number: u32,
    memory: SharedMemory,
    slots: Mutex<Slots>,
}

/// The slot is not one that was granted for this key, or is no longer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the slot was not granted for this block, or was released or committed before")]
pub struct StaleSlot;

impl Staging {
    /// A region of `len` bytes, rounded up to whole slots' alignment.
    pub fn create(number: u32, len: usize) -> std::io::Result<Self> {
        let len = len.next_multiple_of(SLOT_ALIGN);
        let memory = SharedMemory::create(len)?;
        let slots = Slots {
            free: FreeRuns::new(len),
            granted: HashMap::new(),
            generation: 0,
        };
        Ok(Self {
            number,
            memory,
            slots: Mutex::new(slots),
        })
    }

    /// Number in the session.
    pub fn number(&self) -> u32 {
        self.number
    }

    /// The memory, to pass its descriptor.
    pub fn memory(&self) -> &SharedMemory {
        &self.memory
    }

    /// Grants a slot that fits `block`, or `None` when the region has no room.
    pub fn grant(&self, block: PlannedBlock) -> Option<SlotName> {
        let len = block.facts.layout.payload_len();
        let room = len.max(1).next_multiple_of(SLOT_ALIGN);
        let mut slots = self.lock();
        let at = slots.free.take(room)?;
        slots.generation += 1;
        let generation = slots.generation;
        slots.granted.insert(
            at,
            Granted {
                generation,
                room,
                block,
            },
        );
        Some(SlotName {
            region: self.number,
            offset: at as u64,
            length: len as u64,
            generation,
        })
    }

    /// Takes a filled slot over (R2). Its memory is free again when the result is dropped.
    pub fn take(self: &Arc<Self>, slot: &SlotName, key: &[u8]) -> Result<TakenSlot, StaleSlot> {
        let at = usize::try_from(slot.offset).map_err(|_| StaleSlot)?;
        let mut slots = self.lock();
        let granted = slots.granted.get(&at).ok_or(StaleSlot)?;
        let len = granted.block.facts.layout.payload_len();
        let same = granted.generation == slot.generation
            && slot.region == self.number
            && slot.length == len as u64
            && granted.block.id.key.as_bytes() == key;
        if !same {
            return Err(StaleSlot);
        }
        if planted(Bug::TakeInTwoSteps) {
            drop(slots);
            slots = self.lock();
        }
        let granted = slots.granted.remove(&at).ok_or(StaleSlot)?;
        let (block, room) = (granted.block, granted.room);
        Ok(TakenSlot {
            staging: Arc::clone(self),
            at,
            room,
            block,
        })
    }

    /// Gives an unused slot back.
    pub fn release(&self, slot: &SlotName) -> Result<(), StaleSlot> {
        let at = usize::try_from(slot.offset).map_err(|_| StaleSlot)?;
        let mut slots = self.lock();
        match slots.granted.get(&at) {
            Some(granted) if granted.generation == slot.generation => {
                let room = granted.room;
                slots.granted.remove(&at);
                slots.free.give_back(at, room);
                Ok(())
            }
            _ => Err(StaleSlot),
        }
    }

    fn lock(&self) -> MutexGuard<'_, Slots> {
        self.slots.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A slot on its way into the host tier: nobody else can take or release it.
#[derive(Debug)]
pub struct TakenSlot {
    staging: Arc<Staging>,
    at: usize,
    room: usize,
    block: PlannedBlock,
}

impl TakenSlot {
    /// What the slot holds.
    pub fn block(&self) -> &PlannedBlock {
        &self.block
    }
}

impl Payload for TakenSlot {
    /// The client may still write the slot; the copy is what counts.
    fn copy_into(&self, into: &mut [u8]) -> Result<(), String> {
        self.staging
            .memory
            .copy_out(self.at, into)
            .map_err(|problem| problem.to_string())
    }
}

/// A slot of whatever region that was handed over.
#[derive(Debug)]
pub enum HandedOver {
    /// Of a staging region.
    Staged(TakenSlot),
    /// Of the engine's own.
    Lent(engine::LentSlot),
}

impl HandedOver {
    /// What the slot holds.
    pub fn block(&self) -> &PlannedBlock {
        match self {
            Self::Staged(slot) => slot.block(),
            Self::Lent(slot) => slot.block(),
        }
    }
}

impl Payload for HandedOver {
    fn copy_into(&self, into: &mut [u8]) -> Result<(), String> {
        match self {
            Self::Staged(slot) => slot.copy_into(into),
            Self::Lent(slot) => slot.copy_into(into),
        }
    }
}

impl Drop for TakenSlot {
    fn drop(&mut self) {
        self.staging.lock().free.give_back(self.at, self.room);
    }
}

#[cfg(test)]
pub(crate) mod tests;
