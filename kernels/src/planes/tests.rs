//! Tests of the plane split: every bit comes back, and lands where the format says.
#![allow(
    clippy::cast_possible_truncation,
    reason = "test data is cut to size on purpose"
)]

use half::{bf16, f16};
use proptest::prelude::*;

use super::*;

/// Plain arithmetic on one element, written differently on purpose.
fn naive_split(raw: &[u8], size: usize) -> Vec<Vec<u8>> {
    let mut planes = vec![Vec::new(); size];
    for element in raw.chunks_exact(size) {
        let value = element
            .iter()
            .rev()
            .fold(0_u64, |sum, byte| sum << 8 | u64::from(*byte));
        let bits = 8 * size;
        let rotated = (value << 1 | value >> (bits - 1)) & (u64::MAX >> (64 - bits));
        for (index, plane) in planes.iter_mut().enumerate() {
            plane.push((rotated >> (8 * (size - 1 - index)) & 0xff) as u8);
        }
    }
    planes
}

fn assert_round_trip2(raw: &[u8]) {
    let n = raw.len() / 2;
    let (mut high, mut low) = (vec![0; n], vec![0; n]);
    split2(raw, [&mut high, &mut low]);
    assert_eq!(vec![high.clone(), low.clone()], naive_split(raw, 2));
    let mut back = vec![0xaa; raw.len()];
    merge2([&high, &low], &mut back);
    assert_eq!(back, raw);
}

fn assert_round_trip4(raw: &[u8]) {
    let n = raw.len() / 4;
    let mut planes = vec![vec![0; n]; 4];
    let [a, b, c, d] = planes.get_disjoint_mut([0, 1, 2, 3]).unwrap();
    split4(raw, [a, b, c, d]);
    assert_eq!(planes, naive_split(raw, 4));
    let mut back = vec![0xaa; raw.len()];
    merge4([&planes[0], &planes[1], &planes[2], &planes[3]], &mut back);
    assert_eq!(back, raw);
}

proptest! {
    #[test]
    fn split_and_merge_return_every_bit_of_any_bytes(
        bytes in prop::collection::vec(any::<u8>(), 0..600)
    ) {
        assert_round_trip2(&bytes[..bytes.len() / 2 * 2]);
        assert_round_trip4(&bytes[..bytes.len() / 4 * 4]);
    }
}

#[test]
fn split_and_merge_return_all_65536_patterns_of_two_bytes() {
    let all: Vec<u8> = (0..=u16::MAX).flat_map(u16::to_le_bytes).collect();
    assert_round_trip2(&all);
}

#[test]
fn split_and_merge_return_nan_payloads_infinities_and_negative_zero() {
    let specials = [
        0.0_f32,
        -0.0,
        f32::NAN,
        f32::from_bits(0xffc0_1234),
        f32::INFINITY,
        f32::NEG_INFINITY,
        f32::MIN_POSITIVE,
        f32::from_bits(1),
        f32::MAX,
        f32::MIN,
    ];
    assert_round_trip4(&specials.map(f32::to_le_bytes).concat());
    assert_round_trip2(&specials.map(|v| bf16::from_f32(v).to_le_bytes()).concat());
    assert_round_trip2(&specials.map(|v| f16::from_f32(v).to_le_bytes()).concat());
}

#[test]
fn plane_zero_of_bf16_is_the_exponent_alone() {
    let raw: Vec<u8> = [1.0_f32, -1.0, 1.99, -1.5]
        .iter()
        .flat_map(|v| bf16::from_f32(*v).to_le_bytes())
        .collect();
    let (mut high, mut low) = ([0; 4], [0; 4]);
    split2(&raw, [&mut high, &mut low]);
    assert_eq!(high, [127; 4]);
    assert_eq!(low.map(|byte| byte & 1), [0, 1, 0, 1]);
}

#[test]
#[should_panic(expected = "do not fit")]
fn split_refuses_a_plane_that_would_lose_elements() {
    split2(&[0; 8], [&mut [0; 4], &mut [0; 3]]);
}
