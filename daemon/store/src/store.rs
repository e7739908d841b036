//! The store: one device's records, a step machine that one thread owns.
//!
//! Upstairs:   the daemon's store thread.
//! Downstairs: `lane` moves bytes, `index` finds, `segments` keeps the files' lives.
//!
//! ```text
//!   put ---> queue ---> placed, writing ---> written ---> sync ---> published, Event::Put
//!                 (window of bytes)     (barrier: the batch)
//!   get ---> read in flight ---> Event::Got(Unverified)
//! ```
//!
//! Group commit: the first record of a segment that is written closes the batch: everything
//! placed so far belongs to it. When all of it is written, one sync makes it durable; records
//! placed meanwhile gather for the next.
//!
//! Invariants kept here: L1, L2, L3, W1 of the crate's header, in the rooms below.
//!
//! Not here on purpose: no deadline. The caller orders its puts and gives up on a read by ignoring
//! its event; the buffer comes home all the same. Who goes first on the device is `lane`'s to say.

mod append;
mod commit;
mod condition;
mod fetch;
mod heads;
mod options;
mod reclaim;
mod recode;
mod scrub;
mod wipe;

pub use options::StoreOptions;
pub use wipe::Forgotten;

use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::{Arc, Weak};

use kvtier_proto::{BlockKey, Miss, NamespaceId};
use strum::IntoEnumIterator;

use crate::catalog::Catalog;
use crate::disk::{Disk, Wait};
use crate::events::{Counter, Counters, DeviceState, Event, Usage};
use crate::format::segment::footer_len;
use crate::format::{BLOCK, Place, StoreId, index};
use crate::image::RecordImage;
use crate::index::{Index, Stored};
use crate::lane::Lane;
use crate::mem::{Arena, IoBuf};
use crate::recover::{OpenError, Progress, RecoveryReport};
use crate::segments::Segments;
use crate::superblock::SuperFile;

use append::{Queued, Tail};
pub(crate) use commit::trailer_of;
use reclaim::Drain;
pub use scrub::{Checked, ScrubProgress, ToCheck};

/// Most segments of a store: 256 TiB at the default segment size.
pub const SEGMENTS_MAX: u64 = 1 << 20;
/// Fewest segments: one open, one being sealed, one to read, one to recycle.
pub const SEGMENTS_MIN: u64 = 4;
/// Failed writes in a row after which the log is poisoned.
pub const WRITE_ERRORS_MAX: u32 = 3;

/// What a transfer in flight is for.
#[derive(Debug)]
enum Flight {
    SegmentHeader {
        segment: u32,
        tries: u32,
    },
    HeaderSync {
        segment: u32,
    },
    Record(append::Writing),
    Sync {
        segment: u32,
        covers: Vec<append::Written>,
    },
    Footer {
        segment: u32,
    },
    FooterSync {
        segment: u32,
    },
    Read(fetch::Reading),
    Forward {
        stored: Stored,
    },
    Scrub(scrub::Item),
}

/// One device's store. See the crate's header for how to drive it.
#[derive(Debug)]
pub struct Store<D: Disk> {
    pub(crate) options: StoreOptions,
    pub(crate) lane: Lane<D>,
    pub(crate) arena: Arc<Arena>,
    /// Memory for records that `arena` has no room for, as long as one of them is in use.
    large: RefCell<Weak<Arena>>,
    pub(crate) superfile: SuperFile,
    pub(crate) index: Index,
    pub(crate) segments: Segments,
    pub(crate) catalog: Option<Box<dyn Catalog>>,
    pub(crate) changed: crate::catalog::Changed,
    flights: BTreeMap<u64, Flight>,
    queue: VecDeque<Queued>,
    forwards: VecDeque<Queued>,
    tails: BTreeMap<u32, Tail>,
    active: Option<u32>,
    /// The segment that comes next: being prepared, or ready.
    spare: Option<u32>,
    drain: Option<Drain>,
    writing_bytes: u64,
    /// Namespaces that were wiped in this life and have placed nothing since.
    blank: BTreeSet<NamespaceId>,
    pub(crate) next_sequence: u64,
    pub(crate) next_epoch: u64,
    /// Fewer than the capacity allows after the device ran out of room.
    pub(crate) segments_max: u64,
    recycled_when_full: u64,
    write_errors_in_a_row: u32,
    poisoned: Option<u64>,
    condition: condition::Condition,
    counters: Counters,
    misses: BTreeMap<Miss, u64>,
    heads: heads::Heads,
    scrub: Option<scrub::Pass>,
    /// Passes that were started.
    scrubs: u64,
    /// For tests of what happens then.
    #[cfg(test)]
    no_memory: bool,
}

impl<D: Disk> Store<D> {
    /// Opens the store in the disk's directory, or makes one. Blocks until the index is whole;
    /// `progress` is called as it grows.
    ///
    /// Errors: the options are out of bounds, or the device does not let the superblock be read.
    /// Damage is not an error: it is counted in the report.
    pub fn open(
        disk: D,
        options: StoreOptions,
        catalog: Option<Box<dyn Catalog>>,
        progress: &mut dyn FnMut(&Progress),
    ) -> Result<(Self, RecoveryReport), OpenError> {
        crate::recover::open(disk, options, catalog, progress)
    }

    /// A store with nothing in it yet; `recover` fills it.
    pub(crate) fn empty(
        options: StoreOptions,
        lane: Lane<D>,
        arena: Arc<Arena>,
        superfile: SuperFile,
        catalog: Option<Box<dyn Catalog>>,
    ) -> Self {
        let now = superfile.now();
        let life = u64::from(now.incarnation);
        Self {
            index: Index::new(now.store_id),
            next_sequence: life << 40,
            next_epoch: life << 32,
            segments_max: options.capacity / options.segment_size,
            options,
            lane,
            arena,
            large: RefCell::default(),
            superfile,
            segments: Segments::default(),
            catalog,
            changed: crate::catalog::Changed::default(),
            flights: BTreeMap::new(),
            queue: VecDeque::new(),
            forwards: VecDeque::new(),
            tails: BTreeMap::new(),
            active: None,
            spare: None,
            drain: None,
            writing_bytes: 0,
            blank: BTreeSet::new(),
            recycled_when_full: 0,
            write_errors_in_a_row: 0,
            poisoned: None,
            condition: condition::Condition::default(),
            counters: Counters::default(),
            misses: Miss::iter().map(|miss| (miss, 0)).collect(),
            heads: heads::Heads::default(),
            scrub: None,
            scrubs: 0,
            #[cfg(test)]
            no_memory: false,
        }
    }

    /// Moves everything on that can move and appends what happened to `events`.
    ///
    /// With [`Wait::One`] it may block until the device finishes something or the disk's waker is
    /// used; it does not block when it has something to report.
    pub fn step(&mut self, wait: Wait, events: &mut Vec<Event>) {
        self.advance(events);
        let wait = if events.is_empty() {
            self.until_scrub(wait)
        } else {
            Wait::No
        };
        #[cfg(test)]
        self.judge_wait(wait);
        let mut finished = Vec::new();
        self.lane.collect(wait, &mut finished);
        for one in finished {
            self.settle(one, events);
        }
        if self.lane.has_failed() {
            self.note_state(DeviceState::Failed, true, events);
            self.poison(events);
        }
        self.note_speed(events);
        self.advance(events);
    }

    /// A device that has nothing to do ends no wait: with work left it would be for ever. The
    /// simulated one returns all the same, so it is said here.
    #[cfg(test)]
    fn judge_wait(&self, wait: Wait) {
        let waits = self.drain.as_ref().is_some_and(Drain::waits);
        let work = waits || !self.queue.is_empty() || !self.forwards.is_empty();
        let asleep = wait == Wait::One && self.lane.busy() == 0 && self.poisoned.is_none();
        assert!(!(asleep && work), "asleep for ever: {:?}", self.usage());
    }

    fn advance(&mut self, events: &mut Vec<Event>) {
        self.drain_on(0, events);
        self.prepare_spare(events);
        self.place_queued(events);
        self.prepare_spare(events);
        self.commit_on();
        self.scrub_on(events);
    }

    /// Where a block lies, if it is here: for the caller to size its buffer.
    pub fn peek(&self, namespace: NamespaceId, key: &BlockKey) -> Option<Stored> {
        self.index.get(namespace, key)
    }

    /// All blocks that can be read, in no order that means anything.
    pub fn blocks(&self) -> impl Iterator<Item = Stored> + '_ {
        self.index.iter()
    }

    /// Keeps a block when its segment is recycled, by copying it forward. False when it is not
    /// here, or when half of the capacity is pinned already.
    pub fn pin(&mut self, namespace: NamespaceId, key: &BlockKey) -> bool {
        let Some(stored) = self.index.get(namespace, key) else {
            return false;
        };
        let pinned = self.index.pinned_bytes() + u64::from(stored.place.len);
        if stored.pinned || pinned > self.segments_max * self.options.segment_size / 2 {
            return stored.pinned;
        }
        self.index.set_pinned(namespace, key, true);
        true
    }

    /// Ends [`Store::pin`].
    pub fn unpin(&mut self, namespace: NamespaceId, key: &BlockKey) {
        self.index.set_pinned(namespace, key, false);
    }

    /// A reader found the record at `place` damaged: the block leaves the index, unless another
    /// record has taken its place meanwhile. Counted by reason.
    pub fn condemn(
        &mut self,
        namespace: NamespaceId,
        key: &BlockKey,
        place: &Place,
        reason: Miss,
    ) -> bool {
        self.count_miss(reason);
        self.heads.forget(place);
        let present = self.index.get(namespace, key);
        let same = present.is_some_and(|stored| stored.place == *place);
        if same {
            self.forget(namespace, key);
            self.counters.add(Counter::Condemned, 1);
            tracing::warn!(
                namespace = namespace.0,
                key = %key.short(),
                segment = place.segment,
                offset = place.offset,
                reason = reason.as_str(),
                "record condemned"
            );
        }
        same
    }

    /// Identity of the store: it stays as long as its superblock does. Not for tenants.
    pub fn id(&self) -> StoreId {
        self.superfile.now().store_id
    }

    /// Counters since the opening.
    pub fn counters(&self) -> &Counters {
        &self.counters
    }

    /// Reads that ended in a miss, by reason, since the opening.
    pub fn misses(&self) -> impl Iterator<Item = (Miss, u64)> + '_ {
        self.misses.iter().map(|(miss, count)| (*miss, *count))
    }

    /// What the store holds now.
    pub fn usage(&self) -> Usage {
        let written = self
            .tails
            .values()
            .map(|tail| tail.pending() as u64)
            .sum::<u64>();
        let reads = self
            .flights
            .values()
            .filter(|one| matches!(one, Flight::Read(_)))
            .count();
        Usage {
            blocks: self.index.len() as u64,
            index_bytes: self.index.bytes() as u64,
            head_bytes: self.heads.bytes() as u64,
            segments: self.segments.count() as u64,
            segments_max: self.segments_max,
            segment_size: self.options.segment_size,
            puts_pending: self.queue.len() as u64 + written,
            reads_pending: reads as u64,
        }
    }

    /// Gives back the memory of heads that are kept for reads of parts.
    pub fn drop_heads(&mut self) {
        self.heads = heads::Heads::default();
    }

    /// Reads take no more than this of the device from now on; none: as much as they can.
    /// Unit: bytes a second.
    pub fn limit_reads(&mut self, rate: Option<u64>) {
        self.lane.limit_reads(rate);
    }

    /// True when nothing is in flight and nothing waits.
    pub fn is_idle(&self) -> bool {
        self.flights.is_empty()
            && self.queue.is_empty()
            && self.tails.values().all(|tail| tail.pending() == 0)
            && self.lane.busy() == 0
    }

    /// Longest image that fits into a segment. Unit: bytes.
    pub fn image_len_max(&self) -> u64 {
        self.options.segment_size - BLOCK - footer_len(1)
    }

    /// The disk, for its name, depth and waker, and for tests.
    pub fn disk(&self) -> &D {
        self.lane.disk_ref()
    }

    /// The disk, for tests that change its mood.
    #[cfg(any(test, feature = "sim"))]
    pub fn disk_mut(&mut self) -> &mut D {
        self.lane.disk()
    }

    /// The segment that takes records.
    #[cfg(test)]
    pub(crate) fn active(&self) -> Option<u32> {
        self.active
    }

    /// Drops the store where it stands and gives the disk, as a crash would find it.
    #[cfg(any(test, feature = "sim"))]
    pub fn abandon(self) -> D {
        self.lane.into_disk()
    }

    /// Ends in order: everything queued is made durable or refused, the open segment is sealed,
    /// the catalog is closed, and the superblock says so. Blocks.
    pub fn close(mut self, events: &mut Vec<Event>) -> D {
        self.scrub = None;
        while !self.is_idle() {
            let wait = if self.lane.busy() > 0 {
                Wait::One
            } else {
                Wait::No
            };
            self.step(wait, events);
            if self.flights.is_empty() && self.lane.busy() == 0 {
                // Nothing is under way that could make room for what still waits.
                self.refuse_queued(events);
            }
        }
        if self.poisoned.is_none() {
            self.seal_active();
            // An unused spare gets an empty footer, so that nobody scans it.
            if self.open_segment() {
                self.seal_active();
            }
            while !self.tails.is_empty() && self.poisoned.is_none() {
                let wait = if self.lane.busy() > 0 {
                    Wait::One
                } else {
                    Wait::No
                };
                self.step(wait, events);
            }
        }
        if self.poisoned.is_none() {
            self.close_catalog();
        }
        self.lane.into_disk()
    }

    pub(crate) fn count_miss(&mut self, reason: Miss) {
        *self.misses.entry(reason).or_default() += 1;
    }

    /// Takes a block out of the index.
    fn forget(&mut self, namespace: NamespaceId, key: &BlockKey) -> Option<Stored> {
        let stored = self.index.remove(namespace, key)?;
        self.changed.removed(&stored);
        Some(stored)
    }

    /// A buffer for the store's own blocks: headers, footers, copies.
    pub(crate) fn own_buf(&self, len: u64) -> std::io::Result<IoBuf> {
        #[cfg(test)]
        if self.no_memory {
            return Err(std::io::ErrorKind::OutOfMemory.into());
        }
        let len = index(len);
        // Memory that nobody has touched is slow to fill: what is still in use is used again.
        let large = || self.large.borrow().upgrade()?.alloc(len);
        if let Some(buf) = self.arena.alloc(len).or_else(large) {
            return Ok(buf);
        }
        let buf = self.arena.alloc_or_own(len)?;
        *self.large.borrow_mut() = Arc::downgrade(buf.arena());
        Ok(buf)
    }
}

/// A put that did not get in: the image and why.
pub type Refused = (RecordImage, crate::PutError);

#[cfg(test)]
mod real;
#[cfg(test)]
mod tests;
