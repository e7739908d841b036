//! How a store is made and bounded, and what is accepted there.
//!
//! Upstairs:   whoever opens a store.
//! Downstairs: nothing.

use crate::format::segment::{SEGMENT_SIZE_MAX, SEGMENT_SIZE_MIN};
use crate::format::{BLOCK, StoreId};

use super::{SEGMENTS_MAX, SEGMENTS_MIN};

/// How a store is made and bounded.
#[derive(Debug, Clone)]
pub struct StoreOptions {
    /// Space that segments may take. Unit: bytes. At least [`SEGMENTS_MIN`] segments, of the
    /// length that they have.
    pub capacity: u64,
    /// Length of a segment file. Unit: bytes, a multiple of 4096. A store that exists keeps the
    /// length it was made with.
    pub segment_size: u64,
    /// 16 random bytes: the identity, if this opening makes a new store. Never shown to tenants.
    pub new_store_id: StoreId,
    /// Most puts that wait. One more is refused as [`crate::PutError::Busy`].
    pub queue_max: usize,
    /// Image bytes in flight to the device before the queue waits. Larger: longer batches.
    pub window_bytes: u64,
}

impl StoreOptions {
    /// A store of `capacity` bytes with the usual bounds.
    pub fn new(capacity: u64, new_store_id: [u8; 16]) -> Self {
        Self {
            capacity,
            segment_size: 256 << 20,
            new_store_id: StoreId(new_store_id),
            queue_max: 4096,
            window_bytes: 64 << 20,
        }
    }

    /// Every problem at once, each naming the field, its value and what is accepted.
    pub fn problems(&self) -> Vec<String> {
        let mut problems = Vec::new();
        let size = self.segment_size;
        if !(SEGMENT_SIZE_MIN..=SEGMENT_SIZE_MAX).contains(&size) || !size.is_multiple_of(BLOCK) {
            problems.push(format!(
                "segment_size is {size} bytes; accepted is a multiple of {BLOCK} from \
                 {SEGMENT_SIZE_MIN} to {SEGMENT_SIZE_MAX}"
            ));
        }
        let segments = self.capacity / size.max(1);
        if !(SEGMENTS_MIN..=SEGMENTS_MAX).contains(&segments) {
            problems.push(format!(
                "capacity is {} bytes, which is {segments} segments of {size}; accepted are \
                 {SEGMENTS_MIN} to {SEGMENTS_MAX} segments",
                self.capacity
            ));
        }
        if self.queue_max == 0 {
            problems.push("queue_max is 0; accepted is 1 or more".to_owned());
        }
        if self.window_bytes == 0 {
            problems.push("window_bytes is 0; accepted is 1 or more".to_owned());
        }
        problems
    }
}
