//! Tests of predictors and scale indices.

use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

use super::*;
use crate::profile::scales::DEAD;

/// Roughly normal.
fn normal(random: &mut ChaCha8Rng, sigma: f64) -> f64 {
    sigma * ((0..12).map(|_| random.random::<f64>()).sum::<f64>() - 6.0)
}

#[expect(clippy::cast_possible_truncation, reason = "small numbers")]
fn whole(value: f64) -> i32 {
    value.round() as i32
}

const TOKENS: usize = 2000;

fn choose(runs: &[Vec<i32>]) -> Choice {
    let starts = (0..TOKENS).step_by(256).collect();
    Integers::new(runs.concat(), TOKENS, starts).choose(&Costs::new())
}

// Goal: each kind of data gets the predictor that it was made for.
// Method: independent tokens; a slow walk; groups whose first token the others vary about.
#[test]
fn predictor_is_the_one_that_the_data_was_made_for() {
    let random = &mut ChaCha8Rng::seed_from_u64(1);
    let independent: Vec<i32> = (0..TOKENS).map(|_| whole(normal(random, 9.0))).collect();
    assert_eq!(choose(&[independent]).predictor, TokenPredictor::Mean);

    let mut at = 0.0;
    let walk: Vec<i32> = std::iter::repeat_with(|| {
        at = 0.95 * at + normal(random, 6.0);
        whole(at)
    })
    .take(TOKENS)
    .collect();
    let choice = choose(&[walk]);
    let TokenPredictor::First { rho } = &choice.predictor else {
        panic!("{:?}", choice.predictor)
    };
    // 0.95 of 64 is 60.8.
    assert!((58..=63).contains(&rho[0]), "{rho:?}");
    assert!(choice.bits < 0.8 * choice.mean_bits);

    let mut first = 0.0;
    let grouped = (0..TOKENS).map(|token| match token % 256 % usize::from(ANCHOR_TOKENS) {
        0 => {
            first = normal(random, 60.0);
            whole(first)
        }
        _ => whole(first + normal(random, 3.0)),
    });
    let choice = choose(&[grouped.collect()]);
    let group = ANCHOR_TOKENS;
    assert_eq!(choice.predictor, TokenPredictor::Anchor { group });
}

#[test]
fn choice_is_never_longer_than_the_mean_when_coefficients_differ() {
    let random = &mut ChaCha8Rng::seed_from_u64(2);
    for _ in 0..50 {
        let runs: Vec<Vec<i32>> = (0..4)
            .map(|_| {
                let (rho, sigma) = (
                    random.random_range(-1.0..1.0),
                    random.random_range(0.1..30.0),
                );
                let mut at = 0.0;
                let next = || {
                    at = rho * at + normal(random, sigma);
                    whole(at)
                };
                std::iter::repeat_with(next).take(TOKENS).collect()
            })
            .collect();
        let choice = choose(&runs);
        assert!(choice.bits <= choice.mean_bits, "{choice:?}");
        assert_eq!(choice.scales.len(), runs.len());
    }
}

#[test]
fn coefficients_that_are_always_0_are_dead_and_cost_nothing() {
    let choice = choose(&[vec![0; TOKENS]]);
    assert_eq!((choice.scales, choice.bits), (vec![DEAD], 0.0));
}

#[test]
fn prediction_rounds_to_the_nearest() {
    let cases = [
        (64, 5, 5),
        (32, 5, 3),
        (32, -5, -3),
        (-64, 7, -7),
        (0, 99, 0),
        (1, 31, 0),
    ];
    for (rho, before, want) in cases {
        assert_eq!(predicted(rho, before), want, "{rho} {before}");
    }
}
