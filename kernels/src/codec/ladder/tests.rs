//! Tests of the levels with tables: the error they declare holds for every value, and every path
//! and every run makes the same bits.
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
use crate::Registry;
use crate::codec::header::HEADER_BYTES;
use crate::fuzzing::profile::fixture;

mod random;

const FLOATS: [Element; 3] = [Element::Bf16, Element::F16, Element::F32];
const ORDERS: [PartOrder; 2] = [PartOrder::TokenMajor, PartOrder::HeadMajor];

/// Parts of a block, as they were restored.
#[derive(Default)]
struct Block(HashMap<(u32, u8), Vec<u8>>);

impl Restored for Block {
    fn part(&self, layer: u32, code: PartCode) -> Option<&[u8]> {
        self.0.get(&(layer, code as u8)).map(Vec::as_slice)
    }
}

/// How test data is made.
#[derive(Debug, Clone, Copy)]
enum Data {
    /// As the fixture's tables expect it.
    Normal,
    /// With values that are huge, tiny, infinite or no numbers here and there.
    Adversarial,
    /// Random bits.
    Noise,
}

fn any_data() -> impl Strategy<Value = Data> {
    prop::sample::select(&[Data::Normal, Data::Adversarial, Data::Noise][..])
}

fn raw_of(shape: &PartShape, data: Data, random: &mut ChaCha8Rng) -> Vec<u8> {
    let count = shape.tokens() as usize * shape.width() as usize;
    let mut raw = vec![0; shape.raw_bytes()];
    if matches!(data, Data::Noise) {
        random.fill(&mut raw[..]);
        return raw;
    }
    let odd = [
        f32::NAN,
        f32::INFINITY,
        f32::NEG_INFINITY,
        f32::MAX,
        1e30,
        6e4,
        300.0,
        1e-40,
        -0.0,
    ];
    let values: Vec<f32> = (0..count)
        .map(|_| {
            let bell: f32 = (0..4).map(|_| random.random::<f32>()).sum::<f32>() - 2.0;
            match data {
                Data::Adversarial if random.random_range(0..300) == 0 => {
                    odd[random.random_range(0..odd.len())]
                }
                _ => bell + 0.5,
            }
        })
        .collect();
    floats::write(shape.element(), &values, &mut raw);
    raw
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

/// What rounding to the element type may add to an error.
fn rounding(element: Element, value: f32) -> f32 {
    let bits = match element {
        Element::Bf16 => 8,
        Element::F16 => 11,
        _ => 24,
    };
    value.abs() * 2_f32.powi(-bits) + 2_f32.powi(-24)
}

fn levels(layers: u32, heads: u32, dim: u32) -> Vec<Arc<dyn Codec>> {
    Ladder::all(Arc::new(fixture(layers, heads, dim).unwrap())).unwrap()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(96))]

    // T3. Also the closed loop: parts are predicted from what was restored.
    #[test]
    fn no_value_has_a_larger_error_than_its_part_declares(
        element in prop::sample::select(&FLOATS[..]),
        order in prop::sample::select(&ORDERS[..]),
        (heads, dim) in prop::sample::select(vec![(1_u32, 8_u32), (2, 16), (3, 5), (3, 12)]),
        position in prop::sample::select(vec![0_u32, 2, 100, 100_000]),
        tokens in 1_u32..80,
        data in any_data(),
        seed in any::<u64>(),
    ) {
        for codec in levels(3, heads, dim) {
            let mut random = ChaCha8Rng::seed_from_u64(seed);
            let mut block = Block::default();
            for shape in shapes((3, heads, dim), (element, order), (position, tokens)) {
                let raw = raw_of(&shape, data, &mut random);
                prop_assert!(codec.applies(&shape));
                let stored = encoded(&*codec, &shape, &raw, &block);
                prop_assert!(stored.len() <= raw.len() + HEADER_BYTES);
                let back = decoded(&*codec, &shape, &stored, &block).unwrap();
                let bound = codec.error_in(&shape, &stored).unwrap();
                let values = floats::read(element, &raw);
                let size = element.bytes();
                let others = floats::read(element, &back);
                for (at, (value, other)) in values.iter().zip(others).enumerate() {
                    let bytes = at * size..(at + 1) * size;
                    let same = raw[bytes.clone()] == back[bytes];
                    let error = (value - other).abs();
                    let allowed = bound * 1.0001 + rounding(element, other);
                    let name = codec.name();
                    prop_assert!(same || error <= allowed, "{name}: {value} became {other}");
                }
                block.0.insert((shape.layer(), shape.code() as u8), back);
            }
        }
    }

    #[test]
    fn damage_is_an_error_or_changes_nothing(
        seed in any::<u64>(),
        layer in 0_u32..3,
        edits in prop::collection::vec((any::<prop::sample::Index>(), 1_u8..), 1..4),
    ) {
        let mut random = ChaCha8Rng::seed_from_u64(seed);
        let all = shapes((3, 2, 8), (Element::Bf16, PartOrder::TokenMajor), (2, 40));
        let mut block = Block::default();
        for shape in &all {
            let raw = raw_of(shape, Data::Normal, &mut random);
            block.0.insert((shape.layer(), shape.code() as u8), raw);
        }
        let shape = all[2 * layer as usize + 1];
        let raw = raw_of(&shape, Data::Adversarial, &mut random);
        for codec in levels(3, 2, 8) {
            let stored = encoded(&*codec, &shape, &raw, &block);
            let right = decoded(&*codec, &shape, &stored, &block).unwrap();
            let mut other = stored.clone();
            for (at, flip) in &edits {
                let at = at.index(other.len());
                other[at] ^= flip;
            }
            if let Ok(out) = decoded(&*codec, &shape, &other, &block) {
                prop_assert_eq!(&out, &right);
            }
            for len in [0, 11, 12, 13, 20, stored.len() - 1] {
                prop_assert!(decoded(&*codec, &shape, &stored[..len], &block).is_err());
            }
        }
    }
}

// Goal: what a part is predicted from while it is encoded is what it is predicted from later.
#[test]
fn encoding_hands_out_what_decoding_gives() {
    let mut random = ChaCha8Rng::seed_from_u64(11);
    let shapes = shapes((3, 2, 16), (Element::Bf16, ORDERS[0]), (0, 40));
    let baselines = Registry::with_baselines();
    let ladder = levels(3, 2, 16);
    for codec in ladder.iter().map(AsRef::as_ref).chain(baselines.iter()) {
        for data in [Data::Normal, Data::Adversarial, Data::Noise] {
            let mut before = Block::default();
            for shape in &shapes {
                let raw = raw_of(shape, data, &mut random);
                let want = encoded(codec, shape, &raw, &before);
                let mut stored = vec![0; codec.stored_bytes_max(shape)];
                let mut here = vec![0xaa; raw.len()];
                let pair = (&mut stored[..], &mut here[..]);
                let len = codec.encode_restoring(shape, &raw, &before, pair).unwrap();
                assert_eq!(&stored[..len], want, "{} {data:?}", codec.name());
                let restored = decoded(codec, shape, &want, &before).unwrap();
                assert!(here == restored, "{} {data:?} {shape:?}", codec.name());
                before.0.insert((shape.layer(), shape.code() as u8), here);
            }
        }
    }
}

#[test]
fn tokens_that_no_step_reaches_are_kept_exactly() {
    let shape = shapes((1, 2, 8), (Element::F32, PartOrder::HeadMajor), (0, 64))[0];
    let mut random = ChaCha8Rng::seed_from_u64(7);
    let mut raw = raw_of(&shape, Data::Normal, &mut random);
    // One value of tokens 10 to 14, in the second head.
    let odd = [f32::NAN, f32::INFINITY, 3e38, -1e9, 5000.0];
    for (token, value) in (10..).zip(odd) {
        let at = (64 + token) * 8 * 4;
        raw[at..at + 4].copy_from_slice(&value.to_le_bytes());
    }
    let codec = &levels(1, 2, 8)[0];
    let block = Block::default();
    let stored = encoded(&**codec, &shape, &raw, &block);
    assert!(stored.len() < raw.len());
    let back = decoded(&**codec, &shape, &stored, &block).unwrap();
    for token in [0, 1, 2, 3, 10, 11, 12, 13, 14] {
        for head in [0, 1] {
            let at = (64 * head + token) * 8 * 4;
            assert_eq!(raw[at..at + 32], back[at..at + 32], "token {token}");
        }
    }
}

#[test]
fn level_across_layers_asks_for_what_it_needs_and_refuses_without() {
    let all = shapes((3, 2, 8), (Element::Bf16, PartOrder::TokenMajor), (0, 32));
    let (k, v) = (PartCode::K, PartCode::V);
    let codecs = levels(3, 2, 8);
    let found: Vec<_> = codecs.iter().map(|codec| codec.level()).collect();
    let want = LEVELS.map(|(level, ..)| level);
    assert_eq!(found, want);
    let (plain, across) = (&codecs[1], &codecs[4]);
    let last = &all[5];
    assert_eq!(across.needs(last), [(1, k), (1, v), (0, k), (0, v), (2, k)]);
    assert_eq!(across.needs(&all[0]), []);
    assert_eq!(plain.needs(last), []);
    let raw = vec![0; last.raw_bytes()];
    let mut out = vec![0; across.stored_bytes_max(last)];
    let refused = across.encode(last, &raw, &mut out).unwrap_err().to_string();
    assert_eq!(
        refused,
        "level balanced_x needs the k part of layer 1 first"
    );
    // The first part has nothing before it, and is coded plainly.
    let raw = raw_of(&all[0], Data::Normal, &mut ChaCha8Rng::seed_from_u64(1));
    assert!(across.encode(&all[0], &raw, &mut out).is_ok());
    let other = PartShape::new(Element::Bf16, 32, 16)
        .unwrap()
        .of_layer(3, k);
    assert!(!across.applies(&other) && !plain.applies(&other));
    // What no level made is not exact, it is refused.
    let stored = encoded(&**plain, &all[0], &raw, &Block::default());
    assert!(plain.error_in(&all[0], &stored).is_ok());
    assert!(plain.error_in(&other, &stored).is_err());
}

#[test]
fn levels_of_two_profiles_live_in_one_registry() {
    let mut registry = Registry::with_baselines();
    for codec in levels(1, 2, 8).into_iter().chain(levels(2, 2, 8)) {
        registry.add(codec).unwrap();
    }
    let again = levels(2, 2, 8).remove(0);
    let tables = again.tables();
    assert!(registry.add(again).is_err(), "K5");
    assert_ne!(tables, 0);
    assert!(registry.decoder(Level::BALANCED, tables).is_ok());
    assert!(registry.decoder(Level::BALANCED, tables ^ 1).is_err());
}

/// Stored bytes of a block with every kind of table, as every machine has to make them.
fn block_hash() -> String {
    let mut hash = blake3::Hasher::new();
    for (element, order) in FLOATS.iter().zip([ORDERS[0], ORDERS[1], ORDERS[0]]) {
        for codec in levels(3, 3, 12) {
            let mut random = ChaCha8Rng::seed_from_u64(99);
            let mut block = Block::default();
            for shape in shapes((3, 3, 12), (*element, order), (2, 75)) {
                let raw = raw_of(&shape, Data::Adversarial, &mut random);
                let stored = encoded(&*codec, &shape, &raw, &block);
                let back = decoded(&*codec, &shape, &stored, &block).unwrap();
                hash.update(&stored);
                hash.update(&back);
                block.0.insert((shape.layer(), shape.code() as u8), back);
            }
        }
    }
    hash.finalize().to_hex()[..16].to_owned()
}

// T1, T2, V2. The hash changes only with a new version of the levels.
#[test]
fn stored_bytes_are_those_of_every_other_machine() {
    for path in crate::simd::Path::available() {
        assert_eq!(path.at_most(block_hash), "7290b95d08940f32", "{path:?}");
    }
}
