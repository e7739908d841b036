//! Bodies of the fuzz targets: every decoder of bytes that come from a device.
//!
//! Upstairs:   `fuzz/` and `tests/tests/corpus.rs`, see `kvtier_proto::fuzzing`.
//! Downstairs: `format`, `read`, `scan`, `catalog`.
//!
//! `head` has the record's head room, `image` whole records, `ends` what stands at both ends of a
//! segment and of a store, `walk` the scan of a segment, `open` a whole store. The offsets of
//! checksums are written here once more, as docs/FORMAT.md gives them: a decoder that moved one
//! would not be reached.

mod disk;
mod ends;
mod head;
mod image;
mod open;
mod walk;

use std::sync::{Arc, OnceLock};

use kvtier_proto::fuzzing::Target;
use kvtier_proto::{BlockKey, LayoutFingerprint, Level, NamespaceId, PayloadKind, Quality};

use crate::format::record::{SPAN, Stamp};
use crate::format::{Place, StoreId, Summary, fields};
use crate::image::{PartSpec, RecordBuilder, RecordMeta};
use crate::mem::{Arena, Share};

/// Targets of this package.
pub const TARGETS: [Target; 9] = [
    Target::new("record_head", head::run, head::seeds),
    Target::new("record_image", image::run, head::seeds),
    Target::new("segment_header", ends::segment_header, ends::header_seeds),
    Target::new("segment_footer", ends::segment_footer, ends::footer_seeds),
    Target::new("segment_name", ends::segment_name, ends::name_seeds),
    Target::new("segment_walk", walk::run, walk::seeds).allocating(2 << 20),
    Target::new("store_open", open::run, open::seeds).allocating(32 << 20),
    Target::new("superblock", ends::superblock, ends::superblock_seeds),
    Target::new("catalog_row", ends::catalog_row, ends::row_seeds),
];

/// Largest input that is looked at. Unit: bytes.
const INPUT_MAX: usize = 1 << 20;

const STORE: StoreId = StoreId([0x5A; 16]);
const SEGMENT: u32 = 3;
const EPOCH: u64 = (1 << 32) | 9;

const AT_PARTS: usize = 156;
const AT_TABLE_CRC: usize = 248;
const AT_HEADER_CRC: usize = 252;
const TABLE: usize = 256;
const ROW: usize = 16;

/// Memory that records are verified in.
fn arena() -> Option<&'static Arc<Arena>> {
    static ARENA: OnceLock<Option<Arc<Arena>>> = OnceLock::new();
    let make = || Arena::create("kvtier-fuzz", 2 * INPUT_MAX, Share::Private).ok();
    ARENA.get_or_init(make).as_ref()
}

/// Makes the checksum at `at` the one of everything before it.
fn seal(bytes: &mut [u8], at: usize) {
    if let (Some(crc), true) = (fields::crc_of(bytes, 0, at), bytes.len() >= at + 4) {
        fields::put(bytes, at, &crc.to_le_bytes());
    }
}

/// Stored lengths of the rows of a part table, as many as there are.
fn stored_lens(bytes: &[u8]) -> Vec<u32> {
    let parts = fields::u32_at(bytes, AT_PARTS).unwrap_or_default() as usize;
    let rows = bytes.get(TABLE..).unwrap_or_default().chunks_exact(ROW);
    let len = |row: &[u8]| fields::u32_at(row, 8).unwrap_or_default();
    rows.take(parts).map(len).collect()
}

/// Makes the checksums of header and part table those of their bytes.
fn seal_head(bytes: &mut [u8]) {
    let lens = stored_lens(bytes);
    let spans = lens.iter().map(|len| len.div_ceil(SPAN) as usize);
    let end = TABLE + lens.len() * ROW + 4 * spans.sum::<usize>();
    if let Some(crc) = fields::crc_of(bytes, TABLE, end) {
        fields::put(bytes, AT_TABLE_CRC, &crc.to_le_bytes());
    }
    seal(bytes, AT_HEADER_CRC);
}

/// Makes every checksum of a record image that of its bytes.
fn seal_image(bytes: &mut [u8]) {
    let lens = stored_lens(bytes);
    let (mut at, head_len) = (TABLE + lens.len() * ROW, fields::u32_at(bytes, 12));
    let mut from = head_len.unwrap_or_default() as usize;
    for len in lens {
        let len = len as usize;
        let part = bytes
            .get(from..from.saturating_add(len))
            .unwrap_or_default();
        let crcs: Vec<u32> = part.chunks(SPAN as usize).map(crc32fast::hash).collect();
        for crc in crcs {
            if bytes.len() >= at + 4 {
                fields::put(bytes, at, &crc.to_le_bytes());
            }
            at += 4;
        }
        from = from.saturating_add(len);
    }
    seal_head(bytes);
}

fn summary(number: u8) -> Summary {
    let place = Place {
        segment: SEGMENT,
        offset: u64::from(number) * 8192,
        len: 8192,
        head_len: 4096,
        epoch: EPOCH,
        sequence: u64::from(number),
    };
    Summary {
        namespace: NamespaceId(7),
        key: BlockKey([number; 32]),
        parent: BlockKey([number - 1; 32]),
        layout: LayoutFingerprint([0x11; 32]),
        kind: PayloadKind::Kv,
        level: Level::RAW,
        through: Quality::Exact,
        tokens: 16,
        position: 16 * u32::from(number),
        place,
    }
}

/// A stamped record whose parts have these stored lengths, at `offset` of [`SEGMENT`].
fn record(number: u8, lens: &[u32], offset: u64) -> Option<Vec<u8>> {
    let Summary {
        namespace,
        key,
        parent,
        layout,
        kind,
        level,
        through,
        tokens,
        position,
        ..
    } = summary(number);
    let meta = RecordMeta {
        namespace,
        key,
        parent,
        layout,
        kind,
        level,
        through,
        tokens,
        position,
        codec_tables: 0,
    };
    let part = |(at, len): (u16, &u32)| PartSpec {
        layer: at / 2,
        code: match at % 2 {
            0 => crate::format::PartCode::K,
            _ => crate::format::PartCode::V,
        },
        flags: 0,
        stored_len: *len,
        raw_len: *len,
    };
    let parts: Vec<PartSpec> = (0..).zip(lens).map(part).collect();
    let builder = RecordBuilder::new(&meta, &parts);
    let image_len = builder.layout().ok()?.image_len as usize;
    let mut buf = arena()?.alloc(image_len)?;
    buf.fill(number);
    let mut image = builder.build(buf).ok()?;
    image.stamp(&Stamp {
        store_id: STORE,
        epoch: EPOCH,
        sequence: u64::from(number),
        segment: SEGMENT,
        offset,
    });
    Some(image.buf().get(..image_len)?.to_vec())
}
