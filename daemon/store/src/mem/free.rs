//! Free runs of an arena: best fit, neighbours always merged, O(log n) either way.
//!
//! Upstairs:   `mem::Arena` and the staging regions of the daemon, under their locks.
//! Downstairs: nothing; numbers only.
//!
//! Invariants kept here
//!   M1  What `take` returns is taken out of the free runs, so no two takers overlap.
//!
//! Not here on purpose: no size classes. Blocks of one model have one size, and best fit then
//! reuses exactly the hole that the last one left.

use std::collections::{BTreeMap, BTreeSet};

/// Free runs, by place and by length. Units are the caller's; the daemon counts bytes.
#[derive(Debug)]
pub struct FreeRuns {
    by_start: BTreeMap<usize, usize>,
    by_len: BTreeSet<(usize, usize)>,
    bytes: usize,
}

impl FreeRuns {
    /// One free run of `len` bytes at 0.
    pub fn new(len: usize) -> Self {
        let mut runs = Self {
            by_start: BTreeMap::new(),
            by_len: BTreeSet::new(),
            bytes: len,
        };
        runs.insert(0, len);
        runs
    }

    /// Takes `room` bytes from the shortest run that holds them; of several, from the first.
    pub fn take(&mut self, room: usize) -> Option<usize> {
        let &(run, start) = self.by_len.range((room, 0)..).next()?;
        self.remove(start, run);
        if run > room {
            self.insert(start + room, run - room);
        }
        self.bytes -= room;
        Some(start)
    }

    /// Gives back what `take(room)` returned.
    pub fn give_back(&mut self, start: usize, room: usize) {
        let (mut merged, mut len) = (start, room);
        let before = self
            .by_start
            .range(..start)
            .next_back()
            .map(|(at, run)| (*at, *run));
        if let Some((at, run)) = before
            && at + run == start
        {
            self.remove(at, run);
            (merged, len) = (at, run + room);
        }
        if let Some(run) = self.by_start.get(&(start + room)).copied() {
            self.remove(start + room, run);
            len += run;
        }
        self.insert(merged, len);
        self.bytes += room;
    }

    /// Sum of all free runs.
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// Length of the longest free run.
    pub fn largest(&self) -> usize {
        self.by_len.last().map_or(0, |(len, _)| *len)
    }

    #[cfg(test)]
    pub(super) fn count(&self) -> usize {
        self.by_start.len()
    }

    fn insert(&mut self, start: usize, len: usize) {
        self.by_start.insert(start, len);
        self.by_len.insert((len, start));
    }

    fn remove(&mut self, start: usize, len: usize) {
        self.by_start.remove(&start);
        self.by_len.remove(&(len, start));
    }
}
