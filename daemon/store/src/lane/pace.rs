//! Which class of work may use the device now: reads first, and a share for everybody else.
//!
//! Upstairs:   `lane` asks before it hands an operation to the device, and tells what came back.
//! Downstairs: nothing. Time comes in as an argument.
//!
//! ```text
//!   reads              go at once, always
//!   saves      alone:  a window of bytes in flight, worth 5 ms of the device's time,
//!                      and at least 8 MiB
//!              beside reads:  an eighth of the device's time, in pieces
//!   background alone:  the same window
//!              beside saves: an eighth of its time;  beside reads: 4 MiB a second, in pieces
//! ```
//! A small operation takes a device longer than its bytes say, so shares are shares of time: what
//! an operation of that kind took before. Background work beside reads is a trickle and no share:
//! hardly one read in a hundred may meet a piece of it, or a reader's p99 would show it.
//!
//! A class counts as present while it has work, and for a moment after it: a restore that asks
//! for one batch after the other is not idle in between.
//!
//! A rate alone would starve a class when the device is slower than it was, and a share of what is
//! in flight alone would let it all in when the reader pauses: so there are both. A piece goes
//! when its time has come and the class has less in flight than its share of the reads' bytes. A
//! class has that share of the places in the device's queue too, however many reads wait for one.
//!
//! Invariants kept here
//!   F1  A read is never held, but by an operator's limit (`throttle`).
//!   F2  A class that has work and nothing in flight is let in after the time that one piece
//!       takes at its share, and never later than 4 MiB a second would have it: nobody starves.
//!   F3  A class that is alone is held by its window only: the device is never idle for its sake.
//!
//! Not here on purpose: no order within a class, and no deadline.

use std::time::Duration;

use crate::format::{BLOCK, index};

/// Whose work a transfer is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Class {
    /// Somebody waits: reads, and the few blocks of opening, wiping and closing.
    Read,
    /// Records on their way to the device.
    Save,
    /// Nobody waits: scrub, and reads of pinned records that move.
    Background,
}

impl Class {
    /// Every class, those that can be held first.
    pub(super) const ALL: [Self; 3] = [Self::Save, Self::Background, Self::Read];
}

/// Longest operation of a held class beside a more urgent one. Unit: bytes, a multiple of 4096.
/// Tests have records of a few KiB, and pieces that are smaller still.
pub(crate) const PIECE: usize = if cfg!(test) { 8 << 10 } else { 128 << 10 };
/// How much of the device's time may be in flight for a class that is alone: enough to keep it
/// busy, and all that a read which comes then has to wait for.
const WINDOW_TIME: Duration = Duration::from_millis(5);
/// Least window. Unit: bytes. Two large records.
const WINDOW_MIN: u64 = 8 << 20;
/// Longest operation of a held class that is alone: records may be as long as a segment.
/// Unit: bytes, a multiple of 4096.
const ALONE: usize = 8 << 20;
/// Least room in the window for another operation: what merging makes. A window that was filled to
/// the last byte would cut large records into crumbs. Unit: bytes.
const ROOM_MIN: u64 = 2 << 20;
/// A class without work counts as present for this long. A simulated device has done a hundred
/// operations by then: in tests it is the time of four.
const LINGER: Duration = Duration::from_micros(if cfg!(test) { 200 } else { 10_000 });
/// Pieces that were late may catch up this much.
const CATCH_UP: Duration = Duration::from_millis(2);
/// Share of saves beside reads, and of background beside saves: one part in this many.
pub(crate) const ONE_IN: u64 = 8;
/// Least rate of a held class, and the rate of background beside reads. Unit: bytes a second.
pub(crate) const RATE_MIN: u64 = 4 << 20;

/// What a class may do now.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Turn {
    /// One operation of at most so many bytes.
    Go(usize),
    /// Nothing until something of it comes back.
    Full,
    /// Nothing before this moment.
    At(Duration),
}

/// What of the device a class gets.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Share {
    /// As much as it can use.
    All,
    /// One part in so many of its time.
    OneIn(u64),
    /// [`RATE_MIN`].
    Trickle,
}

#[derive(Debug, Clone, Copy, Default)]
struct Load {
    /// Transfers that were begun and have not ended.
    open: u64,
    /// Bytes and operations that are with the device.
    flying: u64,
    ops: usize,
    /// When it last had work.
    last: Option<Duration>,
    /// When its next piece is due.
    next: Duration,
}

/// See the module.
#[derive(Debug, Default)]
pub(crate) struct Pace {
    reads: Load,
    saves: Load,
    background: Load,
    /// Nobody is held: for tests of what happens then.
    #[cfg(test)]
    pub(super) off: bool,
}

impl Pace {
    /// A transfer of `class` waits from now on.
    pub(crate) fn begin(&mut self, class: Class) {
        self.load_mut(class).open += 1;
    }

    /// A transfer of `class` came to its end.
    pub(crate) fn end(&mut self, class: Class, now: Duration) {
        let load = self.load_mut(class);
        load.open = load.open.saturating_sub(1);
        load.last = Some(now);
    }

    /// What `class` may hand to a device that moves `rate` bytes a second.
    pub(crate) fn turn(&self, class: Class, now: Duration, rate: u64) -> Turn {
        #[cfg(test)]
        if self.off {
            return Turn::Go(usize::MAX);
        }
        let load = self.load(class);
        match self.share(class, now) {
            Share::All if class == Class::Read => Turn::Go(usize::MAX),
            Share::All => match window(rate).saturating_sub(load.flying) {
                room if room < ROOM_MIN => Turn::Full,
                room => Turn::Go(ALONE.min(index(room - room % BLOCK))),
            },
            _ if load.next > now => Turn::At(load.next),
            Share::Trickle if load.flying > 0 => Turn::Full,
            Share::Trickle => Turn::Go(PIECE),
            Share::OneIn(one_in) => {
                let others = self.reads.flying.max(match class {
                    Class::Background => self.saves.flying,
                    Class::Read | Class::Save => 0,
                });
                match load.flying > 0 && load.flying + PIECE as u64 > others / one_in {
                    true => Turn::Full,
                    false => Turn::Go(PIECE),
                }
            }
        }
    }

    /// An operation of `bytes` of `class` went to the device, which will need `cost` for it.
    pub(crate) fn sent(&mut self, class: Class, bytes: u64, now: Duration, cost: Duration) {
        let share = self.share(class, now);
        let load = self.load_mut(class);
        load.flying += bytes;
        load.ops += 1;
        let longest = time_of(bytes, RATE_MIN);
        let pause = match share {
            Share::All => return,
            Share::Trickle => longest,
            Share::OneIn(one_in) => {
                let part = u32::try_from(one_in).unwrap_or(u32::MAX);
                cost.saturating_mul(part).min(longest)
            }
        };
        load.next = load.next.max(now.saturating_sub(CATCH_UP)) + pause;
    }

    /// Operations of `class` that are with the device.
    pub(crate) fn ops(&self, class: Class) -> usize {
        self.load(class).ops
    }

    /// An operation of `bytes` of `class` came back, moved or not.
    pub(crate) fn back(&mut self, class: Class, bytes: u64) {
        let load = self.load_mut(class);
        load.flying = load.flying.saturating_sub(bytes);
        load.ops = load.ops.saturating_sub(1);
    }

    fn share(&self, class: Class, now: Duration) -> Share {
        let reads = is_present(&self.reads, now);
        match class {
            Class::Save if reads => Share::OneIn(ONE_IN),
            Class::Background if reads => Share::Trickle,
            Class::Background if is_present(&self.saves, now) => Share::OneIn(ONE_IN),
            Class::Read | Class::Save | Class::Background => Share::All,
        }
    }

    fn load(&self, class: Class) -> &Load {
        match class {
            Class::Read => &self.reads,
            Class::Save => &self.saves,
            Class::Background => &self.background,
        }
    }

    fn load_mut(&mut self, class: Class) -> &mut Load {
        match class {
            Class::Read => &mut self.reads,
            Class::Save => &mut self.saves,
            Class::Background => &mut self.background,
        }
    }
}

/// Bytes that a class which is alone may have in flight.
pub(crate) fn window(rate: u64) -> u64 {
    let worth = u128::from(rate) * WINDOW_TIME.as_nanos() / 1_000_000_000;
    u64::try_from(worth).unwrap_or(u64::MAX).max(WINDOW_MIN)
}

fn is_present(load: &Load, now: Duration) -> bool {
    load.open > 0 || load.last.is_some_and(|last| now < last + LINGER)
}

/// Time that `bytes` take at `rate` bytes a second.
pub(super) fn time_of(bytes: u64, rate: u64) -> Duration {
    let nanos = u128::from(bytes) * 1_000_000_000 / u128::from(rate.max(1));
    Duration::from_nanos(u64::try_from(nanos).unwrap_or(u64::MAX))
}

#[cfg(test)]
mod tests;
