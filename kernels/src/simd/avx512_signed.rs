//! AVX-512 for the values of level 9. One of this package's rooms of unsafe code.
//!
//! Upstairs:   [`super`].
//! Downstairs: the processor.
//!
//! Unsafe is used to call a function that needs AVX-512 with the proof that it is there
//! ([`Fast512`]), and to load and store whole registers from references of that size.
//!
//! Not here on purpose: no taking apart. AVX2 does that faster than the rest of encoding needs.

use std::arch::x86_64::{
    __m128i, __m512i, _mm_and_si128, _mm_loadu_si128, _mm_or_si128, _mm_set1_epi8,
    _mm_setzero_si128, _mm_slli_epi16, _mm_srli_epi16, _mm512_and_si512, _mm512_broadcast_i32x4,
    _mm512_castsi128_si512, _mm512_inserti32x4, _mm512_loadu_si512, _mm512_maskz_mov_epi8,
    _mm512_or_si512, _mm512_permutexvar_epi64, _mm512_set1_epi8, _mm512_setr_epi64,
    _mm512_setzero_si512, _mm512_shuffle_epi8, _mm512_slli_epi16, _mm512_srli_epi16,
    _mm512_storeu_si512, _mm512_unpackhi_epi8, _mm512_unpacklo_epi8,
};

use super::{Fast512, steps};
use crate::codec::halves::{GROUP, Kind, Window};
use crate::codec::lossless_c::values::{GROUP_BYTES, HALF, SIGN, rest_bytes};

/// Joins whole groups, and returns how many there were.
pub(crate) fn join(
    _: Fast512,
    form: (Kind, Window),
    symbols: &[u8],
    rest: &[u8],
    raw: &mut [u8],
) -> usize {
    // SAFETY: `Fast512` proves that this processor has what the function needs (V1).
    unsafe { join_groups(form, symbols, rest, raw) }
}

#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
fn join_groups(
    (kind, window): (Kind, Window),
    symbols: &[u8],
    rest: &[u8],
    raw: &mut [u8],
) -> usize {
    let exponents = window.exponents();
    let (upper, lower) = match kind {
        Kind::Bf16 => (exponents.map(|e| e >> 1), exponents.map(|e| e << 7)),
        Kind::F16 => (exponents.map(|e| (e & 31) << 2), [0; 16]),
    };
    let (upper, lower) = (four_times(&upper), four_times(&lower));
    // Unpacking works within 16 bytes: with words of 8 values in this order, the lower halves are
    // the first 32 values and the upper halves the others.
    let order = _mm512_setr_epi64(0, 4, 1, 5, 2, 6, 3, 7);
    let groups = raw.as_chunks_mut::<GROUP_BYTES>().0;
    let done = groups.len();
    let rests = rest.chunks_exact(rest_bytes(kind));
    let symbols = symbols.as_chunks::<GROUP>().0;
    for ((group, symbols), rest) in groups.iter_mut().zip(symbols).zip(rests) {
        steps::fetch_ahead(group);
        let [first, second] = group.as_chunks_mut::<GROUP>().0 else {
            continue;
        };
        let symbols = load(symbols);
        let nibble = _mm512_and_si512(symbols, all8(15));
        // No bit comes in from a neighbour: the shifted one is the only one that is kept.
        let sign = _mm512_slli_epi16::<3>(_mm512_and_si512(symbols, all8(SIGN)));
        let is_half = _mm512_and_si512(symbols, all8(HALF));
        let most = _mm512_or_si512(sign, _mm512_shuffle_epi8(upper, nibble));
        let (least, most) = match kind {
            Kind::Bf16 => {
                let odd = _mm512_shuffle_epi8(lower, nibble);
                let is_half = _mm512_slli_epi16::<1>(is_half);
                let least = _mm512_or_si512(low_bits(rest), _mm512_or_si512(odd, is_half));
                (least, most)
            }
            Kind::F16 => {
                let word = rest.last_chunk();
                let word = word.map_or(0, |bytes| u64::from_le_bytes(*bytes));
                let eight = _mm512_maskz_mov_epi8(word, all8(1));
                let is_half = _mm512_srli_epi16::<4>(is_half);
                let most = _mm512_or_si512(most, _mm512_or_si512(is_half, eight));
                (low_bytes(rest), most)
            }
        };
        let least = _mm512_permutexvar_epi64(order, least);
        let most = _mm512_permutexvar_epi64(order, most);
        store(first, _mm512_unpacklo_epi8(least, most));
        store(second, _mm512_unpackhi_epi8(least, most));
    }
    done
}

/// 6 bits of mantissa of 64 values of bf16.
#[target_feature(enable = "avx512f,avx512bw")]
fn low_bits(rest: &[u8]) -> __m512i {
    let mut rows = [_mm_setzero_si128(); 3];
    for (row, bytes) in rows.iter_mut().zip(rest.as_chunks::<16>().0) {
        *row = load16(bytes);
    }
    let [a, b, c] = rows;
    let upper = |row| _mm_and_si128(_mm_srli_epi16::<6>(row), _mm_set1_epi8(3));
    let shared = _mm_or_si128(upper(a), _mm_slli_epi16::<2>(upper(b)));
    let shared = _mm_or_si128(shared, _mm_slli_epi16::<4>(upper(c)));
    let all = _mm512_inserti32x4::<1>(_mm512_castsi128_si512(a), b);
    let all = _mm512_inserti32x4::<2>(all, c);
    let all = _mm512_inserti32x4::<3>(all, shared);
    _mm512_and_si512(all, all8(63))
}

/// The low bytes of 64 values of fp16.
#[target_feature(enable = "avx512f")]
fn low_bytes(rest: &[u8]) -> __m512i {
    rest.first_chunk()
        .map_or(_mm512_setzero_si512(), |bytes| load(bytes))
}

#[target_feature(enable = "avx512f")]
fn all8(value: u8) -> __m512i {
    _mm512_set1_epi8(value.cast_signed())
}

/// The same 16 bytes in all quarters.
#[target_feature(enable = "avx512f")]
fn four_times(bytes: &[u8; 16]) -> __m512i {
    _mm512_broadcast_i32x4(load16(bytes))
}

#[target_feature(enable = "avx512f")]
fn load16(bytes: &[u8; 16]) -> __m128i {
    // SAFETY: the reference is to 16 readable bytes; the load needs no alignment.
    unsafe { _mm_loadu_si128(bytes.as_ptr().cast()) }
}

#[target_feature(enable = "avx512f")]
fn load(bytes: &[u8; 64]) -> __m512i {
    // SAFETY: the reference is to 64 readable bytes; the load needs no alignment.
    unsafe { _mm512_loadu_si512(bytes.as_ptr().cast()) }
}

#[target_feature(enable = "avx512f")]
fn store(bytes: &mut [u8; 64], value: __m512i) {
    // SAFETY: the reference is to 64 bytes that are ours to write; the store needs no alignment.
    unsafe { _mm512_storeu_si512(bytes.as_mut_ptr().cast(), value) }
}
