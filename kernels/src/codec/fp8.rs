//! Level fp8: every value as an 8-bit float, e4m3 without infinities, at scale 1. A level to
//! compare with, for it is what engines offer.
//!
//! Upstairs:   [`super::registry`].
//! Downstairs: [`super::quant::floats`].
//!
//! After the [header](super::header) comes a byte a value: sign, 4 bits of exponent (bias 7),
//! 3 of mantissa; the nearest there is, ties to even (OCP 8-bit floating point, 2023).
//!
//! Invariants kept here
//!   Q2  A part with a value above 448, the largest there is, or none at all (NaN) is stored as it
//!       is: nothing is cut off.

use kvtier_proto::Level;

use super::quant::floats;
use super::raw::exact_length;
use super::{Codec, DecodeError, EncodeError, envelope};
use crate::shape::PartShape;

/// Largest value.
const MAX: f32 = 448.0;

/// The level.
#[derive(Debug, Clone, Copy, Default)]
pub struct Fp8;

impl Codec for Fp8 {
    fn level(&self) -> Level {
        Level::FP8
    }

    fn applies(&self, shape: &PartShape) -> bool {
        floats::is_float(shape.element())
    }

    fn encode(&self, shape: &PartShape, raw: &[u8], out: &mut [u8]) -> Result<usize, EncodeError> {
        let code = |body: &mut [u8]| {
            let values = floats::read(shape.element(), raw);
            if values
                .iter()
                .any(|value| value.is_nan() || value.abs() > MAX)
            {
                return None;
            }
            for (byte, value) in body.iter_mut().zip(&values) {
                *byte = to_bits(*value);
            }
            Some(values.len())
        };
        let decode = |body: &[u8], out: &mut [u8]| decode_part(shape, body, out);
        envelope::seal_lossy(self, shape, (raw, out), code, decode)
    }

    fn decode(&self, shape: &PartShape, stored: &[u8], out: &mut [u8]) -> Result<(), DecodeError> {
        envelope::open(self, shape, (stored, out), |body, out| {
            decode_part(shape, body, out)
        })
    }

    fn error_in(&self, shape: &PartShape, stored: &[u8]) -> Result<f32, DecodeError> {
        envelope::coded(self, shape, stored, |body| {
            let largest = body.iter().map(|bits| of_bits(*bits).abs());
            // Half a step of 3 bits of mantissa, or of the least numbers.
            largest.fold(0.0, f32::max) / 16.0 + 2_f32.powi(-10)
        })
    }
}

fn decode_part(shape: &PartShape, body: &[u8], out: &mut [u8]) -> Result<u32, DecodeError> {
    exact_length(body, out.len() / shape.element().bytes())?;
    let values: Vec<f32> = body.iter().map(|bits| of_bits(*bits)).collect();
    floats::write(shape.element(), &values, out);
    Ok(crc32fast::hash(out))
}

/// The nearest e4m3 of a value of at most 448.
#[expect(clippy::cast_possible_truncation, reason = "at most 16 steps")]
fn to_bits(value: f32) -> u8 {
    let sign = if value.is_sign_negative() { 0x80 } else { 0 };
    let size = value.abs();
    // A step is 2^-9 below 2^-6, and an eighth of the power of two elsewhere.
    let exponent = (i32::try_from(size.to_bits() >> 23).unwrap_or(0) - 127).max(-6);
    let steps = (size * 2_f32.powi(3 - exponent)).round_ties_even();
    // 8 to 16 steps are the mantissa; 16 carry into the exponent by themselves.
    let bits = (exponent + 6) * 8 + steps as i32;
    sign | u8::try_from(bits.clamp(0, 0x7e)).unwrap_or(0)
}

/// The value of an e4m3; 0 for the two that are no number.
fn of_bits(bits: u8) -> f32 {
    let (exponent, mantissa) = (i32::from(bits >> 3 & 15), f32::from(bits & 7));
    let size = match exponent {
        15 if bits & 7 == 7 => 0.0,
        0 => mantissa * 2_f32.powi(-9),
        _ => (1.0 + mantissa / 8.0) * 2_f32.powi(exponent - 7),
    };
    if bits & 0x80 == 0 { size } else { -size }
}

#[cfg(test)]
mod tests;
