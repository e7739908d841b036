//! Frequencies of symbols, and the table that coder and decoder make of them.
//!
//! Upstairs:   [`super`].
//! Downstairs: nothing.

use super::{LOW, SCALE, SCALE_BITS, SCALE_U32};

/// Symbols that are left out together where none of them and of those behind them has a weight.
const USED: usize = 64;

/// How often each symbol is expected: parts of [`SCALE`] (R1).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Frequencies([u16; 256]);

impl Frequencies {
    /// Frequencies in proportion to `weights`: what was counted, or products of probabilities.
    /// Every symbol of positive weight gets a code, and one that has none at all beside it gets
    /// company. `None` when no weight is above 0, or their sum is 2^52 or more.
    ///
    /// A symbol of less than two parts gets one. The others share the rest by rounding sums of
    /// weights, so that the result needs neither sorting nor floating point.
    pub fn in_proportion(weights: &[u64; 256]) -> Option<Self> {
        let scale = SCALE as u64;
        // Alphabets are of all symbols or of the first few.
        let used = weights
            .chunks(USED)
            .rposition(|weights| weights.iter().any(|weight| *weight > 0))?;
        let weights = weights.get(..USED * (used + 1))?;
        let total = weights.iter().try_fold(0_u64, |sum, weight| {
            sum.checked_add(*weight).filter(|sum| *sum < 1 << 52)
        })?;
        let is_rare = |weight: u64| weight * scale < 2 * total;
        let (mut rare, mut common, mut others) = (0, 0_u64, 0);
        for weight in weights.iter().filter(|weight| **weight > 0) {
            if is_rare(*weight) {
                rare += 1;
            } else {
                common += weight;
                others += 1;
            }
        }
        let lonely = rare + others == 1;
        let budget = scale - rare - u64::from(lonely);
        let (mut sum, mut given) = (0, 0);
        let mut frequencies = [0; 256];
        for (frequency, weight) in frequencies.iter_mut().zip(weights) {
            *frequency = match *weight {
                0 => 0,
                weight if is_rare(weight) => 1,
                weight => {
                    sum += weight;
                    let before = std::mem::replace(&mut given, sum * budget / common);
                    u16::try_from(given - before).unwrap_or(u16::MAX)
                }
            };
        }
        if lonely {
            let company = frequencies.iter_mut().find(|frequency| **frequency == 0);
            *company? = 1;
        }
        Self::new(frequencies)
    }

    /// Checks R1: a sum of [`SCALE`], and no symbol that has all of it.
    pub fn new(frequencies: [u16; 256]) -> Option<Self> {
        let sum: u32 = frequencies.iter().copied().map(u32::from).sum();
        let most = frequencies.iter().copied().max().unwrap_or(0);
        (sum == SCALE_U32 && usize::from(most) < SCALE).then_some(Self(frequencies))
    }

    /// The frequency of each symbol.
    pub const fn get(&self) -> &[u16; 256] {
        &self.0
    }
}

/// What decoding looks up, by slot: one part of [`SCALE`] each.
#[derive(Debug, Clone)]
pub struct Slots(
    /// Frequency, symbol << 12, offset in its symbol << 20.
    pub(crate) Box<[u32; SCALE]>,
);

impl Slots {
    /// The slots of these frequencies.
    pub fn new(frequencies: &Frequencies) -> Self {
        let mut slots = Self(zeros());
        slots.fill(frequencies);
        slots
    }

    /// Becomes the slots of these frequencies.
    pub fn fill(&mut self, frequencies: &Frequencies) {
        crate::simd::fill_slots(frequencies, &mut self.0);
    }
}

/// Slots that are written at a time.
const RUN: usize = 16;

impl Frequencies {
    /// [`Slots::fill`], in the registers of whoever calls it.
    ///
    /// Symbols have some dozens of slots. They are written in whole runs, the last of which
    /// reaches into the next symbol's: that comes after it.
    #[inline(always)]
    pub(crate) fn fill(&self, slots: &mut [u32; SCALE]) {
        let mut offsets = [0; RUN];
        for (offset, number) in offsets.iter_mut().zip(0_u32..) {
            *offset = number << 20;
        }
        let mut at = 0;
        for (symbol, frequency) in (0_u32..).zip(self.0) {
            if at == SCALE {
                break;
            }
            let mut first = u32::from(frequency) | symbol << 12;
            let end = at + usize::from(frequency);
            for start in (at..end).step_by(RUN) {
                // An offset is below SCALE, up to where nobody looks: nothing is carried.
                let next = offsets.map(|offset| first.wrapping_add(offset));
                let rest = slots.get_mut(start..).unwrap_or_default();
                match rest.first_chunk_mut::<RUN>() {
                    Some(run) => *run = next,
                    None => rest
                        .iter_mut()
                        .zip(next)
                        .for_each(|(slot, next)| *slot = next),
                }
                first = first.wrapping_add(16 << 20);
            }
            at = end;
        }
    }
}

/// A table on the heap that was never on the stack.
fn zeros() -> Box<[u32; SCALE]> {
    let zeros = vec![0; SCALE].into_boxed_slice();
    zeros.try_into().unwrap_or_else(|_| Box::new([0; SCALE]))
}

/// What encoding looks up, by symbol. With a state below 2^31, `state / frequency` is the upper
/// half of `state * reciprocal`, shifted right: Alverson's reciprocal (1991), exact for 31 bits.
#[derive(Debug, Clone)]
pub struct Codes {
    pub(crate) reciprocal: [u32; 256],
    /// Frequency, first slot << 12, shift << 24. 0 for a symbol without a code.
    ///
    /// A frequency of 1 has no reciprocal of 32 bits. With the largest there is, the quotient
    /// is one too small, and the new state too small by `SCALE - 1`.
    pub(crate) shares: [u32; 256],
}

impl Codes {
    /// The codes of these frequencies.
    pub fn new(frequencies: &Frequencies) -> Self {
        let (mut reciprocal, mut shares) = ([0; 256], [0; 256]);
        let mut first = 0;
        let codes = reciprocal.iter_mut().zip(&mut shares);
        for ((reciprocal, share), frequency) in codes.zip(frequencies.0.map(u32::from)) {
            let mut shift = 0;
            *reciprocal = match frequency {
                0 => continue,
                1 => u32::MAX,
                _ => {
                    shift = frequency.next_power_of_two().trailing_zeros() - 1;
                    let power = 1_u64 << (shift + 32);
                    u32::try_from(power.div_ceil(u64::from(frequency))).unwrap_or(u32::MAX)
                }
            };
            *share = frequency | first << 12 | shift << 24;
            first += frequency;
        }
        Self { reciprocal, shares }
    }
}

/// First state that is too large to take a symbol of such a frequency: it gives a word away.
pub(crate) const fn too_large(frequency: u32) -> u32 {
    ((LOW >> SCALE_BITS) << 16) * frequency
}
