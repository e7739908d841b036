//! The small operations between the matrix products: norm, rotation, exponential, gate.
//!
//! Upstairs:   `layer`, `attention`, `sequence`.
//! Downstairs: nothing.
//!
//! Written as plain loops over fixed lanes so that the compiler vectorises them for whatever the
//! machine has, without fused multiply-adds: the same bits on every x86-64 and every thread count.
//!
//! Not here on purpose: matrix products (`kernel`).

use pulp::Simd;
use rayon::prelude::*;

/// Partial sums kept side by side in a reduction; fixed, because it decides the rounding.
const LANES: usize = 16;

/// Sum of products, always in the same order.
#[inline(always)]
pub(super) fn dot(a: &[f32], b: &[f32]) -> f32 {
    let mut sums = [0.0_f32; LANES];
    let (a_lanes, b_lanes) = (a.chunks_exact(LANES), b.chunks_exact(LANES));
    let tail: f32 = a_lanes
        .remainder()
        .iter()
        .zip(b_lanes.remainder())
        .map(|(x, y)| x * y)
        .sum();
    for (x, y) in a_lanes.zip(b_lanes) {
        for ((sum, x), y) in sums.iter_mut().zip(x).zip(y) {
            *sum += x * y;
        }
    }
    sums.iter().sum::<f32>() + tail
}

/// Largest value; negative infinity for nothing.
#[inline(always)]
pub(super) fn max<S: Simd>(simd: S, values: &[f32]) -> f32 {
    let (vectors, tail) = S::as_simd_f32s(values);
    let mut best = simd.splat_f32s(f32::NEG_INFINITY);
    for vector in vectors {
        best = simd.max_f32s(best, *vector);
    }
    tail.iter()
        .copied()
        .fold(simd.reduce_max_f32s(best), f32::max)
}

/// Replaces each score by `exp(score - shift)` and returns their sum.
#[inline(always)]
pub(super) fn exp_and_sum(scores: &mut [f32], shift: f32) -> f32 {
    let mut sums = [0.0_f32; LANES];
    let (lanes, tail) = scores.as_chunks_mut::<LANES>();
    for lanes in lanes {
        for (score, sum) in lanes.iter_mut().zip(&mut sums) {
            *score = exp(*score - shift);
            *sum += *score;
        }
    }
    let mut tail_sum = 0.0;
    for score in tail {
        *score = exp(*score - shift);
        tail_sum += *score;
    }
    sums.iter().sum::<f32>() + tail_sum
}

/// e to the `x`, within 2 units in the last place; inputs are clamped to what f32 can hold.
///
/// Ours and not the C library's because it must be branch-free (a row of attention takes
/// thousands) and because its bits must not depend on the library of the machine.
#[inline(always)]
pub(super) fn exp(x: f32) -> f32 {
    // Adding 1.5 * 2^23 rounds to the nearest whole number and leaves it in the low bits.
    const ROUND: f32 = 12_582_912.0;
    const LN2_HIGH: f32 = 355.0 / 512.0; // exact in few bits, so `whole * LN2_HIGH` is too
    const LN2_LOW: f32 = -2.121_944_4e-4;
    let x = if x < -87.0 { -87.0 } else { x };
    let x = if x > 88.0 { 88.0 } else { x };
    let shifted = x * std::f32::consts::LOG2_E + ROUND;
    let whole = shifted - ROUND;
    let r = (x - whole * LN2_HIGH) - whole * LN2_LOW;
    let mut poly = 1.987_569_2e-4;
    poly = poly * r + 1.398_2e-3;
    poly = poly * r + 8.333_452e-3;
    poly = poly * r + 4.166_579_6e-2;
    poly = poly * r + 1.666_666_5e-1;
    poly = poly * r + 0.5;
    let mantissa = poly * r * r + r + 1.0;
    let power = f32::from_bits(shifted.to_bits().wrapping_add(127) << 23);
    mantissa * power
}

/// Root mean square norm of each row of `width`.
pub(super) fn rms_norm(rows: &[f32], gain: &[f32], epsilon: f32) -> Vec<f32> {
    let width = gain.len();
    let mut out = vec![0.0; rows.len()];
    out.par_chunks_mut(width)
        .zip(rows.par_chunks(width))
        .with_min_len(16)
        .for_each(|(out, row)| {
            #[expect(clippy::cast_precision_loss, reason = "widths are far below 2^24")]
            let mean = dot(row, row) / width as f32;
            let scale = 1.0 / (mean + epsilon).sqrt();
            for ((out, x), gain) in out.iter_mut().zip(row).zip(gain) {
                *out = x * scale * gain;
            }
        });
    out
}

/// `silu(gate) * up`, where each row of `gate_up` is a gate followed by an up part.
pub(super) fn gated(gate_up: &[f32], intermediate: usize) -> Vec<f32> {
    let mut out = vec![0.0; gate_up.len() / 2];
    out.par_chunks_mut(intermediate)
        .zip(gate_up.par_chunks(2 * intermediate))
        .with_min_len(8)
        .for_each(|(out, row)| {
            let (gate, up) = row.split_at(intermediate);
            for ((out, gate), up) in out.iter_mut().zip(gate).zip(up) {
                *out = gate / (1.0 + exp(-gate)) * up;
            }
        });
    out
}

/// Adds `more` to `to`, element by element.
pub(super) fn add(to: &mut [f32], more: &[f32]) {
    for (to, more) in to.iter_mut().zip(more) {
        *to += more;
    }
}

/// Cosines and sines of RoPE for one rotated width.
#[derive(Debug)]
pub(super) struct Rope {
    half: usize,
    /// `[position][half]` of (cosine, sine), cosines first within a position.
    table: Vec<f32>,
}

impl Rope {
    /// The table for positions `0..positions`; `width` is even.
    pub(super) fn new(width: usize, positions: usize, theta: f32) -> Self {
        let half = width / 2;
        let mut table = Vec::with_capacity(positions * width);
        let frequencies: Vec<f32> = (0..half)
            .map(|i| narrow(1.0 / f64::from(theta).powf(2.0 * i as f64 / width as f64)))
            .collect();
        for position in 0..positions {
            // The angle is formed in f32, as the models were trained with.
            let angles = frequencies
                .iter()
                .map(|f| f64::from(narrow(position as f64) * f));
            table.extend(angles.clone().map(|angle| narrow(angle.cos())));
            table.extend(angles.map(|angle| narrow(angle.sin())));
        }
        Self { half, table }
    }

    /// Turns one head at `position`: the pairs are (i, i + width / 2), as serving engines store.
    #[expect(
        clippy::indexing_slicing,
        reason = "a position too far must not pass for unturned"
    )]
    pub(super) fn turn(&self, head: &mut [f32], position: usize) {
        let row = &self.table[position * 2 * self.half..][..2 * self.half];
        let (cosines, sines) = row.split_at(self.half);
        let (low, high) = head.split_at_mut(self.half);
        for (((low, high), cos), sin) in low.iter_mut().zip(high).zip(cosines).zip(sines) {
            let (a, b) = (*low, *high);
            *low = a * cos - b * sin;
            *high = b * cos + a * sin;
        }
    }

    /// The reverse of [`Rope::turn`], and what a gradient goes through on its way back.
    #[expect(
        clippy::indexing_slicing,
        reason = "a position too far must not pass for unturned"
    )]
    pub(super) fn turn_back(&self, head: &mut [f32], position: usize) {
        let row = &self.table[position * 2 * self.half..][..2 * self.half];
        let (cosines, sines) = row.split_at(self.half);
        let (low, high) = head.split_at_mut(self.half);
        for (((low, high), cos), sin) in low.iter_mut().zip(high).zip(cosines).zip(sines) {
            let (a, b) = (*low, *high);
            *low = a * cos + b * sin;
            *high = b * cos - a * sin;
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

#[cfg(test)]
mod tests;
