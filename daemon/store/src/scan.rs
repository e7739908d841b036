//! Walks through a segment block by block and says what every record is worth.
//!
//! Upstairs:   `recover` for segments without a sound footer, `verify` for all of them.
//! Downstairs: `format`, `lane`.
//!
//! The scanner takes blocks in order and keeps no more than one head room. A sound header says how
//! far its record goes, so the walk steps over whole records; behind a damaged one it looks at
//! every block. A payload cannot pass for a record: a header needs the store's identity, which
//! no tenant knows.
//!
//! Invariants kept here
//!   H2  A record is good only when every span of its payload passed.
//!   L2  ... and it was written by this store, in this epoch, for this very place.
//!
//! Not here on purpose: nothing is changed on the device.

use std::collections::VecDeque;
use std::sync::Arc;

use kvtier_proto::Miss;

use crate::disk::{Disk, FileId};
use crate::format::record::SPAN;
use crate::format::segment::is_blank;
use crate::format::{BLOCK, Head, Header, StoreId, Summary, index};
use crate::lane::{Lane, Transfer};
use crate::mem::{Arena, IoBuf};

/// Bytes read at a time.
pub(crate) const WINDOW: u64 = 4 << 20;
/// Windows that are read while one is walked through.
pub(crate) const WINDOWS_AHEAD: usize = 2;
/// Bytes read at a time where a window could not be read.
const PIECE: u64 = 64 << 10;

/// What lies at one place.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Verdict {
    /// A whole record.
    Good(Summary),
    /// A block or record that is none, and why.
    Bad { offset: u64, miss: Miss },
}

/// State of the walk.
#[derive(Debug)]
enum State {
    Seek,
    Head {
        header: Header,
        bytes: Vec<u8>,
    },
    Payload {
        summary: Summary,
        left: u64,
        spans: SpanCheck,
    },
    Skip {
        left: u64,
    },
}

/// Walks through one segment.
#[derive(Debug)]
pub(crate) struct Scanner {
    store_id: StoreId,
    segment: u32,
    size: u64,
    /// Epoch of the segment's life. Without a header it is the highest that a record has: the
    /// records of earlier lives that were seen before it are then the caller's to drop.
    epoch: Option<u64>,
    /// The epoch was given, not learned.
    given: bool,
    /// A block that could not be read may be part of a record.
    unread: bool,
    /// Where the first bytes are that are no record, or none that passed, and all of them.
    doubt_at: Option<u64>,
    doubt: crc32fast::Hasher,
    at: u64,
    state: State,
}

impl Scanner {
    /// A walk that begins behind the segment header.
    pub(crate) fn new(store_id: StoreId, segment: u32, size: u64, epoch: Option<u64>) -> Self {
        Self {
            store_id,
            segment,
            size,
            epoch,
            given: epoch.is_some(),
            unread: false,
            doubt_at: None,
            doubt: crc32fast::Hasher::new(),
            at: BLOCK,
            state: State::Seek,
        }
    }

    /// A walk that begins at `at` once more, with the epoch that this one was given or learned.
    pub(crate) fn again(&self, at: u64) -> Self {
        Self {
            at,
            ..Self {
                given: self.given,
                ..Self::new(self.store_id, self.segment, self.size, self.epoch)
            }
        }
    }

    /// Where the first bytes are that are no record: a hole, a tail, blank or not. None where there
    /// are records and nothing else.
    pub(crate) fn doubt_at(&self) -> Option<u64> {
        self.doubt_at
    }

    /// A checksum of all those bytes: two walks that agree have read the same.
    pub(crate) fn doubt(&self) -> u32 {
        self.doubt.clone().finalize()
    }

    fn doubts(&mut self, at: u64, bytes: &[u8]) {
        self.doubt_at.get_or_insert(at);
        self.doubt.update(bytes);
    }

    /// Epoch of the life, given or learned.
    pub(crate) fn epoch(&self) -> Option<u64> {
        self.epoch
    }

    /// True when a record may be there that the device did not deliver. One that is cut off by the
    /// end of the file is none: nobody will ever read it.
    pub(crate) fn unread(&self) -> bool {
        self.unread
    }

    /// Takes the next block; `None` stands for one that could not be read.
    pub(crate) fn feed(&mut self, block: Option<&[u8]>, each: &mut dyn FnMut(Verdict)) {
        let at = self.at;
        self.at += BLOCK;
        let state = std::mem::replace(&mut self.state, State::Seek);
        self.unread |= block.is_none() && !matches!(state, State::Skip { .. });
        self.state = match (state, block) {
            (State::Skip { left }, _) => skip(left),
            (State::Seek, Some(block)) => self.seek(at, block, each),
            (State::Seek, None) => {
                each(Verdict::Bad {
                    offset: at,
                    miss: Miss::Device,
                });
                State::Seek
            }
            (State::Head { header, mut bytes }, Some(block)) => {
                bytes.extend_from_slice(block);
                self.collect(header, bytes, each)
            }
            (
                State::Payload {
                    summary,
                    left,
                    mut spans,
                },
                Some(block),
            ) => {
                spans.feed(block);
                let left = left.saturating_sub(BLOCK);
                if left > 0 {
                    State::Payload {
                        summary,
                        left,
                        spans,
                    }
                } else {
                    each(match spans.passed() {
                        true => Verdict::Good(summary),
                        false => {
                            self.doubts(summary.place.offset, &spans.seen.to_le_bytes());
                            bad(&summary, Miss::PayloadCrc)
                        }
                    });
                    State::Seek
                }
            }
            (State::Head { header, bytes }, None) => {
                each(bad(&header.summary, Miss::Device));
                skip(u64::from(header.summary.place.len) - bytes.len() as u64)
            }
            (State::Payload { summary, left, .. }, None) => {
                each(bad(&summary, Miss::Device));
                skip(left)
            }
        };
    }

    /// The segment ends; a record that goes further is cut off.
    pub(crate) fn finish(&mut self, each: &mut dyn FnMut(Verdict)) {
        let summary = match std::mem::replace(&mut self.state, State::Seek) {
            State::Head { header, .. } => header.summary,
            State::Payload { summary, .. } => summary,
            State::Seek | State::Skip { .. } => return,
        };
        each(bad(&summary, Miss::Device));
    }

    fn seek(&mut self, at: u64, block: &[u8], each: &mut dyn FnMut(Verdict)) -> State {
        let checked = match Header::decode(block) {
            Ok(header) => self.check(at, header),
            Err(_) if is_blank(block) => {
                self.doubts(at, block);
                return State::Seek;
            }
            Err(miss) => Err(miss),
        };
        match checked {
            Ok(header) => self.collect(header, block.to_vec(), each),
            Err(miss) => {
                self.doubts(at, block);
                each(Verdict::Bad { offset: at, miss });
                State::Seek
            }
        }
    }

    fn check(&mut self, at: u64, header: Header) -> Result<Header, Miss> {
        let own = header.summary.place;
        let mut expect = own;
        (expect.segment, expect.offset) = (self.segment, at);
        let known = self.epoch.unwrap_or(own.epoch);
        expect.epoch = if self.given {
            known
        } else {
            known.max(own.epoch)
        };
        header.check_place(self.store_id, &expect)?;
        if at.saturating_add(u64::from(own.len)) > self.size {
            return Err(Miss::Device);
        }
        self.epoch = Some(own.epoch);
        Ok(header)
    }

    /// Goes on to the payload when the head room is complete.
    fn collect(&mut self, header: Header, bytes: Vec<u8>, each: &mut dyn FnMut(Verdict)) -> State {
        let place = header.summary.place;
        if bytes.len() < place.head_len as usize {
            return State::Head { header, bytes };
        }
        let left = u64::from(place.len - place.head_len);
        match Head::decode_table(header, &bytes) {
            Ok(head) => State::Payload {
                summary: header.summary,
                left,
                spans: SpanCheck::new(&head),
            },
            Err(miss) => {
                self.doubts(place.offset, &bytes);
                each(bad(&header.summary, miss));
                State::Skip { left }
            }
        }
    }
}

fn bad(summary: &Summary, miss: Miss) -> Verdict {
    Verdict::Bad {
        offset: summary.place.offset,
        miss,
    }
}

fn skip(left: u64) -> State {
    let left = left.saturating_sub(BLOCK);
    if left > 0 {
        State::Skip { left }
    } else {
        State::Seek
    }
}

/// Compares a payload that comes in pieces with its span checksums.
#[derive(Debug)]
pub(crate) struct SpanCheck {
    /// Length and checksum of every span, last first.
    spans: Vec<(u32, u32)>,
    hasher: crc32fast::Hasher,
    left: u32,
    passed: bool,
    /// Of all checksums so far.
    seen: u32,
}

impl SpanCheck {
    pub(crate) fn new(head: &Head) -> Self {
        let lens = head.parts().iter().flat_map(|part| {
            let (whole, rest) = (part.stored_len / SPAN, part.stored_len % SPAN);
            let whole = std::iter::repeat_n(SPAN, whole as usize);
            whole.chain((rest > 0).then_some(rest))
        });
        let mut spans: Vec<_> = lens.zip(head.spans().iter().copied()).collect();
        spans.reverse();
        let left = spans.last().map_or(0, |(len, _)| *len);
        Self {
            spans,
            hasher: crc32fast::Hasher::new(),
            left,
            passed: true,
            seen: 0,
        }
    }

    /// Takes the next bytes of the payload; padding behind the last span is ignored.
    pub(crate) fn feed(&mut self, mut bytes: &[u8]) {
        while !self.spans.is_empty() && !bytes.is_empty() {
            let (now, later) = bytes.split_at(bytes.len().min(self.left as usize));
            self.hasher.update(now);
            self.left -= u32::try_from(now.len()).unwrap_or(self.left);
            bytes = later;
            if self.left == 0 {
                let hasher = std::mem::take(&mut self.hasher);
                let want = self.spans.pop().map(|(_, crc)| crc);
                let found = hasher.finalize();
                self.seen = self.seen.rotate_left(1) ^ found;
                self.passed &= want == Some(found);
                self.left = self.spans.last().map_or(0, |(len, _)| *len);
            }
        }
    }

    /// True when every span was seen and matched.
    pub(crate) fn passed(&self) -> bool {
        self.passed && self.spans.is_empty()
    }
}

/// Reads `from..to` of a file and feeds it to `scanner`, which stands at `from`. Returns the
/// bytes that were read.
pub(crate) fn scan<D: Disk>(
    lane: &mut Lane<D>,
    arena: &Arc<Arena>,
    file: FileId,
    range: std::ops::Range<u64>,
    scanner: &mut Scanner,
    each: &mut dyn FnMut(Verdict),
) -> std::io::Result<u64> {
    let mut read = 0;
    let (mut at, mut ahead) = (range.start, range.start);
    let mut windows: VecDeque<(u64, u64)> = VecDeque::new();
    loop {
        while windows.len() <= WINDOWS_AHEAD && ahead < range.end {
            let len = WINDOW.min(range.end - ahead);
            let Some(buf) = arena.alloc(index(len)) else {
                break;
            };
            let user = lane.start(Transfer::read(file, ahead, buf, index(len)));
            windows.push_back((user, len));
            ahead += len;
        }
        let Some((user, len)) = windows.pop_front() else {
            break;
        };
        match lane.wait_for(user) {
            (Some(window), Ok(())) => {
                read += len;
                let bytes = window.get(..index(len)).unwrap_or_default();
                bytes
                    .chunks(index(BLOCK))
                    .for_each(|block| scanner.feed(Some(block), each));
            }
            (buf, _) => read += scan_pieces(lane, file, at..at + len, buf, scanner, each),
        }
        at += len;
    }
    if at < range.end {
        return Err(std::io::Error::other("no memory for a scan window"));
    }
    scanner.finish(each);
    Ok(read)
}

/// A window failed: what can be read of it is read in pieces.
fn scan_pieces<D: Disk>(
    lane: &mut Lane<D>,
    file: FileId,
    range: std::ops::Range<u64>,
    mut buf: Option<IoBuf>,
    scanner: &mut Scanner,
    each: &mut dyn FnMut(Verdict),
) -> u64 {
    let (mut at, mut read) = (range.start, 0);
    while at < range.end {
        let len = PIECE.min(range.end - at);
        let good = match buf.take() {
            Some(piece) => {
                let (back, result) = lane.run(Transfer::read(file, at, piece, index(len)));
                buf = back;
                result.is_ok()
            }
            None => false,
        };
        let bytes = buf
            .as_deref()
            .and_then(|buf| buf.get(..index(len)))
            .filter(|_| good);
        for number in 0..index(len / BLOCK) {
            let from = number * index(BLOCK);
            let block = bytes.and_then(|bytes| bytes.get(from..from + index(BLOCK)));
            scanner.feed(block, each);
        }
        read += if good { len } else { 0 };
        at += len;
    }
    read
}

#[cfg(test)]
mod tests;
