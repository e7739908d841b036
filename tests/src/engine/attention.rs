//! Causal attention over the cache, in tiles of keys, as matrix products.
//!
//! Upstairs:   `layer` brings rotated and scaled queries and a way to read the cache.
//! Downstairs: `matrix` multiplies, `math` exponentiates.
//!
//! The keys are walked in tiles at fixed absolute positions with a running maximum and sum, so
//! memory stays small at any context and the arithmetic of a query row depends on its position
//! and its step alone (E2, E3).
//!
//! Not here on purpose: where keys come from. MLA and grouped heads differ in `layer`, not here.

use std::ops::Range;

use rayon::prelude::*;

use super::error::EngineError;
use super::math::{exp, exp_and_sum, max};
use super::matrix::{Operand, Rows};

/// Keys a tile; a score tile of 256 rows and three heads a group is then 1.5 MiB.
const KEY_TILE_TOKENS: usize = 512;

/// Rows of scores that one task takes.
const ROW_TASK: usize = 16;

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

/// Keys and values of one tile of tokens, all KV heads side by side.
pub(super) struct Tile {
    pub(super) keys: Rows,
    /// Absent when the values are the leading columns of the keys, as in MLA.
    pub(super) values: Option<Rows>,
}

impl Tile {
    fn keys_of(&self, head: usize, geometry: &Geometry) -> Result<Operand, EngineError> {
        self.keys.columns(head * geometry.key_dim, geometry.key_dim)
    }

    fn values_of(&self, head: usize, geometry: &Geometry) -> Result<Operand, EngineError> {
        let values = self.values.as_ref().unwrap_or(&self.keys);
        values.columns(head * geometry.value_dim, geometry.value_dim)
    }
}

/// Running softmax of all query rows of one KV head.
struct Running {
    max: Vec<f32>,
    sum: Vec<f32>,
    /// `[group * rows, value_dim]`, not yet divided by the sum.
    mixed: Vec<f32>,
}

/// Attends `queries` (for each KV head `[group * rows, key_dim]`, group-major, scaled) to every
/// token they may see; `tile_of` reads a run of tokens. Returns `[rows, query_heads, value_dim]`.
pub(super) fn attend(
    queries: &[Rows],
    geometry: &Geometry,
    tile_of: impl Fn(Range<usize>) -> Result<Tile, EngineError>,
) -> Result<Vec<f32>, EngineError> {
    let stacked = geometry.group * geometry.rows;
    let mut running: Vec<Running> = queries
        .iter()
        .map(|_| Running {
            max: vec![f32::NEG_INFINITY; stacked],
            sum: vec![0.0; stacked],
            mixed: vec![0.0; stacked * geometry.value_dim],
        })
        .collect();
    let end = geometry.start + geometry.rows;
    let first_seen = visible(geometry, geometry.start).start;
    let mut tile_start = first_seen / KEY_TILE_TOKENS * KEY_TILE_TOKENS;
    while tile_start < end {
        let tokens = tile_start..end.min(tile_start + KEY_TILE_TOKENS);
        let tile = tile_of(tokens.clone())?;
        for (head, (queries, running)) in queries.iter().zip(&mut running).enumerate() {
            let scores = queries.times_transposed(&tile.keys_of(head, geometry)?)?;
            let weights = running.absorb(&scores.values(), geometry, &tokens);
            let mixed =
                Rows::new(weights, tokens.len())?.times(&tile.values_of(head, geometry)?)?;
            running.add(&mixed.values());
        }
        tile_start += KEY_TILE_TOKENS;
    }
    Ok(gather(&running, geometry))
}

/// The tokens that the token at `position` sees.
fn visible(geometry: &Geometry, position: usize) -> Range<usize> {
    let seen = position + 1;
    geometry
        .window
        .map_or(0, |window| seen.saturating_sub(window))..seen
}

impl Running {
    /// Turns the scores of one tile into unnormalised weights, rescaling what was mixed before.
    fn absorb(&mut self, scores: &[f32], geometry: &Geometry, tokens: &Range<usize>) -> Vec<f32> {
        let width = tokens.len();
        let mut weights = vec![0.0; scores.len()];
        weights
            .par_chunks_mut(width)
            .zip(scores.par_chunks(width))
            .zip(self.max.par_iter_mut().zip(&mut self.sum))
            .zip(self.mixed.par_chunks_mut(geometry.value_dim))
            .enumerate()
            .with_min_len(ROW_TASK)
            .for_each(
                |(stacked, (((weights, scores), (max_so_far, sum)), mixed))| {
                    let seen = visible(geometry, geometry.start + stacked % geometry.rows);
                    let from = seen.start.max(tokens.start) - tokens.start;
                    let to = seen.end.min(tokens.end).saturating_sub(tokens.start);
                    let (Some(scores), Some(weights)) =
                        (scores.get(from..to), weights.get_mut(from..to))
                    else {
                        return; // Nothing of this tile is visible; its weights stay zero.
                    };
                    if scores.is_empty() {
                        return;
                    }
                    let new_max = max(scores).max(*max_so_far);
                    let correction = exp(*max_so_far - new_max);
                    *sum = *sum * correction + exp_and_sum(scores, new_max, weights);
                    *max_so_far = new_max;
                    mixed.iter_mut().for_each(|value| *value *= correction);
                },
            );
        weights
    }

    fn add(&mut self, mixed: &[f32]) {
        super::math::add(&mut self.mixed, mixed);
    }
}

/// Divides by the sums and puts the heads of one token side by side.
fn gather(running: &[Running], geometry: &Geometry) -> Vec<f32> {
    let (group, width) = (geometry.group, geometry.value_dim);
    let row_width = geometry.kv_heads * group * width;
    let mut out = vec![0.0; geometry.rows * row_width];
    for (head, running) in running.iter().enumerate() {
        let mixed = running
            .mixed
            .chunks_exact(width)
            .zip(&running.sum)
            .enumerate();
        for (stacked, (mixed, sum)) in mixed {
            let (member, row) = (stacked / geometry.rows, stacked % geometry.rows);
            let at = row * row_width + (head * group + member) * width;
            for (out, value) in out.iter_mut().skip(at).zip(mixed) {
                *out = value / sum;
            }
        }
    }
    out
}
