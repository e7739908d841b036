//! Making room: whole segments are emptied and used again.
//!
//! Upstairs:   `Store::step`, when no free segment is left.
//! Downstairs: `segments::choose_victim` decides; `lane` reads what is copied forward.
//!
//! A segment is chosen as soon as the last prepared one is opened, so that the next is ready
//! before it is needed. Its blocks are forgotten at once, except pinned ones, which are read,
//! verified and appended again: the open segment keeps room for them. They go in batches: one is
//! read while the one before it is written, and a batch is placed together, so that one sync covers
//! it. The file is free when the last copy is durable and the last reader has gone.
//!
//! Reading them is background work, unless a put waits for the room that is kept for them.
//!
//! Invariants kept here
//!   L5  A segment with a reader is not recycled.
//!   L1  A pinned block moves in the index only when its copy is durable.

use std::collections::VecDeque;
use std::io::Error;

use kvtier_proto::Miss;

use crate::disk::Disk;
use crate::events::{Counter, Event};
use crate::index::Stored;
use crate::lane::{Class, Transfer};
use crate::mem::IoBuf;
use crate::planted::{Bug, planted};
use crate::read::{Expectation, Unverified, Want};
use crate::segments::{Candidate, Life, Step, choose_victim};

use super::append::{Origin, Queued, room};
use super::{Flight, Store};

/// Recycled segments after which a full device is asked for room again.
const FULL_RETRY_RECYCLED: u64 = 16;

/// Bytes of pinned records that are read together. Two batches are in the store's own memory at
/// a time. Tests have records of a few KiB.
const COPY_BYTES_MAX: u64 = if cfg!(test) { 48 << 10 } else { 4 << 20 };

/// A segment that is being emptied.
#[derive(Debug)]
pub(super) struct Drain {
    victim: u32,
    /// Pinned blocks that wait to be copied.
    waiting: VecDeque<Stored>,
    /// Reads of the present batch that have not come back.
    reading: usize,
    /// Copies of the present batch that were read.
    read: Vec<Queued>,
    /// Bytes of copies under way: being read, queued, written or synced.
    copying_bytes: u64,
    /// Room that the open segment keeps for them.
    reserved_bytes: u64,
    reserved_rows: u64,
}

impl Drain {
    /// Bytes and records that the open segment keeps room for.
    pub(super) fn reserved(&self) -> (u64, u64) {
        (self.reserved_bytes, self.reserved_rows)
    }

    /// True when there are blocks to be copied.
    #[cfg(test)]
    pub(super) fn waits(&self) -> bool {
        !self.waiting.is_empty()
    }

    /// Copies of the present batch that nobody has placed.
    pub(super) fn take_read(&mut self) -> Vec<Queued> {
        std::mem::take(&mut self.read)
    }

    /// A copy was placed, or will not come.
    pub(super) fn release(&mut self, bytes: u64) {
        self.reserved_bytes = self.reserved_bytes.saturating_sub(bytes);
        self.reserved_rows = self.reserved_rows.saturating_sub(1);
    }
}

impl<D: Disk> Store<D> {
    /// Starts, continues or ends the emptying of a segment.
    ///
    /// `for_put` bytes of the open segment belong to a put that is about to be placed: no pinned
    /// record is promised room there.
    pub(super) fn drain_on(&mut self, for_put: u64, events: &mut Vec<Event>) {
        if self.poisoned.is_some() {
            return;
        }
        if self.drain.is_none() && self.needs_room() {
            self.begin_drain(for_put, events);
        }
        self.copy_batch(events);
        self.end_drain();
    }

    fn needs_room(&mut self) -> bool {
        let full = self.segments.files() >= self.segments_max;
        let configured = self.options.capacity / self.options.segment_size;
        let recycled = self.counters.get(Counter::Recycled) - self.recycled_when_full;
        if full && self.segments_max < configured && recycled >= FULL_RETRY_RECYCLED {
            self.segments_max = configured;
            return false;
        }
        full && self.is_writing() && self.spare.is_none() && self.segments.first_free().is_none()
    }

    /// True when a segment will be needed: something is written, or waits to be.
    pub(super) fn is_writing(&self) -> bool {
        self.active.is_some() || !self.queue.is_empty() || !self.forwards.is_empty()
    }

    fn begin_drain(&mut self, for_put: u64, events: &mut Vec<Event>) {
        let own_rows = u64::from(for_put > 0);
        let space = active_room(self, own_rows + 1).saturating_sub(for_put);
        let sealed = self
            .segments
            .iter()
            .filter(|segment| segment.life == Life::Sealed);
        let candidates: Vec<Candidate> = sealed
            .map(|segment| Candidate {
                segment: segment.number,
                epoch: segment.age(),
                readers: segment.readers,
                live: self.index.live_in(segment.number),
                pinned_bytes: self.index.pinned_in(segment.number),
            })
            .collect();
        let youngest = || candidates.iter().max_by_key(|one| one.epoch);
        let victim = match planted(Bug::YoungestGoes) {
            true => youngest().map(|one| one.segment),
            false => choose_victim(&candidates, space),
        };
        let Some(victim) = victim else {
            return;
        };
        let mut blocks: Vec<Stored> = self.index.in_segment(victim).collect();
        blocks.sort_unstable_by_key(|stored| stored.place.offset);
        let mut drain = Drain {
            victim,
            waiting: VecDeque::new(),
            reading: 0,
            read: Vec::new(),
            copying_bytes: 0,
            reserved_bytes: 0,
            reserved_rows: 0,
        };
        for stored in blocks {
            let len = u64::from(stored.place.len);
            let rows = drain.reserved_rows + 1;
            let space = active_room(self, own_rows + rows).saturating_sub(for_put);
            let keep = stored.pinned && !planted(Bug::PinsIgnored);
            if keep && drain.reserved_bytes + len <= space {
                drain.reserved_bytes += len;
                drain.reserved_rows = rows;
                drain.waiting.push_back(stored);
            } else {
                self.evict(&stored, events);
            }
        }
        if let Some(segment) = self.segments.get_mut(victim) {
            segment.step(Step::Chosen);
        }
        self.drain = Some(drain);
    }

    pub(super) fn evict(&mut self, stored: &Stored, events: &mut Vec<Event>) {
        if planted(Bug::RecycleKeepsIndex) {
            return;
        }
        let here = self.index.get(stored.namespace, &stored.key);
        if here.is_some_and(|here| here.place == stored.place) {
            self.forget(stored.namespace, &stored.key);
            self.counters.add(Counter::Evicted, 1);
            let Stored {
                namespace,
                key,
                kind,
                place,
                ..
            } = *stored;
            events.push(Event::Evicted {
                namespace,
                key,
                kind,
                place,
            });
        }
    }

    /// Places the batch that was read and reads the next one.
    fn copy_batch(&mut self, events: &mut Vec<Event>) {
        let Some(drain) = self.drain.as_mut().filter(|drain| drain.reading == 0) else {
            return;
        };
        self.forwards.extend(drain.take_read());
        if drain.copying_bytes > COPY_BYTES_MAX {
            return;
        }
        let mut batch = 0;
        while let Some(drain) = self.drain.as_mut()
            && let Some(next) = drain.waiting.front()
            && (batch == 0 || batch + u64::from(next.place.len) <= COPY_BYTES_MAX)
            && let Some(stored) = drain.waiting.pop_front()
        {
            // What is gone starts nothing, and nothing would come back to go on by.
            if self.copy(&stored, events) {
                batch += u64::from(stored.place.len);
            }
        }
    }

    /// Reads one pinned block, if it is still where it was. True when a read was started.
    fn copy(&mut self, stored: &Stored, events: &mut Vec<Event>) -> bool {
        let len = u64::from(stored.place.len);
        let here = self.index.get(stored.namespace, &stored.key);
        let Some(drain) = self.drain.as_mut() else {
            return false;
        };
        if here.is_none_or(|here| here.place != stored.place) {
            drain.release(len);
            return false;
        }
        drain.copying_bytes += len;
        let file = self.segments.read_begins(&stored.place);
        let (Some(file), Ok(buf)) = (file, self.own_buf(len)) else {
            self.segments.read_ends(&stored.place);
            self.drop_copy(stored, events);
            return false;
        };
        let class = match self.queue.is_empty() {
            true => Class::Background,
            false => Class::Save,
        };
        let read = Transfer::read(file, stored.place.offset, buf, stored.place.len as usize);
        let user = self.lane.start(read.of(class));
        self.flights
            .insert(user, Flight::Forward { stored: *stored });
        if let Some(drain) = self.drain.as_mut() {
            drain.reading += 1;
        }
        true
    }

    /// A pinned block was read: verified, it waits for the rest of its batch.
    pub(super) fn forward_read(
        &mut self,
        stored: Stored,
        buf: Option<IoBuf>,
        result: Result<(), Error>,
        events: &mut Vec<Event>,
    ) {
        self.segments.read_ends(&stored.place);
        if let Some(drain) = self.drain.as_mut() {
            drain.reading = drain.reading.saturating_sub(1);
        }
        let here = self.index.get(stored.namespace, &stored.key);
        let still = here.is_some_and(|here| here.place == stored.place);
        let image = buf.filter(|_| result.is_ok() && still && self.poisoned.is_none());
        let image = image.and_then(|buf| self.verified_copy(&stored, buf));
        match (image, self.drain.as_mut()) {
            (Some(image), Some(drain)) => {
                let origin = Origin::Forward { from: stored };
                drain.read.push(Queued { origin, image });
            }
            _ => self.drop_copy(&stored, events),
        }
    }

    fn verified_copy(&self, stored: &Stored, buf: IoBuf) -> Option<crate::image::RecordImage> {
        if planted(Bug::CopyUnverified) {
            let header = crate::format::Header::decode(&buf).ok()?;
            return Some(crate::image::RecordImage::from_verified(buf, header));
        }
        let unverified = self.as_it_says(stored, buf).ok()?;
        unverified.verify().ok()?.into_image().ok()
    }

    /// A whole record that nobody asked for by its layout: it has whatever layout it says, as long
    /// as the index keeps the tag of that one.
    pub(super) fn as_it_says(&self, stored: &Stored, buf: IoBuf) -> Result<Unverified, Miss> {
        let header = crate::format::Header::decode(&buf)?;
        let layout = header.summary.layout;
        if !stored.has_layout(&layout) {
            return Err(Miss::WrongLayout);
        }
        let expect = Expectation {
            store_id: self.superfile.now().store_id,
            want: Want {
                namespace: stored.namespace,
                key: stored.key,
                layout,
            },
            place: stored.place,
        };
        Ok(Unverified::new(buf, expect, None))
    }

    /// A copy will not come, and needs no room.
    pub(super) fn drop_copy(&mut self, stored: &Stored, events: &mut Vec<Event>) {
        if let Some(drain) = self.drain.as_mut() {
            drain.release(u64::from(stored.place.len));
        }
        self.not_copied(stored, events);
    }

    /// A copy will not come: the block goes with its segment. In a log that is poisoned the segment
    /// stays as it is, and so does the block.
    pub(super) fn not_copied(&mut self, stored: &Stored, events: &mut Vec<Event>) {
        self.drain_settled(stored);
        if self.poisoned.is_none() {
            self.evict(stored, events);
        }
    }

    /// One copy under way came to its end.
    pub(super) fn drain_settled(&mut self, stored: &Stored) {
        if let Some(drain) = self.drain.as_mut() {
            let len = u64::from(stored.place.len);
            drain.copying_bytes = drain.copying_bytes.saturating_sub(len);
        }
    }

    fn end_drain(&mut self) {
        let Some(drain) = &self.drain else { return };
        let victim = drain.victim;
        let Some(segment) = self.segments.get_mut(victim) else {
            return;
        };
        let read = segment.readers > 0 && !planted(Bug::RecycleUnderReader);
        if drain.copying_bytes > 0 || !drain.waiting.is_empty() || read {
            return;
        }
        segment.step(Step::Emptied);
        let (file, misfit) = (segment.file, segment.size != self.options.segment_size);
        self.drain = None;
        self.counters.add(Counter::Recycled, 1);
        if misfit {
            // A file that was cut short is not used again: a new one takes its number.
            self.segments.remove(victim);
            if let Err(problem) = self.lane.disk().remove(file) {
                tracing::warn!(segment = victim, %problem, "file not removed");
            }
        }
    }
}

/// Room of the open segment for `rows` more records. Unit: bytes.
fn active_room<D: Disk>(store: &Store<D>, rows: u64) -> u64 {
    let active = store.active.and_then(|active| store.segments.get(active));
    active.map_or(0, |segment| room(segment, rows))
}

#[cfg(test)]
mod tests;
