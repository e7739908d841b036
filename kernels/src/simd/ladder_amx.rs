//! AMX for the products of the levels with tables. One of this package's rooms of unsafe code.
//!
//! Upstairs:   [`super::ladder`].
//! Downstairs: the processor, and the operating system, which lends its tiles to a process.
//!
//! A tile is 16 rows of 64 bytes, and an instruction multiplies 16 tokens with 16 rows of a matrix
//! over 64 columns. Numbers have 16 bits, so a matrix lies in low and high bytes
//! ([`Square`]), and a token's numbers are packed so too: `256 * high + low`, with a low byte that
//! has a sign. Most numbers of tokens have no high byte, and then two products do.
//!
//! Unsafe is used to ask the operating system, to call functions that need these instructions with
//! the proof that they are there ([`Amx`]), for the instructions that have no function yet, and to
//! load and store whole registers from references of that size.
//!
//! Invariants kept here
//!   T2  Sums are exact modulo 2^32: tiles add products of bytes and do not saturate, and bytes
//!       are put together by shifts.
//!
//! Not here on purpose: no numbers above [`MOST`], which have no such bytes. A tile with one is
//! multiplied without AMX.

use std::arch::asm;
use std::arch::x86_64::{
    __cpuid, __cpuid_count, __m256i, _mm256_or_si256, _mm256_setzero_si256, _mm256_storeu_si256,
    _mm256_testz_si256, _mm512_add_epi16, _mm512_add_epi32, _mm512_cmpgt_epi16_mask,
    _mm512_cvtepi16_epi8, _mm512_set1_epi16, _mm512_setzero_si512, _mm512_slli_epi32,
    _mm512_srai_epi16,
};
use std::cell::Cell;
use std::sync::OnceLock;

use super::Amx;
use super::ladder_avx512::{WIDE, load_words as load, store_words as store, turn_rows as turn};
use crate::codec::ladder::product::{
    Column, HALF, Operand, PANEL, Panels, SQUARE_ROWS, Square, TILE,
};

/// Largest number of a token that a high byte and a low one with a sign make.
const MOST: i16 = 0x7f7f;
/// Pairs of numbers in a square's columns.
const PAIRS: usize = 32;

/// A thread's packed tokens: squares of 16 tokens' low or high bytes, then those of 16 others.
#[derive(Debug, Default)]
struct Packed {
    lows: Vec<Square>,
    highs: Vec<Square>,
    /// Squares up to the last one with a high byte.
    high: usize,
}

/// Sums of two squares of tokens: of each those with low bytes of the matrix, then with high ones.
#[repr(align(64))]
struct Sums([[[[i32; WIDE]; WIDE]; 2]; 2]);

/// What the tiles are like: palette 1, eight tiles of 16 rows of 64 bytes.
#[repr(align(64))]
#[expect(dead_code, reason = "the processor reads it")]
struct Shape([u8; 64]);

#[expect(clippy::indexing_slicing, reason = "an index beyond does not compile")]
static SHAPE: Shape = {
    let mut bytes = [0; 64];
    bytes[0] = 1;
    let mut tile = 0;
    while tile < 8 {
        bytes[16 + 2 * tile] = 64;
        bytes[48 + tile] = 16;
        tile += 1;
    }
    Shape(bytes)
};

thread_local! {
    static PACKED: Cell<Packed> = const {
        Cell::new(Packed { lows: Vec::new(), highs: Vec::new(), high: 0 })
    };
}

/// True where the processor has the instructions and the operating system lends the tiles. It is
/// asked once: the answer holds for all threads.
pub(super) fn is_lent() -> bool {
    static LENT: OnceLock<bool> = OnceLock::new();
    *LENT.get_or_init(|| {
        // Bits of leaf 7: tiles, and products of bytes.
        const TILES_OF_BYTES: u32 = 1 << 24 | 1 << 25;
        let there =
            __cpuid(0).eax >= 7 && __cpuid_count(7, 0).edx & TILES_OF_BYTES == TILES_OF_BYTES;
        there && ask()
    })
}

/// Asks the operating system for the tiles.
fn ask() -> bool {
    const REQUEST: libc::c_ulong = 0x1023;
    const TILE_DATA: libc::c_ulong = 18;
    // SAFETY: the call takes two numbers, and touches no memory of ours.
    unsafe { libc::syscall(libc::SYS_arch_prctl, REQUEST, TILE_DATA) == 0 }
}

/// The proof, where it may be used.
pub(crate) fn there() -> Option<Amx> {
    super::amx()
}

/// [`super::ladder::product`]; `false`, and nothing done, where a number is above [`MOST`].
pub(crate) fn multiply(
    amx: Amx,
    panels: &Panels,
    with: &Operand<'_>,
    tile: usize,
    out: &mut [[Column; TILE]],
) -> bool {
    let mut packed = PACKED.take();
    // SAFETY: `Amx` proves that this processor has the instructions (V1).
    let done = unsafe { pack(with, tile, &mut packed) };
    if done {
        let highs = packed.highs.get(..packed.high).unwrap_or_default();
        multiply_bytes(amx, panels, [&packed.lows, highs], out);
    }
    PACKED.set(packed);
    done
}

/// Multiplies all panels with squares of a tile's low bytes, and of its high ones.
pub(crate) fn multiply_bytes(
    _: Amx,
    panels: &Panels,
    tokens: [&[Square]; 2],
    out: &mut [[Column; TILE]],
) {
    // SAFETY: `Amx` proves that this processor has the instructions (V1).
    unsafe { multiply_squares(panels, tokens, out) };
}

#[target_feature(enable = "avx512f")]
fn multiply_squares(panels: &Panels, [lows, highs]: [&[Square]; 2], out: &mut [[Column; TILE]]) {
    // SAFETY: `Amx` proves that there are tiles, and the shape is one that all of them have. No
    // code between here and the release uses tiles but ours.
    unsafe { asm!("ldtilecfg [{}]", in(reg) &raw const SHAPE, options(nostack, preserves_flags)) };
    let mut sums = Sums([[[[0; WIDE]; WIDE]; 2]; 2]);
    let mut squares = panels.squares();
    for out in out {
        for half in 0..PANEL / SQUARE_ROWS {
            let own = squares.next().unwrap_or_default();
            add(lows, own, &mut sums);
            put::<false>(&sums, half, out);
            if !highs.is_empty() {
                add(highs, own, &mut sums);
                put::<true>(&sums, half, out);
            }
        }
    }
    // SAFETY: gives back what was configured above.
    unsafe { asm!("tilerelease", options(nostack, preserves_flags)) };
}

/// Multiplies squares of tokens with those of a matrix, as many as there are of both.
#[inline(always)]
fn add(tokens: &[Square], matrix: &[Square], sums: &mut Sums) {
    let count = tokens.len().min(matrix.len());
    if count == 0 {
        *sums = Sums([[[[0; WIDE]; WIDE]; 2]; 2]);
        return;
    }
    // SAFETY: eight tiles are configured. `tokens` and `matrix` are references to at least `count`
    // squares, each of two tiles one after the other, and `sums` is one to four tiles.
    unsafe {
        asm!(
            "tilezero tmm0",
            "tilezero tmm1",
            "tilezero tmm2",
            "tilezero tmm3",
            "2:",
            "tileloadd tmm6, [{matrix} + {row}]",
            "tileloadd tmm4, [{tokens} + {row}]",
            "tileloadd tmm7, [{matrix} + {row} + {HALF}]",
            "tileloadd tmm5, [{tokens} + {row} + {HALF}]",
            "tdpbsud tmm0, tmm4, tmm6",
            "tdpbssd tmm1, tmm4, tmm7",
            "tdpbsud tmm2, tmm5, tmm6",
            "tdpbssd tmm3, tmm5, tmm7",
            "add {tokens}, 2 * {HALF}",
            "add {matrix}, 2 * {HALF}",
            "dec {count}",
            "jnz 2b",
            "tilestored [{sums} + {row}], tmm0",
            "tilestored [{sums} + {row} + {HALF}], tmm1",
            "tilestored [{sums} + {row} + 2 * {HALF}], tmm2",
            "tilestored [{sums} + {row} + 3 * {HALF}], tmm3",
            tokens = inout(reg) tokens.as_ptr() => _,
            matrix = inout(reg) matrix.as_ptr() => _,
            count = inout(reg) count => _,
            row = in(reg) 64_usize,
            sums = in(reg) std::ptr::from_mut(sums),
            HALF = const HALF,
            out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
            out("tmm4") _, out("tmm5") _, out("tmm6") _, out("tmm7") _,
            options(nostack),
        );
    }
}

/// Puts sums together, and where they belong. `HIGH` are those of the tokens' high bytes, and are
/// added to what is there.
#[target_feature(enable = "avx512f")]
fn put<const HIGH: bool>(sums: &Sums, half: usize, out: &mut [Column; TILE]) {
    let groups = out.as_chunks_mut::<WIDE>().0.iter_mut();
    for (out, [lows, highs]) in groups.zip(&sums.0) {
        for (column, (low, high)) in out.iter_mut().zip(lows.iter().zip(highs)) {
            let Some(place) = column.as_chunks_mut::<WIDE>().0.get_mut(half) else {
                continue;
            };
            let sum = _mm512_add_epi32(load(low), _mm512_slli_epi32::<8>(load(high)));
            let sum = match HIGH {
                true => _mm512_add_epi32(load(place), _mm512_slli_epi32::<8>(sum)),
                false => sum,
            };
            store(place, sum);
        }
    }
}

/// Packs a tile's tokens; `false` where a number is above [`MOST`].
#[target_feature(enable = "avx2,avx512f,avx512bw,avx512vl")]
fn pack(with: &Operand<'_>, tile: usize, packed: &mut Packed) -> bool {
    let count = with.pairs.div_ceil(PAIRS);
    for squares in [&mut packed.lows, &mut packed.highs] {
        squares.resize(count, Square([0; 2 * HALF]));
    }
    packed.high = 0;
    let mut pairs = with.tile(tile);
    let mut above = 0;
    for (at, (lows, highs)) in packed.lows.iter_mut().zip(&mut packed.highs).enumerate() {
        let mut high = _mm256_setzero_si256();
        for part in 0..PAIRS / WIDE {
            // Sixteen pairs of the tile's tokens, sixteen tokens at a time.
            let mut rows = [[_mm512_setzero_si512(); WIDE]; TILE / WIDE];
            let [first, second] = &mut rows;
            for (first, second) in first.iter_mut().zip(second) {
                if let Some([a, b]) = pairs.next().map(|words| words.as_chunks::<WIDE>().0) {
                    (*first, *second) = (load(a), load(b));
                }
            }
            // A token's numbers of these pairs are half a row of a square.
            let lows = lows.0.as_chunks_mut::<{ WIDE * 2 * PAIRS }>().0;
            let highs = highs.0.as_chunks_mut::<{ WIDE * 2 * PAIRS }>().0;
            for ((rows, lows), highs) in rows.into_iter().zip(lows).zip(highs) {
                let tokens = turn(rows);
                let lows = lows.as_chunks_mut::<{ 2 * PAIRS }>().0;
                let highs = highs.as_chunks_mut::<{ 2 * PAIRS }>().0;
                for ((token, low), own) in tokens.iter().zip(lows).zip(highs) {
                    above |= _mm512_cmpgt_epi16_mask(*token, _mm512_set1_epi16(MOST));
                    let moved = _mm512_add_epi16(*token, _mm512_set1_epi16(128));
                    let bytes = _mm512_cvtepi16_epi8(_mm512_srai_epi16::<8>(moved));
                    high = _mm256_or_si256(high, bytes);
                    store_half(own, part, bytes);
                    store_half(low, part, _mm512_cvtepi16_epi8(*token));
                }
            }
        }
        if _mm256_testz_si256(high, high) == 0 {
            packed.high = at + 1;
        }
    }
    above == 0
}

#[target_feature(enable = "avx2")]
fn store_half(bytes: &mut [u8; 2 * PAIRS], half: usize, reg: __m256i) {
    if let Some(bytes) = bytes.as_chunks_mut::<PAIRS>().0.get_mut(half) {
        // SAFETY: a register is 32 bytes, and `bytes` is a reference to so many.
        unsafe { _mm256_storeu_si256(std::ptr::from_mut(bytes).cast(), reg) };
    }
}
