//! How fast blocks have come, by device and level: what plans reckon with.
//!
//! Upstairs:   `run` tells what it saw, `outlook` asks.
//! Downstairs: nothing. Time comes in as an argument.
//!
//! A rate is of raw bytes, from the first load of a restore to the last: reading, checking,
//! decoding and all that others took meanwhile are in it. That is what the next restore will see.
//!
//! Invariants kept here
//!   T1  A rate is finite and above zero, whatever was seen.

use std::collections::HashMap;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use kvtier_proto::Level;

use crate::metrics::Device;

/// After so many blocks what was seen before counts half.
const HALF_LIFE: f64 = 32.0;

/// What was seen of one device and level.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Rate {
    /// Raw bytes a second.
    pub bytes_s: f64,
    /// Blocks that it was seen on.
    pub blocks: u64,
}

/// All rates of the daemon.
#[derive(Debug, Default)]
pub struct Rates {
    seen: Mutex<HashMap<(Device, Level), Rate>>,
}

impl Rates {
    /// So many blocks came in this time, of so many raw bytes together.
    pub fn saw(&self, from: (Device, Level), blocks: u64, bytes: u64, took: Duration) {
        let seconds = took.as_secs_f64();
        if blocks == 0 || bytes == 0 || seconds <= 0.0 {
            return;
        }
        // Exact up to 2^53 bytes, and no rate needs more.
        #[expect(clippy::cast_precision_loss, reason = "a rate of moderate precision")]
        let (new, count) = (bytes as f64 / seconds, blocks as f64);
        let mut seen = self.seen.lock().unwrap_or_else(PoisonError::into_inner);
        let rate = seen.entry(from).or_insert(Rate {
            bytes_s: new,
            blocks: 0,
        });
        let kept = 0.5_f64.powf(count / HALF_LIFE);
        rate.bytes_s = kept * rate.bytes_s + (1.0 - kept) * new;
        rate.blocks = rate.blocks.saturating_add(blocks);
    }

    /// What was seen; `None` before anything was.
    pub fn of(&self, from: (Device, Level)) -> Option<Rate> {
        let seen = self.seen.lock().unwrap_or_else(PoisonError::into_inner);
        seen.get(&from).copied()
    }

    /// Everything that was seen, in order, for status.
    pub fn all(&self) -> Vec<((Device, Level), Rate)> {
        let seen = self.seen.lock().unwrap_or_else(PoisonError::into_inner);
        let mut all: Vec<_> = seen.iter().map(|(from, rate)| (*from, *rate)).collect();
        all.sort_by_key(|((device, level), _)| (device.number(), level.0));
        all
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const FROM: (Device, Level) = (Device::FIRST, Level::RAW);
    const SECOND: Duration = Duration::from_secs(1);

    #[test]
    fn saw_forgets_half_of_what_was_before_with_every_half_life() {
        let rates = Rates::default();
        assert_eq!(rates.of(FROM), None);
        rates.saw(FROM, 1, 1000, SECOND);
        assert_eq!(rates.of(FROM).unwrap().bytes_s, 1000.0);
        rates.saw(FROM, 32, 3000, SECOND);
        let rate = rates.of(FROM).unwrap();
        assert!((rate.bytes_s - 2000.0).abs() < 1e-6, "{rate:?}");
        assert_eq!(rate.blocks, 33);
        assert_eq!(rates.of((Device::FIRST, Level::LOSSLESS)), None);
        assert_eq!(rates.all().len(), 1);
    }

    #[test]
    fn saw_makes_no_rate_of_nothing() {
        let rates = Rates::default();
        rates.saw(FROM, 0, 1000, SECOND);
        rates.saw(FROM, 1, 0, SECOND);
        rates.saw(FROM, 1, 1000, Duration::ZERO);
        assert_eq!(rates.of(FROM), None);
        rates.saw(FROM, u64::MAX, u64::MAX, Duration::from_nanos(1));
        let rate = rates.of(FROM).unwrap();
        assert!(rate.bytes_s.is_finite() && rate.bytes_s > 0.0);
    }
}
