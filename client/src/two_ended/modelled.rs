//! The engine's rules of waiting, for those who play restores in time of their own.
//!
//! Upstairs:   `kvtier-bench planner`.
//! Downstairs: `pace`.

use tokio::time::Instant;

use super::pace::Pace;

/// What an engine knows of both ends' speed, and decides by it.
#[derive(Debug)]
pub struct ModelledPace(Pace);

impl ModelledPace {
    /// Begins now.
    pub fn new(now: Instant) -> Self {
        Self(Pace::new(now))
    }

    /// A block came from a device.
    pub fn came(&mut self, now: Instant) {
        self.0.came(now);
    }

    /// The engine begins with a block.
    pub fn given(&mut self, now: Instant) {
        self.0.given(now);
    }

    /// It is done with it.
    pub fn computed(&mut self, now: Instant) {
        self.0.computed(now);
    }

    /// True when a block that nobody has, the first of so many that are not here, is to be
    /// computed.
    pub fn is_worth(&self, blocks: usize, open: bool, now: Instant) -> bool {
        self.0.is_worth(blocks, open, now)
    }

    /// True when a block that is loading, the first of so many, is to be taken over.
    pub fn is_slow(&self, loading: usize, open: bool, now: Instant) -> bool {
        self.0.is_slow(loading, open, now)
    }

    /// When a block that is loading is not waited for any longer.
    pub fn overdue_at(&self, open: bool) -> Option<Instant> {
        self.0.overdue_at(open)
    }
}
