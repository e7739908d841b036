//! The segment table: which files there are, what life each leads, who reads it.
//!
//! Upstairs:   `store` allocates, seals and recycles; `recover` fills it.
//! Downstairs: `format::segment`.
//!
//! Invariants kept here
//!   L4  A segment changes state only along the edges below.
//!   L5  A segment with a reader is not recycled.
//!
//! Not here on purpose: no I/O, and no clock: a segment's age is its epoch.

use std::collections::BTreeSet;

use crate::disk::FileId;
use crate::format::{Place, Summary};
use crate::planted::{Bug, planted};

/// ```text
///       Allocate           Prepared         Use          Full           Seal
///  Free ------> Preparing --------> Ready -----> Open ------> Sealing -----> Sealed
///   ^                                                                          |
///   |                            Emptied                                       | Chosen
///   +----------------------------------------- Draining <----------------------+
/// ```
/// A segment is prepared before it is needed: its header with the new epoch is durable before the
/// first record of the old life is overwritten, so that no crash leaves an old footer over new
/// records.
///
/// `Seal` comes with a footer on the device or without one: a footer that could not be written
/// costs the next opening a scan and nothing else.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Life {
    /// Holds nothing that counts.
    Free,
    /// Its new header is on its way.
    Preparing,
    /// Its new header is durable.
    Ready,
    /// Takes records.
    Open,
    /// Full; its last records and its footer are on their way.
    Sealing,
    /// Only read.
    Sealed,
    /// Chosen to be recycled: forgotten except for pinned records and present readers.
    Draining,
}

/// What moves a segment from one state to the next.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Step {
    Allocate,
    Prepared,
    Use,
    Full,
    Seal,
    Chosen,
    Emptied,
}

impl Life {
    /// The whole machine. `None` must not happen (L4).
    pub(crate) const fn next(self, step: Step) -> Option<Life> {
        match (self, step) {
            (Life::Free, Step::Allocate) => Some(Life::Preparing),
            (Life::Preparing, Step::Prepared) => Some(Life::Ready),
            (Life::Ready, Step::Use) => Some(Life::Open),
            (Life::Open, Step::Full) => Some(Life::Sealing),
            (Life::Sealing, Step::Seal) => Some(Life::Sealed),
            (Life::Sealed, Step::Chosen) => Some(Life::Draining),
            (Life::Draining, Step::Emptied) => Some(Life::Free),
            _ => None,
        }
    }
}

/// One segment file.
#[derive(Debug)]
pub(crate) struct Segment {
    pub(crate) number: u32,
    pub(crate) file: FileId,
    /// Length of the file. Unit: bytes. One of another length is removed when it is emptied.
    pub(crate) size: u64,
    pub(crate) life: Life,
    pub(crate) epoch: u64,
    /// First byte that no record has. Unit: bytes.
    pub(crate) end: u64,
    /// Records written well in this life: what the footer will list. Empty once sealed.
    pub(crate) rows: Vec<Summary>,
    /// Records placed in this life, written well or not: the footer must have room for them.
    pub(crate) placed: u64,
    /// Reads in flight.
    pub(crate) readers: u32,
    /// The device did not deliver all of it: there may be blocks that nobody knows of.
    pub(crate) unread: bool,
}

impl Segment {
    pub(crate) fn new(number: u32, file: FileId, size: u64) -> Self {
        Self {
            number,
            file,
            size,
            life: Life::Free,
            epoch: 0,
            end: 0,
            rows: Vec::new(),
            placed: 0,
            readers: 0,
            unread: false,
        }
    }

    /// What the choice of a victim goes by. One that was not read whole goes last: its epoch may
    /// be unknown, and blocks would go with it that nobody could tell of.
    pub(crate) fn age(&self) -> u64 {
        if self.unread && !planted(Bug::UnreadGoesFirst) {
            u64::MAX
        } else {
            self.epoch
        }
    }

    /// Takes `step`, or stays and says so: the caller then leaves the segment alone.
    pub(crate) fn step(&mut self, step: Step) -> bool {
        let next = self.life.next(step);
        debug_assert!(
            next.is_some(),
            "L4: segment {} is {:?}, {step:?}",
            self.number,
            self.life
        );
        match next {
            Some(next) => self.life = next,
            None => tracing::error!(segment = self.number, life = ?self.life, ?step, "L4 broken"),
        }
        next.is_some()
    }
}

/// All segment files of a store. Numbers are small and dense, and a number stays with its file.
#[derive(Debug, Default)]
pub(crate) struct Segments {
    all: Vec<Option<Segment>>,
    count: usize,
    /// Numbers of files that are there and not in use: they did not open, or could not be removed.
    left_alone: BTreeSet<u32>,
}

impl Segments {
    pub(crate) fn get(&self, number: u32) -> Option<&Segment> {
        self.all.get(number as usize)?.as_ref()
    }

    pub(crate) fn get_mut(&mut self, number: u32) -> Option<&mut Segment> {
        self.all.get_mut(number as usize)?.as_mut()
    }

    pub(crate) fn add(&mut self, segment: Segment) {
        let at = segment.number as usize;
        while self.all.len() <= at {
            self.all.push(None);
        }
        if let Some(place) = self.all.get_mut(at) {
            self.count += usize::from(place.is_none());
            *place = Some(segment);
        }
    }

    pub(crate) fn remove(&mut self, number: u32) -> Option<Segment> {
        let taken = self.all.get_mut(number as usize)?.take();
        self.count -= usize::from(taken.is_some());
        taken
    }

    pub(crate) fn count(&self) -> usize {
        self.count
    }

    pub(crate) fn iter(&self) -> impl Iterator<Item = &Segment> {
        self.all.iter().flatten()
    }

    /// Files that take space: those of the table, and those that are left alone.
    pub(crate) fn files(&self) -> u64 {
        (self.count + self.left_alone.len()) as u64
    }

    /// A file of this number is there, and is none of the table's.
    pub(crate) fn leave_alone(&mut self, number: u32) {
        self.left_alone.insert(number);
    }

    /// Least number that no file has.
    pub(crate) fn vacant(&self) -> u32 {
        let taken = |number: &u32| self.get(*number).is_some() || self.left_alone.contains(number);
        (0..u32::MAX)
            .find(|number| !taken(number))
            .unwrap_or(u32::MAX)
    }

    pub(crate) fn first_free(&self) -> Option<u32> {
        self.iter()
            .find(|segment| segment.life == Life::Free)
            .map(|segment| segment.number)
    }

    pub(crate) fn read_begins(&mut self, place: &Place) -> Option<FileId> {
        let segment = self.get_mut(place.segment)?;
        segment.readers += 1;
        Some(segment.file)
    }

    pub(crate) fn read_ends(&mut self, place: &Place) {
        if let Some(segment) = self.get_mut(place.segment) {
            segment.readers = segment.readers.saturating_sub(1);
        }
    }
}

/// What the reclaim policy sees of a sealed segment.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Candidate {
    /// Segment number.
    pub segment: u32,
    /// Age: a lower epoch is older. `u64::MAX` for one that was not read whole at the opening.
    pub epoch: u64,
    /// Reads in flight.
    pub readers: u32,
    /// Blocks that it still holds.
    pub live: u32,
    /// Bytes of pinned records that would have to be copied forward.
    pub pinned_bytes: u64,
}

/// Which segment to recycle: one whose pinned records fit into `room` bytes, if there is one; of
/// those one without readers; of those the oldest. Readers only delay: a chosen segment gets no
/// new ones, and is used again when the last has gone. Pure: the replay judges this very function.
pub fn choose_victim(candidates: &[Candidate], room: u64) -> Option<u32> {
    candidates
        .iter()
        .min_by_key(|one| (one.pinned_bytes > room, one.readers > 0, one.epoch))
        .map(|one| one.segment)
}

#[cfg(test)]
mod tests;
