//! From the values of a part to rounded coefficients: the heaviest step of encoding.
//!
//! Upstairs:   [`super`].
//! Downstairs: [`super::rows`] says what the base is.
//!
//! The sums are of single precision, channel after channel, each product and each sum rounded:
//! lanes are coefficients, so that wider registers change nothing.
//!
//! Not here on purpose: no promise. What rounding and this arithmetic lose is checked on the
//! restored values.

use super::elements::Rows;
use super::input::whole;
use super::product::{self, Column, PANEL, TILE};
use super::rotary::Turn;
use super::rows::{Base, Predicted};
use super::stream::padded;
use crate::simd::ladder::{self, SIDE, Side, Work, product_real, vectorised};

/// Largest coefficient. Unit: steps.
const MOST: f32 = 32_767.0;

/// All that coefficients are made of.
#[derive(Debug, Clone, Copy)]
pub(super) struct Forward<'a> {
    pub(super) raw: &'a [u8],
    pub(super) rows: Rows,
    pub(super) tokens: usize,
    pub(super) channels: usize,
    pub(super) turn: Option<Turn<'a>>,
    pub(super) base: Base<'a>,
    pub(super) matrix: &'a [[f32; PANEL]],
    pub(super) in_scale: &'a [f32],
}

/// Memory of a tile.
#[derive(Debug, Default)]
pub(super) struct Memory {
    predicted: Predicted,
    /// The integers of all predictions, tile after tile: decoding the part takes them again.
    pub(super) known: Vec<[Column; TILE]>,
    /// Of each channel, what is left of a tile's tokens.
    left: Vec<[f32; TILE]>,
    /// The rows of a tile's tokens.
    rows: Vec<f32>,
    base: Vec<f32>,
}

impl Forward<'_> {
    /// Sets the words of all coefficients, and adds to `bad` each token that has one out of range.
    pub(super) fn run(&self, memory: &mut Memory, words: &mut [i32], bad: &mut Vec<usize>) {
        memory.left.resize(self.channels, [0.0; TILE]);
        memory.rows.resize(self.channels * TILE, 0.0);
        memory.base.resize(self.channels, 0.0);
        memory.known.clear();
        for first in (0..self.tokens).step_by(TILE) {
            self.base.predict(first / TILE, &mut memory.predicted);
            let Memory {
                known, predicted, ..
            } = &mut *memory;
            known.extend_from_slice(self.base.sums(first / TILE, predicted));
            let of_tile = Tile {
                forward: self,
                memory,
                first,
                words,
            };
            let good = vectorised(of_tile);
            let tokens = (first..self.tokens).zip(good);
            bad.extend(tokens.filter_map(|(token, good)| (!good).then_some(token)));
        }
    }
}

struct Tile<'a, 'b> {
    forward: &'a Forward<'b>,
    memory: &'a mut Memory,
    first: usize,
    words: &'a mut [i32],
}

impl Work for Tile<'_, '_> {
    type Out = [bool; TILE];

    #[inline(always)]
    fn run(self) -> [bool; TILE] {
        let Forward {
            raw,
            rows,
            tokens,
            channels,
            turn,
            base,
            matrix,
            in_scale,
        } = self.forward;
        let memory = self.memory;
        let mut all = memory.rows.chunks_exact_mut(*channels);
        for (token, row) in (0..TILE.min(tokens - self.first)).zip(&mut all) {
            rows.read(raw, self.first + token, row);
            if let Some(turn) = turn {
                turn.back(self.first + token, row);
            }
            base.row(&memory.predicted.sums, token, &mut memory.base);
            for (value, base) in row.iter_mut().zip(&memory.base) {
                *value -= base;
            }
        }
        transpose(&memory.rows, &mut memory.left);
        let mut good = [true; TILE];
        let padded = padded(*tokens);
        let panels = matrix.chunks_exact(*channels).zip(in_scale.chunks(PANEL));
        let words = self.words.chunks_mut(padded * (PANEL / 2));
        for ((matrix, scales), words) in panels.zip(words) {
            let mut sums = [[0.0_f32; PANEL]; TILE];
            product_real(matrix, &memory.left, &mut sums);
            let mut numbers = [[[0_i16; 2]; PANEL / 2]; TILE];
            let of_token = numbers.iter_mut().zip(&sums).zip(&mut good);
            for ((numbers, sums), good) in of_token.take(tokens - self.first) {
                let lanes = numbers.as_flattened_mut().iter_mut().zip(sums);
                for ((number, sum), scale) in lanes.zip(scales) {
                    let steps = sum * scale;
                    let fits = steps.abs() <= MOST;
                    *good &= fits;
                    #[expect(clippy::cast_possible_truncation, reason = "it was checked to fit")]
                    let whole = whole(if fits { steps } else { 0.0 }) as i16;
                    *number = whole;
                }
            }
            for (group, tokens) in numbers.as_chunks::<SIDE>().0.iter().enumerate() {
                let mut side: Side = [[0; SIDE]; SIDE];
                for (side, token) in side.iter_mut().zip(tokens) {
                    for (word, [low, high]) in side.iter_mut().zip(token) {
                        *word = product::word(*low, *high);
                    }
                }
                let mut turned = side;
                ladder::turn(&side, &mut turned);
                let first = self.first + group * SIDE;
                for (row, turned) in words.chunks_exact_mut(padded).zip(&turned) {
                    let place = row.get_mut(first..).and_then(<[i32]>::first_chunk_mut);
                    place.into_iter().for_each(|place| *place = *turned);
                }
            }
        }
        good
    }
}

/// Of a tile's rows, channel after channel the values of all tokens.
#[inline(always)]
fn transpose(rows: &[f32], left: &mut [[f32; TILE]]) {
    let channels = left.len();
    let (mut side, mut turned): (Side, Side) = ([[0; SIDE]; SIDE], [[0; SIDE]; SIDE]);
    for group in 0..TILE / SIDE {
        let rows = rows.chunks_exact(channels).skip(group * SIDE);
        for (at, left) in left.chunks_mut(SIDE).enumerate() {
            for (side, row) in side.iter_mut().zip(rows.clone()) {
                let values = row.get(at * SIDE..).unwrap_or_default();
                for (word, value) in side.iter_mut().zip(values) {
                    *word = value.to_bits().cast_signed();
                }
            }
            ladder::turn(&side, &mut turned);
            for (left, turned) in left.iter_mut().zip(&turned) {
                if let Some(left) = left.as_chunks_mut::<SIDE>().0.get_mut(group) {
                    *left = turned.map(|word| f32::from_bits(word.cast_unsigned()));
                }
            }
        }
    }
}
