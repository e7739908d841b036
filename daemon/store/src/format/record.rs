//! The record: one stored variant of one block.
//!
//! Upstairs:   `image` encodes, `read` and `scan` decode.
//! Downstairs: `crc32fast`.
//!
//! A record image is `[head room][payload]`, both padded with zeros to whole 4096-byte blocks,
//! contiguous, and the same in a segment file and in an arena slot: one direct operation moves
//! all of it. The head room holds the header, the part table and the span checksums:
//!
//! Record header, format 1: 256 bytes at the start of the image.
//!
//! | off | len | field        | meaning                                                      |
//! |----:|----:|--------------|--------------------------------------------------------------|
//! |   0 |   4 | magic        | "KVR1"                                                       |
//! |   4 |   2 | version      | 1                                                            |
//! |   6 |   1 | kind         | what the bytes are: 1 kv, 2 latent, 3 hidden, 4 state, 5 opaque |
//! |   7 |   1 | level        | codec level of the parts                                     |
//! |   8 |   4 | flags        | zero; a set bit is a feature this version does not know      |
//! |  12 |   4 | head_len     | bytes of the head room, a multiple of 4096, at most 65536    |
//! |  16 |   8 | epoch        | epoch of the segment that it was written to                  |
//! |  24 |   8 | sequence     | number of the put in the store; a forwarded copy keeps it     |
//! |  32 |   4 | segment      | number of the segment file where it believes it lives        |
//! |  36 |   4 | namespace    | namespace number                                             |
//! |  40 |   8 | offset       | offset in the segment where it believes it lives             |
//! |  48 |  32 | key          | full block key, compared on every read                       |
//! |  80 |  32 | parent       | key of the block before it, zero for the first               |
//! | 112 |  32 | layout       | layout fingerprint                                           |
//! | 144 |   4 | tokens       | tokens in the block, 1 ..= 2048                              |
//! | 148 |   4 | position     | index of its first token in the prefix                       |
//! | 152 |   4 | codec_tables | identity of the tables its parts were coded with; 0: none     |
//! | 156 |   4 | parts        | number of parts, 1 ..= 2048                                  |
//! | 160 |   8 | stored_len   | payload bytes without padding, 1 ..= 1 GiB                   |
//! | 168 |   8 | raw_len      | payload bytes after decoding, 1 ..= 1 GiB                    |
//! | 176 |  16 | store_id     | identity of the store                                        |
//! | 192 |   1 | through      | quality of what it was computed from: 0 exact to 4 any       |
//! | 193 |  55 | reserved     | zero                                                         |
//! | 248 |   4 | table_crc    | crc32 of the part table and the span checksums               |
//! | 252 |   4 | header_crc   | crc32 of bytes 0..252                                        |
//!
//! Part table: 16 bytes a part, at 256, in payload order; parts are packed without gaps.
//!
//! | off | len | field      | meaning                                                        |
//! |----:|----:|------------|----------------------------------------------------------------|
//! |   0 |   2 | layer      | layer number                                                   |
//! |   2 |   1 | part       | 1 k, 2 v, 3 latent, 4 rope, 5 state, 6 hidden, 7 opaque        |
//! |   3 |   1 | flags      | belong to the codec; the store carries them                    |
//! |   4 |   4 | offset     | in the payload: the sum of the stored_len before it            |
//! |   8 |   4 | stored_len | bytes in the payload, at least 1                               |
//! |  12 |   4 | raw_len    | bytes after decoding, at least 1                               |
//!
//! Span checksums: behind the part table, 4 bytes each, part by part. A part has one crc32 for
//! each 1 MiB of its stored bytes, the last span being shorter: a part of up to 1 MiB has one.
//! The rest of the head room is zero.
//!
//! Order of the checks on a read: length, magic, header_crc, version, flags and reserved bytes,
//! kind, lengths against their bounds, place, epoch and store, namespace and key, layout,
//! table_crc, the table against the lengths, then the spans of the payload.
//!
//! Not here on purpose: no checksum over the whole payload. Parts are read alone, and a span
//! bounds what one 32-bit checksum has to vouch for.

pub use kvtier_proto::layout::PartCode;
use kvtier_proto::limits::{BLOCK_BYTES_MAX, BLOCK_TOKENS_MAX, PART_BYTES_MAX, PARTS_MAX};
use kvtier_proto::{BlockKey, LayoutFingerprint, Level, Miss, NamespaceId, PayloadKind, Quality};

use super::fields::{array, crc_of, is_sealed, put, u8_at, u16_at, u32_at, u64_at, zero};
use super::{BLOCK, Place, StoreId, Summary, VERSION, padded};

/// First bytes of every record.
pub const MAGIC: [u8; 4] = *b"KVR1";
/// Bytes of the fixed header.
pub const HEADER_LEN: usize = 256;
/// Bytes of one part table entry.
pub const PART_LEN: usize = 16;
/// Most stored bytes that one checksum covers. Unit: bytes.
pub const SPAN: u32 = 1 << 20;
/// Largest head room: `PARTS_MAX` parts that cover 1 GiB need 45 KiB. Unit: bytes.
pub const HEAD_LEN_MAX: u32 = 64 << 10;
/// Largest payload, stored. A codec that expands stores raw instead. Unit: bytes.
pub const STORED_LEN_MAX: u64 = BLOCK_BYTES_MAX.get();

const AT_VERSION: usize = 4;
const AT_KIND: usize = 6;
const AT_LEVEL: usize = 7;
const AT_FLAGS: usize = 8;
const AT_HEAD_LEN: usize = 12;
const AT_EPOCH: usize = 16;
const AT_SEQUENCE: usize = 24;
const AT_SEGMENT: usize = 32;
const AT_NAMESPACE: usize = 36;
const AT_OFFSET: usize = 40;
const AT_KEY: usize = 48;
const AT_PARENT: usize = 80;
const AT_LAYOUT: usize = 112;
const AT_TOKENS: usize = 144;
const AT_POSITION: usize = 148;
const AT_CODEC_TABLES: usize = 152;
const AT_PARTS: usize = 156;
const AT_STORED_LEN: usize = 160;
const AT_RAW_LEN: usize = 168;
const AT_STORE_ID: usize = 176;
const AT_THROUGH: usize = 192;
const AT_RESERVED: usize = 193;
const AT_TABLE_CRC: usize = 248;
const AT_HEADER_CRC: usize = 252;

const _: () = {
    assert!(AT_KEY + 32 == AT_PARENT);
    assert!(AT_PARENT + 32 == AT_LAYOUT);
    assert!(AT_LAYOUT + 32 == AT_TOKENS);
    assert!(AT_PARTS + 4 == AT_STORED_LEN);
    assert!(AT_STORE_ID + 16 == AT_THROUGH);
    assert!(AT_RESERVED + 55 == AT_TABLE_CRC);
    assert!(AT_TABLE_CRC + 4 == AT_HEADER_CRC);
    assert!(AT_HEADER_CRC + 4 == HEADER_LEN);
    let spans_max = PARTS_MAX as u64 + STORED_LEN_MAX / SPAN as u64;
    let head_max = HEADER_LEN as u64 + (PARTS_MAX * PART_LEN) as u64 + 4 * spans_max;
    assert!(padded(head_max) <= HEAD_LEN_MAX as u64);
};

/// One row of a part table.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Part {
    /// Layer number.
    pub layer: u16,
    /// What it is.
    pub code: PartCode,
    /// The codec's own bits.
    pub flags: u8,
    /// Where it starts in the payload. Unit: bytes.
    pub offset: u32,
    /// Bytes in the payload.
    pub stored_len: u32,
    /// Bytes after decoding.
    pub raw_len: u32,
}

impl Part {
    /// Checksums that cover it.
    pub fn spans(&self) -> usize {
        self.stored_len.div_ceil(SPAN) as usize
    }
}

/// The fixed header, decoded and bounded, not yet compared with what was asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Header {
    /// Identity and place.
    pub summary: Summary,
    /// Store that wrote it.
    pub store_id: StoreId,
    /// Version of the codec tables that its parts need.
    pub codec_tables: u32,
    /// Number of parts.
    pub parts: u32,
    /// Payload bytes without padding.
    pub stored_len: u32,
    /// Payload bytes after decoding.
    pub raw_len: u32,
    /// Checksum of part table and span checksums.
    pub table_crc: u32,
}

/// What the store adds when it appends a record.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Stamp {
    /// Identity of the store.
    pub store_id: StoreId,
    /// Epoch of the segment.
    pub epoch: u64,
    /// Number of the record.
    pub sequence: u64,
    /// Segment number.
    pub segment: u32,
    /// Offset in the segment. Unit: bytes.
    pub offset: u64,
}

impl Header {
    /// Reads a header from the start of `bytes`: checksum first, then every field's bounds.
    pub fn decode(bytes: &[u8]) -> Result<Self, Miss> {
        let bytes = bytes.get(..HEADER_LEN).ok_or(Miss::HeaderCrc)?;
        Self::check_frame(bytes)?;
        Self::decode_fields(bytes).ok_or(Miss::HeaderCrc)?.bounded()
    }

    fn check_frame(bytes: &[u8]) -> Result<(), Miss> {
        if array(bytes, 0) != Some(MAGIC) {
            return Err(Miss::HeaderCrc);
        }
        if !is_sealed(bytes, AT_HEADER_CRC) {
            return Err(Miss::HeaderCrc);
        }
        let known = u16_at(bytes, AT_VERSION) == Some(VERSION)
            && u32_at(bytes, AT_FLAGS) == Some(0)
            && zero(bytes, AT_RESERVED, AT_TABLE_CRC)
            && u8_at(bytes, AT_KIND)
                .and_then(PayloadKind::from_number)
                .is_some()
            && u8_at(bytes, AT_THROUGH)
                .and_then(Quality::from_number)
                .is_some();
        if known {
            Ok(())
        } else {
            Err(Miss::Unsupported)
        }
    }

    fn decode_fields(bytes: &[u8]) -> Option<Self> {
        let head_len = u32_at(bytes, AT_HEAD_LEN)?;
        let stored_len = u32::try_from(u64_at(bytes, AT_STORED_LEN)?).ok()?;
        let len = padded(u64::from(stored_len)).checked_add(u64::from(head_len))?;
        let place = Place {
            segment: u32_at(bytes, AT_SEGMENT)?,
            offset: u64_at(bytes, AT_OFFSET)?,
            len: u32::try_from(len).ok()?,
            head_len,
            epoch: u64_at(bytes, AT_EPOCH)?,
            sequence: u64_at(bytes, AT_SEQUENCE)?,
        };
        let summary = Summary {
            namespace: NamespaceId(u32_at(bytes, AT_NAMESPACE)?),
            key: BlockKey(array(bytes, AT_KEY)?),
            parent: BlockKey(array(bytes, AT_PARENT)?),
            layout: LayoutFingerprint(array(bytes, AT_LAYOUT)?),
            kind: PayloadKind::from_number(u8_at(bytes, AT_KIND)?)?,
            level: Level(u8_at(bytes, AT_LEVEL)?),
            through: Quality::from_number(u8_at(bytes, AT_THROUGH)?)?,
            tokens: u32_at(bytes, AT_TOKENS)?,
            position: u32_at(bytes, AT_POSITION)?,
            place,
        };
        Some(Self {
            summary,
            store_id: StoreId(array(bytes, AT_STORE_ID)?),
            codec_tables: u32_at(bytes, AT_CODEC_TABLES)?,
            parts: u32_at(bytes, AT_PARTS)?,
            stored_len,
            raw_len: u32::try_from(u64_at(bytes, AT_RAW_LEN)?).ok()?,
            table_crc: u32_at(bytes, AT_TABLE_CRC)?,
        })
    }

    fn bounded(self) -> Result<Self, Miss> {
        let place = self.summary.place;
        let whole = |len: u64| len.is_multiple_of(BLOCK);
        let sound = (1..=BLOCK_TOKENS_MAX).contains(&self.summary.tokens)
            && (1..=STORED_LEN_MAX).contains(&u64::from(self.stored_len))
            && (1..=BLOCK_BYTES_MAX.get()).contains(&u64::from(self.raw_len))
            && (1..=PARTS_MAX as u64).contains(&u64::from(self.parts))
            && whole(u64::from(place.head_len))
            && place.head_len <= HEAD_LEN_MAX
            && place.head_len as usize >= HEADER_LEN + self.parts as usize * (PART_LEN + 4)
            && whole(place.offset)
            && place.offset >= BLOCK;
        if sound {
            Ok(self)
        } else {
            Err(Miss::HeaderCrc)
        }
    }

    /// True when the record was written by this store for exactly this place (L2).
    pub fn check_place(&self, store_id: StoreId, place: &Place) -> Result<(), Miss> {
        let own = &self.summary.place;
        if (own.segment, own.offset) != (place.segment, place.offset) {
            return Err(Miss::Misdirected);
        }
        if self.store_id != store_id || own.epoch != place.epoch {
            return Err(Miss::StaleEpoch);
        }
        Ok(())
    }
}

/// Header, part table and span checksums of one record.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Head {
    /// The fixed header.
    pub header: Header,
    parts: Box<[Part]>,
    spans: Box<[u32]>,
}

impl Head {
    /// Reads the head room at the start of `bytes`, which may be longer.
    pub fn decode(bytes: &[u8]) -> Result<Self, Miss> {
        let header = Header::decode(bytes)?;
        Self::decode_table(header, bytes)
    }

    /// Reads the table behind a header that was decoded from the same bytes.
    pub fn decode_table(header: Header, bytes: &[u8]) -> Result<Self, Miss> {
        let head_len = header.summary.place.head_len as usize;
        let table = bytes.get(HEADER_LEN..head_len).ok_or(Miss::HeaderCrc)?;
        let rows_len = header.parts as usize * PART_LEN;
        let rows = table.get(..rows_len).ok_or(Miss::HeaderCrc)?;
        let spans_total = rows
            .chunks_exact(PART_LEN)
            .filter_map(|row| u32_at(row, 8))
            .fold(0usize, |sum, len| {
                sum.saturating_add(len.div_ceil(SPAN) as usize)
            });
        let table_len = spans_total.saturating_mul(4).saturating_add(rows_len);
        if crc_of(table, 0, table_len) != Some(header.table_crc) {
            return Err(Miss::HeaderCrc);
        }
        let parts = decode_parts(&header, rows).ok_or(Miss::HeaderCrc)?;
        let spans: Box<[u32]> = table
            .get(rows_len..table_len)
            .ok_or(Miss::HeaderCrc)?
            .chunks_exact(4)
            .filter_map(|crc| u32_at(crc, 0))
            .collect();
        Ok(Self {
            header,
            parts,
            spans,
        })
    }

    /// Rows of the part table, in payload order.
    pub fn parts(&self) -> &[Part] {
        &self.parts
    }

    /// The part's checksums in turn, for each part in payload order.
    pub fn spans(&self) -> &[u32] {
        &self.spans
    }

    /// Checksums of part number `part`.
    pub fn spans_of(&self, part: usize) -> Option<&[u32]> {
        let first: usize = self.parts.get(..part)?.iter().map(Part::spans).sum();
        self.spans.get(first..first + self.parts.get(part)?.spans())
    }
}

/// Rows against the header's lengths: packed, bounded, and in sum what the header says.
fn decode_parts(header: &Header, rows: &[u8]) -> Option<Box<[Part]>> {
    let (mut stored, mut raw) = (0u32, 0u32);
    let mut parts = Vec::with_capacity(header.parts as usize);
    for row in rows.chunks_exact(PART_LEN) {
        let part = Part {
            layer: u16_at(row, 0)?,
            code: PartCode::from_number(u8_at(row, 2)?)?,
            flags: u8_at(row, 3)?,
            offset: u32_at(row, 4)?,
            stored_len: u32_at(row, 8)?,
            raw_len: u32_at(row, 12)?,
        };
        let empty = part.stored_len == 0 || part.raw_len == 0;
        if empty || part.offset != stored || u64::from(part.raw_len) > PART_BYTES_MAX.get() {
            return None;
        }
        stored = stored.checked_add(part.stored_len)?;
        raw = raw.checked_add(part.raw_len)?;
        parts.push(part);
    }
    (stored == header.stored_len && raw == header.raw_len).then(|| parts.into_boxed_slice())
}

/// Writes a head without its stamp into `head`, which is exactly the head room. The caller has
/// checked every length.
pub(crate) fn encode_head(head: &mut [u8], header: &Header, parts: &[Part], spans: &[u32]) {
    head.fill(0);
    let summary = &header.summary;
    put(head, 0, &MAGIC);
    put(head, AT_VERSION, &VERSION.to_le_bytes());
    put(head, AT_KIND, &[summary.kind as u8, summary.level.0]);
    put(head, AT_HEAD_LEN, &summary.place.head_len.to_le_bytes());
    put(head, AT_NAMESPACE, &summary.namespace.0.to_le_bytes());
    put(head, AT_KEY, &summary.key.0);
    put(head, AT_PARENT, &summary.parent.0);
    put(head, AT_LAYOUT, &summary.layout.0);
    put(head, AT_TOKENS, &summary.tokens.to_le_bytes());
    put(head, AT_POSITION, &summary.position.to_le_bytes());
    put(head, AT_THROUGH, &[summary.through as u8]);
    put(head, AT_CODEC_TABLES, &header.codec_tables.to_le_bytes());
    put(head, AT_PARTS, &header.parts.to_le_bytes());
    put(
        head,
        AT_STORED_LEN,
        &u64::from(header.stored_len).to_le_bytes(),
    );
    put(head, AT_RAW_LEN, &u64::from(header.raw_len).to_le_bytes());
    let mut at = HEADER_LEN;
    for part in parts {
        put(head, at, &part.layer.to_le_bytes());
        put(head, at + 2, &[part.code as u8, part.flags]);
        put(head, at + 4, &part.offset.to_le_bytes());
        put(head, at + 8, &part.stored_len.to_le_bytes());
        put(head, at + 12, &part.raw_len.to_le_bytes());
        at += PART_LEN;
    }
    for span in spans {
        put(head, at, &span.to_le_bytes());
        at += 4;
    }
    let table_crc = crc_of(head, HEADER_LEN, at).unwrap_or_default();
    put(head, AT_TABLE_CRC, &table_crc.to_le_bytes());
}

/// Writes where and when the record is appended, and the header checksum that seals it.
pub(crate) fn stamp(head: &mut [u8], stamp: &Stamp) {
    put(head, AT_EPOCH, &stamp.epoch.to_le_bytes());
    put(head, AT_SEQUENCE, &stamp.sequence.to_le_bytes());
    put(head, AT_SEGMENT, &stamp.segment.to_le_bytes());
    put(head, AT_OFFSET, &stamp.offset.to_le_bytes());
    put(head, AT_STORE_ID, &stamp.store_id.0);
    let crc = crc_of(head, 0, AT_HEADER_CRC).unwrap_or_default();
    put(head, AT_HEADER_CRC, &crc.to_le_bytes());
}

#[cfg(test)]
mod tests;
