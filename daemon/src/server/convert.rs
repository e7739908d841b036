//! Small conversions between the layers' words and the wire's.
//!
//! Upstairs:   the calls in `server`.
//! Downstairs: `kvtier_proto`.

use kvtier_proto::{Miss, Quality, WireError, quality_from_wire, v1};
use tonic::Status;

use crate::region::SlotName;
use crate::tier::Tier;

/// A message that cannot be taken.
pub fn invalid(problem: WireError) -> Status {
    Status::invalid_argument(problem.to_string())
}

/// A field out of range.
pub fn bad_field(
    field: impl Into<String>,
    value: impl ToString,
    accepted: impl Into<String>,
) -> Status {
    invalid(WireError::field(field, value, accepted))
}

/// The worst quality that a request accepts.
pub fn accept(number: i32) -> Result<Quality, Status> {
    quality_from_wire("accept", number).map_err(invalid)
}

/// A tier on the wire.
pub fn tier(tier: Tier) -> v1::Tier {
    match tier {
        Tier::Host => v1::Tier::Host,
        Tier::Disk => v1::Tier::Disk,
    }
}

/// A miss on the wire.
pub fn miss(miss: Miss) -> i32 {
    v1::MissReason::from(miss) as i32
}

/// Where a block is, or why it is a miss.
pub fn status(place: Result<Tier, Miss>) -> v1::BlockStatus {
    use v1::block_status::Status as Wire;
    let status = match place {
        Ok(found) => Wire::Tier(tier(found) as i32),
        Err(reason) => Wire::Miss(miss(reason)),
    };
    v1::BlockStatus {
        status: Some(status),
    }
}

/// A slot on the wire.
pub fn slot(slot: SlotName) -> v1::Slot {
    let SlotName {
        region,
        offset,
        length,
        generation,
    } = slot;
    v1::Slot {
        region,
        offset,
        length,
        generation,
    }
}

/// A slot from the wire. Nothing is assumed of it: the region decides whether it is one.
pub fn slot_name(slot: &v1::Slot) -> SlotName {
    let v1::Slot {
        region,
        offset,
        length,
        generation,
    } = *slot;
    SlotName {
        region,
        offset,
        length,
        generation,
    }
}

/// Counts as the wire carries them.
pub fn count(n: usize) -> u32 {
    u32::try_from(n).unwrap_or(u32::MAX)
}
