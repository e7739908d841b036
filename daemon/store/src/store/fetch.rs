//! Reads: from an index entry to bytes that wait for verification.
//!
//! Upstairs:   `Store::get`, `Store::get_parts`; `Store::attach` names memory to come.
//! Downstairs: `lane`, `read`.
//!
//! Invariants kept here
//!   L5  A segment has a reader from the start of a read to its last transfer.
//!   W1  A read that was under way when its namespace was wiped ends as a miss.
//!
//! Not here on purpose: no verification of payloads. It costs CPU and belongs to other threads.

use std::io::Error;
use std::ops::Range;
use std::sync::Arc;

use kvtier_proto::{BlockKey, LayoutFingerprint, Miss, NamespaceId};

use crate::disk::Disk;
use crate::events::{Counter, Event};
use crate::format::{Head, Place, index};
use crate::index::Stored;
use crate::lane::{Class, Transfer};
use crate::mem::{Arena, IoBuf};
use crate::read::{Covered, Expectation, Partial, Unverified, Want, cover};

use super::{Flight, Store};

/// A read in flight.
#[derive(Debug)]
pub(super) struct Reading {
    tag: u64,
    class: Class,
    expect: Expectation,
    stage: Stage,
}

#[derive(Debug)]
enum Stage {
    /// The whole image, in one operation.
    Whole,
    /// The head room, which says where the parts lie.
    Head(Range<usize>),
    /// The head alone, of a record that nobody asked for by its layout. Its tag there must be this.
    Identity(Stored),
    /// The blocks that cover the parts.
    Parts(Partial),
}

impl<D: Disk> Store<D> {
    /// Tells the lane that buffers of `arena`, which is populated, will come. See [`Disk::attach`].
    pub fn attach(&mut self, arena: &Arc<Arena>) -> Option<String> {
        self.lane.disk().attach(arena)
    }

    /// Reads a whole record into `buf`, which has at least `peek(..).place.len` bytes. The answer
    /// is an [`Event::Got`] with this `tag`. Reads in flight are bounded by the caller's buffers.
    ///
    /// A miss that is known at once comes back with the buffer: `Absent`; `NoSpace` when the
    /// buffer is too short; `Device` when the device takes no operations.
    pub fn get(&mut self, tag: u64, want: &Want, buf: IoBuf) -> Result<(), (IoBuf, Miss)> {
        self.get_as(Class::Read, tag, want, buf)
    }

    /// As [`Store::get`], for somebody who is in no hurry: on the device it is background work.
    pub fn get_in_background(
        &mut self,
        tag: u64,
        want: &Want,
        buf: IoBuf,
    ) -> Result<(), (IoBuf, Miss)> {
        self.get_as(Class::Background, tag, want, buf)
    }

    fn get_as(
        &mut self,
        class: Class,
        tag: u64,
        want: &Want,
        buf: IoBuf,
    ) -> Result<(), (IoBuf, Miss)> {
        let expect = match self.expect(want, &buf) {
            Ok(expect) if (expect.place.len as usize) <= buf.len() => expect,
            Ok(_) => return Err(self.missed(buf, Miss::NoSpace)),
            Err(miss) => return Err(self.missed(buf, miss)),
        };
        let len = expect.place.len as usize;
        let reading = Reading {
            tag,
            class,
            expect,
            stage: Stage::Whole,
        };
        let started = self.start_read(reading, expect.place.offset, buf, 0, len);
        started.map_err(|buf| self.missed(buf, Miss::Device))
    }

    /// Reads the parts numbered `parts` of a record into `buf`: its head room first, then the
    /// blocks that cover them, behind it. Where the head is still known from an earlier call, only
    /// those blocks, to the front. A buffer of `peek(..).place.len` bytes always suffices.
    pub fn get_parts(
        &mut self,
        tag: u64,
        want: &Want,
        parts: Range<usize>,
        buf: IoBuf,
    ) -> Result<(), (IoBuf, Miss)> {
        let expect = match self.expect(want, &buf) {
            Ok(expect) => expect,
            Err(miss) => return Err(self.missed(buf, miss)),
        };
        if let Some(head) = self.heads.get(&expect.place) {
            return self.get_known(tag, expect, head, &parts, buf);
        }
        let len = expect.place.head_len as usize;
        let reading = Reading {
            tag,
            class: Class::Read,
            expect,
            stage: Stage::Head(parts),
        };
        let started = self.start_read(reading, expect.place.offset, buf, 0, len);
        started.map_err(|buf| self.missed(buf, Miss::Device))
    }

    /// Reads the head room of a record of whatever layout, as background work, into `buf`, which
    /// has at least `peek(..).place.head_len` bytes: what it says of itself, and none of its parts.
    /// The answer is an [`Event::Got`] with this `tag`.
    pub fn get_head(
        &mut self,
        tag: u64,
        (namespace, key): (NamespaceId, BlockKey),
        buf: IoBuf,
    ) -> Result<(), (IoBuf, Miss)> {
        let Some(stored) = self.index.get(namespace, &key) else {
            return Err(self.missed(buf, Miss::Absent));
        };
        // Until it has come, nobody knows the rest of its layout.
        let layout = LayoutFingerprint([0; 32]);
        let want = Want {
            namespace,
            key,
            layout,
        };
        let expect = match self.expect(&want, &buf) {
            Ok(expect) => expect,
            Err(miss) => return Err(self.missed(buf, miss)),
        };
        let len = expect.place.head_len as usize;
        let reading = Reading {
            tag,
            class: Class::Background,
            expect,
            stage: Stage::Identity(stored),
        };
        let started = self.start_read(reading, expect.place.offset, buf, 0, len);
        started.map_err(|buf| self.missed(buf, Miss::Device))
    }

    /// Reads parts of a record whose head is known.
    fn get_known(
        &mut self,
        tag: u64,
        expect: Expectation,
        head: Arc<Head>,
        parts: &Range<usize>,
        buf: IoBuf,
    ) -> Result<(), (IoBuf, Miss)> {
        let (covered, at, len) = match plan_parts(&expect, parts, &head, 0, buf.len()) {
            Ok(plan) => plan,
            Err(miss) => return Err(self.missed(buf, miss)),
        };
        let stage = Stage::Parts(Partial {
            covered,
            head: Some(head),
        });
        let reading = Reading {
            tag,
            class: Class::Read,
            expect,
            stage,
        };
        let started = self.start_read(reading, at, buf, 0, len);
        started.map_err(|buf| self.missed(buf, Miss::Device))
    }

    fn expect(&self, want: &Want, buf: &IoBuf) -> Result<Expectation, Miss> {
        let stored = self
            .index
            .get(want.namespace, &want.key)
            .ok_or(Miss::Absent)?;
        if self.lane.has_failed() {
            return Err(Miss::Device);
        }
        if buf.len() < stored.place.head_len as usize {
            return Err(Miss::NoSpace);
        }
        let store_id = self.superfile.now().store_id;
        Ok(Expectation {
            store_id,
            want: *want,
            place: stored.place,
        })
    }

    fn missed(&mut self, buf: IoBuf, miss: Miss) -> (IoBuf, Miss) {
        self.count_miss(miss);
        (buf, miss)
    }

    fn start_read(
        &mut self,
        reading: Reading,
        at: u64,
        buf: IoBuf,
        buf_at: usize,
        len: usize,
    ) -> Result<(), IoBuf> {
        let Some(file) = self.segments.read_begins(&reading.expect.place) else {
            // The index names no segment that is not there; answered as a miss all the same.
            tracing::error!(place = ?reading.expect.place, "a block lies in no segment");
            return Err(buf);
        };
        let read = Transfer {
            buf_at,
            ..Transfer::read(file, at, buf, len)
        };
        let user = self.lane.start(read.of(reading.class));
        self.counters.add(Counter::BytesRead, len as u64);
        self.flights.insert(user, Flight::Read(reading));
        Ok(())
    }

    pub(super) fn read_done(
        &mut self,
        reading: Reading,
        buf: Option<IoBuf>,
        result: Result<(), Error>,
        events: &mut Vec<Event>,
    ) {
        let Reading {
            tag,
            class,
            mut expect,
            stage,
        } = reading;
        self.segments.read_ends(&expect.place);
        let Some(mut buf) = buf else {
            tracing::error!(tag, "the disk kept the buffer of a read");
            self.count_miss(Miss::Device);
            let result = Err((None, Miss::Device));
            return events.push(Event::Got { tag, result });
        };
        let wiped = self
            .superfile
            .now()
            .is_wiped(expect.want.namespace, expect.place.sequence);
        let outcome = match (result, stage) {
            (Err(problem), _) => {
                tracing::warn!(place = ?expect.place, %problem, "read failed");
                Err(Miss::Device)
            }
            (Ok(()), _) if wiped => Err(Miss::Absent),
            (Ok(()), Stage::Whole) => Ok(None),
            (Ok(()), Stage::Parts(partial)) => Ok(Some(partial)),
            (Ok(()), Stage::Identity(stored)) => identity(&stored, &buf).map(|head| {
                expect.want.layout = head.header.summary.layout;
                Some(head_alone(head))
            }),
            (Ok(()), Stage::Head(parts)) => match self.plan_behind_head(&expect, &parts, &buf) {
                Ok((covered, at, len)) => {
                    let head_len = expect.place.head_len as usize;
                    let head = None;
                    let stage = Stage::Parts(Partial { covered, head });
                    let reading = Reading {
                        tag,
                        class,
                        expect,
                        stage,
                    };
                    match self.start_read(reading, at, buf, head_len, len) {
                        Ok(()) => return,
                        Err(back) => {
                            buf = back;
                            Err(Miss::Device)
                        }
                    }
                }
                Err(miss) => Err(miss),
            },
        };
        self.counters.add(Counter::Reads, 1);
        let result = match outcome {
            Ok(partial) => Ok(Unverified::new(buf, expect, partial)),
            Err(miss) => {
                buf.fill(0);
                self.count_miss(miss);
                Err((Some(buf), miss))
            }
        };
        events.push(Event::Got { tag, result });
    }

    /// A head room has just arrived: it is kept for the next part, and says where this one lies.
    fn plan_behind_head(
        &mut self,
        expect: &Expectation,
        parts: &Range<usize>,
        buf: &IoBuf,
    ) -> Result<(Covered, u64, usize), Miss> {
        let head = Arc::new(Head::decode(buf)?);
        let behind = expect.place.head_len as usize;
        let plan = plan_parts(expect, parts, &head, behind, buf.len())?;
        self.heads.insert(expect.place, head);
        Ok(plan)
    }
}

/// The head of a record, which has whatever layout it says as far as the index has that.
fn identity(stored: &Stored, buf: &IoBuf) -> Result<Head, Miss> {
    let head = Head::decode(buf)?;
    match stored.has_layout(&head.header.summary.layout) {
        true => Ok(head),
        false => Err(Miss::WrongLayout),
    }
}

/// No parts of a record, and its head.
fn head_alone(head: Head) -> Partial {
    let covered = Covered {
        parts: 0..0,
        payload_from: 0,
        buf_from: 0,
    };
    let head = Some(Arc::new(head));
    Partial { covered, head }
}

/// What to read for `parts`, from where in the file, how much; it will lie at `buf_from`.
fn plan_parts(
    expect: &Expectation,
    parts: &Range<usize>,
    head: &Head,
    buf_from: usize,
    buf_len: usize,
) -> Result<(Covered, u64, usize), Miss> {
    expect.check(&head.header)?;
    let (payload_from, len) = cover(head, parts).ok_or(Miss::Absent)?;
    let Place {
        offset, head_len, ..
    } = expect.place;
    if buf_from as u64 + len > buf_len as u64 {
        return Err(Miss::NoSpace);
    }
    let covered = Covered {
        parts: parts.clone(),
        payload_from,
        buf_from,
    };
    Ok((
        covered,
        offset + u64::from(head_len) + payload_from,
        index(len),
    ))
}
