//! Products of a profile's integer matrices with the integers of tokens.
//!
//! Upstairs:   [`super::rows`].
//! Downstairs: [`crate::simd`] does whole tiles; [`tile`] defines what they are.
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

/// Integers of tokens, as products take them: the word of pair `p` of token `t` is at
/// `p * pair_stride + t * token_stride`.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Operand<'a> {
    pub(crate) words: &'a [i32],
    pub(crate) pair_stride: usize,
    pub(crate) token_stride: usize,
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

/// Multiplies a panel with a tile of tokens from `first` on: `out[t][row]`. Defines the bits.
pub(crate) fn tile(panel: &[Column], with: &Operand<'_>, first: usize, out: &mut [Column; TILE]) {
    *out = [[0; PANEL]; TILE];
    for (pair, column) in panel.iter().enumerate().take(with.pairs) {
        for (token, sums) in out.iter_mut().enumerate() {
            let at = pair * with.pair_stride + (first + token) * with.token_stride;
            let (low, high) = halves(with.words.get(at).copied().unwrap_or(0));
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
