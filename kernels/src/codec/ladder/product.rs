//! Products of a profile's integer matrices with the integers of tokens.
//!
//! Upstairs:   [`super::rows`].
//! Downstairs: [`crate::simd`] does whole tiles; [`multiply`] defines what they are.
//!
//! A matrix lies in panels of [`PANEL`] rows, and within a panel by pairs of columns: a pair's
//! numbers of one row are the halves of a word, low half first. What it is multiplied with lies
//! in words of pairs too. A product takes [`TILE`] tokens at a time. Where bytes are multiplied by
//! tiles a matrix lies in [`Square`]s.
//!
//! Invariants kept here
//!   T2  Products and sums are exact modulo 2^32 on every path, in whatever order. An encoder sees
//!       what a decoder will see, and keeps a token exactly where it is too far off.
//!
//! Not here on purpose: no floating point.

use std::sync::OnceLock;

use crate::profile::Matrix16;
use crate::simd::ladder::{SIDE, Side, Work, turn, vectorised};

/// Rows of a panel.
pub(crate) const PANEL: usize = 32;
/// Tokens of a tile.
pub(crate) const TILE: usize = 32;

/// The words of a pair of columns.
pub(crate) type Column = [i32; PANEL];

/// Rows of a square.
pub(crate) const SQUARE_ROWS: usize = 16;
/// Columns of a square.
pub(crate) const SQUARE_COLUMNS: usize = 64;
/// Bytes of half a square.
pub(crate) const HALF: usize = SQUARE_ROWS * SQUARE_COLUMNS;

/// A piece of a matrix for processors that multiply bytes by tiles: the low bytes of its numbers,
/// then the high ones. Of each four columns it has those of one row after the other.
#[derive(Debug, Clone)]
#[repr(align(64))]
pub(crate) struct Square(pub(crate) [u8; 2 * HALF]);

/// A matrix as products take it. It lies in the form that this processor's fastest path reads; the
/// other form is made when a thread was limited to a path that reads that one.
#[derive(Debug)]
pub(crate) struct Panels {
    rows: usize,
    columns: usize,
    /// Panel after panel, of each the pairs of columns, the last one filled up with 0.
    words: OnceLock<Vec<Column>>,
    /// Rows after rows, of each the squares.
    squares: OnceLock<Vec<Square>>,
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
        let number = |row: usize, column: usize| match column < columns {
            true => matrix.data().get(row * columns + column).copied(),
            false => None,
        };
        let panels = Self {
            rows,
            columns,
            words: OnceLock::new(),
            squares: OnceLock::new(),
        };
        match crate::simd::ladder::takes_squares() {
            true => drop(panels.squares.set(panels.to_squares(number))),
            false => drop(panels.words.set(panels.to_words(number))),
        }
        panels
    }

    fn pairs(&self) -> usize {
        self.columns.div_ceil(2)
    }

    /// Squares of the same rows.
    fn across(&self) -> usize {
        self.columns.div_ceil(SQUARE_COLUMNS)
    }

    fn to_words(&self, number: impl Fn(usize, usize) -> Option<i16>) -> Vec<Column> {
        let mut words = Vec::with_capacity(self.rows.div_ceil(PANEL) * self.pairs());
        for panel in 0..self.rows.div_ceil(PANEL) {
            for pair in 0..self.pairs() {
                words.push(std::array::from_fn(|lane| {
                    let row = panel * PANEL + lane;
                    let of = |column| number(row, column).unwrap_or(0);
                    word(of(2 * pair), of(2 * pair + 1))
                }));
            }
        }
        words
    }

    fn to_squares(&self, number: impl Fn(usize, usize) -> Option<i16>) -> Vec<Square> {
        let mut squares = Vec::new();
        for down in 0..self.rows.div_ceil(PANEL) * (PANEL / SQUARE_ROWS) {
            for across in 0..self.across() {
                let mut square = Square([0; 2 * HALF]);
                let (lows, highs) = square.0.split_at_mut(HALF);
                let places = lows.iter_mut().zip(highs).enumerate();
                for (at, (low, high)) in places {
                    let row = at % SQUARE_COLUMNS / 4;
                    let column = at / SQUARE_COLUMNS * 4 + at % 4;
                    let row = down * SQUARE_ROWS + row;
                    let number = number(row, across * SQUARE_COLUMNS + column);
                    [*low, *high] = number.unwrap_or(0).to_le_bytes();
                }
                squares.push(square);
            }
        }
        squares
    }

    /// The panels, each with its pairs of columns.
    pub(crate) fn panels(&self) -> impl Iterator<Item = &[Column]> {
        let words = self.words.get_or_init(|| {
            let squares = self.squares.get().map_or(&[][..], Vec::as_slice);
            self.to_words(|row, column| {
                let at = row / SQUARE_ROWS * self.across() + column / SQUARE_COLUMNS;
                let square = squares.get(at)?;
                let column = column % SQUARE_COLUMNS;
                let at = column / 4 * SQUARE_COLUMNS + row % SQUARE_ROWS * 4 + column % 4;
                let (low, high) = (square.0.get(at)?, square.0.get(HALF + at)?);
                Some(i16::from_le_bytes([*low, *high]))
            })
        });
        words.chunks_exact(self.pairs().max(1))
    }

    /// The squares of the same rows, rows after rows.
    pub(crate) fn squares(&self) -> impl Iterator<Item = &[Square]> {
        let squares = self.squares.get_or_init(|| {
            let words = self.words.get().map_or(&[][..], Vec::as_slice);
            self.to_squares(|row, column| {
                let pair = row / PANEL * self.pairs() + column / 2;
                let (low, high) = halves(*words.get(pair)?.get(row % PANEL)?);
                // A pair beyond the columns is another panel's.
                let number = if column % 2 == 0 { low } else { high };
                (column < self.columns).then_some(number)
            })
        });
        squares.chunks_exact(self.across().max(1))
    }

    /// Panels that there are.
    pub(crate) fn count(&self) -> usize {
        self.rows.div_ceil(PANEL)
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

/// Integers of one byte of tokens. Of each tile and each [`SQUARE_COLUMNS`] there is a square,
/// which here has one token's numbers after the other's. What is beyond the columns can be
/// anything.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Bytes<'a> {
    pub(crate) squares: &'a [Square],
    pub(crate) columns: usize,
}

impl<'a> Bytes<'a> {
    /// The squares of a tile.
    pub(crate) fn tile(&self, tile: usize) -> &'a [Square] {
        let across = self.columns.div_ceil(SQUARE_COLUMNS);
        let own = tile * across..(tile + 1) * across;
        self.squares.get(own).unwrap_or_default()
    }

    /// Makes words of a tile, pair after pair.
    pub(crate) fn widen(&self, tile: usize, words: &mut Vec<i32>) {
        let squares = self.tile(tile);
        words.resize(squares.len() * SQUARE_COLUMNS / 2 * TILE, 0);
        let places = words.chunks_exact_mut(SQUARE_COLUMNS / 2 * TILE);
        for (words, square) in places.zip(squares) {
            vectorised(Widen { square, words });
        }
        words.truncate(self.columns.div_ceil(2) * TILE);
    }
}

struct Widen<'a> {
    square: &'a Square,
    words: &'a mut [i32],
}

impl Work for Widen<'_> {
    type Out = ();

    #[inline(always)]
    fn run(self) {
        // Sixteen tokens and as many pairs at a time.
        let (mut side, mut turned): (Side, Side) = ([[0; SIDE]; SIDE], [[0; SIDE]; SIDE]);
        let tokens = self.square.0.chunks_exact(SIDE * SQUARE_COLUMNS);
        for (group, rows) in tokens.enumerate() {
            for (part, places) in self.words.chunks_exact_mut(SIDE * TILE).enumerate() {
                let rows = rows.as_chunks::<SQUARE_COLUMNS>().0;
                for (side, row) in side.iter_mut().zip(rows) {
                    let own = row.as_chunks::<{ 2 * SIDE }>().0.get(part);
                    let pairs = own.map_or(&[][..], |own| own.as_chunks::<2>().0);
                    for (word, [low, high]) in side.iter_mut().zip(pairs) {
                        let (low, high) = (low.cast_signed(), high.cast_signed());
                        *word = self::word(low.into(), high.into());
                    }
                }
                turn(&side, &mut turned);
                for (place, row) in places.chunks_exact_mut(TILE).zip(&turned) {
                    if let Some(place) = place.as_chunks_mut::<SIDE>().0.get_mut(group) {
                        *place = *row;
                    }
                }
            }
        }
    }
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

#[cfg(test)]
mod tests;
