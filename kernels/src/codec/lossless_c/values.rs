//! 16-bit floats taken apart for level 9: sign, exponent and the first bit of the mantissa as one
//! symbol, the other bits as they are.
//!
//! Upstairs:   [`super`].
//! Downstairs: [`super::super::halves`] has windows of exponents; [`crate::simd`] does the same
//!             faster.
//!
//! A symbol is the exponent's nibble (as at level lossless), 16 for a negative value, and 32 for
//! a mantissa of a half or more. Of a group of 64 values the rest is
//!
//! - bf16, 48 bytes: byte `i` holds 6 bits of mantissa of value `i`, and above them two bits of
//!   the mantissa of value `48 + i % 16`: its lowest for `i < 16`, the next for `i < 32`, ....
//! - fp16, 72 bytes: byte `i` holds the low 8 bits of value `i`; then bit `i` of a word of 64 bits
//!   is mantissa bit 8 of value `i`.

use super::super::halves::{GROUP, Kind, Window};
use crate::simd;

/// Bit of a symbol: the value is negative.
pub(crate) const SIGN: u8 = 16;
/// Bit of a symbol: the mantissa is a half or more.
pub(crate) const HALF: u8 = 32;
/// Symbols that there are.
pub(crate) const SYMBOLS: usize = 64;
/// Bytes of the values of a group.
pub(crate) const GROUP_BYTES: usize = 2 * GROUP;
/// Values of a group of bf16 that have a byte of their own.
const OWN: usize = 48;

/// Bytes of a group beside its symbols.
pub(crate) const fn rest_bytes(kind: Kind) -> usize {
    match kind {
        Kind::Bf16 => OWN,
        Kind::F16 => GROUP + 8,
    }
}

/// The symbols of values, by their upper 10 bits: all that a symbol depends on lies there.
pub(crate) struct Symbols {
    kind: Kind,
    window: Window,
    table: Box<[u8; 1024]>,
}

impl Symbols {
    pub(crate) fn new(kind: Kind, window: Window) -> Self {
        let mut table = Box::new([0; 1024]);
        for (upper, symbol) in (0_u16..).zip(table.iter_mut()) {
            let value = upper << 6;
            let half = match kind {
                Kind::Bf16 => value >> 6 & 1,
                Kind::F16 => value >> 9 & 1,
            };
            *symbol = window.nibble(kind.exponent(value))
                | if value >> 15 == 1 { SIGN } else { 0 }
                | if half == 1 { HALF } else { 0 };
        }
        Self {
            kind,
            window,
            table,
        }
    }

    /// The symbol of each value.
    pub(crate) fn of(&self, raw: &[u8], symbols: &mut [u8]) {
        let done = simd::symbols_signed((self.kind, self.window), raw, symbols);
        let values = raw.as_chunks::<2>().0.iter().zip(symbols);
        for (value, symbol) in values.skip(done) {
            let at = usize::from(u16::from_le_bytes(*value) >> 6);
            *symbol = self.table.get(at).copied().unwrap_or(0);
        }
    }

    /// The rest of groups, the last one of which may be shorter: as if zeros followed.
    pub(crate) fn rest(&self, raw: &[u8], rest: &mut [u8]) {
        let done = simd::rest_signed(self.kind, raw, rest);
        let rests = rest.chunks_exact_mut(rest_bytes(self.kind));
        for (group, rest) in raw.chunks(GROUP_BYTES).zip(rests).skip(done) {
            self.rest_of(group, rest);
        }
    }

    fn rest_of(&self, raw: &[u8], rest: &mut [u8]) {
        let mut group = [0; GROUP_BYTES];
        for (byte, raw) in group.iter_mut().zip(raw) {
            *byte = *raw;
        }
        let values = group.as_chunks::<2>().0;
        match self.kind {
            Kind::Bf16 => {
                let (own, shared) = values.split_at(OWN);
                for (row, (rest, own)) in (0..).zip(rest.chunks_mut(16).zip(own.chunks_exact(16))) {
                    for ((byte, [own, _]), [shared, _]) in rest.iter_mut().zip(own).zip(shared) {
                        *byte = own & 63 | (shared >> (2 * row) & 3) << 6;
                    }
                }
            }
            Kind::F16 => {
                let mut word = 0_u64;
                for (at, (byte, [low, high])) in rest.iter_mut().zip(values).enumerate() {
                    *byte = *low;
                    word |= u64::from(high & 1) << at;
                }
                if let Some(bytes) = rest.last_chunk_mut() {
                    *bytes = word.to_le_bytes();
                }
            }
        }
    }
}

/// Puts a group together. Where a nibble is that of an escape the exponent is 0.
pub(crate) fn join(
    (kind, window): (Kind, Window),
    symbols: &[u8; GROUP],
    rest: &[u8],
    raw: &mut [u8; GROUP_BYTES],
) {
    let exponents = window.exponents();
    let mut low = [0; GROUP];
    let mut word = 0;
    match kind {
        Kind::Bf16 => {
            let (own, shared) = low.split_at_mut(OWN);
            for (row, (own, rest)) in (0..).zip(own.chunks_mut(16).zip(rest.chunks_exact(16))) {
                for ((own, shared), byte) in own.iter_mut().zip(&mut *shared).zip(rest) {
                    *own = byte & 63;
                    *shared |= (byte >> 6) << (2 * row);
                }
            }
        }
        Kind::F16 => {
            low.iter_mut()
                .zip(rest)
                .for_each(|(low, byte)| *low = *byte);
            word = rest
                .last_chunk()
                .map_or(0, |bytes| u64::from_le_bytes(*bytes));
        }
    }
    let values = raw.as_chunks_mut::<2>().0.iter_mut();
    for (at, ((value, symbol), low)) in values.zip(symbols).zip(low).enumerate() {
        let exponent = exponents
            .get(usize::from(symbol & 15))
            .copied()
            .unwrap_or(0);
        let sign = if symbol & SIGN == 0 { 0 } else { 0x80 };
        let half = u8::from(symbol & HALF != 0);
        *value = match kind {
            Kind::Bf16 => [exponent << 7 | half << 6 | low, sign | exponent >> 1],
            Kind::F16 => {
                let eight = u8::from(word >> at & 1 == 1);
                [low, sign | (exponent & 31) << 2 | half << 1 | eight]
            }
        };
    }
}
