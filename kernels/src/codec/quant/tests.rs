//! Tests of all levels that lose something: the error they declare is the error they have.
#![allow(
    clippy::cast_possible_truncation,
    reason = "test data is cut to size on purpose"
)]

use kvtier_proto::descriptor::PartOrder;
use kvtier_proto::element::Element;
use proptest::prelude::*;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

use super::*;
use crate::Registry;
use crate::codec::header::HEADER_BYTES;
use crate::codec::tests::{decoded, encoded};

const FLOATS: [Element; 3] = [Element::Bf16, Element::F16, Element::F32];

fn lossy() -> Registry {
    Registry::with_baselines()
}

/// Values of channels with scales of their own, an outlier here and there.
fn raw_of(shape: &PartShape, scale: f32, seed: u64) -> Vec<u8> {
    let mut random = ChaCha8Rng::seed_from_u64(seed);
    let width = shape.width() as usize;
    let scales: Vec<f32> = (0..width)
        .map(|_| scale * random.random_range(0.1..4.0))
        .collect();
    let count = shape.tokens() as usize * width;
    let values: Vec<f32> = (0..count)
        .map(|at| {
            let bell: f32 = (0..4).map(|_| random.random::<f32>()).sum::<f32>() - 2.0;
            let outlier = if random.random_range(0..200) == 0 {
                8.0
            } else {
                1.0
            };
            bell * outlier * scales[at % width]
        })
        .collect();
    let mut raw = vec![0; shape.raw_bytes()];
    floats::write(shape.element(), &values, &mut raw);
    raw
}

/// What rounding to the element type may add to an error.
fn rounding(element: Element, value: f32) -> f32 {
    let bits = match element {
        Element::Bf16 => 8,
        Element::F16 => 11,
        _ => 20, // of the arithmetic
    };
    value.abs() * 2_f32.powi(-bits) + 2_f32.powi(-24)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(128))]

    // Goal: an error is never larger than what is declared (Q1), in every value.
    #[test]
    fn no_value_has_a_larger_error_than_its_part_declares(
        element in prop::sample::select(&FLOATS[..]),
        (heads, dim) in prop::sample::select(vec![(1_u32, 64_u32), (3, 64), (2, 48), (1, 7)]),
        order in prop::sample::select(vec![PartOrder::TokenMajor, PartOrder::HeadMajor]),
        code in prop::sample::select(vec![PartCode::K, PartCode::V]),
        tokens in 1_u32..80,
        scale in prop::sample::select(vec![1e-3_f32, 1.0, 8.0]),
        seed in any::<u64>(),
    ) {
        let shape = PartShape::new(element, tokens, heads * dim).unwrap();
        let shape = shape.of_layer(0, code).with_heads(heads, order).unwrap();
        let raw = raw_of(&shape, scale, seed);
        for codec in lossy().iter() {
            let stored = encoded(codec, &shape, &raw);
            prop_assert!(stored.len() <= raw.len() + HEADER_BYTES);
            let back = decoded(codec, &shape, &stored).unwrap();
            let bound = codec.error_in(&shape, &stored).unwrap();
            let values = floats::read(element, &raw);
            for (value, other) in values.iter().zip(floats::read(element, &back)) {
                let error = (value - other).abs();
                let allowed = bound * 1.001 + rounding(element, other);
                prop_assert!(error <= allowed, "{}: {value} became {other}", codec.name());
            }
        }
    }

    #[test]
    fn damage_is_an_error_or_changes_nothing(
        seed in any::<u64>(),
        edits in prop::collection::vec((any::<prop::sample::Index>(), 1_u8..), 1..4),
    ) {
        let shape = PartShape::new(Element::Bf16, 40, 64).unwrap();
        let raw = raw_of(&shape, 1.0, seed);
        for codec in lossy().iter().filter(|codec| codec.level() != Level::RAW) {
            let stored = encoded(codec, &shape, &raw);
            let right = decoded(codec, &shape, &stored).unwrap();
            let mut other = stored.clone();
            for (at, flip) in &edits {
                let at = at.index(other.len());
                other[at] ^= flip;
            }
            if let Ok(out) = decoded(codec, &shape, &other) {
                prop_assert_eq!(&out, &right);
            }
            for len in [0, 11, 12, 13, stored.len() - 1] {
                prop_assert!(decoded(codec, &shape, &stored[..len]).is_err());
            }
        }
    }
}

#[test]
fn levels_take_the_bits_that_they_are_known_for() {
    let shape = PartShape::new(Element::Bf16, 256, 192).unwrap();
    let shape = shape.of_layer(0, PartCode::K);
    let shape = shape.with_heads(3, PartOrder::TokenMajor).unwrap();
    let raw = raw_of(&shape, 1.0, 1);
    let codecs = lossy();
    let bits = [
        ("fp8", 8.0),
        ("int8", 8.25),
        ("int4", 4.5),
        ("kivi4", 5.0),
        ("kivi2", 3.0),
        ("hadamard4", 4.5),
    ];
    for (name, bits) in bits {
        let stored = encoded(codecs.by_name(name).unwrap(), &shape, &raw).len() - HEADER_BYTES;
        let took = stored as f64 * 8.0 / (256.0 * 192.0);
        assert_eq!(took, bits, "{name}");
    }
}

#[test]
fn kivi_cuts_k_by_channel_and_v_by_token() {
    let shape = PartShape::new(Element::Bf16, 32, 64).unwrap();
    let codecs = lossy();
    let kivi = codecs.by_name("kivi4").unwrap();
    // One channel is a thousand times as large as the others.
    let values: Vec<f32> = (0..32 * 64)
        .map(|at| (at % 13) as f32 * if at % 64 == 5 { 1000.0 } else { 1.0 })
        .collect();
    let mut raw = vec![0; shape.raw_bytes()];
    floats::write(Element::Bf16, &values, &mut raw);
    let error = |code| {
        let shape = shape.of_layer(0, code);
        let back = decoded(kivi, &shape, &encoded(kivi, &shape, &raw)).unwrap();
        let back = floats::read(Element::Bf16, &back);
        let others = values
            .iter()
            .zip(back)
            .enumerate()
            .filter(|(at, _)| at % 64 != 5);
        others.map(|(_, (a, b))| (a - b).abs()).fold(0.0, f32::max)
    };
    assert!(error(PartCode::K) < 0.6, "{}", error(PartCode::K));
    assert!(error(PartCode::V) > 5.0, "{}", error(PartCode::V));
}

#[test]
fn what_is_not_finite_or_too_large_is_stored_as_it_is() {
    let shape = PartShape::new(Element::F32, 64, 64).unwrap();
    for wrong in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY, 3.4e38, 449.0] {
        let mut values = vec![0.5; 64 * 64];
        (values[77], values[78]) = (wrong, -wrong);
        let mut raw = vec![0; shape.raw_bytes()];
        floats::write(Element::F32, &values, &mut raw);
        for codec in lossy().iter().filter(|codec| !codec.exact()) {
            let stored = encoded(codec, &shape, &raw);
            let back = decoded(codec, &shape, &stored).unwrap();
            if wrong != 449.0 || codec.name() == "fp8" {
                assert!(back == raw, "{} {wrong}", codec.name());
                assert_eq!(codec.error_in(&shape, &stored).unwrap(), 0.0);
            } else {
                assert!(back != raw, "{}", codec.name());
            }
        }
    }
}

// Q1, Q2: nothing finite becomes infinite, though scales are rounded up.
#[test]
fn the_largest_values_come_back_within_the_declared_error() {
    for (element, most) in [
        (Element::F16, 65504.0),
        (Element::Bf16, f32::from_bits(0x7f7f_0000)),
        (Element::F32, f32::MAX),
        (Element::F32, 1e38),
    ] {
        let shape = PartShape::new(element, 64, 64).unwrap();
        let signs = |at: usize| !at.is_multiple_of(7) || at.is_multiple_of(3);
        let sides: [&dyn Fn(usize) -> f32; 4] = [
            &|_| most,
            &|at| if at.is_multiple_of(5) { most } else { 0.0 },
            &|at| if signs(at) { most } else { -most },
            &|at| if at % 64 < 32 { most } else { -most / 2.0 },
        ];
        for side in sides {
            let values: Vec<f32> = (0..64 * 64).map(side).collect();
            let mut raw = vec![0; shape.raw_bytes()];
            floats::write(element, &values, &mut raw);
            for codec in lossy().iter() {
                let stored = encoded(codec, &shape, &raw);
                let back = floats::read(element, &decoded(codec, &shape, &stored).unwrap());
                let bound = f64::from(codec.error_in(&shape, &stored).unwrap());
                let values = floats::read(element, &raw);
                for (value, other) in values.into_iter().zip(back) {
                    let error = (f64::from(value) - f64::from(other)).abs();
                    let allowed = bound * 1.001 + f64::from(rounding(element, value));
                    assert!(error <= allowed, "{}: {value} became {other}", codec.name());
                }
            }
        }
    }
}

#[test]
fn equal_values_come_back_about_equal() {
    let shape = PartShape::new(Element::Bf16, 16, 64).unwrap();
    for value in [0.0_f32, 1.0, -3.25] {
        let mut raw = vec![0; shape.raw_bytes()];
        floats::write(Element::Bf16, &vec![value; 16 * 64], &mut raw);
        for codec in lossy()
            .iter()
            .filter(|codec| !codec.name().starts_with("had"))
        {
            let back = decoded(codec, &shape, &encoded(codec, &shape, &raw)).unwrap();
            assert_eq!(back, raw, "{} {value}", codec.name());
        }
    }
}

#[test]
fn a_bf16_above_and_below_are_the_nearest_on_that_side() {
    for number in [0.0, 1.0, 1.001, -1.001, 1e-40, -1e-40, 3.0e38, 255.9] {
        let (below, above) = (floats::bf16_below(number), floats::bf16_above(number));
        assert!(
            below <= number && number <= above,
            "{below} {number} {above}"
        );
        let same = floats::bf16(floats::bf16_bits(number)) == number;
        assert_eq!(below == above, same, "{number}");
        let (lower, upper) = (below.to_bits() >> 16, above.to_bits() >> 16);
        assert!(lower.abs_diff(upper) <= 1, "{number}");
    }
}
