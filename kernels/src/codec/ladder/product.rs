//! Products of a profile's integer matrices with the integers of tokens.
//!
//! Upstairs:   [`super::rows`].
//! Downstairs: [`crate::simd`] does whole tiles; [`multiply`] defines what they are.
//!
//! A matrix lies in panels of [`PANEL`] rows, and within a panel by pairs of columns: a pair's
//! numbers of one row are the halves of a word, low half first. What it is multiplied with lies
//! in words of pairs too. A product takes [`TILE`] tokens at a time.
//!
//! Invariants kept here
//!   T2  Products and sums are exact modulo 2^32 on every path, in whatever order. An encoder sees
//!       what a decoder will see, and keeps a token exactly where it is too far off.
//!
//! Not here on purpose: no floating point.

use crate::profile::Matrix16;

/// Rows of a panel.
pub(crate) const PANEL: usize = 32;
/// Tokens of a tile.
pub(crate) const TILE: usize = 8;

/// The words of a pair of columns.
pub(crate) type Column = [i32; PANEL];

/// A matrix as products take it.
#[derive(Debug)]
pub(crate) struct Panels {
    /// Pairs of columns, the last one filled up with 0.
    pairs: usize,
    /// Panel after panel, of each the pairs of columns.
    words: Vec<Column>,
}

/// Integers of tokens, as products take them: the words of pair `p` of the tokens of tile `k` are
/// those from `p * pair_stride + k * tile_stride` on.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Operand<'a> {
    pub(crate) words: &'a [i32],
    pub(crate) pair_stride: usize,
    pub(crate) tile_stride: usize,
    /// Pairs that are there; the rest are 0.
    pub(crate) pairs: usize,
}

impl Panels {
    pub(crate) fn new(matrix: &Matrix16) -> Self {
        let (rows, columns) = (matrix.rows(), matrix.columns());
        let pairs = columns.div_ceil(2);
        let number = |row: usize, column: usize| match column < columns {
            true => matrix.data().get(row * columns + column).copied(),
            false => None,
        };
        let mut words = Vec::with_capacity(rows.div_ceil(PANEL) * pairs);
        for panel in 0..rows.div_ceil(PANEL) {
            for pair in 0..pairs {
                words.push(std::array::from_fn(|lane| {
                    let row = panel * PANEL + lane;
                    let of = |column| number(row, column).unwrap_or(0);
                    word(of(2 * pair), of(2 * pair + 1))
                }));
            }
        }
        Self { pairs, words }
    }

    /// The panels, each with its pairs of columns.
    pub(crate) fn panels(&self) -> impl Iterator<Item = &[Column]> {
        self.words.chunks_exact(self.pairs.max(1))
    }
}

/// Two numbers in a word.
#[inline(always)]
pub(crate) const fn word(low: i16, high: i16) -> i32 {
    (low.cast_unsigned() as u32 | (high.cast_unsigned() as u32) << 16).cast_signed()
}

/// The numbers of a word.
#[inline(always)]
#[expect(clippy::cast_possible_truncation, reason = "the low half is meant")]
pub(crate) const fn halves(word: i32) -> (i16, i16) {
    (word as i16, (word >> 16) as i16)
}

impl<'a> Operand<'a> {
    /// The words of a tile's tokens, pair after pair.
    #[inline(always)]
    pub(crate) fn tile(&self, tile: usize) -> impl Iterator<Item = &'a [i32; TILE]> {
        let words = self.words.get(tile * self.tile_stride..);
        let pairs = words.unwrap_or_default().chunks(self.pair_stride);
        pairs.take(self.pairs).map_while(<[i32]>::first_chunk)
    }
}

/// Multiplies a panel with a tile of tokens: `out[t][row]`. Defines the bits.
pub(crate) fn multiply(
    panel: &[Column],
    with: &Operand<'_>,
    tile: usize,
    out: &mut [Column; TILE],
) {
    *out = [[0; PANEL]; TILE];
    for (column, words) in panel.iter().zip(with.tile(tile)) {
        for (sums, with) in out.iter_mut().zip(words) {
            let (low, high) = halves(*with);
            for (sum, word) in sums.iter_mut().zip(column) {
                let (a, b) = halves(*word);
                let product = i32::from(a)
                    .wrapping_mul(low.into())
                    .wrapping_add(i32::from(b).wrapping_mul(high.into()));
                *sum = sum.wrapping_add(product);
            }
        }
    }
}

/// Multiplies a panel of a real matrix, column after column, with what is left of a tile's tokens:
/// `out[t][row]`. Defines the bits: each product and each sum is rounded, in the order of columns.
pub(crate) fn multiply_real(
    panel: &[[f32; PANEL]],
    left: &[[f32; TILE]],
    out: &mut [[f32; PANEL]; TILE],
) {
    *out = [[0.0; PANEL]; TILE];
    for (column, left) in panel.iter().zip(left) {
        for (sums, value) in out.iter_mut().zip(left) {
            for (sum, number) in sums.iter_mut().zip(column) {
                *sum += number * value;
            }
        }
    }
}
