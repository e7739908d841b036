//! The engine's end of a restore, as the SDK plays it: which block it computes next.
//!
//! Upstairs:   `world`.
//! Downstairs: the SDK's own account of how fast both ends go.
//!
//! The rules are those of `client/src/two_ended.rs`, over a map that is a list.

use std::cell::Cell;
use std::time::Duration;

use kvtier_client::ModelledPace;
use kvtier_proto::claims::{Claim, Gate};
use tokio::time::Instant;

/// What both ends share.
#[derive(Debug)]
pub(super) struct Map {
    pub(super) gate: Cell<Gate>,
    pub(super) blocks: Vec<Cell<Claim>>,
}

impl Map {
    pub(super) fn new(blocks: usize) -> Self {
        Self {
            gate: Cell::new(Gate::Closed),
            blocks: vec![Cell::new(Claim::Empty); blocks],
        }
    }

    pub(super) fn of(&self, index: usize) -> Claim {
        self.blocks.get(index).map_or(Claim::Computed, Cell::get)
    }

    pub(super) fn swap(&self, index: usize, from: Claim, to: Claim) -> bool {
        let block = self.blocks.get(index).filter(|block| block.get() == from);
        block.is_some_and(|block| {
            block.set(to);
            true
        })
    }
}

/// See the module.
#[derive(Debug)]
pub(super) struct Engine {
    /// What time is counted from.
    begin: Instant,
    here: Vec<bool>,
    /// Every block before it is here.
    front: usize,
    computing: Option<usize>,
    ended: bool,
    pace: ModelledPace,
}

impl Engine {
    pub(super) fn new(blocks: usize) -> Self {
        let begin = Instant::now();
        Self {
            begin,
            here: vec![false; blocks],
            front: 0,
            computing: None,
            ended: false,
            pace: ModelledPace::new(begin),
        }
    }

    /// A block is in the engine's cache; it came from a device, or not.
    pub(super) fn came(&mut self, now: Duration, index: usize, from_device: bool) {
        if from_device {
            self.pace.came(self.begin + now);
        }
        self.is_here(index);
    }

    /// The block that it computes is done.
    pub(super) fn computed(&mut self, now: Duration, index: usize) {
        self.pace.computed(self.begin + now);
        self.computing = None;
        self.is_here(index);
    }

    /// Nothing comes from the daemon any more.
    pub(super) fn end(&mut self) {
        self.ended = true;
    }

    pub(super) fn has_all(&self) -> bool {
        self.front == self.here.len()
    }

    /// The block that it begins to compute now, if any.
    pub(super) fn next(&mut self, now: Duration, map: &Map) -> Option<usize> {
        if self.computing.is_some() || self.has_all() || !self.claim(now, map) {
            return None;
        }
        self.computing = Some(self.front);
        self.pace.given(self.begin + now);
        self.computing
    }

    /// When it takes over the block that it waits for.
    pub(super) fn overdue_at(&self, map: &Map) -> Option<Duration> {
        let comes = matches!(map.of(self.front), Claim::Loading | Claim::Empty);
        let waits = self.computing.is_none() && comes;
        let open = map.gate.get() == Gate::Open;
        let at = self.pace.overdue_at(open).filter(|_| waits)?;
        Some(at.saturating_duration_since(self.begin))
    }

    fn claim(&self, now: Duration, map: &Map) -> bool {
        let index = self.front;
        let swap = |from| map.swap(index, from, Claim::Computing);
        let open = map.gate.get() == Gate::Open;
        if self.ended {
            return map.of(index) != Claim::Ready;
        }
        swap(Claim::Missed)
            || (self.is_worth(now, map, open) && swap(Claim::Empty))
            || (self.is_slow(now, map, open) && swap(Claim::Loading))
    }

    fn is_worth(&self, now: Duration, map: &Map, open: bool) -> bool {
        let free = map.of(self.front) == Claim::Empty;
        free && self
            .pace
            .is_worth(self.to_come(map), open, self.begin + now)
    }

    fn is_slow(&self, now: Duration, map: &Map, open: bool) -> bool {
        let loading = map.of(self.front) == Claim::Loading;
        loading && self.pace.is_slow(self.to_come(map), open, self.begin + now)
    }

    /// Blocks that may yet be loaded.
    fn to_come(&self, map: &Map) -> usize {
        let comes = |at: &usize| matches!(map.of(*at), Claim::Empty | Claim::Loading);
        (self.front..self.here.len()).filter(comes).count()
    }

    fn is_here(&mut self, index: usize) {
        if let Some(here) = self.here.get_mut(index) {
            *here = true;
        }
        let behind = self.here.iter().skip(self.front);
        self.front += behind.take_while(|here| **here).count();
    }
}
