//! The fastest path for the levels with tables: integer products, and loops that the compiler
//! turns into the registers that there are.
//!
//! Upstairs:   [`crate::codec::ladder`].
//! Downstairs: `ladder_avx2` and `ladder_avx512`, rooms of unsafe code; the scalar reference.
//!
//! Invariants kept here
//!   V2  Whatever path is taken, the bits are the same: integers are exact, and single-precision
//!       arithmetic is one rounding an operation, in an order that the code fixes.

use crate::codec::ladder::product::{self, Column, Operand, Panels, TILE};

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

/// Multiplies all panels with a tile of tokens from `first` on; one entry of `out` a panel.
pub(crate) fn product(
    panels: &Panels,
    with: &Operand<'_>,
    first: usize,
    out: &mut Vec<[Column; TILE]>,
) {
    let count = panels.panels().count();
    out.resize(count, [[0; 32]; TILE]);
    let tiles = panels.panels().zip(out);
    #[cfg(target_arch = "x86_64")]
    {
        if let Some(vnni) = super::ladder_avx512::there() {
            return tiles.for_each(|(panel, out)| {
                super::ladder_avx512::tile(vnni, panel, with, first, out);
            });
        }
        if let Some(fast) = super::fast() {
            return tiles.for_each(|(panel, out)| {
                super::ladder_avx2::tile(fast, panel, with, first, out);
            });
        }
    }
    tiles.for_each(|(panel, out)| product::tile(panel, with, first, out));
}
