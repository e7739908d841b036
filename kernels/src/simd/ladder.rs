//! The fastest path for the levels with tables: integer products, and loops that the compiler
//! turns into the registers that there are.
//!
//! Upstairs:   [`crate::codec::ladder`].
//! Downstairs: `ladder_avx2`, `ladder_avx512` and `ladder_amx`, rooms of unsafe code; the scalar
//!             reference.
//!
//! Invariants kept here
//!   V2  Whatever path is taken, the bits are the same: integers are exact, and single-precision
//!       arithmetic is one rounding an operation, in an order that the code fixes.

use crate::codec::ladder::product::{self, Bytes, Column, Operand, PANEL, Panels, TILE};

/// Work whose loops gain from wide registers.
pub(crate) trait Work {
    /// What comes out.
    type Out;

    /// Does it. Implementations are inlined into each path.
    fn run(self) -> Self::Out;
}

/// Does some work with the widest registers that there are.
pub(crate) fn vectorised<W: Work>(work: W) -> W::Out {
    #[cfg(target_arch = "x86_64")]
    {
        if let Some(fast) = super::fast512() {
            return super::ladder_avx512::run(fast, work);
        }
        if let Some(fast) = super::fast() {
            return super::ladder_avx2::run(fast, work);
        }
    }
    work.run()
}

/// True where matrices are best kept in squares.
pub(crate) fn takes_squares() -> bool {
    #[cfg(all(target_arch = "x86_64", target_os = "linux"))]
    return super::ladder_amx::there().is_some();
    #[cfg(not(all(target_arch = "x86_64", target_os = "linux")))]
    false
}

/// Multiplies all panels with a tile of tokens; one entry of `out` a panel.
pub(crate) fn product(
    panels: &Panels,
    with: &Operand<'_>,
    tile: usize,
    out: &mut Vec<[Column; TILE]>,
) {
    out.resize(panels.count(), [[0; PANEL]; TILE]);
    #[cfg(all(target_arch = "x86_64", target_os = "linux"))]
    if let Some(amx) = super::ladder_amx::there()
        && super::ladder_amx::multiply(amx, panels, with, tile, out)
    {
        return;
    }
    let tiles = panels.panels().zip(out);
    #[cfg(target_arch = "x86_64")]
    {
        if let Some(vnni) = super::ladder_avx512::there() {
            return tiles.for_each(|(panel, out)| {
                super::ladder_avx512::multiply(vnni, panel, with, tile, out);
            });
        }
        if let Some(fast) = super::fast() {
            return tiles.for_each(|(panel, out)| {
                super::ladder_avx2::multiply(fast, panel, with, tile, out);
            });
        }
    }
    tiles.for_each(|(panel, out)| product::multiply(panel, with, tile, out));
}

/// [`product`] with numbers of one byte. `words` is memory.
pub(crate) fn product_bytes(
    panels: &Panels,
    with: &Bytes<'_>,
    tile: usize,
    words: &mut Vec<i32>,
    out: &mut Vec<[Column; TILE]>,
) {
    #[cfg(all(target_arch = "x86_64", target_os = "linux"))]
    if let Some(amx) = super::ladder_amx::there() {
        out.resize(panels.count(), [[0; PANEL]; TILE]);
        return super::ladder_amx::multiply_bytes(amx, panels, [with.tile(tile), &[]], out);
    }
    with.widen(tile, words);
    let with = Operand {
        words,
        pair_stride: TILE,
        tile_stride: 0,
        pairs: words.len() / TILE,
    };
    product(panels, &with, 0, out);
}

/// Rows and columns of [`turn`].
pub(crate) const SIDE: usize = 16;
/// What is turned at a time.
pub(crate) type Side = [[i32; SIDE]; SIDE];

/// `turned[j][i] = words[i][j]`
#[inline(always)]
pub(crate) fn turn(words: &Side, turned: &mut Side) {
    #[cfg(target_arch = "x86_64")]
    if let Some(fast) = super::fast512() {
        return super::ladder_avx512::turn(fast, words, turned);
    }
    for (j, row) in turned.iter_mut().enumerate() {
        for (to, from) in row.iter_mut().zip(words) {
            *to = from.get(j).copied().unwrap_or(0);
        }
    }
}

/// [`product::multiply_real`].
pub(crate) fn product_real(
    panel: &[[f32; PANEL]],
    left: &[[f32; TILE]],
    out: &mut [[f32; PANEL]; TILE],
) {
    #[cfg(target_arch = "x86_64")]
    {
        if let Some(fast) = super::fast512() {
            return super::ladder_avx512::multiply_real(fast, panel, left, out);
        }
        if let Some(fast) = super::fast() {
            return super::ladder_avx2::multiply_real(fast, panel, left, out);
        }
    }
    product::multiply_real(panel, left, out);
}
