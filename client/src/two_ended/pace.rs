//! How fast both ends go, as the engine sees it: is a block that is loading worth waiting for?
//!
//! Upstairs:   `two_ended`.
//! Downstairs: nothing. Time comes in as an argument.
//!
//! The daemon claims a block before it comes, and on a slow device the engine could compute it, and
//! those behind it, many times over meanwhile. So it takes over what comes later than it would be
//! computed. What is taken over is loaded for nothing, which is why it is not done sooner.
//!
//! Invariants kept here
//!   W3  No block is waited for longer than a load takes on average and then the time in which it
//!       would have been computed, unless the daemon has the gate closed and this engine has not
//!       computed anything yet.

use std::time::Duration;

use tokio::time::Instant;

/// How long a block is taken to compute before one was.
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
}

impl Pace {
    pub(super) fn new(now: Instant) -> Self {
        Self {
            begin: now,
            came: 0,
            last: now,
            given: None,
            step: None,
        }
    }

    /// A block came from a device.
    pub(super) fn came(&mut self, now: Instant) {
        self.came = self.came.saturating_add(1);
        self.last = now;
    }

    /// The engine begins with a block.
    pub(super) fn given(&mut self, now: Instant) {
        self.given = Some(now);
    }

    /// It is done with it.
    pub(super) fn computed(&mut self, now: Instant) {
        if let Some(given) = self.given.take() {
            self.step = Some(now.saturating_duration_since(given).max(STEP_MIN));
        }
    }

    /// True when computing the first of so many loading blocks ends before the last load of them
    /// is expected to. The first comes last: the daemon loads from the back.
    pub(super) fn is_slow(&self, loading: usize, open: bool, now: Instant) -> bool {
        let Some(overdue) = self.overdue_at(open) else {
            return false;
        };
        let loading = u32::try_from(loading).unwrap_or(u32::MAX);
        let expected = self.mean().saturating_mul(loading);
        let left = expected.saturating_sub(now.saturating_duration_since(self.last));
        now >= overdue || left > self.step.unwrap_or(STEP)
    }

    /// When a block that is loading is not waited for any longer.
    pub(super) fn overdue_at(&self, open: bool) -> Option<Instant> {
        let step = self.step.or(open.then_some(STEP))?;
        self.last.checked_add(self.mean())?.checked_add(step)
    }

    /// Time of one block; zero while none has come.
    fn mean(&self) -> Duration {
        let spent = self.last.saturating_duration_since(self.begin);
        spent.checked_div(self.came).unwrap_or_default()
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
