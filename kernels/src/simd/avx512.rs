//! AVX-512 (F, BW, VL): 16 lanes of 32 bits or 64 bytes at a time. One of this package's rooms of
//! unsafe code.
//!
//! Upstairs:   [`super`].
//! Downstairs: the processor.
//!
//! Unsafe is used for three things only, as in `avx2`: to call a function that needs these
//! instructions with the proof that they are there ([`Fast512`]), to load and store whole
//! registers from references of that size, and to gather from tables with indices that were cut
//! to their length.
//!
//! A step's words are found by masks: expanding puts the next words into the lanes that want one,
//! compressing takes them out of the lanes that give one, with no table in between.
//!
//! Invariants kept here
//!   R3  Words are read only while a whole register of them is left, and written only while there
//!       is room for one.

use std::arch::x86_64::{
    __m128i, __m256i, __m512i, _mm_loadu_si128, _mm_setzero_si128, _mm256_cmplt_epu8_mask,
    _mm256_loadu_si256, _mm256_mask_mov_epi8, _mm256_or_si256, _mm256_set_m128i, _mm256_set1_epi8,
    _mm256_slli_epi16, _mm256_storeu_si256, _mm256_sub_epi8, _mm256_testn_epi8_mask,
    _mm512_add_epi32, _mm512_and_si512, _mm512_broadcast_i32x4, _mm512_castsi256_si512,
    _mm512_cmpeq_epi32_mask, _mm512_cmpge_epu32_mask, _mm512_cmplt_epu32_mask,
    _mm512_cvtepi16_epi8, _mm512_cvtepi32_epi8, _mm512_cvtepi32_epi16, _mm512_cvtepu8_epi32,
    _mm512_cvtepu16_epi32, _mm512_i32gather_epi32, _mm512_loadu_si512, _mm512_madd_epi16,
    _mm512_mask_add_epi32, _mm512_mask_mov_epi32, _mm512_mask_or_epi32, _mm512_mask_srli_epi32,
    _mm512_maskz_compress_epi32, _mm512_maskz_expand_epi32, _mm512_maskz_mov_epi8,
    _mm512_movepi16_mask, _mm512_mul_epu32, _mm512_mullo_epi16, _mm512_mullo_epi32,
    _mm512_or_si512, _mm512_permutexvar_epi32, _mm512_permutexvar_epi64, _mm512_set1_epi8,
    _mm512_set1_epi16, _mm512_set1_epi32, _mm512_setr_epi32, _mm512_setr_epi64,
    _mm512_setzero_si512, _mm512_shuffle_epi8, _mm512_slli_epi16, _mm512_slli_epi32,
    _mm512_srli_epi16, _mm512_srli_epi32, _mm512_srli_epi64, _mm512_srlv_epi32, _mm512_srlv_epi64,
    _mm512_storeu_si512, _mm512_sub_epi32, _mm512_unpackhi_epi8, _mm512_unpacklo_epi8,
};

use super::Fast512;
use super::steps::{self, steps};
use crate::codec::halves::{GROUP, GROUP_SYMBOLS, Kind, PlanesMut, WINDOW, Window, ZERO};
use crate::rans::reference::Encoder;
use crate::rans::{Codes, Decoder, Frequencies, LANES, LOW, SCALE, SCALE_BITS, SCALE_U32, Slots};

/// Lanes of a register.
const WIDE: usize = 16;
/// Registers of a step.
const REGS: usize = LANES / WIDE;
/// Bytes of a register's words.
const WORDS: usize = 2 * WIDE;

steps!(Fast512, "avx512f,avx512bw,avx512vl,popcnt");

#[target_feature(enable = "avx512f,avx512bw,avx512vl,popcnt")]
#[inline]
fn decode_step(
    (states, at): (&mut [__m512i; REGS], &mut usize),
    words: &[u8],
    slots: &Slots,
    out: &mut [u8; LANES],
) {
    let mut symbols = [_mm_setzero_si128(); REGS];
    for (state, symbols) in states.iter_mut().zip(&mut symbols) {
        let slot = gather_slot(&slots.0, *state);
        let x = next_state(slot, *state);
        let hungry = _mm512_cmplt_epu32_mask(x, all(LOW));
        let word = _mm512_maskz_expand_epi32(hungry, load_words(words, *at));
        *state = _mm512_mask_or_epi32(x, hungry, _mm512_slli_epi32::<16>(x), word);
        *symbols = _mm512_cvtepi32_epi8(_mm512_srli_epi32::<12>(slot));
        *at += 2 * hungry.count_ones() as usize;
    }
    // In one piece, so that a load of all of it need not wait until it is in the cache.
    let [low, high] = symbols;
    store32(out, _mm256_set_m128i(high, low));
}

/// `frequency * (state >> 12) + offset`, of 12, 19 and 12 bits, from products of 16 bits: these
/// take half as long as the one of 32 would, and the next step waits for them.
#[target_feature(enable = "avx512f,avx512bw")]
#[inline]
fn next_state(slot: __m512i, state: __m512i) -> __m512i {
    let low = _mm512_and_si512(_mm512_srli_epi32::<SCALE_BITS>(state), all(0x7fff));
    let high = _mm512_srli_epi32::<{ SCALE_BITS + 15 }>(state);
    let frequency = _mm512_and_si512(slot, all(0xfff));
    let offset = _mm512_srli_epi32::<20>(slot);
    let high = _mm512_slli_epi32::<15>(_mm512_mullo_epi16(frequency, high));
    _mm512_add_epi32(
        high,
        _mm512_add_epi32(_mm512_madd_epi16(frequency, low), offset),
    )
}

#[target_feature(enable = "avx512f,avx512bw,avx512vl,popcnt")]
fn encode_steps(encoder: &mut Encoder<'_>, codes: &Codes, symbols: &[u8]) -> Option<usize> {
    let mut states = load_states(&encoder.states);
    let (scale, one, none) = (all(SCALE_U32), all(1), _mm512_setzero_si512());
    let mut codeless = 0;
    let mut left = symbols.len();
    for step in symbols.as_chunks::<LANES>().0.iter().rev() {
        if encoder.at < REGS * WORDS {
            break;
        }
        for (state, symbols) in states.iter_mut().zip(step.as_chunks::<WIDE>().0).rev() {
            let x = *state;
            let symbol = widen(symbols);
            let share = gather_code(&codes.shares, symbol);
            let frequency = _mm512_and_si512(share, all(0xfff));
            codeless |= _mm512_cmpeq_epi32_mask(frequency, none);
            let full = _mm512_cmpge_epu32_mask(x, _mm512_slli_epi32::<19>(frequency));
            store_words(encoder.room, encoder.at, full, x);
            encoder.at -= 2 * full.count_ones() as usize;
            let x = _mm512_mask_srli_epi32::<16>(x, full, x);
            let upper = upper_product(x, gather_code(&codes.reciprocal, symbol));
            let quotient = _mm512_srlv_epi32(upper, _mm512_srli_epi32::<24>(share));
            let others = _mm512_sub_epi32(scale, frequency);
            let first = _mm512_and_si512(_mm512_srli_epi32::<12>(share), all(0xfff));
            let x = _mm512_add_epi32(x, _mm512_mullo_epi32(quotient, others));
            let rare = _mm512_cmpeq_epi32_mask(frequency, one);
            let bias = _mm512_mask_add_epi32(first, rare, first, others);
            *state = _mm512_add_epi32(x, bias);
        }
        left -= LANES;
    }
    store_states(&mut encoder.states, states);
    (codeless == 0).then_some(left)
}

#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
fn split_groups(kind: Kind, window: Window, raw: &[u8], planes: PlanesMut<'_>) {
    let groups = raw.as_chunks::<{ 2 * GROUP }>().0;
    let symbols = planes.symbols.as_chunks_mut::<GROUP_SYMBOLS>().0;
    let rests = planes.rest.chunks_exact_mut(kind.plane_bytes());
    for ((group, symbols), rest) in groups.iter().zip(symbols).zip(rests) {
        let (low, bits) = rest.split_at_mut(GROUP);
        let mut nibbles = [_mm256_set1_epi8(0); 2];
        let halves = group.as_chunks::<GROUP>().0.iter();
        let lows = low.as_chunks_mut::<32>().0;
        for (index, ((half, low), nibble)) in halves.zip(lows).zip(&mut nibbles).enumerate() {
            let values = load(half);
            match kind {
                Kind::Bf16 => {
                    let exponent = _mm512_cvtepi16_epi8(_mm512_srli_epi16::<7>(values));
                    *nibble = nibbles_of(window, exponent);
                    let mantissa = _mm512_and_si512(values, all16(0x7f));
                    let sign = _mm512_and_si512(_mm512_srli_epi16::<8>(values), all16(0x80));
                    store32(low, _mm512_cvtepi16_epi8(_mm512_or_si512(sign, mantissa)));
                }
                Kind::F16 => {
                    let exponent = _mm512_and_si512(_mm512_srli_epi16::<10>(values), all16(31));
                    *nibble = nibbles_of(window, _mm512_cvtepi16_epi8(exponent));
                    store32(low, _mm512_cvtepi16_epi8(values));
                    let tops = [
                        values,
                        _mm512_slli_epi16::<6>(values),
                        _mm512_slli_epi16::<7>(values),
                    ];
                    for (word, top) in bits.as_chunks_mut::<8>().0.iter_mut().zip(tops) {
                        let mask = _mm512_movepi16_mask(top).to_le_bytes();
                        if let Some(half) = word.as_chunks_mut::<4>().0.get_mut(index) {
                            *half = mask;
                        }
                    }
                }
            }
        }
        let [low, high] = nibbles;
        store32(symbols, _mm256_or_si256(low, _mm256_slli_epi16::<4>(high)));
    }
}

/// What putting groups together looks up.
struct Merge {
    kind: Kind,
    /// The exponent's bits in the upper and in the lower byte of a value, by nibble.
    upper: __m512i,
    lower: __m512i,
}

impl Merge {
    #[target_feature(enable = "avx512f")]
    fn new(kind: Kind, window: Window) -> Self {
        let exponents = window.exponents();
        let (upper, lower) = match kind {
            Kind::Bf16 => (exponents.map(|e| e >> 1), exponents.map(|e| e << 7)),
            Kind::F16 => (exponents.map(|e| (e & 31) << 2), [0; 16]),
        };
        let (upper, lower) = (four_times(&upper), four_times(&lower));
        Self { kind, upper, lower }
    }

    #[target_feature(enable = "avx512f,avx512bw,avx512vl")]
    #[inline]
    fn group(&self, symbols: &[u8; GROUP_SYMBOLS], rest: &[u8], raw: &mut [u8; 2 * GROUP]) {
        // Unpacking works within 16 bytes: with words of 8 values in this order, the lower halves
        // are the first 32 values and the upper halves the others.
        let order = _mm512_setr_epi64(0, 4, 1, 5, 2, 6, 3, 7);
        let both = _mm512_setr_epi64(0, 0, 1, 1, 2, 2, 3, 3);
        let high = _mm512_setr_epi64(0, 4, 0, 4, 0, 4, 0, 4);
        let (Some((low, bits)), [first, second]) =
            (rest.split_first_chunk::<GROUP>(), raw.as_chunks_mut().0)
        else {
            return;
        };
        let symbols = _mm512_permutexvar_epi64(both, _mm512_castsi256_si512(load32(symbols)));
        let nibbles = _mm512_and_si512(_mm512_srlv_epi64(symbols, high), all8(15));
        let low = _mm512_permutexvar_epi64(order, load(low));
        let exponent = _mm512_shuffle_epi8(self.upper, nibbles);
        let (least, most) = match self.kind {
            Kind::Bf16 => {
                let mantissa = _mm512_and_si512(low, all8(0x7f));
                let sign = _mm512_and_si512(low, all8(0x80));
                let odd = _mm512_shuffle_epi8(self.lower, nibbles);
                (
                    _mm512_or_si512(mantissa, odd),
                    _mm512_or_si512(sign, exponent),
                )
            }
            Kind::F16 => {
                let mut rest = _mm512_setzero_si512();
                for (word, bit) in bits.as_chunks::<8>().0.iter().zip([0x80, 2, 1]) {
                    let set = _mm512_maskz_mov_epi8(u64::from_le_bytes(*word), all8(bit));
                    rest = _mm512_or_si512(rest, set);
                }
                let rest = _mm512_permutexvar_epi64(order, rest);
                (low, _mm512_or_si512(rest, exponent))
            }
        };
        store(first, _mm512_unpacklo_epi8(least, most));
        store(second, _mm512_unpackhi_epi8(least, most));
    }
}

/// [`Window::nibble`] of 32 exponents.
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
fn nibbles_of(window: Window, exponent: __m256i) -> __m256i {
    let all = |value: u8| _mm256_set1_epi8(value.cast_signed());
    let place = _mm256_sub_epi8(exponent, all(window.base));
    let inside = _mm256_cmplt_epu8_mask(place, all(WINDOW));
    let nibble = _mm256_mask_mov_epi8(all(15), inside, place);
    let zero = _mm256_testn_epi8_mask(exponent, exponent);
    _mm256_mask_mov_epi8(nibble, zero, all(ZERO))
}

/// Upper halves of 16 products of 32 bits.
#[target_feature(enable = "avx512f")]
fn upper_product(a: __m512i, b: __m512i) -> __m512i {
    let even = _mm512_mul_epu32(a, b);
    let odd = _mm512_mul_epu32(_mm512_srli_epi64::<32>(a), _mm512_srli_epi64::<32>(b));
    _mm512_mask_mov_epi32(_mm512_srli_epi64::<32>(even), 0b1010_1010_1010_1010, odd)
}

#[target_feature(enable = "avx512f")]
fn all(value: u32) -> __m512i {
    _mm512_set1_epi32(value.cast_signed())
}

#[target_feature(enable = "avx512f")]
fn all16(value: u16) -> __m512i {
    _mm512_set1_epi16(value.cast_signed())
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

/// 16 bytes, each in a lane of its own.
#[target_feature(enable = "avx512f")]
fn widen(bytes: &[u8; WIDE]) -> __m512i {
    _mm512_cvtepu8_epi32(load16(bytes))
}

/// The state of a slot's symbol, by a lane's state each.
#[target_feature(enable = "avx512f")]
fn gather_slot(slots: &[u32; SCALE], state: __m512i) -> __m512i {
    let at = _mm512_and_si512(state, all(SCALE_U32 - 1));
    // SAFETY: every index is below SCALE, the length of the table.
    unsafe { _mm512_i32gather_epi32::<4>(at, slots.as_ptr().cast()) }
}

/// An entry each of a table by symbol; symbols are below 256.
#[target_feature(enable = "avx512f")]
fn gather_code(codes: &[u32; 256], symbol: __m512i) -> __m512i {
    let at = _mm512_and_si512(symbol, all(0xff));
    // SAFETY: every index is below 256, the length of the table.
    unsafe { _mm512_i32gather_epi32::<4>(at, codes.as_ptr().cast()) }
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

#[target_feature(enable = "avx512f")]
fn load32(bytes: &[u8; 32]) -> __m256i {
    // SAFETY: the reference is to 32 readable bytes; the load needs no alignment.
    unsafe { _mm256_loadu_si256(bytes.as_ptr().cast()) }
}

#[target_feature(enable = "avx512f")]
fn store32(bytes: &mut [u8; 32], value: __m256i) {
    // SAFETY: the reference is to 32 bytes that are ours to write; the store needs no alignment.
    unsafe { _mm256_storeu_si256(bytes.as_mut_ptr().cast(), value) }
}

#[target_feature(enable = "avx512f")]
fn load16(bytes: &[u8; 16]) -> __m128i {
    // SAFETY: the reference is to 16 readable bytes; the load needs no alignment.
    unsafe { _mm_loadu_si128(bytes.as_ptr().cast()) }
}

#[target_feature(enable = "avx512f")]
fn load_states(states: &[u32; LANES]) -> [__m512i; REGS] {
    let mut regs = [_mm512_setzero_si512(); REGS];
    for (reg, states) in regs.iter_mut().zip(states.as_chunks::<WIDE>().0) {
        // SAFETY: the reference is to 16 readable numbers; the load needs no alignment.
        *reg = unsafe { _mm512_loadu_si512(states.as_ptr().cast()) };
    }
    regs
}

#[target_feature(enable = "avx512f")]
fn store_states(states: &mut [u32; LANES], regs: [__m512i; REGS]) {
    for (reg, states) in regs.into_iter().zip(states.as_chunks_mut::<WIDE>().0) {
        // SAFETY: the reference is to 16 numbers that are ours to write, at any alignment.
        unsafe { _mm512_storeu_si512(states.as_mut_ptr().cast(), reg) }
    }
}

/// The 16 words from `at` on; zeros when there are not so many, which callers rule out (R3).
#[target_feature(enable = "avx512f")]
fn load_words(words: &[u8], at: usize) -> __m512i {
    let bytes = words.get(at..).and_then(<[u8]>::first_chunk::<WORDS>);
    _mm512_cvtepu16_epi32(load32(bytes.unwrap_or(&[0; WORDS])))
}

/// Puts the low words of the lanes of a set before `end`, in their order, where callers keep room
/// for a whole register (R3).
#[target_feature(enable = "avx512f,avx512vl,popcnt")]
fn store_words(room: &mut [u8], end: usize, set: u16, numbers: __m512i) {
    let front = _mm512_maskz_compress_epi32(set, numbers);
    // From the front to the back: indices count on from the number of words, cut to 4 bits.
    let lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    let back = _mm512_permutexvar_epi32(_mm512_add_epi32(lane, all(set.count_ones())), front);
    let bytes = room
        .get_mut(..end)
        .and_then(<[u8]>::last_chunk_mut::<WORDS>);
    if let Some(bytes) = bytes {
        store32(bytes, _mm512_cvtepi32_epi16(back));
    }
}
