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
//! Until this side has seen how fast both ends are, it believes what the daemon expects.
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

/// See the module.
#[derive(Debug)]
pub(super) struct Pace {
    begin: Instant,
    /// Blocks that came from a device, and when the last of them did.
    came: u32,
    last: Instant,
    /// When a block was given out, and how long the last one took.
    given: Option<Instant>,
    step: Option<Duration>,
    expected: OfBlock,
}

impl Pace {
    pub(super) fn new(now: Instant) -> Self {
        Self {
            begin: now,
            came: 0,
            last: now,
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
        self.came = self.came.saturating_add(1);
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
        let load = self.seen().or(self.expected.load);
        let ends_first = |load| self.left(load, blocks, now) > self.step();
        (open && load.is_none_or(ends_first)) || self.is_overdue(open, now)
    }

    /// True when a block that is loading, the first of so many that are not here, is to be taken
    /// over. It comes last: the daemon loads from the back. What is only expected of loads does not
    /// count: a block in the daemon's memory is `LOADING` as well, for a moment.
    pub(super) fn is_slow(&self, blocks: usize, open: bool, now: Instant) -> bool {
        let may = open || self.step.is_some();
        let ends_first = |load| self.left(load, blocks, now) > self.step();
        may && (self.seen().is_some_and(ends_first) || self.is_overdue(open, now))
    }

    /// When the next block is not waited for any longer.
    pub(super) fn overdue_at(&self, open: bool) -> Option<Instant> {
        let may = open || self.step.is_some();
        let load = self.seen().unwrap_or_default();
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

    /// What a block took that came; `None` while none has.
    fn seen(&self) -> Option<Duration> {
        let spent = self.last.saturating_duration_since(self.begin);
        spent.checked_div(self.came)
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
