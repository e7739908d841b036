//! What AVX2 lacks: putting words into a set of lanes, and taking them out of it, by tables.
//!
//! Upstairs:   [`super`].
//! Downstairs: nothing.

use std::arch::x86_64::__m256i;

use super::{WIDE, widen};

/// For each set of lanes, the place among its words of each lane's.
pub(super) static SPREAD: [[u8; WIDE]; 256] = spread();
/// For each set of lanes, its lanes at the end of the register, in order.
pub(super) static GATHER: [[u8; WIDE]; 256] = gather();

#[allow(
    clippy::indexing_slicing,
    reason = "a constant: a bad index does not compile"
)]
const fn spread() -> [[u8; WIDE]; 256] {
    let mut table = [[0; WIDE]; 256];
    let mut set = 0;
    while set < 256 {
        let (mut lane, mut place) = (0, 0);
        while lane < WIDE {
            if set >> lane & 1 == 1 {
                table[set][lane] = place;
                place += 1;
            }
            lane += 1;
        }
        set += 1;
    }
    table
}

#[allow(
    clippy::cast_possible_truncation,
    clippy::indexing_slicing,
    reason = "a constant: a bad index does not compile, and a lane is below 8"
)]
const fn gather() -> [[u8; WIDE]; 256] {
    let mut table = [[0; WIDE]; 256];
    let mut set = 0;
    while set < 256 {
        let (mut lane, mut place) = (WIDE, WIDE);
        while lane > 0 {
            lane -= 1;
            if set >> lane & 1 == 1 {
                place -= 1;
                table[set][place] = lane as u8;
            }
        }
        set += 1;
    }
    table
}

/// A lane's index each, from a row of a table.
#[target_feature(enable = "avx2")]
pub(super) fn lanes(table: &[[u8; WIDE]; 256], set: u8) -> __m256i {
    let row = table.get(usize::from(set)).unwrap_or(&[0; WIDE]);
    widen(row)
}
