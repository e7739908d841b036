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
use super::product::{Column, PANEL, TILE};
use super::rotary::Turn;
use super::rows::Base;
use super::stream::{padded, set};
use crate::simd::ladder::{Work, vectorised};

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
    predicted: Vec<[Column; TILE]>,
    /// Of each channel, what is left of a tile's tokens.
    left: Vec<[f32; TILE]>,
    row: Vec<f32>,
    base: Vec<f32>,
}

impl Forward<'_> {
    /// Sets the words of all coefficients, and adds to `bad` each token that has one out of range.
    pub(super) fn run(&self, memory: &mut Memory, words: &mut [i32], bad: &mut Vec<usize>) {
        memory.left.resize(self.channels, [0.0; TILE]);
        for row in [&mut memory.row, &mut memory.base] {
            row.clear();
            row.resize(self.channels, 0.0);
        }
        for first in (0..self.tokens).step_by(TILE) {
            self.base.predict(first, &mut memory.predicted);
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
        for token in 0..TILE.min(tokens - self.first) {
            rows.read(raw, self.first + token, &mut memory.row);
            if let Some(turn) = turn {
                turn.back(self.first + token, &mut memory.row);
            }
            base.row(&memory.predicted, token, &mut memory.base);
            let values = memory.row.iter().zip(&memory.base);
            for (left, (value, base)) in memory.left.iter_mut().zip(values) {
                if let Some(left) = left.get_mut(token) {
                    *left = value - base;
                }
            }
        }
        let mut good = [true; TILE];
        let padded = padded(*tokens);
        let panels = matrix.chunks_exact(*channels).zip(in_scale.chunks(PANEL));
        for (panel, (matrix, scales)) in panels.enumerate() {
            let mut sums = [[0.0_f32; PANEL]; TILE];
            for (column, left) in matrix.iter().zip(&memory.left) {
                for (sums, value) in sums.iter_mut().zip(left) {
                    for (sum, number) in sums.iter_mut().zip(column) {
                        *sum += number * value;
                    }
                }
            }
            for (token, (sums, good)) in sums.iter().zip(&mut good).enumerate() {
                if self.first + token >= *tokens {
                    break;
                }
                for (lane, (sum, scale)) in sums.iter().zip(scales).enumerate() {
                    let steps = sum * scale;
                    let fits = steps.abs() <= MOST;
                    *good &= fits;
                    #[expect(clippy::cast_possible_truncation, reason = "it was checked to fit")]
                    let number = whole(if fits { steps } else { 0.0 }) as i16;
                    let place = (panel * PANEL + lane, self.first + token);
                    set(self.words, padded, place, number);
                }
            }
        }
        good
    }
}
