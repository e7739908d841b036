//! What integers cost: the scale index of each coefficient and the token predictor of a part.
//!
//! Upstairs:   the steps of [`super`].
//! Downstairs: [`Costs`], the code lengths of the ladder's shared tables.
//!
//! A scale index is the one whose table codes the calibration's own integers in the fewest bits,
//! so outliers count by what they cost and not by their square. A predictor is judged the same
//! way, with the best indices for what it leaves.
//!
//! Invariants kept here
//!   T1  The predictor chosen is never longer on the calibration data than the mean alone, and
//!       one that looks at other tokens is chosen only when it saves [`GAIN_MIN`]: it makes
//!       decoding serial.
//!
//! Not here on purpose: no steps and no quality. A predictor works on integers, so it changes the
//! rate only.

use super::costs::{Costs, MAGNITUDES};
use crate::profile::TokenPredictor;

/// Part of the bits that a look at other tokens must save.
pub(super) const GAIN_MIN: f64 = 0.01;
/// Tokens between two anchors, as in the paper (CacheGen, arXiv:2310.07240).
pub(super) const ANCHOR_TOKENS: u16 = 10;
/// Denominator of a coefficient's weight of the token before.
pub(super) const RHO_ONE: f64 = 64.0;

/// How a part is coded at a step.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Choice {
    pub(super) predictor: TokenPredictor,
    /// One table a coefficient.
    pub(super) scales: Vec<u8>,
    /// Length of all tokens of the calibration. Unit: bits.
    pub(super) bits: f64,
    /// The same with the mean alone.
    pub(super) mean_bits: f64,
}

/// Integers of a part: one run of tokens a coefficient.
#[derive(Debug, Clone)]
pub(super) struct Integers {
    /// Coefficient after coefficient, token after token.
    values: Vec<i32>,
    tokens: usize,
    /// Where blocks begin: nothing is predicted across. Ascending, the first is 0.
    starts: Vec<usize>,
}

impl Integers {
    /// Of `values`, coefficient after coefficient, which begin a block at each of `starts`.
    pub(super) fn new(values: Vec<i32>, tokens: usize, starts: Vec<usize>) -> Self {
        Self {
            values,
            tokens,
            starts,
        }
    }

    fn coefficients(&self) -> impl Iterator<Item = &[i32]> {
        self.values.chunks_exact(self.tokens.max(1))
    }

    /// The blocks of one coefficient.
    fn blocks<'a>(&'a self, run: &'a [i32]) -> impl Iterator<Item = &'a [i32]> {
        let ends = self.starts.iter().skip(1).copied().chain([run.len()]);
        let spans = self.starts.iter().copied().zip(ends);
        spans.filter_map(|(from, to)| run.get(from..to))
    }

    /// The shortest way to code them (T1).
    pub(super) fn choose(&self, costs: &Costs) -> Choice {
        let (mut mean, mut anchor, mut first) =
            (Tally::default(), Tally::default(), Tally::default());
        let mut rhos = Vec::new();
        for run in self.coefficients() {
            let plain = costs.best(&self.histogram(run, |_, value, _| value));
            mean.add(plain);
            anchor.add(costs.best(&self.histogram(run, |at, value, block| {
                let group = at - at % usize::from(ANCHOR_TOKENS);
                match at == group {
                    true => value,
                    false => value - block.get(group).copied().unwrap_or(0),
                }
            })));
            let rho = self.correlation(run);
            let next = match rho {
                0 => plain,
                _ => costs.best(&self.histogram(run, |at, value, block| {
                    let before = at.checked_sub(1).and_then(|at| block.get(at));
                    value - predicted(rho, before.copied().unwrap_or(0))
                })),
            };
            // A weight that does not pay is left out, so `first` is never longer than `mean`.
            let pays = next.1 < plain.1;
            rhos.push(if pays { rho } else { 0 });
            first.add(if pays { next } else { plain });
        }
        let mean_bits = mean.bits;
        let limit = mean_bits * (1.0 - GAIN_MIN);
        let (predictor, tally) = if first.bits.min(anchor.bits) > limit {
            (TokenPredictor::Mean, mean)
        } else if first.bits <= anchor.bits {
            (TokenPredictor::First { rho: rhos }, first)
        } else {
            (
                TokenPredictor::Anchor {
                    group: ANCHOR_TOKENS,
                },
                anchor,
            )
        };
        Choice {
            predictor,
            scales: tally.scales,
            bits: tally.bits,
            mean_bits,
        }
    }

    /// Counts what `left` leaves of each integer: it is given the index in the block, the integer
    /// and the block.
    fn histogram(&self, run: &[i32], left: impl Fn(usize, i32, &[i32]) -> i32) -> Histogram {
        let mut histogram = Histogram::default();
        for block in self.blocks(run) {
            for (at, value) in block.iter().enumerate() {
                histogram.add(left(at, *value, block));
            }
        }
        histogram
    }

    /// Weight of the token before that leaves least. Unit: 1/64.
    fn correlation(&self, run: &[i32]) -> i8 {
        let (mut both, mut square) = (0.0, 0.0);
        for block in self.blocks(run) {
            for pair in block.windows(2) {
                if let &[before, value] = pair {
                    both += f64::from(before) * f64::from(value);
                    square += f64::from(before) * f64::from(before);
                }
            }
        }
        match square > 0.0 {
            true => whole(RHO_ONE * both / square),
            false => 0,
        }
    }
}

/// What the token before predicts of an integer, as the codec computes it.
pub(super) const fn predicted(rho: i8, before: i32) -> i32 {
    let product = rho as i32 * before;
    (product + 32 * product.signum()) / 64
}

#[expect(clippy::cast_possible_truncation, reason = "clamped to the type first")]
fn whole(value: f64) -> i8 {
    value.round().clamp(-127.0, 127.0) as i8
}

#[derive(Debug, Default)]
struct Tally {
    scales: Vec<u8>,
    bits: f64,
}

impl Tally {
    fn add(&mut self, (scale, bits): (u8, f64)) {
        self.scales.push(scale);
        self.bits += bits;
    }
}

/// How often each magnitude occurs in one coefficient.
#[derive(Debug, Clone)]
pub(super) struct Histogram {
    pub(super) counts: Vec<u32>,
    /// Magnitudes from [`MAGNITUDES`] on.
    pub(super) large: Vec<u32>,
}

impl Default for Histogram {
    fn default() -> Self {
        Self {
            counts: vec![0; MAGNITUDES],
            large: Vec::new(),
        }
    }
}

impl Histogram {
    pub(super) fn add(&mut self, value: i32) {
        let magnitude = value.unsigned_abs();
        match self.counts.get_mut(magnitude as usize) {
            Some(count) => *count += 1,
            None => self.large.push(magnitude),
        }
    }

    /// How often each of these occurs.
    pub(super) fn occurring(&self) -> impl Iterator<Item = (u32, u32)> {
        let small = (0..).zip(self.counts.iter().copied());
        let small = small.filter(|(_, count)| *count > 0);
        small.chain(self.large.iter().map(|magnitude| (*magnitude, 1)))
    }
}

#[cfg(test)]
mod tests;
