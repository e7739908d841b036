//! A prefill model from steps that engines took.
//!
//! Upstairs:   `engines`.
//! Downstairs: nothing.
//!
//! Least squares of the error by token, later steps counting more, over every set of the model's
//! four terms with a solution that is nowhere negative: of those the one with the least error, and
//! of equally good ones the smallest. Of sets as small, what grows with the tokens of a step comes
//! first: engines whose steps are all of one length cannot tell it from what each step takes, and
//! that a step of half the length takes half is nearer to the truth than that it takes all.
//!
//! Four terms have fifteen sets; trying them all is the simplest exact way (Lawson and Hanson,
//! Solving Least Squares Problems, ch. 23, has the general one).
//!
//! Invariants kept here
//!   L1  Every coefficient is finite and not negative; at least one is above zero.

use super::Step;
use crate::restore::plan::Prefill;

/// After so many steps what was before counts half.
const HALF_LIFE: f64 = 32.0;
/// A larger set of terms must be better than a smaller one by this part of the error.
const BETTER: f64 = 0.01;
/// A pivot below this part of its column is none: the terms say the same of all steps.
const PIVOT_MIN: f64 = 1e-9;
/// Terms of the model.
const TERMS: usize = 4;

type Row = [f64; TERMS];

/// Fits the model to steps, oldest first. `None` without any.
pub(super) fn fit(steps: &[Step]) -> Option<Prefill> {
    let last = steps.len().checked_sub(1)?;
    let mut sums = Sums::default();
    for (at, step) in steps.iter().enumerate() {
        #[expect(clippy::cast_precision_loss, reason = "a few hundred steps")]
        let age = (last - at) as f64;
        let took = step.took.as_secs_f64();
        // By what was asked and not by what it took: an engine that becomes slower counts as well.
        let tokens = f64::from(step.tokens);
        let weight = 0.5_f64.powf(age / HALF_LIFE) / (tokens * tokens);
        sums.add(terms(step), took, weight);
    }
    let mut best: Option<(f64, Row)> = None;
    for set in sets() {
        let Some(solution) = sums.solve(set) else {
            continue;
        };
        let error = sums.error(&solution);
        if best.is_none_or(|(least, _)| error < least * (1.0 - BETTER)) {
            best = Some((error, solution));
        }
    }
    let (_, [fixed_s, per_context_s, per_token_s, attention_s]) = best?;
    Some(Prefill {
        fixed_s,
        per_context_s,
        per_token_s,
        attention_s,
    })
}

/// Sets of terms, in the order in which they are tried: the smallest first (see the top).
fn sets() -> Vec<u32> {
    // By token, by pair of tokens, by token before, and by step: places in a row.
    const PREFERRED: [usize; TERMS] = [2, 3, 1, 0];
    let without = |set: u32| PREFERRED.map(|term| set & (1 << term) == 0);
    let mut sets: Vec<u32> = (1..1 << TERMS).collect();
    sets.sort_by_key(|set| (set.count_ones(), without(*set)));
    sets
}

fn terms(step: &Step) -> Row {
    let (before, new) = (f64::from(step.before), f64::from(step.tokens));
    [1.0, before, new, 2.0 * before * new + new * new]
}

/// The normal equations.
#[derive(Debug, Default)]
struct Sums {
    products: [Row; TERMS],
    targets: Row,
    squares: f64,
}

impl Sums {
    fn add(&mut self, terms: Row, took: f64, weight: f64) {
        for (row, a) in self.products.iter_mut().zip(terms) {
            for (sum, b) in row.iter_mut().zip(terms) {
                *sum += weight * a * b;
            }
        }
        for (sum, a) in self.targets.iter_mut().zip(terms) {
            *sum += weight * a * took;
        }
        self.squares += weight * took * took;
    }

    /// Weighted square error of a solution.
    fn error(&self, solution: &Row) -> f64 {
        let mut error = self.squares;
        for ((row, target), a) in self.products.iter().zip(self.targets).zip(solution) {
            let fitted: f64 = row.iter().zip(solution).map(|(sum, b)| sum * b).sum();
            error += a * (fitted - 2.0 * target);
        }
        error.max(0.0)
    }

    /// The best solution with the terms of `set` alone; `None` when it is negative or they say the
    /// same.
    fn solve(&self, set: u32) -> Option<Row> {
        let used = |at: usize| set & (1 << at) != 0;
        // Gauss and Jordan, with the terms that are not used left out.
        let mut rows: Vec<(Row, f64)> = self.products.iter().copied().zip(self.targets).collect();
        let scale: Vec<f64> = (0..TERMS)
            .map(|at| rows.get(at).map_or(0.0, |r| pick(&r.0, at)))
            .collect();
        for at in (0..TERMS).filter(|at| used(*at)) {
            let (row, target) = *rows.get(at)?;
            let pivot = pick(&row, at);
            if pivot <= PIVOT_MIN * scale.get(at)? {
                return None;
            }
            let row = row.map(|value| value / pivot);
            let target = target / pivot;
            for (other, (values, value)) in rows.iter_mut().enumerate() {
                if other == at {
                    (*values, *value) = (row, target);
                } else if used(other) {
                    let factor = pick(values, at);
                    for (into, from) in values.iter_mut().zip(row) {
                        *into -= factor * from;
                    }
                    *value -= factor * target;
                }
            }
        }
        let mut solution = [0.0; TERMS];
        for (at, (into, (_, value))) in solution.iter_mut().zip(&rows).enumerate() {
            if used(at) {
                *into = *value;
            }
        }
        let sound = solution.iter().all(|one| one.is_finite() && *one >= 0.0);
        let some = solution.iter().any(|one| *one > 0.0);
        (sound && some).then_some(solution)
    }
}

fn pick(row: &Row, at: usize) -> f64 {
    row.get(at).copied().unwrap_or(0.0)
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use proptest::prelude::*;

    use super::*;

    fn steps(model: &Prefill, shapes: &[(u32, u32)]) -> Vec<Step> {
        let took = |(before, tokens): &(u32, u32)| Step {
            before: *before,
            tokens: *tokens,
            took: Duration::from_secs_f64(model.step_s(f64::from(*before), f64::from(*tokens))),
        };
        shapes.iter().map(took).collect()
    }

    const MODEL: Prefill = Prefill {
        fixed_s: 3e-3,
        per_context_s: 1e-7,
        per_token_s: 4e-5,
        attention_s: 2e-9,
    };

    fn near(a: f64, b: f64) -> bool {
        (a - b).abs() <= 0.02 * b
    }

    #[test]
    fn fit_predicts_steps_that_it_has_not_seen() {
        let shapes: Vec<(u32, u32)> = (0..120).map(|at| (at % 17 * 700, 16 << (at % 7))).collect();
        let fitted = fit(&steps(&MODEL, &shapes)).unwrap();
        for (context, new) in [(0.0, 100.0), (30_000.0, 256.0), (5_000.0, 4_000.0)] {
            let (want, got) = (MODEL.step_s(context, new), fitted.step_s(context, new));
            assert!(near(got, want), "{got} where {want}: {fitted:?}");
        }
    }

    // Goal: an engine whose steps are all of one length, as a rule they are, is predicted at that
    // length, though its fixed part and that by token cannot be told apart.
    #[test]
    fn fit_needs_no_variety_of_steps() {
        let shapes: Vec<(u32, u32)> = (0..20).map(|at| (at * 256, 256)).collect();
        let fitted = fit(&steps(&MODEL, &shapes)).unwrap();
        let (want, got) = (MODEL.step_s(2048.0, 256.0), fitted.step_s(2048.0, 256.0));
        assert!(near(got, want), "{got} where {want}: {fitted:?}");
        let one = fit(&steps(&MODEL, &[(0, 256)])).unwrap();
        assert!(near(one.step_s(0.0, 256.0), MODEL.step_s(0.0, 256.0)));
        assert_eq!(fit(&[]), None);
    }

    // Goal: what is not known is taken as the hardware has it, not as a fixed part of every step.
    #[test]
    fn fit_gives_a_shorter_step_less_when_all_steps_were_of_one_length() {
        let token = Prefill {
            fixed_s: 0.0,
            per_context_s: 0.0,
            ..MODEL
        };
        let shapes: Vec<(u32, u32)> = (0..20).map(|at| (at * 256, 256)).collect();
        let fitted = fit(&steps(&token, &shapes)).unwrap();
        for new in [64.0, 256.0, 1024.0] {
            let (want, got) = (token.step_s(2048.0, new), fitted.step_s(2048.0, new));
            assert!(near(got, want), "{new}: {got} where {want}: {fitted:?}");
        }
    }

    #[test]
    fn fit_follows_an_engine_that_becomes_slower() {
        let shapes: Vec<(u32, u32)> = (0..128).map(|at| (at % 16 * 256, 256)).collect();
        let mut all = steps(&MODEL, &shapes);
        for step in &mut all {
            step.took /= 4;
        }
        all.extend(
            steps(&MODEL, &shapes)
                .into_iter()
                .chain(steps(&MODEL, &shapes)),
        );
        let fitted = fit(&all).unwrap();
        let (want, got) = (MODEL.step_s(2048.0, 256.0), fitted.step_s(2048.0, 256.0));
        assert!(got > 0.75 * want, "{got} where {want}");
    }

    proptest! {
        #[test]
        fn fit_is_never_negative_and_never_no_number(
            all in proptest::collection::vec(
                (0..200_000_u32, 1..8192_u32, 1..10_u64.pow(9)), 1..60,
            ),
        ) {
            let step = |(before, tokens, micros)| Step {
                before,
                tokens,
                took: Duration::from_micros(micros),
            };
            let steps: Vec<Step> = all.into_iter().map(step).collect();
            let model = fit(&steps).unwrap();
            for step in &steps {
                let got = model.step_s(f64::from(step.before), f64::from(step.tokens));
                prop_assert!(got.is_finite() && got > 0.0, "{model:?}");
            }
        }
    }
}
