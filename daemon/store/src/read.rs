//! The read side: bytes from a device become a record only by passing every check.
//!
//! Upstairs:   the tier manager verifies on any thread, then publishes or copies.
//! Downstairs: `format::record`.
//!
//! Type-state: the store hands out [`Unverified`], which has no way to its bytes. `verify`
//! consumes it and gives a [`Record`], whose parts all passed, or the buffer (zeroed) and the
//! reason of the miss.
//!
//! Invariants kept here
//!   H1  A record is of the namespace, key and layout that was asked for.
//!   H2  Every byte that can be reached passed a checksum.
//!   L2  The record was written by this store, in this epoch, for this place.

use std::ops::Range;
use std::sync::Arc;

use kvtier_proto::{BlockKey, LayoutFingerprint, Miss, NamespaceId};

use crate::format::record::SPAN;
use crate::format::{BLOCK, Head, Header, Part, Place, StoreId, padded};
use crate::image::RecordImage;
use crate::mem::IoBuf;
use crate::planted::{Bug, planted};

/// What a reader asks for. All three are compared with the record.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Want {
    /// Whose block.
    pub namespace: NamespaceId,
    /// Which block.
    pub key: BlockKey,
    /// What its bytes must mean.
    pub layout: LayoutFingerprint,
}

/// What a read must find, decided before it was started.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Expectation {
    pub(crate) store_id: StoreId,
    pub(crate) want: Want,
    pub(crate) place: Place,
}

impl Expectation {
    /// Identity of a decoded header against what was asked for (H1, L2).
    pub(crate) fn check(&self, header: &Header) -> Result<(), Miss> {
        if planted(Bug::SkipIdentity) {
            return Ok(());
        }
        let summary = &header.summary;
        header.check_place(self.store_id, &self.place)?;
        if (summary.namespace, summary.key) != (self.want.namespace, self.want.key) {
            return Err(Miss::WrongKey);
        }
        if summary.layout != self.want.layout {
            return Err(Miss::WrongLayout);
        }
        if summary.place != self.place {
            return Err(Miss::StaleEpoch);
        }
        Ok(())
    }
}

/// Which parts a read brought, and where their bytes lie in its buffer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Covered {
    /// Numbers of the parts.
    pub(crate) parts: Range<usize>,
    /// Offset in the payload of the first byte that was read. Unit: bytes.
    pub(crate) payload_from: u64,
    /// Where that byte lies in the buffer. Unit: bytes.
    pub(crate) buf_from: usize,
}

/// What a read of parts brought, and the head it goes by when that was known before.
#[derive(Debug, Clone)]
pub(crate) struct Partial {
    pub(crate) covered: Covered,
    pub(crate) head: Option<Arc<Head>>,
}

/// Bytes that a device delivered and nobody has checked. There is no way to them but `verify`.
#[derive(Debug)]
#[must_use = "bytes that are not verified are not a hit"]
pub struct Unverified {
    buf: IoBuf,
    expect: Expectation,
    /// `None`: the whole image.
    partial: Option<Partial>,
}

impl Unverified {
    pub(crate) fn new(buf: IoBuf, expect: Expectation, partial: Option<Partial>) -> Self {
        Self {
            buf,
            expect,
            partial,
        }
    }

    /// Where the bytes came from: what [`crate::Store::condemn`] needs to hear.
    pub fn place(&self) -> Place {
        self.expect.place
    }

    /// What was asked for.
    pub fn want(&self) -> Want {
        self.expect.want
    }

    /// Checks identity and every checksum. Pure CPU work, for any thread. On a miss the buffer
    /// comes back zeroed: what it held may have been another namespace's.
    pub fn verify(mut self) -> Result<Record, (IoBuf, Miss)> {
        match self.check() {
            Ok((head, covered)) => {
                self.clear_padding(&head, &covered);
                Ok(Record {
                    buf: self.buf,
                    head,
                    covered,
                    whole: self.partial.is_none(),
                })
            }
            Err(miss) => {
                self.buf.fill(0);
                Err((self.buf, miss))
            }
        }
    }

    fn check(&self) -> Result<(Arc<Head>, Covered), Miss> {
        let head = match self
            .partial
            .as_ref()
            .and_then(|partial| partial.head.clone())
        {
            Some(head) => {
                self.expect.check(&head.header)?;
                head
            }
            None => {
                let header = Header::decode(&self.buf)?;
                self.expect.check(&header)?;
                Arc::new(Head::decode_table(header, &self.buf)?)
            }
        };
        let all = || Covered {
            parts: 0..head.parts().len(),
            payload_from: 0,
            buf_from: self.expect.place.head_len as usize,
        };
        let covered = self.partial.as_ref().map(|partial| partial.covered.clone());
        let covered = covered.unwrap_or_else(all);
        for part in covered.parts.clone() {
            let row = head.parts().get(part).ok_or(Miss::HeaderCrc)?;
            let bytes = bytes_of(&self.buf, &covered, row).ok_or(Miss::Device)?;
            let spans = head.spans_of(part).ok_or(Miss::HeaderCrc)?;
            let crcs = bytes.chunks(SPAN as usize).map(crc32fast::hash);
            if !crcs.eq(spans.iter().copied()) && !planted(Bug::SkipPayloadCrc) {
                return Err(Miss::PayloadCrc);
            }
        }
        Ok((head, covered))
    }

    /// No checksum covers the bytes around the parts that were read, so nobody may see them.
    fn clear_padding(&mut self, head: &Head, covered: &Covered) {
        let rows = head.parts().get(covered.parts.clone()).unwrap_or_default();
        let (Some(first), Some(last)) = (rows.first(), rows.last()) else {
            return;
        };
        let at =
            |offset: u64| covered.buf_from + crate::format::index(offset - covered.payload_from);
        let from = at(u64::from(first.offset));
        let to = at(u64::from(last.offset) + u64::from(last.stored_len));
        if let Some(before) = self.buf.get_mut(covered.buf_from..from) {
            before.fill(0);
        }
        if let Some(behind) = self.buf.get_mut(to..) {
            let padding = behind.len().min(crate::format::index(BLOCK));
            behind.get_mut(..padding).unwrap_or_default().fill(0);
        }
    }
}

/// Bytes of one part in a buffer that holds some of the payload.
fn bytes_of<'a>(buf: &'a [u8], covered: &Covered, part: &Part) -> Option<&'a [u8]> {
    let into = u64::from(part.offset).checked_sub(covered.payload_from)?;
    let from = covered.buf_from.checked_add(crate::format::index(into))?;
    let to = from.checked_add(part.stored_len as usize)?;
    buf.get(from..to)
}

/// Aligned range of the payload that covers `parts`: (offset in the payload, length).
pub(crate) fn cover(head: &Head, parts: &Range<usize>) -> Option<(u64, u64)> {
    let rows = head.parts().get(parts.clone())?;
    let (first, last) = (rows.first()?, rows.last()?);
    let from = u64::from(first.offset) / BLOCK * BLOCK;
    let to = padded(u64::from(last.offset) + u64::from(last.stored_len));
    Some((from, to - from))
}

/// A record, or some parts of it, that passed every check.
#[derive(Debug)]
pub struct Record {
    buf: IoBuf,
    head: Arc<Head>,
    covered: Covered,
    whole: bool,
}

impl Record {
    /// Header and part table.
    pub fn head(&self) -> &Head {
        &self.head
    }

    /// Numbers of the parts that are here: all of them after `get`.
    pub fn parts(&self) -> Range<usize> {
        self.covered.parts.clone()
    }

    /// Row and stored bytes of part number `part`; `None` when it was not read.
    pub fn part(&self, part: usize) -> Option<(&Part, &[u8])> {
        if !self.covered.parts.contains(&part) {
            return None;
        }
        let row = self.head.parts().get(part)?;
        Some((row, bytes_of(&self.buf, &self.covered, row)?))
    }

    /// Stored bytes of all parts that are here, one behind the other.
    pub fn payload(&self) -> &[u8] {
        let rows = self.head.parts().get(self.parts()).unwrap_or_default();
        let (Some(first), Some(last)) = (rows.first(), rows.last()) else {
            return &[];
        };
        let len = last.offset - first.offset + last.stored_len;
        let run = Part {
            stored_len: len,
            ..*first
        };
        bytes_of(&self.buf, &self.covered, &run).unwrap_or_default()
    }

    /// The same memory as an image for the host tier or another store; the buffer comes back
    /// when only some parts were read.
    pub fn into_image(self) -> Result<RecordImage, IoBuf> {
        if self.whole {
            Ok(RecordImage::from_verified(self.buf, self.head.header))
        } else {
            Err(self.buf)
        }
    }

    /// Gives the memory back and forgets the record.
    pub fn into_buf(self) -> IoBuf {
        self.buf
    }
}

#[cfg(test)]
mod tests;
