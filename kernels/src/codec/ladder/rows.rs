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

use super::product::{Bytes, Column, Operand, PANEL, Panels, TILE};
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
        inputs: Bytes<'a>,
    },
    /// The same where the integers are there already, tile after tile.
    Known {
        sums: &'a [[Column; TILE]],
        scale: &'a [f32],
        bias: &'a [f32],
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

/// What is done with the values of a token. Implementations are inlined into each path.
pub(super) trait Take {
    /// Takes the values of a token.
    fn take(&mut self, token: usize, values: &[f32]);
}

/// Memory of a tile.
#[derive(Debug, Default)]
pub(super) struct Tile {
    /// The coefficients of the tile's tokens, pair after pair: where they come from, pairs lie
    /// powers of two apart, and few such places fit a cache.
    words: Vec<i32>,
    sums: Vec<[Column; TILE]>,
    predicted: Predicted,
    values: Vec<f32>,
}

/// The integers of predictions.
#[derive(Debug, Default)]
pub(super) struct Predicted {
    pub(super) sums: Vec<[Column; TILE]>,
    words: Vec<i32>,
}

impl Stage<'_> {
    /// Restores tile after tile, and gives the values of each token to `take`.
    pub(super) fn run(&self, tile: &mut Tile, take: &mut impl Take) {
        tile.values.clear();
        tile.values.resize(self.channels, 0.0);
        for at in 0..self.tokens.div_ceil(TILE) {
            tile.words.clear();
            let pairs = self.coefficients.tile(at);
            pairs.for_each(|words| tile.words.extend_from_slice(words));
            let coefficients = Operand {
                words: &tile.words,
                pair_stride: TILE,
                tile_stride: 0,
                pairs: self.coefficients.pairs,
            };
            simd::ladder::product(self.inverse, &coefficients, 0, &mut tile.sums);
            self.base.predict(at, &mut tile.predicted);
            simd::ladder::vectorised(Finish {
                stage: self,
                tile,
                first: at * TILE,
                take,
            });
        }
    }
}

impl<'a> Base<'a> {
    /// The integers of a tile's predictions, where there are some and they are not known.
    pub(super) fn predict(&self, tile: usize, into: &mut Predicted) {
        if let Base::Predicted {
            weights, inputs, ..
        } = self
        {
            let Predicted { sums, words } = into;
            simd::ladder::product_bytes(weights, inputs, tile, words, sums);
        }
    }

    /// The same with integers that were predicted already.
    pub(super) fn known<'b>(self, sums: &'b [[Column; TILE]]) -> Base<'b>
    where
        'a: 'b,
    {
        match self {
            Base::Predicted { scale, bias, .. } => Base::Known { sums, scale, bias },
            other => other,
        }
    }

    /// The integers of a tile's predictions, which are in `predicted` if they were not known.
    pub(super) fn sums<'b>(
        &'b self,
        tile: usize,
        predicted: &'b Predicted,
    ) -> &'b [[Column; TILE]] {
        match self {
            Base::Mean(_) => &[],
            Base::Predicted { .. } => &predicted.sums,
            Base::Known { sums, scale, .. } => {
                let panels = scale.len().div_ceil(PANEL);
                let own = tile * panels..(tile + 1) * panels;
                sums.get(own).unwrap_or_default()
            }
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
            Base::Predicted { scale, bias, .. } | Base::Known { scale, bias, .. } => {
                let affine = scale.chunks(PANEL).zip(bias.chunks(PANEL));
                let panels = row.chunks_mut(PANEL).zip(predicted);
                for ((row, panel), (scale, bias)) in panels.zip(affine) {
                    let sums = panel.get(token).map_or(&[][..], |sums| &sums[..]);
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

impl<F: Take> simd::ladder::Work for Finish<'_, '_, F> {
    type Out = ();

    #[inline(always)]
    fn run(self) {
        let (stage, row) = (self.stage, &mut self.tile.values);
        let predicted = stage.base.sums(self.first / TILE, &self.tile.predicted);
        for token in 0..TILE.min(stage.tokens - self.first) {
            stage.base.row(predicted, token, row);
            let panels = row.chunks_mut(PANEL).zip(&self.tile.sums);
            for ((row, panel), scales) in panels.zip(stage.out_scale.chunks(PANEL)) {
                let sums = panel.get(token).map_or(&[][..], |sums| &sums[..]);
                for ((value, sum), scale) in row.iter_mut().zip(sums).zip(scales) {
                    *value += *sum as f32 * scale;
                }
            }
            if let Some(turn) = &stage.turn {
                turn.forth(self.first + token, row);
            }
            self.take.take(self.first + token, row);
        }
    }
}
