//! Which blocks of a device were used lately: saved to it, or read from it.
//!
//! Upstairs:   the disk thread, which is asked for blocks that are cold.
//! Downstairs: nothing. Time comes in as an argument.
//!
//! Time is cut into periods. A block is cold when it was used neither in the present period nor in
//! the one before: for at least a period, and at most for two without anybody noticing. Before the
//! daemon has run for a period nothing is known, and nothing is cold.
//!
//! Names are kept as hashes: two blocks that share one keep each other warm, and that is all.
//!
//! Invariants kept here
//!   T7  A block that was used less than a period ago is not cold.

use std::collections::HashSet;
use std::hash::{BuildHasher, RandomState};
use std::time::{Duration, Instant};

use kvtier_proto::{BlockKey, NamespaceId};

/// Most names of a period. When more blocks are used, all count as used: two periods of names take
/// at most some 36 MiB.
const NAMES_MAX: usize = 1 << 20;

#[derive(Debug, Default)]
struct Period {
    names: HashSet<u64>,
    /// Not all names are there.
    all: bool,
}

/// See the module.
#[derive(Debug)]
pub(super) struct Touched {
    hasher: RandomState,
    length: Duration,
    began: Instant,
    now: Period,
    before: Period,
}

impl Touched {
    /// Nothing is known of any time before `now`.
    pub(super) fn new(length: Duration, now: Instant) -> Self {
        let unknown = Period {
            all: true,
            ..Period::default()
        };
        Self {
            hasher: RandomState::new(),
            length,
            began: now,
            now: Period::default(),
            before: unknown,
        }
    }

    /// The block was used.
    pub(super) fn touch(&mut self, namespace: NamespaceId, key: &BlockKey, now: Instant) {
        self.move_on(now);
        if self.now.names.len() >= NAMES_MAX {
            self.now.all = true;
        } else {
            self.now.names.insert(self.name(namespace, key));
        }
    }

    /// True when the block was not used for a period.
    pub(super) fn is_cold(&mut self, namespace: NamespaceId, key: &BlockKey, now: Instant) -> bool {
        self.move_on(now);
        let name = self.name(namespace, key);
        let used = |period: &Period| period.all || period.names.contains(&name);
        !used(&self.now) && !used(&self.before)
    }

    fn name(&self, namespace: NamespaceId, key: &BlockKey) -> u64 {
        self.hasher.hash_one((namespace.0, key.as_bytes()))
    }

    fn move_on(&mut self, now: Instant) {
        let periods = now.saturating_duration_since(self.began);
        if periods < self.length {
            return;
        }
        self.before = std::mem::take(&mut self.now);
        // Nothing was used in the periods that nobody has looked at.
        if periods >= self.length.saturating_mul(2) {
            self.before = Period::default();
        }
        self.began = now;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const HOUR: Duration = Duration::from_secs(3600);
    const NS: NamespaceId = NamespaceId(1);

    fn key(number: usize) -> BlockKey {
        let mut key = [0; 32];
        key[..8].copy_from_slice(&number.to_le_bytes());
        BlockKey(key)
    }

    #[test]
    fn nothing_is_cold_before_a_whole_period_has_passed() {
        let start = Instant::now();
        let mut touched = Touched::new(HOUR, start);
        assert!(!touched.is_cold(NS, &key(1), start));
        assert!(!touched.is_cold(NS, &key(1), start + HOUR * 99 / 100));
        assert!(touched.is_cold(NS, &key(1), start + HOUR));
    }

    // Goal: T7, for uses at any time of a period.
    #[test]
    fn a_block_is_warm_for_a_period_after_its_use_and_cold_after_two() {
        for minute in 0..180 {
            let start = Instant::now();
            let mut touched = Touched::new(HOUR, start);
            let used = start + HOUR / 60 * minute;
            for before in 0..minute {
                touched.is_cold(NS, &key(9), start + HOUR / 60 * before);
            }
            touched.touch(NS, &key(1), used);
            for after in 0..60 {
                let then = used + HOUR / 60 * after;
                assert!(!touched.is_cold(NS, &key(1), then), "{minute} + {after}");
            }
            assert!(touched.is_cold(NS, &key(1), used + 2 * HOUR), "{minute}");
            assert!(touched.is_cold(NS, &key(2), used + 2 * HOUR));
        }
    }

    #[test]
    fn the_same_key_of_another_namespace_is_another_block() {
        let start = Instant::now();
        let mut touched = Touched::new(HOUR, start);
        touched.touch(NS, &key(1), start + HOUR);
        assert!(touched.is_cold(NamespaceId(2), &key(1), start + HOUR));
        assert!(!touched.is_cold(NS, &key(1), start + HOUR));
    }

    #[test]
    fn more_names_than_are_kept_count_as_all_used() {
        let start = Instant::now();
        let mut touched = Touched::new(HOUR, start);
        let later = start + HOUR;
        assert!(touched.is_cold(NS, &key(0), later));
        (0..=NAMES_MAX).for_each(|number| touched.touch(NS, &key(number), later));
        assert!(touched.now.names.len() <= NAMES_MAX);
        assert!(!touched.is_cold(NS, &key(usize::MAX), later));
    }
}
