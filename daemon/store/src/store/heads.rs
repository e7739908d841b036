//! Heads of records that were read in parts: the next part costs one read instead of two.
//!
//! Upstairs:   `store::fetch`.
//! Downstairs: `format::Head`.
//!
//! A layer-by-layer restore asks for one part of many blocks, then for the next part of the same
//! blocks. A head is kept under the place of its record; a place names epoch and sequence, so a
//! head can go stale only by never being asked for again.
//!
//! Not here on purpose: no trust. A part is compared with the checksum that the head has for it.

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;

use crate::format::{Head, Place};

/// Memory for heads. Unit: bytes.
const BYTES_MAX: usize = 16 << 20;
/// Memory of a head besides its tables, and of its entry here. Unit: bytes.
const ENTRY_BYTES: usize = 512;
/// Memory of one part's row and checksum. Unit: bytes.
const PART_BYTES: usize = 20;

/// Heads by place; the oldest that was not used again goes first.
#[derive(Debug, Default)]
pub(super) struct Heads {
    by_place: HashMap<Place, Kept>,
    order: VecDeque<Place>,
    bytes: usize,
}

#[derive(Debug)]
struct Kept {
    head: Arc<Head>,
    used: bool,
}

impl Heads {
    pub(super) fn get(&mut self, place: &Place) -> Option<Arc<Head>> {
        let kept = self.by_place.get_mut(place)?;
        kept.used = true;
        Some(Arc::clone(&kept.head))
    }

    pub(super) fn insert(&mut self, place: Place, head: Arc<Head>) {
        let bytes = bytes_of(&head);
        let kept = Kept { head, used: false };
        if let Some(before) = self.by_place.insert(place, kept) {
            self.bytes = self.bytes.saturating_sub(bytes_of(&before.head));
        } else {
            self.order.push_back(place);
        }
        self.bytes += bytes;
        while self.bytes > BYTES_MAX
            && let Some(oldest) = self.order.pop_front()
        {
            match self.by_place.get_mut(&oldest) {
                Some(kept) if kept.used => {
                    kept.used = false;
                    self.order.push_back(oldest);
                }
                _ => self.forget(&oldest),
            }
        }
    }

    /// The record at `place` turned out to be damaged. Its place in the order ends by itself.
    pub(super) fn forget(&mut self, place: &Place) {
        if let Some(gone) = self.by_place.remove(place) {
            self.bytes = self.bytes.saturating_sub(bytes_of(&gone.head));
        }
    }

    /// Memory in use, about. Unit: bytes.
    pub(super) fn bytes(&self) -> usize {
        self.bytes
    }
}

fn bytes_of(head: &Head) -> usize {
    ENTRY_BYTES + head.parts().len() * PART_BYTES + head.spans().len() * 4
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a panic is the failure report")]
    use super::*;
    use crate::testkit::*;

    #[test]
    fn heads_are_bounded_and_the_used_ones_stay() {
        let mut store = Fixture::new();
        store.put_all([1]);
        let place = store.place(1);
        let buf = store.buf();
        store.store.get(0, &want(NS, 1), buf).unwrap();
        let mut events = Vec::new();
        while events.is_empty() {
            store.store.step(crate::disk::Wait::One, &mut events);
        }
        let crate::Event::Got { result, .. } = events.remove(0) else {
            panic!("{events:?}");
        };
        let head = Arc::new(result.unwrap().verify().unwrap().head().clone());

        let mut heads = Heads::default();
        let at = |number: u64| Place {
            sequence: number,
            ..place
        };
        heads.insert(at(0), Arc::clone(&head));
        for number in 1..100_000 {
            heads.insert(at(number), Arc::clone(&head));
            assert!(
                heads.get(&at(0)).is_some(),
                "a head in use went at {number}"
            );
        }
        assert!(heads.bytes() <= BYTES_MAX && heads.bytes() > BYTES_MAX / 2);
        assert!(heads.get(&at(1)).is_none() && heads.get(&at(99_999)).is_some());
        assert!(heads.order.len() <= BYTES_MAX / ENTRY_BYTES);
        heads.forget(&at(0));
        assert!(heads.get(&at(0)).is_none());
    }
}
