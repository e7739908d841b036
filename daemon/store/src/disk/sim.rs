//! A simulated device under a seed: it reorders, tears, loses, misdirects and lies, on request.
//!
//! Upstairs:   the store's tests and the simulation in `tests/`.
//! Downstairs: vectors.
//!
//! Completions come in seeded order. Every fault has a probability in [`Faults`] and a counter in
//! [`Fired`] that proves it happened. [`SimDisk::crash`] makes the disk that is found after a
//! power cut: durable bytes, plus any subset of the writes that no sync covered, each perhaps
//! torn at 512 or 4096 bytes; [`SimDisk::crash_with`] makes any one of them. The same seed and
//! the same calls give the same run.
//!
//! Time is the disk's own: each operation takes as long as its bytes do, one after the other in the
//! order in which they finish, and a wait that ends in time lets that time pass. A slow operation
//! is one that others overtake, and that much time has passed when it ends.
//!
//! Not here on purpose: no model of a device. The time is there so that what is decided by time can
//! be tested, not to predict any.

mod after;
mod content;
mod faults;
mod options;
mod seeded;

pub use content::Fate;
pub use faults::{Fault, Faults, Fired};
pub use options::SimOptions;
pub use seeded::Seeded;

use content::{File, Loose, fill_runs, flip, loose_of, overlay, survive, tear};

use std::collections::BTreeMap;
use std::io::{Error, ErrorKind};
use std::sync::Arc;
use std::time::Duration;

use super::{Disk, Done, FileId, Found, Op, OpKind, SubmitError, Wait, Waker};
use crate::format::index;

/// Most calls and operations that overtake a slow read; a slow write or sync is overtaken by a
/// twentieth of that, so that a whole segment can be written while a read waits.
const OVERTAKEN_MAX: u64 = 1000;
/// Time that an operation takes, and time that its bytes take.
const OP_TIME: Duration = Duration::from_micros(50);
const BYTES_PER_MICROSECOND: u64 = 2000;
/// Time between two looks at the device.
const LOOK_TIME: Duration = Duration::from_micros(1);
/// Least and most time that a slow operation takes. Unit: milliseconds.
const SLOW_MS: std::ops::Range<u64> = 200..2000;

#[derive(Debug)]
struct Flying {
    op: Op,
    /// For a sync: how many loose writes of the file it covers.
    covers: usize,
    /// Others overtake it until so many calls and operations were taken.
    until: u64,
    /// It does not end before this moment.
    not_before: Duration,
}

/// The simulated device.
#[derive(Debug)]
pub struct SimDisk {
    options: SimOptions,
    random: Seeded,
    files: BTreeMap<u32, File>,
    next_file: u32,
    flying: Vec<Flying>,
    taken: u64,
    now: Duration,
    crashed: bool,
    dead: bool,
    good_syncs: Option<u64>,
    fired: Fired,
    reordered: u64,
}

impl SimDisk {
    /// An empty disk.
    pub fn new(options: SimOptions) -> Self {
        Self {
            random: Seeded::new(options.seed),
            files: BTreeMap::new(),
            next_file: 1,
            flying: Vec::new(),
            taken: 0,
            now: Duration::ZERO,
            crashed: false,
            dead: false,
            good_syncs: None,
            fired: Fired::default(),
            reordered: 0,
            options,
        }
    }

    /// How often each fault happened.
    pub fn fired(&self) -> &Fired {
        &self.fired
    }

    /// Operations that ended before one that was submitted earlier.
    pub fn reordered(&self) -> u64 {
        self.reordered
    }

    /// Calls and operations taken so far: the points at which a crash can be placed.
    pub fn taken(&self) -> u64 {
        self.taken
    }

    /// True when the power went ([`SimOptions::crash_at`]).
    pub fn has_crashed(&self) -> bool {
        self.crashed
    }

    /// The lane fails: what is in flight comes back without its buffer, nothing is taken.
    pub fn die(&mut self) {
        self.dead = true;
    }

    /// The next `good` syncs are as the faults say; the one behind them fails.
    pub fn fail_sync_after(&mut self, good: u64) {
        self.good_syncs = Some(good);
    }

    /// Changes the probabilities from now on.
    pub fn set_faults(&mut self, faults: Faults) {
        self.options.faults = faults;
    }

    /// Lets time pass.
    pub fn pass(&mut self, time: Duration) {
        self.now += time;
    }

    /// Changes the room for files from now on. Unit: bytes.
    pub fn set_space(&mut self, space: u64) {
        self.options.space = space;
    }

    /// Content of a file, for tests that look or scribble. `None` when there is no such file.
    pub fn content(&mut self, name: &str) -> Option<&mut Vec<u8>> {
        self.files
            .values_mut()
            .find(|file| file.name == name)
            .map(|file| Arc::make_mut(&mut file.now))
    }

    /// Makes `name` hold `bytes`, durably, as another process could have.
    pub fn plant(&mut self, name: &str, bytes: Vec<u8>) {
        let number = self.number_of(name).unwrap_or_else(|| self.take_number());
        let now = Arc::new(bytes);
        let durable = Arc::clone(&now);
        self.files.insert(
            number,
            File {
                name: name.to_owned(),
                now,
                durable,
                ..File::default()
            },
        );
    }

    fn number_of(&self, name: &str) -> Option<u32> {
        self.files
            .iter()
            .find(|(_, file)| file.name == name)
            .map(|(number, _)| *number)
    }

    fn take_number(&mut self) -> u32 {
        self.next_file += 1;
        self.next_file - 1
    }

    /// Counts a call; false when the power is gone.
    fn take(&mut self) -> bool {
        self.taken += 1;
        self.crashed |= self.options.crash_at.is_some_and(|at| self.taken > at);
        !self.crashed
    }

    fn fault(&mut self, fault: Fault) -> bool {
        let fires = self.random.chance(self.options.faults.per_million(fault));
        if fires {
            self.fired.count(fault);
        }
        fires
    }

    fn finish(&mut self, flying: Flying) -> Done {
        let Flying {
            mut op,
            covers,
            not_before,
            ..
        } = flying;
        let bytes = Duration::from_micros(op.total() as u64 / BYTES_PER_MICROSECOND);
        self.now = not_before.max(self.now + OP_TIME + bytes);
        let moved = if self.crashed {
            Err(Error::other("the power is gone"))
        } else if self.fault(Fault::Interrupted) {
            Err(Error::from(ErrorKind::Interrupted))
        } else {
            match op.kind {
                OpKind::Read => self.read(&mut op),
                OpKind::Write => self.write(&op),
                OpKind::Sync => self.sync(op.file, covers),
            }
        };
        op.done(moved)
    }

    /// Length that an operation moves: all of it, or less when the short fault fires.
    fn moved_len(&mut self, len: usize) -> usize {
        let blocks = (len / self.options.align) as u64;
        if blocks > 1 && self.fault(Fault::Short) {
            index(1 + self.random.below(blocks - 1)) * self.options.align
        } else {
            len
        }
    }

    fn read(&mut self, op: &mut Op) -> std::io::Result<usize> {
        if self.fault(Fault::ReadError) {
            return Err(Error::from_raw_os_error(5));
        }
        let len = self.moved_len(op.total());
        let mut at = op.at;
        if self.fault(Fault::MisdirectedRead) {
            at = self.elsewhere(op.file, op.at, len);
        }
        let stale = self.fault(Fault::StaleRead);
        let file = self
            .files
            .get(&op.file.0)
            .ok_or(Error::from(ErrorKind::NotFound))?;
        let from = index(at).min(file.now.len());
        let to = (from + len).min(file.now.len());
        let mut bytes = file.now.get(from..to).unwrap_or_default().to_vec();
        if let Some(before) = file.before.as_ref().filter(|_| stale) {
            overlay(&mut bytes, at, before);
        }
        if !bytes.is_empty() && self.fault(Fault::FlipOnRead) {
            flip(&mut bytes, &mut self.random);
        }
        fill_runs(op, &bytes).ok_or(Error::from(ErrorKind::InvalidInput))?;
        Ok(bytes.len())
    }

    fn write(&mut self, op: &Op) -> std::io::Result<usize> {
        if self.fault(Fault::WriteError) {
            return Err(Error::from_raw_os_error(5));
        }
        let len = self.moved_len(op.total());
        let mut write = loose_of(op, op.file.0).ok_or(Error::from(ErrorKind::InvalidInput))?;
        write.data.truncate(len);
        if self.fault(Fault::LostWrite) {
            return Ok(len);
        }
        if self.fault(Fault::MisdirectedWrite) {
            write.at = self.elsewhere(op.file, op.at, len);
        }
        if self.fault(Fault::FlipOnWrite) {
            flip(&mut write.data, &mut self.random);
        }
        let torn = match (self.fault(Fault::TornSectors), self.fault(Fault::TornPages)) {
            (true, _) => Some(512),
            (false, true) => Some(4096),
            (false, false) => None,
        };
        let mut random = self.random.clone();
        let file = self
            .files
            .get_mut(&op.file.0)
            .ok_or(Error::from(ErrorKind::NotFound))?;
        let from = index(write.at);
        let room = file
            .now
            .get(from..from + len)
            .ok_or(Error::from_raw_os_error(27))?;
        file.before = Some(Loose {
            at: write.at,
            data: room.to_vec(),
        });
        if let Some(sector) = torn {
            let mut bytes = file.now.to_vec();
            tear(&mut bytes, &write, sector, &mut random);
            write.data = bytes.get(from..from + len).unwrap_or_default().to_vec();
        }
        overlay(Arc::make_mut(&mut file.now).as_mut_slice(), 0, &write);
        file.loose.push(write);
        self.random.draw();
        Ok(len)
    }

    /// A failed sync drops what it covered: each write may or may not be on the device, and the
    /// next sync will not tell (Rebello et al. 2020).
    fn sync(&mut self, file: FileId, covers: usize) -> std::io::Result<usize> {
        let due = self.good_syncs == Some(0);
        self.good_syncs = self.good_syncs.and_then(|good| good.checked_sub(1));
        let fails = self.fault(Fault::SyncError) || due;
        let mut random = self.random.clone();
        self.random.draw();
        let file = self
            .files
            .get_mut(&file.0)
            .ok_or(Error::from(ErrorKind::NotFound))?;
        let covered = file
            .loose
            .drain(..covers.min(file.loose.len()))
            .collect::<Vec<_>>();
        for write in covered {
            let fate = if fails {
                Fate::some(&mut random)
            } else {
                Fate::Whole
            };
            survive(&mut file.durable, &write, fate);
        }
        if fails {
            Err(Error::from_raw_os_error(5))
        } else {
            Ok(0)
        }
    }

    /// Another aligned offset of the same file.
    fn elsewhere(&mut self, file: FileId, at: u64, len: usize) -> u64 {
        let size = self
            .files
            .get(&file.0)
            .map_or(0, |file| file.now.len() as u64);
        let places = size.saturating_sub(len as u64) / 4096 + 1;
        let other = self.random.below(places) * 4096;
        if other == at {
            other.saturating_sub(4096)
        } else {
            other
        }
    }
}

impl Disk for SimDisk {
    fn list(&mut self) -> std::io::Result<Vec<Found>> {
        if !self.take() {
            return Err(Error::other("the power is gone"));
        }
        let found = |file: &File| Found {
            name: file.name.clone(),
            len: file.now.len() as u64,
        };
        Ok(self.files.values().map(found).collect())
    }

    fn open(&mut self, name: &str) -> std::io::Result<FileId> {
        if !self.take() {
            return Err(Error::other("the power is gone"));
        }
        self.number_of(name)
            .map(FileId)
            .ok_or(Error::from(ErrorKind::NotFound))
    }

    fn create(&mut self, name: &str, len: u64) -> std::io::Result<FileId> {
        if !self.take() {
            return Err(Error::other("the power is gone"));
        }
        let used: u64 = self.files.values().map(|file| file.now.len() as u64).sum();
        if used.saturating_add(len) > self.options.space || self.fault(Fault::NoSpace) {
            return Err(Error::from_raw_os_error(28));
        }
        if self.number_of(name).is_some() {
            return Err(Error::from(ErrorKind::AlreadyExists));
        }
        let number = self.take_number();
        let zeros = Arc::new(vec![0; index(len)]);
        let (name, durable) = (name.to_owned(), Arc::clone(&zeros));
        self.files.insert(
            number,
            File {
                name,
                now: zeros,
                durable,
                ..File::default()
            },
        );
        Ok(FileId(number))
    }

    fn remove(&mut self, file: FileId) -> std::io::Result<()> {
        if !self.take() {
            return Err(Error::other("the power is gone"));
        }
        self.files
            .remove(&file.0)
            .map(drop)
            .ok_or(Error::from(ErrorKind::NotFound))
    }

    fn close(&mut self, _file: FileId) {}

    fn submit(&mut self, op: Op) -> Result<(), (Op, SubmitError)> {
        if self.flying.len() >= self.options.depth {
            let depth = u32::try_from(self.options.depth).unwrap_or(u32::MAX);
            return Err((op, SubmitError::Full { depth }));
        }
        if !self.take() || self.dead {
            return Err((op, SubmitError::Failed));
        }
        let align = self.options.align as u64;
        let aligned = op.at.is_multiple_of(align)
            && (op.len as u64).is_multiple_of(align)
            && (op.buf_at as u64).is_multiple_of(align)
            && (op.more.iter()).all(|run| (run.len as u64).is_multiple_of(align));
        assert!(aligned, "operation is not aligned to {align}: {op:?}");
        let covers = self
            .files
            .get(&op.file.0)
            .map_or(0, |file| file.loose.len());
        let (mut until, mut not_before) = (0, Duration::ZERO);
        if self.fault(Fault::Slow) {
            let most = match op.kind {
                OpKind::Read => OVERTAKEN_MAX,
                OpKind::Write | OpKind::Sync => OVERTAKEN_MAX / 20,
            };
            let slow = self.random.below(most);
            until = self.taken + slow;
            let ms = SLOW_MS.start + slow * (SLOW_MS.end - SLOW_MS.start) / most;
            not_before = self.now + Duration::from_millis(ms);
        }
        self.flying.push(Flying {
            op,
            covers,
            until,
            not_before,
        });
        Ok(())
    }

    fn reap(&mut self, wait: Wait, done: &mut Vec<Done>) {
        self.now += LOOK_TIME;
        if self.flying.is_empty() {
            if let Wait::For(most) = wait {
                self.now += most;
            }
            return;
        }
        if self.dead {
            let lost = |Flying { op, .. }: Flying| Done {
                user: op.user,
                kind: op.kind,
                buf: None,
                more: Vec::new(),
                moved: Err(Error::other("the lane is dead")),
            };
            return done.extend(self.flying.drain(..).map(lost));
        }
        let finished = 1 + self.random.below(self.flying.len() as u64);
        for _ in 0..finished {
            let free: Vec<usize> = (0..self.flying.len())
                .filter(|at| {
                    self.flying
                        .get(*at)
                        .is_some_and(|op| op.until <= self.taken)
                })
                .collect();
            if let (Wait::For(most), true) = (wait, free.is_empty()) {
                self.now += most;
                return;
            }
            let at = match free.len() as u64 {
                0 => index(self.random.below(self.flying.len() as u64)),
                some => free
                    .get(index(self.random.below(some)))
                    .copied()
                    .unwrap_or(0),
            };
            self.reordered += u64::from(at > 0);
            let flying = self.flying.remove(at);
            done.push(self.finish(flying));
        }
    }

    fn in_flight(&self) -> usize {
        self.flying.len()
    }

    fn depth(&self) -> usize {
        self.options.depth
    }

    fn align(&self) -> usize {
        self.options.align
    }

    fn waker(&self) -> Waker {
        Waker::new(|| {})
    }

    fn lane(&self) -> &'static str {
        "sim"
    }

    fn now(&self) -> Duration {
        self.now
    }
}

#[cfg(test)]
mod tests;
