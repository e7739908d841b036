//! Our side of the disk limits: a lane kept full from one thread.
//!
//! Upstairs:   `limits`, `store`.
//! Downstairs: `kvtier_store::disk::Disk`, `check`.
//!
//! Not here on purpose: no store. These rows say what the lane costs alone.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::{Duration, Instant};

use indicatif::ProgressBar;
use kvtier_benches::report::Problem;
use kvtier_store::disk::{Disk, Done, FileId, Op, OpKind, Wait};
use kvtier_store::mem::{Arena, IoBuf};
use rand::Rng;
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::SeedableRng;

use super::Sample;
use super::check::Checker;

/// One file, one arena, one size of operation.
pub(crate) struct Run<'a> {
    disk: &'a mut dyn Disk,
    file: FileId,
    arena: &'a Arc<Arena>,
    /// Payload of an operation, and what it carries in front of that. Unit: bytes.
    size: u64,
    head: u64,
    span: u64,
    depth: usize,
    checker: Option<Checker>,
    checking: usize,
    /// Buffers that wait for their turn, oldest first: memory that the caches have forgotten.
    cold: VecDeque<IoBuf>,
    keeps_cold: bool,
    moved: u64,
    done: Vec<Done>,
}

impl<'a> Run<'a> {
    pub(crate) fn new(
        disk: &'a mut dyn Disk,
        file: FileId,
        arena: &'a Arc<Arena>,
        size: u64,
        span: u64,
        depth: usize,
    ) -> Self {
        Self {
            disk,
            file,
            arena,
            size,
            head: 0,
            span,
            depth,
            checker: None,
            checking: 0,
            cold: VecDeque::new(),
            keeps_cold: false,
            moved: 0,
            done: Vec::new(),
        }
    }

    /// The same over `bytes` of memory in turn, not over the same few buffers again and again: a
    /// restore fills slots that nobody has touched for long, and those are slower to fill.
    pub(crate) fn in_cold_memory(mut self, bytes: u64) -> Result<Self, Problem> {
        let count = usize::try_from(bytes / self.len())?.max(self.depth + 1);
        let bufs: Result<VecDeque<_>, _> = (0..count).map(|_| self.buffer()).collect();
        (self.cold, self.keeps_cold) = (bufs?, true);
        Ok(self)
    }

    /// The same with operations as records need them: `head` bytes longer, one behind the other.
    /// Only payload counts as moved.
    pub(crate) fn with_heads(mut self, head: u64) -> Self {
        self.head = head;
        self
    }

    /// The same, and every payload that was read is checksummed on a second thread. For reads in
    /// cold memory.
    pub(crate) fn checked(mut self) -> Result<Self, Problem> {
        self.checker = Some(Checker::start(usize::try_from(self.head)?)?);
        Ok(self)
    }

    /// Length of an operation. Unit: bytes.
    fn len(&self) -> u64 {
        self.head + self.size
    }

    fn blocks(&self) -> u64 {
        self.span / self.len()
    }

    /// Writes every block of the file once, and syncs.
    pub(crate) fn fill(&mut self, bar: &ProgressBar) -> Result<(), Problem> {
        let mut block = 0;
        while block < self.blocks() || self.disk.in_flight() > 0 {
            while block < self.blocks() && self.disk.in_flight() < self.depth {
                let buf = self.buffer()?;
                self.submit(OpKind::Write, block, Some(buf))?;
                block += 1;
            }
            self.reap()?;
            bar.set_position(self.moved);
        }
        self.submit(OpKind::Sync, 0, None)?;
        self.drain()
    }

    /// Random reads for this long.
    pub(crate) fn read_random(mut self, seconds: f64) -> Result<Sample, Problem> {
        let mut random = ChaCha8Rng::seed_from_u64(2);
        let clock = Clock::start(seconds);
        while !clock.over() {
            while self.disk.in_flight() < self.depth {
                let block = random.random_range(0..self.blocks());
                let buf = self.buffer()?;
                self.submit(OpKind::Read, block, Some(buf))?;
            }
            self.reap()?;
        }
        self.drain()?;
        Ok(clock.stop(self.moved))
    }

    /// Reads front to back for this long.
    pub(crate) fn read_in_order(mut self, seconds: f64) -> Result<Sample, Problem> {
        let mut block = 0;
        let clock = Clock::start(seconds);
        while !clock.over() {
            while self.disk.in_flight() < self.depth {
                let buf = self.buffer()?;
                self.submit(OpKind::Read, block % self.blocks(), Some(buf))?;
                block += 1;
            }
            self.reap()?;
        }
        self.drain()?;
        Ok(clock.stop(self.moved))
    }

    /// Writes front to back for this long, with a sync behind every `sync_every` writes that are
    /// complete; later writes go on while it runs. Ends when the last sync has.
    pub(crate) fn write_durable(
        mut self,
        seconds: f64,
        sync_every: u64,
    ) -> Result<Sample, Problem> {
        let batch = sync_every * self.size;
        let (mut block, mut synced) = (0, 0);
        let clock = Clock::start(seconds);
        while !clock.over() {
            while self.disk.in_flight() < self.depth {
                if self.moved - synced >= batch {
                    synced = self.moved;
                    self.submit(OpKind::Sync, 0, None)?;
                } else {
                    let buf = self.buffer()?;
                    self.submit(OpKind::Write, block % self.blocks(), Some(buf))?;
                    block += 1;
                }
            }
            self.reap()?;
        }
        self.drain()?;
        self.submit(OpKind::Sync, 0, None)?;
        self.drain()?;
        Ok(clock.stop(self.moved))
    }

    fn buffer(&mut self) -> Result<IoBuf, Problem> {
        self.take_checked();
        if let Some(coldest) = self.cold.pop_front() {
            return Ok(coldest);
        }
        let len = usize::try_from(self.len())?;
        self.arena
            .alloc(len)
            .ok_or_else(|| "the arena is too small for the depth".into())
    }

    /// Takes back what the checker is through with: one at least when nothing else is left.
    fn take_checked(&mut self) {
        let Some(checker) = &mut self.checker else {
            return;
        };
        while self.checking > 0 {
            let Some(buf) = checker.take(self.cold.is_empty()) else {
                return;
            };
            self.checking -= 1;
            self.cold.push_back(buf);
        }
    }

    fn submit(&mut self, kind: OpKind, block: u64, buf: Option<IoBuf>) -> Result<(), Problem> {
        let len = buf.as_ref().map_or(0, |buf| buf.len());
        let at = block * self.len();
        let op = Op {
            user: 0,
            kind,
            file: self.file,
            at,
            buf,
            buf_at: 0,
            len,
            more: Vec::new(),
        };
        self.disk.submit(op).map_err(|(_, error)| error.into())
    }

    fn reap(&mut self) -> Result<(), Problem> {
        self.disk.reap(Wait::One, &mut self.done);
        for done in self.done.drain(..) {
            let moved = done.moved? as u64;
            let len = self.head + self.size;
            if done.kind == OpKind::Sync {
                continue;
            }
            if moved != len {
                return Err(format!("a {:?} moved {moved} of {len} bytes", done.kind).into());
            }
            self.moved += self.size;
            match (&self.checker, done.buf) {
                (Some(checker), Some(buf)) => {
                    self.checking += 1;
                    checker.give(buf)?;
                }
                (_, buf) if self.keeps_cold => self.cold.extend(buf),
                _ => {}
            }
        }
        Ok(())
    }

    fn drain(&mut self) -> Result<(), Problem> {
        while self.disk.in_flight() > 0 {
            self.reap()?;
        }
        while self.checking > 0 {
            self.take_checked();
            self.cold.clear();
        }
        Ok(())
    }
}

/// Wall clock and CPU of this process, kernel workers included.
pub(crate) struct Clock {
    start: Instant,
    until: Duration,
    cpu_s: f64,
}

impl Clock {
    pub(crate) fn start(seconds: f64) -> Self {
        Self {
            start: Instant::now(),
            until: Duration::from_secs_f64(seconds),
            cpu_s: cpu_s(),
        }
    }

    pub(crate) fn over(&self) -> bool {
        self.start.elapsed() >= self.until
    }

    pub(crate) fn stop(&self, bytes: u64) -> Sample {
        let seconds = self.start.elapsed().as_secs_f64();
        Sample {
            bytes: bytes as f64,
            seconds,
            cpu_s: cpu_s() - self.cpu_s,
        }
    }
}

fn cpu_s() -> f64 {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::ProcessCPUTime);
    now.tv_sec as f64 + now.tv_nsec as f64 * 1e-9
}
