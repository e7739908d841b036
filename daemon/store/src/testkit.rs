//! What the unit tests share: records made from a number, and a store that is driven to rest.
//!
//! Upstairs:   the tests of every module.
//! Downstairs: `Store` over `disk::sim`.
#![allow(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    reason = "a panic is the failure report"
)]
#![allow(clippy::cast_possible_truncation, reason = "test numbers are small")]

use std::collections::BTreeMap;
use std::sync::Arc;

use kvtier_proto::{BlockKey, LayoutFingerprint, Level, Miss, NamespaceId, PayloadKind, Quality};

use crate::catalog::Catalog;
use crate::disk::Wait;
use crate::disk::sim::{Seeded, SimDisk, SimOptions};
use crate::mem::{Arena, IoBuf, Share};
use crate::*;

pub(crate) const KIB: u64 = 1024;
pub(crate) const NS: NamespaceId = NamespaceId(7);
pub(crate) const OTHER: NamespaceId = NamespaceId(8);

pub(crate) fn key(number: u64) -> BlockKey {
    let mut random = Seeded::new(number ^ 0x6b65_7973);
    let mut key = [0; 32];
    key.chunks_mut(8)
        .for_each(|run| run.copy_from_slice(&random.draw().to_le_bytes()));
    BlockKey(key)
}

pub(crate) fn layout(number: u8) -> LayoutFingerprint {
    LayoutFingerprint([number; 32])
}

pub(crate) fn want(namespace: NamespaceId, number: u64) -> Want {
    Want {
        namespace,
        key: key(number),
        layout: layout(1),
    }
}

pub(crate) fn meta(namespace: NamespaceId, number: u64) -> RecordMeta {
    RecordMeta {
        namespace,
        key: key(number),
        parent: key(number.wrapping_sub(1)),
        layout: layout(1),
        kind: PayloadKind::Kv,
        level: Level::RAW,
        through: Quality::Exact,
        tokens: 256,
        position: 256 * (number as u32 % 1000),
        codec_tables: 0,
    }
}

/// Part list of record `number`: two layers of K and V, of odd lengths between 1 and 6000 bytes.
pub(crate) fn parts(number: u64) -> Vec<PartSpec> {
    let mut random = Seeded::new(number);
    let mut part = |layer, code| {
        let stored_len = 1 + random.below(6000) as u32;
        PartSpec {
            layer,
            code,
            flags: 0,
            stored_len,
            raw_len: stored_len + 3,
        }
    };
    let codes = [
        (0, PartCode::K),
        (0, PartCode::V),
        (1, PartCode::K),
        (1, PartCode::V),
    ];
    codes
        .into_iter()
        .map(|(layer, code)| part(layer, code))
        .collect()
}

/// Payload of record `number` in `namespace`; `version` tells apart records of one key.
pub(crate) fn payload(namespace: NamespaceId, number: u64, version: u64, len: usize) -> Vec<u8> {
    let mut random = Seeded::new(number ^ version << 32 ^ u64::from(namespace.0) << 48);
    let mut bytes: Vec<u8> = (0..len.div_ceil(8))
        .flat_map(|_| random.draw().to_le_bytes())
        .collect();
    bytes.truncate(len);
    bytes
}

pub(crate) fn stored_len(number: u64) -> usize {
    parts(number)
        .iter()
        .map(|part| part.stored_len as usize)
        .sum()
}

pub(crate) fn build(
    arena: &Arc<Arena>,
    meta: &RecordMeta,
    parts: &[PartSpec],
    bytes: &[u8],
) -> RecordImage {
    let builder = RecordBuilder::new(meta, parts);
    let at = builder.layout().unwrap();
    let mut buf = arena
        .alloc(at.image_len as usize)
        .expect("the test arena is large enough");
    buf.fill(0xee);
    buf[at.head_len as usize..][..bytes.len()].copy_from_slice(bytes);
    builder.build(buf).unwrap()
}

pub(crate) fn image(
    arena: &Arc<Arena>,
    namespace: NamespaceId,
    number: u64,
    version: u64,
) -> RecordImage {
    let bytes = payload(namespace, number, version, stored_len(number));
    let level = Level(version as u8);
    build(
        arena,
        &RecordMeta {
            level,
            through: Quality::from_number((number / 2 % 5) as u8).unwrap(),
            ..meta(namespace, number)
        },
        &parts(number),
        &bytes,
    )
}

pub(crate) fn options() -> StoreOptions {
    let mut options = StoreOptions::new(8 * 256 * KIB, [0x5a; 16]);
    options.segment_size = 256 * KIB;
    options
}

/// A store over a simulated disk, and the arena that its callers would have.
pub(crate) struct Fixture {
    pub(crate) store: Store<SimDisk>,
    pub(crate) arena: Arc<Arena>,
    pub(crate) report: RecoveryReport,
    /// Outcome of every put so far, by tag.
    pub(crate) puts: BTreeMap<u64, Result<Place, PutError>>,
    pub(crate) got: BTreeMap<u64, Result<Vec<u8>, Miss>>,
    pub(crate) evicted: Vec<(NamespaceId, BlockKey)>,
    pub(crate) states: Vec<DeviceState>,
    /// Places that the scrub condemned, and passes that ended.
    pub(crate) condemned: Vec<Place>,
    pub(crate) scrubs: Vec<ScrubProgress>,
    next_tag: u64,
}

impl Fixture {
    pub(crate) fn new() -> Self {
        Self::on(SimDisk::new(SimOptions::default()), options(), None)
    }

    pub(crate) fn on(
        disk: SimDisk,
        options: StoreOptions,
        catalog: Option<Box<dyn Catalog>>,
    ) -> Self {
        let (store, report) = Store::open(disk, options, catalog, &mut |_| {}).unwrap();
        let arena = Arena::create("test", 16 << 20, Share::Private).unwrap();
        let (puts, got) = (BTreeMap::new(), BTreeMap::new());
        let (evicted, states) = (Vec::new(), Vec::new());
        Self {
            store,
            arena,
            report,
            puts,
            got,
            evicted,
            states,
            condemned: Vec::new(),
            scrubs: Vec::new(),
            next_tag: 1,
        }
    }

    /// Steps until nothing moves any more.
    pub(crate) fn rest(&mut self) {
        for _ in 0..100_000 {
            self.step();
            if self.store.is_idle() {
                return;
            }
        }
        panic!("the store does not come to rest: {:?}", self.store.usage());
    }

    pub(crate) fn step(&mut self) {
        let mut events = Vec::new();
        self.store.step(Wait::One, &mut events);
        events.into_iter().for_each(|event| self.note(event));
    }

    pub(crate) fn note(&mut self, event: Event) {
        match event {
            Event::Put { tag, result, .. } => assert!(self.puts.insert(tag, result).is_none()),
            Event::Got { tag, result } => {
                let verified = match result {
                    Ok(unverified) => unverified.verify().map_err(|(_, miss)| miss),
                    Err((_, miss)) => Err(miss),
                };
                let bytes = verified.map(|record| record.payload().to_vec());
                self.got.insert(tag, bytes);
            }
            Event::Evicted { namespace, key, .. } => self.evicted.push((namespace, key)),
            Event::Device(state) => self.states.push(state),
            Event::Scrub(to_check) => {
                let checked = to_check.check();
                if self.store.scrubbed(&checked) {
                    self.condemned.push(checked.place());
                }
            }
            Event::Scrubbed(progress) => self.scrubs.push(progress),
        }
    }

    pub(crate) fn tag(&mut self) -> u64 {
        self.next_tag += 1;
        self.next_tag - 1
    }

    /// Queues a put and returns its tag.
    pub(crate) fn put(&mut self, namespace: NamespaceId, number: u64, version: u64) -> u64 {
        let tag = self.tag();
        let image = image(&self.arena, namespace, number, version);
        if let Err((_, problem)) = self.store.put(tag, image) {
            self.puts.insert(tag, Err(problem));
        }
        tag
    }

    /// Puts the records `numbers` and waits until all are durable.
    pub(crate) fn put_all(&mut self, numbers: impl IntoIterator<Item = u64>) {
        let tags: Vec<u64> = numbers
            .into_iter()
            .map(|number| self.put(NS, number, 0))
            .collect();
        self.rest();
        assert!(
            tags.iter().all(|tag| self.puts[tag].is_ok()),
            "{:?}",
            self.puts
        );
    }

    pub(crate) fn buf(&self) -> IoBuf {
        self.arena
            .alloc(64 * 1024)
            .expect("the test arena is large enough")
    }

    /// Reads a whole record.
    pub(crate) fn get(&mut self, want: &Want) -> Result<Vec<u8>, Miss> {
        let (tag, buf) = (self.tag(), self.buf());
        self.store.get(tag, want, buf).map_err(|(_, miss)| miss)?;
        self.rest();
        self.got.remove(&tag).expect("a read is answered")
    }

    /// True when the record is there and right; a miss is false; wrong bytes are a panic.
    pub(crate) fn hits(&mut self, number: u64) -> bool {
        match self.get(&want(NS, number)) {
            Ok(bytes) => {
                assert_eq!(
                    bytes,
                    payload(NS, number, 0, stored_len(number)),
                    "wrong bytes"
                );
                true
            }
            Err(_) => false,
        }
    }

    pub(crate) fn place(&self, number: u64) -> Place {
        self.store
            .peek(NS, &key(number))
            .expect("the block is here")
            .place
    }

    /// The store opened again on `disk`.
    pub(crate) fn reopened(disk: SimDisk) -> Self {
        Self::on(disk, options(), None)
    }

    /// All blocks with their places, for comparing indexes.
    pub(crate) fn index(&self) -> BTreeMap<(NamespaceId, BlockKey), Place> {
        self.store
            .blocks()
            .map(|one| ((one.namespace, one.key), one.place))
            .collect()
    }
}
