//! From written to durable to visible, and what happens when the device refuses.
//!
//! Upstairs:   `Store::step` with every finished transfer.
//! Downstairs: `lane`, `index`, `format::segment`.
//!
//! Invariants kept here
//!   L1  A record is published only by `publish`, which runs only for what a good sync covered.
//!   L3  `poison` is for good: nothing is written after it, and no sync that ends later counts.
//!   W1  What was wiped while it was being written is not published.
//!
//! Not here on purpose: no retry of a failed sync. The kernel may have dropped the dirty pages,
//! and a second sync would report success for bytes that are gone (Rebello et al. 2020).

use std::io::Error;

use crate::disk::Disk;
use crate::events::{Counter, DeviceState, Event, PutError};
use crate::format::segment::{Footer, Trailer, footer_len, table_len};
use crate::format::{BLOCK, Place, index};
use crate::image::RecordImage;
use crate::index::{Inserted, Stored};
use crate::lane::{Class, Finished, Transfer};
use crate::mem::IoBuf;
use crate::planted::{Bug, planted};
use crate::segments::{Life, Step};

use super::append::{Origin, Queued, Writing, Written};
use super::reclaim::Drain;
use super::{Flight, Store, WRITE_ERRORS_MAX};

/// Times that a segment header is written before the log gives up.
const HEADER_TRIES: u32 = 3;

impl<D: Disk> Store<D> {
    /// One transfer came to its end.
    pub(super) fn settle(&mut self, finished: Finished, events: &mut Vec<Event>) {
        let Finished { user, buf, result } = finished;
        match self.flights.remove(&user) {
            Some(Flight::Record(writing)) => {
                self.record_written(user, writing, buf, result, events)
            }
            Some(Flight::SegmentHeader { segment, tries }) => {
                self.header_written(segment, tries, buf, result, events);
            }
            Some(Flight::HeaderSync { segment }) => self.header_synced(segment, result, events),
            Some(Flight::Sync { segment, covers }) => self.synced(segment, covers, result, events),
            Some(Flight::Footer { segment }) => self.footer_written(segment, result),
            Some(Flight::FooterSync { segment }) => self.footer_synced(segment, result, events),
            Some(Flight::Read(reading)) => self.read_done(reading, buf, result, events),
            Some(Flight::Forward { stored }) => self.forward_read(stored, buf, result, events),
            Some(Flight::Scrub(item)) => self.scrub_read(item, buf, result, events),
            None => tracing::error!(user, "a transfer nobody started came back"),
        }
    }

    fn record_written(
        &mut self,
        user: u64,
        writing: Writing,
        buf: Option<IoBuf>,
        result: Result<(), Error>,
        events: &mut Vec<Event>,
    ) {
        let Writing { origin, header } = writing;
        let place = header.summary.place;
        self.writing_bytes = self.writing_bytes.saturating_sub(u64::from(place.len));
        if let Some(tail) = self.tails.get_mut(&place.segment) {
            tail.writing.remove(&user);
        }
        let image = buf.map(|buf| RecordImage::from_verified(buf, header));
        if image.is_none() {
            tracing::error!(user, "the disk kept the buffer of a write");
            self.poison(events);
        }
        let image = match (&result, self.poisoned, image) {
            (Ok(()), None, Some(image)) => return self.note_written(origin, image),
            (_, _, image) => image,
        };
        let Place {
            segment,
            offset: at,
            len,
            ..
        } = place;
        let problem = match (result, self.poisoned) {
            (Err(source), None) => PutError::Indeterminate {
                segment,
                at,
                len,
                source,
            },
            (_, since) => PutError::Poisoned {
                since: since.unwrap_or_default(),
            },
        };
        // First: whoever is poisoned by it loses no pinned block to it.
        self.count_write_error(events);
        self.fail(origin, image, problem, events);
    }

    /// A record is written well; a sync will make it durable.
    fn note_written(&mut self, origin: Origin, image: RecordImage) {
        let summary = *image.summary();
        let place = summary.place;
        self.write_errors_in_a_row = 0;
        let written = match origin {
            Origin::Put { .. } | Origin::Recode { .. } => Counter::BytesWritten,
            Origin::Forward { .. } => Counter::BytesForwarded,
        };
        self.counters.add(written, u64::from(place.len));
        if let Some(segment) = self.segments.get_mut(place.segment) {
            segment.rows.push(summary);
        }
        if let Some(tail) = self.tails.get_mut(&place.segment) {
            tail.written.push(Written { origin, image });
        }
    }

    fn count_write_error(&mut self, events: &mut Vec<Event>) {
        if self.poisoned.is_none() {
            self.counters.add(Counter::WriteErrors, 1);
            self.write_errors_in_a_row += 1;
            if self.write_errors_in_a_row >= WRITE_ERRORS_MAX {
                self.poison(events);
            }
        }
    }

    fn header_written(
        &mut self,
        segment: u32,
        tries: u32,
        buf: Option<IoBuf>,
        result: Result<(), Error>,
        events: &mut Vec<Event>,
    ) {
        if self.poisoned.is_some() {
            return;
        }
        let file = self.segments.get(segment).map(|segment| segment.file);
        let (Some(file), Some(buf)) = (file, buf) else {
            return self.poison(events);
        };
        match result {
            Ok(()) if planted(Bug::HeaderNotSynced) => self.header_synced(segment, Ok(()), events),
            Ok(()) => {
                self.write_errors_in_a_row = 0;
                let user = self.lane.start(Transfer::sync(file));
                self.flights.insert(user, Flight::HeaderSync { segment });
            }
            Err(problem) => {
                tracing::warn!(segment, %problem, "segment header not written");
                self.count_write_error(events);
                if tries >= HEADER_TRIES {
                    return self.poison(events);
                }
                if self.poisoned.is_none() {
                    let write = Transfer::write(file, 0, buf, index(BLOCK)).of(Class::Save);
                    let user = self.lane.start(write);
                    let flight = Flight::SegmentHeader {
                        segment,
                        tries: tries + 1,
                    };
                    self.flights.insert(user, flight);
                }
            }
        }
    }

    /// The header of the next segment is durable: records may overwrite its old life.
    fn header_synced(&mut self, number: u32, result: Result<(), Error>, events: &mut Vec<Event>) {
        if let Err(problem) = &result {
            return self.sync_failed(number, problem, events);
        }
        if let Some(segment) = self.segments.get_mut(number) {
            segment.step(Step::Prepared);
        }
    }

    fn sync_failed(&mut self, number: u32, problem: &Error, events: &mut Vec<Event>) {
        if self.poisoned.is_none() {
            tracing::error!(segment = number, %problem, "sync failed: the log is poisoned");
            self.counters.add(Counter::SyncErrors, 1);
        }
        self.poison(events);
    }

    /// Starts the syncs and footers that are due.
    pub(super) fn commit_on(&mut self) {
        if self.poisoned.is_some() {
            return;
        }
        let numbers: Vec<u32> = self.tails.keys().copied().collect();
        for number in numbers {
            self.sync_if_due(number);
            self.seal_if_due(number);
        }
    }

    fn sync_if_due(&mut self, number: u32) {
        let Some(tail) = self.tails.get_mut(&number) else {
            return;
        };
        if tail.busy || tail.written.is_empty() {
            return;
        }
        // The first record written closes the batch: all that is in flight now belongs to it.
        let last = tail.writing.last().copied().unwrap_or(0);
        let barrier = *tail.barrier.get_or_insert(last);
        if tail.writing.first().is_some_and(|first| *first <= barrier) {
            return;
        }
        let Some(segment) = self.segments.get(number) else {
            return;
        };
        let covers = std::mem::take(&mut tail.written);
        tail.barrier = None;
        tail.busy = true;
        tail.syncing = covers.len();
        let user = self.lane.start(Transfer::sync(segment.file));
        self.flights.insert(
            user,
            Flight::Sync {
                segment: number,
                covers,
            },
        );
    }

    fn synced(
        &mut self,
        number: u32,
        covers: Vec<Written>,
        result: Result<(), Error>,
        events: &mut Vec<Event>,
    ) {
        if let Some(tail) = self.tails.get_mut(&number) {
            tail.busy = false;
            tail.syncing = 0;
        }
        let good = match &result {
            Ok(()) => self.poisoned.is_none(),
            Err(_) if planted(Bug::AckAfterFailedSync) => true,
            Err(problem) => {
                self.sync_failed(number, problem, events);
                false
            }
        };
        if good {
            self.counters.add(Counter::Syncs, 1);
        }
        for Written { origin, image } in covers {
            if good {
                self.publish(origin, image, events);
            } else {
                let since = self.poisoned.unwrap_or_default();
                self.fail(origin, Some(image), PutError::Poisoned { since }, events);
            }
        }
    }

    /// The record is durable: now it may be seen (L1).
    fn publish(&mut self, origin: Origin, image: RecordImage, events: &mut Vec<Event>) {
        let summary = *image.summary();
        let (namespace, place) = (summary.namespace, summary.place);
        if self.superfile.now().is_wiped(namespace, place.sequence) {
            return self.fail(origin, Some(image), PutError::Wiped { namespace }, events);
        }
        let stored = Stored::of(&summary);
        if let Origin::Forward { from } = origin {
            self.drain_settled(&from);
            let still = self.index.get(namespace, &summary.key);
            if still.is_none_or(|here| here.place != from.place) {
                return;
            }
        }
        if let Origin::Recode { from, .. } = origin
            && !self.is_here(&from)
        {
            return self.fail(origin, Some(image), PutError::Superseded, events);
        }
        if let Inserted::Replaced(old) = self.index.insert(&stored) {
            self.changed.removed(&old);
        }
        if let Origin::Put { tag, .. } | Origin::Recode { tag, .. } = origin {
            self.counters.add(Counter::PutsDurable, 1);
            events.push(Event::Put {
                tag,
                image: Some(image),
                result: Ok(place),
            });
        }
    }

    /// The record is not stored: whoever put it hears why; a pinned record is lost with its
    /// segment, unless nothing is recycled any more.
    pub(super) fn fail(
        &mut self,
        origin: Origin,
        image: Option<RecordImage>,
        problem: PutError,
        events: &mut Vec<Event>,
    ) {
        match origin {
            Origin::Put { tag, .. } | Origin::Recode { tag, .. } => {
                self.counters.add(Counter::PutsFailed, 1);
                events.push(Event::Put {
                    tag,
                    image,
                    result: Err(problem),
                });
            }
            Origin::Forward { from } => self.not_copied(&from, events),
        }
    }

    /// Writes the footer of a full segment whose records are all durable.
    fn seal_if_due(&mut self, number: u32) {
        let Some(tail) = self.tails.get_mut(&number) else {
            return;
        };
        let Some(segment) = self.segments.get_mut(number) else {
            return;
        };
        let written = tail.writing.is_empty() && tail.written.is_empty();
        let quiet = !tail.busy && (written || planted(Bug::FooterTooEarly));
        if segment.life != Life::Sealing || !quiet {
            return;
        }
        segment.rows.sort_by_key(|row| row.place.offset);
        let trailer = trailer_of(self.superfile.now().store_id, segment);
        let len = footer_len(u64::from(trailer.rows));
        let (file, at) = (segment.file, segment.size - len);
        tail.busy = true;
        let rows = std::mem::take(&mut segment.rows);
        let Ok(mut buf) = self.own_buf(len) else {
            return self.sealed(number, false);
        };
        if let Some(bytes) = buf.get_mut(..index(len)) {
            Footer::encode(bytes, &trailer, &rows);
        }
        let write = Transfer::write(file, at, buf, index(len)).of(Class::Save);
        let user = self.lane.start(write);
        self.flights
            .insert(user, Flight::Footer { segment: number });
    }

    fn footer_written(&mut self, number: u32, result: Result<(), Error>) {
        let file = self.segments.get(number).map(|segment| segment.file);
        match (result, file, self.poisoned) {
            (Ok(()), Some(file), None) => {
                let user = self.lane.start(Transfer::sync(file));
                self.flights
                    .insert(user, Flight::FooterSync { segment: number });
            }
            _ => self.sealed(number, false),
        }
    }

    fn footer_synced(&mut self, number: u32, result: Result<(), Error>, events: &mut Vec<Event>) {
        if let Err(problem) = &result {
            self.sync_failed(number, problem, events);
        }
        self.sealed(number, result.is_ok());
    }

    fn sealed(&mut self, number: u32, with_footer: bool) {
        let counter = if with_footer {
            Counter::Sealed
        } else {
            Counter::FooterErrors
        };
        self.counters.add(counter, 1);
        self.tails.remove(&number);
        if let Some(segment) = self.segments.get_mut(number) {
            segment.rows = Vec::new();
            segment.step(Step::Seal);
        }
        self.changed.sealed(number);
    }

    /// Stops all writing for good (L3) and answers everybody who waits for a write.
    pub(crate) fn poison(&mut self, events: &mut Vec<Event>) {
        if self.poisoned.is_some() {
            return;
        }
        let since = self.next_sequence;
        self.poisoned = Some(since);
        self.note_state(DeviceState::ReadOnly, true, events);
        self.lane.drop_unsent_writes();
        let tails: Vec<Written> = self
            .tails
            .values_mut()
            .flat_map(|tail| std::mem::take(&mut tail.written))
            .collect();
        for Written { origin, image } in tails {
            self.fail(origin, Some(image), PutError::Poisoned { since }, events);
        }
        let read = self.drain.as_mut().map(Drain::take_read);
        let waiting: Vec<Queued> = (read.unwrap_or_default().into_iter())
            .chain(self.forwards.drain(..))
            .chain(self.queue.drain(..))
            .collect();
        for Queued { origin, image } in waiting {
            self.fail(origin, Some(image), PutError::Poisoned { since }, events);
        }
    }
}

/// The trailer of a segment whose rows are in order.
pub(crate) fn trailer_of(
    store_id: crate::format::StoreId,
    segment: &crate::segments::Segment,
) -> Trailer {
    let rows = segment.rows.len() as u64;
    Trailer {
        store_id,
        segment: segment.number,
        rows: u32::try_from(rows).unwrap_or(u32::MAX),
        epoch: segment.epoch,
        table_at: segment.size - BLOCK - table_len(rows),
        end: segment.end,
        last_sequence: segment
            .rows
            .iter()
            .map(|row| row.place.sequence)
            .max()
            .unwrap_or(0),
        table_crc: 0,
    }
}
