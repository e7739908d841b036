//! Group-wise quantisers that others publish: levels to compare with, and for who knows them.
//!
//! Upstairs:   [`Registry::with_baselines`](crate::Registry::with_baselines).
//! Downstairs: [`floats`] reads and writes elements.
//!
//! | level          | groups                                | after                              |
//! |----------------|---------------------------------------|------------------------------------|
//! | int8           | 64 values of a token, about 0         | FlexGen (arXiv:2303.06865), 8 bits |
//! | int4           | 64 values of a token                  | FlexGen                            |
//! | kivi4, kivi2   | K: 32 tokens of a channel; else 32    | KIVI (arXiv:2402.02750), without   |
//! |                | values of a token                     | its window of exact tokens         |
//! | hadamard4      | as int4, after a Hadamard transform   | QuaRot (arXiv:2404.00456)          |
//! |                | of each head                          |                                    |
//!
//! After the [header](super::header) come the groups in the order of their first values. A group
//! is its scale and, unless it is about 0, its least value, both bf16; then its values' codes,
//! packed from the low bits of a byte on. A group that the part's end cuts short has fewer values.
//!
//! Invariants kept here
//!   Q1  An error is at most what [`Codec::error_in`] says: the scale is rounded up and the least
//!       value down, so that no value lies outside of what the codes reach.
//!   Q2  A part with a value that is not finite, or too large for its scale, is stored as it is.
//!
//! Not here on purpose: no tables and no entropy coding; nothing is tuned.

use kvtier_proto::Level;
use kvtier_proto::layout::PartCode;

use super::{Codec, DecodeError, EncodeError, envelope};
use crate::shape::PartShape;

pub mod floats;
mod groups;

use groups::{Axis, Groups, View};

/// A group-wise quantiser.
#[derive(Debug, Clone, Copy)]
pub struct Quantiser {
    level: Level,
    /// Bits of a value's code.
    bits: u32,
    /// Values of a group.
    group: usize,
    /// Along what the groups of K lie; all others lie along tokens' values.
    k_axis: Axis,
    /// Codes stand for values about 0, not from a least value on.
    symmetric: bool,
    /// Heads are rotated before.
    hadamard: bool,
}

impl Quantiser {
    const fn new(level: Level, bits: u32, group: usize) -> Self {
        Self {
            level,
            bits,
            group,
            k_axis: Axis::Row,
            symmetric: false,
            hadamard: false,
        }
    }

    /// All of them, by rising level.
    pub fn all() -> [Self; 5] {
        let kivi = |level, bits| Self {
            k_axis: Axis::Channel,
            ..Self::new(level, bits, 32)
        };
        [
            Self {
                symmetric: true,
                ..Self::new(Level::INT8, 8, 64)
            },
            Self::new(Level::INT4, 4, 64),
            kivi(Level::KIVI4, 4),
            kivi(Level::KIVI2, 2),
            Self {
                hadamard: true,
                ..Self::new(Level::HADAMARD4, 4, 64)
            },
        ]
    }

    /// Steps from the least to the greatest code.
    const fn steps(&self) -> u32 {
        match self.symmetric {
            // One code less, so that 0 is one.
            true => (1 << self.bits) - 2,
            false => (1 << self.bits) - 1,
        }
    }

    fn groups(&self, shape: &PartShape) -> Groups {
        let rows = View::of(shape);
        let axis = match shape.code() {
            PartCode::K => self.k_axis,
            _ => Axis::Row,
        };
        Groups::new(rows, axis, self.group)
    }

    /// Bytes of a group's numbers before its codes.
    const fn lead(&self) -> usize {
        if self.symmetric { 2 } else { 4 }
    }

    /// Values that a Hadamard transform takes at a time; 1 where there is none.
    fn rotated(&self, shape: &PartShape) -> usize {
        let dim = (shape.width() / shape.heads()) as usize;
        match self.hadamard {
            // The largest power of two that divides a head.
            true => 1 << dim.trailing_zeros(),
            false => 1,
        }
    }

    fn encode_part(&self, shape: &PartShape, raw: &[u8], out: &mut [u8]) -> Option<usize> {
        let mut values = floats::read(shape.element(), raw);
        if !values.iter().all(|value| value.is_finite()) {
            return None;
        }
        hadamard(&mut values, self.rotated(shape));
        let mut room = out;
        let whole = room.len();
        let mut group = Vec::with_capacity(self.group);
        let groups = self.groups(shape);
        for at in groups.iter() {
            group.clear();
            group.extend(groups.values(at).filter_map(|at| values.get(at).copied()));
            let (lead, rest) = room.split_at_mut_checked(self.lead())?;
            let len = (group.len() * self.bits as usize).div_ceil(8);
            let (codes, rest) = rest.split_at_mut_checked(len)?;
            self.encode_group(&group, lead, codes)?;
            room = rest;
        }
        let len = whole - room.len();
        (len < raw.len()).then_some(len)
    }

    /// `None` when a number of the group does not fit (Q2).
    fn encode_group(&self, values: &[f32], lead: &mut [u8], codes: &mut [u8]) -> Option<()> {
        let least = values.iter().copied().fold(f32::INFINITY, f32::min);
        let most = values.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        let (origin, reach) = match self.symmetric {
            true => (0.0, 2.0 * most.max(-least)),
            false => {
                let origin = floats::bf16_below(least);
                (origin, most - origin)
            }
        };
        let scale = floats::bf16_above(reach / self.steps() as f32);
        if !scale.is_finite() || !origin.is_finite() {
            return None;
        }
        let numbers = [scale, origin].map(|number| floats::bf16_bits(number).to_le_bytes());
        for (bytes, number) in lead.as_chunks_mut::<2>().0.iter_mut().zip(numbers) {
            *bytes = number;
        }
        let zero = self.zero();
        codes.fill(0);
        for (at, value) in values.iter().enumerate() {
            let code = match scale > 0.0 {
                true => ((value - origin) / scale + zero).round(),
                false => zero,
            };
            #[expect(
                clippy::cast_possible_truncation,
                clippy::cast_sign_loss,
                reason = "clamped"
            )]
            let code = code.clamp(0.0, self.steps() as f32) as u8;
            let bit = at * self.bits as usize;
            *codes.get_mut(bit / 8)? |= code << (bit % 8);
        }
        Some(())
    }

    /// Code of the origin.
    const fn zero(&self) -> f32 {
        match self.symmetric {
            true => (self.steps() / 2) as f32,
            false => 0.0,
        }
    }

    fn decode_part(
        &self,
        shape: &PartShape,
        stored: &[u8],
        out: &mut [u8],
    ) -> Result<u32, DecodeError> {
        let mut values = vec![0.0; shape.raw_bytes() / shape.element().bytes()];
        let truncated = |have: usize| DecodeError::Truncated {
            need: have + 1,
            have: stored.len(),
        };
        let mut left = stored;
        let groups = self.groups(shape);
        for at in groups.iter() {
            let have = stored.len() - left.len();
            let count = groups.values(at).count();
            let (lead, rest) = left
                .split_at_checked(self.lead())
                .ok_or_else(|| truncated(have))?;
            let len = (count * self.bits as usize).div_ceil(8);
            let (codes, rest) = rest.split_at_checked(len).ok_or_else(|| truncated(have))?;
            left = rest;
            let mut numbers = [0.0; 2];
            for (number, bytes) in numbers.iter_mut().zip(lead.as_chunks::<2>().0) {
                *number = floats::bf16(u16::from_le_bytes(*bytes));
            }
            let ([scale, origin], zero) = (numbers, self.zero());
            let mask = u8::MAX >> (8 - self.bits);
            for (index, at) in groups.values(at).enumerate() {
                let bit = index * self.bits as usize;
                let byte = codes.get(bit / 8).copied().unwrap_or_default();
                let code = f32::from(byte >> (bit % 8) & mask);
                if let Some(value) = values.get_mut(at) {
                    *value = (code - zero).mul_add(scale, origin);
                }
            }
        }
        super::raw::exact_length(left, 0)?;
        hadamard(&mut values, self.rotated(shape));
        floats::write(shape.element(), &values, out);
        Ok(crc32fast::hash(out))
    }
}

/// Multiplies each run of `len` values, a power of two, with the normalised Hadamard matrix of
/// that size, which is its own inverse.
fn hadamard(values: &mut [f32], len: usize) {
    let norm = 1.0 / (len as f32).sqrt();
    for run in values.chunks_exact_mut(len) {
        let mut half = 1;
        while half < len {
            for pair in run.chunks_exact_mut(2 * half) {
                let (a, b) = pair.split_at_mut(half);
                for (a, b) in a.iter_mut().zip(b) {
                    (*a, *b) = (*a + *b, *a - *b);
                }
            }
            half *= 2;
        }
        if len > 1 {
            run.iter_mut().for_each(|value| *value *= norm);
        }
    }
}

impl Codec for Quantiser {
    fn level(&self) -> Level {
        self.level
    }

    fn applies(&self, shape: &PartShape) -> bool {
        floats::is_float(shape.element())
    }

    fn encode(&self, shape: &PartShape, raw: &[u8], out: &mut [u8]) -> Result<usize, EncodeError> {
        let decode = |body: &[u8], out: &mut [u8]| self.decode_part(shape, body, out);
        let code = |body: &mut [u8]| self.encode_part(shape, raw, body);
        envelope::seal_lossy(self, shape, (raw, out), code, decode)
    }

    fn decode(&self, shape: &PartShape, stored: &[u8], out: &mut [u8]) -> Result<(), DecodeError> {
        envelope::open(self, shape, (stored, out), |body, out| {
            self.decode_part(shape, body, out)
        })
    }

    fn error_in(&self, shape: &PartShape, stored: &[u8]) -> Result<f32, DecodeError> {
        envelope::coded(self, shape, stored, |body| {
            let groups = self.groups(shape);
            let (mut left, mut largest) = (body, 0.0);
            for at in groups.iter() {
                let [a, b] = *left.first_chunk().unwrap_or(&[0; 2]);
                largest = f32::max(largest, floats::bf16(u16::from_le_bytes([a, b])));
                let codes = (groups.values(at).count() * self.bits as usize).div_ceil(8);
                left = left.get(self.lead() + codes..).unwrap_or_default();
            }
            // Errors of all that were rotated together may add up.
            largest / 2.0 * (self.rotated(shape) as f32).sqrt()
        })
    }
}

#[cfg(test)]
mod tests;
