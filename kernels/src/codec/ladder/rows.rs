//! From rounded coefficients to the values of a part: the last and heaviest step of decoding.
//!
//! Upstairs:   [`super`] decodes with it, and encodes with it what decoding will give.
//! Downstairs: [`super::product`], [`super::rotary`].
//!
//! For each token and channel, in this order and each rounded to single precision:
//! `sum * out_scale + base`, where base is the mean, or `predicted * scale + bias`; then RoPE,
//! where K is coded before it. The sums are exact integers.
//!
//! Not here on purpose: no check of a value. Only an encoder knows what is right.

use super::product::{Column, Operand, PANEL, Panels, TILE};
use super::rotary::Turn;
use crate::simd;

/// What values are about.
#[derive(Debug, Clone, Copy)]
pub(super) enum Base<'a> {
    /// The mean of each channel.
    Mean(&'a [f32]),
    /// What is predicted of each channel.
    Predicted {
        weights: &'a Panels,
        scale: &'a [f32],
        bias: &'a [f32],
        inputs: Operand<'a>,
    },
}

/// All that values are made of.
#[derive(Debug, Clone, Copy)]
pub(super) struct Stage<'a> {
    pub(super) channels: usize,
    pub(super) tokens: usize,
    pub(super) inverse: &'a Panels,
    /// The inverse's scale of each channel times the step.
    pub(super) out_scale: &'a [f32],
    pub(super) coefficients: Operand<'a>,
    pub(super) base: Base<'a>,
    pub(super) turn: Option<Turn<'a>>,
}

/// Memory of a tile.
#[derive(Debug, Default)]
pub(super) struct Tile {
    sums: Vec<[Column; TILE]>,
    predicted: Vec<[Column; TILE]>,
    values: Vec<f32>,
}

impl Stage<'_> {
    /// Restores tile after tile, and gives the values of each token to `take`.
    pub(super) fn run(&self, tile: &mut Tile, mut take: impl FnMut(usize, &[f32])) {
        tile.values.clear();
        tile.values.resize(self.channels, 0.0);
        for first in (0..self.tokens).step_by(TILE) {
            simd::ladder::product(self.inverse, &self.coefficients, first, &mut tile.sums);
            self.base.predict(first, &mut tile.predicted);
            simd::ladder::vectorised(Finish {
                stage: self,
                tile,
                first,
                take: &mut take,
            });
        }
    }
}

impl Base<'_> {
    /// The integers of a tile's predictions, where there are some.
    pub(super) fn predict(&self, first: usize, predicted: &mut Vec<[Column; TILE]>) {
        if let Base::Predicted {
            weights, inputs, ..
        } = self
        {
            simd::ladder::product(weights, inputs, first, predicted);
        }
    }

    /// The base of a tile's token, before RoPE.
    #[inline(always)]
    pub(super) fn row(&self, predicted: &[[Column; TILE]], token: usize, row: &mut [f32]) {
        match self {
            Base::Mean(mean) => {
                for (value, mean) in row.iter_mut().zip(*mean) {
                    *value = *mean;
                }
            }
            Base::Predicted { scale, bias, .. } => {
                let affine = scale.chunks(PANEL).zip(bias.chunks(PANEL));
                let panels = row.chunks_mut(PANEL).zip(predicted);
                for ((row, panel), (scale, bias)) in panels.zip(affine) {
                    let sums = panel.get(token).into_iter().flatten();
                    let affine = scale.iter().zip(bias);
                    for ((value, sum), (scale, bias)) in row.iter_mut().zip(sums).zip(affine) {
                        *value = *sum as f32 * scale + bias;
                    }
                }
            }
        }
    }
}

struct Finish<'a, 'b, F> {
    stage: &'a Stage<'b>,
    tile: &'a mut Tile,
    first: usize,
    take: &'a mut F,
}

impl<F: FnMut(usize, &[f32])> simd::ladder::Work for Finish<'_, '_, F> {
    type Out = ();

    #[inline(always)]
    fn run(self) {
        let (stage, row) = (self.stage, &mut self.tile.values);
        for token in 0..TILE.min(stage.tokens - self.first) {
            stage.base.row(&self.tile.predicted, token, row);
            let panels = row.chunks_mut(PANEL).zip(&self.tile.sums);
            for ((row, panel), scales) in panels.zip(stage.out_scale.chunks(PANEL)) {
                let sums = panel.get(token).into_iter().flatten();
                for ((value, sum), scale) in row.iter_mut().zip(sums).zip(scales) {
                    *value += *sum as f32 * scale;
                }
            }
            if let Some(turn) = &stage.turn {
                turn.forth(self.first + token, row);
            }
            (self.take)(self.first + token, row);
        }
    }
}
