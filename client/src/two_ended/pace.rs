//! How fast both ends go, as the engine sees it: is a block better computed or waited for?
//!
//! Upstairs:   `two_ended`.
//! Downstairs: nothing. Time comes in as an argument.
//!
//! Where the ends meet, one block decides: what the engine begins it has to finish, while the
//! daemon may bring all that is left sooner. So nothing is begun that ends later than the loads
//! that are left. The other way round, the daemon claims a block before it comes, and on a slow
//! device the engine could compute it, and those behind it, many times over meanwhile. So it takes
//! over what comes later than it would be computed. What is taken over is loaded for nothing, which
//! is why it is not done sooner.
//!
//! Until this side has seen how fast both ends are, it believes what the daemon expects. Of what it
//! saw the later blocks count more, and a wait that is longer than a block took counts as well, so
//! that a device that becomes slow is soon known to be.
//!
//! Invariants kept here
//!   W3  No block is waited for longer than a load takes on average and then the time in which it
//!       would have been computed, unless the daemon has the gate closed and this engine has not
//!       computed anything yet.

use std::time::Duration;

use tokio::time::Instant;

use super::outlook::OfBlock;

/// How long a block is taken to compute before anything is known of it.
const STEP: Duration = Duration::from_millis(20);
/// Least time that is worth a load for nothing.
const STEP_MIN: Duration = Duration::from_millis(2);
/// After so many blocks what was seen before counts half.
const HALF_LIFE: f64 = 4.0;
/// No block counts more than so many of those before it: a single pause is no rate.
const TIMES_MAX: f64 = 4.0;

/// See the module.
#[derive(Debug)]
pub(super) struct Pace {
    /// When the last block came from a device, or the restore began.
    last: Instant,
    /// Blocks that came, and the time between them, fading. Unit: seconds.
    blocks: f64,
    seconds: f64,
    /// When a block was given out, and how long the last one took.
    given: Option<Instant>,
    step: Option<Duration>,
    expected: OfBlock,
}

impl Pace {
    pub(super) fn new(now: Instant) -> Self {
        Self {
            last: now,
            blocks: 0.0,
            seconds: 0.0,
            given: None,
            step: None,
            expected: OfBlock::default(),
        }
    }

    /// What the daemon expects.
    pub(super) fn expect(&mut self, expected: OfBlock) {
        self.expected = expected;
    }

    /// A block came from a device.
    pub(super) fn came(&mut self, now: Instant) {
        let kept = 0.5_f64.powf(1.0 / HALF_LIFE);
        let gap_s = self.counted(now);
        self.blocks = kept * self.blocks + 1.0;
        self.seconds = kept * self.seconds + gap_s;
        self.last = self.last.max(now);
    }

    /// The engine begins with a block.
    pub(super) fn given(&mut self, now: Instant) {
        self.given = Some(now);
    }

    /// It is done with it.
    pub(super) fn computed(&mut self, now: Instant) {
        if let Some(given) = self.given.take() {
            self.step = Some(now.saturating_duration_since(given));
        }
    }

    /// True when a block that nobody has, the first of so many that are not here, is to be
    /// computed: that ends before all of them are loaded, as far as anything is known of loads, and
    /// the daemon lets the engine in, or does not bring them (W3).
    pub(super) fn is_worth(&self, blocks: usize, open: bool, now: Instant) -> bool {
        let load = self.seen(now).or(self.expected.load);
        let ends_first = |load| self.left(load, blocks, now) > self.step();
        (open && load.is_none_or(ends_first)) || self.is_overdue(open, now)
    }

    /// True when a block that is loading, the first of so many that are not here, is to be taken
    /// over. It comes last: the daemon loads from the back. What is only expected of loads does not
    /// count: a block in the daemon's memory is `LOADING` as well, for a moment.
    pub(super) fn is_slow(&self, blocks: usize, open: bool, now: Instant) -> bool {
        let may = open || self.step.is_some();
        let ends_first = |load| self.left(load, blocks, now) > self.step();
        may && (self.seen(now).is_some_and(ends_first) || self.is_overdue(open, now))
    }

    /// When the next block is not waited for any longer.
    pub(super) fn overdue_at(&self, open: bool) -> Option<Instant> {
        let may = open || self.step.is_some();
        let load = self
            .mean_s()
            .map_or(Duration::ZERO, Duration::from_secs_f64);
        let at = self.last.checked_add(load)?.checked_add(self.step())?;
        may.then_some(at)
    }

    fn is_overdue(&self, open: bool, now: Instant) -> bool {
        self.overdue_at(open).is_some_and(|overdue| now >= overdue)
    }

    /// Time until so many blocks are loaded, if one takes `load`.
    fn left(&self, load: Duration, blocks: usize, now: Instant) -> Duration {
        let blocks = u32::try_from(blocks).unwrap_or(u32::MAX);
        let since = now.saturating_duration_since(self.last);
        load.saturating_mul(blocks).saturating_sub(since)
    }

    /// What a block takes, as far as seen: as those that came, or longer if the next one is later
    /// than that. `None` while none has come.
    fn seen(&self, now: Instant) -> Option<Duration> {
        let mean_s = self.mean_s()?;
        let waited_s = (self.seconds + self.counted(now)) / (self.blocks + 1.0);
        Some(Duration::from_secs_f64(mean_s.max(waited_s)))
    }

    fn mean_s(&self) -> Option<f64> {
        (self.blocks > 0.0).then(|| self.seconds / self.blocks)
    }

    /// The time since the last block, as far as it counts. Unit: seconds.
    fn counted(&self, now: Instant) -> f64 {
        let gap_s = now.saturating_duration_since(self.last).as_secs_f64();
        match self.mean_s() {
            Some(mean_s) if mean_s > 0.0 => gap_s.min(TIMES_MAX * mean_s),
            _ => gap_s,
        }
    }

    /// Time to compute one block.
    fn step(&self) -> Duration {
        let known = self.step.or(self.expected.step);
        known.map_or(STEP, |step| step.max(STEP_MIN))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const fn ms(millis: u64) -> Duration {
        Duration::from_millis(millis)
    }

    /// Ten milliseconds to compute a block, as the first one took; and two that were loaded, 50
    /// milliseconds each.
    fn slow_device() -> (Pace, Instant) {
        let begin = Instant::now();
        let mut pace = Pace::new(begin);
        pace.given(begin);
        pace.computed(begin + ms(10));
        pace.came(begin + ms(50));
        pace.came(begin + ms(100));
        (pace, begin + ms(100))
    }

    #[test]
    fn is_slow_says_so_while_computing_ends_before_the_last_load_is_expected_to() {
        let (pace, last) = slow_device();
        assert!(pace.is_slow(2, true, last + ms(89)));
        assert!(!pace.is_slow(1, true, last + ms(41)));
        assert!(pace.is_slow(1, true, last + ms(39)));
    }

    #[test]
    fn is_slow_says_so_when_a_block_is_later_than_it_would_have_been_computed() {
        let (pace, last) = slow_device();
        assert_eq!(pace.overdue_at(true), Some(last + ms(60)));
        assert!(!pace.is_slow(1, true, last + ms(59)));
        assert!(pace.is_slow(1, true, last + ms(60)));
    }

    // Goal: the engine does not begin a block when the daemon brings all that is left sooner.
    #[test]
    fn is_worth_says_no_when_the_rest_is_loaded_before_one_block_is_computed() {
        let begin = Instant::now();
        let mut pace = Pace::new(begin);
        assert!(pace.is_worth(1, true, begin), "nothing is known of loads");
        pace.given(begin);
        pace.computed(begin + ms(30));
        (1..=10).for_each(|block| pace.came(begin + ms(4 * block)));
        let now = begin + ms(41);
        assert!(pace.is_worth(8, true, now));
        assert!(!pace.is_worth(7, true, now));
        let overdue = pace.overdue_at(true).unwrap();
        assert_eq!(overdue, begin + ms(40 + 4 + 30));
        assert!(pace.is_worth(7, true, overdue), "the loads have stopped");
        assert!(!pace.is_worth(8, false, now), "the daemon brings them");
        assert!(pace.is_worth(7, false, overdue), "it does not");
    }

    // Goal: what a device was does not keep the engine from computing when it has become slow.
    #[test]
    fn is_worth_learns_soon_that_a_device_has_become_slow_and_takes_a_pause_for_none() {
        let begin = Instant::now();
        let mut pace = Pace::new(begin);
        pace.given(begin);
        pace.computed(begin + ms(100));
        (1..=40).for_each(|block| pace.came(begin + ms(4 * block)));
        let pause = begin + ms(160 + 80);
        pace.came(pause);
        assert!(!pace.is_worth(12, true, pause), "one pause");
        assert!(pace.is_worth(40, true, pause));
        (1..=6).for_each(|block| pace.came(pause + ms(40 * block)));
        assert!(pace.is_worth(5, true, pause + ms(240)), "40 ms a block");
    }

    #[test]
    fn expect_counts_until_a_block_was_computed_and_another_one_loaded() {
        let begin = Instant::now();
        let mut pace = Pace::new(begin);
        pace.expect(OfBlock {
            step: Some(ms(50)),
            load: Some(ms(10)),
        });
        assert!(pace.is_worth(6, true, begin) && !pace.is_worth(5, true, begin));
        assert!(!pace.is_slow(6, true, begin), "it may be in memory");
        assert_eq!(pace.overdue_at(true), Some(begin + ms(50)));
        pace.given(begin);
        pace.computed(begin + ms(20));
        assert_eq!(pace.overdue_at(true), Some(begin + ms(20)));
        pace.came(begin + ms(40));
        assert_eq!(pace.overdue_at(true), Some(begin + ms(100)));
        assert!(pace.is_slow(1, true, begin + ms(59)));
    }

    #[test]
    fn is_slow_leaves_it_to_the_gate_when_nothing_was_computed_yet() {
        let begin = Instant::now();
        let pace = Pace::new(begin);
        assert!(!pace.is_slow(2, false, begin + ms(10_000)));
        assert_eq!(pace.overdue_at(false), None);
        assert!(!pace.is_slow(2, true, begin + ms(19)));
        assert!(pace.is_slow(2, true, begin + ms(20)));
    }
}
