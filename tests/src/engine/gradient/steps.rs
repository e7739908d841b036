//! The small operations of a layer, backwards: norm, gate, softmax; and turning tables round.
//!
//! Upstairs:   `gradient` and its attention.
//! Downstairs: `rayon` lends the cores.
//!
//! Not here on purpose: matrix products; those of a transposed [`Weight`] are the same products.
//!
//! [`Weight`]: super::super::matrix::Weight

use rayon::prelude::*;

use super::super::math::{dot, exp};

/// Backwards through the norm of the rows `x`: from how a result depends on the norm's output to
/// how it depends on `x`.
pub(super) fn rms_norm_back(x: &[f32], gain: &[f32], epsilon: f32, out: &[f32]) -> Vec<f32> {
    let width = gain.len();
    let mut back = vec![0.0; x.len()];
    back.par_chunks_mut(width)
        .zip(x.par_chunks(width).zip(out.par_chunks(width)))
        .with_min_len(16)
        .for_each(|(back, (x, out))| {
            #[expect(clippy::cast_precision_loss, reason = "widths are far below 2^24")]
            let width = width as f32;
            let scale = 1.0 / (dot(x, x) / width + epsilon).sqrt();
            for ((back, out), gain) in back.iter_mut().zip(out).zip(gain) {
                *back = out * gain;
            }
            let along = dot(back, x) * scale * scale / width;
            for (back, x) in back.iter_mut().zip(x) {
                *back = (*back - x * along) * scale;
            }
        });
    back
}

/// Backwards through `silu(gate) * up`, where each row of `gate_up` is a gate of `inner` numbers
/// followed by an up part.
pub(super) fn gated_back(gate_up: &[f32], inner: usize, out: &[f32]) -> Vec<f32> {
    let mut back = vec![0.0; gate_up.len()];
    back.par_chunks_mut(2 * inner)
        .zip(gate_up.par_chunks(2 * inner).zip(out.par_chunks(inner)))
        .with_min_len(8)
        .for_each(|(back, (gate_up, out))| {
            let (gate_back, up_back) = back.split_at_mut(inner);
            let (gates, ups) = gate_up.split_at(inner);
            let places = gate_back.iter_mut().zip(up_back);
            for ((places, out), (gate, up)) in places.zip(out).zip(gates.iter().zip(ups)) {
                let open = 1.0 / (1.0 + exp(-gate));
                *places.0 = out * up * open * (1.0 + gate * (1.0 - open));
                *places.1 = out * gate * open;
            }
        });
    back
}

/// Backwards through a softmax whose output was `weights`, row by row, in place of `out`.
pub(super) fn softmax_back(weights: &[f32], out: &mut [f32], width: usize) {
    for (out, weights) in out.chunks_exact_mut(width).zip(weights.chunks_exact(width)) {
        let mean = dot(out, weights);
        for (out, weight) in out.iter_mut().zip(weights) {
            *out = (*out - mean) * weight;
        }
    }
}

/// Softmax of the `seen` columns of a row; zeros elsewhere.
pub(super) fn softmax(row: &mut [f32], seen: &std::ops::Range<usize>) {
    let (before, rest) = row.split_at_mut(seen.start.min(row.len()));
    let (visible, after) = rest.split_at_mut(seen.len().min(rest.len()));
    before.fill(0.0);
    after.fill(0.0);
    let top = visible.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let mut sum = 0.0;
    for score in visible.iter_mut() {
        *score = exp(*score - top);
        sum += *score;
    }
    visible.iter_mut().for_each(|weight| *weight /= sum);
}

/// Rows become columns.
pub(super) fn transpose(values: &[f32], width: usize) -> Vec<f32> {
    let mut out = Vec::with_capacity(values.len());
    for column in 0..width {
        out.extend(values.iter().skip(column).step_by(width));
    }
    out
}
