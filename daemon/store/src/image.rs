//! Record images: what lies on disk and in an arena slot, built and sealed in memory.
//!
//! Upstairs:   the tier manager fills slots and encodes parts; `Store::put` takes the image.
//! Downstairs: `format::record`.
//!
//! A slot becomes a record in one direction only: an [`IoBuf`] with the payload in place is
//! consumed by [`RecordBuilder::build`], which checksums every part; only the [`RecordImage`] that
//! comes out can be stored or leased. An unfilled buffer does not type-check (LMCache#3022).
//!
//! Not here on purpose: no codec. Parts arrive encoded, and their lengths are the caller's word,
//! checked against the buffer.

use kvtier_proto::limits::{BLOCK_BYTES_MAX, BLOCK_TOKENS_MAX, PART_BYTES_MAX, PARTS_MAX};
use kvtier_proto::{BlockKey, LayoutFingerprint, Level, NamespaceId, PayloadKind, Quality};

use crate::format::record::{
    HEAD_LEN_MAX, HEADER_LEN, PART_LEN, SPAN, STORED_LEN_MAX, Stamp, encode_head, stamp,
};
use crate::format::{BLOCK, Header, Part, PartCode, Place, StoreId, Summary, padded};
use crate::mem::IoBuf;

/// What the caller knows of a part before it has a place.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PartSpec {
    /// Layer number.
    pub layer: u16,
    /// What it is.
    pub code: PartCode,
    /// The codec's own bits, carried unchanged.
    pub flags: u8,
    /// Bytes in the payload; equal to `raw_len` at level 0.
    pub stored_len: u32,
    /// Bytes after decoding.
    pub raw_len: u32,
}

/// What the caller says of the whole record.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RecordMeta {
    /// Whose block.
    pub namespace: NamespaceId,
    /// Which block.
    pub key: BlockKey,
    /// The block before it in its prefix; [`BlockKey::ROOT`] for the first.
    pub parent: BlockKey,
    /// What the bytes mean.
    pub layout: LayoutFingerprint,
    /// What the bytes are.
    pub kind: PayloadKind,
    /// Codec level of the parts.
    pub level: Level,
    /// What the bytes had gone through before: exact as a rule.
    pub through: Quality,
    /// Tokens in the block: 1 ..= `BLOCK_TOKENS_MAX`.
    pub tokens: u32,
    /// Index of the block's first token in its prefix.
    pub position: u32,
    /// Version of the codec tables that the parts need; 0 when none.
    pub codec_tables: u32,
}

/// Why bytes cannot become a record. Nothing happened; the buffer comes back.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ImageError {
    /// The part list is empty or too long.
    #[error("a record has 1 to {PARTS_MAX} parts, not {parts}")]
    Parts {
        /// Parts given.
        parts: usize,
    },
    /// A part's length is out of bounds.
    #[error(
        "part {part}: stored and raw length must be 1 to {PART_BYTES_MAX}, not {stored_len} and \
         {raw_len} bytes"
    )]
    PartLen {
        /// Number of the part.
        part: usize,
        /// Stored length given.
        stored_len: u32,
        /// Raw length given.
        raw_len: u32,
    },
    /// All parts together are too long.
    #[error("a record holds at most {BLOCK_BYTES_MAX}, not {bytes} bytes")]
    TooLong {
        /// Sum of the stored or of the raw lengths.
        bytes: u64,
    },
    /// The token count is out of bounds.
    #[error("a block has 1 to {BLOCK_TOKENS_MAX} tokens, not {tokens}")]
    Tokens {
        /// Tokens given.
        tokens: u32,
    },
    /// The head room does not hold the part table.
    #[error(
        "head room of {head_len} bytes must be a multiple of {BLOCK}, {needed} to {HEAD_LEN_MAX} \
         bytes"
    )]
    HeadRoom {
        /// Head room given.
        head_len: u32,
        /// Least that holds the table.
        needed: u32,
    },
    /// The buffer is shorter than the image.
    #[error("the image takes {needed} bytes and the buffer has {len}")]
    Buffer {
        /// Length of the image.
        needed: u64,
        /// Length of the buffer.
        len: u64,
    },
}

/// Where things lie in an image, known before a byte is written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ImageLayout {
    /// Bytes of the head room: the payload starts here.
    pub head_len: u32,
    /// Payload bytes without padding.
    pub stored_len: u32,
    /// Bytes of the whole image: the slot must have as many.
    pub image_len: u32,
}

impl ImageLayout {
    /// Layout of a record whose parts have these stored lengths. For an encoder that does not
    /// know them yet, upper bounds give a head room that fits whatever comes out.
    pub fn new(stored_lens: impl IntoIterator<Item = u32>) -> Result<Self, ImageError> {
        let (mut parts, mut spans, mut stored) = (0usize, 0u64, 0u64);
        for stored_len in stored_lens {
            parts += 1;
            spans += u64::from(stored_len.div_ceil(SPAN));
            stored += u64::from(stored_len);
            if stored > STORED_LEN_MAX {
                return Err(ImageError::TooLong { bytes: stored });
            }
            if parts > PARTS_MAX {
                return Err(ImageError::Parts { parts });
            }
        }
        if parts == 0 {
            return Err(ImageError::Parts { parts });
        }
        let head = padded((HEADER_LEN + parts * PART_LEN) as u64 + 4 * spans);
        let fit = |len: u64| u32::try_from(len).map_err(|_| ImageError::TooLong { bytes: stored });
        Ok(Self {
            head_len: fit(head)?,
            stored_len: fit(stored)?,
            image_len: fit(head + padded(stored))?,
        })
    }
}

/// Turns a filled buffer into a record.
#[derive(Debug, Clone, Copy)]
pub struct RecordBuilder<'a> {
    meta: &'a RecordMeta,
    parts: &'a [PartSpec],
    head_len: Option<u32>,
}

impl<'a> RecordBuilder<'a> {
    /// A record of `parts`, which lie one behind the other in the payload.
    pub fn new(meta: &'a RecordMeta, parts: &'a [PartSpec]) -> Self {
        Self {
            meta,
            parts,
            head_len: None,
        }
    }

    /// The payload starts at `head_len` instead of at the least head room that fits.
    pub fn with_head_len(mut self, head_len: u32) -> Self {
        self.head_len = Some(head_len);
        self
    }

    /// Layout of the image that [`RecordBuilder::build`] will make.
    pub fn layout(&self) -> Result<ImageLayout, ImageError> {
        let least = ImageLayout::new(self.parts.iter().map(|part| part.stored_len))?;
        let Some(head_len) = self.head_len else {
            return Ok(least);
        };
        let needed = least.head_len;
        let sound = head_len >= needed
            && head_len <= HEAD_LEN_MAX
            && u64::from(head_len).is_multiple_of(BLOCK);
        if !sound {
            return Err(ImageError::HeadRoom { head_len, needed });
        }
        Ok(ImageLayout {
            head_len,
            image_len: least.image_len - needed + head_len,
            ..least
        })
    }

    /// Checksums the payload, which the caller has put at the layout's `head_len` in `buf`, and
    /// writes head and padding around it. Pure CPU work: run it where there is CPU.
    pub fn build(&self, mut buf: IoBuf) -> Result<RecordImage, (IoBuf, ImageError)> {
        let (layout, parts) = match self.checked(&buf) {
            Ok(checked) => checked,
            Err(problem) => return Err((buf, problem)),
        };
        let header = self.header(&layout, &parts);
        let image = buf.get_mut(..layout.image_len as usize).unwrap_or_default();
        let (head, payload) = image.split_at_mut(layout.head_len as usize);
        let (stored, padding) = payload.split_at_mut(layout.stored_len as usize);
        padding.fill(0);
        let mut spans = Vec::with_capacity(parts.len());
        for part in &parts {
            let (from, len) = (part.offset as usize, part.stored_len as usize);
            let bytes = stored.get(from..from + len).unwrap_or_default();
            spans.extend(bytes.chunks(SPAN as usize).map(crc32fast::hash));
        }
        encode_head(head, &header, &parts, &spans);
        Ok(RecordImage::from_verified(buf, header))
    }

    fn checked(&self, buf: &IoBuf) -> Result<(ImageLayout, Vec<Part>), ImageError> {
        let layout = self.layout()?;
        let tokens = self.meta.tokens;
        if !(1..=BLOCK_TOKENS_MAX).contains(&tokens) {
            return Err(ImageError::Tokens { tokens });
        }
        let (needed, len) = (u64::from(layout.image_len), buf.len() as u64);
        if len < needed {
            return Err(ImageError::Buffer { needed, len });
        }
        let (mut offset, mut raw) = (0u32, 0u64);
        let mut parts = Vec::with_capacity(self.parts.len());
        for (part, spec) in self.parts.iter().enumerate() {
            let PartSpec {
                layer,
                code,
                flags,
                stored_len,
                raw_len,
            } = *spec;
            let bounds = 1..=PART_BYTES_MAX.get();
            if stored_len == 0 || !bounds.contains(&u64::from(raw_len)) {
                return Err(ImageError::PartLen {
                    part,
                    stored_len,
                    raw_len,
                });
            }
            raw += u64::from(raw_len);
            if raw > BLOCK_BYTES_MAX.get() {
                return Err(ImageError::TooLong { bytes: raw });
            }
            parts.push(Part {
                layer,
                code,
                flags,
                offset,
                stored_len,
                raw_len,
            });
            offset += stored_len;
        }
        Ok((layout, parts))
    }

    fn header(&self, layout: &ImageLayout, parts: &[Part]) -> Header {
        let meta = self.meta;
        let place = Place {
            segment: 0,
            offset: 0,
            len: layout.image_len,
            head_len: layout.head_len,
            epoch: 0,
            sequence: 0,
        };
        let summary = Summary {
            namespace: meta.namespace,
            key: meta.key,
            parent: meta.parent,
            layout: meta.layout,
            kind: meta.kind,
            level: meta.level,
            through: meta.through,
            tokens: meta.tokens,
            position: meta.position,
            place,
        };
        Header {
            summary,
            store_id: StoreId([0; 16]),
            codec_tables: meta.codec_tables,
            parts: u32::try_from(parts.len()).unwrap_or_default(),
            stored_len: layout.stored_len,
            raw_len: parts.iter().map(|part| part.raw_len).sum(),
            table_crc: 0,
        }
    }
}

/// A whole record in memory, ready to be written or leased.
#[derive(Debug)]
pub struct RecordImage {
    buf: IoBuf,
    /// Boxed: images travel in results and queues.
    header: Box<Header>,
}

impl RecordImage {
    pub(crate) fn from_verified(buf: IoBuf, header: Header) -> Self {
        let header = Box::new(header);
        Self { buf, header }
    }

    /// Identity of the record; its place counts only after it was stored.
    pub fn summary(&self) -> &Summary {
        &self.header.summary
    }

    /// Where the payload starts, its length, and the length of the image.
    pub fn layout(&self) -> ImageLayout {
        ImageLayout {
            head_len: self.header.summary.place.head_len,
            stored_len: self.header.stored_len,
            image_len: self.header.summary.place.len,
        }
    }

    /// The payload without padding: the parts, one behind the other.
    pub fn payload(&self) -> &[u8] {
        let layout = self.layout();
        let (from, len) = (layout.head_len as usize, layout.stored_len as usize);
        self.buf.get(from..from + len).unwrap_or_default()
    }

    /// The memory it lies in, for leases: arena, offset, generation.
    pub fn buf(&self) -> &IoBuf {
        &self.buf
    }

    /// Gives the memory back and forgets the record.
    pub fn into_buf(self) -> IoBuf {
        self.buf
    }

    /// Splits it for a write: the memory goes to the device, the header stays.
    pub(crate) fn into_parts(self) -> (IoBuf, Header) {
        (self.buf, *self.header)
    }

    /// Writes where and when it is appended.
    pub(crate) fn stamp(&mut self, by: &Stamp) {
        stamp(&mut self.buf, by);
        self.header.store_id = by.store_id;
        let place = &mut self.header.summary.place;
        place.segment = by.segment;
        place.offset = by.offset;
        place.epoch = by.epoch;
        place.sequence = by.sequence;
    }
}

#[cfg(test)]
mod tests;
