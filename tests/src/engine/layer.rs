//! One decoder layer: attention of either kind, then the gated feed-forward.
//!
//! Upstairs:   `sequence` runs the layers in order; `gguf` and `random` build them.
//! Downstairs: `attention`, `matrix`, `math`, and the layer's own part of the cache.
//!
//! Invariants kept here
//!   E1  What a layer computes goes into the cache first and is read back from there.
//!   E4  Keys and values that are rebuilt from a layer's input have the bits of computed ones: it
//!       is the same code.
//!
//! Not here on purpose: biases and norms of queries or keys; no model we run has them.

use std::sync::Arc;

use super::attention::{Geometry, attend};
use super::cache::LayerCache;
use super::math::{Rope, add, gated, rms_norm};
use super::matrix::Weight;

/// Weights of one layer.
#[derive(Debug)]
pub(super) struct Layer {
    pub(super) attention_norm: Vec<f32>,
    pub(super) mixer: Mixer,
    pub(super) rope: Arc<Rope>,
    pub(super) feed_forward_norm: Vec<f32>,
    /// Gate rows, then up rows.
    pub(super) gate_up: Weight,
    pub(super) down: Weight,
}

/// Attention weights by kind.
#[derive(Debug)]
pub(super) enum Mixer {
    Heads(HeadsMixer),
    Latent(LatentMixer),
}

#[derive(Debug)]
pub(super) struct HeadsMixer {
    /// Rows of all query heads, then key heads, then value heads.
    pub(super) query_key_value: Weight,
    pub(super) out: Weight,
    pub(super) query_heads: usize,
    pub(super) kv_heads: usize,
    pub(super) key_dim: usize,
    pub(super) value_dim: usize,
    pub(super) window: Option<usize>,
}

#[derive(Debug)]
pub(super) struct LatentMixer {
    /// For each head its unrotated rows, then its rotated rows.
    pub(super) query: Weight,
    /// Rows of the latent, then of the shared rotated key.
    pub(super) compress: Weight,
    pub(super) latent_norm: Vec<f32>,
    /// For each head: an unrotated query to the latent's space.
    pub(super) query_to_latent: Vec<Weight>,
    /// For each head: the latent to a value.
    pub(super) latent_to_value: Vec<Weight>,
    pub(super) out: Weight,
    pub(super) latent_dim: usize,
    pub(super) rope_dim: usize,
    pub(super) nope_dim: usize,
}

impl Layer {
    /// Runs the tokens of one step, the first of which stands at `start`; `x` is the residual
    /// stream `[rows, hidden]`, changed in place.
    pub(super) fn run(&self, x: &mut [f32], start: usize, epsilon: f32, cache: LayerCache<'_>) {
        let normed = rms_norm(x, &self.attention_norm, epsilon);
        let rows = x.len() / self.attention_norm.len();
        let mixed = match &self.mixer {
            Mixer::Heads(mixer) => mixer.run(&normed, rows, start, &self.rope, cache),
            Mixer::Latent(mixer) => mixer.run(&normed, rows, start, &self.rope, cache, epsilon),
        };
        add(x, &mixed);
        let normed = rms_norm(x, &self.feed_forward_norm, epsilon);
        let inner = gated(&self.gate_up.apply(&normed), self.gate_up.outputs() / 2);
        add(x, &self.down.apply(&inner));
    }

    /// Stores keys and values of the tokens from `start` on, of which `x` is this layer's input,
    /// and nothing more: no attention, so that it needs no token before them.
    pub(super) fn rebuild(&self, x: &[f32], start: usize, epsilon: f32, mut cache: LayerCache<'_>) {
        let normed = rms_norm(x, &self.attention_norm, epsilon);
        match &self.mixer {
            Mixer::Heads(mixer) => {
                let queries = mixer.query_heads * mixer.key_dim;
                let projected = mixer.query_key_value.apply_from(&normed, queries);
                mixer.store(&projected, 0, start, &self.rope, &mut cache);
            }
            Mixer::Latent(mixer) => {
                let compressed = mixer.compress.apply(&normed);
                mixer.store(&compressed, start, &self.rope, &mut cache, epsilon);
            }
        }
    }
}

impl HeadsMixer {
    fn run(
        &self,
        normed: &[f32],
        rows: usize,
        start: usize,
        rope: &Rope,
        mut cache: LayerCache<'_>,
    ) -> Vec<f32> {
        let projected = self.query_key_value.apply(normed);
        self.store(
            &projected,
            self.query_heads * self.key_dim,
            start,
            rope,
            &mut cache,
        );
        let queries = self.queries(&projected, rows, start, rope);
        let geometry = Geometry {
            kv_heads: self.kv_heads,
            group: self.query_heads / self.kv_heads,
            key_dim: self.key_dim,
            value_dim: self.value_dim,
            window: self.window,
            rows,
            start,
        };
        let attended = attend(&queries, &geometry, cache.prepare(start + rows));
        self.out.apply(&attended)
    }

    /// Rotates and stores keys and values, before which `skip` numbers stand in each row.
    fn store(
        &self,
        projected: &[f32],
        skip: usize,
        start: usize,
        rope: &Rope,
        cache: &mut LayerCache<'_>,
    ) {
        let key_width = self.kv_heads * self.key_dim;
        let value_width = self.kv_heads * self.value_dim;
        let rows = projected.chunks_exact(skip + key_width + value_width);
        let mut keys = Vec::with_capacity(rows.len() * key_width);
        let mut values = Vec::with_capacity(rows.len() * value_width);
        for (row, projected) in rows.enumerate() {
            let (_, key_value) = projected.split_at(skip);
            let (key, value) = key_value.split_at(key_width);
            let at = keys.len();
            keys.extend_from_slice(key);
            let stored = keys.get_mut(at..).unwrap_or_default();
            stored
                .chunks_exact_mut(self.key_dim)
                .for_each(|head| rope.turn(head, start + row));
            values.extend_from_slice(value);
        }
        cache.put(start, &keys, &values);
    }

    /// The queries of each KV head, rotated and scaled.
    fn queries(&self, projected: &[f32], rows: usize, start: usize, rope: &Rope) -> Vec<Vec<f32>> {
        let query_width = self.query_heads * self.key_dim;
        let row_width = query_width + self.kv_heads * (self.key_dim + self.value_dim);
        let scale = inverse_square_root(self.key_dim);
        let group = self.query_heads / self.kv_heads;
        let mut queries = vec![vec![0.0; group * rows * self.key_dim]; self.kv_heads];
        for (row, projected) in projected.chunks_exact(row_width).enumerate() {
            let (query, _) = projected.split_at(query_width);
            let heads = query.chunks_exact(self.key_dim * group);
            for (heads, stacked) in heads.zip(&mut queries) {
                let places = stacked
                    .chunks_exact_mut(self.key_dim)
                    .skip(row)
                    .step_by(rows);
                for (head, place) in heads.chunks_exact(self.key_dim).zip(places) {
                    place.copy_from_slice(head);
                    rope.turn(place, start + row);
                    place.iter_mut().for_each(|value| *value *= scale);
                }
            }
        }
        queries
    }
}

impl LatentMixer {
    fn run(
        &self,
        normed: &[f32],
        rows: usize,
        start: usize,
        rope: &Rope,
        mut cache: LayerCache<'_>,
        epsilon: f32,
    ) -> Vec<f32> {
        let query = self.query.apply(normed);
        self.store(
            &self.compress.apply(normed),
            start,
            rope,
            &mut cache,
            epsilon,
        );
        let queries = self.absorbed_queries(&query, rows, start, rope);
        let geometry = Geometry {
            kv_heads: 1,
            group: self.query_to_latent.len(),
            key_dim: self.latent_dim + self.rope_dim,
            value_dim: self.latent_dim,
            window: None,
            rows,
            start,
        };
        let attended = attend(&[queries], &geometry, cache.prepare(start + rows));
        self.rebuild_values(&attended, rows)
    }

    /// Norms the latent, rotates the shared key, stores both.
    fn store(
        &self,
        compressed: &[f32],
        start: usize,
        rope: &Rope,
        cache: &mut LayerCache<'_>,
        epsilon: f32,
    ) {
        let (mut latents, mut rotated) = (Vec::new(), Vec::new());
        for (row, compressed) in compressed
            .chunks_exact(self.latent_dim + self.rope_dim)
            .enumerate()
        {
            let (latent, key) = compressed.split_at(self.latent_dim);
            latents.extend_from_slice(latent);
            let mut key = key.to_vec();
            rope.turn(&mut key, start + row);
            rotated.extend(key);
        }
        cache.put(
            start,
            &rms_norm(&latents, &self.latent_norm, epsilon),
            &rotated,
        );
    }

    /// Queries in the space of the cached latent and rotated key: `[heads * rows, ...]`.
    fn absorbed_queries(&self, query: &[f32], rows: usize, start: usize, rope: &Rope) -> Vec<f32> {
        let head_width = self.nope_dim + self.rope_dim;
        let heads = self.query_to_latent.len();
        let scale = inverse_square_root(head_width);
        let mut stacked = Vec::with_capacity(heads * rows * (self.latent_dim + self.rope_dim));
        for (head, to_latent) in self.query_to_latent.iter().enumerate() {
            let of_head = || query.chunks_exact(head_width).skip(head).step_by(heads);
            let unrotated = of_head()
                .flat_map(|q| q.iter().take(self.nope_dim))
                .copied();
            let absorbed = to_latent.apply(&unrotated.collect::<Vec<_>>());
            for (row, (q, absorbed)) in of_head()
                .zip(absorbed.chunks_exact(self.latent_dim))
                .enumerate()
            {
                let mut rotated: Vec<f32> = q.iter().skip(self.nope_dim).copied().collect();
                rope.turn(&mut rotated, start + row);
                stacked.extend(absorbed.iter().chain(&rotated).map(|value| value * scale));
            }
        }
        stacked
    }

    /// From mixed latents `[rows, heads, latent_dim]` through each head's values to the output.
    fn rebuild_values(&self, attended: &[f32], rows: usize) -> Vec<f32> {
        let heads = self.latent_to_value.len();
        let value_dim = self.latent_to_value.first().map_or(0, Weight::outputs);
        let mut values = vec![0.0; rows * heads * value_dim];
        for (head, to_value) in self.latent_to_value.iter().enumerate() {
            let of_head = attended
                .chunks_exact(self.latent_dim)
                .skip(head)
                .step_by(heads);
            let rebuilt = to_value.apply(&of_head.flatten().copied().collect::<Vec<_>>());
            let places = values.chunks_exact_mut(value_dim).skip(head).step_by(heads);
            for (place, value) in places.zip(rebuilt.chunks_exact(value_dim)) {
                place.copy_from_slice(value);
            }
        }
        self.out.apply(&values)
    }
}

#[expect(clippy::cast_precision_loss, reason = "widths are far below 2^24")]
fn inverse_square_root(width: usize) -> f32 {
    1.0 / (width as f32).sqrt()
}

#[cfg(test)]
mod tests;
