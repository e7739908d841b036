//! Keys and values of one layer from its input: what hidden states are restored for.
//!
//! Upstairs:   engines without a projection of their own that can be called alone; whoever writes
//!             a faster one compares it with this.
//! Downstairs: `half`, and `libm` for sines and cosines.
//!
//! Norm, the K and V rows of the attention's weights, biases and norms of K heads where the model
//! has them, RoPE: a small part of a layer, without attention, so that every token can be done by
//! itself. An engine whose cache has to be the very bits that it computes uses its own arithmetic;
//! this is the definition, in plain single precision, which such arithmetic approaches.
//!
//! Invariants kept here
//!   J1  A projection that exists fits together: what it is given later is measured against it, and
//!       no length is taken from bytes.
//!   J2  Sums run from the first input to the last, products and sums rounded one by one: the same
//!       bits on every machine.
//!
//! Not here on purpose: latent attention, whose cache is smaller than its input; and layer norms
//! that subtract a mean.

use half::{bf16, f16};
use kvtier_proto::descriptor::PartOrder;
use kvtier_proto::element::Element;
use kvtier_proto::limits::{BLOCK_TOKENS_MAX, HEADS_MAX, WIDTH_MAX};

use crate::profile::Rope;

/// Why a projection cannot be made or used.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{field} is {value}; accepted: {accepted}")]
pub struct ProjectError {
    field: &'static str,
    value: String,
    accepted: String,
}

fn refuse(field: &'static str, value: impl ToString, accepted: impl Into<String>) -> ProjectError {
    ProjectError {
        field,
        value: value.to_string(),
        accepted: accepted.into(),
    }
}

/// A root mean square norm.
#[derive(Debug, Clone, PartialEq)]
pub struct Norm {
    /// One factor for each channel.
    pub gain: Vec<f32>,
    /// Added to the mean square.
    pub epsilon: f32,
}

/// Heads that one matrix makes.
#[derive(Debug, Clone, PartialEq)]
pub struct Heads {
    /// `[heads * dim, inputs]`, row-major.
    pub weights: Vec<f32>,
    /// One for each output, or none.
    pub bias: Vec<f32>,
    /// Channels of a head.
    pub dim: usize,
}

/// What a layer does to its input before it attends.
#[derive(Debug, Clone, PartialEq)]
pub struct Weights {
    /// Norm of the input.
    pub norm: Norm,
    /// Makes keys.
    pub k: Heads,
    /// Makes values.
    pub v: Heads,
    /// Norm of each key head before RoPE, where the model has one.
    pub k_norm: Option<Norm>,
    /// Angles of keys; none where stored keys are not rotated.
    pub rope: Option<Rope>,
}

/// How inputs come, and keys and values are wanted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Form {
    /// Type of every number that goes in and out.
    pub element: Element,
    /// Order inside K and V. Inputs have no heads.
    pub order: PartOrder,
}

/// The projection of one layer.
#[derive(Debug, Clone)]
pub struct Projection {
    weights: Weights,
    /// Both matrices by input: `[inputs][outputs]`, so that the loop runs over outputs.
    k_by_input: Vec<f32>,
    v_by_input: Vec<f32>,
    heads: usize,
    form: Form,
}

impl Projection {
    /// Checks that everything fits together (J1).
    ///
    /// # Errors
    /// [`ProjectError`] names what does not, and what would.
    pub fn new(weights: Weights, form: Form) -> Result<Self, ProjectError> {
        let (float, inputs) = (float_bytes(form.element).is_some(), weights.norm.gain.len());
        if !float {
            return Err(refuse("element", form.element.as_str(), "bf16, f16 or f32"));
        }
        if !within(inputs, WIDTH_MAX) {
            return Err(refuse(
                "norm.gain",
                inputs,
                format!("1 to {WIDTH_MAX} channels"),
            ));
        }
        let heads = count("k.weights", &weights.k, inputs)?;
        let values = count("v.weights", &weights.v, inputs)?;
        if heads != values {
            return Err(refuse(
                "v.weights",
                values,
                format!("{heads} heads, as K has"),
            ));
        }
        let dim = weights.k.dim;
        let own = weights.k_norm.as_ref().map_or(dim, |norm| norm.gain.len());
        if own != dim {
            return Err(refuse("k_norm.gain", own, format!("{dim} channels")));
        }
        let pairs = weights
            .rope
            .as_ref()
            .map_or(0, |rope| rope.frequencies.len());
        if pairs > dim / 2 {
            return Err(refuse(
                "rope.frequencies",
                pairs,
                format!("at most {}", dim / 2),
            ));
        }
        Ok(Self {
            k_by_input: transposed(&weights.k.weights, inputs),
            v_by_input: transposed(&weights.v.weights, inputs),
            weights,
            heads,
            form,
        })
    }

    /// Makes K and V of the tokens whose inputs are in `hidden`, the first of which stands at
    /// `position`. All three are parts of a block: as many bytes as their tokens take.
    ///
    /// # Errors
    /// [`ProjectError`] when a length is another; nothing was written.
    pub fn project(
        &self,
        hidden: &[u8],
        position: u32,
        k: &mut [u8],
        v: &mut [u8],
    ) -> Result<(), ProjectError> {
        let inputs = self.weights.norm.gain.len();
        let element = float_bytes(self.form.element).unwrap_or(1);
        let tokens = hidden.len() / (inputs * element);
        if !hidden.len().is_multiple_of(inputs * element) || !within(tokens, BLOCK_TOKENS_MAX) {
            let accepted = format!(
                "{} bytes for each of 1 to {BLOCK_TOKENS_MAX} tokens",
                inputs * element
            );
            return Err(refuse(
                "hidden",
                format!("{} bytes", hidden.len()),
                accepted,
            ));
        }
        for (field, target, dim) in [
            ("k", k.len(), self.weights.k.dim),
            ("v", v.len(), self.weights.v.dim),
        ] {
            let wanted = tokens * self.heads * dim * element;
            if target != wanted {
                return Err(refuse(
                    field,
                    format!("{target} bytes"),
                    format!("{wanted} bytes"),
                ));
            }
        }
        for (token, input) in hidden.chunks_exact(inputs * element).enumerate() {
            let mut row = widen(self.form.element, input);
            normalise(&mut row, &self.weights.norm);
            let mut keys = apply(
                &self.k_by_input,
                &self.weights.k.bias,
                &row,
                self.heads * self.weights.k.dim,
            );
            for key in keys.chunks_exact_mut(self.weights.k.dim) {
                if let Some(norm) = &self.weights.k_norm {
                    normalise(key, norm);
                }
                if let Some(rope) = &self.weights.rope {
                    turn(key, rope, f64::from(position) + token_number(token));
                }
            }
            let values = apply(
                &self.v_by_input,
                &self.weights.v.bias,
                &row,
                self.heads * self.weights.v.dim,
            );
            self.place(&keys, self.weights.k.dim, (token, tokens), k);
            self.place(&values, self.weights.v.dim, (token, tokens), v);
        }
        Ok(())
    }

    /// Rounds the heads of one token and puts them where the order wants them.
    fn place(&self, row: &[f32], dim: usize, (token, tokens): (usize, usize), into: &mut [u8]) {
        let head_bytes = dim * float_bytes(self.form.element).unwrap_or(1);
        for (head, values) in row.chunks_exact(dim).enumerate() {
            let at = match self.form.order {
                PartOrder::TokenMajor => token * self.heads + head,
                PartOrder::HeadMajor => head * tokens + token,
            };
            let place = into.get_mut(at * head_bytes..(at + 1) * head_bytes);
            narrow(self.form.element, values, place.unwrap_or_default());
        }
    }
}

fn within(value: usize, max: u32) -> bool {
    value >= 1 && u32::try_from(value).is_ok_and(|value| value <= max)
}

/// Heads of a matrix, if it is one with whole heads.
fn count(field: &'static str, heads: &Heads, inputs: usize) -> Result<usize, ProjectError> {
    let (outputs, dim) = (heads.weights.len() / inputs, heads.dim);
    let whole = heads.weights.len().is_multiple_of(inputs) && within(dim, WIDTH_MAX);
    if !whole || !outputs.is_multiple_of(dim) || !within(outputs / dim, HEADS_MAX) {
        let value = format!("{} numbers for heads of {dim}", heads.weights.len());
        let accepted = format!("1 to {HEADS_MAX} heads of {inputs} numbers a channel");
        return Err(refuse(field, value, accepted));
    }
    let bias = heads.bias.len();
    if bias != 0 && bias != outputs {
        return Err(refuse("bias", bias, format!("0 or {outputs} numbers")));
    }
    Ok(outputs / dim)
}

fn transposed(rows: &[f32], inputs: usize) -> Vec<f32> {
    let column = |input| rows.iter().skip(input).step_by(inputs).copied();
    (0..inputs).flat_map(column).collect()
}

fn apply(by_input: &[f32], bias: &[f32], row: &[f32], outputs: usize) -> Vec<f32> {
    let mut sums = vec![0.0_f32; outputs];
    for (input, weights) in row.iter().zip(by_input.chunks_exact(outputs)) {
        for (sum, weight) in sums.iter_mut().zip(weights) {
            *sum += input * weight;
        }
    }
    sums.iter_mut()
        .zip(bias)
        .for_each(|(sum, bias)| *sum += bias);
    sums
}

fn normalise(row: &mut [f32], norm: &Norm) {
    let squares = row.iter().map(|x| x * x).sum::<f32>();
    #[expect(clippy::cast_precision_loss, reason = "widths are far below 2^24")]
    let mean = squares / row.len() as f32;
    let scale = 1.0 / (mean + norm.epsilon).sqrt();
    for (x, gain) in row.iter_mut().zip(&norm.gain) {
        *x = *x * scale * gain;
    }
}

#[expect(clippy::cast_precision_loss, reason = "at most 2048 tokens (J1)")]
const fn token_number(token: usize) -> f64 {
    token as f64
}

/// Turns a head as engines do: frequency and angle in single precision.
#[expect(
    clippy::cast_possible_truncation,
    reason = "rounding to single precision is meant"
)]
fn turn(head: &mut [f32], rope: &Rope, position: f64) {
    let pairs = rope.frequencies.len();
    let angle = |frequency: &f64| f64::from(position as f32 * *frequency as f32);
    let angles = rope.frequencies.iter().map(|one| libm::sincos(angle(one)));
    let angles = angles.map(|(sine, cosine)| (sine as f32, cosine as f32));
    let turned = |a: &mut f32, b: &mut f32, sine: f32, cosine: f32| {
        (*a, *b) = (*a * cosine - *b * sine, *b * cosine + *a * sine);
    };
    let Some(head) = head.get_mut(..2 * pairs) else {
        return;
    };
    if rope.rotate_half {
        let (low, high) = head.split_at_mut(pairs);
        let both = low.iter_mut().zip(high);
        both.zip(angles)
            .for_each(|((a, b), (sine, cosine))| turned(a, b, sine, cosine));
    } else {
        let both = head.as_chunks_mut::<2>().0.iter_mut();
        both.zip(angles)
            .for_each(|([a, b], (sine, cosine))| turned(a, b, sine, cosine));
    }
}

/// Size of the floats that can be projected.
const fn float_bytes(element: Element) -> Option<usize> {
    match element {
        Element::Bf16 | Element::F16 => Some(2),
        Element::F32 => Some(4),
        _ => None,
    }
}

fn widen(element: Element, bytes: &[u8]) -> Vec<f32> {
    let halves = bytes.as_chunks::<2>().0.iter();
    match element {
        Element::Bf16 => halves.map(|x| bf16::from_le_bytes(*x).to_f32()).collect(),
        Element::F16 => halves.map(|x| f16::from_le_bytes(*x).to_f32()).collect(),
        _ => {
            let words = bytes.as_chunks::<4>().0.iter();
            words.map(|x| f32::from_le_bytes(*x)).collect()
        }
    }
}

/// Rounds to the nearest number of the type, ties to even.
fn narrow(element: Element, values: &[f32], into: &mut [u8]) {
    let halves = || values.iter().copied();
    match element {
        Element::Bf16 => {
            let places = into.as_chunks_mut::<2>().0.iter_mut();
            places
                .zip(halves())
                .for_each(|(place, x)| *place = bf16::from_f32(x).to_le_bytes());
        }
        Element::F16 => {
            let places = into.as_chunks_mut::<2>().0.iter_mut();
            places
                .zip(halves())
                .for_each(|(place, x)| *place = f16::from_f32(x).to_le_bytes());
        }
        _ => {
            let places = into.as_chunks_mut::<4>().0.iter_mut();
            places
                .zip(halves())
                .for_each(|(place, x)| *place = x.to_le_bytes());
        }
    }
}

#[cfg(test)]
mod tests;
