//! Attention of a run of tokens over a context and themselves, forwards and back.
//!
//! Upstairs:   `gradient`.
//! Downstairs: `matrix` for every product, [`steps`] for the softmax.
//!
//! The weights of all rows are kept whole: a context of a thousand tokens fits, and going back
//! needs every one of them. Query heads that share a KV head are stacked, as in the engine.
//!
//! Not here on purpose: tiles. The engine's attention has them, for long contexts.
//!
//! [`steps`]: super::steps

use std::ops::Range;

use rayon::prelude::*;

use super::super::layer::HeadsMixer;
use super::super::math::Rope;
use super::super::matrix::Weight;
use super::steps::{softmax, softmax_back, transpose};
use super::{KeysValues, Tape};

/// What the tokens bring themselves.
pub(super) struct Own {
    /// Queries, keys and values side by side, before RoPE: `[rows, query heads + 2 kv heads]`.
    pub(super) projected: Vec<f32>,
    /// Position of the first of them.
    pub(super) start: usize,
}

/// What one KV head had.
#[derive(Debug)]
pub(super) struct Head {
    /// `[group * rows, key_dim]`, group-major, rotated and scaled.
    queries: Vec<f32>,
    /// `[context + rows, key_dim]`, rotated.
    keys: Vec<f32>,
    /// `[context + rows, value_dim]`.
    values: Vec<f32>,
    /// `[group * rows, context + rows]`.
    weights: Vec<f32>,
}

/// Where things lie in a row of queries, keys and values side by side.
struct Places {
    key_dim: usize,
    value_dim: usize,
    kv_heads: usize,
    group: usize,
}

impl Places {
    const fn of(mixer: &HeadsMixer) -> Self {
        Self {
            key_dim: mixer.key_dim,
            value_dim: mixer.value_dim,
            kv_heads: mixer.kv_heads,
            group: mixer.query_heads / mixer.kv_heads,
        }
    }

    const fn width(&self) -> usize {
        self.kv_heads * (self.group * self.key_dim + self.key_dim + self.value_dim)
    }

    const fn query(&self, head: usize, member: usize) -> Range<usize> {
        let from = (head * self.group + member) * self.key_dim;
        from..from + self.key_dim
    }

    const fn key(&self, head: usize) -> Range<usize> {
        let from = (self.kv_heads * self.group + head) * self.key_dim;
        from..from + self.key_dim
    }

    const fn value(&self, head: usize) -> Range<usize> {
        let from = self.kv_heads * (self.group + 1) * self.key_dim + head * self.value_dim;
        from..from + self.value_dim
    }
}

/// Attends. Returns what going back needs and `[rows, query_heads * value_dim]`.
pub(super) fn forward(
    mixer: &HeadsMixer,
    rope: &Rope,
    context: &KeysValues,
    own: &Own,
) -> (Vec<Head>, Vec<f32>) {
    let places = Places::of(mixer);
    let rows = own.projected.len() / places.width();
    let each = (0..places.kv_heads).into_par_iter().map(|head| {
        let mut one = gather(&places, rope, context, own, head);
        let mut weights = Weight::new(&one.keys, places.key_dim).apply(&one.queries);
        for (stacked, row) in weights.chunks_exact_mut(own.start + rows).enumerate() {
            let seen = own.start + stacked % rows + 1;
            let from = mixer.window.map_or(0, |window| seen.saturating_sub(window));
            softmax(row, &(from..seen));
        }
        let columns = transpose(&one.values, places.value_dim);
        let mixed = Weight::new(&columns, own.start + rows).apply(&weights);
        one.weights = weights;
        (one, mixed)
    });
    let (heads, mixed): (Vec<Head>, Vec<Vec<f32>>) = each.unzip();
    let mut out = Vec::with_capacity(rows * mixer.query_heads * places.value_dim);
    for row in 0..rows {
        for head in &mixed {
            let of_row = head.chunks_exact(places.value_dim).skip(row).step_by(rows);
            out.extend(of_row.flatten());
        }
    }
    (heads, out)
}

/// The queries of one KV head, and its keys and values, those of the context first.
#[expect(
    clippy::indexing_slicing,
    reason = "a head or token too many is a bug here, never an input"
)]
fn gather(places: &Places, rope: &Rope, context: &KeysValues, own: &Own, head: usize) -> Head {
    let scale = scale(places.key_dim);
    let rows = || (own.start..).zip(own.projected.chunks_exact(places.width()));
    let mut queries = Vec::new();
    for member in 0..places.group {
        for (position, row) in rows() {
            let at = queries.len();
            queries.extend_from_slice(&row[places.query(head, member)]);
            let query = &mut queries[at..];
            rope.turn(query, position);
            query.iter_mut().for_each(|value| *value *= scale);
        }
    }
    let of_head = |all: &[f32], width| -> Vec<f32> {
        let rows = all.chunks_exact(width).skip(head);
        rows.step_by(places.kv_heads).flatten().copied().collect()
    };
    let mut keys = of_head(&context.keys, places.key_dim);
    let mut values = of_head(&context.values, places.value_dim);
    for (position, row) in rows() {
        let at = keys.len();
        keys.extend_from_slice(&row[places.key(head)]);
        rope.turn(&mut keys[at..], position);
        values.extend_from_slice(&row[places.value(head)]);
    }
    Head {
        queries,
        keys,
        values,
        weights: Vec::new(),
    }
}

/// What one KV head depends on.
struct HeadBack {
    queries: Vec<f32>,
    keys: Vec<f32>,
    values: Vec<f32>,
}

/// Backwards: from the gradient of the attended rows (`[rows, query_heads * value_dim]`) to that
/// of the context's keys (before RoPE) and values, and of the rows' own projection.
pub(super) fn backward(
    mixer: &HeadsMixer,
    rope: &Rope,
    heads: &[Head],
    mixed: &[f32],
    tape: &Tape,
) -> (KeysValues, Vec<f32>) {
    let places = Places::of(mixer);
    let each = heads.par_iter().enumerate().map(|(index, head)| {
        let mut stacked = Vec::with_capacity(places.group * tape.rows * places.value_dim);
        for member in 0..places.group {
            let of_member = mixed
                .chunks_exact(places.value_dim)
                .skip(index * places.group + member);
            stacked.extend(of_member.step_by(mixer.query_heads).flatten());
        }
        head.backward(&places, &stacked)
    });
    let mut each: Vec<HeadBack> = each.collect();
    for head in &mut each {
        let keys = head.keys.chunks_exact_mut(places.key_dim);
        keys.enumerate()
            .for_each(|(position, key)| rope.turn_back(key, position));
        let queries = head.queries.chunks_exact_mut(places.key_dim);
        queries.enumerate().for_each(|(stacked, query)| {
            rope.turn_back(query, tape.context + stacked % tape.rows);
            let scale = scale(places.key_dim);
            query.iter_mut().for_each(|value| *value *= scale);
        });
    }
    scatter(&places, &each, tape)
}

impl Head {
    fn backward(&self, places: &Places, mixed: &[f32]) -> HeadBack {
        let rows = mixed.len() / places.value_dim;
        let tokens = self.values.len() / places.value_dim;
        let by_token = |table: &[f32], rows_of: &[f32], width: usize| {
            Weight::new(&transpose(rows_of, width), rows).apply(&transpose(table, tokens))
        };
        let mut scores = Weight::new(&self.values, places.value_dim).apply(mixed);
        let values = by_token(&self.weights, mixed, places.value_dim);
        softmax_back(&self.weights, &mut scores, tokens);
        let columns = transpose(&self.keys, places.key_dim);
        HeadBack {
            queries: Weight::new(&columns, tokens).apply(&scores),
            keys: by_token(&scores, &self.queries, places.key_dim),
            values,
        }
    }
}

/// Puts the heads side by side: of the context, and of the rows' own projection.
#[expect(
    clippy::indexing_slicing,
    reason = "a head or token too many is a bug here, never an input"
)]
fn scatter(places: &Places, heads: &[HeadBack], tape: &Tape) -> (KeysValues, Vec<f32>) {
    let (key_dim, value_dim) = (places.key_dim, places.value_dim);
    let mut keys = Vec::with_capacity(tape.context * places.kv_heads * key_dim);
    let mut values = Vec::with_capacity(tape.context * places.kv_heads * value_dim);
    for token in 0..tape.context {
        for head in heads {
            keys.extend_from_slice(&head.keys[token * key_dim..][..key_dim]);
            values.extend_from_slice(&head.values[token * value_dim..][..value_dim]);
        }
    }
    let mut own = vec![0.0; tape.rows * places.width()];
    for (row, out) in own.chunks_exact_mut(places.width()).enumerate() {
        for (index, head) in heads.iter().enumerate() {
            for member in 0..places.group {
                let from = (member * tape.rows + row) * key_dim;
                out[places.query(index, member)]
                    .copy_from_slice(&head.queries[from..from + key_dim]);
            }
            let token = tape.context + row;
            let key = &head.keys[token * key_dim..][..key_dim];
            out[places.key(index)].copy_from_slice(key);
            let value = &head.values[token * value_dim..][..value_dim];
            out[places.value(index)].copy_from_slice(value);
        }
    }
    (KeysValues { keys, values }, own)
}

#[expect(clippy::cast_precision_loss, reason = "widths are far below 2^24")]
fn scale(width: usize) -> f32 {
    1.0 / (width as f32).sqrt()
}
