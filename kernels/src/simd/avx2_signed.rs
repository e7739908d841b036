//! AVX2 for the values of level 9. One of this package's rooms of unsafe code.
//!
//! Upstairs:   [`super`].
//! Downstairs: the processor.
//!
//! Unsafe is used to call a function that needs AVX2 with the proof that it is there ([`Fast`]),
//! and to load and store whole registers from references of that size.

use std::arch::x86_64::{
    __m128i, __m256i, _mm_and_si128, _mm_loadu_si128, _mm_or_si128, _mm_set1_epi8, _mm_slli_epi16,
    _mm_srli_epi16, _mm256_and_si256, _mm256_broadcastsi128_si256, _mm256_cmpeq_epi8,
    _mm256_loadu_si256, _mm256_or_si256, _mm256_permute4x64_epi64, _mm256_set_epi64x,
    _mm256_set_m128i, _mm256_set1_epi8, _mm256_set1_epi32, _mm256_set1_epi64x,
    _mm256_setzero_si256, _mm256_shuffle_epi8, _mm256_slli_epi16, _mm256_srli_epi16,
    _mm256_storeu_si256, _mm256_unpackhi_epi8, _mm256_unpacklo_epi8,
};

use super::Fast;
use crate::codec::halves::{GROUP, Kind, Window};
use crate::codec::lossless_c::values::{GROUP_BYTES, HALF, SIGN, rest_bytes};

/// Joins whole groups, and returns how many there were.
pub(crate) fn join(
    _: Fast,
    form: (Kind, Window),
    symbols: &[u8],
    rest: &[u8],
    raw: &mut [u8],
) -> usize {
    // SAFETY: `Fast` proves that this processor has AVX2 (V1).
    unsafe { join_groups(form, symbols, rest, raw) }
}

#[target_feature(enable = "avx2")]
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
    let (upper, lower) = (twice(&upper), twice(&lower));
    let groups = raw.as_chunks_mut::<GROUP_BYTES>().0;
    let done = groups.len();
    let rests = rest.chunks_exact(rest_bytes(kind));
    let symbols = symbols.as_chunks::<GROUP>().0;
    for ((group, symbols), rest) in groups.iter_mut().zip(symbols).zip(rests) {
        let lows = match kind {
            Kind::Bf16 => low_bits(rest),
            Kind::F16 => low_bytes(rest),
        };
        let word = rest
            .last_chunk()
            .map_or(0, |bytes| u64::from_le_bytes(*bytes));
        let halves = group.as_chunks_mut::<GROUP>().0.iter_mut();
        let symbols = symbols.as_chunks::<32>().0;
        for (index, ((half, symbol), low)) in (0..).zip(halves.zip(symbols).zip(lows)) {
            let symbol = load(symbol);
            let nibble = _mm256_and_si256(symbol, all8(15));
            // No bit comes in from a neighbour: the shifted one is the only one that is kept.
            let sign = _mm256_slli_epi16::<3>(_mm256_and_si256(symbol, all8(SIGN)));
            let is_half = _mm256_and_si256(symbol, all8(HALF));
            let exponent = _mm256_shuffle_epi8(upper, nibble);
            let most = _mm256_or_si256(sign, exponent);
            let (least, most) = match kind {
                Kind::Bf16 => {
                    let odd = _mm256_shuffle_epi8(lower, nibble);
                    let is_half = _mm256_slli_epi16::<1>(is_half);
                    (_mm256_or_si256(low, _mm256_or_si256(odd, is_half)), most)
                }
                Kind::F16 => {
                    let is_half = _mm256_srli_epi16::<4>(is_half);
                    let [a, b, c, d, e, f, g, h] = word.to_le_bytes();
                    let bits = [[a, b, c, d], [e, f, g, h]];
                    let bits = bits.get(index).copied().unwrap_or_default();
                    let eight = _mm256_and_si256(bytes_of(i32::from_le_bytes(bits)), all8(1));
                    (low, _mm256_or_si256(most, _mm256_or_si256(is_half, eight)))
                }
            };
            // Unpacking works within halves of 128 bits: their quarters are put there first.
            let least = _mm256_permute4x64_epi64::<0b11_01_10_00>(least);
            let most = _mm256_permute4x64_epi64::<0b11_01_10_00>(most);
            if let [a, b] = half.as_chunks_mut::<32>().0 {
                store(a, _mm256_unpacklo_epi8(least, most));
                store(b, _mm256_unpackhi_epi8(least, most));
            }
        }
    }
    done
}

/// 6 bits of mantissa of 64 values of bf16.
#[target_feature(enable = "avx2")]
fn low_bits(rest: &[u8]) -> [__m256i; 2] {
    let [a, b, c] = rest.as_chunks::<16>().0 else {
        return [_mm256_setzero_si256(); 2];
    };
    let (a, b, c) = (load16(a), load16(b), load16(c));
    let upper = |row| _mm_and_si128(_mm_srli_epi16::<6>(row), _mm_set1_epi8(3));
    let shared = _mm_or_si128(upper(a), _mm_slli_epi16::<2>(upper(b)));
    let shared = _mm_or_si128(shared, _mm_slli_epi16::<4>(upper(c)));
    let own = |row| _mm_and_si128(row, _mm_set1_epi8(63));
    [
        _mm256_set_m128i(own(b), own(a)),
        _mm256_set_m128i(shared, own(c)),
    ]
}

/// The low bytes of 64 values of fp16.
#[target_feature(enable = "avx2")]
fn low_bytes(rest: &[u8]) -> [__m256i; 2] {
    match rest.as_chunks::<32>().0 {
        [a, b] => [load(a), load(b)],
        _ => [_mm256_setzero_si256(); 2],
    }
}

/// 32 bytes, each all ones where its bit of `mask` is set.
#[target_feature(enable = "avx2")]
fn bytes_of(mask: i32) -> __m256i {
    let four = _mm256_set1_epi32(mask);
    let byte = _mm256_set_epi64x(
        0x0303_0303_0303_0303,
        0x0202_0202_0202_0202,
        0x0101_0101_0101_0101,
        0,
    );
    let bit = _mm256_set1_epi64x(0x8040_2010_0804_0201_u64.cast_signed());
    let spread = _mm256_and_si256(_mm256_shuffle_epi8(four, byte), bit);
    _mm256_cmpeq_epi8(spread, bit)
}

#[target_feature(enable = "avx2")]
fn all8(value: u8) -> __m256i {
    _mm256_set1_epi8(value.cast_signed())
}

/// The same 16 bytes in both halves.
#[target_feature(enable = "avx2")]
fn twice(bytes: &[u8; 16]) -> __m256i {
    _mm256_broadcastsi128_si256(load16(bytes))
}

#[target_feature(enable = "avx2")]
fn load16(bytes: &[u8; 16]) -> __m128i {
    // SAFETY: the reference is to 16 readable bytes; the load needs no alignment.
    unsafe { _mm_loadu_si128(bytes.as_ptr().cast()) }
}

#[target_feature(enable = "avx2")]
fn load(bytes: &[u8; 32]) -> __m256i {
    // SAFETY: the reference is to 32 readable bytes; the load needs no alignment.
    unsafe { _mm256_loadu_si256(bytes.as_ptr().cast()) }
}

#[target_feature(enable = "avx2")]
fn store(bytes: &mut [u8; 32], value: __m256i) {
    // SAFETY: the reference is to 32 bytes that are ours to write; the store needs no alignment.
    unsafe { _mm256_storeu_si256(bytes.as_mut_ptr().cast(), value) }
}
