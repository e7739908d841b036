//! What was promised so far, and what a run may make of it.
//!
//! Upstairs:   `Run`, which tells it of everything that it does and hears.
//! Downstairs: the store's tables, to judge an eviction by.

use super::*;
use crate::segments::Life;

/// A put under way.
#[derive(Debug, Clone, Copy)]
pub(super) struct Promise {
    pub(super) name: Name,
    /// When it was taken.
    when: u64,
}

/// A read under way.
#[derive(Debug, Clone, Copy)]
pub(super) struct Asked {
    pub(super) name: Name,
    /// When it was begun.
    when: u64,
}

/// See the module.
#[derive(Debug, Default, Clone)]
pub(crate) struct Model {
    clock: u64,
    /// Every put that the store took: version and when.
    attempts: BTreeMap<Name, Vec<(u64, u64)>>,
    /// Acknowledged, and since then neither evicted, condemned nor wiped.
    pub(crate) durable: BTreeSet<Name>,
    /// Sequences of records that the run condemned itself. A put that was answered with one of them
    /// in the very step that brought the damaged read had been answered before.
    condemned: BTreeSet<u64>,
    /// Pinned by somebody, and still here.
    pub(super) pinned: BTreeSet<Name>,
    /// When the last acknowledged wipe of a namespace began.
    wiped: BTreeMap<NamespaceId, u64>,
    pub(super) names: BTreeMap<BlockKey, u64>,
    pub(crate) hits: u64,
    pub(crate) misses: u64,
    pub(crate) damage: u64,
    pub(crate) evictions: u64,
    pub(crate) acked: u64,
    pub(crate) refused: u64,
    pub(crate) scrubs: u64,
    pub(crate) scrub_bad: u64,
}

impl Model {
    pub(super) fn new() -> Self {
        Self {
            names: (0..NUMBERS).map(|number| (key(number), number)).collect(),
            ..Self::default()
        }
    }

    pub(super) fn tick(&mut self) -> u64 {
        self.clock += 1;
        self.clock
    }

    /// The store took a put.
    pub(super) fn took(&mut self, name: Name, version: u64) -> Promise {
        let when = self.tick();
        self.attempts.entry(name).or_default().push((version, when));
        Promise { name, when }
    }

    /// A put came to its end. On a `sound` device it ends well, unless it was wiped meanwhile.
    pub(super) fn ended(
        &mut self,
        promise: Promise,
        result: &Result<Place, PutError>,
        sound: bool,
    ) {
        let Promise { name, when } = promise;
        let wiped = self.wiped.get(&name.0).is_some_and(|wipe| *wipe > when);
        match result {
            Ok(place) => {
                assert!(!wiped, "P3: {name:?} was wiped, and is said to be durable");
                self.acked += 1;
                if !self.condemned.contains(&place.sequence) {
                    self.durable.insert(name);
                }
            }
            Err(problem) => {
                let excused = matches!(problem, PutError::Wiped { .. }) && wiped;
                assert!(excused || !sound, "{name:?} was not stored: {problem}");
                self.refused += 1;
            }
        }
    }

    pub(super) fn wipe_began(&mut self, namespace: NamespaceId) -> u64 {
        self.durable.retain(|name| name.0 != namespace);
        self.pinned.retain(|name| name.0 != namespace);
        self.tick()
    }

    pub(super) fn wipe_held(&mut self, namespace: NamespaceId, when: u64) {
        self.wiped.insert(namespace, when);
    }

    /// P1 and P3 of one hit.
    pub(super) fn check_hit(&mut self, name: Name, record: &Record) {
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

    /// P2: what is promised cannot be absent.
    pub(super) fn absent(&mut self, name: Name) {
        assert!(
            !self.durable.contains(&name),
            "P2: {name:?} was acknowledged and is absent"
        );
        self.misses += 1;
    }

    pub(super) fn asked(&mut self, name: Name) -> Asked {
        let when = self.tick();
        Asked { name, when }
    }

    /// A read that was begun before a wipe is one of what was wiped, whatever came since.
    pub(super) fn absent_since(&mut self, asked: Asked) {
        let wiped = self.wiped.get(&asked.name.0).copied().unwrap_or(0);
        if wiped > asked.when {
            self.misses += 1;
        } else {
            self.absent(asked.name);
        }
    }

    pub(super) fn evicted(&mut self, name: Name) {
        self.evictions += 1;
        self.gone(name);
    }

    /// The run found the record at `place` damaged, and said so.
    pub(super) fn condemned(&mut self, name: Name, place: &Place) {
        self.condemned.insert(place.sequence);
        self.gone(name);
    }

    fn gone(&mut self, name: Name) {
        self.durable.remove(&name);
        self.pinned.remove(&name);
    }
}

/// The store's segments before a step: an eviction in it is judged by them.
pub(super) struct Before {
    sealed: BTreeSet<u32>,
    read: BTreeSet<u32>,
    pinned: BTreeSet<u32>,
}

impl Before {
    pub(super) fn of(store: &Store<SimDisk>) -> Self {
        let numbers = |keep: fn(&crate::segments::Segment) -> bool| {
            let kept = store.segments.iter().filter(|one| keep(one));
            kept.map(|one| one.number).collect()
        };
        Self {
            sealed: numbers(|one| one.life == Life::Sealed),
            read: numbers(|one| one.readers > 0),
            pinned: pinned_segments(store),
        }
    }

    /// P8: a block goes only when there is no other room, from the oldest segment that nobody
    /// reads; a pinned one only when every other segment has pinned blocks as well.
    pub(super) fn judge(&self, store: &Store<SimDisk>, pinned: bool, place: &Place) {
        let others = || {
            let all = store.segments.iter();
            all.filter(|one| one.number != place.segment)
        };
        let count = store.segments.count() as u64;
        let unused = others().find(|one| one.life == Life::Free);
        assert!(
            count == store.segments_max && unused.is_none(),
            "P8: evicted with {count} segments and {unused:?}"
        );
        let now = pinned_segments(store);
        let better = |one: &&crate::segments::Segment| {
            let both = self.sealed.contains(&one.number) && one.life == Life::Sealed;
            let pins = self.pinned.contains(&one.number) || now.contains(&one.number);
            let read = self.read.contains(&one.number) || one.readers > 0;
            both && !pins && (pinned || (!read && one.age() < place.epoch))
        };
        let better = others().find(better);
        assert!(better.is_none(), "P8: {place:?} went before {better:?}");
    }
}

fn pinned_segments(store: &Store<SimDisk>) -> BTreeSet<u32> {
    let pinned = store.blocks().filter(|stored| stored.pinned);
    pinned.map(|stored| stored.place.segment).collect()
}
