//! Levels on a sample of a real model's KV: exact, and worth its time.
//!
//! Upstairs:   nothing.
//! Downstairs: `kernels/tests/data`, whose README says where the sample comes from.
//!
//! Not here on purpose: no speed. That is the suite `codecs` of the benchmarks, which also takes
//! whole KV files.
#![allow(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    reason = "a panic is the failure report"
)]

use kvtier_kernels::simd::Path;
use kvtier_kernels::{PartShape, Registry};
use kvtier_proto::Level;
use kvtier_proto::element::Element;

const SAMPLE: &[u8] = include_bytes!("data/prose-kv.bf16");
const TOKENS: u32 = 128;
const WIDTH: u32 = 3 * 64;

/// Encoded size of the whole sample, part by part; every part is decoded and compared.
fn stored_bytes(codec: &str, shape: PartShape) -> usize {
    let codecs = Registry::builtin();
    let codec = codecs.by_name(codec).unwrap();
    let mut stored = vec![0; codec.stored_bytes_max(&shape)];
    let mut back = vec![0; shape.raw_bytes()];
    let mut total = 0;
    for raw in SAMPLE.chunks_exact(shape.raw_bytes()) {
        let len = codec.encode(&shape, raw, &mut stored).unwrap();
        codec.decode(&shape, &stored[..len], &mut back).unwrap();
        assert!(back == raw);
        total += len;
    }
    total
}

#[test]
fn zstd_shrinks_real_bf16_kv_to_two_thirds_and_returns_every_bit() {
    let shape = PartShape::new(Element::Bf16, TOKENS, WIDTH).unwrap();
    let ratio = SAMPLE.len() as f64 / stored_bytes("zstd", shape) as f64;
    assert!(ratio > 1.45, "{ratio}");
}

// The exponent plane is where the gain comes from: without the split there is less of it.
#[test]
fn zstd_gains_more_from_real_kv_by_its_planes_than_from_its_bytes() {
    let floats = PartShape::new(Element::Bf16, TOKENS, WIDTH).unwrap();
    let bytes = PartShape::new(Element::U8, TOKENS, 2 * WIDTH).unwrap();
    assert!(stored_bytes("zstd", floats) * 10 < stored_bytes("zstd", bytes) * 9);
}

// Other element types of the same size must not be confused with what the bytes are.
#[test]
fn zstd_returns_every_bit_of_real_kv_whatever_element_it_is_told() {
    for (element, width) in [(Element::F16, WIDTH), (Element::F32, WIDTH / 2)] {
        let shape = PartShape::new(element, TOKENS, width).unwrap();
        assert!(stored_bytes("zstd", shape) < SAMPLE.len());
    }
}

#[test]
fn raw_stores_real_kv_as_it_is() {
    let shape = PartShape::new(Element::Bf16, TOKENS, WIDTH).unwrap();
    assert_eq!(stored_bytes("raw", shape), SAMPLE.len());
    assert_eq!(Level::RAW.0, 0);
}

// Goal: V2 on real data. Method: every level encodes and decodes the sample on every path that
// this processor has.
#[test]
fn every_path_makes_the_same_bytes_of_real_kv_at_every_level() {
    let codecs = Registry::with_baselines();
    for element in [Element::Bf16, Element::F16] {
        let shape = PartShape::new(element, TOKENS, WIDTH).unwrap();
        for codec in codecs.iter().filter(|codec| codec.applies(&shape)) {
            for raw in SAMPLE.chunks_exact(shape.raw_bytes()) {
                let made = Path::available().map(|path| {
                    path.at_most(|| {
                        let mut stored = vec![0; codec.stored_bytes_max(&shape)];
                        let len = codec.encode(&shape, raw, &mut stored).unwrap();
                        stored.truncate(len);
                        let mut back = vec![0; shape.raw_bytes()];
                        codec.decode(&shape, &stored, &mut back).unwrap();
                        (stored, back)
                    })
                });
                let made: Vec<_> = made.collect();
                assert!(made.iter().all(|one| *one == made[0]), "{}", codec.name());
            }
        }
    }
}
