//! Checks of what the daemon names: slots, lengths, keys of a call.
//!
//! Upstairs:   `save`, `restore` and `inline` check here before any view is made.
//! Downstairs: nothing; pure functions.
//!
//! Invariants kept here
//!   C1  A slot that passes lies in the region it names, inside its bounds, and is exactly as
//!       long as the layout of its block.

use std::ops::Range;

use bytes::Bytes;
use kvtier_proto::limits::KEYS_PER_CALL_MAX;
use kvtier_proto::{BlockKey, BlockLayout, v1};

use crate::error::Error;

/// The range of a slot in its region (C1), or what is wrong with it.
pub(crate) fn slot_range(
    slot: Option<&v1::Slot>,
    region: u32,
    region_len: usize,
    layout: &BlockLayout,
) -> Result<Range<usize>, String> {
    let slot = slot.ok_or("a slot is missing")?;
    if slot.region != region {
        let named = slot.region;
        return Err(format!(
            "a slot in region {named}, where {region} is mapped"
        ));
    }
    let wanted = layout.payload_len();
    if u64::try_from(wanted) != Ok(slot.length) {
        let length = slot.length;
        return Err(format!(
            "a slot of {length} bytes for a payload of {wanted}"
        ));
    }
    let outside = || {
        let (offset, length) = (slot.offset, slot.length);
        format!("a slot of {length} bytes at {offset} in a region of {region_len}")
    };
    let start = usize::try_from(slot.offset).map_err(|_| outside())?;
    let end = start.checked_add(wanted).ok_or_else(outside)?;
    if end > region_len {
        return Err(outside());
    }
    Ok(start..end)
}

/// Keys as a call sends them: at least one, at most 4096.
pub(crate) fn keys_to_wire(keys: &[BlockKey]) -> Result<Vec<Bytes>, Error> {
    count(keys.len())?;
    Ok(keys.iter().map(key_to_wire).collect())
}

pub(crate) fn key_to_wire(key: &BlockKey) -> Bytes {
    Bytes::copy_from_slice(key.as_bytes())
}

/// How many blocks one call may name.
pub(crate) fn count(blocks: usize) -> Result<(), Error> {
    if blocks == 0 || blocks > KEYS_PER_CALL_MAX {
        return Err(Error::invalid(format!(
            "the call names {blocks} blocks; accepted: 1 to {KEYS_PER_CALL_MAX}"
        )));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn slot(region: u32, offset: u64, length: u64) -> v1::Slot {
        v1::Slot {
            region,
            offset,
            length,
            generation: 1,
        }
    }

    #[test]
    fn slot_range_names_what_is_wrong_with_a_slot() {
        let layout = BlockLayout::opaque(16, 100).unwrap();
        let check = |slot: &v1::Slot| slot_range(Some(slot), 7, 1000, &layout);
        assert_eq!(check(&slot(7, 900, 100)), Ok(900..1000));
        for (bad, part) in [
            (slot(8, 0, 100), "region 8"),
            (slot(7, 0, 99), "99 bytes for a payload of 100"),
            (slot(7, 901, 100), "at 901 in a region of 1000"),
            (slot(7, u64::MAX, 100), "in a region of 1000"),
        ] {
            let text = check(&bad).unwrap_err();
            assert!(text.contains(part), "{text}");
        }
    }

    proptest! {
        #[test]
        fn slot_range_stays_inside_for_any_slot(
            region in 0u32..3, offset in any::<u64>(), length in any::<u64>(), len in 1usize..5000,
            payload in 1u64..6000,
        ) {
            let layout = BlockLayout::opaque(16, payload).unwrap();
            for slot in [slot(region, offset, length), slot(1, offset % 6000, payload)] {
                if let Ok(range) = slot_range(Some(&slot), 1, len, &layout) {
                    prop_assert!(range.start < range.end && range.end <= len);
                    prop_assert_eq!(range.len(), layout.payload_len());
                }
            }
        }
    }
}
