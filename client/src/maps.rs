//! Places for the maps of two-ended restores, cut from one region for claims.
//!
//! Upstairs:   `session` takes a place for each two-ended restore; `mux` keeps it until the daemon
//!             has said that the restore is over, for until then it may write there.
//! Downstairs: `shm`.
//!
//! When a restore's stream fails, the daemon says nothing of its restores any more, and may write
//! a while longer. Their places are not used again: they go with the region, when the session
//! ends. That is memory of a size that was set before; when all of it is lost, restores of the
//! session load and compute in turn.
//!
//! Invariants kept here
//!   P1  Places of restores that may still run never overlap.
//!   P2  A place is all zeros when it is handed out.
//!   P3  A place that the daemon has not said to be done with is never handed out again.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use kvtier_proto::claims::map_len;
use kvtier_proto::v1;

use crate::shm::Bytes;

/// Size of the region: room for 64 restores of 4096 blocks. Unit: bytes.
pub(crate) const MAPS_BYTES: u64 = 512 << 10;

/// The region of one link.
pub(crate) struct Maps {
    region: u32,
    bytes: Bytes,
    /// End of each place by its start.
    taken: Mutex<BTreeMap<usize, usize>>,
}

/// Where the map of one restore lies; free again when it is dropped, unless it was given up.
pub(crate) struct Place {
    maps: Arc<Maps>,
    at: usize,
    len: usize,
    lost: AtomicBool,
}

impl Maps {
    pub(crate) fn new(region: u32, bytes: Bytes) -> Arc<Self> {
        let taken = Mutex::default();
        Arc::new(Self {
            region,
            bytes,
            taken,
        })
    }

    /// A place for a map of so many blocks, or `None` when there is no room.
    pub(crate) fn place(self: &Arc<Self>, blocks: usize) -> Option<Arc<Place>> {
        let len = map_len(blocks);
        let mut taken = self.taken.lock().unwrap_or_else(PoisonError::into_inner);
        let mut at = 0;
        for (start, end) in taken.iter() {
            if start.saturating_sub(at) >= len {
                break;
            }
            at = *end;
        }
        let end = at.checked_add(len)?;
        if end > self.bytes.len() {
            return None;
        }
        taken.insert(at, end);
        drop(taken);
        (at..end).for_each(|at| self.bytes.set(at, 0));
        let maps = Arc::clone(self);
        let lost = AtomicBool::new(false);
        Some(Arc::new(Place {
            maps,
            at,
            len,
            lost,
        }))
    }
}

impl Place {
    /// Its name on the wire.
    pub(crate) fn slot(&self) -> v1::Slot {
        v1::Slot {
            region: self.maps.region,
            offset: self.at as u64,
            length: self.len as u64,
            generation: 0,
        }
    }

    /// It is never free again (P3).
    pub(crate) fn give_up(&self) {
        self.lost.store(true, Ordering::Release);
    }

    pub(crate) fn get(&self, at: usize) -> u8 {
        self.inside(at).map_or(0, |at| self.maps.bytes.get(at))
    }

    /// True when the byte was `from` and is `to` now.
    pub(crate) fn swap(&self, at: usize, from: u8, to: u8) -> bool {
        self.inside(at)
            .is_some_and(|at| self.maps.bytes.swap(at, from, to))
    }

    fn inside(&self, at: usize) -> Option<usize> {
        (at < self.len).then_some(self.at + at)
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        if *self.lost.get_mut() {
            return;
        }
        let mut taken = self.maps.taken.lock();
        if let Ok(taken) = taken.as_deref_mut() {
            taken.remove(&self.at);
        }
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use rustix::fs::MemfdFlags;

    use super::*;

    /// Maps over memory of this process.
    pub(crate) fn maps(len: usize) -> Arc<Maps> {
        let fd = rustix::fs::memfd_create("kvtier-test", MemfdFlags::CLOEXEC).unwrap();
        rustix::fs::ftruncate(&fd, len as u64).unwrap();
        Maps::new(3, Bytes::map(&fd, len).unwrap())
    }

    #[test]
    fn place_is_zero_apart_from_all_others_and_can_be_had_again() {
        let maps = maps(4096);
        let first = maps.place(100).unwrap();
        let second = maps.place(200).unwrap();
        let name = |place: &Place| (place.slot().offset, place.slot().length);
        assert_eq!((name(&first), name(&second)), ((0, 108), (108, 208)));
        assert_eq!(first.slot().region, 3);
        assert!(first.swap(107, 0, 9) && !first.swap(108, 0, 9), "its end");
        assert_eq!(second.get(0), 0);
        drop(first);
        assert_eq!(name(&maps.place(101).unwrap()), (316, 109), "no gap for it");
        let again = maps.place(100).unwrap();
        assert_eq!((name(&again), again.get(107)), ((0, 108), 0));
    }

    #[test]
    fn place_that_was_given_up_is_never_handed_out_again() {
        let maps = maps(4096);
        let (lost, kept) = (maps.place(100).unwrap(), maps.place(100).unwrap());
        let again = Arc::clone(&lost);
        again.give_up();
        drop((lost, again));
        assert_eq!(maps.place(50).unwrap().slot().offset, 216);
        drop(kept);
        assert_eq!(maps.place(100).unwrap().slot().offset, 108);
    }

    #[test]
    fn place_is_refused_where_there_is_no_room() {
        let maps = maps(4096);
        assert!(maps.place(4089).is_none() && maps.place(usize::MAX).is_none());
        let all = maps.place(4088).unwrap();
        assert!(maps.place(0).is_none());
        drop(all);
        assert!(maps.place(0).is_some());
    }
}
