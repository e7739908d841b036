//! Tests of the exact level across layers: every bit comes back, and every path makes the same.
#![allow(
    clippy::cast_possible_truncation,
    clippy::indexing_slicing,
    reason = "test data is cut to size on purpose"
)]

use std::collections::HashMap;

use kvtier_proto::descriptor::PartOrder;
use kvtier_proto::element::Element;
use proptest::prelude::*;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

use super::*;
use crate::codec::header::HEADER_BYTES;
use crate::codec::ladder::Ladder;
use crate::codec::quant::floats;
use crate::fuzzing::profile::exact_fixture;

const HALVES: [Element; 2] = [Element::Bf16, Element::F16];
const ORDERS: [PartOrder; 2] = [PartOrder::TokenMajor, PartOrder::HeadMajor];

/// Parts of a block, as they were restored.
#[derive(Default)]
struct Block(HashMap<(u32, u8), Vec<u8>>);

impl Restored for Block {
    fn part(&self, layer: u32, code: PartCode) -> Option<&[u8]> {
        self.0.get(&(layer, code as u8)).map(Vec::as_slice)
    }
}

fn level(layers: u32, heads: u32, dim: u32) -> Arc<dyn Codec> {
    let profile = Arc::new(exact_fixture(layers, heads, dim).unwrap());
    let levels = Ladder::all(profile).unwrap();
    levels.into_iter().find(|level| level.exact()).unwrap()
}

/// The shapes of a block's parts in the order in which they are coded.
fn shapes(
    (layers, heads, dim): (u32, u32, u32),
    (element, order): (Element, PartOrder),
    (position, tokens): (u32, u32),
) -> Vec<PartShape> {
    let all = (0..layers).flat_map(|layer| [(layer, PartCode::K), (layer, PartCode::V)]);
    all.map(|(layer, code)| {
        PartShape::new(element, tokens, heads * dim)
            .unwrap()
            .of_layer(layer, code)
            .at_position(position)
            .with_heads(heads, order)
            .unwrap()
    })
    .collect()
}

/// Values near what the fixture's tables expect, `one_in` of them odd; random bits where it is 0.
fn raw_of(shape: &PartShape, one_in: u32, random: &mut ChaCha8Rng) -> Vec<u8> {
    let mut raw = vec![0; shape.raw_bytes()];
    if one_in == 0 {
        random.fill(&mut raw[..]);
        return raw;
    }
    let odd = [
        f32::NAN,
        f32::INFINITY,
        f32::NEG_INFINITY,
        1e30,
        6e4,
        -300.0,
        1e-40,
        6e-6,
        -0.0,
    ];
    let values: Vec<f32> = (0..shape.tokens() * shape.width())
        .map(|_| match random.random_range(0..one_in) == 0 {
            true => odd[random.random_range(0..odd.len())],
            false => 0.5 + 0.5 * (random.random::<f32>() + random.random::<f32>() - 1.0),
        })
        .collect();
    floats::write(shape.element(), &values, &mut raw);
    raw
}

fn encoded(codec: &dyn Codec, shape: &PartShape, raw: &[u8], before: &Block) -> Vec<u8> {
    let mut stored = vec![0x55; codec.stored_bytes_max(shape)];
    let len = codec.encode_after(shape, raw, before, &mut stored).unwrap();
    stored.truncate(len);
    stored
}

fn decoded(
    codec: &dyn Codec,
    shape: &PartShape,
    stored: &[u8],
    before: &Block,
) -> Result<Vec<u8>, DecodeError> {
    let mut out = vec![0xaa; shape.raw_bytes()];
    codec.decode_after(shape, stored, before, &mut out)?;
    Ok(out)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(96))]

    // X1, K1.
    #[test]
    fn every_bit_comes_back_whatever_the_bits_are(
        element in prop::sample::select(&HALVES[..]),
        order in prop::sample::select(&ORDERS[..]),
        (heads, dim) in prop::sample::select(
            vec![(1_u32, 8_u32), (2, 16), (3, 6), (3, 12), (1, 64)],
        ),
        position in prop::sample::select(vec![0_u32, 2, 100, 100_000]),
        tokens in 1_u32..80,
        one_in in prop::sample::select(vec![0_u32, 1, 3, 200, 1_000_000]),
        seed in any::<u64>(),
    ) {
        let codec = level(2, heads, dim);
        let mut random = ChaCha8Rng::seed_from_u64(seed);
        let mut block = Block::default();
        for shape in shapes((2, heads, dim), (element, order), (position, tokens)) {
            let raw = raw_of(&shape, one_in, &mut random);
            prop_assert!(codec.applies(&shape));
            let stored = encoded(&*codec, &shape, &raw, &block);
            prop_assert!(stored.len() <= raw.len() + HEADER_BYTES);
            let back = decoded(&*codec, &shape, &stored, &block).unwrap();
            prop_assert_eq!(&back, &raw);
            prop_assert_eq!(codec.error_in(&shape, &stored).unwrap(), 0.0);
            block.0.insert((shape.layer(), shape.code() as u8), back);
        }
    }

    #[test]
    fn damage_is_an_error_or_changes_nothing(
        seed in any::<u64>(),
        layer in 0_u32..3,
        edits in prop::collection::vec((any::<prop::sample::Index>(), 1_u8..), 1..4),
    ) {
        let mut random = ChaCha8Rng::seed_from_u64(seed);
        let all = shapes((3, 2, 16), (Element::Bf16, PartOrder::TokenMajor), (2, 70));
        let mut block = Block::default();
        for shape in &all {
            let raw = raw_of(shape, 5000, &mut random);
            block.0.insert((shape.layer(), shape.code() as u8), raw);
        }
        let shape = all[2 * layer as usize + 1];
        let raw = raw_of(&shape, 2000, &mut random);
        let codec = level(3, 2, 16);
        let stored = encoded(&*codec, &shape, &raw, &block);
        prop_assert!(stored.len() < raw.len(), "it is coded");
        let mut other = stored.clone();
        for (at, flip) in &edits {
            let at = at.index(other.len());
            other[at] ^= flip;
        }
        if let Ok(out) = decoded(&*codec, &shape, &other, &block) {
            prop_assert_eq!(&out, &raw);
        }
        for len in [0, 11, 12, 13, 20, 200, stored.len() - 1] {
            prop_assert!(decoded(&*codec, &shape, &stored[..len], &block).is_err());
        }
        let longer = [&stored[..], &[0]].concat();
        prop_assert!(decoded(&*codec, &shape, &longer, &block).is_err());
    }
}

// Goal: the sinks at the front of a prefix are kept as they are, and so is a token full of odd
// values; neither changes how the others are coded.
#[test]
fn odd_tokens_take_no_more_than_their_bits() {
    let all = shapes((1, 2, 16), (Element::Bf16, PartOrder::TokenMajor), (0, 64));
    let shape = all[1];
    let codec = level(1, 2, 16);
    let mut random = ChaCha8Rng::seed_from_u64(7);
    let raw = raw_of(&shape, 1_000_000, &mut random);
    let mut block = Block::default();
    let k = raw_of(&all[0], 1_000_000, &mut random);
    block.0.insert((0, PartCode::K as u8), k);
    let right = encoded(&*codec, &shape, &raw, &block);
    assert_eq!(
        right[HEADER_BYTES..HEADER_BYTES + 8],
        [0x0f, 0, 0, 0, 0, 0, 0, 0]
    );
    let mut odd = raw;
    odd[64 * 40..64 * 41].fill(0xff);
    let stored = encoded(&*codec, &shape, &odd, &block);
    assert_eq!(
        stored[HEADER_BYTES..HEADER_BYTES + 8],
        [0x0f, 0, 0, 0, 0, 1, 0, 0]
    );
    assert!(stored.len() <= right.len() + 64);
    assert_eq!(decoded(&*codec, &shape, &stored, &block).unwrap(), odd);
}

#[test]
fn level_asks_for_what_it_needs_and_refuses_without() {
    let all = shapes((3, 2, 16), (Element::Bf16, PartOrder::TokenMajor), (0, 32));
    let (k, v) = (PartCode::K, PartCode::V);
    let codec = level(3, 2, 16);
    assert_eq!(codec.level(), Level::LOSSLESS_X);
    assert_eq!(codec.needs(&all[0]), []);
    assert_eq!(codec.needs(&all[1]), [(0, k)]);
    assert_eq!(codec.needs(&all[4]), [(1, k), (1, v)]);
    assert_eq!(codec.needs(&all[5]), [(1, k), (1, v), (2, k)]);
    let raw = vec![0; all[5].raw_bytes()];
    let mut out = vec![0; codec.stored_bytes_max(&all[5])];
    let refused = codec
        .encode(&all[5], &raw, &mut out)
        .unwrap_err()
        .to_string();
    assert_eq!(
        refused,
        "level lossless_x needs the k part of layer 1 first"
    );
    let mut random = ChaCha8Rng::seed_from_u64(3);
    let mut block = Block::default();
    for shape in &all {
        let raw = raw_of(shape, 1_000_000, &mut random);
        block.0.insert((shape.layer(), shape.code() as u8), raw);
    }
    let stored = encoded(&*codec, &all[5], &block.0[&(2, v as u8)], &block);
    block.0.remove(&(1, v as u8));
    let refused = decoded(&*codec, &all[5], &stored, &block).unwrap_err();
    assert!(matches!(
        refused,
        DecodeError::Needs {
            layer: 1,
            code: PartCode::V
        }
    ));
}

#[test]
fn level_is_not_for_parts_without_tables() {
    let codec = level(2, 2, 16);
    let shape = |element, layer: usize, heads| {
        shapes((3, heads, 16), (element, PartOrder::TokenMajor), (0, 32))[2 * layer]
    };
    assert!(codec.applies(&shape(Element::F16, 1, 2)));
    assert!(!codec.applies(&shape(Element::F32, 1, 2)), "no cells");
    assert!(!codec.applies(&shape(Element::Bf16, 2, 2)), "no such layer");
    assert!(!codec.applies(&shape(Element::Bf16, 1, 3)), "other heads");
    let other = level(2, 2, 16);
    assert_eq!(codec.tables(), other.tables());
    assert_ne!(codec.tables(), level(3, 2, 16).tables());
    let plain = Ladder::all(Arc::new(
        crate::fuzzing::profile::fixture(2, 2, 16).unwrap(),
    ));
    assert!(plain.unwrap().iter().all(|level| !level.exact()));
}

/// Stored bytes of blocks, as every machine has to make them.
fn block_hash() -> String {
    let mut hash = blake3::Hasher::new();
    for (element, order) in HALVES.into_iter().zip(ORDERS) {
        let codec = level(3, 3, 12);
        let mut random = ChaCha8Rng::seed_from_u64(99);
        let (mut block, mut coded) = (Block::default(), 0);
        for shape in shapes((3, 3, 12), (element, order), (2, 75)) {
            let raw = raw_of(&shape, 3000, &mut random);
            let stored = encoded(&*codec, &shape, &raw, &block);
            coded += usize::from(stored.len() < raw.len());
            assert_eq!(decoded(&*codec, &shape, &stored, &block).unwrap(), raw);
            hash.update(&stored);
            block.0.insert((shape.layer(), shape.code() as u8), raw);
        }
        assert!(coded >= 3, "{coded} of 6 parts of {element:?} are coded");
    }
    hash.finalize().to_hex()[..16].to_owned()
}

// T1, V2. The hash changes only with a new version of the level.
#[test]
fn stored_bytes_are_those_of_every_other_machine() {
    for path in crate::simd::Path::available() {
        assert_eq!(path.at_most(block_hash), "45055901bbb7fdd0", "{path:?}");
    }
}
