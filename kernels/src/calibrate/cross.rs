//! Levels that predict a part from parts before it: weights, residual transforms, steps.
//!
//! Upstairs:   [`super`].
//! Downstairs: [`super::algebra`], [`super::metric`], [`super::plain`], [`super::rate`].
//!
//! Layers go in order and the loop is closed: weights are fitted to what *decoding* will have, the
//! restored parts as 8-bit integers, so that errors of earlier layers are no surprise to later
//! ones. What is left gets a transform of its own, in the metric of the part.
//!
//! Invariants kept here
//!   X1  Weights are those of the table, rounded to its integers, before anything is measured
//!       with them.
//!   X2  Products of two inputs are exact: chunks are so short that `f32` holds them.
//!
//! Not here on purpose: no choice of a level or of how many layers to look back.

use std::collections::HashMap;

use kvtier_proto::layout::PartCode;
use nalgebra::DVector;

use super::algebra::{Matrix, Moments, Samples, narrow, product, ridge};
use super::costs::Costs;
use super::metric::{Basis, Metric};
use super::plain;
use super::rate::Choice;
use crate::profile::Matrix16;

/// Ridge of an input, in squares of its 8-bit steps. Rounding alone is 1/12; of documents left out,
/// this much takes 0.6 % less at the balanced level of a small model.
const RIDGE: f64 = 3.0;

/// A part by layer and code.
pub(super) type Name = (usize, PartCode);

/// How one part is predicted and what is left of it is coded.
#[derive(Debug)]
pub(super) struct Fit {
    /// `None` where there is nothing to predict from: the part is coded plainly.
    pub(super) tables: Option<Tables>,
    pub(super) step: f64,
    pub(super) choice: Choice,
    pub(super) cost: Option<f64>,
}

/// Tables of a prediction.
#[derive(Debug)]
pub(super) struct Tables {
    pub(super) needs: Vec<Name>,
    pub(super) weights: Matrix16,
    pub(super) bias: Vec<f32>,
    pub(super) basis: Basis,
}

/// What the closed loop needs to know of a part.
#[derive(Debug)]
pub(super) struct Part<'a> {
    pub(super) metric: &'a Metric,
    /// As an input.
    pub(super) centre: &'a [f32],
    pub(super) scale: &'a [f32],
    /// Of what a prediction leaves.
    pub(super) step: f64,
    /// How it is coded without a prediction.
    pub(super) mean: &'a [f64],
    pub(super) basis: &'a Basis,
    pub(super) plain_step: f64,
}

/// The parts restored so far, as inputs, and the products of those still needed.
#[derive(Debug)]
pub(super) struct Loop<'a> {
    back: usize,
    starts: &'a [usize],
    costs: &'a Costs,
    inputs: HashMap<Name, Samples>,
    products: HashMap<(Name, Name), Matrix>,
}

impl<'a> Loop<'a> {
    pub(super) fn new(back: usize, starts: &'a [usize], costs: &'a Costs) -> Self {
        Self {
            back,
            starts,
            costs,
            inputs: HashMap::new(),
            products: HashMap::new(),
        }
    }

    /// Parts that this one is predicted from, in the order of the weights.
    fn needs(&self, (layer, code): Name) -> Vec<Name> {
        let layers = layer.saturating_sub(self.back)..layer;
        let before = layers.flat_map(|layer| [(layer, PartCode::K), (layer, PartCode::V)]);
        let own = (code == PartCode::V).then_some((layer, PartCode::K));
        before.chain(own).collect()
    }

    /// Fits one part and restores it. Parts come in order: K before V, layer after layer. `None`
    /// when the numbers do not determine a fit.
    pub(super) fn part(&mut self, name: Name, samples: &Samples, part: &Part<'_>) -> Option<Fit> {
        let back = self.back;
        self.inputs.retain(|(layer, _), _| layer + back >= name.0);
        self.products
            .retain(|(a, b), _| a.0.min(b.0) + back >= name.0);
        let needs = self.needs(name);
        if needs.is_empty() {
            let mut predicted = Samples::zeros(samples.nrows(), samples.ncols());
            let mean: Vec<f32> = part.mean.iter().copied().map(narrow).collect();
            add(&mut predicted, &mean);
            return Some(self.code(
                name,
                samples,
                predicted,
                (part, part.basis, part.plain_step),
            ));
        }
        let weights = self.weights(&needs, samples)?;
        let mut predicted = self.predict(&needs, &weights, samples);
        // The weights were rounded, so what is left has a mean of its own.
        let bias: Vec<f32> = {
            let mean = Moments::of_sum(&(samples - &predicted)) / samples.ncols().max(1) as f64;
            mean.iter().copied().map(narrow).collect()
        };
        add(&mut predicted, &bias);
        let left = Moments::of(&(samples - &predicted)).covariance();
        let basis = part.metric.basis(&left)?;
        let fit = self.code(name, samples, predicted, (part, &basis, part.step));
        Some(Fit {
            tables: Some(Tables {
                needs,
                weights,
                bias,
                basis,
            }),
            ..fit
        })
    }

    /// Codes what the prediction leaves, and keeps what decoding makes of it as an input.
    fn code(
        &mut self,
        name: Name,
        samples: &Samples,
        mut predicted: Samples,
        (part, basis, step): (&Part<'_>, &Basis, f64),
    ) -> Fit {
        let coefficients = plain::coefficients(basis, &(samples - &predicted));
        let (integers, errors) = plain::quantise(&coefficients, step);
        let tokens = samples.ncols();
        predicted += plain::restore(basis, &integers, tokens, step);
        self.inputs.insert(name, as_input(&predicted, part));
        let integers = plain::integers(integers, tokens, self.starts);
        Fit {
            tables: None,
            step,
            cost: plain::cost(basis, &errors),
            choice: integers.choose(self.costs),
        }
    }

    /// Weights of the inputs, rounded as tables have them (X1).
    fn weights(&mut self, needs: &[Name], samples: &Samples) -> Option<Matrix16> {
        let channels = samples.nrows();
        let count = samples.ncols().max(1) as f64;
        let mean = Moments::of_sum(samples) / count;
        let width: usize = needs.iter().map(|need| self.rows(need)).sum();
        let (mut gram, mut cross) = (Matrix::zeros(width, width), Matrix::zeros(channels, width));
        let mut means = DVector::zeros(width);
        let mut at = 0;
        for (index, need) in needs.iter().enumerate() {
            let rows = self.rows(need);
            let input = self.inputs.get(need)?;
            cross
                .columns_mut(at, rows)
                .copy_from(&product(samples, input));
            means.rows_mut(at, rows).copy_from(&Moments::of_sum(input));
            let mut to = 0;
            for other in needs.iter().take(index + 1) {
                let block = self.product(*need, *other)?;
                gram.view_mut((at, to), block.shape()).copy_from(block);
                let mirrored = block.transpose();
                gram.view_mut((to, at), mirrored.shape())
                    .copy_from(&mirrored);
                to += mirrored.nrows();
            }
            at += rows;
        }
        means /= count;
        let gram = gram / count - &means * means.transpose();
        let cross = cross / count - mean * means.transpose();
        let found = ridge(gram, &cross, &DVector::from_element(width, RIDGE))?;
        matrix16(&found)
    }

    fn rows(&self, need: &Name) -> usize {
        self.inputs.get(need).map_or(0, Samples::nrows)
    }

    /// Sum of products of two inputs over the tokens, made once.
    fn product(&mut self, a: Name, b: Name) -> Option<&Matrix> {
        if !self.products.contains_key(&(a, b)) {
            let made = product(self.inputs.get(&a)?, self.inputs.get(&b)?);
            self.products.insert((a, b), made);
        }
        self.products.get(&(a, b))
    }

    fn predict(&self, needs: &[Name], weights: &Matrix16, samples: &Samples) -> Samples {
        let mut predicted = Samples::zeros(samples.nrows(), samples.ncols());
        let mut matrix = Samples::zeros(weights.rows(), weights.columns());
        let rows = weights.data().chunks_exact(weights.columns().max(1));
        for (mut row, (integers, scale)) in matrix.row_iter_mut().zip(rows.zip(weights.scale())) {
            for (weight, integer) in row.iter_mut().zip(integers) {
                *weight = f32::from(*integer) * scale;
            }
        }
        let mut at = 0;
        for input in needs.iter().filter_map(|need| self.inputs.get(need)) {
            let columns = matrix.columns(at, input.nrows()).clone_owned();
            predicted.gemm(1.0, &columns, input, 1.0);
            at += input.nrows();
        }
        predicted
    }
}

/// A matrix as tables have it; `None` when a number is not finite.
pub(super) fn matrix16(matrix: &Matrix) -> Option<Matrix16> {
    let rows = matrix.transpose();
    Matrix16::quantise(rows.as_slice(), matrix.nrows(), matrix.ncols()).ok()
}

/// Adds the same to every token.
fn add(samples: &mut Samples, channels: &[f32]) {
    for mut column in samples.column_iter_mut() {
        for (value, more) in column.iter_mut().zip(channels) {
            *value += more;
        }
    }
}

/// A restored part as the 8-bit integers that later parts are predicted from.
fn as_input(restored: &Samples, part: &Part<'_>) -> Samples {
    let mut input = restored.clone();
    for mut column in input.column_iter_mut() {
        let of = part.centre.iter().zip(part.scale);
        for (value, (centre, scale)) in column.iter_mut().zip(of) {
            let whole = ((*value - centre) / scale).round_ties_even();
            *value = whole.clamp(-127.0, 127.0);
        }
    }
    input
}
