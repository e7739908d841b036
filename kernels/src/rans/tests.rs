//! Tests of the coder: every path makes the same bits, and damage is an error.
#![allow(
    clippy::cast_possible_truncation,
    reason = "test data is cut to size on purpose"
)]

use proptest::prelude::*;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

use super::reference::Encoder;
use super::*;
use crate::simd::Path;

/// Symbols that follow `weights` about as they say, and what codes them.
fn drawn(weights: &[u64; 256], count: usize, seed: u64) -> ((Slots, Codes), Vec<u8>) {
    let mut random = ChaCha8Rng::seed_from_u64(seed);
    let total: u64 = weights.iter().sum();
    let symbol = |random: &mut ChaCha8Rng| {
        let mut left = random.random_range(0..total);
        let found = weights.iter().position(|weight| {
            let here = left < *weight;
            left = left.saturating_sub(*weight);
            here
        });
        found.unwrap() as u8
    };
    let symbols = (0..count).map(|_| symbol(&mut random)).collect();
    let frequencies = Frequencies::in_proportion(weights).unwrap();
    (
        (Slots::new(&frequencies), Codes::new(&frequencies)),
        symbols,
    )
}

fn weights() -> impl Strategy<Value = [u64; 256]> {
    let some = prop::collection::vec((any::<u8>(), 0_u32..40), 1..200);
    some.prop_map(|some| {
        let mut weights = [0; 256];
        for (symbol, power) in some {
            weights[usize::from(symbol)] = 1_u64 << power;
        }
        weights
    })
}

fn encoded(codes: &Codes, symbols: &[u8]) -> Vec<u8> {
    let mut out = vec![0xaa; stream_bytes_max(symbols.len())];
    let len = encode(codes, symbols, &mut out).unwrap();
    out.truncate(len);
    out
}

fn encoded_by_reference(codes: &Codes, symbols: &[u8]) -> Vec<u8> {
    let mut out = vec![0x55; stream_bytes_max(symbols.len())];
    let mut encoder = Encoder::new(&mut out);
    encoder.run(codes, symbols).unwrap();
    let len = encoder.end().unwrap();
    out.truncate(len);
    out
}

fn decoded(slots: &Slots, stream: &[u8], count: usize) -> Result<Vec<u8>, StreamError> {
    let mut out = vec![0xaa; count];
    let mut decoder = Decoder::new(stream)?;
    decoder.run(slots, &mut out)?;
    decoder.end()?;
    Ok(out)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(96))]

    #[test]
    fn frequencies_are_whole_and_give_every_weighted_symbol_a_code(weights in weights()) {
        let frequencies = Frequencies::in_proportion(&weights).unwrap();
        prop_assert!(Frequencies::new(*frequencies.get()).is_some());
        let total: u64 = weights.iter().sum();
        for (weight, frequency) in weights.iter().zip(frequencies.get()) {
            prop_assert!(*weight == 0 || *frequency > 0);
            // Nobody loses more than a sixteenth of its share, and one part.
            let share = weight * SCALE as u64 / total;
            prop_assert!(u64::from(*frequency) + 1 + share / 15 >= share);
        }
    }

    // Goal: V2. Method: the same symbols by all paths; streams of every length, so that the
    // fast ones leave every possible end to the reference.
    #[test]
    fn all_paths_make_the_same_stream_and_symbols(
        weights in weights(),
        steps in 0_usize..80,
        seed in any::<u64>(),
    ) {
        let ((slots, codes), symbols) = drawn(&weights, steps * LANES, seed);
        let stream = encoded_by_reference(&codes, &symbols);
        for path in Path::available() {
            let fast = path.at_most(|| encoded(&codes, &symbols));
            prop_assert_eq!(&fast, &stream, "{:?}", path);
            let fast = path.at_most(|| decoded(&slots, &stream, symbols.len()));
            prop_assert_eq!(fast.as_ref(), Ok(&symbols), "{:?}", path);
        }
        let mut out = vec![0; symbols.len()];
        let mut decoder = Decoder::new(&stream).unwrap();
        reference::decode(&mut decoder, &slots, &mut out).unwrap();
        decoder.end().unwrap();
        prop_assert_eq!(&out, &symbols);
    }

    // Goal: the paths agree on damage as well, and none reads outside or panics (R3).
    #[test]
    fn all_paths_make_the_same_of_a_damaged_stream(
        weights in weights(),
        steps in 1_usize..40,
        seed in any::<u64>(),
        edits in prop::collection::vec((any::<prop::sample::Index>(), 1_u8..), 1..4),
        cut in any::<prop::sample::Index>(),
    ) {
        let ((slots, codes), symbols) = drawn(&weights, steps * LANES, seed);
        let mut stream = encoded(&codes, &symbols);
        for (at, flip) in edits {
            let at = at.index(stream.len());
            stream[at] ^= flip;
        }
        let cut = cut.index(stream.len() * 2).min(stream.len());
        let stream = &stream[..cut];
        let slow = Decoder::new(stream).and_then(|mut decoder| {
            let mut out = vec![0; symbols.len()];
            reference::decode(&mut decoder, &slots, &mut out)?;
            decoder.end()?;
            Ok(out)
        });
        for path in Path::available() {
            let fast = path.at_most(|| decoded(&slots, stream, symbols.len()));
            prop_assert_eq!(&fast, &slow, "{:?}", path);
        }
    }
}

#[test]
fn a_stream_costs_what_its_entropy_says() {
    let mut weights = [0; 256];
    for (power, weight) in weights.iter_mut().take(12).enumerate() {
        *weight = 1 << (11 - power);
    }
    let ((_, codes), symbols) = drawn(&weights, 1 << 17, 5);
    let total: u64 = weights.iter().sum();
    let mut counts = [0_u64; 256];
    for symbol in &symbols {
        counts[usize::from(*symbol)] += 1;
    }
    let bits: f64 = counts
        .iter()
        .zip(weights)
        .filter(|(count, _)| **count > 0)
        .map(|(count, weight)| *count as f64 * (total as f64 / weight as f64).log2())
        .sum();
    let stream = encoded(&codes, &symbols).len() - STATES_BYTES;
    let over = stream as f64 * 8.0 / bits;
    assert!((0.995..1.005).contains(&over), "{over} of the entropy");
}

#[test]
fn encode_refuses_what_has_no_code_and_what_does_not_fit() {
    let mut weights = [0; 256];
    (weights[3], weights[7]) = (5, 1);
    let ((_, codes), symbols) = drawn(&weights, 40 * LANES, 1);
    let need = encoded(&codes, &symbols).len();
    for path in Path::available() {
        let refused = |symbols: &[u8], room| {
            let len = path.at_most(|| encode(&codes, symbols, &mut vec![0; room]));
            assert_eq!(len, None, "{path:?} {room}");
        };
        for at in [0, 15, 16, 31, 32, symbols.len() - 1] {
            let mut other = symbols.clone();
            other[at] = 9;
            refused(&other, 4000);
        }
        (0..need).for_each(|room| refused(&symbols, room));
    }
    assert_eq!(encode(&codes, &symbols, &mut vec![0; need]), Some(need));
}

#[test]
fn one_symbol_alone_costs_next_to_nothing() {
    let mut weights = [0; 256];
    weights[200] = 17;
    let ((slots, codes), symbols) = drawn(&weights, 1000 * LANES, 1);
    let stream = encoded(&codes, &symbols);
    assert!(stream.len() < STATES_BYTES + 80, "{}", stream.len());
    assert_eq!(decoded(&slots, &stream, symbols.len()).unwrap(), symbols);
}

#[test]
fn decoding_ends_in_an_error_unless_it_ends_where_encoding_began() {
    let mut weights = [0; 256];
    (weights[0], weights[1], weights[2]) = (9, 5, 2);
    let ((slots, codes), symbols) = drawn(&weights, 64 * LANES, 3);
    let stream = encoded(&codes, &symbols);
    let longer = [&stream[..], &[0, 0]].concat();
    assert_eq!(
        decoded(&slots, &longer, symbols.len()),
        Err(StreamError::End)
    );
    let fewer = decoded(&slots, &stream, symbols.len() - LANES);
    assert_eq!(fewer, Err(StreamError::End));
    let more = decoded(&slots, &stream, symbols.len() + 20 * LANES);
    assert_eq!(more, Err(StreamError::Short));
    let mut other = stream;
    other[..4].copy_from_slice(&(LOW - 1).to_le_bytes());
    assert_eq!(
        decoded(&slots, &other, symbols.len()),
        Err(StreamError::State)
    );
}
