//! From the queue to a place in a segment.
//!
//! Upstairs:   `Store::put` and `Store::step`.
//! Downstairs: `lane`; `commit` takes over when the bytes are written.
//!
//! Invariants kept here
//!   L2  Every record is stamped with store, epoch, sequence and place before it is written.
//!       Epochs are never used twice and no two puts share a sequence, not even across crashes:
//!       their upper bits are the incarnation, which was durable before this process wrote.
//!   L3  Nothing is placed once the log is poisoned.

use std::collections::BTreeSet;
use std::io::{Error, ErrorKind};

use crate::disk::Disk;
use crate::events::{Counter, DeviceState, Event, PutError};
use crate::format::segment::{SegmentHeader, footer_len, segment_name};
use crate::format::{BLOCK, Header, Place, Stamp, index};
use crate::image::RecordImage;
use crate::index::{Stored, layout_tag};
use crate::lane::{Class, Transfer};
use crate::segments::{Life, Segment, Step};

use super::{Flight, Refused, Store};

/// Why a record is written.
#[derive(Debug, Clone, Copy)]
pub(super) enum Origin {
    /// Somebody put it. A record that lies at `over` is no answer to that.
    Put { tag: u64, over: Option<Place> },
    /// It is pinned, and the segment where it lies is being recycled.
    Forward { from: Stored },
    /// It is another form of the record at `from`, whose place it takes.
    Recode { tag: u64, from: Stored },
}

/// A record without a place.
#[derive(Debug)]
pub(super) struct Queued {
    pub(super) origin: Origin,
    pub(super) image: RecordImage,
}

/// A record whose bytes are with the device.
#[derive(Debug)]
pub(super) struct Writing {
    pub(super) origin: Origin,
    pub(super) header: Header,
}

/// A record that is written and waits for a sync.
#[derive(Debug)]
pub(super) struct Written {
    pub(super) origin: Origin,
    pub(super) image: RecordImage,
}

/// The unfinished end of a segment.
#[derive(Debug, Default)]
pub(super) struct Tail {
    /// Records in flight.
    pub(super) writing: BTreeSet<u64>,
    /// Written, not yet covered by a sync.
    pub(super) written: Vec<Written>,
    /// The open batch is closed: it has the transfers up to this number.
    pub(super) barrier: Option<u64>,
    /// A sync or a footer is in flight.
    pub(super) busy: bool,
    /// Records that the sync in flight covers.
    pub(super) syncing: usize,
}

impl Tail {
    pub(super) fn pending(&self) -> usize {
        self.writing.len() + self.written.len() + self.syncing
    }
}

impl<D: Disk> Store<D> {
    /// Queues a record. The answer is an [`Event::Put`] with this `tag`, and `Ok` in it means
    /// durable. The same record (key, kind, level and layout) that is here already is answered
    /// without a write; another variant of the key replaces what is here.
    ///
    /// Errors: `Busy` (retry after an event), `TooLarge`, `Poisoned`; nothing happened, and the
    /// image comes back.
    pub fn put(&mut self, tag: u64, image: RecordImage) -> Result<(), Refused> {
        self.enqueue(Origin::Put { tag, over: None }, image)
    }

    pub(super) fn enqueue(&mut self, origin: Origin, image: RecordImage) -> Result<(), Refused> {
        let (len, max) = (u64::from(image.layout().image_len), self.image_len_max());
        if let Some(since) = self.poisoned {
            return Err((image, PutError::Poisoned { since }));
        }
        if len > max {
            return Err((image, PutError::TooLarge { len, max }));
        }
        if self.queue.len() >= self.options.queue_max {
            return Err((
                image,
                PutError::Busy {
                    queued: self.queue.len(),
                },
            ));
        }
        self.queue.push_back(Queued { origin, image });
        Ok(())
    }

    /// Gives every queued record a place that can have one now.
    pub(super) fn place_queued(&mut self, events: &mut Vec<Event>) {
        while self.poisoned.is_none() && self.writing_bytes < self.options.window_bytes {
            let forward = !self.forwards.is_empty();
            if !forward && self.answer_present(events) {
                continue;
            }
            let next = self.forwards.front().or(self.queue.front());
            let Some(len) = next.map(next_len) else {
                return;
            };
            if !self.has_room(len, forward, events) {
                if forward {
                    // Its reserved room is gone; waiting would wait for the drain it is part of.
                    self.drop_forward(events);
                    continue;
                }
                if self.segments.count() > 0 {
                    return;
                }
                self.refuse_front(events);
                continue;
            }
            let queued = if forward {
                self.forwards.pop_front()
            } else {
                self.queue.pop_front()
            };
            if let Some(queued) = queued {
                self.place(queued);
            }
        }
    }

    /// Answers the front of the queue when its record is here already, or has nothing to replace.
    fn answer_present(&mut self, events: &mut Vec<Event>) -> bool {
        let Some(front) = self.queue.front() else {
            return false;
        };
        let over = match front.origin {
            Origin::Put { over, .. } => over,
            Origin::Recode { from, .. } if self.is_here(&from) => return false,
            Origin::Recode { .. } | Origin::Forward { .. } => {
                if let Some(Queued { origin, image }) = self.queue.pop_front() {
                    self.fail(origin, Some(image), PutError::Superseded, events);
                }
                return true;
            }
        };
        let summary = front.image.summary();
        let Some(here) = self.index.get(summary.namespace, &summary.key) else {
            return false;
        };
        let same = (here.kind, here.level, here.through, here.layout_tag)
            == (
                summary.kind,
                summary.level,
                summary.through,
                layout_tag(&summary.layout),
            );
        if !same || over == Some(here.place) {
            return false;
        }
        if let Some(Queued {
            origin: Origin::Put { tag, .. },
            image,
        }) = self.queue.pop_front()
        {
            self.counters.add(Counter::PutsPresent, 1);
            events.push(Event::Put {
                tag,
                image: Some(image),
                result: Ok(here.place),
            });
        }
        true
    }

    fn drop_forward(&mut self, events: &mut Vec<Event>) {
        if let Some(Queued {
            origin: Origin::Forward { from },
            ..
        }) = self.forwards.pop_front()
        {
            self.drop_copy(&from, events);
        }
    }

    /// Answers everything that waits: there will be no room for it.
    pub(super) fn refuse_queued(&mut self, events: &mut Vec<Event>) {
        while !self.queue.is_empty() {
            self.refuse_front(events);
        }
    }

    fn refuse_front(&mut self, events: &mut Vec<Event>) {
        if let Some(queued) = self.queue.pop_front() {
            self.fail(queued.origin, Some(queued.image), PutError::NoRoom, events);
        }
    }

    /// True when the open segment takes `len` more bytes; opens the next one when it is full.
    fn has_room(&mut self, len: u64, forward: bool, events: &mut Vec<Event>) -> bool {
        if let Some(active) = self.active {
            let reserved = self.drain.as_ref().map_or((0, 0), |drain| drain.reserved());
            let (bytes, rows) = if forward { (0, 0) } else { reserved };
            let fits = |segment: &Segment, bytes: u64, rows: u64| room(segment, rows) >= bytes;
            let Some(segment) = self.segments.get(active) else {
                return false;
            };
            if fits(segment, len + bytes, rows + 1) {
                return true;
            }
            if rows > 0 {
                // The space is promised to pinned records that are on their way.
                return false;
            }
            self.seal_active();
        }
        let opened = self.open_segment();
        self.drain_on(if forward { 0 } else { len }, events);
        opened
    }

    /// Ends the open segment: it is sealed when its last record is durable.
    pub(super) fn seal_active(&mut self) {
        if let Some(active) = self.active.take()
            && let Some(segment) = self.segments.get_mut(active)
        {
            segment.step(Step::Full);
        }
    }

    /// Opens the segment that was prepared, if it is ready.
    pub(super) fn open_segment(&mut self) -> bool {
        let Some(number) = self.spare else {
            return false;
        };
        let Some(segment) = self.segments.get_mut(number) else {
            return false;
        };
        if segment.life != Life::Ready || !segment.step(Step::Use) {
            return false;
        }
        self.spare = None;
        self.active = Some(number);
        self.tails.insert(number, Tail::default());
        true
    }

    /// Starts a new life of a free segment, or of a new file, before it is needed.
    pub(super) fn prepare_spare(&mut self, events: &mut Vec<Event>) {
        if self.spare.is_some() || !self.is_writing() || self.poisoned.is_some() {
            return;
        }
        let free = self.segments.first_free();
        let Some(number) = free.or_else(|| self.create_segment(events)) else {
            return;
        };
        let Ok(mut block) = self.own_buf(BLOCK) else {
            return;
        };
        let (epoch, first_sequence) = (self.next_epoch, self.next_sequence);
        let Some(segment) = self.segments.get_mut(number) else {
            return;
        };
        if !segment.step(Step::Allocate) {
            return;
        }
        self.next_epoch += 1;
        segment.epoch = epoch;
        segment.end = BLOCK;
        segment.placed = 0;
        segment.unread = false;
        segment.rows.clear();
        let header = SegmentHeader {
            store_id: self.superfile.now().store_id,
            segment: number,
            epoch,
            segment_size: segment.size,
            first_sequence,
        };
        header.encode(&mut block);
        let file = segment.file;
        self.index.set_epoch(number, epoch);
        self.spare = Some(number);
        let write = Transfer::write(file, 0, block, index(BLOCK)).of(Class::Save);
        let user = self.lane.start(write);
        let flight = Flight::SegmentHeader {
            segment: number,
            tries: 1,
        };
        self.flights.insert(user, flight);
    }

    /// A new file, when the capacity and the device have room for one.
    fn create_segment(&mut self, events: &mut Vec<Event>) -> Option<u32> {
        let size = self.options.segment_size;
        while self.segments.files() < self.segments_max {
            let number = self.segments.vacant();
            match self.lane.disk().create(&segment_name(number), size) {
                Ok(file) => {
                    self.segments.add(Segment::new(number, file, size));
                    if self.segments_max == self.options.capacity / size {
                        self.note_state(DeviceState::Full, false, events);
                    }
                    return Some(number);
                }
                Err(problem) if problem.kind() == ErrorKind::AlreadyExists => {
                    // Its blocks may be sound: it is there when it opens the next time.
                    tracing::warn!(
                        segment = number,
                        "a file that is not in use has this number"
                    );
                    self.segments.leave_alone(number);
                }
                Err(problem) => {
                    self.note_no_room(number, &problem, events);
                    return None;
                }
            }
        }
        None
    }

    fn note_no_room(&mut self, segment: u32, problem: &Error, events: &mut Vec<Event>) {
        tracing::warn!(segment, %problem, "no room for another segment");
        self.counters.add(Counter::CreatesRefused, 1);
        // Without a single segment nothing can be recycled: every put asks again.
        if self.segments.count() > 0 {
            self.segments_max = self.segments.files();
        }
        self.recycled_when_full = self.counters.get(Counter::Recycled);
        self.note_state(DeviceState::Full, true, events);
    }

    /// Stamps a record and hands it to the device. `has_room` said yes.
    fn place(&mut self, queued: Queued) {
        let Queued { origin, mut image } = queued;
        let len = image.layout().image_len;
        let Some(segment) = self.active.and_then(|active| self.segments.get_mut(active)) else {
            return;
        };
        // A copy keeps its number, and so does another form: it is the same put, older than any
        // that came after it.
        let sequence = match origin {
            Origin::Put { .. } => {
                self.blank.remove(&image.summary().namespace);
                self.next_sequence
            }
            Origin::Forward { from } | Origin::Recode { from, .. } => from.place.sequence,
        };
        self.next_sequence = self.next_sequence.max(sequence + 1);
        let stamp = Stamp {
            store_id: self.superfile.now().store_id,
            epoch: segment.epoch,
            sequence,
            segment: segment.number,
            offset: segment.end,
        };
        segment.end += u64::from(len);
        segment.placed += 1;
        image.stamp(&stamp);
        let (file, number) = (segment.file, segment.number);
        let (buf, header) = image.into_parts();
        let write = Transfer::write(file, stamp.offset, buf, len as usize);
        let user = self.lane.start(write.of(Class::Save));
        self.writing_bytes += u64::from(len);
        self.tails.entry(number).or_default().writing.insert(user);
        if let (Origin::Forward { .. }, Some(drain)) = (origin, self.drain.as_mut()) {
            drain.release(u64::from(len));
        }
        self.flights
            .insert(user, Flight::Record(Writing { origin, header }));
    }
}

fn next_len(queued: &Queued) -> u64 {
    u64::from(queued.image.layout().image_len)
}

/// Bytes that records may still take in a segment when `rows` more of them come. Unit: bytes.
pub(super) fn room(segment: &Segment, rows: u64) -> u64 {
    segment
        .size
        .saturating_sub(segment.end + footer_len(segment.placed + rows))
}
