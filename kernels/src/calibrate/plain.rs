//! Plain levels: a part's mean and transform, and what each step would cost.
//!
//! Upstairs:   [`super`].
//! Downstairs: [`super::metric`], [`super::rate`].
//!
//! Not here on purpose: no look at other parts. The step is found from all of them together.

use super::algebra::{Matrix, Samples, narrow};
use super::metric::Basis;
use super::rate::Integers;

/// Tokens of a part that the cost of steps is estimated from, evenly spread.
const ESTIMATE_TOKENS: usize = 2048;

/// Coefficients of all tokens: one column a *coefficient*, because what follows goes through one
/// after the other.
pub(super) fn coefficients(basis: &Basis, centred: &Samples) -> Samples {
    (basis.forward.map(narrow) * centred).transpose()
}

/// Samples without their mean.
pub(super) fn centre(samples: &mut Samples, mean: &[f64]) {
    for mut column in samples.column_iter_mut() {
        for (value, mean) in column.iter_mut().zip(mean) {
            *value -= narrow(*mean);
        }
    }
}

/// What rounding to each of `steps` is expected to cost in this part. Unit: nats. `None` where
/// there are no gradients.
pub(super) fn costs_of_steps(
    basis: &Basis,
    coefficients: &Samples,
    steps: &[f64],
) -> Option<Vec<f64>> {
    let every = coefficients.nrows().div_ceil(ESTIMATE_TOKENS).max(1);
    let some = coefficients.column_iter();
    let some = some.flat_map(|column| column.into_iter().copied().step_by(every));
    let tokens = coefficients.nrows().div_ceil(every);
    let some = Samples::from_iterator(tokens, coefficients.ncols(), some);
    let one = |step: &f64| {
        let (_, errors) = quantise(&some, *step);
        cost(basis, &errors)
    };
    steps.iter().map(one).collect()
}

/// Expected cost of coefficients with these mean square errors. Unit: nats.
pub(super) fn cost(basis: &Basis, errors: &[f64]) -> Option<f64> {
    let each = basis.cost.as_ref()?.iter().zip(errors);
    Some(each.map(|(cost, error)| cost * error).sum())
}

/// The nearest whole steps, coefficient after coefficient, and each one's mean square error.
pub(super) fn quantise(coefficients: &Samples, step: f64) -> (Vec<i32>, Vec<f64>) {
    let (step, inverse) = (narrow(step), narrow(1.0 / step));
    let tokens = coefficients.nrows().max(1);
    let mut integers = Vec::with_capacity(coefficients.len());
    let mut errors = Vec::with_capacity(coefficients.ncols());
    for column in coefficients.column_iter() {
        let mut sum = 0.0;
        for value in column.iter() {
            let whole = nearest(value * inverse);
            let error = f64::from(value - whole as f32 * step);
            sum += error * error;
            integers.push(whole);
        }
        errors.push(sum / tokens as f64);
    }
    (integers, errors)
}

/// The nearest integer, ties to even; those beyond what tables can hold become the largest.
#[expect(clippy::cast_possible_truncation, reason = "a whole number of 22 bits")]
fn nearest(value: f32) -> i32 {
    // Adding this leaves no bit below 1. Rounding by name is a call on older processors, and
    // this is where the time goes.
    const WHOLE: f32 = 12_582_912.0;
    const MOST: f32 = 4_000_000.0;
    (value.clamp(-MOST, MOST) + WHOLE - WHOLE) as i32
}

/// Integers of a part that begin a block at each of `starts`.
pub(super) fn integers(values: Vec<i32>, tokens: usize, starts: &[usize]) -> Integers {
    Integers::new(values, tokens, starts.to_vec())
}

/// Columns of the inverse transform times integers: what decoding adds to the prediction.
pub(super) fn restore(basis: &Basis, integers: &[i32], tokens: usize, step: f64) -> Samples {
    let inverse: Matrix = &basis.inverse * step;
    let integers = integers.iter().map(|whole| *whole as f32);
    let integers = Samples::from_iterator(tokens, inverse.ncols(), integers);
    inverse.map(narrow) * integers.transpose()
}
