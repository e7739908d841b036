//! Fisher information: how much an error of cached keys and values costs.
//!
//! Upstairs:   `export` writes it for calibration.
//! Downstairs: `engine::Backward`.
//!
//! Wanted is, for every layer and head, the mean over predicted positions of the sum over context
//! tokens of `g g^T`, where `g` is the gradient of -log p(next token) with respect to the key
//! (before RoPE) or value of one token, and the next token is drawn from the model's own
//! prediction: that matrix is the second order of the KL divergence. One backward pass a position
//! and token of the vocabulary would be exact and never end. Instead each pass goes back once from
//! a random gradient of all scores whose covariance is that of the scores' own Fisher matrix,
//! `diag(p) - p p^T` at every position and nothing across positions:
//!
//! ```text
//!   z = sqrt(p) * e  -  p * sum(sqrt(p) * e),   e random signs, one a position and word
//! ```
//!
//! The outer product of what arrives at a cached vector then has the sum of all positions' as its
//! expectation. Unlike drawn words, rare ones that matter much do not come by luck.
//!
//! In one pass the cached vectors of a head get nearly the same direction, that of the tokens that
//! read them, so what counts is the number of passes: many over few targets tell more than few
//! over many, at the same price.
//!
//! Not here on purpose: shrinking, scaling and use of the matrices; that is calibration.

use std::sync::Arc;

use kvtier_benches::report::Problem;
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{RngCore, SeedableRng};
use rayon::prelude::*;

use super::subject::{Tokens, prefilled};
use crate::engine::{Attention, Backward, KeysValues, Model, ModelConfig, context};

/// How much is spent on it, and over which part of the documents.
#[derive(Debug, Clone, Copy)]
pub struct FisherOptions {
    /// Tokens of the context.
    pub context: usize,
    /// Tokens after it that predict.
    pub targets: usize,
    /// Tokens at the front that are kept exact and do not count.
    pub sinks: usize,
    /// Random gradients for each document.
    pub draws: u64,
}

/// Second moments of one layer's gradients: for each head `[width, width]`.
#[derive(Debug, Clone)]
pub struct LayerFisher {
    /// Of keys before RoPE.
    pub keys: Vec<Vec<f32>>,
    /// Of values.
    pub values: Vec<Vec<f32>>,
}

/// The matrices of a model.
#[derive(Debug, Clone)]
pub struct Fisher {
    /// One entry a layer.
    pub layers: Vec<LayerFisher>,
    /// Context tokens that each sum ran over.
    pub tokens: usize,
}

/// Estimates the matrices over `documents`; `tell` hears of each document done.
pub fn fisher(
    model: &Arc<Model>,
    documents: &[Tokens],
    options: FisherOptions,
    tell: &dyn Fn(&str),
) -> Result<Fisher, Problem> {
    let config = model.config();
    let backward = Backward::new(Arc::clone(model))?;
    let mut layers = empty(config);
    let mut predicted = 0;
    for (number, document) in (0..).zip(documents) {
        let (prompt, rest) = document
            .ids
            .get(..options.context + options.targets)
            .and_then(|ids| ids.split_at_checked(options.context))
            .ok_or("a document ends before the targets")?;
        let sequence = prefilled(model, prompt, 0)?;
        let cached = context(model, sequence.cache(), options.context)?;
        let tape = backward.forward(&cached, rest)?;
        for draw in 0..options.draws {
            let seed = number * options.draws + draw;
            let scores = random_scores(tape.logits(), config.vocab, seed);
            let gradients = backward.gradients(&tape, &scores)?;
            let all = layers.par_iter_mut().zip(&gradients).zip(&config.layers);
            all.for_each(|((into, gradient), attention)| {
                absorb(into, gradient, attention, options.sinks);
            });
            predicted += rest.len();
        }
        tell(&document.name);
    }
    #[expect(clippy::cast_precision_loss, reason = "counts are far below 2^24")]
    let scale = 1.0 / predicted.max(1) as f32;
    let heads = layers
        .iter_mut()
        .flat_map(|layer| layer.keys.iter_mut().chain(&mut layer.values));
    heads.flatten().for_each(|value| *value *= scale);
    Ok(Fisher {
        layers,
        tokens: options.context.saturating_sub(options.sinks),
    })
}

fn empty(config: &ModelConfig) -> Vec<LayerFisher> {
    let of = |attention: &Attention| {
        let [keys, values] = attention
            .parts()
            .map(|part| vec![vec![0.0; part.width * part.width]; part.heads]);
        LayerFisher { keys, values }
    };
    config.layers.iter().map(of).collect()
}

/// The random gradient of the file header, for each row of `logits`.
fn random_scores(logits: &[f32], vocab: usize, seed: u64) -> Vec<f32> {
    let mut out = vec![0.0; logits.len()];
    let rows = out.par_chunks_mut(vocab).zip(logits.par_chunks(vocab));
    rows.enumerate().for_each(|(row, (out, logits))| {
        let mut random = ChaCha8Rng::seed_from_u64(seed);
        random.set_stream(u64::try_from(row).unwrap_or(u64::MAX));
        let top = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        let sum: f64 = logits
            .iter()
            .map(|score| f64::from(*score - top).exp())
            .sum();
        let mut signs = 0_u32;
        let mut along = 0.0_f64;
        for (at, (out, score)) in out.iter_mut().zip(logits).enumerate() {
            if at.is_multiple_of(32) {
                signs = random.next_u32();
            }
            let root = (f64::from(*score - top).exp() / sum).sqrt();
            let signed = if signs & 1 == 0 { root } else { -root };
            signs >>= 1;
            along += signed;
            *out = narrow(signed);
        }
        // The root is there with its sign; its square is the probability.
        for out in out {
            *out -= narrow(f64::from(*out) * f64::from(*out) * along);
        }
    });
    out
}

/// Adds the outer products of all tokens behind the sinks.
fn absorb(into: &mut LayerFisher, gradient: &KeysValues, attention: &Attention, sinks: usize) {
    let parts = attention.parts();
    let both = [
        (&mut into.keys, &gradient.keys),
        (&mut into.values, &gradient.values),
    ];
    for ((heads, gradient), part) in both.into_iter().zip(parts) {
        for (head, matrix) in heads.iter_mut().enumerate() {
            let vectors = gradient
                .chunks_exact(part.width)
                .skip(sinks * part.heads + head);
            for vector in vectors.step_by(part.heads) {
                for (row, a) in matrix.chunks_exact_mut(part.width).zip(vector) {
                    row.iter_mut()
                        .zip(vector)
                        .for_each(|(sum, b)| *sum += a * b);
                }
            }
        }
    }
}

#[expect(
    clippy::cast_possible_truncation,
    reason = "rounding to f32 is the purpose"
)]
const fn narrow(x: f64) -> f32 {
    x as f32
}
