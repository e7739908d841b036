//! The index in RAM: which record holds which block, and which records a segment holds.
//!
//! Upstairs:   `store` looks up, publishes, evicts; `recover` fills it.
//! Downstairs: nothing.
//!
//! A slab of 72-byte entries, a hash table of 8-byte buckets over it, and one list a segment
//! through the entries, so that a segment is emptied without a walk over everything. The hash is
//! keyed by the store's secret identity: clients choose keys, and must not choose collisions.
//!
//! Not here on purpose: no payload, no header. What a record says of itself is read from it.

mod table;

use std::hash::{DefaultHasher, Hasher};

use kvtier_proto::{BlockKey, LayoutFingerprint, Level, NamespaceId, PayloadKind, Quality};

use crate::format::{BLOCK, Place, StoreId, Summary};

use table::{Bucket, EMPTY, buckets_for};

const NONE: u32 = u32::MAX;
/// Most entries: slab numbers are 32 bits wide.
const ENTRIES_MAX: usize = 1 << 31;

/// One block that the store holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Stored {
    /// Whose block.
    pub namespace: NamespaceId,
    /// Which block.
    pub key: BlockKey,
    /// What its bytes are.
    pub kind: PayloadKind,
    /// Codec level of its parts.
    pub level: Level,
    /// What its bytes had gone through before they were stored.
    pub through: Quality,
    /// First bytes of the layout fingerprint; the record has all of it.
    pub layout_tag: u32,
    /// Copied forward when its segment is reclaimed.
    pub pinned: bool,
    /// Where it lies.
    pub place: Place,
}

impl Stored {
    pub(crate) fn of(summary: &Summary) -> Self {
        Self {
            namespace: summary.namespace,
            key: summary.key,
            kind: summary.kind,
            level: summary.level,
            through: summary.through,
            layout_tag: layout_tag(&summary.layout),
            pinned: false,
            place: summary.place,
        }
    }

    /// How good its bytes are: no better than its level, nor than what they were made of.
    pub fn quality(&self) -> Quality {
        self.level.quality().max(self.through)
    }

    /// True when the record may be of this layout; the record itself says so for certain.
    pub fn has_layout(&self, layout: &LayoutFingerprint) -> bool {
        self.layout_tag == layout_tag(layout)
    }
}

pub(crate) fn layout_tag(layout: &LayoutFingerprint) -> u32 {
    let [a, b, c, d, ..] = layout.0;
    u32::from_le_bytes([a, b, c, d])
}

#[derive(Debug, Clone, Copy)]
struct Entry {
    key: BlockKey,
    sequence: u64,
    namespace: NamespaceId,
    segment: u32,
    block: u32,
    blocks: u32,
    layout_tag: u32,
    prev: u32,
    next: u32,
    kind: PayloadKind,
    level: Level,
    head_blocks: u8,
    marks: Marks,
}

/// A pin, and the quality of what a block was made of, in one byte: an entry has no second one.
#[derive(Debug, Clone, Copy)]
struct Marks(u8);

impl Marks {
    const PINNED: u8 = 0x80;

    fn new(pinned: bool, through: Quality) -> Self {
        Self(through as u8 | if pinned { Self::PINNED } else { 0 })
    }

    fn pinned(self) -> bool {
        self.0 & Self::PINNED != 0
    }

    fn through(self) -> Quality {
        // The number of a quality, as `new` has it.
        Quality::from_number(self.0 & !Self::PINNED).unwrap_or(Quality::Any)
    }
}

const _: () = assert!(size_of::<Entry>() <= 72);

#[derive(Debug, Clone, Copy)]
struct SegmentList {
    epoch: u64,
    /// Length of its pinned records. Unit: bytes.
    pinned: u64,
    head: u32,
    entries: u32,
}

/// What became of an insert.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Inserted {
    /// The key was not there.
    New,
    /// An older record of the key made room.
    Replaced(Stored),
    /// A newer record of the key is there already; nothing changed.
    Older,
}

fn age(place: &Place) -> (u64, u64) {
    (place.sequence, place.epoch)
}

/// All blocks of one store.
#[derive(Debug)]
pub(crate) struct Index {
    /// Has taken the store's identity already.
    hasher: DefaultHasher,
    entries: Vec<Entry>,
    free: u32,
    len: usize,
    buckets: Vec<Bucket>,
    segments: Vec<SegmentList>,
    /// Length of all pinned records. Unit: bytes.
    pinned: u64,
}

impl Index {
    pub(crate) fn new(seed: StoreId) -> Self {
        let buckets = vec![EMPTY; 64];
        // SipHash with a secret prefix; the constructor's own keys are fixed, so runs repeat.
        let mut hasher = DefaultHasher::new();
        hasher.write(&seed.0);
        Self {
            hasher,
            entries: Vec::new(),
            free: NONE,
            len: 0,
            buckets,
            segments: Vec::new(),
            pinned: 0,
        }
    }

    pub(crate) fn len(&self) -> usize {
        self.len
    }

    /// Memory that the index holds. Unit: bytes.
    pub(crate) fn bytes(&self) -> usize {
        self.entries.capacity() * size_of::<Entry>()
            + self.buckets.capacity() * size_of::<Bucket>()
            + self.segments.capacity() * size_of::<SegmentList>()
    }

    /// Takes room for `more` blocks at once. What there is no memory for is asked for again, piece
    /// by piece, when the blocks come.
    pub(crate) fn reserve(&mut self, more: u64) {
        let more = usize::try_from(more)
            .unwrap_or(ENTRIES_MAX)
            .min(ENTRIES_MAX);
        if self.entries.try_reserve_exact(more).is_err() {
            return;
        }
        let buckets = buckets_for(self.len + more);
        if buckets > self.buckets.len() {
            self.spread_over(buckets);
        }
    }

    /// Forgets every block. Epochs and memory stay.
    pub(crate) fn clear(&mut self) {
        self.entries.clear();
        (self.free, self.len, self.pinned) = (NONE, 0, 0);
        self.buckets.fill(EMPTY);
        for list in &mut self.segments {
            (list.head, list.entries, list.pinned) = (NONE, 0, 0);
        }
    }

    /// Announces the epoch of a segment's present life. Its list must be empty.
    pub(crate) fn set_epoch(&mut self, segment: u32, epoch: u64) {
        let blank = SegmentList {
            epoch: 0,
            pinned: 0,
            head: NONE,
            entries: 0,
        };
        while self.segments.len() <= segment as usize {
            self.segments.push(blank);
        }
        if let Some(list) = self.segments.get_mut(segment as usize) {
            debug_assert_eq!(
                list.entries, 0,
                "a segment with records cannot start a new life"
            );
            list.epoch = epoch;
        }
    }

    /// Blocks whose record lies in `segment`.
    pub(crate) fn live_in(&self, segment: u32) -> u32 {
        self.segments
            .get(segment as usize)
            .map_or(0, |list| list.entries)
    }

    /// Length of the pinned records in `segment`. Unit: bytes.
    pub(crate) fn pinned_in(&self, segment: u32) -> u64 {
        self.segments
            .get(segment as usize)
            .map_or(0, |list| list.pinned)
    }

    /// Length of all pinned records. Unit: bytes.
    pub(crate) fn pinned_bytes(&self) -> u64 {
        self.pinned
    }

    pub(crate) fn get(&self, namespace: NamespaceId, key: &BlockKey) -> Option<Stored> {
        let (_, entry) = self.find(self.hash(namespace, key), namespace, key)?;
        self.entries
            .get(entry as usize)
            .map(|entry| self.view(entry))
    }

    pub(crate) fn set_pinned(&mut self, namespace: NamespaceId, key: &BlockKey, pinned: bool) {
        let Some((_, number)) = self.find(self.hash(namespace, key), namespace, key) else {
            return;
        };
        // Not counted while it changes.
        self.count_pinned(number, false);
        if let Some(entry) = self.entries.get_mut(number as usize) {
            entry.marks = Marks::new(pinned, entry.marks.through());
        }
        self.count_pinned(number, true);
    }

    /// Entry `number` is in the list of its segment from now on, or is not any more.
    fn count_pinned(&mut self, number: u32, listed: bool) {
        let Some(entry) = self
            .entries
            .get(number as usize)
            .filter(|one| one.marks.pinned())
        else {
            return;
        };
        let bytes = u64::from(entry.blocks) * BLOCK;
        let list = self.segments.get_mut(entry.segment as usize);
        for sum in list
            .map(|list| &mut list.pinned)
            .into_iter()
            .chain([&mut self.pinned])
        {
            *sum = match listed {
                true => *sum + bytes,
                false => sum.saturating_sub(bytes),
            };
        }
    }

    /// Adds a record; of two records of a key the higher sequence stays, and of two copies of
    /// one record the one in the younger segment.
    pub(crate) fn insert(&mut self, stored: &Stored) -> Inserted {
        self.insert_hashed(self.hash(stored.namespace, &stored.key), stored)
    }

    /// Hashes of `rows`, for [`Index::insert_hashed`]. Their buckets are looked at together: each
    /// is a cache miss of its own, and misses that do not wait for each other overlap.
    pub(crate) fn hashes(&self, rows: &[Stored], hashes: &mut Vec<u32>) {
        hashes.clear();
        hashes.extend(rows.iter().map(|row| self.hash(row.namespace, &row.key)));
        let homes = hashes.iter().map(|hash| self.home(*hash));
        let seen = homes.filter_map(|home| self.buckets.get(home));
        std::hint::black_box(seen.fold(0, |seen, bucket| seen ^ bucket.hash));
    }

    /// As [`Index::insert`], with the hash that [`Index::hashes`] gave.
    pub(crate) fn insert_hashed(&mut self, hash: u32, stored: &Stored) -> Inserted {
        let replaced = match self.find(hash, stored.namespace, &stored.key) {
            Some((bucket, number)) => {
                let old = self.entries.get(number as usize).map(|old| self.view(old));
                if old.is_some_and(|old| age(&old.place) >= age(&stored.place)) {
                    return Inserted::Older;
                }
                self.take_out(bucket, number);
                old
            }
            None => None,
        };
        if self.len < ENTRIES_MAX {
            let pinned = stored.pinned || replaced.is_some_and(|old| old.pinned);
            let number = self.take_entry(&Stored { pinned, ..*stored });
            self.link(number, stored.place.segment);
            self.put_bucket(Bucket {
                hash,
                entry: number,
            });
            self.len += 1;
        }
        replaced.map_or(Inserted::New, Inserted::Replaced)
    }

    /// Takes a key out. Returns what it was.
    pub(crate) fn remove(&mut self, namespace: NamespaceId, key: &BlockKey) -> Option<Stored> {
        let (bucket, number) = self.find(self.hash(namespace, key), namespace, key)?;
        let stored = self
            .entries
            .get(number as usize)
            .map(|entry| self.view(entry))?;
        self.take_out(bucket, number);
        Some(stored)
    }

    fn take_out(&mut self, bucket: usize, number: u32) {
        self.close_gap(bucket);
        self.unlink(number);
        if let Some(entry) = self.entries.get_mut(number as usize) {
            entry.next = self.free;
            entry.prev = NONE;
            entry.segment = NONE;
        }
        self.free = number;
        self.len -= 1;
    }

    /// Blocks of one segment, newest first.
    pub(crate) fn in_segment(&self, segment: u32) -> impl Iterator<Item = Stored> + '_ {
        let mut at = self
            .segments
            .get(segment as usize)
            .map_or(NONE, |list| list.head);
        std::iter::from_fn(move || {
            let entry = self.entries.get(at as usize)?;
            at = entry.next;
            Some(self.view(entry))
        })
    }

    /// All blocks, in no order that means anything.
    pub(crate) fn iter(&self) -> impl Iterator<Item = Stored> + '_ {
        self.entries
            .iter()
            .filter(|entry| entry.segment != NONE)
            .map(|entry| self.view(entry))
    }

    fn view(&self, entry: &Entry) -> Stored {
        let bytes = |blocks: u32| u64::from(blocks) * BLOCK;
        let small = |blocks: u32| u32::try_from(bytes(blocks)).unwrap_or(u32::MAX);
        let place = Place {
            segment: entry.segment,
            offset: bytes(entry.block),
            len: small(entry.blocks),
            head_len: small(u32::from(entry.head_blocks)),
            epoch: self
                .segments
                .get(entry.segment as usize)
                .map_or(0, |list| list.epoch),
            sequence: entry.sequence,
        };
        Stored {
            namespace: entry.namespace,
            key: entry.key,
            kind: entry.kind,
            level: entry.level,
            through: entry.marks.through(),
            layout_tag: entry.layout_tag,
            pinned: entry.marks.pinned(),
            place,
        }
    }

    fn take_entry(&mut self, stored: &Stored) -> u32 {
        let place = &stored.place;
        let blocks = |bytes: u64| u32::try_from(bytes / BLOCK).unwrap_or(u32::MAX);
        let entry = Entry {
            key: stored.key,
            sequence: place.sequence,
            namespace: stored.namespace,
            segment: place.segment,
            block: blocks(place.offset),
            blocks: blocks(u64::from(place.len)),
            layout_tag: stored.layout_tag,
            prev: NONE,
            next: NONE,
            kind: stored.kind,
            level: stored.level,
            head_blocks: u8::try_from(u64::from(place.head_len) / BLOCK).unwrap_or(u8::MAX),
            marks: Marks::new(stored.pinned, stored.through),
        };
        if let Some(free) = self.entries.get_mut(self.free as usize) {
            let number = self.free;
            self.free = free.next;
            *free = entry;
            return number;
        }
        if self.entries.len() == self.entries.capacity() {
            // A quarter more at a time: doubling would cost 72 idle bytes a block at worst.
            self.entries.reserve_exact(self.entries.len() / 4 + 256);
        }
        self.entries.push(entry);
        u32::try_from(self.entries.len() - 1).unwrap_or(NONE)
    }

    fn link(&mut self, number: u32, segment: u32) {
        if self.segments.len() <= segment as usize {
            self.set_epoch(segment, 0);
        }
        let Some(list) = self.segments.get_mut(segment as usize) else {
            return;
        };
        let head = std::mem::replace(&mut list.head, number);
        list.entries += 1;
        if let Some(entry) = self.entries.get_mut(number as usize) {
            entry.next = head;
        }
        if let Some(next) = self.entries.get_mut(head as usize) {
            next.prev = number;
        }
        self.count_pinned(number, true);
    }

    fn unlink(&mut self, number: u32) {
        self.count_pinned(number, false);
        let Some(&Entry {
            prev,
            next,
            segment,
            ..
        }) = self.entries.get(number as usize)
        else {
            return;
        };
        if let Some(next) = self.entries.get_mut(next as usize) {
            next.prev = prev;
        }
        if let Some(prev) = self.entries.get_mut(prev as usize) {
            prev.next = next;
        }
        if let Some(list) = self.segments.get_mut(segment as usize) {
            list.entries -= 1;
            if prev == NONE {
                list.head = next;
            }
        }
    }
}

#[cfg(test)]
mod tests;
