//! AVX2 for the values of level 9. One of this package's rooms of unsafe code.
//!
//! Upstairs:   [`super`].
//! Downstairs: the processor.
//!
//! Unsafe is used to call a function that needs AVX2 with the proof that it is there ([`Fast`]),
//! and to load and store whole registers from references of that size.

use std::arch::x86_64::{
    __m128i, __m256i, _mm_and_si128, _mm_loadu_si128, _mm_or_si128, _mm_set1_epi8, _mm_slli_epi16,
    _mm_srli_epi16, _mm_storeu_si128, _mm256_add_epi32, _mm256_and_si256,
    _mm256_broadcastsi128_si256, _mm256_castsi256_si128, _mm256_cmpeq_epi8,
    _mm256_extracti128_si256, _mm256_loadu_si256, _mm256_madd_epi16, _mm256_movemask_epi8,
    _mm256_or_si256, _mm256_permute4x64_epi64, _mm256_set_epi64x, _mm256_set_m128i,
    _mm256_set1_epi8, _mm256_set1_epi16, _mm256_set1_epi32, _mm256_set1_epi64x,
    _mm256_setzero_si256, _mm256_shuffle_epi8, _mm256_slli_epi16, _mm256_srli_epi16,
    _mm256_storeu_si256, _mm256_unpackhi_epi8, _mm256_unpacklo_epi8, _mm256_xor_si256,
};

use super::avx2::{nibbles_of, pack};
use super::{BLOCK, Fast, Pair, ROWS, SIDE, steps};
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

/// The symbols of whole groups; returns of how many values.
pub(crate) fn symbols(_: Fast, form: (Kind, Window), raw: &[u8], symbols: &mut [u8]) -> usize {
    // SAFETY: `Fast` proves that this processor has AVX2 (V1).
    unsafe { symbols_of(form, raw, symbols) }
}

/// The rest of whole groups; returns of how many.
pub(crate) fn rests(_: Fast, kind: Kind, raw: &[u8], rest: &mut [u8]) -> usize {
    // SAFETY: `Fast` proves that this processor has AVX2 (V1).
    unsafe { rests_of(kind, raw, rest) }
}

/// [`super::costs`].
pub(crate) fn costs<const N: usize>(
    _: Fast,
    counts: &[Pair; N],
    costs: &[[Pair; SIDE]; N],
    sums: &mut [i32; SIDE],
) {
    // SAFETY: `Fast` proves that this processor has AVX2 (V1).
    unsafe { add_costs(counts, costs, sums) }
}

/// `rows[j][i] = columns[i][j] ^ masks[i]`
pub(crate) fn turn_to_rows(
    _: Fast,
    columns: &[&[u8; ROWS]; BLOCK],
    masks: &[u8; BLOCK],
    rows: &mut [[u8; BLOCK]; ROWS],
) {
    // SAFETY: `Fast` proves that this processor has AVX2 (V1).
    unsafe { turn(columns, masks, rows) }
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
        steps::fetch_ahead(group);
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

#[target_feature(enable = "avx2")]
fn symbols_of((kind, window): (Kind, Window), raw: &[u8], symbols: &mut [u8]) -> usize {
    let groups = raw.as_chunks::<GROUP_BYTES>().0.len();
    let halves = raw.as_chunks::<GROUP>().0.iter().take(2 * groups);
    for (values, symbols) in halves.zip(symbols.as_chunks_mut::<32>().0) {
        let (a, b, least, most) = planes(values);
        // No bit comes in from a neighbour: the shifted one is the only one that is kept.
        let (exponent, half) = match kind {
            Kind::Bf16 => {
                let exponent = [_mm256_srli_epi16::<7>(a), _mm256_srli_epi16::<7>(b)];
                (
                    exponent.map(|e| and16(e, 0xff)),
                    _mm256_srli_epi16::<1>(least),
                )
            }
            Kind::F16 => {
                let exponent = [_mm256_srli_epi16::<10>(a), _mm256_srli_epi16::<10>(b)];
                (exponent.map(|e| and16(e, 31)), _mm256_slli_epi16::<4>(most))
            }
        };
        let [low, high] = exponent;
        let nibble = nibbles_of(window, pack(low, high));
        let sign = _mm256_and_si256(_mm256_srli_epi16::<3>(most), all8(SIGN));
        let half = _mm256_and_si256(half, all8(HALF));
        store(
            symbols,
            _mm256_or_si256(nibble, _mm256_or_si256(sign, half)),
        );
    }
    groups * GROUP
}

#[target_feature(enable = "avx2")]
fn rests_of(kind: Kind, raw: &[u8], rest: &mut [u8]) -> usize {
    let groups = raw.as_chunks::<GROUP_BYTES>().0;
    let rests = rest.chunks_exact_mut(rest_bytes(kind));
    for (group, rest) in groups.iter().zip(rests) {
        let [first, second] = group.as_chunks::<GROUP>().0 else {
            continue;
        };
        let ((_, _, a, most_a), (_, _, b, most_b)) = (planes(first), planes(second));
        match kind {
            Kind::Bf16 => {
                let shared = _mm256_extracti128_si256::<1>(b);
                let rows = [
                    (_mm256_castsi256_si128(a), _mm_slli_epi16::<6>(shared)),
                    (
                        _mm256_extracti128_si256::<1>(a),
                        _mm_slli_epi16::<4>(shared),
                    ),
                    (_mm256_castsi256_si128(b), _mm_slli_epi16::<2>(shared)),
                ];
                for (to, (own, shared)) in rest.as_chunks_mut::<16>().0.iter_mut().zip(rows) {
                    let own = _mm_and_si128(own, _mm_set1_epi8(63));
                    let shared = _mm_and_si128(shared, _mm_set1_epi8(0xc0_u8.cast_signed()));
                    store16(to, _mm_or_si128(own, shared));
                }
            }
            Kind::F16 => {
                let eight = [most_a, most_b].map(|most| eighth_bits(most));
                let (low, word) = rest.split_at_mut(GROUP);
                for (to, low) in low.as_chunks_mut::<32>().0.iter_mut().zip([a, b]) {
                    store(to, low);
                }
                for (to, eight) in word.as_chunks_mut::<4>().0.iter_mut().zip(eight) {
                    *to = eight.to_le_bytes();
                }
            }
        }
    }
    groups.len()
}

/// The lowest bit of each byte.
#[target_feature(enable = "avx2")]
fn eighth_bits(most: __m256i) -> i32 {
    _mm256_movemask_epi8(_mm256_slli_epi16::<7>(most))
}

/// 32 values, 16 each, and their lower and upper bytes.
#[target_feature(enable = "avx2")]
fn planes(values: &[u8; GROUP]) -> (__m256i, __m256i, __m256i, __m256i) {
    let [a, b] = values.as_chunks::<32>().0 else {
        let none = _mm256_setzero_si256();
        return (none, none, none, none);
    };
    let (a, b) = (load(a), load(b));
    let least = pack(and16(a, 0xff), and16(b, 0xff));
    let most = pack(_mm256_srli_epi16::<8>(a), _mm256_srli_epi16::<8>(b));
    (a, b, least, most)
}

#[target_feature(enable = "avx2")]
fn and16(values: __m256i, mask: i16) -> __m256i {
    _mm256_and_si256(values, _mm256_set1_epi16(mask))
}

#[target_feature(enable = "avx2")]
fn add_costs<const N: usize>(
    counts: &[Pair; N],
    costs: &[[Pair; SIDE]; N],
    sums: &mut [i32; SIDE],
) {
    let mut regs = [_mm256_setzero_si256(); 2];
    for ([a, b], costs) in counts.iter().zip(costs) {
        let [a0, a1] = a.to_le_bytes();
        let [b0, b1] = b.to_le_bytes();
        let both = _mm256_set1_epi32(i32::from_le_bytes([a0, a1, b0, b1]));
        for (reg, costs) in regs.iter_mut().zip(costs.as_chunks::<8>().0) {
            // SAFETY: the reference is to 8 pairs of 4 bytes; the load needs no alignment.
            let costs = unsafe { _mm256_loadu_si256(costs.as_ptr().cast()) };
            *reg = _mm256_add_epi32(*reg, _mm256_madd_epi16(both, costs));
        }
    }
    for (sums, reg) in sums.as_chunks_mut::<8>().0.iter_mut().zip(regs) {
        let mut eight = [0; 32];
        store(&mut eight, reg);
        for (sum, bytes) in sums.iter_mut().zip(eight.as_chunks::<4>().0) {
            *sum += i32::from_le_bytes(*bytes);
        }
    }
}

#[target_feature(enable = "avx2")]
fn turn(columns: &[&[u8; ROWS]; BLOCK], masks: &[u8; BLOCK], rows: &mut [[u8; BLOCK]; ROWS]) {
    let mut regs = [_mm256_setzero_si256(); BLOCK];
    for ((reg, column), mask) in regs.iter_mut().zip(columns).zip(masks) {
        *reg = _mm256_xor_si256(load(column), all8(*mask));
    }
    // Columns 8 apart become neighbours byte by byte: four times of this is a turn, of the first
    // 16 rows in the lower halves and of the others in the upper ones.
    for _ in 0..BLOCK.ilog2() {
        let mut next = [_mm256_setzero_si256(); BLOCK];
        let (low, high) = regs.split_at(BLOCK / 2);
        for ((next, a), b) in next.as_chunks_mut::<2>().0.iter_mut().zip(low).zip(high) {
            *next = [_mm256_unpacklo_epi8(*a, *b), _mm256_unpackhi_epi8(*a, *b)];
        }
        regs = next;
    }
    let (first, second) = rows.split_at_mut(BLOCK);
    for ((first, second), reg) in first.iter_mut().zip(second).zip(regs) {
        store16(first, _mm256_castsi256_si128(reg));
        store16(second, _mm256_extracti128_si256::<1>(reg));
    }
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
fn store16(bytes: &mut [u8; 16], value: __m128i) {
    // SAFETY: the reference is to 16 bytes that are ours to write; the store needs no alignment.
    unsafe { _mm_storeu_si128(bytes.as_mut_ptr().cast(), value) }
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
