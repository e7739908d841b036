//! Tests of CacheGen as published beyond those that all lossy levels share.
#![allow(
    clippy::cast_possible_truncation,
    reason = "test data is cut to size on purpose"
)]

use kvtier_proto::descriptor::PartOrder;
use kvtier_proto::element::Element;

use super::*;
use crate::codec::tests::{decoded, encoded};

fn shape(layer: u32, code: PartCode) -> PartShape {
    let shape = PartShape::new(Element::F32, 64, 48).unwrap();
    shape.of_layer(layer, code)
}

/// Values that fill the steps from the least to the greatest.
fn raw() -> Vec<u8> {
    let value = |at: u32| (at * 37 % 101) as f32 / 50.0 - 1.0;
    (0..64 * 48)
        .flat_map(|at| value(at).to_le_bytes())
        .collect()
}

#[test]
fn steps_are_finer_in_the_first_layers_and_in_models_of_few() {
    let fine = |shape: PartShape| {
        let error = CacheGen
            .error_in(&shape, &encoded(&CacheGen, &shape, &raw()))
            .unwrap();
        (error - 1.0 / 30.0).abs() < 1e-6
    };
    for (code, layer, want) in [
        (PartCode::K, 9, true),
        (PartCode::K, 10, false),
        (PartCode::V, 1, true),
        (PartCode::V, 2, false),
    ] {
        assert_eq!(fine(shape(layer, code)), want, "{code:?} {layer}");
        assert_eq!(fine(shape(layer, code).among_layers(30)), want);
        assert!(fine(shape(layer, code).among_layers(9)));
    }
}

#[test]
fn a_token_is_measured_by_its_largest_value_over_all_heads() {
    for order in [PartOrder::TokenMajor, PartOrder::HeadMajor] {
        let shape = shape(0, PartCode::K).with_heads(3, order).unwrap();
        let rows = Rows::of(&shape);
        // Token 5 is a hundred times as large, by one value of the last head.
        let value = |(token, channel)| match (token, channel) {
            (5, 40) => 100.0,
            (_, channel) => 0.9 + channel as f32 / 480.0,
        };
        let values: Vec<f32> = rows.places().map(value).collect();
        let mut raw = vec![0; shape.raw_bytes()];
        floats::write(Element::F32, &values, &mut raw);
        let back = decoded(&CacheGen, &shape, &encoded(&CacheGen, &shape, &raw)).unwrap();
        let back = floats::read(Element::F32, &back);
        for ((value, back), (token, channel)) in values.iter().zip(back).zip(rows.places()) {
            let want = if token == 5 && channel != 40 {
                0.0
            } else {
                *value
            };
            assert!((back - want).abs() < 0.04, "{token} {channel}: {back}");
        }
    }
}

// Goal: bytes on disk keep their meaning, of a level to compare with as well.
#[test]
fn bytes_of_level_38_are_frozen() {
    let crc = crc32fast::hash(&encoded(&CacheGen, &shape(0, PartCode::K), &raw()));
    assert_eq!(crc, 0x27ef4c5b, "{crc:#010x}");
}
