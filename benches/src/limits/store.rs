//! Our side of the disk limits through the whole store: records in, records out.
//!
//! Upstairs:   `limits`.
//! Downstairs: `kvtier_store::Store` over the same lane.
//!
//! A save counts when its event says durable; a restore counts when the record passed every
//! check. Both pay for checksums on the store's own thread, as a daemon without spare cores would.
//! Bytes are payload: the head of a record is our cost, not our work.
//!
//! Not here on purpose: no codec and no host tier.

use std::collections::VecDeque;
use std::path::Path;
use std::sync::Arc;

use kvtier_benches::report::Problem;
use kvtier_proto::units::MIB;
use kvtier_proto::{BlockKey, LayoutFingerprint, Level, NamespaceId, PayloadKind, Quality};
use kvtier_store::disk::lane::{LaneKind, open_lane};
use kvtier_store::disk::{Disk, Wait};
use kvtier_store::mem::{Arena, IoBuf};
use kvtier_store::{
    Counter, Event, PartCode, PartSpec, RecordBuilder, RecordMeta, SledCatalog, Store,
    StoreOptions, Unverified, Want,
};
use rand::Rng;
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::SeedableRng;

use super::lane::Clock;
use super::{SYNC_BYTES, Sample};

const NAMESPACE: NamespaceId = NamespaceId(1);
const LAYOUT: LayoutFingerprint = LayoutFingerprint([7; 32]);

/// Layers of the test block; each has a part for K and one for V.
const LAYERS: u16 = 16;

/// Room for a record's head. Unit: bytes.
const HEAD_BYTES: u64 = 4 << 10;

/// A store in a directory of its own, and memory for its records.
pub(super) struct StoreBed {
    store: Store<Box<dyn Disk + Send>>,
    arena: Arc<Arena>,
    events: Vec<Event>,
    next_key: u64,
    depth: usize,
}

impl StoreBed {
    /// A store of `capacity` bytes below `home`.
    pub(super) fn make(
        home: &Path,
        lane: LaneKind,
        depth: usize,
        capacity: u64,
    ) -> Result<Self, Problem> {
        let path = home.join("store");
        std::fs::create_dir(&path)?;
        let most = SYNC_BYTES * 2 + (2 * MIB + HEAD_BYTES) * (2 * depth as u64 + 2);
        let arena = super::noisy_arena("bench-store", most * 2)?;
        let disk = open_lane(&path, lane, depth, std::slice::from_ref(&arena))?.disk;
        let catalog = SledCatalog::new(home.join("catalog"));
        let options = StoreOptions::new(capacity, [1; 16]);
        let (store, _) = Store::open(disk, options, Some(Box::new(catalog)), &mut |_| ())?;
        Ok(Self {
            store,
            arena,
            events: Vec::new(),
            next_key: 0,
            depth,
        })
    }

    /// Puts records of `mib` MiB until the store has recycled its first segment.
    pub(super) fn fill(&mut self, mib: u64, capacity: u64) -> Result<Sample, Problem> {
        let clock = Clock::start(0.0);
        let count = capacity / (mib * MIB);
        let last = self.next_key + count;
        let bytes = self.put_while(mib, |bed| bed.next_key < last)?;
        Ok(clock.stop(bytes))
    }

    /// Saves for this long: put until durable.
    pub(super) fn save(&mut self, mib: u64, seconds: f64) -> Result<Sample, Problem> {
        let clock = Clock::start(seconds);
        let bytes = self.put_while(mib, |_| !clock.over())?;
        Ok(clock.stop(bytes))
    }

    /// Restores random records of `mib` MiB for this long, each whole and verified.
    pub(super) fn restore(&mut self, mib: u64, seconds: f64) -> Result<Sample, Problem> {
        let payload = usize::try_from(mib * MIB)?;
        let keys: Vec<BlockKey> = self
            .store
            .blocks()
            .filter(|stored| (stored.place.len - stored.place.head_len) as usize == payload)
            .map(|stored| stored.key)
            .collect();
        let mut random = ChaCha8Rng::seed_from_u64(3);
        // Two more than the depth: one is verified while the device stays busy. Not many more:
        // memory that stays in the cache is filled faster, and fio has no more than the depth.
        let mut bufs = self.buffers(mib, self.depth + 2)?;
        let mut arrived = VecDeque::new();
        let (mut flying, mut bytes) = (0, 0);
        let clock = Clock::start(seconds);
        while !clock.over() || flying > 0 || !arrived.is_empty() {
            while !clock.over()
                && flying < self.depth
                && let Some(buf) = bufs.pop()
            {
                let key = *keys
                    .get(random.random_range(0..keys.len().max(1)))
                    .ok_or("no blocks")?;
                self.store
                    .get(0, &want(key), buf)
                    .map_err(|(_, miss)| format!("get: {miss:?}"))?;
                flying += 1;
            }
            if let Some(unverified) = arrived.pop_front() {
                let record = Unverified::verify(unverified);
                let record = record.map_err(|(_, miss)| format!("verify: {miss:?}"))?;
                bytes += record.payload().len() as u64;
                bufs.push(record.into_buf());
            }
            let wait = if arrived.is_empty() && flying > 0 {
                Wait::One
            } else {
                Wait::No
            };
            self.store.step(wait, &mut self.events);
            for event in self.events.drain(..) {
                if let Event::Got { result, .. } = event {
                    arrived.push_back(result.map_err(|(_, miss)| format!("read: {miss:?}"))?);
                    flying -= 1;
                }
            }
        }
        Ok(clock.stop(bytes))
    }

    /// Syncs that the store has made.
    pub(super) fn syncs(&self) -> u64 {
        self.store.counters().get(Counter::Syncs)
    }

    /// Keeps two batches of records on their way; returns payload bytes that became durable.
    fn put_while(&mut self, mib: u64, more: impl Fn(&Self) -> bool) -> Result<u64, Problem> {
        let mut bufs = self.buffers(mib, usize::try_from(2 * SYNC_BYTES / (mib * MIB))?)?;
        let (mut flying, mut bytes) = (0, 0);
        while more(self) || flying > 0 {
            while more(self)
                && let Some(buf) = bufs.pop()
            {
                self.put(mib, buf)?;
                flying += 1;
            }
            self.store.step(Wait::One, &mut self.events);
            for event in self.events.drain(..) {
                let Event::Put { image, result, .. } = event else {
                    continue;
                };
                result?;
                let image = image.ok_or("the device kept a buffer")?;
                bytes += u64::from(image.layout().stored_len);
                bufs.push(image.into_buf());
                flying -= 1;
            }
        }
        Ok(bytes)
    }

    fn put(&mut self, mib: u64, buf: IoBuf) -> Result<(), Problem> {
        self.next_key += 1;
        let mut key = [0; 32];
        ChaCha8Rng::seed_from_u64(self.next_key).fill(&mut key);
        let meta = raw_record(BlockKey(key));
        let parts = parts(mib)?;
        let builder = RecordBuilder::new(&meta, &parts);
        let image = builder.build(buf).map_err(|(_, problem)| problem)?;
        self.store
            .put(self.next_key, image)
            .map_err(|(_, problem)| problem.into())
    }

    /// `count` buffers for images; what they hold does not compress.
    fn buffers(&self, mib: u64, count: usize) -> Result<Vec<IoBuf>, Problem> {
        let len = usize::try_from(mib * MIB + HEAD_BYTES)?;
        let bufs: Option<_> = (0..count).map(|_| self.arena.alloc(len)).collect();
        bufs.ok_or_else(|| "the arena is too small".into())
    }
}

/// A record as level raw.
pub(crate) fn raw_record(key: BlockKey) -> RecordMeta {
    RecordMeta {
        namespace: NAMESPACE,
        key,
        parent: BlockKey::ROOT,
        layout: LAYOUT,
        kind: PayloadKind::Kv,
        level: Level::RAW,
        through: Quality::Exact,
        tokens: 256,
        position: 0,
        codec_tables: 0,
    }
}

/// What [`raw_record`] is asked for by.
pub(crate) fn want(key: BlockKey) -> Want {
    Want {
        namespace: NAMESPACE,
        key,
        layout: LAYOUT,
    }
}

/// K and V of each layer, all of one size.
fn parts(mib: u64) -> Result<Vec<PartSpec>, Problem> {
    let len = u32::try_from(mib * MIB / (2 * u64::from(LAYERS)))?;
    let part = |layer, code| PartSpec {
        layer,
        code,
        flags: 0,
        stored_len: len,
        raw_len: len,
    };
    Ok((0..LAYERS)
        .flat_map(|layer| [part(layer, PartCode::K), part(layer, PartCode::V)])
        .collect())
}
