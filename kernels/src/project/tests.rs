//! Tests of the projection against its definition, written out for one number at a time.
//!
//! Upstairs:   nobody.
//! Downstairs: `project`. That it is what an engine computes is tested beside the reference engine.

use super::*;
use rand::{Rng as _, SeedableRng as _};
use rand_chacha::ChaCha8Rng;

const INPUTS: usize = 24;
const HEADS: usize = 3;
const K_DIM: usize = 8;
const V_DIM: usize = 5;
const TOKENS: usize = 7;

fn numbers(random: &mut ChaCha8Rng, count: usize) -> Vec<f32> {
    (0..count).map(|_| random.random_range(-1.0..1.0)).collect()
}

/// Everything a model may have: biases, norms of keys, RoPE of a part of the head.
fn weights(seed: u64, rotate_half: bool) -> Weights {
    let random = &mut ChaCha8Rng::seed_from_u64(seed);
    Weights {
        norm: Norm {
            gain: numbers(random, INPUTS),
            epsilon: 1e-5,
        },
        k: Heads {
            weights: numbers(random, HEADS * K_DIM * INPUTS),
            bias: numbers(random, HEADS * K_DIM),
            dim: K_DIM,
        },
        v: Heads {
            weights: numbers(random, HEADS * V_DIM * INPUTS),
            bias: Vec::new(),
            dim: V_DIM,
        },
        k_norm: Some(Norm {
            gain: numbers(random, K_DIM),
            epsilon: 1e-6,
        }),
        rope: Some(Rope::plain(10_000.0, 6, rotate_half)),
    }
}

fn form(element: Element, order: PartOrder) -> Form {
    Form { element, order }
}

fn f32s(values: &[f32]) -> Vec<u8> {
    values.iter().flat_map(|x| x.to_le_bytes()).collect()
}

fn read(bytes: &[u8]) -> Vec<f32> {
    widen(Element::F32, bytes)
}

fn place(token: usize) -> u32 {
    u32::try_from(token).unwrap()
}

/// One key channel by its definition, in double precision.
fn key(weights: &Weights, hidden: &[f32], position: u32, head: usize, channel: usize) -> f64 {
    let norm = |row: &[f64], norm: &Norm| -> Vec<f64> {
        let mean = row.iter().map(|x| x * x).sum::<f64>() / row.len() as f64;
        let scale = 1.0 / (mean + f64::from(norm.epsilon)).sqrt();
        let gains = norm.gain.iter().map(|gain| f64::from(*gain));
        row.iter()
            .zip(gains)
            .map(|(x, gain)| x * scale * gain)
            .collect()
    };
    let hidden: Vec<f64> = hidden.iter().map(|x| f64::from(*x)).collect();
    let hidden = norm(&hidden, &weights.norm);
    let output = |channel: usize| {
        let row = (head * K_DIM + channel) * INPUTS;
        let row = &weights.k.weights[row..row + INPUTS];
        let sum: f64 = row
            .iter()
            .zip(&hidden)
            .map(|(w, x)| f64::from(*w) * x)
            .sum();
        sum + f64::from(weights.k.bias[head * K_DIM + channel])
    };
    let row: Vec<f64> = (0..K_DIM).map(output).collect();
    let row = norm(&row, weights.k_norm.as_ref().unwrap());
    let rope = weights.rope.as_ref().unwrap();
    let partner = |pair: usize| match rope.rotate_half {
        true => (pair, pair + 3),
        false => (2 * pair, 2 * pair + 1),
    };
    for (pair, frequency) in rope.frequencies.iter().enumerate() {
        let (a, b) = partner(pair);
        let (sine, cosine) = (f64::from(position) * frequency).sin_cos();
        if channel == a {
            return row[a] * cosine - row[b] * sine;
        }
        if channel == b {
            return row[b] * cosine + row[a] * sine;
        }
    }
    row[channel]
}

// Goal: norm, matrix, bias, norm of heads and RoPE, in this order and each as it is defined.
#[test]
fn projection_is_its_definition_for_both_ways_of_pairing() {
    for rotate_half in [true, false] {
        let weights = weights(3, rotate_half);
        let of = form(Element::F32, PartOrder::TokenMajor);
        let projection = Projection::new(weights.clone(), of).unwrap();
        let hidden = numbers(&mut ChaCha8Rng::seed_from_u64(9), TOKENS * INPUTS);
        let mut k = vec![0; TOKENS * HEADS * K_DIM * 4];
        let mut v = vec![0; TOKENS * HEADS * V_DIM * 4];
        projection
            .project(&f32s(&hidden), 40, &mut k, &mut v)
            .unwrap();
        for (at, got) in read(&k).into_iter().enumerate() {
            let (token, head, channel) = (at / K_DIM / HEADS, at / K_DIM % HEADS, at % K_DIM);
            let row = &hidden[token * INPUTS..(token + 1) * INPUTS];
            let want = key(&weights, row, 40 + place(token), head, channel);
            assert!((f64::from(got) - want).abs() < 2e-5, "{at}: {got} {want}");
        }
        // A value is a row of the matrix times the normed input, with neither bias nor rotation.
        let mut normed = hidden[..INPUTS].to_vec();
        normalise(&mut normed, &weights.norm);
        let row = &weights.v.weights[4 * INPUTS..5 * INPUTS];
        let want: f32 = row.iter().zip(&normed).map(|(w, x)| w * x).sum();
        assert!((read(&v)[4] - want).abs() < 1e-5);
    }
}

#[test]
fn projection_places_heads_as_the_order_says_and_tokens_by_themselves() {
    let hidden = f32s(&numbers(&mut ChaCha8Rng::seed_from_u64(1), TOKENS * INPUTS));
    let project = |order, hidden: &[u8], position| {
        let tokens = hidden.len() / INPUTS / 4;
        let projection = Projection::new(weights(5, true), form(Element::F32, order)).unwrap();
        let mut k = vec![0; tokens * HEADS * K_DIM * 4];
        let mut v = vec![0; tokens * HEADS * V_DIM * 4];
        projection
            .project(hidden, position, &mut k, &mut v)
            .unwrap();
        (read(&k), read(&v))
    };
    let by_token = project(PartOrder::TokenMajor, &hidden, 0);
    let by_head = project(PartOrder::HeadMajor, &hidden, 0);
    for token in 0..TOKENS {
        for head in 0..HEADS {
            let (a, b) = (token * HEADS + head, head * TOKENS + token);
            assert_eq!(
                by_token.0[a * K_DIM..][..K_DIM],
                by_head.0[b * K_DIM..][..K_DIM]
            );
            assert_eq!(
                by_token.1[a * V_DIM..][..V_DIM],
                by_head.1[b * V_DIM..][..V_DIM]
            );
        }
        let alone = &hidden[token * INPUTS * 4..][..INPUTS * 4];
        let alone = project(PartOrder::TokenMajor, alone, place(token));
        assert_eq!(
            alone.0,
            by_token.0[token * HEADS * K_DIM..][..HEADS * K_DIM]
        );
    }
}

#[test]
fn projection_refuses_lengths_that_are_not_its_own_and_writes_nothing() {
    let of = form(Element::Bf16, PartOrder::TokenMajor);
    let projection = Projection::new(weights(1, true), of).unwrap();
    let (k, v) = (2 * HEADS * K_DIM * 2, 2 * HEADS * V_DIM * 2);
    let hidden = 2 * INPUTS * 2;
    let try_with = |hidden: usize, k: usize, v: usize| {
        let (mut k, mut v) = (vec![7; k], vec![7; v]);
        let outcome = projection.project(&vec![0; hidden], 0, &mut k, &mut v);
        assert!(outcome.is_ok() || k.iter().chain(&v).all(|byte| *byte == 7));
        outcome.map_err(|problem| problem.to_string())
    };
    assert_eq!(try_with(hidden, k, v), Ok(()));
    for wrong in [0, 1, hidden - 1, hidden + 2, 2049 * INPUTS * 2] {
        let text = try_with(wrong, k, v).unwrap_err();
        assert!(
            text.starts_with(&format!("hidden is {wrong} bytes")),
            "{text}"
        );
    }
    assert!(try_with(hidden, k - 2, v).unwrap_err().starts_with("k is"));
    assert!(try_with(hidden, k, v + 2).unwrap_err().starts_with("v is"));
    assert!(try_with(INPUTS * 2, k, v).unwrap_err().starts_with("k is"));
}

#[test]
fn projection_that_does_not_fit_together_is_refused_by_field() {
    let with = |change: fn(&mut Weights)| {
        let mut weights = weights(1, true);
        change(&mut weights);
        let of = form(Element::Bf16, PartOrder::TokenMajor);
        Projection::new(weights, of).unwrap_err().to_string()
    };
    assert!(with(|w| w.norm.gain.clear()).starts_with("norm.gain is 0"));
    assert!(with(|w| _ = w.k.weights.pop()).starts_with("k.weights is"));
    assert!(with(|w| w.k.dim = 0).starts_with("k.weights is"));
    assert!(with(|w| w.v.weights.truncate(V_DIM * INPUTS)).starts_with("v.weights is 1"));
    assert!(with(|w| _ = w.k.bias.pop()).starts_with("bias is 23"));
    assert!(with(|w| w.k_norm.as_mut().unwrap().gain.push(1.0)).starts_with("k_norm.gain is 9"));
    let text = with(|w| w.rope = Some(Rope::plain(1e4, 10, true)));
    assert!(
        text.starts_with("rope.frequencies is 5; accepted: at most 4"),
        "{text}"
    );
    let of = form(Element::U8, PartOrder::TokenMajor);
    let text = Projection::new(weights(1, true), of)
        .unwrap_err()
        .to_string();
    assert_eq!(text, "element is u8; accepted: bf16, f16 or f32");
}
