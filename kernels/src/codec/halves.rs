//! 16-bit floats taken apart: the exponent of each as half a symbol, the other bits as they are.
//!
//! Upstairs:   [`super::lossless`].
//! Downstairs: nothing; [`crate::simd`] does the same faster.
//!
//! Values go by groups of [`GROUP`]. Of value `i` of a group, and `64 - 32` on of its partner:
//!
//! - symbol `i` holds the nibble of value `i` in its low, of value `i + 32` in its high half;
//! - byte `i` of the low plane: bf16 the sign and 7 bits of mantissa, fp16 the low 8 bits of
//!   mantissa;
//! - fp16 only, three words of 64 bits a group: bit `i` of the first is the sign of value `i`, of
//!   the second its mantissa bit 9, of the third bit 8.
//!
//! A nibble is the exponent's place in a [`Window`] of [`WINDOW`] neighbours; [`ZERO`] for
//! exponent 0, which zeros have; [`ESCAPE`] for any other, which is kept apart.
//!
//! Not here on purpose: no entropy coding, and no odd end: lengths are multiples of a group.

use kvtier_proto::element::Element;

/// Values of a group.
pub const GROUP: usize = 64;
/// Symbols of a group.
pub const GROUP_SYMBOLS: usize = GROUP / 2;
/// Exponents of a window.
pub const WINDOW: u8 = 14;
/// Nibble of exponent 0.
pub const ZERO: u8 = 14;
/// Nibble of an exponent outside the window.
pub const ESCAPE: u8 = 15;
/// Bytes a group that the three bit planes of fp16 take.
const BITS: usize = 3 * 8;

/// A float of 16 bits.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// 1 sign, 8 exponent, 7 mantissa.
    Bf16,
    /// 1 sign, 5 exponent, 10 mantissa.
    F16,
}

/// Exponents `base..base + WINDOW`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Window {
    /// The least of them.
    pub base: u8,
}

/// The pieces of some groups, to read.
#[derive(Debug, Clone, Copy)]
pub struct Planes<'a> {
    /// [`GROUP_SYMBOLS`] a group.
    pub symbols: &'a [u8],
    /// [`Kind::plane_bytes`] a group: the low plane, then for fp16 the bit planes.
    pub rest: &'a [u8],
}

/// The pieces of some groups, to write.
#[derive(Debug)]
pub struct PlanesMut<'a> {
    /// [`GROUP_SYMBOLS`] a group.
    pub symbols: &'a mut [u8],
    /// [`Kind::plane_bytes`] a group.
    pub rest: &'a mut [u8],
}

impl Kind {
    /// The kind of an element type; `None` for all that are no 16-bit floats.
    pub const fn of(element: Element) -> Option<Self> {
        match element {
            Element::Bf16 => Some(Self::Bf16),
            Element::F16 => Some(Self::F16),
            _ => None,
        }
    }

    /// Bytes a group beside its symbols.
    pub const fn plane_bytes(self) -> usize {
        match self {
            Self::Bf16 => GROUP,
            Self::F16 => GROUP + BITS,
        }
    }

    /// The exponent of a value.
    pub const fn exponent(self, value: u16) -> u8 {
        match self {
            Self::Bf16 => (value >> 7).to_le_bytes()[0],
            Self::F16 => (value >> 10).to_le_bytes()[0] & 31,
        }
    }

    /// A value without its exponent, and that exponent in its place.
    pub const fn with_exponent(self, value: u16, exponent: u8) -> u16 {
        match self {
            Self::Bf16 => value & 0x807f | (exponent as u16) << 7,
            Self::F16 => value & 0x83ff | (exponent as u16 & 31) << 10,
        }
    }

    /// Largest exponent.
    pub const fn exponent_max(self) -> u8 {
        match self {
            Self::Bf16 => 255,
            Self::F16 => 31,
        }
    }
}

impl Window {
    /// The window that holds the most of what was counted; exponent 0 has its own nibble.
    pub fn of(counts: &[u64; 256]) -> Self {
        let mut best = (0, 1);
        // Exponent 0 stays out: the first window begins at 1.
        let (mut inside, mut base) = (0, 1);
        for end in 1..counts.len() {
            inside += counts.get(end).copied().unwrap_or(0);
            if end > usize::from(WINDOW) {
                inside -= counts.get(end - usize::from(WINDOW)).copied().unwrap_or(0);
                base += 1;
            }
            if inside > best.0 {
                best = (inside, base);
            }
        }
        Self { base: best.1 }
    }

    /// The nibble of an exponent.
    pub const fn nibble(self, exponent: u8) -> u8 {
        let place = exponent.wrapping_sub(self.base);
        match exponent {
            0 => ZERO,
            _ if place < WINDOW => place,
            _ => ESCAPE,
        }
    }

    /// The exponents of all nibbles; 0 for what is kept apart.
    pub fn exponents(self) -> [u8; 16] {
        std::array::from_fn(|nibble| match u8::try_from(nibble) {
            Ok(place) if place < WINDOW => self.base.wrapping_add(place),
            _ => 0,
        })
    }
}

/// Takes `raw` apart, whole groups.
pub fn split(kind: Kind, window: Window, raw: &[u8], planes: PlanesMut<'_>) {
    let groups = raw.as_chunks::<{ 2 * GROUP }>().0;
    let symbols = planes.symbols.as_chunks_mut::<GROUP_SYMBOLS>().0;
    let rests = planes.rest.chunks_exact_mut(kind.plane_bytes());
    for ((group, symbols), rest) in groups.iter().zip(symbols).zip(rests) {
        let values = group.as_chunks::<2>().0;
        let (low, bits) = rest.split_at_mut(GROUP);
        let mut words = [0_u64; 3];
        symbols.fill(0);
        for (index, (bytes, low)) in values.iter().zip(low).enumerate() {
            let value = u16::from_le_bytes(*bytes);
            let nibble = window.nibble(kind.exponent(value));
            if let Some(symbol) = symbols.get_mut(index % GROUP_SYMBOLS) {
                *symbol |= nibble << (4 * (index / GROUP_SYMBOLS));
            }
            let [least, most] = *bytes;
            *low = match kind {
                Kind::Bf16 => most & 0x80 | least & 0x7f,
                Kind::F16 => least,
            };
            for (word, bit) in words.iter_mut().zip([7, 1, 0]) {
                *word |= u64::from(most >> bit & 1) << index;
            }
        }
        for (bytes, word) in bits.as_chunks_mut::<8>().0.iter_mut().zip(words) {
            *bytes = word.to_le_bytes();
        }
    }
}

/// Puts whole groups together. Where a nibble is [`ESCAPE`] the exponent is 0.
pub fn merge(kind: Kind, window: Window, planes: Planes<'_>, raw: &mut [u8]) {
    let exponents = window.exponents();
    let groups = raw.as_chunks_mut::<{ 2 * GROUP }>().0;
    let symbols = planes.symbols.as_chunks::<GROUP_SYMBOLS>().0;
    let rests = planes.rest.chunks_exact(kind.plane_bytes());
    for ((group, symbols), rest) in groups.iter_mut().zip(symbols).zip(rests) {
        let (low, bits) = rest.split_at(GROUP);
        let mut words = [0_u64; 3];
        for (word, bytes) in words.iter_mut().zip(bits.as_chunks::<8>().0) {
            *word = u64::from_le_bytes(*bytes);
        }
        let values = group.as_chunks_mut::<2>().0;
        for (index, (bytes, low)) in values.iter_mut().zip(low).enumerate() {
            let symbol = symbols.get(index % GROUP_SYMBOLS).copied().unwrap_or(0);
            let nibble = symbol >> (4 * (index / GROUP_SYMBOLS)) & 15;
            let exponent = exponents.get(usize::from(nibble)).copied().unwrap_or(0);
            let rest = match kind {
                Kind::Bf16 => u16::from_le_bytes([low & 0x7f, low & 0x80]),
                Kind::F16 => {
                    let bit = |word: u64, to: u32| u8::from(word >> index & 1 != 0) << to;
                    let [sign, nine, eight] = words;
                    u16::from_le_bytes([*low, bit(sign, 7) | bit(nine, 1) | bit(eight, 0)])
                }
            };
            *bytes = kind.with_exponent(rest, exponent).to_le_bytes();
        }
    }
}

#[cfg(test)]
mod tests;
