//! Tests of level 1 beyond those that all codecs share: streams, escapes, odd ends, frozen bytes.
#![allow(
    clippy::cast_possible_truncation,
    reason = "test data is cut to size on purpose"
)]

use kvtier_proto::element::Element;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

use super::*;
use crate::codec::header::HEADER_BYTES;

const KINDS: [(Element, Kind); 2] = [(Element::Bf16, Kind::Bf16), (Element::F16, Kind::F16)];

/// Values whose exponents are spread like those of a bell curve, without any library's help.
fn like_kv(kind: Kind, count: usize, seed: u64) -> Vec<u8> {
    let mut random = ChaCha8Rng::seed_from_u64(seed);
    let top = match kind {
        Kind::Bf16 => 128,
        Kind::F16 => 16,
    };
    let value = |random: &mut ChaCha8Rng| {
        let below = random.random::<u32>().trailing_zeros() as u8;
        kind.with_exponent(random.random(), top - below.min(top))
    };
    let values = (0..count).map(|_| value(&mut random));
    values.flat_map(u16::to_le_bytes).collect()
}

fn shape_of(element: Element, raw: &[u8]) -> PartShape {
    PartShape::new(element, 1, (raw.len() / 2) as u32).unwrap()
}

fn encoded(shape: &PartShape, raw: &[u8]) -> Vec<u8> {
    let codec = Lossless::new();
    let mut stored = vec![0x55; codec.stored_bytes_max(shape)];
    let len = codec.encode(shape, raw, &mut stored).unwrap();
    stored.truncate(len);
    stored
}

fn decoded(shape: &PartShape, stored: &[u8]) -> Result<Vec<u8>, DecodeError> {
    let mut out = vec![0xaa; shape.raw_bytes()];
    Lossless::new().decode(shape, stored, &mut out)?;
    Ok(out)
}

#[test]
fn parts_round_trip_at_every_border_of_a_group_and_of_a_stream() {
    let stream = STREAM_GROUPS * GROUP;
    for (element, kind) in KINDS {
        for count in [
            GROUP - 1,
            GROUP,
            GROUP + 1,
            CHUNK_GROUPS * GROUP + GROUP,
            stream - 1,
            stream,
            stream + 1,
            stream + GROUP,
            3 * stream + 77,
        ] {
            let raw = like_kv(kind, count, count as u64);
            let shape = shape_of(element, &raw);
            let stored = encoded(&shape, &raw);
            assert!(decoded(&shape, &stored).unwrap() == raw, "{count}");
            // Anything longer than what a part carries beside its values is worth coding.
            assert_eq!(stored[1] == 1, count > 10 * GROUP, "{kind:?} {count}");
        }
    }
}

#[test]
fn exponents_that_no_window_holds_come_back_wherever_they_stand() {
    for (element, kind) in KINDS {
        let plain = like_kv(kind, 70_000, 9);
        for at in [0, 31, 32, 63, 64, 2047, 2048, 65_535, 65_536, 69_999] {
            let mut raw = plain.clone();
            for (at, exponent) in [(at, kind.exponent_max()), (69_990, 1)] {
                let value = kind.with_exponent(0x8055, exponent);
                raw[2 * at..2 * at + 2].copy_from_slice(&value.to_le_bytes());
            }
            let shape = shape_of(element, &raw);
            let stored = encoded(&shape, &raw);
            assert_eq!(stored[1], 1, "coded");
            assert!(decoded(&shape, &stored).unwrap() == raw, "{kind:?} {at}");
        }
    }
}

#[test]
fn a_part_of_zeros_takes_little_more_than_its_mantissas() {
    for (element, kind) in KINDS {
        let raw = vec![0; 1 << 17];
        let shape = shape_of(element, &raw);
        let stored = encoded(&shape, &raw);
        let rest = (raw.len() / 2 / GROUP) * kind.plane_bytes();
        assert!(
            stored.len() < rest + rest / 16,
            "{} of {rest}",
            stored.len()
        );
        assert!(decoded(&shape, &stored).unwrap() == raw);
    }
}

#[test]
fn what_is_coded_costs_about_the_entropy_of_its_exponents() {
    // Exponents halve in frequency from one to the next: 2 bits each.
    let raw = like_kv(Kind::Bf16, 1 << 18, 4);
    let stored = encoded(&shape_of(Element::Bf16, &raw), &raw).len() as f64;
    let bits = stored * 8.0 / (raw.len() / 2) as f64;
    assert!((10.0..10.08).contains(&bits), "{bits} bits a value");
}

#[test]
fn decode_names_what_is_wrong_with_a_table_or_a_stream() {
    let raw = like_kv(Kind::Bf16, 1 << 13, 4);
    let shape = shape_of(Element::Bf16, &raw);
    let stored = encoded(&shape, &raw);
    let first = HEADER_BYTES + TABLE_BYTES;
    let coded = first + 8 + raw.len() / 2;
    let cases = [
        (
            HEADER_BYTES + 1,
            7,
            "header of the stored part has reserved bytes 7; accepted: 0",
        ),
        (HEADER_BYTES + 5, 0xff, "has sum of frequencies"),
        (first + 2, 9, "has escapes"),
        (first + 7, 9, "stored part ends after"),
        (
            coded + 3,
            0x80,
            "stream 0 of the stored part begins with a state that is none",
        ),
    ];
    for (at, value, want) in cases {
        let mut other = stored.clone();
        other[at] = value;
        let problem = decoded(&shape, &other).unwrap_err().to_string();
        assert!(problem.contains(want), "{problem}");
    }
}

// Goal: bytes on disk keep their meaning. The CRC is of what this level wrote when it was
// introduced; a change here is a new level (docs/decisions/0002), not a new number.
#[test]
fn bytes_of_level_1_are_frozen() {
    let crcs = KINDS.map(|(element, kind)| {
        let raw = like_kv(kind, 70_001, 1);
        crc32fast::hash(&encoded(&shape_of(element, &raw), &raw))
    });
    assert_eq!(crcs, [0x2cc9abb2, 0x2cd08e19], "{crcs:#010x?}");
}
