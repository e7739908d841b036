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

/// Coefficients of all tokens: one column a token.
pub(super) fn coefficients(basis: &Basis, centred: &Samples) -> Samples {
    basis.forward.map(narrow) * centred
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
    let every = coefficients.ncols().div_ceil(ESTIMATE_TOKENS).max(1);
    let some: Vec<_> = coefficients.column_iter().step_by(every).collect();
    let some = match some.is_empty() {
        true => return None,
        false => Samples::from_columns(&some),
    };
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
    let tokens = coefficients.ncols().max(1);
    let mut integers = Vec::with_capacity(coefficients.len());
    let mut errors = Vec::with_capacity(coefficients.nrows());
    for row in coefficients.row_iter() {
        let mut sum = 0.0;
        for value in row.iter() {
            let whole = nearest(value * inverse);
            let error = f64::from(value - whole as f32 * step);
            sum += error * error;
            integers.push(whole);
        }
        errors.push(sum / tokens as f64);
    }
    (integers, errors)
}

/// The nearest integer, ties to even; those beyond the type become its ends.
#[expect(clippy::cast_possible_truncation, reason = "the cast saturates")]
fn nearest(value: f32) -> i32 {
    value.round_ties_even() as i32
}

/// Integers of a part that begin a block at each of `starts`.
pub(super) fn integers(values: Vec<i32>, tokens: usize, starts: &[usize]) -> Integers {
    Integers::new(values, tokens, starts.to_vec())
}

/// Columns of the inverse transform times integers: what decoding adds to the prediction.
pub(super) fn restore(basis: &Basis, integers: &[i32], tokens: usize, step: f64) -> Samples {
    let coefficients = basis.inverse.ncols();
    let inverse: Matrix = &basis.inverse * step;
    let integers = Samples::from_fn(coefficients, tokens, |row, column| {
        integers
            .get(row * tokens + column)
            .map_or(0.0, |whole| *whole as f32)
    });
    inverse.map(narrow) * integers
}
