//! What stands at the ends of segments and of a store: headers, footers, superblock, names and the
//! rows of the catalog.
//!
//! Upstairs:   the targets of these names.
//! Downstairs: `format::segment`, `format::superblock`, `catalog`.

use super::{EPOCH, INPUT_MAX, SEGMENT, STORE, seal, summary};
use crate::catalog::{read_row, row_of};
use crate::format::record::HEAD_LEN_MAX;
use crate::format::segment::{SUMMARY_LEN, footer_len, segment_name as name_of, segment_number};
use crate::format::superblock::{SLOT_LEN, WIPED_MAX};
use crate::format::{
    BLOCK, CleanClose, Footer, SegmentHeader, Superblock, Trailer, Wiped, fields, index,
};
use crate::index::Stored;
use kvtier_proto::NamespaceId;

/// `data` cut or filled up with zeros to `len`.
fn exactly(data: &[u8], len: usize) -> Vec<u8> {
    let mut bytes = data.to_vec();
    bytes.resize(len, 0);
    bytes
}

/// Calls `check` with the bytes as they are, and with the checksum at `at` mended.
fn both(mut bytes: Vec<u8>, at: usize, check: impl Fn(&[u8])) {
    check(&bytes);
    seal(&mut bytes, at);
    check(&bytes);
}

pub(super) fn segment_header(data: &[u8]) {
    both(exactly(data, index(BLOCK)), 60, |block| {
        if let Some(header) = SegmentHeader::decode(block) {
            let mut again = vec![0; index(BLOCK)];
            header.encode(&mut again);
            assert_eq!(SegmentHeader::decode(&again), Some(header));
        }
    });
    assert!(data.len() >= 64 || SegmentHeader::decode(data).is_none());
}

pub(super) fn header_seeds() -> Vec<Vec<u8>> {
    let mut block = vec![0; index(BLOCK)];
    let header = SegmentHeader {
        store_id: STORE,
        segment: SEGMENT,
        epoch: EPOCH,
        segment_size: 1 << 20,
        first_sequence: 77,
    };
    header.encode(&mut block);
    block.truncate(64);
    vec![block]
}

/// The input is a footer: its table, then its trailer in the last block.
pub(super) fn segment_footer(data: &[u8]) {
    if data.len() > INPUT_MAX {
        return;
    }
    let at = data.len().saturating_sub(index(BLOCK));
    let (table, last) = data.split_at(at);
    let mut trailer = exactly(last, index(BLOCK));
    footer(table, &trailer);
    let rows = fields::u32_at(&trailer, 28).unwrap_or_default() as usize;
    if let Some(crc) = fields::crc_of(table, 0, rows.saturating_mul(SUMMARY_LEN)) {
        fields::put(&mut trailer, 64, &crc.to_le_bytes());
    }
    seal(&mut trailer, 72);
    footer(table, &trailer);
}

fn footer(table: &[u8], last: &[u8]) {
    let rows = fields::u32_at(last, 28).unwrap_or_default();
    let table_at = fields::u64_at(last, 40).unwrap_or_default();
    let size = table_at.saturating_add(footer_len(u64::from(rows)));
    // A segment of any other length has no such trailer.
    assert_eq!(Trailer::decode(last, size.wrapping_add(BLOCK)), None);
    let Some(trailer) = Trailer::decode(last, size) else {
        return;
    };
    assert!(trailer.table_at + trailer.table_len() + BLOCK == size);
    assert!(BLOCK <= trailer.end && trailer.end <= trailer.table_at);
    let Some(footer) = Footer::decode(table, trailer) else {
        return;
    };
    assert!(footer.rows.capacity() <= 2 * (table.len() / SUMMARY_LEN) + 4);
    let mut end = BLOCK;
    for row in &footer.rows {
        let place = row.place;
        assert!(place.offset >= end, "records overlap");
        assert!(place.head_len <= HEAD_LEN_MAX && place.head_len < place.len);
        assert_eq!(
            (place.segment, place.epoch),
            (trailer.segment, trailer.epoch)
        );
        end = place.offset + u64::from(place.len);
    }
    assert!(end <= trailer.end);
    let mut again = vec![0; index(footer_len(u64::from(trailer.rows)))];
    Footer::encode(&mut again, &trailer, &footer.rows);
    let rows_len = footer.rows.len() * SUMMARY_LEN;
    assert_eq!(again.get(..rows_len), table.get(..rows_len));
    let trailer_at = again.len() - index(BLOCK);
    let block = again.get(trailer_at..).unwrap_or_default();
    assert_eq!(Trailer::decode(block, size), Some(trailer));
}

pub(super) fn footer_seeds() -> Vec<Vec<u8>> {
    let of = |count: u8| {
        let rows: Vec<_> = (1..=count).map(summary).collect();
        let end = rows.last().map_or(BLOCK, |row| row.place.offset + 8192);
        let trailer = Trailer {
            store_id: STORE,
            segment: SEGMENT,
            rows: count.into(),
            epoch: EPOCH,
            table_at: end,
            end,
            last_sequence: count.into(),
            table_crc: 0,
        };
        let mut footer = vec![0; index(footer_len(count.into()))];
        Footer::encode(&mut footer, &trailer, &rows);
        footer
    };
    vec![of(0), of(1), of(40)]
}

pub(super) fn segment_name(data: &[u8]) {
    if let Ok(name) = std::str::from_utf8(data)
        && let Some(number) = segment_number(name)
    {
        assert_eq!(name_of(number), name, "two names of one segment");
    }
    let number = fields::u32_at(data, 0).unwrap_or_default();
    assert_eq!(segment_number(&name_of(number)), Some(number));
}

pub(super) fn name_seeds() -> Vec<Vec<u8>> {
    let names = [
        "segment-00000000.kvs",
        "segment-ffffffff.kvs",
        "segment-+000000f.kvs",
        "superblock.kvs",
    ];
    names.map(|name| name.as_bytes().to_vec()).into()
}

/// The input is the front of a slot; the rest is zero.
pub(super) fn superblock(data: &[u8]) {
    both(exactly(data, index(SLOT_LEN)), 65_532, |slot| {
        let Some(found) = Superblock::decode(slot) else {
            return;
        };
        assert_eq!(Superblock::version_of(slot), Some(1));
        assert!(found.wiped.len() <= WIPED_MAX);
        let mut again = vec![0; slot.len()];
        found.encode(&mut again);
        assert_eq!(Superblock::decode(&again).as_ref(), Some(&found));
        // Not by the search that the store uses: no wipe may be overlooked (W1).
        let below = |namespace| {
            let rows = found.wiped.iter().filter(|row| row.namespace == namespace);
            rows.map(|row| row.below)
                .max()
                .unwrap_or(0)
                .max(found.floor)
        };
        let ends = found.wiped.first().into_iter().chain(found.wiped.last());
        let some = found.wiped.iter().step_by(found.wiped.len() / 64 + 1);
        for row in some.chain(ends) {
            for namespace in [row.namespace, NamespaceId(row.namespace.0 ^ 1)] {
                let below = below(namespace);
                assert!(below == 0 || found.is_wiped(namespace, below - 1));
                assert!(!found.is_wiped(namespace, below));
            }
        }
    });
    assert!(data.len() == index(SLOT_LEN) || Superblock::decode(data).is_none());
}

pub(super) fn superblock_seeds() -> Vec<Vec<u8>> {
    let of = |rows: u32, clean| {
        let wiped = (0..rows).map(|number| Wiped {
            namespace: NamespaceId(2 * number + 1),
            below: u64::from(number) * 1000 + 5,
        });
        let superblock = Superblock {
            store_id: STORE,
            revision: 12,
            incarnation: 2,
            segment_size: 1 << 20,
            floor: 3,
            clean,
            wiped: wiped.collect(),
        };
        let mut slot = vec![0; index(SLOT_LEN)];
        superblock.encode(&mut slot);
        slot.truncate(96 + 12 * rows as usize);
        slot
    };
    let close = CleanClose {
        rows: 9,
        digest: 0x1234_5678_9ABC,
    };
    vec![of(0, None), of(3, Some(close)), of(200, None)]
}

pub(super) fn catalog_row(data: &[u8]) {
    if let Some(stored) = read_row(data) {
        let again = row_of(&stored);
        assert_eq!(read_row(&again), Some(stored));
        assert_eq!(again.as_slice(), data);
    }
}

pub(super) fn row_seeds() -> Vec<Vec<u8>> {
    let of = |number: u8| {
        let row = summary(number);
        let stored = Stored {
            namespace: row.namespace,
            key: row.key,
            kind: row.kind,
            level: row.level,
            through: row.through,
            layout_tag: 0x0102_0304,
            pinned: false,
            place: row.place,
        };
        row_of(&stored).to_vec()
    };
    vec![of(1), of(200)]
}
