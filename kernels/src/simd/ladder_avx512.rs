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
    _mm512_shuffle_i32x4, _mm512_storeu_ps, _mm512_storeu_si512, _mm512_unpackhi_epi32,
    _mm512_unpackhi_epi64, _mm512_unpacklo_epi32, _mm512_unpacklo_epi64,
};

use super::Fast512;
use super::ladder::Work;
use crate::codec::ladder::product::{Column, Operand, PANEL, TILE};

/// Words of a register.
pub(super) const WIDE: usize = 16;
/// Registers of a column.
const REGS: usize = 2;
/// Tokens that are multiplied at a time: their sums fill half of the registers.
const ABREAST: usize = 8;

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
    for (group, out) in out.as_chunks_mut::<ABREAST>().0.iter_mut().enumerate() {
        let mut sums = [[_mm512_setzero_si512(); REGS]; ABREAST];
        for (column, words) in panel.iter().zip(with.tile(tile)) {
            let column: [__m512i; REGS] = load(column);
            let words = words.as_chunks::<ABREAST>().0.get(group);
            for (sums, word) in sums.iter_mut().zip(words.copied().unwrap_or_default()) {
                let word = _mm512_set1_epi32(word);
                for (sum, column) in sums.iter_mut().zip(column) {
                    *sum = _mm512_dpwssd_epi32(*sum, column, word);
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
    for (group, out) in out.as_chunks_mut::<ABREAST>().0.iter_mut().enumerate() {
        let mut sums = [[_mm512_setzero_ps(); REGS]; ABREAST];
        for (column, left) in panel.iter().zip(left) {
            let column = load_real(column);
            let left = left.as_chunks::<ABREAST>().0.get(group);
            for (sums, value) in sums.iter_mut().zip(left.copied().unwrap_or_default()) {
                let value = _mm512_set1_ps(value);
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
}

/// [`super::ladder::turn`].
pub(crate) fn turn(_: Fast512, words: &[[i32; WIDE]; WIDE], turned: &mut [[i32; WIDE]; WIDE]) {
    // SAFETY: `Fast512` proves that this processor has the instructions (V1).
    unsafe { turn_words(words, turned) }
}

#[target_feature(enable = "avx512f")]
fn turn_words(words: &[[i32; WIDE]; WIDE], turned: &mut [[i32; WIDE]; WIDE]) {
    let mut rows = [_mm512_setzero_si512(); WIDE];
    for (row, words) in rows.iter_mut().zip(words) {
        *row = load_words(words);
    }
    for (words, row) in turned.iter_mut().zip(turn_rows(rows)) {
        store_words(words, row);
    }
}

/// `turned[j]` has the words `j` of all rows.
#[target_feature(enable = "avx512f")]
#[expect(clippy::indexing_slicing, reason = "all indices are below sixteen")]
pub(super) fn turn_rows(rows: [__m512i; WIDE]) -> [__m512i; WIDE] {
    let mut twos = [_mm512_setzero_si512(); WIDE];
    let mut fours = twos;
    let mut turned = twos;
    for i in 0..WIDE / 2 {
        twos[2 * i] = _mm512_unpacklo_epi32(rows[2 * i], rows[2 * i + 1]);
        twos[2 * i + 1] = _mm512_unpackhi_epi32(rows[2 * i], rows[2 * i + 1]);
    }
    for i in (0..WIDE).step_by(4) {
        fours[i] = _mm512_unpacklo_epi64(twos[i], twos[i + 2]);
        fours[i + 1] = _mm512_unpackhi_epi64(twos[i], twos[i + 2]);
        fours[i + 2] = _mm512_unpacklo_epi64(twos[i + 1], twos[i + 3]);
        fours[i + 3] = _mm512_unpackhi_epi64(twos[i + 1], twos[i + 3]);
    }
    // Each quarter of `fours[4 * i + j]` has a word `j` more than the quarter before by four.
    for j in 0..4 {
        let even = _mm512_shuffle_i32x4::<0x88>(fours[j], fours[4 + j]);
        let odd = _mm512_shuffle_i32x4::<0xdd>(fours[j], fours[4 + j]);
        let later_even = _mm512_shuffle_i32x4::<0x88>(fours[8 + j], fours[12 + j]);
        let later_odd = _mm512_shuffle_i32x4::<0xdd>(fours[8 + j], fours[12 + j]);
        turned[j] = _mm512_shuffle_i32x4::<0x88>(even, later_even);
        turned[4 + j] = _mm512_shuffle_i32x4::<0x88>(odd, later_odd);
        turned[8 + j] = _mm512_shuffle_i32x4::<0xdd>(even, later_even);
        turned[12 + j] = _mm512_shuffle_i32x4::<0xdd>(odd, later_odd);
    }
    turned
}

#[target_feature(enable = "avx512f")]
pub(super) fn load_words(words: &[i32; WIDE]) -> __m512i {
    // SAFETY: a register is sixteen words, and `words` is a reference to so many.
    unsafe { _mm512_loadu_si512(std::ptr::from_ref(words).cast()) }
}

#[target_feature(enable = "avx512f")]
pub(super) fn store_words(words: &mut [i32; WIDE], reg: __m512i) {
    // SAFETY: a register is sixteen words, and `words` is a reference to so many.
    unsafe { _mm512_storeu_si512(std::ptr::from_mut(words).cast(), reg) };
}

#[target_feature(enable = "avx512f")]
fn load(column: &Column) -> [__m512i; REGS] {
    let mut regs = [_mm512_setzero_si512(); REGS];
    for (reg, words) in regs.iter_mut().zip(column.as_chunks::<16>().0) {
        *reg = load_words(words);
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
        store_words(words, reg);
    }
}
