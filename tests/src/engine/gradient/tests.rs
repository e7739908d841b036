//! Tests of the gradients against differences of the forward pass.
#![allow(
    clippy::cast_possible_truncation,
    reason = "a panic is the failure report, and tests compare small numbers"
)]

use std::sync::Arc;

use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{RngCore, SeedableRng};

use super::super::config::{Attention, ModelConfig};
use super::super::sequence::{Sequence, SequenceOptions};
use super::*;

const CONTEXT: usize = 21;
const ROWS: usize = 9;

fn heads(query_heads: usize, kv_heads: usize, key_dim: usize, value_dim: usize) -> Attention {
    Attention::Heads {
        query_heads,
        kv_heads,
        key_dim,
        value_dim,
        window: None,
    }
}

fn window(window: usize) -> Attention {
    Attention::Heads {
        query_heads: 4,
        kv_heads: 2,
        key_dim: 8,
        value_dim: 8,
        window: Some(window),
    }
}

fn model(layers: Vec<Attention>) -> Arc<Model> {
    let config = ModelConfig {
        name: "tiny".into(),
        vocab: 61,
        hidden: 24,
        intermediate: 40,
        rope_theta: 10_000.0,
        norm_epsilon: 1e-5,
        max_positions: 64,
        layers,
    };
    Arc::new(Model::random(config, 5).unwrap())
}

fn tokens() -> Vec<u32> {
    (0..CONTEXT + ROWS)
        .map(|at| (at * 37 % 61) as u32)
        .collect()
}

/// Uniform numbers in -1 .. 1.
struct Noise(ChaCha8Rng);

impl Noise {
    fn take(&mut self, count: usize) -> Vec<f32> {
        let mut next = || self.0.next_u32() as f32 / (1_u32 << 31) as f32 - 1.0;
        (0..count).map(|_| next()).collect()
    }
}

fn prefilled(model: &Arc<Model>, tokens: &[u32]) -> Sequence {
    let mut sequence = Sequence::new(Arc::clone(model), SequenceOptions::new(64)).unwrap();
    sequence.prefill(tokens).unwrap();
    sequence
}

/// A weighted sum of all scores, summed precisely.
fn result(tape: &Tape, weights: &[f32]) -> f64 {
    let both = tape.logits().iter().zip(weights);
    both.map(|(a, b)| f64::from(*a) * f64::from(*b)).sum()
}

fn dot(a: &[f32], b: &[f32]) -> f64 {
    a.iter()
        .zip(b)
        .map(|(a, b)| f64::from(*a) * f64::from(*b))
        .sum()
}

/// `cached` with the keys (turned to their positions, as they are cached) or values of one layer
/// moved by `step` along `direction`.
fn moved(
    model: &Model,
    cached: &[KeysValues],
    (layer, key): (usize, bool),
    direction: &[f32],
    step: f32,
) -> Vec<KeysValues> {
    let mut out = cached.to_vec();
    let mut direction = direction.to_vec();
    if key {
        let mixer = super::heads(layer, &model.layers[layer]).unwrap();
        let token = mixer.kv_heads * mixer.key_dim;
        for (at, key) in direction.chunks_exact_mut(mixer.key_dim).enumerate() {
            model.layers[layer]
                .rope
                .turn(key, at * mixer.key_dim / token);
        }
    }
    let target = if key {
        &mut out[layer].keys
    } else {
        &mut out[layer].values
    };
    for (to, by) in target.iter_mut().zip(&direction) {
        *to += by * step;
    }
    out
}

// Goal: the gradient is the gradient, in every layer, for keys and for values.
// Method: the slope along a random direction by a difference of the fourth order, whose error is
// far below that of f32, against the product with the gradient.
#[test]
fn gradients_are_the_slopes_of_the_forward_pass() {
    let shapes = [
        vec![heads(4, 4, 8, 8); 2],
        vec![heads(6, 2, 8, 12); 3],
        vec![heads(4, 1, 12, 8), window(6), heads(2, 2, 8, 8)],
    ];
    let mut noise = Noise(ChaCha8Rng::seed_from_u64(1));
    for layers in shapes {
        let model = model(layers);
        let all = tokens();
        let (prompt, rest) = all.split_at(CONTEXT);
        let sequence = prefilled(&model, prompt);
        let cached = context(&model, sequence.cache(), CONTEXT).unwrap();
        let backward = Backward::new(Arc::clone(&model)).unwrap();
        let tape = backward.forward(&cached, rest).unwrap();
        let weights = noise.take(tape.logits().len());
        let gradients = backward.gradients(&tape, &weights).unwrap();
        assert_eq!(gradients.len(), cached.len());
        for (layer, gradients) in gradients.iter().enumerate() {
            for key in [true, false] {
                let gradient = if key {
                    &gradients.keys
                } else {
                    &gradients.values
                };
                let direction = noise.take(gradient.len());
                let at = |step: f32| {
                    let there = moved(&model, &cached, (layer, key), &direction, step);
                    result(&backward.forward(&there, rest).unwrap(), &weights)
                };
                let h = 0.03;
                let near = at(h) - at(-h);
                let far = at(2.0 * h) - at(-2.0 * h);
                let slope = (8.0 * near - far) / (12.0 * f64::from(h));
                let told = dot(gradient, &direction);
                let size = dot(gradient, gradient).sqrt();
                let off = (slope - told).abs() / size;
                assert!(
                    off < 2e-3,
                    "layer {layer}, key {key}: slope {slope}, gradient says {told}, size {size}"
                );
            }
        }
    }
}

// Goal: G1, the pass that is differentiated is the engine's.
// Method: the same tokens over the same cache; what differs is the rounding of 9 tokens to bf16.
#[test]
fn forward_gives_the_scores_of_the_engine_but_for_rounding() {
    let model = model(vec![heads(6, 2, 8, 8), window(6), heads(4, 4, 8, 12)]);
    let all = tokens();
    let (prompt, rest) = all.split_at(CONTEXT);
    let mut sequence = prefilled(&model, prompt);
    let cached = context(&model, sequence.cache(), CONTEXT).unwrap();
    let backward = Backward::new(Arc::clone(&model)).unwrap();
    let tape = backward.forward(&cached, rest).unwrap();
    let scores = sequence.prefill_scored(rest).unwrap();
    let distance: Vec<f32> = scores
        .iter()
        .zip(tape.logits())
        .map(|(a, b)| a - b)
        .collect();
    let off = (dot(&distance, &distance) / dot(&scores, &scores)).sqrt();
    assert!(off < 0.01, "{off}");
    let first = model.config().vocab;
    let off = (dot(&distance[..first], &distance[..first])).sqrt();
    assert!(off < 0.1, "{off}");
}

#[test]
fn gradients_do_not_depend_on_rows_that_see_nothing_of_a_token() {
    let model = model(vec![window(4)]);
    let all = tokens();
    let (prompt, rest) = all.split_at(CONTEXT);
    let sequence = prefilled(&model, prompt);
    let cached = context(&model, sequence.cache(), CONTEXT).unwrap();
    let backward = Backward::new(Arc::clone(&model)).unwrap();
    let tape = backward.forward(&cached, rest).unwrap();
    let gradients = backward
        .gradients(&tape, &vec![1.0; tape.logits().len()])
        .unwrap();
    let values = &gradients[0].values;
    let (out_of_sight, seen) = values.split_at((CONTEXT - 3) * 16);
    assert!(out_of_sight.iter().all(|value| *value == 0.0));
    assert!(seen.iter().all(|value| *value != 0.0));
}

#[test]
fn backward_refuses_what_it_cannot_answer_for() {
    let latent = Attention::Latent {
        query_heads: 2,
        latent_dim: 8,
        rope_dim: 4,
        nope_dim: 8,
        value_dim: 8,
    };
    let problem = Backward::new(model(vec![latent])).unwrap_err().to_string();
    assert!(problem.contains("accepted: grouped heads"), "{problem}");

    let model = model(vec![heads(4, 2, 8, 8); 2]);
    let sequence = prefilled(&model, &tokens()[..CONTEXT]);
    let mut cached = context(&model, sequence.cache(), CONTEXT).unwrap();
    let backward = Backward::new(model).unwrap();
    let tape = backward.forward(&cached, &[1, 2]).unwrap();
    assert!(backward.gradients(&tape, &[0.0; 5]).is_err());
    assert!(backward.forward(&cached, &[9; 60]).is_err(), "positions");
    cached[1].keys.pop();
    assert!(backward.forward(&cached, &[1, 2]).is_err(), "a torn layer");
    cached.pop();
    assert!(
        backward.forward(&cached, &[1, 2]).is_err(),
        "a missing layer"
    );
}
