//! What the daemon's answers say, in types of this crate.
//!
//! Upstairs:   `Session` returns these.
//! Downstairs: `kvtier_proto::v1`, read at the door here: an unknown number is a bad reply.

use kvtier_proto::limits::BLOCK_BYTES_MAX;
use kvtier_proto::v1;
use kvtier_proto::{BlockKey, Level, Miss, PayloadKind, Quality, key_from_wire, quality_from_wire};

use crate::error::{Call, Error};

/// Where a block is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[non_exhaustive]
pub enum Tier {
    /// Host memory of the daemon: a restore is a view of it.
    Host,
    /// NVMe.
    Disk,
}

impl Tier {
    pub(crate) fn from_wire(call: Call, number: i32) -> Result<Self, Error> {
        match v1::Tier::try_from(number) {
            Ok(v1::Tier::Host) => Ok(Self::Host),
            Ok(v1::Tier::Disk) => Ok(Self::Disk),
            _ => Err(call.bad_reply(format!("tier {number} is not known"))),
        }
    }
}

/// What an acknowledgement promises.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Acknowledge {
    /// The block is in the daemon's memory; it is lost with the daemon's process.
    Accepted,
    /// The block survives kill -9, power loss and loss of the catalog.
    Durable,
}

impl Acknowledge {
    pub(crate) fn to_wire(self) -> i32 {
        match self {
            Self::Accepted => v1::Acknowledge::Accepted.into(),
            Self::Durable => v1::Acknowledge::Durable.into(),
        }
    }

    pub(crate) fn from_wire(call: Call, number: i32) -> Result<Self, Error> {
        match v1::Acknowledge::try_from(number) {
            Ok(v1::Acknowledge::Accepted) => Ok(Self::Accepted),
            Ok(v1::Acknowledge::Durable) => Ok(Self::Durable),
            _ => Err(call.bad_reply(format!("acknowledgement {number} is not known"))),
        }
    }
}

/// Why a block cannot be saved now. The engine goes on without saving it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum SaveRefusal {
    /// Staging memory has no room: commit or drop slots first.
    RegionFull,
    /// The block is larger than the namespace may hold.
    OverQuota,
    /// The daemon is about to stop.
    Draining,
    /// The daemon's memory is taken by leased or unwritten blocks.
    NoSpace,
}

impl SaveRefusal {
    pub(crate) fn from_wire(call: Call, number: i32) -> Result<Self, Error> {
        match v1::SaveRefusal::try_from(number) {
            Ok(v1::SaveRefusal::RegionFull) => Ok(Self::RegionFull),
            Ok(v1::SaveRefusal::OverQuota) => Ok(Self::OverQuota),
            Ok(v1::SaveRefusal::Draining) => Ok(Self::Draining),
            Ok(v1::SaveRefusal::NoSpace) => Ok(Self::NoSpace),
            _ => Err(call.bad_reply(format!("save refusal {number} is not known"))),
        }
    }
}

/// Why a filled block was not stored as asked.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum CommitFailure {
    /// The slot is of a session that is gone, or was committed before. Nothing is stored.
    StaleSlot,
    /// The daemon found other bytes than the client filled in. Nothing is stored.
    Checksum,
    /// No room in the daemon's memory. Nothing is stored.
    NoSpace,
    /// Stored in memory, but it will not become durable: no disk, or the device refuses.
    NotDurable,
}

impl CommitFailure {
    pub(crate) fn from_wire(call: Call, number: i32) -> Result<Self, Error> {
        match v1::CommitFailure::try_from(number) {
            Ok(v1::CommitFailure::StaleSlot) => Ok(Self::StaleSlot),
            Ok(v1::CommitFailure::Checksum) => Ok(Self::Checksum),
            Ok(v1::CommitFailure::NoSpace) => Ok(Self::NoSpace),
            Ok(v1::CommitFailure::NotDurable) => Ok(Self::NotDurable),
            _ => Err(call.bad_reply(format!("commit failure {number} is not known"))),
        }
    }
}

/// What a lookup or a plan says about one block.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum BlockStatus {
    /// It can be restored from here.
    Present(Tier),
    /// It cannot, and why.
    Missing(Miss),
}

impl BlockStatus {
    /// True when the block can be restored.
    pub fn is_present(self) -> bool {
        matches!(self, Self::Present(_))
    }

    pub(crate) fn from_wire(call: Call, status: &v1::BlockStatus) -> Result<Self, Error> {
        use v1::block_status::Status;
        match status.status {
            Some(Status::Tier(tier)) => Tier::from_wire(call, tier).map(Self::Present),
            Some(Status::Miss(miss)) => miss_from_wire(call, miss).map(Self::Missing),
            None => Err(call.bad_reply("a block status is empty")),
        }
    }
}

/// Reads a reason. One that this version does not know is a miss all the same.
pub(crate) fn miss_from_wire(call: Call, number: i32) -> Result<Miss, Error> {
    match v1::MissReason::try_from(number) {
        Ok(v1::MissReason::Unspecified) => Err(call.bad_reply("a miss has no reason")),
        Ok(reason) => Ok(Miss::try_from(reason).unwrap_or(Miss::Unsupported)),
        Err(_) => Ok(Miss::Unsupported),
    }
}

/// Answer of a lookup.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Lookup {
    /// Leading blocks that can all be restored.
    pub prefix_blocks: usize,
    /// One for each key asked about, in order. A prefix lookup ends with the first missing block.
    pub blocks: Vec<BlockStatus>,
}

impl Lookup {
    pub(crate) fn from_wire(
        call: Call,
        asked: usize,
        prefix_only: bool,
        reply: &v1::LookupReply,
    ) -> Result<Self, Error> {
        let read = |status| BlockStatus::from_wire(call, status);
        let count = reply.blocks.len();
        let prefix_blocks = usize::try_from(reply.prefix_blocks).unwrap_or(usize::MAX);
        let counts_fit = if prefix_only {
            count <= asked && count >= prefix_blocks && count - prefix_blocks <= 1
        } else {
            count == asked
        };
        if !counts_fit {
            return Err(call.bad_reply(format!(
                "{count} statuses and a prefix of {prefix_blocks} for {asked} keys"
            )));
        }
        let blocks = reply
            .blocks
            .iter()
            .map(read)
            .collect::<Result<Vec<_>, _>>()?;
        let leading = blocks.iter().take_while(|status| status.is_present());
        let leading = leading.count();
        if leading != prefix_blocks {
            return Err(call.bad_reply(format!(
                "a prefix of {prefix_blocks} blocks, but {leading} leading statuses are present"
            )));
        }
        Ok(Self {
            prefix_blocks,
            blocks,
        })
    }
}

/// Answer of a prefetch.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Prefetched {
    /// Leading blocks that are in host memory already.
    pub resident: usize,
    /// Blocks that started to move there.
    pub started: usize,
}

/// One stored form of a block.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Variant {
    /// What its bytes are.
    pub kind: PayloadKind,
    /// Where it is.
    pub tier: Tier,
    /// Codec level.
    pub level: Level,
    /// Name of the level.
    pub level_name: String,
    /// Size as stored. Unit: bytes.
    pub stored_bytes: u64,
    /// Size as restored. Unit: bytes.
    pub raw_bytes: u64,
    /// Leases held on it by all sessions.
    pub leases: u32,
    /// Tokens in the block.
    pub tokens: u32,
    /// Key of the block before; [`BlockKey::ROOT`] for the first.
    pub parent: BlockKey,
    /// Kept from eviction.
    pub pinned: bool,
    /// Segment and offset on the disk tier; empty elsewhere.
    pub place: String,
    /// Number of the device on the disk tier.
    pub device: Option<u32>,
}

impl Variant {
    fn from_wire(call: Call, wire: v1::VariantInfo) -> Result<Self, Error> {
        let bad = |error: kvtier_proto::WireError| call.bad_reply(error.to_string());
        let kind = PayloadKind::try_from(wire.kind()).map_err(bad)?;
        let tier = Tier::from_wire(call, wire.tier)?;
        let parent = match wire.parent.is_empty() {
            true => BlockKey::ROOT,
            false => key_from_wire("parent", &wire.parent).map_err(bad)?,
        };
        if wire.raw_bytes > BLOCK_BYTES_MAX.get() {
            return Err(call.bad_reply(format!("a block of {} bytes", wire.raw_bytes)));
        }
        Ok(Self {
            kind,
            tier,
            level: level_from_wire(call, wire.level)?,
            level_name: wire.level_name,
            stored_bytes: wire.stored_bytes,
            raw_bytes: wire.raw_bytes,
            leases: wire.leases,
            tokens: wire.tokens,
            parent,
            pinned: wire.pinned,
            place: wire.place,
            device: wire.device,
        })
    }
}

/// Answer of an explain.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Explanation {
    /// Every stored form; empty when the block is nowhere.
    pub variants: Vec<Variant>,
    /// Why a restore would miss; `None` when it would hit.
    pub miss: Option<Miss>,
    /// What else is known, in sentences.
    pub notes: Vec<String>,
}

impl Explanation {
    pub(crate) fn from_wire(call: Call, reply: v1::ExplainReply) -> Result<Self, Error> {
        let miss = match reply.miss() {
            v1::MissReason::Unspecified if reply.miss == 0 => None,
            _ => Some(miss_from_wire(call, reply.miss)?),
        };
        let read = |wire| Variant::from_wire(call, wire);
        let variants = reply.variants.into_iter().map(read);
        Ok(Self {
            variants: variants.collect::<Result<_, _>>()?,
            miss,
            notes: reply.notes,
        })
    }
}

pub(crate) fn level_from_wire(call: Call, number: u32) -> Result<Level, Error> {
    let level = u8::try_from(number);
    let level = level.map_err(|_| call.bad_reply(format!("level {number} is above 255")));
    level.map(Level)
}

/// The level of a block, and how good it is: the worse of its level and of what the daemon says
/// that it was made of.
pub(crate) fn grade_from_wire(
    call: Call,
    level: u32,
    quality: i32,
) -> Result<(Level, Quality), Error> {
    let level = level_from_wire(call, level)?;
    let made_of = quality_from_wire("quality", quality);
    let made_of = made_of.map_err(|problem| call.bad_reply(problem.to_string()))?;
    Ok((level, level.quality().max(made_of)))
}

#[cfg(test)]
mod tests;
