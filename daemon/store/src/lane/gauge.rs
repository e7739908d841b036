//! What the device does: how many bytes a second, how long an operation takes, and whether that
//! is much longer than it used to be.
//!
//! Upstairs:   `lane` tells what it sent and what came back; the rate is for `pace`, the verdict
//!             for the store's state.
//! Downstairs: nothing. Time comes in as an argument.
//!
//! An operation's own time is its share of the time it took, beside all that was in flight when it
//! went: a long queue is no slow device. An operation counts there with its bytes and what a device
//! does besides moving them, as much as 64 KiB take. For each kind and class of length there is a
//! moving mean of that and a baseline, a slowly moving median of the time before. A device is slow
//! when the mean of some kind is many times its baseline and an operation takes long enough to
//! matter, or when a single operation's own time is above a second on average, or when one does not
//! come back in that time, or when none of all that are in flight has come back for two. It is well
//! again when the mean has been near its baseline for a while, or when nothing of that kind has
//! been asked for long.
//!
//! Not here on purpose: no action. What a slow device means, its readers decide.

use std::collections::BTreeMap;
use std::time::Duration;

use crate::disk::OpKind;

use super::pace::{Class, time_of};

/// Rate of a device that has shown nothing yet. Unit: bytes a second.
const RATE_UNKNOWN: u64 = 256 << 20;
/// Bytes of one measurement of the rate.
const RATE_BYTES: u64 = 16 << 20;
/// A lower measurement moves the rate down by one part in this many.
const RATE_FALL: u64 = 256;
/// The mean moves by one part in this many with each operation.
const MEAN_PART: u64 = 8;
/// The baseline moves by one part in this many.
const BASE_PART: u64 = 128;
/// Operations that make the first baseline.
const WARM: u64 = 16;
/// Slow: the mean is more than this many times the baseline ...
const SLOW_TIMES: u64 = 8;
/// ... and operations take this long, waiting for each other included.
const SLOW_FROM: Duration = Duration::from_millis(100);
/// Slow whatever the baseline says: an operation's own time on average, or the time for which one
/// has not come back.
const SLOW_SURELY: Duration = Duration::from_secs(1);
/// Slow however much is in flight: nothing has come back for this long.
const STANDSTILL: Duration = Duration::from_secs(2);
/// Well again: the mean is at most this many times the baseline ...
const WELL_TIMES: u64 = 3;
/// ... for so many operations in a row.
const WELL_AFTER: u32 = 32;
/// A kind of operation that was not asked for this long says nothing any more.
const SILENCE: Duration = Duration::from_secs(30);

/// An operation that is with the device.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Sent {
    pub(crate) class: Class,
    pub(crate) bytes: u64,
    kind: OpKind,
    at: Duration,
    /// Operations in flight when it went, itself included, and their weight.
    beside: u64,
    weight: u64,
}

/// Why a device counts as slow.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Slow {
    /// What takes long: `read_small`, `read_large`, `write_small`, `write_large` or `sync`.
    pub(crate) what: &'static str,
    /// An operation's own time now, and what it was before. Unit: microseconds.
    pub(crate) mean_us: u64,
    pub(crate) baseline_us: u64,
}

/// Operations of one kind and class of length. All times in nanoseconds.
#[derive(Debug, Clone, Copy, Default)]
struct Track {
    samples: u64,
    mean: u64,
    mean_taken: u64,
    baseline: u64,
    slow: bool,
    well: u32,
    last: Duration,
}

/// What an operation weighs besides its bytes. Unit: bytes.
const OP_WEIGHT: u64 = 64 << 10;

const TRACKS: [&str; 5] = [
    "read_small",
    "read_large",
    "write_small",
    "write_large",
    "sync",
];
/// Longest small operation. Unit: bytes.
const SMALL: u64 = 256 << 10;

/// See the module.
#[derive(Debug)]
pub(crate) struct Gauge {
    flying: BTreeMap<u64, Sent>,
    /// Weight of everything in flight.
    weight: u64,
    tracks: [Track; TRACKS.len()],
    rate: u64,
    /// When the last operation came back, or the first of those in flight went; and the time with
    /// something in flight before.
    busy_since: Duration,
    busy: Duration,
    moved: u64,
}

impl Default for Gauge {
    fn default() -> Self {
        Self {
            flying: BTreeMap::new(),
            weight: 0,
            tracks: [Track::default(); TRACKS.len()],
            rate: RATE_UNKNOWN,
            busy_since: Duration::ZERO,
            busy: Duration::ZERO,
            moved: 0,
        }
    }
}

impl Gauge {
    /// What the device has shown that it can move. Unit: bytes a second.
    pub(crate) fn rate(&self) -> u64 {
        self.rate
    }

    /// Time of the device that an operation takes from others: what its bytes take, or what an
    /// operation like it has taken, whichever is longer.
    pub(crate) fn cost(&self, kind: OpKind, bytes: u64) -> Duration {
        let like_it = self.tracks.get(track_of(kind, bytes));
        let before = like_it.map_or(0, |track| track.baseline);
        time_of(bytes, self.rate).max(Duration::from_nanos(before))
    }

    /// Operation `user` went to the device.
    pub(crate) fn sent(
        &mut self,
        user: u64,
        (class, kind, bytes): (Class, OpKind, u64),
        now: Duration,
    ) {
        if self.flying.is_empty() {
            self.busy_since = now;
        }
        let beside = self.flying.len() as u64 + 1;
        self.weight += bytes + OP_WEIGHT;
        let sent = Sent {
            class,
            bytes,
            kind,
            at: now,
            beside,
            weight: self.weight,
        };
        self.flying.insert(user, sent);
    }

    /// Operation `user` came back. `good` when it did what was asked.
    pub(crate) fn back(&mut self, user: u64, good: bool, now: Duration) -> Option<Sent> {
        let sent = self.flying.remove(&user)?;
        self.weight = self.weight.saturating_sub(sent.bytes + OP_WEIGHT);
        self.busy += now.saturating_sub(self.busy_since);
        self.busy_since = now;
        if good {
            self.moved += sent.bytes;
            let track = self.tracks.get_mut(track_of(sent.kind, sent.bytes));
            if let Some(track) = track {
                let taken = now.saturating_sub(sent.at);
                track.note(nanos(taken), nanos(sent.own(taken)), now);
            }
        }
        if self.moved >= RATE_BYTES && !self.busy.is_zero() {
            let measured = u128::from(self.moved) * 1_000_000_000 / self.busy.as_nanos();
            let measured = u64::try_from(measured).unwrap_or(u64::MAX);
            self.rate = measured.max(self.rate - self.rate / RATE_FALL);
            (self.moved, self.busy) = (0, Duration::ZERO);
        }
        Some(sent)
    }

    /// Whether the device is slow now, and what shows it.
    pub(crate) fn slow(&mut self, now: Duration) -> Option<Slow> {
        let mut worst: Option<Slow> = None;
        for (track, what) in self.tracks.iter_mut().zip(TRACKS) {
            if track.slow && now.saturating_sub(track.last) > SILENCE {
                (track.slow, track.mean, track.well) = (false, track.baseline, 0);
            }
            if track.slow && worst.is_none_or(|worst| worst.mean_us < track.mean / 1000) {
                let (mean_us, baseline_us) = (track.mean / 1000, track.baseline / 1000);
                worst = Some(Slow {
                    what,
                    mean_us,
                    baseline_us,
                });
            }
        }
        worst.or_else(|| self.stuck(now))
    }

    /// When the verdict may change though nothing comes back.
    pub(crate) fn look_again(&self, now: Duration) -> Option<Duration> {
        let silent = self
            .tracks
            .iter()
            .filter(|track| track.slow)
            .map(|track| track.last + SILENCE);
        let first = self.flying.values().next();
        let stuck = first.map(|sent| sent.stuck_at().min(self.busy_since + STANDSTILL));
        silent
            .chain(stuck)
            .filter(|at| *at >= now)
            .min()
            .map(|at| at + Duration::from_millis(1))
    }

    /// The operation that has been away for too long. The one that was begun first stands for
    /// all: another is found when that has come back.
    fn stuck(&self, now: Duration) -> Option<Slow> {
        let sent = self.flying.values().next()?;
        let quiet = now.saturating_sub(self.busy_since);
        let mean = match quiet > STANDSTILL {
            true => nanos(quiet),
            false if now > sent.stuck_at() => nanos(now.saturating_sub(sent.at)) / sent.beside,
            false => return None,
        };
        let at = track_of(sent.kind, sent.bytes);
        Some(Slow {
            what: TRACKS.get(at).copied().unwrap_or_default(),
            mean_us: mean / 1000,
            baseline_us: self.tracks.get(at).map_or(0, |track| track.baseline / 1000),
        })
    }
}

impl Sent {
    /// Its share of the time that it took.
    fn own(&self, taken: Duration) -> Duration {
        let share = u128::from(self.bytes + OP_WEIGHT);
        let own = taken.as_nanos() * share / u128::from(self.weight.max(1));
        Duration::from_nanos(u64::try_from(own).unwrap_or(u64::MAX))
    }

    fn stuck_at(&self) -> Duration {
        self.at + SLOW_SURELY.saturating_mul(u32::try_from(self.beside).unwrap_or(u32::MAX))
    }
}

impl Track {
    fn note(&mut self, taken: u64, own: u64, now: Duration) {
        self.last = now;
        self.samples += 1;
        if self.samples <= WARM {
            let before = self.samples - 1;
            self.baseline = (self.baseline * before + own) / self.samples;
            (self.mean, self.mean_taken) = (self.baseline, taken);
            self.slow = self.mean > nanos(SLOW_SURELY);
            return;
        }
        self.mean = self.mean - self.mean / MEAN_PART + own / MEAN_PART;
        self.mean_taken = self.mean_taken - self.mean_taken / MEAN_PART + taken / MEAN_PART;
        if self.slow {
            // A baseline that followed would make every device well in the end.
            let near =
                self.mean <= self.baseline * WELL_TIMES || self.mean_taken < nanos(SLOW_FROM) / 2;
            self.well = if near { self.well + 1 } else { 0 };
            self.slow = self.well < WELL_AFTER;
            return;
        }
        let step = self.baseline / BASE_PART;
        self.baseline = match own > self.baseline {
            true => self.baseline + step + 1,
            false => self.baseline - step,
        };
        let longer = self.mean > self.baseline * SLOW_TIMES && self.mean_taken > nanos(SLOW_FROM);
        self.slow = longer || self.mean > nanos(SLOW_SURELY);
        self.well = 0;
    }
}

fn track_of(kind: OpKind, bytes: u64) -> usize {
    match (kind, bytes <= SMALL) {
        (OpKind::Read, true) => 0,
        (OpKind::Read, false) => 1,
        (OpKind::Write, true) => 2,
        (OpKind::Write, false) => 3,
        (OpKind::Sync, _) => 4,
    }
}

fn nanos(time: Duration) -> u64 {
    u64::try_from(time.as_nanos()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests;
