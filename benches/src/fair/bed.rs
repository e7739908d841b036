//! A full store, a reader, and one kind of other work beside it.
//!
//! Upstairs:   `fair`.
//! Downstairs: `kvtier_store::Store` on this thread; a worker thread for everything that costs CPU.

use std::path::Path;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use hdrhistogram::Histogram;
use kvtier_benches::report::Problem;
use kvtier_proto::units::{KIB, MIB};
use kvtier_proto::{BlockKey, NamespaceId};
use kvtier_store::disk::lane::{LaneKind, open_lane};
use kvtier_store::disk::{Disk, Wait, Waker};
use kvtier_store::mem::{Arena, IoBuf};
use kvtier_store::{
    Checked, Counter, Event, PartCode, PartSpec, RecordBuilder, RecordImage, Store, StoreOptions,
    ToCheck, Unverified,
};
use rand::seq::IndexedRandom as _;
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::SeedableRng;

use crate::limits::noisy_arena;
use crate::limits::store::{raw_record, want};

/// Room for a record's head. Unit: bytes.
const HEAD: u64 = 4 * KIB;
/// Saves that wait for the device or are on their way. Unit: bytes.
const SAVING: u64 = 32 * MIB;
/// Operations in flight on the lane.
const DEPTH: usize = 64;
/// Longest payload whose checksum costs less than to have another thread do it. Unit: bytes.
const VERIFIED_HERE: u64 = 256 * KIB;
/// Every so many-th block is pinned where pinned blocks are copied.
const PIN_EVERY: usize = 3;
/// Longest wait for the first copy.
const PATIENCE: Duration = Duration::from_secs(60);
/// Faster than any device: the scrub reads what the lane lets through. Unit: bytes a second.
const SCRUB_RATE: u64 = 1 << 40;

/// What goes on beside the reader.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Beside {
    Alone,
    Saves,
    Copies,
    Scrub,
}

impl Beside {
    pub(super) const ALL: [Self; 4] = [Self::Alone, Self::Saves, Self::Copies, Self::Scrub];

    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Alone => "alone",
            Self::Saves => "saves",
            Self::Copies => "saves_and_copies",
            Self::Scrub => "scrub",
        }
    }
}

/// What a round showed.
#[derive(Debug, Clone, Copy)]
pub(super) struct Seen {
    pub(super) us_p50: f64,
    pub(super) us_p99: f64,
    pub(super) read_mib_s: f64,
    /// Bytes of the other work: saved and copied, or scrubbed.
    pub(super) other_mib_s: f64,
    /// Of that, pinned blocks that were copied.
    pub(super) copied_mib_s: f64,
    /// How busy the store's thread was: 1 is all the time.
    pub(super) cpu: f64,
}

enum Job {
    Verify(Unverified),
    Build(IoBuf, u64),
    Check(ToCheck),
}

enum Done {
    Verified(IoBuf),
    Built(RecordImage),
    Checked(Checked),
}

/// See the file's header.
pub(super) struct Bed {
    store: Store<Box<dyn Disk + Send>>,
    jobs: Option<Sender<Job>>,
    done: Receiver<Result<Done, String>>,
    thread: Option<JoinHandle<()>>,
    events: Vec<Event>,
    random: ChaCha8Rng,
    /// Memory of reads, and of saves.
    to_read: Vec<IoBuf>,
    to_save: Vec<IoBuf>,
    keys: Vec<BlockKey>,
    reading: Vec<(u64, Instant)>,
    saving: usize,
    size: u64,
    next: u64,
    took: Histogram<u64>,
    read_bytes: u64,
}

impl Bed {
    /// A store of `capacity` bytes in the new directory `path`, full of blocks of `size` bytes,
    /// and a reader that keeps `depth` of them open.
    pub(super) fn make(
        path: &Path,
        size: u64,
        depth: usize,
        capacity: u64,
    ) -> Result<Self, Problem> {
        std::fs::create_dir(path)?;
        let (len, saves) = (size + HEAD, usize::try_from(SAVING / size)?);
        let room = len * (depth as u64 + 4) + len * saves as u64;
        let arena = noisy_arena("bench-fair", room * 5 / 4)?;
        let disk = open_lane(path, LaneKind::Auto, DEPTH, std::slice::from_ref(&arena))?.disk;
        let options = StoreOptions::new(capacity, [1; 16]);
        let (store, _) = Store::open(disk, options, None, &mut |_| ())?;
        let bufs = |count: usize| -> Result<Vec<IoBuf>, Problem> {
            let len = usize::try_from(len)?;
            let all: Option<_> = (0..count).map(|_| Arena::alloc(&arena, len)).collect();
            all.ok_or_else(|| "the arena is too small".into())
        };
        let (to_read, to_save) = (bufs(depth)?, bufs(saves)?);
        let (jobs, done, thread) = worker(store.disk().waker(), size)?;
        let mut bed = Self {
            store,
            jobs: Some(jobs),
            done,
            thread: Some(thread),
            events: Vec::new(),
            random: ChaCha8Rng::seed_from_u64(6),
            to_read,
            to_save,
            keys: Vec::new(),
            reading: Vec::new(),
            saving: 0,
            size,
            next: 0,
            took: Histogram::new(3)?,
            read_bytes: 0,
        };
        // Once around, so that saves recycle from the start.
        let last = capacity / size + capacity / size / 8;
        while bed.next < last || bed.saving > 0 {
            bed.turn(bed.next < last, false)?;
        }
        Ok(bed)
    }

    /// The reader for `span`, with this beside it.
    pub(super) fn read_beside(&mut self, beside: Beside, span: Duration) -> Result<Seen, Problem> {
        stay_on(Some(0));
        let seen = self.round(beside, span);
        // A child of this thread would stay there as well.
        stay_on(None);
        seen
    }

    fn round(&mut self, beside: Beside, span: Duration) -> Result<Seen, Problem> {
        self.settle(beside)?;
        let other = |bed: &Self| {
            let counters = bed.store.counters();
            let of = [
                Counter::BytesWritten,
                Counter::BytesForwarded,
                Counter::ScrubBytes,
            ];
            of.into_iter().map(|one| counters.get(one)).sum::<u64>()
        };
        let copied = |bed: &Self| bed.store.counters().get(Counter::BytesForwarded);
        // Copies begin with the next segment that makes room.
        let (none, begin) = (copied(self), Instant::now());
        while beside == Beside::Copies && copied(self) == none {
            if begin.elapsed() > PATIENCE {
                return Err(format!("nothing was copied within {PATIENCE:?}").into());
            }
            self.turn(true, true)?;
        }
        self.took.reset();
        self.read_bytes = 0;
        if beside == Beside::Scrub {
            self.store.scrub(SCRUB_RATE);
        }
        let (before, copied_before) = (other(self), copied(self));
        let (cpu, start) = (cpu_s(), Instant::now());
        while start.elapsed() < span {
            let saves = matches!(beside, Beside::Saves | Beside::Copies);
            self.turn(saves, true)?;
        }
        let seconds = start.elapsed().as_secs_f64();
        let mib_s = |bytes: u64| bytes as f64 / MIB as f64 / seconds;
        let (us_p50, us_p99) = (self.quantile(0.50), self.quantile(0.99));
        let seen = Seen {
            us_p50,
            us_p99,
            read_mib_s: mib_s(self.read_bytes),
            other_mib_s: mib_s(other(self) - before),
            copied_mib_s: mib_s(copied(self) - copied_before),
            cpu: (cpu_s() - cpu) / seconds,
        };
        self.store.stop_scrub();
        while !self.reading.is_empty() || self.saving > 0 {
            self.turn(false, false)?;
        }
        Ok(seen)
    }

    fn quantile(&self, quantile: f64) -> f64 {
        self.took.value_at_quantile(quantile) as f64 / 1000.0
    }

    /// Chooses what is read, and pins what shall be copied. The oldest make room for what is saved
    /// meanwhile: only younger ones are read.
    fn settle(&mut self, beside: Beside) -> Result<(), Problem> {
        let mut stored: Vec<_> = self.store.blocks().collect();
        stored.sort_by_key(|one| (one.place.epoch, one.place.offset));
        let namespace = stored.first().map_or(NamespaceId(0), |one| one.namespace);
        for (at, one) in stored.iter().enumerate() {
            match beside == Beside::Copies && at.is_multiple_of(PIN_EVERY) {
                true => drop(self.store.pin(namespace, &one.key)),
                false => self.store.unpin(namespace, &one.key),
            }
        }
        let young = stored.get(stored.len() / 2..).unwrap_or_default();
        self.keys = young.iter().map(|one| one.key).collect();
        if self.keys.is_empty() {
            return Err("the store is empty".into());
        }
        Ok(())
    }

    /// Hands out work, lets the store take a step, and takes what came of it.
    fn turn(&mut self, saves: bool, reads: bool) -> Result<(), Problem> {
        while saves && let Some(buf) = self.to_save.pop() {
            self.saving += 1;
            self.next += 1;
            self.give(Job::Build(buf, self.next))?;
        }
        while reads && let Some(buf) = self.to_read.pop() {
            self.read(buf)?;
        }
        self.store.step(Wait::One, &mut self.events);
        let events = std::mem::take(&mut self.events);
        for event in events {
            self.hear(event)?;
        }
        while let Ok(done) = self.done.try_recv() {
            match done? {
                Done::Verified(buf) => self.to_read.push(buf),
                Done::Built(image) => {
                    let put = self.store.put(0, image);
                    put.map_err(|(_, problem)| problem)?;
                }
                Done::Checked(checked) => drop(self.store.scrubbed(&checked)),
            }
        }
        Ok(())
    }

    fn read(&mut self, mut buf: IoBuf) -> Result<(), Problem> {
        // One that was evicted since costs another try.
        for _ in 0..1000 {
            let key = *self.keys.choose(&mut self.random).ok_or("no blocks")?;
            self.next += 1;
            match self.store.get(self.next, &want(key), buf) {
                Ok(()) => {
                    self.reading.push((self.next, Instant::now()));
                    return Ok(());
                }
                Err((back, _)) => buf = back,
            }
        }
        Err("everything that should be read is gone".into())
    }

    fn hear(&mut self, event: Event) -> Result<(), Problem> {
        match event {
            Event::Got { tag, result } => {
                let at = self.reading.iter().position(|(one, _)| *one == tag);
                let (_, begun) = self.reading.swap_remove(at.ok_or("nobody asked for this")?);
                let took = u64::try_from(begun.elapsed().as_nanos())?;
                self.took.record(took)?;
                self.read_bytes += self.size;
                let unverified = result.map_err(|(_, miss)| format!("read: {miss:?}"))?;
                if self.size > VERIFIED_HERE {
                    return self.give(Job::Verify(unverified));
                }
                if let Done::Verified(buf) = verify(unverified)? {
                    self.to_read.push(buf);
                }
                Ok(())
            }
            Event::Put { image, result, .. } => {
                result?;
                let image = image.ok_or("the device kept a buffer")?;
                self.to_save.push(image.into_buf());
                self.saving -= 1;
                Ok(())
            }
            Event::Scrub(to_check) => self.give(Job::Check(to_check)),
            Event::Scrubbed(_) => {
                self.store.scrub(SCRUB_RATE);
                Ok(())
            }
            Event::Evicted { .. } | Event::Device(_) => Ok(()),
        }
    }

    fn give(&self, job: Job) -> Result<(), Problem> {
        let jobs = self.jobs.as_ref().ok_or("the worker has ended")?;
        jobs.send(job).map_err(|_| "the worker has ended".into())
    }
}

impl Drop for Bed {
    fn drop(&mut self) {
        drop(self.jobs.take());
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

type Thread = (Sender<Job>, Receiver<Result<Done, String>>, JoinHandle<()>);

fn worker(waker: Waker, size: u64) -> Result<Thread, Problem> {
    let (jobs, todo) = channel();
    let (tell, done) = channel();
    let part = PartSpec {
        layer: 0,
        code: PartCode::K,
        flags: 0,
        stored_len: u32::try_from(size)?,
        raw_len: u32::try_from(size)?,
    };
    let thread = std::thread::Builder::new().name("kvtier-check".into());
    let thread = thread.spawn(move || {
        stay_on(Some(1));
        for job in todo {
            let _ = tell.send(work(job, &part));
            waker.wake();
        }
    })?;
    Ok((jobs, done, thread))
}

fn verify(unverified: Unverified) -> Result<Done, String> {
    let record = unverified.verify();
    let record = record.map_err(|(_, miss)| format!("verify: {miss:?}"))?;
    Ok(Done::Verified(record.into_buf()))
}

/// CPU time of this thread.
fn cpu_s() -> f64 {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::ThreadCPUTime);
    now.tv_sec as f64 + now.tv_nsec as f64 * 1e-9
}

/// Keeps this thread on a processor of its own, or on none in particular: what is measured is the
/// device, not who of two threads had to wait for the other.
fn stay_on(cpu: Option<usize>) {
    let mut cpus = rustix::thread::CpuSet::new();
    (0..rustix::thread::CpuSet::MAX_CPU)
        .filter(|one| cpu.is_none_or(|cpu| cpu == *one))
        .for_each(|one| cpus.set(one));
    // A machine without that processor is measured all the same.
    let _ = rustix::thread::sched_setaffinity(None, &cpus);
}

fn work(job: Job, part: &PartSpec) -> Result<Done, String> {
    match job {
        Job::Verify(unverified) => verify(unverified),
        Job::Build(buf, number) => {
            let mut key = [0; 32];
            key[..8].copy_from_slice(&number.to_le_bytes());
            let meta = raw_record(BlockKey(key));
            let built = RecordBuilder::new(&meta, std::slice::from_ref(part)).build(buf);
            built
                .map(Done::Built)
                .map_err(|(_, problem)| format!("build: {problem}"))
        }
        Job::Check(to_check) => Ok(Done::Checked(to_check.check())),
    }
}
