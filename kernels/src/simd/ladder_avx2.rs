//! AVX2 for the levels with tables. One of this package's rooms of unsafe code.
//!
//! Upstairs:   [`super::ladder`].
//! Downstairs: the processor.
//!
//! Unsafe is used to call functions that need AVX2 with the proof that it is there ([`Fast`]), and
//! to load and store whole registers from references of that size.
//!
//! Invariants kept here
//!   T2  Sums are exact modulo 2^32: a pair of products of 16-bit numbers is one instruction.

use std::arch::x86_64::{
    __m256, __m256i, _mm256_add_epi32, _mm256_add_ps, _mm256_loadu_ps, _mm256_loadu_si256,
    _mm256_madd_epi16, _mm256_mul_ps, _mm256_set1_epi32, _mm256_set1_ps, _mm256_setzero_ps,
    _mm256_setzero_si256, _mm256_storeu_ps, _mm256_storeu_si256,
};

use super::Fast;
use super::ladder::Work;
use crate::codec::ladder::product::{Column, Operand, PANEL, TILE};

/// Registers of a column.
const REGS: usize = 4;
/// Tokens that are multiplied at a time: their sums fill half of the registers.
const ABREAST: usize = 2;

/// [`super::ladder::vectorised`].
pub(crate) fn run<W: Work>(_: Fast, work: W) -> W::Out {
    // SAFETY: `Fast` proves that this processor has AVX2 (V1).
    unsafe { run_wide(work) }
}

#[target_feature(enable = "avx2")]
fn run_wide<W: Work>(work: W) -> W::Out {
    work.run()
}

/// [`crate::codec::ladder::product::multiply`].
pub(crate) fn multiply(
    _: Fast,
    panel: &[Column],
    with: &Operand<'_>,
    tile: usize,
    out: &mut [Column; TILE],
) {
    // SAFETY: `Fast` proves that this processor has AVX2 (V1).
    unsafe { multiply_wide(panel, with, tile, out) }
}

#[target_feature(enable = "avx2")]
fn multiply_wide(panel: &[Column], with: &Operand<'_>, tile: usize, out: &mut [Column; TILE]) {
    for (group, out) in out.as_chunks_mut::<ABREAST>().0.iter_mut().enumerate() {
        let mut sums = [[_mm256_setzero_si256(); REGS]; ABREAST];
        for (column, words) in panel.iter().zip(with.tile(tile)) {
            let column: [__m256i; REGS] = load(column);
            let words = words.as_chunks::<ABREAST>().0.get(group);
            for (sums, word) in sums.iter_mut().zip(words.copied().unwrap_or_default()) {
                let word = _mm256_set1_epi32(word);
                for (sum, column) in sums.iter_mut().zip(column) {
                    *sum = _mm256_add_epi32(*sum, _mm256_madd_epi16(column, word));
                }
            }
        }
        for (out, sums) in out.iter_mut().zip(sums) {
            store(out, sums);
        }
    }
}

/// [`crate::codec::ladder::product::multiply_real`].
pub(crate) fn multiply_real(
    _: Fast,
    panel: &[[f32; PANEL]],
    left: &[[f32; TILE]],
    out: &mut [[f32; PANEL]; TILE],
) {
    // SAFETY: `Fast` proves that this processor has AVX2 (V1).
    unsafe { multiply_real_wide(panel, left, out) }
}

#[target_feature(enable = "avx2")]
fn multiply_real_wide(
    panel: &[[f32; PANEL]],
    left: &[[f32; TILE]],
    out: &mut [[f32; PANEL]; TILE],
) {
    for (group, out) in out.as_chunks_mut::<ABREAST>().0.iter_mut().enumerate() {
        let mut sums = [[_mm256_setzero_ps(); REGS]; ABREAST];
        for (column, left) in panel.iter().zip(left) {
            let column = load_real(column);
            let left = left.as_chunks::<ABREAST>().0.get(group);
            for (sums, value) in sums.iter_mut().zip(left.copied().unwrap_or_default()) {
                let value = _mm256_set1_ps(value);
                for (sum, column) in sums.iter_mut().zip(column) {
                    let product = _mm256_mul_ps(column, value);
                    *sum = _mm256_add_ps(*sum, product);
                }
            }
        }
        for (out, sums) in out.iter_mut().zip(sums) {
            store_real(out, sums);
        }
    }
}

#[target_feature(enable = "avx2")]
fn load(column: &Column) -> [__m256i; REGS] {
    let mut regs = [_mm256_setzero_si256(); REGS];
    for (reg, words) in regs.iter_mut().zip(column.as_chunks::<8>().0) {
        // SAFETY: a register is eight words, and `words` is a reference to so many.
        *reg = unsafe { _mm256_loadu_si256(std::ptr::from_ref(words).cast()) };
    }
    regs
}

#[target_feature(enable = "avx2")]
fn store(column: &mut Column, regs: [__m256i; REGS]) {
    for (words, reg) in column.as_chunks_mut::<8>().0.iter_mut().zip(regs) {
        // SAFETY: a register is eight words, and `words` is a reference to so many.
        unsafe { _mm256_storeu_si256(std::ptr::from_mut(words).cast(), reg) };
    }
}

#[target_feature(enable = "avx2")]
fn load_real(column: &[f32; PANEL]) -> [__m256; REGS] {
    let mut regs = [_mm256_setzero_ps(); REGS];
    for (reg, numbers) in regs.iter_mut().zip(column.as_chunks::<8>().0) {
        // SAFETY: a register is eight numbers, and `numbers` is a reference to so many.
        *reg = unsafe { _mm256_loadu_ps(std::ptr::from_ref(numbers).cast()) };
    }
    regs
}

#[target_feature(enable = "avx2")]
fn store_real(column: &mut [f32; PANEL], regs: [__m256; REGS]) {
    for (numbers, reg) in column.as_chunks_mut::<8>().0.iter_mut().zip(regs) {
        // SAFETY: a register is eight numbers, and `numbers` is a reference to so many.
        unsafe { _mm256_storeu_ps(std::ptr::from_mut(numbers).cast(), reg) };
    }
}
