//! A block of bytes, its rows made columns. One of this package's rooms of unsafe code.
//!
//! Upstairs:   [`super`].
//! Downstairs: the processor; what is used every x86-64 processor has.

use std::arch::x86_64::{
    __m128i, _mm_loadu_si128, _mm_setzero_si128, _mm_storeu_si128, _mm_unpackhi_epi8,
    _mm_unpacklo_epi8,
};

use super::{BLOCK, Block};

/// `turned[j][i] = block[i][j]`
#[inline]
pub(crate) fn turn(block: &Block, turned: &mut Block) {
    // SAFETY: every x86-64 processor has SSE2.
    unsafe { turn_rows(block, turned) }
}

#[target_feature(enable = "sse2")]
#[inline]
fn turn_rows(block: &Block, turned: &mut Block) {
    let mut rows = [_mm_setzero_si128(); BLOCK];
    for (row, bytes) in rows.iter_mut().zip(block) {
        *row = load(bytes);
    }
    // Rows 8 apart become neighbours byte by byte: four times of this is a turn.
    for _ in 0..BLOCK.ilog2() {
        let mut next = [_mm_setzero_si128(); BLOCK];
        let (low, high) = rows.split_at(BLOCK / 2);
        for ((next, a), b) in next.as_chunks_mut::<2>().0.iter_mut().zip(low).zip(high) {
            *next = [_mm_unpacklo_epi8(*a, *b), _mm_unpackhi_epi8(*a, *b)];
        }
        rows = next;
    }
    for (bytes, row) in turned.iter_mut().zip(rows) {
        store(bytes, row);
    }
}

#[inline]
fn load(bytes: &[u8; BLOCK]) -> __m128i {
    // SAFETY: the reference is to 16 readable bytes; the load needs no alignment.
    unsafe { _mm_loadu_si128(bytes.as_ptr().cast()) }
}

#[inline]
fn store(bytes: &mut [u8; BLOCK], row: __m128i) {
    // SAFETY: the reference is to 16 bytes that are ours to write; the store needs no alignment.
    unsafe { _mm_storeu_si128(bytes.as_mut_ptr().cast(), row) }
}
