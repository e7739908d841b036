//! AVX-512 with VNNI for the levels with tables. One of this package's rooms of unsafe code.
//!
//! Upstairs:   [`super::ladder`].
//! Downstairs: the processor.
//!
//! Unsafe is used to call functions that need these instructions with the proof that they are
//! there ([`Fast512`], [`Vnni`]), and to load and store whole registers from references of that
//! size.
//!
//! Invariants kept here
//!   T2  Sums are exact modulo 2^32: `vpdpwssd` adds two products of 16-bit numbers and does not
//!       saturate.

use std::arch::is_x86_feature_detected;
use std::arch::x86_64::{
    __m512, __m512i, _mm512_add_ps, _mm512_dpwssd_epi32, _mm512_loadu_ps, _mm512_loadu_si512,
    _mm512_mul_ps, _mm512_set1_epi32, _mm512_set1_ps, _mm512_setzero_ps, _mm512_setzero_si512,
    _mm512_storeu_ps, _mm512_storeu_si512,
};

use super::Fast512;
use super::ladder::Work;
use crate::codec::ladder::product::{Column, Operand, PANEL, TILE};

/// Registers of a column.
const REGS: usize = 2;

/// Proof that this processor has VNNI beside the instructions of [`Fast512`] (V1).
#[derive(Debug, Clone, Copy)]
pub(crate) struct Vnni(());

/// The proof, where they are there. The answer is kept by the standard library.
pub(crate) fn there() -> Option<Vnni> {
    let there = super::fast512().is_some() && is_x86_feature_detected!("avx512vnni");
    there.then_some(Vnni(()))
}

/// [`super::ladder::vectorised`].
pub(crate) fn run<W: Work>(_: Fast512, work: W) -> W::Out {
    // SAFETY: `Fast512` proves that this processor has the instructions (V1).
    unsafe { run_wide(work) }
}

#[target_feature(enable = "avx2,avx512f,avx512bw,avx512vl")]
fn run_wide<W: Work>(work: W) -> W::Out {
    work.run()
}

/// [`crate::codec::ladder::product::multiply`].
pub(crate) fn multiply(
    _: Vnni,
    panel: &[Column],
    with: &Operand<'_>,
    tile: usize,
    out: &mut [Column; TILE],
) {
    // SAFETY: `Vnni` proves that this processor has the instructions (V1).
    unsafe { multiply_wide(panel, with, tile, out) }
}

#[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
fn multiply_wide(panel: &[Column], with: &Operand<'_>, tile: usize, out: &mut [Column; TILE]) {
    let mut sums = [[_mm512_setzero_si512(); REGS]; TILE];
    for (column, words) in panel.iter().zip(with.tile(tile)) {
        let column: [__m512i; REGS] = load(column);
        for (sums, word) in sums.iter_mut().zip(words) {
            let word = _mm512_set1_epi32(*word);
            for (sum, column) in sums.iter_mut().zip(column) {
                *sum = _mm512_dpwssd_epi32(*sum, column, word);
            }
        }
    }
    for (out, sums) in out.iter_mut().zip(sums) {
        store(out, sums);
    }
}

/// [`crate::codec::ladder::product::multiply_real`].
pub(crate) fn multiply_real(
    _: Fast512,
    panel: &[[f32; PANEL]],
    left: &[[f32; TILE]],
    out: &mut [[f32; PANEL]; TILE],
) {
    // SAFETY: `Fast512` proves that this processor has the instructions (V1).
    unsafe { multiply_real_wide(panel, left, out) }
}

#[target_feature(enable = "avx512f")]
fn multiply_real_wide(
    panel: &[[f32; PANEL]],
    left: &[[f32; TILE]],
    out: &mut [[f32; PANEL]; TILE],
) {
    let mut sums = [[_mm512_setzero_ps(); REGS]; TILE];
    for (column, left) in panel.iter().zip(left) {
        let column = load_real(column);
        for (sums, value) in sums.iter_mut().zip(left) {
            let value = _mm512_set1_ps(*value);
            for (sum, column) in sums.iter_mut().zip(column) {
                let product = _mm512_mul_ps(column, value);
                *sum = _mm512_add_ps(*sum, product);
            }
        }
    }
    for (out, sums) in out.iter_mut().zip(sums) {
        store_real(out, sums);
    }
}

#[target_feature(enable = "avx512f")]
fn load(column: &Column) -> [__m512i; REGS] {
    let mut regs = [_mm512_setzero_si512(); REGS];
    for (reg, words) in regs.iter_mut().zip(column.as_chunks::<16>().0) {
        // SAFETY: a register is sixteen words, and `words` is a reference to so many.
        *reg = unsafe { _mm512_loadu_si512(std::ptr::from_ref(words).cast()) };
    }
    regs
}

#[target_feature(enable = "avx512f")]
fn load_real(column: &[f32; PANEL]) -> [__m512; REGS] {
    let mut regs = [_mm512_setzero_ps(); REGS];
    for (reg, numbers) in regs.iter_mut().zip(column.as_chunks::<16>().0) {
        // SAFETY: a register is sixteen numbers, and `numbers` is a reference to so many.
        *reg = unsafe { _mm512_loadu_ps(numbers.as_ptr()) };
    }
    regs
}

#[target_feature(enable = "avx512f")]
fn store_real(column: &mut [f32; PANEL], regs: [__m512; REGS]) {
    for (reg, numbers) in regs.into_iter().zip(column.as_chunks_mut::<16>().0) {
        // SAFETY: a register is sixteen numbers, and `numbers` is a reference to so many.
        unsafe { _mm512_storeu_ps(numbers.as_mut_ptr(), reg) };
    }
}

#[target_feature(enable = "avx512f")]
fn store(column: &mut Column, regs: [__m512i; REGS]) {
    for (words, reg) in column.as_chunks_mut::<16>().0.iter_mut().zip(regs) {
        // SAFETY: a register is sixteen words, and `words` is a reference to so many.
        unsafe { _mm512_storeu_si512(std::ptr::from_mut(words).cast(), reg) };
    }
}
