//! Elements as `f32`, and back to the nearest.
//!
//! Upstairs:   the lossy levels.
//! Downstairs: the `half` crate.
//!
//! Reading is exact for every element type that [`is_float`] names.

use half::{bf16 as Bf16, f16 as F16};
use kvtier_proto::element::Element;

/// True for what lossy levels take: floats of 16 and 32 bits.
pub const fn is_float(element: Element) -> bool {
    matches!(element, Element::Bf16 | Element::F16 | Element::F32)
}

/// The values of a part; none when its elements are no floats.
pub fn read(element: Element, raw: &[u8]) -> Vec<f32> {
    let halves = raw.as_chunks::<2>().0.iter();
    match element {
        Element::Bf16 => halves.map(|b| bf16(u16::from_le_bytes(*b))).collect(),
        Element::F16 => halves.map(|b| F16::from_le_bytes(*b).to_f32()).collect(),
        Element::F32 => {
            let words = raw.as_chunks::<4>().0.iter();
            words.map(|bytes| f32::from_le_bytes(*bytes)).collect()
        }
        _ => Vec::new(),
    }
}

/// Writes values as the nearest of their element type, ties to even.
pub fn write(element: Element, values: &[f32], raw: &mut [u8]) {
    let halves = raw.as_chunks_mut::<2>().0;
    match element {
        Element::Bf16 => {
            for (bytes, value) in halves.iter_mut().zip(values) {
                *bytes = Bf16::from_f32(*value).to_le_bytes();
            }
        }
        Element::F16 => {
            for (bytes, value) in halves.iter_mut().zip(values) {
                *bytes = F16::from_f32(*value).to_le_bytes();
            }
        }
        Element::F32 => {
            for (bytes, value) in raw.as_chunks_mut::<4>().0.iter_mut().zip(values) {
                *bytes = value.to_le_bytes();
            }
        }
        _ => {}
    }
}

/// The value of a bf16.
pub const fn bf16(bits: u16) -> f32 {
    f32::from_bits((bits as u32) << 16)
}

/// The bits of a number that is a bf16.
pub fn bf16_bits(number: f32) -> u16 {
    Bf16::from_f32(number).to_bits()
}

/// The least bf16 that is no less than `number`; infinity when there is none.
pub fn bf16_above(number: f32) -> f32 {
    let near = Bf16::from_f32(number).to_f32();
    if near >= number || near.is_nan() {
        return near;
    }
    let bits = near.to_bits();
    f32::from_bits(match bits << 1 {
        0 => 1 << 16,
        _ if near > 0.0 => bits.saturating_add(1 << 16),
        _ => bits - (1 << 16),
    })
}

/// The greatest bf16 that is no more than `number`; minus infinity when there is none.
pub fn bf16_below(number: f32) -> f32 {
    -bf16_above(-number)
}
