//! Pins of stored blocks and when they end.
//!
//! Upstairs:   the disk thread pins and unpins in the store.
//! Downstairs: nothing. Time comes in as an argument.
//!
//! Invariants kept here
//!   T6  A block has one pin at most, so that there are never more pins than stored blocks.

use std::collections::{BTreeSet, HashMap};
use std::time::Instant;

use kvtier_proto::{BlockKey, NamespaceId};

/// Whose record, and its name on the device.
pub(super) type Pinned = (NamespaceId, BlockKey);

/// See the module.
#[derive(Debug, Default)]
pub(super) struct Pins {
    ends: HashMap<Pinned, Instant>,
    by_end: BTreeSet<(Instant, NamespaceId, BlockKey)>,
}

impl Pins {
    /// Pins a block until `end`, in place of any pin that it has.
    pub(super) fn set(&mut self, block: Pinned, end: Instant) {
        self.remove(&block);
        self.ends.insert(block, end);
        self.by_end.insert((end, block.0, block.1));
    }

    /// Takes the pin of a block away.
    pub(super) fn remove(&mut self, block: &Pinned) {
        if let Some(end) = self.ends.remove(block) {
            self.by_end.remove(&(end, block.0, block.1));
        }
    }

    /// Takes every pin of a namespace away.
    pub(super) fn forget(&mut self, namespace: NamespaceId) {
        self.ends.retain(|block, _| block.0 != namespace);
        self.by_end.retain(|pin| pin.1 != namespace);
    }

    /// The block whose pin ends first, if that is over by `now`. It is pinned no more.
    pub(super) fn take_ended(&mut self, now: Instant) -> Option<Pinned> {
        let &(_, namespace, key) = self.by_end.first().filter(|(end, ..)| *end <= now)?;
        self.remove(&(namespace, key));
        Some((namespace, key))
    }

    #[cfg(test)]
    pub(super) fn len(&self) -> usize {
        self.ends.len()
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn pins_end_in_the_order_of_their_ends_and_once_each() {
        let (mut pins, now) = (Pins::default(), Instant::now());
        let at = |second| now + Duration::from_secs(second);
        let block = |namespace, key| (NamespaceId(namespace), BlockKey([key; 32]));
        pins.set(block(1, 1), at(30));
        pins.set(block(1, 2), at(20));
        pins.set(block(2, 1), at(40));
        pins.set(block(1, 1), at(10));
        assert_eq!((pins.len(), pins.by_end.len()), (3, 3), "one pin a block");
        assert_eq!(pins.take_ended(at(9)), None);
        assert_eq!(pins.take_ended(at(20)), Some(block(1, 1)));
        assert_eq!(pins.take_ended(at(20)), Some(block(1, 2)));
        assert_eq!(pins.take_ended(at(39)), None);
        pins.set(block(1, 3), at(50));
        pins.forget(NamespaceId(2));
        assert_eq!(pins.take_ended(at(60)), Some(block(1, 3)));
        assert_eq!((pins.len(), pins.by_end.len()), (0, 0));
    }
}
