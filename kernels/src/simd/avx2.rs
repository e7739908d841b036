//! AVX2: 8 lanes of 32 bits or 32 bytes at a time. One of this package's rooms of unsafe code.
//!
//! Upstairs:   [`super`].
//! Downstairs: the processor.
//!
//! Unsafe is used for three things only: to call a function that needs AVX2 with the proof that
//! it is there ([`Fast`]), to load and store whole registers from references of that size, and to
//! gather from tables with indices that were cut to their length.
//!
//! Invariants kept here
//!   R3  Words are read only while a whole register of them is left, and written only while there
//!       is room for one.

use std::arch::x86_64::{
    __m128i, __m256i, _mm_loadl_epi64, _mm_loadu_si128, _mm_storeu_si128, _mm256_add_epi32,
    _mm256_and_si256, _mm256_andnot_si256, _mm256_blend_epi32, _mm256_blendv_epi8,
    _mm256_castsi256_ps, _mm256_castsi256_si128, _mm256_cmpeq_epi8, _mm256_cmpeq_epi32,
    _mm256_cmpgt_epi32, _mm256_cvtepu8_epi32, _mm256_cvtepu16_epi32, _mm256_i32gather_epi32,
    _mm256_loadu_si256, _mm256_madd_epi16, _mm256_min_epu8, _mm256_movemask_epi8,
    _mm256_movemask_ps, _mm256_mul_epu32, _mm256_mullo_epi16, _mm256_mullo_epi32, _mm256_or_si256,
    _mm256_packus_epi16, _mm256_packus_epi32, _mm256_permute4x64_epi64,
    _mm256_permutevar8x32_epi32, _mm256_set1_epi8, _mm256_set1_epi16, _mm256_set1_epi32,
    _mm256_setr_epi8, _mm256_setzero_si256, _mm256_shuffle_epi8, _mm256_slli_epi16,
    _mm256_slli_epi32, _mm256_srli_epi16, _mm256_srli_epi32, _mm256_srli_epi64, _mm256_srlv_epi32,
    _mm256_storeu_si256, _mm256_sub_epi8, _mm256_sub_epi32, _mm256_unpackhi_epi8,
    _mm256_unpacklo_epi8,
};

use super::Fast;
use super::steps::{self, steps};
use crate::codec::halves::{GROUP, GROUP_SYMBOLS, Kind, PlanesMut, WINDOW, Window, ZERO};
use crate::rans::reference::Encoder;
use crate::rans::{Codes, Decoder, Frequencies, LANES, LOW, SCALE, SCALE_BITS, SCALE_U32, Slots};

mod lanes;

use lanes::{GATHER, SPREAD, lanes};

/// Lanes of a register.
const WIDE: usize = 8;
/// Registers of a step.
const REGS: usize = LANES / WIDE;
/// Bytes of a register of words.
const WORDS: usize = 16;

steps!(Fast, "avx2,popcnt");

#[target_feature(enable = "avx2,popcnt")]
#[inline]
fn decode_step(
    (states, at): (&mut [__m256i; REGS], &mut usize),
    words: &[u8],
    slots: &Slots,
    out: &mut [u8; LANES],
) {
    let mut symbols = [_mm256_setzero_si256(); REGS];
    for (state, symbol) in states.iter_mut().zip(&mut symbols) {
        let slot = gather_slot(&slots.0, *state);
        let x = next_state(slot, *state);
        let hungry = _mm256_cmpgt_epi32(all(LOW), x);
        let set = lanes_of(hungry);
        let word = _mm256_permutevar8x32_epi32(load_words(words, *at), lanes(&SPREAD, set));
        let fed = _mm256_or_si256(_mm256_slli_epi32::<16>(x), word);
        *state = _mm256_blendv_epi8(x, fed, hungry);
        *symbol = _mm256_and_si256(_mm256_srli_epi32::<12>(slot), all(0xff));
        *at += 2 * set.count_ones() as usize;
    }
    store(out, narrow(symbols));
}

/// `frequency * (state >> 12) + offset`, of 12, 19 and 12 bits, from products of 16 bits: these
/// take half as long as the one of 32 would, and the next step waits for them.
#[target_feature(enable = "avx2")]
#[inline]
fn next_state(slot: __m256i, state: __m256i) -> __m256i {
    let low = _mm256_and_si256(
        _mm256_srli_epi32::<{ SCALE_BITS as i32 }>(state),
        all(0x7fff),
    );
    let high = _mm256_srli_epi32::<{ SCALE_BITS as i32 + 15 }>(state);
    let frequency = _mm256_and_si256(slot, all(0xfff));
    let offset = _mm256_srli_epi32::<20>(slot);
    let high = _mm256_slli_epi32::<15>(_mm256_mullo_epi16(frequency, high));
    _mm256_add_epi32(
        high,
        _mm256_add_epi32(_mm256_madd_epi16(frequency, low), offset),
    )
}

#[target_feature(enable = "avx2,popcnt")]
fn encode_steps(encoder: &mut Encoder<'_>, codes: &Codes, symbols: &[u8]) -> Option<usize> {
    let mut states = load_states(&encoder.states);
    let (scale, one, none) = (all(SCALE_U32), all(1), _mm256_setzero_si256());
    let mut codeless = none;
    let mut left = symbols.len();
    for step in symbols.as_chunks::<LANES>().0.iter().rev() {
        if encoder.at < REGS * WORDS {
            break;
        }
        for (state, symbols) in states.iter_mut().zip(step.as_chunks::<WIDE>().0).rev() {
            let x = *state;
            let symbol = widen(symbols);
            let share = gather_code(&codes.shares, symbol);
            let frequency = _mm256_and_si256(share, all(0xfff));
            codeless = _mm256_or_si256(codeless, _mm256_cmpeq_epi32(frequency, none));
            let large = _mm256_slli_epi32::<19>(frequency);
            let full = _mm256_cmpgt_epi32(x, _mm256_sub_epi32(large, one));
            let set = lanes_of(full);
            let word = _mm256_and_si256(x, all(0xffff));
            let word = _mm256_permutevar8x32_epi32(word, lanes(&GATHER, set));
            store_words(encoder.room, encoder.at, word);
            encoder.at -= 2 * set.count_ones() as usize;
            let x = _mm256_blendv_epi8(x, _mm256_srli_epi32::<16>(x), full);
            let upper = upper_product(x, gather_code(&codes.reciprocal, symbol));
            let quotient = _mm256_srlv_epi32(upper, _mm256_srli_epi32::<24>(share));
            let others = _mm256_sub_epi32(scale, frequency);
            let first = _mm256_and_si256(_mm256_srli_epi32::<12>(share), all(0xfff));
            let missing = _mm256_and_si256(_mm256_cmpeq_epi32(frequency, one), others);
            let x = _mm256_add_epi32(x, _mm256_mullo_epi32(quotient, others));
            let bias = _mm256_add_epi32(first, missing);
            *state = _mm256_add_epi32(x, bias);
        }
        left -= LANES;
    }
    store_states(&mut encoder.states, states);
    (lanes_of(codeless) == 0).then_some(left)
}

#[target_feature(enable = "avx2")]
fn split_groups(kind: Kind, window: Window, raw: &[u8], planes: PlanesMut<'_>) {
    let groups = raw.as_chunks::<{ 2 * GROUP }>().0;
    let symbols = planes.symbols.as_chunks_mut::<GROUP_SYMBOLS>().0;
    let rests = planes.rest.chunks_exact_mut(kind.plane_bytes());
    for ((group, symbols), rest) in groups.iter().zip(symbols).zip(rests) {
        let (low, bits) = rest.split_at_mut(GROUP);
        let mut nibbles = [_mm256_setzero_si256(); 2];
        let halves = group.as_chunks::<GROUP>().0.iter();
        let lows = low.as_chunks_mut::<32>().0;
        for (index, ((half, low), nibble)) in halves.zip(lows).zip(&mut nibbles).enumerate() {
            let [a, b] = half.as_chunks::<32>().0 else {
                return;
            };
            let (a, b) = (load(a), load(b));
            let byte = all16(0xff);
            let least = pack(_mm256_and_si256(a, byte), _mm256_and_si256(b, byte));
            let most = pack(_mm256_srli_epi16::<8>(a), _mm256_srli_epi16::<8>(b));
            let exponent = match kind {
                Kind::Bf16 => {
                    let [a, b] = [_mm256_srli_epi16::<7>(a), _mm256_srli_epi16::<7>(b)];
                    pack(_mm256_and_si256(a, byte), _mm256_and_si256(b, byte))
                }
                Kind::F16 => {
                    let five = all16(31);
                    let [a, b] = [_mm256_srli_epi16::<10>(a), _mm256_srli_epi16::<10>(b)];
                    pack(_mm256_and_si256(a, five), _mm256_and_si256(b, five))
                }
            };
            *nibble = nibbles_of(window, exponent);
            match kind {
                Kind::Bf16 => {
                    let sign = _mm256_and_si256(most, all8(0x80));
                    store(
                        low,
                        _mm256_or_si256(sign, _mm256_and_si256(least, all8(0x7f))),
                    );
                }
                Kind::F16 => {
                    store(low, least);
                    let words = bits.as_chunks_mut::<8>().0;
                    // The bit moves to the top of its byte: no bit comes in from a neighbour
                    // that movemask would look at.
                    let tops = [
                        most,
                        _mm256_slli_epi16::<6>(most),
                        _mm256_slli_epi16::<7>(most),
                    ];
                    for (word, top) in words.iter_mut().zip(tops) {
                        let mask = _mm256_movemask_epi8(top).to_le_bytes();
                        if let Some(half) = word.as_chunks_mut::<4>().0.get_mut(index) {
                            *half = mask;
                        }
                    }
                }
            }
        }
        let [low, high] = nibbles;
        store(symbols, _mm256_or_si256(low, _mm256_slli_epi16::<4>(high)));
    }
}

/// What putting groups together looks up.
struct Merge {
    kind: Kind,
    /// The exponent's bits in the upper and in the lower byte of a value, by nibble.
    upper: __m256i,
    lower: __m256i,
}

impl Merge {
    #[target_feature(enable = "avx2")]
    fn new(kind: Kind, window: Window) -> Self {
        let exponents = window.exponents();
        let (upper, lower) = match kind {
            Kind::Bf16 => (exponents.map(|e| e >> 1), exponents.map(|e| e << 7)),
            Kind::F16 => (exponents.map(|e| (e & 31) << 2), [0; 16]),
        };
        let (upper, lower) = (twice(upper), twice(lower));
        Self { kind, upper, lower }
    }

    #[target_feature(enable = "avx2")]
    #[inline]
    fn group(&self, symbols: &[u8; GROUP_SYMBOLS], rest: &[u8], raw: &mut [u8; 2 * GROUP]) {
        let Some((low, bits)) = rest.split_first_chunk::<GROUP>() else {
            return;
        };
        let symbol = load(symbols);
        let four = all8(15);
        let nibbles = [
            _mm256_and_si256(symbol, four),
            _mm256_and_si256(_mm256_srli_epi16::<4>(symbol), four),
        ];
        let halves = raw.as_chunks_mut::<GROUP>().0.iter_mut();
        let lows = low.as_chunks::<32>().0;
        for (index, ((half, low), nibble)) in halves.zip(lows).zip(nibbles).enumerate() {
            let low = load(low);
            let exponent = _mm256_shuffle_epi8(self.upper, nibble);
            let (least, most) = match self.kind {
                Kind::Bf16 => {
                    let mantissa = _mm256_and_si256(low, all8(0x7f));
                    let sign = _mm256_and_si256(low, all8(0x80));
                    let odd = _mm256_shuffle_epi8(self.lower, nibble);
                    (
                        _mm256_or_si256(mantissa, odd),
                        _mm256_or_si256(sign, exponent),
                    )
                }
                Kind::F16 => {
                    let mut most = exponent;
                    for (word, bit) in bits.as_chunks::<8>().0.iter().zip([0x80, 2, 1]) {
                        let mask = word.as_chunks::<4>().0.get(index).copied();
                        let mask = u32::from_le_bytes(mask.unwrap_or_default());
                        let set = _mm256_and_si256(bytes_of(mask), all8(bit));
                        most = _mm256_or_si256(most, set);
                    }
                    (low, most)
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
}

/// The nibbles of 32 exponents.
#[target_feature(enable = "avx2")]
pub(super) fn nibbles_of(window: Window, exponent: __m256i) -> __m256i {
    let place = _mm256_sub_epi8(exponent, all8(window.base));
    // A place outside the window, and only that, is at least its length.
    let capped = _mm256_min_epu8(place, all8(WINDOW));
    let inside = _mm256_cmpeq_epi8(capped, place);
    let is_length = _mm256_cmpeq_epi8(place, all8(WINDOW));
    let inside = _mm256_andnot_si256(is_length, inside);
    let nibble = _mm256_blendv_epi8(all8(15), place, inside);
    let zero = _mm256_cmpeq_epi8(exponent, _mm256_setzero_si256());
    _mm256_blendv_epi8(nibble, all8(ZERO), zero)
}

/// 32 bytes, each all ones where its bit of `mask` is set.
#[target_feature(enable = "avx2")]
fn bytes_of(mask: u32) -> __m256i {
    let four = _mm256_set1_epi32(mask.cast_signed());
    let byte = _mm256_setr_epi8(
        0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1, 2, 2, 2, 2, 2, 2, 2, 2, 3, 3, 3, 3, 3, 3,
        3, 3,
    );
    let bit = _mm256_setr_epi8(
        1, 2, 4, 8, 16, 32, 64, -128, 1, 2, 4, 8, 16, 32, 64, -128, 1, 2, 4, 8, 16, 32, 64, -128,
        1, 2, 4, 8, 16, 32, 64, -128,
    );
    let spread = _mm256_and_si256(_mm256_shuffle_epi8(four, byte), bit);
    _mm256_cmpeq_epi8(spread, bit)
}

/// Upper halves of 8 products of 32 bits.
#[target_feature(enable = "avx2")]
fn upper_product(a: __m256i, b: __m256i) -> __m256i {
    let even = _mm256_mul_epu32(a, b);
    let odd = _mm256_mul_epu32(_mm256_srli_epi64::<32>(a), _mm256_srli_epi64::<32>(b));
    _mm256_blend_epi32::<0b1010_1010>(_mm256_srli_epi64::<32>(even), odd)
}

/// The lanes whose comparison held, one bit each.
#[target_feature(enable = "avx2")]
fn lanes_of(held: __m256i) -> u8 {
    _mm256_movemask_ps(_mm256_castsi256_ps(held)).to_le_bytes()[0]
}

/// 32 numbers below 256 of four registers, as bytes in their order.
#[target_feature(enable = "avx2")]
fn narrow([a, b, c, d]: [__m256i; REGS]) -> __m256i {
    let bytes = _mm256_packus_epi16(_mm256_packus_epi32(a, b), _mm256_packus_epi32(c, d));
    // Packing works within halves of 128 bits: quads are a0 b0 c0 d0 a1 b1 c1 d1.
    let order = _mm256_cvtepu8_epi32(load8(&[0, 4, 1, 5, 2, 6, 3, 7]));
    _mm256_permutevar8x32_epi32(bytes, order)
}

/// 32 numbers of 16 bits below 256, as bytes in their order.
#[target_feature(enable = "avx2")]
pub(super) fn pack(a: __m256i, b: __m256i) -> __m256i {
    _mm256_permute4x64_epi64::<0b11_01_10_00>(_mm256_packus_epi16(a, b))
}

#[target_feature(enable = "avx2")]
fn widen(bytes: &[u8; WIDE]) -> __m256i {
    _mm256_cvtepu8_epi32(load8(bytes))
}

#[target_feature(enable = "avx2")]
fn all(value: u32) -> __m256i {
    _mm256_set1_epi32(value.cast_signed())
}

#[target_feature(enable = "avx2")]
fn all16(value: u16) -> __m256i {
    _mm256_set1_epi16(value.cast_signed())
}

#[target_feature(enable = "avx2")]
fn all8(value: u8) -> __m256i {
    _mm256_set1_epi8(value.cast_signed())
}

/// The same 16 bytes in both halves.
#[target_feature(enable = "avx2")]
fn twice(bytes: [u8; 16]) -> __m256i {
    let mut both = [0; 32];
    both.as_chunks_mut::<16>().0.fill(bytes);
    load(&both)
}

/// The state of a slot's symbol, by a lane's state each.
#[target_feature(enable = "avx2")]
fn gather_slot(slots: &[u32; SCALE], state: __m256i) -> __m256i {
    let at = _mm256_and_si256(state, all(SCALE_U32 - 1));
    // SAFETY: every index is below SCALE, the length of the table.
    unsafe { _mm256_i32gather_epi32::<4>(slots.as_ptr().cast(), at) }
}

/// An entry each of a table by symbol; symbols are below 256.
#[target_feature(enable = "avx2")]
fn gather_code(codes: &[u32; 256], symbol: __m256i) -> __m256i {
    let at = _mm256_and_si256(symbol, all(0xff));
    // SAFETY: every index is below 256, the length of the table.
    unsafe { _mm256_i32gather_epi32::<4>(codes.as_ptr().cast(), at) }
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

#[target_feature(enable = "avx2")]
fn load8(bytes: &[u8; WIDE]) -> __m128i {
    // SAFETY: the reference is to the 8 bytes that are read; the load needs no alignment.
    unsafe { _mm_loadl_epi64(bytes.as_ptr().cast()) }
}

#[target_feature(enable = "avx2")]
fn load_states(states: &[u32; LANES]) -> [__m256i; REGS] {
    let mut regs = [_mm256_setzero_si256(); REGS];
    for (reg, states) in regs.iter_mut().zip(states.as_chunks::<WIDE>().0) {
        // SAFETY: the reference is to 8 readable numbers; the load needs no alignment.
        *reg = unsafe { _mm256_loadu_si256(states.as_ptr().cast()) };
    }
    regs
}

#[target_feature(enable = "avx2")]
fn store_states(states: &mut [u32; LANES], regs: [__m256i; REGS]) {
    for (reg, states) in regs.into_iter().zip(states.as_chunks_mut::<WIDE>().0) {
        // SAFETY: the reference is to 8 numbers that are ours to write, at any alignment.
        unsafe { _mm256_storeu_si256(states.as_mut_ptr().cast(), reg) }
    }
}

/// The 8 words from `at` on; zeros when there are not so many, which callers rule out (R3).
#[target_feature(enable = "avx2")]
fn load_words(words: &[u8], at: usize) -> __m256i {
    let bytes = words.get(at..).and_then(<[u8]>::first_chunk::<WORDS>);
    let bytes = bytes.unwrap_or(&[0; WORDS]);
    // SAFETY: the reference is to 16 readable bytes; the load needs no alignment.
    let words = unsafe { _mm_loadu_si128(bytes.as_ptr().cast()) };
    _mm256_cvtepu16_epi32(words)
}

/// Puts 8 numbers below 2^16 as words before `end`, where callers keep room for them (R3).
#[target_feature(enable = "avx2")]
fn store_words(room: &mut [u8], end: usize, numbers: __m256i) {
    let words = _mm256_packus_epi32(numbers, numbers);
    let words = _mm256_castsi256_si128(_mm256_permute4x64_epi64::<0b11_01_10_00>(words));
    let bytes = room
        .get_mut(..end)
        .and_then(<[u8]>::last_chunk_mut::<WORDS>);
    if let Some(bytes) = bytes {
        // SAFETY: the reference is to 16 bytes that are ours to write, at any alignment.
        unsafe { _mm_storeu_si128(bytes.as_mut_ptr().cast(), words) }
    }
}
