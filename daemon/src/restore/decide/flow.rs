//! How fast blocks come from one device, and how many may be on their way for that.
//!
//! Upstairs:   `decide`.
//! Downstairs: nothing. Time comes in as an argument.
//!
//! A block's time is what passes between two that come, while others are under way: the later ones
//! count more, and a single one that takes very long counts as a few usual ones, since a device
//! that hung once is no slower for it.

use std::collections::BTreeMap;
use std::time::Duration;

/// Most loads of one restore in flight. Enough to fill the device's queue with blocks of a few
/// MiB; more would only take memory from others.
pub const LOADS_MAX: usize = 32;
/// Fewest loads in flight: one on the device, one being checked or decoded.
const LOADS_MIN: usize = 2;
/// What is in flight from the back takes the device this long, at the rate seen so far, beside the
/// time that every load takes whatever the device's rate: until one has come, that is not known.
const IN_FLIGHT_S: f64 = 2e-3;
const LATENCY_S: f64 = 3e-3;
/// After so many blocks what was seen before counts half.
const HALF_LIFE: f64 = 4.0;
/// No block counts more than so many of those before it.
const TIMES_MAX: f64 = 4.0;
/// A device is late when nothing has come for so many times what a block takes, and for [`LATE`].
const LATE_TIMES: f64 = 4.0;
const LATE: Duration = Duration::from_millis(20);
/// A device of which nothing is known is late when nothing comes for this long.
const LATE_UNKNOWN: Duration = Duration::from_millis(250);

/// See the module.
#[derive(Debug, Clone, Default)]
pub(super) struct Flow {
    /// When each load under way began.
    under_way: BTreeMap<usize, Duration>,
    /// Blocks that came, and the time between them, fading.
    blocks: f64,
    seconds: f64,
    /// When the last block came, or the first load began after none was under way.
    since: Duration,
    /// The quickest load so far. Unit: seconds.
    quickest_s: Option<f64>,
    /// It was late, and has brought nothing since.
    is_late: bool,
}

impl Flow {
    /// A block is expected to take this long: it counts as one that came.
    pub(super) fn expecting(block_s: f64) -> Self {
        Self {
            blocks: 1.0,
            seconds: block_s,
            ..Self::default()
        }
    }

    /// A load begins.
    pub(super) fn begin(&mut self, now: Duration, index: usize) {
        if self.under_way.is_empty() {
            self.since = now;
            self.is_late = false;
        }
        self.under_way.insert(index, now);
    }

    /// A load ends.
    pub(super) fn end(&mut self, now: Duration, index: usize, came: bool) {
        let Some(began) = self.under_way.remove(&index).filter(|_| came) else {
            return;
        };
        // The first block comes after a whole load's time, of which its own is only a part.
        if self.quickest_s.is_some() || self.blocks == 0.0 {
            let kept = 0.5_f64.powf(1.0 / HALF_LIFE);
            let gap_s = self.counted(now);
            self.blocks = kept * self.blocks + 1.0;
            self.seconds = kept * self.seconds + gap_s;
        }
        let took_s = now.saturating_sub(began).as_secs_f64();
        let quickest_s = self.quickest_s.map_or(took_s, |before| before.min(took_s));
        self.quickest_s = Some(quickest_s);
        self.since = now;
        self.is_late = false;
    }

    /// When the device is late, if nothing comes before, and has not been found late already. To
    /// begin with a block is a bet that nothing comes until it ends: so no sooner than in the
    /// `compute_s` seconds that it would have taken.
    pub(super) fn late_at(&self, compute_s: f64) -> Option<Duration> {
        if self.is_late || self.under_way.is_empty() {
            return None;
        }
        let late_s = self
            .mean_s()
            .map(|mean_s| compute_s.max(LATE_TIMES * mean_s));
        let late = late_s.map(Duration::try_from_secs_f64).and_then(Result::ok);
        let late = late.map_or(LATE_UNKNOWN, |late| late.max(LATE));
        self.since.checked_add(late)
    }

    /// The device is late.
    pub(super) fn set_late(&mut self) {
        self.is_late = true;
    }

    /// It was found late, and has brought nothing of what is under way since.
    pub(super) fn is_stuck(&self) -> bool {
        self.is_late && !self.under_way.is_empty()
    }

    /// Loads under way.
    pub(super) fn loading(&self) -> usize {
        self.under_way.len()
    }

    /// Blocks whose loads are under way, ascending.
    pub(super) fn under_way(&self) -> impl Iterator<Item = usize> {
        self.under_way.keys().copied()
    }

    /// Of them, those between two.
    pub(super) fn loading_of(&self, range: std::ops::Range<usize>) -> usize {
        self.under_way.range(range).count()
    }

    /// What a block takes now: as it was, or longer if the next one is already later than that.
    /// Unit: seconds.
    pub(super) fn block_s(&self, now: Duration) -> Option<f64> {
        let seen = self.mean_s()?;
        let waited = match self.under_way.is_empty() {
            true => 0.0,
            false => (self.seconds + self.counted(now)) / (self.blocks + 1.0),
        };
        Some(seen.max(waited))
    }

    /// Loads that may be in flight.
    pub(super) fn depth(&self) -> usize {
        let Some(block_s) = self.mean_s() else {
            return LOADS_MIN;
        };
        // What a load takes beside its block's turn on the device: latency, checks, decoding.
        let beside_s = self.quickest_s.map_or(LATENCY_S, |load_s| load_s - block_s);
        let worth = (IN_FLIGHT_S + beside_s.max(0.0)) / block_s;
        let counts = LOADS_MIN..LOADS_MAX;
        // The largest count that this is worth, and one more.
        let worth = counts.rev().find(|count| worth > (count - 1) as f64);
        worth.map_or(LOADS_MIN, |count| count + 1)
    }

    fn mean_s(&self) -> Option<f64> {
        (self.blocks > 0.0).then(|| self.seconds / self.blocks)
    }

    /// The time since the last block, as far as it counts. Unit: seconds.
    fn counted(&self, now: Duration) -> f64 {
        let gap_s = now.saturating_sub(self.since).as_secs_f64();
        match self.mean_s() {
            Some(mean_s) if mean_s > 0.0 => gap_s.min(TIMES_MAX * mean_s),
            _ => gap_s,
        }
    }
}
