//! The record header: frozen bytes, every refusal, and arbitrary input.
#![allow(clippy::cast_possible_truncation, reason = "test numbers are small")]

use proptest::prelude::*;

use super::*;
use crate::format::fields;
use crate::mem::{Arena, Share};
use crate::testkit::{NS, build, image, key, layout, meta, parts, payload, stored_len};

fn stamped() -> Vec<u8> {
    let arena = Arena::create("test", 1 << 20, Share::Private).unwrap();
    let mut image = image(&arena, NS, 1, 0);
    image.stamp(&STAMP);
    image.into_buf().to_vec()
}

const STAMP: Stamp = Stamp {
    store_id: StoreId([0xab; 16]),
    epoch: 0x0000_0003_0000_0009,
    sequence: 0x0000_0300_0000_0011,
    segment: 5,
    offset: 3 * BLOCK,
};

/// Seals a header again after a field was changed.
fn reseal(bytes: &mut [u8]) {
    let crc = crc32fast::hash(&bytes[..AT_HEADER_CRC]);
    bytes[AT_HEADER_CRC..HEADER_LEN].copy_from_slice(&crc.to_le_bytes());
}

// The bytes of version 1 are frozen: a change here needs a new version.
#[test]
fn golden_header_of_version_1() {
    let bytes = stamped();
    let mut want = Vec::new();
    want.extend(*b"KVR1");
    want.extend([1, 0, 1, 0, 0, 0, 0, 0, 0x00, 0x10, 0, 0]);
    want.extend([9, 0, 0, 0, 3, 0, 0, 0, 0x11, 0, 0, 0, 0, 3, 0, 0]);
    want.extend([5, 0, 0, 0, 7, 0, 0, 0, 0x00, 0x30, 0, 0, 0, 0, 0, 0]);
    want.extend(key(1).0);
    want.extend(key(0).0);
    want.extend(layout(1).0);
    want.extend([0, 1, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 4, 0, 0, 0]);
    want.extend((stored_len(1) as u64).to_le_bytes());
    want.extend((stored_len(1) as u64 + 12).to_le_bytes());
    want.extend([0xab; 16]);
    want.extend([0; 56]);
    assert_eq!(bytes[..AT_TABLE_CRC], want[..]);
    let first = parts(1)[0];
    let mut row = vec![0, 0, 1, 0, 0, 0, 0, 0];
    row.extend(first.stored_len.to_le_bytes());
    row.extend(first.raw_len.to_le_bytes());
    assert_eq!(bytes[HEADER_LEN..HEADER_LEN + PART_LEN], row[..]);
    let span = crc32fast::hash(&payload(NS, 1, 0, stored_len(1))[..first.stored_len as usize]);
    let at = HEADER_LEN + 4 * PART_LEN;
    assert_eq!(bytes[at..at + 4], span.to_le_bytes());
    assert_eq!(
        crc32fast::hash(&bytes[..AT_HEADER_CRC]).to_le_bytes(),
        bytes[AT_HEADER_CRC..256]
    );
}

#[test]
fn head_round_trips_through_its_bytes() {
    let head = Head::decode(&stamped()).unwrap();
    let summary = &head.header.summary;
    assert_eq!(
        (summary.namespace, summary.key, summary.layout),
        (NS, key(1), layout(1))
    );
    assert_eq!(summary.parent, meta(NS, 1).parent);
    assert_eq!(
        (summary.place.segment, summary.place.offset),
        (STAMP.segment, STAMP.offset)
    );
    assert_eq!(
        (summary.place.epoch, summary.place.sequence),
        (STAMP.epoch, STAMP.sequence)
    );
    let lens: Vec<u32> = head.parts().iter().map(|part| part.stored_len).collect();
    let want: Vec<u32> = parts(1).iter().map(|part| part.stored_len).collect();
    assert_eq!(lens, want);
    assert_eq!(head.parts()[2].code, PartCode::K);
}

#[test]
fn header_with_any_bit_flipped_is_refused() {
    let good = stamped();
    for bit in 0..HEADER_LEN * 8 {
        let mut bytes = good.clone();
        bytes[bit / 8] ^= 1 << (bit % 8);
        assert_eq!(Header::decode(&bytes), Err(Miss::HeaderCrc), "bit {bit}");
    }
}

#[test]
fn table_with_any_bit_flipped_is_refused() {
    let good = stamped();
    for bit in HEADER_LEN * 8..(HEADER_LEN + 4 * (PART_LEN + 4)) * 8 {
        let mut bytes = good.clone();
        bytes[bit / 8] ^= 1 << (bit % 8);
        assert_eq!(Head::decode(&bytes), Err(Miss::HeaderCrc), "bit {bit}");
    }
}

// Fields out of bounds under a good checksum: a forged header must not get further.
#[test]
fn header_out_of_bounds_is_refused_even_when_its_checksum_is_right() {
    let cases: [(usize, &[u8], Miss); 17] = [
        (AT_VERSION, &[2, 0], Miss::Unsupported),
        (AT_KIND, &[0], Miss::Unsupported),
        (AT_KIND, &[6], Miss::Unsupported),
        (AT_FLAGS, &[1], Miss::Unsupported),
        (AT_RESERVED, &[1], Miss::Unsupported),
        (AT_RESERVED + 54, &[1], Miss::Unsupported),
        (AT_THROUGH, &[5], Miss::Unsupported),
        (AT_HEAD_LEN, &[0, 0, 0, 0], Miss::HeaderCrc),
        (AT_HEAD_LEN, &[1, 0x10, 0, 0], Miss::HeaderCrc),
        (AT_HEAD_LEN, &[0, 0, 2, 0], Miss::HeaderCrc),
        (AT_OFFSET, &[0, 0, 0, 0], Miss::HeaderCrc),
        (AT_OFFSET, &[1, 0x10], Miss::HeaderCrc),
        (AT_TOKENS, &[0, 0, 0, 0], Miss::HeaderCrc),
        (AT_TOKENS, &[1, 8, 0, 0], Miss::HeaderCrc),
        (AT_PARTS, &[0, 0, 0, 0], Miss::HeaderCrc),
        (AT_STORED_LEN, &[0; 8], Miss::HeaderCrc),
        (AT_RAW_LEN, &[0xff; 8], Miss::HeaderCrc),
    ];
    for (at, value, miss) in cases {
        let mut bytes = stamped();
        fields::put(&mut bytes, at, value);
        reseal(&mut bytes);
        assert_eq!(Header::decode(&bytes), Err(miss), "{value:?} at {at}");
    }
}

#[test]
fn place_store_and_epoch_of_another_record_are_told_apart() {
    let header = Header::decode(&stamped()).unwrap();
    let (id, place) = (STAMP.store_id, header.summary.place);
    assert_eq!(header.check_place(id, &place), Ok(()));
    let moved = Place {
        offset: place.offset + BLOCK,
        ..place
    };
    assert_eq!(header.check_place(id, &moved), Err(Miss::Misdirected));
    let elsewhere = Place {
        segment: 6,
        ..place
    };
    assert_eq!(header.check_place(id, &elsewhere), Err(Miss::Misdirected));
    let later = Place {
        epoch: place.epoch + 1,
        ..place
    };
    assert_eq!(header.check_place(id, &later), Err(Miss::StaleEpoch));
    assert_eq!(
        header.check_place(StoreId([1; 16]), &place),
        Err(Miss::StaleEpoch)
    );
}

#[test]
fn a_part_of_several_spans_has_a_checksum_for_each() {
    let arena = Arena::create("test", 8 << 20, Share::Private).unwrap();
    let len = 2 * SPAN + 5;
    let spec = crate::PartSpec {
        layer: 0,
        code: PartCode::Opaque,
        flags: 9,
        stored_len: len,
        raw_len: len,
    };
    let bytes = payload(NS, 4, 0, len as usize);
    let mut image = build(&arena, &meta(NS, 4), &[spec], &bytes);
    image.stamp(&STAMP);
    let head = Head::decode(image.buf()).unwrap();
    let want: Vec<u32> = bytes.chunks(SPAN as usize).map(crc32fast::hash).collect();
    assert_eq!(head.spans_of(0), Some(&want[..]));
    assert_eq!((want.len(), head.parts()[0].flags), (3, 9));
    assert_eq!(head.spans_of(1), None);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]

    #[test]
    fn decoders_never_panic_on_arbitrary_bytes(
        bytes in prop::collection::vec(any::<u8>(), 0..600),
    ) {
        let _ = Header::decode(&bytes);
        let _ = Head::decode(&bytes);
    }

    // A sealed header whose fields are noise: bounds hold, and nothing is allocated by them.
    #[test]
    fn decoders_never_panic_on_sealed_noise(
        noise in prop::collection::vec((8usize..AT_TABLE_CRC, any::<u8>()), 1..12),
        cut in 256usize..20_000,
    ) {
        let mut bytes = stamped();
        for (at, value) in noise {
            bytes[at] = value;
        }
        reseal(&mut bytes);
        bytes.truncate(cut);
        if let Ok(head) = Head::decode(&bytes) {
            let sum: u64 = head.parts().iter().map(|part| u64::from(part.stored_len)).sum();
            prop_assert_eq!(sum, u64::from(head.header.stored_len));
            prop_assert!(head.parts().len() <= PARTS_MAX);
        }
    }
}
