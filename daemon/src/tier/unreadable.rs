//! Records that were found to need tables which are not loaded, so that nobody reads them again.
//!
//! Upstairs:   `load` and `explain` add what they found; lookups and saves ask.
//! Downstairs: nothing.
//!
//! Such a record is sound: it stays where it is, is a miss until its tables are loaded, which
//! takes a restart, and makes room for a save of its block.
//!
//! Not here on purpose: no word on records that nobody has read. Which tables a record needs
//! stands in its head, on the device.

use std::collections::{HashMap, VecDeque};
use std::sync::{Mutex, MutexGuard, PoisonError};

use kvtier_store::Place;

use crate::block::BlockId;
use crate::metrics::Device;

/// Where a record lies. Two devices may have records in places alike.
pub type At = (Device, Place);

/// Most records that are remembered. Of one that is forgotten a lookup says that it is there, and
/// the next restore of it finds out again.
const KEPT_MAX: usize = 1 << 16;

#[derive(Debug, Default)]
struct Kept {
    tables: HashMap<BlockId, (At, u32)>,
    /// In the order they came.
    order: VecDeque<BlockId>,
}

/// See the module.
#[derive(Debug, Default)]
pub struct Unreadable(Mutex<Kept>);

impl Unreadable {
    /// The record at this place needs these tables.
    pub fn add(&self, id: BlockId, at: At, tables: u32) {
        let mut kept = self.lock();
        if kept.tables.insert(id, (at, tables)).is_none() {
            kept.order.push_back(id);
        }
        if kept.order.len() > KEPT_MAX
            && let Some(oldest) = kept.order.pop_front()
        {
            kept.tables.remove(&oldest);
        }
    }

    /// The tables that the record at this place needs and that are not there. Another record may
    /// have taken its place since.
    pub fn tables(&self, id: &BlockId, at: &At) -> Option<u32> {
        let kept = self.lock();
        let (here, tables) = kept.tables.get(id)?;
        (here == at).then_some(*tables)
    }

    /// Where the record of the block lies that cannot be read, as far as is known.
    pub fn place(&self, id: &BlockId) -> Option<Place> {
        self.lock().tables.get(id).map(|((_, place), _)| *place)
    }

    fn lock(&self) -> MutexGuard<'_, Kept> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use kvtier_proto::{BlockKey, NamespaceId, PayloadKind};

    use super::*;
    use crate::metrics::Label;

    fn id(number: usize) -> BlockId {
        let mut key = [0; 32];
        key[..8].copy_from_slice(&number.to_le_bytes());
        BlockId {
            namespace: NamespaceId(1),
            kind: PayloadKind::Kv,
            key: BlockKey(key),
        }
    }

    fn place(offset: u64) -> At {
        let place = Place {
            segment: 1,
            offset,
            len: 8192,
            head_len: 4096,
            epoch: 2,
            sequence: offset,
        };
        (Device::FIRST, place)
    }

    #[test]
    fn a_record_that_took_the_place_of_an_unreadable_one_is_not_meant() {
        let unreadable = Unreadable::default();
        unreadable.add(id(1), place(4096), 7);
        assert_eq!(unreadable.tables(&id(1), &place(4096)), Some(7));
        assert_eq!(unreadable.tables(&id(1), &place(8192)), None);
        assert_eq!(unreadable.tables(&id(2), &place(4096)), None);
        let second = <Device as Label>::all()[1];
        let alike = (second, place(4096).1);
        assert_eq!(unreadable.tables(&id(1), &alike), None);
        unreadable.add(id(1), place(8192), 9);
        assert_eq!(unreadable.tables(&id(1), &place(8192)), Some(9));
    }

    #[test]
    fn no_more_than_a_bounded_number_is_remembered_and_the_oldest_goes() {
        let unreadable = Unreadable::default();
        for number in 0..=KEPT_MAX {
            unreadable.add(id(number), place(4096), 7);
        }
        let kept = unreadable.lock();
        assert_eq!((kept.tables.len(), kept.order.len()), (KEPT_MAX, KEPT_MAX));
        assert!(!kept.tables.contains_key(&id(0)) && kept.tables.contains_key(&id(1)));
    }
}
