//! Bodies of the fuzz targets: what a codec makes of any stored and of any raw bytes.
//!
//! Upstairs:   `fuzz/` and `tests/tests/corpus.rs`, see `kvtier_proto::fuzzing`.
//! Downstairs: the codecs of the registry.
//!
//! An input begins with 6 bytes: level, element type, tokens (2 bytes) and width (2 bytes), each
//! taken modulo what there is; the part's bytes follow.

use std::sync::{Arc, LazyLock};

use kvtier_proto::descriptor::PartOrder;
use kvtier_proto::element::Element;
use kvtier_proto::fuzzing::Target;
use kvtier_proto::layout::PartCode;

use crate::codec::header::{Form, HEADER_BYTES, Header};
use crate::codec::ladder::Ladder;
use crate::codec::registry::Registry;
use crate::codec::{Codec, DecodeError, Restored};
use crate::shape::PartShape;

/// Targets of this package. What a part takes when it is whole comes on top of its few bytes: it is
/// decoded and encoded several times, and levels that lose something hold its values as f32, of a
/// single channel as of the 32 that are multiplied at a time.
pub const TARGETS: [Target; 3] = [
    Target::new("profile_open", profile::open, profile::seeds),
    Target::new("codec_decode", decode, decode_seeds).allocating(256 * PART_MAX),
    Target::new("codec_encode", encode, encode_seeds).allocating(256 * PART_MAX),
];

pub mod profile;

/// Largest part that is looked at. Unit: bytes.
const PART_MAX: usize = 1 << 20;
/// Bytes of an input before the part's.
const LEAD: usize = 6;
const ELEMENTS: [Element; 6] = [
    Element::Bf16,
    Element::F16,
    Element::F32,
    Element::F8E4m3,
    Element::F8E5m2,
    Element::U8,
];

/// Calls `check` with the codec and shape that the input begins with, and its rest.
fn with(data: &[u8], check: impl FnOnce(&dyn Codec, &PartShape, &[u8])) {
    let Some((lead, rest)) = data.split_first_chunk::<LEAD>() else {
        return;
    };
    let [level, element, t0, t1, w0, w1] = *lead;
    let tokens = 1 + u32::from(u16::from_le_bytes([t0, t1])) % 2048;
    let width = 1 + u32::from(u16::from_le_bytes([w0, w1])) % 4096;
    let element = ELEMENTS.iter().cycle().nth(element.into());
    let registry = &*REGISTRY;
    let codec = registry
        .iter()
        .nth(usize::from(level) % registry.iter().count());
    let shape = element.and_then(|element| shape(*element, tokens, width));
    if let (Some(codec), Some(shape)) = (codec, shape)
        && shape.raw_bytes() <= PART_MAX
        && rest.len() <= 2 * PART_MAX
    {
        check(codec, &shape, rest);
    }
}

/// All levels, those with tables included.
static REGISTRY: LazyLock<Registry> = LazyLock::new(|| {
    let mut registry = Registry::with_baselines();
    let profile = profile::fixture(LAYERS, HEADS, DIM);
    let levels = profile.and_then(|profile| Ladder::all(Arc::new(profile)));
    for level in levels.into_iter().flatten() {
        let added = registry.add(level);
        assert!(added.is_ok(), "two levels of one number");
    }
    let profile = profile::exact_fixture(LAYERS, HEADS, DIM);
    let levels = profile.and_then(|profile| Ladder::all(Arc::new(profile)));
    let exact = levels.into_iter().flatten().find(|level| level.exact());
    let added = exact.map(|exact| registry.add(exact));
    assert!(matches!(added, Some(Ok(()))), "the exact level is there");
    registry
});

/// Layers of the fixed profile, and the heads of its parts.
const LAYERS: u32 = 3;
const HEADS: u32 = 2;
const DIM: u32 = 12;

/// A part as its input says. One as wide as those of the fixed profile is one of its parts, and
/// its position, layer and order are as the tokens say.
fn shape(element: Element, tokens: u32, width: u32) -> Option<PartShape> {
    let shape = PartShape::new(element, tokens, width).ok()?;
    if width != HEADS * DIM {
        return Some(shape);
    }
    let order = match tokens % 2 {
        0 => PartOrder::TokenMajor,
        _ => PartOrder::HeadMajor,
    };
    let code = match tokens / 2 % 2 {
        0 => PartCode::K,
        _ => PartCode::V,
    };
    let shape = shape.of_layer(tokens / 4 % LAYERS, code);
    shape
        .at_position(tokens / 16 * 2)
        .with_heads(HEADS, order)
        .ok()
}

/// Parts of the fixed profile that were restored before: the same for every input.
struct Before(Vec<u8>);

impl Before {
    fn new(shape: &PartShape) -> Self {
        Self(values(shape.raw_bytes()))
    }
}

impl Restored for Before {
    fn part(&self, _layer: u32, _code: PartCode) -> Option<&[u8]> {
        Some(&self.0)
    }
}

fn decode(data: &[u8]) {
    with(data, |codec, shape, stored| {
        decode_one(codec, shape, stored);
        if let Some(mended) = mended(codec, shape, stored) {
            let out = decode_one(codec, shape, &mended);
            assert!(out.is_some(), "its checksum is right, and it is refused");
        }
    });
}

/// What is decoded is what its encoder had been given: it encodes and decodes to itself (K3).
fn decode_one(codec: &dyn Codec, shape: &PartShape, stored: &[u8]) -> Option<Vec<u8>> {
    let before = Before::new(shape);
    let mut out = vec![0xA5; shape.raw_bytes()];
    if let Err(problem) = codec.decode_after(shape, stored, &before, &mut out) {
        assert!(problem.miss().is_damage() || matches!(problem, DecodeError::TableVersion { .. }));
        assert!(!problem.to_string().is_empty());
        return None;
    }
    let mut twice = vec![0x5A; shape.raw_bytes()];
    assert!(
        codec
            .decode_after(shape, stored, &before, &mut twice)
            .is_ok()
    );
    assert!(out == twice, "two decodings differ");
    round_trip(codec, shape, &out);
    let mut short = vec![0; out.len() - 1];
    assert!(codec.decode(shape, stored, &mut short).is_err());
    Some(out)
}

/// The same stored bytes behind the header that belongs there, checksum included; `None` when the
/// stream itself is refused.
fn mended(codec: &dyn Codec, shape: &PartShape, stored: &[u8]) -> Option<Vec<u8>> {
    let (lead, body) = stored.split_first_chunk::<HEADER_BYTES>()?;
    let [t0, t1, ..] = codec.tables().to_le_bytes();
    let mut header = Header {
        level: codec.level().0,
        form: match lead.get(1)? & 1 {
            0 => Form::Stored,
            _ => Form::Coded,
        },
        table_version: u16::from_le_bytes([t0, t1]),
        raw_len: u32::try_from(shape.raw_bytes()).ok()?,
        raw_crc: 0,
    };
    let mut mended = [&header.to_bytes()[..], body].concat();
    let mut out = vec![0; shape.raw_bytes()];
    match codec.decode_after(shape, &mended, &Before::new(shape), &mut out) {
        Err(DecodeError::Checksum { got, .. }) => header.raw_crc = got,
        Ok(()) => {}
        Err(_) => return None,
    }
    mended.splice(..HEADER_BYTES, header.to_bytes());
    Some(mended)
}

fn encode(data: &[u8]) {
    with(data, |codec, shape, bytes| {
        if !codec.applies(shape) {
            let (raw, mut out) = (vec![0; shape.raw_bytes()], vec![0; 2 * PART_MAX]);
            return assert!(codec.encode(shape, &raw, &mut out).is_err());
        }
        let raw = bytes.iter().copied().cycle().take(shape.raw_bytes());
        let mut raw: Vec<u8> = raw.collect();
        raw.resize(shape.raw_bytes(), 0);
        round_trip(codec, shape, &raw);
    });
}

/// Encoded bytes stay within their bound, and are the raw bytes again when decoded (K1, K3).
fn round_trip(codec: &dyn Codec, shape: &PartShape, raw: &[u8]) {
    let max = codec.stored_bytes_max(shape);
    assert!(max <= raw.len() + HEADER_BYTES);
    let mut stored = vec![0; max];
    let before = Before::new(shape);
    let len = codec.encode_after(shape, raw, &before, &mut stored);
    let Ok(len) = len else {
        panic!("{} does not encode {shape:?}: {len:?}", codec.name());
    };
    assert!(len <= max);
    let mut back = vec![0xA5; raw.len()];
    let stored = stored.get(..len).unwrap_or_default();
    let decoded = codec.decode_after(shape, stored, &before, &mut back);
    assert!(decoded.is_ok(), "{decoded:?}");
    assert!(!codec.exact() || back == raw, "other bytes came back");
}

/// Level, element, tokens and width as an input says them.
fn lead(level: u8, element: u8, tokens: u16, width: u16) -> Vec<u8> {
    let ([t0, t1], [w0, w1]) = ((tokens - 1).to_le_bytes(), (width - 1).to_le_bytes());
    vec![level, element, t0, t1, w0, w1]
}

/// Values as activations have them: small, of either sign, with equal high bytes.
fn values(len: usize) -> Vec<u8> {
    let value = |at: usize| {
        let [low, ..] = (at.wrapping_mul(0x9E37_79B9) >> 7).to_le_bytes();
        if at.is_multiple_of(2) {
            low
        } else {
            0x3C + (low & 3)
        }
    };
    (0..len).map(value).collect()
}

/// Such values of any element type: those of 4 bytes are halves with two bytes of zero before.
fn floats(element: Element, len: usize) -> Vec<u8> {
    match element {
        Element::F32 => {
            let halves = values(len / 2);
            let halves = halves.as_chunks::<2>().0.iter();
            halves.flat_map(|[low, high]| [0, 0, *low, *high]).collect()
        }
        _ => values(len),
    }
}

fn encode_seeds() -> Vec<Vec<u8>> {
    let of = |level, element, tokens, width, bytes: &[u8]| {
        [lead(level, element, tokens, width), bytes.to_vec()].concat()
    };
    vec![
        of(0, 0, 16, 8, &[1, 2, 3]),
        of(1, 0, 64, 32, &values(256)),
        of(1, 1, 33, 70, &values(256)),
        of(1, 0, 2048, 72, &values(5000)),
        of(8, 0, 64, 32, &values(256)),
        of(10, 0, 100, 24, &values(256)),
        of(10, 1, 171, 24, &values(999)),
        of(8, 5, 1, 100, b"opaque bytes"),
        of(8, 2, 16, 512, &values(1000)),
        of(8, 3, 2048, 256, &[]),
        of(9, 1, 33, 70, &values(256)),
        of(11, 2, 33, 70, &values(256)),
        of(13, 0, 33, 70, &values(256)),
        of(15, 0, 33, 96, &values(256)),
        of(3, 0, 100, 24, &values(256)),
        of(4, 1, 42, 24, &values(256)),
        of(6, 0, 170, 24, &values(256)),
        of(7, 2, 171, 24, &values(256)),
        of(9, 0, 64, 32, &values(256)),
        of(9, 1, 33, 70, &values(2001)),
        of(9, 0, 2048, 72, &values(5000)),
        of(11, 1, 33, 70, &values(256)),
        of(12, 2, 33, 70, &values(256)),
        of(14, 0, 33, 70, &values(256)),
        of(16, 0, 33, 96, &values(256)),
        of(17, 0, 64, 24, &values(999)),
        of(18, 1, 33, 70, &values(999)),
    ]
}

fn decode_seeds() -> Vec<Vec<u8>> {
    let mut seeds = Vec::new();
    for (level, codec) in (0..).zip(REGISTRY.iter()) {
        for (at, element) in (0..).zip(ELEMENTS) {
            // Levels with tables have two seeds: a part of the first and one of the last layer.
            let (tokens, width) = match at {
                1 => (170, 24),
                _ => (96, 24),
            };
            let Some(shape) = shape(element, tokens.into(), width.into()) else {
                continue;
            };
            if !codec.applies(&shape) {
                continue;
            }
            let mut stored = vec![0; codec.stored_bytes_max(&shape)];
            let raw = floats(element, shape.raw_bytes());
            let before = Before::new(&shape);
            let len = codec
                .encode_after(&shape, &raw, &before, &mut stored)
                .unwrap_or_default();
            stored.truncate(len);
            seeds.push([lead(level, at, tokens, width), stored].concat());
        }
    }
    // More than one chunk, of two planes each.
    seeds.push([lead(8, 0, 2048, 72), vec![0; 40]].concat());
    seeds
}

#[cfg(test)]
mod tests {
    use super::*;

    // Goal: the bodies keep their promises on their seeds, and on seeds that were damaged.
    // Method: each byte of the first 400 is changed in turn.
    #[test]
    fn targets_hold_for_their_seeds_and_for_damaged_ones() {
        for target in TARGETS {
            let seeds = (target.seeds)();
            for seed in &seeds {
                assert!(!seed.is_empty(), "{}", target.name);
                (target.run)(seed);
                for at in (0..seed.len().min(400)).step_by(7) {
                    let mut other = seed.clone();
                    if let Some(byte) = other.get_mut(at) {
                        *byte ^= 1 << (at % 8);
                    }
                    (target.run)(&other);
                }
            }
        }
    }
}
