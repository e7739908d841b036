//! Floats of 16 bits as cells: which one of a row of equal ones, and which number of it.
//!
//! Upstairs:   [`super::exact`] codes cells about a prediction; calibration chooses their size.
//! Downstairs: [`crate::rans`]; [`super::tables`] has what both kinds of tables share.
//!
//! The line of real numbers is cut into cells of a power of two: cell `t` holds the magnitudes
//! from `t` steps up to `t + 1`, and each sign has its own cells. In every cell but the first of a
//! sign all floats have one exponent, so they are equally far apart: their number is a power of
//! two, and which one it is takes whole bits that are worth no more thought. The first cell holds
//! all smaller exponents. With `m` bits of mantissa a value is
//!
//! | what                | symbol         | bits                                               |
//! |---------------------|----------------|----------------------------------------------------|
//! | cell `t` of 1 and up| distance       | the `m - floor(log2 t)` last of the mantissa, if any |
//! | first cell          | distance       | a 1 for each halving, a 0, the mantissa            |
//! | the same, tiny or 0 | distance       | fifteen 1, then 15 bits as they are                |
//! | all others          | [`ESCAPE`]     | 16 bits as they are                                |
//!
//! The distance is the cell's number less that of the predicted cell, where the cells of a
//! negative sign count down from -1. Tables of probabilities are logistic, in quarters of an
//! octave of their deviation.
//!
//! Invariants kept here
//!   X1  Every 16 bits come back as they were, what is no number included.
//!   T1  Every machine finds the same cell of a prediction, and has the same tables.
//!
//! Not here on purpose: no table of a part's own.

use std::sync::LazyLock;

use kvtier_proto::element::Element;

use super::tables::{costs, weight};
use crate::rans::{Codes, Frequencies, Slots};

/// Tables of probabilities.
pub(crate) const TABLES: usize = 25;
/// Symbol of what has no cell near the predicted one.
pub(crate) const ESCAPE: i8 = i8::MIN;
/// Cells that are told apart: numbers beyond have none.
const CELLS_MAX: f32 = 2_097_152.0;
/// Halvings of the first cell that are told apart.
const HALVINGS: u32 = 15;
/// Least probability of a symbol that has a code, as a power of two.
const LEAST: i32 = -13;

/// Deviation of a table. Unit: cells.
pub(crate) fn sigma(table: usize) -> f64 {
    2_f64.powf(table as f64 / 4.0 - 2.0)
}

/// One table.
#[derive(Debug)]
pub(crate) struct Table {
    pub(crate) codes: Codes,
    pub(crate) slots: Slots,
    /// Largest distance; the least is as far below 0.
    pub(crate) reach: i32,
    /// What each symbol costs, by byte. Unit: bits.
    pub(crate) bits: [f32; 256],
}

static ALL: LazyLock<[Table; TABLES]> = LazyLock::new(|| std::array::from_fn(make));

/// The tables, by rising deviation.
pub(crate) fn all() -> &'static [Table; TABLES] {
    &ALL
}

fn make(index: usize) -> Table {
    let (weights, reach) = weights(sigma(index));
    let frequencies = Frequencies::in_proportion(&weights)
        .unwrap_or_else(|| unreachable!("0 has weight, and less than 2^52"));
    Table {
        codes: Codes::new(&frequencies),
        slots: Slots::new(&frequencies),
        reach,
        bits: costs(&frequencies),
    }
}

/// Probabilities of the symbols, in parts of 2^44, and the largest distance.
fn weights(sigma: f64) -> ([u64; 256], i32) {
    let s = sigma * 3_f64.sqrt() / std::f64::consts::PI;
    // A prediction lies anywhere in its cell: the sum of a logistic and an even distribution.
    let soft = |x: f64| {
        let tail = libm::log1p(libm::exp(-x.abs() / s)) * s;
        x.max(0.0) + tail
    };
    let mut weights = [0; 256];
    let mut reach = 0;
    for distance in 0..=127_i8 {
        let x = f64::from(distance);
        let probability = soft(x + 1.0) - 2.0 * soft(x) + soft(x - 1.0);
        if probability < 2_f64.powi(LEAST) && distance > 1 {
            break;
        }
        reach = i32::from(distance);
        for symbol in [distance, -distance] {
            if let Some(place) = weights.get_mut(usize::from(symbol.to_le_bytes()[0])) {
                *place = weight(probability);
            }
        }
    }
    if let Some(place) = weights.get_mut(usize::from(ESCAPE.to_le_bytes()[0])) {
        *place = weight(2_f64.powi(LEAST));
    }
    (weights, reach)
}

/// How the 16 bits of an element type lie.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Form {
    /// Bits of the mantissa.
    mantissa: u32,
    /// Exponent of 1.
    bias: i32,
}

/// A value about a prediction.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Coded {
    /// Distance, or [`ESCAPE`].
    pub(crate) symbol: i8,
    pub(crate) bits: u32,
    /// How many bits, at most 30.
    pub(crate) len: u32,
}

impl Form {
    /// That of an element type; `None` where it has other bits.
    pub(crate) const fn of(element: Element) -> Option<Self> {
        match element {
            Element::Bf16 => Some(Self {
                mantissa: 7,
                bias: 127,
            }),
            Element::F16 => Some(Self {
                mantissa: 10,
                bias: 15,
            }),
            _ => None,
        }
    }

    /// The number that 16 bits stand for; some large one for what is none.
    #[inline(always)]
    pub(crate) fn number(self, bits: u16) -> f32 {
        let sign = u32::from(bits >> 15) << 31;
        let magnitude = u32::from(bits & 0x7fff) << (23 - self.mantissa);
        // Exact: a power of two, and also where the exponent is 0.
        let scale = f32::from_bits((254 - self.bias.cast_unsigned()) << 23);
        f32::from_bits(sign | magnitude) * scale
    }

    /// The cell of a prediction. Values are the lower ends of what they stand for, so that half a
    /// unit in their last place belongs to the prediction.
    #[inline(always)]
    pub(crate) fn cell(self, about: f32, per_step: f32) -> i32 {
        let power = f32::from_bits(about.to_bits() & 0x7f80_0000);
        let half = power * f32::from_bits((126 - self.mantissa) << 23);
        let steps = (about.abs() + half) * per_step;
        // Also where it is no number.
        let steps = if steps < CELLS_MAX { steps } else { CELLS_MAX };
        #[expect(clippy::cast_possible_truncation, reason = "0 to 2^21")]
        let cell = steps as i32;
        if about < 0.0 { !cell } else { cell }
    }

    /// A value about a predicted cell.
    pub(crate) fn code(self, bits: u16, cell: i32, (step, reach): (i32, i32)) -> Coded {
        let escape = Coded {
            symbol: ESCAPE,
            bits: bits.into(),
            len: 16,
        };
        let m = self.mantissa;
        let magnitude = u32::from(bits & 0x7fff);
        let (exponent, mantissa) = (magnitude >> m, magnitude & ((1 << m) - 1));
        let steps = self.number(bits).abs() * power(-step);
        if exponent == 0x7fff >> m || steps.partial_cmp(&CELLS_MAX).is_none_or(|o| o.is_ge()) {
            return escape;
        }
        #[expect(
            clippy::cast_possible_truncation,
            clippy::cast_sign_loss,
            reason = "0 to 2^21"
        )]
        let t = steps as u32;
        let own = if bits >> 15 == 1 { !t } else { t }.cast_signed();
        let distance = own - cell;
        let Ok(symbol) = i8::try_from(distance) else {
            return escape;
        };
        if distance.abs() > reach {
            return escape;
        }
        if let Some(log) = t.checked_ilog2() {
            let len = m.saturating_sub(log);
            let bits = mantissa & ((1 << len) - 1);
            let coded = Coded { symbol, bits, len };
            return if exponent == 0 { escape } else { coded };
        }
        let halvings = self.bias + step - 1 - exponent.cast_signed();
        let halvings = u32::try_from(halvings).ok();
        let near = halvings.filter(|halvings| *halvings < HALVINGS && exponent > 0);
        match near {
            Some(halvings) => Coded {
                symbol,
                bits: ((1 << halvings) - 1) | (mantissa << (halvings + 1)),
                len: halvings + 1 + m,
            },
            None => Coded {
                symbol,
                bits: ((1 << HALVINGS) - 1) | (magnitude << HALVINGS),
                len: HALVINGS + 15,
            },
        }
    }

    /// Sign and first bits of a value of a cell that is no first one, and how many bits follow.
    #[inline(always)]
    pub(crate) fn of_cell(self, cell: i32, step: i32) -> (u32, u32) {
        let m = self.mantissa.cast_signed();
        let t = cell ^ (cell >> 31);
        let bits = (t as f32).to_bits().cast_signed();
        let len = m - ((bits >> 23) - 127);
        let magnitude = (bits >> (23 - m)) + ((step + self.bias - 127) << m);
        let sign = (cell >> 31) & 0x8000;
        let whole = (sign | magnitude & 0x7fff).cast_unsigned();
        (whole, if len > 0 { len } else { 0 }.cast_unsigned())
    }

    /// Sign and magnitude of a value of a first cell, and its length, from the bits that follow.
    pub(crate) fn of_first(self, cell: i32, step: i32, bits: u64) -> (u32, u32) {
        let m = self.mantissa;
        let sign = (cell >> 31).cast_unsigned() & 0x8000;
        let halvings = bits.trailing_ones();
        if halvings >= HALVINGS {
            let magnitude = low(bits >> HALVINGS, 15);
            return (sign | magnitude, HALVINGS + 15);
        }
        let exponent = (self.bias + step - 1).wrapping_sub_unsigned(halvings);
        let mantissa = low(bits >> (halvings + 1), m);
        let magnitude = exponent.cast_unsigned() << m | mantissa;
        (sign | magnitude & 0x7fff, halvings + 1 + m)
    }
}

/// The low bits.
#[inline(always)]
pub(crate) fn low(bits: u64, len: u32) -> u32 {
    #[expect(clippy::cast_possible_truncation, reason = "low bits are meant")]
    let bits = bits as u32;
    bits & ((1 << len) - 1)
}

/// 2 to the power of -126 to 127.
pub(crate) const fn power(exponent: i32) -> f32 {
    f32::from_bits((exponent + 127).cast_unsigned() << 23)
}

#[cfg(test)]
mod tests;
