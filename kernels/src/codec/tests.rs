//! Tests of all codecs: exact or an error, whatever the bytes; never larger than promised.
#![allow(
    clippy::cast_possible_truncation,
    reason = "test data is cut to size on purpose"
)]

use kvtier_proto::Level;
use kvtier_proto::element::Element;
use proptest::prelude::*;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

use super::byte_planes::CHUNK_ELEMENTS;
use super::header::HEADER_BYTES;
use super::*;
use crate::Registry;

const ELEMENTS: [Element; 6] = [
    Element::Bf16,
    Element::F16,
    Element::F32,
    Element::F8E4m3,
    Element::F8E5m2,
    Element::U8,
];

/// How test data is made.
#[derive(Debug, Clone, Copy)]
enum Data {
    /// Does not compress at all.
    Noise,
    /// Normally distributed floats of the element's type, a scale a channel.
    Normal,
    /// One byte all over.
    Flat,
}

fn raw_of(shape: &PartShape, data: Data, seed: u64) -> Vec<u8> {
    let mut random = ChaCha8Rng::seed_from_u64(seed);
    let mut raw = vec![seed as u8; shape.raw_bytes()];
    match data {
        Data::Flat => {}
        Data::Noise => random.fill(&mut raw[..]),
        Data::Normal => {
            let width = shape.width() as usize;
            let scales: Vec<f32> = (0..width).map(|_| random.random_range(0.1..8.0)).collect();
            for (index, element) in raw.chunks_exact_mut(shape.element().bytes()).enumerate() {
                let normal: f32 = (0..12).map(|_| random.random::<f32>()).sum::<f32>() - 6.0;
                let value = normal * scales[index % width];
                match shape.element() {
                    Element::F16 => {
                        element.copy_from_slice(&half::f16::from_f32(value).to_le_bytes());
                    }
                    // The top bytes of an f32: bf16, and something like an 8-bit float.
                    _ => element.copy_from_slice(&value.to_le_bytes()[4 - element.len()..]),
                }
            }
        }
    }
    raw
}

pub(super) fn encoded(codec: &dyn Codec, shape: &PartShape, raw: &[u8]) -> Vec<u8> {
    let mut stored = vec![0x55; codec.stored_bytes_max(shape)];
    let len = codec.encode(shape, raw, &mut stored).unwrap();
    assert!(len <= codec.stored_bytes_max(shape));
    stored.truncate(len);
    stored
}

pub(super) fn decoded(
    codec: &dyn Codec,
    shape: &PartShape,
    stored: &[u8],
) -> Result<Vec<u8>, DecodeError> {
    let mut out = vec![0xaa; shape.raw_bytes()];
    codec.decode(shape, stored, &mut out)?;
    Ok(out)
}

fn zstd() -> Registry {
    Registry::builtin()
}

fn any_element() -> impl Strategy<Value = Element> {
    prop::sample::select(&ELEMENTS[..])
}

fn any_data() -> impl Strategy<Value = Data> {
    prop::sample::select(&[Data::Noise, Data::Normal, Data::Flat][..])
}

// Goal: what the table of levels says of a level is what its codec does.
#[test]
fn a_level_gives_back_every_bit_where_its_quality_says_so_and_nowhere_else() {
    let shape = PartShape::new(Element::Bf16, 64, 128).unwrap();
    let shape = shape.of_layer(1, PartCode::K);
    let raw = raw_of(&shape, Data::Normal, 5);
    for codec in Registry::with_baselines().iter() {
        assert!(codec.applies(&shape), "{}", codec.name());
        let back = decoded(codec, &shape, &encoded(codec, &shape, &raw)).unwrap();
        assert_eq!(back == raw, codec.exact(), "{}", codec.name());
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(128))]

    #[test]
    fn decode_returns_what_was_encoded_for_any_shape_and_data(
        element in any_element(),
        tokens in 1_u32..64,
        width in 1_u32..300,
        data in any_data(),
        seed in any::<u64>(),
    ) {
        let shape = PartShape::new(element, tokens, width).unwrap();
        let raw = raw_of(&shape, data, seed);
        for codec in Registry::builtin().iter() {
            let stored = encoded(codec, &shape, &raw);
            prop_assert!(stored.len() <= raw.len() + HEADER_BYTES);
            prop_assert_eq!(&decoded(codec, &shape, &stored).unwrap(), &raw);
        }
    }

    // K3: a bit flip anywhere is an error, or harmless; it never changes the answer. Level raw
    // has no check of its own and is not part of this promise.
    #[test]
    fn decode_of_a_mutated_part_is_an_error_or_exact(
        element in any_element(),
        data in any_data(),
        seed in any::<u64>(),
        edits in prop::collection::vec((any::<prop::sample::Index>(), 1_u8..), 1..4),
    ) {
        let shape = PartShape::new(element, 32, 96).unwrap();
        let raw = raw_of(&shape, data, seed);
        let codecs = Registry::builtin();
        let coded = |codec: &&dyn Codec| codec.level() != Level::RAW;
        for codec in codecs.iter().filter(coded) {
            let mut stored = encoded(codec, &shape, &raw);
            for (at, flip) in &edits {
                let at = at.index(stored.len());
                stored[at] ^= flip;
            }
            if let Ok(out) = decoded(codec, &shape, &stored) {
                prop_assert_eq!(&out, &raw);
            }
        }
    }

    #[test]
    fn decode_of_random_bytes_is_an_error_and_never_a_panic(
        element in any_element(),
        level in prop::sample::select(vec![0_u8, 1, 8, 9]),
        form in 0_u8..3,
        mut stored in prop::collection::vec(any::<u8>(), 0..2000),
        honest_header in any::<bool>(),
    ) {
        let shape = PartShape::new(element, 16, 24).unwrap();
        if honest_header && stored.len() >= HEADER_BYTES {
            let raw_len = shape.raw_bytes() as u32;
            stored[..4].copy_from_slice(&[level, form, 0, 0]);
            stored[4..8].copy_from_slice(&raw_len.to_le_bytes());
        }
        let codecs = Registry::builtin();
        let codec = codecs.get(Level(level)).unwrap();
        let fits = level == 0 && stored.len() == shape.raw_bytes();
        prop_assert_eq!(decoded(codec, &shape, &stored).is_ok(), fits);
    }
}

#[test]
fn decode_refuses_every_truncation_and_any_trailing_byte() {
    let shape = PartShape::new(Element::Bf16, 16, 40).unwrap();
    for data in [Data::Noise, Data::Normal, Data::Flat] {
        let raw = raw_of(&shape, data, 7);
        for codec in Registry::builtin().iter() {
            let stored = encoded(codec, &shape, &raw);
            for len in 0..stored.len() {
                assert!(decoded(codec, &shape, &stored[..len]).is_err(), "{len}");
            }
            for extra in [1, 4, 100] {
                let longer = [stored.clone(), vec![0; extra]].concat();
                let problem = decoded(codec, &shape, &longer).unwrap_err();
                assert!(matches!(problem, DecodeError::Trailing { .. }), "{problem}");
            }
        }
    }
}

#[test]
fn decode_refuses_another_shape_of_the_same_or_another_size() {
    let shape = PartShape::new(Element::Bf16, 64, 64).unwrap();
    let codecs = zstd();
    let codec = codecs.get(Level::ZSTD).unwrap();
    let stored = encoded(codec, &shape, &raw_of(&shape, Data::Normal, 3));
    let larger = PartShape::new(Element::Bf16, 65, 64).unwrap();
    let problem = decoded(codec, &larger, &stored).unwrap_err().to_string();
    assert_eq!(
        problem,
        "header of the stored part has raw length 8192; accepted: 8320"
    );
    let bytes = PartShape::new(Element::U8, 64, 128).unwrap();
    assert!(decoded(codec, &bytes, &stored).is_err());
}

#[test]
fn decode_names_the_field_of_a_foreign_header() {
    let shape = PartShape::new(Element::Bf16, 16, 16).unwrap();
    let codecs = zstd();
    let codec = codecs.get(Level::ZSTD).unwrap();
    let stored = encoded(codec, &shape, &raw_of(&shape, Data::Flat, 3));
    let cases = [
        (0, 1, "level 1; accepted: 8"),
        (1, 9, "form 9; accepted: 1"),
        (2, 5, "tables of version 5; this daemon holds version 0"),
        (8, stored[8] ^ 1, "decoded part has CRC"),
    ];
    for (at, value, want) in cases {
        let mut other = stored.clone();
        other[at] = value;
        let problem = decoded(codec, &shape, &other).unwrap_err().to_string();
        assert!(problem.contains(want), "{problem}");
    }
}

// Goal: what `zstd` itself would skip or join is refused, so that one part has one meaning.
// Method: append a skippable and an empty frame to the only plane and mend its length.
#[test]
fn decode_refuses_further_frames_inside_a_plane() {
    let shape = PartShape::new(Element::U8, 16, 64).unwrap();
    let codecs = zstd();
    let codec = codecs.get(Level::ZSTD).unwrap();
    let stored = encoded(codec, &shape, &raw_of(&shape, Data::Flat, 3));
    let skippable = [0x50, 0x2a, 0x4d, 0x18, 2, 0, 0, 0, 1, 2].to_vec();
    let empty = ::zstd::bulk::compress(&[], 1).unwrap();
    for frame in [skippable, empty] {
        let mut longer = [stored.clone(), frame].concat();
        let len = (longer.len() - HEADER_BYTES - 4) as u32;
        longer[HEADER_BYTES..HEADER_BYTES + 4].copy_from_slice(&len.to_le_bytes());
        let problem = decoded(codec, &shape, &longer).unwrap_err();
        assert!(matches!(problem, DecodeError::Plane { .. }), "{problem}");
    }
}

#[test]
fn decode_refuses_a_frame_that_claims_more_than_the_plane_holds() {
    let shape = PartShape::new(Element::U8, 16, 64).unwrap();
    let codecs = zstd();
    let codec = codecs.get(Level::ZSTD).unwrap();
    let honest = encoded(codec, &shape, &raw_of(&shape, Data::Flat, 3));
    let bomb = ::zstd::bulk::compress(&vec![3; 1 << 26], 1).unwrap();
    let len = (bomb.len() as u32).to_le_bytes();
    let stored = [&honest[..HEADER_BYTES], &len, &bomb].concat();
    let problem = decoded(codec, &shape, &stored).unwrap_err();
    assert!(
        matches!(problem, DecodeError::Plane { want: 1024, .. }),
        "{problem}"
    );
}

#[test]
fn decode_never_reads_past_the_stored_bytes_for_a_claimed_length() {
    let shape = PartShape::new(Element::U8, 16, 64).unwrap();
    let codecs = zstd();
    let codec = codecs.get(Level::ZSTD).unwrap();
    let mut stored = encoded(codec, &shape, &raw_of(&shape, Data::Flat, 3));
    for claim in [0x7fff_ffff_u32, 0xffff_ffff] {
        stored[HEADER_BYTES..HEADER_BYTES + 4].copy_from_slice(&claim.to_le_bytes());
        let problem = decoded(codec, &shape, &stored).unwrap_err();
        assert!(
            matches!(problem, DecodeError::Truncated { .. }),
            "{problem}"
        );
    }
}

#[test]
fn encode_stores_noise_as_it_is_behind_the_header() {
    let codecs = zstd();
    let codec = codecs.get(Level::ZSTD).unwrap();
    for element in ELEMENTS {
        let shape = PartShape::new(element, 16, 512).unwrap();
        let raw = raw_of(&shape, Data::Noise, 11);
        let stored = encoded(codec, &shape, &raw);
        assert_eq!(stored.len(), raw.len() + HEADER_BYTES);
        assert_eq!(&stored[HEADER_BYTES..], &raw[..]);
    }
}

#[test]
fn parts_of_several_chunks_round_trip_at_every_chunk_border() {
    let codecs = zstd();
    let codec = codecs.get(Level::ZSTD).unwrap();
    for element in ELEMENTS {
        for width in [
            CHUNK_ELEMENTS - 1,
            CHUNK_ELEMENTS,
            CHUNK_ELEMENTS + 1,
            3 * CHUNK_ELEMENTS,
        ] {
            let shape = PartShape::new(element, 1, width as u32).unwrap();
            let raw = raw_of(&shape, Data::Normal, 5);
            let stored = encoded(codec, &shape, &raw);
            assert!(
                decoded(codec, &shape, &stored).unwrap() == raw,
                "{element:?} {width}"
            );
        }
    }
}

#[test]
fn encode_refuses_wrong_lengths_and_says_both() {
    let shape = PartShape::new(Element::Bf16, 16, 16).unwrap();
    for codec in Registry::builtin().iter() {
        let need = codec.stored_bytes_max(&shape);
        let problem = codec
            .encode(&shape, &[0; 511], &mut vec![0; need])
            .unwrap_err();
        assert_eq!(
            problem.to_string(),
            "part has 511 raw bytes but its shape says 512"
        );
        let problem = codec
            .encode(&shape, &[0; 512], &mut vec![0; need - 1])
            .unwrap_err();
        let want = format!(
            "encoding needs room for {need} bytes but was given {}",
            need - 1
        );
        assert_eq!(problem.to_string(), want);
        let problem = codec.decode(&shape, &[0; 512], &mut [0; 513]).unwrap_err();
        assert_eq!(
            problem.to_string(),
            "output has room for 513 bytes but the shape says 512"
        );
    }
}

#[test]
fn encode_leaves_what_lies_behind_its_worst_case_untouched() {
    let shape = PartShape::new(Element::F16, 32, 64).unwrap();
    for codec in Registry::builtin().iter() {
        for data in [Data::Noise, Data::Normal] {
            let raw = raw_of(&shape, data, 13);
            let need = codec.stored_bytes_max(&shape);
            let mut out = vec![0x77; need + 64];
            codec.encode(&shape, &raw, &mut out).unwrap();
            assert!(out[need..].iter().all(|byte| *byte == 0x77));
        }
    }
}

#[test]
fn one_thread_serves_all_element_types_in_turn() {
    let codecs = zstd();
    let codec = codecs.get(Level::ZSTD).unwrap();
    for round in 0..3 {
        for element in ELEMENTS {
            let shape = PartShape::new(element, 16, 100 + round * 50).unwrap();
            let raw = raw_of(&shape, Data::Normal, u64::from(round));
            assert_eq!(
                decoded(codec, &shape, &encoded(codec, &shape, &raw)).unwrap(),
                raw
            );
        }
    }
}
