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
mod moves;
mod options;
mod seeded;

pub use content::Fate;
pub use faults::{Fault, Faults, Fired};
pub use options::SimOptions;
pub use seeded::Seeded;

use content::{File, Loose};

use std::collections::BTreeMap;
use std::io::{Error, ErrorKind};
use std::sync::Arc;
use std::time::Duration;

use super::shape::{self, check_name};
use super::{Disk, Done, FileId, Found, Op, OpKind, SubmitError, Wait, Waker};
use crate::format::index;

/// Most calls and operations that overtake a slow read; a slow write or sync is overtaken by a
/// twentieth of that, so that a whole segment can be written while a read waits.
const OVERTAKEN_MAX: u64 = 1000;
/// More than any test needs, and not what a mistake in a length asks for. Unit: bytes.
const SPACE_MAX: u64 = 16 << 30;
/// Time between two looks at the device.
const LOOK_TIME: Duration = Duration::from_micros(1);
/// Least and most time that a slow operation takes. Unit: milliseconds.
const SLOW_MS: std::ops::Range<u64> = 200..2000;

#[derive(Debug)]
struct Flying {
    op: Op,
    /// Which of the files it is about.
    file: u32,
    /// It is no operation that a lane takes.
    refused: Option<Error>,
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
    /// Files that are open: an identity is never used again.
    handles: BTreeMap<FileId, u32>,
    next_handle: u32,
    flying: Vec<Flying>,
    /// Writes that were in flight when the power went and were reaped since, with their files.
    met_by_the_cut: Vec<(u32, Loose)>,
    taken: u64,
    now: Duration,
    crashed: bool,
    dead: bool,
    good_syncs: Option<u64>,
    /// A place that no read gets past: file and offset.
    unreadable: Option<(u32, u64)>,
    /// A place of which the next reads are wrong: file, offset, and how many of them.
    misread: Option<(u32, u64, u32)>,
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
            handles: BTreeMap::new(),
            next_handle: 1,
            flying: Vec::new(),
            met_by_the_cut: Vec::new(),
            taken: 0,
            now: Duration::ZERO,
            crashed: false,
            dead: false,
            good_syncs: None,
            unreadable: None,
            misread: None,
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

    /// Reads of the byte at `at` of a file fail from now on.
    pub fn set_unreadable(&mut self, name: &str, at: u64) {
        self.unreadable = self.number_of(name).map(|number| (number, at));
    }

    /// A bit of the byte at `at` of a file is wrong in the next `times` reads of it.
    pub fn misread(&mut self, name: &str, at: u64, times: u32) {
        self.misread = self.number_of(name).map(|number| (number, at, times));
    }

    /// Changes the probabilities from now on.
    pub fn set_faults(&mut self, faults: Faults) {
        self.options.faults = faults;
    }

    /// The power goes when so many more calls and operations were taken.
    pub fn cut_power_after(&mut self, more: u64) {
        self.options.crash_at = Some(self.taken + more);
    }

    /// True for a device that has power, makes no error and keeps what it says that it has.
    pub fn is_sound(&self) -> bool {
        let works = !self.crashed && !self.dead && self.good_syncs.is_none();
        works && self.options.faults.are_harmless() && self.options.space == u64::MAX
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

    fn enter(&mut self, number: u32) -> FileId {
        let handle = FileId(self.next_handle);
        self.next_handle += 1;
        self.handles.insert(handle, number);
        handle
    }

    /// Takes a file out of the table of open ones.
    fn retire(&mut self, file: FileId) -> Option<u32> {
        let busy = self.flying.iter().any(|flying| flying.op.file == file);
        assert!(!busy, "{file:?} goes while an operation on it is in flight");
        self.handles.remove(&file)
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
        check_name(name)?;
        match self.number_of(name) {
            Some(number) => Ok(self.enter(number)),
            None => Err(Error::from(ErrorKind::NotFound)),
        }
    }

    fn create(&mut self, name: &str, len: u64) -> std::io::Result<FileId> {
        if !self.take() {
            return Err(Error::other("the power is gone"));
        }
        check_name(name)?;
        if self.number_of(name).is_some() {
            return Err(Error::from(ErrorKind::AlreadyExists));
        }
        let used: u64 = self.files.values().map(|file| file.now.len() as u64).sum();
        let space = self.options.space.min(SPACE_MAX);
        if used.saturating_add(len) > space || self.fault(Fault::NoSpace) {
            return Err(Error::from_raw_os_error(28));
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
        Ok(self.enter(number))
    }

    fn remove(&mut self, file: FileId) -> std::io::Result<()> {
        if !self.take() {
            return Err(Error::other("the power is gone"));
        }
        let number = self.retire(file).ok_or(ErrorKind::NotFound)?;
        self.files.remove(&number);
        Ok(())
    }

    fn close(&mut self, file: FileId) {
        self.retire(file);
    }

    fn submit(&mut self, op: Op) -> Result<(), (Op, SubmitError)> {
        if self.flying.len() >= self.options.depth {
            let depth = u32::try_from(self.options.depth).unwrap_or(u32::MAX);
            return Err((op, SubmitError::Full { depth }));
        }
        if !self.take() || self.dead {
            return Err((op, SubmitError::Failed));
        }
        let number = self.handles.get(&op.file).copied();
        let open = || Error::new(ErrorKind::InvalidInput, "the file is not open");
        let shape = shape::check(&op, self.options.align);
        let refused = shape.and(number.ok_or_else(open)).err();
        if let Some(problem) = refused.as_ref().filter(|_| !self.options.refuses) {
            panic!("{problem}: {op:?}");
        }
        let file = number.unwrap_or_default();
        let covers = self.files.get(&file).map_or(0, |file| file.loose.len());
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
            file,
            refused,
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
