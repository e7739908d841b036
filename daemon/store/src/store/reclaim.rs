//! Making room: whole segments are emptied and used again.
//!
//! Upstairs:   `Store::step`, when no free segment is left.
//! Downstairs: `segments::choose_victim` decides; `lane` reads what is copied forward.
//!
//! A segment is chosen as soon as the last prepared one is opened, so that the next is ready
//! before it is needed. Its blocks are forgotten at once, except pinned ones, which are read,
//! verified and appended again: the open segment keeps room for them. The file is free when the
//! last copy is durable and the last reader has gone.
//!
//! Invariants kept here
//!   L5  A segment with a reader is not recycled.
//!   L1  A pinned block moves in the index only when its copy is durable.

use std::collections::VecDeque;
use std::io::Error;

use crate::disk::Disk;
use crate::events::{Counter, Event};
use crate::index::Stored;
use crate::lane::Transfer;
use crate::mem::IoBuf;
use crate::planted::{Bug, planted};
use crate::read::{Expectation, Unverified, Want};
use crate::segments::{Candidate, Life, Step, choose_victim};

use super::append::{Origin, Queued, room};
use super::{Flight, Store};

/// Recycled segments after which a full device is asked for room again.
const FULL_RETRY_RECYCLED: u64 = 16;

/// A segment that is being emptied.
#[derive(Debug)]
pub(super) struct Drain {
    victim: u32,
    /// Pinned blocks that wait to be copied.
    waiting: VecDeque<Stored>,
    /// Copies under way: being read, queued, written or synced.
    copying: usize,
    /// Room that the open segment keeps for them.
    reserved_bytes: u64,
    reserved_rows: u64,
}

impl Drain {
    /// Bytes and records that the open segment keeps room for.
    pub(super) fn reserved(&self) -> (u64, u64) {
        (self.reserved_bytes, self.reserved_rows)
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
        self.copy_next(events);
        self.end_drain();
    }

    fn needs_room(&mut self) -> bool {
        let full = self.segments.count() as u64 >= self.segments_max;
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
                epoch: segment.epoch,
                readers: segment.readers,
                live: self.index.live_in(segment.number),
                pinned_bytes: self.pinned_in(segment.number),
            })
            .collect();
        let Some(victim) = choose_victim(&candidates, space) else {
            return;
        };
        let blocks: Vec<Stored> = self.index.in_segment(victim).collect();
        let mut drain = Drain {
            victim,
            waiting: VecDeque::new(),
            copying: 0,
            reserved_bytes: 0,
            reserved_rows: 0,
        };
        for stored in blocks {
            let len = u64::from(stored.place.len);
            let rows = drain.reserved_rows + 1;
            let space = active_room(self, own_rows + rows).saturating_sub(for_put);
            if stored.pinned && drain.reserved_bytes + len <= space {
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

    /// Pinned bytes of a segment; without pins nobody walks its list.
    fn pinned_in(&self, segment: u32) -> u64 {
        if self.pinned_bytes == 0 {
            return 0;
        }
        let pinned = self
            .index
            .in_segment(segment)
            .filter(|stored| stored.pinned);
        pinned.map(|stored| u64::from(stored.place.len)).sum()
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

    /// Reads the next pinned block, one at a time: pins are few and puts go first.
    fn copy_next(&mut self, events: &mut Vec<Event>) {
        loop {
            let Some(drain) = self.drain.as_mut().filter(|drain| drain.copying == 0) else {
                return;
            };
            let Some(stored) = drain.waiting.pop_front() else {
                return;
            };
            let here = self.index.get(stored.namespace, &stored.key);
            if here.is_none_or(|here| here.place != stored.place) {
                drain.release(u64::from(stored.place.len));
                continue;
            }
            drain.copying += 1;
            let file = self.segments.read_begins(&stored.place);
            let buf = self.own_buf(u64::from(stored.place.len));
            if let (Some(file), Ok(buf)) = (file, buf) {
                let (at, len) = (stored.place.offset, stored.place.len as usize);
                let user = self.lane.start(Transfer::read(file, at, buf, len));
                self.flights.insert(user, Flight::Forward { stored });
                return;
            }
            self.segments.read_ends(&stored.place);
            self.drop_copy(&stored, events);
        }
    }

    /// A pinned block was read: verified, it goes to the front of the line.
    pub(super) fn forward_read(
        &mut self,
        stored: Stored,
        buf: Option<IoBuf>,
        result: Result<(), Error>,
        events: &mut Vec<Event>,
    ) {
        self.segments.read_ends(&stored.place);
        let here = self.index.get(stored.namespace, &stored.key);
        let still = here.is_some_and(|here| here.place == stored.place);
        let image = buf.filter(|_| result.is_ok() && still && self.poisoned.is_none());
        let image = image.and_then(|buf| self.verified_copy(&stored, buf));
        match image {
            Some(image) => {
                let origin = Origin::Forward { from: stored };
                self.forwards.push_back(Queued { origin, image });
            }
            None => self.drop_copy(&stored, events),
        }
    }

    fn verified_copy(&self, stored: &Stored, buf: IoBuf) -> Option<crate::image::RecordImage> {
        // The layout is whatever the record has: the index keeps only the tag of it.
        let header = crate::format::Header::decode(&buf).ok()?;
        if planted(Bug::CopyUnverified) {
            return Some(crate::image::RecordImage::from_verified(buf, header));
        }
        let want = Want {
            namespace: stored.namespace,
            key: stored.key,
            layout: header.summary.layout,
        };
        let store_id = self.superfile.now().store_id;
        let expect = Expectation {
            store_id,
            want,
            place: stored.place,
        };
        Unverified::new(buf, expect, None)
            .verify()
            .ok()?
            .into_image()
            .ok()
    }

    /// A copy will not come: the block goes with its segment.
    pub(super) fn drop_copy(&mut self, stored: &Stored, events: &mut Vec<Event>) {
        if let Some(drain) = self.drain.as_mut() {
            drain.release(u64::from(stored.place.len));
        }
        self.drain_settled();
        self.evict(stored, events);
    }

    /// One copy under way came to its end.
    pub(super) fn drain_settled(&mut self) {
        if let Some(drain) = self.drain.as_mut() {
            drain.copying = drain.copying.saturating_sub(1);
        }
    }

    fn end_drain(&mut self) {
        let Some(drain) = &self.drain else { return };
        let victim = drain.victim;
        let Some(segment) = self.segments.get_mut(victim) else {
            return;
        };
        let read = segment.readers > 0 && !planted(Bug::RecycleUnderReader);
        if drain.copying > 0 || !drain.waiting.is_empty() || read {
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
