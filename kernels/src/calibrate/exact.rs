//! Tables of the bit-exact level across layers.
//!
//! Upstairs:   [`super::calibrate`]; whoever adds them to a profile that has none.
//! Downstairs: `super::algebra`; `crate::codec::ladder::cells` says what a value costs.
//!
//! Nothing is lost, so there is no loop to close: what decoding will have is what the samples are.
//! For every part:
//!   1. All that comes before a channel, as the integers that decoding reads: one covariance, one
//!      factor of it, and weights for each block of channels from the front of that factor.
//!   2. Within a block, weights of the errors of the channels before, from their covariance.
//!   3. With the prediction as decoding will make it, cells and a table for each channel: those
//!      with which the samples take the fewest bits.
//!
//! Invariants kept here
//!   X1  Cells and tables are chosen by what coding the samples' own bits about the rounded tables'
//!       prediction costs.
//!
//! Not here on purpose: no wish. There is one exact level, and it is as small as it gets.

mod values;

use std::sync::atomic::{AtomicUsize, Ordering};

use kvtier_proto::layout::PartCode;
use nalgebra::DVector;

use super::algebra::{Matrix, Moments, Samples, narrow, product};
use super::cross::{Name, matrix16};
use super::each::each;
use super::input::Input;
use super::samples::{Document, SampleError};
use super::{CalibrateError, Progress, TOKENS_PER_INPUT};
use crate::codec::ladder::cells::Form;
use crate::profile::exact::{INPUT_MAX, PAIR, WITHIN, order};
use crate::profile::{self, ExactTables, Matrix16, Profile};

use values::Values;

/// Ridge of an input, as a part of its variance. Ten times more takes 0.02 bits a value more.
const RIDGE: f64 = 1e-4;
/// The same in squares of its steps: rounding alone is 1/12.
const RIDGE_LEAST: f64 = 1e-2;
/// Deviations that an input reaches.
const REACH: f32 = 8.0;
/// Tokens that are predicted at a time.
const CHUNK: usize = 1024;

/// Adds tables of level `lossless_x` to a profile of the same model, and says how many bits a
/// value of the samples takes. Layers look `back` so far. None are added for elements of 32 bits
/// or heads of an odd size.
///
/// # Errors
/// [`CalibrateError`] says what is wrong with the samples, or what is missing.
pub fn add(
    documents: &[Document<'_>],
    profile: &mut Profile,
    (back, threads): (u32, usize),
    progress: &(dyn Fn(Progress) + Sync),
) -> Result<Option<f64>, CalibrateError> {
    let Some(first) = documents.first() else {
        return Ok(None);
    };
    let codes = [PartCode::K, PartCode::V];
    let odd = codes.iter().any(|code| first.tensor(*code).dim % 2 == 1);
    let Some(form) = Form::of(first.element()).filter(|_| !odd) else {
        return Ok(None);
    };
    let rope = profile.rope.clone();
    let input = Input {
        documents,
        rope: rope.as_ref().filter(|_| profile.k_after_rope),
        sinks: usize::try_from(profile.sinks).unwrap_or(usize::MAX),
    };
    let [k, v] = codes.map(|code| first.tensor(code).width());
    let back = usize::try_from(back).unwrap_or(usize::MAX).min(2);
    let need = TOKENS_PER_INPUT * ((back + 1) * (k + v));
    let tokens = input.tokens();
    if tokens < need {
        let what = "the exact level across layers";
        return Err(CalibrateError::TooFew { tokens, need, what });
    }
    let names = (0..first.layers()).flat_map(|layer| codes.map(|code| (layer, code)));
    let names: Vec<Name> = names.collect();
    let run = Run {
        input,
        form,
        back,
        inputs: Vec::new(),
    };
    let done = AtomicUsize::new(0);
    let total = names.len();
    let inputs = each(threads, &names, |name| run.find(*name))?;
    let run = Run { inputs, ..run };
    let made = each(threads, &names, |name| {
        let made = run.part(*name);
        let done = 1 + done.fetch_add(1, Ordering::Relaxed);
        progress(Progress { done, total });
        made
    })?;
    let values: usize = made.iter().map(|(part, _)| part.channels() * tokens).sum();
    let bits: f64 = made.iter().map(|(_, bits)| bits).sum();
    profile.exact = made.into_iter().map(|(part, _)| part).collect();
    profile.check().map_err(CalibrateError::Profile)?;
    Ok(Some(bits / values.max(1) as f64))
}

struct Run<'a> {
    input: Input<'a>,
    form: Form,
    back: usize,
    /// How each part is read, K and V of each layer.
    inputs: Vec<profile::Input>,
}

/// What blocks of a part are predicted from.
struct Before {
    /// Integers of all that is needed, then of the part's own channels: a column a token.
    numbers: Samples,
    mean: DVector<f64>,
    /// Factor of their covariance.
    factor: Matrix,
    /// Covariance of the part's channels with them.
    with: Matrix,
}

/// Tables of a part as they come about, and what its samples cost with them.
struct Made {
    tables: ExactTables,
    weights: Matrix,
    bits: f64,
}

impl Run<'_> {
    fn at_fault(&self, source: SampleError, (layer, code): Name) -> CalibrateError {
        let is_bad = |document: &Document<'_>| document.tensor(code).layer(layer).is_err();
        let index = self.input.documents.iter().position(is_bad);
        let index = index.unwrap_or(0);
        CalibrateError::Document { index, source }
    }

    fn samples(&self, name: Name) -> Result<Samples, CalibrateError> {
        let read = self.input.samples(name.0, name.1);
        read.map_err(|source| self.at_fault(source, name))
    }

    /// Heads of a part and their size.
    fn shape(&self, code: PartCode) -> (usize, usize) {
        let first = self.input.documents.first();
        let tensor = first.map(|document| document.tensor(code));
        tensor.map_or((0, 0), |tensor| (tensor.heads, tensor.dim))
    }

    /// Channels of a part in the order of coding, with their pairs of RoPE.
    fn order(&self, code: PartCode) -> Vec<(usize, Option<usize>)> {
        let rope = self.input.rope.filter(|_| code == PartCode::K);
        order(rope, self.shape(code))
    }

    /// How a part is read where it predicts others.
    fn find(&self, name: Name) -> Result<profile::Input, CalibrateError> {
        let samples = self.samples(name)?;
        let mut input = profile::Input {
            centre: Vec::new(),
            scale: Vec::new(),
        };
        let count = samples.ncols().max(1) as f64;
        for row in samples.row_iter() {
            let mean = row.iter().copied().map(f64::from).sum::<f64>() / count;
            let square = |value: &f32| (f64::from(*value) - mean).powi(2);
            let deviation = narrow((row.iter().map(square).sum::<f64>() / count).sqrt());
            let mean = narrow(mean);
            let most = row.iter().map(|value| (value - mean).abs());
            let most = most.fold(0.0, f32::max).min(REACH * deviation);
            let scale = most / f32::from(INPUT_MAX);
            input.centre.push(mean);
            // A channel that never changes has no range; any scale reads it as 0.
            input.scale.push(if scale > 1e-20 { scale } else { 1.0 });
        }
        Ok(input)
    }

    /// A part as the integers that others are predicted from, rows in the order of coding.
    fn numbers(&self, name: Name, samples: &Samples) -> Option<Samples> {
        let (layer, code) = name;
        let input = self
            .inputs
            .get(2 * layer + usize::from(code == PartCode::V))?;
        let order = self.order(code);
        let most = f32::from(INPUT_MAX);
        let mut numbers = Samples::zeros(order.len(), samples.ncols());
        for (mut to, (channel, _)) in numbers.row_iter_mut().zip(&order) {
            let (centre, scale) = (*input.centre.get(*channel)?, *input.scale.get(*channel)?);
            let from = samples.row(*channel);
            for (to, value) in to.iter_mut().zip(from.iter()) {
                *to = ((value - centre) / scale)
                    .round_ties_even()
                    .clamp(-most, most);
            }
        }
        Some(numbers)
    }

    /// The parts that a part is predicted from.
    fn needs(&self, (layer, code): Name) -> Vec<Name> {
        let before = (1..=self.back.min(layer)).map(|back| layer - back);
        let before = before.flat_map(|layer| [(layer, PartCode::K), (layer, PartCode::V)]);
        let own = (code == PartCode::V).then_some((layer, PartCode::K));
        before.chain(own).collect()
    }

    /// Tables of a part, and the bits that its samples take with them.
    fn part(&self, name: Name) -> Result<(ExactTables, f64), CalibrateError> {
        let (layer, code) = name;
        let singular = || CalibrateError::Singular { layer, code };
        let needs = self.needs(name);
        let mut given = Vec::new();
        for need in &needs {
            let samples = self.samples(*need)?;
            given.push(self.numbers(*need, &samples).ok_or_else(singular)?);
        }
        let samples = self.samples(name)?;
        given.push(self.numbers(name, &samples).ok_or_else(singular)?);
        let order = self.order(code);
        // The part's own values, rows in the order of coding.
        let own = Samples::from_fn(samples.nrows(), samples.ncols(), |row, column| {
            let channel = order.get(row).map_or(row, |(channel, _)| *channel);
            samples.get((channel, column)).copied().unwrap_or(0.0)
        });
        drop(samples);
        let before = Before::new(&given, &own).ok_or_else(singular)?;
        drop(given);
        let mut made = self.start(name, &needs, &before).ok_or_else(singular)?;
        let stored = self.stored(name);
        for first in (0..own.nrows()).step_by(WITHIN) {
            let block = Block {
                first,
                own: &own,
                stored: &stored,
                angles: &self.angles(code),
                order: &order,
            };
            self.block(&block, &before, &mut made)
                .ok_or_else(singular)?;
        }
        made.tables.weights = matrix16(&made.weights).ok_or_else(singular)?;
        Ok((made.tables, made.bits))
    }

    fn start(&self, name: Name, needs: &[Name], before: &Before) -> Option<Made> {
        let (layer, code) = name;
        let (heads, dim) = self.shape(code);
        let own = heads * dim;
        let at = 2 * layer + usize::from(code == PartCode::V);
        let need = |(layer, code): &Name| Some((u32::try_from(*layer).ok()?, *code));
        let weights = Matrix::zeros(own, before.numbers.nrows());
        Some(Made {
            tables: ExactTables {
                layer: u32::try_from(layer).ok()?,
                code,
                heads: u32::try_from(heads).ok()?,
                dim: u32::try_from(dim).ok()?,
                input: self.inputs.get(at)?.clone(),
                needs: needs.iter().map(need).collect::<Option<_>>()?,
                weights: Matrix16::quantise(&[0.0], 1, 1).ok()?,
                bias: Vec::new(),
                within: Vec::new(),
                pairs: Vec::new(),
                steps: Vec::new(),
                tables: Vec::new(),
            },
            weights,
            bits: 0.0,
        })
    }

    /// The bits of a part's values, token after token.
    fn stored(&self, (layer, code): Name) -> Vec<u16> {
        let mut all = Vec::new();
        for document in self.input.documents {
            let tensor = document.tensor(code);
            let values = tensor.layer_bytes(layer).as_chunks::<2>().0.iter();
            let kept = values.skip(self.input.sinks * tensor.width());
            all.extend(kept.map(|bytes| u16::from_le_bytes(*bytes)));
        }
        all
    }

    /// Cosine and sine of each pair of RoPE, token after token; empty where nothing turns.
    fn angles(&self, code: PartCode) -> Vec<Vec<[f32; 2]>> {
        let rope = self.input.rope.filter(|_| code == PartCode::K);
        let frequencies = rope.map_or(&[][..], |rope| &rope.frequencies);
        let positions = || {
            let documents = self.input.documents.iter();
            documents.flat_map(|document| self.input.sinks..document.tokens())
        };
        let of = |frequency: &f64| {
            let angle = |position: usize| {
                let (sine, cosine) = libm::sincos(position as f64 * frequency);
                [narrow(cosine), narrow(sine)]
            };
            positions().map(angle).collect()
        };
        frequencies.iter().map(of).collect()
    }

    /// Makes the tables of a block of channels.
    fn block(&self, block: &Block<'_>, before: &Before, made: &mut Made) -> Option<()> {
        let needed = before.numbers.nrows() - block.own.nrows();
        let rows = WITHIN.min(block.own.nrows() - block.first);
        let known = needed + block.first;
        let weights = before.weights(known, (block.first, rows))?;
        made.weights
            .view_mut((block.first, 0), (rows, known))
            .copy_from(&weights);
        let base = before.base(&weights, (block.own, block.first));
        made.tables.bias.extend(base.bias.iter().copied());
        let errors = block.own.rows(block.first, rows) - &base.predicted;
        let spread = product(&errors, &errors) / errors.ncols().max(1) as f64;
        let mut within = Matrix::zeros(rows, WITHIN);
        for pair in 0..rows / 2 {
            let left = pair_of(&spread, pair, &mut within)?;
            made.tables.pairs.extend(left.map(narrow));
        }
        for row in within.row_iter() {
            made.tables.within.extend(row.iter().copied().map(narrow));
        }
        for pair in 0..rows / 2 {
            self.pair(block, pair, (&base.predicted, &errors, &within), made)?;
        }
        Some(())
    }

    /// Chooses cells and tables of two channels.
    fn pair(
        &self,
        block: &Block<'_>,
        pair: usize,
        (base, errors, within): (&Samples, &Samples, &Matrix),
        made: &mut Made,
    ) -> Option<()> {
        let (first, second) = (2 * pair, 2 * pair + 1);
        let numbers = *made.tables.pairs.as_chunks::<PAIR>().0.last_chunk::<1>()?;
        let own = made.tables.pairs.as_chunks::<PAIR>().0;
        let numbers = own
            .get(block.first / 2 + pair)
            .copied()
            .unwrap_or(numbers[0]);
        let weights = within.rows(first, 2).columns(0, first).map(narrow);
        let turned = block.order.get(block.first + first)?.1;
        let angles = turned.and_then(|turned| block.angles.get(turned));
        let width = block.order.len();
        let mut both = [first, second].map(|row| {
            let channel = block
                .order
                .get(block.first + row)
                .map_or(0, |place| place.0);
            let values = block.stored.iter().copied().skip(channel).step_by(width);
            Values {
                bits: values.collect(),
                about: Vec::with_capacity(base.ncols()),
            }
        });
        for token in 0..base.ncols() {
            let more = &weights * errors.column(token).rows(0, first);
            let a = base.get((first, token))? + more.get(0)?;
            let b = base.get((second, token))? + more.get(1)?;
            let [one, two] = &mut both;
            let given = self.form.number(*one.bits.get(token)?);
            let [u, v] = match angles {
                Some(angles) => {
                    let [c, s] = *angles.get(token)?;
                    let slope = slope(numbers, (c, s));
                    let u = a * c - b * s;
                    [u, b * c + a * s + slope * (given - u)]
                }
                None => [a, b + narrow(*within.get((second, first))?) * (given - a)],
            };
            one.about.push(u);
            two.about.push(v);
        }
        for values in &both {
            let (step, table, bits) = values.choose(self.form)?;
            made.tables.steps.push(step);
            made.tables.tables.push(table);
            made.bits += bits;
        }
        Some(())
    }
}

/// What a block is made of.
struct Block<'a> {
    first: usize,
    own: &'a Samples,
    stored: &'a [u16],
    angles: &'a [Vec<[f32; 2]>],
    order: &'a [(usize, Option<usize>)],
}

/// What a block is about, as far as the product says.
struct Base {
    bias: Vec<f32>,
    predicted: Samples,
}

impl Before {
    fn new(given: &[Samples], own: &Samples) -> Option<Self> {
        let rows = given.iter().map(Samples::nrows).sum();
        let tokens = own.ncols();
        let mut numbers = Samples::zeros(rows, tokens);
        let mut from = 0;
        for part in given {
            numbers.rows_mut(from, part.nrows()).copy_from(part);
            from += part.nrows();
        }
        let moments = Moments::of(&numbers);
        let mean = moments.mean();
        let mut covariance = moments.covariance();
        for at in 0..rows {
            let own = covariance.get_mut((at, at))?;
            *own += RIDGE * *own + RIDGE_LEAST;
        }
        let count = tokens.max(1) as f64;
        let means = Moments::of_sum(own) / count;
        let with = product(own, &numbers) / count - means * mean.transpose();
        let factor = nalgebra::Cholesky::new(covariance)?.l();
        Some(Self {
            numbers,
            mean,
            factor,
            with,
        })
    }

    /// Weights of the first `known` numbers for some of the part's channels.
    fn weights(&self, known: usize, (first, rows): (usize, usize)) -> Option<Matrix> {
        let front = self.factor.view((0, 0), (known, known));
        let with = self.with.view((first, 0), (rows, known)).transpose();
        let half = front.solve_lower_triangular(&with)?;
        Some(front.tr_solve_lower_triangular(&half)?.transpose())
    }

    /// What they predict.
    fn base(&self, weights: &Matrix, (own, first): (&Samples, usize)) -> Base {
        let (rows, known) = weights.shape();
        let tokens = own.ncols();
        let mean = Moments::of_sum(&own.rows(first, rows).clone_owned()) / tokens.max(1) as f64;
        let bias = mean - weights * self.mean.rows(0, known);
        let bias = bias.map(narrow);
        let weights = weights.map(narrow);
        let mut predicted = Samples::zeros(rows, tokens);
        for from in (0..tokens).step_by(CHUNK) {
            let len = CHUNK.min(tokens - from);
            let numbers = self.numbers.view((0, from), (known, len));
            let mut to = predicted.columns_mut(from, len);
            to.gemm(1.0, &weights, &numbers, 0.0);
            for mut column in to.column_iter_mut() {
                column += &bias;
            }
        }
        Base {
            bias: bias.iter().copied().collect(),
            predicted,
        }
    }
}

/// Weights of a pair of channels within its block, and what they leave: both variances, and the
/// covariance.
fn pair_of(spread: &Matrix, pair: usize, within: &mut Matrix) -> Option<[f64; PAIR]> {
    let (first, second) = (2 * pair, 2 * pair + 1);
    let mut left = spread.view((first, first), (2, 2)).clone_owned();
    if first > 0 {
        let mut known = spread.view((0, 0), (first, first)).clone_owned();
        for at in 0..first {
            let own = known.get_mut((at, at))?;
            *own += RIDGE * *own + f64::from(f32::MIN_POSITIVE);
        }
        let with = spread.view((0, first), (first, 2)).clone_owned();
        let weights = nalgebra::Cholesky::new(known)?.solve(&with);
        left -= with.transpose() * &weights;
        within
            .view_mut((first, 0), (2, first))
            .copy_from(&weights.transpose());
    }
    let variance = |at: usize| Some(left.get((at, at))?.clamp(1e-29, 1e29));
    let (one, two, both) = (variance(0)?, variance(1)?, *left.get((0, 1))?);
    let most = (one * two).sqrt();
    let both = both.clamp(-0.999 * most, 0.999 * most);
    *within.get_mut((second, first))? = both / one;
    Some([one, two, both])
}

fn slope([first, second, both]: [f32; PAIR], (c, s): (f32, f32)) -> f32 {
    let variance = c * c * first - 2.0 * c * s * both + s * s * second;
    let together = c * s * (first - second) + (c * c - s * s) * both;
    together / variance.max((first + second) * 1e-6)
}
