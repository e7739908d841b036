//! How a life of the store begins and ends, and what the next one knows of it.
//!
//! Upstairs:   the runs.
//! Downstairs: `Store::open` and `Store::close` over `disk::sim`.

use super::*;
use crate::disk::sim::SimOptions;
use crate::mem::Share;

/// What outlives a store.
pub(super) struct Past {
    model: Model,
    random: Seeded,
    arena: Arc<Arena>,
    pub(super) shelf: Shelf,
    window_bytes: u64,
    next_tag: u64,
    tainted: bool,
}

impl Past {
    /// The same promises, for a life beside this one that goes another way.
    pub(super) fn fork(&self, salt: u64) -> Self {
        Self {
            model: self.model.clone(),
            random: Seeded::new(self.random.clone().draw() ^ salt),
            arena: arena(),
            shelf: self.shelf.copy(),
            ..*self
        }
    }
}

/// A device of the shape that `seed` decides.
pub(super) fn device(seed: u64) -> SimOptions {
    let mut random = Seeded::new(seed ^ 0x6465_7669_6365);
    let mut some = |of: &[usize]| of[random.below(of.len() as u64) as usize];
    SimOptions {
        seed,
        depth: some(&[1, 2, 32, 32]),
        align: some(&[512, 4096]),
        ..SimOptions::default()
    }
}

impl Run {
    pub(crate) fn new(seed: u64, disk: SimDisk) -> Option<Self> {
        let mut random = Seeded::new(seed);
        let windows = [64 * KIB, 256 * KIB, 64 << 20];
        let past = Past {
            model: Model::new(),
            window_bytes: windows[random.below(windows.len() as u64) as usize],
            random,
            arena: arena(),
            shelf: Shelf::default(),
            next_tag: 1,
            tainted: false,
        };
        Self::open(disk, past)
    }

    pub(super) fn open(disk: SimDisk, past: Past) -> Option<Self> {
        let Past {
            mut model,
            mut random,
            arena,
            shelf,
            window_bytes,
            next_tag,
            mut tainted,
        } = past;
        let (spoil, sound) = (shelf.spoil_somehow(&mut random), disk.is_sound());
        tainted |= !sound;
        // Where the superblock is lost, no record of before may pass for one of the new store.
        let draws = [random.draw(), random.draw()];
        let id: Vec<u8> = draws.into_iter().flat_map(u64::to_le_bytes).collect();
        let options = StoreOptions {
            window_bytes,
            new_store_id: StoreId(id.try_into().unwrap()),
            ..options()
        };
        let opened = Store::open(disk, options, shelf.catalog(), &mut |_| {});
        let (mut store, report) = opened.ok()?;
        // Saves that wait for reads hide bugs that need a segment to be written during one.
        if random.below(2) == 0 {
            store.lane.never_hold();
        }
        model.tick();
        model.pinned.clear();
        let poisoned = store.is_poisoned();
        assert!(
            !(sound && store.disk().is_sound() && poisoned),
            "not healthy"
        );
        Some(Self {
            store,
            model,
            random,
            report,
            spoil,
            gave_up: false,
            arena,
            shelf,
            window_bytes,
            next_tag,
            sound,
            tainted,
            poisoned,
            puts: BTreeMap::new(),
            reads: BTreeMap::new(),
        })
    }

    /// What the next life knows of this one, and its disk as it stands.
    fn leave(self) -> (SimDisk, Past) {
        let past = Past {
            model: self.model,
            random: self.random,
            arena: self.arena,
            shelf: self.shelf,
            window_bytes: self.window_bytes,
            next_tag: self.next_tag,
            tainted: self.tainted,
        };
        (self.store.abandon(), past)
    }

    /// The store opened again on what a crash left, or on what a restart keeps.
    pub(crate) fn reopen(self, change: impl FnOnce(SimDisk) -> SimDisk) -> Option<Self> {
        let (disk, past) = self.leave();
        Self::open(change(disk), past)
    }

    /// Another store on `disk`, beside this one, to which the same was promised.
    pub(crate) fn fork(&self, disk: SimDisk) -> Option<Self> {
        let past = Past {
            model: self.model.clone(),
            random: self.random.clone(),
            arena: arena(),
            shelf: self.shelf.copy(),
            window_bytes: self.window_bytes,
            next_tag: self.next_tag,
            tainted: self.tainted,
        };
        Self::open(disk, past)
    }

    /// An end in order and the next life, with or without a power cut in between.
    pub(crate) fn close(self, seed: u64) -> Self {
        let (disk, past) = self.end(None);
        Self::open(found_after_end(&disk, seed), past).expect("an end in order leaves a store")
    }

    /// An end in order, unless the power goes after so many operations of it.
    pub(super) fn end(mut self, power_goes_after: Option<u64>) -> (SimDisk, Past) {
        if let Some(operations) = power_goes_after {
            self.store.disk_mut().cut_power_after(operations);
        }
        let Run {
            store,
            mut model,
            mut puts,
            mut reads,
            ..
        } = self;
        let mut events = Vec::new();
        let disk = store.close(&mut events);
        let sound = !disk.has_crashed();
        for event in events {
            match event {
                Event::Put { tag, result, .. } => {
                    let promise = puts.remove(&tag).expect("a put is answered once");
                    model.ended(promise, &result, sound);
                }
                Event::Evicted { namespace, key, .. } => {
                    model.evicted((namespace, model.names[&key]));
                }
                Event::Got { tag, .. } => drop(reads.remove(&tag)),
                Event::Device(state) => assert!(!sound || state < DeviceState::ReadOnly),
                Event::Scrub(_) | Event::Scrubbed(_) => {}
            }
        }
        let answered = puts.is_empty() && reads.is_empty();
        assert!(answered, "a close answers everybody");
        let past = Past {
            model,
            random: self.random,
            arena: self.arena,
            shelf: self.shelf,
            window_bytes: self.window_bytes,
            next_tag: self.next_tag,
            tainted: self.tainted,
        };
        (disk, past)
    }
}

/// What the next life finds behind an end in order, with or without a power cut in between.
pub(super) fn found_after_end(disk: &SimDisk, seed: u64) -> SimDisk {
    match seed % 2 {
        0 => disk.restart(seed),
        _ => disk.crash(seed),
    }
}

/// Memory of a caller.
pub(super) fn arena() -> Arc<Arena> {
    Arena::create("campaign", 8 << 20, Share::Private).unwrap()
}
