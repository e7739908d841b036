//! Tests of taking 16-bit floats apart: every path, and back to the same bits.
use proptest::prelude::*;

use super::*;
use crate::rans::{Codes, Decoder, Frequencies, Slots, encode, stream_bytes_max};
use crate::simd::{self, Path};

fn kinds() -> impl Strategy<Value = Kind> {
    prop::sample::select(vec![Kind::Bf16, Kind::F16])
}

/// The pieces of `raw`, by the given way to take it apart.
fn pieces(kind: Kind, raw: &[u8], split: impl FnOnce(PlanesMut<'_>)) -> (Vec<u8>, Vec<u8>) {
    let groups = raw.len() / (2 * GROUP);
    let mut symbols = vec![0x5a; groups * GROUP_SYMBOLS];
    let mut rest = vec![0x5a; groups * kind.plane_bytes()];
    split(PlanesMut {
        symbols: &mut symbols,
        rest: &mut rest,
    });
    (symbols, rest)
}

/// A stream of symbols, and what decodes it.
fn coded(symbols: &[u8]) -> (Slots, Vec<u8>) {
    let mut weights = [1; 256];
    for symbol in symbols {
        weights[usize::from(*symbol)] += 9;
    }
    let frequencies = Frequencies::in_proportion(&weights).unwrap();
    let mut stream = vec![0; stream_bytes_max(symbols.len())];
    let len = encode(&Codes::new(&frequencies), symbols, &mut stream).unwrap();
    stream.truncate(len);
    (Slots::new(&frequencies), stream)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    // Goal: V2. Method: any bits, so that every exponent is met, inside and outside the window.
    #[test]
    fn all_paths_take_apart_and_join_alike(
        kind in kinds(),
        base in any::<u8>(),
        groups in 1_usize..24,
        bits in prop::collection::vec(any::<u16>(), 24 * GROUP),
        small in any::<bool>(),
    ) {
        // Small: the exponents lie close together, as those of KV do.
        let bits = bits.iter().map(|bits| match (small, kind) {
            (false, _) => *bits,
            (true, Kind::Bf16) => bits & 0x87ff | u16::from(base) << 7 & 0x7f80,
            (true, Kind::F16) => bits & 0x9fff,
        });
        let raw: Vec<u8> = bits.take(groups * GROUP).flat_map(u16::to_le_bytes).collect();
        let window = Window { base };
        let slow = pieces(kind, &raw, |planes| split(kind, window, &raw, planes));
        let planes = Planes { symbols: &slow.0, rest: &slow.1 };
        let mut joined = vec![0xa5; raw.len()];
        merge(kind, window, planes, &mut joined);
        let (slots, stream) = coded(&slow.0);
        for path in Path::available() {
            let fast = path.at_most(|| {
                pieces(kind, &raw, |planes| simd::split(kind, window, &raw, planes))
            });
            prop_assert_eq!(&slow, &fast, "{:?}", path);
            let mut decoder = Decoder::new(&stream).unwrap();
            let mut fast = vec![0x5a; raw.len()];
            let coder = (&mut decoder, &slots);
            path.at_most(|| simd::join(coder, (kind, window), &slow.1, &mut fast)).unwrap();
            decoder.end().unwrap();
            prop_assert_eq!(&joined, &fast, "{:?}", path);
        }
        for (value, joined) in raw.as_chunks::<2>().0.iter().zip(joined.as_chunks::<2>().0) {
            let (value, joined) = (u16::from_le_bytes(*value), u16::from_le_bytes(*joined));
            let exponent = kind.exponent(value);
            match window.nibble(exponent) {
                ESCAPE => prop_assert_eq!(joined, kind.with_exponent(value, 0)),
                _ => prop_assert_eq!(joined, value),
            }
        }
    }

    #[test]
    fn an_exponent_goes_out_of_a_value_and_back(kind in kinds(), value in any::<u16>()) {
        let without = kind.with_exponent(value, 0);
        prop_assert_eq!(kind.exponent(without), 0);
        prop_assert_eq!(kind.with_exponent(without, kind.exponent(value)), value);
    }
}

#[test]
fn a_window_lies_where_most_exponents_are_and_leaves_zero_out() {
    let mut counts = [0; 256];
    counts[0] = 1_000_000;
    assert_eq!(Window::of(&counts).base, 1);
    (counts[100], counts[113], counts[114]) = (5, 7, 6);
    let window = Window::of(&counts);
    let all = [100_u8, 113].map(|exponent| window.nibble(exponent));
    // 100 and 114 do not fit into one window of 14.
    assert!(all.contains(&ESCAPE) || window.nibble(114) == ESCAPE);
    assert_eq!(window.nibble(113), 113 - window.base);
    assert_eq!(window.nibble(0), ZERO);
    counts[255] = 50;
    assert_eq!(
        Window::of(&counts).nibble(255),
        255 - Window::of(&counts).base
    );
}
