//! Tests of latent attention against the form that rebuilds every key and value.

use super::*;
use crate::engine::Part;
use crate::engine::cache::KvCache;
use crate::engine::config::{Attention, CacheDtype, ModelConfig};

const HEADS: usize = 2;
const LATENT: usize = 12;
const ROPE: usize = 4;
const NOPE: usize = 6;
const VALUE: usize = 5;
const HIDDEN: usize = 16;
const ROWS: usize = 9;

fn numbers(count: usize, seed: usize) -> Vec<f32> {
    (0..count)
        .map(|i| f32::from(u8::try_from((i * 37 + seed * 101 + i * i * 11) % 251).unwrap()))
        .map(|n| n / 125.0 - 1.0)
        .collect()
}

/// `rows` times a row-major `[outputs, inputs]` matrix.
fn times(rows: &[f32], matrix: &[f32], inputs: usize) -> Vec<f32> {
    let apply = |row: &[f32]| {
        let outputs = matrix
            .chunks(inputs)
            .map(|w| w.iter().zip(row).map(|(a, b)| a * b).sum());
        outputs.collect::<Vec<f32>>()
    };
    rows.chunks(inputs).flat_map(apply).collect()
}

fn stored(cache: &KvCache, part: Part) -> Vec<f32> {
    let bytes = cache.bytes(0, part, 0..ROWS).unwrap();
    bytes
        .chunks(2)
        .map(|b| half::bf16::from_le_bytes([b[0], b[1]]).to_f32())
        .collect()
}

// Goal: attending in the space of the cached latent is the same as rebuilding keys and values of
// every head from it, which is how the method is defined.
#[test]
fn latent_attention_equals_attention_over_rebuilt_keys_and_values() {
    let (query, compress) = (
        numbers(HEADS * (NOPE + ROPE) * HIDDEN, 1),
        numbers((LATENT + ROPE) * HIDDEN, 2),
    );
    let to_latent: Vec<_> = (0..HEADS).map(|h| numbers(LATENT * NOPE, 10 + h)).collect();
    let to_value: Vec<_> = (0..HEADS)
        .map(|h| numbers(VALUE * LATENT, 20 + h))
        .collect();
    let out = numbers(HIDDEN * HEADS * VALUE, 3);
    let mixer = LatentMixer {
        query: Weight::new(&query, HIDDEN),
        compress: Weight::new(&compress, HIDDEN),
        latent_norm: vec![1.0; LATENT],
        query_to_latent: to_latent.iter().map(|w| Weight::new(w, NOPE)).collect(),
        latent_to_value: to_value.iter().map(|w| Weight::new(w, LATENT)).collect(),
        out: Weight::new(&out, HEADS * VALUE),
        latent_dim: LATENT,
        rope_dim: ROPE,
        nope_dim: NOPE,
    };
    let attention = Attention::Latent {
        query_heads: HEADS,
        latent_dim: LATENT,
        rope_dim: ROPE,
        nope_dim: NOPE,
        value_dim: VALUE,
    };
    let config = ModelConfig {
        name: String::new(),
        vocab: 1,
        hidden: HIDDEN,
        intermediate: 1,
        rope_theta: 100.0,
        norm_epsilon: 1e-5,
        max_positions: ROWS,
        layers: vec![attention],
    };
    let rope = Rope::new(ROPE, ROWS, config.rope_theta);
    let mut cache = KvCache::new(&config, CacheDtype::Bf16, ROWS, false);
    let input = numbers(ROWS * HIDDEN, 4);

    let got = mixer.run(&input, ROWS, 0, &rope, cache.layer_mut(0).unwrap(), 1e-5);

    let (latents, ropes) = (stored(&cache, Part::Latent), stored(&cache, Part::Rope));
    let queries = times(&input, &query, HIDDEN);
    let mut mixed = Vec::new();
    for row in 0..ROWS {
        for head in 0..HEADS {
            let mut q = queries[(row * HEADS + head) * (NOPE + ROPE)..][..NOPE + ROPE].to_vec();
            rope.turn(&mut q[NOPE..], row);
            let weight = |token: usize| {
                let latent = &latents[token * LATENT..][..LATENT];
                let key = (0..NOPE).map(|n| {
                    (0..LATENT)
                        .map(|l| to_latent[head][l * NOPE + n] * latent[l])
                        .sum()
                });
                let key: Vec<f32> = key
                    .chain(ropes[token * ROPE..][..ROPE].iter().copied())
                    .collect();
                let score: f32 = q.iter().zip(&key).map(|(a, b)| a * b).sum();
                (score / 10.0_f32.sqrt()).exp()
            };
            let weights: Vec<f32> = (0..=row).map(weight).collect();
            let sum: f32 = weights.iter().sum();
            let mut value = [0.0; VALUE];
            for (token, weight) in weights.iter().enumerate() {
                let rebuilt = times(
                    &latents[token * LATENT..][..LATENT],
                    &to_value[head],
                    LATENT,
                );
                value
                    .iter_mut()
                    .zip(&rebuilt)
                    .for_each(|(v, r)| *v += weight / sum * r);
            }
            mixed.extend(value);
        }
    }
    for (got, expected) in got.iter().zip(times(&mixed, &out, HEADS * VALUE)) {
        assert!((got - expected).abs() < 1e-4, "{got} instead of {expected}");
    }
}
