//! Segment files: a header block in front, records, and at the end a table of what lies inside.
//!
//! Upstairs:   `log` writes them, `recover` and `verify` read them.
//! Downstairs: `crc32fast`.
//!
//! `segment-XXXXXXXX.kvs` (eight hex digits: the segment number) is `segment_size` bytes long from
//! the start. Block 0 is the segment header; records follow front to back; when the segment is
//! sealed the footer is written: the summary table, which ends where the last block begins, and
//! the trailer in the last block.
//!
//! Segment header: 64 bytes at the start of block 0, the rest of the block is zero.
//!
//! | off | len | field          | meaning                                                    |
//! |----:|----:|----------------|------------------------------------------------------------|
//! |   0 |   4 | magic          | "KVS1"                                                     |
//! |   4 |   2 | version        | 1                                                          |
//! |   6 |   2 | reserved       | zero                                                       |
//! |   8 |  16 | store_id       | identity of the store                                      |
//! |  24 |   4 | segment        | segment number                                             |
//! |  28 |   4 | reserved       | zero                                                       |
//! |  32 |   8 | epoch          | of this life of the file; a recycled file gets a new one   |
//! |  40 |   8 | segment_size   | length of the file                                         |
//! |  48 |   8 | first_sequence | no put of this life has a lower one; forwarded copies may   |
//! |  56 |   4 | reserved       | zero                                                       |
//! |  60 |   4 | crc            | crc32 of bytes 0..60                                       |
//!
//! Trailer: 76 bytes at the start of the last block, the rest of the block is zero.
//!
//! | off | len | field          | meaning                                                    |
//! |----:|----:|----------------|------------------------------------------------------------|
//! |   0 |   4 | magic          | "KVF1"                                                     |
//! |   4 |   2 | version        | 1                                                          |
//! |   6 |   2 | reserved       | zero                                                       |
//! |   8 |  16 | store_id       | identity of the store                                      |
//! |  24 |   4 | segment        | segment number                                             |
//! |  28 |   4 | rows           | rows of the summary table                                  |
//! |  32 |   8 | epoch          | of the life that was sealed (else: not this life's footer) |
//! |  40 |   8 | table_at       | offset of the summary table, a multiple of 4096            |
//! |  48 |   8 | end            | first byte behind the last record                          |
//! |  56 |   8 | last_sequence  | highest sequence in the table, 0 when it is empty          |
//! |  64 |   4 | table_crc      | crc32 of the table's rows                                  |
//! |  68 |   4 | reserved       | zero                                                       |
//! |  72 |   4 | crc            | crc32 of bytes 0..72                                       |
//!
//! Summary row: 128 bytes, in the order of the records; records that were never durable are not
//! listed.
//!
//! | off | len | field       | meaning                                                       |
//! |----:|----:|-------------|---------------------------------------------------------------|
//! |   0 |  32 | key         | block key                                                     |
//! |  32 |  32 | parent      | key of the block before it                                    |
//! |  64 |  32 | layout      | layout fingerprint                                            |
//! |  96 |   4 | namespace   | namespace number                                              |
//! | 100 |   4 | block       | offset of the record in 4096-byte blocks                      |
//! | 104 |   4 | blocks      | length of the image in 4096-byte blocks                       |
//! | 108 |   1 | head_blocks | length of the head room in 4096-byte blocks                   |
//! | 109 |   1 | through     | as in the record header                                       |
//! | 110 |   1 | kind        | as in the record header                                       |
//! | 111 |   1 | level       | as in the record header                                       |
//! | 112 |   8 | sequence    | as in the record header                                       |
//! | 120 |   4 | tokens      | as in the record header                                       |
//! | 124 |   4 | position    | as in the record header                                       |
//!
//! Not here on purpose: nothing that a record does not say itself. A lost footer costs time.

use kvtier_proto::{BlockKey, LayoutFingerprint, Level, NamespaceId, PayloadKind, Quality};

use super::fields::{array, crc_of, is_sealed, put, u8_at, u16_at, u32_at, u64_at, zero};
use super::record::{HEAD_LEN_MAX, STORED_LEN_MAX};
use super::{BLOCK, Place, StoreId, Summary, VERSION, padded};

/// First bytes of a segment file.
pub const SEGMENT_MAGIC: [u8; 4] = *b"KVS1";
/// First bytes of a trailer.
pub const TRAILER_MAGIC: [u8; 4] = *b"KVF1";
/// Bytes of a segment header that carry meaning.
pub const SEGMENT_HEADER_LEN: usize = 64;
/// Bytes of a trailer that carry meaning.
pub const TRAILER_LEN: usize = 76;
/// Bytes of one summary row.
pub const SUMMARY_LEN: usize = 128;
/// Smallest segment: header, one small record and a footer with room to spare. Unit: bytes.
pub const SEGMENT_SIZE_MIN: u64 = 64 << 10;
/// Largest segment: offsets of summaries are 32-bit block numbers, buffers stay small. Unit: bytes.
pub const SEGMENT_SIZE_MAX: u64 = 4 << 30;

const AT_STORE_ID: usize = 8;
const AT_SEGMENT: usize = 24;
const AT_ROWS: usize = 28;
const AT_EPOCH: usize = 32;
const AT_SIZE: usize = 40;
const AT_FIRST_SEQUENCE: usize = 48;
const AT_SEGMENT_CRC: usize = 60;
const AT_TABLE_AT: usize = 40;
const AT_END: usize = 48;
const AT_LAST_SEQUENCE: usize = 56;
const AT_TABLE_CRC: usize = 64;
const AT_TRAILER_CRC: usize = 72;

const _: () = {
    assert!(AT_SEGMENT_CRC + 4 == SEGMENT_HEADER_LEN);
    assert!(AT_TRAILER_CRC + 4 == TRAILER_LEN);
    assert!(SUMMARY_LEN == 96 + 4 * 3 + 2 + 2 + 8 + 8);
    assert!(SEGMENT_SIZE_MIN.is_multiple_of(BLOCK));
};

/// Name of a segment's file.
pub fn segment_name(number: u32) -> String {
    format!("segment-{number:08x}.kvs")
}

/// Number in a segment file's name, or `None` for any other name.
pub fn segment_number(name: &str) -> Option<u32> {
    let digits = name.strip_prefix("segment-")?.strip_suffix(".kvs")?;
    let number = u32::from_str_radix(digits, 16).ok()?;
    (segment_name(number) == name).then_some(number)
}

/// Block 0 of a segment file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SegmentHeader {
    /// Identity of the store.
    pub store_id: StoreId,
    /// Segment number.
    pub segment: u32,
    /// Epoch of this life of the file.
    pub epoch: u64,
    /// Length of the file. Unit: bytes.
    pub segment_size: u64,
    /// No put of this life has a lower sequence; copies of pinned records may.
    pub first_sequence: u64,
}

impl SegmentHeader {
    /// Fills `block`, one whole block.
    pub(crate) fn encode(&self, block: &mut [u8]) {
        block.fill(0);
        put(block, 0, &SEGMENT_MAGIC);
        put(block, 4, &VERSION.to_le_bytes());
        put(block, AT_STORE_ID, &self.store_id.0);
        put(block, AT_SEGMENT, &self.segment.to_le_bytes());
        put(block, AT_EPOCH, &self.epoch.to_le_bytes());
        put(block, AT_SIZE, &self.segment_size.to_le_bytes());
        put(block, AT_FIRST_SEQUENCE, &self.first_sequence.to_le_bytes());
        let crc = crc_of(block, 0, AT_SEGMENT_CRC).unwrap_or_default();
        put(block, AT_SEGMENT_CRC, &crc.to_le_bytes());
    }

    /// Reads block 0. `None` when it is not a sound header of this version.
    pub fn decode(block: &[u8]) -> Option<Self> {
        let sound = array(block, 0) == Some(SEGMENT_MAGIC)
            && is_sealed(block, AT_SEGMENT_CRC)
            && u16_at(block, 4) == Some(VERSION);
        if !sound {
            return None;
        }
        Some(Self {
            store_id: StoreId(array(block, AT_STORE_ID)?),
            segment: u32_at(block, AT_SEGMENT)?,
            epoch: u64_at(block, AT_EPOCH)?,
            segment_size: u64_at(block, AT_SIZE)?,
            first_sequence: u64_at(block, AT_FIRST_SEQUENCE)?,
        })
    }
}

/// The last block of a sealed segment.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Trailer {
    /// Identity of the store.
    pub store_id: StoreId,
    /// Segment number.
    pub segment: u32,
    /// Rows of the summary table.
    pub rows: u32,
    /// Epoch of the life that was sealed.
    pub epoch: u64,
    /// Offset of the summary table. Unit: bytes.
    pub table_at: u64,
    /// First byte behind the last record. Unit: bytes.
    pub end: u64,
    /// Highest sequence in the table.
    pub last_sequence: u64,
    /// Checksum of the rows.
    pub table_crc: u32,
}

/// Bytes of a summary table of `rows`, padded to whole blocks.
pub const fn table_len(rows: u64) -> u64 {
    padded(rows * SUMMARY_LEN as u64)
}

/// Bytes that a footer of `rows` takes at the end of a segment.
pub const fn footer_len(rows: u64) -> u64 {
    table_len(rows) + BLOCK
}

impl Trailer {
    /// Fills `block`, one whole block.
    fn encode(&self, block: &mut [u8]) {
        block.fill(0);
        put(block, 0, &TRAILER_MAGIC);
        put(block, 4, &VERSION.to_le_bytes());
        put(block, AT_STORE_ID, &self.store_id.0);
        put(block, AT_SEGMENT, &self.segment.to_le_bytes());
        put(block, AT_ROWS, &self.rows.to_le_bytes());
        put(block, AT_EPOCH, &self.epoch.to_le_bytes());
        put(block, AT_TABLE_AT, &self.table_at.to_le_bytes());
        put(block, AT_END, &self.end.to_le_bytes());
        put(block, AT_LAST_SEQUENCE, &self.last_sequence.to_le_bytes());
        put(block, AT_TABLE_CRC, &self.table_crc.to_le_bytes());
        let crc = crc_of(block, 0, AT_TRAILER_CRC).unwrap_or_default();
        put(block, AT_TRAILER_CRC, &crc.to_le_bytes());
    }

    /// Reads the last block of a segment of `segment_size` bytes. `None` when it is not a sound
    /// trailer of this version, or its lengths do not fit the segment.
    pub fn decode(block: &[u8], segment_size: u64) -> Option<Self> {
        let sound = array(block, 0) == Some(TRAILER_MAGIC)
            && is_sealed(block, AT_TRAILER_CRC)
            && u16_at(block, 4) == Some(VERSION);
        if !sound {
            return None;
        }
        let trailer = Self {
            store_id: StoreId(array(block, AT_STORE_ID)?),
            segment: u32_at(block, AT_SEGMENT)?,
            rows: u32_at(block, AT_ROWS)?,
            epoch: u64_at(block, AT_EPOCH)?,
            table_at: u64_at(block, AT_TABLE_AT)?,
            end: u64_at(block, AT_END)?,
            last_sequence: u64_at(block, AT_LAST_SEQUENCE)?,
            table_crc: u32_at(block, AT_TABLE_CRC)?,
        };
        let last = segment_size.checked_sub(BLOCK)?;
        let table_end = trailer
            .table_at
            .checked_add(table_len(u64::from(trailer.rows)))?;
        let fits = table_end == last && trailer.end <= trailer.table_at && trailer.end >= BLOCK;
        fits.then_some(trailer)
    }

    /// Bytes of the table, padded.
    pub fn table_len(&self) -> u64 {
        table_len(u64::from(self.rows))
    }
}

/// Trailer and rows.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Footer {
    /// The fixed part.
    pub trailer: Trailer,
    /// One row a record, in the order of the segment.
    pub rows: Vec<Summary>,
}

impl Footer {
    /// Fills `bytes`, which is `footer_len(rows)` long: table, then trailer block.
    pub(crate) fn encode(bytes: &mut [u8], trailer: &Trailer, rows: &[Summary]) {
        bytes.fill(0);
        let mut at = 0;
        for row in rows {
            if let Some(place) = bytes.get_mut(at..at + SUMMARY_LEN) {
                encode_summary(place, row);
            }
            at += SUMMARY_LEN;
        }
        let table_crc = crc_of(bytes, 0, at).unwrap_or_default();
        let trailer_at = bytes.len() - super::index(BLOCK);
        if let Some(block) = bytes.get_mut(trailer_at..) {
            Trailer {
                table_crc,
                ..*trailer
            }
            .encode(block);
        }
    }

    /// Reads the table that `trailer` speaks of. `None` when any row is unsound: then the
    /// segment is scanned instead.
    pub fn decode(table: &[u8], trailer: Trailer) -> Option<Self> {
        let rows = sound_rows(table, &trailer)?.collect();
        Some(Self { trailer, rows })
    }
}

/// The rows of the table that `trailer` speaks of, one by one. `None` when any is unsound.
pub(crate) fn sound_rows<'a>(
    table: &'a [u8],
    trailer: &Trailer,
) -> Option<impl Iterator<Item = Summary> + use<'a>> {
    let Trailer { segment, epoch, .. } = *trailer;
    let rows_len = (trailer.rows as usize).checked_mul(SUMMARY_LEN)?;
    let table = table.get(..rows_len)?;
    if crc32fast::hash(table) != trailer.table_crc {
        return None;
    }
    let rows = table.chunks_exact(SUMMARY_LEN);
    let mut end = BLOCK;
    for row in rows.clone() {
        let place = decode_summary(row, segment, epoch)?.place;
        let row_end = place.offset.checked_add(u64::from(place.len))?;
        if place.offset < end || row_end > trailer.end {
            return None;
        }
        end = row_end;
    }
    Some(rows.filter_map(move |row| decode_summary(row, segment, epoch)))
}

fn blocks_of(bytes: u64) -> [u8; 4] {
    u32::try_from(bytes / BLOCK)
        .unwrap_or(u32::MAX)
        .to_le_bytes()
}

fn encode_summary(row: &mut [u8], summary: &Summary) {
    let place = &summary.place;
    put(row, 0, &summary.key.0);
    put(row, 32, &summary.parent.0);
    put(row, 64, &summary.layout.0);
    put(row, 96, &summary.namespace.0.to_le_bytes());
    put(row, 100, &blocks_of(place.offset));
    put(row, 104, &blocks_of(u64::from(place.len)));
    let [head_blocks, ..] = blocks_of(u64::from(place.head_len));
    let (through, kind) = (summary.through as u8, summary.kind as u8);
    put(row, 108, &[head_blocks, through, kind, summary.level.0]);
    put(row, 112, &place.sequence.to_le_bytes());
    put(row, 120, &summary.tokens.to_le_bytes());
    put(row, 124, &summary.position.to_le_bytes());
}

fn decode_summary(row: &[u8], segment: u32, epoch: u64) -> Option<Summary> {
    let len = u64::from(u32_at(row, 104)?).checked_mul(BLOCK)?;
    let head_len = u64::from(u8_at(row, 108)?) * BLOCK;
    let sound = (BLOCK..=u64::from(HEAD_LEN_MAX)).contains(&head_len)
        && len > head_len
        && len - head_len <= padded(STORED_LEN_MAX);
    if !sound {
        return None;
    }
    Some(Summary {
        namespace: NamespaceId(u32_at(row, 96)?),
        key: BlockKey(array(row, 0)?),
        parent: BlockKey(array(row, 32)?),
        layout: LayoutFingerprint(array(row, 64)?),
        kind: PayloadKind::from_number(u8_at(row, 110)?)?,
        level: Level(u8_at(row, 111)?),
        through: Quality::from_number(u8_at(row, 109)?)?,
        tokens: u32_at(row, 120)?,
        position: u32_at(row, 124)?,
        place: Place {
            segment,
            offset: u64::from(u32_at(row, 100)?) * BLOCK,
            len: u32::try_from(len).ok()?,
            head_len: u32::try_from(head_len).ok()?,
            epoch,
            sequence: u64_at(row, 112)?,
        },
    })
}

/// True when the whole block is zero: never written, or written and lost.
pub(crate) fn is_blank(block: &[u8]) -> bool {
    zero(block, 0, block.len())
}

#[cfg(test)]
mod tests;
