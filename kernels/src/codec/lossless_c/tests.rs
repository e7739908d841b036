//! Tests of level 9 beyond those that all codecs share: tiles, orders, classes, paths, frozen
//! bytes.
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
use crate::codec::header::HEADER_BYTES;
use crate::codec::tests::{decoded, encoded};
use crate::simd::Path;

const KINDS: [(Element, Kind); 2] = [(Element::Bf16, Kind::Bf16), (Element::F16, Kind::F16)];
const CODEC: LosslessC = LosslessC::new();

fn shape_of(element: Element, tokens: usize, heads: usize, dim: usize) -> PartShape {
    let shape = PartShape::new(element, tokens as u32, (heads * dim) as u32).unwrap();
    shape
        .with_heads(heads as u32, PartOrder::TokenMajor)
        .unwrap()
}

/// Values whose exponents are spread like those of a bell curve, a scale and a sign a channel.
fn like_kv(kind: Kind, shape: &PartShape, seed: u64) -> Vec<u8> {
    let mut random = ChaCha8Rng::seed_from_u64(seed);
    let channels: Vec<(u8, u16)> = (0..shape.width())
        .map(|_| (random.random_range(0..7), random.random_range(0..3)))
        .collect();
    let top = if kind == Kind::Bf16 { 128 } else { 16 };
    let count = shape.raw_bytes() / 2;
    let value = |at: usize| {
        let (scale, sign) = channels[at % channels.len()];
        let below = random.random::<u32>().trailing_zeros() as u8 + scale;
        let value = kind.with_exponent(random.random(), top - below.min(top));
        match sign {
            0 => value,
            // Of one sign in three of four.
            _ if random.random_range(0..4) == 0 => value,
            1 => value | 0x8000,
            _ => value & 0x7fff,
        }
    };
    (0..count).map(value).flat_map(u16::to_le_bytes).collect()
}

/// The same values, head after head.
fn by_head(raw: &[u8], heads: usize, dim: usize) -> Vec<u8> {
    let rows = raw.chunks_exact(2 * heads * dim);
    let head = |head| {
        rows.clone()
            .flat_map(move |row| &row[2 * head * dim..2 * (head + 1) * dim])
    };
    (0..heads).flat_map(head).copied().collect()
}

#[test]
fn parts_round_trip_at_every_border_of_a_tile_a_block_and_a_group() {
    for (element, kind) in KINDS {
        for (tokens, heads, dim) in [
            (256, 3, 64),
            (31, 3, 64),
            (32, 1, 33),
            (33, 2, 24),
            (100, 1, 17),
            (2048, 1, 33), // two tiles, the second of 96 rows
            (40, 2, 1024),
            (33, 1, 16_384),
            (32, 1, 16_385), // too wide for channels
            (1, 1, 70_000),
            (2048, 1, 1),
        ] {
            let shape = shape_of(element, tokens, heads, dim);
            let raw = like_kv(kind, &shape, tokens as u64);
            let stored = encoded(&CODEC, &shape, &raw);
            assert!(stored[1] == 1 || raw.len() < 4096, "coded: {shape:?}");
            assert!(
                decoded(&CODEC, &shape, &stored).unwrap() == raw,
                "{shape:?}"
            );
            let heads_first = shape
                .with_heads(heads as u32, PartOrder::HeadMajor)
                .unwrap();
            let raw = by_head(&raw, heads, dim);
            let stored = encoded(&CODEC, &heads_first, &raw);
            assert!(
                decoded(&CODEC, &heads_first, &stored).unwrap() == raw,
                "{shape:?}"
            );
        }
    }
}

// Channels are the same in either order of tokens and heads: so is what they cost.
#[test]
fn heads_that_come_first_cost_what_tokens_that_come_first_do() {
    let shape = shape_of(Element::Bf16, 256, 3, 64);
    let heads_first = shape.with_heads(3, PartOrder::HeadMajor).unwrap();
    let raw = like_kv(Kind::Bf16, &shape, 1);
    let [tokens, heads] = [
        encoded(&CODEC, &shape, &raw).len(),
        encoded(&CODEC, &heads_first, &by_head(&raw, 3, 64)).len(),
    ];
    assert!(tokens.abs_diff(heads) < tokens / 200, "{tokens} {heads}");
}

#[test]
fn channels_that_differ_cost_less_than_at_level_lossless() {
    for (element, kind) in KINDS {
        let shape = shape_of(element, 256, 3, 64);
        let raw = like_kv(kind, &shape, 2);
        let one = encoded(&crate::codec::lossless::Lossless::new(), &shape, &raw).len();
        let classes = encoded(&CODEC, &shape, &raw).len();
        assert!(classes * 100 < one * 97, "{classes} of {one}");
    }
}

#[test]
fn exponents_that_no_window_holds_come_back_wherever_they_stand() {
    for (element, kind) in KINDS {
        let shape = shape_of(element, 512, 1, 192);
        let plain = like_kv(kind, &shape, 9);
        for at in [0, 63, 64, 191, 192, 65_471, 65_472, 98_303] {
            let mut raw = plain.clone();
            for (at, exponent) in [(at, kind.exponent_max()), (98_301, 1)] {
                let value = kind.with_exponent(0x8055, exponent);
                raw[2 * at..2 * at + 2].copy_from_slice(&value.to_le_bytes());
            }
            let stored = encoded(&CODEC, &shape, &raw);
            assert_eq!(stored[1], 1, "coded");
            assert!(
                decoded(&CODEC, &shape, &stored).unwrap() == raw,
                "{kind:?} {at}"
            );
        }
    }
}

#[test]
fn a_part_of_one_value_takes_little_more_than_its_mantissas() {
    for (element, kind) in KINDS {
        for value in [0_u16, 0x8000, 0x3f80, 0xffff] {
            let shape = shape_of(element, 256, 1, 256);
            let raw: Vec<u8> = (0..1 << 16).flat_map(|_| value.to_le_bytes()).collect();
            let stored = encoded(&CODEC, &shape, &raw);
            let rest = (1 << 10) * rest_bytes(kind);
            assert!(
                stored.len() < rest + rest / 40,
                "{} of {rest}",
                stored.len()
            );
            assert!(decoded(&CODEC, &shape, &stored).unwrap() == raw);
        }
    }
}

#[test]
fn decode_names_what_is_wrong_with_classes_or_a_stream() {
    let shape = shape_of(Element::Bf16, 256, 3, 64);
    let stored = encoded(&CODEC, &shape, &like_kv(Kind::Bf16, &shape, 4));
    let cases = [
        (1, 0, "has classes 0; accepted: 16"),
        (1, 17, "has classes 17; accepted: 16"),
        (3, 0xff, "stored part ends after"),
        (6, 0xff, "has escapes"),
        (9, 0xff, "bytes of classes that are none"),
    ];
    for (at, value, want) in cases {
        let mut other = stored.clone();
        other[HEADER_BYTES + at] = value;
        let problem = decoded(&CODEC, &shape, &other).unwrap_err().to_string();
        assert!(problem.contains(want), "{problem}");
    }
}

#[test]
fn bits_come_back_as_they_were_put_and_end_where_they_end() {
    let mut writer = bits::Writer::default();
    for number in 0..120 {
        writer.rice(number);
        writer.put(number, 7);
    }
    let bytes = writer.bytes;
    let mut reader = bits::Reader::new(&bytes);
    for number in 0..120 {
        assert_eq!((reader.rice(), reader.get(7)), (Some(number), Some(number)));
    }
    assert!(reader.ends_here());
    assert_eq!(bits::Reader::new(&[]).get(1), None);
    assert_eq!(bits::Reader::new(&[0xff; 20]).rice(), None);
    assert!(!bits::Reader::new(&[0; 1]).ends_here());
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(100))]

    // Goal: V2. Method: any bits, so that every exponent is met, inside and outside the window.
    #[test]
    fn all_paths_join_alike_and_give_the_values_back(
        (_, kind) in prop::sample::select(&KINDS[..]),
        base in any::<u8>(),
        bits in prop::collection::vec(any::<u16>(), 1..400),
    ) {
        let raw: Vec<u8> = bits.iter().copied().flat_map(u16::to_le_bytes).collect();
        let window = Window { base };
        let coder = Symbols::new(kind, window);
        let mut symbols = vec![0; bits.len()];
        coder.of(&raw, &mut symbols);
        let mut rest = vec![0x5a; bits.len().div_ceil(GROUP) * rest_bytes(kind)];
        for (raw, rest) in raw.chunks(GROUP_BYTES).zip(rest.chunks_mut(rest_bytes(kind))) {
            coder.rest(raw, rest);
        }
        for path in Path::available() {
            let mut joined = vec![0xa5; raw.len()];
            path.at_most(|| simd::join_signed((kind, window), &symbols, &rest, &mut joined));
            for (value, joined) in bits.iter().zip(joined.as_chunks::<2>().0) {
                let exponent = kind.exponent(*value);
                let want = match window.nibble(exponent) {
                    ESCAPE => kind.with_exponent(*value, 0),
                    _ => *value,
                };
                prop_assert_eq!(u16::from_le_bytes(*joined), want, "{:?}", path);
            }
        }
    }

    #[test]
    fn a_block_turned_has_its_rows_as_columns(bytes in prop::collection::vec(any::<u8>(), 256)) {
        let mut block = [[0; simd::BLOCK]; simd::BLOCK];
        block.as_flattened_mut().copy_from_slice(&bytes);
        let mut turned = [block; 3];
        let [fast, slow, back] = &mut turned;
        simd::turn(&block, fast);
        simd::turned(&block, slow);
        prop_assert_eq!(&*fast, &*slow);
        prop_assert!((0..16).all(|at| fast[at][3] == block[3][at]));
        simd::turn(fast, back);
        prop_assert_eq!(&*back, &block);
    }

    #[test]
    fn a_tile_comes_back_from_the_order_of_coding(
        rows in 1_usize..70,
        of in prop::collection::vec(0_u8..5, 1..70),
        seed in any::<u64>(),
    ) {
        let tile = Tile { first: 0, channel: 0, rows, columns: of.len() };
        let mut random = ChaCha8Rng::seed_from_u64(seed);
        let symbols: Vec<u8> = (0..tile.values()).map(|_| random.random()).collect();
        let masks: Vec<u8> = of.iter().map(|_| 16 * random.random_range(0..2)).collect();
        let order = Order::new(&tile, &of, 5);
        let mut columns = vec![0; TILE_SYMBOLS];
        order.to_columns(&tile, &symbols, &masks, &mut columns);
        let first = of.iter().position(|class| *class == *of.iter().min().unwrap()).unwrap();
        for (row, symbols) in symbols.chunks(of.len()).enumerate() {
            prop_assert_eq!(columns[row], symbols[first] ^ masks[first]);
        }
        let mut back = vec![0; tile.values()];
        order.to_rows(&tile, &columns, &masks, &mut back);
        prop_assert_eq!(back, symbols);
    }
}

// Goal: bytes on disk keep their meaning. The CRC is of what this level wrote when it was
// introduced; a change here is a new level (docs/decisions/0002), not a new number.
#[test]
fn bytes_of_level_9_are_frozen() {
    let crcs = KINDS.map(|(element, kind)| {
        let shape = shape_of(element, 333, 3, 64);
        crc32fast::hash(&encoded(&CODEC, &shape, &like_kv(kind, &shape, 1)))
    });
    assert_eq!(crcs, [0xb49981eb, 0xfe9bff04], "{crcs:#010x?}");
}
