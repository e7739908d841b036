//! Blocks that the daemon has copied into slots of the engine's own memory.
//!
//! Upstairs:   `restore`, for restores into an `EngineRegion`.
//! Downstairs: nothing.

use std::sync::Arc;

use kvtier_proto::{BlockKey, BlockLayout, Level, Quality, v1};

use crate::error::Error;
use crate::mux::RESTORE;
use crate::values::{Tier, grade_from_wire};

/// A block that is in its slot, whole.
#[derive(Debug, Clone)]
pub struct PlacedBlock {
    index: usize,
    key: BlockKey,
    slot: u32,
    tier: Tier,
    level: Level,
    quality: Quality,
    layout: Arc<BlockLayout>,
}

impl PlacedBlock {
    /// Takes what the daemon says of block `index`, which was to go to `slots` of `region`, if it
    /// can be so.
    pub(super) fn from_wire(
        (index, key): (usize, BlockKey),
        block: &v1::LeasedBlock,
        (region, slots): (u32, &[u32]),
        layout: Arc<BlockLayout>,
    ) -> Result<Self, Error> {
        let slot = slots.get(index).copied();
        let length = u64::try_from(layout.payload_len()).unwrap_or(u64::MAX);
        let said = block
            .slot
            .map(|said| (said.region, said.offset, said.length));
        let slot = slot.filter(|slot| said == Some((region, u64::from(*slot), length)));
        let Some(slot) = slot else {
            let problem =
                format!("block {index} is in another slot than it was to go to: {said:?}");
            return Err(RESTORE.bad_reply(problem));
        };
        let (level, quality) = grade_from_wire(RESTORE, block.level, block.quality)?;
        Ok(Self {
            index,
            key,
            slot,
            tier: Tier::from_wire(RESTORE, block.tier)?,
            level,
            quality,
            layout,
        })
    }

    /// Index into the keys of the restore.
    pub fn index(&self) -> usize {
        self.index
    }

    /// Name of the block.
    pub fn key(&self) -> BlockKey {
        self.key
    }

    /// The slot that it is in.
    pub fn slot(&self) -> u32 {
        self.slot
    }

    /// Where the daemon found it.
    pub fn tier(&self) -> Tier {
        self.tier
    }

    /// How good its bytes are, never worse than what the restore accepts. What is computed from
    /// them is no better.
    pub fn quality(&self) -> Quality {
        self.quality
    }

    /// Codec level that its bytes went through.
    pub fn level(&self) -> Level {
        self.level
    }

    /// Where each part lies in the payload, which goes through the pieces of the slot.
    pub fn layout(&self) -> &BlockLayout {
        &self.layout
    }
}
