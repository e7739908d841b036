//! The inner loop of every matrix product: rows times packed panels.
//!
//! Upstairs:   `matrix` (weights) and `attention` (scores and mixing).
//! Downstairs: `pulp`, which picks the vector instructions of the machine at run time, safely.
//!
//! The right-hand side is packed in panels of 16 columns, `[depth][16]`, so that the loop reads
//! it front to back; the left-hand side stays row major.
//!
//! Invariant E3: every element of a product is one chain of fused multiply-adds over the depth,
//! first to last. Blocking, the number of rows at hand, threads: nothing else enters its bits.
//!
//! Not here on purpose: threads. Callers split rows or panels, which changes no bit.

use std::array;

use pulp::Simd;

/// Columns of a panel.
pub(super) const PANEL: usize = 16;

/// Rows that are in registers at once: 6 x 16 numbers are twelve AVX2 registers of sixteen.
const ROW_BLOCK: usize = 6;

/// Depth handled at once, so that a piece of a panel (16 KiB) stays in the first cache.
const DEPTH_BLOCK: usize = 256;

/// Depth whose loop has no bounds checks.
const DEPTH_STEP: usize = 64;

/// The left-hand side: whole rows of `stride` numbers, of which the first `depth` count.
#[derive(Debug, Clone, Copy)]
pub(super) struct Left<'a> {
    pub(super) values: &'a [f32],
    pub(super) stride: usize,
    pub(super) depth: usize,
}

/// Where the product is added: as many rows, of `stride` numbers, the first `columns` of them.
#[derive(Debug)]
pub(super) struct Out<'a> {
    pub(super) values: &'a mut [f32],
    pub(super) stride: usize,
    pub(super) columns: usize,
}

/// Adds `left * panels` to `out`. Each panel holds at least `depth * PANEL` numbers.
#[inline(always)]
pub(super) fn multiply_add<'p, S: Simd>(
    simd: S,
    left: Left<'_>,
    panels: impl Iterator<Item = &'p [f32]> + Clone,
    out: &mut Out<'_>,
) {
    // A vector has as many lanes as the machine offers; a panel is a whole number of vectors.
    match S::F32_LANES {
        8 => by_panel::<S, 2>(simd, left, panels, out),
        4 => by_panel::<S, 4>(simd, left, panels, out),
        16 => by_panel::<S, 1>(simd, left, panels, out),
        _ => by_panel::<S, PANEL>(simd, left, panels, out),
    }
}

#[inline(always)]
#[expect(
    clippy::indexing_slicing,
    reason = "a panel too short must not pass for zeros"
)]
fn by_panel<'p, S: Simd, const VECTORS: usize>(
    simd: S,
    left: Left<'_>,
    panels: impl Iterator<Item = &'p [f32]> + Clone,
    out: &mut Out<'_>,
) {
    for from in (0..left.depth).step_by(DEPTH_BLOCK) {
        let to = left.depth.min(from + DEPTH_BLOCK);
        for (index, panel) in panels.clone().enumerate() {
            let column = index * PANEL;
            let width = PANEL.min(out.columns.saturating_sub(column));
            let piece = &panel[from * PANEL..to * PANEL];
            let (lanes, _) = S::as_simd_f32s(piece);
            let (piece, _) = lanes.as_chunks::<VECTORS>();
            let at = Place {
                from,
                left_stride: left.stride,
                column,
                width,
                stride: out.stride,
            };
            let rows = left.values.chunks(left.stride * ROW_BLOCK);
            for (rows, out) in rows.zip(out.values.chunks_mut(out.stride * ROW_BLOCK)) {
                match rows.len() / left.stride {
                    6 => block::<S, VECTORS, 6>(simd, rows, piece, out, at),
                    5 => block::<S, VECTORS, 5>(simd, rows, piece, out, at),
                    4 => block::<S, VECTORS, 4>(simd, rows, piece, out, at),
                    3 => block::<S, VECTORS, 3>(simd, rows, piece, out, at),
                    2 => block::<S, VECTORS, 2>(simd, rows, piece, out, at),
                    _ => block::<S, VECTORS, 1>(simd, rows, piece, out, at),
                }
            }
        }
    }
}

/// Where in its rows a piece of a panel belongs.
#[derive(Clone, Copy)]
struct Place {
    /// First depth of the piece.
    from: usize,
    left_stride: usize,
    /// First column of the piece.
    column: usize,
    /// Columns of the piece that exist.
    width: usize,
    stride: usize,
}

/// `ROWS` rows times one piece of a panel, in registers.
#[inline(always)]
#[expect(
    clippy::indexing_slicing,
    reason = "rows and panels were cut to size by the caller"
)]
fn block<S: Simd, const VECTORS: usize, const ROWS: usize>(
    simd: S,
    rows: &[f32],
    piece: &[[S::f32s; VECTORS]],
    out: &mut [f32],
    at: Place,
) {
    let mut sums = [[simd.splat_f32s(0.0); VECTORS]; ROWS];
    let mut cut: [&[f32]; ROWS] = [&[]; ROWS];
    for row in 0..ROWS {
        cut[row] = &rows[row * at.left_stride + at.from..][..piece.len()];
        let place = &out[row * at.stride + at.column..][..at.width];
        sums[row] = load::<S, VECTORS>(place);
    }
    let (steps, rest) = piece.as_chunks::<DEPTH_STEP>();
    for (index, columns) in steps.iter().enumerate() {
        let mut factors = [&[0.0; DEPTH_STEP]; ROWS];
        for row in 0..ROWS {
            factors[row] = &cut[row].as_chunks::<DEPTH_STEP>().0[index];
        }
        sums = step(simd, factors, columns, sums);
    }
    for (depth, columns) in rest.iter().enumerate() {
        let mut factors = [&[0.0; 1]; ROWS];
        for row in 0..ROWS {
            let at = steps.len() * DEPTH_STEP + depth;
            factors[row] = &cut[row].as_chunks::<1>().0[at];
        }
        sums = step(simd, factors, array::from_ref(columns), sums);
    }
    for row in 0..ROWS {
        let place = &mut out[row * at.stride + at.column..][..at.width];
        store::<S, VECTORS>(&sums[row], place);
    }
}

/// A panel's width of numbers, or the fewer that exist at an edge.
#[inline(always)]
#[expect(
    clippy::indexing_slicing,
    reason = "a panel is exactly VECTORS vectors"
)]
fn load<S: Simd, const VECTORS: usize>(place: &[f32]) -> [S::f32s; VECTORS] {
    let mut whole = [0.0; PANEL];
    if let Some(place) = place.first_chunk::<PANEL>() {
        whole = *place;
    } else {
        whole
            .iter_mut()
            .zip(place)
            .for_each(|(to, from)| *to = *from);
    }
    S::as_simd_f32s(&whole).0.as_chunks::<VECTORS>().0[0]
}

/// The reverse of [`load`].
#[inline(always)]
fn store<S: Simd, const VECTORS: usize>(sums: &[S::f32s; VECTORS], place: &mut [f32]) {
    if let Some(place) = place.first_chunk_mut::<PANEL>() {
        S::as_mut_simd_f32s(place).0.copy_from_slice(sums);
    } else {
        let mut whole = [0.0; PANEL];
        S::as_mut_simd_f32s(&mut whole).0.copy_from_slice(sums);
        place
            .iter_mut()
            .zip(&whole)
            .for_each(|(to, from)| *to = *from);
    }
}

/// A run of the depth. Lengths are types and sums go by value, so that the compiler drops every
/// bounds check and keeps the sums in registers; this loop is where the engine spends its time.
#[inline(always)]
#[expect(
    clippy::indexing_slicing,
    reason = "every index is below a length that is a type"
)]
fn step<S: Simd, const VECTORS: usize, const ROWS: usize, const DEPTH: usize>(
    simd: S,
    factors: [&[f32; DEPTH]; ROWS],
    columns: &[[S::f32s; VECTORS]; DEPTH],
    mut sums: [[S::f32s; VECTORS]; ROWS],
) -> [[S::f32s; VECTORS]; ROWS] {
    for depth in 0..DEPTH {
        let columns = columns[depth];
        for row in 0..ROWS {
            let factor = simd.splat_f32s(factors[row][depth]);
            for vector in 0..VECTORS {
                sums[row][vector] = simd.mul_add_f32s(factor, columns[vector], sums[row][vector]);
            }
        }
    }
    sums
}

#[cfg(test)]
mod tests;
