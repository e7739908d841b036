//! Online scrub: everything that is stored is read and checked once, slowly, beside all other work.
//!
//! Upstairs:   whoever owns the store starts a pass, checks what [`Event::Scrub`] hands out on any
//!             thread, and tells the result.
//! Downstairs: `lane`, as background work; `index` says what lies where.
//!
//! A pass goes through the sealed segments by number, once round, and through each by place, at a
//! rate in bytes a second. Where it begins depends on the life of the store: one that is opened
//! more often than a pass takes would never get to its last segments. A record that is found
//! damaged is read once more before it is condemned: what was wrong only on the way is no damage.
//! What is written, replaced or evicted meanwhile is not the pass's business; the next one sees it.
//!
//! Invariants kept here
//!   R1  At most `OPEN_MAX` records are being read or checked.
//!
//! Not here on purpose: no schedule, and no repair: a condemned record is a miss from then on.

use std::collections::VecDeque;
use std::io::Error;
use std::time::Duration;

use kvtier_proto::{BlockKey, Miss, NamespaceId, PayloadKind};

use crate::disk::{Disk, Wait};
use crate::events::{Counter, Event};
use crate::format::{Place, index};
use crate::index::Stored;
use crate::lane::{Class, Transfer};
use crate::mem::IoBuf;
use crate::planted::{Bug, planted};
use crate::read::Unverified;
use crate::segments::Life;

use super::{Flight, Store};

/// Time after which a record is tried again that there was no memory for.
const NO_MEMORY_PAUSE: Duration = Duration::from_millis(100);
/// Most records that are being read or checked. The next is read while one is checked.
const OPEN_MAX: usize = 2;

/// A record of a pass.
#[derive(Debug, Clone, Copy)]
pub(super) struct Item {
    stored: Stored,
    /// It was found damaged once.
    again: bool,
    /// Number of the pass: another may have been started meanwhile.
    pass: u64,
}

/// A record that the scrub has read.
#[derive(Debug)]
pub struct ToCheck {
    item: Item,
    found: Result<Unverified, Miss>,
}

impl ToCheck {
    /// Checks identity and every checksum. Pure CPU work, for any thread.
    pub fn check(self) -> Checked {
        let (item, found) = (self.item, self.found);
        let verdict = found.and_then(|unverified| match unverified.verify() {
            Ok(_) => Ok(()),
            Err((_, miss)) => Err(miss),
        });
        Checked { item, verdict }
    }
}

/// What the check of a record found.
#[derive(Debug, Clone, Copy)]
pub struct Checked {
    item: Item,
    verdict: Result<(), Miss>,
}

impl Checked {
    /// Whose record it is.
    pub fn namespace(&self) -> NamespaceId {
        self.item.stored.namespace
    }

    /// Its key.
    pub fn key(&self) -> BlockKey {
        self.item.stored.key
    }

    /// What its bytes are.
    pub fn kind(&self) -> PayloadKind {
        self.item.stored.kind
    }

    /// Where it lies.
    pub fn place(&self) -> Place {
        self.item.stored.place
    }

    /// Sound, or what is wrong with it.
    pub fn verdict(&self) -> Result<(), Miss> {
        self.verdict
    }
}

/// How far a pass is, or what it did.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct ScrubProgress {
    /// Segments that it has been through.
    pub segments_done: u64,
    /// Segments in all.
    pub segments: u64,
    /// Records that were checked.
    pub records: u64,
    /// Their bytes.
    pub bytes: u64,
    /// Records that were damaged.
    pub bad: u64,
    /// Time since it began.
    pub time: Duration,
}

/// A pass under way.
#[derive(Debug)]
pub(super) struct Pass {
    number: u64,
    rate: u64,
    began: Duration,
    /// When the next record may be read.
    next_at: Duration,
    /// Segments that it has not come to, in its order.
    ahead: VecDeque<u32>,
    waiting: VecDeque<Item>,
    open: usize,
    /// Everything was read, and something is still being checked.
    read_all: bool,
    done: ScrubProgress,
}

impl<D: Disk> Store<D> {
    /// Starts a pass that reads `rate` bytes a second, at least 1. One that runs is given up.
    pub fn scrub(&mut self, rate: u64) {
        let now = self.lane.now();
        let mut ahead: VecDeque<u32> = self.segments.iter().map(|one| one.number).collect();
        let segments = ahead.len() as u64;
        ahead.rotate_left(index(first_of(self.superfile.now().incarnation, segments)));
        self.scrubs += 1;
        self.scrub = Some(Pass {
            number: self.scrubs,
            rate: rate.max(1),
            began: now,
            next_at: now,
            ahead,
            waiting: VecDeque::new(),
            open: 0,
            read_all: false,
            done: ScrubProgress {
                segments,
                ..ScrubProgress::default()
            },
        });
    }

    /// Gives the pass up that runs, if one does.
    pub fn stop_scrub(&mut self) {
        self.scrub = None;
    }

    /// How far the pass is; `None` when there is none.
    pub fn scrub_progress(&self) -> Option<ScrubProgress> {
        let pass = self.scrub.as_ref()?;
        let under_way = u64::from(!pass.waiting.is_empty());
        Some(ScrubProgress {
            segments_done: (pass.done.segments - pass.ahead.len() as u64).saturating_sub(under_way),
            time: self.lane.now().saturating_sub(pass.began),
            ..pass.done
        })
    }

    /// A record that [`Event::Scrub`] handed out was checked. True when it was damaged, and leaves
    /// the index for that.
    pub fn scrubbed(&mut self, checked: &Checked) -> bool {
        let Checked { mut item, verdict } = *checked;
        item.again |= planted(Bug::ScrubReadsOnce);
        let mine = self.scrub.as_mut().filter(|pass| pass.number == item.pass);
        if let Some(pass) = mine {
            pass.open = pass.open.saturating_sub(1);
            pass.read_all = false;
            if verdict.is_err() && !item.again {
                pass.waiting.push_front(Item {
                    again: true,
                    ..item
                });
                return false;
            }
            pass.done.records += 1;
            pass.done.bytes += u64::from(item.stored.place.len);
        }
        let Err(miss) = verdict else { return false };
        let lost = miss == Miss::Device && self.lane.has_failed();
        if !item.again || lost {
            return false;
        }
        let Stored {
            namespace,
            key,
            place,
            ..
        } = item.stored;
        let condemned = self.condemn(namespace, &key, &place, miss);
        if condemned {
            self.counters.add(Counter::ScrubBad, 1);
            if let Some(pass) = self.scrub.as_mut() {
                pass.done.bad += 1;
            }
        }
        condemned
    }

    /// Reads what is due.
    pub(super) fn scrub_on(&mut self, events: &mut Vec<Event>) {
        if self.lane.has_failed() {
            self.scrub = None;
        }
        while let Some(pass) = &self.scrub {
            if pass.open >= OPEN_MAX || pass.next_at > self.lane.now() {
                return;
            }
            let Some(item) = self.next_to_scrub() else {
                return self.end_scrub(events);
            };
            self.scrub_one(item);
        }
    }

    /// The wait, cut short where the scrub is due before its end.
    pub(super) fn until_scrub(&self, wait: Wait) -> Wait {
        let pass = self.scrub.as_ref();
        let pass = pass.filter(|pass| pass.open < OPEN_MAX && !pass.read_all);
        let Some(left) = pass.map(|pass| pass.next_at.saturating_sub(self.lane.now())) else {
            return wait;
        };
        match wait {
            Wait::No => Wait::No,
            Wait::One => Wait::For(left),
            Wait::For(most) => Wait::For(most.min(left)),
        }
    }

    fn next_to_scrub(&mut self) -> Option<Item> {
        loop {
            let pass = self.scrub.as_mut()?;
            if let Some(item) = pass.waiting.pop_front() {
                return Some(item);
            }
            let (segment, pass_number) = (pass.ahead.pop_front()?, pass.number);
            let life = self.segments.get(segment).map(|segment| segment.life);
            if life != Some(Life::Sealed) {
                continue;
            }
            let mut here: Vec<Stored> = self.index.in_segment(segment).collect();
            here.sort_unstable_by_key(|stored| stored.place.offset);
            let item = |stored| Item {
                stored,
                again: false,
                pass: pass_number,
            };
            self.scrub.as_mut()?.waiting = here.into_iter().map(item).collect();
        }
    }

    /// Starts the read of a record, if it is still where it was.
    fn scrub_one(&mut self, item: Item) {
        let place = item.stored.place;
        let here = self.index.get(item.stored.namespace, &item.stored.key);
        let life = self.segments.get(place.segment).map(|segment| segment.life);
        if here.is_none_or(|here| here.place != place) || life != Some(Life::Sealed) {
            return;
        }
        let Ok(buf) = self.own_buf(u64::from(place.len)) else {
            let later = self.lane.now() + NO_MEMORY_PAUSE;
            if let Some(pass) = self.scrub.as_mut() {
                pass.waiting.push_front(item);
                pass.next_at = later;
            }
            return;
        };
        let Some(file) = self.segments.read_begins(&place) else {
            return;
        };
        let read = Transfer::read(file, place.offset, buf, place.len as usize);
        let user = self.lane.start(read.of(Class::Background));
        self.flights.insert(user, Flight::Scrub(item));
        self.counters.add(Counter::ScrubBytes, u64::from(place.len));
        let now = self.lane.now();
        if let Some(pass) = self.scrub.as_mut() {
            let nanos = u128::from(place.len) * 1_000_000_000 / u128::from(pass.rate);
            let time = Duration::from_nanos(u64::try_from(nanos).unwrap_or(u64::MAX));
            pass.next_at = pass.next_at.max(now) + time;
            pass.open += 1;
        }
    }

    /// A record of a pass came from the device.
    pub(super) fn scrub_read(
        &mut self,
        item: Item,
        buf: Option<IoBuf>,
        result: Result<(), Error>,
        events: &mut Vec<Event>,
    ) {
        self.segments.read_ends(&item.stored.place);
        let found = match (result, buf) {
            (Ok(()), Some(buf)) => self.as_it_says(&item.stored, buf),
            _ => Err(Miss::Device),
        };
        events.push(Event::Scrub(ToCheck { item, found }));
    }

    /// Nothing is left to read; the pass is over when nothing is being checked either.
    fn end_scrub(&mut self, events: &mut Vec<Event>) {
        if let Some(pass) = self.scrub.as_mut().filter(|pass| pass.open > 0) {
            pass.read_all = true;
            return;
        }
        if let Some(progress) = self.scrub_progress() {
            events.push(Event::Scrubbed(progress));
        }
        self.scrub = None;
    }
}

/// Which of `segments` segments a pass begins with in the life `incarnation`: each life at another
/// place, and after some lives near every place. A golden section of the way on each time.
fn first_of(incarnation: u32, segments: u64) -> u64 {
    let part = incarnation.wrapping_mul(0x9e37_79b9);
    (u64::from(part) * segments) >> 32
}

#[cfg(test)]
mod tests;
