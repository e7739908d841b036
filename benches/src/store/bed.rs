//! A store full of blocks, driven as the daemon drives it.
//!
//! Upstairs:   `store`.
//! Downstairs: `kvtier_store::Store` on this thread; a worker thread that verifies and builds.
//!
//! A read counts when its record passed every check, a write when its event says durable.

use std::collections::VecDeque;
use std::path::Path;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread::JoinHandle;

use kvtier_proto::BlockKey;
use kvtier_proto::units::KIB;
use kvtier_store::disk::lane::{LaneKind, open_lane};
use kvtier_store::disk::{Disk, Wait, Waker};
use kvtier_store::mem::{Arena, IoBuf};
use kvtier_store::{
    Event, PartCode, PartSpec, RecordBuilder, RecordImage, SledCatalog, Store, StoreOptions,
    Unverified,
};
use rand::Rng;
use rand::seq::IndexedRandom as _;
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::SeedableRng;

use super::COLD_BYTES;
use crate::limits::lane::Clock;
use crate::limits::store::{raw_record, want};
use crate::limits::{SYNC_BYTES, Sample, noisy_arena};
use kvtier_benches::report::Problem;

/// Length of one part. Unit: bytes.
const PART: u64 = 64 * KIB;
/// Room for a record's head. Unit: bytes.
pub(super) const HEAD: u64 = 4 * KIB;

/// Which block is read next.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Order {
    /// Any.
    Random,
    /// The one behind the last in its segment: a prefix that was saved in one go.
    Stored,
}

/// What the store knows of a record before one of its parts is read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Heads {
    /// Its head: another part of it was read before.
    Known,
    /// Nothing but its place.
    Cold,
}

/// Work for the other thread.
enum Job {
    Verify(Unverified),
    Build(IoBuf, u64),
}

/// What came of it.
enum Done {
    /// The memory again, and the payload bytes that passed.
    Verified(IoBuf, u64),
    Built(RecordImage),
}

/// What is asked of the store next.
enum Ask {
    Get(BlockKey),
    Part(BlockKey, usize),
    Put(u64),
}

/// What is on its way.
#[derive(Default)]
struct Way {
    /// Operations that the store has, or will have when they are built.
    flying: usize,
    /// Jobs that the worker has.
    working: usize,
    /// Payload that came to its end. Unit: bytes.
    bytes: u64,
}

type AnyStore = Store<Box<dyn Disk + Send>>;

/// The thread for what costs CPU.
struct Worker {
    jobs: Option<Sender<Job>>,
    done: Receiver<Result<Done, String>>,
    thread: Option<JoinHandle<()>>,
}

/// See the file's header.
pub(super) struct Bed {
    store: AnyStore,
    arena: Arc<Arena>,
    worker: Worker,
    events: Vec<Event>,
    size: u64,
    next_key: u64,
}

impl Bed {
    /// A store of `capacity` bytes in the new directory `path`, full of blocks of `size` bytes.
    pub(super) fn make(
        path: &Path,
        size: u64,
        depth: usize,
        capacity: u64,
    ) -> Result<Self, Problem> {
        std::fs::create_dir(path)?;
        let cold = COLD_BYTES / PART * (PART + HEAD);
        let room = (2 * SYNC_BYTES + (size + HEAD) * (depth as u64 + 8)).max(cold) * 5 / 4;
        let arena = noisy_arena("bench-store", room)?;
        let disk = open_lane(path, LaneKind::Auto, depth, std::slice::from_ref(&arena))?.disk;
        let catalog = SledCatalog::new(path.join("catalog"));
        let options = StoreOptions::new(capacity, [1; 16]);
        let (store, _) = Store::open(disk, options, Some(Box::new(catalog)), &mut |_| ())?;
        let worker = Worker::start(store.disk().waker(), size)?;
        let mut bed = Self {
            store,
            arena,
            worker,
            events: Vec::new(),
            size,
            next_key: 0,
        };
        // Once around, so that no segment is written for the first time while time is taken.
        let last = capacity / size + capacity / size / 8;
        bed.write_while(|key| key < last)?;
        Ok(bed)
    }

    /// Reads whole records for this long.
    pub(super) fn read(
        &mut self,
        seconds: f64,
        depth: usize,
        order: Order,
    ) -> Result<Sample, Problem> {
        let keys = self.keys();
        let mut random = ChaCha8Rng::seed_from_u64(3);
        let mut in_order = keys.iter().cycle();
        let clock = Clock::start(seconds);
        let bytes = self.drive(depth, self.size, &mut |_| {
            let key = match order {
                Order::Random => keys.choose(&mut random),
                Order::Stored => in_order.next(),
            };
            key.filter(|_| !clock.over()).map(|key| Ask::Get(*key))
        })?;
        Ok(clock.stop(bytes))
    }

    /// Reads one part of a random record at a time.
    pub(super) fn pages(
        &mut self,
        seconds: f64,
        depth: usize,
        heads: Heads,
    ) -> Result<Sample, Problem> {
        let keys = self.keys();
        let parts = usize::try_from(self.size / PART)?;
        if heads == Heads::Known {
            let mut each = keys.iter();
            self.drive(depth, PART, &mut |_| {
                each.next().map(|key| Ask::Part(*key, 0))
            })?;
        }
        let mut random = ChaCha8Rng::seed_from_u64(5);
        let clock = Clock::start(seconds);
        let bytes = self.drive(depth, PART, &mut |store| {
            if heads == Heads::Cold {
                store.drop_heads();
            }
            let key = keys.choose(&mut random).filter(|_| !clock.over())?;
            Some(Ask::Part(*key, random.random_range(0..parts)))
        })?;
        Ok(clock.stop(bytes))
    }

    /// Saves until durable for this long, two batches on their way.
    pub(super) fn write(&mut self, seconds: f64) -> Result<Sample, Problem> {
        let clock = Clock::start(seconds);
        let bytes = self.write_while(|_| !clock.over())?;
        Ok(clock.stop(bytes))
    }

    fn write_while(&mut self, more: impl Fn(u64) -> bool) -> Result<u64, Problem> {
        let depth = usize::try_from(2 * SYNC_BYTES / self.size)?;
        let mut key = self.next_key;
        let bytes = self.drive(depth, self.size, &mut |_| {
            let ask = more(key).then_some(Ask::Put(key));
            key += 1;
            ask
        });
        self.next_key = key;
        bytes
    }

    /// Restores and saves, `reads` percent of them restores, for this long.
    pub(super) fn mixed(
        &mut self,
        seconds: f64,
        depth: usize,
        reads: u32,
    ) -> Result<Sample, Problem> {
        let mut random = ChaCha8Rng::seed_from_u64(4);
        // The oldest make room for what is saved meanwhile: only younger ones are read.
        let keys = self.keys();
        let young = keys.get(keys.len() / 2..).unwrap_or_default().to_vec();
        let mut new = self.next_key;
        let clock = Clock::start(seconds);
        let bytes = self.drive(depth, self.size, &mut |_| {
            if clock.over() {
                return None;
            }
            if random.random_range(0..100) < reads {
                return young.choose(&mut random).map(|key| Ask::Get(*key));
            }
            new += 1;
            Some(Ask::Put(new))
        });
        self.next_key = new + 1;
        Ok(clock.stop(bytes?))
    }

    /// Keeps `depth` operations of `each` bytes on their way until `next` has no more; returns
    /// payload bytes.
    fn drive(
        &mut self,
        depth: usize,
        each: u64,
        next: &mut dyn FnMut(&mut AnyStore) -> Option<Ask>,
    ) -> Result<u64, Problem> {
        // More than the depth: some are checked while the device stays busy, and each is used
        // again only when all others were.
        let cold = usize::try_from(COLD_BYTES / each)?;
        let mut bufs: VecDeque<IoBuf> = self.buffers(each, (depth + 4).max(cold))?.into();
        let mut way = Way::default();
        let mut ended = false;
        loop {
            while !ended && way.flying < depth {
                let Some(buf) = bufs.pop_front() else { break };
                match next(&mut self.store) {
                    Some(ask) => self.start(ask, buf, &mut way)?,
                    None => {
                        ended = true;
                        bufs.push_back(buf);
                    }
                }
            }
            if ended && way.flying == 0 && way.working == 0 {
                return Ok(way.bytes);
            }
            self.store.step(Wait::One, &mut self.events);
            self.hear(&mut bufs, &mut way)?;
            while let Ok(done) = self.worker.done.try_recv() {
                way.working -= 1;
                match done? {
                    Done::Verified(buf, len) => {
                        way.bytes += len;
                        bufs.push_back(buf);
                    }
                    Done::Built(image) => {
                        let put = self.store.put(0, image);
                        put.map_err(|(_, problem)| problem)?;
                    }
                }
            }
        }
    }

    fn start(&mut self, ask: Ask, buf: IoBuf, way: &mut Way) -> Result<(), Problem> {
        way.flying += 1;
        match ask {
            Ask::Put(key) => {
                way.working += 1;
                self.worker.give(Job::Build(buf, key))
            }
            Ask::Get(key) => {
                let got = self.store.get(0, &want(key), buf);
                got.map_err(|(_, miss)| format!("get: {miss:?}").into())
            }
            Ask::Part(key, part) => {
                let got = self.store.get_parts(0, &want(key), part..part + 1, buf);
                got.map_err(|(_, miss)| format!("get_parts: {miss:?}").into())
            }
        }
    }

    /// Takes what the store reported.
    fn hear(&mut self, bufs: &mut VecDeque<IoBuf>, way: &mut Way) -> Result<(), Problem> {
        for event in self.events.drain(..) {
            match event {
                Event::Got { result, .. } => {
                    let unverified = result.map_err(|(_, miss)| format!("read: {miss:?}"))?;
                    self.worker.give(Job::Verify(unverified))?;
                    way.flying -= 1;
                    way.working += 1;
                }
                Event::Put { image, result, .. } => {
                    result?;
                    let image = image.ok_or("the device kept a buffer")?;
                    way.bytes += u64::from(image.layout().stored_len);
                    bufs.push_back(image.into_buf());
                    way.flying -= 1;
                }
                Event::Evicted { .. } | Event::Device(_) | Event::Scrub(_) | Event::Scrubbed(_) => {
                }
            }
        }
        Ok(())
    }

    /// Keys of all blocks in the order of their places.
    fn keys(&self) -> Vec<BlockKey> {
        let mut stored: Vec<_> = self.store.blocks().collect();
        stored.sort_by_key(|one| (one.place.epoch, one.place.offset));
        stored.into_iter().map(|one| one.key).collect()
    }

    /// `count` buffers for `each` bytes and a head; what they hold does not compress.
    fn buffers(&self, each: u64, count: usize) -> Result<Vec<IoBuf>, Problem> {
        let len = usize::try_from(each + HEAD)?;
        let bufs: Option<_> = (0..count).map(|_| self.arena.alloc(len)).collect();
        bufs.ok_or_else(|| "the arena is too small".into())
    }
}

impl Worker {
    fn start(waker: Waker, size: u64) -> Result<Self, Problem> {
        let (jobs, todo) = channel();
        let (tell, done) = channel();
        let parts = parts(size)?;
        let thread = std::thread::Builder::new().name("kvtier-check".into());
        let thread = thread.spawn(move || {
            for job in todo {
                let _ = tell.send(work(job, &parts));
                waker.wake();
            }
        })?;
        let (jobs, thread) = (Some(jobs), Some(thread));
        Ok(Self { jobs, done, thread })
    }

    fn give(&self, job: Job) -> Result<(), Problem> {
        let jobs = self.jobs.as_ref().ok_or("the worker has ended")?;
        jobs.send(job).map_err(|_| "the worker has ended".into())
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        drop(self.jobs.take());
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

fn work(job: Job, parts: &[PartSpec]) -> Result<Done, String> {
    match job {
        Job::Verify(unverified) => {
            let record = unverified.verify();
            let record = record.map_err(|(_, miss)| format!("verify: {miss:?}"))?;
            let len = record.payload().len() as u64;
            Ok(Done::Verified(record.into_buf(), len))
        }
        Job::Build(buf, number) => {
            let mut key = [0; 32];
            key[..8].copy_from_slice(&number.to_le_bytes());
            let meta = raw_record(BlockKey(key));
            let built = RecordBuilder::new(&meta, parts).build(buf);
            built
                .map(Done::Built)
                .map_err(|(_, problem)| format!("build: {problem}"))
        }
    }
}

/// Parts of 64 KiB, K and V of each layer in turn.
fn parts(size: u64) -> Result<Vec<PartSpec>, Problem> {
    let len = u32::try_from(PART)?;
    let part = |number: u64| -> Result<PartSpec, Problem> {
        Ok(PartSpec {
            layer: u16::try_from(number / 2)?,
            code: if number.is_multiple_of(2) {
                PartCode::K
            } else {
                PartCode::V
            },
            flags: 0,
            stored_len: len,
            raw_len: len,
        })
    };
    (0..size / PART).map(part).collect()
}
