//! Tests of attention against its definition, in f64.

use half::bf16;

use super::*;
use crate::engine::config::{Attention, CacheDtype};

/// Numbers that look random and repeat; exact in bf16.
fn numbers(count: usize, seed: u32) -> Vec<f32> {
    let mut state = seed;
    let mut next = || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        bf16::from_f32(f32::from(u16::try_from(state >> 16).unwrap()) / 16_384.0 - 2.0).to_f32()
    };
    (0..count).map(|_| next()).collect()
}

fn stored(values: &[f32]) -> Vec<u8> {
    values
        .iter()
        .flat_map(|value| bf16::from_f32(*value).to_le_bytes())
        .collect()
}

/// The definition: every query row against the keys it sees; `key(head, token)` is a row.
fn naive(
    geometry: &Geometry,
    queries: &[Vec<f32>],
    key: impl Fn(usize, usize) -> Vec<f32>,
    value: impl Fn(usize, usize) -> Vec<f32>,
) -> Vec<f64> {
    let mut out = Vec::new();
    for row in 0..geometry.rows {
        for head in 0..geometry.kv_heads * geometry.group {
            let (kv_head, member) = (head / geometry.group, head % geometry.group);
            let at = (member * geometry.rows + row) * geometry.key_dim;
            let query = &queries[kv_head][at..at + geometry.key_dim];
            let position = geometry.start + row;
            let first = geometry
                .window
                .map_or(0, |window| (position + 1).saturating_sub(window));
            let weight = |token| {
                let key = key(kv_head, token);
                let score = query
                    .iter()
                    .zip(&key)
                    .map(|(q, k)| f64::from(*q) * f64::from(*k));
                score.sum::<f64>().exp()
            };
            let weights: Vec<f64> = (first..=position).map(weight).collect();
            let sum: f64 = weights.iter().sum();
            let mut mixed = vec![0.0; geometry.value_dim];
            for (token, weight) in (first..=position).zip(&weights) {
                for (mixed, value) in mixed.iter_mut().zip(value(kv_head, token)) {
                    *mixed += weight / sum * f64::from(value);
                }
            }
            out.extend(mixed);
        }
    }
    out
}

fn assert_close(got: &[f32], expected: &[f64]) {
    assert_eq!(got.len(), expected.len());
    for (index, (got, expected)) in got.iter().zip(expected).enumerate() {
        let off = (f64::from(*got) - expected).abs();
        assert!(off < 1e-4, "number {index}: {got} instead of {expected}");
    }
}

#[test]
fn attend_is_the_definition_for_grouped_heads_and_windows_over_several_tiles() {
    let (kv_heads, key_dim, value_dim, group) = (2, 12, 20, 3);
    for (start, rows, window) in [
        (0, 5, None),
        (300, 50, None),
        (510, 1, None),
        (300, 50, Some(40)),
        (520, 3, Some(300)),
    ] {
        let attention = Attention::Heads {
            query_heads: kv_heads * group,
            kv_heads,
            key_dim,
            value_dim,
            window,
        };
        let tokens = start + rows;
        let keys = numbers(tokens * kv_heads * key_dim, 1);
        let values = numbers(tokens * kv_heads * value_dim, 2);
        let mut prepared = Prepared::new(&attention, tokens + 9);
        let parts = (stored(&keys), stored(&values));
        let parts = [
            (parts.0.as_slice(), kv_heads * key_dim * 2),
            (&parts.1, kv_heads * value_dim * 2),
        ];
        prepared.raise(tokens / 2, CacheDtype::Bf16, parts);
        prepared.raise(tokens, CacheDtype::Bf16, parts);
        let geometry = Geometry {
            kv_heads,
            group,
            key_dim,
            value_dim,
            window,
            rows,
            start,
        };
        let queries: Vec<_> = (3..5)
            .map(|seed| numbers(group * rows * key_dim, seed))
            .collect();

        let got = attend(&queries, &geometry, &prepared);

        let row = |all: &[f32], width: usize, head: usize, token: usize| {
            all[(token * kv_heads + head) * width..][..width].to_vec()
        };
        let key = |head, token| row(&keys, key_dim, head, token);
        let value = |head, token| row(&values, value_dim, head, token);
        assert_close(&got, &naive(&geometry, &queries, key, value));
    }
}

#[test]
fn attend_is_the_definition_for_latents() {
    let (latent_dim, rope_dim, heads, rows, start) = (20, 6, 3, 4, 270);
    let attention = Attention::Latent {
        query_heads: heads,
        latent_dim,
        rope_dim,
        nope_dim: 8,
        value_dim: 8,
    };
    let tokens = start + rows;
    let (latents, ropes) = (
        numbers(tokens * latent_dim, 1),
        numbers(tokens * rope_dim, 2),
    );
    let mut prepared = Prepared::new(&attention, tokens);
    let parts = (stored(&latents), stored(&ropes));
    let parts = [
        (parts.0.as_slice(), latent_dim * 2),
        (parts.1.as_slice(), rope_dim * 2),
    ];
    prepared.raise(tokens, CacheDtype::Bf16, parts);
    let geometry = Geometry {
        kv_heads: 1,
        group: heads,
        key_dim: latent_dim + rope_dim,
        value_dim: latent_dim,
        window: None,
        rows,
        start,
    };
    let queries = vec![numbers(heads * rows * geometry.key_dim, 3)];

    let got = attend(&queries, &geometry, &prepared);

    let latent = |token: usize| latents[token * latent_dim..][..latent_dim].to_vec();
    let key = |_, token: usize| {
        [
            latent(token),
            ropes[token * rope_dim..][..rope_dim].to_vec(),
        ]
        .concat()
    };
    assert_close(
        &got,
        &naive(&geometry, &queries, key, |_, token| latent(token)),
    );
}
