//! Which block is loaded next, and how many at a time.
//!
//! Upstairs:   `run`.
//! Downstairs: `claims`. Time comes in as an argument.
//!
//! A reader that needs a loaded prefix gets its blocks from the front, as many at a time as keep
//! the device busy. A reader that computes meanwhile gets them from the back, and no more at a time
//! than the device works on anyway: a block that is claimed and only waits in a queue is one that
//! the engine could have computed, and has to wait for.

use std::collections::{BTreeSet, VecDeque};
use std::ops::Range;
use std::time::Duration;

use crate::restore::claims::Claims;

/// Most loads of one restore in flight. Enough to fill the device's queue with blocks of a few
/// MiB; more would only take memory from others.
const LOADS_MAX: usize = 32;
/// Fewest loads in flight: one on the device, one being checked or decoded.
const LOADS_MIN: usize = 2;
/// What is in flight from the back takes the device this long, at the rate seen so far.
const IN_FLIGHT: Duration = Duration::from_millis(5);

/// See the module.
#[derive(Debug)]
pub(super) struct Order {
    /// Ascending indices.
    left: VecDeque<usize>,
    back: Option<Back>,
}

#[derive(Debug)]
struct Back {
    claims: Claims,
    /// Blocks on their way.
    flying: BTreeSet<usize>,
    /// Blocks that came, and their bytes.
    blocks: usize,
    bytes: usize,
}

impl Order {
    /// These blocks, in ascending order: from the front, or from the back of a map.
    pub(super) fn new(load: Vec<usize>, claims: Option<Claims>) -> Self {
        let back = claims.map(|claims| Back {
            claims,
            flying: BTreeSet::new(),
            blocks: 0,
            bytes: 0,
        });
        let left = load.into();
        Self { left, back }
    }

    /// The next block of `wanted` to load; it is claimed.
    pub(super) fn next(&mut self, wanted: Range<usize>) -> Option<usize> {
        let left = &mut self.left;
        let Some(back) = &mut self.back else {
            return std::iter::from_fn(|| left.pop_front()).find(|index| wanted.contains(index));
        };
        let claimed = |index: &usize| wanted.contains(index) && back.claims.take(*index);
        let index = std::iter::from_fn(|| left.pop_back()).find(claimed)?;
        back.flying.insert(index);
        Some(index)
    }

    /// The load of a block has ended, with so many bytes or without.
    pub(super) fn landed(&mut self, index: usize, bytes: Option<usize>) {
        let Some(back) = &mut self.back else {
            return;
        };
        back.flying.remove(&index);
        if let Some(bytes) = bytes {
            back.blocks += 1;
            back.bytes = back.bytes.saturating_add(bytes);
        }
    }

    /// The device is late: the engine may have what is on its way, and the first of the two to
    /// finish brings it.
    pub(super) fn give_back(&self) {
        if let Some(back) = &self.back {
            back.flying
                .iter()
                .for_each(|index| back.claims.give_back(*index));
        }
    }

    /// Loads that may be in flight when so much time has passed since the first.
    pub(super) fn depth(&self, elapsed: Duration) -> usize {
        let Some(back) = &self.back else {
            return LOADS_MAX;
        };
        let block = back.bytes.checked_div(back.blocks).unwrap_or(0).max(1);
        let worth = match back.blocks {
            0 => return LOADS_MIN,
            _ => Self::worth(back.bytes, elapsed),
        };
        worth
            .div_ceil(block)
            .saturating_add(1)
            .clamp(LOADS_MIN, LOADS_MAX)
    }

    /// Bytes that take [`IN_FLIGHT`] at the rate of so many in `spent`.
    fn worth(bytes: usize, spent: Duration) -> usize {
        let spent = spent.as_micros().max(1);
        let worth = bytes as u128 * IN_FLIGHT.as_micros() / spent;
        usize::try_from(worth).unwrap_or(usize::MAX)
    }
}

#[cfg(test)]
mod tests;
