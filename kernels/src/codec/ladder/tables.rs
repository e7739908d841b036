//! The probabilities that all coefficients share: logistic tables in half octaves.
//!
//! Upstairs:   [`super`] codes with them; calibration chooses among them.
//! Downstairs: [`crate::rans`].
//!
//! A rounded coefficient `q` of scale index `i` is coded as follows. Up to the last table, `q` is
//! the symbol. Above, `k` low bits are stored as they are: with `p = q + 2^(k-1)`, the symbol is
//! `p >> k`, and the bits are those below. A symbol is a byte that holds a signed number. What is
//! no symbol of the table is an escape: 6 bytes beside the stream, where it stands as 0.
//!
//! Invariants kept here
//!   T1  Every machine has the same tables: they are made with `libm`, not with what the platform
//!       calls an exponential, and a test freezes their hash.
//!
//! Not here on purpose: no table of a part's own. Sixteen hundred bits a table are worth more.

use std::collections::BTreeMap;
use std::sync::LazyLock;

use crate::profile::scales::{DEAD, SCALE_MAX, nearest, sigma};
use crate::rans::{Codes, Frequencies, SCALE, Slots};

/// Scale indices that have a table of their own.
pub const TABLES: usize = 13;
/// What an escape takes. Unit: bits.
pub const ESCAPE_BITS: u32 = 48;
/// Least probability of a symbol that has a code, as a power of two.
const LEAST: i32 = -16;

/// One table.
#[derive(Debug)]
pub(crate) struct Table {
    pub(crate) codes: Codes,
    pub(crate) slots: Slots,
    /// Largest symbol; the least is as far below 0.
    pub(crate) reach: i16,
    /// What each symbol costs, by byte. Unit: bits.
    bits: [f32; 256],
}

static ALL: LazyLock<[Table; TABLES]> = LazyLock::new(|| std::array::from_fn(make));

/// The tables, by scale index.
pub(crate) fn all() -> &'static [Table; TABLES] {
    &ALL
}

/// The table of a scale index, and the low bits that are stored as they are; `None` for [`DEAD`].
pub(crate) fn of(index: u8) -> Option<(usize, u32)> {
    let last = TABLES - 1;
    match usize::from(index) {
        _ if index > SCALE_MAX => None,
        table if table <= last => Some((table, 0)),
        more => {
            let low = (more - last).div_ceil(2);
            Some((more - 2 * low, u32::try_from(low).unwrap_or(0)))
        }
    }
}

fn make(index: usize) -> Table {
    let (weights, reach) = weights(sigma(u8::try_from(index).unwrap_or(DEAD)));
    let frequencies = Frequencies::in_proportion(&weights)
        .unwrap_or_else(|| unreachable!("0 has more than half an ulp of the weight"));
    Table {
        codes: Codes::new(&frequencies),
        slots: Slots::new(&frequencies),
        reach,
        bits: costs(&frequencies),
    }
}

/// What each symbol costs, by byte. Unit: bits.
pub(super) fn costs(frequencies: &Frequencies) -> [f32; 256] {
    frequencies.get().map(|frequency| match frequency {
        0 => f32::INFINITY,
        frequency => (SCALE as f32 / f32::from(frequency)).log2(),
    })
}

/// A probability in parts of 2^44, at least one.
pub(super) fn weight(probability: f64) -> u64 {
    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "a probability times 2^44"
    )]
    let weight = (probability * 2_f64.powi(44)) as u64;
    weight.max(1)
}

/// Probabilities of the symbols, in parts of 2^44, and the largest of them.
fn weights(sigma: f64) -> ([u64; 256], i16) {
    // The logistic distribution of this deviation.
    let s = sigma * 3_f64.sqrt() / std::f64::consts::PI;
    let above = |x: f64| 1.0 / (1.0 + libm::exp(x / s));
    let mut weights = [0; 256];
    let mut reach = 0;
    for symbol in 0..=127_i8 {
        let x = f64::from(symbol);
        let probability = above(x - 0.5) - above(x + 0.5);
        // One step to either side is always possible: no table has a single symbol.
        if probability < 2_f64.powi(LEAST) && symbol > 1 {
            break;
        }
        reach = i16::from(symbol);
        let weight = weight(probability);
        for symbol in [symbol, -symbol] {
            if let Some(place) = weights.get_mut(usize::from(symbol.to_le_bytes()[0])) {
                *place = weight;
            }
        }
    }
    (weights, reach)
}

/// What a value costs with a scale index. Unit: bits.
pub fn bits(index: u8, value: i32) -> f64 {
    let escape = f64::from(ESCAPE_BITS);
    let Some((table, low)) = of(index) else {
        return if value == 0 { 0.0 } else { escape };
    };
    let half = if low > 0 { 1 << (low - 1) } else { 0 };
    let symbol = (value + half) >> low;
    let Some(table) = all().get(table) else {
        return escape;
    };
    let cost = |symbol: i8| {
        let at = usize::from(symbol.to_le_bytes()[0]);
        f64::from(table.bits.get(at).copied().unwrap_or(f32::INFINITY)) + f64::from(low)
    };
    match i8::try_from(symbol) {
        Ok(symbol) if i16::from(symbol).abs() <= table.reach => cost(symbol),
        _ => cost(0) + escape,
    }
}

/// The scale index with which these rounded values take the fewest bits, and how many.
///
/// ```
/// use kvtier_kernels::profile::scales::{choose, DEAD};
///
/// let (index, bits) = choose([0, 1, -1, 0, 2, 0, -1, 1]);
/// assert_eq!(index, 6);
/// assert!((15.0..17.0).contains(&bits));
/// assert_eq!(choose([0; 9]), (DEAD, 0.0));
/// ```
pub fn choose(values: impl IntoIterator<Item = i32>) -> (u8, f64) {
    let mut counts = BTreeMap::<i32, u64>::new();
    for value in values {
        *counts.entry(value).or_default() += 1;
    }
    let total: u64 = counts.values().sum();
    let squares: f64 = counts
        .iter()
        .map(|(value, count)| f64::from(*value).powi(2) * *count as f64)
        .sum();
    let near = nearest((squares / total.max(1) as f64).sqrt());
    let around = near.saturating_sub(5)..=near.saturating_add(2).min(SCALE_MAX);
    let cost = |index: u8| -> f64 {
        let each = counts.iter();
        each.map(|(value, count)| bits(index, *value) * *count as f64)
            .sum()
    };
    let mut best = (DEAD, cost(DEAD));
    for index in around {
        let bits = cost(index);
        if bits < best.1 {
            best = (index, bits);
        }
    }
    best
}

#[cfg(test)]
mod tests {
    use super::*;

    // T1. The hash changes only with a new version of the levels.
    #[test]
    fn tables_are_those_of_every_other_machine() {
        let mut hash = blake3::Hasher::new();
        for (index, table) in all().iter().enumerate() {
            let (weights, reach) = weights(sigma(u8::try_from(index).unwrap()));
            let frequencies = Frequencies::in_proportion(&weights).unwrap();
            assert_eq!(table.reach, reach);
            hash.update(&reach.to_le_bytes());
            for frequency in frequencies.get() {
                hash.update(&frequency.to_le_bytes());
            }
        }
        assert_eq!(&hash.finalize().to_hex()[..16], "e780b2bf3ae53c7e");
    }

    #[test]
    fn every_scale_index_has_a_table_and_its_low_bits() {
        assert_eq!(of(0), Some((0, 0)));
        assert_eq!(of(12), Some((12, 0)));
        assert_eq!(of(13), Some((11, 1)));
        assert_eq!(of(14), Some((12, 1)));
        assert_eq!(of(SCALE_MAX), Some((12, 8)));
        assert_eq!((of(SCALE_MAX + 1), of(DEAD)), (None, None));
    }

    // Goal: the cost of tables is near what a distribution of that deviation has to cost.
    #[test]
    fn tables_cost_little_more_than_the_entropy() {
        for index in 0..=SCALE_MAX {
            let s = sigma(index) * 3_f64.sqrt() / std::f64::consts::PI;
            let above = |x: f64| 1.0 / (1.0 + (x / s).exp());
            let (mut entropy, mut cost) = (0.0, 0.0);
            for value in -40_000..=40_000_i32 {
                let x = f64::from(value.abs());
                let p = above(x - 0.5) - above(x + 0.5);
                if p > 0.0 {
                    entropy -= p * p.log2();
                    cost += p * bits(index, value);
                }
            }
            assert!(
                cost < entropy * 1.01 + 0.005,
                "{index}: {cost} for {entropy}"
            );
        }
    }
}
