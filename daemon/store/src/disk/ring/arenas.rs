//! Which entry of a ring's buffer table covers which part of which arena.
//!
//! Upstairs:   `disk::ring`, which does the registering.
//! Downstairs: nothing; numbers only.
//!
//! The kernel takes at most 1 GiB per entry and an operation must lie inside one entry. So a
//! large arena gets entries of 1 GiB that start every 960 MiB: whatever is not longer than the
//! overlap lies whole inside one of them.
//!
//! Not here on purpose: no unsafe code. A wrong entry cannot corrupt memory: the kernel checks
//! that the address lies inside the entry and refuses the operation.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::{Arc, Weak};

use crate::mem::{Arena, IoBuf};

/// Entries of the table. At 960 MiB each, memory for 960 GiB of arenas.
pub(super) const ENTRIES: u16 = 1024;

/// Longest entry that the kernel takes. Unit: bytes.
const ENTRY_BYTES: usize = 1 << 30;

/// How far entries of one arena overlap. Unit: bytes.
const OVERLAP_BYTES: usize = 64 << 20;

/// Distance between the starts of two entries. Unit: bytes.
const STRIDE_BYTES: usize = ENTRY_BYTES - OVERLAP_BYTES;

/// The arenas that a ring has registered, by number.
#[derive(Debug, Default)]
pub(super) struct ArenaTable {
    known: BTreeMap<u64, Known>,
}

#[derive(Debug)]
struct Known {
    arena: Weak<Arena>,
    entries: Range<u16>,
}

/// Parts of an arena of `len` bytes, one per table entry.
pub(super) fn parts(len: usize) -> Vec<Range<usize>> {
    let more = len.saturating_sub(ENTRY_BYTES).div_ceil(STRIDE_BYTES);
    (0..=more)
        .map(|part| part * STRIDE_BYTES)
        .map(|start| start..len.min(start + ENTRY_BYTES))
        .collect()
}

impl ArenaTable {
    pub(super) fn contains(&self, arena: &Arena) -> bool {
        self.known.contains_key(&arena.number())
    }

    pub(super) fn len(&self) -> usize {
        self.known.len()
    }

    /// A free run of `count` entries.
    pub(super) fn room(&self, count: usize) -> Option<Range<u16>> {
        let mut taken: Vec<_> = self
            .known
            .values()
            .map(|known| known.entries.clone())
            .collect();
        taken.sort_by_key(|entries| entries.start);
        let count = u16::try_from(count).ok()?;
        let mut start = 0_u16;
        for entries in taken {
            if entries.start - start >= count {
                break;
            }
            start = entries.end;
        }
        let end = start.checked_add(count)?;
        (end <= ENTRIES).then_some(start..end)
    }

    pub(super) fn insert(&mut self, arena: &Arc<Arena>, entries: Range<u16>) {
        let known = Known {
            arena: Arc::downgrade(arena),
            entries,
        };
        self.known.insert(arena.number(), known);
    }

    /// The entry that covers `at .. at + len` of the buffer, if one does.
    pub(super) fn entry(&self, buf: &IoBuf, at: usize, len: usize) -> Option<u16> {
        let known = self.known.get(&buf.arena().number())?;
        let start = buf.offset() + at;
        let last = usize::from(known.entries.end - known.entries.start) - 1;
        let part = (start / STRIDE_BYTES).min(last);
        let fits = start + len <= part * STRIDE_BYTES + ENTRY_BYTES;
        fits.then_some(known.entries.start + u16::try_from(part).ok()?)
    }

    /// Forgets arenas that are gone and returns the entries that they held.
    pub(super) fn sweep(&mut self) -> Vec<Range<u16>> {
        let mut gone = Vec::new();
        self.known.retain(|_, known| {
            let alive = known.arena.strong_count() > 0;
            if !alive {
                gone.push(known.entries.clone());
            }
            alive
        });
        gone
    }

    /// Forgets all and returns those that are still alive, for another ring.
    pub(super) fn drain(&mut self) -> Vec<Arc<Arena>> {
        std::mem::take(&mut self.known)
            .into_values()
            .filter_map(|k| k.arena.upgrade())
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::mem::Share;

    const MIB: usize = 1 << 20;

    #[test]
    fn parts_cover_any_run_that_is_not_longer_than_the_overlap() {
        for len in [
            4096,
            ENTRY_BYTES,
            ENTRY_BYTES + 4096,
            5 * ENTRY_BYTES + 3 * MIB,
        ] {
            let parts = parts(len);
            assert_eq!(parts.last().unwrap().end, len);
            assert!(
                parts
                    .iter()
                    .all(|part| part.len() <= ENTRY_BYTES && !part.is_empty())
            );
            for start in (0..len.saturating_sub(OVERLAP_BYTES)).step_by(16 * MIB) {
                let part = parts
                    .get((start / STRIDE_BYTES).min(parts.len() - 1))
                    .unwrap();
                assert!(
                    part.start <= start && start + OVERLAP_BYTES <= part.end,
                    "{start}"
                );
            }
        }
    }

    #[test]
    fn table_reuses_the_entries_of_arenas_that_are_gone() {
        let mut table = ArenaTable::default();
        let arenas: Vec<_> = (0..3)
            .map(|_| Arena::create("test", 4096, Share::Private).unwrap())
            .collect();
        for (arena, count) in arenas.iter().zip([2, 3, 4]) {
            let room = table.room(count).unwrap();
            table.insert(arena, room);
        }
        assert_eq!(table.room(1), Some(9..10));
        assert_eq!(table.room(usize::from(ENTRIES)), None);

        let [first, second, third] = <[_; 3]>::try_from(arenas).unwrap();
        let buf = second.alloc(4096).unwrap();
        drop((first, second));
        assert_eq!(
            table.sweep(),
            vec![0..2],
            "a buffer keeps its arena registered"
        );
        assert_eq!(table.entry(&buf, 0, 4096), Some(2));
        drop(buf);
        assert_eq!(table.sweep(), vec![2..5]);
        assert_eq!(table.room(5), Some(0..5));
        assert_eq!(table.drain().len(), 1);
        drop(third);
    }
}
