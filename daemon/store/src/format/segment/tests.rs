//! Segment header, trailer and summary table: round trips, frozen places, refusals.
#![allow(clippy::cast_possible_truncation, reason = "test numbers are small")]

use proptest::prelude::*;

use super::*;
use crate::testkit::Fixture;

const SIZE: u64 = 256 << 10;

fn header() -> SegmentHeader {
    SegmentHeader {
        store_id: StoreId([7; 16]),
        segment: 3,
        epoch: 0x1_0000_0002,
        segment_size: SIZE,
        first_sequence: 99,
    }
}

fn footer() -> (Vec<u8>, Trailer, Vec<Summary>) {
    let mut store = Fixture::new();
    store.put_all(0..9);
    let segment = store
        .store
        .segments
        .iter()
        .find(|segment| !segment.rows.is_empty())
        .unwrap();
    let mut rows = segment.rows.clone();
    rows.sort_by_key(|row| row.place.offset);
    let trailer = Trailer {
        store_id: StoreId([7; 16]),
        segment: segment.number,
        rows: 9,
        epoch: segment.epoch,
        table_at: SIZE - BLOCK - table_len(9),
        end: segment.end,
        last_sequence: 1,
        table_crc: 0,
    };
    let mut bytes = vec![0xff; super::super::index(footer_len(9))];
    Footer::encode(&mut bytes, &trailer, &rows);
    (bytes, trailer, rows)
}

#[test]
fn golden_segment_header_of_version_1() {
    let mut block = [0xff; 4096];
    header().encode(&mut block);
    assert_eq!(block[..8], *b"KVS1\x01\0\0\0");
    assert_eq!(block[8..24], [7; 16]);
    assert_eq!(
        block[24..40],
        [3, 0, 0, 0, 0, 0, 0, 0, 2, 0, 0, 0, 1, 0, 0, 0]
    );
    assert_eq!(
        block[40..56],
        [0, 0, 4, 0, 0, 0, 0, 0, 99, 0, 0, 0, 0, 0, 0, 0]
    );
    assert_eq!(block[60..64], crc32fast::hash(&block[..60]).to_le_bytes());
    assert!(block[64..].iter().all(|byte| *byte == 0));
    assert_eq!(SegmentHeader::decode(&block), Some(header()));
}

#[test]
fn segment_header_with_any_bit_flipped_is_refused() {
    let mut good = [0; 4096];
    header().encode(&mut good);
    for bit in 0..SEGMENT_HEADER_LEN * 8 {
        let mut block = good;
        block[bit / 8] ^= 1 << (bit % 8);
        assert_eq!(SegmentHeader::decode(&block), None, "bit {bit}");
    }
}

#[test]
fn footer_round_trips_and_any_flipped_bit_is_refused() {
    let (bytes, trailer, rows) = footer();
    let at = bytes.len() - 4096;
    let found = Trailer::decode(&bytes[at..], SIZE).unwrap();
    assert_eq!(
        Trailer {
            table_crc: 0,
            ..found
        },
        trailer
    );
    assert_eq!(Footer::decode(&bytes, found).unwrap().rows, rows);
    for bit in (0..9 * SUMMARY_LEN * 8).step_by(7) {
        let mut bytes = bytes.clone();
        bytes[bit / 8] ^= 1 << (bit % 8);
        assert_eq!(Footer::decode(&bytes, found), None, "table bit {bit}");
    }
    for bit in 0..TRAILER_LEN * 8 {
        let mut bytes = bytes.clone();
        bytes[at + bit / 8] ^= 1 << (bit % 8);
        assert_eq!(
            Trailer::decode(&bytes[at..], SIZE),
            None,
            "trailer bit {bit}"
        );
    }
}

#[test]
fn trailer_of_a_segment_of_another_length_is_refused() {
    let (bytes, ..) = footer();
    let block = &bytes[bytes.len() - 4096..];
    assert!(Trailer::decode(block, SIZE).is_some());
    assert!(Trailer::decode(block, 2 * SIZE).is_none());
    assert!(Trailer::decode(block, 0).is_none());
}

#[test]
fn segment_names_read_back_and_foreign_names_do_not() {
    assert_eq!(segment_name(0x1f), "segment-0000001f.kvs");
    assert_eq!(segment_number("segment-0000001f.kvs"), Some(0x1f));
    for name in [
        "segment-1f.kvs",
        "segment-0000001F.kvs",
        "superblock.kvs",
        "segment-+000001f.kvs",
    ] {
        assert_eq!(segment_number(name), None, "{name}");
    }
}

proptest! {
    #[test]
    fn decoders_never_panic_on_arbitrary_blocks(
        block in prop::collection::vec(any::<u8>(), 0..300),
        rows in any::<u32>(),
    ) {
        let _ = SegmentHeader::decode(&block);
        let _ = Trailer::decode(&block, SIZE);
        let (_, trailer, _) = footer();
        let _ = Footer::decode(&block, Trailer { rows: rows % 10_000, ..trailer });
    }
}
