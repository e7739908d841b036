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
mod life;
mod lives;
mod model;
mod planted;
mod sound;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use kvtier_proto::{BlockKey, Miss, NamespaceId};

use crate::disk::sim::{Seeded, SimDisk};
use crate::disk::{Disk, Wait};
use crate::mem::Arena;
use crate::testkit::*;
use crate::*;

use catalog::{Shelf, Spoil};
use counts::Counts;
use life::device;
use model::{Asked, Before, Model, Promise};

/// Fast enough that a pass ends within a run. Unit: bytes a second.
const SCRUB_RATE: u64 = 1 << 30;

/// Keys of a run: few, so that they meet again.
const NUMBERS: u64 = 90;

type Name = (NamespaceId, u64);

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
    window_bytes: u64,
    next_tag: u64,
    /// The device was sound when this life began: until the power goes nothing may fail.
    sound: bool,
    /// In some life it was not: records may be damaged.
    tainted: bool,
    /// The log was poisoned in this life.
    poisoned: bool,
    puts: BTreeMap<u64, Promise>,
    reads: BTreeMap<u64, Asked>,
}

impl Run {
    /// True while the device does what it is told.
    fn is_sound(&self) -> bool {
        self.sound && !self.store.disk().has_crashed()
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
        if self.arena.alloc(64 * 1024).is_none() {
            // Puts that wait have all of it.
            return self.step();
        }
        let image = image(&self.arena, name.0, name.1, version);
        match self.store.put(tag, image) {
            Ok(()) => {
                let promise = self.model.took(name, version);
                self.puts.insert(tag, promise);
            }
            Err((_, problem)) => {
                assert!(!self.is_sound(), "{name:?} was refused: {problem}");
                self.model.refused += 1;
            }
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
            Ok(()) => self.asked(tag, name),
            Err((_, Miss::Absent)) => self.model.absent(name),
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
                self.asked(tag, name);
            }
        }
    }

    pub(crate) fn pin(&mut self) {
        let name = self.some_name();
        if self.random.below(3) == 0 {
            self.store.unpin(name.0, &key(name.1));
            self.model.pinned.remove(&name);
        } else if self.store.pin(name.0, &key(name.1)) {
            self.model.pinned.insert(name);
        }
    }

    fn wipe(&mut self) {
        let namespace = if self.random.below(2) == 0 { NS } else { OTHER };
        let when = self.model.wipe_began(namespace);
        let mut events = Vec::new();
        match self.store.wipe(namespace, &mut events) {
            Ok(_) => self.model.wipe_held(namespace, when),
            Err(problem) => assert!(!self.is_sound(), "{problem}"),
        }
        events.into_iter().for_each(|event| self.note(event, None));
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
        let (before, mut events) = (Before::of(&self.store), Vec::new());
        self.store.step(Wait::One, &mut events);
        for event in events {
            self.note(event, Some(&before));
        }
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
                return self.at_rest();
            }
            self.step();
        }
        panic!("the store does not come to rest: {:?}", self.store.usage());
    }

    /// Everybody is answered, and whatever is pinned is known to be.
    fn at_rest(&self) {
        let answered = self.puts.is_empty() && self.reads.is_empty();
        assert!(answered, "{:?} {:?}", self.puts, self.reads);
        for name in &self.model.pinned {
            let here = self.store.peek(name.0, &key(name.1));
            let pinned = here.is_some_and(|here| here.pinned);
            assert!(pinned, "the pin of {name:?} was lost: {here:?}");
        }
    }

    /// Takes what happened, in a step that began with `before`.
    fn note(&mut self, event: Event, before: Option<&Before>) {
        match event {
            Event::Put { tag, image, result } => {
                let promise = self.puts.remove(&tag).expect("a put is answered once");
                let name = promise.name;
                // Whoever put it goes on with this memory: it must be the record's own.
                let own = |image: RecordImage| image.into_buf()[48..80] == key(name.1).0;
                let own = image.is_none_or(own);
                assert!(own, "{name:?} got the memory of another put");
                self.model.ended(promise, &result, self.is_sound());
            }
            Event::Got { tag, result } => {
                let asked = self.reads.remove(&tag).expect("a read is answered once");
                self.got(asked, result);
            }
            Event::Evicted {
                namespace,
                key,
                place,
                ..
            } => self.evicted((namespace, self.model.names[&key]), &place, before),
            Event::Device(state) => self.changed(state),
            Event::Scrub(to_check) => self.scrubbed(&to_check.check()),
            Event::Scrubbed(_) => self.model.scrubs += 1,
        }
    }

    fn evicted(&mut self, name: Name, place: &Place, before: Option<&Before>) {
        // Nothing is overwritten any more: what is there is as good as it was.
        assert!(!self.poisoned, "P8: {name:?} went from a poisoned log");
        if let Some(before) = before.filter(|_| self.is_sound()) {
            // A damaged record cannot be kept by anybody.
            let pinned = self.model.pinned.contains(&name) && !self.tainted;
            before.judge(&self.store, pinned, place);
        }
        self.model.evicted(name);
    }

    fn changed(&mut self, state: DeviceState) {
        let fine = state <= DeviceState::Slow && state != DeviceState::Full;
        assert!(fine || !self.is_sound(), "a sound device is {state:?}");
        self.poisoned |= state >= DeviceState::ReadOnly;
    }

    /// What the scrub condemns is gone, and must be as bad as it says.
    fn scrubbed(&mut self, checked: &Checked) {
        if self.store.scrubbed(checked) {
            let name = (checked.namespace(), self.model.names[&checked.key()]);
            self.model.damage += 1;
            self.model.scrub_bad += 1;
            self.model.condemned(name, &checked.place());
        }
    }

    fn asked(&mut self, tag: u64, name: Name) {
        let asked = self.model.asked(name);
        self.reads.insert(tag, asked);
    }

    fn got(&mut self, asked: Asked, result: Result<Unverified, (Option<crate::mem::IoBuf>, Miss)>) {
        let name = asked.name;
        let unverified = match result {
            Ok(unverified) => unverified,
            Err((_, Miss::Absent)) => return self.model.absent_since(asked),
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
                self.model.condemned(name, &place);
            }
        } else if miss == Miss::Absent {
            self.model.absent(name);
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
                    Ok(()) => self.asked(tag, name),
                    Err((_, Miss::Absent)) => self.model.absent(name),
                    Err((_, miss)) => panic!("{name:?}: {miss:?}"),
                }
                self.rest();
            }
        }
    }

    /// True when there are segments to make room with that were read whole.
    pub(crate) fn has_victims(&self) -> bool {
        let sealed = |life| life == crate::segments::Life::Sealed;
        let all = self.store.segments.iter();
        all.filter(|one| sealed(one.life) && !one.unread).count() > 1
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
