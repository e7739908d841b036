//! What a block of channels is about, for a group of tokens side by side: the one computation that
//! coding and decoding share.
//!
//! Upstairs:   [`super::part`].
//! Downstairs: [`super::kit`]; [`crate::simd::ladder`] takes the widest registers.
//!
//! Channels are worked on two at a time. Each is predicted from everything before its block by an
//! exact integer product, and within the block from the errors of the rows before. What RoPE turns
//! is predicted before RoPE and the prediction is turned, so that the stored bits stay as they are.
//!
//! Invariants kept here
//!   T1  Each product and each sum is rounded on its own, in this order, on every path.
//!   X3  What is predicted from is held within bounds first: whatever bits a part has, every
//!       machine predicts the same from them.

use super::kit::{Block, PAIRS};
use crate::codec::ladder::input::whole;
use crate::codec::ladder::product::word;
use crate::profile::exact::{INPUT_MAX, WITHIN};
use crate::simd::ladder::Work;

/// Tokens of a group: the lanes of the entropy coder.
pub(super) const GROUP: usize = crate::rans::LANES;
/// One number of each token of a group.
pub(super) type Lanes<T> = [T; GROUP];
/// A block's numbers.
pub(super) type Rows<T> = [Lanes<T>; WITHIN];
/// Largest magnitude that predicts others.
const LARGEST: f32 = 1e15;

/// Codes or decodes one channel of a group. Implementations are inlined into each path.
pub(super) trait Channel {
    /// Takes what the values of a row are about, and gives the values.
    fn row(&mut self, block: &Block, row: usize, about: &Lanes<f32>) -> Option<Lanes<f32>>;
}

/// One block of a group.
pub(super) struct Predict<'a, C> {
    pub(super) block: &'a Block,
    /// What the rows are about, as far as the product says.
    pub(super) base: &'a Rows<f32>,
    /// Cosines and sines of each pair of RoPE.
    pub(super) angles: &'a [[Lanes<f32>; 2]],
    pub(super) channel: &'a mut C,
    /// Becomes what the rows are where they predict others, two in a word.
    pub(super) words: &'a mut [Lanes<i32>; PAIRS],
}

impl<C: Channel> Work for Predict<'_, C> {
    type Out = Option<()>;

    #[inline(always)]
    #[expect(
        clippy::indexing_slicing,
        clippy::needless_range_loop,
        reason = "rows and lanes of arrays of their length, several at a time"
    )]
    fn run(self) -> Option<()> {
        let block = self.block;
        let mut errors = [[0.0; GROUP]; WITHIN];
        for pair in 0..block.pairs.min(PAIRS) {
            let rows = [2 * pair, 2 * pair + 1];
            let [mut a, mut b] = rows.map(|row| self.base[row]);
            for before in 0..2 * pair {
                let [to_a, to_b] = rows.map(|row| block.within[row][before]);
                for lane in 0..GROUP {
                    a[lane] += to_a * errors[before][lane];
                    b[lane] += to_b * errors[before][lane];
                }
            }
            let [first, second] = rows;
            let angles = block.turned[pair].and_then(|pair| self.angles.get(pair));
            let (x, y);
            if let Some([c, s]) = angles {
                let (mut u, mut v) = ([0.0; GROUP], [0.0; GROUP]);
                for lane in 0..GROUP {
                    u[lane] = a[lane] * c[lane] - b[lane] * s[lane];
                    v[lane] = b[lane] * c[lane] + a[lane] * s[lane];
                }
                let given = bounded(self.channel.row(block, first, &u)?);
                for lane in 0..GROUP {
                    let slope = block.spread[pair].slope(c[lane], s[lane]);
                    v[lane] += slope * (given[lane] - u[lane]);
                }
                let other = bounded(self.channel.row(block, second, &v)?);
                (x, y) = back((&given, &other), (c, s));
            } else {
                x = bounded(self.channel.row(block, first, &a)?);
                let slope = block.within[second][first];
                for lane in 0..GROUP {
                    let error = x[lane] - a[lane];
                    b[lane] += slope * error;
                }
                y = bounded(self.channel.row(block, second, &b)?);
            }
            for lane in 0..GROUP {
                errors[first][lane] = x[lane] - self.base[first][lane];
                errors[second][lane] = y[lane] - self.base[second][lane];
                let of = |value, row: usize| read(value, block.centre[row], block.reciprocal[row]);
                self.words[pair][lane] = word(of(x[lane], first), of(y[lane], second));
            }
        }
        Some(())
    }
}

/// Before RoPE again.
#[inline(always)]
#[expect(clippy::indexing_slicing, reason = "lanes of arrays of their length")]
fn back(
    (a, b): (&Lanes<f32>, &Lanes<f32>),
    (c, s): (&Lanes<f32>, &Lanes<f32>),
) -> (Lanes<f32>, Lanes<f32>) {
    let (mut x, mut y) = ([0.0; GROUP], [0.0; GROUP]);
    for lane in 0..GROUP {
        x[lane] = a[lane] * c[lane] + b[lane] * s[lane];
        y[lane] = b[lane] * c[lane] - a[lane] * s[lane];
    }
    (x, y)
}

/// X3.
#[inline(always)]
fn bounded(values: Lanes<f32>) -> Lanes<f32> {
    values.map(bound)
}

/// X3. What is no number, or too large, predicts as 0 does.
#[inline(always)]
pub(super) fn bound(value: f32) -> f32 {
    if value.abs() <= LARGEST { value } else { 0.0 }
}

/// A value as the whole number that others are predicted from.
#[inline(always)]
pub(super) fn read(value: f32, centre: f32, reciprocal: f32) -> i16 {
    let most = f32::from(INPUT_MAX);
    let steps = (value - centre) * reciprocal;
    let steps = if steps > -most { steps } else { -most };
    let steps = if steps < most { steps } else { most };
    #[expect(clippy::cast_possible_truncation, reason = "held within its range")]
    let whole = whole(steps) as i16;
    whole
}
