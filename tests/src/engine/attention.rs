//! Causal attention over the cache, in tiles of keys, as matrix products.
//!
//! Upstairs:   `layer` brings rotated and scaled queries.
//! Downstairs: `kernel` multiplies, `prepared` holds keys and values, `math` exponentiates.
//!
//! The keys are walked in tiles at fixed absolute positions with a running maximum and sum, so
//! memory stays small at any context.
//!
//! Invariant E3: what a query row gets depends on its position and on the keys before it alone,
//! not on the rows computed beside it: what is masked adds exact zeros.
//!
//! Not here on purpose: where keys come from. MLA and grouped heads differ in `prepared`.

use std::ops::Range;

use pulp::{Arch, Simd, WithSimd};
use rayon::prelude::*;

use super::kernel::{Left, Out, multiply_add};
use super::math::{exp, exp_and_sum, max};
use super::prepared::Prepared;

/// Keys a tile. With [`TASK_ROWS`] rows, scores and both panels take 232 KiB of second cache.
const KEY_TILE_TOKENS: usize = 256;

/// Query rows of one task.
const TASK_ROWS: usize = 96;

/// What one step attends with.
#[derive(Debug, Clone)]
pub(super) struct Geometry {
    pub(super) kv_heads: usize,
    /// Query heads that share a KV head.
    pub(super) group: usize,
    pub(super) key_dim: usize,
    pub(super) value_dim: usize,
    pub(super) window: Option<usize>,
    /// Tokens of the step.
    pub(super) rows: usize,
    /// Position of the first of them.
    pub(super) start: usize,
}

impl Geometry {
    /// The tokens that a stacked row sees.
    fn visible(&self, stacked: usize) -> Range<usize> {
        let seen = self.start + stacked % self.rows + 1;
        self.window.map_or(0, |window| seen.saturating_sub(window))..seen
    }
}

/// Attends `queries` (for each KV head `[group * rows, key_dim]`, group-major, scaled) to every
/// token they may see. Returns `[rows, query_heads, value_dim]`.
pub(super) fn attend(queries: &[Vec<f32>], geometry: &Geometry, prepared: &Prepared) -> Vec<f32> {
    let stacked = geometry.group * geometry.rows;
    let mut mixed = vec![vec![0.0; stacked * geometry.value_dim]; geometry.kv_heads];
    mixed
        .par_iter_mut()
        .zip(queries)
        .enumerate()
        .for_each(|(head, (mixed, queries))| {
            mixed
                .par_chunks_mut(TASK_ROWS * geometry.value_dim)
                .zip(queries.par_chunks(TASK_ROWS * geometry.key_dim))
                .enumerate()
                .for_each(|(index, (mixed, queries))| {
                    let first = index * TASK_ROWS;
                    let task = Task {
                        head,
                        first,
                        queries,
                        mixed,
                        geometry,
                        prepared,
                    };
                    Arch::new().dispatch(task);
                });
        });
    gather(&mixed, geometry)
}

/// Some rows of one KV head against all keys they see.
struct Task<'a> {
    head: usize,
    /// The first of the stacked rows.
    first: usize,
    queries: &'a [f32],
    mixed: &'a mut [f32],
    geometry: &'a Geometry,
    prepared: &'a Prepared,
}

/// Running softmax of one row.
#[derive(Clone, Copy)]
struct Running {
    max: f32,
    sum: f32,
}

impl WithSimd for Task<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let Geometry {
            key_dim, value_dim, ..
        } = *self.geometry;
        let rows = self.mixed.len() / value_dim;
        let visible = || (self.first..self.first + rows).map(|row| self.geometry.visible(row));
        let from = visible().map(|seen| seen.start).min().unwrap_or(0);
        let end = visible().map(|seen| seen.end).max().unwrap_or(0);
        let mut running = vec![
            Running {
                max: f32::NEG_INFINITY,
                sum: 0.0
            };
            rows
        ];
        let mut scores = vec![0.0; rows * KEY_TILE_TOKENS];
        for start in (from / KEY_TILE_TOKENS * KEY_TILE_TOKENS..end).step_by(KEY_TILE_TOKENS) {
            let tokens = start..end.min(start + KEY_TILE_TOKENS);
            scores.fill(0.0);
            let keys = self.prepared.keys(self.head, &tokens);
            let left = Left {
                values: self.queries,
                stride: key_dim,
                depth: key_dim,
            };
            let (stride, columns) = (KEY_TILE_TOKENS, tokens.len());
            let mut out = Out {
                values: &mut scores,
                stride,
                columns,
            };
            multiply_add(simd, left, keys, &mut out);

            let rows = scores
                .chunks_exact_mut(KEY_TILE_TOKENS)
                .zip(&mut running)
                .zip(visible());
            let rows = rows.zip(self.mixed.chunks_exact_mut(value_dim));
            for (((scores, running), seen), mixed) in rows {
                running.absorb(simd, scores, &tokens, &seen, mixed);
            }

            let values = self.prepared.values(self.head, &tokens);
            let left = Left {
                values: &scores,
                stride: KEY_TILE_TOKENS,
                depth: tokens.len(),
            };
            let mut out = Out {
                values: &mut *self.mixed,
                stride: value_dim,
                columns: value_dim,
            };
            multiply_add(simd, left, values, &mut out);
        }
        for (mixed, running) in self.mixed.chunks_exact_mut(value_dim).zip(&running) {
            mixed.iter_mut().for_each(|value| *value /= running.sum);
        }
    }
}

impl Running {
    /// Turns the scores of one tile into unnormalised weights, rescaling what was mixed before.
    #[inline(always)]
    fn absorb<S: Simd>(
        &mut self,
        simd: S,
        scores: &mut [f32],
        tokens: &Range<usize>,
        seen: &Range<usize>,
        mixed: &mut [f32],
    ) {
        let from = seen.start.clamp(tokens.start, tokens.end) - tokens.start;
        let to = seen.end.clamp(tokens.start, tokens.end) - tokens.start;
        let (before, rest) = scores.split_at_mut(from);
        let (visible, after) = rest.split_at_mut(to.saturating_sub(from));
        before.fill(0.0);
        after.fill(0.0);
        if visible.is_empty() {
            return;
        }
        let new_max = max(simd, visible).max(self.max);
        let correction = exp(self.max - new_max);
        self.sum = self.sum * correction + exp_and_sum(visible, new_max);
        self.max = new_max;
        mixed.iter_mut().for_each(|value| *value *= correction);
    }
}

/// Puts the heads of one token side by side.
fn gather(mixed: &[Vec<f32>], geometry: &Geometry) -> Vec<f32> {
    let Geometry {
        group,
        value_dim,
        rows,
        kv_heads,
        ..
    } = *geometry;
    let row_width = kv_heads * group * value_dim;
    let mut out = vec![0.0; rows * row_width];
    out.par_chunks_mut(row_width)
        .enumerate()
        .for_each(|(row, out)| {
            let of_row = mixed
                .iter()
                .flat_map(|mixed| mixed.chunks_exact(value_dim).skip(row).step_by(rows));
            for (place, value) in out.chunks_exact_mut(value_dim).zip(of_row) {
                place.copy_from_slice(value);
            }
        });
    out
}

#[cfg(test)]
mod tests;
