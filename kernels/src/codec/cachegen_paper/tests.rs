//! Tests of CacheGen's paper beyond those that all lossy levels share.
#![allow(
    clippy::cast_possible_truncation,
    reason = "test data is cut to size on purpose"
)]

use kvtier_proto::element::Element;
use kvtier_proto::layout::PartCode;

use super::*;
use crate::codec::tests::{decoded, encoded};

fn shape(layer: u32) -> PartShape {
    let shape = PartShape::new(Element::F32, 64, 48).unwrap();
    shape.of_layer(layer, PartCode::K)
}

/// Tokens about a value of their channel.
fn raw() -> Vec<u8> {
    let value = |at: u32| (at % 48) as f32 + (at * 37 % 101) as f32 / 50.0 - 1.0;
    (0..64 * 48)
        .flat_map(|at| value(at).to_le_bytes())
        .collect()
}

#[test]
fn steps_grow_from_one_third_of_the_layers_to_the_next() {
    let step = |shape: PartShape| {
        let error = CacheGenPaper.error_in(&shape, &encoded(&CacheGenPaper, &shape, &raw()));
        error.unwrap()
    };
    let one = step(shape(7));
    for (layer, want) in [
        (0, 0.5),
        (9, 0.5),
        (10, 1.0),
        (19, 1.0),
        (20, 1.5),
        (29, 1.5),
    ] {
        let got = step(shape(layer).among_layers(30)) / one;
        assert!((got - want).abs() < 0.02, "{layer}: {got}");
    }
}

#[test]
fn every_tenth_token_is_an_anchor_of_8_bits() {
    let shape = shape(0);
    let raw = raw();
    let back = decoded(
        &CacheGenPaper,
        &shape,
        &encoded(&CacheGenPaper, &shape, &raw),
    )
    .unwrap();
    let (values, back) = (
        floats::read(Element::F32, &raw),
        floats::read(Element::F32, &back),
    );
    let worst = |is_anchor: bool| {
        let all = values.iter().zip(&back).enumerate();
        let some = all.filter(|(at, _)| (at / 48).is_multiple_of(10) == is_anchor);
        some.map(|(_, (a, b))| (a - b).abs()).fold(0.0, f32::max)
    };
    assert!(worst(true) <= 48.0 / 254.0, "{}", worst(true));
    assert!(worst(false) > 0.2, "{}", worst(false));
}

// The largest difference there can be: one of 2,048 tokens, all others like their anchors.
#[test]
fn one_token_that_differs_from_all_others_has_a_symbol() {
    let shape = PartShape::new(Element::F32, 2048, 48).unwrap();
    let shape = shape.of_layer(0, PartCode::K).among_layers(30);
    let mut values = vec![1.0; 2048 * 48];
    values[48 * 1234 + 5] = 1000.0;
    let mut raw = vec![0; shape.raw_bytes()];
    floats::write(Element::F32, &values, &mut raw);
    let back = decoded(
        &CacheGenPaper,
        &shape,
        &encoded(&CacheGenPaper, &shape, &raw),
    )
    .unwrap();
    let back = floats::read(Element::F32, &back);
    assert!((back[48 * 1234 + 5] - 1000.0).abs() < 6.0);
    assert_eq!(back[48 * 1234 + 6], 1.0);
}

#[test]
fn a_part_of_anchors_alone_comes_back() {
    let shape = PartShape::new(Element::F32, 1, 4096).unwrap();
    let raw: Vec<u8> = (0..4096).flat_map(|at| (at as f32).to_le_bytes()).collect();
    let stored = encoded(&CacheGenPaper, &shape, &raw);
    assert_eq!(stored[1], 1, "coded");
    assert!(decoded(&CacheGenPaper, &shape, &stored).is_ok());
}

// Goal: bytes on disk keep their meaning, of a level to compare with as well.
#[test]
fn bytes_of_level_39_are_frozen() {
    let crc = crc32fast::hash(&encoded(&CacheGenPaper, &shape(0), &raw()));
    assert_eq!(crc, 0xd9bceeaf, "{crc:#010x}");
}
