//! The judge of the store: a model that knows what was promised, and seeded runs against it.
//!
//! Upstairs:   the tests beside it: no faults, crashes at every operation, every fault at once,
//!             many lives with a catalog that cannot be relied on; `counts` says what they did.
//! Downstairs: `Store` over `disk::sim`.
//!
//! The oracle: P1 a hit has the exact bytes of a put of that key that no wipe followed; P2 what
//! was acknowledged durable and neither evicted nor wiped is found after a crash; P3 nothing put
//! before an acknowledged wipe is found; P4 recovery can be cut short and repeated; P5 files
//! never exceed the capacity; P6 with faults off the store gets well; P7 the rebuilt index holds
//! the live one, and otherwise only what was evicted and not yet overwritten; the index that a
//! catalog gives is the rebuilt one.
#![allow(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    reason = "a panic is the failure report"
)]
#![allow(clippy::cast_possible_truncation, reason = "test numbers are small")]

mod catalog;
mod counts;
mod crash;
mod faulty;
mod lives;
mod planted;
mod sound;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use kvtier_proto::{BlockKey, Miss, NamespaceId};

use crate::disk::sim::{Seeded, SimDisk};
use crate::disk::{Disk, Wait};
use crate::mem::{Arena, Share};
use crate::testkit::*;
use crate::*;

use catalog::{Shelf, Spoil};
use counts::Counts;
/// Fast enough that a pass ends within a run. Unit: bytes a second.
const SCRUB_RATE: u64 = 1 << 30;

/// Keys of a run: few, so that they meet again.
const NUMBERS: u64 = 90;

type Name = (NamespaceId, u64);

/// What was promised so far.
#[derive(Debug, Default, Clone)]
pub(crate) struct Model {
    clock: u64,
    /// Every put that the store took: version and when.
    attempts: BTreeMap<Name, Vec<(u64, u64)>>,
    /// Acknowledged, and since then neither evicted, condemned nor wiped.
    durable: BTreeSet<Name>,
    /// When the last acknowledged wipe of a namespace began.
    wiped: BTreeMap<NamespaceId, u64>,
    names: BTreeMap<BlockKey, u64>,
    pub(crate) hits: u64,
    pub(crate) misses: u64,
    pub(crate) damage: u64,
    pub(crate) evictions: u64,
    pub(crate) acked: u64,
    pub(crate) scrubs: u64,
    pub(crate) scrub_bad: u64,
}

impl Model {
    fn tick(&mut self) -> u64 {
        self.clock += 1;
        self.clock
    }

    /// P1 and P3 of one hit.
    fn check_hit(&mut self, name: Name, record: &Record) {
        let version = u64::from(record.head().header.summary.level.0);
        let after = self.wiped.get(&name.0).copied().unwrap_or(0);
        let attempts = self
            .attempts
            .get(&name)
            .map(Vec::as_slice)
            .unwrap_or_default();
        let allowed = attempts
            .iter()
            .any(|(put, when)| *put == version && *when > after);
        assert!(
            allowed,
            "P3: {name:?} version {version} is gone since {after}: {attempts:?}"
        );
        let all = payload(name.0, name.1, version, stored_len(name.1));
        let rows = &record.head().parts()[record.parts()];
        let from = rows[0].offset as usize;
        let len: usize = rows.iter().map(|part| part.stored_len as usize).sum();
        assert!(
            record.payload() == &all[from..from + len],
            "P1: wrong bytes of {name:?}"
        );
        self.hits += 1;
    }

    fn evicted(&mut self, namespace: NamespaceId, key: &BlockKey) {
        self.evictions += 1;
        self.durable.remove(&(namespace, self.names[key]));
    }
}

/// One seeded run.
pub(crate) struct Run {
    pub(crate) store: Store<SimDisk>,
    pub(crate) model: Model,
    pub(crate) random: Seeded,
    /// What the opening found.
    pub(crate) report: RecoveryReport,
    /// What happened to the catalog before it.
    pub(crate) spoil: Spoil,
    /// The catalog failed or was deleted in this life.
    pub(crate) gave_up: bool,
    arena: Arc<Arena>,
    shelf: Shelf,
    next_tag: u64,
    puts: BTreeMap<u64, Name>,
    reads: BTreeMap<u64, Name>,
}

/// What outlives a store.
struct Past {
    model: Model,
    random: Seeded,
    arena: Arc<Arena>,
    shelf: Shelf,
    next_tag: u64,
}

impl Run {
    pub(crate) fn new(seed: u64, disk: SimDisk) -> Option<Self> {
        let names = (0..NUMBERS).map(|number| (key(number), number)).collect();
        let model = Model {
            names,
            ..Model::default()
        };
        let past = Past {
            model,
            random: Seeded::new(seed),
            arena: arena(),
            shelf: Shelf::default(),
            next_tag: 1,
        };
        Self::open(disk, past)
    }

    fn open(disk: SimDisk, past: Past) -> Option<Self> {
        let Past {
            mut model,
            mut random,
            arena,
            shelf,
            next_tag,
        } = past;
        let spoil = shelf.spoil_somehow(&mut random);
        let opened = Store::open(disk, options(), shelf.catalog(), &mut |_| {});
        let (mut store, report) = opened.ok()?;
        // Saves that wait for reads hide bugs that need a segment to be written during one.
        if random.below(2) == 0 {
            store.lane.never_hold();
        }
        model.tick();
        Some(Self {
            store,
            model,
            random,
            report,
            spoil,
            gave_up: false,
            arena,
            shelf,
            next_tag,
            puts: BTreeMap::new(),
            reads: BTreeMap::new(),
        })
    }

    fn tag(&mut self) -> u64 {
        self.next_tag += 1;
        self.next_tag
    }

    fn some_name(&mut self) -> Name {
        let namespace = if self.random.below(4) == 0 { OTHER } else { NS };
        (namespace, self.random.below(NUMBERS))
    }

    /// Does `actions` random things.
    pub(crate) fn act(&mut self, actions: u64) {
        for _ in 0..actions {
            match self.random.below(100) {
                0..45 => self.put(),
                45..65 => self.get(),
                65..70 => self.get_neighbours(),
                70..73 => self.pin(),
                73 if self.random.below(4) == 0 => self.wipe(),
                74 if self.random.below(8) == 0 => self.lose_catalog(),
                75 => self.store.scrub(SCRUB_RATE),
                _ => self.step(),
            }
        }
    }

    fn put(&mut self) {
        let (name, tag) = (self.some_name(), self.tag());
        let version = self.random.below(3);
        let image = image(&self.arena, name.0, name.1, version);
        let when = self.model.tick();
        if self.store.put(tag, image).is_ok() {
            self.puts.insert(tag, name);
            self.model
                .attempts
                .entry(name)
                .or_default()
                .push((version, when));
        }
    }

    fn get(&mut self) {
        let (name, tag) = (self.some_name(), self.tag());
        let Some(buf) = self.arena.alloc(64 * 1024) else {
            return self.step();
        };
        let want = want(name.0, name.1);
        let taken = if self.random.below(2) == 0 {
            self.store.get(tag, &want, buf)
        } else {
            let first = self.random.below(4) as usize;
            let last = first + 1 + self.random.below(4 - first as u64) as usize;
            self.store.get_parts(tag, &want, first..last, buf)
        };
        match taken {
            Ok(()) => drop(self.reads.insert(tag, name)),
            Err((_, Miss::Absent)) => self.absent(name),
            Err(_) => {}
        }
    }

    /// Reads a few records that lie side by side, as a restore of a prefix does.
    fn get_neighbours(&mut self) {
        let name = self.some_name();
        let Some(first) = self.store.peek(name.0, &key(name.1)) else {
            return self.get();
        };
        let mut near: Vec<Stored> = self.store.blocks().collect();
        near.retain(|one| {
            let (one, first) = (&one.place, &first.place);
            one.segment == first.segment && one.offset >= first.offset
        });
        near.sort_by_key(|one| one.place.offset);
        for stored in near.into_iter().take(4) {
            let name = (stored.namespace, self.model.names[&stored.key]);
            let (tag, buf) = (self.tag(), self.arena.alloc(64 * 1024));
            let Some(buf) = buf else { return };
            if self.store.get(tag, &want(name.0, name.1), buf).is_ok() {
                self.reads.insert(tag, name);
            }
        }
    }

    /// P2: what is promised cannot be absent.
    fn absent(&mut self, name: Name) {
        assert!(
            !self.model.durable.contains(&name),
            "P2: {name:?} was acknowledged and is absent"
        );
        self.model.misses += 1;
    }

    pub(crate) fn pin(&mut self) {
        let name = self.some_name();
        if self.random.below(3) == 0 {
            self.store.unpin(name.0, &key(name.1));
        } else {
            self.store.pin(name.0, &key(name.1));
        }
    }

    fn wipe(&mut self) {
        let namespace = if self.random.below(2) == 0 { NS } else { OTHER };
        let when = self.model.tick();
        let mut events = Vec::new();
        let outcome = self.store.wipe(namespace, &mut events);
        self.model.durable.retain(|name| name.0 != namespace);
        if outcome.is_ok() {
            self.model.wiped.insert(namespace, when);
        }
        events.into_iter().for_each(|event| self.note(event));
    }

    /// The catalog goes while it is in use: by a hand or by an error. Nothing may depend on it.
    fn lose_catalog(&mut self) {
        self.gave_up = true;
        match self.random.below(2) {
            0 => self.shelf.delete(),
            _ => self.shelf.fail(),
        }
    }

    pub(crate) fn step(&mut self) {
        let mut events = Vec::new();
        self.store.step(Wait::One, &mut events);
        events.into_iter().for_each(|event| self.note(event));
        let files = self.store.disk_mut().list().unwrap_or_default();
        let segments = files
            .iter()
            .filter(|file| file.name.starts_with("segment-"))
            .count();
        assert!(segments as u64 <= 8, "P5: {segments} segment files");
    }

    pub(crate) fn rest(&mut self) {
        for _ in 0..20_000 {
            if self.store.is_idle() {
                return;
            }
            self.step();
        }
        panic!("the store does not come to rest: {:?}", self.store.usage());
    }

    fn note(&mut self, event: Event) {
        match event {
            Event::Put { tag, image, result } => {
                let name = self.puts.remove(&tag).expect("a put is answered once");
                // Whoever put it goes on with this memory: it must be the record's own.
                let own = |image: RecordImage| image.into_buf()[48..80] == key(name.1).0;
                let own = image.is_none_or(own);
                assert!(own, "{name:?} got the memory of another put");
                if result.is_ok() {
                    self.model.acked += 1;
                    self.model.durable.insert(name);
                }
            }
            Event::Got { tag, result } => {
                let name = self.reads.remove(&tag).expect("a read is answered once");
                self.got(name, result);
            }
            Event::Evicted { namespace, key, .. } => self.model.evicted(namespace, &key),
            Event::Device(_) => {}
            Event::Scrub(to_check) => self.scrubbed(&to_check.check()),
            Event::Scrubbed(_) => self.model.scrubs += 1,
        }
    }

    /// What the scrub condemns is gone, and must be as bad as it says.
    fn scrubbed(&mut self, checked: &Checked) {
        if self.store.scrubbed(checked) {
            let name = (checked.namespace(), self.model.names[&checked.key()]);
            self.model.damage += 1;
            self.model.scrub_bad += 1;
            self.model.durable.remove(&name);
        }
    }

    fn got(&mut self, name: Name, result: Result<Unverified, (Option<crate::mem::IoBuf>, Miss)>) {
        let unverified = match result {
            Ok(unverified) => unverified,
            Err((_, miss)) => return self.missed(name, miss, None),
        };
        let place = unverified.place();
        match unverified.verify() {
            Ok(record) => self.model.check_hit(name, &record),
            Err((buf, miss)) => {
                assert!(
                    buf.iter().all(|byte| *byte == 0),
                    "a refused buffer keeps bytes"
                );
                self.missed(name, miss, Some(place));
            }
        }
    }

    fn missed(&mut self, name: Name, miss: Miss, place: Option<Place>) {
        if miss.is_damage() || miss == Miss::StaleEpoch {
            self.model.damage += 1;
            if let Some(place) = place
                && self.store.condemn(name.0, &key(name.1), &place, miss)
            {
                self.model.durable.remove(&name);
            }
        } else if miss == Miss::Absent {
            self.absent(name);
        } else {
            self.model.misses += 1;
        }
    }

    /// Reads every name once; what is durable must hit.
    pub(crate) fn read_all(&mut self) {
        for namespace in [NS, OTHER] {
            for number in 0..NUMBERS {
                let (tag, name) = (self.tag(), (namespace, number));
                let buf = self.arena.alloc(64 * 1024).unwrap();
                match self.store.get(tag, &want(namespace, number), buf) {
                    Ok(()) => drop(self.reads.insert(tag, name)),
                    Err((_, Miss::Absent)) => self.absent(name),
                    Err((_, miss)) => panic!("{name:?}: {miss:?}"),
                }
                self.rest();
            }
        }
    }

    /// The store opened again on what a crash left, or on what a restart keeps.
    pub(crate) fn reopen(self, change: impl FnOnce(SimDisk) -> SimDisk) -> Option<Self> {
        let past = Past {
            model: self.model,
            random: self.random,
            arena: self.arena,
            shelf: self.shelf,
            next_tag: self.next_tag,
        };
        Self::open(change(self.store.abandon()), past)
    }

    /// Another store on `disk`, beside this one, to which the same was promised.
    pub(crate) fn fork(&self, disk: SimDisk) -> Option<Self> {
        let past = Past {
            model: self.model.clone(),
            random: self.random.clone(),
            arena: arena(),
            shelf: self.shelf.copy(),
            next_tag: self.next_tag,
        };
        Self::open(disk, past)
    }

    /// An end in order and the next life, with or without a power cut in between.
    pub(crate) fn close(self, seed: u64) -> Self {
        let Run {
            store,
            mut model,
            mut puts,
            mut reads,
            ..
        } = self;
        let mut events = Vec::new();
        let disk = store.close(&mut events);
        for event in events {
            match event {
                Event::Put { tag, result, .. } => {
                    let name = puts.remove(&tag).expect("a put is answered once");
                    match result {
                        Ok(_) => drop(model.durable.insert(name)),
                        Err(PutError::Wiped { .. }) => {}
                        Err(problem) => panic!("a close makes everything durable: {problem}"),
                    }
                }
                Event::Evicted { namespace, key, .. } => model.evicted(namespace, &key),
                Event::Got { tag, .. } => drop(reads.remove(&tag)),
                Event::Device(state) => panic!("{state:?}"),
                Event::Scrub(_) | Event::Scrubbed(_) => {}
            }
        }
        let answered = puts.is_empty() && reads.is_empty();
        assert!(answered, "a close answers everybody");
        let disk = match seed % 2 {
            0 => disk.restart(seed),
            _ => disk.crash(seed),
        };
        let past = Past {
            model,
            random: self.random,
            arena: self.arena,
            shelf: self.shelf,
            next_tag: self.next_tag,
        };
        Self::open(disk, past).expect("an end in order leaves a store")
    }

    /// Whoever saves a block that is here is told that it is durable: from now on it must stay.
    pub(crate) fn promise_what_is_here(&mut self) {
        let here: Vec<Name> = (self.index().keys())
            .map(|(namespace, key)| (*namespace, self.model.names[key]))
            .collect();
        self.model.durable.extend(here);
    }

    /// Blocks with their places.
    pub(crate) fn index(&self) -> BTreeMap<(NamespaceId, BlockKey), Place> {
        self.store
            .blocks()
            .map(|one| ((one.namespace, one.key), one.place))
            .collect()
    }
}

fn arena() -> Arc<Arena> {
    Arena::create("campaign", 8 << 20, Share::Private).unwrap()
}
