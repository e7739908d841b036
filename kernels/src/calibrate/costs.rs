//! Code lengths of the ladder's shared tables, looked up.
//!
//! Upstairs:   [`super::rate`].
//! Downstairs: [`crate::profile::scales`] says what a value costs.
//!
//! Not here on purpose: no table of a part's own, and no rounding to whole words: a stream's few
//! bytes beside its symbols do not depend on what is chosen here.

use super::rate::Histogram;
use crate::profile::scales::{DEAD, SCALE_MAX, bits};

/// Magnitudes whose cost is looked up; larger ones are asked for one by one.
pub(super) const MAGNITUDES: usize = 512;

/// Lengths by scale index and magnitude. Unit: bits.
#[derive(Debug)]
pub(super) struct Costs {
    tables: Vec<Vec<f64>>,
}

impl Costs {
    pub(super) fn new() -> Self {
        let table = |index: u8| {
            let magnitudes = (0_u32..).take(MAGNITUDES);
            magnitudes
                .map(|magnitude| either(index, magnitude))
                .collect()
        };
        Self {
            tables: (0..=SCALE_MAX).map(table).collect(),
        }
    }

    /// The scale index that codes these in the fewest bits, and how many.
    pub(super) fn best(&self, histogram: &Histogram) -> (u8, f64) {
        let all = |cost: &dyn Fn(u32) -> f64| -> f64 {
            let each = histogram.occurring();
            each.map(|(magnitude, count)| f64::from(count) * cost(magnitude))
                .sum()
        };
        let mut best = (DEAD, all(&|magnitude| either(DEAD, magnitude)));
        for (index, table) in (0..).zip(&self.tables) {
            let bits = all(&|magnitude| {
                let known = table.get(magnitude as usize).copied();
                known.unwrap_or_else(|| either(index, magnitude))
            });
            if bits < best.1 {
                best = (index, bits);
            }
        }
        best
    }
}

/// Cost of a magnitude whose sign is either.
fn either(index: u8, magnitude: u32) -> f64 {
    // A magnitude that large is an escape whatever its last bits are.
    let value = i32::try_from(magnitude)
        .unwrap_or(i32::MAX / 2)
        .min(i32::MAX / 2);
    (bits(index, value) + bits(index, -value)) / 2.0
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::profile::scales::choose;

    // Goal: looking up answers what asking for each value would.
    #[test]
    fn best_is_what_asking_for_every_value_would_choose() {
        let costs = Costs::new();
        for spread in [1, 3, 40, 900, 70_000] {
            let values: Vec<i32> = (0..501)
                .map(|at| (at * 37 % 101 - 50) * spread / 20)
                .collect();
            let mut histogram = Histogram::default();
            values.iter().for_each(|value| histogram.add(*value));
            let (index, bits) = costs.best(&histogram);
            let (want, want_bits) = choose(values);
            // The tables are not quite symmetric.
            assert!(bits <= 1.001 * want_bits, "{spread}: {bits} {want_bits}");
            assert!(
                index == want || bits < 1.001 * want_bits,
                "{spread}: {index} {want}"
            );
        }
    }
}
